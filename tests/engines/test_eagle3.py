"""EAGLE-3 decodes what plain decoding decodes, whatever the drafter says; only the number of steps may differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import FAMILIES, relative_error, runtime
from zbench.engines import base
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Generated, Meter, Request
from zbench.engines.eagle3 import Eagle3, Eagle3State
from zbench.engines.sampling import Sampling
from zbench.engines.synthetic import parse
from zbench.errors import UserError
from zbench.hardware import device
from zbench.kernels import cpu
from zbench.models.cache import Cache
from zbench.models.eagle3 import DraftCache, Eagle3Drafter, random_drafter
from zbench.models.transformer import Transformer

CPU = device.resolve("cpu")
GREEDY = Sampling()
needs_native = pytest.mark.skipif(not cpu.available(), reason=f"native CPU kernels: {cpu.unavailable_reason()}")
SETTINGS: list[dict[str, Any]] = [
    {"depth": 1},
    {"depth": 4},
    {"depth": 3, "top_k": 3, "tokens": 8},
    {"depth": 2, "top_k": 4, "tokens": 20},
    {"depth": 3, "top_k": 3, "beam": 1, "tokens": 5},
    {"depth": 3, "top_k": 4, "beam": 2, "tokens": 9},
    {"depth": 4, "confidence": 1e-4},  # of 64 draft tokens by random weights: some chains end early
    {"depth": 4, "top_k": 2, "beam": 1, "tokens": 4, "confidence": 1e-4},
]
WHOLE = [options for options in SETTINGS if "confidence" not in options]


def prompts(*sizes: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (size,), generator=generator).tolist() for size in sizes]


def random(model: Transformer, vocab: int = 64, native: bool = True) -> Eagle3Drafter:
    stored = random_drafter(model.config, 0, vocab)
    return Eagle3Drafter(stored.config, stored.tensors, model.embedding, model.dtype, native=native)


class Scripted(Eagle3Drafter):
    """Drafts `scripts[b][t]` as output t of sequence b, in a tree behind `place` wrong tokens; all else is real."""

    def __init__(self, model: Transformer, ids: list[list[int]], scripts: list[list[int]], place: int = 0) -> None:
        stored = random_drafter(model.config, 0, model.config.vocab)
        super().__init__(stored.config, stored.tensors, model.embedding, model.dtype)
        self.starts, self.scripts, self.place = [len(prompt) for prompt in ids], scripts, place

    def extend(self, taps: Sequence[Tensor], ids: Tensor, cache: DraftCache) -> Tensor:
        self.cache, self.level = cache, 0
        return super().extend(taps, ids, cache)

    def expand(self, ids: Tensor, features: Tensor, cache: DraftCache, level: int, visible: Tensor) -> Tensor:
        self.level = level + 1
        return super().expand(ids, features, cache, level, visible)

    def logits(self, features: Tensor) -> Tensor:
        logits = torch.zeros(*features.shape[:2], self.config.layer.vocab)
        logits[..., 290 : 290 + self.place] = 21.0
        for b, row in enumerate(logits):
            if (token := self._next(self.cache, b, self.level)) is not None:
                row[:, token] = 20.0
        return logits

    def chain(self, taps: Any, ids: Tensor, last: Tensor, counts: Any, cache: DraftCache, *more: Any) -> Any:
        drafted, scores, marks = super().chain(taps, ids, last, counts, cache, *more)
        found = torch.arange(290, 290 + drafted.shape[2]).expand(drafted.shape).clone()
        found[..., self.place] = torch.tensor([
            [self._next(cache, b, level) or 0 for level in range(drafted.shape[1])] for b in range(len(drafted))
        ])  # fmt: skip
        if scores is not None:
            scores = torch.full_like(scores, -20.0)
            scores[..., self.place] = -1e-3
        return found, scores, marks

    def _next(self, cache: DraftCache, b: int, level: int) -> int | None:
        output = cache.sizes[b] - 1 + level + 2 - self.starts[b]  # the last pair predicts the token after next
        return self.scripts[b][output] if output < len(self.scripts[b]) else None


def decode(engine: Any, ids: list[list[int]], request: Request) -> tuple[Generated, Meter]:
    meter = Meter(CPU)
    return engine.generate(ids, request, meter), meter


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_drafter_changes_no_token(family: str, options: dict[str, Any]) -> None:
    model, ids = runtime(family, "auto"), prompts(4, 23, 1)
    request = Request(16, GREEDY, (0, 0, 0), frozenset({2}))
    plain, _ = decode(Autoregressive(model), ids, request)
    assert decode(Eagle3(model, random(model), **options), ids, request)[0] == plain


@needs_native
@pytest.mark.parametrize("options", [SETTINGS[1], SETTINGS[2], *SETTINGS[4:]], ids=str)
def test_the_native_drafter_proposes_what_torch_proposes(options: dict[str, Any]) -> None:
    model, ids = runtime("smollm", "auto"), prompts(4, 23, 1)
    request, found = Request(16, GREEDY, (0, 0, 0)), []
    for native in (True, False):
        engine = Eagle3(model, random(model, native=native), **options)
        state = started(engine, ids, 2)
        meter = Meter(CPU)
        meter.begin_step()
        rows = engine._draft(state, meter, state.active)
        forwards = decode(engine, ids, request)[1].records()[1]
        found.append((rows.ids.tolist(), rows.parents.tolist(), [(f.rows, f.flops, f.bytes_read) for f in forwards]))
    assert found[0] == found[1]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_drafter_right_here_and_wrong_there_changes_no_token(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    options = data.draw(st.sampled_from(SETTINGS))
    sampling = Sampling(data.draw(st.sampled_from([0.0, 0.8])))
    model, ids = runtime("llama3", "auto"), prompts(*sizes)
    free = Request(14, sampling, tuple(range(len(sizes))))
    truth = decode(Autoregressive(model), ids, free)[0].outputs
    eos = data.draw(st.sampled_from([2, truth[0][5]]))  # one that comes, often within a draft
    request = replace(free, eos_ids=frozenset({eos}))
    right = data.draw(st.lists(st.booleans(), min_size=14, max_size=14))
    scripts = [[t if ok else (t + 1) % 300 for t, ok in zip(row, right, strict=True)] for row in truth]
    place = data.draw(st.integers(0, options.get("top_k", 1) - 1))
    engine = Eagle3(model, Scripted(model, ids, scripts, place), **options)
    assert decode(engine, ids, request)[0] == decode(Autoregressive(model), ids, request)[0]


@pytest.mark.parametrize("options", WHOLE, ids=str)
def test_a_drafter_that_is_always_right_gains_a_full_path_each_step(options: dict[str, Any]) -> None:
    model, ids = runtime("smollm", "auto"), prompts(5, 9)
    request = Request(1 + 3 * (options["depth"] + 1), GREEDY, (0, 0))
    truth = decode(Autoregressive(model), ids, replace(request, limit=request.limit + 8))[0].outputs
    generated, meter = decode(Eagle3(model, Scripted(model, ids, truth), **options), ids, request)
    steps, _ = meter.records()
    gained = options["depth"] + 1
    assert [step.committed for step in steps] == [(1, 1)] + [(gained, gained)] * 3
    assert [step.accepted for step in steps[1:]] == [(gained - 1, gained - 1)] * 3
    assert {step.drafted for step in steps[1:]} == {(options.get("tokens", options["depth"]),) * 2}
    assert generated.outputs == [row[: request.limit] for row in truth]


@needs_native
@pytest.mark.parametrize("options", [SETTINGS[1], SETTINGS[2], SETTINGS[4]], ids=str)
def test_bfloat16_is_the_same_bit_by_bit_on_the_native_decoder(options: dict[str, Any]) -> None:
    model, ids = runtime("qwen3", "native", torch.bfloat16), prompts(4, 19, 7)
    request = Request(24, GREEDY, (0, 0, 0))
    truth = decode(Autoregressive(model), ids, request)[0]
    scripts = [[t if i % 5 else (t + 1) % 300 for i, t in enumerate(row)] for row in truth.outputs]
    assert decode(Eagle3(model, Scripted(model, ids, scripts), **options), ids, request)[0] == truth
    assert decode(Eagle3(model, random(model), **options), ids, request)[0] == truth


def committed(cache: Cache, index: int) -> Tensor:
    """Keys and values of one sequence [2, L, kv_heads, size, d]."""
    keys = cache.keys
    if cache.panels:
        keys = cpu.key_panels(keys).transpose(-2, -3).reshape(keys.shape)
    return torch.stack([keys, cache.values])[:, :, index, :, : cache.sizes[index]]


def pairs(cache: DraftCache, index: int, size: int) -> Tensor:
    """The first pairs' keys and values of one sequence [2, kv_heads, size, d]."""
    keys = cache.keys
    if cache.panels:
        keys = cpu.key_panels(keys).transpose(-2, -3).reshape(keys.shape)
    return torch.stack([keys, cache.values])[:, index, :, cache.first : cache.first + size]


