"""The report as one self-contained page: data for the template, nothing else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from zbench.metrics import DEFINITIONS_VERSION, METRICS, Cell, MetricRow, Run, caveats, definitions_hash
from zbench.records import PEERS, CellRecord
from zbench.report import readings, telemetry
from zbench.report.figures import Drawn
from zbench.report.findings import interval, quantity, speculation, warnings
from zbench.results import Point, Results, main_kind

if TYPE_CHECKING:
    from zbench.report.scaling import Scaling

# (heading, metric, part); part "main" is the kind of forward that takes most of decode, which this column names, or a
# word below the engine where columns are many.
MAIN_KIND = ("Most of decode", "", "main")
ALL_TOKENS = ("All tokens/s", "throughput", "")  # at batch 1 there is one sequence
ENGINE_COLUMNS = (
    ("Tokens/s", "decode_tps", ""),
    ALL_TOKENS,
    ("Per token", "tpot", ""),
    ("First token", "ttft", ""),
    ("Tokens per forward", "tokens_per_forward", ""),
    ("Acceptance length", "acceptance_length", "micro"),
    ("Speedup", "speedup", ""),
    ("Of bandwidth roof", "mbu", "main"),
    ("Of compute roof", "mfu", "main"),
    ("Bound by", "bound", "main"),
    ("Same outputs", "agreement", "prompts"),
    ("Prompts right in every repeat", "accuracy", ""),
    ("Code that passes", "pass_at_1", ""),
    ("Target’s own tokens", "lossless", ""),
)
FORWARD_COLUMNS = (
    ("Time", "forward_seconds"),
    ("Floor", "floor_seconds"),
    ("FLOP per byte", "intensity"),
    ("Experts", "experts_per_forward"),
    ("Bandwidth", "achieved_bandwidth"),
    ("Of roof", "mbu"),
    ("Of spec", "mbu_spec"),
    ("Compute", "achieved_flops"),
    ("Of roof", "mfu"),
    ("Of spec", "mfu_spec"),
    ("Bound by", "bound"),
)
SPECULATION_COLUMNS = (
    ("Acceptance length", "acceptance_length", "micro"),
    ("Mean of requests", "acceptance_length", "macro"),
    ("Breaks even at", "break_even_acceptance", ""),
    ("Tokens per forward", "tokens_per_forward", ""),
    ("Per weighted forward", "tokens_per_weighted_forward", ""),
    ("Switching per step", "switching_seconds", ""),
    ("Outcomes prepared", "proposal_coverage", ""),
    ("Looked up", "lookup_share", ""),
    ("Tokens per lookup", "lookup_acceptance_length", ""),
)
DIFFUSION_COLUMNS = (
    ("Forwards per canvas", "diffusion_steps_per_canvas", ""),
    ("Tokens per denoising", "diffusion_committed_per_step", ""),
    ("Masked places per request", "diffusion_canvas_positions", ""),
)
SERVER_COLUMNS = (
    ("First token, median", "served_ttft", "p50"),
    ("99th percentile", "served_ttft", "p99"),
    ("Between chunks, median", "inter_chunk_latency", "p50"),
    ("Whole request, median", "request_latency", "p50"),
    ("99th percentile", "request_latency", "p99"),
    ("Requests/s", "request_throughput", ""),
    ("Goodput", "goodput", ""),
    ("Waited at the client", "client_queue", ""),
    ("Client’s share", "client_share", ""),
    ("Acceptance length", "server_acceptance_length", ""),
    ("Output tokens off by", "token_count_difference", "output"),
)
FIRST_OTHER = "First other token"
PEER_COLUMNS = (
    ("Tokens/s", "decode_tps", ""),
    ("First token", "ttft", ""),
    ("Same outputs", "agreement", "prompts"),
    (FIRST_OTHER, "first_difference", ""),
    ("Target’s own tokens", "lossless", ""),
)
PROPOSALS_COLUMNS = (
    ("Rows", "rows_per_forward", "draft+verify"),
    ("Tokens per forward", "tokens_per_forward", ""),
    ("Step", "step_seconds", ""),
    ("Step at the roofs (predicted)", "predicted_step_seconds", ""),
    ("Tokens/s", "decode_tps", ""),
    ("Speedup", "speedup", ""),
    ("Outcomes prepared", "proposal_coverage", ""),
    ("Breaks even at", "break_even_acceptance", ""),
    MAIN_KIND,
    ("Bound by", "bound", "main"),
)
ROW_COLUMNS = (
    ("Time", "forward_seconds"),
    ("Over one row", "row_cost"),
    ("Floor (predicted)", "floor_seconds"),
    ("FLOP per byte", "intensity"),
    ("Experts", "experts_per_forward"),
    ("Of bandwidth roof", "mbu"),
    ("Of compute roof", "mfu"),
    ("Bound by", "bound"),
)
CATEGORY_COLUMNS = (("Acceptance length", "category_acceptance_length"), ("Speedup", "category_speedup"))
IN_HEADING = (
    " tokens/s",
    " tokens",
    "/token",
    " FLOP/B",
    " experts",
    " token/J",
)  # units that the headings say already
# Shown in every row or nowhere, as they exist for some engines and devices only.
OPTIONAL = {
    "acceptance_length", "accuracy", "pass_at_1", "proposal_coverage", "lookup_share", "lookup_acceptance_length",
    "experts_per_forward", "mbu_spec", "mfu_spec",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One cell of a table: the value, its interval below it, and the mark of a footnote."""

    heading: str
    text: str
    below: str = ""
    mark: str = ""
    wrong: bool = False


