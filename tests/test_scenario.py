"""Scenarios: what a YAML file may say, what it is told when it says something else, and the cells it comes to."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from zbench import scenario
from zbench.errors import UserError
from zbench.models.config import ModelConfig
from zbench.models.zaya_config import ZayaConfig

SHIPPED = sorted((Path(__file__).parents[1] / "scenarios").glob("*.yaml"))
MINIMAL = {"name": "mini", "model": "smollm2-135m", "engines": ["autoregressive"], "prompts": {"set": "quickstart"}}
ZAYA = {
    "family": "zaya", "layers": 2, "width": 64, "ffn": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 300,
    "max_positions": 128, "experts": 8,
}  # fmt: skip
TEXT = """\
name: mini
model: smollm2-135m
engines:
  - autoregressive
  - name: reference
    assisted: prompt_lookup
prompts:
  set: quickstart
sampling:
  temperature: 0
budget:
  minutes: 5
"""
LINES = TEXT.splitlines()
few = hypothesis_settings(max_examples=40, deadline=None)


def load(folder: Path, content: str | dict, *overrides: str) -> scenario.Scenario:
    path = folder / "s.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return scenario.load(path, overrides)


def complaint(folder: Path, content: str | dict, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, content, *overrides)
    return str(caught.value).replace(f"{folder}/", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scenarios")


# --- What it says ---


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_scenario_loads_under_its_own_name_and_begins_with_the_question_it_answers(path):
    assert scenario.load_any(path).name == path.stem
    assert path.read_text().startswith("# ")


def test_a_scenario_of_kernels_is_as_strict_and_is_none_of_engines(tmp_path):
    path = tmp_path / "k.yaml"
    path.write_text("name: k\nkernels: [block_attention]\n")
    assert scenario.load_any(path, ["seconds=0.5"]).kernels == ("block_attention",)
    with pytest.raises(UserError, match="is about kernels, which `zbench run` times"):
        scenario.load(path)
    path.write_text("name: k\nkernels: all\nsecond: 3\n")
    with pytest.raises(UserError, match=r"k.yaml:3: unknown key 'second' in kernelscenario; did you mean 'seconds'?"):
        scenario.load_any(path)


def test_only_name_model_engines_and_prompts_must_be_given(folder):
    for key in MINIMAL:
        without = {other: value for other, value in MINIMAL.items() if other != key}
        assert complaint(folder, without) == f"s.yaml:1: missing key {key!r} in scenario"
    assert load(folder, MINIMAL).output_tokens == 64


def test_an_engine_is_a_name_or_a_mapping_and_its_label_tells_what_was_set(folder):
    engines = ["autoregressive", {"name": "reference"}, {"name": "reference", "assisted": "prompt_lookup"}]
    found = load(folder, MINIMAL | {"engines": engines}).engines
    assert [engine.title for engine in found] == ["autoregressive", "reference", "reference (assisted: prompt_lookup)"]
    assert found[2].options == {"assisted": "prompt_lookup", "prompt_lookup_tokens": 10}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m", "smollm2-135m"),
        ({"path": "models/a"}, "models/a"),
        ({"hub": "org/name"}, "org/name"),
        ({"hub": "org/name", "revision": "abc"}, "org/name@abc"),
    ],
)
def test_a_model_is_a_zoo_name_a_folder_or_a_hub_id(folder, model, name):
    loaded = load(folder, MINIMAL | {"model": model})
    assert (loaded.model_spec, loaded.model_name) == (model, name)


def test_a_shape_has_the_fields_and_defaults_of_the_runtime_and_is_checked_by_it(folder):
    own, runtime = scenario.ModelShape.model_fields, {field.name: field for field in fields(ModelConfig)}
    assert set(own) == set(runtime)
    derived = {"kv_heads", "head_dim", "qkv_bias", "qk_norm"}
    for name in (name for name in own if name not in derived and not own[name].is_required()):
        assert own[name].default == runtime[name].default
    shape = {"family": "llama", "layers": 2, "width": 64, "ffn": 96, "heads": 4, "vocab": 300, "max_positions": 128}
    loaded = load(folder, MINIMAL | {"model": {"config": shape | {"windows": [None, 8], "rms_eps": 1e-6}}})
    assert ModelConfig.from_fields(loaded.model_spec["config"]).windows == (None, 8)
    assert loaded.model_name.startswith("random-llama-2x64-")
    wrong = complaint(folder, MINIMAL | {"model": {"config": shape | {"heads": 3}}})
    assert wrong == "s.yaml:3: model.config: width 64 is not a multiple of heads 3; give head_dim"


def test_a_zaya_shape_has_its_own_fields_and_is_checked_by_the_runtime_too(folder):
    own, runtime = scenario.ZayaShape.model_fields, {field.name: field for field in fields(ZayaConfig)}
    assert set(own) == set(runtime)
    for name in (name for name in own if not own[name].is_required()):
        assert own[name].default == runtime[name].default
    loaded = load(folder, MINIMAL | {"model": {"config": ZAYA | {"mask_id": 7, "eos_ids": [3]}}})
    config = ZayaConfig.from_fields(loaded.model_spec["config"])
    assert (config.experts, config.mask_id, config.eos_ids) == (8, 7, (3,))
    assert loaded.model_name.startswith("random-zaya-2x64-")
    axes = {"model.config.experts": [4, 8]}
    points = scenario.points(load(folder, MINIMAL | {"model": {"config": ZAYA}, "matrix": axes}))
    assert [at.model_spec["config"]["experts"] for at, _ in points] == [4, 8]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ZAYA | {"expert": 3}, "s.yaml:14: unknown key 'expert' in model.config; did you mean 'experts'?"),
        (ZAYA | {"qk_norm": True}, "s.yaml:14: unknown key 'qk_norm' in model.config; known: family, layers"),
        (ZAYA | {"experts": 0}, "s.yaml:13: model.config.experts: expected greater than or equal to 1, found 0"),
        (ZAYA | {"heads": 3}, "s.yaml:3: model.config: 3 heads cannot share 2 key/value heads evenly"),
        ({k: v for k, v in ZAYA.items() if k != "experts"}, "s.yaml:3: missing key 'experts' in model.config"),
        (
            ZAYA | {"family": "mamba"},
            "s.yaml:4: model.config.family: expected one of llama, mistral, qwen2, qwen3, zaya, found 'mamba'",
        ),
        ({"layers": 2}, "s.yaml:3: missing key 'family' in model.config"),
        (["zaya"], 's.yaml:3: model.config: expected a mapping, found ["zaya"]'),
    ],
)
def test_a_bad_zaya_shape_gets_one_line(folder, config, message):
    found = complaint(folder, MINIMAL | {"model": {"config": config}})
    assert found.startswith(message)
    assert "\n" not in found


def test_different_shapes_have_different_names(folder):
    shape = {"family": "llama", "layers": 2, "width": 64, "ffn": 96, "heads": 4, "vocab": 300, "max_positions": 128}
    models = [{"config": shape}, {"config": shape | {"ffn": 128}}, {"config": shape, "seed": 1}]
    assert len({load(folder, MINIMAL | {"model": model}).model_name for model in models}) == 3


def test_a_number_in_scientific_notation_is_a_number(folder):
    assert load(folder, TEXT + "repeats: 3\n", "sampling.top_p=5e-1", "budget.minutes=1.5e1").budget_seconds == 900


@pytest.mark.parametrize(
    ("engines", "baseline", "label"),
    [
        (["reference", "autoregressive"], None, "autoregressive"),
        (["reference"], None, "reference"),
        (["reference", {"name": "autoregressive", "label": "ours"}], "reference", "reference"),
    ],
)
def test_the_baseline_is_the_one_named_or_the_first_autoregressive_or_the_first(folder, engines, baseline, label):
    loaded = load(folder, MINIMAL | {"engines": engines, "baseline": baseline})
    assert [cell.label for cell in scenario.cells(loaded) if cell.baseline] == [label]


# --- What it is told ---


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (TEXT + "engin: 3", "s.yaml:13: unknown key 'engin' in scenario; did you mean 'engines'?"),
        (
            TEXT.replace("assisted", "asisted"),
            "s.yaml:6: unknown key 'asisted' in engines[1]; did you mean 'assisted'?",
        ),
        (TEXT.replace("  set", "  sett"), "s.yaml:7: prompts: expected a mapping with one of the keys"),
        (TEXT.replace("- auto", "- outo"), "s.yaml:4: unknown engine 'outoregressive'; did you mean 'autoregressive'?"),
        (
            TEXT.replace("e: reference", "e: x"),
            "s.yaml:5: unknown engine 'x'; known: autoregressive, eagle3, dflash, diffusion, prompt_lookup, forward, ",
        ),
        (TEXT.replace("name: reference", "label: x"), "s.yaml:5: missing key 'name' in engines[1]"),
        (TEXT.replace("prompt_lookup", "yes"), "s.yaml:6: engines[1].assisted: expected 'prompt_lookup', found true"),
        (TEXT.replace("temperature: 0", "temperature: hot"), "s.yaml:10: sampling.temperature: expected a number"),
        (
            TEXT.replace("e: 0", "e: 1e-40"),
            "s.yaml:10: sampling.temperature: must be 0, which is greedy, or at least 0.001",
        ),
        (TEXT.replace("e: 0", "e: .nan"), "s.yaml:10: sampling.temperature: expected a finite number, found NaN"),
        (TEXT + "batch: true", "s.yaml:13: batch: expected a whole number, found true"),
        (TEXT + "batch: '4'", "s.yaml:13: batch: expected a whole number, found '4'"),
        (TEXT + "batch:", "s.yaml:13: batch: expected a whole number, found nothing"),
        (TEXT.replace("mini", "2024"), "s.yaml:1: name: expected text, found 2024; put it in quotes"),
        (TEXT + "device: gpu", "s.yaml:13: device: expected text that matches"),
        (TEXT + "baseline: auto", "s.yaml:13: baseline: no engine is labelled 'auto'; known: autoregressive, ref"),
        (
            TEXT.replace("assisted: prompt_lookup", "label: autoregressive"),
            "s.yaml:3: engines: labels 'autoregressive'",
        ),
        (TEXT.replace("assisted: prompt_lookup", "prompt_lookup_tokens: 3"), "s.yaml:5: engines[1]: prompt_lookup_tok"),
        ("", "s.yaml:1: is empty; a scenario needs name, model, engines and prompts"),
        ("- a\n", 's.yaml:1: scenario: expected a mapping, found ["a"]'),
        (TEXT + "a: [", "s.yaml:13: malformed YAML: "),
        (TEXT + "a: \x01", "s.yaml:13: malformed YAML: character 0x1 is not allowed"),
        ("[" * 1500, "s.yaml: malformed YAML: nested too deeply"),
        (TEXT + "---\na: 1", "s.yaml:13: malformed YAML: expected a single document"),
        (TEXT + "description: &a x\nbatch: *a", "s.yaml:14: malformed YAML: aliases"),
        (TEXT + "x: !!python/object:os.system 1", "s.yaml:13: malformed YAML: aliases (*) and tags (!)"),
        (TEXT + "description: 2024-99-99", "s.yaml:13: malformed YAML: '2024-99-99' cannot be read"),
        (TEXT + "on: 1", "s.yaml:13: key 'on' is not text; put it in quotes"),
        (TEXT + "seed: 1\nseed: 2", "s.yaml:14: key 'seed' is given twice, first on line 13"),
        (TEXT.replace("  minutes: 5", "  {minutes: 1, minutes: 2}"), "s.yaml:12: key 'minutes' is given twice"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_its_place(folder, content, said):
    told = complaint(folder, content)
    assert told.startswith(said)
    assert "\n" not in told


def test_everything_that_is_wrong_is_said_in_the_order_of_the_file(folder):
    told = complaint(folder, TEXT.replace("temperature", "temprature") + "batch: 0\nengin: 1\n")
    assert [line.split(": ")[0] for line in told.splitlines()] == ["s.yaml:10", "s.yaml:13", "s.yaml:14"]


def test_a_file_that_cannot_be_read_is_said_in_one_line(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    for path, reason in [("none.yaml", "No such file"), (".", "Is a directory"), ("latin.yaml", "is not UTF-8 text")]:
        with pytest.raises(UserError, match=reason) as caught:
            scenario.load(tmp_path / path)
        assert "\n" not in str(caught.value)


KNOWN = {*scenario.Scenario.model_fields, *scenario.ReferenceSpec.model_fields}
unknown_keys = st.from_regex(r"[a-z]{3,9}_[a-z]{3,9}", fullmatch=True).filter(lambda key: key not in KNOWN)


@few
@given(key=unknown_keys, line=st.sampled_from([0, 1, 2, 6, 8, 10, 12, 5, 7, 9, 11]))
def test_an_unknown_key_is_reported_on_its_own_line_wherever_it_stands(folder, key, line):
    indent = {5: "    ", 7: "  ", 9: "  ", 11: "  "}.get(line, "")
    content = "\n".join([*LINES[:line], f"{indent}{key}: 1", *LINES[line:]])
    where = {5: "engines[1]", 7: "prompts", 9: "sampling", 11: "budget"}.get(line, "scenario")
    assert complaint(folder, content).startswith(f"s.yaml:{line + 1}: unknown key {key!r} in {where}; ")


# --- Overrides ---

settings = st.fixed_dictionaries(
    {},
    optional={
        "batch": st.integers(1, 64),
        "context": st.none() | st.integers(1, 4096),
        "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
        "ignore_eos": st.booleans(),
        "sampling.temperature": st.just(0.0) | st.floats(0.001, 2),
        "sampling.top_k": st.none() | st.integers(1, 100),
        "warmup.prompts": st.integers(0, 6),
        "description": st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]), max_size=20),
    },
)


def nested(dotted: dict) -> dict:
    tree: dict = {}
    for key, value in dotted.items():
        *parents, last = key.split(".")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return tree


@few
@given(settings)
def test_overrides_do_what_editing_the_file_does(folder, changes):
    edited = load(folder, MINIMAL | nested(changes))
    assert load(folder, MINIMAL, *(f"{key}={json.dumps(value)}" for key, value in changes.items())) == edited


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.temprature=1", "unknown key 'temprature' in sampling; did you mean 'temperature'?"),
        ("batch.x=1", "batch: expected a whole number, found {"),
        ("batch=0", "batch: expected greater than or equal to 1, found 0"),
        ("engines.eagle4.depth=2", "eagle4 is not one engine of the scenario, write its label or number: 0 "),
        ("engines.99.depth=2", "99 is not one engine of the scenario, write its label or number: 0 "),
        ("batch", "write -o KEY=VALUE with a dotted key of the scenario"),
        ("=4", "write -o KEY=VALUE with a dotted key of the scenario"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_given(folder, override, said):
    assert complaint(folder, TEXT, override).startswith(f"-o {override}: {said}")


def test_an_engine_is_overridden_by_its_label_name_or_number(folder):
    engines = [
        "autoregressive",
        {"name": "eagle3", "drafter": {"random": True}, "depth": 2},
        {"name": "dflash", "label": "short", "drafter": {"random": True}, "block": 3},
        {"name": "dflash", "label": "long", "drafter": {"random": True}, "block": 8},
    ]
    content = MINIMAL | {"engines": engines}
    changes = ("engines.eagle3.depth=6", "engines.long.block=7", "engines.0.execution=eager", "engines.2=prompt_lookup")
    changed = load(folder, content, *changes)
    assert [engine.name for engine in changed.engines] == ["autoregressive", "eagle3", "prompt_lookup", "dflash"]
    assert [engine.options.get("depth") or engine.options.get("block") for engine in changed.engines] == [
        None,
        6,
        None,
        7,
    ]
    assert changed.engines[0].options["execution"] == "eager" and changed.engines[1].options["drafter"] is not None
    assert complaint(folder, content, "engines.long.blok=7").startswith("-o engines.long.blok=7: unknown key 'blok'")
    said = complaint(folder, content, "engines.dflash.block=4")
    assert said.endswith("label or number: 0 autoregressive, 1 eagle3, 2 short, 3 long")
    swept = load(folder, content, "engines.short.sweep={tokens: [4, 5]}")
    assert [engine.title for engine in swept.engines][2:4] == ["short, tokens 4", "short, tokens 5"]


def test_an_override_with_malformed_yaml_is_one_line(folder):
    told = complaint(folder, TEXT, "batch=[1")
    assert told.startswith("-o batch=[1:1: malformed YAML: ")
    assert "\n" not in told


def test_an_override_that_the_matrix_would_undo_is_refused_and_the_axis_can_be_overridden(folder):
    content = MINIMAL | {"matrix": {"sampling.temperature": [0, 1]}}
    told = complaint(folder, content, "sampling.temperature=0.5")
    assert told.endswith("is an axis of the matrix; write -o matrix.sampling.temperature=[...] instead")
    changed = load(folder, content, "matrix.sampling.temperature=[0.5]")
    assert [at.sampling.temperature for at, _ in scenario.points(changed)] == [0.5]


# --- The matrix ---

matrices = st.fixed_dictionaries(
    {},
    optional={
        "batch": st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
        "dtype": st.lists(st.sampled_from(["float32", "bfloat16", "float16"]), min_size=1, max_size=3, unique=True),
        "sampling.temperature": st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=3, unique=True),
        "context": st.lists(st.none() | st.integers(1, 99), min_size=1, max_size=2, unique=True),
        "model": st.lists(st.sampled_from(["a/b", "a-b", {"path": "a/b"}, {"path": "a-b"}]), min_size=1, max_size=2),
    },
)


def expanded(matrix: dict, **more) -> tuple:
    return scenario.cells(scenario.Scenario.model_validate(MINIMAL | {"engines": TWO, "matrix": matrix} | more))


TWO = ["autoregressive", {"name": "reference", "label": "peer"}]


@few
@given(matrices)
def test_every_combination_is_one_point_and_every_cell_has_an_id_of_its_own(matrix):
    cells = expanded(matrix)
    combinations = 1
    for values in matrix.values():
        combinations *= len({json.dumps(value) for value in values})
    assert len(cells) == len(TWO) * combinations
    assert len({cell.id for cell in cells}) == len(cells)


@few
@given(matrices)
def test_the_engines_of_a_point_stand_together_and_one_of_them_is_the_baseline(matrix):
    cells = expanded(matrix)
    for first, second in zip(cells[::2], cells[1::2], strict=True):
        assert first.point == second.point
        assert (first.baseline, second.baseline) == (True, False)


@few
@given(matrices, st.randoms())
def test_ids_do_not_depend_on_the_order_of_the_axes(matrix, random):
    shuffled = dict(random.sample(list(matrix.items()), len(matrix)))
    assert {cell.id for cell in expanded(matrix)} == {cell.id for cell in expanded(shuffled)}


@few
@given(matrices)
def test_excluding_a_value_leaves_what_a_matrix_without_it_gives(matrix):
    matrix = matrix | {"batch": [1, 2, 3]}
    assert expanded(matrix, exclude=[{"batch": 2}]) == expanded(matrix | {"batch": [1, 3]})


@few
@given(matrices)
def test_including_a_point_that_is_already_there_adds_nothing(matrix):
    assert expanded(matrix, include=[expanded(matrix)[0].point]) == expanded(matrix)


def test_ids_can_be_read():
    cells = expanded({"batch": [1, 4], "dtype": ["float32", "bfloat16"]}, exclude=[{"batch": 4, "dtype": "float32"}])
    assert [cell.id for cell in cells] == [
        "autoregressive/batch=1,dtype=float32",
        "peer/batch=1,dtype=float32",
        "autoregressive/batch=1,dtype=bfloat16",
        "peer/batch=1,dtype=bfloat16",
        "autoregressive/batch=4,dtype=bfloat16",
        "peer/batch=4,dtype=bfloat16",
    ]
    assert [cell.id for cell in expanded({})] == ["autoregressive", "peer"]


def test_points_may_be_listed_instead_of_multiplied():
    cells = expanded({}, include=[{"batch": 1, "context": 512}, {"batch": 8}])
    assert [(cell.batch, cell.context) for cell in cells[::2]] == [(1, 512), (8, None)]


def test_a_cell_holds_the_settings_of_its_point():
    cell = expanded({"sampling.temperature": [0.5], "dtype": ["float16"], "model": [{"path": "x"}]}, device="cuda:1")[1]
    assert (cell.sampling, cell.dtype) == ({"temperature": 0.5, "top_p": 1.0, "top_k": None}, "float16")
    assert (cell.label, cell.engine, cell.model, cell.device) == ("peer", "reference", "x", "cuda:1")


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        ("matrix:\n  sampling.temprature:\n    - 0\n    - 1", "s.yaml:14: unknown key 'temprature' in sampling; did"),
        ("matrix:\n  batch:\n    - 1\n    - 0", "s.yaml:16: batch: expected greater than or equal to 1, found 0"),
        ("matrix:\n  batch: 4", "s.yaml:14: matrix.batch: expected a list, found 4"),
        ("matrix: {batch: []}", "s.yaml:13: matrix.batch: expected at least one item, found []"),
        ("matrix:\n  device: [cpu]", "s.yaml:14: device cannot be an axis of the matrix"),
        ("matrix:\n  budget.minutes: [1]", "s.yaml:14: budget.minutes cannot be an axis of the matrix"),
        (
            "matrix: {sampling: [{}]}\ninclude: []\nexclude:\n - {batc: 1}",
            "s.yaml:16: unknown axis 'batc' in exclude[0]",
        ),
        ("matrix: {batch: [1]}\nexclude: [{batch: 1}]", "s.yaml:14: exclude leaves no point of the matrix"),
        ("include:\n - batch: 2\n - batch: 0", "s.yaml:15: batch: expected greater than or equal to 1, found 0"),
        ("include:\n - bach: 2", "s.yaml:14: unknown key 'bach' in scenario; did you mean 'batch'?"),
        (
            "matrix:\n  sampling: [{top_k: 1}]\n  sampling.top_p: [0.5]",
            "s.yaml:15: axis sampling.top_p is part of axis sampling; keep one of them",
        ),
    ],
)
def test_a_wrong_matrix_is_said_in_one_line_with_its_place(folder, matrix, said):
    told = complaint(folder, TEXT + matrix)
    assert told.startswith(said)
    assert "\n" not in told


# --- Hash and schema ---


def shuffled_keys(value, random):
    if isinstance(value, dict):
        return {key: shuffled_keys(inner, random) for key, inner in random.sample(list(value.items()), len(value))}
    return value


def test_hardware_is_called_as_in_the_spec_sheets_and_is_no_part_of_what_is_measured(folder):
    named = load(folder, TEXT, "hardware=mi300x")
    assert named.hardware == "MI300X"
    assert load(folder, TEXT, "hardware=h100 sxm").hardware == "H100 SXM"
    assert scenario.content_hash(named) == scenario.content_hash(load(folder, TEXT))
    assert "hardware cannot be an axis of the matrix" in complaint(folder, TEXT, "matrix.hardware=[MI300X]")


@few
@given(settings, matrices, st.randoms())
def test_the_hash_does_not_see_names_defaults_spelling_or_the_order_of_keys(changes, matrix, random):
    content = MINIMAL | nested(changes) | {"matrix": matrix}
    one = scenario.Scenario.model_validate(content)
    same = content | {"name": "other", "description": "words", "engines": [{"name": "autoregressive"}], "repeats": 2}
    same["baseline"] = "autoregressive"
    other = scenario.Scenario.model_validate(shuffled_keys(same, random))
    assert scenario.content_hash(one) == scenario.content_hash(other)


@pytest.mark.parametrize(
    "override", ["batch=2", "seed=1", "sampling.top_p=0.5", "matrix.batch=[1]", "warmup.prompts=2"]
)
def test_the_hash_sees_everything_that_is_measured(folder, override):
    assert scenario.content_hash(load(folder, TEXT, override)) != scenario.content_hash(load(folder, TEXT))


def test_an_option_that_came_later_changes_no_hash_until_it_is_given():
    def digest(eagle3=None, dflash=None, diffusion=None):
        drafter = {"random": True}
        engines = [
            {"name": "eagle3", "top_k": 2, "drafter": drafter, **(eagle3 or {})},
            {"name": "dflash", "drafter": drafter, **(dflash or {})},
            *([{"name": "diffusion", **diffusion}] if diffusion is not None else ()),
        ]
        given = {**MINIMAL, "engines": [{"name": "autoregressive"}, *engines]}
        return scenario.content_hash(scenario.Scenario.model_validate(given))

    # What zbench said before it had `beam`, `draft_vocab` and DFlash's `tokens`.
    assert digest() == "531391cb917e338d5341c5fc86805b51cd1d2b834d8cb24206ca54f0b178320e"
    later = [digest({"beam": 1}), digest(dflash={"draft_vocab": 9}), digest(dflash={"tokens": 9})]
    assert len({digest(), *later, digest({"tokens": 8})}) == 5
    assert digest(diffusion={}) == "d30941b560b3094407ba2049756766b51618ac6a1e112a1147086a0de27227d0"
    assert digest(diffusion={"tokens": 8}) != digest(diffusion={})


@few
@given(settings, matrices)
def test_a_scenario_survives_being_written_as_json(changes, matrix):
    one = scenario.Scenario.model_validate(MINIMAL | nested(changes) | {"engines": TWO, "matrix": matrix})
    again = scenario.Scenario.model_validate(json.loads(json.dumps(one.model_dump(mode="json"))))
    assert scenario.content_hash(again) == scenario.content_hash(one)
    assert scenario.cells(again) == scenario.cells(one)


def test_the_schema_describes_every_key_and_allows_no_other():
    schema = scenario.json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert {"Scenario", "KernelScenario"} <= schema["$defs"].keys()
    for model in schema["$defs"].values():
        assert model["additionalProperties"] is False
        assert model["description"]
        assert all(field["description"].endswith(".") for field in model["properties"].values())


def test_the_schema_offers_engines_by_name_and_by_mapping():
    by_name, *by_mapping = scenario.json_schema()["$defs"]["Scenario"]["properties"]["engines"]["items"]["oneOf"]
    assert by_name["enum"] == list(scenario.ENGINES)
    assert len(by_mapping) == len(scenario.ENGINES)


def test_scenarios_and_prompts_import_neither_torch_nor_transformers():
    code = "import sys, zbench.scenario, zbench.prompts; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("proposals: 34", "engines[1].proposals: expected 0 to 33 or all, found 34"),
        ("proposals: most", "engines[1].proposals: expected 0 to 33 or all, found 'most'"),
        ("beta: 0.5", "engines[1]: beta does nothing without sampler: logit_mix"),
        ("threshold: 0.5", "engines[1]: threshold does nothing without"),
        ("sampler: denoise, fallback: redraft", "engines[1]: sampler: denoise prepares no outcomes"),
        ("proposals: 0, sampler: logit_mix", "engines[1]: proposals: 0 decodes autoregressively"),
        ("proposals: 0, synthetic: {length: 1}", "engines[1]: proposals: 0 decodes autoregressively"),
        ("outcomes: prefix", "engines[1]: outcomes do nothing where every outcome is prepared"),
        ("block_size: 4, synthetic: {rates: [0.5]}", "engines[1]: synthetic rates: give 3 numbers"),
        ("block_size: 4, synthetic: {length: 9}", "engines[1]: synthetic length counts the bonus"),
        ('block_size: 4, synthetic: {histogram: {"9": 2}}', "engines[1]: synthetic histogram: accepted drafts go"),
        ("draft_sampling: true, sampler: trust_diffusion", "engines[1]: draft_sampling is for sampler: lossless"),
        ("adaptor: {random: true}", "unknown key 'adaptor' in engines[1]; did you mean 'adapter'?"),
    ],
)
def test_a_diffusion_setting_that_cannot_be_is_said_in_one_line(folder, options, said):
    told = complaint(
        folder, TEXT.replace("- name: reference\n    assisted: prompt_lookup", f"- {{name: diffusion, {options}}}")
    )
    assert told.startswith(f"s.yaml:5: {said}")
    assert "\n" not in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("confidence: 1", "engines[1].confidence: expected less than 1, found 1"),
        ("confidence: 0.3, top_k: 2", "engines[1]: confidence ends chains; with top_k trees are drafted"),
        ("confidence: 0.3, synthetic: {length: 2}", "engines[1]: synthetic acceptance asks no drafter"),
        ("drafter: {random: true, layers: 3}", "engines[1]: drafter.layers is for dflash"),
    ],
)
def test_an_eagle3_setting_that_cannot_be_is_said_in_one_line(folder, options, said):
    drafter = "" if "drafter" in options else "drafter: {random: true}, "
    engine = f"- {{name: eagle3, {drafter}{options}}}"
    told = complaint(folder, TEXT.replace("- name: reference\n    assisted: prompt_lookup", engine))
    assert told.startswith(f"s.yaml:5: {said}")
    assert "\n" not in told


# --- Engines that sweep options ---


SWEEP = """\
name: mini
model: smollm2-135m
engines:
  - autoregressive
  - name: diffusion
    label: blocks
    mask_id: 1
    sweep:
      block_size: [2, 4]
      proposals:
        - 1
        - 2
