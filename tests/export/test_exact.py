"""The exact folder computes what was trained, in a process that has never heard of goat_ds."""

import copy
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from goat_ds.errors import ConfigError, ExportError
from goat_ds.export import export_exact
from tests.export.conftest import (
    ARCHITECTURES,
    TOKENS,
    Trained,
    adapt,
    become_dense,
    in_4bit,
    needing_code,
    train,
    write_base,
)

pytestmark = [
    # transformers 5.23 deprecates what PEFT 0.21 asks every model for.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT speaks of what it does with an adapted output layer, and of merging where it is tied.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

ALONE = """
import json, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in ("goat_ds", "peft", "deepspeed", "bitsandbytes")
        return None if absent else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
from transformers import AutoModelForCausalLM
folders, tokens, target = json.loads(sys.argv[1]), torch.tensor(json.loads(sys.argv[2])), sys.argv[3]
answers = {}
for name, folder in folders.items():
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    texts = [model.generate(tokens, use_cache=cache, **settings) for cache in (True, False)]
    answers[name] = (logits, *texts)
for name in ("goat_ds", "peft", "deepspeed", "bitsandbytes"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")
torch.save(answers, target)
"""


def load(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(input_ids=TOKENS).logits


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the modelling code that transformers copies out of the home directory."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_a_process_without_goat_ds_computes_and_generates_as_trained_for_every_architecture(tmp_path: Path) -> None:
    trained = {name: train(tmp_path / name, name) for name in ARCHITECTURES}
    trained["four_bit"] = train(tmp_path / "four_bit", "llama", **in_4bit())
    for name, one in trained.items():
        export_exact(one.adapter, output=tmp_path / name / "out")
    folders = {name: str(tmp_path / name / "out") for name in trained}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "home" / "modules")
    command = [sys.executable, "-c", ALONE, json.dumps(folders), json.dumps(TOKENS.tolist()), str(tmp_path / "a.pt")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for name, (logits, cached, uncached) in torch.load(tmp_path / "a.pt").items():
        assert torch.equal(logits, trained[name].logits()), name
        assert torch.equal(cached, trained[name].model.generate(input_ids=TOKENS, **settings)), name
        assert torch.equal(cached, uncached), name


@pytest.mark.parametrize(
    "settings",
    [
        {"residual": "fold"},
        {"adaptive_scale": True},
        {"adaptive_scale": True, "residual": "fold"},
        {"init": "zero"},
        {"num_experts": 1, "top_k": 1},
        {"residual": "gated"},
        {"residual": "gated", "adaptive_scale": True, "shared_experts": 1},
        {"residual": "gated", "num_experts": 1, "top_k": 1},
        {"top_k": 4, "temperature": 0.7},
        {"routing": "threshold", "residual": "gated"},
        {"routing": "threshold", "max_threshold": 0.1, "temperature": 2.0, "shared_experts": 1},
        {"routing": "top_p", "top_p": 0.6},
        {"shared_experts": 2, "top_k": 1},
        {"shared_experts": 2, "top_k": 1, "residual": "fold"},
        {"shared_experts": 1, "adaptive_scale": True},
        {"init": "zero", "shared_A": True, "top_k": 4},
        {"scaling": "rslora", "init": "pissa"},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=str,
)
def test_every_setting_gives_the_trained_logits_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    trained = train(tmp_path, "llama", **settings)
    export_exact(trained.adapter, output=tmp_path / "out")
    assert torch.equal(logits_of(tmp_path / "out"), trained.logits())


@pytest.mark.parametrize(
    "settings",
    [
        {"residual": "gated", "adaptive_scale": True},
        {"routing": "threshold", "temperature": 0.5},
        {"routing": "top_p", "shared_experts": 1},
        {"init": "zero", "shared_A": True, "top_k": 4},
    ],
    ids=str,
)
def test_every_option_gives_the_logits_of_training_in_bf16(tmp_path: Path, settings: dict[str, Any]) -> None:
    trained = train(tmp_path, "llama", load={"dtype": torch.bfloat16}, **settings)
    export_exact(trained.adapter, output=tmp_path / "out")
    with torch.no_grad():
        logits = load(tmp_path / "out", dtype=torch.bfloat16)(input_ids=TOKENS).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, trained.logits())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"residual": "fold"},
        {"adaptive_scale": True},
        {"adaptive_scale": True, "residual": "fold"},
        {"init": "zero"},
        {"residual": "gated", "adaptive_scale": True},
        {"shared_experts": 2, "routing": "threshold"},
    ],
    ids=str,
)
def test_a_static_adapter_gives_the_trained_logits_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    trained = train(tmp_path, "llama", finish=become_dense, **settings)
    export_exact(trained.adapter, output=tmp_path / "out")
    assert not any(name.endswith("goat_router") for name in load(tmp_path / "out").state_dict())
    assert torch.equal(logits_of(tmp_path / "out"), trained.logits())
    assert "depend on the token" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("residual", ["lowrank", "fold"])
