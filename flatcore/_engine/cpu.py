"""The compiled kernels of the CPU: allocate, and call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backend, chunked_cpu, chunked_cpu_backward, paths
from .backend import _core
from .head import Head
from .memory import HeadCall, address, as_dtype, in_dtypes_of, matrix, readable
from .reduction import REDUCTIONS, Reduction
from .threads import threads

_CPU = torch.device("cpu")


class _CpuCall(HeadCall):
    """A head as the CPU's kernels take it, for the target and on the path that are chosen here, once."""

    takes_float32_bias = True

    def __init__(self, head: Head, fields: int):
        super().__init__(_core, head, fields, threads())
        self.cpu_target = backend.cpu_target or ""
        self.path = paths.on_cpu(self.C, self.D, self.double, fields)
        paths.took(self.path, self, self.cpu_target)

    def run(self, wide_result: bool) -> tuple[Tensor, Tensor]:
        """The chosen fields and the prediction, by the path's kernels."""
        values, prediction = self.outputs(wide_result)
        if self.N == 0:
            return values, prediction
        if self.path == "fused":
            self.check_label(_core.head_metrics(self.cpu_target, self.problem))
        else:
            self.check_label(chunked_cpu.head_metrics(self.cpu_target, self))
        return values, prediction

    def check_label(self, row: int) -> None:
        """Refuse the label of a row, if a kernel has found one that is no class."""
        target = self.head.target
        if row >= 0 and target is not None:  # only a kernel that was given labels finds one
            raise bad_label(int(target[row]), row, self.C, self.head.ignore_index)


def head_metrics(head: Head, fields: int, wide_result: bool) -> tuple[Tensor, Tensor]:
    """Run the kernels of this stem; arguments and results as in ``reference.head_metrics``."""
    return _CpuCall(head, fields).run(wide_result)


def head_measure(
    head: Head, field: int, how: Reduction, with_coefficient: bool
) -> tuple[Tensor, Tensor | None, object | None]:
    """One field, reduced: the value, if wanted the log of its derivative by each row's log, and what a gradient can reuse.

    One call of the extension where the head is small, for it takes no longer than 10 us.
    """
    call = _CpuCall(head, 1 << field)
    call.keeps = with_coefficient
    if call.path != "fused":
        values, _ = call.run(True)
        return *head_reduction(values[0], how, with_coefficient), call.prepared
    value = torch.empty((call.N,) if how.reduction == "none" else (), dtype=how.dtype, device=_CPU)
    coefficient = torch.empty(call.N, dtype=torch.float64, device=_CPU) if with_coefficient else None
    s = how.row_weights()
    s = None if s is None else readable(s).contiguous()
    call.check_label(
        _core.head_measure(
            call.cpu_target, call.problem, address(s), REDUCTIONS[how.reduction], how.log,
            how.count_rows, value.data_ptr(), how.dtype is torch.float64, address(coefficient),
        )
    )  # fmt: skip
    return value, coefficient, None


