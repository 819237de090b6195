"""The training corpus on disk: shards of conversations that a model wrote, and an index beside them.

    index.json             model, settings, and per shard its file, sha256, conversations and answer tokens
    shard-00000.safetensors
        ids [n] int32           tokens of all its conversations, one after the other
        roles [n] uint8         what each token is, see `Role`
        starts [S + 1] int64    where each conversation begins
        held_out [S] uint8      1: for evaluation only
        hashes [S] int64        of the first user turn, by which duplicates are known

Shards are written whole or not at all, and only the index says which count.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from zbench.cache import atomic_write
from zbench.errors import UserError

INDEX = "index.json"
VERSION = 1
HELD_OUT = 20  # one prompt of so many


class Role(IntEnum):
    """What a token is to training: only ANSWER tokens are ever predicted."""

    PROMPT = 0
    ANSWER = 1


@dataclass(frozen=True, slots=True)
class Conversation:
    ids: Tensor  # [T] int64
    roles: Tensor  # [T] uint8
    hash: int  # of the first user turn
    held_out: bool
    corpus: int = 0  # which of several that are used together

    @property
    def answer_tokens(self) -> int:
        return int((self.roles == Role.ANSWER).sum())


@dataclass(frozen=True, slots=True)
class Corpus:
    index: dict[str, Any]
    conversations: tuple[Conversation, ...]
    folder: Path | None = None

    def part(self, held_out: bool) -> tuple[Conversation, ...]:
        return tuple(c for c in self.conversations if c.held_out == held_out)


def prompt_hash(text: str) -> int:
    """63 bits of the words of a prompt, whatever their case and spacing."""
    words = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1


def is_held_out(hash: int) -> bool:
    """By the prompt alone, so that the same prompt is never on both sides, in any corpus."""
    return hash % HELD_OUT == 0


def write_shard(folder: Path, number: int, conversations: Sequence[Conversation]) -> dict[str, Any]:
    """Write one shard; returns its entry in the index."""
    sizes = torch.tensor([0, *(len(c.ids) for c in conversations)])
    nothing = torch.zeros(0, dtype=torch.int64)
    tensors = {
        "ids": torch.cat([nothing, *(c.ids for c in conversations)]).int(),
        "roles": torch.cat([nothing, *(c.roles for c in conversations)]).to(torch.uint8),
        "starts": sizes.cumsum(0),
        "held_out": torch.tensor([c.held_out for c in conversations], dtype=torch.uint8),
        "hashes": torch.tensor([c.hash for c in conversations], dtype=torch.int64),
    }
    data = save(tensors)
    name = f"shard-{number:05}.safetensors"
    atomic_write(folder / name, data)
    return {
        "file": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "conversations": len(conversations),
        "tokens": int(sizes.sum()),
        "answer_tokens": sum(c.answer_tokens for c in conversations),
    }


def read_shard(folder: Path, entry: dict[str, Any]) -> Iterator[Conversation]:
    """Raises UserError where the file is missing or is not the one that the index names."""
    file = folder / entry["file"]
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; make the data again") from error
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise UserError(f"{file} is not the shard that {INDEX} names; make the data again")
    tensors = load(data)
    starts = tensors["starts"].tolist()
    for i, (begin, end) in enumerate(itertools.pairwise(starts)):
        yield Conversation(
            tensors["ids"][begin:end].long(),
            tensors["roles"][begin:end],
            int(tensors["hashes"][i]),
            bool(tensors["held_out"][i]),
        )


def read_index(folder: Path) -> dict[str, Any] | None:
    """None where there is none yet."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / INDEX}: {error}") from error
    if index.get("version") != VERSION:
        raise UserError(f"{folder / INDEX} is of version {index.get('version')}, this zbench reads {VERSION}")
    return index


def load_corpus(folder: Path, weights_hash: str) -> Corpus:
    """All that the index names. Raises UserError where there is nothing, or another model wrote it."""
    index = read_index(folder)
    if index is None or not index["shards"]:
        raise UserError(f"{folder} holds no training data; make some with: zbench train data --out {folder}")
    if index["weights"] != weights_hash:
        raise UserError(
            f"{folder} was written by another model ({index['model']}); a drafter learns its own target's text"
        )
    return Corpus(index, tuple(c for entry in index["shards"] for c in read_shard(folder, entry)), folder)


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """As one; of conversations that begin alike the first stays. What is kept beside a corpus goes beside the first."""
    first: dict[int, Conversation] = {}
    for number, corpus in enumerate(corpora):
        for conversation in corpus.conversations:
            first.setdefault(conversation.hash, replace(conversation, corpus=number))
    return Corpus(corpora[0].index, tuple(first.values()), corpora[0].folder)
