"""Count the bytes of tensors that are there: exactly, by their storages, whatever the allocator does with memory."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of every storage that an operator on this thread has made inside, and that is still there.

    ``held`` are those of now, ``peak`` those of the worst moment. What a mapped file lends costs a process no memory
    and is not counted, nor is workspace inside of a library's operator, which is no tensor.

    Args:
        only: Count tensors of this dtype alone.
    """

    def __init__(self, *, only: torch.dtype | None = None) -> None:
        super().__init__()
        self._only = only
        self._bytes: dict[int, int] = {}
        self._is_counting = True
        self.held = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view of what was there before is nothing new.
        known = {tensor.untyped_storage()._cdata for tensor in _tensors_in((args, kwargs))}
        outputs = func(*args, **(kwargs or {}))
        for tensor in _tensors_in(outputs):
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self._bytes.keys() and self._only in (None, tensor.dtype):
                # safetensors gives a tensor a part of a mapped file; nothing else sets storages.
                is_lent = func is torch.ops.aten.set_.source_Storage and is_mapped(tensor)
                self._count(storage, num_bytes=0 if is_lent or not self._is_counting else storage.nbytes())
        return outputs

    def without(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose tensors, results included, are not counted."""

        def uncounted(*args: Any) -> Any:
            self._is_counting = False
            try:
                return work(*args)
            finally:
                self._is_counting = True

        return uncounted

    def _count(self, storage: torch.UntypedStorage, *, num_bytes: int) -> None:
        self._bytes[storage._cdata] = num_bytes
        self.held += num_bytes
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def _forget(self, key: int) -> None:
        self.held -= self._bytes.pop(key)


def _tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in nested values that have memory."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.device.type != "meta"]


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's bytes lie in a file that is mapped into memory."""
    address = tensor.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, inode = line.split()[:5]
        first, last = (int(number, 16) for number in place.split("-"))
        if first <= address < last:
            return inode != "0"
    return False
