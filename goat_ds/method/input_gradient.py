"""One gradient of a layer's input, where autograd would write one for each of its readers and then their sum.

The frozen layer and the mixtures beside it read the same ``x``. Writing a gradient ``[T, I]`` for each, reading them
again and writing the sum takes longer than the mixtures' skinny products, so what a mixture adds waits until the frozen
layer's part is there, and is added to it in place.

Shape letters: T tokens, I in features, G whatever the mixture's products sum over.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Product(NamedTuple):
    """A gradient of ``x`` that nobody has multiplied out yet."""

    left_TG: Tensor
    right_GI: Tensor


class SummedGradient:
    """The mixtures' parts of the gradient of one ``x``."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[int, Tensor | Product]] = {}

    def put(self, owner: int, part: Tensor | Product) -> None:
        """Take the part of one mixture, known by a number, in the running backward."""
        self._parts[owner] = (_running_backward(), part)

    def added_to_(self, grad_TI: Tensor) -> None:
        """Add the parts of the running backward in place, and forget all: one of another backward is not its own."""
        for backward, part in self._parts.values():
            if backward != _running_backward():
                continue
            if isinstance(part, Product):
                # Under autocast x may be wider than what the layer computes in.
                grad_TI.addmm_(part.left_TG.to(grad_TI.dtype), part.right_GI.to(grad_TI.dtype))
            else:
                grad_TI.add_(part)
        self._parts.clear()


def _running_backward() -> int:
    number: int = torch._C._current_graph_task_id()
    return number


def sum_gradients(x: Tensor) -> tuple[Tensor, SummedGradient]:
    """Return the ``x`` to call the frozen layer with, and what takes the mixtures' parts of its gradient.

    The frozen layer must make its gradient for nobody else, as a product does. Where its output leads to a loss through
    the mixtures, their backward is over when its own begins.
    """
    summed = SummedGradient()
    return _SumGradients.apply(x, summed), summed


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, summed: SummedGradient) -> Tensor:
        ctx.summed = summed
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        ctx.summed.added_to_(grad.view(-1, grad.shape[-1]))
        return grad, None
