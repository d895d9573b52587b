"""One run's plan, and the smallest number of GPUs that it fits on."""

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from peft import PeftConfig

from goat_ds.base.inspect import Base
from goat_ds.plan import loading
from goat_ds.plan.loading import Decompositions
from goat_ds.plan.memory import Memory, Place, Placement, in_training
from goat_ds.plan.skeleton import Skeleton, build
from goat_ds.plan.timeline import Timeline, record
from goat_ds.tuner.base_quantization import BaseQuantization
from goat_ds.zero import adapters, ds_config, sizes
from goat_ds.zero.ds_config import EngineSettings
from goat_ds.zero.engine import Attention, Checkpointing, enable_checkpointing
from goat_ds.zero.sizes import ZeroSizes

GPU_GIB = (24, 40, 80)
USABLE = 0.92
"""Share of a GPU for tensors: the rest is left to CUDA, NCCL and what the allocator cannot use."""
MOST_GPUS = 1024


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What decides over a run's needs."""

    base: Base
    """What is trained on."""
    adapter: PeftConfig | None
    """What is trained; None: every weight."""
    quantization: BaseQuantization | None
    """How the base becomes 4-bit; None: not at all."""
    as_4bit: BaseQuantization
    """How it would."""
    ds_config: Mapping[str, Any]
    """As the file has it, without problems."""
    engine: EngineSettings
    """What the flags say about the engine."""
    compute_dtype: torch.dtype
    """What 4-bit weights are multiplied in."""
    max_length: int
    """Tokens of a pack."""
    num_labels: int | None
    """Most label tokens of a micro-batch; None: every token may be one."""
    checkpointing: Checkpointing
    """Whether activations are recomputed."""
    attention: Attention
    """Settled attention code."""

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and products."""
        return self.engine.precision.torch_dtype

    @property
    def num_tokens(self) -> int:
        """Most tokens of a micro-batch."""
        return self.engine.micro_batch_size * self.max_length


class Suggestion(NamedTuple):
    """The smallest number of GPUs of one size that a run fits on."""

    gpu_gib: int
    num_gpus: int | None
    """None: no number does."""
    changes: tuple[str, ...]
    """What was changed for that: flags, and settings of the ds_config; empty where nothing was."""


class Planner:
    """Works a run's needs out, each when it is asked for."""

    def __init__(self, settings: PlanSettings) -> None:
        self.settings = settings
        self.timeline_of = cache(self._timeline_of)
        self.device_bytes = cache(self._device_bytes)

    def like(self, settings: PlanSettings) -> "Planner":
        """Return the planner of other settings, which need not count anew what they do not change."""
        other = Planner(settings)
        if settings.quantization == self.settings.quantization:
            other.__dict__ |= {"skeleton": self.skeleton, "decompositions": self.decompositions}
            other.timeline_of = self.timeline_of
        return other

    @cached_property
    def skeleton(self) -> Skeleton:
        """The model with its adapter, without memory."""
        settings = self.settings
        # FlashAttention-2 runs on GPUs only; a fused kernel without a mask holds the same.
        attention = Attention.SDPA if settings.attention is Attention.FLASH_ATTENTION_2 else settings.attention
        return build(
            settings.base,
            settings.adapter,
            dtype=settings.dtype,
            attention=str(attention),
            quantization=settings.quantization,
            compute_dtype=settings.compute_dtype,
        )

    @cached_property
    def decompositions(self) -> Decompositions:
        """What starting the experts costs."""
        return Decompositions(self.skeleton)

    @cached_property
    def zero(self) -> ZeroSizes:
        """The settings of ZeRO."""
        filled = ds_config.fill(dict(self.settings.ds_config), self.settings.engine)
        return sizes.read(filled, model_dtype=self.settings.dtype)

    @cached_property
    def is_mapped(self) -> bool:
        """Whether a base that becomes 4-bit can stay in its files until then, as far as its config says."""
        base = self.settings.base
        return base.is_4bit or base.config.dtype in (None, self.settings.dtype)

    def placement(self, world_size: int) -> Placement:
        """Return where the tensors of the run lie on so many ranks."""
        return Placement(self.skeleton, self.zero, world_size)

    def _timeline_of(self, kind: Checkpointing, num_tokens: int) -> Timeline:
        settings = self.settings
        labels = num_tokens if settings.num_labels is None else min(settings.num_labels, num_tokens)
        return record(
            self.skeleton.model,
            num_tokens=num_tokens,
            num_labels=labels,
            one_document=settings.attention is Attention.FLASH_ATTENTION_2,
            prepare=lambda model: enable_checkpointing(model, kind),
        )

    @property
    def timeline(self) -> Timeline:
        """Of a micro-batch as the run has it."""
        return self.timeline_of(self.settings.checkpointing, self.settings.num_tokens)

    def in_training(self, world_size: int) -> Memory:
        """Return what each of so many ranks holds at the worst instant of a step."""
        return in_training(self.placement(world_size), self.timeline, torch_adam=self.settings.engine.torch_adam)

    def while_loading(self, world_size: int) -> Memory:
        """Return what each of so many ranks holds at the worst instants of loading."""
        return loading.while_loading(self.loading_phases(world_size))

    def loading_phases(self, world_size: int) -> list[Memory]:
        """Return what each of so many ranks holds in each phase of loading."""
        return loading.loading_phases(self.placement(world_size), self.decompositions, is_mapped=self.is_mapped)

    def _device_bytes(self, world_size: int) -> int:
        """Return the most a GPU holds, loading or training."""
        return max(memory.on(Place.DEVICE) for memory in (self.in_training(world_size), self.while_loading(world_size)))

    def fits(self, gpu_gib: int, world_size: int) -> bool:
        """Whether so many GPUs of a size suffice."""
        return self.device_bytes(world_size) <= gpu_gib * 2**30 * USABLE

    @cached_property
    def allowed(self) -> list[int]:
        """Numbers of ranks up to 1024 on which the run would start: the ds_config has no problem with them."""
        return [num_gpus for num_gpus in range(1, MOST_GPUS + 1) if self._allows(num_gpus)]

    def _allows(self, world_size: int) -> bool:
        engine = dataclasses.replace(self.settings.engine, world_size=world_size)
        is_4bit = bool(self.skeleton.packed_bytes)
        return not any(ds_config.problems(dict(self.settings.ds_config), engine, base_is_4bit=is_4bit))

    def smallest(self, gpu_gib: int) -> int | None:
        """Return the smallest allowed number of GPUs that suffices; None: none up to 1024 does."""
        # One rank gathers nothing; from two on, more ranks hold less each.
        if 1 in self.allowed and self.fits(gpu_gib, 1):
            return 1
        several = [num_gpus for num_gpus in self.allowed if num_gpus > 1]
        place = bisect_left(several, True, key=lambda num_gpus: self.fits(gpu_gib, num_gpus))
        return several[place] if place < len(several) else None

    @cached_property
    def suggestions(self) -> list[Suggestion]:
        """Return the smallest number of GPUs of every size, with changes where it takes some."""
        return [self._suggestion(gpu_gib) for gpu_gib in GPU_GIB]

    def _suggestion(self, gpu_gib: int) -> Suggestion:
        for changes, planner in [((), self), *self._changed]:
            if (num_gpus := planner.smallest(gpu_gib)) is not None:
                return Suggestion(gpu_gib, num_gpus, changes)
        return Suggestion(gpu_gib, None, ())

    @cached_property
    def _changed(self) -> list[tuple[tuple[str, ...], "Planner"]]:
        return [(names, self.like(settings)) for names, settings in self._changed_settings()]

    def _changed_settings(self) -> Iterator[tuple[tuple[str, ...], PlanSettings]]:
        """Yield settings of the run with ever more of what saves memory, the cheapest first."""
        settings, names = self.settings, tuple[str, ...]()
        if settings.checkpointing is Checkpointing.NONE:
            settings = dataclasses.replace(settings, checkpointing=Checkpointing.NON_REENTRANT)
            names = (*names, "--gradient_checkpointing non_reentrant")
            yield names, settings
        if self.zero.stage < 3 and not any(adapters.problems(settings.adapter, stage=3, is_4bit=False)):
            settings = dataclasses.replace(settings, ds_config=with_zero(settings.ds_config, stage=3))
            names = (*names, "zero_optimization.stage 3")
            yield names, settings
        if self.zero.second_copy_ranks > 1:
            without = with_zero(settings.ds_config, zero_hpz_partition_size=None)
            settings = dataclasses.replace(settings, ds_config=without)
            names = (*names, "no zero_optimization.zero_hpz_partition_size")
            yield names, settings
        if not self.skeleton.packed_bytes and not any(adapters.problems(settings.adapter, stage=3, is_4bit=True)):
            settings = dataclasses.replace(settings, quantization=settings.as_4bit)
            names = (*names, "--load_in_4bit")
            yield names, settings


def with_zero(raw: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a ds_config with other settings of zero_optimization; None takes one out."""
    zero = {**raw.get("zero_optimization", {}), **changes}
    return {**raw, "zero_optimization": {name: value for name, value in zero.items() if value is not None}}
