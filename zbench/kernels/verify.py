"""Acceptance over the logits of a verify: which drafts the target confirms, and the token that follows them.

`reference` is the definition, in torch; `launch` does the same without a probability or a mixed logit in memory:

    chunks      per row and chunk of the vocabulary: the largest logit, and where it is or what the others weigh
    walk        per sequence, from row 0: the row's token (its chunk found from the weights and read again), then the
                child that has it, until none does
    residuals   drafts that were drawn: accept, then max(p - q, 0) of the first refused row, per chunk
    resample    per sequence: the token that it gives

The first launch reads every logit once; the others read a chunk for each row on the accepted path. A token is the one
that the reference draws with the same number, unless the number falls within rounding of a boundary between two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zbench.kernels import chips, jit
from zbench.kernels.registry import Case, Kernel, Work

if TYPE_CHECKING:
    import triton.language as tl


class Verdict(NamedTuple):
    """What a step gains. K is the longest path a verify could accept plus one; unused places hold -1."""

    kept: Tensor  # [B, K] rows of the verify forward to commit: row 0, then the accepted path, ascending
    counts: Tensor  # [B] rows kept = tokens gained = accepted drafts + 1
    tokens: Tensor  # [B, K] accepted drafts, then the bonus token
    bonus: Tensor  # [B] the token after the accepted path


@dataclass(frozen=True, slots=True)
class Drafts:
    """What is verified. Without `probs` drafts were chosen outright. `offered`, `trusted`, `probs` are for chains."""

    ids: Tensor  # [B, R] int64: the last committed token, then the drafts
    parents: Tensor | None = None  # [B, R] of a tree: parents come first, -1 is the root or padding; None: a chain
    offered: Tensor | None = None  # [B] how many of the drafts are real; None: all
    trusted: Tensor | None = None  # [B, R - 1] bool: passes whatever the target says
    probs: Tensor | None = None  # [B, R - 1, V] float32: the distributions that the drafts were drawn from
    forced: Tensor | None = None  # [B] accept so many, along first children; the bonus is then the target's argmax


@dataclass(frozen=True, slots=True)
class Draws:
    """The target's distribution, softmax(logits / temperature) filtered, and the numbers that draw from it."""

    temperature: float = 0.0  # 0: its argmax, and no numbers
    top_k: int | None = None
    top_p: float = 1.0
    token: Tensor | None = None  # [B, R] float64 in [0, 1): draws the token after d accepted drafts
    accept: Tensor | None = None  # [B, R - 1] float64: decides on draft d + 1, where drafts were drawn

    @property
    def filtered(self) -> bool:
        return self.top_k is not None or self.top_p < 1.0


