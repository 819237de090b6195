"""Residual add and RMSNorm in one pass: the sum goes to memory once and is not read again to be normalised."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zbench.kernels import chips, jit
from zbench.kernels.registry import Case, Kernel, Work

if TYPE_CHECKING:
    import triton.language as tl


class Launch(NamedTuple):
    share: int  # values of a row for each warp
    most: int  # warps


# 16 values for each of a warp's 32 or 64 lanes. By reasoning, tuned nowhere.
TABLE = {
    "": Launch(512, 16),
    "gfx942": Launch(1024, 8),
    "gfx950": Launch(1024, 8),
    "sm90": Launch(512, 16),
    "sm100": Launch(512, 16),
}
CANDIDATES = {"share": (256, 512, 1024, 2048), "most": (4, 8, 16)}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, the mean square in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def reference(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and added [..., D], weight [D], all of one dtype -> (x + added, its RMSNorm); None adds nothing."""
    x = x if added is None else x + added
    return x, rms_norm(x, weight, eps)


def launch(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference`."""
    width = x.shape[-1]
    x = x.contiguous()
    normed = torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    block = 1 << (width - 1).bit_length()
    chosen = chips.pick(TABLE, x.device)
    with torch.cuda.device_of(x):
        jit.compiled(_add_norm)[(x.numel() // width,)](
            x, None if added is None else added.contiguous(), weight, total, normed, width, eps,
            BLOCK=block, num_warps=min(chosen.most, max(1, block // chosen.share)),
        )  # fmt: skip
    return total, normed


def _add_norm(x, added, weight, total, normed, width, eps, BLOCK: tl.constexpr):
    """One program a row; rounds where the reference does."""
    place = tl.arange(0, BLOCK)
    inside = place < width
    row = tl.program_id(0).to(tl.int64) * width + place
    stored = normed.dtype.element_ty
    value = tl.load(x + row, mask=inside, other=0.0)
    if added is not None:
        wide = value.to(tl.float32) + tl.load(added + row, mask=inside, other=0.0).to(tl.float32)
        value = wide.to(stored)
        tl.store(total + row, value, mask=inside)
    value = value.to(tl.float32)
    scaled = value * tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    scale = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row, (scaled.to(stored).to(tl.float32) * scale).to(stored), mask=inside)


def cost(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Work:
    """Both inputs read once, both results written once; an addition, a square, a sum and two products a value."""
    addends = 1 if added is None else 2
    return Work((3.0 + addends) * x.numel(), float(addends * x.nbytes + weight.nbytes), float(addends * x.nbytes))


def example(device: torch.device, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, added = (torch.randn(2, 3, 576, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    weight = torch.rand(576, generator=generator).to(device, torch.bfloat16)
    return x, None if seed % 2 else added, weight, 1e-5


def cases(device: torch.device) -> list[Case]:
    """An 8B model's residual stream in bfloat16 (on a CPU an eighth as wide): a token, a verify, TiDAR steps."""
    width = 512 if device.type == "cpu" else 4096

    def make(rows: int, seed: int) -> tuple[Any, ...]:
        g = torch.Generator().manual_seed(seed)
        x, added = (torch.randn(rows, width, generator=g).to(device, torch.bfloat16) for _ in range(2))
        return x, added, torch.rand(width, generator=g).to(device, torch.bfloat16), 1e-6

    return [Case(f"{rows} rows of {width}", partial(make, rows)) for rows in (1, 16, 64, 272)]


KERNEL = Kernel(
    "add_norm", reference, launch, cost, example, tolerance=1e-2, cases=cases, examples=2, table=TABLE,
    candidates=CANDIDATES,
)  # fmt: skip
