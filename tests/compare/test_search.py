"""Halving, edges and pairs, with runs that are a formula."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from goat_ds.compare.compare_file import Point
from goat_ds.compare.search import Outcome, Search, planned, rate_beyond
from goat_ds.compare.trials import Trial
from goat_ds.errors import TrainingError
from tests.compare.helpers import TINY, Recorder, outcome, read

RATES = [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]


def loss_with_best_rate(best: float, trial: Trial) -> float:
    return math.log(trial.point.rate / best) ** 2 + 1 / trial.steps


def rates_by_stage(recorder: Recorder, method: str) -> dict[tuple[str, int], list[float]]:
    found: dict[tuple[str, int], list[float]] = {}
    for trial in itertools.chain(*recorder.asked):
        if trial.method == method:
            found.setdefault((trial.stage, trial.steps), []).append(trial.point.rate)
    return found


def test_each_rung_has_the_better_half_of_the_rates_and_twice_the_steps(tmp_path: Path) -> None:
    settings = read(tmp_path, learning_rates=RATES, screen={"steps": 5, "halvings": 2, "keep": 1})
    recorder = Recorder(lambda trial: loss_with_best_rate(0.0039 if trial.method == "lora" else 0.009, trial))
    search = Search(settings, recorder)
    search.run()
    assert rates_by_stage(recorder, "lora") == {
        ("rung 0", 5): RATES,
        ("rung 1", 10): [0.004, 0.002, 0.008],
        ("rung 2", 20): [0.004, 0.002],
        ("final", 4): [0.004] * 3,
    }
    assert search.finalists == {"lora": [Point(0.004)], "goat": [Point(0.008)]}


def test_all_methods_get_the_same_tokens_in_every_rung(tmp_path: Path) -> None:
    settings = read(tmp_path, learning_rates=RATES, screen={"steps": 5, "halvings": 2, "keep": 2, "seeds": [0, 1]})
    recorder = Recorder(lambda trial: loss_with_best_rate(0.0039 if trial.method == "lora" else 0.009, trial))
    Search(settings, recorder).run()
    counted = {
        method: [(trial.stage, trial.steps, trial.seed) for trial in itertools.chain(*recorder.asked)
                 if trial.method == method]
        for method in ("lora", "goat")
    }  # fmt: skip
    assert counted["lora"] == counted["goat"]
    assert sum(count.num_runs for count in planned(settings)) == sum(map(len, counted.values()))


def test_a_rung_is_judged_by_the_mean_over_its_seeds(tmp_path: Path) -> None:
    settings = read(tmp_path, screen={"steps": 5, "halvings": 0, "seeds": [0, 1]})
    by_seed = {(0.001, 0): 1.0, (0.001, 1): 4.0, (0.002, 0): 2.0, (0.002, 1): 2.0}
    search = Search(settings, Recorder(lambda trial: by_seed.get((trial.point.rate, trial.seed), 0.0)))
    search.run()
    assert search.finalists["lora"] == [Point(0.002)]


@pytest.mark.parametrize(("best", "tried"), [(0.1, [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256]),
                                             (0.0004, [0.00025, 0.0005, 0.001, 0.002])])  # fmt: skip
def test_rates_go_on_beyond_the_edge_until_the_best_has_others_on_both_sides(
    best: float, tried: list[float], tmp_path: Path
) -> None:
    settings = read(tmp_path, extend_edges=True, max_extensions=9)
    recorder = Recorder(lambda trial: loss_with_best_rate(best, trial))
    search = Search(settings, recorder)
    search.run()
    assert sorted(point.rate for point in search.tried["lora"]) == tried
    assert not search.at_edge(settings.method("lora"), search.finalists["lora"][0])


def test_the_search_beyond_an_edge_has_a_bound_and_the_edge_is_then_known(tmp_path: Path) -> None:
    settings = read(tmp_path, extend_edges=True, max_extensions=2)
    search = Search(settings, Recorder(lambda trial: -trial.point.rate))
    search.run()
    assert [point.rate for point in search.tried["goat"]] == [0.001, 0.002, 0.004, 0.008]
    assert search.finalists["goat"] == [Point(0.008)]
    assert search.at_edge(settings.method("goat"), Point(0.008))


def test_a_best_rate_that_moves_to_the_edge_in_a_longer_rung_is_followed(tmp_path: Path) -> None:
    # Longer runs like lower rates.
    settings = read(
        tmp_path, learning_rates=[0.001, 0.002, 0.004], screen={"steps": 2, "halvings": 1}, extend_edges=True
    )
    recorder = Recorder(lambda trial: loss_with_best_rate(0.002 if trial.steps == 2 else 0.0006, trial))
    Search(settings, recorder).run()
    by_stage = rates_by_stage(recorder, "lora")
    assert by_stage["rung 0", 2] == [0.001, 0.002, 0.004]
    assert by_stage["rung 1", 4] == [0.002, 0.001, 0.0005, 0.00025]
    assert by_stage["final", 4] == [0.0005] * 3


def test_an_edge_is_one_of_the_rates_with_the_same_values_of_the_grid(tmp_path: Path) -> None:
    methods = TINY["methods"] | {"goat": {"grid": {"rho": [1, 10]}}}
    settings = read(tmp_path, methods=methods, extend_edges=True)
    search = Search(settings, Recorder(lambda trial: loss_with_best_rate(0.0039, trial) + len(str(trial.point.grid))))
    search.run()
    beyond = [point for point in search.tried["goat"] if point.rate > 0.002]
    assert beyond == [Point(0.004, (("rho", 1),)), Point(0.008, (("rho", 1),))]


def test_rates_that_diverge_come_last_and_make_no_edge(tmp_path: Path) -> None:
    settings = read(tmp_path, learning_rates=[0.001, 0.002, 0.004], extend_edges=True)
    search = Search(settings, Recorder(lambda trial: math.inf if trial.point.rate > 0.002 else -trial.point.rate))
    search.run()
    assert search.finalists["lora"] == [Point(0.002)] and len(search.tried["lora"]) == 3


def test_a_method_without_any_finite_loss_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    search = Search(read(tmp_path), Recorder(lambda trial: math.inf if trial.method == "goat" else 1.0))
    search.run()
    assert search.finalists["goat"] == [] and search.finalists["lora"] == [Point(0.001)]
    with pytest.raises(TrainingError, match=r"no run of rung 0 ended with a finite loss; use lower rates"):
        Search(read(tmp_path), Recorder(lambda trial: math.inf)).run()


def test_a_stage_that_fails_altogether_ends_the_search_with_what_a_run_has_said(tmp_path: Path) -> None:
    def run_all(trials: Sequence[Trial]) -> dict[Trial, Outcome]:
        return {trial: outcome(trial, math.inf, status="failed", error="out of memory") for trial in trials}

    with pytest.raises(TrainingError, match=r"every run of rung 0 failed; lora-0.001-2-0: out of memory"):
        Search(read(tmp_path), run_all).run()


def test_a_rate_beyond_the_edge_that_fails_ends_nothing(tmp_path: Path) -> None:
    def run_all(trials: Sequence[Trial]) -> dict[Trial, Outcome]:
        return {
            trial: outcome(trial, math.inf, status="failed", error="out of memory")
            if trial.point.rate > 0.002
            else outcome(trial, -trial.point.rate)
            for trial in trials
        }

    search = Search(read(tmp_path, extend_edges=True), run_all)
    search.run()
    assert search.finalists == {"lora": [Point(0.002)], "goat": [Point(0.002)]}
    assert [point.rate for point in search.tried["lora"]] == [0.001, 0.002, 0.004]


def test_survivors_of_all_methods_get_the_same_seeds(tmp_path: Path) -> None:
    settings = read(tmp_path, screen={"steps": 2, "halvings": 0, "keep": 2})
    recorder = Recorder(lambda trial: trial.point.rate)
    Search(settings, recorder).run()
    final = recorder.asked[-1]
    assert {trial.steps for trial in final} == {4} and len(final) == 12
    for method in ("lora", "goat"):
        assert [trial.seed for trial in final if trial.method == method] == [1, 1, 2, 2, 3, 3]


def test_without_a_screen_every_point_is_in_the_final(tmp_path: Path) -> None:
    settings = read(tmp_path, screen=None)
    recorder = Recorder(lambda trial: trial.point.rate)
    Search(settings, recorder).run()
    assert len(recorder.asked) == 1 and len(recorder.asked[0]) == 12
    assert [count.num_runs for count in planned(settings)] == [12]


def test_a_search_stops_where_an_outcome_is_missing_and_keeps_what_is_there(tmp_path: Path) -> None:
    settings = read(tmp_path)

    def look_up(trials: Sequence[Trial]) -> dict[Trial, Outcome]:
        return {trial: outcome(trial, 1.0) for trial in trials if trial.seed != 3}

    search = Search(settings, look_up)
    search.run()
    assert search.num_missing == 2 and len(search.outcomes) == 4 + 4


def test_the_rate_beyond_is_as_far_as_its_neighbours_are_apart() -> None:
    assert rate_beyond([1e-3, 3e-3, 6e-3], 1e-3) == pytest.approx(1e-3 / 3, rel=1e-3)
    assert rate_beyond([1e-3, 3e-3, 6e-3], 6e-3) == 1.2e-2
    assert rate_beyond([1e-3, 3e-3, 6e-3], 3e-3) is None
    assert rate_beyond([1e-3], 1e-3) is None
