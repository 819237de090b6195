"""Runs on a tiny random model: order, failure, resume, and a run folder that stays whole."""

from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from zbench import checks, engines, estimate, records, run, scenario
from zbench.errors import UserError
from zbench.hardware import environment, roofs
from zbench.metrics import load_run
from zbench.models import adapter, dflash, eagle3
from zbench.models.config import ModelConfig
from zbench.report import findings, render
from zbench.results import Results

SHAPE = "{family: llama, layers: 2, width: 64, ffn: 96, heads: 4, kv_heads: 2, vocab: 300, max_positions: 256}"
SCENARIO = f"""
name: tiny
model: {{config: {SHAPE}, weights: random}}
dtype: float32
device: cpu
engines: [autoregressive, reference]
prompts: {{set: quickstart, limit: 3}}
context: 24
output_tokens: 6
ignore_eos: true
repeats: 2
warmup: {{prompts: 1, output_tokens: 2}}
"""
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _no_measured_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = {"value": 1e12, "low": 1e12, "high": 1e12, "n": 1, "unit": "B/s"}
    made_up = {"bandwidth": {"read": rate}, "flops": {"float32": {**rate, "unit": "FLOP/s"}}, "ridge": {"float32": 1.0}}
    monkeypatch.setattr(roofs, "load_or_measure", lambda *_, **__: made_up)


def wanted(tmp_path: Path, *overrides: str, text: str = SCENARIO) -> scenario.Scenario:
    path = tmp_path / "tiny.yaml"
    path.write_text(text)
    return scenario.load(path, overrides)


def keys(folder: Path) -> list[tuple[str, int, int]]:
    """Of every line, in the order written."""
    return [run.TrialRecord.from_json(line).key for line in (folder / run.TRIALS).read_text().splitlines()]


@pytest.mark.parametrize("ids", [[], [5, 300]])
@pytest.mark.parametrize("about", ["measured", "warm-up"])
def test_ids_that_the_model_cannot_be_fed_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: list[int], about: str
) -> None:
    def encode(chosen: Any, *_: Any) -> list[list[int]]:
        return [ids if (len(chosen) == 3) == (about == "measured") else [5] for _ in chosen]

    monkeypatch.setattr(run.prompts, "encode", encode)
    with pytest.raises(UserError, match=r"prompt [\w-]+ has (no tokens|token 300, the model has 300)"):
        run.run(wanted(tmp_path), tmp_path / "out", QUIET)


def test_further_turns_of_prompts_are_said_to_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "a", "turns": ["One?", "Two?"]}\n{"id": "b", "turns": ["One more?"]}\n')
    said: list[str] = []
    given = (f"prompts={{file: {tmp_path / 'p.jsonl'}}}", "matrix={batch: [1, 2]}")
    run.prepare(wanted(tmp_path, *given), said.append)
    assert said.count("1 of 2 prompts have further turns, which are not decoded") == 1


def test_a_run_measures_every_cell_on_every_prompt_and_repeat(tmp_path: Path) -> None:
    outcome = run.run(wanted(tmp_path), tmp_path / "out", QUIET)
    assert (outcome.planned, outcome.finished, outcome.failed, outcome.stopped) == (12, 12, 0, None)
    assert load_run(outcome.folder).manifest.planned == {"autoregressive": 6, "reference": 6}
    records = run.read_trials(outcome.folder)[0]
    assert {r.key for r in records} == {
        (cell, group, repeat) for cell in ("autoregressive", "reference") for group in range(3) for repeat in range(2)
    }
    for record in records:
        assert record.status == "ok"
        request = record.requests[0]
        assert len(request.output_ids) == 6
        assert request.output_hash == run.hash_ids(request.output_ids)
        assert 0 < request.ttft_seconds < request.end_seconds <= record.wall_seconds
        assert len(record.steps) == len(record.forwards) == 6
    outputs: dict[tuple[int, int], set[str]] = {}
    for record in records:
        outputs.setdefault((record.group, record.repeat), set()).add(record.requests[0].output_hash)
    assert all(len(hashes) == 1 for hashes in outputs.values())
    manifest = run.read_manifest(outcome.folder)
    assert [cell.id for cell in manifest.cells] == ["autoregressive", "reference"]
    assert manifest.specs is None