def started(engine: Eagle3, ids: list[list[int]], steps: int) -> Eagle3State:
    """The state after some steps, as `generate` keeps it."""
    meter = Meter(CPU)
    meter.begin_step()
    state = engine.start(ids, Request(60, GREEDY, (0,) * len(ids)), meter)
    for output, token in zip(state.outputs, state.last.tolist(), strict=True):
        output.append(token)
    for _ in range(steps):
        step = engine.step(state, meter)
        for output, gained in zip(state.outputs, step.tokens, strict=True):
            output.extend(gained)
    return state


def fresh(model: Transformer, drafter: Eagle3Drafter, tokens: list[int]) -> tuple[Cache, DraftCache, Tensor]:
    """Both caches after reading `tokens` but the last in one go, and the drafter's last feature [1, 1, h]."""
    cache, meter = model.new_cache(1, len(tokens)), Meter(CPU)
    meter.begin_step()
    _, hidden = base.prefill(model, cache, [tokens[:-1]], meter, drafter.config.taps)
    draft_cache = drafter.new_cache(1, len(tokens) + 8, nodes=8)
    features = drafter.extend([hidden[tap] for tap in drafter.config.taps], torch.tensor([tokens[1:]]), draft_cache)
    draft_cache.extend([len(tokens) - 1])
    return cache, draft_cache, features[:, -1:]


