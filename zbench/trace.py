"""What a Chrome trace of torch's profiler says about operators: time, FLOPs and bytes, from their recorded shapes.

No torch here. FLOPs count a multiply-add as two; bytes are those of the operands, each once, and of the result: what an
operator must move if nothing is cached, and nothing of it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

_SIZES = {
    "double": 8, "float": 4, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8, "int": 4, "bool": 1,
    "unsigned char": 1, "signed char": 1,
}  # fmt: skip
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_DRIVER = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True, slots=True)
class Operator:
    """Everything of one name. `flops` and `bytes` are None where they do not follow from what is known of it."""

    name: str
    kind: str  # "native", "torch" or "kernel"
    calls: int
    seconds: float  # its own, without what it calls
    flops: float | None
    bytes: float | None

    def __add__(self, other: Operator) -> Operator:
        return replace(
            self,
            calls=self.calls + other.calls,
            seconds=self.seconds + other.seconds,
            flops=_sum(self.flops, other.flops),
            bytes=_sum(self.bytes, other.bytes),
        )


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def gathered(operators: Sequence[Operator]) -> list[Operator]:
    """One of each kind and name, the longest first."""
    found: dict[tuple[str, str], Operator] = {}
    for operator in operators:
        key = (operator.kind, operator.name)
        found[key] = found[key] + operator if key in found else operator
    return sorted(found.values(), key=lambda operator: -operator.seconds)


def operators(trace: Mapping[str, Any], within: str | None = None) -> list[Operator]:
    """Torch's operators with the time of their own on the CPU, and the device's kernels, in the order they began.

    `within` keeps what began inside spans of that name (`torch.profiler.record_function`) only; kernels are kept by
    the operator or the driver's call that launched them: those of graphs and of Triton belong to no operator. A kernel
    has its operator's FLOPs and bytes, if it is the operator's only one. Where the driver gives no times, all that it
    launched is kept, and takes 0 s.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation" and e["name"] == within]
    calls = sorted((e for e in events if e.get("cat") == "cpu_op"), key=lambda e: (e["ts"], -e["dur"]))
    if within is not None:
        calls = [e for e in calls if any(start <= e["ts"] < end for start, end in spans)]
    started = {
        e.get("args", {}).get("correlation")
        for e in events
        if e.get("cat") in _DRIVER and (not e["ts"] or any(start <= e["ts"] < end for start, end in spans))
    }
    found = [
        Operator(e["name"], "torch", 1, own / 1e6, *_work(e)) for e, own in zip(calls, _own_times(calls), strict=True)
    ]
    launched: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") in _KERNELS:
            launched.setdefault(event["args"].get("External id", -1), []).append(event)
    by_id = {e["args"].get("External id"): e for e in calls}
    for identity, kernels in launched.items():
        work = _work(by_id[identity]) if identity in by_id and len(kernels) == 1 else (None, None)
        found += [
            Operator(k["name"], "kernel", 1, k["dur"] / 1e6, *work)
            for k in kernels
            if within is None or identity in by_id or k["args"].get("correlation", -1) in started
        ]
    return found


_LAUNCHES = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync", "MemcpyWithStream")


def launches(trace: Mapping[str, Any], within: str | None = None) -> int:
    """Calls of the driver that start something on the device: kernels, graphs, copies and fills. 0 without a device."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation" and e["name"] == within]
    return sum(
        e.get("cat") in _DRIVER
        and any(part in e["name"] for part in _LAUNCHES)
        and (within is None or not e["ts"] or any(start <= e["ts"] < end for start, end in spans))
        for e in events
    )


def _own_times(calls: Sequence[Mapping[str, Any]]) -> list[float]:
    """Duration of each call less that of the calls directly inside it, on its thread; `calls` in order of time, µs."""
    own = [call["dur"] for call in calls]
    open_calls: dict[Any, list[int]] = {}
    for index, call in enumerate(calls):
        stack = open_calls.setdefault(call["tid"], [])
        while stack and calls[stack[-1]]["ts"] + calls[stack[-1]]["dur"] <= call["ts"]:
            stack.pop()
        if stack:
            own[stack[-1]] -= call["dur"]
        stack.append(index)
    return own


def _work(event: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """(FLOPs, bytes) of a call from its shapes, None where no rule knows it."""
    arguments = event.get("args", {})
    dims, types = arguments.get("Input Dims"), arguments.get("Input type")
    rule = _RULES.get(event["name"].removeprefix("aten::"))
    if rule is None or dims is None or types is None:
        return None, None
    try:
        return rule(dims, [_SIZES.get(t, 0) for t in types])
    except (IndexError, TypeError, ValueError):  # a shape that the rule does not expect
        return None, None


_Rule = Callable[[list[Any], list[int]], tuple[float, float]]


def _matmul(first: int) -> _Rule:
    """[.., m, k] @ [.., k, n], the first operand at argument `first`."""

    def rule(dims: list[Any], sizes: list[int]) -> tuple[float, float]:
        one, other = dims[first], dims[first + 1]
        (*batch, m, k), n = one, other[-1] if len(other) > 1 else 1
        out = prod(batch) * m * n
        size = sizes[first]
        return 2.0 * out * k, float(size * (prod(one) + prod(other) + out))

    return rule


def _attention(rows: int, heads: int) -> _Rule:
    """q [B, .., d], k and v with S in place of R; `rows` and `heads` are their dimensions. The mask is left out."""

    def rule(dims: list[Any], sizes: list[int]) -> tuple[float, float]:
        q, k, v = dims[:3]
        flops = 2.0 * q[0] * q[heads] * q[rows] * k[rows] * (q[3] + v[3])
        return flops, float(sizes[0] * (prod(q) + prod(k) + prod(v) + prod(q[:3]) * v[3]))

    return rule


def _elementwise(dims: list[Any], sizes: list[int]) -> tuple[float, float]:
    """Operands, and a result as large as the largest. Its few FLOPs are not counted, as nowhere in this suite."""
    inputs = [(prod(d), s) for d, s in zip(dims, sizes, strict=True) if s and not (d and isinstance(d[0], list))]
    largest, size = max(inputs)
    return 0.0, float(sum(n * s for n, s in inputs) + largest * size)


_RULES: dict[str, _Rule] = {  # of two that call each other the inner one, which has the time and launches the kernel
    "mm": _matmul(0),
    "bmm": _matmul(0),
    "mv": _matmul(0),
    "addmm": _matmul(1),
    "baddbmm": _matmul(1),
    "_scaled_dot_product_flash_attention_for_cpu": _attention(2, 1),
    "_scaled_dot_product_cudnn_attention": _attention(2, 1),
    "_flash_attention_forward": _attention(1, 2),
    "_efficient_attention_forward": _attention(1, 2),
    **dict.fromkeys(("add", "sub", "mul", "div", "silu", "pow", "rsqrt", "cos", "sin", "neg"), _elementwise),
}
