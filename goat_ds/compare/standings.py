"""What the final runs say of every method: its rate, its losses over seeds, and its differences to the others."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from goat_ds.compare.compare_file import CompareSettings, Point
from goat_ds.compare.paired import LEVEL, Paired, Spread, holm, paired_difference, spread
from goat_ds.compare.preparation import Sizes
from goat_ds.compare.search import Outcome, Search
from goat_ds.compare.trials import FINAL, Trial


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A method in the final."""

    method: str
    point: Point
    """The best of its finalists."""
    num_finalists: int
    num_tried: int
    """Points of the method that had a run."""
    at_edge: bool
    """Whether no rate beyond its own was tried."""
    only_rate: bool
    """Whether one rate is all that was tried."""
    losses: Mapping[int, float]
    """Held-out, after the last step, by seed; without runs that did not end well."""
    num_bad: int
    """Runs of the final that diverged or failed."""
    num_trained: int
    r: int | None
    """That was chosen to match the reference."""
    rows: Mapping[int, Mapping[str, Any]]
    """Lines of results.jsonl by seed."""

    @property
    def spread(self) -> Spread:
        """Over seeds."""
        return spread(list(self.losses.values()))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two methods on the same seeds."""

    ours: str
    theirs: str
    paired: Paired
    p_holm: float | None
    """Corrected for the comparisons that were made with it; None where one pair has no p."""

    @property
    def is_seen(self) -> bool:
        """Whether the data tell the two apart, after the correction."""
        return self.p_holm is not None and self.p_holm < LEVEL


@dataclass(frozen=True, kw_only=True)
class Standings:
    """A whole comparison, as far as its runs are done."""

    settings: CompareSettings
    standings: tuple[Standing, ...]
    """Lowest mean first."""
    to_reference: Mapping[str, Difference]
    """By method; corrected for their number."""
    pairs: tuple[Difference, ...]
    """All pairs of methods, the better first; corrected for their number."""
    absent: tuple[str, ...]
    """Methods without a run of the final that ended well."""
    num_missing: int
    """Runs that are still to be done."""
    tuning: Mapping[str, int]
    """Points of every method that had a run."""

    def of(self, method: str) -> Standing | None:
        """Return a method's standing, None where it has none."""
        return next((standing for standing in self.standings if standing.method == method), None)

    def between(self, one: str, other: str) -> Difference | None:
        """Return how two methods differ, whichever is better."""
        return next((pair for pair in self.pairs if {pair.ours, pair.theirs} == {one, other}), None)


def standings_of(search: Search, sizes: Sizes) -> Standings:
    """Return what a search has found."""
    settings = search.settings
    found = [standing for method in settings.methods if (standing := _standing(search, sizes, method.name))]
    # As a finalist is chosen: a mean of fewer seeds says less, and leaves out where the method failed.
    found.sort(key=lambda standing: (standing.num_bad, standing.spread.mean))
    reference = next((standing for standing in found if standing.method == settings.reference), None)
    others = [] if reference is None else [(each, reference) for each in found if each is not reference]
    return Standings(
        settings=settings,
        standings=tuple(found),
        to_reference={difference.ours: difference for difference in _differences(others)},
        pairs=tuple(_differences(list(itertools.combinations(found, 2)))),
        absent=tuple(m.name for m in settings.methods if m.name not in {standing.method for standing in found}),
        num_missing=search.num_missing,
        tuning={m.name: len({t.point for t in search.outcomes if t.method == m.name}) for m in settings.methods},
    )


def _standing(search: Search, sizes: Sizes, name: str) -> Standing | None:
    """Return the standing of a method's best finalist: most runs that ended well, then the lowest mean."""
    by_point = {point: _final_outcomes(search, name, point) for point in search.finalists.get(name, [])}
    losses = {point: _finite(outcomes) for point, outcomes in by_point.items()}
    in_it = [point for point in losses if losses[point]]
    if not in_it:
        return None
    point = min(in_it, key=lambda each: (-len(losses[each]), spread(list(losses[each].values())).mean))
    size = sizes[name, point.grid]
    method = search.settings.method(name)
    return Standing(
        method=name,
        point=point,
        num_finalists=len(by_point),
        num_tried=len({trial.point for trial in search.outcomes if trial.method == name}),
        at_edge=search.at_edge(method, point),
        only_rate=len({each.rate for each in search.tried[name]}) == 1,
        losses=losses[point],
        num_bad=len(by_point[point]) - len(losses[point]),
        num_trained=size.num_trained,
        r=size.r,
        rows={seed: outcome.row for seed, outcome in by_point[point].items()},
    )


def _final_outcomes(search: Search, name: str, point: Point) -> dict[int, Outcome]:
    final = search.settings.final
    trials = (Trial(name, point, FINAL, final.steps, seed) for seed in final.seeds)
    return {trial.seed: search.outcomes[trial] for trial in trials if trial in search.outcomes}


def _finite(outcomes: Mapping[int, Outcome]) -> dict[int, float]:
    return {seed: outcome.loss for seed, outcome in outcomes.items() if math.isfinite(outcome.loss)}


def _differences(pairs: list[tuple[Standing, Standing]]) -> list[Difference]:
    """Return the differences of pairs of methods, corrected for how many of them there are."""
    found = [(ours, theirs, paired_difference(ours.losses, theirs.losses)) for ours, theirs in pairs]
    known = [(ours, theirs, paired) for ours, theirs, paired in found if paired is not None]
    adjusted = iter(holm([paired.p for _, _, paired in known if paired.p is not None]))
    return [
        Difference(
            ours=ours.method,
            theirs=theirs.method,
            paired=paired,
            p_holm=None if paired.p is None else next(adjusted),
        )
        for ours, theirs, paired in known
    ]
