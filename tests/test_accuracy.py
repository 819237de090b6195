"""Answers checked against references that can be checked."""

from __future__ import annotations

import pytest

from zbench.accuracy import correct


@pytest.mark.parametrize(
    ("output", "reference", "right"),
    [
        ("So she pays $1,080 in all.", "18 x 60 = 1080\n#### 1080", True),
        ("The answer is 109.", "#### 109", True),
        ("He has 109 coins, then loses 2.", "#### 109", False),
        ("It is -3.50", "#### -3.5", True),
        ("It is 3.", "#### -3", False),
        ("no number at all", "#### 4", False),
        ("The range is 10-5", "#### 5", True),
        ("The range is 10−5", "#### 5", True),
        ("It is −3", "#### -3", True),
        ("It is −3", "#### 3", False),
        ("It is -3", "#### −3", True),
        ("about 1e18", "#### 18", False),
        ("about 1.8e+1", "#### 18", True),
        ("about 1.8e−1", "#### 0.18", True),
        ("1,234,567.5 in all", "#### 1234567.5", True),
        ("It is 3,4", "#### 34", False),
        ("It is 3,4", "#### 4", False),
        ("12 or 3,4", "#### 12", False),  # the last number is none to be believed, and no other is the answer
        ("It is 12,34,567", "#### 1234567", False),
        ("It is 1,0800", "#### 10800", False),
        ("Version 1.2.3", "#### 3", False),
        ("They are 3, 4", "#### 4", True),
        ("It is 18, as was asked.", "#### 18", True),
        ("It is 34", "#### 3,4", None),
        ("42", "    return True\n", None),
        ("42", "#### none", None),
        ("42", None, None),
    ],
)
def test_the_last_number_is_the_answer(output: str, reference: str | None, right: bool | None) -> None:
    assert correct(output, reference) is right
