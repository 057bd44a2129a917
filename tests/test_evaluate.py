"""evaluate and its report: against NumPy on the whole table, in pieces, in processes, in a browser.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import flatcore
from flatcore._report.distribution import Distribution

N, D, C = 700, 16, 5
MEASURES = ("loss", "hessian_trace", "layerwise", "neuronwise", "feature_gradient_norm")


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


def network(scale: float = 1.0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Dropout(0.5), nn.Linear(D, C))
    with torch.no_grad():
        model[-1].weight.mul_(scale)
        model[-1].bias.mul_(scale)
    return model


def data(rows: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 6), torch.randint(0, C, (rows,))


def loader(x: Tensor, y: Tensor, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def direct(model: nn.Module, x: Tensor, y: Tensor) -> flatcore.HeadMetrics:
    with torch.no_grad():
        features = model.eval()[:-1](x)
        return flatcore.head_metrics(features, model[-1].weight, y, linear_bias=model[-1].bias)


def logs_of(metrics: flatcore.HeadMetrics, measure: str) -> np.ndarray:
    if measure == "loss":
        return metrics.loss.double().log().numpy()
    return getattr(metrics, f"log_{measure}").double().numpy()


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


# --------------------------------------------------------------------------------------------------------------- files
def test_csv_in_memory_and_streamed_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatcore._report import evaluate

    monkeypatch.setattr(evaluate, "_FLUSH", 100)
    model, (x, y) = network(), data(300)
    kept = flatcore.evaluate(model, loader(x, y))
    kept.to_csv(tmp_path / "kept.csv")
    streamed = flatcore.evaluate(model, loader(x, y), rows=tmp_path / "streamed.csv")
    assert streamed.rows is None
    assert (tmp_path / "kept.csv").read_bytes() == (tmp_path / "streamed.csv").read_bytes()
    with (tmp_path / "kept.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name, column in kept.rows.items():
        np.testing.assert_array_equal(np.array([float(row[name]) for row in rows]).astype(column.dtype), column)


def test_json_is_standard_and_whole(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    x = torch.zeros(3, 2)  # features of 0: a trace of 0, a log of -inf
    report = flatcore.evaluate(model, [(x, torch.tensor([0, 1, 1]))])
    report.to_json(tmp_path / "report.json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    trace = found["groups"]["all"]["statistics"]["hessian_trace"]
    assert (trace["log_mean"], trace["mean"], trace["relative_standard_error"]) == ("-inf", 0.0, None)
    assert found["classes"]["1"]["rows"] == 2
    assert found["complete"] is True and found["info"]["head"] == "0"
    assert found["groups"]["all"]["statistics"]["loss"]["mean"] == report["loss"].mean


def test_a_failed_write_keeps_the_old_file_and_the_report(tmp_path: Path) -> None:
    report = flatcore.evaluate(network(), loader(*data(30)))
    old = tmp_path / "report.json"
    old.write_text("old")
    for path in (tmp_path / "missing" / "report.json", tmp_path):
        with pytest.raises(OSError, match=r"No such file|Is a directory"):
            report.to_json(path)
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as on a full disk
        with pytest.raises(OSError, match="File too large"):
            report.to_json(old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert old.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    report.to_json(old)
    assert json.loads(old.read_text())["complete"]


def test_interrupt_keeps_what_there_is(tmp_path: Path) -> None:
    model, (x, y) = network(), data(300)

    def stopped() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(loader(x, y, 50)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    report = flatcore.evaluate(model, stopped(), rows=tmp_path / "rows.csv")
    assert not report.complete and report.groups["all"].rows == 150
    assert "INTERRUPTED" in repr(report)
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 151
    assert model.training and not any(m._forward_hooks for m in model.modules())
    report.to_html(tmp_path / "report.html")
    assert "The run was interrupted" in (tmp_path / "report.html").read_text(encoding="utf-8")

    def at_once() -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    nothing = flatcore.evaluate(model, at_once())
    assert nothing.groups["all"].rows == 0 and math.isnan(nothing["loss"].mean)
    nothing.to_html(tmp_path / "nothing.html")


# ------------------------------------------------------------------------------------------------------------ pictures
def test_pictures_show_the_numbers() -> None:
    model, (x, y) = network(), data()
    report = flatcore.evaluate(model, loader(x, y), input_gradient_norms=True)
    figure = report.plot_distributions()
    assert len(figure.axes) == 6
    for axes in figure.axes:
        for stairs in axes.patches:
            assert stairs.get_data().values.sum() == pytest.approx(100), "shares of the rows, in percent"
    (axes,) = report.plot_confidence().axes
    drawn = np.concatenate([np.asarray(points.get_offsets()) for points in axes.collections])
    truth = np.stack(
        [report.rows[n].astype(float) / math.log(10) for n in ("log_one_minus_confidence", "log_layerwise")]
    )
    np.testing.assert_allclose(np.sort(drawn[:, 1]), np.sort(truth[1]))
    np.testing.assert_allclose(np.sort(drawn[:, 0]), np.sort(truth[0]))
    (axes,) = report.plot_concentration().axes
    line = next(line for line in axes.lines if line.get_label() == "relative flatness, layerwise")
    at_one = np.interp(1, line.get_xdata(), line.get_ydata())
    assert at_one == pytest.approx(100 * report["layerwise"].heaviest_share, rel=0.05)
    (axes,) = report.plot_classes().axes
    medians = np.asarray(axes.collections[0].get_offsets())[:, 0]
    want = sorted((g.statistics["layerwise"].log_median / math.log(10) for g in report.classes.values()), reverse=True)
    np.testing.assert_allclose(medians, want)


@pytest.mark.needs("browser")
def test_page_in_a_browser(tmp_path: Path) -> None:
    """Headless Chromium, wide and as a phone: no console message, every picture drawn, nothing wider than the screen."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    model, (x, y) = network(), data()
    report = flatcore.evaluate(model, loader(x, y), input_gradient_norms=True)
    page = tmp_path / "report.html"
    report.to_html(page, title="A <b>title</b> & more")
    text = page.read_text()
    assert "http://" not in text and "https://" not in text and "<b>title" not in text
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        for width, height in ((1200, 900), (390, 844)):
            browser.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
            )
            browser.get(page.as_uri())
            assert browser.title == "A <b>title</b> & more"
            pictures = browser.execute_script(
                "return [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
            )
            assert len(pictures) == 4
            for complete, natural, shown in pictures:
                assert complete and natural > 500 and 300 < shown <= width
            sizes = browser.execute_script(
                "return [document.documentElement.scrollWidth, window.innerWidth, "
                "parseFloat(getComputedStyle(document.querySelector('td')).fontSize)]"
            )
            assert sizes[0] <= sizes[1] == width, "the page is wider than the screen"
            assert sizes[2] >= 14
            cells = browser.execute_script("return document.querySelector('tbody').innerText")
            assert str(N) in cells and "NaN" not in cells
        assert browser.get_log("browser") == []
    finally:
        browser.quit()


