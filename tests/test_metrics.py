"""Every metric against numbers worked out by hand, and against what must hold for any records."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zbench import metrics
from zbench.errors import UserError
from zbench.records import (
    SCHEMA_VERSION,
    CellRecord,
    ForwardRecord,
    LosslessCheck,
    Manifest,
    RequestRecord,
    RoofSample,
    ServedRecord,
    ServerRecord,
    Speculation,
    StepRecord,
    TrialRecord,
)

ROOFS = {
    "bandwidth": {"read": {"value": 1000.0, "low": 990.0, "high": 1010.0, "n": 9, "unit": "B/s"}},
    "flops": {"bfloat16": {"value": 10000.0, "low": 9900.0, "high": 10100.0, "n": 9, "unit": "FLOP/s"}},
}
SPECS = {"name": "Invented", "bandwidth": 2000.0, "flops": {"bfloat16": 40000.0}}


def cell(label: str = "ar", engine: str = "autoregressive", **changes: Any) -> CellRecord:
    planned = CellRecord(
        id=label, label=label, engine=engine, options={}, point={}, model="m", dtype="bfloat16", device="cpu", batch=1,
        context=None, output_tokens=3, sampling={"temperature": 0}, baseline=label == "ar",
    )  # fmt: skip
    return dataclasses.replace(planned, **changes)


def request(prompt: str = "p0", ids: Sequence[int] = (7, 8, 9), ttft: float = 1.0, end: float = 3.0) -> RequestRecord:
    return RequestRecord(prompt, "chat", 10, tuple(ids), f"hash of {tuple(ids)}", "text", "length", ttft, end, 0)


def forward(step: int, role: Any = "decode", **changes: Any) -> ForwardRecord:
    """200 bytes and 400 FLOPs in 0.4 s: half of the measured bandwidth, a tenth of the measured rate."""
    usual = ForwardRecord(
        step=step, model="target", role=role, rows=1, batch=1, context=10.0, flops=400.0, bytes_read=190.0,
        bytes_written=10.0, seconds=0.4, committed=1,
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)


def trial(label: str = "ar", group: int = 0, repeat: int = 0, **changes: Any) -> TrialRecord:
    """Three tokens in a prefill of 1.0 s and two steps of 1.0 s, of which the forward takes 0.4 s."""
    usual = TrialRecord(
        cell=label, group=group, repeat=repeat, order=group, status="ok", started="", wall_seconds=3.0,
        requests=(request(f"p{group}"),),
        steps=(StepRecord(1.0, 0.1, 0.1, (1,)), StepRecord(1.0, 0.1, 0.2, (1,)), StepRecord(1.0, 0.1, 0.2, (1,))),
        forwards=(forward(0, "prefill", rows=10), forward(1), forward(2)),
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)


def write(folder: Path, trials: Sequence[TrialRecord], cells: Sequence[CellRecord] = (cell(),), **changes: Any) -> Path:
    manifest = Manifest(
        schema_version=SCHEMA_VERSION, zbench_version="0", created="2025-01-01", name="n", description="", command="",
        scenario={}, scenario_hash="", cells=tuple(cells), environment={}, environment_hash="", prompts_hash="",
        models={}, roofs=ROOFS, specs=None,
    )  # fmt: skip
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "run.json").write_text(dataclasses.replace(manifest, **changes).to_json())
    (folder / "trials.jsonl").write_text("".join(t.to_json() + "\n" for t in trials))
    return folder


@pytest.fixture
def measure(tmp_path: Path) -> Any:
    """(trials, cells) -> {(cell, metric, part): row}"""

    def summarise(
        trials: Sequence[TrialRecord], cells: Sequence[CellRecord] = (cell(),), **changes: Any
    ) -> dict[tuple[str, str, str], metrics.MetricRow]:
        run = metrics.load_run(write(tmp_path, trials, cells, **changes))
        return {(row.cell, row.metric, row.part): row for row in metrics.summarise(run)}

    return summarise


@pytest.mark.parametrize(
    ("metric", "part", "value"),
    [
        ("failed_trials", "", 0.0),
        ("ttft", "", 1.0),
        ("tpot", "", 1.0),
        ("decode_tps", "", 1.0),
        ("throughput", "", 1.0),
        ("tokens_per_forward", "", 1.0),
        ("tokens_per_weighted_forward", "", 1.0),
        ("phase_seconds", "prefill", 0.4),
        ("phase_seconds", "decode", 0.8),
        ("phase_seconds", "accept", 0.3),
        ("phase_seconds", "commit", 0.5),
        ("phase_seconds", "host gap", 1.0),
        ("forward_seconds", "decode, 1 row", 0.4),
        ("intensity", "decode, 1 row", 2.0),
        ("achieved_bandwidth", "decode, 1 row", 500.0),
        ("achieved_flops", "decode, 1 row", 1000.0),
        ("mbu", "decode, 1 row", 0.5),
        ("mfu", "decode, 1 row", 0.1),
        ("mbu_spec", "decode, 1 row", 0.25),
        ("mfu_spec", "decode, 1 row", 0.025),
        ("floor_seconds", "decode, 1 row", 0.2),
        ("forwards_per_sequence", "target", 2.0),
        ("rows_per_forward", "decode", 1.0),
        ("bytes_per_token", "", 200.0),
        ("flops_per_token", "", 400.0),
        ("peak_bytes", "", 77.0),
        ("step_seconds", "", 1.0),
        ("predicted_step_seconds", "", 0.2),
    ],
)
def test_a_metric_is_what_its_formula_says(measure: Any, metric: str, part: str, value: float) -> None:
    row = measure([trial(peak_bytes=77)], specs=SPECS)["ar", metric, part]
    assert row.value == pytest.approx(value)
    assert (row.formula, row.unit) == (metrics.METRICS[metric].formula, metrics.METRICS[metric].unit)


def test_experts_per_forward_are_those_the_router_hit_and_a_dense_model_has_none(measure: Any) -> None:
    routed = (
        forward(0, "prefill", rows=10, experts=6.5),
        forward(1, "draft", model="drafter"),
        forward(1, experts=1.0),
        forward(2, experts=2.0),
    )
    rows = measure([trial(forwards=routed)])
    assert rows["ar", "experts_per_forward", "prefill"].value == 6.5
    assert rows["ar", "experts_per_forward", "decode, 1 row"].value == 1.5
    assert rows["ar", "experts_per_forward", "draft, 1 row"].note == "unavailable: the model of this forward is dense"
    assert "dense" in measure([trial()])["ar", "experts_per_forward", ""].note


def test_a_trial_written_before_experts_were_counted_is_still_read() -> None:
    written = json.loads(trial().to_json())
    assert "experts" not in written["forwards"]  # nor is it written where no forward has any
    assert TrialRecord.from_json(json.dumps(written)) == trial()


def test_every_registered_metric_has_a_row_for_every_cell_also_when_nothing_ran(measure: Any) -> None:
    rows = measure([], [cell(), cell("other", "reference")])
    assert {(c, m) for c, m, _ in rows} == {(c, m) for c in ("ar", "other") for m in metrics.METRICS}
    unknown = [row for row in rows.values() if row.metric != "failed_trials"]
    assert all(row.value is None and row.note == "unavailable: no trial was run" for row in unknown)


def test_one_prompt_gives_values_without_intervals(measure: Any) -> None:
    row = measure([trial()])["ar", "tpot", ""]
    assert (row.value, row.low, row.high, row.n) == (1.0, None, None, 1)


def test_tokens_that_came_with_the_prompt_are_not_those_of_later_time(measure: Any) -> None:
    """As where a peer verifies drafts with the prompt: two tokens in the first step, one after it."""
    steps = (StepRecord(1.0, 0.1, 0.1, (2,)), StepRecord(2.0, 0.1, 0.2, (1,)))
    peer = trial("p", steps=steps, forwards=())
    rows = measure([trial(), peer], (cell(), cell("p", "reference")))
    assert rows["p", "decode_tps", ""].value == pytest.approx(1 / 2) and rows["p", "tpot", ""].value == 2
    assert rows["p", "speedup", ""].value == pytest.approx(1 / 2)
    whole = dataclasses.replace(peer, steps=(StepRecord(3.0, 0.1, 0.1, (3,)),))
    assert measure([trial(), whole], (cell(), cell("p", "reference")))["p", "tpot", ""].value is None


def test_a_single_token_has_no_time_per_token(measure: Any) -> None:
    alone = trial(requests=(request(ids=(7,), end=1.0),), steps=(StepRecord(1.0, 0, 0, (1,)),), forwards=())
    row = measure([alone])["ar", "tpot", ""]
    assert row.value is None
    assert row.note == "unavailable: no request emitted a token after the first step"


def test_a_prefill_alone_has_no_decode_step_to_split(measure: Any) -> None:
    alone = trial(requests=(request(ids=(7,), end=1.0),), steps=(StepRecord(1.0, 0, 0, (1,)),), forwards=(forward(0),))
    assert measure([alone])["ar", "switching_seconds", ""].value is None


def test_a_baseline_of_single_tokens_says_what_it_cannot_give(measure: Any) -> None:
    alone = trial(requests=(request(ids=(7,), end=1.0),), steps=(StepRecord(1.0, 0, 0, (1,)),), forwards=(forward(0),))
    rows = measure([alone, drafting_trial()], [cell(), cell("spec", "chain")])
    assert rows["spec", "tokens_per_forward", ""].value == 2
    assert rows["spec", "tokens_per_weighted_forward", ""].note == (
        "unavailable: no request of the autoregressive baseline emitted a second token"
    )


def test_a_trial_without_forwards_beside_others_gives_no_figure_of_them(measure: Any) -> None:
    rows = measure([trial(), trial(group=1, forwards=())])
    for name in ("tokens_per_forward", "tokens_per_weighted_forward", "bytes_per_token", "predicted_step_seconds"):
        assert rows["ar", name, ""].note == "unavailable: 1 of 2 trials have no forwards"
    assert rows["ar", "decode_tps", ""].value == 1.0


def test_forwards_whose_steps_gained_nothing_are_no_bytes_per_token(measure: Any) -> None:
    nothing = (StepRecord(1.0, 0, 0, (3,)), StepRecord(1.0, 0, 0, (0,)), StepRecord(1.0, 0, 0, (0,)))
    rows = measure([trial(), trial(group=1, steps=nothing)])
    assert rows["ar", "bytes_per_token", ""].note == "unavailable: 1 of 2 groups of prompts have nothing to divide by"


def test_failed_trials_are_counted_and_left_out_of_everything_else(measure: Any) -> None:
    broken = trial(group=1, status="error", error="out of memory\nTraceback", requests=(), steps=(), forwards=())
    rows = measure([trial(), broken])
    assert rows["ar", "failed_trials", ""].value == 1
    assert rows["ar", "failed_trials", ""].status == "error"
    assert rows["ar", "failed_trials", ""].note == "first error: out of memory"
    assert rows["ar", "ttft", ""].n == 1


def test_a_foreign_engine_reports_times_and_says_why_it_reports_no_forwards(measure: Any) -> None:
    rows = measure([trial(), trial("hf", forwards=())], [cell(), cell("hf", "reference")])
    assert rows["hf", "decode_tps", ""].value == 1.0
    for metric in ("tokens_per_forward", "phase_seconds", "mbu", "bound", "bytes_per_token"):
        assert rows["hf", metric, ""].note == f"unavailable: {metrics.UNSEEN}"


def drafting_trial(label: str = "spec", group: int = 0) -> TrialRecord:
    """Five tokens: one from the prefill, then steps of 3 (2 of 4 drafts kept) and 1 (0 of 4 kept)."""
    steps = (
        StepRecord(1.0, 0, 0, (1,)),
        StepRecord(1.0, 0, 0, (3,), drafted=(4,), accepted=(2,)),
        StepRecord(1.0, 0, 0, (1,), drafted=(4,), accepted=(0,)),
    )
    made = [forward(0, "prefill", rows=10)]
    for step in (1, 2):
        made += [forward(step, "draft", model="drafter", bytes_read=40.0), forward(step, "verify", rows=5)]
    ids = (7, 8, 9, 10, 11)
    return trial(label, group, requests=(request(f"p{group}", ids),), steps=steps, forwards=tuple(made))


def test_a_drafting_engine_is_charged_for_its_drafter(measure: Any) -> None:
    rows = measure([trial(), drafting_trial()], [cell(), cell("spec", "chain")])
    assert rows["spec", "tokens_per_forward", ""].value == 4 / 2
    # Two verifies of 200 bytes and two drafts of 50, against 200 bytes of an autoregressive forward.
    assert rows["spec", "tokens_per_weighted_forward", ""].value == pytest.approx(4 / 2.5)
    assert rows["spec", "draft_acceptance_rate", ""].value == 2 / 8
    assert rows["spec", "forwards_per_sequence", "drafter"].value == 2


def test_a_baseline_that_failed_on_the_only_batch_of_a_size_tells_no_bytes_of_it(measure: Any) -> None:
    """What it read for four sequences does not say what of it were the weights, which two share too."""

    def sized(label: str, group: int, batch: int) -> TrialRecord:
        made = [forward(0, "prefill", batch=batch)]
        made += [forward(i, batch=batch, context=10.0 + i, bytes_read=900.0 + batch * (10 + i)) for i in (1, 2)]
        steps = tuple(StepRecord(1.0, 0, 0, (1,) * batch) for _ in range(3))
        asked = tuple(request(f"p{group}{i}") for i in range(batch))
        return trial(label, group, requests=asked, steps=steps, forwards=tuple(made))

    cells = [cell(batch=4), cell("x", "chain", batch=4)]
    mine = [sized("x", 0, 4), sized("x", 1, 2)]
    whole = measure([sized("ar", 0, 4), sized("ar", 1, 2), *mine], cells)
    assert whole["x", "tokens_per_weighted_forward", ""].value == pytest.approx(1)
    without = measure([sized("ar", 0, 4), *mine], cells)
    assert "too few batches and contexts" in without["x", "tokens_per_weighted_forward", ""].note


def test_a_drafter_whose_cache_lags_is_charged_at_the_context_of_the_step(measure: Any) -> None:
    growing = trial(
        forwards=(forward(0, "prefill"), *(forward(i, context=10.0 * i, bytes_read=90.0 + 100 * i) for i in (1, 2)))
    )
    drafting = drafting_trial()
    lagging = [
        dataclasses.replace(f, context=0.0 if f.model == "drafter" else 10.0 * f.step) for f in drafting.forwards
    ]
    rows = measure([growing, dataclasses.replace(drafting, forwards=tuple(lagging))], [cell(), cell("spec", "chain")])
    # Drafts of 50 and verifies of 200 bytes; an autoregressive forward reads 200 bytes in step 1 and 300 in step 2.
    assert rows["spec", "tokens_per_weighted_forward", ""].value == pytest.approx(4 / (250 / 200 + 250 / 300))


def verifying(
    accepted: Sequence[int],
    label: str = "spec",
    group: int = 0,
    offered: Sequence[int] = (),
    looked_up: Sequence[bool] = (),
    **changes: Any,
) -> TrialRecord:
    """A trial at batch 1 whose steps of 2.0 s accept these of the drafts offered, of 3 unless said: 0.5 s draft, 1.0 s
    verify, 0.5 s else. Where any are looked up, those that are not take 1.0 s."""
    offered = offered or [3] * len(accepted)
    found = [(copied,) for copied in looked_up] or [()] * len(accepted)
    steps = [
        StepRecord(2.0 if all(copied) else 1.0, 0.1, 0.2, (kept + 1,), (drafts,), (kept,), looked_up=copied)
        for kept, drafts, copied in zip(accepted, offered, found, strict=True)
    ]
    made = [forward(0, "prefill", seconds=0.8)]
    for step in range(1, len(steps) + 1):
        made += [forward(step, "draft", model="drafter", seconds=0.5), forward(step, "verify", rows=4, seconds=1.0)]
    tokens = 1 + sum(accepted) + len(accepted)
    usual = trial(
        label, group, requests=(request(f"p{group}", range(tokens), end=1.0 + 2.0 * len(steps)),),
        steps=(StepRecord(1.0, 0.1, 0.1, (1,)), *steps), forwards=tuple(made), wall_seconds=1.0 + 2.0 * len(steps),
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)


CHAIN = (cell(), cell("spec", "chain"))


def test_acceptance_length_counts_the_bonus_over_steps_and_over_requests(measure: Any) -> None:
    rows = measure([trial(), verifying([3, 3, 3]), verifying([0], group=1)], CHAIN)
    assert rows["spec", "acceptance_length", "micro"].value == pytest.approx((4 + 4 + 4 + 1) / 4)
    assert rows["spec", "acceptance_length", "macro"].value == pytest.approx((4 + 1) / 2)


def test_a_request_counts_with_the_mean_of_its_steps(measure: Any) -> None:
    rows = measure([trial(), verifying([3, 0]), verifying([1], group=1)], CHAIN)
    assert rows["spec", "acceptance_length", "micro"].value == pytest.approx((4 + 1 + 2) / 3)
    assert rows["spec", "acceptance_length", "macro"].value == pytest.approx((2.5 + 2) / 2)


def test_acceptance_by_position_is_of_all_steps_and_of_those_that_came_so_far(measure: Any) -> None:
    rows = measure([trial(), verifying([0, 1, 1, 2, 0])], CHAIN)
    assert [rows["spec", "acceptance_histogram", str(i)].value for i in range(4)] == [2, 2, 1, 0]
    assert [rows["spec", "acceptance_at", str(i)].value for i in (1, 2, 3)] == pytest.approx([3 / 5, 1 / 5, 0])
    # Of the last step only the token that ended the output is known, which says nothing of its first draft.
    assert [rows["spec", "conditional_at", str(i)].value for i in (1, 2, 3)] == pytest.approx([3 / 4, 1 / 3, 0])


def test_a_draft_that_was_not_offered_is_not_one_that_was_refused(measure: Any) -> None:
    offered = [3, 1, 2, 3]  # chains that a confidence ended, all accepted as far as they went
    rows = measure([trial(), verifying([3, 1, 2, 1], offered=offered)], CHAIN)
    assert [rows["spec", "acceptance_at", str(i)].value for i in (1, 2, 3)] == pytest.approx([1, 2 / 4, 1 / 4])
    assert [rows["spec", "conditional_at", str(i)].value for i in (1, 2, 3)] == [1, 1, 1]


def test_a_sequence_of_a_batch_ends_on_its_own(measure: Any) -> None:
    """The first ends in step 1, of whose drafts only one is known; the second refuses its second draft there."""
    steps = [
        StepRecord(1.0, 0, 0, (1, 1)),
        StepRecord(1.0, 0, 0, (2, 2), drafted=(2, 2), accepted=(1, 1)),
        StepRecord(1.0, 0, 0, (0, 3), drafted=(0, 2), accepted=(0, 2)),
    ]
    requests = (request("p0", range(3), end=2.0), request("p1", range(6), end=3.0))
    made = (forward(0, "prefill"), *(forward(step, "verify", rows=3) for step in (1, 2)))
    rows = measure(
        [trial(), trial("spec", requests=requests, steps=tuple(steps), forwards=made, wall_seconds=3.0)], CHAIN
    )
    assert [rows["spec", "conditional_at", str(i)].value for i in (1, 2)] == [1, 1 / 2]


def test_a_position_that_no_step_reached_has_no_conditional_acceptance(measure: Any) -> None:
    rows = measure([trial(), verifying([0, 0, 0])], CHAIN)
    assert rows["spec", "acceptance_at", "2"].value == 0
    assert rows["spec", "conditional_at", "2"].value is None


@pytest.mark.parametrize(
    ("options", "longest"),
    [
        ({"depth": 2}, 2),
        ({"block": 4, "tokens": 9}, 3),
        ({"block_size": 3, "tokens": 9}, 2),
        ({"block": 8, "tokens": 3}, 3),
        ({"block": None, "tokens": 9}, 2),  # the drafter's own: as far as was seen
        ({"block": 4, "tokens": None}, 3),
    ],
)
def test_the_positions_of_a_tree_are_its_depths(measure: Any, options: dict[str, Any], longest: int) -> None:
    offered = [options.get("tokens") or 3] * 2
    rows = measure([trial(), verifying([2, 1], offered=offered)], [cell(), cell("spec", "tree", options=options)])
    positions = [part for _, name, part in rows if name == "acceptance_at" and part]
    assert positions == [str(i) for i in range(1, longest + 1)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 3).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1, max_size=12))
def test_the_views_of_acceptance_agree(tmp_path_factory: pytest.TempPathFactory, found: list[tuple[int, int]]) -> None:
    accepted, offered = [kept for kept, _ in found], [drafts for _, drafts in found]
    folder = write(tmp_path_factory.mktemp("run"), [trial(), verifying(accepted, offered=offered)], CHAIN)
    rows = metrics.summarise(metrics.load_run(folder))
    mine = {(row.metric, row.part): row.value for row in rows if row.cell == "spec"}
    positions = range(1, max(offered) + 1)
    at = [mine["acceptance_at", str(i)] for i in positions]
    counts = [mine["acceptance_histogram", str(i)] for i in (0, *positions)]
    assert mine["acceptance_length", "micro"] == pytest.approx(1 + sum(at))
    assert sum(counts) == len(accepted) and sum(i * n for i, n in enumerate(counts)) == sum(accepted)
    # One by one: a draft after those accepted was refused, unless there was none or the output ended there.
    right, wrong = Counter[int](), Counter[int]()
    for step, (kept, drafts) in enumerate(found, start=1):
        right.update(range(1, kept + 1))
        if kept < drafts and step < len(found):
            wrong[kept + 1] += 1
    for i in positions:
        judged = right[i] + wrong[i]
        assert mine["conditional_at", str(i)] == (pytest.approx(right[i] / judged) if judged else None)


def test_without_drafts_there_is_no_acceptance(measure: Any) -> None:
    rows = measure([trial()])
    for name in (
        "acceptance_length",
        "acceptance_at",
        "conditional_at",
        "acceptance_histogram",
        "break_even_acceptance",
    ):
        assert rows["ar", name, ""].note == "unavailable: no step reports draft tokens"


def test_break_even_is_the_median_step_over_the_baselines_and_flags_what_gains_less(measure: Any) -> None:
    baseline = [trial(group=g) for g in range(5)]
    poor = measure([*baseline, *(verifying([0, 0], group=g) for g in range(5))], CHAIN)[
        "spec", "break_even_acceptance", ""
    ]
    assert (poor.value, poor.low, poor.high, poor.n) == (2.0, 2.0, 2.0, 5)
    assert poor.note == "net-negative: a step gains less than it costs"
    even = measure([*baseline, *(verifying([1, 1], group=g) for g in range(5))], CHAIN)[
        "spec", "break_even_acceptance", ""
    ]
    assert (even.value, even.note) == (2.0, "")


def test_a_step_that_may_gain_what_it_costs_is_not_net_negative(measure: Any) -> None:
    """Steps of 1.5 to 2.5 s against 1 s gain 2 tokens: no less than the lowest that they may have to."""
    dear = [
        dataclasses.replace(made, steps=tuple(dataclasses.replace(s, seconds=s.seconds * factor) for s in made.steps))
        for group, factor in enumerate((0.75, 0.85, 0.95, 1.05, 1.15, 1.25))
        for made in [verifying([1, 1], group=group)]
    ]
    needed = measure([*(trial(group=g) for g in range(6)), *dear], CHAIN)["spec", "break_even_acceptance", ""]
    assert needed.low is not None and needed.high is not None and needed.low < 2 < needed.high
    assert needed.note == ""


def test_what_steps_without_drafts_gain_counts_where_an_engine_breaks_even(measure: Any) -> None:
    baseline = [trial(group=g) for g in range(5)]
    poor = measure([*baseline, *(verifying([1, 0], group=g, offered=[3, 0]) for g in range(5))], CHAIN)
    assert poor["spec", "acceptance_length", "micro"].value == 2.0  # of the steps that had drafts
    needed = poor["spec", "break_even_acceptance", ""]
    assert (needed.value, needed.note) == (2.0, "net-negative: a step gains less than it costs")


def test_steps_that_look_their_drafts_up_are_counted_beside_the_others(measure: Any) -> None:
    looking = {"offered": [4, 0, 2, 0], "looked_up": [True, False, True, False]}
    trials = [verifying([3, 0, 1, 0], group=g, **looking) for g in range(5)]
    of_lookup = (cell(), cell("spec", "prompt_lookup", options={"match": 1, "tokens": 8}))
    rows = measure([*(trial(group=g) for g in range(5)), *trials], of_lookup)
    assert rows["spec", "lookup_share", ""].value == 0.5
    assert rows["spec", "lookup_acceptance_length", ""].value == pytest.approx((4 + 2) / 2)
    assert rows["spec", "acceptance_length", "micro"].value == pytest.approx((4 + 2) / 2)
    # Half of the steps find nothing, take half as long and gain one token: 8 tokens in 4 steps that cost 1.5 each.
    needed = rows["spec", "break_even_acceptance", ""]
    assert (needed.value, needed.note) == (1.5, "")
    poor = (verifying([1, 0, 0, 0], group=g, **looking) for g in range(5))
    dearer = measure([*(trial(group=g) for g in range(5)), *poor], of_lookup)
    assert dearer["spec", "acceptance_length", "micro"].value == 1.5  # of the steps that found something
    assert dearer["spec", "break_even_acceptance", ""].note == "net-negative: a step gains less than it costs"


def test_break_even_is_of_medians_where_steps_are_alike_and_else_of_means(measure: Any) -> None:
    baseline = [trial(group=g) for g in range(5)]
    looking = {"offered": [4, 0, 0, 0], "looked_up": [True, False, False, False]}  # 2.0 s, then 1.0 s each
    of_lookup = (cell(), cell("spec", "prompt_lookup", options={"match": 1, "tokens": 8}))
    unlike = measure([*baseline, *(verifying([3, 0, 0, 0], group=g, **looking) for g in range(5))], of_lookup)
    assert unlike["spec", "break_even_acceptance", ""].value == pytest.approx(1.25)
    alike = [verifying([1, 1, 1], group=g) for g in range(5)]
    late = [replace_last_step(made, seconds=9.0) for made in alike]
    assert measure([*baseline, *late], CHAIN)["spec", "break_even_acceptance", ""].value == pytest.approx(2.0)


def replace_last_step(made: TrialRecord, **changes: Any) -> TrialRecord:
    *before, last = made.steps
    return dataclasses.replace(made, steps=(*before, dataclasses.replace(last, **changes)))


def test_an_engine_that_looks_nothing_up_has_no_share_of_it(measure: Any) -> None:
    rows = measure([trial(), verifying([1, 1])], CHAIN)
    assert rows["spec", "lookup_share", ""].note == "unavailable: the engine looks nothing up"
    rows = measure([trial(), verifying([0, 0], looked_up=[False, False])], CHAIN)
    assert rows["spec", "lookup_share", ""].value == 0
    assert rows["spec", "lookup_acceptance_length", ""].note == "unavailable: no end of a text stood there before"


def test_the_positions_of_prompt_lookup_are_those_it_offered(measure: Any) -> None:
    looking = {"offered": [8, 0, 4], "looked_up": [True, False, True]}
    of_lookup = (cell(), cell("spec", "prompt_lookup", options={"match": 1, "tokens": 8}))
    rows = measure([trial(), verifying([2, 0, 0], **looking)], of_lookup)
    at = {part: rows["spec", name, part].value for _, name, part in rows if name == "acceptance_at" and part}
    assert at == {"1": 0.5, "2": 0.5, **{str(i): 0.0 for i in range(3, 9)}}


def test_the_depth_of_a_tree_of_an_unknown_block_is_not_that_of_a_lookup(measure: Any) -> None:
    looking = {"offered": [16, 10, 16, 16], "looked_up": [False, True, False, False]}
    of_tree = (cell(), cell("spec", "dflash", options={"block": None, "tokens": 16, "lookup": 2}))
    rows = measure([trial(), verifying([2, 10, 2, 0], **looking)], of_tree)
    assert rows["spec", "conditional_at", "2"].value == 1.0
    assert rows["spec", "conditional_at", "3"].value == 1.0  # only the lookup reached so far and was offered more


def test_a_tree_is_not_offered_what_a_longer_lookup_was(measure: Any) -> None:
    """Nodes of a tree are not places of a path: only what was copied may go deeper than the engine drafts."""
    looking = {"offered": [16, 16, 10, 16], "looked_up": [False, False, True, False]}
    of_tree = (cell(), cell("spec", "eagle3", options={"depth": 4, "top_k": 4, "tokens": 16, "lookup": 2}))
    rows = measure([trial(), verifying([4, 4, 10, 0], **looking)], of_tree)
    found = {
        part: rows["spec", "conditional_at", part].value for _, name, part in rows if name == "conditional_at" and part
    }
    assert found["1"] == 1.0  # the last step was not judged
    assert all(found[str(i)] == 1.0 for i in range(2, 11))


def test_without_an_autoregressive_baseline_nothing_says_what_breaks_even(measure: Any) -> None:
    row = measure([verifying([1])], CHAIN[1:])["spec", "break_even_acceptance", ""]
    assert row.note == "unavailable: no autoregressive baseline was run at this point of the matrix"


def test_switching_is_what_the_forwards_leave_of_a_decode_step(measure: Any) -> None:
    rows = measure([trial(), verifying([1, 2])], CHAIN)
    assert rows["spec", "switching_seconds", ""].value == pytest.approx(2.0 - 0.5 - 1.0)
    assert rows["ar", "switching_seconds", ""].value == pytest.approx(1.0 - 0.4)


def test_the_drafters_prefill_is_prefill_and_no_draft(measure: Any) -> None:
    one = verifying([1])
    reading = forward(0, "draft", model="drafter", rows=10, seconds=0.1)
    rows = measure([trial(), dataclasses.replace(one, forwards=(one.forwards[0], reading, *one.forwards[1:]))], CHAIN)
    assert rows["spec", "phase_seconds", "prefill"].value == pytest.approx(0.9)
    assert rows["spec", "phase_seconds", "draft"].value == pytest.approx(0.5)
    assert rows["spec", "forward_seconds", "drafter prefill"].value == pytest.approx(0.1)


def test_categories_are_told_apart_where_there_are_several(measure: Any) -> None:
    code = dataclasses.replace(request("p1", range(3), end=5.0), category="code")
    both = [trial(), trial(group=1), verifying([1]), verifying([0, 0], group=1, requests=(code,))]
    rows = measure(both, CHAIN)
    assert rows["spec", "category_acceptance_length", "chat"].value == 2
    assert rows["spec", "category_acceptance_length", "code"].value == 1
    # chat: 2 tokens in 2.0 s against 2 in 2.0 s; code: 2 tokens in 4.0 s.
    assert rows["spec", "category_speedup", "chat"].value == pytest.approx(1.0)
    assert rows["spec", "category_speedup", "code"].value == pytest.approx(0.5)
    unfinished = measure([trial(), trial(group=1, requests=(code,)), *both[2:], verifying([1], group=2, requests=(
        dataclasses.replace(code, prompt_id="p2", category="math"),))], CHAIN)  # fmt: skip
    assert unfinished["spec", "category_acceptance_length", "math"].value == 2
    assert unfinished["spec", "category_speedup", "math"].note == (
        "unavailable: no prompt of this category ended both here and in the baseline"
    )
    of_one = measure([trial(), *both[2:]], CHAIN)
    assert of_one["spec", "category_speedup", "chat"].value == pytest.approx(1.0)
    assert of_one["spec", "category_speedup", "code"].value is None
    undrafted = trial("spec", 1, requests=(code,))
    rows = measure([trial(), trial(group=1, requests=(code,)), verifying([1]), undrafted], CHAIN)
    assert rows["spec", "category_acceptance_length", "chat"].value == 2
    assert rows["spec", "category_speedup", "code"].value == pytest.approx(1.0)
    assert rows["spec", "category_acceptance_length", "code"].note == (
        "unavailable: nothing was drafted on the prompts of this category"
    )
    alone = measure([trial(), verifying([1])], CHAIN)["spec", "category_speedup", ""]
    assert alone.note == "unavailable: the prompts are all of one category"


def test_synthetic_acceptance_is_said_with_every_number_and_its_tokens_are_compared_with_nothing(measure: Any) -> None:
    options = {"synthetic": {"length": 2.0}, "drafter": {"random": True, "seed": 0}}
    rows = measure([trial(), verifying([1, 1])], [cell(), cell("spec", "chain", options=options)])
    assert {row.caveat for (name, *_), row in rows.items() if name == "spec"} == {
        "synthetic acceptance, random drafter"
    }
    assert {row.caveat for (name, *_), row in rows.items() if name == "ar"} == {""}
    for name in ("agreement", "lossless"):
        assert rows["spec", name, ""].note == "unavailable: acceptance is synthetic, so the tokens are not the target's"
    assert "same tokens" not in rows["spec", "speedup", ""].note


def test_tokens_are_not_compared_with_those_of_a_synthetic_baseline_either(measure: Any) -> None:
    drawn = cell("ar", "eagle3", options={"synthetic": {"length": 2.0}})
    row = measure([trial(), trial("x")], [drawn, cell("x", "chain")])["x", "agreement", ""]
    assert row.note == "unavailable: acceptance is synthetic, so the tokens are not the target's"


def test_speedup_pairs_prompts_and_compares_seconds_per_token(measure: Any) -> None:
    # The candidate needs 1/2 and 1/8 of the baseline's time: a geometric mean of 4, where the ratio of means is 3.2.
    fast = [
        trial("x", 0, requests=(request("p0", end=2.0),)),
        trial("x", 1, requests=(request("p1", end=1.25),)),
        trial("x", 2, requests=(request("p2", end=1.25),)),
    ]
    rows = measure([trial(), trial(group=1), *fast], [cell(), cell("x", "chain")])
    assert rows["x", "speedup", ""].value == pytest.approx(4.0)
    assert rows["x", "speedup", ""].n == 2
    assert rows["ar", "speedup", ""].note == "unavailable: this is the baseline"


def test_speedup_says_when_the_tokens_differ(measure: Any) -> None:
    other = trial("x", requests=(request("p0", (7, 1, 1)),))
    note = measure([trial(), other], [cell(), cell("x", "chain")])["x", "speedup", ""].note
    assert "0 of 1 pairs emitted the same tokens" in note


def test_speedup_says_how_many_requests_have_a_pair(measure: Any) -> None:
    short = trial(group=1, requests=(request("p1", (7,), end=1.0),))
    rows = measure([trial(), short, *(trial("x", group) for group in range(3))], [cell(), cell("x", "chain")])
    assert rows["x", "speedup", ""].note.endswith(
        "1 of 3 requests that go on after their first step are paired; the others end with the first step in the"
        " baseline, or have no result of it"
    )
    both = [trial(label, group) for label in ("ar", "x") for group in range(3)]
    both += [dataclasses.replace(short, cell=label, group=3) for label in ("ar", "x")]  # of one token on both sides
    assert "paired" not in measure(both, [cell(), cell("x", "chain")])["x", "speedup", ""].note


def test_a_baseline_at_another_point_is_no_baseline(measure: Any) -> None:
    cells = [cell(point={"batch": 1}), cell("x", "chain", point={"batch": 2})]
    row = measure([trial(), trial("x")], cells)["x", "speedup", ""]
    assert row.note == "unavailable: no baseline was run at this point of the matrix"


def test_agreement_counts_tokens_up_to_the_first_divergence(measure: Any) -> None:
    other = trial("x", requests=(request("p0", (7, 1, 9)),))
    rows = measure([trial(), other], [cell(), cell("x", "chain")])
    assert rows["x", "agreement", "tokens"].value == pytest.approx(1 / 3)
    assert rows["x", "agreement", "prompts"].value == 0
    assert "near-equal logits" in rows["x", "agreement", "prompts"].note


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("exact", "in bfloat16 two near-equal logits can swap under another order of summation"),
        ("near-tie", "in bfloat16 two near-equal logits can swap under another order of summation"),
        ("different", ""),
        (None, "in bfloat16 two near-equal logits can swap under another order of summation, which was not checked"),
    ],
)
def test_rounding_is_the_reason_for_other_tokens_only_where_no_check_found_more(
    measure: Any, verdict: Any, said: str
) -> None:
    check = LosslessCheck(verdict, 1, 8, 0.5) if verdict else None
    other = trial("x", requests=(dataclasses.replace(request("p0", (7, 1, 9)), check=check),))
    note = measure([trial(), other], [cell(), cell("x", "chain")])["x", "agreement", "prompts"].note
    assert note.partition("; ")[2] == said


def test_the_first_difference_is_the_earliest_position_of_another_token(measure: Any) -> None:
    trials = [trial(group=0), trial(group=1), trial("x", group=0), trial("x", group=1)]
    same = measure(trials, [cell(), cell("x", "chain")])["x", "first_difference", ""]
    assert (same.value, same.note) == (None, "unavailable: every output is the baseline's")
    trials[2:] = [trial("x", group=g, requests=(request("p0", ids),)) for g, ids in enumerate([(7, 8, 1), (7, 1, 9)])]
    row = measure(trials, [cell(), cell("x", "chain")])["x", "first_difference", ""]
    assert row.value == 2 and "outputs differ somewhere" in row.note


@pytest.mark.parametrize("server", ["ar", "eagle3"])
def test_prompts_that_a_server_got_with_a_prefix_of_their_own_agree_with_nothing(measure: Any, server: str) -> None:
    """Whichever of the two is the server: the baseline may be one."""
    trials = [trial(label, kernels={"prefix cache": "unique"} if label == server else {}) for label in ("ar", "eagle3")]
    rows = measure(trials, (cell(), cell("eagle3", "eagle3")))
    for label, name in (("eagle3", "agreement"), ("eagle3", "first_difference")):
        assert "a prefix of its own" in rows[label, name, ""].note


def test_a_longer_output_does_not_agree_with_its_prefix(measure: Any) -> None:
    other = trial("x", requests=(request("p0", (7, 8, 9, 10)),))
    assert measure([trial(), other], [cell(), cell("x", "chain")])["x", "agreement", "tokens"].value == 3 / 4


def test_sampled_outputs_are_not_expected_to_agree(measure: Any) -> None:
    cells = [cell(), cell("x", "chain", sampling={"temperature": 0.8})]
    assert measure([trial(), trial("x")], cells)["x", "agreement", ""].value is None


@pytest.mark.parametrize(
    ("seconds", "flops", "bound"), [(0.3, 400.0, "memory"), (0.3, 2500.0, "compute"), (0.41, 400.0, "overhead")]
)
def test_a_forward_is_bound_by_the_larger_term_unless_it_takes_twice_the_floor(
    measure: Any, seconds: float, flops: float, bound: str
) -> None:
    made = (forward(1, flops=flops, seconds=seconds), forward(2, flops=flops, seconds=seconds))
    assert measure([trial(forwards=made)])["ar", "bound", "decode, 1 row"].value == bound


def test_communication_in_decode_leaves_the_prefill_out(measure: Any) -> None:
    talking = [
        forward(0, "prefill", rows=10, collective_bytes=90.0, collective_seconds=0.36),
        *(forward(step, collective_bytes=10.0, collective_seconds=0.1) for step in (1, 2)),
    ]
    rows = measure([trial(forwards=tuple(talking))], (cell(tensor=2),))
    parts = {part: rows["ar", name, part].value for _, name, part in rows if name == "communication_share"}
    assert parts == pytest.approx({"decode": 0.25, "prefill": 0.9, "decode, 1 row": 0.25})


@pytest.mark.parametrize(("seconds", "status"), [(0.2, "ok"), (0.191, "ok"), (0.19, "error"), (0.1, "error")])
def test_more_than_105_percent_of_a_roof_is_an_error_and_is_not_clipped(
    measure: Any, seconds: float, status: str
) -> None:
    made = (forward(1, seconds=seconds), forward(2, seconds=seconds))
    row = measure([trial(forwards=made)])["ar", "mbu", "decode, 1 row"]
    assert row.value == pytest.approx(0.2 / seconds)
    assert row.status == status
    assert ("the roof or the count is wrong" in row.note) == (status == "error")


def sampled(folder: Path, *values: float | None) -> Path:
    """With samples of the read roof, in B/s; None is one that could not be taken."""
    samples = [
        RoofSample(f"2025-01-01T00:00:{i:02}", 0.1, value, value, value, 5 if value else 0, "" if value else "full")
        for i, value in enumerate(values)
    ]
    (folder / "roofs.jsonl").write_text("".join(sample.to_json() + "\n" for sample in samples))
    return folder


def rows_of(folder: Path) -> dict[tuple[str, str], metrics.MetricRow]:
    return {(row.metric, row.part): row for row in metrics.summarise(metrics.load_run(folder))}


def test_the_read_roof_of_a_run_is_the_median_of_its_samples(tmp_path: Path) -> None:
    before = rows_of(write(tmp_path / "a", [trial()]))
    after = rows_of(sampled(write(tmp_path / "b", [trial()]), 1000.0, 1600.0, 2000.0, None))
    kind, roof = "decode, 1 row", ROOFS["bandwidth"]["read"]["value"]
    assert before["mbu", kind].value == pytest.approx(500 / roof)
    assert after["mbu", kind].value == pytest.approx(500 / 1600)
    assert after["floor_seconds", kind].value == pytest.approx(
        max(200 / 1600, 400 / ROOFS["flops"]["bfloat16"]["value"])
    )
    assert after["predicted_step_seconds", ""].value == pytest.approx(after["floor_seconds", kind].value)
    assert after["mfu", kind].value == before["mfu", kind].value
    run = metrics.load_run(tmp_path / "b")
    assert run.manifest.roofs == ROOFS
    assert run.roofs is not None and run.read_roof is not None
    assert [run.read_roof[key] for key in ("value", "low", "high", "n", "sampled")] == [1600.0, 1000.0, 2000.0, 3, True]
    assert run.roofs["ridge"]["bfloat16"] == ROOFS["flops"]["bfloat16"]["value"] / 1600


@pytest.mark.parametrize("values", [(), (None, None)])
def test_without_a_sample_the_read_roof_is_that_measured_before(tmp_path: Path, values: tuple[None, ...]) -> None:
    plain = metrics.summarise(metrics.load_run(write(tmp_path, [trial()])))
    assert metrics.summarise(metrics.load_run(sampled(tmp_path, *values))) == plain


@pytest.mark.parametrize(("highest", "status"), [(480.0, "ok"), (476.0, "error")])
def test_more_than_a_roof_that_drifts_is_wrong_only_beyond_its_highest_sample(
    tmp_path: Path, highest: float, status: str
) -> None:
    folder = sampled(write(tmp_path, [trial()]), 400.0, 400.0, highest)  # forwards reach 500
    row = rows_of(folder)["mbu", "decode, 1 row"]
    assert (row.value, row.status) == (pytest.approx(1.25), status)
    said = "which reached 120% of its median" if status == "ok" else "the roof or the count is wrong"
    assert said in row.note


def test_a_torn_sample_is_left_out_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    file = sampled(write(tmp_path, [trial()]), 1000.0, 2000.0) / "roofs.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-20])
    run = metrics.load_run(tmp_path)
    assert run.read_roof is not None and run.read_roof["value"] == 1000
    assert any("last line of roofs.jsonl is torn" in warning for warning in run.warnings)
    for damaged in ("{\n" + whole, whole.replace('"schema":1', '"schema":99'), whole.replace("low", "lower")):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"roofs\.jsonl:1: not"):
            metrics.load_run(tmp_path)


@pytest.mark.parametrize(("cache", "given"), [(0.5, True), (1.5, False)])
def test_traffic_that_fits_into_a_cache_may_pass_the_memorys_roof(measure: Any, cache: float, given: bool) -> None:
    made = (forward(1, seconds=0.1), forward(2, seconds=0.1))
    traffic = made[0].bytes_read + made[0].bytes_written
    caches = {"levels": {"L2": {"capacity": 1}, "L3": {"capacity": cache * traffic}}}
    rows = measure([trial(forwards=made)], roofs={**ROOFS, "caches": caches})
    row, bound = (rows["ar", name, "decode, 1 row"] for name in ("mbu", "bound"))
    assert row.status == ("error" if given else "unavailable")
    assert ("fit into the last-level cache" in row.note) != given
    assert (bound.value, bound.note) == (("memory", "measured 0.50 × floor") if given else (None, row.note))


def test_of_forwards_in_one_graph_a_cache_holds_what_one_of_them_reads(measure: Any) -> None:
    made = tuple(forward(step, seconds=0.1, bytes_read=780.0, bytes_written=20.0, passes=4) for step in (1, 2))
    rows = measure([trial(forwards=made)], roofs={**ROOFS, "caches": {"levels": {"L3": {"capacity": 300}}}})
    row = rows["ar", "mbu", "decode, 1 row in 4 forwards"]
    assert row.status == "unavailable" and "fit into the last-level cache" in row.note


def test_what_arithmetic_bounds_is_bound_by_it_whatever_served_the_traffic(measure: Any) -> None:
    made = (forward(1, seconds=0.1, flops=1500.0), forward(2, seconds=0.1, flops=1500.0))
    caches = {"levels": {"L3": {"capacity": 300.0}}}
    fast = {"read": {**ROOFS["bandwidth"]["read"], "value": 1500.0}}  # memory: 0.13 s, arithmetic: 0.15 s
    rows = measure([trial(forwards=made)], roofs={**ROOFS, "bandwidth": fast, "caches": caches})
    assert rows["ar", "mbu", "decode, 1 row"].value is None
    assert rows["ar", "bound", "decode, 1 row"].value == "compute"


@pytest.mark.parametrize(
    ("changes", "metric", "reason"),
    [
        ({"roofs": None}, "mbu", "the roofs of this device were not measured"),
        ({"roofs": None}, "bound", "the roofs of this device were not measured"),
        ({"roofs": {"bandwidth": ROOFS["bandwidth"], "flops": {}}}, "mfu", "no bfloat16 roof was measured"),
        ({"specs": None}, "mbu_spec", "no spec sheet is known for this device"),
        ({"specs": {**SPECS, "flops": {}}}, "mfu_spec", "the spec sheet of Invented has no bfloat16 peak"),
    ],
)
def test_an_unknown_roof_gives_no_utilisation(measure: Any, changes: dict, metric: str, reason: str) -> None:
    row = measure([trial()], **changes)["ar", metric, ""]
    assert row.value is None
    assert reason in row.note


def test_phases_that_miss_the_wall_are_flagged(measure: Any) -> None:
    row = measure([trial(wall_seconds=3.2)])["ar", "phase_seconds", "decode"]
    assert row.status == "error"
    assert row.note == "the phases sum to 93.8% of the wall"


def test_steps_that_commit_other_tokens_than_were_emitted_are_flagged(measure: Any) -> None:
    row = measure([trial(requests=(request(ids=(1, 2, 3, 4)),))])["ar", "tokens_per_forward", ""]
    assert row.status == "error"
    assert "the steps committed 3 tokens but the requests hold 4" in row.note


def paced(order: int, group: int, repeat: int, seconds: float, context: float) -> TrialRecord:
    """Decode steps of so many seconds, whose forwards read 100 bytes of weights and 1 for each token of the context."""
    steps = (StepRecord(1.0, 0, 0, (1,)), *[StepRecord(seconds, 0, 0, (1,))] * 2)
    made = (forward(0, "prefill"), *(forward(i, context=context, bytes_read=90.0 + context) for i in (1, 2)))
    return trial(group=group, repeat=repeat, order=order, steps=steps, forwards=made)


def test_a_run_that_slows_down_is_not_in_a_steady_state(measure: Any) -> None:
    row = measure([paced(g, g, 0, 1 + g / 20, 50.0) for g in range(10)])["ar", "steady_state_slope", ""]
    assert row.value == pytest.approx(0.45, abs=0.05)
    assert row.status == "error"


@pytest.mark.parametrize(("slowing", "status"), [(0.0, "ok"), (0.45, "error")])
def test_prompts_whose_contexts_ascend_are_no_drift_and_hide_none(measure: Any, slowing: float, status: str) -> None:
    trials = []
    for order in range(20):
        repeat, group = divmod(order, 10)
        context = 50.0 + 20 * group
        trials.append(paced(order, group, repeat, (100 + context) * (1 + slowing * order / 19), context))
    row = measure(trials)["ar", "steady_state_slope", ""]
    assert row.value == pytest.approx(slowing, abs=0.1)
    assert row.status == status
    once = measure(trials[:10])["ar", "steady_state_slope", ""]
    assert (once.value, once.status) == (None, "unavailable")
    assert "no prompt was repeated, and bytes or FLOPs of their steps differ by up to 120%" in once.note


def test_forwards_that_a_graph_ran_as_one_are_counted_each(measure: Any) -> None:
    def counted(*drafts: ForwardRecord) -> tuple[Any, ...]:
        made = measure([trial(forwards=(forward(0, "prefill", rows=10), *drafts, forward(1), forward(2)))])
        names = ("forwards_per_sequence", "drafter"), ("rows_per_forward", "draft"), ("bytes_per_token", "")
        return *(made["ar", *name].value for name in names), [part for _, m, part in made if m == "forward_seconds"]

    each = {"model": "drafter", "bytes_read": 90.0}
    one_by_one = (forward(1, "draft", rows=5, **each), *[forward(1, "draft", **each)] * 3)
    as_one = forward(1, "draft", rows=8, model="drafter", bytes_read=390.0, passes=4)
    (*apart, _), (*together, kinds) = counted(*one_by_one), counted(as_one)
    assert together == apart == [4.0, 2.0, pytest.approx(400.0)]
    assert "draft, 8 rows in 4 forwards" in kinds


def test_without_forwards_other_prompts_cannot_show_a_drift(measure: Any) -> None:
    trials = [dataclasses.replace(paced(g, g, 0, 1.0, 50.0), forwards=()) for g in range(10)]
    row = measure(trials)["ar", "steady_state_slope", ""]
    assert row.note.endswith(metrics.UNSEEN)


def test_the_output_hash_ignores_order_and_number_of_repeats_but_not_a_token(measure: Any) -> None:
    def output_hash(*trials: TrialRecord) -> Any:
        return measure(trials)["ar", "output_hash", ""].value

    one, two = trial(), trial(group=1)
    assert output_hash(one, two) == output_hash(two, one) == output_hash(one, two, trial(repeat=1))
    assert output_hash(one, two) != output_hash(one, trial(group=1, requests=(request("p1", (7, 8, 1)),)))


def test_repeats_with_different_outputs_are_noted(measure: Any) -> None:
    other = trial(repeat=1, requests=(request("p0", (1, 2, 3)),))
    assert "1 of 1 prompts" in measure([trial(), other])["ar", "output_hash", ""].note


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4).filter(lambda lengths: max(lengths) > 1))
def test_autoregressive_decoding_has_one_token_per_forward_however_ragged_the_batch(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    steps = [StepRecord(1.0, 0, 0, tuple(int(step < n) for n in lengths)) for step in range(max(lengths))]
    ragged = trial(
        requests=tuple(request(f"p{i}", range(n)) for i, n in enumerate(lengths)),
        steps=tuple(steps),
        forwards=tuple(forward(s, batch=len(lengths), context=10.0 + s) for s in range(1, len(steps))),
        wall_seconds=float(len(steps)),
    )
    folder = write(tmp_path_factory.mktemp("run"), [ragged], [cell(batch=len(lengths))])
    rows = {row.metric: row for row in metrics.summarise(metrics.load_run(folder)) if not row.part}
    assert rows["tokens_per_forward"].value == 1.0
    assert rows["tokens_per_forward"].status == "ok"
    assert rows["tokens_per_weighted_forward"].value == pytest.approx(1.0)


def test_a_forward_after_the_last_token_costs_bytes_but_is_no_forward_of_any_sequence(measure: Any) -> None:
    rows = measure([trial(forwards=(forward(0, "prefill"), forward(1), forward(2), forward(3)))])
    assert rows["ar", "tokens_per_forward", ""].value == 1.0
    assert rows["ar", "bytes_per_token", ""].value == 300.0


def test_a_torn_last_line_is_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = write(tmp_path, [trial(), trial(group=1)])
    path = folder / "trials.jsonl"
    path.write_text(path.read_text()[:-40])
    run = metrics.load_run(folder)
    assert [t.group for t in run.trials] == [0]
    assert "torn" in run.warnings[0]


def test_of_trials_with_one_key_the_last_successful_one_counts(tmp_path: Path) -> None:
    error = trial(status="error", error="boom", requests=(), steps=(), forwards=())
    kept = trial(wall_seconds=9.0)
    run = metrics.load_run(write(tmp_path, [error, trial(), kept, error]))
    assert [t.wall_seconds for t in run.trials] == [9.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", None, "give the folder that `zbench run` wrote"),
        ("run.json", "{", "not the manifest of a run"),
        ("run.json", '{"schema_version": 99}', "schema 99"),
        ("run.json", f'{{"schema_version": {SCHEMA_VERSION}}}', "not the manifest of a run"),
        ("trials.jsonl", "{\n{}\n", "trials.jsonl:1: not JSON"),
        ("trials.jsonl", '{"schema": 99}\n', "trials.jsonl:1: not a trial record"),
        ("trials.jsonl", "[]\n", "trials.jsonl:1: not a trial record"),
    ],
)
def test_a_damaged_run_folder_gives_one_clear_line(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = write(tmp_path, [trial()]) / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        metrics.load_run(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_trials_of_a_cell_that_was_not_planned_are_mentioned(tmp_path: Path) -> None:
    assert "stranger" in metrics.load_run(write(tmp_path, [trial("stranger")])).warnings[0]


def test_the_definitions_hash_changes_with_any_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    before = metrics.definitions_hash()
    changed = dataclasses.replace(metrics.METRICS["ttft"], formula="something else")
    monkeypatch.setitem(metrics.METRICS, "ttft", changed)
    assert metrics.definitions_hash() != before


@pytest.mark.slow
def test_reading_a_run_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = write(tmp_path, [trial(group=g) for g in range(6)])
    code = (
        "import sys, pathlib; from zbench.report import render; render(pathlib.Path(sys.argv[1]));"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(("changes", "warned"), [({}, True), ({"sampling": {"temperature": 0.8}}, False)])
def test_outputs_that_vary_between_repeats_are_noted_only_where_nothing_was_drawn(
    measure: Any, changes: dict[str, Any], warned: bool
) -> None:
    again = dataclasses.replace(trial(), repeat=1, requests=(dataclasses.replace(request(), output_hash="other"),))
    note = measure([trial(), again], (cell(**changes),))[cell().id, "output_hash", ""].note
    assert ("different outputs" in note) is warned


def served(group: int, said: Speculation) -> TrialRecord:
    return trial("s", group, steps=(), forwards=(), server=ServerRecord("sglang", "", said, None, "", 0.1, {}))


def test_a_servers_acceptance_is_of_its_counts_and_only_without_any_the_mean_of_what_it_states(measure: Any) -> None:
    planned = (cell("s", "endpoint"),)
    counts = [Speculation("counts", verifies=10, accepted=30), Speculation("counts", verifies=30, accepted=30)]
    counted = measure([served(g, said) for g, said in enumerate(counts)], planned)["s", "server_acceptance_length", ""]
    assert counted.value == pytest.approx((40 + 60) / (10 + 30))
    gauges = [Speculation("a gauge", length=4.0), Speculation("a gauge", length=2.0)]
    stated = measure([served(g, said) for g, said in enumerate(gauges)], planned)["s", "server_acceptance_length", ""]
    assert stated.value == pytest.approx(3.0) and stated.note.startswith("a gauge")
    assert "where it states a length and counts nothing, the mean of what it states" in stated.formula


@pytest.mark.parametrize(("counted", "compared"), [(3, True), (2, False), (None, True)])
def test_tokens_read_back_from_a_text_are_compared_where_they_are_as_many_as_were_emitted(
    measure: Any, counted: int | None, compared: bool
) -> None:
    told = ServedRecord(0.0, 0.0, (1.0, 3.0), 3, "text", output_tokens=counted)
    server = trial("s", requests=(dataclasses.replace(request(), served=told),))
    rows = measure([trial(), server], (cell(), cell("s", "endpoint")))
    said = f"unavailable: {metrics.READ_BACK}"
    for name, part in (("agreement", "tokens" if compared else ""), ("first_difference", "")):
        assert (rows["s", name, part].note == said) != compared
    assert rows["s", "lossless", ""].note.startswith("unavailable: not checked: these options" if compared else said)


def test_a_part_that_a_decoding_cell_lacks_is_not_for_want_of_decoding(tmp_path: Path) -> None:
    [decoding] = metrics.load_run(write(tmp_path / "a", [trial()])).cells
    [prefilled] = metrics.load_run(write(tmp_path / "b", [trial(steps=(StepRecord(1.0, 0.1, 0.1, (1,)),))])).cells
    [unseen] = metrics.load_run(write(tmp_path / "c", [trial(steps=(), forwards=())])).cells  # as of a server
    notes = [metrics.missing_part(one, "mbu", "verify, 3 rows").note for one in (decoding, prefilled, unseen)]
    other, nothing = (
        "unavailable: it has nothing of this kind",
        "unavailable: nothing was decoded after the first token",
    )
    assert notes == [other, nothing, other]


def test_a_step_of_other_sequences_than_the_requests_is_one_line(tmp_path: Path) -> None:
    steps = (StepRecord(1.0, 0.1, 0.1, (1, 1)), StepRecord(1.0, 0.1, 0.1, (1, 1)))
    with pytest.raises(UserError, match="the records are damaged"):
        metrics.load_run(write(tmp_path, [trial(steps=steps)]))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            forward(1, seconds=float("nan")),
            "seconds of a forward of ar is not a finite number; the records are damaged",
        ),
        (forward(1, seconds=0.0), "the records are damaged"),
    ],
)
def test_times_that_cannot_be_are_one_line(tmp_path: Path, made: ForwardRecord, said: str) -> None:
    folder = write(tmp_path, [trial(forwards=(made,))])
    with pytest.raises(UserError, match=said):
        metrics.summarise(metrics.load_run(folder))


DIFFUSION = {"block_size": 4, "proposals": 2, "sampler": "lossless", "synthetic": None, "adapter": None}


def tidar(group: int, *gains: int, covered: Sequence[bool], rows: Sequence[int], drafted: Sequence[int]) -> TrialRecord:
    """A prefill that gains one token, then steps that gain `gains`."""
    made = zip(gains, covered, drafted, strict=True)
    steps = [StepRecord(1.0, 0.1, 0.2, (g,), (d,), (max(g - 1, 0),), (c,)) for g, c, d in made]
    forwards = [forward(i, "draft+verify", rows=r) for i, r in enumerate(rows, start=1)]
    tokens = 1 + sum(gains)
    return trial(
        "d", group, requests=(request(f"p{group}", range(tokens), end=1.0 + len(gains)),),
        steps=(StepRecord(1.0, 0.1, 0.1, (1,)), *steps), forwards=(forward(0, "prefill", rows=14), *forwards),
        wall_seconds=1.0 + len(gains),
    )  # fmt: skip


def test_coverage_counts_the_steps_whose_outcome_had_a_block(measure: Any) -> None:
    trials = [
        tidar(0, 2, 1, covered=(True, False), rows=(12, 8), drafted=(3, 0)),
        tidar(1, 3, 1, covered=(True, False), rows=(12, 12), drafted=(3, 3)),
        tidar(2, 3, 0, covered=(True, False), rows=(12, 12), drafted=(3, 3)),  # a sequence that had ended
    ]
    rows = measure(trials, (cell("d", "diffusion", options=DIFFUSION),))
    assert rows["d", "proposal_coverage", ""].value == pytest.approx(3 / 4)
    looked_up = [dataclasses.replace(step, looked_up=(True,)) for step in trials[1].steps]
    copied = dataclasses.replace(trials[1], steps=(trials[1].steps[0], *looked_up[1:2], trials[1].steps[2]))
    without = measure([trials[0], copied, trials[2]], (cell("d", "diffusion", options=DIFFUSION),))
    assert without["d", "proposal_coverage", ""].value == pytest.approx(2 / 3)
    assert measure([trial()])["ar", "proposal_coverage", ""].note == "unavailable: the engine prepares no proposals"
    trees = [tidar(0, 2, 3, covered=(True, False), rows=(12, 12), drafted=(5, 5))]
    of_trees = measure(trees, (cell("d", "diffusion", options={**DIFFUSION, "tokens": 5}),))
    assert of_trees["d", "proposal_coverage", ""].value == pytest.approx(1 / 2)


def test_single_pass_diffusion_in_vllms_terms(measure: Any) -> None:
    """The prompt's block of 4 masks; then 12 rows of which 4 are drafts, and 9 of which 1 is none."""
    made = tidar(0, 2, 1, covered=(True, True), rows=(12, 9), drafted=(3, 0))
    rows = measure([made], (cell("d", "diffusion", options=DIFFUSION),))
    assert rows["d", "diffusion_steps_per_canvas", ""].value == 1
    assert rows["d", "diffusion_committed_per_step", ""].value == pytest.approx(3 / 2)
    assert rows["d", "diffusion_canvas_positions", ""].value == 4 + 8 + 8


