"""TiDAR as its authors train it: all weights of a model learn to go on with text and to fill in masks (Liu et al. 2025,
arXiv 2511.08923, section 3.1).

A forward reads every conversation twice. The clean half is causal and predicts the token after each place; the masked
half has the mask token everywhere, in blocks, and predicts the token at each place:

    clean place t      sees clean places 0 .. t
    mask in block b    sees clean places before the block, and its block in both directions
    L = (alpha * L_AR + L_diffusion) / (1 + alpha)

Both are sums of cross-entropies against the conversation's own tokens, divided by the number of tokens predicted.
Gradients of both pass through the clean half's keys and values. Where blocks begin changes from step to step: decoding
begins them anywhere. Without masks (alpha None) this is autoregressive training, from random weights or any others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.cache import atomic_write
from zbench.errors import UserError
from zbench.models import loading
from zbench.models.checkpoint import save_whole
from zbench.models.config import ModelConfig, tensor_shapes
from zbench.models.transformer import Layer, Weights, inverse_frequencies, rotate
from zbench.training.attention import block_attention
from zbench.training.corpus import Conversation
from zbench.training.losses import head_loss
from zbench.training.norm import rms_norm
from zbench.training.target import Batch, Read, Target
from zbench.training.trainer import Scores

_USUAL = 256  # tokens of a conversation, for the estimate of memory
_COPIED = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ConversionSettings:
    alpha: float | None = 1.0  # weight of the autoregressive loss; None: it is the only one
    block: int = 8  # masks
    mask_id: int | None = None  # None: the model has one, or no masks are trained
    prompts: bool = False  # whether their tokens are predicted too, as in pre-training


class Conversion:
    """`parameters` in Hugging Face's names, float32; a tied head is the embedding, and learns as both.

    Raises UserError where masks are to be trained and neither settings nor model say which token they are.
    """

    name = "full"
    asks = context = False
    capture: tuple[int, ...] = ()

    def __init__(self, target: Target, settings: ConversionSettings) -> None:
        self.target, self.settings = target, settings
        known = target.config.mask_id
        mask_id = known if settings.mask_id is None else settings.mask_id
        if settings.alpha is not None and mask_id is None:
            raise UserError("this model has no mask token: say which of its tokens is to be one")
        self.config: ModelConfig = replace(target.config, mask_id=mask_id)
        # Copies: the target's own tensors may be a file's, or somebody else's.
        self.parameters: dict[str, Tensor] = {
            name: target.loaded.tensors[name].to(target.device, torch.float32, copy=True)
            for name in tensor_shapes(self.config)
        }
        if mask_id != known and mask_id is not None:  # a token without a meaning: begin in the middle of those with one
            embedding = self.parameters["model.embed_tokens.weight"]
            embedding[mask_id] = embedding.mean(0)
        for tensor in self.parameters.values():
            tensor.requires_grad_()
        self._inv_freq = inverse_frequencies(self.config).to(target.device)

    @property
    def rows(self) -> tuple[int, int]:
        return _USUAL * (1 if self.settings.alpha is None else 2), self.config.layers

    def score(self, read: Read, generator: torch.Generator, evaluate: bool = False) -> Scores:
        s, ids = self.settings, read.batch.ids
        wanted = self._wanted(read.batch)
        count = wanted.sum()
        anchors = real = None
        if s.alpha is not None:
            first = int(torch.randint(s.block, (), generator=generator))
            anchors, real = tiled_blocks(wanted, s.block, first)
        weights = Weights.from_hf(self.parameters, self.config, self.target.dtype, self.target.device)
        clean, masked = self._forward(weights, ids, anchors)
        following = ids[:, 1:][wanted[:, 1:]]
        causal, _ = _hard_loss(clean[:, :-1][wanted[:, 1:]], weights, following)
        whole = count.clamp(min=1)
        if s.alpha is None or masked is None or anchors is None or real is None:
            nothing = torch.zeros(len(following), 0, dtype=torch.bool, device=ids.device)
            return Scores(causal / whole, nothing, len(following), count)
        places = (anchors[..., None] + torch.arange(s.block, device=ids.device)).clamp(max=ids.shape[1] - 1)
        own = ids.gather(1, places.flatten(1)).view_as(places)
        filled, best = _hard_loss(masked[real], weights, own[real])
        loss = (s.alpha * causal + filled) / (1 + s.alpha) / whole
        # What decoding drafts: whole blocks, behind the first token, which the clean half gives.
        right = torch.zeros_like(real)
        right[real] = best[:, 0] == own[real]
        parts = {"autoregressive": causal / whole, "diffusion": filled / real.sum().clamp(min=1)}
        return Scores(loss, right[real.all(-1)][:, 1:], int(real.sum()), count, parts)

    def _wanted(self, batch: Batch) -> Tensor:
        """[S, T] bool: tokens that are predicted; not the first, before which there is nothing."""
        sizes = torch.tensor(batch.sizes, device=batch.ids.device)
        steps = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        wanted = steps < sizes[:, None] if self.settings.prompts else batch.answer
        return wanted & (steps > 0)

    def _forward(self, weights: Weights, ids: Tensor, anchors: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Hidden states after the final norm: of the clean half [S, T, D], and of blocks of masks that begin at
        `anchors` [S, A]: [S, A, block, D].

        Both halves share every product with a weight; only in attention they part.
        """
        c, (batch, longest) = self.config, ids.shape
        steps = torch.arange(longest, device=ids.device)
        tokens, positions = [ids.flatten()], [steps.repeat(batch)]
        if anchors is not None:
            positions.append((anchors[..., None] + torch.arange(self.settings.block, device=ids.device)).flatten())
            tokens.append(torch.full_like(positions[1], c.mask_id or 0))
        angles = torch.cat(positions)[:, None, None].float() * self._inv_freq
        turn = angles.cos(), angles.sin()
        # From float32: the mask's gradient is a sum over all masks, which bfloat16 would lose.
        x = F.embedding(torch.cat(tokens), self.parameters["model.embed_tokens.weight"]).to(self.target.dtype)
        for layer in weights.layers:
            x = self._layer(layer, x, turn, batch, longest, anchors)
        clean, masked = rms_norm(x, weights.norm, c.rms_eps).tensor_split([batch * longest])
        blocks = None if anchors is None else masked.view(*anchors.shape, self.settings.block, c.width)
        return clean.view(batch, longest, c.width), blocks

    def _layer(
        self, layer: Layer, x: Tensor, turn: tuple[Tensor, Tensor], batch: int, longest: int, anchors: Tensor | None
    ) -> Tensor:
        c = self.config
        inner = rms_norm(x, layer.attention_norm, c.rms_eps)
        qkv = F.linear(inner, layer.qkv, layer.qkv_bias).view(len(x), -1, c.head_dim)
        q, k, v = qkv.split((c.heads, c.kv_heads, c.kv_heads), 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, c.rms_eps), rms_norm(k, layer.k_norm, c.rms_eps)
        q, k = rotate(q, *turn), rotate(k, *turn)
        (q, own_q), (k, own_k), (v, own_v) = (part.tensor_split([batch * longest]) for part in (q, k, v))
        q, k, v = (part.view(batch, longest, -1, c.head_dim).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        mixed = mixed.transpose(1, 2).reshape(batch * longest, -1)
        if anchors is not None:
            shape = (*anchors.shape, self.settings.block, -1, c.head_dim)
            blocks = block_attention(own_q.view(shape), own_k.view(shape), own_v.reshape(shape), k, v, anchors)
            mixed = torch.cat([mixed, blocks.reshape(-1, mixed.shape[1])])
        x = x + F.linear(mixed, layer.out, layer.out_bias)
        gate, up = F.linear(rms_norm(x, layer.mlp_norm, c.rms_eps), layer.gate_up, layer.gate_up_bias).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, layer.down, layer.down_bias)

    def save(self, folder: Path) -> None:
        """A model's folder, weights in the original's dtype, with all of its files that say how to use it."""
        loaded = self.target.loaded
        source, dtype = loaded.path, loaded.tensors["model.embed_tokens.weight"].dtype
        folder.mkdir(parents=True, exist_ok=True)
        described: dict[str, Any] = loading.read_json(source / "config.json") if source else self.config.to_hf()
        described["dtype" if "dtype" in described else "torch_dtype"] = str(dtype).removeprefix("torch.")
        if self.config.mask_id is not None:
            described["mask_token_id"] = self.config.mask_id
        atomic_write(folder / "config.json", json.dumps(described, indent=2))
        tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in self.parameters.items()}
        save_whole(folder / "model.safetensors", tensors)
        if source:
            for name in _COPIED:
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
        else:
            loading.load_tokenizer(self.target.loaded).save_pretrained(folder)

    def resume(self, folder: Path) -> None:
        """The mask, which no text has, is among the settings."""


