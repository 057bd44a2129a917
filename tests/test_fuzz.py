"""Some hundred drawn calls on every path, the heads and rows that were once wrong, and proof that the net can catch.

The same drawing for as long as one asks: ``python tests/fuzz.py --cases 10000``.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from typing import Any
from unittest import mock

import answers
import fuzz
import numpy as np
import oracle_derivatives
import oracles
import pytest
import torch
from conftest import CUDA, PATHS
from differentiated import exact_log_gradients
from hypothesis import HealthCheck, Phase, given, settings
from strategies import FUNCTIONS, GRADIENT_NORMS, LABELS, MEASURES, Call, calls

import flatcore

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

NAN, INF = math.nan, math.inf
CPU = tuple(name for name in PATHS if name not in CUDA)


def _examples(count: int) -> settings:
    """So many, the same ones in each run; a wrong call is reported reduced to a row, so hypothesis need not shrink it."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


def _assert_right(call: Call, paths: tuple[str, ...]) -> None:
    counts, shown = fuzz.Counts(), []
    fuzz.fuzz(iter([("drawn", call)]), paths, counts, shown.append)
    assert not counts.wrong, "\n".join(shown)


@pytest.fixture
def cpu_paths(one_thread: None) -> tuple[str, ...]:
    """Those of the CPU that this processor has; each proves by itself that it ran."""
    return fuzz.paths()


# ------------------------------------------------------------------------------------------------------- drawn calls
@pytest.mark.parametrize("function", FUNCTIONS)
def test_drawn_calls_are_right_on_every_path(function: str, cpu_paths: tuple[str, ...]) -> None:
    @_examples(15)
    @given(call=calls((function,), classes=3000))
    def check(call: Call) -> None:
        _assert_right(call, cpu_paths)

    check()


@pytest.mark.parametrize("path", CUDA)
@pytest.mark.parametrize("function", FUNCTIONS[:-2])
def test_drawn_calls_are_right_on_a_cuda_device(path: str, function: str, one_thread: None) -> None:
    """Over emulated threads where there is no device: few and small ones."""

    @_examples(5)
    @given(call=calls((function,), classes=70))
    def check(call: Call) -> None:
        _assert_right(call, (path,))

    check()


# ----------------------------------------------------------------------------------- heads and rows that were once wrong
def call_of(function: str, features: Any, weight: Any, target: Any = None, **changes: Any) -> Call:
    """Make a call with the defaults of the public functions."""
    N = len(features)
    fields: dict[str, Any] = {
        "function": function, "kind": "given", "features": torch.as_tensor(features), "weight": torch.as_tensor(weight),
        "bias": None, "logits": None, "target": target, "class_weight": None, "temperature": 1.0, "ignore_index": -100,
        "include_bias": False, "norm_power": 2, "reduction": "none", "log": False, "upstream": None,
        "nothing": torch.zeros(N, dtype=torch.bool),
    }  # fmt: skip
    return Call(**(fields | changes))


