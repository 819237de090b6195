"""A tiny model and a few conversations in which it answered greedily: small enough to be learnt by heart."""

from __future__ import annotations

import functools

import torch

from tests.tiny import oracle
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Meter, Request, Stepper, generate
from zbench.engines.sampling import Sampling
from zbench.hardware.device import resolve
from zbench.models import families
from zbench.models.loading import LoadedModel
from zbench.models.model import Model, build
from zbench.training.corpus import Conversation, Corpus, Role
from zbench.training.target import Target

CPU = torch.device("cpu")
ANSWER = 48
REQUEST = Request(ANSWER, Sampling(), seeds=tuple(range(6)))


@functools.cache
def loaded(family: str) -> LoadedModel:
    model = oracle(family)
    return LoadedModel("tiny", None, families.from_hf(model.config.to_dict()), model.state_dict(), "tiny", None, "")


@functools.cache
def runtime(family: str) -> Model:
    return build(loaded(family), torch.float32, CPU, "auto")


@functools.cache
def target(family: str) -> Target:
    return Target(loaded(family), torch.float32, CPU)


@functools.cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(5, 12, (len(REQUEST.seeds),), generator=generator).tolist()
    return [torch.randint(3, 300, (size,), generator=generator).tolist() for size in sizes]


@functools.cache
def answers(family: str) -> list[list[int]]:
    return Autoregressive(runtime(family)).generate(prompts(), REQUEST, Meter(resolve("cpu"))).outputs


def corpus(family: str) -> Corpus:
    """Every conversation both to train on and held out: what is asked is memory."""
    pairs = zip(prompts(), answers(family), strict=True)
    conversations = [
        Conversation(
            torch.tensor(prompt + answer),
            torch.tensor([Role.PROMPT] * len(prompt) + [Role.ANSWER] * len(answer), dtype=torch.uint8),
            number,
            held_out,
        )
        for number, (prompt, answer) in enumerate(pairs)
        for held_out in (False, True)
    ]
    return Corpus({}, tuple(conversations))


def tokens_per_step(engine: Stepper, family: str) -> float:
    """Of decoding the same prompts again, the step that ends them and the one that reads them aside."""
    meter = Meter(resolve("cpu"))
    outputs = generate(engine, prompts(), REQUEST, meter).outputs
    assert outputs == answers(family)  # whatever was drafted, the text is the target's
    steps, _ = meter.records()
    gained = [count for step in steps[1:-1] for count in step.committed if count]
    return sum(gained) / len(gained)
