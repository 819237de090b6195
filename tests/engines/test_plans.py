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
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zbench import scenario
from zbench.engines import Shared, create, plans, synthetic
from zbench.engines.base import Meter, Request
from zbench.engines.sampling import Sampling
from zbench.errors import UserError
from zbench.hardware import device
from zbench.models import adapter, dflash, eagle3, loading
from zbench.models.config import ModelConfig
from zbench.models.rows import Rows

SHAPE = {
    "family": "llama", "layers": 5, "width": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "vocab": 300,
    "max_positions": 256,
}  # fmt: skip
TARGET = ModelConfig.from_fields(SHAPE)
SETTINGS: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "forward": {"rows": (1, 2, 5)},
    "reference": {},
    "prompt_lookup": {"tokens": 2},
    "eagle3": {"drafter": {"random": True, "vocab": 64}, "depth": 3, "synthetic": {"length": 4}},
    "dflash": {"drafter": {"random": True, "layers": 2}, "block": 5, "synthetic": {"length": 2.5}},
    "dflash, few tokens": {"drafter": {"random": True}, "block": 4, "draft_vocab": 90, "synthetic": {"length": 2.5}},
    "dflash, a tree of one place": {"drafter": {"random": True}, "block": 2, "tokens": 6, "synthetic": {"length": 1.5}},
    "dflash, a tree of a chain": {"drafter": {"random": True}, "block": 4, "tokens": 3, "synthetic": {"length": 2.5}},
    "diffusion": {"block_size": 4, "synthetic": {"length": 2.5}},
    "diffusion, two outcomes": {"block_size": 4, "proposals": 2, "outcomes": "uniform", "synthetic": {"length": 4}},
    "diffusion, few rows": {"block_size": 3, "proposals": 1, "outcomes": "prefix", "synthetic": {"length": 1}},
    "diffusion, none": {"block_size": 4, "proposals": 0},
    "diffusion, a tree of a chain": {"block_size": 4, "tokens": 3, "synthetic": {"length": 2.5}},
    "diffusion, a tree of few rows": {"block_size": 2, "tokens": 1, "synthetic": {"length": 1.5}},
    "diffusion, mixed": {"block_size": 4, "sampler": "logit_mix", "mask_id": 9},
}


def options(engine: str, **given: Any) -> dict[str, Any]:
    return scenario.ENGINES[engine](name=engine, **given).options


@pytest.fixture(scope="module")
def shared() -> Shared:
    loaded = loading.load({"config": SHAPE, "weights": "random"}, "float32")
    return Shared(loaded, torch.float32, device.resolve("cpu"))


@pytest.mark.parametrize("setting", ["prompt_lookup", "diffusion", "diffusion, two outcomes", "dflash, few tokens"])
def test_a_plan_costs_what_the_engine_records_within_a_sliding_window(setting: str) -> None:
    shape = SHAPE | {"family": "mistral", "windows": [6] * 5}
    loaded = loading.load({"config": shape, "weights": "random"}, "float32")
    windowed = Shared(loaded, torch.float32, device.resolve("cpu"))
    _assert_planned(setting, windowed, ModelConfig.from_fields(shape))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_plan_costs_what_the_engine_records(setting: str, shared: Shared) -> None:
    _assert_planned(setting, shared, TARGET)


def _assert_planned(setting: str, shared: Shared, target: ModelConfig) -> None:
    engine = setting.partition(",")[0]
    chosen = options(engine, **SETTINGS[setting])
    meter = Meter(shared.device)
    batch = 1 if engine == "reference" else 2
    request = Request(16, Sampling(), (3,) * batch, frozenset())
    create(engine, chosen, shared).generate([[5, 6, 7, 8]] * batch, request, meter)
    # The drafters' first step reads less: nothing was verified before it.
    recorded = [forward for forward in meter.records()[1] if forward.step == 2]
    planned = plans.plan(engine, chosen, target, batch).forwards
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


