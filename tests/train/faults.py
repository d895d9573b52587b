"""What faults are done to runs, how often, and what a run loses: the tests do them, docs/reliability.md lists them."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from goat_ds import demo
from tests.child_environment import rank_environments
from tests.forked_ranks import CrashPlan, Run, start
from tests.launching import metrics_of


class Fault(NamedTuple):
    """A row of the table in docs/reliability.md."""

    name: str
    times: int
    """How often the tests do it."""
    lost: str

    def row(self) -> str:
        """Return its line."""
        return f"| {self.name} | {self.times} | {self.lost} |"


SINCE_LAST = "the steps since the last checkpoint"
KILL_IN_SAVE = Fault("`kill -9` of the writing rank, at different instants inside a save", 20, SINCE_LAST)
KILL_ONE = Fault("`kill -9` of one rank, at random instants of start, resume, training and saves", 8, SINCE_LAST)
KILL_ALL = Fault("`kill -9` of all ranks, at random instants", 8, SINCE_LAST)
KILL_IN_RESUME = Fault("`kill -9` while a checkpoint is read", 4, "nothing more")
SIGNALS = Fault("SIGTERM or SIGUSR1 to one rank or to all", 4, "nothing: the running step is saved, exit code 75")
SECOND_SIGTERM = Fault("a second SIGTERM during a save", 1, "the running step: exit code 143 at once")
ELASTIC = Fault(
    "other ranks, stage and offload at every start: 2, 1, 1, 3 ranks", 4, "nothing: losses equal to rounding"
)
FULL_DISK = Fault("a disk that becomes full inside a save", 2, "that checkpoint; the run stops, or goes on if told to")
READ_ONLY = Fault("a folder that cannot be written to", 1, "nothing: refused before training")
DAMAGED = Fault(
    "a checkpoint that is damaged, cut short, incomplete or not what it says", 15, "it is passed over, by name"
)
OTHER_MODEL = Fault("another model, other weights or other data", 3, "nothing: refused before training")
FAULTS = (
    KILL_IN_SAVE, KILL_ONE, KILL_ALL, KILL_IN_RESUME, SIGNALS, SECOND_SIGTERM, ELASTIC, FULL_DISK, READ_ONLY, DAMAGED,
    OTHER_MODEL,
)  # fmt: skip

SETTINGS = {
    "ds_config": "ds_configs/zero3.json",
    "precision": "fp32",
    "max_length": "64",
    "max_steps": "8",
    "save_steps": "2",
    "warmup_steps": "2",
    "learning_rate": "1e-2",
    "r": "8",
    "num_experts": "4",
    "resume": "auto",
}


class Laboratory:
    """A base small enough that a run starts within seconds, data, and the runs that are done to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write_base(root / "base", hidden_size=64)
        lines = demo.train_data().read_text().splitlines(keepends=True)[:40]
        (root / "data.jsonl").write_text("".join(lines))
        self._num_folders = 0

    def folder(self) -> Path:
        """Name a new folder for a run."""
        self._num_folders += 1
        return self.root / f"run-{self._num_folders}"

    def start(
        self,
        output_dir: Path,
        settings: Mapping[str, str] | None = None,
        *,
        world_size: int = 2,
        crash: CrashPlan | None = None,
        printed: Path | None = None,
    ) -> Run:
        """Start a run, or start it again: the command line is the same.

        What it prints is kept beside its folder, or in ``printed``.
        """
        places = {"model": self.root / "base", "data": self.root / "data.jsonl", "output_dir": output_dir}
        places |= {"svd_cache": self.root / "svd", "token_cache": self.root / "tokens"}
        flags = {name: str(path) for name, path in places.items()} | SETTINGS | dict(settings or {})
        command = ["launch/train.py", *(word for name, value in flags.items() for word in (f"--{name}", value))]
        printed = printed or output_dir.with_name(f"{output_dir.name}-printed")
        return start(command, folder=printed, environments=rank_environments(world_size), crash=crash)

    def finish(self, output_dir: Path, settings: Mapping[str, str] | None = None, *, world_size: int = 2) -> Run:
        """Run to the end; any failure fails the test."""
        run = self.start(output_dir, settings, world_size=world_size)
        assert run.wait() == [0] * world_size, run.output()
        return run


def write_base(folder: Path, *, hidden_size: int, seed: int = 0) -> None:
    """Write a LLaMA of one layer with random weights and the demo's tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.base_path()).save_pretrained(folder)


def steps_saved(output_dir: Path) -> list[int]:
    """List the steps of a run's checkpoints, oldest first."""
    found = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*"))
    return sorted(int(match[1]) for match in found if match)


def steps_logged(output_dir: Path) -> int:
    """Return the last step that a running run has told of."""
    path = output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def trajectory(output_dir: Path) -> list[tuple[int, float, float, int]]:
    """Return step, loss, gradient norm and tokens so far, line by line."""
    lines = [line for line in metrics_of(output_dir) if "loss" in line]
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in lines]


def assert_same_end(output_dir: Path, uninterrupted: Path) -> None:
    """Check that a run has the losses of another, and left the same bytes: adapter, masters and moments."""
    assert trajectory(output_dir) == trajectory(uninterrupted)
    last = f"checkpoint-{steps_saved(uninterrupted)[-1]}"
    files = [path.relative_to(uninterrupted) for path in (uninterrupted / last).rglob("*.safetensors")]
    assert len(files) >= 3
    for file in files:
        assert (output_dir / file).read_bytes() == (uninterrupted / file).read_bytes(), file
    # No half of a checkpoint is left behind.
    assert not list(output_dir.glob(".checkpoint-*"))


def copy_of(output_dir: Path, laboratory: Laboratory) -> Path:
    """Copy a run's folder, to be damaged."""
    return shutil.copytree(output_dir, laboratory.folder())
