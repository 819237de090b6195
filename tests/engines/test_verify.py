"""Acceptance leaves the target's output as it is: token by token, or in distribution where drafts are sampled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engines.lossless import (
    ALPHA,
    CPU,
    Fault,
    Scripted,
    assert_cache_is_fresh,
    assert_same_tokens,
    chain_parents,
    decode,
    first_tokens,
    joint,
    literal_chain,
    literal_tree,
    p_value,
    small_model,
)
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Request
from zbench.engines.sampling import Purpose, Sampler, Sampling, probabilities
from zbench.engines.verify import Verdict, verify_chain, verify_tree
from zbench.kernels import cpu

VOCAB = 5
REQUESTS = 20_000
SAMPLINGS = [Sampling(1.0), Sampling(0.7, top_p=0.8), Sampling(1.3, top_k=3)]
FAULTS: list[Fault] = ["accepts everything", "residual not subtracted"]
TREE = (-1, 0, 0, 1, 1, 2)  # two children below the root and the first child, one below the second


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.skipif(not cpu.available(), reason=f"native CPU kernels: {cpu.unavailable_reason()}")
@given(
    batch=st.integers(1, 4), drafts=st.integers(0, 5), spare=st.integers(0, 2), seed=st.integers(0, 999), data=st.data()
)
def test_native_greedy_verification_is_that_of_torch(
    batch: int, drafts: int, spare: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 4, (batch, drafts + 1 + spare, VOCAB), generator=generator).float()[:, : drafts + 1]
    ids = torch.randint(0, VOCAB, (batch, drafts + 1), generator=generator)
    ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.7, logits.argmax(-1).roll(1, 1), ids)
    real = data.draw(st.none() | st.lists(st.integers(0, drafts + 1), min_size=batch, max_size=batch))
    offered = None if real is None else torch.tensor(real)
    sampler = Sampler(Sampling(), range(batch), 9, torch.device("cpu"))

    def verify() -> Verdict:
        return verify_chain(logits, ids[:, 1:], sampler, [0] * batch, offered=offered)

    native = verify()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "can_verify", lambda logits: False)
        wanted = verify()
    for name in ("kept", "counts", "tokens", "bonus"):
        assert torch.equal(getattr(native, name), getattr(wanted, name)), name


@pytest.mark.skipif(not cpu.available(), reason=f"native CPU kernels: {cpu.unavailable_reason()}")
@given(batch=st.integers(1, 3), rows=st.integers(1, 12), seed=st.integers(0, 999), data=st.data())
def test_native_greedy_verification_of_trees_is_that_of_torch(
    batch: int, rows: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 3, (batch, rows, VOCAB), generator=generator).float()  # many are as large as the largest
    parents = torch.tensor([[-1] + [data.draw(st.integers(-1, i - 1)) for i in range(1, rows)] for _ in range(batch)])
    ids = torch.randint(0, VOCAB, (batch, rows), generator=generator)
    wanted_ids = logits.argmax(-1).gather(1, parents.clamp(min=0))
    ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, wanted_ids, ids)
    native = verify_tree(logits, ids, parents, greedy(batch), [0] * batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "can_verify", lambda logits: False)
        wanted = verify_tree(logits, ids, parents, greedy(batch), [0] * batch)
    for name, got, want in zip(Verdict._fields, native, wanted, strict=True):
        assert torch.equal(got, want), name


# A world where everything can be enumerated: the next token depends on the last one only, by a table of logits.


def table(seed: int) -> Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5


TARGET, DRAFTER = table(1), table(2)


def sampled_chain(last: Tensor, index: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two drafts drawn from the drafter, and its distributions."""
    ids, probs = [last], []
    for step in range(2):
        logits = DRAFTER[ids[-1]]
        probs.append(probabilities(logits, sampler.sampling))
        ids.append(sampler.pick(logits, index + step, Purpose.DRAFT))
    return torch.stack(ids, 1), chain_parents(3).expand(len(last), 3), torch.stack(probs, 1)


def chosen_tree(last: Tensor, index: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor, Tensor | None]:
    """The drafter's most likely tokens below each node of TREE."""
    ids = last[:, None]
    for row in range(1, len(TREE)):
        rank = TREE[1:row].count(TREE[row])
        best = DRAFTER[ids[:, TREE[row]]].topk(2).indices
        ids = torch.cat([ids, best[:, rank, None]], 1)
    return ids, torch.tensor(TREE).expand_as(ids), None


