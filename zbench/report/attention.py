"""The figure of `zbench attention`: arithmetic per prompt token over the context, and the cache beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zbench.errors import UserError
from zbench.models.attention import Shape
from zbench.report.figures import LIGHT, MARKERS, WIDTH, Theme, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(file: Path, shape: Shape, context: int, itemsize: int) -> None:
    """Write the figure as PNG or SVG, by the file's name. Raises UserError for other names and unwritable places."""
    from matplotlib import rc_context

    kind = file.suffix.removeprefix(".").lower()
    if kind not in ("png", "svg"):
        raise UserError(f"{file}: a figure is a .png or .svg file")
    stamp: dict[str, Any] = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    drawn = figure(LIGHT, shape, context, itemsize)
    try:
        with rc_context(style(LIGHT)):
            drawn.savefig(file, dpi=200, metadata=stamp)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def figure(theme: Theme, shape: Shape, context: int, itemsize: int) -> Figure:
    """Above, prefill FLOPs per token and layer up to 16 times the context; below, KV bytes per token and layer."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    kinds = shape.kinds()
    contexts = np.unique(np.geomspace(max(context // 16, 1), context * 16, 9).astype(int))
    with rc_context(style(theme)):
        drawn = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        FigureCanvasAgg(drawn)
        above, below = drawn.subplots(2, 1, height_ratios=(3, 2))
        for index, kind in enumerate(kinds):
            flops = [kind.prefill_flops(int(n)) for n in contexts]
            above.plot(contexts, flops, f"{MARKERS[index]}-", color=theme.series[index], ms=4, lw=1.4, label=kind.kind)
        above.axvline(context, color=theme.ink, lw=1.2, ls=(0, (4, 3)))
        above.set(xscale="log", yscale="log", xlabel="prompt, tokens", ylabel="FLOP per token, predicted")
        above.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        above.yaxis.set_major_formatter(EngFormatter(places=0))
        above.minorticks_off()
        above.legend(loc="upper left")
        places = range(len(kinds))
        sizes = [kind.kv_bytes(itemsize) for kind in kinds]
        below.barh(places, sizes, 0.6, color=theme.series[: len(kinds)])
        for place, kind, size in zip(places, kinds, sizes, strict=True):
            words = f"{size:,} B, {kind.intensity(itemsize):.1f} FLOP per byte"
            below.annotate(words, (size, place), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
        below.set_yticks(places, labels=[kind.kind for kind in kinds])
        below.set(xlabel="KV cache per token, bytes; one decoded row's FLOPs over it", xlim=(0, max(sizes) * 1.85))
        below.invert_yaxis()
        below.grid(axis="y", visible=False)
        drawn.draw_without_rendering()
    return drawn
