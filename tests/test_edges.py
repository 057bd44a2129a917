"""The edge rules: what happens where a value is 0, infinite, undefined or does not count. Each on every path."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import BY_NAME, Case
from checks import Problem, bits
from torch import Tensor

import flatcore
from flatcore._check.tolerance import assert_same, assert_within, tolerance

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

DTYPES = (torch.float32, torch.float64)
INF, NAN = math.inf, math.nan
_CURVATURE = ("log_hessian_trace", "log_layerwise", "log_neuronwise")


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def _randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _all(values: Tensor, expected: float) -> bool:
    return bool((values.isnan() if math.isnan(expected) else values == expected).all())


def _assert_one_class_left(metrics: flatcore.HeadMetrics) -> None:
    """Every field of rows that have one finite logit and it is the target's."""
    assert _all(metrics.confidence, 1.0)
    assert _all(metrics.margin, INF)
    assert _all(metrics.log_one_minus_confidence, -INF)
    assert _all(metrics.loss, 0.0)
    assert _all(metrics.log_feature_gradient_norm, -INF)
    assert _all(metrics.feature_gradient_norm, 0.0)
    assert metrics.log_feature_norm.isfinite().all()
    for field in _CURVATURE:
        assert _all(getattr(metrics, field), -INF)
        assert _all(getattr(metrics, field.removeprefix("log_")), 0.0)


# --------------------------------------------------------------------------------------------------- one class left
@pytest.mark.parametrize("given", (False, True), ids=("features", "logits"))
def test_a_single_class(path: str, dtype: torch.dtype, given: bool) -> None:
    features, weight = _randn(5, 3, dtype=dtype), _randn(1, 3, dtype=dtype, seed=1)
    target = torch.zeros(5, dtype=torch.int64)
    logits = features @ weight.T if given else None
    metrics = flatcore.head_metrics(features, weight, target, logits=logits)
    _assert_one_class_left(metrics)
    assert _all(metrics.prediction, 0)
    assert _all(flatcore.hessian_trace(features, weight, target, logits=logits, log=True), -INF)
    for ord in (1, 2, INF):
        assert _all(flatcore.feature_gradient_norms(features, weight, target, logits=logits, ord=ord), 0.0)


@pytest.mark.parametrize("classes", (2, 9, 40))
def test_one_finite_logit_that_is_the_targets(path: str, dtype: torch.dtype, classes: int) -> None:
    features, weight = _randn(classes, 5, dtype=dtype), _randn(classes, 5, dtype=dtype, seed=1)
    target = torch.arange(classes)
    logits = torch.full((classes, classes), -INF, dtype=dtype)
    logits.fill_diagonal_(-7.5)
    metrics = flatcore.head_metrics(features, weight, target, logits=logits)
    _assert_one_class_left(metrics)
    assert torch.equal(metrics.prediction, target)


def test_one_class_left_by_the_bias(path: str, dtype: torch.dtype) -> None:
    features, weight = _randn(5, 4, dtype=dtype), _randn(3, 4, dtype=dtype, seed=1)
    bias = torch.tensor([-INF, 2.0, -INF], dtype=dtype)
    metrics = flatcore.head_metrics(features, weight, torch.ones(5, dtype=torch.int64), linear_bias=bias)
    _assert_one_class_left(metrics)
    assert _all(metrics.prediction, 1)


@pytest.mark.parametrize("classes", (2, 9, 40))
def test_a_masked_target_beside_one_finite_logit(path: str, dtype: torch.dtype, classes: int) -> None:
    """The loss is infinite, its gradient w_m - w_y is not."""
    features, weight = _randn(4, 5, dtype=dtype), _randn(classes, 5, dtype=dtype, seed=1)
    logits = torch.full((4, classes), -INF, dtype=dtype)
    logits[:, 1] = 3.0
    target = torch.zeros(4, dtype=torch.int64)
    metrics = flatcore.head_metrics(features, weight, target, logits=logits)
    assert _all(metrics.loss, INF)
    assert _all(metrics.log_hessian_trace, -INF) and _all(metrics.margin, INF)
    for ord in (1, 2, INF):
        truth = torch.linalg.vector_norm(weight[1].double() - weight[0].double(), ord=ord).repeat(4)
        bound = tolerance("feature_gradient_norm", truth.numpy(), truth.log().numpy(), dtype)
        got = flatcore.feature_gradient_norms(features, weight, target, logits=logits, ord=ord)
        assert_within(f"ord {ord}", got, truth.numpy(), bound, dtype)