@pytest.mark.parametrize("execution", ["eager", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("options", [SETTINGS[1], SETTINGS[2], SETTINGS[4], SETTINGS[5]], ids=str)
def test_caches_after_acceptance_equal_a_fresh_prefill(options: dict[str, Any], execution: str) -> None:
    model, ids = runtime("smollm", execution), prompts(6, 11)
    truth = decode(Autoregressive(model), ids, Request(60, GREEDY, (0, 0)))[0].outputs
    scripts = [[t if i % 4 else (t + 1) % 300 for i, t in enumerate(row)] for row in truth]
    engine = Eagle3(model, Scripted(model, ids, scripts, options.get("top_k", 1) - 1), **options)
    state = started(engine, ids, 5)
    assert min(len(output) for output in state.outputs) > 10  # drafts were accepted
    for index, prompt in enumerate(ids):
        cache, draft_cache, _ = fresh(model, engine.drafter, prompt + state.outputs[index])
        assert cache.sizes == [state.cache.sizes[index]]
        error = relative_error(committed(state.cache, index), committed(cache, 0))
        assert error <= (0 if execution == "native" else 1e-5)
        size = state.draft_cache.sizes[index]
        assert size == len(prompt) + len(state.outputs[index]) - 1 - state.unread_sizes[index]
        assert relative_error(pairs(state.draft_cache, index, size), pairs(draft_cache, 0, size)) < 1e-4


def published_tree(
    model: Transformer, drafter: Eagle3Drafter, tokens: list[int], depth: int, k: int, kept: int, width: int
) -> set:
    """EAGLE-2's dynamic tree as paths; `width` is k there. A node's log-probabilities are from a draft of its own."""

    def children(path: tuple[int, ...]) -> list[tuple[float, int]]:
        _, cache, feature = fresh(model, drafter, tokens)
        for level, token in enumerate(path):
            visible = (torch.arange(8) <= level).view(1, 1, 8)
            feature = drafter.expand(torch.tensor([[token]]), feature, cache, level, visible)
        best = drafter.logits(feature)[0, 0].log_softmax(-1).topk(k)
        return list(zip(best.values.tolist(), drafter.target_ids(best.indices).tolist(), strict=True))

    beam: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    candidates: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(depth):
        level = [(score + gain, (*path, token)) for score, path in beam for gain, token in children(path)]
        candidates += level
        beam = sorted(level, reverse=True)[:width]
    return {path for _, path in sorted(candidates, reverse=True)[:kept]}


@pytest.mark.parametrize("beam", [1, 2, 3])
@pytest.mark.parametrize("steps", [0, 3])
def test_the_tree_is_the_published_one(steps: int, beam: int) -> None:
    model, ids = runtime("smollm", "auto"), prompts(5, 9)
    stored = random_drafter(model.config, 0, 64)
    wide = {name: t if t.dim() == 1 else 10 * t for name, t in stored.tensors.items()}
    drafter = Eagle3Drafter(stored.config, wide, model.embedding, model.dtype)
    engine = Eagle3(model, drafter, depth=3, top_k=3, tokens=8, beam=beam)
    state = started(engine, ids, steps)
    meter = Meter(CPU)
    meter.begin_step()
    rows = engine._draft(state, meter, state.active)
    for index, prompt in enumerate(ids):
        paths: list[tuple[int, ...]] = [()]
        for token, parent in zip(rows.ids[index, 1:].tolist(), rows.parents[index, 1:].tolist(), strict=True):
            paths.append((*paths[parent], token))
        assert set(paths[1:]) == published_tree(model, drafter, prompt + state.outputs[index], 3, 3, 8, beam)


def test_a_long_prompt_is_read_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = runtime("mistral", "auto"), prompts(30, 17, 8)
    drafter = random(model)
    whole = started(Eagle3(model, drafter), ids, 0).draft_cache
    monkeypatch.setattr(base, "PREFILL_ROWS", 8)
    parts = started(Eagle3(model, drafter), ids, 0).draft_cache
    assert parts.sizes == whole.sizes == [29, 16, 7]
    for index, size in enumerate(whole.sizes):
        assert relative_error(pairs(parts, index, size), pairs(whole, index, size)) < 1e-5


def test_every_forward_is_recorded_with_its_role_and_rows() -> None:
    model, ids = runtime("smollm", "auto"), prompts(5)
    engine = Eagle3(model, random(model), depth=3, top_k=2, tokens=6)
    _, meter = decode(engine, ids, Request(2, GREEDY, (0,)))
    steps, forwards = meter.records()
    assert [(f.model, f.role, f.rows) for f in forwards] == [
        ("target", "prefill", 5),
        ("drafter", "draft", 4),
        ("drafter", "draft", 1),
        ("drafter", "draft", 2),
        ("drafter", "draft", 2),
        ("target", "verify", 7),
    ]
    assert [f.context for f in forwards] == [0, 0, 4, 5, 5, 5]
    assert [f.committed for f in forwards] == [1, 0, 0, 0, 0, 1]
    for index, step in enumerate(steps):
        inside = sum(f.seconds for f in forwards if f.step == index)
        assert inside + step.accept_seconds + step.commit_seconds <= step.seconds


@pytest.mark.parametrize("options", [SETTINGS[1], SETTINGS[2], SETTINGS[4]], ids=str)
def test_synthetic_acceptance_gains_the_length_it_was_asked_for(options: dict[str, Any]) -> None:
    model, ids = runtime("smollm", "auto"), prompts(5)
    synthetic = parse({"length": 3}, options["depth"])
    _, meter = decode(Eagle3(model, random(model), **options, synthetic=synthetic), ids, Request(19, GREEDY, (0,)))
    assert [step.committed for step in meter.records()[0]] == [(1,)] + [(3,)] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth 0 and top_k 1 must be positive"),
        ({"top_k": 0}, "must be positive"),
        ({"top_k": 65}, "top_k within the draft vocabulary"),
        ({"depth": 3, "tokens": 4}, "depth 3 with top_k 1 drafts 3 to 3 tokens, not 4"),
        ({"depth": 2, "top_k": 2, "tokens": 7}, "drafts 2 to 6 tokens, not 7"),
        ({"depth": 3, "top_k": 2, "beam": 1, "tokens": 7}, "drafts 3 to 6 tokens, not 7"),
        ({"depth": 3, "top_k": 2, "beam": 3}, "a beam of 3 does not fit the 2 tokens"),
    ],
)
def test_a_setting_that_cannot_be_gets_one_line(options: dict[str, Any], message: str) -> None:
    model = runtime("smollm", "auto")
    with pytest.raises(UserError, match=message):
        Eagle3(model, random(model), **options)


