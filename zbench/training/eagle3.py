"""EAGLE-3 by training-time test (Li et al. 2025, arXiv 2503.01840, section 3.2).

The drafter reads pairs (feature of token t, token t + 1) and predicts token t + 2. Step 0 feeds the target's features;
every later step feeds what the drafter gave the step before, with the token that follows, as decoding will: so errors
in its own features are trained against. A chain that began at pair t sees the pairs up to t and its own nodes:

    step k, chain t:   token t + 1 + k, feature from step k - 1 (fc of the target's at k = 0), rotary position t + k
    keys               pairs 0 .. t with the target's features, and steps 1 .. k of chain t
    target             token t + 2 + k, loss weight decay^k

Tokens are those of the conversation throughout. A chain ends where decoding would have left it, its token being none of
the drafter's `reach` likeliest: what lies beyond is seldom drafted, and the time goes to what is. The draft vocabulary
is the corpus's most frequent answer tokens; what a target distribution has elsewhere is not asked for.
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
    reach: int = 2  # of a step's likeliest drafts, beyond which a chain ends; 0: it never does, as in the paper
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
        self._know(frequent_tokens(conversations, self.config.draft_vocab, c.vocab) if d2t is None else target_ids(d2t))
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
            adopt(self.parameters, self.config, start, free=("max_positions",))
        self._inv_freq = inverse_frequencies(self.config.layer).to(device)

    def _know(self, known: Tensor) -> None:
        """Draft these tokens of the target's [n], ascending."""
        self.known = known.to(self.target.device)
        self._place = torch.full((self.target.config.vocab,), -1, device=self.target.device)
        self._place[self.known] = torch.arange(len(self.known), device=self.target.device)

    @property
    def rows(self) -> tuple[int, int]:
        return _USUAL * self.settings.steps, 1

    def score(self, read: Read, generator: torch.Generator, evaluate: bool = False) -> Scores:
        s, batch = self.settings, read.batch
        weights = {name: tensor.to(self.target.dtype) for name, tensor in self.parameters.items()}
        pairs = F.linear(torch.cat([read.hidden[tap] for tap in self.capture], -1)[:, :-1], weights["fc.weight"])
        count = pairs.shape[1]
        learnt = [_after(batch.whole(step + 1), 2, count) for step in range(s.steps)]  # all of a chain's are answers
        chains = _Chains.of(learnt[0])
        nodes, features = self._nodes(weights, _after(batch.ids, 1, count), pairs), pairs[chains.at]
        context = self._keys_values(weights, nodes, torch.arange(count, device=pairs.device))
        nodes = nodes[chains.at]
        own: list[tuple[Tensor, Tensor]] = []  # keys and values [N, kv, d] of steps 1, 2, ...
        reach = 0 if evaluate else s.reach  # how far each draft would be followed is what evaluations ask
        followed: Tensor | None = None
        total, mass, tokens, right = torch.zeros((), device=pairs.device), 0.0, 0, []
        for step in range(s.steps):
            if step:
                go_on = learnt[step][chains.at]
                if followed is not None:
                    go_on &= followed
                chains, features = chains.only(go_on), features[go_on]
                own = [(key[go_on], value[go_on]) for key, value in own]
                nodes = self._nodes(weights, batch.ids[chains.sequence, chains.place + 1 + step], features)
                own.append(self._keys_values(weights, nodes, chains.place + step))
            features = self._layer(weights, nodes, features, chains, step, context, own)
            drafted = chains.sequence, chains.place + 2 + step
            target_ids, probs = sparse_targets(read, drafted, s.soft)
            draft_ids = self._place[target_ids]
            weight = s.decay**step
            loss, best = head_loss(
                rms_norm(features, weights["norm.weight"], self.config.layer.rms_eps),
                weights["lm_head.weight"],
                draft_ids.clamp(min=0),
                probs * (draft_ids >= 0),
                torch.full((len(draft_ids),), weight, device=features.device),
                best=min(reach or 1, len(self.known)),
            )
            says = self.known[best] == batch.ids[drafted][:, None]
            followed = says.any(1) if reach else None
            total, mass, tokens = total + loss, mass + weight * len(draft_ids), tokens + len(draft_ids)
            if evaluate:
                right.append(says[:, 0][learnt[-1][chains.at]])
        rights = torch.stack(right, -1) if right else torch.zeros(0, s.steps, dtype=torch.bool)
        return Scores(total / max(mass, 1.0), rights, tokens, torch.tensor(mass))

    def _nodes(self, weights: dict[str, Tensor], ids: Tensor, features: Tensor) -> Tensor:
        """What the layer's projections read: ids [...], features [..., D] -> [..., 2 D]."""
        embedded = self._norm(weights, F.embedding(ids, self.target.weights.embedding), "input_layernorm")
        return torch.cat([embedded, self._norm(weights, features, "hidden_norm")], -1)

    def _keys_values(self, weights: dict[str, Tensor], nodes: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """nodes [..., n, 2 D] at positions [n] -> [..., n, kv, d] each."""
        k, v = (self._heads(weights, nodes, name) for name in ("k", "v"))
        return rotate(k, *self._angles(positions)), v

    def _layer(
        self,
        weights: dict[str, Tensor],
        nodes: Tensor,
        features: Tensor,
        chains: _Chains,
        step: int,
        context: tuple[Tensor, Tensor],
        own: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """One step of the chains: nodes [N, 2 D], features [N, D] -> [N, D]."""

        def project(x: Tensor, name: str) -> Tensor:
            return F.linear(x, weights[f"midlayer.{name}_proj.weight"])

        q = rotate(self._heads(weights, nodes, "q"), *self._angles(chains.place + step))
        h1 = features + project(_chain_attention(q, chains, *context, own), "self_attn.o")
        inner = self._norm(weights, h1, "post_attention_layernorm")
        return h1 + project(F.silu(project(inner, "mlp.gate")) * project(inner, "mlp.up"), "mlp.down")

    def _norm(self, weights: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
        return rms_norm(x, weights[f"midlayer.{name}.weight"], self.config.layer.rms_eps)

    def _heads(self, weights: dict[str, Tensor], nodes: Tensor, name: str) -> Tensor:
        projected = F.linear(nodes, weights[f"midlayer.self_attn.{name}_proj.weight"])
        return projected.unflatten(-1, (-1, self.config.layer.head_dim))

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None, None].float() * self._inv_freq
        return angles.cos(), angles.sin()

    def checkpoint(self) -> Eagle3Checkpoint:
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.parameters.items()}
        if self.config.draft_vocab < self.target.config.vocab:
            tensors["d2t"] = self.known.cpu() - torch.arange(len(self.known))
        return Eagle3Checkpoint(self.config, tensors, "", "trained")

    def save(self, folder: Path) -> None:
        eagle3.save_drafter(folder, self.checkpoint())

    def resume(self, folder: Path) -> None:
        """The head's rows are the tokens that were frequent when the run began."""
        d2t = eagle3.load_drafter(folder, self.target.config).tensors.get("d2t")
        if d2t is not None:
            self._know(target_ids(d2t))


@dataclass(frozen=True, slots=True)
class _Chains:
    """N chains of S conversations: those that are learnt from, and no others, go through the layer."""

    sequence: Tensor  # [N]
    place: Tensor  # [N] of the pair that each began at
    slot: Tensor  # [N] numbers them within their sequence
    slots: int
    sequences: int

    @classmethod
    def of(cls, wanted: Tensor) -> _Chains:
        """wanted [S, n] bool."""
        sequence, place = wanted.nonzero(as_tuple=True)
        return cls._numbered(sequence, place, len(wanted))

    @classmethod
    def _numbered(cls, sequence: Tensor, place: Tensor, sequences: int) -> _Chains:
        counts = sequence.bincount(minlength=sequences)
        slot = torch.arange(len(sequence), device=sequence.device) - (counts.cumsum(0) - counts)[sequence]
        return cls(sequence, place, slot, int(counts.max()), sequences)

    @property
    def at(self) -> tuple[Tensor, Tensor]:
        return self.sequence, self.place

    def only(self, kept: Tensor) -> _Chains:
        return self._numbered(self.sequence[kept], self.place[kept], self.sequences)

    def padded(self, x: Tensor) -> Tensor:
        """x [N, ...] -> [S, slots, ...]; zero where there is no chain."""
        return x.new_zeros(self.sequences, self.slots, *x.shape[1:]).index_put((self.sequence, self.slot), x)


def _chain_attention(
    q: Tensor, chains: _Chains, keys: Tensor, values: Tensor, own: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """A chain sees the pairs up to the one that it began at, and its own nodes. q [N, H, d]; keys and values of all
    pairs [S, n, kv, d], of the chains' own nodes [N, kv, d] per step -> [N, H d]."""
    (number, heads, d), (s, n, kv, _) = q.shape, keys.shape
    group, slots = heads // kv, chains.slots
    q = (q * d**-0.5).view(number, kv, group, d)
    by_head = chains.padded(q).permute(0, 2, 3, 1, 4).reshape(s, kv, group * slots, d)
    future = torch.arange(n, device=q.device) > chains.padded(chains.place)[:, None, None, :, None]
    scores = (by_head @ keys.permute(0, 2, 3, 1)).view(s, kv, group, slots, n).masked_fill(future, float("-inf"))
    if own:
        on_own = torch.stack([(q * key[:, :, None]).sum(-1) for key, _ in own], -1)
        scores = torch.cat([scores, chains.padded(on_own).permute(0, 2, 3, 1, 4)], -1)
    attended = scores.softmax(-1)
    mixed = attended[..., :n].reshape(s, kv, group * slots, n) @ values.transpose(1, 2)
    mixed = mixed.view(s, kv, group, slots, d).permute(0, 3, 1, 2, 4)[chains.sequence, chains.slot]
    if own:
        shares = attended[..., n:].permute(0, 3, 1, 2, 4)[chains.sequence, chains.slot]
        for step, (_, value) in enumerate(own):
            mixed = mixed + shares[..., step, None] * value[:, :, None]
    return mixed.flatten(1)


def _after(x: Tensor, ahead: int, count: int) -> Tensor:
    """x [S, T] at t + ahead, for t < count; zero (or False) beyond the end."""
    return F.pad(x[:, ahead : ahead + count], (0, max(count + ahead - x.shape[1], 0)))
