"""An adapter trained on a 4-bit base leaves with the weights it was trained on, and says how near they are."""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from goat_ds.errors import ConfigError, ExportError
from goat_ds.export import MergeBase, export_adapter, export_exact
from goat_ds.tuner.model import BaseMismatchWarning
from goat_ds.tuner.quantized import is_4bit, weight_of_4bit
from tests.export.conftest import (
    ARCHITECTURES,
    TOKENS,
    Trained,
    adapt,
    by_bitsandbytes,
    in_4bit,
    store_4bit,
    train,
    write_base,
)

pytestmark = [
    # transformers 5.23 deprecates what PEFT 0.21 asks every model for.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT speaks of what it does with an adapted output layer.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

BF16 = torch.bfloat16
IN_BF16 = {"dtype": BF16, "compute": "bfloat16"}


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)(input_ids=TOKENS).logits


def logits_on(base: Path, adapter: Path) -> torch.Tensor:
    """What an adapter says on another base than that of its training."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.warns(BaseMismatchWarning, match=r"was trained on a base that is"):
        routed = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        return routed(input_ids=TOKENS).logits


def written(folder: Path) -> dict[str, torch.Tensor]:
    return {name.replace(".base_layer.", "."): t for name, t in load_file(folder / "model.safetensors").items()}


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export_report.json").read_text())


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the modelling code that transformers copies out of the home directory."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def four_bit(tmp_path: Path) -> Trained:
    """An adapter trained on a LLaMA base that was made 4-bit."""
    return train(tmp_path, "llama", **in_4bit())


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", in_4bit()),
        ("llama", in_4bit(**IN_BF16)),
        ("qwen2", in_4bit(**IN_BF16)),
        ("mixtral", in_4bit()),
        ("llama", in_4bit(double_quant=True, block_size=32, quant_type="fp4")),
        ("llama", in_4bit(**IN_BF16, double_quant=True)),
        ("llama", in_4bit() | {"residual": "fold"}),
        ("llama", in_4bit(**IN_BF16) | {"residual": "fold"}),
        ("llama", in_4bit(**IN_BF16) | {"residual": "fold", "adaptive_scale": True}),
        ("llama", in_4bit(**IN_BF16, kept=("down_proj", "layers.0.self_attn.q_proj")) | {"residual": "fold"}),
        ("llama", in_4bit() | {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", in_4bit() | {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", by_bitsandbytes()),
        ("llama", by_bitsandbytes(BF16)),
        ("qwen2", by_bitsandbytes(BF16, bnb_4bit_use_double_quant=True)),
        ("llama", by_bitsandbytes(bnb_4bit_quant_type="fp4")),
        ("llama", by_bitsandbytes(llm_int8_skip_modules=["q_proj", "lm_head"])),
    ],
)
def test_the_weights_of_training_are_found_again_in_an_unquantised_base(
    tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    trained = train(tmp_path, architecture, **settings)
    exported = export_exact(trained.adapter, output=tmp_path / "out")
    assert exported.report.merge_base is MergeBase.DEQUANT_W4 and exported.report.values.startswith("exactly")
    assert torch.equal(logits_of(tmp_path / "out"), trained.logits())


@pytest.mark.parametrize("residual", ["lowrank", "fold"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_conv1d_weights_are_quantised_as_out_by_in(tmp_path: Path, residual: str, dtype: torch.dtype) -> None:
    settings = in_4bit(dtype=dtype, compute=str(dtype).removeprefix("torch."))
    trained = train(tmp_path, "gpt2", residual=residual, **settings)
    export_exact(trained.adapter, output=tmp_path / "out")
    tensors, base = written(tmp_path / "out"), trained.model.get_base_model()
    for path in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        layer = base.get_submodule(path).get_base_layer()
        assert torch.equal(tensors[f"{path}.weight"], layer.weight_OI(dtype).T)
    # A 4-bit layer multiplies with [O, I] and Conv1D with [I, O], so the same products are summed in another order.
    torch.testing.assert_close(logits_of(tmp_path / "out"), trained.logits())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_stored_4bit_base_is_written_as_it_computes(
    tmp_path: Path, dtype: torch.dtype, double_quant: bool, quant_type: str
) -> None:
    write_base(tmp_path / "whole", ARCHITECTURES["qwen2"])
    stored = {"bnb_4bit_use_double_quant": double_quant, "bnb_4bit_quant_type": quant_type}
    store_4bit(tmp_path / "whole", tmp_path / "base", dtype, **stored)
    settings = by_bitsandbytes(dtype)
    trained = adapt(tmp_path / "base", tmp_path / "adapter", load={}, finish=settings["finish"])
    assert is_4bit(trained.model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer())
    exported = export_exact(trained.adapter, output=tmp_path / "out")
    assert exported.report.values == "exactly those of training"
    assert torch.equal(logits_of(tmp_path / "out"), trained.logits())


def test_nothing_of_the_4bit_storage_is_left_in_the_folder(tmp_path: Path) -> None:
    write_base(tmp_path / "whole", ARCHITECTURES["gpt2"])
    store_4bit(tmp_path / "whole", tmp_path / "base", bnb_4bit_use_double_quant=True)
    trained = adapt(tmp_path / "base", tmp_path / "adapter")
    export_exact(trained.adapter, output=tmp_path / "out")
    whole = {name: t.shape for name, t in load_file(tmp_path / "whole" / "model.safetensors").items()}
    found = {name: t for name, t in written(tmp_path / "out").items() if ".goat_" not in name}
    assert {name: t.shape for name, t in found.items()} == whole
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    # Conv1D sums the same products in another order than the 4-bit layer.
    torch.testing.assert_close(logits_of(tmp_path / "out"), trained.logits())


@pytest.mark.parametrize("residual", ["lowrank", "fold"])
def test_w16_is_the_unquantised_base_with_the_adapter_and_not_what_was_trained(tmp_path: Path, residual: str) -> None:
    trained = train(tmp_path, "llama", residual=residual, **in_4bit())
    exported = export_exact(trained.adapter, output=tmp_path / "out", merge_base=MergeBase.W16)
    logits = logits_of(tmp_path / "out")
    assert torch.equal(logits, logits_on(trained.base, trained.adapter))
    assert not torch.allclose(logits, trained.logits(), atol=1e-3)
    assert exported.report.values == ("not those of training, which computed with 4-bit weights (nf4, blocks of 64)")


def test_what_was_not_quantised_is_written_bit_for_bit(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", **in_4bit(**IN_BF16, kept=("down_proj",)))
    export_exact(trained.adapter, output=tmp_path / "out")
    base, tensors = load_file(trained.base / "model.safetensors"), written(tmp_path / "out")
    same = {name for name, t in base.items() if t.dtype is tensors[name].dtype and torch.equal(t, tensors[name])}
    linear = {name for name in base if "_proj" in name and "down_proj" not in name}
    assert same == base.keys() - linear
    assert {tensors[name].dtype for name in linear} == {BF16}


@pytest.mark.parametrize(("stored_from", "run_in"), [(torch.float32, BF16), (BF16, torch.float32)])
def test_weights_are_packed_again_from_the_dtype_that_they_were_packed_from(
    tmp_path: Path, stored_from: torch.dtype, run_in: torch.dtype
) -> None:
    write_base(tmp_path / "base", ARCHITECTURES["llama"])
    stored = store_4bit(tmp_path / "base", tmp_path / "stored", stored_from, bnb_4bit_compute_dtype=run_in)
    trained = adapt(stored, tmp_path / "adapter", load={"dtype": run_in})
    # transformers leaves what stands beside stored 4-bit weights in the files' dtype; launch/train.py does not.
    recorded = trained.adapter / "adapter_config.json"
    values = json.loads(recorded.read_text())
    values["base_quantization"]["dtype"] = str(run_in).removeprefix("torch.")
    recorded.write_text(json.dumps(values))
    export_exact(trained.adapter, output=tmp_path / "out", base=str(tmp_path / "base"))
    for name, layer in trained.model.get_base_model().named_modules():
        if is_4bit(layer):
            found = written(tmp_path / "out")[name.replace(".base_layer", "") + ".weight"]
            assert torch.equal(found, weight_of_4bit(layer).to(run_in)), name


def test_a_module_trained_whole_takes_the_place_of_the_4bit_one(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    trained = train(tmp_path, "llama", **by_bitsandbytes(), **settings)
    export_exact(trained.adapter, output=tmp_path / "out")
    assert torch.equal(logits_of(tmp_path / "out"), trained.logits())


def test_products_in_a_wider_dtype_than_the_adapter_are_told_as_rounding(tmp_path: Path) -> None:
    # One expert, because rounding may change which experts a token goes to.
    trained = train(tmp_path, "llama", num_experts=1, top_k=1, **in_4bit(dtype=BF16, compute="float32"))
    exported = export_exact(trained.adapter, output=tmp_path / "out")
    assert exported.report.values == (
        "those of training up to rounding: 4-bit layers computed in float32 there, and their weights are bfloat16 here"
    )
    logits = logits_of(tmp_path / "out")
    assert not torch.equal(logits, trained.logits())
    # bfloat16 keeps 8 bits; every 4-bit weight is rounded once to it, and so are the activations (largest logit: 1.6).
    torch.testing.assert_close(logits, trained.logits(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("is_stored", [False, True])
def test_weights_that_were_rounded_for_the_products_of_training_are_written_rounded(
    tmp_path: Path, is_stored: bool
) -> None:
    write_base(tmp_path / "base", ARCHITECTURES["llama"])
    stored = store_4bit(tmp_path / "base", tmp_path / "stored", bnb_4bit_compute_dtype=BF16)
    settings = {} if is_stored else in_4bit(compute="bfloat16")
    trained = adapt(stored if is_stored else tmp_path / "base", tmp_path / "adapter", **settings)
    report = export_exact(trained.adapter, output=tmp_path / "out").report
    assert report.values == (
        "those of training up to rounding: 4-bit layers computed in bfloat16 there, and their weights are float32 here"
    )
    layer = trained.model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer()
    up_proj = written(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
    assert up_proj.dtype is torch.float32
    assert torch.equal(up_proj, weight_of_4bit(layer).to(BF16).to(torch.float32))


def test_an_adapter_of_another_dtype_than_the_base_is_told_as_rounding(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", load={"dtype": BF16})
    report = export_exact(trained.adapter, output=tmp_path / "out").report
    assert report.values == (
        "those of training up to rounding: the adapter's tensors are bfloat16, and the folder loads in float32"
    )


def test_another_4bit_base_may_be_asked_for_and_is_told(tmp_path: Path, trained: Trained) -> None:
    stored = store_4bit(trained.base, tmp_path / "stored")
    exported = export_exact(trained.adapter, output=tmp_path / "out", base=str(stored), merge_base=MergeBase.DEQUANT_W4)
    assert exported.report.values == "not those of training, which had an unquantised base"
    logits = logits_of(tmp_path / "out")
    assert torch.equal(logits, logits_on(stored, trained.adapter))
    assert not torch.allclose(logits, trained.logits(), atol=1e-3)


def test_what_was_trained_whole_stays_so_on_another_4bit_base(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", target_modules=["q_proj"], modules_to_save=["up_proj"])
    stored = store_4bit(trained.base, tmp_path / "stored")
    export_exact(trained.adapter, output=tmp_path / "out", base=str(stored), merge_base=MergeBase.DEQUANT_W4)
    up_proj = trained.model.get_base_model().model.layers[1].mlp.up_proj.modules_to_save["default"]
    assert torch.equal(written(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"], up_proj.weight)


def test_report_card_and_config_tell_which_weights_were_written(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", **in_4bit())
    checkpoint = tmp_path / "checkpoint-20"
    checkpoint.mkdir()
    adapter = trained.adapter.rename(checkpoint / "adapter")
    export_exact(adapter, output=tmp_path / "out")
    values = "exactly those of training, where bitsandbytes quantises the base here as it did there"
    packing = {"quant_type": "nf4", "block_size": 64, "double_quant": False}
    assert report_of(tmp_path / "out") == {
        "mode": "exact",
        "base": "base",
        "step": 20,
        "base_quantization": packing
        | {"dtype": "float32", "weight_dtype": "float32", "compute_dtype": "float32", "kept": []},
        "merge_base": "dequant_w4",
        "values": values,
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| merge_base | dequant_w4: {values} |" in card
    assert "| base in training | 4-bit (nf4, blocks of 64), computed in float32 |" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["goat"]["merge_base"] == "dequant_w4"


def test_an_unquantised_base_is_written_as_it_is_and_told(tmp_path: Path, trained: Trained) -> None:
    export_exact(trained.adapter, output=tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert (report["merge_base"], report["base_quantization"]) == ("w16", None)
    assert report["values"] == "exactly those of training"


def test_an_adapter_folder_keeps_how_its_base_was_quantised(tmp_path: Path) -> None:
    write_base(tmp_path / "whole", ARCHITECTURES["llama"])
    stored = store_4bit(tmp_path / "whole", tmp_path / "base")
    trained = adapt(stored, tmp_path / "adapter")
    export_adapter(trained.adapter, output=tmp_path / "out")
    quantization = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_quantization"]
    assert quantization["quant_type"] == "nf4"
    report = report_of(tmp_path / "out")
    assert (report["mode"], report["merge_base"], report["base_quantization"]) == ("adapter", None, quantization)
    routed = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stored), str(tmp_path / "out")).eval()
    with torch.no_grad():
        assert torch.equal(routed(input_ids=TOKENS).logits, trained.logits())


def test_w16_of_a_4bit_base_is_refused_with_both_ways_out(tmp_path: Path, four_bit: Trained) -> None:
    stored = str(store_4bit(four_bit.base, tmp_path / "stored"))
    words = (
        r"base \(.*stored\) is stored in 4 bits and has no unquantised weights for merge_base \(w16\); give the "
        r"unquantised base with --base PATH, or use --merge_base dequant_w4"
    )
    with pytest.raises(ExportError, match=words):
        export_exact(four_bit.adapter, output=tmp_path / "out", base=stored, merge_base=MergeBase.W16)
    unquantised = adapt(four_bit.base, tmp_path / "other")
    with pytest.raises(ExportError, match=words):
        export_exact(unquantised.adapter, output=tmp_path / "out", base=stored)


def test_dequantised_weights_of_a_base_that_was_never_quantised_are_refused(tmp_path: Path, trained: Trained) -> None:
    with pytest.raises(ConfigError, match=r"merge_base \(dequant_w4\) .* nothing says how .* use --merge_base w16"):
        export_exact(trained.adapter, output=tmp_path / "out", merge_base=MergeBase.DEQUANT_W4)


def test_a_4bit_base_that_is_packed_otherwise_is_refused(tmp_path: Path, four_bit: Trained) -> None:
    stored = store_4bit(four_bit.base, tmp_path / "stored", bnb_4bit_use_double_quant=True)
    words = (
        r"base \(.*stored\) is packed as nf4, blocks of 64, double quantisation, and .*adapter was trained on nf4, "
        r"blocks of 64; give the base of training"
    )
    with pytest.raises(ExportError, match=words):
        export_exact(four_bit.adapter, output=tmp_path / "out", base=str(stored))


def test_a_folded_adapter_on_a_stored_4bit_base_is_refused(tmp_path: Path) -> None:
    trained = train(tmp_path, "llama", residual="fold", **in_4bit())
    stored = store_4bit(trained.base, tmp_path / "stored")
    with pytest.raises(ExportError, match=r"residual \(fold\) was subtracted before quantisation, and base \(.*stored"):
        export_exact(trained.adapter, output=tmp_path / "out", base=str(stored))
