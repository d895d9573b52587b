"""A DeepSpeed config file and the flags of a run, made one: "auto" is filled in, a contradiction is refused."""

import copy
import difflib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goat_ds.precision import Precision

AUTO = "auto"

BLOCKS = frozenset({
    "activation_checkpointing", "aio", "autotuning", "bf16", "checkpoint", "comet", "comms_logger", "compile",
    "csv_monitor", "data_efficiency", "data_types", "datastates_ckpt", "expert_parallel",
    "flops_profiler", "fp16", "hybrid_engine", "optimizer", "pipeline", "scheduler", "tensor_parallel", "tensorboard",
    "timers", "torch_autocast", "wandb", "weight_quantization", "zero_optimization",
})  # fmt: skip
"""Keys of DeepSpeed 0.19.8 that hold an object."""

KNOWN_KEYS = BLOCKS | frozenset({
    "allgather_size", "communication_data_type", "dataloader_drop_last", "disable_allgather",
    "disable_python_gc", "dump_state", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "log_level", "managed_gradient_accumulation", "memory_breakdown", "prescale_gradients",
    "seq_parallel_communication_data_type", "sequence_parallel_size", "steps_per_print",
    "train_batch_size", "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
})  # fmt: skip
"""Top-level keys of DeepSpeed 0.19.8, which itself ignores any other."""

UNTRIED = frozenset({
    "autotuning", "compile", "data_efficiency", "expert_parallel", "hybrid_engine", "pipeline",
    "sequence_parallel_size", "tensor_parallel", "torch_autocast", "weight_quantization",
})  # fmt: skip
"""Top-level keys that change what a run computes and that no test of ours uses."""

MONITORS = frozenset({"comet", "csv_monitor", "tensorboard", "wandb"})
"""Blocks of what a run's numbers are shown by."""

UNTRIED_ZERO = ("zero_quantized_weights", "zero_quantized_gradients")

UNFIT_FOR_4BIT = (
    "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "use_all_reduce_for_fetch_params",
)  # fmt: skip
"""Keys of zero_optimization that gather parameters in a way that bytes do not survive, or hold them more than once."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the flags say about the engine."""

    world_size: int
    """Number of ranks."""
    micro_batch_size: int
    """Packs in one forward of one rank."""
    grad_accum_steps: int
    """Forwards of one rank in one step."""
    precision: Precision
    """Dtype of weights and products."""
    learning_rate: float
    """Peak learning rate."""
    weight_decay: float
    """AdamW's decoupled decay."""
    adam_betas: tuple[float, float]
    """AdamW's decays of the moments."""
    adam_eps: float
    """AdamW's epsilon."""
    max_grad_norm: float
    """Norm the gradient is clipped to; 0 switches clipping off."""
    torch_adam: bool
    """Whether AdamW is torch's (CPU without offload) and not DeepSpeed's fused or CPU one."""


