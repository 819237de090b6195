"""Figures as matplotlib draws them: no text upon text, nothing cut off, for runs of any shape."""

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Annotation, Text

from tests.report.synthetic import DIFFUSION, ENGINES, GRID, RATE, READ, ROOFS, SPECS, SPECULATIVE, write_run
from zbench import metrics
from zbench.report import figures
from zbench.results import Results

CONFIDENT = ("autoregressive", "eagle3 chain of up to 6", "dflash block of 8", "tidar 4 by 2")
RUNS: dict[str, dict[str, Any]] = {
    "all engines": {"engines": tuple(ENGINES), "specs": SPECS},
    "drafting engines": {"engines": SPECULATIVE, "points": ({"batch": 4},), "prompts": 5, "repeats": 1},
    "drafting engine without a baseline": {"engines": SPECULATIVE[1:2], "prompts": 2},
    "a mixture of experts": {"engines": tuple(ENGINES), "prompts": 5, "repeats": 1, "experts": 16},
    "a mixture of experts in batches": {"engines": SPECULATIVE, "points": ({"batch": 64},), "prompts": 2, "experts": 4},
    "diffusion": {"engines": ("autoregressive", *GRID, *DIFFUSION), "prompts": 5, "repeats": 1},
    "chains of every length": {"engines": CONFIDENT, "prompts": 3, "repeats": 2},
    "one engine without roofs": {"engines": ("autoregressive",), "roofs": None, "prompts": 2},
    "foreign engines only": {"engines": ("transformers generate",)},
    "over its roof": {"points": ({"batch": 4},)},
    "two points": {"points": ({"batch": 1}, {"batch": 4}), "prompts": 5, "repeats": 1},
}


@pytest.fixture(scope="module", params=RUNS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results.of(metrics.load_run(write_run(tmp_path_factory.mktemp("run"), **RUNS[request.param])))


def plots() -> list[Any]:
    return [pytest.param(plot, id=plot.name) for plot in (*figures.PLOTS, figures.OVERVIEW)]


@pytest.mark.parametrize("plot", plots())
def test_no_text_lies_upon_another_or_outside_the_paper(plot: figures.Plot, results: Results) -> None:
    cells = results.run.cells
    if not plot.applies(results, cells):
        assert plot.name in {"roofline", "speedup", "experts", "overview"} or plot.section == "speculation"
        return
    assert_readable(figures.figure(plot, figures.LIGHT, results, cells))


LONG = "eagle3 (drafter: {'path': 'drafters/invented'}, depth: 4)"


@pytest.mark.parametrize("plot", plots())
def test_a_long_engine_name_is_shortened_but_never_what_its_acceptance_is_not(
    plot: figures.Plot, tmp_path: Path
) -> None:
    labels = ("autoregressive", *GRID) if plot.name == "grid" else SPECULATIVE
    run = write_run(tmp_path, engines=labels, prompts=5, repeats=1, experts=16)
    planned = (run / "run.json").read_text()
    if plot.name == "grid":
        planned = planned.replace('"synthetic": null', '"synthetic": {"length": 2.0}')
    for label in labels[1:]:
        planned = planned.replace(f'"label": "{label}"', f'"label": "{LONG}, {label[-3:]}"')
    (run / "run.json").write_text(planned)
    found = Results.of(metrics.load_run(run))
    figure = figures.figure(plot, figures.LIGHT, found, found.run.cells)
    assert_readable(figure)
    assert any("synthetic acceptance" in text.get_text() for text in figure.findobj(Text))


def assert_readable(figure: Any) -> None:
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text() and not t.get_rotation()]
    boxes = [(t.get_text(), Text.get_window_extent(t).padded(-1)) for t in texts]
    shown = [(text, box) for text, box in boxes if _within_axis(text, figure)]
    assert len(shown) > 3
    for text, box in shown:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (one, a), (other, b) in combinations(shown, 2):
        assert not a.overlaps(b), (one, other)


def _within_axis(text: str, figure: Any) -> bool:
    """matplotlib keeps labels of ticks beyond the axis' ends; it does not draw them."""
    axes = figure.axes[0]
    hidden = set()
    for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
        ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        hidden |= {label.get_text() for at, label in ticks if not low <= at <= high}
    return text not in hidden


def test_an_engine_keeps_its_colour_and_marker_throughout(results: Results) -> None:
    series = {label: set() for label in results.engines}  # type: dict[str, set]
    for cell in results.run.cells:
        series[cell.record.label].add(figures._series(results, cell, figures.LIGHT))
    assert all(len(styles) == 1 for styles in series.values())
    assert len(set.union(*series.values())) == len(series)


