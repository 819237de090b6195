"""ZAYA1 against `transformers`: what its convolutions, delayed values, routers and state need beyond other families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ZayaConfig as TheirConfig
from transformers import ZayaForCausalLM

from tests.models.test_transformer import EXECUTIONS, TOLERANCE, expected, tokens
from tests.tiny import FAMILIES, SHAPE, built, oracle, relative_error, runtime, widened
from zbench.errors import UserError
from zbench.kernels import cpu
from zbench.models import loading
from zbench.models.model import build, routing
from zbench.models.rows import Rows
from zbench.models.zaya import Zaya
from zbench.models.zaya_config import ZayaConfig

MASK = 299
everywhere = pytest.mark.parametrize("execution", EXECUTIONS)


def prefilled(model: Any, prompt: Tensor, room: int = 64) -> Any:
    cache = model.new_cache(len(prompt), prompt.shape[1] + room)
    model.forward(Rows.chain(prompt, cache.lengths), cache)
    cache.extend([prompt.shape[1]] * len(prompt))
    return cache


# Rows ----------------------------------------------------------------------------------------------------------------


def blocks(lengths: Tensor, drafts: Tensor, block: int) -> Rows:
    """A chain of drafts [B, n] after each prefix, and after each of them a block of masks that see one another."""
    batch, count = drafts.shape
    chain = Rows.chain(drafts, lengths)
    total = count * (1 + block)
    ids = torch.full((batch, total), MASK)
    ids[:, :count] = drafts
    parents, offsets = torch.full((total,), -1), torch.arange(total)
    visible = torch.zeros(total, total, dtype=torch.bool)
    visible[:count, :count] = chain.visible[0]
    parents[:count] = chain.parents[0]
    for draft in range(count):
        own = torch.arange(block) + count + draft * block
        parents[own] = torch.cat([torch.tensor([draft]), own[:-1]])
        offsets[own] = draft + 1 + torch.arange(block)
        visible[own, : draft + 1] = True
        visible[own[:, None], own] = True
    return Rows(
        ids,
        lengths[:, None] + offsets,
        parents.expand(batch, total),
        visible.expand(batch, total, total),
    )


@torch.no_grad()
def expected_block(ids: Tensor, block: int) -> Tensor:
    """Logits [B, block, V] of masks after the tokens ids [B, S]; the masks see one another."""
    full = torch.cat([ids, torch.full((len(ids), block), MASK)], 1)
    seen = torch.ones(full.shape[1], full.shape[1]).tril()
    seen[-block:, -block:] = 1
    mask = torch.where(seen > 0, 0.0, torch.finfo(torch.float32).min)[None, None]
    return oracle("zaya")(full, attention_mask={"hybrid": mask, "conv": None}).logits[:, -block:]


@everywhere
def test_masked_blocks_match_sequences_that_end_in_one(execution: str) -> None:
    model, prompt, drafts, block = runtime("zaya", execution), tokens(2, 9), tokens(2, 3, seed=1), 4
    cache = prefilled(model, prompt)
    logits = model.forward(blocks(cache.lengths, drafts, block), cache).logits
    sequence = torch.cat([prompt, drafts], 1)
    assert relative_error(logits[:, :3], expected("zaya", sequence)[:, 9:]) < TOLERANCE
    for draft in range(3):
        start = 3 + draft * block
        want = expected_block(sequence[:, : 9 + draft + 1], block)
        assert relative_error(logits[:, start : start + block], want) < TOLERANCE


@everywhere
def test_after_masked_blocks_any_number_of_drafts_can_be_kept(execution: str) -> None:
    model, prompt, drafts, after = runtime("zaya", execution), tokens(4, 6), tokens(4, 3, seed=1), tokens(4, 2, seed=2)
    cache, counts = prefilled(model, prompt), [0, 1, 2, 3]
    model.forward(blocks(cache.lengths, drafts, 2), cache)
    cache.extend(counts)
    for step in range(2):  # twice, as the second reads the convolutions' state where the first has shifted it
        logits = model.forward(Rows.chain(after[:, step : step + 1], cache.lengths), cache).logits
        cache.extend([1] * 4)
        for row, count in enumerate(counts):
            kept = torch.cat([prompt[row], drafts[row, :count], after[row, : step + 1]])[None]
            assert relative_error(logits[row], expected("zaya", kept)[0, -1:]) < TOLERANCE


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=5), sizes=st.lists(st.integers(1, 30), min_size=3, max_size=3)
)
def test_a_ragged_prefill_in_chunks_leaves_the_state_of_each_last_token(cuts: list[int], sizes: list[int]) -> None:
    model, ids, longest = runtime("zaya", "auto"), tokens(3, 31), max(sizes)
    cache, start = model.new_cache(3, 48), 0
    for index in range(longest):
        if start >= longest:
            break
        rows = min(cuts[index % len(cuts)], longest - start)
        model.forward(Rows.chain(ids[:, start : start + rows], cache.lengths), cache)
        cache.extend([max(0, min(size - start, rows)) for size in sizes])
        start += rows
    assert cache.sizes == sizes
    following = torch.stack([ids[row, size : size + 1] for row, size in enumerate(sizes)])
    logits = model.forward(Rows.chain(following, cache.lengths), cache).logits
    for row, size in enumerate(sizes):
        want = expected("zaya", ids[row : row + 1, : size + 1])[:, -1:]
        assert relative_error(logits[row : row + 1], want) < TOLERANCE


def test_a_prefix_can_be_forgotten_whole_but_not_in_part() -> None:
    model, ids = runtime("zaya", "auto"), tokens(2, 8)
    cache = prefilled(model, ids)
    with pytest.raises(ValueError, match="the state there is not kept"):
        cache.truncate([8, 7])
    cache.truncate([8, 0])
    logits = model.forward(Rows.chain(ids[:, :1], cache.lengths), cache).logits
    assert relative_error(logits[1:], expected("zaya", ids[1:, :1])) < TOLERANCE
    assert relative_error(logits[:1], expected("zaya", torch.cat([ids[:1], ids[:1, :1]], 1))[:, -1:]) < TOLERANCE
    cache.extend([1, 0])
    with pytest.raises(ValueError, match="committed once"):
        cache.extend([1, 0])


# Weights -------------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    return [name for name in oracle("zaya").state_dict() if ".layers.1." in name or ".layers." not in name]


@pytest.mark.parametrize("name", sorted(set(names()) - {"lm_head.weight"}))
def test_every_weight_moves_the_logits_far_beyond_the_tolerance(name: str) -> None:
    """What makes the comparisons above worth something: none of them could pass with this tensor ignored."""
    model, ids = oracle("zaya"), tokens(2, 16)
    tensors = {**model.state_dict()}
    tensors[name] = torch.ones_like(tensors[name]) if "norm" in name or "scale" in name else tensors[name] * 0
    changed = Zaya(ZayaConfig.from_hf(model.config.to_dict()), tensors, torch.float32)
    logits = changed.forward(Rows.chain(ids, torch.zeros(2, dtype=torch.int64)), changed.new_cache(2, 16)).logits
    assert relative_error(logits, expected("zaya", ids)) > 30 * TOLERANCE


@everywhere
def test_routers_choose_as_those_of_transformers_do_and_some_rows_skip(execution: str) -> None:
    model, ids, theirs = runtime("zaya", execution), tokens(3, 40), oracle("zaya")
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, inputs, found: seen.append(found[1:3]))
        for layer in theirs.model.layers
    ]
    expected("zaya", ids)
    for hook in hooks:
        hook.remove()
    routed = model.forward(Rows.chain(ids, torch.zeros(3, dtype=torch.int64)), model.new_cache(3, 48)).routed
    experts = model.config.experts
    for (probs, indices), counts in zip(seen, routed, strict=True):
        choice = indices[:, 0].where(probs[:, 0] > 0, experts)
        assert counts.tolist() == choice.bincount(minlength=experts + 1).tolist()
    assert (routed[:, -1] > 0).any() and (routed[:, -1] < 120).all()
    found = routing(routed)
    assert found.hit == sum(len(set(i[p > 0].tolist())) for p, i in seen) / len(seen)
    assert found.rows == 120 - routed[:, -1].double().mean()


def test_a_forward_of_rows_that_all_skip_leaves_the_experts_alone() -> None:
    model, ids = oracle("zaya"), tokens(1, 5)
    tensors = {**model.state_dict()}
    for layer in range(3):
        tensors[f"model.layers.{layer}.mlp.gate.balancing_biases"] = torch.tensor([0.0] * 5 + [2.0])
    for execution in ("eager", "auto"):
        skipping = Zaya(ZayaConfig.from_hf(model.config.to_dict()), tensors, torch.float32, execution=execution)
        out = skipping.forward(Rows.chain(ids, torch.zeros(1, dtype=torch.int64)), skipping.new_cache(1, 16))
        assert out.routed is not None and routing(out.routed) == type(routing(out.routed))(hit=0.0, rows=0.0)
        assert out.logits.isfinite().all()


# Cost ----------------------------------------------------------------------------------------------------------------


def counted_grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """`F.grouped_mm` in products that torch's counter sees."""
    ends = [0, *offs.tolist()]
    parts = [x[a:b] @ w for a, b, w in zip(ends, ends[1:], weight, strict=False)]
    return torch.cat([*parts, x.new_full((len(x) - ends[-1], weight.shape[-1]), float("nan"))])


