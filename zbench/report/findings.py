"""What a report says in words: numbers with fitting units, the answer, and everything a reader must be warned of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from zbench.metrics import (
    MIXED,
    NET_NEGATIVE,
    RANDOM_ADAPTER,
    RANDOM_DRAFTER,
    SYNTHETIC,
    Cell,
    MetricRow,
    Run,
    caveats,
    lossy,
)
from zbench.records import PEERS
from zbench.results import Point, Results, main_kind, point_label
from zbench.stats import DRIFT_BOUND, FEW

UTILISATION = ("mbu", "mfu", "mbu_spec", "mfu_spec")
DRIFTED = 0.15  # of the median, between the lowest and the highest read roof of a run: from here on it is said
SEEN = 1.0  # s of trials, below which ticks of 10 ms say little of what others took meanwhile
CONTENDED = 0.1  # of the cores that a run uses: daemons take less; from here on it is said that others took them
LOADED = 0.5  # the same of the load average, which also has what ended a minute ago
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of CPUs that multiply it
MOST = 6  # things that a sentence lists
_PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}
_PREFIXED = {"s", "s/token", "s/trial", "B", "B/s", "B/token", "FLOP/s", "FLOP/token"}
_PREFIXED |= {"FLOP", "W", "J/token", "J·s/token²", "Hz"}


def quantity(value: float, unit: str, digits: int = 0) -> str:
    """A value with its unit, scaled: `quantity(0.0089, "s")` is "8.90 ms". With at least so many significant digits."""
    scale, shown, usual = _scale(value, unit)
    return f"{_number(value / scale, max(digits, usual))}{shown}"


def interval(row: MetricRow) -> str:
    """The interval in the scale of the row's value, "60.1–62.0"; "" where there is none."""
    if row.low is None or row.high is None or not isinstance(row.value, float):
        return ""
    if math.isclose(row.low, row.high, rel_tol=1e-9):
        return "no spread"
    scale, shown, digits = _scale(row.value, row.unit)
    decimals = _decimals(row.value / scale, digits)
    return f"{row.low / scale:,.{decimals}f}–{row.high / scale:,.{decimals}f}{'%' if shown == '%' else ''}"


def answers(results: Results) -> list[tuple[str, list[str]]]:
    """(point, sentences) for every point of the matrix: how fast, against what, and what limits it."""
    if not any(cell.trials for cell in results.run.cells):
        return [("", [_nothing(results.run)])]
    return [(point.label, _answer(results, point)) for point in results.points]


def warnings(results: Results) -> list[str]:
    """Plain sentences on everything that makes the numbers less than they seem."""
    run = results.run
    found = [sentence[0].upper() + sentence[1:] + "." for sentence in run.warnings]
    if run.manifest.roofs is None:
        found.append("The roofs of this device were not measured, so no utilisation and no bound can be given.")
    found += _contended(run)
    found += _emulated(run)
    found += _read_roof(run)
    found += _eager(results)
    found += _unfinished(run)
    found += [sentence for cell in run.cells if (sentence := _trouble(cell, results))]
    found += _too_few(results)
    found += _ragged(run)
    found += [sentence for cell in run.cells if (sentence := _other_tokens(cell, results))]
    found += [sentence for cell in run.cells if (sentence := _lossy(cell, results))]
    found += _untrained(run)
    found += [speculation(cell, results) for cell in run.cells if net_negative(cell, results) or _mixed(cell, results)]
    labels = {cell.record.id: name(cell) for cell in run.cells}
    wrong = [row for row in results.rows if row.status == "error" and row.metric != "failed_trials"]
    found += _over_roofs([row for row in wrong if row.metric in UTILISATION], labels, run)
    found += _drifted(results, labels)
    others = {*UTILISATION, "steady_state_slope"}
    found += [f"{labels[row.cell]}: {row.note}." for row in wrong if row.metric not in others]
    hashes = (row for row in results.rows if row.metric == "output_hash" and row.note and row.value)
    found += [f"{labels[row.cell]}: {row.note}." for row in hashes]
    return list(dict.fromkeys(found))