def test_a_masked_target_beside_several_classes(path: str, dtype: torch.dtype) -> None:
    case = BY_NAME["absent-classes-10"].at(dtype)
    masked = case.logits.gather(1, case.targets) == -INF
    assert masked.any() and not masked.all()
    metrics = flatcore.head_metrics(**case.arguments())
    assert torch.equal(metrics.loss == INF, masked.flatten())
    assert metrics.log_feature_gradient_norm[masked.flatten()].isfinite().all()


def test_no_class_at_all_is_refused(path_free_head: tuple[Tensor, Tensor]) -> None:
    features, weight = path_free_head
    with pytest.raises(ValueError, match=r"linear_weight must have at least one row \(C >= 1\), got C = 0"):
        flatcore.head_metrics(features, weight[:0])


@pytest.fixture
def path_free_head() -> tuple[Tensor, Tensor]:
    """Features and head for calls that are refused before any path is chosen."""
    return _randn(4, 3, dtype=torch.float32), _randn(5, 3, dtype=torch.float32, seed=1)


# -------------------------------------------------------------------------------------------------------------- NaN
_POISON = {
    "NaN logit": ("logits", NAN),
    "+inf logit": ("logits", INF),
    "all logits -inf": ("row", -INF),
    "NaN logit among absent classes": ("rest", NAN),
    "NaN feature": ("features", NAN),
    "inf feature": ("features", INF),
    "-inf feature": ("features", -INF),
}


# a logit can be poisoned only where logits are given
_POISONED = [(kind, True) for kind in _POISON] + [(kind, False) for kind in _POISON if "feature" in kind]


