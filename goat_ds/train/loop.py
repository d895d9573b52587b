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
    StepBatch,
    batches,
    content_digest,
    eval_batches,
    label_loss_sum,
    load_tokenizer,
    pack_dataset,
    prepare,
)
from goat_ds.data.sample import SAMPLE_NAME, save_sample, take_sample
from goat_ds.errors import ConfigError, Interrupted, SaveError, told_everywhere
from goat_ds.train.config import OnSaveError, TrainConfig
from goat_ds.train.health import Health, last_checkpoint
from goat_ds.train.metrics import Metrics, StepTotals
from goat_ds.train.objective import objective
from goat_ds.train.preflight import eval_sources, filled_ds_config, model_name, train_sources
from goat_ds.train.resume import Resumption, set_damaged_aside, settings_of
from goat_ds.train.signals import Signals
from goat_ds.tuner.static import static_config
from goat_ds.zero import checkpoint as checkpoints
from goat_ds.zero import ds_config, partition, ranks
from goat_ds.zero import engine as engines
from goat_ds.zero.checkpoint import Checkpoint, stored_experts
from goat_ds.zero.decompose import seed_of, start_adapter
from goat_ds.zero.finish import check_enough, finish_densely, tokens_to_fit, train_in_units_of_a
from goat_ds.zero.quantize import measure, recipe_of
from goat_ds.zero.ranks import Ranks


class Tokens(NamedTuple):
    """Tokenised and packed data."""

    dataset: Dataset
    packed: Packed


def train(
    resumption: Resumption,
    processes: Ranks,
    signals: Signals,
    *,
    step_done: Callable[[int], None] = lambda step: None,
) -> Path:
    """Train as the settings say. A collective; the settings must have passed ``preflight``.

    Args:
        resumption: The settings, and where the run begins.
        processes: Who this process is.
        signals: What may end it.
        step_done: Called with every step that is done.

    Returns:
        The folder of the last checkpoint.

    Raises:
        TrainingError: the run stopped itself; the last checkpoint is whole.
    """
    config, checkpoint = resumption.config, resumption.checkpoint
    tokens, heldout = load_all_tokens(config, processes)
    write_sample = sample_writer(config, tokens, heldout) if processes.is_first else None
    plan = batch_plan(config, processes, tokens.packed, global_batch_size=resumption.global_batch_size)
    num_steps = config.max_steps or math.ceil(config.num_epochs * plan.steps_per_epoch)
    finish_after = config.finish_after(num_steps)
    memory = RunMemory(resumption, digest_on_first(tokens.dataset, processes), processes)
    done, saved = memory.steps_done, checkpoint and checkpoint.folder
    if checkpoint:
        check_phase(config, checkpoint, finish_after)
    if saved and done >= num_steps:
        say(processes, f"resume: all {num_steps} steps are done, nothing is left to do")
        return saved
    engine = build(config, processes, num_steps=num_steps, checkpoint=checkpoint)
    is_to_finish = finish_after is not None and done <= finish_after
    if finish_after and is_to_finish:
        check_enough(engines.peft_model(engine), num_tokens_until(finish_after, plan, tokens.dataset))
    checkpoints.check_room(engine, config.folder, processes)
    set_damaged_aside(resumption.damaged, processes)
    metrics = Metrics(
        config.folder,
        processes=processes,
        num_steps=num_steps,
        monitor=engine.monitor,
        done=done,
        tokens=memory.tokens_done,
    )
    health = Health(
        tokens.dataset,
        processes=processes,
        precision=config.precision,
        suspects=ds_config.untried_zero(filled_ds_config(config, processes)),
    )
    stream = batches(tokens.dataset, plan, world_rank=processes.world_rank)
    if checkpoint and is_to_finish and done == finish_after:
        engine = finish(engine, stream, done, heldout, config, processes, metrics, num_steps=num_steps)
    metrics.eval_loss = None

    signals.saves = True
    for step, batch in stream.from_step(done, until=num_steps):
        step += 1
        # A function of seed, step and rank: it needs no place in a checkpoint, and does not depend on what else drew.
        torch.manual_seed(seed_of(config.seed, f"dropout of rank {processes.world_rank} in step {step}"))
        totals, lr, grad_norm = train_step(engine, batch, config, processes, metrics)
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
        # A finish takes the routers away, and what was routed may be wanted, and be compared.
        if heldout is not None and (due(step, config.eval_steps, last) or step == finish_after):
            metrics.record_eval(step, eval_loss=evaluate(engine, heldout, config, processes))
        signal = signals.asked()
        if due(step, config.save_steps, last) or step == finish_after or signal:
            saved = save(
                engine,
                step,
                config,
                processes,
                run=memory.after(metrics),
                write_sample=write_sample,
                earlier=saved,
                must_succeed=last or signal is not None,
            )
        if signal and not last:
            raise Interrupted(f"{signal}: stopped after step {step} and saved {saved}; --resume auto goes on from it")
        if step == finish_after:
            engine = finish(engine, stream, step, heldout, config, processes, metrics, num_steps=num_steps)
        metrics.step_done()
        step_done(step)

    metrics.close()
    engines.destroy(engine)
    assert saved is not None
    return saved


