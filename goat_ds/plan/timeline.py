"""What one micro-batch's forward and backward hold at every instant, counted on tensors without memory.

A few blocks of the model run on torch's fake tensors, as they would on a CPU: same operators, same saved tensors, same
lifetimes, no memory and no arithmetic. A middle block then stands for all blocks between the first and the last. So
whatever an architecture, a way of checkpointing, the adapter or the loss keeps is counted by what autograd keeps, and
there is no formula to fall behind the code.

On a GPU, kernels of attention differ: a fused one holds as much, one that is not would hold T x T scores as well.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from goat_ds.data import MicroBatch, label_loss_sum
from goat_ds.tuner.quantized import QuantizedLinear, code_of_statistics
from goat_ds.zero.adapters import goat_of

NUM_BLOCKS_RUN = 3
"""The first block, one that stands for all between, the last."""


class Use(NamedTuple):
    """A parameter as it is gathered: one of the model's, in a block of its own where blocks are repeated."""

    name: str
    block: int | None


def use_of(path: str, blocks: str) -> Use:
    """Part a path in a model into a block of its list of blocks and the path in there."""
    if not path.startswith(f"{blocks}."):
        return Use(path, None)
    block, _, rest = path.removeprefix(f"{blocks}.").partition(".")
    return Use(rest, int(block))


class Instant(NamedTuple):
    """What is held from one border of a module to the next, without the model's parameters and their gradients."""

    begins: int
    """Bytes at its begin."""
    peak: int
    """Most bytes until the next."""
    enters: bool
    """Whether the border was crossed into the module; else out of it."""
    backward: bool
    module: Use
    """Its path, within a block that of the block's part."""
    parameters: tuple[Use, ...]
    """The module's own."""


@dataclass(frozen=True)
class Timeline:
    """The instants of one micro-batch, in order, and what is held between forward and backward."""

    instants: tuple[Instant, ...]
    kept: int

    @property
    def peak(self) -> int:
        """Most bytes at any instant."""
        return max(instant.peak for instant in self.instants)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operator has made and that is still there.

    Args:
        known: Tensors that were there before.
        one_document: What the model is given where it asks for a value: whether a row holds one document only.
    """

    def __init__(self, known: Iterable[Tensor], *, one_document: bool = False) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._bytes: dict[int, int] = {}
        self._one_document = one_document
        self.held = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # Fake tensors have no values. What asks is the mask of attention: does a row hold one document?
            return self._one_document
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return outputs

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known and key not in self._bytes:
            self._bytes[key] = storage.nbytes()
            self._add(storage.nbytes())
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self._add(-self._bytes.pop(key))

    def _add(self, num_bytes: int) -> None:
        self.held += num_bytes
        self.peak = max(self.peak, self.held)

    def take_peak(self) -> int:
        """Return the peak since it was last taken."""
        peak, self.peak = self.peak, self.held
        return peak


class _Recorder:
    """Notes when modules are entered and left, in forward and backward."""

    def __init__(self, model: nn.Module, live: LiveBytes, blocks: str) -> None:
        self._live, self._blocks = live, blocks
        self.instants: list[Instant] = []
        self._begun: tuple[int, bool, bool, str, tuple[str, ...]] = (0, False, False, "", ())
        # By the name that each has first: the parameters of tied modules are one.
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for path, module in model.named_modules():
            own = tuple(names[id(parameter)] for parameter in module.parameters(recurse=False))
            module.register_forward_pre_hook(self._noting(True, False, path, own))
            module.register_forward_hook(self._after_forward(path, own))

    def _noting(self, enters: bool, backward: bool, path: str, own: tuple[str, ...]) -> Callable[..., None]:
        def note(*_: Any) -> None:
            self.begin(enters, backward, path, own)

        return note

    def begin(self, enters: bool, backward: bool, path: str, own: tuple[str, ...]) -> None:
        """End the instant before and begin one."""
        self.end()
        self._begun = (self._live.held, enters, backward, path, own)

    def end(self) -> None:
        """End the instant that has begun."""
        begins, enters, backward, path, own = self._begun
        uses = tuple(self._use(name) for name in own)
        peak = self._live.take_peak()
        self.instants.append(Instant(begins, peak, enters, backward, self._use(path), uses))

    def _after_forward(self, path: str, own: tuple[str, ...]) -> Callable[..., None]:
        leave, enter_backward = self._noting(False, False, path, own), self._noting(True, True, path, own)

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            leave()
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(enter_backward)
                    break

        return note

    def _use(self, path: str) -> Use:
        return use_of(path, self._blocks)


def record(
    model: Any,
    *,
    num_tokens: int,
    num_labels: int,
    one_document: bool,
    prepare: Callable[[Any], None],
) -> Timeline:
    """Run one micro-batch through a few blocks of a model on the meta device, which stays as it is.

    Args:
        model: With or without an adapter.
        num_tokens: Of the row.
        num_labels: Positions with a label.
        one_document: Whether a row holds one document only, and attention so needs no mask.
        prepare: Switches checkpointing on.
    """
    path, num_blocks = blocks_of(model)
    few = _with_few_blocks(model, path)
    prepare(few)
    if any(isinstance(module, QuantizedLinear) and module.packing.double_quant for module in few.modules()):
        # The process keeps this tensor. If it were made below, among fake tensors, real weights would get a fake one.
        code_of_statistics(torch.device("cpu"))
    # And being real, it meets fake ones.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _become_fake(few, mode)
    with mode:
        batch = _micro_batch(num_tokens, num_labels)
        known = [*few.parameters(), *few.buffers(), *(v for v in batch if isinstance(v, Tensor))]
        with LiveBytes(known, one_document=one_document) as live:
            recorder = _Recorder(few, live, path)
            loss = label_loss_sum(few, batch)
            if (tuner := goat_of(few)) is not None:
                loss = tuner.with_balance_loss(loss)
            kept = live.held
            loss.backward()
            recorder.end()
    per_block = _kept_by_block(recorder.instants)
    instants = _repeated(recorder.instants, num_more=num_blocks - NUM_BLOCKS_RUN, num_bytes=per_block)
    return Timeline(tuple(instants), kept + max(0, num_blocks - NUM_BLOCKS_RUN) * per_block)


def blocks_of(model: nn.Module) -> tuple[str, int]:
    """Find the list of modules that holds most of a model; return its path and length."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    path = max(lists, key=lambda path: sum(p.numel() for p in lists[path].parameters()))
    return path, len(lists[path])