# ----------------------------------------------------------------------------------------------------------- bad input
class _Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(6), torch.tensor(0)


def ones(shape: tuple[int, ...], dtype: torch.dtype = torch.long, rows: int = 3) -> list[tuple[Tensor, Tensor]]:
    """A loader of one batch, whose target has another form than it should."""
    return [(torch.zeros(rows, 6), torch.ones(shape, dtype=dtype))]


def named(rows: int, *targets: str) -> list[dict[str, Tensor]]:
    return [{"x": torch.zeros(2, 6)} | {name: torch.zeros(rows).long() for name in targets}]


ONE_HOT = torch.eye(C)[:3]
BAD = {
    "no module": ({"model": lambda x: x}, TypeError, r"model must be a torch\.nn\.Module, got builtins\.function"),
    "empty": ({"loader": []}, ValueError, r"at least one batch, got an empty one \(or one that was used up before\)"),
    "no rows": ({"loader": [(torch.zeros(0, 6), torch.zeros(0).long())]}, ValueError, "at least one row"),
    "ignored alone": ({"loader": [(torch.zeros(2, 6), torch.full((2,), -100))]}, ValueError, "at least one row"),
    "a tensor": ({"loader": [torch.zeros(2, 6)]}, TypeError, r"pairs \(inputs, target\), got a Tensor as batch 0"),
    "a dictionary": ({"loader": [{"x": 1, "y": 2}]}, TypeError, "got a dict of 2 as batch 0"),
    "three": ({"loader": [(1, 2, 3)]}, TypeError, "got a tuple of 3 as batch 0"),
    "lists": ({"loader": [([[0.0] * 6], [0])]}, TypeError, "got target of type list in batch 0"),
    "masked": ({"loader": [(np.ma.zeros((2, 6)), np.zeros(2, int))]}, TypeError, "masked array"),
    "float arrays": ({"loader": [(np.zeros((2, 6)), np.zeros(2))]}, TypeError, r"got torch\.float64: pass target\.long\(\)"),
    "soft": ({"loader": [(torch.zeros(2, 6), torch.zeros(2))]}, TypeError, "integer class labels as target, got"),
    "label": ({"loader": [(torch.zeros(2, 6), torch.tensor([0, C]))]}, ValueError, rf"in 0\.\.{C - 1} .* got {C} in row 1$"),
    "a column": ({"loader": ones((3, 1))}, ValueError, r"\(3, 1\): pass target\.squeeze\(1\)$"),
    "a float column": ({"loader": ones((3, 1), torch.float)}, TypeError, r"target\.squeeze\(1\).*\.long\(\)"),
    "one-hot": ({"loader": [(torch.zeros(3, 6), ONE_HOT.long())]}, ValueError, r"one-hot: pass target\.argmax\(1\)$"),
    "float one-hot": ({"loader": [(torch.zeros(3, 6), ONE_HOT)]}, TypeError, r"one-hot: pass target\.argmax\(1\)$"),
    "bool": ({"loader": ones((3,), torch.bool)}, TypeError, r"got torch\.bool: pass target\.long\(\)"),
    "four": ({"loader": [(*ones((3,))[0], 1, 2)]}, TypeError, r"tuple of 4 .*: leave out the rest, \(\(x, y\)"),
    "no target": ({"loader": named(2)}, TypeError, "under 'labels' or 'label' or 'target', got .* keys 'x': rename"),
    "two targets": ({"loader": named(2, "label", "labels")}, TypeError, "'x', 'label', 'labels': leave one of them"),
    "a row": ({"loader": [(torch.zeros(6), torch.tensor(0))]}, ValueError, "a single row .* is it a data set"),
    "a row's number": ({"loader": [(torch.zeros(6), 0)]}, TypeError, "target of type int in batch 0: is it a data set"),
    "lengths": ({"loader": ones((2,))}, ValueError, r"as many rows, got shapes \(3, 6\) and \(2,\)"),
    "mapping lengths": ({"loader": named(3, "label")}, ValueError, "as many rows"),
    "mapping norms": (
        {"loader": named(2, "label"), "input_gradient_norms": True},
        TypeError, "input_gradient_norms needs inputs as one tensor, got a mapping",
    ),
    "nothing": ({"loader": 3}, TypeError, "got int, which yields nothing"),
    "device": ({"device": "meta"}, ValueError, r"on device meta, got one on cpu: move it with model.to\('meta'\)"),
    "no device": ({"device": "tpu9"}, ValueError, "device must name a torch device, got 'tpu9'"),
    "head": ({"head": "nope"}, ValueError, "head must name a module of the model, got 'nope'"),
    "temperature": ({"temperature": 0}, ValueError, "temperature must be finite and above 0"),
    "table": ({"rows": 3}, TypeError, "rows must be True, False or a path, got int"),
    "progress": ({"progress": "yes"}, TypeError, "progress must be True or False"),
    "norms": ({"input_gradient_norms": 2}, TypeError, "input_gradient_norms must be True or False"),
    "folder": ({"rows": "/nowhere/rows.csv"}, OSError, "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, error, words = BAD[case]
    with pytest.raises(error, match=words):
        flatcore.evaluate(**{"model": network(), "loader": loader(*data(10))} | changes)


@pytest.mark.parametrize("options", ({}, {"input_gradient_norms": True}), ids=("", "gradients"))
def test_a_bad_label_is_named_by_its_row_in_the_loader(options: dict[str, Any]) -> None:
    model, (x, y) = network(), data(200)
    y[[137, 150]] = torch.tensor([7, -3])
    with pytest.raises(ValueError, match=rf"labels \(target\) in 0\.\.{C - 1} .* got 7 in row 137$"):
        flatcore.evaluate(model, loader(x, y, 16), **options)
    tokens = nn.Sequential(nn.Linear(6, C))
    target = torch.zeros(30, 4).long()
    target[25, 2] = -1
    with pytest.raises(ValueError, match=r"got -1 in row 25, position 2$"):
        flatcore.evaluate(tokens, loader(torch.randn(30, 4, 6), target, 7))


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int32, torch.uint16, torch.uint32, torch.uint64))
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    model, (x, y) = network(), data(60)
    want = flatcore.evaluate(model, loader(x, y))
    found = flatcore.evaluate(model, loader(x, y.to(dtype)))
    for name, column in want.rows.items():
        np.testing.assert_array_equal(found.rows[name], column)
    if dtype == torch.uint64:
        wrong = y.clone()
        wrong[3] = -100  # 2^64 - 100
        with pytest.raises(ValueError, match="in row 3"):
            flatcore.evaluate(model, loader(x, wrong.view(torch.uint64)))


