"""Two environments in turns: who runs when, what is said after how many pairs, and that nothing measured is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from tests.test_cli import refused, zbench
from tests.test_gate import ENVIRONMENT, GOOD, slower
from tests.test_metrics import CHAIN, write
from tests.test_run import SCENARIO
from zbench import ab, gate, metrics, run, scenario, selftest
from zbench.errors import UserError
from zbench.hardware import roofs
from zbench.serving.process import free_port
from zbench.stats import CONFIDENCE

ROOT = Path(__file__).parents[1]
QUIET = Console(quiet=True)
TIMES = gate.Policy(metrics={m: gate.Rule() for m in (*gate.TIMED, "output_hash", "failed_trials")})


def one_time(seconds: float, **exact: Any) -> gate.Snapshot:
    """A run of one prompt."""
    sample = gate.Sample(1 / seconds, ("p/0",), (0,), (seconds,))
    counts = {metric: {"": value} for metric, value in exact.items()}
    cell = gate.CellSnapshot("t", True, counts, {"decode_tps": sample})
    meanings = dict.fromkeys(("decode_tps", *exact), "m")
    return gate.Snapshot("n", "", "0", "s", "p", {}, meanings, {"device.name": ""}, {"c": cell})


ONLY = gate.Policy(metrics={"decode_tps": gate.Rule(tolerance=0.05)})


def pairs(seed: int, slowdown: float, noise: float, many: int) -> list[tuple[gate.Snapshot, gate.Snapshot]]:
    logs = np.random.default_rng(seed).normal(0, noise, (many, 2))
    return [(one_time(float(np.exp(a))), one_time(float(np.exp(b)) * (1 + slowdown))) for a, b in logs]


def test_runs_are_ordered_a_b_b_a_and_then_the_other_way_round() -> None:
    made = "".join(side[0] for pair in range(1, 5) for side in ab.order(pair))
    assert made == "bccbcbbc"


def test_looks_are_few_begin_where_an_interval_can_be_and_end_with_the_last_pair() -> None:
    assert ab.looks(24) == (6, 8, 12, 16, 24)
    assert [ab.looks(n) for n in (1, 5, 6, 7)] == [(1,), (5,), (6,), (6, 7)]
    for most in range(1, 200):
        plan = ab.looks(most)
        assert plan[-1] == most and list(plan) == sorted(set(plan))


def test_pairs_are_added_until_the_times_are_decided_and_no_longer() -> None:
    quiet, loud = ([look.pairs for look in ab.decide(pairs(1, 0, sd, 24), ONLY, 24)] for sd in (0.005, 0.06))
    assert quiet == [1, 6]
    assert loud[:3] == [1, 6, 8] and len(loud) > 3
    *_, last = ab.decide(pairs(2, 0.10, 0.005, 24), ONLY, 24)
    assert (last.pairs, last.found.verdict) == (6, "regressed")
    *_, last = ab.decide(pairs(3, -0.20, 0.005, 24), ONLY, 24)
    assert (last.pairs, last.found.verdict) == (6, "improved")


def test_a_time_that_a_planned_look_decided_stays_decided() -> None:
    """Of two cells one is decided at once; afterwards its clock goes wild while the other is waited for."""
    rng = np.random.default_rng(8)

    def run(noise: float) -> gate.Snapshot:
        made = one_time(1)
        seconds = np.exp(rng.normal(0, (noise, 1.0)))
        cells = {name: one_time(s).cells["c"] for name, s in zip(("calm", "loud"), seconds.tolist(), strict=True)}
        return replace(made, cells=cells)

    made = [(run(noise), run(noise)) for noise in [0.001] * 6 + [1.0] * 18]
    found = [look for look in ab.decide(made, ONLY, 24) if look.planned]
    assert [look.pairs for look in found] == [6, 8, 12, 16, 24]
    rows = [{row.cell: row for row in look.found.rows} for look in found]
    assert [row["calm"].verdict for row in rows] == ["ok"] * 5
    assert {row["calm"] for row in rows} == {rows[0]["calm"]} and rows[0]["calm"].n == 6
    assert [[row.cell for row in look.undecided] for look in found] == [["loud"]] * 5


def test_a_count_that_changed_ends_it_after_the_first_pair() -> None:
    policy = gate.Policy(metrics={"decode_tps": gate.Rule(), "output_hash": gate.Rule()})
    fed = iter([(one_time(1, output_hash="a"), one_time(1, output_hash="b"))] * 24)
    [look] = ab.decide(fed, policy, 24)
    assert (look.found.verdict, look.pairs, len(list(fed))) == ("regressed", 1, 23)


def test_without_times_one_pair_is_enough() -> None:
    policy = gate.Policy(metrics={"output_hash": gate.Rule()})
    [look] = ab.decide([(one_time(1, output_hash="a"), one_time(1, output_hash="a"))] * 9, policy, 9)
    assert (look.found.verdict, look.pairs) == ("ok", 1)


def test_pairs_that_end_between_looks_are_judged_once_more_at_the_level_of_a_look() -> None:
    found = list(ab.decide(pairs(4, 0.0, 0.2, 10), ONLY, 24))
    assert [look.pairs for look in found] == [1, 6, 8, 10]
    row = found[-1].found.rows[0]
    logs = [np.log(b.cells["c"].timed["decode_tps"].seconds[0] / a.cells["c"].timed["decode_tps"].seconds[0])
            for a, b in pairs(4, 0.0, 0.2, 10)]  # fmt: skip
    from scipy import stats

    low, high = stats.t.interval(0.99, 9, np.mean(logs), stats.sem(logs))
    assert (row.low, row.high) == (pytest.approx(np.exp(-high) - 1), pytest.approx(np.exp(-low) - 1))
    # As if it had been looked at once: beside 5%, with five looks planned.
    delta = abs(np.mean(logs)) - np.log(1.05)
    raw = 2 * stats.t.sf(delta / stats.sem(logs), 9)
    assert row.p == pytest.approx(min(1, raw * 5))


def test_many_prompts_of_one_process_are_one_observation() -> None:
    def run(process: float, seed: int) -> gate.Snapshot:
        own = np.random.default_rng(seed).normal(0, 0.001, 50)
        seconds = tuple(np.exp(process + own).tolist())
        sample = gate.Sample(1.0, tuple(f"p{i}/0" for i in range(50)), tuple(range(50)), seconds)
        cell = gate.CellSnapshot("t", True, {}, {"decode_tps": sample})
        return replace(one_time(1), cells={"c": cell})

    shifts = np.random.default_rng(7).normal(0, 0.03, 12)
    made = [(run(0.0, 2 * i), run(shift, 2 * i + 1)) for i, shift in enumerate(shifts)]
    judged = ab.judge([b for _, b in made], [a for a, _ in made], ONLY, CONFIDENCE)
    [row] = judged.rows
    assert row.n == 12
    assert row.candidate / row.baseline - 1 == pytest.approx(row.change)  # type: ignore[operator]
    assert row.high - row.low == pytest.approx(2 * 2.201 * np.std(shifts, ddof=1) / 12**0.5, rel=0.1)  # type: ignore[operator]


def test_counts_that_differ_between_runs_of_one_environment_are_not_exact_whatever_the_first_said() -> None:
    policy = gate.Policy(metrics={"output_hash": gate.Rule(), "failed_trials": gate.Rule()})

    def runs(*hashes: str, failed: float = 0.0) -> list[gate.Snapshot]:
        return [one_time(1, output_hash=h, failed_trials=failed if i else 0.0) for i, h in enumerate(hashes)]

    def verdict(now: list[gate.Snapshot], before: list[gate.Snapshot]) -> dict[str, str]:
        return {row.metric: row.verdict for row in ab.judge(now, before, policy, CONFIDENCE).rows}

    assert verdict(runs("a", "a"), runs("a", "a")) == {"output_hash": "ok", "failed_trials": "ok"}
    assert verdict(runs("a", "b"), runs("a", "a"))["output_hash"] == "inconclusive"
    assert verdict(runs("b", "b"), runs("a", "b"))["output_hash"] == "inconclusive"
    assert verdict(runs("b", "b"), runs("a", "a"))["output_hash"] == "regressed"
    assert verdict(runs("a", "a", failed=1.0), runs("a", "a"))["failed_trials"] == "regressed"


def test_of_several_runs_the_one_with_the_most_wrong_tokens_counts() -> None:
    policy = gate.Policy(metrics={"lossless": gate.Rule()})
    right, wrong = one_time(1, lossless=1.0), one_time(1, lossless=0.5)
    for now, before, verdict in (
        ([right, wrong], [right, right], "regressed"),
        ([right, right], [right, wrong], "improved"),
        ([right, wrong], [wrong, right], "ok"),
    ):
        [row] = ab.judge(now, before, policy, CONFIDENCE).rows
        assert row.verdict == verdict


def test_looking_often_keeps_the_level_and_a_slowdown_is_found() -> None:
    """Type-I error and power, small: docs/gates.md has the table. Without sharing the level about 12% would alarm."""
    rng = np.random.default_rng(5)

    def alarms(slowdown: float, tolerance: float, many: int) -> float:
        policy = selftest.policy(tolerance)
        hits = 0
        for _ in range(many):
            *_, last = ab.decide(selftest.in_turns(rng, selftest.normal, slowdown, 16), policy, 16)
            hits += last.found.verdict == "regressed"
        return hits / many

    assert alarms(0.0, 0.0, 200) <= 0.05
    assert alarms(0.15, 0.05, 30) >= 0.9


# --- Environments ---


def test_an_environment_is_a_checkout_a_venv_or_a_python(tmp_path: Path) -> None:
    checkout = ab.environment(str(ROOT))
    assert (checkout.python, checkout.checkout) == (sys.executable, ROOT)
    assert checkout.variables()["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to(sys.executable)
    for given in (tmp_path / "venv", tmp_path / "venv/bin/python"):
        found = ab.environment(str(given))
        assert (found.python, found.checkout) == (str(tmp_path / "venv/bin/python"), None)  # resolved, it were another
        assert "PYTHONPATH" not in found.variables()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("http://localhost:8000/v1", "no engine is an endpoint"),
        ("/nowhere/at/all", "no such environment"),
        ("/", "neither a virtual environment"),
    ],
)
def test_what_is_no_environment_is_one_line(given: str, said: str, tmp_path: Path) -> None:
    yaml = tmp_path / "tiny.yaml"
    yaml.write_text(SCENARIO)
    refused(zbench("gate", "--ab", given, ROOT, "--scenario", yaml, "--out", tmp_path / "out"), given, said)
    assert not (tmp_path / "out").exists()


def test_a_python_without_zbench_and_a_checkout_that_is_not_imported_are_named(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(UserError, match=r"cannot import zbench there .*No module named"):
        ab.describe(ab.environment(str(bare)))
    shadowed = replace(ab.environment(str(ROOT)), checkout=tmp_path)
    with pytest.raises(UserError, match=r"cannot import zbench|imports .* instead"):
        ab.describe(shadowed)


def test_options_that_do_not_go_together_are_one_line(tmp_path: Path) -> None:
    refused(zbench("gate"), "give a RUN, or --ab")
    refused(zbench("gate", "--ab", ROOT, ROOT), "--ab needs --scenario")
    refused(zbench("gate", tmp_path, "--ab", ROOT, ROOT, "--scenario", "x"), "neither a RUN")


# --- The whole of it, with runs that are made up ---


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Each run is written, not measured: `slowdown` is the candidate's; `at` is called with each run's number."""
    how: dict[str, Any] = {"slowdown": 0.0, "at": lambda number: None, "order": []}
    rng = np.random.default_rng(11)

    def measure(where: ab.Environment, scenario: Path, overrides: Any, out: Path) -> Path:
        how["order"].append(out.name[0])
        how["at"](len(how["order"]))
        factor = 1 + how["slowdown"] * (out.name == "candidate")
        trials = slower(GOOD, (factor * rng.normal(1, 0.004, len(GOOD))).tolist())
        return write(out / "run", trials, CHAIN, environment=ENVIRONMENT, scenario_hash=out.name, prompts_hash="p")

    monkeypatch.setattr(ab, "measure", measure)
    yield how


