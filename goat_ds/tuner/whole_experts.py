"""Experts that are whole copies of the weight, each held as its difference from the frozen one.

Shape letters: I in features, O out features, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from goat_ds.method.mixture import MixtureOutput
from goat_ds.method.spectrum import Directions
from goat_ds.method.whole_mixture import Dropout, WholeFactors, whole_mixture
from goat_ds.tuner.config import GoatConfig
from goat_ds.tuner.layer import GoatExperts


class WholeExperts(GoatExperts):
    """The experts of ``full_rank``: one matrix ``D`` for each, ``W_e - W0``, and a router as that of low-rank ones.

    They have no factors, so what asks for those (a dense fit, an export that merges) refuses such an adapter.
    """

    def _add_experts(self, place: dict[str, Any]) -> None:
        shape = (self.config.num_experts, self.out_features, self.in_features)
        self.D = nn.Parameter(torch.empty(*shape, **place))
        self._add_router(place)
        self.A0 = self.B0 = self.s = None

    @torch.no_grad()
    def start(self, directions: Directions | None) -> None:
        """Let every expert be the weight, and fill the router.

        Args:
            directions: None: such experts start from no part of the weight.
        """
        assert directions is None
        self.D.zero_()
        self._start_router()
        self.ready = True

    def _mixed(self, x: Tensor, base: Tensor, **how: Any) -> MixtureOutput:
        seed = self._seed(self.config.dropout)
        return whole_mixture(
            x,
            base,
            WholeFactors(self.D, self.router, self.threshold, self.threshold_bias),
            self.router_settings(),
            signal=self.signal,
            dropout=None if seed is None else Dropout(self.config.dropout, seed),
            router_seed=self._router_seed(),
            **how,
        )


def experts_of_kind(config: GoatConfig, **about: Any) -> GoatExperts:
    """Make the experts that a config asks for, whole or of low rank.

    Args:
        config: Of the adapter.
        about: The other arguments of ``GoatExperts``.
    """
    return (WholeExperts if config.full_rank else GoatExperts)(config, **about)
