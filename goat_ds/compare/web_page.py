"""compare.html: the verdict, the table and the curves of a comparison in one file that fetches nothing."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from goat_ds.compare.curves import COLOURS, Line, chart, intervals
from goat_ds.compare.search import Search
from goat_ds.compare.standings import Standing, Standings
from goat_ds.compare.table import cells
from goat_ds.compare.verdict import sentences

STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --soft: #57606a; --line: #d0d7de; --paper: #ffffff }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif } svg text { fill: var(--ink) }
svg .title { font-weight: 600 }
svg .soft { fill: var(--soft) } svg .grid { stroke: var(--line) } svg .zero { stroke: var(--ink) }
.legend span { display: inline-block; width: 1rem; height: .25rem; margin: 0 .4rem .2rem 1rem; vertical-align: middle }
.soft { color: var(--soft) }
"""
SO_MANY_TIMES_THE_BEST = 25.0
"""A loss that is further from the best is drawn at the edge: a rate far too high would flatten all others."""


def page_of(search: Search, found: Standings) -> str:
    """Return the page of a comparison."""
    settings = search.settings
    colours = {method.name: number for number, method in enumerate(settings.methods)}
    parts = [
        "<h1>Which method is best on these data?</h1>",
        f'<p class="soft">{escape(_subject(found))}</p>',
        f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences(found))}</ul>",
        _table(cells(found)),
        _legend(colours),
        f'<div class="charts">{"".join(_differences(found, colours))}</div>',
        "<h2>Learning rate against held-out loss</h2>",
        '<p class="soft">Every run of a stage trains for the same steps, with a schedule of that length. Dashes tell '
        "the values of a grid apart; a point at the upper edge lies beyond it, and diverged runs are not drawn.</p>",
        f'<div class="charts">{"".join(_rates(search, colours))}</div>',
        "<h2>Loss over steps in the final</h2>",
        '<p class="soft">Faint: one seed. Strong: their mean.</p>',
        f'<div class="charts">{"".join(_losses(found, colours))}</div>',
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Comparison</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _subject(found: Standings) -> str:
    rows = [row for standing in found.standings for row in standing.rows.values()]
    if not rows:
        return "No run of the final has ended well."
    settings = rows[0]["settings"]
    devices = "; ".join(dict.fromkeys(str(row["device"]) for row in rows))
    versions = ", ".join(f"{name} {number}" for name, number in rows[0]["versions"].items())
    data = ", ".join(settings["data"] or ["the embedded demo"])
    return (
        f"{settings['model'] or 'the embedded demo'} on {data}. {len(rows)} runs in the final. {devices}. {versions}."
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in others]
    return f"<table>{''.join(lines)}</table>"


def _legend(colours: Mapping[str, int]) -> str:
    names = (
        f'<span style="background:{COLOURS[number % len(COLOURS)]}"></span>{escape(name)}'
        for name, number in colours.items()
    )
    return f'<p class="legend">{"".join(names)}</p>'


def _differences(found: Standings, colours: Mapping[str, int]) -> Iterator[str]:
    rows = [
        (name, colours[name], difference.paired.mean, difference.paired.low, difference.paired.high)
        for name, difference in found.to_reference.items()
    ]
    if rows:
        title = f"Held-out loss less that of {found.settings.reference}, with 95 % intervals"
        yield intervals(title, rows, x_name="left of 0: better than the reference")


def _rates(search: Search, colours: Mapping[str, int]) -> Iterator[str]:
    """Yield a chart for every stage: the mean loss over seeds against the rate."""
    losses: dict[tuple[str, int], dict[tuple[str, Any], dict[float, list[float]]]] = {}
    for trial, outcome in search.outcomes.items():
        of_stage = losses.setdefault((trial.stage, trial.steps), {})
        of_method = of_stage.setdefault((trial.method, trial.point.grid), defaultdict(list))
        of_method[trial.point.rate].append(outcome.loss)
    for (stage, steps), by_method in losses.items():
        lines = list(_rate_lines(by_method, colours))
        # Where every method has one rate, the table says more.
        if any(len(line.points) > 1 for line in lines):
            highest = SO_MANY_TIMES_THE_BEST * min(loss for line in lines for _, loss in line.points)
            title = f"{stage}: {steps} steps"
            yield chart(title, lines, x_name="learning rate", y_name="held-out loss", log_x=True, highest=highest)


def _rate_lines(
    by_method: Mapping[tuple[str, Any], Mapping[float, Sequence[float]]], colours: Mapping[str, int]
) -> Iterator[Line]:
    num_grids: dict[str, int] = defaultdict(int)
    for (name, grid), by_rate in by_method.items():
        means = [(rate, sum(each) / len(each)) for rate, each in sorted(by_rate.items())]
        points = [(rate, mean) for rate, mean in means if math.isfinite(mean)]
        dash, num_grids[name] = num_grids[name], num_grids[name] + 1
        if points:
            named = " ".join([name, *(f"{flag} {value}" for flag, value in grid)])
            yield Line(name=named, colour=colours[name], points=points, dash=dash, has_marks=True)


def _losses(found: Standings, colours: Mapping[str, int]) -> Iterator[str]:
    for key, title in (("curve", "held-out loss"), ("train_curve", "training loss")):
        lines = [line for standing in found.standings for line in _loss_lines(standing, key, colours[standing.method])]
        # One evaluation, at the end, is no curve: the table has its number.
        if any(len(line.points) > 1 for line in lines):
            yield chart(title, lines, x_name="step", y_name=title)


def _loss_lines(standing: Standing, key: str, colour: int) -> Iterator[Line]:
    by_step: dict[int, list[float]] = defaultdict(list)
    for seed in standing.losses:
        curve = standing.rows[seed][key]
        for step, loss in curve:
            by_step[step].append(loss)
        if curve:
            name = f"{standing.method}, seed {seed}"
            yield Line(name=name, colour=colour, points=[(step, loss) for step, loss in curve], is_faint=True)
    means = [
        (step, sum(each) / len(each)) for step, each in sorted(by_step.items()) if len(each) == len(standing.losses)
    ]
    if means:
        yield Line(name=standing.method, colour=colour, points=means)
