"""Tensors that stay on disk until they are written: safetensors in, safetensors out, one tensor in memory at a time."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

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


@dataclass(frozen=True)
class StoredTensor:
    """What is known of a tensor before it is read, and how to read it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

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
            return {
                name: StoredTensor(TORCH_DTYPES[s.get_dtype()], tuple(s.get_shape()), partial(_read, path, name))
                for name, s in slices.items()
            }
    except (OSError, SafetensorError, KeyError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error


def _read(path: Path, name: str) -> Tensor:
    # Opened anew for each tensor: an open file keeps every page it has read in memory.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def plan_shards(tensors: Mapping[str, StoredTensor], max_shard_size: str) -> dict[str, list[str]]:
    """Give the names of the tensors of each weights file, in the order of ``tensors``.

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
    with path.open("wb") as file:
        _write_header(ordered, file)
        for name, tensor in ordered.items():
            value = tensor.read()
            if value.dtype != tensor.dtype or tuple(value.shape) != tensor.shape:
                raise AssertionError(f"{name}: planned {tensor.dtype} {tensor.shape}, read {value.dtype} {value.shape}")
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            bar.update(tensor.num_bytes)


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
