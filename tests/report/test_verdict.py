"""A verdict in every form: readable by a person, and by the programs the forms are named after."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from zbench.errors import UserError
from zbench.gate import CellSnapshot, Gate, Row, Sample, Snapshot, Verdict
from zbench.report import verdict as forms

ROW = Row("ar", "bytes_per_token", "", "ok", 100.0, 100.0, "B/token", "lower", 1e-9, True)
TIME = Row(
    "ar", "decode_tps", "", "inconclusive", 60.0, 58.0, "tokens/s", "higher", 0.05, True, -0.03, -0.08, 0.02,
    0.09, 0.2, 8,
)  # fmt: skip
RUN = Snapshot(
    "now", "2025-01-01", "0", "s", "p", {}, {}, {},
    {"ar": CellSnapshot("", True, {"bytes_per_token": {"": 100.0}, "output_hash": {"": "abc"}},
                        {"decode_tps": Sample(58.0, ("p/0",), (0,), (1 / 58,))})},
)  # fmt: skip


def row(verdict: Verdict, metric: str = "bytes_per_token", **changes: object) -> Row:
    return replace(ROW, verdict=verdict, metric=metric, **changes)  # type: ignore[arg-type]


def judged(*rows: Row, strict: bool = False, **changes: object) -> forms.Judged:
    return forms.Judged(RUN, Gate("now", "before", rows, **changes), strict)  # type: ignore[arg-type]


REGRESSED = row("regressed", candidate=150.0, change=0.5)


def test_text_says_the_worst_first_and_folds_what_did_not_change() -> None:
    lines = forms.text(Gate("now", "before", (ROW, row("ok", "flops_per_token"), TIME, REGRESSED)))
    assert lines == [
        "regressed      ar: bytes_per_token 100 B/token → 150 B/token: +50.0%",
        "inconclusive   ar: decode_tps 60.0 tokens/s → 58.0 tokens/s: -3.0% (-8.0% to +2.0%), n = 8, tolerance 5%, "
        "sees what is 9.0% slower",
        "ok             ar: 2 counts unchanged",
        "regressed: 4 metrics, 1 regressed, 1 inconclusive; now against before",
    ]
    assert len(forms.text(Gate("now", "before", (ROW, ROW)), verbose=True)) == 3


def test_a_difference_beyond_the_digits_shown_is_shown() -> None:
    tiny = row("regressed", baseline=461568.0, candidate=461568.5, change=0.5 / 461568)
    assert "461568 → 461568.5 B/token: +0.00011%" in forms.sentence(tiny)


def test_text_gives_the_reasons_where_nothing_is_comparable() -> None:
    assert forms.text(Gate("now", "before", reasons=("another device",))) == [
        "not comparable: another device",
        "not comparable: now against before",
    ]


def test_junit_counts_what_ci_servers_count() -> None:
    rows = (ROW, REGRESSED, TIME, row("not comparable", "ttft"), row("regressed", "lossless", required=False))
    suite = ElementTree.fromstring(forms.junit(judged(*rows)))
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "5", "failures": "1", "errors": "1", "skipped": "2"}
    strict = ElementTree.fromstring(forms.junit(judged(*rows, strict=True)))
    assert strict.get("failures") == "2"
    none = ElementTree.fromstring(forms.junit(judged(reasons=("a", "b"))))
    assert none.get("errors") == "2"


def test_junit_survives_characters_that_xml_cannot_hold() -> None:
    suite = ElementTree.fromstring(forms.junit(judged(replace(REGRESSED, cell="a\x00<b>", note="\x1b[31m & more"))))
    case = suite.find("testcase")
    assert case is not None and case.get("classname") == "a?<b>"


def test_github_gets_no_more_annotations_than_it_shows_and_is_told_of_the_rest() -> None:
    lines = forms.workflow_commands(judged(*[REGRESSED] * 25, *[TIME] * 3))
    errors = [line for line in lines if line.startswith("::error")]
    assert len(errors) == forms.ANNOTATIONS
    assert errors[-1].endswith("::and 16 more; see the summary")
    assert sum(line.startswith("::warning") for line in lines) == 3


def test_a_workflow_command_cannot_be_broken_by_what_it_says() -> None:
    line = forms.workflow_commands(judged(replace(REGRESSED, note="50% worse\n::error::injected")))[0]
    assert "\n" not in line
    assert "50%25 worse%0A::error::injected" in line


def test_an_advisory_regression_is_a_warning() -> None:
    (line,) = forms.workflow_commands(judged(replace(REGRESSED, required=False)))
    assert line.startswith("::warning")


def test_a_step_summary_is_cut_at_a_line_where_github_would_refuse_it() -> None:
    many = judged(*[REGRESSED] * 100)
    cut = forms.step_summary(many, room=2000)
    assert len(cut.encode()) <= 2000
    assert cut.endswith("(cut: GitHub takes no more)\n")
    assert cut.splitlines()[-3].endswith("|")
    assert forms.step_summary(many) == forms.markdown(many)


def test_markdown_keeps_a_pipe_inside_its_cell() -> None:
    table = forms.markdown(judged(replace(REGRESSED, note="a|b")))
    line = next(line for line in table.splitlines() if "a\\|b" in line)
    assert line.replace("\\|", "").count("|") == 8


def test_each_direction_of_github_action_benchmark_gets_its_metrics() -> None:
    smaller = json.loads(forms.FORMATS["action-benchmark-smaller"](judged(ROW)))
    assert smaller == [{"name": "ar: bytes_per_token", "unit": "B/token", "value": 100.0}]
    bigger = json.loads(forms.FORMATS["action-benchmark-bigger"](judged(ROW)))
    assert bigger == [{"name": "ar: decode_tps", "unit": "tokens/s", "value": 58.0}]


def test_bencher_gets_every_number_and_no_text() -> None:
    assert json.loads(forms.FORMATS["bencher"](judged(ROW))) == {
        "ar": {"decode_tps": {"value": 58.0}, "bytes_per_token": {"value": 100.0}}
    }


@pytest.mark.parametrize("kind", ["text", "json", "markdown", "junit"])
def test_a_verdict_without_a_baseline_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match="give --baseline"):
        forms.FORMATS[kind](forms.Judged(RUN, None))
