"""Data without a data set: a chat model writes conversations, and learns to be drafted for on its own text.

Most user turns are written by the model itself at temperature 1, from the bare chat prefix or from the first words of a
request; the others are templated (`shapes.py`). Answers are greedy, a part of them drawn at a lower temperature. Every
conversation has its own random numbers, made from the seed and its number, and a row of the runtime does not depend on
the rows beside it: so a corpus follows from model, settings and seed, whatever the batch size (on a GPU a row may round
otherwise in another one), and an interrupted one goes on where the last whole shard ended.

All conversations under way share one forward per token. A slot whose conversation has ended begins the next one at
once: every conversation starts with the same tokens, so its cache is cut back to those.
"""

from __future__ import annotations

import json
import random
import string
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zbench import prompts
from zbench.cache import atomic_write
from zbench.engines.sampling import Sampling, draw, on_device, probabilities
from zbench.errors import UserError
from zbench.models.loading import LoadedModel, load_tokenizer
from zbench.models.model import Model
from zbench.models.rows import Rows
from zbench.training import shapes
from zbench.training.corpus import (
    HELD_OUT,
    INDEX,
    VERSION,
    Conversation,
    Role,
    is_held_out,
    prompt_hash,
    read_index,
    read_shard,
    write_shard,
)
from zbench.training.options import differences
from zbench.training.target import trainable

WRITTEN, OPENED = "written", "opened"  # kinds of conversation whose user turns the model writes; some words are given
PROMPT = 192  # tokens of a templated user turn at most; a longer one is dropped
OVERLAP = 8  # words in a row shared with a prompt to be measured on
Advance = Callable[[float, str], None]  # answer tokens so far, and what to say


