"""Save and resume what was trained: safetensors and JSON, no pickle, nothing that depends on the number of ranks.

    checkpoint-<step>/
      adapter/                  a PEFT adapter folder, in the dtype of the model; model/, where every weight is trained
      state-00001.safetensors   fp32 value and Adam's moments of every trained tensor: 12 bytes a parameter
      run.json                  step, schedule, loss scale, and what the run itself has to remember
      manifest.json             size and SHA-256 of every file

Tensors are gathered one at a time, and only the trained ones; no frozen weight is. Random numbers need no place: the
generator of every step is a function of the seed, the step and the rank.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError, SaveError, raised_everywhere
from goat_ds.manifest import damages, write_manifest
from goat_ds.tuner.model import ADAPTER_NAME
from goat_ds.zero import partition
from goat_ds.zero.adapters import stored_tensors, trained_tensors
from goat_ds.zero.decompose import StoredExperts
from goat_ds.zero.engine import resume_schedule
from goat_ds.zero.optimizer_state import MOMENTS, TensorState, read_state, write_state

ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG = f"{ADAPTER_FOLDER}/adapter_config.json"
MODEL_FOLDER = "model"
RUN_NAME = "run.json"
FORMAT = "goat_ds checkpoint 2"
"""Stands in ``run.json``; another number, another layout."""
STATE_PATTERN = "state-*.safetensors"
SHARD_BYTES = 2**30
"""A file of state ends with the tensor that brings it here: what the writing rank holds at a time."""
SMALL_BYTES = 4 * 2**20
"""Room for what is neither adapter nor state: JSON, the sample of the data."""
PARTS = ("master", *MOMENTS)
LOSS_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a loss scaler of DeepSpeed's changes from step to step."""


class Checkpoint(NamedTuple):
    """A whole checkpoint that a run goes on from; every rank knows what is in its JSON files."""

    folder: Path
    reader: int
    """The rank that reads it; other nodes need not have the folder."""
    step: int
    """After which it was written."""
    engine: dict[str, Any]
    """Counters of Adam and the schedule, and the loss scale."""
    run: dict[str, Any]
    """What the run wrote down for itself."""
    adapter: dict[str, Any] | None
    """``adapter_config.json``; None: it holds a whole model."""
    shapes: dict[str, tuple[int, ...]]
    """Of the adapter's tensors by name in its file; of a whole model's by name in the model."""
    base_fingerprint: dict[str, str] | None
    """The content of the base that training began on; None: unknown, as where it was stored in 4 bits."""

    @property
    def is_routed(self) -> bool:
        """Whether a dense finish was still to come, if there is one."""
        return self.adapter is None or bool(self.adapter.get("routed", True))


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Name the folder of a step's checkpoint."""
    return output_dir / f"checkpoint-{step}"


def checkpoint_steps(output_dir: Path) -> list[int]:
    """List the steps of the checkpoints in a folder, newest first."""
    names = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
    return sorted((int(found[1]) for name in names if (found := re.fullmatch(r"checkpoint-(\d+)", name))), reverse=True)


