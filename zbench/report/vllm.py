"""A run in the keys of `vllm bench serve`'s result JSON, for programs that read those.

Every figure is computed from the run's requests as vLLM defines it (vllm-project/vllm, vllm/benchmarks/serve.py), not
as zbench's own metrics do: TTFT and latency since a request was sent, TPOT averaged over requests. What a run cannot
tell is null.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from zbench.cache import write
from zbench.errors import UserError
from zbench.metrics import Cell, Run, load_run
from zbench.records import RequestRecord, Speculation, TrialRecord
from zbench.report.figures import file_name


@dataclass(frozen=True, slots=True)
class _Sent:
    """One request as vLLM's client would have seen it. Seconds."""

    record: RequestRecord
    start: float  # since the first trial of the cell began; `_rounds` follow one another without a gap
    ttft: float
    latency: float
    gaps: tuple[float, ...] | None  # between chunks; None where the engine does not report its steps
    queued: float

    @property
    def tpot(self) -> float | None:
        """None of a single token, and where all came in one piece."""
        several, seconds = self.record.tokens - 1, self.latency - self.ttft
        return seconds / several if several and seconds > 0 else None


def export(folder: Path, out: Path | None, detailed: bool) -> list[Path]:
    """Write one file for each cell that has decoded something; return their paths. `detailed` adds a value for each
    request, as vLLM's --save-detailed. Raises UserError: no run, nothing measured, not writable."""
    run = load_run(folder)
    out = out or folder / "vllm"
    measured = [cell for cell in run.cells if cell.trials and cell.record.engine != "forward"]  # which is no decoder
    if not measured:
        raise UserError(f"{folder}: nothing was measured that could be exported")
    paths = []
    for cell in measured:
        path = out / f"{file_name('', cell.record.id).strip('-')}.json"
        write(path, json.dumps(result(run, cell, detailed), allow_nan=False) + "\n")
        paths.append(path)
    return paths


def result(run: Run, cell: Cell, detailed: bool = False) -> dict[str, Any]:
    """The result of one cell, its trials taken as one benchmark."""
    record, manifest = cell.record, run.manifest
    rounds = _rounds(cell)
    sent = list(_sent(rounds))
    wall = sum(max(trial.wall_seconds for trial in side) for side in rounds)
    prompt = sum(one.record.prompt_tokens for one in sent)
    output = sum(one.record.tokens for one in sent)
    servers = [trial.server for trial in cell.trials if trial.server]
    load = servers[0].load if servers else {}
    api = {"chat": "openai-chat", "completions": "openai"}.get(record.options.get("api", ""), "openai")
    backend = api if servers else f"zbench {record.engine}"
    found: dict[str, Any] = {
        "date": datetime.fromisoformat(manifest.created).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend,
        "backend": backend,
        "label": record.label,
        "model_id": record.model,
        "tokenizer_id": record.model,
        "num_prompts": len(sent),
        "zbench_version": manifest.zbench_version,
        "zbench_cell": record.id,
        "zbench_device": str(manifest.environment.get("device", {}).get("name", "")),
        "request_rate": load.get("rate") or "inf",
        "burstiness": None if load.get("arrivals") == "constant" else 1.0,
        "max_concurrency": load.get("concurrency") or (None if load.get("rate") else record.batch * record.replicas),
        "duration": wall,
        "completed": len(sent),
        "failed": None if cell.failed else 0,  # of a failed trial, the requests are not recorded
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(sent) / wall,
        "request_goodput": _goodput(sent, record.options.get("limits"), wall),
        "output_throughput": output / wall,
        "total_token_throughput": (prompt + output) / wall,
        "max_concurrent_requests": _peak(sent),
    }
    if detailed:
        found |= {
            "input_lens": [one.record.prompt_tokens for one in sent],
            "output_lens": [one.record.tokens for one in sent],
            "ttfts": [one.ttft for one in sent],
            "itls": [one.gaps for one in sent],
            "latencies": [one.latency for one in sent],
            "start_times": [one.start for one in sent],
            "queue_times": [one.queued for one in sent],
            "generated_texts": [one.record.text for one in sent],
            "errors": [""] * len(sent),
        }
    found |= _speculation(cell)
    gaps = [one.gaps for one in sent]
    found |= _statistics("ttft", [one.ttft for one in sent])
    found |= _statistics("tpot", [one.tpot for one in sent if one.tpot is not None])
    found |= _statistics("itl", [] if None in gaps else [gap for some in gaps for gap in some or ()])
    found |= _statistics("e2el", [one.latency for one in sent])
    return found


