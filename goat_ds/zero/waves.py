"""Deal the layers of a model out to ranks in waves, so that no rank ever holds two whole weights.

A run works by these waves and a plan foretells them: one function, so that the two cannot drift apart.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def cost_of(shape: tuple[int, int], *, decomposes: bool) -> int:
    """Return the cost of a layer's work, in multiplications of a decomposition, or in values where it is only packed.

    Args:
        shape: O and I of its weight.
        decomposes: Whether experts start from the weight's spectrum.
    """
    return shape[0] * shape[1] * (min(shape) if decomposes else 1)


def waves(items: Sequence[T], *, cost: Callable[[T], float], world_size: int) -> Iterator[list[tuple[T, int]]]:
    """Yield items with their ranks: the dearest first, one a rank in a wave, the dearer ones to whoever has done least.

    Args:
        items: What there is to do.
        cost: Returns the cost of an item.
        world_size: Number of ranks.
    """
    by_cost = sorted(items, key=cost, reverse=True)
    done = [0.0] * world_size
    for first in range(0, len(by_cost), world_size):
        idlest = sorted(range(world_size), key=lambda rank: done[rank])
        wave = list(zip(by_cost[first : first + world_size], idlest, strict=False))
        for item, rank in wave:
            done[rank] += cost(item)
        yield wave
