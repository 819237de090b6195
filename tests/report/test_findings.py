"""The words of a report: the answer, the warnings, and numbers in fitting units."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report.synthetic import DEFAULT_ENGINES, ROOFS, write_run
from zbench import metrics
from zbench.report.findings import Results, answers, quantity, warnings


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
        (0.844, "1", "84%"),
        (1.0, "1", "100%"),
        (0.9999, "1", "99.99%"),
        (-0.031, "1", "-3.1%"),
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


def test_the_answer_says_how_fast_with_its_interval_against_what_and_what_limits(results: Any) -> None:
    ((point, sentences),) = answers(results())
    assert point == ""
    text = " ".join(sentences)
    assert sentences[0].startswith("autoregressive decodes 11")
    assert "95% interval" in sentences[0] and "8 prompts" in sentences[0]
    assert "That is 2.5" in text and "× transformers generate (2.5" in text
    assert "decode forward (1 row) is memory-bound: 85% of the measured read bandwidth." in text


def test_a_faster_engine_is_said_to_be_faster_and_its_own_bound_is_named(results: Any) -> None:
    text = " ".join(answers(results(engines=("autoregressive", "chain drafter")))[0][1])
    assert re.search(r"chain drafter is (1\.9|2\.0)\d× as fast \(", text)
    assert "chain drafter’s verify forward (5 rows) is" in text


def test_a_single_engine_is_compared_with_nothing(results: Any) -> None:
    sentences = answers(results(engines=("chain drafter",)))[0][1]
    assert len(sentences) == 2
    assert sentences[1].startswith("Its verify forward")


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
        ({"drift": 0.3}, "not a steady state"),
        ({"failing": ("transformers generate",)}, "16 of 16 trials of transformers generate failed"),
        ({"divergent": ("transformers generate",)}, "same tokens as autoregressive on 50% of the prompts only"),
    ],
)
def test_what_makes_numbers_less_than_they_seem_is_said(results: Any, options: dict[str, Any], words: str) -> None:
    assert any(words in sentence for sentence in warnings(results(**options)))


def test_planned_cells_without_trials_make_the_run_incomplete(results: Any, tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "trials.jsonl"
    path.write_text("".join(line for line in path.open() if '"transformers-generate"' not in line))
    found = warnings(Results.of(metrics.load_run(tmp_path)))
    assert found == ["transformers generate was planned but not run: the run is incomplete."]


def test_everything_failed_is_one_sentence(results: Any) -> None:
    ((_, sentences),) = answers(results(failing=DEFAULT_ENGINES))
    assert sentences == ["Nothing was measured: all 48 trials failed. First error: out of <memory>"]