@dataclass(frozen=True)
class Line:
    """One row of a table. `caveat`, `failure` and `kind`, of which forwards it is, stand below its name."""

    name: str
    entries: list[Entry]
    caveat: str = ""
    failure: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Table:
    headings: list[str]
    rows: list[Line]
    notes: list[tuple[str, str]]  # (mark, text)


@dataclass
class Notes:
    """Footnotes in order of first use: equal texts share a mark."""

    marks: dict[str, str] = field(default_factory=dict)

    def mark(self, text: str) -> str:
        return self.marks.setdefault(text, str(len(self.marks) + 1)) if text else ""

    def listed(self) -> list[tuple[str, str]]:
        return [(mark, text) for text, mark in self.marks.items()]


def page(
    results: Results, overviews: Sequence[Drawn], drawn: Sequence[Sequence[Drawn]], across: Sequence[Scaling] = ()
) -> str:
    """The HTML. `drawn` holds the figures of the first points; further points are shown as tables only. `across` is
    what a run over several devices has beside them."""
    manifest = results.run.manifest
    figures = [*drawn, *([] for _ in results.points[len(drawn) :])]
    template = templates().get_template("report.html")
    return template.render(
        manifest=manifest,
        facts=facts(results),
        answers=readings.answers(results),
        warnings=warnings(results),
        overviews=[image(figure) for figure in overviews],
        across=[
            {"label": part.label, "sentences": part.sentences, "table": part.table, "figures": map(image, part.figures)}
            for part in across
        ],
        points=[
            {
                "label": point.label,
                "engines": _engine_table(results, point),
                "rows": [_row_table(results, cell) for cell in readings.sweeping(point.cells)],
                "forwards": _forward_table(results, point),
                "figures": [image(figure) for figure in mine if figure.section == "results"],
                "speculation_table": _speculation_table(results, point),
                "proposals": _proposals_table(results, point),
                "diffusion_table": _diffusion_table(results, point),
                "peers": peers_table(results, point),
                "server_table": _server_table(results, point),
                "speculation": [sentence for cell in point.cells if (sentence := speculation(cell, results))],
                "speculation_figures": [image(figure) for figure in mine if figure.section == "speculation"],
                "categories": _category_table(results, point),
                "telemetry": _telemetry_table(results, point),
                "telemetry_figures": [image(figure) for figure in mine if figure.section == "telemetry"],
            }
            for point, mine in zip(results.points, figures, strict=True)
        ],
        clusters=clusters_of(results.run.manifest.cells),
        undrawn=len(results.points) - len(drawn),
        telemetry=telemetry.said(results),
        environment=flat_sections(manifest.environment),
        roofs=_roofs(results),
        roofs_measured=str((manifest.roofs or {}).get("measured", ""))[:10],
        scenario=yaml.safe_dump(manifest.scenario, sort_keys=False, allow_unicode=True),
        models=flat_sections(manifest.models),
        definitions=list(METRICS.values()),
        definitions_version=DEFINITIONS_VERSION,
        definitions_hash=definitions_hash(),
    )


