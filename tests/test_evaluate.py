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
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import flatcore
from flatcore._distribution import Distribution

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
    assert abs(found.log_median - np.quantile(logs, 0.5, method="inverted_cdf")) <= 1 / 256
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
    from flatcore import _evaluate

    model, (x, y) = network().double(), data()
    once = flatcore.evaluate(model, loader(x.double(), y))
    monkeypatch.setattr(_evaluate, "_FLUSH", 100)
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
    from flatcore import _evaluate

    monkeypatch.setattr(_evaluate, "_FLUSH", 100)
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
    assert "The run was interrupted" in (tmp_path / "report.html").read_text()

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


BAD = {
    "no module": ({"model": lambda x: x}, TypeError, r"model must be a torch\.nn\.Module, got builtins\.function"),
    "empty": ({"loader": []}, ValueError, r"at least one batch, got an empty one \(or one that was used up before\)"),
    "no rows": ({"loader": [(torch.zeros(0, 6), torch.zeros(0).long())]}, ValueError, "at least one row"),
    "ignored alone": ({"loader": [(torch.zeros(2, 6), torch.full((2,), -100))]}, ValueError, "at least one row"),
    "a tensor": ({"loader": [torch.zeros(2, 6)]}, TypeError, r"pairs \(inputs, target\), got a Tensor as batch 0"),
    "a dictionary": ({"loader": [{"x": 1, "y": 2}]}, TypeError, "got a dict of 2 as batch 0"),
    "three": ({"loader": [(1, 2, 3)]}, TypeError, "got a tuple of 3 as batch 0"),
    "arrays": ({"loader": [(np.zeros((2, 6)), np.zeros(2))]}, TypeError, "got inputs of type ndarray in batch 0"),
    "soft": ({"loader": [(torch.zeros(2, 6), torch.zeros(2))]}, TypeError, "integer class labels as target, got"),
    "label": ({"loader": [(torch.zeros(2, 6), torch.tensor([0, C]))]}, ValueError, "target"),
    "device": ({"device": "meta"}, ValueError, r"on device meta, got one on cpu: move it with model.to\('meta'\)"),
    "no device": ({"device": "tpu9"}, ValueError, "device must name a torch device, got 'tpu9'"),
    "head": ({"head": "nope"}, ValueError, "head must name a module of the model, got 'nope'"),
    "temperature": ({"temperature": 0}, ValueError, "temperature must be finite and above 0"),
    "rows": ({"rows": 3}, TypeError, "rows must be True, False or a path, got int"),
    "progress": ({"progress": "yes"}, TypeError, "progress must be True or False"),
    "norms": ({"input_gradient_norms": 2}, TypeError, "input_gradient_norms must be True or False"),
    "folder": ({"rows": "/nowhere/rows.csv"}, OSError, "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    changes, error, words = BAD[case]
    with pytest.raises(error, match=words):
        flatcore.evaluate(**{"model": network(), "loader": loader(*data(10))} | changes)


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
    distributed.destroy_process_group()
"""


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
    from flatcore._report import number

    for value in (1.0, 0.5, 123.0, 9.999e-4, 9.995e9, 1e300, 3e-200):
        assert float(number(math.log(value))) == pytest.approx(value, rel=6e-3)
    assert (number(-math.inf), number(math.inf), number(math.nan)) == ("0", "inf", "NaN")
    assert re.fullmatch(r"\d\.\d\de-435", number(-1000.0))
