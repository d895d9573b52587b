"""A dense finish: sharded equals whole, nothing is lost where nothing was routed, and the rest is a dense adapter."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from goat_ds import ConfigError, GoatConfig, demo
from goat_ds.data import BatchPlan
from goat_ds.export import export_exact, read_adapter
from goat_ds.method.dense_fit import FitSums
from goat_ds.train.data import num_tokens_until
from goat_ds.tuner.model import ADAPTER_NAME, named_experts
from goat_ds.zero import dense_finish
from goat_ds.zero.dense_finish import check_enough
from goat_ds.zero.optimizer_state import TensorState
from tests.launching import losses_of, metrics_of, run_many, run_ranks
from tests.models import causal_lm, token_ids
from tests.zero.plain_torch import COMMON, NUM_STEPS, TWO_IN_ONE_STEP, ZERO3

LAST_ROUTED, NUM_FEWER_STEPS = 8, 11
# A schedule that goes down, and not faster in a shorter run. The checkpoint before the finish is written although none
# is due.
COMMON_HERE = COMMON | {"lr_scheduler": "inverse_sqrt", "eval_steps": "5"}
FINISH, EARLIER = ({"dense_finish": str(LAST_ROUTED / steps + 1e-3)} for steps in (NUM_STEPS, NUM_FEWER_STEPS))
FEWER_STEPS = EARLIER | {"max_steps": str(NUM_FEWER_STEPS)}
NF4 = {"load_in_4bit": "true"}
GATED = {"residual": "gated"}
# All experts for every token: with routers of zeros the finish has no choice to undo.
EVEN = {"top_k": "4", "num_experts": "4", "balance_coef": "0"}
ON_ONE_RANK: dict[str, dict[str, str]] = {
    "plain": ZERO3 | TWO_IN_ONE_STEP,
    "reentrant": ZERO3 | TWO_IN_ONE_STEP | FEWER_STEPS | {"gradient_checkpointing": "reentrant"},
    "fold": ZERO3 | TWO_IN_ONE_STEP | {"residual": "fold"},
    "nf4": ZERO3 | TWO_IN_ONE_STEP | NF4,
    "gated": ZERO3 | TWO_IN_ONE_STEP | GATED,
}
# By the run on one rank that each must equal.
ON_TWO_RANKS: dict[str, dict[str, dict[str, str]]] = {
    "plain": {
        "zero1": {"ds_config": "ds_configs/zero1.json"} | FEWER_STEPS,
        "zero2": {"ds_config": "ds_configs/zero2.json"} | FEWER_STEPS,
        "zero3": ZERO3,
        "offload": {"ds_config": "ds_configs/zero3_offload.json"} | FEWER_STEPS,
        "non-reentrant": ZERO3 | FEWER_STEPS | {"gradient_checkpointing": "non_reentrant"},
    },
    "fold": {"zero3": ZERO3 | {"residual": "fold"}},
    "nf4": {"zero3": ZERO3 | NF4},
    "gated": {"zero3": ZERO3 | GATED, "zero2": {"ds_config": "ds_configs/zero2.json"} | GATED | FEWER_STEPS},
}
PAIRS = [(like, name) for like, variants in ON_TWO_RANKS.items() for name in variants]


def flags_of(folder: Path, settings: dict[str, str]) -> list[str]:
    """Return the command line of a run in ``folder``; its neighbours share the caches."""
    places = {"output_dir": folder, "svd_cache": folder.parent / "svd", "token_cache": folder.parent / "tokens"}
    flags = COMMON_HERE | FINISH | settings | {name: str(path) for name, path in places.items()}
    flags |= {"model": str(demo.base_path()), "data": str(demo.train_data())}
    return [word for flag, value in flags.items() for word in (f"--{flag}", value)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every variant."""
    root = tmp_path_factory.mktemp("finish")
    run_many([flags_of(root / f"1 {n}", s) for n, s in ON_ONE_RANK.items()], world_size=1, folder=root)
    two = [flags_of(root / f"2 {like} {name}", ON_TWO_RANKS[like][name]) for like, name in PAIRS]
    run_many(two, world_size=2, folder=root)
    return root


