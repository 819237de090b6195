"""The proof that training and decoding agree: a drafter that has learnt a few texts by heart drafts whole blocks of
them in the real engine, and one that is off by one place anywhere cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training import memory
from zbench.engines.dflash import DFlash as DFlashEngine
from zbench.engines.diffusion import Diffusion
from zbench.engines.eagle3 import Eagle3 as Eagle3Engine
from zbench.models import adapter, dflash, eagle3
from zbench.training.dflash import DFlash, DFlashSettings
from zbench.training.eagle3 import Eagle3, Eagle3Settings
from zbench.training.tidar import Tidar, TidarSettings
from zbench.training.trainer import Settings, train

pytestmark = pytest.mark.slow
BLOCK = 4


@pytest.mark.parametrize("family", ["smollm", "qwen3"])
def test_tidar(family: str, tmp_path: Path) -> None:
    target, model = memory.target(family), memory.runtime(family)
    objective = Tidar(target, TidarSettings(block=BLOCK, rank=16, soft=0.0, short=0.0), seed=0)
    train(objective, target, memory.corpus(family), tmp_path, Settings(batch=6, rate=1e-2, steps=120))
    trained = adapter.load_adapter(tmp_path, target.config)
    masks = adapter.MaskAdapter(trained, target.config, torch.float32, memory.CPU)
    engine = Diffusion(model, mask_id=299, block=BLOCK, adapter=masks)
    assert memory.tokens_per_step(engine, family) > 0.9 * BLOCK


def test_eagle3(tmp_path: Path) -> None:
    target, model, corpus = memory.target("smollm"), memory.runtime("smollm"), memory.corpus("smollm")
    objective = Eagle3(target, Eagle3Settings(draft_vocab=280, steps=BLOCK, soft=0.0), corpus.conversations, seed=0)
    train(objective, target, corpus, tmp_path, Settings(batch=6, rate=3e-3, steps=200))
    stored = eagle3.load_drafter(tmp_path, target.config)
    drafter = eagle3.Eagle3Drafter(stored.config, stored.tensors, model.embedding, torch.float32)
    engine = Eagle3Engine(model, drafter, depth=BLOCK)
    assert memory.tokens_per_step(engine, "smollm") > 0.9 * (BLOCK + 1)


def test_dflash(tmp_path: Path) -> None:
    target, model = memory.target("llama3"), memory.runtime("llama3")
    objective = DFlash(target, DFlashSettings(block=BLOCK, layers=1, soft=0.0), seed=0)
    train(objective, target, memory.corpus("llama3"), tmp_path, Settings(batch=6, rate=3e-3, steps=200))
    stored = dflash.load_drafter(tmp_path, target.config)
    engine = DFlashEngine(model, dflash.DFlashDrafter(stored.config, stored.tensors, model))
    assert memory.tokens_per_step(engine, "llama3") > 0.9 * BLOCK
