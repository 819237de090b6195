"""Prompts: packaged sets, JSONL files and hub data sets; and their token ids at a chosen length."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from zbench.codejudge import Problem
from zbench.errors import UserError
from zbench.paths import expanded
from zbench.scenario import PromptChoice, PromptDataset, PromptSet, PromptSpec

_SETS = resources.files("zbench") / "prompt_sets"
_SUPPORT = ("warmup", "filler")  # packaged, but not there to be measured


@dataclass(frozen=True, slots=True)
class Prompt:
    id: str  # unique in its set
    category: str
    turns: tuple[str, ...]  # what the user says; never empty
    reference: str | None = None  # an answer to check against, where there is one
    problem: Problem | None = None  # a function to write, with its tests, where there are any

    @property
    def text(self) -> str:
        """The first turn, which is the one that is decoded."""
        return self.turns[0]


def load(spec: PromptSpec) -> tuple[Prompt, ...]:
    """The prompts that a scenario asks for, in the order of their source.

    Raises UserError: unknown set or category, a file that is missing or has a bad line (with its number), a data set
    that cannot be had.
    """
    if isinstance(spec, PromptDataset):
        return _read_dataset(spec)
    prompts = _named(spec.set) if isinstance(spec, PromptSet) else read_file(expanded(spec.file))
    return _choose(prompts, spec)


def warmup_prompts(count: int, measured: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Prompts to warm up on: none says the same as a measured one, whose tokens might otherwise be in some cache.

    Raises UserError where there are fewer than `count`.
    """
    taken = {_words(prompt.text) for prompt in measured}
    others = [prompt for prompt in packaged("warmup") if _words(prompt.text) not in taken]
    if len(others) < count:
        raise UserError(f"only {len(others)} warm-up prompts are not measured ones; set warmup.prompts to at most that")
    return tuple(others[:count])


def encode(prompts: Sequence[Prompt], tokenizer: Any, context: int | None) -> list[list[int]]:
    """Token ids of each prompt's first turn, in the tokenizer's chat template where it has one.

    With `context`, every prompt has exactly that many tokens. A longer one loses its beginning; a shorter one gets
    prose put before the question, from another place of the packaged text for each prompt, and from its start again
    where that ends (after 3,200 words): beyond that, contexts repeat themselves.
    `tokenizer` is a `transformers` tokenizer or behaves like one.
    """
    if context is None:
        return [_natural(prompt, tokenizer) for prompt in prompts]
    prose = [tokenizer.encode(f"{part.text}\n\n", add_special_tokens=False) for part in packaged("filler")]
    return [_fitted(prompt, tokenizer, context, prose) for prompt in prompts]


def check_ids(ids: Sequence[int], vocab: int, whose: str) -> None:
    """Raises UserError where a model of `vocab` tokens cannot be fed these; a forward does not ask."""
    if not ids:
        raise UserError(f"{whose} has no tokens: the model's tokenizer or its chat template makes nothing of it")
    if (highest := max(ids)) >= vocab:
        raise UserError(f"{whose} has token {highest}, the model has {vocab}: the tokenizer is another model's")


def _natural(prompt: Prompt, tokenizer: Any) -> list[int]:
    if not tokenizer.chat_template:
        return tokenizer.encode(prompt.text)
    return tokenizer.encode(_chat(prompt.text, tokenizer), add_special_tokens=False)  # the template has written them


def _fitted(prompt: Prompt, tokenizer: Any, context: int, prose: Sequence[Sequence[int]]) -> list[int]:
    head, question = _around_the_gap(prompt, tokenizer)
    room = context - len(head) - len(question)
    if room <= 0:
        kept = context - len(head)
        return head + question[-kept:] if kept > 0 else question[-context:]
    start = int.from_bytes(hashlib.sha256(prompt.id.encode()).digest()[:4], "big") % len(prose)
    tokens = itertools.chain.from_iterable(itertools.islice(itertools.cycle(prose), start, None))
    gap = tokenizer.encode("\n\n", add_special_tokens=False)  # the prose may stop within a word
    return head + [*itertools.islice(tokens, max(0, room - len(gap))), *gap][-room:] + question


