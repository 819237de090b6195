"""Predicted step time of every engine of a scenario on a device that need not be here. Nothing is loaded or timed.

A forward takes as long as the slower of its memory traffic and its arithmetic:

    t = max(bytes / (memory_fraction x bandwidth), FLOPs / (compute_fraction x rate))

with bytes and FLOPs of `models/cost.py` and the peaks of a spec sheet or the measured roofs of this machine. A step is
the sum of its forwards (`engines/plans.py`). Everything of this module is a prediction, and its fields say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import zbench
from zbench import checks, prompts, scenario
from zbench.engines import plans, synthetic
from zbench.errors import UserError
from zbench.hardware.peaks import SLACK, Peaks
from zbench.models.cost import Cost, forward_cost
from zbench.models.families import AnyConfig
from zbench.models.shard import WHOLE, Shard
from zbench.models.zaya_config import ZayaConfig
from zbench.records import PROJECTION_VERSION, CellRecord

HERE = "here"  # the name under which `zbench project` takes this machine's measured roofs
NO_STEP = "unavailable: its forwards are timed one by one, they make no step"
NO_ACCEPTANCE = "unavailable: no synthetic acceptance given"
CHARACTERS_PER_TOKEN = 4  # English text in a byte-pair vocabulary; only predictions use it
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_MOST_ROWS = 2**24

Bound = Literal["memory", "compute"]


@dataclass(frozen=True, slots=True)
class ForwardTime:
    """One forward of a step; rows, pairs and logit rows are counted per sequence, the rest for the whole batch."""

    model: str
    role: str
    rows: int
    pairs: int
    logit_rows: int
    flops: float
    bytes_read: float
    bytes_written: float
    predicted_memory_seconds: float
    predicted_compute_seconds: float
    predicted_seconds: float
    predicted_bound: Bound
    collective_bytes: float = 0.0  # that one device sends; they take no time here


@dataclass(frozen=True, slots=True)
class EngineStep:
    """One engine's decode step at one point. None where `unavailable` says why."""

    cell: str
    label: str
    engine: str
    forwards: tuple[ForwardTime, ...] = ()
    predicted_step_seconds: float | None = None
    predicted_ratio: float | None = None  # to an autoregressive step: the acceptance length that breaks even
    acceptance: str | None = None  # what was asked for, in words: "synthetic (length 3.2)"
    predicted_tokens_per_step: float | None = None
    predicted_tokens_per_second: float | None = None  # of one sequence
    predicted_throughput: float | None = None  # tokens/s of the whole batch, and of all replicas
    predicted_speedup: float | None = None  # over an autoregressive step
    unavailable: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Proposals:
    """TiDAR with this many proposed blocks. The last fields need an acceptance of known distribution."""

    proposals: int
    rows: int
    predicted_step_seconds: float
    predicted_ratio: float  # to an autoregressive step
    within_slack: bool  # at most SLACK autoregressive steps
    predicted_coverage: float | None  # steps with a whole block of drafts whose outcome has a block
    predicted_tokens_per_step: float | None
    predicted_tokens_per_second: float | None


@dataclass(frozen=True, slots=True)
class BlockCount:
    """How many blocks are worth proposing: one row for each number of proposals from none (which decodes
    autoregressively) to all outcomes."""

    cell: str
    label: str
    block_size: int
    counts: tuple[Proposals, ...]
    predicted_most_within_slack: int
    predicted_best: int | None  # proposals of the most tokens/s
    unavailable: str | None = None


@dataclass(frozen=True, slots=True)
class PointProjection:
    """All engines at one point of the matrix."""

    point: Mapping[str, Any]
    model: str
    dtype: str
    batch: int
    context: int  # committed tokens of each sequence
    context_from: Literal["the scenario", "the longest prompt, by its characters"]
    memory_bytes: float  # weights of the target and a full cache; of the fullest device
    fits: bool | None  # None: the device's memory is not known
    predicted_autoregressive_seconds: float
    predicted_autoregressive_bound: Bound
    predicted_free_token_slots: int
    predicted_ridge_rows: int | None  # rows from which on arithmetic is the slower one; None: beyond any number
    predicted_attention_ridge_rows: float  # the same of attention over the cache alone, at any context and batch
    predicted_row_curve: tuple[tuple[int, float], ...]  # (rows, time over that of one row)
    engines: tuple[EngineStep, ...]
    blocks: tuple[BlockCount, ...]
    tensor: int = 1  # devices that hold the model between them: counts and times are those of rank 0
    replicas: int = 1

    @property
    def label(self) -> str:
        return ", ".join(f"{axis} {value}" for axis, value in self.point.items())


