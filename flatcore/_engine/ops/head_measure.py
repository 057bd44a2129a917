"""A measure: one field of head_metrics, reduced, and its derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..direct import is_direct_head, is_plain, is_undisturbed, needs_gradient
from ..head import Head
from ..reduction import Reduction, reduce, reduce_with_log_coefficient
from ..threads import alone_after_fork
from .head_metrics import head_metrics
from .head_metrics_backward import head_metrics_backward, run_backward
from .kernels import exact_products, kernels_of, reference, refuse_bad_labels


class _Measure(torch.autograd.Function):
    """A measure of plain tensors: one native call forward and one backward, nothing between them but N numbers."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *_, head, field, how = arguments  # before them Head.inputs, for autograd to see
        value, log_coefficient, ctx.prepared = _run(head, field, how, with_coefficient=True)
        ctx.save_for_backward(log_coefficient, *head.tensors)
        ctx.options, ctx.field = head.options, field
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        log_coefficient, *tensors = ctx.saved_tensors
        head = Head.of(tensors, ctx.options)
        *wanted, _, _, _ = ctx.needs_input_grad
        if is_direct_head(head, upstream):
            gradients = run_backward(upstream, log_coefficient, head, ctx.field, wanted, ctx.prepared)
        else:  # a graph is asked for, a vmap over upstreams, a trace
            rows = upstream.to(log_coefficient.dtype).expand(log_coefficient.shape)
            gradients = head_metrics_backward(rows, log_coefficient, head, ctx.field, wanted)
        return (*gradients, None, None, None)


@alone_after_fork
def _run(head: Head, field: int, how: Reduction, with_coefficient: bool) -> tuple[Tensor, Tensor | None, Any]:
    """The value, if wanted the log of its derivative by each row's log, and what the kernels' gradient can reuse."""
    kernels = kernels_of(head.features, "head_metrics", head.C)
    refuse_bad_labels(head.target, head.C, head.ignore_index, kernels)
    if kernels is not reference:
        value, log_coefficient, prepared = kernels.head_measure(head, field, how, with_coefficient)
        return value, log_coefficient, (kernels, prepared)
    with exact_products(kernels, head.features):
        values, _ = reference.head_metrics(head, 1 << field, True)
    if with_coefficient:
        return *reduce_with_log_coefficient(values[0], how), (None, None)
    return reduce(values[0], how), None, (None, None)


def head_measure(head: Head, field: int, how: Reduction, plain: bool = False) -> Tensor:
    """One field of a head whose tensors a public function has checked, reduced. Differentiable.

    ``plain``: it has found that all of them are simply their memory.
    """
    tensors = head.tensors
    if not (is_undisturbed() if plain else is_plain(*tensors, how.s, how.class_weight, checked=True)):
        values, _ = head_metrics(head, 1 << field, True)
        return reduce(values[0], how)
    if needs_gradient(*tensors):
        return _Measure.apply(*head.inputs, head, field, how)
    return _run(head, field, how, False)[0]