def unused_token(conversations: Iterable[Conversation], config: ModelConfig, wanted: int | None = None) -> int:
    """A token that can be the mask: the model's own if it has one, else the last one that no conversation has and that
    begins or ends nothing; `wanted`, if that is one.

    Raises UserError where `wanted` is text, or all tokens are.
    """
    free = torch.ones(config.vocab, dtype=torch.bool)
    for c in conversations:
        free[c.ids] = False
    free[[token for token in (*config.eos_ids, config.bos_id) if token is not None]] = False
    chosen = config.mask_id if wanted is None else wanted
    if chosen is not None:
        if not 0 <= chosen < config.vocab or not free[chosen]:
            raise UserError(f"token {chosen} cannot be the mask: it is text, ends text, or is not in the vocabulary")
        return chosen
    if not free.any():
        raise UserError("every token of the vocabulary is text in this corpus: none can be the mask")
    return int(free.nonzero()[-1])


def tiled_blocks(wanted: Tensor, block: int, first: int) -> tuple[Tensor, Tensor]:
    """Blocks side by side from place `first` on, those without a place in wanted [S, T] left out: where they begin
    [S, A], and which of their places are wanted [S, A, block]. A sequence with fewer than others gets blocks beyond its
    end or of nothing, all of whose places are not."""
    batch, longest = wanted.shape
    starts = torch.arange(first, max(longest, first + 1), block, device=wanted.device)
    tiles = F.pad(wanted[:, first:], (0, first + len(starts) * block - max(longest, first))).view(batch, -1, block)
    used = tiles.any(-1)
    most = max(int(used.sum(1).max()), 1)
    chosen = used.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return starts[chosen], tiles.gather(1, chosen[..., None].expand(-1, -1, block))


def _hard_loss(hidden: Tensor, weights: Weights, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of ids [n] given hidden [n, D], and the likeliest token of each [n, 1]."""
    assert weights.head is not None
    ones = torch.ones(len(ids), device=ids.device)
    return head_loss(hidden, weights.head, ids[:, None], ones[:, None], ones)
