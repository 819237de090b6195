"""Gates in somebody's test suite, as pytest itself sees them."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.test_gate import ENVIRONMENT, GOOD, changed
from tests.test_metrics import CHAIN, request, write
from tests.test_run import SCENARIO
from zbench import ab
from zbench.cache import cache_dir
from zbench.errors import UserError

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[1]
CACHE = cache_dir()  # pytester moves HOME, and a new one has no compiled decoder and no roofs
MARKED = """
import pytest
@pytest.mark.zbench(scenario="tiny.yaml", baseline="base/gate.json"{more})
def test_speed():
    open("body", "w").close()
"""


class Project:
    """A project with a scenario, whose runs are made up."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.trials: Sequence[Any] = GOOD
        self.environment: dict[str, Any] = ENVIRONMENT
        (pytester.path / "tiny.yaml").write_text(SCENARIO)

    def measure(self, where: ab.Environment, scenario: Path, overrides: Sequence[str], out: Path) -> Path:
        if not scenario.exists():
            raise UserError(f"{scenario}: No such file")
        return write(out / "run", self.trials, CHAIN, environment=self.environment, scenario_hash="s")

    def tests(self, *arguments: str, text: str = MARKED, more: str = "") -> pytest.RunResult:
        self.pytester.makepyfile(test_it=text.replace("{more}", more))
        return self.pytester.runpytest_inprocess("-p", "zbench.pytest_plugin", "-p", "no:cacheprovider", *arguments)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the installed one would be there twice
    made = Project(pytester)
    monkeypatch.setattr(ab, "measure", made.measure)
    return made


FLIPPED = changed(GOOD, 9, requests=(request("p3", (0, 1, 2, 3, 4, 6), end=5.0),))


def test_a_baseline_that_is_not_there_fails_and_says_how_to_make_one(project: Project) -> None:
    result = project.tests()
    result.assert_outcomes(failed=1)
    made = (
        f'there is no baseline {project.pytester.path}/base/gate.json; make one with: pytest "test_it.py::test_speed"'
    )
    assert f"{made} --zbench-save-baseline" in result.stdout.str()
    assert not (project.pytester.path / "body").exists()


def test_saving_skips_and_the_next_run_is_compared(project: Project) -> None:
    saved = project.tests("--zbench-save-baseline", "-rs")
    saved.assert_outcomes(skipped=1)
    assert "nothing was compared" in saved.stdout.str()
    assert (project.pytester.path / "base/gate.json").exists()
    project.tests().assert_outcomes(passed=1)
    assert (project.pytester.path / "body").exists()
    assert len(list((project.pytester.path / "zbench-runs").glob("tiny-*/run/trials.jsonl"))) == 2


def test_a_regression_fails_the_test_with_the_lines_of_the_gate(project: Project) -> None:
    project.tests("--zbench-save-baseline")
    project.trials = FLIPPED
    (project.pytester.path / "body").unlink(missing_ok=True)
    result = project.tests("--zbench-out", "elsewhere")
    result.assert_outcomes(failed=1)
    said = result.stdout.str()
    assert "regressed      spec: output_hash hash" not in said and "regressed      spec: output_hash" in said
    assert f"run: {project.pytester.path}/elsewhere/tiny-" in said
    assert "Traceback" not in said and "pytest_plugin.py" not in said
    assert not (project.pytester.path / "body").exists()


def test_a_policy_decides_what_fails(project: Project) -> None:
    (project.pytester.path / "policy.yaml").write_text("metrics: {output_hash: {required: false}, ttft: {}}")
    project.tests("--zbench-save-baseline", more=', policy="policy.yaml"')
    project.trials = FLIPPED
    project.tests(more=', policy="policy.yaml"').assert_outcomes(passed=1)


