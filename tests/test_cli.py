"""The command line as a user meets it: one clear line and exit code 2 on bad input, and nothing lost on Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from tests.test_run import SCENARIO
from tests.tiny import oracle
from zbench.cli import main
from zbench.hardware import roofs
from zbench.models import loading
from zbench.records import TRIALS, read_trials


def zbench(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Result, *fragments: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    *progress, line = result.output.strip().splitlines()
    assert line.startswith("zbench: ")
    assert not [other for other in progress if other.startswith("zbench: ")]
    for fragment in fragments:
        assert fragment in line


def options(command: click.Command) -> Iterator[click.Parameter]:
    yield from command.params
    for within in command.commands.values() if isinstance(command, click.Group) else ():
        yield from options(within)


@pytest.mark.parametrize("odd", ["nan", "inf", "-inf"])
def test_no_option_takes_a_number_that_is_not_finite(odd: str) -> None:
    numbers = [one for one in options(main) if one.type.name in ("float", "float range")]
    assert len(numbers) >= 8
    for one in numbers:
        with pytest.raises(click.BadParameter):
            one.type.convert(odd, one, None)


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SCENARIO)
    return path


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("enginess=1", ["unknown key 'enginess'", "did you mean 'engines'?"]),
        ("engines=[autoregresive]", ["unknown engine 'autoregresive'", "autoregressive"]),
        ("engines=[eagle9]", ["unknown engine 'eagle9'"]),
        ("model=smollm3", ["unknown model 'smollm3'"]),
        ("model={path: /nowhere}", ["/nowhere"]),
        ("device=cuda:7", ["cuda:7"]),
        ("context=5000", ["takes 256"]),
        ("prompts={file: nothing.jsonl}", ["nothing.jsonl"]),
        ("prompts={set: quickstrat}", ["quickstrat", "quickstart"]),
        ("model={path: ~nosuchuser/m}", ["~nosuchuser/m: no such home folder is known"]),
        ("prompts={file: ~nosuchuser/p.jsonl}", ["~nosuchuser/p.jsonl: no such home folder is known"]),
        ("engines=[{name: dflash, drafter: {path: ~nosuchuser/d}}]", ["~nosuchuser/d: no such home folder is known"]),
        (
            "engines=[{name: endpoint, server: {command: [~nosuchuser/serve, '{port}']}}]",
            ["~nosuchuser/serve: no such home folder is known"],
        ),
        ('prompts={file: "a\\0b"}', ["'a\\x00b': a path has no NUL in it"]),
        ("threads=99999999999", ["threads: expected less than or equal to 4096, found 99999999999"]),
        ("batch=0", ["batch"]),
        ("output_tokens=many", ["output_tokens", "whole number"]),
        ("hardware=MI3", ["hardware: hardware 'MI3' could be", "MI300X, MI325X, MI350X, MI355X"]),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(
    yaml: Path, tmp_path: Path, override: str, fragments: list[str]
) -> None:
    refused(zbench("run", yaml, "--out", tmp_path / "out", "-o", override), *fragments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ["empty"]),
        ("name: [", ["malformed YAML", ":1"]),
        ("- a\n- b\n", ["mapping"]),
    ],
)
def test_malformed_yaml_is_one_line_with_its_place(tmp_path: Path, text: str, fragments: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    refused(zbench("run", path, "--out", tmp_path / "out"), "bad.yaml", *fragments)


def test_a_missing_scenario_is_one_line(tmp_path: Path) -> None:
    refused(zbench("run", tmp_path / "none.yaml"), "none.yaml", "No such file")


def test_an_unknown_key_is_named_with_its_line(yaml: Path) -> None:
    yaml.write_text(SCENARIO.replace("repeats: 2", "repaets: 2"))
    line = 1 + SCENARIO.split("\n").index("repeats: 2")
    refused(zbench("validate", yaml), f"tiny.yaml:{line}: unknown key 'repaets'", "did you mean 'repeats'?")


def test_a_prompts_file_with_a_bad_line_is_named_with_that_line(yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "fine"}\n{"prompt": \n')
    refused(zbench("run", yaml, "-o", f"prompts={{file: {tmp_path}/prompts.jsonl}}"), "prompts.jsonl:2")


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), ["no weights"]),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            ["pickle", "safetensors"],
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-1000]
            ),
            ["model.safetensors"],
        ),
        (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
        (lambda folder: save_file({}, folder / "model.safetensors"), ["lacks", "model.embed_tokens.weight"]),
    ],
    ids=["no weights", "pickle only", "truncated", "no config", "no tensors"],
)
def test_a_damaged_model_folder_is_one_line(yaml: Path, tmp_path: Path, damage, fragments: list[str]) -> None:
    folder = tmp_path / "model"
    oracle("smollm").save_pretrained(folder)
    damage(folder)
    refused(zbench("run", yaml, "--out", tmp_path / "out", "-o", f"model={{path: {folder}}}"), *fragments)


def test_an_output_folder_that_is_not_writable_is_one_line(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("a model was loaded first"))
    refused(zbench("run", yaml, "--out", tmp_path / "file"), "cannot write to", "--out")


def test_a_run_that_measured_nothing_is_no_success(yaml: Path, tmp_path: Path) -> None:
    result = zbench("run", yaml, "--out", tmp_path / "out", "-o", "budget.minutes=0.00001")
    assert result.exit_code == 5
    assert "0 of " in result.stderr and "Traceback" not in result.stderr


def test_reporting_on_something_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    refused(zbench("report", tmp_path), "run.json")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_ranks_each_says_what_it_may_not_look_at_and_one_what_all_meet(
    rank: str, tmp_path: Path, denied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    refused(zbench("report", denied / "run"), "Permission denied")
    missing = zbench("report", tmp_path / "missing")
    assert missing.exit_code == 2 and bool(missing.output) == (rank == "0")


def test_a_path_that_may_not_be_looked_at_is_one_line(yaml: Path, denied: Path) -> None:
    refused(zbench("report", denied / "run"), f"zbench: {denied / 'run' / 'projection.json'}: Permission denied")
    chosen = f"model={{path: {denied / 'model'}}}"
    refused(
        zbench("validate", yaml, "-o", chosen), f"model folder {denied / 'model'} cannot be read: Permission denied"
    )


@pytest.mark.parametrize("command", ["roofs", "train data --model m --out o", "train full --model m --data d --out o"])
def test_more_threads_than_there_can_be_are_refused(command: str) -> None:
    result = zbench(*command.split(), "--threads", 99999999999)
    assert result.exit_code == 2 and "99999999999 is not in the range 1<=x<=4096" in result.output


def test_what_only_ab_uses_is_refused_without_it(tmp_path: Path) -> None:
    for option in (("-o", "a=1"), ("--max-pairs", 24), ("--scenario", "s"), ("--budget-minutes", 1), ("--out", "o")):
        refused(zbench("gate", tmp_path, "--baseline", tmp_path, *option), f"{option[0]} goes with --ab")
    refused(zbench("gate", tmp_path, "--baseline", tmp_path), "run.json")


def test_settings_of_masks_are_refused_without_masks(tmp_path: Path) -> None:
    command = ("train", "full", "--model", "m", "--data", tmp_path, "--out", tmp_path, "--steps", 1, "--no-masks")
    refused(zbench(*command, "--alpha", 1, "--block", 8, "--mask-id", 0), "--alpha, --block, --mask-id is about masks")
    refused(zbench(*command, "--prompts"), "unknown model 'm'")


def test_a_kernel_that_there_is_not_is_invalid(tmp_path: Path) -> None:
    (tmp_path / "k.yaml").write_text("name: k\nkernels: [nope]\n")
    refused(zbench("validate", tmp_path / "k.yaml"), "k.yaml: no kernel is called nope")


def test_nothing_to_resume_is_one_line(yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(zbench("run", yaml, "--out", tmp_path / "out", "--resume"), "nothing to resume")
    refused(zbench("run", yaml, "--dry-run", "--resume"), "--dry-run measures nothing")


def test_a_dry_run_lists_cells_and_memory_and_measures_nothing(yaml: Path, tmp_path: Path) -> None:
    result = zbench("run", yaml, "--dry-run", "--json", "--out", tmp_path / "out", "-o", "matrix.batch=[1, 2]")
    assert result.exit_code == 0
    cells = json.loads(result.output)
    assert [cell["cell"] for cell in cells] == [
        f"{engine}/batch={batch}" for batch in (1, 2) for engine in ("autoregressive", "reference")
    ]
    assert all(cell["memory_bytes"] > 0 for cell in cells)
    assert not (tmp_path / "out").exists()


def test_the_published_schema_accepts_the_packaged_scenarios() -> None:
    import jsonschema
    import yaml as reader

    schema = json.loads(zbench("schema").output)
    folder = Path(__file__).parent.parent / "scenarios"
    for path in sorted(folder.glob("*.yaml")):
        jsonschema.validate(reader.safe_load(path.read_text()), schema)


def test_attention_prints_a_table_or_json_and_draws_a_figure(tmp_path: Path) -> None:
    shown = zbench("attention", "--figure", str(tmp_path / "a.svg")).output
    assert [line.split()[0] for line in shown.splitlines()[2:]] == ["MHA", "GQA", "MLA", "CCGQA"]
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    rows = json.loads(zbench("attention", "--json", "--context", "1", "--dtype", "float32").output)
    assert [row["kv_bytes_per_token"] for row in rows] == [16384, 4096, 2304, 2048]
    for wrong, message in (
        (("--width", "2000"), "width 2000 is not a multiple of 128"),
        (("--group", "0"), "group must be a positive whole number, not 0"),
        (("--group", "16"), "8 heads of CCGQA cannot be grouped by 16"),
        (("--figure", str(tmp_path / "a.pdf")), "a figure is a .png or .svg file"),
        (("--figure", str(tmp_path / "no" / "a.png")), "cannot write"),
    ):
        refused = zbench("attention", *wrong)
        assert refused.exit_code == 2
        assert message in refused.output + refused.stderr


def test_every_command_shows_an_example_in_its_help() -> None:
    for command in ("run", "project", "report", "validate", "schema", "roofs", "attention", "init"):
        assert "zbench " + command in zbench(command, "--help").output.split("Usage", 1)[1].split("\n", 1)[1]


# --- Projection ---

ELSEWHERE = SCENARIO.replace("device: cpu", "device: auto").replace(
    "dtype: float32", "dtype: bfloat16\nhardware: mi300x"
)


def test_hardware_that_nobody_knows_is_named_with_its_line(yaml: Path) -> None:
    yaml.write_text(f"{SCENARIO}hardware: Mi-355\n")
    line = 1 + SCENARIO.count("\n")
    refused(zbench("validate", yaml), f"tiny.yaml:{line}: hardware: unknown hardware 'Mi-355'", "did you mean 'MI355X'")


def test_a_scenario_about_another_device_is_projected_instead_of_measured(yaml: Path, tmp_path: Path) -> None:
    yaml.write_text(ELSEWHERE)
    result = zbench("run", yaml, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    said = [line for line in result.stderr.splitlines() if line]
    assert len(said) == 1 and said[0].startswith("tiny is about MI300X, this machine has ")
    [folder] = (tmp_path / "out").iterdir()
    assert {path.name for path in folder.iterdir()} == {"projection.json", "projection.html", "figures"}
    assert json.loads((folder / "projection.json").read_text())["hardware"]["device"] == "MI300X"
    assert result.stdout.splitlines()[-1] == f"projection: {folder / 'projection.html'}"
    assert "Predicted on MI300X" in result.stdout
    refused(zbench("run", yaml, "--resume"), "nothing to resume")


def test_a_scenario_about_another_device_can_be_checked_and_estimated(yaml: Path, tmp_path: Path) -> None:
    yaml.write_text(ELSEWHERE)
    assert zbench("validate", yaml, "-o", "device=cuda:7").exit_code == 0
    result = zbench("run", yaml, "--dry-run", "--json", "-o", "device=cuda:7")
    assert result.exit_code == 0, result.output
    cells = json.loads(result.stdout)
    assert all(cell["memory_bytes"] > 0 and cell["seconds"] > 0 and cell["fits"] for cell in cells)
    assert all(cell["device"].startswith("MI300X") for cell in cells)


@pytest.mark.parametrize("name", ["block_scaling_1b", "block_scaling_8b", "block_scaling_zaya1_8b"])
def test_large_shapes_are_estimated_without_a_gpu_and_the_device_is_named(name: str) -> None:
    path = Path(__file__).parent.parent / "scenarios" / f"{name}.yaml"
    cells = json.loads(zbench("run", path, "--dry-run", "--json", "-o", "hardware=H100 SXM").stdout)
    by_name = {cell["cell"]: cell for cell in cells}
    assert all(cell["memory_bytes"] > 1e9 and cell["seconds"] > 0 for cell in cells)
    assert {cell["device"].split()[0] for cell in cells} == {"H100"}
    alone, rows = by_name["autoregressive/batch=1,context=1024"], by_name["forward/batch=1,context=1024"]
    assert rows["seconds"] > 15 * 0.9 * alone["seconds"]
    small = zbench("run", path, "--dry-run", "-o", "hardware=H100 SXM", "-o", "matrix.batch=[64]").stdout
    assert ("do not fit" in small) == (name != "block_scaling_1b")


def test_a_device_of_unknown_roofs_is_given_nobody_elses(yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofs, "cached", lambda device: None)
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    shown = zbench("run", yaml, "--dry-run", "-o", "dtype=bfloat16", "-o", "threads=1").stdout
    [device] = [line for line in shown.splitlines() if line.startswith("device: ")]
    assert device.endswith(", this machine’s")
    assert "zbench roofs --device cpu --dtype bfloat16 --threads 1 measures them" in shown
    [cell, _] = json.loads(zbench("run", yaml, "--dry-run", "--json", "-o", "dtype=bfloat16").stdout)
    assert cell["seconds"] is None and cell["fits"] and "were not measured" in cell["unknown"]
    gone = zbench("run", yaml, "--dry-run", "-o", "device=cuda:7").stdout
    assert "device: cuda:7, which this machine has not" in gone and "unknown: device" in gone
    rate = {"value": 1e9}
    kept = {"bandwidth": {"read": rate}, "flops": {"float32": rate}, "measured": "today"}
    monkeypatch.setattr(roofs, "cached", lambda device: kept)
    said = zbench("run", yaml, "--dry-run", "-o", "dtype=float16").stdout
    assert "unknown: no float16 rate of" in said and "; zbench roofs --dtype float16 measures it" in said


def test_all_scenario_files_are_checked_before_one_fails(yaml: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("name: [\n")
    kernels = tmp_path / "kernels.yaml"
    kernels.write_text("name: k\nkernels: [commit, verify]\n")
    result = zbench("validate", other, kernels, yaml)
    refused(result, "other.yaml")
    assert f"{kernels}: valid, kernels: commit, verify" in result.stdout
    assert f"{yaml}: valid, 2 cells" in result.stdout


def test_project_takes_any_scenario_to_any_known_device(yaml: Path, tmp_path: Path) -> None:
    told = ("--device", "b200", "--memory-fraction", "0.5", "--json", "--no-report", "--out", tmp_path / "out")
    result = zbench("project", yaml, "-o", "dtype=bfloat16", *told)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert (content["label"], content["hardware"]["device"]) == ("predicted", "B200")
    assert content["hardware"]["memory_fraction"] == 0.5
    [folder] = (tmp_path / "out").iterdir()
    assert json.loads((folder / "projection.json").read_text()) == content
    assert zbench("report", folder).output.strip() == str(folder / "projection.html")


def test_project_needs_to_be_told_a_device_that_is_known(yaml: Path, tmp_path: Path) -> None:
    refused(zbench("project", yaml), "no device to project to", "--device NAME", "hardware: NAME")
    refused(zbench("project", yaml, "--device", "TPU9"), "unknown hardware 'TPU9'", "known: MI300X, MI325X")
    refused(zbench("project", yaml, "--device", "h"), "'h' could be H100 SXM, H200 SXM")
    refused(
        zbench("project", yaml, "--device", "MI300X", "--out", tmp_path),
        "no float32 rate of MI300X is known",
        "choose another dtype",
    )
    assert zbench("project", yaml, "--device", "MI300X", "--memory-fraction", "0").exit_code == 2


def test_projecting_to_this_machine_needs_its_roofs(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path / "cache"))
    refused(zbench("project", yaml, "--device", "here"), "not measured", "zbench roofs")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_run_killed_halfway_resumes_without_losing_a_trial(yaml: Path, tmp_path: Path, sent: signal.Signals) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "zbench.cli",
        "run",
        str(yaml),
        "--out",
        str(out),
        "-o",
        "output_tokens=40",
        "-o",
        "repeats=20",
    ]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a script runs us with &
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"})
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    log = None
    while time.monotonic() < deadline and (log is None or log.stat().st_size == 0):
        log = next(iter(out.glob(f"*/{TRIALS}")), None)
        time.sleep(0.02)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 130), errors
    assert "Traceback" not in errors
    assert log is not None
    kept = [record.to_json() for record in read_trials(log.parent)[0]]
    assert 0 < len(kept) < 120
    done = subprocess.run([*command, "--resume", "--no-report"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = read_trials(log.parent)[0]
    assert [record.to_json() for record in records][: len(kept)] == kept
    assert len({record.key for record in records}) == len(records) == 120


@pytest.mark.slow
def test_a_run_that_meets_a_file_size_limit_ends_with_one_line_and_a_valid_folder(yaml: Path, tmp_path: Path) -> None:
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
        "from zbench.cli import main; main(sys.argv[1:])"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", limited, "run", str(yaml), "--out", str(out), "-o", "repeats=9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "what was finished is kept" in done.stderr.splitlines()[-1]
    log = next(out.glob(f"*/{TRIALS}"))
    assert len(read_trials(log.parent)[0]) > 0
    assert log.read_bytes().endswith(b"\n")


def commands(group: click.Group, *names: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*names, name)
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)


@pytest.mark.parametrize("names", list(commands(main)), ids=" ".join)
def test_every_command_has_an_example(names: tuple[str, ...]) -> None:
    shown = zbench(*names, "--help").output
    assert re.search(rf"Examples?:\n +.*zbench {' '.join(names)}", shown), shown


def test_a_model_that_is_not_known_is_one_line() -> None:
    fetched = zbench("models", "fetch", "nope")
    refused(fetched, "unknown model 'nope'")
    assert fetched.output.count("\n") == 1