prompts: {set: quickstart}
"""


def test_an_engine_that_sweeps_options_stands_for_one_for_every_combination(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(SWEEP)
    found = scenario.load(path).engines
    assert [engine.title for engine in found[1:]] == [
        f"blocks, block_size {block}, proposals {count}" for block in (2, 4) for count in (1, 2)
    ]
    assert [(e.options["block_size"], e.options["proposals"]) for e in found[1:]] == [(2, 1), (2, 2), (4, 1), (4, 2)]
    assert all("sweep" not in cell.options for cell in scenario.cells(scenario.load(path)))
    written_out = SWEEP[: SWEEP.index("  - name: diffusion")] + "".join(
        f"  - {{name: diffusion, label: '{e.title}', mask_id: 1, block_size: {e.options['block_size']},"
        f" proposals: {e.options['proposals']}}}\n"
        for e in found[1:]
    )
    other = tmp_path / "other.yaml"
    other.write_text(written_out + "prompts: {set: quickstart}\n")
    assert scenario.content_hash(scenario.load(path)) == scenario.content_hash(scenario.load(other))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("        - 2", "        - 99"), "s.yaml:12: engines[2].proposals: expected 0 to 33 or all, found 99"),
        (("      proposals:", "      proposal:"), "s.yaml:11: unknown key 'proposal' in engines[1]"),
        (("[2, 4]", "[]"), "s.yaml:9: engines[1].sweep.block_size: expected at least one item"),
        (("[2, 4]", "4"), "s.yaml:9: engines[1].sweep.block_size: expected a list, found 4"),
        (("block_size: [2, 4]", "label: [a, b]"), "s.yaml:8: engines[1].sweep: a label is no option"),
        (("block_size: [2, 4]", "sweep: [{lookup: [1, 2]}]"), "s.yaml:8: engines[1].sweep: a sweep is no option"),
    ],
)
def test_a_wrong_sweep_is_told_where_it_was_written(tmp_path, wrong, said):
    path = tmp_path / "s.yaml"
    path.write_text(SWEEP.replace(*wrong))
    with pytest.raises(UserError) as error:
        scenario.load(path)
    assert said in str(error.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize("name", ["dflash", "dflash_reference"])
def test_a_vocabulary_of_a_drafter_that_has_none_is_refused(folder, name):
    engine = {"name": name, "drafter": {"random": True, "vocab": 64}}
    assert "drafter.vocab is for eagle3" in complaint(folder, MINIMAL | {"engines": [engine]})


def test_a_swept_option_may_be_nested(folder):
    swept = {"name": "diffusion", "block_size": 3, "synthetic": {"rate": 0}, "sweep": {"synthetic.rate": [0.5, 0.75]}}
    found = load(folder, MINIMAL | {"engines": [swept]}).engines
    assert [(e.title, e.options["synthetic"]) for e in found] == [
        ("diffusion, synthetic.rate 0.5", {"rate": 0.5}), ("diffusion, synthetic.rate 0.75", {"rate": 0.75})
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [[1], [2, 4], [1, 4, 2], [1, 2, 2], [0, 1]])
def test_raw_forwards_take_ascending_numbers_of_rows_from_one_on(folder, rows):
    engines = [{"name": "forward", "rows": rows}]
    assert "rows" in complaint(folder, MINIMAL | {"engines": engines})
    assert load(folder, MINIMAL | {"engines": [{"name": "forward", "rows": [1, 7]}]}).engines[0].options["rows"] == (
        1,
        7,
    )
