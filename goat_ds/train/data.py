"""The data of a run: tokenised once a node, packed, and dealt into global batches."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from goat_ds.data import BatchPlan, Packed, Tokenised, content_digest, pack_dataset, prepare
from goat_ds.data.sample import SAMPLE_NAME, save_sample, take_sample
from goat_ds.data.tokens import NOTHING_LEFT
from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError, raise_if_any
from goat_ds.train.config import TrainConfig
from goat_ds.train.inputs import Inputs
from goat_ds.zero.checkpoint import MODEL_FOLDER

logger = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """Tokenised and packed data."""

    dataset: Dataset
    packed: Packed


def load_all_tokens(inputs: Inputs) -> tuple[Tokens, Tokens | None]:
    """Return the training data and the held-out data, if there is any: tokenised once a node, packed. A collective.

    Raises:
        ConfigError: with all that is wrong with either.
    """
    config = inputs.config
    both = [("data", config.train_sources, config.split), ("eval_data", config.eval_sources, config.eval_split)]
    asked = [(name, sources, split) for name, sources, split in both if sources]
    tokenised = ranks.first_on_node_then_others(lambda: _prepare_all(inputs, asked))
    tokens, *heldout = [
        _packed(config, sources, found) for (_, sources, _), found in zip(asked, tokenised, strict=True)
    ]
    return tokens, heldout[0] if heldout else None


def _prepare_all(inputs: Inputs, asked: Sequence[tuple[str, Sequence[str], str]]) -> list[Tokenised]:
    found, problems = [], list[str]()
    for name, sources, split in asked:
        try:
            found.append(
                prepare(
                    sources,
                    inputs.tokenizer,
                    max_length=inputs.config.max_length,
                    cache_dir=Path(inputs.config.token_cache),
                    data_format=inputs.config.data_format,
                    split=split,
                )
            )
        except ConfigError as error:
            problems += [
                f"{name} ({', '.join(sources)}): {problem}" if problem.startswith(NOTHING_LEFT) else problem
                for problem in error.problems
            ]
    # What is wrong with the tokenizer or its cache is wrong for both.
    raise_if_any(dict.fromkeys(problems))
    return found


def _packed(config: TrainConfig, sources: Sequence[str], tokenised: Tokenised) -> Tokens:
    packed = pack_dataset(tokenised.dataset, max_length=config.max_length, packing=config.packing)
    if not ranks.is_same_everywhere(f"{tokenised.report} {packed.num_labels}"):
        raise ConfigError(f"data ({', '.join(sources)}) is not the same on every node; copy the same files to all")
    for line in (f"data: {', '.join(sources)}", *tokenised.report.lines(), packed.report):
        logger.info(line)
    return Tokens(tokenised.dataset, packed)


def batch_plan(config: TrainConfig, packed: Packed, *, global_batch_size: int) -> BatchPlan:
    """Return which packs form which global batch."""
    return BatchPlan(
        packs=packed.packs,
        num_labels=packed.num_labels,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=global_batch_size,
        world_size=ranks.get_world_size(),
        seed=config.seed,
    )


def digest_on_first(dataset: Dataset) -> str:
    """Return the content of the training data; all nodes have been seen to have the same. A collective."""
    return str(ranks.object_from(0, content_digest(dataset) if ranks.is_first() else None))


def num_tokens_until(step: int, plan: BatchPlan, dataset: Dataset) -> int:
    """Count the tokens of all ranks in the steps before one."""
    counts = dataset.with_format("numpy", columns=["num_tokens"])[:]["num_tokens"]
    packs = (plan.packs[pack] for batch in plan.from_step(0, until=step) for pack in batch.pack_ids)
    return sum(int(counts[list(pack)].sum()) for pack in packs)


def writer_beside(inputs: Inputs, tokens: Tokens, heldout: Tokens | None) -> Callable[[Path], None]:
    """Choose the sample of the data that every checkpoint keeps; return what writes it, and a model's tokenizer."""
    config, sample = inputs.config, None
    if config.calibration_sample_tokens:
        sample = take_sample(
            tokens.dataset,
            heldout and heldout.dataset,
            num_tokens=config.calibration_sample_tokens,
            max_length=config.max_length,
            seed=config.seed,
        )

    def write(folder: Path) -> None:
        if sample is not None:
            save_sample(sample, folder / SAMPLE_NAME)
        if inputs.adapter is None:
            # A whole model is loaded without its base.
            inputs.tokenizer.save_pretrained(folder / MODEL_FOLDER)

    return write
