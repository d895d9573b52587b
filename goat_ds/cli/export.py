"""Write a trained checkpoint in a form that others load: ``goat-ds export --checkpoint DIR --mode MODE --output DIR``.

Under ``torchrun -m -- goat_ds.cli.export`` the ranks share the calibration tokens of ``--mode dense`` and
``--mode lora``.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.distributed

from goat_ds.arguments import flag, list_flag, parse, required_flag
from goat_ds.cli.program import logger, program
from goat_ds.data.sample import NUM_TOKENS
from goat_ds.errors import ConfigError, raise_if_any
from goat_ds.export import (
    Dense,
    Exported,
    Fit,
    Fitting,
    MergeBase,
    MergeReport,
    Rival,
    copy_rival,
    export_adapter,
    export_dense,
    export_exact,
    export_lora,
    find_rival,
    merge_rival,
    was_4bit,
)
from goat_ds.precision import Precision


class Mode(StrEnum):
    """Form of an export."""

    ADAPTER = "adapter"
    EXACT = "exact"
    DENSE = "dense"
    LORA = "lora"


MERGED = (Mode.DENSE, Mode.LORA)
MODES_OF = {
    "merge_base": (Mode.EXACT, *MERGED),
    "max_shard_size": (Mode.EXACT, Mode.DENSE),
    "dtype": MERGED,
    "fit": MERGED,
    "calibration": MERGED,
    "split": MERGED,
    "heldout_split": MERGED,
    "calibration_tokens": MERGED,
    "refine_steps": MERGED,
    "heldout": MERGED,
    "heldout_labels": MERGED,
    "max_length": MERGED,
    "max_kl": MERGED,
}
"""Flags that have an effect in some modes only."""
BY_DEFAULT = Fitting()


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of one export; None where a flag is not given."""

    checkpoint: str = required_flag("an adapter, a checkpoint, or the output_dir of a run")
    mode: Mode = required_flag(
        "a PEFT folder that needs goat_ds; the whole routed model, which brings its own code; the nearest dense "
        "model, which needs nothing; the same as a plain LoRA adapter"
    )
    output: str = required_flag("a new folder")
    base: str | None = flag(None, "folder or hub name of the base, if it is not where the adapter says")
    merge_base: MergeBase | None = flag(
        None,
        "which weights of the base (exact, dense, lora): what its 4-bit weights stand for, or its unquantised ones; "
        "those that the adapter was trained on, if not given",
    )
    max_shard_size: str | None = flag(None, "bytes of one weights file (exact, dense); 5GB by default")

    # -- dense and lora
    fit: Fit | None = flag(None, f"how experts become one layer (dense, lora); {BY_DEFAULT.chosen_fit} by default")
    calibration: list[str] | None = list_flag("data to fit on (dense, lora); the checkpoint's own sample")
    split: str | None = flag(None, "split of hub data sets and folders to fit on (dense, lora); train by default")
    calibration_tokens: int | None = flag(None, f"tokens to fit on (dense, lora); {NUM_TOKENS:,} by default")
    refine_steps: int | None = flag(
        None, f"steps of distilling end to end (dense, lora); {BY_DEFAULT.refine_steps} by default"
    )
    heldout: list[str] | None = list_flag("data to compare on (dense, lora); the checkpoint's own sample")
    heldout_split: str | None = flag(
        None, "split of hub data sets and folders to compare on (dense, lora); test by default"
    )
    heldout_labels: int | None = flag(
        None, f"label tokens to compare on (dense, lora); {BY_DEFAULT.heldout_labels:,} by default"
    )
    max_length: int | None = flag(None, "tokens of the longest record that is named (dense, lora); as in the run")
    max_kl: float | None = flag(
        None, "mean divergence in nats above which nothing is written (dense, lora); no bound by default"
    )
    dtype: Precision | None = flag(None, "dtype of the weights written, and compared in (dense, lora); the base's own")

    def fitting(self) -> Fitting:
        """Return how experts become dense."""
        names = ("fit", "split", "calibration_tokens", "refine_steps", "heldout_split", "heldout_labels", "max_length")
        given: dict[str, Any] = {name: getattr(self, name) for name in (*names, "max_kl")}
        given |= {name: tuple(getattr(self, name) or ()) for name in ("calibration", "heldout")}
        return Fitting(**{name: value for name, value in given.items() if value is not None})

    def problems(self) -> list[str]:
        """Return which flags have no effect, one line each."""
        return [
            f"{name} ({_shown(getattr(self, name))}) has no effect with --mode {self.mode}; leave it out, or use "
            f"--mode {' or '.join(modes)}"
            for name, modes in MODES_OF.items()
            if getattr(self, name) is not None and self.mode not in modes
        ]


