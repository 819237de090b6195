"""Decode speed, side by side in one process: ratios of medians, alternating so that the machine's drift cancels.

    pytest benchmarks/test_decode.py -s

pytest-benchmark keeps our side's raw timings (`--benchmark-save`, `--benchmark-compare`); each ratio is printed and
stored in `extra_info`. Nothing here asserts a duration.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from zbench.engines import Shared
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Meter, Request
from zbench.engines.reference import Reference
from zbench.engines.sampling import Sampling
from zbench.hardware import device, roofs
from zbench.models import loading
from zbench.models.rows import Rows

TOKENS, ROUNDS, CONTEXT = 48, 5, 128
REQUEST = Request(TOKENS, Sampling(), (0,))


@pytest.fixture(scope="module")
def shared() -> Shared:
    return Shared(loading.load("smollm2-135m"), torch.bfloat16, device.resolve("cpu"))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return torch.randint(100, 40_000, (40,), generator=torch.Generator().manual_seed(0)).tolist()


def alternate(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each side, order reversed every round (A B, B A)."""
    for call in sides.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds):
        for name in list(sides) if index % 2 == 0 else list(reversed(sides)):
            start = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start)
    return times


def report(benchmark: Any, title: str, times: dict[str, list[float]], ours: str, other: str, per: int = 1) -> None:
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratio = middle[other] / middle[ours]
    benchmark.extra_info.update({"ratio": ratio, "medians": middle})
    print(f"\n{title}: {ratio:.2f}x  " + "  ".join(f"{name} {per / value:.1f}/s" for name, value in middle.items()))


def test_autoregressive_against_transformers_generate(benchmark: Any, shared: Shared, prompt: list[int]) -> None:
    ours, peer = Autoregressive(shared.target("auto")), Reference(shared)

    def decode(engine: Any) -> Callable[[], Any]:
        return lambda: engine.generate([prompt], REQUEST, Meter(shared.device))

    times = alternate({"ours": decode(ours), "transformers": decode(peer)}, ROUNDS)
    report(benchmark, f"decode {TOKENS} tokens ({ours.kernels['forward']})", times, "ours", "transformers", TOKENS)
    benchmark.pedantic(decode(ours), rounds=ROUNDS)


def test_autoregressive_against_llama_cpp(benchmark: Any, shared: Shared, prompt: list[int]) -> None:
    """ZBENCH_LLAMA_GGUF names a bfloat16 GGUF of the same weights; llama-cpp-python is built on this machine."""
    llama_cpp = pytest.importorskip("llama_cpp")
    if not (file := os.environ.get("ZBENCH_LLAMA_GGUF")):
        pytest.skip("ZBENCH_LLAMA_GGUF is not set")
    threads = torch.get_num_threads()
    peer = llama_cpp.Llama(file, n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False)
    engine = Autoregressive(shared.target("auto"))

    def ours() -> float:
        meter = Meter(shared.device)
        engine.generate([prompt], REQUEST, meter)
        return sum(step.seconds for step in meter.records()[0][1:])

    def theirs() -> float:
        peer.reset()
        peer.eval(prompt)
        start = time.perf_counter()
        for _ in range(TOKENS - 1):
            peer.eval([peer.sample(temp=0.0)])
        return time.perf_counter() - start

    sides = {"ours": ours, "llama.cpp": theirs}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(2 * ROUNDS):  # decode alone, so each side times itself
        for name in list(sides) if index % 2 == 0 else list(reversed(sides)):
            times[name].append(sides[name]())
    title = f"decode steps ({engine.kernels['forward']})"
    report(benchmark, title, times, "ours", "llama.cpp", TOKENS - 1)
    benchmark.pedantic(ours, rounds=ROUNDS)


def test_native_forward_against_torch_forward(benchmark: Any, shared: Shared) -> None:
    sides = {name: _forward(shared, name, 1) for name in ("auto", "eager")}
    report(benchmark, "forward of 1 row, native against eager torch", alternate(sides, ROUNDS), "auto", "eager")
    benchmark.pedantic(sides["auto"], rounds=20)


@pytest.mark.parametrize("rows", [2, 4, 8, 16, 32, 64])
def test_forward_of_many_rows_against_one_row(benchmark: Any, shared: Shared, rows: int) -> None:
    sides = {f"{rows} rows": _forward(shared, "auto", rows), "1 row": _forward(shared, "auto", 1)}
    before, times, after = _read_rate(shared), alternate(sides, 20), _read_rate(shared)
    report(benchmark, f"1 row over {rows} rows", times, f"{rows} rows", "1 row")
    print(f"memory read {before} before and {after} after, which says how much of a row's time it is")
    benchmark.pedantic(sides[f"{rows} rows"], rounds=20)


def test_instrumentation_on_against_off(benchmark: Any, shared: Shared, prompt: list[int]) -> None:
    engine = Autoregressive(shared.target("auto"))

    def metered() -> None:
        meter = Meter(shared.device)
        engine.generate([prompt], REQUEST, meter)

    def bare() -> None:
        engine.generate([prompt], REQUEST, _Silent(shared.device))

    times = alternate({"metered": metered, "bare": bare}, 15)
    report(benchmark, "decode without instrumentation over with", times, "metered", "bare", TOKENS)
    benchmark.pedantic(metered, rounds=ROUNDS)


class _Silent(Meter):
    """Takes no marks and keeps nothing."""

    def begin_step(self) -> None: ...

    def end_step(self) -> None: ...

    def gained(self, *_: Any) -> None: ...  # type: ignore[override]

    def phase(self, name: str) -> Any:  # type: ignore[override]
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def forward(self, model, role, rows, cache, *, logits=None, capture=(), name="target"):  # type: ignore[no-untyped-def, override]
        return model.forward(rows, cache, logits=logits, capture=capture)


def _read_rate(shared: Shared) -> str:
    kept = roofs.cached(shared.device)
    if kept is None:
        return "at a rate unknown without `zbench roofs`,"
    sample = roofs.sample_read(shared.device, kept["bandwidth"]["read"])
    return sample.unavailable or f"{sample.value / 1e9:.1f} GB/s"


def _forward(shared: Shared, execution: str, rows: int) -> Callable[[], Any]:
    model = shared.target(execution)
    cache = model.new_cache(1, CONTEXT + rows)
    ids = torch.randint(0, model.config.vocab, (1, CONTEXT + rows))
    model.forward(Rows.chain(ids[:, :CONTEXT], cache.lengths), cache)
    cache.extend([CONTEXT])
    fed = Rows.chain(ids[:, CONTEXT:], cache.lengths)
    return lambda: model.forward(fed, cache)
