"""What a server says of its own drafting: counters by difference, and what its responses carry. Nothing is derived.

Names and meanings, per server:
- vLLM: Prometheus counters `vllm:spec_decode_*` and `vllm:diffusion_*`; per request, with
  `--per-request-spec-decode-metrics`, `metrics.speculative_decoding` (vllm-project/vllm#48915).
- llama.cpp: the same counters as `llamacpp:spec_decode_*` with `--metrics` (ggml-org/llama.cpp#26389); per request
  `timings.draft_n` and `draft_n_accepted` (#12603), which do not say how many verify steps there were.
- SGLang: per request `spec_verify_ct` and its neighbours (sgl-project/sglang#33518); else gauges of the last
  reporting interval, `sglang:spec_accept_length`, which no difference can be taken of.
- TensorRT-LLM: `specDecodingStats` of every iteration since `/metrics` was last read; at most 1000 are kept.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zbench.records import Speculation

Samples = dict[tuple[str, str], float]  # (name, its position label or "") -> value, summed over all other labels

KEPT_ITERATIONS = 1000  # of TensorRT-LLM; older ones are lost
_GAUGE = "sglang:spec_accept_length"
_COUNTING = ("vllm", "llamacpp")
_DIFFUSION = {
    "num_denoising_steps": "steps",
    "num_committed_tokens": "committed",
    "num_canvas_positions": "positions",
}
_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_POSITION = re.compile(r'(?:^|,)\s*position="(\d+)"')


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a server's metrics: Prometheus samples, or TensorRT-LLM's iterations since the last look."""

    samples: Samples
    iterations: tuple[Mapping[str, Any], ...] = ()
    lengths: tuple[float, ...] = ()  # SGLang's gauge, of each of its ranks that has drafted


@dataclass(frozen=True, slots=True)
class Told:
    """What a server said over one trial."""

    speculation: Speculation | None
    why_not: str
    diffusion: dict[str, int] | None = None
    notes: tuple[str, ...] = ()


NOTHING = Reading({})


def read(text: str) -> Reading:
    """Parse what `/metrics` answered: Prometheus text, or TensorRT-LLM's JSON."""
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except ValueError:
            return NOTHING
        return Reading({}, tuple(entry for entry in map(_entry, found) if isinstance(entry, dict)))
    samples: Samples = {}
    lengths = []
    for line in text.splitlines():
        if line.startswith("#") or not (match := _SAMPLE.match(line)):
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        if not math.isfinite(value):
            continue
        if match[1] == _GAUGE:
            lengths += [value] if value >= 1 else []  # 0 before the first interval
            continue
        position = _POSITION.search(match[2] or "")
        key = (match[1], position[1] if position else "")
        samples[key] = samples.get(key, 0.0) + value
    return Reading(samples, lengths=tuple(lengths))


def _entry(given: Any) -> Any:
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return None


def told(before: Reading, after: Reading, responses: Sequence[Speculation | None]) -> Told:
    """What a trial's requests say if all of them say something, else what the counters gained over the trial."""
    diffusion, notes = _diffusion(before, after), _company(before, after, len(responses))
    if responses and all(responses):
        return Told(_together([r for r in responses if r]), "", diffusion, notes)
    for prefix in _COUNTING:
        found = _gained(before, after, f"{prefix}:spec_decode_num_")
        if found is not None:
            if isinstance(found, str):
                return Told(None, found, diffusion, notes)
            return Told(found, "", diffusion, notes)
    if after.iterations:
        speculation, why = _iterations(after.iterations)
        return Told(speculation, why, diffusion, notes)
    if after.lengths:
        gauge = "a gauge of the server's last interval, not of this trial"
        several = f"; mean of {len(after.lengths)} ranks" if len(after.lengths) > 1 else ""
        length = sum(after.lengths) / len(after.lengths)
        return Told(Speculation(f"{_GAUGE}, {gauge}{several}", length=length), "", diffusion, notes)
    return Told(None, "not reported by the server", diffusion, notes)


def of_response(body: Mapping[str, Any]) -> Speculation | None:
    """What one response, or a chunk of its stream, says."""
    metrics = body.get("metrics")
    if isinstance(metrics, dict) and isinstance(found := metrics.get("speculative_decoding"), dict):
        histogram = found.get("acceptance_histogram")
        return Speculation(
            "metrics.speculative_decoding",
            found.get("num_spec_steps"),
            found.get("num_draft_tokens"),
            found.get("num_accepted_draft_tokens"),
            _reached(histogram),
        )
    if (found := _holder(body, "spec_verify_ct")) is not None:
        return Speculation(
            "spec_verify_ct",
            found["spec_verify_ct"],
            found.get("spec_num_proposed_drafts"),
            found.get("spec_num_correct_drafts"),
            _reached(found.get("spec_correct_drafts_histogram")),
            None if "spec_num_correct_drafts" in found else found.get("spec_accept_length"),
        )
    timings = body.get("timings")
    if isinstance(timings, dict) and "draft_n" in timings:
        return Speculation("timings", None, timings["draft_n"], timings.get("draft_n_accepted"))
    return None


