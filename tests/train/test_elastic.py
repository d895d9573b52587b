"""A run goes on, on other numbers of ranks, under another stage, with offload: its losses are those it had alone."""

import re
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.forked_ranks import CrashPlan
from tests.train.faults import ELASTIC, Laboratory, steps_saved, trajectory


class Start(NamedTuple):
    """How a run is started for some of its steps."""

    world_size: int
    ds_config: str

    @property
    def settings(self) -> dict[str, str]:
        """Return its flags."""
        return {"ds_config": f"ds_configs/{self.ds_config}.json"}


# A step keeps its four packs: on three ranks the last of two micro-batches is a filler on two of them.
# Twice in turn on one rank: there the accumulation is another one than was given, and must be found again.
STARTS = (Start(2, "zero3"), Start(1, "zero3"), Start(1, "zero3_offload"), Start(3, "zero2"))
STEPS = (3, 5, 7, 8)
SETTINGS = {"grad_accum_steps": "2"}
BASES = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp32, 4-bit": {"precision": "fp32", "load_in_4bit": "true"},
    "bf16, 4-bit": {"precision": "bf16", "load_in_4bit": "true"},
}


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_other_ranks_and_stages_give_the_losses_of_a_run_left_alone(base: str, laboratory: Laboratory) -> None:
    settings = SETTINGS | BASES[base]
    alone, moved = laboratory.folder(), laboratory.folder()
    printed = laboratory.finish(alone, settings).output()
    for start, step in zip(STARTS, STEPS, strict=True):
        # Sent in the middle of the first save, the signal is seen after the step behind it.
        crash = CrashPlan(at=5, signal=signal.SIGUSR1)
        run = laboratory.start(moved, settings | start.settings, world_size=start.world_size, crash=crash)
        expected = 0 if step == STEPS[-1] else 75
        assert run.wait() == [expected] * start.world_size, run.output()
        assert steps_saved(moved)[-1] == step
    assert_equal_to_rounding(moved, alone, rounding=1e-6 if "fp32" in base else 5e-4)
    assert_every_record_once_an_epoch(moved, printed)


def assert_equal_to_rounding(moved: Path, alone: Path, *, rounding: float) -> None:
    steps, losses, norms, _ = zip(*trajectory(moved), strict=True)
    expected_steps, expected_losses, expected_norms, _ = zip(*trajectory(alone), strict=True)
    assert steps == expected_steps
    assert losses == pytest.approx(expected_losses, rel=rounding)
    # In bf16 a gradient's norm was seen to differ by a hundred times what the losses do.
    assert norms == pytest.approx(expected_norms, rel=50 * rounding)


def assert_every_record_once_an_epoch(output_dir: Path, printed: str) -> None:
    """Check that the tokens of each epoch's steps are those of the data; a record read twice would add to them."""
    (num_tokens,) = re.findall(r"^(\d+) tokens, ", printed, flags=re.MULTILINE)
    (num_packs,) = re.findall(r"records in (\d+) packs", printed)
    steps_per_epoch = -(-int(num_packs) // 4)
    so_far = [tokens for *_, tokens in trajectory(output_dir)]
    assert len(so_far) > 2 * steps_per_epoch
    at_ends = so_far[steps_per_epoch - 1 :: steps_per_epoch]
    assert at_ends == [int(num_tokens) * (epoch + 1) for epoch in range(len(at_ends))]


def test_a_run_is_moved_as_often_as_the_readme_says() -> None:
    assert ELASTIC.times == len(BASES)
