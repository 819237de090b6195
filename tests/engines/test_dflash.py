"""DFlash decoding: the target's own tokens whatever the drafter proposes, and what the meter writes down about it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from tests.models.test_dflash import TAPS, wide_drafter
from tests.tiny import FAMILIES, runtime
from zbench.engines import Shared, base, synthetic
from zbench.engines import dflash as dflash_engine
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Generated, Meter, Request
from zbench.engines.dflash import DFlash
from zbench.engines.sampling import Sampling, probabilities
from zbench.errors import UserError
from zbench.hardware import device
from zbench.kernels import cpu
from zbench.models import dflash, loading, zoo
from zbench.models.cache import Cache
from zbench.models.config import ModelConfig
from zbench.models.dflash import DFlashDrafter, Drafts
from zbench.models.rows import Rows
from zbench.models.transformer import Transformer

CPU = device.resolve("cpu")
GREEDY = Sampling()
needs_native = pytest.mark.skipif(not cpu.available(), reason=f"native CPU kernels: {cpu.unavailable_reason()}")
EXECUTIONS = ["eager", pytest.param("native", marks=needs_native)]
Proposal = Callable[[list[int], int], list[int]]  # (the tokens that AR would put here, vocabulary) -> what is drafted


class Scripted(DFlashDrafter):
    """A drafter that knows what autoregressive decoding would say next, and proposes what `propose` makes of it."""

    def __init__(
        self, target: Transformer, prompts: list[list[int]], outputs: list[list[int]], propose: Proposal
    ) -> None:
        checkpoint = wide_drafter(target.config)
        super().__init__(checkpoint.config, checkpoint.tensors, target)
        self.prompts, self.outputs, self.propose = prompts, outputs, propose

    def draft(
        self, anchor: Tensor, cache: Cache, block: int, features: Any = (), counts: Any = (), tree: Any = None
    ) -> Drafts:
        logits = torch.zeros_like(super().draft(anchor, cache, block, features, counts).logits)
        for row, (prompt, output) in enumerate(zip(self.prompts, self.outputs, strict=True)):
            at = cache.sizes[row] - len(prompt) + 1  # the context ends before the anchor, output at - 1
            following = (output + [5] * block)[at : at + block - 1]
            for slot, token in enumerate(self.propose(following, logits.shape[-1])):
                logits[row, slot, token] = 1.0
        return Drafts(logits.argmax(-1), logits, tree.grow(anchor, cache.lengths, logits)[0] if tree else None)


class Doubtful(Scripted):
    """At every place the right token is the `rank`-th likeliest, behind wrong ones that are a little likelier."""

    rank = 2

    def draft(
        self, anchor: Tensor, cache: Cache, block: int, features: Any = (), counts: Any = (), tree: Any = None
    ) -> Drafts:
        logits = 20 * super().draft(anchor, cache, block, features, counts).logits
        answers = logits.argmax(-1, keepdim=True)
        for ahead in range(1, self.rank):
            logits.scatter_(2, (answers + ahead) % logits.shape[-1], 20.0 + 0.1 * ahead)
        return Drafts(logits.argmax(-1), logits, tree.grow(anchor, cache.lengths, logits)[0] if tree else None)


def right(following: list[int], _: int) -> list[int]:
    return following


def wrong(following: list[int], vocab: int) -> list[int]:
    return [(token + 1) % vocab for token in following]


def right_then_wrong(count: int) -> Proposal:
    return lambda following, vocab: following[:count] + wrong(following[count:], vocab)


def prompts(*sizes: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (size,), generator=generator).tolist() for size in sizes]


def decode(engine: Any, ids: list[list[int]], request: Request) -> tuple[Generated, Meter]:
    meter = Meter(CPU)
    return engine.generate(ids, request, meter), meter


@functools.cache
def drafting(family: str, execution: str, dtype: torch.dtype = torch.float32) -> tuple[Transformer, DFlashDrafter]:
    target = runtime(family, execution, dtype)
    checkpoint = wide_drafter(target.config)
    return target, DFlashDrafter(checkpoint.config, checkpoint.tensors, target)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_drafter_that_knows_nothing_leaves_every_token_as_it_was(family: str, execution: str) -> None:
    target, drafter = drafting(family, execution)
    ids, request = prompts(4, 23, 1), Request(24, GREEDY, (0, 0, 0), frozenset({2}))
    plain, _ = decode(Autoregressive(target), ids, request)
    drafted, _ = decode(DFlash(target, drafter), ids, request)
    assert drafted == plain


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    block=st.integers(2, 9),
    limit=st.integers(1, 20),
    right_count=st.integers(0, 8),
    temperature=st.sampled_from([0.0, 0.7]),
    eos_at=st.none() | st.integers(0, 12),
    tokens=st.none() | st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_drafts_right_up_to_any_slot_leave_every_token_and_finish_as_it_was(
    sizes: list[int], block: int, limit: int, right_count: int, temperature: float, eos_at: int | None,
    tokens: int | None, seed: int,
) -> None:  # fmt: skip
    target, _ = drafting("qwen3", "auto")
    ids, seeds = prompts(*sizes, seed=seed), tuple(range(len(sizes)))
    free = Request(limit, Sampling(temperature), seeds)
    outputs = decode(Autoregressive(target), ids, free)[0].outputs
    # A token of the first output as EOS: it then stands inside a block more often than not.
    eos = frozenset() if eos_at is None else frozenset({outputs[0][min(eos_at, limit - 1)]})
    request = Request(limit, Sampling(temperature), seeds, eos)
    plain, _ = decode(Autoregressive(target), ids, request)
    for drafter in (Scripted, Doubtful):
        engine = DFlash(target, drafter(target, ids, outputs, right_then_wrong(right_count)), block, tokens=tokens)
        assert decode(engine, ids, request)[0] == plain


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_tree_goes_on_where_the_likeliest_token_is_wrong(execution: str) -> None:
    target, _ = drafting("llama3", execution)
    ids, request = prompts(6, 13), Request(29, GREEDY, (0, 0))
    outputs = decode(Autoregressive(target), ids, request)[0].outputs
    for tokens, each in ((None, 1), (1, 1), (3, 2), (14, 4)):  # a whole tree of two tokens a place has 2 + 4 + 8
        engine = DFlash(target, Doubtful(target, ids, outputs, right), 4, tokens=tokens)
        generated, meter = decode(engine, ids, request)
        steps, _ = meter.records()
        drafted = 3 if tokens is None else tokens
        assert generated.outputs == outputs
        assert all(step.committed == (each, each) for step in steps[1:-1])
        assert all(step.drafted == (drafted,) * 2 for step in steps[1:])


def test_trees_of_a_trained_drafter_gain_more_than_its_chain() -> None:
    target, checkpoint = trained()
    drafter = DFlashDrafter(checkpoint.config, checkpoint.tensors, target)
    generator = torch.Generator().manual_seed(0)
    ids, request = (
        [torch.randint(97, 122, (9,), generator=generator).tolist() for _ in range(12)],
        Request(48, GREEDY, (0,)),
    )
    plain, accepted = [decode(Autoregressive(target), [prompt], request)[0] for prompt in ids], []
    for tokens in (None, 4, 9, 30):
        found = [decode(DFlash(target, drafter, 5, tokens=tokens), [prompt], request) for prompt in ids]
        assert [generated for generated, _ in found] == plain
        steps = [step for _, meter in found for step in meter.records()[0][1:]]
        accepted.append(sum(step.accepted[0] for step in steps) / len(steps))
    assert accepted == sorted(accepted)
    assert accepted[-1] > accepted[1] > accepted[0]


def test_a_sequence_that_finished_is_offered_nothing_and_grows_no_more() -> None:
    target, _ = drafting("smollm", "auto")
    ids = prompts(13, 5)
    first, second = decode(Autoregressive(target), ids, Request(40, GREEDY, (0, 0)))[0].outputs
    drafter = Scripted(target, ids, [first, wrong(second, 300)], right)
    # 13 + 3 fill the cache to a whole panel, so that the block beyond the limit needs the headroom asked for.
    generated, meter = decode(DFlash(target, drafter, 16), ids, Request(3, GREEDY, (0, 0)))
    steps, _ = meter.records()
    assert generated.outputs == [first[:3], second[:3]]
    assert [step.committed for step in steps] == [(1, 1), (2, 1), (0, 1)]
    assert [step.drafted for step in steps[1:]] == [(15, 15), (0, 15)]
    assert [step.accepted for step in steps[1:]] == [(1, 0), (0, 0)]  # tokens beyond the limit do not count


@needs_native
def test_bfloat16_tokens_are_the_same_to_the_bit() -> None:
    target, drafter = drafting("smollm", "native", torch.bfloat16)
    ids, request = prompts(17, 5), Request(40, GREEDY, (0, 0))
    outputs = decode(Autoregressive(target), ids, request)[0].outputs
    for choice in (drafter, Scripted(target, ids, outputs, right), Scripted(target, ids, outputs, right_then_wrong(2))):
        assert decode(DFlash(target, choice, 6), ids, request)[0].outputs == outputs
    for choice in (drafter, Doubtful(target, ids, outputs, right), Doubtful(target, ids, outputs, right_then_wrong(2))):
        assert decode(DFlash(target, choice, 6, tokens=20), ids, request)[0].outputs == outputs


@functools.cache
def trained() -> tuple[Any, dflash.DFlashCheckpoint]:
    """A target and a drafter that is often right."""
    target = Shared(loading.load("zbench-tiny", "float32"), torch.float32, CPU).target("auto")
    return target, dflash.load_drafter(zoo.drafter("zbench-tiny-dflash", "dflash"), target.config)


def natively_and_by_torch(
    sizes: Sequence[int], block: int, temperature: float, drafts: Any, eos: frozenset[int], seed: int
) -> list[Any]:
    """What comes of drafts of the one and of the other, step by step."""
    target, checkpoint = trained()
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(97, 122, (size,), generator=generator).tolist() for size in sizes]
    request = Request(40, Sampling(temperature), tuple(range(len(sizes))), eos)
    found = []
    for native in (True, False):
        drafter = DFlashDrafter(checkpoint.config, checkpoint.tensors, target, native)
        assert (drafter.native is not None) == native
        sampled = drafts == "sampled"
        engine = DFlash(target, drafter, block, sampled, tokens=None if sampled else drafts)
        generated, meter = decode(engine, ids, request)
        found.append((generated, [(s.committed, s.drafted, s.accepted) for s in meter.records()[0]]))
    return found


@needs_native
@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    block=st.integers(2, 9),
    drafts=st.sampled_from([None, 3, 12]),
    eos=st.frozensets(st.integers(0, 259), max_size=40),
    seed=st.integers(0, 1000),
)
def test_a_native_drafter_is_accepted_step_by_step_as_torchs_is(
    sizes: list[int], block: int, drafts: int | None, eos: frozenset[int], seed: int
) -> None:
    native, by_torch = natively_and_by_torch(sizes, block, 0.0, drafts, eos, seed)
    assert native == by_torch


@needs_native
def test_drawn_tokens_are_those_of_torchs_drafts_but_where_rounding_draws() -> None:
    """Of 200 cases 2 parted, each at one draw of some hundred: two of 8 are not due to that."""
    cases = [(block, drafts, seed) for seed, block in enumerate((2, 5, 9, 3)) for drafts in ("sampled", 7)]
    found = [natively_and_by_torch((15, 4), block, 0.8, drafts, frozenset(), seed) for block, drafts, seed in cases]
    assert sum(native != by_torch for native, by_torch in found) <= 1


@pytest.mark.parametrize("tokens", [None, 9])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_both_caches_after_a_decode_are_those_of_a_fresh_prefill(execution: str, tokens: int | None) -> None:
    target, drafter = drafting("qwen3", execution)
    ids, request = prompts(6, 11), Request(40, GREEDY, (0, 0))
    outputs = decode(Autoregressive(target), ids, request)[0].outputs
    scripted = (Doubtful if tokens else Scripted)(target, ids, outputs, right_then_wrong(2))
    engine, meter = DFlash(target, scripted, 5, tokens=tokens), Meter(CPU)
    meter.begin_step()
    state = engine.start(ids, request, meter)
    for row, token in enumerate(state.last.tolist()):
        state.outputs[row].append(token)
    for _ in range(4):
        for output, gained in zip(state.outputs, engine.step(state, meter).tokens, strict=True):
            output.extend(gained)
    following = drafter.draft(torch.tensor([7, 7]), state.context, 5, state.features, state.unread).logits
    for row, prompt in enumerate(ids):
        committed = prompt + outputs[row][: state.cache.sizes[row] - len(prompt)]
        cache, context = target.new_cache(1, 96), drafter.new_cache(1, 96)
        tokens = torch.tensor([[*committed, 7, 8]])
        fresh = target.forward(Rows.chain(tokens, cache.lengths), cache, capture=TAPS)
        drafter.read([fresh.hidden[tap] for tap in TAPS], context, [len(committed)])
        probe = Rows.chain(torch.tensor([[7, 8]] * 2), state.cache.lengths)
        logits = target.forward(probe, state.cache).logits[row]
        torch.testing.assert_close(logits, fresh.logits[0, -2:], rtol=1e-4, atol=1e-4)
        alone = drafter.draft(torch.tensor([7]), context, 5).logits[0]
        torch.testing.assert_close(following[row], alone, rtol=1e-3, atol=1e-3)
        assert state.context.sizes == state.cache.sizes


def test_a_prompt_longer_than_one_prefill_forward_is_read_in_parts_and_drafted_from_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, drafter = drafting("mistral", "auto")
    ids, request = prompts(40, 17, 8), Request(6, GREEDY, (0, 0, 0))
    whole, whole_meter = decode(DFlash(target, drafter), ids, request)
    for module in (base, dflash_engine):
        monkeypatch.setattr(module, "PREFILL_ROWS", 16)
    parts, meter = decode(DFlash(target, drafter), ids, request)
    assert parts == whole
    assert [step.accepted for step in meter.records()[0]] == [step.accepted for step in whole_meter.records()[0]]
    assert [f.rows for f in meter.records()[1] if f.step == 0] == [16, 16, 8] * 2


def test_the_order_of_the_taps_is_the_checkpoints_whatever_it_is() -> None:
    target, drafter = drafting("qwen3", "auto")
    checkpoint = wide_drafter(target.config, TAPS[::-1])
    width = target.config.width
    swapped = {**checkpoint.tensors, "fc.weight": checkpoint.tensors["fc.weight"].roll(width, 1)}
    reversed_drafter = DFlashDrafter(checkpoint.config, swapped, target)
    ids, request = prompts(6), Request(12, GREEDY, (0,))
    seen = [seen_logits(DFlash(target, choice), ids, request) for choice in (drafter, reversed_drafter)]
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)


def seen_logits(engine: DFlash, ids: list[list[int]], request: Request) -> Tensor:
    """The draft logits of the first step."""
    meter = Meter(CPU)
    meter.begin_step()
    state = engine.start(ids, request, meter)
    return engine.drafter.draft(state.last, state.context, engine.block).logits


@functools.cache
def six_tokens() -> tuple[Transformer, DFlashDrafter]:
    """A target and a drafter over six tokens, whose distributions differ and are far from flat."""
    config = ModelConfig(
        "llama", layers=4, width=32, ffn=48, heads=2, kv_heads=1, head_dim=16, vocab=6, max_positions=64
    )
    target = Transformer(config, wider(loading.random_tensors(config, 5, torch.float32)), torch.float32)
    checkpoint = dflash.random_drafter(config, 6, layers=1, block=3)
    return target, DFlashDrafter(checkpoint.config, wider(checkpoint.tensors), target)


def wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor * 8 if tensor.dim() > 1 else tensor for name, tensor in tensors.items()}


def joint(target: Transformer, prompt: list[int], sampling: Sampling) -> Tensor:
    """[6, 6, 6] exact distribution of the first three tokens."""
    continued = torch.cartesian_prod(*[torch.arange(6)] * 3)
    ids = torch.cat([torch.tensor([prompt]).expand(216, -1), continued[:, :2]], 1)
    cache = target.new_cache(216, 16)
    probs = probabilities(target.forward(Rows.chain(ids, cache.lengths), cache).logits[:, -3:], sampling)
    return probs.double().gather(2, continued[..., None]).prod(1)[:, 0]


ALPHA = 1e-3


def p_value(engine: DFlash, sampling: Sampling, draws: int = 6000) -> float:
    prompt = [1, 4, 2]
    request = Request(5, sampling, tuple(range(draws)))
    outputs = torch.tensor(decode(engine, [prompt] * draws, request)[0].outputs)
    observed = torch.bincount(outputs[:, 0] * 36 + outputs[:, 1] * 6 + outputs[:, 2], minlength=216).double()
    expected = joint(engine.model, prompt, sampling) * draws
    assert observed[expected == 0].sum() == 0
    rare = expected < 5  # pooled: a chi-square needs counts
    groups = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (observed, expected)]
    kept = groups[1] > 0
    return float(chisquare(groups[0][kept], groups[1][kept] * (draws / groups[1][kept].sum())).pvalue)


@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(1.0, top_p=0.9), Sampling(1.3, top_k=4)])
def test_sampled_drafts_leave_the_joint_distribution_as_it_was(sampling: Sampling) -> None:
    engine = DFlash(*six_tokens(), draft_sampling=True)
    assert p_value(engine, sampling) > ALPHA


@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(1.3, top_k=4)])
def test_a_tree_leaves_the_joint_distribution_as_it_was(sampling: Sampling) -> None:
    assert p_value(DFlash(*six_tokens(), tokens=5), sampling) > ALPHA


def test_drafts_drawn_from_another_distribution_than_they_claim_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, choose = DFlash(*six_tokens(), draft_sampling=True), DFlash._choose

    def lying(self: DFlash, drafts: Drafts, state: Any) -> tuple[Tensor, Tensor]:
        chosen, probs = choose(self, drafts, state)
        assert probs is not None
        return chosen, torch.full_like(probs, 1 / 6)

    monkeypatch.setattr(DFlash, "_choose", lying)
    assert p_value(engine, Sampling(0.8)) < ALPHA


def test_sampled_drafting_is_reproducible_by_seed_and_alike_alone_and_in_a_batch() -> None:
    target, drafter = drafting("qwen3", "auto")
    engine, ids = DFlash(target, drafter, draft_sampling=True), prompts(9, 4)
    together = decode(engine, ids, Request(20, Sampling(1.0), (3, 4)))[0].outputs
    assert together == decode(engine, ids, Request(20, Sampling(1.0), (3, 4)))[0].outputs
    assert together[1] == decode(engine, ids[1:], Request(20, Sampling(1.0), (4,)))[0].outputs[0]


def test_tokens_are_promised_to_be_the_targets_unless_they_are_sampled_by_the_drafter_or_synthetic() -> None:
    target, drafter = drafting("smollm", "auto")
    assert DFlash(target, drafter).exact is True
    assert DFlash(target, drafter, tokens=6).exact is True
    assert DFlash(target, drafter, draft_sampling=True).exact is None
    assert DFlash(target, drafter, 4, synthetic=synthetic.parse({"length": 3.0}, 3)).exact is None


@pytest.mark.parametrize("tokens", [None, 3, 8])
def test_synthetic_acceptance_gains_what_was_asked_for(tokens: int | None) -> None:
    target, drafter = drafting("smollm", "auto")
    engine = DFlash(target, drafter, 4, synthetic=synthetic.parse({"length": 3.0}, 3), tokens=tokens)
    _, meter = decode(engine, prompts(5, 8), Request(21, GREEDY, (0, 1)))
    steps, _ = meter.records()
    assert [step.committed for step in steps[1:-1]] == [(3, 3)] * (len(steps) - 2)
    assert len(steps) - 1 == 7


def test_a_step_is_one_draft_and_one_verify_and_the_drafters_prefill_counts() -> None:
    target, _ = drafting("smollm", "auto")
    ids, request = prompts(5, 9), Request(13, GREEDY, (0, 0))
    outputs = decode(Autoregressive(target), ids, request)[0].outputs
    _, meter = decode(DFlash(target, Scripted(target, ids, outputs, right), 4), ids, request)
    _, forwards = meter.records()
    assert [(f.model, f.role, f.rows) for f in forwards] == [
        ("target", "prefill", 9),
        ("drafter", "draft", 9),
        *[("drafter", "draft", 4), ("target", "verify", 4)] * 3,
    ]
    assert [f.context for f in forwards[2:]] == [7, 7, 11, 11, 15, 15]
    assert [f.committed for f in forwards] == [2, 0, 0, 8, 0, 8, 0, 8]
    assert all(f.flops > 0 and f.bytes_read > 0 and f.seconds > 0 for f in forwards)
    # The first draft reads no new tokens: the prompt was read with the prefill.
    assert forwards[2].flops < forwards[4].flops


@pytest.mark.parametrize("block", [1, 65])
def test_a_block_size_that_cannot_be_is_refused_in_one_line(block: int) -> None:
    with pytest.raises(UserError, match=f"2 to 64 tokens, not {block}"):
        DFlash(*drafting("smollm", "auto"), block=block)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tokens": 0}, "a tree of 0 tokens"),
        ({"tokens": 301}, "1 to 300"),
        ({"tokens": 5, "draft_sampling": True}, "one draft for a place"),
        ({"tokens": 2, "synthetic": synthetic.parse({"length": 2.0}, 3)}, "a tree of as many, not 2"),
    ],
)
def test_a_tree_that_cannot_be_is_refused_in_one_line(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        DFlash(*drafting("smollm", "auto"), block=4, **options)
