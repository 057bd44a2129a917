"""Cross-entropy with a cotangent that confidence does not mask, in plain PyTorch.

Letters: N samples, C classes; logits z (N, C), target y, p = softmax(z). With q the softmax over the classes other than y
and d = z_y - log sum_{j != y} exp(z_j),

    dl/dz = (1 - p_y)(q - e_y),   l = -log p_y = log(1 + exp(-d)),   log(1 - p_y) = -log(1 + exp(d)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arithmetic import arithmetic, blocks, joined


def unmasked_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, with_cotangent: bool = True, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss l (N,), log(1 - p_y) (N,) and q - e_y (N, C), which is (0, C) where it is not wanted.

    The first two are float64 if the logits are, otherwise float32; the cotangent has the logits' dtype. ``dtype``: the
    arithmetic's, as in :func:`head_metrics`; in float32 a loss and a log are right to 4e-6 and 4 units in the last place,
    an entry q of the cotangent to 8 + |log q| units of 2^-24.
    """
    result = torch.float64 if logits.dtype == torch.float64 else torch.float32
    wide = arithmetic(logits, dtype=dtype)
    N, C = logits.shape
    with torch.no_grad():
        found = [
            _rows(logits[rows].to(wide), target[rows], ignore_index, with_cotangent)
            for rows in blocks(N, C, wide, logits.device)
        ]
    loss, log_scale, cotangent = (joined(list(parts)) for parts in zip(*found, strict=True))
    return loss.to(result), log_scale.to(result), cotangent.to(logits.dtype)


def _rows(z: Tensor, target: Tensor, ignore_index: int, with_cotangent: bool) -> tuple[Tensor, Tensor, Tensor]:
    valid, known = target != ignore_index, (target >= 0) & (target < z.shape[1])
    bad = ~(z.amax(dim=1).isfinite() & known)  # NaN, inf, or all -inf
    y = torch.where(known, target, 0).unsqueeze(1)
    rest = z.scatter(1, y, -math.inf)
    r = rest.amax(dim=1)
    u = (rest - torch.where(r == -math.inf, 0, r).unsqueeze(1)).exp()
    total = u.sum(dim=1)
    d = (z.gather(1, y).squeeze(1) - r) - total.log()
    tail = (-d.abs()).exp().log1p()
    loss = (-d).clamp_min(0) + tail
    log_scale = 0 - (d.clamp_min(0) + tail)
    loss = torch.where(valid, torch.where(bad, math.nan, loss), 0)
    log_scale = torch.where(valid, torch.where(bad, math.nan, log_scale), -math.inf)
    if not with_cotangent:
        return loss, log_scale, z.new_empty((0, z.shape[1]))
    others = total > 0
    q = u / torch.where(others, total, 1).unsqueeze(1)
    # a label that is the only class there is cannot be moved: 0
    cotangent = q.scatter(1, y, torch.where(others, -1, 0).to(q.dtype).unsqueeze(1))
    cotangent = torch.where(bad.unsqueeze(1), math.nan, cotangent)
    return loss, log_scale, torch.where(valid.unsqueeze(1), cotangent, 0)


def soft_cross_entropy_cotangent(logits: Tensor, target: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return dl/dz = s p - t for l = -sum_j t_j log p_j with soft targets t (N, C), s = sum_j t_j, in the logits' dtype."""
    wide = arithmetic(logits, dtype=dtype)
    with torch.no_grad():
        t, p = target.to(wide), logits.to(wide).softmax(dim=1)
        return (t.sum(dim=1, keepdim=True) * p - t).to(logits.dtype)