def save_checkpoint(
    engine: DeepSpeedEngine,
    *,
    output_dir: Path,
    step: int,
    run: Mapping[str, Any] | None = None,
    base_fingerprint: Mapping[str, str] | None = None,
    write_beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``checkpoint-<step>/``. A collective.

    The folder appears when it is complete: a crash leaves the old state or the new one, never half.

    Args:
        engine: Between two steps.
        output_dir: Folder of the run.
        step: Of the run.
        run: What the run has to remember, as JSON.
        base_fingerprint: The content of the base that training began on, where it is known.
        write_beside: Writes into the checkpoint's folder what belongs beside the adapter; the first rank's counts.

    Returns:
        The checkpoint's folder.

    Raises:
        SaveError: it could not be written; whatever was in ``output_dir`` before is still there.
    """
    writer = _Writer(checkpoint_folder(output_dir, step)) if ranks.is_first() else None
    if writer:
        writer.attempt(lambda: writer.begin(bytes_needed(engine)))
    num_adam_steps = 0
    trained: dict[str, list[int]] = {}
    for name, parameter in trained_tensors(engine.module):
        state = read_state(engine, parameter)
        trained[name] = list(state.master.shape)
        num_adam_steps = state.num_steps
        if writer:
            writer.attempt(lambda name=name, state=state: writer.add(name, state))  # type: ignore[misc]
    tensors = _gather_stored(engine, keep=writer is not None)
    if writer:
        about = {
            "format": FORMAT,
            "step": step,
            "engine": _counters(engine, num_adam_steps),
            "trained": trained,
            "base_fingerprint": base_fingerprint and dict(base_fingerprint),
            "run": dict(run or {}),
        }
        writer.attempt(lambda: writer.finish(engine, tensors, about, write_beside))
    problem = ranks.object_from(0, writer and writer.problem)
    if problem is not None:
        raise SaveError(f"checkpoint-{step} was not written to {output_dir}: {problem}")
    return checkpoint_folder(output_dir, step)


def bytes_needed(engine: DeepSpeedEngine) -> int:
    """Return the bytes of a checkpoint, rounded up a little."""
    stored = sum(_shape_of(tensor).numel() * tensor.element_size() for _, tensor in stored_tensors(engine.module))
    state = sum(partition.full_shape(tensor).numel() for _, tensor in trained_tensors(engine.module)) * 4 * len(PARTS)
    return stored + state + SMALL_BYTES


def check_room(engine: DeepSpeedEngine, output_dir: Path) -> None:
    """Check that the disk has room for a checkpoint, before steps are trained that could not be saved. A collective.

    Raises:
        ConfigError: it has not, or the folder cannot be written to.
    """
    problem = None
    if ranks.is_first():
        try:
            _require_room(output_dir, bytes_needed(engine))
            (output_dir / ".writable").touch()
            (output_dir / ".writable").unlink()
        except OSError as error:
            problem = f"output_dir ({output_dir}) cannot take a checkpoint: {error.strerror}; choose another folder"
    problem = ranks.object_from(0, problem)
    if problem is not None:
        raise raised_everywhere(problem)


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(None, f"the disk has {free / 2**20:,.0f} MiB free, and {needed / 2**20:,.0f} are needed")


class _Writer:
    """Writes one checkpoint on the first rank. What fails is kept until all ranks have passed their collectives."""

    def __init__(self, final: Path) -> None:
        self._final, self._folder = final, final.with_name(f".{final.name}.tmp")
        self._pending: dict[str, Tensor] = {}
        self._num_files = 0
        self.problem: str | None = None

    def attempt(self, work: Callable[[], None]) -> None:
        if self.problem is not None:
            return
        try:
            work()
        except (OSError, SafetensorError) as error:
            self.problem = getattr(error, "strerror", None) or str(error)
            # Its bytes may be what the next attempt needs.
            shutil.rmtree(self._folder, ignore_errors=True)

    def begin(self, num_bytes: int) -> None:
        if self._final.exists():
            raise OSError(None, f"{self._final} is there already")
        shutil.rmtree(self._folder, ignore_errors=True)
        _require_room(self._final.parent, num_bytes)
        self._folder.mkdir()

    def add(self, name: str, state: TensorState) -> None:
        self._pending |= {f"{name}.{part}": getattr(state, part).cpu().contiguous() for part in PARTS}
        if sum(tensor.nbytes for tensor in self._pending.values()) >= SHARD_BYTES:
            self._write_pending()

    def _write_pending(self) -> None:
        self._num_files += 1
        path = self._folder / STATE_PATTERN.replace("*", f"{self._num_files:05d}")
        save_file(self._pending, path)
        self._pending = {}

    def finish(
        self,
        engine: DeepSpeedEngine,
        tensors: dict[str, Tensor],
        about: dict[str, Any],
        write_beside: Callable[[Path], None] | None,
    ) -> None:
        if self._pending:
            self._write_pending()
        model: Any = engine.module
        if isinstance(model, PeftModel):
            model.save_pretrained(
                str(self._folder / ADAPTER_FOLDER),
                state_dict=tensors,
                save_embedding_layers=False,
                selected_adapters=[ADAPTER_NAME],
            )
        else:
            in_training, model.config.use_cache = model.config.use_cache, model.goat_use_cache
            try:
                model.save_pretrained(str(self._folder / MODEL_FOLDER), state_dict=tensors)
            finally:
                model.config.use_cache = in_training
        if write_beside:
            write_beside(self._folder)
        (self._folder / RUN_NAME).write_text(json.dumps(about, indent=2))
        write_manifest(self._folder)
        for path in [*self._folder.rglob("*"), self._folder]:
            _flush(path)
        self._folder.rename(self._final)
        _flush(self._final.parent)


def _flush(path: Path) -> None:
    """Ask the disk to keep what was written, before a rename says that it is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@torch.no_grad()
def _gather_stored(engine: DeepSpeedEngine, *, keep: bool) -> dict[str, Tensor]:
    """Return what the adapter or the model is made of by its names in the model, on the rank that keeps it."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored_tensors(engine.module):
        with partition.gathered([tensor] if isinstance(tensor, nn.Parameter) else []):
            if keep:
                tensors[name] = tensor.detach().cpu().clone()
    return tensors


def _shape_of(tensor: Tensor) -> torch.Size:
    return partition.full_shape(tensor) if isinstance(tensor, nn.Parameter) else tensor.shape


def _counters(engine: DeepSpeedEngine, num_adam_steps: int) -> dict[str, Any]:
    scaler = _loss_scaler(engine)
    fields = {name: getattr(scaler, name) for name in LOSS_SCALE_FIELDS if hasattr(scaler, name)}
    return {
        "adam_steps": num_adam_steps,
        "schedule_steps": engine.lr_scheduler.last_epoch,
        "loss_scale": fields,
    }


def sweep(output_dir: Path) -> None:
    """Delete what a run that was killed has left of checkpoints that it had not finished writing or deleting."""
    for pattern in (".checkpoint-*.tmp", ".checkpoint-*.surplus"):
        for folder in output_dir.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def keep_newest(output_dir: Path, limit: int) -> None:
    """Delete all checkpoints but the newest ``limit``, the one with the best eval_loss, and the last routed one.

    What cannot be read is not deleted either.
    """
    about = {step: _summary_of(checkpoint_folder(output_dir, step)) for step in checkpoint_steps(output_dir)}
    steps = [step for step, summary in about.items() if summary is not None]
    losses = {
        step: summary.eval_loss
        for step, summary in about.items()
        if summary and summary.eval_loss is not None and math.isfinite(summary.eval_loss)
    }
    routed = [step for step, summary in about.items() if summary and summary.is_routed]
    best = min(losses, key=lambda step: (losses[step], -step), default=None)
    for step in set(steps[limit:]) - {best, max(routed, default=None)}:
        folder = checkpoint_folder(output_dir, step)
        # Renamed first, so that no half of a checkpoint has the name of a whole one.
        grave = folder.with_name(f".{folder.name}.surplus")
        folder.rename(grave)
        shutil.rmtree(grave)


def _adapter_config(folder: Path) -> dict[str, Any] | None:
    """Return the config of a checkpoint's adapter; None where it holds a whole model."""
    if (folder / MODEL_FOLDER / "config.json").is_file():
        return None
    values: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text())
    return values


