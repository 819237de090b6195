"""Engines on one model have its weights once, and those of a drafter that several of them have."""

from __future__ import annotations

from typing import Any

import torch

from zbench import scenario
from zbench.engines import Shared, create
from zbench.hardware import device
from zbench.models import loading


def shared() -> Shared:
    return Shared(loading.load("zbench-tiny", "float32"), torch.float32, device.resolve("cpu"))


def built(by: Shared, name: str, **options: Any) -> Any:
    return create(name, scenario.ENGINES[name](name=name, **options).options, by)


def test_settings_of_one_drafter_have_it_once_and_other_drafters_have_their_own() -> None:
    by = shared()
    random = {"random": True, "vocab": 64}
    one, other = (built(by, "eagle3", drafter=random, depth=depth) for depth in (2, 4))
    assert one.drafter is other.drafter
    assert built(by, "eagle3", drafter={**random, "seed": 1}).drafter is not one.drafter
    blocks = [built(by, "dflash", drafter={"random": True, "layers": 1}, block=block) for block in (2, 4)]
    assert blocks[0].drafter is blocks[1].drafter is not one.drafter
    narrow = built(by, "dflash", drafter={"random": True, "layers": 1}, block=4, draft_vocab=50)
    assert narrow.drafter is not blocks[0].drafter
    adapters = [built(by, "diffusion", adapter={"random": True}, block_size=4, proposals=n) for n in (1, 2)]
    assert adapters[0].adapter is adapters[1].adapter
    assert built(by, "diffusion", adapter={"random": True}, block_size=8).adapter is not adapters[0].adapter


def test_what_was_loaded_is_let_go_of_and_other_runtimes_load_their_own() -> None:
    by = shared()
    kept = built(by, "eagle3", drafter={"random": True, "vocab": 64}).drafter
    eager = built(by, "eagle3", drafter={"random": True, "vocab": 64}, execution="eager").drafter
    assert eager is not kept or by.target("auto").execution == "eager"
    by.release()
    assert built(by, "eagle3", drafter={"random": True, "vocab": 64}).drafter is not kept