def _rounds(cell: Cell) -> list[list[TrialRecord]]:
    """Trials one after another, and those together that replicas decoded side by side."""
    found: dict[tuple[int, int], list[TrialRecord]] = {}
    for trial in cell.trials:
        found.setdefault((trial.repeat, trial.group // cell.record.replicas), []).append(trial)
    return list(found.values())


def _sent(rounds: Sequence[Sequence[TrialRecord]]) -> Iterable[_Sent]:
    began = 0.0
    for side in rounds:
        for trial in side:
            ends = list(accumulate(step.seconds for step in trial.steps))
            for row, request in enumerate(trial.requests):
                served = request.served
                queued = served.queued_seconds if served else 0.0
                start = began + (served.due_seconds + queued if served else 0.0)
                gained = [end for end, step in zip(ends, trial.steps, strict=True) if step.committed[row]]
                chunks: Sequence[float] = served.chunk_seconds if served else gained
                gaps = tuple(later - earlier for earlier, later in pairwise(chunks)) if chunks else None
                yield _Sent(request, start, request.ttft_seconds - queued, request.end_seconds - queued, gaps, queued)
        began += max(trial.wall_seconds for trial in side)


def _statistics(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and 99th percentile in milliseconds; null where there are no values."""
    data = np.asarray(values, dtype=float) * 1e3
    if not len(data):
        return dict.fromkeys(f"{how}_{name}_ms" for how in ("mean", "median", "std", "p99"))
    return {
        f"mean_{name}_ms": float(data.mean()),
        f"median_{name}_ms": float(np.median(data)),
        f"std_{name}_ms": float(data.std()),
        f"p99_{name}_ms": float(np.percentile(data, 99)),
    }


def _goodput(sent: Sequence[_Sent], limits: dict[str, float | None] | None, wall: float) -> float | None:
    if not limits:
        return None
    if limits.get("tpot") is not None and any(one.tpot is None and one.record.tokens > 1 for one in sent):
        return None  # not known of what came in one piece
    good = 0
    for one in sent:
        measured = {"ttft": one.ttft, "tpot": one.tpot or 0.0, "latency": one.latency}
        good += all(measured[name] <= most for name, most in limits.items() if most is not None)
    return good / wall


def _peak(sent: Sequence[_Sent]) -> int:
    """Most requests in flight at one time; one that ends when another starts is gone by then."""
    events = sorted((when, change) for one in sent for when, change in ((one.start, 1), (one.start + one.latency, -1)))
    return max(accumulate(change for _, change in events), default=0)


def _speculation(cell: Cell) -> dict[str, Any]:
    """vLLM's spec_decode keys, of the server's counts or of our own; none where nothing was drafted."""
    told = [trial.server.speculation for trial in cell.trials if trial.server and trial.server.speculation]
    if told and len(told) == len(cell.trials):
        return _of_counts(told)
    if cell.verifies.empty:
        return {}
    accepted, depth = cell.verifies["accepted"], cell.depth
    at = tuple(int((accepted > i).sum()) for i in range(depth))
    drafted = int(cell.verifies["drafted"].sum())
    return _of_counts([Speculation("zbench", len(accepted), drafted, int(accepted.sum()), at)])


def _of_counts(told: Sequence[Speculation]) -> dict[str, Any]:
    totals = []
    for name in ("verifies", "drafted", "accepted"):
        counts = [getattr(one, name) for one in told]
        totals.append(None if None in counts else sum(counts))
    verifies, drafted, accepted = totals
    depths = {len(one.accepted_at) for one in told}
    rates = []
    if verifies and len(depths) == 1:
        rates = [sum(one.accepted_at[i] for one in told) / verifies for i in range(depths.pop())]
    return {
        "spec_decode_acceptance_rate": accepted / drafted * 100 if drafted and accepted is not None else None,
        "spec_decode_acceptance_length": 1 + accepted / verifies if verifies and accepted is not None else None,
        "spec_decode_num_drafts": verifies,
        "spec_decode_draft_tokens": drafted,
        "spec_decode_accepted_tokens": accepted,
        "spec_decode_per_position_acceptance_rates": rates,
    }