def _ragged(run: Run) -> list[str]:
    """Batches that were not filled, whose sequences share the machine with fewer others."""
    found = []
    for cell in run.cells:
        sizes = {len(trial.requests) for trial in cell.trials}
        if len(sizes) > 1 and cell.record.batch in sizes:
            rest = listed([str(size) for size in sorted(sizes - {cell.record.batch})])
            found.append(
                f"The prompts do not fill the last batch of {cell.record.batch}, which has {rest}: rates per sequence"
                " are of both sizes. A limit of prompts that is a multiple of the batch avoids it."
            )
    return list(dict.fromkeys(found))


def _emulated(run: Run) -> list[str]:
    """Engines that run torch's operators in bfloat16 on a CPU without instructions for it; the native decoder widens
    what it reads and loses little."""
    flags = run.manifest.environment.get("cpu", {}).get("flags")
    if not _on_cpu(run) or not isinstance(flags, list) or BFLOAT16_FLAGS & set(flags):
        return []
    slowed = [
        name(cell)
        for cell in run.cells
        if cell.record.dtype == "bfloat16"
        and any((trial.kernels or {}).get("forward", "").startswith(("torch", "transformers")) for trial in cell.trials)
    ]
    if not slowed:
        return []
    return [
        f"This CPU has no instructions for products in bfloat16, which torch then emulates: {listed(slowed)} may take"
        " several times as long over many rows as in float32."
    ]


def _contended(run: Run) -> list[str]:
    """Where the run had to share its CPU cores: what it waited for them looks like overhead."""
    told = run.manifest.environment
    cores, threads = told.get("cpu", {}).get("usable_threads"), told.get("torch", {}).get("threads")
    if not isinstance(cores, int) or not isinstance(threads, int):
        return []
    if not _on_cpu(run):
        threads = 1  # the host only starts what the device does
    found = []
    if threads > cores:
        found.append(
            f"{threads} CPU threads took turns, as this process may run {cores} at once: times are longer and less"
            " steady than with as many threads as that."
        )
    needed = min(threads, cores)
    seen = [trial for trial in run.trials if trial.others_seconds is not None]
    seconds, load = sum(trial.wall_seconds for trial in seen), told["cpu"].get("load_average")
    if seconds >= SEEN:
        others = sum(trial.others_seconds or 0.0 for trial in seen) / seconds
        if others > cores - needed + CONTENDED * needed:
            found.append(
                f"Other processes kept {others:.1f} of the {cores} CPU cores busy during the trials, of which this run"
                f" uses {needed}: times are those of a loaded machine, and waiting for a core looks like overhead."
            )
    elif isinstance(load, list) and load[0] > cores - needed + LOADED * needed:
        found.append(
            f"The load average was {load[0]:.1f} on {cores} CPU cores when the run began: if that was other work "
            "and went on, it slowed this run, and waiting for a core looks like overhead."
        )
    return found


def waiting(results: Results) -> str:
    """What else than overhead may look like it on a CPU, which nothing here can tell apart."""
    return "; other work on the cores would look the same" if _on_cpu(results.run) else ""


def _on_cpu(run: Run) -> bool:
    return bool(run.manifest.environment.get("device", {}).get("backend") == "cpu")


def _read_roof(run: Run) -> list[str]:
    """Where shares of the read bandwidth are less sure than their intervals say, which know nothing of the roof's."""
    read = run.read_roof
    if not run.roof_samples or read is None:
        return []
    if not read.get("sampled"):
        why = run.roof_samples[0].unavailable
        return [f"The read bandwidth could not be measured beside the run ({why}): shares are of that measured before."]
    if read["high"] - read["low"] <= DRIFTED * read["value"]:
        return []
    low, high, median = (quantity(read[key], "B/s") for key in ("low", "high", "value"))
    return [
        f"The read bandwidth of this device ranged from {low} to {high} beside the run ({read['n']} samples): shares"
        f" are of their median, {median}, and no surer than that."
    ]


