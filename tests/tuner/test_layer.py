"""One adapted layer: its start, what it costs to switch off, and what it refuses."""

import copy
import io
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from goat_ds import ConfigError, GoatConfig, MergeError
from goat_ds.method.spectrum import Init
from goat_ds.tuner.layer import GoatLayer
from tests import reference
from tests.models import causal_lm, sequence_classifier, token_ids
from tests.tuner.helpers import SMALL, disturb, experts_of, fixed_tensors, goat, logits


def one_layer(
    layer: nn.Module | None = None, *, dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[nn.Linear, GoatLayer]:
    """Return a linear layer, and a copy of it with a GOAT adapter."""
    torch.manual_seed(0)
    plain = (layer or nn.Linear(24, 40)).to(dtype)
    config = GoatConfig(**(SMALL | {"target_modules": ["layer"]} | settings))
    wrapped = get_peft_model(nn.ModuleDict({"layer": copy.deepcopy(plain)}), config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    return plain, wrapped.base_model.model["layer"]  # type: ignore[return-value,index]


def draw_input(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("init", [init for init in Init if init.decomposes and init is not Init.OLORA])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_uniform_gates_at_the_start_reproduce_the_base_layer(kind: str, init: Init, adaptive: bool) -> None:
    layer = nn.Linear(24, 40) if kind == "linear" else Conv1D(40, 24)
    plain, adapted = one_layer(layer, init=init, top_k=4, adaptive_scale=adaptive)
    adapted.goat_experts["default"].router.data.zero_()
    torch.testing.assert_close(adapted(draw_input()), plain(draw_input()))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_start_by_qr_is_the_leading_part_of_it_taken_off_the_base(kind: str) -> None:
    layer = nn.Linear(24, 40) if kind == "linear" else Conv1D(40, 24)
    plain, adapted = one_layer(layer, init="olora", num_experts=1, top_k=1)
    torch.testing.assert_close(adapted(draw_input()), plain(draw_input()))
    experts, weight_OI = adapted.goat_experts["default"], adapted.weight_OI()
    q_OQ, r_QI = torch.linalg.qr(weight_OI)
    torch.testing.assert_close(experts.B.detach(), q_OQ[:, : experts.config.r])
    torch.testing.assert_close(experts.A.detach(), r_QI[: experts.config.r])
    assert torch.equal(experts.A0, experts.A) and torch.equal(experts.B0, experts.B)


def test_a_zero_start_reproduces_the_base_layer_whatever_the_gates() -> None:
    plain, adapted = one_layer(init="zero")
    assert torch.equal(adapted(draw_input()), plain(draw_input()))


@pytest.mark.parametrize("scaling", ["theory", "alpha", "rslora"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_fresh_layer_is_the_papers(scaling: str, adaptive: bool) -> None:
    plain, adapted = one_layer(scaling=scaling, adaptive_scale=adaptive, lora_alpha=16)
    scale = reference.scale_of(scaling, in_features=24, expert_rank=2, eta=1.0, lora_alpha=16)
    products, scales = reference.start_products(
        plain.weight.detach(), "goat", num_experts=4, r=8, scale=scale, rho=10.0, adaptive=adaptive
    )
    router = adapted.goat_experts["default"].router.detach()
    for x, y in zip(draw_input().flatten(0, 1), adapted(draw_input()).flatten(0, 1), strict=True):
        gates, _, _ = reference.gates_of_token(list(router @ x), 2)
        shift = sum(scale * (g - 1 / 4) * p for scale, g, p in zip(scales, gates, products, strict=True))
        torch.testing.assert_close(y, plain(x) + shift @ x)


@pytest.mark.parametrize("init", ["pissa", "milora"])
def test_one_expert_starts_as_the_single_adapter_of_its_name(init: str) -> None:
    plain, adapted = one_layer(num_experts=1, top_k=1, init=init, rho=1.0)
    experts = adapted.goat_experts["default"]
    assert experts.router is None
    u, sigma, vh = torch.linalg.svd(plain.weight.detach())
    part = slice(0, 8) if init == "pissa" else slice(16, 24)
    torch.testing.assert_close(experts.scale * experts.B @ experts.A, u[:, part] * sigma[part] @ vh[part])
    torch.testing.assert_close(adapted(draw_input()), plain(draw_input()))


def test_one_expert_trains_as_pefts_pissa_does() -> None:
    plain, adapted = one_layer(num_experts=1, top_k=1, init="pissa", rho=1.0, scaling="alpha", lora_alpha=16)
    lora = LoraConfig(r=8, lora_alpha=16, init_lora_weights="pissa", target_modules=["layer"])
    single = get_peft_model(nn.ModuleDict({"layer": plain.float()}), lora)  # type: ignore[arg-type]
    peft_layer = single.base_model.model["layer"]  # type: ignore[index]
    peft_b = peft_layer.lora_B["default"].weight.double()
    peft_a = peft_layer.lora_A["default"].weight.double()
    experts = adapted.goat_experts["default"]
    torch.testing.assert_close(experts.B @ experts.A, peft_b @ peft_a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapted(draw_input()).float(), peft_layer(draw_input().float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_disabled_adapter_gives_the_base_model_bit_for_bit(dtype: torch.dtype) -> None:
    expected = logits(causal_lm(dtype=dtype))
    model = goat(causal_lm(dtype=dtype))
    disturb(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


def test_training_moves_neither_the_base_nor_the_start() -> None:
    model = goat(adaptive_scale=True)
    before = {name: tensor.clone() for name, tensor in fixed_tensors(model)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(input_ids=token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in fixed_tensors(model))


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_with_the_reason_and_the_way_out(how: str) -> None:
    model = goat()
    with pytest.raises(MergeError, match=r"what routed experts add depends on the token.*--mode exact.*--mode dense"):
        getattr(model, how)()


def test_an_empty_adapter_says_so_when_it_is_used() -> None:
    with pytest.raises(ConfigError, match=r"q_proj is empty: its config is deferred.*deferred=False"):
        logits(goat(deferred=True))


def test_a_target_that_matches_nothing_lists_the_candidates() -> None:
    words = r"target_modules \(query\) matches no layer; linear layers are: down_proj, gate_proj, k_proj, lm_head"
    with pytest.raises(ConfigError, match=words):
        goat(target_modules=["query"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["q_proj", "k_porj"]}, r"target_modules \(k_porj\)"),
        ({"exclude_modules": ["lm_haed"]}, r"exclude_modules \(lm_haed\)"),
        ({"exclude_modules": ["k_proj", "self_attn"]}, r"exclude_modules \(self_attn\)"),
        ({"exclude_modules": ".*k_porj"}, r"exclude_modules \(\.\*k_porj\)"),
    ],
)
def test_a_name_that_matches_nothing_beside_others_that_do_is_refused(settings: dict[str, Any], words: str) -> None:
    model = causal_lm()
    with pytest.raises(ConfigError, match=f"{words} matches no layer; linear layers are: down_proj, .*k_proj, lm_head"):
        goat(model, **settings)
    assert not any(isinstance(module, GoatLayer) for module in model.modules())


def test_a_classifier_whose_adapter_does_not_fit_is_given_back_as_it_was() -> None:
    model = sequence_classifier()
    with pytest.raises(ConfigError, match=r"exclude_modules \(querry\) matches no layer"):
        goat(model, task_type="SEQ_CLS", exclude_modules=["querry"])
    assert torch.equal(logits(model), logits(sequence_classifier()))
    assert isinstance(model.classifier.dense, nn.Linear)


def test_names_are_found_again_on_a_base_that_has_an_adapter_already() -> None:
    settings = {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["0.self_attn.k_proj", "lm_head"]}
    model = goat(**settings, modules_to_save=["lm_head"])
    model.add_adapter("second", GoatConfig(**SMALL, **settings))
    assert len(experts_of(model)) == 2 * 3


def test_all_layers_that_do_not_fit_come_in_one_message_and_the_base_is_left_as_it_was() -> None:
    base = causal_lm()
    with pytest.raises(ConfigError, match="lower r, or put it in exclude_modules") as caught:
        goat(base, r=24, target_modules=["q_proj", "k_proj", "v_proj", "embed_tokens"])
    named = [problem.split(": ")[-2 if "Embedding" in problem else 0] for problem in caught.value.problems]
    assert len(named) == 5, caught.value.problems  # k and v of both blocks, and the embedding
    assert "embed_tokens is a Embedding; only nn.Linear and Conv1D" in str(caught.value)
    assert not any(isinstance(module, GoatLayer) for module in base.modules())
    assert goat(base, r=16, target_modules=["q_proj", "k_proj"]).peft_config["default"].r == 16


def test_a_second_adapter_that_does_not_fit_leaves_the_first_as_it_was() -> None:
    model = goat()
    expected = logits(model)
    with pytest.raises(ConfigError, match="k_proj: 16 x 32 has segments of 4 directions"):
        model.add_adapter("large", GoatConfig(r=32, num_experts=4))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


def test_a_linear_layer_that_is_read_and_not_called_is_refused() -> None:
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    with pytest.raises(ConfigError, match=r"out_proj is read by nn\.MultiheadAttention without being called"):
        goat(attention, r=4, target_modules=["out_proj"])


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the model has no nn\.Linear or Conv1D"):
        goat(nn.Sequential(nn.Embedding(4, 4)), target_modules=["0"])


def two_adapters() -> GoatLayer:
    """Return a layer on which two adapters are active, as far from their starts as training would bring them."""
    _, adapted = one_layer(balance_coef=0.0)
    first = adapted.goat_experts["default"]
    adapted.goat_experts["second"] = copy.deepcopy(first)
    adapted.set_adapter(["default", "second"])
    disturb(adapted)
    return adapted


def test_the_gradient_of_the_input_is_right_with_one_adapter_and_with_two() -> None:
    adapted = two_adapters()
    for active in (["default"], ["default", "second"]):
        adapted.set_adapter(active)
        assert torch.autograd.gradcheck(adapted, draw_input().requires_grad_())


def test_a_gradient_of_factors_alone_leaves_no_trace_in_the_next_one() -> None:
    adapted, x = two_adapters(), draw_input().requires_grad_()
    (expected,) = torch.autograd.grad(adapted(x).square().sum(), x)
    loss = adapted(x).square().sum()
    torch.autograd.grad(loss, adapted.goat_experts["default"].A, retain_graph=True)
    (found,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, expected)


def test_a_hook_on_the_base_layer_sees_the_base_alone() -> None:
    plain, adapted = one_layer()
    seen: list[Tensor] = []
    adapted.base_layer.register_forward_hook(lambda _, args, output: seen.append(output))
    y = adapted(draw_input())
    assert torch.equal(seen[0], plain(draw_input()))
    assert not torch.equal(seen[0], y)


def test_a_base_layer_that_keeps_its_output_trains() -> None:
    class Squashed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    _, adapted = one_layer(Squashed(24, 40), balance_coef=0.0)
    assert torch.autograd.gradcheck(adapted, draw_input().requires_grad_())


def test_a_base_layer_that_hands_its_gradient_on_gets_none_of_the_experts() -> None:
    class Skipped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    _, adapted = one_layer(Skipped(24, 24), balance_coef=0.0)
    assert torch.autograd.gradcheck(lambda x: x * 1 + adapted(x * 1), draw_input().requires_grad_())


def test_a_gradient_that_leads_around_the_experts_has_none_of_theirs() -> None:
    _, adapted = one_layer(balance_coef=0.0)
    seen: list[Tensor] = []
    adapted.base_layer.register_forward_hook(lambda _, args, output: seen.append(output))
    x = draw_input().requires_grad_()
    y = adapted(x)
    torch.autograd.grad(y.sum(), adapted.goat_experts["default"].A, retain_graph=True)
    (found,) = torch.autograd.grad(seen[0].sum(), x)
    torch.testing.assert_close(found, adapted.base_layer.weight.sum(dim=0).expand_as(x))


def test_a_backward_hook_on_the_base_layer_sees_its_gradient_alone() -> None:
    _, adapted = one_layer(balance_coef=0.0)
    seen: list[Tensor] = []
    adapted.base_layer.register_full_backward_hook(lambda _, grad_input, grad_output: seen.append(grad_input[0]))
    x = draw_input().requires_grad_()
    adapted(x).sum().backward()
    torch.testing.assert_close(seen[0], adapted.base_layer.weight.sum(dim=0).expand_as(x))
    assert x.grad is not None and not torch.equal(x.grad, seen[0])


def test_a_base_whose_forward_was_replaced_keeps_what_it_returned() -> None:
    plain, adapted = one_layer()
    returned: list[Tensor] = []
    original = adapted.base_layer.forward

    def kept(x: Tensor) -> Tensor:
        returned.append(original(x))
        return returned[-1]

    adapted.base_layer.forward = kept
    adapted(draw_input())
    assert torch.equal(returned[0], plain(draw_input()))


def test_a_hook_on_one_adapter_sees_its_own_sum_beside_another() -> None:
    adapted, seen = two_adapters(), list[Tensor]()
    first = next(iter(adapted.goat_experts.values()))
    expected = first(draw_input(), adapted.base_layer(draw_input()))
    first.register_forward_hook(lambda _, args, output: seen.append(output))
    adapted(draw_input())
    torch.testing.assert_close(seen[0], expected)


def test_a_weight_with_values_that_are_no_numbers_is_refused_by_name() -> None:
    base = nn.Linear(24, 40)
    base.weight.data[3, 5] = float("nan")
    with pytest.raises(ConfigError, match=r"the weight of .* holds values that are not finite"):
        one_layer(base)


def test_dropout_is_off_in_evaluation() -> None:
    expected = logits(goat())
    assert torch.equal(logits(goat(dropout=0.5)), expected)


def test_dropout_zeroes_the_share_it_names_and_keeps_the_mean() -> None:
    _, adapted = one_layer(num_experts=1, top_k=1, init="zero", dropout=0.25, scaling="alpha", lora_alpha=8)
    experts = adapted.goat_experts["default"]
    experts.A.data, experts.B.data = torch.eye(8, 24).double(), torch.eye(40, 8).double()
    x = torch.ones(4000, 24, dtype=torch.float64)
    passed = (adapted(x) - adapted.base_layer(x))[:, :8]
    assert set(passed.unique().tolist()) == {0.0, 1 / 0.75}
    assert passed.mean().item() == pytest.approx(1, abs=0.02)


def test_dropout_is_drawn_anew_in_every_forward_and_again_from_torchs_seed() -> None:
    _, adapted = one_layer(dropout=0.5)
    disturb(adapted)
    torch.manual_seed(3)
    first, second = adapted(draw_input()), adapted(draw_input())
    torch.manual_seed(3)
    assert torch.equal(adapted(draw_input()), first)
    assert not torch.equal(first, second)


def test_dropout_works_under_autocast() -> None:
    model = goat(dropout=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=token_ids(2, 9), labels=token_ids(2, 9)).loss
    loss.backward()
    assert all(experts.A.grad is not None and experts.A.grad.isfinite().all() for experts in experts_of(model))


def test_a_bf16_layer_routes_by_logits_in_fp32() -> None:
    _, adapted = one_layer(dtype=torch.bfloat16)
    experts = adapted.goat_experts["default"]
    adapted(draw_input(torch.bfloat16))
    exact = draw_input(torch.bfloat16).flatten(0, 1).double() @ experts.router.detach().double().T
    load, probs = experts.signal.loads[experts.name], exact.softmax(dim=1)
    entropy = -(probs * probs.log()).sum(dim=1).mean()
    balance_loss = len(load.share_E) * (load.share_E.double() @ probs.mean(dim=0))
    torch.testing.assert_close(load.entropy.double(), entropy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(load.balance_loss.double(), balance_loss, rtol=1e-6, atol=1e-6)


def test_a_weight_that_is_not_whole_is_refused_before_any_svd() -> None:
    plain = nn.Linear(24, 40, device="meta")
    with pytest.raises(ConfigError, match=r"not whole on this process .*meta.* launch/train\.py"):
        goat(nn.ModuleDict({"layer": plain}), target_modules=["layer"])


def test_a_copy_of_a_model_is_independent_and_trains_its_routers() -> None:
    model = goat(balance_coef=1.0)
    model(input_ids=token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    assert copied.base_model.signal is not model.base_model.signal
    assert {id(experts.signal) for experts in experts_of(copied)} == {id(copied.base_model.signal)}


def test_a_model_survives_torch_save() -> None:
    model = goat(sequence_classifier(), task_type="SEQ_CLS")
    disturb(model)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(logits(loaded), logits(model))
    assert all(experts.signal is loaded.base_model.signal for experts in experts_of(loaded))


def test_targets_that_are_all_excluded_are_a_config_error() -> None:
    config = GoatConfig(r=8, num_experts=4, target_modules=["q_proj"], exclude_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"target_modules: No modules were targeted for adaptation"):
        get_peft_model(causal_lm(), config)