class Named(nn.Module):
    """Takes its input by name, as transformers' models do, and returns an object with logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, values: Tensor, scale: Tensor | None = None, note: Any = None) -> dict[str, Tensor]:
        return {"hidden": values, "logits": self.model(values if scale is None else values * scale)}


@pytest.mark.parametrize("key", ("labels", "label", "target"))
@pytest.mark.parametrize("kind", ("dict", "UserDict", "arrays", "pair"))
def test_batches_by_name(kind: str, key: str) -> None:
    from collections import UserDict  # what transformers' BatchEncoding is

    model, (x, y) = network(), data(100)
    scale = torch.rand(100, 1)
    want = flatcore.evaluate(model, loader(x * scale, y, 16))
    held: list[Any] = []
    for values, factors, labels in zip(x.split(16), scale.split(16), y.split(16), strict=True):
        if kind == "pair":
            held.append(({"values": values, "scale": factors, "note": "a text"}, labels))
            continue
        batch = {"values": values, "scale": factors, key: labels, "note": ["a", "list"]}
        if kind == "arrays":
            batch = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in batch.items()}
        held.append(UserDict(batch) if kind == "UserDict" else batch)
    found = flatcore.evaluate(Named(model), held)
    for name, column in want.rows.items():
        np.testing.assert_allclose(found.rows[name], column, rtol=1e-6, err_msg=name)


def test_labels_that_a_causal_model_would_shift_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.embedding(input_ids).cumsum(1))}

    ids = torch.randint(0, 7, (5, 6))
    labels = torch.where(torch.arange(6) < 4, ids, -100)
    with pytest.raises(
        ValueError, match=r"labels equal to input_ids in batch 0.* shift them here, labels = .*pad\(labels"
    ):
        flatcore.evaluate(Model(), [{"input_ids": ids, "labels": labels}])
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    report = flatcore.evaluate(Model(), [{"input_ids": ids, "labels": shifted}])
    assert report.groups["all"].rows == 15
    assert flatcore.evaluate(Model(), [({"input_ids": ids}, labels)]).groups["all"].rows == 20


class _Batched(IterableDataset[Any]):
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class _Mapped(torch.utils.data.Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> dict[str, Any]:
        return {"values": self.x[k], "label": int(self.y[k])}


def test_a_data_set_in_a_loaders_place() -> None:
    model, (x, y) = network(), data(600)
    want = flatcore.evaluate(model, loader(x, y, 256))
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    rows = list(zip(x, y.tolist(), strict=True))
    for dataset in (TensorDataset(x, y), _Batched(rows), _Batched(loader(x, y, 100)), _Mapped(x, y)):
        sizes.clear()
        net = Named(model) if isinstance(dataset, _Mapped) else model
        found = flatcore.evaluate(net, dataset)
        assert sizes == ([100] * 6 if dataset.__dict__.get("batches") not in (None, rows) else [256, 256, 88])
        for name, column in want.rows.items():
            np.testing.assert_allclose(found.rows[name], column, rtol=3e-5, atol=3e-5, err_msg=name)
    with pytest.raises(ValueError, match="at least one batch"):
        flatcore.evaluate(model, _Batched([]))


def test_numpy_batches() -> None:
    model, (x, y) = network(), data(100)
    want = flatcore.evaluate(model, loader(x, y))
    for labels in (y.numpy(), y.numpy().astype(">i4"), y.numpy().astype(np.uint16)):
        arrays = [(x[k : k + 64].numpy(), labels[k : k + 64]) for k in (0, 64)]
        found = flatcore.evaluate(model, arrays)
        for name, column in want.rows.items():
            np.testing.assert_array_equal(found.rows[name], column)
    backwards = flatcore.evaluate(model, [(x.numpy()[::-1], y.numpy()[::-1])])
    np.testing.assert_array_equal(backwards.rows["target"][::-1], want.rows["target"])


@pytest.mark.parametrize("options", ({}, {"head": "0"}, {"input_gradient_norms": True}), ids=("", "named", "gradients"))
@pytest.mark.parametrize("labels", ([0, 0, 0], [0, 1, 1]))
def test_a_head_with_one_output_is_refused_at_the_first_batch(options: dict[str, Any], labels: list[int]) -> None:
    model = nn.Sequential(nn.Linear(6, 1))
    calls: list[Any] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"has one output \(C = 1\).*softmax head of two classes"):
        flatcore.evaluate(model, [(torch.randn(3, 6), torch.tensor(labels))] * 5, **options)
    assert len(calls) <= 1


def test_logits_scaled_from_the_second_batch_on_are_seen() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.calls = nn.Linear(6, C), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.head(x) * (1.0 if self.calls == 1 else 3.0)

    with pytest.raises(RuntimeError, match="the model's output is not the output of"):
        flatcore.evaluate(Late(), loader(*data(200)))


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


def test_other_loaders() -> None:
    model, (x, y) = network(), data(100)
    want = flatcore.evaluate(model, loader(x, y))
    for other in (DataLoader(TensorDataset(x, y), batch_size=7), iter(loader(x, y, 9)), [[x, y]]):
        found = flatcore.evaluate(model, other, progress=False)
        assert found["layerwise"].log_mean == pytest.approx(want["layerwise"].log_mean, rel=1e-6)
    assert flatcore.evaluate(model, DataLoader(_Endless(), batch_size=4)).groups["all"].rows == 1
    with pytest.raises(KeyError, match="the report has loss, hessian_trace"):
        want["flatness"]


def test_progress_bar_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    flatcore.evaluate(network(), loader(*data(100)), progress=True)
    assert "evaluating" in capsys.readouterr().err
    for progress in (None, False):
        flatcore.evaluate(network(), loader(*data(100)), progress=progress)
        assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------------- several processes
WORKER = """
    import os, sys, torch, torch.distributed as distributed
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
    import flatcore
    out = sys.argv[1]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model, x, y = torch.load(out + "/in.pt", weights_only=False)
    dataset = TensorDataset(x, y)
    plain = DataLoader(dataset, batch_size=16)
    sampled = DataLoader(dataset, batch_size=16, sampler=DistributedSampler(dataset, shuffle=True))
    found = {}
    for name, loader, net in (
        ("plain", plain, model), ("sampled", sampled, model), ("few", [(x[:5], y[:5])], model),
        ("ddp", plain, torch.nn.parallel.DistributedDataParallel(model)),
    ):
        report = flatcore.evaluate(net, loader)
        found[name] = (report.to_dict(), report.rows, sorted(report.sample["row"]))
    for loader, options, words in (
        (DataLoader(dataset, shuffle=True), {}, "same batches in every process"),
        (plain, {"rows": out + "/rows.csv"}, "which all would write"),
    ):
        try:
            flatcore.evaluate(model, loader, **options)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError("not refused")
    torch.save(found, f"{out}/{rank}.pt")
    distributed.barrier()
    distributed.barrier()  # as tests/processes.py
    distributed.destroy_process_group()
