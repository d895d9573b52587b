"""compare.yaml: what it may hold, and that all that is wrong with it comes at once."""

import re
from pathlib import Path
from typing import Any

import pytest

from goat_ds.compare.compare_file import Budget, Point, Screen, read_settings
from goat_ds.errors import ConfigError
from tests.compare.helpers import TINY, read, write

LORA = TINY["methods"]["lora"]


def refused(folder: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        read(folder, **changes)
    return str(error.value)


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    settings = read(tmp_path, extend_edges=None)
    assert (settings.reference, settings.budget, settings.workers) == ("lora", Budget.RANK, None)
    assert settings.extend_edges and not settings.keep_checkpoints
    assert settings.screen == Screen(steps=2, seeds=(0,), halvings=0, keep=1)


def test_rates_are_listed_or_span_a_range_and_a_method_may_have_its_own(tmp_path: Path) -> None:
    # YAML reads 1e-3 as a word.
    methods = {"lora": LORA | {"learning_rates": ["1e-3", 0.0005]}, "goat": {}}
    settings = read(tmp_path, methods=methods, learning_rates=None, rates={"from": 1e-4, "to": 1e-3, "factor": 2})
    assert settings.method("lora").rates == (0.0005, 0.001)
    assert settings.method("goat").rates == (1e-4, 2e-4, 4e-4, 8e-4)


def test_a_range_reaches_its_end_although_products_are_rounded(tmp_path: Path) -> None:
    settings = read(tmp_path, learning_rates=None, rates={"from": 1e-4, "to": 2.7e-3, "factor": 3})
    assert settings.method("goat").rates == (1e-4, 3e-4, 9e-4, 2.7e-3)


def test_every_rate_is_tried_with_every_value_of_a_grid(tmp_path: Path) -> None:
    settings = read(tmp_path, methods={"lora": LORA, "goat": {"grid": {"rho": [1, 10], "eta": [0.1, 1]}}})
    points = settings.method("goat").points
    assert len(points) == 8 and Point(0.002, (("rho", 10), ("eta", 0.1))) in points


def test_all_that_is_wrong_is_reported_at_once(tmp_path: Path) -> None:
    printed = refused(
        tmp_path,
        train={"seed": 3, "lerning_rate": 1, "output_dir": "a"},
        methods={"lora": {"rr": 8, "max_length": 3, "grid": {"data": ["a"]}}, "a/b": {"learning_rates": []}},
        learning_rates=[0, 1],
        screen={"steps": 0, "seeds": [1, 1], "keeep": 2},
        final={"seeds": [1, 2]},
        reference="dora",
        budget="time",
        worker=2,
        output_dir=None,
    )
    for words in (
        "train.seed is set by the comparison: use screen.seeds and final.seeds",
        "train.lerning_rate is not a setting of launch/train.py",
        "train.output_dir is set by the comparison",
        "methods.lora.rr is not a setting of launch/train.py",
        "methods.lora.max_length is set by the comparison: it must be the same for all methods; put it under train",
        "methods.lora.data is set by the comparison",
        "methods.a/b must be named by letters",
        "methods.a/b.learning_rates ([]) must be one or more different numbers above 0",
        "learning_rates ([0, 1]) must be one or more numbers above 0",
        "screen.steps (0) must be a whole number of at least 1",
        "screen.seeds ([1, 1]) must be a list of different whole numbers",
        "screen.keeep is not a setting of a comparison; did you mean keep?",
        "final.steps is required",
        "reference (dora) must be one of lora, a/b",
        "budget (time) must be one of rank, parameters, none",
        "worker is not a setting of a comparison; did you mean workers?",
        "output_dir is required",
    ):
        assert f"\n{words}" in f"\n{printed}", words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": {"lora": LORA}}, "methods (lora) must be at least two"),
        ({"methods": None}, "methods is required"),
        ({"learning_rates": None}, "methods.goat has no rates; give it, or all, learning_rates or rates"),
        ({"rates": {"from": 1, "to": 2}}, "learning_rates and rates are both given; choose one"),
        ({"learning_rates": None, "rates": {"from": 2, "to": 1}}, "rates.from (2) must be at most rates.to (1)"),
        ({"learning_rates": None, "rates": {"from": 1, "to": 2, "factor": 1.0001}}, "makes 6932 rates"),
        ({"learning_rates": None, "rates": {"from": 1, "to": 2, "factor": 1}}, "rates.factor (1) must be above 1"),
        (
            {"train": TINY["train"] | {"max_steps": 3}},
            "train.max_steps (3) and final.steps are both given; leave one out",
        ),
        (
            {"screen": None, "final": {"steps": 2, "seeds": [0]}},
            "methods.lora has 2 points and one seed to choose among them; give screen, or more final.seeds",
        ),
        (
            {"methods": {"lora": LORA, "goat": {"grid": {"r": [8, 16]}}}},
            "methods.goat.grid.r contradicts budget rank; use budget none",
        ),
        (
            {"methods": {"lora": LORA, "goat": {"r": 8}}, "budget": "parameters"},
            "methods.goat.r (8) is what budget parameters chooses",
        ),
        (
            {"methods": {"lora": LORA, "goat": {"rho": 1, "grid": {"rho": [1, 2]}}}},
            "methods.goat.rho stands in grid as well; leave one out",
        ),
        (
            {"methods": {"lora": LORA | {"grid": {"dropout": [0, 1]}}, "goat": {}}, "budget": "parameters"},
            "methods.lora.grid would change what budget parameters is measured by",
        ),
        ({"methods": {"lora": LORA, "goat": {"grid": {"rho": 1}}}}, "must be flags, each with a list of different"),
        ({"train": [1]}, "train ([1]) must be 'name: value' lines"),
        ({"extend_edges": "yes"}, "extend_edges (yes) must be true or false"),
        ({"screen": 3}, "screen must hold 'name: value' lines"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in refused(tmp_path, **changes)


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text("- lora")
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))} must hold 'name: value' lines"):
        read_settings(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match=r"cannot be read: while parsing"):
        read_settings(path)


def test_the_length_of_the_final_may_stand_under_train(tmp_path: Path) -> None:
    settings = read(tmp_path, train=TINY["train"] | {"max_steps": 7}, final={"seeds": [1]})
    assert settings.final.steps == 7 and "max_steps" not in settings.train


def test_the_settings_are_read_from_the_file_that_is_written(tmp_path: Path) -> None:
    assert read_settings(write(tmp_path)) == read(tmp_path)
