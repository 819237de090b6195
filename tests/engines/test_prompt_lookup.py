"""Drafts from the text itself: what is found, and that every engine that looks there says what its target says."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engines.lossless import (
    ALPHA,
    CPU,
    assert_cache_is_fresh,
    assert_same_tokens,
    decode,
    first_tokens,
    joint,
    p_value,
    small_model,
)
from tests.engines.test_dflash import drafting
from tests.engines.test_diffusion import MASK, adapted
from tests.engines.test_eagle3 import pairs, random
from tests.tiny import FAMILIES, runtime
from zbench import scenario
from zbench.engines import Shared, create, synthetic
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Meter, Request, commit
from zbench.engines.dflash import DFlash
from zbench.engines.diffusion import Diffusion
from zbench.engines.diffusion_tree import DiffusionTree
from zbench.engines.eagle3 import Eagle3
from zbench.engines.prompt_lookup import (
    LONGEST_LOOKUP,
    PER_MATCHED,
    Lookup,
    PromptLookup,
    continued,
    kept_chances,
    proposed,
)
from zbench.engines.sampling import Sampling
from zbench.errors import UserError
from zbench.kernels import cpu
from zbench.models import dflash, loading, trees, zoo
from zbench.models.rows import Rows

GREEDY = Sampling()


def prompts(*sizes: int) -> list[list[int]]:
    """Texts that say the same again and again, with other tokens between."""
    generator = torch.Generator().manual_seed(4)
    phrase = torch.randint(3, 300, (9,), generator=generator).tolist()
    return [[*phrase, *torch.randint(3, 300, (size,), generator=generator).tolist(), *phrase[:4]] for size in sizes]


KINDS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "alone": lambda model, *_: PromptLookup(model, 2, 6),
    "EAGLE-3, chain": lambda model, drafter, *_: Eagle3(model, drafter, 3, lookup=2),
    "EAGLE-3, tree": lambda model, drafter, *_: Eagle3(model, drafter, 3, 3, 8, lookup=2),
    "EAGLE-3, siblings": lambda model, drafter, *_: Eagle3(model, drafter, 3, 3, 5, None, 1e-4, 1, lookup=2),
    "DFlash, chain": lambda model, _, filler, *__: DFlash(model, filler, 4, lookup=2),
    "DFlash, tree": lambda model, _, filler, *__: DFlash(model, filler, 4, tokens=6, lookup=2),
    "DFlash, small tree": lambda model, _, filler, *__: DFlash(model, filler, 5, tokens=3, lookup=2),
    "TiDAR, all outcomes": lambda model, _, __, adapter: Diffusion(model, MASK, 4, adapter=adapter, lookup=2),
    "TiDAR, 2 outcomes": lambda model, _, __, adapter: Diffusion(model, MASK, 5, 2, adapter=adapter, lookup=2),
    "TiDAR, tree": lambda model, _, __, adapter: DiffusionTree(model, MASK, 4, 6, 2, adapter, lookup=2),
    "TiDAR, tree of few": lambda model, _, __, adapter: DiffusionTree(model, MASK, 5, 2, 5, adapter, lookup=2),
}


def engine_of(kind: str, execution: str = "auto") -> Any:
    """It looks up from two tokens on; drafters and masks know nothing."""
    model, adapter = adapted(execution, shift=1)
    return KINDS[kind](model, random(model, native=execution != "eager"), drafting("qwen3", execution)[1], adapter)


def by_hand(text: Sequence[int], match: int, tokens: int) -> list[int]:
    """Every earlier place tried, one token after another."""
    best, found = 0, 0
    for place in range(1, len(text)):
        length = 0
        while length < min(place, LONGEST_LOOKUP) and text[place - 1 - length] == text[-1 - length]:
            length += 1
        if length and length >= best:
            best, found = length, place
    if best < max(match, 1):
        return []
    said = list(text)
    for ahead in range(min(tokens, PER_MATCHED * best)):
        said.append(said[found + ahead])
    return said[len(text) :]


@settings(max_examples=400)
@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=90),
    match=st.integers(1, 8),
    tokens=st.integers(1, 12),
)
def test_what_is_found_is_what_followed_the_longest_match_the_last_time(
    text: list[int], match: int, tokens: int
) -> None:
    assert continued(np.array(text), match, tokens) == by_hand(text, match, tokens)


@pytest.mark.parametrize(
    ("text", "match", "found"),
    [
        ([5, 6, 7, 8, 5, 6], 2, [7, 8, 5, 6]),
        ([5, 6, 7, 8, 5, 6], 3, []),
        ([5, 6, 7, 9, 6, 4, 5, 6], 1, [7, 9, 6, 4]),  # the longer match, though another is later
        ([1, 2, 9, 2, 8, 2], 1, [8, 2]),  # the later of two that are as long
        ([4, 4, 4], 1, [4, 4, 4, 4]),  # text that repeats itself goes on
        ([7], 1, []),
    ],
)
def test_examples(text: list[int], match: int, found: list[int]) -> None:
    assert continued(np.array(text), match, 6) == found


def test_a_lookup_reads_outputs_as_they_grow_and_leaves_finished_sequences_alone() -> None:
    lookup = Lookup([[5, 6, 7], [5, 6, 7]], 6, 2, 4)
    assert lookup.drafts([[9], [9]], [True, True]) == [[], []]
    assert lookup.drafts([[9, 5, 6], [9, 5, 6]], [True, False]) == [[7, 9, 5, 6], []]
    assert lookup.drafts([[9, 5, 6, 7, 9], [9, 5, 6]], [True, True]) == [[5, 6, 7, 9], [7, 9, 5, 6]]


def test_the_chances_of_outcomes_add_up_and_follow_from_the_chance_of_a_draft() -> None:
    for count in range(1, 9):
        chances = kept_chances(count)
        assert len(chances) == count
        assert sum(chances) == pytest.approx(1)
        for kept in range(1, count):
            assert sum(chances[kept:]) == pytest.approx(0.75**kept)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.7)], ids=["greedy", "T 0.7"])
@pytest.mark.parametrize("execution", ["auto", "eager"])
@pytest.mark.parametrize("sizes", [(3,), (3, 30, 0, 11)], ids=["one", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_the_targets_own(kind: str, sizes: tuple[int, ...], execution: str, sampling: Sampling) -> None:
    engine, ids = engine_of(kind, execution), prompts(*sizes)
    request = Request(40, sampling, tuple(range(len(ids))), frozenset(range(6)))
    want = decode(Autoregressive(engine.model), ids, request)
    meter = Meter(CPU)
    got = engine.generate(ids, request, meter)
    assert (got.outputs, got.finish) == (want.outputs, want.finish)
    steps = meter.records()[0][1:]
    if sampling.greedy:
        assert any(any(step.looked_up) for step in steps)
        assert not all(all(step.looked_up) for step in steps)
    for step in steps:
        for drafted, accepted, gained in zip(step.drafted, step.accepted, step.committed, strict=True):
            assert accepted <= drafted
            assert gained == (accepted + 1 if gained else 0)


@functools.cache
def tiny(execution: str) -> tuple[Shared, list[list[int]]]:
    """A real model, and texts of which it repeats much."""
    shared = Shared(loading.load("zbench-tiny", "float32"), torch.float32, CPU)
    texts = [
        "Repeat this list of words three times: red, green, blue, yellow, black, white.",
        "a a a a a a a a a a a a",
        "The quick brown fox jumps. The quick brown fox",
    ]
    found = [shared.tokenizer.encode(text) for text in texts]
    return shared, [*(list(getattr(ids, "ids", ids)) for ids in found), [5], [7] * 18]


REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "alone": ("prompt_lookup", {"tokens": 32}),
    "EAGLE-3, chain": ("eagle3", {"drafter": {"zoo": "zbench-tiny-eagle3"}, "depth": 6}),
    "EAGLE-3, tree": ("eagle3", {"drafter": {"zoo": "zbench-tiny-eagle3"}, "depth": 2, "top_k": 6, "tokens": 40}),
    "DFlash, chain": ("dflash", {"drafter": {"zoo": "zbench-tiny-dflash"}, "block": 7}),
    "DFlash, tree": ("dflash", {"drafter": {"zoo": "zbench-tiny-dflash"}, "block": 3, "tokens": 30}),
    "TiDAR": ("diffusion", {"adapter": {"zoo": "zbench-tiny-tidar"}, "block_size": 8, "proposals": 2}),
    "TiDAR, tree": (
        "diffusion",
        {"adapter": {"zoo": "zbench-tiny-tidar"}, "block_size": 4, "tokens": 20, "proposals": 3},
    ),
}


@pytest.mark.parametrize("execution", ["auto", "eager"])
@pytest.mark.parametrize("kind", REAL)
def test_long_drafts_ragged_batches_and_every_limit(kind: str, execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is of any length, beside sequences that find nothing, and that have finished."""
    if execution == "eager":  # what a GPU runs
        without = SimpleNamespace(available=lambda: False, can_verify=lambda _: False, NEVER=cpu.NEVER)
        monkeypatch.setattr(trees, "cpu", without)
    seen, lookup = list[list[int]](), Lookup.drafts

    def drafts(self: Lookup, outputs: Any, active: Any) -> Any:
        found = lookup(self, outputs, active)
        seen.append([len(each) for each in found])
        return found

    monkeypatch.setattr(Lookup, "drafts", drafts)
    shared, texts = tiny(execution)
    name, given = REAL[kind]
    given = {**given, "execution": execution, **({"match": 1} if name == "prompt_lookup" else {"lookup": 1})}
    engine = create(name, scenario.ENGINES[name](name=name, **given).options, shared)
    plain, generator, longest = Autoregressive(shared.target(execution)), Random(3), 0
    for _ in range(12):
        ids = [generator.choice(texts) for _ in range(generator.choice((1, 2, 4)))]
        ids = [row[generator.randrange(len(row)) :] for row in ids]
        request = Request(generator.choice((1, 2, 15, 31, 47)), GREEDY, (0,) * len(ids))
        want = decode(plain, ids, request)
        if generator.random() < 0.7:
            request = replace(request, eos_ids=frozenset({generator.choice(generator.choice(want.outputs))}))
            want = decode(plain, ids, request)
        seen.clear()
        meter = Meter(CPU)
        got = engine.generate(ids, request, meter)
        assert (got.outputs, got.finish) == (want.outputs, want.finish)
        for step, sizes in zip(meter.records()[0][1:], seen, strict=False):
            each = zip(sizes, step.looked_up, step.drafted, step.accepted, step.committed, strict=True)
            for size, found, drafted, accepted, gained in each:
                assert found == bool(size)
                assert accepted <= drafted
                assert not size or drafted == size
                assert gained in (0, accepted + 1)
                longest = max(longest, accepted if found else 0)
    assert longest >= {"TiDAR": 7, "EAGLE-3, chain": 6, "DFlash, chain": 6}.get(kind, 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_says_anything_else(family: str) -> None:
    model = runtime(family, "auto")
    assert_same_tokens(PromptLookup(model, 1, 8), model, prompts(3, 30, 0), Request(30, GREEDY, (0, 0, 0)))


@pytest.mark.parametrize("kind", KINDS)
def test_caches_hold_what_a_prefill_of_the_committed_tokens_would(kind: str) -> None:
    engine = engine_of(kind)
    assert_cache_is_fresh(engine, engine.model, prompts(3, 30), Request(40, GREEDY, (0, 0)), 12)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("options", [{}, {"top_k": 3, "tokens": 8}], ids=["chain", "tree"])
def test_a_drafter_that_was_not_asked_has_read_what_was_committed(options: dict[str, Any], native: bool) -> None:
    model = runtime("smollm", "auto" if native else "eager")
    drafter, ids = random(model, native=native), prompts(3, 30)
    states = []
    for lookup in (1, None):
        engine, meter = Eagle3(model, drafter, 3, lookup=lookup, **options), Meter(CPU)
        request, finish = Request(60, GREEDY, (0, 0)), ["length"] * 2
        with meter.step():
            state = engine.start(ids, request, meter)
            commit([[token] for token in state.last.tolist()], state.outputs, state.active, request, finish)
            while min(map(len, state.outputs)) < 30:
                commit(engine.step(state, meter).tokens, state.outputs, state.active, request, finish)
        states.append(state)
    looked_up, plain = states
    assert looked_up.outputs[0][:30] == plain.outputs[0][:30]
    for row in range(2):
        size = min(state.draft_cache.sizes[row] for state in states)
        assert size > len(ids[row]) + 20
        want, got = (pairs(state.draft_cache, row, size) for state in (plain, looked_up))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("execution", ["auto", "eager"])
def test_a_drafter_of_blocks_that_was_not_asked_has_read_paths_longer_than_its_block(execution: str) -> None:
    shared, ids = tiny(execution)
    target, ids = shared.target(execution), ids[:2]
    stored = dflash.load_drafter(zoo.drafter("zbench-tiny-dflash", "dflash"), target.config)
    drafter, request = dflash.DFlashDrafter(stored.config, stored.tensors, target), Request(60, GREEDY, (0, 0))
    engine, meter, longest = DFlash(target, drafter, 2, tokens=8, lookup=1), Meter(CPU), 0
    with meter.step():
        state = engine.start(ids, request, meter)
        commit([[token] for token in state.last.tolist()], state.outputs, state.active, request, ["length"] * 2)
        while min(map(len, state.outputs)) < 40 and all(state.active):
            tokens = engine.step(state, meter).tokens
            longest = max(longest, *map(len, tokens))
            commit(tokens, state.outputs, state.active, request, ["length"] * 2)
    assert longest > 3  # rows of a path: more than a block
    drafted = drafter.draft(torch.tensor([7, 7]), state.context, 4, state.features, state.unread).logits
    for row, prompt in enumerate(ids):
        committed = [*prompt, *state.outputs[row]][: state.cache.sizes[row]]
        cache, context = target.new_cache(1, 256), drafter.new_cache(1, 256)
        taps = stored.config.taps
        fresh = target.forward(Rows.chain(torch.tensor([committed]), cache.lengths), cache, capture=sorted(taps))
        drafter.read([fresh.hidden[tap] for tap in taps], context, [len(committed)])
        alone = drafter.draft(torch.tensor([7]), context, 4).logits[0]
        torch.testing.assert_close(drafted[row], alone, rtol=1e-3, atol=1e-3)


def test_rows_are_what_was_found_or_drafted_and_padding_is_no_draft() -> None:
    model, ids = runtime("smollm", "auto"), [[5, 6, 7, 8, 5, 6], [5, 6, 9], [4, 3], [8, 9, 4, 8]]
    with (meter := Meter(CPU)).step():
        state = PromptLookup(model).start(ids, Request(8, GREEDY, (0,) * 4), meter)
    state.lookup = Lookup(ids, 8, 1, 3)
    state.outputs[:], state.active[:] = [[7, 8], [5], [1], [8]], [True, True, True, False]
    lengths = state.cache.lengths
    deep = [-1, 0, 0, 2, 3, 4, 5]
    tree = Rows.tree(torch.arange(20, 48).view(4, 7), lengths, torch.tensor([deep]).expand(4, 7))
    asked = []
    found = proposed(state.lookup, state, lambda wanting: asked.append(wanting) or tree)  # type: ignore[func-returns-value]
    assert asked == [[False, False, True, False]]
    assert found.drafted == (3, 2, 6, 0)
    assert found.looked_up == (True, True, False, False)
    last = state.last.tolist()
    assert found.rows.ids[:2].tolist() == [[last[0], 5, 6, 7, 0, 0, 0], [last[1], 6, 9, 0, 0, 0, 0]]
    assert found.rows.ids[2].tolist() == [*range(34, 41)]
    parents = [[-1, 0, 1, 2, *[-1] * 3], [-1, 0, 1, *[-1] * 4], deep, deep]
    assert found.rows.parents.tolist() == parents
    want = Rows.tree(found.rows.ids, lengths, torch.tensor(parents))
    real = found.rows.parents >= 0
    assert torch.equal(found.rows.visible[real], want.visible[real])
    assert torch.equal(found.rows.positions[real], want.positions[real])
    worth = found.worth(torch.linspace(-0.1, -0.7, 7).expand(4, 7))
    copied = [0, math.log(0.75), 2 * math.log(0.75), 3 * math.log(0.75)]
    assert worth[0].tolist() == pytest.approx([*copied, *[cpu.NEVER] * 3])
    assert worth[1].tolist() == pytest.approx([*copied[:3], *[cpu.NEVER] * 4])
    assert worth[2].tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7])
    state.active[2] = False  # all that go on find something, of different lengths: nobody is asked
    found = proposed(state.lookup, state, lambda _: pytest.fail("asked"), lambda: asked.append([]))
    assert asked[1:] == [[]]
    assert found.rows.parents.tolist() == [parents[0][:4], parents[1][:4], [-1] * 4, [-1] * 4]
    assert found.worth(torch.zeros(4, 2))[3].tolist() == pytest.approx([0, *[cpu.NEVER] * 3])
    assert found.drafted == (3, 2, 0, 0)
    state.active[1] = False
    found = proposed(state.lookup, state, lambda _: pytest.fail("asked"))
    assert found.rows.causal
    assert found.rows.ids[0].tolist() == [last[0], 5, 6, 7]


