"""What a run of ``launch/train.py`` must equal: its settings, and its first step without any engine."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer

from goat_ds import demo
from goat_ds.data import BatchPlan, StepBatch, batches, pack_dataset, prepare
from goat_ds.train.config import TrainConfig
from goat_ds.zero import decompose
from tests.launching import FEW_HELDOUT

NUM_STEPS, NUM_FEWER_STEPS = 20, 8
"""Of the runs that judge, and of those that must equal their first steps."""
COMMON = {
    "precision": "fp32",
    "eval_data": str(FEW_HELDOUT),
    "max_steps": str(NUM_STEPS),
    "max_length": "64",
    "learning_rate": "5e-4",
    # So that a shorter run has the learning rates of a longer one.
    "lr_scheduler": "constant_with_warmup",
    "warmup_steps": "2",
    "r": "16",
    "num_experts": "4",
    # Large, so that a balance gradient that went missing would show in the losses.
    "balance_coef": "0.05",
    "seed": "3",
}
FEWER_STEPS = {"max_steps": str(NUM_FEWER_STEPS)}
ZERO3 = {"ds_config": "ds_configs/zero3.json"}
TWO_IN_ONE_STEP = {"grad_accum_steps": "2"}


class Step(NamedTuple):
    """What a step is compared by."""

    loss: float
    grad_norm: float


def start_as_the_run_did(model: Any, config: TrainConfig, weight_of: Callable[[str], Tensor]) -> None:
    """Fill a deferred adapter with the start of a run that has left its decompositions in the cache.

    Args:
        model: A PEFT model on one process.
        config: Of the run.
        weight_of: The weight ``[O, I]`` that a layer's experts start from, by its path in the base.
    """
    for work in decompose._works(model, "default", None):
        assert work.item is not None
        received = decompose.Received(work, weight_of(work.path.removeprefix("base_model.model.")))
        start = decompose._init_values(received, None, seed=config.seed, cache=Path(config.svd_cache))
        assert start is not None and start.from_cache
        for parameter, value in zip(work.item.experts.parameters(), start.values, strict=True):
            parameter.data.copy_(value)
        work.item.experts.ready = True


def whole_batches(token_cache: Path, *, seed: int, num_steps: int) -> Iterator[StepBatch]:
    """Yield the first global batches, of two packs of the demo's data, as one process sees them."""
    tokenizer = AutoTokenizer.from_pretrained(demo.base_path())
    tokens = prepare([str(demo.train_data())], tokenizer, max_length=64, cache_dir=token_cache)
    packed = pack_dataset(tokens.dataset, max_length=64, packing=True)
    plan = BatchPlan(
        packs=packed.packs,
        num_labels=packed.num_labels,
        micro_batch_size=1,
        global_batch_size=2,
        world_size=1,
        seed=seed,
    )
    for _, batch in batches(tokens.dataset, plan, world_rank=0).from_step(0, until=num_steps):
        yield batch


def first_step(model: Any, config: TrainConfig) -> Step:
    """Take the loss of the first global batch, two packs of the demo's data, and its gradient's norm."""
    (batch,) = whole_batches(Path(config.token_cache), seed=config.seed, num_steps=1)
    loss = 0.0
    for row in batch.micro_batches:
        logits = model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False).logits[0]
        lm = torch.nn.functional.cross_entropy(logits, row.labels[0], ignore_index=-100, reduction="sum")
        loss += lm.item() / batch.num_label_tokens
        assert sum(load.balance_loss for load in model.base_model.signal.loads.values()) > 0
        # The mean over both micro-batches of the sum over layers.
        model.base_model.with_balance_loss(lm / batch.num_label_tokens, weight=0.5).backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return Step(loss, grads.norm().item())
