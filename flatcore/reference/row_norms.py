"""Row norms in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arithmetic import arithmetic, blocks, joined


def row_norms(x: Tensor, ord: tuple[float, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Norms of every row of ``x`` (N, K), shape (len(ord), N): each row is divided by its largest entry first.

    ``dtype``: the arithmetic's, as in :func:`head_metrics`. In float32 a norm is right to 16 units in the last place, as far
    as the library sums by parts; in float64 to 2 units of a float32 result.
    """
    result = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = arithmetic(x, dtype=dtype)
    N, K = x.shape
    with torch.no_grad():
        parts = [_norms(x[rows].to(wide), ord) for rows in blocks(N, K, wide, x.device)]
    return joined(parts, dim=1).to(result)


def _norms(x: Tensor, ord: tuple[float, ...]) -> Tensor:
    a = x.abs()
    largest = a.amax(dim=1) if a.shape[1] else a.new_zeros(a.shape[0])
    scale = torch.where((largest > 0) & (largest < math.inf), largest, 1)
    if ord != (math.inf,):
        a = a / scale.unsqueeze(1)
    norms = {math.inf: largest}
    if 1 in ord:
        norms[1] = a.sum(dim=1) * scale
    if 2 in ord:
        norms[2] = a.square().sum(dim=1).sqrt() * scale
    return torch.stack([norms[p] for p in ord])
