"""From per-sample logs to the value asked for: class weights, ignored rows, mean, sum or none, log or linear.

With s_n = sum_k weight_k target_k (hard label: weight_y; ignored: 0; no target: 1) the mean is
sum_n s_n t_n / sum_n d_n, with torch's divisor: d_n = weight_{y_n} over valid rows for hard labels, d_n = 1 for soft
targets or none. Everything is summed in float64; the log of a mean is a log-sum-exp, never a mean of logs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample_weights(
    target: Tensor | None, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return s_n and d_n for every row, each None where all are 1."""
    if target is None:
        return None, None
    if target.is_floating_point():
        scaled = target.double() if weight is None else target.double() * weight.double()
        return scaled.sum(dim=1), None
    valid = target != ignore_index
    if weight is None:
        s = valid.double()
    else:
        s = torch.where(valid, weight.double()[torch.where(valid, target, 0)], 0.0)
        s = torch.where(s < 0, math.nan, s)
    return s, s


def reduce(logs: Tensor, s: Tensor | None, d: Tensor | None, reduction: str, log: bool, dtype: torch.dtype) -> Tensor:
    """Reduce per-sample logs (N,), float64, to the value asked for."""
    if s is not None:
        # by select, so that a NaN in a row of weight 0 stays out
        logs = torch.where(s == 0, -math.inf, logs + s.log())
    if reduction == "none":
        return (logs if log else logs.exp()).to(dtype)
    if log:
        value = logs.logsumexp(dim=0) if logs.shape[0] else logs.new_full((), -math.inf)
    else:
        value = logs.exp().sum()
    if reduction == "mean":
        count = logs.new_tensor(float(logs.shape[0])) if d is None else d.sum()
        value = torch.where(count == 0, math.nan, value - count.log() if log else value / count)
    return value.to(dtype)
