"""What other methods have trained leaves as PEFT's adapter, or merged by PEFT; the rest is refused in a sentence."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, HiraConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from goat_ds import demo
from goat_ds.cli.export import ExportSettings, Mode, export_rival, rival_problems
from goat_ds.errors import ConfigError, ExportError, MergeError
from goat_ds.evaluate.settings import EvalSettings
from goat_ds.evaluate.subject import find_subject
from goat_ds.export import MergeBase, Rival, find_rival
from goat_ds.precision import Precision

TOKENS = torch.arange(5, 40)[None]


def checkpoint_of(folder: Path, config: PeftConfig) -> tuple[Path, torch.Tensor]:
    """Write a checkpoint's adapter with values that a training could have left; return it and its logits."""
    base = AutoModelForCausalLM.from_pretrained(demo.base_path(), dtype=torch.float32)
    torch.manual_seed(0)
    model: Any = get_peft_model(base, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder / "checkpoint-3" / "adapter")
    with torch.no_grad():
        return folder, model(input_ids=TOKENS).logits


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **more)


MERGING: dict[str, PeftConfig] = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "hira": HiraConfig(r=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
}


def settings_of(folder: Path, output: Path, mode: Mode, **more: Any) -> ExportSettings:
    return ExportSettings(checkpoint=str(folder), mode=mode, output=str(output), **more)


def exported(settings: ExportSettings) -> Iterator[str]:
    rival = found(Path(settings.checkpoint))
    problems = list(rival_problems(settings, rival))
    if not problems:
        export_rival(settings, rival)
    yield from problems


def found(folder: Path) -> Rival:
    rival = find_rival(folder)
    assert rival is not None
    return rival


@pytest.mark.parametrize("name", MERGING)
@torch.no_grad()
def test_a_dense_export_is_the_trained_model_without_peft(name: str, tmp_path: Path) -> None:
    folder, logits = checkpoint_of(tmp_path / "run", MERGING[name])
    assert not list(exported(settings_of(folder, tmp_path / "out", Mode.DENSE)))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected_dtype = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert expected_dtype == json.loads((demo.base_path() / "config.json").read_text())["dtype"]
    # Weights are rounded to the base's bf16 once.
    nats = (logits.softmax(-1) * (logits.log_softmax(-1) - merged(input_ids=TOKENS).logits.log_softmax(-1))).sum(-1)
    assert nats.mean() < 2e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


@torch.no_grad()
def test_a_dense_export_in_fp32_is_the_trained_model_to_its_last_digits(tmp_path: Path) -> None:
    folder, logits = checkpoint_of(tmp_path / "run", lora())
    assert not list(exported(settings_of(folder, tmp_path / "out", Mode.DENSE, dtype=Precision.FP32)))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", [Mode.ADAPTER, Mode.LORA])
@torch.no_grad()
def test_an_adapter_is_copied_as_it_is(mode: Mode, tmp_path: Path) -> None:
    folder, logits = checkpoint_of(tmp_path / "run", lora())
    assert not list(exported(settings_of(folder, tmp_path / "out", mode)))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(again(input_ids=TOKENS).logits, logits)


@pytest.mark.parametrize(
    ("mode", "more", "words"),
    [
        (Mode.EXACT, {}, r"mode (exact) is for routed experts, and this is LORA"),
        (Mode.DENSE, {"fit": "mean_gates"}, r"fit (mean_gates) has no effect on what LORA has trained"),
        (Mode.DENSE, {"refine_steps": 3}, r"refine_steps (3) has no effect on what LORA has trained"),
        (Mode.LORA, {"dtype": "fp32"}, r"dtype (fp32) has no effect on what LORA has trained"),
    ],
)
def test_what_has_no_meaning_for_a_lora_is_refused(
    mode: Mode, more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder, _ = checkpoint_of(tmp_path / "run", lora())
    (problem,) = exported(settings_of(folder, tmp_path / "out", mode, **more))
    assert problem.startswith(words)


def test_a_method_that_peft_does_not_merge_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = checkpoint_of(tmp_path / "run", VeraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.tuners.vera.layer import Linear

    monkeypatch.setattr(Linear, "merge", BaseTunerLayer.merge)
    with pytest.raises(MergeError, match=r"an adapter of VERA cannot be merged; use --mode adapter"):
        list(exported(settings_of(folder, tmp_path / "out", Mode.DENSE)))
    assert not (tmp_path / "out").exists()


def whole_model(folder: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(demo.base_path(), dtype=torch.float32)
    base.save_pretrained(folder / "checkpoint-3" / "model")
    AutoTokenizer.from_pretrained(demo.base_path()).save_pretrained(folder / "checkpoint-3" / "model")
    return folder


def test_a_whole_model_is_copied_and_has_no_adapter(tmp_path: Path) -> None:
    folder = whole_model(tmp_path / "run")
    assert not list(exported(settings_of(folder, tmp_path / "out", Mode.DENSE)))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    (problem,) = exported(settings_of(folder, tmp_path / "other", Mode.ADAPTER))
    assert problem == "mode (adapter): a whole model was trained, and no adapter; use --mode dense"


def test_a_run_that_trained_every_weight_is_evaluated_as_the_model_it_left(tmp_path: Path) -> None:
    folder = whole_model(tmp_path / "run")
    subject = find_subject(EvalSettings(model=str(folder)))
    assert subject.kind == "whole model" and subject.base.name == str(folder / "checkpoint-3" / "model")
    assert subject.tokenizer().get_vocab() == AutoTokenizer.from_pretrained(demo.base_path()).get_vocab()


def test_nothing_that_is_there_is_overwritten(tmp_path: Path) -> None:
    folder = whole_model(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match=r"exists already"):
        list(exported(settings_of(folder, tmp_path / "out", Mode.DENSE)))


def beside(folder: Path, **about: Any) -> Path:
    """Write what a run says of itself beside its adapter."""
    (folder / "checkpoint-3" / "run.json").write_text(json.dumps({"run": {"settings": {}}} | about))
    return folder


def test_a_base_with_other_weights_than_the_run_began_on_is_refused(tmp_path: Path) -> None:
    folder, _ = checkpoint_of(tmp_path / "run", lora())
    other = {"dtype": "bfloat16", "sha256": "0" * 64}
    beside(folder, base_fingerprint=other)
    with pytest.raises(ExportError, match="has other weights than the one that its training began on"):
        list(exported(settings_of(folder, tmp_path / "out", Mode.DENSE)))
    with pytest.raises(ConfigError, match="has other weights"):
        find_subject(EvalSettings(model=str(folder))).load()


def test_a_lora_of_a_4_bit_base_is_merged_into_another_one_only_where_that_is_said(tmp_path: Path) -> None:
    folder, _ = checkpoint_of(tmp_path / "run", lora())
    beside(folder, run={"settings": {"load_in_4bit": True}})
    (problem,) = exported(settings_of(folder, tmp_path / "out", Mode.DENSE))
    assert "give --merge_base w16 if that is wanted" in problem
    assert not list(exported(settings_of(folder, tmp_path / "out", Mode.DENSE, merge_base=MergeBase.W16)))
    with pytest.raises(ConfigError, match="was trained on a base that its run made 4-bit"):
        find_subject(EvalSettings(model=str(folder)))