def chosen_chain(last: Tensor, index: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor, Tensor | None]:
    ids, _, _ = chosen_tree(last, index, sampler)
    return ids[:, [0, 1, 3]], chain_parents(3).expand(len(last), 3), None


def accept_chain(
    logits: Tensor, ids: Tensor, parents: Tensor, q: Tensor | None, sampler: Sampler, index: Tensor
) -> Verdict:
    return verify_chain(logits, ids[:, 1:], sampler, index, q)


def accept_tree(
    logits: Tensor, ids: Tensor, parents: Tensor, q: Tensor | None, sampler: Sampler, index: Tensor
) -> Verdict:
    return verify_tree(logits, ids, parents, sampler, index)


def accept_literally(
    logits: Tensor,
    ids: Tensor,
    parents: Tensor,
    q: Tensor | None,
    sampler: Sampler,
    index: Tensor,
    fault: Fault | None = None,
) -> Verdict:
    return literal_tree(logits, ids, parents, sampler, index, draft_probs=q, fault=fault)


WAYS = [
    pytest.param(sampled_chain, accept_chain, id="chain of sampled drafts"),
    pytest.param(chosen_chain, accept_chain, id="chain of chosen drafts"),
    pytest.param(chosen_tree, accept_tree, id="tree of chosen drafts"),
]


def decoded(propose: Callable, accept: Callable, sampling: Sampling, length: int = 3) -> Tensor:
    """[REQUESTS, length]: the first tokens of as many requests, each decoded with its own seed, after token 0."""
    sampler = Sampler(sampling, range(REQUESTS), length, CPU.torch)
    last, index = torch.zeros(REQUESTS, dtype=torch.int64), torch.zeros(REQUESTS, dtype=torch.int64)
    output = torch.full((REQUESTS, length + len(TREE)), -1)
    while bool((index < length).any()):
        ids, parents, q = propose(last, index, sampler)
        verdict = accept(TARGET[ids], ids, parents, q, sampler, index)
        places = index[:, None] + torch.arange(verdict.tokens.shape[1])
        fresh = (verdict.tokens >= 0) & (places < length)
        row, column = fresh.nonzero(as_tuple=True)
        output[row, places[row, column]] = verdict.tokens[row, column]
        last, index = verdict.bonus, (index + verdict.counts).clamp(max=length)
    return output[:, :length]


def enumerated(sampling: Sampling) -> Tensor:
    p = probabilities(TARGET, sampling).double()
    return p[0][:, None, None] * p[:, :, None] * p[None]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize(("propose", "accept"), WAYS)
def test_the_first_three_tokens_follow_the_targets_joint_distribution(
    propose: Callable, accept: Callable, sampling: Sampling
) -> None:
    assert p_value(decoded(propose, accept, sampling), enumerated(sampling)) > ALPHA


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("propose", [sampled_chain, chosen_tree])
def test_the_same_test_catches_a_broken_acceptance(
    propose: Callable, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The literal rule is slow: fewer requests, which only makes a fault harder to catch.
    monkeypatch.setattr("tests.engines.test_verify.REQUESTS", 3000)
    sampling = Sampling(1.0)
    assert p_value(decoded(propose, accept_literally, sampling), enumerated(sampling)) > ALPHA
    assert p_value(decoded(propose, partial(accept_literally, fault=fault), sampling), enumerated(sampling)) < ALPHA


def test_a_sampled_draft_is_accepted_as_often_as_the_distributions_overlap() -> None:
    sampler = Sampler(Sampling(1.0), range(REQUESTS), 4, CPU.torch)
    zeros = torch.zeros(REQUESTS, dtype=torch.int64)
    ids, _, q = sampled_chain(zeros, zeros, sampler)
    verdict = verify_chain(TARGET[ids], ids[:, 1:], sampler, zeros, q)
    overlap = torch.minimum(TARGET[0].softmax(-1), DRAFTER[0].softmax(-1)).sum()
    assert ((verdict.counts > 1).float().mean() - overlap).abs() < 4 * 0.5 / REQUESTS**0.5


def test_only_drafts_that_are_offered_count_and_the_token_beyond_them_is_the_targets_own() -> None:
    """Of three drafts one is offered: the others, and what they were drawn from, are of no account."""
    logits, q = table(1)[:4].expand(REQUESTS, 4, -1), table(2)[:3].softmax(-1).expand(REQUESTS, 3, -1)
    drafts = torch.stack([torch.multinomial(q[:, place], 1)[:, 0] for place in range(3)], 1)
    sampling = Sampling(0.9)
    sampler = Sampler(sampling, range(REQUESTS), 8, CPU.torch)
    one = torch.ones(REQUESTS, dtype=torch.int64)
    for probs in (q, None):
        verdict = verify_chain(logits, drafts, sampler, [0] * REQUESTS, probs, offered=one)
        assert int(verdict.counts.max()) == 2
        second = verdict.tokens[verdict.counts == 2][:, 1:2]
        assert len(second) > 300
        assert p_value(second, probabilities(logits[0, 1], sampling).double()) > ALPHA


def test_trusted_drafts_pass_as_far_as_they_are_offered() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([[4, 4, 4, 4]]), 6).float() * 9
    drafts, everything = torch.tensor([[4, 1, 2]]), torch.tensor([[False, True, True]])
    sampler = Sampler(Sampling(), (0,), 8, CPU.torch)
    plain = verify_chain(logits, drafts, sampler, [0])
    assert plain.tokens.tolist() == [[4, 4, -1, -1]]
    trusting = verify_chain(logits, drafts, sampler, [0], trusted=everything)
    assert trusting.tokens.tolist() == [[4, 1, 2, 4]]
    cut = verify_chain(logits, drafts, sampler, [0], trusted=everything, offered=torch.tensor([2]))
    assert cut.tokens.tolist() == [[4, 1, 4, -1]]


