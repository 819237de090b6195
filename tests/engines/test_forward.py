"""Raw forwards: the target's own tokens, every number of rows at every token, at the same context."""

from __future__ import annotations

import pytest

from tests.tiny import FAMILIES, runtime
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Meter, Request
from zbench.engines.forward import Forward
from zbench.engines.sampling import Sampling
from zbench.hardware import device

CPU = device.resolve("cpu")
PROMPTS = [[5, 9, 14, 200], [7, 8, 9, 10, 11, 12, 13]]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
def test_riders_change_no_token(family: str, temperature: float) -> None:
    model = runtime(family, "auto")
    request = Request(12, Sampling(temperature), (3, 4), frozenset({2}))
    alone = Autoregressive(model).generate(PROMPTS, request, Meter(CPU))
    assert Forward(model, (1, 3, 8, 40)).generate(PROMPTS, request, Meter(CPU)) == alone


def test_every_step_feeds_each_number_of_rows_once_at_one_context_down_and_up_in_turn() -> None:
    model, meter = runtime("zaya", "auto"), Meter(CPU)
    Forward(model, (1, 3, 8)).generate(PROMPTS, Request(4, Sampling(), (0, 0)), meter)
    steps, forwards = meter.records()
    assert [step.committed for step in steps] == [(1, 1)] * 4
    for index in (1, 2, 3):
        mine = [forward for forward in forwards if forward.step == index]
        assert [forward.rows for forward in mine] == ([8, 3, 1] if index % 2 else [1, 3, 8])
        assert {forward.context for forward in mine} == {5.5 + index - 1}
        assert {forward.role for forward in mine} == {"decode"}
        most = max(mine, key=lambda forward: forward.rows)
        assert most.experts is not None
        assert 1 < most.experts <= 5  # riders are routed like any row


def test_each_forward_begins_on_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind one that runs, what the host does for a forward costs nothing, which depended on the order."""
    model, meter, seen = runtime("smollm", "auto"), Meter(CPU), list[str]()
    monkeypatch.setattr(type(CPU), "synchronize", lambda self: seen.append("idle"))
    plain = meter.forward
    monkeypatch.setattr(meter, "forward", lambda *a, **k: seen.append(a[1]) or plain(*a, **k))
    Forward(model, (1, 3)).generate(PROMPTS, Request(3, Sampling(), (0, 0)), meter)
    assert seen == ["prefill", *["idle", "decode"] * 4]
