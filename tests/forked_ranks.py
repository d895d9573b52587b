"""Start scripts within a second, on one rank or many, watch them, and kill them.

Nearly all of a start is imports. A *nursery* is a process that has done them and forks the ranks of a run on request:

    run = start(["launch/train.py", "--ds_config", …], folder=tmp_path, environments=rank_environments(2))
    run.kill(1, signal.SIGTERM)
    assert run.wait() == [75, 75]

A fork is what a new ``python launch/train.py …`` would be: it runs the script as ``__main__``, has the environment it
is given and nothing else, random generators of its own, and no input. Neighbouring
ranks come from two nurseries, because sets of words have another order in every interpreter, and no two ranks may
depend on it.
A *crash plan* lets a rank die by SIGKILL of itself at an exact instant inside a save: when it is about to touch for
the k-th time (open, make, rename, delete, have the disk keep) something in a folder named ``.checkpoint-…``.
A nursery computes nothing, so it has one thread and no process group when it forks. It and all it has started end
with the test process.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from tests.child_environment import REPOSITORY, cpu_environment

TEMPORARY = ".checkpoint-"
"""How the names of folders begin that a checkpoint is written to."""
TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
"""Audit events of Python that count, beside ``os.fsync``, which raises none."""
TOUCHES_FILE = "touches.jsonl"
ALLOCATOR = "jemalloc_bg_thd"
"""Thread that pyarrow's allocator keeps and, by itself, starts again in a fork."""
MODULES = (
    "goat_ds.train.run",
    "goat_ds.export",
    "goat_ds.evaluate",
    "goat_ds.plan",
    # What these import when they are used.
    "bitsandbytes",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "peft.utils.transformers_weight_conversion",
    "sentencepiece.sentencepiece_model_pb2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
)
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


class Rank(NamedTuple):
    """A forked process, and where it was forked."""

    nursery: "Nursery"
    pid: int


