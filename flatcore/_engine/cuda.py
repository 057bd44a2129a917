"""The compiled kernels of a CUDA device, on the caller's current stream: nothing here waits for the device.

The functions are those of ``cpu``, with the same arguments and results. Where the label is used, a row whose
label is no class is NaN (``reduction.sample_weights`` sees to the measures that do not look at it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import chunked_cuda, chunked_cuda_backward, device, paths, proof
from .chunked_cpu import GRADIENT, NEURONWISE
from .extensions import cuda_module
from .head import Head
from .memory import HeadCall, address, as_dtype, in_dtypes_of, matrix, one_row, readable
from .reduction import REDUCTIONS, Reduction, reduce, reduce_with_log_coefficient


def stream(x: Tensor) -> tuple[int, int]:
    """Index of the tensor's device, and the address of the caller's current stream there."""
    index = x.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)  # torch.cuda.current_stream makes an object of it first


_loaded: set[int] = set()


def load(index: int) -> None:
    """Load every kernel on a device that the process works on, once: CUDA would load each at its own first launch.

    Within a graph's capture that would take its time, and memory, between kernels that are being recorded.
    """
    if index not in _loaded and cuda_module().cuda_load(index):
        _loaded.add(index)


def path_of(stem: str, C: int, usable: frozenset[str]) -> str | None:
    """The path that this stem's kernels take for a head of C classes, None where no usable one can."""
    if stem in ("head_metrics", "head_metrics_backward"):
        return paths.on_cuda(C, cuda_module().CUDA_FUSED_CLASSES, usable)
    return next(iter(usable), None)


def head_metrics(head: Head, fields: int, wide_result: bool) -> tuple[Tensor, Tensor]:
    """Run the kernels of this stem."""
    return _run(HeadCall(cuda_module(), head, fields, 1), wide_result)


def _run(call: HeadCall, wide_result: bool) -> tuple[Tensor, Tensor]:
    core = cuda_module()
    values, prediction = call.outputs(wide_result)
    known = proof.among(device.place(call.head.features)[1], "head_metrics")
    # None: a verdict came between the choice of these kernels and this line
    path = path_of("head_metrics", call.C, known) or path_of("head_metrics", call.C, proof.paths_of("head_metrics"))
    assert path is not None
    paths.took(path, call, call.head.features.device)
    if call.N and path == "fused":
        _fused(call)
    elif call.N:
        chunked_cuda.head_metrics(core, stream(call.head.features), call)
    return values, prediction


def _fused(call: HeadCall) -> None:
    core, where, problem, C = cuda_module(), stream(call.head.features), call.problem, call.C
    packed_rows, stride = core.cuda_head_packing(problem)
    packed = call.empty(packed_rows, stride, dtype=call.dtype)
    summary, workspace = call.empty(2), call.empty(core.cuda_head_weights_workspace(call.D, C))
    weights = bool(call.fields & (NEURONWISE | GRADIENT))
    distances = call.empty(C, C) if weights else None
    bias_distances = call.empty(C, C) if weights and call.head.include_bias else None
    special = call.empty(call.N, dtype=torch.uint8) if weights else None
    core.cuda_head_weights(
        *where, problem, workspace.data_ptr(), summary.data_ptr(), 0, 0, packed.data_ptr(), packed_rows, stride,
        address(distances), address(bias_distances),
    )  # fmt: skip
    core.cuda_head_metrics(
        *where, problem, packed.data_ptr(), stride, summary.data_ptr(), address(distances), address(bias_distances),
        address(special),
    )  # fmt: skip
    if special is not None:
        slots = chunked_cuda.explicit_slots(core, call)
        scratch = call.empty(slots, core.cuda_head_explicit_slot(call.D))
        core.cuda_head_explicit(
            *where, problem, 0, call.N, special.data_ptr(), summary.data_ptr(), scratch.data_ptr(), slots
        )


def head_measure(
    head: Head, field: int, how: Reduction, with_coefficient: bool
) -> tuple[Tensor, Tensor | None, object | None]:
    """One field, reduced: the value, if wanted the log of its derivative by each row's log, and a gradient's start."""
    call = HeadCall(cuda_module(), head, 1 << field, 1)
    call.keeps = with_coefficient
    if _measure_path(call, "head_metrics", "head_metrics_backward") == "fused":
        return *_fused_measure(call, how, with_coefficient), None
    values, _ = _run(call, True)
    if with_coefficient:
        return *reduce_with_log_coefficient(values[0], how), call.prepared
    return reduce(values[0], how), None, None


