"""`ZayaConfig`: what a ZAYA config.json says, exactly, or one line on why it cannot be said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from zbench.errors import UserError
from zbench.models import families
from zbench.models.config import ModelConfig
from zbench.models.cost import Routing, expected_experts, forward_cost
from zbench.models.zaya_config import ZayaConfig

ZAYA1_8B = ZayaConfig.from_hf({"model_type": "zaya"})
SHAPE: dict[str, Any] = {
    "family": "zaya", "layers": 3, "width": 48, "ffn": 40, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 300,
    "max_positions": 128, "experts": 5, "router_width": 12,
}  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> ZayaConfig:
    kv_heads, vocab = draw(st.integers(1, 3)), draw(st.integers(8, 99))
    small = st.integers(1, 64)
    return ZayaConfig(
        family="zaya",
        layers=draw(st.integers(1, 5)),
        width=draw(small),
        ffn=draw(small),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=4 * draw(st.integers(1, 5)),
        vocab=vocab,
        max_positions=draw(small),
        experts=draw(small),
        router_width=draw(small),
        rope_theta=draw(st.floats(1.0, 1e7)),
        rotary_fraction=draw(st.sampled_from([0.5, 1.0])),
        rms_eps=draw(st.sampled_from([1e-5, 1e-6])),
        tied=draw(st.booleans()),
        eos_ids=tuple(draw(st.lists(st.integers(0, vocab - 1), max_size=3))),
        bos_id=draw(st.none() | st.integers(0, vocab - 1)),
        mask_id=draw(st.none() | st.integers(0, vocab - 1)),
    )


@given(configs())
def test_writing_a_config_and_reading_it_back_changes_nothing(config: ZayaConfig) -> None:
    assert families.from_hf(config.to_hf()) == config


def test_the_published_8b_shape_has_the_names_shapes_and_size_of_transformers() -> None:
    theirs = AutoConfig.for_model("zaya")
    assert families.from_hf(theirs.to_dict()) == families.from_hf(theirs.to_diff_dict()) == ZAYA1_8B
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert families.tensor_shapes(ZAYA1_8B) == stored
    # The published files are 17.68 GB of bfloat16.
    assert families.parameter_count(ZAYA1_8B) == pytest.approx(17.68e9 / 2, rel=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_back_what_we_write(tied: bool) -> None:
    config = ZayaConfig.from_fields({**SHAPE, "tied": tied, "mask_id": 7, "eos_ids": [4, 9]})
    theirs = AutoConfig.for_model(**config.to_hf())
    assert families.from_hf(theirs.to_dict()) == config
    with torch.device("meta"):
        stored = AutoModelForCausalLM.from_config(theirs).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if tied:
        del shapes["lm_head.weight"]
    assert families.tensor_shapes(config) == shapes


def test_the_hubs_form_of_the_rope_settings_is_read() -> None:
    hybrid = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    rope = {"rope_type": "default", "hybrid": hybrid, "hybrid_sliding": {**hybrid, "rope_theta": 1e4}}
    config = families.from_hf({"model_type": "zaya", "rope_parameters": rope, "mask_token_id": 262147})
    assert (config.rope_theta, config.mask_id) == (1e6, 262147)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama, mistral, qwen2, qwen3, zaya"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok 2 is not supported; supported: 1"),
        ({"cca_time0": 3}, "cca_time0 3 is not supported; supported: 2"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"layer_types": ["hybrid", "hybrid_sliding"]}, "layer_types hybrid_sliding not supported; supported: hybrid"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters must hold those of hybrid layers"),
        ({"rope_parameters": {"hybrid": {"rope_type": "yarn"}}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": {"hybrid": {}}}, "rope_theta must be a positive number, not 0"),
        ({"num_experts": 0}, "num_experts must be a positive whole number, not 0"),
        ({"num_key_value_heads": 3}, "8 heads cannot share 3 key/value heads evenly"),
        ({"head_dim": 6}, "rotary_fraction 0.5 of head_dim 6 is no even number of dimensions within the head"),
        ({"mask_token_id": 262272}, "token id 262272 is not in the vocabulary of 262272"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
    ],
)
def test_what_is_not_supported_is_named_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        families.from_hf({"model_type": "zaya", **change})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_shape_in_our_own_names_is_that_of_its_family() -> None:
    assert families.from_fields(SHAPE) == ZayaConfig(**SHAPE)
    dense = {name: value for name, value in SHAPE.items() if name not in ("experts", "router_width")}
    assert isinstance(families.from_fields({**dense, "family": "llama"}), ModelConfig)
    for change, message in (
        ({"qk_norm": True}, "unknown qk_norm; known: bos_id, eos_ids, experts"),
        ({"family": "mamba"}, "model family 'mamba' is not supported; supported: llama"),
        ({"family": "llama"}, "unknown experts, router_width"),
    ):
        with pytest.raises(UserError, match=message):
            families.from_fields({**SHAPE, **change})
    with pytest.raises(UserError, match="head_dim, vocab missing"):
        families.from_fields({name: value for name, value in SHAPE.items() if name not in ("head_dim", "vocab")})
    with pytest.raises(UserError, match="family"):
        families.from_fields(dense | {"family": None})
    with pytest.raises(UserError, match="family missing"):
        families.from_fields({name: value for name, value in dense.items() if name != "family"})


def test_a_decoded_row_reads_the_active_weights_and_expectation_stands_in_for_a_router() -> None:
    config = ZAYA1_8B
    expert = 3 * config.width * config.ffn
    idle = config.layers * (config.experts - 1) * expert
    one = forward_cost(config, 1, [0], 1, 2)
    assert one.weight_bytes == 2 * (families.parameter_count(config) - idle + config.width)
    assert one.experts is None
    # A TiDAR block of 16 with all its 16 continuations: every expert is read, as the router of 272 rows would.
    many, few = (forward_cost(config, rows, [4096], rows, 2) for rows in (272, 16))
    assert (many.weight_bytes - few.weight_bytes) / 2 == pytest.approx(
        config.layers * expert * (expected_experts(16, 272) - expected_experts(16, 16)) + 256 * config.width
    )
    seen = forward_cost(config, 16, [4096], 16, 2, routing=Routing(hit=3.5, rows=12.0))
    assert (few.weight_bytes - seen.weight_bytes) / 2 == config.layers * expert * (expected_experts(16, 16) - 3.5)
    assert few.flops - seen.flops == pytest.approx(2 * config.layers * expert * (16 - 12))
    assert seen.experts == 3.5


@given(experts=st.integers(1, 64), rows=st.integers(1, 500))
def test_expected_experts_grow_with_the_rows_towards_all(experts: int, rows: int) -> None:
    found = expected_experts(experts, rows)
    assert 1 - 1e-9 <= found <= min(experts, rows) + 1e-9
    assert found <= expected_experts(experts, rows + 1)
    draws = torch.randint(experts, (2000, rows), generator=torch.Generator().manual_seed(rows))
    hit = torch.zeros(2000, experts).scatter_(1, draws, 1.0).sum(1).mean()
    assert found == pytest.approx(float(hit), rel=0.1)


def test_the_cache_of_the_8b_holds_40_kib_a_token() -> None:
    fresh, later = (forward_cost(ZAYA1_8B, 1, [context], 0, 2) for context in (1, 101))
    assert later.kv_bytes - fresh.kv_bytes == 100 * 40 * 1024
