"""A folder belongs to one run at a time, and to nobody once that run has ended, however it ended."""

import errno
import fcntl
import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from goat_ds.distributed.lock import LOCK_NAME, locked
from goat_ds.errors import ConfigError
from tests.launching import run_program


def test_two_runs_in_one_folder_are_refused_and_one_that_ends_leaves_nothing(tmp_path: Path) -> None:
    with (
        locked(tmp_path, timeout_minutes=0.1),
        pytest.raises(ConfigError, match=rf"output_dir \({tmp_path}\) is in use by another run; end that run first, "),
        locked(tmp_path, timeout_minutes=1e-3),
    ):
        raise AssertionError("two runs hold one folder")
    with locked(tmp_path, timeout_minutes=0.1):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
    assert list(tmp_path.iterdir()) == []


def test_a_run_waits_for_one_that_ends_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "goat_ds")
    begun, waited_for = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path, timeout_minutes=1):
            begun.set()
            assert waited_for.wait(30)

    other = threading.Thread(target=hold)
    other.start()
    assert begun.wait(30)
    threading.Timer(0.2, waited_for.set).start()
    with locked(tmp_path, timeout_minutes=0.1):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
    other.join()
    said = f"output_dir ({tmp_path}) is in use by another run; waiting 3 s for it to end"
    assert caplog.text.count(said) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from goat_ds.distributed.lock import locked
with locked(Path(sys.argv[1]), timeout_minutes=1):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    script, folder = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(KILLED)
    folder.mkdir()
    assert run_program(str(script), str(folder)).returncode == -signal.SIGKILL
    assert [path.name for path in folder.iterdir()] == [LOCK_NAME]
    began = time.monotonic()
    with locked(folder, timeout_minutes=1):
        assert time.monotonic() - began < 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_told_and_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path, timeout_minutes=0.1):
        pass
    said = f"output_dir ({tmp_path}) cannot be locked ({os.strerror(number)}); see that no other run uses it"
    assert caplog.record_tuples == [("goat_ds.distributed.lock", logging.WARNING, said)]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", refuse)
    with (
        pytest.raises(ConfigError, match=rf"output_dir \({tmp_path}\) cannot be written to: Read-only file system; ch"),
        locked(tmp_path, timeout_minutes=0.1),
    ):
        raise AssertionError("the run goes on")


def test_a_lock_file_of_another_user_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK_NAME).write_text("")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "touch", refuse)
    words = rf"output_dir: {tmp_path / LOCK_NAME} belongs to another user \(Permission denied\); if no run uses the"
    with pytest.raises(ConfigError, match=words), locked(tmp_path, timeout_minutes=0.1):
        raise AssertionError("the run goes on")