@pytest.mark.parametrize("function", (*MEASURES, *GRADIENT_NORMS, "head_metrics"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_sparse_head(function: str, dtype: torch.dtype, cpu_paths: tuple[str, ...]) -> None:
    """600 classes, most of them equal rows of zeros: rounding of one sign, which W - center has wherever rows repeat."""
    g = torch.Generator().manual_seed(19)
    w = torch.randint(-4, 5, (600, 3), generator=g) * (torch.rand(600, 3, generator=g) < 0.03)
    x = torch.randint(-4, 5, (24, 3), generator=g)
    changes: dict[str, Any] = {}
    if function != "head_metrics":
        changes = {"log": True, "upstream": torch.ones(24, dtype=dtype)}
    _assert_right(call_of(function, x.to(dtype), w.to(dtype), torch.arange(24) * 25, **changes), cpu_paths)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("function", ("neuronwise", "feature_gradient_norm"))
@pytest.mark.parametrize("classes", (40_000, 200_000))
def test_many_classes_with_few_rows(
    classes: int, function: str, dtype: torch.dtype, cpu_paths: tuple[str, ...]
) -> None:
    """A padded vocabulary: nearly all rows one and the same."""
    g = torch.Generator().manual_seed(classes)
    rows = torch.randn(40, 3, generator=g, dtype=torch.float64)
    w = rows[(torch.rand(classes, generator=g) ** 8 * 40).long().clamp(max=39)]
    x = torch.randn(2, 3, generator=g, dtype=torch.float64)
    paths = tuple(name for name in cpu_paths if name.startswith("chunked"))
    _assert_right(call_of(function, x.to(dtype), w.to(dtype), torch.tensor([3, classes - 1]), log=True), paths)


@pytest.mark.parametrize("function", ("unmasked_cross_entropy", "input_gradients", "head_metrics", *GRADIENT_NORMS))
@pytest.mark.parametrize("label_dtype", LABELS, ids=str)
def test_a_label_is_ignored_only_where_it_equals_ignore_index(
    label_dtype: torch.dtype, function: str, cpu_paths: tuple[str, ...]
) -> None:
    """Not where it does modulo the labels' dtype: -100 is 156 in uint8, 2^31 is -2^31 in int32, -2^63 is 0 there."""
    g = torch.Generator().manual_seed(5)
    w, x = torch.randint(-4, 5, (260, 3), generator=g).float(), torch.randint(-4, 5, (4, 3), generator=g).float()
    info = torch.iinfo(label_dtype)
    for ignore_index in (-100, -1, 3, 127, 128, 255, 256, 2**16, 2**31, 2**32, -(2**63), 2**63 - 1):
        # what the dtype would make of it, if that is a class
        wrapped = (ignore_index - info.min) % (info.max - info.min + 1) + info.min
        labels = [0, 3, wrapped if 0 <= wrapped < 260 else 1, 127]
        target = torch.tensor(labels, dtype=label_dtype)
        nothing = torch.tensor([y == ignore_index for y in labels])
        changes: dict[str, Any] = {"ignore_index": ignore_index, "nothing": nothing}
        if function == "unmasked_cross_entropy":
            changes |= {"logits": x @ w.T, "upstream": torch.ones(4)}
        _assert_right(call_of(function, x, w, target, **changes), cpu_paths)


@pytest.mark.parametrize("upstream", (NAN, INF, -INF))
@pytest.mark.parametrize("log", (False, True), ids=("", "log"))
@pytest.mark.parametrize("function", (*MEASURES, *GRADIENT_NORMS))
def test_an_upstream_in_a_row_that_counts_for_nothing(
    function: str, log: bool, upstream: float, cpu_paths: tuple[str, ...]
) -> None:
    """As ``torch.where(v > 0, v.log(), 0)`` sends one: an ignored row, one of class weight 0, one whose value is 0."""
    g = torch.Generator().manual_seed(7)
    for classes in (4, 300):
        w = torch.randint(-4, 5, (classes, 3), generator=g).double()
        w[1] = w[0]
        x = torch.randint(-4, 5, (4, 3), generator=g).double()
        c = torch.tensor([1.0, upstream, upstream, -2.0], dtype=torch.float64)
        target = torch.tensor([0, -100, 2, 3])
        nothing = torch.tensor([False, True, False, False])
        changes: dict[str, Any] = {}
        if function in MEASURES:
            weight = torch.ones(classes, dtype=torch.float64)
            weight[2] = 0.0
            changes, nothing = {"class_weight": weight}, torch.tensor([False, True, True, False])
        else:
            c[2] = 1.0
        call = call_of(function, x, w, target, log=log, upstream=c, nothing=nothing, **changes)
        _assert_right(call, cpu_paths)
        # the value itself is 0: all classes that are there have one row of W, or phi is 0
        same = call_of(
            function, x, w[:1].expand(classes, 3).clone(), target, log=log, upstream=c * NAN, nothing=nothing
        )
        if function in ("neuronwise", *GRADIENT_NORMS):
            _assert_right(same, cpu_paths)
        elif function in MEASURES:
            _assert_right(call_of(function, 0 * x, w, log=log, upstream=c * NAN), cpu_paths)


@pytest.mark.parametrize("gap", (17.0, 104.0, 700.0, 720.0, 760.0, 1000.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("function", GRADIENT_NORMS)
def test_a_label_whose_row_has_a_twin(
    function: str, dtype: torch.dtype, gap: float, cpu_paths: tuple[str, ...]
) -> None:
    """The norm is e^-gap, its derivative by the twins' rows +-1/2: their share of p over nothing."""
    w = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.5]], dtype=dtype)
    call = call_of(
        function, torch.tensor([[gap, 0.0], [1.0, 1.0]], dtype=dtype), w, torch.tensor([0, 2]),
        upstream=torch.ones(2, dtype=dtype),
    )  # fmt: skip
    _assert_right(call, cpu_paths)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("function", ("neuronwise", *GRADIENT_NORMS))
@pytest.mark.parametrize("spread", (2.0**-23, 2.0**-20, 2.0**-14, 2.0**-9))
def test_rows_that_are_nearly_equal(
    spread: float, function: str, dtype: torch.dtype, cpu_paths: tuple[str, ...]
) -> None:
    """600 rows about a common one, closer than their shares' roundings tell apart or a little less."""
    g = torch.Generator().manual_seed(int(-math.log2(spread)))
    common = torch.randn(3, generator=g, dtype=torch.float64)
    w = common * (1 + spread * torch.randint(-2, 3, (600, 3), generator=g))
    w[:5] = torch.randint(-4, 5, (5, 3), generator=g)
    x = torch.randint(-4, 5, (12, 3), generator=g)
    changes = {"log": True, "upstream": torch.ones(12, dtype=dtype)}
    _assert_right(call_of(function, x.to(dtype), w.to(dtype), torch.arange(12) * 50, **changes), cpu_paths)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("gap", (20.0, 150.0, 400.0))
def test_the_mean_row_is_the_row_of_nearly_all_classes(
    gap: float, dtype: torch.dtype, cpu_paths: tuple[str, ...]
) -> None:
    """What is left about it has shares that underflow, and is all that there is: 0 about the mean row is not 0."""
    w = torch.tensor([[3.0, -1.0]], dtype=dtype).expand(241, 2).clone()
    w[7], w[90] = torch.tensor([4.0, -3.0]), torch.tensor([2.0, 1.0])
    x = torch.tensor([[gap, gap / 2 - 1.0], [0.5, 0.25]], dtype=dtype)
    bias = torch.zeros(241, dtype=dtype)
    bias[7], bias[90] = -gap, -gap
    changes = {"log": True, "bias": bias, "upstream": torch.ones(2, dtype=dtype)}
    _assert_right(call_of("neuronwise", x, w, **changes), cpu_paths)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("function", GRADIENT_NORMS)
def test_a_sign_and_a_tie_do_not_come_from_rounding(
    function: str, dtype: torch.dtype, cpu_paths: tuple[str, ...]
) -> None:
    """A column that is one number, one that is another's negative, two that are one: components 0, tied, and tied.

    Among the classes that are there: the masked ones move the mean row, and with it what rounding makes of the others.
    """
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 500, generator=g, dtype=torch.float64)
    w = torch.stack([torch.full((500,), 0.1), a, -a, a, 0.25 * b], dim=1)
    w[250:] = torch.randn(250, 5, generator=g, dtype=torch.float64)
    w, bias = w.to(dtype), torch.zeros(500, dtype=dtype).index_fill_(0, torch.arange(250, 500), -INF)
    x = torch.randn(9, 5, generator=g, dtype=torch.float64).to(dtype)
    changes = {"log": True, "upstream": torch.ones(9, dtype=dtype), "bias": bias}
    _assert_right(call_of(function, x, w, torch.arange(9) * 25, **changes), cpu_paths)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("function", GRADIENT_NORMS)
