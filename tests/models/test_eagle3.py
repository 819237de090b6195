"""The EAGLE-3 drafter against its published recurrence, written down again in float64 without a cache."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import relative_error
from zbench.errors import UserError
from zbench.kernels import cpu
from zbench.models.config import ModelConfig
from zbench.models.cost import Cost
from zbench.models.drafters import eagle3_taps
from zbench.models.eagle3 import (
    Eagle3Checkpoint,
    Eagle3Drafter,
    load_drafter,
    random_drafter,
    save_drafter,
    tensor_shapes,
)

TARGET = ModelConfig(
    family="llama", layers=8, width=96, ffn=160, heads=6, kv_heads=2, head_dim=16, vocab=300, max_positions=512
)
needs_native = pytest.mark.skipif(not cpu.available(), reason=f"native CPU kernels: {cpu.unavailable_reason()}")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"draft_vocab": 300},
    {"norm_before_residual": True},
    {"norm_before_fc": True},
    {"fc_norm": True},
    {"norm_output": True},
    {"norm_before_fc": True, "fc_norm": True, "norm_output": True, "norm_before_residual": True},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path / "cache"))


def checkpoint(**variant: Any) -> Eagle3Checkpoint:
    """A random drafter with weights wide enough that a wrong mask, norm or rotation moves the logits."""
    base = random_drafter(TARGET, 0, variant.pop("draft_vocab", 64))
    config = replace(base.config, **variant)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: 1 + 0.3 * torch.randn(shape, generator=generator)
        if len(shape) == 1
        else 0.15 * torch.randn(shape, generator=generator)
        for name, shape in tensor_shapes(config).items()
        if name != "d2t"
    }
    return replace(base, config=config, tensors=tensors | {k: v for k, v in base.tensors.items() if k == "d2t"})


EMBEDDING = torch.randn(TARGET.vocab, TARGET.width, generator=torch.Generator().manual_seed(1))


def drafter_of(stored: Eagle3Checkpoint, native: bool = True, dtype: torch.dtype = torch.float32) -> Eagle3Drafter:
    return Eagle3Drafter(stored.config, stored.tensors, EMBEDDING.to(dtype), dtype, native=native)


def published_logits(stored: Eagle3Checkpoint, taps: Tensor, tokens: list[int], path: list[int]) -> Tensor:
    """Draft logits [Vd] after reading pairs (taps [n, 3 D], tokens [n]) and then drafting `path`, all at once."""
    config, layer = stored.config, stored.config.layer
    w = {name.removesuffix(".weight"): tensor.double() for name, tensor in stored.tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + layer.rms_eps).sqrt() * w[name]

    def rope(x: Tensor) -> Tensor:
        half = layer.head_dim // 2
        frequencies = torch.tensor([layer.rope_theta ** (-i / half) for i in range(half)]).double()
        angles = torch.arange(len(x)).double()[:, None, None] * frequencies
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def run(hidden: Tensor, ids: list[int]) -> Tensor:
        normed = norm(hidden, "midlayer.hidden_norm")
        x = torch.cat([norm(EMBEDDING[ids].double(), "midlayer.input_layernorm"), normed], -1)
        q, k, v = ((x @ w[f"midlayer.self_attn.{n}_proj"].T).view(len(ids), -1, layer.head_dim) for n in "qkv")
        groups = layer.heads // layer.kv_heads
        k, v = rope(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("ihd,jhd->hij", rope(q), k) / math.sqrt(layer.head_dim)
        scores += torch.full((len(ids), len(ids)), -math.inf).triu(1)
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        h1 = (normed if config.norm_before_residual else hidden) + mixed @ w["midlayer.self_attn.o_proj"].T
        y = norm(h1, "midlayer.post_attention_layernorm")
        gate = torch.nn.functional.silu(y @ w["midlayer.mlp.gate_proj"].T)
        return h1 + (gate * (y @ w["midlayer.mlp.up_proj"].T)) @ w["midlayer.mlp.down_proj"].T

    taps = taps.double()
    if config.fc_norm:
        taps = torch.cat([norm(part, f"fc_norm.{i}") for i, part in enumerate(taps.chunk(3, -1))], -1)
    if config.norm_before_fc:
        taps = norm(taps, "input_norm")
    hidden = taps @ w["fc"].T
    for count in range(len(path) + 1):
        output = run(hidden, tokens + path[:count])[-1:]
        hidden = torch.cat([hidden, norm(output, "norm") if config.norm_output else output])
    return w["lm_head"] @ norm(output, "norm")[0]


def features(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3 * TARGET.width, generator=torch.Generator().manual_seed(seed))


def ids_of(count: int, seed: int) -> list[int]:
    return torch.randint(0, TARGET.vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def read(drafter: Eagle3Drafter, cache: Any, taps: list[Tensor], tokens: list[list[int]], start: list[int], rows: int):
    """Feed `rows` pairs of each sequence from `start` on, padded where it has no more."""
    padded = torch.zeros(len(taps), rows, 3 * TARGET.width)
    ids = torch.zeros(len(taps), rows, dtype=torch.int64)
    counts = []
    for index, begin in enumerate(start):
        part = taps[index][begin : begin + rows]
        padded[index, : len(part)], ids[index, : len(part)] = part, torch.tensor(tokens[index][begin : begin + rows])
        counts.append(len(part))
    hidden = drafter.extend(padded.chunk(3, -1), ids, cache)
    cache.extend(counts)
    return torch.stack([hidden[index, count - 1] for index, count in enumerate(counts)])[:, None]


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v), "released"))
def test_a_chain_has_the_logits_of_the_published_recurrence(variant: dict[str, Any], native: bool) -> None:
    stored = checkpoint(**variant)
    drafter = drafter_of(stored, native)
    assert (drafter.native is not None) == native
    sizes, depth = [9, 5], 3
    taps = [features(size, 10 + size) for size in sizes]
    tokens = [ids_of(size, 20 + size) for size in sizes]
    paths = [ids_of(depth, 30 + size) for size in sizes]
    cache = drafter.new_cache(2, 32, nodes=depth)
    read(drafter, cache, taps, tokens, [0, 0], 4)
    hidden = read(drafter, cache, taps, tokens, [4, 4], 5)
    for level in range(depth + 1):
        got = drafter.logits(hidden)[:, 0]
        want = torch.stack([published_logits(stored, taps[b], tokens[b], paths[b][:level]) for b in range(2)])
        assert relative_error(got.double(), want) < 1e-5
        if level < depth:
            ids = torch.tensor([[path[level]] for path in paths])
            visible = (torch.arange(depth) <= level).view(1, 1, depth)
            hidden = drafter.expand(ids, hidden, cache, level, visible)


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_tree_node_has_the_logits_of_its_own_path(data: st.DataObject, native: bool) -> None:
    stored = checkpoint()
    drafter = drafter_of(stored, native)
    width, depth = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    taps, tokens = [features(6, 1), features(3, 2)], [ids_of(6, 3), ids_of(3, 4)]
    cache = drafter.new_cache(2, 32, nodes=width * depth)
    hidden = read(drafter, cache, taps, tokens, [0, 0], 6).expand(-1, width, -1)
    paths: list[list[list[int]]] = [[[] for _ in range(width)] for _ in range(2)]
    visible = torch.zeros(2, width, width * depth, dtype=torch.bool)
    sequence = torch.arange(2)[:, None]
    for level in range(depth):
        parents = torch.tensor(data.draw(st.lists(st.integers(0, width - 1), min_size=2 * width, max_size=2 * width)))
        parents = parents.view(2, width)
        ids = torch.tensor(ids_of(2 * width, 50 + level)).view(2, width)
        visible = visible[sequence, parents]
        visible[:, torch.arange(width), level * width + torch.arange(width)] = True
        hidden = drafter.expand(ids, hidden[sequence, parents], cache, level, visible)
        paths = [[paths[b][parents[b, j]] + [int(ids[b, j])] for j in range(width)] for b in range(2)]
    got = drafter.logits(hidden)
    for b in range(2):
        for j in range(width):
            assert relative_error(got[b, j].double(), published_logits(stored, taps[b], tokens[b], paths[b][j])) < 1e-5


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v), "released"))
def test_a_chain_in_one_call_is_the_likeliest_path_of_the_published_recurrence(
    variant: dict[str, Any], native: bool, top_k: int
) -> None:
    stored, depth, sizes = checkpoint(**variant), 4, [7, 4]
    drafter = drafter_of(stored, native)
    taps, tokens = [features(size, 40 + size) for size in sizes], [ids_of(size, 50 + size) for size in sizes]
    cache = drafter.new_cache(2, 32, nodes=depth - 1)
    read(drafter, cache, taps, tokens, [0, 0], 3)
    rest = torch.stack([torch.nn.functional.pad(t[3:], (0, 0, 0, 7 - len(t))) for t in taps])
    following = torch.tensor([row[3:] + [0] * (7 - len(row)) for row in tokens])
    last = torch.tensor([size - 4 for size in sizes])
    given = rest.chunk(3, -1), following, last, [4, 1], cache, depth, time.perf_counter_ns
    got, scores, marks = drafter.chain(*given, top_k)
    assert (scores is None) == (top_k == 1)
    assert marks == sorted(marks) and len(marks) == depth
    assert cache.sizes == cache.lengths.tolist() == sizes
    for b in range(2):
        path: list[int] = []
        before = 0.0
        for level in range(depth):
            best = published_logits(stored, taps[b], tokens[b], path).log_softmax(-1).topk(top_k)
            assert got[b, level].tolist() == drafter.target_ids(best.indices).tolist()
            if scores is not None:
                assert scores[b, level].double() == pytest.approx(before + best.values.double(), abs=1e-4)
            path.append(int(got[b, level, 0]))
            before += float(best.values[0])


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)])
def test_a_chain_ends_where_no_sequence_is_confident(native: bool) -> None:
    stored, depth = checkpoint(), 5
    drafter = drafter_of(stored, native)
    taps, tokens = features(7, 40), ids_of(7, 50)
    path: list[int] = []
    chances = [1.0]
    for _ in range(depth):
        logits = published_logits(stored, taps, tokens, path)
        path.append(int(drafter.target_ids(logits.argmax())))
        chances.append(chances[-1] * float(logits.softmax(-1).max()))

    def levels(confidence: float) -> int:
        cache = drafter.new_cache(1, 32, nodes=depth - 1)
        given = taps[None].chunk(3, -1), torch.tensor([tokens]), torch.tensor([6]), [7]
        got, _, marks = drafter.chain(*given, cache, depth, time.perf_counter_ns, confidence=confidence)
        assert got[0, :, 0].tolist() == path[: len(marks)]
        return len(marks)

    assert levels(0.0) == depth
    for drafted in range(1, depth):  # a chance just above and just below what was drafted so far
        assert levels(chances[drafted] * 1.001) == drafted
        assert levels(chances[drafted] * 0.999) == drafted + 1


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)])
def test_a_sequence_that_has_finished_keeps_no_chain_going(native: bool) -> None:
    stored, depth = checkpoint(), 4
    drafter = drafter_of(stored, native)

    def drafted(seeds: list[int], confidence: float, active: Sequence[bool] = ()) -> tuple[list[int], int]:
        """The first sequence's drafts and how many levels there were."""
        cache = drafter.new_cache(len(seeds), 32, nodes=depth - 1)
        taps = torch.stack([features(5, 60 + seed) for seed in seeds])
        tokens = torch.tensor([ids_of(5, 70 + seed) for seed in seeds])
        last, counts = torch.full((len(seeds),), 4), [5] * len(seeds)
        given = taps.chunk(3, -1), tokens, last, counts, cache, depth, time.perf_counter_ns, 1, confidence
        got, _, marks = drafter.chain(*given, active)
        assert len(marks) == got.shape[1] and cache.sizes == counts
        return got[0, :, 0].tolist(), len(marks)

    def ends_after_one(seed: int, confidence: float) -> bool:
        return drafted([seed], confidence)[1] == 1

    # A confidence at which one sequence's chain ends at once and the other's does not.
    seeds, confidence = [0, 1], 1.0
    while len({ends_after_one(seed, confidence) for seed in seeds}) == 1:
        confidence *= 0.98
    [doubting], [sure] = (
        [seed for seed in seeds if ends_after_one(seed, confidence) == ends] for ends in (True, False)
    )
    alone = drafted([doubting], confidence)
    assert alone[1] == 1
    assert drafted([doubting, sure], confidence, [True, True])[1] > 1
    assert drafted([doubting, sure], confidence, [True, False]) == alone


