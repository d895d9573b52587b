"""What is planned of an engine and a checkpoint is what two ranks have of them."""

import json
from pathlib import Path

import pytest

from tests.launching import REPOSITORY, run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--load_in_4bit"]], ids=str)
def test_an_engine_on_two_ranks_holds_the_shards_that_were_planned(tmp_path: Path, flags: list[str]) -> None:
    ds_config = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    ds_config["zero_optimization"]["reduce_bucket_size"] = 100_000
    (tmp_path / "ds_config.json").write_text(json.dumps(ds_config))
    script = ["tests/plan/shards_on_ranks.py", str(tmp_path / "ds_config.json"), str(tmp_path / "run"), *flags]
    for printed in run_ranks(script, world_size=2):
        told = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
        assert told["planned"] == told["found"]
        on_plan, on_disk = told["checkpoint"]
        # Beside the values a file has their names and shapes.
        assert on_plan <= on_disk <= on_plan + 200_000
