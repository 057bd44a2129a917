"""Heads, rows and calls drawn at random, of the kinds that people have: one drawing for hypothesis and for the fuzz command.

What a head of a real network does and ``torch.randn`` never: rows of W that are equal, zero (a padded vocabulary, classes
that were never trained), scaled or permuted copies, a unit in the last place apart, sparse, or all far from the origin;
labels of every integer dtype; rows that count for nothing, with whatever stands in them and whatever comes from upstream.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from hypothesis import strategies as st
from torch import Tensor

NAN, INF = math.nan, math.inf
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABELS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
MEASURES = ("hessian_trace", "layerwise", "neuronwise")
GRADIENT_NORMS = ("feature_gradient_norm_1", "feature_gradient_norm", "feature_gradient_norm_inf")
FUNCTIONS = ("head_metrics", *MEASURES, *GRADIENT_NORMS, "unmasked_cross_entropy", "input_gradients")
KINDS = (
    "sparse", "repeated", "padded", "near", "twins", "scaled", "permuted", "dense", "zero", "equal", "many",
)  # fmt: skip
MOST_CLASSES = 200_000
GAPS = (0.0, 0.3, 1.0, 5.0, 12.0, 17.0, 21.0, 40.0, 90.0, 104.0, 250.0, 700.0, 720.0, 760.0, 1000.0)


class Source(Protocol):
    """Where the choices come from."""

    def integer(self, low: int, high: int) -> int: ...
    def choice(self, options: Sequence[Any]) -> Any: ...


class Drawn:
    """Choices of hypothesis, which then looks for the simplest case that fails: smaller numbers, earlier options."""

    def __init__(self, draw: st.DrawFn):
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def choice(self, options: Sequence[Any]) -> Any:
        return self._draw(st.sampled_from(options))


class Seeded:
    """Choices of a generator: the same ones for the same seed."""

    def __init__(self, seed: str):
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def choice(self, options: Sequence[Any]) -> Any:
        return self._random.choice(options)


@dataclass(frozen=True)
class Call:
    """Arguments of one public function, at their dtypes, and what comes from upstream (None: no gradient is asked for).

    ``target`` holds integer labels (N,), soft targets (N, C) or is None; ``nothing`` marks the rows that count for
    nothing by their label: ignored, or of class weight 0. Only there may features, logits and upstream be NaN or infinite.
    """

    function: str
    kind: str
    features: Tensor
    weight: Tensor
    bias: Tensor | None
    logits: Tensor | None
    target: Tensor | None
    class_weight: Tensor | None
    temperature: float
    ignore_index: int
    include_bias: bool
    norm_power: int
    reduction: str
    log: bool
    upstream: Tensor | None
    nothing: Tensor  # (N,) bool

    def __repr__(self) -> str:
        N, C = self.features.shape[0], self.weight.shape[0]
        return f"{self.function} of a head of kind {self.kind}, N={N} D={self.features.shape[1]} C={C}"


@st.composite
def calls(
    draw: st.DrawFn,
    functions: Sequence[str] = FUNCTIONS,
    dtypes: Sequence[torch.dtype] = FLOATS,
    kinds: Sequence[str] = KINDS,
    classes: int = MOST_CLASSES,
) -> Call:
    """Calls of the functions; the arguments of :func:`draw_call`."""
    return draw_call(Drawn(draw), functions, dtypes, kinds, classes)


def draw_call(
    source: Source,
    functions: Sequence[str] = FUNCTIONS,
    dtypes: Sequence[torch.dtype] = FLOATS,
    kinds: Sequence[str] = KINDS,
    classes: int = MOST_CLASSES,
) -> Call:
    """Draw a call of one of the functions, with features and weight of the dtypes, a head of the kinds, so many classes."""
    function, kind = source.choice(functions), source.choice(kinds)
    dtype = source.choice(dtypes)
    weight_dtype = dtype if source.integer(0, 3) else source.choice(dtypes)
    g = torch.Generator().manual_seed(source.integer(0, 2**31 - 1))
    if function == "unmasked_cross_entropy":
        return _of_logits(source, g, kind, dtype)
    classes = min(classes, 300) if function == "input_gradients" else classes
    weight = _head(source, g, kind, weight_dtype, classes)
    if function == "input_gradients":  # a model: its own weight, in the inputs' dtype
        dtype = weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        weight = weight.to(dtype)
    C, D = weight.shape
    N = source.integer(1, 24 if C <= 700 and D <= 4 else 8 if C <= 300 else 2)
    bias = None
    if function != "input_gradients" and not source.integer(0, 3):
        bias = torch.randint(-8, 9, (C,), generator=g).double() / 8
    include_bias = bias is not None and function in MEASURES and source.choice((True, False))
    if bias is not None and C > 2 and not include_bias and not source.integer(0, 2):
        bias[torch.rand(C, generator=g) < 0.3] = -INF
        bias[0] = 0.0
    temperature = 1.0 if function == "input_gradients" else source.choice((1.0, 1.0, 1.0, 0.5, 3.0, 1.7))
    features = _features(source, g, N, weight, dtype, exact=function == "input_gradients")
    bias = None if bias is None else bias.to(weight_dtype)
    logits = None
    if function != "input_gradients" and C <= 3000 and not source.integer(0, 4):
        logits = _given_logits(source, g, N, C).to(dtype)
    z = logits.double() if logits is not None else features.double() @ weight.double().T
    z = z if bias is None or logits is not None else z + bias.double()
    labels, ignore_index = _labels(source, g, z, weight)
    target, class_weight = labels, None
    norm_power, reduction, log = 2, "none", False
    if function in MEASURES + GRADIENT_NORMS:
        reduction, log = source.choice(("none", "mean", "sum")), source.choice((True, False))
    if function in MEASURES:
        form = source.choice(("none", "hard", "weighted", "soft"))
        if form == "weighted":
            class_weight = torch.randint(0, 5, (C,), generator=g).double() / 2
            class_weight = class_weight.to(source.choice((torch.float32, torch.float64)))
        if form in ("none", "soft"):
            target = None
        if form == "soft" and C <= 3000:
            target = torch.randint(0, 5, (N, C), generator=g).to(torch.float32) / 4
        norm_power = source.choice((2, 1)) if function == "layerwise" else 2
    nothing = torch.zeros(N, dtype=torch.bool)
    if target is not None and not target.is_floating_point():
        nothing = torch.tensor([y == ignore_index for y in target.tolist()])
        if class_weight is not None:
            weightless = [not w and class_weight[y] == 0 for y, w in zip(target.tolist(), nothing, strict=True)]
            nothing = nothing | torch.tensor(weightless)
    if nothing.any() and function != "head_metrics" and function != "input_gradients" and source.choice((True, False)):
        features[nothing, 0] = source.choice((NAN, INF, -INF))
        if logits is not None:
            logits[nothing, 0] = source.choice((NAN, INF, -INF))
    if not source.integer(0, 7):  # column by column in memory
        features, weight = features.T.contiguous().T, weight.T.contiguous().T
        logits = None if logits is None else logits.T.contiguous().T
    upstream = None
    if function in MEASURES + GRADIENT_NORMS and source.integer(0, 4):
        upstream = _upstream(source, g, N if reduction == "none" else 0, dtype, weight_dtype, nothing)
    return Call(
        function, kind, features, weight, bias, logits, target, class_weight, temperature, ignore_index, include_bias,
        norm_power, reduction, log, upstream, nothing,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- heads
def _classes(source: Source, kind: str) -> int:
    if kind == "many":
        return source.choice((5000, 40_000, 200_000))
    # 256 is the fused path's limit, 1024 a block's, 2048 that of the table of distances
    sizes = ((1, 5), (2, 12), (13, 70), (140, 330), (550, 650))
    if not source.integer(0, 39):
        sizes = ((1000, 1050), (2040, 2060), (2900, 3000))
    return source.integer(*source.choice(sizes))


def _rows(source: Source, g: torch.Generator, rows: int, width: int) -> Tensor:
    """Rows of small integers, so that products are exact, or of any numbers."""
    if source.choice((True, False)):
        return torch.randint(-4, 5, (rows, width), generator=g).double()
    return torch.randn(rows, width, generator=g).double() * source.choice((1.0, 0.05, 20.0))


def _head(source: Source, g: torch.Generator, kind: str, dtype: torch.dtype, most: int) -> Tensor:
    if kind == "many" and source.integer(0, 15):
        kind = "repeated"
    C = min(_classes(source, kind), most)
    D = source.choice((1, 2, 3, 4)) if C > 330 else source.integer(1, 40) if C <= 70 else source.integer(1, 16)
    few = min(C, source.choice((1, 2, 3, 5, 12)))
    if kind == "sparse":
        keep = source.choice((0.01, 0.03, 0.1, 0.3))
        w = (torch.randint(-4, 5, (C, D), generator=g) * (torch.rand(C, D, generator=g) < keep)).double()
    elif kind in ("repeated", "many"):
        w = _rows(source, g, few, D)
        skewed = torch.rand(C, generator=g) ** source.choice((1, 4))  # alike often, or one row nearly everywhere
        w = w[(skewed * few).long().clamp(max=few - 1)]
    elif kind == "padded":
        w = torch.zeros(C, D, dtype=torch.float64)
        w[:few] = _rows(source, g, few, D)
        if source.choice((True, False)):
            w[few:] = w[:few].mean(dim=0)
    elif kind == "near":
        base = _rows(source, g, few, D)[torch.randint(few, (C,), generator=g)]
        apart = source.choice((1e-3, 1e-5, 2.0**-22, 2.0**-23))
        w = base * (1 + apart * torch.randint(-2, 3, (C, D), generator=g))
    elif kind == "twins":  # every row twice, the rest dense
        w = _rows(source, g, max(1, C // 2), D)
        w = torch.cat([w, w, w])[:C]
    elif kind == "scaled":
        w = _rows(source, g, few, D)[torch.randint(few, (C,), generator=g)]
        w = w * 2.0 ** torch.randint(-9, 4, (C, 1), generator=g)
    elif kind == "permuted":
        base = _rows(source, g, 1, D)[0]
        w = torch.stack([base[torch.randperm(D, generator=g)] for _ in range(min(C, 64))])
        w = w[torch.randint(w.shape[0], (C,), generator=g)]
    elif kind == "zero":
        w = torch.zeros(C, D, dtype=torch.float64)
    elif kind == "equal":
        w = _rows(source, g, 1, D).expand(C, D).clone()
    else:
        w = _rows(source, g, C, D)
    if not source.integer(0, 5):
        w = w + source.choice((1e1, 1e2, 1e4)) * torch.randint(-3, 4, (1, D), generator=g)
    if source.choice((True, False)):
        w = w[torch.randperm(C, generator=g)]
    return w.clamp(-3e4, 3e4).to(dtype)


def _features(source: Source, g: torch.Generator, N: int, weight: Tensor, dtype: torch.dtype, exact: bool) -> Tensor:
    """Integers, or rows as long as the gap to the next other logit asks for; now and then a row of zeros."""
    D = weight.shape[1]
    x = torch.randint(-4, 5, (N, D), generator=g).double()  # few enough bits for sums that are exact in any order
    if not exact and source.integer(0, 2):
        x = torch.randn(N, D, generator=g).double()
        z = x @ weight.double().T
        below = z.amax(dim=1, keepdim=True) - z
        gap = below.masked_fill(below <= 1e-5 * z.abs().amax(dim=1, keepdim=True), INF).amin(dim=1)
        wanted = torch.tensor([source.choice(GAPS) for _ in range(N)], dtype=torch.float64)
        factor = torch.where((gap < INF) & (gap > 0) & (wanted > 0), wanted / gap, 1.0)
        x = x * torch.where(factor * z.abs().amax(dim=1) < 3e4, factor, 1.0).unsqueeze(1)
        x = torch.where(x.abs().amax(dim=1, keepdim=True) < 3e4, x, 1.0)
    if not source.integer(0, 5):
        x[0] = 0
    return x.to(dtype)


def _given_logits(source: Source, g: torch.Generator, N: int, C: int) -> Tensor:
    """On a grid that every dtype holds, so that ties are many; some classes absent."""
    z = torch.randint(-24, 1, (N, C), generator=g).double() / 4
    top = torch.tensor([source.choice(GAPS) for _ in range(N)], dtype=torch.float64)
    z[torch.arange(N), torch.randint(C, (N,), generator=g)] = top
    if C > 2 and not source.integer(0, 2):
        absent = torch.rand(N, C, generator=g) < 0.3
        absent[:, :2] = False
        z[absent] = -INF
    return z


# -------------------------------------------------------------------------------------------------- labels and upstream
def _labels(source: Source, g: torch.Generator, z: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """Labels of any integer dtype: the top class, its twins, any class, absent ones never; and what is ignored."""
    N, C = z.shape
    finite = z.isfinite() & ~z.isnan()
    order = z.masked_fill(~finite, -INF).argsort(dim=1, descending=True)
    count = finite.sum(dim=1)
    labels = []
    for n in range(N):
        place = source.choice((0, 0, 1, 2, -1))
        labels.append(int(order[n, min(place, int(count[n]) - 1) if place >= 0 else int(count[n]) - 1]))
    twin = (weight[0] == weight).all(dim=1).nonzero().flatten()
    if len(twin) > 1 and not source.integer(0, 2) and all(bool(finite[n, int(twin[-1])]) for n in range(N)):
        labels[0] = int(twin[-1])
    dtype = source.choice(LABELS)
    top = torch.iinfo(dtype).max
    labels = [min(y, top) for y in labels]  # 127 of int8 is a class like another
    labels = [y if bool(finite[n, y]) else int(order[n, 0]) for n, y in enumerate(labels)]
    if max(labels) > top:
        dtype, top = torch.int64, 2**63 - 1
    ignore_index = source.choice((-100, -100, -1, 255, 0, C, 2**31, -(2**63), 2**63 - 1))
    for n in range(N):
        held = ignore_index if torch.iinfo(dtype).min <= ignore_index <= top else None
        wrapped = ignore_index % (top + 1)  # what an unsigned dtype would take it for: a label, or nothing
        what = source.integer(0, 7)
        if what == 0 and held is not None:
            labels[n] = ignore_index
        elif what == 1 and torch.iinfo(dtype).min == 0 and wrapped < C and bool(finite[n, wrapped]):
            labels[n] = wrapped
    return torch.tensor(labels, dtype=dtype), ignore_index


def _upstream(
    source: Source, g: torch.Generator, N: int, dtype: torch.dtype, weight_dtype: torch.dtype, nothing: Tensor
) -> Tensor:
    """(N,), or one number where N is 0; NaN and infinite only in rows that count for nothing."""
    result = torch.float64 if torch.float64 in (dtype, weight_dtype) else torch.float32
    size = source.choice((1.0, 1.0, 1e-6, 1e20, -3.0))
    c = size * (torch.randn(N, generator=g).double() if N else torch.ones((), dtype=torch.float64))
    if N and not source.integer(0, 3):
        c[0] = 0.0
    if N and nothing.any() and source.integer(0, 2):
        c[nothing] = source.choice((NAN, INF, -INF))
    return c.to(result)


# --------------------------------------------------------------------------------------------------- logits on their own
def _of_logits(source: Source, g: torch.Generator, kind: str, dtype: torch.dtype) -> Call:
    """A call of ``unmasked_cross_entropy``; a row needs a class beside its label."""
    N, C = source.integer(1, 8), source.choice((2, 3, 9, 40, 257, 300))
    z = _given_logits(source, g, N, C)
    labels, ignore_index = _labels(source, g, z, torch.zeros(C, 1))
    nothing = torch.tensor([y == ignore_index for y in labels.tolist()])
    z = z.to(dtype)
    if nothing.any() and source.choice((True, False)):
        z[nothing, 0] = source.choice((NAN, INF))
    reduction = source.choice(("none", "mean", "sum"))
    upstream = None
    if source.integer(0, 3):
        upstream = _upstream(source, g, N if reduction == "none" else 0, dtype, dtype, nothing)
    empty = torch.zeros(N, 1)
    return Call(
        "unmasked_cross_entropy", kind, empty, torch.zeros(C, 1), None, z, labels, None, 1.0, ignore_index, False, 2,
        reduction, False, upstream, nothing,
    )  # fmt: skip
