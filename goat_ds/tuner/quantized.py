"""A frozen linear layer in 4 bits: bitsandbytes' arithmetic on one tensor of bytes.

    [ fp32 statistics | packed weight, two values a byte | 8-bit statistics, with double quantisation ]

One tensor, so that ZeRO-3 shards statistics as it shards weights and gathers both in one message, and one of bytes, so
that no cast of a model's floating-point parameters (bf16 engines cast them all) rounds the statistics.

Shape letters: O out features, I in features, N bytes, S blocks that share a statistic.
"""

import copy
import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from goat_ds.errors import ConfigError, first_line

QUANT_TYPES = ("nf4", "fp4")
"""bitsandbytes' names of the 16 values."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes has kernels for."""
DTYPES = ("float32", "bfloat16", "float16")
"""What 4-bit weights can be made of and unpacked to."""
NESTED_BLOCK_SIZE = 256
"""Statistics that share one of their own, with double quantisation; fixed in bitsandbytes."""
VALUES_AT_ONCE = 2**22
"""How many values are quantised in one call: bitsandbytes' CPU back end needs some 16 bytes of workspace for each."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a weight is packed (NF4 of QLoRA, arXiv 2305.14314)."""

    quant_type: str = "nf4"
    """nf4 or fp4."""
    block_size: int = 64
    """Neighbouring values that share a statistic, their largest magnitude."""
    double_quant: bool = False
    """Whether the statistics are quantised to 8 bits."""

    def sizes(self, num_values: int) -> tuple[int, int, int]:
        """Return the bytes of the fp32 statistics, of the packed weight and of the 8-bit statistics."""
        num_blocks = math.ceil(num_values / self.block_size)
        if not self.double_quant:
            return 4 * num_blocks, math.ceil(num_values / 2), 0
        # The mean that was subtracted, and one statistic for every 256.
        return 4 * (1 + math.ceil(num_blocks / NESTED_BLOCK_SIZE)), math.ceil(num_values / 2), num_blocks

    def __str__(self) -> str:
        double = ", double quantisation" if self.double_quant else ""
        return f"{self.quant_type}, blocks of {self.block_size}{double}"

    def num_bytes(self, num_values: int) -> int:
        """Return the bytes of a packed weight with its statistics."""
        return sum(self.sizes(num_values))


def bitsandbytes() -> ModuleType:
    """Return the library.

    Raises:
        ConfigError: it is not installed, or does not load.
    """
    try:
        import bitsandbytes as library
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"a 4-bit base needs bitsandbytes, which does not load ({first_line(error)}); install bitsandbytes, or "
            "use an unquantised base"
        ) from error
    return library


def check_backend(device: torch.device) -> None:
    """Check that bitsandbytes works on a device, by packing and unpacking a few values there.

    Raises:
        ConfigError: it does not.
    """
    library = bitsandbytes()
    try:
        packing = Packing(double_quant=True)
        values_OI = torch.linspace(-1, 1, 64, device=device).view(1, 64)
        again_OI = unpack(pack(values_OI, packing), packing, shape=(1, 64), dtype=torch.float32)
        works = bool((again_OI - values_OI).abs().max() < 0.2)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise ConfigError(
            f"a 4-bit base: bitsandbytes {library.__version__} has no working back end for {device.type} "
            f"({first_line(error)}); see 'python -m bitsandbytes', or use an unquantised base"
        ) from error
    if not works:
        raise ConfigError(f"a 4-bit base: bitsandbytes {library.__version__} gives wrong values on {device.type}")


