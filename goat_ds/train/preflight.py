"""Everything that can be wrong with a run and can be known before a weight is read, in one message."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from goat_ds import demo
from goat_ds.base.packing_probe import row_problem
from goat_ds.data import check_sources, load_tokenizer
from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError
from goat_ds.plan import Planner, PlanSettings
from goat_ds.train.config import AUTO, TrainConfig
from goat_ds.train.resume import Resumption
from goat_ds.zero import ds_config, engine, sizes
from goat_ds.zero.checkpoint import Checkpoint
from goat_ds.zero.ds_config import EngineSettings, Precision
from goat_ds.zero.engine import Attention

REQUIRED_TO_PLAN = ("model",)
"""Settings that a plan needs, unless it is the embedded demo's."""


def model_name(config: TrainConfig) -> str:
    """Give the folder or hub name of the base."""
    return config.model or str(demo.base_path())


def train_sources(config: TrainConfig) -> list[str]:
    """Give the sources to train on."""
    return [str(demo.train_data())] if config.is_demo else list(config.data or ())


def eval_sources(config: TrainConfig) -> list[str]:
    """Give the held-out sources; may be empty."""
    return [str(demo.heldout_data())] if config.is_demo and not config.eval_data else list(config.eval_data or ())


def engine_settings(config: TrainConfig, *, world_size: int, raw: dict[str, Any]) -> EngineSettings:
    """Give what the flags say about the engine."""
    return EngineSettings(
        world_size=world_size,
        micro_batch_size=config.micro_batch_size,
        grad_accum_steps=config.grad_accum_steps,
        precision=config.precision,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_betas=config.adam_betas,
        adam_eps=config.adam_eps,
        max_grad_norm=config.max_grad_norm,
        # DeepSpeed's fused Adam is for CUDA; with offload it takes its own CPU Adam.
        torch_adam=not ranks.has_cuda() and not ds_config.offloads_optimizer(raw),
    )


def filled_ds_config(config: TrainConfig) -> dict[str, Any]:
    """Give the run's DeepSpeed config with every "auto" filled in; ``problems`` must have found none."""
    assert config.ds_config is not None
    raw, _ = ds_config.read(config.ds_config)
    return ds_config.fill(raw, engine_settings(config, world_size=ranks.get_world_size(), raw=raw))


def problems(resumption: Resumption) -> Iterator[str]:
    """Say everything that is wrong, one line each. Reads configs and data, no weights."""
    config = resumption.config
    numbers = list(config.problems())
    yield from numbers
    yield from resumption.problems
    yield from _folder_problems(config, resumption)
    base = _look_at_base(config)
    yield from _ds_config_problems(config, world_size=ranks.get_world_size(), base_is_4bit=base.is_4bit)
    if config.bnb_4bit_compute_dtype is not None and not base.is_4bit:
        yield (
            f"bnb_4bit_compute_dtype ({config.bnb_4bit_compute_dtype}) has no effect on an unquantised base; use "
            "load_in_4bit, or leave it out"
        )
    for name in ("precision", "bnb_4bit_compute_dtype"):
        if getattr(config, name) is Precision.FP16 and not engine.supports_fp16():
            yield f"{name} (fp16) is not supported by this device; use bf16 or fp32"
    yield from _raised_by(lambda: engine.choose_attention(config.attn, precision=config.precision))
    if config.model or config.is_demo:
        # With wrong numbers the adapter cannot be put anywhere.
        found = list(_model_problems(resumption, is_readable=base.is_readable, rehearsable=not numbers))
        # What both the config and the tokenizer are missing is told once.
        yield from dict.fromkeys([*base.problems, *found])
    yield from check_sources(train_sources(config), data_format=config.data_format, split=config.split)
    yield from check_sources(eval_sources(config), data_format=config.data_format, split=config.eval_split)


def _ds_config_problems(config: TrainConfig, *, world_size: int, base_is_4bit: bool) -> Iterator[str]:
    if config.ds_config is None:
        return
    raw, unreadable = ds_config.read(config.ds_config)
    yield from unreadable
    if not unreadable:
        settings = engine_settings(config, world_size=world_size, raw=raw)
        found = list(ds_config.problems(raw, settings, base_is_4bit=base_is_4bit))
        yield from found or _raised_by(
            lambda: sizes.read(ds_config.fill(raw, settings), model_dtype=engine.DTYPES[config.precision])
        )


