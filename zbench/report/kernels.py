"""From `kernels.json` to a page. Reads the file only."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from zbench.records import KERNELS, KERNELS_VERSION, read_versioned
from zbench.report.findings import quantity
from zbench.report.html import Entry, Line, Notes, Table, flat_sections, roof_rows, templates

PAGE = "kernels.html"
HEADINGS = ["Time", "Of the roof", "Bound by", "Over the reference"]

Data = Mapping[str, Any]  # a piece of kernels.json


def render(folder: Path) -> Path:
    """Write `kernels.html` beside a folder's `kernels.json`; return its path. Rendering twice gives identical bytes.

    Raises UserError where the file is damaged or the folder cannot be written.
    """
    from zbench.cache import write

    run = _read(folder)
    parts = [
        {"name": name, "table": _table(list(rows))}
        for name, rows in itertools.groupby(run["rows"], key=lambda row: row["operator"])
    ]
    environment = run["environment"]
    page = templates().get_template("kernels.html").render(
        run=run,
        facts=[("Device", environment["device"]["name"]), ("Threads", str(environment["torch"]["threads"]))],
        answers=_answers(run),
        warnings=_warnings(run),
        parts=parts,
        roofs=roof_rows(run["roofs"], {}),
        environment=flat_sections(environment),
        scenario=yaml.safe_dump(run["scenario"], sort_keys=False, allow_unicode=True),
    )  # fmt: skip
    write(folder / PAGE, page)
    return folder / PAGE


def headline(folder: Path) -> list[str]:
    """What ran, how close to the roof, and the warnings; one sentence per line."""
    run = _read(folder)
    return [*_answers(run), *(f"warning: {sentence}" for sentence in _warnings(run))]


def _read(folder: Path) -> Data:
    return read_versioned(folder / KERNELS, KERNELS_VERSION, "a run of kernels", "zbench run")


def _answers(run: Data) -> list[str]:
    return [_answer(name, list(rows)) for name, rows in itertools.groupby(run["rows"], key=lambda row: row["operator"])]


def _answer(name: str, rows: list[Data]) -> str:
    """The implementation that is used, which comes first in every row where it was timed."""
    used = [row["times"][0] for row in rows if "kernel" not in row["missing"]]
    if not used:
        return f"{name}: what runs was timed in no case."
    shares = sorted(time["share_of_roof"] for time in used)
    said = _range([quantity(share, "1") for share in (shares[0], shares[-1])])
    gains = sorted(t["speedup_over_reference"]["value"] for t in used if t["speedup_over_reference"])
    over = f", {_range([quantity(g, 'ratio') for g in (gains[0], gains[-1])])} its reference" if gains else ""
    return f"{name} runs {used[0]['implementation']}: {said} of the measured roof{over}."


def _range(ends: list[str]) -> str:
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _warnings(run: Data) -> list[str]:
    found = [run["roofs"]["warning"]] if run["roofs"].get("warning") else []
    for row in run["rows"]:
        place = f"{row['operator']}, {row['case']}"
        if why := row["missing"].get("kernel"):
            found.append(f"{place}: the kernel that is used {why}; it is not timed.")
        found += [
            f"{place}: {time['name']} is above the measured roof: the roof or the count is wrong, or a cache served it."
            for time in row["times"]
            if time["above_roof"]
        ]
    small = sorted({row["operator"] for row in run["rows"] if not row["past_cache"]})
    if small:
        least = "four times the last-level cache (1 GiB where its size is unknown)"
        found.append(f"Arguments of {', '.join(small)} are less than {least} in some cases, which are marked.")
    return found


def _table(rows: list[Data]) -> Table:
    notes, lines = Notes(), []
    for row in rows:
        moved = row["bytes_read"] + row["bytes_written"]
        work = f"{quantity(row['flops'], 'FLOP')}, {quantity(moved, 'B')}, {row['dtype']}"
        missing = [f"{name}: {why}" for name, why in row["missing"].items()]
        cached = [] if row["past_cache"] else ["the last-level cache may have held some of its arguments"]
        for index, time in enumerate(row["times"]):
            first = not index
            ran = [] if time["implementation"] == time["name"] else [time["implementation"]]
            caveat = "; ".join([*ran, time["started"], *([work, *cached, *missing] if first else [])])
            gain = time["speedup_over_reference"]
            entries = [
                Entry("Time", quantity(time["seconds"]["value"], "s"), _interval(time["seconds"], "s")),
                Entry("Of the roof", quantity(time["share_of_roof"], "1"), wrong=time["above_roof"]),
                Entry("Bound by", row["bound"]),
                Entry("Over the reference", quantity(gain["value"], "ratio"), _interval(gain, "ratio"))
                if gain
                else Entry("Over the reference", "is the reference"),
            ]
            lines.append(Line(f"{row['case']}: {time['name']}", entries, caveat))
    return Table(HEADINGS, lines, notes.listed())


def _interval(found: Data, unit: str) -> str:
    if found["low"] is None:
        return ""
    return f"{quantity(found['low'], unit)} – {quantity(found['high'], unit)}"
