"""The torchmetrics: equal to the functions on all rows at once, in one process and in several.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor

import flatcore
from flatcore.metrics import FeatureGradientNorm, HessianTrace, RelativeFlatness

N, D, C = 200, 6, 5
INF, NAN = math.inf, math.nan

METRICS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "trace": (HessianTrace, flatcore.hessian_trace),
    "layerwise": (RelativeFlatness, flatcore.relative_flatness),
    "neuronwise": (
        lambda **options: RelativeFlatness(measure="neuronwise", **options),
        lambda *a, **options: flatcore.relative_flatness(*a, measure="neuronwise", **options),
    ),
    "norm": (FeatureGradientNorm, flatcore.feature_gradient_norms),
    "norm-inf": (
        lambda **options: FeatureGradientNorm(ord=INF, **options),
        lambda *a, **options: flatcore.feature_gradient_norms(*a, ord=INF, **options),
    ),
}
MEASURES = ("trace", "layerwise", "neuronwise")


def data(scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features from doubtful to certain, head, bias, labels of which some are ignored."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, N)[:, None] * scale
    y = torch.randint(C, (N,), generator=g)
    y[::17] = -100
    return x, torch.randn(C, D, generator=g).double(), torch.randn(C, generator=g).double(), y


def batches(rows: Tensor, size: int = 33) -> list[slice]:
    return [slice(i, i + size) for i in range(0, rows.shape[0], size)]


def double(metric: Any) -> Any:
    return metric.set_dtype(torch.float64)


# ------------------------------------------------------------------------------------------------------------ the mean
@pytest.mark.parametrize("log", (False, True), ids=("", "log"))
@pytest.mark.parametrize("name", METRICS)
def test_batches_give_the_mean_of_all_rows(name: str, log: bool) -> None:
    make, function = METRICS[name]
    x, w, b, y = data()
    metric = double(make(log=log, temperature=1.5))
    for rows in batches(x):
        metric.update(x[rows], w, y[rows], linear_bias=b)
    want = function(x, w, y, linear_bias=b, temperature=1.5, reduction="mean", log=log)
    torch.testing.assert_close(metric.compute(), want, rtol=1e-12, atol=1e-12)
    assert metric.compute().dtype == torch.float64


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("kind", ("none", "weighted", "soft", "soft-weighted", "bias", "logits"))
def test_every_kind_of_weighting(name: str, kind: str) -> None:
    make, function = METRICS[name]
    x, w, b, y = data()
    g = torch.Generator().manual_seed(9)
    soft, weight = torch.rand(N, C, generator=g).double(), torch.rand(C, generator=g).double()
    weight[0] = 0
    target = None if kind in ("none", "bias") else soft if "soft" in kind else y
    options: dict[str, Any] = {"weight": weight} if "weighted" in kind else {}
    made = {"include_bias": True} if kind == "bias" else {}
    metric = double(make(**made))
    logits = x @ w.T + b
    for rows in batches(x):
        part = None if target is None else target[rows]
        extra = {"logits": logits[rows]} if kind == "logits" else {}
        metric.update(x[rows], w, part, linear_bias=b, **options, **extra)
    extra = {"logits": logits} if kind == "logits" else {}
    want = function(x, w, target, linear_bias=b, reduction="mean", **options, **made, **extra)
    torch.testing.assert_close(metric.compute(), want, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", METRICS)
def test_the_log_is_right_where_every_value_underflows(name: str) -> None:
    make, function = METRICS[name]
    x = torch.tensor([[900.0, 1.0], [950.0, -3.0], [4000.0, 0.0], [15000.0, 0.0]])
    metric = double(make(log=True))
    for row in x:
        metric.update(row[None], torch.eye(2), torch.tensor([0]))
    want = function(x.double(), torch.eye(2), torch.zeros(4, dtype=torch.long), reduction="mean", log=True)
    assert want < -850
    torch.testing.assert_close(metric.compute(), want, rtol=1e-12, atol=0.0)
    assert make().update(x, torch.eye(2), torch.zeros(4, dtype=torch.long)) is None


def test_leading_dimensions_numpy_and_results_in_float32() -> None:
    x, w, _, y = data()
    metric = RelativeFlatness()
    metric.update(x.reshape(4, 50, D), w, y.reshape(4, 50))
    want = flatcore.relative_flatness(x, w, y)
    assert metric.compute().dtype == torch.float32
    torch.testing.assert_close(metric.compute().double(), want, rtol=1e-6, atol=0.0)
    arrays = RelativeFlatness()
    arrays.update(x.numpy(), w.numpy(), y.numpy())
    assert arrays.compute() == metric.compute()


# -------------------------------------------------------------------------------------------------------- distribution
@pytest.mark.parametrize("name", METRICS)
def test_median_and_heaviest_share(name: str) -> None:
    make, function = METRICS[name]
    x, w, b, y = data(scale=20.0)
    metric, logs = double(make()), double(make(log=True))
    for rows in batches(x):
        metric.update(x[rows], w, y[rows], linear_bias=b)
        logs.update(x[rows], w, y[rows], linear_bias=b)
    values = function(x, w, y, linear_bias=b, reduction="none", log=True)[y != -100].sort().values
    # a bin is 1/16 wide: its mean lies within it, and so does the middle row
    top = values[len(values) // 2]
    assert abs(logs.median() - top - np.log(np.median((values - top).exp()))) <= 1 / 16
    torch.testing.assert_close(metric.median(), logs.median().exp())
    weights = values.exp()
    for fraction in (0.0, 0.01, 0.1, 0.5, 1.0):
        count = fraction * len(values)
        whole = int(count)
        top = weights.flip(0)
        exact = top[:whole].sum() + (top[whole] * (count - whole) if whole < len(values) else 0)
        got = metric.heaviest_share(fraction)
        torch.testing.assert_close(got, exact / weights.sum(), rtol=1 / 16, atol=1e-12)
    assert metric.heaviest_share() == metric.heaviest_share(0.01) > 0.01


def test_median_of_wide_bins_zeros_and_weights() -> None:
    metric = double(HessianTrace(log=True))
    rows = torch.tensor([[0.0, 0.0], [2000.0, 0.0], [2000.0, 0.0]])
    metric.update(rows, torch.eye(2))
    want = flatcore.hessian_trace(rows[1:].double(), torch.eye(2), log=True)
    torch.testing.assert_close(metric.median(), want, rtol=1e-12, atol=0.0)
    zeros = double(HessianTrace(log=True))
    zeros.update(torch.zeros(3, 2), torch.eye(2))
    assert zeros.median() == -INF and zeros.compute() == -INF and zeros.heaviest_share().isnan()
    # weighted: one row of weight 5 outweighs two of weight 1
    weighted = double(HessianTrace(log=True))
    x = torch.tensor([[1.0, 0.0], [5.0, 0.0], [9.0, 0.0]])
    weighted.update(x, torch.eye(2), torch.tensor([0, 0, 1]), weight=torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(weighted.median(), flatcore.hessian_trace(x[2:].double(), torch.eye(2), log=True))


@pytest.mark.parametrize(
    "logs", ([-3.0, 5.0], [-40.0, 2.0], [-INF, 1.0], [-INF, -INF, 0.0, 3.0], [1.0, 2.0, 4.0], [0.0, 0.0])
)
def test_of_two_middle_values_the_median_is_the_mean(logs: list[float]) -> None:
    """The trace of (x, 0) under the identity with logits 0 is x^2 / 2: rows of any log."""
    x = torch.tensor(logs, dtype=torch.float64)
    rows = torch.stack([((x + math.log(2)) / 2).exp(), torch.zeros(len(x))], dim=1)
    metric = double(HessianTrace())
    for row in rows:
        metric.update(row[None], torch.eye(2), logits=torch.zeros(1, 2, dtype=torch.float64))
    torch.testing.assert_close(metric.median(), torch.tensor(np.median(x.exp())), rtol=1e-12, atol=0.0)


def test_of_a_weighted_median_half_of_the_weight_lies_on_each_side() -> None:
    metric = double(HessianTrace())
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    flat = torch.zeros(3, 2, dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)  # values 1, 2, 2 * 4.5: those of weight 1 make up half
    rows[2, 0] = 3.0
    metric.update(rows, torch.eye(2), torch.tensor([0, 0, 1]), weight=weight, logits=flat)
    torch.testing.assert_close(metric.median(), torch.tensor((2.0 + 4.5) / 2).double(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("fraction", (-0.1, 1.5, NAN))
def test_a_share_of_more_than_all(fraction: float) -> None:
    metric = HessianTrace()
    metric.update(torch.ones(1, 2), torch.eye(2))
    with pytest.raises(ValueError, match=r"fraction must be within 0\.\.1"):
        metric.heaviest_share(fraction)


# ---------------------------------------------------------------------------------------------------- NaN, errors, none
@pytest.mark.parametrize("name", METRICS)
def test_a_nan_row_says_so_and_spoils_nothing(name: str) -> None:
    make, function = METRICS[name]
    x, w, b, y = data()
    spoiled = x.clone()
    spoiled[3] = NAN
    spoiled[0] = NAN  # ignored: counts as nothing
    assert y[0] == -100 and y[3] != -100
    told, ignoring = double(make()), double(make(ignore_nan=True))
    for metric in (told, ignoring):
        metric.update(spoiled[:100], w, y[:100], linear_bias=b)
        metric.update(spoiled[100:], w, y[100:], linear_bias=b)
        assert metric.nan_rows == 1
    assert told.compute().isnan() and told.median().isnan() and told.heaviest_share().isnan()
    others = torch.arange(N) != 3
    want = function(x[others], w, y[others], linear_bias=b, reduction="mean")
    torch.testing.assert_close(ignoring.compute(), want, rtol=1e-12, atol=0.0)
    told.ignore_nan, told._computed = True, None  # the choice can be made afterwards
    assert told.compute() == ignoring.compute()
    told.reset()
    assert told.nan_rows == 0


WRONG = {
    "shapes": ((torch.ones(2, 3), torch.eye(2)), {}, ValueError, "features must have shape"),
    "labels": (
        (torch.ones(2, 2), torch.eye(2), torch.tensor([0, 7])),
        {},
        ValueError,
        "target must hold labels in 0..1",
    ),
    "length": ((torch.ones(2, 2), torch.eye(2), torch.tensor([0])), {}, ValueError, "target must have the features'"),
    "weight": ((torch.ones(2, 2), torch.eye(2)), {"weight": torch.ones(2)}, ValueError, "needs a target"),
    "dtype": ((torch.ones(2, 2).long(), torch.eye(2)), {}, TypeError, "features must have dtype"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_batch_leaves_the_state_as_it_was(case: str) -> None:
    arguments, options, error, words = WRONG[case]
    metric = HessianTrace()
    metric.update(torch.ones(3, 2), torch.eye(2))
    before = metric.compute()
    with pytest.raises(error, match=words):
        metric.update(*arguments, **options)
    metric._computed = None
    assert metric.compute() == before and metric.divisor == 3


@pytest.mark.parametrize(
    ("make", "error", "words"),
    (
        (lambda: HessianTrace(temperature=0), ValueError, "temperature must be finite"),
        (lambda: HessianTrace(log=1), TypeError, "log must be True or False"),
        (lambda: HessianTrace(ignore_nan="no"), TypeError, "ignore_nan must be True or False"),
        (lambda: HessianTrace(ignore_index=0.5), TypeError, "ignore_index must be an integer"),
        (lambda: HessianTrace(include_bias=0), TypeError, "include_bias must be True or False"),
        (lambda: RelativeFlatness(measure="both"), ValueError, "measure must be one of"),
        (lambda: RelativeFlatness(norm_power=3), ValueError, "norm_power must be one of"),
        (lambda: RelativeFlatness(measure="neuronwise", norm_power=1), ValueError, "norm_power must be 2"),
        (lambda: FeatureGradientNorm(ord=3), ValueError, "ord must be one of"),
    ),
)
def test_wrong_options(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_no_rows() -> None:
    metric = HessianTrace()
    metric.update(torch.ones(0, 2), torch.eye(2))
    metric.update(torch.ones(2, 2), torch.eye(2), torch.tensor([-100, -100]))
    assert metric.compute().isnan() and metric.median().isnan() and metric.heaviest_share().isnan()
    with pytest.warns(UserWarning, match="called before the ``update``"):
        assert HessianTrace().compute().isnan()


def test_importing_without_torchmetrics_names_the_extra() -> None:
    code = "import sys; sys.modules['torchmetrics'] = None; import flatcore; flatcore.head_metrics; flatcore.metrics"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "pip install 'flatcore[torchmetrics]'" in done.stderr


# ------------------------------------------------------------------------------------------- at home among torchmetrics
def test_updates_are_detached_and_the_state_has_a_constant_size() -> None:
    metric = RelativeFlatness()
    sizes = []
    for rows in (1, 500):
        x, w = torch.randn(rows, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
        metric.update(x, w)
        states = [getattr(metric, name) for name in metric._defaults]
        assert not any(s.requires_grad for s in states)
        sizes.append(sum(s.numel() * s.element_size() for s in states))
    assert sizes[0] == sizes[1] < 200_000
    assert x.grad is None and not metric.compute().requires_grad


def test_forward_gives_the_batch_and_accumulates() -> None:
    x, w, _, y = data()
    metric = double(RelativeFlatness())
    for rows in batches(x):
        torch.testing.assert_close(metric(x[rows], w, y[rows]), flatcore.relative_flatness(x[rows], w, y[rows]))
    torch.testing.assert_close(metric.compute(), flatcore.relative_flatness(x, w, y), rtol=1e-12, atol=0.0)


def test_collections_clones_pickles_and_reset() -> None:
    x, w, _, y = data()
    collection = torchmetrics.MetricCollection(
        {"trace": HessianTrace(), "flat": RelativeFlatness(), "norm": FeatureGradientNorm()}
    )
    collection.update(x, w, y)
    found = collection.compute()
    torch.testing.assert_close(found["trace"].double(), flatcore.hessian_trace(x, w, y), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found["flat"].double(), flatcore.relative_flatness(x, w, y), rtol=1e-6, atol=0.0)
    norm = flatcore.feature_gradient_norms(x, w, y, reduction="mean")
    torch.testing.assert_close(found["norm"].double(), norm, rtol=1e-6, atol=0.0)
    metric = collection["trace"]
    for again in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone()):
        assert again.compute() == found["trace"]
    metric.persistent(True)
    fresh = HessianTrace()
    fresh.persistent(True)
    fresh.load_state_dict(metric.state_dict())
    fresh._update_count = 1
    assert fresh.compute() == found["trace"]
    metric.reset()
    metric.update(x[:9], w, y[:9])
    torch.testing.assert_close(metric.compute().double(), flatcore.hessian_trace(x[:9], w, y[:9]), rtol=1e-6, atol=0.0)


VARIANTS: dict[str, Callable[[], Any]] = {
    "trace": HessianTrace,
    "trace-log": lambda: HessianTrace(log=True),
    "trace-hot": lambda: HessianTrace(temperature=2.0),
    "trace-hot-by-little": lambda: HessianTrace(temperature=1 + 1e-9),
    "trace-ignored": lambda: HessianTrace(ignore_index=3),
    "trace-bias": lambda: HessianTrace(include_bias=True),
    "trace-nan": lambda: HessianTrace(ignore_nan=True),
    "flat": RelativeFlatness,
    "flat-first-power": lambda: RelativeFlatness(norm_power=1),
    "flat-neuronwise": lambda: RelativeFlatness(measure="neuronwise"),
    "flat-log": lambda: RelativeFlatness(log=True),
    "norm-1": lambda: FeatureGradientNorm(ord=1),
    "norm-2": FeatureGradientNorm,
    "norm-inf": lambda: FeatureGradientNorm(ord=INF),
    "norm-hot": lambda: FeatureGradientNorm(temperature=2.0),
    "norm-ignored": lambda: FeatureGradientNorm(ignore_index=3),
}
"""Metrics that all differ in what they measure or in how they say it."""
FIRST = {
    "empty": lambda x, y: (x[:0], y[:0]),
    "padding": lambda x, y: (x[:7], torch.full((7,), -100)),
    "dead features": lambda x, y: (0 * x[:7], y[:7]),
    "one certain row": lambda x, y: (1e4 * x[:1], y[:1]),
    "ordinary": lambda x, y: (x[:7], y[:7]),
}


@pytest.mark.parametrize(("entry", "first"), (*(("update", first) for first in FIRST), ("forward", "dead features")))
def test_a_collection_never_takes_metrics_for_one_another(entry: str, first: str) -> None:
    """torchmetrics#2596: what agrees after the first batch was updated once, and reported under every name."""
    x, w, b, y = data()
    makers = VARIANTS
    if first == "padding":  # -100, which those that ignore another label refuse
        makers = {name: make for name, make in VARIANTS.items() if "ignored" not in name}
    else:
        y = torch.where(y == -100, 4, y)
    collection = torchmetrics.MetricCollection({name: make() for name, make in makers.items()})
    alone = {name: make() for name, make in makers.items()}
    start = FIRST[first](x, y)
    for features, target in (start, *((x[rows], y[rows]) for rows in batches(x, 90))):
        (collection.update if entry == "update" or target is start[1] else collection)(
            features, w, target, linear_bias=b
        )
        for metric in alone.values():
            metric.update(features, w, target, linear_bias=b)
    found = collection.compute()
    for name, metric in alone.items():
        torch.testing.assert_close(found[name], metric.compute(), rtol=1e-6, atol=0.0, msg=name)
    assert len(collection.compute_groups) == len(makers)


