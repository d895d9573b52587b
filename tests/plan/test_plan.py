"""A plan says what a run really has: counted against real models, and told in one sentence where there is none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensor

from goat_ds import GoatConfig, plan
from goat_ds.base.inspect import inspect
from goat_ds.cli.plan import main
from goat_ds.errors import ConfigError
from goat_ds.plan import loading
from goat_ds.plan.advice import slow
from goat_ds.plan.memory import Memory, Part, Place, checkpoint_bytes
from goat_ds.plan.planner import GPU_GIB, Planner
from goat_ds.plan.skeleton import Kind, build
from goat_ds.train.cli import parse
from goat_ds.train.inputs import read_inputs
from goat_ds.train.preflight import plan_problems, planner_of
from goat_ds.tuner.base_quantization import BaseQuantization, layers_to_quantize
from goat_ds.tuner.model import ADAPTER_NAME
from goat_ds.tuner.quantized import Packing, code_of_statistics
from goat_ds.zero import decompose
from goat_ds.zero.waves import waves
from tests.launching import REPOSITORY
from tests.models import CAUSAL_LMS, causal_lm
from tests.plan.helpers import config_only, planner, settings

ADAPTERS: list[dict[str, Any]] = [
    {},
    {"r": 16, "num_experts": 4, "residual": "fold"},
    {"init": "zero", "target_modules": ["q_proj", "up_proj"]},
    {"num_experts": 1, "top_k": 1},
    {"adaptive_scale": True, "exclude_modules": ["lm_head"]},
]


@pytest.mark.parametrize("options", ADAPTERS, ids=str)
def test_parameters_are_those_of_a_real_model(tmp_path: Path, options: dict[str, Any]) -> None:
    goat = {"r": 8, "num_experts": 4} | options
    model = get_peft_model(causal_lm(dtype=torch.bfloat16), GoatConfig(**goat), autocast_adapter_dtype=False)
    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "compute_dtype": torch.bfloat16}
    skeleton = build(inspect(config_only(tmp_path)), GoatConfig(**goat), attention="sdpa", quantization=None, **bf16)
    assert {held.name: held.num_values for held in skeleton.parameters if held.kind is Kind.TRAINED} == {
        name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert skeleton.num_bytes(*Kind) == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("name", CAUSAL_LMS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_4bit_base_holds_the_bytes_that_its_layers_are_packed_in(
    tmp_path: Path, name: str, double_quant: bool
) -> None:
    packing = Packing(double_quant=double_quant, block_size=32)
    how = dict.fromkeys(("dtype", "weight_dtype", "compute_dtype"), "bfloat16")
    skeleton = build(
        inspect(config_only(tmp_path, name)),
        GoatConfig(r=8),
        dtype=torch.bfloat16,
        attention="sdpa",
        quantization=BaseQuantization(packing=packing, **how),
        compute_dtype=torch.bfloat16,
    )
    layers = [layer for _, layer in layers_to_quantize(causal_lm(name), kept=())]
    values: list[int] = [layer.weight.numel() for layer in layers]  # type: ignore[union-attr, operator, misc]
    assert skeleton.num_bytes(Kind.FOUR_BIT) == sum(map(packing.num_bytes, values))
    assert skeleton.num_base_values == causal_lm(name).num_parameters()


@pytest.mark.parametrize("is_made_before", [False, True])
def test_double_quantisation_is_planned_and_leaves_its_code_as_it_was(tmp_path: Path, is_made_before: bool) -> None:
    code_of_statistics.cache_clear()
    if is_made_before:
        code_of_statistics(torch.device("cpu"))
    four_bit = planner(tmp_path, "--load_in_4bit").timeline
    double = planner(tmp_path, "--load_in_4bit", "--bnb_4bit_use_double_quant").timeline
    # Statistics are unpacked with a weight, and gone with it.
    assert double.peak >= four_bit.peak and double.kept == four_bit.kept
    assert not isinstance(code_of_statistics(torch.device("cpu")), FakeTensor)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shards_are_padded_and_more_ranks_hold_less_each(tmp_path: Path, stage: int) -> None:
    found = planner(tmp_path, ds_config={"zero_optimization": {"stage": stage}})
    alone, two, three = (found.in_training(ranks) for ranks in (1, 2, 3))
    masters = [next(p.num_bytes for p in memory.parts if p.name.startswith("master")) for memory in (alone, two, three)]
    trained = found.skeleton.count(Kind.TRAINED)
    assert masters[0] == 4 * trained
    for ranks, bytes_here in zip((2, 3), masters[1:], strict=True):
        assert 4 * trained <= ranks * bytes_here <= 4 * (trained + ranks * len(found.skeleton.parameters))


def test_what_is_offloaded_is_on_the_host(tmp_path: Path) -> None:
    content = json.loads((REPOSITORY / "ds_configs" / "zero3_offload.json").read_text())
    memory = planner(tmp_path, ds_config=content).in_training(2)
    on_host = {part.name for part in memory.parts if part.place is Place.HOST}
    assert {"base", "adapter, trained", "master weights, fp32", "Adam's moments, fp32", "gradients"} <= on_host
    assert planner(tmp_path).in_training(2).on(Place.HOST) == 0


@pytest.mark.parametrize(("stage", "place"), [(1, Place.DEVICE), (2, Place.HOST)])
def test_below_zero_2_gradients_wait_on_the_device_for_an_optimizer_on_the_host(
    tmp_path: Path, stage: int, place: Place
) -> None:
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    memory = planner(tmp_path, ds_config={"zero_optimization": zero}).in_training(2)
    assert [part.place for part in memory.parts if part.name == "gradients"] == [place]


def test_below_zero_3_overlapping_takes_a_second_bucket(tmp_path: Path) -> None:
    def bucket(stage: int, overlap: bool) -> int:
        zero = {"stage": stage, "overlap_comm": overlap, "reduce_bucket_size": 1000}
        memory = planner(tmp_path, ds_config={"zero_optimization": zero}).in_training(2)
        return sum(part.num_bytes for part in memory.parts if "bucket" in part.name)

    assert bucket(2, True) == 2 * bucket(2, False) > 0
    assert bucket(3, True) == bucket(3, False) > 0


def test_a_second_copy_of_the_parameters_lies_where_they_lie(tmp_path: Path) -> None:
    for offload, place in (({"device": "cpu"}, Place.HOST), ({"device": "none"}, Place.DEVICE)):
        zero = {"stage": 3, "zero_hpz_partition_size": 2, "offload_param": offload}
        memory = planner(tmp_path, ds_config={"zero_optimization": zero}).in_training(4)
        assert [part.place for part in memory.parts if "hpZ" in part.name] == [place]


def test_below_zero_3_the_base_counts_on_the_host_that_reads_it_and_on_the_device_that_gets_it(tmp_path: Path) -> None:
    found = planner(tmp_path, ds_config={"zero_optimization": {"stage": 1}})
    memory, base = found.while_loading(4), found.skeleton.num_bytes(Kind.BASE)
    assert all(memory.on(place) >= base for place in Place)


def test_loading_counts_the_worst_moment_of_either_place() -> None:
    worst_device, worst_host = Part("base", 3, Place.DEVICE), Part("base", 2, Place.HOST)
    phases = [
        Memory((Part("adapter", 1, Place.DEVICE), worst_host)),
        Memory((worst_device, Part("adapter", 1, Place.HOST))),
    ]
    assert set(loading.while_loading(phases).parts) == {worst_device, worst_host}


def test_decompositions_are_foretold_by_the_best_of_two_trials_of_a_large_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def seconds_of(weight_OI: torch.Tensor, _: torch.Tensor) -> float:
        tried.append(tuple(weight_OI.shape))
        return 5.0 if len(tried) == 1 else 1.0

    monkeypatch.setattr(loading, "_seconds_of", seconds_of)
    wide = {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 1}
    config = config_only(tmp_path, **wide, num_attention_heads=16, num_key_value_heads=16, head_dim=128)
    # Seven square weights, each eight times the work of the one that took a second.
    assert planner(tmp_path, base=config).decompositions.seconds(1) == pytest.approx(7 * 8)
    assert tried == [(1024, 1024)] * 2


def test_a_checkpoint_is_the_adapter_and_12_bytes_a_trained_value(tmp_path: Path) -> None:
    skeleton = planner(tmp_path).skeleton
    trained, start = skeleton.count(Kind.TRAINED), skeleton.count(Kind.INITIAL)
    assert checkpoint_bytes(skeleton) == 14 * trained + 2 * start


def test_the_smallest_number_of_gpus_suffices_and_one_less_does_not(tmp_path: Path) -> None:
    wide = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 64, "vocab_size": 32000}
    base = config_only(tmp_path, **wide, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    found = planner(tmp_path, "--gradient_checkpointing", "non_reentrant", base=base)
    numbers = [found.smallest(size) for size in GPU_GIB]
    assert numbers[0] is not None and numbers[0] > 1
    for size, number in zip(GPU_GIB, numbers, strict=True):
        assert number is not None and found.fits(size, number)
        assert number == 1 or not found.fits(size, number - 1)
    assert numbers == sorted(numbers, reverse=True)  # type: ignore[type-var]


def test_a_run_that_fits_nowhere_is_told_what_to_change(tmp_path: Path) -> None:
    huge = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    base = config_only(tmp_path, **huge, num_attention_heads=64, num_key_value_heads=8, head_dim=128)
    found = planner(tmp_path, base=base, ds_config={"zero_optimization": {"stage": 2}})
    for suggestion in found.suggestions:
        assert suggestion.num_gpus is not None
        assert "zero_optimization.stage 3" in suggestion.changes


def test_only_numbers_of_gpus_that_the_run_would_start_on_are_told(tmp_path: Path) -> None:
    hpz = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}
    found = planner(tmp_path, ds_config=hpz, world_size=4)
    assert [suggestion.num_gpus for suggestion in found.suggestions] == [4] * len(GPU_GIB)
    fixed = planner(tmp_path, ds_config={"train_batch_size": 6, "zero_optimization": {"stage": 3}}, world_size=6)
    assert fixed.allowed == [6]
    assert [suggestion.num_gpus for suggestion in fixed.suggestions] == [6] * len(GPU_GIB)


def test_a_second_copy_of_the_parameters_leaves_before_the_base_becomes_4bit(tmp_path: Path) -> None:
    hpz = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}
    found = planner(tmp_path, "--gradient_checkpointing", "non_reentrant", ds_config=hpz, world_size=4)
    without = "no zero_optimization.zero_hpz_partition_size"
    changed = dict(found._changed)
    assert list(changed) == [(without,), (without, "--load_in_4bit")]
    assert all(1 in other.allowed for other in changed.values())


def test_a_ds_config_that_ships_has_nothing_slow_but_its_bucket(tmp_path: Path) -> None:
    lines = list(slow(planner(tmp_path)))
    assert [line for line in lines if "reduce_bucket_size" not in line and "stage (3)" not in line] == []


@pytest.mark.parametrize(
    ("ds_config", "words"),
    [
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown (true) is slow"),
        ({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}, "small parameters are gathered"),
        (
            {"zero_optimization": {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 1000}},
            "overlap_comm (false) is slow",
        ),
        ({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0}}, "stage3_prefetch_bucket_size (0)"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 16}}, "reduce_bucket_size (16) is slow"),
        ({"zero_optimization": {"stage": 2}}, "reduce_bucket_size (500000000) holds"),
        ({"zero_optimization": {"stage": 3}}, "stage (3) is slow: all parameters are gathered"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}},
            "offload_optimizer (cpu) is slow",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            "offload_param.pin_memory (false) is slow",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param (cpu) has no effect at stage 2; use stage 3, or leave it out",
        ),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "use 2 without zero_hpz_partition_size"),
    ],
)
def test_what_is_slow_is_said(tmp_path: Path, ds_config: dict[str, Any], words: str) -> None:
    assert sum(words in line for line in slow(planner(tmp_path, ds_config=ds_config))) == 1


def test_what_has_no_effect_is_not_advised(tmp_path: Path) -> None:
    one_bucket = {"stage": 2, "overlap_comm": False, "offload_param": {"device": "cpu"}}
    lines = list(slow(planner(tmp_path, ds_config={"zero_optimization": one_bucket})))
    assert not [line for line in lines if "overlap_comm" in line or "pin_memory" in line]


def test_the_bucket_that_is_advised_is_neither_too_small_nor_too_large(tmp_path: Path) -> None:
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 16}
    (line,) = slow(planner(tmp_path, ds_config={"zero_optimization": zero}))
    zero["reduce_bucket_size"] = int(line.rpartition(" ")[2])
    assert list(slow(planner(tmp_path, ds_config={"zero_optimization": zero}))) == []


def test_advice_can_be_followed_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fits(planner: Planner, *_: int) -> bool:
        """There is room without the offload or at stage 2, and not for both."""
        zero = planner.settings.ds_config["zero_optimization"]
        return zero["stage"] == 3 or "offload_optimizer" in zero

    monkeypatch.setattr(Planner, "fits", fits)
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    lines = list(slow(planner(tmp_path, ds_config={"zero_optimization": zero})))
    assert [sum(words in line for line in lines) for words in ("offload_optimizer (cpu)", "stage (3)")] == [1, 0]


def test_everything_that_keeps_a_plan_from_being_made_is_told_at_once(tmp_path: Path) -> None:
    ds_config = {"zero_optimization": {"stage": 3}, "speed": "high", "train_batch_size": 7}
    config = settings(tmp_path, "--max_length", "1000", "--target_modules", "nowhere", ds_config=ds_config)
    found = list(plan_problems(read_inputs(config, world_size=2)))
    for words in ("speed is not a key", "train_batch_size (7)", "max_length (1000)", "target_modules (nowhere)"):
        assert sum(words in line for line in found) == 1, (words, found)
    assert list(plan_problems(read_inputs(config, world_size=0))) == ["world_size (0) must be at least 1"]


def test_values_that_deepspeed_refuses_are_told_by_their_name(tmp_path: Path) -> None:
    config = settings(tmp_path, ds_config={"zero_optimization": {"stage": 3, "reduce_bucket_size": -1}})
    (line,) = plan_problems(read_inputs(config, world_size=2))
    assert line.startswith("ds_config: zero_optimization.reduce_bucket_size (-1): ")


def test_a_folder_with_a_config_alone_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ds_config = str(REPOSITORY / "ds_configs" / "zero3.json")
    size = ["--max_length", "32", "--r", "8"]
    main(["--model", config_only(tmp_path), "--ds_config", ds_config, "--world_size", "4", *size])
    printed = capsys.readouterr().out
    for words in ("ZeRO-3, 4 ranks", "trained:", "while loading", "in training", "checkpoint on disk", "  24 GB: 1"):
        assert words in printed
    assert main(["--model", str(tmp_path / "none"), "--ds_config", ds_config]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: model ") and "cannot be loaded" in told


def test_a_mistyped_flag_is_told_without_what_a_plan_does_not_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", config_only(tmp_path), "--wrold_size", "3"]) == 2
    told = capsys.readouterr().err
    assert "--wrold_size is not a setting" in told and "ds_config is required" in told
    assert "data is required" not in told and "output_dir is required" not in told


def test_a_base_stored_in_4_bits_is_planned_as_it_is(tmp_path: Path) -> None:
    stored = {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    }
    wide = {"hidden_size": 64, "intermediate_size": 128}
    as_stored = planner(tmp_path, base=config_only(tmp_path, **stored, **wide))
    memory = as_stored.in_training(2)
    assert list(plan.lines(as_stored))
    made = planner(tmp_path, "--load_in_4bit", base=config_only(tmp_path, **wide))
    assert memory == made.in_training(2)


def test_a_model_that_does_not_exist_is_one_error(tmp_path: Path) -> None:
    config = settings(tmp_path, base=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        raise ConfigError(*plan_problems(read_inputs(config, world_size=1)))
    assert len(list(plan_problems(read_inputs(config, world_size=1)))) == 1


def test_a_config_that_cannot_be_had_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(model: str, **_: object) -> None:
        asked.append(model)
        raise OSError("no network")

    monkeypatch.setattr("goat_ds.base.inspect.config_as_stored", refuse)
    (problem,) = plan_problems(read_inputs(settings(tmp_path, base="some/base"), world_size=1))
    assert "no network" in problem and asked == ["some/base"]


def test_a_plan_deals_the_layers_out_as_a_run_does(tmp_path: Path) -> None:
    goat = {"r": 8, "num_experts": 4}
    model = get_peft_model(causal_lm(), GoatConfig(**goat, deferred=True))
    works = list(decompose._works(model, ADAPTER_NAME, None))
    dealt = waves(works, cost=decompose._cost, world_size=3)
    in_run = [[(work.path.removeprefix("base_model.model."), rank) for work, rank in wave] for wave in dealt]
    bf16: dict[str, Any] = {"dtype": torch.bfloat16, "compute_dtype": torch.bfloat16}
    skeleton = build(inspect(config_only(tmp_path)), GoatConfig(**goat), attention="sdpa", quantization=None, **bf16)
    in_plan = [list(wave) for wave in waves(list(skeleton.weights), cost=skeleton.cost, world_size=3)]
    assert in_plan == in_run


@pytest.mark.parametrize("flags", [(), ("--load_in_4bit",), ("--gradient_checkpointing", "non_reentrant")])
def test_whole_experts_are_planned_as_so_many_trained_weights(tmp_path: Path, flags: tuple[str, ...]) -> None:
    path = REPOSITORY / "ds_configs" / "zero3.json"
    words = ["--model", config_only(tmp_path), "--ds_config", str(path), "--max_length", "32", "--method", "full_moe"]
    planned = planner_of(read_inputs(parse([*words, "--num_experts", "3", *flags]), world_size=2))
    layers = [layer for _, layer in layers_to_quantize(causal_lm(), kept=())]
    by_hand = sum(3 * (layer.weight.numel() + layer.in_features) for layer in layers)  # type: ignore[union-attr, operator, misc]
    assert planned.skeleton.count(Kind.TRAINED) == by_hand
    memory = {part.name: part.num_bytes for part in planned.in_training(1).parts}
    assert memory["Adam's moments, fp32"] == 8 * by_hand
    assert planned.while_loading(2).everywhere > 0 and planned.timeline.peak > 0
