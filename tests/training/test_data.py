"""Corpora that a model writes: they follow from the seed alone, go on where they ended, and keep prompts out."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.test_execution import again
from tests.training import memory
from zbench import prompts
from zbench.engines.sampling import Sampling, draw, probabilities
from zbench.errors import UserError
from zbench.models import loading
from zbench.models.execution import Graphs
from zbench.models.loading import LoadedModel
from zbench.models.model import build
from zbench.training import data, shapes
from zbench.training.corpus import (
    Conversation,
    Corpus,
    Role,
    is_held_out,
    joined,
    load_corpus,
    prompt_hash,
    read_index,
    write_shard,
)
from zbench.training.data import Settings

SHAPE = {"family": "llama", "layers": 2, "width": 64, "ffn": 96, "heads": 4, "vocab": 300, "max_positions": 1024}
SETTINGS = Settings(answer=12, shard=8, follow_ups=0.5, warm=0.5)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loading.load({"config": {**SHAPE, "eos_ids": (2,)}, "seed": 1}, "float32")


def written(model: LoadedModel, out: Path, tokens: int = 150, **options) -> Corpus:
    target = build(model, torch.float32, memory.CPU, "auto")
    data.generate(target, model, out, tokens, **{"settings": SETTINGS, "batch": 3, **options})
    return load_corpus(out, model.weights_hash)


def contents(corpus: Corpus) -> list[tuple[list[int], list[int]]]:
    return [(c.ids.tolist(), c.roles.tolist()) for c in corpus.conversations]


def test_a_corpus_follows_from_its_seed_whatever_the_batch(model: LoadedModel, tmp_path: Path) -> None:
    first = written(model, tmp_path / "a")
    assert contents(written(model, tmp_path / "b", batch=7)) == contents(first)
    assert contents(written(model, tmp_path / "c", settings=Settings(1, answer=12, shard=8))) != contents(first)


def test_a_full_disk_is_one_line_and_keeps_the_shards_before(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(written(model, tmp_path / "whole"))
    shards = []

    def full(folder: Path, number: int, conversations: Sequence[Conversation]) -> dict[str, Any]:
        if number:
            raise OSError(28, "No space left on device")
        shards.append(number)
        return write_shard(folder, number, conversations)

    monkeypatch.setattr(data, "write_shard", full)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: No space left on device; the shards before"):
        written(model, tmp_path)
    assert shards == [0]
    monkeypatch.undo()
    assert contents(written(model, tmp_path)) == whole


def test_a_corpus_written_through_graphs_is_the_same(model: LoadedModel, tmp_path: Path) -> None:
    eager = build(model, torch.float32, memory.CPU, "eager")
    recorded = build(model, torch.float32, memory.CPU, "eager")
    recorded.graphs = Graphs(recorded, again)  # type: ignore[attr-defined]
    for target, name in ((eager, "eager"), (recorded, "graph")):
        data.generate(target, model, tmp_path / name, 150, SETTINGS, 3)
    made = [contents(load_corpus(tmp_path / name, model.weights_hash)) for name in ("eager", "graph")]
    assert made[0] == made[1]
    assert recorded.prepared


def test_every_turn_is_drawn_at_its_own_temperature_with_its_own_numbers(model: LoadedModel) -> None:
    """Greedy and warm answers, and user turns at temperature 1, side by side in one step."""
    target = build(model, torch.float32, memory.CPU, "auto")
    writer = data.Writer(target, loading.load_tokenizer(model), SETTINGS, 1, data.Refused(()))
    logits = 3 * torch.randn(60, 300, generator=torch.Generator().manual_seed(0))
    states, want = [], []
    for index, row in enumerate(logits):
        state = writer._begin(index)
        state.temperature, state.answering = 0.7 * (index % 2), index % 3 > 0
        temperature = state.temperature if state.answering else 1.0
        number = torch.tensor(copy.deepcopy(state.random).random(), dtype=torch.float64)
        picked = draw(probabilities(row, Sampling(temperature)), number) if temperature else row.argmax()
        states.append(state), want.append(int(picked))
    places = [len(state.ids) for state in states]
    writer._write([*states, None], torch.cat([logits, logits[:1]]))
    assert [state.ids[place] for state, place in zip(states, places, strict=True)] == want


def test_an_interrupted_corpus_goes_on_where_it_ended(model: LoadedModel, tmp_path: Path) -> None:
    whole = written(model, tmp_path / "whole")
    part = written(model, tmp_path / "part", seconds=0.0)
    assert 0 < len(part.conversations) < len(whole.conversations)
    assert contents(written(model, tmp_path / "part")) == contents(whole)


def test_greedy_answers_are_the_models_own(model: LoadedModel, tmp_path: Path) -> None:
    corpus = written(model, tmp_path, settings=Settings(answer=12, shard=8, follow_ups=0.0, warm=0.0))
    target = build(model, torch.float32, memory.CPU, "auto")
    for c in corpus.conversations:
        start = int((c.roles == Role.ANSWER).nonzero()[0])
        cache = target.new_cache(1, len(c.ids))
        logits = target.forward(data.Rows.chain(c.ids[None], cache.lengths), cache).logits[0]
        assert logits[start - 1 : -1].argmax(-1).tolist() == c.ids[start:].tolist()
        assert c.roles[start:].tolist() == [Role.ANSWER] * (len(c.ids) - start)


def test_a_chat_model_writes_on_from_openings(tmp_path: Path) -> None:
    tiny = loading.load("zbench-tiny", "float32")
    settings = Settings(written=0.0, opened=1.0, follow_ups=0.5, shard=24)
    corpus, tokenizer = written(tiny, tmp_path, 1, settings=settings, batch=12), loading.load_tokenizer(tiny)
    chat, first_words = data.ChatFormat.of(tokenizer, tiny.config.eos_ids), set()
    for number in range(settings.shard):
        rng = random.Random(f"{settings.seed}/{number}")
        rng.random()
        first_words.add(shapes.opening(rng))
    assert len(corpus.conversations) > 3
    for c in corpus.conversations:
        assert c.ids[: len(chat.before)].tolist() == chat.before
        start = int((c.roles == Role.ANSWER).nonzero()[0])
        turn = tokenizer.decode(c.ids[len(chat.before) : start - len(chat.to_answer)].tolist())
        opening = max((words for words in first_words if turn.startswith(words)), key=len)
        assert len(turn) > len(opening)
        assert c.ids[start - len(chat.to_answer) : start].tolist() == chat.to_answer
    assert set(read_index(tmp_path)["counts"]) >= {"opened"}


def test_no_prompt_to_be_measured_goes_in(model: LoadedModel, tmp_path: Path) -> None:
    prompt = shapes.prompt("chat", random.Random("anything"))
    excluded = tmp_path / "mine.jsonl"
    excluded.write_text('{"prompt": "' + prompt + '"}\n')
    refused = data.Refused(data.measured_texts([excluded]))
    assert refused.why(prompt.upper())
    assert refused.why("And now: " + prompts.packaged("quickstart")[0].turns[0] + " Thank you.")
    assert not refused.why("Tell me about sheep.")


def test_what_is_held_out_follows_from_the_prompt_alone() -> None:
    hashes = [prompt_hash(f"Explain number {n}.") for n in range(2000)]
    assert 60 < sum(map(is_held_out, hashes)) < 140
    assert prompt_hash("Explain  NUMBER 7.") == prompt_hash("explain number 7.")


@pytest.mark.parametrize("text", ["Hi", "a b " * 60, "what is what is what is what is what is", "π ω σ λ μ ν ξ φ χ ψ"])
def test_junk_is_seen(text: str) -> None:
    assert data.junk(text)
    assert not data.junk("What is the capital of the country where you were made?")


def test_a_corpus_is_refused_by_another_model_and_other_settings(model: LoadedModel, tmp_path: Path) -> None:
    written(model, tmp_path)
    with pytest.raises(UserError, match="another model"):
        load_corpus(tmp_path, "somebody else's")
    with pytest.raises(UserError, match="was made with --seed 0, not 5"):
        written(model, tmp_path, settings=Settings(seed=5))
    (tmp_path / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is not the shard"):
        load_corpus(tmp_path, model.weights_hash)
    assert "conversations" in (tmp_path / "README.md").read_text()


def test_corpora_of_other_seeds_are_one_without_duplicates(model: LoadedModel, tmp_path: Path) -> None:
    first = written(model, tmp_path / "a")
    second = written(model, tmp_path / "b", settings=Settings(1, answer=12, shard=8))
    both = joined([first, second, first])
    known = {c.hash for c in first.conversations}
    new = [c for c in second.conversations if c.hash not in known]
    assert new and contents(both) == contents(first) + contents(Corpus({}, tuple(new)))
    assert both.folder == tmp_path / "a"
    one = first.conversations[0]
    again = Conversation(one.ids.flip(0), one.roles, one.hash, one.held_out)
    assert joined([Corpus({}, (one,)), Corpus({}, (again,))]).conversations[0].ids.equal(one.ids)


def test_a_tokenizer_of_another_model_is_refused(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = loading.load_tokenizer(model)
    monkeypatch.setattr(data, "load_tokenizer", lambda _: larger)
    small = loading.load({"config": {**SHAPE, "vocab": 40}, "seed": 1}, "float32")
    with pytest.raises(UserError, match="the model has 40: the tokenizer is another model's"):
        written(small, tmp_path)
