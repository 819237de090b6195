"""The DFlash drafter as released (Chen et al. 2026, arXiv 2602.06036; names as in its own code).

It drafts a whole block in one forward. Features of the target (hidden states of several layers, for every token that
is committed) enter each of its layers as keys and values; the block itself is the last committed token, the *anchor*,
and masks:

    context = hidden_norm(fc([h_1, .., h_n]))                        per token before the anchor, shared by all layers
    x       = target embedding of [anchor, mask, .., mask]
    per layer:  y = input_layernorm(x)
                k, v = projections of [context, y]; q of y;  RMSNorm per head on q and k, then rotary positions
                x = x + o_proj(attention of the block over context and block, not causal)
                x = x + mlp(post_attention_layernorm(x))
    logits  = target head(norm(x))                                   slot k predicts the token AT slot k, k >= 1

So once the context's keys and values lie in a cache, the block is an ordinary forward over Rows that all see each
other, and that is how it runs here. The block's own keys and values are never committed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from zbench.cache import atomic_write
from zbench.errors import UserError
from zbench.kernels import cpu
from zbench.models import config as model_config
from zbench.models import loading
from zbench.models.cache import Cache, on_device
from zbench.models.checkpoint import (
    Trained,
    check_map,
    check_shapes,
    draft_vocab,
    read_checkpoint,
    read_shape,
    save_whole,
    shapes_of,
    target_ids,
)
from zbench.models.config import ModelConfig
from zbench.models.cost import Cost
from zbench.models.drafters import DFLASH_BLOCK, DFLASH_LAYERS, DFlashConfig
from zbench.models.execution import Given, Recorded, rounded, span_of
from zbench.models.families import AnyConfig
from zbench.models.model import Model, check_room
from zbench.models.projection import Projection
from zbench.models.rows import Rows
from zbench.models.transformer import Transformer, inverse_frequencies, rms_norm, rotate
from zbench.models.trees import BlockTree

T = TypeVar("T")

BLOCK_SIZES = range(2, 65)
_RANDOM_STD = 0.02

# The target's own weights, as speculators may store them again: in other layouts an embedding is the drafter's own.
_TARGETS = ("embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight")
_DFLASH_KEYS = ("target_layer_ids", "mask_token_id", "block_size")
# Settings of later variants: a drafter that has one set computes something else than this module does.
_VARIANTS = (
    *("attention_bias", "causal", "is_causal", "use_swa", "sliding_window_non_causal", "attention_sinks"),
    *("final_logit_softcapping", "output_multiplier", "input_embedding_scale", "sample_from_anchor", "shift_label"),
    "rope_interleave",
)
_HALVES = ("rope_is_neox_style", "is_neox_style")  # false: rotary pairs are neighbours, not halves of a head


DFlashCheckpoint = Trained[DFlashConfig]  # tensor names of the released layout


def load_drafter(path: str | Path, target: AnyConfig, allow_pickle: bool = False) -> DFlashCheckpoint:
    """A drafter for `target` from a folder in the released (z-lab) or the speculators layout.

    Raises UserError, one line, where the folder is damaged, the drafter does not fit the target, or it is of a variant
    that this module does not run.
    """
    stored = read_checkpoint(path, allow_pickle)
    tensors = _own(stored.tensors, stored.config)
    try:
        config = _fitting(stored.config, shapes_of(tensors), target)
        check_map(tensors, target.vocab)
    except UserError as error:
        raise UserError(f"drafter {stored.path}: {error}") from error
    return DFlashCheckpoint(config, tensors, stored.hash, f"folder {stored.path}")


def read_config(path: str | Path, target: AnyConfig) -> DFlashConfig:
    """The shape of the drafter that `load_drafter` would load, without its weights. Raises UserError, one line."""
    config, shapes = read_shape(path)
    try:
        return _fitting(config, _own(shapes, config), target)
    except UserError as error:
        raise UserError(f"drafter {path}: {error}") from error


def save_drafter(folder: str | Path, drafter: DFlashCheckpoint, target: AnyConfig) -> None:
    """Write `drafter` in the released layout, which has no head of its own; `load_drafter` reads it back.

    Raises UserError for a drafter that has one.
    """
    folder, config = Path(folder), drafter.config
    if config.own_head:
        raise UserError("the released DFlash layout has no place for a drafter's own head")
    folder.mkdir(parents=True, exist_ok=True)
    described = config.body.to_hf() | {
        "architectures": ["DFlashDraftModel"],
        "block_size": config.block,
        "num_target_layers": target.layers,
        "dflash_config": {"mask_token_id": config.mask_id, "target_layer_ids": [tap - 1 for tap in config.taps]},
    }
    atomic_write(folder / "config.json", json.dumps(described, indent=1))
    save_whole(folder / "model.safetensors", drafter.tensors)


def random_drafter(
    target: AnyConfig,
    seed: int = 0,
    layers: int = DFLASH_LAYERS,
    block: int = DFLASH_BLOCK,
    dtype: torch.dtype = torch.float32,
) -> DFlashCheckpoint:
    """A drafter that fits `target` and knows nothing: for the speed of drafting, with synthetic acceptance.

    As many hidden states are read as there are layers, as released, or as many as the target has. The mask is the last
    token of the vocabulary: released drafters use an id that no text has, but nothing tells which that is.
    """
    config = DFlashConfig.of_target(target, layers, block)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(shape, dtype=dtype)
        if len(shape) == 1
        else torch.empty(shape, dtype=dtype).normal_(0.0, _RANDOM_STD, generator=generator)
        for name, shape in tensor_shapes(config).items()
    }
    return DFlashCheckpoint(config, tensors, "", f"random weights, seed {seed}")


def tensor_shapes(config: DFlashConfig) -> dict[str, tuple[int, ...]]:
    """Tensor name of the released layout -> shape: 3 + 11 per layer, and the head where there is one."""
    width = config.body.width
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (width, len(config.taps) * width),
        "hidden_norm.weight": (width,),
    }
    for name, shape in model_config.tensor_shapes(config.body).items():
        if name != "model.embed_tokens.weight" and (name != "lm_head.weight" or config.own_head):
            shapes[name.removeprefix("model.")] = shape
    return shapes


def _own(found: Mapping[str, T], config: Mapping[str, Any]) -> dict[str, T]:
    """What a checkpoint has of its own; t2d says again which tokens d2t names."""
    redundant = ("t2d", *_TARGETS) if "speculators_model_type" in config else ("t2d",)
    return {name: value for name, value in found.items() if name not in redundant}


def _parse(config: Mapping[str, Any], own_head: bool, target: AnyConfig) -> DFlashConfig:
    speculators = "speculators_model_type" in config
    if speculators and config["speculators_model_type"] != "dflash":
        raise UserError(f"speculators_model_type {config['speculators_model_type']!r} is not dflash")
    inner = config.get("transformer_layer_config") if speculators else config
    settings = config.get("dflash_config", {})
    if not isinstance(inner, Mapping) or not isinstance(settings, Mapping):
        raise UserError("config.json: transformer_layer_config and dflash_config must be mappings")
    _refuse_variants(config, inner, settings)
    # Layers are Qwen3's whatever the target's family; a key that is left out there is one of Qwen3's.
    body = ModelConfig.from_hf(
        {"max_position_embeddings": target.max_positions, **inner, "model_type": "qwen3"}
        | {"eos_token_id": None, "bos_token_id": None, "mask_token_id": None, "tie_word_embeddings": False}
    )
    if body.vocab != target.vocab:
        raise UserError(f"made for a target with {body.vocab} tokens, but this one has {target.vocab}")
    if body.width != target.width:
        raise UserError(f"made for a target {body.width} wide, but this one is {target.width}")
    if (layers := config.get("num_target_layers") or target.layers) != target.layers:
        raise UserError(f"made for a target of {layers} layers, but this one has {target.layers}")
    if own_head:
        body = replace(body, vocab=draft_vocab(config, target.vocab))
    return DFlashConfig(
        body=body,
        taps=_taps(config, settings, target, speculators),
        mask_id=_whole(config, settings, "mask_token_id", range(target.vocab)),
        block=_whole(config, settings, "block_size", BLOCK_SIZES),
        own_head=own_head,
    )


def _refuse_variants(config: Mapping[str, Any], inner: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    unknown = [key for key in settings if key not in _DFLASH_KEYS and settings[key]]
    known = [key for key in _VARIANTS if config.get(key) or inner.get(key)]
    known += [f"{key} false" for key in _HALVES if False in (config.get(key), inner.get(key))]
    if "sliding_attention" in str(inner.get("layer_types")) or inner.get("use_sliding_window"):
        known.append("sliding_attention")
    if config.get("projector_type", "dflash") != "dflash":
        known.append(f"projector_type {config['projector_type']}")
    if variants := sorted({*unknown, *known}):
        raise UserError(f"a DFlash variant with {loading.some(variants)} is not supported")


def _taps(
    config: Mapping[str, Any], settings: Mapping[str, Any], target: AnyConfig, speculators: bool
) -> tuple[int, ...]:
    # speculators counts layer inputs as we do; the released layout names the layer whose output is meant.
    key = "aux_hidden_state_layer_ids" if speculators else "target_layer_ids"
    ids = model_config.token_ids(config.get(key, settings.get(key)))
    if not ids:
        raise UserError(f"config.json: {key} is missing")
    taps = tuple(index + (not speculators) for index in ids)
    if len(set(taps)) != len(taps) or not all(0 <= tap <= target.layers for tap in taps):
        raise UserError(f"reads hidden states {list(taps)}, which a target of {target.layers} layers has not")
    return taps


def _whole(config: Mapping[str, Any], settings: Mapping[str, Any], key: str, allowed: range) -> int:
    value = config.get(key, settings.get(key))
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        raise UserError(f"config.json: {key} must be a number from {allowed[0]} to {allowed[-1]}, not {value!r}")
    return value


def _fitting(stored: Mapping[str, Any], found: Mapping[str, tuple[int, ...]], target: AnyConfig) -> DFlashConfig:
    """The config, held against the shapes of the tensors beside it."""
    config = _parse(stored, "lm_head.weight" in found, target)
    shapes = tensor_shapes(config)
    if config.own_head and config.body.vocab < target.vocab:
        shapes["d2t"] = (config.body.vocab,)
    check_shapes(found, shapes)
    return config


@dataclass(frozen=True, slots=True)
class Drafts:
    tokens: Tensor  # [B, block - 1] int64: the likeliest of each slot behind the anchor, the target's ids
    logits: Tensor  # [B, block - 1, draft vocabulary] float32
    rows: Rows | None = None  # what is verified where a tree was asked for


def reduced(stored: DFlashCheckpoint, target: AnyConfig, tensors: Mapping[str, Tensor], vocab: int) -> DFlashCheckpoint:
    """The drafter with the first `vocab` rows of its target's head [V, D], drafting only tokens with ids below: in BPE
    vocabularies the frequent ones, so that less is read (as in FR-Spec, Zhao et al. 2025, arXiv 2502.14856). `tensors`
    are the target's in Hugging Face's names. Raises UserError for a drafter with a head of its own.
    """
    config = stored.config.reduced(vocab)
    head = tensors["model.embed_tokens.weight" if target.tied else "lm_head.weight"][:vocab]
    same = torch.zeros(vocab, dtype=torch.int64)  # a token's id is the target's
    return replace(stored, config=config, tensors={**stored.tensors, "lm_head.weight": head, "d2t": same})


class DFlashDrafter:
    """A drafter on its target's device, in its dtype; it shares the target's embedding, and its head unless it has one.

    Its cache holds keys and values of the context only: of every token before the anchor. On a CPU a draft is one
    native call (`cpu.BlockDrafter`, with float32 features) where layers and head run natively, else torch's operators
    stand around the layers. Where the target is run as graphs, a draft is one graph, with the reading before it.
    """

    def __init__(self, config: DFlashConfig, tensors: Mapping[str, Tensor], target: Model, native: bool = True) -> None:
        """`tensors` as in a DFlashCheckpoint. `native` False takes torch around the layers where native could run."""
        self.config, self.device, self._target_vocab = config, target.device, target.config.vocab
        self._shard = target.team.shard
        weights = {
            name: tensor.to(device=target.device, dtype=target.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors.items()
        }
        body = config.body
        self._body = Transformer(
            body,
            {"model.embed_tokens.weight": target.embedding} | {f"model.{name}": t for name, t in weights.items()},
            target.dtype,
            target.device,
            "eager" if target.execution in ("eager", "graph") else "auto",
            headless=True,
        )
        self._fc = Projection(weights["fc.weight"])
        # Keys and values of all layers in one projection: the context is the same for each.
        self._context = Projection(
            torch.cat(
                [weights[f"layers.{i}.self_attn.{p}_proj.weight"] for i in range(body.layers) for p in ("k", "v")]
            )
        )
        key_norms = [weights[f"layers.{i}.self_attn.k_norm.weight"] for i in range(body.layers)]
        self._key_norms = torch.stack(key_norms)[:, None].float()  # [L, 1, d]
        self._hidden_norm, self._norm = weights["hidden_norm.weight"].float(), weights["norm.weight"].float()
        self._inv_freq = inverse_frequencies(body).to(self.device)
        own_head = Projection(weights["lm_head.weight"]) if config.own_head else None
        self._head = own_head or target.head
        self._ids = target_ids(weights["d2t"]) if "d2t" in weights else None
        self._graphs: Recorded[Cache] | None = target.graphs.beside() if target.graphs else None
        self.kernels = {"drafter": "torch, graph" if self._graphs else self._body.kernels["forward"]}
        self.native, layers = None, self._body.decoder
        fc, kv, head = self._fc.packed, self._context.packed, own_head.packed if own_head else target.packed_head
        if layers is None and "why_not_native" in self._body.kernels:
            self.kernels["why_drafter_not_native"] = self._body.kernels["why_not_native"]
        elif layers and head is None:
            self.kernels["why_drafter_not_native"] = "its layers are, but torch runs the target's head"
        if native and layers and fc is not None and kv is not None and head is not None:
            self.native = cpu.BlockDrafter(config, layers, fc, kv, self._hidden_norm, self._key_norms, head)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        if self._graphs is None:
            return self._body.new_cache(batch, capacity)
        capacity = rounded(capacity)
        return self._graphs.cache((batch, capacity), lambda: self._body.empty_cache(batch, capacity))

    @torch.inference_mode()
    def read(self, features: Sequence[Tensor], cache: Cache, counts: Sequence[int]) -> None:
        """Commit the keys and values of the first counts[b] tokens of each sequence.

        `features`: one [B, R, D] per tap, the target's hidden states of the R tokens after the cache's prefix.
        """
        if self.native:
            cache.extend(counts)
            self.native.read(_floats(features), counts, cache.lengths, cache.keys, cache.values)
            return
        self._read(features, cache, cache.lengths)
        cache.extend(counts)

    def _read(self, features: Sequence[Tensor], cache: Cache, lengths: Tensor) -> None:
        """Write keys and values of all tokens behind prefixes of these lengths [B]."""
        body = self.config.body
        context = rms_norm(self._fc(torch.cat(list(features), -1)), self._hidden_norm, body.rms_eps)
        batch, rows, _ = context.shape
        heads = self._context(context).view(batch, rows, body.layers, 2 * body.kv_heads, body.head_dim)
        keys, values = heads.chunk(2, 3)
        slots = lengths[:, None] + torch.arange(rows, device=self.device)
        angles = slots[..., None].float() * self._inv_freq
        cos, sin = (part[:, :, None, None] for part in (angles.cos(), angles.sin()))
        _store(cache, slots, rotate(rms_norm(keys, self._key_norms, body.rms_eps), cos, sin), values)

    @torch.inference_mode()
    def draft(
        self,
        anchor: Tensor,
        cache: Cache,
        block: int,
        features: Sequence[Tensor] = (),
        counts: Sequence[int] = (),
        tree: BlockTree | None = None,
    ) -> Drafts:
        """Read `features` as `read` does, where there are any, then draft what follows the anchors [B], token ids, and
        the `tree` of it.

        Raises ValueError where the block does not fit the cache.
        """
        if self.native:
            if features:
                cache.extend(counts)
            check_room(block, cache)
            place = (cache.lengths, cache.keys, cache.values)
            logits, likeliest = self.native.draft(anchor, block, *place, _floats(features), counts)
        elif self._graphs:
            return self._replayed(self._graphs, anchor, cache, block, features, counts, tree)
        else:
            if features:
                self.read(features, cache, counts)
            logits, likeliest = self._filled(anchor, cache, block)
        rows = tree.grow(anchor, cache.lengths, logits, self._ids)[0] if tree else None
        return Drafts(self.target_ids(likeliest), logits, rows)

    def _filled(self, anchor: Tensor, cache: Cache, block: int, span: int | None = None) -> tuple[Tensor, Tensor]:
        """What torch drafts, logits and likeliest ids; within a graph over the first `span` slots of the cache."""
        ids = torch.full((len(anchor), block), self.config.mask_id, device=self.device)
        ids[:, 0] = anchor
        seen = ids.new_ones(len(anchor), block, block).bool()
        steps = torch.arange(block, device=self.device)  # own ones: those of `Rows.chain` may be gone at a replay
        rows = Rows(ids, cache.lengths[:, None] + steps, (steps - 1).expand(ids.shape), seen)
        last, none = self.config.body.layers, ids[:, :0]
        if span is None:
            out = self._body.forward(rows, cache, logits=none, capture=(last,))
        else:
            out = self._body.body(rows, cache, none, (last,), None, span)
        logits = self._head(rms_norm(out.hidden[last][:, 1:], self._norm, self.config.body.rms_eps))
        return logits, cpu.argmax(logits)

    def _replayed(
        self,
        graphs: Recorded[Cache],
        anchor: Tensor,
        cache: Cache,
        block: int,
        features: Sequence[Tensor],
        counts: Sequence[int],
        tree: BlockTree | None,
    ) -> Drafts:
        read = features[0].shape[1] if features else 0
        if read:
            cache.extend(counts)
        check_room(block, cache)
        span = span_of(cache.sizes, block, cache.capacity) if self._body.spans else cache.capacity

        def work(memory: Cache, given: Given) -> Drafts:
            anchor, fresh, *features = (tensor for tensor in given if tensor is not None)
            if read:
                self._read(features, memory, memory.lengths - fresh)
            logits, likeliest = self._filled(anchor, memory, block, span)
            rows = tree.grow(anchor, memory.lengths, logits, self._ids)[0] if tree else None
            return Drafts(self.target_ids(likeliest), logits, rows)

        fresh = on_device(counts if read else [0] * len(anchor), self.device)
        signature = _Signature(len(anchor), read, block, span, tree)
        found = graphs.run(cache, signature, (anchor, fresh, *features), work)
        return Drafts(found.tokens.clone(), found.logits.clone(), found.rows.clone() if found.rows else None)

    def target_ids(self, ids: Tensor) -> Tensor:
        """Ids of the draft vocabulary -> ids of the target's."""
        return ids if self._ids is None else self._ids[ids]

    def target_logits(self, logits: Tensor) -> Tensor:
        """Logits over the draft vocabulary [..., Vd] -> over the target's [..., V], -inf where it has no token."""
        if self._ids is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self._target_vocab), float("-inf"))
        return full.index_copy_(-1, self._ids, logits)

    def cost(self, read: int, block: int, contexts: Sequence[int]) -> Cost:
        """Of reading `read` new tokens per sequence, then drafting a block; see `DFlashConfig.cost`."""
        return self.config.cost(read, block, contexts, self._body.dtype.itemsize, self._shard)


@dataclass(frozen=True, slots=True)
class _Signature:
    """What the graph of a draft has fixed."""

    batch: int
    read: int
    block: int
    span: int
    tree: BlockTree | None

    def __str__(self) -> str:
        tree = f", a tree of {self.tree.tokens}" if self.tree else ""
        return f"DFlash draft of {self.batch} x {self.block} tokens{tree}, {self.read} read, {self.span} slots"


def _floats(features: Sequence[Tensor]) -> list[Tensor]:
    return [feature.float() for feature in features]


def _store(cache: Cache, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write keys and values [B, R, L, kv_heads, d] at slots [B, R] of all layers."""
    sequence = torch.arange(len(slots), device=slots.device)[:, None]
    if cache.panels:
        panels = cpu.key_panels(cache.keys)
        units = keys.to(cache.keys.dtype).unflatten(-1, (-1, panels.shape[-1]))
        panels[:, sequence, :, slots // cpu.PANEL, :, slots % cpu.PANEL] = units
    else:
        cache.keys[:, sequence, :, slots] = keys.to(cache.keys.dtype)
    cache.values[:, sequence, :, slots] = values.to(cache.values.dtype)
