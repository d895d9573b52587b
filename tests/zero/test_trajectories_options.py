"""Every option of the mixture under ZeRO: two ranks give the losses of one process, and gated starts are the base."""

from pathlib import Path

import pytest

from tests.launching import losses_of, run_many
from tests.zero.plain_torch import COMMON, FEWER_STEPS, NUM_FEWER_STEPS, TWO_IN_ONE_STEP, ZERO3

GATED = {"residual": "gated", "shared_experts": "1", "temperature": "0.5"}
THRESHOLD = {"routing": "threshold", "rho_warmup_steps": "5"}
ONE_A = {"init": "zero", "shared_A": "true", "routing": "top_p", "top_p": "0.6"}
NF4 = {"load_in_4bit": "true"}
ON_ONE_RANK: dict[str, dict[str, str]] = {
    "gated": GATED,
    "threshold": THRESHOLD | {"gradient_checkpointing": "reentrant"},
    "one A": ONE_A,
    "gated threshold nf4": GATED | {"routing": "threshold"} | NF4,
}
ON_TWO_RANKS: dict[str, dict[str, dict[str, str]]] = {
    "gated": {"zero1": {"ds_config": "ds_configs/zero1.json"}, "zero3": {"gradient_checkpointing": "non_reentrant"}},
    "threshold": {"zero2": {"ds_config": "ds_configs/zero2.json"}, "zero3": {}},
    "one A": {"zero3": {}},
    "gated threshold nf4": {"zero3": {}},
}
PAIRS = [(like, name) for like, variants in ON_TWO_RANKS.items() for name in variants]


def flags_of(folder: Path, settings: dict[str, str]) -> list[str]:
    places = {"output_dir": folder, "svd_cache": folder.parent / "svd", "token_cache": folder.parent / "tokens"}
    flags = COMMON | FEWER_STEPS | ZERO3 | settings | {name: str(path) for name, path in places.items()}
    return [word for flag, value in flags.items() for word in (f"--{flag}", value)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every variant."""
    root = tmp_path_factory.mktemp("options")
    one = [flags_of(root / f"1 {name}", settings | TWO_IN_ONE_STEP) for name, settings in ON_ONE_RANK.items()]
    run_many(one, world_size=1, folder=root)
    two = [flags_of(root / f"2 {like} {name}", ON_ONE_RANK[like] | ON_TWO_RANKS[like][name]) for like, name in PAIRS]
    run_many(two, world_size=2, folder=root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("like", "name"), PAIRS)
def test_two_ranks_give_the_losses_of_one_process(like: str, name: str, trained: Path) -> None:
    expected, losses = losses_of(trained / f"1 {like}"), losses_of(trained / f"2 {like} {name}")
    assert len(losses) == NUM_FEWER_STEPS
    assert losses == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_every_start_that_is_the_base_has_the_same_first_loss_to_the_last_bit(trained: Path) -> None:
    first = {name: losses_of(trained / f"1 {name}")[:3] for name in ("gated", "threshold", "one A")}
    assert first["gated"][0] == first["threshold"][0] == first["one A"][0]
    # The rate of the first step is 0.
    assert len({losses[2] for losses in first.values()}) == 3
