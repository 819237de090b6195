"""Tiny random models of every supported family, as `transformers` makes them: the oracle of the runtime's tests."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ZayaConfig,
    ZayaForCausalLM,
)

from zbench.models import families
from zbench.models.loading import LoadedModel
from zbench.models.model import Model, build

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "smollm": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {"head_dim": 32, "rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 16, "sliding_window": 7}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "zaya": (
        ZayaConfig,
        ZayaForCausalLM,
        {"head_dim": 16, "moe_intermediate_size": 48, "num_experts": 5, "router_hidden_size": 24},
    ),
}


@functools.cache
def oracle(family: str) -> Any:
    """A `transformers` model with weights wide enough that a wrong mask or rotation moves the logits."""
    config_type, model_type, extra = FAMILIES[family]
    torch.manual_seed(7)
    return widened(model_type(config_type(**{**SHAPE, **extra}, attn_implementation="eager")))


@torch.no_grad()
def widened(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.25 if parameter.dim() > 1 else 0.1)
        if "norm" in name or name.endswith("_scale"):
            parameter.add_(1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):  # as made, nothing is ever skipped
            buffer.normal_(std=0.1)
    return model.eval()


def runtime(family: str, execution: str, dtype: torch.dtype = torch.float32) -> Any:
    return built(oracle(family), execution, dtype)


def built(model: Any, execution: str = "auto", dtype: torch.dtype = torch.float32) -> Model:
    """Our model with the weights of a `transformers` one."""
    config = families.from_hf(model.config.to_dict())
    loaded = LoadedModel("tiny", None, config, model.state_dict(), "", None, "")
    return build(loaded, dtype, torch.device("cpu"), execution)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()