@dataclass(frozen=True, slots=True)
class Projection:
    schema_version: int
    label: Literal["predicted"]
    zbench_version: str
    name: str
    description: str
    scenario: Mapping[str, Any]
    scenario_hash: str
    hardware: Peaks
    assumptions: tuple[str, ...]
    points: tuple[PointProjection, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# --- Prediction ---


def project(wanted: scenario.Scenario, peaks: Peaks) -> Projection:
    """Every engine at every point of the scenario's matrix. Raises UserError where the model's shape or the device's
    rate in the scenario's dtype is not known, or a prompt does not fit the model."""
    points, assumptions = [], [*_assumptions(peaks)]
    for at, cells in scenario.points(wanted):
        peaks.check(at.dtype)
        target = checks.model_config(at.model_spec)
        if target is None:
            raise UserError(f"the shape of {at.model_name} is not on this machine; give model: {{config: SHAPE}}")
        points.append(_point(at, cells, target, peaks))
        if isinstance(target, ZayaConfig):
            assumptions.append(_MOE)
        if any(step.engine == "diffusion" for step in points[-1].engines):
            assumptions.append(_DIFFUSION)
        if at.parallel.tensor > 1:
            assumptions.append(_PARALLEL)
    return Projection(
        schema_version=PROJECTION_VERSION,
        label="predicted",
        zbench_version=zbench.__version__,
        name=wanted.name,
        description=wanted.description,
        scenario=wanted.model_dump(mode="json"),
        scenario_hash=scenario.content_hash(wanted),
        hardware=peaks,
        assumptions=tuple(dict.fromkeys(assumptions)),
        points=tuple(points),
    )


_MOE = (
    "Experts: every router sends each row to one expert, all equally likely and independently, so a forward reads the "
    "expected number of distinct experts; real routers are neither, and neighbouring tokens agree more."
)
_DIFFUSION = (
    "Diffusion: every step feeds a whole block of drafts, also after an outcome without a block, when fewer are there; "
    "the likeliest outcomes are those of the synthetic acceptance; what the nearest block offers is accepted as often."
)


_PARALLEL = (
    "Several devices: rank 0 holds the largest share, and every step takes as long as there. Collectives take no time: "
    "their bytes are counted, but at decode sizes it is their latency that costs, which no spec sheet has. So this is "
    "the most that tensor parallelism could gain."
)


def _assumptions(peaks: Peaks) -> list[str]:
    def reached(fraction: float) -> str:
        return "all of it, the roof itself" if fraction == 1 else f"{fraction:g} of it"

    return [
        "Every forward takes the longer of its memory traffic and its arithmetic: the two overlap perfectly.",
        f"Bandwidth of {peaks.device} ({peaks.kind}): {reached(peaks.memory_fraction)} is reached.",
        f"Arithmetic rate of {peaks.device} ({peaks.kind}, dense): {reached(peaks.compute_fraction)} is reached.",
        "No overhead: launches, the host, sampling, acceptance and moving the cache take no time.",
        "Traffic is the least there can be: each weight once per forward, each sequence's cache once, new keys, values "
        "and logits once; activations stay on the chip.",
        "Every sequence has the same number of committed tokens; one device holds everything, but for parallel.tensor.",
        "Acceptance is what the scenario's synthetic option says, never a measurement.",
    ]


def _point(at: scenario.Scenario, cells: Sequence[CellRecord], target: AnyConfig, peaks: Peaks) -> PointProjection:
    context = at.context or longest_prompt(prompts.load(at.prompts))
    checks.check_room(at, target, context + at.output_tokens)
    shard = Shard(0, at.parallel.tensor)
    shard.check(target)
    where = Where(target, [context] * at.batch, at.dtype, peaks, shard)
    memory = memory_bytes(target, at, context)
    one = where.chain_seconds(1)
    steps = [_of_all_replicas(engine_step(cell, where, one), at.parallel.data) for cell in cells]
    ridge = _smallest(where.is_compute_bound)
    part = shard.of(target)
    return PointProjection(
        point=cells[0].point,
        model=at.model_name,
        dtype=at.dtype,
        batch=at.batch,
        context=context,
        context_from="the scenario" if at.context else "the longest prompt, by its characters",
        memory_bytes=memory,
        fits=None if peaks.memory_bytes is None else memory <= peaks.memory_bytes,
        predicted_autoregressive_seconds=one,
        predicted_autoregressive_bound="compute" if where.is_compute_bound(1) else "memory",
        predicted_free_token_slots=(_smallest(lambda rows: where.chain_seconds(rows) > SLACK * one) or _MOST_ROWS) - 1,
        predicted_ridge_rows=ridge,
        # A row does 4 q d FLOPs for each cached token, which has 2 kv d elements.
        predicted_attention_ridge_rows=peaks.ridge(at.dtype) * ITEMSIZE[at.dtype] * part.kv_heads / (2 * part.heads),
        predicted_row_curve=tuple((rows, where.chain_seconds(rows) / one) for rows in _CURVE),
        engines=tuple(steps),
        blocks=tuple(
            table for cell in cells if cell.engine == "diffusion" and (table := block_count(cell, where, one))
        ),
        tensor=at.parallel.tensor,
        replicas=at.parallel.data,
    )


def _of_all_replicas(step: EngineStep, replicas: int) -> EngineStep:
    whole = step.predicted_throughput
    return step if whole is None else replace(step, predicted_throughput=whole * replicas)


_CURVE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 272, 384, 512)


