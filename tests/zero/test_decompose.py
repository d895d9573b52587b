"""Decompositions are shared out, cached by content, and the same on any ranks and stage."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from goat_ds import GoatConfig
from goat_ds.method import spectrum
from goat_ds.tuner.model import named_experts
from goat_ds.zero import decompose
from goat_ds.zero.waves import waves
from tests.launching import run_ranks
from tests.models import causal_lm


class Started(NamedTuple):
    """What every rank reported, and the factors it sees."""

    reports: list[dict[str, Any]]
    factors: list[dict[str, Tensor]]


def start(stage: int, *, world_size: int, cache: Path, output: Path) -> Started:
    output.mkdir()
    run_ranks(["tests/zero/start_on_ranks.py", str(stage), str(cache), str(output)], world_size=world_size)
    return Started(
        [json.loads((output / f"report-{rank}.json").read_text()) for rank in range(world_size)],
        [load_file(output / f"factors-{rank}.safetensors") for rank in range(world_size)],
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def sharded(root: Path) -> Started:
    """ZeRO-3 on two ranks, nothing cached."""
    return start(3, world_size=2, cache=root / "cold", output=root / "sharded")


@pytest.fixture(scope="module")
def whole(root: Path) -> Started:
    """ZeRO-1 on one process, with a cache of its own."""
    return start(1, world_size=1, cache=root / "other", output=root / "whole")


@pytest.mark.slow
def test_each_rank_decomposes_about_half_and_never_holds_two_whole_weights(sharded: Started) -> None:
    whole_cost = sum(report["cost"] for report in sharded.reports)
    for report in sharded.reports:
        assert 0.4 <= report["cost"] / whole_cost <= 0.6
        assert report["most_whole_weights"] == 1
        assert report["num_cached"] == 0


@pytest.mark.slow
def test_factors_are_the_same_on_every_rank_and_those_of_one_process(sharded: Started, whole: Started) -> None:
    expected = whole.factors[0]
    for factors in sharded.factors:
        assert factors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in factors.items())


@pytest.mark.slow
def test_a_relaunch_on_other_ranks_and_stage_decomposes_nothing(root: Path, sharded: Started) -> None:
    again = start(2, world_size=1, cache=root / "cold", output=root / "again")
    assert again.reports[0]["num_cached"] == again.reports[0]["num_layers"] == sharded.reports[0]["num_layers"]
    assert all(torch.equal(tensor, sharded.factors[0][name]) for name, tensor in again.factors[0].items())


@pytest.mark.slow
def test_the_start_stays_frozen_in_shards(sharded: Started) -> None:
    assert sharded.reports[0]["frozen"] == ["A0", "B0"]


def one_layer() -> tuple[Tensor, Any]:
    model = get_peft_model(causal_lm(), GoatConfig(r=8, num_experts=4, deferred=True, target_modules=["q_proj"]))
    item = next(iter(named_experts(model, "default")))
    return item.layer.weight_OI(), item.experts


def test_directions_from_the_cache_are_those_that_were_computed(tmp_path: Path, monkeypatch: Any) -> None:
    weight, experts = one_layer()
    computed, was_cached = decompose.directions_of(weight, experts, cache=tmp_path)
    assert not was_cached

    def never(*_: Any) -> spectrum.Directions:
        raise AssertionError("decomposed although cached")

    monkeypatch.setattr("goat_ds.tuner.layer.decompose", never)
    cached, was_cached = decompose.directions_of(weight, experts, cache=tmp_path)
    assert was_cached
    assert all(torch.equal(a, b) for a, b in zip(computed, cached, strict=True))


@pytest.mark.parametrize("last", [1e-2, 1e-6, 0.0], ids=["well conditioned", "condition 1e6", "rank-deficient"])
def test_directions_in_fp32_are_accurate_and_the_same_bits_whether_computed_or_cached(
    last: float, tmp_path: Path
) -> None:
    like, experts = one_layer()
    spectrum_Q = torch.linspace(1, 0, min(like.shape)) ** 6 * (1 - last) + last
    left, right = (torch.linalg.qr(torch.randn(n, len(spectrum_Q), dtype=torch.float64)).Q for n in like.shape)
    weight = (left * spectrum_Q @ right.T).bfloat16()
    first, *others = (decompose.directions_of(weight, experts, cache=cache)[0] for cache in (None, tmp_path, tmp_path))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    u_OR, s_R, v_RI = (tensor.double() for tensor in first)
    exact_Q = torch.linalg.svdvals(weight.double())
    for wrong in (weight.double() @ v_RI.T - u_OR * s_R, weight.double().T @ u_OR - v_RI.T * s_R):
        assert wrong.norm(dim=0).max() <= 1e-5 * exact_Q[0]
    assert (s_R - exact_Q[experts.indices().flatten()]).abs().max() <= 1e-5 * exact_Q[0]
    for gram in (u_OR.T @ u_OR, v_RI @ v_RI.T):
        assert (gram - torch.eye(len(s_R))).abs().max() <= 1e-5


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_cache_entry_is_said_and_computed_again(damage: str, tmp_path: Path, caplog: Any) -> None:
    weight, experts = one_layer()
    computed, _ = decompose.directions_of(weight, experts, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    content = bytearray(entry.read_bytes())
    content[-5] ^= 1
    entry.write_bytes({"truncated": content[:-9], "flipped": content, "empty": b""}[damage])
    again, was_cached = decompose.directions_of(weight, experts, cache=tmp_path)
    assert not was_cached
    assert "is damaged" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(computed, again, strict=True))
    assert decompose.directions_of(weight, experts, cache=tmp_path)[1]


def test_many_writers_of_one_entry_leave_one_whole_entry_and_nothing_else(tmp_path: Path) -> None:
    weight, experts = one_layer()
    with ThreadPoolExecutor(8) as writers:
        found = list(writers.map(lambda _: decompose.directions_of(weight, experts, cache=tmp_path)[0], range(8)))
    assert len(list(tmp_path.iterdir())) == 1
    again, was_cached = decompose.directions_of(weight, experts, cache=tmp_path)
    assert was_cached
    assert all(torch.equal(a, b) for other in found for a, b in zip(other, again, strict=True))


def test_neighbouring_seeds_and_layers_share_no_generator() -> None:
    seeds = {decompose.seed_of(seed, name) for seed in range(20) for name in ("a", "b", "c")}
    assert len(seeds) == 60


def test_what_a_layer_draws_is_its_seed_s_alone_and_the_run_draws_on_as_before() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with decompose._drawing(7):
        drawn = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)


def test_another_weight_or_start_is_another_entry(tmp_path: Path) -> None:
    weight, experts = one_layer()
    decompose.directions_of(weight, experts, cache=tmp_path)
    assert not decompose.directions_of(weight + 1e-6, experts, cache=tmp_path)[1]
    experts.config.init = spectrum.Init.PISSA
    assert not decompose.directions_of(weight, experts, cache=tmp_path)[1]


def test_a_cache_that_cannot_be_written_is_said_and_does_no_harm(tmp_path: Path, caplog: Any) -> None:
    weight, experts = one_layer()
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    directions, _ = decompose.directions_of(weight, experts, cache=in_the_way)
    assert "was not written" in caplog.text
    assert directions.s_R.numel() == 8


def test_waves_give_a_rank_one_layer_at_a_time_and_balance_the_cost() -> None:
    model = get_peft_model(causal_lm(), GoatConfig(r=8, num_experts=4, deferred=True))
    works = list(decompose._works(model, "default", None))
    done = [0.0, 0.0, 0.0]
    seen = []
    for wave in waves(works, cost=decompose._cost, world_size=3):
        assert len({rank for _, rank in wave}) == len(wave)
        for work, rank in wave:
            done[rank] += decompose._cost(work)
            seen.append(work.path)
    assert sorted(seen) == sorted(work.path for work in works)
    assert max(done) < 1.5 * min(done)
