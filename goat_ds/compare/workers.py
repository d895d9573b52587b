"""One process a run, so many side by side; what a kill has left half-done goes on, and what is done is not done again.

output_dir/results.jsonl          a line a finished run
output_dir/runs/<id>/run.yaml     its flags, for launch/train.py
output_dir/runs/<id>/printed.txt  what it said
output_dir/runs/<id>/run/         the folder of the run itself, in the end without its checkpoint
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import yaml

from goat_ds.compare.compare_file import CompareSettings
from goat_ds.compare.preparation import Sizes
from goat_ds.compare.results import FAILED, FINISHED, Ended, Results, measured, read_metrics
from goat_ds.compare.search import Outcome
from goat_ds.compare.trials import Trial, config_of, contents_of, id_of, key_of, trial_flags
from goat_ds.distributed import ranks
from goat_ds.errors import Interrupted
from goat_ds.train.config import TrainConfig
from goat_ds.train.resume import settings_of
from goat_ds.train.signals import INTERRUPTED

logger = logging.getLogger(__name__)

LIBRARIES = ("goat_ds", "torch", "transformers", "peft", "deepspeed")
ROOMS_THAT_TRAIN = ("base", "data", "distributed", "method", "train", "tuner", "zero")
LOOK_EVERY_S = 0.1
PATIENCE_S = 60.0
"""Seconds that a run has to save itself when the comparison is asked to end."""
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a run must not find in its environment, or it would wait for ranks that nobody has started."""
PR_SET_PDEATHSIG = 1


class Child(Protocol):
    """A process that trains; ``subprocess.Popen`` is one."""

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""

    def send_signal(self, sig: int, /) -> None:
        """Send it a signal."""


Launch = Callable[[Sequence[str], Mapping[str, str], Path], Child]
"""Starts a command in an environment; what it prints is appended to a file."""


def start_process(command: Sequence[str], environment: Mapping[str, str], printed: Path) -> Child:
    """Start a run that ends, saved, when this process is killed."""
    with printed.open("ab") as file:
        return subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # The terminal's Ctrl-C would reach it as well, and end it without a checkpoint.
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    # Killed by SIGKILL, the comparison can end nothing itself, and started again it would meet its own runs.
    assert _LIBC is not None
    _LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


class Place(NamedTuple):
    """Where a worker's runs compute."""

    environment: dict[str, str]
    device: str


