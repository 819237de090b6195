"""The default model, really: our logits and greedy tokens against `transformers`, on the packaged prompts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
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
from zbench.engines.dflash import DFlash
from zbench.engines.reference import Reference
from zbench.engines.sampling import Sampling
from zbench.hardware import device
from zbench.kernels import cpu
from zbench.models import loading, zoo
from zbench.models.dflash import DFlashDrafter, load_drafter
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


@pytest.mark.parametrize("name", ["eagle3", "dflash"])
def test_shipped_drafters_take_the_steps_that_they_take_in_vllm(real: Any, name: str) -> None:
    """vLLM 0.32 loaded the same folders (tests/serving/recorded): every step must gain the tokens that it gained there.

    On a CPU its RMSNorm takes one weight where its DFlash hands it one per layer: the context's keys of every layer are
    normed by the first layer's, in the test too.
    """
    lines = (RECORDED / f"vllm_{name}_answers.jsonl").read_text().splitlines()
    if name == "eagle3":
        spec = ENGINES[name](name=name, drafter={"zoo": f"smollm2-135m-{name}"}, depth=3)
        engine: Any = create(name, spec.options, real.shared)
    else:
        target = real.shared.target("eager")
        stored = load_drafter(zoo.drafter("smollm2-135m-dflash", "dflash"), target.config)
        drafter = DFlashDrafter(stored.config, stored.tensors, target, native=False)
        drafter._key_norms = drafter._key_norms[:1].expand_as(drafter._key_norms)
        engine = DFlash(target, drafter, block=8)
    for ours, theirs in steps_here_and_there(real, engine, lines):
        assert ours == theirs


def test_the_shipped_dflash_gains_more_with_every_layers_own_norms(real: Any) -> None:
    """As the engine runs it: mostly the same steps, and fewer."""
    spec = ENGINES["dflash"](name="dflash", drafter={"zoo": "smollm2-135m-dflash"}, block=8)
    lines = (RECORDED / "vllm_dflash_answers.jsonl").read_text().splitlines()
    compared = alike = saved = 0
    for ours, theirs in steps_here_and_there(real, create("dflash", spec.options, real.shared), lines):
        saved += len(theirs) - len(ours)
        there = dict(zip(itertools.accumulate([0, *theirs]), theirs, strict=False))
        for begin, gained in zip(itertools.accumulate([0, *ours[:-1]]), ours, strict=True):
            compared += begin in there
            alike += there.get(begin) == gained
    assert compared > 90 and alike > 0.85 * compared and saved > 0


def steps_here_and_there(real: Any, engine: Any, lines: list[str]) -> Iterator[tuple[list[int], list[int]]]:
    """Of each recorded answer, which must be ours: the tokens that each step gains here and gained there."""
    for answer in map(json.loads, lines):
        ids, meter, chunks = real.by_name[answer["prompt"]], Meter(CPU), answer["token_ids"]
        said = list(itertools.chain(*chunks))
        (output,) = engine.generate([ids], Request(len(said), Sampling(), (0,)), meter).outputs
        assert output == said, answer["prompt"]
        yield [step.committed[0] for step in meter.records()[0]], list(map(len, chunks))
