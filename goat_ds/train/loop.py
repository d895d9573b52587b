"""The training loop, on the DeepSpeed engine."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, get_scheduler

from goat_ds.data import (
    Batches,
    BatchPlan,
    Packed,
    batches,
    eval_batches,
    label_loss_sum,
    load_tokenizer,
    pack_dataset,
    prepare,
)
from goat_ds.data.sample import SAMPLE_NAME, save_sample, take_sample
from goat_ds.errors import ConfigError
from goat_ds.train.config import TrainConfig
from goat_ds.train.health import Health
from goat_ds.train.metrics import Metrics
from goat_ds.train.objective import objective
from goat_ds.train.preflight import eval_sources, filled_ds_config, model_name, train_sources
from goat_ds.zero import checkpoint, ds_config, ranks
from goat_ds.zero import engine as engines
from goat_ds.zero.decompose import seed_of, start_adapter
from goat_ds.zero.finish import check_enough, finish_densely, tokens_to_fit
from goat_ds.zero.quantize import measure, recipe_of
from goat_ds.zero.ranks import Ranks


class Tokens(NamedTuple):
    """Tokenised and packed data."""

    dataset: Dataset
    packed: Packed


def train(config: TrainConfig, processes: Ranks, *, step_done: Callable[[int], None] = lambda step: None) -> Path:
    """Train as the settings say. A collective; the settings must have passed ``preflight``.

    Args:
        config: The settings.
        processes: Who this process is.
        step_done: Called with every step that is done.

    Returns:
        The folder of the last checkpoint.

    Raises:
        TrainingError: the run stopped itself; the last checkpoint is whole.
    """
    torch.manual_seed(seed_of(config.seed, f"dropout of rank {processes.world_rank}"))
    tokens, heldout = load_all_tokens(config, processes)
    write_sample = sample_writer(config, tokens, heldout) if processes.is_first else None
    plan = batch_plan(config, processes, tokens.packed)
    num_steps = config.max_steps or math.ceil(config.num_epochs * plan.steps_per_epoch)
    finish_after = config.finish_after(num_steps)
    engine = build(config, processes, num_steps=num_steps)
    tuner: Any = engines.peft_model(engine).base_model
    if finish_after:
        check_enough(engines.peft_model(engine), num_tokens_until(finish_after, plan, tokens.dataset))
    metrics = Metrics(config.folder, processes=processes, num_steps=num_steps, monitor=engine.monitor)
    health = Health(
        tokens.dataset,
        processes=processes,
        precision=config.precision,
        suspects=ds_config.untried_zero(filled_ds_config(config, processes)),
    )
    saved = None

    stream = batches(tokens.dataset, plan, world_rank=processes.world_rank)
    for step, batch in stream.from_step(0, until=num_steps):
        step += 1
        for micro_batch in batch.micro_batches:
            micro_batch = micro_batch.to(engine.device)
            loss = objective(
                engine,
                tuner,
                micro_batch,
                step_batch=batch,
                num_micro_batches=config.grad_accum_steps * processes.world_size,
            )
            metrics.add(loss, micro_batch, tuner.signal.loads)
            engine.backward(loss.total)
            lr = engine.get_lr()[0]
            engine.step()
        totals = metrics.finish_step(num_label_tokens=batch.num_label_tokens)
        grad_norm = float(engine.get_global_grad_norm() or 0.0)
        health.check(
            step,
            loss=totals.loss,
            grad_norm=grad_norm,
            applied=engine.was_step_applied(),
            record_ids=batch.record_ids,
            saved=saved,
        )
        last = step == num_steps
        if due(step, config.log_steps, last):
            metrics.record(
                step, totals, lr=lr, grad_norm=grad_norm, routers_too=due(step, config.router_log_steps, last)
            )
        if heldout is not None and due(step, config.eval_steps, last):
            metrics.record_eval(step, eval_loss=evaluate(engine, heldout, config, processes))
        # A finish takes the routers away, and what was routed may be wanted.
        if due(step, config.save_steps, last) or step == finish_after:
            saved = checkpoint.save_checkpoint(
                engine, output_dir=config.folder, step=step, processes=processes, write_beside=write_sample
            )
        if step == finish_after:
            engine = finish(engine, stream, step, heldout, config, processes, metrics, num_steps=num_steps)
        metrics.step_done()
        step_done(step)

    metrics.close()
    engines.destroy(engine)
    assert saved is not None
    return saved


def load_all_tokens(config: TrainConfig, processes: Ranks) -> tuple[Tokens, Tokens | None]:
    """Give the training data and the held-out data, if there is any. A collective."""
    tokenizer = load_tokenizer(model_name(config))
    tokens = load_tokens(config, processes, tokenizer, train_sources(config), split=config.split)
    if not eval_sources(config):
        return tokens, None
    return tokens, load_tokens(config, processes, tokenizer, eval_sources(config), split=config.eval_split)


def load_tokens(
    config: TrainConfig,
    processes: Ranks,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    *,
    split: str,
) -> Tokens:
    """Tokenise once a node, read the cache everywhere, pack. A collective."""
    tokenised = ranks.first_on_node_then_others(
        processes,
        lambda: prepare(
            sources,
            tokenizer,
            max_length=config.max_length,
            cache_dir=Path(config.token_cache),
            data_format=config.data_format,
            split=split,
        ),
    )
    packed = pack_dataset(tokenised.dataset, max_length=config.max_length, packing=config.packing)
    if not ranks.same_everywhere(f"{tokenised.report} {packed.num_labels}"):
        raise ConfigError(f"data ({', '.join(sources)}) is not the same on every node; copy the same files to all")
    say(processes, f"data: {', '.join(sources)}", *tokenised.report.lines(), str(packed.report))
    return Tokens(tokenised.dataset, packed)


def sample_writer(config: TrainConfig, tokens: Tokens, heldout: Tokens | None) -> Callable[[Path], None] | None:
    """Choose the sample of the data that every checkpoint keeps; give what writes it, or None where none is kept."""
    if not config.calibration_sample_tokens:
        return None
    sample = take_sample(
        tokens.dataset,
        heldout and heldout.dataset,
        num_tokens=config.calibration_sample_tokens,
        max_length=config.max_length,
        seed=config.seed,
    )
    return lambda folder: save_sample(sample, folder / SAMPLE_NAME)


def batch_plan(config: TrainConfig, processes: Ranks, packed: Packed) -> BatchPlan:
    """Say which packs form which global batch."""
    return BatchPlan(
        packs=packed.packs,
        num_labels=packed.num_labels,
        micro_batch_size=config.micro_batch_size,
        grad_accum_steps=config.grad_accum_steps,
        world_size=processes.world_size,
        seed=config.seed,
    )


def build(config: TrainConfig, processes: Ranks, *, num_steps: int) -> Any:
    """Load the base, start its experts, give both to DeepSpeed. A collective."""
    warmup_steps = config.warmup_of(num_steps)
    if warmup_steps >= num_steps:
        raise ConfigError(f"warmup_steps ({warmup_steps}) must be below the steps of the run ({num_steps})")
    engine_config = filled_ds_config(config, processes)
    base = engines.load_base(
        model_name(config),
        precision=config.precision,
        attention=engines.choose_attention(config.attn, precision=config.precision),
        engine_config=engine_config,
        quantization=config.quantization(),
        compute_precision=config.bnb_4bit_compute_dtype,
    )
    model = engines.attach_experts(base, config.goat(), engine_config=engine_config)
    report = start_adapter(
        model,
        engines.ADAPTER_NAME,
        processes=processes,
        seed=config.seed,
        cache=Path(config.svd_cache),
        recipe=recipe_of(config.quantization(), engine_config=engine_config),
    )
    say(
        processes,
        f"GOAT start: {report.num_layers} layers, {report.num_cached} from the cache, {report.seconds:.1f} s",
    )
    if (held := measure(model)).num_layers:
        say(processes, str(held))
    engines.enable_checkpointing(model, config.gradient_checkpointing)
    schedule = schedule_of(config, num_steps=num_steps)
    return engines.build_engine(model, engine_config=engine_config, schedule=schedule)


def schedule_of(config: TrainConfig, *, num_steps: int) -> Callable[[Optimizer], LRScheduler]:
    """Give what makes the schedule of the learning rate for an optimizer."""
    return lambda optimizer: get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.warmup_of(num_steps),
        num_training_steps=num_steps,
    )


def finish(
    engine: Any,
    stream: Batches,
    step: int,
    heldout: Tokens | None,
    config: TrainConfig,
    processes: Ranks,
    metrics: Metrics,
    *,
    num_steps: int,
) -> Any:
    """Make the experts dense after a step, and give the engine that trains them on. A collective."""
    if heldout is not None and not due(step, config.eval_steps, False):
        metrics.record_eval(step, eval_loss=evaluate(engine, heldout, config, processes))
    tokens = LatestTokens(engine, stream, step, num_steps=latest_steps(engine, step, metrics.tokens))
    done = finish_densely(
        engine,
        run=tokens.run,
        counts=tokens.counts,
        engine_config=filled_ds_config(config, processes),
        schedule=schedule_of(config, num_steps=num_steps),
        processes=processes,
    )
    say(processes, f"dense finish after step {step}: {done}")
    metrics.record_finish(step, **done.numbers())
    if heldout is not None:
        metrics.record_eval(step, eval_loss=evaluate(done.engine, heldout, config, processes))
    return done.engine


class LatestTokens:
    """The tokens of the latest steps, to run through the model once more."""

    def __init__(self, engine: Any, stream: Batches, step: int, *, num_steps: int) -> None:
        self._engine, self._stream = engine, stream
        self._first, self._until = step - num_steps, step
        self._counts = True

    def run(self) -> None:
        """Run this rank's part of them. A collective under ZeRO-3."""
        for _, batch in self._stream.from_step(self._first, until=self._until):
            for micro_batch in batch.micro_batches:
                self._counts = not micro_batch.is_filler
                label_loss_sum(self._engine, micro_batch.to(self._engine.device))

    def counts(self) -> bool:
        """Whether what runs now is data, and no filler."""
        return self._counts


