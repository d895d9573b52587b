"""Tasks of lm-evaluation-harness run from local files, and return the harness's own numbers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from goat_ds.errors import ConfigError
from goat_ds.evaluate import harness
from goat_ds.evaluate.harness import find_tasks, run_tasks

TASK = """
task: words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "w3 {{{{question}}}} w4"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
CHOICES = ["w20", "w26", "w50"]
QUESTIONS = ["w5", "w9 w9", "w6 w7", "w40"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tasks_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with one task and its data; skips where the harness is not installed."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'goat_ds[lm-eval]'")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": question, "choices": CHOICES, "answer": n % 3} for n, question in enumerate(QUESTIONS)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "words.yaml").write_text(TASK.format(data=folder / "words.jsonl"))
    yield folder


def slow_choice(model: Any, question: str, tokenizer: PreTrainedTokenizerBase) -> int:
    ids = tokenizer(f"w3 {question} w4", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits_V = model(input_ids=ids).logits[0, -1]
    return int(logits_V[[tokenizer.convert_tokens_to_ids(choice) for choice in CHOICES]].argmax())


@pytest.mark.slow
def test_a_local_task_is_judged_as_by_hand(
    tasks_folder: Path, knowing: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(knowing).eval()
    right = [slow_choice(model, question, tokenizer) == n % 3 for n, question in enumerate(QUESTIONS)]
    assert right[:2] == [True, True]
    tasks = find_tasks(["words"], tasks_folder)
    settings: dict[str, Any] = {"batch_size": 2, "apply_chat_template": False}
    found = run_tasks(model, tokenizer, tasks, limit=None, **settings)
    assert found["words"]["acc"] == sum(right) / 4
    assert "acc_stderr" in found["words"]
    assert run_tasks(model, tokenizer, tasks, limit=2, **settings)["words"]["acc"] == 1.0


@pytest.mark.slow
def test_tasks_that_are_unknown_or_lack_their_data_are_refused(tasks_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks \(no_such\) is neither a task .* nor a YAML file; put the folder of"):
        find_tasks(["words", "no_such"], tasks_folder)
    (tasks_folder / "words.jsonl").unlink()
    # By its path this time.
    with pytest.raises(ConfigError, match=r"tasks \(.*words.yaml\) cannot be read: .*words.jsonl"):
        find_tasks([str(tasks_folder / "words.yaml")], None)


def test_without_the_harness_tasks_are_refused_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"tasks \(arc_easy, words\) need lm-evaluation-harness, .* 'goat_ds\[lm-eval\]'"
    ):
        find_tasks(["arc_easy", "words"], None)
