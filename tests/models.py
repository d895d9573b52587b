"""Tiny random models of the architectures that users bring."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

COMMON = {"vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CAUSAL_LMS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**LLAMA_LIKE),
    "mistral": MistralConfig(**LLAMA_LIKE, sliding_window=None),
    "qwen2": Qwen2Config(**LLAMA_LIKE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**LLAMA_LIKE),
    "gemma3": Gemma3TextConfig(
        **LLAMA_LIKE, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
    "gpt2": GPT2Config(
        **COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
}


def causal_lm(name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build one with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    config = CAUSAL_LMS[name].__class__.from_dict(CAUSAL_LMS[name].to_dict())
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def sequence_classifier(*, seed: int = 0) -> PreTrainedModel:
    """Build an encoder with a classification head over three labels."""
    torch.manual_seed(seed)
    encoder = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return RobertaForSequenceClassification(RobertaConfig(**COMMON, **encoder, **no_dropout, num_labels=3))


def image_classifier(*, seed: int = 0) -> PreTrainedModel:
    """Build a vision transformer over 16 x 16 pixels and three labels."""
    torch.manual_seed(seed)
    encoder = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**encoder, image_size=16, patch_size=8, num_labels=3))


def token_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw token ids that are neither padding nor special."""
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))
