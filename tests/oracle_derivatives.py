"""The second oracle's derivatives, as ``oracles.py`` has the values: mpmath's probabilities, sums in long doubles.

Letters: N samples, D features, C classes; z = (W phi + b)/T, p = softmax(z), target y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import Any, NamedTuple

import mpmath
import numpy as np
from oracles import GRADIENTS, WORKING_DIGITS, integers, mpf_of
from torch import Tensor

_LONG = np.longdouble
"""64 bits or more, exponents to 10^4932: probabilities come from 80 digits, and what is summed here are differences
formed first, of one sign or held against the sum of their sizes, so that 19 digits are left to a bound of 1e-12."""


class Derivative(NamedTuple):
    """Of one row's log value, by each input; each array has the input's shape without the rows' dimension.

    ``exact`` the derivative; ``size`` the sum of the absolute values of the terms that it is formed from, magnified where
    a difference of terms divides it; ``open`` what it may be off where rounding decides a sign or a largest entry.
    """

    exact: dict[str, np.ndarray]
    size: dict[str, np.ndarray]
    open: dict[str, np.ndarray]
    largest: Any  # size of the largest derivative by a logit, as computed


def exact_derivatives(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    labels: Sequence[int],
    temperature: float,
    include_bias: bool,
    norm_power: int,
    measure: str,
    error: Sequence[float],
    smallest: float,
) -> list[Derivative | None]:
    """Derivatives of the log of one measure of each row; None where its value is 0 or a rest of terms that cancel.

    Args:
        features, weight, bias, logits, temperature, include_bias, norm_power: as ``oracles.exact``.
        labels: one class per row.
        measure: ``hessian_trace``, ``layerwise``, ``neuronwise`` or one of ``GRADIENTS``.
        error: what each row's terms may be off relatively, where the derivative of a norm has to choose (see ``open``).
        smallest: positive number of the compute type: a component of a norm below that times the largest may be 0.

    From the definitions: t = 1 - sum p^2, V = sum_j p_j ||w_j - sum_k p_k w_k||^2, F = ||sum_j p_j (w_j - w_y)||.
    """
    assert np.finfo(_LONG).maxexp >= 16384, "this machine's long double has no exponents for a gap of 2000"
    phi, w = features.detach().double().numpy(), weight.detach().double().numpy()
    b = None if bias is None else bias.detach().double().numpy()
    z = None if logits is None else logits.detach().double().numpy()
    C = w.shape[0]
    head = np.column_stack([w, b]) if include_bias and b is not None else w
    # classes that agree in everything are one group; a class that is some row's label is a group of its own
    own = np.where(np.isin(np.arange(C), labels), np.arange(C), -1.0)
    columns = [w, own[:, None], *([] if b is None else [b[:, None]]), *([] if z is None else [z.T])]
    _, first, index, count = np.unique(
        np.column_stack(columns), axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    index = index.reshape(-1)
    rows, unit = integers(w[first])
    groups = _Groups(head[first].astype(_LONG), count, index, phi.shape[1], include_bias, z is not None, temperature)
    found = []
    for n in range(phi.shape[0]):
        with mpmath.workdps(WORKING_DIGITS):
            if z is not None:
                logit = mpf_of(z[n, first])
            else:
                (x,), x_unit = integers(phi[n : n + 1])
                logit = [mpmath.ldexp(sum(map(mul, x, row)), x_unit + unit) for row in rows]
                if b is not None:
                    logit = [v + mpmath.mpf(float(c)) for v, c in zip(logit, b[first], strict=True)]
            top = max(logit)
            e = {
                v: mpmath.exp((v - top) / mpmath.mpf(temperature)) if v > -mpmath.inf else mpmath.mpf(0) for v in logit
            }
            anchor = min(
                (k for k, v in enumerate(logit) if v == top), key=lambda k: first[k]
            )  # the lowest class on ties
            tau = mpmath.fsum(int(k) * e[v] for k, v in zip(count, logit, strict=True) if v != top)
            tau += sum(int(k) for k, v in zip(count, logit, strict=True) if v == top) - 1
            share = {v: as_long(a / (1 + tau)) for v, a in e.items()}
            epsilon = as_long(tau / (1 + tau))
        p = np.array([share[v] for v in logit], dtype=_LONG)
        is_top = np.array([v == top for v in logit])
        if measure in ("hessian_trace", "layerwise"):
            through = _of_trace(groups, p, is_top, epsilon)
        elif measure == "neuronwise":
            through = _of_variance(groups, p, anchor)
        else:
            ord = next(ord for ord, name in GRADIENTS.items() if name == measure)
            through = _of_norm(groups, p, int(index[labels[n]]), anchor, ord, float(error[n]), smallest)
        found.append(None if through is None else groups.chain(phi[n], anchor, measure, norm_power, through))
    return found


def as_long(x: Any) -> Any:
    """An mpf as a long double, to 2^-64."""
    if not x:
        return _LONG(0)
    mantissa, exponent = mpmath.frexp(x)
    high = float(mantissa)
    return np.ldexp(_LONG(high) + _LONG(float(mantissa - high)), int(exponent))


class _Through(NamedTuple):
    """By the logits (K,) and, at fixed logits, by the rows of W (K, D): exact, size and open."""

    g: Any
    s: Any
    g_open: Any
    rows: Any
    rows_size: Any
    rows_open: Any


class _Groups:
    """Classes that agree in everything: their row (K, D), how many they are, and which group a class is in."""

    def __init__(self, w, count, index, width: int, include_bias: bool, given: bool, temperature: float):
        self.w, self.count, self.index, self.width = w, count.astype(_LONG), index, width
        self.include_bias, self.given, self.T = include_bias, given, _LONG(temperature)

    def chain(self, phi, anchor: int, measure: str, norm_power: int, t: _Through) -> Derivative | None:
        """From the logits to what they are computed from."""
        x = phi.astype(_LONG)
        w = self.w[:, : self.width]
        d_x = size_x = np.zeros_like(x)
        d_rows, rows_size, rows_open = t.rows, t.rows_size, t.rows_open
        if measure not in GRADIENTS.values():
            norm = x @ x + (1 if self.include_bias else 0)
            if norm == 0:
                return None
            d_x, size_x = 2 * x / norm, np.abs(2 * x / norm)
        if measure == "layerwise":
            square = self.count @ (self.w * self.w).sum(axis=1)
            if square == 0:
                return None
            d_rows = norm_power * self.w / square
            rows_size, rows_open = np.abs(d_rows), np.zeros_like(d_rows)
        exact, size, loose = {}, {}, {}
        g, s, g_open = (self.count * v for v in (t.g, t.s, t.g_open))
        if self.given:
            exact["features"], size["features"], loose["features"] = d_x, size_x, np.zeros_like(d_x)
            exact["logits"], size["logits"], loose["logits"] = (v[self.index] for v in (t.g, t.s, t.g_open))
            per_row = [v[:, : self.width] for v in (d_rows, rows_size, rows_open)]
            by_bias = [np.zeros_like(v) for v in (t.g, t.s, t.g_open)]
        else:
            # the derivatives by the logits sum to 0: differences of rows, so that a large common row costs no digit here
            exact["features"] = d_x + g @ (w - w[anchor])
            size["features"], loose["features"] = size_x + s @ np.abs(w), g_open @ np.abs(w)
            per_row = [
                v[:, None] * a + beside[:, : self.width]
                for v, a, beside in zip(
                    (t.g, t.s, t.g_open), (x, np.abs(x), np.abs(x)), (d_rows, rows_size, rows_open), strict=True
                )
            ]
            by_bias = [t.g, t.s, t.g_open]
        if self.include_bias:
            by_bias = [v + r[:, self.width] for v, r in zip(by_bias, (d_rows, rows_size, rows_open), strict=True)]
        for into, row, one in zip((exact, size, loose), per_row, by_bias, strict=True):
            into["linear_weight"], into["linear_bias"] = row[self.index], one[self.index]
        return Derivative(exact, size, loose, t.s.max())


def _of_trace(groups: _Groups, p, is_top, epsilon) -> _Through | None:
    """d log t/dz_j = -2 p_j (p_j - sum p^2)/t; at the top p - sum p^2 = p eps - (what the others add to sum p^2)."""
    count, zero = groups.count, np.zeros_like(groups.w)
    top = p.max()
    t = count @ (p * np.where(is_top, epsilon, 1 - p))
    if t == 0:
        return None
    others = (count * ~is_top) @ (p * p) + ((count @ is_top) - 1) * top * top
    square = others + top * top
    difference = np.where(is_top, top * epsilon - others, p - square)
    sizes = np.where(is_top, top * epsilon + others, p + square)
    factor = 2 * p / (t * groups.T)
    return _Through(-factor * difference, factor * sizes, np.zeros_like(p), zero, zero, zero)


def _of_variance(groups: _Groups, p, anchor: int) -> _Through | None:
    """d log V/dz_j = p_j (||w_j - mean||^2 - V)/V and 2 p_j (w_j - mean)/V, about the top class's row."""
    d = groups.w - groups.w[anchor]
    mass = groups.count * p
    from_mean, sizes = d - mass @ d, np.abs(d) + mass @ np.abs(d)
    square = (from_mean * from_mean).sum(axis=1)
    v = mass @ square
    if v == 0:
        return None
    factor, rows = p / (v * groups.T), 2 * (p / v)[:, None]
    none = np.zeros_like(p)
    return _Through(
        factor * (square - v), factor * ((sizes * sizes).sum(axis=1) + v), none, rows * from_mean, rows * sizes,
        np.zeros_like(d),
    )  # fmt: skip