def test_denoising_in_vllms_terms(measure: Any) -> None:
    """The prompt's forward and two more denoise the first canvas, one the second; each canvas is then kept."""
    gains = (0, 0, 3, 0, 4)
    made = tidar(0, *gains, covered=(False,) * 5, rows=(4,) * 5, drafted=(0,) * 5)
    options = {**DIFFUSION, "sampler": "denoise"}
    rows = measure([made], (cell("d", "diffusion", options=options),))
    assert rows["d", "diffusion_steps_per_canvas", ""].value == (3 + 1) / 2
    assert rows["d", "diffusion_committed_per_step", ""].value == 7 / 4
    assert rows["d", "diffusion_canvas_positions", ""].value == 4 * 4


def test_denoising_one_place_at_a_time_finishes_a_canvas_with_every_token(measure: Any) -> None:
    """The first canvas' only token came with the prompt: its keeping gains nothing. Then one denoising per canvas."""
    made = tidar(0, 0, 0, 1, 0, 1, covered=(False,) * 5, rows=(1,) * 5, drafted=(0,) * 5)
    options = {**DIFFUSION, "sampler": "denoise", "block_size": 1}
    rows = measure([made], (cell("d", "diffusion", options=options),))
    assert rows["d", "diffusion_steps_per_canvas", ""].value == 1