@dataclass(frozen=True, slots=True)
class Where:
    """A target on a device, with the committed tokens of each sequence."""

    target: AnyConfig
    contexts: Sequence[int]
    dtype: str
    peaks: Peaks
    shard: Shard = WHOLE

    def cost(self, forward: plans.Forward) -> Cost:
        return forward.cost(self.contexts, ITEMSIZE[self.dtype], self.shard)

    def seconds(self, forward: plans.Forward) -> float:
        return self.peaks.seconds(self.cost(forward), self.dtype)

    def chain(self, rows: int) -> Cost:
        """A forward of `rows` consecutive tokens, logits for each."""
        return self.cost(plans.on_target(self.target, "verify", rows, plans.causal_pairs(rows), rows))

    def chain_seconds(self, rows: int) -> float:
        return self.peaks.seconds(self.chain(rows), self.dtype)

    def is_compute_bound(self, rows: int) -> bool:
        cost = self.chain(rows)
        return self.peaks.compute_seconds(cost, self.dtype) > self.peaks.memory_seconds(cost)

    def timed(self, forward: plans.Forward) -> ForwardTime:
        cost = self.cost(forward)
        memory, compute = self.peaks.memory_seconds(cost), self.peaks.compute_seconds(cost, self.dtype)
        return ForwardTime(
            forward.model,
            forward.role,
            forward.rows,
            forward.pairs,
            forward.logits,
            cost.flops,
            cost.bytes_read,
            cost.bytes_written,
            memory,
            compute,
            self.peaks.seconds(cost, self.dtype),
            "compute" if compute > memory else "memory",
            cost.collective_bytes,
        )


def engine_step(cell: CellRecord, where: Where, one: float) -> EngineStep:
    """`one` is the time of an autoregressive step."""
    try:
        plan = plans.plan(cell.engine, cell.options, where.target, cell.batch)
        found = _acceptance(cell, plan)
    except UserError as error:
        return EngineStep(cell.id, cell.label, cell.engine, unavailable=f"unavailable: {error}")
    forwards = tuple(where.timed(forward) for forward in plan.forwards)
    if cell.engine == "forward":
        return EngineStep(cell.id, cell.label, cell.engine, forwards, unavailable=NO_STEP)
    step = sum(forward.predicted_seconds for forward in forwards)
    gained = _tokens(cell, plan, found)
    rate = gained / step if gained else None
    return EngineStep(
        cell=cell.id,
        label=cell.label,
        engine=cell.engine,
        forwards=forwards,
        predicted_step_seconds=step,
        predicted_ratio=step / one,
        acceptance=found.label if found else None,
        predicted_tokens_per_step=gained,
        predicted_tokens_per_second=rate,
        predicted_throughput=rate * len(where.contexts) if rate else None,
        predicted_speedup=rate * one if rate else None,
        unavailable=None if rate else NO_ACCEPTANCE,
        notes=plan.notes,
    )


