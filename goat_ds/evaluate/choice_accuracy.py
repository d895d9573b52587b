"""Whether the right one of several answers is the most likely one.

The log-likelihood of an answer is summed over its tokens and the token that closes it, so that an answer which begins
like another is a different event. What the choices of a question share, its prompt, runs once: its keys and values are
repeated for all choices, which then run as one batch.

Shape letters: N questions of a batch, C choices, M = N C, T tokens of a prompt, L tokens of a rest, K of these M L
tokens in a chunk, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from goat_ds.data import IGNORE, in_chunks
from goat_ds.evaluate.exact_match import left_padded
from goat_ds.evaluate.questions import Candidates


class ChoiceAccuracy(NamedTuple):
    """How many answers are the most likely ones."""

    accuracy: float
    """By the summed log-likelihood of an answer."""
    accuracy_per_token: float
    """By its mean over the tokens of an answer, which does not favour short ones."""
    num_right: int
    num_right_per_token: int
    num_records: int
    choices: list[str]


def choice_accuracy(
    model: Any, candidates: Sequence[Candidates], choices: Sequence[str], *, batch_size: int
) -> ChoiceAccuracy:
    """Count the questions whose right choice is the most likely one.

    Args:
        model: A causal language model with a KV cache.
        candidates: Each with all of ``choices``.
        choices: For the report.
        batch_size: Answers that run at once; never fewer than those of one question.
    """
    num_questions = max(1, batch_size // len(choices))
    # The longest first: neighbours need little padding, and what does not fit into memory fails at once.
    ordered = sorted(candidates, key=lambda candidate: -len(candidate.shared))
    num_right = num_right_per_token = 0
    for first in tqdm(range(0, len(ordered), num_questions), desc="choice_accuracy", unit="batch"):
        batch = ordered[first : first + num_questions]
        right_N = torch.tensor([candidate.right for candidate in batch])
        sums_NC = log_likelihoods(model, batch).cpu()
        lengths_NC = torch.tensor([[_num_labels(labels) for labels in candidate.labels] for candidate in batch])
        num_right += int((sums_NC.argmax(1) == right_N).sum())
        num_right_per_token += int(((sums_NC / lengths_NC).argmax(1) == right_N).sum())
    total = len(candidates)
    return ChoiceAccuracy(
        num_right / total, num_right_per_token / total, num_right, num_right_per_token, total, list(choices)
    )


def _num_labels(labels: Sequence[int]) -> int:
    return len(labels) - labels.count(IGNORE)


@torch.no_grad()
def log_likelihoods(model: Any, batch: Sequence[Candidates]) -> Tensor:
    """Return the log-likelihood ``[N, C]`` of every answer of every question, in nats, fp32."""
    num_choices = len(batch[0].rests)
    prompts = left_padded([candidate.shared for candidate in batch], device=model.device)
    rests = [ids for candidate in batch for ids in candidate.rests]
    longest = max(map(len, rests))
    ids_ML = torch.tensor([_filled(ids, 0, longest) for ids in rests], device=model.device)
    labels_ML = torch.tensor(
        [_filled(labels, IGNORE, longest) for candidate in batch for labels in candidate.labels], device=model.device
    )
    first_NV, cache = _read_prompts(model, prompts.input_ids, prompts.attention_mask)
    cache.batch_repeat_interleave(num_choices)
    logits_MLV = _read_rests(model, ids_ML, prompts.attention_mask.repeat_interleave(num_choices, dim=0), cache)
    # The prompt's last position predicts the first token of a rest, and the last token of a rest predicts nothing.
    first_M1V = first_NV.repeat_interleave(num_choices, dim=0)[:, None]
    predicted_MLV = torch.cat([first_M1V, logits_MLV], dim=1)
    losses = [
        functional.cross_entropy(logits_KV.float(), labels_K, ignore_index=IGNORE, reduction="none")
        for logits_KV, labels_K in in_chunks(predicted_MLV.flatten(0, 1), labels_ML.flatten())
    ]
    return -torch.cat(losses).view(len(batch), num_choices, longest).sum(-1)


def _filled(ids: Sequence[int], filler: int, length: int) -> list[int]:
    return [*ids, *([filler] * (length - len(ids)))]


def _read_prompts(model: Any, ids_NT: Tensor, mask_NT: Tensor) -> tuple[Tensor, Any]:
    """Return the logits behind each prompt ``[N, V]``, and the keys and values."""
    positions_NT = (mask_NT.cumsum(1) - 1).clamp(min=0)
    output = model(
        input_ids=ids_NT, attention_mask=mask_NT, position_ids=positions_NT, logits_to_keep=1, use_cache=True
    )
    return output.logits[:, 0], output.past_key_values


def _read_rests(model: Any, ids_ML: Tensor, mask_MT: Tensor, cache: Any) -> Tensor:
    """Return the logits behind each token of the rests but the last ``[M, L - 1, V]``."""
    # Padding behind an answer is seen by nothing that counts, so it needs no mask.
    ids_ML = ids_ML[:, :-1]
    positions_ML = mask_MT.sum(1, keepdim=True) + torch.arange(ids_ML.shape[1], device=ids_ML.device)
    output = model(
        input_ids=ids_ML,
        attention_mask=torch.cat([mask_MT, torch.ones_like(ids_ML)], dim=1),
        position_ids=positions_ML,
        past_key_values=cache,
        use_cache=True,
    )
    logits_MLV: Tensor = output.logits
    return logits_MLV