def _eager(results: Results) -> list[str]:
    """Engines on a GPU that take far longer than their floor, maybe for the host, which a graph would spare them."""
    if _on_cpu(results.run):
        return []
    mine = [
        cell
        for cell in results.run.cells
        if cell.record.engine not in PEERS
        and any((trial.kernels or {}).get("forward") == "torch" for trial in cell.trials)
        and results.row(cell, "bound", main_kind(cell)).value == "overhead"
    ]
    if not mine:
        return []
    kernels = [trial.kernels or {} for cell in mine for trial in cell.trials]
    reason = next((each["why_no_graphs"] for each in kernels if "why_no_graphs" in each), None)
    return [
        f"{listed([name(cell) for cell in mine])} ran eagerly and {'is' if len(mine) == 1 else 'are'} overhead-bound:"
        " forwards may wait for the host to launch them. "
        + (f"No graph could be recorded ({reason})." if reason else "Execution: auto or graph would tell.")
    ]


def _over_roofs(rows: Sequence[MetricRow], labels: Mapping[str, str], run: Run) -> list[str]:
    """One sentence for each roof that forwards surpass, however many they are."""
    found = []
    for metric in UTILISATION:
        if mine := [row for row in rows if row.metric == metric]:
            worst = max(mine, key=lambda row: float(row.value or 0))
            kinds = "kind of forward is" if len(mine) == 2 else "kinds of forward are"
            others = f", and {len(mine) - 1} other {kinds} over it too" if len(mine) > 1 else ""
            of_run = metric == "mbu" and (run.read_roof or {}).get("sampled")
            again = "; measure the roofs again on an idle machine (zbench roofs --refresh)"
            found.append(
                f"{labels[worst.cell]}, {worst.part}: {worst.note}{others}"
                f"{'' if of_run or 'spec' in metric else again}."
            )
    return found


def _drifted(results: Results, labels: Mapping[str, str]) -> list[str]:
    """One sentence, since what drifts is most often the machine, under all engines alike: so it names those too that
    seem to drift, though their interval does not show it."""
    known = [row for row in results.rows if row.metric == "steady_state_slope" and isinstance(row.value, float)]
    moved = [row for row in known if row.status == "error"]
    unsure = [row for row in known if row not in moved and abs(float(row.value or 0)) > DRIFT_BOUND]
    if len(moved) + len(unsure) < 2 or not moved:
        return [f"{labels[row.cell]}: {row.note}." for row in moved]
    said = listed([f"{labels[row.cell]} ({float(row.value or 0):+.0%})" for row in moved])
    spread = [f"{labels[row.cell]} ({row.low:+.0%} to {row.high:+.0%})" for row in unsure if row.low is not None]
    beside = f"; not shown for {listed(spread)}" if spread else ""
    return [
        "Not a steady state: by a linear trend step time moved from the first trial to the last, beyond"
        f" {DRIFT_BOUND:.0%}, of {said}{beside}. Speeds and speedups are means over all of it."
    ]


def name(cell: Cell) -> str:
    """The engine's label, with its point of the matrix where there is one."""
    label = point_label(cell.record)
    return f"{cell.record.label} ({label})" if label else cell.record.label


def title(cell: Cell) -> str:
    """The engine's label, with what its acceptance is not: "eagle3 with synthetic acceptance"."""
    known = caveats(cell.record)
    words = SYNTHETIC if SYNTHETIC in known else f"a {' and a '.join(known)}"
    return f"{cell.record.label} with {words}" if known else cell.record.label


def net_negative(cell: Cell, results: Results) -> bool:
    """Whether a step surely gains less than it costs."""
    return results.row(cell, "break_even_acceptance").note == NET_NEGATIVE


def _mixed(cell: Cell, results: Results) -> bool:
    return results.row(cell, "break_even_acceptance").note == MIXED


