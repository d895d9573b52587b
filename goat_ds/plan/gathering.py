"""What ZeRO-3 holds gathered at every instant of a step, by the rules of DeepSpeed 0.19.8's parameter coordinator.

From the third forward on it knows the order in which modules are used. Before a module runs it gathers the parameters
that are not there, then asks for those of the modules that follow, ``prefetch_bucket`` values at a time. Several
parameters travel in one buffer, out of which each is copied, and which lives until the last of them is used. After the
module, a parameter is let go unless it is used again within ``max_reuse_distance`` values.
"""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from goat_ds.plan.timeline import Instant, Use
from goat_ds.zero.sizes import ZeroSizes

NEVER = -1


class Gathered(NamedTuple):
    """A parameter as it is gathered."""

    num_values: int
    buffer_values: int
    """With the padding of the last shards."""
    value_bytes: int
    persists: bool
    """Whether it is whole all the time, and so counted elsewhere."""


class Load(NamedTuple):
    """Bytes of gathered parameters at an instant."""

    while_gathering: int
    """Most of them while its border is crossed."""
    steady: int
    """From then on."""


@dataclass
class _Buffer:
    """What several parameters travel in."""

    num_bytes: int
    members: list[Use]
    is_copied: bool
    waiting: set[Use] = field(default_factory=set)
    has_arrived: bool = False


def follow(instants: Sequence[Instant], parameters: Mapping[Use, Gathered], zero: ZeroSizes) -> Iterator[Load]:
    """Yield the load of every instant of a step."""
    steps = [instant.parameters for instant in instants if instant.enters]
    coordinator = _Coordinator(steps, parameters, zero)
    leaving: tuple[Use, ...] = ()
    for instant in instants:
        coordinator.release(leaving)
        leaving = ()
        most = coordinator.num_bytes
        if instant.enters:
            most = coordinator.fetch(instant.parameters)
            # A module's backward says when it begins; it is over where something else begins.
            leaving = instant.parameters if instant.backward else ()
        else:
            coordinator.release(instant.parameters)
        yield Load(most, coordinator.num_bytes)


class _Coordinator:
    def __init__(self, steps: Sequence[tuple[Use, ...]], parameters: Mapping[Use, Gathered], zero: ZeroSizes) -> None:
        self._parameters, self._zero, self._step = parameters, zero, 0
        self._uses: dict[Use, list[int]] = defaultdict(list)
        for step, names in enumerate(steps):
            for name in names:
                self._uses[name].append(step)
        per_step = [sum(parameters[name].num_values for name in names) for names in steps]
        self._passed = [0, *accumulate(per_step)]
        self._queue = deque((name, step) for step, names in enumerate(steps) for name in names)
        self._fetched_for: dict[Use, int] = defaultdict(lambda: NEVER)
        self._whole = {name for name, parameter in parameters.items() if parameter.persists}
        self._travelling: dict[Use, _Buffer] = {}
        self._num_live = self.num_bytes = 0

    def fetch(self, names: tuple[Use, ...]) -> int:
        """Have a module's parameters here, and ask for the next; return the most bytes while that goes on."""
        self._gather([name for name in names if not self._is_here(name)])
        most = self.num_bytes
        for name in names:
            if name in self._travelling:
                most = max(most, self._arrive(name))
        self._drop_from_queue({name for name in names if self._fetched_for[name] < self._step})
        self._gather(self._chosen_ahead())
        self._step += 1
        return max(most, self.num_bytes)

    def release(self, names: Iterable[Use]) -> None:
        """Let parameters go that are not used again soon."""
        for name in names:
            parameter = self._parameters[name]
            is_ready = name in self._whole and not parameter.persists
            if is_ready and self._fetched_for[name] <= self._step and not self._is_used_soon(name):
                self._whole.discard(name)
                self._num_live -= parameter.num_values
                self.num_bytes -= parameter.num_values * parameter.value_bytes

    def _is_here(self, name: Use) -> bool:
        return name in self._whole or name in self._travelling

    def _is_used_soon(self, name: Use) -> bool:
        uses = self._uses[name]
        place = bisect_left(uses, self._step)
        if place == len(uses):
            return False
        return self._passed[uses[place]] - self._passed[self._step] < self._zero.max_reuse_distance

    def _gather(self, names: Sequence[Use]) -> None:
        by_size = defaultdict(list)
        for name in names:
            by_size[self._parameters[name].value_bytes].append(name)
        for value_bytes, members in by_size.items():
            num_bytes = value_bytes * sum(self._parameters[name].buffer_values for name in members)
            buffer = _Buffer(num_bytes, members, is_copied=len(names) > 1, waiting=set(members))
            self._travelling |= dict.fromkeys(members, buffer)
            self._num_live += sum(self._parameters[name].num_values for name in members)
            self.num_bytes += num_bytes

    def _arrive(self, name: Use) -> int:
        buffer = self._travelling.pop(name)
        if not buffer.has_arrived:
            buffer.has_arrived = True
            self._whole.update(buffer.members)
            copied = sum(self._parameters[m].num_values * self._parameters[m].value_bytes for m in buffer.members)
            self.num_bytes += copied if buffer.is_copied else copied - buffer.num_bytes
        most = self.num_bytes
        buffer.waiting.discard(name)
        if not buffer.waiting and buffer.is_copied:
            self.num_bytes -= buffer.num_bytes
        return most

    def _drop_from_queue(self, names: set[Use]) -> None:
        dropped: set[Use] = set()
        while self._queue and len(dropped) < len(names):
            name, step = self._queue.popleft()
            self._fetched_for[name] = step
            dropped.add(name)

    def _chosen_ahead(self) -> list[Use]:
        most = min(self._zero.max_live - self._num_live, self._zero.prefetch_bucket)
        chosen: list[Use] = []
        num_values = 0
        while self._queue and num_values < most:
            name, step = self._queue.popleft()
            self._fetched_for[name] = max(self._fetched_for[name], step)
            if not self._is_here(name) and name not in chosen:
                chosen.append(name)
                num_values += self._parameters[name].num_values
        return chosen
