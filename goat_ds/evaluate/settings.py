"""What is to be judged, on what, and how; every field is a flag of ``goat-ds evaluate`` of the same name."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from goat_ds.arguments import flag, list_flag, required_flag
from goat_ds.data import DataFormat
from goat_ds.precision import Precision


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
    BF16 = Precision.BF16.value
    FP16 = Precision.FP16.value
    FP32 = Precision.FP32.value

    @property
    def torch_name(self) -> str:
        """The name as ``from_pretrained`` takes it."""
        return str(self) if self is Dtype.AUTO else Precision(self).torch_name


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Settings of one evaluation."""

    model: str = required_flag("a model folder or hub name, an adapter, a checkpoint, or the output_dir of a run")
    base: str | None = flag(None, "folder or hub name of an adapter's base, if it is not where the adapter says")
    data: list[str] | None = list_flag("files, folders or hub names; repeatable")
    data_format: DataFormat | None = flag(None, "format of all data; recognised by its columns by default")
    split: str = flag("test", "split of folders and hub data sets")
    metrics: list[str] | None = list_flag(
        f"of {', '.join(Metric)}; by default the first two, and the last where choices are given",
        repeatable=False,
        metavar="METRIC",
    )
    choices: list[str] | None = list_flag(
        "answers to choose from (choice_accuracy); the different answers of the data by default", repeatable=False
    )
    tasks: list[str] | None = list_flag("lm-evaluation-harness tasks: names, patterns or YAML files", repeatable=False)
    include_path: Path | None = flag(None, "folder with task files of your own")
    apply_chat_template: bool = flag(False, "put the prompts of tasks into the tokenizer's chat template")
    dtype: Dtype = flag(Dtype.AUTO, "dtype of weights; auto is the files' own, or that of an adapter's training")
    batch_size: int = flag(8, "sequences in one forward of exact match, choice accuracy and tasks")
    max_length: int = flag(1024, "tokens of the longest record and of a pack, for perplexity")
    max_new_tokens: int = flag(64, "tokens of the longest answer, for exact match")
    limit: int | None = flag(None, "only the first so many records, and documents of each task")
    trust_remote_code: bool = flag(False, "run the modelling code beside the weights (exact exports)")
    output: Path | None = flag(None, "new JSON file for the report")

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
