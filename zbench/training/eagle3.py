"""EAGLE-3 by training-time test (Li et al. 2025, arXiv 2503.01840, section 3.2).

The drafter reads pairs (feature of token t, token t + 1) and predicts token t + 2. Step 0 feeds the target's features;
every later step feeds what the drafter gave the step before, with the token that follows, as decoding will: so errors
in its own features are trained against. A chain that began at pair t sees the pairs up to t and its own nodes:

    step k, chain t:   token t + 1 + k, feature from step k - 1 (fc of the target's at k = 0), rotary position t + k
    keys               pairs 0 .. t with the target's features, and steps 1 .. k of chain t
    target             token t + 2 + k, loss weight decay^k

Tokens are those of the conversation throughout. The draft vocabulary is the corpus's most frequent answer tokens; what
a target distribution has elsewhere is not asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.models import eagle3
from zbench.models.checkpoint import target_ids
from zbench.models.drafters import Eagle3Config
from zbench.models.eagle3 import Eagle3Checkpoint, tensor_shapes
from zbench.models.transformer import inverse_frequencies, rotate
from zbench.training.corpus import Conversation, Role
from zbench.training.losses import head_loss
from zbench.training.norm import rms_norm
from zbench.training.target import Read, Target, sparse_targets
from zbench.training.trainer import Scores, adopt

_STD = 0.02
_USUAL = 256  # pairs of a conversation, for the estimate of memory


@dataclass(frozen=True, slots=True)
class Eagle3Settings:
    draft_vocab: int = 4096
    steps: int = 7  # of the training-time test
    decay: float = 0.8
    soft: float = 0.5  # share of the loss on the target's own distribution, the rest on its text
    ffn: int | None = None  # width of the drafter's MLP; None: the target's


def frequent_tokens(conversations: Sequence[Conversation], count: int, vocab: int) -> Tensor:
    """[n] ids, ascending, of the `count` most frequent answer tokens; lower ids fill up what the corpus lacks."""
    counts: Counter[int] = Counter()
    for c in conversations:
        counts.update(c.ids[c.roles == Role.ANSWER].tolist())
    ranked = sorted(range(vocab), key=lambda token: (-counts[token], token))
    return torch.tensor(sorted(ranked[:count]))


class Eagle3:
    """`parameters` in the published names, float32."""

    name = "eagle3"
    asks, context = True, False

    def __init__(
        self,
        target: Target,
        settings: Eagle3Settings,
        conversations: Sequence[Conversation],
        seed: int,
        start: Eagle3Checkpoint | None = None,
    ) -> None:
        """`conversations` choose the draft vocabulary, where `start`, what was trained before, does not."""
        self.target, self.settings = target, settings
        c, device = target.config, target.device
        usual = Eagle3Config.of_target(c, settings.draft_vocab)
        self.config = replace(usual, layer=replace(usual.layer, ffn=settings.ffn or usual.layer.ffn))
        self.capture = self.config.taps
        d2t = start.tensors.get("d2t") if start else None
        known = frequent_tokens(conversations, self.config.draft_vocab, c.vocab) if d2t is None else target_ids(d2t)
        self.known = known.to(device)
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * _STD
            for name, shape in tensor_shapes(self.config).items()
            if name != "d2t"
        }
        # Start from what is known: the last tapped state, normed and read out as the target does with its own.
        drawn["fc.weight"][:, -c.width :] += torch.eye(c.width)
        drawn["norm.weight"] = target.weights.norm.float().cpu().clone()
        drawn["lm_head.weight"] = target.head[self.known].float().cpu().clone()
        self.parameters = {name: tensor.to(device).requires_grad_() for name, tensor in drawn.items()}
        if start:
            adopt(self.parameters, start.tensors, start.source)
        self._place = torch.full((c.vocab,), -1, device=device)
        self._place[self.known] = torch.arange(len(self.known), device=device)
        self._inv_freq = inverse_frequencies(self.config.layer).to(device)

    @property
    def rows(self) -> tuple[int, int]:
        return _USUAL * self.settings.steps, 1

    def score(self, read: Read, generator: torch.Generator, evaluate: bool = False) -> Scores:
        s, batch = self.settings, read.batch
        weights = {name: tensor.to(self.target.dtype) for name, tensor in self.parameters.items()}
        features = F.linear(torch.cat([read.hidden[tap] for tap in self.capture], -1)[:, :-1], weights["fc.weight"])
        count = features.shape[1]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        chains = torch.arange(count, device=features.device)
        total, mass, tokens, right = torch.zeros((), device=features.device), 0.0, 0, []
        whole = _after(batch.whole(s.steps), 2, count)
        for step in range(s.steps):
            ids = _after(batch.ids, 1 + step, count)
            features = self._layer(weights, ids, features, chains + step, keys, values)
            learnt = _after(
                batch.whole(step + 1), 2, count
            )  # [S, count] every token of the chain so far is an answer's
            places = (chains + 2 + step).clamp(max=batch.ids.shape[1] - 1).expand(len(ids), -1)
            target_ids, probs = sparse_targets(read, places, s.soft)
            draft_ids = self._place[target_ids[learnt]]
            weight = s.decay**step
            loss, best = head_loss(
                rms_norm(features[learnt], weights["norm.weight"], self.config.layer.rms_eps),
                weights["lm_head.weight"],
                draft_ids.clamp(min=0),
                probs[learnt] * (draft_ids >= 0),
                torch.full((len(draft_ids),), weight, device=features.device),
            )
            total, mass, tokens = total + loss, mass + weight * len(draft_ids), tokens + len(draft_ids)
            drafted = ids.new_zeros(ids.shape)
            drafted[learnt] = self.known[best]
            right.append((drafted == batch.ids.gather(1, places))[whole])
        return Scores(total / max(mass, 1.0), torch.stack(right, -1), tokens, torch.tensor(mass))

    def _layer(
        self,
        weights: dict[str, Tensor],
        ids: Tensor,
        features: Tensor,
        positions: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        """One step of all chains: ids [S, n], features [S, n, D], positions [n]; its keys and values are appended."""
        layer, (batch, count) = self.config.layer, ids.shape

        def norm(x: Tensor, name: str) -> Tensor:
            return rms_norm(x, weights[f"midlayer.{name}.weight"], layer.rms_eps)

        def project(x: Tensor, name: str) -> Tensor:
            return F.linear(x, weights[f"midlayer.{name}_proj.weight"])

        embedded = norm(F.embedding(ids, self.target.weights.embedding), "input_layernorm")
        x = torch.cat([embedded, norm(features, "hidden_norm")], -1)
        angles = positions[:, None, None].float() * self._inv_freq
        cos, sin = angles.cos(), angles.sin()
        q, k, v = (project(x, f"self_attn.{name}").view(batch, count, -1, layer.head_dim) for name in ("q", "k", "v"))
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        keys.append(k)
        values.append(v.transpose(1, 2))
        h1 = features + project(_chain_attention(q, keys, values), "self_attn.o")
        inner = norm(h1, "post_attention_layernorm")
        return h1 + project(F.silu(project(inner, "mlp.gate")) * project(inner, "mlp.up"), "mlp.down")

    def checkpoint(self) -> Eagle3Checkpoint:
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.parameters.items()}
        if self.config.draft_vocab < self.target.config.vocab:
            tensors["d2t"] = self.known.cpu() - torch.arange(len(self.known))
        return Eagle3Checkpoint(self.config, tensors, "", "trained")

    def save(self, folder: Path) -> None:
        eagle3.save_drafter(folder, self.checkpoint())


def _chain_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Chain t sees step 0 up to pair t, and its own nodes of later steps. q [S, H, n, d], keys and values
    [S, kv, n, d] per step -> [S, n, H d]."""
    batch, heads, count, d = q.shape
    group = heads // keys[0].shape[1]
    keys, values = ([x.repeat_interleave(group, 1) for x in part] for part in (keys, values))
    q = q * d**-0.5
    future = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1)
    scores = [(q @ keys[0].transpose(2, 3)).masked_fill(future, float("-inf"))]
    scores += [(q * key).sum(-1, keepdim=True) for key in keys[1:]]
    attended = torch.cat(scores, -1).softmax(-1)
    mixed = attended[..., :count] @ values[0]
    for step, value in enumerate(values[1:]):
        mixed = mixed + attended[..., count + step, None] * value
    return mixed.transpose(1, 2).reshape(batch, count, -1)


def _after(x: Tensor, ahead: int, count: int) -> Tensor:
    """x [S, T] at t + ahead, for t < count; zero (or False) beyond the end."""
    return F.pad(x[:, ahead : ahead + count], (0, max(count + ahead - x.shape[1], 0)))
