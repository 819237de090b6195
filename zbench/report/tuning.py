"""From `tune.json` to a page: which settings were tried, in which round, and what became of them. Reads that only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zbench.errors import UserError
from zbench.records import TUNE, TUNE_VERSION
from zbench.report import figures
from zbench.report.figures import DARK, LIGHT, Drawn, Theme
from zbench.report.html import Entry, Line, Notes, Table, image, templates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "tune.html"
DRAWN = 14  # settings of an engine in its figure; the table has the others

Data = Mapping[str, Any]  # a piece of tune.json


def render(folder: Path) -> Path:
    """Write `tune.html` and its figures beside a folder's `tune.json`; return the page's path. Rendering twice gives
    identical bytes.

    Raises UserError where the file is damaged or the folder cannot be written.
    """
    from zbench.cache import atomic_write

    run = _read(folder)
    parts = [(found, _of(run, found["chosen"]["engine"])) for found in run["found"]]
    drawn = [_figure(found, settings) for found, settings in parts]
    page = templates().get_template("tuning.html").render(
        run=run,
        name=Path(run["folder"]).name,
        facts=[
            ("Device", run["device"]),
            ("Prompts", f"{run['choosing']} to choose by, {run['last']['prompts']} others"),
        ],
        answers=answers(run),
        parts=[
            {"name": found["chosen"]["engine"], "figure": image(figure), "table": _table(run, found, settings)}
            for (found, settings), figure in zip(parts, drawn, strict=True)
        ],
        runs=[(each["folder"], each["prompts"]) for each in (*run["rounds"], run["last"])],
    )  # fmt: skip
    files: dict[str, str | bytes] = {PAGE: page}
    for figure in drawn:
        files |= {f"figures/{name}": content for name, content in figure.files().items()}
    try:
        for name, content in files.items():
            atomic_write(folder / name, content)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot write the page ({error.strerror})") from None
    return folder / PAGE


def headline(folder: Path) -> list[str]:
    """What was found, one sentence per line."""
    return answers(_read(folder))


def _read(folder: Path) -> Data:
    path = folder / TUNE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["schema_version"]
        _ = version != TUNE_VERSION or (found["found"], found["rounds"], found["last"]["prompts"], found["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is not a tuning; make one with `zbench tune`") from None
    if version != TUNE_VERSION:
        raise UserError(f"{path}: has schema {version}, this zbench reads {TUNE_VERSION}; tune again")
    return found


def answers(run: Data) -> list[str]:
    """A sentence for each engine, and what the figures are of."""
    said = [_answer(found) for found in run["found"]]
    return [
        *said,
        f"Settings were chosen by {run['choosing']} prompts; the ratios are of {run['last']['prompts']} other ones,"
        " with 95% intervals.",
    ]


def _answer(found: Data) -> str:
    chosen, over = found["chosen"], found["over_given"]
    if chosen["error"]:
        return f"{chosen['engine']}: no setting could be measured ({chosen['error']})."
    best = f"{chosen['engine']} is fastest with {chosen['setting']}, of {found['settings']} settings"
    plain = _compared(chosen["speedup"], "plain decoding")
    own = f"; {_compared(over, 'the scenario’s own setting')}" if over and over["value"] is not None else ""
    return f"{best}: {plain}{own}."


def _compared(ratio: Data, other: str) -> str:
    low, high = ratio["low"], ratio["high"]
    if low is not None and low <= 1 <= high:
        return f"no difference from {other} is shown ({ratio['value']:.2f}×, {low:.2f}–{high:.2f})"
    return f"{_times(ratio)} as fast as {other}{_around(ratio, ' ({})')}"


def _times(ratio: Data) -> str:
    return f"{ratio['value']:.2f}×"


def _around(ratio: Data, shape: str = "{}") -> str:
    return "" if ratio["low"] is None else shape.format(f"{ratio['low']:.2f}–{ratio['high']:.2f}")


def _of(run: Data, engine: str) -> list[tuple[str, list[Data | None]]]:
    """(setting, what each round and the last run said of it), those that came furthest first, by speed."""
    rounds = [*run["rounds"], run["last"]]
    found: dict[str, list[Data | None]] = {}
    for index, each in enumerate(rounds):
        for tried in each["tried"]:
            if tried["engine"] == engine:
                found.setdefault(tried["setting"], [None] * len(rounds))[index] = tried
    chosen = next(one["chosen"]["setting"] for one in run["found"] if one["chosen"]["engine"] == engine)

    def rank(entry: tuple[str, list[Data | None]]) -> tuple[bool, int, float]:
        setting, results = entry
        choosing = [(index, each) for index, each in enumerate(results[:-1]) if each]
        last, tried = choosing[-1] if choosing else (-1, results[-1])
        return setting != chosen, -last, -float((tried and tried["speedup"]["value"]) or 0)

    return sorted(found.items(), key=rank)


def _table(run: Data, found: Data, settings: Sequence[tuple[str, Sequence[Data | None]]]) -> Table:
    headings = [
        *(f"Round {index + 1}, {each['prompts']} prompts" for index, each in enumerate(run["rounds"])),
        f"{run['last']['prompts']} other prompts",
        "Tokens per forward",
    ]
    lines = []
    for setting, results in settings:
        entries = [
            Entry(heading, _times(tried["speedup"]), _around(tried["speedup"]))
            if tried and tried["speedup"]["value"] is not None
            else Entry(heading, "failed" if tried else "–", wrong=bool(tried))
            for heading, tried in zip(headings, results, strict=False)
        ]
        last = next(tried for tried in reversed(results) if tried)
        tokens = last["tokens_per_forward"]["value"]
        entries.append(Entry(headings[-1], "n/a" if tokens is None else f"{tokens:.2f}"))
        what = "chosen" if setting == found["chosen"]["setting"] else ""
        if found["given"] and setting == found["given"]["setting"]:
            what = "the scenario’s own"
        lines.append(Line(setting, entries, what, last["error"]))
    return Table(headings, lines, Notes().listed())


def _figure(found: Data, settings: Sequence[tuple[str, Sequence[Data | None]]]) -> Drawn:
    engine = found["chosen"]["engine"]
    given = found["given"]["setting"] if found["given"] else None
    shown = [entry for index, entry in enumerate(settings) if index < DRAWN or entry[0] == given]
    seen = [(setting, [t for t in tried if t and t["speedup"]["value"] is not None]) for setting, tried in shown]

    def paint(axes: Axes, theme: Theme) -> None:
        axes.set(ylim=(len(shown) - 0.4, -0.75), yticks=[], xlabel="times as fast as plain decoding")
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        background = {"fc": theme.paper, "ec": "none", "pad": 0.8, "alpha": 0.85}
        for row, (setting, tried) in enumerate(shown):
            name = f"{setting} (the scenario’s)" if setting == given else setting
            style: dict[str, Any] = {"va": "center", "fontsize": 6.5, "bbox": background}
            axes.text(0, row - 0.36, name, transform=axes.get_yaxis_transform(), **style)
            for index, each in enumerate(tried):
                if not each or each["speedup"]["value"] is None:
                    continue
                last = index == len(tried) - 1
                colour = theme.series[1] if last else theme.series[0]
                ratio = each["speedup"]
                height = row + (0.16 if last else 0)
                if ratio["low"] is not None:
                    axes.plot([ratio["low"], ratio["high"]], [height, height], color=colour, lw=1.2, alpha=0.6)
                axes.plot(
                    ratio["value"], height, "D" if last else "o", color=colour, ms=4.5,
                    mfc=colour if last or each["kept"] else theme.paper,
                )  # fmt: skip
        axes.axvline(1, color=theme.ink, lw=1, ls=(0, (4, 3)))
        axes.margins(x=0.05)

    words = "; ".join(
        f"{setting}: {', '.join(_times(each['speedup']) for each in tried) or 'failed'}" for setting, tried in seen
    )
    left = len(settings) - len(shown)
    caption = (
        "Circles: rounds that chose, filled where the setting was kept. Diamond: the last run, on other prompts."
        + (f" {left} more settings are in the table." if left else "")
    )
    svg, png = figures.saved(
        {theme.name: figures.painted(theme, 0.55 + 0.36 * len(shown), paint) for theme in (LIGHT, DARK)}
    )
    return Drawn(
        figures.file_name("settings", engine), engine, caption, f"Settings of {engine}: {words}.", "results", svg, png
    )