def _measure_path(call: HeadCall, *stems: str) -> str:
    """The path of one measure or its gradient, which has to have passed with each of these stems.

    A check compares the measures' values as head_metrics's, their gradients as head_metrics_backward's.
    """
    index = device.place(call.head.features)[1]
    usable = frozenset.intersection(*(proof.among(index, stem) for stem in stems))
    return paths.of_measure_on_cuda(call, cuda_module().CUDA_FUSED_CLASSES, usable)


def _fused_measure(call: HeadCall, how: Reduction, with_coefficient: bool) -> tuple[Tensor, Tensor | None]:
    paths.took("fused", call, call.head.features.device)
    N = call.N
    value = call.empty(*((N,) if how.reduction == "none" else ()), dtype=how.dtype)
    s = None if how.s is None else readable(how.s).contiguous()
    class_weight = None if how.class_weight is None else readable(how.class_weight)
    workspace = call.empty(N + call.C)  # the rows' logs, which become their coefficients, and W's
    at = workspace.data_ptr()
    cuda_module().cuda_head_measure(
        *stream(call.head.features), call.problem, address(s),
        None if class_weight is None else one_row(class_weight), REDUCTIONS[how.reduction], how.log, how.count_rows,
        value.data_ptr(), how.dtype is torch.float64, at, at + 8 * N,
    )  # fmt: skip
    return value, workspace[:N] if with_coefficient else None


def head_metrics_backward(
    upstream: Tensor,
    log_coefficient: Tensor | None,
    head: Head,
    field: int,
    wanted: Sequence[bool],
    prepared: object | None = None,
) -> tuple[Tensor | None, ...]:
    """Run the kernels of this stem."""
    call = HeadCall(cuda_module(), head, 1 << field, 1)
    call.prepared = prepared
    N, D, C = call.N, call.D, call.C
    upstream = readable(upstream)
    if log_coefficient is not None:
        log_coefficient = readable(log_coefficient).contiguous()
    path = _measure_path(call, "head_metrics_backward")
    paths.took(path, call, head.features.device)
    if path == "fused":
        return _fused_backward(call, upstream, log_coefficient, head, wanted)
    upstream = as_dtype(upstream, torch.float64).expand(N).contiguous()
    of_features, of_weight, of_bias, of_logits = wanted
    d_features = call.empty(N, D, dtype=call.dtype) if of_features else None
    d_weight = call.empty(C, D, dtype=call.dtype).zero_() if of_weight else None
    d_bias = call.empty(C).zero_() if of_bias else None
    d_logits = call.empty(N, C, dtype=call.dtype) if of_logits else None
    chunked_cuda_backward.head_metrics_backward(
        cuda_module(),
        stream(call.head.features),
        call,
        upstream,
        log_coefficient,
        d_features,
        d_weight,
        d_bias,
        d_logits,
    )
    return in_dtypes_of(head, (d_features, d_weight, d_bias, d_logits))


def _fused_backward(
    call: HeadCall, upstream: Tensor, log_coefficient: Tensor | None, head: Head, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    core = cuda_module()
    gradients = tuple(
        call.empty(*x.shape, dtype=x.dtype) if want and x is not None else None
        for x, want in zip(head.inputs, wanted, strict=True)
    )
    workspace = call.empty(core.cuda_head_measure_backward_workspace(call.problem))
    core.cuda_head_measure_backward(
        *stream(call.head.features), call.problem, one_row(upstream.expand(call.N)), address(log_coefficient),
        workspace.data_ptr(), *(x if x is None else matrix(x) if x.dim() == 2 else one_row(x) for x in gradients),
    )  # fmt: skip
    return gradients


def row_norms(x: Tensor, ord: tuple[float, ...]) -> Tensor:
    """Run the kernel of this stem."""
    x = readable(x)
    (N, K), core = x.shape, cuda_module()
    orders = tuple(dict.fromkeys(ord))
    norms = x.new_empty((len(orders), N), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if N:
        at = {p: norms.data_ptr() + i * N * norms.element_size() for i, p in enumerate(orders)}
        workspace = x.new_empty(core.cuda_row_norms_workspace(N, K), dtype=torch.float64)
        core.cuda_row_norms(
            *stream(x), matrix(x), N, K, at.get(1, 0), at.get(2, 0), at.get(math.inf, 0), workspace.data_ptr()
        )
    return norms if orders == ord else torch.stack([norms[orders.index(p)] for p in ord])


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
        cuda_module().cuda_unmasked_cross_entropy(
            *stream(logits), matrix(logits), target.data_ptr(), N, C, ignore_index, loss.data_ptr(),
            log_scale.data_ptr(), cotangent.data_ptr() if with_cotangent else 0,
        )  # fmt: skip
    return loss, log_scale, cotangent
