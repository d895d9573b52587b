"""The training loop, on the DeepSpeed engine."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, get_scheduler

from goat_ds.data import BatchPlan, Packed, batches, eval_batches, pack_dataset, prepare
from goat_ds.errors import ConfigError, TrainingError
from goat_ds.train.config import TrainConfig
from goat_ds.train.metrics import Metrics
from goat_ds.train.objective import label_loss_sum, objective
from goat_ds.train.preflight import eval_sources, filled_ds_config, load_tokenizer, model_name, train_sources
from goat_ds.zero import checkpoint, ranks
from goat_ds.zero import engine as engines
from goat_ds.zero.decompose import seed_of, start_adapter
from goat_ds.zero.ds_config import Precision
from goat_ds.zero.quantize import measure, recipe_of
from goat_ds.zero.ranks import Ranks


class Tokens(NamedTuple):
    """Tokenised and packed data."""

    dataset: Dataset
    packed: Packed


def train(config: TrainConfig, processes: Ranks) -> Path:
    """Train as the settings say. A collective; the settings must have passed ``preflight``.

    Returns:
        The folder of the last checkpoint.

    Raises:
        TrainingError: the run stopped itself; the last checkpoint is whole.
    """
    torch.manual_seed(seed_of(config.seed, f"dropout of rank {processes.world_rank}"))
    tokens, heldout = load_all_tokens(config, processes)
    plan = batch_plan(config, processes, tokens.packed)
    num_steps = config.max_steps or math.ceil(config.num_epochs * plan.steps_per_epoch)
    engine = build(config, processes, num_steps=num_steps)
    tuner: Any = engines.peft_model(engine).base_model
    metrics = Metrics(config.folder, processes=processes, num_steps=num_steps, monitor=engine.monitor)
    saved = None

    for step, batch in batches(tokens.dataset, plan, world_rank=processes.world_rank).from_step(0, until=num_steps):
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
        stop_unless_finite(step, loss=totals.loss, grad_norm=grad_norm, precision=config.precision, saved=saved)
        last = step == num_steps
        if due(step, config.log_steps, last):
            metrics.record(
                step, totals, lr=lr, grad_norm=grad_norm, routers_too=due(step, config.router_log_steps, last)
            )
        if heldout is not None and due(step, config.eval_steps, last):
            metrics.record_eval(step, eval_loss=evaluate(engine, heldout, config, processes))
        if due(step, config.save_steps, last):
            saved = checkpoint.save_checkpoint(engine, output_dir=config.folder, step=step, processes=processes)
        metrics.step_done()

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
    return engines.build_engine(
        model,
        engine_config=engine_config,
        schedule=lambda optimizer: get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps
        ),
    )


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


def stop_unless_finite(step: int, *, loss: float, grad_norm: float, precision: Precision, saved: Path | None) -> None:
    """Stop before weights that are no numbers can be saved; every rank sees the same values.

    Raises:
        TrainingError: the loss is not finite, or the gradient is not and no loss scaler has skipped the step.
    """
    wrong = [f"the loss of step {step} is {loss}"] if not math.isfinite(loss) else []
    if precision is not Precision.FP16 and not math.isfinite(grad_norm):
        wrong.append(f"the gradient norm of step {step} is {grad_norm}")
    if wrong:
        kept = f"the last checkpoint is {saved}" if saved else "no checkpoint was due before it"
        raise TrainingError(f"{' and '.join(wrong)}; {kept}")


def due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens ``every`` so many steps (0: never), and at the end, happens now."""
    return last or (every > 0 and step % every == 0)


def say(processes: Ranks, *lines: str) -> None:
    """Print on the first rank, beside its progress bars."""
    if processes.is_first:
        for line in lines:
            tqdm.write(line)
