"""Derivatives of the measures: against finite differences, against 400 digits, and where a value is zero or NaN.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from differentiated import MEASURES, NORMS, exact_log_gradients, problem
from torch import Tensor

import flatcore
from flatcore._check.tolerance import Bound, assert_same, assert_within, product_tolerance
from flatcore._engine import cpu as _native
from flatcore._engine import direct, paths
from flatcore._engine import reduction as reductions

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

INF, NAN = math.inf, math.nan


def targets(kind: str, N: int, C: int) -> dict[str, Tensor | None]:
    """Target and class weights of a kind; of hard labels one is ignored."""
    g = torch.Generator().manual_seed(5)
    hard = torch.randint(C, (N,), generator=g)
    hard[1] = -100
    soft = torch.rand(N, C, generator=g, dtype=torch.float64)
    weight = torch.rand(C, generator=g, dtype=torch.float64) + 0.5
    given = {"none": None, "hard": hard, "weighted": hard, "soft": soft, "soft-weighted": soft}
    return {"target": given[kind], "weight": weight if "weighted" in kind else None}


def names_of(include_bias: bool, logits: bool) -> tuple[str, ...]:
    """The inputs of a call: given logits take the place of what they are computed from, where that is not counted."""
    return (
        "features",
        "linear_weight",
        *(("linear_bias",) if include_bias or not logits else ()),
        *(("logits",) if logits else ()),
    )


def check(function: Callable[..., Tensor], given: dict[str, Tensor], names: tuple[str, ...], **options: Any) -> None:
    def call(*inputs: Tensor) -> Tensor:
        return function(**dict(zip(names, inputs, strict=True)), **options)

    assert torch.autograd.gradcheck(call, tuple(given[name] for name in names), fast_mode=False)


# --------------------------------------------------------------------------------------- the definition: differences
@pytest.mark.crossed
@pytest.mark.parametrize("logits", (False, True), ids=("products", "logits"))
@pytest.mark.parametrize("include_bias", (False, True), ids=("", "bias"))
@pytest.mark.parametrize("name", MEASURES)
def test_gradcheck_of_every_measure(name: str, include_bias: bool, logits: bool, path: str) -> None:
    names = names_of(include_bias, logits)
    given = problem()
    check(MEASURES[name], given, names, include_bias=include_bias, reduction="none", temperature=0.8)


@pytest.mark.crossed
@pytest.mark.parametrize("log", (False, True), ids=("", "log"))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("kind", ("none", "hard", "weighted", "soft", "soft-weighted"))
def test_gradcheck_of_every_reduction(kind: str, reduction: str, log: bool, path: str) -> None:
    given = problem()
    options = targets(kind, 4, 4)
    if log and reduction == "none" and kind in ("hard", "weighted"):
        options = {name: value for name, value in options.items()}
        options["target"] = options["target"].clamp(min=0)  # the log of an ignored row is -inf: no differences of it
    check(
        MEASURES["neuronwise"], given, names_of(True, False), include_bias=True, reduction=reduction, log=log, **options
    )


@pytest.mark.crossed
@pytest.mark.parametrize("logits", (False, True), ids=("products", "logits"))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("log", (False, True), ids=("", "log"))
@pytest.mark.parametrize("name", NORMS)
def test_gradcheck_of_every_gradient_norm(name: str, log: bool, reduction: str, logits: bool, path: str) -> None:
    target = torch.tensor([0, 2, -100, 1]) if not (log and reduction == "none") else torch.tensor([0, 2, 3, 1])
    given = problem()
    check(NORMS[name], given, names_of(False, logits), target=target, log=log, reduction=reduction, temperature=1.3)


def test_leading_dimensions_and_strides(path: str) -> None:
    given = problem(12)
    names = names_of(False, False)
    flat = {name: given[name] for name in names}
    want = torch.autograd.grad(flatcore.relative_flatness(**flat, reduction="none").sum(), tuple(flat.values()))
    x = given["features"].detach().reshape(3, 4, 3).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    w = given["linear_weight"].detach().T.contiguous().T.requires_grad_()
    assert not x.is_contiguous() and not w.is_contiguous()
    b = given["linear_bias"]
    got = torch.autograd.grad(flatcore.relative_flatness(x, w, linear_bias=b, reduction="none").sum(), (x, w, b))
    for name, a, c in zip(names, got, want, strict=True):
        torch.testing.assert_close(a.reshape(c.shape), c, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.crossed
@pytest.mark.parametrize(
    ("dtype", "threads"),
    ((torch.bfloat16, 1), *itertools.product((torch.float32, torch.float64), (1, 2, 3))),
)
@pytest.mark.parametrize("name", (*MEASURES, *NORMS))
def test_many_rows_agree_with_the_reference(name: str, dtype: torch.dtype, threads: int) -> None:
    """More rows than one fold of the weight's gradient holds, split among threads; both paths."""
    N, D, C = 1500, 19, 11
    given = problem(N, D, C, dtype=dtype)
    inputs = tuple(given[n] for n in ("features", "linear_weight", "linear_bias"))
    target = torch.arange(N) % C
    function = (MEASURES | NORMS)[name]

    def gradients() -> tuple[Tensor, ...]:
        value = function(inputs[0], inputs[1], target, linear_bias=inputs[2], reduction="mean", log=True)
        return torch.autograd.grad(value, inputs)

    with flatcore.backend("reference"):
        want = gradients()
    # sums of up to 1500 products: the terms that meet in an entry are at most 30 times the largest entry here
    unit = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-9}[dtype]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for kind in ("fused", "chunked"):
            with flatcore.backend("native"), paths.forced(path=kind):
                got, again = gradients(), gradients()
            for a, b, c in zip(got, want, again, strict=True):
                assert a.dtype == dtype
                assert_same("twice", a, c)
                scale = b.abs().max().item()
                torch.testing.assert_close(a, b, rtol=0, atol=1500 * unit * scale if dtype != torch.bfloat16 else
                                           4 * unit * scale)  # fmt: skip
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("N", "D", "C"), ((0, 3, 4), (3, 3, 1), (3, 0, 4), (1, 1, 2)))
@pytest.mark.parametrize("name", (*MEASURES, *NORMS))
def test_the_smallest_shapes(name: str, N: int, D: int, C: int, path: str) -> None:
    given = problem(max(N, 1), D, C)
    x, w, b = given["features"].detach()[:N].requires_grad_(), given["linear_weight"], given["linear_bias"]
    target = torch.zeros(N, dtype=torch.long)
    value = (MEASURES | NORMS)[name](x, w, target, linear_bias=b, reduction="sum")
    gradients = torch.autograd.grad(value, (x, w, b))
    assert [g.shape for g in gradients] == [x.shape, w.shape, b.shape]
    assert all(g.isfinite().all() for g in gradients)
    if N == 0 or C == 1 or D == 0:
        assert all((g == 0).all() for g in gradients)


