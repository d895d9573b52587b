"""Start the ranks of a run within a second, watch them, and kill them: for tests that start a run again and again.

Nearly all of a start is imports. A *nursery* is a process that has done them and forks the ranks of a run on request:

    with Nursery() as nursery:
        run = nursery.start(["--ds_config", …], folder=tmp_path, world_size=2)
        run.kill(1, signal.SIGTERM)
        assert run.wait() == [75, 75]

A *crash plan* lets a rank die by SIGKILL of itself at an exact instant inside a save: when it is about to touch for
the k-th time (open, make, rename, delete, have the disk keep) something in a folder named ``.checkpoint-…``.
The nursery computes nothing, so it has one thread and no process group when it forks. It and all it has started end
with the test process.
"""

import ctypes
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

from tests.launching import REPOSITORY, cpu_environment, free_port

TEMPORARY = ".checkpoint-"
"""How the names of folders begin that a checkpoint is written to."""
TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
"""Audit events of Python that count, beside ``os.fsync``, which raises none."""
TOUCHES_FILE = "touches.jsonl"
ALLOCATOR = "jemalloc_bg_thd"
"""Thread that pyarrow's allocator keeps and, by itself, starts again in a fork."""
SLOWNESS = 0.02
"""Seconds between two looks at the processes."""


@dataclass(frozen=True, kw_only=True)
class CrashPlan:
    """What a rank does to itself when it is about to touch a folder for the ``at``-th time.

    Touches are counted over the life of the process. ``at=0`` never comes: such a plan only counts.
    """

    at: int
    rank: int = 0
    signal: int | None = signal.SIGKILL
    pause: float = 0.0
    """Seconds that this touch lasts, after the signal."""
    prefix: str = TEMPORARY
    """How the name of the folder begins."""