@pytest.mark.parametrize("options", [{**DIFFUSION, "proposals": 0}, None])
def test_an_engine_without_masks_has_no_canvas(measure: Any, options: Any) -> None:
    planned = cell("ar", "diffusion" if options else "autoregressive", options=options or {})
    row = measure([trial()], (planned,))["ar", "diffusion_steps_per_canvas", ""]
    assert row.note == "unavailable: the engine fills no canvas of masks"


def test_accuracy_is_the_share_of_prompts_that_are_right_in_every_repeat(measure: Any) -> None:
    def answered(group: int, repeat: int, correct: bool | None) -> TrialRecord:
        return trial(group=group, repeat=repeat, requests=(dataclasses.replace(request(f"p{group}"), correct=correct),))

    right = [answered(0, 0, True), answered(0, 1, True), answered(1, 0, True), answered(1, 1, False)]
    assert measure([*right, answered(2, 0, None)])["ar", "accuracy", ""].value == 0.5
    assert "no prompt has a reference" in measure([answered(0, 0, None)])["ar", "accuracy", ""].note


def test_a_lossy_sampler_is_the_reason_for_other_tokens(measure: Any) -> None:
    other = trial("d", requests=(request("p0", (7, 8, 5)),))
    options = {**DIFFUSION, "sampler": "logit_mix"}
    row = measure([trial(), other], (cell(), cell("d", "diffusion", options=options)))["d", "agreement", "tokens"]
    assert row.value == pytest.approx(2 / 3)
    assert "sampler logit_mix changes the output by design" in row.note


