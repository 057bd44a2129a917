"""The torch.library operators, and the one place that decides between a direct call, an operator and the reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _backend, _native, _native_cuda, reference
from ._reduction import Measure, reduce, reduce_with_log_coefficient, sample_weights
from ._validate import check_device, check_matrix, is_exact, is_wrapped, storage_covers
from .reference import DIFFERENTIABLE, FIELDS

_HEAD_METRICS = (
    "head_metrics(Tensor features, Tensor linear_weight, Tensor? linear_bias, Tensor? logits, Tensor? target, "
    "float temperature, int ignore_index, bool include_bias, int norm_power, int fields, bool wide_result) "
    "-> (Tensor, Tensor)"
)
_HEAD_BACKWARD = (
    "head_metrics_backward(Tensor upstream, Tensor? log_coefficient, Tensor features, Tensor linear_weight, "
    "Tensor? linear_bias, Tensor? logits, Tensor? target, float temperature, int ignore_index, bool include_bias, "
    "int norm_power, int field, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LABELLED = tuple(name for name in DIFFERENTIABLE if "gradient" in name)
_ROW_NORMS = "row_norms(Tensor x, float[] ord) -> Tensor"
_UNMASKED = "unmasked_cross_entropy(Tensor logits, Tensor target, int ignore_index) -> (Tensor, Tensor, Tensor)"
_UNMASKED_BACKWARD = "unmasked_cross_entropy_backward(Tensor upstream, Tensor cotangent, Tensor logits) -> Tensor"


KERNELS: dict[str, Any] = {"cpu": _native, "cuda": _native_cuda}
"""The compiled kernels, by type of device."""


def _kernels(x: Tensor, stem: str) -> Any:
    """What computes this stem for tensors on this device: the compiled kernels, or None for the reference."""
    device = x.device.type
    return KERNELS[device] if _backend.uses_native(device, stem) else None


def _run_head_metrics(features: Tensor, linear_weight: Tensor, *rest) -> tuple[Tensor, Tensor]:
    kernels = _kernels(features, "head_metrics")
    _, _, target, _, ignore_index, *_ = rest
    if target is not None and _checks_labels(target, kernels):
        _check_labels(target, linear_weight.shape[0], ignore_index)
    if kernels is not None:
        return kernels.head_metrics(features, linear_weight, *rest)
    return reference.head_metrics(features, linear_weight, *rest)


def _run_head_metrics_backward(
    upstream: Tensor, log_coefficient: Tensor | None, arguments: tuple[Any, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of features, weight, bias and logits where wanted; a row's is ``upstream * exp(log_coefficient)``."""
    features = arguments[0]
    kernels = _kernels(features, "head_metrics_backward")
    if kernels is not None:
        return kernels.head_metrics_backward(upstream, log_coefficient, *arguments, wanted)
    gradients = reference.head_metrics_backward(upstream.expand(features.shape[0]), log_coefficient, *arguments)
    return tuple(x if want else None for x, want in zip(gradients, wanted, strict=True))


def _checks_labels(target: Tensor, kernels: Any) -> bool:
    """The CPU's kernels find a bad label on their way; on another device a check waits for it."""
    return kernels is not _native if target.device.type == "cpu" else _backend.validate_on_device


