"""The trainer's parts against plain definitions, and resuming bit by bit."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.training import memory
from zbench.errors import UserError
from zbench.models import checkpoint, dflash, eagle3
from zbench.models.adapter import load_adapter
from zbench.training import data, trainer
from zbench.training.attention import block_attention, draw_anchors
from zbench.training.conversion import Conversion, ConversionSettings
from zbench.training.corpus import Conversation, Corpus, Role, joined
from zbench.training.dflash import DFlash, DFlashSettings
from zbench.training.eagle3 import Eagle3, Eagle3Settings, frequent_tokens
from zbench.training.losses import head_loss, sampled_head
from zbench.training.target import Batch, Read, Target
from zbench.training.tidar import Tidar, TidarSettings
from zbench.training.trainer import LOG, PROGRESS, READS, STATE, Objective, Reader, Settings, State, schedule, train


@pytest.mark.parametrize("rows", [5, 600])  # within a chunk, and over several
def test_head_loss_is_cross_entropy_with_sparse_targets(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=generator, requires_grad=True)
    head = torch.randn(20, 8, generator=generator, requires_grad=True)
    ids = torch.randint(0, 20, (rows, 3), generator=generator)
    ids[0] = 4  # the same id again and again
    probs, weights = torch.rand(rows, 3, generator=generator), torch.rand(rows, generator=generator)
    loss, best = head_loss(hidden, head, ids, probs, weights, best=3)
    got = torch.autograd.grad(3 * loss, (hidden, head))
    logits = hidden @ head.T
    dense = torch.zeros(rows, 20).scatter_add_(1, ids, probs)
    want = -(weights * (dense * logits.log_softmax(-1)).sum(-1)).sum()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(got, torch.autograd.grad(3 * want, (hidden, head)), rtol=1e-4, atol=1e-4)
    assert best.equal(logits.topk(3).indices)
    assert head_loss(hidden, head, ids, probs, weights)[1].equal(best[:, :1])


def test_a_sampled_head_stands_for_the_whole_one() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(40, 8, generator=generator), torch.randn(200, 8, generator=generator) / 4
    ids, probs, weights = torch.randint(0, 30, (40, 2), generator=generator), torch.full((40, 2), 0.5), torch.ones(40)

    def loss(others: int) -> float:
        sampled, bias, rows = sampled_head(head, ids, others, generator)
        assert sampled[rows].equal(head[ids])
        return head_loss(hidden, sampled, rows, probs, weights, bias)[0].item() / 40

    whole = head_loss(hidden, head, ids, probs, weights)[0].item() / 40
    assert loss(200) == pytest.approx(whole, rel=1e-5)
    assert sum(loss(40) for _ in range(100)) / 100 == pytest.approx(whole, abs=0.02)
    few = head_loss(hidden, head[:30], ids, probs, weights)[0].item() / 40
    assert abs(few - whole) > 1.0  # what leaving the rest out would give
    for kept in (sampled_head(head, ids[:n], 40, generator)[0] for n in (1, 9, 40)):
        assert len(kept) % 64 == 0 and len(kept) >= 40


def test_batches_are_of_few_lengths_where_kernels_are_compiled() -> None:
    roles = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.uint8)
    batch = Batch.of([Conversation(torch.arange(9), roles, 0, False)])
    there = batch.to(torch.device("meta"))
    assert there.ids.shape == there.answer.shape == (1, 64) and there.sizes == (9,)
    assert batch.to(torch.device("cpu")).ids.shape == (1, 9)


@pytest.mark.parametrize("name", ["eagle3", "full"])  # the others draw places among all
def test_more_padding_teaches_the_same(name: str) -> None:
    corpus = memory.corpus("smollm")
    batch = Batch.of(corpus.conversations[:3])
    padded = replace(batch, ids=F.pad(batch.ids, (0, 13)), answer=F.pad(batch.answer, (0, 13)))
    objective = objectives(corpus)[name]
    target = objective.target  # type: ignore[attr-defined]
    reads = [target.read(each, objective.capture) if objective.asks else Read.of_text(each) for each in (batch, padded)]
    losses = [objective.score(read, torch.Generator().manual_seed(0)).loss.item() for read in reads]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_block_attention_is_attention_under_the_blocks_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    s, a, b, h, kv, d, t = 2, 3, 4, 6, 2, 8, 11

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, requires_grad=True)

    inputs = (draw(s, a, b, h, d), draw(s, a, b, kv, d), draw(s, a, b, kv, d), draw(s, kv, t, d), draw(s, kv, t, d))
    anchors = torch.tensor([[0, 5, 11], [2, 3, 9]])
    got = block_attention(*inputs, anchors)
    q, k, v, keys, values = inputs
    own = torch.block_diag(*[torch.ones(b, b)] * a).bool().expand(s, -1, -1)
    before = (torch.arange(t) < anchors.repeat_interleave(b, 1)[..., None]).expand(s, a * b, t)
    want = F.scaled_dot_product_attention(
        q.flatten(1, 2).transpose(1, 2),
        torch.cat([keys, k.flatten(1, 2).transpose(1, 2)], 2),
        torch.cat([values, v.flatten(1, 2).transpose(1, 2)], 2),
        attn_mask=torch.cat([before, own], -1)[:, None],
        enable_gqa=True,
    )
    want = want.transpose(1, 2).view_as(got)
    torch.testing.assert_close(got, want)
    pull = torch.randn(got.shape, generator=generator)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, pull), torch.autograd.grad(want, inputs, pull))


def test_anchors_are_different_allowed_places() -> None:
    allowed = torch.zeros(2, 30, dtype=torch.bool)
    allowed[0, 4:20], allowed[1, 7:9] = True, True
    anchors, real = draw_anchors(allowed, 5, torch.Generator().manual_seed(0))
    assert real.sum(1).tolist() == [5, 2]
    assert len(set(anchors[0].tolist())) == 5
    assert all(allowed[0, anchors[0]]) and set(anchors[1][real[1]].tolist()) == {7, 8}


def test_whole_blocks_lie_within_one_answer() -> None:
    roles = torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.uint8)
    batch = Batch.of([Conversation(torch.arange(9), roles, 0, False)])
    assert batch.whole(3)[0].nonzero().flatten().tolist() == [1, 5, 6]


def test_the_draft_vocabulary_is_what_answers_say() -> None:
    c = Conversation(torch.tensor([9, 9, 9, 5, 5, 7]), torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.uint8), 0, False)
    assert frequent_tokens([c], 3, 10).tolist() == [0, 5, 7]


def test_the_rate_rises_then_falls_to_its_floor() -> None:
    settings = Settings(warm_up=0.1, floor=0.05)
    rates = [schedule(share / 100, settings) for share in range(101)]
    assert rates.index(max(rates)) == 10 and max(rates) == pytest.approx(1.0)
    assert rates[0] > 0 and rates[-1] == pytest.approx(0.05)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


TIDAR = TidarSettings(block=4, rank=2, anchors=4)
EAGLE3 = Eagle3Settings(draft_vocab=64, steps=3)
DFLASH = DFlashSettings(block=4, layers=1, masks=12)


def objectives(corpus: Corpus) -> dict[str, Objective]:
    target = memory.target("smollm")
    return {
        "tidar": Tidar(target, TIDAR, 0),
        "eagle3": Eagle3(target, EAGLE3, corpus.conversations, 0),
        "dflash": DFlash(target, DFLASH, 0),
        "full": Conversion(target, ConversionSettings(block=4, mask_id=299)),
    }


@pytest.mark.parametrize("name", ["tidar", "eagle3", "dflash", "full"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(name: str, tmp_path: Path) -> None:
    corpus, target = memory.corpus("smollm"), memory.target("smollm")
    settings = Settings(batch=2, steps=20, rate=1e-2)  # a tenth of them, after which is evaluated: 2

    def run(out: Path, settings: Settings, resume: bool = False, until: int | None = None) -> None:
        objective = objectives(corpus)[name]
        score, calls = objective.score, 0

        def stopping(*arguments, **options):
            nonlocal calls
            calls += not options.get("evaluate")
            if until is not None and calls > until:
                raise KeyboardInterrupt
            return score(*arguments, **options)

        objective.score = stopping  # type: ignore[method-assign]
        train(objective, target, corpus, out, settings, resume)

    run(tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt, match=r"has all 5 steps, .*--resume"):
        run(tmp_path / "part", settings, until=5)
    assert step_kept(tmp_path / "part") == 5
    run(tmp_path / "part", settings, resume=True)
    assert (tmp_path / "part" / STATE).read_bytes() == (tmp_path / "whole" / STATE).read_bytes()
    with pytest.raises(UserError, match=r"was trained with --rate 0\.01, not 1\.0"):
        run(tmp_path / "part", replace(settings, rate=1.0), resume=True)
    with pytest.raises(UserError, match="holds a run already"):
        run(tmp_path / "part", settings)


def test_a_run_that_is_resumed_on_a_larger_corpus_keeps_its_draft_vocabulary(tmp_path: Path) -> None:
    corpus, target = memory.corpus("smollm"), memory.target("smollm")
    first = Corpus({}, corpus.conversations[:4])
    before = Eagle3(target, EAGLE3, first.conversations, 0)
    train(before, target, first, tmp_path, Settings(batch=2, steps=1))
    after = Eagle3(target, EAGLE3, corpus.conversations, 0)
    assert not after.known.equal(before.known)  # the head's rows are those tokens', and no others'
    train(after, target, corpus, tmp_path, Settings(batch=2, steps=2), resume=True)
    assert after.known.equal(before.known)
    stored = eagle3.load_drafter(tmp_path, target.config).tensors["d2t"]
    assert stored.equal(before.known - torch.arange(len(stored)))


def test_files_that_a_machine_cut_short_as_it_went_down_are_no_traceback(tmp_path: Path) -> None:
    corpus, target = memory.corpus("smollm"), memory.target("smollm")
    objective = DFlash(target, DFLASH, 0)
    train(objective, target, corpus, tmp_path, Settings(batch=2, steps=1))
    (tmp_path / STATE).write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"training\.safetensors is damaged"):
        train(objective, target, corpus, tmp_path, Settings(batch=2, steps=2), resume=True)
    reader = Reader(target, objective, [Batch.of(corpus.conversations[:2])], tmp_path / "again", gigabytes=1.0)
    read = reader.read(0)
    [kept] = (tmp_path / "again").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(b"cut short")
    assert reader.read(0).top_probs.equal(read.top_probs) and kept.read_bytes() == whole


def step_kept(out: Path) -> int:
    return json.loads((out / PROGRESS).read_text())["state"]["step"]


def steps_logged(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / LOG).read_text().splitlines()]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_amid_a_step_waits_until_it_is_whole(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, target = memory.corpus("smollm"), memory.target("smollm")
    step, calls = torch.optim.AdamW.step, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(number)
        step(*arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="has all 3 steps"):
        train(objectives(corpus)["tidar"], target, corpus, tmp_path, Settings(batch=2, steps=50))
    assert step_kept(tmp_path) == 3


@pytest.mark.usefixtures("interruptible")
def test_a_run_interrupted_before_its_first_step_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, target = memory.corpus("smollm"), memory.target("smollm")
    monkeypatch.setattr(Reader, "read", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(objectives(corpus)["tidar"], target, corpus, tmp_path / "out", Settings(batch=2, steps=50))
    assert not str(stopped.value) and not (tmp_path / "out").exists()


def test_the_clock_asks_for_checkpoints_of_a_run_in_steps_and_changes_nothing(tmp_path: Path) -> None:
    corpus, target = memory.corpus("smollm"), memory.target("smollm")
    settings = Settings(batch=2, steps=20, rate=1e-2)
    for name, every in (("tenths", 300.0), ("clock", 0.0)):
        wanted = replace(settings, evaluate_every=every)
        train(objectives(corpus)["tidar"], target, corpus, tmp_path / name, wanted)
    assert steps_logged(tmp_path / "tenths") == list(range(0, 21, 2))
    assert steps_logged(tmp_path / "clock") == list(range(21))
    assert (tmp_path / "clock" / STATE).read_bytes() == (tmp_path / "tenths" / STATE).read_bytes()


@pytest.mark.usefixtures("interruptible")
def test_what_is_kept_is_the_drafter_that_did_best_on_other_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that learns its text by heart gets worse, and was worse than what it had begun as."""
    corpus, target, said = memory.corpus("smollm"), memory.target("smollm"), list[str]()
    evaluate, told = trainer.evaluate, iter([1.5, 2.0, 2.6, 1.9, 3.0, 1.8, 3.2])  # before; other, known; ...
    weights: dict[str, torch.Tensor] = {}

    def run(steps: int, resume: bool = False) -> dict[str, Any]:
        objective = objectives(corpus)["eagle3"]

        def scored(*arguments: Any) -> dict[str, Any]:
            return evaluate(*arguments) | {"accepted": next(told)}

        monkeypatch.setattr(trainer, "evaluate", scored)
        settings = Settings(batch=2, steps=steps, rate=1e-2, evaluate_every=0.0)
        last = train(objective, target, corpus, tmp_path, settings, resume, say=said.append)
        weights[str(last["step"])] = objective.checkpoint().tensors["fc.weight"]
        return last

    best = lambda: eagle3.load_drafter(tmp_path, target.config).tensors["fc.weight"]  # noqa: E731
    last = run(1)
    assert (last["accepted"], last["accepted_known"], last["best_step"]) == (2.0, 2.6, 1)
    assert best().equal(weights["1"]) and "by heart" in said[-1]
    last = run(3, resume=True)
    assert (last["accepted"], last["best_step"]) == (1.8, 1)
    assert best().equal(weights["1"]) and not best().equal(weights["3"])
    assert f"{tmp_path} has the drafter of step 1, the best on held-out text: 2.00 tokens per step" in said
    assert "3.20 tokens per step on text that it learns from and 1.80 on other text" in said[-1]

    told, begun = iter([2.5, 2.0, 2.0]), objectives(corpus)["eagle3"].checkpoint()
    train(objectives(corpus)["eagle3"], target, corpus, tmp_path / "worse", Settings(batch=2, steps=1), say=said.append)
    kept = eagle3.load_drafter(tmp_path / "worse", target.config)
    assert kept.tensors["fc.weight"].equal(begun.tensors["fc.weight"]) and "the drafter of step 0" in said[-1]


