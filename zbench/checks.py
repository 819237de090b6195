"""What can be said of a scenario before anything is loaded: `zbench validate`, `run --dry-run` and `run` all ask here.

No weights are read and no model is downloaded (a data set of prompts is, by `--dry-run`). A model that is not on this
machine yet is no mistake: what depends on its shape is left for the run, which asks again once the model is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zbench import engines, paths, prompts, scenario
from zbench.errors import UserError
from zbench.models import families, zoo
from zbench.models.config import read_json
from zbench.models.shard import Shard
from zbench.records import CellRecord


def check(wanted: scenario.Scenario, allow_pickle: bool = True) -> tuple[str, ...]:
    """Hold every point of a scenario against its models, drafters and prompts; prompts of a hub data set are left out.

    Returns what is not known here yet, in words. Raises UserError for what `zbench run` would refuse.
    """
    unknown = []
    for at, cells in scenario.points(wanted):
        config = model_config(at.model_spec)
        if config is None:
            unknown.append(unseen(at))
        chosen = None if isinstance(at.prompts, scenario.PromptDataset) else prompts.load(at.prompts)
        check_point(at, cells, config, chosen, allow_pickle)
    return tuple(dict.fromkeys(unknown))


def check_point(
    at: scenario.Scenario,
    cells: Sequence[CellRecord],
    config: families.AnyConfig | None,
    chosen: Sequence[prompts.Prompt] | None,
    allow_pickle: bool = False,
    fetch: bool = False,
) -> None:
    """One point of the matrix; None is what is not known yet. `fetch` downloads drafters of the hub."""
    for cell in cells:
        if not engines.absent(cell.engine, cell.options, at.batch):  # else it is left out, whatever it asks for
            engines.check(cell.engine, cell.options, config, allow_pickle, fetch)
    if config is not None:
        Shard(0, at.parallel.tensor).check(config)
        # Without a context, how long prompts are is known once the model's tokenizer is there.
        check_room(at, config, (at.context or 1) + at.output_tokens, "" if at.context else "at least ")
    if chosen is None:
        return
    if at.accuracy.execute_generated_code and not any(prompt.problem for prompt in chosen):
        raise UserError("accuracy.execute_generated_code is set, but no prompt has tests to run code against")
    if len(chosen) < at.batch and (fetch or not at.hardware):  # what is projected feeds no prompts
        raise UserError(f"batch {at.batch} takes as many prompts, and there are {len(chosen)}")
    if (batches := -(-len(chosen) // at.batch)) % at.parallel.data:
        raise UserError(
            f"{batches} batches of prompts cannot be shared evenly by parallel.data {at.parallel.data}:"
            " give prompts another limit, or another batch"
        )
    prompts.warmup_prompts(at.warmup.prompts, measured=chosen)


def unseen(at: scenario.Scenario) -> str:
    """That a point's model is not here yet, and what brings it."""
    how = f"zbench models fetch {at.model}" if isinstance(at.model, str) else "zbench run downloads it"
    return f"the shape of {at.model_name}, which is not on this machine yet ({how})"


def check_room(at: scenario.Scenario, config: families.AnyConfig, needed: int, about: str = "") -> None:
    """Raises UserError where a model takes fewer tokens than a prompt and its output need."""
    if needed > config.max_positions:
        raise UserError(
            f"prompt and output need {about}{needed} tokens, {at.model_name} takes {config.max_positions}:"
            " shorten context, prompts or output_tokens"
        )


def model_config(spec: str | Mapping[str, Any]) -> families.AnyConfig | None:
    """The shape of a scenario's model; None while it is not on this machine. Raises UserError for an unknown name, or
    a folder that there is not."""
    if isinstance(spec, str):
        folder = zoo.path(spec)
    elif spec.get("config"):
        return families.from_fields(spec["config"])
    else:
        folder = paths.folder(spec["path"], "model") if spec.get("path") else None
    return families.from_hf(read_json(folder / "config.json")) if folder else None


def elsewhere(wanted: scenario.Scenario) -> str | None:
    """Why a scenario cannot be measured here, in one line; None where it can, or names no hardware."""
    if wanted.hardware is None:
        return None
    from zbench.hardware import device as devices
    from zbench.hardware import specs

    try:
        device = devices.resolve(wanted.device)
    except UserError:
        found = f"has no device {wanted.device}"
    else:
        spec = specs.of_device(device)
        if spec and spec.name == wanted.hardware:
            return None
        partition = spec is None and specs.lookup(device.name) is not None
        found = f"has {'a partition of ' * partition}{device.name}"
    return f"{wanted.name} is about {wanted.hardware}, this machine {found}: projected, nothing is measured"
