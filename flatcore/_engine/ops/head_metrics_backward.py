"""The operator of head_metrics_backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._arguments.checks import check_device, check_matrix
from ...reference import DIFFERENTIABLE, FIELDS, widest
from ..head import SCHEMA, Head
from ..threads import alone_after_fork
from .batching import batch_first, folded_head, heads
from .check_head import check_head
from .kernels import exact_products, kernels_of, refuse_bad_labels
from .operator import Operator, caller

_LABELLED = tuple(name for name in DIFFERENTIABLE if "gradient" in name)


@alone_after_fork
def run_backward(
    upstream: Tensor,
    log_coefficient: Tensor | None,
    head: Head,
    field: int,
    wanted: Sequence[bool],
    prepared: tuple[object, object] = (None, None),
) -> tuple[Tensor | None, ...]:
    """Gradients of ``Head.inputs`` where wanted, None elsewhere; a row's is ``upstream * exp(log_coefficient)``.

    ``prepared``: the kernels of the forward pass, and what they found out there; others have no use for it.
    """
    kernels = kernels_of(head.features, "head_metrics_backward", head.C)
    theirs, found = prepared
    taken_over = () if found is None or theirs is not kernels else (found,)
    with exact_products(kernels, head.features):
        return kernels.head_metrics_backward(upstream, log_coefficient, head, field, wanted, *taken_over)


def _checked(upstream, log_coefficient, *arguments):
    head, (field, wanted) = Head.split(arguments)
    check_head(head)
    check_matrix(upstream, "upstream", (head.N,), (torch.float32, torch.float64))
    check_device(upstream, "upstream", head.features, "features")
    if log_coefficient is not None:
        check_matrix(log_coefficient, "log_coefficient", (head.N,), (torch.float64, widest(head.features.device)))
        check_device(log_coefficient, "log_coefficient", head.features, "features")
    if not 0 <= field < len(FIELDS) or FIELDS[field] not in DIFFERENTIABLE:
        raise ValueError(f"field must be that of one of {', '.join(DIFFERENTIABLE)}, got {field}")
    if head.target is None and FIELDS[field] in _LABELLED:
        raise ValueError(f"{FIELDS[field]} needs a target, got target=None")
    inputs = head.inputs
    if len(wanted) != len(inputs) or any(want and x is None for want, x in zip(wanted, inputs, strict=True)):
        raise ValueError(f"wanted must hold four flags, False where there is no input, got {wanted}")
    refuse_bad_labels(head.target, head.C, head.ignore_index, kernels=None)  # no backward kernel looks for one
    gradients = run_backward(upstream, log_coefficient, head, field, tuple(wanted))
    return tuple(head.features.new_empty((0,)) if x is None else x for x in gradients)


def _fake(upstream, log_coefficient, *arguments):
    head, (_, wanted) = Head.split(arguments)
    return tuple(
        head.features.new_empty((0,)) if x is None else x.new_empty(x.shape if want else (0,))
        for x, want in zip(head.inputs, wanted, strict=True)
    )


def _vmap(info, in_dims, upstream, log_coefficient, *arguments):
    """Fold the batch into N where the head is shared and its gradient not wanted; otherwise a loop over the batch."""
    size, (upstream_dim, log_dim, *head_dims) = info.batch_size, in_dims
    (head, (field, wanted)), (dims, _) = Head.split(arguments), Head.split(head_dims)
    upstream = batch_first(upstream, upstream_dim, size)
    logs = None if log_coefficient is None else batch_first(log_coefficient, log_dim, size)
    _, of_weight, of_bias, _ = wanted
    if dims.linear_weight is None and dims.linear_bias is None and not (of_weight or of_bias):
        rows = folded_head(head, dims, size)
        flat = (upstream.flatten(0, 1), None if logs is None else logs.flatten(0, 1))
        gradients = _call(*flat, *rows, field, wanted)
        return tuple(
            x.unflatten(0, (size, -1)) if want else x for x, want in zip(gradients, wanted, strict=True)
        ), tuple(0 if want else None for want in wanted)
    results = [
        _call(upstream[i], None if logs is None else logs[i], *one, field, wanted)
        for i, one in enumerate(heads(head, dims, size))
    ]
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(wanted)


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "flatcore's measures cannot be differentiated twice: their gradient is a closed form of which no derivative is "
        "known here; write the penalty with the measure itself, not with its gradient, or detach the gradient"
    )


OPERATOR = Operator(
    f"head_metrics_backward(Tensor upstream, Tensor? log_coefficient, {SCHEMA}, int field, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _checked, _fake, _vmap, _refuse,
)  # fmt: skip
_call = caller(OPERATOR)


def head_metrics_backward(
    upstream: Tensor, log_coefficient: Tensor | None, head: Head, field: int, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """As :func:`run_backward`, through the dispatcher."""
    gradients = _call(upstream, log_coefficient, *head, field, list(wanted))
    return tuple(x if want else None for x, want in zip(gradients, wanted, strict=True))