def _with_few_blocks(model: Any, path: str) -> Any:
    blocks = model.get_submodule(path)
    few = blocks if len(blocks) <= NUM_BLOCKS_RUN else [*blocks[: NUM_BLOCKS_RUN - 1], blocks[-1]]
    model.set_submodule(path, nn.ModuleList(few))
    try:
        return copy.deepcopy(model)
    finally:
        model.set_submodule(path, blocks)


def _become_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Let tensors of the meta device pass for tensors of a CPU; what is tied stays tied."""
    device, made = torch.device("cpu"), dict[int, Any]()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                fake = FakeTensor(mode, parameter.data, device)
                made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer.to("meta"), device)
    for parameter in made.values():
        if parameter.requires_grad:
            # DeepSpeed takes a gradient away as soon as it is there; what it keeps of it is counted elsewhere.
            parameter.register_post_accumulate_grad_hook(_drop_gradient)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _micro_batch(num_tokens: int, num_labels: int) -> MicroBatch:
    row = torch.zeros(1, num_tokens, dtype=torch.long)
    return MicroBatch(
        input_ids=row,
        position_ids=row.clone(),
        labels=row.clone(),
        label_index=torch.arange(num_labels),
        num_tokens=num_tokens,
        is_filler=False,
    )


def _kept_by_block(instants: Sequence[Instant]) -> int:
    """Return what the middle block keeps for its backward: what is held more when the last block begins."""
    firsts = [next((m.begins for m in instants if m.module.block == block), 0) for block in (1, 2)]
    return firsts[1] - firsts[0]


def _repeated(instants: Sequence[Instant], *, num_more: int, num_bytes: int) -> Iterator[Instant]:
    """Let the middle block stand for itself and ``num_more`` others, each of which keeps ``num_bytes``."""
    num_more, above, times_seen = max(0, num_more), 0, 0
    last = NUM_BLOCKS_RUN - 1
    for block, group in groupby(instants, key=lambda instant: instant.module.block):
        stretch = list(group)
        if block == 1 and num_more:
            # Forward the first time, backward the second.
            order = range(num_more + 1) if times_seen == 0 else range(num_more, -1, -1)
            for number in order:
                yield from (_moved(instant, 1 + number, number * num_bytes) for instant in stretch)
            above = num_more * num_bytes if times_seen == 0 else 0
            times_seen += 1
        else:
            moved_to = last + num_more if block == last else block
            yield from (_moved(instant, moved_to, above) for instant in stretch)


def _moved(instant: Instant, block: int | None, num_bytes: int) -> Instant:
    parameters = tuple(use._replace(block=block) for use in instant.parameters)
    return instant._replace(
        peak=instant.peak + num_bytes,
        begins=instant.begins + num_bytes,
        module=instant.module._replace(block=block),
        parameters=parameters,
    )