def grad_norms_of(folder: Path) -> list[float]:
    return [line["grad_norm"] for line in metrics_of(folder) if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(("like", "name"), PAIRS)
def test_two_ranks_give_the_losses_of_one_process(like: str, name: str, trained: Path) -> None:
    expected, losses = losses_of(trained / f"1 {like}"), losses_of(trained / f"2 {like} {name}")
    num_steps = int(ON_TWO_RANKS[like][name].get("max_steps", NUM_STEPS))
    assert (len(expected), len(losses)) == (NUM_STEPS, num_steps)
    assert losses == pytest.approx(expected[:num_steps], abs=1e-5)
    expected, norms = grad_norms_of(trained / f"1 {like}"), grad_norms_of(trained / f"2 {like} {name}")
    assert norms == pytest.approx(expected[:num_steps], rel=1e-3)


@pytest.mark.slow
def test_checkpointing_and_fold_change_little(trained: Path) -> None:
    plain = losses_of(trained / "1 plain")
    assert losses_of(trained / "1 reentrant") == pytest.approx(plain[:NUM_FEWER_STEPS], abs=1e-5)
    assert losses_of(trained / "1 fold") == pytest.approx(plain, abs=1e-3)


def only(key: str, folder: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_of(folder) if key in line]


@pytest.mark.slow
def test_the_log_says_what_the_finish_cost_and_has_no_router_afterwards(trained: Path) -> None:
    folder = trained / "2 plain zero3"
    (finish,) = only("dense_finish", folder)
    assert finish["step"] == LAST_ROUTED
    numbers = finish["dense_finish"]
    # Fillers are run on a second rank and do not count.
    (alone,) = only("dense_finish", trained / "1 plain")
    assert numbers["tokens"] == alone["dense_finish"]["tokens"] == only("loss", folder)[LAST_ROUTED - 1]["tokens"]
    assert 0 < numbers["unexplained_mean"] <= numbers["unexplained_max"] < 1 and numbers["seconds"] > 0
    for line in only("loss", folder):
        assert (line["balance_loss"] is None) == (line["router_entropy"] is None) == (line["step"] > LAST_ROUTED)
    evaluated = [line["step"] for line in only("eval_loss", folder)]
    assert evaluated == [5, LAST_ROUTED, LAST_ROUTED, 10, 15, 20]


@pytest.mark.slow
def test_the_learning_rate_goes_on_by_its_schedule(trained: Path) -> None:
    rates = [line["lr"] for line in only("loss", trained / "2 plain zero3")]
    inverse_sqrt = 5e-4 * (2 / torch.arange(2, NUM_STEPS)).sqrt()
    assert rates[2:] == pytest.approx(inverse_sqrt.tolist(), rel=1e-5)


@pytest.mark.slow
def test_checkpoints_hold_a_routed_adapter_before_and_a_dense_one_afterwards(trained: Path, tmp_path: Path) -> None:
    before = read_adapter(trained / "2 plain zero3" / f"checkpoint-{LAST_ROUTED}")
    after = read_adapter(trained / "2 plain zero3" / f"checkpoint-{NUM_STEPS}")
    assert before.is_routed and not after.is_routed
    written = json.loads((after.path / "adapter_config.json").read_text())
    assert written["routed"] is False
    assert not any("router" in name for name in load_file(after.path / "adapter_model.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(demo.base_path(), dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, str(after.path), autocast_adapter_dtype=False)
    export_exact(after.path, output=tmp_path / "out", base=str(demo.base_path()))
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    tokens = token_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, exact(tokens).logits)


@pytest.mark.slow
@pytest.mark.parametrize("like", ["fold", "nf4", "gated"])
def test_one_and_two_ranks_leave_the_same_dense_adapter(like: str, trained: Path) -> None:
    one, two = (
        load_file(trained / run / f"checkpoint-{NUM_STEPS}" / "adapter" / "adapter_model.safetensors")
        for run in (f"1 {like}", f"2 {like} zero3")
    )
    assert one.keys() == two.keys()
    assert all((one[name] - two[name]).abs().max() < 1e-4 for name in one)


def test_a_finish_before_enough_tokens_is_refused() -> None:
    model = peft.get_peft_model(causal_lm(), GoatConfig(r=8, num_experts=4, top_k=2), adapter_name=ADAPTER_NAME)
    check_enough(model, 96)
    with pytest.raises(ConfigError, match=r"dense_finish comes after 95 tokens, and the widest .* needs 96"):
        check_enough(model, 95)


def test_adam_goes_on_with_the_moments_that_a_and_b_had() -> None:
    torch.manual_seed(0)
    tokens_TI, num_experts = torch.randn(50, 6), 2
    a, b = (TensorState(*(torch.rand(shape) for _ in range(3)), num_steps=7) for shape in ((4, 6), (5, 4)))
    h_TR = tokens_TI @ a.master.T / num_experts
    xx_II, hx_RI, hh_RR = tokens_TI.T @ tokens_TI, h_TR.T @ tokens_TI, h_TR.T @ h_TR
    fit_sums = FitSums(xx_II, hx_RI, hh_RR, torch.full((num_experts,), 25.0), len(tokens_TI))
    dense = dense_finish._dense(dense_finish._Routed(a, b, None, None, num_experts), fit_sums)
    torch.testing.assert_close(dense.a.master, a.master / num_experts)
    for found, kept in (
        (dense.a.exp_avg, a.exp_avg),
        (dense.a.exp_avg_sq, a.exp_avg_sq),
        *zip(dense.b, b, strict=True),
    ):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(kept))
    assert dense.a.num_steps == 7


def test_the_gradient_of_a_dense_a_is_divided_by_the_number_of_experts() -> None:
    model: Any = peft.get_peft_model(causal_lm(), GoatConfig(r=8, num_experts=4, top_k=2), adapter_name=ADAPTER_NAME)
    experts = next(named_experts(model, ADAPTER_NAME)).experts
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=token_ids(1, 9), labels=token_ids(1, 9)).loss.backward()
        gradients.append((experts.A.grad.clone(), experts.B.grad.clone()))
        dense_finish.train_in_units_of_a(model)
    (a, b), (a_divided, b_again) = gradients
    torch.testing.assert_close(a_divided, a / 4)
    torch.testing.assert_close(b_again, b)


