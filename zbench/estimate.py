"""What a scenario would measure, and the least it would take: `zbench run --dry-run`. Nothing is loaded or timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zbench import checks, engines, projection, prompts, scenario
from zbench.engines import plans
from zbench.errors import UserError
from zbench.hardware import peaks, specs
from zbench.models import families
from zbench.models.cost import forward_cost
from zbench.models.shard import Shard
from zbench.records import CellRecord


@dataclass(frozen=True, slots=True)
class Estimate:
    """One cell. None where `unknown` says why."""

    cell: str
    trials: int
    tokens: int  # output tokens over all trials, if none ends early
    memory_bytes: float | None  # weights and KV cache, of the fullest device
    # Predicted floor, if no output ends early: prefill and steps at the roofs of `device`, every draft accepted unless
    # acceptance is synthetic.
    seconds: float | None
    device: str  # whose roofs, and where they are from
    device_bytes: int | None  # its memory
    absent: str = ""  # why it would not be measured
    unknown: str = ""  # why there is no time, and perhaps no memory

    @property
    def fits(self) -> bool | None:
        known = self.memory_bytes is not None and self.device_bytes is not None
        return self.memory_bytes <= self.device_bytes if known else None  # type: ignore[operator]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fits": self.fits}


@dataclass(frozen=True, slots=True)
class Basis:
    """Whose roofs an estimate takes."""

    device: str  # in words, with where the roofs are from
    peaks: peaks.Peaks | None  # None: not known, for which `unknown` says why
    memory_bytes: int | None
    unknown: str = ""


def estimate(wanted: scenario.Scenario, allow_pickle: bool = True) -> list[Estimate]:
    """Every cell of a scenario at the roofs of `basis`. No model is built, no GPU is needed. Raises UserError for what
    `zbench run` would refuse."""
    checks.check(wanted, allow_pickle)
    on = basis(wanted)
    found = []
    for at, cells in scenario.points(wanted):
        chosen = prompts.load(at.prompts)
        lengths = [at.context or _fewest_tokens(prompt) for prompt in chosen]
        batches = Counter(tuple(lengths[i : i + at.batch]) for i in range(0, len(lengths), at.batch))
        trials = at.repeats * batches.total()
        config = checks.model_config(at.model_spec)
        context = at.context or projection.longest_prompt(chosen)
        memory = None if config is None else projection.memory_bytes(config, at, context)
        for cell in cells:
            if absent := engines.absent(cell.engine, cell.options, at.batch):
                found.append(Estimate(cell.id, 0, 0, None, 0.0, on.device, on.memory_bytes, absent))
                continue
            seconds, unknown = None, checks.unseen(at) if config is None else on.unknown
            if config is not None and on.peaks is not None:
                try:
                    each = ((_trial_seconds(at, cell, config, batch, on.peaks), n) for batch, n in batches.items())
                    seconds = sum(trial * n for trial, n in each) * at.repeats / at.parallel.data
                except UserError as error:
                    unknown = str(error)
            tokens = at.repeats * len(chosen) * at.output_tokens
            found.append(
                Estimate(cell.id, trials, tokens, memory, seconds, on.device, on.memory_bytes, unknown=unknown)
            )
    return found


def basis(wanted: scenario.Scenario) -> Basis:
    """This machine's roofs where they were measured, else the spec sheet of the scenario's hardware or of the GPU that
    is here. Nobody else's: a time at the roofs of another device would say nothing of this one."""
    from zbench.hardware import device as devices

    if checks.elsewhere(wanted):
        assert wanted.hardware is not None
        paper = peaks.on_paper(wanted.hardware)
        return Basis(f"{wanted.hardware}, which the scenario is about (spec sheet)", paper, paper.memory_bytes)
    try:
        device = devices.resolve(wanted.device)
    except UserError as error:
        return Basis(f"{wanted.device}, which this machine has not", None, None, str(error))
    memory, here = device.memory_bytes(), f"{device.name}, this machine’s"
    try:
        return Basis(f"{here} (measured roofs)", peaks.measured_here(wanted.device, wanted.threads), memory)
    except UserError:
        if spec := specs.of_device(device):
            said = f"{here} (spec sheet; zbench roofs measures it)"
            return Basis(said, peaks.on_paper(spec.name), spec.memory_bytes)
    threads = f" --threads {wanted.threads}" if wanted.threads else ""
    command = f"zbench roofs --device {wanted.device} --dtype {wanted.dtype}{threads}"
    return Basis(here, None, memory, f"the roofs of {device.name} were not measured; {command} measures them")