def test_metrics_that_are_alike_share_their_states_and_a_forced_group_of_others_is_refused() -> None:
    x, w, _, y = data()
    twins = torchmetrics.MetricCollection({"a": HessianTrace(), "b": HessianTrace()})
    for rows in batches(x):
        twins.update(x[rows], w, y[rows])
    assert list(twins.compute_groups.values()) == [["a", "b"]]
    found = twins.compute()
    assert found["a"] == found["b"]
    torch.testing.assert_close(found["a"].double(), flatcore.hessian_trace(x, w, y), rtol=1e-6, atol=0.0)
    forced = torchmetrics.MetricCollection({"a": HessianTrace(), "b": RelativeFlatness()}, compute_groups=[["a", "b"]])
    with pytest.raises(ValueError, match=r"RelativeFlatness\(.*cannot be in a compute group with HessianTrace\("):
        forced.update(x, w, y)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    (
        (HessianTrace, "temperature", 2.0), (HessianTrace, "ignore_index", 0), (RelativeFlatness, "measure", "neuronwise"),
        (RelativeFlatness, "norm_power", 1), (RelativeFlatness, "include_bias", True), (FeatureGradientNorm, "ord", 1.0),
    ),
)  # fmt: skip
def test_what_is_measured_is_fixed(make: Callable[[], Any], name: str, value: Any) -> None:
    metric = make()
    with pytest.raises(AttributeError, match=f"{name} is fixed"):
        setattr(metric, name, value)
    metric.log = True  # how it is said may change at any time


