"""From records to what a model is asked: the prompt of the last answer, that answer, and the choices for it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from goat_ds.data import IGNORE, Dropped, Message, Record
from goat_ds.data.formats import first_problems
from goat_ds.data.tokens import Encoded, Encoder
from goat_ds.errors import ConfigError, raise_if_any

MOST_CHOICES = 16
"""Different answers of a data set that are taken for choices when none are named."""


class Question(NamedTuple):
    """The last answer of a conversation, and what came before it."""

    origin: str
    """File and line."""
    messages: list[Message]
    """Up to the answer, without it."""
    answer: str
    """Without white space around it."""

    def answered(self, answer: str) -> list[Message]:
        """Return the conversation as it is with another answer."""
        return [*self.messages, {"role": "assistant", "content": answer}]


class Prompt(NamedTuple):
    """A question as token ids."""

    input_ids: list[int]
    question: Question


class Candidates(NamedTuple):
    """A question and its possible answers as token ids."""

    shared: list[int]
    """How all of them begin: the prompt, and nothing of an answer."""
    rests: list[list[int]]
    """What comes behind it, choice by choice."""
    labels: list[list[int]]
    """Of the rests: the tokens of the answer, its closing token included, and ``IGNORE`` before them."""
    right: int
    """Index of the choice that is the record's answer."""


def questions_of(records: Iterable[Record | Dropped]) -> list[Question]:
    """Return the questions; texts and dropped records ask nothing."""
    return [
        Question(record.origin, record.messages[:-1], record.messages[-1]["content"].strip())
        for record in records
        if isinstance(record, Record) and record.messages
    ]


def prompts_of(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return the ids to generate the answer of each question from, which are how its training sequence begins.

    Raises:
        ConfigError: the tokenizer has no EOS, or its chat template refuses conversations: each with its origin.
    """
    encoder = Encoder.of(tokenizer)
    problems: list[str] = []
    prompts = [
        Prompt(encoded[0].input_ids, question)
        for question in questions
        if (encoded := _encoded([question.messages], encoder, question.origin, problems))
    ]
    raise_if_any(first_problems(problems, where="data"))
    return prompts


def choices_of(questions: Sequence[Question], named: Sequence[str]) -> list[str]:
    """Return the choices, the same for every question: those that were named, else the different answers of the data.

    Raises:
        ConfigError: an answer is none of those named, or there is no choice or too much of it.
    """
    if named:
        choices = list(dict.fromkeys(choice.strip() for choice in named))
        strays = [
            f"{question.origin}: the answer {question.answer[:60]!r} is none of choices ({', '.join(choices)})"
            for question in questions
            if question.answer not in choices
        ]
        raise_if_any(first_problems(strays, where="choices"))
        return choices
    choices = sorted({question.answer for question in questions})
    if not 2 <= len(choices) <= MOST_CHOICES:
        raise ConfigError(
            f"choice_accuracy takes the different answers of the data for its choices where they are 2 to "
            f"{MOST_CHOICES}, and these are {len(choices):,}; name them with --choices, or leave the metric out"
        )
    return choices


def candidates_of(
    questions: Sequence[Question], choices: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Candidates]:
    """Lay each question out with every choice, as training would.

    Raises:
        ConfigError: as for ``prompts_of``.
    """
    encoder = Encoder.of(tokenizer)
    problems: list[str] = []
    candidates = [
        _split(encoded, right=choices.index(question.answer))
        for question in questions
        if (encoded := _encoded(map(question.answered, choices), encoder, question.origin, problems))
    ]
    raise_if_any(first_problems(problems, where="data"))
    return candidates


def _encoded(
    conversations: Iterable[Sequence[Message]], encoder: Encoder, origin: str, problems: list[str]
) -> list[Encoded]:
    try:
        return encoder.encode([encoder.layouter.messages(messages) for messages in conversations])
    except ConfigError as error:
        problems += [f"{origin}: {problem}" for problem in error.problems]
        return []


def _split(encoded: Sequence[Encoded], *, right: int) -> Candidates:
    starts = [_start_of_last_answer(labels) for _, labels in encoded]
    # A template may write something before an answer that depends on it; that is then no part of what they share.
    shared = min(min(starts), _num_common([ids for ids, _ in encoded]))
    labels = [[IGNORE] * (start - shared) + labels[start:] for start, (_, labels) in zip(starts, encoded, strict=True)]
    return Candidates(encoded[0].input_ids[:shared], [ids[shared:] for ids, _ in encoded], labels, right)


def _start_of_last_answer(labels: Sequence[int]) -> int:
    """Find the first of the labels that the sequence ends with."""
    start = len(labels)
    while labels[start - 1] != IGNORE:
        start -= 1
    return start


def _num_common(sequences: Sequence[Sequence[int]]) -> int:
    return next(
        (place for place, ids in enumerate(zip(*sequences, strict=False)) if len(set(ids)) > 1),
        min(map(len, sequences)),
    )


def num_positions_problems(
    lengths: Iterable[tuple[str, int]], num_positions: int | None, metric: str, way_out: str = ""
) -> Iterator[str]:
    """Yield which sequences the model has no positions for.

    Args:
        lengths: Origin and tokens of each.
        num_positions: The model's; None: as many as are needed.
        metric: Which asks for them.
        way_out: What else to do about it.
    """
    problems = [
        f"{origin}: {metric} takes {length:,} positions here, and the model's max_position_embeddings is "
        f"{num_positions:,}; leave the record out{way_out}"
        for origin, length in lengths
        if num_positions is not None and length > num_positions
    ]
    yield from first_problems(problems, where="data")
