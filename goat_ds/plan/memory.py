"""Bytes of one rank, term by term, by what DeepSpeed 0.19.8 allocates for a filled ds_config.

Shards are those of the first rank, which has no less than any other; what is padded is counted padded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from goat_ds.plan.gathering import Gathered, Load, follow
from goat_ds.plan.skeleton import Held, Kind, Skeleton
from goat_ds.plan.timeline import Timeline, Use, blocks_of, use_of
from goat_ds.zero.sizes import ZeroSizes

MASTER_BYTES, ADAM_BYTES = 4, 8
"""Of a trained value: fp32, and two fp32 moments."""
WIDE_BYTES = 4
"""Of a gradient as the optimizer takes it."""


class Place(StrEnum):
    """Where something is held."""

    DEVICE = "device"
    HOST = "host"


class Part(NamedTuple):
    """One term of a rank's memory."""

    name: str
    num_bytes: int
    place: Place = Place.DEVICE


@dataclass(frozen=True)
class Memory:
    """What a rank holds at its worst instant."""

    parts: tuple[Part, ...]

    def on(self, place: Place) -> int:
        """Add up what is held in one place."""
        return sum(part.num_bytes for part in self.parts if part.place is place)

    @property
    def everywhere(self) -> int:
        """Add up all of it; where the device is a CPU, both places are one."""
        return sum(part.num_bytes for part in self.parts)


class Placement(NamedTuple):
    """What decides over a rank's memory."""

    skeleton: Skeleton
    zero: ZeroSizes
    world_size: int


def in_training(placement: Placement, timeline: Timeline, *, torch_adam: bool) -> Memory:
    """Return what a rank holds at the worst instant of a step that is not the first.

    Args:
        placement: Model, ZeRO and ranks.
        timeline: Of one micro-batch.
        torch_adam: Whether AdamW is torch's, which works in tensors of its own.
    """
    kept = [*weights(placement), *optimizer(placement)]
    busiest = _worst_instant(placement, timeline)
    at_step = list(_optimizer_step(placement, torch_adam=torch_adam))
    busiest = max(busiest, at_step, key=lambda parts: sum(part.num_bytes for part in parts))
    return Memory((*kept, *busiest))


def weights(placement: Placement) -> Iterator[Part]:
    """Yield what a rank holds of the model between two uses of it."""
    skeleton, zero, world_size = placement.skeleton, placement.zero, placement.world_size
    place = Place.HOST if zero.offloads_parameters and zero.stage == 3 else Place.DEVICE
    names = {
        Kind.BASE: "base",
        Kind.FOUR_BIT: "base, 4-bit layers with their statistics",
        Kind.INITIAL: "adapter, initial factors",
        Kind.TRAINED: "adapter, trained",
    }
    for kind, name in names.items():
        held = [item for item in skeleton.parameters if item.kind is kind]
        if not held:
            continue
        if zero.stage == 3:
            yield Part(name, sum(item.shard_bytes(world_size) for item in held), place)
        elif kind is Kind.TRAINED and zero.stage:
            yield Part(name, _flat_values(placement) * held[0].value_bytes)
        else:
            yield Part(name, sum(item.num_bytes for item in held))
    if whole := sum(item.num_bytes for item in persistent(placement)):
        yield Part("small parameters, whole on every rank", whole)
    if zero.second_copy_ranks > 1:
        second = sum(item.shard_bytes(zero.second_copy_ranks) for item in skeleton.parameters)
        yield Part("second copy of the parameters (hpZ)", second, place)
    if buffers := sum(buffer.nbytes for buffer in skeleton.model.buffers()):
        yield Part("buffers of the model", buffers)


def persistent(placement: Placement) -> list[Held]:
    """List the parameters that ZeRO-3 holds whole beside their shards; 4-bit layers never are."""
    if placement.zero.stage != 3 or placement.world_size == 1:
        return []
    chosen, num_values = [], 0
    for item in placement.skeleton.parameters:
        fits = item.num_values + num_values <= placement.zero.most_persistent
        if fits and item.num_values <= placement.zero.persistence_threshold:
            num_values += item.num_values
            chosen.append(item)
    return [item for item in chosen if item.kind is not Kind.FOUR_BIT]


