"""Labels, soft targets, class weights and options: what counts, what is refused, by its type and its words.

N = 4, D = 3, C = 5 unless a test says otherwise.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from refusing import CHECKED_FIRST, C, N, arguments, refuses
from torch import Tensor

import flatcore
from flatcore._arguments import head
from flatcore._check.tolerance import assert_within, tolerance
from flatcore._engine import paths

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

INF, NAN = math.inf, math.nan


# --------------------------------------------------------------------------------------------------------------- labels
LABELS = {"minus-one": -1, "C": C, "minus-C": -C, "unsigned-wrap": 255, "huge": 2**62, "lowest": -(2**63)}
LABELLED: dict[str, Callable[[Tensor], Any]] = {
    "head_metrics": lambda y: flatcore.head_metrics(*_head(), y),
    "hessian_trace": lambda y: flatcore.hessian_trace(*_head(), y),
    "hessian_trace-weighted": lambda y: flatcore.hessian_trace(*_head(), y, weight=torch.ones(C)),
    "relative_flatness": lambda y: flatcore.relative_flatness(*_head(), y),
    "neuronwise": lambda y: flatcore.relative_flatness(*_head(), y, measure="neuronwise"),
    "feature_gradient_norms": lambda y: flatcore.feature_gradient_norms(*_head(), y),
}


def _head() -> tuple[Tensor, Tensor]:
    right = arguments()
    return right["features"], right["linear_weight"]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("function", LABELLED)
def test_a_label_that_is_no_class(function: str, label: str, engine: str) -> None:
    target = torch.tensor([0, 4, LABELS[label], 1])
    words = ("target", "0..4", "ignore_index (-100)", str(LABELS[label]))
    refuses(ValueError, words, lambda: LABELLED[function](target))


def test_the_default_ignored_label_is_bad_where_another_is_ignored(engine: str) -> None:
    target = torch.tensor([0, -100, 1, 2])
    refuses(
        ValueError,
        ("target", "0..4", "ignore_index (0)", "-100"),
        lambda: flatcore.feature_gradient_norms(*_head(), target, ignore_index=0),
    )


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
def test_integer_labels_of_any_width(dtype: torch.dtype, engine: str) -> None:
    right = arguments()
    del right["weight"]
    expected = flatcore.head_metrics(**right).loss
    assert torch.equal(flatcore.head_metrics(**(right | {"target": right["target"].to(dtype)})).loss, expected)
    spread = torch.stack([right["target"].to(dtype)] * 2, dim=1)[:, 0]
    assert not spread.is_contiguous()
    assert torch.equal(flatcore.head_metrics(**(right | {"target": spread})).loss, expected)
    for order in "<>":
        array = right["target"].to(dtype).numpy()
        array = array.astype(array.dtype.newbyteorder(order))
        assert torch.equal(flatcore.head_metrics(**(right | {"target": array})).loss, expected)


def test_an_unsigned_label_beyond_int64_does_not_wrap(engine: str) -> None:
    target = np.array([0, 2**64 - 100, 1, 2], dtype=np.uint64)  # as int64 it would read -100, the ignored label
    refuses(ValueError, ("target", "int64", str(2**64 - 100)), lambda: flatcore.hessian_trace(*_head(), target))


@pytest.mark.parametrize("ignore_index", (-100, 0, 3, 2**40))
def test_ignored_rows_count_nothing(ignore_index: int, engine: str) -> None:
    right = arguments(weight=None)
    features = right["features"].clone()
    features[1] = NAN  # a NaN in an ignored row stays out
    target = torch.tensor([1, ignore_index, 2, 4])
    kept = torch.tensor([0, 2, 3])
    common = {name: right[name] for name in ("linear_weight", "linear_bias")}
    all_rows = {"features": features, "target": target, "ignore_index": ignore_index} | common
    some = {"features": features[kept], "target": target[kept]} | common
    for function in (flatcore.hessian_trace, flatcore.relative_flatness, flatcore.feature_gradient_norms):
        for reduction in ("mean", "sum"):
            got, want = function(**all_rows, reduction=reduction), function(**some, reduction=reduction)
            assert_within(function.__name__, got, want.double().numpy(), tolerance("layerwise", 1.0, 0.0, want.dtype))
        assert function(**all_rows, reduction="none")[1] == 0
        assert function(**all_rows, reduction="none", log=True)[1] == -INF
    metrics = flatcore.head_metrics(**all_rows)
    assert (
        metrics.loss[1] == 0 and metrics.log_feature_gradient_norm[1] == -INF and metrics.feature_gradient_norm[1] == 0
    )
    assert metrics.prediction[1] == -1 and metrics.log_hessian_trace[1].isnan()


def test_nothing_valid_has_no_mean(engine: str) -> None:
    target = torch.full((N,), -100)
    for function in (flatcore.hessian_trace, flatcore.relative_flatness, flatcore.feature_gradient_norms):
        for log in (False, True):
            assert function(*_head(), target, reduction="mean", log=log).isnan()
        assert function(*_head(), target, reduction="sum") == 0
    for weight in (torch.zeros(C), torch.tensor([0.0, 1, 1, 1, 1])):
        got = flatcore.hessian_trace(*_head(), torch.zeros(N, dtype=torch.long), weight=weight)
        assert got.isnan()


# --------------------------------------------------------------------------------------------------------- soft targets
def test_soft_targets_weigh_the_samples(engine: str) -> None:
    right = arguments()
    soft = torch.rand(N, C, generator=torch.Generator().manual_seed(2))
    common = {name: right[name] for name in ("features", "linear_weight", "linear_bias")}
    each = flatcore.hessian_trace(**common, reduction="none").double()
    for weight in (None, right["weight"]):
        s = (soft.double() * (1 if weight is None else weight.double())).sum(dim=1)
        bound = tolerance("hessian_trace", 1.0, 0.0, torch.float32)
        for reduction, want in (("none", s * each), ("sum", (s * each).sum()), ("mean", (s * each).sum() / N)):
            got = flatcore.hessian_trace(**common, target=soft, weight=weight, reduction=reduction)
            assert_within(reduction, got, want.numpy(), bound, torch.float32)


@pytest.mark.parametrize("function", (flatcore.feature_gradient_norms, flatcore.head_metrics))
def test_soft_targets_are_refused_by_name_where_a_label_is_meant(function: Callable[..., Any], engine: str) -> None:
    words = ("target", "integer class labels", "torch.float32", "soft targets", "hessian_trace and relative_flatness")
    refuses(TypeError, words, lambda: function(*_head(), torch.full((N, C), 0.2)))


def test_negative_soft_targets(engine: str) -> None:
    soft = torch.full((N, C), 0.25)
    soft[2, 1] = -0.5
    refuses(ValueError, ("soft target", "negative", "-0.5"), lambda: flatcore.hessian_trace(*_head(), soft))
    soft.requires_grad_()
    refuses(ValueError, ("target", "target.detach()"), lambda: flatcore.hessian_trace(*_head(), soft))


def test_gradients_need_labels(engine: str) -> None:
    refuses(ValueError, ("target", "None"), lambda: flatcore.feature_gradient_norms(*_head(), None))


# ------------------------------------------------------------------------------------------------- weights and the bias
def test_negative_class_weights(engine: str) -> None:
    weight = torch.tensor([1.0, 1.0, -0.25, 1.0, 1.0])
    refuses(ValueError, ("weight", "negative", "-0.25"), lambda: flatcore.hessian_trace(**arguments(weight=weight)))


def test_class_weights_need_a_target(engine: str) -> None:
    words = ("weight", "needs a target", "target=None")
    refuses(ValueError, words, lambda: flatcore.hessian_trace(**arguments(target=None)))


def test_a_weight_of_zero_keeps_a_nan_out(engine: str) -> None:
    right = arguments(logits=None)
    right["features"][2] = NAN  # its label, 2, has weight 0
    assert flatcore.hessian_trace(**right).isfinite()
    assert flatcore.hessian_trace(**right, reduction="none")[2] == 0
    assert flatcore.hessian_trace(**right, reduction="none", log=True)[2] == -INF


def test_include_bias_needs_a_finite_bias(engine: str) -> None:
    right = arguments(include_bias=True)
    words = ("include_bias", "linear_bias", "None")
    refuses(ValueError, words, lambda: flatcore.hessian_trace(**(right | {"linear_bias": None})))
    refuses(ValueError, words, lambda: flatcore.relative_flatness(**(right | {"linear_bias": None})))
    masked = right["linear_bias"].clone()
    masked[3] = -INF
    for function in (flatcore.hessian_trace, flatcore.relative_flatness):
        refuses(
            ValueError, ("linear_bias", "finite", "-inf"), lambda f=function: f(**(right | {"linear_bias": masked}))
        )
    assert flatcore.hessian_trace(**(right | {"linear_bias": masked, "include_bias": False})).isfinite()


def test_a_bias_that_may_not_be_looked_at_is_nan_with_include_bias(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device a look would wait: all paths say NaN of a masked class that counts as a parameter."""
    monkeypatch.setattr(head, "_may_read", lambda tensor: False)
    g = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(3, 5, generator=g), torch.randn(4, 5, generator=g), torch.randn(4, generator=g)
    right = {"linear_bias": b, "include_bias": True, "reduction": "none", "log": True}
    masked = right | {"linear_bias": torch.cat((b[:3], torch.tensor([-INF])))}
    for measure in ("layerwise", "neuronwise"):
        assert flatcore.relative_flatness(x, w, measure=measure, **right).isfinite().all()
        assert flatcore.relative_flatness(x, w, measure=measure, **masked).isnan().all()
        logits = x @ w.T
        assert flatcore.relative_flatness(x, w, logits=logits, measure=measure, **masked).isnan().all()


