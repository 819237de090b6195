"""The default model, really: our logits and greedy tokens against `transformers`, on the packaged prompts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import relative_error
from zbench import prompts
from zbench.engines import Shared, create
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Meter, Request
from zbench.engines.reference import Reference
from zbench.engines.sampling import Sampling
from zbench.hardware import device
from zbench.kernels import cpu
from zbench.models import loading
from zbench.models.rows import Rows
from zbench.scenario import ENGINES, PromptSet

pytestmark = pytest.mark.slow
CPU = device.resolve("cpu")
TOKENS = 128
RECORDED = Path(__file__).parent / "serving" / "recorded"


@pytest.fixture(scope="module")
def real() -> Any:
    model = loading.load("smollm2-135m", dtype="float32")
    chosen = prompts.load(PromptSet(set="quickstart"))
    ids = prompts.encode(chosen, loading.load_tokenizer(model), None)
    named = {prompt.id: each for prompt, each in zip(chosen, ids, strict=True)}
    return SimpleNamespace(shared=Shared(model, torch.float32, CPU), ids=ids, by_name=named)


@pytest.mark.parametrize("execution", ["eager", "native"])
def test_logits_equal_transformers_to_a_ten_thousandth(real: Any, execution: str) -> None:
    if execution == "native" and not cpu.available():
        pytest.skip(f"native CPU kernels: {cpu.unavailable_reason()}")
    model = real.shared.target(execution)
    for ids in real.ids[::4]:
        with torch.no_grad():
            want = real.shared.transformers(torch.tensor([ids])).logits
        cache, split = model.new_cache(1, len(ids)), len(ids) // 2
        parts = []
        for part in (ids[:split], ids[split : split + 1], ids[split + 1 :]):
            parts.append(model.forward(Rows.chain(torch.tensor([part]), cache.lengths), cache).logits)
            cache.extend([len(part)])
        assert relative_error(torch.cat(parts, 1), want) < 1e-4


def test_greedy_tokens_equal_transformers_on_every_packaged_prompt(real: Any) -> None:
    assert len(real.ids) >= 20
    request = Request(TOKENS, Sampling(), (0,) * len(real.ids))
    want = Reference(real.shared).generate(real.ids, request, Meter(CPU)).outputs
    engine = Autoregressive(real.shared.target("auto"))
    assert engine.generate(real.ids, request, Meter(CPU)).outputs == want
    alone = [engine.generate([ids], Request(TOKENS, Sampling(), (0,)), Meter(CPU)).outputs[0] for ids in real.ids[:3]]
    assert alone == want[:3]


@pytest.mark.parametrize(
    ("name", "options", "tie"),
    [("eagle3", {"depth": 3}, 0.0), ("dflash", {"block": 8}, 0.2)],
)
def test_shipped_drafters_take_the_steps_that_they_take_in_vllm(real: Any, name: str, options: Any, tie: float) -> None:
    """vLLM 0.32 loaded the same folders (tests/serving/recorded): every step must gain the tokens that it gained there.

    DFlash's may gain others where the draft that was judged otherwise was nearly another token: by `tie` in its logit.
    """
    lines = (RECORDED / f"vllm_{name}_answers.jsonl").read_text().splitlines()
    spec = ENGINES[name](name=name, drafter={"zoo": f"smollm2-135m-{name}"}, **options)
    engine = create(name, spec.options, real.shared)
    drafted = watched(engine) if tie else []
    compared, differ = 0, 0
    for answer in map(json.loads, lines):
        drafted.clear()
        ids, meter, chunks = real.by_name[answer["prompt"]], Meter(CPU), answer["token_ids"]
        said = list(itertools.chain(*chunks))
        (output,) = engine.generate([ids], Request(len(said), Sampling(), (0,)), meter).outputs
        assert output == said
        steps = [step.committed[0] for step in meter.records()[0]]
        theirs = dict(zip(itertools.accumulate([0, *map(len, chunks)]), map(len, chunks), strict=False))
        for index, begin in enumerate(itertools.accumulate([0, *steps[:-1]])):
            if begin not in theirs:  # within a step of theirs that gained more
                continue
            compared += 1
            least = min(steps[index], theirs[begin])
            if steps[index] == theirs[begin]:
                continue
            differ += 1
            assert tie, (answer["prompt"], begin)
            logits = drafted[index - 1][0, least - 1]
            best, right = logits.topk(2).values, logits[output[begin + least - 1]]
            assert best[0] - (best[1] if right == best[0] else right) < tie, (answer["prompt"], begin)
    assert compared > 100
    assert differ <= 0.05 * compared


def watched(engine: Any) -> list[torch.Tensor]:
    """The logits [B, drafts, V] of every draft that a DFlash engine makes from now on."""
    drafted, draft = [], engine.drafter.draft

    def kept(*arguments: Any) -> Any:
        drafts = draft(*arguments)
        drafted.append(drafts.logits.clone())  # its memory is given out again
        return drafts

    engine.drafter.draft = kept
    return drafted