class Stepped(NamedTuple):
    """What a step did: its totals over all ranks, its learning rate and the norm of its gradient."""

    totals: StepTotals
    lr: float
    grad_norm: float


def train_step(engine: Any, batch: StepBatch, config: TrainConfig, processes: Ranks, metrics: Metrics) -> Stepped:
    """Forward and backward of every micro-batch, and the optimizer's step. A collective."""
    tuner: Any = engines.peft_model(engine).base_model
    num_micro_batches = config.grad_accum_steps * processes.world_size
    for micro_batch in batch.micro_batches:
        micro_batch = micro_batch.to(engine.device)
        loss = objective(engine, tuner, micro_batch, step_batch=batch, num_micro_batches=num_micro_batches)
        metrics.add(loss, micro_batch, tuner.signal.loads)
        engine.backward(loss.total)
        lr = engine.get_lr()[0]
        engine.step()
    totals = metrics.finish_step(num_label_tokens=batch.num_label_tokens)
    return Stepped(totals, lr, float(engine.get_global_grad_norm() or 0.0))


class RunMemory:
    """What a run writes into its checkpoints to find itself again, and what it found there."""

    def __init__(self, resumption: Resumption, data_digest: str, processes: Ranks) -> None:
        checkpoint = resumption.checkpoint
        found: dict[str, Any] = checkpoint.run if checkpoint else {"tokens": 0, "data_sha256": data_digest}
        self.steps_done = checkpoint.step if checkpoint else 0
        self.tokens_done = int(found["tokens"])
        self._fixed = {
            # As given: on another number of ranks the accumulation is found anew.
            "settings": settings_of(resumption.given),
            "global_batch_size": resumption.global_batch_size,
            "data_sha256": data_digest,
        }
        if found["data_sha256"] != data_digest:
            allow_or_refuse(
                resumption.config,
                processes,
                f"data ({', '.join(train_sources(resumption.config))}) is not what the run was trained on before; give "
                "the same records in the same order",
            )

    def after(self, metrics: Metrics) -> dict[str, Any]:
        """Give what the checkpoint of the running step holds of the run."""
        return self._fixed | {"tokens": metrics.tokens, "eval_loss": metrics.eval_loss}


def allow_or_refuse(config: TrainConfig, processes: Ranks, change: str) -> None:
    """Say what has changed since the run began, which every rank sees alike, or refuse it.

    Raises:
        ConfigError: ``allow_changed`` is not given.
    """
    if not config.allow_changed:
        raise told_everywhere(f"{change}, or give --allow_changed")
    say(processes, f"resume: changed: {change}")


def check_phase(config: TrainConfig, checkpoint: Checkpoint, finish_after: int | None) -> None:
    """Hold that a checkpoint is dense or routed as the settings have it at its step.

    Raises:
        ConfigError: it is not, because ``dense_finish`` or the length of the run was changed.
    """
    is_dense = finish_after is not None and checkpoint.step > finish_after
    if is_dense == checkpoint.is_routed:
        found, wanted = ("routed", "dense") if is_dense else ("dense", "routed")
        raise told_everywhere(
            f"dense_finish ({config.dense_finish}) makes the run {wanted} after step {checkpoint.step}, and "
            f"{checkpoint.folder} is {found}; finish after the step where it was finished, or after the checkpoint's"
        )


def save(
    engine: Any,
    step: int,
    config: TrainConfig,
    processes: Ranks,
    *,
    run: dict[str, Any],
    write_sample: Callable[[Path], None] | None,
    earlier: Path | None,
    must_succeed: bool,
) -> Path | None:
    """Save a checkpoint, and delete those that are too many; give the newest that is there. A collective.

    Raises:
        SaveError: it was not written, and the run may not go on without.
    """
    try:
        saved = checkpoints.save_checkpoint(
            engine, output_dir=config.folder, step=step, processes=processes, run=run, write_beside=write_sample
        )
    except SaveError as error:
        told = f"{error}; {last_checkpoint(earlier)}"
        if must_succeed or config.on_save_error is OnSaveError.STOP:
            raise SaveError(f"{told}; make room there, then --resume auto goes on from it") from error
        say(processes, f"warning: {told}; going on without (on_save_error continue)")
        return earlier
    remove_surplus(config, processes)
    return saved


