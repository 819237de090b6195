"""RMSNorm with gradient."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zbench.kernels import add_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `add_norm.rms_norm`. On a GPU one operator instead of its six, and of twice as many backwards, which rounds
    once less. x and weight are of one dtype."""
    return F.rms_norm(x, weight.shape, weight, eps) if x.is_cuda else add_norm.rms_norm(x, weight, eps)