def test_a_tree_out_of_a_block_feeds_a_block_of_masks_and_verifies_all_nodes() -> None:
    chosen = options("dflash", drafter={"random": True}, block=4, tokens=9)
    planned = plans.plan("dflash", chosen, TARGET)
    assert [(f.role, f.rows, f.logits) for f in planned.forwards] == [("draft", 4, 3), ("verify", 10, 10)]
    assert planned.forwards[-1].pairs == 1 + 3 * (2 + 3 + 4)
    assert planned.drafts == 3 and "tree" in planned.notes[0]
    few = plans.plan("dflash", options("dflash", drafter={"random": True}, block=8, tokens=2), TARGET)
    assert few.drafts == 2  # no path is longer than the tree is large


def test_a_tree_of_diffusion_verifies_all_nodes_and_prepares_as_many_blocks_as_asked_for() -> None:
    given = {"block_size": 4, "tokens": 9, "proposals": 3, "adapter": {"random": True}}
    planned = plans.plan("diffusion", options("diffusion", **given), TARGET)
    assert [(f.role, f.rows, f.logits) for f in planned.forwards] == [("draft+verify", 22, 10), ("draft", 3, 3)]
    assert planned.drafts == 3 and planned.outcomes is None and "tree" in planned.notes[0]


def test_a_plan_says_that_a_confident_chain_is_the_longest() -> None:
    chosen = options("eagle3", drafter={"random": True}, depth=3, confidence=0.4)
    planned = plans.plan("eagle3", chosen, TARGET)
    assert len(planned.forwards) == 4 and "confidence" in planned.notes[0]


def test_a_plan_says_that_lookups_are_left_out() -> None:
    chosen = options("eagle3", drafter={"random": True}, depth=3, lookup=2)
    planned = plans.plan("eagle3", chosen, TARGET)
    assert len(planned.forwards) == 4 and "in the text" in planned.notes[0]


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


def diffusion(block: int, proposals: int | str, **more: Any) -> plans.Plan:
    return plans.plan("diffusion", options("diffusion", block_size=block, proposals=proposals, **more), TARGET)


def test_tidar_feeds_its_drafts_and_a_block_for_every_outcome_then_the_head() -> None:
    everything = diffusion(16, "all")
    forward, head = everything.forwards
    assert forward.rows == 272  # the paper's q_len = B (B + 1)
    # 16 causal rows; block r of 16 rows sees r drafts and its own 16: 16 * (1 + .. + 16) + 16 * 16 * 16.
    assert forward.pairs == 136 + 16 * 136 + 4096
    assert (forward.role, forward.logits) == ("draft+verify", 16)
    assert (everything.drafts, everything.outcomes) == (15, tuple(range(1, 17)))
    # The head again, on 15 masks: its weight and the norm, no cache, 300 logits of 4 bytes for each.
    assert (head.model, head.logits) == ("head", 15)
    cost = head.cost([100, 100], 2)
    assert (cost.flops, cost.bytes_read, cost.bytes_written) == (
        2 * 30 * 64 * 300, (300 + 1) * 64 * 2, 30 * 300 * 4,
    )  # fmt: skip


def test_tidar_with_two_proposals_in_numbers() -> None:
    planned = diffusion(4, 2, outcomes="prefix")
    assert planned.forwards[0].rows == 12
    assert planned.forwards[0].pairs == 10 + 4 * (1 + 4) + 4 * (2 + 4)
    assert planned.outcomes == (1, 2)


def test_outcomes_are_chosen_as_the_option_says() -> None:
    asked = {"synthetic": {"histogram": {"0": 1, "1": 2, "2": 9, "3": 5}}}
    assert diffusion(4, 2, **asked).outcomes == (3, 4)
    assert diffusion(4, 2, outcomes="prefix", **asked).outcomes == (1, 2)
    assert diffusion(8, 2, outcomes="uniform").outcomes == (3, 7)
    assert diffusion(8, 20).outcomes == tuple(range(1, 9))


