"""The figures: each draws one question's answer, once for light and once for dark paper.

Colours are Okabe and Ito's, which the colour-blind can tell apart; a marker or a hatch says the same again.
Every figure is narrow enough to be read on a phone, and its rows carry their names above them, so that no name is cut.
Rendering is deterministic: the same run gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from zbench.metrics import PHASES, Cell, caveats, step_split
from zbench.models.cost import expected_experts
from zbench.report.findings import clusters, interval, quantity, title
from zbench.report.readings import families, proposals_of
from zbench.results import Results, main_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

WIDTH = 4.2  # inches at 100 dots each; on a phone, at 360 px, the text is still about 9 px high
MARKERS = "osD^vPX*"
HATCHES = ("", "//", "\\\\", "--", "xx", "||", "++", "/", "|")  # of lines only: dots make an SVG ten times larger
APART = 1.5  # ratio of bandwidths from which two slopes of the roofline leave room for a name between them
NAMED_FROM = 0.05  # share of an engine's time from which its prefills, drafts or verifies are named in the roofline
PAINTED = ("prefill", "decode", "draft", "verify", "draft+verify", "accept", "commit", "host gap", "denoise")
CURVES = {"acceptance_at": "verify steps that accept it", "conditional_at": "accepted, of steps that got so far"}
QUANTILES = np.linspace(0.005, 0.995, 100)  # each tick of a strip is one percent of the steps


@dataclass(frozen=True)
class Theme:
    name: str
    paper: str
    ink: str
    muted: str
    line: str
    series: tuple[str, ...]


LIGHT = Theme(
    "light", "#ffffff", "#1c2127", "#5b6570", "#dfe3e8",
    ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c8c8c", "#7B4F9E"),
)  # fmt: skip
DARK = Theme(
    "dark", "#14171b", "#e3e6ea", "#9aa4af", "#3a424c",
    ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#ffffff", "#8c8c8c", "#B79CED"),
)  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A kind of figure. `applies` says whether the run has its data, `alt` what the figure shows, in words."""

    name: str
    title: str
    caption: str
    applies: Callable[[Results, Sequence[Cell]], bool]
    height: Callable[[Results, Sequence[Cell]], float]  # inches
    draw: Callable[[Axes, Theme, Results, Sequence[Cell]], None]
    alt: Callable[[Results, Sequence[Cell]], str]
    section: Literal["results", "speculation", "telemetry"] = "results"


@dataclass(frozen=True)
class Drawn:
    """One figure of one point of the matrix, as SVG and PNG for each theme."""

    name: str
    title: str
    caption: str
    alt: str
    section: str
    svg: dict[str, bytes]
    png: dict[str, bytes]

    def files(self) -> dict[str, bytes]:
        """Contents by file name: "roofline.svg" for light paper, "roofline-dark.svg" for dark, and as PNG."""
        suffixes = {"light": "", "dark": "-dark"}
        kinds = (("svg", self.svg), ("png", self.png))
        return {f"{self.name}{suffixes[t]}.{kind}": data for kind, images in kinds for t, data in images.items()}


def draw(results: Results, cells: Sequence[Cell], label: str, plots: Sequence[Plot]) -> list[Drawn]:
    """Those of the figures that these cells have data for; `label` is their point of the matrix."""
    return [_drawn(plot, results, cells, label) for plot in plots if plot.applies(results, cells)]


def figure(plot: Plot, theme: Theme, results: Results, cells: Sequence[Cell]) -> Figure:
    """The matplotlib figure itself. Raises nothing that the data could cause once `plot.applies`."""
    return painted(theme, plot.height(results, cells), lambda axes, theme: plot.draw(axes, theme, results, cells))


def painted(theme: Theme, height: float, paint: Callable[[Axes, Theme], None]) -> Figure:
    """A figure of this height in inches, on the theme's paper."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(style(theme)):
        drawn = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(drawn)
        paint(drawn.subplots(), theme)
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")  # the layout is settled; saving would work it out again each time
    return drawn


def saved(figures: Mapping[str, Figure]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """SVG and PNG of a figure by theme, from the figure in each theme."""
    from matplotlib import rc_context

    svg, png = {}, {}
    for theme in (LIGHT, DARK):
        with rc_context(style(theme)):
            svg[theme.name] = _saved(figures[theme.name], "svg", metadata={"Date": None, "Creator": None})
            png[theme.name] = _saved(figures[theme.name], "png", dpi=200, metadata={"Software": None})
    return svg, png


def file_name(name: str, label: str) -> str:
    """Of a kind of figure at one point of the matrix, or at none."""
    slug = "".join(c if c.isalnum() or c in ".-" else "_" for c in label)
    return f"{name}-{slug}" if slug else name


def drawn(
    name: str,
    label: str,
    title: str,
    caption: str,
    alt: str,
    height: float,
    paint: Callable[[Axes, Theme], None],
    *,
    added: str = "",
    section: str = "results",
) -> Drawn:
    """A figure of the point `label`, in both themes. `added` stands behind the title above it."""
    svg, png = saved({theme.name: painted(theme, height, paint) for theme in (LIGHT, DARK)})
    where = f" at {label}" if label else ""
    return Drawn(file_name(name, label), f"{title}{added}", caption, f"{title}{where}: {alt}", section, svg, png)


def _drawn(plot: Plot, results: Results, cells: Sequence[Cell], label: str) -> Drawn:
    return drawn(
        plot.name, label, plot.title, plot.caption, plot.alt(results, cells), plot.height(results, cells),
        lambda axes, theme: plot.draw(axes, theme, results, cells), section=plot.section,
    )  # fmt: skip


def _saved(drawn: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def style(theme: Theme) -> Any:
    return {
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "figure.dpi": 100,
        "font.family": "DejaVu Sans",  # comes with matplotlib, so that figures are the same everywhere
        "font.size": 8,
        "axes.edgecolor": theme.line,
        "axes.labelcolor": theme.muted,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.line,
        "grid.linewidth": 0.6,
        "hatch.linewidth": 0.6,
        "text.color": theme.ink,
        "text.parse_math": False,  # names are names, also with dollar signs
        "xtick.color": theme.line,
        "ytick.color": theme.line,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "svg.fonttype": "path",
        "svg.hashsalt": "zbench",
    }


def _series(results: Results, cell: Cell, theme: Theme) -> tuple[str, str]:
    """(colour, marker) of the cell's engine."""
    index = results.engines.index(cell.record.label)
    return theme.series[index % len(theme.series)], MARKERS[index % len(MARKERS)]


