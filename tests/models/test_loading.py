"""`load`: folders, shards, hub ids and bare shapes become tensors, or one line that says what is wrong."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zbench.errors import UserError
from zbench.models import zoo
from zbench.models.config import ModelConfig, tensor_shapes
from zbench.models.loading import Drawn, load, load_tokenizer, weights_hash

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
SHAPE = {"family": "llama", "layers": 2, "width": 64, "ffn": 96, "heads": 4, "vocab": 300, "max_positions": 128}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path / "cache"))


def save_model(folder: Path, family: str = "llama", **extra: Any) -> Any:
    """A tiny random model of a family, written by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shard = extra.pop("max_shard_size", "1GB")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**TINY, **extra}))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_folder_gives_the_weights_that_transformers_saved(tmp_path: Path, family: str, tied: bool) -> None:
    saved = save_model(tmp_path / "m", family, tie_word_embeddings=tied)
    model = load({"path": str(tmp_path / "m")})
    assert model.tensors.keys() == dict(saved.named_parameters()).keys()
    assert all(torch.equal(model.tensors[name], weight) for name, weight in saved.named_parameters())
    assert (model.name, model.config.family, model.tokenizer_path) == ("m", family, None)


def test_shards_give_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    save_model(tmp_path / "whole")
    save_model(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole, shards = load({"path": tmp_path / "whole"}), load({"path": tmp_path / "shards"})
    assert all(torch.equal(whole.tensors[name], shards.tensors[name]) for name in whole.tensors)
    assert whole.weights_hash != shards.weights_hash


def test_weights_keep_their_dtype_unless_another_is_asked(tmp_path: Path) -> None:
    save_model(tmp_path / "m")
    assert {t.dtype for t in load({"path": tmp_path / "m"}).tensors.values()} == {torch.float32}
    assert {t.dtype for t in load({"path": tmp_path / "m"}, "bfloat16").tensors.values()} == {torch.bfloat16}
    with pytest.raises(UserError, match="dtype int8 is not supported; supported: float32, bfloat16, float16"):
        load({"path": tmp_path / "m"}, "int8")


def test_generation_config_says_where_generation_stops(tmp_path: Path) -> None:
    save_model(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load({"path": tmp_path / "m"}).config.eos_ids == (5, 6)


def test_a_stored_copy_of_a_tied_head_is_left_alone(tmp_path: Path) -> None:
    save_model(tmp_path / "m", tie_word_embeddings=True)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert "lm_head.weight" not in load({"path": tmp_path / "m"}).tensors


def remove(file: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).unlink()


def write(file: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_text(text)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def store_in_six_bits(folder: Path) -> None:
    """As safetensors know them, and torch does not."""
    edit_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(24, dtype=torch.uint8)}))(folder)
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b'"U8","shape":[24]', b'"F6_E2M3","shape":[32]')
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "cannot read .*config.json: No such file"),
        (write("config.json", "{"), "config.json is not valid JSON"),
        (write("config.json", "[]"), "config.json must hold a JSON object"),
        (remove("model.safetensors"), "has no weights: expected model.safetensors or model.safetensors.index.json"),
        (only_pickle, r"only pickle weights \(pytorch_model.bin\).*convert them to safetensors"),
        (truncate, "model.safetensors is truncated or corrupt .* download it again"),
        (corrupt_header, "model.safetensors is truncated or corrupt"),
        (write("model.safetensors", ""), "model.safetensors is truncated or corrupt"),
        (write("model.safetensors.index.json", "{}"), "has no weight_map"),
        (
            write("model.safetensors.index.json", '{"weight_map": {"model.norm.weight": "model-2.safetensors"}}'),
            "lacks model-2.safetensors, which model.safetensors.index.json names",
        ),
        (
            edit_tensors(lambda t: [t.pop(name) for name in list(t) if "q_proj" in name]),
            r"lacks 2 tensors that its config.json needs: model.layers.0.self_attn.q_proj.weight",
        ),
        (
            edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
            r"model.norm.weight has shape \(31,\), but config.json says \(32,\)",
        ),
        (
            edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
            r"model.norm.weight is stored as I8; supported: F32, F16, BF16",
        ),
        (
            edit_tensors(lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)})),
            r"has tensors that its config.json says nothing of: model.layers.1.self_attn.q_proj.bias",
        ),
        (store_in_six_bits, "model.norm.weight is stored as F6_E2M3; supported: F32, F16, BF16"),
    ],
)
def test_a_damaged_folder_gets_one_line(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    save_model(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=message) as refused:
        load({"path": tmp_path / "m"})
    assert "\n" not in str(refused.value)


def test_what_changes_nothing_is_left_alone(tmp_path: Path) -> None:
    """Layers that config.json cuts off, as one does to try something small, and biases of zeros, as exporters write."""
    save_model(tmp_path / "m")
    unasked = {
        "model.layers.7.self_attn.q_proj.bias": torch.ones(32),
        "model.layers.7.input_layernorm.weight": torch.ones(32),
        "model.layers.1.self_attn.q_proj.bias": torch.zeros(32),
    }
    edit_tensors(lambda t: t.update(unasked))(tmp_path / "m")
    assert not unasked.keys() & load({"path": tmp_path / "m"}).tensors.keys()


def test_weights_that_may_not_be_read_are_not_called_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "m")
    opened = Path.open

    def refused(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"cannot read .*m/model.safetensors: Permission denied"):
        load({"path": tmp_path / "m"})


