"""The shape of a decoder-only transformer of the Llama, Mistral, Qwen2 and Qwen3 families."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from zbench.errors import UserError

# What `transformers` takes for a key that a family's config.json leaves out (its config classes, version 5).
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_REQUIRED = ("family", "layers", "width", "ffn", "heads", "vocab", "max_positions")
FAMILIES = tuple(_FAMILY_DEFAULTS)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Names follow `docs/` and the cost formulas: D width, F ffn, V vocab, d head_dim.

    Raises UserError for a shape that no model can have (heads that do not divide, an unknown family, ...).
    """

    family: str  # "llama", "mistral", "qwen2" or "qwen3"
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # or {"rope_type": "linear" | "llama3", ...} as in Hugging Face configs
    rms_eps: float = 1e-5
    tied: bool = True  # the head shares the embedding's weight
    qkv_bias: bool = False
    out_bias: bool = False  # bias on the attention output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm per head on queries and keys (Qwen3)
    windows: tuple[int | None, ...] | None = None  # sliding window per layer; None where all attend fully
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    mask_id: int | None = None  # the token that stands for a position to be filled in; diffusion checkpoints have one

    def __post_init__(self) -> None:
        if self.family not in _FAMILY_DEFAULTS:
            raise UserError(f"model family {self.family!r} is not supported; supported: {listed(_FAMILY_DEFAULTS)}")
        for name in ("layers", "width", "ffn", "heads", "kv_heads", "head_dim", "vocab", "max_positions"):
            check_count(name, getattr(self, name))
        for name in ("rope_theta", "rms_eps"):
            check_positive(name, getattr(self, name))
        for name in ("tied", "qkv_bias", "out_bias", "mlp_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"model config: {name} must be true or false, not {getattr(self, name)!r}")
        if self.heads % self.kv_heads:
            raise UserError(f"model config: {self.heads} heads cannot share {self.kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise UserError(f"model config: rotary positions need an even head_dim, not {self.head_dim}")
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling)
        if self.windows is not None and len(self.windows) != self.layers:
            raise UserError(f"model config: {len(self.windows)} sliding windows for {self.layers} layers")
        for window in self.windows or ():
            if window is not None:
                check_count("a sliding window", window)
        check_tokens((*self.eos_ids, self.bos_id, self.mask_id), self.vocab)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """The config of a Hugging Face `config.json`, in its old form (`rope_theta`, `rope_scaling`) or that of
        `transformers` 5 (`rope_parameters`).

        Raises UserError that names what is missing, malformed or not supported.
        """
        family = config.get("model_type")
        if family not in _FAMILY_DEFAULTS:
            raise UserError(f"model_type {family!r} is not supported; supported: {listed(_FAMILY_DEFAULTS)}")
        config = {**_FAMILY_DEFAULTS[family], **config}
        refuse_unsupported(config)
        layers, width, heads = (size(config, k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        head_dim = config.get("head_dim")
        if head_dim is None and width % heads:
            raise UserError(f"config.json: hidden_size {width} is not a multiple of num_attention_heads {heads}")
        kv_heads = config.get("num_key_value_heads")
        rope_theta, rope_scaling = _rope(config)
        bias = bool(config.get("attention_bias")) and family in ("llama", "qwen3")
        return cls(
            family=family,
            layers=layers,
            width=width,
            ffn=size(config, "intermediate_size"),
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=width // heads if head_dim is None else head_dim,
            vocab=size(config, "vocab_size"),
            max_positions=size(config, "max_position_embeddings"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rms_eps=config.get("rms_norm_eps", 1e-6),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bias or family == "qwen2",
            out_bias=bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias")),
            qk_norm=family == "qwen3",
            windows=_windows(config, layers),
            eos_ids=token_ids(config.get("eos_token_id")),
            bos_id=config.get("bos_token_id"),
            mask_id=config.get("mask_token_id"),
        )

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The config of a shape written in this class's own names, as in a scenario; `kv_heads` and `head_dim` may be
        left out where `heads` and `width` tell them, and the family brings its own biases and norms.

        Raises UserError for a name that is unknown or missing.
        """
        check_names(values, [f.name for f in fields(cls)], _REQUIRED)
        family, width, heads = values["family"], values["width"], values["heads"]
        derived: dict[str, Any] = {"kv_heads": heads, "qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}
        if "head_dim" not in values:
            if not (isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads == 0):
                raise UserError(f"model config: width {width!r} is not a multiple of heads {heads!r}; give head_dim")
            derived["head_dim"] = width // heads
        if (windows := values.get("windows")) is not None:
            if not isinstance(windows, (list, tuple)):
                raise UserError(f"model config: windows must be a list with one entry per layer, not {windows!r}")
            windows = tuple(windows)
        lists = {"windows": windows, "eos_ids": token_ids(values.get("eos_ids"))}
        return cls(**{**derived, **values, **lists})

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model, in the form of `transformers` 5; the inverse of `from_hf`.

        Raises UserError where the family has no such model (a Llama with sliding windows, say).
        """
        windows = self.windows or (None,) * self.layers
        window = next((w for w in windows if w is not None), None)
        config = {
            "architectures": [_ARCHITECTURES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_eps,
            "rope_parameters": {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.tied,
            "attention_bias": self.out_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
            **({} if self.mask_id is None else {"mask_token_id": self.mask_id}),
        }
        if self.family != "llama":
            config["sliding_window"] = window
        if self.family in ("qwen2", "qwen3"):
            config["use_sliding_window"] = window is not None
            config["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in windows]
        if ModelConfig.from_hf(config) != self:
            raise UserError(f"this model has no Hugging Face form: no {self.family} config says all of {self}")
        return config


def token_ids(value: Any) -> tuple[int, ...]:
    """The ids that a Hugging Face config gives as null, one number or a list. Raises UserError for anything else."""
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(token, int) for token in ids):
        raise UserError(f"config: {value!r} is not a token id or a list of token ids")
    return ids


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model's folder. Raises UserError where there is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; a model folder needs it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{file} must hold a JSON object")
    return data


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape of every weight of the model; a tied head is not listed."""
    q, kv, d = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.width
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab, d)}
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (d,)
        for name, out, width, bias in (
            ("self_attn.q_proj", q, d, config.qkv_bias),
            ("self_attn.k_proj", kv, d, config.qkv_bias),
            ("self_attn.v_proj", kv, d, config.qkv_bias),
            ("self_attn.o_proj", d, q, config.out_bias),
            ("mlp.gate_proj", config.ffn, d, config.mlp_bias),
            ("mlp.up_proj", config.ffn, d, config.mlp_bias),
            ("mlp.down_proj", d, config.ffn, config.mlp_bias),
        ):
            shapes[f"{prefix}{name}.weight"] = (out, width)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (out,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[prefix + "post_attention_layernorm.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab, d)
    return shapes


def parameter_count(config: ModelConfig) -> int:
    """Weights of the model; a tied embedding and head count once."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"config.json: hidden_act {activation!r} is not supported; supported: silu")
    if config.get("quantization_config"):
        raise UserError("config.json: quantised weights are not supported; use the float16, bfloat16 or float32 model")


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Rotary base, and the scaling as `ModelConfig.rope_scaling` keeps it."""
    new, old = (config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    for rope in (new, old):
        if not isinstance(rope, Mapping):
            raise UserError(f"config.json: rope parameters must be a mapping, not {rope!r}")
        if nested := [key for key, value in rope.items() if isinstance(value, Mapping)]:
            raise UserError(f"config.json: rope parameters per kind of layer ({listed(nested)}) are not supported")
    if new and old and _scaling(new) != _scaling(old):
        raise UserError("config.json: rope_scaling and rope_parameters say different things; keep one of the two")
    rope = new or old
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (1, None):
        raise UserError(f"config.json: partial_rotary_factor {partial} is not supported; supported: 1")
    return rope.get("rope_theta", config.get("rope_theta", 10000.0)), _scaling(rope)


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    return {"rope_type": kind, **{key: rope[key] for key in _ROPE_KEYS.get(str(kind), ()) if key in rope}}


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...] | None:
    """Sliding window per layer: Mistral's slide all, Qwen's by `layer_types`, or else from `max_window_layers` on."""
    window, family = config.get("sliding_window"), config["model_type"]
    if family == "llama" or window is None:
        return None
    if family == "mistral":
        return (window,) * layers
    if not config.get("use_sliding_window"):
        return None
    types = config.get("layer_types")
    if types is None:
        if not isinstance(full := config["max_window_layers"], int):
            raise UserError(f"config.json: max_window_layers must be a whole number, not {full!r}")
        types = ["full_attention" if layer < full else "sliding_attention" for layer in range(layers)]
    by_type = {"full_attention": None, "sliding_attention": window}
    check_layer_types(types, by_type)
    return tuple(by_type[kind] for kind in types) if "sliding_attention" in types else None


def check_layer_types(types: Any, known: Iterable[str]) -> None:
    if not isinstance(types, (list, tuple)):
        raise UserError(f"config.json: layer_types must be a list, not {types!r}")
    if unknown := sorted({str(kind) for kind in types} - set(known)):
        raise UserError(f"config.json: layer_types {listed(unknown)} not supported; supported: {listed(known)}")


def size(config: Mapping[str, Any], key: str) -> int:
    if key not in config:
        raise UserError(f"config.json: {key} is missing")
    return check_count(key, config[key])


def _check_rope_scaling(scaling: Mapping[str, Any]) -> None:
    kind: Any = scaling.get("rope_type")
    if str(kind) not in _ROPE_KEYS:
        raise UserError(f"rope type {kind!r} is not supported; supported: default, {listed(_ROPE_KEYS)}")
    if missing := [key for key in _ROPE_KEYS[kind] if key not in scaling]:
        raise UserError(f"model config: rope type {kind} needs {listed(missing)}")
    for key in _ROPE_KEYS[kind]:
        check_positive(key, scaling[key])


def check_count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"model config: {name} must be a positive whole number, not {value!r}")
    return value


def check_positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"model config: {name} must be a positive number, not {value!r}")


def check_names(values: Mapping[str, Any], known: Iterable[str], required: Iterable[str]) -> None:
    """Raises UserError for a name that is unknown or missing."""
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"model config: unknown {listed(unknown)}; known: {listed(sorted(known))}")
    if missing := [name for name in required if name not in values]:
        raise UserError(f"model config: {listed(missing)} missing")


def check_tokens(tokens: Iterable[Any], vocab: int) -> None:
    """Raises UserError for a token that is neither None nor in the vocabulary."""
    for token in tokens:
        if token is not None and (not isinstance(token, int) or not 0 <= token < vocab):
            raise UserError(f"model config: token id {token!r} is not in the vocabulary of {vocab}")


def listed(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names))
