"""What a run says about itself: metrics.jsonl, routers.jsonl, DeepSpeed's monitors, a progress bar.

Shape letters: N routed layers, E experts.
"""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from goat_ds.data import MicroBatch
from goat_ds.distributed import ranks
from goat_ds.method.routing import RouterLoad
from goat_ds.train.objective import StepLoss

logger = logging.getLogger(__name__)


class Metrics:
    """Gathers a step's numbers over micro-batches and ranks, and writes them on the first rank."""

    def __init__(self, output_dir: Path, *, num_steps: int, monitor: Any, done: int = 0, tokens: int = 0) -> None:
        self._monitor = monitor
        self._tokens = tokens
        self.eval_loss: float | None = None
        """Of the held-out data, after the running step."""
        self._since = time.monotonic()
        self._tokens_since = 0
        self._bar = tqdm(total=num_steps, initial=done, desc="train", unit="step", disable=not ranks.is_first())
        self._output_dir = output_dir
        self._files: dict[str, FileIO] = {}
        if ranks.is_first():
            for name in ("metrics", "routers"):
                _set_redone_aside(output_dir / f"{name}.jsonl", done=done)
        self._begin_step()

    @property
    def tokens(self) -> int:
        """Tokens of all ranks so far."""
        return self._tokens

    def _begin_step(self) -> None:
        self._sums: Tensor | None = None
        self._routers: dict[str, Tensor] = {}

    def add(self, loss: StepLoss, batch: MicroBatch, loads: Mapping[str, RouterLoad]) -> None:
        """Count one micro-batch of this rank; a filler counts as nothing."""
        real = 0.0 if batch.is_filler else 1.0
        sums = torch.stack([loss.lm_sum, loss.balance * real, loss.balance.new_tensor(real)]).double()
        sums = torch.cat([sums, sums.new_tensor([batch.num_tokens])])
        self._sums = sums if self._sums is None else self._sums + sums
        for name, load in loads.items():
            row = torch.cat([load.share_E, load.entropy[None], load.balance_loss[None]]).double() * real
            self._routers[name] = self._routers[name] + row if name in self._routers else row

    def finish_step(self, *, num_label_tokens: int) -> "StepTotals":
        """Add a step up over all ranks. A collective."""
        assert self._sums is not None
        routers_NE = torch.stack(list(self._routers.values())) if self._routers else self._sums.new_zeros(0, 2)
        totals = ranks.sum_over_ranks(torch.cat([self._sums, routers_NE.flatten()]))
        lm_sum, balance, num_real, num_tokens = totals[:4].tolist()
        routers_NE = totals[4:].reshape(routers_NE.shape) / max(num_real, 1)
        result = StepTotals(
            loss=lm_sum / num_label_tokens,
            balance_loss=balance / max(num_real, 1) if self._routers else None,
            routers=dict(zip(self._routers, routers_NE.tolist(), strict=True)),
        )
        self._tokens += int(num_tokens)
        self._tokens_since += int(num_tokens)
        self._begin_step()
        return result

    def record(self, step: int, totals: "StepTotals", *, lr: float, grad_norm: float, routers_too: bool) -> None:
        """Write a step's line. A collective: the peak memory is that of the rank that has most."""
        peak_mem_gib = ranks.max_over_ranks(ranks.peak_memory_gib())
        seconds = time.monotonic() - self._since
        line = {
            "step": step,
            "loss": totals.loss,
            "balance_loss": totals.balance_loss,
            "router_entropy": totals.router_entropy,
            "expert_load_max": totals.expert_load_max,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": self._tokens,
            "tokens_per_s": self._tokens_since / seconds,
            "peak_mem_gib": peak_mem_gib,
        }
        self._since, self._tokens_since = time.monotonic(), 0
        self._bar.set_postfix(loss=f"{totals.loss:.4f}", lr=f"{lr:.2e}")
        self._write("metrics", line)
        if routers_too and totals.routers:
            self._write("routers", {"step": step, "layers": totals.layers()})
        self._tell_monitor(step, line)

    def record_eval(self, step: int, *, eval_loss: float) -> None:
        """Write a line with the loss and perplexity of the held-out data."""
        self.eval_loss = eval_loss
        line = {"step": step, "eval_loss": eval_loss, "eval_perplexity": math.exp(min(eval_loss, 700.0))}
        self._write("metrics", line)
        self._tell_monitor(step, line)
        logger.info(f"step {step}: eval_loss {eval_loss:.4f}, perplexity {line['eval_perplexity']:.4f}")
        self._since = time.monotonic()

    def record_finish(self, step: int, **numbers: float) -> None:
        """Write a line with what a dense finish was made from."""
        self._write("metrics", {"step": step, "dense_finish": numbers})
        self._since = time.monotonic()

    def step_done(self) -> None:
        """Move the progress bar."""
        self.eval_loss = None
        self._bar.update()

    def close(self) -> None:
        """Close files and bar."""
        self._bar.close()
        for file in self._files.values():
            file.close()

    def _write(self, name: str, line: Mapping[str, Any]) -> None:
        if not ranks.is_first():
            return
        # Made with its first line: a run that fails before it leaves its folder empty, to be used again.
        if name not in self._files:
            self._files[name] = (self._output_dir / f"{name}.jsonl").open("ab", buffering=0)
        _append(self._files[name], (json.dumps(line) + "\n").encode())

    def _tell_monitor(self, step: int, line: Mapping[str, float | None]) -> None:
        if self._monitor.enabled and ranks.is_first():
            events = [(f"train/{name}", value, step) for name, value in line.items() if value is not None]
            self._monitor.write_events([event for event in events if not event[0].endswith("/step")])


