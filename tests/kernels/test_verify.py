"""Acceptance as Triton kernels: the reference's tokens with the same numbers, and the target's distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from zbench.kernels import registry, verify
from zbench.kernels.verify import Drafts, Draws, Mix, Verdict

ALPHA = 1e-4  # a right kernel fails one statistical test in ten thousand; seeds are fixed


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "TABLE", {"": verify.Launch(16, 8)})


def assert_same(found: Verdict, wanted: Verdict) -> None:
    for name in Verdict._fields:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@settings(max_examples=8, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_a_verdict_is_the_references_with_the_same_numbers(
    data: st.DataObject, seed: int, device: torch.device
) -> None:
    """Any vocabulary and number of rows, -inf among the logits, strided tensors, NaN in rows that nobody asks for."""
    batch, rows = data.draw(st.integers(1, 2), "batch"), data.draw(st.integers(1, 4), "rows")
    vocab = data.draw(st.sampled_from([1, 15, 16, 17, 45]), "vocab")
    kind = data.draw(st.sampled_from(["greedy", "sampled", "drawn", "forced"]), "kind")
    tree = kind != "drawn" and data.draw(st.booleans(), "tree")
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=dtype)

    def number(most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=generator)

    wide = 2 * torch.randn(batch, rows + 1, vocab + 3, generator=generator)
    logits = wide[:, 1:, :vocab]  # no stride is what a packed tensor has
    if vocab > 1:
        logits[:, :, number(vocab, max(1, vocab // 3))] = -torch.inf
        logits[:, :, 0] = 0.5
    parents = torch.tensor([[int(number(row, 1)) if row else -1 for row in range(rows)] for _ in range(batch)])
    parents[:, 3:] = -1  # padding
    offered = None if tree or data.draw(st.booleans(), "all offered") else number(rows, batch)
    draws = Draws(0.0 if kind == "greedy" else 0.8, token=uniform(batch, rows), accept=uniform(batch, rows - 1))
    likely = logits.argmax(-1).gather(1, (parents if tree else torch.arange(-1, rows - 1).expand(batch, rows)).clamp(0))
    ids = torch.where(uniform(batch, rows) < 0.7, likely, number(vocab, batch, rows))
    drafts = Drafts(
        ids,
        parents if tree else None,
        offered,
        uniform(batch, rows - 1) < 0.3 if not tree and data.draw(st.booleans(), "some trusted") else None,
        (logits[:, :-1] + uniform(batch, rows - 1, vocab, dtype=torch.float32)).softmax(-1)
        if kind == "drawn"
        else None,
        number(rows, batch) if kind == "forced" else None,
    )
    mixing = not tree and data.draw(st.booleans(), "mixed")
    mix = Mix(torch.randn(batch, 1, vocab, generator=generator), torch.tensor([rows - 1]), 0.6) if mixing else None
    if offered is not None:
        logits[torch.arange(rows) > offered[:, None]] = torch.nan

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    moved = Drafts(ids.to(device), *(there(getattr(drafts, name)) for name in Drafts.__slots__[1:]))
    arguments = (
        logits.to(device),
        moved,
        replace(draws, token=there(draws.token), accept=there(draws.accept)),
        None if mix is None else Mix(mix.theirs.to(device), mix.rows.to(device), mix.own),
    )
    assert_same(verify.launch(*arguments), verify.reference(*arguments))


def test_filters_are_left_to_the_reference(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 1, 9, device=device)
    drafts = Drafts(torch.zeros(2, 1, dtype=torch.int64, device=device))
    numbers = torch.tensor([[0.2], [0.9]], dtype=torch.float64, device=device)
    asked: list[Draws] = []

    def reference(logits: Tensor, drafts: Drafts, draws: Draws, mix: Mix | None = None) -> Verdict:
        asked.append(draws)
        return Verdict(*(numbers,) * 4)

    monkeypatch.setattr(verify, "reference", reference)
    for draws in (Draws(1.0, top_k=3, token=numbers), Draws(1.0, top_p=0.5, token=numbers)):
        verify.launch(logits, drafts, draws)
        assert asked.pop() is draws


# The first token that each of many requests gains, after a draft that the drafter likes and the target does not.

VOCAB = 4
TARGET, DRAFTER = torch.tensor([0.46, 0.3, 0.13, 0.11]), torch.tensor([0.02, 0.08, 0.3, 0.6])


def p_value(device: torch.device, requests: int, drawn: bool, broken: bool = False) -> float:
    """Of the tokens gained first against the target's distribution. A broken rule keeps every draft."""
    generator = torch.Generator().manual_seed(11)
    drafts = torch.multinomial(DRAFTER, requests, replacement=True, generator=generator)[:, None]
    token = torch.rand(requests, 2, generator=generator, dtype=torch.float64)
    accept = torch.rand(requests, 1, generator=generator, dtype=torch.float64)
    verdict = verify.launch(
        TARGET.log().repeat(requests, 2, 1).to(device),
        Drafts(
            torch.nn.functional.pad(drafts, (1, 0)).to(device),
            trusted=torch.ones(requests, 1, dtype=torch.bool, device=device) if broken and not drawn else None,
            probs=DRAFTER.repeat(requests, 1, 1).to(device) if drawn else None,
        ),
        Draws(1.0, token=token.to(device), accept=(accept * (not broken)).to(device)),
    )
    counts = verdict.tokens[:, 0].bincount(minlength=VOCAB).cpu()
    return float(chisquare(counts, TARGET.double() / TARGET.double().sum() * requests).pvalue)


@pytest.mark.parametrize("drawn", [True, False])
def test_the_first_token_follows_the_targets_distribution(device: torch.device, drawn: bool) -> None:
    assert p_value(device, 60, drawn) > ALPHA
    assert p_value(device, 30, drawn, broken=True) < ALPHA


def test_the_examples_agree_and_a_kernel_that_does_not_is_found_out(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry.disagreement(verify.KERNEL, device, 3) is None
    wrong = replace(verify.KERNEL, launch=lambda *a: verify.reference(*a)._replace(counts=a[0].argmax(-1)[:, 0]))
    with pytest.warns(RuntimeWarning, match="disagrees"):
        assert registry.disagreement(wrong, device, 3)