def speculation(cell: Cell, results: Results) -> str:
    """What a step gains, what it must gain to pay, and what that makes of the speed; "" where nothing is drafted."""
    gained = results.value(cell, "acceptance_length", "micro")
    if gained is not None and not cell.always_drafts:  # steps without drafts count too
        gained = results.value(cell, "tokens_per_forward")
    needed = results.value(cell, "break_even_acceptance")
    if gained is None:
        return ""
    if needed is None:
        reason = results.row(cell, "break_even_acceptance").note.removeprefix("unavailable: ")
        return f"{title(cell)} gains {gained:.2f} tokens per step; whether that pays is not known: {reason}."
    if net_negative(cell, results):
        return (
            f"{title(cell)} is net-negative{_at(cell)}: it gains {gained:.2f} tokens per step and needs {needed:.2f} "
            "to break even."
        )
    sentence = f"{title(cell)} gains {gained:.2f} tokens per step and breaks even at {needed:.2f}"
    row = results.row(cell, "speedup")
    if not isinstance(row.value, float) or cell.baseline is None:
        return f"{sentence}."
    speed, theirs = quantity(row.value, row.unit), cell.baseline.record.label
    if row.low is not None and row.high is not None and row.low <= 1 <= row.high:
        return f"{sentence}: no difference from {theirs} is shown ({speed}, {interval(row)}{_shows(results, cell)})."
    if row.low is not None and row.low > 1 and gained < needed:
        least, most = _gains(cell)
        return (
            f"{title(cell)} is {speed} as fast as {theirs} prompt by prompt{_at(cell)} ({interval(row)}) and"
            f" {_in_all(cell):.2f}× in total time, as the prompts differ: over all of them it gains {gained:.2f} tokens"
            f" per step and breaks even at {needed:.2f}, on single ones it gains {least:.2f} to {most:.2f}."
        )
    around = interval(row) or _no_interval(cell, row)
    return f"{sentence}: {speed} as fast as {theirs} ({around})."


def _gains(cell: Cell) -> tuple[float, float]:
    """The fewest and the most tokens that a step gains, of the prompts (or batches)."""
    sums = cell.decode_steps.groupby("group")[["committed", "live"]].sum()
    gains = sums["committed"] / sums["live"]
    return float(gains.min()), float(gains.max())


def _in_all(cell: Cell) -> float:
    """How many times as fast as the baseline all prompts together are, per token where the outputs differ."""
    pairs = cell.timed_pairs
    theirs = pairs["decode_seconds_baseline"].sum() / pairs["later_baseline"].sum()
    return float(theirs / (pairs["decode_seconds"].sum() / pairs["later"].sum()))


def clusters(cell: Cell, n: int) -> str:
    """ "6 prompts"; a batch's prompts share their steps, so beyond batch 1 the batches are what counts."""
    what = "prompt" if cell.record.batch == 1 else "batch"
    return f"{n} {what}{'' if n == 1 else 'es' if what == 'batch' else 's'}"


def limit(results: Results, cell: Cell, kind: str) -> str:
    """ "memory-bound: 84% of the measured read bandwidth", or why that is not known."""
    bound = results.row(cell, "bound", kind)
    if bound.value == "overhead":
        measured, floor = (results.value(cell, metric, kind) for metric in ("forward_seconds", "floor_seconds"))
        launches = results.value(cell, "launches_per_forward", kind)
        starts = f", with {launches:.0f} launches" if launches else ""
        times = (measured or 0) / (floor or 1)
        alone = f"{times:.1f}× the time that memory or arithmetic alone would need{starts}"
        return f"overhead-bound: {alone}{waiting(results)}"
    if bound.value == "communication":
        talking = results.value(cell, "communication_share", kind) or 0
        return f"communication-bound: {quantity(talking, '1')} of it is spent in collectives"
    if bound.value is None:
        return f"not classified ({bound.note.removeprefix('unavailable: ')})"
    metric, roof = ("mbu", "read bandwidth") if bound.value == "memory" else ("mfu", f"{cell.record.dtype} rate")
    row = results.row(cell, metric, kind)
    value = float(row.value or 0)
    share = quantity(value, row.unit)
    if value > 1:
        return f"{bound.value}-bound as far as can be told: {_above(results, row, share, roof)}"
    cached = f" ({row.note})" if metric == "mbu" and row.note else ""
    return f"{bound.value}-bound: {share} of the measured {roof}{cached}"


def _above(results: Results, row: MetricRow, share: str, roof: str) -> str:
    """What a share of more than all of a roof may come from: it is no plain result."""
    read, memory = results.run.read_roof or {}, row.metric == "mbu"
    if row.status == "error":
        return f"{share} of the measured {roof}, so that the roof or the count is wrong"
    why = "memory changed its speed between the two, or caches served part of it" if memory else "the clock changed"
    if not memory or not read.get("sampled"):
        return f"{share} of the {roof} that was measured before the run, so that {why}"
    median, most = (quantity(read[key], "B/s") for key in ("value", "high"))
    return f"it ran at {share} of the {roof} measured beside it ({median}; highest sample {most}), so that {why}"


