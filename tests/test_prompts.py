"""Prompts: packaged sets, files and data sets; and token ids at a chosen length."""

import json
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zbench import prompts
from zbench.errors import UserError
from zbench.prompts import Prompt
from zbench.scenario import PromptDataset, PromptFile, PromptSet

QUICKSTART = prompts.load(PromptSet(set="quickstart"))
few = settings(max_examples=40, deadline=None)


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token per byte, so that ids can be read back as text."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


PLAIN = byte_tokenizer(None)
CHAT = byte_tokenizer(
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[me]{% endif %}"
)


def in_file(folder, *lines: dict | str, **choice) -> tuple[Prompt, ...]:
    path = folder / "p.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return prompts.load(PromptFile(file=str(path), **choice))


# --- Packaged sets ---


def test_quickstart_has_four_prompts_in_each_of_six_categories():
    categories = [prompt.category for prompt in QUICKSTART]
    names = ["code", "math", "extraction", "rewriting", "chat", "summarisation"]
    assert categories == [name for name in names for _ in range(4)]


def test_no_packaged_text_is_there_twice():
    texts = [prompt.text.casefold() for name in ("quickstart", "warmup", "filler") for prompt in prompts.packaged(name)]
    assert len(set(texts)) == len(texts)


def test_the_filler_has_three_thousand_words():
    assert sum(len(prompt.text.split()) for prompt in prompts.packaged("filler")) > 3000


def test_an_unknown_set_is_told_which_there_are():
    with pytest.raises(UserError, match=r"^unknown prompt set '\.\./quick'; there are quickstart"):
        prompts.load(PromptSet(set="../quick"))


# --- Choosing ---


@few
@given(st.integers(1, 30))
def test_a_limit_takes_evenly_from_the_categories_and_keeps_the_order(limit):
    chosen = prompts.load(PromptSet(set="quickstart", limit=limit))
    counts = [sum(prompt.category == name for prompt in chosen) for name in {p.category for p in QUICKSTART}]
    assert len(chosen) == min(limit, 24)
    assert max(counts) - min(counts) <= 1
    assert list(chosen) == [prompt for prompt in QUICKSTART if prompt in chosen]


def test_categories_choose_and_an_unknown_one_is_told_which_there_are():
    chosen = prompts.load(PromptSet(set="quickstart", categories=("math", "code"), limit=3))
    assert [prompt.id for prompt in chosen] == ["code-1", "code-2", "math-1"]
    with pytest.raises(UserError, match="no prompts of category 'poems'; there are code, math"):
        prompts.load(PromptSet(set="quickstart", categories=("code", "poems")))


def test_warm_up_prompts_are_never_measured_ones():
    first, second = prompts.warmup_prompts(2, measured=QUICKSTART)
    spelt_otherwise = Prompt("x", "x", (f" {first.text.upper()}\n",))
    assert prompts.warmup_prompts(1, measured=[spelt_otherwise]) == (second,)
    with pytest.raises(UserError, match="only 5 warm-up prompts are not measured ones"):
        prompts.warmup_prompts(6, measured=[spelt_otherwise])


# --- Files ---


