"""Llama-family transformers over Rows: one forward for prefill, decode, chain and tree verification."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.kernels import cpu, registry
from zbench.kernels.add_norm import rms_norm as rms_norm
from zbench.kernels.rope_cache import rotate as rotate
from zbench.models.adapter import NOT_ADAPTED, AdaptedLayer, MaskAdapter, add_low_rank
from zbench.models.attend import BlockAttention
from zbench.models.cache import Cache
from zbench.models.config import ModelConfig
from zbench.models.cost import Cost, Routing, forward_cost
from zbench.models.model import Output, wanted_rows
from zbench.models.rows import Rows
from zbench.models.team import ALONE, Team


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's parameters, projections that read the same input fused."""

    qkv: Tensor  # [(H + 2 kv) d, D]
    out: Tensor  # [D, H d]
    gate_up: Tensor  # [2 F, D]
    down: Tensor  # [D, F]
    attention_norm: Tensor  # [D]
    mlp_norm: Tensor  # [D]
    q_norm: Tensor | None  # [d]
    k_norm: Tensor | None  # [d]
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: Tensor  # [V, D]
    layers: tuple[Layer, ...]
    norm: Tensor  # [D]
    head: Tensor | None  # [V, D]; the embedding itself when tied; None for a drafter that uses its target's

    @classmethod
    def from_hf(
        cls, tensors: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype, device, headless: bool = False
    ) -> Weights:
        """Hugging Face tensor names (`model.layers.0.self_attn.q_proj.weight`, ...) to fused tensors."""

        def get(name: str) -> Tensor | None:
            tensor = tensors.get(name)
            return None if tensor is None else tensor.to(device=device, dtype=dtype)

        def need(name: str) -> Tensor:
            tensor = get(name)
            if tensor is None:
                raise KeyError(f"tensor {name} is missing")
            return tensor

        def fuse(prefix: str, names: Sequence[str], suffix: str) -> Tensor | None:
            parts = [get(f"{prefix}{name}.{suffix}") for name in names]
            present = [part for part in parts if part is not None]
            if not present:
                return None
            if len(present) != len(parts):
                raise KeyError(f"{prefix}: some of {', '.join(names)} have a {suffix}, some have none")
            return torch.cat(present)

        def layer(index: int) -> Layer:
            base = f"model.layers.{index}."
            attention, mlp = f"{base}self_attn.", f"{base}mlp."
            qkv = fuse(attention, ("q_proj", "k_proj", "v_proj"), "weight")
            gate_up = fuse(mlp, ("gate_proj", "up_proj"), "weight")
            if qkv is None or gate_up is None:
                raise KeyError(f"tensors of layer {index} are missing")
            return Layer(
                qkv=qkv,
                out=need(f"{attention}o_proj.weight"),
                gate_up=gate_up,
                down=need(f"{mlp}down_proj.weight"),
                attention_norm=need(f"{base}input_layernorm.weight"),
                mlp_norm=need(f"{base}post_attention_layernorm.weight"),
                q_norm=get(f"{attention}q_norm.weight"),
                k_norm=get(f"{attention}k_norm.weight"),
                qkv_bias=fuse(attention, ("q_proj", "k_proj", "v_proj"), "bias"),
                out_bias=get(f"{attention}o_proj.bias"),
                gate_up_bias=fuse(mlp, ("gate_proj", "up_proj"), "bias"),
                down_bias=get(f"{mlp}down_proj.bias"),
            )

        embedding = need("model.embed_tokens.weight")
        return cls(
            embedding=embedding,
            layers=tuple(layer(i) for i in range(config.layers)),
            norm=need("model.norm.weight"),
            head=None if headless else embedding if config.tied else need("lm_head.weight"),
        )


class Transformer:
    """A loaded model on one device.

    `execution` is "native" (CPU, `kernels/cpu.cpp`) or "torch"; "auto" takes native where it can run.
    `self.kernels` says which implementation runs each operator, for the run's record. `self.embedding` [V, D] and
    `head` may be shared by a drafter; a `headless` model has layers only and gives hidden states, no logits. With a
    `team` this is one rank's part of it, run by torch.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        execution: str = "auto",
        headless: bool = False,
        team: Team = ALONE,
    ) -> None:
        """Raises KeyError on missing tensors, NativeUnavailable when native was asked for and cannot be had."""
        self.config, self.dtype, self.device, self.headless = config, dtype, torch.device(device), headless
        self.team, self._part = team, team.shard.of(config)
        self.inv_freq = inverse_frequencies(config).to(self.device)
        weights = Weights.from_hf(team.shard.tensors(tensors, config), config, dtype, self.device, headless)
        if team.size > 1 and config.tied:
            mine = team.shard.vocab(config)
            weights = replace(weights, head=weights.embedding[mine.start : mine.stop])
        self.embedding, self._norm = weights.embedding, weights.norm.float()
        self._native: cpu.Decoder | None = None
        self._weights: Weights | None = None
        reason = "" if self.device.type == "cpu" else f"device is {self.device.type}"
        if team.size > 1:
            reason = "the native decoder runs on one rank only"
        if execution != "torch" and not reason:
            try:
                self._native = cpu.Decoder(config, weights, self.inv_freq, dtype)
            except cpu.NativeUnavailable as error:
                reason = str(error)
        if self._native is None:
            if execution == "native":
                raise cpu.NativeUnavailable(reason)
            self._weights = weights
        self._add_norm, self._rope_cache = (registry.choose(name, self.device) for name in ("add_norm", "rope_cache"))
        self.execution = "native" if self._native else "torch"
        name = f"native ({cpu.instruction_set()})" if self._native else "torch"
        fallback = {"why_not_native": reason} if reason and self.device.type == "cpu" else {}
        self.kernels = {"forward": name, **fallback, **team.kernels}
        self._attention = None if self._native else BlockAttention(self.device)
        if self._attention:
            self.kernels["attention"] = self._attention.label
            self.kernels |= {op: registry.choose(op, self.device).label for op in ("add_norm", "rope_cache", "commit")}

    @property
    def weights(self) -> Weights:
        """As torch runs them. ValueError where they are packed for the native decoder."""
        if self._weights is None:
            raise ValueError("the native decoder keeps packed weights only")
        return self._weights

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return Cache(self._part, batch, capacity, self.dtype, self.device, panels=self._native is not None)

    def cost(
        self,
        rows: int,
        contexts: Sequence[int],
        wanted: int,
        pairs: float | None = None,
        routing: Routing | None = None,
    ) -> Cost:
        """See `Model.cost`; a dense model has no routing."""
        return forward_cost(self.config, rows, contexts, wanted, self.dtype.itemsize, pairs, shard=self.team.shard)

    @torch.inference_mode()
    def forward(
        self,
        rows: Rows,
        cache: Cache,
        *,
        logits: Tensor | None = None,
        capture: Sequence[int] = (),
        adapter: MaskAdapter | None = None,
    ) -> Output:
        """See `Model.forward`."""
        wanted = wanted_rows(rows, cache, logits)
        if self.headless and wanted.numel():
            raise ValueError("this model has no head: ask for hidden states only (logits [B, 0])")
        if self._native is not None:
            flat, captured = self._native.forward(
                rows.ids.contiguous(),
                rows.positions.contiguous(),
                rows.visible.contiguous(),
                cache.lengths,
                cache.keys,
                cache.values,
                cache.capacity,
                wanted.contiguous(),
                capture,
                None if rows.masks is None else rows.masks.contiguous(),
                None if adapter is None else adapter.native,
            )
            hidden = dict(zip(capture, captured, strict=True))
        else:
            flat, hidden = self._torch_forward(rows, cache, wanted, capture, adapter)
        return Output(flat.view(rows.ids.shape[0], -1, self.config.vocab), hidden)

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] that passed a final norm -> logits [..., V] float32. Not for a headless model."""
        if self._native is not None:
            return self._native.head(hidden)
        assert self._weights is not None and self._weights.head is not None
        mine = F.linear(hidden.to(self.dtype), self._weights.head).float()
        return self.team.gather_vocab(mine, self.config)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        return self.head(rms_norm(hidden, self._norm, self.config.rms_eps))

    def _torch_forward(
        self, rows: Rows, cache: Cache, wanted: Tensor, capture: Sequence[int], adapter: MaskAdapter | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        c, weights, team = self._part, self._weights, self.team
        assert weights is not None and self._attention is not None
        count = rows.ids.shape[1]
        slots = cache.lengths[:, None] + torch.arange(count, device=self.device)
        attend = self._attention.of(rows, cache, max(cache.sizes) + count)
        angles = rows.positions[..., None].float() * self.inv_freq  # [B, R, d/2]
        cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
        x = weights.embedding[rows.ids]
        adapted: Sequence[AdaptedLayer] = (NOT_ADAPTED,) * c.layers
        masked = rows.ids.new_zeros(0)
        if adapter is not None and rows.masks is not None:
            masks, adapted = rows.masks.reshape(-1), adapter.layers
            masked = (masks >= 0).nonzero().squeeze(1)
            places = masks[masked].clamp(max=len(adapter.mask_embedding) - 1)
            x = x.flatten(0, 1).index_copy(0, masked, adapter.mask_embedding[places]).view_as(x)
        hidden: dict[int, Tensor] = {}
        added: Tensor | None = None  # what the MLP of the layer before adds to the residual stream
        for index, (layer, low) in enumerate(zip(weights.layers, adapted, strict=True)):
            x, inner = self._add_norm.call(x, added, layer.attention_norm, c.rms_eps)
            if index in capture:
                hidden[index] = x.float()
            qkv = add_low_rank(F.linear(inner, layer.qkv, layer.qkv_bias), inner, low.qkv, masked)
            q = self._rope_cache.call(
                qkv, cos, sin, layer.q_norm, layer.k_norm, c.rms_eps, cache.keys[index], cache.values[index], slots
            )
            inner = attend(index, q, c.windows[index] if c.windows else None)
            added = team.reduce(add_low_rank(F.linear(inner, layer.out, layer.out_bias), inner, low.out, masked))
            x, inner = self._add_norm.call(x, added, layer.mlp_norm, c.rms_eps)
            both = add_low_rank(F.linear(inner, layer.gate_up, layer.gate_up_bias), inner, low.gate_up, masked)
            gate, up = both.chunk(2, -1)
            inner = F.silu(gate) * up
            added = team.reduce(add_low_rank(F.linear(inner, layer.down, layer.down_bias), inner, low.down, masked))
        x = x if added is None else x + added
        if c.layers in capture:
            hidden[c.layers] = x.float()
        if self.headless:
            return torch.empty(0, c.vocab, device=self.device), hidden
        return self.head(rms_norm(x.flatten(0, 1)[wanted], weights.norm, c.rms_eps)), hidden


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """[d/2] float32 rotary frequencies, with linear and llama3 scaling as in the Llama 3.1 release."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    base = 1.0 / (config.rope_theta**half)
    scaling = config.rope_scaling
    if scaling is None:
        return base
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return base / factor
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / base
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * base / factor + blend * base
