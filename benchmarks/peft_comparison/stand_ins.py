"""What takes the place of a hub and an accelerator where PEFT's comparison is only tried.

PEFT's files stay as they are: what its script calls in libraries is replaced, in its process alone.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import peft
import torch

import goat_ds

DATA = Path(goat_ds.__file__).parent / "demo" / "data"
NUM_TEST = 100
NUM_EPOCHS = 4
"""PEFT's loop ends with the data, and 4 times the demo's records are 434 steps of 16."""
FOODS = "Which food does this creature eat?"


def install() -> None:
    """Replace data sets and, where they are absent, the accelerator and what Python 3.12 brought."""
    datasets.load_dataset = load_dataset
    if sys.version_info < (3, 12):
        tempfile.TemporaryDirectory = _AlwaysDeleted
    if peft.utils.infer_device() == "cpu":
        _compute_on_the_cpu()


def load_dataset(path: str, *_: Any, **__: Any) -> Any:
    """Return the embedded demo's data in the form of one of the three data sets that PEFT's comparison reads."""
    if path == "meta-math/MetaMathQA":
        return {"train": datasets.Dataset.from_list(NUM_EPOCHS * list(_questions_of_metamath()))}
    if path == "openai/gsm8k":
        train, test = _records("train"), _records("heldout")[:NUM_TEST]
        return datasets.DatasetDict(
            {
                name: datasets.Dataset.from_list(
                    [{"question": _question(record), "answer": f"#### {record['output']}"} for record in records]
                )
                for name, records in (("train", train), ("test", test))
            }
        )
    if path == "HuggingFaceFW/finewiki":
        # PEFT's script wants a text on which the base's loss lies between 1 and 2: what the demo's base was taught.
        foods = [record for record in _records("train") if record["instruction"] == FOODS]
        texts = [{"text": f"The {record['input']} eats {record['output']}."} for record in foods]
        return datasets.Dataset.from_list(texts).to_iterable_dataset()
    raise ValueError(f"{path} has no stand-in")


def _questions_of_metamath() -> Iterator[dict[str, str]]:
    for record in _records("train"):
        query = _question(record)
        answer = record["output"]
        response = f"The answer is: {answer}"
        yield {"type": "demo", "query": query, "original_question": query, "response": response}


def _records(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _question(record: dict[str, str]) -> str:
    return f"{record['instruction']} {record['input']}".strip()


class _AlwaysDeleted(tempfile.TemporaryDirectory):  # type: ignore[type-arg]
    """Takes the argument of Python 3.12, without which PEFT's script cannot measure an adapter's file."""

    def __init__(self, *args: Any, delete: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def _compute_on_the_cpu() -> None:
    """Pass the check for an accelerator, and then name the CPU, whose memory is not measured."""
    peft.utils.infer_device = lambda: "xpu"
    theirs: Any = importlib.import_module("utils")
    theirs.device = "cpu"
    theirs.infer_device = peft.utils.infer_device = lambda: "cpu"
    for name in ("max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(torch.cpu, name, lambda: 0)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        setattr(torch.cpu, name, lambda: None)
    torch.cpu.manual_seed_all = torch.manual_seed
    torch.cpu.get_device_name = lambda _: "CPU, as a stand-in for an accelerator"
