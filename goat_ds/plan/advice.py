"""What of a ds_config makes this run slow, or needs memory for nothing, by what DeepSpeed 0.19.8 does with it."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from goat_ds.plan.memory import persistent
from goat_ds.plan.planner import GPU_GIB, Planner, with_zero
from goat_ds.plan.skeleton import Kind

SMALL = 100_000
"""DeepSpeed's own threshold of parameters that it leaves whole."""
MANY_MESSAGES = 64
"""Reductions of a step from which on a bucket is called small."""
FEW_MESSAGES = 8
"""Reductions of a step by the bucket that is then advised."""
WASTE = 2**28
"""Bytes worth a line."""


def slow(planner: Planner) -> Iterator[str]:
    """Yield, one line each, what is slow or wasteful; the config must have no problems."""
    yield from _switches(planner.settings.ds_config)
    yield from _buckets(planner)
    if planner.zero.stage == 3:
        yield from _gathering(planner)
    yield from _needless(planner)
    yield from _offloads(planner)


def _switches(raw: Any) -> Iterator[str]:
    for name, why in (
        ("wall_clock_breakdown", "its timers wait for the device at every phase of a step"),
        ("memory_breakdown", "it asks the device and prints at every phase of a step"),
    ):
        if raw.get(name) is True:
            yield f"ds_config: {name} (true) is slow: {why}; set it to false"
    if raw.get("comms_logger", {}).get("enabled") is True:
        yield "ds_config: comms_logger.enabled (true) is slow: it waits for every collective; set it to false"


def _buckets(planner: Planner) -> Iterator[str]:
    zero, settings = planner.zero, planner.settings
    if not zero.stage:
        return
    num_trained = planner.skeleton.count(Kind.TRAINED)
    named = f"ds_config: zero_optimization.reduce_bucket_size ({zero.reduce_bucket})"
    num_messages, bucket = -(-num_trained // zero.reduce_bucket), zero.reduce_bucket
    if num_messages >= MANY_MESSAGES:
        bucket = -(-num_trained // FEW_MESSAGES)
        yield (
            f"{named} is slow: a step reduces {num_trained:,} gradients in {num_messages:,} messages; set it to "
            f"{bucket}"
        )
    num_buckets = 2 if zero.overlaps and zero.stage < 3 else 1
    unused = num_buckets * (zero.reduce_bucket - num_trained) * settings.dtype.itemsize
    if unused >= WASTE and zero.has_buckets:
        yield (
            f"{named} holds {unused / 2**30:.2f} GiB for nothing: there are {num_trained:,} gradients; set it to "
            f"{num_trained}"
        )
    # A bucket is reduced when it is full or backward is over, and then there is nothing to overlap with.
    if settings.engine.world_size > 1 and not zero.overlaps and num_messages > 1:
        cost = f", for a second bucket of {bucket * settings.dtype.itemsize / 2**30:.2f} GiB"
        yield (
            "ds_config: zero_optimization.overlap_comm (false) is slow: backward waits while gradients are reduced; "
            f"set it to true{cost if zero.stage < 3 else ''}"
        )


def _gathering(planner: Planner) -> Iterator[str]:
    zero, world_size = planner.zero, planner.settings.engine.world_size
    if world_size == 1:
        if not zero.offloads_parameters:
            yield "ds_config: zero_optimization.stage (3) is slow on one rank, which has nobody to share with; use 1"
        return
    kept = {item.name for item in persistent(planner.placement(world_size))}
    small = [
        item
        for item in planner.skeleton.parameters
        if item.num_values <= SMALL and item.name not in kept and item.kind is not Kind.FOUR_BIT
    ]
    if len(small) > len(planner.skeleton.parameters) // 4:
        yield (
            f"ds_config: zero_optimization.stage3_param_persistence_threshold ({zero.persistence_threshold}) is slow: "
            f"{len(small)} small parameters are gathered for every forward and backward; set it to {SMALL} "
            f"({sum(item.num_bytes for item in small) / 2**20:.1f} MiB)"
        )
    if zero.prefetch_bucket == 0:
        yield (
            "ds_config: zero_optimization.stage3_prefetch_bucket_size (0) is slow: every module waits for its own "
            "gather; leave it out"
        )


class _Trial(NamedTuple):
    """Something that saves memory, and the run without it."""

    name: str
    without: dict[str, Any]
    """Changes of zero_optimization."""
    why: str
    way_out: str


def _trials(planner: Planner) -> Iterator[_Trial]:
    zero = planner.zero
    if zero.offloads_optimizer:
        why = "gradients and masters pass through the host in every step"
        yield _Trial("offload_optimizer (cpu)", {"offload_optimizer": None}, why, "leave it out")
    if zero.offloads_parameters and zero.stage == 3:
        why = "every gather begins with a copy from the host"
        yield _Trial("offload_param (cpu)", {"offload_param": None}, why, "leave it out")
    if zero.stage == 3 and planner.settings.engine.world_size > 1:
        why = "all parameters are gathered for forward and again for backward"
        without = {"stage": 2, "offload_param": None, "zero_hpz_partition_size": None}
        has_copy = zero.second_copy_ranks > 1
        yield _Trial("stage (3)", without, why, f"use 2{' without zero_hpz_partition_size' if has_copy else ''}")


def _needless(planner: Planner) -> Iterator[str]:
    """Yield what saves memory that is there: without all of it the run fits on as many GPUs of the same size."""
    world_size, raw, too = planner.settings.engine.world_size, planner.settings.ds_config, ""
    size = next((gib for gib in GPU_GIB if planner.fits(gib, world_size)), None)
    if size is None:
        return
    for trial in _trials(planner):
        changed = with_zero(raw, **trial.without)
        other = planner.like(dataclasses.replace(planner.settings, ds_config=changed))
        if other.fits(size, world_size):
            yield (
                f"ds_config: zero_optimization.{trial.name} is slow: {trial.why}; without it{too} a rank holds "
                f"{other.device_bytes(world_size) / 2**30:.1f} GiB, and fits {size} GB as well; {trial.way_out}"
            )
            raw, too = changed, " too"


def _offloads(planner: Planner) -> Iterator[str]:
    blocks, stage = planner.settings.ds_config.get("zero_optimization", {}), planner.zero.stage
    for name in ("offload_optimizer", "offload_param"):
        block = blocks.get(name) or {}
        if block.get("device") != "cpu":
            continue
        named = f"ds_config: zero_optimization.{name}"
        if name == "offload_param" and stage < 3:
            yield f"{named} (cpu) has no effect at stage {stage}; use stage 3, or leave it out"
        elif not block.get("pin_memory", False):
            yield f"{named}.pin_memory (false) is slow: copies wait; set it to true"