def test_siblings_are_accepted_as_often_as_the_target_draws_one_of_them() -> None:
    sampler = Sampler(Sampling(1.0), range(REQUESTS), 4, CPU.torch)
    zeros = torch.zeros(REQUESTS, dtype=torch.int64)
    ids, parents, _ = chosen_tree(zeros, zeros, sampler)
    verdict = verify_tree(TARGET[ids], ids, parents, sampler, zeros)
    covered = TARGET[0].softmax(-1)[ids[0, 1:3]].sum()
    assert ((verdict.counts > 1).float().mean() - covered).abs() < 4 * 0.5 / REQUESTS**0.5


def test_a_drafter_equal_to_the_target_is_always_accepted() -> None:
    sampler = Sampler(Sampling(1.0), range(500), 4, CPU.torch)
    logits = TARGET[torch.zeros(500, 3, dtype=torch.int64)]
    probs = probabilities(logits[:, :2], sampler.sampling)
    index = torch.arange(2).expand(500, 2)
    drafts = sampler.pick(logits[:, :2], index, Purpose.DRAFT)
    assert verify_chain(logits, drafts, sampler, [0] * 500, probs).counts.eq(3).all()


def test_a_draft_the_target_rules_out_is_never_kept() -> None:
    sampler = Sampler(Sampling(1.0, top_k=1), range(50), 4, CPU.torch)
    logits, certain = TARGET[torch.zeros(50, 2, dtype=torch.int64)], torch.zeros(50, 1, VOCAB)
    wrong = logits[:, 0].argmin(-1)
    certain.scatter_(2, wrong[:, None, None], 1.0)
    for draft_probs in (None, certain):
        verdict = verify_chain(logits, wrong[:, None], sampler, [0] * 50, draft_probs)
        assert verdict.counts.eq(1).all()
        assert torch.equal(verdict.bonus, logits[:, 0].argmax(-1))


def test_rounding_between_equal_distributions_still_yields_a_possible_token() -> None:
    sampler = Sampler(Sampling(1.0, top_k=1), (0,), 2, CPU.torch)
    logits = torch.tensor([[[9.0, 0.0, 0.0], [9.0, 0.0, 0.0]]])
    slightly_more = torch.tensor([[[1.0e30, 0.0, 0.0]]])  # q(x) > p(x), and nothing left of p - q
    assert verify_chain(logits, torch.tensor([[0]]), sampler, [0], slightly_more).bonus.tolist() == [0]


# What a verdict says, on logits that make the target's choice plain.


def target_wants(tokens: list[list[int]]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), 10).float()


def greedy(batch: int) -> Sampler:
    return Sampler(Sampling(), (0,) * batch, 20, CPU.torch)


def test_a_greedy_chain_keeps_drafts_up_to_the_first_the_target_disagrees_with() -> None:
    logits = target_wants([[5, 6, 7, 8]] * 4)
    drafts = torch.tensor([[5, 6, 7], [5, 0, 7], [0, 6, 7], [5, 6, 0]])
    verdict = verify_chain(logits, drafts, greedy(4), [0] * 4)
    assert verdict.counts.tolist() == [4, 2, 1, 3]
    assert verdict.tokens.tolist() == [[5, 6, 7, 8], [5, 6, -1, -1], [5, -1, -1, -1], [5, 6, 7, -1]]
    assert verdict.kept.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1], [0, -1, -1, -1], [0, 1, 2, -1]]
    assert verdict.bonus.tolist() == [8, 6, 5, 7]


