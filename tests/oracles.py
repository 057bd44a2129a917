"""Two oracles that owe flatcore nothing.

1. The autograd Hessian of the real loss on tiny problems, float64: the definition, block by block, no closed form.
2. mpmath at 60 digits: the softmax of the exact logits, every sum of one sign or over differences that were formed
   first. Exponents are unlimited there, so a gap of 10,000 is as easy as one of 1.

Letters: N samples, D features, C classes; z = (W phi + b)/T, p = softmax(z), target y.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from operator import mul
from typing import Any, NamedTuple

import mpmath
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

DIGITS = 60
# 20 working digits above those: sums over 200,000 classes and the one subtraction left (see _variance) take 6 each.
_WORKING_DIGITS = DIGITS + 20
_BITS = 280  # of the probabilities as integers, relative to the largest one in their sum: 84 digits
ORDS = (1, 2, math.inf)
LABEL_FREE = (
    "confidence",
    "margin",
    "one_minus_confidence",
    "feature_norm",
    "hessian_trace",
    "layerwise",
    "neuronwise",
)
GRADIENTS = {1: "feature_gradient_norm_1", 2: "feature_gradient_norm", math.inf: "feature_gradient_norm_inf"}


# ------------------------------------------------------------------------------------------- autograd, the definition
def autograd_curvature(
    phi: Tensor, weight: Tensor, bias: Tensor | None, target: int, temperature: float, include_bias: bool
) -> dict[str, float]:
    """Trace, layerwise and neuronwise measure of one sample (D,), from the Hessian of its loss, float64.

    neuronwise is Petzka's sum over blocks, sum_{s,s'} <w_s, w_s'> Tr H_{s,s'}.
    """
    phi, weight = phi.double(), weight.double()
    bias = None if bias is None else bias.double()
    parameters = torch.cat([weight, bias.unsqueeze(1)], dim=1) if include_bias else weight

    def loss(theta: Tensor) -> Tensor:
        w, b = (theta[:, :-1], theta[:, -1]) if include_bias else (theta, bias)
        z = functional.linear(phi, w, b) / temperature
        return functional.cross_entropy(z.unsqueeze(0), torch.tensor([target]))

    hessian = torch.autograd.functional.hessian(loss, parameters)  # (C, K, C, K), K = D or D + 1
    blocks = torch.einsum("ikjk->ij", hessian)  # Tr H_{s,s'}
    trace = blocks.trace()
    return {
        "hessian_trace": trace.item(),
        "layerwise": (parameters.square().sum() * trace).item(),
        "neuronwise": ((parameters @ parameters.T) * blocks).sum().item(),
    }


def autograd_feature_gradient(
    phi: Tensor, weight: Tensor, bias: Tensor | None, target: int, temperature: float
) -> Tensor:
    """Gradient of one sample's loss with respect to its features (D,), float64."""
    phi = phi.double().requires_grad_()
    z = functional.linear(phi, weight.double(), None if bias is None else bias.double()) / temperature
    (gradient,) = torch.autograd.grad(functional.cross_entropy(z.unsqueeze(0), torch.tensor([target])), phi)
    return gradient


