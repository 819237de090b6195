"""Plain block diffusion, against a slow decoder written out in plain steps on `transformers`' own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import oracle, runtime
from zbench.engines.base import Meter, Request
from zbench.engines.denoise import Denoise
from zbench.engines.sampling import Sampling
from zbench.errors import UserError
from zbench.hardware import device

CPU, GREEDY, MASK = device.resolve("cpu"), Sampling(), 299


def prompts(*sizes: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 299, (size,), generator=generator).tolist() for size in sizes]


def metered(engine: Denoise, ids: list[list[int]], request: Request) -> tuple[list[list[int]], Any, Any]:
    meter = Meter(CPU)
    return engine.generate(ids, request, meter).outputs, *meter.records()


@torch.no_grad()
def written_out(prompt: list[int], limit: int, block: int, threshold: float) -> tuple[list[int], list[int]]:
    """Greedy block diffusion without any cache: the output, and the denoising forwards of each canvas.

    The mask lets the prompt and finished canvases see causally and in blocks, as the cache has kept them.
    """
    model, done, steps = oracle("qwen3"), [len(prompt)], []
    tokens, first = list(prompt), True
    while len(tokens) - len(prompt) < limit:
        canvas, forwards = [MASK] * block, 0
        while MASK in canvas:
            ids = tokens + canvas
            seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            for end in [*done[1:], len(ids)]:
                seen[end - block : end, end - block : end] = True
            bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
            logits = model(torch.tensor([ids]), attention_mask=bias).logits[0, -block:]
            logits[:, MASK] = float("-inf")
            probs, choice = logits.softmax(-1).max(-1)
            open_ = [place for place in range(block) if canvas[place] == MASK]
            best = max(open_, key=lambda place: float(probs[place]))
            forced = {0} if first and forwards == 0 else set()
            for place in open_:
                if probs[place] >= threshold or place == best or place in forced:
                    canvas[place] = int(choice[place])
            forwards += 1
        tokens += canvas
        done.append(len(tokens))
        steps.append(forwards)
        first = False
    return tokens[len(prompt) : len(prompt) + limit], steps


@pytest.mark.parametrize("execution", ["eager", "auto"])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("block", [1, 4, 7])
def test_tokens_and_steps_are_those_of_the_written_out_decoder(execution: str, block: int, threshold: float) -> None:
    [ids], model = prompts(9), runtime("qwen3", execution)
    found, steps, forwards = metered(Denoise(model, MASK, block, threshold), [ids], Request(21, GREEDY, (0,)))
    want, counts = written_out(ids, 21, block, threshold)
    assert found == [want]
    # The prompt's forward denoised the first canvas once; each canvas ends with the forward that keeps it.
    assert len([f for f in forwards if f.role == "denoise"]) == sum(counts) - 1 + len(counts)
    assert [step.committed[0] for step in steps if step.committed[0] > 1 or block == 1][:1] in ([block - 1], [1])


def test_a_batch_decodes_as_its_sequences_do_alone() -> None:
    model, ids = runtime("llama3", "auto"), prompts(4, 17, 9)
    engine = Denoise(model, MASK, 5, 0.2)
    together, _, _ = metered(engine, ids, Request(23, GREEDY, (0, 0, 0)))
    alone = [metered(engine, [one], Request(23, GREEDY, (0,)))[0][0] for one in ids]
    assert together == alone


def test_eos_inside_a_canvas_ends_the_output_there() -> None:
    model, ids = runtime("qwen3", "auto"), prompts(9)
    free, _, _ = metered(Denoise(model, MASK, 6, 0.2), ids, Request(20, GREEDY, (0,)))
    eos = free[0][8]
    cut, _, _ = metered(Denoise(model, MASK, 6, 0.2), ids, Request(20, GREEDY, (0,), frozenset({eos})))
    assert cut[0] == free[0][: free[0].index(eos) + 1]


def test_the_first_token_is_there_after_the_prompts_own_forward() -> None:
    _, steps, forwards = metered(Denoise(runtime("qwen3", "auto"), MASK, 4), prompts(9), Request(9, GREEDY, (0,)))
    assert steps[0].committed == (1,)
    assert [f.role for f in forwards if f.step == 0] == ["prefill", "draft"]


def test_a_threshold_of_zero_takes_one_denoising_per_canvas() -> None:
    _, steps, _ = metered(Denoise(runtime("qwen3", "auto"), MASK, 4, 0.0), prompts(9), Request(12, GREEDY, (0,)))
    assert [step.committed[0] for step in steps] == [1, 3, 0, 4, 0, 4]


def test_no_place_is_filled_with_a_mask() -> None:
    model = runtime("qwen3", "auto")
    [plain], _, _ = metered(Denoise(model, MASK, 4, 0.0), prompts(9), Request(40, GREEDY, (0,)))
    common = max(set(plain), key=plain.count)
    for threshold in (0.0, 1.0):
        [found], _, _ = metered(Denoise(model, common, 4, threshold), prompts(9), Request(40, GREEDY, (0,)))
        assert common not in found


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="block_size"):
        Denoise(runtime("qwen3", "auto"), MASK, 40)
    with pytest.raises(UserError, match="mask id"):
        Denoise(runtime("qwen3", "auto"), -1)