def tokens_per_step(cell: CellRecord, plan: plans.Plan) -> float | None:
    """Mean tokens that a step gains; None where it drafts and no acceptance is given."""
    return _tokens(cell, plan, _acceptance(cell, plan))


def _acceptance(cell: CellRecord, plan: plans.Plan) -> synthetic.Synthetic | None:
    """None where a step drafts nothing, or nothing was asked for."""
    asked = cell.options.get("synthetic")
    return synthetic.parse(asked, plan.drafts) if asked and plan.drafts else None


def _tokens(cell: CellRecord, plan: plans.Plan, found: synthetic.Synthetic | None) -> float | None:
    """Mean tokens per step: exactly one without drafts; None where no acceptance is given."""
    if not plan.drafts:
        return 1.0
    if found is None or plan.outcomes is None:
        return found.length if found else None
    return plans.diffusion_tokens(found, plan.outcomes, cell.options["fallback"])


def block_count(cell: CellRecord, where: Where, one: float) -> BlockCount | None:
    """The table of a TiDAR engine; None for diffusion that proposes no blocks (denoise), or behind a tree."""
    if cell.options["sampler"] == "denoise" or cell.options.get("tokens"):
        return None
    block, asked = cell.options["block_size"], cell.options["synthetic"] or {}
    told = bool(
        asked.keys() & {"rate", "rates", "histogram"}
    )  # how often each outcome comes; a mean length does not say
    counts = []
    for proposals in range(block + 1):
        options = {**cell.options, "proposals": proposals}
        plan = plans.plan("diffusion", options, where.target, cell.batch)
        seconds = sum(where.seconds(forward) for forward in plan.forwards)
        found = _acceptance(cell, plan) if told else None
        tokens = _tokens(cell, plan, found) if told else None
        covered = plans.coverage(found, plan.outcomes) if found and plan.outcomes else None
        counts.append(
            Proposals(
                proposals=proposals,
                rows=plan.forwards[0].rows,
                predicted_step_seconds=seconds,
                predicted_ratio=seconds / one,
                within_slack=seconds <= SLACK * one,
                predicted_coverage=covered,
                predicted_tokens_per_step=tokens,
                predicted_tokens_per_second=tokens / seconds if tokens else None,
            )
        )
    rates = [(count.predicted_tokens_per_second, -count.proposals) for count in counts if told]
    return BlockCount(
        cell=cell.id,
        label=cell.label,
        block_size=block,
        counts=tuple(counts),
        predicted_most_within_slack=max(count.proposals for count in counts if count.within_slack),
        predicted_best=-max(rates)[1] if told else None,
        unavailable=None if told else "unavailable: tokens/s by proposals need a synthetic rate, rates or a histogram",
    )


def _smallest(reached: Callable[[int], bool]) -> int | None:
    """The least number of rows at which a condition holds that stays true from there on; None beyond _MOST_ROWS."""
    high = 1
    while not reached(high):
        high *= 2
        if high > _MOST_ROWS:
            return None
    low = high // 2  # not reached, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def longest_prompt(chosen: Sequence[prompts.Prompt]) -> int:
    """Tokens of the longest of these prompts, by its characters."""
    return max(sum(map(len, prompt.turns[:1])) // CHARACTERS_PER_TOKEN for prompt in chosen)


def memory_bytes(config: AnyConfig, at: scenario.Scenario, context: int) -> float:
    """Weights of the target, and the cache of a batch at its fullest; on the fullest of several devices."""
    itemsize, shard = ITEMSIZE[at.dtype], Shard(0, at.parallel.tensor)
    config = replace(config, windows=None) if config.windows else config  # a window is read, and all tokens are kept
    full = forward_cost(config, 1, [context + at.output_tokens] * at.batch, at.batch, itemsize, shard=shard)
    return shard.parameters(config) * itemsize + full.kv_bytes
