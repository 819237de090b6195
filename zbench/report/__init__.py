"""From a run folder to a report that one can open, send and check. Reads the folder only; needs no device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zbench.errors import UserError

POINTS_DRAWN = 6  # points of the matrix that get figures of their own; a page of more than that is megabytes


def render(run_folder: Path) -> Path:
    """Write `report.html`, `metrics.csv`, `metrics.json` and `figures/` into the run folder; return the HTML's path.
    Where decoders of others were measured too, `peers.md` has their table.

    The folder of a projection gets `projection.html` and its figures instead, that of a run of kernels `kernels.html`,
    that of a tuning `tune.html`.
    The HTML is self-contained. Rendering twice gives identical bytes. Raises UserError when the folder is none of
    these, or cannot be written.
    """
    from zbench.records import KERNELS, PROJECTION, TUNE
    from zbench.report import kernels, projection, tuning

    if (Path(run_folder) / PROJECTION).exists():
        return projection.render(Path(run_folder))
    if (Path(run_folder) / KERNELS).exists():
        return kernels.render(Path(run_folder))
    if (Path(run_folder) / TUNE).exists():
        return tuning.render(Path(run_folder))
    from zbench.cache import write
    from zbench.metrics import load_run
    from zbench.report import export, figures, html, peers, scaling, sweeps, telemetry
    from zbench.results import Results

    results = Results.of(load_run(Path(run_folder)))
    overviews = figures.draw(results, results.run.cells, "", (figures.OVERVIEW, *sweeps.OVERVIEWS))
    plots = (*sweeps.PLOTS, *figures.PLOTS, *telemetry.PLOTS)
    drawn = [figures.draw(results, point.cells, point.label, plots) for point in results.points[:POINTS_DRAWN]]
    across = scaling.sections(results)
    files: dict[str, str | bytes] = {
        "metrics.csv": export.to_csv(results),
        "metrics.json": export.to_json(results),
        "report.html": html.page(results, overviews, drawn, across),
    }
    if table := peers.to_markdown(results):
        files["peers.md"] = table
    further = [figure for part in (*drawn, *(each.figures for each in across)) for figure in part]
    for figure in [*overviews, *further]:
        files |= {f"figures/{name}": content for name, content in figure.files().items()}
    for name, content in files.items():
        write(Path(run_folder) / name, content)
    return Path(run_folder) / "report.html"


def headline(run_folder: Path) -> list[str]:
    """The answer and the warnings of a rendered report, one sentence per line. Raises UserError before `render`."""
    content = _content(run_folder)
    told = [(entry["point"], sentence) for entry in content["answers"] for sentence in entry["sentences"]]
    answers = [f"{point}: {sentence}" if point else sentence for point, sentence in told]
    return [*answers, *_warned(content)]


def warned(run_folder: Path) -> list[str]:
    """The warnings of a rendered report alone, of a folder that `render` made one of."""
    return _warned(_content(run_folder))


def _warned(content: dict[str, Any]) -> list[str]:
    return [f"warning: {sentence}" for sentence in content["warnings"]]


def _content(run_folder: Path) -> dict[str, Any]:
    path = Path(run_folder) / "metrics.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: cannot be read; run `zbench report {run_folder}`") from None