def test_where_all_sequences_look_up_no_drafter_drafts_and_where_one_does_not_it_drafts_for_that() -> None:
    model = runtime("smollm", "auto")
    engine = Eagle3(model, random(model), 3, lookup=2)
    for ids in (prompts(3), prompts(3, 30, 11)):
        meter = Meter(CPU)
        engine.generate(ids, Request(40, GREEDY, (0,) * len(ids)), meter)
        steps, forwards = meter.records()
        for index, step in enumerate(steps[1:], 1):
            drafts = [f for f in forwards if f.step == index and f.role == "draft"]
            live = [found for found, gained in zip(step.looked_up, step.committed, strict=True) if gained]
            assert len(drafts) == (1 if all(live) else 3)
            for found, drafted, gained in zip(step.looked_up, step.drafted, step.committed, strict=True):
                assert not gained or drafted == 3 or (found and drafted < 3)


@pytest.mark.parametrize("sampling", [Sampling(0.9), Sampling(1.1, top_k=4)], ids=["T", "top_k"])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_the_joint_distribution_stays_what_it_was(sampling: Sampling, tree: bool) -> None:
    model, prompt = small_model(), [1, 4, 2, 1, 4]
    engine = DiffusionTree(model, 5, 3, 4, 2, lookup=1) if tree else PromptLookup(model, 1, 4)
    assert p_value(first_tokens(engine, prompt, sampling, 3), joint(model, prompt, sampling, 3)) > ALPHA


