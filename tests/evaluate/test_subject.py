"""Every kind of path is found, loaded as it was trained, and refused by its words where it cannot be."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from goat_ds.errors import ConfigError, ExportError
from goat_ds.evaluate.settings import Dtype, EvalSettings
from goat_ds.evaluate.subject import find_subject
from goat_ds.export import export_adapter, export_exact
from tests.evaluate.conftest import word_tokenizer
from tests.export.conftest import (
    ARCHITECTURES,
    TOKENS,
    Trained,
    adapt,
    by_bitsandbytes,
    in_4bit,
    needing_code,
    store_4bit,
    train,
    write_base,
)

pytestmark = [
    # transformers 5.23 deprecates what PEFT 0.21 asks every model for.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
BF16 = torch.bfloat16


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return train(tmp_path, "llama")


def found(model: Path | str, **settings: Any) -> Any:
    return find_subject(EvalSettings(model=str(model), **settings))


def logits_of(model: Path | str, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        return found(model, **settings).load()(input_ids=TOKENS).logits


def as_run(trained: Trained, folder: Path) -> Path:
    """Move the adapter to where a run has its checkpoint."""
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "checkpoint-5" / "not-an-adapter").mkdir()
    (folder / "checkpoint-20").mkdir()
    trained.adapter.rename(folder / "checkpoint-20" / "adapter")
    return folder


def test_a_run_a_checkpoint_an_adapter_and_both_exports_are_the_same_model(tmp_path: Path, trained: Trained) -> None:
    expected, run = trained.logits(), as_run(trained, tmp_path / "run")
    export_exact(run, output=tmp_path / "exact")
    export_adapter(run, output=tmp_path / "peft")
    for path in (run, run / "checkpoint-20", run / "checkpoint-20" / "adapter", tmp_path / "peft"):
        assert torch.equal(logits_of(path), expected), path
        assert found(path).kind == "GOAT adapter"
    assert torch.equal(logits_of(tmp_path / "exact", trust_remote_code=True), expected)
    assert found(tmp_path / "exact", trust_remote_code=True).kind == "exact export"


def test_a_plain_folder_and_a_plain_lora_load(tmp_path: Path, trained: Trained) -> None:
    base = AutoModelForCausalLM.from_pretrained(trained.base)
    with torch.no_grad():
        assert torch.equal(logits_of(trained.base), base(input_ids=TOKENS).logits)
    assert found(trained.base).kind == "whole model"
    lora = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    lora.eval().save_pretrained(tmp_path / "lora")
    assert found(tmp_path / "lora").kind == "LORA adapter"
    with torch.no_grad():
        assert torch.equal(logits_of(tmp_path / "lora"), lora(input_ids=TOKENS).logits)


def test_base_takes_the_place_of_the_one_that_the_adapter_names(tmp_path: Path, trained: Trained) -> None:
    moved = trained.base.rename(tmp_path / "moved")
    words = rf"base \({trained.base}\), which .*adapter names, cannot be loaded: .*; say where it is with --base PATH"
    with pytest.raises(ConfigError, match=words):
        found(trained.adapter)
    assert torch.equal(logits_of(trained.adapter, base=str(moved)), trained.logits())
    with pytest.raises(ConfigError, match=r"base \(.*nowhere\), given with --base, cannot be loaded"):
        found(trained.adapter, base=str(tmp_path / "nowhere"))


def test_an_adapter_is_not_judged_on_a_base_with_other_weights(tmp_path: Path, trained: Trained) -> None:
    write_base(tmp_path / "other", ARCHITECTURES["llama"], seed=1)
    with pytest.raises(ExportError, match=r"its weights are not those that .* was trained on"):
        found(trained.adapter, base=str(tmp_path / "other"))


@pytest.mark.parametrize(
    "settings",
    [
        in_4bit(),
        in_4bit(dtype=BF16, compute="bfloat16", double_quant=True),
        in_4bit(kept=("down_proj", "layers.0.self_attn.q_proj")),
        by_bitsandbytes(),
        by_bitsandbytes(bnb_4bit_quant_type="fp4"),
    ],
)
def test_a_base_that_was_4bit_in_training_is_made_4bit_again(tmp_path: Path, settings: dict[str, Any]) -> None:
    trained = train(tmp_path, "llama", **settings)
    subject = found(trained.adapter)
    assert subject.quantization is not None and subject.dtype == subject.quantization.dtype
    assert torch.equal(logits_of(trained.adapter), trained.logits())


def test_a_base_that_is_stored_in_4bit_is_taken_as_it_is(tmp_path: Path, trained: Trained) -> None:
    stored = store_4bit(trained.base, tmp_path / "stored")
    trained = adapt(stored, tmp_path / "on-stored")
    assert found(trained.adapter).quantization is None
    assert torch.equal(logits_of(trained.adapter), trained.logits())


def test_weights_load_in_the_dtype_that_was_asked_for(trained: Trained) -> None:
    assert {p.dtype for p in found(trained.base, dtype=Dtype.BF16).load().parameters()} == {BF16}
    assert found(trained.adapter, dtype=Dtype.BF16).load().dtype == BF16


def test_a_tokenizer_beside_the_adapter_takes_the_place_of_the_base_one(trained: Trained) -> None:
    assert found(trained.adapter).tokenizer().eos_token is None
    word_tokenizer().save_pretrained(trained.adapter)
    assert found(trained.adapter).tokenizer().eos_token == "</s>"


def test_code_of_an_author_is_not_run_unasked(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks at the terminal"))
    needing_code(trained.base, ran=tmp_path / "ran")
    words = r"needs code of its author \(auto_map: strange.Model\), .*; look at that code, then add --trust_remote_code"
    for path in (trained.base, trained.adapter):
        with pytest.raises(ConfigError, match=words):
            found(path)
    assert not (tmp_path / "ran").exists()


def test_an_exact_export_is_not_read_without_its_code(tmp_path: Path, trained: Trained) -> None:
    export_exact(trained.adapter, output=tmp_path / "exact")
    words = r"model \(.*exact\) is an exact export: .*; look at modeling_goat.py there, then add --trust_remote_code"
    with pytest.raises(ConfigError, match=words):
        found(tmp_path / "exact")


def test_base_beside_a_whole_model_and_a_model_that_is_not_there_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        found(tmp_path / "nowhere", base="other")
    useless, missing = caught.value.problems
    assert useless == f"base (other) has no effect: model ({tmp_path / 'nowhere'}) is no adapter; leave it out"
    assert missing.startswith(f"model ({tmp_path / 'nowhere'}) cannot be loaded: ")


def test_a_folder_without_model_or_adapter_is_refused(tmp_path: Path) -> None:
    words = r"model \(.*\) holds neither config.json, nor adapter_config.json, .*; give a model folder, an adapter"
    with pytest.raises(ConfigError, match=words):
        found(tmp_path)


def change_config(trained: Trained, **values: Any) -> None:
    path = trained.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_adapter_that_names_no_base_is_refused(trained: Trained) -> None:
    change_config(trained, base_model_name_or_path=None)
    with pytest.raises(ConfigError, match="does not say which base it was trained on; give it with --base PATH"):
        found(trained.adapter)


def test_an_adapter_of_a_method_that_peft_does_not_know_is_refused(trained: Trained) -> None:
    change_config(trained, peft_type="SHEEP")
    with pytest.raises(ConfigError, match=r"has no adapter_config.json that PEFT understands: .*SHEEP"):
        found(trained.adapter)


def test_half_an_adapter_is_refused(trained: Trained) -> None:
    (trained.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"has adapter_config.json but no adapter_model.safetensors"):
        found(trained.adapter)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (in_4bit() | {"residual": "fold"}, r"residual \(fold\) was subtracted before its base became 4-bit"),
        (in_4bit(block_size=128), r"trained on a base in nf4, blocks of 128, and transformers .* blocks of 64 only"),
    ],
)
def test_a_base_that_loading_cannot_make_again_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    trained = train(tmp_path, "llama", **settings)
    with pytest.raises(
        ConfigError, match=rf"{words}.*; evaluate its exact export \(python launch/export.py --mode exact"
    ):
        found(trained.adapter)


def test_weights_that_are_no_language_model_are_refused_when_they_load(trained: Trained) -> None:
    path = trained.base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "vit"}))
    with pytest.raises(ConfigError, match=r"model \(.*base\) cannot be loaded: Unrecognized configuration class"):
        found(trained.base).load()


def test_weights_that_are_missing_are_not_made_up(trained: Trained) -> None:
    path = trained.base / "model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "layers.1.mlp.up_proj" not in name}, path)
    with pytest.raises(ConfigError, match=r"weights \(.*base\) lack model.layers.1.mlp.up_proj.weight"):
        found(trained.base).load()
