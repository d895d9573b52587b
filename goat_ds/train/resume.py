"""Find the checkpoint a run goes on from, and see that it is still the same run."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError, raised_everywhere
from goat_ds.train.config import AUTO, TrainConfig
from goat_ds.zero.checkpoint import Candidate, Checkpoint, checkpoint_steps, newest_whole, read_checkpoint

logger = logging.getLogger(__name__)

# What a run may change without becoming another one: places, watching, and how the same arithmetic is done. Data and
# base are known by content, and the packs of a step are held by themselves.
FREE = frozenset(
    {
        "config", "output_dir", "dry_run", "timeout_minutes", "local_rank", "resume", "allow_changed",
        "model", "peft_config", "attn", "gradient_checkpointing", "ds_config", "micro_batch_size", "grad_accum_steps",
        "data", "eval_data", "split", "eval_split", "data_format", "token_cache", "svd_cache",
        "log_steps", "router_log_steps", "eval_steps", "save_steps", "save_total_limit", "on_save_error",
        "calibration_sample_tokens",
    }
)  # fmt: skip


RUN_KEYS = {"settings", "global_batch_size", "data_sha256", "tokens", "eval_loss"}
"""What a checkpoint holds of the run."""


class Resumption(NamedTuple):
    """How a run begins: at a checkpoint, or None: at the start; what is wrong with that, and what to say of it."""

    checkpoint: Checkpoint | None
    given: TrainConfig
    """As the user gave it."""
    config: TrainConfig
    """With the accumulation that keeps the packs of a step, whatever the number of ranks."""
    global_batch_size: int
    problems: list[str]
    notes: list[str]
    damaged: list[Candidate]
    """Newer checkpoints that are not whole."""


def look(config: TrainConfig) -> Resumption:
    """Find out where the run begins. A collective; changes nothing."""
    size = config.packs_per_step(ranks.get_world_size())
    fresh = Resumption(None, config, config, size, [], [], [])
    if config.resume is None:
        return fresh
    try:
        checkpoint, damaged = _chosen(config)
    except ConfigError as error:
        return fresh._replace(problems=list(error.problems))
    notes = [f"resume: passed over {candidate.folder.name}: {why}" for candidate, why in damaged.items()]
    if checkpoint is None:
        return fresh._replace(notes=notes)
    if missing := RUN_KEYS - checkpoint.run.keys():
        return fresh._replace(problems=[f"resume: {checkpoint.folder} does not say {', '.join(sorted(missing))}"])
    problems = list(changes(config, checkpoint.run["settings"]))
    if config.allow_changed:
        notes, problems = [*notes, *(f"resume: changed: {line}" for line in problems)], []
    kept, problem, note = _keep_global_batch(config, checkpoint.run)
    problems += [problem] if problem else []
    notes += [note] if note else []
    per_step = config.micro_batch_size * ranks.get_world_size()
    fitted = dataclasses.replace(config, grad_accum_steps=max(1, -(-kept // max(per_step, 1))))
    return Resumption(checkpoint, config, fitted, kept, problems, notes, list(damaged))


def _chosen(config: TrainConfig) -> tuple[Checkpoint | None, dict[Candidate, str]]:
    if config.resume == AUTO:
        checkpoint, damaged = newest_whole(config.folder)
        if checkpoint is None and damaged:
            reasons = [
                f"resume (auto): {candidate.folder.name} is not whole: {why}" for candidate, why in damaged.items()
            ]
            raise ConfigError(
                *reasons, f"resume (auto): no checkpoint in {config.folder} is whole; choose another folder"
            )
        return checkpoint, damaged
    return _named(Path(str(config.resume)), config.folder), {}


def _named(folder: Path, output_dir: Path) -> Checkpoint:
    """Read the checkpoint that was asked for, from the first rank that has it. A collective."""
    has_it = {str(ranks.get_rank()): ranks.get_rank()} if folder.is_dir() else {}
    readers = ranks.union_over_ranks(has_it)
    if not readers:
        raise ConfigError(f"resume ({folder}) is no folder; give that of a checkpoint, or auto")
    try:
        checkpoint = read_checkpoint(folder, reader=min(readers.values()))
    except ConfigError as error:
        raise ConfigError(*(f"resume: {line}" for line in error.problems)) from error
    steps = ranks.union_over_ranks({str(ranks.get_rank()): checkpoint_steps(output_dir)})
    later = sorted({step for found in steps.values() for step in found if step > checkpoint.step})
    if later:
        raise ConfigError(
            f"resume ({folder}): output_dir ({output_dir}) holds later checkpoints ({', '.join(map(str, later))}), "
            "which the run would write again; choose another output_dir, or resume auto"
        )
    return checkpoint


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return a run's settings as a checkpoint keeps them."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return settings


def changes(config: TrainConfig, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield which settings make this another run than the one whose settings are given."""
    before = settings.get("peft_config")
    if (before is None) != (config.peft_config is None):
        yield (
            f"peft_config ({config.peft_config}) was {before} when the run began; set it back, or give "
            "--allow_changed to go on with the new one"
        )
        return
    for name, value in settings_of(config).items():
        if name not in FREE and name in settings and settings[name] != value:
            yield (
                f"{name} ({value}) was {settings[name]} when the run began; set it back, or give --allow_changed to "
                "go on with the new one"
            )