def test_drafts_that_are_accepted_unseen_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: an engine that believes what it copied has another distribution."""
    from zbench.engines import prompt_lookup
    from zbench.engines.verify import verify_chain

    def believing(logits: Any, rows: Rows, sampler: Any, outputs: Any) -> Any:
        drafts = rows.ids[:, 1:]
        return verify_chain(
            logits, drafts, sampler, [len(o) for o in outputs], trusted=torch.ones_like(drafts, dtype=torch.bool)
        )

    monkeypatch.setattr(prompt_lookup, "verify_rows", believing)
    model, prompt, sampling = small_model(), [1, 4, 2, 1, 4], Sampling(0.9)
    samples = torch.cat([first_tokens(PromptLookup(model, 1, 4), prompt, sampling, 3, 1) for _ in range(200)])
    assert p_value(samples, joint(model, prompt, sampling, 3)) < ALPHA


def test_a_real_model_gains_by_looking_up_and_a_trained_drafter_by_both() -> None:
    shared, (ids, *_) = tiny("auto")
    lengths = {}
    for name, options in {
        "plain": ("autoregressive", {}),
        "lookup": ("prompt_lookup", {}),
        "drafter": ("eagle3", {"drafter": {"zoo": "zbench-tiny-eagle3"}}),
        "both": ("eagle3", {"drafter": {"zoo": "zbench-tiny-eagle3"}, "lookup": 3}),
    }.items():
        engine = create(options[0], scenario.ENGINES[options[0]](name=options[0], **options[1]).options, shared)
        meter = Meter(CPU)
        outputs = engine.generate([ids], Request(120, GREEDY, (0,)), meter).outputs
        lengths[name] = 119 / (len(meter.records()[0]) - 1), outputs
    assert all(outputs == lengths["plain"][1] for _, outputs in lengths.values())
    assert lengths["lookup"][0] > 1.2
    assert lengths["both"][0] > lengths["drafter"][0]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"name": "eagle3", "drafter": {"random": True}, "lookup": 0}, "greater than or equal to 1"),
        ({"name": "eagle3", "drafter": {"random": True}, "lookup": 2, "synthetic": {"length": 2}}, "leave it or syn"),
        ({"name": "dflash", "drafter": {"random": True}, "lookup": 2, "draft_sampling": True}, "or draft_sampling out"),
        ({"name": "diffusion", "mask_id": 3, "lookup": 2, "sampler": "trust_diffusion"}, "or sampler out"),
        ({"name": "diffusion", "mask_id": 3, "lookup": 2, "proposals": 0}, "or proposals: 0 out"),
        ({"name": "diffusion", "mask_id": 3, "lookup": 2, "block_size": 1}, "or block_size: 1 out"),
        ({"name": "prompt_lookup", "match": 33}, "less than or equal to 32"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        scenario.ENGINES[options["name"]](**options)


def test_engines_refuse_what_lookups_do_not_go_with() -> None:
    model, adapter = adapted("auto", shift=1)
    drawn = synthetic.parse({"length": 2}, 3)
    with pytest.raises(UserError, match="none are drawn"):
        Eagle3(model, random(model), 3, synthetic=drawn, lookup=2)
    with pytest.raises(UserError, match="none are drawn"):
        DFlash(model, drafting("qwen3", "auto")[1], 4, draft_sampling=True, lookup=2)
    with pytest.raises(UserError, match="verifies them exactly"):
        Diffusion(model, MASK, 4, adapter=adapter, trust=0.5, lookup=2)