def test_engines_alternate_a_b_b_a(tmp_path: Path) -> None:
    outcome = run.run(wanted(tmp_path), tmp_path / "out", QUIET)
    order = [key[0][0] for key in keys(outcome.folder)]
    assert "".join(order[:6]) == "arraar"
    assert "".join(order[6:]) == "raarra"


def test_a_failing_engine_becomes_error_rows_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zbench.engines.prompt_lookup import PromptLookup

    def failing(*_: Any) -> Any:
        raise UserError("this cannot be decoded here")

    monkeypatch.setattr(PromptLookup, "generate", failing)
    chosen = wanted(tmp_path, "engines=[autoregressive, prompt_lookup]", "batch=2", "repeats=1")
    outcome = run.run(chosen, tmp_path / "out", QUIET)
    assert (outcome.planned, outcome.finished, outcome.failed) == (4, 2, 2)
    failed = [r for r in run.read_trials(outcome.folder)[0] if r.status == "error"]
    assert {r.cell for r in failed} == {"prompt_lookup"}
    assert {r.error for r in failed} == {"this cannot be decoded here"}  # a sentence, without the name of a class


def test_a_peer_that_decodes_one_sequence_at_a_time_is_left_out_of_larger_batches(tmp_path: Path) -> None:
    lookup = "engines=[autoregressive, {name: reference, assisted: prompt_lookup}]"
    asked = wanted(tmp_path, lookup, "matrix={batch: [1, 2]}", "repeats=1")
    outcome = run.run(asked, tmp_path / "out", QUIET)
    assert (outcome.failed, outcome.stopped, outcome.finished) == (0, None, outcome.planned)
    why = "decodes one sequence at a time, not 2: set batch to 1"
    assert why in estimate.table(estimate.estimate(asked))
    found = {r.cell for r in run.read_trials(outcome.folder)[0]}
    assert "reference-assisted-prompt_lookup/batch=1" in found
    assert "reference-assisted-prompt_lookup/batch=2" not in found
    assert f"was not measured: {why}." in " ".join(findings.warnings(Results.of(load_run(outcome.folder))))
    with pytest.raises(UserError, match=why):
        run.prepare(wanted(tmp_path, "engines=[{name: reference, assisted: prompt_lookup}]", "batch=2"), lambda _: None)


def test_what_is_not_installed_is_a_row_that_says_so_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    asked = wanted(tmp_path, "engines=[autoregressive, llama_cpp, {name: vllm, label: theirs}]", "repeats=1")
    outcome = run.run(asked, tmp_path / "out", QUIET)
    assert (outcome.planned, outcome.finished, outcome.failed, outcome.stopped) == (3, 3, 0, None)
    why = "vllm is not installed: pip install vllm"
    assert why in estimate.table(estimate.estimate(asked))
    assert f"theirs was not measured: {why}." in findings.warnings(Results.of(load_run(outcome.folder)))
    html = render(outcome.folder).read_text()
    for heading in ("Results</h2>", "Against peers</h3>"):
        table = html.partition(heading)[2].partition("</table>")[0]
        assert f'theirs<small class="wrong">{why}</small>' in table
    assert f"| theirs | no result: {why} |" in (outcome.folder / "peers.md").read_text()
    with pytest.raises(UserError, match="llama_cpp is not installed: pip install llama-cpp-python"):
        run.prepare(wanted(tmp_path, "engines=[llama_cpp]"), lambda _: None)


def test_a_fast_wrong_engine_fails_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zbench.engines.autoregressive import Autoregressive

    decode = Autoregressive.generate

    def flipped(*arguments: Any) -> Any:
        generated = decode(*arguments)
        generated.outputs[0][1] = (generated.outputs[0][1] + 1) % 300
        return generated

    monkeypatch.setattr(Autoregressive, "generate", flipped)
    outcome = run.run(wanted(tmp_path, "repeats=1"), tmp_path / "out", QUIET)
    assert (outcome.finished, outcome.failed) == (3, 3)
    wrong = [r for r in run.read_trials(outcome.folder)[0] if r.status == "error"]
    assert [str(r.error).split(": ", 2)[2].split(" (")[0] for r in wrong] == [
        "output token 1 is not what the target picks"
    ] * 3
    right = [r for r in run.read_trials(outcome.folder)[0] if r.status == "ok"]
    assert {r.requests[0].check.verdict for r in right if r.requests[0].check} == {"exact"}


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_every_output_of_the_autoregressive_engine_is_checked_exact(tmp_path: Path, temperature: float) -> None:
    one = ("engines=[autoregressive]", f"sampling.temperature={temperature}", "repeats=1")
    outcome = run.run(wanted(tmp_path, *one), tmp_path / "out", QUIET)
    checks = [request.check for r in run.read_trials(outcome.folder)[0] for request in r.requests]
    assert [check.verdict for check in checks if check] == ["exact"] * 3
    unchecked = run.run(wanted(tmp_path, *one, "lossless_check=false"), tmp_path / "out", QUIET)
    assert all(request.check is None for r in run.read_trials(unchecked.folder)[0] for request in r.requests)


