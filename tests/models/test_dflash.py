"""The DFlash drafter against its formulas, written out once more without a cache, and its checkpoint layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import oracle, relative_error, runtime
from zbench.errors import UserError
from zbench.kernels import cpu
from zbench.models import dflash
from zbench.models.config import ModelConfig
from zbench.models.dflash import DFlashCheckpoint, DFlashDrafter
from zbench.models.drafters import DFlashConfig, dflash_taps
from zbench.models.rows import Rows
from zbench.models.transformer import Transformer, rms_norm

needs_native = pytest.mark.skipif(not cpu.available(), reason=f"native CPU kernels: {cpu.unavailable_reason()}")
EXECUTIONS = ["eager", pytest.param("native", marks=needs_native)]
# Of the target, and whether the drafter is one native call rather than torch's operators around its layers.
RUNS = [("eager", True), *(pytest.param("native", native, marks=needs_native) for native in (False, True))]
BLOCK = 5
TAPS = (1, 3)
MASK = 299


def wide_drafter(target: ModelConfig, taps: tuple[int, ...] = TAPS, seed: int = 3) -> DFlashCheckpoint:
    """Two layers, with weights wide enough that a wrong mask, norm or rotation moves the logits."""
    config = replace(dflash.random_drafter(target, layers=2, block=BLOCK).config, taps=taps)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.empty(shape).normal_(std=0.25 if len(shape) > 1 else 0.1, generator=generator) + (len(shape) == 1)
        for name, shape in dflash.tensor_shapes(config).items()
    }
    return DFlashCheckpoint(config, tensors, "", "test")


def expected(
    config: DFlashConfig, tensors: Mapping[str, Tensor], embedding: Tensor, head: Tensor, taps: Tensor, anchor: int
) -> Tensor:
    """Logits [block - 1, V] in float64 for one sequence; taps [T, n D] of all tokens before the anchor."""
    c, w = config.body, {name: tensor.double() for name, tensor in tensors.items()}
    context, block = len(taps), config.block

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.rms_eps).sqrt() * weight

    def rope(x: Tensor, start: int) -> Tensor:  # [T, heads, d]
        half = c.head_dim // 2
        frequency = c.rope_theta ** -(torch.arange(half).double() / half)
        angle = torch.arange(start, start + len(x)).double()[:, None, None] * frequency
        turned = torch.polar(torch.ones_like(angle), angle) * torch.complex(x[..., :half], x[..., half:])
        return torch.cat([turned.real, turned.imag], -1)

    features = norm(taps.double() @ w["fc.weight"].T, w["hidden_norm.weight"])
    x = embedding.double()[[anchor] + [config.mask_id] * (block - 1)]
    for layer in range(c.layers):
        part = {name.removeprefix(f"layers.{layer}."): weight for name, weight in w.items()}
        y = norm(x, part["input_layernorm.weight"])
        source = torch.cat([features, y])
        q = (y @ part["self_attn.q_proj.weight"].T).view(block, c.heads, c.head_dim)
        k = (source @ part["self_attn.k_proj.weight"].T).view(context + block, c.kv_heads, c.head_dim)
        v = (source @ part["self_attn.v_proj.weight"].T).view(context + block, c.kv_heads, c.head_dim)
        q = rope(norm(q, part["self_attn.q_norm.weight"]), context)
        k = rope(norm(k, part["self_attn.k_norm.weight"]), 0).repeat_interleave(c.heads // c.kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / c.head_dim**0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(c.heads // c.kv_heads, 1))
        x = x + mixed.reshape(block, -1) @ part["self_attn.o_proj.weight"].T
        y = norm(x, part["post_attention_layernorm.weight"])
        gate, up = y @ part["mlp.gate_proj.weight"].T, y @ part["mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ part["mlp.down_proj.weight"].T
    return norm(x, w["norm.weight"])[1:] @ head.double().T


def hidden_states(target: Transformer, ids: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
    """One [B, R, D] per tap."""
    cache = target.new_cache(*ids.shape)
    hidden = target.forward(Rows.chain(ids, cache.lengths), cache, logits=ids[:, :0], capture=taps).hidden
    return [hidden[tap] for tap in taps]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 299, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("execution", "native"), RUNS)
def test_drafts_follow_the_formulas_over_rounds_of_a_ragged_batch(execution: str, native: bool) -> None:
    target = runtime("qwen3", execution)
    checkpoint = wide_drafter(target.config)
    drafter = DFlashDrafter(checkpoint.config, checkpoint.tensors, target, native)
    assert (drafter.native is not None) == (execution == "native" and native)
    ids = tokens(3, 40)
    taps = hidden_states(target, ids, TAPS)
    everything = torch.cat(taps, -1)
    cache = drafter.new_cache(3, 48)
    drafter.read([tap[:, :11] for tap in taps], cache, [4, 11, 1])
    unread: tuple[Any, ...] = ()
    for counts in ([1, 1, 1], [BLOCK, 2, 3], [0, BLOCK, 1], [2, 0, BLOCK], []):
        read = unread[1] if unread else [0] * 3
        anchor = ids.gather(1, (cache.lengths + torch.tensor(read))[:, None])[:, 0]
        drafts = drafter.draft(anchor, cache, BLOCK, *unread)
        for row, size in enumerate(cache.sizes):
            want = expected(
                checkpoint.config,
                checkpoint.tensors,
                target.embedding,
                target.embedding,  # tied
                everything[row, :size],
                int(anchor[row]),
            )
            assert relative_error(drafts.logits[row].double(), want) < 1e-4
            assert drafts.tokens[row].tolist() == want.argmax(-1).tolist()
        # All of a block's rows are offered, only what was accepted stays.
        offered = cache.lengths[:, None] + torch.arange(BLOCK)
        unread = [tap[torch.arange(3)[:, None], offered.clamp(max=39)] for tap in taps], counts


@needs_native
def test_bfloat16_drafts_stay_near_the_formulas() -> None:
    target = runtime("qwen3", "native", torch.bfloat16)
    checkpoint = wide_drafter(target.config)
    tensors = {name: tensor.bfloat16() for name, tensor in checkpoint.tensors.items()}
    drafter = DFlashDrafter(checkpoint.config, tensors, target)
    ids = tokens(1, 12)
    taps = hidden_states(target, ids, TAPS)
    cache = drafter.new_cache(1, 32)
    drafter.read([tap[:, :9] for tap in taps], cache, [9])
    logits = drafter.draft(ids[:, 9], cache, BLOCK).logits
    want = expected(
        checkpoint.config, tensors, target.embedding, target.embedding, torch.cat(taps, -1)[0, :9], int(ids[0, 9])
    )
    assert relative_error(logits[0].double(), want) < 0.05


def rounds(
    drafter: DFlashDrafter,
    features: list[Tensor],
    anchors: Tensor,
    sizes: list[int],
    counts: list[list[int]],
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and tokens of the draft after each round of reading `features`, one [B, T, D] per tap, and values kept."""
    cache, sequence = drafter.new_cache(len(sizes), 96), torch.arange(len(sizes))[:, None]
    drafter.read([feature[:, : max(sizes)] for feature in features], cache, sizes)
    drafts, unread = [], ()
    for read, anchor in zip([*counts, []], anchors, strict=False):
        drafts.append(drafter.draft(anchor, cache, block, *unread))
        offered = cache.lengths[:, None] + torch.arange(block)
        unread = [feature[sequence, offered] for feature in features], read
    committed = torch.stack([cache.values[:, b, :, : min(cache.sizes)] for b in range(len(sizes))])
    return torch.stack([d.logits for d in drafts]), torch.stack([d.tokens for d in drafts]), committed


