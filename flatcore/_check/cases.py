"""The calls of the battery, and their inputs: from integers alone, the same bits on every machine.

Inputs are multiples of powers of two with at most eight significant bits, so that each of the four dtypes holds them
exactly and float32 forms every logit without rounding, in whatever order: what is compared with the golden answers is
then the engine's arithmetic, and no rounding of its inputs. A row's features are aligned with the row of W of its top
class and scaled until the gap is near the one wanted; given logits have it exactly.

Letters: N rows, D features (K columns of a plain matrix), C classes.
"""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

N = 37
CLASSES = (2, 10, 32, 100, 1500)
WIDTHS = (37, 128, 130)
"""Of rows that start anywhere, of rows that all start at multiples of 16 bytes, and of a tail of two behind those."""
DTYPES = {
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip
GAPS = (0, 17, 104, 1000, 1, 3, 0.25)
"""Gaps of the top two logits, row by row in turn: tied, and where float32 loses p(1 - p), p, and every usual formula."""
NAN_ROW, NAN_LOGIT_ROW, HUGE_ROW, IGNORED_ROW = 5, 6, 36, 7
IGNORED = -100
_HUGE = 11 * 2.0**63  # 1.01e20: its square leaves float32's range; float16 has no such number

MEASURES = (
    "hessian_trace", "layerwise", "layerwise_1", "neuronwise", "feature_gradient_norm_1", "feature_gradient_norm",
    "feature_gradient_norm_inf",
)  # fmt: skip
"""layerwise_1 is layerwise with ``norm_power=1``."""
ORDS = {"feature_gradient_norm_1": 1.0, "feature_gradient_norm": 2.0, "feature_gradient_norm_inf": math.inf}


class Case(NamedTuple):
    """One call: ``stem``, the function behind it, shape, dtype and options; what a stem has not is None."""

    stem: str
    function: str
    width: int  # D, or K; for the cross-entropy C
    dtype: str
    aligned: bool  # the first element's address is a multiple of 16 bytes
    classes: int | None = None
    weight_dtype: str | None = None
    logits: bool = False  # given, not formed from the features
    bias: str | None = None  # "plain", "masked" (a class is taken away), "included" (counts as a parameter)
    temperature: float = 1.0
    reduction: str | None = None
    log: bool = False

    @property
    def name(self) -> str:
        """All of it in a line, as a failure names it."""
        parts = [self.function, f"N={N}"]
        if self.stem in ("row_norms", "unmasked_cross_entropy"):
            parts.append(f"{'K' if self.stem == 'row_norms' else 'C'}={self.width}")
        else:
            parts.append(f"D={self.width} C={self.classes}")
        parts.append(self.dtype if self.weight_dtype in (None, self.dtype) else f"{self.dtype} W={self.weight_dtype}")
        if not self.aligned:
            parts.append("misaligned")
        if self.logits:
            parts.append("logits given")
        if self.bias:
            parts.append(f"bias {self.bias}")
        if self.temperature != 1:
            parts.append(f"T={self.temperature:g}")
        if self.reduction:
            parts.append(f"{'log ' if self.log else ''}{self.reduction}")
        return " ".join(parts)

    @property
    def huge(self) -> bool:
        """Whether one row has a norm of 1e20.

        Not where it would be all there is of a sum, and not where its share in the weight's gradient would hide the
        other rows' (logits from features).
        """
        if self.dtype == "float16":
            return False
        return self.stem != "head_metrics_backward" or (self.log and self.reduction == "none" and self.logits)


# ----------------------------------------------------------------------------------------------------- integers, alike
def integers(seed: str, shape: int | tuple[int, ...], low: int, high: int) -> np.ndarray:
    """Integers from ``low`` to ``high``, int64, by SplitMix64 of a seed's checksum and an element's number."""
    count = math.prod(shape) if isinstance(shape, tuple) else shape
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(zlib.crc32(seed.encode()) << 16)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) >> np.uint64(32)  # 32 bits: a span of 256 divides them to 1e-7
    return ((z % np.uint64(high - low + 1)).astype(np.int64) + low).reshape(shape)