@torch.no_grad()
def pack(weight_OI: Tensor, packing: Packing) -> Tensor:
    """Quantise a weight ``[O, I]``; return its bytes ``[N]``, on its device."""
    functional: Any = bitsandbytes().functional
    flat, num_values = weight_OI.reshape(-1), weight_OI.numel()
    bytes_N = torch.empty(packing.num_bytes(num_values), dtype=torch.uint8, device=weight_OI.device)
    wide, packed_N, small_S = bytes_N.split(packing.sizes(num_values))
    wide = wide.view(torch.float32)
    absmax_S = wide if not packing.double_quant else wide.new_empty(len(small_S))
    for first in range(0, num_values, VALUES_AT_ONCE):
        packed, state = functional.quantize_4bit(
            flat[first : first + VALUES_AT_ONCE], blocksize=packing.block_size, quant_type=packing.quant_type
        )
        packed_N[first // 2 :][: len(packed)] = packed.view(-1)
        absmax_S[first // packing.block_size :][: len(state.absmax)] = state.absmax
    if packing.double_quant:
        # As quantize_4bit(compress_statistics=True) does for a weight that is quantised in one call.
        wide[0] = absmax_S.mean()
        small, state2 = functional.quantize_blockwise(absmax_S - wide[0], blocksize=NESTED_BLOCK_SIZE)
        wide[1:] = state2.absmax
        small_S.copy_(small)
    return bytes_N


def unpack(bytes_N: Tensor, packing: Packing, *, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the weight ``[O, I]`` that a layer computes with.

    Args:
        bytes_N: What ``pack`` gave.
        packing: How.
        shape: O and I.
        dtype: float32, bfloat16 or float16; values are multiplied in fp32 and rounded once.
    """
    functional: Any = bitsandbytes().functional
    wide, packed_N, small_S = bytes_N.split(packing.sizes(shape[0] * shape[1]))
    wide = wide.view(torch.float32)
    about = {"shape": torch.Size(shape), "dtype": dtype, "blocksize": packing.block_size}
    state = functional.QuantState(absmax=wide, quant_type=packing.quant_type, **about)
    if packing.double_quant:
        code = code_of_statistics(bytes_N.device)
        state2 = functional.QuantState(absmax=wide[1:], code=code, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)
        state = functional.QuantState(
            absmax=small_S, quant_type=packing.quant_type, offset=wide[0], state2=state2, **about
        )
    weight_OI: Tensor = functional.dequantize_4bit(packed_N.view(-1, 1), state)
    return weight_OI


@cache
def code_of_statistics(device: torch.device) -> Tensor:
    """Return the 256 values that quantised statistics stand for; kept for the life of the process."""
    code: Tensor = bitsandbytes().functional.create_dynamic_map()
    return code.to(device)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose ``weight`` holds bytes ``[N]``, whole or sharded.

    Its backward unpacks the weight again instead of keeping it: what stays between forward and backward is nothing.
    """

    weight: nn.Parameter

    def __init__(
        self,
        bytes_N: Tensor,
        *,
        packing: Packing,
        shape: tuple[int, int],
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        weight_dtype: torch.dtype,
    ) -> None:
        """Make a layer.

        Args:
            bytes_N: What ``pack`` gave.
            packing: How.
            shape: O and I.
            bias: ``[O]`` or None; frozen.
            dtype: Of the model around: that of its activations.
            compute_dtype: What the weight is unpacked to and multiplied in.
            weight_dtype: What the weight was before it was packed.
        """
        # nn.Linear's own would allocate a weight.
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.packing, self.dtype, self.compute_dtype, self.weight_dtype = packing, dtype, compute_dtype, weight_dtype
        self.weight = nn.Parameter(bytes_N, requires_grad=False)
        self.bias = bias  # type: ignore[assignment]

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the weight ``[O, I]`` this layer computes with; its bytes must be whole."""
        shape = (self.out_features, self.in_features)
        return unpack(self.weight.data, self.packing, shape=shape, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ + b`` ``[..., O]`` in the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        product: Tensor = _Product.apply(x.to(self.compute_dtype), bias, self)
        return product.to(x.dtype)

    def extra_repr(self) -> str:
        """Show the packing beside what nn.Linear shows."""
        return f"{super().extra_repr()}, {self.packing}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        # The layer and not its weight: under ZeRO-3 the weight is gone after forward and gathered again for backward.
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight_OI(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.layer.weight_OI(grad.dtype), None, None


def is_4bit(layer: nn.Module) -> bool:
    """Whether a layer's weight is packed: one of ours, or bitsandbytes' own once it has quantised it."""
    if isinstance(layer, QuantizedLinear):
        return True
    return is_linear4bit(layer) and getattr(layer.weight, "quant_state", None) is not None


def is_linear4bit(layer: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' 4-bit one, quantised or not yet."""
    return _is_bitsandbytes(layer, "Linear4bit")


def is_8bit(layer: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' LLM.int8()."""
    return _is_bitsandbytes(layer, "Linear8bitLt")


def _is_bitsandbytes(layer: nn.Module, name: str) -> bool:
    # By name: bitsandbytes need not be installed where no layer is one of its.
    return any(kind.__name__ == name and kind.__module__.startswith("bitsandbytes.") for kind in type(layer).__mro__)


def weight_of_4bit(layer: Any) -> Tensor:
    """Return the fp32 weight ``[O, I]`` that a 4-bit layer stands for; its bytes must be whole.

    Raises:
        ConfigError: bitsandbytes has rearranged the weight for generation, which loses some of its statistics.
    """
    if isinstance(layer, QuantizedLinear):
        return layer.weight_OI(torch.float32)
    state = copy.copy(_trainable_state(layer))
    state.dtype = torch.float32
    weight_OI: Tensor = bitsandbytes().functional.dequantize_4bit(layer.weight.data, state)
    return weight_OI


def _trainable_state(layer: Any) -> Any:
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise ConfigError(
            "a 4-bit weight of the model was rearranged by bitsandbytes when the model generated in eval mode on this "
            "CPU, which rounds its statistics and stops gradients; load the model again and adapt it before that"
        )
    return state


def keep_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes from rearranging 4-bit weights in eval mode, after which no gradient passes through them.

    It does so on CPUs with AVX512-BF16, for faster generation.
    """
    for module in model.modules():
        if is_linear4bit(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def packing_of(layer: Any) -> Packing:
    """Return how a 4-bit layer is packed.

    Raises:
        ConfigError: in a way that ``unpack`` does not know.
    """
    if isinstance(layer, QuantizedLinear):
        return layer.packing
    state = _trainable_state(layer)
    if state.nested:
        code = state.state2.code
        if state.state2.blocksize != NESTED_BLOCK_SIZE or not torch.equal(code, code_of_statistics(code.device)):
            raise ConfigError(
                "the 4-bit base's statistics are quantised in a way that this bitsandbytes does not make; quantise the "
                "unquantised base with load_in_4bit instead"
            )
    return Packing(quant_type=state.quant_type, block_size=state.blocksize, double_quant=state.nested)


def from_bitsandbytes(layer: Any, *, dtype: torch.dtype, compute_dtype: torch.dtype) -> QuantizedLinear:
    """Make a ``QuantizedLinear`` of a ``bitsandbytes.nn.Linear4bit``, bit for bit."""
    packing, state = packing_of(layer), layer.weight.quant_state
    if state.nested:
        parts = [
            torch.cat([state.offset.view(1).float(), state.state2.absmax.float()]),
            layer.weight.data,
            state.absmax,
        ]
    else:
        parts = [state.absmax.float(), layer.weight.data]
    return QuantizedLinear(
        torch.cat([part.contiguous().view(torch.uint8).reshape(-1) for part in parts]),
        packing=packing,
        shape=(layer.out_features, layer.in_features),
        bias=layer.bias,
        dtype=dtype,
        compute_dtype=compute_dtype,
        weight_dtype=state.dtype,
    )
