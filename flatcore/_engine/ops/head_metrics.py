"""The operator of head_metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...reference import DIFFERENTIABLE, FIELDS, widest
from ..direct import is_direct
from ..head import INPUTS, SCHEMA, Head, is_double
from ..threads import alone_after_fork
from .batching import folded_head, heads
from .check_head import check_head
from .head_metrics_backward import head_metrics_backward
from .kernels import exact_products, kernels_of, refuse_bad_labels
from .operator import Operator, caller


@alone_after_fork
def _run(head: Head, fields: int, wide_result: bool) -> tuple[Tensor, Tensor]:
    """The chosen fields (K, N) and the prediction (N,), without the dispatcher."""
    kernels = kernels_of(head.features, "head_metrics", head.C)
    refuse_bad_labels(head.target, head.C, head.ignore_index, kernels)
    with exact_products(kernels, head.features):
        return kernels.head_metrics(head, fields, wide_result)


def _checked(*arguments):
    head, (fields, wide_result) = Head.split(arguments)
    check_head(head)
    if not 0 <= fields < 1 << len(FIELDS):
        raise ValueError(f"fields must be a mask of {len(FIELDS)} bits, got {fields}")
    return _run(head, fields, wide_result)


def _fake(*arguments):
    head, (fields, wide_result) = Head.split(arguments)
    dtype = widest(head.features.device) if wide_result else torch.float32
    if is_double(head):
        dtype = torch.float64
    values = head.features.new_empty((int(fields).bit_count(), head.N), dtype=dtype)
    return values, head.features.new_empty((head.N,), dtype=torch.int64)


def _vmap(info, in_dims, *arguments):
    """Fold the batch into N where the head is shared; a batch of heads is a loop."""
    size = info.batch_size
    (head, rest), (dims, _) = Head.split(arguments), Head.split(in_dims)
    if dims.linear_weight is None and dims.linear_bias is None:
        values, prediction = _call(*folded_head(head, dims, size), *rest)
        return (values.unflatten(1, (size, -1)), prediction.unflatten(0, (size, -1))), (1, 0)
    results = [_call(*one, *rest) for one in heads(head, dims, size)]
    return (torch.stack([v for v, _ in results]), torch.stack([p for _, p in results])), (0, 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    head, (fields, _) = Head.split(inputs)
    ctx.save_for_backward(*head.tensors)
    ctx.options, ctx.fields, ctx.arguments = head.options, fields, len(inputs)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, upstream, _):
    field = ctx.fields.bit_length() - 1
    if ctx.fields.bit_count() != 1 or FIELDS[field] not in DIFFERENTIABLE:
        raise RuntimeError(
            "flatcore.head_metrics has no derivative: pass its inputs with .detach(), or take hessian_trace, "
            "relative_flatness or feature_gradient_norms, which have one"
        )
    wanted = list(ctx.needs_input_grad[: len(INPUTS)])
    found = head_metrics_backward(upstream[0], None, Head.of(ctx.saved_tensors, ctx.options), field, wanted)
    return (*found, *(None,) * (ctx.arguments - len(found)))


OPERATOR = Operator(
    f"head_metrics({SCHEMA}, int fields, bool wide_result) -> (Tensor, Tensor)",
    _checked, _fake, _vmap, _backward, _setup,
)  # fmt: skip
_call = caller(OPERATOR)


def head_metrics(head: Head, fields: int, wide_result: bool) -> tuple[Tensor, Tensor]:
    """Per-sample statistics of a head: the chosen fields (K, N), and the prediction (N,)."""
    if is_direct(*head.tensors):
        return _run(head, fields, wide_result)
    return _call(*head, fields, wide_result)
