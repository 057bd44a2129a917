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
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

DIGITS = 60
# 20 working digits above those: sums over 200,000 classes and the one subtraction left (see _variance) take 6 each.
WORKING_DIGITS = DIGITS + 20
_BITS = 280  # of the probabilities as integers, relative to the largest one in their sum: 84 digits
ORDS = (1, 2, math.inf)
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
            with mpmath.workdps(WORKING_DIGITS):
                values = [_log(v) if log else float(v) for v in self.exact[name]]
            self._rounded[name, log] = np.array(values)
        return self._rounded[name, log]

    def weighted_mean(self, name: str, s: Sequence[float], d: float) -> Any:
        """sum_n s_n value_n / d, an mpf."""
        with mpmath.workdps(WORKING_DIGITS):
            return mpmath.fdot((mpmath.mpf(a), v) for a, v in zip(s, self.exact[name], strict=True) if a) / mpmath.mpf(
                d
            )


def _log(value: Any) -> float:
    return float(mpmath.log(value)) if value else -math.inf


def log_of(value: Any) -> float:
    """Natural log of an mpf, to float64."""
    with mpmath.workdps(WORKING_DIGITS):
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
        with mpmath.workdps(WORKING_DIGITS):
            _CACHE[key] = _exact(*arrays, labels, temperature, include_bias, norm_power)
    return _CACHE[key]


def mpf_of(row: Sequence[float]) -> list[Any]:
    return [mpmath.mpf(float(x)) for x in row]


def integers(x: np.ndarray) -> tuple[list[Any], int]:
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
    rows, unit = integers(distinct)
    squares = sum(sum(a * a for a in rows[i]) for i in index)
    frobenius2 = mpmath.ldexp(squares, 2 * unit)

    truth = Truth(0 if labels is None else labels.shape[1])
    for n in range(phi.shape[0]):
        (x,), x_unit = integers(phi[n : n + 1])
        if z is not None:
            logit = mpf_of(z[n])
        else:
            dots = [mpmath.ldexp(sum(map(mul, x, row)), x_unit + unit) for row in rows]  # zip stops at D: no bias here
            logit = (
                [dots[i] for i in index] if b is None else [dots[i] + c for i, c in zip(index, mpf_of(b), strict=True)]
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


def exact_cross_entropy(logits: Tensor, target: Tensor) -> dict[str, np.ndarray]:
    """Loss -log p_y, its log, log(1 - p_y) and the unit-scale cotangent q - e_y of rows (N, C), from 60 digits.

    Every row needs a class other than its label that is not masked; 1 - p_y = sum_{j != y} p_j is a sum of one sign.
    """
    key = ("cross entropy", tuple(logits.shape), logits.double().numpy().tobytes(), target.numpy().tobytes())
    if key in _CACHE:
        return _CACHE[key]
    found: dict[str, list[Any]] = {"loss": [], "log_loss": [], "log_scale": [], "cotangent": []}
    with mpmath.workdps(WORKING_DIGITS):
        for row, y in zip(logits.double().tolist(), target.tolist(), strict=True):
            z = mpf_of(row)
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
            (whole,), unit = integers(row[None])
            with mpmath.workdps(WORKING_DIGITS):
                out.append(float(mpmath.sqrt(mpmath.ldexp(sum(map(mul, whole, whole)), 2 * unit))))
    return np.array(out)


def _rounded_once(positive: list[float]) -> float:
    try:
        return math.fsum(positive)  # exact, then rounded
    except OverflowError:
        return math.inf