@dataclass(frozen=True, slots=True)
class Mix:
    """Logits of row rows[i] are own * theirs' + (1 - own) * theirs."""

    theirs: Tensor  # [B, n, V] float32
    rows: Tensor  # [n] int64, distinct
    own: float


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """logits [..., V] float32 -> the float32 distribution [..., V] that is drawn from (temperature > 0).

    top_p keeps the smallest set of most likely tokens whose mass reaches it (Holtzman et al. 2020, arXiv 1904.09751).
    """
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probs = logits.softmax(-1)
    if top_p < 1.0:
        ordered, order = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, order, before >= top_p)
        probs = probs.masked_fill(dropped, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF draw: probs [..., V] (need not sum to 1), uniforms [...] in [0, 1) float64 -> token ids [...].

    A token depends on its own distribution and its own uniform only, never on what else is in the batch.
    """
    cumulative = probs.double().cumsum(-1)
    target = uniforms[..., None] * cumulative[..., -1:]
    # First index whose cumulative mass exceeds the target: a token of probability zero is never drawn.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)


def reference(logits: Tensor, drafts: Drafts, draws: Draws, mix: Mix | None = None) -> Verdict:
    """logits [B, R, V] float32, of the last committed token and the drafts. Rules: `zbench.engines.verify`."""
    if mix is not None:
        blended = mix.own * logits[:, mix.rows] + (1 - mix.own) * mix.theirs
        logits = logits.index_copy(1, mix.rows, blended)
    return _chain(logits, drafts, draws) if drafts.parents is None else _tree(logits, drafts, drafts.parents, draws)


def _chain(logits: Tensor, drafts: Drafts, draws: Draws) -> Verdict:
    batch, count, _ = logits.shape
    steps = torch.arange(count, device=logits.device)
    following, offered = drafts.ids[:, 1:], drafts.offered
    if drafts.forced is not None:
        accepted = drafts.forced if offered is None else torch.minimum(drafts.forced, offered)
        bonus = _row(logits, accepted).argmax(-1)
    elif drafts.probs is not None and draws.temperature:
        accepted, bonus = _reject(logits, following, drafts.probs, draws, offered)
    else:
        targets = _targets(logits, draws, draws.token)
        passed = following == targets[:, :-1]
        passed = passed if drafts.trusted is None else passed | drafts.trusted
        accepted = _leading(passed if offered is None else passed & (steps[:-1] < offered[:, None]))
        bonus = _row(targets, accepted)
    drafts_and_bonus = torch.cat([following, bonus[:, None]], 1).scatter(1, accepted[:, None], bonus[:, None])
    gained = steps <= accepted[:, None]
    kept = steps.expand(batch, count).where(gained, -1)
    return Verdict(kept, accepted + 1, drafts_and_bonus.where(gained, -1), bonus)


def _tree(logits: Tensor, drafts: Drafts, parents: Tensor, draws: Draws) -> Verdict:
    ids, count = drafts.ids, drafts.ids.shape[1]
    steps = torch.arange(count, device=ids.device)
    depth = _sum_to_root((steps > 0).expand_as(ids), parents)
    siblings = (parents[:, :, None] == parents[:, None]).tril(-1)  # [B, R, R]: an earlier row has the same parent
    if drafts.forced is not None:
        targets = logits.argmax(-1)
        refused = siblings.any(-1) | (depth > drafts.forced[:, None])
    else:
        targets = _targets(logits, draws, None if draws.token is None else draws.token.gather(1, depth))
        repeated = (siblings & (ids[:, :, None] == ids[:, None])).any(-1)
        refused = repeated | (ids != targets.gather(1, parents.clamp(min=0)))
    refused = (refused | (parents < 0)) & (steps > 0)
    on_path = _sum_to_root(refused, parents) == 0
    counts = on_path.sum(1)
    kept = steps.where(on_path, count).sort(1).values
    gained = steps < counts[:, None]
    bonus = _row(targets, _row(kept, counts - 1))
    # The token after a kept row is the next kept row's, and the bonus after the last.
    following = torch.cat([kept[:, 1:], kept[:, :1]], 1).clamp(max=count - 1)
    tokens = ids.gather(1, following).scatter(1, counts[:, None] - 1, bonus[:, None])
    return Verdict(kept.where(gained, -1), counts, tokens.where(gained, -1), bonus)


def _targets(logits: Tensor, draws: Draws, uniforms: Tensor | None) -> Tensor:
    """What the target says at each row [B, R]; uniforms alike."""
    if not draws.temperature:
        return logits.argmax(-1)
    assert uniforms is not None
    return draw(probabilities(logits, draws.temperature, draws.top_k, draws.top_p), uniforms)


def _reject(
    logits: Tensor, following: Tensor, draft_probs: Tensor, draws: Draws, offered: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rejection sampling of a chain: accepted drafts [B] and the token [B] after them."""
    assert draws.token is not None and draws.accept is not None
    p = probabilities(logits, draws.temperature, draws.top_k, draws.top_p)
    p_x = p[:, :-1].gather(2, following[..., None]).squeeze(2)
    q_x = draft_probs.gather(2, following[..., None]).squeeze(2)
    accepted = _leading(draws.accept * q_x < p_x)
    if offered is not None:
        accepted = torch.minimum(accepted, offered)
        draft_probs = draft_probs * (torch.arange(following.shape[1], device=p.device) < offered[:, None])[..., None]
    q = torch.cat([draft_probs, torch.zeros_like(p[:, :1])], 1)  # nothing was drafted after the last
    p_next = _row(p, accepted)
    residual = (p_next - _row(q, accepted)).clamp(min=0)
    # Where p = q up to rounding a draft can be rejected with nothing left over.
    residual = residual.where(residual.sum(-1, keepdim=True) > 0, p_next)
    return accepted, draw(residual, _row(draws.token, accepted))


def _leading(accepted: Tensor) -> Tensor:
    """[B, k] bool -> [B] how many are true before the first false."""
    return accepted.long().cumprod(1).sum(1)


def _row(values: Tensor, rows: Tensor) -> Tensor:
    """values [B, n, ...], rows [B] -> [B, ...]."""
    return values[torch.arange(len(rows), device=rows.device), rows]


def _sum_to_root(values: Tensor, parents: Tensor) -> Tensor:
    """values [B, R] summed over each row and its ancestors, row 0 excepted, in log2(R) pointer jumps."""
    up = parents.clamp(min=0)
    total = values.long()
    for _ in range((parents.shape[1] - 1).bit_length()):
        total = total + total.gather(1, up)
        up = up.gather(1, up)
    return total


class Launch(NamedTuple):
    chunk: int  # logits that a program of the first launch reads; a power of two
    warps: int


# At V = 152k one row alone keeps 38 programs busy, with 16 logits a lane. By reasoning, tuned nowhere.
TABLE = {
    "": Launch(4096, 8),
    "gfx942": Launch(4096, 4),
    "gfx950": Launch(4096, 4),
    "sm90": Launch(4096, 8),
    "sm100": Launch(4096, 8),
}
CANDIDATES = {"chunk": (2048, 4096, 8192), "warps": (2, 4, 8, 16)}


def launch(logits: Tensor, drafts: Drafts, draws: Draws, mix: Mix | None = None) -> Verdict:
    """As `reference`. With top_k or top_p it is the reference: they sort the vocabulary, which is no single pass."""
    if draws.filtered:
        return reference(logits, drafts, draws, mix)
    batch, rows, vocab = logits.shape
    chosen = chips.pick(TABLE, logits.device)
    chunk = min(chosen.chunk, _power(vocab))
    chunks = -(-vocab // chunk)
    greedy = not draws.temperature or drafts.forced is not None
    drawn = drafts.probs is not None and not greedy
    # How far a sequence's walk may go, and with it, in a chain, which rows are looked at.
    ends = drafts.offered if drafts.forced is None else drafts.forced
    if drafts.forced is not None and drafts.offered is not None:
        ends = torch.minimum(drafts.forced, drafts.offered)
    cut = 0 if ends is None or drafts.parents is not None else 1 if drafts.forced is None else 2

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    logits, theirs = _unit_stride(logits), _unit_stride(logits if mix is None else mix.theirs)
    shared: dict[str, Any] = {
        "logits": logits,
        "logits_b": logits.stride(0),
        "logits_r": logits.stride(1),
        "theirs": theirs,
        "theirs_b": theirs.stride(0),
        "theirs_r": theirs.stride(1),
        "mixed": None if mix is None else mix.rows.contiguous(),
        "mixes": 0 if mix is None else len(mix.rows),
        "own": 1.0 if mix is None else mix.own,
        "other": 0.0 if mix is None else 1 - mix.own,
        "ends": _contiguous(ends),
        "peak": empty(batch, rows, chunks, dtype=torch.float32),
        # Where that is, or what all weigh against it.
        "second": empty(batch, rows, chunks, dtype=torch.int32 if greedy else torch.float64),
        "temperature": draws.temperature or 1.0,
        "rows": rows,
        "vocab": vocab,
        "chunks": chunks,
        "GREEDY": greedy,
        "MIXED": 0 if mix is None else _power(len(mix.rows)),
        "CHUNK": chunk,
        "num_warps": chosen.warps,
    }
    blocks = {"CHUNKS": _power(chunks), "ROWS": _power(rows)}
    ids, token_draws = drafts.ids.contiguous(), None if greedy else _contiguous(draws.token)
    verdict = Verdict(empty(batch, rows), empty(batch), empty(batch, rows), empty(batch))
    with torch.cuda.device_of(logits):
        jit.compiled(_chunks)[(batch * rows, chunks)](**shared, CUT=cut)
        if drafts.probs is None or not drawn:
            jit.compiled(_walk)[(batch,)](
                **shared, **blocks, **verdict._asdict(), ids=ids, token_draws=token_draws,
                parents=_contiguous(drafts.parents),
                trusted=None if drafts.forced is not None else _contiguous(drafts.trusted),
                FORCED=drafts.forced is not None,
            )  # fmt: skip
            return verdict
        probs = _unit_stride(drafts.probs)
        drafter: dict[str, Any] = {
            "probs": probs,
            "probs_b": probs.stride(0),
            "probs_r": probs.stride(1),
            "rest": empty(batch, chunks, dtype=torch.float64),
            "accepted": empty(batch),
        }
        jit.compiled(_residuals)[(batch, chunks)](
            **shared, **blocks, **drafter, ids=ids, accept_draws=_contiguous(draws.accept)
        )
        jit.compiled(_resample)[(batch,)](
            **shared, **blocks, **drafter, **verdict._asdict(), ids=ids, token_draws=token_draws
        )
    return verdict


def _power(count: int) -> int:
    """The next power of two, as block shapes must be."""
    return 1 << (count - 1).bit_length()


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _load(
    logits, logits_b, logits_r, theirs, theirs_b, theirs_r, mixed, mixes, own, other,
    sequence, row, columns, limit, MIXED: tl.constexpr,
):  # fmt: skip
    """A row's logits at `columns` below `limit`, mixed where it is one of the mixed rows; -inf at the others."""
    x = tl.load(logits + sequence * logits_b + row * logits_r + columns, columns < limit, other=float("-inf"))
    if MIXED > 0:
        index = tl.arange(0, MIXED)
        place = tl.max(tl.where(tl.load(mixed + index, mask=index < mixes, other=-1) == row, index, -1), 0)
        blends = columns < tl.where(place >= 0, limit, 0)
        y = tl.load(theirs + sequence * theirs_b + place * theirs_r + columns, mask=blends, other=0.0)
        x = tl.where(blends, own * x + other * y, x)
    return x


def _first_beyond(weights, before, target, COUNT: tl.constexpr):
    """Where before + the running sum of weights first exceeds target, and that sum just before it."""
    index = tl.arange(0, COUNT)
    sums = before + tl.cumsum(weights, 0)
    place = tl.sum((sums <= target).to(tl.int32), 0)
    # Rounding may leave the target at the end of all: the last that has any weight, then.
    place = tl.minimum(place, tl.max(tl.where(weights > 0, index, 0), 0))
    return place, tl.maximum(tl.max(tl.where(index < place, sums, 0.0), 0), before)


def _row_token(
    logits, logits_b, logits_r, theirs, theirs_b, theirs_r, mixed, mixes, own, other, peak, second, temperature,
    rows, vocab, chunks, sequence, row, draw, GREEDY: tl.constexpr, MIXED: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """The target's token at a row; `draw` points at the number that draws it."""
    index = tl.arange(0, CHUNKS)
    there = index < chunks
    place = (sequence * rows + row) * chunks + index
    peaks = tl.load(peak + place, mask=there, other=float("-inf"))
    top = tl.max(peaks, 0)
    if GREEDY:
        firsts = tl.load(second + place, mask=there, other=vocab)
        token = tl.min(tl.where(peaks == top, firsts, vocab), 0)
    else:
        top = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.load(second + place, mask=there, other=0.0) * tl.exp(peaks - top).to(tl.float64)
        target = tl.load(draw) * tl.sum(weights, 0)
        chunk, before = _first_beyond(weights, 0.0, target, CHUNKS)
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        x = _load(
            logits, logits_b, logits_r, theirs, theirs_b, theirs_r, mixed, mixes, own, other,
            sequence, row, columns, vocab, MIXED,
        )  # fmt: skip
        inner, _ = _first_beyond(tl.exp(x / temperature - top).to(tl.float64), before, target, CHUNK)
        token = chunk * CHUNK + inner
    return tl.minimum(token, vocab - 1)


def _chunks(
    logits, logits_b, logits_r, theirs, theirs_b, theirs_r, mixed, mixes, own, other, ends, peak, second,
    temperature, rows, vocab, chunks, CUT: tl.constexpr, GREEDY: tl.constexpr, MIXED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """CUT 1: rows up to ends[b] only; 2: that row only."""
    flat = tl.program_id(0).to(tl.int64)
    sequence, row = flat // rows, flat % rows
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    limit = vocab
    if CUT == 1:
        limit = tl.where(row <= tl.load(ends + sequence), vocab, 0)
    if CUT == 2:
        limit = tl.where(row == tl.load(ends + sequence), vocab, 0)
    x = _load(
        logits, logits_b, logits_r, theirs, theirs_b, theirs_r, mixed, mixes, own, other,
        sequence, row, columns, limit, MIXED,
    )  # fmt: skip
    if not GREEDY:
        x = x / temperature
    top = tl.max(x, 0)
    place = flat * chunks + tl.program_id(1)
    tl.store(peak + place, top)
    if GREEDY:
        tl.store(second + place, tl.min(tl.where(x == top, columns, vocab), 0))
    else:
        finite = tl.where(top == float("-inf"), 0.0, top)
        tl.store(second + place, tl.sum(tl.exp(x - finite).to(tl.float64), 0))


def _walk(
    logits, logits_b, logits_r, theirs, theirs_b, theirs_r, mixed, mixes, own, other, ends, peak, second,
    temperature, rows, vocab, chunks, ids, parents, trusted, token_draws, kept, counts, tokens, bonus,
    GREEDY: tl.constexpr, MIXED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
    FORCED: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    steps = tl.arange(0, ROWS)
    within = steps < rows
    first = sequence * rows
    token_of = tl.load(ids + first + steps, mask=within, other=-1)
    if parents is not None:
        parent_of = tl.load(parents + first + steps, mask=within, other=-1)
    if trusted is not None:  # of the row itself, not of the one before it
        is_trusted = tl.load(trusted + first - sequence + steps - 1, mask=within & (steps > 0), other=0) != 0
    end = (first * 0 + rows - 1).to(tl.int64)
    if ends is not None:
        end = tl.minimum(end, tl.load(ends + sequence))
    path = tl.where(steps == 0, 0, -1)
    gained = tl.full((ROWS,), -1, tl.int64)
    row, depth, token = first * 0, first * 0, first * 0
    going = depth == 0
    while going:
        passes = steps == row + 1 if parents is None else (parent_of == row) & (steps > row)
        if not FORCED:
            token = _row_token(
                logits, logits_b, logits_r, theirs, theirs_b, theirs_r, mixed, mixes, own, other, peak, second,
                temperature, rows, vocab, chunks, sequence, row,
                token_draws if GREEDY else token_draws + first + depth, GREEDY, MIXED, CHUNK, CHUNKS,
            ).to(tl.int64)  # fmt: skip
            if trusted is not None:
                passes = passes & ((token_of == token) | is_trusted)
            else:
                passes = passes & (token_of == token)
        following = tl.min(tl.where(passes & within, steps, ROWS), 0)
        going = (following < ROWS) & (depth < end)
        if going:
            gained = tl.where(steps == depth, tl.sum(tl.where(steps == following, token_of, 0), 0), gained)
            depth += 1
            row = following.to(tl.int64)
            path = tl.where(steps == depth, following, path)
    if FORCED:
        token = _row_token(
            logits, logits_b, logits_r, theirs, theirs_b, theirs_r, mixed, mixes, own, other, peak, second,
            temperature, rows, vocab, chunks, sequence, row, token_draws, GREEDY, MIXED, CHUNK, CHUNKS,
        ).to(tl.int64)  # fmt: skip
    tl.store(kept + first + steps, path, mask=within)
    tl.store(tokens + first + steps, tl.where(steps == depth, token, gained), mask=within)
    tl.store(counts + sequence, depth + 1)
    tl.store(bonus + sequence, token)


def _residuals(
    logits, logits_b, logits_r, theirs, theirs_b, theirs_r, mixed, mixes, own, other, ends, peak, second,
    temperature, rows, vocab, chunks, probs, probs_b, probs_r, rest, accepted, ids, accept_draws,
    GREEDY: tl.constexpr, MIXED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every chunk's program decides on all drafts by itself: that is less than waiting for one that did."""
    sequence = tl.program_id(0).to(tl.int64)
    steps = tl.arange(0, ROWS)
    first = sequence * rows
    end = (first * 0 + rows - 1).to(tl.int64)
    if ends is not None:
        end = tl.minimum(end, tl.load(ends + sequence))
    drafted = steps < end
    index = tl.arange(0, CHUNKS)
    place = (first + steps)[:, None] * chunks + index[None, :]
    known = (steps <= end)[:, None] & (index < chunks)[None, :]
    peaks = tl.load(peak + place, mask=known, other=float("-inf"))
    tops = tl.max(peaks, 1)
    tops = tl.where(tops == float("-inf"), 0.0, tops)
    weights = tl.load(second + place, mask=known, other=0.0)
    totals = tl.sum(weights * tl.exp(peaks - tops[:, None]).to(tl.float64), 1)
    totals = tl.where(steps <= end, totals, 1.0)

    token = tl.load(ids + first + steps + 1, mask=drafted, other=0)
    x = tl.load(logits + sequence * logits_b + steps * logits_r + token, mask=drafted, other=0.0)
    if MIXED > 0:
        which = tl.arange(0, MIXED)
        mixed_rows = tl.load(mixed + which, mask=which < mixes, other=-1)
        at = tl.max(tl.where(mixed_rows[None, :] == steps[:, None], which[None, :], -1), 1)
        blends = drafted & (at >= 0)
        y = tl.load(theirs + sequence * theirs_b + at * theirs_r + token, mask=blends, other=0.0)
        x = tl.where(blends, own * x + other * y, x)
    p = (tl.exp(x / temperature - tops).to(tl.float64) / totals).to(tl.float32)
    q = tl.load(probs + sequence * probs_b + steps * probs_r + token, mask=drafted, other=0.0)
    u = tl.load(accept_draws + first - sequence + steps, mask=drafted, other=0.0)
    refused = drafted & ((u * q.to(tl.float64) < p.to(tl.float64)) == 0)
    row = tl.minimum(tl.min(tl.where(refused, steps, ROWS), 0).to(tl.int64), end)

    top = tl.sum(tl.where(steps == row, tops, 0.0), 0)
    total = tl.sum(tl.where(steps == row, totals, 0.0), 0)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    x = _load(
        logits, logits_b, logits_r, theirs, theirs_b, theirs_r, mixed, mixes, own, other,
        sequence, row, columns, vocab, MIXED,
    )  # fmt: skip
    p = (tl.exp(x / temperature - top).to(tl.float64) / total).to(tl.float32)
    limit = tl.where(row < end, vocab, 0)
    q = tl.load(probs + sequence * probs_b + row * probs_r + columns, mask=columns < limit, other=0.0)
    tl.store(rest + sequence * chunks + tl.program_id(1), tl.sum(tl.maximum(p - q, 0.0).to(tl.float64), 0))
    if tl.program_id(1) == 0:
        tl.store(accepted + sequence, row)


def _resample(
    logits, logits_b, logits_r, theirs, theirs_b, theirs_r, mixed, mixes, own, other, ends, peak, second,
    temperature, rows, vocab, chunks, probs, probs_b, probs_r, rest, accepted, ids, token_draws, kept, counts,
    tokens, bonus,
    GREEDY: tl.constexpr, MIXED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    first = sequence * rows
    row = tl.load(accepted + sequence)
    end = (first * 0 + rows - 1).to(tl.int64)
    if ends is not None:
        end = tl.minimum(end, tl.load(ends + sequence))
    index = tl.arange(0, CHUNKS)
    there = index < chunks
    place = (first + row) * chunks + index
    peaks = tl.load(peak + place, mask=there, other=float("-inf"))
    top = tl.max(peaks, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.load(second + place, mask=there, other=0.0) * tl.exp(peaks - top).to(tl.float64)
    total = tl.sum(weights, 0)
    rests = tl.load(rest + sequence * chunks + index, mask=there, other=0.0)
    # Where p = q up to rounding a draft can be rejected with nothing left over.
    left = tl.sum(rests, 0) > 0
    weights = tl.where(left, rests, weights / total)
    target = tl.load(token_draws + first + row) * tl.sum(weights, 0)
    chunk, before = _first_beyond(weights, 0.0, target, CHUNKS)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _load(
        logits, logits_b, logits_r, theirs, theirs_b, theirs_r, mixed, mixes, own, other,
        sequence, row, columns, vocab, MIXED,
    )  # fmt: skip
    p = (tl.exp(x / temperature - top).to(tl.float64) / total).to(tl.float32)
    limit = tl.where((row < end) & left, vocab, 0)
    q = tl.load(probs + sequence * probs_b + row * probs_r + columns, mask=columns < limit, other=0.0)
    inner, _ = _first_beyond(tl.maximum(p - q, 0.0).to(tl.float64), before, target, CHUNK)
    token = tl.minimum(chunk * CHUNK + inner, vocab - 1).to(tl.int64)
    steps = tl.arange(0, ROWS)
    within = steps < rows
    drafted = tl.load(ids + first + steps + 1, mask=steps < row, other=-1)
    tl.store(kept + first + steps, tl.where(steps <= row, steps, -1), mask=within)
    tl.store(tokens + first + steps, tl.where(steps == row, token, drafted), mask=within)
    tl.store(counts + sequence, row + 1)
    tl.store(bonus + sequence, token)


def cost(logits: Tensor, drafts: Drafts, draws: Draws, mix: Mix | None = None) -> Work:
    """Every logit that can be asked for once (a forced chain asks one row), q of one row, the verdict. Operations per
    logit: a comparison, or with a temperature also scale, subtract, exponential and sum."""
    batch, rows, vocab = logits.shape
    asked = 1 if drafts.forced is not None and drafts.parents is None else rows
    mixed = 0 if mix is None else min(asked, len(mix.rows))
    drawn = drafts.probs is not None and bool(draws.temperature) and drafts.forced is None
    per_logit = 5 if draws.temperature and drafts.forced is None else 1
    return Work(
        flops=float(batch * vocab * (asked * per_logit + 3 * mixed + 3 * drawn)),
        bytes_read=float(batch * (4 * vocab * (asked + mixed + drawn) + 8 * rows)),
        bytes_written=float(batch * 8 * (2 * rows + 2)),
    )


def example(device: torch.device, seed: int) -> tuple[Any, ...]:
    """By seed: greedy tree, sampled tree, chain with trust, chain of drawn drafts, forced chain, forced tree."""
    mode = seed % 6
    tree, forced = mode in (0, 1, 5), mode in (4, 5)
    generator = torch.Generator().manual_seed(seed)
    batch, rows, vocab = 3, 5, 2 * chips.pick(TABLE, device).chunk + 77
    logits = 3 * torch.randn(batch, rows, vocab, generator=generator)
    logits[:, :, torch.randperm(vocab, generator=generator)[: vocab // 3]] = float("-inf")
    token, accept = (torch.rand(batch, n, generator=generator, dtype=torch.float64) for n in (rows, rows - 1))
    draws = Draws(0.6 if mode else 0.0, token=token, accept=accept)
    # Drafts that the target says in turn, but for one of the last sequence.
    parents = torch.tensor([[-1, 0, 0, 1, 3], [-1, 0, 1, 2, 2], [-1, 0, -1, 1, 3]]) if tree else None
    above = torch.arange(-1, rows - 1).expand(batch, rows) if parents is None else parents
    depth = _sum_to_root(above >= 0, above)
    ids = _targets(logits, draws, token.gather(1, depth)).gather(1, above.clamp(min=0))
    ids[2, 3] += 1
    probs = (logits[:, :-1] + torch.randn(batch, rows - 1, vocab, generator=generator)).softmax(-1)
    mix = Mix(torch.randn(batch, 2, vocab, generator=generator), torch.tensor([0, 3]), 0.95)
    if not tree:
        logits[1, 3:] = float("nan")  # rows that nobody asks for

    def there(x: Tensor | None, wanted: bool = True) -> Tensor | None:
        return x.to(device) if x is not None and wanted else None

    return (
        logits.to(device),
        Drafts(
            ids.to(device),
            there(parents),
            offered=there(torch.tensor([4, 2, 3]), not tree),
            trusted=there(torch.rand(batch, rows - 1, generator=generator) < 0.5, mode == 2),
            probs=there(probs, mode == 3),
            forced=there(torch.tensor([2, 1, 4]), forced),
        ),
        replace(draws, token=token.to(device), accept=accept.to(device)),
        None if tree else Mix(mix.theirs.to(device), mix.rows.to(device), mix.own),
    )


def cases(device: torch.device) -> list[Case]:
    """Qwen3's vocabulary (on a CPU 8192): chains of drafts that the target's distribution favours, chosen outright or
    drawn from a drafter's, and a tree."""
    vocab = 8192 if device.type == "cpu" else 151_936
    kinds = [("greedy", rows) for rows in (1, 16, 64)] + [("sampled", rows) for rows in (1, 16, 64)]
    return [
        Case(f"{kind}, {rows} rows of {vocab}", partial(_favoured, device, vocab, kind, rows))
        for kind, rows in (*kinds, ("tree", 64), ("drawn", 16))
    ]


def _favoured(device: torch.device, vocab: int, kind: str, rows: int, seed: int) -> tuple[Any, ...]:
    """Drafts have most of the mass, so that sampled ones are kept for some rows and then refused."""
    g = torch.Generator(device).manual_seed(seed)
    logits = 3 * torch.randn(1, rows, vocab, generator=g, device=device)
    favoured = torch.randint(vocab, (1, rows), generator=g, device=device)
    logits.scatter_(2, favoured[..., None], 18.0)
    children = 3 if kind == "tree" else 1
    parents = torch.tensor([[-1, *((row - 1) // children for row in range(1, rows))]], device=device)
    probs = None
    if kind == "drawn":
        noise = torch.randn(1, rows - 1, vocab, generator=g, device=device)
        probs = (logits[:, :-1] + 0.3 * noise).softmax(-1)
    row = torch.arange(rows, device=device)
    ids = (favoured.gather(1, parents.clamp(min=0)) + (row - 1) % children) % vocab  # siblings differ
    drafts = Drafts(ids, parents if kind == "tree" else None, probs=probs)
    token, accept = (
        torch.rand(1, count, generator=g, device=device, dtype=torch.float64) for count in (rows, rows - 1)
    )
    return logits, drafts, Draws(0.0 if kind == "greedy" else 1.0, token=token, accept=accept)


KERNEL = Kernel(
    "verify", reference, launch, cost, example, tolerance=0.0, cases=cases, examples=6, table=TABLE,
    candidates=CANDIDATES,
)  # fmt: skip