def gated(tmp_path: Path, *more: object) -> Any:
    (tmp_path / "tiny.yaml").write_text(SCENARIO)
    return zbench(
        "gate", "--ab", ROOT, ROOT, "--scenario", tmp_path / "tiny.yaml", "--out", tmp_path / "out", *more
    )  # fmt: skip


def test_the_same_twice_is_ok_and_every_run_is_kept(tmp_path: Path, made_up: dict[str, Any]) -> None:
    result = gated(tmp_path, "--write", f"junit={tmp_path}/gate.xml", "--json")
    assert result.exit_code == 0, result.output
    assert "".join(made_up["order"]) == "bc" + "bccbcbbc" + "bccb"  # a warm-up, then six pairs
    [folder] = (tmp_path / "out").iterdir()
    record = json.loads((folder / ab.RECORD).read_text())
    assert (record["stopped"], len(record["runs"])) == ("decided", 14)
    assert all(metrics.load_run(folder / run["folder"]).trials for run in record["runs"])
    said = json.loads(result.stdout)
    assert (said["verdict"], record["verdict"]) == ("ok", said)
    assert {row["n"] for row in said["metrics"] if row["metric"] == "decode_tps"} == {6}
    assert "<testsuite" in (tmp_path / "gate.xml").read_text()
    assert "[4/50] pair 1 of at most 24, candidate" in result.stderr and " s left" in result.stderr


