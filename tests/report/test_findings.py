"""The words of a report: the answer, the warnings, and numbers in fitting units."""

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report.synthetic import DEFAULT_ENGINES, DIFFUSION, READ, ROOFS, SPECULATIVE, write_run
from tests.test_metrics import CHAIN, cell, trial, verifying, write
from zbench import metrics
from zbench.records import LosslessCheck, read_trials
from zbench.report import findings
from zbench.report.findings import answers, quantity, speculation, title, warnings
from zbench.results import Results


@pytest.fixture
def results(tmp_path: Path) -> Any:
    return lambda **options: Results.of(metrics.load_run(write_run(tmp_path, **options)))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0089, "s", "8.90 ms"),
        (0.9999, "s", "1.00 s"),
        (9.9996e-4, "s", "1.00 ms"),
        (240.0, "s", "240 s"),
        (38e9, "B/s", "38.0 GB/s"),
        (9.996e11, "FLOP/s", "1.00 TFLOP/s"),
        (61.23, "tokens/s", "61.2 tokens/s"),
        (12345.0, "tokens/s", "12,345 tokens/s"),
        (2.9, "ratio", "2.90×"),
        (0.8441, "1", "84.4%"),
        (0.8, "1", "80%"),
        (1.1304, "1", "113%"),
        (0.0921, "1", "9.21%"),
        (0.99704, "1", "99.7%"),
        (1.0, "1", "100%"),
        (0.9999, "1", "99.99%"),
        (-0.0312, "1", "-3.12%"),
        (0.0, "s", "0 s"),
    ],
)
def test_quantities_have_fitting_units(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


@given(st.floats(1e-8, 1e14))
def test_a_quantity_reads_back_as_itself_to_three_digits(value: float) -> None:
    number, unit = quantity(value, "B/s").split(" ")
    scale = {"n": 1e-9, "µ": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
    assert float(number.replace(",", "")) * scale[unit.removesuffix("B/s")] == pytest.approx(value, rel=6e-3)


def test_what_the_cache_serves_is_not_called_memory_bound(results: Any) -> None:
    slow = {**ROOFS["bandwidth"], "read": {**ROOFS["bandwidth"]["read"], "value": READ / 4}}
    caches = {"sweep": [], "levels": {"L3": {"capacity": 1e12, "value": 4 * READ, "low": READ, "high": 5 * READ}}}
    found = results(roofs={**ROOFS, "bandwidth": slow, "caches": caches})
    text = " ".join(*(sentences for _, sentences in answers(found)))
    assert "memory-bound" not in text and "unknown" not in text
    assert "(1 row) is not classified (its 276 MB fit into the last-level cache of 1000000 MB, so that" in text
    assert found.row(found.run.cells[0], "bound", "decode, 1 row").note.endswith("so that the memory does not bound it")


def test_a_share_that_a_cache_may_have_served_says_so(results: Any) -> None:
    caches = {"sweep": [], "levels": {"L3": {"capacity": 1e12, "value": 4 * READ, "low": READ, "high": 5 * READ}}}
    text = " ".join(*(sentences for _, sentences in answers(results(roofs={**ROOFS, "caches": caches}))))
    served = "(its 276 MB fit into the last-level cache of 1000000 MB, which may have served it)."
    assert f"memory-bound: 84.9% of the measured read bandwidth {served}" in text


def test_overhead_is_said_in_times_of_the_floor(results: Any) -> None:
    """Forwards reach 85% of READ, so that at four times that roof they take 4 / 0.85 of what memory needs."""
    fast = {**ROOFS["bandwidth"], "read": {**ROOFS["bandwidth"]["read"], "value": 4 * READ}}
    text = " ".join(*(sentences for _, sentences in answers(results(roofs={**ROOFS, "bandwidth": fast}))))
    assert "is overhead-bound: 4.7× the time that memory or arithmetic alone would need" in text


def test_rows_of_a_batch_are_those_of_each_sequence(results: Any) -> None:
    one, two = answers(results(points=({"batch": 1}, {"batch": 2}), engines=("autoregressive",)))
    assert "forward (1 row) is" in one[1][-1]
    assert "forward (1 row per sequence) is" in two[1][-1]


def test_the_answer_says_how_fast_with_its_interval_against_what_and_what_limits(results: Any) -> None:
    ((point, sentences),) = answers(results())
    assert point == ""
    text = " ".join(sentences)
    assert sentences[0].startswith("autoregressive decodes 11")
    assert "95% interval" in sentences[0] and "8 prompts" in sentences[0]
    assert "That is 2.5" in text and "× transformers generate (2.5" in text
    assert "decode forward (1 row) is memory-bound: 84.9% of the measured read bandwidth." in text


def test_a_faster_engine_is_said_to_be_faster_and_its_own_bound_is_named(results: Any) -> None:
    text = " ".join(answers(results(engines=("autoregressive", "chain drafter")))[0][1])
    assert re.search(r"chain drafter is (1\.9|2\.0)\d× as fast \(", text)
    assert "chain drafter’s verify forward (5 rows) is" in text


def test_a_single_engine_is_compared_with_nothing(results: Any) -> None:
    sentences = answers(results(engines=("chain drafter",)))[0][1]
    assert len(sentences) == 2
    assert sentences[1].startswith("Its verify forward")


def test_without_a_result_of_the_baseline_every_engines_speed_is_given_and_nothing_compared(results: Any) -> None:
    found = results(engines=("autoregressive", "transformers generate", "chain drafter"), failing=("autoregressive",))
    first, missing, other, *_ = answers(found)[0][1]
    assert first.startswith("transformers generate decodes ")
    assert missing == "autoregressive, the baseline, has no decode speed here: every trial failed."
    assert re.fullmatch(
        r"chain drafter decodes \d+ tokens/s per sequence \(95% interval .*, 8 prompts\): not compared, as no prompt "
        r"succeeded both here and in the baseline\.",
        other,
    )


def test_an_engine_without_a_pair_is_in_the_answer_with_its_speed_and_the_reason(results: Any, tmp_path: Path) -> None:
    results(engines=("autoregressive", "chain drafter", "transformers generate"))
    trials = read_trials(tmp_path)[0]
    mine = {"autoregressive": range(4), "transformers-generate": range(4, 8)}  # of no common prompt
    kept = [t for t in trials if t.group in mine.get(t.cell, range(8))]
    (tmp_path / "trials.jsonl").write_text("".join(t.to_json() + "\n" for t in kept))
    told = answers(Results.of(metrics.load_run(tmp_path)))[0][1]
    assert told[0].startswith("autoregressive decodes ") and told[1].startswith("chain drafter is ")
    assert told[2].startswith("transformers generate decodes ")
    assert told[2].endswith(": not compared, as no prompt succeeded both here and in the baseline.")


def test_the_baseline_is_named_where_its_own_speed_is_not_known(results: Any, tmp_path: Path) -> None:
    """One of its responses came in one piece, of a prompt that nobody else has."""
    results(engines=("autoregressive", "transformers generate", "chain drafter"))
    trials = []
    for t in read_trials(tmp_path)[0]:
        if t.group == 0 and t.cell == "autoregressive":
            t = replace(t, requests=tuple(replace(r, ttft_seconds=r.end_seconds) for r in t.requests))
        if t.group or t.cell == "autoregressive":
            trials.append(t)
    (tmp_path / "trials.jsonl").write_text("".join(t.to_json() + "\n" for t in trials))
    told = answers(Results.of(metrics.load_run(tmp_path)))[0][1]
    assert told[0].startswith("transformers generate decodes ")
    assert told[1].startswith("autoregressive, the baseline, has no decode speed here: 2 of 16 responses came in one")
    assert told[2].startswith("The speed of autoregressive is 2.") and "× transformers generate (" in told[2]
    assert re.fullmatch(r"chain drafter is .*× as fast \(.*\) as autoregressive, paired by prompt\.", told[3])


def test_too_few_prompts_of_some_are_not_said_of_those_that_have_an_interval(results: Any, tmp_path: Path) -> None:
    results(engines=("autoregressive", "chain drafter", "transformers generate"), prompts=6)
    path = tmp_path / "trials.jsonl"
    late = [line for line in path.open() if '"transformers-generate"' not in line or '"group":0' in line]
    path.write_text("".join(late))
    ((_, sentences),) = answers(Results.of(metrics.load_run(tmp_path)))
    [faster] = [sentence for sentence in sentences if "chain drafter is" in sentence and "as fast" in sentence]
    [slower] = [sentence for sentence in sentences if "transformers generate" in sentence]
    assert faster.endswith("), paired by prompt.") and "too few" not in faster
    assert "too few for an interval" in slower


def test_several_engines_that_drift_are_one_sentence(results: Any) -> None:
    found = [sentence for sentence in warnings(results(drift=0.3)) if "steady state" in sentence]
    assert len(found) == 1 and found[0].startswith("Not a steady state: by a linear trend step time moved ")
    assert all(re.search(rf"{engine} \(\+\d+%\)", found[0]) for engine in DEFAULT_ENGINES)
    alone = [sentence for sentence in warnings(results(drift=0.3, engines=("autoregressive",))) if "steady" in sentence]
    assert len(alone) == 1 and alone[0].startswith("autoregressive: not a steady state: step time moved by +")


def test_engines_that_seem_to_drift_are_named_beside_those_that_do(results: Any) -> None:
    found = results(drift=0.3)
    rows = tuple(
        replace(row, status="ok", low=-0.2, high=1.5)
        if (row.cell, row.metric) == ("autoregressive", "steady_state_slope")
        else row
        for row in found.rows
    )
    [said] = [sentence for sentence in warnings(Results(found.run, rows)) if "steady state" in sentence]
    assert "; not shown for autoregressive (-20% to +150%). Speeds and speedups are means over all of it." in said
    assert "of autoregressive" not in said


def test_few_prompts_are_said_to_be_few(results: Any) -> None:
    found = results(prompts=3)
    assert "too few for an interval" in answers(found)[0][1][0]
    assert any(sentence.startswith("3 prompts for autoregressive") for sentence in warnings(found))


def test_every_point_of_a_matrix_has_its_own_answer(results: Any) -> None:
    found = answers(results(points=({"batch": 1}, {"batch": 2}), engines=("autoregressive",)))
    assert [point for point, _ in found] == ["batch 1", "batch 2"]


def test_a_clean_run_has_no_warnings(results: Any) -> None:
    assert warnings(results()) == []


def over_roof() -> dict[str, Any]:
    slow = {"value": 20e9, "low": 19e9, "high": 21e9, "n": 20, "unit": "B/s"}
    return {**ROOFS, "bandwidth": {"read": slow}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"roofs": None}, "roofs of this device were not measured"),
        ({"roofs": over_roof()}, "the roof or the count is wrong"),
        ({"drift": 0.3}, "Not a steady state"),
        ({"failing": ("transformers generate",)}, "16 of 16 trials of transformers generate failed"),
        ({"divergent": ("transformers generate",)}, "same tokens as autoregressive on 50% of the prompts only"),
    ],
)
def test_what_makes_numbers_less_than_they_seem_is_said(results: Any, options: dict[str, Any], words: str) -> None:
    assert any(words in sentence for sentence in warnings(results(**options)))


