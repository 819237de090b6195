"""The self-test passes, and notices a gate that does not work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from zbench import ab, gate, selftest, stats
from zbench.cli import main


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "SIMULATIONS", 60)


def failed(found: Any) -> list[str]:
    return [check.name for check in found if not check.passed]


@pytest.mark.usefixtures("_quick")
def test_the_simulated_checks_pass() -> None:
    assert failed(selftest._simulated()) == []


@pytest.mark.usefixtures("_quick")
def test_intervals_that_are_too_narrow_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = stats.shift
    monkeypatch.setattr(stats, "shift", lambda *a: replace(honest(*a), error=honest(*a).error / 2))
    assert "simulated runs that differ in nothing" in failed(selftest._simulated())


@pytest.mark.usefixtures("_quick")
def test_looks_that_do_not_share_the_level_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = ab.judge
    monkeypatch.setattr(ab, "judge", lambda now, before, policy, _: shared(now, before, policy, 0.85))
    assert failed(selftest._simulated()) == ["simulated runs in turns that differ in nothing"]


@pytest.mark.usefixtures("_quick")
def test_a_gate_that_sees_less_than_it_says_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats.Shift, "detectable", lambda *_: 0.0)
    assert failed(selftest._simulated()) == ["a slowdown of the size that the gate says it sees"]


@pytest.mark.slow
def test_a_gate_that_overlooks_counts_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What is real has real times, of which a busy machine may fail one: counts alone are looked at.
    assert not set(selftest.CHANGES) & set(failed(selftest._real(tmp_path / "good")))
    monkeypatch.setattr(gate, "_judge_count", lambda row, *_: replace(row, verdict="ok"))
    assert set(selftest.CHANGES) <= set(failed(selftest._real(tmp_path / "blind")))


@pytest.mark.slow
@pytest.mark.alone
def test_a_gate_that_overlooks_times_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stats.Shift, "p_slower", lambda *_: 1.0)
    assert any(missed.startswith("a sleep of") for missed in failed(selftest._real(tmp_path)))


@pytest.mark.parametrize("noise", selftest.NOISES)
def test_simulated_noise_is_of_the_stated_size_and_without_bias_between_runs(noise: str) -> None:
    rng = np.random.default_rng(3)
    drawn = [selftest.NOISES[noise](rng, 12, 2) for _ in range(2000)]
    assert np.std(drawn) == pytest.approx(selftest.NOISE, rel=0.25)
    means = np.mean(drawn, axis=(1, 2))
    assert np.mean(means[::2] - means[1::2]) == pytest.approx(0, abs=0.003)


def test_the_outcome_is_json_where_asked_and_says_what_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "SIMULATIONS", 200)
    kept, said = selftest._promised(15, 0.05, "greater")
    assert kept and said == "consistent with the 5% promised (binomial p = 0.078)"
    kept, said = selftest._promised(120, 0.8, "less")
    assert not kept and said.startswith("fewer than chance makes of the 80% promised")
    monkeypatch.setattr(selftest, "checks", lambda: iter([selftest.Check("one", kept, said)]))
    for order in (("--self-test", "--json"), ("--json", "--self-test")):
        done = CliRunner().invoke(main, ["gate", *order])
        assert done.exit_code == 1
        assert json.loads(done.output) == {
            "passed": False,
            "checks": [{"name": "one", "passed": False, "found": said}],
        }