def test_a_torn_last_line_is_measured_again_and_nothing_else(tmp_path: Path) -> None:
    chosen = wanted(tmp_path)
    outcome = run.run(chosen, tmp_path / "out", QUIET)
    log = outcome.folder / run.TRIALS
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:7]) + lines[7][:40])
    again = run.run(chosen, tmp_path / "out", QUIET, resume=outcome.folder)
    assert again.folder == outcome.folder
    assert again.finished == 12
    assert log.read_bytes().splitlines(keepends=True)[:7] == lines[:7]
    assert len(keys(outcome.folder)) == len(set(keys(outcome.folder))) == 12


def test_resuming_retries_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zbench.engines.autoregressive import Autoregressive

    decode = Autoregressive.generate
    with monkeypatch.context() as broken:
        broken.setattr(Autoregressive, "generate", _out_of_memory)
        first = run.run(wanted(tmp_path), tmp_path / "out", QUIET)
    assert (first.finished, first.failed) == (6, 6)
    assert Autoregressive.generate is decode
    second = run.run(wanted(tmp_path), tmp_path / "out", QUIET, resume=first.folder)
    assert (second.finished, second.failed) == (12, 0)


def _out_of_memory(*_: Any) -> None:
    raise MemoryError("no room for the cache")


def test_a_run_is_not_resumed_with_another_scenario(tmp_path: Path) -> None:
    outcome = run.run(wanted(tmp_path, "repeats=1"), tmp_path / "out", QUIET)
    with pytest.raises(UserError, match="another scenario"):
        run.run(wanted(tmp_path), tmp_path / "out", QUIET, resume=outcome.folder)


def test_a_run_of_the_same_name_with_other_settings_is_named_where_none_can_be_resumed(tmp_path: Path) -> None:
    folder = run.run(wanted(tmp_path), tmp_path / "out", QUIET).folder
    with pytest.raises(UserError, match=f"nothing to resume: {folder} is a run of tiny, but with other settings"):
        run.latest(tmp_path / "out", wanted(tmp_path, "output_tokens=5"))
    with pytest.raises(UserError, match="nothing to resume: no run of scenario other"):
        run.latest(tmp_path / "out", wanted(tmp_path, "name=other", "output_tokens=5"))


