"""What the tests of the torchmetrics share: the metrics beside their functions, rows in batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flatcore
from flatcore.metrics import FeatureGradientNorm, HessianTrace, RelativeFlatness

N, D, C = 200, 6, 5
INF = math.inf

METRICS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "trace": (HessianTrace, flatcore.hessian_trace),
    "layerwise": (RelativeFlatness, flatcore.relative_flatness),
    "neuronwise": (
        lambda **options: RelativeFlatness(measure="neuronwise", **options),
        lambda *a, **options: flatcore.relative_flatness(*a, measure="neuronwise", **options),
    ),
    "norm": (FeatureGradientNorm, flatcore.feature_gradient_norms),
    "norm-inf": (
        lambda **options: FeatureGradientNorm(ord=INF, **options),
        lambda *a, **options: flatcore.feature_gradient_norms(*a, ord=INF, **options),
    ),
}


def data(scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features from doubtful to certain, head, bias, labels of which some are ignored."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, N)[:, None] * scale
    y = torch.randint(C, (N,), generator=g)
    y[::17] = -100
    return x, torch.randn(C, D, generator=g).double(), torch.randn(C, generator=g).double(), y


def batches(rows: Tensor, size: int = 33) -> list[slice]:
    return [slice(i, i + size) for i in range(0, rows.shape[0], size)]


def double(metric: Any) -> Any:
    return metric.set_dtype(torch.float64)
