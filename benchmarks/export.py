"""How long does an export take against copying the base's folder, and how much memory?

    python benchmarks/export.py [--exports exact dense] [--layers 8] [--hidden 1536] [--repetitions 5]

Exact exports write the routed model; dense ones merge experts that are static already, so that reading, merging and
writing are timed, and no calibration. The base is a LLaMA of several shards with random weights and a large
vocabulary, the adapter on all of its linear layers. Copies and exports alternate on one thread. Both read from the page
cache and write to it: neither waits for the disk. Memory is what is resident at most above the start, in a fresh
process that has exported a tiny model before.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import results
import torch
from peft import get_peft_model
from results import Row
from transformers import LlamaConfig, LlamaForCausalLM

from goat_ds import GoatConfig
from goat_ds.export import Fitting, export_dense, export_exact
from goat_ds.tuner.fingerprint import fingerprint, sample_layer
from goat_ds.tuner.model import named_experts

MIB = 2**20


class Export(NamedTuple):
    """One way out: what it does, and what it may take."""

    write: Callable[[Path, Path], object]
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


EXPORTS = {
    "exact": Export(exact, most_copies=3.0, most_tensors=2, adapter="adapter"),
    "dense": Export(dense, most_copies=6.0, most_tensors=2, adapter="static"),
}


class Sizes(NamedTuple):
    """Bytes of what was written."""

    base: int
    largest: int
    """Tensor of the base."""
    adapter: int


def main() -> None:
    """Measure each way out, or the memory of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exports", choices=list(EXPORTS), nargs="*", default=list(EXPORTS))
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of the base")
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=64000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    results.add_flag(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.model:
        print(memory_of(EXPORTS[arguments.exports[0]], arguments.model))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        sizes = write_model(
            model,
            num_layers=arguments.layers,
            hidden=arguments.hidden,
            intermediate=arguments.intermediate,
            vocabulary=arguments.vocabulary,
        )
        write_model(model / "tiny", num_layers=1, hidden=64, intermediate=64, vocabulary=64)
        rows = [
            row for name in arguments.exports for row in measured(name, model, sizes, repetitions=arguments.repetitions)
        ]
    results.publish(rows, parser=parser, arguments=arguments)


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


def measured(name: str, model: Path, sizes: Sizes, *, repetitions: int) -> list[Row]:
    """Measure one way out."""
    export = EXPORTS[name]
    copies, exports = [], []
    for _ in range(repetitions + 1):
        copies.append(seconds_of(lambda output: shutil.copytree(model / "base", output), model / "out"))
        exports.append(seconds_of(lambda output: export.write(model / export.adapter, output), model / "out"))
    command = [sys.executable, __file__, "--model", str(model), "--exports", name]
    memory = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
    allowed = export.most_tensors * sizes.largest + sizes.adapter
    what = f"{name} export of a base of {sizes.base / MIB:.0f} MiB"
    return [
        # The first ones bring files into the page cache, and libraries into memory.
        Row(
            question=f"{what}, against copying its folder",
            ours=tuple(exports[1:]),
            rival=tuple(copies[1:]),
            unit="s",
            at_most=export.most_copies,
        ),
        Row(
            question=f"memory of the {what}, against {export.most_tensors} of its largest tensors and the adapter",
            ours=(memory / MIB,),
            rival=(allowed / MIB,),
            unit="MiB",
            at_most=1.0,
        ),
    ]


def seconds_of(write: Callable[[Path], object], output: Path) -> float:
    """Time what writes a folder, and remove the folder."""
    began = time.perf_counter()
    write(output)
    seconds = time.perf_counter() - began
    shutil.rmtree(output)
    return seconds


def memory_of(export: Export, model: Path) -> int:
    """Return the bytes by which an export raises the resident memory of this process at its peak."""
    export.write(model / "tiny" / export.adapter, model / "tiny" / "out")
    shutil.rmtree(model / "tiny" / "out")
    # Lets the kernel forget the peak so far (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    export.write(model / export.adapter, model / "out")
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