@pytest.mark.usefixtures("interruptible")
def test_a_finished_run_that_is_resumed_says_its_last_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, target, said = memory.corpus("smollm"), memory.target("smollm"), list[str]()
    settings = Settings(batch=2, steps=3)

    def run(resume: bool) -> dict[str, Any]:
        return train(objectives(corpus)["tidar"], target, corpus, tmp_path, settings, resume, say=said.append)

    evaluate, calls = trainer.evaluate, 0

    def interrupted(*arguments: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        return evaluate(*arguments) if calls == 1 else signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:  # all steps are made, and none is evaluated
        patch.setattr(trainer, "evaluate", interrupted)
        patch.setattr(trainer, "_due", lambda *_: False)
        with pytest.raises(KeyboardInterrupt, match="has all 3 steps"):
            run(resume=False)
    last = run(resume=True)
    assert last["step"] == 3 and last["accepted"] >= 1.0 and steps_logged(tmp_path) == [0, 3]
    assert [line for line in said if "this run is over after 3 steps" in line]
    monkeypatch.setattr(trainer, "evaluate", lambda *_: pytest.fail("it is known"))
    assert run(resume=True) == last and steps_logged(tmp_path) == [0, 3]


@pytest.mark.parametrize("name", ["tidar", "eagle3", "dflash"])
def test_what_the_target_said_is_asked_once_for_all_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, target = replace(memory.corpus("smollm"), folder=tmp_path / "corpus"), memory.target("smollm")
    settings = Settings(batch=2, steps=4, rate=1e-2)
    for before in ("tidar", "eagle3", "dflash"):  # what other recipes read lies in the same folder
        train(objectives(corpus)[before], target, corpus, tmp_path / before, settings)
    train(objectives(corpus)[name], target, corpus, tmp_path / "first", settings)
    fresh = replace(corpus, folder=tmp_path / "fresh")
    train(objectives(fresh)[name], target, fresh, tmp_path / "anew", replace(settings, keep=0.0))
    assert (tmp_path / "first" / STATE).read_bytes() == (tmp_path / "anew" / STATE).read_bytes()

    def asked(*arguments: object) -> None:
        raise AssertionError("the target was asked again")

    monkeypatch.setattr(Target, "read", asked)
    train(objectives(corpus)[name], target, corpus, tmp_path / "second", settings)
    assert (tmp_path / "second" / STATE).read_bytes() == (tmp_path / "first" / STATE).read_bytes()
    with pytest.raises(AssertionError, match="asked again"):
        train(objectives(corpus)[name], target, corpus, tmp_path / "third", replace(settings, keep=0.0, batch=3))


def test_reads_of_batches_of_one_shape_are_kept_apart(tmp_path: Path) -> None:
    corpus, target = memory.corpus("smollm"), memory.target("smollm")
    one = corpus.conversations[0]
    batches = [Batch.of([replace(one, ids=ids)]) for ids in (one.ids, one.ids.flip(0))]
    objective = objectives(corpus)["eagle3"]
    for _ in range(2):  # asked, then from the folder
        reader = Reader(target, objective, batches, tmp_path / "reads", 1.0)
        for number, batch in enumerate(batches):
            found, wanted = reader.read(number), target.read(batch, objective.capture)
            for tap, hidden in wanted.hidden.items():
                torch.testing.assert_close(found.hidden[tap], hidden, rtol=0, atol=0)
            assert torch.equal(found.top_ids, wanted.top_ids) and torch.equal(found.top_probs, wanted.top_probs)


@pytest.mark.parametrize("name", ["tidar", "eagle3", "full"])
def test_the_estimate_of_the_disk_is_what_is_then_used(name: str, tmp_path: Path) -> None:
    target, said = memory.target("smollm"), list[str]()
    once = [c for c in memory.corpus("smollm").conversations if c.held_out == (c.hash > 3)]
    corpus, settings = Corpus({}, tuple(once), tmp_path), Settings(batch=2, steps=2)  # two batches, and one of tests
    train(objectives(corpus)[name], target, corpus, tmp_path / "out", settings, say=said.append)
    kept = sum(file.stat().st_size for file in (tmp_path / READS).glob("*"))
    if name == "full":
        assert kept == 0 and "disk" not in said[0]
        return
    found = re.search(r"about (\d+) kB of disk", said[0])
    assert found and int(found[1]) == pytest.approx(kept / 1e3, rel=0.05)
    few = replace(settings, keep=5e-6)
    said.clear()
    train(objectives(corpus)[name], target, corpus, tmp_path / "few", few, say=said.append)
    assert "about 5 kB of disk" in said[0]


def test_sizes_and_times_are_said_in_units_that_fit() -> None:
    assert [trainer.size(x) for x in (5_400, 8_400_000, 2_440_000_000)] == ["5 kB", "8 MB", "2.4 GB"]
    times = [trainer.duration(x) for x in (0.0123, 1.66, 45.0, 400.0, 9000.0)]
    assert times == ["0.012 s", "1.7 s", "45 s", "7 minutes", "2.5 hours"]


def test_the_forecast_is_of_what_is_still_to_come() -> None:
    state = State(step=103, seconds=300.0)
    assert trainer.forecast(30.0, state, Settings(steps=200)) == (
        "10 s per step while all is new to the target: 97 more take 16 minutes at most"
    )
    assert trainer.forecast(30.0, state, Settings(minutes=10)) == (
        "10 s per step while all is new to the target: at least 30 more in the 5 minutes left"
    )


def test_another_corpus_leaves_the_batches_that_were_read_as_they_are() -> None:
    first = memory.corpus("smollm")
    second = replace(first, conversations=tuple(replace(c, hash=c.hash + 100) for c in first.conversations))
    alone = trainer.form_batches(first.part(False), 2, 0)
    both = trainer.form_batches(joined([first, second]).part(False), 2, 0)
    assert len(both) == 2 * len(alone) > 2
    assert all(a.ids.equal(b.ids) for a, b in zip(alone, both, strict=False))


def test_a_full_disk_share_keeps_nothing(tmp_path: Path) -> None:
    corpus, target = replace(memory.corpus("smollm"), folder=tmp_path / "corpus"), memory.target("smollm")
    train(objectives(corpus)["eagle3"], target, corpus, tmp_path / "out", Settings(batch=2, steps=2, keep=0.0))
    assert not (tmp_path / "corpus").exists()


def test_a_batch_without_a_whole_block_teaches_nothing_and_breaks_nothing() -> None:
    corpus = memory.corpus("smollm")
    short = [
        Conversation(c.ids[:8], torch.tensor([0] * 7 + [1], dtype=torch.uint8), c.hash, False)
        for c in corpus.conversations[:2]
    ]
    for objective in objectives(corpus).values():
        read = objective.target.read(Batch.of(short), objective.capture)  # type: ignore[attr-defined]
        scores = objective.score(read, torch.Generator().manual_seed(0), evaluate=True)
        scores.loss.backward()
        if objective.name in ("eagle3", "full"):  # a single token teaches them something
            assert scores.weight > 0
        else:
            assert scores.loss.item() == 0 and scores.weight == 0
        assert scores.right.shape[0] == 0


@pytest.mark.parametrize("reach", [0, 1, 60, 1000])
def test_eagle3_learns_from_what_its_drafter_does_chain_by_chain(reach: int) -> None:
    corpus, target, steps = memory.corpus("smollm"), memory.target("smollm"), 4
    two_rounds = [
        replace(c, ids=c.ids[: 30 + i], roles=torch.tensor([0] * 4 + [1] * 9 + [0] * 3 + [1] * (14 + i)))
        for i, c in enumerate(corpus.part(False)[:3])
    ]
    objective = Eagle3(target, Eagle3Settings(draft_vocab=150, steps=steps, reach=reach), corpus.part(False), 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in objective.parameters.items():  # such that every part matters, and as its file has them
        drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        scale = 8 if "o_proj" in name else 2 if "_proj" in name else 1
        parameter.data.copy_((scale * drawn if parameter.dim() > 1 else 1 + drawn).bfloat16())
    read = target.read(Batch.of(two_rounds), objective.capture, context=False)
    scores = objective.score(read, torch.Generator(), evaluate=not reach)
    every = objective.score(read, torch.Generator(), evaluate=True)  # evaluations end no chain

    made = objective.checkpoint()
    drafter = eagle3.Eagle3Drafter(
        made.config, made.tensors, target.weights.embedding, torch.float32, memory.CPU, native=False
    )
    known = {token: place for place, token in enumerate(objective.known.tolist())}
    loss, weight, right, said = 0.0, 0.0, [], 0
    for row, c in enumerate(two_rounds):
        for pair in range(len(c.ids) - 2):
            cache = drafter.new_cache(1, len(c.ids), steps)
            taps = [read.hidden[tap][row : row + 1, : pair + 1] for tap in objective.capture]
            features = drafter.extend(taps, c.ids[None, 1 : pair + 2], cache)[:, -1:]
            cache.extend([pair + 1])
            rights = []
            for step in range(steps):
                place = pair + 2 + step
                if place == len(c.ids) or c.roles[place] == Role.PROMPT:
                    break
                if step:
                    visible = (torch.arange(steps) < step).view(1, 1, -1)
                    features = drafter.expand(c.ids[None, None, place - 1], features, cache, step - 1, visible)
                logits = drafter.logits(features)[0, 0]
                rights.append(drafter.target_ids(logits.argmax()).item() == c.ids[place])
                before = row, place - 1
                asked = [(c.ids[place].item(), 0.5)]
                asked += zip(read.top_ids[before].tolist(), (read.top_probs[before] / 2).tolist(), strict=True)
                scale = read.top_probs[before].sum().item()
                for index, (token, prob) in enumerate(asked):
                    share = prob / scale if index else prob
                    loss -= 0.8**step * share * logits.log_softmax(-1)[known[token]].item() if token in known else 0
                weight, said = weight + 0.8**step, said + 1
                likeliest = drafter.target_ids(logits.topk(min(reach or 1, len(objective.known))).indices).tolist()
                if reach and c.ids[place] not in likeliest:
                    break
            right += [rights] if len(rights) == steps else []
    assert scores.tokens == said
    if reach:
        assert said < every.tokens and len(right) < len(every.right)
    else:
        assert every.right.tolist() == right
    assert scores.weight.item() == pytest.approx(weight)
    assert scores.loss.item() == pytest.approx(loss / weight, rel=1e-5)


@pytest.mark.parametrize("family", ["mistral", "zaya"])
def test_models_that_cannot_be_trained_against_are_refused(family: str) -> None:
    with pytest.raises(UserError, match="dense models"):
        Target(memory.loaded(family), torch.float32, memory.CPU)
    with pytest.raises(UserError, match="dense models"):  # before hours go into a corpus for it
        data.generate(memory.runtime(family), memory.loaded(family), Path("none"), 10, data.Settings(), 1)


@pytest.mark.parametrize("name", ["tidar", "eagle3", "dflash"])
def test_training_begins_with_what_was_trained_before(name: str, tmp_path: Path) -> None:
    corpus, target = memory.corpus("smollm"), memory.target("smollm")
    before = objectives(corpus)[name]
    train(before, target, corpus, tmp_path, Settings(batch=2, steps=4, rate=1e-2))
    begun: Objective
    if name == "tidar":
        begun = Tidar(target, TIDAR, 9, load_adapter(tmp_path, target.config))
    elif name == "eagle3":
        # Fewer conversations have other frequent tokens: the drafter's own vocabulary stays.
        begun = Eagle3(target, EAGLE3, corpus.conversations[:1], 9, eagle3.load_drafter(tmp_path, target.config))
        assert isinstance(before, Eagle3) and begun.known.equal(before.known)
    else:
        begun = DFlash(target, DFLASH, 9, dflash.load_drafter(tmp_path, target.config))
    for key, tensor in before.parameters.items():
        assert begun.parameters[key].equal(tensor.to(torch.bfloat16).float()), key


def test_a_start_of_another_size_is_refused(tmp_path: Path) -> None:
    target = memory.target("smollm")
    Tidar(target, TidarSettings(block=4, rank=2), 0).save(tmp_path)
    with pytest.raises(UserError, match=r"cannot be the start: its rank is 2, not 3; alpha is 2\.0, not 3\.0$"):
        Tidar(target, TidarSettings(block=4, rank=3), 0, load_adapter(tmp_path, target.config))


@pytest.mark.parametrize("kind", ["tidar", "eagle3", "dflash"])
def test_a_drafter_whose_writing_was_cut_short_is_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A run takes its draft vocabulary from it, so a crash while it is written must not end the run for good."""
    objective = objectives(memory.corpus("smollm"))[kind]
    objective.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def cut(tensors: object, file: Path) -> None:
        file.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", cut)
    with pytest.raises(OSError, match="no space"):
        objective.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_start_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    target, text = memory.target("smollm"), memory.corpus("smollm").conversations

    def refused(begin: Callable[[], object], why: str) -> None:
        with pytest.raises(UserError, match=f"trained cannot be the start: {re.escape(why)}$"):
            begin()

    chains = Eagle3(target, EAGLE3, text, 0).checkpoint()
    layer = replace(chains.config.layer, rope_theta=5e5)
    for config, why in (
        (replace(chains.config, taps=(0, 1, 3)), "its taps is (0, 1, 3), not (0, 1, 2)"),
        (replace(chains.config, layer=layer), "its rope_theta is 500000.0, not 10000.0"),
        (replace(chains.config, norm_before_residual=True), "its norm_before_residual is True, not False"),
    ):
        refused(partial(Eagle3, target, EAGLE3, text, 0, replace(chains, config=config)), why)
    more = replace(EAGLE3, draft_vocab=65)  # whose head would have had the 64 rows that the start has
    refused(lambda: Eagle3(target, more, text, 0, chains), "its draft_vocab is 64, not 65")
    own = replace(chains, tensors={**chains.tensors, "embed_tokens.weight": target.weights.embedding})
    refused(lambda: Eagle3(target, EAGLE3, text, 0, own), "embed_tokens.weight is nothing that is trained here")

    blocks = DFlash(target, DFLASH, 0).checkpoint()
    masked = replace(blocks, config=replace(blocks.config, mask_id=7))
    assert DFlash(target, DFLASH, 0, masked).config.mask_id == 7  # the start's row
    DFlash(target, replace(DFLASH, block=8), 0, blocks)  # short blocks first, as the recipe has it

    adapter = Tidar(target, TIDAR, 0).checkpoint()
    scaled = replace(adapter, config=replace(adapter.config, alpha=8.0))
    refused(lambda: Tidar(target, TIDAR, 0, scaled), "its alpha is 8.0, not 2.0")
