"""Try on a tiny model of the same architecture whether the documents of one row stay apart, before the real one loads.

A micro-batch is one row of whole documents, told apart by nothing but ``position_ids`` that restart at 0. Most
architectures of transformers read a restart as a border; in others (ALiBi, state spaces, short convolutions, own
positions) documents leak into each other without a word. A list of names would age with every release, so the
architecture itself is asked: few layers, few heads, random weights, fp32, CPU.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from goat_ds.base.inspect import Base
from goat_ds.errors import first_line

# Far above fp32 rounding (some 1e-6 of the logits' scale), far below what one visible foreign token does.
LEAK = 1e-4
FIRST_LENGTH, SECOND_LENGTH, KEPT_LENGTH = 21, 13, 9
# A second or two on two cores; the lists below make every architecture we know far smaller.
MOST_PARAMETERS = 200_000_000
NUM_LAYERS, NUM_HEADS, NUM_EXPERTS = 8, 4, 16
VOCAB_SIZE, INNER_SIZE, WINDOW = 128, 64, 8

WIDTHS = ("hidden_size", "word_embed_proj_dim", "embedding_size", "lru_width")
INNER_SIZES = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "intermediate_size_mlp",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
)
WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size")
VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def row_problem(base: Base, *, attention: str = "sdpa") -> str | None:
    """Return why documents packed into one row cannot train this model, or nothing if they can.

    Draws from no random stream of the caller's. To be called before the real model is loaded: it ends transformers'
    sharding at birth, as loading does.

    Args:
        base: Whose architecture is tried.
        attention: Attention code that will train it; flash attention needs a GPU, so ``eager`` stands in for it.

    Returns:
        One sentence that names the model and the architecture; also when the architecture could not be tried, since
        a refused run costs less than one that learned from mixed documents.
    """
    model, name = base.name, base.architecture
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            tiny, has_attention = _tiny_model(base.config, attention="eager" if "flash" in attention else attention)
            if _takes_positions(tiny) and _sees_later_tokens(tiny):
                return (
                    f"model ({model}): {name} sees tokens that come later, so it would be trained on answers it can "
                    "read; take a causal language model"
                )
            if not _takes_positions(tiny) or _mixes_documents(tiny):
                return (
                    f"model ({model}): the {name} architecture does not keep the documents of a packed row apart in "
                    "transformers, so training on it would mix them; it is not supported"
                )
            if not has_attention:
                return f"model ({model}): {name} has no {attention} attention in transformers; use attn eager"
    # Whatever a stranger's architecture raises, the answer is the same: it was not shown to be safe.
    except Exception as error:
        return (
            f"model ({model}): whether the {name} architecture keeps the documents of a packed row apart could not "
            f"be checked on a tiny copy ({type(error).__name__}: {first_line(error)}); it is not supported"
        )
    return None


def _sees_later_tokens(tiny: Any) -> bool:
    tokens_1T = _random_tokens(FIRST_LENGTH)
    changed_1T = torch.cat([tokens_1T[:, :KEPT_LENGTH], _random_tokens(FIRST_LENGTH - KEPT_LENGTH)], dim=1)
    before, after = (_logits(tiny, tokens)[:, :KEPT_LENGTH] for tokens in (tokens_1T, changed_1T))
    return _differ(before, after)


def _takes_positions(tiny: Any) -> bool:
    return "position_ids" in inspect.signature(tiny.forward).parameters


def _mixes_documents(tiny: Any) -> bool:
    first_1T, second_1T = _random_tokens(FIRST_LENGTH), _random_tokens(SECOND_LENGTH)
    in_row = _logits(tiny, first_1T, second_1T)[:, FIRST_LENGTH:]
    return _differ(in_row, _logits(tiny, second_1T))


def _differ(ours: Tensor, theirs: Tensor) -> bool:
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        raise ArithmeticError("the logits are not finite")
    return bool((ours - theirs).abs().max() > LEAK * theirs.abs().max())


def _random_tokens(length: int) -> Tensor:
    # The lowest ids may be special: padding, begin, end.
    return torch.randint(8, VOCAB_SIZE, (1, length))


def _logits(tiny: Any, *documents_1T: Tensor) -> Tensor:
    """Run one row as training does: restarting positions, no mask, no cache."""
    position_ids = torch.cat([torch.arange(document.shape[1]) for document in documents_1T])[None]
    return tiny(torch.cat(documents_1T, dim=1), position_ids=position_ids, use_cache=False).logits


def _tiny_model(config: Any, *, attention: str) -> tuple[nn.Module, bool]:
    """Build the copy, with eager attention where it has no other, and say whether it has the attention asked for."""
    # What an earlier engine of this process told transformers must not shard the copy.
    unset_hf_deepspeed_config()
    try:
        return _build(config, attention=attention), True
    except ValueError:
        return _build(config, attention="eager"), False


def _build(config: Any, *, attention: str) -> nn.Module:
    """Build the copy; one whose forward takes no positions stays without weights, for it is never run."""
    tiny_config = copy.deepcopy(config)
    if hasattr(tiny_config, "quantization_config"):
        del tiny_config.quantization_config
    _shrink(tiny_config)
    how = {"dtype": torch.float32, "attn_implementation": attention}
    with torch.device("meta"):
        skeleton: nn.Module = AutoModelForCausalLM.from_config(
            copy.deepcopy(tiny_config), trust_remote_code=False, **how
        )
    if not _takes_positions(skeleton):
        return skeleton
    num_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    if num_parameters > MOST_PARAMETERS:
        raise OverflowError(f"the copy would still have {num_parameters:,} parameters")
    tiny: nn.Module = AutoModelForCausalLM.from_config(tiny_config, trust_remote_code=False, **how)
    for parameter in tiny.parameters():
        # Branches as loud as the stream they join and gates off zero: otherwise a leak could hide below rounding.
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tiny.eval()


def _shrink(config: Any) -> None:
    """Make a config small in place: its text part, and whatever other parts it has.

    A head keeps its size, on which the lengths of rotary tables hang; there are only fewer of them.
    """
    for part in config.sub_configs:
        if getattr(config, part, None) is not None:
            _shrink(getattr(config, part))
    _keep_first_layers(config)
    _keep_few_heads(config)
    for name in INNER_SIZES:
        _lower(config, name, INNER_SIZE)
    for name in WINDOWS:
        _lower(config, name, WINDOW)
    for name in EXPERT_COUNTS:
        _lower(config, name, NUM_EXPERTS)
    for name in VOCABULARIES:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, VOCAB_SIZE)
    for name, value in list(vars(config).items()):
        if name.endswith("_token_id") and isinstance(value, int) and value >= VOCAB_SIZE:
            setattr(config, name, 0)


def _lower(config: Any, name: str, highest: int) -> None:
    value = getattr(config, name, None)
    if isinstance(value, int) and not isinstance(value, bool):
        setattr(config, name, min(value, highest))


def _keep_first_layers(config: Any) -> None:
    """Keep a beginning of the stack that has every kind of layer the config lists; indices of layers stay true."""
    depth = getattr(config, "num_hidden_layers", None)
    if depth is None:
        return
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == depth and name != "architectures"
    }
    firsts = [values.index(kind) for values in lists.values() for kind in values if isinstance(kind, str | int)]
    # Lists of numbers that differ from layer to layer name no kinds and would keep them all.
    kept = min(depth, max([NUM_LAYERS, *(first + 1 for first in firsts)]))
    config.num_hidden_layers = kept
    for name, values in lists.items():
        setattr(config, name, values[:kept])


def _keep_few_heads(config: Any) -> None:
    num_heads = getattr(config, "num_attention_heads", None)
    if not isinstance(num_heads, int) or num_heads <= NUM_HEADS:
        return
    for name in WIDTHS:
        width = getattr(config, name, None)
        if isinstance(width, int):
            setattr(config, name, width // num_heads * NUM_HEADS)
    config.num_attention_heads = NUM_HEADS
    for name in ("num_key_value_heads", "num_kv_heads"):
        num_shared = getattr(config, name, None)
        if isinstance(num_shared, int):
            # Grouped heads stay grouped: all, one, or between.
            setattr(config, name, {num_heads: NUM_HEADS, 1: 1}.get(num_shared, NUM_HEADS // 2))