# ------------------------------------------------------------------------------------------------------------ a design
def covering(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few rows in which every value of each factor meets every value of each other one.

    Greedy: a row starts with the first pair that has not met; then factor by factor it takes the value that adds most,
    of equal ones the one that was taken least often. 21 rows for ``head_metrics`` (20 is the least: 5 sizes times 4 dtypes),
    36 for the gradients (35: 7 measures times 5 sizes).
    """
    names = list(factors)
    places = {name: range(len(factors[name])) for name in names}
    left = {
        (a, i, b, j): None for a, b in itertools.combinations(names, 2) for i in places[a] for j in places[b]
    }  # in order
    used = {(name, i): 0 for name in names for i in places[name]}
    rows = []
    while left:
        a, i, b, j = next(iter(left))
        row = {a: i, b: j}
        for name in sorted(set(names) - {a, b}, key=lambda name: (-len(factors[name]), names.index(name))):

            def gain(k: int, name: str = name, row: dict[str, int] = row) -> tuple[int, int]:
                met = sum(_pair(names, name, k, other, at) in left for other, at in row.items())
                return met, -used[name, k]

            row[name] = max(places[name], key=gain)
        for one, two in itertools.combinations(names, 2):
            left.pop((one, row[one], two, row[two]), None)
        for name in names:
            used[name, row[name]] += 1
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


def _pair(names: list[str], a: str, i: int, b: str, j: int) -> tuple[str, int, str, int]:
    return (a, i, b, j) if names.index(a) < names.index(b) else (b, j, a, i)


@functools.cache
def battery_cases() -> tuple[Case, ...]:
    """The battery: 97 calls on each path of each backend, in which every two choices of a call meet."""
    places = [(37, True), (128, True), (130, True), (128, False)]
    shared = {"classes": CLASSES, "place": places, "dtype": tuple(DTYPES), "logits": (False, True)}
    cases = []
    for row in covering(
        shared | {"bias": (None, "plain", "masked"), "temperature": (1.0, 2.0), "weight": (None, "float32")}
    ):
        cases.append(_head("head_metrics", "head_metrics", row, weight_dtype=row["weight"]))
    for row in covering(
        {"measure": MEASURES} | shared
        | {"bias": (None, "masked", "included"), "temperature": (1.0, 0.5), "reduction": ("mean", "sum", "none"),
           "log": (True, False)}
    ):  # fmt: skip
        cases.append(_head("head_metrics_backward", row["measure"], row, reduction=row["reduction"], log=row["log"]))
    for row in covering({"place": [*places, (1500, True)], "dtype": tuple(DTYPES)}):
        width, aligned = row["place"]
        cases.append(Case("row_norms", "row_norms", width, row["dtype"], aligned))
    for row in covering(
        {"classes": CLASSES, "dtype": tuple(DTYPES), "reduction": ("mean", "sum", "none"), "aligned": (True, False)}
    ):
        name = "unmasked_cross_entropy"
        cases.append(
            Case(name, name, row["classes"], row["dtype"], row["aligned"], logits=True, reduction=row["reduction"])
        )
    return tuple(cases)


def _head(stem: str, function: str, row: dict[str, Any], **options: Any) -> Case:
    width, aligned = row["place"]
    bias = row["bias"]
    if bias == "included" and function in ORDS:
        bias = "plain"  # a gradient with respect to the features does not count it
    return Case(
        stem, function, width, row["dtype"], aligned, row["classes"], logits=row["logits"], bias=bias,
        temperature=row["temperature"], **options,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the inputs
class Inputs(NamedTuple):
    """Arguments of a call in float64, as every dtype holds them; what a call has not is None."""

    features: np.ndarray  # (N, D); the matrix of row norms
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    logits: np.ndarray | None = None
    target: np.ndarray | None = None
    upstream: np.ndarray | None = None


@functools.lru_cache(maxsize=1)
def inputs_of(case: Case) -> Inputs:
    """Make the inputs of a call."""
    if case.stem == "row_norms":
        x = integers(case.name, (N, case.width), -127, 127) / 16
        x[NAN_ROW, -1] = math.nan
        if case.huge:
            x[HUGE_ROW, case.width // 2] = _HUGE
        return Inputs(x)
    if case.stem == "unmasked_cross_entropy":
        z, order = _logits(case.name, case.width)
        if case.width > 2:
            z[np.arange(N), order[:, -1]] = -math.inf
        target = _labels(order[:, :-1] if case.width > 2 else order)
        z[NAN_ROW] = math.nan  # ignored: it counts as nothing, whatever stands there
        target[NAN_ROW] = IGNORED
        return Inputs(z, target=target, upstream=_upstream(case))
    return _head_inputs(case)


def _head_inputs(case: Case) -> Inputs:
    C, D = case.classes or 0, case.width
    w = integers(f"W {case.name}", (C, D), -127, 127)
    if C > 2:
        w[C // 2] = w[0]  # two classes of one row, and a third of nearly the same
        w[1] = w[0]
        w[1, 0] += 1 if w[0, 0] < 0 else -1
    if case.huge:
        w[:, 3] = 0  # so that the entry of 1e20 takes no part in a logit
    b = None
    if case.bias:
        b = integers(f"b {case.name}", (C,), -16, 16) / 4
        if C > 2:
            b[C // 2] = b[0]
        if case.bias == "masked" and C > 2:
            b[C - 1] = -math.inf
    if case.logits:
        x = integers(f"x {case.name}", (N, D), -31, 31) / 8
        z, order = _logits(case.name, C, meet=True)
        if case.bias == "masked" and C > 2:
            z[np.arange(N), order[:, -1]] = -math.inf
            order = order[:, :-1]
        if case.stem == "head_metrics":
            z[NAN_LOGIT_ROW, C - 1] = math.nan
    else:
        x, order = _features(case, w, b)
        z = None
    target = _labels(order)
    if case.function in ORDS and C > 2:
        # a label with a twin at the top: by the twin's row the derivative is p over a norm that may be exp(-1000)
        other = np.array([next(j for j in row if j not in (0, 1, C // 2)) for row in order])
        target = np.where(np.isin(target, (0, 1, C // 2)), other, target)
    target[IGNORED_ROW] = IGNORED
    x[NAN_ROW, -1] = math.nan
    if case.stem == "head_metrics_backward":
        target[NAN_ROW] = IGNORED  # else nothing but NaN is left of W's gradient, and of a mean
    if case.huge:
        x[HUGE_ROW, 3] = _HUGE
    return Inputs(x, w / 64, b, z, target, _upstream(case))


def _features(case: Case, w: np.ndarray, b: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose top class leads by about the gap wanted, and each row's classes from the top down."""
    C, D = w.shape
    top = integers(f"top {case.name}", N, 0, C - 1)
    tied = np.arange(N) % len(GAPS) == 0
    top = np.where(tied, 0, top)
    x = w[top] // 32 + integers(f"x {case.name}", (N, D), -2, 2)  # of three bits and a sign
    x[x == 0] = 1
    if C == 2:  # no copies: orthogonal to the difference of the two rows, but for a common factor
        difference = w[0] - w[1]
        x[tied] = 0
        x[tied, 0], x[tied, D - 1] = difference[D - 1], -difference[0]
    shift = np.zeros(C) if b is None else b
    scale = np.ones(N)
    for n, gap in enumerate(np.resize(GAPS, N)):
        z = _products(x[n], w) / 64
        best = int(z.argmax())
        alike = (0, 1, C // 2) if C > 2 and best in (0, 1, C // 2) else (best,)
        lead = z[best] - np.delete(z, alike).max() if gap else 1.0
        exact = (gap or 1.0) * case.temperature / lead
        power = math.floor(math.log2(exact))
        scale[n] = 2.0**power * math.floor(exact / 2.0**power * 4) / 4
    x = x * scale[:, None]
    z = np.array([_products(row, w) for row in x]) / 64 + shift
    order = np.argsort(-z, axis=1, kind="stable")
    alive = C - int((shift == -math.inf).sum())
    return x, order[:, :alive]


def _products(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """W x, without a library's product: every machine has the same bits."""
    return (w * x).sum(axis=1)


def _logits(seed: str, C: int, meet: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Logits with the gaps, and each row's classes from the top down; every second row falls off steeply.

    ``meet``: in some rows the top two are the classes of one row of W, or of nearly one.
    """
    keys = integers(f"order {seed}", (N, C), 2, 2**31)
    if meet and C > 2:
        n = np.arange(N)
        keys[n % len(GAPS) == 0, 0], keys[n % len(GAPS) == 0, C // 2] = 0, 1
        keys[n % len(GAPS) == 4, 1], keys[n % len(GAPS) == 4, 0] = 0, 1
    order = np.argsort(keys, axis=1, kind="stable")
    below = -integers(f"z {seed}", (N, C), 0, 127) * np.where(np.arange(N) % 2, 0.125, 1.0)[:, None]
    below[:, 0], below[:, 1] = np.resize(GAPS, N), 0.0
    below = np.concatenate([below[:, :2], -np.sort(-below[:, 2:], axis=1)], axis=1)
    z = np.zeros((N, C))
    np.put_along_axis(z, order, below, axis=1)
    return z, np.argsort(-z, axis=1, kind="stable")


def _labels(order: np.ndarray) -> np.ndarray:
    """The top class, the runner-up, and another one, in turn."""
    place = np.array([0, 1, order.shape[1] - 1])[np.arange(N) // len(GAPS) % 3]
    return order[np.arange(N), np.minimum(place, order.shape[1] - 1)].astype(np.int64)


def _upstream(case: Case) -> np.ndarray | None:
    if case.reduction is None:
        return None
    scale = 1.0
    if case.dtype == "float16" and case.stem == "head_metrics_backward" and not case.log:
        scale = 2.0**-24 if case.function == "layerwise" else 2.0**-12  # values of 1e9 and more: in its range
    if case.reduction != "none":
        return np.array(1.5 * scale)
    return integers(f"upstream {case.name}", N, 1, 15) / 4 * np.where(np.arange(N) % 3, scale, -scale)


# ---------------------------------------------------------------------------------------------------- what is compared
WHOLE, BUCKETS, SAMPLES = 160, 64, 48
"""A gradient of at most so many entries is compared whole; of a larger one the sums over so many groups of rows, and of
columns, weighted by integers from -3 to 3, and so many single entries, the corners among them."""


def summary(x: np.ndarray, absolute: bool = False) -> np.ndarray:
    """The numbers of an array that are compared: all, or weighted sums and samples (``absolute``: by the weights' size)."""
    if x.size <= WHOLE or x.ndim < 2:
        x = x.reshape(-1)
        if x.size <= WHOLE:
            return x
    weights, at = _weights(x.shape)
    weighted = x * (np.abs(weights) if absolute else weights)
    parts = [x.reshape(-1)[at]]
    for axis in range(x.ndim):
        sums = weighted if x.ndim == 1 else weighted.sum(axis=1 - axis)
        parts.append(np.array([sums[k::BUCKETS].sum() for k in range(min(BUCKETS, sums.size))]))
    return np.concatenate(parts)


@functools.lru_cache(maxsize=8)
def _weights(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The weights of a summary's sums, and the places of its single entries."""
    seed, last = f"summary {'x'.join(map(str, shape))}", math.prod(shape) - 1
    weights = integers(seed, shape, 1, 3) * (2 * integers(seed + " sign", shape, 0, 1) - 1)
    corners = [0, last, shape[-1] - 1, last - shape[-1] + 1]
    return weights, np.concatenate([corners, integers(seed + " at", SAMPLES, 0, last)])


# ------------------------------------------------------------------------------------------------------------- tensors
def tensor(x: np.ndarray | None, dtype: torch.dtype, device: torch.device, aligned: bool = True) -> Tensor | None:
    """The numbers in a dtype on a device; ``aligned=False`` begins one element behind a multiple of 16 bytes."""
    if x is None:
        return None
    values = torch.from_numpy(np.array(x, dtype=np.float64)).to(dtype)
    if aligned:
        return values.to(device)
    room = torch.zeros(values.numel() + 1, dtype=dtype, device=device)[1:]
    return room.view(values.shape).copy_(values)