def templates() -> Environment:
    """Whatever a page is given is text, never markup."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def clusters_of(cells: Iterable[CellRecord]) -> str:
    """What is resampled whole: the prompts of a batch share their steps."""
    several = {cell.batch > 1 for cell in cells}
    return "prompts or batches" if len(several) > 1 else "batches" if several == {True} else "prompts"


def facts(results: Results) -> list[tuple[str, str]]:
    """What was measured, and on what, in a handful of short lines."""
    manifest, cells = results.run.manifest, results.run.manifest.cells
    facts = [
        ("Model", _joined(_model(manifest.models, cell.model) for cell in cells)),
        ("Device", _lookup(manifest.environment, "device", "name")),
        ("Precision", _joined(cell.dtype for cell in cells)),
        ("Batch", _joined(str(cell.batch) for cell in cells)),
        ("Sampling", _joined(_sampling(cell.sampling) for cell in cells)),
        ("Prompts", _prompts(results)),
    ]
    if _lookup(manifest.environment, "device", "backend") == "cpu":
        facts.insert(2, ("CPU threads", _lookup(manifest.environment, "torch", "threads")))
    return facts


def _prompts(results: Results) -> str:
    requests = results.run.requests
    prompts, repeats = requests["prompt_id"].nunique(), requests["repeat"].nunique()
    return f"{prompts} × {repeats} repeat{'' if repeats == 1 else 's'}" if prompts else "none succeeded"


def _model(models: Mapping[str, Any], name: str) -> str:
    parameters = models.get(name, {}).get("parameters")
    return f"{name}, {quantity(parameters / 1e6, 'M parameters')}" if isinstance(parameters, int | float) else name


def _sampling(sampling: Mapping[str, Any]) -> str:
    temperature = sampling.get("temperature")
    if temperature is None:
        return "not recorded"
    return f"temperature {temperature:g}" if temperature else "greedy"


def _joined(words: Any) -> str:
    return ", ".join(dict.fromkeys(words)) or "none"


def _lookup(nested: Mapping[str, Any], *keys: str) -> str:
    for key in keys:
        if not isinstance(nested, Mapping) or key not in nested:
            return "not recorded"
        nested = nested[key]
    return str(nested)


def _engine_table(results: Results, point: Point) -> Table:
    columns = [c for c in ENGINE_COLUMNS if c[1] not in OPTIONAL or _known(results, point.cells, c[1])]
    if all(cell.record.batch == 1 for cell in point.cells):
        columns.remove(ALL_TOKENS)
    return _by_engine(
        results, [cell for cell in point.cells if cell.record.engine != "forward" or not cell.trials], columns
    )


def _row_table(results: Results, cell: Cell) -> Table:
    """One line per number of rows."""
    columns = [c for c in ROW_COLUMNS if c[1] not in OPTIONAL or _known(results, [cell], c[1])]
    notes, lines = Notes(), []
    for rows in readings.row_bounds(results, cell):
        parts = {"row_cost": str(rows)}
        kind = readings.row_kind(rows)
        entries = [shown(h, results.row(cell, metric, parts.get(metric, kind)), notes) for h, metric in columns]
        lines.append(Line(kind.removeprefix("decode, "), entries))
    return Table([heading for heading, _ in columns], lines, notes.listed())


def _proposals_table(results: Results, point: Point) -> Table | None:
    """One line per block size and number of proposals, where these were swept."""
    cells = [cell for mine in readings.by_block(results, point.cells).values() for cell in mine.values()]
    return _by_engine(results, cells, PROPOSALS_COLUMNS) if cells else None


def _speculation_table(results: Results, point: Point) -> Table:
    cells = [cell for cell in point.cells if not cell.verifies.empty]
    columns = [c for c in SPECULATION_COLUMNS if c[1] not in OPTIONAL or _known(results, cells, c[1])]
    return _by_engine(results, cells, columns)


def _diffusion_table(results: Results, point: Point) -> Table | None:
    """One row per engine that fills canvases of masks; None where none does."""
    cells = [cell for cell in point.cells if results.value(cell, "diffusion_steps_per_canvas") is not None]
    return _by_engine(results, cells, DIFFUSION_COLUMNS) if cells else None


def _telemetry_table(results: Results, point: Point) -> Table | None:
    """One row per engine; None where no sensor said anything."""
    columns = [c for c in telemetry.COLUMNS if _known(results, point.cells, c[1])]
    if not columns:
        return None
    table = _by_engine(results, point.cells, columns)
    for line, cell in zip(table.rows, point.cells, strict=True):
        if cell.trials:
            seconds = sum(trial.wall_seconds for trial in cell.trials)
            line.entries.insert(0, Entry("Trials", str(len(cell.trials)), quantity(seconds, "s")))
    return Table(["Trials", *table.headings], table.rows, table.notes)


def _server_table(results: Results, point: Point) -> Table | None:
    """One row per server; None where there is none."""
    cells = [cell for cell in point.cells if results.value(cell, "request_throughput") is not None]
    return _by_engine(results, cells, SERVER_COLUMNS) if cells else None


def peers_table(results: Results, point: Point) -> Table | None:
    """The baseline and below it every decoder that is not zbench's own; None where there is none."""
    peers = [cell for cell in point.cells if cell.record.engine in PEERS and not cell.record.baseline]
    own = next((cell for cell in point.cells if cell.record.baseline), None)
    if not peers or own is None:
        return None
    heading, notes, rows = f"{own.record.label} is so many times as fast", Notes(), []
    for cell in (own, *peers):
        entries = []
        if cell.trials:
            kernels = cell.trials[0].kernels or {}
            rows_of = [(name, results.row(cell, metric, part)) for name, metric, part in PEER_COLUMNS]
            entries = [shown(name, _place(row) if name == FIRST_OTHER else row, notes) for name, row in rows_of]
            entries.insert(1, shown(heading, _inverse(results.row(cell, "speedup")), notes))
            version = f"zbench {results.run.manifest.zbench_version}" if cell is own else "not recorded"
            entries.insert(0, Entry("Version", kernels.get("version") or kernels.get("server") or version))
            entries.append(
                Entry("Timed", kernels.get("times", "every chunk" if cell.trials[0].server else "every step"))
            )
        rows.append(Line(cell.record.label, entries, ", ".join(caveats(cell.record)), _failure(results, cell)))
    headings = [name for name, *_ in PEER_COLUMNS]
    return Table(["Version", headings[0], heading, *headings[1:], "Timed"], rows, notes.listed())


