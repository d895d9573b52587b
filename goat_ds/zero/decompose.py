"""Share the decompositions of a sharded model out over its ranks, and remember them on disk.

    weight shards ──► one rank ──► whole weight ──► cache? ──► directions ──► factors ──► shards on all ranks
                                              └──► 4-bit bytes (zero/quantize.py) ──────► shards on all ranks

Work goes in waves. In one wave every rank receives at most one whole weight, so that a rank never holds two; the
costs ``O I min(O, I)``, not the counts, are balanced. Works the same on one process and under every ZeRO stage.

Shape letters: O out features, I in features, R total rank.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from goat_ds.distributed import ranks
from goat_ds.distributed.messages import ON_ANY_RANK
from goat_ds.method.spectrum import Directions, Init
from goat_ds.tuner.base_quantization import BaseQuantization, layers_to_quantize
from goat_ds.tuner.fingerprint import BaseFingerprint, LayerSample, fingerprint, sample_layer
from goat_ds.tuner.layer import GoatExperts
from goat_ds.tuner.model import ADAPTER_NAME, NamedExperts, linear_shape, named_experts
from goat_ds.tuner.quantized import Packing, QuantizedLinear, pack, unpack
from goat_ds.tuner.whole_experts import experts_of_kind
from goat_ds.zero import partition, quantize
from goat_ds.zero.quantize import Recipe
from goat_ds.zero.waves import cost_of, waves

logger = logging.getLogger(__name__)

# Part of every cache key: raise it when the directions of the same weight would come out differently.
CACHE_VERSION = 2


class InitReport(NamedTuple):
    """What starting an adapter took.

    ``num_layers`` were started, ``num_cached`` of them from the cache; ``seconds`` passed until all ranks were done.
    """

    num_layers: int
    num_cached: int
    seconds: float


class Work(NamedTuple):
    """A linear layer of the base and what comes of its weight: experts that start from it, 4-bit bytes, or both."""

    path: str
    base: nn.Module
    item: NamedExperts | None
    packing: Packing | None


Wave = list[tuple[Work, int]]
"""Layers that are worked on at the same time, each with its rank."""


class Received(NamedTuple):
    """The layer a rank has in a wave; its whole weight ``[O, I]`` where the work needs one."""

    work: Work
    weight_OI: Tensor | None


class InitValues(NamedTuple):
    """An adapter's tensors at the start, in the order of its parameters, and whether the cache knew the directions.

    ``bytes_N`` is the packed weight where it becomes 4-bit, ``sample`` what the layer adds to the base's fingerprint.
    """

    values: list[Tensor]
    from_cache: bool
    bytes_N: Tensor | None
    sample: LayerSample | None


class StoredExperts(NamedTuple):
    """An adapter that was trained before: experts go on from it, and nothing is decomposed."""

    reader: int
    """The rank that has it."""
    tensors: dict[str, Tensor] | None
    """By name in the adapter's file; None on the other ranks."""

    def of(self, item: NamedExperts) -> list[Tensor] | None:
        """Return a layer's tensors in the order of its parameters, on the rank that has them."""
        if self.tensors is None:
            return None
        return [self.tensors[f"{item.path}.goat_{name}"] for name, _ in item.experts.named_parameters()]