def head_metrics_backward(
    upstream: Tensor,
    log_coefficient: Tensor | None,
    head: Head,
    field: int,
    wanted: Sequence[bool],
    prepared: object | None = None,
) -> tuple[Tensor | None, ...]:
    """Run the kernels of this stem; arguments and results as in ``reference.head_metrics_backward``.

    ``prepared``: what :func:`head_measure` gave of this head.
    """
    upstream = readable(upstream).contiguous()
    if log_coefficient is not None:
        log_coefficient = readable(log_coefficient).contiguous()
    call = _CpuCall(head, 1 << field)
    call.prepared = prepared
    N, D, C, dtype = call.N, call.D, call.C, call.dtype
    of_features, of_weight, of_bias, of_logits = wanted
    d_features = torch.empty(N, D, dtype=dtype, device=_CPU) if of_features else None
    d_weight = torch.empty(C, D, dtype=dtype, device=_CPU) if of_weight else None
    fused = call.path == "fused"
    bias_dtype = torch.float64
    if fused and of_bias and head.linear_bias is not None and head.linear_bias.dtype is torch.float32:
        bias_dtype = torch.float32
    d_bias = torch.empty(C, dtype=bias_dtype, device=_CPU) if of_bias else None
    d_logits = torch.empty(N, C, dtype=dtype, device=_CPU) if of_logits else None
    gradients = (d_features, d_weight, d_bias, d_logits)
    if fused:
        _core.head_metrics_backward(
            call.cpu_target, call.problem, upstream.data_ptr(), upstream.dim(), upstream.dtype is torch.float64,
            address(log_coefficient), address(d_features), address(d_weight), address(d_bias),
            bias_dtype is torch.float64, address(d_logits),
        )  # fmt: skip
    else:
        chunked_cpu_backward.head_metrics_backward(
            call.cpu_target,
            call,
            as_dtype(upstream, torch.float64).expand(N).contiguous(),
            log_coefficient,
            d_features,
            d_weight,
            d_bias,
            d_logits,
        )
    return in_dtypes_of(head, gradients)


def head_reduction(logs: Tensor, how: Reduction, with_coefficient: bool) -> tuple[Tensor, Tensor | None]:
    """Run the kernel; results as of ``reduction.reduce`` and ``reduce_with_log_coefficient``."""
    N = logs.shape[0]
    value = logs.new_empty((N,) if how.reduction == "none" else (), dtype=how.dtype)
    coefficient = logs.new_empty((N,)) if with_coefficient else None
    s = how.row_weights()
    s = None if s is None else readable(s).contiguous()
    labels = None if how.target is None or s is not None else readable(how.target).contiguous()
    _core.head_reduction(
        backend.cpu_target or "", logs.data_ptr(), address(s), address(labels), N, how.ignore_index,
        REDUCTIONS[how.reduction], how.log, how.count_rows, value.data_ptr(), how.dtype is torch.float64,
        address(coefficient),
    )  # fmt: skip
    return value, coefficient


def bad_label(label: int, row: int, C: int, ignore_index: int) -> ValueError:
    """The error for a label that is no class."""
    return ValueError(
        f"target must hold labels in 0..{C - 1} or ignore_index ({ignore_index}), got {label} in row {row}"
    )


def row_norms(x: Tensor, ord: tuple[float, ...]) -> Tensor:
    """Run the kernel; arguments and results as in ``reference.row_norms``."""
    x = readable(x)
    N, K = x.shape
    norms = {p: x.new_empty((N,), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32) for p in set(ord)}
    at: dict[float, int] = {p: norm.data_ptr() for p, norm in norms.items()}
    if N:
        workspace = torch.empty(_core.row_norms_workspace(N, K), dtype=torch.float64)
        _core.row_norms(
            backend.cpu_target or "", matrix(x), N, K, threads(), at.get(1, 0), at.get(2, 0),
            at.get(math.inf, 0), workspace.data_ptr(),
        )  # fmt: skip
    return torch.stack([norms[p] for p in ord])


def unmasked_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, with_cotangent: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel; arguments and results as in ``reference.unmasked_cross_entropy``."""
    logits, target = readable(logits), readable(target).contiguous()
    N, C = logits.shape
    if C > 1 and logits.stride(1) != 1:
        # the library's copy goes tile by tile; a kernel that walked down such a row would fetch a cache line per logit
        logits = logits.contiguous()
    result = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, log_scale = (logits.new_empty((N,), dtype=result) for _ in range(2))
    cotangent = logits.new_empty((N if with_cotangent else 0, C))
    if N:
        bad_row = _core.unmasked_cross_entropy(
            backend.cpu_target or "", matrix(logits), target.data_ptr(), N, C, ignore_index, threads(),
            loss.data_ptr(), log_scale.data_ptr(), cotangent.data_ptr() if with_cotangent else 0,
        )  # fmt: skip
        if bad_row >= 0:
            raise bad_label(int(target[bad_row]), bad_row, C, ignore_index)
    return loss, log_scale, cotangent
