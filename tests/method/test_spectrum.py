"""Which directions the experts start from, and what their factors multiply to."""

import pytest
import scipy.linalg
import torch
from torch import Tensor

from goat_ds.errors import ConfigError
from goat_ds.method import spectrum
from goat_ds.method.scaling import adaptive_scales
from goat_ds.method.spectrum import Init, chosen_indices, decompose, factors_from, zero_init
from tests import reference

DECOMPOSING = [init for init in Init if init.decomposes and init is not Init.OLORA]
SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (24, 24), "indivisible": (27, 29)}
SCALE, RHO = 1.7, 10.0


def weight_of(shape: tuple[int, int], *, rank: int | None = None) -> Tensor:
    """Draw a weight, of full rank or of the given one."""
    generator = torch.Generator().manual_seed(0)
    if rank is None:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    left, right = ((n, rank) for n in shape)
    return (
        torch.randn(*left, generator=generator, dtype=torch.float64)
        @ torch.randn(*right, generator=generator, dtype=torch.float64).T
    )


def products(weight: Tensor, start: Init, *, num_experts: int, r: int, adaptive: bool = False) -> list[Tensor]:
    """Return every expert's s_e B0_e A0_e as the package makes them."""
    indices_ED = chosen_indices(start, num_directions=min(weight.shape), num_experts=num_experts, r=r)
    directions = decompose(weight, indices_ED)
    scale_E = torch.full((num_experts,), SCALE, dtype=torch.float64)
    if adaptive:
        scale_E = adaptive_scales(SCALE, directions.s_R.unflatten(0, (num_experts, -1)))
    d = r // num_experts
    a_RI, b_OR = factors_from(directions, scale_R=scale_E.repeat_interleave(d), rho=RHO)
    return [scale_E[e] * b_OR[:, e * d : (e + 1) * d] @ a_RI[e * d : (e + 1) * d] for e in range(num_experts)]


@pytest.mark.parametrize("start", DECOMPOSING)
@pytest.mark.parametrize(("q", "num_experts", "r"), [(24, 4, 8), (27, 4, 8), (24, 3, 6), (24, 1, 4), (16, 8, 16)])
def test_every_start_takes_the_directions_of_the_table(start: Init, q: int, num_experts: int, r: int) -> None:
    indices_ED = chosen_indices(start, num_directions=q, num_experts=num_experts, r=r)
    assert indices_ED.tolist() == reference.segment_indices(start, q=q, num_experts=num_experts, r=r)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", DECOMPOSING)
