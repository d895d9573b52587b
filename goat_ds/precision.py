"""How a dtype is spelled on every command line: ``bf16``, ``fp16``, ``fp32``. What is stored keeps torch's names."""

from enum import StrEnum

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as adapter files and reports store it: bfloat16 and not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


class Precision(StrEnum):
    """Dtype of weights and products; optimizer state and master weights are fp32 in each."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def torch_name(self) -> str:
        """The name that torch, adapter files and reports have for it."""
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[self]

    @property
    def torch_dtype(self) -> torch.dtype:
        """What tensors have."""
        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype
