"""Llama-family transformers over Rows: one forward for prefill, decode, chain and tree verification."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.kernels import cpu, registry
from zbench.kernels.add_norm import rms_norm as rms_norm
from zbench.kernels.rope_cache import rotate as rotate
from zbench.models import execution as executions
from zbench.models.adapter import NOT_ADAPTED, AdaptedLayer, LowRank, MaskAdapter, add_low_rank
from zbench.models.attend import BlockAttention, Seen, block_attention
from zbench.models.cache import Cache
from zbench.models.config import ModelConfig
from zbench.models.cost import Cost, Routing, forward_cost
from zbench.models.model import Output, asked, check_room, wanted_rows
from zbench.models.rows import Rows
from zbench.models.team import ALONE, Team
from zbench.records import PreparationRecord


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

    `execution` is "native" (CPU, `kernels/cpu.cpp`), or what runs torch's operators: "eager", "compiled" (a layer by
    torch.compile) or "graph" (`execution.py`); "auto" takes native where it can run, else eager.
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
        """Raises KeyError on missing tensors, NativeUnavailable and ExecutionUnavailable when what was asked for cannot
        be had."""
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
        if execution in ("auto", "native") and not reason:
            try:
                self._native = cpu.Decoder(config, weights, self.inv_freq, dtype)
            except cpu.NativeUnavailable as error:
                reason = str(error)
        if self._native is None:
            if execution == "native":
                raise cpu.NativeUnavailable(reason)
            self._weights = weights
        name = f"native ({cpu.instruction_set()})" if self._native else "torch"
        fallback = {"why_not_native": reason} if reason and self.device.type == "cpu" else {}
        self.kernels = {"forward": name, **fallback, **team.kernels}
        self._run(("native" if self._native else "eager") if execution in ("auto", "native") else execution)

    def _run(self, execution: str) -> None:
        self.execution, self.prepared = execution, list[PreparationRecord]()
        self.graphs: executions.Graphs | None = None
        if execution == "native":
            return
        self._operators = Operators.on(self.device, traced=execution == "compiled")
        self.kernels = {**self.kernels, **self._operators.labels}
        operators: dict[str, Any] = {
            "add_norm": self._operators.add_norm,
            "rope_cache": self._operators.rope_cache,
            "attend": self._operators.attention.attend,
            "eps": self.config.rms_eps,
        }
        self._layer: executions.Layer = partial(run_layer, **operators, reduce=self.team.reduce)
        if execution in ("compiled", "graph"):
            if self.team.size > 1:
                raise executions.ExecutionUnavailable(f"{execution} runs on one rank only")
            self.kernels = {**self.kernels, "forward": f"torch, {execution}"}
        if execution == "compiled":
            self._layer = executions.compiled_layer(run_layer, **operators)
        if execution == "graph":
            self.graphs = executions.graphs_on(self, self.device, self.spans)

    def executed(self, execution: str) -> Transformer:
        """See `Model.executed`."""
        if self._native is not None:
            raise ValueError("the native decoder keeps packed weights only")
        other = copy.copy(self)
        other.kernels = {**self.kernels, "forward": "torch"}
        other._run(execution)
        return other

    @property
    def weights(self) -> Weights:
        """As torch runs them. ValueError where they are packed for the native decoder."""
        if self._weights is None:
            raise ValueError("the native decoder keeps packed weights only")
        return self._weights

    @property
    def decoder(self) -> cpu.Decoder | None:
        """What runs it natively, for a drafter that adds to its layers; None where torch does."""
        return self._native

    @property
    def packed_head(self) -> Tensor | None:
        """See `Model.packed_head`."""
        return None if self._native is None else self._native.packed_head

    @property
    def spans(self) -> bool:
        """Whether the `span` of `body` decides on what is computed. Not for the native decoder."""
        return self._operators.attention.spans

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self.graphs.new_cache(batch, capacity) if self.graphs else self.empty_cache(batch, capacity)

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        return Cache(self._part, batch, capacity, self.dtype, self.device, panels=self._native is not None)

    def cost(
        self,
        rows: int,
        contexts: Sequence[int],
        wanted: int,
        pairs: float | None = None,
        routing: Routing | None = None,
        places: Sequence[Sequence[int]] | None = None,
    ) -> Cost:
        """See `Model.cost`; a dense model has no routing."""
        size, shard = self.dtype.itemsize, self.team.shard
        return forward_cost(self.config, rows, contexts, wanted, size, pairs, shard=shard, places=places)

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
        check_room(rows.ids.shape[1], cache)
        if self.headless and (logits is None or logits.numel()):
            raise ValueError("this model has no head: ask for hidden states only (logits [B, 0])")
        if self.graphs is not None:
            return self.graphs.forward(rows, cache, logits, capture, adapter)
        if self._native is None:
            span = max(cache.sizes) + rows.ids.shape[1]
            if self.execution != "compiled":
                return self.body(rows, cache, logits, capture, adapter, span)
            with executions.compiling(self.prepared, f"{len(rows.ids)} x {rows.ids.shape[1]} rows"):
                return self.body(rows, cache, logits, capture, adapter, span)
        flat, captured = self._native.forward(
            rows.ids.contiguous(),
            rows.positions.contiguous(),
            rows.visible.contiguous(),
            cache.lengths,
            cache.keys,
            cache.values,
            cache.capacity,
            wanted_rows(rows, logits).contiguous(),
            capture,
            None if rows.masks is None else rows.masks.contiguous(),
            None if adapter is None else adapter.native,
        )
        hidden = dict(zip(capture, captured, strict=True)) if capture else {}
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

    def body(
        self,
        rows: Rows,
        cache: Cache,
        logits: Tensor | None,
        capture: Sequence[int],
        adapter: MaskAdapter | None,
        span: int,
    ) -> Output:
        """The forward on torch's operators, attention over the first `span` slots of the cache. Of what the host knows
        it depends on shapes and `span` only, so that it can be a graph."""
        c, weights, operators = self._part, self.weights, self._operators
        batch, count = rows.ids.shape
        slots = cache.lengths[:, None] + torch.arange(count, device=self.device)
        masks = operators.attention.masks(rows, cache, span)
        angles = rows.positions[..., None].float() * self.inv_freq  # [B, R, d/2]
        x = weights.embedding[rows.ids]
        adapted: Sequence[AdaptedLayer] = (NOT_ADAPTED,) * c.layers
        is_mask = None
        if adapter is not None and rows.masks is not None:
            adapted, is_mask = adapter.layers, (rows.masks >= 0)[..., None]
            places = rows.masks.clamp(0, len(adapter.mask_embedding) - 1)
            x = torch.where(is_mask, adapter.mask_embedding[places], x)
        step = LayerStep(
            angles.cos()[:, :, None],
            angles.sin()[:, :, None],
            slots,
            is_mask,
        )
        if self.execution == "compiled":
            step = step.of_any_size()
        hidden: dict[int, Tensor] = {}
        norms = [*(layer.attention_norm for layer in weights.layers), weights.norm]
        x, inner = operators.add_norm(x, None, norms[0], c.rms_eps)
        for index, (layer, low) in enumerate(zip(weights.layers, adapted, strict=True)):
            if index in capture:
                hidden[index] = x.float()
            seen = masks(c.windows[index] if c.windows else None)
            keys, values = cache.keys[index], cache.values[index]
            x, inner = self._layer(x, inner, layer, low, step, keys, values, seen, norms[index + 1])
        if c.layers in capture:
            hidden[c.layers] = x.float()
        if self.headless:
            return Output(torch.empty(batch, 0, c.vocab, device=self.device), hidden)
        found = self.head(asked(inner.flatten(0, 1), rows, logits))
        return Output(found.view(batch, -1, self.config.vocab), hidden)


@dataclass(frozen=True, slots=True)
class Operators:
    """What runs the parts of a layer for which there are kernels."""

    add_norm: Callable[..., tuple[Tensor, Tensor]]
    rope_cache: Callable[..., Tensor]
    attention: BlockAttention
    labels: dict[str, str]

    @classmethod
    def on(cls, device: torch.device, traced: bool) -> Operators:
        """Chosen by the registry; torch's where torch.compile traces them, as it has to see what it fuses."""

        def choice(name: str) -> registry.Choice:
            if traced:
                return registry.Choice(registry.get(name).reference, "torch (compiled)")
            return registry.choose(name, device)

        add_norm, rope_cache = choice("add_norm"), choice("rope_cache")
        attention = block_attention(choice("block_attention"))
        labels = {"attention": attention.label, "add_norm": add_norm.label, "rope_cache": rope_cache.label}
        labels["commit"] = registry.choose("commit", device).label
        return cls(add_norm.call, rope_cache.call, attention, labels)


