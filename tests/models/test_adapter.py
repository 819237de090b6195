"""Mask adapters: PEFT's layout, read back as written, applied as LoRA says, refused where they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import relative_error, runtime
from zbench.errors import UserError
from zbench.models.adapter import (
    MODULES,
    AdapterCheckpoint,
    AdapterConfig,
    MaskAdapter,
    adapter_shapes,
    load_adapter,
    random_adapter,
    read_config,
    save_adapter,
)
from zbench.models.rows import Rows
from zbench.models.transformer import Transformer

PREFIX = "base_model.model.model.layers."


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path / "cache"))


def model() -> Any:
    return runtime("qwen3", "eager")


def wide(modules: tuple[str, ...]) -> AdapterCheckpoint:
    config = AdapterConfig(rank=3, alpha=6.0, block=4, masks=2, modules=modules)
    generator = torch.Generator().manual_seed(5)
    shapes = adapter_shapes(config, model().config)
    return AdapterCheckpoint(config, {n: torch.randn(s, generator=generator) * 0.2 for n, s in shapes.items()}, "", "")


def test_a_saved_adapter_is_read_back(tmp_path: Path) -> None:
    made = random_adapter(model().config, seed=1, rank=4, block=6)
    made = replace(made, config=replace(made.config, shift=1))
    save_adapter(tmp_path / "a", made)
    assert read_config(tmp_path / "a", model().config) == made.config
    read = load_adapter(tmp_path / "a", model().config)
    assert read.config == made.config
    assert read.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in made.tensors.items())
    assert read.hash


def test_the_layout_is_the_one_peft_writes(tmp_path: Path) -> None:
    save_adapter(tmp_path, random_adapter(model().config, rank=4))
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (described["peft_type"], described["r"], described["lora_alpha"]) == ("LORA", 4, 4)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[f"{PREFIX}2.self_attn.q_proj.lora_A.weight"].shape == (4, 96)
    assert tensors[f"{PREFIX}2.mlp.down_proj.lora_B.weight"].shape == (96, 4)
    assert len(tensors) == 1 + 3 * 7 * 2


@pytest.mark.parametrize(
    "modules",
    [
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("q_proj", "v_proj"),
        ("k_proj", "up_proj"),
        ("down_proj",),
    ],
)
@pytest.mark.parametrize("execution", ["eager", "auto"])
def test_mask_rows_are_those_of_a_model_with_the_product_added_to_its_weights(
    modules: tuple[str, ...], execution: str
) -> None:
    target, checkpoint = runtime("qwen3", execution), wide(modules)
    adapter = MaskAdapter(checkpoint, target.config, torch.float32, target.device)
    # With no prefix and no token rows, every row is a mask: a model whose weights are W + (alpha / r) B A must agree.
    from tests.tiny import oracle

    merged = {name: tensor.clone() for name, tensor in oracle("qwen3").state_dict().items()}
    for name in merged:
        stem = "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in checkpoint.tensors:
            b, a = (checkpoint.tensors[f"{stem}.lora_{side}.weight"] for side in "BA")
            merged[name] += 2.0 * b @ a
    merged["model.embed_tokens.weight"][:2] = checkpoint.tensors["mask_embedding.weight"]
    merged["lm_head.weight"] = oracle("qwen3").state_dict()["lm_head.weight"]
    untied = replace(target.config, tied=False)
    other = Transformer(untied, merged, torch.float32, execution=execution)
    canvas = Rows.canvas(torch.full((1, 4), 299), torch.zeros(1, dtype=torch.int64), 299)
    got = target.forward(canvas, target.new_cache(1, 16), adapter=adapter).logits
    # The second embedding serves every place after the first.
    spelt = replace(canvas, ids=torch.tensor([[0, 1, 1, 1]]), masks=None)
    assert relative_error(got, other.forward(spelt, other.new_cache(1, 16)).logits) < 1e-4


def test_its_cost_counts_its_weights_once_and_its_products_per_mask_row() -> None:
    target, checkpoint = model(), wide(("q_proj", "down_proj"))
    adapter = MaskAdapter(checkpoint, target.config, torch.float32, target.device)
    bare = target.cost(7, [20], 2)
    found = adapter.added(bare, 5)
    c, low = target.config, 0
    low += c.layers * 3 * (c.width + c.heads * c.head_dim)
    low += c.layers * 3 * (c.ffn + c.width)
    assert found.flops - bare.flops == 2 * 5 * low
    assert found.weight_bytes - bare.weight_bytes == 4 * (low + 2 * c.width)
    assert (found.kv_bytes, found.bytes_written) == (bare.kv_bytes, bare.bytes_written)


def damage(folder: Path, what: str) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    match what:
        case "rank":
            config["r"] = 5
        case "no rank":
            del config["r"]
        case "module":
            config["target_modules"].append("lm_head")
        case "lacks":
            del tensors[f"{PREFIX}1.self_attn.o_proj.lora_A.weight"]
        case "unknown":
            tensors["base_model.model.score.weight"] = torch.zeros(2)
        case "no embedding":
            del tensors["mask_embedding.weight"]
        case "shift":
            config["mask_shift"] = 2
        case "no mask":
            tensors["mask_embedding.weight"] = tensors["mask_embedding.weight"][:0]
        case "half a module":
            config["target_modules"] = [1]
        case "expression":
            config["target_modules"] = ".*_proj"
        case "quantised":
            tensors["mask_embedding.weight"] = tensors["mask_embedding.weight"].to(torch.float8_e4m3fn)
        case "bias":
            config["bias"] = "all"
        case "kind":
            config["peft_type"] = "IA3"
        case _:
            config[what] = {"use_dora": True, "fan_in_fan_out": True}.get(what, {"q_proj": 2})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("rank", "has shape"),
        ("no rank", "r must be a positive"),
        ("module", "lm_head"),
        ("lacks", "lacks"),
        ("unknown", "not supported"),
        ("no embedding", "mask_embedding"),
        ("shift", "mask_shift must be 0 or 1"),
        ("no mask", "mask_embedding.weight has no mask"),
        ("half a module", "target_modules must be a list of names"),
        ("expression", "target_modules must be a list of names"),
        ("quantised", "is stored as F8_E4M3"),
        ("bias", "bias 'all' is not supported"),
        ("kind", "peft_type 'IA3' is not supported"),
        ("use_dora", "use_dora is not supported"),
        ("fan_in_fan_out", "fan_in_fan_out is not supported"),
        ("rank_pattern", "rank_pattern is not supported"),
        ("modules_to_save", "modules_to_save is not supported"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, what: str, complaint: str) -> None:
    save_adapter(tmp_path, random_adapter(model().config, rank=4))
    damage(tmp_path, what)
    with pytest.raises(UserError, match=complaint) as caught:
        load_adapter(tmp_path, model().config)
    assert "\n" not in str(caught.value)


def test_rank_stabilised_adapters_are_scaled_by_the_root_of_their_rank(tmp_path: Path) -> None:
    save_adapter(tmp_path, random_adapter(model().config, rank=4))
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | {"lora_alpha": 8, "target_modules": "all-linear"}
    file.write_text(json.dumps(config))
    plain = read_config(tmp_path, model().config)
    assert (plain.alpha / plain.rank, plain.modules) == (2, MODULES)
    file.write_text(json.dumps(config | {"target_modules": MODULES[::-1]}))  # PEFT writes a set
    assert read_config(tmp_path, model().config) == plain
    file.write_text(json.dumps(config | {"use_rslora": True}))
    stabilised = read_config(tmp_path, model().config)
    assert stabilised.alpha / stabilised.rank == 8 / 4**0.5


def test_an_adapter_of_another_model_says_so_instead_of_listing_its_tensors(tmp_path: Path) -> None:
    whole = model().config
    save_adapter(tmp_path, random_adapter(replace(whole, layers=whole.layers + 1)))
    made = f"made for a model of {whole.layers + 1} layers, {whole.width} wide, but this one has {whole.layers}"
    for read in (load_adapter, read_config):
        with pytest.raises(UserError, match=made):
            read(tmp_path, whole)


def test_a_folder_without_weights_or_none_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_adapter(tmp_path / "none", model().config)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="only safetensors"):
        load_adapter(tmp_path, model().config)