def test_a_greedy_tree_keeps_the_path_the_target_agrees_with() -> None:
    #        root 9
    #     1: 3     2: 5
    #   3: 6     4: 0  5: 6
    #                    6: 7
    parents = torch.tensor([[-1, 0, 0, 1, 2, 2, 5]])
    ids = torch.tensor([[9, 3, 5, 6, 0, 6, 7]])
    verdict = verify_tree(target_wants([[5, 6, 6, 1, 1, 7, 4]]), ids, parents, greedy(1), [0])
    assert verdict.kept.tolist() == [[0, 2, 5, 6, -1, -1, -1]]
    assert verdict.tokens.tolist() == [[5, 6, 7, 4, -1, -1, -1]]
    assert (verdict.counts.tolist(), verdict.bonus.tolist()) == ([4], [4])


def test_a_padding_row_is_never_kept_and_of_equal_siblings_only_the_first() -> None:
    parents = torch.tensor([[-1, -1, 0, 0, 3, -1]])
    ids = torch.tensor([[9, 5, 5, 5, 6, 5]])
    verdict = verify_tree(target_wants([[5, 1, 6, 6, 7, 1]]), ids, parents, greedy(1), [0])
    assert verdict.kept.tolist() == [[0, 2, -1, -1, -1, -1]]
    assert verdict.tokens.tolist() == [[5, 6, -1, -1, -1, -1]]


@pytest.mark.parametrize("sampling", [Sampling(), *SAMPLINGS], ids=str)
def test_a_chain_verified_as_a_tree_gets_the_same_verdict(sampling: Sampling) -> None:
    ids = torch.randint(3, (200, 4))
    logits = table(3)[ids]
    sampler = Sampler(sampling, range(200), 8, CPU.torch)
    index = torch.randint(5, (200,))
    chain = verify_chain(logits, ids[:, 1:], sampler, index)
    tree = verify_tree(logits, ids, chain_parents(4).expand_as(ids), sampler, index)
    assert len(chain.counts.unique()) > 2
    for name in ("kept", "counts", "tokens", "bonus"):
        assert torch.equal(getattr(chain, name), getattr(tree, name))


@pytest.mark.parametrize(("propose", "accept"), WAYS)
def test_a_verdict_does_not_depend_on_the_rest_of_the_batch(propose: Callable, accept: Callable) -> None:
    last, index = torch.randint(VOCAB, (6,)), torch.arange(6)

    def verdict(rows: slice) -> Verdict:
        sampler = Sampler(Sampling(1.0), range(6)[rows], 8, CPU.torch)
        ids, parents, q = propose(last[rows], index[rows], sampler)
        return accept(TARGET[ids], ids, parents, q, sampler, index[rows])

    together = verdict(slice(None))
    for row in range(6):
        assert torch.equal(verdict(slice(row, row + 1)).tokens[0], together.tokens[row])


# Whole decodes on the runtime, with drafters that are right, wrong or malicious at will.

LIMIT = 14
EOS = 2


@st.composite
def trees(draw: st.DrawFn) -> tuple[int, ...]:
    return (-1, *(draw(st.integers(0, row - 1)) for row in range(1, draw(st.integers(1, 8)) + 1)))


SCRIPTS = {
    "always right": lambda step, depth, right: right,
    "always wrong": lambda step, depth, right: (right + 1) % 6,
    "right then wrong": lambda step, depth, right: right if depth < 2 else (right + 1) % 6,
    "right every other step": lambda step, depth, right: right if step % 2 else (right + 1) % 6,
    "EOS in every draft": lambda step, depth, right: EOS if depth == 2 else right,
    "knows a third of the vocabulary": lambda step, depth, right: right if right in (1, EOS) else 1,
}


def depths(parents: tuple[int, ...]) -> list[int]:
    found = [0]
    for parent in parents[1:]:
        found.append(found[parent] + 1)
    return found


