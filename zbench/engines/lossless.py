"""Did the target alone say this? Every emitted token, checked against one forward over prompt and output.

The output is fed back to the target in a single teacher-forced pass; at each position the token that the target's
own sampler picks there, with the request's own random number, must be the one that was emitted. This holds for
greedy decoding and, because a deterministic draft is accepted exactly where plain decoding would have drawn it
(`verify.py`), for sampling too. Only where drafts are themselves sampled do tokens legitimately differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zbench.engines.base import Request
from zbench.engines.plans import PREFILL_ROWS
from zbench.engines.sampling import Purpose, Sampler, probabilities
from zbench.errors import UserError
from zbench.models.model import Model
from zbench.models.rows import Rows
from zbench.records import LosslessCheck

# How far two orders of summation may move a logit, as a share of the largest one, and a cumulative probability.
# float32 has none to spare: its tokens must be equal.
LOGIT_ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}
MASS_ROUNDING = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-6}


@torch.inference_mode()
def check(model: Model, prompt: Sequence[int], output: Sequence[int], request: Request, row: int) -> LosslessCheck:
    """`row` is the request's place in `request.seeds`. Gaps are in logits (greedy) or probability mass (sampled)."""
    if (highest := max(output)) >= model.config.vocab:  # a server's, whose vocabulary may be another one
        raise UserError(
            f"the output has token {highest}, the target {model.config.vocab}: not the model that is served"
        )
    ids = torch.tensor([[*prompt, *output[:-1]]], device=model.device)
    cache = model.new_cache(1, ids.shape[1])
    sampler = Sampler(request.sampling, request.seeds[row : row + 1], request.limit, model.device)
    first = len(prompt) - 1
    mismatches, worst, near = [], 0.0, True
    for start in range(0, ids.shape[1], PREFILL_ROWS):
        chunk = ids[:, start : start + PREFILL_ROWS]
        skipped = min(max(first - start, 0), chunk.shape[1])
        wanted = torch.arange(skipped, chunk.shape[1], device=model.device)[None]
        logits = model.forward(Rows.chain(chunk, cache.lengths), cache, logits=wanted).logits
        cache.extend([chunk.shape[1]])
        if not wanted.numel():
            continue
        if not logits.isfinite().all():  # the likeliest of such logits is token 0, in plain decoding too
            raise UserError("the target's logits are NaN or infinite: its weights are damaged, or its dtype too narrow")
        index = wanted + start - first  # the output position each row decides
        emitted = torch.tensor([output], device=model.device)[:, index[0]]
        differs = (sampler.pick(logits, index) != emitted)[0].nonzero().flatten().tolist()
        for place in differs:
            position = int(index[0, place])
            gap, allowed = _gap(logits[0, place], int(emitted[0, place]), sampler, position, model.dtype)
            mismatches.append(position)
            worst, near = max(worst, gap), near and gap <= allowed
    if not mismatches:
        return LosslessCheck("exact")
    return LosslessCheck("near-tie" if near else "different", len(mismatches), mismatches[0], worst)


def _gap(logits: Tensor, token: int, sampler: Sampler, position: int, dtype: torch.dtype) -> tuple[float, float]:
    """How far the emitted token was from being picked, and how far rounding may move it."""
    if sampler.sampling.greedy:
        top = float(logits.max())
        # However little summation moves them, both logits may round to the next number of their type: one that is
        # behind by two of its steps may have been level.
        step = torch.finfo(dtype).eps * 2.0 ** (math.frexp(top)[1] - 1)
        return top - float(logits[token]), max(2 * step, LOGIT_ROUNDING[dtype] * float(logits.abs().max()))
    cumulative = probabilities(logits, sampler.sampling).double().cumsum(-1)
    target = sampler.uniforms([position], Purpose.TOKEN) * cumulative[-1]
    below = cumulative[token - 1] if token else torch.zeros_like(cumulative[0])
    distance = torch.maximum(below - target, target - cumulative[token]).clamp(min=0)
    return float(distance), MASS_ROUNDING[dtype]