class _Summary(NamedTuple):
    eval_loss: float | None
    is_routed: bool


def _summary_of(folder: Path) -> _Summary | None:
    try:
        run = json.loads((folder / RUN_NAME).read_text())["run"]
        return _Summary(run["eval_loss"], bool((_adapter_config(folder) or {}).get("routed", True)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -- the way back


def _loss_scaler(engine: DeepSpeedEngine) -> Any:
    """Return what holds the loss scale of fp16; None in other precisions. ZeRO-0 has another kind than the others."""
    if not engine.fp16_enabled():
        return None
    optimizer: Any = engine.optimizer
    return optimizer.loss_scaler if hasattr(optimizer, "loss_scaler") else optimizer.loss_scale_config


class Candidate(NamedTuple):
    """A checkpoint folder on some node."""

    step: int
    world_rank: int
    folder: Path


class Found(NamedTuple):
    """What was looked for: the newest whole checkpoint, and why newer ones were passed over, by their folders."""

    checkpoint: Checkpoint | None
    damaged: dict[Candidate, str]


def newest_whole(output_dir: Path) -> Found:
    """Find the newest checkpoint of a run that is whole, on whatever node it lies. A collective."""
    mine = checkpoint_steps(output_dir) if ranks.is_first_on_node() else []
    here = {f"{ranks.get_rank()} {step}": (step, ranks.get_rank()) for step in mine}
    everywhere = sorted(ranks.union_over_ranks(here).values(), key=lambda found: (-found[0], found[1]))
    damaged: dict[Candidate, str] = {}
    for step, world_rank in everywhere:
        candidate = Candidate(step, world_rank, checkpoint_folder(output_dir, step))
        try:
            return Found(read_checkpoint(candidate.folder, reader=world_rank), damaged)
        except ConfigError as error:
            damaged[candidate] = "; ".join(error.problems)
    return Found(None, damaged)


def read_checkpoint(folder: Path, *, reader: int) -> Checkpoint:
    """Read what every rank has to know of a checkpoint, and hold it against its manifest. A collective.

    Raises:
        ConfigError: it is not whole, or is none: one line a problem, the same on every rank.
    """
    return ranks.agree_from(reader, lambda: _read(folder, reader))


def _read(folder: Path, reader: int) -> Checkpoint:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no checkpoint folder")
    if problems := list(damages(folder)):
        raise ConfigError(*problems)
    try:
        about = json.loads((folder / RUN_NAME).read_text())
        adapter = _adapter_config(folder)
        if about["format"] != FORMAT:
            raise ConfigError(f"{folder / RUN_NAME}: format ({about['format']}) is not {FORMAT}")
        step, engine, run = int(about["step"]), dict(about["engine"]), dict(about["run"])
        int(engine["adam_steps"]), int(engine["schedule_steps"]), dict(engine["loss_scale"])
        trained = {name: tuple(map(int, shape)) for name, shape in about["trained"].items()}
        found = about["base_fingerprint"]
        # The files of a whole model may name and cut its tensors otherwise than the model does.
        shapes = trained if adapter is None else _shapes_in(folder / ADAPTER_FOLDER / "adapter_model.safetensors")
        state = {name: shape for path in sorted(folder.glob(STATE_PATTERN)) for name, shape in _shapes_in(path).items()}
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} is damaged: its JSON files lack or distort {error}") from error
    if problems := list(_misfits(folder, trained, shapes, state)):
        raise ConfigError(*problems)
    return Checkpoint(folder, reader, step, engine, run, adapter, shapes, found)


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"{path} is no safetensors file: {error}") from error


