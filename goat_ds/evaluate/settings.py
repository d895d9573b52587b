"""What is to be judged, on what, and how; every field is a flag of ``launch/evaluate.py`` of the same name."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from goat_ds.data import DataFormat


class Metric(StrEnum):
    """What is measured on ``--data``."""

    PERPLEXITY = "perplexity"
    """Mean cross-entropy over label tokens, as training measures its loss, and its exponential."""
    EXACT_MATCH = "exact_match"
    """Share of records whose last answer is generated to the letter."""
    CHOICE_ACCURACY = "choice_accuracy"
    """Share of records whose last answer is the most likely of the choices."""


class Dtype(StrEnum):
    """Dtype that weights are loaded in; ``auto`` is that of the files, or of training where an adapter records it."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Settings of one evaluation."""

    model: str
    """Folder or hub name of a model; folder of an adapter, a checkpoint or a run."""
    base: str | None = None
    """Folder or hub name of an adapter's base, if it is not where the adapter says."""
    data: tuple[str, ...] = ()
    """Files, folders or hub names."""
    data_format: DataFormat | None = None
    """Format of all data; recognised by its columns by default."""
    split: str = "test"
    """Split of folders and hub data sets."""
    metrics: tuple[str, ...] | None = None
    """Members of ``Metric``; None: perplexity and exact match, and choice accuracy where there are choices."""
    choices: tuple[str, ...] = ()
    """Answers to choose from, the same for all records; without any, the different answers of the data."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness: names, or YAML files."""
    include_path: Path | None = None
    """Folder with task files of one's own."""
    apply_chat_template: bool = False
    """Whether the prompts of tasks go through the tokenizer's chat template."""
    dtype: Dtype = Dtype.AUTO
    batch_size: int = 8
    """Sequences in one forward of exact match, choice accuracy and tasks."""
    max_length: int = 1024
    """Tokens of the longest record and of a pack, for perplexity."""
    max_new_tokens: int = 64
    """Tokens of the longest answer, for exact match."""
    limit: int | None = None
    """Only the first so many records, and documents of each task."""
    trust_remote_code: bool = False
    """Whether modelling code beside the weights may run."""
    output: Path | None = None
    """New JSON file for the report."""

    @property
    def asked(self) -> tuple[Metric, ...]:
        """The metrics to compute on the data; ``problems`` must have found none."""
        if not self.data:
            return ()
        if self.metrics is None:
            without = (Metric.PERPLEXITY, Metric.EXACT_MATCH)
            return (*without, Metric.CHOICE_ACCURACY) if self.choices else without
        return tuple(metric for metric in Metric if metric in self.metrics)

    def problems(self) -> Iterator[str]:
        """Yield, one line each, what is wrong with the settings themselves."""
        for name in self.metrics or ():
            if name not in list(Metric):
                yield f"metrics ({name}) must be of {', '.join(Metric)}"
        if not self.data and not self.tasks:
            yield "data and tasks are both missing; give --data FILE to measure on, or --tasks NAME, or both"
        yield from self._useless()
        for name in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name} ({value}) must be at least 1"
        if self.max_length < 2:
            yield f"max_length ({self.max_length}) must be at least 2"
        if self.choices and (
            len({choice.strip() for choice in self.choices}) < 2 or not all(map(str.strip, self.choices))
        ):
            yield f"choices ({', '.join(self.choices)}) must be at least two different texts, none of them empty"
        if self.include_path is not None and not self.include_path.is_dir():
            yield f"include_path ({self.include_path}) is no folder"
        if self.output is not None and self.output.exists():
            yield f"output ({self.output}) exists already; name a new file, nothing is overwritten"
        if self.output is not None and not self.output.parent.is_dir():
            yield f"output ({self.output}) would be in a folder that does not exist; make it first"

    def _useless(self) -> Iterator[str]:
        """Yield which settings have no effect beside the others."""
        if self.metrics and not self.data and self.tasks:
            yield f"metrics ({', '.join(self.metrics)}) has no effect without data; give --data FILE, or leave it out"
        if self.choices and (not self.data or (self.metrics and Metric.CHOICE_ACCURACY not in self.metrics)):
            yield "choices has no effect without data and the metric choice_accuracy; add them, or leave choices out"
        if self.include_path is not None and not self.tasks:
            yield f"include_path ({self.include_path}) has no effect without tasks; give --tasks NAME, or leave it out"
        if self.apply_chat_template and not self.tasks:
            yield "apply_chat_template has no effect without tasks; data goes through the template where there is one"
