"""The fused layer equals the paper's loops: values, gradients, balance loss."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from goat_ds.method.dropout import dropout_mask, kept_share
from goat_ds.method.input_gradient import SummedGradient, sum_gradients
from goat_ds.method.mixture import MixtureFactors, MixtureSettings, mixture
from goat_ds.method.routing import BalanceSignal, carry_balance
from tests import reference

NUM_TOKENS, IN, OUT, R = 7, 10, 6, 4


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def run_both(
    *, num_experts: int, top_k: int, residual: bool, adaptive: bool, mask: list[bool] | None
) -> tuple[list[Tensor], list[Tensor], float, float]:
    """Return outputs and all gradients of the fast and of the slow form, and both balance losses."""
    torch.manual_seed(0)
    weight = draw(OUT, IN)
    tensors = {"x": draw(NUM_TOKENS, IN), "a": draw(R, IN), "b": draw(OUT, R)}
    if num_experts > 1:
        tensors["router"] = draw(num_experts, IN)
    a0, b0 = (draw(R, IN), draw(OUT, R)) if residual else (None, None)
    scales = [1.7 + 0.3 * e * adaptive for e in range(num_experts)]
    upstream, target, coef = 3.0, draw(NUM_TOKENS, OUT), 0.25

    fast = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    signal = BalanceSignal()
    signal.begin_forward(None if mask is None else torch.tensor(mask))
    factors = MixtureFactors(
        fast["a"],
        fast["b"],
        a0,
        b0,
        fast.get("router"),
        torch.tensor(scales, dtype=torch.float64) if adaptive else None,
    )
    settings = MixtureSettings(num_experts=num_experts, top_k=top_k, scale=scales[0], balance_coef=coef)
    y, load = mixture(fast["x"], fast["x"] @ weight.T, factors, settings, signal=signal)
    loss = (y * target).sum()
    if load is not None:
        signal.record("layer", load, coef=coef)
        loss = carry_balance(loss, signal.balance_loss(), signal)
    (upstream * loss).backward()

    slow = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    y_slow, balance_slow = reference.layer(
        slow["x"], weight, slow["a"], slow["b"], a0, b0, slow.get("router"), scales=scales, top_k=top_k, mask=mask
    )
    loss_slow = (y_slow * target).sum() + (coef * balance_slow if num_experts > 1 else 0)
    (upstream * loss_slow).backward()
    balance = float(load.balance_loss) if load is not None else 0.0
    return (
        [y, loss, *(value.grad for value in fast.values())],
        [y_slow, loss_slow, *(value.grad for value in slow.values())],
        balance,
        float(balance_slow.detach()),
    )


@pytest.mark.parametrize("mask", [None, [True, True, False, True, True, False, True]])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 1), (4, 2), (4, 4)])
def test_fused_layer_equals_the_papers_loops(
    num_experts: int, top_k: int, residual: bool, adaptive: bool, mask: list[bool] | None
) -> None:
    fast, slow, balance, balance_slow = run_both(
        num_experts=num_experts, top_k=top_k, residual=residual, adaptive=adaptive, mask=mask
    )
    for value, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    if num_experts > 1:
        assert balance == pytest.approx(balance_slow, abs=1e-10)


def test_a_balanced_router_has_a_balance_loss_of_one() -> None:
    signal = BalanceSignal()
    signal.begin_forward(None)
    factors = MixtureFactors(draw(4, 4), draw(3, 4), router_EI=torch.eye(4, dtype=torch.float64) * 1e-9)
    settings = MixtureSettings(num_experts=4, top_k=1, scale=1.0, balance_coef=0.0)
    x = torch.eye(4, dtype=torch.float64)
    _, load = mixture(x, torch.zeros(4, 3, dtype=torch.float64), factors, settings, signal=signal)
    assert load is not None
    torch.testing.assert_close(load.balance_loss, torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(load.share_E, torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("dropout", [1e-9, 0.05, 0.5, 0.999999])
def test_a_dropout_mask_keeps_the_share_it_names(dropout: float) -> None:
    mask = dropout_mask(torch.ones(1000, 999, dtype=torch.float64), dropout=dropout, seed=0)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert 0 < kept_share(dropout) < 1
    assert kept_share(dropout) == pytest.approx(1 - dropout, abs=1 / 2**16)
    deviation = (kept_share(dropout) * (1 - kept_share(dropout)) / mask.numel()) ** 0.5
    assert mask.mean().item() == pytest.approx(kept_share(dropout), abs=5 * deviation)


def test_a_seed_gives_its_own_mask_again() -> None:
    x = torch.ones(50, IN)
    masks = [dropout_mask(x, dropout=0.5, seed=seed) for seed in (1, 2, 1)]
    assert torch.equal(masks[0], masks[2])
    assert 0.4 < (masks[0] != masks[1]).float().mean() < 0.6


def test_dropout_reaches_the_experts_only() -> None:
    torch.manual_seed(0)
    x, a, b, a0, b0, router = (
        draw(5, IN), draw(R, IN), draw(OUT, R), draw(R, IN), draw(OUT, R), draw(2, IN),
    )  # fmt: skip
    keep = dropout_mask(x, dropout=0.25, seed=7)
    settings = MixtureSettings(num_experts=2, top_k=1, scale=1.3, balance_coef=0.0, dropout=0.25)
    inputs = [value.requires_grad_() for value in (x, a, b, router)]
    y, _ = mixture(
        x,
        torch.zeros(5, OUT, dtype=torch.float64),
        MixtureFactors(a, b, a0, b0, router),
        settings,
        signal=BalanceSignal(),
        dropout_seed=7,
    )
    gates = torch.nn.functional.one_hot((x @ router.T).argmax(dim=1), 2).double().repeat_interleave(R // 2, dim=1)
    expected = 1.3 * (gates * ((x * keep / 0.75) @ a.T)) @ b.T - 1.3 / 2 * (x @ a0.T) @ b0.T
    torch.testing.assert_close(y, expected)
    target = draw(5, OUT)
    grads = torch.autograd.grad((y * target).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * target).sum(), inputs[:3])
    for grad, expected_grad in zip(grads[:3], expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_an_infinite_preference_for_one_expert_is_finite_in_value_and_gradient() -> None:
    x = torch.ones(1, 2, dtype=torch.float32)
    router = torch.tensor([[1e4, 1e4], [-1e4, -1e4]], requires_grad=True)
    factors = MixtureFactors(torch.ones(2, 2, requires_grad=True), torch.ones(3, 2), router_EI=router)
    settings = MixtureSettings(num_experts=2, top_k=2, scale=1.0, balance_coef=0.0)
    y, load = mixture(x, torch.zeros(1, 3), factors, settings, signal=BalanceSignal())
    y.sum().backward()
    assert load is not None
    assert router.grad is not None
    assert all(torch.isfinite(t).all() for t in (y, load.entropy, router.grad))


def half_precision_run(monkeypatch: pytest.MonkeyPatch, *, widened: int) -> list[Tensor]:
    """Run 3-D bf16 input through the fast form, widened for the router so many tokens at a time."""
    monkeypatch.setattr("goat_ds.method.router.WIDENED_BYTES", widened * IN * 4)
    torch.manual_seed(0)
    a, b, a0, b0, router = (draw(*shape).bfloat16() for shape in ((R, IN), (OUT, R), (R, IN), (OUT, R), (2, IN)))
    x, base = draw(3, 7, IN).bfloat16().requires_grad_(), draw(3, 7, OUT).bfloat16()
    settings = MixtureSettings(num_experts=2, top_k=1, scale=1.3, balance_coef=0.0)
    factors = MixtureFactors(a.requires_grad_(), b.requires_grad_(), a0, b0, router.requires_grad_())
    y, load = mixture(x, base, factors, settings, signal=BalanceSignal())
    assert load is not None
    return [y, load.balance_loss, load.entropy, *torch.autograd.grad(y.square().sum(), [x, a, b, router])]


def test_a_half_precision_input_is_routed_the_same_in_pieces_as_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for in_pieces, whole in zip(
        half_precision_run(monkeypatch, widened=4), half_precision_run(monkeypatch, widened=64), strict=True
    ):
        torch.testing.assert_close(in_pieces, whole)


def test_half_precision_is_the_papers_up_to_its_rounding() -> None:
    torch.manual_seed(0)
    tensors = [draw(*shape).bfloat16() for shape in ((5, IN), (R, IN), (OUT, R), (R, IN), (OUT, R), (2, IN))]
    x, a, b, a0, b0, router = tensors
    weight = torch.zeros(OUT, IN, dtype=torch.float64)
    settings = MixtureSettings(num_experts=2, top_k=1, scale=1.3, balance_coef=0.0)
    y, _ = mixture(
        x, torch.zeros(5, OUT).bfloat16(), MixtureFactors(a, b, a0, b0, router), settings, signal=BalanceSignal()
    )
    exact, _ = reference.layer(*(t.double() for t in (x, weight, a, b, a0, b0, router)), scales=[1.3, 1.3], top_k=1)
    assert (y.double() - exact).norm() < 2**-7 * exact.norm()


@pytest.mark.parametrize("frozen", ["x", "a", "b", "router"])
def test_a_gradient_that_nobody_needs_leaves_the_others_as_they_are(frozen: str) -> None:
    torch.manual_seed(0)
    tensors = {"x": draw(5, IN), "a": draw(R, IN), "b": draw(OUT, R), "router": draw(2, IN)}
    settings = MixtureSettings(num_experts=2, top_k=1, scale=1.3, balance_coef=0.0)
    found = []
    for names in (tensors.keys(), tensors.keys() - {frozen}):
        inputs = {name: value.clone().requires_grad_(name in names) for name, value in tensors.items()}
        factors = MixtureFactors(inputs["a"], inputs["b"], router_EI=inputs["router"])
        y, _ = mixture(inputs["x"], draw(5, OUT) * 0, factors, settings, signal=BalanceSignal())
        y.square().sum().backward()
        found.append({name: inputs[name].grad for name in tensors.keys() - {frozen}})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


class Called(TorchDispatchMode):
    """Notes the shapes that operators give."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[tuple[Any, tuple[int, ...]]] = []
        self.operators: list[str] = []
        """The names of all, in order."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.operators.append(str(func))
        if isinstance(outputs, Tensor):
            self._found.append((func, tuple(outputs.shape)))
        return outputs

    def shapes_of(self, operator: Any) -> list[tuple[int, ...]]:
        """Return the shapes of one operator's outputs, in order."""
        return [shape for func, shape in self._found if func is operator]


