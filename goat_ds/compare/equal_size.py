"""The total rank with which a method trains as many parameters as the reference does."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from goat_ds.errors import ConfigError

LARGEST_R = 4096


class Choice(NamedTuple):
    """A total rank, and the parameters that are trained with it."""

    r: int
    num_trained: int


def nearest(count: Callable[[int], int], candidates: Sequence[int], *, target: int) -> list[Choice]:
    """Return the choices next to a number of parameters, just below it (or equal) and just above it, nearest first.

    Args:
        count: Trained parameters by r, which grow with r; raises ``ConfigError`` where an r does not fit the base.
        candidates: Values of r that the method accepts, rising.
        target: The number of parameters.
    """
    known: dict[int, float] = {}

    def counted(r: int) -> float:
        if r not in known:
            try:
                known[r] = count(r)
            except ConfigError:
                # More directions than a layer has: as good as too many parameters.
                known[r] = math.inf
        return known[r]

    place = bisect_right(candidates, float(target), key=counted)
    beside = [r for r in candidates[max(place - 1, 0) : place + 1] if math.isfinite(counted(r))]
    return sorted((Choice(r, int(counted(r))) for r in beside), key=lambda choice: abs(choice.num_trained - target))


def problem(method: str, reference: str, choices: Sequence[Choice], *, target: int, tolerance: float) -> str | None:
    """Return why no choice is near enough, in words; None where the first one is."""
    if choices and abs(choices[0].num_trained - target) <= tolerance * target:
        return None
    found = ", ".join(f"r {r} has {count:,} ({count / target - 1:+.1%})" for r, count in choices)
    needed = min((abs(count - target) / target for _, count in choices), default=math.inf)
    way_out = f"parameter_tolerance {math.ceil(needed * 100 - 1e-9) / 100:g}, " if needed < 1 else ""
    return (
        f"methods.{method}: no r comes within parameter_tolerance ({tolerance:g}) of the {target:,} trained parameters "
        f"of {reference}: {found or 'none fits the base'}; use {way_out}another num_experts, or budget rank"
    )