def test_a_read_roof_that_held_still_is_worth_no_word(results: Any) -> None:
    assert warnings(results(samples=(0.96 * READ, READ, 1.08 * READ))) == []


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ((0.9 * READ, READ, 1.2 * READ), "ranged from 34.2 GB/s to 45.6 GB/s beside the run (3 samples)"),
        (("no memory", "no memory"), "could not be measured beside the run (no memory): shares are of that measured"),
    ],
)
def test_a_read_roof_that_drifted_or_is_not_known_is_said(results: Any, samples: Any, words: str) -> None:
    [sentence] = warnings(results(samples=samples))
    assert words in sentence


def test_nobody_is_told_to_measure_a_roof_again_that_was_measured_beside_the_run(results: Any) -> None:
    found = warnings(results(samples=(20e9, 20e9), engines=SPECULATIVE))
    [sentence] = [sentence for sentence in found if "the roof or the count is wrong" in sentence]
    assert "of the read bandwidth beside the run" in sentence
    assert "measure the roofs again" not in sentence


def test_forwards_over_a_roof_share_one_sentence(results: Any) -> None:
    found = [
        sentence for sentence in warnings(results(roofs=over_roof(), engines=SPECULATIVE)) if "the roof or" in sentence
    ]
    [sentence] = found
    assert re.search(r"and \d+ other kinds? of forward (is|are) over it too; measure the roofs again", sentence)


