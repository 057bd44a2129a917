"""From per-sample logs to the value asked for: class weights, ignored rows, mean, sum or none, log or linear.

With s_n = sum_k weight_k target_k (hard label: weight_y; ignored: 0; no target: 1) the mean is
sum_n s_n t_n / sum_n d_n, with torch's divisor: d_n = weight_{y_n} over valid rows for hard labels, d_n = 1 for soft
targets or none. Everything is summed in float64; the log of a mean is a log-sum-exp, never a mean of logs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Measure(NamedTuple):
    """What is asked for: one field of the head's statistics, reduced over the rows."""

    temperature: float
    ignore_index: int
    include_bias: bool
    norm_power: int
    field: int
    reduction: str
    log: bool
    dtype: torch.dtype

    def logs(self, features, linear_weight, linear_bias, logits, target) -> tuple[Any, ...]:
        """Arguments of head_metrics that give the rows' logs."""
        return (features, linear_weight, linear_bias, logits, target, self.temperature, self.ignore_index,
                self.include_bias, self.norm_power, 1 << self.field, True)  # fmt: skip

    @property
    def reduced(self) -> tuple[Any, ...]:
        """What the reduction needs."""
        return self.ignore_index, self.reduction, self.log, self.dtype


def sample_weights(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return s_n of soft targets (N, C), or of labels (N,) under class weights."""
    if target.is_floating_point():
        scaled = target.double() if weight is None else target.double() * weight.double()
        return scaled.sum(dim=1)
    valid = target != ignore_index
    if weight is None:
        return valid.double()
    # a label that is no class looks anything up: the kernels refuse it, or make its row NaN
    label = torch.where(valid, target, 0).clamp(0, weight.shape[0] - 1)
    s = torch.where(valid, weight.double()[label], 0.0)
    return torch.where(s < 0, math.nan, s)


def _weighed(logs: Tensor, s: Tensor | None, target: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """log(s_n t_n), and s."""
    if s is None and target is not None:
        s = sample_weights(target, None, ignore_index)
    if s is not None:
        # by select, so that a NaN in a row of weight 0 stays out
        logs = torch.where(s == 0, -math.inf, logs + s.log())
    # by select too: whatever the upstream of a value 0 is, the gradient is 0
    return torch.where(logs == -math.inf, -math.inf, logs), s


def reduce(
    logs: Tensor,
    s: Tensor | None,
    target: Tensor | None,
    count_rows: bool,
    ignore_index: int,
    reduction: str,
    log: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Reduce per-sample logs (N,), float64, to the value asked for; autograd follows.

    ``s`` None: 1, or 0 where ``target`` is ignored. ``count_rows``: the mean's divisor is N, not the sum of s.
    """
    logs, s = _weighed(logs, s, target, ignore_index)
    if reduction == "none":
        return (logs if log else logs.exp()).to(dtype)
    if log:
        value = logs.logsumexp(dim=0) if logs.shape[0] else logs.new_full((), -math.inf) + logs.sum()
    else:
        value = logs.exp().sum()
    if reduction == "mean":
        count = _count(logs, s, count_rows)
        value = torch.where(count == 0, math.nan, value - count.log() if log else value / count)
    return value.to(dtype)


def _count(logs: Tensor, s: Tensor | None, count_rows: bool) -> Tensor:
    return logs.new_full((), float(logs.shape[0])) if s is None or count_rows else s.sum()


def reduce_with_log_coefficient(
    logs: Tensor,
    s: Tensor | None,
    target: Tensor | None,
    count_rows: bool,
    ignore_index: int,
    reduction: str,
    log: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Reduce as :func:`reduce`, and the log of the value's derivative by each row's log (N,), float64.

    -inf where a row's value is 0. A log, for e^-760 is 0 in float64, and its quotient by as small a value is not.
    """
    logs = logs.detach()
    value = reduce(logs, s, target, count_rows, ignore_index, reduction, log, dtype)
    weighed, s = _weighed(logs, s, target, ignore_index)
    if not log:
        mean = reduction == "mean"
        slope = weighed - _count(logs, s, count_rows).log() if mean else weighed
    elif reduction == "none":
        slope = weighed * 0
    else:
        slope = weighed - (weighed.logsumexp(dim=0) if logs.shape[0] else 0)
    return value, torch.where(weighed == -math.inf, -math.inf, slope)


def derivative(upstream: Tensor, log_coefficient: Tensor | None, double: bool) -> Tensor:
    """upstream * exp(log_coefficient): 0, by select, where either of them says that a row adds nothing.

    As csrc/head_problem.h has it, ``counts_as_nothing``; ``double``: the value was given back in float64.
    """
    if log_coefficient is None:
        return upstream
    none = (upstream == 0) | (log_coefficient == -math.inf)
    none |= ~upstream.isfinite() & (log_coefficient < (-745.133 if double else -103.972))
    half = (0.5 * log_coefficient).exp()  # in two steps: exp of -740 has few digits left
    return torch.where(none, 0, upstream * half * half)