@dataclass(frozen=True, slots=True)
class LayerStep:
    """What all layers share in one forward."""

    cos: Tensor  # [B, R, 1, d/2]
    sin: Tensor
    slots: Tensor  # [B, R] where each row goes in the cache
    is_mask: Tensor | None  # [B, R, 1] bool: rows that the adapter acts on; None where it acts on none

    def of_any_size(self) -> LayerStep:
        """Marked so that any number of rows runs the same compiled layer."""
        for tensor in (self.cos, self.sin, self.slots, self.is_mask):
            if tensor is not None:
                executions.any_size(tensor, 1)
        return self


def run_layer(
    x: Tensor,
    inner: Tensor,
    layer: Layer,
    low: AdaptedLayer,
    step: LayerStep,
    keys: Tensor,
    values: Tensor,
    seen: Seen,
    following: Tensor,
    *,
    add_norm: Callable[..., tuple[Tensor, Tensor]],
    rope_cache: Callable[..., Tensor],
    attend: Callable[..., Tensor],
    eps: float,
    reduce: Callable[[Tensor], Tensor] = lambda part: part,
) -> tuple[Tensor, Tensor]:
    """One block: the residual stream x [B, R, D] and its norm `inner` to the same behind the block.

    A norm follows every addition to the stream, so that both are one operator; the last is that of the next block, or
    the final one: its weight is `following` [D]. Writes the rows' keys and values into this layer's [B, kv, S, d], and
    attends to what is `seen` there.
    """

    def project(inner: Tensor, weight: Tensor, bias: Tensor | None, pair: LowRank | None) -> Tensor:
        return add_low_rank(F.linear(inner, weight, bias), inner, pair, step.is_mask)

    qkv = project(inner, layer.qkv, layer.qkv_bias, low.qkv)
    q = rope_cache(qkv, step.cos, step.sin, layer.q_norm, layer.k_norm, eps, keys, values, step.slots)
    mixed = attend(q, keys, values, seen)
    x, inner = add_norm(x, reduce(project(mixed, layer.out, layer.out_bias, low.out)), layer.mlp_norm, eps)
    gate, up = project(inner, layer.gate_up, layer.gate_up_bias, low.gate_up).chunk(2, -1)
    added = reduce(project(F.silu(gate) * up, layer.down, layer.down_bias, low.down))
    return add_norm(x, added, following, eps)


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