CASTS: dict[str, Callable[[Any], Any]] = {
    "to": lambda parent: parent.to(torch.bfloat16),
    "bfloat16": lambda parent: parent.bfloat16(),
    "half": lambda parent: parent.half(),
    "float": lambda parent: parent.float(),
    "type": lambda parent: parent.type(torch.float16),
    "metric.to": lambda parent: parent.metric.to(torch.bfloat16),
    "metric.half": lambda parent: parent.metric.half(),
    "set_dtype": lambda parent: parent.metric.set_dtype(torch.bfloat16),
    "set_dtype half": lambda parent: parent.metric.set_dtype(torch.float16),
    "collection": lambda parent: torchmetrics.MetricCollection({"metric": parent.metric}).to(torch.bfloat16),
    "device and dtype": lambda parent: parent.to("cpu", torch.bfloat16),
}


class Parent(torch.nn.Module):
    """As a Lightning module, which ``precision="bf16-true"`` casts with all it holds."""

    def __init__(self, metric: Any) -> None:
        super().__init__()
        self.linear, self.metric = torch.nn.Linear(2, 2), metric


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ("trace", "norm-inf"))
def test_states_stay_in_float64_whatever_a_module_is_cast_to(name: str, cast: str) -> None:
    make, function = METRICS[name]
    x, w, _, y = data()
    metric = make(log=True)
    parent = Parent(metric)
    for rows in batches(x)[:2]:
        metric.update(x[rows], w, y[rows])
    metric.compute()
    CASTS[cast](parent)
    for rows in batches(x)[2:]:
        metric.update(x[rows], w, y[rows])
    for state in (*metric.metric_state.values(), *metric._defaults.values()):
        assert state.dtype in (torch.float64, torch.int64)
    want = function(x, w, y, log=True, reduction="mean")
    found = metric.compute()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-7, atol=1e-7)
    metric.reset()
    metric(x[:9].bfloat16(), w.bfloat16(), y[:9])
    assert metric.mass.dtype == torch.float64 and metric._forward_cache.dtype == torch.float32