# -------------------------------------------------------------------------------------------------------------- options
TRACE, FLATNESS, GRADIENT = "hessian_trace", "relative_flatness", "feature_gradient_norms"
OPTIONS: dict[str, tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = {}
for _value in (3, 0, 1.5, "2", True, None, (2,)):
    OPTIONS[f"norm_power {_value!r}"] = FLATNESS, {"norm_power": _value}, ValueError, ("1, 2", repr(_value))
OPTIONS["norm_power with neuronwise"] = (
    FLATNESS, {"norm_power": 1, "measure": "neuronwise"}, ValueError, ("norm_power must be 2", "neuronwise", "got 1"),
)  # fmt: skip
for _value in ("Layerwise", "", None, 1, ["layerwise"]):
    OPTIONS[f"measure {_value!r}"] = (
        FLATNESS,
        {"measure": _value},
        ValueError,
        ("'layerwise', 'neuronwise'", repr(_value)),
    )
for _function in (TRACE, FLATNESS, GRADIENT):
    for _value in ("average", "Mean", None, True, 0, ("mean",)):
        OPTIONS[f"{_function} reduction {_value!r}"] = (
            _function, {"reduction": _value}, ValueError, ("reduction", "'mean', 'sum', 'none'", repr(_value)),
        )  # fmt: skip
    for _value in (1, 0, None, "yes", np.True_, torch.tensor(True)):
        OPTIONS[f"{_function} log {_value!r}"] = (
            _function, {"log": _value}, TypeError, ("log must be True or False", type(_value).__name__),
        )  # fmt: skip
    for _value in (0, 0.0, -1, -0.5, NAN, INF, -INF):
        OPTIONS[f"{_function} temperature {_value!r}"] = (
            _function, {"temperature": _value}, ValueError, ("temperature must be finite and above 0", repr(_value)),
        )  # fmt: skip
    for _value in (True, "1", None, 1j, [1.0], torch.tensor(1.0)):
        OPTIONS[f"{_function} temperature {_value!r}"] = (
            _function, {"temperature": _value}, TypeError, ("temperature must be a number", type(_value).__name__),
        )  # fmt: skip
    for _value in (1.0, "0", None, True, torch.tensor(0)):
        OPTIONS[f"{_function} ignore_index {_value!r}"] = (
            _function, {"ignore_index": _value}, TypeError, ("ignore_index must be an integer", type(_value).__name__),
        )  # fmt: skip
    OPTIONS[f"{_function} ignore_index 2**70"] = (
        _function,
        {"ignore_index": 2**70},
        ValueError,
        ("ignore_index", "int64"),
    )
    OPTIONS[f"{_function} temperature 10**400"] = (
        _function, {"temperature": 10**400}, ValueError, ("temperature must be finite",),
    )  # fmt: skip
for _value in (0, 3, -1, -INF, NAN, "fro", None, True, (1, 2), [2]):
    OPTIONS[f"ord {_value!r}"] = GRADIENT, {"ord": _value}, ValueError, ("ord", "1, 2, inf", repr(_value))
for _value in (1, None, "yes"):
    OPTIONS[f"include_bias {_value!r}"] = (
        TRACE, {"include_bias": _value}, TypeError, ("include_bias must be True or False", type(_value).__name__),
    )  # fmt: skip


@CHECKED_FIRST
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, engine: str) -> None:
    function, changes, error, words = OPTIONS[option]
    given = arguments()
    if function == GRADIENT:
        del given["weight"]
    refuses(error, words, lambda: getattr(flatcore, function)(**(given | changes)))