def test_a_label_among_very_many_twins(function: str, dtype: torch.dtype, cpu_paths: tuple[str, ...]) -> None:
    w = torch.zeros(40_000, 2, dtype=dtype)
    w[20_000:] = torch.tensor([1.0, -0.5])
    x = torch.tensor([[0.5, 0.25], [-2.0, 1.0]], dtype=dtype)
    paths = tuple(name for name in cpu_paths if name.startswith("chunked"))
    changes = {"log": True, "upstream": torch.ones(2, dtype=dtype)}
    _assert_right(call_of(function, x, w, torch.tensor([5, 30_000]), **changes), paths)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("function", ("neuronwise", *GRADIENT_NORMS))
def test_a_few_terms_that_cancel(function: str, dtype: torch.dtype, cpu_paths: tuple[str, ...]) -> None:
    """The label's row is the mean row and nearly every class's: the others' sum to it is 0, and the product's is noise."""
    w = torch.tensor([[0.5, 0.25]], dtype=dtype).expand(588, 2).clone()
    places = torch.tensor([4, 60, 70, 153, 212, 230, 321, 347, 368, 372, 543, 546])
    others = [[4, -3, -2, 1, 4, 1, 2, 2, -2, -3, 2, 0], [3, 2, 2, 3, 4, -3, -3, 4, -3, -1, -4, -1]]
    w[places] = torch.tensor(others, dtype=dtype).T  # their sum is 12 times the common row
    x = torch.tensor([[0.0, 0.0], [1e-3, 0.0], [1.0, 1.0]], dtype=dtype)
    changes = {"log": True, "upstream": torch.ones(3, dtype=dtype)}
    _assert_right(call_of(function, x, w, torch.tensor([587, 200, 50]), **changes), cpu_paths)


