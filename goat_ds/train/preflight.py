"""Everything that can be wrong with a run and can be known before a weight is read, in one message."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from goat_ds.base.packing_probe import row_problem
from goat_ds.data import check_sources
from goat_ds.distributed import ranks
from goat_ds.distributed.lock import LOCK_NAME
from goat_ds.errors import ConfigError, raise_if_any
from goat_ds.plan import Planner, PlanSettings
from goat_ds.precision import Precision
from goat_ds.train.config import AUTO, TrainConfig
from goat_ds.train.inputs import Inputs, read_inputs, with_4bit
from goat_ds.train.resume import Resumption
from goat_ds.tuner.layer import ROUTER
from goat_ds.zero import adapters, ds_config, engine, sizes
from goat_ds.zero.checkpoint import Checkpoint
from goat_ds.zero.engine import Attention

OF_A_SAVED_ADAPTER = ("base_model_name_or_path", "inference_mode", "auto_mapping", "peft_version", "target_modules")
"""Settings that PEFT writes or resolves itself; the shapes of tensors say what was adapted."""
REQUIRED_TO_PLAN = ("model",)
"""Settings that a plan needs, unless it is the embedded demo's."""


def check(resumption: Resumption) -> Inputs:
    """Return what the settings of a run point at, when nothing is wrong with them. A collective.

    Data is parsed here only where something else is wrong, to tell all at once: else it is tokenised next, which
    finds the same.

    Raises:
        ConfigError: with every problem; all ranks raise the same.
    """
    inputs = read_inputs(resumption.config)

    def check_here() -> None:
        if found := list(problems(resumption, inputs)):
            raise_if_any([*found, *data_problems(inputs.config)])

    # One process a node looks; what it finds ends all of them.
    ranks.agree(lambda: check_here() if ranks.is_first_on_node() else None)
    return inputs


def problems(resumption: Resumption, inputs: Inputs) -> Iterator[str]:
    """Yield everything that is wrong but with the data, one line each. Reads no weights."""
    config = inputs.config
    numbers = list(config.problems())
    yield from numbers
    yield from resumption.problems
    yield from _folder_problems(config, resumption)
    yield from _ds_config_problems(inputs)
    if config.bnb_4bit_compute_dtype is not None and not inputs.is_4bit:
        yield (
            f"bnb_4bit_compute_dtype ({config.bnb_4bit_compute_dtype}) has no effect on an unquantised base; use "
            "load_in_4bit, or leave it out"
        )
    for name in ("precision", "bnb_4bit_compute_dtype"):
        if getattr(config, name) is Precision.FP16 and not engine.supports_fp16():
            yield f"{name} (fp16) is not supported by this device; use bf16 or fp32"
    yield from _raised_by(lambda: engine.choose_attention(config.attn, precision=config.precision))
    # What config and tokenizer are both missing is reported once; with wrong numbers no adapter can be put anywhere.
    yield from dict.fromkeys(
        [*inputs.unreadable, *_model_problems(resumption, inputs, rehearsable=not numbers and not inputs.wrong_adapter)]
    )


def data_problems(config: TrainConfig) -> Iterator[str]:
    """Yield what is wrong with the data, one line each; parses all of it and tokenises nothing."""
    yield from check_sources(config.train_sources, data_format=config.data_format, split=config.split)
    yield from check_sources(config.eval_sources, data_format=config.data_format, split=config.eval_split)


def _ds_config_problems(inputs: Inputs) -> Iterator[str]:
    if inputs.found_ds_config is not None:
        found = list(ds_config.problems(inputs.raw_ds_config, inputs.engine_settings, base_is_4bit=inputs.is_4bit))
        yield from found or _raised_by(
            lambda: sizes.read(inputs.engine_config, model_dtype=inputs.config.precision.torch_dtype)
        )


def _method_problems(inputs: Inputs) -> Iterator[str]:
    """Yield why what is trained cannot be, under the stage of ZeRO and on the base that were asked for."""
    if inputs.wrong_adapter or inputs.found_ds_config is None:
        return
    stage = inputs.raw_ds_config.get("zero_optimization", {}).get("stage", 0)
    yield from adapters.problems(inputs.adapter, stage=stage, is_4bit=inputs.is_4bit)


def plan_problems(inputs: Inputs) -> Iterator[str]:
    """Yield everything that keeps a plan from being made, one line each; it needs neither data nor a folder."""
    config = inputs.config
    if inputs.world_size < 1:
        yield f"world_size ({inputs.world_size}) must be at least 1"
        return
    numbers = list(config.problems(required=REQUIRED_TO_PLAN))
    yield from numbers
    yield from inputs.unreadable
    if not (config.model or config.is_demo):
        return
    yield from _ds_config_problems(inputs)
    yield from _raised_by(lambda: engine.choose_attention(config.attn, precision=config.precision))
    base = inputs.found_base
    if base is None:
        return
    quantization = config.quantization()
    yield from engine.four_bit_problems(base, quantization=quantization, adapter=inputs.adapter)
    unfit = list(base.misfits(max_length=config.max_length, tokenizer=None))
    yield from _method_problems(inputs)
    if not numbers and not inputs.wrong_adapter:
        unfit += _raised_by(lambda: engine.rehearse(base, inputs.adapter, quantization=quantization))
    yield from dict.fromkeys(unfit)


