"""evaluate's numbers: against NumPy on the whole table, in pieces; the model as it was.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from evaluating import C, N, data, loader, network
from torch import Tensor, nn

import flatcore
from flatcore._report.distribution import Distribution

MEASURES = ("loss", "hessian_trace", "layerwise", "neuronwise", "feature_gradient_norm")


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


def direct(model: nn.Module, x: Tensor, y: Tensor) -> flatcore.HeadMetrics:
    with torch.no_grad():
        features = model.eval()[:-1](x)
        return flatcore.head_metrics(features, model[-1].weight, y, linear_bias=model[-1].bias)


def check_statistics(found: flatcore.Statistics, logs: np.ndarray) -> None:
    """Against NumPy in float64, relative to the largest."""
    assert (found.rows, found.nan_rows) == (len(logs), 0)
    top = logs.max()
    values = np.exp(logs - top)
    assert found.log_mean == pytest.approx(top + np.log(values.mean()), rel=1e-12, abs=1e-12)
    assert found.relative_standard_error == pytest.approx(
        values.std(ddof=1) / math.sqrt(len(values)) / values.mean(), rel=1e-9
    )
    # a bin is 1/256 wide
    middle = np.sort(logs)[[(len(logs) - 1) // 2, len(logs) // 2]]
    assert abs(found.log_median - middle[1] - np.log(np.median(np.exp(middle - middle[1])))) <= 1 / 256
    ordered = np.sort(values)[::-1]
    wanted, whole = 0.01 * len(values), int(0.01 * len(values))
    heaviest = (ordered[:whole].sum() + (wanted - whole) * ordered[whole]) / ordered.sum()
    assert found.heaviest_share == pytest.approx(heaviest, rel=1 / 128)  # the last bin's rows count as equals


# ------------------------------------------------------------------------------------------------------------ numbers
@pytest.mark.parametrize("scale", (1.0, 400.0))
def test_table_and_statistics(scale: float) -> None:
    model, (x, y) = network(scale), data()
    report = flatcore.evaluate(model, loader(x, y))
    metrics = direct(model, x, y)
    rows = report.rows
    assert list(rows) == ["row", "target", "prediction", "correct", *[n for n in metrics._fields if n != "prediction"]]
    assert rows["row"].tolist() == list(range(N))
    assert (rows["target"] == y.numpy()).all() and (rows["prediction"] == metrics.prediction.numpy()).all()
    right = rows["correct"]
    assert (right == (rows["target"] == rows["prediction"])).all() and 0 < right.sum() < N
    for name in metrics._fields[1:]:
        # batches of 64 and of 700 may round a product differently: by the depth of two float32 products
        np.testing.assert_allclose(rows[name], getattr(metrics, name), rtol=3e-5, atol=3e-5 * scale, err_msg=name)
    assert list(report.groups["all"].statistics) == list(MEASURES)
    for name in MEASURES:
        logs = rows["loss"].astype(float) if name == "loss" else rows[f"log_{name}"].astype(float)
        with np.errstate(divide="ignore"):
            logs = np.log(logs) if name == "loss" else logs
        if np.isfinite(logs).all():
            check_statistics(report[name], logs)
            check_statistics(report.groups["correct"].statistics[name], logs[right])
            check_statistics(report.groups["wrong"].statistics[name], logs[~right])
            for label in range(C):
                check_statistics(report.classes[label].statistics[name], logs[y.numpy() == label])
    whole = report.groups["all"]
    assert (whole.rows, whole.correct) == (N, right.sum())
    assert whole.accuracy == pytest.approx(right.mean())
    assert whole.accuracy_standard_error == pytest.approx(math.sqrt(right.mean() * (1 - right.mean()) / N))
    assert {k: (g.rows, g.correct) for k, g in report.classes.items()} == {
        k: ((y == k).sum(), right[y.numpy() == k].sum()) for k in range(C)
    }
    assert report.complete and report.info["head"] == "4" and report.info["classes"] == C
    assert report.info["weight_norm"] == pytest.approx(model[-1].weight.double().norm().item())


def test_values_below_the_smallest_float_keep_their_logs() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    gaps = torch.linspace(1000, 3000, 41, dtype=torch.float64)
    x = torch.stack([gaps, 0 * gaps], dim=1)
    report = flatcore.evaluate(model, [(x, torch.zeros(41, dtype=torch.long))])
    trace = report["hessian_trace"]
    # ||phi||^2 2 e^-g: in logs
    check_statistics(trace, 2 * np.log(gaps.numpy()) + math.log(2) - gaps.numpy())
    assert (trace.mean, trace.median) == (0.0, 0.0)
    assert trace.log_mean < -900
    assert "e-4" in repr(report)  # e^-986 is 1e-428
    # the loss itself, e^-1000, is 0 in any float
    assert report["loss"].log_mean == -math.inf and report["loss"].mean == 0


def test_infinite_and_nan_values() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        model[0].bias[2] = -math.inf  # an absent class
    x = torch.randn(6, 2)
    x[4] = math.nan
    y = torch.tensor([0, 1, 2, 0, 1, 0])
    report = flatcore.evaluate(model, [(x, y)])
    assert report["loss"].nan_rows == 1 and math.isnan(report["loss"].mean) and math.isnan(report["loss"].log_median)
    assert report.classes[2].statistics["loss"].mean == math.inf
    assert report.classes[0].statistics["loss"].nan_rows == 0 and report.classes[0].statistics["loss"].mean > 0
    assert "1 rows NaN" in repr(report)
    assert report.rows["prediction"][4] == -1


def test_input_gradient_norms() -> None:
    model, (x, y) = network(), data(50)
    report = flatcore.evaluate(model, loader(x, y, 16), input_gradient_norms=True)
    want = flatcore.input_gradient_norms(model.eval(), x, y, log=True)
    np.testing.assert_allclose(report.rows["log_input_gradient_norm"], want, rtol=1e-4, atol=1e-4)
    check_statistics(report["input_gradient_norm"], report.rows["log_input_gradient_norm"].astype(float))


def test_tokens_with_padding() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens).cumsum(1))

    model = Tokens()
    tokens = torch.randint(0, 7, (5, 6))
    target = torch.randint(0, 7, (5, 6))
    target[1, 3:] = target[4] = -1
    report = flatcore.evaluate(model, loader(tokens, target, 2), ignore_index=-1)
    kept = target != -1
    assert report.groups["all"].rows == kept.sum() == len(report.rows["row"])
    places = kept.nonzero()
    assert report.rows["row"].tolist() == places[:, 0].tolist()
    assert report.rows["position"].tolist() == places[:, 1].tolist()
    with torch.no_grad():
        features = model.embedding(tokens).cumsum(1)[kept]
        want = flatcore.head_metrics(features, model.head.weight, target[kept], linear_bias=model.head.bias)
    np.testing.assert_allclose(report.rows["log_neuronwise"], want.log_neuronwise, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"features' leading shape \(2, 6\), got \(2,\)"):
        flatcore.evaluate(model, [(tokens[:2], target[:2, 0].abs())])


def test_the_caller_finds_the_model_as_it_was() -> None:
    model, (x, y) = network(), data(40)
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flatcore.evaluate(model, loader(x, y), input_gradient_norms=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model] == [False, True, True, True, True] and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_float64_and_several_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatcore._report import evaluate

    model, (x, y) = network().double(), data()
    once = flatcore.evaluate(model, loader(x.double(), y))
    monkeypatch.setattr(evaluate, "_FLUSH", 100)
    often = flatcore.evaluate(model, iter(loader(x.double(), y)))
    assert once.rows["log_layerwise"].dtype == np.float64
    for name, column in once.rows.items():
        np.testing.assert_array_equal(column, often.rows[name])
    for name in MEASURES:
        np.testing.assert_allclose(once[name], often[name], rtol=1e-12)
    np.testing.assert_array_equal(np.sort(once.sample["row"]), np.sort(often.sample["row"]))


def test_distribution_does_not_grow_with_rows() -> None:
    random = np.random.default_rng(0)
    found = Distribution()
    sizes = []
    for _ in range(40):
        found.add(random.normal(0, 3, 50_000), np.zeros(50_000, int))
        sizes.append(len(found.key))
    # 256 bins for each unit of a log, from -16 to 16 at the most for two million normal numbers
    assert sizes[-1] < 33 * 256
    assert sizes[-1] < 1.2 * sizes[9]
    # beyond +-16384 values share the outermost bin
    found.add(np.array([-1e6, 1e6]), np.zeros(2, int))
    assert len(found.key) == sizes[-1] + 2


def test_sample_for_pictures_is_bounded() -> None:
    model, (x, y) = network(), data(20_000)
    report = flatcore.evaluate(model, loader(x, y, 1000), rows=False)
    assert report.rows is None
    assert len(report.sample["row"]) == 8192
    # even over the order: eighths of the rows have 1,024 +- 30 each; five standard deviations
    counts = np.histogram(report.sample["row"], bins=8, range=(0, 20_000))[0]
    assert (abs(counts - 1024) < 150).all()
    with pytest.raises(ValueError, match="was not kept in memory"):
        report.to_csv("nowhere.csv")


# ------------------------------------------------------------------------------------------------------------- medians
@pytest.mark.parametrize(
    "logs",
    ([-3.0, 5.0], [-4000.0, 2.0], [-math.inf, 1.0], [-math.inf] * 2 + [0.0, 3.0], [1.0, math.inf], [1.0, 2.0, 4.0]),
)
def test_of_two_middle_values_the_median_is_the_mean(logs: list[float]) -> None:
    found = Distribution()
    found.add(np.array(logs), np.zeros(len(logs), int))
    with np.errstate(divide="ignore"):
        want = np.log(np.median(np.exp(np.array(logs))))
    assert found.statistics().log_median == pytest.approx(want, rel=1e-12)


def test_medians_of_any_even_or_odd_number_of_rows() -> None:
    random = np.random.default_rng(0)
    for rows in (1, 2, 3, 4, 10, 11, 100, 101):
        for scale in (0.001, 1.0, 30.0):
            logs = random.normal(0, scale, rows)
            found = Distribution()
            found.add(logs, np.zeros(rows, int))
            assert abs(found.statistics().log_median - np.log(np.median(np.exp(logs)))) <= 1 / 256
