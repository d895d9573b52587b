"""Nodes that share no disk, and disks that refuse."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launching import losses_of, start_ranks
from tests.train.test_launch import SHORT, TRAIN

Flags = dict[str, Path]


def run_on_two_nodes(root: Path, first: Flags, second: Flags, *, more: Sequence[str] = ()) -> list[tuple[int, str]]:
    """Make a run whose two ranks have places of their own; return how each ended, and what it printed."""
    words = [[*TRAIN[1:], *SHORT, *more, *(str(w) for flag in own.items() for w in flag)] for own in (first, second)]
    command = ["tests/train/one_rank_a_node.py", *map(json.dumps, words)]
    run = start_ranks(command, world_size=2, folder=root / "printed")
    return list(zip(run.wait(seconds=240), run.outputs(), strict=True))


def places(node: Path, **others: Path) -> Flags:
    """Return a node's places: of its own, or others."""
    own = {name: node / name for name in ("output_dir", "svd_cache", "token_cache")}
    return {f"--{name}": path for name, path in (own | others).items()}


@pytest.fixture
def refusing(tmp_path: Path) -> Path:
    """A folder that cannot be made, whoever asks."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache"


@pytest.mark.slow
def test_nodes_that_share_nothing_are_told_so_and_train_even_if_one_cannot_cache_decompositions(
    tmp_path: Path, refusing: Path
) -> None:
    nodes = [tmp_path / "node-1", tmp_path / "node-2"]
    (code, first), (other_code, second) = run_on_two_nodes(
        tmp_path, places(nodes[0]), places(nodes[1], svd_cache=refusing)
    )
    assert (code, other_code) == (0, 0), first + second
    folder = nodes[0] / "output_dir"
    assert f"output_dir ({folder}) is not shared by the 2 nodes: checkpoints are written by the first rank" in first
    assert len(losses_of(folder)) == 4 and not (nodes[1] / "output_dir").exists()
    assert f"{refusing}/" in second and "was not written" in second


@pytest.mark.slow
def test_a_checkpoint_is_found_on_whatever_node_it_lies_and_the_first_rank_may_be_another(tmp_path: Path) -> None:
    nodes = [places(tmp_path / "node-1"), places(tmp_path / "node-2")]
    more = ["--save_steps", "2", "--resume", "auto"]
    for code, text in run_on_two_nodes(tmp_path, *nodes, more=more):
        assert code == 0, text
    folder, other = (node["--output_dir"] for node in nodes)
    losses = losses_of(folder)
    whole = load_file(folder / "checkpoint-4" / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(folder / "checkpoint-4")
    # The same hosts, counted the other way round: the checkpoint lies where the second rank is.
    (code, first), (other_code, second) = run_on_two_nodes(tmp_path, *reversed(nodes), more=more)
    assert (code, other_code) == (0, 0), first + second
    assert f"from {folder / 'checkpoint-2'}" in first
    assert losses_of(other) == losses[2:]
    again = load_file(other / "checkpoint-4" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.equal(again[name]) for name, tensor in whole.items())


@pytest.mark.slow
def test_a_node_that_cannot_keep_tokens_ends_all_and_says_which_flag_helps(tmp_path: Path, refusing: Path) -> None:
    shared = tmp_path / "output_dir"
    ended = run_on_two_nodes(
        tmp_path,
        places(tmp_path / "node-1", output_dir=shared),
        places(tmp_path / "node-2", output_dir=shared, token_cache=refusing),
    )
    assert [code for code, _ in ended] == [2, 2], ended
    assert f"token_cache ({refusing}) cannot be written" in ended[0][1]
    assert not any("is not shared" in text for _, text in ended)
