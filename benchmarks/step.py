"""What does a training step with experts cost, against PEFT's LoRA of the same rank and against a loop over experts?

    python benchmarks/step.py [--layers 18] [--tokens 1024] [--repetitions 5]

All train Gemma-3-270M's shapes with random weights in bf16, every linear layer adapted, by the same engine (DeepSpeed,
ZeRO-2 on one process), the same objective and the same batches: one full row of several documents, a label at 30 % of
the positions. The loop is what the method's release does in every layer: it asks for the tokens of each expert, runs
them through the expert's two products and adds them into the output, and its base holds the residual. A step is
forward, loss, backward and AdamW; all ways take turns in one process on one thread, the loop, which is slow, in every
third round. Memory is all tensors that a way has made and still has at the worst moment of a step, the base included.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import results
import torch
from datasets import Dataset
from live_tensors import LiveTensors
from peft import LoraConfig, get_peft_model
from results import Row
from setting import GEMMA_3_270M, ignore_calls_of_libraries
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, get_scheduler

from goat_ds import GoatConfig
from goat_ds.data import BatchPlan, StepBatch, batches, pack_dataset
from goat_ds.distributed import ranks
from goat_ds.method.routing import BalanceSignal
from goat_ds.train.cli import parse
from goat_ds.train.environment import join_ranks
from goat_ds.train.inputs import read_inputs
from goat_ds.train.objective import objective
from goat_ds.tuner.model import linear_shape, named_experts
from goat_ds.zero import engine as engines

R, NUM_EXPERTS, TOP_K, BALANCE_COEF = 32, 8, 2, 1e-3
LABEL_SHARE = 0.3
DOCUMENTS = 4
BUCKET_VALUES = 2**23
"""As many as there are gradients; the gigabyte that DeepSpeed takes by default would hide what is compared."""
MIB = 2**20
RIVAL, LOWRANK, FOLD, LOOP = "PEFT's LoRA", "low-rank residual", "folded residual", "a loop over experts"
ROUNDS_A_LOOP = 3


class Way(NamedTuple):
    """An engine that trains, what its objective calls the tuner, and the count of its tensors."""

    engine: Any
    tuner: Any
    live: LiveTensors


def main() -> None:
    """Measure all ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=18, help="decoder layers of the base")
    parser.add_argument("--tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--vocabulary", type=int, default=262144)
    parser.add_argument("--repetitions", type=int, default=5)
    results.add_flag(parser)
    arguments = parser.parse_args()
    ignore_calls_of_libraries()
    torch.set_num_threads(1)
    config = parse(["--ds_config", str(Path(__file__).parents[1] / "ds_configs" / "zero2.json")])
    join_ranks(config, timeout_minutes=30)
    base = random_base(num_layers=arguments.layers, vocabulary=arguments.vocabulary)
    engine_config = read_inputs(config).engine_config
    engine_config["zero_optimization"]["reduce_bucket_size"] = BUCKET_VALUES
    ways = {name: build(make, base, engine_config) for name, make in WAYS.items()}
    del base
    stream = steps(num_tokens=arguments.tokens, vocabulary=arguments.vocabulary)
    peaks = {name: peak_of(ways[name], stream) for name in (RIVAL, LOWRANK)}
    for name in (FOLD, LOOP):
        step(ways[name], next(stream))
    seconds = [timed_round(ways, stream, number=number) for number in range(arguments.repetitions)]
    results.publish(rows(seconds, peaks, arguments), parser=parser, arguments=arguments)
    for way in ways.values():
        engines.destroy(way.engine)
    ranks.leave()


def timed_round(ways: dict[str, Way], stream: Iterator[StepBatch], *, number: int) -> dict[str, float]:
    """Return the seconds of one step of every way that has its turn; none always follows the same one."""
    names = [name for name in ways if name != LOOP or number % ROUNDS_A_LOOP == 0]
    first = number % len(names)
    batch = next(stream)
    return {name: timed(ways[name], batch) for name in names[first:] + names[:first]}


def rows(seconds: list[dict[str, float]], peaks: dict[str, int], arguments: argparse.Namespace) -> Iterator[Row]:
    """Return what was measured as rows."""
    work = f"a training step of Gemma-3-270M's shapes on {arguments.tokens:,} tokens"
    for ours, rival, at_most in ((LOWRANK, RIVAL, 1.05), (FOLD, RIVAL, 1.0), (LOWRANK, LOOP, 0.6)):
        pairs = [(found[ours], found[rival]) for found in seconds if rival in found]
        yield Row(
            question=f"{work}, {ours}, against {rival}",
            ours=tuple(mine for mine, _ in pairs),
            rival=tuple(other for _, other in pairs),
            unit="s",
            at_most=at_most,
        )
    yield Row(
        question=f"peak memory of {work}, {LOWRANK}, against {RIVAL}",
        ours=(peaks[LOWRANK] / MIB,),
        rival=(peaks[RIVAL] / MIB,),
        unit="MiB",
        at_most=1.02,
    )