def test_a_lossy_sampler_never_stands_without_what_it_did_to_the_output(results: Any) -> None:
    found = results(engines=("autoregressive", *DIFFUSION), divergent=("tidar mixed",))
    [mixed] = [sentence for sentence in warnings(found) if sentence.startswith("tidar mixed is lossy")]
    assert "of its tokens are autoregressive’s up to the first difference" in mixed
    assert any(sentence.startswith("denoised is lossy") for sentence in warnings(found))
    assert not any("two near-equal logits" in sentence for sentence in warnings(found))
    assert any(sentence.startswith("Random mask adapter in tidar drawn") for sentence in warnings(found))


@pytest.mark.parametrize(("repeats", "every"), [(2, " in every repeat"), (1, "")])
def test_how_often_a_lossy_engine_is_right_is_a_share_of_prompts(
    results: Any, tmp_path: Path, repeats: int, every: str
) -> None:
    """Of the baseline every answer is right; of the lossy engine those of even prompts, and one of each odd one."""
    results(engines=("autoregressive", "tidar mixed"), repeats=repeats)
    trials = []
    for t in read_trials(tmp_path)[0]:
        right = t.cell == "autoregressive" or t.group % 2 == 0 or t.repeat == 1
        trials.append(replace(t, requests=tuple(replace(r, correct=right) for r in t.requests)))
    (tmp_path / "trials.jsonl").write_text("".join(t.to_json() + "\n" for t in trials))
    [mixed] = [w for w in warnings(Results.of(metrics.load_run(tmp_path))) if w.startswith("tidar mixed is lossy")]
    assert f"; on 50% of the prompts its answer is right{every} (22–78%), on 100% autoregressive’s." in mixed


