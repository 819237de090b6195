"""How long a gate and a report of large run folders take, each a process of its own, imports and all.

python -m benchmarks.run_folders [forwards] [forwards per trial]

Prints wall and CPU seconds; on a busy machine only the latter mean something.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from zbench.records import (
    MANIFEST,
    SCHEMA_VERSION,
    TRIALS,
    CellRecord,
    ForwardRecord,
    LosslessCheck,
    Manifest,
    RequestRecord,
    StepRecord,
    TrialRecord,
)

ROOFS = {
    "bandwidth": {"read": {"value": 2e10, "low": 1.9e10, "high": 2.1e10, "n": 9, "unit": "B/s"}},
    "flops": {"bfloat16": {"value": 4e11, "low": 3.9e11, "high": 4.1e11, "n": 9, "unit": "FLOP/s"}},
}
GROUPS = 32


def main() -> None:
    forwards = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    per_trial = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    with tempfile.TemporaryDirectory() as name:
        one, other = (write(Path(name) / str(seed), forwards, per_trial, seed) for seed in (0, 1))
        for what in (["gate", str(one), "--baseline", str(other)], ["report", str(one)]):
            began, used = time.perf_counter(), _cpu()
            subprocess.run([sys.executable, "-m", "zbench.cli", *what], stdout=subprocess.DEVNULL, check=False)
            took = f"{time.perf_counter() - began:.1f} s, {_cpu() - used:.1f} s of CPU"
            print(f"{what[0]} of {forwards} forwards in {forwards // per_trial} trials: {took}")


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write(folder: Path, forwards: int, per_trial: int, seed: int) -> Path:
    """A run of two engines, of which one drafts and verifies, with `per_trial` forwards in a trial."""
    rng = np.random.default_rng(seed)
    cells = [_cell("autoregressive", "autoregressive"), _cell("eagle3", "eagle3")]
    manifest = Manifest(
        schema_version=SCHEMA_VERSION, zbench_version="0", created=f"2025-01-0{1 + seed}", name="large", description="",
        command="", scenario={}, scenario_hash="s", cells=tuple(cells), environment={}, environment_hash="",
        prompts_hash="p", models={}, roofs=ROOFS, specs=None,
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(manifest.to_json())
    with (folder / TRIALS).open("w") as file:
        for order in range(forwards // per_trial):
            cell, at = cells[order % 2], order // 2
            drafts = np.random.default_rng(at % GROUPS)  # a greedy prompt accepts the same in every repeat
            file.write(_trial(rng, drafts, cell.id, at % GROUPS, at // GROUPS, order, per_trial).to_json() + "\n")
    return folder


def _cell(name: str, engine: str) -> CellRecord:
    return CellRecord(
        id=name, label=name, engine=engine, options={"depth": 4} if engine == "eagle3" else {}, point={}, model="m",
        dtype="bfloat16", device="cpu", batch=1, context=None, output_tokens=64, sampling={"temperature": 0},
        baseline=engine == "autoregressive",
    )  # fmt: skip


def _trial(
    rng: np.random.Generator, drafts: np.random.Generator, cell: str, group: int, repeat: int, order: int, forwards: int
) -> TrialRecord:
    drafting = cell == "eagle3" and forwards > 2
    prefill = ForwardRecord(0, "target", "prefill", 30, 1, 0.0, 8e9, 3e8, 1e6, 0.05, 1)
    made, steps, seconds = [prefill], [StepRecord(0.05, 1e-4, 1e-4, (1,))], 0.05
    for step in range(1, 1 + (forwards - 1) // (2 if drafting else 1)):
        took = float(rng.lognormal(np.log(0.02), 0.05))
        accepted = int(drafts.integers(0, 5)) if drafting else 0
        context = 30.0 + step
        if drafting:
            made.append(ForwardRecord(step, "drafter", "draft", 1, 1, context, 1e8, 2e7, 1e5, took / 10, 0))
        role = "verify" if drafting else "decode"
        rows = 5 if drafting else 1
        made.append(
            ForwardRecord(step, "target", role, rows, 1, context, 3e8 * rows, 3e8, 1e5, took, accepted + 1)  # type: ignore[arg-type]
        )
        offered = {"drafted": (4,), "accepted": (accepted,)} if drafting else {}
        steps.append(StepRecord(took * 1.15, took / 50, took / 50, (accepted + 1,), **offered))
        seconds += took * 1.15
    tokens = tuple(range(sum(step.committed[0] for step in steps)))
    request = RequestRecord(
        f"p{group}", "chat" if group % 2 else "code", 30, tokens, f"{group}", "text", "length", 0.05, seconds, repeat,
        LosslessCheck("exact"),
    )  # fmt: skip
    blank = TrialRecord(cell, group, repeat, order, "ok", "2025-01-01T00:00:00", seconds * 1.01, (request,))
    return replace(blank, steps=tuple(steps), forwards=tuple(made))


if __name__ == "__main__":
    main()
