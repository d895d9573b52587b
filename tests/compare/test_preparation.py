"""What is checked before a comparison starts, and how large its methods are."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from goat_ds import demo
from goat_ds.compare import equal_size
from goat_ds.compare.equal_size import Choice, nearest
from goat_ds.compare.preparation import Size, prepare
from goat_ds.errors import ConfigError
from tests.compare.helpers import TINY, read

LORA, GOAT = TINY["methods"]["lora"], TINY["methods"]["goat"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Run as a user does who types the commands in a clone."""
    monkeypatch.chdir(request.config.rootpath)


def refused(folder: Path, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        prepare(read(folder, **changes))
    return list(error.value.problems)


def test_nothing_is_wrong_with_the_tiny_comparison_and_sizes_are_those_of_peft(tmp_path: Path) -> None:
    sizes = prepare(read(tmp_path))
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(demo.base_path()), LoraConfig(r=8, target_modules="all-linear")
    )
    assert sizes["lora", ()] == Size(None, lora.num_parameters(only_trainable=True))
    assert not (tmp_path / "out").exists()


def test_problems_of_all_methods_come_at_once_each_said_once(tmp_path: Path) -> None:
    goat = {"num_experts": 4, "top_k": 9}
    methods = {"lora": LORA | {"rho": 3}, "goat": goat, "other": goat}
    problems = refused(tmp_path, methods=methods, train=TINY["train"] | {"weight_decay": "much"})
    assert problems == ["train: argument --weight_decay/--weight-decay: invalid float value: 'much'"]
    problems = refused(tmp_path, methods=methods)
    assert problems[0].startswith("methods.lora: rho (3.0) has no effect with method lora")
    assert len(problems) == 1
    del methods["lora"]["rho"]
    assert refused(tmp_path, methods=methods) == ["methods.goat, other: top_k (9) must be at most num_experts (4)"]


def test_base_data_and_ds_config_are_checked_as_a_run_checks_them(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"colour": "red"}\n')
    train = {"ds_config": "no.json", "model": str(tmp_path), "data": [str(bad)], "eval_data": [str(bad)]}
    problems = refused(tmp_path, train=train, methods={"lora": LORA | {"target_modules": ["q_porj"]}, "goat": GOAT})
    printed = "\n".join(problems)
    for words in ("train: ds_config (no.json) does not exist", f"train: model ({tmp_path})", "bad.jsonl line 1"):
        assert words in printed, printed


def test_held_out_data_are_needed(tmp_path: Path) -> None:
    train = TINY["train"] | {"model": str(demo.base_path()), "data": [str(demo.train_data())], "eval_data": None}
    assert refused(tmp_path, train=train) == [
        "train.eval_data is required: methods are compared by their held-out loss"
    ]


def test_a_warm_up_that_a_short_rung_has_no_room_for_is_found_before_the_first_run(tmp_path: Path) -> None:
    problems = refused(tmp_path, train=TINY["train"] | {"warmup_steps": 3})
    assert problems == ["train: rung 0 (2 steps): warmup_steps (3) must be below max_steps (2)"]


def test_other_held_out_data_of_the_final_are_checked(tmp_path: Path) -> None:
    final = TINY["final"] | {"eval_data": ["no.jsonl"]}
    (problem,) = refused(tmp_path, final=final)
    assert "no.jsonl" in problem


def test_equal_rank_is_refused_where_ranks_differ(tmp_path: Path) -> None:
    methods = {"lora": LORA | {"r": 16}, "goat": GOAT}
    (problem,) = refused(tmp_path, methods=methods)
    assert problem.startswith("methods.goat.r (8) is not the 16 of lora; give the same r to all")
    assert prepare(read(tmp_path, methods=methods, budget="none"))["lora", ()].num_trained > 0


def test_equal_parameters_choose_the_rank_that_comes_nearest(tmp_path: Path) -> None:
    methods = {"lora": LORA | {"r": 32}, "goat": {"num_experts": 2}}
    sizes = prepare(read(tmp_path, methods=methods, budget="parameters"))
    target, goat = sizes["lora", ()].num_trained, sizes["goat", ()]
    assert goat.r is not None and goat.r % 2 == 0
    counted = {
        r: prepare(
            read(tmp_path, methods={"lora": LORA, "goat": {"num_experts": 2, "r": r}}, budget="none")
        )["goat", ()].num_trained
        for r in (goat.r - 2, goat.r, goat.r + 2)
    }  # fmt: skip
    assert goat.num_trained == counted[goat.r]
    assert min(counted, key=lambda r: abs(counted[r] - target)) == goat.r
    assert abs(goat.num_trained / target - 1) <= 0.05


