"""How many runs a comparison has, how many steps and tokens, and how long they take, before any is started."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from goat_ds.compare.compare_file import CompareSettings
from goat_ds.compare.preparation import Sizes, num_base_values, shared_config
from goat_ds.compare.results import FINISHED
from goat_ds.compare.search import planned

FLOP_A_VALUE = 4
"""Of a frozen weight, a token: 2 forward, 2 for the gradient of its input; experts and attention come on top."""


def lines(
    settings: CompareSettings, sizes: Sizes, rows: Sequence[Mapping[str, Any]], *, num_workers: int
) -> Iterator[str]:
    """Yield what a comparison will take.

    Args:
        settings: Of the comparison.
        sizes: Of its methods.
        rows: Of the runs that are done.
        num_workers: Runs side by side.
    """
    config = shared_config(settings)
    counts = planned(settings)
    for count in counts:
        yield f"{count.stage}: {count.num_runs} runs of {count.steps:,} steps"
    if settings.screen is not None and settings.extend_edges:
        bound = settings.max_extensions * len(settings.methods) * len(settings.screen.seeds)
        yield f"and at most {bound} runs more, of rates beyond the grids, where the best one is at an edge"
    num_runs, num_steps = sum(c.num_runs for c in counts), sum(c.num_runs * c.steps for c in counts)
    tokens = num_steps * config.packs_per_step(1) * config.max_length
    yield f"together: {num_runs} runs, {num_steps:,} steps, at most {tokens:,} tokens; {num_workers} side by side"
    for (name, grid), size in sizes.items():
        shown = "".join(f", {flag} {value}" for flag, value in grid)
        chosen = "" if size.r is None else f", r {size.r} chosen"
        yield f"{name}{shown}: {size.num_trained:,} trained parameters{chosen}"
    done = [row for row in rows if row["status"] == FINISHED]
    if done:
        a_step = median(row["train_seconds"] / row["steps"] for row in done)
        a_run = median(row["wall_seconds"] - row["train_seconds"] for row in done)
        hours = (num_runs * max(a_run, 0.0) + num_steps * a_step) / num_workers / 3600
        yield f"time: about {_hours(hours)} for all of it, by the {len(done)} runs that are done"
        return
    flop = FLOP_A_VALUE * num_base_values(config) * tokens
    yield (
        f"time: not known before a run is done; the base alone takes {flop:.1e} floating-point operations, "
        f"{_hours(flop / 1e14 / 3600 / num_workers)} at 100 TFLOP/s a worker, and every run its start"
    )


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1g} min" if hours * 60 < 1 else f"{60 * hours:.0f} min"