@dataclass(frozen=True, slots=True)
class Settings:
    """What a corpus follows from, beside its model. `tokens` and, on a CPU, `batch` only say how much and how fast."""

    seed: int = 0
    written: float = 0.3  # share of conversations whose user turns the model writes
    opened: float = 0.45  # share whose first turn the model writes on from an opening
    follow_ups: float = 0.2  # share that get a second round
    warm: float = 0.25  # share whose answers are drawn at `temperature`, the others being greedy
    temperature: float = 0.7
    turn: int = 96  # tokens of a user turn at most; a longer one is dropped
    answer: int = 192  # tokens of an answer at most
    shard: int = 64  # conversations begun per shard; some are dropped


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Token ids around what is said; `stop` ends a turn and belongs to it."""

    before: list[int]
    to_answer: list[int]
    to_user: list[int]
    stop: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, eos_ids: Sequence[int]) -> ChatFormat:
        """By the chat template; a model without one gets a line feed after each turn."""

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        if not tokenizer.chat_template:
            gap = encode("\n")
            return cls(gap, gap, gap, frozenset(eos_ids))
        first, answer, second = "\N{BLACK STAR}", "\N{WHITE STAR}", "\N{BLACK DIAMOND}"
        said = [("user", first), ("assistant", answer), ("user", second)]
        messages = [{"role": role, "content": text} for role, text in said]
        text = prompts.templated(messages, tokenizer)
        before, rest = text.split(first)
        to_answer, rest = rest.split(answer)
        return cls(encode(before), encode(to_answer), encode(rest.split(second)[0]), frozenset(eos_ids))


@dataclass(frozen=True, slots=True)
class _UserTurn:
    text: str = ""
    written: bool = True  # the model writes it, or on from `text`


@dataclass(slots=True)
class _Conversation:
    """One under way: tokens to be fed that are known already, then a turn to be written, and so on."""

    number: int
    kind: str
    temperature: float  # of its answers
    user_turns: deque[_UserTurn]  # still to come
    random: np.random.Generator
    ids: list[int]
    roles: list[Role]
    pending: deque[int] = field(default_factory=deque)  # of `ids`, not fed yet
    turn: list[int] = field(default_factory=list)  # what is being written
    answering: bool = False
    first_turn: str = ""
    dropped: str = ""  # why
    done: bool = False


class Writer:
    """Writes conversations `first`, `first` + 1, ... in no particular order."""

    def __init__(self, model: Model, tokenizer: Any, settings: Settings, batch: int, refused: Refused) -> None:
        self.model, self.tokenizer, self.settings, self.refused = model, tokenizer, settings, refused
        self.format = ChatFormat.of(tokenizer, model.config.eos_ids)
        self.has_template = bool(tokenizer.chat_template)
        rounds = 2 * (
            max(settings.turn, PROMPT) + settings.answer + len(self.format.to_answer) + len(self.format.to_user)
        )
        self.longest = len(self.format.before) + rounds
        self.batch = batch
        self.fed = 0  # tokens, for the rate

    def run(self, numbers: Iterator[int]) -> Iterator[_Conversation]:
        """Finished conversations, dropped ones too."""
        before, model = self.format.before, self.model
        cache = model.new_cache(self.batch, self.longest + 1)
        prompts.check_ids(before, model.config.vocab, "what stands before a user turn")
        if shared := before[:-1]:
            rows = Rows.chain(torch.tensor([shared] * self.batch, device=model.device), cache.lengths)
            model.forward(rows, cache, logits=rows.ids[:, :0])
            cache.extend([len(shared)] * self.batch)
        slots: list[_Conversation | None] = [self._begin(n) for _, n in zip(range(self.batch), numbers, strict=False)]
        slots += [None] * (self.batch - len(slots))
        while any(slots):
            ids = torch.tensor(
                [[slot.pending.popleft() if slot else before[-1]] for slot in slots], device=model.device
            )
            logits = model.forward(Rows.chain(ids, cache.lengths), cache).logits[:, 0]
            cache.extend([int(slot is not None) for slot in slots])
            self.fed += sum(slot is not None for slot in slots)
            self._write([slot if slot and not slot.pending else None for slot in slots], logits)
            for index, slot in enumerate(slots):
                if slot and slot.done:
                    yield slot
                    number = next(numbers, None)
                    slots[index] = None if number is None else self._begin(number)
            cache.truncate([
                len(slot.ids) - len(slot.pending) if slot else len(before) - 1 for slot in slots
            ])  # fmt: skip

    def _begin(self, number: int) -> _Conversation:
        s = self.settings
        rng = random.Random(f"{s.seed}/{number}")
        share = rng.random() if self.has_template else 1.0
        if written := share < s.written + s.opened:
            kind = WRITTEN if share < s.written else OPENED
            turns = deque([_UserTurn(shapes.opening(rng) if kind == OPENED else "")])
        else:
            kind = rng.choice(list(shapes.SHAPES))
            turns = deque([_UserTurn(shapes.prompt(kind, rng), written=False)])
        if rng.random() < s.follow_ups:
            turns.append(_UserTurn() if written else _UserTurn(shapes.follow_up(rng), written=False))
        temperature = s.temperature if rng.random() < s.warm else 0.0
        before = self.format.before
        state = _Conversation(
            number, kind, temperature, turns, np.random.default_rng([s.seed, number]),
            ids=list(before), roles=[Role.PROMPT] * len(before),
        )  # fmt: skip
        self._next_user_turn(state)
        state.pending.appendleft(before[-1])
        return state

    def _next_user_turn(self, state: _Conversation) -> None:
        turn, state.answering = state.user_turns.popleft(), False
        ids = self.tokenizer.encode(turn.text, add_special_tokens=False) if turn.text else []
        if turn.written:
            state.turn = list(ids)
            self._say(state, ids)
            return
        state.first_turn = state.first_turn or turn.text
        state.answering = True
        state.dropped = "length" if len(ids) > PROMPT else self.refused.why(turn.text)
        state.done = bool(state.dropped)
        self._say(state, [] if state.done else ids + self.format.to_answer)

    def _say(self, state: _Conversation, ids: list[int]) -> None:
        if ids:
            prompts.check_ids(ids, self.model.config.vocab, "a user turn")
        state.ids += ids
        state.roles += [Role.PROMPT] * len(ids)
        state.pending.extend(ids)

    def _write(self, writing: list[_Conversation | None], logits: torch.Tensor) -> None:
        """Choose the next token of each conversation that waits for one; logits [B, V]."""
        drawn = [
            (index, temperature, state.random.random())
            for index, state in enumerate(writing)
            if state and (temperature := state.temperature if state.answering else 1.0)
        ]
        tokens = logits.argmax(-1)
        if drawn:
            indices, temperatures, uniforms = zip(*drawn, strict=True)
            rows, divisors = (on_device(values, logits.device) for values in (indices, temperatures))
            probs = probabilities(logits[rows] / divisors[:, None], Sampling(1.0))
            tokens[rows] = draw(probs, torch.tensor(uniforms, dtype=torch.float64, device=logits.device))
        for state, token in zip(writing, tokens.tolist(), strict=True):
            if state is None:
                continue
            state.turn.append(token)
            state.ids.append(token)
            state.roles.append(Role.ANSWER if state.answering else Role.PROMPT)
            state.pending.append(token)
            ended = token in self.format.stop
            if ended or len(state.turn) == (self.settings.answer if state.answering else self.settings.turn):
                self._end_turn(state, ended)

    def _end_turn(self, state: _Conversation, ended: bool) -> None:
        turn, state.turn = state.turn, []
        if state.answering:
            if state.user_turns and ended:
                self._say(state, [t for t in self.format.to_user if t not in self.format.stop])
                self._next_user_turn(state)
            else:
                state.done = True
            return
        text = self.tokenizer.decode(turn[:-1] if ended else turn).strip()
        state.dropped = ("" if ended else "truncated") or junk(text) or self.refused.why(text)
        state.first_turn = state.first_turn or text
        state.done = bool(state.dropped)
        if state.done and state.first_turn != text:  # a bad second turn: the first round stays
            cut = len(state.ids) - len(turn)
            state.ids, state.roles, state.dropped = state.ids[:cut], state.roles[:cut], ""
        if state.done:
            return
        self._say(state, [t for t in self.format.to_answer if t not in self.format.stop])
        state.answering = True


class Refused:
    """Texts that must not be trained on: those that drafters are measured with."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._whole: set[tuple[str, ...]] = set()
        self._runs: set[tuple[str, ...]] = set()
        for text in texts:
            words = _words(text)
            self._whole.add(words)
            self._runs.update(_runs(words))

    def why(self, text: str) -> str:
        """Empty for a text that is not among them."""
        words = _words(text)
        return "measured" if words in self._whole or not self._runs.isdisjoint(_runs(words)) else ""


