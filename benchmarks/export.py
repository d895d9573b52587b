"""How long does an export take against copying the base's folder, and how much memory?

    python benchmarks/export.py [--rows exact dense] [--layers 8] [--hidden 1536] [--repetitions 7]

Exact exports write the routed model; dense ones merge experts that are static already, so that reading, merging and
writing are timed, and no calibration. The base is a LLaMA of several shards with random weights and a large
vocabulary, the adapter on all of its linear layers. Copies and exports alternate, so that a busy machine slows both; a
line gives the medians, and the quarter and three-quarter points of the ratio over repetitions. Both read from the page
cache and write to it: neither waits for the disk. Memory is what is resident at most above the start, in a fresh
process that has exported a tiny model before.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from goat_ds import GoatConfig
from goat_ds.export import Fitting, export_dense, export_exact
from goat_ds.tuner.fingerprint import fingerprint, sample_layer
from goat_ds.tuner.model import named_experts

MIB = 2**20


class Row(NamedTuple):
    """One way out: what it does, and what it may take."""

    export: Callable[[Path, Path], object]
    """Exports an adapter's folder to a new folder."""
    most_copies: float
    """Target: its seconds, in those of copying the base's folder."""
    most_tensors: int
    """Target: its memory, in largest tensors of the base, beside the adapter."""
    adapter: str
    """Name of the folder with the adapter it takes."""


def exact(adapter: Path, output: Path) -> None:
    """Write base, experts and modelling code."""
    export_exact(adapter, output=output)


def dense(adapter: Path, output: Path) -> None:
    """Write merged weights of experts that are static already: no calibration, no comparison."""
    export_dense(adapter, output=output, fitting=Fitting(heldout_labels=0))


ROWS = {
    "exact": Row(exact, most_copies=3.0, most_tensors=2, adapter="adapter"),
    "dense": Row(dense, most_copies=6.0, most_tensors=2, adapter="static"),
}


class Sizes(NamedTuple):
    """Bytes of what was written."""

    base: int
    largest: int
    """Tensor of the base."""
    adapter: int


def main() -> None:
    """Print one line for each way out, or measure the memory of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", choices=list(ROWS), nargs="*", default=list(ROWS))
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of the base")
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=64000)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model:
        print(memory_of(ROWS[args.rows[0]], args.model))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        sizes = write_model(
            model,
            num_layers=args.layers,
            hidden=args.hidden,
            intermediate=args.intermediate,
            vocabulary=args.vocabulary,
        )
        write_model(model / "tiny", num_layers=1, hidden=64, intermediate=64, vocabulary=64)
        print_head(sizes)
        for name in args.rows:
            print(f"{name:<8}" + line(name, model, sizes, repetitions=args.repetitions), flush=True)


def print_head(sizes: Sizes) -> None:
    """Say what was written and what the columns are."""
    base, largest, adapter = (size / MIB for size in sizes)
    print(f"base {base:.0f} MiB with a largest tensor of {largest:.0f} MiB, adapter {adapter:.0f} MiB, one thread")
    print("ratio = export / copy of the base's folder; memory above the start in MiB, and its ratio to what is allowed")
    print(f"{'row':<8}{'copy s':>8}{'export s':>10}{'ratio':>7}  {'quartiles':<13}{'target':>6}", end="")
    print(f"{'MiB':>8}{'ratio':>7}{'target':>8}")


def write_model(folder: Path, *, num_layers: int, hidden: int, intermediate: int, vocabulary: int) -> Sizes:
    """Write ``base/`` and ``adapter/`` with random values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    base.save_pretrained(folder / "base", max_shard_size="250MB")
    base.name_or_path = str(folder / "base")
    for name, routed in (("adapter", True), ("static", False)):
        write_adapter(base, folder / name, routed=routed)
    weights = [parameter.numel() * 2 for parameter in config_parameters(config)]
    return Sizes(base=bytes_in(folder / "base"), largest=max(weights), adapter=bytes_in(folder / "adapter"))


def write_adapter(base: LlamaForCausalLM, folder: Path, *, routed: bool) -> None:
    """Write an adapter of random factors instead of the start's, whose decompositions would take minutes."""
    config = GoatConfig(deferred=True, routed=routed, task_type="CAUSAL_LM")
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    items = list(named_experts(base, "default"))
    with torch.no_grad():
        for parameter in (parameter for item in items for parameter in item.experts.parameters()):
            parameter.normal_(std=0.01)
    known = fingerprint({item.path: sample_layer(item.layer.weight_OI()) for item in items})
    model.base_model.record_base("default", fingerprint=known)
    model.save_pretrained(folder)
    model.unload()


def config_parameters(config: LlamaConfig) -> list[torch.nn.Parameter]:
    """List a base's parameters, without their values."""
    with torch.device("meta"):
        return list(LlamaForCausalLM(config).parameters())


def bytes_in(folder: Path) -> int:
    """Add up the files of a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def line(name: str, model: Path, sizes: Sizes, *, repetitions: int) -> str:
    """Measure one way out and format what it took."""
    row = ROWS[name]
    copies, exports = [], []
    for repetition in range(repetitions + 1):
        copied = seconds_of(lambda output: shutil.copytree(model / "base", output), model / "out")
        exported = seconds_of(lambda output: row.export(model / row.adapter, output), model / "out")
        # The first ones bring files into the page cache, and libraries into memory.
        if repetition:
            copies.append(copied)
            exports.append(exported)
    ratios = [export / copy for export, copy in zip(exports, copies, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    command = [sys.executable, __file__, "--model", str(model), "--rows", name]
    memory = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
    allowed = row.most_tensors * sizes.largest + sizes.adapter
    return (
        f"{statistics.median(copies):8.3f}{statistics.median(exports):10.3f}{middle:7.2f}  "
        f"{f'{low:.2f} - {high:.2f}':<13}{row.most_copies:6.1f}{memory / MIB:8.1f}{memory / allowed:7.2f}{1.0:8.1f}"
    )


def seconds_of(write: Callable[[Path], object], output: Path) -> float:
    """Time what writes a folder, and remove the folder."""
    began = time.perf_counter()
    write(output)
    seconds = time.perf_counter() - began
    shutil.rmtree(output)
    return seconds


def memory_of(row: Row, model: Path) -> int:
    """Give the bytes by which an export raises the resident memory of this process at its peak."""
    row.export(model / "tiny" / row.adapter, model / "tiny" / "out")
    shutil.rmtree(model / "tiny" / "out")
    # Lets the kernel forget the peak so far (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    row.export(model / row.adapter, model / "out")
    shutil.rmtree(model / "out")
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Read the resident memory of this process in bytes: now (VmRSS), or at its peak (VmHWM)."""
    for entry in Path("/proc/self/status").read_text().splitlines():
        if entry.startswith(f"{name}:"):
            return int(entry.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status holds no {name}")


if __name__ == "__main__":
    main()
