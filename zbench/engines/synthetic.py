"""Synthetic acceptance: how many drafts a step accepts is drawn, not verified, so that speed can be studied without
trained drafters. Nothing decoded this way says anything about a drafter, and every record of it is labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import floor, isfinite
from operator import mul
from typing import Any

from zbench.errors import UserError


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A distribution over the drafts a step accepts; build it with `parse`."""

    chances: tuple[float, ...]  # chances[a]: probability that exactly a drafts are accepted, a = 0 .. drafts per path
    label: str  # what was asked for, for records and reports: "synthetic (length 3.2)"

    @property
    def length(self) -> float:
        """Expected acceptance length: tokens gained per step, the bonus token included."""
        return 1 + sum(accepted * chance for accepted, chance in enumerate(self.chances))


def parse(option: Mapping[str, Any], drafts: int) -> Synthetic:
    """One of {length: L}, {rate: c}, {rates: [c1, ...]}, {histogram: {"0": n0, ...}} for paths of `drafts` tokens.

    length      tokens per step, bonus included (as vLLM and SGLang count), 1 <= L <= drafts + 1; the process of
                least variance: floor(L) or floor(L) + 1 tokens
    rate        the same chance for every draft, once the one before it was accepted
    rates       conditional: c_i is the chance that draft i is accepted once draft i - 1 was; one per draft
    histogram   accepted drafts (bonus excluded) -> number of steps: replays a recorded run

    Raises UserError for anything else.
    """
    kinds = {"length": _from_length, "rate": _from_rate, "rates": _from_rates, "histogram": _from_histogram}
    if len(option) != 1 or next(iter(option)) not in kinds:
        raise UserError("synthetic acceptance takes exactly one of length, rate, rates or histogram")
    [(kind, value)] = option.items()
    return Synthetic(kinds[kind](value, drafts), f"synthetic ({kind} {value})")


def _from_length(length: Any, drafts: int) -> tuple[float, ...]:
    if not _is_number(length) or not 1 <= length <= drafts + 1:
        raise UserError(
            f"synthetic length counts the bonus token: give 1 to {drafts + 1} for {drafts} drafts, not {length}"
        )
    sure = floor(length - 1)
    chances = [0.0] * (drafts + 1)
    chances[sure] = 1 - (length - 1 - sure)
    if sure < drafts:
        chances[sure + 1] = length - 1 - sure
    return tuple(chances)


def _from_rate(rate: Any, drafts: int) -> tuple[float, ...]:
    if not _is_number(rate) or not 0 <= rate <= 1:
        raise UserError(f"synthetic rate: give a number from 0 to 1, not {rate}")
    return _from_rates([rate] * drafts, drafts)


def _from_rates(rates: Any, drafts: int) -> tuple[float, ...]:
    if not isinstance(rates, Sequence) or len(rates) != drafts or not all(_is_number(r) and 0 <= r <= 1 for r in rates):
        raise UserError(f"synthetic rates: give {drafts} numbers from 0 to 1, one per draft token, not {rates}")
    reached = list(accumulate(rates, mul, initial=1.0))  # reached[a]: at least a drafts are accepted
    return tuple(here - further for here, further in zip(reached, [*reached[1:], 0.0], strict=True))


def _from_histogram(histogram: Any, drafts: int) -> tuple[float, ...]:
    if not isinstance(histogram, Mapping):
        raise UserError('synthetic histogram maps accepted drafts to steps, like {"0": 10, "1": 5}')
    steps = [0.0] * (drafts + 1)
    for accepted, count in histogram.items():
        if not str(accepted).isdecimal() or int(accepted) > drafts:
            raise UserError(f"synthetic histogram: accepted drafts go from 0 to {drafts} here, not {accepted}")
        if not _is_number(count) or count < 0:
            raise UserError(f"synthetic histogram: {accepted} needs a number of steps, not {count}")
        steps[int(accepted)] += count
    if sum(steps) == 0:
        raise UserError("synthetic histogram holds no steps")
    return tuple(count / sum(steps) for count in steps)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