@pytest.mark.parametrize("function", (*MEASURES, *GRADIENT_NORMS))
def test_the_log_of_a_value_that_underflowed_and_was_masked(function: str, cpu_paths: tuple[str, ...]) -> None:
    """e^-200 is 0 in float32, and its log's derivative by the caller's hand inf: that row adds nothing, the others do."""
    x = torch.tensor([[200.0, 10.0], [2.0, 0.5]])
    w, target = torch.eye(2), torch.tensor([0, 1])
    for path in cpu_paths:
        with fuzz.on_path(path):
            inputs = x.clone().requires_grad_(), w.clone().requires_grad_()
            value = answers.function_of(call_of(function, x, w, target))(*inputs)
            assert value[0] == 0
            got = torch.autograd.grad(torch.where(value > 0, value.log(), 0).sum(), inputs)
            alone = x[1:].clone().requires_grad_(), w.clone().requires_grad_()
            value = answers.function_of(call_of(function, x[1:], w, target[1:]))(*alone)
            want = torch.autograd.grad(value.log().sum(), alone)
        torch.testing.assert_close(got[0], torch.cat([torch.zeros(1, 2), want[0]]))
        torch.testing.assert_close(got[1], want[1])


def test_a_derivative_below_the_smallest_normal_number_keeps_its_digits(cpu_paths: tuple[str, ...]) -> None:
    """e^-740 has two digits in float64; times an upstream of 1e30 it is to have all."""
    x, w = torch.tensor([[740.0, 0.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    upstream = torch.full((1,), 1e30, dtype=torch.float64)
    for function in GRADIENT_NORMS:
        _assert_right(call_of(function, x, w, torch.tensor([0]), upstream=upstream), cpu_paths)


# --------------------------------------------------------------------------------------------------- the net can catch
def test_the_derivatives_agree_with_differences_of_400_digits() -> None:
    w = torch.tensor([[1.0, 0.5, -0.25], [-0.5, 1.0, 0.25], [0.25, -1.0, 1.0], [-0.5, 1.0, 0.25]])
    b = torch.tensor([0.5, -0.25, 0.125, 1.0])
    names = {"hessian_trace": "trace", "layerwise": "layerwise", "neuronwise": "neuronwise"}
    names |= {name: f"gradient-{ord}" for ord, name in oracles.GRADIENTS.items()}
    for function, other in names.items():
        include_bias = function in MEASURES
        for row in ([1.0, 1.0, 0.5], [60.0, 4.0, -8.0]):
            x = torch.tensor([row])
            (got,) = oracle_derivatives.exact_derivatives(
                x, w, b, None, [2], 1.0, include_bias, 2, function, [1e-15], 1e-300
            )  # fmt: skip
            truth, _ = exact_log_gradients(other, x[0], w, b, 2, include_bias)
            assert got is not None
            for key, want in zip(("features", "linear_weight", "linear_bias"), truth, strict=True):
                scale = np.maximum(np.abs(want), got.size[key].astype(np.float64))
                assert (np.abs(got.exact[key].astype(np.float64) - want) <= 1e-15 * scale).all(), (function, row, key)


def test_a_wrong_number_is_found_shown_and_counted(one_thread: None) -> None:
    exact, out = flatcore.head_metrics, io.StringIO()

    def wrong(*arguments: Any, **options: Any) -> flatcore.HeadMetrics:
        metrics = exact(*arguments, **options)
        return metrics._replace(log_hessian_trace=metrics.log_hessian_trace + 1e-4)

    arguments = ["--cases", "6", "--seed", "3", "--function", "head_metrics", "--path", "reference", "--kind", "dense"]
    with contextlib.redirect_stdout(out):
        assert fuzz.main(arguments) == 0
    assert "seed 3: 6 cases, 6 runs" in out.getvalue() and ", 0 wrong" in out.getvalue()
    with mock.patch.object(flatcore, "head_metrics", wrong), contextlib.redirect_stdout(out):
        assert fuzz.main(arguments) == 1
    text = out.getvalue()
    assert "WRONG case 3/" in text and "flatcore.head_metrics(features, weight" in text


def test_a_reproduction_runs_by_itself(one_thread: None) -> None:
    call = fuzz.case(0, 3, ("layerwise",), (torch.float32,), ("sparse",))
    program, out = fuzz.reproduction(call, "fused-baseline"), io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "reproduction", "exec"), {})
    with fuzz.on_path("fused-baseline"):
        want = answers.function_of(call)(call.features, call.weight, linear_bias=call.bias, logits=call.logits)
    assert re.sub(r", grad_fn=.*", "", out.getvalue().split("\n")[0]).rstrip(")") in repr(want)


def test_a_case_does_not_depend_on_what_ran_before() -> None:
    first = fuzz.case(1, 5, FUNCTIONS, (torch.float32,), ("dense",))
    fuzz.case(1, 4, FUNCTIONS, (torch.float32,), ("dense",))
    again = fuzz.case(1, 5, FUNCTIONS, (torch.float32,), ("dense",))
    assert first.function == again.function and torch.equal(first.weight, again.weight)
