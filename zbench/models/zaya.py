"""ZAYA1 over Rows: compressed convolutional attention and one expert per row (formulas and names: `zaya_config.py`).

Per layer, with r the residual stream (float32 throughout), and prev(x) the value of x at the row's parent:

    h    = RMSNorm(r);  z = [q~, k~] = [Wq h, Wk h]
    y1   = wd0 prev(z) + wd1 z + bd;  y2 = Wg0 prev(y1) + Wg1 y1 + bg     depthwise, then one matrix per head
    q, k = y2 + [(q~ + k~)/2, mean of those of a group]                    per head; k~ shared by its group of heads
    v    = [Wc h, prev(Wd h)]                                              half of the values are a token late
    q, k = sqrt(d) q/|q|, temp sqrt(d) k/|k|;  rotary positions on the first dimensions of each head
    r    = scale(Wo attention(q, k, v), r)
    h    = RMSNorm(r);  s = Wr h + br + scale_r s'                         s' is the router's state in the layer before
    p    = softmax(MLP(RMSNorm(s)));  e = argmax(p + balance);  m = p[e] expert_e(h), or 0 where e is the last class
    r    = scale(m, r)                          scale(x, r) = (x + b) s + (r + b') s', learned vectors

A parent may be a row of this forward or the end of the committed prefix, so that chains, trees and masked blocks are
the same to the convolutions. What they need of the prefix is the state that `ZayaCache` carries.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.kernels import ccgqa, cpu, registry
from zbench.models import execution as executions
from zbench.models.adapter import MaskAdapter
from zbench.models.attend import block_attention
from zbench.models.cache import Cache, on_device
from zbench.models.cost import Cost, Routing, forward_cost
from zbench.models.model import Output, asked, check_room, count_choices
from zbench.models.projection import Projection
from zbench.models.rows import Rows
from zbench.models.team import ALONE, Team
from zbench.models.transformer import rms_norm
from zbench.models.zaya_config import CONV_TAPS, ZayaConfig
from zbench.records import PreparationRecord


class ZayaCache(Cache):
    """Keys and values, and per sequence and layer what a next row needs of the last two committed tokens.

    `mixed` [L, B, 2, z]: the convolutions' input at each; `delayed` [L, B, 1, kv d / 2]: the late half of the values
    at the last. Zeros before the first token.
    """

    def __init__(
        self,
        config: ZayaConfig,
        delayed: int,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        state: torch.dtype,
        device,
    ) -> None:
        """`config` and `delayed`, the delayed channels of the values, are those of this rank's part."""
        super().__init__(config, batch, capacity, dtype, device)
        shape = (config.layers, batch)
        self.mixed = torch.zeros(*shape, CONV_TAPS, config.mixed, dtype=state, device=device)
        self.delayed = torch.zeros(*shape, 1, delayed, dtype=state, device=device)
        self._sequence = torch.arange(batch, device=device)[:, None]

    def begin(self, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Room for the rows of a forward behind the state: mixed [L, B, 2 + R, z], delayed [L, B, 1 + R, kv d / 2]."""
        rows = parents.shape[1]
        mixed, delayed = (F.pad(state, (0, 0, 0, rows)) for state in (self.mixed, self.delayed))
        self.pending = (parents, mixed, delayed)
        return mixed, delayed

    def extend(self, counts: Sequence[int]) -> None:
        self._keep(on_device(counts, self.lengths.device) - 1)
        super().extend(counts)

    def commit(self, kept: Tensor, counts: Sequence[int]) -> None:
        ends = on_device(counts, self.lengths.device)[:, None] - 1
        last = kept.gather(1, ends.clamp(min=0))
        self._keep(torch.where(ends < 0, ends, last)[:, 0])
        super().commit(kept, counts)

    def truncate(self, sizes: Sequence[int]) -> None:
        """Raises ValueError for a prefix other than all of it or none: the state of tokens in between is not kept."""
        if any(new not in (0, old) for new, old in zip(sizes, self.sizes, strict=True)):
            raise ValueError(f"cannot truncate {self.sizes} to {list(sizes)}: the state there is not kept")
        emptied = [sequence for sequence, size in enumerate(sizes) if size == 0]
        self.mixed[:, emptied] = 0
        self.delayed[:, emptied] = 0
        super().truncate(sizes)

    def _keep(self, last: Tensor) -> None:
        """Move the state on to row last[b] of the last forward; -1 leaves it where it is."""
        if self.pending is None:
            raise ValueError("nothing to commit: every forward is committed once")
        parents, mixed, delayed = self.pending
        last = last[:, None]
        before = torch.where(last < 0, -CONV_TAPS, parents.gather(1, last.clamp(min=0)))
        self.mixed.copy_(mixed[:, self._sequence, CONV_TAPS + torch.cat([before, last], 1)])
        self.delayed.copy_(delayed[:, self._sequence, 1 + last])
        self.pending = None  # of a long prefill this is larger than its keys and values


@dataclass(frozen=True, slots=True)
class Scaling:
    """(x + bias) scale + (r + residual_bias) residual_scale, all vectors [D] float32."""

    scale: Tensor
    bias: Tensor
    residual_scale: Tensor
    residual_bias: Tensor

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        return (x + self.bias) * self.scale + (residual + self.residual_bias) * self.residual_scale


class Router:
    """Sends each row to one expert, or to none."""

    def __init__(self, weights: _Layer, eps: float) -> None:
        self.eps = eps
        self.down, self.down_bias = weights.linear("gate.down_proj"), weights.vector("gate.down_proj.bias")
        self.carried = weights.optional("gate.router_states_scale")
        self.norm = weights.vector("gate.router_mlp.norm.weight")
        self.hidden = [
            (weights.linear(f"gate.router_mlp.{fc}"), weights.vector(f"gate.router_mlp.{fc}.bias"))
            for fc in ("fc1", "fc2")
        ]
        self.out = weights.linear("gate.router_mlp.out_proj")
        self.balance = weights.exact("gate.balancing_biases")

    def __call__(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, D] and the state [N, W] of the layer before -> choice [N], its probability [N, 1], state [N, W]."""
        own = self.down(x) + self.down_bias
        if state is not None and self.carried is not None:
            own = own + state * self.carried
        inner = rms_norm(own, self.norm, self.eps)
        for linear, bias in self.hidden:
            inner = F.gelu(linear(inner) + bias)
        probs = self.out(inner).float().softmax(-1)
        choice = (probs + self.balance).argmax(-1)
        return choice, probs.gather(1, choice[:, None]), own


class Experts:
    """The gated MLPs of one layer, of which each row is computed by one. On the native kernel and on Triton's a
    row's sums do not depend on what other rows chose; torch's grouped products may round them otherwise."""

    def __init__(self, gate_up: Tensor, down: Tensor, call: Callable[..., Tensor] | None) -> None:
        """gate_up [E, 2 F, D], down [E, D, F]; `call` runs the operator "experts", None the native kernel."""
        self.count, self._call = len(down), call
        self._native = [] if call else [(Projection(a), Projection(b)) for a, b in zip(gate_up, down, strict=True)]
        self._stacked = (gate_up, down) if call else ()

    def __call__(self, x: Tensor, choice: Tensor) -> Tensor:
        """x [N, D], choice [N] in 0 .. E -> [N, D]; choice E skips and gives zeros."""
        return self._call(x, choice, *self._stacked) if self._call else self._one_by_one(x, choice)

    def _one_by_one(self, x: Tensor, choice: Tensor) -> Tensor:
        """On the CPU, where asking which experts were hit waits for nothing."""
        out = torch.zeros_like(x)
        for expert in choice.unique().tolist():
            if expert < self.count:
                gate_up, down = self._native[expert]
                rows = (choice == expert).nonzero()[:, 0]
                gate, up = gate_up(x[rows]).chunk(2, -1)
                out[rows] = down(F.silu(gate) * up)
        return out


class _Layer:
    """Names of one layer's tensors to what runs them."""

    def __init__(self, model: Zaya, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self._model, self._tensors, self._prefix = model, tensors, prefix

    def stored(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """On the device, in the model's dtype."""
        if self._prefix + name not in self._tensors:
            raise KeyError(f"tensor {self._prefix}{name} is missing")
        return self._tensors[self._prefix + name].to(device=self._model.device, dtype=dtype or self._model.dtype)

    def linear(self, *names: str) -> Projection:
        """One projection for weights that read the same input."""
        return Projection(torch.cat([self.stored(f"{name}.weight") for name in names]), self._model.native)

    def vector(self, name: str) -> Tensor:
        return self.stored(name).to(self._model.activations)

    def exact(self, name: str) -> Tensor:
        """In float32: rounding it would send rows elsewhere, or the residual stream is float32 too."""
        return self.stored(name, torch.float32)

    def optional(self, name: str) -> Tensor | None:
        return self.vector(name) if self._prefix + name in self._tensors else None


class Block:
    """One layer: attention, then experts."""

    def __init__(self, model: Zaya, tensors: Mapping[str, Tensor], index: int) -> None:
        c = model.part
        layer, mlp = (_Layer(model, tensors, f"model.layers.{index}.{part}") for part in ("", "mlp."))
        qkv = "self_attn.qkv_proj."
        self.attention_norm, self.mlp_norm = (
            layer.vector(f"{name}_layernorm.weight") for name in ("input", "post_attention")
        )
        self.qkv = layer.linear(*(f"{qkv}{part}" for part in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")))
        self.out = layer.linear("self_attn.o_proj")
        grouped = layer.vector(f"{qkv}conv_qk_grouped.weight").view(-1, c.head_dim, c.head_dim, CONV_TAPS)
        self.front = ccgqa.Front(
            depthwise=layer.vector(f"{qkv}conv_qk_depthwise.weight")[:, 0].t().contiguous(),
            depthwise_bias=layer.vector(f"{qkv}conv_qk_depthwise.bias"),
            grouped=grouped.permute(0, 3, 2, 1).flatten(1, 2).contiguous(),
            grouped_bias=layer.vector(f"{qkv}conv_qk_grouped.bias").view(-1, c.head_dim),
            temp=layer.vector("self_attn.qk_norm.temp"),
        )
        self.after_attention, self.after_mlp = (
            Scaling(
                *(
                    layer.exact(f"post_{part}_residual_scale.{name}")
                    for name in ("hidden_states_scale", "hidden_states_bias", "residual_scale", "residual_bias")
                )
            )
            for part in ("attention", "mlp")
        )
        self.router = Router(mlp, c.rms_eps)
        gate_up, down = (mlp.stored(f"experts.{part}").contiguous() for part in ("gate_up_proj", "down_proj"))
        self.experts = Experts(gate_up, down, None if model.native else model.operators["experts"].call)


class Zaya:
    """A loaded model on one device; a `Model`.

    `execution` "auto" takes the native CPU kernel for the projections where it can run, else it is eager: Triton's
    kernels where they can run, and torch for all else. "native" insists on the first, "graph" records the second
    (`execution.py`). With a `team` this is one rank's part of the model.
    """

    def __init__(
        self,
        config: ZayaConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        execution: str = "auto",
        team: Team = ALONE,
    ) -> None:
        """`tensors` by their Hugging Face names. Raises KeyError on missing ones, NativeUnavailable and
        ExecutionUnavailable when what was asked for cannot be had."""
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.team, self.part, tensors = team, team.shard.of(config), team.shard.tensors(tensors, config)
        self.delayed = len(team.shard.values(config)[1])  # channels of the values that come from the token before
        reason = self._why_not_native() if execution in ("auto", "native") else f"{execution} was asked for"
        if execution == "native" and reason:
            raise cpu.NativeUnavailable(reason)
        self.native = not reason
        # The native kernel takes and gives float32, so that is what flows between projections there.
        self.activations = torch.float32 if self.native else dtype
        self.attention = block_attention(registry.choose("block_attention", self.device))
        self.operators = {name: registry.choose(name, self.device) for name in ("ccgqa", "experts")}
        self.kernels = {
            "forward": "torch",
            "attention": self.attention.label,
            **{name: choice.label for name, choice in self.operators.items()},
            "commit": registry.choose("commit", self.device).label,
        }
        if self.native:
            name = f"native ({cpu.instruction_set()})"
            self.kernels |= {"projections": name, "experts": f"{name}, one after another"}
        elif execution == "auto" and self.device.type == "cpu":
            self.kernels["why_not_native"] = reason
        self.kernels |= team.kernels
        outer = _Layer(self, tensors, "model.")
        self.embedding = outer.stored("embed_tokens.weight")
        self._scale, self._bias = (outer.exact(f"input_hidden_states_{name}") for name in ("scale", "bias"))
        self._blocks = [Block(self, tensors, index) for index in range(config.layers)]
        self._norm = outer.vector("norm.weight")
        mine = team.shard.vocab(config)
        tied = self.embedding[mine.start : mine.stop]
        head = tied if config.tied else _Layer(self, tensors, "").stored("lm_head.weight")
        self._head = Projection(head, self.native)
        pairs = torch.arange(0, config.rotary_dim, 2, device=self.device).float() / config.rotary_dim
        self._inv_freq = 1.0 / config.rope_theta**pairs
        self._run("native" if self.native else "eager" if execution == "auto" else execution)

    def _run(self, execution: str) -> None:
        self.execution, self.prepared = execution, list[PreparationRecord]()
        self.graphs: executions.Graphs | None = None
        if execution == "compiled":
            raise executions.ExecutionUnavailable("compiled is for dense transformers, not for zaya")
        if execution == "graph":
            if self.team.size > 1:
                raise executions.ExecutionUnavailable("graph runs on one rank only")
            self.kernels = {**self.kernels, "forward": "torch, graph"}
            self.graphs = executions.graphs_on(self, self.device, self.attention.spans)

    def executed(self, execution: str) -> Zaya:
        """See `Model.executed`."""
        if self.native:
            raise ValueError("the native kernels keep packed weights only")
        other = copy.copy(self)
        other.kernels = {**self.kernels, "forward": "torch"}
        other._run(execution)
        return other

    def _why_not_native(self) -> str:
        if self.device.type != "cpu":
            return f"device is {self.device.type}"
        if self.dtype not in (torch.float32, torch.bfloat16):
            return f"{self.dtype} is not supported by the native CPU kernels"
        return cpu.unavailable_reason() or ""

    def new_cache(self, batch: int, capacity: int) -> Cache:
        return self.graphs.new_cache(batch, capacity) if self.graphs else self.empty_cache(batch, capacity)

    def empty_cache(self, batch: int, capacity: int) -> ZayaCache:
        return ZayaCache(self.part, self.delayed, batch, capacity, self.dtype, self.activations, self.device)

    def cost(
        self,
        rows: int,
        contexts: Sequence[int],
        wanted: int,
        pairs: float | None = None,
        routing: Routing | None = None,
        places: Sequence[Sequence[int]] | None = None,
    ) -> Cost:
        """See `Model.cost`; no layer has a sliding window."""
        return forward_cost(self.config, rows, contexts, wanted, self.dtype.itemsize, pairs, routing, self.team.shard)

    @property
    def packed_head(self) -> Tensor | None:
        """See `Model.packed_head`."""
        return self._head.packed if self.team.size == 1 else None

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] that passed a final norm -> logits [..., V] float32."""
        return self.team.gather_vocab(self._head(hidden.float()), self.config)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `Model.logits`."""
        return self.head(self._normed(hidden, self._norm))

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
        """See `Model.forward`; the cache is one of `new_cache`."""
        if adapter is not None:
            raise ValueError("mask adapters fit dense transformers only")
        check_room(rows.ids.shape[1], cache)
        if self.graphs is not None:
            return self.graphs.forward(rows, cache, logits, capture, adapter)
        return self.body(rows, cache, logits, capture, adapter, max(cache.sizes) + rows.ids.shape[1])

    def body(
        self,
        rows: Rows,
        cache: Cache,
        logits: Tensor | None,
        capture: Sequence[int],
        adapter: MaskAdapter | None,
        span: int,
    ) -> Output:
        """See `execution.Graphable`."""
        assert isinstance(cache, ZayaCache)
        c, batch = self.config, len(rows.ids)
        step = _Step(self, rows, cache, span)
        x = (self.embedding[rows.ids].float() + self._bias) * self._scale
        state: Tensor | None = None
        choices: list[Tensor] = []
        hidden: dict[int, Tensor] = {}
        for index, block in enumerate(self._blocks):
            if index in capture:
                hidden[index] = x
            mixed = step.attend(index, block, self._normed(x, block.attention_norm))
            x = block.after_attention(self._sum(block.out(mixed)), x)
            flat = self._normed(x, block.mlp_norm).flatten(0, 1)
            choice, weight, state = block.router(flat, state)
            choices.append(choice)
            x = block.after_mlp((self._sum(block.experts(flat, choice)) * weight).view_as(x), x)
        if c.layers in capture:
            hidden[c.layers] = x
        found = self.logits(asked(x.flatten(0, 1), rows, logits))
        return Output(found.view(batch, -1, c.vocab), hidden, count_choices(choices, c.experts))

    def _sum(self, part: Tensor) -> Tensor:
        """Over the ranks; it travels in the model's own type, which the native kernel does not give."""
        return self.team.reduce(part, self.dtype)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x.to(self.activations), weight, self.config.rms_eps)


class _Step:
    """What the attention of all layers shares in one forward."""

    def __init__(self, model: Zaya, rows: Rows, cache: ZayaCache, span: int) -> None:
        self.cache, self.front = cache, model.operators["ccgqa"].call
        self.places = ccgqa.Places.of(rows.parents, cache.lengths)
        self.mix, self.seen = model.attention.attend, model.attention.masks(rows, cache, span)(None)
        angles = rows.positions[..., None].float() * model._inv_freq
        self.cos, self.sin = angles.cos(), angles.sin()  # [B, R, rotary / 2]
        self.mixed, self.delayed = cache.begin(rows.parents)

    def attend(self, index: int, block: Block, h: Tensor) -> Tensor:
        """h [B, R, D] -> what the heads mixed [B, R, H d]."""
        keys, values = self.cache.keys[index], self.cache.values[index]
        projected, state = block.qkv(h), (self.mixed[index], self.delayed[index])
        queries = self.front(projected, *state, self.places, self.cos, self.sin, block.front, keys, values)
        return self.mix(queries, keys, values, self.seen).to(h.dtype)