def test_not_comparable_fails(project: Project) -> None:
    project.tests("--zbench-save-baseline")
    project.environment = {**ENVIRONMENT, "device": {"backend": "cuda", "name": "GPU"}}
    result = project.tests()
    result.assert_outcomes(failed=1)
    assert "not comparable: device.backend is cuda, the baseline's is cpu" in result.stdout.str()
    baseline = project.pytester.path / "base/gate.json"
    baseline.write_text(baseline.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    assert "zbench: not comparable: " in project.tests().stdout.str()


def test_inconclusive_passes_with_a_warning_and_fails_where_it_is_strict(project: Project) -> None:
    project.trials = [t for t in GOOD if t.group < 3]
    project.tests("--zbench-save-baseline")
    result = project.tests()
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*Warning: *inconclusive: *"])
    project.tests("--zbench-strict").assert_outcomes(failed=1)
    project.tests(more=", strict=True").assert_outcomes(failed=1)


def test_the_fixture_returns_the_verdict_and_fails_as_the_mark_does(project: Project) -> None:
    text = """
def test_speed(zbench_gate):
    found = zbench_gate(scenario="tiny.yaml", baseline="gate.json", overrides=["batch=1"])
    assert found.verdict == "ok" and found.rows
"""
    project.tests("--zbench-save-baseline", text=text).assert_outcomes(skipped=1)
    project.tests(text=text).assert_outcomes(passed=1)
    project.trials = FLIPPED
    result = project.tests(text=text)
    result.assert_outcomes(failed=1)
    assert "regressed      spec: output_hash" in result.stdout.str()


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ('scenario="tiny.yaml"', "expected @pytest.mark.zbench(scenario, baseline, policy=None"),
        ('"tiny.yaml", "gate.json"', "all by keyword"),
        ('scenario="tiny.yaml", baseline="g.json", polcy="p"', "all by keyword"),
        ('scenario="none.yaml", baseline="tiny.yaml"', "none.yaml: No such file"),
        ('scenario="tiny.yaml", baseline="tiny.yaml"', "not a baseline"),
        ('scenario="tiny.yaml", baseline="tiny.yaml", policy="none.yaml"', "none.yaml: cannot be read: No such file"),
    ],
)
def test_bad_input_is_a_failure_of_one_line(project: Project, mark: str, said: str) -> None:
    result = project.tests(text=f"import pytest\n@pytest.mark.zbench({mark})\ndef test_speed(): pass\n")
    result.assert_outcomes(failed=1)
    assert said in result.stdout.str()
    assert "pytest_plugin.py" not in result.stdout.str() and "another exception" not in result.stdout.str()


def test_the_mark_is_known_to_strict_markers_and_options_are_in_the_help(project: Project) -> None:
    text = "import pytest\n@pytest.mark.zbench(scenario='a', baseline='b')\ndef test_speed(): pass\n"
    assert "'zbench' not found" not in project.tests("--strict-markers", text=text).stdout.str()
    assert "--zbench-save-baseline" in project.tests("--help").stdout.str()


def test_it_is_installed_as_a_plugin_and_loads_nothing_before_a_gate_is_asked_for() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert declared == {"zbench": "zbench.pytest_plugin"}
    heavy = {"torch", "pandas", "numpy", "scipy", "pydantic", "rich", "yaml", "click", "filelock"}
    code = f"import sys, pytest\nbefore = set(sys.modules)\nimport zbench.pytest_plugin\n\
print(sorted({{m.split('.')[0] for m in set(sys.modules) - before}} & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_real_run_gates_itself(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("ZBENCH_CACHE", str(CACHE))
    (pytester.path / "tiny.yaml").write_text(SCENARIO)
    (pytester.path / "policy.yaml").write_text("metrics: {output_hash: {}, forwards_per_sequence: {}}")
    pytester.makepyfile(
        test_it=MARKED.replace("{more}", ', policy="policy.yaml", overrides=["engines=[autoregressive]"]')
    )
    given = ("-p", "zbench.pytest_plugin", "-rP")
    pytester.runpytest_inprocess(*given, "--zbench-save-baseline").assert_outcomes(skipped=1)
    result = pytester.runpytest_inprocess(*given)
    result.assert_outcomes(passed=1)
    assert "ok             autoregressive: 2 counts unchanged" in result.stdout.str()
