"""A file that has not changed is not read again, and one that has is."""

import hashlib
import os
from pathlib import Path

import pytest

from goat_ds.data import known_files
from goat_ds.data.known_files import KnownFiles


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """List the files that are read for their content."""
    found: list[Path] = []

    def reading(path: Path) -> str:
        found.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(known_files, "sha256_of", reading)
    # The files of these tests are moments old.
    monkeypatch.setattr(known_files, "RACY_NS", -(10**12))
    return found


def test_an_unchanged_file_is_read_once_in_all_processes(tmp_path: Path, read: list[Path]) -> None:
    (tmp_path / "a").write_text("a")
    digests = {KnownFiles(tmp_path / "known").digest(tmp_path / "a") for _ in range(3)}
    assert digests == {hashlib.sha256(b"a").hexdigest()} and len(read) == 1


def test_a_file_of_the_same_size_and_time_that_was_written_again_is_read_again(
    tmp_path: Path, read: list[Path]
) -> None:
    path, known = tmp_path / "a", KnownFiles(tmp_path / "known")
    path.write_text("a")
    known.digest(path)
    times = path.stat()
    path.write_text("b")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert known.digest(path) == hashlib.sha256(b"b").hexdigest() and len(read) == 2


def test_a_file_that_is_written_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, known = tmp_path / "a", KnownFiles(tmp_path / "known")
    path.write_text("a")

    def overtaken(_: Path) -> str:
        path.write_text("longer")
        return "of neither"

    monkeypatch.setattr(known_files, "RACY_NS", -(10**12))
    with monkeypatch.context() as patched:
        patched.setattr(known_files, "sha256_of", overtaken)
        known.digest(path)
    assert known.digest(path) == hashlib.sha256(b"longer").hexdigest()


def test_a_file_that_was_new_when_it_was_read_is_read_once_more(
    tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_files, "RACY_NS", 2 * 10**9)
    path, known = tmp_path / "a", KnownFiles(tmp_path / "known")
    path.write_text("a")
    # A second write within one tick of the disk's clock would not show.
    assert known.digest(path) == known.digest(path) and len(read) == 2
    (kept,) = (tmp_path / "known").iterdir()
    later = path.stat().st_mtime_ns + 3 * 10**9
    os.utime(kept, ns=(later, later))
    known.digest(path)
    assert len(read) == 2


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00"])
def test_what_is_kept_in_a_damaged_file_is_not_believed(tmp_path: Path, read: list[Path], content: str) -> None:
    path, known = tmp_path / "a", KnownFiles(tmp_path / "known")
    path.write_text("a")
    known.digest(path)
    (kept,) = (tmp_path / "known").iterdir()
    kept.write_text(content)
    assert known.digest(path) == hashlib.sha256(b"a").hexdigest() and len(read) == 2


def test_where_nothing_can_be_kept_the_file_is_read_each_time(tmp_path: Path, read: list[Path]) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "file").write_text("")
    known = KnownFiles(tmp_path / "file")
    assert known.digest(tmp_path / "a") == known.digest(tmp_path / "a") and len(read) == 2
