"""Which trials are run, in which order: rates by successive halving, then the same seeds for those that are left.

What runs a trial, or only looks it up, is given: a function from trials to outcomes.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from goat_ds.compare.compare_file import CompareSettings, Entrant, Point, rounded
from goat_ds.compare.results import FAILED
from goat_ds.compare.trials import FINAL, Trial
from goat_ds.errors import TrainingError

logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """How a trial ended."""

    loss: float
    """Held-out, after the last step; infinite where the run diverged or failed."""
    row: Mapping[str, Any]
    """Its line of results.jsonl."""


RunAll = Callable[[Sequence[Trial]], Mapping[Trial, Outcome]]
"""Runs trials; what it does not return has not been run."""


class NotRun(Exception):
    """Trials that the rest of the search depends on have no outcome yet."""


class Search:
    """One comparison's trials and their outcomes, as far as it has come."""

    def __init__(self, settings: CompareSettings, run_all: RunAll) -> None:
        self.settings, self._run_all = settings, run_all
        self.outcomes: dict[Trial, Outcome] = {}
        self.tried: dict[str, list[Point]] = {method.name: method.points for method in settings.methods}
        """Points of every method, those beyond its grid among them."""
        self.finalists: dict[str, list[Point]] = {}
        """Points of every method that are judged in the final; none where no run of its last rung ended well."""
        self.num_missing = 0
        """Trials that the search stopped at because they have no outcome."""
        self._num_extensions = dict.fromkeys(self.tried, 0)

    def run(self) -> None:
        """Go as far as outcomes come.

        Raises:
            TrainingError: no run of a stage ended well.
        """
        try:
            self.finalists = self._screened()
            self._final()
        except NotRun:
            logger.info(f"{self.num_missing} runs have no result yet")

    def at_edge(self, method: Entrant, point: Point) -> bool:
        """Whether no rate beyond a point's, on one side, was tried with its values of the grid."""
        rates = self._rates_beside(method.name, point)
        return len(rates) > 1 and point.rate in (rates[0], rates[-1])

    def score(self, method: str, point: Point, stage: str, steps: int, seeds: Sequence[int]) -> float:
        """Return the mean held-out loss of a point over seeds; infinite where one of its runs did not end well."""
        losses = [self.outcomes[Trial(method, point, stage, steps, seed)].loss for seed in seeds]
        return sum(losses) / len(losses)

    # -- the screen

    def _screened(self) -> dict[str, list[Point]]:
        """Return the points of every method that go on to the final, best first."""
        settings, screen = self.settings, self.settings.screen
        alive = {name: list(points) for name, points in self.tried.items()}
        if screen is None:
            return alive
        for rung in range(screen.halvings + 1):
            self._run_rung(rung, alive)
            if settings.extend_edges:
                self._extend(rung, alive)
            for name, points in alive.items():
                kept = screen.keep if rung == screen.halvings else max(screen.keep, math.ceil(len(points) / 2))
                alive[name] = self._best(name, points, rung)[:kept]
            self._check_any(alive, f"rung {rung}")
        return alive

    def _run_rung(self, rung: int, points: Mapping[str, Sequence[Point]]) -> None:
        """Train every point for the steps of a rung, from the start.

        Its schedule is that of its own length: a longer run is not a shorter one that goes on, because by the end of
        the shorter one the learning rate is 0. To be judged half-way down its schedule would favour low rates.
        """
        screen = self.settings.screen
        assert screen is not None
        self._ask(
            Trial(name, point, f"rung {rung}", screen.steps_of(rung), seed)
            for name, listed in points.items()
            for point, seed in itertools.product(listed, screen.seeds)
        )

    def _best(self, name: str, points: Sequence[Point], rung: int) -> list[Point]:
        """Return the points of a method whose runs ended well, best first."""
        scores = {point: self._score_of_rung(name, point, rung) for point in points}
        return sorted((point for point in points if math.isfinite(scores[point])), key=scores.__getitem__)

    def _score_of_rung(self, name: str, point: Point, rung: int) -> float:
        screen = self.settings.screen
        assert screen is not None
        return self.score(name, point, f"rung {rung}", screen.steps_of(rung), screen.seeds)

    def _extend(self, rung: int, alive: dict[str, list[Point]]) -> None:
        """Try rates beyond the grid for as long as the best one is at its edge, up to a bound."""
        while beyond := dict(self._beyond(rung, alive)):
            self._run_rung(rung, {name: [point] for name, point in beyond.items()})
            for name, point in beyond.items():
                alive[name].append(point)
                self.tried[name].append(point)
                self._num_extensions[name] += 1

    def _beyond(self, rung: int, alive: Mapping[str, Sequence[Point]]) -> Iterator[tuple[str, Point]]:
        for name, points in alive.items():
            best = self._best(name, points, rung)
            if best and self._num_extensions[name] < self.settings.max_extensions:
                rates = self._rates_beside(name, best[0])
                if (rate := rate_beyond(rates, best[0].rate)) is not None:
                    yield name, Point(rate, best[0].grid)

    def _rates_beside(self, name: str, point: Point) -> list[float]:
        return sorted(each.rate for each in self.tried[name] if each.grid == point.grid)

    # -- the final

    def _final(self) -> None:
        final = self.settings.final
        self._ask(
            # Seed by seed: what is there when a long comparison is looked at half-way can be compared.
            Trial(name, point, FINAL, final.steps, seed)
            for seed in final.seeds
            for name, points in self.finalists.items()
            for point in points
        )

    def _ask(self, trials: Iterator[Trial]) -> None:
        asked = list(trials)
        self.outcomes |= self._run_all(asked)
        self.num_missing = sum(trial not in self.outcomes for trial in asked)
        if self.num_missing:
            raise NotRun
        rows = [outcome.row for trial, outcome in self.outcomes.items() if trial.stage == asked[0].stage]
        if all(row["status"] == FAILED for row in rows):
            raise TrainingError(f"every run of {asked[0].stage} failed; {rows[0]['id']}: {rows[0]['error']}")

    def _check_any(self, alive: Mapping[str, Sequence[Point]], stage: str) -> None:
        for name, points in alive.items():
            if not points:
                logger.warning(f"{name}: no run of {stage} ended with a finite loss; it is not in the final")
        if not any(alive.values()):
            raise TrainingError(f"no run of {stage} ended with a finite loss; use lower rates")