def test_why_nothing_says_how_good_a_lossy_engine_is_are_the_metrics_own_words(tmp_path: Path) -> None:
    sampled = {"temperature": 0.8}
    mixed = cell("mixed", "diffusion", options={"sampler": "logit_mix", "block_size": 4}, sampling=sampled)
    folder = write(tmp_path, [trial(), trial("mixed")], [cell(sampling=sampled), mixed])
    [said] = [w for w in warnings(Results.of(metrics.load_run(folder))) if w.startswith("mixed is lossy")]
    assert said == (
        "mixed is lossy, its speed buys another output: how good it is was not measured (no prompt has a reference that"
        " can be checked; no code was run: no prompt has tests, or the scenario does not allow it)."
    )


def spoken(results: Results) -> dict[str, str]:
    return {cell.record.label: speculation(cell, results) for cell in results.run.cells}


def test_what_a_step_gains_and_must_gain_is_one_sentence_per_drafting_engine(results: Any) -> None:
    said = spoken(results(engines=SPECULATIVE))
    assert said["autoregressive"] == ""
    number = r"\d\.\d\d"
    assert re.fullmatch(
        rf"eagle3 chain of 4 gains {number} tokens per step and breaks even at 1\.6\d: "
        rf"1\.\d\d× as fast as autoregressive \({number}–{number}\)\.",
        said["eagle3 chain of 4"],
    )
    assert said["eagle3 tree of 16"].startswith(
        "eagle3 tree of 16 with synthetic acceptance gains 3.00 tokens per step"
    )
    assert re.fullmatch(
        rf"dflash block of 8 with a random drafter is net-negative here: it gains 1\.\d\d tokens per step and needs "
        rf"{number} to break even\.",
        said["dflash block of 8"],
    )


def test_a_speedup_whose_interval_holds_1_is_no_difference(results: Any) -> None:
    found = results(engines=("autoregressive", "eagle3 chain of 4"))
    unsure = {"speedup": {"value": 1.05, "low": 0.9, "high": 1.2}, "minimal_detectable_effect": {"value": 0.2965}}
    rows = [dataclasses.replace(row, **unsure.get(row.metric, {})) for row in found.rows]
    found = dataclasses.replace(found, rows=tuple(rows))
    shown = "(1.05×, 0.90–1.20; pairs that differ as these do would only show 1.30× or more)."
    assert spoken(found)["eagle3 chain of 4"].endswith(f": no difference from autoregressive is shown {shown}")
    assert f"No difference from autoregressive is shown for eagle3 chain of 4 {shown}" == answers(found)[0][1][1]


