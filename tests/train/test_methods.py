"""Every rival trains in the same loop as it does by its own library: sharded, resumed and read again."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, HiraConfig, LilyConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from goat_ds import demo, plan
from goat_ds.data import BatchPlan, batches, pack_dataset, prepare
from goat_ds.errors import ConfigError
from goat_ds.manifest import MANIFEST_NAME, write_manifest
from goat_ds.train import preflight
from goat_ds.train.cli import parse
from goat_ds.train.environment import settle_ranks
from goat_ds.train.inputs import read_inputs
from goat_ds.train.methods import Method
from goat_ds.train.preflight import plan_problems, planner_of
from goat_ds.train.resume import look
from goat_ds.tuner.base_quantization import layers_to_quantize
from goat_ds.tuner.quantized import Packing, pack, unpack
from goat_ds.zero.adapters import config_from, problems
from goat_ds.zero.decompose import seed_of
from tests.launching import FEW_HELDOUT, losses_of, metrics_of, run_many
from tests.zero.plain_torch import whole_batches

NUM_STEPS, MIDDLE, SEED, RATE, R, ALPHA, E = 6, 3, 3, 2e-3, 8, 16.0, 4
COMMON = {
    "precision": "fp32",
    "eval_data": str(FEW_HELDOUT),
    "max_steps": str(NUM_STEPS),
    "save_steps": str(MIDDLE),
    "max_length": "64",
    "learning_rate": str(RATE),
    "lr_scheduler": "constant",
    "warmup_steps": "0",
    "seed": str(SEED),
}
ROUTER_RATE = 5e-4
BALANCE = 0.1
"""Large enough that a balance loss that is lost or counted twice would be seen."""
OF_LORA = {"r": str(R), "lora_alpha": str(ALPHA)}
ZERO2, ZERO3 = {"ds_config": "ds_configs/zero2.json"}, {"ds_config": "ds_configs/zero3.json"}
SHARDED = ("lora", "rslora", "lora_plus", "pissa", "milora", "olora")
RUNS: dict[str, dict[str, str]] = {
    **{name: OF_LORA | {"method": name} | ZERO3 for name in SHARDED},
    "molora": OF_LORA | {"method": "molora", "num_experts": str(E), "router_lr": str(ROUTER_RATE)} | ZERO3,
    "hydralora": OF_LORA | {"method": "hydralora", "num_experts": str(E)} | ZERO3,
    "adamole": OF_LORA | {"method": "adamole", "num_experts": str(E), "balance_coef": str(BALANCE)} | ZERO3,
    "dora": OF_LORA | {"method": "dora"} | ZERO2,
    "full": {"method": "full"} | ZERO3,
    "full, zero1": {"method": "full", "ds_config": "ds_configs/zero1.json"},
    "lora, 4-bit": OF_LORA | {"method": "lora", "load_in_4bit": "true", "gradient_checkpointing": "reentrant"} | ZERO3,
    "full_moe": {"method": "full_moe", "num_experts": "3", "top_k": "2", "balance_coef": str(BALANCE)} | ZERO3,
    "hira": {"peft_config": "hira.json"} | ZERO2,
    "lily": {"peft_config": "lily.json"} | ZERO2,
}
ON_ONE_RANK = ("lora", "lora, 4-bit", "full", "lily")
"""Runs that go on from the middle on another number of ranks as well."""
PEFT_CONFIGS = {
    "hira": {"peft_type": "HIRA", "r": R, "target_modules": ["q_proj", "up_proj"]},
    "lily": {"peft_type": "LILY", "r": R, "target_modules": ["q_proj", "up_proj"]},
}


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **more)


def fitted(base: Any, config: Any) -> Any:
    torch.manual_seed(seed_of(SEED, "adapter"))
    return get_peft_model(base, config)


def with_trailing_directions(base: Any, _: Any) -> Any:
    """MiLoRA by its formula: the trailing r directions are trained and taken off the base."""
    model = fitted(base, lora())
    for module in model.modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.weight
            u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
            root, scale = (s[-R:] * R / ALPHA).sqrt(), ALPHA / R
            a, b = root[:, None] * vh[-R:], u[:, -R:] * root
            module.lora_A["default"].weight.data = a.float()
            module.lora_B["default"].weight.data = b.float()
            weight.data -= (scale * b @ a).float()
    return model


def on_a_base_in_4_bits(base: Any, config: Any) -> Any:
    """QLoRA by its formula: LoRA on the values that the packed weights stand for."""
    packing = Packing()
    for _, layer in layers_to_quantize(base, kept=()):
        weight: Any = layer.weight
        weight.data = unpack(pack(weight.data, packing), packing, shape=tuple(weight.shape), dtype=torch.float32)
    return fitted(base, config)


class Copies(nn.Module):
    """Whole copies of a layer's weight, mixed by the two most probable for the token; by autograd alone."""

    def __init__(self, layer: nn.Linear, path: str, balances: list[Tensor]) -> None:
        super().__init__()
        self.copies = nn.Parameter(layer.weight.detach().repeat(3, 1, 1))
        self.router = nn.Parameter(torch.empty(3, layer.in_features))
        torch.manual_seed(seed_of(SEED, f"base_model.model.{path}"))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        self.balances = balances

    def forward(self, x: Tensor) -> Tensor:
        """Return what the copies make of ``x``."""
        probs = (x @ self.router.T).softmax(dim=-1)
        kept = torch.zeros_like(probs).scatter(-1, probs.topk(2).indices, 1.0)
        gates = probs * kept / (probs * kept).sum(dim=-1, keepdim=True)
        share, mean = (each.flatten(0, 1).mean(dim=0) for each in (kept, probs))
        self.balances.append((3 / 2 * share * mean).sum())
        return sum(gates[..., e, None] * (x @ self.copies[e].T) for e in range(3))