def test_a_slower_candidate_exits_with_1_and_says_how_much(tmp_path: Path, made_up: dict[str, Any]) -> None:
    made_up["slowdown"] = 0.3
    result = gated(tmp_path)
    assert result.exit_code == 1
    assert "regressed      ar: decode_tps" in result.stdout
    assert "6 pairs of runs in turns; intervals are 99.0% each" in result.stdout


def test_ctrl_c_judges_what_was_measured_and_exits_with_130(tmp_path: Path, made_up: dict[str, Any]) -> None:
    def interrupt(number: int) -> None:
        if number == 8:
            raise KeyboardInterrupt

    made_up["at"] = interrupt
    result = gated(tmp_path)
    assert result.exit_code == 130
    assert "3 pairs of runs in turns" not in result.stdout and "2 pairs of runs in turns" in result.stdout
    assert "stopped: interrupted" in result.stdout and "too few pairs of runs" in result.stdout
    [folder] = (tmp_path / "out").iterdir()
    assert len(json.loads((folder / ab.RECORD).read_text())["runs"]) == 7


def test_ctrl_c_before_the_first_pair_says_where_the_runs_are(tmp_path: Path, made_up: dict[str, Any]) -> None:
    def interrupt(number: int) -> None:
        if number == 4:
            raise KeyboardInterrupt

    made_up["at"] = interrupt
    result = gated(tmp_path)
    assert (result.exit_code, result.stdout) == (130, "")
    assert "no pair of runs has ended yet; what was measured is in" in result.stderr