def _of_norm(groups: _Groups, p, y: int, anchor: int, ord: float, error: float, smallest: float) -> _Through | None:
    """With f = sum_j p_j (w_j - w_y), F its norm and e the norm's gradient: p_j (e (w_j - w_y) - F)/F, and p_j e/F."""
    d = groups.w[:, : groups.width] - groups.w[y, : groups.width]
    mass = groups.count * p
    f, sizes = mass @ d, mass @ np.abs(d)
    size = np.abs(f)
    F = {1: size.sum(), 2: np.sqrt(f @ f), math.inf: size.max(initial=0)}[ord]
    if F == 0:
        return None
    distance = {1: np.abs(d).sum(axis=1), 2: np.sqrt((d * d).sum(axis=1)), math.inf: np.abs(d).max(axis=1)}[ord]
    condition = mass @ distance / F
    loose = np.zeros_like(f)
    if ord == 2:
        e, e_size = f / F, sizes / F + size / F * condition
    elif ord == 1:
        e, e_size = np.sign(f), np.ones_like(f)
        unsure = (size <= error * sizes) | (sizes < smallest * sizes.max())
        loose = np.where(unsure & (sizes > 0), _LONG(2), _LONG(0))
    else:
        largest = size == F
        e, e_size = np.sign(f) * largest / largest.sum(), np.where(largest, _LONG(1), _LONG(0))
        reach = size + error * (sizes + sizes.max()) >= F
        loose = np.where(reach & (reach.sum() > 1), _LONG(1), _LONG(0))
    same = (d == 0).all(axis=1)
    factor = p / (F * groups.T)
    g = np.where(same, -p / groups.T, factor * (d @ e - F))
    s = np.where(same, p / groups.T, factor * (np.abs(d) @ e_size + F * condition))
    g_open = factor * (np.abs(d) @ loose)
    if not same[anchor]:
        # a wrong label: a difference of equals at the top, so what the others leave, for they sum to 0
        twins = (groups.w[:, : groups.width] == groups.w[anchor, : groups.width]).all(axis=1) & (p > 0)
        rest = (groups.count * ~twins) @ g
        g = np.where(twins, -rest * p / (mass @ twins), g)
        s = np.where(twins, np.maximum(s, (groups.count * ~twins) @ s), s)
    own = np.arange(len(p)) == y
    share = np.where(own, -((mass * ~own).sum()), p) / F
    e_total = e_size + np.abs(e) * condition
    rows, rows_size, rows_open = (np.outer(v, a) for v, a in ((share, e), (abs(share), e_total), (abs(share), loose)))
    if groups.include_bias:
        raise ValueError("a gradient norm does not count the bias")
    return _Through(g, s, g_open, rows, rows_size, rows_open)
