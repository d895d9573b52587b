"""Gather what a recomputed block needs once for its backward, and not layer by layer again.

Under gradient checkpointing, what a recomputation has gathered of the frozen base is wanted by the block's backward
right afterwards. DeepSpeed (0.19.8) keeps it until the backward of the innermost module ends in which the recomputation
began. With reentrant checkpointing that is the block. With non-reentrant checkpointing it is the block's last layer:
all weights before that one are let go, and gathered a third time in the step, each when it is already waited for.
"""

from collections import Counter
from collections.abc import Callable
from weakref import ReferenceType, WeakKeyDictionary, ref

from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

_block_of: WeakKeyDictionary[nn.Module, ReferenceType[nn.Module]] = WeakKeyDictionary()
_keep: Callable[[nn.Module, nn.Parameter], None] = coordinator.update_recompute_parameters


def keep_until_a_blocks_backward_is_done(model: nn.Module) -> None:
    """Let DeepSpeed keep what the recomputation of a block has gathered as long as the block's backward runs.

    The function of DeepSpeed's that is replaced stays so in this process; other models keep its behaviour.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # A module that several blocks share does not tell which of them is recomputed.
    num_blocks = Counter(module for block in blocks for module in block.modules())
    for block in blocks:
        _block_of.update((module, ref(block)) for module in block.modules() if num_blocks[module] == 1)
    coordinator.update_recompute_parameters = _keep_for_block


def _keep_for_block(module: nn.Module, parameter: nn.Parameter) -> None:
    _keep(_block_of.get(module, ref(module))() or module, parameter)