def random_base(*, num_layers: int, vocabulary: int) -> Any:
    """Return a base of Gemma-3-270M's shapes with random weights."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        num_hidden_layers=num_layers,
        **GEMMA_3_270M,
        sliding_window=512,
        use_cache=False,
    )
    return Gemma3ForCausalLM(config).to(torch.bfloat16)


def build(make: Callable[[Any], tuple[nn.Module, Any]], base: Any, engine_config: dict[str, Any]) -> Way:
    """Adapt a copy of the base and give it to DeepSpeed, counting every tensor."""
    live = LiveTensors()
    with live:
        model, tuner = make(copy.deepcopy(base))
        model.train()
        engine = engines.build_engine(
            model,  # type: ignore[arg-type]
            engine_config=engine_config,
            schedule=lambda optimizer: get_scheduler("constant", optimizer),
        )
    return Way(engine, tuner, live)


class Unrouted:
    """What the objective takes for a tuner where there are no routers."""

    def __init__(self) -> None:
        self.signal = BalanceSignal()

    def with_balance_loss(self, loss: Tensor, *, weight: float) -> Tensor:
        """Return the loss as it is."""
        return loss


def lora(base: Any) -> tuple[nn.Module, Any]:
    """Put PEFT's LoRA on a base, in the base's dtype."""
    config = LoraConfig(r=R, target_modules="all-linear")
    return get_peft_model(base, config, autocast_adapter_dtype=False), Unrouted()


def goat(base: Any, *, residual: str) -> tuple[nn.Module, Any]:
    """Put experts on a base, filled with anything: what a step costs does not depend on it."""
    config = GoatConfig(
        r=R, num_experts=NUM_EXPERTS, top_k=TOP_K, balance_coef=BALANCE_COEF, residual=residual, deferred=True
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for item in named_experts(model, "default"):
        for parameter in item.experts.parameters():
            nn.init.normal_(parameter, std=0.02)
        item.experts.ready = True
    return model, model.base_model


class ExpertLoop(nn.Module):
    """A linear layer whose experts run one after the other, each on the tokens that chose it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        out_features, in_features = linear_shape(base)
        rank, dtype = R // NUM_EXPERTS, base.weight.dtype
        self.router = nn.Linear(in_features, NUM_EXPERTS, bias=False, dtype=dtype)
        self.A = nn.ModuleList(nn.Linear(in_features, rank, bias=False, dtype=dtype) for _ in range(NUM_EXPERTS))
        self.B = nn.ModuleList(nn.Linear(rank, out_features, bias=False, dtype=dtype) for _ in range(NUM_EXPERTS))
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output plus the experts'."""
        y = self.base_layer(x)
        x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        probs_TE = functional.softmax(self.router(x_TI), dim=-1, dtype=torch.float32)
        top_TK, chosen_TK = probs_TE.topk(TOP_K, dim=-1)
        gates_TK = (top_TK / top_TK.sum(dim=-1, keepdim=True)).to(x.dtype)
        kept_TKE = functional.one_hot(chosen_TK, NUM_EXPERTS)
        added_TO = torch.zeros_like(y_TO)
        for expert, (a, b) in enumerate(zip(self.A, self.B, strict=True)):
            token, choice = torch.where(kept_TKE[:, :, expert])
            added_TO.index_add_(0, token, 2.0 * b(a(x_TI[token])) * gates_TK[token, choice, None])
        share_E = kept_TKE.sum(dim=1).float().mean(dim=0) / TOP_K
        self.balance = NUM_EXPERTS * (share_E * probs_TE.mean(dim=0)).sum()
        return (y_TO + added_TO).view_as(y)


class Loops:
    """What the objective takes for a tuner of ``ExpertLoop`` layers."""

    def __init__(self, layers: list[ExpertLoop]) -> None:
        self.layers, self.signal = layers, BalanceSignal()

    def with_balance_loss(self, loss: Tensor, *, weight: float) -> Tensor:
        """Add the sum over layers."""
        return loss + weight * BALANCE_COEF * torch.stack([layer.balance for layer in self.layers]).sum()


def loop(base: Any) -> tuple[nn.Module, Any]:
    """Put loops over experts on a base."""
    base.requires_grad_(False)
    layers = []
    for path, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and module is not base.get_output_embeddings():
            layers.append(ExpertLoop(module))
            base.set_submodule(path, layers[-1])
    return base, Loops(layers)


WAYS: dict[str, Callable[[Any], tuple[nn.Module, Any]]] = {
    RIVAL: lora,
    LOWRANK: lambda base: goat(base, residual="lowrank"),
    FOLD: lambda base: goat(base, residual="fold"),
    LOOP: loop,
}


def steps(*, num_tokens: int, vocabulary: int) -> Iterator[StepBatch]:
    """Return one full row of random documents after the other."""
    generator = torch.Generator().manual_seed(0)
    length = num_tokens // DOCUMENTS
    num_labels = round(LABEL_SHARE * length)

    def document() -> dict[str, Any]:
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        labels = [-100] * (length - num_labels) + ids[-num_labels:]
        return {"input_ids": ids, "labels": labels, "num_tokens": length, "num_labels": num_labels}

    dataset = Dataset.from_list([document() for _ in range(8 * DOCUMENTS)])
    packed = pack_dataset(dataset, max_length=num_tokens, packing=True)
    plan = BatchPlan(
        packs=packed.packs,
        num_labels=packed.num_labels,
        micro_batch_size=1,
        global_batch_size=1,
        world_size=1,
        seed=0,
    )
    return (batch for _, batch in batches(dataset, plan, world_rank=0).from_step(0))


def step(way: Way, batch: StepBatch) -> None:
    """Train on one batch, as the training loop does."""
    for micro_batch in batch.micro_batches:
        loss = objective(way.engine, way.tuner, micro_batch, step_batch=batch, num_micro_batches=1)
        way.engine.backward(loss.total)
        way.engine.step()


def timed(way: Way, batch: StepBatch) -> float:
    """Return the seconds of one step: those worked, whatever else the machine does."""
    began = time.process_time()
    step(way, batch)
    return time.process_time() - began


def peak_of(way: Way, stream: Iterator[StepBatch]) -> int:
    """Return the most bytes that all of a way's tensors take in its second step; the first makes optimizer states."""
    first, second = itertools.islice(stream, 2)
    with way.live:
        step(way, first)
        way.live.peak = way.live.held
        step(way, second)
    return way.live.peak


if __name__ == "__main__":
    main()