def read(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Return a DeepSpeed config, or what is wrong with the file; a shipped one also goes by its name."""
    shipped = shipped_files()
    file = Path(path) if Path(path).is_file() else shipped.get(str(path), Path(path))
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        way_out = "" if file.suffix else f"; give a file, or one of {', '.join(shipped)}"
        return {}, [f"ds_config ({path}) does not exist{way_out}"]
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"ds_config ({path}) cannot be read: {error}"]
    except json.JSONDecodeError as error:
        return {}, [f"ds_config: {path} line {error.lineno}: not JSON ({error.msg})"]
    if not isinstance(content, dict):
        return {}, [f"ds_config: {path} holds no JSON object"]
    return content, list(_wrong_types(content))


def shipped_files() -> dict[str, Path]:
    """Return the DeepSpeed configs that come with goat_ds, by name."""
    package = Path(__file__).parents[1]
    # What pip has installed has them inside the package, a clone beside it.
    inside, beside = package / "ds_configs", package.parent / "ds_configs"
    return {file.stem: file for file in sorted((inside if inside.is_dir() else beside).glob("*.json"))}


def _wrong_types(ds_config: dict[str, Any]) -> Iterator[str]:
    zero, optimizer = ds_config.get("zero_optimization", {}), ds_config.get("optimizer", {})
    blocks = {name: ds_config[name] for name in sorted(BLOCKS & ds_config.keys())}
    if isinstance(zero, dict):
        names = ("offload_optimizer", "offload_param")
        blocks |= {f"zero_optimization.{name}": zero[name] for name in names if name in zero}
        hpz = zero.get("zero_hpz_partition_size", 1)
        if type(hpz) is not int or hpz < 0:
            yield f"ds_config: zero_optimization.zero_hpz_partition_size ({_shown(hpz)}) must be the ranks of a node"
        if type(zero.get("stage", 0)) is not int:
            yield f"ds_config: zero_optimization.stage ({_shown(zero['stage'])}) must be 0, 1, 2 or 3"
    if isinstance(optimizer, dict) and "params" in optimizer:
        blocks["optimizer.params"] = optimizer["params"]
    for name, value in blocks.items():
        if not isinstance(value, dict):
            yield f"ds_config: {name} ({_shown(value)}) must be a JSON object, {{...}}; or leave it out"


def _shown(value: Any) -> str:
    """Return a value as the file has it."""
    return json.dumps(value)


def stage(ds_config: dict[str, Any]) -> int:
    """Return the ZeRO stage."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(ds_config: dict[str, Any]) -> bool:
    """Whether optimizer state lives on the host, where DeepSpeed's CPU Adam works on it."""
    device = ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    return str(device) != "none"


def fill(ds_config: dict[str, Any], settings: EngineSettings) -> dict[str, Any]:
    """Return the config with every "auto" filled in from the flags; ``problems`` must have found none."""
    filled = copy.deepcopy(ds_config)
    for path, value in _flag_values(settings):
        _put(filled, path, value)
    zero = filled.setdefault("zero_optimization", {})
    # Sizes that a config leaves to us are left to DeepSpeed's own defaults.
    filled["zero_optimization"] = {key: value for key, value in zero.items() if value != AUTO}
    optimizer = filled.setdefault("optimizer", {"type": "AdamW"})
    parameters = optimizer.setdefault("params", {})
    for name, value in _optimizer_values(settings):
        if parameters.get(name, AUTO) == AUTO:
            parameters[name] = value
    if settings.torch_adam:
        parameters["torch_adam"] = True
    filled.setdefault("zero_allow_untested_optimizer", True)
    filled.setdefault("steps_per_print", 10**9)
    filled.setdefault("wall_clock_breakdown", False)
    return filled


def problems(ds_config: dict[str, Any], settings: EngineSettings, *, base_is_4bit: bool = False) -> Iterator[str]:
    """Yield, one line each, where the config contradicts the flags or asks for what is not supported."""
    yield from _unknown_keys(ds_config)
    yield from _zero_problems(ds_config, settings)
    if base_is_4bit:
        yield from _unfit_for_4bit(ds_config)
    enabled = [name for name in ("bf16", "fp16") if ds_config.get(name, {}).get("enabled") is True]
    if len(enabled) == 2:
        yield "ds_config: bf16.enabled and fp16.enabled are both true; keep one, or set both to auto"
    yield from _batch_problems(ds_config, settings)
    for path, value in _flag_values(settings):
        given = _get(ds_config, path)
        # train_batch_size has a message of its own; two precisions at once as well.
        if given in (None, AUTO, value) or path[0] == "train_batch_size" or len(enabled) == 2:
            continue
        yield f"ds_config: {'.'.join(path)} ({given}) contradicts {_flag_of(path)} ({value}); set it to auto"
    optimizer = ds_config.get("optimizer", {})
    if optimizer.get("type", "AdamW") not in ("Adam", "AdamW"):
        yield f"ds_config: optimizer.type ({optimizer['type']}) must be AdamW; leave the block out for the default"
    for name, value in _optimizer_values(settings):
        given = optimizer.get("params", {}).get(name, AUTO)
        if given != AUTO and given != value:
            yield f"ds_config: optimizer.params.{name} ({given}) contradicts the flags ({value}); set it to auto"
    if "scheduler" in ds_config:
        yield "ds_config: scheduler is set by --lr_scheduler and --warmup_steps; leave the block out"
    yield from _missing_monitor(ds_config)


def _missing_monitor(ds_config: dict[str, Any]) -> Iterator[str]:
    if ds_config.get("tensorboard", {}).get("enabled") and not importlib.util.find_spec("tensorboard"):
        yield (
            "ds_config: tensorboard.enabled (true) needs the tensorboard package (pip install 'goat_ds[tensorboard]'); "
            "install it, or leave the block out"
        )


def warnings(ds_config: dict[str, Any]) -> Iterator[str]:
    """Yield, one line each, what the config asks for that has not been tried with this trainer."""
    for name in sorted(UNTRIED & ds_config.keys()):
        if _is_on(ds_config[name]):
            yield f"ds_config: {name} has not been tested with goat_ds; compare the first losses with a run without it"
    zero = ds_config.get("zero_optimization", {})
    for name in untried_zero(ds_config):
        yield (
            f"ds_config: zero_optimization.{name} ({_shown(zero[name])}) has not been tested with goat_ds; watch "
            "that loss and grad_norm do not become 0"
        )
    if "activation_checkpointing" in ds_config:
        yield "ds_config: activation_checkpointing has no effect on this model; use --gradient_checkpointing"


def untried_zero(ds_config: dict[str, Any]) -> list[str]:
    """Name the switches of zero_optimization that are on and have not been tried with this trainer."""
    zero = ds_config.get("zero_optimization", {})
    # Reports of a loss of zero and of zero gradients: DeepSpeed issues 5059, 6889.
    return [name for name in UNTRIED_ZERO if _is_on(zero.get(name, False))]


def _is_on(value: Any) -> bool:
    """Whether a block is enabled, a switch is true, or a size is above one."""
    if isinstance(value, dict):
        return bool(value.get("enabled", value))
    return value is True or (isinstance(value, int) and value > 1)


def _unknown_keys(ds_config: dict[str, Any]) -> Iterator[str]:
    for key in sorted(ds_config.keys() - KNOWN_KEYS):
        near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
        way_out = f"did you mean {near[0]}?" if near else "leave it out"
        yield f"ds_config: {key} is not a key of DeepSpeed's; {way_out}"


def _zero_problems(ds_config: dict[str, Any], settings: EngineSettings) -> Iterator[str]:
    zero = ds_config.get("zero_optimization", {})
    if stage(ds_config) not in (0, 1, 2, 3):
        yield f"ds_config: zero_optimization.stage ({stage(ds_config)}) must be 0, 1, 2 or 3"
    if stage(ds_config) == 0 and settings.precision is Precision.FP32:
        yield "ds_config: zero_optimization.stage (0) reports no gradient norm in precision fp32; use stage 1"
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name, {}).get("device") == "nvme":
            yield f"ds_config: zero_optimization.{name}.device (nvme) is not supported; use cpu"
    yield from _hpz_problems(ds_config, settings)


