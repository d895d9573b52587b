"""A disk that is full, a folder that is not to be written to, and checkpoints that are not what they say."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from goat_ds.manifest import MANIFEST_NAME, write_manifest
from tests.forked_ranks import TEMPORARY, CrashPlan
from tests.train.faults import (
    DAMAGED,
    FULL_DISK,
    OTHER_MODEL,
    READ_ONLY,
    Laboratory,
    assert_same_end,
    copy_of,
    steps_logged,
    steps_saved,
    trajectory,
    write_base,
)

NEWEST, BEFORE = "checkpoint-4", "checkpoint-2"
SHORT = {"max_steps": "4"}
STATE = "state-00001.safetensors"
ADAPTER = "adapter/adapter_model.safetensors"
FILES = (ADAPTER, "adapter/adapter_config.json", "calibration.safetensors", STATE, "run.json")
DISK_MIB = 16


@pytest.fixture(scope="module")
def whole(laboratory: Laboratory) -> Path:
    """A finished run with two checkpoints."""
    folder = laboratory.folder()
    laboratory.finish(folder, SHORT)
    assert steps_saved(folder) == [2, 4]
    return folder


# -- disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mount is not allowed here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Write until the disk is full but for some pages, which metrics need and no checkpoint fits into."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 32 * 1024))
    return ballast


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_disk_that_fills_up_inside_a_save_costs_that_checkpoint_only(
    choice: str, disk: Path, laboratory: Laboratory, whole: Path
) -> None:
    folder, settings = disk / "run", SHORT | {"on_save_error": choice}
    printed = laboratory.folder()
    # The first touch makes the temporary folder, when the disk has been seen to have room.
    run = laboratory.start(folder, settings, crash=CrashPlan(at=2, signal=None, pause=1.5), printed=printed)
    run.wait_until(lambda: len(run.touches()) == 2)
    ballast = fill(disk)
    if choice == "continue":
        run.wait_until(lambda: "going on without" in run.output())
        ballast.unlink()
    assert run.wait() == ([1, 1] if choice == "stop" else [0, 0]), run.output()
    assert "checkpoint-2 was not written" in run.output() and "there is no checkpoint from before it" in run.output()
    assert not list(folder.glob(f"{TEMPORARY}*"))
    assert steps_logged(folder) == (2 if choice == "stop" else 4)
    assert steps_saved(folder) == ([] if choice == "stop" else [4])
    ballast.unlink(missing_ok=True)
    laboratory.finish(folder, settings)
    assert_same_end(folder, whole)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_to_is_refused_before_training(disk: Path, laboratory: Laboratory) -> None:
    folder = disk / "run"
    folder.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    run = laboratory.start(folder, SHORT, printed=laboratory.folder())
    assert run.wait() == [2, 2], run.output()
    assert re.search(rf"output_dir \({folder}\) .*Read-only file system", run.output()), run.output()


# -- damages


def flip(name: str) -> Callable[[Path], None]:
    """Return what flips a bit in the middle of a file."""

    def damage(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)

    return damage


def cut_short(checkpoint: Path) -> None:
    os.truncate(checkpoint / STATE, (checkpoint / STATE).stat().st_size // 2)


def with_a_manifest(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return what damages a checkpoint and lets its manifest agree."""

    def both(checkpoint: Path) -> None:
        damage(checkpoint)
        (checkpoint / MANIFEST_NAME).unlink()
        write_manifest(checkpoint)

    return both


def pickled(checkpoint: Path) -> None:
    (checkpoint / STATE).write_bytes(pickle.dumps(load_file(checkpoint / STATE)))


