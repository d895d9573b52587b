"""4-bit layers compute what bitsandbytes says, keep nothing for backward, and carry experts like any other layer."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import datasets
import pytest
import torch
from bitsandbytes import functional
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from goat_ds import BaseMismatchWarning, GoatConfig
from goat_ds.errors import ConfigError
from goat_ds.method.spectrum import decompose, factors_from
from goat_ds.tuner import quantized
from goat_ds.tuner.base_quantization import layers_to_quantize
from goat_ds.tuner.model import named_experts
from goat_ds.tuner.quantized import (
    BLOCK_SIZES,
    Packing,
    QuantizedLinear,
    from_bitsandbytes,
    pack,
    unpack,
    weight_of_4bit,
)
from tests.models import causal_lm, token_ids
from tests.tuner.test_trainers import word_tokenizer

RECORDED = {"quant_type": "nf4", "block_size": 64, "double_quant": False, "kept": []} | {
    "dtype": "float32",
    "weight_dtype": "float32",
    "compute_dtype": "float32",
}
PACKINGS = [
    Packing(),
    Packing(double_quant=True),
    Packing(quant_type="fp4", block_size=128),
    Packing(quant_type="fp4", block_size=32, double_quant=True),
]


def weight(out_features: int = 48, in_features: int = 64, *, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(out_features, in_features, generator=generator).to(dtype)


def theirs(weight_OI: Tensor, packing: Packing, dtype: torch.dtype) -> Tensor:
    """What bitsandbytes makes of a weight in one call each way."""
    packed, state = functional.quantize_4bit(
        weight_OI,
        blocksize=packing.block_size,
        quant_type=packing.quant_type,
        compress_statistics=packing.double_quant,
    )
    state.dtype = dtype
    return functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_an_unpacked_weight_is_bitsandbytes_own_bit_for_bit(packing: Packing, dtype: torch.dtype) -> None:
    weight_OI = weight(dtype=dtype)
    bytes_N = pack(weight_OI, packing)
    assert bytes_N.dtype == torch.uint8
    assert bytes_N.numel() == packing.num_bytes(weight_OI.numel())
    for to in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(unpack(bytes_N, packing, shape=(48, 64), dtype=to), theirs(weight_OI, packing, to))


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_quantised_in_pieces_is_the_one_quantised_at_once(
    double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "VALUES_AT_ONCE", 4096)
    packing = Packing(double_quant=double_quant)
    weight_OI = weight(160, 192)
    found = unpack(pack(weight_OI, packing), packing, shape=(160, 192), dtype=torch.float32)
    assert torch.equal(found, theirs(weight_OI, packing, torch.float32))


def test_every_block_size_divides_what_is_quantised_at_once() -> None:
    assert all(quantized.VALUES_AT_ONCE % size == 0 for size in BLOCK_SIZES)


def test_a_value_costs_four_bits_and_its_share_of_the_statistics() -> None:
    num_values = 4096 * 4096
    bits = [8 * Packing(double_quant=double).num_bytes(num_values) / num_values for double in (False, True)]
    assert bits[0] == 4 + 32 / 64
    assert bits[1] == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-4)


def layer(packing: Packing | None = None, *, bias: bool = True, compute_dtype: Any = torch.float32) -> QuantizedLinear:
    packing = packing or Packing()
    return QuantizedLinear(
        pack(weight(), packing),
        packing=packing,
        shape=(48, 64),
        bias=nn.Parameter(torch.linspace(-1, 1, 48), requires_grad=False) if bias else None,
        dtype=torch.float32,
        compute_dtype=compute_dtype,
        weight_dtype=torch.float32,
    )


def test_forward_and_backward_are_those_of_the_unpacked_weight() -> None:
    quantized_layer = layer()
    plain = nn.Linear(64, 48)
    plain.load_state_dict({"weight": quantized_layer.weight_OI(torch.float32), "bias": quantized_layer.bias})
    x = torch.randn(2, 5, 64, requires_grad=True)
    y, expected = quantized_layer(x), plain(x)
    assert torch.equal(y, expected)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, upstream)[0] for out in (y, expected)))


def test_nothing_is_kept_between_forward_and_backward() -> None:
    kept: list[Tensor] = []
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer()(x)
    assert kept == []


def test_weights_are_multiplied_in_the_compute_dtype_and_given_back_in_that_of_the_input() -> None:
    x = torch.randn(5, 64)
    y = layer(compute_dtype=torch.bfloat16)(x)
    expected = nn.functional.linear(
        x.bfloat16(), layer().weight_OI(torch.bfloat16), torch.linspace(-1, 1, 48).bfloat16()
    )
    assert y.dtype == torch.float32
    assert torch.equal(y, expected.float())


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return tiny models whose linear layers are bitsandbytes' own."""
    folder = tmp_path_factory.mktemp("base")
    causal_lm().save_pretrained(folder)

    def load(**settings: Any) -> Any:
        settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} | settings
        quantization = BitsAndBytesConfig(load_in_4bit=True, **settings)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)

    return load


