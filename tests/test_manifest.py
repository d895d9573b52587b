"""A folder is as it was written, or the file that is not is named."""

import json
from pathlib import Path

import pytest

from goat_ds.manifest import MANIFEST_NAME, damages, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(b"0123456789")
    (tmp_path / "run.json").write_text("{}")
    write_manifest(tmp_path)
    return tmp_path


def test_a_folder_as_written_has_no_damage_and_may_hold_notes_of_the_users(folder: Path) -> None:
    (folder / "notes.txt").write_text("the best one")
    assert list(damages(folder)) == []


def test_tensors_and_settings_that_the_manifest_does_not_name_are_told(folder: Path) -> None:
    added = [folder / "adapter" / "more.json", folder / "state-00002.safetensors"]
    for path in added:
        path.write_text("{}")
    assert list(damages(folder)) == [f"{path} is not in {MANIFEST_NAME}" for path in sorted(added)]
    assert list(damages(folder, below="adapter")) == [f"{added[0]} is not in {MANIFEST_NAME}"]


def test_a_flipped_byte_a_shorter_file_and_a_missing_one_are_told_by_name(folder: Path) -> None:
    weights = folder / "adapter" / "weights"
    weights.write_bytes(b"0123456780")
    assert list(damages(folder)) == [f"{weights} is damaged: its SHA-256 is not the one in {MANIFEST_NAME}"]
    weights.write_bytes(b"012345678")
    (folder / "run.json").unlink()
    assert list(damages(folder)) == [
        f"{weights} has 9 bytes, and {MANIFEST_NAME} says 10",
        f"{folder / 'run.json'} is missing",
    ]
    assert len(list(damages(folder, below="adapter"))) == 1


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"files": {"run.json": {}}}', '{"files": {"run.json": 3}}', '{"files": {"../other": {"bytes": 1}}}'],
)
def test_a_manifest_that_is_none_is_told(folder: Path, content: str) -> None:
    (folder / MANIFEST_NAME).write_text(content)
    (found,) = damages(folder)
    assert f"{folder / MANIFEST_NAME} is damaged" in found


def test_a_manifest_that_is_missing_is_told(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    (found,) = damages(folder)
    assert found == f"{folder / MANIFEST_NAME} cannot be read: No such file or directory"


def test_a_manifest_names_no_file_outside_its_folder(folder: Path) -> None:
    outside = {"files": {"../run.json": {"bytes": 2, "sha256": "0"}}}
    (folder / MANIFEST_NAME).write_text(json.dumps(outside))
    (found,) = damages(folder)
    assert "is damaged" in found
