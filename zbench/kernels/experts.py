"""Gated MLPs of a mixture of experts, of which each row is computed by one or by none, for few rows.

    out[i] = down[e] (silu(gate[e] x[i]) * up[e] x[i]),  e = choice[i];  zeros where e is the last class

At decode sizes this is reading weights. A program takes some outputs of one expert, finds that expert's rows by
counting, without sorting anything, and ends at once where there are none: of an expert that was hit each weight is
read once for all its rows, of the others nothing is. A row's sum runs over the same inputs in the same order whoever
its neighbours are, so what other rows chose does not change its result.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.kernels import chips, jit
from zbench.kernels.registry import Case, Kernel, Work

if TYPE_CHECKING:
    import triton.language as tl


class Launch(NamedTuple):
    """Of a tile of 16 rows. Taller ones take twice the outputs and half the inputs: more products for each load."""

    outputs: int  # of a program; few make many programs, and so many reads in flight
    taken: int  # inputs at a time
    warps: int
    stages: int  # of the software pipeline


# A stage of the tallest tile takes 16 KiB of shared memory, so four would fill CDNA3's. By reasoning, tuned nowhere.
TABLE = {
    "": Launch(16, 128, 4, 4),
    "gfx942": Launch(16, 128, 2, 2),
    "gfx950": Launch(16, 128, 2, 2),
    "sm90": Launch(16, 128, 4, 4),
    "sm100": Launch(16, 128, 4, 4),
}
CANDIDATES = {"outputs": (16, 32), "taken": (64, 128), "warps": (2, 4, 8), "stages": (2, 3, 4)}
MOST_ROWS = 512  # beyond, arithmetic limits the products, which torch's grouped ones are made for


def reference(x: Tensor, choice: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The definition: two grouped products over rows in the order of their experts, which accumulate in float32.

    x [N, D], choice [N] int64 in 0 .. E, gate_up [E, 2 F, D] (gates, then ups), down [E, D, F] -> [N, D] in x's type.
    """
    order = choice.argsort()
    ends = (choice <= torch.arange(len(down), device=x.device)[:, None]).sum(1, dtype=torch.int32)
    gate, up = F.grouped_mm(x[order], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    sorted_rows = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    out = torch.empty_like(x).index_copy_(0, order, sorted_rows)
    return out.masked_fill((choice == len(down))[:, None], 0.0)  # no group: what is there was never written


def launch(x: Tensor, choice: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """See `reference`, which also takes over beyond `MOST_ROWS`. All contiguous."""
    rows, width = x.shape
    experts, _, inner = down.shape
    if rows > MOST_ROWS:
        return reference(x, choice, gate_up, down)
    hidden = torch.empty(rows, inner, dtype=x.dtype, device=x.device)
    out = torch.empty_like(x)
    tile, outputs, taken, warps, stages = tiles(rows, chips.pick(TABLE, x.device))
    options: dict[str, Any] = {
        "OUTPUTS": outputs, "TAKEN": taken, "TILE": tile, "ALL": max(16, 1 << (rows - 1).bit_length()),
        "WIDE": jit.interpreted(), "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    jit.compiled(_gate_up)[(-(-inner // outputs), experts)](x, choice, gate_up, hidden, rows, width, inner, **options)
    # The class that skips has programs too: they write the zeros.
    grid = (-(-width // outputs), experts + 1)
    jit.compiled(_down)[grid](hidden, choice, down, out, rows, inner, width, experts, **options)
    return out


def tiles(rows: int, chosen: Launch) -> tuple[int, int, int, int, int]:
    """(rows of a tile, outputs of a program, inputs taken at a time, warps, stages). By the number of rows alone, so
    that a captured graph can be replayed. An expert with more rows than a tile has its weights read again, from the
    cache."""
    tile = min(max(16, 1 << (rows - 1).bit_length()), 64)
    return (tile, *chosen) if tile == 16 else (tile, 2 * chosen.outputs, chosen.taken // 2, *chosen[2:])


def _places(choice, expert, rows, ALL: tl.constexpr):
    """[ALL] int32: the place of each row among the expert's, in order; -1 for rows of others."""
    every = tl.arange(0, ALL)
    mine = tl.load(choice + every, mask=every < rows, other=-1) == expert
    return tl.where(mine, tl.cumsum(mine.to(tl.int32), 0) - 1, -1)


def _rows_at(place, wanted, ALL: tl.constexpr):
    """The rows that stand at the wanted places; 0 where none does."""
    match = place[None, :] == wanted[:, None]
    return tl.sum(tl.where(match, tl.arange(0, ALL)[None, :], 0), 1).to(tl.int64)


def _gate_up(
    x, choice, weights, hidden, rows, width, inner, OUTPUTS: tl.constexpr, TAKEN: tl.constexpr, TILE: tl.constexpr,
    ALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (block of inner channels, expert): silu(gate) * up of the expert's rows."""
    expert = tl.program_id(1)
    place = _places(choice, expert, rows, ALL)
    count = tl.max(place, 0) + 1
    channel = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    made = channel < inner
    of_gate = weights + (expert.to(tl.int64) * 2 * inner + channel) * width
    of_up = of_gate + inner * width
    for first in range(0, count, TILE):
        wanted = first + tl.arange(0, TILE)
        row, alive = _rows_at(place, wanted, ALL), wanted < count
        gate = tl.zeros((TILE, OUTPUTS), tl.float32)
        up = tl.zeros((TILE, OUTPUTS), tl.float32)
        for start in range(0, width, TAKEN):
            taken = start + tl.arange(0, TAKEN)
            within = taken < width
            seen = alive[:, None] & within[None, :]
            known = within[:, None] & made[None, :]
            a = tl.load(x + row[:, None] * width + taken[None, :], mask=seen, other=0)
            g = tl.load(of_gate[None, :] + taken[:, None], mask=known, other=0)
            u = tl.load(of_up[None, :] + taken[:, None], mask=known, other=0)
            if WIDE:
                a, g, u = a.to(tl.float32), g.to(tl.float32), u.to(tl.float32)
            gate = tl.dot(a, g, gate, input_precision="ieee")
            up = tl.dot(a, u, up, input_precision="ieee")
        y = gate / (1 + tl.exp(-gate)) * up
        to = hidden + row[:, None] * inner + channel[None, :]
        tl.store(to, y.to(hidden.dtype.element_ty), alive[:, None] & made[None, :])


def _down(
    hidden, choice, weights, out, rows, inner, width, experts, OUTPUTS: tl.constexpr, TAKEN: tl.constexpr,
    TILE: tl.constexpr, ALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, expert): the expert's rows; zeros for the class that skips."""
    expert = tl.program_id(1)
    place = _places(choice, expert, rows, ALL)
    count = tl.max(place, 0) + 1
    channel = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    made = channel < width
    of_output = weights + (expert.to(tl.int64) * width + channel) * inner
    length = tl.where(expert < experts, inner, 0)
    for first in range(0, count, TILE):
        wanted = first + tl.arange(0, TILE)
        row, alive = _rows_at(place, wanted, ALL), wanted < count
        y = tl.zeros((TILE, OUTPUTS), tl.float32)
        for start in range(0, length, TAKEN):
            taken = start + tl.arange(0, TAKEN)
            within = taken < inner
            a = tl.load(hidden + row[:, None] * inner + taken[None, :], mask=alive[:, None] & within[None, :], other=0)
            w = tl.load(of_output[None, :] + taken[:, None], mask=within[:, None] & made[None, :], other=0)
            if WIDE:
                a, w = a.to(tl.float32), w.to(tl.float32)
            y = tl.dot(a, w, y, input_precision="ieee")
        to = out + row[:, None] * width + channel[None, :]
        tl.store(to, y.to(out.dtype.element_ty), alive[:, None] & made[None, :])


def cost(x: Tensor, choice: Tensor, gate_up: Tensor, down: Tensor) -> Work:
    """6 D F FLOPs for each row that an expert computes; the weights of the experts hit are read once, rows are read
    and written once. Waits for the device."""
    experts, width, inner = down.shape
    hit = choice[choice < experts]
    return Work(
        flops=6.0 * len(hit) * width * inner,
        bytes_read=float(3 * len(hit.unique()) * width * inner * down.itemsize + x.nbytes + choice.nbytes),
        bytes_written=float(x.nbytes),
    )


def example(device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Odd sizes in bfloat16; one expert has most rows, one none, some rows skip."""
    choice = [0] * 18 + [4, 2, 3, 0, 4, 1]
    return random_call(device, torch.bfloat16, seed, choice, experts=4, width=72, inner=40)


def random_call(
    device: torch.device, dtype: torch.dtype, seed: int, choice: list[int], experts: int, width: int, inner: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of a call with random rows and weights."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype)

    gate_up = normal(experts, 2 * inner, width, scale=width**-0.5)
    down = normal(experts, width, inner, scale=inner**-0.5)
    return normal(len(choice), width), torch.tensor(choice, device=device), gate_up, down


def cases(device: torch.device) -> list[Case]:
    """16 experts of ZAYA1-8B's size in bfloat16 (on a CPU an eighth as wide each way), rows spread evenly over them."""
    size = 256 if device.type == "cpu" else 2048

    def make(rows: int, seed: int) -> tuple[Any, ...]:
        return random_call(device, torch.bfloat16, seed, [5 * i % 16 for i in range(rows)], 16, size, size)

    return [Case(f"{rows} rows, {min(rows, 16)} experts hit", partial(make, rows)) for rows in (1, 4, 16, 64, 320)]


KERNEL = Kernel(
    "experts", reference, launch, cost, example, tolerance=2e-2, cases=cases, table=TABLE, candidates=CANDIDATES
)
