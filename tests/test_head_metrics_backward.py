"""Derivatives of the measures: against finite differences, against 400 digits, and through all that surrounds a call.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import emulation
import mpmath
import numpy as np
import pytest
import torch
from tolerance import Bound, assert_same, assert_within, product_tolerance
from torch import Tensor

import flatcore
from flatcore import reference
from flatcore._engine import cpu as _native
from flatcore._engine import direct, paths
from flatcore._engine import reduction as reductions

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

INF, NAN = math.inf, math.nan
MEASURES: dict[str, Callable[..., Tensor]] = {
    "trace": flatcore.hessian_trace,
    "layerwise": functools.partial(flatcore.relative_flatness, measure="layerwise"),
    "layerwise-norm": functools.partial(flatcore.relative_flatness, measure="layerwise", norm_power=1),
    "neuronwise": functools.partial(flatcore.relative_flatness, measure="neuronwise"),
}
NORMS: dict[str, Callable[..., Tensor]] = {
    f"gradient-{ord}": functools.partial(flatcore.feature_gradient_norms, ord=ord) for ord in (1, 2, INF)
}
# make_dual and inductor load parts of torch that are scripted, and warn of torch.jit.script's end
SCRIPTED = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def problem(N: int = 4, D: int = 3, C: int = 4, seed: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Features, head, bias and logits of moderate size, all requiring gradient."""
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((N, D), (C, D), (C,)))
    given = {"features": x, "linear_weight": w, "linear_bias": b, "logits": x @ w.T + b}
    return {name: value.to(dtype).detach().requires_grad_() for name, value in given.items()}


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
def _exact_value(name: str, x: list, w: list, b: list, z: list, y: int, include_bias: bool) -> Any:
    """A measure of one row by its definition; 400 digits are its only defence against cancellation."""
    top = max(z)
    e = [mpmath.exp(v - top) for v in z]
    total = mpmath.fsum(e)
    p = [v / total for v in e]
    square = mpmath.fsum(v * v for v in x) + (1 if include_bias else 0)
    rows = [[*r, c] if include_bias else r for r, c in zip(w, b, strict=True)]
    trace = square * mpmath.fsum(v * (1 - v) for v in p)
    if name == "trace":
        return trace
    if name.startswith("layerwise"):
        norm = mpmath.fsum(v * v for r in rows for v in r)
        return trace * (mpmath.sqrt(norm) if name == "layerwise-norm" else norm)
    if name == "neuronwise":
        mean = [mpmath.fdot(p, column) for column in zip(*rows, strict=True)]
        return square * mpmath.fsum(
            q * mpmath.fsum((a - m) ** 2 for a, m in zip(r, mean, strict=True)) for q, r in zip(p, rows, strict=True)
        )
    gradient = [mpmath.fdot(p, column) - column[y] for column in zip(*w, strict=True)]
    sizes = [abs(v) for v in gradient]
    if name == "gradient-1":
        return mpmath.fsum(sizes)
    return mpmath.sqrt(mpmath.fsum(v * v for v in sizes)) if name == "gradient-2" else max(sizes)


def _gradient_sizes(name: str, x: list, w: list, z: list, y: int) -> np.ndarray:
    """p_j (||w_j - w_y|| + F)/F of each class, in the norm whose value F is."""
    ord = {"gradient-1": 1, "gradient-2": 2, "gradient-inf": mpmath.inf}[name]
    total = mpmath.fsum(mpmath.exp(v) for v in z)
    norm = _exact_value(name, x, w, [0] * len(w), z, y, False)
    found = []
    for row, v in zip(w, z, strict=True):
        distance = mpmath.norm([a - c for a, c in zip(row, w[y], strict=True)], ord)
        found.append(float(mpmath.exp(v) / total * (distance + norm) / norm))
    return np.array(found)


