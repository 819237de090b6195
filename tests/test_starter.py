"""What `zbench init` writes is checked, packaged once, and runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from zbench import gate, history, scenario, starter
from zbench.cli import main
from zbench.errors import UserError

ROOT = Path(__file__).parents[1]
FILES = Path(starter.__file__).parent
TINY = (
    "model={config: {family: llama, layers: 2, width: 64, ffn: 160, heads: 4, kv_heads: 2, vocab: 260,"
    " max_positions: 512, tied: false}, weights: random}"
)


def init(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["init", *map(str, arguments)])


def written(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_init_writes_the_packaged_files_and_says_what_is_next(tmp_path: Path) -> None:
    done = init(tmp_path / "new")
    assert done.exit_code == 0
    assert written(tmp_path / "new") == {place: (FILES / name).read_text() for name, place in starter.PLACES.items()}
    for place in starter.PLACES.values():
        assert f"wrote     {tmp_path / 'new' / place}" in done.stdout
    assert "zbench validate" in done.stdout
    assert "not the top of a git repository" in done.stdout


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    mine = tmp_path / starter.PLACES["scenario.yaml"]
    mine.parent.mkdir(parents=True)
    mine.write_text("name: mine\n")
    done = init(tmp_path)
    assert (done.exit_code, mine.read_text()) == (0, "name: mine\n")
    assert f"kept      {mine}" in done.stdout and "--force" in done.stdout
    assert (tmp_path / starter.PLACES["ci.sh"]).exists()
    assert "replaced" in init(tmp_path, "--force").stdout
    assert mine.read_text() == (FILES / "scenario.yaml").read_text()
    assert "kept" not in init(tmp_path).stdout


def test_a_folder_that_cannot_be_written_or_leads_elsewhere_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = init(tmp_path / "file")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("zbench: ") and refused.stderr.count("\n") == 1
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/.github").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of"):
        list(starter.write(tmp_path / "repository"))
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_examples_are_the_packaged_files() -> None:
    examples = ROOT / "examples/ci"
    assert {path.name for path in examples.iterdir()} - {"README.md"} == set(starter.PLACES)
    for name in starter.PLACES:
        assert (examples / name).resolve() == (FILES / name).resolve()


def test_the_scenario_and_the_policy_are_valid_and_fit_each_other() -> None:
    wanted = scenario.load(FILES / "scenario.yaml")
    policy = gate.load_policy(FILES / "gate.yaml")
    assert (wanted.dtype, wanted.device, policy.device) == ("float32", "cpu", "any")
    assert policy.chosen and not set(policy.metrics) & set(gate.TIMED)


@pytest.mark.parametrize("comment", ["engines", "decode_tps"])
def test_what_is_commented_out_is_valid_once_taken_in(tmp_path: Path, comment: str) -> None:
    name = "scenario.yaml" if comment == "engines" else "gate.yaml"
    text = (FILES / name).read_text()
    if comment == "engines":
        text, count = re.subn(r"(?m)^  # (- \{)", r"  \1", text)
    else:
        text, count = re.subn(r"(?m)^#   (decode_tps|ttft)(.*)$", r"\1\2", text)
        lines = [line for line in text.splitlines() if line.startswith(("decode_tps", "ttft"))]
        text = "device: same\nmetrics:\n" + "".join(f"  {line}\n" for line in lines)
    assert count == {"engines": 3, "decode_tps": 2}[comment]
    (tmp_path / name).write_text(text)
    checked = scenario.load(tmp_path / name) if comment == "engines" else gate.load_policy(tmp_path / name)
    assert checked


def commands(text: str) -> list[list[str]]:
    """Every call of zbench in a shell script, as words; lines that a backslash continues are one."""
    joined = re.sub(r"\\\n\s*", " ", text)
    calls = re.findall(r"(?m)^\s*zbench (.*?)(?:\s*>\S*|\s*\|\|.*)?$", joined)
    return [shlex.split(re.sub(r"\$\{\w+:\+(.*?)\}", r"\1", call)) for call in calls]


def test_the_script_names_commands_and_options_that_exist() -> None:
    found = commands((FILES / "ci.sh").read_text())
    assert [" ".join(words[:2]) if words[0] == "history" else words[0] for words in found] == [
        "run", "gate", "gate", "history add", "history show",
    ]  # fmt: skip
    for words in found:
        command: click.Command = main
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_the_workflow_is_yaml_that_names_what_init_writes_and_what_the_script_reads() -> None:
    text = (FILES / "workflow.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow[True].keys() == {"pull_request", "push", "workflow_dispatch"}  # YAML 1.1 reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    job = workflow["jobs"]["gate"]
    steps = {step["name"]: step for step in job["steps"] if "name" in step}
    assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    assert steps["Measure and gate"]["run"] == f"bash {starter.PLACES['ci.sh']}"
    assert set(re.findall(r"benchmarks/zbench/[\w.]+", text)) <= set(starter.PLACES.values())
    script = (FILES / "ci.sh").read_text()
    assert "${ZBENCH_HISTORY:-}" in script and "ZBENCH_HISTORY" in steps["Measure and gate"]["env"]
    assert "out=${ZBENCH_OUT:-zbench-results}" in script
    kept, restored = (steps[name]["with"] for name in (
        "Keep the history, also of a run that regressed", "History of the main branch",
    ))  # fmt: skip
    assert kept["key"] == restored["key"] and kept["key"].startswith(restored["restore-keys"])
    assert "${{ secrets" not in text
    # Nothing that a pull request chooses (its title, its branch) is pasted into a script.
    assert not any("${{" in step.get("run", "") for step in job["steps"])


@pytest.mark.slow
@pytest.mark.alone
def test_the_script_measures_gates_and_keeps_a_history(tmp_path: Path) -> None:
    """As CI runs it: no baseline, then one, then one that something got worse against."""
    repository = tmp_path / "repository"
    assert init(repository).exit_code == 0
    results, summary = repository / "zbench-results", tmp_path / "summary.md"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ZBENCH_HISTORY": "zbench-results/history.jsonl",
        "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": str(summary),
        "GITHUB_SHA": "c0ffee",
        "GITHUB_SERVER_URL": "https://example.org",
        "GITHUB_REPOSITORY": "a/b",
        "GITHUB_RUN_ID": "7",
    }

    def ci() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", starter.PLACES["ci.sh"], "-o", TINY, "-o", "prompts.limit=2", "-o", "output_tokens=8"],
            cwd=repository, env=environment, capture_output=True, text=True,
        )  # fmt: skip

    first = ci()
    assert (first.returncode, "no baseline to gate against" in first.stderr) == (2, True), first.stderr
    assert not (results / "history.jsonl").exists()
    baseline = repository / "benchmarks/zbench/baseline.json"
    baseline.write_bytes((results / "baseline.json").read_bytes())

    second = ci()
    assert second.returncode == 0, second.stdout + second.stderr
    assert "zbench gate: ok" in summary.read_text()
    (entry,), _ = history.read(results / "history.jsonl")
    assert (entry.commit, entry.url) == ("c0ffee", "https://example.org/a/b/actions/runs/7")
    assert f'href="{entry.folder}/report.html"' in (results / "history.html").read_text()
    assert (results / "gate.xml").exists() and (results / "gate.md").exists()

    fewer = json.loads(baseline.read_text())
    fewer["cells"]["autoregressive"]["exact"]["flops_per_token"][""] *= 0.99
    baseline.write_text(json.dumps(fewer))
    third = ci()
    assert third.returncode == 1, third.stdout + third.stderr
    assert "::error title=flops_per_token regressed" in third.stdout
    assert len(history.read(results / "history.jsonl")[0]) == 2, "a run that regressed is kept too"