@program
def main(arguments: Sequence[str]) -> None:
    """Export as the command line says, and show what was read and written."""
    settings = parse(ExportSettings, arguments, program="goat-ds export", description=__doc__)
    raise_if_any(settings.problems())
    if (rival := find_rival(settings.checkpoint)) is not None:
        raise_if_any(rival_problems(settings, rival))
        export_rival(settings, rival)
        logger.info(f"read {rival.path}")
        logger.info(f"wrote {settings.output}")
        return
    _join()
    exported = export(settings)
    if exported.report is not None:
        _report(settings, exported)


def export(settings: ExportSettings) -> Exported | Dense:
    """Write the form that the settings ask for. A collective."""
    where: dict[str, Any] = {"output": settings.output, "base": settings.base}
    if settings.mode is Mode.ADAPTER:
        return export_adapter(settings.checkpoint, **where)
    about = where | {"merge_base": settings.merge_base}
    shards: dict[str, Any] = {"max_shard_size": settings.max_shard_size} if settings.max_shard_size else {}
    if settings.mode is Mode.EXACT:
        return export_exact(settings.checkpoint, **about, **shards)
    about |= {"fitting": settings.fitting(), "dtype": settings.dtype and settings.dtype.torch_dtype}
    if settings.mode is Mode.DENSE:
        return export_dense(settings.checkpoint, **about, **shards)
    return export_lora(settings.checkpoint, **about)


OF_A_RIVAL = ("base", "dtype", "max_shard_size", "merge_base")
"""Flags that have a say in what another method than GOAT has trained."""


def rival_problems(settings: ExportSettings, rival: Rival) -> Iterator[str]:
    """Yield what cannot be done with what another method than GOAT has trained, one line each."""
    is_lora = rival.config is not None and rival.name == "LORA"
    if settings.mode is Mode.EXACT or (settings.mode is Mode.LORA and not is_lora):
        yield f"mode ({settings.mode}) is for routed experts, and this is {rival.name}; use --mode dense or adapter"
    if rival.config is None and settings.mode is Mode.ADAPTER:
        yield f"mode ({settings.mode}): a whole model was trained, and no adapter; use --mode dense"
    is_copied = rival.config is None or settings.mode is not Mode.DENSE
    useless = [name for name in MODES_OF if name not in OF_A_RIVAL or (is_copied and name != "base")]
    if rival.config is None:
        useless.append("base")
    if not is_copied and was_4bit(rival.path) and settings.merge_base is not MergeBase.W16:
        yield (
            f"{rival.path} was trained on a base in 4 bits, and PEFT merges into the unquantised one, whose answers "
            "differ; give --merge_base w16 if that is wanted, or use --mode adapter"
        )
    elif not is_copied and not was_4bit(rival.path):
        useless.append("merge_base")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield f"WORLD_SIZE ({os.environ['WORLD_SIZE']}): one process exports what {rival.name} has trained; start one"
    for name in useless:
        if (value := getattr(settings, name)) is not None:
            yield f"{name} ({_shown(value)}) has no effect on what {rival.name} has trained; leave it out"


def export_rival(settings: ExportSettings, rival: Rival) -> None:
    """Write what another method than GOAT has trained: merged by PEFT, or as it is."""
    where: dict[str, Any] = {"output": settings.output, "base": settings.base}
    if rival.config is None or settings.mode is not Mode.DENSE:
        copy_rival(rival, **where)
        return
    shards: dict[str, Any] = {"max_shard_size": settings.max_shard_size} if settings.max_shard_size else {}
    dtype = None if settings.dtype is None else settings.dtype.torch_dtype
    merge_rival(rival, **where, dtype=dtype, **shards)


def _report(settings: ExportSettings, exported: Exported | Dense) -> None:
    report = exported.report
    assert report is not None
    logger.info(f"read {exported.adapter.path}")
    logger.info(f"wrote {settings.output}")
    if report.merge_base:
        logger.info(f"base weights: {report.merge_base}, {report.values}")
    if isinstance(report, MergeReport):
        for line in report.table():
            logger.info(line)


def _shown(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def _join() -> None:
    """Join the other ranks, where torchrun has started several.

    Raises:
        ConfigError: the environment says that there are several, and not who this one is.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise ConfigError(
            f"WORLD_SIZE says that there are several processes, and {', '.join(absent)} is not set; use torchrun"
        )
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