# --- Forwards of several numbers of rows ---


def swept(label: str = "rows", group: int = 0, seconds: Sequence[float] = (1.0, 1.05, 1.25, 4.0)) -> TrialRecord:
    """Steps of forwards of 1, 2, 4 and 16 rows; at the roofs memory takes 0.5 s, and arithmetic 0.1 s for each row."""
    steps = tuple(StepRecord(9.0, 0.1, 0.1, (1,)) for _ in range(3))
    forwards = [forward(0, "prefill", rows=10)]
    for step in (1, 2):
        forwards += [
            forward(step, rows=rows, seconds=time, flops=1000.0 * rows, bytes_read=500.0, bytes_written=0.0)
            for rows, time in zip((1, 2, 4, 16), seconds, strict=True)
        ]
    return trial(label, group, steps=steps, forwards=tuple(forwards), wall_seconds=27.0)


ROWS = cell("rows", "forward", options={"rows": [1, 2, 4, 16]}, baseline=True)


def test_rows_that_ride_along_are_timed_against_one(measure: Any) -> None:
    rows = measure([swept(group=group) for group in range(6)], (ROWS,))
    assert [rows["rows", "row_cost", str(r)].value for r in (1, 2, 4, 16)] == pytest.approx([1, 1.05, 1.25, 4])
    free = rows["rows", "free_token_slots", "measured"]
    assert free.value == pytest.approx(2.5)  # a quarter of the way from 1.05 to 1.25
    assert (free.low, free.high) == pytest.approx((2.5, 2.5))
    assert rows["rows", "free_token_slots", "roofs"].value == pytest.approx(4 + 12 * 0.1 / 2.2)  # 1 up to 4, 3.2 at 16
    ridge = rows["rows", "ridge_rows", "measured"]
    assert ridge.value == pytest.approx(12 / (4 - 1.25))
    assert rows["rows", "ridge_rows", "roofs"].value == pytest.approx(5)
    assert [rows["rows", "bound", f"decode, {r} rows"].value for r in (2, 4, 16)] == [
        "overhead",
        "overhead",
        "overhead",
    ]


