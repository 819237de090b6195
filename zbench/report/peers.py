"""The table "against peers" as Markdown, with all that must be known beside it: to keep in a document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zbench.report.html import Entry, Line, Table, facts, peers_table
from zbench.results import Results


def to_markdown(results: Results) -> str:
    """A table for each point of the matrix that has peers; "" where there are none."""
    tables = [(point.label, table) for point in results.points if (table := peers_table(results, point))]
    if not tables:
        return ""
    parts = [_conditions(results)]
    for label, table in tables:
        parts += [f"At {label}:"] if label else []
        parts += [_table(table)]
    return "\n\n".join(parts) + "\n"


def _conditions(results: Results) -> str:
    manifest = results.run.manifest
    environment = manifest.environment
    cpu, packages, own = (_section(environment, name) for name in ("cpu", "packages", "zbench"))
    machine = [
        f"{cpu.get('model', 'processor not recorded')}, {cpu.get('physical_cores', '?')} cores",
        " ".join(cpu.get("flags", ())),
    ]
    versions = [f"zbench {manifest.zbench_version} ({str(own.get('commit', 'unknown'))[:9]})"]
    versions += [f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages]
    lines = [("Measured", manifest.created[:10]), ("Processor", ", ".join(filter(None, machine)))]
    lines += [fact for fact in facts(results) if fact[1] != cpu.get("model")]  # the device, where it is the processor
    lines += [("Output tokens", _outputs(results)), ("Versions", ", ".join(versions))]
    return "\n".join(f"- {term}: {value}" for term, value in lines)


def _outputs(results: Results) -> str:
    counts = results.run.requests["tokens"]
    return "none" if counts.empty else " to ".join(dict.fromkeys((f"{counts.min():.0f}", f"{counts.max():.0f}")))


def _section(environment: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = environment.get(name)
    return found if isinstance(found, Mapping) else {}


def _table(table: Table) -> str:
    headings = ["Engine", *table.headings]
    lines = [headings, ["---"] * len(headings), *(_row(row, len(table.headings)) for row in table.rows)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    notes = "\n".join(f"{mark}. {note}" for mark, note in table.notes)
    return f"{text}\n\n{notes}" if notes else text


def _row(row: Line, columns: int) -> list[str]:
    name = _escaped(f"{row.name} ({row.caveat})" if row.caveat else row.name)
    cells = [_cell(entry) for entry in row.entries] or ["no result"] + [""] * (columns - 1)
    if row.failure:
        cells[0] = f"{cells[0]}: {_escaped(row.failure)}"
    return [name, *cells]


def _cell(entry: Entry) -> str:
    below = f" ({entry.below})" if entry.below else ""
    mark = f" [{entry.mark}]" if entry.mark else ""
    return _escaped(f"{entry.text}{below}{mark}")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
