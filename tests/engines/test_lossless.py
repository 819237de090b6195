"""The check beside every run: what it calls exact, a near-tie, and different."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.tiny import runtime
from zbench.engines import lossless
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Meter, Request
from zbench.engines.sampling import Sampler, Sampling
from zbench.errors import UserError
from zbench.hardware import device

PROMPT = [5, 9, 14, 200]


def test_a_prompt_of_several_chunks_is_checked_where_its_output_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = runtime("smollm", "auto"), [5, 9, 14, 200, 7, 8, 9, 10, 11]
    request = Request(6, Sampling(), (3,))
    output = Autoregressive(model).generate([prompt], request, Meter(device.resolve("cpu"))).outputs[0]
    for rows in (2, 4, 9, 10):  # whole chunks of the prompt decide nothing
        monkeypatch.setattr(lossless, "PREFILL_ROWS", rows)
        assert lossless.check(model, prompt, output, request, 0).verdict == "exact"
        found = lossless.check(model, prompt, [(output[0] + 1) % 300, *output[1:]], request, 0)
        assert (found.verdict, found.first) == ("different", 0)


def test_logits_that_are_no_numbers_are_no_result() -> None:
    class Broken:
        """A target whose weights are damaged: every logit is NaN."""

        def __init__(self) -> None:
            self.model = runtime("smollm", "auto")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.model, name)

        def forward(self, *given: Any, **named: Any) -> Any:
            output = self.model.forward(*given, **named)
            return replace(output, logits=output.logits * float("nan"))

    with pytest.raises(UserError, match="logits are NaN or infinite"):
        lossless.check(Broken(), PROMPT, [0, 0, 0], Request(3, Sampling(), (3,)), 0)  # type: ignore[arg-type]


def test_a_servers_tokens_of_another_vocabulary_are_no_output_of_the_target() -> None:
    with pytest.raises(UserError, match="the output has token 10000000, the target 300: not the model that is served"):
        lossless.check(runtime("smollm", "auto"), PROMPT, [5, 10**7, 6], Request(3, Sampling(), (3,)), 0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_token_is_a_near_tie_only_within_rounding(
    dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runtime("smollm", "auto", dtype)
    request = Request(8, Sampling(temperature), (3,))
    output = Autoregressive(model).generate([PROMPT], request, Meter(device.resolve("cpu"))).outputs[0]
    assert lossless.check(model, PROMPT, output, request, 0).verdict == "exact"
    wrong = [*output[:7], (output[7] + 1) % 300]  # the last token: nothing follows from it
    found = lossless.check(model, PROMPT, wrong, request, 0)
    assert (found.verdict, found.mismatches, found.first) == ("different", 1, 7)
    assert found.gap is not None
    assert found.gap > 0
    for rounding in (lossless.LOGIT_ROUNDING, lossless.MASS_ROUNDING):
        monkeypatch.setitem(rounding, dtype, 10.0)
    assert lossless.check(model, PROMPT, wrong, request, 0).verdict == "near-tie"


@pytest.mark.parametrize("size", [2.0, 3.9, 4.0, 15.0])
def test_logits_that_round_apart_by_a_step_each_are_a_near_tie_and_no_further(size: float) -> None:
    sampler = Sampler(Sampling(), (3,), 1, torch.device("cpu"))
    top = torch.tensor(size).bfloat16()
    step = float(torch.nextafter(top, torch.tensor(99.0).bfloat16()) - top)
    verdicts = []
    for steps in (2, 3):
        logits = torch.tensor([float(top), float(top) - steps * step])
        gap, allowed = lossless._gap(logits, 1, sampler, 0, torch.bfloat16)
        verdicts.append(gap <= allowed)
    assert verdicts == [True, False]
