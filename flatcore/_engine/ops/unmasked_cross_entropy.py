"""The operators of unmasked_cross_entropy and of its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._arguments.checks import check_device, check_matrix
from ..direct import is_direct
from ..threads import alone_after_fork
from .batching import folded
from .kernels import kernels_of, refuse_bad_labels
from .operator import Operator, caller


@alone_after_fork
def _run(logits: Tensor, target: Tensor, ignore_index: int, with_cotangent: bool = True):
    kernels = kernels_of(logits, "unmasked_cross_entropy")
    refuse_bad_labels(target, logits.shape[1], ignore_index, kernels)
    return kernels.unmasked_cross_entropy(logits, target, ignore_index, with_cotangent)


def _checked(logits, target, ignore_index):
    check_matrix(logits, "logits", (None, None))
    if logits.shape[1] == 0:
        raise ValueError("logits must have at least one class (C >= 1), got C = 0")
    check_matrix(target, "target", (logits.shape[0],), (torch.int64,))
    check_device(target, "target", logits, "logits")
    return _run(logits, target, ignore_index)


def _fake(logits, target, ignore_index):
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    n = logits.shape[0]
    return logits.new_empty((n,), dtype=wide), logits.new_empty((n,), dtype=wide), logits.new_empty(logits.shape)


def _vmap(info, in_dims, *arguments):
    results = _call(*folded(info, in_dims, arguments))
    return tuple(x.unflatten(0, (info.batch_size, -1)) for x in results), (0, 0, 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, log_scale, cotangent = output
    ctx.save_for_backward(cotangent, inputs[0])
    ctx.mark_non_differentiable(log_scale, cotangent)


def _backward(ctx, upstream, *_):
    # The logits come along so that a second derivative meets _refuse: from the cotangent alone, which counts as a constant,
    # it would be a number without the term that matters.
    return _call_backward(upstream, *ctx.saved_tensors), None, None


def _run_backward(upstream, cotangent, logits):
    scale = upstream.unsqueeze(1)
    if cotangent.dtype == upstream.dtype or cotangent.device.type != "cpu":
        return (scale * cotangent).to(cotangent.dtype)
    # float16, bfloat16: the product in float32, in blocks of 1 MiB; whole it is written to memory and read again, which
    # takes 10 times as long
    result, rows = torch.empty_like(cotangent), max(2**18 // cotangent.shape[1], 1)
    for block, a, b in zip(result.split(rows), scale.split(rows), cotangent.split(rows), strict=True):
        block.copy_(a * b)
    return result


def _fake_backward(upstream, cotangent, logits):
    return torch.empty_like(cotangent)


def _vmap_backward(info, in_dims, *arguments):
    result = _call_backward(*folded(info, in_dims, arguments))
    return result.unflatten(0, (info.batch_size, -1)), 0


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "flatcore.unmasked_cross_entropy cannot be differentiated twice: its backward gives the loss's gradient at "
        "another scale, so a second derivative would not be the loss's; take "
        "torch.nn.functional.cross_entropy for a gradient penalty"
    )


OPERATOR = Operator(
    "unmasked_cross_entropy(Tensor logits, Tensor target, int ignore_index) -> (Tensor, Tensor, Tensor)",
    _checked, _fake, _vmap, _backward, _setup,
)  # fmt: skip
BACKWARD = Operator(
    "unmasked_cross_entropy_backward(Tensor upstream, Tensor cotangent, Tensor logits) -> Tensor",
    _run_backward, _fake_backward, _vmap_backward, _refuse,
)  # fmt: skip
_call, _call_backward = caller(OPERATOR), caller(BACKWARD)


def unmasked_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, with_cotangent: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (N,), log(1 - p_y) (N,) and q - e_y (N, C) of 2-D logits; the operator gives the last one always."""
    if is_direct(logits, target):
        return _run(logits, target, ignore_index, with_cotangent)
    return _call(logits, target, ignore_index)
