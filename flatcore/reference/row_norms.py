"""Row norms in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row_norms(x: Tensor, ord: tuple[float, ...]) -> Tensor:
    """Norms of every row of ``x`` (N, K), shape (len(ord), N): each row is divided by its largest entry first."""
    result = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    a = x.to(wide).abs()
    largest = a.amax(dim=1) if a.shape[1] else a.new_zeros(a.shape[0])
    regular = (largest > 0) & (largest < math.inf)
    scaled = a / torch.where(regular, largest, 1).unsqueeze(1)
    scale = torch.where(regular, largest, 1)
    norms = {1: scaled.sum(1) * scale, 2: (scaled * scaled).sum(1).sqrt() * scale, math.inf: largest}
    return torch.stack([norms[p] for p in ord]).to(result)