def test_a_file_may_be_written_as_mt_bench_or_spec_bench_are_or_hold_just_prompts(tmp_path):
    found = in_file(
        tmp_path,
        {"question_id": 81, "category": "writing", "turns": ["One.", "Two."], "reference": ["A", "B"], "more": 1},
        "",
        {"id": "b", "prompt": "Three?", "reference": 3},
        {"prompt": "line\u2028separator"},
    )
    assert found == (
        Prompt("81", "writing", ("One.", "Two."), "A"),
        Prompt("b", "p", ("Three?",), "3"),
        Prompt("4", "p", ("line\u2028separator",)),
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Invalid JSON"),
        ("[1]", "expected an object"),
        ('{"text": "x"}', 'needs the key "turns" or "prompt"'),
        ('{"turns": []}', "turns: is empty"),
        ('{"prompt": "  "}', "prompt: is empty"),
        ('{"turns": ["a", null]}', "turns: expected a valid string"),
        ('{"turns": ["a", 5]}', "turns: expected a valid string"),
        ('{"turns": "hello"}', "turns: expected a valid array"),
        ('{"turns": null}', 'needs the key "turns" or "prompt"'),
        ('{"prompt": 5}', "prompt: expected a valid string"),
        ('{"prompt": ["a"]}', "prompt: expected a valid string"),
        ('{"prompt": "a", "category": []}', "category: expected a valid string"),
        ('{"id": 1, "prompt": "again"}', "another prompt has the id '1'; ids must differ"),
        ('{"prompt": "\\ud800"}', "Invalid JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, said):
    with pytest.raises(UserError) as caught:
        in_file(tmp_path, {"id": 1, "prompt": "x"}, line)
    assert str(caught.value).startswith(f"{tmp_path}/p.jsonl:2: {said}")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_empty_or_no_text_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has no prompts; write one JSON object per line$"):
        in_file(tmp_path, "")
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read: No such file"):
        prompts.load(PromptFile(file=str(tmp_path / "none.jsonl")))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(UserError, match="is not UTF-8 text"):
        prompts.load(PromptFile(file=str(tmp_path / "latin.jsonl")))


# --- Data sets ---


class Table(dict):
    column_names = property(list)


def test_a_data_set_gives_one_prompt_per_row(monkeypatch):
    def load_dataset(name, subset, split):
        return Table(question=[f"{name} {subset} {split}", "Why?", "How?"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = prompts.load(PromptDataset(dataset="org/set", subset="main", column="question", limit=2))
    assert found == (Prompt("0", "org/set", ("org/set main test",)), Prompt("1", "org/set", ("Why?",)))
    with pytest.raises(UserError, match="data set org/set has no column 'q'; it has question"):
        prompts.load(PromptDataset(dataset="org/set", column="q"))


def test_without_the_datasets_library_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        prompts.load(PromptDataset(dataset="org/set", column="question"))


# --- Token ids ---


def test_a_prompt_is_put_into_the_chat_template_or_else_taken_as_it_is():
    prompt = Prompt("a", "x", ("Hi there.", "Never decoded."))
    assert PLAIN.decode(prompts.encode([prompt], PLAIN, None)[0]) == "Hi there."
    assert CHAT.decode(prompts.encode([prompt], CHAT, None)[0]) == "<s>[user]Hi there.[end][me]"


@few
@given(context=st.integers(1, 20_000), chat=st.booleans(), text=st.text(min_size=1, max_size=80).filter(str.strip))
def test_a_context_gives_exactly_that_many_tokens_and_keeps_the_end(context, chat, text):
    tokenizer, prompt = (CHAT if chat else PLAIN), Prompt("a", "x", (text,))
    (natural,) = prompts.encode([prompt], tokenizer, None)
    (fitted,) = prompts.encode([prompt], tokenizer, context)
    asked = len(natural) - len("<s>[user]" if chat else "")
    kept = max(1, min(asked, context - len("<s>[user]" if chat else "")))
    assert len(fitted) == context
    assert fitted[-kept:] == natural[-kept:]


def test_a_short_prompt_is_extended_with_prose_before_the_question():
    text = CHAT.decode(prompts.encode(QUICKSTART[4:5], CHAT, 700)[0])
    before, after = text.split("\n\n" + QUICKSTART[4].text)
    assert before.startswith("<s>[user]")
    assert after == "[end][me]"
    prose = "\n\n".join(part.text for part in prompts.packaged("filler"))
    assert before.removeprefix("<s>[user]") in prose * 2


def test_prompts_differ_in_their_prose_and_a_prompt_keeps_its_own_whatever_else_is_measured():
    together = prompts.encode(QUICKSTART[:3], CHAT, 900)
    assert len({tuple(ids[9:200]) for ids in together}) == 3
    assert prompts.encode(QUICKSTART[2:3], CHAT, 900) == together[2:]


def test_a_prompt_that_is_too_long_loses_its_beginning_and_keeps_the_template():
    prompt = Prompt("a", "x", ("one two three four",))
    assert CHAT.decode(prompts.encode([prompt], CHAT, 26)[0]) == "<s>[user]ree four[end][me]"


# --- What a model cannot be fed ---


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "prompt 7 has no tokens: the model's tokenizer or its chat template makes nothing of it"),
        ([5, 300], "prompt 7 has token 300, the model has 300: the tokenizer is another model's"),
    ],
)
def test_ids_that_no_model_can_be_fed_are_refused(ids, said):
    with pytest.raises(UserError, match=said):
        prompts.check_ids(ids, 300, "prompt 7")
    prompts.check_ids([0, 299], 300, "prompt 7")


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{% for m in %}"])
def test_a_chat_template_that_fails_is_said_in_one_line(template):
    with pytest.raises(UserError, match="the chat template of the model's tokenizer fails: ") as error:
        prompts.encode(QUICKSTART[:1], byte_tokenizer(template), None)
    assert "\n" not in str(error.value)
