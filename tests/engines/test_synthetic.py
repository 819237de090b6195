"""Synthetic acceptance yields the acceptance that was asked for, and nothing that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.lossless import CPU, Scripted, chain_parents, decode, small_model
from zbench.engines.base import Meter, Request, generate
from zbench.engines.sampling import Sampler, Sampling
from zbench.engines.synthetic import parse
from zbench.engines.verify import verify_chain, verify_tree
from zbench.errors import UserError

lengths = st.integers(1, 16).flatmap(lambda drafts: st.tuples(st.just(drafts), st.floats(1, drafts + 1)))


@given(lengths)
def test_the_expected_length_is_the_requested_length(case: tuple[int, float]) -> None:
    drafts, length = case
    assert parse({"length": length}, drafts).length == pytest.approx(length, abs=1e-9)


@given(lengths)
def test_a_length_differs_by_at_most_one_token_between_steps(case: tuple[int, float]) -> None:
    drafts, length = case
    possible = [accepted + 1 for accepted, chance in enumerate(parse({"length": length}, drafts).chances) if chance > 0]
    assert all(abs(tokens - length) <= 1 for tokens in possible)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=16))
def test_each_draft_is_accepted_at_its_rate_given_the_one_before(rates: list[float]) -> None:
    chances = parse({"rates": rates}, len(rates)).chances
    assert sum(chances) == pytest.approx(1)
    for draft, rate in enumerate(rates, 1):
        assert sum(chances[draft:]) == pytest.approx(rate * sum(chances[draft - 1 :]), abs=1e-12)


@given(st.dictionaries(st.integers(0, 8), st.integers(1, 1000), min_size=1))
def test_a_histogram_replays_the_recorded_mean(histogram: dict[int, int]) -> None:
    steps = sum(histogram.values())
    tokens = sum((accepted + 1) * count for accepted, count in histogram.items())
    keys = {str(accepted): count for accepted, count in histogram.items()}
    assert parse({"histogram": keys}, 8).length == pytest.approx(tokens / steps)
    assert parse({"histogram": histogram}, 8).chances == parse({"histogram": keys}, 8).chances


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"length": 0.9}, "give 1 to 5 for 4 drafts"),
        ({"length": 5.1}, "give 1 to 5 for 4 drafts"),
        ({"length": float("nan")}, "give 1 to 5"),
        ({"length": True}, "give 1 to 5"),
        ({"length": "3"}, "give 1 to 5"),
        ({"rates": [0.5] * 3}, "give 4 numbers"),
        ({"rates": [0.5] * 5}, "give 4 numbers"),
        ({"rates": [0.5, 0.5, 0.5, 1.5]}, "from 0 to 1"),
        ({"rates": 0.5}, "give 4 numbers"),
        ({"histogram": {"5": 1}}, "go from 0 to 4"),
        ({"histogram": {"-1": 1}}, "go from 0 to 4"),
        ({"histogram": {"1": -1}}, "number of steps"),
        ({"histogram": {"1": 0}}, "no steps"),
        ({"histogram": {}}, "no steps"),
        ({"histogram": [1, 2]}, "maps accepted drafts"),
        ({}, "exactly one"),
        ({"length": 2, "rates": [1.0] * 4}, "exactly one"),
        ({"lenght": 2}, "exactly one"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse(option, 4)
    assert "\n" not in str(error.value)


def test_it_is_labelled_with_what_was_asked_for() -> None:
    assert parse({"length": 3.2}, 4).label == "synthetic (length 3.2)"


OPTIONS: list[dict[str, Any]] = [
    {"length": 3.2},
    {"rates": [0.8, 0.6, 0.5, 0.1]},
    {"histogram": {"0": 10, "1": 5, "4": 20}},
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_a_chain_gains_what_was_asked_for_whatever_the_logits(option: dict[str, Any], temperature: float) -> None:
    synthetic = parse(option, 4)
    requests = 20_000
    sampler = Sampler(Sampling(temperature), range(requests), 8, CPU.torch)
    logits, drafts = torch.randn(requests, 5, 7), torch.randint(7, (requests, 4))
    verdict = verify_chain(logits, drafts, sampler, [3] * requests, synthetic=synthetic)
    shares = verdict.counts.bincount(minlength=6)[1:] / requests
    torch.testing.assert_close(shares, torch.tensor(synthetic.chances), rtol=0, atol=4 * 0.5 / requests**0.5)


def test_the_tokens_are_the_drafts_and_the_targets_argmax() -> None:
    sampler = Sampler(Sampling(), (0,), 8, CPU.torch)
    logits = torch.nn.functional.one_hot(torch.tensor([[5, 6, 7, 8]]), 10).float()
    verdict = verify_chain(logits, torch.tensor([[1, 2, 3]]), sampler, [0], synthetic=parse({"length": 3}, 3))
    assert verdict.tokens.tolist() == [[1, 2, 7, -1]]
    assert verdict.bonus.tolist() == [7]


def test_acceptance_made_for_another_number_of_drafts_is_refused() -> None:
    sampler = Sampler(Sampling(), (0,), 8, CPU.torch)
    with pytest.raises(ValueError, match="3 drafts, but synthetic acceptance made for 4"):
        verify_chain(torch.randn(1, 4, 5), torch.tensor([[1, 2, 3]]), sampler, [0], synthetic=parse({"length": 3}, 4))


def test_a_tree_is_accepted_along_first_children_as_far_as_they_reach() -> None:
    sampler = Sampler(Sampling(), (0,), 8, CPU.torch)
    parents, ids = torch.tensor([[-1, 0, 0, 1, 1, 2, 5]]), torch.tensor([[9, 1, 2, 3, 4, 5, 6]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 0, 0, 7, 0, 0, 0]]), 10).float()
    for length in (3, 4):
        verdict = verify_tree(logits, ids, parents, sampler, [0], synthetic=parse({"length": length}, 3))
        assert verdict.kept[0, :4].tolist() == [0, 1, 3, -1]
        assert verdict.tokens[0, :4].tolist() == [1, 3, 7, -1]


def test_a_decode_gains_the_requested_length_per_step_and_is_reproducible() -> None:
    synthetic = parse({"length": 2.5}, 3)
    request = Request(60, Sampling(), tuple(range(40)))
    prompts = [[1, 3, 4]] * 40
    engine = Scripted(small_model(), chain_parents(4).tolist(), lambda *_: (1, 1, 1), True, synthetic)
    meter = Meter(CPU)
    generated = generate(engine, prompts, request, meter)
    assert generated.outputs == decode(engine, prompts, request).outputs
    # The last steps of a request are cut at the limit: what counts is what was accepted.
    steps = [step for step in meter.records()[0] if step.accepted]
    accepted = [1 + count for step in steps[:15] for count in step.accepted]
    assert sum(accepted) / len(accepted) == pytest.approx(2.5, abs=4 * 0.5 / len(accepted) ** 0.5)


@given(st.floats(0, 1), st.integers(1, 12))
def test_one_rate_is_the_same_rate_for_every_draft(rate: float, drafts: int) -> None:
    assert parse({"rate": rate}, drafts).chances == parse({"rates": [rate] * drafts}, drafts).chances
    with pytest.raises(UserError, match="from 0 to 1"):
        parse({"rate": rate + 1.5}, drafts)