def _answer(results: Results, point: Point) -> list[str]:
    measured = [cell for cell in point.cells if results.value(cell, "decode_tps") is not None]
    if not measured:
        return ["No engine gave a decode speed here."]
    baseline = next((cell for cell in point.cells if cell.record.baseline), None)
    first = next((cell for cell in measured if cell is baseline), measured[0])
    others = [cell for cell in measured if cell is not baseline and results.value(cell, "speedup") is not None]
    sentences = [_speed(results, first)]
    if baseline is not None and first is not baseline:
        reason = results.row(baseline, "decode_tps").note.removeprefix("unavailable: ")
        sentences.append(f"{title(baseline)}, the baseline, has no decode speed here: {reason}.")
    sentences += _comparisons(results, baseline, first, others)
    sentences += _unpaired(results, [cell for cell in measured if cell is not first])
    fastest = max(measured, key=lambda cell: results.value(cell, "decode_tps") or 0)
    for cell in [first] if fastest is first else [first, fastest]:
        if kind := main_kind(cell):
            owner = "Its" if len(sentences) == 1 else f"{cell.record.label}’s"
            role, _, rows = kind.partition(", ")
            each = " per sequence" if rows and cell.record.batch > 1 else ""
            sentences.append(f"{owner} {role} forward ({rows}{each}) is {limit(results, cell, kind)}.")
    return sentences


def _speed(results: Results, cell: Cell) -> str:
    return f"{_decodes(results, cell)}."


def _decodes(results: Results, cell: Cell) -> str:
    row = results.row(cell, "decode_tps")
    evidence = f"95% interval {interval(row)}, {clusters(cell, row.n)}" if interval(row) else _no_interval(cell, row)
    speed = quantity(float(row.value or 0), row.unit)
    return f"{title(cell)} decodes {speed} per sequence ({evidence})"


def _unpaired(results: Results, cells: Sequence[Cell]) -> list[str]:
    """Engines that have a speed and no pair with the baseline: how fast they are, and why nothing more is known."""
    reasons: dict[str, list[Cell]] = {}
    for cell in cells:
        row = results.row(cell, "speedup")
        if row.value is None:
            reasons.setdefault(row.note.removeprefix("unavailable: "), []).append(cell)
    found = []
    for reason, mine in reasons.items():
        ranked = sorted(mine, key=lambda cell: -(results.value(cell, "decode_tps") or 0)) if len(mine) > MOST else mine
        found.append(f"{listed(_decodes(results, cell) for cell in ranked)}: not compared, as {reason}.")
    return found


def _comparisons(results: Results, baseline: Cell | None, first: Cell, others: list[Cell]) -> list[str]:
    """Pairs are reported from the side that wins; an interval that holds 1 shows no difference. `first` is the engine
    that was named before: where it is not the baseline, the baseline is named here."""
    if baseline is None:
        return []
    slower, faster, alike = [], [], []
    rows = [(cell, results.row(cell, "speedup")) for cell in others]
    without = {_no_interval(cell, row) for cell, row in rows}
    none = all(row.low is None for _, row in rows)
    once = next(iter(without)) if none and len(without) == 1 < len(others) else ""  # said of all at the end
    if len(others) > MOST:  # the nearest, and the fastest, are what is worth reading
        others = sorted(others, key=lambda cell: -float(results.row(cell, "speedup").value or 0))
    for cell in others:
        row = results.row(cell, "speedup")
        value, low, high = float(row.value or 0), row.low, row.high
        if low is not None and high is not None and low <= 1 <= high:
            alike.append(f"{title(cell)} ({value:.2f}×, {low:.2f}–{high:.2f}{_shows(results, cell)})")
        elif value < 1:
            around = f"{1 / high:.2f}–{1 / low:.2f}" if low and high else _no_interval(cell, row)
            slower.append(f"{1 / value:.2f}× {title(cell)}" + f" ({around})" * (around != once))
        else:
            around = f"{low:.2f}–{high:.2f}" if low and high else _no_interval(cell, row)
            faster.append(f"{title(cell)} is {value:.2f}× as fast" + f" ({around})" * (around != once))
    sentences, paired = [], f", paired by prompt{f' ({once})' if once else ''}."
    if slower:
        that = "That" if first is baseline else f"The speed of {title(baseline)}"
        sentences.append(f"{that} is {listed(slower)}{paired}")
    if faster:
        than = "" if first is baseline else f" as {title(baseline)}"
        sentences.append(f"{listed(faster)}{than}{paired}")
    if alike:
        sentences.append(f"No difference from {title(baseline)} is shown for {listed(alike)}.")
    return sentences


