"""One linear projection on whatever runs it best: packed for the native CPU kernel, or torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zbench.kernels import cpu


class Projection:
    """y = x W^T for a weight [N, K]: x [..., K] of any float type -> y [..., N] of the same type.

    Native, the weight is kept packed only, and a row's result does not depend on the rows beside it, bit by bit.
    `native` False takes torch where the kernel could run too.
    """

    def __init__(self, weight: Tensor, native: bool = True) -> None:
        self.outputs, inputs = weight.shape
        self.dtype = weight.dtype
        packable = weight.dtype in (torch.float32, torch.bfloat16) and inputs % 2 == 0  # bfloat16 goes in pairs
        self.native = native and weight.device.type == "cpu" and packable and cpu.available()
        self._weight = cpu.Pages().copy(cpu.pack(weight)) if self.native else weight

    @property
    def packed(self) -> Tensor | None:
        """The weight as native kernels read it (`cpu.pack`); None where torch runs it."""
        return self._weight if self.native else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.native:
            flat = cpu.linear(x.reshape(-1, x.shape[-1]).float(), self._weight, self.outputs)
            return flat.view(*x.shape[:-1], self.outputs).to(x.dtype)
        return F.linear(x.to(self.dtype), self._weight).to(x.dtype)