def num_tokens_until(step: int, plan: BatchPlan, dataset: Dataset) -> int:
    """Count the tokens of all ranks in the steps before one."""
    counts = dataset.with_format("numpy", columns=["num_tokens"])[:]["num_tokens"]
    packs = (plan.packs[pack] for batch in plan.from_step(0, until=step) for pack in batch.pack_ids)
    return sum(int(counts[list(pack)].sum()) for pack in packs)


def latest_steps(engine: Any, step: int, num_tokens: int) -> int:
    """Give how many of the ``step`` steps so far, which held ``num_tokens``, a dense finish looks back at."""
    wanted = tokens_to_fit(engines.peft_model(engine))
    return min(step, math.ceil(wanted * step / num_tokens))


@torch.no_grad()
def evaluate(engine: Any, heldout: Tokens, config: TrainConfig, processes: Ranks) -> float:
    """Give the mean cross-entropy over the label tokens of the held-out data. A collective."""
    engine.eval()
    lm_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    for micro_batch in eval_batches(
        heldout.dataset,
        heldout.packed.packs,
        micro_batch_size=config.micro_batch_size,
        world_rank=processes.world_rank,
        world_size=processes.world_size,
    ):
        lm_sum += label_loss_sum(engine, micro_batch.to(engine.device))
    engine.train()
    return float(ranks.sum_over_ranks(lm_sum)) / sum(heldout.packed.num_labels)


def due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens ``every`` so many steps (0: never), and at the end, happens now."""
    return last or (every > 0 and step % every == 0)


def say(processes: Ranks, *lines: str) -> None:
    """Print on the first rank, beside its progress bars."""
    if processes.is_first:
        for line in lines:
            tqdm.write(line)