def _check_labels(target: Tensor, C: int, ignore_index: int) -> None:
    """Refuse a label that is no class; the kernels find it on their way, the reference gives NaN in its row."""
    bad = ((target < 0) | (target >= C)) & (target != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise _native.bad_label(int(target[row]), row, C, ignore_index)


def _run_row_norms(x: Tensor, ord: tuple[float, ...]) -> Tensor:
    return (_kernels(x, "row_norms") or reference).row_norms(x, tuple(ord))


def _run_unmasked(logits: Tensor, target: Tensor, ignore_index: int, with_cotangent: bool = True):
    kernels = _kernels(logits, "unmasked_cross_entropy")
    if _checks_labels(target, kernels):
        _check_labels(target, logits.shape[1], ignore_index)
    return (kernels or reference).unmasked_cross_entropy(logits, target, ignore_index, with_cotangent)


def _fake_head_metrics(features, linear_weight, linear_bias, logits, target, temperature, ignore_index, include_bias,
                       norm_power, fields, wide_result):  # fmt: skip
    wide = wide_result or any(x is not None and x.dtype == torch.float64 for x in (features, linear_weight, logits))
    n = features.shape[0]
    values = features.new_empty((int(fields).bit_count(), n), dtype=torch.float64 if wide else torch.float32)
    return values, features.new_empty((n,), dtype=torch.int64)


def _fake_head_metrics_backward(upstream, log_coefficient, features, linear_weight, linear_bias, logits, target,
                                temperature, ignore_index, include_bias, norm_power, field, wanted):  # fmt: skip
    return tuple(
        x.new_empty(x.shape if want and x is not None else (0,)) if x is not None else features.new_empty((0,))
        for x, want in zip((features, linear_weight, linear_bias, logits), wanted, strict=True)
    )


def _fake_row_norms(x, ord):
    return x.new_empty((len(ord), x.shape[0]), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _fake_unmasked(logits, target, ignore_index):
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    n = logits.shape[0]
    return logits.new_empty((n,), dtype=wide), logits.new_empty((n,), dtype=wide), logits.new_empty(logits.shape)


def _fake_unmasked_backward(upstream, cotangent, logits):
    return torch.empty_like(cotangent)


def _check_head(features, linear_weight, linear_bias, logits, target, include_bias, norm_power) -> None:
    """Hold arguments that did not pass a public function to the same sizes and types: kernels get addresses."""
    check_matrix(features, "features", (None, None))
    check_matrix(linear_weight, "linear_weight", (None, features.shape[1]))
    (N, _), C = features.shape, linear_weight.shape[0]
    if C == 0:
        raise ValueError("linear_weight must have at least one row (C >= 1), got C = 0")
    if linear_bias is not None:
        check_matrix(linear_bias, "linear_bias", (C,))
    if logits is not None:
        check_matrix(logits, "logits", (N, C))
    if target is not None:
        check_matrix(target, "target", (N,), (torch.int64,))
    for name, x in (
        ("linear_weight", linear_weight),
        ("linear_bias", linear_bias),
        ("logits", logits),
        ("target", target),
    ):
        if x is not None:
            check_device(x, name, features, "features")
    if include_bias and linear_bias is None:
        raise ValueError("include_bias=True needs linear_bias, got linear_bias=None")
    if norm_power not in (1, 2):
        raise ValueError(f"norm_power must be 1 or 2, got {norm_power}")


def _op_head_metrics(features, linear_weight, linear_bias, logits, target, *rest):
    _, _, include_bias, norm_power, fields, _ = rest
    _check_head(features, linear_weight, linear_bias, logits, target, include_bias, norm_power)
    if not 0 <= fields < 1 << len(FIELDS):
        raise ValueError(f"fields must be a mask of {len(FIELDS)} bits, got {fields}")
    return _run_head_metrics(features, linear_weight, linear_bias, logits, target, *rest)


def _op_head_metrics_backward(upstream, log_coefficient, features, linear_weight, linear_bias, logits, target, *rest):
    *options, field, wanted = rest
    _, _, include_bias, norm_power = options
    _check_head(features, linear_weight, linear_bias, logits, target, include_bias, norm_power)
    check_matrix(upstream, "upstream", (features.shape[0],), (torch.float32, torch.float64))
    check_device(upstream, "upstream", features, "features")
    if log_coefficient is not None:
        check_matrix(log_coefficient, "log_coefficient", (features.shape[0],), (torch.float64,))
        check_device(log_coefficient, "log_coefficient", features, "features")
    if not 0 <= field < len(FIELDS) or FIELDS[field] not in DIFFERENTIABLE:
        raise ValueError(f"field must be that of one of {', '.join(DIFFERENTIABLE)}, got {field}")
    if target is None and FIELDS[field] in _LABELLED:
        raise ValueError(f"{FIELDS[field]} needs a target, got target=None")
    inputs = (features, linear_weight, linear_bias, logits)
    if len(wanted) != len(inputs) or any(want and x is None for want, x in zip(wanted, inputs, strict=True)):
        raise ValueError(f"wanted must hold four flags, False where there is no input, got {wanted}")
    if target is not None and (target.device.type == "cpu" or _backend.validate_on_device):
        _check_labels(target, linear_weight.shape[0], options[1])
    arguments = (*inputs, target, *options, field)
    gradients = _run_head_metrics_backward(upstream, log_coefficient, arguments, tuple(wanted))
    return tuple(features.new_empty((0,)) if x is None else x for x in gradients)


def _op_row_norms(x, ord):
    check_matrix(x, "x", (None, None))
    if not ord or any(p not in (1, 2, math.inf) for p in ord):
        raise ValueError(f"ord must be 1, 2, inf or a non-empty tuple of them, got {ord}")
    return _run_row_norms(x, ord)


def _op_unmasked(logits, target, ignore_index):
    check_matrix(logits, "logits", (None, None))
    if logits.shape[1] == 0:
        raise ValueError("logits must have at least one class (C >= 1), got C = 0")
    check_matrix(target, "target", (logits.shape[0],), (torch.int64,))
    check_device(target, "target", logits, "logits")
    return _run_unmasked(logits, target, ignore_index)


def _op_unmasked_backward(upstream, cotangent, logits):
    scale = upstream.unsqueeze(1)
    if cotangent.dtype == upstream.dtype or cotangent.device.type != "cpu":
        return (scale * cotangent).to(cotangent.dtype)
    # float16, bfloat16: the product in float32, in blocks of 1 MiB; whole it is written to memory and read again, which
    # takes 10 times as long
    result, rows = torch.empty_like(cotangent), max(2**18 // cotangent.shape[1], 1)
    for block, a, b in zip(result.split(rows), scale.split(rows), cotangent.split(rows), strict=True):
        block.copy_(a * b)
    return result


def _setup_unmasked(ctx, inputs, output):
    _, log_scale, cotangent = output
    ctx.save_for_backward(cotangent, inputs[0])
    ctx.mark_non_differentiable(log_scale, cotangent)


def _backward_unmasked(ctx, upstream, *_):
    # The logits come along so that a second derivative meets _refuse_second_derivative: from the cotangent alone, which
    # counts as a constant, it would be a number without the term that matters.
    return _unmasked_backward(upstream, *ctx.saved_tensors), None, None


def _setup_head_metrics(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def _backward_head_metrics(ctx, upstream, _):
    *options, fields, _wide = ctx.options
    field = fields.bit_length() - 1
    if fields.bit_count() != 1 or FIELDS[field] not in DIFFERENTIABLE:
        raise RuntimeError(
            "flatcore.head_metrics has no derivative: pass its inputs with .detach(), or take hessian_trace, "
            "relative_flatness or feature_gradient_norms, which have one"
        )
    wanted = list(ctx.needs_input_grad[:4])
    gradients = _head_metrics_backward(upstream[0], None, *ctx.saved_tensors, *options, field, wanted)
    found = (x if want else None for x, want in zip(gradients, wanted, strict=True))
    return (*found, *(None,) * (len(ctx.options) + 1))


def _refuse_second_derivative(ctx, *gradients):
    raise RuntimeError(
        "flatcore.unmasked_cross_entropy cannot be differentiated twice: its backward gives the loss's gradient at "
        "another scale, so a second derivative would not be the loss's; take "
        "torch.nn.functional.cross_entropy for a gradient penalty"
    )


def _refuse_second_derivative_of_a_measure(ctx, *gradients):
    raise RuntimeError(
        "flatcore's measures cannot be differentiated twice: their gradient is a closed form of which no derivative is "
        "known here; write the penalty with the measure itself, not with its gradient, or detach the gradient"
    )


def _refuse_backward(ctx, *gradients):
    raise RuntimeError("flatcore.row_norms has no derivative: pass its input with .detach()")


def _vmap_head_metrics(info, in_dims, *arguments):
    """Fold the batch into N where the head is shared; a batch of heads is a loop."""
    features_dim, weight_dim, bias_dim, logits_dim, target_dim, *_ = in_dims
    features, weight, bias, logits, target, *rest = arguments
    if weight_dim is None and bias_dim is None:
        rows = [
            None if x is None else _batch_first(x, dim, info.batch_size).flatten(0, 1)
            for x, dim in ((features, features_dim), (logits, logits_dim), (target, target_dim))
        ]
        values, prediction = _head_metrics(rows[0], weight, bias, rows[1], rows[2], *rest)
        return (values.unflatten(1, (info.batch_size, -1)), prediction.unflatten(0, (info.batch_size, -1))), (1, 0)
    several = [None if x is None else _batch_first(x, dim, info.batch_size)
               for x, dim in zip(arguments[:5], in_dims[:5], strict=True)]  # fmt: skip
    results = [_head_metrics(*(None if x is None else x[i] for x in several), *rest) for i in range(info.batch_size)]
    return (torch.stack([v for v, _ in results]), torch.stack([p for _, p in results])), (0, 0)


def _vmap_head_metrics_backward(info, in_dims, *arguments):
    """Fold the batch into N where the head is shared and its gradient not wanted; otherwise a loop over the batch."""
    tensors, (*rest, wanted) = arguments[:7], arguments[7:]
    several = [
        None if x is None else _batch_first(x, dim, info.batch_size)
        for x, dim in zip(tensors, in_dims[:7], strict=True)
    ]
    if in_dims[3] is None and in_dims[4] is None and not (wanted[1] or wanted[2]):
        upstream, logs, features, _, _, logits, target = (None if x is None else x.flatten(0, 1) for x in several)
        folded = (upstream, logs, features, tensors[3], tensors[4], logits, target)
        gradients = _head_metrics_backward(*folded, *rest, wanted)
        shape = (info.batch_size, -1)
        return tuple(x.unflatten(0, shape) if want else x for x, want in zip(gradients, wanted, strict=True)), tuple(
            0 if want else None for want in wanted
        )
    results = [
        _head_metrics_backward(*(None if x is None else x[i] for x in several), *rest, wanted)
        for i in range(info.batch_size)
    ]
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * 4


def _vmap_row_norms(info, in_dims, x, ord):
    rows = _batch_first(x, in_dims[0], info.batch_size)
    return torch.ops.flatcore.row_norms(rows.flatten(0, 1), ord).unflatten(1, (info.batch_size, -1)), 1


def _folded(info, in_dims, arguments):
    """Arguments of a batched call with the batch folded into N."""
    return [
        _batch_first(x, dim, info.batch_size).flatten(0, 1) if isinstance(x, Tensor) else x
        for x, dim in zip(arguments, in_dims, strict=True)
    ]


def _vmap_unmasked(info, in_dims, *arguments):
    results = _unmasked(*_folded(info, in_dims, arguments))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0, 0)


def _vmap_unmasked_backward(info, in_dims, *arguments):
    result = _unmasked_backward(*_folded(info, in_dims, arguments))
    return result.unflatten(0, (info.batch_size, -1)), 0


class _HeadMetrics(torch.autograd.Function):
    """The operator and its derivative for torch.func's transforms, which do not take a derivative from torch.library."""

    @staticmethod
    def forward(*arguments):
        return torch.ops.flatcore.head_metrics(*arguments)

    setup_context = staticmethod(_setup_head_metrics)
    backward = staticmethod(_backward_head_metrics)
    vmap = staticmethod(_vmap_head_metrics)


class _HeadMetricsBackward(torch.autograd.Function):
    """Likewise for the operator that its backward calls."""

    @staticmethod
    def forward(*arguments):
        return torch.ops.flatcore.head_metrics_backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Nothing is kept: there is no second derivative."""

    backward = staticmethod(_refuse_second_derivative_of_a_measure)
    vmap = staticmethod(_vmap_head_metrics_backward)


class _Unmasked(torch.autograd.Function):
    """Likewise."""

    @staticmethod
    def forward(logits, target, ignore_index):
        return torch.ops.flatcore.unmasked_cross_entropy(logits, target, ignore_index)

    setup_context = staticmethod(_setup_unmasked)
    backward = staticmethod(_backward_unmasked)
    vmap = staticmethod(_vmap_unmasked)


class _UnmaskedBackward(torch.autograd.Function):
    """Likewise for the operator that its backward calls."""

    @staticmethod
    def forward(upstream, cotangent, logits):
        return torch.ops.flatcore.unmasked_cross_entropy_backward(upstream, cotangent, logits)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Nothing is kept: there is no second derivative."""

    backward = staticmethod(_refuse_second_derivative)
    vmap = staticmethod(_vmap_unmasked_backward)


def _transformed() -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _head_metrics(*arguments):
    call = _HeadMetrics.apply if _transformed() else torch.ops.flatcore.head_metrics
    return call(*arguments)


def _head_metrics_backward(*arguments):
    call = _HeadMetricsBackward.apply if _transformed() else torch.ops.flatcore.head_metrics_backward
    return call(*arguments)


def _unmasked(logits, target, ignore_index):
    call = _Unmasked.apply if _transformed() else torch.ops.flatcore.unmasked_cross_entropy
    return call(logits, target, ignore_index)


def _unmasked_backward(upstream, cotangent, logits):
    call = _UnmaskedBackward.apply if _transformed() else torch.ops.flatcore.unmasked_cross_entropy_backward
    return call(upstream, cotangent, logits)


def _batch_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _register() -> torch.library.Library | None:
    """Define the operators once per process: a second import of the package finds them and keeps them."""
    library = torch.library.Library("flatcore", "FRAGMENT")
    try:
        library.define(_HEAD_METRICS)
    except RuntimeError as error:
        if "same name" not in str(error) and "multiple times" not in str(error):
            raise
        return None
    for schema in (_HEAD_BACKWARD, _ROW_NORMS, _UNMASKED, _UNMASKED_BACKWARD):
        library.define(schema)
    backward = "unmasked_cross_entropy_backward"
    for name, run, fake, vmap, derivative, setup in (
        (
            "head_metrics",
            _op_head_metrics,
            _fake_head_metrics,
            _vmap_head_metrics,
            _backward_head_metrics,
            _setup_head_metrics,
        ),
        (
            "head_metrics_backward",
            _op_head_metrics_backward,
            _fake_head_metrics_backward,
            _vmap_head_metrics_backward,
            _refuse_second_derivative_of_a_measure,
            None,
        ),
        ("row_norms", _op_row_norms, _fake_row_norms, _vmap_row_norms, _refuse_backward, None),
        ("unmasked_cross_entropy", _op_unmasked, _fake_unmasked, _vmap_unmasked, _backward_unmasked, _setup_unmasked),
        (
            backward,
            _op_unmasked_backward,
            _fake_unmasked_backward,
            _vmap_unmasked_backward,
            _refuse_second_derivative,
            None,
        ),
    ):
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"flatcore::{name}", fake, lib=library)
        torch.library.register_autograd(f"flatcore::{name}", derivative, setup_context=setup, lib=library)
        torch.library.register_vmap(f"flatcore::{name}", vmap, lib=library)
    return library


_LIBRARY = _register()  # the operators live as long as this object


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call may read the tensors' addresses without going through the dispatcher.

    Anything that changes what a tensor means (a subclass, a mode, a transform, tracing, a tangent, a lazy negation, a
    freed storage) makes its raw address wrong or dangerous, so then the operator is called.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.version.hip is not None
    ):
        return False
    for x in tensors:
        if x is None:
            continue
        if (
            not is_exact(x)
            or x.layout is not torch.strided
            or not (x.is_cpu or x.is_cuda)
            or x.is_neg()
            or x.is_conj()
            or is_wrapped(x)
            or not storage_covers(x)
        ):
            return False
    return True


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call with these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether a call without a derivative may read addresses: the tensors are plain, and none requires gradient."""
    return is_plain(*tensors) and not needs_gradient(*tensors)


class _Measure(torch.autograd.Function):
    """A measure of plain tensors: one native call forward and one backward, nothing between them but N numbers."""

    @staticmethod
    def forward(ctx, features, linear_weight, linear_bias, logits, target, s, count_rows, measure):
        value, log_coefficient = _run_measure(
            features, linear_weight, linear_bias, logits, target, s, count_rows, measure, True
        )
        ctx.save_for_backward(features, linear_weight, linear_bias, logits, target, log_coefficient)
        ctx.measure = measure
        return value

    @staticmethod
    def backward(ctx, upstream):
        *inputs, log_coefficient = ctx.saved_tensors
        measure, wanted = ctx.measure, ctx.needs_input_grad[:4]
        arguments = (*inputs, *measure[:5])
        if is_direct(upstream, *inputs):
            gradients = _run_head_metrics_backward(upstream, log_coefficient, arguments, wanted)
        else:  # a graph is asked for, a vmap over upstreams, a trace
            rows = upstream.to(torch.float64).expand(log_coefficient.shape)
            gradients = _head_metrics_backward(rows, log_coefficient, *arguments, list(wanted))
        found = (x if want else None for x, want in zip(gradients, wanted, strict=True))
        return (*found, None, None, None, None)


def _run_measure(
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
    """The value and, if wanted, the log of its derivative by each row's log."""
    kernels = _kernels(features, "head_metrics")
    if kernels is not None:
        if target is not None and _checks_labels(target, kernels):
            _check_labels(target, linear_weight.shape[0], measure.ignore_index)
        return kernels.head_measure(
            features, linear_weight, linear_bias, logits, target, s, count_rows, measure, with_coefficient
        )
    values, _ = _run_head_metrics(*measure.logs(features, linear_weight, linear_bias, logits, target))
    options = (values[0], s, target, count_rows, *measure.reduced)
    return reduce_with_log_coefficient(*options) if with_coefficient else (reduce(*options), None)


def head_measure(
    features: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    logits: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    measure: Measure,
) -> Tensor:
    """One measure of 2-D inputs, reduced; ``target`` hard or soft, ``weight`` class weights. Differentiable."""
    hard, s, count_rows = target, None, False
    if target is not None and target.is_floating_point():
        hard, count_rows = None, True
    if weight is not None or count_rows:
        s = sample_weights(target, weight, measure.ignore_index)
    inputs = (features, linear_weight, linear_bias, logits)
    if is_plain(*inputs, hard, s):
        if needs_gradient(*inputs):
            return _Measure.apply(*inputs, hard, s, count_rows, measure)
        return _run_measure(*inputs, hard, s, count_rows, measure, False)[0]
    values, _ = _head_metrics(*measure.logs(*inputs, hard))
    return reduce(values[0], s, hard, count_rows, *measure.reduced)


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
    """Per-sample statistics of 2-D inputs: the chosen fields (K, N), and the prediction (N,)."""
    arguments = (features, linear_weight, linear_bias, logits, target, temperature, ignore_index, include_bias,
                 norm_power, fields, wide_result)  # fmt: skip
    if is_direct(features, linear_weight, linear_bias, logits, target):
        return _run_head_metrics(*arguments)
    return _head_metrics(*arguments)


def row_norms(x: Tensor, ord: tuple[float, ...]) -> Tensor:
    """Norms of every row of a 2-D tensor, (len(ord), N)."""
    if is_direct(x):
        return _run_row_norms(x, ord)
    return torch.ops.flatcore.row_norms(x, ord)


def unmasked_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, with_cotangent: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (N,), log(1 - p_y) (N,) and q - e_y (N, C) of 2-D logits; the operator gives the last one always."""
    if is_direct(logits, target):
        return _run_unmasked(logits, target, ignore_index, with_cotangent)
    return _unmasked(logits, target, ignore_index)