@pytest.mark.parametrize(("rows", "context"), [(1, 40), (5, 17), (32, 0)])
def test_flops_equal_torchs_counter_given_what_the_routers_did(
    rows: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = runtime("zaya", "eager"), tokens(2, 64)
    cache = prefilled(model, ids[:, :context]) if context else model.new_cache(2, 64)
    monkeypatch.setattr(F, "grouped_mm", counted_grouped_mm)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model.forward(Rows.chain(ids[:, :rows], cache.lengths), cache)
    # torch's dense attention computes every new pair, visible or not; our depthwise convolution is no product to it.
    depthwise = 2 * rows * model.config.layers * 4 * model.config.mixed
    cost = model.cost(rows, [context] * 2, 2 * rows, rows * rows, routing(out.routed))
    assert cost.flops == pytest.approx(counter.get_total_flops() + depthwise, rel=1e-12)


def test_a_decoded_row_reads_every_stored_parameter_but_the_experts_it_is_not_sent_to() -> None:
    model = runtime("zaya", "eager")
    cache = prefilled(model, tokens(1, 4))
    out = model.forward(Rows.chain(tokens(1, 1), cache.lengths), cache)
    stored = sum(tensor.numel() for name, tensor in oracle("zaya").state_dict().items() if name != "lm_head.weight")
    c = model.config
    idle = sum(c.experts - int((counts[:-1] > 0).sum()) for counts in out.routed)
    cost = model.cost(1, [4], 1, routing=routing(out.routed))
    # The tied embedding is read as the head, and the looked-up row again.
    assert cost.weight_bytes == pytest.approx(4 * (stored - idle * 3 * c.width * c.ffn + c.width))
    state = cache.mixed.numel() + cache.delayed.numel()
    assert cost.kv_bytes == 4 * (4 * c.layers * 2 * c.kv_heads * c.head_dim + state)


# Folders -------------------------------------------------------------------------------------------------------------


def saved(folder: Path, **extra: Any) -> Any:
    config_type, model_type, own = FAMILIES["zaya"]
    torch.manual_seed(3)
    model = widened(model_type(config_type(**{**SHAPE, **own, **extra})))
    model.save_pretrained(folder, max_shard_size="200KB")
    return model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_sharded_folder_in_the_published_layout_is_read(tmp_path: Path, tied: bool) -> None:
    theirs = saved(tmp_path / "m", tie_word_embeddings=tied, mask_token_id=MASK)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    loaded = loading.load({"path": str(tmp_path / "m")}, "float32")
    assert isinstance(loaded.config, ZayaConfig)
    assert (loaded.config.mask_id, loaded.config.eos_ids, loaded.config.tied) == (MASK, (2,), tied)
    model, ids = build(loaded, torch.float32, torch.device("cpu"), "auto"), tokens(1, 12)
    logits = model.forward(Rows.chain(ids, torch.zeros(1, dtype=torch.int64)), model.new_cache(1, 16)).logits
    with torch.no_grad():
        assert relative_error(logits, theirs(ids).logits) < TOLERANCE


def test_balancing_biases_are_not_rounded(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    exact, rounded = (loading.load({"path": str(tmp_path / "m")}, dtype).tensors for dtype in ("float32", "bfloat16"))
    for name, tensor in rounded.items():
        assert tensor.dtype == (torch.float32 if name.endswith("balancing_biases") else torch.bfloat16), name
        assert tensor.dtype == torch.bfloat16 or torch.equal(tensor, exact[name])


def test_a_folder_that_lacks_an_expert_gets_one_line(tmp_path: Path) -> None:
    saved(tmp_path / "m")
    config = (tmp_path / "m" / "config.json").read_text()
    (tmp_path / "m" / "config.json").write_text(config.replace('"num_experts": 5', '"num_experts": 6'))
    with pytest.raises(UserError, match=r"has shape \(6,\), but config.json says \(7,\)|out_proj.weight has shape"):
        loading.load({"path": str(tmp_path / "m")})


TINY_RANDOM = {
    "family": "zaya", "layers": 4, "width": 64, "ffn": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 300,
    "max_positions": 128, "experts": 8, "router_width": 16,
}  # fmt: skip


def test_random_weights_load_into_transformers_and_spread_over_the_experts() -> None:
    loaded = loading.load({"config": TINY_RANDOM, "weights": "random"}, "float32")
    theirs = ZayaForCausalLM(TheirConfig(**{k: v for k, v in loaded.config.to_hf().items() if k != "model_type"}))
    missing, unexpected = theirs.load_state_dict(loaded.tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model, ids = build(loaded, torch.float32, torch.device("cpu"), "auto"), tokens(4, 60)
    out = model.forward(Rows.chain(ids, torch.zeros(4, dtype=torch.int64)), model.new_cache(4, 64))
    with torch.no_grad():
        assert relative_error(out.logits, theirs.eval()(ids).logits) < TOLERANCE
    assert out.routed is not None
    assert (out.routed[:, -1] == 0).all()  # as published, nothing skips
    assert ((out.routed[:, :-1] > 0).sum(1) >= 5).all()


def test_native_kernels_are_refused_where_they_cannot_run() -> None:
    config, tensors = ZayaConfig.from_hf(oracle("zaya").config.to_dict()), oracle("zaya").state_dict()
    with pytest.raises(cpu.NativeUnavailable, match="float16"):
        Zaya(config, tensors, torch.float16, execution="native")
    assert Zaya(config, tensors, torch.float32, execution="eager").kernels["forward"] == "torch"


# Size ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@everywhere
def test_two_layers_of_the_published_widths_match_transformers(execution: str) -> None:
    torch.manual_seed(5)
    theirs = ZayaForCausalLM(TheirConfig(num_hidden_layers=2, vocab_size=400, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            fan_in = parameter.shape[1:].numel() if "experts" not in name else parameter.shape[-1]
            parameter.normal_(std=2 * fan_in**-0.5 if parameter.dim() > 1 else 0.1)
            if "norm" in name or name.endswith("_scale"):
                parameter.add_(1.0)
    model, ids = built(theirs, execution), tokens(2, 40)
    with torch.no_grad():
        want = theirs(ids).logits
    cache, parts = model.new_cache(2, 48), []
    for start, end in [(0, 30), (30, 31), (31, 40)]:
        parts.append(model.forward(Rows.chain(ids[:, start:end], cache.lengths), cache).logits)
        cache.extend([end - start] * 2)
    assert relative_error(torch.cat(parts, 1), want) < TOLERANCE