def test_a_spent_budget_is_inconclusive_and_strict_says_so(tmp_path: Path, made_up: dict[str, Any]) -> None:
    for strict, code in ((), 0), (("--strict",), 4):
        result = gated(tmp_path, "--budget-minutes", "1e-9", *strict)
        assert result.exit_code == code
        assert "1 pair of runs in turns" in result.stdout
        assert "stopped: the budget of 1e-09 minutes is spent" in result.stdout
        assert "more pairs (--max-pairs)" in result.stdout


def test_a_run_that_breaks_is_one_line_and_the_others_are_kept(tmp_path: Path, made_up: dict[str, Any]) -> None:
    def broken(number: int) -> None:
        if number == 6:
            raise UserError("mine: the run ended with exit code -11")

    made_up["at"] = broken
    result = gated(tmp_path)
    refused(result, "exit code -11", "what was measured is in")
    [folder] = (tmp_path / "out").iterdir()
    record = json.loads((folder / ab.RECORD).read_text())
    assert (record["stopped"], len(record["runs"])) == ("a run broke", 5)


# --- And with real ones ---


@pytest.mark.slow
@pytest.mark.alone
def test_two_checkouts_of_which_one_sleeps_in_every_forward(tmp_path: Path) -> None:
    sleepy = tmp_path / "sleepy"
    shutil.copytree(ROOT / "zbench", sleepy / "zbench", ignore=shutil.ignore_patterns("__pycache__"))
    engine = sleepy / "zbench/engines/autoregressive.py"
    awake = "        rows = Rows.chain("
    assert engine.read_text().count(awake) == 1
    engine.write_text(engine.read_text().replace(awake, f"        __import__('time').sleep(0.005)\n{awake}"))
    (tmp_path / "tiny.yaml").write_text(SCENARIO.replace("[autoregressive, reference]", "[autoregressive]"))
    policy = tmp_path / "policy.yaml"
    policy.write_text("metrics: {output_hash: {}, forwards_per_sequence: {}, decode_tps: {tolerance: 0.5}}")
    given = ("--scenario", tmp_path / "tiny.yaml", "--policy", policy, "-o", "output_tokens=24", "--max-pairs", 6)
    slow = zbench("gate", "--ab", ROOT, sleepy, *given, "--out", tmp_path / "slow")
    assert slow.exit_code == 1, slow.output
    assert "regressed      autoregressive: decode_tps" in slow.stdout
    assert "autoregressive: 2 counts unchanged" in slow.stdout


