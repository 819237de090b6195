"""Searching settings: who races whom, on which prompts, and what is said of the winners."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from zbench import cli, engines, metrics, run, scenario, tune
from zbench.errors import UserError
from zbench.hardware import roofs
from zbench.prompts import Prompt
from zbench.report import render, tuning

SHAPE = "{family: llama, layers: 2, width: 64, ffn: 96, heads: 4, kv_heads: 2, vocab: 300, max_positions: 256}"
SCENARIO = f"""
name: tiny
model: {{config: {SHAPE}, weights: random}}
dtype: float32
device: cpu
engines:
  - autoregressive
  - {{name: eagle3, label: EAGLE-3, drafter: {{random: true, vocab: 64}}, depth: 5}}
  - prompt_lookup
  - {{name: reference, label: transformers}}
prompts: {{set: quickstart, limit: 3}}
context: 24
output_tokens: 12
ignore_eos: true
repeats: 1
warmup: {{prompts: 1, output_tokens: 2}}
"""
SMALL = {
    "eagle3": (
        ({"depth": 1}, {"depth": 2}, {"depth": 2, "top_k": 500}, {"depth": 2, "top_k": 2, "tokens": 3}),
        ({"confidence": 0.0}, {"confidence": 0.5}),
    ),
    "prompt_lookup": (({"match": 1, "tokens": 4}, {"match": 2, "tokens": 4}),),
}
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _no_measured_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = {"value": 1e12, "low": 1e12, "high": 1e12, "n": 1, "unit": "B/s"}
    made_up = {"bandwidth": {"read": rate}, "flops": {"float32": {**rate, "unit": "FLOP/s"}}, "ridge": {"float32": 1.0}}
    monkeypatch.setattr(roofs, "load_or_measure", lambda *_, **__: made_up)
    monkeypatch.setattr(tune, "SPACES", SMALL)


def wanted(tmp_path: Path, *overrides: str, text: str = SCENARIO) -> scenario.Scenario:
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return scenario.load(path, overrides)


def searched(text: str) -> list[tuple[str, int]]:
    engines = scenario.TypeAdapter(tuple[scenario._Engine, ...]).validate_python(scenario.yaml.safe_load(text))
    return [(group.title, len(group.given)) for group in tune.groups(engines)]


# --- What is compared ---


def test_engines_that_differ_in_settings_alone_are_one_group() -> None:
    assert searched("[autoregressive, {name: eagle3, drafter: {random: true}}, {name: reference}]") == [("eagle3", 1)]
    sweep = "{name: eagle3, drafter: {random: true}, label: 'E, depth 1', depth: 1}"
    other = "{name: eagle3, drafter: {random: true}, label: 'E, depth 2', depth: 2}"
    assert searched(f"[{sweep}, {other}]") == [("E", 2)]
    stranger = "{name: eagle3, drafter: {random: true, seed: 1}}"
    alike = "{name: eagle3, drafter: {random: true, seed: 2}}"
    assert searched(f"[{stranger}, {alike}]") == [("eagle3 1", 1), ("eagle3 2", 1)]


@pytest.mark.parametrize("name", ["eagle3", "dflash", "diffusion", "prompt_lookup"])
def test_every_setting_of_a_space_is_one_of_its_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    source = {"drafter": {"random": True}} if name in ("eagle3", "dflash") else {}
    first, *others = tune.SPACES[name]
    for entry in (*first, *({**first[0], **entry} for group in others for entry in group)):
        spec = scenario.ENGINES[name](name=name, **source, **entry)
        assert {key: spec.options[key] for key in entry} == entry
    assert len({json.dumps(entry) for entry in first}) == len(first)


PROMPTS = st.lists(st.sampled_from("abc"), min_size=0, max_size=40)


@given(PROMPTS, st.integers(1, 4))
def test_halves_share_no_prompt_and_have_whole_batches_of_every_category(categories: list[str], batch: int) -> None:
    prompts = [Prompt(str(index), category, (f"prompt {index}",)) for index, category in enumerate(categories)]
    try:
        one, other = tune.halves(prompts, batch)
    except UserError:
        assert len(prompts) < 6 * batch + 6  # three categories may differ by one each, and batches be cut
        return
    assert not {p.id for p in one} & {p.id for p in other}
    assert all(len(half) % batch == 0 and len(half) >= 2 * batch for half in (one, other))
    if batch == 1:
        assert len(one) + len(other) == len(prompts)
        counts = [Counter(p.category for p in half) for half in (one, other)]
        assert all(abs(counts[0][c] - counts[1][c]) <= 1 for c in "abc")


# --- The whole of it ---


def test_rounds_get_fewer_settings_and_the_last_run_other_prompts(tmp_path: Path) -> None:
    found = tune.tune(wanted(tmp_path), tmp_path / "out", QUIET, 8)
    record = json.loads((found.folder / "tune.json").read_text())
    one, two = record["rounds"]
    # EAGLE-3's own depth of 5 and the three of the space that its 64 tokens allow; prompt lookup's own and two.
    assert Counter(t["engine"] for t in one["tried"]) == {"EAGLE-3": 4, "prompt_lookup": 3}
    kept = [t["options"] for t in one["tried"] if t["kept"] and t["engine"] == "EAGLE-3"]
    chains = 2 * sum(options["top_k"] == 1 for options in kept)  # with and without a confidence, which no tree has
    trees = sum(options["top_k"] > 1 for options in kept)
    assert Counter(t["engine"] for t in two["tried"]) == {"EAGLE-3": chains + trees, "prompt_lookup": 2}
    for each in (one, two):
        for engine in ("EAGLE-3", "prompt_lookup"):
            tried = [t for t in each["tried"] if t["engine"] == engine]
            speeds = [t["speedup"]["value"] for t in tried]
            assert speeds == sorted(speeds, reverse=True)
            keep = 2 if each is one else 1
            assert [t["kept"] for t in tried] == [index < keep for index in range(len(tried))]
    winners = {t["engine"]: t["setting"] for t in two["tried"] if t["kept"]}
    assert {f["chosen"]["engine"]: f["chosen"]["setting"] for f in record["found"]} == winners
    asked = [
        {trial.requests[0].prompt_id for trial in metrics.load_run(found.folder / each["folder"]).trials}
        for each in (*record["rounds"], record["last"])
    ]
    assert [len(ids) for ids in asked] == [4, 4, 4] and not (asked[0] | asked[1]) & asked[2]
    assert [each["prompts"] for each in (*record["rounds"], record["last"])] == [4, 4, 4]


def test_the_tuned_scenario_is_the_scenario_with_what_was_found(tmp_path: Path) -> None:
    asked = wanted(tmp_path)
    found = tune.tune(asked, tmp_path / "out", QUIET, 8)
    tuned = scenario.load(found.folder / "tuned.yaml")
    chosen = {each.chosen.engine: each.chosen.options for each in found.found}
    assert [engine.title for engine in tuned.engines] == ["autoregressive", "EAGLE-3", "prompt_lookup", "transformers"]
    for engine in tuned.engines:
        assert chosen.get(engine.title, {}).items() <= engine.options.items()
    assert tuned.prompts == asked.prompts and tuned.repeats == 1 and tuned.output_tokens == 12
    last = metrics.load_run(found.folder / found.last.folder)
    by_label = {cell.record.label: cell for cell in last.cells}
    for each in found.found:
        assert by_label[each.chosen.engine].record.options.items() >= each.chosen.options.items()
        if each.given:
            assert by_label[f"{each.chosen.engine} as given"].record.options.items() >= each.given.options.items()
            pair = (by_label[label].requests for label in (f"{each.chosen.engine} as given", each.chosen.engine))
            theirs, ours = (frame.set_index("prompt_id")["decode_seconds"] for frame in pair)
            ratio = (theirs / ours).prod() ** (1 / len(ours))
            assert each.over_given is not None and each.over_given.value == pytest.approx(ratio)


def test_several_settings_of_a_scenario_are_what_is_chosen_from(tmp_path: Path) -> None:
    engines = "engines=[autoregressive, {name: prompt_lookup, sweep: {match: [1, 2, 3], tokens: [2, 8]}}]"
    found = tune.tune(wanted(tmp_path, engines), tmp_path / "out", QUIET, 8)
    assert [len(each.tried) for each in found.rounds] == [6, 2]
    (only,) = found.found
    assert only.settings == 6 and only.given is None and only.over_given is None
    assert [engine.title for engine in scenario.load(found.folder / "tuned.yaml").engines] == [
        "autoregressive",
        "prompt_lookup",
    ]


def test_a_setting_that_fails_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = engines.create

    def create(name: str, options: dict[str, Any], shared: engines.Shared) -> Any:
        if options.get("depth") == 2:
            raise RuntimeError("out of memory")
        return build(name, options, shared)

    monkeypatch.setattr(engines, "create", create)
    found = tune.tune(wanted(tmp_path), tmp_path / "out", QUIET, 8)
    failed = [t for each in found.rounds for t in each.tried if t.error]
    assert failed and all(t.options["depth"] == 2 and not t.kept for t in failed)
    assert "out of memory" in failed[0].error
    assert found.found[0].chosen.options["depth"] in (1, 5)
    assert "failed" in (render(found.folder)).read_text()


def test_an_engine_without_a_setting_that_works_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = engines.create

    def create(name: str, options: dict[str, Any], shared: engines.Shared) -> Any:
        if name == "eagle3":
            raise RuntimeError("no such kernel")
        return build(name, options, shared)

    monkeypatch.setattr(engines, "create", create)
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    done = CliRunner().invoke(cli.main, ["tune", str(path), "--prompts", "8", "--out", str(tmp_path / "out")])
    assert done.exit_code == cli.FAILED_CELLS
    assert "EAGLE-3: no setting could be measured (RuntimeError: no such kernel)." in done.stdout
    tuned = scenario.load(next((tmp_path / "out").glob("*/tuned.yaml")))
    assert tuned.engines[1].options["depth"] == 5  # as it was


def test_an_interrupted_tuning_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, calls = run.measure, []

    def stopping(point: run.Point, trial: run.Trial, *rest: Any) -> Any:
        calls.append(trial.cell.label)
        if len(calls) == 45:
            raise KeyboardInterrupt
        return measure(point, trial, *rest)

    monkeypatch.setattr(run, "measure", stopping)
    asked, out = wanted(tmp_path), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt, match="continue with --resume"):
        tune.tune(asked, out, QUIET, 8)
    before = {path: path.stat().st_size for path in out.rglob(run.TRIALS)}
    assert len(before) == 2
    folder = tune.newest(out, asked)
    found = tune.tune(asked, out, QUIET, 8, folder)
    assert found.folder == folder and len(list(out.iterdir())) == 1
    after = {path: path.stat().st_size for path in out.rglob(run.TRIALS)}
    assert len(after) == 3 and [after[path] > size for path, size in before.items()].count(True) == 1
    measured = len(calls)
    again = tune.tune(asked, out, QUIET, 8, folder)  # everything is there
    assert len(calls) == measured and again == found
    with pytest.raises(UserError, match="tunes another scenario"):
        tune.tune(asked, out, QUIET, 12, folder)


# --- What is refused ---


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engines=[autoregressive, reference]"], "no engine of tiny has settings to choose from"),
        (["matrix={batch: [1, 2]}"], "has a matrix of 2 points"),
        (["batch=8"], "16 prompts in batches of 8 are too few"),
        (["hardware=MI300X"], "tuning measures"),
    ],
)
def test_what_cannot_be_tuned_is_said_in_one_line(tmp_path: Path, overrides: list[str], words: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    given = [part for override in overrides for part in ("-o", override)]
    done = CliRunner().invoke(cli.main, ["tune", str(path), *given, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    for option, words in ((["--resume"], "nothing to resume"), (["--resume", str(tmp_path)], "is no tuning")):
        done = CliRunner().invoke(cli.main, ["tune", str(path), "--out", str(tmp_path / "out"), *option])
        assert done.exit_code == 2 and words in done.stderr


# --- The page ---


def estimate(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": 8, "estimator": "", "note": "", "status": "ok"}


def record(**changes: Any) -> dict[str, Any]:
    chosen = {
        "engine": "<b>E</b>",
        "setting": "depth 2",
        "options": {"depth": 2},
        "speedup": estimate(1.5, 1.2, 1.8),
        "tokens_per_forward": estimate(2.0),
        "kept": True,
        "error": "",
    }
    given = {**chosen, "setting": "depth 5", "speedup": estimate(1.2, 1.1, 1.3), "kept": False}
    found = {"chosen": chosen, "settings": 7, "given": given, "over_given": estimate(1.25, 1.1, 1.4)} | changes
    rounds = [{"folder": "round-1", "prompts": 4, "tried": [chosen, given]}]
    last = {"folder": "tuned", "prompts": 8, "tried": [found["chosen"], given]}
    return {
        "schema_version": 1,
        "zbench_version": "0",
        "folder": "reports/x-tune-1",
        "device": "CPU",
        "choosing": 6,
        "rounds": rounds,
        "last": last,
        "found": [found],
    }


def test_what_was_found_is_said_by_its_interval() -> None:
    chosen = record()["found"][0]["chosen"]
    first, last = tuning.answers(record())
    assert first == (
        "<b>E</b> is fastest with depth 2, of 7 settings: 1.50× as fast as plain decoding (1.20–1.80);"
        " 1.25× as fast as the scenario’s own setting (1.10–1.40)."
    )
    assert last == "Settings were chosen by 6 prompts; the ratios are of 8 other ones, with 95% intervals."
    unsure = record(chosen={**chosen, "speedup": estimate(1.1, 0.9, 1.3)}, over_given=None)
    assert tuning.answers(unsure)[0].endswith("no difference from plain decoding is shown (1.10×, 0.90–1.30).")
    failed = record(chosen={**chosen, "speedup": estimate(None), "error": "out of memory"}, over_given=None)
    assert tuning.answers(failed)[0] == "<b>E</b>: no setting could be measured (out of memory)."


def test_the_page_escapes_labels_is_repeatable_and_marks_the_scenarios_own(tmp_path: Path) -> None:
    (tmp_path / "tune.json").write_text(json.dumps(record()))
    page = render(tmp_path)
    first = page.read_bytes()
    assert b"<b>E" not in first and b"&lt;b&gt;E&lt;/b&gt;" in first and "the scenario’s own".encode() in first
    assert render(tmp_path).read_bytes() == first
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".svg", ".png"}


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 99}', '{"schema_version": 1}', "[]"])
def test_a_damaged_record_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tune.json").write_text(text)
    with pytest.raises(UserError):
        render(tmp_path)
