"""`ModelConfig`: what a Hugging Face config.json says, exactly, or one line on why it cannot be said."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zbench.errors import UserError
from zbench.models.config import ModelConfig, parameter_count, read_json, tensor_shapes

SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_SCALING = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
QWEN3: dict[str, Any] = {"model_type": "qwen3", "use_sliding_window": True, "head_dim": 64}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Every model that some family's config.json can say."""
    family = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    layers, kv_heads, vocab = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(8, 99))
    heads, head_dim = kv_heads * draw(st.integers(1, 3)), 2 * draw(st.integers(1, 5))
    bias = family in ("llama", "qwen3") and draw(st.booleans())
    window = draw(st.none() | st.integers(1, 50)) if family != "llama" else None
    slides = [True] * layers if family == "mistral" else draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    scaling = draw(
        st.sampled_from([None, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "llama3", **LLAMA3_SCALING}])
    )
    return ModelConfig(
        family=family,
        layers=layers,
        width=heads * head_dim if draw(st.booleans()) else 24,
        ffn=draw(st.integers(1, 64)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        max_positions=draw(st.integers(1, 9999)),
        rope_theta=draw(st.floats(1.0, 1e7)),
        rope_scaling=scaling,
        rms_eps=draw(st.sampled_from([1e-5, 1e-6])),
        tied=draw(st.booleans()),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=family == "llama" and draw(st.booleans()),
        qk_norm=family == "qwen3",
        windows=tuple(window if s else None for s in slides) if window and any(slides) else None,
        eos_ids=tuple(draw(st.lists(st.integers(0, vocab - 1), max_size=3))),
        bos_id=draw(st.none() | st.integers(0, vocab - 1)),
    )


@given(configs())
def test_writing_a_config_and_reading_it_back_changes_nothing(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_the_published_smollm2_config_is_read() -> None:
    config = ModelConfig.from_hf(SMOLLM2)
    assert (config.layers, config.width, config.heads, config.kv_heads, config.head_dim) == (30, 576, 9, 3, 64)
    assert (config.rope_theta, config.rope_scaling, config.tied, config.windows) == (100000, None, True, None)
    assert (config.eos_ids, config.bos_id) == ((2,), 1)
    assert parameter_count(config) == 134_515_008


def test_old_and_new_forms_of_rope_say_the_same() -> None:
    old = {**SMOLLM2, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_SCALING}}
    new = {**SMOLLM2, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_SCALING}}
    del new["rope_theta"], new["rope_scaling"]
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(new).rope_scaling == {"rope_type": "llama3", **LLAMA3_SCALING}


def test_mistral_slides_its_window_in_every_layer() -> None:
    config = ModelConfig.from_hf({**TINY, "model_type": "mistral", "sliding_window": 7})
    assert config.windows == (7, 7, 7)
    assert ModelConfig.from_hf({**TINY, "model_type": "mistral", "sliding_window": None}).windows is None


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_slides_only_where_told(family: str) -> None:
    qwen = {**TINY, "model_type": family, "sliding_window": 7, "max_window_layers": 2}
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": False}).windows is None
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": True}).windows == (None, None, 7)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": True, "layer_types": types}).windows == (7, None, None)


