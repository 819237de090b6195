"""The zoo's tiny model, from a corpus that a larger one wrote: its vocabulary, its random start, its training text.

    zbench train data --model smollm2-135m --out corpus --tokens 300000 --seed 1 --written 0.5 --opened 0
    python tools/tiny_model.py corpus start text       # a folder of random weights, and the corpus in its own tokens
    zbench train full --model start --data text --out tiny --no-masks --prompts --rate 0.003 --batch 8 --minutes 22

What is trained is a language model of 1 M parameters that writes English of sorts: small enough to come with the
package, and with real drafters, since it is trained on real text. System turns are left out.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from zbench.models import loading
from zbench.models.config import ModelConfig, tensor_shapes
from zbench.training.corpus import INDEX, Conversation, load_corpus, write_shard

SOURCE = "smollm2-135m"
VOCAB = 2048
END, BEGIN, STOP = SPECIAL = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 128,
    "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip


def main(corpus: Path, start: Path, text: Path) -> None:
    source = loading.load(SOURCE)
    words = loading.load_tokenizer(source)
    read = load_corpus(corpus, source.weights_hash).conversations
    runs = [(c, [(role, words.decode(part)) for role, part in _runs(c)]) for c in read]
    runs = [(c, [(role, _without_system(said)) for role, said in parts]) for c, parts in runs]
    tokenizer = learn(said for _, parts in runs for _, said in parts)
    write_start(start, tokenizer)
    loaded = loading.load({"path": str(start)})
    text.mkdir(parents=True, exist_ok=True)
    shard = write_shard(text, 0, [translated(c, parts, tokenizer) for c, parts in runs])
    index = json.loads((corpus / INDEX).read_text())
    index |= {"model": "tiny", "weights": loaded.weights_hash, "shards": [shard]}
    (text / INDEX).write_text(json.dumps(index, indent=1))
    print(f"{sum(p.numel() for p in loaded.tensors.values()) / 1e6:.2f} M parameters, {shard['tokens']} tokens")


def learn(texts) -> Tokenizer:
    """Byte-level BPE over `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_start(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": STOP, "pad_token": STOP,
        "unk_token": END, "clean_up_tokenization_spaces": False, "model_max_length": CONFIG["max_position_embeddings"],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    generator = torch.Generator().manual_seed(0)
    config: ModelConfig = loading.families.from_hf(CONFIG)
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.04
        for name, shape in tensor_shapes(config).items()
    }
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")


def translated(c: Conversation, parts: list[tuple[int, str]], tokenizer: Tokenizer) -> Conversation:
    ids, roles = [], []
    for role, said in parts:
        coded = tokenizer.encode(said, add_special_tokens=False).ids
        ids += coded
        roles += [role] * len(coded)
    return Conversation(torch.tensor(ids), torch.tensor(roles, dtype=torch.uint8), c.hash, c.held_out)


def _runs(c: Conversation):
    """(role, ids) of each stretch of one role."""
    pairs = zip(c.roles.tolist(), c.ids.tolist(), strict=True)
    return [(role, [token for _, token in run]) for role, run in groupby(pairs, key=lambda pair: pair[0])]


def _without_system(said: str) -> str:
    if said.startswith(f"{BEGIN}system"):
        return said.split(f"{STOP}\n", 1)[1]
    return said


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
