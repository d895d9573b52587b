"""A plan as lines to read."""

from collections.abc import Iterator

from goat_ds.plan.advice import slow
from goat_ds.plan.memory import Memory, Place, checkpoint_bytes
from goat_ds.plan.planner import MOST_GPUS, USABLE, Planner, Suggestion
from goat_ds.plan.skeleton import Kind
from goat_ds.zero.engine import Attention, Checkpointing

GIB = 2**30


def lines(planner: Planner) -> Iterator[str]:
    """Yield what a run needs."""
    settings, skeleton = planner.settings, planner.skeleton
    world_size = settings.engine.world_size
    trained, base = skeleton.count(Kind.TRAINED), skeleton.num_base_values
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    yield f"plan: {settings.base.name}, ZeRO-{planner.zero.stage}, {ranks}, {settings.engine.precision}"
    if settings.adapter is None:
        yield f"parameters: {base:,}, all of them trained"
    else:
        adapter = trained + skeleton.count(Kind.INITIAL)
        share = f"{trained / base:.2%}"
        yield f"parameters: {base:,} of the base, {adapter:,} of the adapter; trained: {trained:,} ({share})"
    yield from _memory("while loading, at most", planner.while_loading(world_size))
    yield from _memory("in training, at most", planner.in_training(world_size))
    yield from _activations(planner)
    yield f"a checkpoint on disk: {_gib(checkpoint_bytes(skeleton))} and the sample of the data"
    seconds = planner.decompositions.seconds(world_size)
    yield f"decompositions: about {seconds:,.0f} s if none is cached (estimated by trying one here and now)"
    for line in slow(planner):
        yield f"to mend: {line}"
    yield f"smallest number of GPUs ({1 - USABLE:.0%} of each left to CUDA and NCCL):"
    for suggestion in planner.suggestions:
        yield f"  {_suggested(suggestion)}"


def _memory(when: str, memory: Memory) -> Iterator[str]:
    host = memory.on(Place.HOST)
    beside = f", and {_gib(host)} on its host" if host else ""
    yield f"a rank {when}: {_gib(memory.on(Place.DEVICE))}{beside}"
    for part in memory.parts:
        if part.num_bytes:
            where = " (host)" if part.place is Place.HOST else ""
            yield f"  {part.num_bytes / GIB:9.3f} GiB  {part.name}{where}"


def _activations(planner: Planner) -> Iterator[str]:
    settings = planner.settings
    own, kind = settings.num_tokens, settings.checkpointing
    labels = "every token a label" if settings.num_labels is None else f"at most {settings.num_labels:,} labels"
    code = "attention without a mask" if settings.attention is Attention.FLASH_ATTENTION_2 else settings.attention
    yield f"activations, logits and loss of a micro-batch, {labels}, {code}:"
    by_length = [(num_tokens, planner.timeline_of(kind, num_tokens)) for num_tokens in (own // 2, own, 2 * own)]
    yield "  " + ", ".join(f"{num_tokens:,} tokens {_gib(line.peak)}" for num_tokens, line in by_length)
    by_kind = [(each, planner.timeline_of(each, own)) for each in Checkpointing]
    yield f"  {own:,} tokens: " + ", ".join(f"{each} {_gib(line.peak)}" for each, line in by_kind)


def _suggested(suggestion: Suggestion) -> str:
    size = f"{suggestion.gpu_gib} GB"
    if suggestion.num_gpus is None:
        none = f"none up to {MOST_GPUS} that the ds_config allows, whatever is changed"
        return f"{size}: {none}; lower max_length or micro_batch_size"
    changed = f" with {', '.join(suggestion.changes)}" if suggestion.changes else ""
    return f"{size}: {suggestion.num_gpus}{changed}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3f} GiB"
