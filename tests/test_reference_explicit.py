"""Rows whose differences the reference's products with W would round away: classes whose rows of W nearly coincide.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NoReturn

import fuzz
import oracles
import pytest
import torch
from answers import Answers
from strategies import Call
from tracing import Largest

from flatcore import reference
from flatcore._engine.head import Head
from flatcore.reference import DIFFERENTIABLE, FIELDS, arithmetic_in

NEAR = range(3, 9)
"""Classes that nearly coincide, of each row; the differences of two or three are always formed."""
ALL = (1 << len(FIELDS)) - 1
ARITHMETIC = {
    "float64": (torch.float64, None),
    "float32-in-float64": (torch.float32, torch.float64),
    "float32": (torch.float32, torch.float32),
}


def near(distance: float, D: int, C: int, dtype: torch.dtype) -> dict[str, Any]:
    """A row per group of ``NEAR`` classes that have all but exp(-50) of it, and one whose classes are far from each other.

    Classes without a group are of 20 rows of W: the oracle counts equal ones.
    """
    g = torch.Generator().manual_seed(C)
    kinds = torch.randn(20, D, generator=g, dtype=torch.float64)
    kind = torch.arange(C) % 20
    weight, logits = kinds[kind], torch.randn(len(NEAR) + 1, 20, generator=g, dtype=torch.float64)[:, kind]
    order, target = torch.randperm(C, generator=g), []
    for n, k in enumerate(NEAR):
        group, order = order[:k], order[k:]
        base = torch.randn(D, generator=g, dtype=torch.float64)
        weight[group] = base + distance * torch.randn(k, D, generator=g, dtype=torch.float64)
        logits[n, group] = 55 + torch.rand(k, generator=g, dtype=torch.float64)
        target.append(int(group[n % k]))
    features = torch.randn(len(logits), D, generator=g, dtype=torch.float64)
    target = torch.tensor([*target, int(order[0])])
    return {"features": features.to(dtype), "weight": weight.to(dtype), "logits": logits.to(dtype), "target": target}


@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.parametrize("distance", (1e-3, 1e-5, 1e-7))
@pytest.mark.parametrize(
    "C, functions", ((200, ("neuronwise", "layerwise", *oracles.GRADIENTS.values())), (2100, ("neuronwise",)))
)
def test_nearly_equal_rows_are_exact(
    one_thread: None, C: int, functions: tuple[str, ...], distance: float, name: str
) -> None:
    """Values and gradients against 60 digits, with the table of distances and beyond it."""
    dtype, computed = ARITHMETIC[name]
    given, wrong, compared = near(distance, 20, C, dtype), [], 0
    for function in functions:
        call = Call(
            function=function, kind="near", **given, bias=None, class_weight=None, temperature=1.0, ignore_index=-100,
            include_bias=False, norm_power=2, reduction="none", log=True,
            upstream=torch.linspace(-1, 2, len(given["target"]), dtype=dtype),
            nothing=torch.zeros(len(given["target"]), dtype=torch.bool),
        )  # fmt: skip
        with arithmetic_in(computed):
            found = fuzz.run(call, "reference", Answers(call))
        compared += len(found)
        wrong += [f"{function}: {f.quantity}: {f.text}" for f in found if not f.ratio <= 1]
    assert not wrong, "\n".join(wrong)
    assert compared >= 3 * len(functions)


@pytest.mark.parametrize("distance", (1e-2, 1e-4, 1e-6))
def test_a_wide_result_has_its_digits(distance: float) -> None:
    """float64 results of float32 inputs, to 1e-12 of those of the same numbers in float64, which are held to 60 digits."""
    given = near(distance, 20, 2100, torch.float32)
    found = []
    for dtype in (torch.float32, torch.float64):
        x, w, z = (given[name].to(dtype) for name in ("features", "weight", "logits"))
        found.append(reference.head_metrics(Head(x, w, None, z, given["target"]), ALL, True)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def everything(given: Head, dtype: torch.dtype) -> None:
    """All values and gradients."""
    reference.head_metrics(given, ALL, False, dtype=dtype)
    for name in DIFFERENTIABLE:
        upstream = torch.ones(given.features.shape[0])
        reference.head_metrics_backward(upstream, None, given, FIELDS.index(name), (True, True, False, False), dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("C, D", ((100, 64), (1000, 32), (3000, 20)))
def test_no_row_of_a_dense_head_is_done_again(
    monkeypatch: pytest.MonkeyPatch, C: int, D: int, dtype: torch.dtype
) -> None:
    """Rows of every confidence, as flatcore/_bench/inputs.py draws them, a label in ten wrong."""

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("a row is done again")

    monkeypatch.setattr(importlib.import_module("flatcore.reference.explicit").Explicit, "__init__", refuse)
    g = torch.Generator().manual_seed(C)
    weight = torch.randn(C, D, generator=g) / math.sqrt(D)
    target = torch.randint(C, (120,), generator=g)
    features = torch.randn(120, D, generator=g) + weight[target] * torch.logspace(-1, 2, 120).unsqueeze(1)
    target[::10] = torch.randint(C, (12,), generator=g)
    everything(Head(features, weight, None, None, target), dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_memory_of_rows_done_again_is_bounded(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """No tensor of N x C x D, and none of W's size but W's gradient, though every row is done again."""
    N, D, C = 5, 50, 12_000
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(C, D, generator=g)
    weight[:6] = weight[0] + 1e-6 * torch.randn(6, D, generator=g)
    logits = torch.randn(N, C, generator=g)
    logits[:, :6] += 60
    explicit, rows = importlib.import_module("flatcore.reference.explicit"), []
    made = explicit.Explicit.__init__
    monkeypatch.setattr(explicit.Explicit, "__init__", lambda *given: (rows.append(len(given[2])), made(*given))[1])
    given = Head(torch.randn(N, D, generator=g), weight, None, logits, torch.zeros(N, dtype=torch.int64))
    with Largest() as most:
        everything(given, dtype)
    assert rows and set(rows) == {N}
    assert most.numbers <= C * D


def test_a_graph_asks_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured on a device or traced, what a tensor holds can't be asked: rows are left as products have them."""
    explicit = importlib.import_module("flatcore.reference.explicit")
    left, of = torch.zeros(1, 3), torch.ones(1, 3)
    assert explicit.unsure(left, of, 0.05).tolist() == [0, 1, 2]
    assert explicit.unsure(torch.tensor([[math.nan, 1.0]]), torch.ones(1, 2), 0.05) is None
    assert explicit.unsure(left.to("meta"), of.to("meta"), 0.05) is None
    with monkeypatch.context() as captured:
        captured.setattr(torch.cpu, "is_current_stream_capturing", lambda: True, raising=False)
        assert explicit.unsure(left, of, 0.05) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert explicit.unsure(left, of, 0.05) is None