def places(num_workers: int | None, environment: Mapping[str, str]) -> list[Place]:
    """Return the places of so many workers: a GPU for each, or a share of the cores.

    Args:
        num_workers: None: as many as there are GPUs, or one on a CPU.
        environment: That they start from.
    """
    base = {name: value for name, value in environment.items() if name not in OF_A_LAUNCHER}
    if ranks.has_cuda():
        count = torch.cuda.device_count()
        named = environment.get("CUDA_VISIBLE_DEVICES", "")
        visible = [name.strip() for name in named.split(",") if name.strip()] or [str(place) for place in range(count)]
        # More workers than GPUs share them, which fits small models.
        return [
            Place(base | {"CUDA_VISIBLE_DEVICES": visible[n % count]}, torch.cuda.get_device_name(n % count))
            for n in range(num_workers or count)
        ]
    workers = num_workers or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = environment.get("OMP_NUM_THREADS") or str(max(1, cores // workers))
    return [Place(base | {"OMP_NUM_THREADS": threads}, f"{_cpu_name()}, {threads} threads")] * workers


@cache
def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Job:
    """A trial with everything that its run needs."""

    trial: Trial
    config: TrainConfig
    flags: dict[str, Any]
    key: str
    id: str
    folder: Path

    @property
    def output_dir(self) -> Path:
        """Folder of the run itself."""
        return self.folder / "run"


class Running(NamedTuple):
    """A job and its process."""

    job: Job
    child: Child
    place: Place
    began: float


class Workers:
    """Runs trials, or finds what they have left."""

    def __init__(
        self,
        settings: CompareSettings,
        sizes: Sizes,
        results: Results,
        *,
        here: Sequence[Place],
        start: Launch = start_process,
        retry_failed: bool = False,
    ) -> None:
        self.settings, self.sizes, self.results = settings, sizes, results
        self._here, self._start, self._retry_failed = here, start, retry_failed
        self._failed_before = {row["key"] for row in results.rows() if row["status"] == FAILED}
        self.job = cache(self._job)

    def _job(self, trial: Trial) -> Job:
        """Return a trial's settings, name and folder."""
        size = self.sizes[trial.method, trial.point.grid]
        # The name comes from the settings, and the folder, which does not count, from the name.
        nowhere = trial_flags(self.settings, trial, r=size.r, folder=Path("nowhere"))
        key = key_of(config_of(nowhere))
        name = id_of(trial, key)
        folder = self.settings.output_dir / "runs" / name
        flags = trial_flags(self.settings, trial, r=size.r, folder=folder / "run")
        return Job(trial, config_of(flags), flags, key, name, folder)

    def look_up(self, trials: Sequence[Trial]) -> dict[Trial, Outcome]:
        """Return the outcomes of the trials that have one."""
        found = {trial: self._found(self.job(trial)) for trial in trials}
        return {trial: outcome for trial, outcome in found.items() if outcome is not None}

    def run_all(self, trials: Sequence[Trial]) -> dict[Trial, Outcome]:
        """Run the trials that have no outcome yet, and return those of all.

        Raises:
            Interrupted: a run was asked by a signal to end; it goes on when the comparison is started again.
        """
        jobs = {trial: self.job(trial) for trial in trials}
        # Two methods may ask for the same run under two names.
        waiting = deque({job.key: job for job in jobs.values() if self._found(job) is None}.values())
        if waiting:
            stages = ", ".join(dict.fromkeys(job.trial.stage for job in waiting))
            logger.info(f"{stages}: {len(waiting)} of {len(jobs)} runs, {waiting[0].trial.steps} steps each")
        self._work_off(waiting)
        return self.look_up(trials)

    def _found(self, job: Job) -> Outcome | None:
        row = self.results.find(job.key, settings_of(job.config))
        if row is None or (self._retry_failed and row["key"] in self._failed_before):
            return None
        return Outcome(row["final_loss"] if row["status"] == FINISHED else float("inf"), row)

    def _work_off(self, waiting: deque[Job]) -> None:
        free = deque(self._here)
        running: list[Running] = []
        try:
            while waiting or running:
                while waiting and free:
                    running.append(self._begin(waiting.popleft(), free.popleft()))
                time.sleep(LOOK_EVERY_S)
                for run in list(running):
                    if (code := run.child.poll()) is not None:
                        running.remove(run)
                        free.append(run.place)
                        self._record(run, code)
        finally:
            _end(running)

    def _begin(self, job: Job, place: Place) -> Running:
        job.folder.mkdir(parents=True, exist_ok=True)
        path = job.folder / "run.yaml"
        path.write_text(yaml.safe_dump(job.flags, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "goat_ds.cli.train", "--config", str(path)]
        # The output of an earlier process would say of this one what that one has said.
        (job.folder / "printed.txt").unlink(missing_ok=True)
        return Running(
            job, self._start(command, place.environment, job.folder / "printed.txt"), place, time.monotonic()
        )

    def _record(self, run: Running, code: int) -> None:
        job, trial = run.job, run.job.trial
        if code in (INTERRUPTED, -signal.SIGTERM, 128 + signal.SIGTERM):
            raise Interrupted(f"{job.id} was ended by a signal; the same command goes on from there")
        printed = (job.folder / "printed.txt").read_text(encoding="utf-8", errors="replace")
        seconds = time.monotonic() - run.began
        row = {
            "key": job.key,
            "id": job.id,
            "method": trial.method,
            "rate": trial.point.rate,
            "grid": dict(trial.point.grid),
            "stage": trial.stage,
            "steps": trial.steps,
            "seed": trial.seed,
            **measured(trial, Ended(code, read_metrics(job.output_dir / "metrics.jsonl"), printed, seconds)),
            "trained_parameters": self.sizes[trial.method, trial.point.grid].num_trained,
            "device": run.place.device,
            "versions": _versions(),
            "settings": settings_of(job.config),
            "contents": contents_of(job.config),
            "flags": job.flags,
        }
        self.results.append(row)
        self._failed_before.discard(job.key)
        is_finished = row["status"] == FINISHED
        shown = f"held-out loss {row['final_loss']:.4f}" if is_finished else f"{row['status']}: {row['error']}"
        logger.info(f"  {trial.stage}  {trial.method}  {trial.point}  seed {trial.seed}  {shown}  ({seconds:.0f} s)")
        # One that failed may go on from its checkpoint, once what was in its way is mended.
        if row["status"] != FAILED and not self.settings.keep_checkpoints:
            _delete_checkpoints(job.output_dir)


def _delete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a run that has a row: its folder was made by the comparison, and nobody resumes it."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*")]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning(f"{path} could not be deleted: {error.strerror}")


def _end(running: Sequence[Running]) -> None:
    """Let runs save themselves and end, and kill those that do not."""
    for run in running:
        run.child.send_signal(signal.SIGTERM)
    until = time.monotonic() + PATIENCE_S
    while any(run.child.poll() is None for run in running) and time.monotonic() < until:
        time.sleep(LOOK_EVERY_S)
    for run in running:
        if run.child.poll() is None:
            run.child.send_signal(signal.SIGKILL)


@cache
def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **libraries, "code": _code()}


def _code() -> str:
    """Return the state of the rooms that train: between two releases their arithmetic may change."""
    package = Path(__file__).parents[1]
    files = sorted(path for room in ROOMS_THAT_TRAIN for path in (package / room).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