def with_copies(base: Any, _: Any) -> Any:
    """The mixture of whole weights by its formula; its balance losses wait in a list."""
    base.requires_grad_(False)
    base.balances = []
    for path, layer in list(base.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            assert layer.bias is None
            base.set_submodule(path, Copies(layer, path, base.balances))
    return base


class LowRankMixture(nn.Module):
    """MoLoRA, HydraLoRA and AdaMoLE as their papers write them, an expert at a time; by autograd alone."""

    def __init__(self, layer: nn.Linear, path: str, kind: str, balances: list[Tensor]) -> None:
        super().__init__()
        self.layer, self.balances = layer, balances
        d, bound = R // E, 1 / math.sqrt(layer.in_features)
        # Before the seed: a linear layer draws when it is made.
        self.threshold = nn.Linear(layer.in_features, 1) if kind == "adamole" else None
        torch.manual_seed(seed_of(SEED, f"base_model.model.{path}"))
        num_a = 1 if kind == "hydralora" else E
        self.a = nn.Parameter(torch.empty(num_a * d, layer.in_features).uniform_(-bound, bound).view(num_a, d, -1))
        self.b = nn.Parameter(torch.zeros(E, layer.out_features, d))
        self.router = nn.Parameter(torch.empty(E, layer.in_features))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        if self.threshold is not None:
            nn.init.kaiming_uniform_(self.threshold.weight, a=math.sqrt(5))
            nn.init.uniform_(self.threshold.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with what the experts add."""
        gates = (x @ self.router.T).softmax(dim=-1)
        if self.threshold is not None:
            over = gates - self.threshold(x).sigmoid() / E
            chosen = (over >= 0).to(x.dtype)
            # The loss of its released code.
            self.balances.append(E * (chosen.flatten(0, 1).mean(dim=0) * over.flatten(0, 1).mean(dim=0)).sum())
            gates = over * chosen / (over * chosen).sum(dim=-1, keepdim=True)
        low = [x @ self.a[e % len(self.a)].T @ self.b[e].T for e in range(E)]
        return self.layer(x) + ALPHA / (R // E) * sum(gates[..., e, None] * low[e] for e in range(E))


def with_low_rank_mixtures(base: Any, kind: Any) -> Any:
    """A mixture of LoRAs by its formula; its balance losses wait in a list."""
    base.requires_grad_(False)
    base.balances = []
    for path, layer in list(base.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            base.set_submodule(path, LowRankMixture(layer, path, kind, base.balances))
    return base


PLAIN: dict[str, tuple[Callable[[Any, Any], Any], Any]] = {
    "lora": (fitted, lora()),
    "rslora": (fitted, lora(use_rslora=True)),
    "lora, 4-bit": (on_a_base_in_4_bits, lora()),
    "dora": (fitted, lora(use_dora=True)),
    "lora_plus": (fitted, lora()),
    "pissa": (fitted, lora(init_lora_weights="pissa")),
    "olora": (fitted, lora(init_lora_weights="olora")),
    "milora": (with_trailing_directions, None),
    "full": (lambda base, _: base, None),
    "full, zero1": (lambda base, _: base, None),
    "full_moe": (with_copies, None),
    **{name: (with_low_rank_mixtures, name) for name in ("molora", "hydralora", "adamole")},
    "hira": (fitted, HiraConfig(r=R, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")),
    "lily": (fitted, LilyConfig(r=R, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")),
}


def flags_of(folder: Path, name: str, **more: str) -> list[str]:
    places = {"output_dir": folder, "svd_cache": folder.parent / "svd", "token_cache": folder.parent / "tokens"}
    flags = COMMON | RUNS[name] | {flag: str(path) for flag, path in places.items()} | more
    if "peft_config" in flags:
        flags["peft_config"] = str(folder.parent / flags["peft_config"])
    return [word for flag, value in flags.items() for word in (f"--{flag}", value)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train every method on two ranks, then once more from the middle; return the folder of each run."""
    root = tmp_path_factory.mktemp("methods")
    for name, values in PEFT_CONFIGS.items():
        (root / f"{name}.json").write_text(json.dumps(values))
    whole = [flags_of(root / name, name) for name in RUNS]
    resumed = [
        flags_of(root / f"{name}, resumed", name, resume=str(root / name / f"checkpoint-{MIDDLE}")) for name in RUNS
    ]
    run_many([*whole, *resumed], world_size=2, folder=root / "lists")
    on_one = [
        flags_of(root / f"{name}, on one rank", name, resume=str(root / name / f"checkpoint-{MIDDLE}"))
        for name in ON_ONE_RANK
    ]
    run_many(on_one, world_size=1, folder=root / "lists")
    return {path.name: path for path in root.iterdir() if path.is_dir()}


def summed_loss(model: Any, row: Any) -> Tensor:
    logits = model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits, row.labels[0], ignore_index=-100, reduction="sum")


def rate_of(name: str, key: str) -> float:
    """Return the learning rate of a parameter, by the method that it belongs to."""
    if name == "lora_plus" and "lora_B" in key:
        return 16 * RATE
    return ROUTER_RATE if name == "molora" and "router" in key else RATE


def plain_losses(name: str, folder: Path) -> list[float]:
    """Train as PEFT's users do, with torch's optimizer and nothing of ours but the batches."""
    make, config = PLAIN[name]
    model = make(AutoModelForCausalLM.from_pretrained(demo.base_path(), dtype=torch.float32), config).train()
    by_name = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [{"params": [parameter], "lr": rate_of(name, key)} for key, parameter in by_name.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    losses = []
    for batch in whole_batches(folder.parent / "tokens", seed=SEED, num_steps=NUM_STEPS):
        loss = 0.0
        for row in batch.micro_batches:
            part = summed_loss(model, row) / batch.num_label_tokens
            balances = getattr(model, "balances", [])
            (part + BALANCE * sum(balances) / batch.num_real_micro_batches).backward()
            balances.clear()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(by_name.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_sharded_ranks_train_as_the_method_is_trained_without_us(name: str, folders: dict[str, Path]) -> None:
    losses = losses_of(folders[name])
    assert losses == pytest.approx(plain_losses(name, folders[name]), abs=2e-4)
    assert len(losses) == NUM_STEPS and len(set(losses)) == NUM_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name: str, folders: dict[str, Path]) -> None:
    whole, resumed = (losses_of(folders[run]) for run in (name, f"{name}, resumed"))
    assert resumed == whole[MIDDLE:]
    evals = [
        [line["eval_loss"] for line in metrics_of(folders[run]) if "eval_loss" in line]
        for run in (name, f"{name}, resumed")
    ]
    assert evals[0] == evals[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_a_run_goes_on_on_another_number_of_ranks(name: str, folders: dict[str, Path]) -> None:
    resumed = losses_of(folders[f"{name}, on one rank"])
    assert resumed == pytest.approx(losses_of(folders[name])[MIDDLE:], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_run_does_not_go_on_on_another_base(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(demo.base_path())
    base.model.layers[1].self_attn.q_proj.weight.data.mul_(2)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(demo.base_path()).save_pretrained(tmp_path / "base")
    own = {"model": str(tmp_path / "base"), "data": str(demo.train_data())}
    again = flags_of(tmp_path / "run", name, **own, resume=str(folders[name] / f"checkpoint-{MIDDLE}"))
    with pytest.raises(AssertionError, match="has other weights than the base that the run began with"):
        run_many([again], world_size=1, folder=tmp_path / "lists")


def reloaded(name: str, checkpoint: Path) -> Any:
    if RUNS[name].get("method") == "full":
        config = json.loads((checkpoint / "model" / "config.json").read_text())
        assert config["use_cache"] is json.loads((demo.base_path() / "config.json").read_text()).get("use_cache", True)
        return AutoModelForCausalLM.from_pretrained(checkpoint / "model", dtype=torch.float32)
    return AutoPeftModelForCausalLM.from_pretrained(checkpoint / "adapter", dtype=torch.float32)


@pytest.mark.slow
# PEFT's config has no word for a base in 4 bits.
@pytest.mark.parametrize("name", [name for name in RUNS if "4-bit" not in name])
@torch.no_grad()
def test_what_was_saved_is_read_by_its_own_library_and_is_what_was_trained(name: str, folders: dict[str, Path]) -> None:
    model = reloaded(name, folders[name] / f"checkpoint-{NUM_STEPS}").eval()
    tokenizer = AutoTokenizer.from_pretrained(demo.base_path())
    tokens = prepare([str(FEW_HELDOUT)], tokenizer, max_length=64, cache_dir=folders[name].parent / "tokens")
    plan = BatchPlan(
        packs=pack_dataset(tokens.dataset, max_length=64, packing=True).packs,
        num_labels=pack_dataset(tokens.dataset, max_length=64, packing=True).num_labels,
        micro_batch_size=1,
        global_batch_size=1,
        world_size=1,
        seed=0,
    )
    steps = [batch for _, batch in batches(tokens.dataset, plan, world_rank=0).from_step(0, until=plan.steps_per_epoch)]
    loss_sum = sum(summed_loss(model, row).item() for batch in steps for row in batch.micro_batches)
    (found,) = [line["eval_loss"] for line in metrics_of(folders[name]) if "eval_loss" in line]
    assert loss_sum / sum(batch.num_label_tokens for batch in steps) == pytest.approx(found, abs=1e-5)


@pytest.mark.slow
def test_a_model_whose_files_name_tensors_otherwise_goes_on_as_well(tmp_path: Path) -> None:
    # transformers holds its experts as one tensor, and writes a tensor each.
    tokenizer = AutoTokenizer.from_pretrained(demo.base_path())
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    own = {"model": str(tmp_path / "base"), "data": str(demo.heldout_data()), "max_steps": "4", "save_steps": "2"}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_many([flags_of(whole, "full, zero1", **own)], world_size=1, folder=tmp_path / "lists")
    again = flags_of(resumed, "full, zero1", **own, resume=str(whole / "checkpoint-2"))
    assert not list(problems_of_a_start(again))
    run_many([again], world_size=1, folder=tmp_path / "lists")
    assert losses_of(resumed) == losses_of(whole)[2:]


@pytest.mark.slow
def test_the_frozen_parts_of_an_adapter_come_from_its_checkpoint(tmp_path: Path) -> None:
    # RandLoRA draws two matrices that are never trained, and another version of a library may draw others.
    (tmp_path / "hira.json").write_text(json.dumps({"peft_type": "RANDLORA", "r": R, "target_modules": ["q_proj"]}))
    own = {"max_steps": "4", "save_steps": "2"}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_many([flags_of(whole, "hira", **own)], world_size=1, folder=tmp_path / "lists")
    file = whole / "checkpoint-2" / "adapter" / "adapter_model.safetensors"
    other = {name: 2 * t if "randlora_A" in name else t for name, t in load_file(file).items()}
    save_file(other, file)
    (whole / "checkpoint-2" / MANIFEST_NAME).unlink()
    write_manifest(whole / "checkpoint-2")
    again = flags_of(resumed, "hira", **own, resume=str(whole / "checkpoint-2"))
    run_many([again], world_size=1, folder=tmp_path / "lists")
    found = load_file(resumed / "checkpoint-4" / "adapter" / "adapter_model.safetensors")
    frozen = [name for name in found if "randlora_A" in name]
    assert frozen and all(torch.equal(found[name], other[name]) for name in frozen)


def problems_of_a_start(command_line: list[str]) -> Iterator[str]:
    """Yield what preflight says of a run."""
    config = parse(command_line)
    settle_ranks(config)
    resumption = look(config)
    yield from resumption.problems
    yield from preflight.problems(resumption, read_inputs(resumption.config))


def problems_of(*arguments: str) -> list[str]:
    try:
        return list(parse(["--ds_config", "zero3", *arguments]).problems())
    except ConfigError as error:
        return list(error.problems)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "lora", "--num_experts", "4"), r"num_experts (4) has no effect with method lora"),
        (("--method", "lora", "--init", "pissa"), r"init (pissa) has no effect with method lora"),
        (("--method", "pissa", "--init", "zero"), r"init (zero) is pissa in method pissa"),
        (("--method", "molora", "--top_k", "2"), r"top_k (2) has no effect with method molora"),
        (("--method", "molora", "--num_experts", "1"), r"num_experts (1) makes no mixture"),
        (("--method", "lora", "--dropout", "1"), r"dropout (1.0) must be in [0, 1)"),
        (("--method", "lora", "--lora_alpha", "0"), r"lora_alpha (0.0) must be above 0"),
        (("--method", "full", "--r", "4"), r"r (4) has no effect with method full"),
        (("--method", "full_moe", "--r", "4"), r"r (4) has no effect with method full_moe"),
        (("--method", "full_moe", "--lora_alpha", "4"), r"lora_alpha (4.0) has no effect with method full_moe"),
        (("--method", "full_moe", "--init", "pissa"), r"init (pissa) is zero in method full_moe"),
        (("--method", "full_moe", "--lr_ratio_B", "4"), r"lr_ratio_B (4.0) has no effect with method full_moe"),
        (("--method", "full_moe", "--dense_finish", "0.5"), r"dense_finish (0.5) fits low-rank experts, and those of"),
        (("--method", "full_moe", "--top_k", "9"), r"top_k (9) must be at most num_experts (8)"),
        (("--method", "full", "--lr_ratio_B", "4"), r"lr_ratio_B (4.0) has no effect with method full"),
        (("--method", "lora", "--router_lr", "1e-3"), r"router_lr (0.001) has no effect with method lora"),
        (("--method", "lora", "--dense_finish", "0.5"), r"dense_finish (0.5) has no effect with method lora"),
        (("--peft_config", "x.json", "--r", "4"), r"r (4) has no effect beside peft_config (x.json)"),
        (("--peft_config", "x.json", "--method", "lora"), r"method (lora) has no effect beside peft_config (x.json)"),
    ],
)
def test_flags_that_a_method_does_not_read_are_refused(arguments: tuple[str, ...], words: str) -> None:
    assert any(problem.startswith(words) for problem in problems_of(*arguments))


def test_a_flag_at_the_value_that_a_method_fixes_is_taken() -> None:
    assert not list(parse(["--ds_config", "zero3", "--method", "pissa", "--scaling", "alpha"]).problems())


def test_every_method_has_a_config_of_its_own() -> None:
    found = {}
    for method in Method:
        adapter = parse(["--ds_config", "zero3", "--method", str(method)]).adapter()
        found[method] = "full" if adapter is None else json.dumps(adapter.to_dict(), default=sorted)
    # LoRA+ differs in its rates alone.
    assert found.pop(Method.LORA_PLUS) == found[Method.LORA]
    assert len(set(found.values())) == len(found)
    assert parse(["--ds_config", "zero3", "--method", "lora_plus"]).rates.ratio_B == 16
    assert parse(["--ds_config", "zero3", "--method", "lora"]).rates.ratio_B == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "LORRA"}, r"peft_type \(LORRA\) must be one of .*LORA"),
        ({}, r"peft_type \(None\) must be one of"),
        ({"peft_type": "LORA", "rank": 3}, r"rank is no setting of LORA"),
    ],
)
def test_a_peft_config_with_a_mistake_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_from(values)


