"""Cross-entropy with a cotangent that confidence does not mask, in plain PyTorch.

Letters: N samples, C classes; logits z (N, C), target y, p = softmax(z). With q the softmax over the classes other than y
and d = z_y - log sum_{j != y} exp(z_j),

    dl/dz = (1 - p_y)(q - e_y),   l = -log p_y = log(1 + exp(-d)),   log(1 - p_y) = -log(1 + exp(d)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unmasked_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, with_cotangent: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss l (N,), log(1 - p_y) (N,) and q - e_y (N, C), which is (0, C) where it is not wanted.

    The first two are float64 if the logits are, otherwise float32; the cotangent has the logits' dtype.
    """
    result = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits.detach().to(_wide(logits))
    C = z.shape[1]
    valid, known = target != ignore_index, (target >= 0) & (target < C)
    bad = (z.isnan() | (z == math.inf)).any(dim=1) | (z == -math.inf).all(dim=1) | ~known
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
        return loss.to(result), log_scale.to(result), logits.new_empty((0, C))
    others = total > 0
    q = u / torch.where(others, total, 1).unsqueeze(1)
    # a label that is the only class there is cannot be moved: 0
    cotangent = q.scatter(1, y, torch.where(others, -1, 0).to(q.dtype).unsqueeze(1))
    cotangent = torch.where(bad.unsqueeze(1), math.nan, cotangent)
    cotangent = torch.where(valid.unsqueeze(1), cotangent, 0)
    return loss.to(result), log_scale.to(result), cotangent.to(logits.dtype)


def soft_cross_entropy_cotangent(logits: Tensor, target: Tensor) -> Tensor:
    """Return dl/dz = s p - t for l = -sum_j t_j log p_j with soft targets t (N, C), s = sum_j t_j, in the logits' dtype."""
    wide = _wide(logits)
    t = target.detach().to(wide)
    p = logits.detach().to(wide).softmax(dim=1)
    return (t.sum(dim=1, keepdim=True) * p - t).to(logits.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64