def cached_tokens(body: Mapping[str, Any]) -> int | None:
    """Prompt tokens that a response says came from the prefix cache."""
    usage = body.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    for said, key in ((details, "cached_tokens"), (body.get("timings"), "cache_n")):
        if isinstance(said, dict) and isinstance(found := said.get(key), int):
            return found
    return None


def _gained(before: Reading, after: Reading, prefix: str) -> Speculation | str | None:
    """The counters' difference; a reason where it means nothing; None where the server has none."""
    names = {
        what: next((n for n in (f"{prefix}{what}_total", f"{prefix}{what}") if (n, "") in after.samples), None)
        for what in ("drafts", "draft_tokens", "accepted_tokens")
    }
    if names["drafts"] is None:
        return None

    def gained(name: str | None, position: str = "") -> int | None:
        if name is None:
            return None
        return round(after.samples[name, position] - before.samples.get((name, position), 0.0))

    counts = [gained(name) for name in names.values()]
    per_position = sorted(
        (int(position), name)
        for name, position in after.samples
        if position and name.removesuffix("_total") == f"{prefix}accepted_tokens_per_pos"  # not `_created`, a time
    )
    at = [gained(name, str(position)) or 0 for position, name in per_position]
    if any(count is not None and count < 0 for count in (*counts, *at)):
        return "the server's counters went back during the trial: it restarted"
    if not counts[0]:
        return "the server's counters say that nothing was drafted"
    return Speculation(f"{prefix}* by difference", counts[0], counts[1], counts[2], tuple(at))


def _diffusion(before: Reading, after: Reading) -> dict[str, int] | None:
    gained = {}
    for name, key in _DIFFUSION.items():
        sample = (f"vllm:diffusion_{name}_total", "")
        if sample not in after.samples:
            return None
        gained[key] = round(after.samples[sample] - before.samples.get(sample, 0.0))
    return gained if gained["steps"] > 0 and min(gained.values()) >= 0 else None


def _company(before: Reading, after: Reading, requests: int) -> tuple[str, ...]:
    """Whether others used the server meanwhile: counters are the whole server's."""
    done = ("vllm:request_success_total", "")
    if done not in after.samples:
        return ()
    finished = round(after.samples[done] - before.samples.get(done, 0.0))
    if finished == requests:
        return ()
    return (f"the server finished {finished} requests while {requests} were measured: its counters hold others' too",)


def _iterations(iterations: Sequence[Mapping[str, Any]]) -> tuple[Speculation | None, str]:
    if len(iterations) >= KEPT_ITERATIONS:
        return None, f"the server keeps {KEPT_ITERATIONS} iterations and this trial had more: some were lost"
    # With attention data parallelism every rank has a row, and each repeats the figures of rank 0.
    rows = (i for i in iterations if not i.get("attentionDpRank"))
    drafting = [s for i in rows if isinstance(s := i.get("specDecodingStats"), dict) and s.get("numDraftTokens")]
    if not drafting:
        return None, "the server's iterations say that nothing was drafted"
    total = {
        key: sum(s.get(key, 0) for s in drafting)
        for key in ("numRequestsWithDraftTokens", "numDraftTokens", "numAcceptedTokens")
    }
    return Speculation("specDecodingStats of every iteration", *total.values()), ""


def _together(each: Sequence[Speculation]) -> Speculation:
    """The sum over requests."""

    def total(values: Sequence[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    depth = max(len(one.accepted_at) for one in each)
    complete = all(one.accepted_at for one in each)
    lengths = [(one.length, one.verifies) for one in each if one.verifies]
    known = [(length * steps, steps) for length, steps in lengths if length is not None]
    at = tuple(sum(one.accepted_at[i] for one in each if i < len(one.accepted_at)) for i in range(depth))
    return Speculation(
        f"{each[0].source} of each response",
        total([one.verifies for one in each]),
        total([one.drafted for one in each]),
        total([one.accepted for one in each]),
        at if complete else (),
        length=sum(w for w, _ in known) / sum(n for _, n in known) if known and len(known) == len(lengths) else None,
    )


def _reached(histogram: Any) -> tuple[int, ...]:
    """Steps that accepted more than i drafts, from how many accepted exactly i."""
    if not isinstance(histogram, list):
        return ()
    return tuple(sum(histogram[i + 1 :]) for i in range(len(histogram) - 1))


def _holder(body: Any, key: str) -> dict[str, Any] | None:
    """The innermost mapping that has `key`: SGLang's releases put it in different places."""
    return next((found for found in _mappings(body) if key in found), None)


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _mappings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _mappings(inner)
