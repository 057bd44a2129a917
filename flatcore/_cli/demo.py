"""The demo: a first report on real data, from training to a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__, evaluate, head_metrics, show_config
from .commands import check_writable

_TEST_IMAGES = 540  # of 1797
_GAP = 15.0  # the top-two gap from which float32's 1 - p has lost its last good digits
_SHARE = 0.2  # of the test images must lie above it before the training ends

_MEASURED = {
    "loss": "loss",
    "Hessian trace": "hessian_trace",
    "layerwise flatness": "layerwise",
    "neuronwise flatness": "neuronwise",
    "feature gradient norm": "feature_gradient_norm",
}
"""Rows of the table, and the columns of the CSV file that they summarise."""
_NAIVE = {
    "trace by sum p (1 - p)": ("naive_trace_sum_p_1_minus_p", "hessian_trace"),
    "trace by 1 - sum p^2": ("naive_trace_1_minus_sum_p2", "hessian_trace"),
    "gradient by p - onehot": ("naive_feature_gradient_norm", "feature_gradient_norm"),
}
"""The usual float32 formulas: their columns, and the exact columns that they are held against."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: as fast for batches of 64 (0.8 s), and not 20 s when others keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Trained(NamedTuple):
    """A trained network as its head sees the test images."""

    features: Tensor  # (N, D)
    linear_weight: Tensor  # (C, D)
    linear_bias: Tensor  # (C,)
    target: Tensor  # (N,)
    epochs: int
    confident: int  # test images with a gap above _GAP
    model: nn.Module
    images: Tensor  # (N, 64)


def train(seed: int, epochs_max: int) -> Trained:
    """Train a 64-128-64-10 network on the digits until ``_SHARE`` of the test images have a gap above ``_GAP``.

    The seed decides the split, the initial weights and the batches; the caller's random state is left as it was.
    """
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        test, rest = torch.randperm(len(labels)).split([_TEST_IMAGES, len(labels) - _TEST_IMAGES])
        body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        head = nn.Linear(64, 10)
        optimiser = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)
        needed = math.ceil(_SHARE * _TEST_IMAGES)
        # The bar shows what the training waits for: the gap that a fifth of the test images exceed, growing to 15.
        # disable=None: no bar where stderr is no terminal.
        with tqdm(
            total=_GAP, desc="training", disable=None,
            bar_format="{desc} {percentage:3.0f}%|{bar}| gap of the surest fifth {n:.1f} of {total:.0f}{postfix}",
        ) as bar:  # fmt: skip
            for epoch in range(1, epochs_max + 1):
                for batch in rest[torch.randperm(len(rest))].split(64):
                    optimiser.zero_grad()
                    nn.functional.cross_entropy(head(body(images[batch])), labels[batch]).backward()
                    optimiser.step()
                with torch.no_grad():
                    features = body(images[test])
                    top = head(features).topk(2).values
                gap = top[:, 0] - top[:, 1]
                surest = gap.topk(needed).values[-1].item()
                bar.set_postfix_str(f"epoch {epoch}", refresh=False)
                bar.update(min(surest, _GAP) - bar.n)
                if surest > _GAP:
                    break
    return Trained(
        features, head.weight.detach(), head.bias.detach(), labels[test], epoch, int((gap > _GAP).sum()),
        nn.Sequential(body, head), images[test],
    )  # fmt: skip


def measure(trained: Trained) -> dict[str, np.ndarray]:
    """Per-image columns (N,): flatcore's fields, their linear values, and what the usual float32 formulas say.

    Linear values are float64 exponentials of the logs: float32 would end at 1e-38.
    """
    phi, w, b, y, *_ = trained
    metrics = head_metrics(phi, w, y, linear_bias=b)
    columns = {"image": np.arange(len(y)), "target": y.numpy(), **{k: v.numpy() for k, v in metrics._asdict().items()}}
    columns["correct"] = columns["prediction"] == columns["target"]
    for name in ("one_minus_confidence", "hessian_trace", "layerwise", "neuronwise", "feature_gradient_norm"):
        columns[name] = np.exp(columns[f"log_{name}"].astype(np.float64))

    p = torch.softmax(phi @ w.T + b, dim=1)
    square = (phi * phi).sum(dim=1)
    columns["naive_trace_sum_p_1_minus_p"] = (square * (p * (1 - p)).sum(dim=1)).numpy()
    columns["naive_trace_1_minus_sum_p2"] = (square * (1 - (p * p).sum(dim=1))).numpy()
    columns["naive_feature_gradient_norm"] = ((p - nn.functional.one_hot(y, len(b))) @ w).norm(dim=1).numpy()
    return columns


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))  # 75 columns at most, so that 80 hold it
    for heading in headings:
        # fold: in a narrow terminal a number is broken, but never cut
        table.add_column(
            heading, justify="left" if heading in ("prediction", headings[0]) else "right", overflow="fold"
        )
    return table


def _measured_table(columns: dict[str, np.ndarray]) -> Table:
    table = _table("per image", "prediction", "mean", "median", "5 %", "95 %")
    for title, name in _MEASURED.items():
        for group, rows in (("correct", columns["correct"]), ("wrong", ~columns["correct"])):
            values = columns[name][rows].astype(np.float64)
            cells = [values.mean(), *np.quantile(values, [0.5, 0.05, 0.95])] if len(values) else []
            table.add_row(title, group, *([f"{x:.2e}" for x in cells] or ["none"] * 4))
            title = ""
    return table


