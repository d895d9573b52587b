"""One evaluation: everything that can be wrong first, then the weights, then one metric after the other."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from goat_ds.base.packing_probe import row_problem
from goat_ds.data import Dropped, Packed, Record, Tokenised, load_records, pack_dataset, tokenise
from goat_ds.errors import ConfigError, ExportError, raise_if_any
from goat_ds.evaluate.choice_accuracy import choice_accuracy
from goat_ds.evaluate.exact_match import exact_match
from goat_ds.evaluate.harness import Tasks, find_tasks, run_tasks
from goat_ds.evaluate.perplexity import perplexity
from goat_ds.evaluate.questions import (
    Candidates,
    Prompt,
    Question,
    candidates_of,
    choices_of,
    num_positions_problems,
    prompts_of,
    questions_of,
)
from goat_ds.evaluate.report import Report
from goat_ds.evaluate.settings import EvalSettings, Metric
from goat_ds.evaluate.subject import Subject, find_subject
from goat_ds.precision import dtype_name

T = TypeVar("T")


class Rows(NamedTuple):
    """Records as training would lay them out."""

    tokens: Tokenised
    packed: Packed


class Choices(NamedTuple):
    """What there is to choose from, as text and laid out for each question."""

    texts: list[str]
    candidates: list[Candidates]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that an evaluation needs beside weights; what was not asked for is None."""

    subject: Subject
    tokenizer: PreTrainedTokenizerBase
    records: list[Record | Dropped]
    rows: Rows | None
    prompts: list[Prompt] | None
    choices: Choices | None
    tasks: Tasks | None


def evaluate(settings: EvalSettings) -> Report:
    """Judge a model as the settings say.

    Raises:
        ConfigError: with every problem that was found before weights were read, or that they do not load.
    """
    with TemporaryDirectory() as scratch:
        prepared = prepare(settings, scratch=Path(scratch))
        report = measure(settings, prepared, prepared.subject.load())
    return report


def prepare(settings: EvalSettings, *, scratch: Path) -> Prepared:
    """Find the model, read the data and the tasks, and lay everything out.

    Args:
        settings: What was asked for.
        scratch: Folder for tokenised records, which stay on disk.

    Raises:
        ConfigError: one line a problem.
    """
    problems, asked = list(settings.problems()), settings.asked
    subject = _tried(lambda: find_subject(settings), problems)
    tokenizer = _tried(subject.tokenizer, problems) if subject else None
    records = _tried(lambda: read_records(settings), problems) or []
    wanted = settings.tasks
    tasks = _tried(lambda: find_tasks(wanted, settings.include_path), problems) if wanted else None
    rows = prompts = choices = None
    if subject and asked:
        problems += row_problems(settings, subject)
    if subject and tokenizer and records:
        questions = questions_of(records)
        if Metric.PERPLEXITY in asked:
            rows = _tried(lambda: lay_out(records, tokenizer, settings.max_length, scratch), problems)
        if not questions and set(asked) - {Metric.PERPLEXITY}:
            problems.append(
                "exact_match and choice_accuracy need answers, and data holds texts; use --metrics perplexity"
            )
        elif Metric.EXACT_MATCH in asked:
            prompts = _tried(lambda: ask(questions, tokenizer, subject, settings), problems)
        if questions and Metric.CHOICE_ACCURACY in asked:
            choices = _tried(lambda: offer(questions, tokenizer, subject, settings), problems)
    raise_if_any(problems)
    assert subject is not None and tokenizer is not None
    return Prepared(
        subject=subject,
        tokenizer=tokenizer,
        records=records,
        rows=rows,
        prompts=prompts,
        choices=choices,
        tasks=tasks,
    )


def _tried(make: Callable[[], T], problems: list[str]) -> T | None:
    """Return what ``make`` gives, or add what is wrong to ``problems``."""
    try:
        return make()
    except ConfigError as error:
        problems += error.problems
    except ExportError as error:
        problems.append(str(error))
    return None