STORAGES = [torch.uint8, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_a_layer_of_bitsandbytes_is_taken_over_bit_for_bit(
    storage: torch.dtype, double: bool, four_bit: Callable[..., Any]
) -> None:
    base = four_bit(bnb_4bit_quant_storage=storage, bnb_4bit_use_double_quant=double)
    quantized.keep_trainable(base)
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            ours = from_bitsandbytes(module, dtype=torch.float32, compute_dtype=torch.float32)
            own = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(ours.weight_OI(own.dtype), own)
            x = torch.randn(3, module.in_features)
            assert torch.equal(ours(x), module(x))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_experts_start_from_the_weight_that_the_bytes_stand_for(
    storage: torch.dtype, double: bool, four_bit: Callable[..., Any]
) -> None:
    base = four_bit(bnb_4bit_quant_storage=storage, bnb_4bit_use_double_quant=double)
    model = get_peft_model(base, GoatConfig(r=8, num_experts=4, task_type="CAUSAL_LM"))
    for item in named_experts(model, "default"):
        bnb_layer: Any = item.layer.get_base_layer()
        state = copy.copy(bnb_layer.weight.quant_state)
        state.dtype = torch.float32
        weight_OI = functional.dequantize_4bit(bnb_layer.weight.data, state)
        assert weight_OI.shape == (bnb_layer.out_features, bnb_layer.in_features)
        directions = decompose(weight_OI, item.experts.indices())
        factors = factors_from(directions, scale_R=item.experts.scale, rho=10.0)
        torch.testing.assert_close(item.experts.A.data, factors.a_RI.float())
        torch.testing.assert_close(item.experts.B.data, factors.b_OR.float())
        assert item.experts.A.dtype == torch.float32


def test_a_4bit_model_trains_and_its_base_stays_as_it_is(four_bit: Callable[..., Any]) -> None:
    base = prepare_model_for_kbit_training(four_bit(), use_gradient_checkpointing=False)
    model = get_peft_model(base, GoatConfig(r=8, num_experts=4, task_type="CAUSAL_LM"))
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = token_ids(4, 12)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# trl 1.16 knows checkpointing by the name that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer_trains_experts_on_a_4bit_base(
    checkpointing: bool, tmp_path: Path, four_bit: Callable[..., Any]
) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install goat_ds[trl]")
    rows = [{"text": " ".join(f"w{token}" for token in token_ids(12, seed=seed))} for seed in range(2)]
    settings = {"max_steps": 30, "per_device_train_batch_size": 2, "learning_rate": 2e-2, "logging_steps": 1}
    settings |= {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False}
    trainer = trl.SFTTrainer(
        model=four_bit(bnb_4bit_quant_storage=torch.bfloat16),
        args=trl.SFTConfig(output_dir=str(tmp_path), gradient_checkpointing=checkpointing, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        peft_config=GoatConfig(r=8, num_experts=4),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.3
    assert trainer.model.peft_config["default"].base_quantization["quant_type"] == "nf4"


def test_an_evaluation_between_two_steps_leaves_4bit_weights_trainable(four_bit: Callable[..., Any]) -> None:
    model = get_peft_model(four_bit(), GoatConfig(r=8, num_experts=4, task_type="CAUSAL_LM"))
    ids = token_ids(2, 9)

    def gradients() -> list[Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients()
    assert len(before) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_weight_that_was_rearranged_for_generation_is_refused(four_bit: Callable[..., Any]) -> None:
    base = four_bit()
    layer = base.model.layers[0].self_attn.q_proj
    # What bitsandbytes does in eval mode on CPUs with AVX512-BF16.
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ConfigError, match=r"was rearranged by bitsandbytes .* load the model again and adapt it"):
        weight_of_4bit(layer)


def test_8bit_layers_are_refused() -> None:
    linear = bitsandbytes.nn.Linear8bitLt(32, 32, has_fp16_weights=False)
    with pytest.raises(ConfigError, match=r"layer is 8-bit \(LLM.int8\(\)\), which experts cannot start from"):
        get_peft_model(nn.ModuleDict({"layer": linear}), GoatConfig(r=8, num_experts=4, target_modules=["layer"]))


def test_folding_into_a_4bit_weight_is_refused(four_bit: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"q_proj is 4-bit already, and residual \(fold\) cannot be subtracted"):
        get_peft_model(four_bit(), GoatConfig(r=8, num_experts=4, residual="fold"))


def test_disabling_the_adapter_gives_the_4bit_base_back(four_bit: Callable[..., Any]) -> None:
    base = four_bit()
    ids = token_ids(2, 9)
    quantized.keep_trainable(base)
    expected = base(input_ids=ids).logits
    model = get_peft_model(base, GoatConfig(r=8, num_experts=4, task_type="CAUSAL_LM"))
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_the_config_says_how_the_base_is_quantised(tmp_path: Path, four_bit: Callable[..., Any]) -> None:
    base = four_bit(bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head", "v_proj"])
    model = get_peft_model(base, GoatConfig(r=8, num_experts=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    assert GoatConfig.from_pretrained(tmp_path).base_quantization == {
        "quant_type": "nf4",
        "block_size": 64,
        "double_quant": True,
        "dtype": "float32",
        "weight_dtype": "float32",
        "compute_dtype": "float32",
        "kept": [f"model.layers.{number}.self_attn.v_proj" for number in range(2)],
    }
    plain = get_peft_model(causal_lm(), GoatConfig(r=8, num_experts=4, task_type="CAUSAL_LM"))
    assert plain.peft_config["default"].base_quantization is None


def test_a_reloaded_adapter_gives_the_same_logits_on_its_4bit_base(
    tmp_path: Path, four_bit: Callable[..., Any]
) -> None:
    model = get_peft_model(four_bit(), GoatConfig(r=8, num_experts=4, task_type="CAUSAL_LM"))
    ids = token_ids(2, 9)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(four_bit(), tmp_path)
    assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_an_adapter_on_another_base_than_its_own_is_told(tmp_path: Path, four_bit: Callable[..., Any]) -> None:
    get_peft_model(four_bit(), GoatConfig(r=8, num_experts=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "4")
    get_peft_model(causal_lm(), GoatConfig(r=8, num_experts=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "16")
    words = r"trained on a base that is 4-bit \(nf4, blocks of 64\), and this base is not quantised"
    with pytest.warns(BaseMismatchWarning, match=words):
        PeftModel.from_pretrained(causal_lm(), tmp_path / "4")
    with pytest.warns(BaseMismatchWarning, match=r"is not quantised, and this base is 4-bit"):
        PeftModel.from_pretrained(four_bit(), tmp_path / "16")
    with pytest.warns(BaseMismatchWarning, match=r"this base is 4-bit \(nf4, blocks of 64, 2 layers kept\)"):
        PeftModel.from_pretrained(four_bit(llm_int8_skip_modules=["lm_head", "v_proj"]), tmp_path / "4")
    with pytest.warns(BaseMismatchWarning, match=r"blocks of 64\), and this base is 4-bit \(fp4, blocks of 64\)"):
        PeftModel.from_pretrained(four_bit(bnb_4bit_quant_type="fp4"), tmp_path / "4")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"quant_type": "nf4"},
            "must be null or hold quant_type, block_size, double_quant, dtype, weight_dtype, compute_dtype",
        ),
        (
            RECORDED | {"quant_type": "nf5"},
            "has a quant_type or block_size that bitsandbytes does not know",
        ),
        (RECORDED | {"kept": 5}, "double_quant must be true or false, and kept a list"),
        (RECORDED | {"double_quant": "x"}, "double_quant must be true or false, and kept a list"),
        (
            RECORDED | {"compute_dtype": "float64"},
            "dtype, weight_dtype, compute_dtype must be of float32, bfloat16, float16",
        ),
        (
            RECORDED | {"block_size": 48},
            "has a quant_type or block_size that bitsandbytes does not know",
        ),
    ],
)
def test_a_config_whose_quantisation_cannot_be_read_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GoatConfig(r=8, num_experts=4, base_quantization=values)


def test_all_linear_layers_become_4bit_but_the_output_layer_and_those_to_be_kept() -> None:
    names = {path.rpartition(".")[2] for path, _ in layers_to_quantize(causal_lm(), kept=("v_proj",))}
    assert names == {"q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    saved_whole = GoatConfig(r=8, num_experts=4, target_modules=["q_proj"], modules_to_save=["lm_head", "up_proj"])
    whole = get_peft_model(causal_lm(), saved_whole).get_base_model()
    # What is saved whole is trained, and what it was trained from is never computed with.
    assert len(list(layers_to_quantize(whole, kept=()))) == 12
    assert {path.split(".")[3] for path, _ in layers_to_quantize(causal_lm(), kept=("self_attn",))} == {"mlp"}
    adapted = get_peft_model(causal_lm("gpt2"), GoatConfig(r=8, num_experts=4, target_modules=["c_fc"]))
    paths = [path for path, _ in layers_to_quantize(adapted.get_base_model(), kept=("transformer.h.0.mlp.c_proj",))]
    expected = [f"transformer.h.{n}.{end}" for n in range(2) for end in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]
    assert sorted(paths) == sorted([*expected, "transformer.h.1.mlp.c_proj"])


class Router(nn.Linear):
    """A linear layer that gives something else than a product."""

    def forward(self, x: Tensor) -> Any:
        """Return the product and its largest values."""
        product = super().forward(x)
        return product, product.max(dim=-1)


def test_layers_with_a_forward_of_their_own_or_kept_in_fp32_by_their_architecture_do_not_become_4bit() -> None:
    model = causal_lm()
    model.model.layers[0].mlp.gate_proj = Router(32, 48)
    model._keep_in_fp32_modules = ["self_attn.k_proj"]
    paths = {path for path, _ in layers_to_quantize(model, kept=())}
    assert len(paths) == 14 - 1 - 2
    assert not any("k_proj" in path for path in paths) and "model.layers.0.mlp.gate_proj" not in paths


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
def test_one_config_for_two_models_says_of_each_adapter_its_own_base(four_bit: Callable[..., Any]) -> None:
    config = GoatConfig(r=8, num_experts=4, task_type="CAUSAL_LM")
    first, second = get_peft_model(four_bit(), config), get_peft_model(causal_lm(), config)
    assert first.peft_config["default"].base_quantization["quant_type"] == "nf4"
    assert second.peft_config["default"].base_quantization is None
    assert config.base_quantization is None


def test_a_base_that_is_packed_in_two_ways_is_refused_and_left_as_it_was(four_bit: Callable[..., Any]) -> None:
    base, other = four_bit(), four_bit(bnb_4bit_quant_type="fp4")
    base.model.layers[1] = other.model.layers[1]
    with pytest.raises(ConfigError, match=r"packed in different ways: .*fp4, blocks of 64"):
        get_peft_model(base, GoatConfig(r=8, num_experts=4))
    assert type(base.model.layers[0].mlp.up_proj) is bitsandbytes.nn.Linear4bit


def test_a_missing_library_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"a 4-bit base needs bitsandbytes, which does not load .* or use an unquant"):
        quantized.check_backend(torch.device("cpu"))


def test_a_back_end_that_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(functional, "quantize_4bit", broken)
    with pytest.raises(ConfigError, match=r"has no working back end for cpu \(no kernel image is available\)"):
        quantized.check_backend(torch.device("cpu"))
    monkeypatch.undo()
    quantized.check_backend(torch.device("cpu"))
