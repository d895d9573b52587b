"""Save what was trained: the adapter, gathered one tensor at a time, written whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from goat_ds.tuner.model import named_experts
from goat_ds.zero import partition
from goat_ds.zero.engine import ADAPTER_NAME, peft_model
from goat_ds.zero.ranks import Ranks, together

ADAPTER_FOLDER = "adapter"


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Name the folder of a step's checkpoint."""
    return output_dir / f"checkpoint-{step}"


def save_checkpoint(
    engine: DeepSpeedEngine,
    *,
    output_dir: Path,
    step: int,
    processes: Ranks,
    write_beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``checkpoint-<step>/adapter/``, a PEFT adapter folder. A collective.

    The folder appears when it is complete: a crash leaves the old state or the new one, never half.

    Args:
        engine: With the experts.
        output_dir: Folder of the run.
        step: Of the run.
        processes: Who this process is; the first writes.
        write_beside: Writes into the checkpoint's folder what belongs beside the adapter; the first rank's counts.

    Returns:
        The checkpoint's folder.
    """
    final = checkpoint_folder(output_dir, step)
    tensors = _gather_adapter(engine, keep=processes.is_first)
    together(lambda: _write(engine, tensors, final, write_beside) if processes.is_first else None)
    return final


@torch.no_grad()
def _gather_adapter(engine: DeepSpeedEngine, *, keep: bool) -> dict[str, Tensor]:
    """Give the adapter's tensors by their names in the model to the rank that keeps them."""
    tensors: dict[str, Tensor] = {}
    for item in named_experts(peft_model(engine), ADAPTER_NAME):
        for name, parameter in item.experts.named_parameters():
            with partition.gathered([parameter]):
                if keep:
                    tensors[f"{item.path}.goat_experts.{ADAPTER_NAME}.{name}"] = parameter.detach().cpu().clone()
    return tensors


def _write(
    engine: DeepSpeedEngine, tensors: dict[str, Tensor], final: Path, write_beside: Callable[[Path], None] | None
) -> None:
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    peft_model(engine).save_pretrained(
        str(temporary / ADAPTER_FOLDER),
        state_dict=tensors,
        save_embedding_layers=False,
        selected_adapters=[ADAPTER_NAME],
    )
    if write_beside:
        write_beside(temporary)
    for path in [*temporary.rglob("*"), temporary]:
        _flush(path)
    temporary.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    """Ask the disk to keep what was written, before a rename says that it is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
