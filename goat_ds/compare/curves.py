"""Curves as SVG: a few lines over two axes, linear or logarithmic, in colours that colour-blind people tell apart."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 46
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#9467bd")
"""Okabe and Ito's, without black and yellow, which pages in one of both schemes do not show."""
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MANY_TIMES = 4.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points that belong to one another, by x."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    dash: int = 0
    is_faint: bool = False
    """One seed of several."""
    has_marks: bool = False


class Axis:
    """Where values lie between two ends."""

    def __init__(self, values: Sequence[float], *, start: float, end: float, is_log: bool) -> None:
        self.is_log = is_log
        low, high = (self._scaled(value) for value in (min(values), max(values)))
        margin = (high - low) * 0.05 or 0.05
        self.low, self.high = low - margin, high + margin
        self._start, self._end = start, end

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def place(self, value: float) -> float:
        """Return where a value is drawn."""
        share = (self._scaled(value) - self.low) / (self.high - self.low)
        return self._start + min(max(share, 0.0), 1.0) * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Return the values that get a label."""
        if not self.is_log:
            step = _round_step((self.high - self.low) / 5)
            return [step * place for place in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
        seen = [tick for tick in ticks if self.low <= math.log10(tick) <= self.high]
        return seen if len(seen) <= 8 else [tick for tick in seen if f"{tick:e}".startswith("1.")]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step)


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_name: str,
    y_name: str,
    log_x: bool = False,
    highest: float = math.inf,
) -> str:
    """Return a picture of some lines.

    Args:
        title: Of the picture.
        lines: With a point or more in all.
        x_name: What x is.
        y_name: What y is; its axis is logarithmic where values are positive and far apart.
        log_x: Whether the axis of x is; then all x must be positive.
        highest: Larger y are drawn at the upper edge, so that they do not flatten all others.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [min(y, highest) for line in lines for _, y in line.points]
    is_log = min(ys) > 0 and max(ys) / min(ys) > MANY_TIMES
    x_axis = Axis(xs, start=LEFT, end=WIDTH - RIGHT, is_log=log_x)
    y_axis = Axis(ys, start=HEIGHT - BOTTOM, end=TOP, is_log=is_log)
    body = [*_frame(title, x_axis, y_axis, x_name, y_name), *(_drawn(line, x_axis, y_axis) for line in lines)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">\n' + "\n".join(body) + "\n</svg>"
    )


def _frame(title: str, x_axis: Axis, y_axis: Axis, x_name: str, y_name: str) -> Iterator[str]:
    yield _text(LEFT, 18, title, kind="title")
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text(LEFT - 6, y + 4, f"{tick:.4g}", kind="soft", anchor="end")
    for tick in x_axis.ticks():
        x = x_axis.place(tick)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        yield _text(x, HEIGHT - BOTTOM + 16, f"{tick:.4g}", kind="soft", anchor="middle")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_name, kind="soft", anchor="middle")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield (
        f'<text class="soft" text-anchor="middle" transform="translate(14 {middle:.1f}) rotate(-90)">'
        f"{escape(y_name)}</text>"
    )


def _drawn(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in line.points]
    colour = COLOURS[line.colour % len(COLOURS)]
    dash = f' stroke-dasharray="{DASHES[line.dash % len(DASHES)]}"' if line.dash % len(DASHES) else ""
    faint = ' opacity="0.45"' if line.is_faint else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places)
    has_marks = line.has_marks or len(places) == 1
    width = 1 if line.is_faint else 2
    drawn = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>'
    return f"<g{faint}><title>{escape(line.name)}</title>{drawn}{marks if has_marks else ''}</g>"


def intervals(title: str, rows: Sequence[tuple[str, int, float, float | None, float | None]], *, x_name: str) -> str:
    """Return a picture of means and their intervals, one below the other, beside a line at 0.

    Args:
        title: Of the picture.
        rows: Name, colour, mean, and both ends of the interval, None where there is none.
        x_name: What the numbers are.
    """
    ends = [end for _, _, mean, low, high in rows for end in (mean, low, high) if end is not None]
    left, bottom = 170, TOP + 30 * len(rows) + 6
    axis = Axis([0.0, *ends], start=left, end=WIDTH - RIGHT, is_log=False)
    body = [_text(16, 18, title, kind="title")]
    for tick in axis.ticks():
        x, kind = axis.place(tick), "zero" if abs(tick) < 1e-12 else "grid"
        body.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        body.append(_text(x, bottom + 16, f"{tick:.3g}", kind="soft", anchor="middle"))
    for place, (name, number, mean, low, high) in enumerate(rows):
        y, colour = TOP + 20 + 30 * place, COLOURS[number % len(COLOURS)]
        body.append(_text(left - 10, y + 4, name, anchor="end"))
        if low is not None and high is not None:
            x1, x2 = axis.place(low), axis.place(high)
            body.append(f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"/>')
        body.append(f'<circle cx="{axis.place(mean):.1f}" cy="{y}" r="5" fill="{colour}"/>')
    body.append(_text((left + WIDTH - RIGHT) / 2, bottom + 34, x_name, kind="soft", anchor="middle"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 44}" role="img" '
        f'aria-label="{escape(title)}">\n' + "\n".join(body) + "\n</svg>"
    )


def _text(x: float, y: float, words: str, *, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