def init_adapter(
    model: Any,
    adapter_name: str,
    *,
    seed: int,
    cache: Path | None,
    recipe: Recipe | None = None,
    stored: StoredExperts | None = None,
) -> InitReport:
    """Fill a deferred adapter from the model's weights, which may be sharded, and make them 4-bit. A collective.

    The random parts (routers, and ``A`` of ``init="zero"``) are drawn per layer from ``seed``, so they do not depend
    on the number of ranks. Experts start from the unquantised weight; one that is folded is folded before it is
    quantised.

    Args:
        model: A PEFT model with a deferred GOAT adapter, not yet given to the DeepSpeed engine.
        adapter_name: Which adapter.
        seed: Of the random parts.
        cache: Folder that remembers decompositions by content; any number of processes may share it. None: no cache.
        recipe: How the linear layers become 4-bit, adapted or not; None leaves the base as it is.
        stored: What to fill the adapter with instead; its tensors have the names and shapes of the adapter's.
    """
    began = time.monotonic()
    works = list(_works(model, adapter_name, recipe and recipe.quantization))
    samples: dict[str, LayerSample] = {}
    num_cached = 0
    bar = tqdm(total=len(works), desc="GOAT start", unit="layer", disable=not ranks.is_first())
    for wave in waves(works, cost=_cost, world_size=ranks.get_world_size()):
        received = _receive_mine(wave)
        known = _fill_from_stored(wave, stored) if stored else None
        # A rank that fails here would leave the others waiting for its factors.
        mine = ranks.agree(partial(_init_values, received, known, seed=seed, cache=cache))
        # The next wave brings the next weight; a rank never holds two.
        del received
        num_cached += mine is not None and mine.from_cache
        for work, owner in wave:
            here = owner == ranks.get_rank()
            if here and mine is not None and mine.sample is not None:
                samples[work.path] = mine.sample
            if stored is None and work.item is not None:
                partition.fill_from(owner, list(work.item.experts.parameters()), mine.values if here and mine else None)
            _hand_out(
                model.get_base_model(), work, owner, mine if here else None, recipe=recipe, adapter_name=adapter_name
            )
            bar.update()
    bar.close()
    model.base_model.record_base(adapter_name, fingerprint=_fingerprint(model, adapter_name, samples))
    num_cached = int(ranks.sum_over_ranks(torch.tensor(num_cached)))
    num_started = sum(work.item is not None for work in works)
    return InitReport(num_started, num_cached, time.monotonic() - began)