def planner_of(inputs: Inputs, *, num_labels: int | None = None) -> Planner:
    """Return what plans a run; ``plan_problems`` must have found none.

    Args:
        inputs: Of the run.
        num_labels: Most label tokens of a micro-batch; None: every token may be one.
    """
    config = inputs.config
    as_4bit = with_4bit(config).quantization()
    assert as_4bit is not None
    return Planner(
        PlanSettings(
            base=inputs.base,
            adapter=inputs.adapter,
            quantization=config.quantization(),
            as_4bit=as_4bit,
            ds_config=inputs.raw_ds_config,
            engine=inputs.engine_settings,
            compute_dtype=(config.bnb_4bit_compute_dtype or config.precision).torch_dtype,
            max_length=config.max_length,
            num_labels=num_labels,
            checkpointing=config.gradient_checkpointing,
            attention=engine.choose_attention(config.attn, precision=config.precision),
        )
    )


def _folder_problems(config: TrainConfig, resumption: Resumption) -> Iterator[str]:
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        yield f"output_dir ({folder}) is not a folder; choose another"
        return
    # The folder of a run that resumes from within it is its own, also where that run died before its first checkpoint.
    checkpoint = resumption.checkpoint
    is_own = config.resume == AUTO or (
        checkpoint is not None and checkpoint.folder.parent.resolve() == folder.resolve()
    )
    if not is_own and folder.exists() and any(path.name != LOCK_NAME for path in folder.iterdir()):
        yield (
            f"output_dir ({folder}) is not empty: it may hold another run; choose another folder, or --resume auto to "
            "go on with that run"
        )


def _model_problems(resumption: Resumption, inputs: Inputs, *, rehearsable: bool) -> Iterator[str]:
    config, base, tokenizer = inputs.config, inputs.found_base, None
    if not (config.model or config.is_demo):
        return
    try:
        tokenizer = inputs.tokenizer
    except ConfigError as error:
        yield from error.problems
    if base is None:
        return
    quantization = config.quantization()
    yield from engine.four_bit_problems(base, quantization=quantization, adapter=inputs.adapter)
    yield from _method_problems(inputs)
    unfit = list(base.misfits(max_length=config.max_length, tokenizer=tokenizer))
    yield from unfit
    if not unfit:
        leak = row_problem(base, attention="eager" if config.attn is Attention.EAGER else "sdpa")
        yield from [leak] if leak else []
    if rehearsable:
        try:
            shapes = engine.rehearse(base, inputs.adapter, quantization=quantization)
        except ConfigError as error:
            yield from error.problems
            return
        yield from adapters.rate_problems(shapes, config.rates)
        if resumption.checkpoint is not None:
            yield from _misfits_of(resumption.checkpoint, shapes)
            yield from _changes_of(resumption.checkpoint, inputs)


def _misfits_of(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield why what a checkpoint holds is not of this model; a dense finish has taken the routers."""
    of_router = tuple(f"goat_{name}" for name in ROUTER)
    expected = {name: shape for name, shape in shapes.items() if checkpoint.is_routed or not name.endswith(of_router)}
    wrong = [
        name
        for name in sorted(expected.keys() | checkpoint.shapes.keys())
        if expected.get(name) != checkpoint.shapes.get(name)
    ]
    if wrong:
        name = wrong[0]
        yield (
            f"resume ({checkpoint.folder}) is of another model or adapter: {len(wrong)} tensors differ, the first is "
            f"{name}: {checkpoint.shapes.get(name)} there, {expected.get(name)} here; resume with its own model and "
            "flags"
        )


def _changes_of(checkpoint: Checkpoint, inputs: Inputs) -> Iterator[str]:
    """Yield which settings of a PEFT config file are not those of the adapter that the run began with."""
    if inputs.config.peft_config is None or inputs.adapter is None or inputs.config.allow_changed:
        return
    # As a file holds them: sets become lists there, in any order.
    found = {
        name: _plain(value) for name, value in json.loads(json.dumps(inputs.adapter.to_dict(), default=sorted)).items()
    }
    for name, value in (checkpoint.adapter or {}).items():
        if name not in OF_A_SAVED_ADAPTER and name in found and found[name] != _plain(value):
            yield (
                f"peft_config: {name} ({found[name]}) was {value} when the run began; set it back, or give "
                "--allow_changed"
            )


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _raised_by(check: Callable[[], Any]) -> Iterator[str]:
    try:
        check()
    except ConfigError as error:
        yield from error.problems
