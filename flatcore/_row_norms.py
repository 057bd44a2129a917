"""Norms of the rows of a matrix, several from one read."""

from __future__ import annotations

import math
from typing import Any

from ._arguments.arrays import as_tensor, on_the_arrays_stream, returner
from ._arguments.checks import check_floating, check_no_grad, check_norm, check_tensor
from ._engine import ops


@on_the_arrays_stream
def row_norms(x: Any, ord: float | str | tuple[float | str, ...] = (1, 2, math.inf)) -> Any:
    r"""L1, L2 and L-infinity norms of every row, all from one read of the matrix.

    :math:`\|x_n\|_1 = \sum_k |x_{nk}|`, :math:`\|x_n\|_2 = (\sum_k x_{nk}^2)^{1/2}`,
    :math:`\|x_n\|_\infty = \max_k |x_{nk}|`.

    Args:
        x: (N, K), float16, bfloat16, float32 or float64; a torch tensor, a NumPy array or an array with ``__dlpack__``.
            Any strides.
        ord: ``1``, ``2``, ``inf`` (or a name: ``"l1"``, ``"l2"``, ``"linf"``, ``"inf"``), or a tuple of them in any order.

    Returns:
        Plain (not squared) norms, one per row: (N,) for one number, (len(ord), N) for a tuple; float32, float64 if x is;
        of the kind and on the device of ``x``. K = 0 gives 0, N = 0 an empty result.

    Raises:
        TypeError: ``x`` is no array, or not of a floating dtype above; is quantized, nested or a DTensor shard.
        ValueError: ``x`` is not 2-dimensional or not strided; requires gradient while grad mode is on; carries a tangent;
            an ``ord`` other than 1, 2, inf, or an empty tuple.

    Numerics: sums are accumulated in float64, so that the squares of float32 entries of 1e20 or 1e-25 neither overflow
    nor vanish; float64 rows whose squares would leave the range are read again, scaled. A row with a NaN gives NaN, one
    with an infinite entry inf.

    Example:
        >>> import torch, flatcore
        >>> flatcore.row_norms(torch.tensor([[3.0, -4.0], [1e20, 0.0]]), ord=(1, 2)).tolist()
        [[7.0, 1.0000000200408773e+20], [5.0, 1.0000000200408773e+20]]
    """
    orders = check_orders(ord)
    tensor = as_tensor(x, "x")
    check_tensor(tensor, "x")
    check_floating(tensor, "x")
    check_no_grad(tensor, "x")
    if tensor.dim() != 2:
        raise ValueError(f"x must be 2-dimensional (N, K), got shape {tuple(tensor.shape)}")
    norms = ops.row_norms(tensor, orders)
    return returner(x)(norms if isinstance(ord, tuple) else norms[0])


def check_orders(ord: Any) -> tuple[float, ...]:
    """Return the orders of one number or of a tuple."""
    orders = ord if isinstance(ord, tuple) else (ord,)
    if not orders:
        raise ValueError("ord must be 1, 2, inf or a non-empty tuple of them, got ()")
    return tuple(check_norm(p, "ord") for p in orders)