def _append(file: FileIO, line: bytes) -> None:
    """Write a line whole or not at all; a disk that is full loses it, said, and does not end the run."""
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        logger.warning(f"{file.name}: a line was not written: {error.strerror}")
        with suppress(OSError):
            file.truncate(end)


def _set_redone_aside(path: Path, *, done: int) -> None:
    """Move the lines of steps that will be done again to a file of their own, so that each step has one line."""
    if not path.exists():
        return
    kept: list[str] = []
    redone: list[str] = []
    content = path.read_text()
    for line in content.splitlines():
        (redone if redone or _is_after(line, done) else kept).append(line)
    if not redone and content.endswith("\n"):
        return
    with path.with_name(f"{path.stem}.redone.jsonl").open("a") as aside:
        aside.writelines(f"{line}\n" for line in redone)
    shortened = path.with_name(f".{path.name}.tmp")
    shortened.write_text("".join(f"{line}\n" for line in kept))
    shortened.replace(path)


def _is_after(line: str, done: int) -> bool:
    """Whether a line was written after the checkpoint of step ``done``."""
    try:
        logged = json.loads(line)
    except ValueError:
        # The run was ended in the middle of writing it.
        return True
    # A dense finish comes after the checkpoint of its step.
    return bool(logged["step"] > done or (logged["step"] == done and "dense_finish" in logged))


class StepTotals:
    """A step's numbers over all ranks.

    ``routers`` holds, by layer, E loads, the entropy and ``L_b``; where nothing routes, it is empty and
    ``balance_loss`` is None.
    """

    def __init__(self, *, loss: float, balance_loss: float | None, routers: dict[str, list[float]]) -> None:
        self.loss, self.balance_loss, self.routers = loss, balance_loss, routers

    @property
    def router_entropy(self) -> float | None:
        """Mean entropy of the routers' probabilities over layers, in nats."""
        if not self.routers:
            return None
        return sum(row[-2] for row in self.routers.values()) / len(self.routers)

    @property
    def expert_load_max(self) -> float | None:
        """Largest share of a layer's choices that one expert took, over layers and experts."""
        return max((max(row[:-2]) for row in self.routers.values()), default=None)

    def layers(self) -> dict[str, dict[str, Any]]:
        """Return the load of every expert, the entropy and the balance loss of every layer."""
        return {
            name: {"load": [round(share, 4) for share in row[:-2]], "entropy": row[-2], "balance_loss": row[-1]}
            for name, row in self.routers.items()
        }
