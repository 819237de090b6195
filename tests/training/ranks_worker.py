"""One rank (or the only process) of a training of a tiny model, by torchrun's variables: OUT BATCH STEPS [UNTIL]."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch

from zbench import ranks
from zbench.models import loading
from zbench.training.conversion import Conversion, ConversionSettings
from zbench.training.corpus import Conversation, Corpus, Role
from zbench.training.target import Target
from zbench.training.trainer import PROGRESS, Scores, Settings, train

SHAPE = {"family": "llama", "layers": 2, "width": 32, "ffn": 48, "heads": 4, "kv_heads": 2, "vocab": 300}


def corpus() -> Corpus:
    """Four conversations to train on, of different lengths, and one held out."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, size in enumerate((12, 25, 17, 21, 15)):
        ids = torch.randint(3, 290, (size,), generator=generator)
        roles = torch.full((size,), int(Role.ANSWER), dtype=torch.uint8)
        roles[: 2 + number] = Role.PROMPT
        made.append(Conversation(ids, roles, number, held_out=number == 4))
    return Corpus({}, tuple(made))


def main(out: Path, batch: int, steps: int, until: int | None = None) -> None:
    """Go on with what is in `out`, and on rank 0 end in failure after step `until`."""
    torch.set_num_threads(1)
    loaded = loading.load({"config": {**SHAPE, "max_positions": 64}, "weights": "random"}, "float32")
    target = Target(loaded, torch.float32, torch.device("cpu"))
    objective = Conversion(target, ConversionSettings(block=4, mask_id=299))
    settings = Settings(batch=batch, rate=1e-3, steps=steps)
    with ranks.joined("the last checkpoint is kept") as world:
        score, calls = objective.score, 0

        def stopping(*arguments: Any, **options: Any) -> Scores:
            nonlocal calls
            calls += not options.get("evaluate")
            if world.rank == 0 and until is not None and calls > until:
                raise InterruptedError
            return score(*arguments, **options)

        objective.score = stopping  # type: ignore[method-assign]
        resume = world.told((out / PROGRESS).exists())
        say = functools.partial(print, flush=True)
        train(objective, target, corpus(), out, settings, resume, lambda done, what: None, say, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
