"""The edge rules: masked classes, rows that are not numbers, zeros, sizes of none, strides of nothing.

N = 4, D = 3, C = 5 unless a test says otherwise.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from refusing import C, D, N, arguments, gradients_with
from torch import Tensor

import flatcore
from flatcore._check.tolerance import assert_same, assert_within, tolerance
from flatcore._engine.head import Head
from flatcore._engine.ops.head_metrics_backward import head_metrics_backward
from flatcore.reference import FIELDS

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

INF, NAN = math.inf, math.nan


# ------------------------------------------------------------------------------------------------------ the edge rules
def _metrics(logits: list[list[float]], target: list[int] | None = None, **changes: Any) -> flatcore.HeadMetrics:
    """Metrics of given logits (N, C), with features of norm 2 and head rows of norm 1 apart."""
    z = torch.tensor(logits)
    n, classes = z.shape
    features = torch.zeros(n, classes)
    features[:, 0] = 2
    given = {"features": features, "linear_weight": torch.eye(classes), "logits": z}
    return flatcore.head_metrics(**(given | changes), target=None if target is None else torch.tensor(target))


@pytest.mark.parametrize("row", ([0.7], [-INF, 3.0, -INF], [-1e30, -INF]), ids=("one", "one-of-three", "one-of-two"))
def test_one_class_left(path: str, row: list[float]) -> None:
    top = row.index(max(row))
    metrics = _metrics([row], [top])
    assert metrics.prediction.item() == top and metrics.confidence.item() == 1 and metrics.margin.item() == INF
    for name in ("log_one_minus_confidence", "log_hessian_trace", "log_layerwise", "log_neuronwise"):
        assert getattr(metrics, name).item() == -INF, name
    for name in ("hessian_trace", "layerwise", "neuronwise", "loss", "feature_gradient_norm"):
        assert getattr(metrics, name).item() == 0, name
    if len(row) > 1:
        masked = (top + 1) % len(row)
        metrics = _metrics([row], [masked])
        assert metrics.loss.item() == INF
        # W^T (e_m - e_y) of unit rows
        assert_within(
            "gradient", metrics.feature_gradient_norm, np.array([math.sqrt(2)]),
            tolerance("feature_gradient_norm", 1.0, 0.0, torch.float32), torch.float32,
        )  # fmt: skip


def test_a_masked_target_has_an_infinite_loss_and_a_finite_gradient(path: str) -> None:
    metrics = _metrics([[1.0, -INF, 0.0]], [1])
    p = torch.tensor([1.0, 0.0]).double().softmax(0)
    gradient = math.sqrt(p[0] ** 2 + 1 + p[1] ** 2)
    assert metrics.loss.item() == INF
    assert_within(
        "gradient", metrics.feature_gradient_norm, np.array([gradient]),
        tolerance("feature_gradient_norm", 1.0, 0.0, torch.float32), torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize(
    "bad", ([-INF] * 3, [0.0, NAN, 1.0], [INF, 0.0, 1.0], [0.0, 1.0, INF], [NAN] * 3, [INF, -INF, NAN])
)
def test_a_bad_row_of_logits_is_nan_alone(path: str, bad: list[float]) -> None:
    good = [[3.0, 1.0, 0.0], [0.0, -1.0, 4.0]]
    metrics = _metrics([good[0], bad, good[1]], [0, 1, 2])
    alone = _metrics(good, [0, 2])
    assert metrics.prediction.tolist() == [0, -1, 2]
    for name in ("confidence", "margin", "log_hessian_trace", "log_layerwise", "log_neuronwise", "loss",
                 "log_one_minus_confidence", "log_feature_norm", "log_feature_gradient_norm"):  # fmt: skip
        values = getattr(metrics, name)
        assert values[1].isnan(), name
        assert torch.equal(values[[0, 2]], getattr(alone, name)), name


@pytest.mark.parametrize("value", (NAN, INF, -INF))
@pytest.mark.parametrize("given", (False, True), ids=("from-features", "given-logits"))
def test_a_bad_row_of_features_is_nan_alone(path: str, value: float, given: bool) -> None:
    right = arguments(weight=None, logits=arguments()["logits"] if given else None)
    del right["weight"]
    expected = flatcore.head_metrics(**right)
    features = right["features"].clone()
    features[1, 2] = value
    metrics = flatcore.head_metrics(**(right | {"features": features}))
    for name, values in metrics._asdict().items():
        bad = values[1].item() == -1 if name == "prediction" else values[1].isnan()
        assert bad, name
        others = [0, 2, 3]
        assert torch.equal(values[others], getattr(expected, name)[others]), name


def test_zero_features_zero_head_and_equal_rows_have_no_curvature(path: str) -> None:
    right = arguments(logits=None, weight=None)
    common = {name: right[name] for name in ("features", "linear_weight", "target")}
    zero_features = flatcore.head_metrics(**(common | {"features": torch.zeros(N, D)}))
    for name in ("log_feature_norm", "log_hessian_trace", "log_layerwise", "log_neuronwise"):
        assert (getattr(zero_features, name) == -INF).all(), name
    assert (zero_features.feature_gradient_norm > 0).all()
    zero_head = flatcore.head_metrics(**(common | {"linear_weight": torch.zeros(C, D)}))
    for name in ("log_layerwise", "log_neuronwise", "log_feature_gradient_norm"):
        assert (getattr(zero_head, name) == -INF).all(), name
    assert zero_head.log_hessian_trace.isfinite().all()
    equal = flatcore.head_metrics(**(common | {"linear_weight": right["linear_weight"][:1].expand(C, D)}))
    for name in ("log_neuronwise", "log_feature_gradient_norm"):
        assert (getattr(equal, name) == -INF).all(), name
    assert equal.log_layerwise.isfinite().all()


@pytest.mark.parametrize("size", (1e20, 1e-25, 1e38, 1e-40))
def test_feature_norms_leave_no_range(path: str, size: float) -> None:
    features = torch.tensor([[size, -size, 0.0], [0.0, 0.0, size]])
    metrics = flatcore.head_metrics(features, torch.eye(3), logits=torch.tensor([[1.0, 0.0, 0.0]]).expand(2, 3))
    rounded = torch.tensor(size).double().item()  # the float32 nearest to it
    truth = np.log(rounded) + np.array([0.5 * math.log(2), 0.0])
    bound = tolerance("log_feature_norm", np.exp(truth), truth, torch.float32)
    assert_within("log_feature_norm", metrics.log_feature_norm, truth, bound, torch.float32)
    assert metrics.log_hessian_trace.isfinite().all()


@pytest.mark.parametrize("exponent", (-1040, -600, -530, 60, 900))
@pytest.mark.parametrize("width", (3, 40))
def test_float64_heads_of_any_size(path: str, width: int, exponent: int) -> None:
    """W -> 2^k W at given logits is exact in floats: it adds 2 k log 2 to both measures, k log 2 to the gradient."""
    g = torch.Generator().manual_seed(5)
    features = torch.randn(30, width, generator=g, dtype=torch.float64)
    head = torch.randint(-64, 64, (6, width), generator=g).double()  # whole numbers: exact in subnormals too
    logits, target = torch.randn(30, 6, generator=g, dtype=torch.float64), torch.randint(6, (30,), generator=g)
    half = torch.tensor([exponent // 2, exponent - exponent // 2])
    small = torch.ldexp(torch.ldexp(head, half[0]), half[1])
    assert torch.equal(torch.ldexp(torch.ldexp(small, -half[1]), -half[0]), head)
    given = {"features": features, "logits": logits, "reduction": "none", "log": True}
    for field, function, changes, power in (
        ("layerwise", flatcore.relative_flatness, {"measure": "layerwise"}, 2),
        ("neuronwise", flatcore.relative_flatness, {"measure": "neuronwise"}, 2),
        ("feature_gradient_norm", flatcore.feature_gradient_norms, {"target": target}, 1),
    ):
        truth = function(linear_weight=head, **given, **changes).numpy() + power * exponent * math.log(2)
        bound = tolerance(f"log_{field}", np.ones_like(truth), truth, torch.float64)
        got = function(linear_weight=small, **given, **changes)
        assert_within(f"log_{field}", got, truth, bound + bound, torch.float64)


@pytest.mark.parametrize("rows", (2, 64), ids=("few-rows", "many-rows"))
@pytest.mark.parametrize("exponent", (-149, -140, -133))
def test_float32_heads_of_subnormals(path: str, exponent: int, rows: int) -> None:
    """As above, k log 2, for float32; 64 rows of 32 features take the table of distances where there is a choice."""
    g = torch.Generator().manual_seed(6)
    features, logits = torch.randn(rows, 32, generator=g), torch.randn(rows, 4, generator=g)
    head = torch.randint(-64, 64, (4, 32), generator=g).float()
    given = {"features": features, "logits": logits, "measure": "neuronwise", "reduction": "none", "log": True}
    truth = flatcore.relative_flatness(linear_weight=head, **given).double().numpy() + 2 * exponent * math.log(2)
    small = (head.double() * 2.0**exponent).float()
    assert torch.equal(small.double() * 2.0**-exponent, head.double())
    bound = tolerance("log_neuronwise", np.exp(truth), truth, torch.float32)
    got = flatcore.relative_flatness(linear_weight=small, **given)
    assert_within("log_neuronwise", got, truth, bound + bound, torch.float32)


@pytest.mark.parametrize("ord", (1, 2, INF))
@pytest.mark.parametrize("row", (0, 3))
def test_a_nan_in_the_head_is_not_dropped(path: str, ord: float, row: int) -> None:
    right = arguments(weight=None, linear_bias=None)
    head = right["linear_weight"].clone()
    head[row, 1] = NAN
    for function in (
        lambda: gradients_with(linear_weight=head, ord=ord, linear_bias=None),
        lambda: flatcore.relative_flatness(**(right | {"linear_weight": head}), reduction="none"),
        lambda: flatcore.relative_flatness(**(right | {"linear_weight": head}), measure="neuronwise", reduction="none"),
    ):
        assert function().isnan().all()


# ------------------------------------------------------------------------------------------------------------ no sizes
@pytest.mark.parametrize("classes", (1, 3, 300))
def test_no_features_at_all(path: str, classes: int) -> None:
    target = torch.zeros(2, dtype=torch.long)
    metrics = flatcore.head_metrics(torch.zeros(2, 0), torch.zeros(classes, 0), target)
    assert_within("loss", metrics.loss, np.full(2, math.log(classes)),
                  tolerance("loss", math.log(classes), 0.0, torch.float32), torch.float32)  # fmt: skip
    for name in (
        "log_feature_norm",
        "log_hessian_trace",
        "log_layerwise",
        "log_neuronwise",
        "log_feature_gradient_norm",
    ):
        assert (getattr(metrics, name) == -INF).all(), name
    for ord in (1, 2, INF):
        got = flatcore.feature_gradient_norms(torch.zeros(2, 0), torch.zeros(classes, 0), target, ord=ord)
        assert got.tolist() == [0.0, 0.0]


def test_no_features_at_all_without_force() -> None:
    metrics = flatcore.head_metrics(torch.zeros(2, 0), torch.zeros(300, 0), torch.tensor([0, 299]))
    assert metrics.prediction.tolist() == [0, 0] and (metrics.log_neuronwise == -INF).all()


@pytest.mark.parametrize("shape", ((0,), (3, 0), (0, 2)))
def test_no_rows(path: str, shape: tuple[int, ...]) -> None:
    features, target = torch.zeros(*shape, D), torch.zeros(shape, dtype=torch.long)
    head = arguments()["linear_weight"]
    for values in flatcore.head_metrics(features, head, target):
        assert values.shape == shape
    for function in (flatcore.hessian_trace, flatcore.relative_flatness, flatcore.feature_gradient_norms):
        assert function(features, head, target, reduction="none").shape == shape
        assert function(features, head, target, reduction="sum").item() == 0
        assert function(features, head, target, reduction="sum", log=True).item() == -INF
        for log in (False, True):
            assert math.isnan(function(features, head, target, reduction="mean", log=log).item())
    assert math.isnan(flatcore.hessian_trace(features, head).item())


def test_row_norms_of_nothing(target: str) -> None:
    assert flatcore.row_norms(torch.zeros(0, 3)).shape == (3, 0)
    assert flatcore.row_norms(torch.zeros(2, 0)).tolist() == [[0.0, 0.0]] * 3
    assert flatcore.row_norms(torch.zeros(0, 0), ord=2).shape == (0,)


@pytest.mark.parametrize("leading", ((), (1,), (2, 3), (2, 1, 3, 1, 2)))
def test_leading_dimensions(path: str, leading: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(3)
    right = arguments()
    features = torch.randn(*leading, D, generator=g)
    target = torch.randint(C, leading, generator=g)
    logits = torch.randn(*leading, C, generator=g)
    given = {"linear_weight": right["linear_weight"]}
    flat = {"features": features.reshape(-1, D), "target": target.reshape(-1), "logits": logits.reshape(-1, C)}
    shaped = flatcore.head_metrics(features, target=target, logits=logits, **given)
    for name, values in flatcore.head_metrics(**flat, **given)._asdict().items():
        assert torch.equal(getattr(shaped, name), values.reshape(leading)), name


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "padded-rows": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every-second": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].reshape(x.shape),
    "reversed-twice": lambda x: x.flip(0).contiguous().flip(0),
}


def _eighths(g: torch.Generator, *shape: int) -> Tensor:
    """Multiples of 1/8 up to 2: products and their sums are exact in every dtype and order."""
    return torch.randint(-16, 17, shape, generator=g) / 8


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_strided_tensors(path: str, layout: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    change = STRIDES[layout]
    features, head = _eighths(g, 19, 21).to(dtype), _eighths(g, 6, 21).to(dtype)
    logits, target = torch.randn(19, 6, generator=g).to(dtype), torch.randint(6, (19,), generator=g)
    for z in (None, logits):
        plain = flatcore.head_metrics(features, head, target, logits=z)
        strided = flatcore.head_metrics(change(features), change(head), target, logits=None if z is None else change(z))
        assert_same_metrics(strided, plain)


def assert_same_metrics(got: flatcore.HeadMetrics, want: flatcore.HeadMetrics) -> None:
    """Require equal metrics of exact logits: two computed values, each within its own bound."""
    assert torch.equal(got.prediction, want.prediction)
    for name, values in want._asdict().items():
        if name == "prediction":
            continue
        truth = values.double().numpy()
        bound = tolerance(name, truth, truth, values.dtype)
        assert_within(name, getattr(got, name), truth, bound + bound, values.dtype)


def test_expanded_tensors(path: str) -> None:
    g = torch.Generator().manual_seed(4)
    features, head = _eighths(g, 1, 21), _eighths(g, 6, 21)
    one = flatcore.head_metrics(features.repeat(50, 1), head, torch.full((50,), 2))
    many = flatcore.head_metrics(features.expand(50, 21), head, torch.tensor(2).expand(50))
    assert_same_metrics(many, one)
    # stride 0 along D and C, too
    one = flatcore.head_metrics(torch.full((9, 21), 0.5), torch.full((6, 21), 0.25), logits=torch.full((9, 6), -1.0))
    flat = (torch.tensor(v).expand(n, k) for v, n, k in ((0.5, 9, 21), (0.25, 6, 21), (-1.0, 9, 6)))
    features, head, logits = flat
    many = flatcore.head_metrics(features, head, logits=logits)
    for name, values in one._asdict().items():
        if values is not None:
            assert torch.equal(getattr(many, name), values), name


def test_row_norms_of_an_expanded_tensor(target: str) -> None:
    constant = torch.tensor(0.5).expand(7, 20)
    bound = tolerance("row_norm", 10.0, 0.0, torch.float32, terms=20)
    assert_within("row_norm", flatcore.row_norms(constant, ord=1), np.full(7, 10.0), bound, torch.float32)


def test_a_sign_that_a_share_of_nearly_nothing_decides(path: str) -> None:
    """The L1 norm's derivative by W has the sign of each column, however small: here that of exp(-120) of the rest."""
    x = torch.ones(1, 2, dtype=torch.float64)
    w = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    z = torch.tensor([[2.0, 1.0, -119.0]], dtype=torch.float64)
    value = flatcore.feature_gradient_norms(x, w, torch.tensor([0]), logits=z, ord=1, reduction="sum")
    (gradient,) = torch.autograd.grad(value, w)
    p = z.softmax(1)[0]  # |p_1| + |p_2|, and w_0 by the sum of their factors
    torch.testing.assert_close(gradient[1], torch.stack([p[1], -p[1]]), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[0], torch.stack([-p[1], p[1]]), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[2], torch.stack([p[2], -p[2]]), rtol=1e-12, atol=0)


def test_an_ignored_row_stays_out_of_a_gradient_whatever_it_is_asked_for(path: str) -> None:
    """The operator takes an upstream for it that is not 0, which no measure hands on."""
    g = torch.Generator().manual_seed(5)
    x, w = (torch.randn(n, 4, generator=g, dtype=torch.float64) for n in (6, 5))
    y = torch.tensor([0, 1, -100, 3, 4, 0])
    field, wanted = FIELDS.index("log_feature_gradient_norm"), (True, True, False, False)

    def gradients() -> tuple[Tensor | None, ...]:
        upstream = torch.ones(6, dtype=torch.float64)
        return head_metrics_backward(upstream, None, Head(x, w, None, None, y), field, wanted)[:2]

    want = gradients()
    x[2] = math.nan
    for got, exact in zip(gradients(), want, strict=True):
        assert_same("without the row", got, exact)
