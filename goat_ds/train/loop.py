"""The training loop, on the DeepSpeed engine."""

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from goat_ds.data import BatchPlan, StepBatch, batches, eval_batches, label_loss_sum
from goat_ds.distributed import ranks
from goat_ds.errors import Interrupted
from goat_ds.train.build import build
from goat_ds.train.data import Tokens, batch_plan, digest_on_first, load_all_tokens, num_tokens_until, writer_beside
from goat_ds.train.finishing import finish
from goat_ds.train.health import Health
from goat_ds.train.inputs import Inputs
from goat_ds.train.metrics import Metrics, StepTotals
from goat_ds.train.objective import objective
from goat_ds.train.resume import Resumption, check_phase, set_damaged_aside
from goat_ds.train.saving import RunMemory, save
from goat_ds.train.signals import Signals
from goat_ds.zero import checkpoint as checkpoints
from goat_ds.zero import ds_config, partition
from goat_ds.zero import engine as engines
from goat_ds.zero.adapters import goat_of
from goat_ds.zero.decompose import seed_of
from goat_ds.zero.dense_finish import check_enough

logger = logging.getLogger(__name__)


def train(
    resumption: Resumption,
    inputs: Inputs,
    signals: Signals,
    *,
    step_done: Callable[[int], None] = lambda step: None,
) -> Path:
    """Train as the settings say. A collective; the settings must have passed ``preflight``.

    Args:
        resumption: Where the run begins.
        inputs: The settings and what they point at.
        signals: What may end it.
        step_done: Called with every step that is done.

    Returns:
        The folder of the last checkpoint.

    Raises:
        TrainingError: the run stopped itself; the last checkpoint is whole.
    """
    course = course_of(resumption, inputs)
    checkpoint, done = resumption.checkpoint, course.memory.steps_done
    if checkpoint and done >= course.num_steps:
        logger.info(f"resume: all {course.num_steps} steps are done, nothing is left to do")
        return checkpoint.folder
    run = Training(resumption, inputs, course)
    run.finish_where_it_was_due(checkpoint is not None)
    signals.saves = True
    for step, batch in run.steps():
        stepped = run.train_step(step, batch)
        run.watch(step, stepped, batch)
        run.evaluate_if_due(step)
        signal = signals.asked()
        run.save_if_due(step, signal)
        if signal and step < course.num_steps:
            raise Interrupted(
                f"{signal}: stopped after step {step} and saved {run.saved}; --resume auto goes on from it"
            )
        run.finish_if_due(step)
        run.metrics.step_done()
        step_done(step)
    return run.close()


class Course(NamedTuple):
    """What a run will do, as it is known before weights are read."""

    tokens: Tokens
    heldout: Tokens | None
    plan: BatchPlan
    num_steps: int
    finish_after: int | None
    """The step after which experts become dense; None: they never do."""
    memory: RunMemory
    write_beside: Callable[[Path], None] | None
    """Writes what checkpoints keep beside what was trained, on the rank that does so."""


def course_of(resumption: Resumption, inputs: Inputs) -> Course:
    """Read and pack the data, and check that a checkpoint is of the run that the settings make. A collective."""
    config = inputs.config
    tokens, heldout = load_all_tokens(inputs)
    plan = batch_plan(config, tokens.packed, global_batch_size=resumption.global_batch_size)
    num_steps = config.max_steps or math.ceil(config.num_epochs * plan.steps_per_epoch)
    config.check_rho_warmup(num_steps)
    course = Course(
        tokens,
        heldout,
        plan,
        num_steps,
        config.finish_after(num_steps),
        RunMemory(resumption, digest_on_first(tokens.dataset)),
        writer_beside(inputs, tokens, heldout) if ranks.is_first() else None,
    )
    if resumption.checkpoint:
        check_phase(config, resumption.checkpoint, course.finish_after)
    return course


class Stepped(NamedTuple):
    """What a step did: its totals over all ranks, its learning rate and the norm of its gradient."""

    totals: StepTotals
    lr: float
    grad_norm: float