def test_a_missing_folder_and_an_unknown_spec_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model folder .*nowhere does not exist"):
        load({"path": tmp_path / "nowhere"})
    with pytest.raises(UserError, match="is none of NAME"):
        load({"weights": "random"})
    with pytest.raises(UserError, match="unknown model 'smolm2-135m'; did you mean smollm2-135m"):
        load("smolm2-135m")


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    save_model(tmp_path / "m")
    save_file({}, tmp_path / "outside.safetensors")
    (tmp_path / "m" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with pytest.raises(UserError, match=r"lacks outside\.safetensors"):
        load({"path": tmp_path / "m"})


def test_the_hash_follows_the_contents_and_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    hash_file = zoo.file_sha256

    def counted(file: Path) -> str:
        read.append(file)
        return hash_file(file)

    monkeypatch.setattr(zoo, "file_sha256", counted)
    file = tmp_path / "w"
    file.write_bytes(b"one")
    first = weights_hash([file])
    assert first == weights_hash([file]) == hash_file(file)
    assert len(read) == 1
    file.write_bytes(b"other")
    assert weights_hash([file]) == hash_file(file) != first


def test_random_weights_follow_from_the_seed() -> None:
    first, again, other = (load({"config": SHAPE, "weights": "random", "seed": seed}, "bfloat16") for seed in (1, 1, 2))
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert not torch.equal(first.tensors["model.embed_tokens.weight"], other.tensors["model.embed_tokens.weight"])
    assert first.weights_hash == again.weights_hash != other.weights_hash
    assert {name: tuple(t.shape) for name, t in first.tensors.items()} == tensor_shapes(first.config)
    assert first.path is None


def test_random_weights_are_the_same_drawn_one_at_a_time() -> None:
    model = load({"config": SHAPE, "weights": "random", "seed": 3}, "bfloat16")
    drawn = Drawn(model.config, 3, torch.bfloat16, torch.device("cpu"))
    assert list(drawn) == list(model.tensors) and "lm_head.bias" not in drawn and drawn.get("lm_head.bias") is None
    assert all(torch.equal(drawn[name], tensor) for name, tensor in model.tensors.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_weights_for_a_gpu_are_drawn_there_and_say_so() -> None:
    spec = {"config": SHAPE, "weights": "random"}
    here, there = load(spec, "bfloat16"), load(spec, "bfloat16", device="cuda")
    assert (there.name, there.tensors.keys()) == (here.name, here.tensors.keys())
    assert there.weights_hash != here.weights_hash and torch.cuda.get_device_name() in there.source
    for name, tensor in there.tensors.items():
        assert tensor.is_cuda and torch.equal(tensor, there.tensors[name])
        assert tensor.float().std().item() == pytest.approx(here.tensors[name].float().std().item(), abs=2e-3)


def test_random_weights_give_finite_logits_in_a_deep_model() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = load({"config": {**SHAPE, "layers": 32}, "weights": "random"})
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config.to_hf()))
    theirs.load_state_dict(model.tensors, strict=False)
    logits = theirs(torch.arange(32)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0
    assert math.isclose(model.tensors["model.embed_tokens.weight"].std(), 0.02, rel_tol=0.05)


def test_a_random_model_takes_a_hugging_face_config_too() -> None:
    model = load({"config": {**TINY, "model_type": "qwen3"}, "weights": "random", "seed": None})
    assert model.config == ModelConfig.from_hf({**TINY, "model_type": "qwen3"})


@pytest.mark.parametrize("eos_ids", [[], [0], [299]])
def test_the_stand_in_tokenizer_round_trips_any_text(eos_ids: list[int]) -> None:
    tokenizer = load_tokenizer(load({"config": {**SHAPE, "eos_ids": eos_ids}}))
    text = "naïve 你好 🤗\t\n  123\x00"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()) and max(ids) < 300
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == (eos_ids[0] if eos_ids else None)


def test_the_stand_in_tokenizer_needs_room_for_every_byte() -> None:
    with pytest.raises(UserError, match="vocabulary of 257 or more"):
        load_tokenizer(load({"config": {**SHAPE, "vocab": 256, "eos_ids": [0]}}))


def test_a_folder_without_a_readable_tokenizer_gets_one_line(tmp_path: Path) -> None:
    save_model(tmp_path / "m")
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(load({"path": tmp_path / "m"}))
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(UserError, match="cannot read the tokenizer") as refused:
        load_tokenizer(load({"path": tmp_path / "m"}))
    assert "\n" not in str(refused.value)


def test_hub_troubles_get_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is not a hub id"):
        load({"hub": "a/b/c"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot download zbench/none") as refused:
        load({"hub": "zbench/none"})
    assert "\n" not in str(refused.value)
