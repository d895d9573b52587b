"""Tasks of lm-evaluation-harness, from the package or from files of one's own; these need no network.

``lm_eval`` is an extra (``pip install 'goat_ds[lm-eval]'``), so it is imported only where it is used.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from goat_ds.errors import ConfigError


@dataclass(frozen=True)
class Tasks:
    """Tasks that were found and whose data could be read."""

    names: list[str]
    """As the harness knows them; of one's own files also their paths."""
    manager: Any
    """The harness's index."""


def find_tasks(wanted: Sequence[str], include_path: Path | None) -> Tasks:
    """Look tasks up and read their data.

    Args:
        wanted: Names of tasks, groups or tags, patterns of names, or YAML files.
        include_path: Folder with task files of one's own.

    Raises:
        ConfigError: the harness is not installed, does not know a task, or cannot read a task's data.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            f"tasks ({', '.join(wanted)}) need lm-evaluation-harness, which is not installed; "
            "pip install 'goat_ds[lm-eval]', or leave tasks out"
        )
    manager = import_module("lm_eval.tasks").TaskManager(
        include_path=None if include_path is None else str(include_path)
    )
    found = {name: [name] if Path(name).is_file() else manager.match_tasks([name]) for name in wanted}
    if unknown := [name for name, matches in found.items() if not matches]:
        raise ConfigError(
            *(
                f"tasks ({name}) is neither a task that lm-evaluation-harness knows nor a YAML file; put the folder of "
                "your own task files in --include_path, or see 'lm_eval ls tasks'"
                for name in unknown
            )
        )
    names = [match for matches in found.values() for match in matches]
    try:
        manager.load(names)
    # Tasks are strangers' code and data, which fail in any way; better here than behind an hour of metrics.
    except Exception as error:
        raise ConfigError(f"tasks ({', '.join(wanted)}) cannot be read: {type(error).__name__}: {error}") from error
    return Tasks(names, manager)


def run_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    batch_size: int,
    limit: int | None,
    apply_chat_template: bool,
) -> dict[str, dict[str, float]]:
    """Judge a model on tasks as the harness does.

    Args:
        model: Loaded, on its device.
        tokenizer: The harness may give it a padding token.
        tasks: As found.
        batch_size: Sequences in one forward.
        limit: Documents of each task; None: all.
        apply_chat_template: Whether prompts go through the tokenizer's template; the harness's default is no.

    Returns:
        The numbers of each task and group by the harness's names for them, such as ``acc`` and ``acc_stderr``.
    """
    wrapper = import_module("lm_eval.models.huggingface").HFLM
    # It warns of every setting that a model which is loaded already makes useless.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    found = import_module("lm_eval").simple_evaluate(
        model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=tasks.names,
        task_manager=tasks.manager,
        limit=limit,
        apply_chat_template=apply_chat_template,
        log_samples=False,
    )
    return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Keep what was measured, under its name without the filter where there was none."""
    return {
        name.removesuffix(",none"): value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
