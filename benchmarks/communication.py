"""How much does a step of ZeRO-3 send for GOAT, against PEFT's LoRA of the same rank on the same engine and batches?

    python benchmarks/communication.py [--hidden 4096] [--intermediate 14336] [--layers 1] [--tokens 64] [--steps 2]

Two ranks train one decoder block of LLaMA-3-8B's shapes in bf16, r 32 on all linear layers, GOAT with 8 experts and the
low-rank residual; the vocabulary is small. Weights and experts are random: bytes depend neither on values nor on the
number of tokens. Counted is what DeepSpeed asks of its communication backend in a step, the first one aside, as bytes
that a rank receives in a ring. DeepSpeed would keep all of a model so small from forward to backward; here a rank holds
no more than two of the largest weights (``stage3_max_live_parameters``), so that most of the block is gathered again,
as it is in a model of 32. The share of waiting is that of the first rank's step in which it stood still for a gather in
forward or backward; it is one of two CPU ranks and gloo, and says nothing about a GPU.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import results
import torch
import torch.distributed
from deepspeed.comm import comm
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from peft import LoraConfig, PeftModel, get_peft_model
from results import Row
from setting import ignore_calls_of_libraries, start_ranks
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, get_scheduler

from goat_ds import GoatConfig
from goat_ds.base.inspect import inspect
from goat_ds.distributed import ranks
from goat_ds.precision import Precision
from goat_ds.train.cli import parse
from goat_ds.train.environment import join_ranks
from goat_ds.train.inputs import read_inputs
from goat_ds.tuner.model import ADAPTER_NAME, named_experts
from goat_ds.zero import engine as engines
from goat_ds.zero import partition
from goat_ds.zero.decompose import StoredExperts, init_adapter
from goat_ds.zero.engine import Checkpointing

BYTES_TARGET = 1.02
R, NUM_EXPERTS = 32, 8
VOCABULARY = 256
# It records the order of modules.
WARM_UP_STEPS = 1
MIB = 2**20
WAYS = {Checkpointing.NONE: "", Checkpointing.NON_REENTRANT: " with non-reentrant checkpointing"}
GATHERS = ("all_gather_into_tensor", "all_gather")
REDUCTIONS = ("reduce_scatter_tensor", "reduce_scatter", "all_reduce")


@dataclass
class Step:
    """What one rank did in one step."""

    seconds: float = 0.0
    waited: float = 0.0
    """Seconds that forward and backward stood still for parameters."""
    num_gathers: int = 0
    """Of parameters, in forward and backward."""
    num_late: int = 0
    """Modules that were entered before a parameter of theirs had been asked for."""
    num_updated: int = 0
    """Gathers after the optimizer's step, of parameters that are kept whole between steps."""
    gathered: float = 0.0
    """Bytes that a rank receives in a ring; so are the next two."""
    updated: float = 0.0
    reduced: float = 0.0

    @property
    def num_bytes(self) -> float:
        """Of everything."""
        return self.gathered + self.updated + self.reduced


class Awaited:
    """A collective under way, which tells how long it was waited for."""

    def __init__(self, work: Any, meter: "Meter") -> None:
        self._work, self._meter = work, meter

    def wait(self) -> None:
        """Wait for its end."""
        began = time.perf_counter()
        self._work.wait()
        self._meter.add_wait(time.perf_counter() - began)