def settle_base(base: nn.Module, *, recipe: Recipe | None = None) -> BaseFingerprint | None:
    """Make the base of another method's adapter 4-bit, before the adapter is put on it; return its content.

    A collective. None where layers are 4-bit in its files already, so that their weights are not known.

    Args:
        base: A model without an adapter, not yet given to the DeepSpeed engine; its weights may be sharded.
        recipe: How its linear layers become 4-bit; None leaves the base as it is.
    """
    chosen = {} if recipe is None else dict(layers_to_quantize(base, kept=recipe.quantization.kept))
    packings = {id(layer): recipe.quantization.packing for layer in chosen.values()} if recipe else {}
    linear = [(path, layer) for path, layer in base.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    if any(isinstance(layer, QuantizedLinear) for _, layer in linear):
        return None
    works = [Work(path, layer, None, packings.get(id(layer))) for path, layer in linear]
    samples: dict[str, LayerSample] = {}
    for wave in waves(works, cost=_cost, world_size=ranks.get_world_size()):
        received = _receive_mine(wave)
        mine = ranks.agree(partial(_init_values, received, None, seed=0, cache=None))
        del received
        for work, owner in wave:
            here = owner == ranks.get_rank()
            if here and mine is not None and mine.sample is not None:
                samples[work.path] = mine.sample
            _hand_out(base, work, owner, mine if here else None, recipe=recipe)
    return fingerprint(_everywhere(samples))


def _everywhere(samples: dict[str, LayerSample]) -> dict[str, LayerSample]:
    """Return the samples of all ranks. A collective."""
    # As plain numbers, which float64 holds exactly: a tensor takes many times as long to pickle.
    sampled = {path: (shape, values_N.dtype, values_N.tolist()) for path, (shape, values_N) in samples.items()}
    everywhere = ranks.union_over_ranks(sampled)
    return {
        path: LayerSample(shape, torch.tensor(values, dtype=dtype))
        for path, (shape, dtype, values) in everywhere.items()
    }


def _fingerprint(model: Any, adapter_name: str, samples: dict[str, LayerSample]) -> BaseFingerprint | None:
    """Combine the samples of all ranks; None where some layer was 4-bit before its experts started. A collective."""
    everywhere = _everywhere(samples)
    items = list(named_experts(model, adapter_name))
    if any(item.path not in everywhere for item in items):
        return None
    paths = [item.path for item in named_experts(model.get_base_model(), adapter_name)]
    return fingerprint({path: everywhere[item.path] for path, item in zip(paths, items, strict=True)})


def _works(model: Any, adapter_name: str, quantization: BaseQuantization | None) -> Iterator[Work]:
    """Yield the layers that experts start from, then the others that become 4-bit."""
    base = model.get_base_model()
    wanted = {} if quantization is None else dict(layers_to_quantize(base, kept=quantization.kept))
    packing_of = {id(layer): quantization.packing for layer in wanted.values()} if quantization else {}
    for item in named_experts(model, adapter_name):
        layer = item.layer.get_base_layer()
        yield Work(item.path, layer, item, packing_of.pop(id(layer), None))
    for path, layer in wanted.items():
        if id(layer) in packing_of:
            yield Work(path, layer, None, packing_of[id(layer)])


def _cost(work: Work) -> float:
    return cost_of(linear_shape(work.base), decomposes=work.item is not None)


def _receive_mine(wave: Wave) -> Received | None:
    """Return the layer of the wave that is this rank's, with its whole weight where the work needs it. A collective."""
    mine = None
    for work, owner in wave:
        weight: Any = work.base.weight
        whole = partition.whole_on(owner, weight) if _needs_weight(work) else None
        if owner == ranks.get_rank():
            mine = Received(work, None if whole is None else _matrix_OI(work.base, whole))
    return mine


def _needs_weight(work: Work) -> bool:
    decomposes = work.item is not None and work.item.experts.config.init.decomposes
    # Experts that start from nothing still tell on which base, unless it has no unquantised weights.
    return decomposes or not isinstance(work.base, QuantizedLinear)


def _matrix_OI(layer: nn.Module, weight: Tensor) -> Tensor:
    if isinstance(layer, QuantizedLinear):
        return unpack(weight, layer.packing, shape=linear_shape(layer), dtype=torch.float32)
    return weight.T if isinstance(layer, Conv1D) else weight


def _fill_from_stored(wave: Wave, stored: StoredExperts) -> list[Tensor] | None:
    """Fill the experts of a wave; return those of this rank's layer, whole. A collective."""
    mine = None
    for work, owner in wave:
        if work.item is not None:
            values = partition.fill_from(stored.reader, list(work.item.experts.parameters()), stored.of(work.item))
            mine = values if owner == ranks.get_rank() else mine
    return mine


def _init_values(
    received: Received | None, known: list[Tensor] | None, *, seed: int, cache: Path | None
) -> InitValues | None:
    """Compute a layer's tensors at the start, whole, or take the known ones; None for a rank without a layer."""
    if received is None:
        return None
    work, weight_OI = received
    if work.item is None:
        assert weight_OI is not None
        bytes_N = None if work.packing is None else pack(weight_OI, work.packing)
        return InitValues([], False, bytes_N, sample_layer(weight_OI))
    experts = work.item.experts
    directions, from_cache = None, False
    if known is None and weight_OI is not None and experts.config.init.decomposes:
        directions, from_cache = directions_of(weight_OI, experts, cache=cache)
    whole = experts_of_kind(
        experts.config,
        name=experts.name,
        in_features=experts.in_features,
        out_features=experts.out_features,
        like=torch.empty(0, dtype=experts.dtype, device=ranks.device()),
        signal=experts.signal,
    )
    if known is None:
        with _drawing(seed_of(seed, work.path)):
            whole.start(directions)
    else:
        with torch.no_grad():
            for parameter, value in zip(whole.parameters(), known, strict=True):
                parameter.copy_(value)
    # Before anything is folded into the weight.
    is_stored_4bit = isinstance(work.base, QuantizedLinear)
    sample = None if weight_OI is None or is_stored_4bit else sample_layer(weight_OI)
    bytes_N = None
    if weight_OI is not None and work.packing is not None:
        if whole.folds:
            # The weight is a copy of this rank's own, and has given its directions.
            whole.add_residual_(weight_OI, times=-1)
        bytes_N = pack(weight_OI, work.packing)
    return InitValues([parameter.detach() for parameter in whole.parameters()], from_cache, bytes_N, sample)


def _hand_out(
    base: Any,
    work: Work,
    owner: int,
    mine: InitValues | None,
    *,
    recipe: Recipe | None,
    adapter_name: str = ADAPTER_NAME,
) -> None:
    """Send every rank its shards of what one rank has made. A collective."""
    if work.item is not None:
        work.item.experts.ready = True
    folds = work.item is not None and work.item.experts.folds
    if work.packing is None:
        if folds:
            _fold(work, owner, adapter_name)
        return
    assert recipe is not None
    layer = quantize.to_bytes_on_all(work.base, mine.bytes_N if mine else None, owner=owner, recipe=recipe)
    if work.item is None:
        base.set_submodule(work.path, layer)
    else:
        work.item.layer.base_layer = layer
        work.item.experts.folded = folds


def seed_of(seed: int, name: str) -> int:
    """Return the seed of a generator of its own: neighbouring seeds and names share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Draw on this rank's device from a seed, and leave the generator as it was."""
    # torch.manual_seed seeds the generators of all kinds of devices, which takes longer than what is drawn.
    here = ranks.device()
    of_kind = [torch.default_generator] if here.type == "cpu" else torch.get_device_module(here).default_generators
    generator = of_kind[here.index or 0]
    before = generator.get_state()
    try:
        generator.manual_seed(seed)
        yield
    finally:
        generator.set_state(before)


def _fold(work: Work, owner: int, adapter_name: str) -> None:
    """Subtract the start's contribution from the base weight on every rank. A collective."""
    assert work.item is not None
    weight: Any = work.base.weight
    with partition.gathered(work.item.experts.parameters()), partition.written_by(owner, [weight]):
        work.item.layer.fold(adapter_name)


def directions_of(weight_OI: Tensor, experts: GoatExperts, *, cache: Path | None) -> tuple[Directions, bool]:
    """Return the directions an adapter starts from in fp32, from the cache or the weight; say whether it was cached."""
    indices_ED = experts.indices()
    if cache is None:
        return _in_fp32(experts.directions_in(weight_OI)), False
    entry = cache / f"{_key(weight_OI, indices_ED, experts.config.init)}.safetensors"
    shapes = [(weight_OI.shape[0], indices_ED.numel()), (indices_ED.numel(),), (indices_ED.numel(), weight_OI.shape[1])]
    known = _read(entry, shapes)
    if known is not None:
        return Directions(*(tensor.to(weight_OI.device) for tensor in known)), True
    directions = _in_fp32(experts.directions_in(weight_OI))
    _write(entry, directions)
    return directions, False


def _in_fp32(directions: Directions) -> Directions:
    # What is cached and what was just computed must be the same numbers.
    return Directions(*(tensor.to(torch.float32).contiguous() for tensor in directions))


def _key(weight_OI: Tensor, indices_ED: Tensor, init: Init) -> str:
    """Name a decomposition by its content. Scale and rho are not part of it: they are applied afterwards."""
    digest = hashlib.sha256()
    # All but one start take some of the same singular directions.
    by = ["qr"] if init is Init.OLORA else []
    about = [CACHE_VERSION, list(weight_OI.shape), str(weight_OI.dtype), indices_ED.tolist(), *by]
    digest.update(json.dumps(about).encode())
    digest.update(weight_OI.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksum(directions: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in directions:
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(entry: Path, shapes: list[tuple[int, ...]]) -> Directions | None:
    """Read a cache entry; None when it is missing or damaged, which is said and not trusted."""
    if not entry.exists():
        return None
    try:
        with safe_open(entry, framework="pt") as file:
            directions = Directions(*(file.get_tensor(name) for name in Directions._fields))
            checksum = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        logger.warning(f"SVD cache: {entry} is damaged ({error}); decomposing again", extra=ON_ANY_RANK)
        return None
    if [tuple(tensor.shape) for tensor in directions] != shapes or checksum != _checksum(directions):
        logger.warning(
            f"SVD cache: {entry} is damaged (its checksum does not fit); decomposing again", extra=ON_ANY_RANK
        )
        return None
    return directions


def _write(entry: Path, directions: Directions) -> None:
    """Write a cache entry whole or not at all, whoever else writes the same one; say so if the disk refuses."""
    tensors = {name: tensor.cpu() for name, tensor in directions._asdict().items()}
    content = save(tensors, metadata={"sha256": _checksum(directions)})
    temporary = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f"{entry.stem}.", suffix=".tmp", dir=entry.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, entry)
    except OSError as error:
        with suppress(OSError, TypeError):
            os.unlink(temporary)  # type: ignore[arg-type]
        logger.warning(
            f"SVD cache: {entry} was not written ({error}); the next run decomposes this layer again", extra=ON_ANY_RANK
        )