@pytest.mark.slow
def test_a_terminated_comparison_ends_its_run_and_keeps_the_folders(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(SCENARIO)
    command = [sys.executable, "-m", "zbench.cli", "gate", "--ab", str(ROOT), str(ROOT), "--scenario",
               str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "-o", "repeats=3000"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((tmp_path / "out").glob("*/pair-00/baseline/*/trials.jsonl")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "what was measured is in" in errors
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    [trials] = (tmp_path / "out").glob("*/pair-00/baseline/*/trials.jsonl")
    assert trials.read_bytes()[-1:] in (b"", b"\n")


# --- Two servers ---

ENDPOINT = SCENARIO.replace("[autoregressive, reference]", "[{name: endpoint, url: 'http://127.0.0.1:1', send: text}]")


@contextmanager
def served(seconds: float) -> Iterator[str]:
    """The address of a server that takes so long for each token."""
    port = free_port()
    command = [sys.executable, "-m", "tests.serving.server", str(port), "me", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as running:
        assert running.stdout and running.stdout.readline().strip() == "listening"
        yield f"http://127.0.0.1:{port}"
        running.terminate()


def between(tmp_path: Path, *servers: str) -> Any:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "served.yaml").write_text(ENDPOINT)
    (tmp_path / "policy.yaml").write_text("metrics: {output_hash: {}, failed_trials: {}, decode_tps: {tolerance: 0.5}}")
    given = ("--scenario", tmp_path / "served.yaml", "--policy", tmp_path / "policy.yaml", "--max-pairs", 5)
    return zbench("gate", "--ab", *servers, *given, "-o", "repeats=1", "--out", tmp_path / "out")


def test_a_server_is_asked_by_this_zbench() -> None:
    found = ab.environment("http://127.0.0.1:8000")
    assert (found.url, found.python, found.checkout) == ("http://127.0.0.1:8000", sys.executable, ROOT)


def test_a_server_that_is_down_is_one_line_before_anything_is_measured(tmp_path: Path) -> None:
    refused(between(tmp_path, "http://127.0.0.1:1", "http://127.0.0.1:1"), "no server answers there")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.alone
def test_of_two_servers_the_slower_is_named_and_two_equal_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(_: ab.Environment, yaml: Path, overrides: Sequence[str], out: Path) -> Path:
        """A process of its own would take its seconds to import torch."""
        return run.run(scenario.load(yaml, overrides), out, QUIET).folder

    monkeypatch.setattr(ab, "measure", here)
    monkeypatch.setattr(roofs, "load_or_measure", lambda *_, **__: None)
    with served(0.01) as quick, served(0.04) as slow, served(0.01) as other:
        worse, same = between(tmp_path / "worse", quick, slow), between(tmp_path / "same", quick, other)
    assert worse.exit_code == 1, worse.output
    assert "regressed      endpoint-send-text: decode_tps" in worse.stdout
    assert same.exit_code == 0, same.output
    assert "ok             endpoint-send-text: decode_tps" in same.stdout
    [record] = (tmp_path / "worse/out").glob("*/ab.json")
    assert [json.loads(record.read_text())[side]["given"] for side in ab.SIDES] == [quick, slow]