@needs_native
@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    block=st.integers(2, 9),
    layers=st.integers(1, 3),
    heads=st.sampled_from([(1, 1, 16), (6, 2, 16), (4, 4, 32), (3, 1, 48)]),
    own_head=st.none() | st.integers(5, 60),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_the_native_drafter_is_torchs(
    sizes: list[int],
    block: int,
    layers: int,
    heads: tuple[int, int, int],
    own_head: int | None,
    threads: int,
    data: st.DataObject,
) -> None:
    target, batch = runtime("qwen2", "native"), len(sizes)
    some = st.lists(st.integers(0, block), min_size=batch, max_size=batch)
    counts = data.draw(st.lists(some, min_size=1, max_size=3))
    shape = dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))
    body = replace(dflash.random_drafter(target.config, layers=1).config.body, layers=layers, ffn=48, **shape)
    config = DFlashConfig(replace(body, vocab=own_head or body.vocab), TAPS, MASK, block, own_head is not None)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    tensors = {
        name: torch.empty(of).normal_(std=0.25 if len(of) > 1 else 0.1, generator=generator) + (len(of) == 1)
        for name, of in dflash.tensor_shapes(config).items()
    }
    if own_head:
        tensors["d2t"] = torch.randperm(300, generator=generator)[:own_head].sort().values - torch.arange(own_head)
    features = [torch.randn(batch, 80, 96, generator=generator) for _ in TAPS]
    anchors = torch.randint(0, 300, (len(counts) + 1, batch), generator=generator)
    given_rounds = (features, anchors, sizes, counts, block)
    torch.set_num_threads(threads)
    try:
        native, around = (rounds(DFlashDrafter(config, tensors, target, n), *given_rounds) for n in (True, False))
    finally:
        torch.set_num_threads(1)
    eager = rounds(DFlashDrafter(config, tensors, runtime("qwen2", "eager")), *given_rounds)
    for want in (around, eager):
        assert relative_error(native[0], want[0]) < 1e-5
        assert torch.equal(native[1], want[1])
        assert relative_error(native[2], want[2]) < 1e-5


