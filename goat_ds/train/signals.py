"""Let SIGTERM and SIGUSR1 end a run between two steps, saved: clusters send them before they take a node away."""

import os
import signal
import threading
import time

from goat_ds.distributed import ranks

INTERRUPTED = 75
"""Exit code of a run that a signal has ended and that can be started again (EX_TEMPFAIL of sysexits.h)."""
ECHO_S = 1.0
"""Seconds within which a SIGTERM is the same again: a cluster sends one to every process, and launchers pass it on."""


class Signals:
    """What this process has been sent.

    Before the first step there is nothing to save, so the process ends at once, as if it had not listened. After that
    the running step ends, the run saves, and leaves. A second SIGTERM ends the process at once; checkpoints appear
    whole or not at all.
    """

    def __init__(self) -> None:
        self.saves = False
        """Whether the run has begun, so that there is something to save."""
        self.leaves = False
        """Whether it has saved and is leaving: nothing more can be asked of it."""
        self._received: signal.Signals | None = None
        self._terminated_at: float | None = None

    def listen(self) -> None:
        """Take the signals from here on."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Python runs handlers on the main thread between two of its instructions, and a rank may wait for the others
        # in a collective for long. The numbers of all signals come through the pipe at once.
        signal.set_wakeup_fd(writer)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._hear, args=(reader,), name="signals", daemon=True).start()

    def asked(self) -> str | None:
        """Return the name of a signal that some rank has received, or None. A collective."""
        received = ranks.max_over_ranks(float(self._received or 0))
        return signal.Signals(int(received)).name if received else None

    def _hear(self, reader: int) -> None:
        while numbers := os.read(reader, 1):
            self._receive(numbers[0])

    def _receive(self, number: int) -> None:
        if number not in (signal.SIGTERM, signal.SIGUSR1) or self.leaves:
            return
        if number == signal.SIGTERM:
            now = time.monotonic()
            if self._terminated_at is not None and now - self._terminated_at > ECHO_S:
                _leave(number, "a second SIGTERM: leaving at once")
            self._terminated_at = self._terminated_at or now
        self._received = signal.Signals(number)
        if not self.saves:
            _leave(number, f"{self._received.name} before the first step: there is nothing to save")


def _leave(number: int, why: str) -> None:
    os.write(2, f"\n{why}\n".encode())
    os._exit(128 + number)