def test_chunks_of_a_prompt_are_not_taken_for_one_another(measure: Any) -> None:
    """The median of a kind stands for forwards of equal rows."""
    each = swept()
    chunks = tuple(
        forward(0, "prefill", rows=rows, seconds=seconds, flops=1000.0 * rows)
        for rows, seconds in ((4, 1.0), (4, 1.0), (1, 0.1))
    )
    rows = measure([dataclasses.replace(each, forwards=(*chunks, *each.forwards[1:]))], (ROWS,))
    assert rows["rows", "achieved_flops", "prefill"].value == pytest.approx(9000 / 2.1)


def test_floors_of_so_many_rows_are_means_of_forwards_of_other_contexts(measure: Any) -> None:
    """Memory takes 0.5 s in one trial and 0.7 s in the other, arithmetic 0.1 s for each row."""
    longer = swept(group=1)
    more = tuple(dataclasses.replace(f, bytes_read=700.0) if f.step else f for f in longer.forwards)
    rows = measure([swept(), dataclasses.replace(longer, forwards=more)], (ROWS,))
    assert rows["rows", "ridge_rows", "roofs"].value == pytest.approx(6)


def test_what_would_mix_forwards_of_different_rows_is_not_given(measure: Any) -> None:
    rows = measure([swept()], (ROWS,))
    for name in metrics.NOT_OF_FORWARDS:
        assert "different numbers of rows" in rows["rows", name, ""].note
    assert {"throughput_per_device", "parallel_efficiency"} <= set(metrics.NOT_OF_FORWARDS) <= set(metrics.METRICS)
    assert "does not time forwards" in measure([trial()])["ar", "row_cost", ""].note


