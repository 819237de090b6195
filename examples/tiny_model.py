"""Train the zoo's tiny model: a Llama of a million parameters and a vocabulary of 2048 on what a larger model wrote.

    python examples/tiny_model.py --model smollm2-135m --data corpus --out tiny --steps 2000

`corpus` is a folder of `zbench train data --model smollm2-135m`. The tokenizer is a byte-level BPE learnt from the same
text, all tokens of a conversation are learnt, so that the result can write conversations of its own, and with
`zbench train data --model tiny` and the other training commands it gets its drafters as any model does.
"""

from __future__ import annotations

import math
from pathlib import Path

import click
import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zbench.models import loading
from zbench.training.corpus import load_corpus

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WINDOW = 256  # tokens that are learnt together


def texts(model: str, data: Path) -> list[str]:
    """Conversations of the corpus that are not held out, from the first user turn on."""
    loaded = loading.load(model)
    tokenizer = loading.load_tokenizer(loaded)
    conversations = load_corpus(data, loaded.weights_hash).part(held_out=False)
    whole = tokenizer.batch_decode([c.ids for c in conversations])
    return [SPECIAL[1] + "user" + text.split(SPECIAL[1] + "user", 1)[1] for text in whole]


def train_tokenizer(written: list[str], vocab: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(written, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[2],
        unk_token=SPECIAL[0], model_max_length=1024, chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


@click.command()
@click.option("--model", required=True, help="Who wrote the corpus.")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="A corpus of `zbench train data`.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--steps", default=2000, show_default=True, help=f"Of 16 windows of {WINDOW} tokens.")
@click.option("--seed", default=0, show_default=True)
def main(model: str, data: Path, out: Path, steps: int, seed: int) -> None:
    """Train and write a Hugging Face folder in bfloat16."""
    torch.manual_seed(seed)
    written = texts(model, data)
    tokenizer = train_tokenizer(written, 2048)
    stream = torch.tensor(
        [token for ids in tokenizer(written)["input_ids"] for token in (*ids, *tokenizer.encode("\n"))]
    )
    config = LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        rope_theta=10000.0,
    )  # fmt: skip
    net = LlamaForCausalLM(config)
    print(f"{len(stream)} tokens of text, {sum(p.numel() for p in net.parameters())} parameters")
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, (0.9, 0.95), weight_decay=0.01)
    for step in track(range(steps), "training"):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 100, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        begin = torch.randint(0, len(stream) - WINDOW, (16, 1))
        batch = stream[begin + torch.arange(WINDOW)]
        loss = net(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    net.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
