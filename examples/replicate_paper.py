"""The experiments of arXiv 2510.14231 at the size of a small CNN, trained normally and adversarially, three seeds.

    python examples/replicate_paper.py            Fashion-MNIST (half an hour; later runs load the weights: minutes)
    python examples/replicate_paper.py --quick    scikit-learn's digits, one seed, 100 images (a minute)

Scaling of the head under attack, loss increase under a weak attack, transfer, flatness along an attack, the width of the
basin after adversarial training, detection, and the bounds. Writes the weights, replication.json and a picture for each;
prints a summary. docs/replication.md sets what came out beside the paper's figures.
Exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch
    from image_data import FASHION_MNIST, Data, choose, trained
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from scipy.stats import spearmanr
    from torch import Tensor, nn

    import flatcore
    from flatcore import robustness
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"replicate_paper: {(error.name or 'a package').partition('.')[0]} cannot be imported ({error}); "
        "pip install -c constraints.txt '.[examples]' brings what this example needs."
    )

SCALES = (0.25, 1.0, 5.0, 10.0, 50.0, 100.0)
WEAK = {"norm": 2, "eps": 0.025, "step": 0.001, "steps": 25}  # the paper's weak attack
WEAK_SCALES = (0.25, 1.0, 10.0)
BASIN_STEP = 0.002  # of the l-inf attack whose steps until the flip are counted
BASIN_STEPS = 200
BATCH = 250
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.45"


class Networks(NamedTuple):
    """What is attacked: images and labels, and the networks of one seed."""

    data: Data
    images: Tensor
    labels: Tensor
    normal: nn.Sequential
    robust: nn.Sequential  # adversarially trained

    @property
    def loader(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of the images."""
        return list(zip(self.images.split(BATCH), self.labels.split(BATCH), strict=True))

    @property
    def strong(self) -> dict[str, Any]:
        """PGD in the l-inf ball that the robust network was trained in: 10 steps of a quarter of eps, no random start."""
        eps = self.data.epsilon_linf
        return {"norm": math.inf, "eps": eps, "step": eps / 4, "steps": 10}


