"""Parameters that act on mask rows only: what turns a frozen autoregressive model into one that drafts in place.

A mask row enters as a learned embedding (one per place in the block) instead of a token's, and every projection adds a
low-rank product for it (LoRA, Hu et al. 2021, arXiv 2106.09685):

    y = W x + (alpha / r) B A x        on mask rows
    y = W x                            on all others, bit by bit what the bare model computes

so the model's own distribution, which verifies the drafts, is untouched. The folder is PEFT's layout:
`adapter_config.json` (r, lora_alpha, target_modules) and `adapter_model.safetensors` with
`base_model.model.model.layers.{i}.{module}.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]; beside these,
`mask_embedding.weight` [masks, D] and the keys `block_size` and `mask_shift`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench import paths
from zbench.cache import atomic_write
from zbench.errors import UserError
from zbench.kernels import cpu
from zbench.models import loading
from zbench.models.checkpoint import Trained, check_finite, check_shapes, save_whole, stored_shapes
from zbench.models.config import ModelConfig, tensor_shapes
from zbench.models.cost import Cost
from zbench.models.families import AnyConfig
from zbench.models.shard import WHOLE, Shard, channels

LowRank = tuple[Tensor, Tensor]  # A [r, in], B [out, r]; the scale alpha / r is in B

_CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _EMBEDDING = "base_model.model.", "mask_embedding.weight"
_LAYER = re.compile(rf"{re.escape(_PREFIX)}model\.layers\.(\d+)\.")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_RANDOM_STD = 0.02
_VARIANTS = (
    *("use_dora", "use_qalora", "lora_bias", "alpha_pattern", "rank_pattern", "fan_in_fan_out", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "layer_replication", "exclude_modules", "target_parameters"),
    "trainable_token_indices",
)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    rank: int
    alpha: float
    block: int  # tokens of a block in training, and so how many masks were seen together
    masks: int  # mask embeddings; the last serves every later place
    shift: int = 0  # how far from its own place the token is that a mask predicts: 0, or 1 as tokens do
    modules: tuple[str, ...] = MODULES


AdapterCheckpoint = Trained[AdapterConfig]


def load_adapter(path: str | Path, target: ModelConfig) -> AdapterCheckpoint:
    """Raises UserError, one line, where the folder is damaged or the adapter does not fit `target`."""
    folder = paths.expanded(path)
    config, file = read_config(folder, target), folder / WEIGHTS
    with loading.opened([file]) as where:
        tensors = {name: reader.get_tensor(name) for name, reader in where.items()}
    check_finite(tensors, folder)
    return AdapterCheckpoint(config, tensors, loading.weights_hash([file]), f"folder {folder}")


def read_config(path: str | Path, target: AnyConfig) -> AdapterConfig:
    """The config of the adapter that `load_adapter` would load, without its weights. Raises UserError like it."""
    folder = paths.folder(path, "adapter")
    stored, file = loading.read_json(folder / _CONFIG), folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder} has no {WEIGHTS}; only safetensors are read")
    found = stored_shapes([file])
    try:
        _refuse_variants(stored)
        rank, alpha = _positive(stored, "r"), float(_positive(stored, "lora_alpha"))
        config = AdapterConfig(
            rank=rank,
            alpha=alpha * math.sqrt(rank) if stored.get("use_rslora") else alpha,
            block=_positive(stored, "block_size"),
            masks=(found.get(_EMBEDDING) or (0,))[0],
            shift=_shift(stored),
            modules=_modules(stored),
        )
        if not config.masks:
            raise UserError(f"{_EMBEDDING} has no mask" if _EMBEDDING in found else f"lacks {_EMBEDDING}")
        if not isinstance(target, ModelConfig):
            raise UserError(f"adapters fit dense transformers only, not {target.family}")
        _check_model(found, target)
        check_shapes(found, adapter_shapes(config, target))
    except UserError as error:
        raise UserError(f"adapter {folder}: {error}") from error
    return config


def _check_model(found: Mapping[str, tuple[int, ...]], target: ModelConfig) -> None:
    """Raises UserError where the tensors are those of a model of another shape, which their names would not tell."""
    layers = 1 + max((int(layer[1]) for layer in map(_LAYER.match, found) if layer), default=-1)
    width = (found.get(_EMBEDDING) or (target.width,))[-1]
    if layers and (layers, width) != (target.layers, target.width):
        raise UserError(
            f"made for a model of {layers} layers, {width} wide, but this one has {target.layers} and is"
            f" {target.width} wide"
        )


def save_adapter(folder: str | Path, adapter: AdapterCheckpoint) -> None:
    """Write `adapter` so that `load_adapter` reads it back."""
    folder, config = Path(folder), adapter.config
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.modules),
        "bias": "none",
        "block_size": config.block,
        "mask_shift": config.shift,
    }
    atomic_write(folder / _CONFIG, json.dumps(described, indent=1))
    save_whole(folder / WEIGHTS, adapter.tensors)


def random_adapter(
    target: ModelConfig, seed: int = 0, rank: int = 16, block: int = 8, dtype: torch.dtype = torch.float32
) -> AdapterCheckpoint:
    """An adapter that fits `target` and knows nothing: its cost is real, its drafts are noise."""
    config = AdapterConfig(rank, float(rank), block, block)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.empty(shape, dtype=dtype).normal_(0.0, _RANDOM_STD, generator=generator)
        for name, shape in adapter_shapes(config, target).items()
    }
    return AdapterCheckpoint(config, tensors, "", f"random weights, seed {seed}")


def adapter_shapes(config: AdapterConfig, target: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape: A and B for every adapted projection of the target, and the mask embeddings."""
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.masks, target.width)}
    for name, shape in tensor_shapes(target).items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and stem.rpartition(".")[2] in config.modules:
            shapes[f"{_PREFIX}{stem}.lora_A.weight"] = (config.rank, shape[1])
            shapes[f"{_PREFIX}{stem}.lora_B.weight"] = (shape[0], config.rank)
    return shapes


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """Fused as `transformer.Layer` is; None where a projection is not adapted."""

    qkv: LowRank | None
    out: LowRank | None
    gate_up: LowRank | None
    down: LowRank | None


