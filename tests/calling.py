"""What the tests around a call share: a small problem of exact logits, the functions, and comparisons of their results.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flatcore
from flatcore._check.tolerance import assert_same, assert_within, tolerance

N, D, C = 6, 7, 4


def problem(rows: int = N, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D), head (C, D) and labels (N,), one of them ignored.

    Multiples of 1/8 up to 2: products and their sums are exact in every dtype and order, so logits are.
    """
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(C, (rows,), generator=g)
    target[0] = -100
    features, head = (torch.randint(-16, 17, (n, D), generator=g) / 8 for n in (rows, C))
    return features.to(dtype), head.to(dtype), target


def flat(value: Any) -> list[Tensor]:
    return [v for v in (value if isinstance(value, tuple) else (value,)) if v is not None]


def assert_all_same(got: Any, want: Any) -> None:
    got, want = flat(got), flat(want)
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same(f"output {i}", a, b)


def assert_summed_alike(got: Any, want: Any) -> None:
    """Per-sample results bit for bit; one number, the sum of N terms of one sign in float64, to N roundings of it."""
    for a, b in zip(flat(got), flat(want), strict=True):
        if b.dim() > 0:
            assert_same("output", a, b)
        else:
            torch.testing.assert_close(a, b, rtol=2 * 33 * 2.0**-53 + torch.finfo(b.dtype).eps, atol=0.0)


def assert_all_close(got: Any, want: Any) -> None:
    """Two computations from exact logits, each within its own bound, as a log or as a linear value."""
    got, want = flat(got), flat(want)
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if not b.is_floating_point():
            assert_same(f"output {i}", a, b)
            continue
        truth = b.double().numpy()
        bound = tolerance("log_hessian_trace", truth, truth, b.dtype) + tolerance("margin", truth, truth, b.dtype)
        assert_within(f"output {i}", a, truth, bound + bound, b.dtype)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "hessian_trace": lambda x, w, y: flatcore.hessian_trace(x, w, y),
    "hessian_trace-weighted-log": lambda x, w, y: flatcore.hessian_trace(
        x, w, y, weight=w[:, 0].abs(), linear_bias=w[:, 1], include_bias=True, log=True, temperature=0.5
    ),
    "relative_flatness": lambda x, w, y: flatcore.relative_flatness(x, w, y, reduction="sum"),
    "neuronwise": lambda x, w, y: flatcore.relative_flatness(x, w, measure="neuronwise", reduction="none"),
    "feature_gradient_norms": lambda x, w, y: flatcore.feature_gradient_norms(x, w, y, ord=1, reduction="mean"),
    "head_metrics": lambda x, w, y: tuple(flatcore.head_metrics(x, w, y)),
    "head_metrics-without-target": lambda x, w, y: tuple(flatcore.head_metrics(x, w)),
    "row_norms": lambda x, w, y: flatcore.row_norms(x),
}


class Recorder(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