def _shows(results: Results, cell: Cell) -> str:
    """How small a difference from the baseline the pairs would have shown; "" where that is not known."""
    least = results.row(cell, "minimal_detectable_effect")
    if not isinstance(least.value, float):
        return ""
    return f"; pairs that differ as these do would only show {quantity(1 + least.value, 'ratio')} or more"


def _no_interval(cell: Cell, row: MetricRow) -> str:
    return f"{clusters(cell, row.n)}: too few for an interval"


def _nothing(run: Run) -> str:
    failed = [trial for cell in run.cells for trial in cell.failed]
    if not failed:
        return "Nothing was measured: no trial has ended yet."
    error = (failed[0].error or "no message").strip().splitlines()[0]
    return f"Nothing was measured: all {len(failed)} trials failed. First error: {error}"


def _unfinished(run: Run) -> list[str]:
    """How many planned trials have ended, in success or failure, where that is not all."""
    planned = run.manifest.planned
    ended, wanted = sum(trial.cell in planned for trial in run.trials), sum(planned.values())
    if ended >= wanted:
        return []
    return [f"{ended} of {wanted} planned trials have ended: the run was stopped or cut off, or still goes on."]


def _trouble(cell: Cell, results: Results) -> str:
    failed, total = len(cell.failed), len(cell.failed) + len(cell.trials)
    if not total and cell.record.absent:
        return f"{name(cell)} was not measured: {cell.record.absent}."
    if not total:
        return f"{name(cell)} was planned but not run: the run is incomplete."
    if not failed:
        return ""
    first = results.row(cell, "failed_trials").note
    return f"{failed} of {total} trials of {name(cell)} failed and are left out; {first}."


def _too_few(results: Results) -> list[str]:
    few: dict[str, list[str]] = {}
    for cell in results.run.cells:
        if cell.trials and (n := results.row(cell, "ttft").n) < FEW:
            few.setdefault(clusters(cell, n), []).append(name(cell))
    return [f"{count} for {listed(cells)}: too few for an interval, which takes {FEW}." for count, cells in few.items()]


def _other_tokens(cell: Cell, results: Results) -> str:
    """Tokens that are not the target's; or, where the target was not asked or agrees, not the baseline's."""
    own, same = results.row(cell, "lossless"), results.row(cell, "agreement", "prompts")
    if isinstance(own.value, float) and own.value < 1:
        return (
            f"The target itself picks every token of {name(cell)} on {quantity(own.value, '1')} of the prompts only; "
            f"{_reason(own)}."
        )
    if not isinstance(same.value, float) or same.value == 1 or lossy(cell.record):
        return ""
    theirs = cell.baseline.record.label if cell.baseline else "the baseline"
    reason = f" ({why})" if (why := _reason(same)) else ""
    return (
        f"{name(cell)} emitted the same tokens as {theirs} on {quantity(same.value, '1')} of the prompts only{reason}."
    )


def _reason(row: MetricRow) -> str:
    """The note without the number of prompts, which is said once for all."""
    return "; ".join(part for part in row.note.split("; ") if part and not part.startswith("too few"))


