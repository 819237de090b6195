"""The shape of ZAYA1: convolutional compressed attention (CCGQA) and a mixture of experts with one expert per token.

Zyphra, ZAYA1-8B (arXiv 2605.05365) and compressed convolutional attention (arXiv 2510.04476); keys and tensor names as
in the published checkpoints, which are those of `transformers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from zbench.errors import UserError
from zbench.models.config import (
    check_count,
    check_layer_types,
    check_names,
    check_positive,
    check_tokens,
    refuse_unsupported,
    size,
    token_ids,
)

CONV_TAPS = 2  # both convolutions look at a token and the one before it
# What `transformers` takes for a key that a config.json leaves out: ZAYA1-8B.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262272,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "moe_intermediate_size": 2048,
    "num_experts": 16,
    "num_experts_per_tok": 1,
    "router_hidden_size": 256,
    "cca_time0": CONV_TAPS,
    "cca_time1": CONV_TAPS,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 106,
}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 5_000_000.0, "partial_rotary_factor": 0.5}
# Variants that compute something else: key -> the one value that is run.
_ONLY: dict[str, Any] = {
    "num_experts_per_tok": 1,
    "cca_time0": CONV_TAPS,
    "cca_time1": CONV_TAPS,
    "attention_bias": False,
    "lm_head_bias": False,
}
_REQUIRED = ("family", "layers", "width", "ffn", "heads", "kv_heads", "head_dim", "vocab", "max_positions", "experts")


@dataclass(frozen=True, slots=True)
class ZayaConfig:
    """Names as in `ModelConfig`; F is the inner size of one expert. Queries and keys live in a compressed space of
    `heads` and `kv_heads` heads, so `heads * head_dim` is less than `width` as a rule.

    Raises UserError for a shape that no model can have.
    """

    family: str  # "zaya"
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    experts: int = 16  # the router has one class more, which skips the experts
    router_width: int = 256
    rope_theta: float = 5_000_000.0
    rotary_fraction: float = 0.5  # the share of a head's dimensions that is rotated
    rms_eps: float = 1e-5
    tied: bool = True
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    mask_id: int | None = None  # the token that stands for a position to be filled in; diffusion checkpoints have one

    # What the dense families vary and this one does not.
    windows: ClassVar[None] = None
    rope_scaling: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.family != "zaya":
            raise UserError(f"model family {self.family!r} is not zaya")
        counts = ("layers", "width", "ffn", "heads", "kv_heads", "head_dim", "vocab", "max_positions")
        for name in (*counts, "experts", "router_width"):
            check_count(name, getattr(self, name))
        for name in ("rope_theta", "rotary_fraction", "rms_eps"):
            check_positive(name, getattr(self, name))
        if not isinstance(self.tied, bool):
            raise UserError(f"model config: tied must be true or false, not {self.tied!r}")
        if self.heads % self.kv_heads:
            raise UserError(f"model config: {self.heads} heads cannot share {self.kv_heads} key/value heads evenly")
        if self.kv_heads * self.head_dim % 2:
            raise UserError("model config: half of the values are delayed, so kv_heads x head_dim must be even")
        if not 2 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise UserError(
                f"model config: rotary_fraction {self.rotary_fraction} of head_dim {self.head_dim} is no even number"
                " of dimensions within the head"
            )
        check_tokens((*self.eos_ids, self.bos_id, self.mask_id), self.vocab)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated, the first ones."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def mixed(self) -> int:
        """Channels of queries and keys together, which the convolutions mix: (H + kv) d."""
        return (self.heads + self.kv_heads) * self.head_dim

    @property
    def delayed(self) -> int:
        """Channels of the values that come from the token before: kv d / 2."""
        return self.kv_heads * self.head_dim // 2

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ZayaConfig:
        """The config of a Hugging Face `config.json`; `mask_token_id`, where there is one, becomes `mask_id`.

        Raises UserError that names what is missing, malformed or not supported.
        """
        if (family := config.get("model_type")) != "zaya":
            raise UserError(f"model_type {family!r} is not zaya")
        config = {**_DEFAULTS, **config}
        refuse_unsupported(config)
        for key, value in _ONLY.items():
            if (found := config.get(key, value)) != value:
                raise UserError(f"config.json: {key} {found} is not supported; supported: {value}")
        check_layer_types(config.get("layer_types") or (), ("hybrid",))
        theta, fraction = _rope(config)
        return cls(
            family="zaya",
            layers=size(config, "num_hidden_layers"),
            width=size(config, "hidden_size"),
            ffn=size(config, "moe_intermediate_size"),
            heads=size(config, "num_attention_heads"),
            kv_heads=size(config, "num_key_value_heads"),
            head_dim=size(config, "head_dim"),
            vocab=size(config, "vocab_size"),
            max_positions=size(config, "max_position_embeddings"),
            experts=size(config, "num_experts"),
            router_width=size(config, "router_hidden_size"),
            rope_theta=theta,
            rotary_fraction=fraction,
            rms_eps=config["rms_norm_eps"],
            tied=bool(config["tie_word_embeddings"]),
            eos_ids=token_ids(config["eos_token_id"]),
            bos_id=config["bos_token_id"],
            mask_id=config.get("mask_token_id"),
        )

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> ZayaConfig:
        """The config of a shape written in this class's own names, as in a scenario.

        Raises UserError for a name that is unknown or missing.
        """
        check_names(values, [f.name for f in fields(cls)], _REQUIRED)
        return cls(**{**values, "eos_ids": token_ids(values.get("eos_ids"))})

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model, in the form of `transformers` 5; the inverse of `from_hf`."""
        rope = {
            "rope_type": "default",
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.rotary_fraction,
        }
        return {
            "architectures": ["ZayaForCausalLM"],
            "model_type": "zaya",
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "moe_intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "layer_types": ["hybrid"] * self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_eps,
            "rope_parameters": {"hybrid": rope},
            "tie_word_embeddings": self.tied,
            "num_experts": self.experts,
            "num_experts_per_tok": 1,
            "router_hidden_size": self.router_width,
            "cca_time0": CONV_TAPS,
            "cca_time1": CONV_TAPS,
            "attention_bias": False,
            "lm_head_bias": False,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
            **({} if self.mask_id is None else {"mask_token_id": self.mask_id}),
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face tensor name -> shape of every weight; a tied head is not listed. The balancing biases are a
        buffer there, and a weight here."""
        width, router, mixed = self.width, self.router_width, self.mixed
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, width),
            "model.input_hidden_states_scale": (width,),
            "model.input_hidden_states_bias": (width,),
            "model.norm.weight": (width,),
        }
        scaling = ("hidden_states_scale", "hidden_states_bias", "residual_scale", "residual_bias")
        layer = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.qkv_proj.q_proj.weight": (q, width),
            "self_attn.qkv_proj.k_proj.weight": (kv, width),
            "self_attn.qkv_proj.v_proj_current.weight": (self.delayed, width),
            "self_attn.qkv_proj.v_proj_delayed.weight": (self.delayed, width),
            "self_attn.qkv_proj.conv_qk_depthwise.weight": (mixed, 1, CONV_TAPS),
            "self_attn.qkv_proj.conv_qk_depthwise.bias": (mixed,),
            "self_attn.qkv_proj.conv_qk_grouped.weight": (mixed, self.head_dim, CONV_TAPS),
            "self_attn.qkv_proj.conv_qk_grouped.bias": (mixed,),
            "self_attn.qk_norm.temp": (self.kv_heads,),
            "self_attn.o_proj.weight": (width, q),
            **{f"post_{part}_residual_scale.{name}": (width,) for part in ("attention", "mlp") for name in scaling},
            "mlp.gate.down_proj.weight": (router, width),
            "mlp.gate.down_proj.bias": (router,),
            "mlp.gate.router_mlp.norm.weight": (router,),
            **{f"mlp.gate.router_mlp.{fc}.weight": (router, router) for fc in ("fc1", "fc2")},
            **{f"mlp.gate.router_mlp.{fc}.bias": (router,) for fc in ("fc1", "fc2")},
            "mlp.gate.router_mlp.out_proj.weight": (self.experts + 1, router),
            "mlp.gate.balancing_biases": (self.experts + 1,),
            "mlp.experts.gate_up_proj": (self.experts, 2 * self.ffn, width),
            "mlp.experts.down_proj": (self.experts, width, self.ffn),
        }
        for index in range(self.layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
            if index:  # the first layer has no router before it to take a state from
                shapes[f"model.layers.{index}.mlp.gate.router_states_scale"] = (router,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab, width)
        return shapes

    def parameter_count(self) -> int:
        """Weights of the model; a tied embedding and head count once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


def _rope(config: Mapping[str, Any]) -> tuple[float, float]:
    """Rotary base, and the share of a head that is rotated."""
    rope = config.get("rope_parameters") or {"hybrid": _DEFAULT_ROPE}
    hybrid = rope.get("hybrid") if isinstance(rope, Mapping) else None
    if not isinstance(hybrid, Mapping):
        raise UserError(f"config.json: rope_parameters must hold those of hybrid layers, not {rope!r}")
    if (kind := hybrid.get("rope_type", "default")) != "default":
        raise UserError(f"rope type {kind!r} is not supported; supported: default")
    return hybrid.get("rope_theta", 0), hybrid.get("partial_rotary_factor", 1.0)
