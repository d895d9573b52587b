"""What of a ds_config makes this run slow, or needs memory for nothing, by what DeepSpeed 0.19.8 does with it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from goat_ds.plan.memory import persistent
from goat_ds.plan.planner import GPU_GIB, Planner, with_zero
from goat_ds.plan.skeleton import Kind

SMALL = 100_000
"""DeepSpeed's own threshold of parameters that it leaves whole."""
MANY_MESSAGES = 64
"""Reductions of a step from which on a bucket is called small."""
WASTE = 2**28
"""Bytes worth a line."""


def slow(planner: Planner) -> Iterator[str]:
    """Say, one line each, what is slow or wasteful; the config must have no problems."""
    yield from _switches(planner.settings.ds_config)
    yield from _buckets(planner)
    if planner.zero.stage == 3:
        yield from _gathering(planner)
    yield from _needless(planner)


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
    if (num_messages := -(-num_trained // zero.reduce_bucket)) >= MANY_MESSAGES:
        yield f"{named} is slow: a step reduces {num_trained:,} gradients in {num_messages:,} messages; raise it"
    num_buckets = 2 if zero.overlaps and zero.stage < 3 else 1
    unused = num_buckets * (zero.reduce_bucket - num_trained) * settings.dtype.itemsize
    if unused >= WASTE and zero.has_buckets:
        yield (
            f"{named} holds {unused / 2**30:.2f} GiB for nothing: there are {num_trained:,} gradients; set it to "
            f"{num_trained}"
        )
    if settings.engine.world_size > 1 and not zero.overlaps:
        cost = f", for a second bucket of {zero.reduce_bucket * settings.dtype.itemsize / 2**30:.2f} GiB"
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
    kept = {item.name for item in persistent(planner.run(world_size))}
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


def _needless(planner: Planner) -> Iterator[str]:
    """Say what saves memory that is there: without it the run fits on as many GPUs of the same size."""
    zero, world_size = planner.zero, planner.settings.engine.world_size
    size = next((gib for gib in GPU_GIB if planner.fits(gib, world_size)), None)
    trials: list[tuple[str, dict[str, Any], str, str]] = []
    if zero.offloads_optimizer:
        why = "gradients and masters pass through the host in every step"
        trials.append(("offload_optimizer (cpu)", {"offload_optimizer": None}, why, "leave it out"))
    if zero.offloads_parameters and zero.stage == 3:
        why = "every gather begins with a copy from the host"
        trials.append(("offload_param (cpu)", {"offload_param": None}, why, "leave it out"))
    if zero.stage == 3 and world_size > 1:
        why = "all parameters are gathered for forward and again for backward"
        trials.append(("stage (3)", {"stage": 2, "offload_param": None}, why, "use 2"))
    for name, changes, why, way_out in trials:
        changed = with_zero(planner.settings.ds_config, **changes)
        other = planner.like(dataclasses.replace(planner.settings, ds_config=changed))
        if size is not None and other.fits(size, world_size):
            yield (
                f"ds_config: zero_optimization.{name} is slow: {why}; without it a rank holds "
                f"{other.device_bytes(world_size) / 2**30:.1f} GiB, and fits {size} GB as well; {way_out}"
            )
    offloads = planner.settings.ds_config.get("zero_optimization", {})
    for name in ("offload_optimizer", "offload_param"):
        block = offloads.get(name) or {}
        if block.get("device") == "cpu" and not block.get("pin_memory", False):
            yield f"ds_config: zero_optimization.{name}.pin_memory (false) is slow: copies wait; set it to true"
