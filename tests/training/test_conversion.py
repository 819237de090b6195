"""Full conversion: the loss and its gradients against `transformers` under one dense mask, and a model that has learnt
a few conversations by heart: they are its own text then, and it drafts whole blocks of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.test_cli import refused, zbench
from tests.tiny import oracle
from tests.training import memory
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Meter
from zbench.engines.diffusion import Diffusion
from zbench.errors import UserError
from zbench.hardware.device import resolve
from zbench.models import loading
from zbench.models.model import build
from zbench.training.conversion import Conversion, ConversionSettings, tiled_blocks, unused_token
from zbench.training.corpus import Conversation
from zbench.training.target import Batch, Read, Target
from zbench.training.trainer import LOG, Settings, train

BLOCK, MASK = 4, 299


def batch() -> Batch:
    """Two conversations of different length, each a prompt and an answer."""
    generator = torch.Generator().manual_seed(5)
    roles = [[0] * 5 + [1] * 14, [0] * 3 + [1] * 4 + [0] * 2 + [1] * 3]
    return Batch.of(
        [
            Conversation(
                torch.randint(3, 290, (len(r),), generator=generator), torch.tensor(r, dtype=torch.uint8), 0, False
            )
            for r in roles
        ]
    )


@pytest.mark.parametrize("family", ["smollm", "llama3", "qwen3"])
@pytest.mark.parametrize(("alpha", "prompts"), [(0.5, False), (1.0, True), (None, False)])
def test_loss_and_gradients_are_those_of_one_dense_mask(family: str, alpha: float | None, prompts: bool) -> None:
    """The paper's figure 3 (left), as a mask over [text | masks] that `transformers` runs."""
    given, first = batch(), 2
    objective = Conversion(memory.target(family), ConversionSettings(alpha, BLOCK, MASK, prompts))
    seed = next(s for s in range(99) if torch.randint(BLOCK, (), generator=torch.Generator().manual_seed(s)) == first)
    scores = objective.score(Read.of_text(given), torch.Generator().manual_seed(seed))
    scores.loss.backward()

    model = oracle(family)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        before = embedding[MASK].clone()
        embedding[MASK] = embedding.mean(0)
    try:
        model.zero_grad()
        rows, longest = given.ids.shape
        places = torch.arange(longest)
        masks = torch.arange(first + BLOCK * -(-(longest - first) // BLOCK))  # the last block is whole, as in decoding
        block = (masks - first).div(BLOCK, rounding_mode="floor")  # -1: stands in no block
        clean = places[None] <= places[:, None]
        prefix = places[None] < (first + BLOCK * block)[:, None]
        own = block[None] == block[:, None]
        top = torch.cat([clean, torch.zeros(longest, len(masks), dtype=torch.bool)], 1)
        seen = torch.cat([top, torch.cat([prefix, own], 1)])
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min).expand(rows, 1, -1, -1)
        ids = torch.cat([given.ids, torch.full((rows, len(masks)), MASK)], 1)
        positions = torch.cat([places, masks]).expand(rows, -1)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        wanted = given.answer.clone()
        if prompts:
            wanted = places < torch.tensor(given.sizes)[:, None]
        wanted[:, 0] = False
        following = wanted[:, 1:]
        causal = F.cross_entropy(logits[:, : longest - 1][following], given.ids[:, 1:][following], reduction="sum")
        masked = wanted & (places >= first)
        filled = F.cross_entropy(logits[:, longest : 2 * longest][masked], given.ids[masked], reduction="sum")
        loss = (causal if alpha is None else (alpha * causal + filled) / (1 + alpha)) / wanted.sum()
        loss.backward()
        torch.testing.assert_close(scores.loss, loss, rtol=1e-5, atol=1e-5)
        assert scores.tokens == int((wanted if alpha is None else masked).sum()) and scores.weight == wanted.sum()
        for name, parameter in model.named_parameters():
            if name in objective.parameters:  # a tied head is the embedding
                got, want = objective.parameters[name].grad, parameter.grad
                error = (got - want).abs().max() / want.abs().max()
                assert error < 1e-4, (name, error)
    finally:
        with torch.no_grad():
            embedding[MASK] = before
        model.zero_grad()


def test_blocks_lie_side_by_side_and_leave_out_what_nobody_asks_for() -> None:
    wanted = torch.zeros(2, 11, dtype=torch.bool)
    wanted[0, 4:11], wanted[1, 2] = True, True
    anchors, real = tiled_blocks(wanted, 4, 1)
    assert anchors[0].tolist() == [1, 5, 9] and anchors[1, 0] == 1
    places = anchors[..., None] + torch.arange(4)
    assert [sorted(places[row][real[row]].tolist()) for row in range(2)] == [[4, 5, 6, 7, 8, 9, 10], [2]]
    for first in range(20):  # beyond the end, too
        anchors, real = tiled_blocks(wanted, 4, first)
        assert int(real.sum()) == int(wanted[:, first:].sum())


def test_the_mask_is_a_token_that_no_text_has() -> None:
    config = replace(memory.target("smollm").config, eos_ids=(299,))
    text = [Conversation(torch.tensor([3, 298]), torch.ones(2, dtype=torch.uint8), 0, False)]
    assert unused_token(text, config) == 297
    assert unused_token(text, config, 5) == 5
    assert unused_token(text, replace(config, mask_id=7)) == 7
    for wrong in (298, 299, 300):
        with pytest.raises(UserError, match="cannot be the mask"):
            unused_token(text, config, wrong)
    with pytest.raises(UserError, match="no mask token"):
        Conversion(memory.target("smollm"), ConversionSettings())


def test_the_log_begins_with_what_the_original_did(tmp_path: Path) -> None:
    """Else nobody can tell how much a conversion has forgotten."""
    target, corpus, said = memory.target("smollm"), memory.corpus("smollm"), list[str]()
    objective = Conversion(target, ConversionSettings(block=BLOCK, mask_id=MASK))
    batch = Batch.of(sorted(corpus.part(held_out=True), key=lambda c: len(c.ids)))
    read = Read.of_text(batch)
    with torch.no_grad():
        before = objective.score(read, torch.Generator().manual_seed(0), evaluate=True).parts
    settings = Settings(batch=6, rate=3e-3, steps=2)
    train(objective, target, corpus, tmp_path, settings, say=said.append)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [(line["step"], line["tokens"] > 0) for line in lines] == [(0, False), (1, True), (2, True)]
    for part, value in before.items():
        assert lines[0][f"held_out_loss_{part}"] == pytest.approx(value.item(), rel=1e-5)
        assert lines[-1][f"held_out_loss_{part}"] < value.item()
    first, last = (line["held_out_loss_autoregressive"] for line in (lines[0], lines[-1]))
    steps = [line for line in said if line.startswith("step ")]
    assert len(steps) == 3 and f"autoregressive {first:.3f}" in steps[0] and f"autoregressive {last:.3f}" in steps[-1]
    train(objective, target, corpus, tmp_path, replace(settings, steps=4), resume=True)
    assert [json.loads(line)["step"] for line in (tmp_path / LOG).read_text().splitlines()] == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["smollm", "llama3"])  # a tied head, and one of its own
