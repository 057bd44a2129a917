"""flatcore.metrics among torchmetrics' own: collections, wrappers, casts, compositions, plots.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import textbook
import torch
from torch import Tensor, nn

N, D, C = 24, 6, 4
MEANS = {"trace": "hessian_trace", "flat": "layerwise", "petzka": "neuronwise", "norm": "feature_gradient_norm"}


def four() -> dict[str, Any]:
    from flatcore.metrics import FeatureGradientNorm, HessianTrace, RelativeFlatness

    return {
        "trace": HessianTrace(),
        "flat": RelativeFlatness(),
        "petzka": RelativeFlatness(measure="neuronwise"),
        "norm": FeatureGradientNorm(),
    }


def batch(rows: int = N) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, D), torch.randn(C, D) / 2, torch.randint(C, (rows,))


FIRST_BATCHES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "all padding": lambda x, y: (x, torch.full_like(y, -100)),
    "dead features": lambda x, y: (torch.zeros_like(x), y),
    "no rows": lambda x, y: (x[:0], y[:0]),
}


# torchmetrics#2596: metrics whose states agree after the first update share one state from then on
@pytest.mark.parametrize("first", FIRST_BATCHES)
def test_a_collection_whose_first_batch_says_nothing(torchmetrics: ModuleType, first: str) -> None:
    collection = torchmetrics.MetricCollection(four())
    x, w, y = batch()
    dull = FIRST_BATCHES[first](x, y)
    collection.update(dull[0], w, dull[1])
    collection.update(x, w, y)
    found = collection.compute()
    rows = {"dead features": (torch.cat([dull[0], x]), torch.cat([dull[1], y]))}.get(first, (x, y))
    for name, measure in MEANS.items():
        want = textbook.mean(measure, rows[0], w, None, rows[1])
        torch.testing.assert_close(found[name].double(), want, rtol=textbook.FLOAT32, atol=0.0)


def test_a_collection_of_one_measure_with_other_options(torchmetrics: ModuleType) -> None:
    from flatcore.metrics import FeatureGradientNorm, HessianTrace, RelativeFlatness

    collection = torchmetrics.MetricCollection(
        {
            "cold": HessianTrace(),
            "warm": HessianTrace(temperature=2.0),
            "logged": HessianTrace(log=True),
            "first power": RelativeFlatness(norm_power=1),
            "second power": RelativeFlatness(),
            "1": FeatureGradientNorm(ord=1),
            "inf": FeatureGradientNorm(ord=torch.inf),
            "other padding": FeatureGradientNorm(ord=1, ignore_index=0),
        }
    )
    x, w, y = batch()
    collection.update(x[:0], w, y[:0])
    collection.update(x, w, y)
    found = {name: value.double() for name, value in collection.compute().items()}
    trace = textbook.mean("hessian_trace", x, w)
    p = (x.double() @ w.double().T).softmax(1)
    gradient = (p - nn.functional.one_hot(y, C)) @ w.double()
    wants = {
        "cold": trace,
        "warm": textbook.mean("hessian_trace", x, w, temperature=2.0),
        "logged": trace.log(),
        "first power": trace * w.double().norm(),
        "second power": trace * w.double().norm() ** 2,
        "1": gradient.abs().sum(1).mean(),
        "inf": gradient.abs().amax(1).mean(),
        "other padding": gradient[y != 0].abs().sum(1).mean(),
    }
    for name, want in wants.items():
        torch.testing.assert_close(found[name], want, rtol=textbook.FLOAT32, atol=1e-6 if name == "logged" else 0.0)


CASTS: dict[str, Callable[[Any], Any]] = {
    "module.to(bfloat16)": lambda metric: nn.ModuleList([metric]).to(torch.bfloat16)[0],
    "module.half()": lambda metric: nn.ModuleList([metric]).half()[0],
    "module.float()": lambda metric: nn.ModuleList([metric]).float()[0],
    "metric.half()": lambda metric: metric.half(),
    "metric.bfloat16()": lambda metric: metric.bfloat16(),
    "metric.to(bfloat16)": lambda metric: metric.to(torch.bfloat16),
    "set_dtype(bfloat16)": lambda metric: metric.set_dtype(torch.bfloat16),
    "set_dtype(float16)": lambda metric: metric.set_dtype(torch.float16),
}


@pytest.mark.parametrize("when", ("before", "between", "after"))
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_metric_keeps_its_digits(torchmetrics: ModuleType, cast: str, when: str) -> None:
    x, w, y = batch()
    for name, metric in four().items():
        want = textbook.mean(MEANS[name], x, w, None, y)
        for stage, part in (("before", slice(0, 9)), ("between", slice(9, N)), ("after", None)):
            if stage == when:
                metric = CASTS[cast](metric)
            if part is not None:
                metric.update(x[part], w, y[part])
        got = metric.compute()
        # the value's own dtype may be the one that was asked for; its digits are then that dtype's
        rtol = max(textbook.FLOAT32, torch.finfo(got.dtype).eps if got.dtype.itemsize < 4 else 0.0)
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=0.0)
        states = {state: getattr(metric, state) for state in metric._defaults}
        assert all(x.dtype == torch.float64 for x in states.values() if x.is_floating_point()), states
        metric.reset()
        metric.update(x, w, y)
        torch.testing.assert_close(metric.compute().double(), want, rtol=rtol, atol=0.0)


def test_a_bootstrap_that_would_resample_the_weight_is_refused(torchmetrics: ModuleType) -> None:
    """The wrapper draws rows of every tensor it is given, so also of the weight: wrong, and no error, where N <= C."""
    x, w, y = torch.randn(C, D), torch.randn(C, D), torch.arange(C)
    for metric in four().values():
        with pytest.raises((TypeError, ValueError), match=r"BootStrapper.*linear_weight"):
            torchmetrics.wrappers.BootStrapper(metric, num_bootstraps=3).update(x, w, y)


def test_wrappers_that_hand_on_what_they_get(torchmetrics: ModuleType) -> None:
    x, w, y = batch()
    parts = [slice(0, 8), slice(8, N)]
    wants = [textbook.mean("layerwise", x[part], w) for part in parts]
    extremes = torchmetrics.wrappers.MinMaxMetric(four()["flat"])
    tracked = torchmetrics.wrappers.MetricTracker(torchmetrics.MetricCollection(four()), maximize=False)
    running = torchmetrics.wrappers.Running(four()["flat"], window=2)
    for part, want in zip(parts, wants, strict=True):
        tracked.increment()
        tracked.update(x[part], w, y[part])
        running(x[part], w, y[part])
        got = extremes(x[part], w, y[part])
        torch.testing.assert_close(got["raw"].double(), want, rtol=textbook.FLOAT32, atol=0.0)
    together = textbook.mean("layerwise", x, w)
    torch.testing.assert_close(running.compute().double(), together, rtol=textbook.FLOAT32, atol=0.0)
    best = tracked.best_metric()
    torch.testing.assert_close(float(best["flat"]), float(min(wants)), rtol=textbook.FLOAT32, atol=0.0)


def test_arithmetic_of_metrics(torchmetrics: ModuleType) -> None:
    x, w, y = batch()
    metrics = four()
    share = metrics["petzka"] / metrics["flat"]
    share.update(x, w, y)
    want = textbook.mean("neuronwise", x, w) / textbook.mean("layerwise", x, w)
    torch.testing.assert_close(share.compute().double(), want, rtol=2 * textbook.FLOAT32, atol=0.0)


def test_a_module_that_saves_its_metrics(torchmetrics: ModuleType) -> None:
    x, w, y = batch()
    source, other = nn.ModuleDict(four()), nn.ModuleDict(four())
    for metric in source.values():
        metric.persistent(True)
        metric.update(x, w, y)
    for metric in other.values():
        metric.persistent(True)
    other.load_state_dict(source.state_dict())
    for copied in (other, copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        for name, metric in copied.items():
            metric._update_count = 1  # what a checkpoint does not hold
            want = textbook.mean(MEANS[name], x, w, None, y)
            torch.testing.assert_close(metric.compute().double(), want, rtol=textbook.FLOAT32, atol=0.0)


def test_plots(torchmetrics: ModuleType) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x, w, y = batch()
    metric = four()["flat"]
    values = [metric(x[part], w, y[part]) for part in (slice(0, 8), slice(8, N))]
    figure, axes = metric.plot()
    (point,) = [line.get_ydata() for line in axes.lines]
    want = textbook.mean("layerwise", x, w)
    assert float(point[0]) == pytest.approx(float(want), rel=textbook.FLOAT32)
    pyplot.close(figure)
    figure, axes = metric.plot(values)
    assert [float(v) for v in axes.lines[0].get_ydata()] == pytest.approx([float(v) for v in values])
    pyplot.close(figure)
