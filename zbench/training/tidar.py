"""TiDAR as an adapter: a frozen model learns to fill in masks (Liu et al. 2025, arXiv 2511.08923, as low-rank updates).

Training feeds what decoding feeds. At decode time the model's own head says the token at position p; a block of B is
that token and what B - 1 masks predict behind it. The masks stand at p, p + 1, .. and see the clean tokens before p and
each other; mask j predicts the token at p + j + 1, the one after its place, as the model's rows always have (`shift` of
the adapter; the paper's masks predict their own place, which costs one more for the token that is known anyway).
The clean tokens' keys and values come from the frozen model, which no mask can influence, so they are read once per
conversation and serve many blocks at random positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.models.adapter import (
    AdapterCheckpoint,
    AdapterConfig,
    MaskAdapter,
    adapter_shapes,
    save_adapter,
)
from zbench.models.transformer import inverse_frequencies, rotate
from zbench.training.attention import block_attention, draw_anchors
from zbench.training.losses import OTHERS, head_loss, sampled_head
from zbench.training.norm import rms_norm
from zbench.training.target import Read, Target, by_sequence, sparse_targets
from zbench.training.trainer import Scores, adopt


@dataclass(frozen=True, slots=True)
class TidarSettings:
    block: int = 8  # tokens, the first of which no mask predicts
    rank: int = 24
    anchors: int = 40  # blocks per conversation and step; more short ones, for as many masks
    short: float = 0.7  # share of the steps that train short blocks: near places are worth most
    short_block: int | None = None  # tokens; None: half a block
    soft: float = 0.5  # share of the loss on the model's own distribution, the rest on its text
    decay: float = 0.85  # of the weight, per place


class Tidar:
    """`parameters` in PEFT's names, float32."""

    name = "tidar"

    def __init__(
        self, target: Target, settings: TidarSettings, seed: int, start: AdapterCheckpoint | None = None
    ) -> None:
        """`start` is what was trained before, if anything was."""
        self.target, self.settings = target, settings
        c = target.config
        self.config = AdapterConfig(settings.rank, float(settings.rank), settings.block, settings.block - 1, shift=1)
        generator = torch.Generator().manual_seed(seed)
        self.parameters: dict[str, Tensor] = {}
        for name, shape in adapter_shapes(self.config, c).items():
            if name.endswith("lora_B.weight"):
                tensor = torch.zeros(shape)  # the adapted model starts as the bare one
            elif name.endswith("lora_A.weight"):
                tensor = torch.empty(shape).normal_(0.0, shape[1] ** -0.5, generator=generator)
            else:
                mean = target.weights.embedding.float().mean(0).cpu()
                tensor = mean + torch.empty(shape).normal_(0.0, 0.02, generator=generator)
            self.parameters[name] = tensor.to(target.device).requires_grad_()
        if start:
            adopt(self.parameters, self.config, start)
        self._inv_freq = inverse_frequencies(c).to(target.device)
        self.capture: tuple[int, ...] = ()
        self.context = self.asks = True

    @property
    def rows(self) -> tuple[int, int]:
        return self.settings.anchors * (self.settings.block - 1), self.target.config.layers

    def score(self, read: Read, generator: torch.Generator, evaluate: bool = False) -> Scores:
        s = self.settings
        short = not evaluate and bool(torch.rand((), generator=generator) < s.short)
        masks = (min(s.short_block or max(s.block // 2, 2), s.block) if short else s.block) - 1
        allowed = read.batch.whole(masks + 1)
        anchors, real = draw_anchors(allowed, s.anchors * (s.block - 1) // masks, generator)
        ahead = 1 + torch.arange(masks, device=anchors.device)
        places = (anchors[..., None] + ahead).clamp(max=allowed.shape[1] - 1)
        hidden = self._forward(read, anchors, masks)  # [S, A, masks, D] after the final norm
        ids, probs = sparse_targets(read, by_sequence(places), s.soft)
        by_place = torch.tensor([s.decay**j for j in range(masks)], device=anchors.device)
        weights = (real[..., None] * by_place).flatten()
        head, bias, ids = self.target.head, None, ids.flatten(0, -2)
        if not evaluate:  # then nobody asks which token is the likeliest of all
            head, bias, ids = sampled_head(head, ids, OTHERS, generator)
        total, best = head_loss(hidden.flatten(0, -2), head, ids, probs.flatten(0, -2), weights, bias)
        right = best.view_as(places) == read.batch.ids[by_sequence(places)]
        weight = weights.sum()
        return Scores(total / weight.clamp(min=1.0), right[real], int(real.sum()) * masks, weight)

    def _forward(self, read: Read, anchors: Tensor, masks: int) -> Tensor:
        target, c, weights = self.target, self.target.config, self.target.weights
        adapter = MaskAdapter(
            AdapterCheckpoint(self.config, self.parameters, "", "in training"), c, target.dtype, target.device
        )
        batch, count = anchors.shape
        steps = torch.arange(masks, device=anchors.device)
        angles = (anchors[..., None] + steps).reshape(-1, 1, 1).float() * self._inv_freq
        cos, sin = angles.cos(), angles.sin()  # [N, 1, d/2]
        longest = int(anchors.max())
        assert read.keys is not None and read.values is not None
        x = adapter.mask_embedding[:masks].expand(batch * count, -1, -1).reshape(-1, c.width)
        for index, (layer, low) in enumerate(zip(weights.layers, adapter.layers, strict=True)):
            inner = rms_norm(x, layer.attention_norm, c.rms_eps)
            qkv = adapted(inner, layer.qkv, low.qkv, layer.qkv_bias)
            q, k, v = qkv.view(len(x), -1, c.head_dim).split((c.heads, c.kv_heads, c.kv_heads), 1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = rms_norm(q, layer.q_norm, c.rms_eps), rms_norm(k, layer.k_norm, c.rms_eps)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            mixed = block_attention(
                q.view(batch, count, masks, -1, c.head_dim),
                k.view(batch, count, masks, -1, c.head_dim),
                v.reshape(batch, count, masks, -1, c.head_dim),
                read.keys[index, :, :, :longest],
                read.values[index, :, :, :longest],
                anchors,
            )
            x = x + adapted(mixed.reshape(len(x), -1), layer.out, low.out, layer.out_bias)
            inner = rms_norm(x, layer.mlp_norm, c.rms_eps)
            gate, up = adapted(inner, layer.gate_up, low.gate_up, layer.gate_up_bias).chunk(2, -1)
            x = x + adapted(F.silu(gate) * up, layer.down, low.down, layer.down_bias)
        return rms_norm(x, weights.norm, c.rms_eps).view(batch, count, masks, -1)

    def checkpoint(self) -> AdapterCheckpoint:
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.parameters.items()}
        return AdapterCheckpoint(self.config, tensors, "", "trained")

    def save(self, folder: Path) -> None:
        save_adapter(folder, self.checkpoint())

    def resume(self, folder: Path) -> None:
        """Nothing of it follows from the corpus."""


def adapted(x: Tensor, weight: Tensor, low: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
    """x W^T + x A^T B^T + bias for x [N, in]; the weight learns nothing, A and B do."""
    if low is None:
        return F.linear(x, weight, bias)
    y = _Adapted.apply(x, weight, *low)
    return y if bias is None else y + bias


class _Adapted(torch.autograd.Function):
    """Adds the low-rank product in place, forwards and backwards: no second pass over the big output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        inner = x @ a.T
        ctx.save_for_backward(x, weight, a, b, inner)
        return torch.mm(x, weight.T).addmm_(inner, b.T)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        dy = outputs[0]
        d_inner = dy @ b
        return torch.mm(dy, weight).addmm_(d_inner, a), None, d_inner.T @ x, dy.T @ inner
