"""Runs as processes: side by side, ended, killed, gone on with, and never done twice."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from goat_ds.cli import compare as program
from goat_ds.compare import workers as workers_module
from goat_ds.compare.compare_file import CompareSettings, Point
from goat_ds.compare.preparation import Sizes, prepare
from goat_ds.compare.results import Results
from goat_ds.compare.search import Search
from goat_ds.compare.standings import standings_of
from goat_ds.compare.trials import Trial
from goat_ds.compare.workers import Place, Workers, places
from goat_ds.errors import Interrupted
from tests.child_environment import cpu_environment
from tests.compare.forked import Forks, ends_after_checkpoint
from tests.compare.helpers import TINY, read, sizes_of, write
from tests.launching import REPOSITORY

HERE = [Place({"WORKER": "0"}, "a CPU")]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as a user does who types the commands in a clone."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(workers_module, "LOOK_EVERY_S", 0.01)


class Pretended:
    """Stands for ``python -m goat_ds.cli.train``: writes what a run would leave, and ends some looks later."""

    def __init__(self, *, loss: float = 1.0, code: int = 0, looks: int = 2, printed: str = "") -> None:
        self.loss, self.code, self.looks, self.printed = loss, code, looks, printed
        self.flags: list[dict[str, Any]] = []
        self.environments: list[Mapping[str, str]] = []
        self.most_at_once = 0
        self._running = 0

    def __call__(self, command: Sequence[str], environment: Mapping[str, str], printed: Path) -> "Pretended.Child":
        """Begin a run."""
        flags = yaml.safe_load(Path(command[-1]).read_text())
        self.flags.append(flags)
        self.environments.append(environment)
        printed.write_text(self.printed)
        folder = Path(flags["output_dir"])
        (folder / f"checkpoint-{flags['max_steps']}").mkdir(parents=True)
        (folder / "users").mkdir()
        step = {"step": flags["max_steps"], "loss": 2.0, "tokens": 10, "tokens_per_s": 5.0, "peak_mem_gib": 1.0}
        lines = [step, {"step": flags["max_steps"], "eval_loss": self.loss + flags["learning_rate"]}]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        self._running += 1
        self.most_at_once = max(self.most_at_once, self._running)
        return Pretended.Child(self)

    class Child:
        """A run that is under way."""

        def __init__(self, of: "Pretended") -> None:
            self._of, self._left, self.signals = of, of.looks, list[int]()

        def poll(self) -> int | None:
            """Return its exit code; None while it runs."""
            self._left -= 1
            if self._left == 0:
                self._of._running -= 1
            return None if self._left > 0 else self._of.code

        def send_signal(self, sig: int, /) -> None:
            """End it."""
            self.signals.append(sig)


def trial(rate: float = 0.001, seed: int = 1) -> Trial:
    return Trial("lora", Point(rate), "final", 4, seed)


def workers_of(folder: Path, start: Any, *, here: Sequence[Place] = HERE, **changes: Any) -> Workers:
    retry_failed = changes.pop("retry_failed", False)
    settings = read(folder, **changes)
    results = Results(settings.output_dir / "results.jsonl")
    return Workers(settings, sizes_of(settings), results, here=here, start=start, retry_failed=retry_failed)


def test_a_run_gets_its_flags_in_a_file_and_leaves_a_row_that_repeats_it(tmp_path: Path) -> None:
    start = Pretended()
    found = workers_of(tmp_path, start).run_all([trial()])
    assert found[trial()].loss == 1.001
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert row == found[trial()].row
    assert (row["method"], row["rate"], row["seed"], row["steps"], row["stage"]) == ("lora", 0.001, 1, 4, "final")
    assert row["flags"] == start.flags[0] and row["flags"]["resume"] == "auto" and row["flags"]["method"] == "lora"
    assert row["settings"]["learning_rate"] == 0.001 and row["settings"]["max_steps"] == 4
    assert row["trained_parameters"] == 100 and row["device"] == "a CPU" and {"torch", "code"} <= row["versions"].keys()
    assert row["flags"]["output_dir"] == str(tmp_path / "out" / "runs" / row["id"] / "run")


def test_what_is_done_is_not_done_again_also_by_another_start(tmp_path: Path) -> None:
    start = Pretended()
    workers_of(tmp_path, start).run_all([trial(), trial(0.002)])
    workers = workers_of(tmp_path, start)
    found = workers.run_all([trial(), trial(0.002), trial(0.004)])
    assert len(start.flags) == 3 and len(found) == 3
    # The final asks for what a rung has run under another name.
    assert workers.run_all([trial()._replace(stage="rung 1")])[trial()._replace(stage="rung 1")].loss == 1.001
    assert len(start.flags) == 3


def test_as_many_runs_as_workers_go_side_by_side_each_in_its_place(tmp_path: Path) -> None:
    start = Pretended(looks=5)
    here = [Place({"WORKER": str(number)}, f"CPU {number}") for number in range(2)]
    found = workers_of(tmp_path, start, here=here).run_all([trial(seed=seed) for seed in range(6)])
    assert start.most_at_once == 2 and len(found) == 6
    assert {environment["WORKER"] for environment in start.environments} == {"0", "1"}


def test_checkpoints_are_deleted_and_nothing_else_unless_they_are_to_be_kept(tmp_path: Path) -> None:
    workers = workers_of(tmp_path, Pretended())
    workers.run_all([trial()])
    assert sorted(path.name for path in workers.job(trial()).output_dir.iterdir()) == ["metrics.jsonl", "users"]
    kept = workers_of(tmp_path, Pretended(), keep_checkpoints=True)
    kept.run_all([trial(0.002)])
    assert (kept.job(trial(0.002)).output_dir / "checkpoint-4").is_dir()


def test_a_failed_run_is_a_result_keeps_its_checkpoint_and_is_run_again_on_request(tmp_path: Path) -> None:
    failing = Pretended(code=1, printed="OutOfMemoryError: 3 GiB")
    workers = workers_of(tmp_path, failing)
    outcome = workers.run_all([trial()])[trial()]
    assert outcome.loss == math.inf and outcome.row["error"] == "exit code 1 | OutOfMemoryError: 3 GiB"
    assert (workers.job(trial()).output_dir / "checkpoint-4").is_dir()
    assert workers_of(tmp_path, Pretended()).run_all([trial()])[trial()].loss == math.inf
    shutil_of(workers.job(trial()).output_dir)
    again = workers_of(tmp_path, Pretended(), retry_failed=True)
    assert again.look_up([trial()]) == {}
    assert again.run_all([trial()])[trial()].loss == 1.001


def shutil_of(folder: Path) -> None:
    """Make room for a pretended run, which begins with an empty folder."""
    folder.rename(folder.with_name("before"))


def test_a_run_that_a_signal_ends_is_no_result_and_ends_the_comparison(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"lora-lr0\.001-4steps-seed1-\w+ was ended by a signal; the same command"):
        workers_of(tmp_path, Pretended(code=75)).run_all([trial(), trial(0.002)])
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_runs_under_way_are_asked_to_save_themselves_when_the_comparison_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[Pretended.Child] = []
    endless = Pretended(looks=10**9)

    def start(*arguments: Any) -> Pretended.Child:
        children.append(endless(*arguments))
        if len(children) == 2:
            monkeypatch.setattr(workers_module.time, "sleep", stop)
        return children[-1]

    def stop(seconds: float) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(workers_module, "PATIENCE_S", 0.05)
        raise Interrupted("SIGTERM")

    with pytest.raises(Interrupted, match="SIGTERM"):
        workers_of(tmp_path, start, here=HERE * 2).run_all([trial(), trial(0.002), trial(0.004)])
    # Those that do not end are killed.
    assert [child.signals for child in children] == [[signal.SIGTERM, signal.SIGKILL]] * 2


def test_a_worker_has_a_share_of_the_cores_or_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"PATH": "here", "RANK": "3", "WORLD_SIZE": "8", "OMP_NUM_THREADS": "5"}
    (place,) = places(None, launched)
    assert place.environment == {"PATH": "here", "OMP_NUM_THREADS": "5"} and place.device.endswith(", 5 threads")
    monkeypatch.setattr(workers_module.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [place.environment["OMP_NUM_THREADS"] for place in places(3, {})] == ["2"] * 3
    monkeypatch.setattr(workers_module.ranks, "has_cuda", lambda: True)
    monkeypatch.setattr(workers_module.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(workers_module.torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    found = places(None, {"CUDA_VISIBLE_DEVICES": "5,7"})
    assert [(place.environment["CUDA_VISIBLE_DEVICES"], place.device) for place in found] == [
        ("5", "GPU 0"), ("7", "GPU 1"),
    ]  # fmt: skip
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in places(3, {})] == ["0", "1", "0"]


# -- real runs, as forks


def compared(settings: CompareSettings, sizes: Sizes, start: Callable[..., Any]) -> Search:
    environment = [Place(cpu_environment(), "a CPU")]
    results = Results(settings.output_dir / "results.jsonl")
    search = Search(settings, Workers(settings, sizes, results, here=environment, start=start).run_all)
    search.run()
    return search


def caches(folder: Path) -> dict[str, Any]:
    return {"svd_cache": str(folder / "svd"), "token_cache": str(folder / "tokens")}


@pytest.mark.slow
def test_a_comparison_ended_by_a_signal_and_by_a_kill_ends_as_one_that_was_not(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("whole", "ended")}
    for folder in folders.values():
        folder.mkdir()
    changes: dict[str, Any] = {
        "train": TINY["train"] | caches(tmp_path) | {"save_steps": 1, "lr_scheduler": "constant"},
        "learning_rates": [0.01],
        "screen": None,
        "final": {"steps": 3, "seeds": [1, 2]},
    }
    settings = {name: read(folder, **changes) for name, folder in folders.items()}
    sizes = prepare(settings["whole"])
    forks = Forks()
    whole = compared(settings["whole"], sizes, forks)
    assert len(forks.commands) == 4
    with pytest.raises(Interrupted):
        compared(settings["ended"], sizes, Forks(ends_after_checkpoint(1)))
    assert not (folders["ended"] / "out" / "results.jsonl").exists()
    # A run that is killed by itself, as by the system where memory is short, has failed; the others go on.
    killed = compared(settings["ended"], sizes, Forks(ends_after_checkpoint(2, signal.SIGKILL)))
    rows = {outcome.row["status"]: outcome.row for outcome in killed.outcomes.values()}
    assert rows.keys() == {"failed", "finished"} and rows["failed"]["error"].startswith("killed by signal 9")
    again = dataclasses.replace(settings["ended"])
    results = Results(again.output_dir / "results.jsonl")
    forks = Forks()
    workers = Workers(
        again, sizes, results, here=[Place(cpu_environment(), "")], start=forks, retry_failed=True
    )  # fmt: skip
    search = Search(again, workers.run_all)
    search.run()
    assert len(forks.commands) == 1
    assert {trial: outcome.loss for trial, outcome in search.outcomes.items()} == {
        trial: outcome.loss for trial, outcome in whole.outcomes.items()
    }
    found = standings_of(search, sizes)
    assert len(found.standings) == 2 and len({frozenset(each.losses) for each in found.standings}) == 1
    # Where nothing is kept, many runs fit on a disk.
    assert list(folders["ended"].rglob("checkpoint-*")) == []


@pytest.mark.slow
def test_a_rate_that_diverges_is_a_result_and_the_page_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forks = Forks()
    monkeypatch.setattr(program, "Workers", lambda *args, **more: Workers(*args, **more, start=forks))
    monkeypatch.setattr(program, "places", lambda count, environment: [Place(cpu_environment(), "a CPU")])
    path = write(
        tmp_path,
        train=TINY["train"] | caches(tmp_path) | {"eval_steps": 2, "warmup_steps": 0},
        learning_rates=[0.003, 1e30],
        final={"steps": 3, "seeds": [1, 2]},
    )
    assert program.main(["--config", str(path)]) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    diverged = [row for row in rows if row["status"] == "diverged"]
    assert {(row["method"], row["rate"]) for row in diverged} == {("lora", 1e30), ("goat", 1e30)}
    assert len(rows) == 8 and all(row["final_loss"] < 10 for row in rows if row not in diverged)
    assert "Equal were: the base, the data, 3 steps of the same batches" in printed
    assert "2 seeds are too few to trust an interval" in printed
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("<svg") == 3
    # The report is made again from the results, without a run; what a longer final lacks is said.
    (tmp_path / "out" / "compare.html").unlink()
    assert program.main(["--config", str(path), "--report_only"]) == 0
    assert (tmp_path / "out" / "compare.html").read_text() == page
    longer = write(tmp_path, **yaml.safe_load(path.read_text()) | {"final": {"steps": 3, "seeds": [1, 2, 3]}})
    capsys.readouterr()
    assert program.main(["--config", str(longer), "--report_only"]) == 0
    assert "2 runs are still to be done: this is what the others say" in capsys.readouterr().out
    assert program.main(["--config", str(longer), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "final: 6 runs of 3 steps" in printed and "by the 6 runs that are done" in printed
    assert len(forks.commands) == 8


@pytest.mark.slow
@pytest.mark.nightly
def test_a_comparison_that_is_killed_takes_its_run_with_it_and_goes_on(tmp_path: Path) -> None:
    train = TINY["train"] | caches(tmp_path) | {"save_steps": 1}
    path = write(tmp_path, train=train, learning_rates=[0.01], screen=None, final={"steps": 30, "seeds": [1, 2]})
    command = [sys.executable, "launch/compare.py", "--config", str(path)]
    with subprocess.Popen(command, cwd=REPOSITORY, env=cpu_environment()) as killed:
        wait_for(lambda: list(tmp_path.glob("out/runs/*/run/checkpoint-*")))
        killed.kill()
    (run,) = (tmp_path / "out" / "runs").iterdir()
    # The run hears of it, saves and ends: its folder is free again.
    wait_for(lambda: "SIGTERM: stopped after step" in (run / "printed.txt").read_text())
    metrics = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 1 <= len(metrics) < 30
    done = subprocess.run(command, cwd=REPOSITORY, env=cpu_environment(), capture_output=True, text=True, check=True)
    assert "do not tell" in done.stdout or "Take goat" in done.stdout or "Keep it" in done.stdout
    rows = Results(tmp_path / "out" / "results.jsonl").rows()
    assert len(rows) == 4 and {row["status"] for row in rows} == {"finished"}
    assert [step for step, _ in rows[0]["train_curve"]] == list(range(1, 31))


def wait_for(is_there: Callable[[], object]) -> None:
    until = time.monotonic() + 300
    while not is_there():
        assert time.monotonic() < until
        time.sleep(0.05)
