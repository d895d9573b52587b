"""What starting the experts takes: seconds by a decomposition tried on the spot, and bytes while a model is loaded."""

import math
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from goat_ds.distributed import ranks
from goat_ds.method.spectrum import chosen_indices, decompose
from goat_ds.plan.memory import MASTER_BYTES, WIDE_BYTES, Memory, Part, Place, Placement, optimizer, own_values, weights
from goat_ds.plan.skeleton import Kind, Skeleton
from goat_ds.plan.timeline import LiveBytes
from goat_ds.tuner.config import GoatConfig
from goat_ds.zero.waves import cost_of, waves

TIMED_SIDE = 1024
"""Smaller side of the weight that is timed: half a second, and large enough to foretell larger ones."""
MEASURED_SIDE = 384
"""Smaller side of the weight whose workspace is measured, which grows as the weight does from here on."""
NUM_TRIALS = 2


class Decompositions:
    """What decomposing the weights of a model costs, by decomposing small ones of their proportions here and now.

    They are decomposed where a run of this process would decompose: on its accelerator where it has one, else on the
    CPU. So seconds are those of this machine, and a node with GPUs that is planned for from one without is not timed.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton, self._workspaces = skeleton, dict[float, float]()

    def seconds(self, world_size: int) -> float:
        """Estimate the time until all ranks are done, each as fast as this process is now."""
        dealt = waves(list(self._skeleton.weights), cost=self._skeleton.cost, world_size=world_size)
        dearest = [wave[0][0] for wave in dealt]
        # Without a decomposition there is nothing to time: packing takes no time worth counting.
        costs = [self._skeleton.cost(path) for path in dearest if path in self._skeleton.decomposed]
        return sum(costs) * self._seconds_per_cost if costs else 0.0

    def workspace(self, shape: tuple[int, int]) -> int:
        """Return the bytes of tensors that decomposing a weight needs beside it."""
        ratio = shape[0] / shape[1]
        if ratio not in self._workspaces:
            weight_OI, indices_ED = self._small(shape, side=MEASURED_SIDE)
            with LiveBytes([weight_OI, indices_ED]) as live:
                decompose(weight_OI, indices_ED)
            self._workspaces[ratio] = live.peak / weight_OI.numel()
        return math.ceil(self._workspaces[ratio] * shape[0] * shape[1])

    @cached_property
    def _seconds_per_cost(self) -> float:
        shapes = (self._skeleton.weights[path] for path in self._skeleton.decomposed)
        weight_OI, indices_ED = self._small(max(shapes, key=_cost), side=TIMED_SIDE)
        # The first trial warms up, and whatever else this machine does only adds.
        seconds = min(_seconds_of(weight_OI, indices_ED) for _ in range(NUM_TRIALS))
        return seconds / _cost((weight_OI.shape[0], weight_OI.shape[1]))

    def _small(self, shape: tuple[int, int], *, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Only experts decompose.
        model: Any = self._skeleton.model
        goat: GoatConfig = model.peft_config["default"]
        size = min(min(shape), max(side, goat.r))
        small = [round(each * size / min(shape)) for each in shape]
        indices_ED = chosen_indices(goat.init, num_directions=size, num_experts=goat.num_experts, r=goat.r)
        weight_OI = torch.randn(small, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        return weight_OI.to(ranks.device()), indices_ED


def _seconds_of(weight_OI: torch.Tensor, indices_ED: torch.Tensor) -> float:
    began = time.perf_counter()
    # Reading a value waits for an accelerator.
    decompose(weight_OI, indices_ED).s_R[0].item()
    return time.perf_counter() - began


def _cost(shape: tuple[int, int]) -> int:
    return cost_of(shape, decomposes=True)


def while_loading(phases: Sequence[Memory]) -> Memory:
    """Return what a rank holds until its engine is ready, on device and host each at its own worst instant."""
    return Memory(tuple(part for place in Place for part in _worst_parts(phases, place)))


def loading_phases(placement: Placement, decompositions: Decompositions, *, is_mapped: bool) -> list[Memory]:
    """Return what a rank holds in each phase until its engine is ready.

    Args:
        placement: Model, ZeRO and ranks.
        decompositions: Of the model's weights.
        is_mapped: Whether a base that becomes 4-bit stays in its files until then.
    """
    phases = [_while_starting(placement, decompositions, is_mapped=is_mapped), _while_building(placement)]
    if placement.zero.stage == 3 and not (is_mapped and placement.skeleton.count(Kind.FOUR_BIT)):
        phases.append(_while_reading(placement))
    return [Memory(tuple(phase)) for phase in phases]


def _worst_parts(memories: Sequence[Memory], place: Place) -> list[Part]:
    """Return what is held in one place at the instant at which that is most."""
    worst = max(memories, key=lambda memory: memory.on(place))
    return [part for part in worst.parts if part.place is place]


def _while_reading(placement: Placement) -> Iterator[Part]:
    """Every rank has its shards, and the largest parameter as it is gathered and as it is read."""
    base = [item for item in placement.skeleton.parameters if item.kind is Kind.BASE]
    place = _place_of_base(placement)
    yield Part("base", sum(item.shard_bytes(placement.world_size) for item in base) + _unquantised(placement), place)
    yield Part("largest parameter, twice", 2 * max((item.num_bytes for item in base), default=0))


def _place_of_base(placement: Placement) -> Place:
    # Below ZeRO-3 the engine brings the base to the device.
    return Place.HOST if placement.zero.stage < 3 or placement.zero.offloads_parameters else Place.DEVICE


def _unquantised(placement: Placement) -> int:
    """Return a rank's bytes of the weights that become 4-bit, as long as they are not."""
    shapes = placement.skeleton.becomes_4bit
    sharers = placement.world_size if placement.zero.stage == 3 else 1
    value_bytes = placement.skeleton.value_bytes
    return sum(-(-out_features * in_features // sharers) * value_bytes for out_features, in_features in shapes.values())


def _while_starting(placement: Placement, decompositions: Decompositions, *, is_mapped: bool) -> Iterator[Part]:
    skeleton, sharers = placement.skeleton, placement.world_size if placement.zero.stage == 3 else 1
    place = _place_of_base(placement)
    for name, kinds, where in (
        ("base", (Kind.BASE,), place),
        ("adapter", (Kind.INITIAL, Kind.TRAINED), Place.DEVICE if sharers == 1 else place),
    ):
        held = (item for item in skeleton.parameters if item.kind in kinds)
        yield Part(name, sum(item.shard_bytes(sharers) for item in held), where)
    packed = [item.shard_bytes(sharers) for item in skeleton.parameters if item.kind is Kind.FOUR_BIT]
    if packed and not skeleton.becomes_4bit:
        yield Part("base, 4-bit layers with their statistics", sum(packed), place)
    if skeleton.becomes_4bit and not is_mapped:
        yield Part("base, layers that are not 4-bit yet", _unquantised(placement), place)
    yield from _worst_wave(placement, decompositions, grows=bool(skeleton.becomes_4bit) and is_mapped, place=place)


def _worst_wave(placement: Placement, decompositions: Decompositions, *, grows: bool, place: Place) -> Iterator[Part]:
    """Yield the weight a rank works on, and with it the 4-bit layers that are done by then."""
    skeleton, sharers = placement.skeleton, placement.world_size if placement.zero.stage == 3 else 1
    dealt = waves(list(skeleton.weights), cost=skeleton.cost, world_size=placement.world_size)
    rounds = [[path for path, _ in wave] for wave in dealt]
    packed = skeleton.packed_bytes
    finished = [sum(-(-packed.get(path, 0) // sharers) for path in wave) for wave in rounds]
    done = [0, *accumulate(finished)] if grows else [0] * (len(rounds) + 1)
    at_work = [max((_at_work(placement, path, decompositions) for path in wave), default=0) for wave in rounds]
    if rounds:
        worst = max(range(len(rounds)), key=lambda wave: done[wave] + at_work[wave])
        yield Part("one weight, whole, and its decomposition", at_work[worst])
        if grows:
            yield Part("base, 4-bit layers that are done", done[worst], place)


def _at_work(placement: Placement, path: str, decompositions: Decompositions) -> int:
    skeleton = placement.skeleton
    shape = skeleton.weights[path]
    num_values = shape[0] * shape[1]
    # What is 4-bit in its file is unpacked to fp32.
    is_stored = path in placement.skeleton.packed_bytes and not placement.skeleton.becomes_4bit
    held = (
        placement.skeleton.packed_bytes[path] + 4 * num_values
        if is_stored
        else placement.skeleton.value_bytes * num_values
    )
    return held + (decompositions.workspace(shape) if path in placement.skeleton.decomposed else 0)


def _while_building(placement: Placement) -> Iterator[Part]:
    """Masters are made while something of their size is there for a moment; ZeRO-3 makes its bucket now as well."""
    later = ("Adam's moments, fp32", "small parameters, whole on every rank")
    early = ("gradients", "DeepSpeed's reduce bucket") if placement.zero.stage < 3 else ()
    for part in (*weights(placement), *optimizer(placement)):
        if part.name not in (*later, *early):
            yield part
    own = own_values(placement)
    place = Place.HOST if placement.zero.offloads_optimizer else Place.DEVICE
    yield Part("masters while they are made", own * max(MASTER_BYTES, WIDE_BYTES), place)
