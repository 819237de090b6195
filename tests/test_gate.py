"""What the gate lets through and what it stops, and that it says why when it cannot tell."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_metrics import CHAIN, forward, request, trial, verifying, write
from zbench import gate, metrics, stats
from zbench.cli import main
from zbench.errors import UserError
from zbench.records import CellRecord, LosslessCheck, ServedRecord, TrialRecord

ENVIRONMENT = {
    "device": {"backend": "cpu", "name": "Invented CPU"},
    "cpu": {"model": "Invented CPU", "usable_threads": 2},
    "torch": {"threads": 2, "version": "2.13.0"},
}
GOOD = tuple(trial(group=g) for g in range(6)) + tuple(verifying([1, 2], group=g) for g in range(6))


def taken(
    folder: Path,
    trials: Sequence[TrialRecord] = GOOD,
    cells: Sequence[CellRecord] = CHAIN,
    policy: gate.Policy | None = None,
    **changes: Any,
) -> gate.Snapshot:
    changes = {"environment": ENVIRONMENT, "scenario_hash": "s", "prompts_hash": "p", **changes}
    return gate.snapshot(metrics.load_run(write(folder, trials, cells, **changes)), policy)


def changed(trials: Sequence[TrialRecord], index: int, **changes: Any) -> list[TrialRecord]:
    return [replace(t, **changes) if i == index else t for i, t in enumerate(trials)]


def verdicts(judged: gate.Gate) -> dict[tuple[str, str, str], str]:
    return {(row.cell, row.metric, row.part): row.verdict for row in judged.rows}


def slower(trials: Sequence[TrialRecord], factors: Sequence[float]) -> list[TrialRecord]:
    """The same records, each trial's clock stretched by its factor."""
    return [
        replace(
            t,
            wall_seconds=t.wall_seconds * f,
            requests=tuple(
                replace(r, ttft_seconds=r.ttft_seconds * f, end_seconds=r.end_seconds * f) for r in t.requests
            ),
        )
        for t, f in zip(trials, factors, strict=True)
    ]


def test_a_run_against_itself_is_ok_in_every_metric(tmp_path: Path) -> None:
    run = taken(tmp_path)
    judged = gate.judge(run, run)
    assert {row.verdict for row in judged.rows} == {"ok"}
    assert {row.metric for row in judged.rows} >= {"decode_tps", "ttft", "output_hash", "acceptance_length"}
    assert judged.exit_code(strict=True) == 0


def less_accepted() -> dict[str, Any]:
    less = verifying([1, 1], group=3)
    return {"steps": less.steps, "forwards": less.forwards, "requests": less.requests}