def test_a_module_made_under_another_default_dtype_still_says_float32() -> None:
    x, w, _, y = data()
    torch.set_default_dtype(torch.bfloat16)  # as Lightning's module context does
    try:
        metric = HessianTrace(log=True)
        metric.update(x, w, y)
        found = metric.compute()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), flatcore.hessian_trace(x, w, y, log=True), rtol=1e-7, atol=1e-7)


def test_states_move_between_devices_and_into_shared_memory() -> None:
    metric = HessianTrace()
    parent = Parent(metric).to("meta", torch.bfloat16)
    assert parent.linear.weight.dtype == torch.bfloat16
    for state in metric.metric_state.values():
        assert state.device.type == "meta" and state.dtype in (torch.float64, torch.int64)
    assert metric.device.type == "meta"
    shared = HessianTrace()
    shared.share_memory()
    assert shared.mass.is_shared()


def test_a_checkpoint_in_half_precision_is_read_into_float64_and_not_shared() -> None:
    x, w, _, y = data()
    metric = HessianTrace()
    metric.persistent(True)
    metric.update(x, w, y)
    saved = {
        name: state.bfloat16() if state.is_floating_point() else state for name, state in metric.state_dict().items()
    }
    one, two = HessianTrace(), HessianTrace()
    for fresh in (one, two):
        fresh.load_state_dict(saved)
        fresh._update_count = 1
    one.update(x[:9], w, y[:9])
    assert one.mass.dtype == torch.float64 and one.divisor != two.divisor
    torch.testing.assert_close(two.compute(), metric.compute(), rtol=2**-7, atol=0.0)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*HessianTrace\(.*temperature=1.0"):
        HessianTrace(temperature=2.0).load_state_dict(saved)


def test_states_of_other_metrics_are_not_merged() -> None:
    x, w, _, y = data()
    one, two, other = RelativeFlatness(), RelativeFlatness(), RelativeFlatness(measure="neuronwise")
    for metric, rows in ((one, slice(90)), (two, slice(90, None)), (other, slice(90, None))):
        metric.update(x[rows], w, y[rows])
    with pytest.raises(ValueError, match=r"RelativeFlatness\(measure='layerwise'"):
        one.merge_state(other)
    one.merge_state(two)
    torch.testing.assert_close(one.compute().double(), flatcore.relative_flatness(x, w, y), rtol=1e-6, atol=0.0)


# ------------------------------------------------------------------------------------------------------------ wrappers
def test_wrappers_that_would_take_a_head_apart_are_refused() -> None:
    from torchmetrics import wrappers

    for make in (HessianTrace, RelativeFlatness, FeatureGradientNorm):
        with pytest.raises(
            TypeError, match=rf"{make.__name__} cannot be wrapped in BootStrapper, which draws .* linear_weight"
        ):
            wrappers.BootStrapper(make())
        with pytest.raises(
            TypeError, match=rf"{make.__name__} cannot be wrapped in MultioutputWrapper, which takes one col"
        ):
            wrappers.MultioutputWrapper(make(), num_outputs=2)
    with pytest.raises(TypeError, match="BootStrapper"):
        wrappers.BootStrapper(wrappers.MinMaxMetric(HessianTrace()))
    # the way out that is named
    x, w, _, _ = data()
    torch.manual_seed(0)
    way_out = wrappers.BootStrapper(torchmetrics.MeanMetric(), num_bootstraps=80)
    values = flatcore.hessian_trace(x, w, reduction="none")
    way_out.update(values)
    error = values.std() / math.sqrt(N)
    assert abs(way_out.compute()["mean"].double() - values.mean()) < 5 * error / math.sqrt(80)
    assert 0.6 * error < way_out.compute()["std"].double() < 1.4 * error  # 5 of its own standard errors


def test_wrappers_that_pass_a_head_on_whole() -> None:
    from torchmetrics import wrappers

    x, w, _, y = data()
    want = flatcore.hessian_trace(x, w, y)
    both = wrappers.MinMaxMetric(HessianTrace())
    tracker = wrappers.MetricTracker(HessianTrace(), maximize=False)
    tracker.increment()
    running = wrappers.Running(HessianTrace(), window=100)
    for rows in batches(x):
        for metric in (both, tracker, running):
            metric.update(x[rows], w, y[rows])
    for found in (both.compute()["raw"], tracker.compute(), running.compute()):
        torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=0.0)
    tracker.increment()
    tracker.update(x[:9], w, y[:9])
    assert tracker.compute_all()[0] != tracker.compute_all()[1]