def test_tokens_until_a_step_are_those_of_its_packs() -> None:
    dataset = Dataset.from_dict({"num_tokens": [10, 20, 30, 40]})
    plan = BatchPlan(
        packs=[[0], [1, 2], [3]],
        num_labels=[1, 1, 1],
        micro_batch_size=1,
        global_batch_size=1,
        world_size=1,
        seed=0,
    )
    sizes = [10, 50, 40]
    order = [int(pack) for epoch in range(2) for pack in plan.epoch_order(epoch)]
    for step in range(6):
        assert num_tokens_until(step, plan, dataset) == sum(sizes[pack] for pack in order[:step])


@pytest.mark.slow
def test_where_all_tokens_have_the_same_gates_nothing_is_lost_and_training_goes_on(tmp_path: Path) -> None:
    flags = COMMON | ZERO3 | EVEN | {"svd_cache": str(tmp_path / "svd"), "token_cache": str(tmp_path / "tokens")}
    line = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    run_ranks(["tests/zero/dense_finish_on_ranks.py", str(tmp_path), *line], world_size=2)
    for rank in range(2):
        told = json.loads((tmp_path / f"told-{rank}.json").read_text())
        assert told["after"] == pytest.approx(told["before"], rel=1e-5)
        assert told["unexplained"] < 1e-6
        assert told["b_is_kept"]
        # Sums in fp32 over few tokens leave directions that hardly matter uncertain.
        assert told["a_is_shared_out"] < 1e-2
        assert not told["old_optimizer_lives"], "two optimizers would double the memory of a run"
        assert sum(told["trained"]) < sum(told["after"])