def _place(row: MetricRow) -> MetricRow:
    """A position as the whole number that it is."""
    return replace(row, value=f"{row.value:.0f}") if isinstance(row.value, float) else row


def _inverse(row: MetricRow) -> MetricRow:
    """How many times as fast the baseline is, from how many times as fast this is."""
    if not isinstance(row.value, float):
        return row
    low, high = (1 / bound if bound else None for bound in (row.high, row.low))
    return replace(row, value=1 / row.value, low=low, high=high)


def _by_engine(results: Results, cells: Sequence[Cell], columns: Sequence[tuple[str, str, str]]) -> Table:
    """One row per engine; `columns` as in ENGINE_COLUMNS."""
    notes = Notes()
    rows = []
    for cell in cells:
        entries = of_engine(results, cell, columns, notes) if cell.trials else []
        unnamed = MAIN_KIND not in columns and any(part == "main" for *_, part in columns)
        kind = (unnamed and main_kind(cell)) or ""
        rows.append(Line(cell.record.label, entries, ", ".join(caveats(cell.record)), _failure(results, cell), kind))
    return Table([heading for heading, *_ in columns], rows, notes.listed())


def of_engine(results: Results, cell: Cell, columns: Sequence[tuple[str, str, str]], notes: Notes) -> list[Entry]:
    """One entry per column; `columns` as in ENGINE_COLUMNS."""
    kind = main_kind(cell)
    return [
        Entry(heading, kind)
        if kind and not metric
        else shown(heading, results.row(cell, metric or "bound", kind if part == "main" else part), notes)
        for heading, metric, part in columns
    ]


def _forward_table(results: Results, point: Point) -> Table | None:
    """One row per kind of forward; None where no engine's forwards are seen."""
    columns = [c for c in FORWARD_COLUMNS if c[1] not in OPTIONAL or _known(results, point.cells, c[1])]
    notes = Notes()
    rows = [
        Line(f"{cell.record.label}: {kind}", [shown(h, results.row(cell, m, kind), notes) for h, m in columns])
        for cell in point.cells
        for kind in cell.forwards["kind"].unique()
    ]
    return Table([heading for heading, _ in columns], rows, notes.listed()) if rows else None