def test_a_run_is_not_resumed_on_other_prompts(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    choice = (f"prompts={{file: {file}}}", "repeats=1")
    file.write_text('{"prompt": "one"}')
    outcome = run.run(wanted(tmp_path, *choice), tmp_path / "out", QUIET)
    file.write_text('{"prompt": "another"}')
    with pytest.raises(UserError, match="other prompts"):
        run.run(wanted(tmp_path, *choice), tmp_path / "out", QUIET, resume=outcome.folder)


def test_a_run_is_not_resumed_in_another_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run.run(wanted(tmp_path, "repeats=1"), tmp_path / "out", QUIET)
    snapshot = environment.snapshot

    def elsewhere(*arguments: Any) -> dict[str, Any]:
        taken = snapshot(*arguments)
        taken["torch"]["threads"] = 96
        return taken

    monkeypatch.setattr(environment, "snapshot", elsewhere)
    with pytest.raises(UserError, match=r"another environment .*threads"):
        run.run(wanted(tmp_path, "repeats=1"), tmp_path / "out", QUIET, resume=outcome.folder)


def test_a_run_is_not_resumed_with_other_weights_of_its_model(tmp_path: Path) -> None:
    outcome = run.run(wanted(tmp_path, "repeats=1"), tmp_path / "out", QUIET)
    manifest = json.loads((outcome.folder / run.MANIFEST).read_text())
    (name,) = manifest["models"]
    manifest["models"][name]["hash"] = "of others"
    (outcome.folder / run.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"was measured with other weights of {name}; start a new run"):
        run.run(wanted(tmp_path, "repeats=1"), tmp_path / "out", QUIET, resume=outcome.folder)


@pytest.mark.parametrize("name", ["eagle3", "dflash", "diffusion"])
def test_a_run_is_not_resumed_with_a_drafter_that_was_trained_again(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "drafter"
    option = "adapter" if name == "diffusion" else "drafter"
    one = f"{{name: {name}, label: mine, {option}: {{path: {folder}}}}}"
    chosen = wanted(tmp_path, "repeats=1", f"engines=[autoregressive, {one}]", text=SCENARIO)
    config = checks.model_config(chosen.model_spec)
    assert isinstance(config, ModelConfig)

    def train(seed: int) -> None:
        if name == "eagle3":
            eagle3.save_drafter(folder, eagle3.random_drafter(config, seed))
        elif name == "dflash":
            dflash.save_drafter(folder, dflash.random_drafter(config, seed, layers=1), config)
        else:
            adapter.save_adapter(folder, adapter.random_adapter(config, seed, 4, 8, torch.float32))

    train(0)
    begun = interrupted_run(chosen, tmp_path / "out", 4).folder
    assert {key[0] for key in keys(begun)} == {"autoregressive", "mine"}
    whole = (begun / run.TRIALS).read_bytes()
    train(1)
    with pytest.raises(UserError, match=f"was measured with other weights of {folder}; start a new run"):
        run.run(chosen, tmp_path / "out", QUIET, resume=begun)
    assert (begun / run.TRIALS).read_bytes() == whole
    train(0)
    assert run.run(chosen, tmp_path / "out", QUIET, resume=begun).finished == 6


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_whole_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    chosen = wanted(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(run.os, "fsync", fsync)
        with pytest.raises(UserError, match="No space left on device; what was finished is kept"):
            run.run(chosen, tmp_path / "out", QUIET)
    folder = run.latest(tmp_path / "out", chosen)
    assert 0 < len(keys(folder)) < 12
    assert (folder / run.TRIALS).read_bytes().endswith(b"\n")
    assert run.run(chosen, tmp_path / "out", QUIET, resume=folder).finished == 12


def interrupted_run(chosen: scenario.Scenario, out: Path, finished: int) -> run.Outcome:
    """A run that somebody interrupts in the trial after so many."""
    measure, begun = run.measure, itertools.count()

    def interrupted(*arguments: Any) -> Any:
        if next(begun) == finished:
            raise KeyboardInterrupt
        return measure(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "measure", interrupted)
        return run.run(chosen, out, QUIET)


def test_an_interrupted_run_keeps_what_was_finished(tmp_path: Path) -> None:
    chosen = wanted(tmp_path)
    outcome = interrupted_run(chosen, tmp_path / "out", 4)
    assert outcome.interrupted
    assert outcome.finished == len(keys(outcome.folder)) == 4
    assert run.run(chosen, tmp_path / "out", QUIET, resume=outcome.folder).finished == 12


def test_an_interrupt_while_roofs_are_measured_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        assert len(list((tmp_path / "out").iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(roofs, "load_or_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run(wanted(tmp_path), tmp_path / "out", QUIET)
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def sampled_roof(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A read roof small enough to sample in a test, between any two trials; what happened, in order."""
    roof = {
        "value": 1e10,
        "low": 1e10,
        "high": 1e10,
        "n": 1,
        "unit": "B/s",
        "bytes": 2**22,
        "implementation": "torch sum",
    }
    made_up = {"bandwidth": {"read": roof}, "flops": {"float32": roof}, "ridge": {"float32": 1.0}}
    happened: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            happened.append(f"{name} begins")
            result = function(*arguments, **named)
            happened.append(f"{name} ends")
            return result

        return call

    monkeypatch.setattr(roofs, "load_or_measure", lambda *_, **__: made_up)
    monkeypatch.setattr(run, "SAMPLE_EVERY", 0.0)
    monkeypatch.setattr(run, "SAMPLE_SHARE", 1e9)
    monkeypatch.setattr(roofs, "sample_read", noted("sample", roofs.sample_read))
    monkeypatch.setattr(run, "measure", noted("trial", run.measure))
    monkeypatch.setattr(run, "_ready", noted("warm-up", run._ready))
    return happened


def test_the_read_roof_is_sampled_around_trials_and_never_in_one(tmp_path: Path, sampled_roof: list[str]) -> None:
    outcome = run.run(wanted(tmp_path, "repeats=1"), tmp_path / "out", QUIET)
    sample, trial = ["sample begins", "sample ends"], ["trial begins", "trial ends"]
    assert sampled_roof == [*sample, "warm-up begins", "warm-up ends", *(trial + sample) * 6]
    samples, said = records.read_roof_samples(outcome.folder)
    assert not said
    assert len(samples) == 7
    assert all(s.value and s.value > 0 and not s.unavailable for s in samples)
    read = load_run(outcome.folder).read_roof
    assert read is not None and read["sampled"] and read["n"] == 7


def test_samples_keep_their_distance_and_one_ends_the_run(
    tmp_path: Path, sampled_roof: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SAMPLE_EVERY", 1e9)
    run.run(wanted(tmp_path, "repeats=1"), tmp_path / "out", QUIET)
    assert [i for i, what in enumerate(sampled_roof) if what == "sample begins"] == [0, len(sampled_roof) - 2]


def test_a_resumed_run_keeps_its_samples_and_takes_more(tmp_path: Path, sampled_roof: list[str]) -> None:
    chosen = wanted(tmp_path, "repeats=1")
    folder = interrupted_run(chosen, tmp_path / "out", 2).folder
    kept = (folder / run.ROOFS).read_bytes()
    assert kept.count(b"\n") == 3
    (folder / run.ROOFS).write_bytes(kept + b'{"schema":1,"ta')  # torn
    run.run(chosen, tmp_path / "out", QUIET, resume=folder)
    whole = (folder / run.ROOFS).read_bytes()
    assert whole.startswith(kept)
    assert len(records.read_roof_samples(folder)[0]) == 3 + 1 + 4
    run.run(chosen, tmp_path / "out", QUIET, resume=folder)  # nothing is left to measure
    assert (folder / run.ROOFS).read_bytes() == whole


def test_a_roof_that_cannot_be_sampled_is_said_and_costs_no_trial(tmp_path: Path) -> None:
    outcome = run.run(wanted(tmp_path, "repeats=1"), tmp_path / "out", QUIET)
    assert outcome.finished == 6
    found = load_run(outcome.folder)
    assert {sample.unavailable for sample in found.roof_samples} == {"the roof does not say how it was read"}
    said = findings.warnings(Results.of(found))
    assert any("could not be measured beside the run (the roof does not say" in sentence for sentence in said)


def test_a_time_budget_stops_the_run_and_says_so(tmp_path: Path) -> None:
    outcome = run.run(wanted(tmp_path, "budget.minutes=0.0001"), tmp_path / "out", QUIET)
    assert outcome.finished == 0
    assert "budget" in outcome.summary()


def test_the_newest_run_of_a_scenario_is_found_beside_damaged_and_foreign_ones(tmp_path: Path) -> None:
    chosen, out = wanted(tmp_path, "repeats=1"), tmp_path / "out"
    run.run(chosen, out, QUIET)
    newest = run.run(chosen, out, QUIET).folder
    run.run(wanted(tmp_path), out, QUIET)
    (out / "damaged").mkdir()
    (out / "damaged" / run.MANIFEST).write_text("{")
    assert run.latest(out, chosen) == newest


def test_two_processes_do_not_write_one_run_folder(tmp_path: Path) -> None:
    outcome = run.run(wanted(tmp_path, "repeats=1"), tmp_path / "out", QUIET)
    with run._locked(outcome.folder), pytest.raises(UserError, match="another zbench"):
        run.run(wanted(tmp_path, "repeats=1"), tmp_path / "out", QUIET, resume=outcome.folder)


def test_a_run_folder_that_cannot_be_written_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = wanted(tmp_path, "repeats=1")
    folder = interrupted_run(chosen, tmp_path / "out", 2).folder

    def read_only(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a file within")

    with monkeypatch.context() as patched:
        patched.setattr(run.FileLock, "acquire", read_only)
        with pytest.raises(UserError, match=f"cannot write to {folder}: Permission denied"):
            run.run(chosen, tmp_path / "out", QUIET, resume=folder)
    (folder / run.ROOFS).unlink()
    (folder / run.ROOFS).mkdir()
    with pytest.raises(UserError, match=f"cannot write {folder / run.ROOFS}: Is a directory"):
        run.run(chosen, tmp_path / "out", QUIET, resume=folder)


def test_a_context_longer_than_the_models_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes 256"):
        run.run(wanted(tmp_path, "context=255"), tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder"):
        run.run(wanted(tmp_path), tmp_path / "file" / "out", QUIET)


def test_a_requests_seed_depends_on_prompt_and_repeat_only() -> None:
    assert run._seed(0, "a", 0) == run._seed(0, "a", 0)
    assert len({run._seed(seed, prompt, repeat) for seed in (0, 1) for prompt in "ab" for repeat in (0, 1)}) == 8


def test_a_record_survives_its_json(tmp_path: Path) -> None:
    outcome = run.run(wanted(tmp_path, "repeats=1"), tmp_path / "out", QUIET)
    for line in (outcome.folder / run.TRIALS).read_text().splitlines():
        assert json.loads(run.TrialRecord.from_json(line).to_json()) == json.loads(line)


def test_points_on_one_model_share_it_and_another_dtype_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zbench import engines
    from zbench.models import transformer

    alive: list[str] = []

    class Counted(transformer.Transformer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            alive.append(str(self.dtype))

    released: list[int] = []
    release = engines.Shared.release
    monkeypatch.setattr(transformer, "Transformer", Counted)
    monkeypatch.setattr(engines.Shared, "release", lambda self: (released.append(len(alive)), release(self)))
    matrix = ("matrix={dtype: [float32, bfloat16], batch: [1, 3]}", "engines=[autoregressive]", "repeats=1")
    assert run.run(wanted(tmp_path, *matrix), tmp_path / "out", QUIET).failed == 0
    assert alive == ["torch.float32", "torch.bfloat16"]
    assert released == [1, 2]  # the last one at the end: a server may hang on it


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        ("{name: diffusion, mask_id: 300}", "mask id 300 is not in the vocabulary of 300"),
        ("{name: diffusion}", "this model has no mask token"),
        ("{name: diffusion, adapter: {path: /nowhere/at/all}}", "adapter folder /nowhere/at/all does not exist"),
        ("{name: dflash, drafter: {path: /nowhere/at/all}}", "drafter folder /nowhere/at/all does not exist"),
        ("{name: eagle3, drafter: {random: true}, top_k: 2, beam: 3}", "a beam of 3 does not fit the 2 tokens"),
        (
            "{name: eagle3, drafter: {random: true}, depth: 2, tokens: 9}",
            "depth 2 with top_k 1 drafts 2 to 2 tokens, not 9",
        ),
        ("{name: dflash, drafter: {random: true}, draft_vocab: 999999}", "draft_vocab 999999 is not within"),
    ],
)
def test_an_engine_that_does_not_fit_its_model_is_refused_before_anything_runs(
    tmp_path: Path, engine: str, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        run.run(wanted(tmp_path, text=SCENARIO.replace("reference", engine)), tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()


def test_sensors_are_sampled_around_every_trial_unless_switched_off(tmp_path: Path) -> None:
    from zbench import telemetry

    outcome = run.run(wanted(tmp_path, "telemetry.period_ms=20"), tmp_path / "out", QUIET)
    found = telemetry.read(outcome.folder)
    assert found is not None and found.last.period == 0.02
    assert set(found.last.windows) == {record.key for record in run.read_trials(outcome.folder)[0]}
    for record in run.read_trials(outcome.folder)[0]:
        start, end = found.last.windows[record.key]
        assert end - start >= record.wall_seconds
    off = run.run(wanted(tmp_path, "telemetry=off"), tmp_path / "off", QUIET)
    assert telemetry.read(off.folder) is None
    assert run.read_manifest(off.folder).scenario_hash == run.read_manifest(outcome.folder).scenario_hash
