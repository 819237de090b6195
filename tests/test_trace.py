"""Operators of a Chrome trace, against a recorded one of an MI300X and against counts that are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zbench import trace

MI300X = json.loads((Path(__file__).parent / "recorded_trace.json").read_text())


def event(name: str, start: float, duration: float, dims: Any = (), types: Any = (), **more: Any) -> dict[str, Any]:
    arguments = {"Input Dims": list(dims), "Input type": list(types)}
    return {"ph": "X", "cat": "cpu_op", "name": name, "tid": 1, "ts": start, "dur": duration, "args": arguments} | more


def test_a_recorded_kernel_has_the_work_of_the_operator_that_launched_it() -> None:
    kernel = next(o for o in trace.operators(MI300X) if o.kind == "kernel")
    assert (kernel.name, kernel.calls) == ("attn_fwd.kd", 1)
    assert kernel.seconds == pytest.approx(85232.206e-6)
    assert kernel.flops == 4 * 32 * 32768**2 * 128
    assert kernel.bytes == 4 * 32768 * 32 * 128 * 2
    assert 200e12 < kernel.flops / kernel.seconds < 210e12


def test_an_operator_has_the_time_that_it_does_not_spend_in_others() -> None:
    outer, inner = (o for o in trace.operators(MI300X) if o.kind == "torch")
    assert outer.seconds == pytest.approx((360.488 - 220.099) * 1e-6)
    assert inner.seconds == pytest.approx(220.099e-6)


def test_only_what_lies_within_the_spans_counts() -> None:
    span = {"ph": "X", "cat": "user_annotation", "name": "step", "ts": 10, "dur": 10, "args": {}}
    calls = [event("aten::mm", at, 1) for at in (5, 12, 18, 25)]
    assert len(trace.operators({"traceEvents": [span, *calls]}, within="step")) == 2
    assert trace.operators(MI300X, within="step") == []


def test_kernels_of_graphs_and_of_triton_count_by_the_call_of_the_driver_that_started_them() -> None:
    def launch(category: str, name: str, at: float, correlation: int) -> dict[str, Any]:
        return event(name, at, 1, cat=category, args={"correlation": correlation})

    def kernel(name: str, correlation: int, **more: int) -> dict[str, Any]:
        return event(name, 99, 4, cat="kernel", args={"correlation": correlation, **more})

    span = {"ph": "X", "cat": "user_annotation", "name": "step", "ts": 10, "dur": 10, "args": {}}
    calls = [launch("cuda_runtime", "cudaGraphLaunch", 12, 7), launch("cuda_driver", "cuLaunchKernelEx", 14, 8)]
    calls.append(launch("cuda_driver", "cuLaunchKernelEx", 25, 9))
    kernels = [kernel("a", 7), kernel("b", 7), kernel("c", 8, **{"External id": 0}), kernel("outside", 9)]
    found = trace.operators({"traceEvents": [span, *calls, *kernels]}, within="step")
    assert [o.name for o in found] == ["a", "b", "c"]


def test_what_the_driver_gives_no_times_of_is_counted_and_takes_none() -> None:
    span = {"ph": "X", "cat": "user_annotation", "name": "step", "ts": 10, "dur": 10, "args": {}}
    call = event("cudaGraphLaunch", 0, 0, cat="cuda_runtime", args={"correlation": 7})
    kernels = [event(name, 0, 0, cat="kernel", args={"correlation": 7}) for name in ("a", "b")]
    content = {"traceEvents": [span, call, *kernels]}
    assert [(o.name, o.seconds) for o in trace.operators(content, within="step")] == [("a", 0.0), ("b", 0.0)]
    assert trace.launches(content, within="step") == 1


def test_threads_do_not_nest() -> None:
    calls = [event("a", 0, 10), event("b", 2, 3, tid=2), event("c", 2, 3), event("d", 6, 1), event("e", 11, 1)]
    own = {o.name: o.seconds * 1e6 for o in trace.operators({"traceEvents": calls})}
    assert own == pytest.approx({"a": 6, "b": 3, "c": 3, "d": 1, "e": 1})


@pytest.mark.parametrize(
    ("name", "dims", "flops", "elements"),
    [
        ("mm", [[3, 8], [8, 5]], 2 * 3 * 8 * 5, 24 + 40 + 15),
        ("addmm", [[5], [3, 8], [8, 5]], 2 * 3 * 8 * 5, 24 + 40 + 15),
        ("bmm", [[2, 3, 8], [2, 8, 5]], 2 * 2 * 3 * 8 * 5, 48 + 80 + 30),
        ("mv", [[3, 8], [8]], 2 * 3 * 8, 24 + 8 + 3),
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            [[1, 9, 1, 64], [1, 3, 4, 64], [1, 3, 4, 64]],
            4 * 9 * 4 * 64,
            2 * 9 * 64 + 2 * 3 * 4 * 64,
        ),
        ("mul", [[4, 6], [6]], 0, 24 + 6 + 24),
    ],
)
def test_flops_and_bytes_follow_from_shapes(name: str, dims: list, flops: float, elements: int) -> None:
    (found,) = trace.operators({"traceEvents": [event(f"aten::{name}", 0, 1, dims, ["c10::BFloat16"] * len(dims))]})
    assert (found.flops, found.bytes) == (flops, 2 * elements)


def test_operators_within_each_other_count_once() -> None:
    rows, heads = [[1, 9, 1, 64], [1, 9, 4, 64], [1, 9, 4, 64]], [[1, 1, 9, 64], [1, 4, 9, 64], [1, 4, 9, 64]]
    calls = [
        event("aten::_scaled_dot_product_efficient_attention", 0, 9, rows, ["float"] * 3),
        event("aten::_efficient_attention_forward", 1, 7, heads, ["float"] * 3),
        event("aten::square", 20, 9, [[4, 6]], ["float"]),
        event("aten::pow", 21, 7, [[4, 6], []], ["float", "Scalar"]),
    ]
    found = trace.operators({"traceEvents": calls})
    assert sum(o.flops or 0 for o in found) == 4 * 9 * 4 * 64
    assert sum(o.bytes or 0 for o in found) == 4 * (2 * 9 * 64 + 2 * 9 * 4 * 64 + 2 * 24)


def test_what_no_rule_knows_is_unknown_and_not_zero() -> None:
    (found,) = trace.operators({"traceEvents": [event("aten::index", 0, 1, [[49152, 576], []], ["float", ""])]})
    assert found.flops is None and found.bytes is None
    both = trace.gathered([found, trace.Operator("aten::index", "torch", 1, 2.0, 5.0, 5.0)])
    assert both == [trace.Operator("aten::index", "torch", 2, found.seconds + 2.0, None, None)]


def test_launches_are_calls_that_start_something_on_the_device() -> None:
    def call(name: str, ts: float, category: str = "cuda_runtime") -> dict[str, object]:
        return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": 1.0}

    span = {"ph": "X", "cat": "user_annotation", "name": "step", "ts": 10, "dur": 10}
    started = [call("cudaLaunchKernel", 11), call("cuLaunchKernelEx", 12, "cuda_driver"), call("cudaGraphLaunch", 13)]
    started += [call("hipExtModuleLaunchKernel", 14), call("hipMemcpyWithStream", 15), call("cudaMemsetAsync", 16)]
    others = [call("cudaDeviceSynchronize", 17), call("cudaLaunchKernel", 30), call("LaunchKernel", 11, "cpu_op")]
    events = {"traceEvents": [span, *started, *others]}
    assert trace.launches(events, within="step") == len(started)
    assert trace.launches(events) == len(started) + 1
