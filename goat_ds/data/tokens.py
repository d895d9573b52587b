"""Turn records into token ids and labels, kept in an Arrow file that is mapped into memory.

Text is tokenised in pieces, cut where an answer starts and where the token that closes it ends. So no token straddles
what is given and what is to be learned; the prompt for an answer is, token for token, how its training sequence begins;
and nothing is needed but a tokenizer that encodes text, be it a fast one or a SentencePiece model.

The loss is taken on every answer of a conversation and the token that closes it, on the whole of a text. ``labels`` are
aligned with ``input_ids`` (not shifted), and the first is always ``IGNORE``, because nothing predicts the first token:
so ``num_labels``, the labels that are really predicted, is the number of those that are not ``IGNORE``.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from datasets.arrow_writer import ArrowWriter
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from goat_ds.data.formats import Dropped, DropReason, Message, Record, first_problems
from goat_ds.data.layout import Layout, Layouter
from goat_ds.errors import ConfigError, first_line, raise_if_any
from goat_ds.tuner.model import IGNORE

FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "labels": ListOf(Value("int32")),
        "num_tokens": Value("int32"),
        "num_labels": Value("int32"),
        "origin": Value("string"),
    }
)
"""A row of the tokenised data set; ``origin`` is the file and line it came from."""

NOTHING_LEFT = "no record is left to train on"
"""How the message begins that is about all records of the data together."""
CHUNK = 1000
"""Records tokenised at a time: enough to keep a fast tokenizer's threads busy."""


