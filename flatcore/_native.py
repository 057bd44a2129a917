"""The compiled kernels: tensors become addresses, sizes and strides; the path is chosen here, from shapes."""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _backend, _chunked
from ._backend import _core
from ._chunked import address
from ._reduction import Measure
from .reference import FIELDS

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


_Function = TypeVar("_Function", bound=Callable[..., Any])
_forked = False
_alone = threading.local()


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def alone_after_fork(function: _Function) -> _Function:
    """One thread for torch's own operators in a forked child: a second waits for ever for the parent's team.

    The kernels know by themselves; they keep the number of their shares, and with it every bit of their results.
    """

    @functools.wraps(function)
    def run(*arguments, **options):
        if not _forked or getattr(_alone, "threads", None) is not None:
            return function(*arguments, **options)
        _alone.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*arguments, **options)
        finally:
            torch.set_num_threads(_alone.threads)
            _alone.threads = None

    return run  # type: ignore[return-value]


def _threads() -> int:
    """Number of shares that a kernel divides its rows into."""
    return getattr(_alone, "threads", None) or torch.get_num_threads() if _forked else torch.get_num_threads()


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
    N = features.shape[0]
    double = is_double(features, linear_weight, logits)
    values = features.new_empty(
        (fields.bit_count(), N), dtype=torch.float64 if double or wide_result else torch.float32
    )
    prediction = features.new_empty((N,), dtype=torch.int64)
    call = _Call(
        features, linear_weight, linear_bias, logits, target, temperature, ignore_index, include_bias, norm_power,
        fields, double, values, prediction,
    )  # fmt: skip
    if N:
        call.run()
    return values, prediction


class _Call:
    """A head as the kernels take it, with the tensors whose memory it names."""

    def __init__(
        self,
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
        double: bool,
        values: Tensor | None = None,
        prediction: Tensor | None = None,
    ):
        global last_path
        self.features, self.weight = readable(features), readable(linear_weight)
        self.logits = None if logits is None else readable(logits)
        self.bias = None if linear_bias is None else as_dtype(readable(linear_bias), torch.float64).contiguous()
        self.target = None if target is None else readable(target).contiguous()
        self.values, self.prediction = values, prediction
        (self.N, self.D), self.C = features.shape, linear_weight.shape[0]
        self.ignore_index, self.fields, self.double = ignore_index, fields, double
        self.cpu_target, self.threads = _backend.cpu_target or "", _threads()
        last_path = self.path = choose_path(self.C, self.D, double)
        self.problem = _core.HeadProblem(
            matrix(self.features), matrix(self.weight), matrix(self.logits), address(self.bias),
            address(self.target), self.N, self.D, self.C, temperature, ignore_index, include_bias, norm_power, fields,
            double, self.threads, address(values), values is None or values.dtype is torch.float64,
            address(prediction),
        )  # fmt: skip
        if _log.isEnabledFor(logging.DEBUG):
            names = ", ".join(name for bit, name in enumerate(FIELDS) if fields >> bit & 1)
            _log.debug(
                "head of N=%d D=%d C=%d (%s): %s, %s",
                self.N, self.D, self.C, names, self.path, _core.cpu_target(self.cpu_target),
            )  # fmt: skip

    def run(self) -> None:
        """Fill values and prediction."""
        if self.path == "fused":
            workspace = torch.empty(_core.head_metrics_workspace(self.problem), dtype=torch.uint8)
            bad_row = _core.head_metrics(self.cpu_target, self.problem, workspace.data_ptr())
        else:
            bad_row = _chunked.head_metrics(
                self.cpu_target, self.problem, self.features, self.weight, self.logits, self.fields, self.double,
                self.threads,
            )  # fmt: skip
        self.check_label(bad_row)

    def check_label(self, row: int) -> None:
        """Refuse the label of a row, if a kernel has found one that is no class."""
        if row >= 0:  # only a kernel that was given labels finds one
            raise bad_label(int(self.target[row]), row, self.C, self.ignore_index)  # type: ignore[index]


def is_double(*tensors: Tensor | None) -> bool:
    """Whether any of the tensors asks for float64 arithmetic."""
    return any(x is not None and x.dtype is torch.float64 for x in tensors)


