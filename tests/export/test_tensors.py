"""Tensors go from file to file byte for byte, whether they are copied or computed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from goat_ds.errors import ExportError
from goat_ds.export import tensors
from goat_ds.export.tensors import StoredTensor, plan_shards, stored_tensors, write_shards


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Two files with tensors of all widths, an empty one, and one number; return what they hold."""
    torch.manual_seed(0)
    first = {"wide": torch.randn(5, 7), "narrow": torch.randn(3, 11).bfloat16(), "none": torch.zeros(0, 4)}
    second = {"bytes": torch.arange(13, dtype=torch.uint8), "number": torch.tensor(2.5)}
    save_file(first, tmp_path / "first.safetensors")
    save_file(second, tmp_path / "second.safetensors")
    return first | second


def listed(folder: Path) -> dict[str, StoredTensor]:
    return stored_tensors(folder / "first.safetensors") | stored_tensors(folder / "second.safetensors")


@pytest.mark.parametrize("buffer_size", [1, 16, 2**20])
def test_copied_and_computed_tensors_are_written_as_they_are(
    buffer_size: int, stored: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "BUFFER_SIZE", buffer_size)
    found = listed(tmp_path)
    computed = StoredTensor(torch.float32, (7, 5), lambda: stored["wide"].T)
    planned = found | {"transposed": computed}
    write_shards(planned, plan_shards(planned, "5GB"), tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    expected = stored | {"transposed": stored["wide"].T}
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())


def test_a_place_holds_the_bytes_that_are_read(stored: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for name, tensor in listed(tmp_path).items():
        assert tensor.place is not None
        content = tensor.place.path.read_bytes()[tensor.place.start :][: tensor.num_bytes]
        assert content == tensor.read().reshape(-1).view(torch.uint8).numpy().tobytes(), name


@pytest.mark.usefixtures("stored")
def test_a_file_that_ends_while_it_is_copied_is_named(tmp_path: Path) -> None:
    found, path = listed(tmp_path), tmp_path / "first.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExportError, match=r"first.safetensors ended while it was read"):
        write_shards(found, plan_shards(found, "5GB"), tmp_path)
