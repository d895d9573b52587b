"""Tensors that stay on disk until they are written: safetensors in, safetensors out, one tensor in memory at a time."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from goat_ds.errors import ConfigError, ExportError

INDEX_NAME = "model.safetensors.index.json"

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


BUFFER_SIZE = 2**20
"""Bytes that are copied at a time: they stay in the processor's cache on their way."""


class Place(NamedTuple):
    """Where a tensor's bytes lie."""

    path: Path
    start: int
    """Of its first byte, in the file."""


@dataclass(frozen=True)
class StoredTensor:
    """What is known of a tensor before it is read, and how to read it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    place: Place | None = None
    """Where its bytes lie as ``read`` gives them; None: they are computed."""

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a safetensors file by name, without reading them.

    Raises:
        ExportError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            places = _places(path)
            return {
                name: StoredTensor(
                    TORCH_DTYPES[s.get_dtype()], tuple(s.get_shape()), partial(_read, path, name), places[name]
                )
                for name, s in slices.items()
            }
    except (OSError, SafetensorError, KeyError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error


def _places(path: Path) -> dict[str, Place]:
    # The library has found the file whole, and does not say where in it a tensor is.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    entries = ((name, entry) for name, entry in header.items() if name != "__metadata__")
    return {name: Place(path, 8 + length + entry["data_offsets"][0]) for name, entry in entries}


def _read(path: Path, name: str) -> Tensor:
    # Opened anew for each tensor: an open file keeps every page it has read in memory.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def read_unmapped(tensor: StoredTensor) -> Tensor:
    """Return a tensor in memory of its own: faulting in the pages of a mapped file takes longer than reading it."""
    if tensor.place is None:
        return tensor.read()
    content = torch.empty(tensor.num_bytes, dtype=torch.uint8)
    with tensor.place.path.open("rb", buffering=0) as file:
        file.seek(tensor.place.start)
        if file.readinto(content.numpy().data) != tensor.num_bytes:
            raise ExportError(f"{tensor.place.path} ends before its tensors do")
    return content.view(tensor.dtype).view(tensor.shape)


def plan_shards(tensors: Mapping[str, StoredTensor], max_shard_size: str) -> dict[str, list[str]]:
    """Return the names of the tensors of each weights file, in the order of ``tensors``.

    Args:
        tensors: What will be written.
        max_shard_size: Bytes of one file, such as ``5GB``; a larger tensor has a file for itself.

    Raises:
        ConfigError: ``max_shard_size`` is not a size.
    """
    try:
        split = split_state_dict_into_shards_factory(
            tensors,  # type: ignore[arg-type]
            get_storage_size=lambda tensor: tensor.num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError:
        raise ConfigError(f"max_shard_size ({max_shard_size}) is not a size; write it as 500MB or 5GB") from None
    return split.filename_to_tensors


def write_shards(tensors: Mapping[str, StoredTensor], shards: Mapping[str, list[str]], folder: Path) -> None:
    """Write the weights files that ``plan_shards`` laid out, and their index where there are several."""
    with tqdm(total=sum(t.num_bytes for t in tensors.values()), unit="B", unit_scale=True, desc="weights") as bar:
        for filename, names in shards.items():
            _write_file({name: tensors[name] for name in names}, folder / filename, bar)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors.values())},
            "weight_map": {name: filename for filename, names in shards.items() for name in names},
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(tensors: Mapping[str, StoredTensor], path: Path, bar: "tqdm[None]") -> None:
    # The library's own writer wants all tensors of a file in memory. The format is a length, a JSON header and the
    # data; wide dtypes first keeps every tensor aligned (https://github.com/huggingface/safetensors#format).
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    buffer = memoryview(bytearray(BUFFER_SIZE))
    with path.open("wb") as file:
        _write_header(ordered, file)
        for name, tensor in ordered.items():
            if tensor.place is None:
                _write_value(name, tensor, file)
            else:
                _copy_bytes(tensor.place, tensor.num_bytes, file, buffer)
            bar.update(tensor.num_bytes)


def _write_value(name: str, tensor: StoredTensor, file: BinaryIO) -> None:
    value = tensor.read()
    if value.dtype != tensor.dtype or tuple(value.shape) != tensor.shape:
        raise AssertionError(f"{name}: planned {tensor.dtype} {tensor.shape}, read {value.dtype} {value.shape}")
    file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _copy_bytes(place: Place, num_bytes: int, file: BinaryIO, buffer: memoryview) -> None:
    # Through a small buffer and not from a mapped file, of which every page would be faulted in and out again.
    with place.path.open("rb", buffering=0) as source:
        source.seek(place.start)
        while num_bytes:
            num_read = source.readinto(buffer[:num_bytes])
            if not num_read:
                raise ExportError(f"{place.path} ended while it was read")
            file.write(buffer[:num_read])
            num_bytes -= num_read


def _write_header(tensors: Mapping[str, StoredTensor], file: BinaryIO) -> None:
    dtype_names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.num_bytes
        header[name] = {"dtype": dtype_names[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
