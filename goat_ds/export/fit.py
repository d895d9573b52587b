"""Fit the dense form of every layer of a trained model, from what its tokens do on the way through the model.

Shape letters: O out features, I in features, R gated ranks: the total rank, or twice that where the residual takes the
gates.
"""

from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from goat_ds.data import label_logits
from goat_ds.distributed import ranks
from goat_ds.errors import ExportError
from goat_ds.export.calibration import Packs
from goat_ds.export.trained import TRAINED, TrainedModel
from goat_ds.method.dense_fit import FitSums, fit_dense, is_finite, mean_gates_form
from goat_ds.tuner.fit_sums import FIT_SUMS_BYTES, add_up_on, by_input, fit_sums_in_passes
from goat_ds.tuner.layer import GoatExperts


class Fit(StrEnum):
    """How a layer gets its dense form."""

    LEAST_SQUARES = "least_squares"
    """The best linear stand-in for the gated activations."""
    MEAN = "mean"
    """Every gate at its mean."""


class LayerFit(NamedTuple):
    """Dense forms of one layer: ``A'`` in fp32 ``[R, I]``, fitted and with mean gates, and what each misses.

    See ``method.dense_fit.DenseFit``.
    """

    fitted_RI: Tensor
    mean_RI: Tensor
    unexplained: float
    unexplained_by_mean: float


@torch.no_grad()
def fit_layers(trained: TrainedModel, packs: Packs, *, max_bytes: int = FIT_SUMS_BYTES) -> dict[str, LayerFit]:
    """Return the dense forms of every layer by its path, the same on every rank. A collective.

    Args:
        trained: What was trained.
        packs: Calibration tokens, shared by the ranks; at least one row for each.
        max_bytes: What the sums of the layers in hand may take.
    """
    experts = trained.experts(TRAINED)
    bar = tqdm(total=len(experts), desc="fit", unit="layer", disable=not ranks.is_first())
    fits = {}
    for sums in fit_sums_in_passes(experts, partial(_run, trained.model, packs), max_bytes=max_bytes):
        for index, paths in enumerate(by_input(sums)):
            owner = index % ranks.get_world_size()
            add_up_on(owner, [sums[path] for path in paths])
            for path in paths:
                fits[path] = _fit(experts[path], sums[path], owner=owner)
                bar.update()
    bar.close()
    return fits


def _run(model: Any, packs: Packs) -> None:
    for batch in packs.micro_batches(shared=True):
        # An adapted output layer is fitted where it counts, and any other computes no more than that.
        label_logits(model, batch.to(ranks.device()))


def _fit(experts: GoatExperts, sums: FitSums, *, owner: int) -> LayerFit:
    """Solve on one rank, and return on all what it found. A collective."""
    a_RI, b_OR = experts.gated_factors()
    if experts.s is not None:
        scale_E = experts.s.to(torch.promote_types(b_OR.dtype, torch.float32))
        b_OR = b_OR * scale_E.repeat_interleave(len(a_RI) // len(scale_E))
    forms = torch.zeros(2, *a_RI.shape, device=experts.A.device)
    missed = torch.zeros(2, dtype=torch.float64, device=experts.A.device)
    if owner == ranks.get_rank():
        if not is_finite(sums):
            raise ExportError(f"{experts.name} computes values that are not finite on the calibration tokens")
        found = fit_dense(a_RI, b_OR, sums)
        forms[0], forms[1] = found.a_RI, mean_gates_form(a_RI, sums)
        missed[0], missed[1] = found.unexplained, found.unexplained_by_mean
    fitted_RI, mean_RI = ranks.send_from(owner, forms)
    return LayerFit(fitted_RI, mean_RI, *ranks.send_from(owner, missed).tolist())
