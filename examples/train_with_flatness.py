"""Train a small network with cross-entropy + lambda * log(1 + kappa), for lambda above, at and below 0.

kappa is the batch's relative flatness (the paper's relative sharpness: larger is sharper). log(1 + kappa), formed from
log kappa, is kappa where it is small, so that it is bounded below, and its log where it is large, so that a negative
lambda does not run away at once. ``flatcore.Probe`` finds the head and captures its features;
``flatcore.metrics.RelativeFlatness`` follows the measure on the test images.

    python examples/train_with_flatness.py            Fashion-MNIST, two seeds (minutes)
    python examples/train_with_flatness.py --quick    scikit-learn's digits, one seed (seconds)

Writes train_with_flatness.csv and train_with_flatness.png, and prints a table.
Exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from pathlib import Path

try:
    import torch
    from image_data import FASHION_MNIST, Data, choose, network, threads
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor, nn
    from tqdm import tqdm

    import flatcore
    from flatcore.metrics import RelativeFlatness
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"train_with_flatness: {(error.name or 'a package').partition('.')[0]} cannot be imported ({error}); "
        "pip install -c constraints.txt '.[examples]' brings what this example needs."
    )

LAMBDAS = (-0.03, 0.0, 0.03)
EPOCHS = 4
QUICK_EPOCHS = 12  # of the digits, which have 1,257 training images
TIMED_STEPS = 60
COLOURS = ("#D55E00", "0.35", "#0072B2", "#009E73", "#CC79A7")


class DivergedError(RuntimeError):
    """The loss left the finite numbers."""


def loss_of(model: nn.Module, probe: flatcore.Probe, images: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Cross-entropy + weight * log(1 + kappa), kappa the relative flatness of the batch."""
    loss = nn.functional.cross_entropy(model(images), labels)
    if weight:
        loss = loss + weight * nn.functional.softplus(probe.relative_flatness(log=True))
    return loss


def evaluated(model: nn.Module, probe: flatcore.Probe, data: Data) -> dict[str, float]:
    """Accuracy on the test images, the log of their mean flatness and of its median, the share of the heaviest 1 %."""
    model.eval()
    metric, right = RelativeFlatness(log=True), 0
    with torch.no_grad():
        for images, labels in zip(data.test_images.split(500), data.test_labels.split(500), strict=True):
            right += (model(images).argmax(dim=1) == labels).sum().item()
            metric.update(probe.features, probe.head.weight, linear_bias=probe.head.bias)
    model.train()
    return {
        "accuracy": right / len(data.test_labels),
        "log_flatness": metric.compute().item(),
        "log_median": metric.median().item(),
        "heaviest_share": metric.heaviest_share().item(),
    }


def train(data: Data, weight: float, seed: int, epochs: int, bar: tqdm) -> list[dict[str, float]]:
    """Train with Adam; return one row per epoch.

    Raises:
        DivergedError: the loss of a batch is not finite.
    """
    rows = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(data.train_images.shape[-1])
        optimiser = torch.optim.Adam(model.parameters())
        with flatcore.Probe(model) as probe:
            for epoch in range(1, epochs + 1):
                for batch in torch.randperm(len(data.train_labels)).split(data.batch):
                    loss = loss_of(model, probe, data.train_images[batch], data.train_labels[batch], weight)
                    if not math.isfinite(loss.item()):
                        raise DivergedError(
                            f"with lambda = {weight:g} the loss became {loss.item()} in epoch {epoch}: take a smaller one"
                        )
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    bar.update()
                rows.append({"lambda": weight, "seed": seed, "epoch": epoch} | evaluated(model, probe, data))
    return rows


def cost(data: Data, seed: int) -> tuple[float, float]:
    """Median seconds of a training step without and with the regulariser, the two in turn on the same batches."""
    times: dict[float, list[float]] = {0.0: [], LAMBDAS[-1]: []}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(data.train_images.shape[-1])
        optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
        with flatcore.Probe(model) as probe:
            for step in range(TIMED_STEPS):
                batch = slice(0, data.batch) if step % 2 else slice(data.batch, 2 * data.batch)
                for weight, taken in times.items():
                    start = time.perf_counter()
                    loss = loss_of(model, probe, data.train_images[batch], data.train_labels[batch], weight)
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    taken.append(time.perf_counter() - start)
    without, with_it = (statistics.median(taken[4:]) for taken in times.values())
    return without, with_it


def _mean(rows: list[dict[str, float]], name: str, weight: float, epoch: int) -> tuple[float, float]:
    """Mean over the seeds, and half their range."""
    values = [row[name] for row in rows if row["lambda"] == weight and row["epoch"] == epoch]
    return statistics.fmean(values), (max(values) - min(values)) / 2


