"""Searching settings: who races whom, on which prompts, and what is said of the winners."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from zbench import checks, cli, engines, metrics, run, scenario, tune
from zbench.errors import UserError
from zbench.hardware import roofs
from zbench.models import eagle3
from zbench.prompts import Prompt
from zbench.report import render, tuning
from zbench.stats import Estimate

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


def searched(tmp_path: Path, engines: str) -> list[tuple[str, int]]:
    found = tune.groups(wanted(tmp_path, f"engines={engines}").engines)
    return [(group.title, len(group.given)) for group in found]


# --- What is compared ---


def test_engines_that_differ_in_settings_alone_are_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tune.SPACES, "diffusion", (({"block_size": 2},),))
    lone = "[autoregressive, {name: eagle3, drafter: {random: true}}, {name: reference}]"
    assert searched(tmp_path, lone) == [("eagle3", 1)]
    swept = "[{name: eagle3, drafter: {random: true}, label: E, sweep: {depth: [1, 2]}}]"
    assert searched(tmp_path, swept) == [("E", 2)]
    others = "[{name: eagle3, drafter: {random: true, seed: 1}}, {name: eagle3, label: b, drafter: {random: true}}]"
    assert searched(tmp_path, others) == [("eagle3", 1), ("b", 1)]
    lossy = "[{name: diffusion, label: D, adapter: {random: true}}, {name: diffusion, mask_id: 1, sampler: denoise}]"
    assert searched(tmp_path, lossy) == [("D", 1)]


@pytest.mark.parametrize(
    ("engines", "titles"),
    [
        ("[{name: prompt_lookup, label: autoregressive}]", ["autoregressive 2"]),
        (
            "[{name: prompt_lookup, label: E}, {name: prompt_lookup, label: E as given, execution: eager}]",
            ["E 2", "E as given"],
        ),
        (
            "[autoregressive, {name: prompt_lookup, label: 'E, 1'}, {name: prompt_lookup, match: 2, label: 'E, 2'},"
            " {name: reference, label: E}]",
            ["E 2"],
        ),
        ("[prompt_lookup, {name: prompt_lookup, match: 2, execution: eager}]", ["prompt_lookup", "prompt_lookup 2"]),
    ],
)
def test_titles_are_unlike_those_of_all_other_engines(tmp_path: Path, engines: str, titles: list[str]) -> None:
    assert [title for title, _ in searched(tmp_path, engines)] == titles


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
        assert len(prompts) // 2 < 2 * batch
        return
    assert not {p.id for p in one} & {p.id for p in other}
    assert all(len(half) % batch == 0 and len(half) >= 2 * batch for half in (one, other))
    for half in (one, other):
        met = {p.category for p in half}
        assert {p.category for p in half[: len(met)]} == met or batch > 1  # none twice before all were met
    if batch == 1:
        assert sorted(p.id for p in (*one, *other)) == sorted(p.id for p in prompts)
        assert abs(len(one) - len(other)) <= 1
        counts = [[sum(p.category == c for p in half) for c in "abc"] for half in (one, other)]
        assert all(abs(a - b) <= 1 for a, b in zip(*counts, strict=True))


def test_prompts_that_say_the_same_are_on_one_side_only() -> None:
    texts = ["a", "b", "a", "c", "d", "b", "e", "f"]
    one, other = tune.halves([Prompt(str(i), "x", (text,)) for i, text in enumerate(texts)], 1)
    assert sorted(p.text for p in (*one, *other)) == list("abcdef")
    assert {p.id for p in (*one, *other)} == {"0", "1", "3", "4", "6", "7"}


# --- The whole of it ---


def test_rounds_get_fewer_settings_and_the_last_run_other_prompts(tmp_path: Path) -> None:
    found = tune.tune(wanted(tmp_path), tmp_path / "out", QUIET, 8)
    (record,) = json.loads((found.folder / "tune.json").read_text())["points"]
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
    assert all(len({ident.split("-")[0] for ident in ids}) >= 3 for ids in asked)  # of several categories
    assert [each["prompts"] for each in (*record["rounds"], record["last"])] == [4, 4, 4]


def test_the_tuned_scenario_is_the_scenario_with_what_was_found(tmp_path: Path) -> None:
    asked = wanted(tmp_path)
    found = tune.tune(asked, tmp_path / "out", QUIET, 8)
    tuned = scenario.load(found.folder / "tuned.yaml")
    (point,) = found.points
    chosen = {each.chosen.engine: each.chosen.options for each in point.found}
    assert [engine.title for engine in tuned.engines] == ["autoregressive", "EAGLE-3", "prompt_lookup", "transformers"]
    for engine in tuned.engines:
        assert chosen.get(engine.title, {}).items() <= engine.options.items()
    assert tuned.prompts == asked.prompts and tuned.repeats == 1 and tuned.output_tokens == 12
    last = metrics.load_run(found.folder / point.last.folder)
    by_label = {cell.record.label: cell for cell in last.cells}
    for each in point.found:
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
    (point,) = found.points
    assert [len(each.tried) for each in point.rounds] == [6, 2]
    (only,) = point.found
    assert only.settings == 6 and only.given is None and only.over_given is None
    assert [engine.title for engine in scenario.load(found.folder / "tuned.yaml").engines] == [
        "autoregressive",
        "prompt_lookup",
    ]


def test_every_point_of_a_matrix_is_tuned_for_itself(tmp_path: Path) -> None:
    asked = wanted(tmp_path, "engines=[autoregressive, prompt_lookup]", "matrix={batch: [1, 2]}")
    found = tune.tune(asked, tmp_path / "out", QUIET, 8)
    assert [point.at for point in found.points] == [{"batch": 1}, {"batch": 2}]
    for point, batch in zip(found.points, (1, 2), strict=True):
        run = metrics.load_run(found.folder / point.last.folder)
        assert {cell.record.batch for cell in run.cells} == {batch}
        tuned = scenario.load(found.folder / point.tuned)
        assert tuned.batch == batch and not tuned.matrix
    page = render(found.folder).read_text()
    assert "What was tried at batch 2" in page and "What the fastest settings gain" in page
    first, *rest = tuning.headline(found.folder)
    assert first.startswith("prompt_lookup at its fastest, over plain decoding: ") and first.endswith("× at batch 2.")
    assert [line.partition(":")[0] for line in rest[:2]] == ["batch 1", "batch 2"]


def test_a_setting_that_fails_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = engines.create

    def create(name: str, options: dict[str, Any], shared: engines.Shared) -> Any:
        if options.get("depth") == 2:
            raise RuntimeError("out of memory")
        return build(name, options, shared)

    monkeypatch.setattr(engines, "create", create)
    found = tune.tune(wanted(tmp_path), tmp_path / "out", QUIET, 8)
    (point,) = found.points
    failed = [t for each in point.rounds for t in each.tried if t.error]
    assert failed and all(t.options["depth"] == 2 and not t.kept for t in failed)
    assert "out of memory" in failed[0].error
    assert point.found[0].chosen.options["depth"] in (1, 5)
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


def test_what_failed_stays_in_the_tuned_scenario_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = engines.create

    def create(name: str, options: dict[str, Any], shared: engines.Shared) -> Any:
        if options.get("match") in (7, 8):
            raise RuntimeError("broken")
        return build(name, options, shared)

    monkeypatch.setattr(engines, "create", create)
    given = (
        "engines=[autoregressive, {name: prompt_lookup, match: 7}, {name: prompt_lookup, match: 8, label: '1e5'},"
        " {name: eagle3, drafter: {random: true, vocab: 64}, label: E}]"
    )
    found = tune.tune(wanted(tmp_path, given, "baseline='prompt_lookup (match: 7)'"), tmp_path / "out", QUIET, 8)
    tuned = scenario.load(found.folder / "tuned.yaml")
    assert [engine.title for engine in tuned.engines] == ["autoregressive", "prompt_lookup (match: 7)", "1e5", "E"]
    assert tuned.baseline == "prompt_lookup (match: 7)"


def test_one_setting_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tune.SPACES, "dflash", (({"block": 4}, {"block": 2}),))
    monkeypatch.setitem(
        tune.SPACES, "eagle3", (({"depth": 2, "top_k": 2, "tokens": 6}, {"depth": 1, "top_k": 1, "tokens": None}),)
    )
    given = (
        "engines=[{name: dflash, drafter: {random: true, layers: 1}, label: D},"
        " {name: eagle3, label: E, drafter: {random: true, vocab: 64}, depth: 2, top_k: 2}]"
    )
    found = tune.tune(wanted(tmp_path, given), tmp_path / "out", QUIET, 8)
    tried = {(t.engine, t.setting) for t in found.points[0].rounds[0].tried}
    assert ("E", "depth 2, top_k 2, tokens 6") in tried and ("E", "depth 2, top_k 2") not in tried
    assert {setting for engine, setting in tried if engine == "D"} == {"block 2", "block 4", "block 16"}


def test_a_tuning_goes_on_by_any_path_and_not_with_other_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"prompt": f"Tell me about thing number {index}.", "id": str(index)}) for index in range(8)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(lines))
    asked = wanted(tmp_path, f"prompts={{file: {prompts}}}", "engines=[autoregressive, prompt_lookup]")
    found = tune.tune(asked, tmp_path / "out", QUIET, 8)
    runs = sorted(found.folder.glob(f"*/{run.TRIALS}"))
    monkeypatch.chdir(found.folder.parent)
    assert tune.tune(asked, Path(), QUIET, 8, Path(found.folder.name)) == found
    assert tune.tune(asked, Path(), QUIET, 8, tune.NEWEST) == found
    assert sorted(found.folder.glob(f"*/{run.TRIALS}")) == runs
    prompts.write_text("\n".join([json.dumps({"prompt": "Something new.", "id": "new"}), *lines]))
    with pytest.raises(UserError, match="other options or prompts"):
        tune.tune(asked, Path(), QUIET, 8, found.folder)
    with pytest.raises(UserError, match="nothing to resume"):
        tune.tune(asked, Path(), QUIET, 8, tune.NEWEST)
    prompts.write_text("\n".join(lines))
    found.folder.rename(found.folder.with_name("moved"))
    with pytest.raises(UserError, match="nothing to resume"):  # what is there is of the old place
        tune.tune(asked, Path(), QUIET, 8, Path("moved"))


def test_a_tuning_does_not_go_on_with_a_drafter_that_was_trained_again(tmp_path: Path) -> None:
    folder = tmp_path / "drafter"
    asked = wanted(tmp_path, f"engines=[{{name: eagle3, label: E, drafter: {{path: {folder}}}}}]")
    config = checks.model_config(asked.model_spec)
    assert config is not None
    eagle3.save_drafter(folder, eagle3.random_drafter(config, 0, draft_vocab=64))
    found = tune.tune(asked, tmp_path / "out", QUIET, 8)
    eagle3.save_drafter(folder, eagle3.random_drafter(config, 1, draft_vocab=64))
    with pytest.raises(UserError, match=f"was measured with other weights of {folder}; start a new run"):
        tune.tune(asked, tmp_path / "out", QUIET, 8, found.folder)


@pytest.mark.parametrize(("high", "kept"), [(0.97, "given"), (1.2, "found"), (None, "found")])
def test_a_setting_that_the_last_run_shows_to_be_slower_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, high: float | None, kept: str
) -> None:
    group = next(group for group in tune.groups(wanted(tmp_path).engines) if group.title == "EAGLE-3")
    [own] = group.given
    other = type(own).model_validate({**own.model_dump(exclude_unset=True), "depth": 6})

    @dataclass(frozen=True)
    class Measured:
        name: str
        baseline: Any = None
        failed: tuple[Any, ...] = ()
        record: Any = None

    slower = Estimate(0.9, None if high is None else 0.8, high, n=8)
    plain = Estimate(1.5, 1.4, 1.6, n=8)
    monkeypatch.setattr(tune.metrics, "evaluate", lambda _, cell: {"": slower if cell.baseline else plain})
    monkeypatch.setattr(tune.metrics, "caveats", lambda _: ())
    cells: Any = {group.title: Measured("found"), tune._as_given(group.title): Measured("given")}
    found = tune._found(group, other, 9, cells)
    assert found.chosen.kept and found.chosen.options["depth"] == (5 if kept == "given" else 6)
    assert (found.over_given is None) == (kept == "given")


@pytest.mark.parametrize("name", ["_ranked", "_found", "_written", "_tuned"])
def test_wherever_it_is_interrupted_it_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, name, interrupted)
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    done = CliRunner().invoke(cli.main, ["tune", str(path), "--prompts", "8", "--out", str(tmp_path / "out")])
    assert done.exit_code == 130
    assert f"zbench: interrupted; continue with --resume {tmp_path / 'out' / 'tiny-tune-'}" in done.stderr


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    arguments = ["tune", str(path), "--prompts", "8", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(tune, "atomic_write", full)
        done = CliRunner().invoke(cli.main, arguments)
        assert done.exit_code == 2 and "No space left on device" in done.stderr
        assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(tune, "_tuned", full)
    done = CliRunner().invoke(cli.main, arguments)
    assert done.exit_code == 2 and "No space left on device; continue with --resume" in done.stderr.splitlines()[-1]


def test_synthetic_acceptance_is_said_everywhere(tmp_path: Path) -> None:
    given = (
        "engines=[autoregressive,"
        " {name: eagle3, label: E, drafter: {random: true, vocab: 64}, depth: 5, synthetic: {rate: 0.5}}]"
    )
    found = tune.tune(wanted(tmp_path, given), tmp_path / "out", QUIET, 8)
    page = render(found.folder).read_text()
    assert tuning.headline(found.folder)[0].startswith("E (synthetic acceptance, random drafter) is fastest with ")
    assert page.count("synthetic acceptance") > 3 and "With synthetic acceptance and random drafter" in page


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
    folder = next(out.iterdir())
    found = tune.tune(asked, out, QUIET, 8, tune.NEWEST)
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
        (["matrix={batch: [1, 8]}"], "16 prompts in batches of 8 are too few"),
        (["batch=8"], "16 prompts in batches of 8 are too few"),
        (["parallel.data=2"], "in one process"),
        (["context=null", "prompts={file: long.jsonl}"], "prompt and output need"),
        (["hardware=MI300X"], "tuning measures"),
    ],
)
def test_what_cannot_be_tuned_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: str
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    texts = ["one two", "three", "four", "five", "six " * 300]
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    monkeypatch.chdir(tmp_path)
    given = [part for override in overrides for part in ("-o", override)]
    done = CliRunner().invoke(cli.main, ["tune", str(path), *given, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and words in done.stderr.splitlines()[-1]
    assert sum(line.startswith("zbench: ") for line in done.stderr.splitlines()) == 1
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
        "caveats": [],
        "kept": True,
        "error": "",
    }
    given = {**chosen, "setting": "depth 5", "speedup": estimate(1.2, 1.1, 1.3), "kept": False}
    found = {"chosen": chosen, "settings": 7, "given": given, "over_given": estimate(1.25, 1.1, 1.4)} | changes
    rounds = [{"folder": "round-1", "prompts": 4, "tried": [chosen, given]}]
    last = {"folder": "tuned", "prompts": 8, "tried": [found["chosen"], given]}
    point = {"at": {}, "tuned": "tuned.yaml", "choosing": 6, "rounds": rounds, "last": last, "found": [found]}
    return {"schema_version": 1, "zbench_version": "0", "folder": "x-tune-1", "device": "CPU", "points": [point]}


def test_what_was_found_is_said_by_its_interval() -> None:
    chosen = record()["points"][0]["found"][0]["chosen"]
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


def test_a_chosen_setting_that_is_the_scenarios_own_is_said_to_be_both(tmp_path: Path) -> None:
    run = record()
    run["points"][0]["found"][0]["given"] = run["points"][0]["found"][0]["chosen"]
    (tmp_path / "tune.json").write_text(json.dumps(run))
    assert "chosen, the scenario’s own" in render(tmp_path).read_text()


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 99}', '{"schema_version": 1}', "[]"])
def test_what_is_no_record_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tune.json").write_text(text)
    for read in (render, tuning.headline):
        with pytest.raises(UserError):
            read(tmp_path)


@pytest.mark.parametrize(
    "key", ["device", "zbench_version", "points/0/found", "points/0/last/tried", "points/0/rounds"]
)
@pytest.mark.parametrize("value", [None, "x", 3])
def test_a_damaged_record_is_one_line(tmp_path: Path, key: str, value: Any) -> None:
    whole = record()
    *path, last = key.split("/")
    inner: Any = whole
    for part in path:
        inner = inner[int(part)] if part.isdigit() else inner[part]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    (tmp_path / "tune.json").write_text(json.dumps(whole))
    try:
        render(tmp_path)
    except UserError:
        return
    assert key in ("device", "zbench_version") and value is not None  # any words do


def test_no_intervals_are_claimed_where_there_are_none() -> None:
    few = record()
    few["points"][0]["found"][0]["chosen"]["speedup"] = estimate(1.5)
    assert tuning.answers(few)[-1].endswith("other ones, too few for intervals, which 5 batches or more have.")
    some = record()
    some["points"].append(json.loads(json.dumps(few["points"][0])))
    assert tuning.answers(some)[-1].endswith("other ones, with 95% intervals, which only 5 batches or more have.")