def two_levels(drafter: Eagle3Drafter) -> Tensor:
    """All logits of two sequences: after each of their pairs, and after two levels of three nodes each."""
    cache = drafter.new_cache(2, 64, nodes=6)
    taps = torch.stack([features(40, 1), features(40, 2)]).bfloat16().to(drafter.dtype).chunk(3, -1)
    hidden = drafter.extend(taps, torch.tensor([ids_of(40, 3), ids_of(40, 4)]), cache)
    cache.extend([40, 33])
    last = hidden[torch.arange(2)[:, None], torch.tensor([[39], [32]])].expand(-1, 3, -1)
    seen = torch.eye(6, dtype=torch.bool).expand(2, -1, -1)
    level = drafter.expand(torch.tensor([[5, 6, 7], [8, 9, 10]]), last, cache, 0, seen[:, :3])
    below = drafter.expand(torch.tensor([[1, 2, 3]] * 2), level, cache, 1, seen[:, :3] | seen[:, 3:])
    return torch.cat([drafter.logits(x) for x in (hidden, level, below)], 1).double()


@needs_native
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v), "released"))
def test_the_native_drafter_agrees_with_torch(variant: dict[str, Any]) -> None:
    stored = checkpoint(**variant)
    assert relative_error(*(two_levels(drafter_of(stored, native)) for native in (True, False))) < 1e-5
    # In bfloat16 torch rounds the activations between operators too, and lands further from exact arithmetic.
    rounded = {name: t if name == "d2t" else t.bfloat16().float() for name, t in stored.tensors.items()}
    embedding = EMBEDDING.bfloat16().float()
    exact = two_levels(Eagle3Drafter(stored.config, rounded, embedding, torch.float32, native=False))
    native, eager = (two_levels(drafter_of(stored, n, torch.bfloat16)) - exact for n in (True, False))
    assert native.norm() < eager.norm() < 0.03 * exact.norm()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_native_row_does_not_depend_on_the_rows_beside_it_nor_on_the_threads(dtype: torch.dtype) -> None:
    drafter, count = drafter_of(checkpoint(), dtype=dtype), 23
    taps, ids = features(count, 1)[None].to(dtype).chunk(3, -1), torch.tensor([ids_of(count, 2)])
    threads = torch.get_num_threads()
    try:
        results = []
        for parts, used in (((count,), 1), ((1,) * count, 2), ((5, 11, 7), 3)):
            torch.set_num_threads(used)
            cache, rows, begin = drafter.new_cache(1, 48, nodes=3), [], 0
            for size in parts:
                part = slice(begin, begin + size)
                rows.append(drafter.extend([tap[:, part] for tap in taps], ids[:, part], cache))
                cache.extend([size])
                begin += size
            results.append(torch.cat(rows, 1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_draft_levels_leave_no_trace_in_the_pairs() -> None:
    drafter = drafter_of(checkpoint())
    taps, tokens = [features(8, 1)], [ids_of(8, 2)]
    direct, disturbed = (drafter.new_cache(1, 32, nodes=2) for _ in range(2))
    want = read(drafter, direct, taps, tokens, [0], 8)
    hidden = read(drafter, disturbed, taps, tokens, [0], 5)
    drafter.expand(torch.tensor([[7, 8]]), hidden.expand(1, 2, -1), disturbed, 0, torch.eye(2, dtype=torch.bool)[None])
    assert relative_error(read(drafter, disturbed, taps, tokens, [5], 3), want) < 1e-6


def test_draft_tokens_are_offsets_into_the_target_vocabulary() -> None:
    stored = checkpoint()
    drafter = drafter_of(stored)
    ids = drafter.target_ids(torch.arange(64))
    assert ids.tolist() == [i + int(offset) for i, offset in enumerate(stored.tensors["d2t"])]
    assert drafter_of(checkpoint(draft_vocab=300)).target_ids(torch.tensor([5])).tolist() == [5]


def write_original(stored: Eagle3Checkpoint, folder: Path) -> None:
    """The paper's own release: pickle, default taps, no rope_theta, a t2d beside d2t."""
    save_drafter(folder, stored)
    config = json.loads((folder / "config.json").read_text())
    for key in ("eagle_aux_hidden_state_layer_ids", "eagle_config", "rope_parameters", "target_hidden_size"):
        config.pop(key)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    tensors = load_file(folder / "model.safetensors")
    tensors["t2d"] = torch.zeros(TARGET.vocab, dtype=torch.bool)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def write_speculators(stored: Eagle3Checkpoint, folder: Path, **changes: Any) -> None:
    save_drafter(folder, replace(stored, config=replace(stored.config, norm_output=False)))
    flat, c = json.loads((folder / "config.json").read_text()), stored.config
    config = {
        "speculators_model_type": "eagle3",
        "architectures": ["Eagle3Speculator"],
        "transformer_layer_config": {k: v for k, v in flat.items() if k not in ("eagle_config", "draft_vocab_size")},
        "draft_vocab_size": c.draft_vocab,
        "eagle_aux_hidden_state_layer_ids": list(c.taps),
        **{name: getattr(c, name) for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")},
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")


LAYOUTS: dict[str, Callable[[Eagle3Checkpoint, Path], None]] = {
    "original": write_original,
    "SpecForge": lambda stored, folder: save_drafter(folder, stored),
    "speculators": write_speculators,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_drafter(layout: str, tmp_path: Path) -> None:
    stored = checkpoint()
    LAYOUTS[layout](stored, tmp_path / "d")
    loaded = load_drafter(tmp_path / "d", TARGET, allow_pickle=layout == "original")
    assert loaded.config == replace(stored.config, layer=replace(stored.config.layer, max_positions=512))
    assert loaded.tensors.keys() == stored.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in stored.tensors.items())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v), "released"))
def test_speculators_variants_come_back_as_they_were(variant: dict[str, Any], tmp_path: Path) -> None:
    stored = checkpoint(**variant)
    write_speculators(stored, tmp_path / "d")
    assert load_drafter(tmp_path / "d", TARGET).config == stored.config


def test_tap_ids_are_layer_inputs_at_the_top_level_and_outputs_in_eagle_config(tmp_path: Path) -> None:
    """vLLM takes either as inputs and reads the top level first; SGLang reads eagle_config alone, as outputs."""
    key, stored = "eagle_aux_hidden_state_layer_ids", checkpoint(taps=(1, 4, 8))
    save_drafter(tmp_path / "s", stored)
    file = tmp_path / "s" / "config.json"
    config = json.loads(file.read_text())
    assert (config[key], config["eagle_config"][key]) == ([1, 4, 8], [0, 3, 7])
    for left_out in ((), ("eagle_config",), (key,)):
        file.write_text(json.dumps({k: v for k, v in config.items() if k not in left_out}))
        assert load_drafter(tmp_path / "s", TARGET).config.taps == (1, 4, 8)
    file.write_text(json.dumps(config | {key: None}))
    assert load_drafter(tmp_path / "s", TARGET).config.taps == (1, 4, 8)
    write_speculators(stored, tmp_path / "v")
    assert load_drafter(tmp_path / "v", TARGET).config.taps == (1, 4, 8)


def test_eagle3_taps_are_the_released_ones() -> None:
    assert eagle3_taps(32) == (2, 16, 29)
    assert eagle3_taps(36) == (2, 18, 33)


def test_older_norm_names_and_rotary_tables_are_understood(tmp_path: Path) -> None:
    stored = checkpoint(fc_norm=True)
    save_drafter(tmp_path / "d", stored)
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    for index, name in enumerate(("low", "mid", "high")):
        tensors[f"aux_norm_{name}.weight"] = tensors.pop(f"fc_norm.{index}.weight")
    tensors["midlayer.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "d" / "model.safetensors")
    loaded = load_drafter(tmp_path / "d", TARGET)
    assert loaded.config.fc_norm
    assert torch.equal(loaded.tensors["fc_norm.2.weight"], stored.tensors["fc_norm.2.weight"])


def test_a_checkpoint_with_its_own_embedding_uses_it(tmp_path: Path) -> None:
    stored = checkpoint()
    own = torch.randn(TARGET.vocab, TARGET.width)
    save_drafter(tmp_path / "d", replace(stored, tensors=stored.tensors | {"embed_tokens.weight": own}))
    assert torch.equal(drafter_of(load_drafter(tmp_path / "d", TARGET)).embedding, own)


def config_with(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def tensors_with(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (config_with(vocab_size=301), "made for a target with 301 tokens, but this one has 300"),
        (config_with(target_hidden_size=64), "made for a target 64 wide, but this one is 96"),
        (config_with(num_hidden_layers=2), "it has 2 layers; supported: 1"),
        (config_with(model_type="qwen3"), "its layer is of type 'qwen3'; supported: llama"),
        (config_with(attention_bias=True), "attention_bias is not supported"),
        (config_with(norm_output=True), "norm_output means two things"),
        (config_with(eagle_config={"use_aux_hidden_state": False}), "use_aux_hidden_state false .* is not supported"),
        (config_with(eagle_aux_hidden_state_layer_ids=[2, 4, 10]), r"hidden states \[2, 4, 10\]"),
        (config_with(eagle_aux_hidden_state_layer_ids=[2, 4]), r"fc.weight has shape \(96, 288\)"),
        (config_with(eagle_config=["use_aux_hidden_state"]), "eagle_config must be a mapping"),
        (config_with(norm_before_residual="false"), "norm_before_residual must be true or false, not 'false'"),
        (config_with(target_hidden_size="96"), "target_hidden_size must be a positive whole number, not '96'"),
        (config_with(layer_types=["sliding_attention"]), "sliding windows are not supported"),
        (config_with(quantization_config={"quant_method": "fp8"}), "quantised weights are not supported"),
        (config_with(speculators_model_type="dflash"), "speculators_model_type 'dflash' is not eagle3"),
        (config_with(speculators_model_type="eagle3"), "transformer_layer_config is missing"),
        (config_with(intermediate_size=None), "intermediate_size is missing"),
        (config_with(eagle_aux_hidden_state_layer_ids="all"), "must be a list of layer numbers"),
        (config_with(draft_vocab_size="many"), "draft_vocab_size must be 1 to 300, not 'many'"),
        (config_with(draft_vocab_size=301), "draft_vocab_size must be 1 to 300, not 301"),
        (config_with(draft_vocab_size=65), r"lm_head.weight has shape \(64, 96\)"),
        (tensors_with(lambda t: t.pop("fc.weight")), r"lacks fc\.weight"),
        (tensors_with(lambda t: t.update(q_norm=torch.ones(2))), "a variant that is not supported: q_norm"),
        (tensors_with(lambda t: t["d2t"].add_(300)), "d2t does not map"),
        (tensors_with(lambda t: t["d2t"].sub_(torch.arange(64))), "d2t does not map"),
    ],
)
def test_a_drafter_that_does_not_fit_gets_one_line(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    save_drafter(tmp_path / "d", checkpoint())
    damage(tmp_path / "d")
    with pytest.raises(UserError, match=f"drafter .*d: .*{message}") as refused:
        load_drafter(tmp_path / "d", TARGET)
    assert "\n" not in str(refused.value)


def test_a_random_drafter_follows_from_its_seed_and_fits_any_target() -> None:
    one, two, other = random_drafter(TARGET, 1), random_drafter(TARGET, 1), random_drafter(TARGET, 2)
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    assert not torch.equal(one.tensors["fc.weight"], other.tensors["fc.weight"])
    for layers in range(1, 12):
        assert all(0 <= tap <= layers for tap in random_drafter(replace(TARGET, layers=layers)).config.taps)


def test_cost_counts_every_weight_once_and_the_fusion_only_where_it_runs() -> None:
    stored = checkpoint(norm_before_fc=True)
    drafter = drafter_of(stored)
    fused = drafter.cost(rows=1, contexts=[0], wanted=1, pairs=1, fused=True)
    stored_bytes = sum(t.numel() * 4 for name, t in stored.tensors.items() if name != "d2t")
    assert fused.weight_bytes == stored_bytes + 4 * TARGET.width  # and one row of the embedding
    plain = drafter.cost(rows=1, contexts=[0], wanted=1, pairs=1, fused=False)
    fc = stored.tensors["fc.weight"].numel()
    assert fused.flops - plain.flops == 2 * fc
    assert fused.weight_bytes - plain.weight_bytes == 4 * (fc + 3 * TARGET.width)


def test_cost_grows_with_rows_context_and_logits() -> None:
    drafter = drafter_of(checkpoint())
    base: Cost = drafter.cost(2, [10, 20], 2, 3, False)
    assert drafter.cost(2, [10, 20], 4, 3, False).flops - base.flops == 2 * 2 * 64 * TARGET.width
    assert drafter.cost(2, [11, 20], 2, 3, False).kv_bytes - base.kv_bytes == 2 * 2 * 16 * 4
    assert drafter.cost(2, [10, 20], 2, 4, False).flops - base.flops == 2 * 4 * 96
