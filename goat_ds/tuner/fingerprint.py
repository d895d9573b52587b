"""Recognise a base by its content: a hash of a few values of every adapted layer's unquantised weight.

A few values suffice, because whatever was trained differs from its origin nearly everywhere, and because they can be
read from the files of a base of any size in seconds.

Shape letters: O out features, I in features, N sampled values.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goat_ds.precision import dtype_name

NUM_VALUES = 64
"""Values of one layer that are looked at."""


class LayerSample(NamedTuple):
    """What one layer contributes."""

    shape: tuple[int, int]
    """O and I."""
    values_N: Tensor
    """On the CPU, in the weight's dtype."""


class BaseFingerprint(NamedTuple):
    """The content of a base, as ``adapter_config.json`` holds it."""

    dtype: str
    """That values were rounded to: of the weights in training, the narrowest where there are several."""
    sha256: str
    """Of paths, shapes and values."""

    @classmethod
    def problems(cls, values: Any) -> Iterator[str]:
        """Yield why ``values`` is not a fingerprint's fields by name."""
        if not isinstance(values, dict) or values.keys() != set(cls._fields):
            yield f"base_fingerprint ({values}) must be null or hold {', '.join(cls._fields)}"
        elif not isinstance(getattr(torch, str(values["dtype"]), None), torch.dtype):
            yield f"base_fingerprint ({values}): dtype must be one of torch's"


def sample_layer(weight_OI: Tensor) -> LayerSample:
    """Take the values of a whole weight that count: evenly strided from the first to the last, row after row."""
    num_rows, num_columns = weight_OI.shape
    # The last place is not NUM_VALUES strides away: the stride would often be whole rows, and all values in one column.
    places = [step * (num_rows * num_columns - 1) // (NUM_VALUES - 1) for step in range(NUM_VALUES)]
    rows, columns = zip(*(divmod(place, num_columns) for place in places), strict=True)
    return LayerSample((num_rows, num_columns), weight_OI.detach()[list(rows), list(columns)].cpu())


def fingerprint(samples: Mapping[str, LayerSample], *, dtype: str | None = None) -> BaseFingerprint:
    """Combine the samples of all adapted layers, in any order.

    Args:
        samples: By the layer's path in the base.
        dtype: That values are rounded to first; None: the narrowest of the samples.
    """
    narrowest = min((sample.values_N.dtype for sample in samples.values()), key=lambda found: found.itemsize)
    dtype = dtype or dtype_name(narrowest)
    digest = hashlib.sha256()
    for path, (shape, values_N) in sorted(samples.items()):
        digest.update(f"{path} {shape[0]} {shape[1]} ".encode())
        digest.update(values_N.to(getattr(torch, dtype)).to(torch.float32).numpy().astype("<f4").tobytes())
    return BaseFingerprint(dtype, digest.hexdigest())
