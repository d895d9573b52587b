"""Question a model as its users would: plain transformers, nothing of goat_ds.

    python goat_ds/demo/exam.py --model FOLDER --data FILE

Answers the instructions of an Alpaca file greedily, through the tokenizer's chat template and with a KV cache, and
prints the share of answers that equal the expected ones. Run as a file, it cannot import goat_ds.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MOST_TOKENS = 24


class Exam(NamedTuple):
    """Expected answers and given ones, question by question."""

    questions: list[str]
    expected: list[str]
    given: list[str]

    @property
    def exact_match(self) -> float:
        """Share of answers that are right to the letter."""
        return sum(a == b for a, b in zip(self.expected, self.given, strict=True)) / len(self.expected)


def examine(model: Any, tokenizer: Any, data: Path, *, batch_size: int = 64) -> Exam:
    """Let a model answer every instruction of a file."""
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    questions = [f"{r['instruction']}\n\n{r['input']}" if r.get("input") else r["instruction"] for r in records]
    given: list[str] = []
    for first in range(0, len(questions), batch_size):
        given += _answer(model, tokenizer, questions[first : first + batch_size])
    return Exam(questions, [record["output"].strip() for record in records], given)


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[str]:
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    generated = model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        max_new_tokens=MOST_TOKENS,
        do_sample=False,
        use_cache=True,
    )
    answers = generated[:, prompts["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def main() -> None:
    """Question the model that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder; its own code is trusted")
    parser.add_argument("--data", required=True, type=Path, help="instructions in Alpaca format, JSON Lines")
    parser.add_argument("--show", type=int, default=3, help="answers to print")
    arguments = parser.parse_args()
    # As on a machine where goat_ds is not installed.
    sys.modules["goat_ds"] = None  # type: ignore[assignment]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=True).eval()
    exam = examine(model, tokenizer, arguments.data)
    for question, expected, given in list(zip(*exam, strict=True))[: arguments.show]:
        print(f"  {question!r}: {given!r} (expected {expected!r})")
    print(f"exact match {exam.exact_match:.1%} of {len(exam.expected)}")


if __name__ == "__main__":
    main()
