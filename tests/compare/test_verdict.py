"""Standings, table, words and page, from final losses that are given."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from goat_ds.compare.compare_file import Point
from goat_ds.compare.curves import Line, chart, intervals
from goat_ds.compare.paired import holm, paired_difference
from goat_ds.compare.report_files import write_reports
from goat_ds.compare.search import Outcome, Search
from goat_ds.compare.standings import Standings, standings_of
from goat_ds.compare.table import as_markdown, as_text, cells
from goat_ds.compare.trials import FINAL, Trial
from goat_ds.compare.verdict import sentences
from tests.compare.helpers import TINY, outcome, read, sizes_of

METHODS = {name: TINY["methods"]["lora"] for name in ("lora", "dora", "goat")}
LORA = [1.0, 1.2, 1.1, 1.3, 1.0]
APART = [0.5, 0.7, 0.6, 0.8, 0.52]
LEVEL = [1.05, 1.15, 1.2, 1.2, 1.04]


def searched(folder: Path, final: Mapping[str, Sequence[float]], **changes: Any) -> Search:
    """Return a search whose finals have given losses by seed; nan: that run failed."""
    methods = {name: METHODS[name] for name in final}
    seeds = list(range(1, 1 + max(map(len, final.values()))))
    changes = {"methods": methods, "final": {"steps": 4, "seeds": seeds}} | changes

    def run_all(trials: Sequence[Trial]) -> dict[Trial, Outcome]:
        return {trial: of(trial) for trial in trials if trial.stage != FINAL or trial.seed <= len(final[trial.method])}

    def of(trial: Trial) -> Outcome:
        # The rate 0.002 is the better one.
        loss = final[trial.method][trial.seed - 1] if trial.stage == FINAL else trial.point.rate**-1
        status = {"status": "failed", "error": "lost"} if math.isnan(loss) else {}
        return outcome(trial, math.inf if math.isnan(loss) else loss, **status)

    search = Search(read(folder, **changes), run_all)
    search.run()
    return search


def standings(folder: Path, final: Mapping[str, Sequence[float]], **changes: Any) -> Standings:
    search = searched(folder, final, **changes)
    return standings_of(search, sizes_of(search.settings))


def said(folder: Path, final: Mapping[str, Sequence[float]], **changes: Any) -> str:
    return "\n".join(sentences(standings(folder, final, **changes)))


# -- what is computed


def test_standings_are_paired_by_seed_and_corrected_for_their_number(tmp_path: Path) -> None:
    found = standings(tmp_path, {"lora": LORA, "dora": LEVEL, "goat": APART})
    assert [standing.method for standing in found.standings] == ["goat", "lora", "dora"]
    judges = {
        name: paired_difference(dict(enumerate(losses)), dict(enumerate(LORA)))
        for name, losses in (("goat", APART), ("dora", LEVEL))
    }
    p_values = [judge.p for judge in judges.values() if judge is not None and judge.p is not None]
    for (name, judge), p in zip(judges.items(), holm(p_values), strict=True):
        assert found.to_reference[name].paired == judge
        assert found.to_reference[name].p_holm == pytest.approx(p)
    assert len(found.pairs) == 3 and all(pair.paired.mean <= 1e-12 for pair in found.pairs)


def test_of_several_finalists_the_lowest_mean_counts_and_that_is_said(tmp_path: Path) -> None:
    found = standings(
        tmp_path, {"lora": LORA, "goat": APART}, screen={"steps": 2, "halvings": 0, "keep": 2}
    )  # fmt: skip
    assert found.standings[0].num_finalists == 2
    assert "goat is the best of 2 finalists, chosen by the losses it is judged by" in "\n".join(sentences(found))


def test_a_failed_seed_is_left_out_of_both_of_its_pair(tmp_path: Path) -> None:
    found = standings(tmp_path, {"lora": LORA, "goat": [*APART[:4], math.nan]})
    assert found.to_reference["goat"].paired == paired_difference(dict(enumerate(APART[:4])), dict(enumerate(LORA[:4])))
    assert "1 final runs of goat diverged or failed; they are left out of its mean" in "\n".join(sentences(found))


# -- what is said


def test_a_method_that_is_better_beyond_doubt_is_recommended(tmp_path: Path) -> None:
    words = said(tmp_path, {"lora": LORA, "goat": APART})
    assert words.startswith(
        "Take goat: its held-out loss is lower than that of lora by 0.4960 [95 % interval 0.4849 to "
    )
    assert "in 5 of 5 pairs; one comparison was made" in words
    assert "do not tell" not in words


def test_what_the_data_cannot_tell_is_said_with_the_seeds_that_it_would_take(tmp_path: Path) -> None:
    words = said(tmp_path, {"lora": LEVEL, "goat": LORA})
    assert words.startswith("goat has the lowest mean, 1.1200 ± 0.1304, but these data do not tell goat from lora: ")
    assert "has 0 in its interval; about" in words and "more seeds would be needed to see a difference of this" in words
    assert "Until they do, keep lora." in words


def test_a_difference_that_only_the_correction_takes_away_is_said(tmp_path: Path) -> None:
    near = [0.9, 1.16, 1.05, 1.13, 0.97]
    alone = standings(tmp_path, {"lora": LORA, "goat": near})
    assert alone.to_reference["goat"].is_seen
    words = said(tmp_path, {"lora": LORA, "dora": LEVEL, "goat": near})
    assert "does not stand when corrected for all comparisons (Holm)" in words


def test_a_method_that_is_surely_better_is_taken_before_a_noisy_one_with_a_lower_mean(tmp_path: Path) -> None:
    noisy = [0.1, 1.5, 0.05, 0.9, 0.1]
    words = said(tmp_path, {"lora": LORA, "dora": APART, "goat": noisy}).splitlines()
    assert words[0].startswith("Take dora: its held-out loss is lower than that of lora by 0.4960")
    assert words[1].startswith("These data do not tell dora from goat: the difference of 0.0940 [95 % interval -")


def test_the_reference_is_kept_where_it_is_best(tmp_path: Path) -> None:
    words = said(tmp_path, {"lora": APART, "goat": LORA, "dora": LEVEL})
    assert words.startswith("lora, the reference, has the lowest mean held-out loss: 0.6240 ± 0.1260. Keep it.")
    assert "goat is worse than lora by 0.4960" in words and "dora is worse than lora by" in words


def test_where_the_reference_diverged_its_mean_of_other_seeds_decides_nothing(tmp_path: Path) -> None:
    final = {"lora": [1.0, 1.001, math.nan, 0.999], "goat": [0.9, 0.902, 5.0, 0.899]}
    words = said(tmp_path, final)
    assert words.startswith("Take goat: its held-out loss is lower than that of lora by 0.0997")
    assert "Keep it" not in words and "goat is worse" not in words
    turned = said(tmp_path, {"goat": final["goat"], "lora": final["lora"]}, reference="goat")
    assert turned.startswith("goat, the reference, has the lowest mean held-out loss of those that finished every seed")
    assert "Take lora" not in turned and "lora is worse than goat by 0.0997" in turned


def test_a_method_that_diverged_is_not_recommended_for_the_seeds_on_which_it_did_not(tmp_path: Path) -> None:
    diverged = [*APART[:2], math.nan, *APART[3:]]
    words = said(tmp_path, {"lora": LORA, "goat": diverged})
    assert "Take goat" not in words
    assert words.startswith("lora, the reference, has the lowest mean held-out loss of those that finished every seed")
    assert "Warning: 1 final runs of goat diverged or failed" in words


def test_one_seed_shows_no_spread_and_is_warned_of(tmp_path: Path) -> None:
    words = said(tmp_path, {"lora": [1.0], "goat": [0.5]})
    assert "these data do not tell goat from lora: they differ by 0.5000 in one pair of runs." in words
    assert "Warning: 1 seed is too few to trust an interval; give final.seeds at least 3." in words


def test_two_seeds_are_warned_of_and_three_are_not(tmp_path: Path) -> None:
    assert "2 seeds are too few" in said(tmp_path, {"lora": LORA[:2], "goat": APART[:2]})
    assert "too few" not in said(tmp_path, {"lora": LORA[:3], "goat": APART[:3]})


def test_a_best_rate_at_the_edge_and_a_single_rate_are_warned_of(tmp_path: Path) -> None:
    final = {"lora": LORA, "goat": APART}
    assert "the best rate of goat (0.002) is at the edge of those that were tried" in said(tmp_path, final)
    words = said(tmp_path, final, learning_rates=[0.001])
    assert "goat was trained with one learning rate (0.001), so it is not tuned" in words and "edge" not in words


def test_methods_that_were_not_tuned_alike_are_warned_of(tmp_path: Path) -> None:
    methods = {"lora": METHODS["lora"], "goat": METHODS["goat"] | {"learning_rates": [0.001, 0.002, 0.004]}}
    words = said(tmp_path, {"lora": LORA, "goat": APART}, methods=methods)
    assert "were not tuned alike: points tried are lora 2, goat 3" in words
    assert "not tuned alike" not in said(tmp_path, {"lora": LORA, "goat": APART})


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("rank", "hence the tokens, and the total rank. Trained parameters: goat 100, lora 100."),
        ("parameters", "and the trained parameters, within 0.0%: goat 100, lora 100"),
        ("none", "Neither rank nor trained parameters were: goat 100, lora 100."),
    ],
)
def test_what_was_equal_is_said(budget: str, words: str, tmp_path: Path) -> None:
    printed = said(tmp_path, {"lora": LORA, "goat": APART}, budget=budget)
    assert "Equal were: the base, the data, 4 steps of the same batches for every seed" in printed
    assert words in printed
    assert "Rates were chosen on the held-out data that the final is judged by" in printed


@pytest.mark.parametrize(
    ("more", "words"),
    [({"device": "another"}, "on different devices: another; none"), ({"versions": {"code": "1"}}, "or of this code")],
)
def test_runs_made_under_other_conditions_are_warned_of(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    search = searched(tmp_path, {"lora": LORA, "goat": APART})
    changed = next(trial for trial in search.outcomes if trial.stage == FINAL)
    search.outcomes[changed] = outcome(changed, 1.0, **more)
    assert words in "\n".join(sentences(standings_of(search, sizes_of(search.settings))))


def test_a_comparison_that_is_not_done_says_how_much_is_missing(tmp_path: Path) -> None:
    words = said(tmp_path, {"lora": LORA, "goat": APART[:3]})
    assert words.startswith("2 runs are still to be done: this is what the others say.\nTake goat")


def test_a_final_in_which_nothing_ends_well_says_so(tmp_path: Path) -> None:
    found = standings(tmp_path, {"lora": LORA, "goat": [math.nan] * 5})
    assert "Warning: goat has no run of the final that ended well." in "\n".join(sentences(found))
    found = standings(tmp_path, {"lora": [math.nan] * 5, "goat": APART})
    assert next(iter(sentences(found))).startswith(
        "goat has the lowest mean, 0.6240 ± 0.1260; lora, the reference, has none"
    )


# -- what is written


def test_the_table_has_a_row_a_method_and_columns_of_equal_width(tmp_path: Path) -> None:
    found = standings(tmp_path, {"lora": LORA, "goat": APART})
    head, goat, lora = cells(found)
    assert head[5] == "to lora" and goat[:4] == ["goat", "0.002 (at the edge)", "5", "0.6240"]
    assert goat[5] == "-0.4960" and goat[8] == "5 of 5" and lora[5:9] == ["-"] * 4
    lines = list(as_text(found))[:3]
    assert len({line.index(word) for line, word in zip(lines, ("seeds", "5  ", "5  "), strict=True)}) == 1
    assert as_markdown(found).splitlines()[1] == f"| {' | '.join(['---'] * 10)} |"


def test_summary_and_page_have_the_numbers_and_the_page_fetches_nothing(tmp_path: Path) -> None:
    search = searched(tmp_path, {"lora": LORA, "dora": [math.nan, *LEVEL[1:]], "goat": APART})
    found = standings_of(search, sizes_of(search.settings))
    paths = write_reports(search, found, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["methods"][0]["losses"] == {str(seed): loss for seed, loss in enumerate(APART, start=1)}
    assert summary["verdict"] == list(sentences(found))
    page = (tmp_path / "compare.html").read_text()
    assert re.findall(r"(?:src|href|url|@import)\b", page) == [] and "http" not in page.replace("http://www.w3.org", "")
    assert "Take goat" in page and "<td>0.6240</td>" in page
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    titles = [ElementTree.fromstring(picture).attrib["aria-label"] for picture in pictures]
    assert titles == [
        "Held-out loss less that of lora, with 95 % intervals",
        "rung 0: 2 steps", "held-out loss", "training loss",
    ]  # fmt: skip
    assert [path.name for path in paths] == ["table.md", "summary.json", "compare.html"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_names_cannot_break_the_page() -> None:
    picture = chart("<a & b>", [Line(name='"<x>', colour=0, points=[(1, 1.0)])], x_name="<", y_name="&")
    assert ElementTree.fromstring(picture).attrib["aria-label"] == "<a & b>"


def test_a_picture_stays_inside_its_frame_whatever_the_losses() -> None:
    for points in ([(1e-4, 0.3)], [(1e-4, 0.3), (1e-3, 0.3)], [(1e-5, 1e-3), (1e-1, 1e6)], [(1, 0.0), (2, 5.0)]):
        picture = chart("a", [Line(name="a", colour=9, points=points, has_marks=True)], x_name="x", y_name="y",
                        log_x=True, highest=10.0)  # fmt: skip
        circles = re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', picture)
        assert len(circles) == len(points)
        assert all(64 <= float(x) <= 504 and 34 <= float(y) <= 274 for x, y in circles)


def test_intervals_are_drawn_beside_a_line_at_zero() -> None:
    picture = intervals("a", [("goat", 1, -0.4, -0.5, -0.3), ("dora", 2, 0.1, None, None)], x_name="x")
    ElementTree.fromstring(picture)
    assert picture.count('class="zero"') == 1 and picture.count("<circle") == 2
    assert picture.count('stroke-width="3"') == 1


def test_the_points_of_the_final_are_those_of_the_best_rate(tmp_path: Path) -> None:
    search = searched(tmp_path, {"lora": LORA, "goat": APART})
    assert search.finalists == {"lora": [Point(0.002)], "goat": [Point(0.002)]}