class Run:
    """The forked ranks of one run."""

    def __init__(self, ranks: Sequence[Rank], folder: Path) -> None:
        self.ranks, self.folder = ranks, folder
        self._codes: list[int | None] = [None] * len(ranks)

    def codes(self) -> list[int | None]:
        """Return the exit code of each rank, ``-signal`` if one has killed it, None while it runs."""
        for number, rank in enumerate(self.ranks):
            if self._codes[number] is None:
                self._codes[number] = rank.nursery.ask("code", pid=rank.pid)
        return list(self._codes)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank; nothing happens if it has ended."""
        nursery, pid = self.ranks[rank]
        nursery.ask("kill", pid=pid, number=number)

    def kill_all(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to every rank."""
        for rank in range(len(self.ranks)):
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
            # Longer than the two seconds that a rank gives the first one to say what all have found.
            if now - failed > 5 or now - began > seconds or -signal.SIGKILL in codes:
                self.kill_all()
            assert now - began <= seconds, f"still running after {seconds} s: {codes}\n{self.output()}"
            time.sleep(SLOWNESS)
        return [code for code in codes if code is not None]

    def wait_until(self, condition: Callable[[], bool], *, seconds: float = 300) -> None:
        """Wait for something to become true while all ranks are running."""
        began = time.monotonic()
        while not condition():
            assert not any(code is not None for code in self.codes()), self.output()
            assert time.monotonic() - began < seconds, self.output()
            time.sleep(SLOWNESS / 4)

    def outputs(self) -> list[str]:
        """Return what each rank has printed so far."""
        return [(self.folder / f"rank{rank}.txt").read_text() for rank in range(len(self.ranks))]

    def output(self) -> str:
        """Return what all ranks have printed so far."""
        return "\n".join(self.outputs())

    def touches(self) -> list[str]:
        """List what a rank with a crash plan has done to the folders, the touch it died of last."""
        path = self.folder / TOUCHES_FILE
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Nursery:
    """A process that has imported everything and forks runs; they end with it."""

    def __init__(self) -> None:
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_ranks"],
            cwd=REPOSITORY,
            env=cpu_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            text=True,
        )

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
        self._printed.close()

    def ask(self, request: str, **arguments: Any) -> Any:
        """Have the server do something; return its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            print(json.dumps([request, arguments]), file=self._process.stdin, flush=True)
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        self._printed.seek(0)
        raise AssertionError(f"the nursery has ended\n{self._printed.read()}")


@cache
def nursery(number: int) -> Nursery:
    """Return one of the nurseries of this test process; the first call starts it."""
    return Nursery()


def close_nurseries() -> None:
    """End those that there are."""
    for number in range(nursery.cache_info().currsize):
        nursery(number).close()
    nursery.cache_clear()


_numbers = count(1)


def start(
    command: Sequence[str],
    *,
    folder: Path,
    environments: Sequence[Mapping[str, str]],
    crash: CrashPlan | None = None,
    errors_apart: bool = False,
) -> Run:
    """Start a run; returns at once.

    Args:
        command: A script, as a path from the repository, and its command line.
        folder: Where what the ranks print is kept, in a folder of its own for every run.
        environments: Of each rank, whole.
        crash: What one of the ranks does to itself.
        errors_apart: Whether a rank's stderr has a file of its own.
    """
    printed = folder / f"printed-{next(_numbers)}"
    printed.mkdir(parents=True)
    ranks = []
    for number, environment in enumerate(environments):
        home = nursery(number % 2)
        pid = home.ask(
            "fork",
            command=list(command),
            environment=dict(environment),
            output=str(printed / f"rank{number}.txt"),
            errors=str(printed / f"{'errors' if errors_apart else 'rank'}{number}.txt"),
            touches=str(printed / TOUCHES_FILE),
            crash=asdict(crash) if crash and crash.rank == number else None,
        )
        ranks.append(Rank(home, pid))
    return Run(ranks, printed)


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
    _check_threads()
    children: set[int] = set()
    for line in sys.stdin:
        request, arguments = json.loads(line)
        answer: Any = None
        if request == "fork":
            answer = os.fork()
            if answer == 0:
                _be_a_rank(answers, **arguments)
            children.add(answer)
        elif request == "kill" and arguments["pid"] in children:
            # Until it is waited for, its number belongs to no other process.
            os.kill(arguments["pid"], arguments["number"])
        elif request == "code":
            ended, status = os.waitpid(arguments["pid"], os.WNOHANG)
            if ended:
                answer = os.waitstatus_to_exitcode(status)
                children.remove(ended)
        print(json.dumps(answer), file=answers, flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _check_threads() -> None:
    """Check that a fork loses no thread but the allocator's, which a busy machine gives its name late."""
    until = time.monotonic() + 10
    while not (threads := _other_threads()) <= {ALLOCATOR}:
        assert time.monotonic() < until, f"a fork would lose threads: {threads}"
        time.sleep(SLOWNESS)


def _other_threads() -> set[str]:
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    return {task.joinpath("comm").read_text().strip() for task in tasks}


def _import_everything() -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    for name in MODULES:
        importlib.import_module(name)
    # torch locks the folder of a compiled operator by a file. A rank killed just then would leave it there, and every
    # later start on this machine, of whatever run, would wait for its end.
    for builder in (CPUAdamBuilder, ShareMemCommBuilder):
        builder().load()


def _end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _be_a_rank(
    answers: IO[str],
    *,
    command: list[str],
    environment: dict[str, str],
    output: str,
    errors: str,
    touches: str,
    crash: dict[str, Any] | None,
) -> NoReturn:
    """Become what ``python command`` would be; never returns to the server's code."""
    _end_with_parent()
    answers.close()
    for source, target in ((os.devnull, 0), (output, 1), (errors, 2)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if target else os.O_RDONLY
        opened = os.open(source, flags, 0o644)
        os.dup2(opened, target)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    _draw_other_numbers()
    if crash:
        _watch_folders(CrashPlan(**crash), Path(touches))
    sys.argv, script = command, REPOSITORY / command[0]
    sys.path[0] = str(script.parent)
    code: object = None
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    _end(code)


def _end(code: object) -> NoReturn:
    """End as an interpreter does, but for taking all its modules down, which takes longer than many a test."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _draw_other_numbers() -> None:
    """Seed the generators of a fork anew, as those of a new process are: nothing of a run may depend on them."""
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