# Roofline ------------------------------------------------------------------------------------------------------------


def _with_forwards(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if not cell.forwards.empty]


def _roofline(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    from matplotlib.ticker import EngFormatter

    dots = [(cell, kind) for cell in cells for kind in cell.forwards["kind"].unique()]
    x = np.array([results.value(cell, "intensity", kind) for cell, kind in dots], dtype=float)
    y = np.array([results.value(cell, "achieved_flops", kind) for cell, kind in dots], dtype=float)
    roofs = _roofs(results, cells)
    ridges = [rate / bandwidth for _, bandwidth, rate in roofs]
    left, right = min([*x, *ridges]) / 4, max([*x, *ridges]) * 6
    tops = [min(rate, bandwidth * right) for _, bandwidth, rate in roofs]
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(y) / 4, max([*y, *tops]) * 5))
    for kind, bandwidth, rate in roofs:
        style: Any = "-" if kind == "measured" else (0, (4, 3))
        axes.plot([left, rate / bandwidth, right], [left * bandwidth, rate, rate], color=theme.ink, lw=1.2, ls=style)
    _shade_roof(axes, theme, results, roofs, left)
    caches = [(name, bandwidth) for name, bandwidth in _caches(results, cells) if 3 * left * bandwidth < roofs[-1][2]]
    for _, bandwidth in caches:
        axes.plot([left, roofs[-1][2] / bandwidth], [left * bandwidth, roofs[-1][2]], color=theme.muted, lw=0.6)
    _mark_forwards(axes, theme, results, dots, x, y)
    axes.set(xlabel="intensity, FLOP per byte", ylabel="FLOP/s")
    name_log_ticks(axes.xaxis)
    name_log_ticks(axes.yaxis, EngFormatter())
    for cell in _with_forwards(cells):
        colour, marker = _series(results, cell, theme)
        axes.plot([], [], marker, ms=6, color=colour, label=_legend_name(cell))
    _legend_of_engines(axes, _with_forwards(cells))
    axes.figure.canvas.draw()  # settles the layout: the names are placed in pixels
    _name_caches(axes, theme, caches, roofs[-1][2] if caches else 0.0)
    _name_roofs(axes, theme, roofs, left, right, clear_of=max(y), marks=np.column_stack([x, y]))
    _name_dots(axes, theme, [_dot_names(cell).get(kind) for cell, kind in dots], x, y)


def _roofs(results: Results, cells: Sequence[Cell]) -> list[tuple[str, float, float]]:
    """(kind, B/s, FLOP/s) of the roofs known for the dtype of these cells; measured ones last, to be drawn on top."""
    manifest, dtype = results.run.manifest, cells[0].record.dtype
    known = []
    if manifest.specs and manifest.specs.get("bandwidth") and dtype in manifest.specs.get("flops", {}):
        known.append(("spec sheet", manifest.specs["bandwidth"], manifest.specs["flops"][dtype]))
    roofs = results.run.roofs
    if roofs and dtype in roofs.get("flops", {}):
        measured = roofs["bandwidth"]["read"]["value"], roofs["flops"][dtype]["value"]
        known.append(("measured", *measured))
    return known


def _shade_roof(axes: Axes, theme: Theme, results: Results, roofs: list[tuple[str, float, float]], left: float) -> None:
    """Between the lowest and the highest read roof of the run, where it was sampled."""
    read = results.run.read_roof
    if read and read.get("sampled") and roofs and roofs[-1][0] == "measured":
        low, high, rate = read["low"], read["high"], roofs[-1][2]
        corners = [left, rate / high, rate / low]
        lower, upper = [left * low, rate / high * low, rate], [left * high, rate, rate]
        axes.fill_between(corners, lower, upper, color=theme.muted, alpha=0.25, lw=0)


def _caches(results: Results, cells: Sequence[Cell]) -> list[tuple[str, float]]:
    """(name, B/s) of the cache levels whose slopes can be told apart, from memory up; none without measured roofs."""
    roofs = results.run.roofs or {}
    if cells[0].record.dtype not in roofs.get("flops", {}):
        return []
    found, last = [], roofs["bandwidth"]["read"]["value"]
    for name, level in reversed(roofs.get("caches", {}).get("levels", {}).items()):
        if level["value"] >= APART * last:
            last = level["value"]
            found.append((name, last))
    return found


def _name_caches(axes: Axes, theme: Theme, caches: list[tuple[str, float]], rate: float) -> None:
    """Along the upper end of each slope, below the flat part."""
    for name, bandwidth in caches:
        at = rate / bandwidth / 1.25
        start, end = axes.transData.transform([(at / 10, at * bandwidth / 10), (at, at * bandwidth)])
        angle = float(np.degrees(np.arctan2(*(end - start)[::-1])))
        axes.text(
            at, at * bandwidth, f"{name} {quantity(bandwidth, 'B/s')}", rotation=angle, rotation_mode="anchor",
            ha="right", va="bottom", fontsize=6.5, color=theme.muted, clip_on=True,
        )  # fmt: skip


def _name_roofs(
    axes: Axes,
    theme: Theme,
    roofs: list[tuple[str, float, float]],
    left: float,
    right: float,
    clear_of: float,
    marks: np.ndarray,
) -> None:
    """Rates above the flat part; bandwidths along the slope, above or below it, where they cover least of the rest."""
    if not roofs:
        return
    rates = "\n".join(f"{quantity(rate, 'FLOP/s')} {kind}" for kind, _, rate in roofs)
    bandwidths = "\n".join(f"{quantity(bandwidth, 'B/s')} {kind}" for kind, bandwidth, _ in roofs)
    style: dict[str, Any] = {"color": theme.muted, "fontsize": 7.5, "linespacing": 1.3, "va": "bottom"}
    axes.text(right / 1.15, max(1.25 * clear_of, *(rate for *_, rate in roofs)) * 1.12, rates, ha="right", **style)
    known = [bandwidth for _, bandwidth, _ in roofs]
    ends = axes.transData.transform([(left, left * max(known)), (10 * left, 10 * left * max(known))])
    along = (ends[1] - ends[0]) / np.hypot(*(ends[1] - ends[0]))
    text = axes.text(left, left * max(known), bandwidths, rotation_mode="anchor", ha="left", **style)
    box = text.get_window_extent()
    spots = axes.transData.transform(marks)
    others = [
        np.column_stack([spots, np.full(len(spots), 6.0)]),
        *map(_text_squares, [other for other in axes.texts if other is not text]),
        *(_squares(axes.transData.transform(path), 2) for line in axes.lines if (path := _path(line)).size),
    ]
    places = []
    top = min(rate for *_, rate in roofs)
    for above, share in product((True, False), np.linspace(0.08, 1, 12)):
        bandwidth = max(known) if above else min(known)
        reach = axes.transData.transform([(left, left * bandwidth), (top / bandwidth, top)])
        room = np.hypot(*(reach[1] - reach[0])) - box.width
        across = np.array([-along[1], along[0]]) * (1 if above else -1)
        foot = reach[0] + along * max(room, 0) * share + across * 8
        middle = foot + across * box.height / 2
        name = _squares(np.array([middle, middle + along * box.width]), box.height / 2)
        covered = _met(name, *others) + 20 * _met(name, others[0])  # a mark is one square, a line many
        places.append((covered, not above, share, foot))
    _, below, _, foot = min(places, key=lambda place: place[:3])
    text.set(position=axes.transData.inverted().transform(foot), va="top" if below else "bottom")
    text.set_rotation(float(np.degrees(np.arctan2(*along[::-1]))))