def _keep_global_batch(config: TrainConfig, run: Mapping[str, Any]) -> tuple[int, str | None, str | None]:
    """Return the packs of a step, what is wrong with the flags that say another number, and what to say."""
    kept, settings = int(run["global_batch_size"]), run["settings"]
    per_step = config.micro_batch_size * ranks.get_world_size()
    size = config.packs_per_step(ranks.get_world_size())
    if size == kept or per_step < 1:
        return kept, None, None
    fitting = -(-kept // per_step)
    if all(settings[name] == getattr(config, name) for name in ("micro_batch_size", "grad_accum_steps")):
        if fitting == config.grad_accum_steps:
            return kept, None, None
        note = f"resume: a step keeps its {kept} packs: grad_accum_steps is {fitting} on {ranks.get_world_size()} ranks"
        return kept, None, note
    problem = (
        f"grad_accum_steps ({config.grad_accum_steps}) x micro_batch_size ({config.micro_batch_size}) x ranks "
        f"({ranks.get_world_size()}) makes a step of {size} packs, and the run has steps of {kept}; use "
        f"grad_accum_steps {fitting}: the packs of a step say which records have been seen"
    )
    return kept, (None if fitting == config.grad_accum_steps else problem), None


def set_damaged_aside(damaged: list[Candidate]) -> None:
    """Rename checkpoints that are not whole, because the run will write theirs again. A collective."""

    def rename() -> None:
        for candidate in damaged:
            if candidate.world_rank == ranks.get_rank():
                # On a disk that nodes share, each of them has found it.
                with suppress(FileNotFoundError):
                    candidate.folder.rename(_free_name(candidate.folder))

    ranks.agree(rename)


def _free_name(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name}.damaged{number or ''}") for number in range(10**6))
    return next(name for name in names if not name.exists())


def allow_or_refuse(config: TrainConfig, change: str) -> None:
    """Report what has changed since the run began, which every rank sees alike, or refuse it.

    Raises:
        ConfigError: ``allow_changed`` is not given.
    """
    if not config.allow_changed:
        raise raised_everywhere(f"{change}, or give --allow_changed")
    logger.info(f"resume: changed: {change}")


def check_phase(config: TrainConfig, checkpoint: Checkpoint, finish_after: int | None) -> None:
    """Check that a checkpoint is dense or routed as the settings have it at its step.

    Raises:
        ConfigError: it is not, because ``dense_finish`` or the length of the run was changed.
    """
    is_dense = finish_after is not None and checkpoint.step > finish_after
    if is_dense == checkpoint.is_routed:
        found, wanted = ("routed", "dense") if is_dense else ("dense", "routed")
        raise raised_everywhere(
            f"dense_finish ({config.dense_finish}) makes the run {wanted} after step {checkpoint.step}, and "
            f"{checkpoint.folder} is {found}; finish after the step where it was finished, or after the checkpoint's"
        )
