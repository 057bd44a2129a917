"""The demo from end to end, its numbers held against formulas written out here in float64."""

from __future__ import annotations

import csv
import fcntl
import os
import pty
import re
import statistics
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import flatcore
from flatcore.__main__ import main
from flatcore._check.tolerance import assert_within, logit_error, tolerance
from flatcore._cli import demo

ROOT = Path(__file__).parents[1]
IMAGES = 540
SEED = 3


class Outcome(NamedTuple):
    out: Path
    text: str
    table: dict[str, np.ndarray]
    trained: demo.Trained


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One run of the command; and the same network again, trained from the same seed."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        text: list[str] = []
        patch.setattr(sys.stdout, "write", lambda part: text.append(part) or len(part))
        assert main(["demo", "--out", str(out), "--seed", str(SEED)]) == 0
    with (out / "digits.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    return Outcome(out, "".join(text), table, demo.train(SEED, 500))


def test_csv_columns_and_rows(outcome: Outcome) -> None:
    table = outcome.table
    assert list(table) == [
        "image", "target", "prediction", "correct", "confidence", "margin", "log_one_minus_confidence",
        "log_feature_norm", "log_hessian_trace", "log_layerwise", "log_neuronwise", "loss", "log_feature_gradient_norm",
        "one_minus_confidence", "hessian_trace", "layerwise", "neuronwise", "feature_gradient_norm",
        "naive_trace_sum_p_1_minus_p", "naive_trace_1_minus_sum_p2", "naive_feature_gradient_norm",
    ]  # fmt: skip
    assert table["image"].tolist() == list(range(IMAGES))
    assert all(np.isfinite(column).all() for column in table.values())
    assert set(table["target"]) == set(range(10))
    assert (table["correct"] == (table["prediction"] == table["target"])).all()


def test_training_goes_on_until_a_fifth_is_confident(outcome: Outcome) -> None:
    confident = int((outcome.table["margin"] > 15).sum())
    assert confident >= IMAGES / 5
    assert f"{confident} of {IMAGES} test images" in outcome.text
    before = demo.train(SEED, outcome.trained.epochs - 1)
    assert before.confident < IMAGES / 5, "the training went on after a fifth was confident"


def test_csv_holds_what_flatcore_returns(outcome: Outcome) -> None:
    phi, w, b, y, *_ = outcome.trained
    metrics = flatcore.head_metrics(phi, w, y, linear_bias=b)
    for name, values in metrics._asdict().items():
        # float32 written with the digits that read back as the same number
        assert (outcome.table[name].astype(values.numpy().dtype) == values.numpy()).all(), name


def test_csv_is_right(outcome: Outcome) -> None:
    """Sums of one sign over differences, float64: exact at these gaps, and none of flatcore's code."""
    phi, w, b, y = (x.double() if x.is_floating_point() else x for x in outcome.trained[:4])
    z = phi @ w.T + b
    p = torch.softmax(z, dim=1)
    top = z.argmax(dim=1, keepdim=True)
    pairs = p.unsqueeze(2) * p.unsqueeze(1) * (1 - torch.eye(10))  # p_j p_k, j != k
    square = phi.square().sum(dim=1)
    distance = (w.unsqueeze(1) - w).square().sum(dim=2)
    from_target = p.unsqueeze(2) * (w - w[y].unsqueeze(1))  # p_j (w_j - w_y)
    gradient = from_target.sum(dim=1).norm(dim=1)
    others = torch.ones_like(z).scatter_(1, y.unsqueeze(1), 0)
    truths = {
        "one_minus_confidence": p.scatter(1, top, 0).sum(dim=1),
        "hessian_trace": square * pairs.sum(dim=(1, 2)),
        "layerwise": w.square().sum() * square * pairs.sum(dim=(1, 2)),
        "neuronwise": square * (pairs * distance).sum(dim=(1, 2)) / 2,
        "loss": ((z - z.gather(1, y.unsqueeze(1))).exp() * others).sum(dim=1).log1p(),
        "feature_gradient_norm": gradient,
    }
    moved = logit_error(*outcome.trained[:3], temperature=1.0, dtype=torch.float32)
    condition = (from_target.norm(dim=2).sum(dim=1) / gradient).numpy()
    for name, truth in truths.items():
        bound = tolerance(
            name, truth.numpy(), truth.log().numpy(), torch.float32, logit_error=moved,
            condition=condition if name == "feature_gradient_norm" else 1.0,
        )  # fmt: skip
        assert_within(name, outcome.table[name], truth.numpy(), bound)


def test_naive_columns_show_half_and_zero(outcome: Outcome) -> None:
    """From a gap of 20 on, 1 - p is below 9 exp(-20) = 1.9e-8 < 2^-25, so that p rounds to 1."""
    table = outcome.table
    rows = table["margin"] > 20
    assert rows.any()
    assert (np.abs(table["naive_trace_sum_p_1_minus_p"] / table["hessian_trace"] - 0.5)[rows] < 1e-3).all()
    assert (table["naive_trace_1_minus_sum_p2"][rows] == 0).all()
    # below 5, 1 - p is above 6e-3: the usual formulas are right there, or these columns are something else
    for title, (naive, exact) in demo._NAIVE.items():
        assert (np.abs(table[naive] / table[exact] - 1)[table["margin"] < 5] < 1e-3).all(), title


def test_printed_tables_summarise_the_csv(outcome: Outcome) -> None:
    table, lines = outcome.table, [line.split() for line in outcome.text.splitlines()]
    assert f"accuracy {100 * table['correct'].mean():.1f} %" in outcome.text
    groups = [
        line for line in lines if set(line) & {"correct", "wrong"} and re.fullmatch(r"\d\.\d\de[+-]\d\d", line[-1])
    ]
    expected = []
    for name in ("loss", "hessian_trace", "layerwise", "neuronwise", "feature_gradient_norm"):
        for correct in (1, 0):
            values = table[name][table["correct"] == correct].tolist()
            low, *_, high = statistics.quantiles(values, n=20, method="inclusive")
            expected.append([statistics.fmean(values), statistics.median(values), low, high])
    assert len(groups) == len(expected)
    for line, numbers in zip(groups, expected, strict=True):
        # half a unit of the third digit printed, and the float32 rounding of what the file holds
        np.testing.assert_allclose([float(x) for x in line[-4:]], numbers, rtol=5.01e-3)
    for words, naive, exact in (
        ("trace by sum p (1 - p)", "naive_trace_sum_p_1_minus_p", "hessian_trace"),
        ("trace by 1 - sum p^2", "naive_trace_1_minus_sum_p2", "hessian_trace"),
        ("gradient by p - onehot", "naive_feature_gradient_norm", "feature_gradient_norm"),
    ):
        ratio = table[naive] / table[exact]
        (line,) = (line for line in lines if line[: len(words.split())] == words.split())
        wrong, share, _, _, zero = line[len(words.split()) :]
        assert int(wrong) == (abs(ratio - 1) > 0.01).sum() > 0
        assert float(share) == round(100 * int(wrong) / IMAGES, 1)
        assert int(zero) == (ratio <= 0).sum()


def test_output_is_plain_and_names_the_files(outcome: Outcome) -> None:
    assert "\x1b" not in outcome.text
    assert f"Values per image: {outcome.out / 'digits.csv'}\n" in outcome.text
    assert f"Picture: {outcome.out / 'digits.png'}\n" in outcome.text
    assert outcome.text.endswith(f"Report: {outcome.out / 'digits.html'}\n")
    page = (outcome.out / "digits.html").read_text()
    assert f"<strong>{IMAGES}</strong> rows" in page
    assert page.count("data:image/png;base64,") == 4


def test_picture_file(outcome: Outcome) -> None:
    pixels = imread(outcome.out / "digits.png")[..., :3]
    assert pixels.shape == (1050, 1200, 3)
    for half in np.array_split(pixels, 2):
        ink = (half < 0.99).any(axis=2).mean()
        assert 0.01 < ink < 0.5
    wrong = (abs(pixels - to_rgb("#D55E00")) < 0.01).all(axis=2)
    # opaque diamonds, each of 100 pixels and more; a few hide one another
    assert wrong.sum() > 50 * (outcome.table["correct"] == 0).sum()


def test_picture_shows_every_image_down_to_1e_40() -> None:
    trained = demo.train(SEED, 20)
    columns = demo.measure(trained._replace(features=trained.features * 8))
    columns = {name: values[columns["one_minus_confidence"] > 1e-45] for name, values in columns.items()}
    assert columns["one_minus_confidence"].min() < 1e-40
    figure = demo.picture(columns)
    figure.canvas.draw()
    exact, naive = figure.axes
    drawn = np.concatenate([np.asarray(points.get_offsets()) for points in exact.collections])
    truth = np.column_stack([columns["one_minus_confidence"], columns["layerwise"]])
    np.testing.assert_array_equal(drawn[np.lexsort(drawn.T)], truth[np.lexsort(truth.T)])
    for axes in (exact, naive):
        for points in axes.collections:
            offsets = np.asarray(points.get_offsets())
            assert np.isfinite(offsets).all()
            for values, limits in zip(offsets.T, (axes.get_xlim(), axes.get_ylim()), strict=True):
                assert min(limits) < values.min() <= values.max() < max(limits)
    assert (exact.get_xscale(), exact.get_yscale()) == ("log", "log")


def test_epoch_limit_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path), "--epochs-max", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("--epochs-max ended the training after 1 epoch in ")
    assert "short of the 20 % aimed at" in text


def test_training_leaves_the_process_as_it_was() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = demo.train(SEED, 1), demo.train(SEED + 1, 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(first.linear_weight, second.linear_weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.exhaustive
def test_progress_bar_on_a_terminal_only(tmp_path: Path) -> None:
    """Standard error on a pseudo-terminal has the bar; standard output into a pipe has no control codes."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # a new one has no columns
    process = subprocess.Popen(
        [sys.executable, "-m", "flatcore", "demo", "--epochs-max", "3"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(theirs)
    bar = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        bar += part
    os.close(ours)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    assert b"gap of the surest fifth" in bar
    assert b"epoch 3" in bar
    assert b"\x1b" not in text
    assert f"Picture: {tmp_path / 'flatcore-demo' / 'digits.png'}\n".encode() in text
    assert sorted(path.name for path in (tmp_path / "flatcore-demo").iterdir()) == [
        "digits.csv", "digits.html", "digits.png",
    ]  # fmt: skip
