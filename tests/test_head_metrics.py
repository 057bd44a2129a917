"""Every value of every function against both oracles, on every path."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from cases import BY_NAME, CASES, Case
from checks import Problem, problem

import flatcore
from flatcore._check.tolerance import assert_within, tolerance

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDE = (torch.float32, torch.float64)
_GIVEN = ("logits-2", "logits-10", "logits-142", "temperature-10-0.5", "absent-classes-10", "top-two-rows-equal-10")
# half inputs round 10,000, and the features that lead there, to something else: the truth starts from the rounded ones
_FEATURES = ("features-3", "features-10", "features-142", "features-and-bias-10", "wide-17-301", "wide-300-15")


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------ against 60 digits
@pytest.mark.crossed
@pytest.mark.parametrize("dtype", WIDE, ids=_name)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_value_is_exact(path: str, case: Case, dtype: torch.dtype) -> None:
    """Every field of head_metrics, and what the other functions compute without the fields they do not need."""
    problem(case.name, dtype).check_head_metrics()
    problem(case.name, dtype).check_views()


@pytest.mark.crossed
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=_name)
@pytest.mark.parametrize("name", _GIVEN + _FEATURES)
def test_half_inputs_are_read_as_they_are(path: str, name: str, dtype: torch.dtype) -> None:
    assert problem(name, dtype).dtype == torch.float32
    problem(name, dtype).check_head_metrics()
    problem(name, dtype).check_views()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=_name)
def test_half_numbers_of_every_exponent(path: str, dtype: torch.dtype) -> None:
    """Subnormal ones too, in vectors (33 of a row) and alone (the last)."""
    number = torch.arange(-(2**15), 2**15, 31, dtype=torch.int16).view(dtype)
    number = number[number.isfinite()]
    features, weight = number.unsqueeze(1).repeat(1, 33), torch.zeros(2, 33, dtype=dtype)
    norm = flatcore.head_metrics(features, weight).log_feature_norm.double()
    exact = number.double().abs().log() + math.log(33) / 2
    torch.testing.assert_close(norm, exact, rtol=2**-23, atol=2**-24)


@pytest.mark.crossed
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("name", ("logits-3", "features-10", "features-and-bias-142", "wide-300-15"))
def test_features_and_weight_of_different_dtypes(
    path: str, name: str, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    problem(name, dtype, weight_dtype).check_head_metrics()


@pytest.mark.parametrize("logits_dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
def test_features_and_logits_of_different_dtypes(path: str, dtype: torch.dtype, logits_dtype: torch.dtype) -> None:
    case = BY_NAME["logits-10"]
    rounded = case.at(dtype)
    rounded = replace(rounded, logits=case.logits.to(logits_dtype))
    Problem(rounded).check_head_metrics()


@pytest.mark.parametrize("bias_dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=_name)
def test_bias_of_another_dtype(path: str, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    case = BY_NAME["features-and-bias-10"]
    rounded = case.at(dtype)
    rounded = replace(rounded, bias=case.bias.to(bias_dtype))
    Problem(rounded).check_head_metrics()


# -------------------------------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize("dtype", WIDE, ids=_name)
@pytest.mark.parametrize(
    "name", ("features-and-bias-2", "features-and-bias-10", "features-and-bias-142", "features-temperature-10")
)
def test_include_bias_augments_features_and_rows(path: str, name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name].at(dtype)
    exact = Problem(case, include_bias=True)
    arguments = case.arguments() | {"reduction": "none", "include_bias": True}
    for log in (False, True):
        prefix = "log_" if log else ""
        exact.check(f"{prefix}hessian_trace", flatcore.hessian_trace(**arguments, log=log))
        for measure in ("layerwise", "neuronwise"):
            exact.check(f"{prefix}{measure}", flatcore.relative_flatness(**arguments, measure=measure, log=log))


@pytest.mark.parametrize("name", ("logits-10", "logits-142"))
def test_include_bias_beside_given_logits(path: str, name: str) -> None:
    """The bias then enters norms and distances only: the logits already hold it."""
    case = BY_NAME[name].at(torch.float32)
    case = replace(case, bias=torch.linspace(-2, 2, case.weight.shape[0]))
    exact = Problem(case, include_bias=True)
    arguments = case.arguments() | {"reduction": "none", "include_bias": True, "log": True}
    exact.check("log_hessian_trace", flatcore.hessian_trace(**arguments))
    exact.check("log_layerwise", flatcore.relative_flatness(**arguments))
    exact.check("log_neuronwise", flatcore.relative_flatness(**arguments, measure="neuronwise"))


@pytest.mark.parametrize("include_bias", (False, True))
@pytest.mark.parametrize("name", ("features-and-bias-3", "features-and-bias-142"))
def test_norm_power_one_is_the_plain_norm(path: str, name: str, include_bias: bool) -> None:
    case = BY_NAME[name].at(torch.float32)
    exact = Problem(case, include_bias=include_bias, norm_power=1)
    arguments = case.arguments() | {"reduction": "none", "include_bias": include_bias}
    exact.check("layerwise", flatcore.relative_flatness(**arguments, norm_power=1))
    exact.check("log_layerwise", flatcore.relative_flatness(**arguments, norm_power=1, log=True))


@pytest.mark.parametrize("log", (False, True))
@pytest.mark.parametrize("name", ("logits-10", "features-3", "ties-at-the-top-142"))
def test_mean_and_sum_over_rows(path: str, name: str, log: bool) -> None:
    case = BY_NAME[name].at(torch.float32)
    exact = Problem(case)
    prefix = "log_" if log else ""
    n = case.targets.numel()
    for reduction, d in (("mean", float(n)), ("sum", 1.0)):
        arguments = case.arguments() | {"reduction": reduction, "log": log}
        exact.check_mean(f"{prefix}hessian_trace", flatcore.hessian_trace(**arguments), [1.0] * n, d)
        for measure in ("layerwise", "neuronwise"):
            got = flatcore.relative_flatness(**arguments, measure=measure)
            exact.check_mean(f"{prefix}{measure}", got, [1.0] * n, d)
        for ord, field in oracles.GRADIENTS.items():
            exact.check_mean(f"{prefix}{field}", flatcore.feature_gradient_norms(**arguments, ord=ord), [1.0] * n, d)


def test_the_default_reduction_is_the_mean(path: str) -> None:
    case = BY_NAME["features-3"].at(torch.float32)
    arguments = case.arguments()
    assert torch.equal(flatcore.hessian_trace(**arguments), flatcore.hessian_trace(**arguments, reduction="mean"))
    assert torch.equal(
        flatcore.relative_flatness(**arguments), flatcore.relative_flatness(**arguments, measure="layerwise")
    )
    assert torch.equal(
        flatcore.feature_gradient_norms(**arguments),
        flatcore.feature_gradient_norms(**arguments, ord=2, reduction="none"),
    )


@pytest.mark.parametrize("log", (False, True))
def test_class_weights_scale_rows_and_the_divisor(path: str, log: bool) -> None:
    case = BY_NAME["logits-10"].at(torch.float32)
    exact = Problem(case)
    weight = torch.tensor([0.0, 0.5, 2.0, 1.0, 3.0, 0.25, 1.5, 0.0, 4.0, 1.0])
    s = weight[case.targets.flatten()].tolist()
    arguments = case.arguments() | {"weight": weight, "log": log}
    prefix = "log_" if log else ""
    exact.check_mean(f"{prefix}hessian_trace", flatcore.hessian_trace(**arguments), s, sum(s))
    exact.check_mean(f"{prefix}neuronwise", flatcore.relative_flatness(**arguments, measure="neuronwise"), s, sum(s))
    exact.check_mean(f"{prefix}layerwise", flatcore.relative_flatness(**arguments, reduction="sum"), s, 1.0)
    for n, got in enumerate(flatcore.hessian_trace(**arguments, reduction="none")):
        one = [a if i == n else 0.0 for i, a in enumerate(s)]
        exact.check_mean(f"{prefix}hessian_trace", got, one, 1.0)


@pytest.mark.parametrize("with_weight", (False, True))
def test_soft_targets_scale_rows_and_divide_by_n(path: str, with_weight: bool) -> None:
    case = BY_NAME["logits-3"].at(torch.float32)
    exact = Problem(case)
    n = case.targets.numel()
    target = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.0, 0.5, 1.0]]).repeat(n // 3, 1)
    weight = torch.tensor([1.0, 0.5, 4.0]) if with_weight else None
    s = (target * (torch.ones(3) if weight is None else weight)).sum(dim=1).tolist()
    arguments = case.arguments() | {"target": target, "weight": weight}
    exact.check_mean("hessian_trace", flatcore.hessian_trace(**arguments), s, float(n))
    exact.check_mean(
        "log_neuronwise", flatcore.relative_flatness(**arguments, measure="neuronwise", log=True), s, float(n)
    )
    exact.check_mean("layerwise", flatcore.relative_flatness(**arguments, reduction="sum"), s, 1.0)


@pytest.mark.parametrize("ignore_index", (-100, -1, 7))
def test_ignored_rows_count_as_nothing(path: str, ignore_index: int) -> None:
    case = BY_NAME["features-10"].at(torch.float32)
    exact = Problem(case)
    ignored = torch.arange(case.targets.numel()) % 4 == 1
    target = torch.where(ignored, ignore_index, case.targets.flatten())
    s = (target != ignore_index).double().tolist()
    arguments = case.arguments() | {"target": target, "ignore_index": ignore_index}
    exact.check_mean("hessian_trace", flatcore.hessian_trace(**arguments), s, sum(s))
    exact.check_mean("log_layerwise", flatcore.relative_flatness(**arguments, log=True), s, sum(s))
    exact.check_mean("feature_gradient_norm", flatcore.feature_gradient_norms(**arguments, reduction="mean"), s, sum(s))
    norms = flatcore.feature_gradient_norms(**arguments, ord=1)
    assert (norms[target == ignore_index] == 0).all() and (norms[target != ignore_index] > 0).any()
    metrics = flatcore.head_metrics(**arguments)
    assert (metrics.loss[target == ignore_index] == 0).all()
    assert (metrics.log_feature_gradient_norm[target == ignore_index] == -math.inf).all()
    exact.check("log_hessian_trace", metrics.log_hessian_trace)  # label-free: computed for ignored rows too


@pytest.mark.parametrize("label_dtype", (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), ids=_name)
def test_labels_of_every_integer_dtype(path: str, label_dtype: torch.dtype) -> None:
    case = BY_NAME["features-10"].at(torch.float32)
    arguments = case.arguments()
    metrics = flatcore.head_metrics(**(arguments | {"target": arguments["target"].to(label_dtype)}))
    exact = Problem(case)
    exact.check("loss", metrics.loss)
    exact.check("log_feature_gradient_norm", metrics.log_feature_gradient_norm)


def test_without_target_the_labelled_fields_are_none(path: str) -> None:
    case = BY_NAME["features-10"].at(torch.float32)
    exact = Problem(case)
    metrics = flatcore.head_metrics(**(case.arguments() | {"target": None}))
    assert metrics.loss is None and metrics.log_feature_gradient_norm is None and metrics.feature_gradient_norm is None
    exact.check("log_neuronwise", metrics.log_neuronwise)
    exact.check("confidence", metrics.confidence)


# ------------------------------------------------------------------------------------ against the autograd Hessian
def _tiny(classes: int, width: int, temperature: float, bias: bool) -> Case:
    """Rows with top-two gaps up to about 12, where float64 autograd still has eight digits."""
    g = torch.Generator().manual_seed(100 * classes + width)
    scale = torch.tensor([[0.1], [0.5], [1.0], [2.0], [3.0]], dtype=torch.float64)
    features = torch.randn(5, width, generator=g, dtype=torch.float64) * scale
    return Case(
        f"tiny-{classes}-{width}",
        features,
        torch.randn(classes, width, generator=g, dtype=torch.float64),
        torch.randint(classes, (5, 1), generator=g),
        bias=torch.randn(classes, generator=g, dtype=torch.float64) if bias else None,
        temperature=temperature,
    )


@pytest.mark.crossed
@pytest.mark.parametrize("include_bias", (False, True))
@pytest.mark.parametrize("temperature", (1.0, 2.5))
@pytest.mark.parametrize(("classes", "width"), ((2, 1), (2, 3), (3, 5), (5, 4), (7, 2)))
def test_curvature_is_the_autograd_hessian(
    path: str, classes: int, width: int, temperature: float, include_bias: bool
) -> None:
    case = _tiny(classes, width, temperature, bias=include_bias or classes > 3)
    exact = Problem(case)
    arguments = case.arguments() | {"reduction": "none", "include_bias": include_bias}
    got = {
        "hessian_trace": flatcore.hessian_trace(**arguments),
        "layerwise": flatcore.relative_flatness(**arguments),
        "neuronwise": flatcore.relative_flatness(**arguments, measure="neuronwise"),
    }
    rows = zip(case.features, case.targets.flatten().tolist(), strict=True)
    expected = [
        oracles.autograd_curvature(phi, case.weight, case.bias, y, temperature, include_bias) for phi, y in rows
    ]
    for name, values in got.items():
        truth = np.array([row[name] for row in expected])
        epsilon = exact.truth.linear("one_minus_confidence")
        bound = tolerance(
            name, truth, np.log(truth), torch.float64, logit_error=exact.logit_error, oracle_epsilon=epsilon
        )
        assert_within(name, values, truth, bound, torch.float64)


@pytest.mark.parametrize("temperature", (1.0, 2.5))
@pytest.mark.parametrize(("classes", "width"), ((2, 1), (2, 3), (3, 5), (5, 4), (7, 2)))
def test_gradient_norms_are_autograds(path: str, classes: int, width: int, temperature: float) -> None:
    case = _tiny(classes, width, temperature, bias=classes > 3)
    exact = Problem(case)
    arguments = case.arguments()
    rows = list(zip(case.features, case.targets.flatten().tolist(), strict=True))
    for ord, name in oracles.GRADIENTS.items():
        gradients = [oracles.autograd_feature_gradient(phi, case.weight, case.bias, y, temperature) for phi, y in rows]
        truth = np.array([torch.linalg.vector_norm(gradient, ord=ord).item() for gradient in gradients])
        bound = tolerance(
            name,
            truth,
            np.log(truth),
            torch.float64,
            logit_error=exact.logit_error,
            condition=np.array(exact.truth.condition[ord]),
            oracle_epsilon=exact.truth.linear("one_minus_confidence"),
        )
        assert_within(name, flatcore.feature_gradient_norms(**arguments, ord=ord), truth, bound, torch.float64)


def test_the_two_oracles_agree() -> None:
    case = _tiny(5, 4, 2.5, bias=True)
    for include_bias in (False, True):
        truth = Problem(case, include_bias=include_bias).truth
        epsilon = truth.linear("one_minus_confidence")
        rows = zip(case.features, case.targets.flatten().tolist(), strict=True)
        expected = [oracles.autograd_curvature(phi, case.weight, case.bias, y, 2.5, include_bias) for phi, y in rows]
        for name in ("hessian_trace", "layerwise", "neuronwise"):
            autograd = np.array([row[name] for row in expected])
            bound = tolerance(name, autograd, np.log(autograd), torch.float64, oracle_epsilon=epsilon)
            assert_within(name, truth.linear(name), autograd, bound)
