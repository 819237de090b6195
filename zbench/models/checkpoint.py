"""A drafter's folder: its config.json and all its tensors, whatever they are called."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from zbench import paths
from zbench.errors import UserError
from zbench.models import loading

C = TypeVar("C")

_MAPS = ("d2t", "t2d")  # between a drafter's vocabulary and its target's
_TYPES = {  # as safetensors call them
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32",
    torch.int64: "I64", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)  # typing sets an attribute on what an alias makes, which slots would not let it try
class Trained(Generic[C]):
    """A drafter's or an adapter's weights, under the names of its layout and on the CPU."""

    config: C
    tensors: dict[str, Tensor]
    hash: str  # sha256 of the weight files; "" for weights that no file holds
    source: str  # where they came from, in words

    @property
    def identity(self) -> str:
        """What two runs that used the same weights agree on."""
        return self.hash or self.source


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]  # names and dtypes as stored, on the CPU
    hash: str  # sha256 of the weight files, see `loading.weights_hash`


def read_checkpoint(path: str | Path, allow_pickle: bool = False) -> Checkpoint:
    """Read a folder of safetensors, in one file or in shards; `allow_pickle` admits `pytorch_model*.bin` too.

    Raises UserError, one line, for what is missing, corrupt or not allowed.
    """
    folder = paths.folder(path, "drafter")
    config = loading.read_json(folder / "config.json")
    found = pickles(folder)
    if found and not allow_pickle:
        raise _only_pickles(folder, found)
    files = found or loading.weight_files(folder)
    if found:
        tensors = _read_pickles(files)
        _check_types({name: _TYPES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()}, folder)
    else:
        stored_shapes(files)
        tensors = _read_safetensors(files)
    check_finite(tensors, folder)
    return Checkpoint(folder, config, tensors, loading.weights_hash(files))


def read_shape(path: str | Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config.json of a folder of safetensors, and the shapes of its tensors by name; no weight is read.

    Raises UserError, one line, for what is missing or corrupt.
    """
    folder = paths.folder(path, "drafter")
    config = loading.read_json(folder / "config.json")
    if found := pickles(folder):
        raise _only_pickles(folder, found)
    return config, stored_shapes(loading.weight_files(folder))


def stored_shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in safetensors files, from their headers. Raises UserError for types that are not
    read."""
    files = list(files)
    with loading.opened(files) as where:
        slices = {name: file.get_slice(name) for name, file in where.items()}
        _check_types({name: one.get_dtype() for name, one in slices.items()}, files[0].parent)
        return {name: tuple(one.get_shape()) for name, one in slices.items()}


def check_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raises UserError where a weight is no number: what such a drafter says is token 0, at a plausible speed."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{folder}: {name} holds NaN or infinity; export it again")


def _check_types(types: Mapping[str, str], folder: Path) -> None:
    """Raises UserError unless weights are plain floats and maps of a vocabulary whole numbers. Names of safetensors."""
    for name, found in types.items():
        if name in _MAPS:
            if found in loading.FLOATS:
                raise UserError(f"{folder}: {name} is stored as {found}; it must hold whole numbers")
        elif found not in loading.FLOATS:
            raise UserError(f"{folder}: {name} is stored as {found}; supported: {', '.join(loading.FLOATS)}")


def pickles(folder: Path) -> list[Path]:
    """The pickle weights of a folder that has no others."""
    return [] if any(folder.glob("*.safetensors")) else sorted(folder.glob("pytorch_model*.bin"))


def _only_pickles(folder: Path, found: list[Path]) -> UserError:
    return UserError(
        f"{folder} has only pickle weights ({loading.some([file.name for file in found])}), which can run code; "
        "convert them to safetensors, or allow pickle if you trust where they come from"
    )


def save_whole(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all, and without a second copy of its tensors in memory."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError unless the tensors that were found are those of `shapes`, and no more."""
    if missing := [name for name in shapes if name not in found]:
        raise UserError(f"lacks {loading.some(missing)}")
    if unknown := sorted(set(found) - set(shapes)):
        raise UserError(f"has tensors of a variant that is not supported: {loading.some(unknown)}")
    for name, shape in shapes.items():
        if found[name] != shape:
            raise UserError(f"{name} has shape {found[name]}, but its config and the target say {shape}")


def draft_vocab(config: Mapping[str, Any], vocab: int) -> int:
    """Of a drafter for a target of `vocab` tokens, by its config.json. Raises UserError where it cannot be."""
    size = config.get("draft_vocab_size")
    if size is None:
        return vocab
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= vocab:
        raise UserError(f"draft_vocab_size must be 1 to {vocab}, not {size!r}")
    return size


def check_map(tensors: Mapping[str, Tensor], target_vocab: int) -> None:
    """Raises UserError unless a reduced vocabulary, where there is one, maps into the target's."""
    if "d2t" in tensors:
        ids = target_ids(tensors["d2t"])
        if int(ids.min()) < 0 or int(ids.max()) >= target_vocab or len(ids.unique()) != len(ids):
            raise UserError("d2t does not map its tokens to different tokens of the target; it must hold offsets")


def target_ids(d2t: Tensor) -> Tensor:
    """[draft vocabulary] the target's id of each draft token; `d2t` holds offsets: i + d2t[i] (EAGLE-3's layout)."""
    return torch.arange(len(d2t), device=d2t.device) + d2t


def _read_safetensors(files: list[Path]) -> dict[str, Tensor]:
    with loading.opened(files) as where:
        return {name: file.get_tensor(name) for name, file in where.items()}


def _read_pickles(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            data = torch.load(file, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, OSError, EOFError) as error:
            raise UserError(f"{file} is corrupt or holds more than tensors; download it again") from error
        if not isinstance(data, dict) or not all(isinstance(tensor, Tensor) for tensor in data.values()):
            raise UserError(f"{file} must hold named tensors and nothing else")
        tensors |= data
    return tensors