class TokenReport(NamedTuple):
    """What became of the records."""

    num_read: int
    dropped: dict[str, int]
    """Records that are not trained on, by reason."""
    num_tokens: int
    num_label_tokens: int
    num_truncated: int
    """Records that were longer than ``max_length`` and are trained on all the same."""

    @property
    def num_kept(self) -> int:
        """Records that are trained on."""
        return self.num_read - sum(self.dropped.values())

    def lines(self) -> list[str]:
        """Return the report as lines, a fact a line."""
        return [
            f"{self.num_read:,} records read, {self.num_kept:,} kept, {self.num_truncated:,} of them truncated",
            *(f"{count:,} dropped: {reason}" for reason, count in sorted(self.dropped.items())),
            f"{self.num_tokens:,} tokens, {self.num_label_tokens:,} of them with a label",
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class Tokenised(NamedTuple):
    """A data set ready for packing."""

    dataset: Dataset
    """Columns as in ``FEATURES``."""
    report: TokenReport


def content_digest(dataset: Dataset) -> str:
    """Return a sha256 over the ids and labels of tokenised records, in their order, wherever they came from."""
    digest = hashlib.sha256()
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=4096):
        for name in ("input_ids", "labels"):
            rows = batch.column(name).combine_chunks()
            digest.update(rows.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(rows.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


class Encoded(NamedTuple):
    """The ids and labels of one record, before truncation."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoder:
    """Encodes layouts with one tokenizer, many at a time."""

    tokenizer: PreTrainedTokenizerBase
    layouter: Layouter
    bos: list[int]
    """What the tokenizer itself puts before a text: usually BOS or nothing."""
    newline: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Encoder":
        """Ask ``tokenizer`` for its habits.

        Raises:
            ConfigError: it has no EOS token, so an answer could not be closed.
        """
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
        bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        bos = next(full[:at] for at in range(len(full)) if full[at : at + len(bare)] == bare)
        return cls(tokenizer, Layouter.of(tokenizer), bos, tokenizer("\n", add_special_tokens=False)["input_ids"])

    def encode(self, layouts: Sequence[Layout]) -> list[Encoded]:
        """Return the ids and labels of each layout."""
        first = iter(self._ids([layout.segments[0].text for layout in layouts]))
        later = self._continuations([segment.text for layout in layouts for segment in layout.segments[1:]])
        return [self._joined(layout, [next(first), *islice(later, len(layout.segments) - 1)]) for layout in layouts]

    def _joined(self, layout: Layout, pieces: list[list[int]]) -> Encoded:
        bos = self.bos if layout.wants_bos else []
        input_ids, labels = list(bos), [IGNORE] * len(bos)
        for segment, ids in zip(layout.segments, pieces, strict=True):
            input_ids += ids
            labels += ids if segment.is_answer else [IGNORE] * len(ids)
        return Encoded(input_ids, [IGNORE, *labels[1:]])

    def _continuations(self, texts: list[str]) -> Iterator[list[int]]:
        # SentencePiece puts a space before every text it is given, also where the text only goes on. It does not
        # behind a newline; where a newline would melt into the text, the tokenizer is one that adds no space.
        for text, ids in zip(texts, self._ids([f"\n{text}" for text in texts]), strict=True):
            known = len(self.newline)
            yield ids[known:] if ids[:known] == self.newline else self._ids([text])[0]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return found["input_ids"]


def load_tokenizer(model: str, *, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's folder or hub name.

    Raises:
        ConfigError: there is none, or it does not load.
    """
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model ({model}) has no usable tokenizer: {first_line(error)}") from error


def prompt_ids(prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids to generate an answer from: exactly how a training sequence with this prompt begins.

    Args:
        prompt: An instruction, or a conversation that does not end with an answer.
        tokenizer: The one used in training, chat template included.

    Raises:
        ConfigError: as for :meth:`goat_ds.data.layout.Layouter.record`.
    """
    messages: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    encoder = Encoder.of(tokenizer)
    return encoder.encode([encoder.layouter.messages(messages)])[0].input_ids


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: EOS, and what closes a turn in the chat template if it is another token."""
    closing = tokenizer(Layouter.of(tokenizer).closing_token(), add_special_tokens=False)["input_ids"][-1]
    return sorted({tokenizer.eos_token_id, closing})


def tokenise(
    records: Iterable[Record | Dropped], tokenizer: PreTrainedTokenizerBase, *, max_length: int, arrow_file: Path
) -> Tokenised:
    """Tokenise all records into ``arrow_file``.

    Args:
        records: As from :func:`goat_ds.data.sources.load_records`; read once, a chunk at a time.
        tokenizer: Fast or SentencePiece, with or without a chat template.
        max_length: Tokens; of a longer record the head is kept.
        arrow_file: Where the rows are written; the returned data set maps this file.

    Raises:
        ConfigError: the tokenizer has no EOS, its chat template refuses a record, or no record is left.
    """
    encoder, counts = Encoder.of(tokenizer), _Counts(max_length)
    with ArrowWriter(features=FEATURES, path=str(arrow_file)) as writer:
        remaining = iter(records)
        while chunk := list(islice(remaining, CHUNK)):
            rows = list(counts.kept(_encoded(chunk, encoder, counts)))
            writer.write_batch({column: [row[column] for row in rows] for column in FEATURES})
        writer.finalize()
    raise_if_any(first_problems(counts.problems, where="data"))
    report = counts.report()
    if not report.num_kept:
        raise ConfigError(_nothing_left(report, max_length))
    return Tokenised(Dataset.from_file(str(arrow_file)), report)


@dataclass
class _Counts:
    """Counts records while they pass."""

    max_length: int
    dropped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    num_kept: int = 0
    num_tokens: int = 0
    num_label_tokens: int = 0
    num_truncated: int = 0

    def drop(self, reason: DropReason) -> None:
        self.dropped[str(reason)] += 1

    def kept(self, encoded: Iterable[tuple[str, Encoded]]) -> Iterator[dict[str, Any]]:
        """Cut the records to length, and yield as rows those that keep a label."""
        for origin, (input_ids, labels) in encoded:
            input_ids_kept, labels_kept = input_ids[: self.max_length], labels[: self.max_length]
            num_labels = len(labels_kept) - labels_kept.count(IGNORE)
            if not num_labels:
                self.drop(DropReason.NO_LABEL_LEFT)
                continue
            self.num_kept += 1
            self.num_tokens += len(input_ids_kept)
            self.num_label_tokens += num_labels
            self.num_truncated += len(input_ids) > self.max_length
            row = (input_ids_kept, labels_kept, len(input_ids_kept), num_labels, origin)
            yield dict(zip(FEATURES, row, strict=True))

    def report(self) -> TokenReport:
        return TokenReport(
            num_read=self.num_kept + self.dropped.total(),
            dropped=dict(self.dropped),
            num_tokens=self.num_tokens,
            num_label_tokens=self.num_label_tokens,
            num_truncated=self.num_truncated,
        )


def _encoded(chunk: list[Record | Dropped], encoder: Encoder, counts: _Counts) -> Iterator[tuple[str, Encoded]]:
    """Encode the records of a chunk that are to be trained on, each with its origin."""
    origins, layouts = [], []
    for record in chunk:
        if isinstance(record, Dropped):
            counts.drop(record.reason)
            continue
        try:
            layouts.append(encoder.layouter.record(record))
            origins.append(record.origin)
        except ConfigError as error:
            counts.problems += [f"{record.origin}: {problem}" for problem in error.problems]
    yield from zip(origins, encoder.encode(layouts), strict=True)


def _nothing_left(report: TokenReport, max_length: int) -> str:
    reasons = ", ".join(f"{count:,} with {reason}" for reason, count in sorted(report.dropped.items()))
    too_short = DropReason.NO_LABEL_LEFT in report.dropped
    way_out = f"; raise --max_length ({max_length})" if too_short else ""
    return f"{NOTHING_LEFT}: {reasons}{way_out}"