@pytest.mark.parametrize("length", [1.0, 2.6, 5.0])
def test_a_synthetic_tree_gains_the_length_that_was_asked_for(length: float) -> None:
    model = runtime("smollm", "auto")
    checkpoint = random_drafter(model.config, draft_vocab=64)
    drafter = Eagle3Drafter(checkpoint.config, checkpoint.tensors, model.embedding, torch.float32)
    engine = Eagle3(model, drafter, depth=4, top_k=3, tokens=9, synthetic=parse({"length": length}, 4))
    meter = Meter(device.resolve("cpu"))
    engine.generate([[5, 6, 7]] * 8, Request(60, Sampling(), tuple(range(8))), meter)
    steps = meter.records()[0][1:-1]
    whole = [(a, d) for step in steps for a, d in zip(step.accepted, step.drafted, strict=True) if d]
    assert sum(a for a, _ in whole) / len(whole) + 1 == pytest.approx(length, abs=0.25)


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)])
def test_a_finished_sequence_has_no_say_in_how_far_another_drafts(native: bool) -> None:
    model, [ended, other] = runtime("smollm", "auto"), prompts(9, 5)
    [[eos]] = decode(Autoregressive(model), [ended], Request(1, GREEDY, (0,)))[0].outputs
    drafter, found = random(model, native=native), set[int]()

    def offered(ids: list[list[int]], confidence: float) -> list[int]:
        """To the last of the prompts, step by step."""
        request = Request(20, GREEDY, (0,) * len(ids), frozenset({eos}))
        meter = decode(Eagle3(model, drafter, depth=4, confidence=confidence), ids, request)[1]
        return [step.drafted[-1] for step in meter.records()[0][1:]]

    for confidence in (0.02, 0.025, 0.03, 0.04):
        alone = offered([other], confidence)
        assert len(alone) > 5
        assert offered([ended, other], confidence) == alone
        found.update(alone)
    assert found == {1, 2}  # chains of both lengths, and none of 4


@pytest.mark.parametrize("options", [{"depth": 2, "top_k": 2, "confidence": 0.3}], ids=str)
def test_confidence_ends_chains_only(options: dict[str, Any]) -> None:
    model = runtime("smollm", "auto")
    with pytest.raises(UserError, match=r"confidence 0\.3 ends chains; a beam of 2 drafts trees"):
        Eagle3(model, random(model), **options)