# --------------------------------------------------------------------------- confident rows: 400 digits, naive formulas
# features whose logits differ by 2, 20, 90 and 300 between the top two; multiples of 1/8, so float32 holds them exactly
HEAD = torch.tensor([[1.0, 0.5, -0.25], [-0.5, 1.0, 0.25], [0.25, -1.0, 1.0], [-0.75, -0.5, -1.0]])
BIAS = torch.tensor([0.5, -0.25, 0.125, 1.0])
ROWS = {
    "even": [1.0, 1.0, 0.5],
    "confident": [14.0, 2.0, -3.0],
    "very": [60.0, 4.0, -8.0],
    "extremely": [-40.0, -30.0, 220.0],
}


@pytest.mark.crossed
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("name", "label"), [*((name, 0) for name in MEASURES), *itertools.product(NORMS, (0, 2))])
def test_confident_rows_have_the_exact_gradient(name: str, row: str, label: int, path: str) -> None:
    include_bias = name in MEASURES
    inputs = [t.clone().requires_grad_() for t in (torch.tensor([ROWS[row]]), HEAD, BIAS)]
    options = {"include_bias": True} if include_bias else {"target": torch.tensor([label])}
    value = (MEASURES | NORMS)[name](inputs[0], inputs[1], linear_bias=inputs[2], reduction="sum", log=True, **options)
    got = torch.autograd.grad(value, inputs)
    truth, sizes = _known(name, row, label, include_bias)
    for field, a, exact, size in zip(("features", "weight", "bias"), got, truth, sizes, strict=True):
        # C classes and the term beside them, beside the 8 roundings of the cotangent; what float32 cannot hold may be 0
        bound = product_tolerance(size, HEAD.shape[0] + 1, torch.float32)
        bound = Bound(bound.absolute + torch.finfo(torch.float32).tiny, bound.relative)
        assert_within(f"{name} {row} {field}", a.reshape(exact.shape), exact, bound)