def changed_state(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Return what changes the tensors of the state."""

    def damage(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / STATE)
        change(tensors)
        save_file(tensors, checkpoint / STATE)

    return damage


def extra(tensors: dict) -> None:
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.9")] = tensors[name].clone()


def reshaped(tensors: dict) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].T.contiguous()


def dropped(tensors: dict) -> None:
    del tensors[next(iter(tensors))]


def of_another_format(checkpoint: Path) -> None:
    about = json.loads((checkpoint / "run.json").read_text())
    (checkpoint / "run.json").write_text(json.dumps(about | {"format": "goat_ds checkpoint 0"}))


# By what is done: what does it, and what must be told of it.
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f"a bit of {name}": (flip(name), f"{name} is damaged") for name in FILES},
    # In the middle of the manifest stands a size or a hash of some file.
    "a bit of the manifest": (flip(MANIFEST_NAME), rf"{MANIFEST_NAME}"),
    "a manifest that is no list": (lambda c: (c / MANIFEST_NAME).write_text("[]"), f"{MANIFEST_NAME} is damaged"),
    "no manifest": (lambda c: (c / MANIFEST_NAME).unlink(), f"{MANIFEST_NAME} cannot be read"),
    "no adapter": (lambda c: (c / ADAPTER).unlink(), f"{ADAPTER} is missing"),
    "cut short": (cut_short, rf"{STATE} has [\d,]+ bytes, and {MANIFEST_NAME} says"),
    "a pickle": (with_a_manifest(pickled), f"{STATE} is no safetensors file"),
    "another tensor": (with_a_manifest(changed_state(extra)), r"layers\.9\S* has shape \(.*\) in the state, and None"),
    "another shape": (with_a_manifest(changed_state(reshaped)), r"has shape \(.*\) in the state, and \("),
    "a tensor less": (with_a_manifest(changed_state(dropped)), r"has shape None in the state, and \("),
    "another format": (with_a_manifest(of_another_format), r"format \(goat_ds checkpoint 0\) is not"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_name(name: str, laboratory: Laboratory, whole: Path) -> None:
    folder = copy_of(whole, laboratory)
    damage, told = DAMAGES[name]
    damage(folder / NEWEST)
    run = laboratory.finish(folder, SHORT | {"dry_run": "true"}, world_size=1)
    assert re.search(rf"resume: passed over {NEWEST}: .*{told}", run.output()), run.output()
    assert f"passed over {BEFORE}" not in run.output()


@pytest.mark.slow
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(laboratory: Laboratory, whole: Path) -> None:
    folder = copy_of(whole, laboratory)
    flip(STATE)(folder / NEWEST)
    # What a save of a step that is not saved again would leave.
    (folder / f"{TEMPORARY}99.tmp").mkdir()
    run = laboratory.finish(folder, SHORT)
    assert f"passed over {NEWEST}" in run.output()
    assert_same_end(folder, whole)
    # What was damaged is kept, under a name that nothing takes for a checkpoint.
    assert (folder / f"{NEWEST}.damaged").is_dir()


@pytest.mark.slow
def test_a_damaged_checkpoint_that_is_asked_for_is_refused(laboratory: Laboratory, whole: Path) -> None:
    folder = copy_of(whole, laboratory)
    flip(STATE)(folder / NEWEST)
    run = laboratory.start(laboratory.folder(), SHORT | {"resume": str(folder / NEWEST)}, world_size=1)
    assert run.wait() == [2]
    assert re.search(rf"resume: .*{NEWEST}/{STATE} is damaged", run.output()), run.output()


OTHERS: dict[str, tuple[str, str]] = {
    "another model": ("model", rf"resume \(.*{NEWEST}\) is of another model or adapter"),
    "other weights": ("model", r"model \(.*\) has other weights than the base that the run began with"),
    "other data": ("data", r"data \(.*\) is not what the run was trained on before"),
}


@pytest.fixture(scope="module")
def others(laboratory: Laboratory) -> dict[str, Path]:
    """What a run cannot go on with."""
    root = laboratory.root / "others"
    write_base(root / "another model", hidden_size=128)
    write_base(root / "other weights", hidden_size=64, seed=1)
    lines = (laboratory.root / "data.jsonl").read_text().splitlines(keepends=True)
    (root / "data.jsonl").write_text("".join(reversed(lines)))
    return {name: root / name for name in OTHERS} | {"other data": root / "data.jsonl"}


def interrupted(whole: Path, laboratory: Laboratory) -> Path:
    """Return a run's folder as it is without its last checkpoint."""
    folder = copy_of(whole, laboratory)
    shutil.rmtree(folder / NEWEST)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_run_goes_on_with_its_own_model_and_data_only(
    name: str, others: dict[str, Path], laboratory: Laboratory, whole: Path
) -> None:
    flag, told = OTHERS[name]
    folder = interrupted(whole, laboratory)
    run = laboratory.start(folder, SHORT | {flag: str(others[name])}, world_size=1)
    assert run.wait() == [2]
    assert re.search(told.replace(NEWEST, BEFORE), run.output()), run.output()
    assert trajectory(folder) == trajectory(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["other weights", "other data"])
def test_a_change_that_is_allowed_is_told_and_taken(
    name: str, others: dict[str, Path], laboratory: Laboratory, whole: Path
) -> None:
    flag, told = OTHERS[name]
    folder = interrupted(whole, laboratory)
    run = laboratory.finish(folder, SHORT | {flag: str(others[name]), "allow_changed": "true"})
    assert re.search(f"resume: changed: {told}", run.output()), run.output()
    assert steps_saved(folder) == steps_saved(whole)
    assert trajectory(folder)[:2] == trajectory(whole)[:2] and trajectory(folder)[2:] != trajectory(whole)[2:]


@pytest.mark.slow
def test_a_second_run_in_the_folder_of_a_running_one_is_refused(laboratory: Laboratory, whole: Path) -> None:
    folder = laboratory.folder()
    running = laboratory.start(folder, SHORT, crash=CrashPlan(at=2, signal=signal.SIGSTOP))
    running.wait_until(lambda: len(running.touches()) == 2)
    second = laboratory.start(folder, SHORT | {"timeout_minutes": "0.2"}, printed=laboratory.folder())
    assert second.wait() == [2, 2], second.output()
    assert running.codes() == [None, None], running.output()
    running.kill(0, signal.SIGCONT)
    assert f"output_dir ({folder}) is in use by another run; end that run first" in second.output()
    assert running.wait() == [0, 0], running.output()
    assert_same_end(folder, whole)


@pytest.mark.slow
def test_no_more_checkpoints_are_kept_than_asked_for(laboratory: Laboratory, whole: Path) -> None:
    folder = laboratory.folder()
    laboratory.finish(folder, SHORT | {"save_total_limit": "1"})
    assert steps_saved(folder) == steps_saved(whole)[-1:] != steps_saved(whole)
    assert_same_end(folder, whole)


def test_as_much_is_damaged_as_the_readme_says() -> None:
    assert (FULL_DISK.times, READ_ONLY.times, DAMAGED.times, OTHER_MODEL.times) == (2, 1, len(DAMAGES), len(OTHERS))
