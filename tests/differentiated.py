"""What the tests of derivatives share: the measures, small problems, and gradients at 400 digits.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor

import flatcore

INF = math.inf
MEASURES: dict[str, Callable[..., Tensor]] = {
    "trace": flatcore.hessian_trace,
    "layerwise": functools.partial(flatcore.relative_flatness, measure="layerwise"),
    "layerwise-norm": functools.partial(flatcore.relative_flatness, measure="layerwise", norm_power=1),
    "neuronwise": functools.partial(flatcore.relative_flatness, measure="neuronwise"),
}
NORMS: dict[str, Callable[..., Tensor]] = {
    f"gradient-{ord}": functools.partial(flatcore.feature_gradient_norms, ord=ord) for ord in (1, 2, INF)
}


def problem(N: int = 4, D: int = 3, C: int = 4, seed: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Features, head, bias and logits of moderate size, all requiring gradient."""
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((N, D), (C, D), (C,)))
    given = {"features": x, "linear_weight": w, "linear_bias": b, "logits": x @ w.T + b}
    return {name: value.to(dtype).detach().requires_grad_() for name, value in given.items()}


def _exact_value(name: str, x: list, w: list, b: list, z: list, y: int, include_bias: bool) -> Any:
    """A measure of one row by its definition; 400 digits are its only defence against cancellation."""
    top = max(z)
    e = [mpmath.exp(v - top) for v in z]
    total = mpmath.fsum(e)
    p = [v / total for v in e]
    square = mpmath.fsum(v * v for v in x) + (1 if include_bias else 0)
    rows = [[*r, c] if include_bias else r for r, c in zip(w, b, strict=True)]
    trace = square * mpmath.fsum(v * (1 - v) for v in p)
    if name == "trace":
        return trace
    if name.startswith("layerwise"):
        norm = mpmath.fsum(v * v for r in rows for v in r)
        return trace * (mpmath.sqrt(norm) if name == "layerwise-norm" else norm)
    if name == "neuronwise":
        mean = [mpmath.fdot(p, column) for column in zip(*rows, strict=True)]
        return square * mpmath.fsum(
            q * mpmath.fsum((a - m) ** 2 for a, m in zip(r, mean, strict=True)) for q, r in zip(p, rows, strict=True)
        )
    gradient = [mpmath.fdot(p, column) - column[y] for column in zip(*w, strict=True)]
    sizes = [abs(v) for v in gradient]
    if name == "gradient-1":
        return mpmath.fsum(sizes)
    return mpmath.sqrt(mpmath.fsum(v * v for v in sizes)) if name == "gradient-2" else max(sizes)


def _gradient_sizes(name: str, x: list, w: list, z: list, y: int) -> np.ndarray:
    """p_j (||w_j - w_y|| + F)/F of each class, in the norm whose value F is."""
    ord = {"gradient-1": 1, "gradient-2": 2, "gradient-inf": mpmath.inf}[name]
    total = mpmath.fsum(mpmath.exp(v) for v in z)
    norm = _exact_value(name, x, w, [0] * len(w), z, y, False)
    found = []
    for row, v in zip(w, z, strict=True):
        distance = mpmath.norm([a - c for a, c in zip(row, w[y], strict=True)], ord)
        found.append(float(mpmath.exp(v) / total * (distance + norm) / norm))
    return np.array(found)


def exact_log_gradients(
    name: str, x: Tensor, w: Tensor, b: Tensor, y: int, include_bias: bool
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Derivatives of one row's log value with respect to x (D,), w (C, D), b (C,), and the sizes they are summed from.

    By central differences of 1e-70 at 400 digits: right to 1e-130 of the curvature. The sizes: |g_j w_jd|, g the
    derivative with respect to logits, and what does not pass through them.
    """
    D, C = w.shape[1], w.shape[0]
    with mpmath.workdps(400):
        flat = [mpmath.mpf(v) for t in (x, w, b) for v in t.double().flatten().tolist()]
        h = mpmath.mpf(10) ** -70

        def parts(v: list) -> tuple[list, list, list]:
            return v[:D], [v[D + j * D : D + (j + 1) * D] for j in range(C)], v[D + C * D :]

        def logits(v: list) -> list:
            xs, ws, bs = parts(v)
            return [mpmath.fdot(r, xs) + c for r, c in zip(ws, bs, strict=True)]

        def log_value(v: list, z: list) -> Any:
            return mpmath.log(_exact_value(name, *parts(v), z, y, include_bias))

        def moved(v: list, i: int, by: Any) -> list:
            return [a + by if k == i else a for k, a in enumerate(v)]

        z = logits(flat)
        through = [(log_value(flat, moved(z, j, h)) - log_value(flat, moved(z, j, -h))) / (2 * h) for j in range(C)]
        total, fixed = [], []
        for i in range(len(flat)):
            up, down = moved(flat, i, h), moved(flat, i, -h)
            total.append((log_value(up, logits(up)) - log_value(down, logits(down))) / (2 * h))
            fixed.append((log_value(up, z) - log_value(down, z)) / (2 * h))
        g = np.array([float(v) for v in through])
        size = np.abs(g)
        if name in NORMS:  # u_j (e . (w_j - w_y) - F)/F: two sizes that may cancel
            size = np.maximum(size, _gradient_sizes(name, *parts(flat)[:2], z, y))
        truth, beside = np.array([float(v) for v in total]), np.abs([float(v) for v in fixed])
    xs, ws = np.abs(x.double().numpy()), np.abs(w.double().numpy())
    sizes = [size @ ws, np.outer(size, xs), size]
    ends = (0, D, D + C * D, D + C * D + C)
    shapes = ((D,), (C, D), (C,))
    cut = [(a, b) for a, b in itertools.pairwise(ends)]
    return (
        [truth[a:b].reshape(s) for (a, b), s in zip(cut, shapes, strict=True)],
        [part + beside[a:b].reshape(s) for part, (a, b), s in zip(sizes, cut, shapes, strict=True)],
    )
