"""The compiled kernels on a CUDA device, on the caller's current stream: nothing here waits for the device.

The functions are those of ``_native``, with the same arguments and results. A row whose label is no class is NaN.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from . import _chunked_cuda, _native
from ._backend import _core
from ._chunked import GRADIENT, NEURONWISE, address
from ._head_cuda import Head
from ._native import as_dtype, in_dtypes_of, is_double, matrix, readable
from ._reduction import Measure, reduce, reduce_with_log_coefficient
from .reference import FIELDS

_log = logging.getLogger("flatcore")


def stream(x: Tensor) -> tuple[int, int]:
    """Index of the tensor's device, and the address of the caller's current stream there."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def choose_path(C: int) -> str:
    """Choose "fused" or "chunked": the one place that decides."""
    limit: int = _core.CUDA_FUSED_CLASSES
    if _native.forced_path == "fused" and limit < C:
        raise ValueError(f"the fused path takes at most {limit} classes on a CUDA device, got {C}")
    return _native.forced_path or ("fused" if limit >= C else "chunked")


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
    """Run the kernels of this stem."""
    N = features.shape[0]
    wide = wide_result or is_double(features, linear_weight, logits)
    values = features.new_empty((fields.bit_count(), N), dtype=torch.float64 if wide else torch.float32)
    prediction = features.new_empty((N,), dtype=torch.int64)
    head = Head(
        _core, features, linear_weight, linear_bias, logits, target, temperature, ignore_index, include_bias, norm_power,
        fields, values, prediction,
    )  # fmt: skip
    _native.last_path = path = choose_path(head.C)
    if _log.isEnabledFor(logging.DEBUG):
        names = ", ".join(name for bit, name in enumerate(FIELDS) if fields >> bit & 1)
        _log.debug("head of N=%d D=%d C=%d (%s): %s, %s", N, head.D, head.C, names, path, features.device)
    if N and path == "fused":
        _fused(head)
    elif N:
        _chunked_cuda.head_metrics(_core, stream(head.features), head)
    return values, prediction


def _fused(head: Head) -> None:
    where, problem, C = stream(head.features), head.problem, head.C
    packed_rows, stride = _core.cuda_head_packing(problem)
    packed = head.empty(packed_rows, stride, dtype=head.dtype)
    summary, workspace = head.empty(2), head.empty(_core.cuda_head_weights_workspace(head.D, C))
    weights = bool(head.fields & (NEURONWISE | GRADIENT))
    distances = head.empty(C, C) if weights else None
    bias_distances = head.empty(C, C) if weights and head.include_bias else None
    special = head.empty(head.N, dtype=torch.uint8) if weights else None
    _core.cuda_head_weights(
        *where, problem, workspace.data_ptr(), summary.data_ptr(), 0, 0, packed.data_ptr(), packed_rows, stride,
        address(distances), address(bias_distances),
    )  # fmt: skip
    _core.cuda_head_metrics(
        *where, problem, packed.data_ptr(), stride, summary.data_ptr(), address(distances), address(bias_distances),
        address(special),
    )  # fmt: skip
    if special is not None:
        slots = head.explicit_slots()
        scratch = head.empty(slots, 2 * C)
        _core.cuda_head_explicit(
            *where, problem, 0, head.N, special.data_ptr(), summary.data_ptr(), scratch.data_ptr(), slots
        )


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
    """One field, reduced: the value and, if wanted, the log of its derivative by each row's log."""
    values, _ = head_metrics(*measure.logs(features, linear_weight, linear_bias, logits, target))
    options = (values[0], s, target, count_rows, *measure.reduced)
    return reduce_with_log_coefficient(*options) if with_coefficient else (reduce(*options), None)


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
    """Run the kernels of this stem: the wanted gradients of features, weight, bias and logits, None for the others."""
    head = Head(
        _core, features, linear_weight, linear_bias, logits, target, temperature, ignore_index, include_bias, norm_power,
        1 << field,
    )  # fmt: skip
    N, D, C = head.N, head.D, head.C
    upstream = as_dtype(readable(upstream), torch.float64).expand(N).contiguous()
    if log_coefficient is not None:
        log_coefficient = readable(log_coefficient).contiguous()
    d_features = head.empty(N, D, dtype=head.dtype) if wanted[0] else None
    d_weight = head.empty(C, D, dtype=head.dtype).zero_() if wanted[1] else None
    d_bias = head.empty(C).zero_() if wanted[2] else None
    d_logits = head.empty(N, C, dtype=head.dtype) if wanted[3] else None
    _native.last_path = "chunked"
    _chunked_cuda.head_metrics_backward(
        _core, stream(head.features), head, upstream, log_coefficient, norm_power, field, d_features, d_weight, d_bias,
        d_logits,
    )  # fmt: skip
    return in_dtypes_of((features, linear_weight, linear_bias, logits), (d_features, d_weight, d_bias, d_logits))


def row_norms(x: Tensor, ord: tuple[float, ...]) -> Tensor:
    """Run the kernel of this stem."""
    x = readable(x)
    N, K = x.shape
    norms = {p: x.new_empty((N,), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32) for p in set(ord)}
    if N:
        at: dict[float, int] = {p: norm.data_ptr() for p, norm in norms.items()}
        workspace = x.new_empty(_core.cuda_row_norms_workspace(N, K), dtype=torch.float64)
        _core.cuda_row_norms(
            *stream(x), matrix(x), N, K, at.get(1, 0), at.get(2, 0), at.get(math.inf, 0), workspace.data_ptr()
        )
    return torch.stack([norms[p] for p in ord])


def unmasked_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, with_cotangent: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel of this stem."""
    logits, target = readable(logits), readable(target).contiguous()
    N, C = logits.shape
    if C > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()  # a kernel that walked down such a row would fetch a cache line per logit
    result = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, log_scale = (logits.new_empty((N,), dtype=result) for _ in range(2))
    cotangent = logits.new_empty((N if with_cotangent else 0, C))
    if N:
        _core.cuda_unmasked_cross_entropy(
            *stream(logits), matrix(logits), target.data_ptr(), N, C, ignore_index, loss.data_ptr(),
            log_scale.data_ptr(), cotangent.data_ptr() if with_cotangent else 0,
        )  # fmt: skip
    return loss, log_scale, cotangent
