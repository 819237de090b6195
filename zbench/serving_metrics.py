"""What servers are measured by: metrics of cells whose requests went over HTTP. They register with `zbench.metrics`.

TTFT, TPOT and throughput of a server are those of `metrics.py`; the clock of a request starts when it is due, so that
waiting at the client counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from zbench import stats
from zbench.metrics import Cell, Unavailable, metric
from zbench.records import RequestRecord, ServedRecord, ServerRecord, Speculation, TrialRecord
from zbench.stats import Estimate

PERCENTILES = (50, 90, 99)
CLIENT_BOUND = 0.5  # share of one processor from which the client may be what limits
HEADROOM = 20  # times the measured rate that a client should be able to read, to be above suspicion


@dataclass(frozen=True, slots=True)
class _Served:
    """One request of a server, and the load window it belongs to."""

    group: int
    request: RequestRecord
    served: ServedRecord


def _requests(cell: Cell) -> list[_Served]:
    found = [_Served(t.group, r, r.served) for t in cell.trials for r in t.requests if r.served]
    if not found:
        raise Unavailable("not a server")
    return found


def _servers(cell: Cell) -> list[tuple[TrialRecord, ServerRecord]]:
    found = [(trial, trial.server) for trial in cell.trials if trial.server]
    if not found:
        raise Unavailable("not a server")
    return found


def _percentiles(values: Sequence[float], groups: Sequence[int]) -> dict[str, Estimate]:
    """Without intervals: the tail of a few requests is no estimate of a tail, so n is told instead."""
    n = len(set(groups))
    parts = {"mean": stats.mean(values, groups)}
    for percent in PERCENTILES:
        few = len(values) * (100 - percent) < 100
        note = f"of {len(values)} values: fewer than {100 // (100 - percent)} show no such tail" if few else ""
        parts[f"p{percent}"] = Estimate(
            float(np.percentile(values, percent)), n=n, estimator=f"percentile of {len(values)} values", note=note
        )
    return parts


@metric(
    "request_latency",
    "s",
    "last token - due, waiting at the client included; over requests to a server",
    "lower",
)
def request_latency(cell: Cell) -> dict[str, Estimate]:
    served = _requests(cell)
    return _percentiles([s.request.end_seconds for s in served], [s.group for s in served])


@metric("served_ttft", "s", "ttft (first chunk with text - due) over requests to a server", "lower")
def served_ttft(cell: Cell) -> dict[str, Estimate]:
    served = _requests(cell)
    return _percentiles([s.request.ttft_seconds for s in served], [s.group for s in served])


@metric(
    "inter_chunk_latency",
    "s",
    "gap between what arrives of one response: chunks with text, and its end where that is a token; a chunk may hold "
    "several tokens, so this is not TPOT "
    "(vLLM and SGLang call it ITL)",
    "lower",
)
def inter_chunk_latency(cell: Cell) -> dict[str, Estimate]:
    gaps = [(gap, s.group) for s in _requests(cell) for gap in np.diff(s.served.chunk_seconds)]
    if not gaps:
        raise Unavailable("no response came in more than one chunk")
    values, groups = zip(*gaps, strict=True)
    return _percentiles([float(v) for v in values], groups)


@metric(
    "tokens_per_chunk",
    "tokens",
    "output tokens / chunks with text, and the end of it where that is a token",
    "none",
)
def tokens_per_chunk(cell: Cell) -> Estimate:
    served = _requests(cell)
    chunks = [len(s.served.chunk_seconds) for s in served]
    return stats.ratio([s.request.tokens for s in served], chunks, [s.group for s in served])


@metric("request_throughput", "requests/s", "requests / wall of their load window", "higher")
def request_throughput(cell: Cell) -> Estimate:
    trials = [trial for trial, _ in _servers(cell)]
    return stats.ratio([len(t.requests) for t in trials], [t.wall_seconds for t in trials], [t.group for t in trials])


@metric(
    "goodput",
    "requests/s",
    "requests within all limits of the scenario (ttft, tpot, latency) / wall of their load window",
    "higher",
)
def goodput(cell: Cell) -> Estimate:
    trials = [trial for trial, _ in _servers(cell)]
    limits = cell.record.options.get("limits")
    if not limits:
        raise Unavailable("the scenario sets no limits")
    if limits.get("tpot") is not None and any(_in_one_piece(r) for trial in trials for r in trial.requests):
        raise Unavailable("responses came in one piece: whether they kept the limit of tpot is not known")
    good = [sum(_within(request, limits) for request in trial.requests) for trial in trials]
    estimate = stats.ratio(good, [t.wall_seconds for t in trials], [t.group for t in trials])
    total = sum(len(trial.requests) for trial in trials)
    asked = ", ".join(f"{name} {seconds:g} s" for name, seconds in limits.items() if seconds is not None)
    note = f"{sum(good)} of {total} requests within {asked}"
    return replace(estimate, note="; ".join(filter(None, (note, estimate.note))))


def _in_one_piece(request: RequestRecord) -> bool:
    return request.tokens > 1 and request.end_seconds <= request.ttft_seconds


def _within(request: RequestRecord, limits: dict[str, float | None]) -> bool:
    decode = request.end_seconds - request.ttft_seconds
    measured = {
        "ttft": request.ttft_seconds,
        "tpot": decode / (request.tokens - 1) if request.tokens > 1 else 0.0,
        "latency": request.end_seconds,
    }
    return all(measured[name] <= most for name, most in limits.items() if most is not None)


@metric("client_queue", "s", "sent - due: how long the client held a request back, no place being free", "lower")
def client_queue(cell: Cell) -> Estimate:
    served = _requests(cell)
    return stats.mean([s.served.queued_seconds for s in served], [s.group for s in served])


@metric(
    "client_share",
    "1",
    "processor seconds of the client's thread / wall of the load windows; near 1 the client is what limits",
    "lower",
)
def client_share(cell: Cell) -> Estimate:
    servers = _servers(cell)
    spent = [server.client_cpu_seconds for _, server in servers]
    estimate = stats.ratio(spent, [trial.wall_seconds for trial, _ in servers], [trial.group for trial, _ in servers])
    if isinstance(estimate.value, float) and estimate.value > CLIENT_BOUND:
        return replace(estimate, note="the client may be what limits: send fewer requests at once", status="error")
    if isinstance(estimate.value, float) and estimate.value > 1 / HEADROOM:
        note = f"the client could keep up with {1 / estimate.value:.0f} times this rate, not {HEADROOM} times"
        return replace(estimate, note="; ".join(filter(None, (note, estimate.note))))
    return estimate


@metric(
    "token_count_difference",
    "tokens",
    "tokens as the server's usage counts them - tokens by the model's own tokenizer; mean of requests. "
    "Not 0: another template, tokenizer or text was at work",
    "none",
)
def token_count_difference(cell: Cell) -> dict[str, Estimate]:
    served = _requests(cell)
    return {
        "prompt": _difference([(s.served.prompt_tokens, s.request.prompt_tokens, s.group) for s in served]),
        "output": _difference([(s.served.output_tokens, s.served.tokenised, s.group) for s in served]),
    }


def _difference(counts: Sequence[tuple[int | None, int, int]]) -> Estimate:
    known = [(theirs - ours, group) for theirs, ours, group in counts if theirs is not None]
    if not known:
        return stats.unavailable("the server does not count tokens")
    differences, groups = zip(*known, strict=True)
    estimate = stats.mean(differences, groups)
    if wrong := sum(d != 0 for d in differences):
        note = f"{wrong} of {len(known)} requests are counted differently, by up to {max(map(abs, differences))}"
        return replace(estimate, note="; ".join(filter(None, (note, estimate.note))))
    return estimate


@metric(
    "cached_prompt_share",
    "1",
    "prompt tokens that the server says it found in its prefix cache / prompt tokens",
    "none",
)
def cached_prompt_share(cell: Cell) -> Estimate:
    found = [
        (cached, total, s.group)
        for s in _requests(cell)
        if (cached := s.served.cached_tokens) is not None and (total := s.served.prompt_tokens)
    ]
    if not found:
        raise Unavailable("not reported by the server")
    shares, totals, groups = zip(*found, strict=True)
    return stats.ratio(shares, totals, groups)


_Told = tuple[int, Speculation, tuple[str, ...]]  # a trial's group, what the server said of it, and notes on that


def _told(cell: Cell) -> Iterator[_Told]:
    """What the server said of each trial. Raises Unavailable unless it said something of all."""
    for trial, server in _servers(cell):
        if server.speculation is None:
            raise Unavailable(server.why_not or "not reported by the server")
        yield trial.group, server.speculation, server.notes


def _counts(told: Sequence[_Told], name: Literal["verifies", "drafted", "accepted"]) -> list[int]:
    counts = [getattr(said, name) for _, said, _ in told]
    if None in counts:
        words = {"verifies": "how many verify steps there were", "drafted": "how many drafts there were"}
        said = words.get(name, "how many drafts were accepted")
        raise Unavailable(f"{told[0][1].source}: the server does not say {said}")
    return counts


def _with_source(estimate: Estimate, told: Sequence[_Told]) -> Estimate:
    notes = dict.fromkeys([told[0][1].source, *(note for _, _, notes in told for note in notes), estimate.note])
    return replace(estimate, note="; ".join(filter(None, notes)))


@metric(
    "server_acceptance_length",
    "tokens",
    "1 + accepted drafts / verify steps, as the server counts them, by difference over each trial; where it states a "
    "length and counts nothing, the mean of what it states at the end of each trial, whatever their steps",
    "higher",
)
def server_acceptance_length(cell: Cell) -> Estimate:
    told = list(_told(cell))
    groups = [group for group, _, _ in told]
    lengths = [said.length for _, said, _ in told]
    known = [length for length in lengths if length is not None]
    if len(known) == len(told):
        return _with_source(stats.mean(known, groups), told)
    verifies, accepted = _counts(told, "verifies"), _counts(told, "accepted")
    gained = [v + a for v, a in zip(verifies, accepted, strict=True)]
    return _with_source(stats.ratio(gained, verifies, groups), told)


@metric(
    "server_draft_acceptance_rate",
    "1",
    "accepted draft tokens / proposed draft tokens, as the server counts them",
    "higher",
)
def server_draft_acceptance_rate(cell: Cell) -> Estimate:
    told = list(_told(cell))
    accepted, drafted = _counts(told, "accepted"), _counts(told, "drafted")
    return _with_source(stats.ratio(accepted, drafted, [group for group, _, _ in told]), told)


@metric(
    "server_acceptance_at",
    "1",
    "unconditional: verify steps that accepted i drafts or more / verify steps, as the server counts them",
    "higher",
)
def server_acceptance_at(cell: Cell) -> dict[str, Estimate]:
    told = list(_told(cell))
    if not all(said.accepted_at for _, said, _ in told):
        raise Unavailable(f"{told[0][1].source}: the server does not say at which position drafts are accepted")
    groups, verifies = [group for group, _, _ in told], _counts(told, "verifies")
    depth = max(len(said.accepted_at) for _, said, _ in told)
    return {
        str(i + 1): stats.ratio(
            [said.accepted_at[i] if i < len(said.accepted_at) else 0 for _, said, _ in told], verifies, groups
        )
        for i in range(depth)
    }


@metric(
    "server_diffusion_committed_per_step",
    "tokens",
    "committed tokens / denoising steps, from vLLM's vllm:diffusion_* counters by difference",
    "higher",
)
def server_diffusion_committed_per_step(cell: Cell) -> Estimate:
    told = _diffusion(cell)
    return stats.ratio([d["committed"] for _, d in told], [d["steps"] for _, d in told], [g for g, _ in told])


@metric(
    "server_diffusion_positions_per_step",
    "positions",
    "canvas positions / denoising steps, from vLLM's vllm:diffusion_* counters by difference",
    "none",
)
def server_diffusion_positions_per_step(cell: Cell) -> Estimate:
    told = _diffusion(cell)
    return stats.ratio([d["positions"] for _, d in told], [d["steps"] for _, d in told], [g for g, _ in told])


def _diffusion(cell: Cell) -> list[tuple[int, dict[str, int]]]:
    told = [(trial.group, server.diffusion) for trial, server in _servers(cell) if server.diffusion]
    if not told:
        raise Unavailable("not reported by the server")
    return told
