"""From `projection.json` to a page and its figures. Reads the file only; every number on the page is a prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from zbench.records import PROJECTION, PROJECTION_VERSION, read_versioned
from zbench.report import figures
from zbench.report.figures import HATCHES, MARKERS, Drawn, Theme
from zbench.report.findings import quantity
from zbench.report.html import Entry, Line, Notes, Table, image, templates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "projection.html"
POINTS_DRAWN = 6  # as in a report

Data = Mapping[str, Any]  # a piece of projection.json


def render(folder: Path) -> Path:
    """Write `projection.html` and `figures/` beside a folder's `projection.json`; return the page's path.

    Rendering twice gives identical bytes. Raises UserError where the file is damaged or the folder cannot be written.
    """
    from zbench.cache import write

    projection = _read(folder)
    overview = _overview(projection)
    drawn = [_figures(projection, point) for point in projection["points"][:POINTS_DRAWN]]
    files: dict[str, str | bytes] = {PAGE: _page(projection, overview, drawn)}
    for figure in [*([overview] if overview else []), *(figure for point in drawn for figure in point)]:
        files |= {f"figures/{name}": content for name, content in figure.files().items()}
    for name, content in files.items():
        write(folder / name, content)
    return folder / PAGE


def headline(folder: Path) -> list[str]:
    """The answer and the warnings of a projection, one sentence per line."""
    projection = _read(folder)
    return [*_answers(projection), *(f"warning: {sentence}" for sentence in _warnings(projection))]


def _read(folder: Path) -> Data:
    return read_versioned(folder / PROJECTION, PROJECTION_VERSION, "a projection", "zbench project")


# --- Words ---


def _label(point: Data) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in point["point"].items())


def _answers(projection: Data) -> list[str]:
    """What pays most, and what a step costs where there is one point only."""
    device = projection["hardware"]["device"]
    gains = [
        (step["predicted_speedup"], step, point)
        for point in projection["points"]
        for step in point["engines"]
        if step["predicted_speedup"] is not None and step["acceptance"]
    ]
    steps = [point["predicted_autoregressive_seconds"] for point in projection["points"]]
    said = []
    if gains:
        speedup, step, point = max(gains, key=lambda gain: gain[0])
        where = f" at {_label(point)}" if _label(point) else ""
        said.append(
            f"Predicted on {device}{where}: {step['label']} decodes {quantity(speedup, 'ratio')} as fast as one token"
            f" per forward, if it gains {step['predicted_tokens_per_step']:.2f} tokens per step (synthetic acceptance)."
        )
    low, high = (quantity(value, "s") for value in (min(steps), max(steps)))
    said.append(f"Predicted on {device}: an autoregressive step takes {low if low == high else f'{low} to {high}'}.")
    return said


def _warnings(projection: Data) -> list[str]:
    hardware = projection["hardware"]
    peaks = "the measured roofs" if hardware["kind"] == "measured" else f"the {hardware['kind']}"
    found = [
        f"Every figure on this page is predicted from {peaks} of {hardware['device']} and from shapes; "
        "nothing was measured. Overhead is left out, so real steps take longer."
    ]
    if any(step["acceptance"] for point in projection["points"] for step in point["engines"]):
        found.append("Acceptance is synthetic: what these drafts would really gain is not known.")
    found += [
        f"{_label(point) or 'This scenario'} needs {quantity(point['memory_bytes'], 'B')}, more than one "
        f"{hardware['device']} has; its times are those of a device with more memory and the same bandwidth."
        for point in projection["points"]
        if point["fits"] is False
    ]
    missing = {
        f"{step['label']}: {step['unavailable']}."
        for point in projection["points"]
        for step in point["engines"]
        if step["unavailable"]
    }
    return [*found, *sorted(missing)]


def _point_sentences(point: Data) -> list[str]:
    ridge, attention = point["predicted_ridge_rows"], point["predicted_attention_ridge_rows"]
    memory = f"memory up to {ridge - 1:,} rows, arithmetic from there on" if ridge else "memory at any number of rows"
    return [
        f"Batch {point['batch']}, {point['context']:,} committed tokens per sequence (from {point['context_from']}).",
        f"An autoregressive step takes {quantity(point['predicted_autoregressive_seconds'], 's')} and is "
        f"{point['predicted_autoregressive_bound']}-bound; free rows: {point['predicted_free_token_slots']:,}. What "
        f"limits a forward is {'arithmetic at any number of rows' if ridge == 1 else memory}; attention over the cache "
        f"by itself is limited by arithmetic from {attention:.1f} rows on, at any batch and context.",
    ]


def _block_sentences(blocks: Data) -> list[str]:
    most, best = blocks["predicted_most_within_slack"], blocks["predicted_best"]
    fits = f"Up to {most} proposals stay" if most else "Not even one proposal stays"
    said = [f"{fits} within 1.1 autoregressive steps (predicted)."]
    if best is None:
        return [*said, f"{blocks['unavailable'].removeprefix('unavailable: ').capitalize()}."]
    return [*said, f"Most tokens/s are predicted at {best} proposals ({blocks['counts'][best]['rows']} rows)."]


# --- Tables ---


def _cell(notes: Notes, heading: str, text: str | None, why: str = "") -> Entry:
    """`why` is the footnote of what is not known."""
    if text is None:
        return Entry(heading, "n/a", mark=notes.mark(why.removeprefix("unavailable: ")))
    return Entry(heading, text)


def _shown(value: float | None, unit: str) -> str | None:
    return None if value is None else quantity(value, unit).removesuffix(" tokens/s")


def _engine_table(point: Data) -> Table:
    notes = Notes()
    rows = []
    for step in point["engines"]:
        why = step["unavailable"] or ""
        fed = [f"{forward['role']} {forward['rows']}" for forward in step["forwards"]]
        gained = step["predicted_tokens_per_step"]
        values = {
            "Rows per forward": ", ".join(dict.fromkeys(fed)) or None,
            "Step": _shown(step["predicted_step_seconds"], "s"),
            "Break-even": None if step["predicted_ratio"] is None else f"{step['predicted_ratio']:.2f}",
            "Tokens per step": None if gained is None else f"{gained:.2f}",
            "Tokens/s": _shown(step["predicted_tokens_per_second"], "tokens/s"),
            "Batch tokens/s": _shown(step["predicted_throughput"], "tokens/s"),
            "Speedup": _shown(step["predicted_speedup"], "ratio"),
            "Bound by": ", ".join(dict.fromkeys(f["predicted_bound"] for f in step["forwards"])) or None,
        }
        entries = [_cell(notes, heading, text, why) for heading, text in values.items()]
        caveat = ", ".join(filter(None, [figures.shortened(step["acceptance"] or "", 60), *step["notes"]]))
        rows.append(Line(step["label"], entries, caveat))
    return Table([entry.heading for entry in rows[0].entries], rows, notes.listed())


def _forward_table(point: Data) -> Table:
    rows, spread = [], point.get("tensor", 1) > 1
    for step in point["engines"]:
        for forward in step["forwards"]:
            traffic = forward["bytes_read"] + forward["bytes_written"]
            values = {
                "Memory": quantity(forward["predicted_memory_seconds"], "s"),
                "Arithmetic": quantity(forward["predicted_compute_seconds"], "s"),
                "Predicted": quantity(forward["predicted_seconds"], "s"),
                "Bytes": quantity(traffic, "B"),
                "FLOPs": quantity(forward["flops"], "FLOP"),
                "FLOP per byte": quantity(forward["flops"] / traffic, ""),
                **({"Sent": quantity(forward["collective_bytes"], "B")} if spread else {}),
                "Bound by": forward["predicted_bound"],
            }
            name = f"{step['label']}: {forward['role']}, {forward['rows']} rows"
            rows.append(Line(name, [Entry(heading, text) for heading, text in values.items()]))
    return Table([entry.heading for entry in rows[0].entries] if rows else ["Predicted"], rows, [])


def _block_table(point: Data, blocks: Data) -> Table:
    one, notes, rows = point["predicted_autoregressive_seconds"], Notes(), []
    for count in blocks["counts"]:
        rate, tokens = count["predicted_tokens_per_second"], count["predicted_tokens_per_step"]
        values = {
            "Rows": f"{count['rows']}",
            "Step": quantity(count["predicted_step_seconds"], "s"),
            "AR steps": f"{count['predicted_ratio']:.2f}",
            "Within 1.1": "yes" if count["within_slack"] else "no",
            "Covered": _shown(count["predicted_coverage"], "1"),
            "Tokens per step": None if tokens is None else f"{tokens:.2f}",
            "Speedup": _shown(rate * one if rate else None, "ratio"),
        }
        why = blocks["unavailable"] or "nothing is proposed"
        rows.append(Line(str(count["proposals"]), [_cell(notes, h, text, why) for h, text in values.items()]))
    return Table([entry.heading for entry in rows[0].entries], rows, notes.listed())


def _point_table(projection: Data) -> Table:
    notes, rows = Notes(), []
    for point in projection["points"]:
        ridge = point["predicted_ridge_rows"]
        entries = [
            Entry("Memory", quantity(point["memory_bytes"], "B"), wrong=point["fits"] is False),
            Entry("AR step", quantity(point["predicted_autoregressive_seconds"], "s")),
            Entry("Free rows", f"{point['predicted_free_token_slots']:,}"),
            _cell(notes, "Ridge", f"{ridge:,}" if ridge else None, "arithmetic is never the slower one"),
        ]
        for step in point["engines"]:
            if step["acceptance"] or step["unavailable"]:
                speedup = _shown(step["predicted_speedup"], "ratio")
                entries.append(_cell(notes, step["label"], speedup, step["unavailable"] or ""))
        rows.append(Line(_label(point), entries))
    return Table([entry.heading for entry in rows[0].entries], rows, notes.listed())


# --- Page ---


def _page(projection: Data, overview: Drawn | None, drawn: Sequence[Sequence[Drawn]]) -> str:
    points = projection["points"]
    drawn = [*drawn, *([] for _ in points[len(drawn) :])]
    template = templates().get_template("projection.html")
    return template.render(
        p=projection,
        facts=_facts(projection),
        answers=_answers(projection),
        warnings=_warnings(projection),
        overview={"figure": image(overview) if overview else None, "table": _point_table(projection)}
        if len(points) > 1
        else None,
        points=[
            {
                "label": _label(point),
                "sentences": _point_sentences(point),
                "engines": _engine_table(point),
                "forwards": _forward_table(point),
                "blocks": [
                    {
                        "label": blocks["label"],
                        "sentences": _block_sentences(blocks),
                        "table": _block_table(point, blocks),
                    }
                    for blocks in point["blocks"]
                ],
                "figures": [image(figure) for figure in mine],
            }
            for point, mine in zip(points, drawn, strict=True)
        ],
        hardware=_hardware(projection["hardware"]),
        scenario=yaml.safe_dump(projection["scenario"], sort_keys=False, allow_unicode=True),
    )


def _facts(projection: Data) -> list[tuple[str, str]]:
    points, hardware = projection["points"], projection["hardware"]

    def each(key: str) -> str:
        return ", ".join(dict.fromkeys(f"{point[key]:,}" if key == "context" else str(point[key]) for point in points))

    return [
        ("Model", each("model")),
        ("Device", f"{hardware['device']} ({hardware['kind']})"),
        ("Precision", each("dtype")),
        ("Batch", each("batch")),
        ("Context", each("context")),
    ]


def _hardware(hardware: Data) -> list[tuple[str, list[tuple[str, str]]]]:
    """As the template's pairs: peaks and where they come from."""
    values = {"bandwidth": quantity(hardware["bandwidth"], "B/s")}
    values |= {f"flops.{dtype}": quantity(rate, "FLOP/s") for dtype, rate in hardware["flops"].items()}
    sources = hardware["sources"]
    rows = [(name, f"{value}; {sources.get(name) or sources.get('flops', '')}") for name, value in values.items()]
    fractions = [
        ("reached of the bandwidth", f"{hardware['memory_fraction']:g} (assumed)"),
        ("reached of the arithmetic rate", f"{hardware['compute_fraction']:g} (assumed)"),
    ]
    return [(f"{hardware['device']}, {hardware['kind']}", [*rows, *fractions])]


