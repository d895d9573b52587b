"""The three scales, and one scale for each expert."""

import pytest
import torch

from goat_ds.errors import ConfigError
from goat_ds.method.scaling import Scaling, adaptive_scales, expert_scale
from tests import reference


@pytest.mark.parametrize("eta", [1.0, 0.1])
@pytest.mark.parametrize(("in_features", "expert_rank"), [(640, 4), (2048, 8), (10, 1)])
@pytest.mark.parametrize("scaling", list(Scaling))
def test_every_scale_is_the_papers(scaling: Scaling, in_features: int, expert_rank: int, eta: float) -> None:
    given = {"in_features": in_features, "expert_rank": expert_rank, "eta": eta, "lora_alpha": 64.0}
    assert expert_scale(scaling, **given) == pytest.approx(reference.scale_of(scaling, **given), rel=1e-15)


def test_the_theory_scale_grows_with_the_root_of_the_learning_rate_ratio() -> None:
    at = {eta: expert_scale(Scaling.THEORY, in_features=64, expert_rank=4, eta=eta, lora_alpha=1.0) for eta in (1, 4)}
    assert at[4] == pytest.approx(2 * at[1])


def test_the_first_experts_own_scale_is_the_layers() -> None:
    singular_values_ED = torch.tensor([[5.0, 3.0], [2.0, 1.0], [0.5, 0.25]], dtype=torch.float64)
    assert adaptive_scales(1.7, singular_values_ED)[0] == 1.7


def test_own_scales_make_every_experts_squared_scale_times_its_sum_equal() -> None:
    singular_values_ED = torch.rand(4, 3, dtype=torch.float64) + 0.1
    weighted_E = adaptive_scales(1.7, singular_values_ED) ** 2 * singular_values_ED.sum(dim=1)
    torch.testing.assert_close(weighted_E, weighted_E[:1].expand(4))


def test_an_expert_without_singular_values_has_no_scale_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"those of expert 1 are all zero.* set adaptive_scale=False"):
        adaptive_scales(1.7, torch.tensor([[1.0, 0.5], [0.0, 0.0]]))
