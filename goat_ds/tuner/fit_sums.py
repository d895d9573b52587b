"""From routed experts to dense ones: gather what the fit needs while a model runs, and make the layers that result.

The sums of a layer hold ``I x I`` numbers, so they are gathered for as many layers at a time as memory is allowed,
and once for layers that see the same input, such as q, k and v.

Shape letters: T tokens, I in features, R gated ranks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError
from goat_ds.method.dense_fit import FitSums, add_input_sums_, mixture_sums
from goat_ds.tuner.config import GoatConfig
from goat_ds.tuner.layer import GoatExperts

FIT_SUMS_BYTES = 4 * 2**30
"""How much memory the sums of layers may take at a time; one input is always taken."""


def dense_goat_config(config: GoatConfig) -> GoatConfig:
    """Return the settings of the dense form of an adapter."""
    values = config.to_dict() | {"routed": False, "deferred": True}
    return type(config)(**values)


def fit_sums_in_passes(
    layers: Mapping[str, GoatExperts],
    run: Callable[[], None],
    *,
    max_bytes: int = FIT_SUMS_BYTES,
    counts: Callable[[], bool] = lambda: True,
) -> Iterator[dict[str, FitSums]]:
    """Yield the sums of all layers, some at a time; a yielded dictionary is emptied when the next is asked for.

    Args:
        layers: The routed experts by name.
        run: Runs the model over the tokens, without gradients. Called once for every yield, the same each time. Under
            ZeRO-3 it is a collective, and so is each yield.
        max_bytes: What the sums of one pass may take, unless one input takes more.
        counts: Whether the tokens now in the layers count; those of a filler do not.
    """
    waiting = dict(layers)
    while waiting:
        with _gathering(waiting, max_bytes, counts) as gatherer:
            run()
        if not gatherer.sums:
            raise ConfigError(
                f"no token passes through {', '.join(sorted(waiting)[:8])}, so they have no dense form; put "
                "layers that the model does not use in exclude_modules"
            )
        for name in gatherer.sums:
            del waiting[name]
        yield gatherer.sums
        gatherer.sums.clear()


class _Gatherer:
    """Adds up sums in the order in which layers run; layers that no longer fit wait for another pass."""

    def __init__(self, max_bytes: int, counts: Callable[[], bool]) -> None:
        self.sums: dict[str, FitSums] = {}
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._counts = counts
        self._left_out: set[str] = set()
        self._input: Tensor | None = None
        self._x_TI: Tensor | None = None
        self._reader = ""
        self._reader_of: dict[str, str] = {}

    def see(self, name: str, experts: Any, args: tuple[Any, ...]) -> None:
        """Take in what a layer is about to compute with; a forward pre-hook."""
        x = args[0]
        shares = x is self._input
        if not shares:
            self._input, self._x_TI, self._reader = x, None, name
        if name in self._left_out or not self._has_place(name, experts):
            self._left_out.add(name)
            return
        if not shares or self._x_TI is None:
            self._x_TI = self._real_tokens(x.detach().reshape(-1, x.shape[-1]), experts)
        x_TI = self._x_TI
        if name not in self.sums:
            self._make_place(name, x_TI, experts)
        elif self._reader_of[name] != self._reader:
            raise AssertionError(f"{name} shared its input with {self._reader_of[name]}, and does not any more")
        sums = self.sums[name]
        if not shares or self._reader == name:
            add_input_sums_(sums.xx_II, x_TI)
        hx_RI, hh_RR, gates_E = mixture_sums(x_TI, experts.factors(), experts.settings())
        sums.hx_RI += hx_RI
        sums.hh_RR += hh_RR
        sums.gates_E += gates_E
        sums.num_tokens += len(x_TI)

    def _real_tokens(self, x_TI: Tensor, experts: GoatExperts) -> Tensor:
        """Return the tokens that count, in fp32 or better: widened once for all layers that see them."""
        wide_TI = x_TI.to(torch.promote_types(x_TI.dtype, torch.float32))
        if not self._counts():
            return wide_TI[:0]
        mask_T = experts.signal.mask_of(len(x_TI))
        return wide_TI if mask_T is None else wide_TI[mask_T.bool()]

    def _has_place(self, name: str, experts: GoatExperts) -> bool:
        if name in self.sums or self._reader in self.sums:
            return True
        if self._left_out:
            # In order, so that layers with the same input are in the same pass.
            return False
        return not self.sums or self._num_bytes + 4 * experts.in_features**2 <= self._max_bytes

    def _make_place(self, name: str, x_TI: Tensor, experts: GoatExperts) -> None:
        size_i, size_r = experts.in_features, experts.config.r * (2 if experts.config.takes_gates else 1)
        zeros = partial(torch.zeros, dtype=x_TI.dtype, device=x_TI.device)
        if self._reader in self.sums:
            xx_II = self.sums[self._reader].xx_II
        else:
            xx_II = zeros(size_i, size_i)
            self._num_bytes += xx_II.numel() * xx_II.element_size()
        self._reader_of[name] = self._reader
        self.sums[name] = FitSums(
            xx_II=xx_II,
            hx_RI=zeros(size_r, size_i),
            hh_RR=zeros(size_r, size_r),
            gates_E=zeros(experts.config.num_experts),
            num_tokens=0,
        )

    def forget_input(self) -> None:
        """Let go of the last activation."""
        self._input = self._x_TI = None


@contextmanager
def _gathering(layers: Mapping[str, GoatExperts], max_bytes: int, counts: Callable[[], bool]) -> Iterator[_Gatherer]:
    gatherer = _Gatherer(max_bytes, counts)
    # Pre-hooks run in the order they were added: under ZeRO-3 the engine's own has gathered the experts by then.
    hooks = [experts.register_forward_pre_hook(partial(_see, gatherer, name)) for name, experts in layers.items()]
    try:
        with torch.no_grad():
            yield gatherer
    finally:
        gatherer.forget_input()
        for hook in hooks:
            hook.remove()


def _see(gatherer: _Gatherer, name: str, experts: nn.Module, args: tuple[Any, ...]) -> None:
    gatherer.see(name, experts, args)


def by_input(fit_sums: Mapping[str, FitSums]) -> Iterator[list[str]]:
    """Yield the names of layers that share an input, and so one ``xx_II``."""
    sharing: dict[int, list[str]] = defaultdict(list)
    for name, layer_sums in fit_sums.items():
        sharing[id(layer_sums.xx_II)].append(name)
    yield from sharing.values()


def add_up_on(owner: int, fit_sums: Sequence[FitSums]) -> None:
    """Add the sums of layers with one input up over all ranks, for one of them; the count for all. A collective."""
    num_tokens = int(ranks.sum_over_ranks(torch.tensor(fit_sums[0].num_tokens)))
    ranks.sum_on_(owner, fit_sums[0].xx_II)
    for layer_sums in fit_sums:
        for part in (layer_sums.hx_RI, layer_sums.hh_RR, layer_sums.gates_E):
            ranks.sum_on_(owner, part)
        layer_sums.num_tokens = num_tokens
