"""What a file holds is what was written, record by record and column by column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_metrics import trial, verifying, write
from zbench.errors import UserError
from zbench.records import (
    MANIFEST,
    TRIALS,
    ForwardRecord,
    StepRecord,
    Table,
    TrialRecord,
    columns,
    read_manifest,
    read_trials,
)

STEPS = st.lists(
    st.builds(
        StepRecord, *[st.floats(0, 9)] * 3, st.tuples(st.integers(0, 4)), st.just((4,)), st.tuples(st.integers(0, 3)),
        st.just((True,)),
    ),
    max_size=6,
)  # fmt: skip


@given(STEPS, st.integers(-7, 7), st.integers(-7, 7))
def test_a_table_is_the_tuple_of_its_records(made: list[StepRecord], start: int, stop: int) -> None:
    whole = tuple(made)
    table = Table(StepRecord, json.loads(json.dumps(columns(StepRecord, whole))))
    assert table == whole and whole == table
    assert (len(table), tuple(table), table[start:stop]) == (len(whole), whole, whole[start:stop])
    assert columns(StepRecord, tuple(table)) == columns(StepRecord, whole)
    for i in range(-len(whole), len(whole)):
        assert table[i] == whole[i]
    with pytest.raises(IndexError):
        table[len(whole)]
    assert table != (*whole, StepRecord(1.0, 0.0, 0.0, (1,)))


@pytest.mark.parametrize("made", [trial(), verifying([1, 2]), trial(steps=(), forwards=())])
def test_a_trial_reads_back_equal_and_writes_the_same_line(made: TrialRecord) -> None:
    read = TrialRecord.from_json(made.to_json())
    assert read == made
    assert read.to_json() == made.to_json()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: c["seconds"].pop(), "the columns of a ForwardRecord have different lengths"),
        (lambda c: c.pop("seconds"), "a ForwardRecord needs seconds"),
        (lambda c: c.update(odd=[1, 2, 3]), "a ForwardRecord has no odd"),
    ],
)
def test_a_damaged_table_is_refused_when_it_is_read(damage: Any, said: str) -> None:
    stored = columns(ForwardRecord, trial().forwards)
    damage(stored)
    with pytest.raises((TypeError, ValueError), match=said):
        Table(ForwardRecord, stored)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"status": "weird"}, "its status is 'weird'"),
        ({"requests": []}, "without a request"),
        ({"wall_seconds": -1}, "times that cannot be"),
        ({"end_seconds": 0}, "times that cannot be"),
        ({"end_seconds": float("nan")}, "times that are no numbers"),
        ({"end_seconds": "x"}, "times that are no numbers"),
        ({"ttft_seconds": 1e9}, "times that cannot be"),
    ],
    ids=str,
)
def test_a_trial_that_cannot_have_been_is_refused_with_its_line(
    damage: dict[str, Any], said: str, tmp_path: Path
) -> None:
    content = json.loads(trial().to_json())
    for key, value in damage.items():
        (content if key in content else content["requests"][0])[key] = value
    (tmp_path / TRIALS).write_text(trial().to_json() + "\n" + json.dumps(content) + "\n")
    with pytest.raises(UserError, match=f"{TRIALS}:2: .*{said}"):
        read_trials(tmp_path)


@pytest.mark.parametrize("odd", [[], "x", 3, None])
@pytest.mark.parametrize(
    "place",
    [
        ("environment",), ("models",), ("scenario",), ("models", "m"), ("environment", "device"), ("cells", 0),
        ("cells", 0, "options"),
    ],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_refused_in_one_line(tmp_path: Path, place: tuple[Any, ...], odd: Any) -> None:
    write(tmp_path, [trial()], environment={"device": {"name": "n"}}, models={"m": {}})
    content = json.loads((tmp_path / MANIFEST).read_text())
    *way, last = place
    within = content
    for key in way:
        within = within[key]
    within[last] = odd
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError, match="not the manifest of a run") as refused:
        read_manifest(tmp_path)
    assert "\n" not in str(refused.value)
