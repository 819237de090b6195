"""The frozen target: what it says about a batch of conversations, computed once and without gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.errors import UserError
from zbench.models.config import ModelConfig
from zbench.models.loading import LoadedModel
from zbench.models.rows import Rows
from zbench.models.transformer import Transformer, Weights
from zbench.training.corpus import Conversation, Role

TOP = 16  # tokens of a target distribution that are kept; they hold nearly all of its mass
_LENGTHS = 64  # of batches on a GPU are multiples of this
_TOP_ROWS = {"cpu": 512, "cuda": 8192}  # rows whose logits exist at the same time


@dataclass(frozen=True, slots=True)
class Batch:
    """S conversations padded to T tokens."""

    ids: Tensor  # [S, T] int64
    answer: Tensor  # [S, T] bool: the token is part of an answer
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, conversations: Sequence[Conversation]) -> Batch:
        sizes = tuple(len(c.ids) for c in conversations)
        ids = torch.zeros(len(sizes), max(sizes), dtype=torch.int64)
        answer = torch.zeros_like(ids, dtype=torch.bool)
        for row, c in enumerate(conversations):
            ids[row, : len(c.ids)] = c.ids
            answer[row, : len(c.ids)] = c.roles == Role.ANSWER
        return cls(ids, answer, sizes)

    def to(self, device: torch.device) -> Batch:
        """On a GPU with more padding: kernels are compiled, and memory is cut, for few lengths and not for all."""
        more = 0 if device.type == "cpu" else -self.ids.shape[1] % _LENGTHS
        ids, answer = (F.pad(x, (0, more)).to(device) for x in (self.ids, self.answer))
        return Batch(ids, answer, self.sizes)

    def whole(self, length: int) -> Tensor:
        """[S, T] bool: this token and the length - 1 that follow all are part of one answer."""
        whole = self.answer.clone()
        for ahead in range(1, length):
            whole[:, :-ahead] &= self.answer[:, ahead:]
            whole[:, -ahead:] = False
        return whole


@dataclass(frozen=True, slots=True)
class Read:
    """What the target says about a batch. A distribution at t is of the token after t."""

    batch: Batch
    keys: Tensor | None  # [L, S, kv_heads, T, d], where asked for
    values: Tensor | None
    hidden: dict[int, Tensor]  # captured [S, T, D], in the target's dtype
    top_ids: Tensor  # [S, T, TOP]
    top_probs: Tensor  # [S, T, TOP] float32; zero where the next token is no answer's

    @classmethod
    def of_text(cls, batch: Batch) -> Read:
        """For an objective that asks no target: the batch alone."""
        nothing = torch.zeros(*batch.ids.shape, 0, device=batch.ids.device)
        return cls(batch, None, None, {}, nothing.long(), nothing)

    def tensors(self) -> dict[str, Tensor]:
        """All but the batch, for a file."""
        context = {"keys": self.keys, "values": self.values}
        return {
            **{name: tensor for name, tensor in context.items() if tensor is not None},
            **{f"hidden.{tap}": tensor for tap, tensor in self.hidden.items()},
            "top_ids": self.top_ids.int(),
            "top_probs": self.top_probs,
        }

    @classmethod
    def of_tensors(cls, batch: Batch, tensors: dict[str, Tensor]) -> Read:
        taps = {name: int(name.removeprefix("hidden.")) for name in tensors if name.startswith("hidden.")}
        hidden = {tap: tensors[name] for name, tap in taps.items()}
        keys, values = tensors.get("keys"), tensors.get("values")
        return cls(batch, keys, values, hidden, tensors["top_ids"].long(), tensors["top_probs"])


def trainable(loaded: LoadedModel) -> ModelConfig:
    """Its config. Raises UserError for an architecture that cannot be trained against."""
    if not isinstance(loaded.config, ModelConfig) or loaded.config.windows:
        raise UserError(f"{loaded.name}: drafters can be trained for dense models without sliding windows only")
    return loaded.config


class Target:
    """A dense model on its device, as the engines run it, and its weights for forwards with gradient."""

    def __init__(self, loaded: LoadedModel, dtype: torch.dtype, device: torch.device) -> None:
        """Raises UserError for an architecture that cannot be trained against."""
        self.config, self.dtype, self.device, self.loaded = trainable(loaded), dtype, device, loaded

    @cached_property
    def _model(self) -> Transformer:
        # Torch, not the native decoder: its products are the faster ones for hundreds of rows.
        return Transformer(self.config, self.loaded.tensors, self.dtype, self.device, "eager")

    @property
    def weights(self) -> Weights:
        return self._model.weights

    @property
    def head(self) -> Tensor:
        """[V, D]"""
        assert self.weights.head is not None
        return self.weights.head

    @torch.no_grad()
    def read(self, batch: Batch, capture: Sequence[int] = (), context: bool = True) -> Read:
        c, (count, longest) = self.config, batch.ids.shape
        cache = self._model.new_cache(count, longest)
        rows = Rows.chain(batch.ids, cache.lengths)
        captured = sorted({*capture, c.layers})
        hidden = self._model.forward(rows, cache, logits=batch.ids[:, :0], capture=captured).hidden
        wanted = torch.zeros_like(batch.answer)
        wanted[:, :-1] = batch.answer[:, 1:]
        top_ids = batch.ids.new_zeros(count, longest, min(TOP, c.vocab))
        top_probs = torch.zeros(top_ids.shape, device=self.device)
        probs, ids = self._distributions(hidden[c.layers][wanted])
        top_ids[wanted], top_probs[wanted] = ids, probs
        keys, values = (store[:, :, :, :longest] for store in (cache.keys, cache.values))
        taps = {tap: hidden[tap].to(self.dtype) for tap in capture}
        return Read(batch, keys if context else None, values if context else None, taps, top_ids, top_probs)

    def _distributions(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden states [n, D] -> probabilities and ids [n, TOP] of the likeliest tokens."""
        probs, ids = [], []
        for part in hidden.split(_TOP_ROWS[self.device.type]):
            logits = self._model.logits(part)
            best = logits.topk(min(TOP, logits.shape[-1]))
            probs.append((best.values - logits.logsumexp(-1, keepdim=True)).exp())
            ids.append(best.indices)
        return torch.cat(probs), torch.cat(ids)


def sparse_targets(read: Read, at: tuple[Tensor, Tensor], soft: float) -> tuple[Tensor, Tensor]:
    """Targets of the tokens at (sequences, places), which are broadcast to [...]: ids and probabilities [..., 1 + TOP].

    A share `soft` follows the target's own distribution given all tokens before the place, the rest says the token
    that the conversation has there.
    """
    sequences, places = at
    ids = read.batch.ids[sequences, places][..., None]
    before = sequences, (places - 1).clamp(min=0)  # a place that does not count may be the first
    probs = read.top_probs[before]
    probs = probs / probs.sum(-1, keepdim=True).clamp(min=1e-6)
    hard = torch.full(ids.shape, 1.0 - soft, device=ids.device)
    return torch.cat([ids, read.top_ids[before]], -1), torch.cat([hard, soft * probs], -1)


def by_sequence(places: Tensor) -> tuple[Tensor, Tensor]:
    """places [S, ...] -> what names them in [S, T]."""
    return torch.arange(len(places), device=places.device).view(-1, *[1] * (places.dim() - 1)), places
