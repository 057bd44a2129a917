"""What must hold besides single values: the identities of the measures, invariances, reductions, repeatability."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from cases import BY_NAME, Case
from checks import LINEAR, LOGS, Problem, bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import flatcore
from flatcore._check.tolerance import Bound, assert_same, assert_within, tolerance

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

_NAMES = ("logits-10", "features-3", "features-10", "features-142", "features-and-bias-1000", "wide-300-15")
# the path is forced for the whole test, so all examples of a test run on it
_examples = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    """Problems of any small shape, from nearly uniform to very confident rows."""
    n, d, c = draw(st.integers(1, 9)), draw(st.integers(1, 20)), draw(st.integers(2, 20))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = 10 ** draw(st.floats(-2, 2))
    features = (scale * torch.randn(n, d, generator=g)).double()
    weight = torch.randn(c, d, generator=g).double()
    bias = torch.randn(c, generator=g).double() if draw(st.booleans()) else None
    target = torch.randint(c, (n, 1), generator=g)
    temperature = draw(st.sampled_from((1.0, 0.5, 3.0)))
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    return Case("drawn", features, weight, target, bias=bias, temperature=temperature).at(dtype)


def _assert_agree(problem: Problem, field: str, first: Tensor, second: Tensor, other: Problem | None = None) -> None:
    """Two computed values of the same exact number differ by no more than both their bounds."""
    _, bound = problem.expected(field)
    _, twin = (other or problem).expected(field)
    assert_within(field, first, second.double().numpy(), bound + twin, problem.dtype)


# ------------------------------------------------------------------------------------------------------- exactness
@_examples
@given(case=_cases())
def test_any_problem_is_exact(path: str, case: Case) -> None:
    problem = Problem(case)
    if (
        max(problem.truth.condition[1] + problem.truth.condition[math.inf]) < 1e3
    ):  # else the gradient is a rest of terms
        problem.check_head_metrics()
        problem.check_views()


@_examples
@given(case=_cases())
def test_values_are_not_negative_and_ordered(path: str, case: Case) -> None:
    metrics = flatcore.head_metrics(**case.arguments())
    problem = Problem(case)
    for field in (
        "hessian_trace",
        "layerwise",
        "neuronwise",
        "feature_gradient_norm",
        "loss",
        "margin",
        "feature_norm",
    ):
        assert (getattr(metrics, field) >= 0).all(), field
    assert (metrics.confidence <= 1).all() and (metrics.log_one_minus_confidence <= 0).all()
    classes = case.weight.shape[0]
    assert (metrics.confidence >= (1 - _rounding(problem)) / classes).all()
    # neuronwise <= layerwise
    _, a = problem.expected("log_neuronwise")
    _, b = problem.expected("log_layerwise")
    slack = torch.from_numpy(np.broadcast_to(np.asarray((a + b).absolute), metrics.confidence.shape).copy())
    assert (metrics.log_neuronwise <= metrics.log_layerwise + slack).all()


def _rounding(problem: Problem) -> float:
    return float(np.max(tolerance("confidence", np.ones(1), np.zeros(1), problem.dtype).relative))


@pytest.mark.parametrize(("classes", "width"), ((2, 3), (3, 5), (5, 4), (10, 6)))
@pytest.mark.parametrize("temperature", (1.0, 2.5))
def test_neuronwise_is_the_trace_of_the_feature_hessian(
    path: str, classes: int, width: int, temperature: float
) -> None:
    """neuronwise = ||phi||^2 Tr Hess_phi loss: two different Hessians of one loss."""
    g = torch.Generator().manual_seed(classes)
    features = torch.randn(6, width, generator=g, dtype=torch.float64)
    weight = torch.randn(classes, width, generator=g, dtype=torch.float64)
    case = Case("hessian", features, weight, torch.zeros(6, 1, dtype=torch.int64), temperature=temperature)
    problem = Problem(case)
    truth = np.array(
        [
            phi.square().sum().item() * oracles.autograd_feature_hessian_trace(phi, weight, None, temperature)
            for phi in features
        ]
    )
    got = flatcore.relative_flatness(features, weight, temperature=temperature, measure="neuronwise", reduction="none")
    epsilon = problem.truth.linear("one_minus_confidence")
    bound = tolerance(
        "neuronwise",
        truth,
        np.log(truth),
        torch.float64,
        logit_error=problem.logit_error,
        oracle_epsilon=epsilon,
    )
    assert_within("neuronwise", got, truth, bound, torch.float64)


# ----------------------------------------------------------------------------------------------------- invariances
def _on_eighths(classes: int, width: int, rows: int) -> Case:
    """Features and head on a grid of 1/8: sums of a few of their products, and shifted rows, are exact in float32."""
    g = torch.Generator().manual_seed(classes)
    features = torch.randint(-16, 17, (rows, width), generator=g).double() / 8
    weight = torch.randint(-16, 17, (classes, width), generator=g).double() / 8
    return Case("grid", features, weight, torch.randint(classes, (rows, 1), generator=g)).at(torch.float32)


@pytest.mark.parametrize("classes", (2, 10, 33))
@pytest.mark.parametrize("shift", (3.0, -1000.0))
def test_a_common_shift_of_all_rows_changes_layerwise_only(path: str, shift: float, classes: int) -> None:
    case = _on_eighths(classes, 9, 7)
    shifted = replace(case, weight=case.weight + shift * torch.arange(1.0, 10.0) / 8)
    problem, other = Problem(case), Problem(shifted)
    assert not problem.logit_error.any() and not other.logit_error.any()
    before, after = (flatcore.head_metrics(**c.arguments()) for c in (case, shifted))
    for field in set(LOGS + LINEAR) - {"log_layerwise", "layerwise"}:
        _assert_agree(problem, field, getattr(after, field), getattr(before, field), other)
    assert (after.log_layerwise > before.log_layerwise + 1).all()


@pytest.mark.parametrize("name", ("features-3", "features-10", "features-142"))
@pytest.mark.parametrize("factor", (4.0, 1 / 1024, 3.0))
def test_measures_do_not_change_when_head_and_features_trade_a_factor(path: str, name: str, factor: float) -> None:
    case = BY_NAME[name].at(torch.float32)
    scaled = replace(case, weight=case.weight * factor, features=case.features / factor)
    problem, other = Problem(case), Problem(scaled)
    before, after = (flatcore.head_metrics(**c.arguments()) for c in (case, scaled))
    # a factor of 3 rounds each weight and feature: as much again as the products' own rounding
    rounding = 2.0 if factor == 3.0 else 1.0
    for field in ("log_layerwise", "log_neuronwise"):
        (_, a), (_, b) = problem.expected(field), other.expected(field)
        bound = Bound(rounding * (a.absolute + b.absolute), 0.0)
        assert_within(field, getattr(after, field), getattr(before, field).double().numpy(), bound, torch.float32)
    shrunk = before.log_hessian_trace - 2 * math.log(factor)
    (_, a), (_, b) = problem.expected("log_hessian_trace"), other.expected("log_hessian_trace")
    bound = Bound(rounding * (a.absolute + b.absolute), 0.0)
    assert_within("log_hessian_trace", after.log_hessian_trace, shrunk.double().numpy(), bound, torch.float32)


@pytest.mark.parametrize("name", _NAMES)
def test_permutation_of_samples(path: str, name: str) -> None:
    case = BY_NAME[name].at(torch.float32)
    n = case.features.shape[0]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    permuted = replace(
        case,
        features=case.features[order],
        targets=case.targets[order],
        logits=None if case.logits is None else case.logits[order],
    )
    problem, k = Problem(permuted), case.targets.shape[1]
    rows = (order.unsqueeze(1) * k + torch.arange(k)).flatten()
    before, after = (flatcore.head_metrics(**c.arguments()) for c in (case, permuted))
    for field in LOGS + LINEAR:
        expected = getattr(before, field)[rows]
        if path.startswith("fused"):  # no library product: a row does not depend on its neighbours at all
            assert_same(field, getattr(after, field), expected)
        _assert_agree(problem, field, getattr(after, field), expected)


@pytest.mark.parametrize("name", _NAMES)
def test_permutation_of_classes(path: str, name: str) -> None:
    case = BY_NAME[name].at(torch.float32)
    order = torch.randperm(case.weight.shape[0], generator=torch.Generator().manual_seed(2))
    permuted = replace(
        case,
        weight=case.weight[order],
        bias=None if case.bias is None else case.bias[order],
        logits=None if case.logits is None else case.logits[:, order],
        targets=order.argsort()[case.targets],
    )
    problem = Problem(permuted)
    before, after = (flatcore.head_metrics(**c.arguments()) for c in (case, permuted))
    for field in LOGS + LINEAR:
        _assert_agree(problem, field, getattr(after, field), getattr(before, field))
    sure = problem.truth.linear("margin") > problem.logit_error
    assert torch.equal(order[after.prediction][sure], before.prediction[sure])


def test_scaling_the_features_at_fixed_logits_scales_by_the_square(path: str) -> None:
    case = BY_NAME["logits-10"].at(torch.float32)
    before = flatcore.head_metrics(**case.arguments())
    after = flatcore.head_metrics(**replace(case, features=8 * case.features).arguments())
    problem = Problem(case)
    for field in ("log_hessian_trace", "log_layerwise", "log_neuronwise"):
        _assert_agree(problem, field, getattr(after, field), getattr(before, field) + 2 * math.log(8))
    assert_same("loss", after.loss, before.loss)


# ------------------------------------------------------------------------------------------------------- reductions
@pytest.mark.parametrize("log", (False, True))
@pytest.mark.parametrize("name", ("logits-10", "features-142"))
def test_the_mean_of_the_halves_is_the_mean(path: str, name: str, log: bool) -> None:
    """Unequal halves, weighted by their sizes: linear in H, so never a product of two batch sums."""
    case = replace(BY_NAME[name].at(torch.float32), temperature=1.0)
    arguments, n = case.arguments(), case.targets.numel()
    first = n // 3

    def part(rows: slice, function: object) -> Tensor:
        cut = {key: value[rows] if key in ("features", "target", "logits") and value is not None else value
               for key, value in arguments.items()}  # fmt: skip
        return function(**cut, reduction="mean", log=log).double()

    for function in (flatcore.hessian_trace, flatcore.relative_flatness, flatcore.feature_gradient_norms):
        whole, a, b = (part(rows, function) for rows in (slice(None), slice(0, first), slice(first, None)))
        if log:
            parts = torch.stack([a + math.log(first / n), b + math.log(1 - first / n)]).logsumexp(0)
        else:
            parts = a * (first / n) + b * (1 - first / n)
        field = {"hessian_trace": "hessian_trace", "relative_flatness": "layerwise"}.get(
            function.__name__, "feature_gradient_norm"
        )
        problem = Problem(case)
        _, bound = problem.expected(f"log_{field}")
        worst = 2 * float(np.max(bound.absolute))
        assert_within(field, whole, parts.numpy(), Bound(worst, 0.0) if log else Bound(0.0, math.expm1(worst)))


@pytest.mark.parametrize("name", _NAMES)
def test_log_is_the_log_of_the_value(path: str, name: str) -> None:
    case = BY_NAME[name].at(torch.float64)
    for function in (flatcore.hessian_trace, flatcore.relative_flatness):
        for reduction in ("mean", "sum"):
            arguments = case.arguments() | {"reduction": reduction}
            value, log = function(**arguments), function(**arguments, log=True)
            bound = tolerance("log_hessian_trace", value.numpy(), log.numpy(), torch.float64)
            assert_within(function.__name__, log, value.log().numpy(), bound + bound)
            logs = function(**(arguments | {"reduction": "none"}), log=True)
            assert log > logs.mean() + 1  # the mean of logs, or their sum, would be another number


def test_a_weight_of_ones_is_no_weight(path: str) -> None:
    case = BY_NAME["features-10"].at(torch.float32)
    arguments = case.arguments()
    for reduction in ("mean", "sum", "none"):
        first = flatcore.hessian_trace(**arguments, reduction=reduction)
        assert_same(reduction, flatcore.hessian_trace(**arguments, reduction=reduction, weight=torch.ones(10)), first)


# ----------------------------------------------------------------------------------------- repeatability, switches
@contextmanager
def _threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


@pytest.mark.crossed
@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("name", ("features-10", "features-142", "features-and-bias-1000", "logits-1000"))
def test_two_runs_agree_bit_for_bit(path: str, name: str, threads: int) -> None:
    arguments = BY_NAME[name].at(torch.float32).arguments()
    with _threads(threads):
        first = bits(flatcore.head_metrics(**arguments))
        norms = flatcore.feature_gradient_norms(**arguments, ord=1)
        for _ in range(3):
            for field, value in bits(flatcore.head_metrics(**arguments)).items():
                assert_same(field, value, first[field])
            assert_same("ord 1", flatcore.feature_gradient_norms(**arguments, ord=1), norms)


@pytest.mark.parametrize("threads", (1, 2, 3, 7))
@pytest.mark.parametrize("name", ("features-142", "features-and-bias-1000", "logits-1000"))
def test_every_number_of_threads_is_exact(path: str, name: str, threads: int) -> None:
    case = BY_NAME[name].at(torch.float32)
    problem = Problem(case)
    with _threads(threads):
        problem.check_head_metrics()


@contextmanager
def _matmul_precision(value: str) -> Iterator[None]:
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


_SWITCHES = {
    "matmul precision high": lambda: _matmul_precision("high"),
    "matmul precision medium": lambda: _matmul_precision("medium"),
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default dtype float64": lambda: _default_dtype(torch.float64),
    "default dtype bfloat16": lambda: _default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
}


@pytest.mark.crossed
@pytest.mark.parametrize("switch", _SWITCHES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("name", ("features-10", "features-142", "wide-64-64", "wide-17-301"))
def test_switches_change_no_result(path: str, name: str, dtype: torch.dtype, switch: str) -> None:
    arguments = BY_NAME[name].at(dtype).arguments()
    before = bits(flatcore.head_metrics(**arguments))
    measure = flatcore.relative_flatness(**arguments, measure="neuronwise")
    with _SWITCHES[switch]():
        after = bits(flatcore.head_metrics(**arguments))
        again = flatcore.relative_flatness(**arguments, measure="neuronwise")
        precision = torch.get_float32_matmul_precision()
    for field, value in before.items():
        assert_same(field, after[field], value)
    assert_same("neuronwise", again, measure)
    if switch.startswith("matmul precision"):
        assert precision == switch.split()[-1], "the caller's switch was not put back"


def test_inputs_are_left_as_they_are(path: str) -> None:
    arguments = BY_NAME["features-and-bias-10"].at(torch.float32).arguments()
    arguments["logits"] = arguments["features"] @ arguments["linear_weight"].T + arguments["linear_bias"]
    kept = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    flatcore.head_metrics(**arguments)
    flatcore.relative_flatness(**arguments, measure="neuronwise", weight=torch.rand(10))
    for name, value in kept.items():
        assert torch.equal(arguments[name], value), name