def _category_table(results: Results, point: Point) -> Table | None:
    """One row per drafting engine and category; None where prompts are of one category."""
    notes = Notes()
    rows = [
        Line(
            f"{cell.record.label}: {category}",
            [shown(heading, results.row(cell, metric, category), notes) for heading, metric in CATEGORY_COLUMNS],
            ", ".join(caveats(cell.record)),
        )
        for cell in point.cells
        if not cell.verifies.empty
        for category in sorted(cell.requests["category"].unique())
        if any(results.value(cell, metric, category) is not None for _, metric in CATEGORY_COLUMNS)
    ]
    return Table([heading for heading, _ in CATEGORY_COLUMNS], rows, notes.listed()) if rows else None


def _known(results: Results, cells: Sequence[Cell], metric: str) -> bool:
    ids = {cell.record.id for cell in cells}
    return any(row.value is not None for row in results.rows if row.metric == metric and row.cell in ids)


def shown(heading: str, row: MetricRow, notes: Notes) -> Entry:
    """A metric as the tables of all pages show it."""
    reason = row.note.removeprefix("unavailable: ")
    if row.value is None:
        if reason == "this is the baseline":
            return Entry(heading, "baseline")
        return Entry(heading, "n/a", mark=notes.mark(reason))
    if row.metric == "bound":
        return Entry(heading, str(row.value), below=row.note.removeprefix("measured "))
    # Too few prompts is said once, among the warnings.
    kept = "; ".join(part for part in row.note.split("; ") if part and not part.startswith("too few"))
    text = in_column(row.value, row.unit) if isinstance(row.value, float) else row.value
    return Entry(heading, text, interval(row), notes.mark(kept), row.status == "error")


def in_column(value: float, unit: str) -> str:
    """A value under a heading that says its unit."""
    text = quantity(value, unit)
    for said in IN_HEADING:
        text = text.removesuffix(said)
    return text


def _failure(results: Results, cell: Cell) -> str:
    if not cell.trials and not cell.failed:
        return cell.record.absent or "no trial was run"
    if not cell.failed:
        return ""
    note = results.row(cell, "failed_trials").note
    return f"{len(cell.failed)} of {len(cell.failed) + len(cell.trials)} trials failed; {note}"


def _roofs(results: Results) -> list[tuple[str, str, str]]:
    kept = results.run.manifest.roofs or {}
    return [*_roof_beside(results.run), *roof_rows(kept, results.run.manifest.specs or {})]


def _roof_beside(run: Run) -> list[tuple[str, str, str]]:
    """The read roof of the run, above that which was measured before it."""
    if not run.roof_samples:
        return []
    name, missed = "read, beside this run", [s.unavailable for s in run.roof_samples if s.unavailable]
    read = run.read_roof
    if read is None or not read.get("sampled"):
        return [(name, "unavailable", missed[0] if missed else "no roof was measured that could be read again")]
    spread = f"{quantity(read['low'], 'B/s')} to {quantity(read['high'], 'B/s')}, samples: {read['n']}"
    failed = f"; {len(missed)} more could not be taken: {missed[0]}" if missed else ""
    return [(name, quantity(read["value"], "B/s"), f"{spread}; shares and floors on this page are of it{failed}")]


def roof_rows(roofs: Mapping[str, Any], specs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(roof, value, spread or source) of the measured roofs and of the spec sheet."""
    rows = []
    for kind in ("bandwidth", "flops"):
        for name, roof in roofs.get(kind, {}).items():
            unit = roof["unit"]
            spread = f"{quantity(roof['low'], unit)} to {quantity(roof['high'], unit)}, n = {roof['n']}"
            rows.append((f"{name}, measured", quantity(roof["value"], unit), spread))
    if specs:
        peaks = {"bandwidth": (specs["bandwidth"], "B/s")} | {d: (v, "FLOP/s") for d, v in specs["flops"].items()}
        rows += [
            (f"{name}, spec sheet", quantity(value, unit), specs["name"])
            for name, (value, unit) in peaks.items()
            if value
        ]
    return rows


def flat_sections(nested: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(section, [(dotted key, value)]): values that are not mappings are gathered under ""."""
    loose = [(key, _shown(value)) for key, value in nested.items() if not isinstance(value, Mapping)]
    sections = [(key, _flat(value)) for key, value in nested.items() if isinstance(value, Mapping)]
    return [*([("", loose)] if loose else []), *sections]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in nested.items():
        name = f"{prefix}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, _shown(value))]
    return rows


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def image(figure: Drawn) -> dict[str, str]:
    sources = {
        theme: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for theme, svg in figure.svg.items()
    }
    return {"title": figure.title, "caption": figure.caption, "alt": figure.alt, **sources}