def _naive_table(columns: dict[str, np.ndarray]) -> Table:
    table = _table("usual formula in float32", "off by > 1 %", "share", "half", "zero or less")
    for title, (naive, exact) in _NAIVE.items():
        ratio = columns[naive] / columns[exact]
        wrong = np.abs(ratio - 1) > 0.01
        half, zero = np.abs(ratio / 0.5 - 1) <= 0.01, ratio <= 0
        table.add_row(title, str(wrong.sum()), f"{100 * wrong.mean():.1f} %", str(half.sum()), str(zero.sum()))
    return table


def _write_csv(path: Path, columns: dict[str, np.ndarray]) -> None:
    first = ["image", "target", "prediction", "correct"]
    names = first + [name for name in columns if name not in first]
    # str() of a NumPy number has the fewest digits that read back as the same number
    texts = [columns[name].astype(np.int64 if name == "correct" else columns[name].dtype).astype(str) for name in names]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(zip(*texts, strict=True))


def picture(columns: dict[str, np.ndarray]) -> Figure:
    """Flatness against 1 - confidence, and below it what the usual formulas return of the truth."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    exact, naive = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    x, correct = columns["one_minus_confidence"], columns["correct"]
    exact.set_title(f"Flatness of the last layer on {len(x)} test digits", fontsize=14)
    for group, rows, style in (
        ("correct", correct, {"color": "#0072B2", "marker": "o", "s": 18, "alpha": 0.55, "linewidths": 0}),
        ("wrong", ~correct, {"color": "#D55E00", "marker": "D", "s": 36, "edgecolors": "black", "linewidths": 0.6}),
    ):
        exact.scatter(x[rows], columns["layerwise"][rows], label=f"{group} ({rows.sum()})", **style)
    exact.set_yscale("log")
    exact.set_ylabel("relative flatness (nats)\n" r"$\Vert W\Vert_F^2\;\mathrm{Tr}\,H$, larger is sharper")

    for label, name, style in (
        (
            r"$1-\sum p^2$",
            "naive_trace_1_minus_sum_p2",
            {"color": "#CC79A7", "marker": "x", "s": 26, "linewidths": 1.2},
        ),
        (
            r"$\sum p\,(1-p)$",
            "naive_trace_sum_p_1_minus_p",
            {"color": "black", "marker": "o", "s": 14, "linewidths": 0},
        ),
    ):
        # 1 - sum p^2 can also round to -6e-8, hundreds of times the truth: such points stand on the rim
        ratio = np.clip(columns[name] / columns["hessian_trace"], -0.15, 2.15)
        naive.scatter(x, ratio, label=label, alpha=0.7, **style)
    naive.set_yticks([0, 0.5, 1, 2], ["zero", "half", "right", "double"])
    naive.set_ylim(-0.2, 2.2)
    naive.set_ylabel("usual float32 formula\nover the truth")
    naive.set_xscale("log")
    naive.invert_xaxis()
    naive.set_xlabel(r"1 $-$ confidence  (more confident $\rightarrow$)")
    for axes, title, corner in ((exact, "prediction", "best"), (naive, "float32 formula", "lower left")):
        axes.grid(alpha=0.3)
        axes.legend(loc=corner, title=title, alignment="left", labelspacing=0.3)
        axes.xaxis.label.set_size(12)
        axes.yaxis.label.set_size(12)
    return figure


def run(out: Path, seed: int, epochs_max: int) -> None:
    """Train, measure, write ``digits.csv``, ``digits.png`` and ``digits.html`` into ``out``, and print the tables.

    Raises:
        OSError: ``out`` or a file in it cannot be written; known before the training starts, except for a full disk.
    """
    # absolute(), not resolve(): the path as the user knows it, symbolic links kept
    table_path, picture_path, page_path = (out.absolute() / f"digits.{kind}" for kind in ("csv", "png", "html"))
    for path in (table_path, picture_path, page_path):
        check_writable(path)

    start = time.perf_counter()
    trained = train(seed, epochs_max)
    seconds = time.perf_counter() - start
    columns = measure(trained)
    _write_csv(table_path, columns)
    picture(columns).savefig(picture_path, dpi=150)
    loader = [(trained.images, trained.target)]
    report = evaluate(trained.model, loader, input_gradient_norms=True, progress=False)
    report.to_html(page_path, title="Flatness on handwritten digits")

    images = len(trained.target)
    found = (
        f"{trained.confident} of {images} test images ({100 * trained.confident / images:.1f} %) "
        f"have a top-two logit gap above {_GAP:.0f}"
    )
    spent = f"{trained.epochs} epoch{'s' * (trained.epochs != 1)} in {seconds:.1f} s"
    if trained.confident >= _SHARE * images:
        print(f"Trained for {spent}: {found}.")
    else:
        print(f"--epochs-max ended the training after {spent}: {found}, short of the {100 * _SHARE:.0f} % aimed at.")
    config = show_config()
    kernels = f"compiled kernels, {config['cpu_target']}" if config["cpu_backend"] == "native" else "PyTorch reference"
    right = int(columns["correct"].sum())
    print(f"Measured by flatcore {__version__} ({kernels}): accuracy {100 * right / images:.1f} %, "
          f"{right} predictions correct, {images - right} wrong.")  # fmt: skip
    console = Console(highlight=False)
    console.print(_measured_table(columns))
    print("A few images carry the mean; the median is the typical one.")
    console.print(_naive_table(columns))
    print(f"Values per image: {table_path}\nPicture: {picture_path}\nReport: {page_path}")