def _around_the_gap(prompt: Prompt, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of what comes before the user's words, and of those words to the end."""
    if not tokenizer.chat_template:
        return tokenizer.encode(""), tokenizer.encode(prompt.text, add_special_tokens=False)
    before, after = _template(tokenizer)
    return (
        tokenizer.encode(before, add_special_tokens=False),
        tokenizer.encode(prompt.text + after, add_special_tokens=False),
    )


def _chat(text: str, tokenizer: Any) -> str:
    return templated([{"role": "user", "content": text}], tokenizer, add_generation_prompt=True)


def templated(messages: Sequence[Mapping[str, str]], tokenizer: Any, add_generation_prompt: bool = False) -> str:
    """What the tokenizer's chat template makes of a conversation. Raises UserError where it fails."""
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except Exception as error:  # a template is a program of its own, and may raise anything
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"the chat template of the model's tokenizer fails: {said}") from error


def user_text(ids: Sequence[int], tokenizer: Any) -> str:
    """The user's words within an encoded prompt: what a server that applies the template itself is to be sent.

    Raises UserError where the prompt was cut within its template.
    """
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if not tokenizer.chat_template:
        return text
    before, after = _template(tokenizer)
    if not (text.startswith(before) and text.endswith(after)):
        raise UserError("a prompt is cut within its chat template, so that chat cannot send it; set context higher")
    return text[len(before) : len(text) - len(after)]


def marked(ids: Sequence[int], tokenizer: Any, mark: str) -> list[int]:
    """An encoded prompt with `mark` in front of the user's words, or in front of all where the template is cut."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    before = _template(tokenizer)[0] if tokenizer.chat_template else ""
    start = len(before) if text.startswith(before) else 0
    return tokenizer.encode(text[:start] + mark + text[start:], add_special_tokens=False)


def _template(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before and after the user's words."""
    mark = "\N{REPLACEMENT CHARACTER}"
    before, _, after = _chat(mark, tokenizer).partition(mark)
    return before, after


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.casefold().split())


def _choose(prompts: Sequence[Prompt], spec: PromptChoice) -> tuple[Prompt, ...]:
    """The first `limit` prompts by turns: each category's first, then each one's second, and so on."""
    known = list(dict.fromkeys(prompt.category for prompt in prompts))
    wanted = known if spec.categories is None else spec.categories
    if unknown := [category for category in wanted if category not in known]:
        raise UserError(f"no prompts of category {unknown[0]!r}; there are {', '.join(known)}")
    chosen = [prompt for prompt in prompts if prompt.category in wanted]
    seen: Counter[str] = Counter()
    turns = []
    for index, prompt in enumerate(chosen):
        turns.append((seen[prompt.category], index))
        seen[prompt.category] += 1
    return tuple(chosen[index] for index in sorted(index for _, index in sorted(turns)[: spec.limit]))


def packaged(name: str) -> tuple[Prompt, ...]:
    return _parse((_SETS / f"{name}.jsonl").read_text(encoding="utf-8"), f"{name}.jsonl")


def _named(name: str) -> tuple[Prompt, ...]:
    names = {Path(entry.name).stem for entry in _SETS.iterdir() if entry.name.endswith(".jsonl")}
    known = sorted(names.difference(_SUPPORT))
    if name not in known:
        raise UserError(f"unknown prompt set {name!r}; there are {', '.join(known)} (for your own: {{file: PATH}})")
    return packaged(name)


def read_file(path: Path) -> tuple[Prompt, ...]:
    try:
        return _parse(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; prompts are JSONL, one object per line") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give the path of a JSONL file") from error


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