def hpz_size(ds_config: dict[str, Any]) -> int:
    """Return how many neighbouring ranks hold a second copy of all parameters (ZeRO++'s hpZ); 1: there is none."""
    # DeepSpeed takes 0 for 1.
    return max(1, int(ds_config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)))


def _hpz_problems(ds_config: dict[str, Any], settings: EngineSettings) -> Iterator[str]:
    size = hpz_size(ds_config)
    named = f"ds_config: zero_optimization.zero_hpz_partition_size ({size})"
    if size > 1 and stage(ds_config) != 3:
        yield f"{named} has no effect at stage {stage(ds_config)}; use stage 3, or leave it out"
    if settings.world_size % size:
        yield f"{named} must divide the number of ranks ({settings.world_size}); set it to the ranks of one node"


def hpz_warnings(ds_config: dict[str, Any], ranks_per_node: Sequence[int]) -> Iterator[str]:
    """Yield, in one line, where a second copy of the parameters does not do what it is for.

    Args:
        ds_config: Without problems.
        ranks_per_node: Ranks of every node.
    """
    size = hpz_size(ds_config)
    if size == 1 or set(ranks_per_node) == {size} != {sum(ranks_per_node)}:
        return
    named = f"ds_config: zero_optimization.zero_hpz_partition_size ({size})"
    if len(ranks_per_node) == 1:
        yield f"{named} holds parameters twice to spare the network between nodes, and there is one node; leave it out"
    else:
        counts = ", ".join(map(str, ranks_per_node))
        yield f"{named} is meant to be the ranks of a node ({counts}), so that backward gathers parameters inside of it"


def _unfit_for_4bit(ds_config: dict[str, Any]) -> Iterator[str]:
    zero = ds_config.get("zero_optimization", {})
    for name in UNFIT_FOR_4BIT:
        if _is_on(zero.get(name, False)):
            yield f"ds_config: zero_optimization.{name} ({_shown(zero[name])}) cannot hold a 4-bit base; leave it out"


def _batch_problems(ds_config: dict[str, Any], settings: EngineSettings) -> Iterator[str]:
    given = ds_config.get("train_batch_size", AUTO)
    expected = settings.micro_batch_size * settings.grad_accum_steps * settings.world_size
    if given not in (AUTO, expected):
        yield (
            f"ds_config: train_batch_size ({given}) must equal micro_batch_size ({settings.micro_batch_size}) x "
            f"grad_accum_steps ({settings.grad_accum_steps}) x ranks ({settings.world_size}) = {expected}; "
            "set it to auto, or change the flags"
        )


def _flag_values(settings: EngineSettings) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield ("train_micro_batch_size_per_gpu",), settings.micro_batch_size
    yield ("gradient_accumulation_steps",), settings.grad_accum_steps
    yield ("train_batch_size",), settings.micro_batch_size * settings.grad_accum_steps * settings.world_size
    yield ("gradient_clipping",), settings.max_grad_norm
    yield ("bf16", "enabled"), settings.precision is Precision.BF16
    yield ("fp16", "enabled"), settings.precision is Precision.FP16


def _optimizer_values(settings: EngineSettings) -> Iterator[tuple[str, Any]]:
    yield "lr", settings.learning_rate
    yield "betas", list(settings.adam_betas)
    yield "eps", settings.adam_eps
    yield "weight_decay", settings.weight_decay


def _flag_of(path: tuple[str, ...]) -> str:
    return {
        "train_micro_batch_size_per_gpu": "micro_batch_size",
        "gradient_accumulation_steps": "grad_accum_steps",
        "gradient_clipping": "max_grad_norm",
        "bf16": "precision bf16",
        "fp16": "precision fp16",
    }[path[0]]


def _get(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key, {})
    return None if tree == {} else tree


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