def autograd_feature_hessian_trace(phi: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> float:
    """Trace of the Hessian of one sample's loss with respect to its features (D,), float64."""
    b = None if bias is None else bias.double()

    def loss(x: Tensor) -> Tensor:
        z = functional.linear(x, weight.double(), b) / temperature
        return functional.cross_entropy(z.unsqueeze(0), torch.tensor([0]))

    return torch.autograd.functional.hessian(loss, phi.double()).trace().item()


# -------------------------------------------------------------------------------------------------- mpmath, 60 digits
class Truth:
    """Exact values of every row and target: ``exact[name]`` holds N*K mpf numbers, rows outermost.

    ``condition[ord]`` holds sum_j p_j ||w_j - w_y|| / ||sum_j p_j (w_j - w_y)|| of each, in the norm of that ord: how
    much a relative error of the p_j is magnified in the gradient's norm.
    """

    def __init__(self, targets: int):
        self.targets = targets  # K, 0 without target
        self.prediction: list[int] = []
        self.exact: dict[str, list[Any]] = {}
        self.condition: dict[float, list[float]] = {}
        self._rounded: dict[tuple[str, bool], np.ndarray] = {}

    def linear(self, name: str) -> np.ndarray:
        """Return the values, each rounded once to float64 (0 where they underflow, inf where they overflow)."""
        return self._round(name, False)

    def log(self, name: str) -> np.ndarray:
        """Return their natural logs; -inf for 0."""
        return self._round(name, True)

    def _round(self, name: str, log: bool) -> np.ndarray:
        if (name, log) not in self._rounded:
            with mpmath.workdps(_WORKING_DIGITS):
                values = [_log(v) if log else float(v) for v in self.exact[name]]
            self._rounded[name, log] = np.array(values)
        return self._rounded[name, log]

    def weighted_mean(self, name: str, s: Sequence[float], d: float) -> Any:
        """sum_n s_n value_n / d, an mpf."""
        with mpmath.workdps(_WORKING_DIGITS):
            return mpmath.fdot((mpmath.mpf(a), v) for a, v in zip(s, self.exact[name], strict=True) if a) / mpmath.mpf(
                d
            )


def _log(value: Any) -> float:
    return float(mpmath.log(value)) if value else -math.inf


def log_of(value: Any) -> float:
    """Natural log of an mpf, to float64."""
    with mpmath.workdps(_WORKING_DIGITS):
        return _log(value)


_CACHE: dict[tuple, Any] = {}


def exact(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    targets: Tensor | None,
    temperature: float = 1.0,
    include_bias: bool = False,
    norm_power: int = 2,
) -> Truth:
    """Every value of every row, at 60 digits.

    Args:
        features: (N, D), finite; of any floating dtype, read as the numbers they hold.
        weight: (C, D).
        bias: (C,) or None; -inf masks a class.
        logits: (N, C) or None (then W phi + b, exactly); -inf masks a class.
        targets: (N, K) or None: each row is evaluated for its K labels.
        temperature: T.
        include_bias: take the bias into norms and distances.
        norm_power: 2, or 1 for the plain norm of W.

    The answer of equal inputs is computed once per process: seven paths are compared with it.
    """
    arrays = [None if x is None else x.detach().double().contiguous().numpy() for x in (features, weight, bias, logits)]
    labels = None if targets is None else targets.numpy()
    key = tuple(None if a is None else (a.shape, a.tobytes()) for a in (*arrays, labels))
    key += (temperature, include_bias, norm_power)
    if key not in _CACHE:
        with mpmath.workdps(_WORKING_DIGITS):
            _CACHE[key] = _exact(*arrays, labels, temperature, include_bias, norm_power)
    return _CACHE[key]


def _mpf(row: Sequence[float]) -> list[Any]:
    return [mpmath.mpf(float(x)) for x in row]


def _integers(x: np.ndarray) -> tuple[list[Any], int]:
    """Return the rows of a matrix as Python integers times one power of two, exactly: (rows, exponent).

    Sums and differences of integers are exact and some 20 times as fast as those of mpf.
    """
    mantissa, exponent = np.frexp(x)
    exponent = np.where(x == 0, np.iinfo(np.int32).max, exponent - 53)
    lowest = int(exponent.min(initial=0))
    shift = np.where(x == 0, 0, exponent - lowest)
    integer = np.ldexp(mantissa, 53).astype(np.int64)
    return [
        [a << b for a, b in zip(r, e, strict=True)] for r, e in zip(integer.tolist(), shift.tolist(), strict=True)
    ], lowest


def _exact(
    phi: np.ndarray,
    w: np.ndarray,
    b: np.ndarray | None,
    z: np.ndarray | None,
    labels: np.ndarray | None,
    temperature: float,
    include_bias: bool,
    norm_power: int,
) -> Truth:
    width = w.shape[1]
    t = mpmath.mpf(temperature)
    head = np.column_stack([w, b]) if include_bias and b is not None else w
    # equal rows are found once: classes that share logit and row are counted instead of repeated
    distinct, index = np.unique(head, axis=0, return_inverse=True)
    index = index.reshape(-1).tolist()
    rows, unit = _integers(distinct)
    squares = sum(sum(a * a for a in rows[i]) for i in index)
    frobenius2 = mpmath.ldexp(squares, 2 * unit)

    truth = Truth(0 if labels is None else labels.shape[1])
    for n in range(phi.shape[0]):
        (x,), x_unit = _integers(phi[n : n + 1])
        if z is not None:
            logit = _mpf(z[n])
        else:
            dots = [mpmath.ldexp(sum(map(mul, x, row)), x_unit + unit) for row in rows]  # zip stops at D: no bias here
            logit = (
                [dots[i] for i in index] if b is None else [dots[i] + c for i, c in zip(index, _mpf(b), strict=True)]
            )
        top = max(logit)
        m = logit.index(top)  # the first one
        counts = Counter((v, i) for v, i in zip(logit, index, strict=True) if v != -mpmath.inf)
        e = {v: mpmath.exp((v - top) / t) for v, _ in counts}
        tau = mpmath.fsum(count * e[v] for (v, i), count in counts.items() if (v, i) != (top, index[m]))
        tau += counts[top, index[m]] - 1
        epsilon = tau / (1 + tau)
        p = {v: e[v] / (1 + tau) for v in e}
        norm2 = mpmath.ldexp(sum(map(mul, x, x)), 2 * x_unit)
        scale = (norm2 + 1 if include_bias else norm2) / t**2
        # p_j (1 - p_j): for a top class 1 - p is epsilon, for the others it is at least 1/2
        trace = scale * mpmath.fsum(
            count * p[v] * (epsilon if v == top else 1 - p[v]) for (v, _), count in counts.items()
        )
        by_row: dict[int, Any] = {}  # probability of each distinct row
        for (v, i), count in counts.items():
            by_row[i] = by_row.get(i, 0) + count * p[v]
        runners = [v for j, v in enumerate(logit) if j != m]
        runner = max(runners, default=-mpmath.inf)
        values = {
            "confidence": 1 / (1 + tau),
            "margin": mpmath.inf if runner == -mpmath.inf else (top - runner) / t,
            "one_minus_confidence": epsilon,
            "feature_norm": mpmath.sqrt(norm2),
            "hessian_trace": trace,
            "layerwise": trace * (frobenius2 if norm_power == 2 else mpmath.sqrt(frobenius2)),
            "neuronwise": scale * _variance(by_row, rows, index[m], unit),
        }
        for y in [None] if labels is None else labels[n].tolist():
            truth.prediction.append(m)
            for name, value in values.items():
                truth.exact.setdefault(name, []).append(value)
            if y is None:
                continue
            loss = mpmath.inf if logit[y] == -mpmath.inf else (top - logit[y]) / t + mpmath.log1p(tau)
            truth.exact.setdefault("loss", []).append(loss)
            _gradient(truth, by_row, [row[:width] for row in rows], index[y], unit, t)
    return truth


def _differences(by_row: dict[int, Any], rows: list[Any], i: int) -> tuple[list[list[int]], list[int], Any]:
    """Of the rows that differ from row i: the differences, and p = integer * largest * 2^-_BITS; and the largest p."""
    others = [
        (p, [a - c for a, c in zip(rows[k], rows[i], strict=True)]) for k, p in by_row.items() if rows[k] != rows[i]
    ]
    largest = max((p for p, _ in others), default=mpmath.mpf(0))
    return [d for _, d in others], [int(mpmath.ldexp(p / largest, _BITS)) for p, _ in others], largest


def _variance(by_row: dict[int, Any], rows: list[Any], m: int, unit: int) -> Any:
    """Var_p(w) = sum_j p_j ||d_j||^2 - ||sum_j p_j d_j||^2 over differences d_j = w_j - w_m, which are exact.

    By Var_p(w) >= p_m sum_j p_j ||d_j||^2 and p_m >= 1/C the subtraction costs at most a factor C.
    """
    d, p, largest = _differences(by_row, rows, m)
    if not d:
        return mpmath.mpf(0)
    second = mpmath.ldexp(sum(a * sum(map(mul, v, v)) for a, v in zip(p, d, strict=True)), -_BITS)
    first = [mpmath.ldexp(sum(map(mul, p, component)), -_BITS) for component in zip(*d, strict=True)]
    return mpmath.ldexp(largest * (second - largest * mpmath.fdot(first, first)), 2 * unit)


def _gradient(truth: Truth, by_row: dict[int, Any], rows: list[Any], y: int, unit: int, t: Any) -> None:
    """Norms of sum_j p_j (w_j - w_y) / T, and their conditions."""
    d, p, largest = _differences(by_row, rows, y)
    scale = mpmath.ldexp(largest / t, unit)
    mean = [abs(mpmath.ldexp(sum(map(mul, p, component)), -_BITS)) for component in zip(*d, strict=True)]
    norms = {
        1: mpmath.fsum(mean),
        2: mpmath.sqrt(mpmath.fdot(mean, mean)),
        math.inf: max(mean, default=mpmath.mpf(0)),
    }
    largest_difference = max((abs(a) for v in d for a in v), default=1)
    relative = np.array([[a / largest_difference for a in v] for v in d]).reshape(len(d), rows and len(rows[0]))
    weights = np.array([a / (1 << _BITS) for a in p])
    for ord in ORDS:
        truth.exact.setdefault(GRADIENTS[ord], []).append(norms[ord] * scale)
        condition = 1.0
        if norms[ord]:
            total = float(weights @ np.linalg.norm(relative, ord=ord, axis=1))
            condition = total / float(norms[ord] / largest_difference)
        truth.condition.setdefault(ord, []).append(condition)


# ------------------------------------------------------------------------------------------------------- derivatives
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
        features, weight, bias, logits, temperature, include_bias, norm_power: as :func:`exact`.
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
    rows, unit = _integers(w[first])
    groups = _Groups(head[first].astype(_LONG), count, index, phi.shape[1], include_bias, z is not None, temperature)
    found = []
    for n in range(phi.shape[0]):
        with mpmath.workdps(_WORKING_DIGITS):
            if z is not None:
                logit = _mpf(z[n, first])
            else:
                (x,), x_unit = _integers(phi[n : n + 1])
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
            share = {v: _long(a / (1 + tau)) for v, a in e.items()}
            epsilon = _long(tau / (1 + tau))
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


def _long(x: Any) -> Any:
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


def exact_cross_entropy(logits: Tensor, target: Tensor) -> dict[str, np.ndarray]:
    """Loss -log p_y, its log, log(1 - p_y) and the unit-scale cotangent q - e_y of rows (N, C), from 60 digits.

    Every row needs a class other than its label that is not masked; 1 - p_y = sum_{j != y} p_j is a sum of one sign.
    """
    key = ("cross entropy", tuple(logits.shape), logits.double().numpy().tobytes(), target.numpy().tobytes())
    if key in _CACHE:
        return _CACHE[key]
    found: dict[str, list[Any]] = {"loss": [], "log_loss": [], "log_scale": [], "cotangent": []}
    with mpmath.workdps(_WORKING_DIGITS):
        for row, y in zip(logits.double().tolist(), target.tolist(), strict=True):
            z = _mpf(row)
            top = max(z)
            e = {v: mpmath.exp(v - top) for v in set(z)}
            others = mpmath.fsum(e[v] for j, v in enumerate(z) if j != y)
            total = others + e[z[y]]
            loss = mpmath.inf if e[z[y]] == 0 else mpmath.log1p(others / e[z[y]])
            found["loss"].append(float(loss))
            found["log_loss"].append(_log(loss))
            # log1p where the label is rare: 80 digits of 1 do not hold exp(-10000)
            scale = mpmath.log(others / total) if others < e[z[y]] else -mpmath.log1p(e[z[y]] / others)
            found["log_scale"].append(float(scale))
            found["cotangent"].append([-1.0 if j == y else float(e[v] / others) for j, v in enumerate(z)])
    _CACHE[key] = {name: np.array(values) for name, values in found.items()}
    return _CACHE[key]


def exact_row_norms(x: Tensor, ord: float) -> np.ndarray:
    """L1, L2 or L-infinity norm of every row of a finite (N, K), each rounded once to float64."""
    out = []
    for row in x.double().numpy():
        if ord == math.inf:
            out.append(float(np.abs(row).max(initial=0.0)))
        elif ord == 1:
            out.append(_rounded_once([abs(a) for a in row.tolist()]))
        else:
            (integers,), unit = _integers(row[None])
            with mpmath.workdps(_WORKING_DIGITS):
                out.append(float(mpmath.sqrt(mpmath.ldexp(sum(map(mul, integers, integers)), 2 * unit))))
    return np.array(out)


def _rounded_once(positive: list[float]) -> float:
    try:
        return math.fsum(positive)  # exact, then rounded
    except OverflowError:
        return math.inf