def _path(line: Line2D) -> np.ndarray:
    """Empty for what stands in the legend only."""
    return np.asarray(line.get_xydata())


def _bare(kind: str) -> str:
    """What a forward does, whatever its rows."""
    return kind.partition(",")[0]


def _dot_names(cell: Cell) -> dict[str, str]:
    """Names by kind, of those that stand for all that do the same: each takes the most time of them. Empty where all
    of them take too little to be named."""
    forwards = cell.forwards.assign(bare=cell.forwards["kind"].map(_bare))
    total, names = forwards["seconds"].sum(), {}
    for bare, mine in forwards.groupby("bare", sort=False):
        kind = str(mine.groupby("kind", sort=False)["seconds"].sum().idxmax())
        several = mine["kind"].nunique() > 1
        name = f"{bare}, {mine['rows'].min()}–{mine['rows'].max()} rows" if several else kind
        names[kind] = name if mine["seconds"].sum() >= NAMED_FROM * total else ""
    return names


def _mark_forwards(
    axes: Axes, theme: Theme, results: Results, dots: Sequence[tuple[Cell, str]], x: np.ndarray, y: np.ndarray
) -> None:
    """A mark where a cell's forwards of one name are most of the time; their other numbers of rows are points on a thin
    line through it, as chains that end early have many. `dots` are (cell, kind) at x, y."""
    joined: dict[tuple[str, str], list[int]] = {}
    for index, (cell, kind) in enumerate(dots):
        joined.setdefault((cell.record.id, _bare(kind)), []).append(index)
    for found in joined.values():
        cell, kind = dots[found[0]]
        colour, marker = _series(results, cell, theme)
        along = sorted(found, key=lambda index: x[index])
        if len(along) > 1:
            axes.plot(x[along], y[along], ".-", ms=4, lw=0.8, color=colour, mew=0)
        main = next(index for index in found if dots[index][1] in _dot_names(cell))
        filled = "none" if kind.endswith("prefill") else colour
        axes.plot(x[main], y[main], marker, ms=7, color=colour, mfc=filled, mew=1.4)