@pytest.mark.parametrize("make", (HessianTrace, RelativeFlatness, FeatureGradientNorm))
def test_a_head_with_one_output_is_refused_by_name(make: Callable[[], Any]) -> None:
    metric = make()
    x, w = torch.randn(4, D), torch.randn(1, D)
    for weight in (w, w.numpy()):
        words = rf"{make.__name__}: linear_weight has one output \(C = 1\).*zeros_like\(w\), w"
        with pytest.raises(ValueError, match=words):
            metric.update(x.numpy() if weight is not w else x, weight, torch.zeros(4, dtype=torch.long))
    assert metric.divisor == 0
    # the way out: the two classes of a sigmoid
    metric.update(x, torch.cat([torch.zeros_like(w), w]), torch.ones(4, dtype=torch.long))
    p = (x @ w[0]).double().sigmoid()
    phi, size = x.double().square().sum(1), w.double().square().sum()
    values = {
        HessianTrace: 2 * phi * p * (1 - p),
        RelativeFlatness: 2 * phi * p * (1 - p) * size,
        FeatureGradientNorm: (1 - p) * size.sqrt(),
    }
    torch.testing.assert_close(metric.compute().double(), values[make].mean(), rtol=1e-5, atol=0.0)


def test_with_a_probe_in_a_plain_loop() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(D, 8), torch.nn.Tanh(), torch.nn.Linear(8, C))
    x, y = torch.randn(N, D), torch.randint(C, (N,))
    metric, optimizer = RelativeFlatness(), torch.optim.SGD(model.parameters(), lr=0.0)
    with flatcore.Probe(model) as probe:
        for rows in batches(x):
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            metric.update(probe.features, probe.head.weight, y[rows], linear_bias=probe.head.bias)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    features = model[1](model[0](x))
    want = flatcore.relative_flatness(features, model[2].weight, y, linear_bias=model[2].bias)
    torch.testing.assert_close(metric.compute(), want.detach())