def _untrained(run: Run) -> list[str]:
    """One sentence each on acceptance that was drawn, and on drafters with random weights."""
    having = {
        caveat: list(dict.fromkeys(c.record.label for c in run.cells if caveat in caveats(c.record)))
        for caveat in (SYNTHETIC, RANDOM_DRAFTER, RANDOM_ADAPTER)
    }
    found = []
    if drawn := having[SYNTHETIC]:
        found.append(
            f"Synthetic acceptance in {listed(drawn)}: the cost of a step is measured, but how many drafts it accepts "
            "is drawn as the scenario says, so every speed here is that of a drafter that would accept as many."
        )
    if random := having[RANDOM_DRAFTER]:
        found.append(f"Random drafter in {listed(random)}: its cost is real, its drafts are noise.")
    if adapted := having[RANDOM_ADAPTER]:
        found.append(f"Random mask adapter in {listed(adapted)}: its cost is real, its drafts are noise.")
    return found


def _lossy(cell: Cell, results: Results) -> str:
    """What a sampler that changes the output did to it; "" where none does."""
    if not lossy(cell.record) or not cell.trials:
        return ""
    said = []
    tokens = results.row(cell, "agreement", "tokens")
    if isinstance(tokens.value, float) and cell.baseline is not None:
        same = quantity(tokens.value, "1")
        said.append(f"{same} of its tokens are {cell.baseline.record.label}’s up to the first difference")
    every = " in every repeat" if cell.requests["repeat"].nunique() > 1 else ""
    for metric, share, theirs in (
        ("accuracy", f"on {{}} of the prompts its answer is right{every}", "on {} {}’s"),
        ("pass_at_1", "{} of its programs pass their tests", "{} of {}’s"),
    ):
        right = results.row(cell, metric)
        if not isinstance(right.value, float):
            continue
        around = f" ({interval(right)})" if interval(right) else ""
        other = results.value(cell.baseline, metric) if cell.baseline else None
        beside = (
            ""
            if other is None or cell.baseline is None
            else f", {theirs.format(quantity(other, '1'), cell.baseline.record.label)}"
        )
        said.append(f"{share.format(quantity(right.value, '1'))}{around}{beside}")
    if not said:
        rows = (results.row(cell, metric) for metric in ("accuracy", "pass_at_1"))
        reasons = dict.fromkeys(row.note.removeprefix("unavailable: ") for row in rows)
        said.append(f"how good it is was not measured ({'; '.join(reasons)})")
    return f"{name(cell)} is lossy, its speed buys another output: {'; '.join(said)}."


def _at(cell: Cell) -> str:
    label = point_label(cell.record)
    return f" at {label}" if label else " here"


def listed(words: Iterable[str]) -> str:
    """Nobody reads a list of twenty: beyond `MOST` the tables have the rest."""
    shown = list(words)
    if len(shown) > MOST:
        shown = [*shown[: MOST - 1], f"{len(shown) - MOST + 1} more"]
    *most, last = shown
    comma = "; " if any("," in word for word in shown) else ", "  # as labels like "block 4, proposals 2" have them
    return f"{comma.join(most)}{comma if comma == '; ' else ' '}and {last}" if most else last


def _scale(value: float, unit: str) -> tuple[float, str, int]:
    """(divisor, unit as shown, significant digits)."""
    if unit == "1":
        return 0.01, "%", _percent_digits(100 * value)
    if unit == "ratio":
        return 1.0, "×", 3
    if unit not in _PREFIXED or value == 0:
        return 1.0, f" {unit}" if unit else "", 3
    # A value that would round up to 1000 takes the next prefix.
    power = math.floor(math.log10(abs(value) * 1.0005) / 3) * 3
    power = min(max(power, min(_PREFIXES)), 0 if unit.startswith("s") else max(_PREFIXES))
    return 10.0**power, f" {_PREFIXES[power]}{unit}", 3


def _percent_digits(percent: float) -> int:
    """Three significant ones, in a share of counts such as 4 of 5 no more than it has, and one more where the next
    would make a whole of what is just short of it."""
    if math.isclose(percent, round(percent), rel_tol=1e-9):
        return len(str(abs(round(percent))))
    return 4 if 99.95 <= percent < 100 else 3


def _number(value: float, digits: int) -> str:
    return f"{value:,.{_decimals(value, digits)}f}"


def _decimals(value: float, digits: int) -> int:
    return 0 if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value) * (1 + 0.5 * 10**-digits))))