MADE = GOOD[9].forwards
WORSE = {
    "one draft less accepted in one step": (less_accepted(), "acceptance_length", "micro"),
    "one forward more": (
        {"forwards": (*MADE, forward(2, "draft", model="drafter"))}, "forwards_per_sequence", "drafter",
    ),
    "one token flipped": ({"requests": (request("p3", (0, 1, 2, 3, 4, 6), end=5.0),)}, "output_hash", ""),
    "one row more in one": ({"forwards": (*MADE[:-1], forward(2, "verify", rows=5))}, "rows_per_forward", "verify"),
    "one byte more read": (
        {"forwards": (*MADE[:-1], forward(2, "verify", rows=4, bytes_read=191))}, "bytes_per_token", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WORSE)
def test_the_smallest_change_for_the_worse_fails(tmp_path: Path, what: str) -> None:
    changes, metric, part = WORSE[what]
    judged = gate.judge(taken(tmp_path / "now", changed(GOOD, 9, **changes)), taken(tmp_path / "before"))
    assert verdicts(judged)["spec", metric, part] == "regressed"
    assert judged.exit_code() == gate.REGRESSED
    assert all(verdict == "ok" for (name, *_), verdict in verdicts(judged).items() if name == "ar")


def test_outputs_of_a_server_that_got_other_prefixes_are_no_regression(tmp_path: Path) -> None:
    """Its prefix cache could not be emptied, so every prompt of every run began otherwise."""

    def run(name: str, last: int, right: bool) -> gate.Snapshot:
        asked = [replace(request(f"p{g}", (7, 8, last)), correct=right) for g in range(6)]
        served = [trial(group=g, requests=(r,), kernels={"prefix cache": "unique"}) for g, r in enumerate(asked)]
        return taken(tmp_path / name, served, CHAIN[:1])

    judged = gate.judge(run("now", 9, False), run("before", 8, True))
    assert not judged.of("regressed")
    said = {row.metric: row.note for row in judged.of("inconclusive") if not row.timed}
    assert said == dict.fromkeys(
        ("output_hash", "accuracy"), "greedy outputs vary by themselves here, so nothing is exact"
    )


def test_a_failed_trial_fails_the_gate(tmp_path: Path) -> None:
    failed = trial("spec", 6, status="error", error="boom", requests=(), steps=(), forwards=())
    judged = gate.judge(taken(tmp_path / "now", [*GOOD, failed]), taken(tmp_path / "before"))
    assert verdicts(judged)["spec", "failed_trials", ""] == "regressed"
    assert judged.exit_code() == gate.REGRESSED


def test_a_kind_of_forward_that_was_not_there_before_is_a_regression(tmp_path: Path) -> None:
    extra = changed(GOOD, 9, forwards=(*GOOD[9].forwards, forward(2, "draft", model="head")))
    judged = gate.judge(taken(tmp_path / "now", extra), taken(tmp_path / "before"))
    row = next(r for r in judged.rows if r.metric == "forwards_per_sequence" and r.part == "head")
    assert (row.verdict, row.note) == ("regressed", "new")


def test_more_accepted_is_improved_and_passes(tmp_path: Path) -> None:
    better = verifying([2, 2], group=3)
    now = changed(GOOD, 9, steps=better.steps, forwards=better.forwards, requests=better.requests)
    policy = gate.Policy(metrics={"acceptance_length": gate.Rule(), "tokens_per_forward": gate.Rule()})
    judged = gate.judge(taken(tmp_path / "now", now), taken(tmp_path / "before"), policy)
    assert verdicts(judged)["spec", "acceptance_length", "micro"] == "improved"
    assert (judged.verdict, judged.exit_code(strict=True)) == ("improved", 0)


def test_memory_may_move_within_its_tolerance(tmp_path: Path) -> None:
    def peaks(peak: int, folder: str) -> gate.Snapshot:
        return taken(tmp_path / folder, [replace(t, peak_bytes=peak) for t in GOOD])

    before = peaks(1000, "before")
    assert verdicts(gate.judge(peaks(1050, "a"), before))["ar", "peak_bytes", ""] == "ok"
    assert verdicts(gate.judge(peaks(1051, "b"), before))["ar", "peak_bytes", ""] == "regressed"
    assert verdicts(gate.judge(peaks(900, "c"), before))["ar", "peak_bytes", ""] == "improved"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scenario_hash": "other"}, "another scenario"),
        ({"prompts_hash": "other"}, "prompts"),
        ({"models": {"m": {"hash": "other"}}}, "model m has other weights"),
        ({"environment": {**ENVIRONMENT, "device": {"backend": "cuda", "name": "GPU"}}}, "device.name is GPU"),
        ({"environment": {**ENVIRONMENT, "torch": {"threads": 1}}}, "torch.threads is 1, the baseline's is 2"),
    ],
)
def test_what_is_not_alike_is_not_compared(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    judged = gate.judge(taken(tmp_path / "now", **changes), taken(tmp_path / "before"))
    assert (judged.verdict, judged.exit_code(), judged.rows) == ("not comparable", 3, ())
    assert any(said in reason for reason in judged.reasons)


@pytest.mark.parametrize("whose", ["run", "baseline"])
@pytest.mark.parametrize("known", [{}, {"torch": {"version": "2.13.0"}}])
def test_times_of_an_unknown_device_are_not_compared_and_counts_are(
    tmp_path: Path, whose: str, known: dict[str, Any]
) -> None:
    unknown, run = taken(tmp_path / "unknown", environment=known), taken(tmp_path / "known")
    judged = gate.judge(*((unknown, run) if whose == "run" else (run, unknown)))
    assert {row.verdict for row in judged.rows if row.timed} == {"not comparable"}
    assert {row.note for row in judged.rows if row.timed} == {f"the device of the {whose} is not known"}
    assert {row.verdict for row in judged.rows if not row.timed} == {"ok"}
    assert judged.exit_code() == gate.NOT_COMPARABLE


def test_another_version_of_torch_is_said_and_still_compared(tmp_path: Path) -> None:
    newer = {**ENVIRONMENT, "torch": {"threads": 2, "version": "2.14.0"}}
    judged = gate.judge(taken(tmp_path / "now", environment=newer), taken(tmp_path / "before"))
    assert judged.exit_code() == 0
    assert judged.notes == ("also changed: torch.version is 2.14.0, was 2.13.0",)


def test_a_metric_that_means_something_else_now_is_not_compared_and_the_others_are(tmp_path: Path) -> None:
    run = taken(tmp_path)
    before = replace(run, definitions={**run.definitions, "bytes_per_token": "of old"})
    judged = gate.judge(run, before)
    assert verdicts(judged)["ar", "bytes_per_token", ""] == "not comparable"
    assert verdicts(judged)["ar", "flops_per_token", ""] == "ok"
    assert judged.exit_code() == gate.NOT_COMPARABLE


def test_a_metric_younger_than_the_baseline_is_named_and_not_gated(tmp_path: Path) -> None:
    run = taken(tmp_path)
    cells = {
        name: replace(c, exact={m: v for m, v in c.exact.items() if m != "bytes_per_token"})
        for name, c in run.cells.items()
    }
    before = replace(run, cells=cells, definitions={m: d for m, d in run.definitions.items() if m != "bytes_per_token"})
    judged = gate.judge(run, before)
    assert judged.exit_code() == 0
    assert judged.notes == ("not in the baseline, so not gated: bytes_per_token",)
    with pytest.raises(UserError, match="accuracy, which no cell has"):
        gate.judge(run, before, gate.Policy(metrics={"accuracy": gate.Rule()}))


def test_what_a_cell_of_the_baseline_does_not_have_is_named(tmp_path: Path) -> None:
    run = taken(tmp_path)
    spec = run.cells["spec"]
    exact = {metric: parts for metric, parts in spec.exact.items() if metric != "output_hash"}
    without = replace(run, cells={**run.cells, "spec": replace(spec, exact=exact, timed={})})
    judged = gate.judge(run, without)
    said = "spec: not in the baseline, so not gated: output_hash, decode_tps, throughput, ttft"
    assert (judged.exit_code(), judged.notes) == (0, (said,))
    judged = gate.judge(run, replace(run, cells={"ar": run.cells["ar"]}))
    assert (judged.exit_code(), judged.notes) == (0, ("spec: not in the baseline, so not gated",))


def test_an_unfinished_run_is_no_regression_of_its_counts(tmp_path: Path) -> None:
    judged = gate.judge(taken(tmp_path / "now", GOOD[:-1]), taken(tmp_path / "before"))
    assert {r.verdict for r in judged.rows if r.cell == "spec" and not r.timed and r.metric != "failed_trials"} == {
        "not comparable"
    }
    assert {r.verdict for r in judged.rows if r.cell == "ar"} == {"ok"}


@pytest.mark.parametrize("side", ["run", "baseline"])
def test_times_of_other_trials_than_the_baselines_are_not_compared(tmp_path: Path, side: str) -> None:
    policy = gate.Policy(metrics={"decode_tps": gate.Rule()})
    whole = [*GOOD[:6], *(replace(t, repeat=1) for t in GOOD[:6])]
    failed = [replace(t, status="error", error="boom", requests=(), steps=(), forwards=()) for t in whole[6:]]
    for n, half in enumerate((whole[:6], whole[:6] + failed)):
        pair = (taken(tmp_path / f"{n}{name}", trials, CHAIN[:1]) for name, trials in (("a", half), ("b", whole)))
        now, before = pair if side == "run" else reversed([*pair])
        judged = gate.judge(now, before, policy)
        assert [(row.verdict, row.note) for row in judged.rows] == [
            ("not comparable", "other trials succeeded than in the baseline; an unfinished run?")
        ]
        assert judged.exit_code() == gate.NOT_COMPARABLE


def test_the_values_beside_a_time_are_of_the_pairs_that_its_change_is_of(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    now, before = (taken(tmp_path / n, slower(GOOD, rng.lognormal(0, 1, len(GOOD)).tolist())) for n in "ab")
    less = {c: replace(cell, timed={m: trimmed(s) for m, s in cell.timed.items()}) for c, cell in now.cells.items()}
    for row in gate.judge(replace(now, cells=less), before).rows:
        if row.timed:
            assert isinstance(row.candidate, float) and isinstance(row.baseline, float)
            assert row.candidate / row.baseline - 1 == pytest.approx(row.change)


def trimmed(sample: gate.Sample) -> gate.Sample:
    """Without its last observation, as where an output has no second token."""
    return replace(sample, keys=sample.keys[:-1], clusters=sample.clusters[:-1], seconds=sample.seconds[:-1])


def test_tokens_that_differ_between_repeats_make_a_difference_inconclusive(tmp_path: Path) -> None:
    def run(last: int, folder: str) -> gate.Snapshot:
        repeats = [trial(group=g, repeat=1, requests=(request(f"p{g}", (7, 8, last)),)) for g in range(6)]
        return taken(tmp_path / folder, [*GOOD, *repeats])

    judged = gate.judge(run(10, "now"), run(11, "before"))
    assert verdicts(judged)["ar", "output_hash", ""] == "inconclusive"
    assert verdicts(judged)["ar", "bytes_per_token", ""] == "ok"
    assert (judged.exit_code(), judged.exit_code(strict=True)) == (0, gate.INCONCLUSIVE)


EXACT = LosslessCheck("exact")


def repeated(folder: Path, *lasts: int, check: LosslessCheck = EXACT) -> gate.Snapshot:
    """A run whose prompts are decoded once for each of `lasts`, the last token; `check` is of all but the first."""
    trials = [
        trial(group=g, repeat=i, requests=(replace(request(f"p{g}", (7, 8, last)), check=check if i else EXACT),))
        for i, last in enumerate(lasts)
        for g in range(6)
    ]
    return taken(folder, trials, CHAIN[:1])


def test_a_decoder_that_no_longer_repeats_itself_regresses(tmp_path: Path) -> None:
    before, now = repeated(tmp_path / "before", 9, 9), repeated(tmp_path / "now", 9, 10)
    [row] = [row for row in gate.judge(now, before).rows if row.metric == "output_hash"]
    assert row.verdict == "regressed"
    assert "repeats of one greedy prompt give different tokens, in the baseline they did not" in row.note
    assert gate.judge(now, before).exit_code() == gate.REGRESSED
    counts = gate.Policy(metrics={"bytes_per_token": gate.Rule()})
    assert "ar: repeats of one greedy prompt give different tokens, in the baseline they did not" in " ".join(
        gate.judge(now, before, counts).notes
    )


@pytest.mark.parametrize("first", [9, 10])
def test_what_does_not_hang_on_repeats_regresses_whether_they_agree_or_not(tmp_path: Path, first: int) -> None:
    before = repeated(tmp_path / "before", first, 9)
    wrong = LosslessCheck("different", 1, 2, 1.0)
    judged = verdicts(gate.judge(repeated(tmp_path / "wrong", 11, 10, check=wrong), before))
    assert judged["ar", "lossless", ""] == "regressed"
    failed = [trial(group=g, repeat=r, requests=(request(f"p{g}", (7, 8, 9 + r)),)) for g in range(6) for r in (0, 1)]
    failed[1] = replace(failed[1], status="error", error="boom", requests=(), steps=(), forwards=())
    judged = verdicts(gate.judge(taken(tmp_path / "failed", failed, CHAIN[:1]), before))
    assert judged["ar", "failed_trials", ""] == "regressed"


def test_a_slowdown_beyond_tolerance_and_noise_regresses_and_one_within_is_ok(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(1, 0.005, (2, len(GOOD)))
    before = taken(tmp_path / "before", slower(GOOD, noise[0].tolist()))
    within = gate.judge(taken(tmp_path / "within", slower(GOOD, (noise[1] * 1.02).tolist())), before)
    assert {row.verdict for row in within.rows if row.timed} == {"ok"}
    beyond = gate.judge(taken(tmp_path / "beyond", slower(GOOD, (noise[1] * 1.15).tolist())), before)
    assert {row.verdict for row in beyond.rows if row.timed} == {"regressed"}
    row = next(row for row in beyond.rows if row.metric == "decode_tps")
    assert row.change == pytest.approx(1 / 1.15 - 1, abs=0.01)
    assert row.low is not None and row.high is not None and row.low < row.change < row.high  # type: ignore[operator]
    assert row.detects is not None and 0.05 < row.detects < 0.10


def test_tokens_that_a_server_counts_and_does_not_show_are_in_the_test_as_in_the_value(tmp_path: Path) -> None:
    def served(times: int, folder: str) -> gate.Snapshot:
        """As many times the tokens in as many times the seconds, of which the client sees three."""
        told = ServedRecord(0.0, 0.0, (1.0, 3.0), 3, "text", output_tokens=3 * times)
        requests = [(replace(request(f"p{g}"), served=told),) for g in range(6)]
        trials = [replace(t, requests=r, wall_seconds=3.0 * times) for t, r in zip(GOOD, requests, strict=False)]
        return taken(tmp_path / folder, trials, CHAIN[:1], gate.Policy(metrics={"throughput": gate.Rule()}))

    [row] = gate.judge(served(5, "now"), served(1, "before"), gate.Policy(metrics={"throughput": gate.Rule()})).rows
    assert (row.verdict, row.change) == ("ok", pytest.approx(0))


def test_few_prompts_decide_nothing_about_time_and_strict_says_so(tmp_path: Path) -> None:
    four = [t for t in GOOD if t.group < 4]
    judged = gate.judge(taken(tmp_path / "now", slower(four, [9.0] * 8)), taken(tmp_path / "before", four))
    assert {row.verdict for row in judged.rows if row.timed} == {"inconclusive"}
    assert (judged.exit_code(), judged.exit_code(strict=True)) == (0, gate.INCONCLUSIVE)


def test_a_cell_with_too_few_batches_is_said_and_fails_nobody_where_others_show_the_metric(tmp_path: Path) -> None:
    """As a matrix over batch sizes has it: eight prompts are two batches of four."""
    whole = [*GOOD[:6], *(replace(t, cell="spec") for t in GOOD[:2])]
    run = taken(tmp_path / "run", whole)
    judged = gate.judge(run, run)
    rows = [row for row in judged.rows if row.timed]
    assert {(row.cell, row.verdict, row.required) for row in rows} == {
        ("ar", "ok", True), ("spec", "inconclusive", False),
    }  # fmt: skip
    assert {row.note for row in rows if row.cell == "spec"} == {"too few prompts for an interval (2 of at least 5)"}
    assert judged.exit_code(strict=True) == 0
    assert judged.notes == (
        "too few prompts for a verdict on times, which --strict does not fail on: spec; others show the same metrics",
    )
    more = taken(tmp_path / "more", [*GOOD[:6], *(replace(t, cell="spec") for t in GOOD[:6])])
    less = replace(more, cells={**more.cells, "spec": replace(more.cells["spec"], timed=run.cells["spec"].timed)})
    assert gate.judge(less, more).exit_code(strict=True) == gate.INCONCLUSIVE


def test_one_sample_and_none_are_inconclusive(tmp_path: Path) -> None:
    one = taken(tmp_path / "one", [GOOD[0]], CHAIN[:1])
    assert verdicts(gate.judge(one, one))["ar", "decode_tps", ""] == "inconclusive"
    only = gate.Policy(metrics={"decode_tps": gate.Rule()})
    short = {"requests": (request("p0", (7,)),)}, {"requests": (request("p1", (7,)),)}
    sides = [taken(tmp_path / f"{i}", changed(GOOD[:2], i, **cut), CHAIN[:1], only) for i, cut in enumerate(short)]
    [row] = gate.judge(*sides, only).rows
    assert (row.verdict, row.note) == ("inconclusive", "no prompt was measured in both")


def test_a_run_without_trials_has_nothing_to_gate(tmp_path: Path) -> None:
    empty = taken(tmp_path, [])
    assert gate.judge(empty, empty, gate.Policy()).exit_code() == 0  # no trial failed, and that is all there is
    judged = gate.judge(empty, taken(tmp_path / "before"))
    assert judged.exit_code() == gate.NOT_COMPARABLE


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_clock_that_jumped_is_bad_input(tmp_path: Path, seconds: float) -> None:
    jumped = replace(request("p0"), ttft_seconds=seconds)
    with pytest.raises(UserError, match=r"the records are damaged|has times that"):
        taken(tmp_path, changed(GOOD, 0, requests=(jumped,)))


@pytest.mark.parametrize(
    ("clock", "seconds"),
    [
        *(("decode_tps", s) for s in (math.nan, math.inf, -1.0)),
        *(("throughput", s) for s in (math.nan, math.inf, 0, -1)),
    ],
)
def test_the_other_clocks_of_a_trial_may_not_jump_either(tmp_path: Path, clock: str, seconds: float) -> None:
    ended = {"requests": (replace(request("p0"), end_seconds=1.0 + seconds),)}  # the first token came at 1.0
    odd = ended if clock == "decode_tps" else {"wall_seconds": seconds}
    with pytest.raises(UserError, match=r"the records are damaged|has times that"):
        taken(tmp_path, changed(GOOD, 0, **odd), policy=gate.Policy(metrics={clock: gate.Rule()}))


def test_one_trial_in_which_the_clock_leapt_ahead_is_no_regression(tmp_path: Path) -> None:
    noise = np.random.default_rng(2).normal(1, 0.002, (2, len(GOOD)))
    noise[1][2] *= 1000  # the machine was suspended
    now, before = (taken(tmp_path / n, slower(GOOD, row.tolist())) for n, row in zip("ab", noise[::-1], strict=True))
    rows = [row for row in gate.judge(now, before).rows if row.timed and row.cell == "ar"]
    assert {row.verdict for row in rows} == {"inconclusive"}
    assert all(row.detects is not None and row.detects > 1 for row in rows)


def test_a_count_that_is_no_number_is_bad_input(tmp_path: Path) -> None:
    odd = (GOOD[0].forwards[0], forward(1, flops=float("nan")))
    with pytest.raises(UserError, match="flops of a forward of ar is not a finite number; the records are damaged"):
        taken(tmp_path, changed(GOOD, 0, forwards=odd))


# --- Statistics of the verdict ---

quick = settings(max_examples=40, deadline=None)
times = st.lists(st.floats(0.1, 10), min_size=5, max_size=12)


def judged_times(before: Sequence[float], now: Sequence[float], tolerance: float = 0.05) -> gate.Row:
    """The row of decode_tps for these seconds per token, one prompt each."""

    def run(seconds: Sequence[float]) -> gate.Snapshot:
        keys = tuple(f"p{i}/0" for i in range(len(seconds)))
        sample = gate.Sample(1 / float(np.mean(seconds)), keys, tuple(range(len(seconds))), tuple(seconds))
        only = gate.CellSnapshot("", True, {}, {"decode_tps": sample})
        return gate.Snapshot("n", "", "0", "s", "p", {}, {"decode_tps": "d"}, {"device.name": ""}, {"c": only})

    policy = gate.Policy(metrics={"decode_tps": gate.Rule(tolerance=tolerance)})
    return gate.judge(run(now), run(before), policy).rows[0]


@quick
@given(times, st.data())
def test_swapping_run_and_baseline_swaps_regressed_and_improved(before: list[float], data: st.DataObject) -> None:
    now = data.draw(st.lists(st.floats(0.1, 10), min_size=len(before), max_size=len(before)))
    forth, back = judged_times(before, now, 0.0), judged_times(now, before, 0.0)
    swapped = {"regressed": {"improved"}, "improved": {"regressed"}}
    assert back.verdict in swapped.get(forth.verdict, {"ok", "inconclusive"})


@quick
@given(times, st.floats(1.0, 3.0))
def test_being_slower_never_helps(before: list[float], factor: float) -> None:
    noisy = [b * (1 + 0.02 * (-1) ** i) for i, b in enumerate(before)]
    rank = {"improved": 0, "ok": 1, "inconclusive": 2, "regressed": 3}
    one, other = judged_times(before, noisy), judged_times(before, [factor * n for n in noisy])
    assert rank[one.verdict] <= rank[other.verdict]


@quick
@given(times, st.floats(0.001, 1000))
def test_a_unit_of_time_changes_no_verdict(before: list[float], unit: float) -> None:
    now = [b * (1.1 + 0.03 * (-1) ** i) for i, b in enumerate(before)]
    scaled = judged_times([b * unit for b in before], [n * unit for n in now])
    plain = judged_times(before, now)
    assert scaled.verdict == plain.verdict
    assert scaled.change == pytest.approx(plain.change)


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holms_p_lies_between_the_raw_one_and_bonferronis_and_keeps_the_order(raw: list[float]) -> None:
    adjusted = stats.holm(raw)
    assert all(
        p <= a <= min(1, p * len(raw)) + 1e-12 or a == pytest.approx(p) for p, a in zip(raw, adjusted, strict=True)
    )
    ordered = adjusted[np.argsort(raw, kind="stable")]
    assert (np.diff(ordered) >= 0).all()


def test_holm_on_numbers_worked_out_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])


def test_more_times_looked_at_need_a_larger_change(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).normal(1, 0.02, (2, len(GOOD)))
    before, now = (slower(GOOD, row.tolist()) for row in noise)
    alone = gate.Policy(metrics={"decode_tps": gate.Rule()})
    many = gate.judge(taken(tmp_path / "now", now), taken(tmp_path / "before", before)).rows
    one = gate.judge(taken(tmp_path / "now", now), taken(tmp_path / "before", before), alone).rows
    detects = [next(r.detects for r in rows if r.metric == "decode_tps") for rows in (one, many)]
    assert detects[0] < detects[1]  # type: ignore[operator]


# --- Files ---


def test_a_saved_baseline_reads_back_equal(tmp_path: Path) -> None:
    run = taken(tmp_path / "run")
    gate.save(run, tmp_path / "baseline.json")
    assert gate.read(tmp_path / "baseline.json") == run


def test_a_portable_baseline_has_no_machine_and_no_times(tmp_path: Path) -> None:
    policy = gate.Policy(device="any", metrics={"tokens_per_forward": gate.Rule()})
    folder = tmp_path / "run"
    taken(folder)
    portable = gate.snapshot(metrics.load_run(folder), policy)
    assert portable.environment == {} and not portable.cells["ar"].timed
    elsewhere = taken(tmp_path / "gpu", environment={"device": {"backend": "cuda", "name": "GPU"}})
    judged = gate.judge(elsewhere, portable)
    assert judged.exit_code() == 0
    assert {row.metric for row in judged.rows} == {"tokens_per_forward"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not a baseline"),
        ("[]", "does not say that it is one"),
        ('{"kind": "zbench baseline"}', "schema_version"),
        ('{"kind": "zbench baseline", "schema_version": 1, "cells": {}, "odd": 1}', "odd"),
        ('{"kind": "zbench baseline", "schema_version": 1, "cells": {"a": {"exact": []}}}', "not a baseline"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(UserError, match=said) as refused:
        gate.read(tmp_path / "b.json")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [None, "x", 3])
@pytest.mark.parametrize("key", ["definitions", "models", "environment", "scenario", "created", "name", "prompts"])
def test_a_baseline_of_another_shape_is_refused_in_one_line(tmp_path: Path, key: str, value: Any) -> None:
    gate.save(taken(tmp_path / "run"), tmp_path / "b.json")
    damaged = {**json.loads((tmp_path / "b.json").read_text()), key: value}
    (tmp_path / "b.json").write_text(json.dumps(damaged))
    if value == "x" and key in ("scenario", "created", "name", "prompts"):
        assert gate.read(tmp_path / "b.json")
        return
    with pytest.raises(UserError, match=f"not a baseline .{key}: ") as refused:
        gate.read(tmp_path / "b.json")
    assert "\n" not in str(refused.value)


def test_a_nan_in_a_baseline_is_refused(tmp_path: Path) -> None:
    gate.save(taken(tmp_path / "run"), tmp_path / "b.json")
    damaged = json.loads((tmp_path / "b.json").read_text())
    damaged["cells"]["ar"]["exact"]["bytes_per_token"][""] = float("nan")
    (tmp_path / "b.json").write_text(json.dumps(damaged))
    with pytest.raises(UserError, match="finite"):
        gate.read(tmp_path / "b.json")


@pytest.mark.parametrize("seconds", [0, 0.0, -1.0, float("nan"), "1.0", None])
def test_a_time_in_a_baseline_that_cannot_be_is_refused(tmp_path: Path, seconds: Any) -> None:
    gate.save(taken(tmp_path / "run"), tmp_path / "b.json")
    damaged = json.loads((tmp_path / "b.json").read_text())
    damaged["cells"]["ar"]["timed"]["ttft"]["seconds"][0] = seconds
    (tmp_path / "b.json").write_text(json.dumps(damaged))
    with pytest.raises(UserError, match="expected times that are positive and finite"):
        gate.read(tmp_path / "b.json")


def test_last_is_the_newest_earlier_run_of_the_same_scenario(tmp_path: Path) -> None:
    for name, created, scenario in [
        ("a", "2025-01-01", "s"), ("b", "2025-01-02", "s"), ("other", "2025-01-03", "t"), ("c", "2025-01-04", "s"),
        ("later", "2025-01-05", "s"),
    ]:  # fmt: skip
        write(tmp_path / name, GOOD, CHAIN, created=created, scenario_hash=scenario)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    assert gate.last(tmp_path / "c").name == "b"
    with pytest.raises(UserError, match="no earlier run"):
        gate.last(tmp_path / "other")


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("metrics:\n  decode_tpz: {}\n", ":1: metrics: 'decode_tpz' cannot be gated; did you mean 'decode_tps'"),
        ("metrics:\n  ttft: {tolerence: 0.1}\n", ":2: unknown key 'tolerence' in metrics.ttft; did you mean"),
        ("metrics:\n  ttft: {tolerance: -1}\n", ":2: metrics.ttft.tolerance: expected"),
        ("device: any\nmetrics: {ttft: {}}\n", "device: any cannot gate ttft"),
        ("device: any\n", "device: any cannot gate decode_tps, throughput, ttft"),
        ("", "is empty; a policy needs one of device, metrics"),
        ("devise: same\n", "unknown key 'devise' in policy; did you mean 'device'"),
    ],
)  # fmt: skip
def test_a_wrong_policy_is_told_by_its_line(tmp_path: Path, policy: str, said: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(policy)
    with pytest.raises(UserError) as wrong:
        gate.load_policy(path)
    assert said in str(wrong.value)


# --- The command ---


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["gate", *map(str, arguments)])


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """(a regressed run, its baseline)"""
    flipped = changed(GOOD, 9, requests=(request("p3", (0, 1, 2, 3, 4, 6), end=5.0),))
    common: dict[str, Any] = {"environment": ENVIRONMENT, "scenario_hash": "s"}
    write(tmp_path / "before", GOOD, CHAIN, created="2025-01-01", **common)
    write(tmp_path / "now", flipped, CHAIN, created="2025-01-02", **common)
    return tmp_path / "now", tmp_path / "before"