def test_qwen2_has_biases_and_qwen3_has_head_norms() -> None:
    qwen2, qwen3 = (ModelConfig.from_hf({**TINY, "model_type": family}) for family in ("qwen2", "qwen3"))
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.out_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, True, 128)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {}),
        ("mistral", {"head_dim": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("qwen3", {"head_dim": 16, "attention_bias": True}),
    ],
)
def test_names_shapes_and_count_are_those_of_transformers(family: str, extra: dict[str, Any], tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = AutoConfig.for_model(family, **TINY, **extra, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    for ours in (ModelConfig.from_hf(theirs.to_dict()), ModelConfig.from_hf(theirs.to_diff_dict())):
        assert tensor_shapes(ours) == {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert parameter_count(ours) == model.num_parameters()


def test_transformers_reads_back_what_we_write() -> None:
    from transformers import AutoConfig

    config = ModelConfig.from_hf({**TINY, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1})
    written = config.to_hf()
    assert ModelConfig.from_hf(AutoConfig.for_model(**written).to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported; supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            "rope type 'yarn' is not supported; supported: default, linear, llama3",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type llama3 needs low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor must be a positive number, not 'two'"),
        ({"rope_scaling": {"rope_type": ["a"]}}, "rope type ['a'] is not supported"),
        ({"rope_parameters": "default"}, "rope parameters must be a mapping"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1}}},
            "rope parameters per kind of layer (full_attention) are not supported",
        ),
        ({**QWEN3, "max_window_layers": None}, "max_window_layers must be a whole number, not None"),
        ({**QWEN3, "max_window_layers": "x"}, "max_window_layers must be a whole number, not 'x'"),
        ({**QWEN3, "layer_types": 5}, "layer_types must be a list, not 5"),
        ({**QWEN3, "layer_types": [{}, 1]}, "layer_types 1, {} not supported; supported: full_attention"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling and rope_parameters say different things; keep one of the two",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported; supported: 1"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ({"hidden_size": 577}, "hidden_size 577 is not a multiple of num_attention_heads 9"),
        ({"num_key_value_heads": 2}, "9 heads cannot share 2 key/value heads evenly"),
        ({"num_hidden_layers": "30"}, "num_hidden_layers must be a positive whole number, not '30'"),
        ({"vocab_size": 0}, "vocab_size must be a positive whole number, not 0"),
        ({"head_dim": 63}, "even head_dim"),
        ({"eos_token_id": "</s>"}, "'</s>' is not a token id"),
        ({"eos_token_id": 49152}, "token id 49152 is not in the vocabulary of 49152"),
        ({"rms_norm_eps": None}, "rms_eps must be a positive number"),
    ],
)
def test_what_is_not_supported_is_named_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        ModelConfig.from_hf({**SMOLLM2, **change})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_json_that_is_nested_too_deeply_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(UserError, match=r"config\.json is not valid JSON: maximum recursion depth"):
        read_json(tmp_path / "config.json")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match=r"config\.json: hidden_size is missing"):
        ModelConfig.from_hf({key: value for key, value in SMOLLM2.items() if key != "hidden_size"})


def test_a_model_that_its_family_cannot_be_has_no_hugging_face_form() -> None:
    sliding_llama = replace(ModelConfig.from_hf(SMOLLM2), windows=(128,) * 30)
    with pytest.raises(UserError, match="no llama config says all of"):
        sliding_llama.to_hf()


def test_a_shape_in_our_own_names_derives_what_it_leaves_out() -> None:
    shape = {"family": "qwen3", "layers": 2, "width": 64, "ffn": 96, "heads": 4, "vocab": 300, "max_positions": 128}
    config = ModelConfig.from_fields(shape)
    assert (config.kv_heads, config.head_dim, config.qk_norm) == (4, 16, True)
    assert ModelConfig.from_fields({**shape, "eos_ids": [7, 8], "kv_heads": 2}).eos_ids == (7, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "unknown depth; known: bos_id, eos_ids"),
        ({"layers": 2.5}, "layers must be a positive whole number, not 2.5"),
        ({"width": 65}, "width 65 is not a multiple of heads 4; give head_dim"),
        ({"windows": 4}, "windows must be a list"),
        ({"windows": [4]}, "1 sliding windows for 2 layers"),
        ({"windows": [4, 0]}, "a sliding window must be a positive whole number, not 0"),
        ({"tied": "no"}, "tied must be true or false, not 'no'"),
        ({"family": "mamba"}, "model family 'mamba' is not supported"),
    ],
)
def test_a_bad_shape_in_our_own_names_gets_one_line(change: dict[str, Any], message: str) -> None:
    shape = {"family": "llama", "layers": 2, "width": 64, "ffn": 96, "heads": 4, "vocab": 300, "max_positions": 128}
    with pytest.raises(UserError) as refused:
        ModelConfig.from_fields({**shape, **change})
    assert message in str(refused.value)


def test_a_shape_names_what_it_lacks() -> None:
    with pytest.raises(UserError, match="width, ffn, heads, vocab, max_positions missing"):
        ModelConfig.from_fields({"family": "llama", "layers": 2})


def test_configs_are_read_without_torch() -> None:
    code = "import sys, zbench.models.zoo; sys.exit(not {'torch', 'transformers'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
