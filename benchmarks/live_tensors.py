"""Count exactly what a process holds in tensors: by their storages, as operators make them and as they go."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of every storage that an operator on this thread has made and that is still there.

    Args:
        only: Count tensors of this dtype alone.
    """

    def __init__(self, *, only: torch.dtype | None = None) -> None:
        super().__init__()
        self._only = only
        self._bytes: dict[int, int] = {}
        self._is_workspace: set[int] = set()
        self._in_workspace = False
        self.held = self.workspace = self.peak = self.peak_with_workspace = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view of what was there before is nothing new.
        known = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        outputs = func(*args, **(kwargs or {}))
        for tensor in tensors_in(outputs):
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self._bytes.keys() and self._only in (None, tensor.dtype):
                # safetensors gives a tensor a part of a mapped file; nothing else sets storages.
                is_lent = func is torch.ops.aten.set_.source_Storage and is_mapped(tensor)
                self._count(storage, num_bytes=0 if is_lent else storage.nbytes())
        return outputs

    def _count(self, storage: torch.UntypedStorage, *, num_bytes: int) -> None:
        key = storage._cdata
        self._bytes[key] = num_bytes
        if self._in_workspace:
            self._is_workspace.add(key)
        self._add(key, num_bytes)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _add(self, key: int, num_bytes: int) -> None:
        if key in self._is_workspace:
            self.workspace += num_bytes
        else:
            self.held += num_bytes
        self.peak = max(self.peak, self.held)
        self.peak_with_workspace = max(self.peak_with_workspace, self.held + self.workspace)

    def _forget(self, key: int) -> None:
        self._add(key, -self._bytes.pop(key))
        self._is_workspace.discard(key)

    def as_workspace(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Give a function whose tensors, results included, count as workspace."""

        def counted(*args: Any) -> Any:
            self._in_workspace = True
            try:
                return work(*args)
            finally:
                self._in_workspace = False

        return counted


def tensors_in(values: Any) -> list[Tensor]:
    """Give the tensors in nested values that have memory."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's bytes lie in a file that is mapped into memory."""
    address = tensor.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, inode = line.split()[:5]
        first, last = (int(number, 16) for number in place.split("-"))
        if first <= address < last:
            return inode != "0"
    return False