NOT_ADAPTED = AdaptedLayer(None, None, None, None)


class MaskAdapter:
    """An adapter on its target's device, in its dtype; `Transformer.forward` takes it."""

    def __init__(
        self,
        checkpoint: AdapterCheckpoint,
        target: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard = WHOLE,
    ) -> None:
        """`shard` is the part of the target that this rank holds."""
        self.config, self.dtype = checkpoint.config, dtype
        self.mask_embedding = checkpoint.tensors[_EMBEDDING].to(device=device, dtype=dtype)  # [masks, D]
        scale = self.config.alpha / self.config.rank

        columns, rows = _parts(target, shard)

        def fused(layer: int, part: str, names: Sequence[str]) -> LowRank | None:
            adapted = [name for name in names if name in self.config.modules]
            if not adapted:
                return None
            stems = {name: f"{_PREFIX}model.layers.{layer}.{part}.{name}" for name in adapted}
            a = torch.cat([checkpoint.tensors[f"{stem}.lora_A.weight"].float() for stem in stems.values()])
            # A projection of the group that is not adapted has rows of zeros.
            sizes = _outputs(target)
            sides = [
                checkpoint.tensors[f"{stems[name]}.lora_B.weight"].float()
                if name in stems
                else a.new_zeros(sizes[name], 0)
                for name in names
            ]
            b = torch.block_diag(*sides) * scale
            if shard.size > 1:
                a, b = a[:, columns.get(names[0], slice(None))], b[rows.get(names[0], slice(None))]
            return a.to(device=device, dtype=dtype), b.to(device=device, dtype=dtype)

        local = shard.of(target)
        ends = {name: _inputs(local)[name] + _outputs(local)[name] for name in self.config.modules}
        self._low_rank = target.layers * self.config.rank * sum(ends.values())
        self.layers = tuple(
            AdaptedLayer(
                qkv=fused(layer, "self_attn", ("q_proj", "k_proj", "v_proj")),
                out=fused(layer, "self_attn", ("o_proj",)),
                gate_up=fused(layer, "mlp", ("gate_proj", "up_proj")),
                down=fused(layer, "mlp", ("down_proj",)),
            )
            for layer in range(target.layers)
        )

    @cached_property
    def native(self) -> cpu.Adapter:
        """Packed for the native CPU decoder."""
        return cpu.Adapter(self, self.dtype)

    def added(self, cost: Cost, mask_rows: int) -> Cost:
        """What a forward costs at least with this adapter on `mask_rows` of its rows; runtimes also multiply the zeros
        of fused projections, and all other rows."""
        flops = 2.0 * mask_rows * self._low_rank
        read = (self._low_rank + self.mask_embedding.numel()) * self.dtype.itemsize
        return replace(cost, flops=cost.flops + flops, weight_bytes=cost.weight_bytes + read)


