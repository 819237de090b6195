"""Is the answer right? Only where a prompt's reference can be checked without judgement."""

from __future__ import annotations

import re

_WRITTEN = re.compile(r"(?:(?<![\d.])[-−])?\d+(?:[.,]\d+)*(?:[eE][-−+]?\d+)?")
_BELIEVED = re.compile(r"-?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?(?:[eE][-+]?\d+)?")


def correct(output: str, reference: str | None) -> bool | None:
    """Whether the last number of `output` is the one after the reference's "####" (GSM8K's convention, Cobbe et al.
    2021, arXiv 2110.14168); None for a reference without one."""
    _, marked, answer = (reference or "").rpartition("####")
    wanted = _number(answer) if marked else None
    return None if wanted is None else _number(output) == wanted


def _number(text: str) -> float | None:
    """The last number; None where there is none, or it may be read as another: its comma groups no three digits."""
    found = [written.replace("−", "-") for written in _WRITTEN.findall(text)]
    return float(found[-1].replace(",", "")) if found and _BELIEVED.fullmatch(found[-1]) else None
