"""What a speculative step costs in autoregressive steps: the acceptance at which each setting breaks even here.

    pytest benchmarks/test_speculative.py -s

Drafters have the published shape and random weights; acceptance is synthetic (nothing accepted), so that every step
does the same work. The ratio printed is the step's time over an autoregressive step's, sides alternating.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks.test_decode import ROUNDS
from zbench import engines
from zbench.engines import Shared
from zbench.engines.base import Meter, Request
from zbench.engines.sampling import Sampling
from zbench.hardware import device
from zbench.models import loading
from zbench.scenario import ENGINES

STEPS = 12
NOTHING = {"length": 1.0}
DRAFTER, ADAPTER = {"random": True}, {"random": True, "rank": 24}


def tidar(block: int, proposals: int) -> dict[str, Any]:
    choice = {"outcomes": "prefix"} if proposals < block else {}
    return {"name": "diffusion", "adapter": ADAPTER, "block_size": block, "proposals": proposals, **choice}


SETTINGS: dict[str, dict[str, Any]] = {
    "eagle3 chain of 4": {"name": "eagle3", "drafter": DRAFTER, "depth": 4},
    "eagle3 tree of 16": {"name": "eagle3", "drafter": DRAFTER, "depth": 4, "top_k": 4, "tokens": 16},
    **{f"dflash block of {b}": {"name": "dflash", "drafter": {**DRAFTER, "layers": 3}, "block": b} for b in (4, 8)},
    **{f"tidar block of {b}, {p} proposals": tidar(b, p) for b, p in ((4, 1), (4, 2), (4, 4), (8, 1), (8, 3), (8, 8))},
}


@pytest.fixture(scope="module")
def shared() -> Shared:
    return Shared(loading.load("smollm2-135m"), torch.bfloat16, device.resolve("cpu"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_speculative_step_against_autoregressive_step(benchmark: Any, shared: Shared, setting: str) -> None:
    spec = ENGINES[SETTINGS[setting]["name"]](**SETTINGS[setting], synthetic=NOTHING)
    sides = {
        setting: engines.create(spec.name, spec.options, shared),
        "autoregressive": engines.create("autoregressive", {"execution": "auto"}, shared),
    }
    prompt = torch.randint(100, 40_000, (40,), generator=torch.Generator().manual_seed(0)).tolist()

    def steps(engine: Any) -> list[float]:
        meter = Meter(shared.device)
        engine.generate([prompt], Request(STEPS + 1, Sampling(), (0,)), meter)
        return [step.seconds for step in meter.records()[0][1:]]

    times: dict[str, list[float]] = {side: [] for side in sides}
    for index in range(ROUNDS + 1):
        for side in list(sides) if index % 2 == 0 else list(reversed(sides)):
            measured = steps(sides[side])
            times[side] += measured if index else []  # the first round warms up
    middle = {side: sorted(values)[len(values) // 2] for side, values in times.items()}
    ratio = middle[setting] / middle["autoregressive"]
    benchmark.extra_info.update({"ratio": ratio, "medians": middle})
    print(f"\n{setting}: a step costs {ratio:.2f} autoregressive steps = break-even acceptance length")
    benchmark.pedantic(lambda: time.sleep(0), rounds=1)  # the ratio above is the result
