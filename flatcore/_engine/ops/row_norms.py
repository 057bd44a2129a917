"""The operator of row_norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._arguments.checks import check_matrix
from ..direct import is_direct
from ..threads import alone_after_fork
from .batching import batch_first
from .kernels import kernels_of
from .operator import Operator, caller


@alone_after_fork
def _run(x: Tensor, ord: tuple[float, ...]) -> Tensor:
    return kernels_of(x, "row_norms").row_norms(x, tuple(ord))


def _checked(x, ord):
    check_matrix(x, "x", (None, None))
    if not ord or any(p not in (1, 2, math.inf) for p in ord):
        raise ValueError(f"ord must be 1, 2, inf or a non-empty tuple of them, got {ord}")
    return _run(x, ord)


def _fake(x, ord):
    return x.new_empty((len(ord), x.shape[0]), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _vmap(info, in_dims, x, ord):
    rows = batch_first(x, in_dims[0], info.batch_size)
    return _call(rows.flatten(0, 1), ord).unflatten(1, (info.batch_size, -1)), 1


def _backward(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError("flatcore.row_norms has no derivative: pass its input with .detach()")


OPERATOR = Operator("row_norms(Tensor x, float[] ord) -> Tensor", _checked, _fake, _vmap, _backward)
_call = caller(OPERATOR)


def row_norms(x: Tensor, ord: tuple[float, ...]) -> Tensor:
    """Norms of every row of a 2-D tensor, (len(ord), N)."""
    return _run(x, ord) if is_direct(x) else _call(x, ord)
