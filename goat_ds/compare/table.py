"""The standings as a table, and as summary.json."""

from collections.abc import Iterator
from typing import Any

from goat_ds.compare.paired import LEVEL
from goat_ds.compare.standings import Difference, Standing, Standings
from goat_ds.compare.verdict import sentences

HEAD = (
    *("method", "learning rate", "seeds", "held-out loss", "deviation", "to {}", "95 % interval", "p (Holm)", "wins"),
    "trained parameters",
)


def cells(found: Standings) -> list[list[str]]:
    """Return the rows of the table, its head first, the lowest mean next."""
    reference = found.settings.reference
    head = [cell.format(reference) for cell in HEAD]
    return [head, *(_row(standing, found.to_reference.get(standing.method)) for standing in found.standings)]


def _row(standing: Standing, difference: Difference | None) -> list[str]:
    mean, deviation = standing.spread
    edge = " (at the edge)" if standing.at_edge else ""
    return [
        standing.method,
        f"{standing.point}{edge}",
        str(len(standing.losses)),
        f"{mean:.4f}",
        "-" if deviation is None else f"{deviation:.4f}",
        *_to_reference(difference),
        f"{standing.num_trained:,}",
    ]


def _to_reference(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["-"] * 4
    paired = difference.paired
    return [
        f"{paired.mean:+.4f}",
        "-" if paired.low is None else f"{paired.low:+.4f} to {paired.high:+.4f}",
        "-" if difference.p_holm is None else f"{difference.p_holm:.3g}",
        f"{paired.num_wins} of {paired.num_pairs}",
    ]


def as_markdown(found: Standings) -> str:
    """Return table.md: the table, and the verdict below it."""
    head, *rows = cells(found)
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in sentences(found))]) + "\n"


def as_text(found: Standings) -> Iterator[str]:
    """Yield the lines of the table with columns of equal width, and of the verdict."""
    rows = cells(found)
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
    yield from sentences(found)


def as_summary(found: Standings) -> dict[str, Any]:
    """Return summary.json: the numbers of the table and every pair of methods."""
    return {
        "reference": found.settings.reference,
        "budget": str(found.settings.budget),
        "final": {"steps": found.settings.final.steps, "seeds": list(found.settings.final.seeds)},
        "level": LEVEL,
        "num_missing": found.num_missing,
        "tuning": dict(found.tuning),
        "methods": [_summary(standing) for standing in found.standings],
        "absent": list(found.absent),
        "to_reference": [_pair(difference) for difference in found.to_reference.values()],
        "pairs": [_pair(difference) for difference in found.pairs],
        "verdict": list(sentences(found)),
    }


def _summary(standing: Standing) -> dict[str, Any]:
    mean, deviation = standing.spread
    return {
        "method": standing.method,
        "learning_rate": standing.point.rate,
        "grid": dict(standing.point.grid),
        "at_edge": standing.at_edge,
        "losses": {str(seed): loss for seed, loss in standing.losses.items()},
        "mean": mean,
        "deviation": deviation,
        "trained_parameters": standing.num_trained,
        "chosen_r": standing.r,
        "runs": {str(seed): row["id"] for seed, row in standing.rows.items()},
    }


def _pair(difference: Difference) -> dict[str, Any]:
    numbers = difference.paired._asdict()
    return {"ours": difference.ours, "theirs": difference.theirs, **numbers, "p_holm": difference.p_holm}