def _fewest_tokens(prompt: prompts.Prompt) -> int:
    """No tokenizer is loaded, and none makes one token of several words."""
    return max(len(prompt.text.split()), 1)


def _trial_seconds(
    at: scenario.Scenario, cell: CellRecord, config: families.AnyConfig, lengths: Sequence[int], given: peaks.Peaks
) -> float:
    """The least that a batch of prompts of these lengths takes: its prefill, padded to the longest, and as many steps
    as its output needs.

    Raises UserError where that is not known."""
    given.check(at.dtype)
    plan = plans.plan(cell.engine, cell.options, config, len(lengths))
    itemsize, shard, longest = projection.ITEMSIZE[at.dtype], Shard(0, at.parallel.tensor), max(lengths)
    steps = [(plan, projection.tokens_per_step(cell, plan) or 1.0 + plan.drafts)]
    if found := plans.looked_up(cell.engine, cell.options, config):
        steps.append((found, 1.0 + found.drafts))

    def per_token(step: plans.Plan, gained: float) -> float:
        # At the mean context of all steps; a step's time bends upwards with context, so that this is no more than
        # their mean. Where a sliding window bends it downwards, at the first one's.
        grown = 0 if config.windows else max(int(at.output_tokens - 1 - gained), 0) // 2
        where = projection.Where(config, [length + grown for length in lengths], at.dtype, given, shard)
        return sum(map(where.seconds, step.forwards)) / gained

    prefill, most = 0.0, longest if cell.engine == "reference" else plans.PREFILL_ROWS
    for start in range(0, longest, most):
        rows = min(most, longest - start)
        wanted = len(lengths) if any(start < length <= start + rows for length in lengths) else 0
        contexts = [min(start, length) for length in lengths]
        cost = forward_cost(config, rows, contexts, wanted, itemsize, shard=shard)
        prefill += given.seconds(cost, at.dtype)
    return prefill + (at.output_tokens - 1) * min(per_token(*step) for step in steps)


def table(cells: list[Estimate]) -> str:
    width = max(len(cell.cell) for cell in cells)
    lines = [f"{'cell':{width}}  trials   tokens   memory  time at least   (memory: weights and cache of the target)"]
    for cell in cells:
        if cell.absent:
            lines.append(f"{cell.cell:{width}}  {cell.absent}")
            continue
        memory = "unknown" if cell.memory_bytes is None else f"{cell.memory_bytes / 1e9:.2f} GB"
        time = "unknown" if cell.seconds is None else duration(cell.seconds)
        lines.append(f"{cell.cell:{width}}  {cell.trials:6}  {cell.tokens:7}  {memory:>7}  {time:>8}")
    device, known = cells[0].device, [cell.seconds for cell in cells if cell.seconds is not None]
    lines.append(f"device: {device}")
    if known:
        some = "all cells" if len(known) == len(cells) else f"{len(known)} of {len(cells)} cells"
        lines.append(
            f"predicted, {some}: at least {duration(sum(known))} (prefill and decode at these roofs; a token for each"
            " word of a prompt, outputs of full length; no overhead, no warm-up, no checks; every draft accepted where"
            " acceptance is not synthetic)"
        )
    if too_large := [cell for cell in cells if cell.fits is False]:
        most = max(cell.memory_bytes or 0 for cell in too_large)
        lines.append(
            f"{len(too_large)} of {len(cells)} cells do not fit: {most / 1e9:.0f} GB for weights and cache, the device"
            f" has {(too_large[0].device_bytes or 0) / 1e9:.0f} GB"
        )
    lines += [f"unknown: {why}" for why in dict.fromkeys(cell.unknown for cell in cells) if why]
    lines.append("on another device: zbench project SCENARIO --device NAME")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """40 ms, 1.4 s, 3 min, 2.5 h."""
    if seconds < 0.1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
