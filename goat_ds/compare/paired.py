"""What pairs of runs say: two methods with the same seed see the same batches, so their difference has less noise.

Losses are held-out, so lower is better; a difference is *ours* minus *theirs*.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats

LEVEL = 0.05
"""Chance, over all comparisons, to call two methods different that are not."""
POWER = 0.8
"""Chance to see a difference that is there, by which the number of seeds is estimated."""
MOST_PAIRS = 1000


class Spread(NamedTuple):
    """Mean and standard deviation of a sample; None: one value has no deviation."""

    mean: float
    deviation: float | None


class Paired(NamedTuple):
    """A mean difference over pairs."""

    mean: float
    deviation: float | None
    """Of the differences."""
    low: float | None
    """Of the 95 % interval of the mean (Student's t); None where one pair has none."""
    high: float | None
    p: float | None
    """Of the two-sided t test that the mean is 0."""
    num_pairs: int
    num_wins: int
    """Pairs in which ours is lower."""

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def spread(values: Sequence[float]) -> Spread:
    """Return the mean of a sample and its standard deviation, with ``n - 1``."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Spread(mean, None)
    return Spread(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Paired | None:
    """Return the mean difference over the seeds that both have; None where they have none in common."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean, deviation = spread(differences)
    wins = sum(difference < 0 for difference in differences)
    if deviation is None:
        return Paired(mean, None, None, None, None, 1, wins)
    freedom = len(seeds) - 1
    error = deviation / math.sqrt(len(seeds))
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    # Without a deviation every pair differs by the same: by nothing, or without any noise.
    distance = abs(mean) / error if error else math.inf if mean else 0.0
    p = float(2 * stats.t.sf(distance, freedom))
    return Paired(mean, deviation, mean - half, mean + half, p, len(seeds), wins)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979): each is compared with ``LEVEL`` as if it were alone."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def pairs_needed(mean: float, deviation: float) -> int | None:
    """Return the pairs with which a t test sees a difference of this size in ``POWER`` of all cases.

    Returns:
        None where more than ``MOST_PAIRS`` would not suffice.
    """
    if not mean:
        return None
    return next((n for n in range(2, MOST_PAIRS + 1) if power_of(mean, deviation, n) >= POWER), None)


def power_of(mean: float, deviation: float, num_pairs: int) -> float:
    """Return the chance that a two-sided t test at ``LEVEL`` sees a mean difference in so many pairs."""
    if not deviation:
        return 1.0
    freedom, shift = num_pairs - 1, abs(mean) / deviation * math.sqrt(num_pairs)
    # In steps of the deviation, so that a large shift, which the noncentral distribution does not compute, is certain.
    edge = float(stats.t.ppf(1 - LEVEL / 2, freedom))
    if shift > 10 * edge + 10:
        return 1.0
    return float(stats.nct.sf(edge, freedom, shift) + stats.nct.cdf(-edge, freedom, shift))
