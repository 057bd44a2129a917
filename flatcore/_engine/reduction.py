"""From per-sample logs to the value asked for: class weights, ignored rows, mean, sum or none, log or linear.

With s_n = sum_k weight_k target_k (hard label: weight_y; ignored: 0; no target: 1) the mean is
sum_n s_n t_n / sum_n d_n, with torch's divisor: d_n = weight_{y_n} over valid rows for hard labels, d_n = 1 for soft
targets or none. Everything is summed in float64 (in float32 on a device that has no float64); the log of a mean is a
log-sum-exp, never a mean of logs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import widest

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
"""As the compiled kernels know them."""


class Reduction(NamedTuple):
    """What becomes of the rows' logs: how rows are weighed, what they are divided by, and the form of the value."""

    reduction: str  # "mean", "sum" or "none"
    log: bool
    dtype: torch.dtype
    target: Tensor | None  # labels (N,), or None
    ignore_index: int
    C: int
    s: Tensor | None = None  # (N,), widest dtype; None: the label's class weight, 1 without one, 0 where it is ignored
    count_rows: bool = False  # the mean's divisor is N, not the sum of s
    class_weight: Tensor | None = None  # (C,), of the labels

    def row_weights(self) -> Tensor | None:
        """s_n where it is more than whether a label is ignored."""
        if self.s is not None or self.target is None or self.class_weight is None:
            return self.s
        return sample_weights(self.target, self.class_weight, self.ignore_index, self.C)


def sample_weights(target: Tensor, weight: Tensor | None, ignore_index: int, C: int) -> Tensor:
    """Return s_n of soft targets (N, C), or of labels (N,) under class weights.

    NaN for a label that is no class, which the CPU's kernels refuse: on a device a look at it would wait.
    """
    wide = widest(target.device)
    if target.is_floating_point():
        scaled = target.to(wide) if weight is None else target.to(wide) * weight.to(wide)
        return scaled.sum(dim=1)
    valid = target != ignore_index
    label = target.clamp(0, C - 1)
    s = valid.to(wide) if weight is None else torch.where(valid, weight.to(wide)[label], 0.0)
    return torch.where((s < 0) | (valid & (label != target)), math.nan, s)


def _weighed(logs: Tensor, how: Reduction) -> tuple[Tensor, Tensor | None]:
    """log(s_n t_n), and s."""
    s = how.s
    if s is None and how.target is not None:
        s = sample_weights(how.target, how.class_weight, how.ignore_index, how.C)
    if s is not None:
        # by select, so that a NaN in a row of weight 0 stays out
        logs = torch.where(s == 0, -math.inf, logs + s.log())
    # by select too: whatever the upstream of a value 0 is, the gradient is 0
    return torch.where(logs == -math.inf, -math.inf, logs), s


def reduce(logs: Tensor, how: Reduction) -> Tensor:
    """Reduce per-sample logs (N,), in the widest dtype, to the value asked for; autograd follows."""
    logs, s = _weighed(logs, how)
    if how.reduction == "none":
        return (logs if how.log else logs.exp()).to(how.dtype)
    if how.log:
        value = logs.logsumexp(dim=0) if logs.shape[0] else logs.new_full((), -math.inf) + logs.sum()
    else:
        value = logs.exp().sum()
    if how.reduction == "mean":
        count = _count(logs, s, how.count_rows)
        value = torch.where(count == 0, math.nan, value - count.log() if how.log else value / count)
    return value.to(how.dtype)


def _count(logs: Tensor, s: Tensor | None, count_rows: bool) -> Tensor:
    return logs.new_full((), float(logs.shape[0])) if s is None or count_rows else s.sum()


def reduce_with_log_coefficient(logs: Tensor, how: Reduction) -> tuple[Tensor, Tensor]:
    """Reduce as :func:`reduce`, and the log of the value's derivative by each row's log (N,), in the logs' dtype.

    -inf where a row's value is 0. A log, for e^-760 is 0 in float64, and its quotient by as small a value is not.
    """
    logs = logs.detach()
    value = reduce(logs, how)
    weighed, s = _weighed(logs, how)
    if not how.log:
        mean = how.reduction == "mean"
        slope = weighed - _count(logs, s, how.count_rows).log() if mean else weighed
    elif how.reduction == "none":
        slope = weighed * 0
    else:
        slope = weighed - (weighed.logsumexp(dim=0) if logs.shape[0] else 0)
    return value, torch.where(weighed == -math.inf, -math.inf, slope)
