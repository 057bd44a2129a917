"""First-order attacks on a confident network: foolbox's PGD with the usual loss, and with flatcore's.

Multiplying the head's weight and bias by a scale changes no prediction, only the confidence. The usual float32 gradient
of the cross-entropy fades and vanishes as it grows, and PGD, which follows that gradient, reports a robustness that is
not there. ``flatcore.unmasked_cross_entropy`` is put in its place by overriding one method of the attack.

    python examples/attack_scaling.py            Fashion-MNIST, 1,000 test images (minutes; the first run trains)
    python examples/attack_scaling.py --quick    scikit-learn's digits, 100 test images (seconds)

Writes the trained weights, attack_scaling.csv and attack_scaling.png, and prints two tables.
Exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

try:
    import eagerpy as ep
    import foolbox as fb
    import torch
    from image_data import FASHION_MNIST, Data, choose, trained
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor, nn
    from tqdm import tqdm

    import flatcore
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"attack_scaling: {(error.name or 'a package').partition('.')[0]} cannot be imported ({error}); "
        "pip install -c constraints.txt '.[examples]' brings what this example needs."
    )

SCALES = (0.25, 1.0, 5.0, 10.0, 20.0, 50.0, 100.0)
QUICK_SCALES = (0.25, 1.0, 10.0, 100.0)
STEPS = 10
REL_STEPSIZE = 0.25  # of epsilon: ten steps can cross the ball; at foolbox's default, 1/30, they end a third of the way
BATCH = 250  # images at a time, in attacks and gradients


def sharpened(model: nn.Sequential, scale: float) -> nn.Sequential:
    """Copy the network, the weight and the bias of its head times ``scale``: same predictions, other confidence."""
    model = copy.deepcopy(model)
    head = model[-1]
    with torch.no_grad():
        head.weight.mul_(scale)
        head.bias.mul_(scale)
    return model


class Unmasked:
    """Mixed into a foolbox attack, gives its loss the exact gradient's direction at every confidence."""

    def get_loss_fn(self, model: fb.models.Model, labels: ep.Tensor) -> Callable[[ep.Tensor], ep.Tensor]:
        """Foolbox's own hook: the loss whose gradient the attack climbs."""

        def loss(inputs: ep.Tensor) -> ep.Tensor:
            return ep.astensor(flatcore.unmasked_cross_entropy(model(inputs).raw, labels.raw, reduction="sum"))

        return loss


class UnmaskedLinfPGD(Unmasked, fb.attacks.LinfPGD):
    """foolbox's LinfPGD along the exact gradient."""


class UnmaskedL2PGD(Unmasked, fb.attacks.L2PGD):
    """foolbox's L2PGD along the exact gradient."""


def attacks(data: Data) -> dict[str, tuple[fb.attacks.base.FixedEpsilonAttack, float]]:
    """The four attacks by the name of their column, each with its epsilon; no random start, so that runs repeat."""
    options = {"steps": STEPS, "rel_stepsize": REL_STEPSIZE, "random_start": False}
    return {
        "linf_usual": (fb.attacks.LinfPGD(**options), data.epsilon_linf),
        "linf_exact": (UnmaskedLinfPGD(**options), data.epsilon_linf),
        "l2_usual": (fb.attacks.L2PGD(**options), data.epsilon_l2),
        "l2_exact": (UnmaskedL2PGD(**options), data.epsilon_l2),
    }


def survivors(
    attack: fb.attacks.base.FixedEpsilonAttack, epsilon: float, model: nn.Module, images: Tensor, labels: Tensor
) -> Tensor:
    """Mark the images (N,) that are classified right before and after the attack."""
    victim = fb.PyTorchModel(model, bounds=(0, 1), device=images.device)
    alive = []
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        with torch.no_grad():
            right = model(x).argmax(dim=1) == y
        _, _, success = attack(victim, x, y, epsilons=epsilon)
        alive.append(right & ~success)
    return torch.cat(alive)