@CHECKED_FIRST
@pytest.mark.parametrize("ord", (0, 3, -INF, NAN, "2", "l3", "-inf", True, None, [1, 2], (), (1, 3), (2, "l")))
def test_row_norms_orders(ord: Any, engine: str) -> None:
    refuses(ValueError, ("ord", "1, 2, inf"), lambda: flatcore.row_norms(torch.ones(2, 2), ord))


def test_a_subnormal_temperature_is_refused_or_right() -> None:
    # 1/T leaves float64's range below 5.6e-309
    right = arguments(temperature=1e-310, reduction="none", log=True)
    answers = []
    for engine in ("reference", "fused", "chunked"):
        path = None if engine == "reference" else engine
        with flatcore.backend("reference" if path is None else "native"), paths.forced(path=path):
            try:
                answers.append(flatcore.hessian_trace(**right))
            except ValueError as error:
                assert "temperature" in str(error)
                answers.append(torch.full((N,), -1.0))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert not answers[0].isnan().any()


def test_an_unknown_backend() -> None:
    before = flatcore.show_config()["backend"]
    for value in ("nonsense", "", None, 1, ["auto"]):
        words = ("backend", "'auto', 'native', 'reference'", repr(value))
        refuses(ValueError, words, lambda value=value: flatcore.backend(value))
    assert flatcore.show_config()["backend"] == before