def exact_log_gradients(
    name: str, x: Tensor, w: Tensor, b: Tensor, y: int, include_bias: bool
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Derivatives of one row's log value with respect to x (D,), w (C, D), b (C,), and the sizes they are summed from.

    By central differences of 1e-70 at 400 digits: right to 1e-130 of the curvature. The sizes: |g_j w_jd|, g the
    derivative with respect to logits, and what does not pass through them.
    """
    D, C = w.shape[1], w.shape[0]
    with mpmath.workdps(400):
        flat = [mpmath.mpf(v) for t in (x, w, b) for v in t.double().flatten().tolist()]
        h = mpmath.mpf(10) ** -70

        def parts(v: list) -> tuple[list, list, list]:
            return v[:D], [v[D + j * D : D + (j + 1) * D] for j in range(C)], v[D + C * D :]

        def logits(v: list) -> list:
            xs, ws, bs = parts(v)
            return [mpmath.fdot(r, xs) + c for r, c in zip(ws, bs, strict=True)]

        def log_value(v: list, z: list) -> Any:
            return mpmath.log(_exact_value(name, *parts(v), z, y, include_bias))

        def moved(v: list, i: int, by: Any) -> list:
            return [a + by if k == i else a for k, a in enumerate(v)]

        z = logits(flat)
        through = [(log_value(flat, moved(z, j, h)) - log_value(flat, moved(z, j, -h))) / (2 * h) for j in range(C)]
        total, fixed = [], []
        for i in range(len(flat)):
            up, down = moved(flat, i, h), moved(flat, i, -h)
            total.append((log_value(up, logits(up)) - log_value(down, logits(down))) / (2 * h))
            fixed.append((log_value(up, z) - log_value(down, z)) / (2 * h))
        g = np.array([float(v) for v in through])
        size = np.abs(g)
        if name in NORMS:  # u_j (e . (w_j - w_y) - F)/F: two sizes that may cancel
            size = np.maximum(size, _gradient_sizes(name, *parts(flat)[:2], z, y))
        truth, beside = np.array([float(v) for v in total]), np.abs([float(v) for v in fixed])
    xs, ws = np.abs(x.double().numpy()), np.abs(w.double().numpy())
    sizes = [size @ ws, np.outer(size, xs), size]
    ends = (0, D, D + C * D, D + C * D + C)
    shapes = ((D,), (C, D), (C,))
    cut = [(a, b) for a, b in itertools.pairwise(ends)]
    return (
        [truth[a:b].reshape(s) for (a, b), s in zip(cut, shapes, strict=True)],
        [part + beside[a:b].reshape(s) for part, (a, b), s in zip(sizes, cut, shapes, strict=True)],
    )


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


# --------------------------------------------------------------------------------- operators, transforms, the compiler
OPERATORS = {
    "trace": {"fields": 1 << reference.FIELDS.index("log_hessian_trace")},
    "neuronwise-bias": {"fields": 1 << reference.FIELDS.index("log_neuronwise"), "include_bias": True},
    "gradient": {
        "fields": 1 << reference.FIELDS.index("log_feature_gradient_norm"),
        "target": torch.tensor([0, 2, 1, 3]),
    },
}


def _operator_arguments(case: str, N: int = 4) -> tuple[Any, ...]:
    given = problem(N, dtype=torch.float32)
    arguments = {
        "features": given["features"], "linear_weight": given["linear_weight"], "linear_bias": given["linear_bias"],
        "logits": None, "target": None, "temperature": 1.0, "ignore_index": -100, "include_bias": False,
        "norm_power": 2, "fields": 0, "wide_result": True,
    }  # fmt: skip
    return tuple((arguments | OPERATORS[case]).values())


@SCRIPTED
@pytest.mark.parametrize("case", OPERATORS)
def test_opcheck_with_inputs_that_require_gradient(case: str, path: str) -> None:
    torch.library.opcheck(torch.ops.flatcore.head_metrics.default, _operator_arguments(case))


@pytest.mark.crossed
@SCRIPTED
@pytest.mark.parametrize("case", OPERATORS)
@pytest.mark.parametrize("wanted", ([True, True, True, False], [True, False, False, False], [False] * 4))
def test_opcheck_of_the_backward(case: str, wanted: list[bool], path: str) -> None:
    *arguments, fields, _ = (a.detach() if isinstance(a, Tensor) else a for a in _operator_arguments(case))
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    log_coefficient = torch.tensor([0.0, 1.0, -1.5, -INF], dtype=torch.float64)
    for logs in (None, log_coefficient):
        given = (upstream, logs, *arguments, fields.bit_length() - 1, wanted)
        torch.library.opcheck(torch.ops.flatcore.head_metrics_backward.default, given)


@pytest.mark.parametrize("kind", ("fused", "chunked", "cuda-chunked"))
def test_the_backward_operator_reads_any_layout(kind: str, one_thread: None) -> None:
    """Every second number, one number for all rows, the negative view of a conjugate: by their values."""
    given = problem(dtype=torch.float32)
    inputs = [given[name].detach() for name in ("features", "linear_weight")]
    logs = torch.tensor([0.0, -0.5, -3.0, 1.0], dtype=torch.float64)
    layouts = (
        torch.stack([logs, logs + 9], dim=1)[:, 0],
        torch.tensor([0.5], dtype=torch.float64).expand(4),
        torch._neg_view(-logs),
    )
    options = (
        None,
        None,
        None,
        1.0,
        -100,
        False,
        2,
        reference.FIELDS.index("log_neuronwise"),
        [True, True, False, False],
    )
    cuda = kind.startswith("cuda")
    kernels = emulation.cuda_kernels() if cuda else contextlib.nullcontext()
    with flatcore.backend("native"), paths.forced(path=kind.removeprefix("cuda-")), kernels:
        for layout in layouts:
            upstream = torch.ones(4, dtype=torch.float64)
            got, want = (
                torch.ops.flatcore.head_metrics_backward(upstream, x, *inputs, *options)
                for x in (layout, layout.resolve_neg().contiguous())
            )
            for a, b in zip(got[:2], want[:2], strict=True):
                assert_same(kind, a, b)


WRONG_BACKWARDS = {
    "wide-upstream": ({"upstream": torch.ones(5, dtype=torch.float64)}, ValueError, "upstream must have shape"),
    "wide-logs": (
        {"log_coefficient": torch.ones(5, dtype=torch.float64)},
        ValueError,
        "log_coefficient must have shape",
    ),
    "half-upstream": ({"upstream": torch.ones(4, dtype=torch.float16)}, TypeError, "upstream must have dtype"),
    "another-field": ({"field": reference.FIELDS.index("loss")}, ValueError, "field must be that of one of"),
    "no-field": ({"field": 99}, ValueError, "field must be that of one of"),
    "no-target": ({"field": reference.FIELDS.index("log_feature_gradient_norm")}, ValueError, "needs a target"),
    "wants-logits": ({"wanted": [True, False, False, True]}, ValueError, "wanted must hold four flags"),
    "three-flags": ({"wanted": [True] * 3}, ValueError, "wanted must hold four flags"),
    "bad-label": (
        {"field": reference.FIELDS.index("log_feature_gradient_norm"), "target": torch.tensor([0, 9, 1, 2])},
        ValueError,
        "target must hold labels in 0..3",
    ),
}


@pytest.mark.parametrize("case", WRONG_BACKWARDS)
def test_the_backward_operator_checks_its_arguments(case: str) -> None:
    change, error, words = WRONG_BACKWARDS[case]
    given = problem(dtype=torch.float32)
    arguments = {
        "upstream": torch.ones(4, dtype=torch.float64), "log_coefficient": None, "features": given["features"].detach(),
        "linear_weight": given["linear_weight"].detach(), "linear_bias": None, "logits": None, "target": None,
        "temperature": 1.0, "ignore_index": -100, "include_bias": False, "norm_power": 2,
        "field": reference.FIELDS.index("log_hessian_trace"), "wanted": [True, True, False, False],
    }  # fmt: skip
    with pytest.raises(error, match=words):
        torch.ops.flatcore.head_metrics_backward(*(arguments | change).values())


@SCRIPTED
@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)))
def test_a_compiled_training_step_gives_the_same_numbers(backend: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    body, head = torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        features = body(x).relu()
        logits = head(features)
        flatness = flatcore.relative_flatness(features, head.weight, linear_bias=head.bias, logits=logits, log=True)
        norms = flatcore.feature_gradient_norms(features, head.weight, y, linear_bias=head.bias, reduction="mean")
        return torch.nn.functional.cross_entropy(logits, y) + 0.1 * flatness + norms

    step = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    parameters = [*body.parameters(), *head.parameters()]
    for rows in (8, 5, 13):  # one graph serves all sizes
        x, y = torch.randn(rows, 6), torch.arange(rows) % 4
        with torch.compiler.set_stance("fail_on_recompile" if rows != 8 else "default"):
            value = step(x, y)
        want_value = loss(x, y)
        torch.testing.assert_close(value, want_value, rtol=2e-6, atol=1e-6)
        got, want = torch.autograd.grad(value, parameters), torch.autograd.grad(want_value, parameters)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


def test_functional_gradients_and_vmap_agree_with_backward(path: str) -> None:
    given = {name: value.detach() for name, value in problem(6, dtype=torch.float32).items()}
    x, w, b = given["features"], given["linear_weight"], given["linear_bias"]
    target = torch.tensor([0, 1, 2, 3, 0, 1])

    def one(row: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        trace = flatcore.relative_flatness(row, weight, linear_bias=b, measure="neuronwise", log=True)
        return trace + flatcore.feature_gradient_norms(row, weight, y, linear_bias=b)

    d_x, d_w = [], []
    for row, y in zip(x, target, strict=True):
        inputs = row.clone().requires_grad_(), w.clone().requires_grad_()
        for into, gradient in zip((d_x, d_w), torch.autograd.grad(one(*inputs, y), inputs), strict=True):
            into.append(gradient)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got_x, got_w = torch.vmap(torch.func.grad(one, argnums=(0, 1)), in_dims=(0, None, 0))(x, w, target)
        only_x = torch.vmap(torch.func.grad(one), in_dims=(0, None, 0))(x, w, target)
        heads = w + torch.arange(6.0)[:, None, None] / 8
        per_head = torch.vmap(torch.func.grad(one, argnums=1), in_dims=(None, 0, None))(x[0], heads, target[0])
    torch.testing.assert_close(got_x, torch.stack(d_x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(only_x, torch.stack(d_x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_w, torch.stack(d_w), rtol=1e-5, atol=1e-6)
    for head, gradient in zip(heads, per_head, strict=True):
        torch.testing.assert_close(
            gradient, torch.func.grad(one, argnums=1)(x[0], head, target[0]), rtol=1e-5, atol=1e-6
        )


def test_jacobian_by_vmap_over_upstreams(path: str) -> None:
    x = problem(3, dtype=torch.float32)["features"]
    w = problem(3, dtype=torch.float32)["linear_weight"].detach()
    value = flatcore.hessian_trace(x, w, reduction="none")
    (rows,) = torch.autograd.grad(value, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    for i in range(3):
        (want,) = torch.autograd.grad(value, x, torch.eye(3)[i], retain_graph=True)
        torch.testing.assert_close(rows[i], want, rtol=1e-6, atol=1e-7)
        assert (rows[i][[k for k in range(3) if k != i]] == 0).all()


def test_autocast_and_mixed_types(path: str) -> None:
    given = problem(16, 8, 5, dtype=torch.float32)
    w, b = given["linear_weight"], given["linear_bias"]
    x = given["features"].detach().bfloat16().requires_grad_()
    exact = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = flatcore.relative_flatness(x, w, linear_bias=b)
        got = torch.autograd.grad(value, (x, w, b))
    want = torch.autograd.grad(flatcore.relative_flatness(exact, w, linear_bias=b), (exact, w, b))
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.float32] and value.dtype == torch.float32
    assert_same("features", got[0], want[0].bfloat16())
    for a, c in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6 * c.abs().max().item())


def test_backward_in_another_thread_and_after_a_change_in_place() -> None:
    given = problem(8, dtype=torch.float32)
    x, w = given["features"], given["linear_weight"].detach()
    value = flatcore.hessian_trace(x, w)
    w += 1  # saved for backward: autograd must notice
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_freed_storage_between_forward_and_backward_does_not_crash() -> None:
    """FSDP frees a gathered parameter after the forward pass; saved, it has no memory to read."""
    x = problem(8, dtype=torch.float32)["features"]
    w = problem(8, dtype=torch.float32)["linear_weight"].detach().clone()
    value = flatcore.hessian_trace(x, w)
    w.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError), match="own its memory"):
        value.backward()


@pytest.mark.exhaustive
def test_memory_does_not_grow_over_200_steps() -> None:
    torch.manual_seed(0)
    body, head = torch.nn.Linear(16, 32), torch.nn.Linear(32, 10)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=1e-3)
    x = torch.randn(64, 16)

    def step() -> None:
        optimizer.zero_grad()
        features = body(x).relu()
        flatcore.relative_flatness(features, head.weight, linear_bias=head.bias, log=True).backward()
        optimizer.step()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    for _ in range(5):
        step()
    before = alive()
    gc.disable()
    try:
        for _ in range(200):
            step()
        without_collector = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    finally:
        gc.enable()
    assert without_collector <= before, "a reference cycle keeps tensors until the collector runs"
    assert alive() <= before


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
    s = reductions.sample_weights(target, weight, -100) if soft or weight is not None else None
    how = reductions.Reduction(reduction, log, dtype, None if soft else target, -100, s, count_rows=soft)
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
