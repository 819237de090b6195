"""A drafter's folder becomes a config and tensors, or one line that says what is wrong; pickle only on request."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from zbench.errors import UserError
from zbench.models.checkpoint import read_checkpoint, read_shape

TENSORS = {
    "fc.weight": torch.arange(6.0).view(2, 3),
    "d2t": torch.tensor([3, 5]),
    "t2d": torch.tensor([True, False]),
    "norm.weight": torch.ones(2, dtype=torch.bfloat16),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.json").write_text('{"hidden_size": 2}')
    return tmp_path / "d"


def same(tensors: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[name], t) for name, t in TENSORS.items())


def test_a_single_file_keeps_names_and_types(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")
    read = read_checkpoint(folder)
    assert same(read.tensors)
    assert {name: t.dtype for name, t in read.tensors.items()} == {name: t.dtype for name, t in TENSORS.items()}
    assert (read.path, read.config) == (folder, {"hidden_size": 2})


def test_shards_are_joined(folder: Path) -> None:
    names = list(TENSORS)
    files = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, part in files.items():
        save_file({name: TENSORS[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(read_checkpoint(folder).tensors)


def test_pickle_is_read_only_on_request(folder: Path) -> None:
    torch.save(TENSORS, folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"only pickle weights \(pytorch_model.bin\), which can run code; .*allow pickle"
    ):
        read_checkpoint(folder)
    assert same(read_checkpoint(folder, allow_pickle=True).tensors)


def test_safetensors_are_preferred_to_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    save_file(TENSORS, folder / "model.safetensors")
    assert same(read_checkpoint(folder, allow_pickle=True).tensors)


class Trap:
    """Unpickling this would call print."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("pickle ran code",)


def test_code_in_a_pickle_never_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"fc.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than tensors"):
        read_checkpoint(folder, allow_pickle=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "cannot read .*config.json"),
        (lambda f: None, "has no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 80), "model.safetensors is truncated or corrupt"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b"\xff" * 80), "pytorch_model.bin is corrupt"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin is corrupt"),
        (lambda f: torch.save([1], f / "pytorch_model.bin"), "must hold named tensors"),
        (lambda f: torch.save({"step": 1}, f / "pytorch_model.bin"), "must hold named tensors"),
    ],
)
def test_a_damaged_folder_gets_one_line(folder: Path, make: Callable[[Path], Any], message: str) -> None:
    make(folder)
    with pytest.raises(UserError, match=message) as refused:
        read_checkpoint(folder, allow_pickle=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("fc.weight", torch.zeros(2, 3, dtype=torch.int8), "fc.weight is stored as I8; supported: F32, F16, BF16"),
        ("norm.weight", torch.ones(2).to(torch.float8_e4m3fn), "norm.weight is stored as F8_E4M3"),
        ("d2t", torch.tensor([3.0, 5.0]), "d2t is stored as F32; it must hold whole numbers"),
    ],
)
def test_weights_of_a_type_that_is_no_plain_float_are_refused(
    folder: Path, name: str, tensor: torch.Tensor, said: str
) -> None:
    save_file({**TENSORS, name: tensor}, folder / "model.safetensors")
    for read in (read_checkpoint, read_shape):
        with pytest.raises(UserError, match=said):
            read(folder)
    (folder / "model.safetensors").unlink()
    torch.save({**TENSORS, name: tensor}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=said):
        read_checkpoint(folder, allow_pickle=True)


def test_weights_that_are_no_numbers_are_refused(folder: Path) -> None:
    save_file({**TENSORS, "norm.weight": torch.tensor([1.0, float("nan")])}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight holds NaN or infinity"):
        read_checkpoint(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"drafter folder .*nowhere does not exist"):
        read_checkpoint(tmp_path / "nowhere")


def test_the_hash_follows_the_weights(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")
    before = read_checkpoint(folder).hash
    save_file(TENSORS | {"d2t": torch.tensor([3, 6])}, folder / "model.safetensors")
    assert read_checkpoint(folder).hash != before