def test_factors_multiply_to_the_segments_of_the_spectrum(start: Init, shape: str, adaptive: bool) -> None:
    weight = weight_of(SHAPES[shape])
    expected, scales = reference.start_products(
        weight, start, num_experts=4, r=8, scale=SCALE, rho=RHO, adaptive=adaptive
    )
    found = products(weight, start, num_experts=4, r=8, adaptive=adaptive)
    for product, unscaled, scale in zip(found, expected, scales, strict=True):
        torch.testing.assert_close(product, scale * unscaled, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_are_orthonormal(shape: str) -> None:
    indices_ED = chosen_indices(Init.GOAT, num_directions=24, num_experts=4, r=8)
    u_OR, _, v_RI = decompose(weight_of(SHAPES[shape]), indices_ED)
    torch.testing.assert_close(u_OR.T @ u_OR, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(v_RI @ v_RI.T, torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", [Init.GOAT, Init.GOAT_MINI, Init.MILORA])
def test_a_rank_deficient_weight_still_gives_its_segments(start: Init, shape: str) -> None:
    weight = weight_of(SHAPES[shape], rank=9)
    expected, _ = reference.start_products(weight, start, num_experts=4, r=8, scale=SCALE, rho=RHO, adaptive=False)
    for product, unscaled in zip(products(weight, start, num_experts=4, r=8), expected, strict=True):
        torch.testing.assert_close(product, SCALE * unscaled, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e30])
def test_a_weight_of_any_size_gives_finite_factors(factor: float) -> None:
    weight = weight_of((24, 40)) * factor
    found = products(weight, Init.GOAT, num_experts=4, r=8)
    plain = products(weight_of((24, 40)), Init.GOAT, num_experts=4, r=8)
    for product, unscaled in zip(found, plain, strict=True):
        torch.testing.assert_close(product, unscaled * factor, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_low_precision_weight_is_decomposed_as_exactly_as_its_values(dtype: torch.dtype) -> None:
    weight = weight_of((24, 40)).to(dtype)
    found = products(weight, Init.GOAT, num_experts=4, r=8)
    for product, exact in zip(found, products(weight.double(), Init.GOAT, num_experts=4, r=8), strict=True):
        torch.testing.assert_close(product, exact, rtol=0.0, atol=0.0)


def test_a_steep_spectrum_is_as_accurate_as_an_svd_in_double_precision() -> None:
    u, _, vh = torch.linalg.svd(weight_of((24, 40)), full_matrices=False)
    weight = u @ torch.diag(torch.logspace(0, -12, 24, dtype=torch.float64)) @ vh
    indices_ED = chosen_indices(Init.GOAT, num_directions=24, num_experts=4, r=8)
    u_OR, s_R, v_RI = decompose(weight, indices_ED)
    torch.testing.assert_close(u_OR.T @ weight @ v_RI.T, torch.diag(s_R), rtol=1e-6, atol=1e-14)


Q = 24
SPECTRA = {
    "even": torch.linspace(1, 0.1, Q),
    "condition 1e6": torch.logspace(0, -6, Q),
    "condition 1e12": torch.logspace(0, -12, Q),
    "one outlier": torch.cat([torch.tensor([1e4]), torch.linspace(1, 0.5, Q - 1)]),
    "one value": torch.ones(Q),
    "repeated within and across segments": torch.tensor([3.0, 2.0, 1.0]).repeat_interleave(Q // 3),
    "rank 9": torch.cat([torch.linspace(1, 0.1, 9), torch.zeros(Q - 9)]),
    "rank 1": torch.cat([torch.ones(1), torch.zeros(Q - 1)]),
    "zero": torch.zeros(Q),
    "tiny": torch.linspace(1, 0.1, Q) * 1e-20,
}
ROUTES = ["some eigenvectors", "all eigenvectors", "svd"]


def take(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompose by one route, whatever the device."""
    if route == "all eigenvectors":
        monkeypatch.setattr(spectrum, "_some_eigenpairs", spectrum._all_eigenpairs)
    if route == "svd":
        monkeypatch.setattr(spectrum, "_decompose_by_gram", lambda *_: None)


def with_spectrum(s_Q: Tensor, shape: tuple[int, int]) -> Tensor:
    """Draw a weight whose singular values are ``s_Q``, of which the smaller side has as many."""
    left, right = (torch.linalg.qr(weight_of((n, len(s_Q)))).Q for n in shape)
    return left * s_Q.double() @ right.T


def assert_accurate(weight: Tensor, directions: spectrum.Directions, indices_ED: Tensor, *, at_most: float) -> None:
    """Hold every triplet to both its equations, its place in the spectrum, and both sides to being orthonormal."""
    weight, (u_OR, s_R, v_RI) = weight.double(), (tensor.double() for tensor in directions)
    exact_Q = torch.linalg.svdvals(weight)
    bound = at_most * exact_Q[0]
    assert (weight @ v_RI.T - u_OR * s_R).norm(dim=0).max() <= bound
    assert (weight.T @ u_OR - v_RI.T * s_R).norm(dim=0).max() <= bound
    assert (s_R - exact_Q[indices_ED.flatten()]).abs().max() <= bound
    eye = torch.eye(len(s_R), dtype=torch.float64)
    assert (u_OR.T @ u_OR - eye).abs().max() <= at_most
    assert (v_RI @ v_RI.T - eye).abs().max() <= at_most


@pytest.fixture
def whole_svds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Fill with the shapes that ``torch.linalg.svd`` is called on, but for the thin ones."""
    shapes: list[tuple[int, ...]] = []
    svd = torch.linalg.svd

    def noted(matrix: Tensor, **options: bool) -> object:
        if min(matrix.shape) == Q:
            shapes.append(tuple(matrix.shape))
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", noted)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_is_accurate_on_every_spectrum(
    route: str, name: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(route, monkeypatch)
    weight = with_spectrum(SPECTRA[name], shape).to(dtype)
    for start in DECOMPOSING:
        indices_ED = chosen_indices(start, num_directions=Q, num_experts=4, r=8)
        found = decompose(weight, indices_ED)
        assert_accurate(weight, found, indices_ED, at_most=1e-6)
        in_fp32 = spectrum.Directions(*(tensor.float() for tensor in found))
        assert_accurate(weight, in_fp32, indices_ED, at_most=1e-5)


@pytest.mark.parametrize("shape", [(640, 1024), (1024, 640), (640, 640)])
@pytest.mark.parametrize("route", ROUTES[:2])
def test_a_larger_weight_is_accurate_by_either_kind_of_eigenvectors(
    route: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    take(route, monkeypatch)
    monkeypatch.setattr(spectrum, "_decompose_by_svd", None)
    weight = with_spectrum(torch.logspace(0, -6, 640), shape).float()
    indices_ED = chosen_indices(Init.GOAT, num_directions=640, num_experts=8, r=32)
    assert_accurate(weight, decompose(weight, indices_ED), indices_ED, at_most=1e-6)


def test_a_well_conditioned_weight_needs_no_svd(whole_svds: list[tuple[int, ...]]) -> None:
    indices_ED = chosen_indices(Init.GOAT, num_directions=Q, num_experts=4, r=8)
    for name in ("even", "condition 1e6", "one outlier", "tiny"):
        decompose(with_spectrum(SPECTRA[name], (24, 40)), indices_ED)
    assert not whole_svds


@pytest.mark.parametrize("name", ["rank 9", "condition 1e12"])
@pytest.mark.parametrize("route", ROUTES[:2])
def test_where_squaring_costs_too_many_digits_the_svd_is_taken(
    route: str, name: str, whole_svds: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    take(route, monkeypatch)
    weight = with_spectrum(SPECTRA[name], (24, 40))
    indices_ED = chosen_indices(Init.MILORA, num_directions=Q, num_experts=4, r=8)
    found = decompose(weight, indices_ED)
    assert whole_svds == [(24, 40)]
    assert_accurate(weight, found, indices_ED, at_most=1e-12)


@pytest.mark.parametrize("wrong", ["vectors", "places", "one twice", "no convergence"])
def test_eigenvectors_that_are_wrong_are_not_used(
    wrong: str, whole_svds: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = spectrum._some_eigenpairs

    def found(side_QL: Tensor, wanted_W: Tensor) -> spectrum._Eigenpairs:
        if wrong == "no convergence":
            raise scipy.linalg.LinAlgError("1 eigenvectors failed to converge")
        values_W, vectors_QW = right(side_QL, wanted_W)
        if wrong == "vectors":
            return spectrum._Eigenpairs(values_W, vectors_QW + 1e-6 * vectors_QW.roll(1, 0))
        others_W = wanted_W + 1 if wrong == "places" else wanted_W.clamp_min(1)
        return spectrum._Eigenpairs(values_W, right(side_QL, others_W).vectors_QW)

    monkeypatch.setattr(spectrum, "_some_eigenpairs", found)
    weight = with_spectrum(SPECTRA["even"], (40, 24))
    indices_ED = chosen_indices(Init.GOAT, num_directions=Q, num_experts=4, r=8)
    assert_accurate(weight, decompose(weight, indices_ED), indices_ED, at_most=1e-12)
    assert whole_svds == [(40, 24)]


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("route", ROUTES)
def test_the_same_weight_gives_the_same_bits(route: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(route, monkeypatch)
    weight = with_spectrum(SPECTRA[name], (24, 40)).bfloat16()
    indices_ED = chosen_indices(Init.GOAT, num_directions=Q, num_experts=4, r=8)
    first = decompose(weight, indices_ED)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, decompose(weight.clone(), indices_ED), strict=True))


@pytest.mark.parametrize("indices", [[[0, 1], [12, 13]], [[7, 2], [23, 0]]])
def test_directions_come_in_the_order_they_are_asked_for_whatever_the_strides(indices: list[list[int]]) -> None:
    weight, indices_ED = weight_of((24, 40)), torch.tensor(indices)
    u_OQ, s_Q, vh_QI = torch.linalg.svd(weight, full_matrices=False)
    for stored in (weight, weight.T.contiguous().T):
        u_OR, s_R, v_RI = decompose(stored, indices_ED)
        found = torch.einsum("or,r,ri->roi", u_OR, s_R, v_RI)
        exact = torch.einsum("oq,q,qi->qoi", u_OQ, s_Q, vh_QI)
        torch.testing.assert_close(found, exact[indices_ED.flatten()])


def test_a_segment_shorter_than_an_expert_is_refused_with_both_numbers() -> None:
    words = r"24 x 24 has segments of 6 directions \(num_experts 4\), fewer than r / num_experts \(7\)"
    with pytest.raises(ConfigError, match=words):
        chosen_indices(Init.GOAT, num_directions=24, num_experts=4, r=28)


def test_a_zero_start_takes_no_directions() -> None:
    with pytest.raises(ValueError, match="start 'zero' takes no directions"):
        chosen_indices(Init.ZERO, num_directions=24, num_experts=4, r=8)


def test_a_zero_start_draws_a_within_its_bounds_and_b_as_zero() -> None:
    torch.manual_seed(0)
    a_RI, b_OR = zero_init(
        out_features=6, in_features=64, r=32, num_rows=32, dtype=torch.float32, device=torch.device("cpu")
    )  # fmt: skip
    bound = 64**-0.5
    assert a_RI.shape == (32, 64) and b_OR.shape == (6, 32)
    assert not b_OR.any()
    assert a_RI.abs().max() <= bound
    torch.testing.assert_close(a_RI.var().item(), bound**2 / 3, rtol=0.1, atol=0.0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_residual_is_added_in_place_rows_at_a_time_and_rounded_once(
    adaptive: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a_RI, b_OR = (torch.randn(shape, generator=generator) for shape in ((50, 30), (8, 30), (50, 8)))
    scale_E = torch.tensor([0.5, 1.0, 2.0, 3.0]) if adaptive else torch.full((4,), 1.5)
    residual = sum(
        scale_E[e].double() / 4 * b_OR[:, 2 * e : 2 * e + 2].double() @ a_RI[2 * e : 2 * e + 2].double()
        for e in range(4)
    )
    expected = (weight.bfloat16().double() - residual).bfloat16()
    # Seven rows at a time, the last of them one.
    monkeypatch.setattr(spectrum, "VALUES_AT_ONCE", 7 * 30)
    stored = weight.bfloat16().T.contiguous().T if transposed else weight.bfloat16()
    spectrum.add_residual_(
        stored,
        spectrum.Factors(a_RI, b_OR),
        scale=1.5,
        scale_E=scale_E if adaptive else None,
        num_experts=4,
        times=-1,
    )
    # fp32 and float64 may round to neighbouring bf16 values.
    torch.testing.assert_close(stored, expected, rtol=2**-7, atol=1e-6)
    assert (stored == expected).float().mean() > 0.99
