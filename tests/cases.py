"""The one list of problems: each is a head, some rows, and the labels every row is tried with.

Letters: N rows, D features, C classes, K labels per row. Values are held in float64; ``Case.at`` rounds them to the
dtypes under test, and the truth is always that of the rounded values.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

GAPS = (0, 0.3, 1, 5, 10, 15, 16.9, 17.3, 20, 40, 88, 103.9, 105, 250, 700, 1000, 10000)
CLASSES = (1, 2, 3, 10, 142, 1000)
# ragged on purpose: one below, at and one above the 4, 8 and 16 lanes of the vector units
_WIDTH = {1: 3, 2: 5, 3: 7, 4: 8, 10: 17, 142: 9, 300: 15, 1000: 6}


@dataclass(frozen=True)
class Case:
    """A problem: ``features`` (N, D), ``weight`` (C, D), ``bias`` (C,), ``logits`` (N, C), ``targets`` (N, K)."""

    name: str
    features: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    logits: Tensor | None = None
    temperature: float = 1.0

    def at(self, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Case:
        """Round features and logits to ``dtype``, weight and bias to ``weight_dtype`` (the same if None)."""
        head = weight_dtype or dtype
        return replace(
            self,
            features=self.features.to(dtype),
            weight=self.weight.to(head),
            bias=None if self.bias is None else self.bias.to(head),
            logits=None if self.logits is None else self.logits.to(dtype),
        )

    def arguments(self) -> dict[str, Any]:
        """Arguments of the public functions, each row repeated for its K labels."""
        k = self.targets.shape[1]
        return {
            "features": self.features.repeat_interleave(k, dim=0),
            "linear_weight": self.weight,
            "target": self.targets.flatten(),
            "linear_bias": self.bias,
            "logits": None if self.logits is None else self.logits.repeat_interleave(k, dim=0),
            "temperature": self.temperature,
        }

    def __repr__(self) -> str:
        return self.name


CASES: list[Case] = []


def _case(*parameters: Any) -> Callable:
    """Add the case that the function builds for each parameter; its random numbers depend on its name alone."""

    def add(build: Callable[..., Case]) -> Callable[..., Case]:
        for parameter in parameters:
            stem = build.__name__.strip("_").replace("_", "-")
            values = parameter if isinstance(parameter, tuple) else (parameter,)
            name = "-".join([stem, *(str(v) for v in values)])
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            CASES.append(replace(build(generator, *values), name=name))
        return build

    return add


# ------------------------------------------------------------------------------------------------------- ingredients
def _randn(g: torch.Generator, *shape: int) -> Tensor:
    """Draw normal numbers that float32 holds: the same truth then serves float32 and float64."""
    return torch.randn(*shape, generator=g).double()


def _grid(x: Tensor, step: float) -> Tensor:
    return (x / step).round() * step


def _places(g: torch.Generator, n: int, classes: int) -> Tensor:
    """Draw an order of the classes for each row, (n, C): first the top class, then the runner-up, then the others."""
    return torch.stack([torch.randperm(classes, generator=g) for _ in range(n)])


def _gap_logits(g: torch.Generator, classes: int, gaps: tuple[float, ...], order: Tensor) -> Tensor:
    """One row per gap between the top two; the others lie from 0 to some tens below the runner-up."""
    n = len(gaps)
    z = -torch.cat([torch.zeros(n, 1), 6 * torch.rand(n, max(classes - 2, 0), generator=g) ** 2], dim=1)[
        :, : classes - 1
    ]
    z[:, 1::3] *= 7
    top = torch.tensor(gaps).unsqueeze(1)
    ranked = torch.cat([top, z], dim=1) + torch.rand(n, 1, generator=g).round(decimals=1)
    return torch.zeros(n, classes).scatter_(1, order, ranked).double()


def _labels(order: Tensor) -> Tensor:
    """Take the top class, the runner-up and another class of each row, as far as there are so many."""
    classes = order.shape[1]
    return order[:, sorted({0, min(1, classes - 1), classes - 1})]


def _head(g: torch.Generator, classes: int) -> Tensor:
    return _randn(g, classes, _WIDTH[classes])


def _given(g: torch.Generator, classes: int, logits: Tensor, order: Tensor, **changes: Any) -> Case:
    """Logits given: features and head only enter by their norms and differences."""
    n = logits.shape[0]
    case = Case("", _randn(g, n, _WIDTH[classes]), _head(g, classes), _labels(order), logits=logits.float().double())
    return replace(case, **changes)


def _on_grid(g: torch.Generator, classes: int, logits: Tensor, order: Tensor) -> Case:
    """Features and head whose float32 logits are exactly those given (on the 1/64 grid), in any order of summation.

    One feature per row selects, through a power of two, the row's own column of W; the rest is small noise on a grid.
    """
    n, width = logits.shape[0], _WIDTH[classes]
    noise = _grid(_randn(g, n, width), 1 / 4)
    phi = torch.cat([noise, torch.eye(n, dtype=torch.float64) * 2], dim=1)
    w = _grid(_randn(g, classes, width), 1 / 8)
    column = (_grid(logits, 1 / 64) - noise @ w.T).T / 2  # (C, n), on the 1/128 grid
    return Case("", phi, torch.cat([w, column], dim=1), _labels(order))


def _from_features(g: torch.Generator, classes: int, weight: Tensor, gaps: tuple[float, ...], **changes: Any) -> Case:
    """Random features, each row scaled so that its top logit is ahead of the next other one by the gap asked for.

    Of 16 directions the one with the widest gap is taken: the others need longer features, and so say less about a gap.
    """
    n = len(gaps)
    phi = _randn(g, 16, n, weight.shape[1])
    z = phi @ weight.T
    top = z.amax(dim=-1, keepdim=True)
    gap = (top - z).masked_fill(top - z < 1e-6 * top.abs(), math.inf).amin(dim=-1)
    best = gap.masked_fill(gap == math.inf, 1.0).argmax(dim=0)
    phi, gap = phi[best, torch.arange(n)], gap[best, torch.arange(n)]
    wanted = torch.tensor(gaps, dtype=torch.float64)
    phi = (phi * torch.where((wanted > 0) & (gap < math.inf), wanted / gap, 1.0).unsqueeze(1)).float().double()
    order = (phi @ weight.T).argsort(dim=1, descending=True)
    return replace(Case("", phi, weight, _labels(order)), **changes)


# ---------------------------------------------------------------------------------------------------------- the list
@_case(*CLASSES)
def _logits(g: torch.Generator, classes: int) -> Case:
    order = _places(g, len(GAPS), classes)
    return _given(g, classes, _gap_logits(g, classes, GAPS, order), order)


@_case(*CLASSES)
def _grid_features(g: torch.Generator, classes: int) -> Case:
    order = _places(g, len(GAPS), classes)
    return _on_grid(g, classes, _gap_logits(g, classes, GAPS, order), order)


@_case(*CLASSES)
def _features(g: torch.Generator, classes: int) -> Case:
    return _from_features(g, classes, _head(g, classes), GAPS)


@_case(2, 3, 10, 142)
def _features_in_float64(g: torch.Generator, classes: int) -> Case:
    """Values that use all 53 bits."""
    weight = torch.randn(classes, _WIDTH[classes], generator=g, dtype=torch.float64)
    case = _from_features(g, classes, weight, GAPS)
    return replace(case, features=case.features * (1 + 2.0**-30 * torch.rand(1, generator=g, dtype=torch.float64)))


@_case(*((c, o) for c in (2, 3, 10, 142, 1000) for o in (-30000, 30000)))
def _logits_with_offset(g: torch.Generator, classes: int, offset: int) -> Case:
    gaps = GAPS if classes < 1000 else GAPS[::3]
    order = _places(g, len(gaps), classes)
    return _given(g, classes, _grid(_gap_logits(g, classes, gaps, order), 1 / 64) + offset, order)


@_case(*((c, o) for c in (2, 3, 10, 142) for o in (-30000, 30000)))
def _grid_features_with_offset(g: torch.Generator, classes: int, offset: int) -> Case:
    order = _places(g, len(GAPS), classes)
    case = _on_grid(g, classes, _gap_logits(g, classes, GAPS, order), order)
    return replace(case, bias=torch.full((classes,), float(offset), dtype=torch.float64))


@_case(2, 3, 10, 142, 1000)
def _ties_at_the_top(g: torch.Generator, classes: int) -> Case:
    """2, 3, half and all classes tied, the others 0, 5, 20, 100, 1000 below."""
    rows = [
        (k, gap) for k in sorted({2, min(3, classes), max(2, classes // 2), classes}) for gap in (0.5, 5, 20, 100, 1000)
    ]
    order = _places(g, len(rows), classes)
    ranked = torch.stack([-gap * (torch.arange(classes) >= k) for k, gap in rows]).double()
    ranked = ranked - 0.25 * torch.rand(ranked.shape, generator=g) * (ranked < 0)
    return _given(g, classes, torch.zeros_like(ranked).scatter_(1, order, ranked), order)


@_case(2, 3, 10, 142, 1000)
def _absent_classes(g: torch.Generator, classes: int) -> Case:
    """Logits of -inf: the runner-up, the last label (a masked target), a third at random, all but two, all but one."""
    gaps = (0, 0.3, 5, 17.3, 40, 105, 1000, 10000)
    order = _places(g, 5 * len(gaps), classes)
    z = _gap_logits(g, classes, gaps * 5, order)
    rank = torch.zeros_like(order).scatter_(1, order, torch.arange(classes).expand_as(order))
    kind = torch.arange(5).repeat_interleave(len(gaps)).unsqueeze(1)
    at_random = (torch.rand(z.shape, generator=g) < 0.3) & (rank > 0)
    masked = [(rank == 1) & (classes > 2), (rank == classes - 1) & (classes > 2), at_random, rank > 1, rank > 0]
    absent = torch.stack([m.expand_as(rank) for m in masked]).gather(0, kind.expand_as(rank).unsqueeze(0)).squeeze(0)
    return _given(g, classes, z.masked_fill(absent, -math.inf), order)


def _masked_bias(g: torch.Generator, classes: int) -> Tensor:
    bias = _randn(g, classes)
    bias[torch.randperm(classes, generator=g)[: classes // 3]] = -math.inf
    return bias


@_case(3, 10, 142)
def _absent_by_bias(g: torch.Generator, classes: int) -> Case:
    return _from_features(g, classes, _head(g, classes), GAPS, bias=_masked_bias(g, classes))


@_case(2, 3, 10, 142, 1000)
def _features_and_bias(g: torch.Generator, classes: int) -> Case:
    return _from_features(g, classes, _head(g, classes), GAPS[:-1], bias=_randn(g, classes))


def _top_two(g: torch.Generator, classes: int) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
    """Rows in which classes 0 and 1 are the top two (in either order), and every other is far below both."""
    rows = [(a, b) for a in (0.0, 0.3, 5.0, 17.3, 105.0) for b in (1.0, 16.9, 40.0, 250.0, 10000.0)]
    order = _places(g, len(rows), classes)
    rest = order[order > 1].view(len(rows), classes - 2)
    first = torch.tensor([[n % 2, 1 - n % 2] for n in range(len(rows))])
    order = torch.cat([first, rest], dim=1)
    z = _gap_logits(g, classes, tuple(a for a, _ in rows), order)
    # the others lie below the runner-up by the second gap
    others = torch.zeros_like(z).scatter_(1, rest, 1.0)
    return z - others * torch.tensor([[b] for _, b in rows], dtype=torch.float64), order, rows


@_case(3, 10, 142, 1000)
def _top_two_rows_equal(g: torch.Generator, classes: int) -> Case:
    z, order, _ = _top_two(g, classes)
    case = _given(g, classes, z, order)
    weight = case.weight.clone()
    weight[1] = weight[0]
    return replace(case, weight=weight)


@_case(*((c, s) for c in (2, 3, 10, 142, 1000) for s in (1e-2, 1e-4, 2.0**-22)))
def _top_two_rows_nearly_equal(g: torch.Generator, classes: int, distance: float) -> Case:
    z, order, _ = _top_two(g, classes)
    if classes == 1000:
        z, order = z[::3], order[::3]
    case = _given(g, classes, z, order)
    weight = case.weight.clone()
    weight[1] = weight[0]
    weight[1, 2] = (weight[0, 2] * (1 + distance)).float().double()
    return replace(case, weight=weight)


@_case(4, 10, 142)
def _rows_repeated(g: torch.Generator, classes: int) -> Case:
    """Half of the head's rows are copies of the other half."""
    order = _places(g, len(GAPS), classes)
    case = _given(g, classes, _gap_logits(g, classes, GAPS, order), order)
    return replace(case, weight=case.weight[torch.arange(classes) // 2])


@_case(3, 10, 142)
def _features_rows_repeated(g: torch.Generator, classes: int) -> Case:
    """Tied from features: the top two logits tie wherever the top row has a copy."""
    return _from_features(g, classes, _head(g, classes)[torch.arange(classes) // 2], GAPS)


@_case(*((c, s) for c in (2, 3, 10, 142, 1000) for s in (1e2, 1e4)))
def _common_part(g: torch.Generator, classes: int, size: float) -> Case:
    """All rows of the head share a part far larger than their differences."""
    gaps = GAPS if classes < 1000 else GAPS[::4]
    order = _places(g, len(gaps), classes)
    case = _given(g, classes, _gap_logits(g, classes, gaps, order), order)
    common = size * torch.randn(1, _WIDTH[classes], generator=g, dtype=torch.float64)
    return replace(case, weight=(case.weight + common).float().double())


@_case(3, 10, 142)
def _features_common_part(g: torch.Generator, classes: int) -> Case:
    weight = (_head(g, classes) + 100 * _randn(g, 1, _WIDTH[classes])).float().double()
    return _from_features(g, classes, weight, GAPS[:-2])


@_case(*((c, t) for c in (2, 3, 10, 142) for t in (0.07, 0.5, 3.0)))
def _temperature(g: torch.Generator, classes: int, temperature: float) -> Case:
    order = _places(g, len(GAPS), classes)
    return _given(g, classes, _gap_logits(g, classes, GAPS, order), order, temperature=temperature)


@_case(3, 10, 142)
def _features_temperature(g: torch.Generator, classes: int) -> Case:
    return _from_features(g, classes, _head(g, classes), GAPS, temperature=1.7, bias=_randn(g, classes))


@_case((17, 301), (5, 1025), (64, 64), (255, 12), (256, 33), (257, 12), (300, 15), (1025, 3), (1500, 3))
def _wide(g: torch.Generator, classes: int, width: int) -> Case:
    """Larger heads, on both sides of the fused path's default limits, and of more than one block of 1024 classes."""
    weight = _randn(g, classes, width) / math.sqrt(width)
    return _from_features(g, classes, weight, (0.3, 5, 16.9, 20, 105))


@_case(*((c, s) for c in (3, 10, 142) for s in (1e20, 1e-25)))
def _extreme_features(g: torch.Generator, classes: int, size: float) -> Case:
    """||phi||^2 leaves float32's range; the logits are given."""
    gaps = (0.3, 17.3, 105)
    order = _places(g, len(gaps), classes)
    case = _given(g, classes, _gap_logits(g, classes, gaps, order), order)
    return replace(case, features=(case.features * size).float().double())


@_case(*((c, s) for c in (3, 10, 142) for s in (1e20, 1e-25)))
def _extreme_head(g: torch.Generator, classes: int, size: float) -> Case:
    """||w_j - w_k||^2 leaves float32's range; the logits are given."""
    gaps = (0.3, 17.3, 105)
    order = _places(g, len(gaps), classes)
    case = _given(g, classes, _gap_logits(g, classes, gaps, order), order)
    return replace(case, weight=(case.weight * size).float().double())


BY_NAME = {case.name: case for case in CASES}