def networks(data: Data, seed: int, images: int, out: Path) -> Networks:
    """Train, or load from ``out``: a network on clean images, and one on images attacked by 7 random-start steps."""
    attack = {
        "norm": math.inf,
        "eps": data.epsilon_linf,
        "step": data.epsilon_linf / 4,
        "steps": 7,
        "random_start": True,
    }

    def perturb(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return robustness.pgd(model, x, y, **attack)

    return Networks(
        data, data.test_images[:images], data.test_labels[:images], trained(data, seed, out),
        trained(data, seed, out, perturb, "robust-cnn"),
    )  # fmt: skip


def scaling(net: Networks) -> dict[str, Any]:
    """Robust accuracy over the scale of the head, usual and exact gradient."""
    rows = robustness.scaling_sweep(net.normal, net.loader, SCALES, **net.strong)
    found: dict[str, Any] = {"clean": rows[0].clean_accuracy}
    for kind in ("usual", "exact"):
        found[kind] = [row.robust_accuracy for row in rows if row.gradient == kind]
    return found


def loss_increase(net: Networks) -> dict[str, Any]:
    """The paper's weak l2 attack: who is right after it, and whether sharp inputs rise more."""
    found: dict[str, Any] = {}
    for name, model in (("normal", net.normal), ("robust", net.robust)):
        rows = robustness.scaling_sweep(model, net.loader, WEAK_SCALES, gradient="exact", **WEAK)
        path = robustness.attack_path(model, net.images, net.labels, chunk_size=BATCH, **WEAK)
        rise = path.loss[-1] - path.loss[0]
        right = path.correct[0]
        found[name] = {
            "clean_accuracy": rows[0].clean_accuracy,
            "robust_accuracy": [row.robust_accuracy for row in rows],
            "quantiles": [row.loss_increase._asdict() for row in rows],
            # of the right ones: a wrong one is flat and its loss rises all the same
            "rank_correlation_flatness": float(spearmanr(path.log_layerwise[0][right], rise[right]).statistic),
            "rank_correlation_confidence": float(spearmanr(path.confidence[0][right], rise[right]).statistic),
            "rise": rise.tolist(),
            "log_layerwise": path.log_layerwise[0].tolist(),
        }
    return found


def transfer(net: Networks, other: nn.Module) -> dict[str, float]:
    """Rates from scale 1 to scale 100 and back, to another seed, and between normal and adversarially trained."""

    def rates(models: dict[str, nn.Module], scales: tuple[float, ...]) -> dict[tuple, float]:
        rows = robustness.transfer(models, net.loader, scales, **net.strong)
        return {(r.source, r.source_scale, r.target, r.target_scale): r.rate for r in rows}

    across = rates({"a": net.normal}, (1.0, 100.0))
    between = rates({"normal": net.normal, "other": other, "robust": net.robust}, (1.0,))
    return {
        "scale 1 to 100": across["a", 1.0, "a", 100.0],
        "scale 100 to 1": across["a", 100.0, "a", 1.0],
        "to another seed": between["normal", 1.0, "other", 1.0],
        "normal to robust": between["normal", 1.0, "robust", 1.0],
        "robust to normal": between["robust", 1.0, "normal", 1.0],
    }


def valley(net: Networks) -> tuple[dict[str, Any], robustness.AttackPath]:
    """Flatness along the attack in small steps: whether it rises until the flip and falls behind it."""
    attack = net.strong | {"step": net.strong["eps"] / 20, "steps": 20}
    path = robustness.attack_path(net.normal, net.images, net.labels, chunk_size=BATCH, **attack)
    flip = path.flip_step
    rows = flip > 0
    values = path.log_layerwise[:, rows]
    peak = values.argmax(dim=0)
    return {
        "flipped": int(rows.sum()),
        "began_correct": int(path.correct[0].sum()),
        "peak_within_one_step_of_flip": ((peak - flip[rows]).abs() <= 1).double().mean().item(),
        "rises_before": (values.amax(dim=0) > values[0]).double().mean().item(),
        "falls_after": (values[-1] < values.amax(dim=0)).double().mean().item(),
        "ends_flatter_than_it_began": (values[-1] < values[0]).double().mean().item(),
        "median_log_start": values[0].median().item(),
        "median_log_peak": values.amax(dim=0).median().item(),
        "median_log_end": values[-1].median().item(),
    }, path


def basin(net: Networks) -> dict[str, Any]:
    """Steps of one size until the label flips, and the steps within which flatness is above half its peak."""
    found: dict[str, Any] = {}
    images, labels = net.images[:BATCH], net.labels[:BATCH]
    for name, model in (("normal", net.normal), ("robust", net.robust)):
        path = robustness.attack_path(model, images, labels, norm=math.inf, eps=1.0, step=BASIN_STEP, steps=BASIN_STEPS)
        right = path.correct[0]
        flip = path.flip_step[right].double()
        flip[flip < 0] = math.inf
        values = path.log_layerwise[:, right]
        ridge = (values > values.amax(dim=0) - math.log(2)).sum(dim=0).double()
        found[name] = {
            "median_steps_to_flip": flip.clamp_max(BASIN_STEPS + 1).median().item(),  # the last: not within BASIN_STEPS
            "not_flipped": int((flip == math.inf).sum()),
            "median_ridge": ridge.median().item(),
            "steps": [None if step == math.inf else step for step in flip.tolist()],
        }
    found["ratio"] = found["robust"]["median_steps_to_flip"] / found["normal"]["median_steps_to_flip"]
    found["ridge_ratio"] = found["robust"]["median_ridge"] / found["normal"]["median_ridge"]
    return found


def detection(net: Networks) -> dict[str, Any]:
    """A stump on flatness tells attacked images from clean ones, at several strengths of the attack."""
    found: dict[str, Any] = {}
    for name, model in (("normal", net.normal), ("robust", net.robust)):
        for factor in (0.25, 0.5, 1.0, 2.0, 3.0):
            eps = factor * net.strong["eps"]
            path = robustness.attack_path(
                model, net.images, net.labels, chunk_size=BATCH, **net.strong | {"eps": eps, "step": eps / 4}
            )
            right = path.correct[0]
            clean, hit = ({m: getattr(path, m)[k][right] for m in
                           ("log_hessian_trace", "log_layerwise", "log_neuronwise")} for k in (0, -1))  # fmt: skip
            stump = robustness.perturbation_detector(clean, hit)
            found[f"{name}, eps {eps:g}"] = {
                "accuracy": stump.accuracy, "interval": list(stump.interval), "feature": stump.feature,
                "perturbed_above": stump.perturbed_above, "samples": stump.samples,
                "flipped": (~path.correct[-1][right]).double().mean().item(),
            }  # fmt: skip
    return found


def lipschitz_bound(model: nn.Sequential, images: Tensor) -> float:
    """Upper bound of the features' Lipschitz constant in L2: the product over the layers before the head.

    A convolution's spectral norm is at most sqrt(largest sum of absolute values of a column times that of a row) of its
    matrix, both found by convolving ones with |K|; ReLU and non-overlapping max pooling stretch nothing.
    """
    bound, x = 1.0, torch.ones_like(images[:1], dtype=torch.float64)
    for layer in model[:-1]:
        if isinstance(layer, nn.Conv2d):
            kernel = layer.weight.detach().double().abs()
            rows = nn.functional.conv2d(torch.ones(1, kernel.shape[1], *x.shape[-2:], dtype=torch.float64), kernel,
                                        padding=layer.padding)  # fmt: skip
            columns = nn.functional.conv_transpose2d(torch.ones_like(rows), kernel, padding=layer.padding)
            bound *= math.sqrt(rows.max().item() * columns.max().item())
            x = rows
        elif isinstance(layer, nn.MaxPool2d):
            x = layer(x)
        elif isinstance(layer, nn.Linear):
            bound *= torch.linalg.matrix_norm(layer.weight.detach().double(), 2).item() * (1 + 1e-9)
    return bound


def bounds(net: Networks) -> dict[str, Any]:
    """Whether the bounds hold under attack, and how far they are from what the attack reaches."""
    found: dict[str, Any] = {}
    for name, model in (("normal", net.normal), ("robust", net.robust)):
        with torch.no_grad(), flatcore.Probe(model) as probe:
            model(net.images)
            head, features = probe.head, probe.features
        arguments = (features, head.weight, net.labels)
        options = {"linear_bias": head.bias}
        L = lipschitz_bound(model, net.images)
        random = torch.Generator().manual_seed(0)
        estimates = [
            robustness.lipschitz_lower_estimate(model, x, iterations=5, generator=random)
            for x in net.images.split(BATCH)
        ]
        low = torch.cat(estimates).max().item()
        rows = []
        for radius in (0.001, 0.01, 0.1):
            attack = {"norm": 2, "eps": radius, "step": radius / 4, "steps": 10}
            moved = torch.cat([robustness.pgd(model, x, y, **attack) for x, y in net.loader])
            with torch.no_grad():
                # float64: rises of 1e-8 drown in float32's rounding
                exact = [nn.functional.cross_entropy(_double(model)(x.double()), net.labels, reduction="none")
                         for x in (net.images, moved)]  # fmt: skip
            rise = exact[1] - exact[0]
            certified = robustness.loss_change_bound(*arguments, radius, lipschitz=L, **options)
            lowered = robustness.loss_change_bound(*arguments, radius, lipschitz=low, **options)
            paper = robustness.loss_change_bound(*arguments, radius, lipschitz=low, kind="paper", **options)
            rows.append({
                "radius": radius,
                "median_rise": rise.median().item(),
                "certified_violated": (rise > certified).double().mean().item(),
                "certified_over_rise": (certified / rise).median().item(),
                "lower_estimate_violated": (rise > lowered).double().mean().item(),
                "lower_estimate_over_rise": (lowered / rise).median().item(),
                "paper_violated": (rise > paper).double().mean().item(),
                "paper_over_rise": (paper / rise).median().item(),
            })  # fmt: skip
        margin = robustness.margin_radius(*arguments, lipschitz=L, **options)
        found[name] = {
            "lipschitz_upper": L, "lipschitz_lower_estimate": low, "attacks": rows,
            "median_margin_radius": margin.median().item(),
            "median_loss_change_radius": robustness.loss_change_radius(
                *arguments, math.log(10), lipschitz=L, **options
            ).median().item(),
        }  # fmt: skip
    return found


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _band(
    axes: Any, x: tuple[float, ...], lines: list[list[float]], colour: str, label: str, marker: str = "o"
) -> None:
    low, middle, high = ([f(column) for column in zip(*lines, strict=True)] for f in (min, statistics.fmean, max))
    axes.fill_between(x, low, high, color=colour, alpha=0.25, lw=0)
    axes.plot(x, middle, color=colour, marker=marker, label=label)


def pictures(results: list[dict[str, Any]], paths: list[robustness.AttackPath]) -> dict[str, Figure]:
    """One picture for an experiment that has something to see, by its name."""
    drawn = {}
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    _band(axes, SCALES, [r["scaling"]["usual"] for r in results], RED, "attacked, usual gradient")
    _band(axes, SCALES, [r["scaling"]["exact"] for r in results], BLUE, "attacked, exact gradient", "D")
    axes.axhline(statistics.fmean(r["scaling"]["clean"] for r in results), color=GREY, ls=":", label="no attack")
    axes.set_xscale("log")
    axes.set_xticks(SCALES, [f"{s:g}" for s in SCALES])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("scale of the head (more confident $\\rightarrow$)")
    axes.set_ylabel("accuracy (mean, range of the seeds)")
    axes.legend(frameon=False)
    drawn["scaling"] = figure

    figure = _figure(9.6, 4.2)
    left, right = figure.subplots(1, 2)
    for name, colour in (("normal", RED), ("robust", BLUE)):
        part = results[0]["loss_increase"][name]
        rise = torch.tensor(part["rise"]).clamp_min(1e-9).log10()
        left.hist(rise.numpy(), bins=60, range=(-9, 1.5), color=colour, alpha=0.5, label=f"{name} training")
        right.scatter(torch.tensor(part["log_layerwise"]) / math.log(10), rise, s=5, color=colour, alpha=0.5, lw=0)
    left.set_xlabel(r"$\log_{10}$ loss increase (1e-9: none or less)")
    left.set_ylabel("images")
    left.legend(frameon=False)
    right.set_xlabel(r"$\log_{10}$ relative flatness of the clean image")
    right.set_ylabel(r"$\log_{10}$ loss increase")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    drawn["loss_increase"] = figure

    drawn["valley"] = paths[0].plot(("log_layerwise", "log_input_gradient_norm", "confidence"))

    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    for name, colour in (("normal", RED), ("robust", BLUE)):
        steps = [x for r in results for x in r["basin"][name]["steps"]]
        flipped = sorted(x for x in steps if x is not None)
        share = [(k + 1) / len(steps) for k in range(len(flipped))]
        axes.step(flipped, share, where="post", color=colour, label=f"{name} training")
    axes.set_xlabel(rf"steps of $\ell_\infty$ {BASIN_STEP:g}")
    axes.set_ylabel("share of images flipped by then")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    drawn["basin"] = figure
    return drawn


def summary(results: list[dict[str, Any]]) -> list[str]:
    """The figures that docs/replication.md sets beside the paper's, mean and range over the seeds."""

    def spread(values: list[float], form: str = ".3f") -> str:
        mean = format(statistics.fmean(values), form)
        return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"

    lines = [f"clean accuracy: {spread([r['scaling']['clean'] for r in results])}"]
    for kind in ("usual", "exact"):
        for k, s in enumerate(SCALES):
            lines.append(f"robust accuracy, scale {s:g}, {kind}: {spread([r['scaling'][kind][k] for r in results])}")
    for name in ("normal", "robust"):
        part = [r["loss_increase"][name] for r in results]
        lines.append(f"weak l2, {name}: clean {spread([p['clean_accuracy'] for p in part])}")
        for k, s in enumerate(WEAK_SCALES):
            lines.append(f"weak l2, {name}, scale {s:g}: right {spread([p['robust_accuracy'][k] for p in part])}, "
                         f"median rise {spread([p['quantiles'][k]['q50'] for p in part], '.2e')}, "
                         f"95 % {spread([p['quantiles'][k]['q95'] for p in part], '.2e')}")  # fmt: skip
        for what in ("flatness", "confidence"):
            values = [p[f"rank_correlation_{what}"] for p in part]
            lines.append(f"weak l2, {name}: rank correlation of the rise with {what} {spread(values)}")
    lines += [f"transfer, {key}: {spread([r['transfer'][key] for r in results])}" for key in results[0]["transfer"]]
    lines += [f"valley, {key}: {spread([float(r['valley'][key]) for r in results])}" for key in results[0]["valley"]]
    for name in ("normal", "robust"):
        for key in ("median_steps_to_flip", "not_flipped", "median_ridge"):
            lines.append(f"basin, {name}, {key}: {spread([r['basin'][name][key] for r in results], '.1f')}")
    lines += [f"basin, {key}: {spread([r['basin'][key] for r in results], '.1f')}" for key in ("ratio", "ridge_ratio")]
    for key in results[0]["detection"]:
        part = [r["detection"][key] for r in results]
        lines.append(f"detection, {key}: accuracy {spread([p['accuracy'] for p in part])}, interval of seed 0 "
                     f"{part[0]['interval'][0]:.3f} to {part[0]['interval'][1]:.3f}, {part[0]['feature']}, perturbed "
                     f"{'above' if part[0]['perturbed_above'] else 'below'}; flipped "
                     f"{spread([p['flipped'] for p in part])}")  # fmt: skip
    for name in ("normal", "robust"):
        part = [r["bounds"][name] for r in results]
        for key in ("lipschitz_upper", "lipschitz_lower_estimate", "median_margin_radius", "median_loss_change_radius"):
            lines.append(f"bounds, {name}, {key}: {spread([p[key] for p in part], '.3g')}")
        for k, row in enumerate(part[0]["attacks"]):
            cells = [f"{key} {spread([p['attacks'][k][key] for p in part], '.3g')}" for key in row if key != "radius"]
            lines.append(f"bounds, {name}, radius {row['radius']:g}: {'; '.join(cells)}")
    return lines


def run(out: Path, folder: Path | None, images: int, seeds: int, quick: bool) -> None:
    """Train or load, experiment, write the files into ``out`` and print the summary.

    Raises:
        OSError: A file of the data set cannot be read, or ``out`` or a file in it cannot be written.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    data = choose(folder, quick, 0)
    if not quick and data.name != "digits":
        data = data._replace(epsilon_linf=0.1)
    nets = [networks(data, seed, images, out) for seed in range(seeds)]
    results, paths = [], []
    for seed, net in enumerate(nets):
        start = time.perf_counter()
        found: dict[str, Any] = {"seed": seed}
        found["scaling"] = scaling(net)
        found["loss_increase"] = loss_increase(net)
        found["transfer"] = transfer(net, nets[(seed + 1) % seeds].normal)
        found["valley"], path = valley(net)
        found["basin"] = basin(net)
        found["detection"] = detection(net)
        found["bounds"] = bounds(net)
        results.append(found)
        paths.append(path)
        print(f"Seed {seed}: all experiments on {images} images of {data.name} in {time.perf_counter() - start:.0f} s")
    lines = summary(results)
    print("\n".join(lines))
    for name, figure in pictures(results, paths).items():
        figure.savefig(out / f"{name}.png", dpi=110)
    about = {"data": data.name, "images": images, "flatcore": flatcore.__version__, "torch": torch.__version__}
    text = json.dumps({"about": about, "summary": lines, "seeds": results}, allow_nan=False)
    (out / "replication.json").write_text(text, encoding="utf-8")
    print(f"Values: {out / 'replication.json'}\nPictures: {out}")


def main(argv: list[str] | None = None) -> int:
    """Run the example and return its exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="replicate_paper.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("flatcore-demo/replication"), metavar="DIR",
                        help="folder for the files, made if absent (default: %(default)s)")  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR",
                        help=f"Fashion-MNIST's four .gz files (default: {FASHION_MNIST}, else the digits)")  # fmt: skip
    parser.add_argument("--images", type=int, choices=range(20, 10_001), default=None, metavar="N",
                        help="test images to attack (default: 1000, 100 with --quick)")  # fmt: skip
    parser.add_argument("--seeds", type=int, choices=range(1, 11), default=None, metavar="N",
                        help="networks to train of each kind (default: 3, 1 with --quick)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="digits, one seed, 100 images: a minute")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed what there is to say
        return int(stop.code or 0)
    quick = arguments.quick
    try:
        run(
            arguments.out, arguments.data, arguments.images or (100 if quick else 1000),
            arguments.seeds or (1 if quick else 3), quick,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("replicate_paper: interrupted.", file=sys.stderr)
        return 130
    except OSError as error:
        what = error.filename or "the files"
        print(f"replicate_paper: cannot use {what}: {error.strerror or error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