class _Line(BaseModel):
    """One line of JSONL. Keys that other tools write beside these are left alone."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # ids and references may be numbers, what is said may not

    id: str | None = Field(default=None, validation_alias=AliasChoices("question_id", "task_id", "id"))
    category: str | None = None
    turns: Annotated[list[Annotated[str, Field(strict=True, pattern=r"\S")]], Field(min_length=1)] | None = None
    prompt: Annotated[str, Field(strict=True)] | None = None  # one turn; HumanEval's code before the answer
    reference: Annotated[list[str], BeforeValidator(_as_list)] = []
    entry_point: str | None = None  # HumanEval's names, with `prompt`
    test: str | None = None

    @property
    def said(self) -> tuple[str, ...]:
        """What the user says. Raises ValueError where that is nothing."""
        if self.turns is None and self.prompt is None:
            raise ValueError('needs the key "turns" or "prompt"')
        if self.turns is None and not (self.prompt or "").strip():
            raise ValueError("prompt: is empty")
        return tuple(self.turns or [self.prompt or ""])

    @property
    def problem(self) -> Problem | None:
        """Raises ValueError where there is a test and something lacks that it needs."""
        if not self.test:
            return None
        if not (self.prompt and self.entry_point and self.entry_point.isidentifier()):
            raise ValueError('has a "test", which needs "prompt" (the code before the answer) and "entry_point"')
        return Problem(self.prompt, self.entry_point, self.test)


def _parse(text: str, source: str) -> tuple[Prompt, ...]:
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also split within JSON strings
        if not line.strip():
            continue
        try:
            parsed = _Line.model_validate_json(line)
            turns, problem = parsed.said, parsed.problem
        except ValidationError as error:
            raise UserError(f"{source}:{number}: {_said(error)}") from error
        except ValueError as error:
            raise UserError(f"{source}:{number}: {error}") from None
        name = parsed.id or str(number)
        if name in prompts:
            raise UserError(f"{source}:{number}: another prompt has the id {name!r}; ids must differ")
        reference = next(iter(parsed.reference), None) or None
        prompts[name] = Prompt(name, parsed.category or Path(source).stem, turns, reference, problem)
    if not prompts:
        raise UserError(f"{source}: has no prompts; write one JSON object per line")
    return tuple(prompts.values())


def _said(error: ValidationError) -> str:
    """The first thing that is wrong with a line."""
    first = error.errors(include_url=False)[0]
    where = "".join(f"{part}: " for part in first["loc"][:1])
    if first["type"] in ("too_short", "string_pattern_mismatch"):
        return f"{where}is empty"
    return where + first["msg"].replace("Input should be", "expected", 1)


def _read_dataset(spec: PromptDataset) -> tuple[Prompt, ...]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError("prompts of a hub data set need the datasets library: pip install datasets") from error
    try:
        rows = load_dataset(spec.dataset, spec.subset, split=spec.split)
    except Exception as error:  # datasets raises whatever its storage layers raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot load data set {spec.dataset} ({spec.split}): {reason}") from error
    if spec.column not in rows.column_names:
        raise UserError(f"data set {spec.dataset} has no column {spec.column!r}; it has {', '.join(rows.column_names)}")
    texts = list(itertools.islice(rows[spec.column], spec.limit))
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"data set {spec.dataset}, row {index}: column {spec.column!r} holds no text")
    return tuple(
        Prompt(str(index), spec.dataset, (text,), problem=problem)
        for index, (text, problem) in enumerate(zip(texts, _problems(rows, len(texts)), strict=True))
    )


def _problems(rows: Any, count: int) -> list[Problem | None]:
    """The first functions to write of a data set with HumanEval's columns; None for each where it has others."""
    if not {"prompt", "entry_point", "test"} <= set(rows.column_names):
        return [None] * count
    columns = (rows["prompt"], rows["entry_point"], rows["test"])
    return [Problem(*map(str, one)) for one in itertools.islice(zip(*columns, strict=True), count)]
