"""Weights in: a zoo name, a Hugging Face folder, a hub id or a bare shape becomes a config and named tensors.

Only safetensors are read (pickle files can run code). They are memory-mapped, so that a tensor costs memory when it is
used, and nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zbench import paths
from zbench.cache import atomic_write, cache_dir
from zbench.errors import UserError
from zbench.models import families, zoo
from zbench.models.config import read_json, token_ids
from zbench.models.families import AnyConfig, tensor_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = ("F32", "F16", "BF16")  # the same, as safetensors call them
_RANDOM_STD = 0.02  # GPT-2's initialisation: keeps logits finite at any depth behind the norms
_KEPT = ".balancing_biases"  # decide between near-equal experts: rounding them would send rows elsewhere
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_INDEX = "model.safetensors.index.json"
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(\w+\.)?\w+(_proj\.bias|norm\.weight)$")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    name: str
    path: Path | None  # the folder; None for random weights
    config: AnyConfig
    tensors: Mapping[str, Tensor]  # Hugging Face names; on the CPU, or `Drawn`; a tied head is not listed
    weights_hash: str  # sha256 of the weight files; for random weights, of what determines them
    tokenizer_path: Path | None  # None where there is no tokenizer
    source: str  # where it came from, in words


def load(
    spec: str | Mapping[str, Any],
    dtype: str | torch.dtype | None = None,
    progress: zoo.Progress | None = None,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Load a model: a zoo name (fetched if need be), `{path}`, `{hub, revision}` or `{config, weights: random, seed}`.

    `config` is a Hugging Face config (it has `model_type`) or the fields of the family's config. `dtype` None keeps
    weights as they are stored, and makes random ones in float32. Random weights for a GPU, `device`, are drawn there.
    Keys of `spec` that are None count as absent.
    Raises UserError, one line, for whatever is missing, malformed, corrupt or not supported.
    """
    chosen = _dtype(dtype)
    if isinstance(spec, str):
        folder = zoo.fetch(spec, progress)
        entry = zoo.model(spec)
        model = _load_folder(folder, spec, entry.source, chosen)
        if model.weights_hash != (expected := entry.weights_sha256):
            raise UserError(
                f"{folder} has changed: sha256 {model.weights_hash}, not {expected}; delete it and fetch again"
            )
        return model
    given = {key: value for key, value in spec.items() if value is not None}
    if "path" in given:
        folder = paths.folder(given["path"], "model")
        return _load_folder(folder, folder.resolve().name, f"folder {folder}", chosen)
    if "hub" in given:
        revision = given.get("revision", "main")
        return _load_folder(snapshot(given["hub"], revision), given["hub"], f"hub {given['hub']} at {revision}", chosen)
    if "config" in given and given.get("weights", "random") == "random":
        return _random_model(given["config"], given.get("seed", 0), chosen or torch.float32, torch.device(device))
    raise UserError(
        f"model {dict(spec)} is none of NAME, {{path}}, {{hub, revision}}, {{config, weights: random, seed}}"
    )


def load_tokenizer(model: LoadedModel) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, or for random weights a stand-in with one token per byte (see `byte_tokenizer`).

    Raises UserError where a folder has no tokenizer or one that cannot be read.
    """
    if model.path is None:
        from zbench.models.tokenizer import byte_tokenizer

        return byte_tokenizer(model.config)
    if model.tokenizer_path is None:
        raise UserError(f"{model.path} has no tokenizer; copy the model's tokenizer.json there")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.tokenizer_path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise bare Exception for a malformed file
        raise UserError(f"cannot read the tokenizer in {model.tokenizer_path}: {_first_line(error)}") from error


def random_tensors(config: AnyConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights drawn from N(0, 0.02²), norms and scales at 1, made straight in `dtype`.

    A router's are wider, so that rows spread over the experts, and nothing that all rows share is added to the
    residual stream or on the way to the choice; skipping is biased against, as in a model that starts training.
    A tensor's values follow from the seed and its name alone, so that the tensors can be drawn in parallel.
    """
    drawn = Drawn(config, seed, dtype, torch.device("cpu"))
    with ThreadPoolExecutor() as pool:
        return dict(zip(drawn, pool.map(drawn.__getitem__, drawn), strict=True))


class Drawn(Mapping[str, Tensor]):
    """See `random_tensors`. A tensor is drawn on `device` each time it is asked for, so that none of a model that fills
    a GPU is there twice, or comes over its bus. Other devices draw other values."""

    def __init__(self, config: AnyConfig, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shapes, self._seed, self._dtype, self._device = tensor_shapes(config), seed, dtype, device

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype, device = self._shapes[name], self._dtype, self._device
        if name.endswith(_KEPT):
            return torch.tensor([0.0] * (shape[0] - 1) + [-1.0], device=device)
        if name.endswith(("norm.weight", "_scale", ".temp")):
            return torch.ones(shape, dtype=dtype, device=device)
        router = ".router_mlp." in name
        if name.endswith("_bias") or (router and name.endswith(".bias")):
            return torch.zeros(shape, dtype=dtype, device=device)
        own_seed = int.from_bytes(hashlib.sha256(f"{self._seed}/{name}".encode()).digest()[:7], "little")
        generator = torch.Generator(device).manual_seed(own_seed)
        std = shape[-1] ** -0.5 if router else _RANDOM_STD
        drawn = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)
        # GELU's mean, the same in every channel, must not send all rows to one expert.
        return drawn - drawn.mean(-1, keepdim=True) if router else drawn