def junk(text: str) -> str:
    """Why a user turn that a model wrote is not worth an answer; empty where it is."""
    words = text.split()
    if not 3 <= len(words) <= 80:
        return "length"
    if sum(c in string.printable for c in text) < 0.95 * len(text):
        return "characters"
    if sum(c.isalpha() or c.isspace() for c in text) < 0.6 * len(text):
        return "characters"
    if len(words) >= 10 and Counter(zip(words, words[1:], words[2:], strict=False)).most_common(1)[0][1] > 2:
        return "repetition"
    return ""


def measured_texts(files: Iterable[Path] = ()) -> Iterator[str]:
    """Every packaged prompt, and those of other JSONL files."""
    for name in ("quickstart", "warmup", "filler"):
        yield from (turn for prompt in prompts.packaged(name) for turn in prompt.turns)
    for file in files:
        yield from (turn for prompt in prompts.read_file(file) for turn in prompt.turns)


def generate(
    model: Model,
    loaded: LoadedModel,
    out: Path,
    tokens: int,
    settings: Settings,
    batch: int,
    exclude: Sequence[Path] = (),
    advance: Advance = lambda done, what: None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Write shards to `out` until they hold `tokens` answer tokens, or for so many seconds; returns the index.

    A folder that has some goes on from there. Raises UserError where it is of another model or other settings, and for
    a model that nothing can be trained for.
    """
    trainable(loaded)
    writer = Writer(model, load_tokenizer(loaded), settings, batch, Refused(measured_texts(exclude)))
    index = _index(out, loaded, settings)
    seen = {c.hash for entry in index["shards"] for c in read_shard(out, entry)}
    done = sum(entry["answer_tokens"] for entry in index["shards"])
    began, finished, first = time.monotonic(), {}, len(index["shards"]) * settings.shard
    advance(done, "starting")
    if done >= tokens:
        return index
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error

    def numbers() -> Iterator[int]:
        number = first
        while done < tokens:
            yield number
            number += 1

    for state in writer.run(numbers()):
        finished[state.number] = state
        shard = range(len(index["shards"]) * settings.shard, (len(index["shards"]) + 1) * settings.shard)
        if not all(number in finished for number in shard) or done >= tokens:
            continue
        kept = []
        for number in shard:
            state = finished.pop(number)
            hash = prompt_hash(state.first_turn)
            why = state.dropped or ("duplicate" if hash in seen else "")
            index["counts"][f"dropped: {why}" if why else state.kind] += 1
            if not why:
                seen.add(hash)
                held = is_held_out(hash)
                kept.append(Conversation(torch.tensor(state.ids), torch.tensor(state.roles), hash, held))
        try:
            index["shards"].append(write_shard(out, len(index["shards"]), kept))
            atomic_write(out / INDEX, json.dumps(index, indent=1))
            atomic_write(out / "README.md", card(index))
        except OSError as error:
            raise UserError(f"cannot write to {out}: {error.strerror}; the shards before are kept") from error
        done += index["shards"][-1]["answer_tokens"]
        rate = writer.fed / (time.monotonic() - began)
        advance(done, f"{done} answer tokens, {rate:.0f} tokens/s fed")
        if seconds is not None and time.monotonic() - began > seconds:
            break
    return index


def card(index: dict[str, Any]) -> str:
    """The data card, in Markdown."""
    shards, counts = index["shards"], index["counts"]
    kept = {kind: n for kind, n in counts.items() if not kind.startswith("dropped")}
    dropped = {kind.removeprefix("dropped: "): n for kind, n in counts.items() if kind.startswith("dropped")}
    total, answers = (sum(entry[key] for entry in shards) for key in ("tokens", "answer_tokens"))
    settings = index["settings"]
    return "\n".join([
        f"# Conversations written by {index['model']}",
        "",
        f"{sum(kept.values())} conversations, {total} tokens, {answers} of them in answers. No data set was used: "
        "the model wrote every answer, and the user turns that are not templated.",
        "",
        f"- model weights: sha256 {index['weights']}",
        f"- settings: {', '.join(f'{key} {value}' for key, value in settings.items())}",
        f"- kept: {', '.join(f'{kind} {n}' for kind, n in sorted(kept.items()))}",
        f"- dropped: {', '.join(f'{why} {n}' for why, n in sorted(dropped.items())) or 'none'}",
        f"- held out: one prompt of {HELD_OUT}, by its hash",
        f"- no user turn equals a packaged prompt or shares {OVERLAP} words in a row with one",
        "",
        "The text is a small model's: it is often wrong and is fit for training that model's drafters only.",
        "",
    ])  # fmt: skip


def _index(out: Path, loaded: LoadedModel, settings: Settings) -> dict[str, Any]:
    fresh: dict[str, Any] = {
        "version": VERSION,
        "model": loaded.name,
        "weights": loaded.weights_hash,
        "settings": asdict(settings),
    }
    kept = read_index(out)
    if kept is None:
        return {**fresh, "counts": Counter(), "shards": []}
    if kept.get("weights") != loaded.weights_hash:
        raise UserError(f"{out} was written by another model ({kept.get('model')}); choose another folder with --out")
    if differ := differences(kept.get("settings", {}), fresh["settings"]):
        raise UserError(f"{out} was made {'; '.join(differ)}; choose another folder with --out")
    return {**kept, "counts": Counter(kept["counts"])}


def _words(text: str) -> tuple[str, ...]:
    cleaned = "".join(c if c.isalnum() else " " for c in text.casefold())
    return tuple(cleaned.split())


def _runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {words[i : i + OVERLAP] for i in range(len(words) - OVERLAP + 1)}