# --- Figures ---


def _figures(projection: Data, point: Data) -> list[Drawn]:
    found = [_row_curve(point)]
    if any(step["predicted_step_seconds"] is not None for step in point["engines"]):
        found.append(_steps(point))
    return found + [_block_curve(point, blocks) for blocks in point["blocks"]]


def _row_curve(point: Data) -> Drawn:
    rows, ratios = zip(*point["predicted_row_curve"], strict=True)
    free, ridge = point["predicted_free_token_slots"], point["predicted_ridge_rows"]

    def paint(axes: Axes, theme: Theme) -> None:
        axes.plot(rows, ratios, "o-", ms=3.5, lw=1.4, color=theme.series[0])
        axes.axhline(1.1, color=theme.ink, lw=1, ls=(0, (4, 3)))
        axes.set(xscale="log", yscale="log", xlabel="rows per sequence in one forward")
        axes.set(ylabel="times one row, predicted", ylim=(0.9, max(1.6, max(ratios) * 1.3)))
        axes.set_xticks(shown := [1, 4, 16, 64, 256], labels=[str(tick) for tick in shown])
        _plain_y(axes)

    said = f"{free} rows are free" + (f", arithmetic is the slower one from {ridge} rows on." if ridge else ".")
    return figures.drawn(
        "rows", _label(point), "What more rows cost",
        "One forward of the target with logits for every row, over one of a single row. Dashed: 1.1 times, up to where "
        "rows count as free.", said, 2.6, paint,
        added=" (predicted)",
    )  # fmt: skip