def weights_hash(files: Iterable[Path]) -> str:
    """sha256 of one file's contents, or of the hashes of several in the order of their names.

    A file's hash is kept in the cache, keyed by its path, size and time of change: 16 GB are not read at each start.
    """
    digests = [_cached_sha256(file.resolve()) for file in sorted(files)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _load_folder(folder: Path, name: str, source: str, dtype: torch.dtype | None) -> LoadedModel:
    config = families.from_hf(read_json(folder / "config.json"))
    # Generation stops where generation_config.json says: chat models list end-of-turn tokens only there.
    if (folder / "generation_config.json").is_file():
        stops = token_ids(read_json(folder / "generation_config.json").get("eos_token_id"))
        config = replace(config, eos_ids=stops or config.eos_ids)
    files = weight_files(folder)
    tensors = _read_tensors(files, config, dtype)
    tokenizer = folder if any((folder / file).is_file() for file in _TOKENIZER_FILES) else None
    return LoadedModel(name, folder, config, tensors, weights_hash(files), tokenizer, source)


def weight_files(folder: Path) -> list[Path]:
    """A folder's safetensors files, one or sharded. Raises UserError where there are none or some are missing."""
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / _INDEX} has no weight_map")
        # Only names: an index must not lead out of its folder.
        files = sorted({folder / Path(str(file)).name for file in weight_map.values()})
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{folder} lacks {some(missing)}, which {_INDEX} names; download the model again")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if pickles := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)):
        raise UserError(
            f"{folder} has only pickle weights ({some(pickles)}), which can run code and are not loaded; "
            "convert them to safetensors (save_pretrained of transformers does)"
        )
    raise UserError(f"{folder} has no weights: expected model.safetensors or {_INDEX}")


@contextmanager
def opened(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Tensor name -> the open safetensors file that holds it. Raises UserError for a file that cannot be read."""
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in files:
            try:
                file.open("rb").close()  # of one that may not be read safetensors says that it is not there
            except OSError as error:
                raise UserError(f"cannot read {file}: {error.strerror}") from error
            try:
                reader = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is truncated or corrupt ({_first_line(error)}); download it again") from error
            where |= dict.fromkeys(reader.keys(), reader)
        yield where


def _read_tensors(files: list[Path], config: AnyConfig, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Map every tensor that the config calls for; others (a stored copy of a tied head, say) are left alone."""
    shapes = tensor_shapes(config)
    with opened(files) as where:
        if missing := [name for name in shapes if name not in where]:
            raise UserError(
                f"{files[0].parent} lacks {len(missing)} tensors that its config.json needs: {some(missing)}"
            )
        for name, shape in shapes.items():
            stored = where[name].get_slice(name)
            if (found := tuple(stored.get_shape())) != shape:
                raise UserError(f"{files[0].parent}: {name} has shape {found}, but config.json says {shape}")
            if (kind := stored.get_dtype()) not in FLOATS:
                raise UserError(f"{files[0].parent}: {name} is stored as {kind}; supported: {', '.join(FLOATS)}")
        if unasked := [name for name in where if name not in shapes and _counts(name, where[name], config.layers)]:
            raise UserError(f"{files[0].parent} has tensors that its config.json says nothing of: {some(unasked)}")
        tensors = {name: where[name].get_tensor(name) for name in shapes}
    if dtype is None:
        return tensors
    return {name: tensor if name.endswith(_KEPT) else tensor.to(dtype) for name, tensor in tensors.items()}


def _counts(name: str, file: Any, layers: int) -> bool:
    """Whether it is a bias or a norm that a layer was trained with: without it a model still speaks."""
    within = _IN_LAYER.match(name)
    if not within or int(within[1]) >= layers:
        return False
    return name.endswith("norm.weight") or bool(file.get_tensor(name).any())


def snapshot(repository: str, revision: str) -> Path:
    """The local folder of a hub model; safetensors, configs and tokenizer at the top level only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"],
            ignore_patterns=["*/*", "consolidated*"],
        )
    except HFValidationError as error:
        raise UserError(f"{repository!r} is not a hub id; write ORGANISATION/NAME") from error
    except GatedRepoError as error:
        raise UserError(f"{repository} is gated; accept its licence on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model {repository} (for a private one set HF_TOKEN)") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repository} has no revision {revision!r}") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"cannot download {repository}: {_first_line(error)}; check the network") from error
    return Path(folder)


def _random_model(shape: Mapping[str, Any], seed: int, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    config = families.from_hf(shape) if "model_type" in shape else families.from_fields(shape)
    identity = json.dumps([asdict(config), seed, str(dtype)], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()
    name, source = f"random-{config.family}-{digest[:8]}", f"random weights, seed {seed}"
    if device.type == "cpu":
        return LoadedModel(name, None, config, random_tensors(config, seed, dtype), digest, None, source)
    where = torch.cuda.get_device_name(device)
    own = hashlib.sha256(f"{digest} {where}".encode()).hexdigest()
    return LoadedModel(name, None, config, Drawn(config, seed, dtype, device), own, None, f"{source}, drawn on {where}")


def _cached_sha256(file: Path) -> str:
    stat = file.stat()
    key = [str(file), stat.st_size, stat.st_mtime_ns]
    note = cache_dir() / "hashes" / f"{hashlib.sha256(str(file).encode()).hexdigest()}.json"
    try:
        kept = json.loads(note.read_text(encoding="utf-8"))
        if kept["file"] == key:
            return kept["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no note, or not one of ours: hash the file and write it anew
    digest = zoo.file_sha256(file)
    with suppress(OSError):  # a cache that cannot be written costs time at the next start, nothing else
        atomic_write(note, json.dumps({"file": key, "sha256": digest}))
    return digest


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and chosen not in _DTYPES.values():
        raise UserError(f"dtype {dtype} is not supported; supported: {', '.join(_DTYPES)}")
    return chosen


def some(names: Sequence[str]) -> str:
    """The first few of many names, for a message of one line."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
