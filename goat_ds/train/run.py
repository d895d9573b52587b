"""A run from its command line to its exit code: 0 done, 2 bad input, 75 saved on a signal, 1 anything else."""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from goat_ds import plan
from goat_ds.distributed import messages, nodes, ranks
from goat_ds.distributed.heartbeat import Watch, watching
from goat_ds.distributed.lock import locked
from goat_ds.distributed.messages import ON_ANY_RANK
from goat_ds.errors import ConfigError, GoatError, Interrupted
from goat_ds.train.cli import parse
from goat_ds.train.config import TrainConfig
from goat_ds.train.data import Tokens, digest_on_first, load_all_tokens
from goat_ds.train.environment import build_locks, first_rank_address, settle_ranks, world_rank_from_environment
from goat_ds.train.inputs import Inputs
from goat_ds.train.loop import train
from goat_ds.train.preflight import check, planner_of
from goat_ds.train.resume import look
from goat_ds.train.saving import RunMemory
from goat_ds.train.signals import INTERRUPTED, Signals
from goat_ds.zero import checkpoint as checkpoints
from goat_ds.zero import ds_config, engine

logger = logging.getLogger(__name__)


@messages.shown()
def main(arguments: Sequence[str]) -> None:
    """Train as the command line says, and end the process with its exit code."""
    # Calls that DeepSpeed and PEFT make, once a step; nothing a user could act on.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    world_rank = world_rank_from_environment()
    joined = False
    signals = Signals()
    signals.listen()
    try:
        config = parse(arguments)
        settle_ranks(config)
        if ranks.is_first_on_node():
            _tell_of_build_locks()
        engine.join(timeout_minutes=config.timeout_minutes)
        joined = True
        with watching(address=first_rank_address(), timeout_minutes=config.timeout_minutes) as watch:
            _check_and_train(config, signals, watch)
    except ConfigError as error:
        # Every rank sees the same command line; what only one rank has found, that one must say.
        if world_rank == 0 or (joined and not error.raised_everywhere):
            print(f"\n{error}\n", file=sys.stderr)
        _end(2, world_rank)
    except Interrupted as error:
        signals.leaves = True
        if world_rank == 0:
            print(f"\n{error}\n", file=sys.stderr)
        _end(INTERRUPTED, world_rank)
    except GoatError as error:
        print(f"\nrank {world_rank}: {error}\n", file=sys.stderr)
        _end(1, world_rank)
    except Exception:
        print(f"\nrank {world_rank}:\n{traceback.format_exc()}", file=sys.stderr)
        _end(1, world_rank)
    ranks.leave()


def _check_and_train(config: TrainConfig, signals: Signals, watch: Watch) -> None:
    resumption = look(config)
    inputs = check(resumption)
    sizes = nodes.ranks_per_node()
    doubts = [*ds_config.warnings(inputs.raw_ds_config), *ds_config.hpz_warnings(inputs.raw_ds_config, sizes)]
    for doubt in doubts:
        logger.warning(doubt)
    for note in resumption.notes:
        logger.info(note)
    if config.dry_run:
        tokens, _ = load_all_tokens(inputs)
        RunMemory(resumption, digest_on_first(tokens.dataset))
        ranks.agree(lambda: _say_plan(inputs, tokens) if ranks.is_first() else None)
        logger.info("dry run: nothing is wrong that can be known before weights are read")
        return
    ranks.agree(lambda: config.folder.mkdir(parents=True, exist_ok=True) if ranks.is_first() else None)
    if len(sizes) > 1 and not nodes.is_shared(config.folder):
        logger.warning(f"{_unshared(config.folder, num_nodes=len(sizes))}")
    with locked(config.folder, timeout_minutes=config.timeout_minutes):
        ranks.agree(lambda: checkpoints.sweep(config.folder) if ranks.is_first() else None)
        saved = train(resumption, inputs, signals, step_done=watch.step_done)
    logger.info(f"saved {saved}")


def _say_plan(inputs: Inputs, tokens: Tokens) -> None:
    num_labels = inputs.config.micro_batch_size * max(tokens.packed.num_labels)
    for line in plan.lines(planner_of(inputs, num_labels=num_labels)):
        logger.info(line)


def _tell_of_build_locks() -> None:
    for path in build_locks():
        why = "another process compiles an operator, or was killed while it did so"
        logger.warning(f"{path}: {why}; if the run does not start within minutes, delete that file", extra=ON_ANY_RANK)


def _unshared(folder: Path, *, num_nodes: int) -> str:
    return (
        f"output_dir ({folder}) is not shared by the {num_nodes} nodes: checkpoints are written by the first rank, on "
        "its node only; --resume asks each node for its newest, so a node that loses its disk loses its checkpoints"
    )


def _end(code: int, world_rank: int) -> None:
    """End now: the other ranks may be waiting for this one in a collective, and leaving it would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    if world_rank:
        # A launcher ends all ranks as soon as one has ended, and the first has the message that all share.
        time.sleep(2)
    os._exit(code)