def test_conv1d_weights_are_taken_the_way_they_are_stored(tmp_path: Path, residual: str) -> None:
    trained = train(tmp_path, "gpt2", residual=residual)
    export_exact(trained.adapter, output=tmp_path / "out")
    assert torch.equal(logits_of(tmp_path / "out"), trained.logits())


@pytest.mark.parametrize("modules", ["lm_head", "embed_tokens"])
def test_a_tied_weight_that_was_trained_alone_is_no_longer_tied(tmp_path: Path, modules: str) -> None:
    trained = train(tmp_path, "llama_tied", target_modules=["q_proj"], modules_to_save=[modules])
    export_exact(trained.adapter, output=tmp_path / "out")
    assert torch.equal(logits_of(tmp_path / "out"), trained.logits())


def test_an_adapted_output_layer_stays_tied_to_the_embedding(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama_tied", target_modules=["q_proj", "lm_head"])
    export_exact(trained.adapter, output=tmp_path / "out")
    model = load(tmp_path / "out")
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight
    assert torch.equal(logits_of(tmp_path / "out"), trained.logits())


def test_base_tensors_are_written_bit_for_bit_in_their_own_dtype(tmp_path: Path) -> None:
    write_base(tmp_path / "base", ARCHITECTURES["llama"]).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    trained = adapt(tmp_path / "base", tmp_path / "adapter")
    export_exact(trained.adapter, output=tmp_path / "out")
    base, written = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert {name.replace(".base_layer.", ".") for name in written if ".goat_" not in name} == base.keys()
    for name, tensor in written.items():
        if ".goat_" not in name:
            original = base[name.replace(".base_layer.", ".")]
            assert tensor.dtype is torch.bfloat16 and torch.equal(tensor, original)
    assert load(tmp_path / "out").dtype is torch.bfloat16


def test_shards_stay_below_the_size_asked_for_and_are_read_from_several_files(tmp_path: Path) -> None:
    write_base(tmp_path / "base", ARCHITECTURES["llama"], max_shard_size="30KB")
    trained = adapt(tmp_path / "base", tmp_path / "adapter")
    export_exact(trained.adapter, output=tmp_path / "out", max_shard_size="30KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(list((tmp_path / "base").glob("*.safetensors"))) >= 3 and len(shards) >= 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        assert {index["weight_map"][name] for name in tensors} == {shard.name}
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 30_000
    assert torch.equal(logits_of(tmp_path / "out"), trained.logits())


def test_an_old_base_without_the_prefix_and_with_buffers_is_understood(tmp_path: Path) -> None:
    write_base(tmp_path / "base", ARCHITECTURES["gpt2"])
    path = tmp_path / "base" / "model.safetensors"
    old = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(old | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, path, metadata={"format": "pt"})
    trained = adapt(tmp_path / "base", tmp_path / "adapter")
    export_exact(trained.adapter, output=tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "transformer.h.0.attn.c_attn.goat_A" in written and "h.0.attn.bias" not in written
    assert torch.equal(logits_of(tmp_path / "out"), trained.logits())


def test_saving_the_loaded_model_gives_a_folder_that_loads_again(tmp_path: Path, trained: Trained) -> None:
    export_exact(trained.adapter, output=tmp_path / "first")
    load(tmp_path / "first").save_pretrained(tmp_path / "second", max_shard_size="30KB")
    assert torch.equal(logits_of(tmp_path / "second"), trained.logits())


def test_a_reader_without_the_modelling_code_finds_weights_missing(tmp_path: Path, trained: Trained) -> None:
    export_exact(trained.adapter, output=tmp_path / "out")
    _, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert "model.layers.0.self_attn.q_proj.weight" in info["missing_keys"]


def test_a_model_from_the_config_alone_starts_as_its_base_would(tmp_path: Path, trained: Trained) -> None:
    export_exact(trained.adapter, output=tmp_path / "out")
    config = load(tmp_path / "out").config
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert torch.count_nonzero(model.model.layers[0].mlp.up_proj.goat_B) == 0
    assert model(input_ids=TOKENS).logits.isfinite().all()


def test_the_model_loads_in_half_precision_and_routes_in_single(tmp_path: Path, trained: Trained) -> None:
    export_exact(trained.adapter, output=tmp_path / "out")
    model = load(tmp_path / "out", dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.bfloat16)
    routed = peft.PeftModel.from_pretrained(base, str(trained.adapter), autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, routed(input_ids=TOKENS).logits)


def test_tokenizer_chat_template_generation_settings_and_licence_come_along(tmp_path: Path, trained: Trained) -> None:
    GenerationConfig(temperature=0.5, do_sample=True, eos_token_id=2).save_pretrained(trained.base)
    (trained.base / "LICENSE.txt").write_text("terms")
    export_exact(trained.adapter, output=tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False) == "w3 "
    assert load(tmp_path / "out").generation_config.temperature == 0.5
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "terms"


def test_the_card_tells_what_the_run_knew(tmp_path: Path, trained: Trained) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    trained.adapter.rename(checkpoint / "adapter")
    records = [{"step": 10, "loss": 2.5}, {"step": 20, "loss": 1.25}, {"step": 30, "loss": 0.5}]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    export_exact(tmp_path / "run", output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("| loss at step 20 | 1.2500 |", "| r | 8 |", "| eta | 0.2 |", "library_name: transformers"):
        assert fact in card
    assert str(tmp_path) not in card


def test_a_folded_output_layer_that_is_tied_is_refused(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama_tied", target_modules=["q_proj", "lm_head"])
    config = trained.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace("lowrank", "fold"))
    with pytest.raises(ExportError, match=r"lm_head.weight is tied to the embedding, and residual \(fold\)"):
        export_exact(trained.adapter, output=tmp_path / "out")


def test_another_base_is_refused_with_every_layer_that_does_not_fit(tmp_path: Path, trained: Trained) -> None:
    config = copy.deepcopy(ARCHITECTURES["llama"])
    config.update({"num_hidden_layers": 1, "intermediate_size": 40})
    write_base(tmp_path / "other", config)
    with pytest.raises(ExportError) as caught:
        export_exact(trained.adapter, output=tmp_path / "out", base=str(tmp_path / "other"))
    assert "model.layers.0.mlp.up_proj is [40, 32] in the base and [48, 32] in the adapter" in str(caught.value)
    assert "model.layers.1.mlp.up_proj is adapted, and the base has no such linear layer" in str(caught.value)


def test_a_layer_that_training_must_have_had_is_missed(tmp_path: Path, trained: Trained) -> None:
    path = trained.adapter / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "layers.1.mlp.up_proj" not in name}, path)
    with pytest.raises(ExportError, match=r"layers.1.mlp.up_proj is matched by target_modules, and the adapter has no"):
        export_exact(trained.adapter, output=tmp_path / "out")


def test_a_base_that_lacks_a_weight_or_safetensors_is_refused(tmp_path: Path, trained: Trained) -> None:
    path = trained.base / "model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "layers.1.mlp.up_proj" not in name}, path)
    with pytest.raises(ExportError, match=r"base \(.*\) has no tensor for model.layers.1.mlp.up_proj.weight"):
        export_exact(trained.adapter, output=tmp_path / "out")
    path.unlink()
    with pytest.raises(ExportError, match=r"has no model\.safetensors; write it once with"):
        export_exact(trained.adapter, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"model_type": "vit"},
            r"base \(.*\) is no causal language model that transformers builds; use --mode adapter",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"base \(.*\) is stored quantised \(gptq\), .* give the unquantised model with --base PATH",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            r"base \(.*\) is stored quantised \(bitsandbytes in 8 bits\)",
        ),
    ],
)
def test_a_base_of_another_kind_is_refused(tmp_path: Path, trained: Trained, value: dict[str, Any], words: str) -> None:
    path = trained.base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | value))
    with pytest.raises(ExportError, match=words):
        export_exact(trained.adapter, output=tmp_path / "out")