def _steps(point: Data) -> Drawn:
    steps = [step for step in point["engines"] if step["predicted_step_seconds"] is not None]
    one = point["predicted_autoregressive_seconds"]
    roles = list(dict.fromkeys(forward["role"] for step in steps for forward in step["forwards"]))

    def words(step: Data) -> str:
        gained = step["predicted_tokens_per_step"]
        return f"{step['predicted_ratio']:.2f} steps" + (f", {gained:.2f} tokens" if gained else "")

    def paint(axes: Axes, theme: Theme) -> None:
        starts = [0.0] * len(steps)
        for index, role in enumerate(roles):
            widths = [sum(f["predicted_seconds"] for f in s["forwards"] if f["role"] == role) / one for s in steps]
            axes.barh(
                range(len(steps)), widths, 0.36, starts, label=role, color=theme.series[index],
                hatch=HATCHES[index], ec=theme.paper, lw=0.5,
            )  # fmt: skip
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        gains = [(s["predicted_tokens_per_step"], row) for row, s in enumerate(steps) if s["predicted_tokens_per_step"]]
        if gains:
            axes.plot(*zip(*gains, strict=True), "D", ms=5, color=theme.ink, mew=0, ls="none", label="tokens per step")
        figures.named_rows(axes, [step["label"] for step in steps], [words(step) for step in steps])
        axes.set(xlabel="autoregressive steps, predicted; tokens per step", xlim=(0, None))
        figures.legend_below(axes, len(roles) + bool(gains))

    alt = "; ".join(f"{step['label']} {words(step)}" for step in steps) + "."
    return figures.drawn(
        "steps", _label(point), "What a step costs and gains",
        "Bar: time of a step in autoregressive steps, which is its break-even acceptance. Mark: tokens per step under "
        "the synthetic acceptance given. It pays where the mark is right of the bar.",
        alt, figures.row_height(len(steps), legend_lines=-(-(len(roles) + 1) // 4)), paint,
        added=" (predicted)",
    )  # fmt: skip


def _block_curve(point: Data, blocks: Data) -> Drawn:
    counts, one = blocks["counts"], point["predicted_autoregressive_seconds"]
    proposals = [count["proposals"] for count in counts]
    ratios = [count["predicted_ratio"] for count in counts]
    rates = [count["predicted_tokens_per_second"] for count in counts]

    def paint(axes: Axes, theme: Theme) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.plot(proposals, ratios, "o-", ms=4, lw=1.4, color=theme.series[0], label="step in AR steps")
        if None not in rates:
            gains = [rate * one for rate in rates]
            axes.plot(proposals, gains, f"{MARKERS[1]}-", ms=4, lw=1.2, color=theme.series[1], label="speedup")
        axes.axhline(1.1, color=theme.ink, lw=1, ls=(0, (4, 3)))
        axes.set(xlabel="proposed blocks", ylabel="predicted, times", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figures.legend_below(axes, 2)

    return figures.drawn(
        "blocks", ", ".join(filter(None, [blocks["label"], _label(point)])), "How many blocks to propose",
        "Time of a step over an autoregressive one, and what it decodes over autoregressive decoding, for every number "
        "of proposed blocks. Dashed: 1.1 times.", " ".join(_block_sentences(blocks)), 3.2, paint,
        added=" (predicted)",
    )  # fmt: skip


def _overview(projection: Data) -> Drawn | None:
    """Speedup of every engine at every point; None where there is one point, or no acceptance to tell it."""
    points = projection["points"]
    labels = list(dict.fromkeys(s["label"] for p in points for s in p["engines"] if s["acceptance"]))
    found = [
        (row, labels.index(step["label"]), step["predicted_speedup"])
        for row, point in enumerate(points)
        for step in point["engines"]
        if step["acceptance"] and step["predicted_speedup"] is not None
    ]
    if len(points) < 2 or not found:
        return None

    def paint(axes: Axes, theme: Theme) -> None:
        for index, label in enumerate(labels):
            mine = [(speedup, row + 0.05) for row, engine, speedup in found if engine == index]
            colour, marker = theme.series[index % len(theme.series)], MARKERS[index % len(MARKERS)]
            axes.plot(*zip(*mine, strict=True), marker, ls="none", ms=5.5, color=colour, mew=0,
                      label=figures.shortened(label, 30))  # fmt: skip
        axes.axvline(1, color=theme.ink, lw=1, ls=(0, (4, 3)))
        figures.named_rows(axes, [_label(point) for point in points])
        axes.set(xlabel="times autoregressive decoding, predicted", xlim=(0, None))
        figures.legend_below(axes, min(2, len(labels)))

    said = "; ".join(f"{_label(points[row])}: {labels[engine]} {speedup:.2f}×" for row, engine, speedup in found)
    return figures.drawn(
        "overview", "", "What it would gain at every point",
        "Tokens/s over autoregressive decoding, under the synthetic acceptance given. Left of the dashed line: a loss.",
        f"{said}.", figures.row_height(len(points), legend_lines=-(-len(labels) // 2)), paint,
        added=" (predicted)",
    )  # fmt: skip


def _plain_y(axes: Axes) -> None:
    from matplotlib.ticker import NullLocator

    ticks = [tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if tick <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, labels=[f"{tick:g}×" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
