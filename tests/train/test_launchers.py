"""The launchers that users have, and the launch files that are shipped, run as far as one machine can."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from tests.child_environment import REPOSITORY, cpu_environment, free_port
from tests.launching import losses_of, run_cold, run_ranks
from tests.train.test_launch import SHORT, TRAIN, caches

FLAGS = ["--ds_config", "ds_configs/zero3.json", *SHORT]
BIN = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def launcher(name: str) -> list[str]:
    """Return the words before a script that have a launcher start it on two ranks."""
    port = str(free_port())
    if name == "deepspeed":
        return ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    # Without "--" torchrun takes our --r for an abbreviation of one of its own flags.
    return ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "--"]


@pytest.fixture(scope="module")
def unlaunched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the demo on two ranks without a launcher; its folder."""
    root = tmp_path_factory.mktemp("unlaunched")
    run_ranks([*TRAIN, *SHORT, *caches(root), "--output_dir", str(root / "run")], world_size=2)
    return root / "run"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.nightly)])
def test_a_launcher_runs_the_same_program(name: str, unlaunched: Path, tmp_path: Path) -> None:
    flags = [*TRAIN, *SHORT, *caches(unlaunched.parent), "--output_dir", str(tmp_path / "run")]
    done = run_cold(*launcher(name), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(unlaunched), abs=1e-6)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_rank_that_dies_ends_all_ranks_within_thirty_seconds(tmp_path: Path) -> None:
    long_run = ["--max_steps", "100000", "--output_dir", str(tmp_path / "run"), *caches(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, *launcher("deepspeed"), *TRAIN, *SHORT[2:], *long_run],
        env=cpu_environment(),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
        victim = rank_processes(process.pid)[1]
        os.kill(victim, signal.SIGKILL)
        died = time.monotonic()
        process.communicate(timeout=30)
        assert process.returncode != 0
        assert time.monotonic() - died < 30
        assert not rank_processes(process.pid)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], *, seconds: float = 240) -> None:
    began = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - began < seconds
        time.sleep(0.5)


def rank_processes(session: int) -> list[int]:
    """List the processes of a session that run ``launch/train.py --local_rank``, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            in_session = entry.name.isdigit() and os.getsid(int(entry.name)) == session
        except (OSError, ValueError):
            # It ended while being looked at, or is no process.
            continue
        ranks = [word for word in words if word.startswith(b"--local_rank=")]
        if in_session and ranks and b"launch/train.py" in words and b"deepspeed.launcher.launch" not in words:
            found[ranks[0]] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def test_deepspeed_reads_the_hostfile() -> None:
    assert dict(fetch_hostfile(str(REPOSITORY / "launch" / "hostfile"))) == {"node-1": 8, "node-2": 8}


def torchrun_node(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Have one node with two ranks make a run."""
    return subprocess.run(
        ["launch/torchrun_node.sh", *FLAGS, *flags],
        env=cpu_environment(PATH=BIN, FIRST_NODE="localhost", RANKS="2", PORT=str(free_port()), **environment),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.nightly
@pytest.mark.slow
def test_a_node_of_torchrun_trains(tmp_path: Path) -> None:
    done = torchrun_node(*caches(tmp_path), "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert len(losses_of(tmp_path / "run")) == 4


@pytest.mark.nightly
@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_find_each_other_every_time(tmp_path: Path) -> None:
    # Bad input is found by all of them together, after they have met.
    flags = [*caches(tmp_path), "--output_dir", str(tmp_path / "run"), "--max_length", "3"]
    done = torchrun_node(*flags, RESTARTS="4")
    assert done.returncode == 1
    for name in ("data", "eval_data"):
        assert len(re.findall(rf"^{name} \(.*\): no record is left to train on", done.stderr, re.MULTILINE)) == 5, (
            done.stderr
        )


@pytest.mark.nightly
@pytest.mark.slow
def test_a_rank_that_is_killed_under_torchrun_is_started_again_and_the_run_ends_by_itself(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*FLAGS, *caches(tmp_path), "--max_steps", "60", "--save_steps", "10", "--output_dir", str(run)]
    with (tmp_path / "out").open("w") as out:
        job = subprocess.Popen(
            ["launch/torchrun_node.sh", *flags],
            env=cpu_environment(PATH=BIN, FIRST_NODE="localhost", RANKS="2", PORT=str(free_port())),
            cwd=REPOSITORY,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        wait_until(lambda: (run / "checkpoint-10").exists(), job)
        victim = int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[-1])
        os.kill(victim, signal.SIGKILL)
        assert job.wait(timeout=300) == 0, (tmp_path / "out").read_text()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert re.search(rf"from {run}/checkpoint-[1-5]0,", (tmp_path / "out").read_text())
    assert len(losses_of(run)) == 60 and (run / "checkpoint-60").exists()


def slurm_environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """Put stand-ins for SLURM's commands first on the path; return the environment of a job of two tasks."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    commands = {
        "srun": f'exec {sys.executable} {REPOSITORY}/tests/train/fake_srun.py "$@"',
        "scontrol": '[ "$1" = show ] && echo 127.0.0.1 && exit\necho scontrol "$@" >> "$SLURM_RECORD"',
    }
    for name, line in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "node-1", "SLURM_NTASKS": "2"}
    return cpu_environment(PATH=f"{tmp_path}/bin:{BIN}", SLURM_RECORD=str(tmp_path / "record"), **job, **more)


@pytest.mark.parametrize(
    ("code", "expected", "requeued"), [(0, 0, False), (75, 0, True), (2, 2, False), (137, 137, False)]
)
def test_slurm_queues_the_job_again_where_it_was_interrupted_and_saved(
    code: int, expected: int, requeued: bool, tmp_path: Path
) -> None:
    environment = slurm_environment(tmp_path, FAKE_CODE=str(code))
    done = subprocess.run(["launch/slurm.sbatch", "--r", "8"], env=environment, cwd=REPOSITORY, check=False)
    assert done.returncode == expected
    record = (tmp_path / "record").read_text()
    assert record.startswith("srun --kill-on-bad-exit=1 ") and " train --r 8\n" in record
    assert record.endswith(f"scontrol requeue {environment['SLURM_JOB_ID']}\n") is requeued


@pytest.mark.nightly
@pytest.mark.slow
def test_a_slurm_job_whose_time_is_over_is_saved_queued_again_and_then_goes_on(tmp_path: Path) -> None:
    environment, run, record = slurm_environment(tmp_path), tmp_path / "run", tmp_path / "record"
    num_steps = ["--max_steps", "60", "--output_dir", str(run)]
    command = ["launch/slurm.sbatch", *FLAGS, *caches(tmp_path), *num_steps]
    for interrupted in (True, False):
        with (tmp_path / "out").open("a") as out:
            job = subprocess.Popen(
                command, env=environment, cwd=REPOSITORY, stdout=out, stderr=out, text=True, start_new_session=True
            )
        try:
            if interrupted:
                wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses_of(run)) > 2, job)
                os.kill(srun_of(job.pid), signal.SIGUSR1)
            assert job.wait(timeout=300) == 0, (tmp_path / "out").read_text()
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
        assert (f"scontrol requeue {environment['SLURM_JOB_ID']}" in record.read_text()) is interrupted
        assert (run / "checkpoint-60").exists() is not interrupted
        record.write_text("")
    assert len(losses_of(run)) == 60


def srun_of(script: int) -> int:
    """Return the process that the job's script waits for."""
    return int(Path(f"/proc/{script}/task/{script}/children").read_text().split()[-1])