# ----------------------------------------------------------------------------------------------------- several processes
WORKER = """
    import sys, warnings, torch, torch.distributed as distributed
    import flatcore
    from flatcore.metrics import FeatureGradientNorm, HessianTrace, RelativeFlatness
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    warnings.filterwarnings("ignore", message=".*called before the ``update``.*")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
    x, w, y = torch.load(out + ".in")
    # uneven: rank 0 has most rows, the last one of three has none
    cuts = [0, 150, 200, 200][: world] + [200]
    mine = slice(cuts[rank], cuts[rank + 1])
    found = {}
    for name, metric in (("trace", HessianTrace(log=True)), ("flat", RelativeFlatness(measure="neuronwise")),
                         ("norm", FeatureGradientNorm())):
        metric.set_dtype(torch.float64)
        for start in range(mine.start, mine.stop, 32):
            rows = slice(start, min(start + 32, mine.stop))
            metric.update(x[rows], w, y[rows])
        local = metric.mass.clone()
        found[name] = (metric.compute(), metric.median(), metric.heaviest_share())
        assert torch.equal(metric.mass, local), "the process's own state was not given back"
    torch.save(found, f"{out}.{rank}")
    distributed.barrier()
    distributed.destroy_process_group()
"""


@pytest.mark.parametrize("world", (2, pytest.param(3, marks=pytest.mark.exhaustive)))
def test_several_processes_with_uneven_shards(world: int, tmp_path: Path) -> None:
    x, w, _, y = data(scale=10.0)
    out, store = str(tmp_path / "result"), str(tmp_path / "store")
    torch.save((x, w, y), out + ".in")
    script = textwrap.dedent(WORKER)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(world), store, out],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        said = [worker.communicate(timeout=600)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(said)
    alone = {}
    for name, metric in (
        ("trace", HessianTrace(log=True)), ("flat", RelativeFlatness(measure="neuronwise")), ("norm", FeatureGradientNorm()),
    ):  # fmt: skip
        double(metric).update(x, w, y)
        alone[name] = (metric.compute(), metric.median(), metric.heaviest_share())
    for rank in range(world):
        for name, values in torch.load(f"{out}.{rank}").items():
            np.testing.assert_allclose(values, alone[name], rtol=1e-12, atol=0)