@pytest.mark.parametrize("method", ["lora", "full", "molora", "full_moe"])
def test_a_plan_can_be_made_of_any_method(method: str) -> None:
    more = ("--num_experts", "2") if "mo" in method else ()
    settle_ranks(parse(["--ds_config", "zero3"]))
    inputs = read_inputs(parse(["--ds_config", "zero3", "--method", method, "--max_length", "64", *more]))
    assert not list(plan_problems(inputs))
    lines = list(plan.lines(planner_of(inputs)))
    assert any(line.startswith("a rank in training, at most: ") for line in lines)
    num_values = AutoModelForCausalLM.from_pretrained(demo.base_path()).num_parameters()
    what = "all of them trained" if method == "full" else "of the base, "
    assert any(line.startswith(f"parameters: {num_values:,}") and what in line for line in lines)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kasa_config": {}}, "kasa_config"),
        ({"init_lora_weights": "OLoRA"}, r"changes the base's weights.*--method olora"),
        ({"init_lora_weights": "mica"}, "looks at data, or at the base's weights"),
        ({"use_qalora": True}, r"use_qalora \(True\) makes a variant of LoRA"),
    ],
)
def test_variants_of_lora_that_need_more_than_this_loop_are_refused(values: dict[str, Any], words: str) -> None:
    try:
        found = list(problems(config_from({"peft_type": "LORA"} | values), stage=1, is_4bit=False))
    except ConfigError as error:
        # PEFT itself refuses the value.
        found = list(error.problems)
    assert re.search(words, "; ".join(found))


def test_a_ratio_that_no_factor_has_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    file = tmp_path / "ia3.json"
    modules = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    file.write_text(json.dumps({"peft_type": "IA3"} | modules))
    flags = ["--ds_config", "zero1", "--peft_config", str(file), "--output_dir", str(tmp_path / "run")]
    (problem,) = problems_of_a_start([*flags, "--lr_ratio_B", "4"])
    assert problem == "lr_ratio_B (4.0) has no effect: the method has no factor B; leave it out"
    assert not list(problems_of_a_start(flags))


def test_rates_reach_the_parts_they_are_named_for(tmp_path: Path) -> None:
    from goat_ds.zero.adapters import Rates, parameter_groups

    base = AutoModelForCausalLM.from_pretrained(demo.base_path(), dtype=torch.float32)
    model: Any = get_peft_model(base, parse(["--ds_config", "zero3"]).adapter())
    groups = parameter_groups(model, Rates(1e-3, 4.0, 5e-4))
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 4e-3, 5e-4])
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = {"B": 4e-3, "router": 5e-4, "A": 1e-3}[name.rpartition(".")[2]]
            assert math.isclose(found[id(parameter)], expected), name
