"""A config is checked whole, and comes back from disk as it was."""

import json
import pickle
from pathlib import Path

import pytest
from peft import PeftConfig

from goat_ds import ConfigError, GoatConfig
from goat_ds.method.routing import Routing
from goat_ds.method.scaling import Scaling
from goat_ds.method.spectrum import Init
from goat_ds.tuner.config import Residual

EVERYTHING = GoatConfig(
    r=6, num_experts=3, top_k=1, init="pissa", scaling="rslora", eta=0.1, lora_alpha=12, rho=5.0, adaptive_scale=True,
    residual="fold", balance_coef=0.01, dropout=0.05, target_modules=["q_proj", "v_proj"], exclude_modules=["k_proj"],
    modules_to_save=["lm_head"], layers_to_transform=[0], layers_pattern="layers", routing="threshold",
    max_threshold=0.3, shared_experts=1, temperature=0.5, expert_dropout=0.1, router_noise=0.2, top_p=0.4,
)  # fmt: skip


def test_a_config_comes_back_from_disk_as_it_was_but_deferred(tmp_path: Path) -> None:
    EVERYTHING.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, GoatConfig)
    assert loaded.deferred
    assert loaded.to_dict() == EVERYTHING.to_dict()
    assert (loaded.init, loaded.scaling, loaded.residual) == (Init.PISSA, Scaling.RSLORA, Residual.FOLD)
    assert loaded.routing is Routing.THRESHOLD


def test_a_saved_config_is_plain_json_that_names_the_method(tmp_path: Path) -> None:
    EVERYTHING.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["init"], saved["scaling"]) == ("GOAT", "pissa", "rslora")
    assert {"r", "num_experts", "top_k", "eta", "lora_alpha", "rho", "adaptive_scale", "residual"} <= set(saved)


def test_a_config_survives_pickling() -> None:
    copied = pickle.loads(pickle.dumps(EVERYTHING))
    assert copied == EVERYTHING
    assert copied.init is Init.PISSA


def test_all_problems_of_a_config_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        GoatConfig(
            r=10, num_experts=8, top_k=9, init="svd", scaling="big", residual="none", eta=0, rho=-1, dropout=1,
            lora_alpha=float("nan"), balance_coef=float("nan"), layers_pattern="layers",
        )  # fmt: skip
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "init", "scaling", "residual", "num_experts", "top_k", "eta", "lora_alpha", "rho", "balance_coef", "dropout",
        "layers_pattern",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 10}, r"num_experts \(8\) must divide r \(10\)"),
        ({"top_k": 9}, r"top_k \(9\) must be at most num_experts \(8\)"),
        ({"num_experts": 0}, r"num_experts \(0\) must be at least 1"),
        ({"r": "32"}, r"r \('32'\) must be a whole number"),
        ({"balance_coef": "1e-3"}, r"balance_coef \('1e-3'\) must be a number"),
        ({"init": "olora"}, r"init \(olora\) starts one expert, and num_experts is \d+"),
        ({"init": "Goat"}, r"init \(Goat\) must be one of goat, goat_mini, pissa, milora, pissa_milora, olora, zero"),
        ({"init": "zero", "adaptive_scale": True}, "adaptive_scale needs a start with singular values"),
        ({"routing": "top"}, r"routing \(top\) must be one of top_k, top_p, threshold"),
        (
            {"shared_experts": 7, "top_k": 1},
            r"shared_experts \(7\) must be at least 0 and leave 2 of num_experts \(8\)",
        ),
        ({"shared_experts": 2, "top_k": 7}, r"top_k \(7\) must be at most num_experts \(8\) less shared_experts \(2\)"),
        ({"top_p": 0.0}, r"top_p \(0.0\) must be above 0 and at most 1"),
        ({"max_threshold": 2.0}, r"max_threshold \(2.0\) must be above 0 and at most 1"),
        ({"max_threshold": "1"}, r"max_threshold \('1'\) must be a number, or null"),
        ({"temperature": 0}, r"temperature \(0\) must be above 0"),
        ({"router_noise": -1.0}, r"router_noise \(-1.0\) must be at least 0"),
        ({"expert_dropout": 1}, r"expert_dropout \(1\) must be in \[0, 1\)"),
        ({"shared_A": True}, "shared_A is one A for all experts, and init goat starts each .*; use init zero"),
        ({"shared_A": 1}, r"shared_A \(1\) must be true or false"),
        ({"full_rank": 1}, r"full_rank \(1\) must be true or false"),
        (
            {"full_rank": True},
            r"full_rank starts every expert as a copy of the weight, and init is goat; use init zero",
        ),
        ({"full_rank": True, "init": "zero", "r": 8}, r"r \(8\) has no effect with full_rank, .*; leave it out"),
        ({"full_rank": True, "init": "zero", "scaling": "alpha"}, r"scaling \(alpha\) has no effect with full_rank"),
        (
            {"full_rank": True, "init": "zero", "adaptive_scale": True},
            r"adaptive_scale \(True\) has no effect with full_",
        ),
        ({"full_rank": True, "init": "zero", "residual": "gated"}, r"residual \(gated\) has no effect with full_rank"),
        ({"full_rank": True, "init": "zero", "shared_A": True}, r"shared_A \(True\) has no effect with full_rank"),
        ({"full_rank": True, "init": "zero", "routed": False, "deferred": True}, r"routed \(False\) is the dense form"),
        ({"rho_warmup_steps": 1.5}, r"rho_warmup_steps \(1.5\) must be a whole number"),
        ({"rho_warmup_steps": 9, "residual": "gated"}, r"rho_warmup_steps \(9\) leads from residual gated to lowrank"),
        ({"target_modules": "*q_proj"}, r"target_modules \(\*q_proj\) is not a regular expression: nothing to repeat"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 0}, "beside a regular expression in target_modules"),
    ],
)
def test_a_problem_names_the_field_and_its_value(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GoatConfig(**settings)  # type: ignore[arg-type]