def test_experts_are_drawn_for_a_mixture_of_experts_only_one_point_per_kind_beside_the_prediction(
    results: Results,
) -> None:
    [plot] = [plot for plot in figures.PLOTS if plot.name == "experts"]
    cells = results.run.cells
    routed = results.run.forwards["experts"].notna().any()
    assert plot.applies(results, cells) == routed
    if not routed:
        return
    axes = figures.figure(plot, figures.LIGHT, results, cells).axes[0]
    line, *marks = axes.lines
    assert line.get_label() == "uniform routing (predicted)"
    seen = {(c.record.id, k) for c in cells for k, f in c.forwards.groupby("kind") if f["experts"].notna().any()}
    at = {(mark.get_color(), *point) for mark in marks for point in mark.get_xydata()}
    assert len(at) == len(seen)
    for _, rows, hit in at:  # as the synthetic router hits
        total = results.run.manifest.models[cells[0].record.model]["experts"]
        assert hit == pytest.approx(0.2 + 0.8 * total * (1 - (1 - 1 / total) ** rows), rel=0.02)
    assert f"of {total}" in plot.alt(results, cells)


def test_chains_of_many_lengths_share_one_mark_and_one_name_and_are_points_on_a_line(tmp_path: Path) -> None:
    [plot] = [plot for plot in figures.PLOTS if plot.name == "roofline"]
    found = Results.of(metrics.load_run(write_run(tmp_path, engines=CONFIDENT, prompts=3)))
    axes = figures.figure(plot, figures.LIGHT, found, found.run.cells).axes[0]
    names = [text.get_text() for text in axes.texts]
    assert {"decode, 1 row", "prefill", "draft, 1–7 rows", "verify, 2–7 rows", "verify, 8 rows"} <= set(names)
    assert names.count("verify, 2–7 rows") == 1
    [chains] = [cell for cell in found.run.cells if cell.record.options.get("confidence")]
    colour, marker = figures._series(found, chains, figures.LIGHT)
    mine = [line for line in axes.lines if line.get_color() == colour and len(line.get_xdata())]
    drafts, verifies = sorted(
        (line for line in mine if line.get_marker() == "."), key=lambda line: line.get_xdata()[-1]
    )
    assert len(drafts.get_xdata()) == 7 and len(verifies.get_xdata()) == 6
    assert list(verifies.get_xdata()) == sorted(verifies.get_xdata())
    large = [tuple(line.get_xydata()[0]) for line in mine if line.get_marker() == marker]
    assert len(large) == 3  # a draft, a verify and the prefill
    assert len(set(large) & set(map(tuple, verifies.get_xydata()))) == 1


def test_a_name_in_the_roofline_lies_upon_no_mark_and_no_slanted_text(results: Results) -> None:
    [plot] = [plot for plot in figures.PLOTS if plot.name == "roofline"]
    if not plot.applies(results, results.run.cells):
        return
    axes = figures.figure(plot, figures.LIGHT, results, results.run.cells).axes[0]
    names = [text for text in axes.texts if isinstance(text, Annotation)]
    assert names
    marks = np.concatenate([axes.transData.transform(m.get_xydata()) for m in axes.lines if m.get_markersize() == 7])
    slanted = [text for text in axes.texts if text.get_rotation()]
    for name in names:
        box = Text.get_window_extent(name)
        for x, y in [*marks, *(middle for text in slanted for middle in _middle(text))]:
            assert not box.contains(x, y), name.get_text()


def _middle(text: Text) -> list[tuple[float, float]]:
    """Points along the middle of a slanted text, in pixels; its own box is much larger than it."""
    box, slope = text.get_window_extent(), np.tan(np.radians(text.get_rotation()))
    x = np.linspace(box.x0 + 8, box.x1 - 8, 20)
    return [(float(at), float((box.y0 + box.y1) / 2 + slope * (at - (box.x0 + box.x1) / 2))) for at in x]


def test_cache_levels_are_thin_slopes_up_to_the_flat_roof_where_they_were_measured_and_differ(tmp_path: Path) -> None:
    [plot] = [plot for plot in figures.PLOTS if plot.name == "roofline"]

    def slopes(name: str, **levels: float) -> dict[str, float]:
        roofs = {
            **ROOFS,
            "caches": {"levels": {level: {"value": rate, "capacity": 1} for level, rate in levels.items()}},
        }
        roofs = roofs if levels else {key: part for key, part in ROOFS.items() if key != "caches"}
        found = Results.of(metrics.load_run(write_run(tmp_path / name, engines=("autoregressive",), roofs=roofs)))
        axes = figures.figure(plot, figures.LIGHT, found, found.run.cells).axes[0]
        thin = [line for line in axes.lines if line.get_linewidth() == 0.6]
        assert all(line.get_ydata()[1] == RATE for line in thin)
        bandwidths = [line.get_ydata()[0] / line.get_xdata()[0] for line in thin]
        named = [text.get_text() for text in axes.texts if text.get_text().startswith("L")]
        return dict(zip(named, bandwidths, strict=True))

    several = slopes("several", L1d=600e9, L2=590e9, L3=3 * READ, L4=READ)
    assert several == {"L3 114 GB/s": pytest.approx(3 * READ), "L2 590 GB/s": pytest.approx(590e9)}
    assert slopes("older run") == {}