def _trained(placement: Placement) -> list[Held]:
    return [item for item in placement.skeleton.parameters if item.kind is Kind.TRAINED]


def _flat_values(placement: Placement) -> int:
    """Count the trained values in the buffer of ZeRO-1 and 2, which two values of every rank align."""
    aligned = 2 * placement.world_size
    return -(-sum(item.num_values for item in _trained(placement)) // aligned) * aligned


def own_values(placement: Placement) -> int:
    """Count the trained values that a rank's optimizer works on."""
    if placement.zero.stage == 3:
        return sum(-(-item.num_values // placement.world_size) for item in _trained(placement))
    return _flat_values(placement) // (placement.world_size if placement.zero.stage else 1)


def optimizer(placement: Placement) -> Iterator[Part]:
    """Yield what a rank holds to train, between two steps and while gradients come."""
    zero, own = placement.zero, own_values(placement)
    value_bytes, place = _trained(placement)[0].value_bytes, Place.HOST if zero.offloads_optimizer else Place.DEVICE
    yield Part("master weights, fp32", own * MASTER_BYTES, place)
    yield Part("Adam's moments, fp32", own * ADAM_BYTES, place)
    # Below ZeRO-2 every gradient waits whole for its reduction.
    gradients = own * zero.gradient_dtype.itemsize if zero.stage >= 2 else _flat_values(placement) * value_bytes
    yield Part("gradients", gradients, place if zero.stage >= 2 else Place.DEVICE)
    if zero.offloads_optimizer:
        yield Part("gradients as the optimizer takes them, fp32", own * WIDE_BYTES, Place.HOST)
    if zero.stage and zero.has_buckets:
        num_buckets = 2 if zero.overlaps and zero.stage < 3 else 1
        in_bucket = zero.gradient_dtype.itemsize if zero.stage == 1 else value_bytes
        yield Part("DeepSpeed's reduce bucket", num_buckets * zero.reduce_bucket * in_bucket)


def _optimizer_step(placement: Placement, *, torch_adam: bool) -> Iterator[Part]:
    if placement.zero.offloads_optimizer:
        return
    yield Part("optimizer's step: gradients in fp32", own_values(placement) * WIDE_BYTES)
    if torch_adam:
        yield Part("optimizer's step: torch's workspace", 2 * own_values(placement) * WIDE_BYTES)


def _worst_instant(placement: Placement, timeline: Timeline) -> list[Part]:
    """Return what is held beside the rest when activations and gathered parameters together are most."""
    loads = gathered_over_time(placement, timeline)
    pairs = [
        max((instant.begins, load.while_gathering), (instant.peak, load.steady), key=sum)
        for instant, load in zip(timeline.instants, loads, strict=True)
    ]
    activations, gathered = max(pairs, key=sum)
    return [Part("activations, logits and loss", activations), Part("parameters gathered for the moment", gathered)]


def gathered_over_time(placement: Placement, timeline: Timeline) -> Sequence[Load]:
    """Return what ZeRO-3 gathers at every instant; with one rank and below ZeRO-3 there is nothing to gather."""
    if placement.zero.stage != 3 or placement.world_size == 1:
        return [Load(0, 0)] * len(timeline.instants)
    return list(follow(timeline.instants, _as_gathered(placement), placement.zero))


def _as_gathered(placement: Placement) -> Mapping[Use, Gathered]:
    whole, (blocks, _) = {item.name for item in persistent(placement)}, blocks_of(placement.skeleton.model)
    found = {}
    for item in placement.skeleton.parameters:
        buffer_values = -(-item.num_values // placement.world_size) * placement.world_size
        persists = item.name in whole
        found[use_of(item.name, blocks)] = Gathered(item.num_values, buffer_values, item.value_bytes, persists)
    return found


def checkpoint_bytes(skeleton: Skeleton) -> int:
    """Return the bytes of a checkpoint on disk: the adapter, masters and moments; not the sample of the data."""
    adapter = skeleton.num_bytes(Kind.INITIAL, Kind.TRAINED)
    return adapter + skeleton.count(Kind.TRAINED) * (MASTER_BYTES + ADAM_BYTES)
