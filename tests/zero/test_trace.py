"""After its first step an engine under ZeRO-3 knows what comes next, and no module waits for what was not asked for."""

import json
from typing import NamedTuple

import pytest

from tests.launching import REPOSITORY, losses_of, run_ranks
from tests.zero.plain_torch import COMMON

NUM_STEPS, FINISH_AFTER = 5, 2
# A model so small would be held whole: so much less is held, and fetched ahead, that this one is as a large one is.
SMALL = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 700_000,
    "stage3_prefetch_bucket_size": 100_000,
}
RUNS: dict[str, dict[str, str]] = {
    "accumulated": {"grad_accum_steps": "2"},
    "reentrant": {"gradient_checkpointing": "reentrant"},
    "non_reentrant": {"gradient_checkpointing": "non_reentrant"},
    "finished": {"dense_finish": str(FINISH_AFTER / NUM_STEPS), "max_length": "256"},
}


class Trained(NamedTuple):
    """What a run fetched in each step, and its losses."""

    steps: list[dict[str, int]]
    losses: list[float]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Train every variant on two ranks, with an evaluation after every other step."""
    folder = tmp_path_factory.mktemp("trace")
    ds_config = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    ds_config["zero_optimization"] |= SMALL
    (folder / "ds.json").write_text(json.dumps(ds_config))
    common = COMMON | {
        "ds_config": str(folder / "ds.json"),
        "eval_steps": "2",
        "max_steps": str(NUM_STEPS),
        "svd_cache": str(folder / "svd"),
        "token_cache": str(folder / "tokens"),
    }
    lines = {
        name: [word for flag, value in flags.items() for word in (f"--{flag}", value)]
        for name, settings in RUNS.items()
        for flags in (common | settings | {"output_dir": str(folder / name)},)
    }
    (folder / "runs.json").write_text(json.dumps(lines))
    run_ranks(["tests/zero/trace_on_ranks.py", str(folder / "runs.json"), str(folder / "told.json")], world_size=2)
    told = json.loads((folder / "told.json").read_text())
    return {name: Trained(told[name], losses_of(folder / name)) for name in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_no_step_but_the_first_of_an_engine_waits_for_what_was_not_asked_for_before(
    name: str, runs: dict[str, Trained]
) -> None:
    # A finish begins another engine, which evaluates and learns the order of modules in the step after.
    learning = {0, FINISH_AFTER - 1, FINISH_AFTER} if name == "finished" else {0}
    known = [step for number, step in enumerate(runs[name].steps) if number not in learning]
    assert len(runs[name].steps) == NUM_STEPS and len(known) >= 2
    assert all(step["modules"] > 0 and step["fetched"] > 0 for step in known)
    assert [step["modules that waited"] for step in known] == [0] * len(known)
    assert [step["traces given up"] for step in known] == [0] * len(known)


@pytest.mark.slow
def test_either_kind_of_checkpointing_computes_the_same_and_fetches_about_as_much(runs: dict[str, Trained]) -> None:
    one, other = runs["reentrant"], runs["non_reentrant"]
    assert other.losses == pytest.approx(one.losses, abs=1e-5)
    # A third of it would be fetched a second time in backward if what a block recomputed were let go within it.
    for step, again in zip(one.steps[1:], other.steps[1:], strict=True):
        assert again["fetched"] == pytest.approx(step["fetched"], rel=0.05)
