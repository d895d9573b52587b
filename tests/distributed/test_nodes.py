"""What the ranks of a run find out about the nodes they are on."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launching import run_ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    for name in ("same", "disk-0", "disk-1"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="module")
def told(root: Path) -> list[dict[str, Any]]:
    """What each of four ranks on two nodes answers."""
    printed = run_ranks(["tests/distributed/nodes_on_ranks.py", str(root)], world_size=4)
    return [json.loads(text.splitlines()[-1]) for text in printed]


@pytest.mark.slow
def test_all_ranks_know_how_many_ranks_each_node_has(told: list[dict[str, Any]]) -> None:
    assert [rank["sizes"] for rank in told] == [[3, 1]] * 4


@pytest.mark.slow
def test_a_folder_is_shared_where_every_node_sees_what_the_first_rank_wrote(told: list[dict[str, Any]]) -> None:
    assert all(rank["same"] for rank in told)
    assert not any(rank["own"] or rank["absent"] for rank in told)


@pytest.mark.slow
def test_asking_leaves_nothing_behind(told: list[dict[str, Any]], root: Path) -> None:
    assert told and [path for path in root.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_ends_all_ranks(told: list[dict[str, Any]]) -> None:
    assert {rank["error"].partition(":")[0] for rank in told} == {"rank 0 failed"}
    assert all("nowhere" in rank["error"] for rank in told)