def table(rows: list[dict[str, float]], lambdas: list[float], epochs: int) -> Table:
    """The last epoch of each lambda."""
    found = Table(
        title="Test images after the last epoch:\nmean over the seeds, ± half their range", title_justify="left",
        title_style="", box=box.SIMPLE, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for heading in ("lambda", "accuracy", "log mean\nflatness", "log median\nflatness", "heaviest 1 %\nhold"):
        found.add_column(heading, justify="right")
    for weight in lambdas:
        cells = [
            f"{mean:{form}} ± {spread:{form}}"
            for name, form in (("accuracy", ".4f"), ("log_flatness", ".2f"), ("log_median", ".2f"))
            for mean, spread in [_mean(rows, name, weight, epochs)]
        ]
        found.add_row(f"{weight:g}", *cells, f"{100 * _mean(rows, 'heaviest_share', weight, epochs)[0]:.0f} %")
    return found


def picture(data: Data, rows: list[dict[str, float]], lambdas: list[float], epochs: int) -> Figure:
    """Flatness and accuracy over the epochs: a thin line per seed, a thick one for their mean."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    flatness, accuracy = figure.subplots(1, 2)
    steps = range(1, epochs + 1)
    for weight, colour in zip(lambdas, COLOURS, strict=False):
        for axes, name in ((flatness, "log_flatness"), (accuracy, "accuracy")):
            for seed in {row["seed"] for row in rows}:
                line = [row[name] for row in rows if row["lambda"] == weight and row["seed"] == seed]
                axes.plot(steps, line, color=colour, lw=0.8, alpha=0.6)
            means = [_mean(rows, name, weight, epoch)[0] for epoch in steps]
            axes.plot(steps, means, color=colour, lw=2.2, marker="o", ms=4, label=rf"$\lambda$ = {weight:g}")
    flatness.set_title("relative flatness of the head (larger: sharper)")
    flatness.set_ylabel(r"$\log$ of the mean over test images")
    accuracy.set_title("accuracy on test images")
    for axes in (flatness, accuracy):
        axes.set_xlabel("epoch")
        axes.set_xticks(list(steps) if epochs <= 12 else list(steps)[:: max(epochs // 8, 1)])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(rf"cross-entropy + $\lambda\,\log(1 + \kappa)$ on {data.name}", fontsize=13)
    return figure


def run(out: Path, folder: Path | None, lambdas: list[float], seeds: int, epochs: int | None, quick: bool) -> None:
    """Train each lambda with each seed, write the files into ``out`` and print the table.

    Raises:
        OSError: A file of the data set cannot be read, or ``out`` or a file in it cannot be written.
        DivergedError: A loss is not finite.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    data = choose(folder, quick, seed=0)
    small = data.train_images.shape[-1] < 16
    epochs = epochs or (QUICK_EPOCHS if small else EPOCHS)
    rows: list[dict[str, float]] = []
    start = time.perf_counter()
    # batches of digits are too small to share: threads would spend the time waiting for one another
    with threads(1 if small else torch.get_num_threads()):
        steps = len(lambdas) * seeds * epochs * -(-len(data.train_labels) // data.batch)
        # disable=None: no bar where stderr is no terminal
        with tqdm(total=steps, desc="training", unit=" steps", disable=None) as bar:
            for weight in lambdas:
                for seed in range(seeds):
                    bar.set_postfix_str(f"lambda {weight:g}, seed {seed}", refresh=False)
                    rows += train(data, weight, seed, epochs, bar)
        seconds = time.perf_counter() - start
        without, with_it = cost(data, seed=0)
    with (out / "train_with_flatness.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture(data, rows, lambdas, epochs).savefig(out / "train_with_flatness.png", dpi=100)
    print(f"{data.name}: {len(lambdas)} x {seeds} trainings of {epochs} epochs in {seconds:.0f} s, "
          f"flatcore {flatcore.__version__}.")  # fmt: skip
    Console(highlight=False).print(table(rows, lambdas, epochs))
    print(f"A step takes {1e3 * without:.2f} ms without the regulariser and {1e3 * with_it:.2f} ms with it: "
          f"{100 * (with_it / without - 1):+.1f} %.")  # fmt: skip
    print(f"Values: {out / 'train_with_flatness.csv'}\nPicture: {out / 'train_with_flatness.png'}")


def _natural(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 10000, got {text!r}")
    return int(text)


def _lambdas(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)) or len(set(values)) < len(values) or len(values) > len(COLOURS):
        raise argparse.ArgumentTypeError(
            f"must be up to {len(COLOURS)} different finite numbers, separated by commas, got {text!r}"
        )
    return sorted(values)


def main(argv: list[str] | None = None) -> int:
    """Run the example and return its exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="train_with_flatness.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("flatcore-demo"), metavar="DIR",
                        help="folder for the files, made if absent (default: %(default)s)")  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR",
                        help=f"Fashion-MNIST's four .gz files (default: {FASHION_MNIST}, else the digits)")  # fmt: skip
    parser.add_argument("--lambdas", type=_lambdas, default=list(LAMBDAS), metavar="L,L,...",
                        help="weights of the regulariser, as --lambdas=-0.03,0,0.03 (default)")  # fmt: skip
    parser.add_argument("--seeds", type=_natural, default=None, metavar="N",
                        help="trainings of each lambda (default: 2, 1 with --quick)")  # fmt: skip
    parser.add_argument("--epochs", type=_natural, default=None, metavar="N",
                        help=f"epochs of each training (default: {EPOCHS}, for the digits {QUICK_EPOCHS})")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="digits, one seed: seconds")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed what there is to say
        return int(stop.code or 0)
    seeds = arguments.seeds or (1 if arguments.quick else 2)
    try:
        run(arguments.out, arguments.data, arguments.lambdas, seeds, arguments.epochs, arguments.quick)
    except KeyboardInterrupt:
        print("train_with_flatness: interrupted.", file=sys.stderr)
        return 130
    except DivergedError as error:
        print(f"train_with_flatness: {error}.", file=sys.stderr)
        return 1
    except OSError as error:
        what = error.filename or "the files"
        print(f"train_with_flatness: cannot use {what}: {error.strerror or error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