def test_an_engine_that_is_faster_prompt_by_prompt_is_not_net_negative(tmp_path: Path) -> None:
    """Steps of 2 s against 1 s: a third of the prompts gain 1 token in each of 100 steps, the others 6 in each of 2."""
    slow, fast = {"accepted": [0] * 100}, {"accepted": [5] * 2, "offered": [5] * 2}
    drafting = [verifying(group=group, **(slow if group % 3 == 0 else fast)) for group in range(24)]
    cells = [replace(planned, point={"context": 64}) for planned in CHAIN]
    folder = write(tmp_path, [*(trial(group=group) for group in range(24)), *drafting], cells)
    found = Results.of(metrics.load_run(folder))
    said = spoken(found)["spec"]
    assert re.fullmatch(
        r"spec is 1\.65× as fast as ar prompt by prompt at context 64 \(1\.\d\d–2\.\d\d\) and 0\.60× in total time, as "
        r"the prompts differ: over all of them it gains 1\.19 tokens per step and breaks even at 2\.00, on single ones "
        r"it gains 1\.00 to 6\.00\.",
        said,
    )
    assert said in warnings(found)
    assert not any("net-negative" in row.note for row in found.rows)


def test_without_a_baseline_it_is_not_known_what_pays(results: Any) -> None:
    assert spoken(results(engines=("eagle3 chain of 4",)))["eagle3 chain of 4"].endswith(
        "whether that pays is not known: no autoregressive baseline was run at this point of the matrix."
    )


def test_synthetic_acceptance_random_drafters_and_net_negative_settings_are_warned_of(results: Any) -> None:
    found = results(engines=SPECULATIVE)
    drawn, random, negative = warnings(found)
    assert drawn.startswith("Synthetic acceptance in eagle3 tree of 16: ")
    assert random.startswith("Random drafter in eagle3 tree of 16 and dflash block of 8: ")
    assert negative == spoken(found)["dflash block of 8"]


def test_the_answer_names_a_synthetic_engine_as_one(results: Any) -> None:
    found = results(engines=("autoregressive", "eagle3 tree of 16"))
    assert "eagle3 tree of 16 with synthetic acceptance is 1." in " ".join(answers(found)[0][1])
    assert [title(cell) for cell in found.run.cells] == [
        "autoregressive",
        "eagle3 tree of 16 with synthetic acceptance",
    ]


def checked(found: Results, check: LosslessCheck) -> Results:
    """The run again, its transformers requests checked with this result."""
    requests = found.run.requests
    checks = [check if cell == "transformers-generate" else None for cell in requests["cell"]]
    return Results.of(dataclasses.replace(found.run, requests=requests.assign(check=checks)))


def test_tokens_that_are_not_the_targets_are_warned_of_once(results: Any) -> None:
    found = checked(results(divergent=("transformers generate",)), LosslessCheck("near-tie", 1, 24, 0.125))
    assert warnings(found) == [
        "The target itself picks every token of transformers generate on 0% of the prompts only; "
        "the other tokens are off by up to 0.12 logits: within rounding of the target's choice."
    ]


def test_tokens_that_differ_from_the_baselines_are_still_warned_of_where_they_are_the_targets(results: Any) -> None:
    found = checked(results(divergent=("transformers generate",)), LosslessCheck("exact"))
    assert [w for w in warnings(found) if "same tokens as autoregressive" in w] == warnings(found)


