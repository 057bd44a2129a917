"""The compiled kernels: tensors become addresses, sizes and strides; the path is chosen here, from shapes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import _backend, _chunked
from ._backend import _core

FUSED_CLASSES = 256
FUSED_WEIGHT_BYTES = 1 << 20
"""A head of at most this many classes whose weight (in the compute type) fits this many bytes, one core's second-level
cache, takes the fused kernel; any other is chunked around the library's products."""
WORKSPACE_BYTES = _chunked.WORKSPACE_BYTES

forced_path: str | None = None
last_path: str | None = None
_log = logging.getLogger("flatcore")
_DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_FUSED_CLASSES_AT_MOST = 4096  # forced: the table of distances takes 8 C^2 bytes


@contextmanager
def forced(path: str | None = None, cpu: str | None = None) -> Iterator[None]:
    """Force the path ("fused" or "chunked") and the CPU target, for tests and measurements."""
    global forced_path
    if path not in (None, "fused", "chunked"):
        raise ValueError(f"path must be 'fused', 'chunked' or None, got {path!r}")
    previous = forced_path, _backend.cpu_target
    forced_path, _backend.cpu_target = path, _backend._check_cpu(cpu) or _backend.cpu_target
    try:
        yield
    finally:
        forced_path, _backend.cpu_target = previous


def choose_path(C: int, D: int, double: bool) -> str:
    """Choose "fused" or "chunked": the one place that decides."""
    if forced_path == "fused" and C > _FUSED_CLASSES_AT_MOST:
        raise ValueError(f"the fused path takes at most {_FUSED_CLASSES_AT_MOST} classes, got {C}")
    if forced_path is not None:
        return forced_path
    fits = C <= FUSED_CLASSES and C * D * (8 if double else 4) <= FUSED_WEIGHT_BYTES
    return "fused" if fits else "chunked"


def matrix(x: Tensor | None) -> tuple[int, int, int, int] | None:
    """Address, strides in elements and dtype code of a 2-D tensor."""
    if x is None:
        return None
    return x.data_ptr(), x.stride(0), x.stride(1), _DTYPE_CODE[x.dtype]


def head_metrics(
    features: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    logits: Tensor | None,
    target: Tensor | None,
    temperature: float,
    ignore_index: int,
    include_bias: bool,
    norm_power: int,
    fields: int,
    wide_result: bool,
) -> tuple[Tensor, Tensor]:
    """Run the kernels of this stem; arguments and results as in ``reference.head_metrics``."""
    global last_path
    features, linear_weight = _readable(features), _readable(linear_weight)
    logits = None if logits is None else _readable(logits)
    (N, D), C = features.shape, linear_weight.shape[0]
    double = any(x is not None and x.dtype == torch.float64 for x in (features, linear_weight, logits))
    bias = None if linear_bias is None else _readable(linear_bias).to(torch.float64).contiguous()
    target = None if target is None else _readable(target).contiguous()
    values = features.new_empty(
        (fields.bit_count(), N), dtype=torch.float64 if double or wide_result else torch.float32
    )
    prediction = features.new_empty((N,), dtype=torch.int64)
    path = choose_path(C, D, double)
    if N == 0:
        last_path = path
        return values, prediction

    target_name, threads = _backend.cpu_target or "", torch.get_num_threads()
    problem = _core.HeadProblem(
        matrix(features), matrix(linear_weight), matrix(logits), 0 if bias is None else bias.data_ptr(),
        0 if target is None else target.data_ptr(), N, D, C, temperature, ignore_index, include_bias, norm_power, fields,
        double, threads, values.data_ptr(), values.dtype == torch.float64, prediction.data_ptr(),
    )  # fmt: skip
    if path == "fused":
        workspace = torch.empty(problem.workspace(), dtype=torch.uint8)
        bad_row = _core.head_metrics(target_name, problem, workspace.data_ptr())
    else:
        bad_row = _chunked.head_metrics(target_name, problem, features, linear_weight, logits, fields, double, threads)
    if bad_row >= 0:
        raise bad_label(int(target[bad_row]), bad_row, C, ignore_index)  # type: ignore[index]
    last_path = path
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("head_metrics N=%d D=%d C=%d: %s, %s", N, D, C, path, _core.cpu_target(target_name))
    return values, prediction