def _name_dots(axes: Axes, theme: Theme, names: Sequence[str | None], x: np.ndarray, y: np.ndarray) -> None:
    """Write each name where it covers neither a mark nor a text: close to its mark, and across few lines.

    Marks of one name that lie close together share it. None is no mark but a point of a line.
    """
    from matplotlib.text import Text

    spots = axes.transData.transform(np.column_stack([x, y]))
    marks = np.column_stack([spots, np.full(len(spots), 6.0)])[[name is not None for name in names]]
    texts = np.concatenate([np.empty((0, 3)), *map(_text_squares, axes.texts)])
    drawn = [path for line in axes.lines if (path := _path(line)).size]
    lines = np.concatenate([_squares(axes.transData.transform(path), 2) for path in drawn])
    pixels = axes.figure.dpi / 72
    named: list[int] = []
    for index in np.argsort(-spots[:, 1], kind="stable"):
        alike = [other for other in named if names[other] == names[index]]
        if not names[index] or any(np.hypot(*(spots[other] - spots[index])) < 40 for other in alike):
            continue
        named.append(index)
        text = axes.annotate(
            names[index], (x[index], y[index]), (0, 0), textcoords="offset points", va="center", fontsize=7.5,
            bbox={"fc": theme.paper, "ec": "none", "pad": 0.8, "alpha": 0.85},
            arrowprops={"arrowstyle": "-", "color": theme.muted, "lw": 0.5, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
        width = Text.get_window_extent(text).width  # the annotation's own extent would include its arrow
        places = []
        for offset in product((14, -14, 42, -42, 70, -70, 98, -98), range(-98, 99, 7)):
            near = spots[index] + offset
            name = _squares(near + np.outer([0, np.sign(offset[0]) * width], [1, 0]), 7)
            leader = _squares(np.array([spots[index], near]), 1)
            inside = axes.bbox.x0 < name[:, 0].min() and name[:, 0].max() < axes.bbox.x1
            inside &= axes.bbox.y0 < near[1] - 7 and near[1] + 7 < axes.bbox.y1
            if inside and not _met(name, marks, texts):
                beyond = leader[np.hypot(*(leader[:, :2] - spots[index]).T) > 12]
                crossed = 8 * _met(name, lines) + 4 * _met(beyond, lines) + 24 * _met(beyond, marks)
                crossed += 100 * min(_met(leader, texts), 2)  # last of all: better than a mark without a name
                places.append((np.hypot(*offset) + crossed, offset, name, leader))
        if not places:  # no room: the table of forwards names it
            text.remove()
            continue
        _, offset, name, leader = min(places, key=lambda place: place[0])
        text.set(position=(offset[0] / pixels, offset[1] / pixels), ha="left" if offset[0] > 0 else "right")
        texts, lines = np.concatenate([texts, name]), np.concatenate([lines, leader])


def _squares(path: np.ndarray, half: float) -> np.ndarray:
    """A polyline [n, 2] of a figure's pixels as squares along it [m, (x, y, half their side)]."""
    lengths = np.concatenate([[0], np.hypot(*np.diff(path, axis=0).T).cumsum()])
    at = np.linspace(0, lengths[-1], 2 + int(lengths[-1] / 4))
    return np.column_stack([*(np.interp(at, lengths, axis) for axis in path.T), np.full(len(at), half)])


def _text_squares(text: Text) -> np.ndarray:
    """As `_squares`, along the middle of a text of any rotation."""
    box, angle = text.get_window_extent(), text.get_rotation()
    text.set_rotation(0)
    flat = text.get_window_extent()
    text.set_rotation(angle)
    reach = flat.width / 2 * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    middle = np.array([box.x0 + box.x1, box.y0 + box.y1]) / 2
    return _squares(np.array([middle - reach, middle + reach]), flat.height / 2)


def _met(squares: np.ndarray, *others: np.ndarray) -> int:
    """How many of the other squares lie upon any of these."""
    found = np.concatenate(others)
    apart = np.abs(squares[:, None, :2] - found[None, :, :2]).max(-1)
    return int((apart < squares[:, None, 2] + found[None, :, 2]).any(0).sum())


def _roofline_alt(results: Results, cells: Sequence[Cell]) -> str:
    from zbench.report.findings import limit

    found = [f"{c.record.label} {kind} is {limit(results, c, kind)}" for c in cells if (kind := main_kind(c))]
    return "; ".join(found) + "."


# Experts -------------------------------------------------------------------------------------------------------------


def _expert_dots(results: Results, cells: Sequence[Cell]) -> list[tuple[Cell, str, float, float]]:
    """(cell, kind, rows of the whole batch, distinct experts per layer) of the forwards whose router was seen."""
    dots = []
    for cell in cells:
        for kind, forwards in cell.forwards.groupby("kind", sort=False):
            experts = results.value(cell, "experts_per_forward", str(kind))
            if experts is not None:
                dots.append((cell, str(kind), float((forwards["batch"] * forwards["rows"]).mean()), experts))
    return dots


def _expert_count(results: Results, cells: Sequence[Cell]) -> int | None:
    """Experts of a layer of the cells' model."""
    return results.run.manifest.models.get(cells[0].record.model, {}).get("experts")


def _has_experts(results: Results, cells: Sequence[Cell]) -> bool:
    return bool(_expert_count(results, cells) and _expert_dots(results, cells))


def _experts(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    dots, count = _expert_dots(results, cells), _expert_count(results, cells)
    assert count is not None
    rows, hit = np.array([dot[2] for dot in dots]), np.array([dot[3] for dot in dots])
    edge = max(rows.max(), 2.0) * 2
    line = np.geomspace(1, edge, 100)
    axes.plot(line, [expected_experts(count, n) for n in line], color=theme.ink, lw=1.2, ls=(0, (4, 3)),
              label="uniform routing (predicted)")  # fmt: skip
    _mark_forwards(axes, theme, results, [dot[:2] for dot in dots], rows, hit)
    for cell in _with_experts(results, cells):
        colour, marker = _series(results, cell, theme)
        axes.plot([], [], marker, ms=6, color=colour, label=_legend_name(cell))
    axes.set(xscale="log", xlim=(0.7, edge), ylim=(0, count * 1.08))
    axes.set(xlabel="rows in the forward, of all sequences", ylabel=f"distinct experts per layer, of {count}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    legend_below(axes, min(_legend_columns(cells), 1 + len(_with_experts(results, cells))))
    axes.figure.canvas.draw()  # settles the layout: the names are placed in pixels
    _name_dots(axes, theme, [_dot_names(cell).get(kind) for cell, kind, *_ in dots], rows, hit)


def _with_experts(results: Results, cells: Sequence[Cell]) -> list[Cell]:
    shown = {cell.record.id for cell, *_ in _expert_dots(results, cells)}
    return [cell for cell in cells if cell.record.id in shown]


def _experts_height(results: Results, cells: Sequence[Cell]) -> float:
    lines = -(-(1 + len(_with_experts(results, cells))) // _legend_columns(cells))
    return 2.9 + 0.2 * lines


def _experts_alt(results: Results, cells: Sequence[Cell]) -> str:
    count = _expert_count(results, cells) or 1
    said = [
        f"{title(cell)} {kind} hits {hit:.1f} of {count} with {rows:.0f} rows (uniform routing:"
        f" {expected_experts(count, rows):.1f})"
        for cell, kind, rows, hit in _expert_dots(results, cells)
    ]
    return "; ".join(said) + "."


# Rows with their names above them ------------------------------------------------------------------------------------


def named_rows(axes: Axes, names: Sequence[str], values: Sequence[str] = ()) -> None:
    """One horizontal row per name, from the top; `values` stand at the right end of the name's line."""
    axes.set(ylim=(len(names) - 0.35, -0.6), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    background = {"fc": axes.get_facecolor(), "ec": "none", "pad": 0.8, "alpha": 0.85}
    room = 55 - max(map(len, values), default=0)
    for row, text in enumerate(names):
        axes.text(
            0,
            row - 0.36,
            shortened(text, min(38, room)),
            transform=axes.get_yaxis_transform(),
            va="center",
            bbox=background,
        )
    for row, text in enumerate(values):
        axes.text(1, row - 0.36, text, transform=axes.get_yaxis_transform(), va="center", ha="right", fontsize=7.5)


def _engine_rows(axes: Axes, theme: Theme, cells: Sequence[Cell], values: Sequence[str] = ()) -> None:
    """One row per engine; what its acceptance is not stands below its row, where no name can push it out."""
    named_rows(axes, [cell.record.label for cell in cells], values)
    style: dict[str, Any] = {"fontsize": 7, "style": "italic", "color": theme.muted, "va": "center"}
    for row, cell in enumerate(cells):
        words = ", ".join(caveats(cell.record))
        background = {"fc": theme.paper, "ec": "none", "pad": 0.8, "alpha": 0.85 * bool(words)}
        axes.text(0, row + 0.33, words, transform=axes.get_yaxis_transform(), bbox=background, **style)


def _legend_name(cell: Cell) -> str:
    """As `title`, shortened in the engine's label only."""
    label = cell.record.label
    return f"{shortened(label, 30)}{title(cell).removeprefix(label)}"


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def row_height(rows: int, legend_lines: int = 0) -> float:
    return 0.55 + 0.5 * rows + 0.2 * legend_lines


def _engine_row_height(cells: Sequence[Cell], legend_lines: int = 0) -> float:
    """Taller where something stands below a row."""
    taller = 0.14 * len(cells) if any(caveats(cell.record) for cell in cells) else 0.0
    return row_height(len(cells), legend_lines) + taller


def _with_steps(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in _decoding(cells) if (cell.steps["step"] > 0).any()]


def _decoding(cells: Sequence[Cell]) -> list[Cell]:
    """Without those that time raw forwards of many sizes: their steps are no decoder's."""
    return [cell for cell in cells if cell.record.engine != "forward"]


def _step_times(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    shown = _with_steps(cells)
    times = [cell.decode_steps["seconds"].to_numpy() * 1e3 for cell in shown]
    edge = max(np.quantile(t, QUANTILES[-1]) for t in times) * 1.05
    for row, (cell, t) in enumerate(zip(shown, times, strict=True)):
        colour, _ = _series(results, cell, theme)
        # One path with gaps: a hundred separate lines would make an SVG five times larger.
        ticks, gaps = np.quantile(t, QUANTILES), np.full(len(QUANTILES), np.nan)
        heights = np.tile([row - 0.12, row + 0.08, np.nan], len(QUANTILES))
        axes.plot(np.column_stack([ticks, ticks, gaps]).ravel(), heights, color=colour, lw=0.5)
        low, middle, high = np.quantile(t, [0.25, 0.5, 0.75])
        axes.plot([low, high], [row + 0.17] * 2, color=colour, lw=4, solid_capstyle="butt")
        axes.plot(middle, row + 0.17, "|", ms=9, mew=1.6, color=theme.ink)
    _engine_rows(axes, theme, shown, [_spread_words(t) for t in times])
    axes.set(xlim=(0, edge), xlabel="milliseconds per decode step")


def _spread_words(milliseconds: np.ndarray) -> str:
    middle, tail = np.quantile(milliseconds, [0.5, 0.99]) / 1e3
    return f"median {quantity(middle, 's')}, 99th {quantity(tail, 's')}"


def _step_times_alt(results: Results, cells: Sequence[Cell]) -> str:
    times = [(c.record.label, c.decode_steps["seconds"].to_numpy() * 1e3) for c in _with_steps(cells)]
    return "; ".join(f"{label} {_spread_words(t)}" for label, t in times) + "."


def _phase_means(results: Results, cell: Cell) -> dict[str, float]:
    """Seconds per trial by phase; a foreign engine's wall is one undivided phase."""
    found = {phase: results.value(cell, "phase_seconds", phase) for phase in PHASES}
    known = {phase: seconds for phase, seconds in found.items() if seconds is not None}
    return known or {"not divided": float(np.mean([trial.wall_seconds for trial in cell.trials]))}


def _phases(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    shown = [cell for cell in _decoding(cells) if cell.trials]
    means = [_phase_means(results, cell) for cell in shown]
    names = [phase for phase in (*PHASES, "not divided") if any(phase in m for m in means)]
    for index, phase in enumerate(names):
        widths = [m.get(phase, 0.0) * 1e3 for m in means]
        starts = [sum(m.get(before, 0.0) for before in names[:index]) * 1e3 for m in means]
        colour, hatch = _phase_style(theme, phase)
        axes.barh(
            range(len(shown)), widths, 0.36, starts, label=phase, color=colour, hatch=hatch, ec=theme.paper, lw=0.5
        )
    _engine_rows(axes, theme, shown, [quantity(sum(m.values()), "s") for m in means])
    axes.set(xlabel="milliseconds per trial, mean")
    legend_below(axes, len(names))


def _phase_style(theme: Theme, phase: str) -> tuple[str, str]:
    if phase not in PHASES:
        return theme.line, ""
    index = PAINTED.index(phase)
    return theme.series[index], HATCHES[index]


def legend_below(axes: Axes, entries: int) -> None:
    axes.figure.legend(loc="outside lower center", ncol=min(4, entries), handlelength=1.6, columnspacing=1.2)


def _legend_of_engines(axes: Axes, cells: Sequence[Cell]) -> None:
    """Two to a line, or one where names are long."""
    legend_below(axes, min(_legend_columns(cells), len(cells)))


def _legend_columns(cells: Sequence[Cell]) -> int:
    return 1 if any(len(_legend_name(cell)) > 26 for cell in cells) else 2


def _legend_lines(cells: Sequence[Cell]) -> int:
    return -(-len(cells) // _legend_columns(cells))


def _phases_height(results: Results, cells: Sequence[Cell]) -> float:
    return _engine_row_height([cell for cell in _decoding(cells) if cell.trials], legend_lines=2)


def _phases_alt(results: Results, cells: Sequence[Cell]) -> str:
    return "; ".join(_phase_words(results, cell) for cell in _decoding(cells) if cell.trials) + "."


def _phase_words(results: Results, cell: Cell) -> str:
    means = _phase_means(results, cell)
    total = sum(means.values())
    shares = ", ".join(f"{phase} {quantity(seconds / total, '1')}" for phase, seconds in means.items())
    return f"{title(cell)} {quantity(total, 's')}: {shares}"


def _compared(results: Results, cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if results.value(cell, "speedup") is not None]


def _ratios(cell: Cell) -> pd.DataFrame:
    """Speedup per prompt [prompt], geometric mean over repeats, with its category."""
    pairs = cell.timed_pairs
    theirs = pairs["decode_seconds_baseline"] / pairs["later_baseline"]
    logs = np.log(theirs / (pairs["decode_seconds"] / pairs["later"]))
    by_prompt = pairs.assign(speedup=logs).groupby(["category", "prompt_id"], sort=True)["speedup"].mean()
    return np.exp(by_prompt).reset_index()


def _categories(cells: Sequence[Cell]) -> list[str]:
    return sorted({category for cell in cells for category in cell.requests["category"]})


def _speedups(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    shown = _compared(results, cells)
    categories = _categories(shown)
    lanes = np.linspace(-0.1, 0.25, len(shown)) if len(shown) > 1 else [0.05]
    for cell, lane in zip(shown, lanes, strict=True):
        colour, marker = _series(results, cell, theme)
        row, ratios = results.row(cell, "speedup"), _ratios(cell)
        if row.low is not None and row.high is not None:
            axes.axvspan(row.low, row.high, color=colour, alpha=0.18, lw=0)
        axes.axvline(float(row.value or 1), color=colour, lw=0.9)
        heights = [categories.index(category) + lane for category in ratios["category"]]
        axes.plot(ratios["speedup"], heights, marker, ms=5, color=colour, alpha=0.8, mew=0, label=_legend_name(cell))
    axes.axvline(1, color=theme.ink, lw=1.2, ls=(0, (4, 3)))
    named_rows(axes, categories)
    axes.margins(x=0.08)
    axes.set(xscale="log", xlabel=f"times as fast as {shown[0].baseline.record.label}")  # type: ignore[union-attr]
    _plain_log_ticks(axes)
    _legend_of_engines(axes, shown)


def _plain_log_ticks(axes: Axes) -> None:
    """Round ticks that include 1: the decades' 1, 2 and 5 where they suffice, finer ones on a short axis."""
    from matplotlib.ticker import NullLocator

    low, high = axes.get_xlim()
    low, high = min(low, 0.9), max(high, 1.1)
    shown = _round_ticks(low, high, 4)
    axes.set_xlim(low, high)
    axes.set_xticks(shown, labels=[f"{tick:g}×" for tick in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def _round_ticks(low: float, high: float, enough: int) -> list[float]:
    """1, 2 and 5 of each decade; evenly spaced ones where fewer than `enough` of them are between the ends."""
    from matplotlib.ticker import MaxNLocator

    every = [digit * 10.0**power for power in range(-9, 16) for digit in (1, 2, 5)]
    shown = [tick for tick in every if low <= tick <= high]
    if len(shown) >= enough:
        return shown
    even = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in even if low <= tick <= high]


def name_log_ticks(axis: Axis, write: Callable[[float], str] = "{:g}".format) -> None:
    """Decades as plain numbers, where two of them are in view: an axis with one named tick has no scale. Else finer
    ones. Call it when the limits are settled."""
    from matplotlib.ticker import NullLocator

    low, high = axis.get_view_interval()
    decades = [10.0**power for power in range(-9, 16) if low <= 10.0**power <= high]
    shown = decades if len(decades) > 1 else _round_ticks(low, high, 3)
    axis.set_ticks(shown, labels=[write(tick) for tick in shown])
    axis.set_minor_locator(NullLocator())


def _speedups_height(results: Results, cells: Sequence[Cell]) -> float:
    shown = _compared(results, cells)
    return row_height(len(_categories(shown)), legend_lines=_legend_lines(shown))


def _speedups_alt(results: Results, cells: Sequence[Cell]) -> str:
    return "; ".join(_speedup_words(results, cell) for cell in _compared(results, cells)) + "."


def _speedup_words(results: Results, cell: Cell) -> str:
    row, ratios = results.row(cell, "speedup"), _ratios(cell)["speedup"]
    around = f" ({interval(row)})" if interval(row) else f" ({clusters(cell, row.n)}, too few for an interval)"
    return (
        f"{title(cell)} {quantity(float(row.value or 0), 'ratio')}{around}, "
        f"single prompts from {ratios.min():.2f}× to {ratios.max():.2f}×"
    )


def _speeds(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    lanes = np.linspace(-0.12, 0.28, len(results.engines)) if len(results.engines) > 1 else [0.05]
    named: set[str] = set()
    for height, point in enumerate(results.points):
        for cell in point.cells:
            row = results.row(cell, "decode_tps")
            if not isinstance(row.value, float):
                continue
            colour, marker = _series(results, cell, theme)
            at = height + lanes[results.engines.index(cell.record.label)]
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [at, at], color=colour, lw=1.4)
            label = None if cell.record.label in named else _legend_name(cell)
            axes.plot(row.value, at, marker, ms=5.5, color=colour, mew=0, label=label)
            named.add(cell.record.label)
    named_rows(axes, [point.label for point in results.points])
    axes.set(xlabel="tokens per second and sequence, decode")
    axes.set_xlim(left=0)
    _legend_of_engines(axes, _one_of_each(cells))


def _one_of_each(cells: Sequence[Cell]) -> list[Cell]:
    return list({cell.record.label: cell for cell in _decoding(cells)}.values())


def _speeds_height(results: Results, cells: Sequence[Cell]) -> float:
    return row_height(len(results.points), legend_lines=_legend_lines(_one_of_each(cells)))


def _speeds_alt(results: Results, cells: Sequence[Cell]) -> str:
    rows = [(point, cell, results.row(cell, "decode_tps")) for point in results.points for cell in point.cells]
    said = [f"{p.label}: {title(c)} {quantity(r.value, r.unit)}" for p, c, r in rows if isinstance(r.value, float)]
    return "; ".join(said) + "."


# Speculation ---------------------------------------------------------------------------------------------------------


def _drafting(results: Results, cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if results.value(cell, "acceptance_length", "micro") is not None]


def _paying(results: Results, cells: Sequence[Cell]) -> list[Cell]:
    """The drafting engines whose steps and forwards are seen, beside an autoregressive baseline."""
    needed = ("break_even_acceptance", "switching_seconds", "tokens_per_weighted_forward")
    return [c for c in _drafting(results, cells) if all(results.value(c, name) is not None for name in needed)]


def _parts(results: Results, cell: Cell, metric: str) -> dict[int, float]:
    """Value by position or count."""
    found = {i: results.value(cell, metric, str(i)) for i in range(cell.depth + 1)}
    return {i: value for i, value in found.items() if value is not None}


def _curves(metric: str) -> Callable[[Axes, Theme, Results, Sequence[Cell]], None]:
    def draw(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        shown = _drafting(results, cells)
        for cell in shown:
            colour, marker = _series(results, cell, theme)
            parts = _parts(results, cell, metric)
            axes.plot(list(parts), list(parts.values()), f"{marker}-", ms=5, lw=1.4, color=colour, mew=0,
                      label=_legend_name(cell))  # fmt: skip
        axes.set(ylim=(-0.03, 1.06), xlabel="draft position", ylabel=CURVES[metric])
        axes.set_xlim(0.6, max(cell.depth for cell in shown) + 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        _legend_of_engines(axes, shown)

    return draw


def _curves_alt(metric: str) -> Callable[[Results, Sequence[Cell]], str]:
    def words(results: Results, cells: Sequence[Cell]) -> str:
        shown = _drafting(results, cells)
        said = [(cell, [quantity(p, "1") for p in _parts(results, cell, metric).values()]) for cell in shown]
        return "; ".join(f"{title(cell)} {', '.join(parts)}" for cell, parts in said) + "."

    return words


def _curves_height(results: Results, cells: Sequence[Cell]) -> float:
    return 2.6 + 0.2 * _legend_lines(_drafting(results, cells))


def _histograms(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    from matplotlib.ticker import MaxNLocator

    shown = _drafting(results, cells)
    for row, cell in enumerate(shown):
        colour, _ = _series(results, cell, theme)
        counts = _parts(results, cell, "acceptance_histogram")
        most = max(counts.values())
        axes.plot([-0.5, max(counts) + 0.5], [row + 0.24] * 2, color=theme.muted, lw=0.6)
        axes.bar(list(counts), [-0.46 * count / most for count in counts.values()], 0.8, row + 0.24, color=colour)
    _engine_rows(axes, theme, shown, [f"{_steps_of(results, cell):,.0f} steps" for cell in shown])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="drafts accepted in a step, bonus token excluded")


def _steps_of(results: Results, cell: Cell) -> float:
    return sum(_parts(results, cell, "acceptance_histogram").values())


def _histograms_alt(results: Results, cells: Sequence[Cell]) -> str:
    said = [(cell, _parts(results, cell, "acceptance_histogram")) for cell in _drafting(results, cells)]
    return "; ".join(f"{title(c)} " + ", ".join(f"{i}: {n:.0f}" for i, n in counts.items()) for c, counts in said) + "."


def _step_means(cell: Cell) -> dict[str, float]:
    """Mean milliseconds of a decode step by part."""
    return {str(part): float(seconds) * 1e3 for part, seconds in step_split(cell).mean().items()}


def _beside_baseline(results: Results, cells: Sequence[Cell]) -> list[Cell]:
    shown = _paying(results, cells)
    return [*(cell for cell in cells if cell.record.baseline), *shown]


def _step_parts(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    shown = _beside_baseline(results, cells)
    means = [_step_means(cell) for cell in shown]
    parts = [part for part in (*PHASES, "switching") if any(part in m for m in means)]
    for index, part in enumerate(parts):
        starts = [sum(m.get(before, 0.0) for before in parts[:index]) for m in means]
        colour, hatch = _phase_style(theme, "host gap" if part == "switching" else part)
        label = "accept + commit + host gap" if part == "switching" else part
        axes.barh(
            range(len(shown)), [m.get(part, 0.0) for m in means], 0.36, starts, label=label, color=colour, hatch=hatch,
            ec=theme.paper, lw=0.5,
        )  # fmt: skip
    _engine_rows(axes, theme, shown, [_break_even_words(results, cell) for cell in shown])
    axes.set(xlabel="milliseconds per decode step, mean")
    legend_below(axes, min(3, len(parts)))


def _break_even_words(results: Results, cell: Cell) -> str:
    needed = results.value(cell, "break_even_acceptance")
    return "" if needed is None else f"breaks even at {needed:.2f} tokens"


def _step_parts_alt(results: Results, cells: Sequence[Cell]) -> str:
    said = []
    for cell in _beside_baseline(results, cells):
        parts = ", ".join(f"{part} {quantity(ms / 1e3, 's')}" for part, ms in _step_means(cell).items())
        said.append(f"{title(cell)}: " + ", ".join(filter(None, (parts, _break_even_words(results, cell)))))
    return "; ".join(said) + "."


def _tokens_per_forward(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    shown = _paying(results, cells)
    pairs = [_forward_pair(results, cell) for cell in shown]
    for row, (cell, (plain, weighted)) in enumerate(zip(shown, pairs, strict=True)):
        colour, _ = _series(results, cell, theme)
        axes.plot([weighted, plain], [row + 0.05] * 2, color=colour, lw=1.4)
        axes.plot(plain, row + 0.05, "o", ms=7, color=colour, mew=1.4)
        axes.plot(weighted, row + 0.05, "o", ms=7, color=colour, mfc=theme.paper, mew=1.4)
    axes.plot([], [], "o", ms=6, color=theme.muted, mfc=theme.paper, label="per weighted forward")
    axes.plot([], [], "o", ms=6, color=theme.muted, label="per forward of the target")
    axes.axvline(1, color=theme.ink, lw=1.2, ls=(0, (4, 3)))
    _engine_rows(axes, theme, shown, [f"{weighted:.2f} of {plain:.2f}" for plain, weighted in pairs])
    axes.set(xlabel="tokens")
    axes.set_xlim(0, max(1.0, *(max(pair) for pair in pairs)) * 1.08)
    legend_below(axes, 2)


def _forward_pair(results: Results, cell: Cell) -> tuple[float, float]:
    plain, weighted = (results.value(cell, name) for name in ("tokens_per_forward", "tokens_per_weighted_forward"))
    return plain or np.nan, weighted or np.nan


def _tokens_per_forward_alt(results: Results, cells: Sequence[Cell]) -> str:
    said = [(title(cell), *_forward_pair(results, cell)) for cell in _paying(results, cells)]
    return "; ".join(f"{name} {plain:.2f}, weighted {weighted:.2f}" for name, plain, weighted in said) + "."


# Diffusion -----------------------------------------------------------------------------------------------------------


def _grid(results: Results, cells: Sequence[Cell]) -> dict[tuple[int, int], Cell]:
    """Cells of single-pass diffusion by (block size, proposals), where both vary and nothing else sets cells of one
    block size apart; else none."""
    found: dict[tuple[int, int], Cell] = {}
    for (block, apart), mine in families(cells).items():
        if apart:
            return {}
        known = [cell for cell in mine if _speed(results, cell) is not None]
        found |= {(block, proposals_of(cell) or 0): cell for cell in known}
    varied = all(len({key[axis] for key in found}) > 1 for axis in (0, 1))
    return found if varied and len(found) > 3 else {}


def _speed(results: Results, cell: Cell) -> float | None:
    return results.value(cell, "speedup")


def _grid_axes(found: Mapping[tuple[int, int], Cell]) -> tuple[list[int], list[int]]:
    return sorted({block for block, _ in found}), sorted({proposals for _, proposals in found})


def _heat(axes: Axes, theme: Theme, results: Results, cells: Sequence[Cell]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    found = _grid(results, cells)
    blocks, proposals = _grid_axes(found)
    speeds = np.full((len(blocks), len(proposals)), np.nan)
    for (block, count), cell in found.items():
        speeds[blocks.index(block), proposals.index(count)] = _speed(results, cell)
    shades = LinearSegmentedColormap.from_list("speed", [theme.paper, theme.series[0]])
    axes.imshow(speeds, cmap=shades, aspect="auto", vmin=0, vmax=1.8 * np.nanmax(speeds))
    for (block, count), cell in found.items():
        at = proposals.index(count), blocks.index(block)
        best = _speed(results, cell) == np.nanmax(speeds)
        gained = results.value(cell, "tokens_per_forward")
        text = f"{_speed(results, cell):.2f}×\n{gained:.2f}" if gained else f"{_speed(results, cell):.2f}×"
        axes.text(*at, text, ha="center", va="center", weight="bold" if best else "normal", linespacing=1.3)
    axes.set_xticks(range(len(proposals)), labels=map(str, proposals))
    axes.set_yticks(range(len(blocks)), labels=map(str, blocks))
    axes.set(xlabel="proposals (masked blocks per forward)", ylabel="block size")
    axes.set_title(", ".join(dict.fromkeys(words for cell in found.values() for words in caveats(cell.record))),
                   fontsize=7, style="italic", color=theme.muted, loc="left")  # fmt: skip
    axes.grid(visible=False)


def _heat_height(results: Results, cells: Sequence[Cell]) -> float:
    return 0.8 + 0.5 * len(_grid_axes(_grid(results, cells))[0])


def _heat_alt(results: Results, cells: Sequence[Cell]) -> str:
    said = []
    for (block, count), cell in sorted(_grid(results, cells).items()):
        gained = results.value(cell, "tokens_per_forward")
        tokens = f", {gained:.2f} tokens per forward" if gained else ""
        said.append(f"block {block}, {count} proposals: {_speed(results, cell):.2f}×{tokens}")
    return "; ".join(said) + "."


PLOTS = (
    Plot(
        "roofline", "Where each forward stands",
        "One mark per kind of forward, where it takes the most time; its other numbers of rows are points on the line "
        "through it. Open marks come before the first decode step: prefills, and what a drafter or a mask head "
        "does then. Close marks of one kind share a name. Below the slope memory limits, below the flat part "
        "arithmetic; far below both, overhead does. Solid: roofs measured on this device, shaded from the lowest to "
        "the highest read bandwidth beside the run; thin: what its caches give to data that fits into them. Dashed: "
        "spec sheet. A roof that is not known is not drawn.",
        lambda results, cells: bool(_with_forwards(cells)),
        lambda results, cells: 3.5 + 0.2 * _legend_lines(_with_forwards(cells)), _roofline, _roofline_alt,
    ),
    Plot(
        "steps", "How long a decode step takes",
        "Each tick is one percent of the steps, the bar the middle half, the mark across it the median. "
        "Steps of different engines commit different numbers of tokens.",
        lambda results, cells: bool(_with_steps(cells)),
        lambda results, cells: _engine_row_height(_with_steps(cells)), _step_times, _step_times_alt,
    ),
    Plot(
        "phases", "Where the time goes",
        "Mean seconds of one trial, prefill included. Host gap: what forwards, accept and commit leave of the steps. "
        "Where an engine’s forwards are not seen, its time is not divided.",
        lambda results, cells: any(cell.trials for cell in _decoding(cells)), _phases_height, _phases, _phases_alt,
    ),
    Plot(
        "experts", "How many experts a forward reads",
        "One mark per kind of forward, its other numbers of rows on the line through it; open marks come before the "
        "first decode step. Each expert that any row was sent to is read once, so more rows read more weights. Dashed: "
        "what rows would hit that choose uniformly and independently, predicted.",
        _has_experts, _experts_height, _experts, _experts_alt,
    ),
    Plot(
        "speedup", "Speed of each prompt against the baseline",
        "One mark per prompt: the baseline’s seconds per token over the engine’s, for the same prompt. "
        "Line and band: geometric mean and 95% interval. Right of the dashed line is faster.",
        lambda results, cells: bool(_compared(results, cells)), _speedups_height, _speedups, _speedups_alt,
    ),
    Plot(
        "split", "What a step is made of",
        "Mean of decode steps. An engine breaks even at as many tokens per step as its median step takes times the "
        "baseline’s median step, mean over mean where some steps have no drafts or look them up. Accept, commit and "
        "host gap are what a step takes beside its forwards: with two models, switching between them.",
        lambda results, cells: bool(_paying(results, cells)),
        lambda results, cells: _engine_row_height(_beside_baseline(results, cells), legend_lines=1),
        _step_parts, _step_parts_alt, "speculation",
    ),
    Plot(
        "forwards", "Tokens per forward, and what they cost",
        "Filled: tokens per forward of the target. Open: the same, with every forward, the drafter’s too, weighted by "
        "its bytes over those of an autoregressive forward there. Left of the dashed line more is read than gained.",
        lambda results, cells: bool(_paying(results, cells)),
        lambda results, cells: _engine_row_height(_paying(results, cells), legend_lines=1),
        _tokens_per_forward, _tokens_per_forward_alt, "speculation",
    ),
    Plot(
        "grid", "Block size and proposals",
        "Single-pass diffusion. Above: speed against the baseline, paired by prompt; below: tokens per forward. "
        "Stronger blue is faster, the fastest is bold. More proposals leave fewer steps without drafts and cost more "
        "rows in each.",
        lambda results, cells: bool(_grid(results, cells)),
        _heat_height, _heat, _heat_alt, "speculation",
    ),
    Plot(
        "acceptance", "How far drafts are accepted",
        "Share of all verify steps that accept the draft at this position; in a tree, at this depth.",
        lambda results, cells: bool(_drafting(results, cells)),
        _curves_height, _curves("acceptance_at"), _curves_alt("acceptance_at"), "speculation",
    ),
    Plot(
        "conditional", "How good each draft is",
        "The same among the steps that accepted the draft before and offered this one before the end of the output. A "
        "position that no step reached has no mark.",
        lambda results, cells: bool(_drafting(results, cells)),
        _curves_height, _curves("conditional_at"), _curves_alt("conditional_at"), "speculation",
    ),
    Plot(
        "histogram", "Drafts accepted per step",
        "Verify steps by the number of drafts that they accepted; each engine’s highest bar has the same height.",
        lambda results, cells: bool(_drafting(results, cells)),
        lambda results, cells: 0.55 + 0.85 * len(_drafting(results, cells)),
        _histograms, _histograms_alt, "speculation",
    ),
)  # fmt: skip

OVERVIEW = Plot(
    "overview", "Decode speed at every point",
    "Tokens per second of one sequence with the 95% interval, one row per point of the matrix.",
    lambda results, cells: len(results.points) > 1 and any(results.value(c, "decode_tps") is not None for c in cells),
    _speeds_height, _speeds, _speeds_alt,
)  # fmt: skip