def test_a_bad_size_and_an_existing_folder_are_refused_by_name(tmp_path: Path, trained: Trained) -> None:
    with pytest.raises(ConfigError, match=r"max_shard_size \(big\) is not a size; write it as 500MB or 5GB"):
        export_exact(trained.adapter, output=tmp_path / "out", max_shard_size="big")
    with pytest.raises(ConfigError, match=r"output \(.*base\) exists already"):
        export_exact(trained.adapter, output=trained.base)


def test_nothing_is_left_behind_when_writing_fails(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("goat_ds.export.exact.copy_terms", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExportError, match=r"output \(.*out\) could not be written: .*No space left on device"):
        export_exact(trained.adapter, output=tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("settings", [{"residual": "fold"}, in_4bit()], ids=["fold", "dequant_w4"])
def test_tensors_that_are_computed_are_written_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    trained = train(tmp_path, "llama", **settings)
    alive: list[int] = []
    held: dict[int, int] = {}

    def read(path: Path, name: str) -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
        held[id(tensor)] = 1
        weakref.finalize(tensor, held.pop, id(tensor))
        alive.append(len(held))
        return tensor

    monkeypatch.setattr("goat_ds.export.tensors._read", read)
    export_exact(trained.adapter, output=tmp_path / "out")
    assert len(alive) > 20 and max(alive) <= 2


def test_a_base_that_needs_code_of_its_author_is_refused_and_the_code_never_runs(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks at the terminal"))
    needing_code(trained.base, ran=tmp_path / "ran")
    words = r"base \(.*base\) needs code of its author \(auto_map: strange.Model\), .*; use --mode adapter"
    with pytest.raises(ExportError, match=words):
        export_exact(trained.adapter, output=tmp_path / "out")
    assert not (tmp_path / "ran").exists()