def test_planned_cells_without_trials_make_the_run_incomplete(results: Any, tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "trials.jsonl"
    path.write_text("".join(line for line in path.open() if '"transformers-generate"' not in line))
    found = warnings(Results.of(metrics.load_run(tmp_path)))
    assert found == [
        "32 of 48 planned trials have ended: the run was stopped or cut off, or still goes on.",
        "transformers generate was planned but not run: the run is incomplete.",
    ]


def test_trials_that_were_planned_and_did_not_end_are_counted(tmp_path: Path) -> None:
    cells = [cell("ar"), cell("peer", absent="peer is not installed")]
    trials = [trial("ar", group, repeat) for repeat in range(2) for group in range(4)]

    def said(there: Any, planned: dict[str, int]) -> list[str]:
        run = metrics.load_run(write(tmp_path, [t for t in trials if there(t)], cells, planned=planned))
        return [sentence for sentence in warnings(Results.of(run)) if "planned" in sentence]

    counted = "{} of 8 planned trials have ended: the run was stopped or cut off, or still goes on."
    assert said(lambda t: True, {"ar": 8}) == []
    assert said(lambda t: t.repeat == 0, {"ar": 8}) == [counted.format(4)]
    assert said(lambda t: t.group < 3, {"ar": 8}) == [counted.format(6)]
    assert said(lambda t: t.repeat == 0, {}) == []  # of a run from before it was recorded


def test_everything_failed_is_one_sentence(results: Any) -> None:
    ((_, sentences),) = answers(results(failing=DEFAULT_ENGINES))
    assert sentences == ["Nothing was measured: all 48 trials failed. First error: out of <memory>"]


def test_a_sentence_lists_six_things_and_counts_the_rest() -> None:
    words = [f"engine {n}" for n in range(20)]
    assert findings.listed(words[:1]) == "engine 0"
    assert findings.listed(words[:6]) == "engine 0, engine 1, engine 2, engine 3, engine 4 and engine 5"
    assert findings.listed(words) == "engine 0, engine 1, engine 2, engine 3, engine 4 and 15 more"


def test_labels_that_have_commas_are_listed_with_semicolons() -> None:
    words = ["autoregressive", "block 4, proposals 1", "block 4, proposals 2"]
    assert findings.listed(words) == "autoregressive; block 4, proposals 1; and block 4, proposals 2"


def test_that_prompts_are_too_few_for_an_interval_is_said_once_in_a_sentence(results: Any) -> None:
    told = answers(results(engines=("autoregressive", *SPECULATIVE[1:]), prompts=1, repeats=1))[0][1]
    comparisons = [sentence for sentence in told if "paired by prompt" in sentence]
    assert comparisons
    for sentence in comparisons:
        assert sentence.count("too few for an interval") == 1
        assert sentence.endswith(", paired by prompt (1 prompt: too few for an interval).")


def test_an_interval_of_shares_has_the_decimals_of_its_value(results: Any) -> None:
    found = results(samples=(READ,))
    row = found.row(found.run.cells[0], "mbu", "decode, 1 row")
    assert re.fullmatch(r"8\d\.\d%", quantity(row.value, row.unit))
    assert re.fullmatch(r"8\d\.\d–8\d\.\d%", findings.interval(row))


def test_a_share_of_more_than_the_whole_roof_is_no_plain_verdict(results: Any) -> None:
    """The forwards reach 85% of READ: 106% of the median of these samples."""
    found = results(samples=(0.7 * READ, 0.8 * READ, 1.2 * READ))
    text = " ".join(answers(found)[0][1])
    assert "memory-bound: 1" not in text
    assert (
        "is memory-bound as far as can be told: it ran at 106% of the read bandwidth measured beside it (30.4 GB/s; "
        "highest sample 45.6 GB/s), so that memory changed its speed" in text
    )


def loaded(folder: Path, others: float | None, load: float = 0.0, threads: int = 2, device: str = "cpu") -> list[str]:
    """Warnings of a run on four cores beside which other processes took so much of a core."""
    write_run(folder)
    planned = json.loads((folder / "run.json").read_text())
    planned["environment"]["cpu"] |= {"usable_threads": 4, "load_average": [load, load, load]}
    planned["environment"]["torch"]["threads"] = threads
    planned["environment"]["device"]["backend"] = device
    (folder / "run.json").write_text(json.dumps(planned))
    if others is not None:
        trials = [replace(t, others_seconds=others * t.wall_seconds) for t in read_trials(folder)[0]]
        (folder / "trials.jsonl").write_text("".join(trial.to_json() + "\n" for trial in trials))
    return warnings(Results.of(metrics.load_run(folder)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"others": 0.1}, None),
        ({"others": 2.1, "load": 9.0}, None),  # two cores are left: a load average of before is no evidence beside it
        (
            {"others": 2.5},
            "Other processes kept 2.5 of the 4 CPU cores busy during the trials, of which this run uses 2",
        ),
        ({"others": 0.5, "threads": 4}, "Other processes kept 0.5 of the 4 CPU cores busy"),
        ({"others": 2.5, "device": "cuda"}, None),
        ({"others": None, "load": 2.5}, None),
        ({"others": None, "load": 3.5}, "The load average was 3.5 on 4 CPU cores when the run began"),
        ({"others": 0.0, "threads": 64}, "64 CPU threads took turns, as this process may run 4 at once"),
    ],
)
def test_other_work_on_the_cores_is_warned_of(given: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    about = [w for w in loaded(tmp_path, **given) if "cores" in w or "took turns" in w]
    assert len(about) == (said is not None)
    assert not said or about[0].startswith(said)


@pytest.mark.parametrize(
    ("flags", "device", "forward", "said"),
    [
        (["avx2", "avx512f"], "cpu", "transformers (sdpa attention)", True),
        (["avx2", "avx512f"], "cpu", "native (avx512)", False),
        (["avx2", "amx_bf16"], "cpu", "transformers (sdpa attention)", False),
        ("unavailable: the system lists no CPU flags", "cpu", "torch", False),
        (["avx2"], "cuda", "torch", False),
    ],
)
def test_bfloat16_that_torch_emulates_is_warned_of(
    flags: Any, device: str, forward: str, said: bool, tmp_path: Path
) -> None:
    write_run(tmp_path)
    planned = json.loads((tmp_path / "run.json").read_text())
    planned["environment"]["cpu"]["flags"] = flags
    planned["environment"]["device"]["backend"] = device
    (tmp_path / "run.json").write_text(json.dumps(planned))
    trials = [replace(trial, kernels={"forward": forward}) for trial in read_trials(tmp_path)[0]]
    (tmp_path / "trials.jsonl").write_text("".join(trial.to_json() + "\n" for trial in trials))
    found = " ".join(warnings(Results.of(metrics.load_run(tmp_path))))
    assert ("no instructions for products in bfloat16, which torch then emulates: autoregressive" in found) == said
    planned["cells"] = [cell | {"dtype": "float32"} for cell in planned["cells"]]
    (tmp_path / "run.json").write_text(json.dumps(planned))
    assert "emulates" not in " ".join(warnings(Results.of(metrics.load_run(tmp_path))))


@pytest.mark.parametrize(
    ("device", "kernels", "slower", "said"),
    [
        ("cuda", {"forward": "torch"}, 9.0, "Execution: auto or graph would tell."),
        ("rocm", {"forward": "torch"}, 9.0, "Execution: auto or graph would tell."),
        ("cuda", {"forward": "torch", "why_no_graphs": "not here"}, 9.0, "No graph could be recorded (not here)."),
        ("cuda", {"forward": "torch, graph"}, 9.0, ""),  # what a graph leaves is not the host's
        ("cuda", {"forward": "torch"}, 1.0, ""),
        ("cpu", {"forward": "torch"}, 9.0, ""),  # has no graphs
    ],
)
def test_eager_launches_that_decide_on_a_gpu_are_warned_of(
    device: str, kernels: dict[str, str], slower: float, said: str, tmp_path: Path
) -> None:
    write_run(tmp_path)
    planned = json.loads((tmp_path / "run.json").read_text())
    planned["environment"]["device"]["backend"] = device
    (tmp_path / "run.json").write_text(json.dumps(planned))
    trials = [
        replace(
            trial,
            kernels=kernels,
            forwards=tuple(replace(each, seconds=slower * each.seconds) for each in trial.forwards),
        )
        for trial in read_trials(tmp_path)[0]
    ]
    (tmp_path / "trials.jsonl").write_text("".join(trial.to_json() + "\n" for trial in trials))
    found = [w for w in warnings(Results.of(metrics.load_run(tmp_path))) if "ran eagerly and" in w]
    assert len(found) == bool(said)
    assert not said or (found[0].startswith("autoregressive") and found[0].endswith(said))
