"""What "lossless" means here, as checks that any speculative engine can be put through.

T = 0, and T > 0 with drafts chosen outright: the very tokens of plain decoding. T > 0 with sampled drafts: the joint
distribution of the first tokens, by chi-square against exact enumeration. And one engine whose drafts are scripted,
so that drafters can be right, wrong or malicious at will.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from scipy import stats
from torch import Tensor

from tests.tiny import FAMILIES, SHAPE, built
from zbench.engines import base
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Generated, Meter, Request, State, Step, Stepper, new_state, prefill
from zbench.engines.sampling import Sampler, Sampling, draw, probabilities
from zbench.engines.synthetic import Synthetic
from zbench.engines.verify import Verdict, verify_chain, verify_tree
from zbench.hardware import device
from zbench.models.model import Model
from zbench.models.rows import Rows

CPU = device.resolve("cpu")
# Fixed in advance. All seeds are fixed too, so a test at this level fails with the code, not with the day.
ALPHA = 0.001
SEEDS = 4000


@functools.cache
def small_model(family: str = "smollm") -> Model:
    """A random model whose vocabulary of six is small enough to enumerate every continuation."""
    config_type, model_type, extra = FAMILIES[family]
    torch.manual_seed(11)
    small = {"vocab_size": 6, "num_hidden_layers": 2, "tie_word_embeddings": False}
    model = model_type(config_type(**{**SHAPE, **extra, **small}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15).add_(1.0 if "norm" in name or name.endswith("_scale") else 0.0)
    return built(model)


def decode(engine: Stepper, prompts: Sequence[Sequence[int]], request: Request) -> Generated:
    return base.generate(engine, prompts, request, Meter(CPU))


def assert_same_tokens(engine: Stepper, model: Model, prompts: Sequence[Sequence[int]], request: Request) -> Generated:
    """The engine's output is plain decoding's, token by token, and ends for the same reason."""
    want = decode(Autoregressive(model), prompts, request)
    got = decode(engine, prompts, request)
    assert got.outputs == want.outputs
    assert got.finish == want.finish
    return got


def assert_cache_is_fresh(
    engine: Stepper, model: Model, prompts: Sequence[Sequence[int]], request: Request, steps: int
) -> None:
    """After `steps` steps the cache holds what a prefill of the committed tokens would have put there."""
    meter = Meter(CPU)
    with meter.step():
        state = engine.start(prompts, request, meter)
        gained = [[token] for token in state.last.tolist()]
        base.commit(gained, state.outputs, state.active, request, ["length"] * len(prompts))
        for _ in range(steps):
            gained = engine.step(state, meter).tokens
            base.commit(gained, state.outputs, state.active, request, ["length"] * len(prompts))
        committed = [[*prompt, *output[:-1]] for prompt, output in zip(prompts, state.outputs, strict=True)]
        assert state.cache.sizes == state.cache.lengths.tolist() == [len(tokens) for tokens in committed]
        fresh = model.new_cache(len(prompts), state.cache.capacity)
        prefill(model, fresh, committed, meter)
    probe = Rows.chain(state.last[:, None], fresh.lengths)
    got, want = (model.forward(probe, cache).logits for cache in (state.cache, fresh))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def joint(model: Model, prompt: Sequence[int], sampling: Sampling, length: int) -> Tensor:
    """Exact probabilities [V] * length of the first `length` tokens, every continuation enumerated."""
    vocab = model.config.vocab
    mass = torch.ones((), dtype=torch.float64)
    for done in range(length):
        prompts = [[*prompt, *prefix] for prefix in itertools.product(range(vocab), repeat=done)]
        cache = model.new_cache(len(prompts), len(prompt) + done)
        with (meter := Meter(CPU)).step():
            logits, _ = prefill(model, cache, prompts, meter)
        following = probabilities(logits, sampling).double().view(*[vocab] * done, vocab)
        mass = mass[..., None] * following
    return mass


def first_tokens(engine: Stepper, prompt: Sequence[int], sampling: Sampling, length: int, seeds: int = SEEDS) -> Tensor:
    """[seeds, length] tokens that the engine samples, one request per seed."""
    request = Request(length, sampling, tuple(range(seeds)))
    return torch.tensor(decode(engine, [prompt] * seeds, request).outputs)


def p_value(samples: Tensor, expected: Tensor) -> float:
    """Chi-square of samples [N, n] against the joint distribution expected [V] * n; 0 if the impossible happened.

    Cells with fewer than 5 expected samples are pooled.
    """
    strides = torch.tensor([expected.stride(axis) for axis in range(expected.dim())])
    counts = (samples * strides).sum(1).bincount(minlength=expected.numel())
    want = expected.reshape(-1) / expected.sum() * len(samples)
    if counts[want == 0].any():
        return 0.0
    rare = want < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    wanted = torch.cat([want[~rare], want[rare].sum()[None]])
    return float(stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue)


Fault = Literal["accepts everything", "residual not subtracted"]


def literal_tree(
    logits: Tensor,
    ids: Tensor,
    parents: Tensor,
    sampler: Sampler,
    index: Any,
    synthetic: Synthetic | None = None,
    *,
    draft_probs: Tensor | None = None,
    fault: Fault | None = None,
) -> Verdict:
    """The acceptance rule as the papers write it, one candidate after another, with torch's global generator.

    Accept x with min(1, p(x)/q(x)); else p := norm(max(p - q, 0)) and try the next sibling. A draft that was chosen
    outright has a one-hot q, so that subtracting it is removing the sibling. `fault` breaks the rule on purpose.
    """
    batch, count = ids.shape
    sequence = torch.arange(batch)
    target = probabilities(logits, sampler.sampling)
    vocab = target.shape[-1]
    q = torch.nn.functional.one_hot(ids[:, 1:], vocab).float() if draft_probs is None else draft_probs
    p, current = target[:, 0], torch.zeros(batch, dtype=torch.int64)
    on_path = torch.zeros_like(ids, dtype=torch.bool)
    on_path[:, 0] = True
    for row in range(1, count):
        x, tried = ids[:, row], parents[:, row] == current
        accept = tried & (torch.rand(batch) * q[sequence, row - 1, x] < p[sequence, x])
        if fault == "accepts everything":
            accept = tried
        if fault != "residual not subtracted":
            residual = (p - q[:, row - 1]).clamp(min=0)
            residual = residual / residual.sum(-1, keepdim=True)
            p = torch.where((tried & ~accept)[:, None], residual, p)
        p = torch.where(accept[:, None], target[:, row], p)
        current = torch.where(accept, row, current)
        on_path[:, row] = accept
    bonus = draw(p, torch.rand(batch, dtype=torch.float64))
    counts = on_path.sum(1)
    kept, tokens = torch.full_like(ids, -1), torch.full_like(ids, -1)
    for b in range(batch):
        rows = on_path[b].nonzero().squeeze(1)
        kept[b, : len(rows)] = rows
        tokens[b, : len(rows)] = torch.cat([ids[b, rows[1:]], bonus[b : b + 1]])
    return Verdict(kept, counts, tokens, bonus)


def literal_chain(
    logits: Tensor,
    drafts: Tensor,
    sampler: Sampler,
    index: Any,
    draft_probs: Tensor | None = None,
    synthetic: Synthetic | None = None,
    *,
    fault: Fault | None = None,
) -> Verdict:
    """`literal_tree` on a chain; with `fault`, a stand-in for `verify_chain` that a lossless test has to catch."""
    ids = torch.nn.functional.pad(drafts, (1, 0))
    parents = chain_parents(ids.shape[1]).expand_as(ids)
    return literal_tree(logits, ids, parents, sampler, index, draft_probs=draft_probs, fault=fault)


def chain_parents(rows: int) -> Tensor:
    return torch.arange(rows) - 1


class Scripted:
    """A speculative engine whose drafts are given: `propose(sequence, position)` fills rows 1.. of a fixed tree.

    `parents` has an entry per row, the root's -1 included. `position` is the output position after the root.
    """

    def __init__(
        self,
        model: Model,
        parents: Sequence[int],
        propose: Callable[[int, int], Sequence[int]],
        as_chain: bool = False,
        synthetic: Synthetic | None = None,
        verify: Callable[..., Verdict] | None = None,
    ) -> None:
        self.model, self.parents, self.propose = model, torch.tensor(parents), propose
        self.as_chain, self.synthetic = as_chain, synthetic
        self.verify: Callable[..., Verdict] = verify or (verify_chain if as_chain else verify_tree)

    def start(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> State:
        # The step that ends a sequence may commit a whole verify, and the next one feeds another.
        state = new_state(self.model, prompts, request, headroom=2 * len(self.parents))
        logits, _ = prefill(self.model, state.cache, prompts, meter)
        state.last = state.sampler.pick(logits, [0] * len(prompts))
        return state

    def step(self, state: State, meter: Meter) -> Step:
        index = [len(output) for output in state.outputs]
        drafts = torch.tensor([list(self.propose(b, position)) for b, position in enumerate(index)])
        ids = torch.cat([state.last[:, None], drafts.view(len(index), -1)], 1)
        parents = self.parents.expand_as(ids)
        if self.as_chain:
            rows, drafted = Rows.chain(ids, state.cache.lengths), [ids[:, 1:]]
        else:
            rows, drafted = Rows.tree(ids, state.cache.lengths, parents), [ids, parents]
        logits = meter.forward(self.model, "verify", rows, state.cache).logits
        verdict = self.verify(logits, *drafted, state.sampler, index, synthetic=self.synthetic)
        state.last = verdict.bonus
        counts = verdict.counts.tolist()
        tokens = [row[:count] for row, count in zip(verdict.tokens.tolist(), counts, strict=True)]
        kept = [count if active else 0 for count, active in zip(counts, state.active, strict=True)]
        state.cache.commit(verdict.kept, kept)
        return Step(tokens, (len(self.parents) - 1,) * len(index), tuple(count - 1 for count in counts))
