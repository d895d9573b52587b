"""From files, folders and hub names to the tensors of a training step.

    sources ─> formats ─> layout ─> tokens ─> cache       records to token ids and labels, once per node
                                      packing ─> sampler ─> batches    packs to the same global batches on any ranks
                                      probe, loss                      whether packs suit a model, and what it loses

No rank, no environment and no clock in here: whatever depends on them is an argument.
"""

from goat_ds.data.batches import Batches, MicroBatch, StepBatch, batches, eval_batches
from goat_ds.data.cache import prepare
from goat_ds.data.formats import DataFormat, Dropped, DropReason, Message, Record
from goat_ds.data.loss import cross_entropy_sum, in_chunks, label_logits, label_loss_sum, label_targets
from goat_ds.data.packing import Packed, PackReport, pack, pack_dataset
from goat_ds.data.sampler import BatchPlan, GlobalBatch
from goat_ds.data.sources import check_sources, load_records
from goat_ds.data.tokens import (
    Tokenised,
    TokenReport,
    content_digest,
    load_tokenizer,
    prompt_ids,
    stop_ids,
    tokenise,
)
from goat_ds.tuner.model import IGNORE

__all__ = [
    "IGNORE",
    "BatchPlan",
    "Batches",
    "DataFormat",
    "DropReason",
    "Dropped",
    "GlobalBatch",
    "Message",
    "MicroBatch",
    "PackReport",
    "Packed",
    "Record",
    "StepBatch",
    "TokenReport",
    "Tokenised",
    "batches",
    "check_sources",
    "content_digest",
    "cross_entropy_sum",
    "eval_batches",
    "in_chunks",
    "label_logits",
    "label_loss_sum",
    "label_targets",
    "load_records",
    "load_tokenizer",
    "pack",
    "pack_dataset",
    "prepare",
    "prompt_ids",
    "stop_ids",
    "tokenise",
]
