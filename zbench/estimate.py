"""What a scenario would measure, and the least it would take: `zbench run --dry-run`. Nothing is loaded or timed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zbench import engines, prompts, scenario
from zbench.models import families, zoo
from zbench.models.cost import forward_cost
from zbench.models.shard import Shard

CHARACTERS_PER_TOKEN = 4  # English text in a byte-pair vocabulary; only this estimate uses it
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Estimate:
    """One cell. None means unknown: the model's shape or the device's roofs are not on this machine yet."""

    cell: str
    trials: int
    tokens: int  # output tokens over all trials, if none ends early
    memory_bytes: float | None  # weights and KV cache, of the fullest device
    # Predicted floor: autoregressive traffic at the measured bandwidth; experts as uniform routing would hit them.
    seconds: float | None
    absent: str = ""  # why it would not be measured: what is not installed

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(wanted: scenario.Scenario) -> list[Estimate]:
    roofs = _cached_roofs(wanted)
    found = []
    for at, cells in scenario.points(wanted):
        chosen = prompts.load(at.prompts)
        trials = at.repeats * -(-len(chosen) // at.batch)
        config, itemsize = model_config(at.model_spec), ITEMSIZE[at.dtype]
        context = at.context or longest_prompt(chosen)
        memory = seconds = None
        if config is not None:
            memory = memory_bytes(config, at, context)
            if roofs is not None:
                contexts, shard = [context + at.output_tokens // 2] * at.batch, Shard(0, at.parallel.tensor)
                middle = forward_cost(config, 1, contexts, at.batch, itemsize, shard=shard)
                traffic = middle.bytes_read + middle.bytes_written
                seconds = trials / at.parallel.data * at.output_tokens * traffic / roofs["bandwidth"]["read"]["value"]
        tokens = at.repeats * len(chosen) * at.output_tokens
        for cell in cells:
            if absent := engines.missing(cell.engine):
                found.append(Estimate(cell.id, 0, 0, None, 0.0, absent))
                continue
            forwards = (
                len(cell.options["rows"]) if cell.engine == "forward" else 1
            )  # of each token, all of them at least this
            least = None if seconds is None else seconds * forwards
            found.append(Estimate(cell.id, trials, tokens, memory, least))
    return found


def table(cells: list[Estimate]) -> str:
    width = max(len(cell.cell) for cell in cells)
    lines = [f"{'cell':{width}}  trials   tokens   memory  time at least"]
    for cell in cells:
        if cell.absent:
            lines.append(f"{cell.cell:{width}}  {cell.absent}")
            continue
        memory = "unknown" if cell.memory_bytes is None else f"{cell.memory_bytes / 1e9:.2f} GB"
        time = "unknown" if cell.seconds is None else f"{cell.seconds:.0f} s"
        lines.append(f"{cell.cell:{width}}  {cell.trials:6}  {cell.tokens:7}  {memory:>7}  {time:>8}")
    known = [cell.seconds for cell in cells if cell.seconds is not None]
    if len(known) == len(cells):
        lines.append(f"predicted, all cells: at least {sum(known):.0f} s (weights and KV cache read once per token)")
    if any(cell.memory_bytes is None and not cell.absent for cell in cells):
        lines.append("unknown memory: the model is not on this machine yet (zbench models fetch NAME)")
    elif len(known) < len(cells):
        lines.append(
            "unknown time: this device's roofs are not measured yet (zbench roofs), or it is not here (zbench project)"
        )
    return "\n".join(lines)


def longest_prompt(chosen: Sequence[prompts.Prompt]) -> int:
    """Tokens of the longest of these prompts, by its characters."""
    return max(sum(map(len, prompt.turns[:1])) // CHARACTERS_PER_TOKEN for prompt in chosen)


def memory_bytes(config: families.AnyConfig, at: scenario.Scenario, context: int) -> float:
    """Weights of the target, and the cache of a batch at its fullest; on the fullest of several devices."""
    itemsize, shard = ITEMSIZE[at.dtype], Shard(0, at.parallel.tensor)
    full = forward_cost(config, 1, [context + at.output_tokens] * at.batch, at.batch, itemsize, shard=shard)
    return shard.parameters(config) * itemsize + full.kv_bytes


def model_config(spec: str | Mapping[str, Any]) -> families.AnyConfig | None:
    """The shape of a scenario's model; None while it is not on this machine."""
    if isinstance(spec, str):
        folder = zoo.path(spec)
    elif spec.get("config"):
        return families.from_fields(spec["config"])
    else:
        folder = Path(spec["path"]) if spec.get("path") else None
    file = folder / "config.json" if folder else None
    return families.from_hf(json.loads(file.read_text())) if file and file.is_file() else None


def _cached_roofs(wanted: scenario.Scenario) -> dict[str, Any] | None:
    from zbench.hardware import device, projection, roofs

    if projection.elsewhere(wanted):
        return None
    return roofs.cached(device.resolve(wanted.device))