def test_a_run_with_one_point_has_no_overview(results: Results) -> None:
    assert figures.OVERVIEW.applies(results, results.run.cells) == (len(results.points) > 1)


def test_the_grid_has_a_field_for_every_setting_and_marks_the_fastest(
    tmp_path: Path,
) -> None:
    [plot] = [plot for plot in figures.PLOTS if plot.name == "grid"]
    run = write_run(tmp_path, engines=("autoregressive", *GRID), prompts=5, repeats=1)
    found = Results.of(metrics.load_run(run))
    cells = found.run.cells
    assert plot.applies(found, cells)
    assert not plot.applies(found, [cell for cell in cells if cell.record.options.get("block_size") != 2][:3])
    axes = figures.figure(plot, figures.LIGHT, found, cells).axes[0]
    fields = {text.get_text(): text.get_weight() for text in axes.texts}
    speeds = [found.value(cell, "speedup") or 0 for cell in cells if cell.record.engine == "diffusion"]
    assert len(axes.texts) == len({(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 8)})
    [bold] = [text for text, weight in fields.items() if weight == "bold"]
    assert bold.startswith(f"{max(speeds):.2f}×")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2", "4", "8"]


@pytest.mark.parametrize("plot", plots())
def test_a_caption_is_true_on_light_and_on_dark_paper(plot: figures.Plot) -> None:
    assert not re.search(r"\b(dark|light|black|white)", plot.caption.lower())


def test_where_an_engine_breaks_even_is_captioned_as_the_metric_defines_it() -> None:
    [plot] = [plot for plot in figures.PLOTS if plot.name == "split"]
    means = "where some steps have no drafts or look them up"
    assert means in metrics.METRICS["break_even_acceptance"].formula
    assert f"mean over mean {means}" in plot.caption and "median" in plot.caption


def test_engines_that_stand_at_one_place_of_the_grid_leave_no_grid(tmp_path: Path) -> None:
    [plot] = [plot for plot in figures.PLOTS if plot.name == "grid"]
    found = Results.of(metrics.load_run(write_run(tmp_path, engines=("autoregressive", *GRID, "tidar mixed"))))
    assert not plot.applies(found, found.run.cells)
    assert plot.applies(found, [cell for cell in found.run.cells if cell.record.label != "tidar mixed"])


@pytest.mark.parametrize(("low", "high"), [(20, 80), (95, 130), (0.3, 0.7), (1, 1e6), (130, 190)])
def test_a_logarithmic_axis_names_two_ticks_or_more_however_short_it_is(low: float, high: float) -> None:
    def paint(axes: Any, theme: figures.Theme) -> None:
        axes.set(xscale="log", yscale="log", ylim=(low, high))
        figures.name_log_ticks(axes.yaxis)

    axis = figures.painted(figures.LIGHT, 3, paint).axes[0].yaxis
    named = [
        label.get_text()
        for at, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if low <= at <= high
    ]
    assert len(named) > 1 and len(set(named)) == len(named) and all(named)


def test_what_a_share_of_drafts_is_of_stands_on_its_axis(tmp_path: Path) -> None:
    found = Results.of(metrics.load_run(write_run(tmp_path, engines=SPECULATIVE, prompts=5, repeats=1)))
    labels = {
        plot.name: figures.figure(plot, figures.LIGHT, found, found.run.cells).axes[0].get_ylabel()
        for plot in figures.PLOTS
        if plot.name in {"acceptance", "conditional"}
    }
    assert labels["acceptance"] != labels["conditional"]
    assert "of steps that got so far" in labels["conditional"]


def test_every_mark_of_a_roofline_has_its_name_and_the_bandwidth_covers_none(tmp_path: Path) -> None:
    [plot] = [plot for plot in figures.PLOTS if plot.name == "roofline"]
    engines = ("autoregressive", "transformers generate", "chain drafter", "eagle3 chain of up to 6", "tidar 4 by 2")
    found = Results.of(metrics.load_run(write_run(tmp_path, engines=engines, prompts=3, samples=(READ, 1.3 * READ))))
    axes = figures.figure(plot, figures.LIGHT, found, found.run.cells).axes[0]
    shown = {text.get_text() for text in axes.texts}
    wanted = {name for cell in found.run.cells for name in figures._dot_names(cell).values() if name}
    assert wanted <= shown
    [bandwidth] = [text for text in axes.texts if text.get_text().endswith("GB/s measured")]
    marks = np.concatenate([line.get_xydata() for line in axes.lines if line.get_marker() in figures.MARKERS])
    spots = axes.transData.transform(marks[~np.isnan(marks).any(1)])
    assert not figures._met(figures._text_squares(bandwidth), np.column_stack([spots, np.full(len(spots), 3.0)]))
