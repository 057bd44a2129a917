"""evaluate's report as files, a page and pictures, after an interrupt too; in a browser.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import N, data, loader, network
from torch import Tensor, nn

import flatcore


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


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


# ----------------------------------------------------------------------------------------------------- numbers as text
def test_numbers_as_text() -> None:
    from flatcore._report.report import number

    for value in (1.0, 0.5, 123.0, 9.999e-4, 9.995e9, 1e300, 3e-200):
        assert float(number(math.log(value))) == pytest.approx(value, rel=6e-3)
    assert (number(-math.inf), number(math.inf), number(math.nan)) == ("0", "inf", "NaN")
    assert re.fullmatch(r"\d\.\d\de-435", number(-1000.0))