def plan_problems(config: TrainConfig, *, world_size: int) -> Iterator[str]:
    """Say everything that keeps a plan from being made, one line each; it needs neither data nor a folder."""
    if world_size < 1:
        yield f"world_size ({world_size}) must be at least 1"
        return
    numbers = list(config.problems(required=REQUIRED_TO_PLAN))
    yield from numbers
    if not (config.model or config.is_demo):
        return
    base = _look_at_base(config)
    yield from _ds_config_problems(config, world_size=world_size, base_is_4bit=base.is_4bit)
    yield from _raised_by(lambda: engine.choose_attention(config.attn, precision=config.precision))
    yield from base.problems
    if not base.is_readable:
        return
    model = model_name(config)
    unfit = list(_raised_by(lambda: engine.check_base(model, max_length=config.max_length, tokenizer=None)))
    if not numbers:
        unfit += _raised_by(lambda: engine.rehearse(model, config.goat(), quantization=config.quantization()))
    yield from dict.fromkeys(unfit)


def planner_of(config: TrainConfig, *, world_size: int, num_labels: int | None = None) -> Planner:
    """Give what plans a run; ``plan_problems`` must have found none.

    Args:
        config: Of the run.
        world_size: Number of ranks.
        num_labels: Most label tokens of a micro-batch; None: every token may be one.
    """
    assert config.ds_config is not None
    raw, _ = ds_config.read(config.ds_config)
    as_4bit = dataclasses.replace(config, load_in_4bit=True).quantization()
    assert as_4bit is not None
    return Planner(
        PlanSettings(
            model=model_name(config),
            goat=config.goat(),
            quantization=config.quantization(),
            as_4bit=as_4bit,
            ds_config=raw,
            engine=engine_settings(config, world_size=world_size, raw=raw),
            compute_dtype=engine.DTYPES[config.bnb_4bit_compute_dtype or config.precision],
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
    if not is_own and folder.exists() and any(folder.iterdir()):
        yield (
            f"output_dir ({folder}) is not empty: it may hold another run; choose another folder, or --resume auto to "
            "go on with that run"
        )


class _Base(NamedTuple):
    """What the base's config says of 4 bits."""

    is_4bit: bool
    problems: list[str]
    is_readable: bool
    """Whether there is a config. It may be asked for over a network, which tries for a while: not again, then."""


def _look_at_base(config: TrainConfig) -> _Base:
    if not (config.model or config.is_demo):
        return _Base(config.load_in_4bit, [], False)
    model = model_name(config)
    try:
        found = engine.check_4bit(model, quantization=config.quantization(), residual=config.residual)
    except ConfigError as error:
        return _Base(config.load_in_4bit, list(error.problems), False)
    return _Base(*found, True)


def _model_problems(resumption: Resumption, *, is_readable: bool, rehearsable: bool) -> Iterator[str]:
    config, checkpoint = resumption.config, resumption.checkpoint
    model, tokenizer = model_name(config), None
    try:
        tokenizer = load_tokenizer(model)
    except ConfigError as error:
        yield from error.problems
    if not is_readable:
        return
    unfit = list(_raised_by(lambda: engine.check_base(model, max_length=config.max_length, tokenizer=tokenizer)))
    yield from unfit
    if not unfit:
        leak = row_problem(model, attention="eager" if config.attn is Attention.EAGER else "sdpa")
        yield from [leak] if leak else []
    if rehearsable:
        try:
            shapes = engine.rehearse(model, config.goat(), quantization=config.quantization())
        except ConfigError as error:
            yield from error.problems
            return
        if checkpoint is not None:
            yield from _misfits_of(checkpoint, shapes)


def _misfits_of(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Say whether a checkpoint's adapter is one of this model; a dense finish has taken its routers."""
    expected = {name: shape for name, shape in shapes.items() if checkpoint.is_routed or not name.endswith("router")}
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


def _raised_by(check: Callable[[], Any]) -> Iterator[str]:
    try:
        check()
    except ConfigError as error:
        yield from error.problems
