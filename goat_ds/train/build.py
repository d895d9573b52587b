"""Build the engine of a run: a base in shards, what is trained on it, an optimizer and its schedule."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from peft import set_peft_model_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from goat_ds.distributed import ranks
from goat_ds.errors import raised_everywhere
from goat_ds.train.config import TrainConfig
from goat_ds.train.inputs import Inputs
from goat_ds.train.resume import allow_or_refuse
from goat_ds.tuner.config import GoatConfig
from goat_ds.tuner.fit_sums import dense_goat_config
from goat_ds.tuner.model import ADAPTER_NAME
from goat_ds.zero import adapters
from goat_ds.zero import checkpoint as checkpoints
from goat_ds.zero import engine as engines
from goat_ds.zero.checkpoint import Checkpoint
from goat_ds.zero.decompose import init_adapter, settle_base
from goat_ds.zero.dense_finish import train_in_units_of_a
from goat_ds.zero.quantize import measure, recipe_of

logger = logging.getLogger(__name__)


class Built(NamedTuple):
    """What a run trains with."""

    engine: Any
    """DeepSpeed's."""
    base_fingerprint: dict[str, str] | None
    """The content of the base that training began on; None where it came in 4 bits."""


def build(inputs: Inputs, *, num_steps: int, checkpoint: Checkpoint | None = None) -> Built:
    """Load the base, put on it what the method trains, and build the DeepSpeed engine. A collective.

    What is trained starts from the base's weights, or continues from a checkpoint.
    """
    config, engine_config = inputs.config, inputs.engine_config
    warmup_steps = config.warmup_of(num_steps)
    if warmup_steps >= num_steps:
        raise raised_everywhere(f"warmup_steps ({warmup_steps}) must be below the steps of the run ({num_steps})")
    base = engines.load_base(
        inputs.base,
        precision=config.precision,
        attention=engines.choose_attention(config.attn, precision=config.precision),
        engine_config=engine_config,
        quantization=config.quantization(),
        compute_precision=config.bnb_4bit_compute_dtype,
    )
    is_goat = isinstance(inputs.adapter, GoatConfig)
    model, found = (_with_experts if is_goat else _with_rival)(base, inputs, checkpoint)
    if checkpoint:
        check_same_base(found, config, checkpoint)
    if (held := measure(model)).num_layers:
        logger.info(held)
    engines.enable_checkpointing(model, config.gradient_checkpointing)
    if checkpoint and not checkpoint.is_routed:
        train_in_units_of_a(model)
    engine = engines.build_engine(
        model,
        engine_config=engine_config,
        schedule=schedule_of(config, num_steps=num_steps),
        rates=config.rates,
    )
    if checkpoint:
        checkpoints.restore(engine, checkpoint)
    return Built(engine, found)


def _with_experts(base: Any, inputs: Inputs, checkpoint: Checkpoint | None) -> tuple[Any, dict[str, str] | None]:
    """Return a model with GOAT experts, and the base's content."""
    config, goat = inputs.config, inputs.adapter
    assert isinstance(goat, GoatConfig)
    if checkpoint and not checkpoint.is_routed:
        goat = dense_goat_config(goat)
    model: Any = engines.attach_experts(base, goat, engine_config=inputs.engine_config)
    report = init_adapter(
        model,
        ADAPTER_NAME,
        seed=config.seed,
        cache=Path(config.svd_cache),
        recipe=recipe_of(config.quantization(), engine_config=inputs.engine_config),
        stored=checkpoints.stored_adapter(checkpoint) if checkpoint else None,
    )
    origin = f"from {checkpoint.folder}" if checkpoint else f"{report.num_cached} from the cache"
    logger.info(f"GOAT start: {report.num_layers} layers, {origin}, {report.seconds:.1f} s")
    return model, model.peft_config[ADAPTER_NAME].base_fingerprint


def _with_rival(base: Any, inputs: Inputs, checkpoint: Checkpoint | None) -> tuple[Any, dict[str, str] | None]:
    """Return a model with an adapter of another method, or without one, and the base's content."""
    config, adapter = inputs.config, inputs.adapter
    recipe = recipe_of(config.quantization(), engine_config=inputs.engine_config)
    found = settle_base(base, recipe=recipe)
    if adapter is None:
        return base, found and found._asdict()
    model = adapters.attach(base, adapter, dtype=config.precision.torch_dtype, seed=config.seed)
    if checkpoint:
        # The frozen parts of an adapter; the engine restores what is trained, with its state.
        stored = checkpoints.stored_adapter(checkpoint)
        set_peft_model_state_dict(model, ranks.object_from(stored.reader, stored.tensors), adapter_name=ADAPTER_NAME)
    return model, found and found._asdict()


def check_same_base(found: dict[str, str] | None, config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Check that a resumed run has the base that it began with; every rank raises the same.

    Raises:
        ConfigError: the base has other weights. A base that came in 4 bits has no fingerprint: then its name counts.
    """
    expected, name = checkpoint.base_fingerprint, checkpoint.run["settings"]["model"]
    if expected and found != expected:
        change = f"model ({config.base_name}) has other weights than the base that the run began with; give that base"
        allow_or_refuse(config, change)
    elif not expected and config.model != name:
        change = (
            f"model ({config.model}) was {name} when the run began; a base that came in 4 bits is known by its name"
        )
        allow_or_refuse(config, change)


def schedule_of(config: TrainConfig, *, num_steps: int) -> Callable[[Optimizer], LRScheduler]:
    """Return a function that makes the learning-rate schedule of an optimizer."""
    return lambda optimizer: get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.warmup_of(num_steps),
        num_training_steps=num_steps,
    )
