"""The one source of tolerances, and the one comparator."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_NARROW = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0.0, torch.float64: 0.0}
_NUMPY: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}

# By how much the log of a value moves, at most, when no difference of two logits moves by more than 1. Each
# p_j = 1/sum_k exp(z_k - z_j) then moves by a factor within exp(+-1), and so do the odds tau and the loss (log(1 + x)'s
# logarithmic derivative x/((1 + x) log(1 + x)) is at most 1); log eps = log tau - log1p(tau) by less.
# sum_j p_j (1 - p_j) = sum_{j != k} p_j p_k and Var_p(w) = 1/2 sum_jk p_j p_k ||w_j - w_k||^2 are sums of one sign over
# products of two p: 2.
_SLOPE = {
    "one_minus_confidence": 1.0,
    "feature_norm": 0.0,
    "hessian_trace": 2.0,
    "layerwise": 2.0,
    "neuronwise": 2.0,
}


class Bound(NamedTuple):
    """What ``|got - truth|`` may be: ``absolute + relative * |truth|``."""

    absolute: Any
    relative: Any

    def __add__(self, other: Bound) -> Bound:  # type: ignore[override]  # not the tuples' join
        """Bound of the difference of two computed values."""
        return Bound(self.absolute + other.absolute, self.relative + other.relative)


def logit_error(
    features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, dtype: torch.dtype
) -> np.ndarray:
    """Bound on the error of a difference of two logits that were computed from features, (N,).

    0 where every partial sum of every logit is exact, whatever the order: all products phi_d w_jd and the bias are
    multiples of a power of two, and the sum of their sizes is at most 2^24 (2^53) times it. Otherwise the dot product's
    own rounding, 2 (2 sqrt(D) + 4) u max_j(sum_d |phi_d w_jd| + |b_j|), u = 2^-24 (2^-53); over T.
    """
    phi, w = features.double().numpy(), weight.double().numpy()
    b = np.zeros(w.shape[0]) if bias is None else bias.double().numpy()
    b = np.where(np.isfinite(b), b, 0.0)
    u = _UNIT[dtype]
    size = (np.abs(phi) @ np.abs(w).T + np.abs(b)).max(axis=1)
    # a product's lowest bit is the product of the factors' lowest bits
    products = _lowest_bit(phi) * _lowest_bit(w).min(axis=0, initial=math.inf)
    quantum = np.minimum(products.min(axis=1, initial=math.inf), _lowest_bit(b).min())
    bound = 2 * (2 * math.sqrt(phi.shape[1]) + 4) * u * size / temperature
    return np.where(size * u <= quantum, 0.0, bound)


def _lowest_bit(x: np.ndarray) -> np.ndarray:
    """Return the value of the lowest set bit of each entry; inf for 0."""
    mantissa, exponent = np.frexp(np.abs(x))
    integer = np.ldexp(mantissa, 53).astype(np.int64)
    return np.where(x == 0, math.inf, np.ldexp((integer & -integer).astype(np.float64), exponent - 53))


def tolerance(
    field: str,
    truth: Any,
    log_truth: Any,
    dtype: torch.dtype,
    *,
    logit_error: Any = 0.0,
    condition: Any = 1.0,
    oracle_epsilon: Any = None,
    terms: int = 0,
    largest_log: Any = 0.0,
) -> Bound:
    """Every tolerance of the suite, from the result's dtype and the problem; nothing is fitted.

    Args:
        field: a field of HeadMetrics or one of its linear-domain properties, ``log_`` before it for the log domain;
            or ``row_norm``.
        truth: the value in the linear domain, float64.
        log_truth: its natural log.
        dtype: dtype of the result: float32 or float64.
        logit_error: bound on the error of a difference of two logits (0 for given logits), from :func:`logit_error`.
        condition: of the feature gradient, see ``oracles.Truth``.
        oracle_epsilon: 1 - p_max, where the truth is the float64 autograd Hessian's, which has an error of its own.
        terms: length of the sum, for ``row_norm``.
        largest_log: where logs are added in float32, as the reference does on devices that are slow in float64: the largest
            of those that a log is the sum of.

    float32, given exact logits: a log within 4e-6 + 4 units in its last place. 4e-6 is 67 roundings of 2^-24, which the
    two exponentials, the sums over classes and the logs share; the units in the last place are those of subtracting
    logs of up to 10,000, where one unit is 1e-3 (of the largest log, where they are added in float32). A linear value is
    exp of its log, so the same bound is its relative error; below the smallest normal number the format has no relative
    accuracy to give, there the absolute error stays below that.
    float64: 1e-12 relative to max(1, |log|), about 4,500 roundings, which also holds the 2^-53 |log| of the log itself.

    From features the logits' own error comes on top, see ``_moved`` and ``_SLOPE``. Gradient: a relative error e of the
    p_j moves the norm by condition * e; conditions up to 8 are within the 67 roundings, above each further unit adds 8
    roundings (2 for exp, 2 for its argument, 4 for sums).
    Margin: a difference of two logits, so their error is absolute there.

    row_norm: one rounding of the result and one of what it was formed from, on sums kept in float64: 2 units, and
    ``terms`` units of float64 for the sum.
    """
    unit = _UNIT[dtype]
    if field == "row_norm":
        return Bound(0.0, 2 * unit + (terms + 4) * _UNIT[torch.float64])
    is_log, name = field.startswith("log_"), field.removeprefix("log_")
    log = np.abs(np.where(np.isfinite(log_truth), log_truth, 0.0))
    if dtype == torch.float32:
        log = np.maximum(log, largest_log)
        base = 4e-6 + 4 * np.spacing(log.astype(np.float32)).astype(np.float64)
    else:
        base = 1e-12 * np.maximum(1.0, log)
    base = base + np.maximum(np.asarray(condition) - 8, 0) * 8 * unit
    if oracle_epsilon is not None:
        # its p carry a few roundings of 1 each, and it forms 1 - p: 64, with its sums over blocks of either sign
        base = base + 64 * _UNIT[torch.float64] / np.asarray(oracle_epsilon)
    smallest = float(np.finfo(_NUMPY[dtype]).tiny)
    if name == "margin":
        return Bound(np.asarray(logit_error, dtype=float), base)
    moved = _moved(name, log_truth, np.asarray(logit_error, dtype=float), np.asarray(condition))
    if is_log:
        return Bound(base + moved, 0.0)
    normal = (np.abs(truth) >= smallest) & np.isfinite(truth)
    relative = np.where(normal, base + np.expm1(np.where(normal, moved, 0.0)), 0.0)
    if np.any(relative >= 1):
        raise ValueError(f"{field}: the logits' error bound leaves no digit, so this case would test nothing")
    return Bound(np.where(normal, 0.0, smallest), relative)


def cotangent_tolerance(dtype: torch.dtype) -> Bound:
    """Return what an entry of q - e_y in the logits' dtype may be off.

    float32: 8 units of 2^-24: 4 for exp (argument and polynomial), 2 for sums of 4 of them, 1 each for 1/sum and the
    product. float64: 1e-12, which holds the rounding of a difference of up to 745. Narrower: one rounding more, to their
    own unit. Below the smallest normal number an entry may be 0; float16 has subnormal numbers, half of whose step it is.
    """
    smallest = 2.0**-25 if dtype == torch.float16 else torch.finfo(dtype).tiny
    return Bound(smallest, 1e-12 if dtype == torch.float64 else 8 * _UNIT[torch.float32] + _NARROW[dtype])


def derivative_error(dtype: torch.dtype, classes: int, rows: int, logit_error: Any, measure_error: Any) -> Any:
    """What the terms of a row's gradient may be off, relatively.

    Times ``oracle_derivatives.Derivative.size`` it bounds an entry.

    A term is a product: a probability (or p_j over the measure), and sums over classes of products of two of them. Each
    of these two factors has what :func:`tolerance` gives a log, 4e-6 (1e-12), and moves with the logits: by e^d for a
    probability, e^2d for the measure and for a sum over two of them, with d their error, so by e^5d; e^6d with the
    product that is left. The products over classes, and over rows where a weight's gradient is summed, add a rounding for
    each term, as in :func:`product_tolerance`: not a root of their number, for where many rows of W are equal these
    roundings have one sign. Sums longer than 4096 have to be made of parts.

    On the path of large heads the library forms products with W about its mean row, not with differences to the class that
    counts: there each entry is held to the largest size among those of its row and input, as the zeros of a derivative are.

    ``measure_error``: what the row's value, by which a derivative in the linear domain is multiplied, may be off.
    """
    terms = min(classes, 4096) + min(rows, 4096)
    own = 2 * (4e-6 if dtype == torch.float32 else 1e-12) + (terms + 8) * _UNIT[dtype]
    return own + np.expm1(6 * np.asarray(logit_error, dtype=float)) + np.asarray(measure_error)


def rounded_gradient(truth: Any, allowed: Any, dtype: torch.dtype, computed: torch.dtype, small: Any) -> Any:
    """``allowed`` of a gradient that is given back in ``dtype``: one rounding more, and what the format cannot hold.

    ``computed``: the dtype of the arithmetic. ``small``: the sizes that the entry's terms have beside the row's largest
    derivative by a logit, for a term that is below the smallest normal number of ``computed`` times that may be 0.
    """
    rounding = _UNIT[dtype] if dtype == torch.float32 and computed == torch.float64 else _NARROW[dtype]
    tiny = 2.0**-25 if dtype == torch.float16 else torch.finfo(dtype).tiny
    return allowed + rounding * np.abs(truth) + tiny + torch.finfo(computed).tiny * np.asarray(small)


def product_tolerance(magnitude: Any, terms: int, dtype: torch.dtype) -> Bound:
    """Return what a chain of products seeded with a cotangent may be off: an entry's bound from its absolute terms.

    ``magnitude`` is the same chain over absolute values; every one of its ``terms`` (all sums' lengths together) adds a
    rounding, the cotangent's 8 roundings come on top.
    """
    return Bound((terms + 8) * _UNIT[dtype] * np.asarray(magnitude), 0.0)


def _moved(name: str, log_truth: Any, error: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """How far the log of a value may move when differences of logits are off by up to ``error``."""
    if name in _SLOPE:
        return _SLOPE[name] * error
    if name == "confidence":
        # -log p_m is the loss of the top class, whose log moves by at most the error
        return np.minimum(error, -log_truth * np.expm1(error))
    if name == "loss":
        # its log, and itself, move by at most the error
        size = np.exp(np.clip(np.where(np.isfinite(log_truth), log_truth, 0.0), -700, 700))
        return np.minimum(error, np.log1p(error / size))
    moved = condition * np.expm1(error)
    if np.any(moved >= 1):
        raise ValueError(f"{name}: the logits' error bound leaves no digit, so this case would test nothing")
    return -np.log1p(-moved)


def assert_within(field: str, got: Any, truth: Any, bound: Bound, dtype: torch.dtype | None = None) -> None:
    """Require each value within its bound; NaN fails, infinities and the zeros of the log domain must be equal.

    Args:
        field: named in the message.
        got: tensor or array.
        truth: float64 array of the same shape, without NaN.
        bound: from :func:`tolerance`.
        dtype: the dtype that ``got`` must have; truths beyond its largest number count as infinite.
    """
    got, truth, error, allowed, right = _compared(field, got, truth, bound, dtype)
    if not right.all():
        where = tuple(int(i) for i in np.argwhere(~right)[0])
        raise AssertionError(
            f"{field}: {(~right).sum()} of {right.size} outside their bound; at {where} got {got[where]!r}, "
            f"truth {truth[where]!r}, error {error[where]:.3e}, allowed {allowed[where]:.3e}"
        )


def worst(field: str, got: Any, truth: Any, bound: Bound, dtype: torch.dtype | None = None) -> tuple[float, int]:
    """Return the largest error in units of its bound (inf where it has none to hold), and its place.

    The comparison is that of :func:`assert_within`: above 1, or NaN as inf, is what it refuses.
    """
    got, truth, error, allowed, right = _compared(field, got, truth, bound, dtype)
    if not right.size:
        return 0.0, 0
    ratio = np.where(right, 0.0, math.inf)
    finite = np.isfinite(truth) & np.isfinite(got) & (allowed > 0)
    np.divide(error, allowed, out=ratio, where=finite)
    place = int(ratio.argmax())
    return float(ratio.flat[place]), place


def _compared(field: str, got: Any, truth: Any, bound: Bound, dtype: torch.dtype | None) -> tuple[np.ndarray, ...]:
    if dtype is not None:
        assert got.dtype == dtype, f"{field}: dtype {got.dtype}, not {dtype}"
        largest = float(np.finfo(_NUMPY[dtype]).max)
        truth = np.where(np.abs(truth) > largest, np.copysign(np.inf, truth), truth)
    got = np.asarray(got.detach().double().numpy() if isinstance(got, Tensor) else got, dtype=np.float64)
    truth = np.asarray(truth, dtype=np.float64)
    assert got.shape == truth.shape, f"{field}: shape {got.shape}, not {truth.shape}"
    assert not np.isnan(truth).any(), f"{field}: the truth is NaN"
    finite = np.isfinite(truth)
    allowed = np.broadcast_to(
        np.asarray(bound.absolute + bound.relative * np.abs(np.where(finite, truth, 0.0))), got.shape
    )
    error = np.abs(np.where(finite, got - np.where(finite, truth, 0.0), 0.0))
    right = np.where(finite, error <= allowed, got == truth)  # a comparison with NaN is False
    return got, truth, error, allowed, right


def assert_same(field: str, first: Any, second: Any) -> None:
    """Require bit-for-bit equality of dtype, shape and values; NaN equals NaN here."""
    assert first.dtype == second.dtype and first.shape == second.shape, f"{field}: dtype or shape differ"
    assert torch.equal(first.isnan(), second.isnan()), f"{field}: NaN in different places"
    differ = (first != second) & ~first.isnan()
    assert not differ.any(), f"{field}: {int(differ.sum())} of {first.numel()} values differ"
