"""From `tune.json` to a page: which settings were tried, in which round, and what became of them. Reads that only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zbench.errors import UserError
from zbench.records import TUNE, TUNE_VERSION, read_versioned
from zbench.report import figures
from zbench.report.figures import DARK, LIGHT, MARKERS, Drawn, Theme
from zbench.report.html import Entry, Line, Notes, Table, image, templates
from zbench.stats import FEW

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
    from zbench.cache import write

    with _understood(folder):
        files = _files(_read(folder))
    for name, content in files.items():
        write(folder / name, content)
    return folder / PAGE


def _files(run: Data) -> dict[str, str | bytes]:
    across = _across(run)
    drawn, points = list(across), list[dict[str, Any]]()
    for point in run["points"]:
        parts = []
        for found in point["found"]:
            settings = _settings(point, found)
            drawn.append(_tried(point, found, settings, f"settings-{len(drawn)}"))
            table = _table(point, found, settings)
            parts.append({"name": found["chosen"]["engine"], "figure": image(drawn[-1]), "table": table})
        points.append({"label": _label(point), "answers": _said(point), "parts": parts, "tuned": point["tuned"]})
    page = templates().get_template("tuning.html").render(
        run=run,
        name=Path(run["folder"]).name,
        facts=[("Device", run["device"]), ("Prompts", "{} to choose by, {} others".format(*_prompts(run)))],
        answers=_gains(run),
        across=[image(figure) for figure in across],
        points=points,
        runs=[(each["folder"], each["prompts"]) for p in run["points"] for each in (*p["rounds"], p["last"])],
    )  # fmt: skip
    figures = {f"figures/{name}": content for figure in drawn for name, content in figure.files().items()}
    return {PAGE: page, **figures}


def headline(folder: Path) -> list[str]:
    """What was found, one sentence per line."""
    with _understood(folder):
        return answers(_read(folder))


@contextmanager
def _understood(folder: Path) -> Iterator[None]:
    from jinja2 import UndefinedError

    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, UndefinedError) as error:
        raise UserError(f"{folder / TUNE}: is damaged ({type(error).__name__}: {error}); tune again") from None


def _read(folder: Path) -> Data:
    return read_versioned(folder / TUNE, TUNE_VERSION, "a tuning", "zbench tune")


def answers(run: Data) -> list[str]:
    """How each engine's gain moves over the points of a matrix; a sentence for each engine at each; and what they are
    of."""
    said = [
        f"{_label(point)}: {sentence}" if point["at"] else sentence
        for point in run["points"]
        for sentence in _said(point)
    ]
    sure = {found["chosen"]["speedup"]["low"] is not None for point in run["points"] for found in point["found"]}
    intervals = "with 95% intervals" if True in sure else "too few for intervals"
    if False in sure or not sure:
        intervals += f", which {'only ' if True in sure else ''}{FEW} batches or more have"
    chosen, others = _prompts(run)
    of = f"Settings were chosen by {chosen} prompts; the ratios are of {others} other ones, {intervals}."
    return [*_gains(run), *said, of]


def _prompts(run: Data) -> tuple[str, str]:
    """How many chose settings, and how many did not; ranges where points differ."""
    parts = ([p["choosing"] for p in run["points"]], [p["last"]["prompts"] for p in run["points"]])
    one, other = (str(min(n)) if min(n) == max(n) else f"{min(n)} to {max(n)}" for n in parts)
    return one, other


def _label(point: Data) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in point["at"].items())


def _gains(run: Data) -> list[str]:
    """Of several points, one sentence for each engine."""
    if len(run["points"]) < 2:
        return []
    return [
        f"{engine} at its fastest, over plain decoding: " + ", ".join(_gain(*gain) for gain in gains) + "."
        for engine, gains in _by_engine(run).items()
    ]


def _gain(label: str, ratio: Data | None) -> str:
    return f"{_times(ratio)}{_around(ratio, ' ({})')} at {label}" if ratio else f"no setting works at {label}"


def _by_engine(run: Data) -> dict[str, list[tuple[str, Data | None]]]:
    """Of each engine, what it gains at each point at the setting found there."""
    found: dict[str, list[tuple[str, Data | None]]] = {}
    for point in run["points"]:
        for one in point["found"]:
            chosen = one["chosen"]
            ratio = None if chosen["error"] else chosen["speedup"]
            name = ", ".join([chosen["engine"], *chosen["caveats"]])
            found.setdefault(name, []).append((_label(point), ratio))
    return found


def _said(point: Data) -> list[str]:
    return [_answer(found) for found in point["found"]]


def _answer(found: Data) -> str:
    chosen, over = found["chosen"], found["over_given"]
    if chosen["error"]:
        return f"{chosen['engine']}: no setting could be measured ({chosen['error']})."
    name = chosen["engine"] + (f" ({', '.join(chosen['caveats'])})" if chosen["caveats"] else "")
    best = f"{name} is fastest with {chosen['setting']}, of {found['settings']} settings"
    plain = _compared(chosen["speedup"], "plain decoding")
    own = f"; {_compared(over, 'the scenario’s own setting')}" if over and over["value"] is not None else ""
    return f"{best}: {plain}{own}."


def _compared(ratio: Data, other: str) -> str:
    low, high = ratio["low"], ratio["high"]
    if low is not None and low <= 1 <= high:
        return f"no difference from {other} is shown ({_times(ratio)}, {_around(ratio)})"
    return f"{_times(ratio)} as fast as {other}{_around(ratio, ' ({})')}"


def _times(ratio: Data) -> str:
    return f"{ratio['value']:.2f}×"


def _around(ratio: Data, shape: str = "{}") -> str:
    return "" if ratio["low"] is None else shape.format(f"{ratio['low']:.2f}–{ratio['high']:.2f}")


def _settings(point: Data, found: Data) -> list[tuple[str, list[Data | None]]]:
    """(setting, what each round and the last run said of it), by how far they came and how fast they were there."""
    rounds = [*point["rounds"], point["last"]]
    results: dict[str, list[Data | None]] = {}
    for index, each in enumerate(rounds):
        for tried in each["tried"]:
            if tried["engine"] == found["chosen"]["engine"]:
                results.setdefault(tried["setting"], [None] * len(rounds))[index] = tried

    def rank(entry: tuple[str, list[Data | None]]) -> tuple[int, float]:
        reached = [(index, tried) for index, tried in enumerate(entry[1][:-1]) if tried]
        if not reached:
            return 1, 0.0
        last, tried = reached[-1]
        return -last, -float(tried["speedup"]["value"] or 0)

    return sorted(results.items(), key=rank)


def _table(point: Data, found: Data, settings: Sequence[tuple[str, Sequence[Data | None]]]) -> Table:
    headings = [
        *(f"Round {index + 1}, {each['prompts']} prompts" for index, each in enumerate(point["rounds"])),
        f"{point['last']['prompts']} other prompts",
        "Tokens per forward",
    ]
    notes, lines = Notes(), []
    for setting, results in settings:
        entries = [
            Entry(heading, _times(tried["speedup"]), _around(tried["speedup"]), notes.mark(tried["speedup"]["note"]))
            if tried and tried["speedup"]["value"] is not None
            else Entry(heading, "failed" if tried else "–", wrong=bool(tried))
            for heading, tried in zip(headings, results, strict=False)
        ]
        last = next(tried for tried in reversed(results) if tried)
        tokens = last["tokens_per_forward"]["value"]
        entries.append(Entry(headings[-1], "n/a" if tokens is None else f"{tokens:.2f}"))
        what = ["chosen"] if setting == found["chosen"]["setting"] else []
        if found["given"] and setting == found["given"]["setting"]:
            what.append("the scenario’s own")
        lines.append(Line(setting, entries, ", ".join([*what, *last["caveats"]]), last["error"]))
    return Table(headings, lines, notes.listed())


def _tried(point: Data, found: Data, settings: Sequence[tuple[str, Sequence[Data | None]]], file: str) -> Drawn:
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
    label = _label(point)
    where = f" at {label}" if label else ""
    caveat = f" With {' and '.join(found['chosen']['caveats'])}." if found["chosen"]["caveats"] else ""
    return Drawn(file, engine, caption + caveat, f"Settings of {engine}{where}: {words}.", "results", svg, png)


def _across(run: Data) -> list[Drawn]:
    """Of several points: what each engine gains at each, at the setting that is fastest there."""
    gains, labels = _by_engine(run), [_label(point) for point in run["points"]]
    if len(labels) < 2:
        return []
    named = {axis for point in run["points"] for axis in point["at"]}
    names = [str(next(iter(p["at"].values()))) for p in run["points"]] if len(named) == 1 else labels

    def paint(axes: Axes, theme: Theme) -> None:
        for index, (engine, ratios) in enumerate(gains.items()):
            colour, marker = theme.series[index % len(theme.series)], MARKERS[index % len(MARKERS)]
            aside = 0.06 * (index - (len(gains) - 1) / 2)
            known = [(labels.index(label) + aside, ratio) for label, ratio in ratios if ratio]
            for place, ratio in known:
                if ratio["low"] is not None:
                    axes.plot([place, place], [ratio["low"], ratio["high"]], color=colour, lw=1.2, alpha=0.6)
            places, values = [place for place, _ in known], [ratio["value"] for _, ratio in known]
            axes.plot(places, values, f"{marker}-", ms=5, lw=0.9, color=colour, label=figures.shortened(engine, 30))
        axes.axhline(1, color=theme.ink, lw=1, ls=(0, (4, 3)))
        axes.set_xticks(range(len(names)), labels=[figures.shortened(name, 16) for name in names])
        axes.set(xlabel=", ".join(sorted(named)), ylabel="times as fast as plain decoding")
        figures.legend_below(axes, min(2, len(gains)))

    height = 3.0 + 0.2 * -(-len(gains) // 2)
    svg, png = figures.saved({theme.name: figures.painted(theme, height, paint) for theme in (LIGHT, DARK)})
    title = "What the fastest settings gain"
    caption = "At each point the setting that was found there, on prompts that chose nothing. Bars: 95% intervals."
    return [Drawn("gains", title, caption, f"{title}: {' '.join(_gains(run))}", "results", svg, png)]