@pytest.mark.crossed
@pytest.mark.parametrize("classes", (1, 2, 9, 33))
@pytest.mark.parametrize(("kind", "given"), _POISONED)
def test_poison_stays_in_its_row(path: str, dtype: torch.dtype, kind: str, given: bool, classes: int) -> None:
    where, value = _POISON[kind]
    n, bad = 11, 6
    features, weight = _randn(n, 7, dtype=dtype), _randn(classes, 7, dtype=dtype, seed=1)
    logits = features @ weight.T if given else None
    target = torch.arange(n) % classes
    clean = flatcore.head_metrics(features, weight, target, logits=logits)
    features, logits = features.clone(), None if logits is None else logits.clone()
    for column in {0, classes // 2, classes - 1}:
        if where == "features":
            features[bad, column % 7] = value
        elif where == "row":
            logits[bad] = value
        elif where == "rest":
            logits[bad] = -INF
            logits[bad, column] = value
        else:
            logits[bad, column] = value
        metrics = flatcore.head_metrics(features, weight, target, logits=logits)
        others = torch.arange(n) != bad
        assert metrics.prediction[bad] == -1
        for field, got in bits(metrics).items():
            if field != "prediction":
                assert got[bad].isnan(), f"{field} of the poisoned row is {got[bad]}"
            assert_same(field, got[others], getattr(clean, field)[others])
        for ord in (1, 2, INF):
            norms = flatcore.feature_gradient_norms(features, weight, target, logits=logits, ord=ord)
            assert norms[bad].isnan() and not norms[others].isnan().any()


@pytest.mark.parametrize("value", (NAN, INF))
def test_a_poisoned_bias_or_weight_reaches_every_row(path: str, dtype: torch.dtype, value: float) -> None:
    features, weight = _randn(5, 7, dtype=dtype), _randn(4, 7, dtype=dtype, seed=1)
    bias = torch.tensor([0.0, value, 1.0, -INF], dtype=dtype)
    for metrics in (
        flatcore.head_metrics(features, weight, linear_bias=bias),
        flatcore.head_metrics(features, weight.index_fill(0, torch.tensor([2]), value)),
    ):
        assert _all(metrics.prediction, -1)
        assert _all(metrics.confidence, NAN) and _all(metrics.log_hessian_trace, NAN)


def test_logits_that_overflow_are_not_absent_classes(path: str) -> None:
    """A product of -1e40 is outside float32; its class is not masked: the row is NaN, or right where the sums are wide."""
    features = torch.tensor([[1e20, 1.0], [1.0, 1.0]])
    weight = torch.tensor([[-1e20, 0.0], [0.0, 1.0], [0.0, 2.0]])
    metrics = flatcore.head_metrics(features, weight, torch.tensor([0, 0]))
    assert metrics.loss[0].isnan() or metrics.loss[0] > 1e38
    assert metrics.loss[1] > 1e19


# ------------------------------------------------------------------------------------------------- values that are 0
def test_zero_features(path: str, dtype: torch.dtype) -> None:
    """Nothing curves along the weights, but the gradient with respect to the features is there."""
    weight = _randn(4, 6, dtype=dtype, seed=1)
    features = torch.zeros(5, 6, dtype=dtype)
    target = torch.arange(5) % 4
    metrics = flatcore.head_metrics(features, weight, target)
    for field in (*_CURVATURE, "log_feature_norm"):
        assert _all(getattr(metrics, field), -INF)
        assert _all(getattr(metrics, field.removeprefix("log_")), 0.0)
    problem = Problem(Case("zero-features", features, weight, target.unsqueeze(1)))
    for field in ("loss", "log_feature_gradient_norm", "confidence", "margin"):
        problem.check(field, getattr(metrics, field))
    # the bias as a parameter sees a feature of 1
    bias = _randn(4, dtype=dtype, seed=2)
    problem = Problem(Case("zero-features", features, weight, target.unsqueeze(1), bias=bias), include_bias=True)
    got = flatcore.hessian_trace(features, weight, linear_bias=bias, include_bias=True, reduction="none", log=True)
    problem.check("log_hessian_trace", got)


def test_zero_weight(path: str, dtype: torch.dtype) -> None:
    features, weight = _randn(5, 6, dtype=dtype), torch.zeros(4, 6, dtype=dtype)
    target = torch.arange(5) % 4
    metrics = flatcore.head_metrics(features, weight, target)
    for field in ("log_layerwise", "log_neuronwise", "log_feature_gradient_norm"):
        assert _all(getattr(metrics, field), -INF)
    assert _all(metrics.prediction, 0)  # a tie: the lowest index
    problem = Problem(Case("zero-weight", features, weight, target.unsqueeze(1)))
    for field in ("log_hessian_trace", "loss", "confidence", "margin"):
        problem.check(field, getattr(metrics, field))


@pytest.mark.parametrize("classes", (2, 9, 40))
@pytest.mark.parametrize("size", (1.0, 1e4))
def test_equal_rows(path: str, dtype: torch.dtype, size: float, classes: int) -> None:
    """Exactly 0, not a small rest of a subtraction, whatever the logits are."""
    features = _randn(6, 5, dtype=dtype)
    weight = (size * _randn(1, 5, dtype=dtype, seed=1)).expand(classes, 5)
    logits, target = 3 * _randn(6, classes, dtype=dtype, seed=2), torch.arange(6) % classes
    metrics = flatcore.head_metrics(features, weight, target, logits=logits)
    assert _all(metrics.log_neuronwise, -INF) and _all(metrics.neuronwise, 0.0)
    assert _all(metrics.log_feature_gradient_norm, -INF)
    for ord in (1, INF):
        assert _all(flatcore.feature_gradient_norms(features, weight, target, logits=logits, ord=ord), 0.0)
    problem = Problem(Case("equal-rows", features, weight, target.unsqueeze(1), logits=logits))
    for field in ("log_hessian_trace", "log_layerwise", "loss"):
        problem.check(field, getattr(metrics, field))


def test_a_zero_value_among_others_leaves_the_log_of_the_mean(path: str, dtype: torch.dtype) -> None:
    case = BY_NAME["features-10"].at(dtype)
    features = case.features.clone()
    features[0] = 0
    got = flatcore.hessian_trace(features, case.weight, log=True)
    problem = Problem(replace(case, features=features, targets=case.targets[:, :1]))
    n = features.shape[0]
    problem.check_mean("log_hessian_trace", got, [1.0] * n, float(n))


# ------------------------------------------------------------------------------------------------ rows that don't count
@pytest.mark.parametrize("value", (1.0, NAN, INF))
@pytest.mark.parametrize("by", ("ignore_index", "weight"))
def test_rows_that_do_not_count_are_zero_whatever_they_hold(
    path: str, dtype: torch.dtype, by: str, value: float
) -> None:
    features, weight = _randn(6, 5, dtype=dtype), _randn(3, 5, dtype=dtype, seed=1)
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    clean = {"target": target, "reduction": "none"}
    dead = torch.tensor([False, False, True, False, False, True])
    arguments = dict(clean)
    if by == "weight":
        arguments["weight"] = torch.tensor([1.0, 1.0, 0.0], dtype=dtype)
    else:
        arguments["target"] = torch.where(dead, -100, target)
    poisoned = features.clone()
    poisoned[2, 3] = value
    functions = [flatcore.hessian_trace, flatcore.relative_flatness]
    if by == "ignore_index":
        functions.append(flatcore.feature_gradient_norms)
    for function in functions:
        for log, zero in ((False, 0.0), (True, -INF)):
            got = function(poisoned, weight, **arguments, log=log)
            assert _all(got[dead], zero)
            assert_same(function.__name__, got[~dead], function(features, weight, **clean, log=log)[~dead])
            mean = function(poisoned, weight, **(arguments | {"reduction": "mean"}), log=log)
            assert mean.isfinite()


def test_ignored_rows_of_head_metrics(path: str, dtype: torch.dtype) -> None:
    features, weight = _randn(4, 5, dtype=dtype), _randn(3, 5, dtype=dtype, seed=1)
    features[2, 0] = NAN
    metrics = flatcore.head_metrics(features, weight, torch.tensor([0, -100, -100, 2]))
    assert torch.equal(metrics.loss == 0, torch.tensor([False, True, True, False]))
    assert torch.equal(metrics.log_feature_gradient_norm == -INF, torch.tensor([False, True, True, False]))
    assert torch.equal(metrics.log_hessian_trace.isnan(), torch.tensor([False, False, True, False]))


@pytest.mark.parametrize("log", (False, True))
def test_nothing_valid_has_no_mean(path: str, dtype: torch.dtype, log: bool) -> None:
    features, weight = _randn(3, 5, dtype=dtype), _randn(4, 5, dtype=dtype, seed=1)
    ignored = torch.full((3,), -100)
    zero = -INF if log else 0.0
    for function in (flatcore.hessian_trace, flatcore.relative_flatness, flatcore.feature_gradient_norms):
        assert function(features, weight, ignored, reduction="mean", log=log).isnan()
        assert function(features, weight, ignored, reduction="sum", log=log) == zero
    nothing = {"weight": torch.zeros(4, dtype=dtype), "log": log}
    assert flatcore.hessian_trace(features, weight, torch.tensor([0, 1, 2]), **nothing).isnan()
    assert flatcore.hessian_trace(features, weight, torch.tensor([0, 1, 2]), **nothing, reduction="sum") == zero


@pytest.mark.parametrize("log", (False, True))
def test_no_rows(path: str, dtype: torch.dtype, log: bool) -> None:
    features, weight = torch.empty(0, 5, dtype=dtype), _randn(4, 5, dtype=dtype, seed=1)
    target = torch.empty(0, dtype=torch.int64)
    for function in (flatcore.hessian_trace, flatcore.relative_flatness, flatcore.feature_gradient_norms):
        mean = function(features, weight, target, reduction="mean", log=log)
        assert mean.shape == () and mean.dtype == dtype and mean.isnan()
        assert function(features, weight, target, reduction="sum", log=log) == (-INF if log else 0.0)
        assert function(features, weight, target, reduction="none", log=log).shape == (0,)
    metrics = flatcore.head_metrics(features, weight, target)
    assert all(value.shape == (0,) for value in metrics)
    assert metrics.prediction.dtype == torch.int64 and metrics.loss.dtype == dtype


# -------------------------------------------------------------------------------------------------------- temperature
@pytest.mark.parametrize("classes", (3, 10, 142))
def test_differences_are_formed_before_they_are_divided(path: str, dtype: torch.dtype, classes: int) -> None:
    """30,000/T has no digits left for a 1/64 step in float32; the difference over T has."""
    case = BY_NAME[f"logits-with-offset-{classes}-30000"].at(dtype)
    fine = torch.where(case.logits < 30000, case.logits, 30000 + (case.logits - 30000).clamp(0, 4).mul(64).round() / 64)
    case = replace(case, logits=fine, temperature=1 / 512)
    Problem(case).check_head_metrics()


def test_the_least_and_the_greatest_temperature(path: str, dtype: torch.dtype) -> None:
    case = BY_NAME["logits-10"].at(dtype)
    for temperature in (1e-6, 1e6):
        Problem(replace(case, temperature=temperature)).check_head_metrics()


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"weight": torch.ones(5)}, r"weight \(class weights\) needs a target, got target=None"),
        (
            {"weight": -torch.ones(5), "target": torch.zeros(4, dtype=torch.int64)},
            r"weight must not be negative, got -1\.0",
        ),
        ({"include_bias": True}, "include_bias=True needs linear_bias, got linear_bias=None"),
        ({"measure": "neuronwise", "norm_power": 1}, "norm_power must be 2 with measure='neuronwise', got 1"),
    ),
    ids=("weight-without-target", "negative-weight", "include-bias-without-bias", "norm-power-with-neuronwise"),
)
def test_arguments_that_mean_nothing_together(
    path_free_head: tuple[Tensor, Tensor], arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        flatcore.relative_flatness(*path_free_head, **arguments)


@pytest.mark.parametrize("label", (-1, -101, 5, 2**40))
@pytest.mark.parametrize("kind", ("reference", "fused", "chunked"))
def test_a_label_that_is_no_class_is_refused(path_free_head: tuple[Tensor, Tensor], kind: str, label: int) -> None:
    target = torch.tensor([0, 4, label, -100])
    backend = "reference" if kind == "reference" else "native"
    message = rf"target must hold labels in 0\.\.4 or ignore_index \(-100\), got {label} in row 2"
    with (
        flatcore.backend(backend),
        flatcore._engine.paths.forced(path=None if kind == "reference" else kind),
        pytest.raises(ValueError, match=message),
    ):
        flatcore.head_metrics(*path_free_head, target)


# ------------------------------------------------------------------------------------------------- one output is named
def test_a_weight_of_one_row_warns_at_the_callers_line() -> None:
    """It is nearly always a sigmoid's; what it measures is 0, as before."""
    features, weight, target = (
        _randn(5, 3, dtype=torch.float32),
        _randn(1, 3, dtype=torch.float32),
        torch.zeros(5).long(),
    )
    for function in (
        lambda: flatcore.hessian_trace(features, weight),
        lambda: flatcore.relative_flatness(features.numpy(), weight.numpy(), target.numpy()),
        lambda: flatcore.feature_gradient_norms(features, weight, target, reduction="sum"),
        lambda: flatcore.head_metrics(features, weight).hessian_trace.sum(),
        lambda: flatcore.unmasked_cross_entropy(features @ weight.T, target),
    ):
        with pytest.warns(UserWarning, match=r"has one output \(C = 1\).*torch\.cat\(\[torch\.zeros_like\(") as seen:
            assert float(function()) == 0
        assert {warning.filename for warning in seen} == {__file__}
    with pytest.warns(UserWarning, match="one output") as seen:
        flatcore.robustness.margin_radius(features, weight, target, lipschitz=1.0)
    assert {warning.filename for warning in seen} == {__file__}


def test_the_head_of_two_rows_that_the_warning_names_is_the_sigmoid() -> None:
    features, w, b = _randn(5, 3, dtype=torch.float64), _randn(1, 3, dtype=torch.float64), torch.tensor([0.5]).double()
    two = torch.cat([torch.zeros_like(w), w]), torch.cat([torch.zeros_like(b), b])
    p = torch.sigmoid(features @ w[0] + b)
    want = 2 * p * (1 - p) * (features * features).sum(1)
    got = flatcore.hessian_trace(features, two[0], linear_bias=two[1], reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("error")
def test_nothing_warns_while_tracing() -> None:
    features, weight = _randn(5, 3, dtype=torch.float32), _randn(1, 3, dtype=torch.float32)
    compiled = torch.compile(lambda x, w: flatcore.hessian_trace(x, w, log=True), backend="eager", fullgraph=True)
    assert compiled(features, weight) == -INF
