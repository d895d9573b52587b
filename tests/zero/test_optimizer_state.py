"""A state carried to another engine is the state, and training goes on as if the engine had never changed."""

import json
from typing import Any

import pytest

from tests.launching import run_ranks
from tests.zero.rebuild_on_ranks import NUM_STEPS

ZERO_0 = {"zero_optimization": {"stage": 0}}
# Each stage keeps masters in another way; fp32 has a copy of them as well.
ON_TWO_RANKS = {
    f"{stage} {precision}": {"ds_config": f"ds_configs/{stage}.json", "precision": precision}
    for stage, precision in (
        ("zero1", "bf16"),
        ("zero2", "fp32"),
        ("zero3", "fp32"),
        ("zero3", "bf16"),
        ("zero3_offload", "bf16"),
    )
}
COMMON = {"max_length": "64", "r": "16", "num_experts": "4", "warmup_steps": "0", "learning_rate": "2e-3"}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Run all cases; return what each rank has told of each."""
    root = tmp_path_factory.mktemp("optimizer_state")
    (root / "zero0.json").write_text(json.dumps(ZERO_0))
    cases = ON_TWO_RANKS | {"zero0 bf16": {"ds_config": str(root / "zero0.json"), "precision": "bf16"}}
    places = {"svd_cache": str(root / "svd"), "token_cache": str(root / "tokens")}
    lines = {
        name: [word for flag, value in (COMMON | places | case).items() for word in (f"--{flag}", value)]
        for name, case in cases.items()
    }
    (root / "cases.json").write_text(json.dumps(lines))
    run_ranks(["tests/zero/rebuild_on_ranks.py", str(root / "cases.json"), str(root)], world_size=2)
    ranks = [json.loads((root / f"told-{rank}.json").read_text()) for rank in range(2)]
    return {name: [rank[name] for rank in ranks] for name in cases}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ON_TWO_RANKS, "zero0 bf16"])
def test_training_goes_on_bit_for_bit_in_another_engine(name: str, told: dict[str, list[dict[str, Any]]]) -> None:
    for rank in told[name]:
        assert rank["round_trip"]
        assert len(set(rank["uninterrupted"])) == NUM_STEPS
        assert rank["interrupted"] == rank["uninterrupted"]
        assert rank["same_end"]
        assert rank["freed"], "the old optimizer would double the memory of the run"
        assert all("goat_experts" in parameter for parameter in rank["gathered_to_save"])
        assert bool(rank["gathered_to_save"]) == name.startswith("zero3")