class Training:
    """A run with its weights read. Every method is a collective."""

    def __init__(self, resumption: Resumption, inputs: Inputs, course: Course) -> None:
        config, checkpoint = inputs.config, resumption.checkpoint
        self.inputs, self.config, self.course = inputs, config, course
        self.done = course.memory.steps_done
        self.saved = checkpoint and checkpoint.folder
        """The last checkpoint."""
        self.engine, self.base_fingerprint = build(inputs, num_steps=course.num_steps, checkpoint=checkpoint)
        if course.finish_after and self.done <= course.finish_after:
            num_tokens = num_tokens_until(course.finish_after, course.plan, course.tokens.dataset)
            check_enough(engines.peft_model(self.engine), num_tokens)
        checkpoints.check_room(self.engine, config.folder)
        set_damaged_aside(resumption.damaged)
        # Not before: a run that fails until here leaves its folder empty, so that it can be mended and started again.
        ranks.agree(inputs.keep_ds_config)
        self.metrics = Metrics(
            config.folder,
            num_steps=course.num_steps,
            monitor=self.engine.monitor,
            done=self.done,
            tokens=course.memory.tokens_done,
        )
        self.health = Health(
            course.tokens.dataset,
            precision=config.precision,
            suspects=ds_config.untried_zero(inputs.engine_config),
        )
        self.batches = batches(course.tokens.dataset, course.plan, world_rank=ranks.get_rank())

    def steps(self) -> Iterator[tuple[int, StepBatch]]:
        """Yield what is left of the run: the step, counted from 1, and its batch."""
        for step, batch in self.batches.from_step(self.done, until=self.course.num_steps):
            yield step + 1, batch

    def train_step(self, step: int, batch: StepBatch) -> Stepped:
        """Forward and backward of every micro-batch, and the optimizer's step."""
        # A function of seed, step and rank: it needs no place in a checkpoint, and does not depend on what else drew.
        torch.manual_seed(seed_of(self.config.seed, f"dropout of rank {ranks.get_rank()} in step {step}"))
        engine: Any = self.engine
        tuner = goat_of(engine.module)
        if tuner is not None:
            tuner.set_step(step - 1)
        num_micro_batches = self.config.grad_accum_steps * ranks.get_world_size()
        for micro_batch in batch.micro_batches:
            micro_batch = micro_batch.to(engine.device)
            loss = objective(engine, tuner, micro_batch, step_batch=batch, num_micro_batches=num_micro_batches)
            self.metrics.add(loss, micro_batch, tuner.signal.loads if tuner else {})
            engine.backward(loss.total)
            lr = engine.get_lr()[0]
            engine.step()
        totals = self.metrics.finish_step(num_label_tokens=batch.num_label_tokens)
        return Stepped(totals, lr, float(engine.get_global_grad_norm() or 0.0))

    def watch(self, step: int, stepped: Stepped, batch: StepBatch) -> None:
        """Stop a run whose numbers have gone wrong, and write those that are due."""
        totals, lr, grad_norm = stepped
        self.health.check(
            step,
            loss=totals.loss,
            grad_norm=grad_norm,
            applied=self.engine.was_step_applied(),
            record_ids=batch.record_ids,
            saved=self.saved,
        )
        if self._is_due(step, self.config.log_steps):
            routers_too = self._is_due(step, self.config.router_log_steps)
            self.metrics.record(step, totals, lr=lr, grad_norm=grad_norm, routers_too=routers_too)

    def evaluate_if_due(self, step: int) -> None:
        """Judge the model on the held-out data, also just before its experts become dense, to be compared."""
        if self._is_due(step, self.config.eval_steps) or step == self.course.finish_after:
            self._evaluate(step)

    def save_if_due(self, step: int, signal: str | None) -> None:
        """Save a checkpoint, also of the routed experts just before they become dense, and where a signal asks."""
        if self._is_due(step, self.config.save_steps) or step == self.course.finish_after or signal:
            self.saved = save(
                self.engine,
                step,
                self.config,
                run=self.course.memory.after(self.metrics),
                base_fingerprint=self.base_fingerprint,
                write_beside=self.course.write_beside,
                earlier=self.saved,
                must_succeed=step == self.course.num_steps or signal is not None,
            )

    def finish_where_it_was_due(self, is_resumed: bool) -> None:
        """Make the experts dense where the run goes on from the checkpoint just before that."""
        if is_resumed and self.done == self.course.finish_after:
            self.finish_if_due(self.done)
        self.metrics.eval_loss = None

    def finish_if_due(self, step: int) -> None:
        """Make the experts dense, and judge what that costs."""
        if step == self.course.finish_after:
            self.engine = finish(
                self.engine,
                self.batches,
                step,
                self.inputs,
                self.metrics,
                num_steps=self.course.num_steps,
            )
            self._evaluate(step)

    def close(self) -> Path:
        """Close what is open; return the folder of the last checkpoint."""
        self.metrics.close()
        engines.destroy(self.engine)
        assert self.saved is not None
        return self.saved

    def _evaluate(self, step: int) -> None:
        if self.course.heldout is not None:
            eval_loss = evaluate(self.engine, self.course.heldout, self.config.micro_batch_size)
            self.metrics.record_eval(step, eval_loss=eval_loss)

    def _is_due(self, step: int, every: int) -> bool:
        """Whether something that happens ``every`` so many steps (0: never), and at the end, happens now."""
        return step == self.course.num_steps or (every > 0 and step % every == 0)


@torch.no_grad()
def evaluate(engine: Any, heldout: Tokens, micro_batch_size: int) -> float:
    """Return the mean cross-entropy over the label tokens of the held-out data. A collective."""
    engine.eval()
    lm_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    for micro_batch in eval_batches(
        heldout.dataset,
        heldout.packed.packs,
        micro_batch_size=micro_batch_size,
        world_rank=ranks.get_rank(),
        world_size=ranks.get_world_size(),
    ):
        lm_sum += label_loss_sum(engine, micro_batch.to(engine.device))
        partition.end_without_backward(engine)
    engine.train()
    return float(ranks.sum_over_ranks(lm_sum)) / sum(heldout.packed.num_labels)
