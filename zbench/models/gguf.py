"""A model as a GGUF file, so that llama.cpp runs the very weights that zbench runs.

Names and layout are those of llama.cpp's own converter: one-dimensional tensors in float32, query and key rows of
Llamas interleaved, a scaled rotary base as factors. The inverse, for zoo models, is `zoo.convert_gguf`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zbench.cache import atomic_write, cache_dir
from zbench.errors import UserError
from zbench.models import zoo
from zbench.models.config import ModelConfig
from zbench.models.loading import LoadedModel, read_json, weights_hash

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter

FORMAT = 1  # bump it when the same weights are written differently
_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
_TYPES = {
    torch.float32: ("F32", "ALL_F32"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
}
_NORMAL, _CONTROL = 1, 3  # token types
# GGUF only names how text is split before merging; a wrong name is wrong silently, so that others get no tokenizer.
_SPLITS = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
}


def gguf_file(model: LoadedModel, dtype: torch.dtype) -> Path:
    """The model as a GGUF in the cache, its matrices in `dtype`; written where it is missing or damaged.

    The name follows from the weights, and the content is checked against the sha256 written beside it. Raises
    UserError for a model that llama.cpp would run differently, or a cache that cannot be written.
    """
    from filelock import FileLock

    _check(model)
    folder = cache_dir() / "gguf"
    file = folder / f"{Path(model.name).name}-{_TYPES[dtype][0].lower()}-{model.weights_hash[:16]}-{FORMAT}.gguf"
    seal = file.with_suffix(".sha256")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not (file.is_file() and seal.is_file() and weights_hash([file]) == seal.read_text().strip()):
                handle, building = tempfile.mkstemp(dir=folder, prefix=f".{file.name}.")
                os.close(handle)
                try:
                    write(model, dtype, Path(building))
                    atomic_write(seal, zoo.file_sha256(Path(building)) + "\n")
                    Path(building).replace(file)
                finally:
                    Path(building).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {error.strerror}; free some space or set ZBENCH_CACHE elsewhere"
        ) from error
    return file


def write(model: LoadedModel, dtype: torch.dtype, file: Path) -> None:
    """Write a dense model of the Llama, Mistral, Qwen2 or Qwen3 family as a GGUF. Raises UserError for others."""
    import gguf

    config = _check(model)
    architecture = _ARCHITECTURES[config.family]
    kind, file_type = _TYPES[dtype]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.layers)
    writer = gguf.GGUFWriter(file, architecture.lower())
    writer.add_name(model.name)
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_vocab_size(config.vocab)
    _add_tokenizer(writer, model, config)
    for name, tensor in _tensors(model, config):
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if tensor.dim() == 1:
            writer.add_tensor(stored, tensor.float().numpy())
        else:
            matrix = tensor.to(dtype).contiguous()
            writer.add_tensor(stored, _raw(matrix), raw_dtype=gguf.GGMLQuantizationType[kind])
    if config.rope_scaling is not None:
        from zbench.models.transformer import inverse_frequencies

        unscaled = inverse_frequencies(replace(config, rope_scaling=None))
        writer.add_tensor("rope_freqs.weight", (unscaled / inverse_frequencies(config)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(model: LoadedModel) -> ModelConfig:
    config = model.config
    if not isinstance(config, ModelConfig):
        raise UserError(f"llama.cpp: a model of the family {config.family} has no GGUF here")
    if config.windows is not None:
        raise UserError("llama.cpp: its Llama and Qwen have no sliding window, so it would run another model")
    if config.rope_scaling is not None and _ARCHITECTURES[config.family] != "LLAMA":
        raise UserError("llama.cpp: a Qwen with scaled rotary positions is not written to a GGUF here")
    return config


def _tensors(model: LoadedModel, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in model.tensors.items():
        part = name.rpartition(".")[0]
        if _ARCHITECTURES[config.family] == "LLAMA" and part.endswith(("q_proj", "k_proj")):
            # llama.cpp rotates neighbouring pairs of a head, Hugging Face the first half against the second.
            heads = tensor.unflatten(0, (-1, 2, config.head_dim // 2))
            tensor = heads.transpose(1, 2).reshape(tensor.shape)
        yield name, tensor.cpu()  # random weights may have been drawn on a GPU


def _raw(matrix: torch.Tensor) -> np.ndarray:
    """numpy has no bfloat16: its bits."""
    return (matrix.view(torch.int16) if matrix.dtype == torch.bfloat16 else matrix).numpy()


def _add_tokenizer(writer: GGUFWriter, model: LoadedModel, config: ModelConfig) -> None:
    """The tokenizer, where its way of splitting text has a name; else none, and llama.cpp speaks in ids only."""
    folder, described = model.tokenizer_path, dict[str, Any]()
    if folder is not None and (folder / "tokenizer.json").is_file():
        described = read_json(folder / "tokenizer.json")
    split = next((name for name, known in _SPLITS.items() if described.get("pre_tokenizer") == known), None)
    if folder is None or split is None:
        writer.add_tokenizer_model("no_vocab")
        return
    tokens: list[str] = [f"[unused {i}]" for i in range(config.vocab)]
    types = [_NORMAL] * config.vocab
    for token, index in described["model"]["vocab"].items():
        tokens[index] = token
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _NORMAL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    if config.bos_id is not None:
        writer.add_bos_token_id(config.bos_id)
    if config.eos_ids:
        writer.add_eos_token_id(config.eos_ids[0])
    settings = read_json(folder / "tokenizer_config.json")
    for role, add in (("unk_token", writer.add_unk_token_id), ("pad_token", writer.add_pad_token_id)):
        if settings.get(role) in tokens:
            add(tokens.index(settings[role]))
    if (template := folder / "chat_template.jinja").is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
