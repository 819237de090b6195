"""The EAGLE-3 drafter as released (Li et al. 2025, arXiv 2503.01840; names as in the paper's own code).

One decoder layer reads, for every token, the token's embedding and a feature of the token before it. The feature is
the target's own (three tapped hidden states, fused by `fc`) where the target has been, and the drafter's last output
where it has not:

    x  = [input_layernorm(embedding), hidden_norm(feature)]        embedding first; 2 h wide
    h1 = feature + attention(x)
    h2 = h1 + mlp(post_attention_layernorm(h1))                    the next token's feature, before `norm`
    logits = lm_head(norm(h2))                                     over the reduced draft vocabulary

A *pair* t is (feature of token t, token t + 1); its rotary position is t. It predicts token t + 2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.cache import atomic_write
from zbench.errors import UserError
from zbench.hardware.device import Mark
from zbench.kernels import cpu
from zbench.models.cache import on_device
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
from zbench.models.config import ModelConfig, refuse_unsupported
from zbench.models.cost import Cost
from zbench.models.drafters import EAGLE3_VOCAB, Eagle3Config, eagle3_taps
from zbench.models.execution import Recorded, rounded
from zbench.models.families import AnyConfig
from zbench.models.transformer import inverse_frequencies, rotate

T = TypeVar("T")

_MAX_POSITIONS = 2048  # the released configs' training length, where a config does not say
_RANDOM_STD = 0.02
# At the top level (speculators, vLLM) it counts layer inputs, as we do; in eagle_config (SpecForge, SGLang) outputs.
_TAPS_KEY = "eagle_aux_hidden_state_layer_ids"

# What other trainers call the same tensor, by prefix.
_RENAMES = {
    "layers.0.": "midlayer.",  # speculators
    "aux_norm_low.": "fc_norm.0.",  # older SGLang exports
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}
# t2d says again which tokens d2t names; rotary tables follow from the config.
_REDUNDANT = ("t2d", "midlayer.self_attn.rotary_emb.inv_freq")
_SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_LAYER_KEYS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act"),
)


Eagle3Checkpoint = Trained[Eagle3Config]  # tensor names of the original layout


def load_drafter(path: str | Path, target: AnyConfig, allow_pickle: bool = False) -> Eagle3Checkpoint:
    """A drafter for `target` from a folder in the original, the SpecForge or the speculators layout.

    Raises UserError, one line, where the folder is damaged, the drafter does not fit the target, or it is of a variant
    that this module does not run.
    """
    stored = read_checkpoint(path, allow_pickle)
    tensors = _originals(stored.tensors)
    try:
        config = _fitting(stored.config, shapes_of(tensors), target)
        check_map(tensors, target.vocab)
    except UserError as error:
        raise UserError(f"drafter {stored.path}: {error}") from error
    return Eagle3Checkpoint(config, tensors, stored.hash, f"folder {stored.path}")


def read_config(path: str | Path, target: AnyConfig) -> Eagle3Config:
    """The shape of the drafter that `load_drafter` would load, without its weights. Raises UserError, one line."""
    config, shapes = read_shape(path)
    try:
        return _fitting(config, _originals(shapes), target)
    except UserError as error:
        raise UserError(f"drafter {path}: {error}") from error


def save_drafter(folder: str | Path, drafter: Eagle3Checkpoint) -> None:
    """Write `drafter` in the original layout (with safetensors in place of pickle); `load_drafter` reads it back.

    Raises ValueError for a drafter that this layout cannot describe.
    """
    folder, config = Path(folder), drafter.config
    if config.norm_output:
        raise ValueError("the original layout has no word for a drafter that feeds norm(h2) back")
    folder.mkdir(parents=True, exist_ok=True)
    layer = config.layer.to_hf()
    described = {
        **{key: layer[key] for key in _LAYER_KEYS if key in layer},
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": config.draft_vocab,
        "target_hidden_size": config.target_width,
        # Both: vLLM counts inputs in either place and reads the outer one first, SGLang reads the inner one only.
        _TAPS_KEY: list(config.taps),
        "eagle_config": {_TAPS_KEY: [tap - 1 for tap in config.taps]},
        **{name: True for name in ("norm_before_residual", "norm_before_fc", "fc_norm") if getattr(config, name)},
    }
    atomic_write(folder / "config.json", json.dumps(described, indent=1))
    save_whole(folder / "model.safetensors", drafter.tensors)


def random_drafter(
    target: AnyConfig, seed: int = 0, draft_vocab: int = EAGLE3_VOCAB, dtype: torch.dtype = torch.float32
) -> Eagle3Checkpoint:
    """A drafter that fits `target` and knows nothing: for the speed of drafting, with synthetic acceptance."""
    config = Eagle3Config.of_target(target, draft_vocab)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(shape, dtype=dtype)
        if len(shape) == 1
        else torch.empty(shape, dtype=dtype).normal_(0.0, _RANDOM_STD, generator=generator)
        for name, shape in tensor_shapes(config).items()
        if name != "d2t"
    }
    if config.draft_vocab < target.vocab:
        known = torch.randperm(target.vocab, generator=generator)[: config.draft_vocab].sort().values
        tensors["d2t"] = known - torch.arange(config.draft_vocab)
    return Eagle3Checkpoint(config, tensors, "", f"random weights, seed {seed}")


def tensor_shapes(config: Eagle3Config) -> dict[str, tuple[int, ...]]:
    """Tensor name of the original layout -> shape. `d2t` [draft vocab] holds offsets: target id = i + d2t[i]."""
    layer, width = config.layer, config.layer.width
    q, kv, taps = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim, len(config.taps)
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (width, taps * config.target_width),
        "midlayer.input_layernorm.weight": (width,),
        "midlayer.hidden_norm.weight": (width,),
        "midlayer.post_attention_layernorm.weight": (width,),
        "midlayer.self_attn.q_proj.weight": (q, 2 * width),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * width),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * width),
        "midlayer.self_attn.o_proj.weight": (width, q),
        "midlayer.mlp.gate_proj.weight": (layer.ffn, width),
        "midlayer.mlp.up_proj.weight": (layer.ffn, width),
        "midlayer.mlp.down_proj.weight": (width, layer.ffn),
        "norm.weight": (width,),
        "lm_head.weight": (config.draft_vocab, width),
    }
    if config.draft_vocab < layer.vocab:
        shapes["d2t"] = (config.draft_vocab,)
    if config.norm_before_fc:
        shapes["input_norm.weight"] = (taps * config.target_width,)
    if config.fc_norm:
        shapes |= {f"fc_norm.{tap}.weight": (config.target_width,) for tap in range(taps)}
    return shapes


def _originals(found: Mapping[str, T]) -> dict[str, T]:
    """What a checkpoint has under the names of the original layout, without what it says twice."""
    named = {_original_name(name): value for name, value in found.items()}
    return {name: value for name, value in named.items() if name not in _REDUNDANT}


def _original_name(name: str) -> str:
    prefix = next((prefix for prefix in _RENAMES if name.startswith(prefix)), "")
    return _RENAMES.get(prefix, "") + name.removeprefix(prefix)


def _parse(config: Mapping[str, Any], tensors: Collection[str], target: AnyConfig) -> Eagle3Config:
    speculators = "speculators_model_type" in config
    if speculators and config["speculators_model_type"] != "eagle3":
        raise UserError(f"speculators_model_type {config['speculators_model_type']!r} is not eagle3")
    inner = config.get("transformer_layer_config") if speculators else config
    if not isinstance(inner, Mapping):
        raise UserError("config.json: transformer_layer_config is missing")
    _refuse_unsupported(config, inner, speculators)
    vocab = inner.get("vocab_size")
    if vocab != target.vocab:
        raise UserError(f"made for a target with {vocab} tokens, but this one has {target.vocab}")
    layer_keys = {key: inner[key] for key in _LAYER_KEYS if inner.get(key) is not None}
    # No rope_theta means 10000, whatever the target has: the released drafters were trained so.
    layer = ModelConfig.from_hf(
        {"max_position_embeddings": _MAX_POSITIONS, **layer_keys, "model_type": "llama", "num_hidden_layers": 1}
        | {"eos_token_id": None, "bos_token_id": None}
    )
    target_width = config.get("target_hidden_size")
    target_width = layer.width if target_width is None else target_width
    if isinstance(target_width, bool) or not isinstance(target_width, int) or target_width < 1:
        raise UserError(f"target_hidden_size must be a positive whole number, not {target_width!r}")
    if target_width != target.width:
        raise UserError(f"made for a target {target_width} wide, but this one is {target.width}")
    if layer.width != target.width and "embed_tokens.weight" not in tensors:
        raise UserError(f"{layer.width} wide, so it cannot share the target's embedding of {target.width}")
    return Eagle3Config(
        layer=layer,
        draft_vocab=draft_vocab(config, layer.vocab),
        taps=_taps(config, target),
        target_width=target_width,
        norm_before_residual=bool(config.get("norm_before_residual", False)),
        norm_before_fc=bool(config.get("norm_before_fc")) or "input_norm.weight" in tensors,
        fc_norm=bool(config.get("fc_norm")) or "fc_norm.0.weight" in tensors,
        norm_output=bool(config.get("norm_output")),
    )


def _refuse_unsupported(config: Mapping[str, Any], inner: Mapping[str, Any], speculators: bool) -> None:
    if (family := inner.get("model_type", "llama")) != "llama":
        raise UserError(f"its layer is of type {family!r}; supported: llama")
    if (layers := inner.get("num_hidden_layers", 1)) != 1:
        raise UserError(f"it has {layers} layers; supported: 1")
    if inner.get("attention_bias"):
        raise UserError("attention_bias is not supported")
    if "sliding_attention" in str(inner.get("layer_types")) or inner.get("use_sliding_window"):
        raise UserError("sliding windows are not supported")
    for settings in (config, inner):
        refuse_unsupported(settings)
    for key in _SWITCHES:
        if not isinstance(config.get(key) or False, bool):
            raise UserError(f"{key} must be true or false, not {config[key]!r}")
    if not isinstance(config.get("eagle_config") or {}, Mapping):
        raise UserError(f"eagle_config must be a mapping, not {config['eagle_config']!r}")
    if (config.get("eagle_config") or {}).get("use_aux_hidden_state") is False:
        raise UserError("use_aux_hidden_state false (features of the last layer only) is not supported")
    if "norm_output" in config and not speculators:
        # SpecForge: apply norm before lm_head (always done here). Serving engines: feed norm(h2) back.
        raise UserError("norm_output means two things in this layout; remove it, or convert the drafter to speculators")


def _taps(config: Mapping[str, Any], target: AnyConfig) -> tuple[int, ...]:
    inputs = config.get(_TAPS_KEY)  # null as good as left out, as exports have it
    ids = (config.get("eagle_config") or {}).get(_TAPS_KEY) if inputs is None else inputs
    if ids is None:
        return eagle3_taps(target.layers)
    if not (isinstance(ids, list) and all(isinstance(index, int) for index in ids)):
        raise UserError(f"{_TAPS_KEY} must be a list of layer numbers, not {ids!r}")
    taps = tuple(index + (inputs is None) for index in ids)
    if len(set(taps)) != len(taps) or not all(0 <= tap <= target.layers for tap in taps):
        raise UserError(f"reads hidden states {list(taps)}, which a target of {target.layers} layers has not")
    return taps


def _fitting(stored: Mapping[str, Any], found: Mapping[str, tuple[int, ...]], target: AnyConfig) -> Eagle3Config:
    """The config, held against the shapes of the tensors beside it."""
    config = _parse(stored, found.keys(), target)
    shapes = tensor_shapes(config)
    if "embed_tokens.weight" in found:
        shapes["embed_tokens.weight"] = (config.layer.vocab, config.layer.width)
    check_shapes(found, shapes)
    return config


class DraftCache:
    """Keys and values [B, kv_heads, S, d] of the drafter's one layer, for `capacity` pairs and `nodes` nodes under way.

    For torch the nodes come first: they come and go without moving a pair, and every draft level has the same shape.
    The native drafter has them where the next pairs will be, and keys in panels (`cpu.key_panels`). `first` is the slot
    of the first pair. `lengths` [B] counts committed pairs, `sizes` mirrors it on the host. Attention goes over as many
    pairs as there are, or over `span` where that is said.
    """

    def __init__(self, drafter: Eagle3Drafter, batch: int, capacity: int, nodes: int) -> None:
        layer, device = drafter.config.layer, drafter.device
        self.nodes, self.panels, self.capacity = nodes, drafter.native is not None, capacity
        self.span: int | None = None
        self.first = 0 if self.panels else nodes
        room = -(-(nodes + capacity) // cpu.PANEL) * cpu.PANEL
        shape = (batch, layer.kv_heads, room, layer.head_dim)
        # Zeros, not garbage: an invisible key is multiplied by zero, and 0 x NaN is NaN.
        self.keys = torch.zeros(shape, dtype=drafter.dtype, device=device)
        self.values = torch.zeros(shape, dtype=drafter.dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.sizes = [0] * batch
        self.slots = torch.arange(capacity, device=device)
        self.sequence = torch.arange(batch, device=device)[:, None]
        angles = self.slots[:, None, None].float() * drafter.inv_freq
        self.cos, self.sin = angles.cos(), angles.sin()  # [capacity, 1, d/2]

    @torch.inference_mode()
    def emptied(self) -> Self:
        """See `execution.Memory`."""
        cache = copy(self)
        cache.sizes = [0] * len(self.sizes)
        cache.keys.zero_(), cache.values.zero_(), cache.lengths.zero_()
        return cache

    def within(self, span: int) -> Self:
        """The same pairs for a graph, which knows of no sizes: lengths grow in this one only."""
        cache = copy(self)
        cache.span = span
        return cache

    def seen(self, count: int) -> int:
        """How many pairs attention goes over once `count` more are written."""
        return max(self.sizes) + count if self.span is None else self.span

    def extend(self, counts: Sequence[int] | Tensor) -> None:
        """Commit the first counts[b] pairs of the last `Eagle3Drafter.extend`; a tensor where this is `within`."""
        if isinstance(counts, Tensor):
            self.lengths = self.lengths + counts
            return
        self.sizes = [size + count for size, count in zip(self.sizes, counts, strict=True)]
        self.lengths += on_device(counts, self.lengths.device)


class Eagle3Drafter:
    """A drafter on one device. `embedding` [V, D] is the target's, shared; a checkpoint's own one takes its place.

    On a CPU it is native (`cpu.Drafter`, with float32 features) where that can run, else torch's operators. With
    `graphs` its caches are theirs, and an engine can record on them.
    """

    def __init__(
        self,
        config: Eagle3Config,
        tensors: Mapping[str, Tensor],
        embedding: Tensor,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        native: bool = True,
        graphs: Recorded[DraftCache] | None = None,
    ) -> None:
        """`tensors` as in an Eagle3Checkpoint. `native` False takes torch where native could run too; `graphs` do."""
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        weights = {
            name: tensor.to(device=self.device, dtype=None if name == "d2t" else dtype)
            for name, tensor in tensors.items()
        }
        self.embedding = weights.get("embed_tokens.weight", embedding)
        self._target_ids = target_ids(weights["d2t"]) if "d2t" in weights else None
        self.inv_freq = inverse_frequencies(config.layer).to(self.device)
        self.graphs = graphs
        self.native, self.kernels = None, {"drafter": "torch, graph" if graphs else "torch"}
        if native and graphs is None and self.device.type == "cpu":
            try:
                self.native = cpu.Drafter(config, weights, self.embedding, self.inv_freq, self._target_ids, dtype)
                self.kernels = {"drafter": f"native ({cpu.instruction_set()})"}
            except cpu.NativeUnavailable as error:
                self.kernels["why_drafter_not_native"] = str(error)
        layer = "midlayer."
        self._norms = {
            name.removesuffix(".weight").removeprefix(layer): weight.float() if self.native else weight
            for name, weight in weights.items()
            if weight.dim() == 1 and name != "d2t"
        }
        if self.native is None:
            self._fc = weights["fc.weight"]
            self._qkv = torch.cat([weights[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"])
            self._out = weights[f"{layer}self_attn.o_proj.weight"]
            self._gate_up = torch.cat([weights[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")])
            self._down = weights[f"{layer}mlp.down_proj.weight"]
            self._head = weights["lm_head.weight"]

    def new_cache(self, batch: int, capacity: int, nodes: int) -> DraftCache:
        """Room for `capacity` pairs, uncommitted ones included, and `nodes` nodes under way."""
        if self.graphs is None:
            return DraftCache(self, batch, capacity, nodes)
        capacity = rounded(capacity)
        return self.graphs.cache((batch, capacity, nodes), lambda: DraftCache(self, batch, capacity, nodes))

    @torch.inference_mode()
    def extend(self, taps: Sequence[Tensor], ids: Tensor, cache: DraftCache) -> Tensor:
        """Read pairs behind the committed ones: taps of the target, each [B, R, D], and the tokens after them [B, R].

        Returns the features [B, R, h] of those tokens. `cache.extend` says afterwards how many pairs were real.
        """
        if self.native:
            return self.native.read_pairs(_floats(taps), ids, cache.lengths, cache.keys, cache.values)
        count = ids.shape[1]
        positions = cache.lengths[:, None] + cache.slots[:count]
        total = cache.seen(count)
        mask = cache.slots[:total] <= positions[..., None]  # a pair's slot is its position
        slots = cache.nodes + positions
        return self._layer(
            ids, self._fuse(taps), positions, cache, slots, slice(cache.nodes, cache.nodes + total), mask
        )

    @torch.inference_mode()
    def expand(self, ids: Tensor, features: Tensor, cache: DraftCache, level: int, visible: Tensor) -> Tensor:
        """Read one draft level: tokens [B, k] with the features [B, k, h] of the nodes or the pair before them.

        Level 0 follows the committed pairs. `visible` [B, k, nodes] says which nodes a node sees, itself included.
        Returns the features [B, k, h] of those tokens.
        """
        count, total = ids.shape[1], cache.seen(0)
        if self.native:
            seen = visible[..., : (level + 1) * count].expand(*ids.shape, -1)
            place = (cache.lengths, cache.keys, cache.values)
            return self.native.read_nodes(ids, features, level * count, seen, *place)
        prefix = cache.slots[:total] < cache.lengths[:, None, None]
        mask = torch.cat([visible.expand(*ids.shape, -1), prefix.expand(-1, count, -1)], -1)
        positions = (cache.lengths[:, None] + level).expand(-1, count)
        slots = cache.slots[level * count : (level + 1) * count].expand(ids.shape)
        return self._layer(ids, features, positions, cache, slots, slice(0, cache.nodes + total), mask)

    @torch.inference_mode()
    def logits(self, features: Tensor) -> Tensor:
        """features [B, n, h] -> logits over the draft vocabulary [B, n, draft vocab] float32."""
        normed = features if self.config.norm_output else self._norm(features, "norm")
        return self.native.head(normed) if self.native else F.linear(normed, self._head).float()

    @torch.inference_mode()
    def chain(
        self,
        taps: Sequence[Tensor],
        ids: Tensor,
        last: Tensor,
        counts: Sequence[int] | Tensor,
        cache: DraftCache,
        depth: int,
        mark: Callable[[], Mark],
        top_k: int = 1,
        confidence: float = 0.0,
        active: Sequence[bool] = (),
    ) -> tuple[Tensor, Tensor | None, list[Mark]]:
        """Read pairs as `extend` does, commit counts[b] of them, and draft a chain behind pair last[b]: `depth` levels,
        or fewer where no sequence's drafts so far have at least the chance `confidence` of being right, by the drafter.
        Sequences that are not `active`, where that is said, have no say in it.

        Returns the target's ids [B, levels, top_k] of the likeliest tokens after the chain so far, which goes on from
        the first; with top_k > 1 the logs of the chances of the chain up to there and of each [B, levels, top_k], else
        None; and a mark of the device's at the end of each level. A chain of n needs n - 1 nodes. With a confidence
        every level waits for the device.
        """
        if self.native:
            place = (cache.lengths, cache.keys, cache.values)
            drafted = self.native.draft(_floats(taps), ids, last, *place, depth, top_k, confidence, active)
            cache.extend(counts)
            return drafted
        features = self.extend(taps, ids, cache)[cache.sequence, last[:, None]]
        cache.extend(counts)
        chain: list[Tensor] = []
        scores: list[Tensor] = []
        marks: list[Mark] = []
        chances = torch.ones(len(ids), 1, device=ids.device)
        if confidence and not all(active):
            chances *= torch.tensor(active, device=ids.device)[:, None]
        for level in range(depth):
            if confidence and bool((chances < confidence).all()):
                break
            if level:
                visible = (cache.slots[: cache.nodes] < level).view(1, 1, -1)
                features = self.expand(chain[-1][..., 0], features, cache, level - 1, visible)
            logits = self.logits(features)
            best = logits.topk(top_k) if top_k > 1 else logits.max(-1, keepdim=True)
            chain.append(self.target_ids(best.indices))
            if top_k > 1 or confidence:
                log_probs = best.values - logits.logsumexp(-1, keepdim=True)
                scores.append(log_probs + chances.log()[..., None])
                chances = chances * log_probs[..., 0].exp()
            marks.append(mark())
        return torch.cat(chain, 1), torch.cat(scores, 1) if top_k > 1 else None, marks

    def target_ids(self, ids: Tensor) -> Tensor:
        """Draft token ids of any shape -> the target's ids."""
        return ids if self._target_ids is None else self._target_ids[ids]

    def cost(self, rows: int, contexts: Sequence[int], wanted: int, pairs: int, fused: bool) -> Cost:
        """Cost of reading `rows` tokens per sequence; see `Eagle3Config.cost`."""
        return self.config.cost(rows, contexts, wanted, pairs, fused, self.dtype.itemsize)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self._norms[name], self.config.layer.rms_eps)

    def _fuse(self, taps: Sequence[Tensor]) -> Tensor:
        parts = [tap.to(self.dtype) for tap in taps]
        if self.config.fc_norm:
            parts = [self._norm(part, f"fc_norm.{index}") for index, part in enumerate(parts)]
        joined = torch.cat(parts, -1)
        return F.linear(self._norm(joined, "input_norm") if self.config.norm_before_fc else joined, self._fc)

    def _layer(
        self,
        ids: Tensor,
        features: Tensor,
        positions: Tensor,
        cache: DraftCache,
        slots: Tensor,
        seen: slice,
        mask: Tensor,
    ) -> Tensor:
        """ids, positions and slots [B, R], features [B, R, h]; mask [B, R, S] over the slots `seen`."""
        layer, (batch, count) = self.config.layer, ids.shape
        normed = self._norm(features, "hidden_norm")
        residual = normed if self.config.norm_before_residual else features
        embedded = self._norm(self.embedding[ids], "input_layernorm")
        heads = F.linear(torch.cat([embedded, normed], -1), self._qkv).view(batch, count, -1, layer.head_dim)
        turning, v = heads.split((layer.heads + layer.kv_heads, layer.kv_heads), 2)
        q, k = rotate(turning, cache.cos[positions], cache.sin[positions]).split((layer.heads, layer.kv_heads), 2)
        cache.keys[cache.sequence, :, slots] = k
        cache.values[cache.sequence, :, slots] = v
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            cache.keys[:, :, seen],
            cache.values[:, :, seen],
            attn_mask=mask[:, None],
            enable_gqa=True,
        )
        h1 = residual + F.linear(mixed.transpose(1, 2).reshape(batch, count, -1), self._out)
        gate, up = F.linear(self._norm(h1, "post_attention_layernorm"), self._gate_up).chunk(2, -1)
        h2 = h1 + F.linear(F.silu(gate) * up, self._down)
        return self._norm(h2, "norm") if self.config.norm_output else h2


def _floats(taps: Sequence[Tensor]) -> list[Tensor]:
    return [tap.float() for tap in taps]
