"""Whole decodes: tokens against `transformers`, and what the meter writes down about them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import FAMILIES, oracle, runtime
from zbench.engines import Shared, base
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Generated, Meter, Request
from zbench.engines.reference import Reference
from zbench.engines.sampling import Sampling
from zbench.errors import UserError
from zbench.hardware import device
from zbench.kernels import cpu
from zbench.models import families

CPU = device.resolve("cpu")
GREEDY = Sampling()
needs_native = pytest.mark.skipif(not cpu.available(), reason=f"native CPU kernels: {cpu.unavailable_reason()}")
EXECUTIONS = ["eager", pytest.param("native", marks=needs_native)]


def prompts(*sizes: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (size,), generator=generator).tolist() for size in sizes]


def reference(family: str, assisted: str | None = None) -> Reference:
    model = oracle(family)
    shared: Any = SimpleNamespace(
        transformers=model,
        model=SimpleNamespace(config=families.from_hf(model.config.to_dict())),
        dtype=torch.float32,
    )
    return Reference(shared, assisted)


def decode(engine: Any, ids: list[list[int]], request: Request) -> tuple[Generated, Meter]:
    meter = Meter(CPU)
    return engine.generate(ids, request, meter), meter


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, execution: str) -> None:
    ids = prompts(4, 23, 11)
    request = Request(24, GREEDY, (0, 0, 0), frozenset({2}))
    ours, _ = decode(Autoregressive(runtime(family, execution)), ids, request)
    for index, prompt in enumerate(ids):
        theirs, _ = decode(reference(family), [prompt], Request(24, GREEDY, (0,), frozenset({2})))
        assert (ours.outputs[index], ours.finish[index]) == (theirs.outputs[0], theirs.finish[0])


def test_prompt_lookup_changes_the_steps_but_not_the_tokens() -> None:
    pattern = prompts(6)[0] * 4
    request = Request(30, GREEDY, (0,))
    plain, plain_meter = decode(reference("smollm"), [pattern], request)
    assisted, assisted_meter = decode(reference("smollm", "prompt_lookup"), [pattern], request)
    assert assisted.outputs == plain.outputs
    assert len(assisted_meter.records()[1]) <= len(plain_meter.records()[1])
    assert {f.role for f in assisted_meter.records()[1]} <= {"prefill", "decode", "verify"}


def test_prompt_lookup_refuses_a_batch_in_one_line() -> None:
    with pytest.raises(UserError, match="batch to 1"):
        decode(reference("smollm", "prompt_lookup"), prompts(3, 3), Request(4, GREEDY, (0, 0)))


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=4), temperature=st.sampled_from([0.0, 1.0]))
def test_a_prompt_decodes_alike_alone_and_in_a_batch(sizes: list[int], temperature: float) -> None:
    engine, ids = Autoregressive(runtime("qwen3", "auto")), prompts(*sizes)
    seeds = tuple(range(len(sizes)))
    sampling = Sampling(temperature)
    together, _ = decode(engine, ids, Request(10, sampling, seeds, frozenset({2})))
    for index, prompt in enumerate(ids):
        alone, _ = decode(engine, [prompt], Request(10, sampling, (seeds[index],), frozenset({2})))
        assert alone.outputs[0] == together.outputs[index]


def test_sampled_output_is_reproducible_by_seed_and_differs_between_seeds() -> None:
    engine, ids = Autoregressive(runtime("smollm", "auto")), prompts(8)
    runs = [decode(engine, ids, Request(20, Sampling(1.0), (seed,)))[0].outputs for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_sequence_ends_with_its_eos_token_or_at_the_limit() -> None:
    engine, ids = Autoregressive(runtime("smollm", "auto")), prompts(8)
    free, _ = decode(engine, ids, Request(20, GREEDY, (0,)))
    assert free.finish == ["length"]
    assert len(free.outputs[0]) == 20
    eos = free.outputs[0][7]
    first = free.outputs[0].index(eos)
    stopped, _ = decode(engine, ids, Request(20, GREEDY, (0,), frozenset({eos})))
    assert stopped.outputs[0] == free.outputs[0][: first + 1]
    assert stopped.finish == ["eos"]


def test_tokens_gained_after_eos_or_beyond_the_limit_do_not_count() -> None:
    outputs, active, finish = [[1], [1], [1]], [True, True, False], ["length"] * 3
    request = Request(4, GREEDY, (0, 0, 0), frozenset({9}))
    counts = base.commit([[5, 9, 5], [5, 5, 5, 5], [5]], outputs, active, request, finish)  # type: ignore[arg-type]
    assert outputs == [[1, 5, 9], [1, 5, 5, 5], [1]]
    assert counts == (2, 3, 0)
    assert finish == ["eos", "length", "length"]
    assert active == [False, False, False]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("family", ["mistral", "zaya"])
def test_a_prompt_longer_than_one_prefill_forward_decodes_the_same(
    family: str, execution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ids = Autoregressive(runtime(family, execution)), prompts(40, 17, 8)
    request = Request(6, GREEDY, (0, 0, 0))
    whole, _ = decode(engine, ids, request)
    monkeypatch.setattr(base, "PREFILL_ROWS", 8)
    chunked, meter = decode(engine, ids, request)
    assert chunked.outputs == whole.outputs
    assert sum(f.role == "prefill" for f in meter.records()[1]) == 5


@pytest.mark.parametrize("engine", ["ours", "transformers"])
def test_every_token_is_credited_to_one_step_and_one_forward(engine: str) -> None:
    chosen = Autoregressive(runtime("smollm", "auto")) if engine == "ours" else reference("smollm")
    request = Request(12, GREEDY, (0, 0))
    generated, meter = decode(chosen, prompts(5, 9), request)
    steps, forwards = meter.records()
    produced = sum(len(output) for output in generated.outputs)
    assert sum(sum(step.committed) for step in steps) == produced == sum(f.committed for f in forwards)
    assert [f.role for f in forwards] == ["prefill"] + ["decode"] * 11
    assert [f.context for f in forwards[1:]] == [
        pytest.approx((7 if engine == "ours" else 9) + index) for index in range(11)
    ]
    inside: dict[int, float] = {}
    for forward in forwards:
        inside[forward.step] = inside.get(forward.step, 0.0) + forward.seconds
    for index, step in enumerate(steps):
        assert inside[index] + step.accept_seconds + step.commit_seconds <= step.seconds


def test_both_runtimes_count_the_same_experts_in_every_forward() -> None:
    ids, request = prompts(9), Request(12, GREEDY, (0,))
    meters = [
        decode(engine, ids, request)[1] for engine in (Autoregressive(runtime("zaya", "auto")), reference("zaya"))
    ]
    ours, theirs = (meter.records()[1] for meter in meters)
    assert [forward.experts for forward in ours] == [forward.experts for forward in theirs]
    assert [forward.flops for forward in ours][1:] == [forward.flops for forward in theirs][1:]
    assert len({forward.experts for forward in ours}) > 1
    assert all(0 <= forward.experts <= 5 for forward in ours)
    # A decoded token reads so many experts' weights, and the rest of the model.
    config = runtime("zaya", "auto").config
    expert = 4 * config.layers * 3 * config.width * config.ffn
    read = [f.bytes_read - f.experts * expert for f in ours[1:]]
    state = 4 * config.layers * 2 * config.kv_heads * config.head_dim
    assert [b - a for a, b in itertools.pairwise(read)] == pytest.approx([state] * 10)
    dense = decode(Autoregressive(runtime("smollm", "auto")), ids, request)[1].records()[1]
    assert {forward.experts for forward in dense} == {None}


@pytest.mark.parametrize("own", [{"family": "llama"}, {"family": "zaya", "kv_heads": 2, "head_dim": 8, "experts": 4}])
def test_random_weights_load_into_transformers_unchanged(own: dict[str, Any]) -> None:
    from zbench.models import loading

    shape = {"layers": 2, "width": 64, "ffn": 96, "heads": 4, "vocab": 300, "max_positions": 128, **own}
    model = loading.load({"config": shape, "weights": "random", "seed": 1}, dtype="float32")
    shared = Shared(model, torch.float32, CPU)
    request = Request(8, GREEDY, (0,))
    ids = prompts(7)
    assert (
        decode(Reference(shared), ids, request)[0].outputs
        == decode(Autoregressive(shared.target("auto")), ids, request)[0].outputs
    )