class Meter:
    """Counts what DeepSpeed asks of its communication backend."""

    def __init__(self) -> None:
        self.step, self._updates = Step(), False

    def add_wait(self, seconds: float) -> None:
        """Note that this rank stood still."""
        if not self._updates:
            self.step.waited += seconds

    @contextmanager
    def listening(self, engine: Any) -> Iterator[None]:
        """Count what goes through the backend, and the modules that come before their parameters."""
        coordinator = engine.optimizer.parameter_offload.param_coordinator
        with ExitStack() as patches:
            for name in (*GATHERS, *REDUCTIONS):
                asked = partial(self._asked, name, getattr(comm.cdb, name))
                patches.enter_context(patch.object(comm.cdb, name, asked))
            entered = partial(self._entered, coordinator.fetch_sub_module)
            patches.enter_context(patch.object(coordinator, "fetch_sub_module", entered))
            yield

    def count(self, forward_and_backward: Callable[[], object], update: Callable[[], object]) -> Step:
        """Run a step inside of ``listening``; return what it took."""
        self.step, self._updates = Step(), False
        torch.distributed.barrier()
        began = time.perf_counter()
        forward_and_backward()
        self._updates = True
        update()
        self.step.seconds = time.perf_counter() - began
        return self.step

    def _asked(self, name: str, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        world_size = torch.distributed.get_world_size(kwargs.get("group"))
        # What is put together or taken apart is the largest of the tensors.
        whole = max(value.nbytes for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        received = whole * (world_size - 1) / world_size
        if name in REDUCTIONS:
            self.step.reduced += received * (2 if name == "all_reduce" else 1)
        elif self._updates:
            self.step.updated += received
            self.step.num_updated += 1
        else:
            self.step.gathered += received
            self.step.num_gathers += 1
        work = collective(*args, **kwargs)
        return work if work is None else Awaited(work, self)

    def _entered(self, fetch: Callable[..., None], module: nn.Module, **kwargs: Any) -> None:
        parameters: Any = module.parameters(recurse=False)
        self.step.num_late += any(parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE for parameter in parameters)
        fetch(module, **kwargs)


def main() -> None:
    """Start the two ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096, help="features of the base")
    parser.add_argument("--intermediate", type=int, default=14336, help="features inside of its feed-forward layers")
    parser.add_argument("--layers", type=int, default=1, help="its decoder blocks")
    parser.add_argument("--tokens", type=int, default=64, help="of the row of a rank in a step")
    parser.add_argument("--steps", type=int, default=2, help="that are counted")
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    results.add_flag(parser)
    arguments = parser.parse_args()
    if arguments.base:
        rows = measure(arguments.base, num_tokens=arguments.tokens, num_steps=arguments.steps)
        if rows:
            results.publish(rows, parser=parser, arguments=arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), arguments)
        start_ranks(__file__, *sys.argv[1:], "--base", folder)


def write_base(folder: Path, arguments: argparse.Namespace) -> None:
    """Write a base with the layer shapes of LLaMA-3-8B."""
    head_dim = min(128, arguments.hidden // 4)
    num_heads = arguments.hidden // head_dim
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 4,
        head_dim=head_dim,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def measure(base_folder: Path, *, num_tokens: int, num_steps: int) -> list[Row]:
    """Train both ways on this rank; return the rows on the first rank."""
    ignore_calls_of_libraries()
    torch.set_num_threads(1)
    config = parse(["--ds_config", str(Path(__file__).parents[1] / "ds_configs" / "zero3.json")])
    join_ranks(config, timeout_minutes=30)
    engine_config, base = read_inputs(config).engine_config, AutoConfig.from_pretrained(base_folder)
    largest = base.hidden_size * base.intermediate_size
    engine_config["zero_optimization"] |= {
        "stage3_max_live_parameters": 2 * largest,
        "stage3_max_reuse_distance": 0,
    }
    rows: list[Row] = []
    for checkpointing in (Checkpointing.NONE, Checkpointing.NON_REENTRANT):
        found = []
        for adapted in (with_goat, with_lora):
            engine = engine_of(base_folder, adapted, checkpointing, engine_config)
            found.append(steps_of(engine, num_tokens=num_tokens, num_steps=num_steps))
            engines.destroy(engine)
        rows += rows_of(*found, checkpointing)
        if ranks.is_first():
            print_parts(*found, checkpointing)
    ranks.leave()
    return rows if ranks.is_first() else []


def engine_of(
    base_folder: Path,
    adapted: Callable[[Any, dict[str, Any]], PeftModel],
    checkpointing: Checkpointing,
    engine_config: dict[str, Any],
) -> Any:
    """Load the base, put an adapter on it, give both to DeepSpeed."""
    base = engines.load_base(
        inspect(str(base_folder)),
        precision=Precision.BF16,
        attention=engines.Attention.SDPA,
        engine_config=engine_config,
    )
    model = adapted(base, engine_config)
    engines.enable_checkpointing(model, checkpointing)
    return engines.build_engine(
        model, engine_config=engine_config, schedule=lambda optimizer: get_scheduler("constant", optimizer)
    )


def with_goat(base: Any, engine_config: dict[str, Any]) -> PeftModel:
    """Put experts on every linear layer of the blocks; they start from random values."""
    model = engines.attach_experts(base, GoatConfig(r=R, num_experts=NUM_EXPERTS), engine_config=engine_config)
    start = StoredExperts(0, {
        f"{item.path}.goat_{name}": torch.randn(partition.full_shape(parameter), dtype=torch.bfloat16) / 64
        for item in named_experts(model, ADAPTER_NAME)
        for name, parameter in item.experts.named_parameters()
    } if ranks.is_first() else None)  # fmt: skip
    init_adapter(model, ADAPTER_NAME, seed=0, cache=None, stored=start)
    return model


def with_lora(base: Any, engine_config: dict[str, Any]) -> PeftModel:
    """Put PEFT's LoRA on the same layers, sharded at birth as experts are."""
    config = LoraConfig(r=R, target_modules="all-linear", init_lora_weights=False)
    with partition.partitioned_at_birth(engine_config, stage=3):
        return get_peft_model(base, config, autocast_adapter_dtype=False)


def steps_of(engine: Any, *, num_tokens: int, num_steps: int) -> list[Step]:
    """Train on one row of random tokens again and again; return what the last steps took."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    input_ids = torch.randint(VOCABULARY, (1, num_tokens), generator=generator)

    def forward_and_backward() -> None:
        engine.backward(engine(input_ids=input_ids, labels=input_ids, use_cache=False).loss)

    meter = Meter()
    with meter.listening(engine):
        steps = [meter.count(forward_and_backward, engine.step) for _ in range(WARM_UP_STEPS + num_steps)]
    assert engine.optimizer.parameter_offload.param_coordinator.is_complete_trace()
    return steps[WARM_UP_STEPS:]


def rows_of(ours: list[Step], rival: list[Step], checkpointing: Checkpointing) -> list[Row]:
    """Put what two runs took side by side."""

    def row(what: str, value: Callable[[Step], float], unit: str, *, at_most: float | None = None) -> Row:
        return Row(
            question=f"{what} in a ZeRO-3 step at LLaMA-3-8B's shapes{WAYS[checkpointing]}, against PEFT LoRA",
            ours=tuple(map(value, ours)),
            rival=tuple(map(value, rival)),
            unit=unit,
            at_most=at_most,
        )

    return [
        row("bytes a rank receives", lambda step: step.num_bytes / MIB, "MiB", at_most=BYTES_TARGET),
        row("gathers", lambda step: step.num_gathers + step.num_updated, "calls"),
    ]


def print_parts(ours: list[Step], rival: list[Step], checkpointing: Checkpointing) -> None:
    """Print what the bytes of the last step are, and how many modules came before their parameters were asked for."""
    for name, step in (("GOAT", ours[-1]), ("LoRA", rival[-1])):
        parts = (
            f"{step.gathered / MIB:.2f} MiB of parameters in {step.num_gathers} gathers",
            f"{step.num_late} modules before theirs were asked for",
            f"{step.updated / MIB:.2f} MiB in {step.num_updated} gathers after the update",
            f"{step.reduced / MIB:.2f} MiB of gradients",
            f"{step.waited / step.seconds:.0%} of the time waited for gathers",
        )
        print(f"{name}, checkpointing {checkpointing}: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