def digest_on_first(dataset: Dataset, processes: Ranks) -> str:
    """Give the content of the training data; all nodes have been seen to have the same. A collective."""
    return str(ranks.from_first(content_digest(dataset) if processes.is_first else None))


def remove_surplus(config: TrainConfig, processes: Ranks) -> None:
    """Delete the checkpoints that save_total_limit does not keep.

    Kept are the newest, the one with the best eval_loss, and the last routed one before a dense finish.
    """
    if config.save_total_limit and processes.is_first:
        try:
            checkpoints.keep_newest(config.folder, config.save_total_limit)
        except OSError as error:
            # The new one is there: what cannot be deleted is no reason to end a run.
            say(processes, f"warning: save_total_limit ({config.save_total_limit}) could not delete: {error}")


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


def batch_plan(config: TrainConfig, processes: Ranks, packed: Packed, *, global_batch_size: int) -> BatchPlan:
    """Say which packs form which global batch."""
    return BatchPlan(
        packs=packed.packs,
        num_labels=packed.num_labels,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=global_batch_size,
        world_size=processes.world_size,
        seed=config.seed,
    )


def build(config: TrainConfig, processes: Ranks, *, num_steps: int, checkpoint: Checkpoint | None = None) -> Any:
    """Load the base, start its experts or go on from a checkpoint's, give both to DeepSpeed. A collective."""
    warmup_steps = config.warmup_of(num_steps)
    if warmup_steps >= num_steps:
        raise told_everywhere(f"warmup_steps ({warmup_steps}) must be below the steps of the run ({num_steps})")
    engine_config = filled_ds_config(config, processes)
    base = engines.load_base(
        model_name(config),
        precision=config.precision,
        attention=engines.choose_attention(config.attn, precision=config.precision),
        engine_config=engine_config,
        quantization=config.quantization(),
        compute_precision=config.bnb_4bit_compute_dtype,
    )
    is_static = checkpoint is not None and not checkpoint.is_routed
    goat = static_config(config.goat()) if is_static else config.goat()
    model = engines.attach_experts(base, goat, engine_config=engine_config)
    report = start_adapter(
        model,
        engines.ADAPTER_NAME,
        processes=processes,
        seed=config.seed,
        cache=Path(config.svd_cache),
        recipe=recipe_of(config.quantization(), engine_config=engine_config),
        stored=stored_experts(checkpoint, processes) if checkpoint else None,
    )
    origin = f"from {checkpoint.folder}" if checkpoint else f"{report.num_cached} from the cache"
    say(processes, f"GOAT start: {report.num_layers} layers, {origin}, {report.seconds:.1f} s")
    if checkpoint:
        check_same_base(model, config, processes, checkpoint)
    if (held := measure(model)).num_layers:
        say(processes, str(held))
    engines.enable_checkpointing(model, config.gradient_checkpointing)
    schedule = schedule_of(config, num_steps=num_steps)
    if is_static:
        train_in_units_of_a(model)
    engine = engines.build_engine(model, engine_config=engine_config, schedule=schedule)
    if checkpoint:
        checkpoints.restore(engine, checkpoint, processes)
    return engine


def check_same_base(model: Any, config: TrainConfig, processes: Ranks, checkpoint: Checkpoint) -> None:
    """Hold that a run goes on with the base it began with; every rank sees the same.

    Raises:
        ConfigError: the weights are others; where there is no fingerprint, because they came in 4 bits, the name is.
    """
    found = model.peft_config[engines.ADAPTER_NAME].base_fingerprint
    expected, name = checkpoint.adapter.get("base_fingerprint"), checkpoint.run["settings"]["model"]
    if expected and found != expected:
        change = f"model ({model_name(config)}) has other weights than the base that the run began with; give that base"
        allow_or_refuse(config, processes, change)
    elif not expected and config.model != name:
        change = (
            f"model ({config.model}) was {name} when the run began; a base that came in 4 bits is known by its name"
        )
        allow_or_refuse(config, processes, change)


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
                partition.end_without_backward(self._engine)

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
        partition.end_without_backward(engine)
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
