"""A gate's verdict in the forms that people, GitHub and other programs read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from zbench.errors import UserError
from zbench.gate import Gate, Row, Snapshot, Value, Verdict
from zbench.metrics import METRICS
from zbench.report.findings import quantity

# GitHub shows ten errors and ten warnings of a step and drops the rest; a step's summary may have 1 MiB.
ANNOTATIONS = 10
SUMMARY_BYTES = 2**20
# What XML 1.0 has no way to say.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Judged:
    """A run as the gate sees it, and its verdict where there was a baseline."""

    run: Snapshot
    gate: Gate | None
    strict: bool = False

    @property
    def verdict(self) -> Gate:
        if self.gate is None:
            raise UserError("a verdict needs something to compare with: give --baseline")
        return self.gate


def text(gate: Gate, verbose: bool = False) -> list[str]:
    """One line per metric, the worst first; counts that did not change are one line per cell unless `verbose`."""
    if gate.reasons:
        return [*(f"not comparable: {reason}" for reason in gate.reasons), summary(gate)]
    shown, unchanged = [], dict[str, int]()
    for row in gate.rows:
        if verbose or row.timed or row.verdict != "ok":
            shown.append(row)
        else:
            unchanged[row.cell] = unchanged.get(row.cell, 0) + 1
    lines = [f"{_word(row):<14} {row.cell}: {sentence(row)}" for row in _worst_first(shown)]
    lines += [f"{'ok':<14} {cell}: {count} counts unchanged" for cell, count in unchanged.items()]
    return [*lines, *(f"note: {note}" for note in gate.notes), summary(gate)]


def summary(gate: Gate) -> str:
    """ "regressed: 2 of 41 metrics regressed, 1 is inconclusive; against NAME of DATE"."""
    if gate.reasons:
        return f"not comparable: {gate.candidate} against {gate.baseline}"
    counts = {verdict: len(gate.of(verdict, required=False)) for verdict in _ORDER if verdict != "ok"}
    found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "nothing changed"
    advisory = sum(not row.required for row in gate.of("regressed", required=False))
    aside = f" ({advisory} only advisory)" if advisory else ""
    return f"{gate.verdict}: {len(gate.rows)} metrics, {found}{aside}; {gate.candidate} against {gate.baseline}"


def sentence(row: Row) -> str:
    """ "decode_tps 61.2 → 60.9 tokens/s: -0.5% (-1.9% to +0.9%), n = 8, tolerance 5%, sees 6.8% slower"."""
    name = f"{row.metric} ({row.part})" if row.part else row.metric
    before, now = _both(row)
    parts = [f"{name} {before}" if row.verdict == "ok" and before == now else f"{name} {before} → {now}"]
    if row.change:
        parts[0] += f": {_percent(row.change)}"
    if row.low is not None and row.high is not None:
        parts[0] += f" ({_percent(row.low)} to {_percent(row.high)})"
        parts += [f"n = {row.n}", f"tolerance {row.tolerance:.0%}"]
    if row.detects is not None:
        parts.append(f"sees what is {row.detects:.1%} slower")
    return ", ".join(filter(None, [*parts, row.note]))


def markdown(judged: Judged) -> str:
    gate = judged.verdict
    lines = [f"### zbench gate: {gate.verdict}", "", summary(gate), ""]
    lines += [f"- not comparable: {reason}" for reason in gate.reasons]
    told = [row for row in _worst_first(gate.rows) if row.timed or row.verdict != "ok"]
    if told:
        lines += ["| verdict | cell | metric | baseline | run | change | |", "|---|---|---|---|---|---|---|"]
    for row in told:
        before, now = _both(row)
        cells = (_word(row), row.cell, f"{row.metric} {row.part}", before, now, _change(row), row.note)
        lines.append("| " + " | ".join(cell.strip().replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    same = sum(row.verdict == "ok" and not row.timed for row in gate.rows)
    lines += ["", f"{same} counts unchanged.", *(f"- {note}" for note in gate.notes)]
    return "\n".join(lines) + "\n"


def step_summary(judged: Judged, room: int = SUMMARY_BYTES) -> str:
    """Markdown cut at a line so that GitHub takes it."""
    whole = markdown(judged)
    if len(whole.encode()) <= room:
        return whole
    said = "\n\n(cut: GitHub takes no more)\n"
    kept = whole.encode()[: room - len(said.encode())].decode(errors="ignore")
    return kept[: kept.rfind("\n")] + said


def workflow_commands(judged: Judged) -> list[str]:
    """GitHub workflow commands: an error for what fails the gate, a warning for what it only reports."""
    gate = judged.verdict
    if gate.reasons:
        return [_command("error", "not comparable", "; ".join(gate.reasons))]
    failing = [row for row in _worst_first(gate.rows) if _fails(row, judged.strict)]
    noted = [
        row
        for row in _worst_first(gate.rows)
        if row.verdict not in ("ok", "improved") and not _fails(row, judged.strict)
    ]
    return [*_some("error", failing), *_some("warning", noted)]


def junit(judged: Judged) -> str:
    """One test case per metric. What is inconclusive is skipped, and fails with --strict."""
    gate = judged.verdict
    suite = ElementTree.Element("testsuite", name="zbench gate")
    for row in gate.rows:
        case = ElementTree.SubElement(
            suite, "testcase", classname=_xml(row.cell), name=_xml(f"{row.metric} {row.part}".strip()), time="0"
        )
        if _fails(row, judged.strict):
            kind = "error" if row.verdict == "not comparable" else "failure"
            ElementTree.SubElement(case, kind, type=row.verdict, message=_xml(sentence(row)))
        elif row.verdict in ("inconclusive", "not comparable", "regressed"):
            ElementTree.SubElement(case, "skipped", message=_xml(f"{row.verdict}: {sentence(row)}"))
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(sentence(row))
    for reason in gate.reasons:
        case = ElementTree.SubElement(suite, "testcase", classname="gate", name="comparable", time="0")
        ElementTree.SubElement(case, "error", type="not comparable", message=_xml(reason))
    for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(len(list(suite.iter(tag)))))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def as_json(judged: Judged) -> str:
    return json.dumps(judged.verdict.to_dict(judged.strict), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def action_benchmark(better: str) -> Callable[[Judged], str]:
    """The custom format of github-action-benchmark, which takes metrics of one direction at a time."""

    def write(judged: Judged) -> str:
        entries = [
            {"name": f"{cell}: {metric} {part}".strip(), "unit": METRICS[metric].unit or "1", "value": value}
            for cell, metric, part, value in _numbers(judged.run)
            if METRICS[metric].better == better
        ]
        return json.dumps(entries, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    return write


def bencher(judged: Judged) -> str:
    """Bencher Metric Format: {benchmark: {measure: {"value": ...}}}."""
    found: dict[str, dict[str, Any]] = {}
    for cell, metric, part, value in _numbers(judged.run):
        found.setdefault(cell, {})[f"{metric} {part}".strip()] = {"value": value}
    return json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Judged], str]] = {
    "text": lambda judged: "\n".join(text(judged.verdict, verbose=True)) + "\n",
    "json": as_json,
    "markdown": markdown,
    "junit": junit,
    "action-benchmark-smaller": action_benchmark("lower"),
    "action-benchmark-bigger": action_benchmark("higher"),
    "bencher": bencher,
}

_ORDER: tuple[Verdict, ...] = ("regressed", "not comparable", "inconclusive", "improved", "ok")


def _worst_first(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (_ORDER.index(row.verdict), not row.required))


def _word(row: Row) -> str:
    return row.verdict if row.required or row.verdict == "ok" else f"({row.verdict})"


def _fails(row: Row, strict: bool) -> bool:
    failing = ("regressed", "not comparable", *(("inconclusive",) if strict else ()))
    return row.required and row.verdict in failing


def _both(row: Row) -> tuple[str, str]:
    before, now = (_shown(value, row.unit) for value in (row.baseline, row.candidate))
    if before == now and row.baseline != row.candidate:  # differ beyond the digits that are usually shown
        return f"{row.baseline:.12g}", f"{row.candidate:.12g} {row.unit}".strip()
    return before, now


def _shown(value: Value, unit: str) -> str:
    return "none" if value is None else value if isinstance(value, str) else quantity(value, unit)


def _change(row: Row) -> str:
    if row.change is None:
        return ""
    around = f" ({_percent(row.low)} to {_percent(row.high)})" if row.low is not None and row.high is not None else ""
    return _percent(row.change) + around


def _percent(change: float) -> str:
    return f"{change:+.1%}" if abs(change) >= 0.001 or change == 0 else f"{change * 100:+.2g}%"


def _numbers(run: Snapshot) -> Iterable[tuple[str, str, str, float]]:
    for cell, taken in run.cells.items():
        for metric in METRICS:
            values = {"": taken.timed[metric].value} if metric in taken.timed else taken.exact.get(metric, {})
            yield from ((cell, metric, part, value) for part, value in values.items() if isinstance(value, float))


def _some(level: str, rows: list[Row]) -> list[str]:
    shown = rows if len(rows) <= ANNOTATIONS else rows[: ANNOTATIONS - 1]
    lines = [_command(level, f"{row.metric} {row.verdict}", f"{row.cell}: {sentence(row)}") for row in shown]
    if more := len(rows) - len(shown):
        lines.append(_command(level, "zbench gate", f"and {more} more; see the summary"))
    return lines


def _command(level: str, title: str, message: str) -> str:
    """Escaped as the runner unescapes it (actions/toolkit, command.ts)."""

    def data(said: str) -> str:
        return said.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    heading = data(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={heading}::{data(message)}"


def _xml(said: str) -> str:
    return _NO_XML.sub("?", said)
