"""Run folders made of invented numbers, for tests of the report. Nothing here was measured, and the names say so."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zbench.models.cost import expected_experts
from zbench.records import (
    SCHEMA_VERSION,
    CellRecord,
    ForwardRecord,
    Manifest,
    RequestRecord,
    RoofSample,
    StepRecord,
    TrialRecord,
)

MODEL = "invented-135m"
CATEGORIES = ("code", "math", "extraction", "chat")
WEIGHTS, KV_PER_TOKEN, FLOPS_PER_ROW = 270e6, 46e3, 270e6
READ, RATE = 38e9, 900e9
ROOFS = {
    "device": "Invented CPU",
    "measured": "2025-01-01T00:00:00+00:00",
    "bandwidth": {
        "read": {"value": READ, "low": 37.5e9, "high": 38.4e9, "n": 20, "unit": "B/s"},
        "copy": {"value": 30e9, "low": 29e9, "high": 31e9, "n": 20, "unit": "B/s"},
        "triad": {"value": 28e9, "low": 27e9, "high": 29e9, "n": 20, "unit": "B/s"},
    },
    "flops": {
        "bfloat16": {"value": RATE, "low": 8.8e11, "high": 9.1e11, "n": 20, "unit": "FLOP/s", "shape": [2048] * 3}
    },
    "ridge": {"bfloat16": RATE / READ},
    "caches": {
        "sweep": [],
        "levels": {
            name: {"value": rate, "low": rate, "high": rate, "n": 9, "unit": "B/s", "bytes": size, "capacity": 2 * size}
            for name, rate, size in (("L1d", 600e9, 2**15), ("L2", 250e9, 2**19), ("L3", 110e9, 2**23))
        },
    },
}
SPECS = {
    "name": "Invented CPU",
    "bandwidth": 51.2e9,
    "flops": {"bfloat16": 1.6e12},
    "source": "invented for this test",
}
ENVIRONMENT = {
    "zbench": {"version": "0.1.0", "commit": "0123456789abcdef", "dirty": False},
    "python": {"version": "3.11.7"},
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "triton": "unavailable: not installed"},
    "torch": {"version": "2.13.0", "threads": 2, "build": "Invented build flags " * 20},
    "device": {"id": "cpu", "backend": "cpu", "name": "Invented CPU", "driver": "unavailable: a CPU has none"},
    "cpu": {"model": "Invented CPU", "physical_cores": 2, "flags": ["avx2", "avx512_bf16"], "governor": "performance"},
    "system": {"os": "Linux", "kernel": "6.0-invented"},
}
ENGINES: dict[str, dict[str, Any]] = {
    "autoregressive": {"engine": "autoregressive", "slowdown": 1.0, "tokens_per_step": 1},
    "transformers generate": {"engine": "reference", "slowdown": 2.6, "tokens_per_step": 1, "unseen": True},
    "transformers prompt lookup": {"engine": "reference", "slowdown": 2.2, "tokens_per_step": 2, "lookup_rows": 10},
    "chain drafter": {"engine": "chain", "slowdown": 1.15, "tokens_per_step": 3, "draft_rows": 4},
    "eagle3 chain of 4": {
        "engine": "eagle3", "slowdown": 1.0, "draft_rows": 4, "levels": 4, "chances": (0.1, 0.2, 0.3, 0.2, 0.2),
        "options": {"depth": 4, "drafter": {"path": "drafters/invented"}, "synthetic": None},
    },
    "eagle3 chain of up to 6": {
        "engine": "eagle3", "slowdown": 0.95, "up_to": 6, "chances": (0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05),
        "options": {"depth": 6, "confidence": 0.4, "drafter": {"path": "drafters/invented"}, "synthetic": None},
    },
    "eagle3 tree of 16": {
        "engine": "eagle3", "slowdown": 1.1, "draft_rows": 16, "levels": 4, "chances": (0, 0, 1, 0, 0),
        "options": {"depth": 4, "drafter": {"random": True, "seed": 0}, "synthetic": {"length": 3.0}},
    },
    "dflash block of 8": {
        "engine": "dflash", "slowdown": 1.3, "draft_rows": 7, "levels": 1, "chances": (0.9, 0.1),
        "options": {"block": 8, "drafter": {"random": True, "seed": 0}, "synthetic": None},
    },
}  # fmt: skip


def _tidar(block: int, proposals: int, **options: Any) -> dict[str, Any]:
    chances = [0.4 * 0.6**i for i in range(block)]
    return {
        "engine": "diffusion", "slowdown": 1 + 0.02 * block * proposals, "draft_rows": block - 1,
        "proposals": proposals,
        "chances": tuple(chance / sum(chances) for chance in chances),
        "options": {
            "block_size": block, "proposals": "all" if proposals == block else proposals, "sampler": "lossless",
            "adapter": {"path": "adapters/invented"}, "synthetic": None, **options,
        },
    }  # fmt: skip


GRID = {f"tidar {block} by {count}": _tidar(block, count) for block in (2, 4, 8) for count in (1, 2, block)}
DIFFUSION = {
    "tidar mixed": _tidar(4, 4, sampler="logit_mix"),
    "tidar drawn": _tidar(4, 2, synthetic={"length": 2.0}, adapter={"random": True}),
    "denoised": {
        "engine": "diffusion", "slowdown": 1.1, "tokens_per_step": 4, "denoising": 2,
        "options": {"block_size": 4, "proposals": "all", "sampler": "denoise", "adapter": None, "synthetic": None},
    },
}  # fmt: skip
_KNOWN = ENGINES | GRID | DIFFUSION
SPECULATIVE = ("autoregressive", "eagle3 chain of 4", "eagle3 tree of 16", "dflash block of 8")
DEFAULT_ENGINES = ("autoregressive", "transformers generate", "transformers prompt lookup")


def write_run(
    folder: Path,
    *,
    engines: Sequence[str] = DEFAULT_ENGINES,
    points: Sequence[dict[str, Any]] = ({},),
    prompts: int = 8,
    repeats: int = 2,
    tokens: int = 48,
    roofs: dict[str, Any] | None = ROOFS,
    samples: Sequence[float | str] = (),
    specs: dict[str, Any] | None = None,
    failing: Sequence[str] = (),
    divergent: Sequence[str] = (),
    drift: float = 0.0,
    experts: int | None = None,
    name: str = "synthetic",
    description: str = "Invented numbers that exercise the report",
) -> Path:
    """Write `run.json` and `trials.jsonl`. Engines in `failing` have only errors; those in `divergent` swap a token.

    `samples` of the read roof are B/s, or why one could not be taken: then `roofs.jsonl` is written too.
    With `experts`, the target is a mixture of as many, and its router hits somewhat fewer than a uniform one would.
    """
    cells = [_cell(engine, point) for point in points for engine in engines]
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(cells, roofs, specs, name, description, prompts * repeats)
    if experts:
        manifest.models[MODEL]["experts"] = experts
    (folder / "run.json").write_text(manifest.to_json())
    if samples:
        taken = [
            RoofSample(_when(i), 0.1, unavailable=value) if isinstance(value, str)
            else RoofSample(_when(i), 0.1, value, value, value, 9)
            for i, value in enumerate(samples)
        ]  # fmt: skip
        (folder / "roofs.jsonl").write_text("".join(sample.to_json() + "\n" for sample in taken))
    rng = np.random.default_rng(0)
    plan = [(group, repeat, at) for group in range(prompts) for repeat in range(repeats) for at in range(len(cells))]
    lines = []
    for group, repeat, at in plan:
        cell, order = cells[at], (repeat * prompts + group) * len(cells) + at  # as in a run: all prompts, then again
        if cell.label in failing:
            trial = TrialRecord(cell.id, group, repeat, order, "error", _when(order), 0.1, error="out of <memory>")
        else:
            pace = float(np.exp(rng.normal(0, 0.02)) * (1 + drift * order / len(plan)))
            trial = _trial(cell, group, repeat, order, tokens, pace, rng, cell.label in divergent)
        if experts:
            trial = replace(trial, forwards=tuple(_routed(forward, experts) for forward in trial.forwards))
        lines.append(trial.to_json())
    (folder / "trials.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def _routed(forward: ForwardRecord, experts: int) -> ForwardRecord:
    if forward.model != "target":
        return forward
    return replace(forward, experts=0.2 + 0.8 * expected_experts(experts, forward.rows * forward.batch))


def _manifest(
    cells: list[CellRecord],
    roofs: dict[str, Any] | None,
    specs: dict[str, Any] | None,
    name: str,
    description: str,
    trials: int,
) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        zbench_version="0.1.0",
        created="2025-01-01T00:00:00+00:00",
        name=name,
        description=description,
        command="zbench run scenarios/synthetic.yaml",
        scenario={"name": name, "model": MODEL, "engines": [cell.label for cell in cells], "repeats": 2},
        scenario_hash="5cenar10",
        cells=tuple(cells),
        environment=ENVIRONMENT,
        environment_hash="env1r0n",
        models={MODEL: {"parameters": 134_515_008, "bytes": 269_030_016, "layers": 30, "hash": "abc123"}},
        prompts_hash="pr0mpt5",
        roofs=roofs,
        specs=specs,
        planned=dict.fromkeys((cell.id for cell in cells), trials),
    )


def _cell(label: str, point: dict[str, Any]) -> CellRecord:
    suffix = "/" + ",".join(f"{k}={v}" for k, v in point.items()) if point else ""
    return CellRecord(
        id=label.replace(" ", "-") + suffix,
        label=label,
        engine=_KNOWN[label]["engine"],
        options=_KNOWN[label].get("options", {}),
        point=dict(point),
        model=MODEL,
        dtype="bfloat16",
        device="cpu",
        batch=point.get("batch", 1),
        context=None,
        output_tokens=48,
        sampling={"temperature": 0},
        baseline=label == "autoregressive",
    )


def _trial(
    cell: CellRecord,
    group: int,
    repeat: int,
    order: int,
    tokens: int,
    pace: float,
    rng: np.random.Generator,
    divergent: bool,
) -> TrialRecord:
    settings = _KNOWN[cell.label]
    pace *= settings["slowdown"]
    prompt_tokens = 30 + 7 * group
    steps, forwards = [_prefill(cell, prompt_tokens, pace)], []
    levels = settings.get("levels")
    share = 0.05 if levels else 0.0  # the drafter's of the prefill
    seconds = steps[0].seconds - 4e-4
    forwards.append(_forward(cell, 0, "target", "prefill", prompt_tokens, 0, (1 - share) * seconds))
    if levels:
        forwards.append(_forward(cell, 0, "drafter", "draft", prompt_tokens, 0, share * seconds))
    done = 1
    while done < tokens:
        if chances := settings.get("chances"):
            accepted = int(rng.choice(len(chances), p=chances))
        else:
            accepted = settings["tokens_per_step"] - 1
        step, committed = len(steps), min(accepted + 1, tokens - done)
        drafts = settings.get("draft_rows", 0)
        if most := settings.get("lookup_rows"):
            offered = int(rng.integers(0, most + 1))
            made = [("target", "verify" if offered else "decode", 1 + offered, 0.0085 + 4e-4 * offered)]
        elif most := settings.get("up_to"):
            drafts, before = int(rng.integers(max(accepted, 1), most + 1)), steps[-1].committed[0]
            made = [("drafter", "draft", rows, 0.001) for rows in (before, *[1] * (drafts - 1))]
            made.append(("target", "verify", 1 + drafts, 0.0095 + 1e-4 * drafts))
        elif count := settings.get("proposals"):
            rows = 1 + settings["draft_rows"]
            made = [("target", "draft+verify", rows * (1 + count), 0.0090), ("head", "draft", rows - 1, 0.0010)]
        elif settings.get("denoising"):
            made = [("target", "denoise", 4, 0.0090)]
        elif rows := settings.get("draft_rows"):
            made = [("drafter", "draft", 1, 0.001)] * (levels or 1) + [("target", "verify", 1 + rows, 0.0100)]
        else:
            made = [("target", "decode", 1, 0.0085)]
        context = prompt_tokens + done
        timed = [(m, role, r, t * pace * float(np.exp(rng.normal(0, 0.03)))) for m, role, r, t in made]
        forwards += [_forward(cell, step, m, role, r, context, t) for m, role, r, t in timed]
        seconds = sum(t for *_, t in timed) + 4e-4
        if (forwards_before := settings.get("denoising")) and len(steps) % (forwards_before + 1):
            committed = 0
        steps.append(
            StepRecord(
                seconds=seconds,
                accept_seconds=1e-4,
                commit_seconds=1e-4,
                committed=(committed,) * cell.batch,
                drafted=(drafts,) * cell.batch if drafts else (),
                accepted=(accepted,) * cell.batch if drafts else (),
                covered=(accepted < settings["proposals"],) * cell.batch if "proposals" in settings else (),
            )
        )
        done += committed
    wall = sum(step.seconds for step in steps)
    return TrialRecord(
        cell=cell.id,
        group=group,
        repeat=repeat,
        order=order,
        status="ok",
        started=_when(order),
        wall_seconds=wall * 1.002,
        requests=tuple(
            _request(
                group * cell.batch + i, prompt_tokens, tokens, steps[0].seconds, wall, divergent and group % 2 == 0
            )
            for i in range(cell.batch)
        ),
        steps=tuple(steps),
        forwards=() if settings.get("unseen") else tuple(forwards),
    )


def _prefill(cell: CellRecord, prompt_tokens: int, pace: float) -> StepRecord:
    return StepRecord((0.02 + 4e-4 * prompt_tokens) * pace, 1e-4, 1e-4, (1,) * cell.batch)


def _forward(
    cell: CellRecord, step: int, model: Any, role: Any, rows: int, context: float, seconds: float
) -> ForwardRecord:
    share = 0.05 if model == "drafter" else 1.0
    return ForwardRecord(
        step=step,
        model=model,
        role=role,
        rows=rows,
        batch=cell.batch,
        context=context,
        flops=share * FLOPS_PER_ROW * rows * cell.batch,
        bytes_read=share * (WEIGHTS + KV_PER_TOKEN * context * cell.batch),
        bytes_written=share * KV_PER_TOKEN * rows * cell.batch,
        seconds=seconds,
        committed=0,
    )


def _request(number: int, prompt_tokens: int, tokens: int, ttft: float, end: float, swapped: bool) -> RequestRecord:
    ids = tuple((number * 31 + i * 7) % 1000 for i in range(tokens))
    if swapped:
        ids = (*ids[: tokens // 2], 1001, *ids[tokens // 2 + 1 :])
    return RequestRecord(
        prompt_id=f"p{number}",
        category=CATEGORIES[number % len(CATEGORIES)],
        prompt_tokens=prompt_tokens,
        output_ids=ids,
        output_hash=hashlib.sha256(repr(ids).encode()).hexdigest(),
        text="invented <b>text</b>",
        finish="length",
        ttft_seconds=ttft,
        end_seconds=end,
        seed=number,
    )


def _when(order: int) -> str:
    return f"2025-01-01T00:{order // 60 % 60:02d}:{order % 60:02d}+00:00"