def true_directions(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Direction of the loss's gradient in float64, by autograd alone.

    The cross-entropy is softplus(r), r = log sum_{j != y} exp(z_j) - z_y; its gradient is a positive multiple of r's, and
    r's does not vanish.
    """
    model = copy.deepcopy(model).double()
    directions = []
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        x = x.double().requires_grad_()
        z = model(x)
        own = y.unsqueeze(1)
        r = z.scatter(1, own, -torch.inf).logsumexp(dim=1) - z.gather(1, own).squeeze(1)
        directions.append(torch.autograd.grad(r.sum(), x)[0])
    return torch.cat(directions)


def usual_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of torch's cross-entropy to the inputs, as everyone takes it."""
    gradients = []
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        x = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
        gradients.append(torch.autograd.grad(loss, x)[0])
    return torch.cat(gradients)


def agreement(gradients: Tensor, truth: Tensor) -> dict[str, float]:
    """Mean cosine to the truth, mean share of equal signs, share of images whose gradient is zero in every pixel.

    A zero gradient points nowhere: its cosine counts as 0. Signs are compared where the true one is not zero.
    """
    gradients, truth = gradients.double().flatten(1), truth.flatten(1)
    # divided by the largest entry first: 1e-40 squared is zero in float64 too, far below
    gradients = gradients / gradients.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    cosine = nn.functional.cosine_similarity(gradients, truth, dim=1, eps=1e-300)
    told = truth != 0
    same = ((gradients.sign() == truth.sign()) & told).sum(dim=1) / told.sum(dim=1).clamp_min(1)
    return {
        "cosine": cosine.mean().item(),
        "signs": same.double().mean().item(),
        "zero": (gradients == 0).all(dim=1).double().mean().item(),
    }


def measure(data: Data, model: nn.Sequential, images: Tensor, labels: Tensor, scales: tuple[float, ...]) -> list[dict]:
    """One row per scale: accuracies clean and under each attack, then the gradients at the clean images."""
    rows = []
    kinds = attacks(data)
    with tqdm(total=len(scales) * len(kinds) * len(images), desc="attacking", unit=" images", disable=None) as bar:
        for scale in scales:
            victim = sharpened(model, scale)
            bar.set_postfix_str(f"scale {scale:g}", refresh=False)
            with torch.no_grad():
                logits = torch.cat([victim(x) for x in images.split(BATCH)])
            top = logits.topk(2).values
            row = {
                "scale": scale,
                "clean": (logits.argmax(dim=1) == labels).double().mean().item(),
                "median_gap": (top[:, 0] - top[:, 1]).median().item(),
            }
            for name, (attack, epsilon) in kinds.items():
                row[name] = survivors(attack, epsilon, victim, images, labels).double().mean().item()
                bar.update(len(images))
            truth = true_directions(victim, images, labels)
            exact = flatcore.input_gradients(victim, images, labels, chunk_size=BATCH)
            for name, gradients in (("usual", usual_gradients(victim, images, labels)), ("exact", exact.direction)):
                row |= {f"{name}_{key}": value for key, value in agreement(gradients, truth).items()}
            rows.append(row)
    return rows


def _table(title: str, headings: dict[str, str], rows: list[dict], forms: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in headings.values():
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(format(row[name], forms.get(name, ".3f")) for name in headings))
    return table


def tables(data: Data, rows: list[dict]) -> tuple[Table, Table]:
    """The robust accuracies, and the gradients behind them."""
    forms = {"scale": "g", "median_gap": ".1f", "usual_cosine": ".4f", "exact_cosine": ".4f"}
    robust = _table(
        f"Accuracy, clean and after PGD: {STEPS} steps,\nl-inf {data.epsilon_linf:g} or l2 {data.epsilon_l2:g}",
        {
            "scale": "scale", "clean": "clean", "linf_usual": "l-inf,\nusual", "linf_exact": "l-inf,\nexact",
            "l2_usual": "l2,\nusual", "l2_exact": "l2,\nexact",
        },
        rows, forms,
    )  # fmt: skip
    gradients = _table(
        "Gradients at the clean images, against float64:\nmean cosine, signs that are right, images all zero",
        {
            "scale": "scale", "median_gap": "median\ngap", "usual_cosine": "usual,\ncosine", "usual_signs": "usual,\nsigns",
            "usual_zero": "usual,\nzero", "exact_cosine": "exact,\ncosine", "exact_signs": "exact,\nsigns",
            "exact_zero": "exact,\nzero",
        },
        rows, forms,
    )  # fmt: skip
    return robust, gradients


def picture(data: Data, rows: list[dict], images: int) -> Figure:
    """Accuracy under both attacks and the usual gradient's error, over the scale."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    linf, l2, error = figure.subplots(1, 3, sharex=True)
    scale = [row["scale"] for row in rows]
    usual, exact = {"color": "#D55E00", "lw": 2, "marker": "o"}, {"color": "#0072B2", "lw": 2, "marker": "D", "ms": 5}
    for axes, name, title in (
        (linf, "linf", rf"PGD-$\ell_\infty$, $\varepsilon$ = {data.epsilon_linf:g}"),
        (l2, "l2", rf"PGD-$\ell_2$, $\varepsilon$ = {data.epsilon_l2:g}"),
    ):
        axes.plot(scale, [row["clean"] for row in rows], color="0.45", lw=2, ls=":", label="no attack")
        axes.plot(scale, [row[f"{name}_usual"] for row in rows], **usual, label="usual gradient")
        axes.plot(scale, [row[f"{name}_exact"] for row in rows], **exact, label="exact gradient")
        axes.set_title(title)
        axes.set_ylabel("accuracy")
    error.plot(scale, [row["usual_cosine"] for row in rows], **usual, label="usual: cosine to the truth")
    error.plot(
        scale,
        [row["usual_signs"] for row in rows],
        **(usual | {"marker": "^"}),
        ls="--",
        label="usual: signs that are right",
    )
    error.plot(scale, [row["usual_zero"] for row in rows], **usual, ls=":", mfc="white", label="usual: images all zero")
    error.plot(scale, [row["exact_cosine"] for row in rows], **exact, label="exact: cosine to the truth")
    error.set_title("gradients at the clean images")
    for axes in (linf, l2, error):
        axes.set_xscale("log")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("scale of the head (more confident $\\rightarrow$)")
        axes.set_xticks(scale, [f"{x:g}" for x in scale])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)  # below: the curves fill the axes
    figure.suptitle(f"The same network, its head scaled: {images} test images of {data.name}", fontsize=14)
    return figure


def run(
    out: Path, folder: Path | None, images: int, seed: int, quick: bool,
    epsilon_linf: float | None = None, epsilon_l2: float | None = None,
) -> None:  # fmt: skip
    """Train or load, attack, write the files into ``out`` and print the tables.

    Raises:
        OSError: A file of the data set cannot be read, or ``out`` or a file in it cannot be written.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    data = choose(folder, quick, seed)
    data = data._replace(
        epsilon_linf=epsilon_linf or data.epsilon_linf, epsilon_l2=epsilon_l2 or data.epsilon_l2
    )  # fmt: skip
    model = trained(data, seed, out)
    x, y = data.test_images[:images], data.test_labels[:images]

    start = time.perf_counter()
    rows = measure(data, model, x, y, QUICK_SCALES if quick else SCALES)
    with (out / "attack_scaling.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture(data, rows, len(y)).savefig(out / "attack_scaling.png", dpi=150)
    print(f"Attacked {len(y)} test images of {data.name} at {len(rows)} scales in {time.perf_counter() - start:.1f} s, "
          f"foolbox {fb.__version__}, flatcore {flatcore.__version__}.")  # fmt: skip
    console = Console(highlight=False)
    for table in tables(data, rows):
        console.print(table)
    last = rows[-1]
    usual, exact, zero = (f"{100 * last[name]:.1f} %" for name in ("linf_usual", "linf_exact", "usual_zero"))
    print(f"At scale {last['scale']:g} the usual gradient is zero on {zero} of the images; under l-inf PGD {usual} stay "
          f"right with it, {exact} with the exact gradient.")  # fmt: skip
    print(f"Values: {out / 'attack_scaling.csv'}\nPicture: {out / 'attack_scaling.png'}")


def _natural(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 10000, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the example and return its exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="attack_scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("flatcore-demo"), metavar="DIR",
                        help="folder for the files, made if absent (default: %(default)s)")  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR",
                        help=f"Fashion-MNIST's four .gz files (default: {FASHION_MNIST}, else the digits)")  # fmt: skip
    parser.add_argument("--images", type=_natural, default=None, metavar="N",
                        help="test images to attack (default: 1000, 100 with --quick)")  # fmt: skip
    parser.add_argument("--epsilon-linf", type=_positive, metavar="E",
                        help="radius of the l-inf attack (default: 0.05, for the digits 0.2)")  # fmt: skip
    parser.add_argument("--epsilon-l2", type=_positive, metavar="E",
                        help="radius of the l2 attack (default: 1)")  # fmt: skip
    parser.add_argument("--seed", type=int, choices=range(10_000), default=0, metavar="N",
                        help="seed of the training, 0 to 9999 (default: %(default)s)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="digits, fewer images and scales: seconds")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed what there is to say
        return int(stop.code or 0)
    images = arguments.images or (100 if arguments.quick else 1000)
    try:
        run(
            arguments.out, arguments.data, images, arguments.seed, arguments.quick,
            arguments.epsilon_linf, arguments.epsilon_l2,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("attack_scaling: interrupted.", file=sys.stderr)
        return 130
    except OSError as error:
        what = error.filename or "the files"
        print(f"attack_scaling: cannot use {what}: {error.strerror or error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