def test_no_engine_is_so_many_times_as_fast_as_a_sweep_of_forwards(measure: Any) -> None:
    """The baseline of a scenario without plain decoding is its first engine."""
    rows = measure([swept(), trial("eagle3")], (ROWS, cell("eagle3", "eagle3")))
    for name in ("speedup", "minimal_detectable_effect"):
        assert "the baseline times forwards of different numbers of rows" in rows["eagle3", name, ""].note


def test_a_curve_without_a_knee_has_no_ridge_and_at_least_as_many_free_rows_as_were_measured(measure: Any) -> None:
    rows = measure([swept(seconds=(1.0, 1.0, 1.05, 1.08))], (ROWS,))
    assert rows["rows", "ridge_rows", "measured"].value is None
    assert "less than twice" in rows["rows", "ridge_rows", "measured"].note
    free = rows["rows", "free_token_slots", "measured"]
    assert free.value == 16
    assert "at least" in free.note


@settings(deadline=None)
@given(st.lists(st.floats(0.5, 9), min_size=2, max_size=9), st.floats(0.6, 8))
def test_a_crossing_is_where_the_line_through_the_values_first_passes_the_limit(
    values: list[float], limit: float
) -> None:
    rows, line = np.cumsum(np.arange(1.0, len(values) + 1)), np.array(values)
    found = float(metrics.crossing(rows, line, limit))
    before = np.linspace(rows[0], found, 50)[:-1] if found > rows[0] else np.array([])
    assert (np.interp(before, rows, line) <= limit * (1 + 1e-9)).all()
    if line[0] <= limit < line.max():
        assert np.interp(found, rows, line) == pytest.approx(limit)
    elif line.max() <= limit:
        assert found == rows[-1]
    both = metrics.crossing(rows, np.array([line, line[::-1]]), limit)
    assert both[0] == found
