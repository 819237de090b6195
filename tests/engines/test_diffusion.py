"""TiDAR decoding: the model's own tokens for every block size and number of proposals, whatever the masks predict."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.engines.lossless import ALPHA, CPU, assert_cache_is_fresh, decode, first_tokens, joint, p_value, small_model
from tests.tiny import FAMILIES, runtime
from zbench.engines import diffusion as module
from zbench.engines import synthetic
from zbench.engines.autoregressive import Autoregressive
from zbench.engines.base import Meter, Request
from zbench.engines.denoise import Denoise
from zbench.engines.diffusion import Diffusion, _sources
from zbench.engines.sampling import Sampling
from zbench.errors import UserError
from zbench.kernels import cpu
from zbench.models.adapter import (
    MODULES,
    AdapterCheckpoint,
    AdapterConfig,
    MaskAdapter,
    adapter_shapes,
    random_adapter,
)
from zbench.models.model import Model
from zbench.models.rows import Rows

GREEDY, MASK = Sampling(), 299
needs_native = pytest.mark.skipif(not cpu.available(), reason=f"native CPU kernels: {cpu.unavailable_reason()}")
EXECUTIONS = ["eager", pytest.param("native", marks=needs_native)]
Proposal = Callable[[list[int], int], list[int]]  # (the tokens that AR would put here, vocabulary) -> what is drafted


class Scripted(Diffusion):
    """Its masks know what autoregressive decoding says next, and predict what `propose` makes of it."""

    def __init__(self, model: Model, outputs: Sequence[Sequence[int]], propose: Proposal, **options: Any) -> None:
        super().__init__(model, MASK, **options)
        self.outputs, self.propose = outputs, propose

    def _predicted(self, masks: Tensor, headed: bool, contexts: list[int], index: Tensor, meter: Meter) -> Tensor:
        logits = torch.zeros_like(super()._predicted(masks, headed, contexts, index, meter))
        for row, (output, at) in enumerate(zip(self.outputs, index.tolist(), strict=True)):
            following = [*output, *[5] * logits.shape[1]][at : at + logits.shape[1]]
            for place, token in enumerate(self.propose(following, logits.shape[-1])):
                logits[row, place, token] = 1.0
        return logits


def right(following: list[int], _: int) -> list[int]:
    return following


def wrong(following: list[int], vocab: int) -> list[int]:
    return [(token + 1) % vocab for token in following]


def right_then_wrong(count: int) -> Proposal:
    return lambda following, vocab: following[:count] + wrong(following[count:], vocab)


def prompts(*sizes: int, seed: int = 0, vocab: int = 300) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (size,), generator=generator).tolist() for size in sizes]


def metered(engine: Any, ids: list[list[int]], request: Request) -> tuple[list[list[int]], Any, Any]:
    meter = Meter(CPU)
    generated = engine.generate(ids, request, meter)
    return generated.outputs, *meter.records()


@functools.cache
def adapted(execution: str, dtype: torch.dtype = torch.float32, shift: int = 0) -> tuple[Any, MaskAdapter]:
    model = runtime("qwen3", execution, dtype)
    checkpoint = random_adapter(model.config, seed=3, rank=5, block=4)
    wide = {name: tensor * 12 for name, tensor in checkpoint.tensors.items()}
    checkpoint = replace(checkpoint, tensors=wide, config=replace(checkpoint.config, shift=shift))
    return model, MaskAdapter(checkpoint, model.config, dtype, model.device)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_that_know_nothing_leave_every_token_as_it_was(family: str, execution: str) -> None:
    if family == "zaya" and execution == "native":
        pytest.skip("ZAYA runs on torch")
    model = runtime(family, execution)
    ids, request = prompts(4, 23, 1), Request(24, GREEDY, (0, 0, 0), frozenset({2}))
    plain = decode(Autoregressive(model), ids, request)
    assert decode(Diffusion(model, MASK, 4), ids, request) == plain


@pytest.mark.parametrize("choose", ["most_likely", "prefix", "uniform"])
@pytest.mark.parametrize("proposals", [0, 1, 2, 3, 8, 9])
@pytest.mark.parametrize("block", [1, 2, 3, 8])
def test_every_block_size_and_number_of_proposals_decodes_the_same(block: int, proposals: int, choose: Any) -> None:
    model, ids = runtime("llama3", "auto"), prompts(9, 3)
    request = Request(17, GREEDY, (0, 0))
    plain = decode(Autoregressive(model), ids, request)
    for propose in (right, right_then_wrong(1), right_then_wrong(3)):
        engine = Scripted(model, plain.outputs, propose, block=block, proposals=proposals, choose=choose)
        assert decode(engine, ids, request) == plain


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(["qwen3", "zaya"]),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    block=st.integers(1, 9),
    proposals=st.integers(0, 10),
    choose=st.sampled_from(["most_likely", "prefix", "uniform"]),
    fallback=st.sampled_from(["nearest", "redraft"]),
    limit=st.integers(1, 20),
    right_count=st.integers(0, 8),
    temperature=st.sampled_from([0.0, 0.7]),
    eos_at=st.none() | st.integers(0, 12),
    seed=st.integers(0, 1000),
)
def test_masks_right_up_to_any_place_leave_every_token_and_finish_as_it_was(
    family: str, sizes: list[int], block: int, proposals: int, choose: Any, fallback: Any, limit: int,
    right_count: int, temperature: float, eos_at: int | None, seed: int,
) -> None:  # fmt: skip
    model, ids, seeds = runtime(family, "auto"), prompts(*sizes, seed=seed), tuple(range(len(sizes)))
    outputs = decode(Autoregressive(model), ids, Request(limit, Sampling(temperature), seeds)).outputs
    # A token of the first output as EOS: it then stands inside a block more often than not.
    eos = frozenset() if eos_at is None else frozenset({outputs[0][min(eos_at, limit - 1)]})
    request = Request(limit, Sampling(temperature), seeds, eos)
    plain = decode(Autoregressive(model), ids, request)
    options = {"block": block, "proposals": proposals, "choose": choose, "fallback": fallback}
    engine = Scripted(model, outputs, right_then_wrong(right_count), **options)
    assert decode(engine, ids, request) == plain


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_block_that_is_accepted_whole_where_no_masks_stand_behind_it_leaves_no_drafts(execution: str) -> None:
    """One block of masks behind the first outcome, as one sequence and more rows than get the head at once."""
    model, ids, request = runtime("smollm", execution), prompts(6), Request(40, GREEDY, (0,))
    outputs = decode(Autoregressive(model), ids, request).outputs
    engine = Scripted(model, outputs, right, block=10, proposals=1, choose="prefix")
    found, steps, forwards = metered(engine, ids, request)
    assert found == outputs
    assert any(step.accepted == (9,) for step in steps) and any(step.drafted == (0,) for step in steps[1:])
    assert all(f.rows for f in forwards)


@pytest.mark.parametrize("family", ["smollm", "mistral", "zaya"])
def test_the_cache_holds_what_a_prefill_of_the_committed_tokens_would(family: str) -> None:
    model, ids, request = runtime(family, "auto"), prompts(5, 12), Request(30, GREEDY, (0, 0))
    outputs = decode(Autoregressive(model), ids, request).outputs
    engine = Scripted(model, outputs, right_then_wrong(2), block=5, proposals=2)
    assert_cache_is_fresh(engine, model, ids, request, steps=4)


@pytest.mark.parametrize("block", [2, 4, 7])
@pytest.mark.parametrize(("propose", "gained"), [(right, None), (wrong, 1), (right_then_wrong(1), 2)])
def test_a_step_gains_the_right_drafts_and_the_next_token(block: int, propose: Proposal, gained: int | None) -> None:
    model, ids, request = runtime("llama3", "auto"), prompts(6, 13), Request(29, GREEDY, (0, 0))
    outputs = decode(Autoregressive(model), ids, request).outputs
    found, steps, forwards = metered(Scripted(model, outputs, propose, block=block), ids, request)
    each = block if gained is None else gained
    assert found == outputs
    assert all(step.committed == (each, each) for step in steps[1:-1])
    assert all(step.accepted == (each - 1,) * 2 and step.drafted == (block - 1,) * 2 for step in steps[1:-1])
    assert all(step.covered == (True, True) for step in steps[1:])
    assert len(steps) - 1 == -(-28 // each)
    target = [f for f in forwards if f.model == "target" and f.step > 0]
    assert {(f.role, f.rows) for f in target} == {("draft+verify", block + block * block)}
    assert len(target) == len(steps) - 1
    heads = [f for f in forwards if f.model == "head"]
    assert {(f.role, f.rows) for f in heads} == {("draft", block - 1)}
    assert sum(f.committed for f in forwards) == 2 * 29


@pytest.mark.parametrize("block", [1, 2, 4, 7])
@pytest.mark.parametrize("proposals", [1, 2, 9])
def test_masks_that_predict_the_next_place_save_a_row_per_block(block: int, proposals: int) -> None:
    model, adapter = adapted("eager", shift=1)
    ids, request = prompts(6, 13), Request(29, GREEDY, (0, 0))
    outputs = decode(Autoregressive(model), ids, request).outputs
    options = {"block": block, "proposals": proposals, "adapter": adapter}
    found, steps, forwards = metered(Scripted(model, outputs, right, **options), ids, request)
    assert found == outputs
    assert (block, block) in {step.committed for step in steps[1:]}
    role = "draft+verify" if block > 1 else "decode"
    most = block + (block - 1) * min(proposals, block)
    assert max(f.rows for f in forwards if f.model == "target" and f.step > 0) == most
    assert role in {f.role for f in forwards}
    assert {f.rows for f in forwards if f.role == "prefill"} == {13 + block - 1}
    plain = decode(Autoregressive(model), ids, request)
    assert decode(Diffusion(model, MASK, **options), ids, request) == plain  # noise is drafted as well


def test_samplers_that_read_the_mask_at_a_tokens_own_place_refuse_masks_that_predict_the_next() -> None:
    model, adapter = adapted("eager", shift=1)
    with pytest.raises(UserError, match="predict their own place"):
        Diffusion(model, MASK, 4, adapter=adapter, mix=0.5)
    with pytest.raises(UserError, match="predict their own place"):
        Denoise(model, MASK, 4, adapter=adapter)


def test_no_proposals_decode_one_row_at_a_time() -> None:
    model, ids, request = runtime("smollm", "auto"), prompts(6), Request(12, GREEDY, (0,))
    found, steps, forwards = metered(Diffusion(model, MASK, 8, proposals=0), ids, request)
    want, _, plain = metered(Autoregressive(model), ids, request)
    assert found == want
    assert [(f.role, f.rows, f.flops, f.bytes_read) for f in forwards] == [
        (f.role, f.rows, f.flops, f.bytes_read) for f in plain
    ]
    assert all(step.drafted == (0,) and step.covered == () for step in steps[1:])


def test_rows_follow_the_number_of_proposals() -> None:
    model, ids, request = runtime("smollm", "auto"), prompts(6), Request(20, GREEDY, (0,))
    outputs = decode(Autoregressive(model), ids, request).outputs
    for proposals in (1, 3):
        engine = Scripted(model, outputs, wrong, block=4, proposals=proposals, choose="prefix")
        _, _, forwards = metered(engine, ids, request)
        assert {f.rows for f in forwards if f.role == "draft+verify"} == {4 + 4 * proposals}


def test_an_outcome_without_a_block_is_uncovered_and_the_fallback_shows_in_the_next_draft() -> None:
    model, ids, request = runtime("smollm", "auto"), prompts(6), Request(40, GREEDY, (0,))
    outputs = decode(Autoregressive(model), ids, request).outputs

    def run(fallback: Any) -> list[tuple[int, int, bool]]:
        engine = Scripted(model, outputs, right, block=4, proposals=1, choose="prefix", fallback=fallback)
        _, steps, _ = metered(engine, ids, request)
        return [(step.drafted[0], step.committed[0], step.covered[0]) for step in steps[1:6]]

    # Block 1 stands on 1 kept draft. Keeping 4 leaves nothing of it; the next forward decodes and drafts anew.
    assert run("redraft") == [(3, 4, False), (0, 1, True), (3, 4, False), (0, 1, True), (3, 4, False)]
    assert run("nearest") == [(3, 4, False), (0, 1, True), (3, 4, False), (0, 1, True), (3, 4, False)]
    # Keeping 2 of 4 leaves two masks that stand beyond the next token.
    engine = Scripted(model, outputs, right_then_wrong(1), block=4, proposals=1, choose="prefix")
    _, steps, _ = metered(engine, ids, request)
    assert [(s.drafted[0], s.covered[0]) for s in steps[1:5]] == [(3, False), (2, False), (2, False), (2, False)]


def test_the_likeliest_outcomes_are_those_this_decode_met_most_often() -> None:
    model, ids, request = runtime("smollm", "auto"), prompts(6), Request(60, GREEDY, (0,))
    outputs = decode(Autoregressive(model), ids, request).outputs
    engine = Scripted(model, outputs, right_then_wrong(2), block=4, proposals=1)
    for _ in range(2):  # a second decode starts from nothing again
        _, steps, _ = metered(engine, ids, request)
        covered = [step.covered[0] for step in steps[1:-1]]
        assert not covered[0]
        assert all(covered[4:])


def test_an_outcome_that_is_never_prepared_at_first_is_learnt_from_the_steps_that_show_it() -> None:
    """Steps with few drafts keep few rows whatever the model would accept: they must not teach that few are kept."""
    model, ids, request = runtime("smollm", "auto"), prompts(6), Request(60, GREEDY, (0,))
    outputs = decode(Autoregressive(model), ids, request).outputs
    for fallback in ("nearest", "redraft"):
        engine = Scripted(model, outputs, right, block=4, proposals=1, fallback=fallback)
        _, steps, _ = metered(engine, ids, request)
        assert all(step.committed == (4,) and step.prepared == (4,) for step in steps[4:-1])


@settings(deadline=None)
@given(block=st.integers(1, 32), shift=st.integers(0, 1), data=st.data())
def test_sources_point_at_the_mask_that_predicts_the_token_after_the_next(block: int, shift: int, data: Any) -> None:
    assume(block > shift)
    drafts = data.draw(st.integers(1, block))
    outcomes = tuple(sorted(data.draw(st.sets(st.integers(1, drafts), min_size=1))))
    ids = torch.zeros(1, drafts, dtype=torch.int64)
    rows = Rows.draft_and_verify(ids, torch.tensor([7]), block - shift, outcomes, MASK)
    for fallback in ("nearest", "redraft"):
        starts, usable = _sources(drafts, block, outcomes, fallback, shift)  # type: ignore[arg-type]
        for kept in range(1, drafts + 1):
            if kept in outcomes:
                assert usable[kept] == block - 1
            for ahead in range(usable[kept]):
                row = starts[kept] + ahead
                assert int(rows.positions[0, row]) + shift == 7 + kept + 1 + ahead  # t stands at 7 + kept
                seen = rows.visible[0, row, :drafts].nonzero().flatten().tolist()
                assert len(seen) <= kept
                assert rows.masks is not None
                assert int(rows.masks[0, row]) >= 1 - shift


# Sampling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposals", [1, 3])
def test_drawn_drafts_leave_the_distribution_as_it_was(proposals: int) -> None:
    model, sampling = small_model(), Sampling(1.1)
    engine = Diffusion(model, 5, 3, proposals=proposals, draft_sampling=True)
    samples = first_tokens(engine, [1, 2, 3], sampling, 4)
    assert p_value(samples, joint(model, [1, 2, 3], sampling, 4)) > ALPHA


def test_the_test_of_the_distribution_catches_drafts_that_are_always_accepted(monkeypatch: Any) -> None:
    model, sampling = small_model(), Sampling(1.1)

    def accepting(logits: Tensor, drafts: Tensor, *args: Any, **kwargs: Any) -> Any:
        return verify(
            logits, drafts, *args[:2], None, synthetic.parse({"length": drafts.shape[1] + 1}, drafts.shape[1])
        )

    verify = module.verify_chain
    monkeypatch.setattr(module, "verify_chain", accepting)
    engine = Diffusion(model, 5, 3, draft_sampling=True)
    assert p_value(first_tokens(engine, [1, 2, 3], sampling, 4), joint(model, [1, 2, 3], sampling, 4)) < ALPHA


def test_a_model_as_wide_as_its_vocabulary_drafts_from_its_head() -> None:
    """Hidden states and logits then have one shape; the drafts of both must be the same."""
    from zbench.models import loading
    from zbench.models.model import build

    shape = {"family": "llama", "layers": 2, "width": 64, "ffn": 96, "heads": 4, "vocab": 64, "max_positions": 128}
    loaded = loading.load({"config": shape, "weights": "random", "seed": 1}, dtype="float32")
    model = build(loaded, torch.float32, torch.device("cpu"), "auto")
    request = Request(8, GREEDY, (0, 0, 0, 0))
    apart, together = (Diffusion(model, 63, 4, trust=0.0) for _ in range(2))
    [ids] = prompts(6, vocab=63)
    many, _, _ = metered(apart, [ids] * 4, request)  # 80 rows: the head runs on the chosen ones
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(module, "ONE_HEAD_ROWS", 1000)
        assert metered(together, [ids] * 4, request)[0] == many


def test_logit_mix_with_beta_one_is_lossless_and_with_less_is_not() -> None:
    model, ids, request = runtime("smollm", "auto"), prompts(6, 11), Request(30, GREEDY, (0, 0))
    plain = decode(Autoregressive(model), ids, request)
    assert decode(Diffusion(model, MASK, 4, mix=1.0), ids, request) == plain
    mixed = Diffusion(model, MASK, 4, mix=0.1)
    assert decode(mixed, ids, request) != plain
    assert mixed.exact is None


def test_logit_mix_of_nothing_but_masks_emits_what_the_first_mask_of_each_block_says() -> None:
    model, ids = runtime("smollm", "auto"), prompts(6)[0]
    found, _, _ = metered(Diffusion(model, MASK, 3, mix=0.0), [ids], Request(10, GREEDY, (0,)))
    committed = [*ids, *found[0]]
    for place in range(len(ids), len(committed)):
        cache = model.new_cache(1, 64)
        model.forward(Rows.chain(torch.tensor([committed[:place]]), cache.lengths), cache)
        cache.extend([place])
        canvas = Rows.canvas(torch.full((1, 3), MASK), cache.lengths, MASK)
        assert int(model.forward(canvas, cache).logits[0, 0].argmax()) == committed[place]


def test_trusted_drafts_are_taken_whatever_the_model_says() -> None:
    model, ids, request = runtime("smollm", "auto"), prompts(6), Request(20, GREEDY, (0,))
    plain = decode(Autoregressive(model), ids, request)
    assert decode(Diffusion(model, MASK, 4, trust=1.1), ids, request) == plain  # no probability reaches it
    found, steps, _ = metered(Diffusion(model, MASK, 4, trust=0.0), ids, request)
    assert found != plain.outputs
    assert all(step.committed == (4,) for step in steps[1:-1])


def test_synthetic_acceptance_decides_how_much_a_step_gains() -> None:
    model, ids = runtime("smollm", "auto"), prompts(6, 9)
    engine = Diffusion(model, MASK, 5, synthetic=synthetic.parse({"length": 3}, 4))
    _, steps, _ = metered(engine, ids, Request(31, GREEDY, (0, 0)))
    assert all(step.committed == (3, 3) for step in steps[1:-1])
    assert engine.exact is None


@pytest.mark.parametrize(("block", "proposals", "drawn"), [(4, 1, {"rate": 0.7}), (8, 2, {"length": 2.5})])
@pytest.mark.parametrize("fallback", ["nearest", "redraft"])
def test_synthetic_sequences_of_a_batch_may_end_in_different_steps(
    block: int, proposals: int, drawn: dict[str, float], fallback: Any
) -> None:
    """One that has ended may have had more drafts than those that go on, for which fewer rows are fed."""
    model, ids, limit = runtime("smollm", "auto"), prompts(6, 9, 5, 12, 8, 7), 40
    engine = Diffusion(model, MASK, block, proposals, fallback=fallback, synthetic=synthetic.parse(drawn, block - 1))
    _, steps, _ = metered(engine, ids, Request(limit, GREEDY, (5, 1, 2, 3, 4, 0)))
    assert [sum(step.committed[row] for step in steps) for row in range(len(ids))] == [limit] * len(ids)
    for step in steps:
        assert all(gained <= 1 + n for gained, n in zip(step.committed, step.drafted, strict=False))


@pytest.mark.parametrize(("options", "complaint"), [({"block": 0}, "block_size"), ({"block": 33}, "block_size")])
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Diffusion(runtime("smollm", "auto"), MASK, **options)
    with pytest.raises(UserError, match="mask id"):
        Diffusion(runtime("smollm", "auto"), 300)


# Mask rows of their own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_adapter_changes_the_masks_and_no_token_row_by_a_bit(execution: str) -> None:
    model, adapter = adapted(execution)
    ids = torch.tensor(prompts(4, 4))
    rows = Rows.draft_and_verify(ids, torch.zeros(2, dtype=torch.int64), 3, (1, 3), MASK)
    bare = model.forward(rows, model.new_cache(2, 16)).logits
    with_it = model.forward(rows, model.new_cache(2, 16), adapter=adapter).logits
    assert torch.equal(bare[:, :4], with_it[:, :4])
    assert ((bare[:, 4:] - with_it[:, 4:]).abs().amax(-1) > 1e-3).all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_adapter_computes_what_the_torch_one_does(dtype: torch.dtype) -> None:
    ids = torch.tensor(prompts(4, 4))
    rows = Rows.draft_and_verify(ids, torch.zeros(2, dtype=torch.int64), 6, (1, 3), MASK)
    (native, own), (plain, other) = adapted("native", dtype), adapted("eager", dtype)
    got = native.forward(rows, native.new_cache(2, 32), adapter=own).logits
    want = plain.forward(rows, plain.new_cache(2, 32), adapter=other).logits
    assert (got - want).norm() < (1e-5 if dtype == torch.float32 else 3e-2) * want.norm()


@needs_native
@settings(max_examples=25, deadline=None)
@given(
    modules=st.sets(st.sampled_from(MODULES), min_size=1),
    rank=st.integers(1, 20),
    masked=st.lists(st.booleans(), min_size=1, max_size=37),
    batch=st.integers(1, 2),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_adapter_on_any_rows_is_the_torch_one_and_leaves_the_others_alone(
    modules: set[str], rank: int, masked: list[bool], batch: int, threads: int, seed: int
) -> None:
    model, plain = runtime("qwen3", "native"), runtime("qwen3", "torch")
    config = AdapterConfig(rank, 2.0 * rank, block=4, masks=3, modules=tuple(m for m in MODULES if m in modules))
    generator = torch.Generator().manual_seed(seed)
    shapes = adapter_shapes(config, model.config)
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    adapter = MaskAdapter(AdapterCheckpoint(config, tensors, "", ""), model.config, torch.float32, model.device)
    ids = torch.randint(3, MASK, (batch, len(masked)), generator=generator)
    ids[:, torch.tensor(masked)] = MASK
    rows = Rows.canvas(ids, torch.zeros(batch, dtype=torch.int64), MASK)
    rows = replace(rows, visible=rows.visible.tril())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = model.forward(rows, model.new_cache(batch, 48), adapter=adapter).logits
        bare = model.forward(rows, model.new_cache(batch, 48)).logits
    finally:
        torch.set_num_threads(before)
    want = plain.forward(rows, plain.new_cache(batch, 48), adapter=adapter).logits
    assert (got - want).norm() < 1e-4 * want.norm()
    tokens = masked.index(True) if True in masked else len(masked)  # rows that see no mask
    assert torch.equal(got[:, :tokens], bare[:, :tokens])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_lossless_with_an_adapter_too(execution: str) -> None:
    model, adapter = adapted(execution)
    ids, request = prompts(4, 23, 1), Request(24, GREEDY, (0, 0, 0))
    assert decode(Diffusion(model, MASK, 4, adapter=adapter), ids, request) == decode(
        Autoregressive(model), ids, request
    )


@needs_native
def test_bfloat16_is_the_same_bit_by_bit_on_the_native_decoder() -> None:
    model, adapter = adapted("native", torch.bfloat16)
    ids, request = prompts(4, 19, 7), Request(24, GREEDY, (0, 0, 0))
    plain = decode(Autoregressive(model), ids, request)
    for proposals in (1, 4):
        engine = Diffusion(model, MASK, 4, proposals=proposals, adapter=adapter)
        assert decode(engine, ids, request) == plain
        assert (
            decode(Scripted(model, plain.outputs, right_then_wrong(2), block=5, adapter=adapter), ids, request) == plain
        )
