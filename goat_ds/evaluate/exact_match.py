"""Greedy answers that are right to the letter.

Shape letters: N sequences of a batch, T tokens.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from goat_ds.data import stop_ids
from goat_ds.evaluate.questions import Prompt


class ExactMatch(NamedTuple):
    """How many answers are right."""

    accuracy: float
    num_right: int
    num_records: int


class Padded(NamedTuple):
    """Sequences of one batch; padding stands before them, so that all end together."""

    input_ids: Tensor
    """``[N, T]``."""
    attention_mask: Tensor
    """``[N, T]``, 0 on padding."""


def exact_match(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> ExactMatch:
    """Count the prompts whose greedy answer is the expected one, white space around it aside.

    Args:
        model: A causal language model that can generate; left with a generation config of its own.
        prompts: With the questions they belong to.
        tokenizer: Turns ids into text.
        batch_size: Prompts that are answered at once.
        max_new_tokens: After which an answer is given up.
    """
    stops = stop_ids(tokenizer)
    # What the model's own would add to greedy search, such as a penalty for repetition, is no part of it.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=stops[0], use_cache=True
    )
    # The longest first: neighbours need little padding, and what does not fit into memory fails at once.
    ordered = sorted(prompts, key=lambda prompt: -len(prompt.input_ids))
    num_right = 0
    for first in tqdm(range(0, len(ordered), batch_size), desc="exact_match", unit="batch"):
        batch = ordered[first : first + batch_size]
        answers = _answers(model, batch, stops)
        texts = [text.strip() for text in tokenizer.batch_decode(answers)]
        num_right += sum(text == prompt.question.answer for text, prompt in zip(texts, batch, strict=True))
    return ExactMatch(num_right / len(prompts), num_right, len(prompts))


@torch.no_grad()
def _answers(model: Any, batch: Sequence[Prompt], stops: Collection[int]) -> list[list[int]]:
    padded = left_padded([prompt.input_ids for prompt in batch], device=model.device)
    generated = model.generate(input_ids=padded.input_ids, attention_mask=padded.attention_mask)
    return [_up_to_stop(ids, stops) for ids in generated[:, padded.input_ids.shape[1] :].tolist()]


def _up_to_stop(ids: list[int], stops: Collection[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in stops), len(ids))]


def left_padded(sequences: Sequence[Sequence[int]], *, device: torch.device) -> Padded:
    """Lay sequences of different lengths out as one batch."""
    longest = max(map(len, sequences))
    # Token 0 exists in every vocabulary, and the mask hides it.
    rows = [([0] * (longest - len(ids)), ids) for ids in sequences]
    return Padded(
        torch.tensor([[*padding, *ids] for padding, ids in rows], device=device),
        torch.tensor([[*padding, *([1] * len(ids))] for padding, ids in rows], device=device),
    )