def test_without_proposals_diffusion_decodes_autoregressively() -> None:
    assert [f.cost([7], 2) for f in diffusion(4, 0).forwards] == [
        f.cost([7], 2) for f in plans.plan("autoregressive", options("autoregressive"), TARGET).forwards
    ]
    assert diffusion(4, 0).drafts == 0


def test_masks_that_predict_the_next_place_are_one_fewer_per_block(tmp_path: Path) -> None:
    made = adapter.random_adapter(TARGET)
    adapter.save_adapter(tmp_path, replace(made, config=replace(made.config, shift=1)))
    chosen = {"path": str(tmp_path)}
    assert diffusion(4, 2, adapter=chosen, outcomes="prefix").forwards[0].rows == 4 + 2 * 3
    assert diffusion(1, "all", adapter=chosen).forwards[0].role == "decode"


@given(block=st.integers(1, 9), count=st.integers(1, 9), shift=st.integers(0, 1))
def test_tidars_pairs_are_those_of_the_rows_that_the_model_is_fed(block: int, count: int, shift: int) -> None:
    assume(block > shift)
    outcomes = plans.prepared(block, min(count, block), "uniform")
    rows = Rows.draft_and_verify(torch.zeros(1, block).long(), torch.tensor([7]), block - shift, outcomes, mask=0)
    planned = plans.diffusion_forward(TARGET, block, outcomes, shift=shift)
    assert (planned.rows, planned.pairs) == (rows.ids.shape[1], int(rows.visible.sum()))


def test_an_outcome_without_a_block_costs_drafts() -> None:
    found = synthetic.parse({"histogram": {"0": 1, "1": 1, "2": 2}}, 2)  # tokens kept: 1, 2, 3, 3
    assert plans.diffusion_tokens(found, (1, 2, 3), "redraft") == pytest.approx(2.25)
    assert plans.coverage(found, (1, 2)) == pytest.approx(0.5)
    # Half of the steps with drafts are followed by one of one token: of three steps two have drafts.
    assert plans.diffusion_tokens(found, (1, 2), "redraft") == pytest.approx((2 * 2.25 + 1) / 3)
    # The block for 2 has one draft left for 3: then 1 or 2 tokens, both prepared, and whole blocks again.
    assert plans.diffusion_tokens(found, (1, 2), "nearest") == pytest.approx((2 * 2.25 + 1.75) / 3)


histograms = st.lists(st.integers(0, 50), min_size=2, max_size=17).filter(any)


@settings(deadline=None)
@given(histograms)
def test_more_of_the_shortest_outcomes_gain_more_and_all_of_them_everything(steps: list[int]) -> None:
    found = synthetic.parse({"histogram": {str(i): n for i, n in enumerate(steps)}}, len(steps) - 1)
    for fallback in ("redraft", "nearest"):
        gains = [plans.diffusion_tokens(found, range(1, p + 1), fallback) for p in range(1, len(steps) + 1)]
        assert all(a <= b + 1e-6 for a, b in pairwise(gains))
        assert gains[-1] == pytest.approx(found.length)


@pytest.mark.parametrize("fallback", ["redraft", "nearest"])
def test_the_gain_is_what_the_engine_gains(fallback: str, shared: Shared) -> None:
    asked = {"histogram": {"0": 2, "1": 3, "2": 1, "3": 4}}
    chosen = options("diffusion", block_size=4, proposals=2, outcomes="prefix", fallback=fallback, synthetic=asked)
    meter = Meter(shared.device)
    create("diffusion", chosen, shared).generate([[5, 6, 7, 8]], Request(240, Sampling(), (3,), frozenset()), meter)
    steps = [step.committed[0] for step in meter.records()[0][1:-1]]
    planned = plans.plan("diffusion", chosen, TARGET)
    assert planned.outcomes is not None
    expected = plans.diffusion_tokens(synthetic.parse(asked, 3), planned.outcomes, fallback)
    assert sum(steps) / len(steps) == pytest.approx(expected, rel=0.1)


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