class Both(NamedTuple):
    """What a mixture gives, and what it keeps for backward."""

    y: Tensor
    grads: tuple[Tensor, ...]
    kept_bytes: int


def small_layer(
    *, dtype: torch.dtype = torch.bfloat16, dropout_seed: int | None = None, in_place: bool = False
) -> Both:
    """Run a frozen layer and its mixture, both ways."""
    torch.manual_seed(0)
    tensors = [draw(*shape).to(dtype) for shape in ((3, 7, IN), (R, IN), (OUT, R), (R, IN), (OUT, R), (2, IN))]
    weight, target = draw(OUT, IN).to(dtype), draw(3, 7, OUT).to(dtype)
    x, a, b, a0, b0, router = tensors
    trained = [tensor.requires_grad_() for tensor in (x, a, b, router)]
    settings = MixtureSettings(num_experts=2, top_k=1, scale=1.3, balance_coef=0.0, dropout=0.25)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x_of_base, summed = sum_gradients(x) if in_place else (x, None)
    base = x_of_base @ weight.T
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, _ = mixture(
            x.detach() if in_place else x,
            base,
            MixtureFactors(a, b, a0, b0, router),
            settings,
            signal=BalanceSignal(),
            dropout_seed=dropout_seed,
            into_base=in_place,
            summed=summed,
        )
    assert (y.data_ptr() == base.data_ptr()) == in_place
    factors = sum(tensor.untyped_storage().nbytes() for tensor in tensors[1:])
    return Both(y.detach(), torch.autograd.grad((y * target).sum(), trained), sum(kept.values()) - factors)