def _misfits(
    folder: Path,
    trained: dict[str, tuple[int, ...]],
    shapes: dict[str, tuple[int, ...]],
    state: dict[str, tuple[int, ...]],
) -> Iterator[str]:
    """Yield which tensors of the state are not those that were trained, or not those of the adapter."""
    expected = {f"{name}.{part}": shape for name, shape in trained.items() for part in PARTS}
    for name in sorted(expected.keys() | state.keys()):
        if expected.get(name) != state.get(name):
            yield f"{folder}: {name} has shape {state.get(name)} in the state, and {expected.get(name)} by {RUN_NAME}"
    for name in sorted(trained.keys() & shapes.keys()):
        if trained[name] != shapes[name]:
            yield f"{folder}: {name} has shape {shapes[name]} in the adapter, and {trained[name]} by {RUN_NAME}"
    if trained and not trained.keys() & shapes.keys():
        yield f"{folder}: nothing of what was trained is in the adapter"


def stored_adapter(checkpoint: Checkpoint) -> StoredExperts:
    """Return the adapter's tensors on the rank that reads them, None on the others. A collective."""
    path = checkpoint.folder / ADAPTER_FOLDER / "adapter_model.safetensors"
    here = ranks.get_rank() == checkpoint.reader
    return StoredExperts(checkpoint.reader, ranks.agree(lambda: load_file(path) if here else None))


@torch.no_grad()
def restore(engine: DeepSpeedEngine, checkpoint: Checkpoint) -> None:
    """Write the state of a checkpoint into a new engine. A collective.

    Args:
        engine: Trains the tensors of the checkpoint, under whatever stage and on whatever number of ranks.
        checkpoint: Whole.
    """
    here = ranks.get_rank() == checkpoint.reader
    num_steps = int(checkpoint.engine["adam_steps"])
    read = _StateReader(checkpoint.folder) if here else None
    for name, parameter in trained_tensors(engine.module):
        state = read.state(name, num_steps) if read else None
        write_state(engine, parameter, state, owner=checkpoint.reader)
    resume_schedule(engine, int(checkpoint.engine["schedule_steps"]))
    scaler = _loss_scaler(engine)
    for name, value in checkpoint.engine["loss_scale"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
    # What DeepSpeed's own reports and profiler count.
    engine.global_steps = checkpoint.step
    engine.global_samples = checkpoint.step * engine.train_batch_size()


class _StateReader:
    def __init__(self, folder: Path) -> None:
        self._place = {name: path for path in sorted(folder.glob(STATE_PATTERN)) for name in _shapes_in(path)}

    def state(self, name: str, num_steps: int) -> TensorState:
        master, first, second = (self._tensor(f"{name}.{part}") for part in PARTS)
        return TensorState(master, first, second, num_steps)

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self._place[name], framework="pt") as file:
            return file.get_tensor(name)