def read_records(settings: EvalSettings) -> list[Record | Dropped]:
    """Read all data, so that nothing wrong goes unseen, and keep the first ``limit`` records and what lies between.

    Raises:
        ConfigError: something is wrong with the data.
    """
    items = list(load_records(settings.data or (), data_format=settings.data_format, split=settings.split))
    if settings.limit is None:
        return items
    places = [place for place, item in enumerate(items) if isinstance(item, Record)]
    return items[: places[settings.limit]] if settings.limit < len(places) else items


def row_problems(settings: EvalSettings, subject: Subject) -> Iterator[str]:
    """Yield why the model cannot be given packed rows and positions."""
    metrics = [metric for metric in (Metric.PERPLEXITY, Metric.CHOICE_ACCURACY) if metric in settings.asked]
    if metrics and (problem := row_problem(subject.base)):
        yield f"{' and '.join(metrics)}: {problem}; leave {'them' if len(metrics) > 1 else 'it'} out with --metrics"
    positions = subject.base.num_positions
    if Metric.PERPLEXITY in metrics and positions is not None and settings.max_length > positions:
        yield f"max_length ({settings.max_length}) is above the model's max_position_embeddings ({positions}); lower it"


def lay_out(
    records: list[Record | Dropped], tokenizer: PreTrainedTokenizerBase, max_length: int, scratch: Path
) -> Rows:
    """Tokenise and pack the records as training does."""
    tokens = tokenise(records, tokenizer, max_length=max_length, arrow_file=scratch / "tokens.arrow")
    return Rows(tokens, pack_dataset(tokens.dataset, max_length=max_length, packing=True))


def ask(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase, subject: Subject, settings: EvalSettings
) -> list[Prompt]:
    """Lay out the prompts that answers are generated from."""
    prompts = prompts_of(questions, tokenizer)
    lengths = [(p.question.origin, len(p.input_ids) + settings.max_new_tokens) for p in prompts]
    raise_if_any(
        num_positions_problems(lengths, subject.base.num_positions, Metric.EXACT_MATCH, ", or lower max_new_tokens")
    )
    return prompts


def offer(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase, subject: Subject, settings: EvalSettings
) -> Choices:
    """Lay out every question with every choice."""
    texts = choices_of(questions, settings.choices or ())
    candidates = candidates_of(questions, texts, tokenizer)
    longest = [len(candidate.shared) + max(map(len, candidate.rests)) for candidate in candidates]
    lengths = [(question.origin, length) for question, length in zip(questions, longest, strict=True)]
    raise_if_any(num_positions_problems(lengths, subject.base.num_positions, Metric.CHOICE_ACCURACY))
    return Choices(texts, candidates)


def measure(settings: EvalSettings, prepared: Prepared, model: Any) -> Report:
    """Compute what was asked for, on a loaded model."""
    report, tokenizer = _head(settings, prepared, model), prepared.tokenizer
    if prepared.rows is not None:
        report = replace(report, perplexity=perplexity(model, *prepared.rows))
    if prepared.prompts is not None:
        limits = {"batch_size": settings.batch_size, "max_new_tokens": settings.max_new_tokens}
        report = replace(report, exact_match=exact_match(model, prepared.prompts, tokenizer, **limits))
    if prepared.choices is not None:
        texts, candidates = prepared.choices
        found = choice_accuracy(model, candidates, texts, batch_size=settings.batch_size)
        report = replace(report, choice_accuracy=found)
    # Last, because the harness may give the tokenizer a padding token.
    if prepared.tasks is not None:
        numbers = run_tasks(
            model,
            tokenizer,
            prepared.tasks,
            batch_size=settings.batch_size,
            limit=settings.limit,
            apply_chat_template=settings.apply_chat_template,
        )
        report = replace(report, tasks=numbers)
    return report


def _head(settings: EvalSettings, prepared: Prepared, model: Any) -> Report:
    """Return what is judged, on what."""
    subject, quantization = prepared.subject, prepared.subject.quantization
    dropped = Counter(str(item.reason) for item in prepared.records if isinstance(item, Dropped))
    return Report(
        model=settings.model,
        kind=subject.kind,
        weights=subject.base.name,
        base_quantization=None if quantization is None else quantization.to_dict(),
        dtype=dtype_name(model.dtype),
        data=tuple(settings.data or ()),
        limit=settings.limit,
        num_records=len(prepared.records) - dropped.total(),
        dropped=dict(dropped),
    )