def head_measure(
    features: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    logits: Tensor | None,
    target: Tensor | None,
    s: Tensor | None,
    count_rows: bool,
    measure: Measure,
    with_coefficient: bool,
) -> tuple[Tensor, Tensor | None]:
    """One field, reduced: the value and, if wanted, the log of its derivative by each row's log.

    Arguments as in ``_reduction``; one call of the extension where the head is small, for it takes no longer than 10 us.
    """
    N = features.shape[0]
    double = is_double(features, linear_weight, logits)
    wide = measure.dtype is torch.float64
    if choose_path(linear_weight.shape[0], features.shape[1], double) != "fused":
        values, _ = head_metrics(*measure.logs(features, linear_weight, linear_bias, logits, target))
        return head_reduction(values[0], s, target, count_rows, *measure.reduced, with_coefficient)
    call = _Call(
        features, linear_weight, linear_bias, logits, target, measure.temperature, measure.ignore_index,
        measure.include_bias, measure.norm_power, 1 << measure.field, double,
    )  # fmt: skip
    value = torch.empty(
        (N,) if measure.reduction == "none" else (), dtype=torch.float64 if wide else torch.float32, device="cpu"
    )
    coefficient = torch.empty(N, dtype=torch.float64, device="cpu") if with_coefficient else None
    workspace = torch.empty(_core.head_measure_workspace(call.problem), dtype=torch.uint8, device="cpu")
    weight = None if s is None else readable(s).contiguous()
    call.check_label(
        _core.head_measure(
            call.cpu_target, call.problem, workspace.data_ptr(), address(weight), _REDUCTIONS[measure.reduction],
            measure.log, count_rows, value.data_ptr(), wide, address(coefficient),
        )
    )  # fmt: skip
    return value, coefficient


def head_metrics_backward(
    upstream: Tensor,
    log_coefficient: Tensor | None,
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

    A row's derivative with respect to its log is ``upstream`` (float64, (N,) or one number) times
    exp(``log_coefficient``) (float64, (N,), or None for 0); otherwise as ``reference.head_metrics_backward``.
    """
    (N, D), C = features.shape, linear_weight.shape[0]
    double = is_double(features, linear_weight, logits)
    dtype = torch.float64 if double else torch.float32
    upstream = as_dtype(readable(upstream), torch.float64).contiguous()
    if log_coefficient is not None:
        log_coefficient = readable(log_coefficient).contiguous()
    call = _Call(
        features, linear_weight, linear_bias, logits, target, temperature, ignore_index, include_bias, norm_power,
        1 << field, double,
    )  # fmt: skip
    d_features = torch.empty(N, D, dtype=dtype, device="cpu") if wanted[0] else None
    d_weight = torch.empty(C, D, dtype=dtype, device="cpu") if wanted[1] else None
    d_bias = torch.empty(C, dtype=torch.float64, device="cpu") if wanted[2] else None
    d_logits = torch.empty(N, C, dtype=dtype, device="cpu") if wanted[3] else None
    if call.path == "fused":
        workspace = torch.empty(_core.head_metrics_backward_workspace(call.problem), dtype=torch.uint8, device="cpu")
        _core.head_metrics_backward(
            call.cpu_target, call.problem, upstream.data_ptr(), upstream.dim(), address(log_coefficient),
            address(d_features), address(d_weight), address(d_bias), address(d_logits), workspace.data_ptr(),
        )  # fmt: skip
    else:
        _chunked.head_metrics_backward(
            call.cpu_target, call.problem, upstream.expand(N).contiguous(), log_coefficient, call.features, call.weight,
            call.bias if include_bias else None, call.logits, norm_power, field, double, call.threads, d_features,
            d_weight, d_bias, d_logits,
        )  # fmt: skip
    return in_dtypes_of((features, linear_weight, linear_bias, logits), (d_features, d_weight, d_bias, d_logits))


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in another type; a conversion that has nothing to do takes 1 us nevertheless."""
    return x if x.dtype is dtype else x.to(dtype)


def in_dtypes_of(inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]) -> Any:
    """The gradients in their inputs' dtypes; one is wanted only of an input that is there."""
    return tuple(
        None if x is None or gradient is None else as_dtype(gradient, x.dtype)
        for x, gradient in zip(inputs, gradients, strict=True)
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
    """Run the kernel; arguments and results as in ``_reduction.reduce`` and ``reduce_with_log_coefficient``."""
    N = logs.shape[0]
    value = logs.new_empty((N,) if reduction == "none" else (), dtype=dtype)
    coefficient = logs.new_empty((N,)) if with_coefficient else None
    weight = None if s is None else readable(s).contiguous()
    labels = None if target is None or s is not None else readable(target).contiguous()
    _core.head_reduction(
        _backend.cpu_target or "", logs.data_ptr(), address(weight), address(labels), N, ignore_index,
        _REDUCTIONS[reduction], log, count_rows, value.data_ptr(), dtype == torch.float64, address(coefficient),
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
            _backend.cpu_target or "", matrix(x), N, K, _threads(), at.get(1, 0), at.get(2, 0),
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
            _backend.cpu_target or "", matrix(logits), target.data_ptr(), N, C, ignore_index, _threads(),
            loss.data_ptr(), log_scale.data_ptr(), cotangent.data_ptr() if with_cotangent else 0,
        )  # fmt: skip
        if bad_row >= 0:
            raise bad_label(int(target[bad_row]), bad_row, C, ignore_index)
    return loss, log_scale, cotangent


def readable(x: Tensor) -> Tensor:
    """A tensor whose memory holds its values as they are: no lazy negation, no subclass's view of them."""
    return x if type(x) is Tensor and not (x.requires_grad or x.is_neg()) else x.detach().resolve_neg()
