"""Runs of a comparison as forks, which start within a second; some are ended on the way, by a signal or a kill."""

import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.forked_ranks import Run, start


class ForkedChild:
    """What ``workers`` sees of a run; ``watch`` is called with its folder whenever it is looked at."""

    def __init__(self, run: Run, printed: Path, watch: Callable[["ForkedChild", Path], None] | None) -> None:
        self._run, self._printed, self._watch = run, printed, watch

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""
        if self._watch is not None:
            self._watch(self, self._printed.parent / "run")
        (code,) = self._run.codes()
        if code is not None:
            self._printed.write_text((self._run.folder / "rank0.txt").read_text())
        return code

    def send_signal(self, sig: int, /) -> None:
        """Send it a signal."""
        self._run.kill(0, sig)


class Forks:
    """Starts runs, and remembers their commands."""

    def __init__(self, watch: Callable[[ForkedChild, Path], None] | None = None) -> None:
        self.commands: list[Sequence[str]] = []
        self._watch = watch

    def __call__(self, command: Sequence[str], environment: Mapping[str, str], printed: Path) -> ForkedChild:
        """Start ``python -m goat_ds.cli.train …`` as the script that is the same program."""
        self.commands.append(command)
        assert command[1:3] == ["-m", "goat_ds.cli.train"]
        folder = Path(tempfile.mkdtemp(dir=printed.parent))
        run = start(["launch/train.py", *command[3:]], folder=folder, environments=[dict(environment)])
        return ForkedChild(run, printed, self._watch)


def ends_after_checkpoint(step: int, number: int = signal.SIGTERM) -> Callable[[ForkedChild, Path], None]:
    """Return a watch that ends the first run of all that has saved a step."""
    sent: list[Path] = []

    def watch(child: ForkedChild, folder: Path) -> None:
        if not sent and (folder / f"checkpoint-{step}").exists():
            sent.append(folder)
            child.send_signal(number)

    return watch
