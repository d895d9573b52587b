"""What a run is given is read once: nothing that happens to the files afterwards reaches it."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from goat_ds import demo
from goat_ds.train.inputs import DS_CONFIG_NAME
from tests.launching import REPOSITORY, run_ranks
from tests.train.faults import Laboratory, steps_logged, trajectory

DENSE_HALFWAY = {"dense_finish": "0.5", "save_steps": "0"}


def ds_config_in(folder: Path) -> Path:
    return Path(shutil.copy(REPOSITORY / "ds_configs" / "zero3.json", folder / "ds.json"))


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["edited", "deleted"])
def test_a_ds_config_that_changes_while_a_run_goes_on_does_not_reach_it(
    laboratory: Laboratory, tmp_path: Path, harm: str
) -> None:
    left_alone, harmed = laboratory.folder(), laboratory.folder()
    laboratory.finish(left_alone, DENSE_HALFWAY)
    path = ds_config_in(tmp_path)
    run = laboratory.start(harmed, DENSE_HALFWAY | {"ds_config": str(path)})
    run.wait_until(lambda: steps_logged(harmed) >= 1)
    if harm == "deleted":
        path.unlink()
    else:
        # Before this was carried, the dense finish trained on with it.
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"optimizer": {"type": "AdamW", "params": {"lr": 1}}})
        )
    assert run.wait() == [0, 0], run.output()
    assert trajectory(harmed) == trajectory(left_alone)


@pytest.mark.slow
def test_a_run_keeps_its_ds_config_filled_in(laboratory: Laboratory) -> None:
    folder = laboratory.folder()
    laboratory.finish(folder, {"max_steps": "2", "save_steps": "0", "warmup_steps": "0"})
    kept = json.loads((folder / DS_CONFIG_NAME).read_text())
    assert '"auto"' not in json.dumps(kept)
    assert kept["optimizer"]["params"]["lr"] == 1e-2 and kept["train_batch_size"] == 2


def reads(folder: Path, name: str) -> dict[str, Any]:
    """Train on files in a folder; return how often each was opened before and after the first step."""
    flags = ["--ds_config", str(folder / "ds.json"), "--model", str(folder / "base"), "--output_dir"]
    flags += [str(folder / name), "--max_steps", "2", "--max_length", "64", "--r", "8", "--num_experts", "4"]
    flags += ["--data", str(folder / "train.jsonl"), "--eval_data", str(folder / "heldout.jsonl")]
    flags += ["--svd_cache", str(folder / "svd"), "--token_cache", str(folder / "tokens"), "--precision", "fp32"]
    (printed,) = run_ranks(["tests/train/reads_on_ranks.py", str(folder), *flags], world_size=1)
    told: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return told


@pytest.mark.slow
def test_each_file_is_read_before_the_first_step_and_data_that_is_known_not_at_all(tmp_path: Path) -> None:
    ds_config_in(tmp_path)
    shutil.copytree(demo.base_path(), tmp_path / "base")
    for name in ("train.jsonl", "heldout.jsonl"):
        lines = demo.train_data().read_text().splitlines(keepends=True)[:20]
        (tmp_path / name).write_text("".join(lines))
    # What is kept of a file that was new when it was read is not believed.
    time.sleep(2.1)
    cold, warm = reads(tmp_path, "cold"), reads(tmp_path, "warm")
    for name in ("train.jsonl", "heldout.jsonl"):
        # Once for its content's name in the cache, once to be tokenised.
        assert cold["before"][name] == 2
        assert name not in warm["before"]
    for told in (cold, warm):
        assert told["before"]["ds.json"] == 1
        # transformers opens it several times to make one config of it.
        assert told["before"]["base/config.json"] <= 3
        assert not told["after"].keys() & {"ds.json", "base/config.json", "train.jsonl", "heldout.jsonl"}