@pytest.mark.parametrize("dropout_seed", [None, 3])
def test_backward_keeps_the_input_the_activations_and_the_logits_only(dropout_seed: int | None) -> None:
    num_tokens, num_experts = 3 * 7, 2
    expected = num_tokens * (2 * IN + 2 * R + 4 * num_experts)
    assert small_layer(dropout_seed=dropout_seed).kept_bytes == expected


def test_backward_keeps_nothing_of_the_product_that_gave_the_logits_but_them() -> None:
    expected = 3 * 7 * 4 * (IN + R + 2)
    assert small_layer(dtype=torch.float32).kept_bytes == expected


@pytest.mark.parametrize("dropout_seed", [None, 3])
def test_a_mixture_added_in_place_has_the_values_and_gradients_of_one_beside_the_base(dropout_seed: int | None) -> None:
    beside = small_layer(dtype=torch.float64, dropout_seed=dropout_seed)
    in_place = small_layer(dtype=torch.float64, dropout_seed=dropout_seed, in_place=True)
    torch.testing.assert_close(in_place.y, beside.y)
    torch.testing.assert_close(in_place.grads, beside.grads)


def test_a_base_that_somebody_keeps_for_backward_is_not_overwritten_unnoticed() -> None:
    x = draw(5, IN).requires_grad_()
    base = (x @ draw(IN, OUT)).tanh()
    settings = MixtureSettings(num_experts=1, top_k=1, scale=1.0, balance_coef=0.0)
    factors = MixtureFactors(draw(R, IN), draw(OUT, R))
    y, _ = mixture(x, base, factors, settings, signal=BalanceSignal(), into_base=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_on_cuda_one_product_gives_activations_and_logits_in_fp32() -> None:
    # Without memory and without a device: that the operators exist there, and take and give these dtypes.
    with FakeTensorMode():
        x, a, b, router = (
            torch.empty(*shape, dtype=torch.bfloat16, device="cuda") for shape in ((5, IN), (R, IN), (OUT, R), (2, IN))
        )
        settings = MixtureSettings(num_experts=2, top_k=1, scale=1.3, balance_coef=0.0)
        with Called() as called:
            y, load = mixture(
                x, x.new_empty(5, OUT), MixtureFactors(a, b, a, b, router), settings, signal=BalanceSignal()
            )
    assert called.shapes_of(torch.ops.aten.mm.dtype) == [(5, 2 * R + 2)]
    assert load is not None
    assert (y.dtype, load.entropy.dtype) == (torch.bfloat16, torch.float32)


def test_a_part_of_the_gradient_is_added_once_and_forgotten() -> None:
    summed, part, grad = SummedGradient(), draw(5, IN), torch.zeros(5, IN, dtype=torch.float64)
    summed.put(1, part)
    summed.added_to_(grad)
    summed.added_to_(grad)
    assert torch.equal(grad, part)