def scripted(
    parents: tuple[int, ...], truth: list[list[int]], script: Callable, as_chain: bool = False, family: str = "smollm"
) -> Scripted:
    """Each row drafts what `script` makes of the token that plain decoding puts there (0 beyond its end)."""

    def propose(sequence: int, position: int) -> list[int]:
        known = [*truth[sequence], *[0] * len(parents)]
        return [script(position, depth, known[position + depth - 1]) for depth in depths(parents)[1:]]

    return Scripted(small_model(family), parents, propose, as_chain)


ARCHITECTURES = ["smollm", "zaya"]
PROMPTS = [[1, 3, 4], [5], [3, 3, 4, 5, 1, 0, 4, 4, 3], [4, 0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("as_chain", [True, False], ids=["chain", "tree"])
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_an_adversarial_drafter_changes_no_token(family: str, script: str, as_chain: bool, temperature: float) -> None:
    parents = (-1, 0, 1, 2, 3) if as_chain else (-1, 0, 0, 1, 2, 2, 4)
    request = Request(LIMIT, Sampling(temperature), (0, 1, 2, 3), frozenset({EOS}))
    model = small_model(family)
    truth = decode(Autoregressive(model), PROMPTS, request).outputs
    assert_same_tokens(scripted(parents, truth, SCRIPTS[script], as_chain, family), model, PROMPTS, request)


def assert_any_drafts_leave_the_output_alone(data: st.DataObject) -> None:
    parents, family = data.draw(trees()), data.draw(st.sampled_from(ARCHITECTURES))
    as_chain = parents == tuple(chain_parents(len(parents)).tolist())
    prompts = data.draw(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=4))
    sampling = data.draw(st.sampled_from([Sampling(), *SAMPLINGS]))
    eos = frozenset(data.draw(st.sets(st.integers(0, 5), max_size=1)))
    noise = data.draw(st.randoms(use_true_random=False))
    skill = data.draw(st.floats(0, 1))
    request = Request(data.draw(st.integers(1, LIMIT)), sampling, tuple(range(len(prompts))), eos)
    truth = decode(Autoregressive(small_model(family)), prompts, request).outputs
    engine = scripted(
        parents, truth, lambda s, d, right: right if noise.random() < skill else noise.randrange(6), as_chain, family
    )
    assert_same_tokens(engine, small_model(family), prompts, request)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_draft_changes_any_token(data: st.DataObject) -> None:
    assert_any_drafts_leave_the_output_alone(data)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(st.data())
def test_no_draft_changes_any_token_in_thousands_of_cases(data: st.DataObject) -> None:
    assert_any_drafts_leave_the_output_alone(data)


@pytest.mark.parametrize("parents", [(-1, 0, 1, 2, 3), (-1, 0, 0, 1, 2, 2, 4)], ids=["chain", "tree"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_right_drafts_are_accepted_whole_and_the_cache_is_that_of_a_fresh_prefill(
    family: str, parents: tuple[int, ...]
) -> None:
    request, model = Request(LIMIT, Sampling(), (0, 0, 0, 0)), small_model(family)
    truth = decode(Autoregressive(model), PROMPTS, request).outputs
    # Along a tree only the last leaf's path is right, so that accepted rows have to move in the cache.
    path = {len(parents) - 1}
    while 0 not in path:
        path.add(parents[min(path)])

    def propose(sequence: int, position: int) -> list[int]:
        known = [*truth[sequence], *[0] * len(parents)]
        right = [known[position + depth - 1] for depth in depths(parents)]
        return [right[row] if row in path else (right[row] + 1) % 6 for row in range(1, len(parents))]

    for as_chain in (True, False) if len(path) == len(parents) else (False,):
        engine = Scripted(model, parents, propose, as_chain)
        assert_cache_is_fresh(engine, model, PROMPTS, request, steps=2)


@pytest.mark.parametrize("as_chain", [True, False], ids=["chain", "tree"])
def test_sampled_engine_output_follows_the_enumerated_joint_distribution(as_chain: bool) -> None:
    model, prompt, sampling = small_model(), [1, 3, 4], Sampling(1.0)
    parents = (-1, 0, 1) if as_chain else (-1, 0, 0, 1)
    engine = Scripted(model, parents, lambda sequence, position: range(1, len(parents)), as_chain)
    expected = joint(model, prompt, sampling, 3)
    assert p_value(first_tokens(engine, prompt, sampling, 3), expected) > ALPHA
    literal: Callable[..., Verdict] = literal_chain if as_chain else literal_tree
    for fault in FAULTS:
        broken = Scripted(model, parents, engine.propose, as_chain, verify=partial(literal, fault=fault))
        assert p_value(first_tokens(broken, prompt, sampling, 3), expected) < ALPHA