def rate_beyond(rates: Sequence[float], best: float) -> float | None:
    """Return the next rate beyond the edge that the best rate is at, by the ratio of the two there.

    Args:
        rates: That were tried, rising.
        best: One of them.

    Returns:
        None where the best rate has others on both sides, or where it is the only one, which nobody asked to vary.
    """
    if len(rates) < 2:
        return None
    if best == rates[0]:
        return rounded(rates[0] ** 2 / rates[1])
    if best == rates[-1]:
        return rounded(rates[-1] ** 2 / rates[-2])
    return None


class Count(NamedTuple):
    """Runs of a stage and their steps."""

    stage: str
    num_runs: int
    steps: int
    """Of one run."""


def planned(settings: CompareSettings) -> list[Count]:
    """Count what a comparison will run, without rates beyond the grids."""
    counts: list[Count] = []
    points = {method.name: len(method.points) for method in settings.methods}
    if screen := settings.screen:
        for rung in range(screen.halvings + 1):
            counts.append(Count(f"rung {rung}", sum(points.values()) * len(screen.seeds), screen.steps_of(rung)))
            is_last = rung == screen.halvings
            points = {
                name: min(n, screen.keep if is_last else max(screen.keep, math.ceil(n / 2)))
                for name, n in points.items()
            }
    counts.append(Count(FINAL, sum(points.values()) * len(settings.final.seeds), settings.final.steps))
    return counts
