"""Tokenizers that do not come from a Hugging Face folder: one read out of a GGUF, and a stand-in for random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zbench.errors import UserError
from zbench.models.families import AnyConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONTROL = 3  # the token type that GGUF gives special tokens


def save_gguf_tokenizer(metadata: Mapping[str, Any], folder: Path, max_positions: int) -> None:
    """Write the byte-level BPE of a GGUF's `tokenizer.*` metadata as files that `AutoTokenizer` reads offline.

    Raises ValueError for a pre-tokenizer other than SmolLM's: GGUF only names it, and a wrong one is wrong silently.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (pre := metadata["tokenizer.ggml.pre"]) != "smollm":
        raise ValueError(f"GGUF pre-tokenizer {pre!r} is not supported, only smollm")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_positions,
        chat_template=metadata["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        **{role: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]] for role, key in roles.items()},
    ).save_pretrained(folder)


def byte_tokenizer(config: AnyConfig) -> PreTrainedTokenizerFast:
    """A stand-in for a model with random weights: one token per UTF-8 byte, and the config's first eos id.

    Ids beyond the bytes decode to nothing, so that text made by random weights is short and strange; it means nothing
    anyway. Raises UserError for a vocabulary too small to hold all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reserved = config.eos_ids[:1]
    ids = [i for i in range(min(config.vocab, 257)) if i not in reserved][:256]
    if len(ids) < 256:
        raise UserError(
            f"a random-weight model needs a vocabulary of 257 or more for its byte tokenizer, not {config.vocab}"
        )
    vocab = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), ids, strict=True))
    special = {"eos_token": "<eos>"} if reserved else {}
    vocab |= dict(zip(special.values(), reserved, strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