def add_low_rank(y: Tensor, x: Tensor, pair: LowRank | None, is_mask: Tensor | None) -> Tensor:
    """y [B, R, out], whose memory it takes, plus B A x where is_mask [B, R, 1], x [B, R, in]; other rows have zeros
    added and stay as they are (but for the sign of a zero).

    All rows are multiplied: to pick the masks would need their number, for which the host would wait for the device.
    """
    if pair is None or is_mask is None:
        return y
    a, b = pair
    # On the narrow side: a pass over y costs a kernel more, and its traffic. Not a product, whose inf x 0 is none.
    inner = torch.where(is_mask, F.linear(x, a), 0)
    y.view(-1, y.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), b.t())
    return y


def _outputs(target: ModelConfig) -> dict[str, int]:
    kv = target.kv_heads * target.head_dim
    return {
        "q_proj": target.heads * target.head_dim, "k_proj": kv, "v_proj": kv, "o_proj": target.width,
        "gate_proj": target.ffn, "up_proj": target.ffn, "down_proj": target.width,
    }  # fmt: skip


def _modules(stored: Mapping[str, Any]) -> tuple[str, ...]:
    named = stored.get("target_modules") or ()
    if named == "all-linear":
        return MODULES
    if not (isinstance(named, (list, tuple)) and all(isinstance(name, str) for name in named)):
        raise UserError(f"target_modules must be a list of names, not {named!r}")
    if unknown := sorted(set(named) - set(MODULES)):
        raise UserError(f"target_modules {', '.join(unknown)} are not supported; supported: {', '.join(MODULES)}")
    return tuple(name for name in MODULES if name in named)


def _refuse_variants(stored: Mapping[str, Any]) -> None:
    """Raises UserError for settings of PEFT that compute something else than this module does."""
    for key, usual in (("peft_type", "LORA"), ("bias", "none")):
        if (found := stored.get(key) or usual) != usual:
            raise UserError(f"{key} {found!r} is not supported; supported: {usual}")
    if set_ones := [key for key in _VARIANTS if stored.get(key)]:
        raise UserError(f"{', '.join(set_ones)} is not supported")


def _shift(stored: Mapping[str, Any]) -> int:
    shift = stored.get("mask_shift", 0)
    if shift not in (0, 1) or isinstance(shift, bool):
        raise UserError(f"{_CONFIG}: mask_shift must be 0 or 1, not {shift!r}")
    return int(shift)


def _inputs(target: ModelConfig) -> dict[str, int]:
    inner = {"o_proj": target.heads * target.head_dim, "down_proj": target.ffn}
    return {name: inner.get(name, target.width) for name in MODULES}


def _parts(target: ModelConfig, shard: Shard) -> tuple[dict[str, slice], dict[str, list[int]]]:
    """What a rank has of A's columns and of B's rows, by the first module of a fused projection; no entry: all."""
    heads, kv = (channels(r, target.head_dim) for r in (shard.heads(target), shard.kv_heads(target)))
    ffn, q, k = shard.ffn(target), target.heads * target.head_dim, target.kv_heads * target.head_dim
    columns = {"o_proj": slice(heads.start, heads.stop), "down_proj": slice(ffn.start, ffn.stop)}
    rows = {
        "q_proj": [*heads, *(q + i for i in kv), *(q + k + i for i in kv)],
        "gate_proj": [*ffn, *(target.ffn + i for i in ffn)],
    }
    return columns, rows


def _positive(stored: Mapping[str, Any], key: str) -> int:
    value = stored.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0 or value != int(value):
        raise UserError(f"{_CONFIG}: {key} must be a positive whole number, not {value!r}")
    return int(value)
