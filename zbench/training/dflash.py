"""DFlash: blocks at random anchors, in one forward (Chen et al. 2026, arXiv 2602.06036, sections 4.2 and A.1).

A block is a clean token, the anchor, and masks. It sees the target's features of the tokens strictly before the anchor,
and itself in both directions; the mask k places behind the anchor predicts the token there, with weight
exp(-(k - 1) / gamma).

All masks are one embedding, and nothing but attention tells a mask what its anchor is. Seven of them had not found out
in 200 steps; one alone behind its anchor had in 50. So begin with blocks of 2, and go on from there with long ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.models import dflash
from zbench.models.config import ModelConfig
from zbench.models.dflash import DFlashCheckpoint, tensor_shapes
from zbench.models.drafters import DFlashConfig
from zbench.models.transformer import Layer, inverse_frequencies, rotate
from zbench.training.attention import block_attention, draw_anchors
from zbench.training.losses import OTHERS, head_loss, sampled_head
from zbench.training.norm import rms_norm
from zbench.training.target import Read, Target, by_sequence, sparse_targets
from zbench.training.trainer import Scores, adopt

_STD = 0.02


@dataclass(frozen=True, slots=True)
class DFlashSettings:
    block: int = 8  # anchor included
    layers: int = 2
    masks: int = 336  # per conversation and step: 48 blocks of 8
    gamma: float = 4.0  # as published for blocks of 8
    soft: float = 0.5  # share of the loss on the target's own distribution, the rest on its text


class DFlash:
    """`parameters` in the published names, float32; embedding and head are the target's."""

    name = "dflash"
    asks, context = True, False

    def __init__(
        self, target: Target, settings: DFlashSettings, seed: int, start: DFlashCheckpoint | None = None
    ) -> None:
        """`start` is what was trained before, if anything was."""
        self.target, self.settings = target, settings
        self.config = DFlashConfig.of_target(target.config, settings.layers, settings.block)
        if start:
            self.config = replace(self.config, mask_id=start.config.mask_id)
        self.capture = self.config.taps
        generator = torch.Generator().manual_seed(seed)
        self.parameters: dict[str, Tensor] = {
            name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * _STD
            for name, shape in tensor_shapes(self.config).items()
        }
        # Start from what is known: layers of the target's, spread over its depth, on the last tapped state.
        c = target.config
        self.parameters["fc.weight"][:, -c.width :] += torch.eye(c.width)
        self.parameters["norm.weight"] = target.weights.norm.float().cpu().clone()
        for index in range(settings.layers):
            layer = target.weights.layers[(index + 1) * c.layers // settings.layers - 1]
            for name, tensor in _published(layer, c).items():
                self.parameters[f"layers.{index}.{name}.weight"] = tensor.float().cpu().clone()
        self.parameters["hidden_norm.weight"] = self.parameters["layers.0.input_layernorm.weight"].clone()
        self.parameters = {name: tensor.to(target.device).requires_grad_() for name, tensor in self.parameters.items()}
        if start:
            adopt(self.parameters, self.config, start, free=("max_positions", "block"))
        self._inv_freq = inverse_frequencies(self.config.body).to(target.device)

    @property
    def rows(self) -> tuple[int, int]:
        s = self.settings
        return s.masks // (s.block - 1) * s.block, s.layers

    def score(self, read: Read, generator: torch.Generator, evaluate: bool = False) -> Scores:
        s = self.settings
        anchors, real = draw_anchors(read.batch.whole(s.block), s.masks // (s.block - 1), generator)
        steps = torch.arange(s.block, device=anchors.device)
        places = (anchors[..., None] + steps).clamp(max=read.batch.ids.shape[1] - 1)
        hidden = self._forward(read, anchors)[:, :, 1:]
        drafted = places[..., 1:]
        ids, probs = sparse_targets(read, by_sequence(drafted), s.soft)
        weights = (real[..., None] * torch.exp(-(steps[1:] - 1) / s.gamma)).flatten()
        head, bias, ids = self.target.head, None, ids.flatten(0, -2)
        if not evaluate:  # then nobody asks which token is the likeliest of all
            head, bias, ids = sampled_head(head, ids, OTHERS, generator)
        total, best = head_loss(hidden.flatten(0, -2), head, ids, probs.flatten(0, -2), weights, bias)
        right = best.view_as(drafted) == read.batch.ids[by_sequence(drafted)]
        weight = weights.sum()
        return Scores(total / weight.clamp(min=1e-6), right[real], int(real.sum()) * (s.block - 1), weight)

    def _forward(self, read: Read, anchors: Tensor) -> Tensor:
        """Hidden states [S, A, block, D] after the final norm."""
        body, target = self.config.body, self.target
        weights = {name: tensor.to(target.dtype) for name, tensor in self.parameters.items()}
        batch, count = anchors.shape
        block, longest = self.settings.block, int(anchors.max())
        features = torch.cat([read.hidden[tap][:, :longest] for tap in self.capture], -1)
        context = rms_norm(F.linear(features, weights["fc.weight"]), weights["hidden_norm.weight"], body.rms_eps)
        steps = torch.arange(block, device=anchors.device)
        before = self._angles(torch.arange(longest, device=anchors.device))
        within = self._angles((anchors[..., None] + steps).flatten())
        ids = torch.full((batch, count, block), self.config.mask_id, device=anchors.device)
        ids[..., 0] = read.batch.ids.gather(1, anchors)
        x = F.embedding(ids.flatten(), target.weights.embedding)
        for index in range(body.layers):
            base = f"layers.{index}."

            def heads(y: Tensor, name: str, base: str = base) -> Tensor:
                return F.linear(y, weights[f"{base}self_attn.{name}_proj.weight"]).unflatten(-1, (-1, body.head_dim))

            def turned(y: Tensor, name: str, angles: tuple[Tensor, Tensor], base: str = base) -> Tensor:
                scale = weights[f"{base}self_attn.{name}_norm.weight"]
                return rotate(rms_norm(heads(y, name), scale, body.rms_eps), *angles)

            inner = rms_norm(x, weights[f"{base}input_layernorm.weight"], body.rms_eps)
            q, k, v = turned(inner, "q", within), turned(inner, "k", within), heads(inner, "v")
            mixed = block_attention(
                q.view(batch, count, block, -1, body.head_dim),
                k.view(batch, count, block, -1, body.head_dim),
                v.view(batch, count, block, -1, body.head_dim),
                turned(context, "k", before).transpose(1, 2),
                heads(context, "v").transpose(1, 2),
                anchors,
            )
            x = x + F.linear(mixed.reshape(len(x), -1), weights[f"{base}self_attn.o_proj.weight"])
            inner = rms_norm(x, weights[f"{base}post_attention_layernorm.weight"], body.rms_eps)
            gate, up = (F.linear(inner, weights[f"{base}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, weights[f"{base}mlp.down_proj.weight"])
        return rms_norm(x, weights["norm.weight"], body.rms_eps).view(batch, count, block, -1)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None, None].float() * self._inv_freq
        return angles.cos(), angles.sin()

    def checkpoint(self) -> DFlashCheckpoint:
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.parameters.items()}
        return DFlashCheckpoint(self.config, tensors, "", "trained")

    def save(self, folder: Path) -> None:
        dflash.save_drafter(folder, self.checkpoint(), self.target.config)

    def resume(self, folder: Path) -> None:
        """Nothing of it follows from the corpus."""


def _published(layer: Layer, c: ModelConfig) -> dict[str, Tensor]:
    """A layer of the target in the names of the checkpoint, without what DFlash has and the target may not."""
    kv = c.kv_heads * c.head_dim
    q, k, v = layer.qkv.split((c.heads * c.head_dim, kv, kv))
    gate, up = layer.gate_up.chunk(2)
    return {
        "input_layernorm": layer.attention_norm, "post_attention_layernorm": layer.mlp_norm,
        "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": layer.out,
        "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": layer.down,
    }  # fmt: skip
