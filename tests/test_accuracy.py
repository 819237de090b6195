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
        ("42", "    return True\n", None),
        ("42", "#### none", None),
        ("42", None, None),
    ],
)
def test_the_last_number_is_the_answer(output: str, reference: str | None, right: bool | None) -> None:
    assert correct(output, reference) is right
