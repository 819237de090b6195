"""Plans: what an engine is said to feed is what it records, and TiDAR's step in numbers worked out by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zbench import scenario
from zbench.engines import Shared, create, plans, synthetic
from zbench.engines.base import Meter, Request
from zbench.engines.sampling import Sampling
from zbench.errors import UserError
from zbench.hardware import device
from zbench.models import dflash, eagle3, loading
from zbench.models.config import ModelConfig
from zbench.models.rows import Rows

SHAPE = {
    "family": "llama", "layers": 5, "width": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "vocab": 300,
    "max_positions": 256,
}  # fmt: skip
TARGET = ModelConfig.from_fields(SHAPE)
SETTINGS: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "reference": {},
    "eagle3": {"drafter": {"random": True, "vocab": 64}, "depth": 3, "synthetic": {"length": 2.5}},
    "dflash": {"drafter": {"random": True, "layers": 2}, "block": 5, "synthetic": {"length": 2.5}},
}


def options(engine: str, **given: Any) -> dict[str, Any]:
    return scenario.ENGINES[engine](name=engine, **given).options


@pytest.fixture(scope="module")
def shared() -> Shared:
    loaded = loading.load({"config": SHAPE, "weights": "random"}, "float32")
    return Shared(loaded, torch.float32, device.resolve("cpu"))


@pytest.mark.parametrize("engine", SETTINGS)
def test_a_plan_costs_what_the_engine_records(engine: str, shared: Shared) -> None:
    chosen = options(engine, **SETTINGS[engine])
    meter = Meter(shared.device)
    batch = 1 if engine == "reference" else 2
    request = Request(16, Sampling(), (3,) * batch, frozenset())
    create(engine, chosen, shared).generate([[5, 6, 7, 8]] * batch, request, meter)
    # The drafters' first step reads less: nothing was verified before it.
    recorded = [forward for forward in meter.records()[1] if forward.step == 2]
    planned = plans.plan(engine, chosen, TARGET).forwards
    assert len(recorded) == len(planned)
    for found, forward in zip(recorded, planned, strict=True):
        cost = forward.cost([int(found.context)] * batch, 4)
        assert (found.model, found.role, found.rows) == (forward.model, forward.role, forward.rows)
        assert (found.flops, found.bytes_read, found.bytes_written) == (cost.flops, cost.bytes_read, cost.bytes_written)


def test_a_tree_feeds_its_beam_level_by_level_and_verifies_all_nodes() -> None:
    chosen = options("eagle3", drafter={"random": True}, depth=3, top_k=4, tokens=12)
    planned = plans.plan("eagle3", chosen, TARGET)
    assert [(f.role, f.rows, f.logits) for f in planned.forwards] == [
        ("draft", 4, 1), ("draft", 4, 4), ("draft", 4, 4), ("verify", 13, 13),
    ]  # fmt: skip
    assert planned.forwards[-1].pairs == 1 + 4 * (2 + 3 + 4)  # four nodes on each level
    assert planned.drafts == 3
    assert "tree" in planned.notes[0]


def test_a_plan_refuses_what_its_engine_refuses() -> None:
    with pytest.raises(UserError, match="drafts 3 to 3 tokens, not 9"):
        plans.plan("eagle3", options("eagle3", drafter={"random": True}, depth=3, tokens=9), TARGET)
    with pytest.raises(UserError, match="org/drafter is not known here"):
        plans.plan("dflash", options("dflash", drafter={"hub": "org/drafter"}), TARGET)


def test_a_drafters_folder_tells_its_shape(tmp_path: Path) -> None:
    of_eagle, of_dflash = eagle3.random_drafter(TARGET, draft_vocab=64), dflash.random_drafter(TARGET, layers=2)
    eagle3.save_drafter(tmp_path / "eagle3", of_eagle)
    dflash.save_drafter(tmp_path / "dflash", of_dflash, TARGET)
    assert eagle3.read_config(tmp_path / "eagle3", TARGET) == of_eagle.config
    assert dflash.read_config(tmp_path / "dflash", TARGET) == of_dflash.config
    from_folder = plans.plan("eagle3", options("eagle3", drafter={"path": str(tmp_path / "eagle3")}), TARGET)
    random = plans.plan("eagle3", options("eagle3", drafter={"random": True, "vocab": 64}), TARGET)
    assert [f.cost([9], 2) for f in from_folder.forwards] == [f.cost([9], 2) for f in random.forwards]
    with pytest.raises(UserError, match="made for a target with 300 tokens"):
        eagle3.read_config(tmp_path / "eagle3", replace(TARGET, vocab=400))


# --- Diffusion ---


def diffusion(block: int, proposals: int | str) -> plans.Plan:
    return plans.plan("diffusion", {"block_size": block, "proposals": proposals}, TARGET)


def test_tidar_feeds_its_drafts_and_a_block_for_every_outcome() -> None:
    everything = diffusion(16, "all")
    [forward] = everything.forwards
    assert forward.rows == 272  # the paper's q_len = B (B + 1)
    # 16 causal rows; block r of 16 rows sees r drafts and its own 16: 16 * (1 + .. + 16) + 16 * 16 * 16.
    assert forward.pairs == 136 + 16 * 136 + 4096
    assert forward.logits == 32
    assert (everything.drafts, everything.outcomes) == (15, None)


def test_tidar_with_two_proposals_in_numbers() -> None:
    planned = diffusion(4, 2)
    [forward] = planned.forwards
    assert (forward.role, forward.rows, forward.logits) == ("draft+verify", 12, 8)
    assert forward.pairs == 10 + 4 * (1 + 4) + 4 * (2 + 4)
    assert planned.outcomes == (1, 2)
    once = plans.on_target(TARGET, "verify", 12, forward.pairs, 8).cost([100], 2)
    cost = forward.cost([100], 2)
    assert cost.flops == once.flops
    assert cost.weight_bytes - once.weight_bytes == 300 * 64 * 2  # the head is read for the drafts, then for a block


@given(block=st.integers(1, 9), count=st.integers(0, 9))
def test_tidars_pairs_are_those_of_the_rows_that_the_model_is_fed(block: int, count: int) -> None:
    outcomes = plans.prepared(block, min(count, block))
    rows = Rows.draft_and_verify(torch.zeros(1, block).long(), torch.tensor([7]), block, outcomes, mask=0)
    planned = plans.diffusion_forward(TARGET, block, outcomes)
    assert (planned.rows, planned.pairs) == (rows.ids.shape[1], int(rows.visible.sum()))


def test_tidar_without_a_proposal_only_verifies() -> None:
    [forward] = diffusion(4, 0).forwards
    assert (forward.rows, forward.pairs, forward.logits) == (4, 10, 4)
    assert forward.cost([7], 2) == plans.on_target(TARGET, "verify", 4, 10, 4).cost([7], 2)


def test_tidar_has_no_more_outcomes_than_draft_rows() -> None:
    with pytest.raises(UserError, match="a block of 4 has 4 outcomes to prepare, not 5"):
        diffusion(4, 5)


def test_an_outcome_without_a_block_costs_a_step_of_one_token() -> None:
    found = synthetic.parse({"histogram": {"0": 1, "1": 1, "2": 2}}, 3)  # tokens kept: 1, 2, 3, 3
    assert plans.tokens_per_step(found) == pytest.approx(2.25)
    assert plans.coverage(found, (1, 2)) == pytest.approx(0.5)
    # Half of the steps with drafts are followed by one of one token: of three steps two have drafts.
    assert plans.tokens_per_step(found, (1, 2)) == pytest.approx((2 * 2.25 + 1) / 3)
    assert plans.tokens_per_step(found, ()) == 1
    assert plans.likeliest(found, 2) == (1, 3)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=17).filter(any))
def test_more_outcomes_prepared_gain_more_and_all_of_them_everything(counts: list[int]) -> None:
    drafts = len(counts) - 1
    found = synthetic.parse({"histogram": {str(i): n for i, n in enumerate(counts)}}, drafts)
    gains = [plans.tokens_per_step(found, tuple(range(1, p + 1))) for p in range(len(counts) + 1)]
    best = [plans.tokens_per_step(found, plans.likeliest(found, p)) for p in range(len(counts) + 1)]
    assert all(a <= b + 1e-9 for values in (gains, best) for a, b in pairwise(values))
    assert gains[-1] == pytest.approx(found.length) == pytest.approx(best[-1])
    assert all(b >= g - 1e-9 for b, g in zip(best, gains, strict=True))


def test_plans_need_no_torch() -> None:
    code = (
        "import sys; from zbench.engines import plans; from zbench.models.config import ModelConfig\n"
        f"target = ModelConfig.from_fields({SHAPE!r})\n"
        "plans.plan('eagle3', {'drafter': {'random': True}, 'depth': 4, 'top_k': 1, 'tokens': None}, target)\n"
        "plans.plan('dflash', {'drafter': {'random': True, 'layers': 2}, 'block': 8}, target)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