def test_equal_parameters_are_refused_where_no_rank_comes_near(tmp_path: Path) -> None:
    methods = {"lora": LORA, "goat": {"num_experts": 8}}
    (problem,) = refused(tmp_path, methods=methods, budget="parameters")
    assert problem.startswith("methods.goat: no r comes within parameter_tolerance (0.05) of the 74,496 trained")
    assert "r 8 has" in problem and "another num_experts, or budget rank" in problem


def test_steps_of_other_batches_are_refused(tmp_path: Path) -> None:
    methods = {"lora": LORA, "goat": GOAT | {"grad_accum_steps": 2}}
    assert refused(tmp_path, methods=methods) == ["methods.goat has steps of 2 packs and lora of 1; give both the same"]
    # The same packs in fewer forwards are the same batches.
    prepare(read(tmp_path, methods={"lora": LORA | {"micro_batch_size": 2}, "goat": methods["goat"]}))


# -- the search for a rank


def test_the_choices_lie_on_both_sides_of_the_target_nearest_first() -> None:
    assert nearest(lambda r: 10 * r, range(1, 100), target=47) == [Choice(5, 50), Choice(4, 40)]
    assert nearest(lambda r: 10 * r, [2, 8], target=47) == [Choice(2, 20), Choice(8, 80)]
    assert nearest(lambda r: 10 * r, range(1, 100), target=50)[0] == Choice(5, 50)
    assert nearest(lambda r: 10 * r, [2, 3], target=1) == [Choice(2, 20)]
    assert nearest(lambda r: 10 * r, [], target=1) == []


def test_ranks_that_do_not_fit_the_base_count_as_too_many() -> None:
    def count(r: int) -> int:
        if r > 3:
            raise ConfigError("too small a layer")
        return r

    assert nearest(count, range(1, 100), target=50) == [Choice(3, 3)]
    assert nearest(count, range(4, 100), target=50) == []


def test_what_is_not_near_enough_is_refused_with_the_tolerance_that_it_would_take() -> None:
    choices = [Choice(4, 95), Choice(5, 107)]
    assert equal_size.problem("goat", "lora", choices, target=100, tolerance=0.05) is None
    problem = equal_size.problem("goat", "lora", choices, target=100, tolerance=0.04)
    assert problem is not None
    assert "r 4 has 95 (-5.0%), r 5 has 107 (+7.0%); use parameter_tolerance 0.05, another num_experts" in problem
    problem = equal_size.problem("goat", "lora", [], target=100, tolerance=0.04)
    assert problem is not None and "none fits the base; use another num_experts" in problem


def test_a_problem_of_every_method_is_reported_under_train(tmp_path: Path) -> None:
    raw = tmp_path / "ds.json"
    raw.write_text(json.dumps({"train_batch_size": 17}))
    problems = refused(tmp_path, train=TINY["train"] | {"ds_config": str(raw)})
    assert problems and all(problem.startswith("train: ") for problem in problems)


def test_rivals_of_every_kind_are_compared_and_full_fine_tuning_has_no_rank(tmp_path: Path) -> None:
    config = tmp_path / "peft.json"
    config.write_text(
        json.dumps(
            {
                "peft_type": "IA3",
                "task_type": "CAUSAL_LM",
                "target_modules": ["k_proj", "v_proj", "down_proj"],
                "feedforward_modules": ["down_proj"],
            }
        )
    )
    names = ("lora", "dora", "pissa", "lora_plus", "molora")
    methods: dict[str, Any] = {name: {"method": name} for name in names} | {"goat": GOAT}
    methods |= {"full": {"method": "full", "r": None}, "ia3": {"peft_config": str(config), "r": None}}
    settings = read(tmp_path, methods=methods)
    assert [method.name for method in settings.methods if not settings.has_rank(method.name)] == ["full", "ia3"]
    sizes = {name: size.num_trained for (name, _), size in prepare(settings).items()}
    base = AutoModelForCausalLM.from_pretrained(demo.base_path())
    assert sizes["full"] == base.num_parameters()
    assert sizes["ia3"] < sizes["lora"] == sizes["lora_plus"] == sizes["pissa"] < sizes["dora"] < sizes["molora"]
    config.write_text(json.dumps({"peft_type": "HIRA", "r": 5, "target_modules": ["q_proj"]}))
    (problem,) = refused(tmp_path, methods={"lora": {"method": "lora", "r": 4}, "hira": methods["ia3"]})
    assert problem.startswith("methods.hira.r (5) is not the 4 of lora")
    (problem,) = refused(tmp_path, methods={"lora": LORA, "full": methods["full"]}, budget="parameters")
    assert problem == "methods.full has no r that budget parameters could choose; use budget none"