"""


@pytest.mark.exhaustive
def test_processes_under_torchrun_agree_with_one(tmp_path: Path) -> None:
    model, (x, y) = network(20.0).eval(), data(101)  # 101 rows on 3 processes: a sampler repeats one
    torch.save((model, x, y), tmp_path / "in.pt")
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(tmp_path / "worker.py"),
         str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    alone = flatcore.evaluate(model, loader(x, y, 16))
    few = flatcore.evaluate(model, [(x[:5], y[:5])])
    for rank in range(3):
        for name, (found, rows, sample) in torch.load(tmp_path / f"{rank}.pt", weights_only=False).items():
            want = few if name == "few" else alone
            assert found["info"]["processes"] == 3 and found["complete"]
            for group, part in want.to_dict()["groups"].items():
                assert (found["groups"][group]["rows"], found["groups"][group]["correct"]) == (
                    part["rows"],
                    part["correct"],
                )
                for measure, statistics in part["statistics"].items():
                    for key, value in statistics.items():
                        got = found["groups"][group]["statistics"][measure][key]
                        assert got == pytest.approx(value, rel=1e-5, abs=1e-5, nan_ok=True), (name, group, measure, key)
            if name == "sampled":
                assert sorted(rows["row"]) == list(range(101)), "a repeated row was counted"
                continue
            assert (rows["row"] == want.rows["row"]).all() and (rows["target"] == want.rows["target"]).all()
            assert sample == sorted(want.sample["row"])


SHARES = """
    import sys, warnings, torch, torch.distributed as distributed
    from torch.utils.data import (
        BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, SequentialSampler, Subset,
        SubsetRandomSampler, TensorDataset,
    )
    import flatcore
    out = sys.argv[1]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model, x, y, twins = torch.load(out + "/in.pt", weights_only=False)
    N = len(x)
    dataset = TensorDataset(x, y)
    mine = list(range(rank, N, world))

    class Rows(list):  # a sampler of one's own: any list of rows
        pass

    class Stream(IterableDataset):
        def __init__(self, rows, noise=0.0):
            self.rows, self.noise = rows, noise
        def __iter__(self):
            generator = torch.Generator().manual_seed(rank)
            for k in self.rows:
                yield x[k] + self.noise * torch.randn(6, generator=generator), y[k]

    class Noisy(Dataset):
        def __len__(self):
            return N
        def __getitem__(self, k):
            return x[k] + 1e-3 * torch.randn(6), y[k]

    class Even(BatchSampler):  # as accelerate's: batches in turn, and rows from the beginning where they end unevenly
        def __init__(self, batches):
            self.batch_sampler, self.even_batches, self.drop_last, self.batch_size = batches, True, False, 16
        def __len__(self):
            return -(-len(self.batch_sampler) // world)
        def __iter__(self):
            batches = list(self.batch_sampler)
            if self.even_batches:
                batches[-1] = (batches[-1] + batches[0])[:16]
                batches += batches[: -len(batches) % world]
            yield from batches[rank::world]

    def named():
        for k in mine:
            yield {"input": x[k : k + 1], "labels": y[k : k + 1]}

    def load(sampler):
        return DataLoader(dataset, batch_size=16, sampler=Rows(sampler))

    def failing():
        if rank == 1:
            raise OSError("the disk is gone")
        yield x[:4], y[:4]

    def share(**options):
        return DistributedSampler(dataset, **{"shuffle": False} | options)

    even = DataLoader(dataset, batch_sampler=Even(BatchSampler(SequentialSampler(dataset), 16, False)))
    last = slice(16, None) if rank == 0 else slice(20, None)
    loaders = {
        "strided": load(mine),
        "one has most": load(range(90) if rank == 0 else range(90, N)),
        "one has none": load(range(N) if rank == 1 else []),
        "no batches in one": [(x, y)] if rank == 0 else [],
        "stream": DataLoader(Stream(mine), batch_size=7),
        "a stream as it is": Stream(mine),
        "a data set for each": DataLoader(Subset(dataset, mine), batch_size=16),
        "the same data set": dataset,
        "the same generator": ((x[k : k + 16], y[k : k + 16]) for k in range(0, N, 16)),
        "accelerate": even,
        "accelerate, alike": DataLoader(
            TensorDataset(torch.ones(101, 6), y * 0),
            batch_sampler=Even(BatchSampler(SequentialSampler(dataset), 16, False)),
        ),
        "by name": named(),
        "equal labels": load(twins[rank::world]),
        "inner sampler": DataLoader(dataset, batch_sampler=BatchSampler(share(), 16, False)),
        "repeats": load((mine + [0])[:51]),
        "drop_last": DataLoader(dataset, batch_size=16, sampler=share(drop_last=True)),
        "leaves out": load(mine[:-2]),
        "noisy stream": DataLoader(Stream(range(N), 1e-3), batch_size=16),
        "noisy": DataLoader(Noisy(), batch_size=16),
        "first alike": [(x[:16], y[:16]), (x[last], y[last])],
        "fewer batches": [(x[:16], y[:16]), (x[16:], y[16:])][: 2 - rank],
        "at random": DataLoader(dataset, batch_size=16, sampler=SubsetRandomSampler(range(N))),
        "one rank twice": DataLoader(dataset, batch_size=16, sampler=share(rank=0)),
        "another seed": DataLoader(dataset, batch_size=16, sampler=share(shuffle=True, seed=rank)),
        "one without": DataLoader(dataset, batch_size=16, sampler=share() if rank else None),
        "failing": failing(),
        "empty": [],
    }
    found = {}
    for name, loader in loaders.items():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                report = flatcore.evaluate(model, loader)
                found[name] = (report.rows, report.complete, report.info, repr(report), [str(w.message) for w in told])
            except (TypeError, ValueError, RuntimeError, OSError) as error:
                found[name] = f"{type(error).__name__}: {error}"
    assert even.batch_sampler.even_batches is True
    torch.save(found, f"{out}/{rank}.pt")
    distributed.barrier()
    distributed.barrier()  # as tests/processes.py
    distributed.destroy_process_group()
"""


def test_two_processes_give_every_row_once(tmp_path: Path) -> None:
    model, (x, y) = network(20.0).eval(), data(101)
    by_class = y.sort(stable=True).indices
    # labels 0, 0, 1, 1, ...: the shares of every second row have the same labels
    twins = torch.cat([by_class[y[by_class] == k][: int((y == k).sum()) // 2 * 2] for k in range(C)])
    torch.save((model, x, y, twins), tmp_path / "in.pt")
    (tmp_path / "worker.py").write_text(textwrap.dedent(SHARES))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "worker.py"),
         str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    alone = flatcore.evaluate(model, [(x, y)])
    kept = {"equal labels": twins, "drop_last": torch.arange(100), "leaves out": torch.arange(97)}
    kept["repeats"] = torch.tensor([*range(101), 0])
    missing = "rows of the data set were in no process's share .* the report is about the other {}, and not complete"
    told = {
        "repeats": (
            True,
            "repeated_rows",
            1,
            r"^1 of the 102 rows .* equal to another one.* The data set has 101 rows\.$",
        ),
        "drop_last": (False, "missing_rows", 1, missing.format(100)),
        "leaves out": (False, "missing_rows", 4, missing.format(97)),
        "equal labels": (False, "missing_rows", 101 - len(twins), missing.format(len(twins))),
    }
    same = ("the same data set", "the same generator")
    names = [
        "strided", "one has most", "one has none", "no batches in one", "stream", "a stream as it is", "a data set for each",
        *same, "accelerate", "by name", "inner sampler", *told,
    ]  # fmt: skip
    for name in names:
        for rank, results in enumerate((one, two)):
            assert not isinstance(results[name], str), (name, results[name])
            rows, complete, info, text, warned = results[name]
            index = kept.get(name, torch.arange(101)).numpy()
            assert sorted(rows["row"].tolist()) == list(range(len(index))), name
            for column in ("target", "loss", "log_layerwise"):
                want = np.sort(alone.rows[column][index])
                np.testing.assert_allclose(
                    np.sort(rows[column]), want, rtol=1e-4, atol=1e-4, err_msg=f"{name}, {column}"
                )
            if name in same:
                assert (rows["target"] == alone.rows["target"]).all() and info["shares"].startswith("one loader"), name
            want_complete, key, count, words = told.get(name, (True, "", 0, ""))
            assert complete is want_complete, name
            assert {k: info[k] for k in ("missing_rows", "repeated_rows") if k in info} == (
                {key: count} if key else {}
            ), name
            assert ("ROWS MISSING" in text) is (not complete), name
            assert len(warned) == (rank == 0 and bool(key)), (name, warned)  # told once, by the first process
            assert all(re.search(words, message) for message in warned), (name, warned)
    refused = {
        "noisy": "other inputs for the same row each time",
        "first alike": "first batches are equal in all processes and whose batch 1 is not, in processes 0 and 1",
        "fewer batches": "first batches are equal in all processes and whose batch 1 is not, in processes 0 and 1",
        "at random": "draws them at random",
        "one rank twice": "got DistributedSamplers with num_replicas = 2, 2 and rank = 0, 0 in 2 processes",
        "another seed": "got DistributedSamplers of another order or data set",
        "one without": "got a DistributedSampler in some processes and none in others",
        "empty": "loader must yield at least one batch",
    }
    for name, words in refused.items():
        for results in (one, two):
            assert isinstance(results[name], str), (name, results[name])
            assert results[name].startswith("ValueError: loader must yield ") and words in results[name], results[name]
    assert two["failing"] == "OSError: the disk is gone"
    assert one["failing"].startswith(
        "RuntimeError: another process could not read its loader, process 1: OSError: the disk"
    )
    for results in (one, two):  # known shares, though their first batches are alike
        assert results["accelerate, alike"][1] and results["accelerate, alike"][0]["row"].tolist() == list(range(101))
    # rows that no one can see to be the same: counted twice, and said so
    assert len(one["noisy stream"][0]["row"]) == 202 and not two["noisy stream"][4]
    assert re.match("the processes read other inputs and the same labels in the same order", one["noisy stream"][4][0])


def test_a_share_without_its_processes_is_not_the_whole() -> None:
    model, (x, y) = network(), data(101)
    dataset = TensorDataset(x, y)
    sampler = DistributedSampler(dataset, num_replicas=4, rank=3, shuffle=False)
    with pytest.warns(UserWarning, match="76 rows of the data set were in no process's share"):
        report = flatcore.evaluate(model, DataLoader(dataset, batch_size=16, sampler=sampler))
    assert not report.complete and report.info["missing_rows"] == 76 and "76 ROWS MISSING" in repr(report)
    assert report.rows["row"].tolist() == list(range(3, 101, 4))


# ----------------------------------------------------------------------------------------------------------- overheads
def test_the_loader_is_read_once_and_the_model_runs_once_a_batch() -> None:
    model, (x, y) = network(), data(200)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for options in ({}, {"input_gradient_norms": True}):
        calls.clear()
        flatcore.evaluate(model, iter(loader(x, y, 50)), **options)
        assert len(calls) == 4


def test_numbers_as_text() -> None:
    from flatcore._report.report import number

    for value in (1.0, 0.5, 123.0, 9.999e-4, 9.995e9, 1e300, 3e-200):
        assert float(number(math.log(value))) == pytest.approx(value, rel=6e-3)
    assert (number(-math.inf), number(math.inf), number(math.nan)) == ("0", "inf", "NaN")
    assert re.fullmatch(r"\d\.\d\de-435", number(-1000.0))