def test_the_command_exits_as_documented(runs: tuple[Path, Path], tmp_path: Path) -> None:
    now, before = runs
    assert command(before, "--baseline", before).exit_code == 0
    failed = command(now, "--baseline", "last")
    assert failed.exit_code == 1
    assert "regressed      spec: output_hash" in failed.stdout
    assert command(now).exit_code == 2
    assert command(tmp_path / "none", "--baseline", before).exit_code == 2
    assert command(now, "--baseline", before, "--write", "xml=a").exit_code == 2
    write(tmp_path / "elsewhere", GOOD, CHAIN, scenario_hash="t")
    assert command(tmp_path / "elsewhere", "--baseline", before).exit_code == 3
    few = [t for t in GOOD if t.group < 3]
    write(tmp_path / "few", few, CHAIN, environment=ENVIRONMENT)
    assert command(tmp_path / "few", "--baseline", tmp_path / "few").exit_code == 0
    assert command(tmp_path / "few", "--baseline", tmp_path / "few", "--strict").exit_code == 4


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_baseline_of_another_schema_is_not_comparable(runs: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    now, before = runs
    path = tmp_path / "saved.json"
    assert command(before, "--save", path).exit_code == 0
    target = path if kind == "file" else before / "run.json"
    data = json.loads(target.read_text())
    target.write_text(json.dumps({**data, "schema_version": 99}))
    result = command(now, "--baseline", path if kind == "file" else before)
    assert result.exit_code == 3
    assert "has schema 99" in result.stderr


def test_a_run_killed_while_writing_is_gated_on_what_it_finished(runs: tuple[Path, Path]) -> None:
    _, before = runs
    now = before.parent / "torn"
    write(now, GOOD, CHAIN, environment=ENVIRONMENT, scenario_hash="s")
    lines = (now / "trials.jsonl").read_text()
    (now / "trials.jsonl").write_text(lines[:-50])
    result = command(now, "--baseline", before, "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == said["exit_code"] == gate.NOT_COMPARABLE
    assert {row["verdict"] for row in said["metrics"] if row["cell"] == "ar"} == {"ok"}


@pytest.mark.parametrize("left", [0.0, 0.3, 0.9])
def test_a_baseline_killed_while_copied_is_one_line(runs: tuple[Path, Path], tmp_path: Path, left: float) -> None:
    now, before = runs
    assert command(before, "--save", tmp_path / "b.json").exit_code == 0
    whole = (tmp_path / "b.json").read_text()
    (tmp_path / "b.json").write_text(whole[: int(left * len(whole))])
    result = command(now, "--baseline", tmp_path / "b.json")
    assert result.exit_code == 2
    assert result.stderr.startswith("zbench: ") and "not a baseline" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_run_killed_before_its_first_trial_has_only_its_plan(runs: tuple[Path, Path]) -> None:
    now, before = runs
    (now / "trials.jsonl").unlink()
    result = command(now, "--baseline", before, "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == said["exit_code"] == gate.NOT_COMPARABLE
    assert {row["note"] for row in said["metrics"] if row["metric"] == "decode_tps"} == {"the run does not have it"}


def test_a_file_system_that_left_zeros_behind_a_crash_costs_the_last_trial_only(runs: tuple[Path, Path]) -> None:
    now, before = runs
    with (now / "trials.jsonl").open("ab") as file:
        file.write(bytes(4096))
    assert command(now, "--baseline", before).exit_code == gate.REGRESSED


def test_an_advisory_metric_is_reported_and_passes(runs: tuple[Path, Path], tmp_path: Path) -> None:
    now, before = runs
    (tmp_path / "policy.yaml").write_text("metrics: {output_hash: {required: false}, tokens_per_forward: {}}")
    result = command(now, "--baseline", before, "--policy", tmp_path / "policy.yaml")
    assert result.exit_code == 0
    assert "(regressed)" in result.stdout and "1 only advisory" in result.stdout


def test_json_carries_every_verdict_with_its_evidence(runs: tuple[Path, Path]) -> None:
    now, before = runs
    said = json.loads(command(now, "--baseline", before, "--json").stdout)
    assert (said["verdict"], said["exit_code"]) == ("regressed", 1)
    assert {field.name for field in dataclasses.fields(gate.Row)} == set(said["metrics"][0])


def test_cells_are_told_apart(tmp_path: Path) -> None:
    only_ar = taken(tmp_path / "now", GOOD[:6], CHAIN[:1])
    judged = gate.judge(only_ar, taken(tmp_path / "before"))
    assert {row.verdict for row in judged.rows if row.cell == "ar"} == {"ok"}
    assert {row.note for row in judged.rows if row.cell == "spec"} == {"the run does not have it"}


def test_the_command_writes_what_ci_reads(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, before = runs
    page = tmp_path / "summary.md"
    page.write_text("earlier step\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    result = command(
        now, "--baseline", before, "--github", "--write", f"junit={tmp_path}/gate.xml",
        "--write", f"bencher={tmp_path}/bmf.json",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "::error title=output_hash regressed::" in result.stdout
    assert page.read_text().startswith("earlier step\n### zbench gate: regressed")
    assert "<failure" in (tmp_path / "gate.xml").read_text()
    assert "ar" in json.loads((tmp_path / "bmf.json").read_text())


def test_the_baseline_of_this_project_is_of_its_scenario_and_of_no_machine() -> None:
    from zbench import scenario

    root = Path(__file__).parents[1]
    baseline = gate.read(root / "reports/baseline/ci_gate.json")
    wanted = scenario.load(root / "scenarios/ci_gate.yaml")
    assert baseline.scenario == scenario.content_hash(wanted), "the scenario changed: take a new baseline"
    assert baseline.portable
    assert set(baseline.cells) == {cell.id for cell in scenario.cells(wanted)}
    policy = gate.load_policy(root / "reports/baseline/ci_gate.policy.yaml")
    assert set(baseline.definitions) == set(policy.metrics)


@pytest.mark.slow
def test_this_code_still_does_what_its_baseline_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from zbench import run, scenario
    from zbench.hardware import roofs

    monkeypatch.setattr(roofs, "load_or_measure", lambda *_, **__: {"bandwidth": {}, "flops": {}, "ridge": {}})
    root = Path(__file__).parents[1]
    outcome = run.run(scenario.load(root / "scenarios/ci_gate.yaml"), tmp_path, Console(quiet=True))
    policy = gate.load_policy(root / "reports/baseline/ci_gate.policy.yaml")
    judged = gate.judge(gate.read(outcome.folder, policy), gate.read(root / "reports/baseline/ci_gate.json"), policy)
    assert (judged.reasons, [row for row in judged.rows if row.verdict != "ok"]) == ((), [])
