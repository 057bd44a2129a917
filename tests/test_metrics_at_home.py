"""The torchmetrics among torchmetrics: collections, states, casts, checkpoints, wrappers, a probe in a loop.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from metering import METRICS, C, D, N, batches, data, double

import flatcore
from flatcore.metrics import FeatureGradientNorm, HessianTrace, RelativeFlatness

INF = math.inf


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