class Run:
    """The forked ranks of one run."""

    def __init__(self, nursery: "Nursery", pids: list[int], folder: Path) -> None:
        self._nursery, self.pids, self.folder = nursery, pids, folder
        self._codes: dict[int, int] = {}

    def codes(self) -> list[int | None]:
        """Give the exit code of each rank, ``-signal`` if one has killed it, None while it runs."""
        self._codes |= {int(pid): code for pid, code in self._nursery.ask("ended", pids=self.pids).items()}
        return [self._codes.get(pid) for pid in self.pids]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank; nothing happens if it has ended."""
        self._nursery.ask("kill", pid=self.pids[rank], number=number)

    def kill_all(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every rank."""
        for rank in range(len(self.pids)):
            self.kill(rank, number)

    def wait(self, *, seconds: float = 300) -> list[int]:
        """Wait for the end of all ranks, as a launcher would: where one has failed, the others get a moment and end.

        Returns:
            The exit codes by rank; of a rank that had to be ended with the others, -SIGKILL.
        """
        began = failed = time.monotonic()
        while None in (codes := self.codes()):
            now = time.monotonic()
            if not any(codes):
                failed = now
            assert now - began < seconds, f"still running after {seconds} s: {codes}\n{self.output()}"
            # Longer than the two seconds that a rank gives the first one to say what all have found.
            if now - failed > 5 or -signal.SIGKILL in codes:
                self.kill_all()
            time.sleep(SLOWNESS)
        return [code for code in codes if code is not None]

    def wait_until(self, condition: Callable[[], bool], *, seconds: float = 300) -> None:
        """Wait for something to become true while all ranks are running."""
        began = time.monotonic()
        while not condition():
            assert not any(code is not None for code in self.codes()), self.output()
            assert time.monotonic() - began < seconds, self.output()
            time.sleep(SLOWNESS / 4)

    def output(self) -> str:
        """Give what all ranks have printed."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("rank*.txt")))

    def touches(self) -> list[str]:
        """List what a rank with a crash plan has done to the folders, the touch it died of last."""
        path = self.folder / TOUCHES_FILE
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Nursery:
    """A process that has imported everything; the runs it has started end with the ``with`` block."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._num_runs = 0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_ranks"],
            cwd=REPOSITORY,
            env=cpu_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def ask(self, request: str, **arguments: Any) -> Any:
        """Let the server do something; give its answer."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([request, arguments]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the nursery has ended"
        return json.loads(answer)

    def start(
        self,
        arguments: Sequence[str],
        *,
        folder: Path,
        world_size: int,
        crash: CrashPlan | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Run:
        """Start a run; returns at once.

        Args:
            arguments: The command line behind ``launch/train.py``.
            folder: Where what the ranks print is kept, in a folder of its own for every run.
            world_size: Number of ranks.
            crash: What one of the ranks does to itself.
            environment: Of the ranks, beside what a launcher sets.
        """
        self._num_runs += 1
        printed = folder / f"printed-{self._num_runs}"
        printed.mkdir(parents=True)
        common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        pids = [
            self.ask(
                "fork",
                arguments=list(arguments),
                environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict(environment or {}),
                printed=str(printed),
                crash=asdict(crash) if crash and crash.rank == rank else None,
            )
            for rank in range(world_size)
        ]
        return Run(self, pids, printed)


# -- the server


def serve() -> None:
    """Answer requests, one a line, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    # What an import prints is no answer.
    os.dup2(2, 1)
    _end_with_parent()
    _import_everything()
    # What the ranks collect is what they have made themselves, and not all these modules each time.
    gc.freeze()
    assert _other_threads() <= {ALLOCATOR}, f"a fork would lose threads: {_other_threads()}"
    children: set[int] = set()
    for line in sys.stdin:
        request, arguments = json.loads(line)
        answer: Any = None
        if request == "fork":
            answer = _fork(**arguments)
            children.add(answer)
        elif request == "kill" and arguments["pid"] in children:
            # Until it is waited for, its number belongs to no other process.
            os.kill(arguments["pid"], arguments["number"])
        elif request == "ended":
            answer = _ended(children & set(arguments["pids"]))
            children -= answer.keys()
        print(json.dumps(answer), file=answers, flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _ended(pids: set[int]) -> dict[int, int]:
    waited = (os.waitpid(pid, os.WNOHANG) for pid in pids)
    return {pid: os.waitstatus_to_exitcode(status) for pid, status in waited if pid}


def _other_threads() -> set[str]:
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    return {task.joinpath("comm").read_text().strip() for task in tasks}


def _import_everything() -> None:
    import bitsandbytes  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    import goat_ds.train.run  # noqa: F401

    # torch locks the folder of a compiled operator by a file. A rank killed just then would leave it there, and every
    # later start on this machine, of whatever run, would wait for its end.
    for builder in (CPUAdamBuilder, ShareMemCommBuilder):
        builder().load()


def _end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _fork(arguments: list[str], environment: dict[str, str], printed: str, crash: dict[str, Any] | None) -> int:
    pid = os.fork()
    if pid == 0:
        _be_a_rank(arguments, environment, Path(printed), CrashPlan(**crash) if crash else None)
    return pid


def _be_a_rank(arguments: list[str], environment: dict[str, str], printed: Path, crash: CrashPlan | None) -> NoReturn:
    """Become what a launcher would have started; never returns to the server's code."""
    code = 1
    try:
        _end_with_parent()
        os.environ |= environment
        output = os.open(printed / f"rank{environment['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        _draw_other_numbers()
        if crash:
            _watch_folders(crash, printed / TOUCHES_FILE)
        from goat_ds.train.run import main

        main(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: the server's loop stands below on this stack.
        os._exit(code)


def _draw_other_numbers() -> None:
    """Give a fork generators of its own, as a process has that was started: nothing of a run may depend on them."""
    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    torch.manual_seed(random.getrandbits(63))
    torch.set_num_threads(1)


def _watch_folders(plan: CrashPlan, told: Path) -> None:
    """Count what this process does to the folders of a plan; act as planned just before it is done."""
    record = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    num_touches = 0

    def touch(event: str, path: str) -> None:
        nonlocal num_touches
        num_touches += 1
        os.write(record, (json.dumps(f"{event} {path}") + "\n").encode())
        if num_touches == plan.at:
            if plan.signal is not None:
                os.kill(os.getpid(), plan.signal)
            time.sleep(plan.pause)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in TOUCHES and _is_within(arguments[0], plan.prefix):
            touch(event, os.fsdecode(arguments[0]))  # type: ignore[arg-type]

    sync = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if _is_within(path, plan.prefix):
            touch("os.fsync", path)
        sync(descriptor)

    sys.addaudithook(audit)
    os.fsync = fsync


def _is_within(path: object, prefix: str) -> bool:
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    return any(part.startswith(prefix) for part in Path(os.fsdecode(path)).parts)


if __name__ == "__main__":
    serve()