@functools.cache
def _known(name: str, row: str, label: int, include_bias: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return exact_log_gradients(name, torch.tensor(ROWS[row]), HEAD, BIAS, label, include_bias)


@pytest.mark.parametrize("name", (*MEASURES, *NORMS))
def test_the_gradient_of_the_log_does_not_vanish_as_confidence_grows(name: str, path: str) -> None:
    sizes = []
    for scale in (1.0, 10.0, 100.0, 1000.0):
        x = torch.tensor([[4.0, 1.0]]).requires_grad_()
        value = (MEASURES | NORMS)[name](scale * x, torch.eye(2), torch.tensor([0]), reduction="mean", log=True)
        (gradient,) = torch.autograd.grad(value, x)
        sizes.append(gradient.norm().item() / scale)
    assert value.item() < -2900
    # d log v/d phi -> -(w_0 - w_1) per unit of scale: sqrt(2)
    assert all(abs(size - math.sqrt(2)) < 0.2 for size in sizes[1:]), sizes


# ---------------------------------------------------------------------------------------- zeros, NaN, rows left out
def _gradients(function: Callable[..., Tensor], x: Tensor, w: Tensor, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    return torch.autograd.grad(function(x, w, *args, **options), (x, w))


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("log", (False, True), ids=("", "log"))
@pytest.mark.parametrize("name", (*MEASURES, *NORMS))
def test_a_row_of_value_zero_has_gradient_zero(name: str, log: bool, reduction: str, path: str) -> None:
    function = (MEASURES | NORMS)[name]
    target = torch.tensor([0, 1, 0])
    x = torch.tensor([[1.0, -2.0], [0.5, 1.0], [2.0, 1.0]])
    one = torch.ones(1, 2)  # a single class: p = 1
    for gradient in _gradients(function, x, one, torch.zeros(3, dtype=torch.long), log=log, reduction=reduction):
        assert (gradient == 0).all()
    if name in MEASURES:
        x[1] = 0  # phi = 0
        d_x, d_w = _gradients(function, x, torch.eye(2), target, log=log, reduction=reduction)
        assert (d_x[1] == 0).all() and (d_x[[0, 2]] != 0).any() and d_w.isfinite().all()
    if name in ("neuronwise", *NORMS):
        for gradient in _gradients(function, x, torch.ones(2, 2), target, log=log, reduction=reduction):
            assert (gradient == 0).all()  # all rows of W alike
    if name.startswith("layerwise"):
        for gradient in _gradients(function, x, torch.zeros(2, 2), target, log=log, reduction=reduction):
            assert (gradient == 0).all()


@pytest.mark.parametrize("name", (*MEASURES, *NORMS))
def test_ignored_rows_add_nothing_whatever_they_hold(name: str, path: str) -> None:
    function = (MEASURES | NORMS)[name]
    x = torch.tensor([[1.0, -2.0], [0.5, 1.0], [2.0, 1.0]]).double()
    w = torch.tensor([[1.0, 0.5], [-1.0, 2.0], [0.25, -1.0]]).double()
    target = torch.tensor([0, -100, 2])
    for reduction in ("mean", "sum"):
        want_x, want_w = _gradients(function, x[[0, 2]], w, target[[0, 2]], reduction=reduction)
        spoiled = x.clone()
        spoiled[1] = torch.tensor([NAN, INF])
        d_x, d_w = _gradients(function, spoiled, w, target, reduction=reduction)
        assert (d_x[1] == 0).all()
        torch.testing.assert_close(d_x[[0, 2]], want_x, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(d_w, want_w, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", (*MEASURES, *NORMS))
def test_a_row_with_nan_poisons_itself_and_the_weight(name: str, path: str) -> None:
    function = (MEASURES | NORMS)[name]
    x = torch.tensor([[1.0, -2.0], [0.5, NAN], [2.0, 1.0]])
    d_x, d_w = _gradients(function, x, torch.eye(2), torch.tensor([0, 1, 1]), reduction="sum")
    assert d_x[1].isnan().all() and d_x[[0, 2]].isfinite().all() and d_w.isnan().all()


def test_absent_classes_have_no_gradient(path: str) -> None:
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0]]).double()
    w = torch.tensor([[1.0, 0.5], [-1.0, 2.0], [0.25, -1.0]]).double()
    b = torch.tensor([0.0, 0.5, -INF], dtype=torch.float64, requires_grad=True)
    xs, ws = x.clone().requires_grad_(), w.clone().requires_grad_()
    for name in ("trace", "neuronwise"):
        d_x, d_w, d_b = torch.autograd.grad(MEASURES[name](xs, ws, linear_bias=b), (xs, ws, b))
        want_x, want_w = _gradients(MEASURES[name], x, w[:2], linear_bias=torch.tensor([0.0, 0.5]).double())
        assert (d_w[2] == 0).all() and d_b[2] == 0 and d_b.isfinite().all()
        torch.testing.assert_close(d_x, want_x, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(d_w[:2], want_w, rtol=1e-12, atol=1e-13)


def test_only_what_is_wanted_is_given(path: str) -> None:
    given = problem(dtype=torch.float32)
    x, w, b = given["features"], given["linear_weight"].detach(), given["linear_bias"].detach()
    flatcore.relative_flatness(x, w, linear_bias=b).backward()
    assert x.grad is not None and w.grad is None and b.grad is None
    frozen = torch.nn.Parameter(given["linear_weight"].detach().clone())
    flatcore.relative_flatness(x.detach(), frozen, linear_bias=b).backward()
    assert frozen.grad is not None and frozen.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------- twice: refused
@pytest.mark.parametrize("name", ("neuronwise", "gradient-2"))
def test_a_second_derivative_is_refused(name: str, path: str) -> None:
    x = problem()["features"]
    w = problem()["linear_weight"].detach()
    value = (MEASURES | NORMS)[name](x, w, torch.tensor([0, 1, 2, 3]), reduction="sum")
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.func.grad(lambda t: torch.func.grad(lambda s: flatcore.hessian_trace(s, w))(t).sum())(x.detach())


# ---------------------------------------------------------------------------- the reduction that runs beside the kernel
@pytest.mark.parametrize("log", (False, True), ids=("", "log"))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("kind", ("none", "hard", "weighted", "soft"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_the_native_reduction_is_that_of_the_formula(kind: str, reduction: str, log: bool, dtype: torch.dtype) -> None:
    N, C = 301, 4
    given = targets(kind, N, C)
    logs = torch.linspace(-400, 20, N, dtype=torch.float64)
    logs[7], logs[1] = -INF, NAN  # of value 0; of weight 0 where labels say so
    if kind in ("none", "soft"):
        logs[1] = -3.0
    target, weight = given["target"], given["weight"]
    soft = kind == "soft"
    s = reductions.sample_weights(target, weight, -100, C) if soft or weight is not None else None
    how = reductions.Reduction(reduction, log, dtype, None if soft else target, -100, C, s, count_rows=soft)
    want, slope = reductions.reduce_with_log_coefficient(logs, how)
    got, log_coefficient = _native.head_reduction(logs, how, True)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=2 * unit + N * 2.0**-53, atol=0.0)
    assert log_coefficient.dtype == torch.float64 and log_coefficient[7] == -INF
    torch.testing.assert_close(log_coefficient, slope, rtol=1e-13, atol=1e-13, equal_nan=True)
    leaf = logs.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(reductions.reduce(leaf, how).sum(), leaf)
    torch.testing.assert_close(
        log_coefficient.exp(), by_autograd, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0.0
    )


def test_is_direct_only_where_no_gradient_is_needed() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    assert direct.is_plain(x) and direct.needs_gradient(x) and not direct.is_direct(x)
    with torch.no_grad():
        assert not direct.needs_gradient(x) and direct.is_direct(x)
    assert not direct.needs_gradient(None, x.detach())