@needs_native
def test_in_bfloat16_native_drafts_are_nearer_to_exact_arithmetic_than_torchs() -> None:
    checkpoint = wide_drafter(TARGET)
    rounded = {name: tensor.bfloat16() for name, tensor in checkpoint.tensors.items()}
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(2, 80, 96, generator=generator).bfloat16().float() for _ in TAPS]
    plan = (features, torch.tensor([[5, 6], [7, 8], [9, 10]]), [20, 3], [[2, 5], [1, 0]], BLOCK)

    def logits(target: Any, dtype: torch.dtype) -> Tensor:
        tensors = {name: tensor.to(dtype) for name, tensor in rounded.items()}
        return rounds(DFlashDrafter(checkpoint.config, tensors, target), *plan)[0].double()

    weights = {name: tensor.bfloat16().float() for name, tensor in oracle("qwen3").state_dict().items()}
    exact_target = Transformer(TARGET, weights, torch.float32, execution="eager")
    exact = logits(exact_target, torch.float32)
    native, eager = (logits(runtime("qwen3", e, torch.bfloat16), torch.bfloat16) - exact for e in ("native", "eager"))
    assert native.norm() < eager.norm() < 0.1 * exact.norm()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_drafts_depend_neither_on_the_batch_nor_on_how_it_was_read_nor_on_the_threads(
    dtype: torch.dtype,
) -> None:
    target, checkpoint = runtime("qwen3", "native", dtype), wide_drafter(TARGET)
    drafter = DFlashDrafter(checkpoint.config, checkpoint.tensors, target)
    features = [torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = []
    try:
        for sequences, parts, threads in (((0, 1, 2), (23,), 1), ((1,), (1,) * 23, 2), ((2, 1), (5, 11, 7), 3)):
            torch.set_num_threads(threads)
            cache, begin = drafter.new_cache(len(sequences), 48), 0
            of = [feature[list(sequences)] for feature in features]
            for size in parts[:-1]:
                drafter.read([f[:, begin : begin + size] for f in of], cache, [size] * len(sequences))
                begin += size
            last = [f[:, begin:] for f in of], [parts[-1]] * len(sequences)  # what follows is no token of theirs
            drafts = drafter.draft(torch.tensor([7] * len(sequences)), cache, BLOCK, *last)
            found.append(drafts.logits[sequences.index(1)])
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_native
def test_a_shorter_block_is_drafted_as_a_shorter_block_of_torchs_and_only_what_fits_is() -> None:
    target = runtime("qwen3", "native")
    checkpoint = wide_drafter(target.config)
    features = [torch.randn(1, 28, 96, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    sides = [DFlashDrafter(checkpoint.config, checkpoint.tensors, target, native) for native in (True, False)]
    for drafter in sides:
        cache = drafter.new_cache(1, 32)
        drafter.read(features, cache, [28])
        assert [len(drafter.draft(torch.tensor([7]), cache, n).logits[0]) for n in (2, 4, 3)] == [1, 3, 2]
        with pytest.raises(ValueError, match="5 rows after 28 tokens exceed the cache's 32"):
            drafter.draft(torch.tensor([7]), cache, 5)


def test_what_native_code_does_not_take_is_drafted_by_torch_and_says_why() -> None:
    target = runtime("qwen3", "auto")
    odd = replace(wide_drafter(target.config).config, body=replace(target.config, layers=1, head_dim=24, tied=False))
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: torch.empty(of).normal_(std=0.25, generator=generator) + (len(of) == 1)
        for name, of in dflash.tensor_shapes(odd).items()
    }
    drafter = DFlashDrafter(odd, tensors, target)
    assert drafter.native is None and drafter.kernels["drafter"] == "torch"
    features = [torch.randn(1, 9, 96, generator=generator) for _ in TAPS]
    cache = drafter.new_cache(1, 32)
    drafts = drafter.draft(torch.tensor([7]), cache, BLOCK, features, [6])
    taps = torch.cat(features, -1)[0, :6]
    want = expected(odd, tensors, target.embedding, target.embedding, taps, 7)
    assert relative_error(drafts.logits[0].double(), want) < 1e-4
    assert drafts.tokens[0].tolist() == want.argmax(-1).tolist()
    if cpu.available():
        assert "multiples of 16" in drafter.kernels["why_drafter_not_native"]


@needs_native
def test_a_head_that_torch_runs_leaves_the_layers_native() -> None:
    compiled, checkpoint = runtime("qwen3", "compiled"), wide_drafter(TARGET)
    features = [torch.randn(1, 9, 96, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = []
    for target in (compiled, runtime("qwen3", "native")):
        drafter = DFlashDrafter(checkpoint.config, checkpoint.tensors, target)
        assert drafter.kernels["drafter"].startswith("native")
        assert (drafter.native is None) == ("why_drafter_not_native" in drafter.kernels) == (target is compiled)
        found.append(drafter.draft(torch.tensor([7]), drafter.new_cache(1, 32), BLOCK, features, [6]).logits)
    assert relative_error(*found) < 1e-5


@needs_native
def test_a_mixture_of_experts_lends_its_packed_head() -> None:
    checkpoint = wide_drafter(TARGET)
    features = [torch.randn(1, 9, 96, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = []
    for execution in ("native", "eager"):
        drafter = DFlashDrafter(checkpoint.config, checkpoint.tensors, runtime("zaya", execution))
        assert (drafter.native is not None) == (execution == "native")
        found.append(drafter.draft(torch.tensor([7]), drafter.new_cache(1, 32), BLOCK, features, [6]).logits)
    assert relative_error(*found) < 1e-5


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_target_lends_its_head_and_layers_alone_have_none(execution: str) -> None:
    target, ids = runtime("qwen2", execution), tokens(2, 6)
    last, cache = target.config.layers, target.new_cache(2, 16)
    out = target.forward(Rows.chain(ids, cache.lengths), cache, capture=(last,))
    norm = oracle("qwen2").model.norm.weight.detach()
    assert relative_error(target.head(rms_norm(out.hidden[last], norm, target.config.rms_eps)), out.logits) < 1e-5
    headless = Transformer(
        target.config, oracle("qwen2").state_dict(), torch.float32, execution=execution, headless=True
    )
    rows, cache = Rows.chain(ids, cache.lengths), headless.new_cache(2, 16)
    layers_only = headless.forward(rows, cache, logits=ids[:, :0], capture=(last,))
    assert torch.equal(layers_only.hidden[last], out.hidden[last])
    assert layers_only.logits.shape == (2, 0, target.config.vocab)
    with pytest.raises(ValueError, match="no head"):
        headless.forward(rows, cache)


def test_the_released_qwen3_8b_drafter_has_58_tensors() -> None:
    body = ModelConfig(
        family="qwen3",
        layers=5,
        width=4096,
        ffn=12288,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=151936,
        max_positions=40960,
        tied=False,
        qk_norm=True,
    )
    shapes = dflash.tensor_shapes(DFlashConfig(body, dflash_taps(36, 5), 151669, 16))
    assert len(shapes) == 58
    assert shapes["fc.weight"] == (4096, 5 * 4096)
    assert shapes["layers.4.self_attn.k_norm.weight"] == (128,)
    assert not any("embed" in name or "lm_head" in name for name in shapes)


def test_default_taps_are_those_of_the_released_checkpoints() -> None:
    assert dflash_taps(36, 5) == (2, 10, 18, 26, 34)  # Qwen3-8B
    assert dflash_taps(30, 1) == (16,)


@given(layers=st.integers(1, 80), count=st.integers(1, 8))
def test_default_taps_are_distinct_hidden_states_of_the_target_or_refused(layers: int, count: int) -> None:
    try:
        taps = dflash_taps(layers, count)
    except UserError:
        assert count > layers - 3
    else:
        assert len(set(taps)) == count
        assert all(1 <= tap <= layers for tap in taps)


def write(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def released(target: ModelConfig, folder: Path) -> tuple[dict[str, Any], DFlashCheckpoint]:
    """The config of a drafter as released, and the drafter."""
    drafter = wide_drafter(target)
    dflash.save_drafter(folder, drafter, target)
    return json.loads((folder / "config.json").read_text()), drafter


TARGET = runtime("qwen3", "eager").config


def test_a_saved_drafter_loads_as_it_was(tmp_path: Path) -> None:
    config, drafter = released(TARGET, tmp_path)
    loaded = dflash.load_drafter(tmp_path, TARGET)
    assert loaded.config == drafter.config
    assert loaded.tensors.keys() == drafter.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in drafter.tensors.items())
    assert config["dflash_config"] == {"target_layer_ids": [0, 2], "mask_token_id": MASK}
    assert len(loaded.hash) == 64


def test_settings_may_stand_at_the_top_level_or_in_dflash_config(tmp_path: Path) -> None:
    config, drafter = released(TARGET, tmp_path)
    inside = {**config, "dflash_config": {**config["dflash_config"], "block_size": config.pop("block_size")}}
    outside = {**config, "block_size": BLOCK, **config.pop("dflash_config")}
    for layout in (inside, outside):
        layout.pop("block_size", None) if layout is inside else layout.pop("dflash_config", None)
        write(tmp_path, layout, drafter.tensors)
        assert dflash.load_drafter(tmp_path, TARGET).config == drafter.config


def speculators(config: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """The same drafter's config as speculators writes it: hidden states are counted as layer inputs."""
    settings = config.pop("dflash_config")
    return {
        "speculators_model_type": "dflash",
        "architectures": ["DFlashSpeculator"],
        "block_size": config.pop("block_size"),
        "mask_token_id": settings["mask_token_id"],
        "aux_hidden_state_layer_ids": [index + 1 for index in settings["target_layer_ids"]],
        "draft_vocab_size": config["vocab_size"],
        "transformer_layer_config": config,
        **extra,
    }


def test_the_speculators_layout_is_the_same_drafter(tmp_path: Path) -> None:
    config, drafter = released(TARGET, tmp_path)
    copies = {"embed_tokens.weight": torch.zeros(300, 96), "verifier_norm.weight": torch.zeros(96)}
    write(tmp_path, speculators(config), {**drafter.tensors, **copies})
    loaded = dflash.load_drafter(tmp_path, TARGET)
    assert loaded.config == drafter.config
    assert loaded.tensors.keys() == drafter.tensors.keys()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_reduced_vocabulary_drafts_the_target_ids_that_d2t_names(tmp_path: Path, execution: str) -> None:
    config, drafter = released(TARGET, tmp_path)
    known = torch.arange(40) * 7 + 3
    head = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    extra = {"lm_head.weight": head, "d2t": known - torch.arange(40), "t2d": torch.zeros(300, dtype=torch.bool)}
    write(tmp_path, speculators(config, draft_vocab_size=40), {**drafter.tensors, **extra})
    loaded = dflash.load_drafter(tmp_path, TARGET)
    target = runtime("qwen3", execution)
    reduced = DFlashDrafter(loaded.config, loaded.tensors, target)
    cache = reduced.new_cache(1, 32)
    taps = hidden_states(target, tokens(1, 6), TAPS)
    reduced.read(taps, cache, [6])
    drafts = reduced.draft(torch.tensor([5]), cache, BLOCK)
    logits = drafts.logits
    want = expected(loaded.config, loaded.tensors, target.embedding, head, torch.cat(taps, -1)[0], 5)
    assert logits.shape == (1, BLOCK - 1, 40)
    assert relative_error(logits[0].double(), want) < 1e-4
    assert torch.equal(drafts.tokens, known[logits.argmax(-1)])
    full = reduced.target_logits(logits)
    assert torch.equal(full[..., known], logits)
    assert full.isfinite().sum() == logits.numel()


@pytest.mark.parametrize("family", ["smollm", "qwen2"])  # a tied head and one apart
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_draft_vocabulary_is_the_first_part_of_the_targets(family: str, execution: str) -> None:
    target = runtime(family, execution)
    whole, tensors = wide_drafter(target.config), dict(oracle(family).state_dict())
    if target.config.tied:  # some checkpoints store a head all the same
        tensors["lm_head.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    part = dflash.reduced(whole, target.config, tensors, 90)
    drafts = []
    for checkpoint in (whole, part):
        drafter = DFlashDrafter(checkpoint.config, checkpoint.tensors, target)
        cache = drafter.new_cache(1, 32)
        drafter.read(hidden_states(target, tokens(1, 6), checkpoint.config.taps), cache, [6])
        drafts.append(drafter.draft(torch.tensor([5]), cache, BLOCK))
    # Torch's products may round otherwise where they are narrower.
    rounding = 0.0 if execution == "native" else 1e-5
    torch.testing.assert_close(drafts[1].logits, drafts[0].logits[..., :90], rtol=0, atol=rounding)
    assert torch.equal(drafts[1].tokens, drafts[0].logits[..., :90].argmax(-1))
    assert (drafts[0].tokens >= 90).any()
    costs = [checkpoint.config.cost(3, BLOCK, [6], 4) for checkpoint in (whole, part)]
    fewer = (target.config.vocab - 90) * target.config.width
    assert costs[0].weight_bytes - costs[1].weight_bytes == 4 * fewer
    assert costs[0].flops - costs[1].flops == 2 * (BLOCK - 1) * fewer


def test_a_draft_vocabulary_that_cannot_be_is_refused_in_one_line() -> None:
    given = TARGET, dict(oracle("qwen3").state_dict())
    whole = wide_drafter(TARGET)
    with pytest.raises(UserError, match="draft_vocab 301 is not within the vocabulary of 300 tokens"):
        dflash.reduced(whole, *given, 301)
    with pytest.raises(UserError, match="a head of its own"):
        dflash.reduced(dflash.reduced(whole, *given, 90), *given, 80)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 999}, "999 tokens.*300"),
        ({"hidden_size": 64}, "64 wide.*96"),
        ({"block_size": 1}, "block_size must be a number from 2 to 64"),
        ({"dflash_config": {"mask_token_id": 300, "target_layer_ids": [0, 2]}}, "mask_token_id.*0 to 299"),
        ({"dflash_config": {"mask_token_id": 299}}, "target_layer_ids is missing"),
        ({"dflash_config": {"mask_token_id": 299, "target_layer_ids": [0, 3]}}, r"\[1, 4\].*3 layers"),
        ({"dflash_config": {"mask_token_id": 299, "target_layer_ids": [0, 2], "use_swa": True}}, "use_swa"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding_attention"),
        ({"num_target_layers": 36}, "made for a target of 36 layers, but this one has 3"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"rope_is_neox_style": False}, "rope_is_neox_style false"),
        ({"rope_interleave": True}, "rope_interleave"),
        ({"attention_bias": True}, "attention_bias"),
        ({"intermediate_size": 64}, "gate_proj.weight has shape"),
        ({"num_hidden_layers": 3, "layer_types": None}, "lacks layers.2"),
        ({"num_hidden_layers": 1, "layer_types": None}, "variant that is not supported: layers.1"),
        ({"speculators_model_type": "eagle3"}, "is not dflash"),
        ({"dflash_config": 3}, "must be mappings"),
    ],
)
def test_a_drafter_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config, drafter = released(TARGET, tmp_path)
    write(tmp_path, config | change, drafter.tensors)
    with pytest.raises(UserError, match=message) as caught:
        dflash.load_drafter(tmp_path, TARGET)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_beyond_the_targets_and_an_embedding_of_its_own_are_refused(tmp_path: Path) -> None:
    """A token that the target has not would be read from beyond its embedding."""
    config, drafter = released(TARGET, tmp_path)
    embedding = {"embed_tokens.weight": torch.ones(300, 96)}
    write(tmp_path, config, {**drafter.tensors, **embedding})
    with pytest.raises(UserError, match=r"a variant that is not supported: embed_tokens\.weight"):
        dflash.load_drafter(tmp_path, TARGET)
    write(
        tmp_path, speculators(config, draft_vocab_size=301), {**drafter.tensors, "lm_head.weight": torch.ones(301, 96)}
    )
    with pytest.raises(UserError, match="draft_vocab_size must be 1 to 300, not 301"):
        dflash.load_drafter(tmp_path, TARGET)


@pytest.mark.parametrize("extra", [{"sample_from_anchor": True}, {"projector_type": "domino"}, {"shift_label": True}])
def test_later_speculators_variants_are_refused_by_name(tmp_path: Path, extra: dict[str, Any]) -> None:
    config, drafter = released(TARGET, tmp_path)
    write(tmp_path, speculators(config, **extra), drafter.tensors)
    with pytest.raises(UserError, match=next(iter(extra))):
        dflash.load_drafter(tmp_path, TARGET)


def test_a_random_drafter_fits_its_target_and_follows_its_seed() -> None:
    target = runtime("smollm", "eager")
    first, again, other = (dflash.random_drafter(target.config, seed, layers=2) for seed in (1, 1, 2))
    assert torch.equal(first.tensors["fc.weight"], again.tensors["fc.weight"])
    assert not torch.equal(first.tensors["fc.weight"], other.tensors["fc.weight"])
    drafter = DFlashDrafter(first.config, first.tensors, target)
    cache = drafter.new_cache(1, 32)
    drafter.read(hidden_states(target, tokens(1, 4), first.config.taps), cache, [4])
    assert drafter.draft(torch.tensor([5]), cache, 7).logits.isfinite().all()


def test_flops_are_those_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    target = runtime("qwen3", "eager")
    checkpoint = wide_drafter(target.config)
    drafter = DFlashDrafter(checkpoint.config, checkpoint.tensors, target)
    taps = hidden_states(target, tokens(2, 9), TAPS)
    cache = drafter.new_cache(2, 32)
    with FlopCounterMode(display=False) as prefill:
        drafter.read(taps, cache, [9, 9])
    assert prefill.get_total_flops() == drafter.cost(9, 0, [0, 0]).flops
    with FlopCounterMode(display=False) as step, sdpa_kernel(SDPBackend.MATH):
        drafter.read([tap[:, :BLOCK] for tap in taps], cache, [2, 2])
        drafter.draft(torch.tensor([5, 6]), cache, BLOCK)
    assert step.get_total_flops() == drafter.cost(BLOCK, BLOCK, [11, 11]).flops


def test_bytes_are_the_weights_once_the_context_once_and_what_is_written() -> None:
    target = runtime("qwen3", "eager")
    checkpoint = wide_drafter(target.config)
    drafter = DFlashDrafter(checkpoint.config, checkpoint.tensors, target)
    one, two = drafter.cost(BLOCK, BLOCK, [20]), drafter.cost(BLOCK, BLOCK, [20, 10])
    kv = 4 * 2 * 2 * TARGET.kv_heads * TARGET.head_dim  # float32, keys and values, two layers
    assert two.kv_bytes == 1.5 * one.kv_bytes == 30 * kv
    # Keys and values are projected twice, for context and block, each with weights and norm; the head is the target's.
    twice = [t for name, t in checkpoint.tensors.items() if "k_proj" in name or "v_proj" in name or "k_norm" in name]
    stored = sum(tensor.numel() for tensor in (*checkpoint.tensors.values(), *twice))
    assert one.weight_bytes == 4 * (stored + (TARGET.vocab + BLOCK) * TARGET.width)
    # A second sequence looks up its own embedding rows; all other weights are read once.
    assert two.weight_bytes - one.weight_bytes == 4 * BLOCK * TARGET.width
    assert one.bytes_written == 2 * BLOCK * kv + 4 * (BLOCK - 1) * TARGET.vocab