def test_a_converted_model_drafts_and_goes_on_with_what_it_learnt(family: str, tmp_path: Path) -> None:
    target = memory.target(family)
    objective = Conversion(target, ConversionSettings(block=BLOCK, mask_id=MASK))
    train(objective, target, memory.corpus(family), tmp_path, Settings(batch=6, rate=3e-3, steps=120))
    loaded = loading.load({"path": str(tmp_path)}, "float32")
    assert loaded.config.mask_id == MASK and loading.load_tokenizer(loaded).encode("hello")
    model = build(loaded, torch.float32, memory.CPU, "auto")
    own = Autoregressive(model).generate(memory.prompts(), memory.REQUEST, Meter(resolve("cpu"))).outputs
    assert own == memory.answers(family)
    assert memory.tokens_per_step(Diffusion(model, MASK, BLOCK), family) > 0.9 * BLOCK


@pytest.mark.slow
def test_random_weights_learn_text_without_masks(tmp_path: Path) -> None:
    shape = {"family": "llama", "layers": 2, "width": 64, "ffn": 128, "heads": 4, "vocab": 300, "max_positions": 128}
    target = Target(loading.load({"config": shape, "weights": "random"}), torch.float32, memory.CPU)
    objective = Conversion(target, ConversionSettings(None, prompts=True))
    last = train(objective, target, memory.corpus("smollm"), tmp_path, Settings(batch=6, rate=3e-3, steps=150))
    assert last["accepted"] == 1.0 and "held_out_loss_diffusion" not in last
    loaded = loading.load({"path": str(tmp_path)}, "float32")
    assert loaded.config.mask_id is None
    model = build(loaded, torch.float32, memory.CPU, "auto")
    own = Autoregressive(model).generate(memory.prompts(), memory.REQUEST, Meter(resolve("cpu"))).outputs
    assert own == memory.answers("smollm")


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    asked = ["train", "full", "--model", "nobody", "--data", tmp_path, "--out", tmp_path / "out"]
    refused(zbench(*asked), "--minutes or --steps")
    refused(zbench(*asked, "--steps", 1), "unknown model 'nobody'")