def test_an_unknown_path_or_target() -> None:
    def enter(**given: str) -> None:
        with paths.forced(**given):
            pass

    refuses(ValueError, ("path", "'fused', 'chunked'", "'quick'"), lambda: enter(path="quick"))
    refuses(ValueError, ("baseline, avx2, avx512", "'neon'"), lambda: enter(cpu="neon"))


ENVIRONMENT = {
    "backend": ({"FLATCORE_BACKEND": "fast"}, ("ValueError", "backend", "'auto', 'native', 'reference'", "'fast'")),
    "target": ({"FLATCORE_CPU": "neon"}, ("ValueError", "FLATCORE_CPU", "baseline, avx2, avx512", "'neon'")),
    "check": ({"FLATCORE_CUDA_CHECK": "yes"}, ("ValueError", "FLATCORE_CUDA_CHECK", "0, 1, force", "'yes'")),
}


@pytest.mark.parametrize("case", ENVIRONMENT)
def test_a_wrong_environment_stops_the_import(case: str) -> None:
    variables, words = ENVIRONMENT[case]
    run = subprocess.run(
        [sys.executable, "-c", "import flatcore"],
        env=os.environ | variables, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    last_line = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and all(word in last_line for word in words), run.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    (
        ({"FLATCORE_BACKEND": "reference"}, "reference reference"),
        ({"FLATCORE_BACKEND": ""}, "auto native"),
        ({"FLATCORE_CPU": "baseline", "FLATCORE_BACKEND": "native"}, "native native baseline"),
    ),
)
def test_the_environment_chooses(variables: dict[str, str], expected: str) -> None:
    script = "import flatcore; c = flatcore.show_config(); print(c['backend'], c['cpu_backend'], c['cpu_target'])"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | variables, capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert run.stdout.startswith(expected), run.stdout