def head_metrics_backward(
    upstream: Tensor,
    coefficient: Tensor | None,
    features: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    logits: Tensor | None,
    target: Tensor | None,
    temperature: float,
    ignore_index: int,
    include_bias: bool,
    norm_power: int,
    field: int,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Run the kernels of this stem: the wanted gradients of features, weight, bias and logits, None for the others.

    A row's derivative with respect to its log is ``upstream`` (float64, (N,) or one number) times ``coefficient``
    (float64, (N,), or None for 1); otherwise as ``reference.head_metrics_backward``.
    """
    global last_path
    phi, w = _readable(features), _readable(linear_weight)
    z = None if logits is None else _readable(logits)
    (N, D), C = phi.shape, w.shape[0]
    double = any(x is not None and x.dtype == torch.float64 for x in (phi, w, z))
    dtype = torch.float64 if double else torch.float32
    bias = None if linear_bias is None else _readable(linear_bias).to(torch.float64).contiguous()
    target = None if target is None else _readable(target).contiguous()
    upstream = _readable(upstream).to(torch.float64).contiguous()
    d_features = phi.new_empty((N, D), dtype=dtype) if wanted[0] else None
    d_weight = w.new_empty((C, D), dtype=dtype) if wanted[1] else None
    d_bias = w.new_empty((C,), dtype=torch.float64) if wanted[2] else None
    d_logits = phi.new_empty((N, C), dtype=dtype) if wanted[3] else None
    target_name, threads, path = _backend.cpu_target or "", torch.get_num_threads(), choose_path(C, D, double)
    problem = _core.HeadProblem(
        matrix(phi), matrix(w), matrix(z), 0 if bias is None else bias.data_ptr(),
        0 if target is None else target.data_ptr(), N, D, C, temperature, ignore_index, include_bias, norm_power,
        1 << field, double, threads, 0, False, 0,
    )  # fmt: skip
    if path == "fused":
        workspace = torch.empty(_core.head_metrics_backward_workspace(problem), dtype=torch.uint8)
        _core.head_metrics_backward(
            target_name, problem, upstream.data_ptr(), upstream.dim(), _address(coefficient), _address(d_features),
            _address(d_weight), _address(d_bias), _address(d_logits), workspace.data_ptr(),
        )  # fmt: skip
    else:
        c = upstream.expand(N)
        if coefficient is not None:
            c = torch.where(c == 0, 0, c * coefficient)
        _chunked.head_metrics_backward(
            target_name, problem, c.contiguous(), phi, w, bias if include_bias else None, z, norm_power, field,
            double, threads,
            d_features, d_weight, d_bias, d_logits,
        )  # fmt: skip
    last_path = path
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("head_metrics_backward N=%d D=%d C=%d: %s, %s", N, D, C, path, _core.cpu_target(target_name))
    return (
        None if d_features is None else d_features.to(features.dtype),
        None if d_weight is None else d_weight.to(linear_weight.dtype),
        None if d_bias is None else d_bias.to(linear_bias.dtype),  # type: ignore[union-attr]
        None if d_logits is None else d_logits.to(logits.dtype),  # type: ignore[union-attr]
    )


_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}


def head_reduction(
    logs: Tensor,
    s: Tensor | None,
    target: Tensor | None,
    count_rows: bool,
    ignore_index: int,
    reduction: str,
    log: bool,
    dtype: torch.dtype,
    with_coefficient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel; arguments and results as in ``_reduction.reduce`` and ``reduce_with_coefficient``."""
    N = logs.shape[0]
    value = logs.new_empty((N,) if reduction == "none" else (), dtype=dtype)
    coefficient = logs.new_empty((N,)) if with_coefficient else None
    weight = None if s is None else _readable(s).contiguous()
    labels = None if target is None or s is not None else _readable(target).contiguous()
    _core.head_reduction(
        _backend.cpu_target or "", logs.data_ptr(), _address(weight), _address(labels), N, ignore_index,
        _REDUCTIONS[reduction], log, count_rows, value.data_ptr(), dtype == torch.float64, _address(coefficient),
    )  # fmt: skip
    return value, coefficient


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def bad_label(label: int, row: int, C: int, ignore_index: int) -> ValueError:
    """The error for a label that is no class."""
    return ValueError(
        f"target must hold labels in 0..{C - 1} or ignore_index ({ignore_index}), got {label} in row {row}"
    )


def row_norms(x: Tensor, ord: tuple[float, ...]) -> Tensor:
    """Run the kernel; arguments and results as in ``reference.row_norms``."""
    x = _readable(x)
    N, K = x.shape
    norms = {p: x.new_empty((N,), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32) for p in set(ord)}
    if N:
        workspace = torch.empty(_core.row_norms_workspace(N, K), dtype=torch.float64)
        address: dict[float, int] = {p: norm.data_ptr() for p, norm in norms.items()}
        _core.row_norms(
            _backend.cpu_target or "", matrix(x), N, K, torch.get_num_threads(), address.get(1, 0), address.get(2, 0),
            address.get(math.inf, 0), workspace.data_ptr(),
        )  # fmt: skip
    return torch.stack([norms[p] for p in ord])


def unmasked_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, with_cotangent: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel; arguments and results as in ``reference.unmasked_cross_entropy``."""
    logits, target = _readable(logits), _readable(target).contiguous()
    N, C = logits.shape
    if C > 1 and logits.stride(1) != 1:
        # the library's copy goes tile by tile; a kernel that walked down such a row would fetch a cache line per logit
        logits = logits.contiguous()
    result = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, log_scale = (logits.new_empty((N,), dtype=result) for _ in range(2))
    cotangent = logits.new_empty((N if with_cotangent else 0, C))
    if N:
        bad_row = _core.unmasked_cross_entropy(
            _backend.cpu_target or "", matrix(logits), target.data_ptr(), N, C, ignore_index, torch.get_num_threads(),
            loss.data_ptr(), log_scale.data_ptr(), cotangent.data_ptr() if with_cotangent else 0,
        )  # fmt: skip
        if bad_row >= 0:
            raise bad_label(int(target[bad_row]), bad_row, C, ignore_index)
    return loss, log_scale, cotangent


def _readable(x: Tensor) -> Tensor:
    """A tensor whose memory holds its values as they are: no lazy negation, no subclass's view of them."""
    return x.detach().resolve_neg()
