"""Draw what ``make demo`` has measured, for the README: docs/demo.svg, and its numbers in docs/demo.json.

    make demo | tee demo.txt
    python tools/draw_demo.py --printed demo.txt --metrics runs/make-demo-1/run/metrics.jsonl

The left half is the loss of every step, on a logarithmic scale. The right half is the share of right answers, and one
question with the answers before and after.
"""

import argparse
import ast
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any
from xml.sax.saxutils import escape

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, HEIGHT = 860, 320
LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 56, 52, 360, 212
BARS, BAR_WIDTH = 484, 320

# Colours of both schemes: the page that shows the picture may be dark.
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600 } .small { font-size: 11px }
.soft { fill: #57606a } .grid { stroke: #d0d7de } .curve { stroke: #0969da; fill: none; stroke-width: 2 }
.bar { fill: #0969da } .track { fill: #eaeef2 } .paper { fill: #ffffff }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .soft { fill: #9198a1 } .grid { stroke: #3d444d } .curve { stroke: #4493f8 }
.bar { fill: #4493f8 } .track { fill: #2a313c } .paper { fill: #0d1117 } }
"""


def numbers(printed: str, metrics: str) -> dict[str, Any]:
    """Return what the picture shows, from what the demo printed and from the metrics.jsonl of its run."""
    answers = [
        tuple(map(ast.literal_eval, match))
        for match in re.findall(r"^  ('.*'|\".*\"): ('.*'|\".*\") \(expected ('.*'|\".*\")\)$", printed, re.MULTILINE)
    ]
    before, after = re.findall(r"^exact match ([\d.]+)% of (\d+)$", printed, re.MULTILINE)
    logged = [json.loads(line) for line in metrics.splitlines()]
    # The same questions are asked in the same order before and after. An answer says more than an empty one.
    pairs = list(zip(answers[: len(answers) // 2], answers[len(answers) // 2 :], strict=True))
    (question, given, expected), (_, given_after, _) = next((pair for pair in pairs if pair[0][1]), pairs[0])
    return {
        "losses": [[line["step"], line["loss"]] for line in logged if "loss" in line],
        "num_questions": int(before[1]),
        "exact_match": [float(before[0]), float(after[0])],
        "question": {"asked": question, "before": given, "after": given_after, "expected": expected},
    }


def draw(shown: dict[str, Any]) -> str:
    """Return the picture of some numbers as SVG."""
    body = "\n".join([*_curve(shown["losses"]), *_answers(shown)])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img">\n<style>{STYLE}</style>\n<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="8"/>\n'
        f"{body}\n</svg>\n"
    )


def _curve(losses: Sequence[Sequence[float]]) -> Iterator[str]:
    steps = [step for step, _ in losses]
    exponents = [math.log10(loss) for _, loss in losses]
    lowest, highest = math.floor(min(exponents)), math.ceil(max(exponents))

    def x_of(step: float) -> float:
        return LEFT + PLOT_WIDTH * (step - steps[0]) / (steps[-1] - steps[0])

    def y_of(exponent: float) -> float:
        return TOP + PLOT_HEIGHT * (highest - exponent) / (highest - lowest)

    yield _text(LEFT, 28, f"loss of each of {len(losses)} steps", kind="title")
    for exponent in range(lowest, highest + 1):
        y = y_of(exponent)
        yield f'<line class="grid" x1="{LEFT}" x2="{LEFT + PLOT_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text(LEFT - 8, y + 4, f"{10.0**exponent:g}", kind="small soft", anchor="end")
    for step in (steps[0], steps[len(steps) // 2], steps[-1]):
        yield _text(x_of(step), TOP + PLOT_HEIGHT + 20, f"step {step}", kind="small soft", anchor="middle")
    points = " ".join(f"{x_of(step):.1f},{y_of(e):.1f}" for step, e in zip(steps, exponents, strict=True))
    yield f'<polyline class="curve" points="{points}"/>'


def _answers(shown: dict[str, Any]) -> Iterator[str]:
    yield _text(BARS, 28, f"{shown['num_questions']} new questions, answered to the letter", kind="title")
    for row, (name, share) in enumerate(zip(("before", "after"), shown["exact_match"], strict=True)):
        y = TOP + 10 + 52 * row
        yield _text(BARS, y, f"{name}: {share:.1f} %")
        yield f'<rect class="track" x="{BARS}" y="{y + 8}" width="{BAR_WIDTH}" height="14" rx="3"/>'
        yield f'<rect class="bar" x="{BARS}" y="{y + 8}" width="{BAR_WIDTH * share / 100:.1f}" height="14" rx="3"/>'
    asked = shown["question"]
    lines = [asked["asked"], f"before: {asked['before']}", f"after: {asked['after']}"]
    for row, line in enumerate(lines):
        yield _text(BARS, TOP + 134 + 22 * row, shorten(line, 52, placeholder="…"), kind="" if row else "title")
    how = "make demo, ZeRO-3 on 2 CPU ranks, in bf16"
    yield _text(BARS, TOP + PLOT_HEIGHT + 20, how, kind="small soft")


def _text(x: float, y: float, words: str, *, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def main() -> None:
    """Write the numbers of a demo, if one is given, and draw them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--printed", type=Path, help="what make demo printed; docs/demo.json is drawn by default")
    parser.add_argument("--metrics", type=Path, help="metrics.jsonl of its run")
    args = parser.parse_args()
    if (args.printed is None) != (args.metrics is None):
        parser.error("give both --printed and --metrics, or neither")
    if args.printed is not None:
        shown = numbers(args.printed.read_text(), args.metrics.read_text())
        (DOCS / "demo.json").write_text(json.dumps(shown, indent=1) + "\n")
    (DOCS / "demo.svg").write_text(draw(json.loads((DOCS / "demo.json").read_text())))


if __name__ == "__main__":
    main()
