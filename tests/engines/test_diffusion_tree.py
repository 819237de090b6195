"""TiDAR over trees: the model's own tokens for every tree and number of blocks, whatever the masks predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engines.lossless import ALPHA, CPU, assert_cache_is_fresh, decode, first_tokens, joint, p_value, small_model
from tests.engines.test_diffusion import (
    EXECUTIONS,
    GREEDY,
    MASK,
    Proposal,
    adapted,
    metered,
    needs_native,
    prompts,
    right,
    right_then_wrong,
    wrong,
)
from tests.tiny import FAMILIES, runtime
from zbench.engines import Shared, synthetic
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Meter, Request
from zbench.engines.diffusion import Diffusion
from zbench.engines.diffusion_tree import DiffusionTree
from zbench.engines.sampling import Sampling
from zbench.errors import UserError
from zbench.kernels import cpu
from zbench.models import loading, zoo
from zbench.models.adapter import MaskAdapter, load_adapter
from zbench.models.model import Model
from zbench.models.rows import Rows
from zbench.models.trees import BlockTree, last_block, tree_and_blocks


class Scripted(DiffusionTree):
    """Its masks know what autoregressive decoding says next, and put what `propose` makes of it at `rank` of each
    place, behind wrong tokens that are a little likelier."""

    def __init__(
        self,
        model: Model,
        outputs: Sequence[Sequence[int]],
        propose: Proposal,
        *args: Any,
        rank: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(model, MASK, *args, **options)
        self.outputs, self.propose, self.rank = outputs, propose, rank

    def _predicted(self, masks: Tensor, headed: bool, contexts: list[int], index: Tensor, meter: Meter) -> Tensor:
        logits = torch.zeros_like(super()._predicted(masks, headed, contexts, index, meter))
        vocab = logits.shape[-1]
        for row, (output, at) in enumerate(zip(self.outputs, index.tolist(), strict=True)):
            following = [*output, *[5] * logits.shape[1]][at : at + logits.shape[1]]
            for place, token in enumerate(self.propose(following, vocab)):
                for ahead in range(self.rank):
                    logits[row, place, (token + 3 * ahead) % vocab] = 20 + 0.1 * ahead
        return logits


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_that_know_nothing_leave_every_token_as_it_was(family: str, execution: str) -> None:
    if family == "zaya" and execution == "native":
        pytest.skip("ZAYA runs on torch")
    model = runtime(family, execution)
    ids, request = prompts(4, 23, 1), Request(24, GREEDY, (0, 0, 0), frozenset({2}))
    plain = decode(Autoregressive(model), ids, request)
    for proposals in (None, 2):
        assert decode(DiffusionTree(model, MASK, 4, 6, proposals), ids, request) == plain


@settings(max_examples=80, deadline=None)
@given(
    family=st.sampled_from(["qwen3", "zaya"]),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    block=st.integers(2, 7),
    tokens=st.integers(1, 12),
    proposals=st.none() | st.integers(1, 14),
    limit=st.integers(1, 20),
    right_count=st.integers(0, 6),
    rank=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 0.7]),
    eos_at=st.none() | st.integers(0, 12),
    seed=st.integers(0, 1000),
)
def test_masks_right_up_to_any_place_and_at_any_rank_leave_every_token_and_finish_as_it_was(
    family: str, sizes: list[int], block: int, tokens: int, proposals: int | None, limit: int, right_count: int,
    rank: int, temperature: float, eos_at: int | None, seed: int,
) -> None:  # fmt: skip
    model, ids, seeds = runtime(family, "auto"), prompts(*sizes, seed=seed), tuple(range(len(sizes)))
    outputs = decode(Autoregressive(model), ids, Request(limit, Sampling(temperature), seeds)).outputs
    eos = frozenset() if eos_at is None else frozenset({outputs[0][min(eos_at, limit - 1)]})
    request = Request(limit, Sampling(temperature), seeds, eos)
    plain = decode(Autoregressive(model), ids, request)
    engine = Scripted(model, outputs, right_then_wrong(right_count), block, tokens, proposals, rank=rank)
    assert decode(engine, ids, request) == plain


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_lossless_with_an_adapter_of_either_kind(execution: str, shift: int) -> None:
    model, adapter = adapted(execution, shift=shift)
    ids, request = prompts(4, 23, 1), Request(24, GREEDY, (0, 0, 0))
    plain = decode(Autoregressive(model), ids, request)
    for block, tokens, proposals in ((2, 5, 2), (4, 3, 1), (4, 9, None)):
        assert decode(DiffusionTree(model, MASK, block, tokens, proposals, adapter), ids, request) == plain
        scripted = Scripted(model, plain.outputs, right, block, tokens, proposals, adapter, rank=2)
        found, steps, forwards = metered(scripted, ids, request)
        assert found == plain.outputs
        whole = tokens + 1 if proposals is None else proposals
        assert max(f.rows for f in forwards if f.role == "draft+verify") == 1 + tokens + whole * (block - shift)
        assert all(len(step.prepared) in (1, whole) for step in steps[1:])


@needs_native
def test_bfloat16_is_the_same_bit_by_bit_on_the_native_decoder() -> None:
    model, adapter = adapted("native", torch.bfloat16)
    ids, request = prompts(4, 19, 7), Request(24, GREEDY, (0, 0, 0))
    plain = decode(Autoregressive(model), ids, request)
    for proposals in (1, None):
        assert decode(DiffusionTree(model, MASK, 4, 7, proposals, adapter), ids, request) == plain
        engine = Scripted(model, plain.outputs, right_then_wrong(2), 5, 14, proposals, adapter, rank=2)
        assert decode(engine, ids, request) == plain


@pytest.mark.parametrize("family", ["smollm", "mistral", "zaya"])
def test_the_cache_holds_what_a_prefill_of_the_committed_tokens_would(family: str) -> None:
    model, ids, request = runtime(family, "auto"), prompts(5, 12), Request(30, GREEDY, (0, 0))
    outputs = decode(Autoregressive(model), ids, request).outputs
    for rank in (1, 2):
        engine = Scripted(model, outputs, right_then_wrong(2), 5, 9, 3, rank=rank)
        assert_cache_is_fresh(engine, model, ids, request, steps=4)


@pytest.mark.parametrize(
    ("propose", "rank", "tokens", "each"),
    [(right, 1, 3, 4), (wrong, 1, 3, 1), (right_then_wrong(1), 1, 3, 2), (right, 2, 1, 1), (right, 2, 14, 4)],
)
def test_a_step_gains_the_longest_right_path_and_the_next_token(
    propose: Proposal, rank: int, tokens: int, each: int
) -> None:
    model, ids, request = runtime("llama3", "auto"), prompts(6, 13), Request(29, GREEDY, (0, 0))
    outputs = decode(Autoregressive(model), ids, request).outputs
    found, steps, forwards = metered(Scripted(model, outputs, propose, 4, tokens, rank=rank), ids, request)
    assert found == outputs
    assert all(step.committed == (each, each) for step in steps[1:-1])
    assert all(step.accepted == (each - 1,) * 2 and step.drafted == (tokens,) * 2 for step in steps[1:-1])
    assert all(step.covered == (True, True) and len(step.prepared) == tokens + 1 for step in steps[1:])
    target = [f for f in forwards if f.model == "target" and f.step > 0]
    assert {(f.role, f.rows) for f in target} == {("draft+verify", 1 + tokens + 4 * (tokens + 1))}
    assert {(f.role, f.rows) for f in forwards if f.model == "head"} == {("draft", 3)}


def test_a_step_that_ends_where_no_block_stands_drafts_from_the_nearest_one_or_decodes() -> None:
    model, ids, request = runtime("smollm", "auto"), prompts(6), Request(40, GREEDY, (0,))
    outputs = decode(Autoregressive(model), ids, request).outputs
    # The masks are sure of every place, so that the one block stands behind the whole path; it ends after one token.
    _, steps, _ = metered(Scripted(model, outputs, right_then_wrong(1), 4, 3, 1), ids, request)
    seen = [(s.drafted[0], s.committed[0], s.covered[0], s.prepared) for s in steps[1:5]]
    assert seen == [(3, 2, False, (4,)), (0, 1, True, (1,))] * 2
    # Blocks behind rows 1 and 3; it ends at row 2, for which row 1's block predicts two places of three.
    engine = Scripted(model, outputs, right_then_wrong(2), 4, 3, 2)
    engine._drawn = torch.tensor([1.0, 1.0, 0.5, 0.5]).log()
    _, steps, _ = metered(engine, ids, request)
    assert [(s.drafted[0], s.committed[0], s.covered[0], s.prepared) for s in steps[1:3]] == [
        (3, 3, False, (2, 4)),
        (3, 3, True, (2, 3)),  # the third node is another first token, behind which no path is drawn
    ]


@settings(max_examples=40, deadline=None)
@given(
    places=st.integers(1, 4), tokens=st.integers(1, 9), ends=st.sets(st.integers(0, 9), min_size=1),
    block=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_of_a_tree_and_its_blocks_see_their_path_and_their_block(
    places: int, tokens: int, ends: set[int], block: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, lengths = torch.randn(2, places, 30, generator=generator), torch.tensor([4, 9])
    tree, _ = BlockTree(places, tokens, torch.device("cpu")).grow(torch.tensor([7, 8]), lengths, logits)
    behind = torch.tensor([sorted({min(end, tokens) for end in ends})] * 2)
    behind[1] = behind[1].flip(0)
    rows, count = Rows.tree_and_blocks(tree, behind, block, MASK), tokens + 1
    for b in range(2):
        paths = [set(tree.visible[b, row].nonzero().flatten().tolist()) for row in range(count)]
        for row in range(count):
            assert set(rows.visible[b, row].nonzero().flatten().tolist()) == paths[row]
            assert (int(rows.ids[b, row]), int(rows.parents[b, row])) == (
                int(tree.ids[b, row]), int(tree.parents[b, row])
            )  # fmt: skip
        for index, end in enumerate(behind[b].tolist()):
            own = list(range(count + index * block, count + (index + 1) * block))
            for place, row in enumerate(own):
                assert set(rows.visible[b, row].nonzero().flatten().tolist()) == paths[end] | set(own)
                assert int(rows.positions[b, row]) == int(lengths[b]) + len(paths[end]) + place
                assert int(rows.parents[b, row]) == (row - 1 if place else end)
                assert (int(rows.ids[b, row]), int(rows.masks[b, row])) == (MASK, place)  # type: ignore[index]
        assert rows.masks is not None and (rows.masks[b, :count] == -1).all()


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)])
@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 9), proposals=st.integers(1, 10), usable=st.integers(0, 3), seed=st.integers(0, 999))
def test_blocks_stand_where_the_drafter_says_that_steps_end(
    native: bool, tokens: int, proposals: int, usable: int, seed: int
) -> None:
    """By the chances of all paths, multiplied out."""
    proposals = min(proposals, tokens + 1)
    logits = 3 * torch.randn(2, 3, 30, generator=torch.Generator().manual_seed(seed))
    grown = BlockTree(3, tokens, torch.device("cpu")).grow(
        torch.tensor([3, 4]), torch.tensor([0, 0]), logits, None, torch.tensor([3, usable])
    )
    with pytest.MonkeyPatch.context() as patched:
        if not native:
            patched.setattr(cpu, "available", lambda: False)
        rows, ends = tree_and_blocks(*grown, proposals, 2, MASK)
    tree, probs = grown[0], logits.double().softmax(-1)
    want = Rows.tree_and_blocks(tree, ends, 2, MASK)
    for name in ("ids", "positions", "parents", "visible", "masks"):
        assert torch.equal(getattr(rows, name), getattr(want, name)), name
    probs[1, usable:] = 0
    for b in range(2):
        ids, parents = tree.ids[b].tolist(), tree.parents[b].tolist()
        depth = [len(tree.visible[b, row].nonzero()) - 1 for row in range(tokens + 1)]
        reach = [1.0]
        for row in range(1, tokens + 1):
            reach.append(reach[parents[row]] * float(probs[b, depth[row] - 1, ids[row]]))
        each = [
            reach[row] - sum(reach[c] for c in range(1, tokens + 1) if parents[c] == row) for row in range(tokens + 1)
        ]
        chosen = ends[b].tolist()
        assert chosen == sorted(set(chosen))
        assert sorted((each[row] for row in chosen), reverse=True) == pytest.approx(
            sorted(each, reverse=True)[:proposals], abs=1e-6
        )


@needs_native
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_last_block_of_a_path_is_found_natively_as_by_torch(data: Any) -> None:
    batch, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    kept = torch.full((batch, count), -1)
    counts = torch.tensor([data.draw(st.integers(1, count)) for _ in range(batch)])
    proposals = data.draw(st.integers(1, count))
    ends = torch.tensor([sorted(data.draw(st.permutations(range(count)))[:proposals]) for _ in range(batch)])
    for b in range(batch):
        path = sorted([0, *data.draw(st.permutations(range(1, count)))[: int(counts[b]) - 1]])
        kept[b, : len(path)] = torch.tensor(path)
    native = last_block(kept, counts, ends, 99)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cpu, "available", lambda: False)
        torchs = last_block(kept, counts, ends, 99)
    for b in range(batch):
        path, behind = kept[b, : counts[b]].tolist(), ends[b].tolist()
        on_path = [i for i, row in enumerate(path) if row in behind]
        want = (behind.index(path[on_path[-1]]), len(path) - 1 - on_path[-1]) if on_path else (0, 99)
        assert (int(native[0][b]), int(native[1][b])) == (int(torchs[0][b]), int(torchs[1][b])) == want


@pytest.mark.parametrize("shift", [0, 1])
def test_the_masks_that_predict_what_follows_are_the_same_alone_and_in_a_batch(shift: int) -> None:
    model, adapter = adapted("eager", shift=shift)
    engine, count = DiffusionTree(model, MASK, 4, 5, 3, adapter), 6
    rows = torch.arange(count + 3 * (4 - shift))[None, :, None]
    for block in range(3):
        for ahead in range(4):
            given = torch.tensor([block]), torch.tensor([ahead])
            alone = engine._chosen(rows, count, *given)
            both = engine._chosen(rows.expand(2, -1, -1), count, *(x.expand(2) for x in given))
            useful = 3 - ahead  # the mask at place k stands for the (k + shift)-th token after the block's end
            want = [count + block * (4 - shift) + 1 - shift + ahead + k for k in range(useful)]
            assert alone[0, :useful, 0].tolist() == both[0, :useful, 0].tolist() == both[1, :useful, 0].tolist() == want


def test_trees_of_a_trained_adapter_gain_more_than_its_chain_on_as_many_rows() -> None:
    model = Shared(loading.load("zbench-tiny", "float32"), torch.float32, CPU).target("auto")
    adapter = MaskAdapter(
        load_adapter(zoo.drafter("zbench-tiny-tidar", "adapter"), model.config),
        model.config,
        torch.float32,
        model.device,
    )
    generator = torch.Generator().manual_seed(0)
    ids, request = (
        [torch.randint(97, 122, (9,), generator=generator).tolist() for _ in range(12)],
        Request(48, GREEDY, (0,)),
    )
    mask, gained = model.config.vocab - 1, []
    for options in ({}, {"tokens": 3}, {"tokens": 12}):
        kind = DiffusionTree if options else Diffusion
        found = [metered(kind(model, mask, 4, **options, adapter=adapter), [prompt], request) for prompt in ids]
        assert [outputs for outputs, _, _ in found] == [
            decode(Autoregressive(model), [p], request).outputs for p in ids
        ]
        rows = {f.rows for _, _, forwards in found for f in forwards if f.role == "draft+verify"}
        assert rows == {1 + options.get("tokens", 3) + 3 * (1 + options.get("tokens", 3))}
        steps = [step for _, all_steps, _ in found for step in all_steps[1:]]
        gained.append(sum(step.committed[0] for step in steps) / len(steps))
    assert gained == sorted(gained) and gained[1] > 1.02 * gained[0]


def test_a_tree_without_alternatives_is_the_chain() -> None:
    model, adapter = adapted("eager", shift=1)
    ids, request = prompts(6, 13), Request(29, GREEDY, (0, 0))
    chain = synthetic.parse({"rate": 0.6}, 3)
    found = [
        metered(engine, ids, request)
        for engine in (
            Diffusion(model, MASK, 4, adapter=adapter, synthetic=chain),
            DiffusionTree(model, MASK, 4, 3, adapter=adapter, synthetic=chain),
        )
    ]
    first, second = ([(s.committed, s.drafted, s.accepted) for s in steps] for _, steps, _ in found)
    assert first == second
    assert [f.rows for f in found[0][2]] == [f.rows for f in found[1][2]]


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)])
def test_drawn_acceptance_that_ends_behind_no_block_goes_on_without_drafts(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runtime("smollm", "eager")
    if not native:
        monkeypatch.setattr(cpu, "available", lambda: False)
    drawn = synthetic.parse({"rates": [0.45, 1.0, 1.0]}, 3)  # the one block stands behind no draft at all
    engine = DiffusionTree(model, MASK, 4, 5, 1, synthetic=drawn)
    _, steps, _ = metered(engine, prompts(6), Request(60, GREEDY, (0,)))
    seen = {(step.drafted[0], step.committed[0], step.covered[0]) for step in steps[1:-1]}
    assert seen == {(5, 1, True), (5, 4, False), (0, 1, True)}


@pytest.mark.parametrize("tokens", [4, 9])
def test_synthetic_acceptance_decides_how_much_a_step_gains(tokens: int) -> None:
    model, ids = runtime("smollm", "auto"), prompts(6, 9)
    engine = DiffusionTree(model, MASK, 5, tokens, 2, synthetic=synthetic.parse({"length": 3}, 4))
    _, steps, _ = metered(engine, ids, Request(31, GREEDY, (0, 0)))
    assert all(step.committed == (3, 3) and step.covered == (True, True) for step in steps[1:-1])
    assert engine.exact is None


@pytest.mark.parametrize("first", [0.4, 0.8])  # the one block stands behind no draft, or behind all
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_synthetic_sequences_of_a_batch_are_offered_and_gain_what_each_is_alone(execution: str, first: float) -> None:
    model, ids, seeds = runtime("smollm", execution), prompts(6, 9, 5, 12, 8, 7), (5, 1, 2, 3, 4, 0)
    engine = DiffusionTree(model, MASK, 4, 4, 1, synthetic=synthetic.parse({"rates": [first, 1.0, 1.0]}, 3))
    _, together, _ = metered(engine, ids, Request(40, GREEDY, seeds))
    idle = 0
    for row, prompt in enumerate(ids):
        _, alone, _ = metered(engine, [prompt], Request(40, GREEDY, seeds[row : row + 1]))
        assert not any(step.committed[row] for step in together[len(alone) :])
        for mine, own in zip(together, alone, strict=False):
            assert mine.committed[row] == own.committed[0]
            if own.drafted:
                assert mine.drafted[row] == own.drafted[0]
                idle += own.drafted[0] == 0
    assert idle > 5


def test_drafted_trees_leave_the_distribution_as_it_was() -> None:
    model, prompt, sampling = small_model(), [1, 4, 2], Sampling(0.9)
    engine = DiffusionTree(model, 5, 3, 4, 2)
    assert p_value(first_tokens(engine, prompt, sampling, 3), joint(model, prompt, sampling, 3)) > ALPHA


@pytest.mark.parametrize(
    ("block", "tokens", "drawn", "why"),
    [
        (1, 3, None, "blocks of 1 draft nothing"),
        (4, 0, None, "a tree of 0 tokens"),
        (4, 301, None, "1 to 300"),
        (4, 2, synthetic.parse({"length": 2.0}, 3), "a tree of as many, not 2"),
    ],
)
def test_trees_that_cannot_be_are_refused_in_one_line(block: int, tokens: int, drawn: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        DiffusionTree(runtime("smollm", "auto"), MASK, block, tokens, synthetic=drawn)
