"""input_gradients against autograd's gradient of the summed cross-entropy alone, on a small CNN with 1,000 images.

    python bench/input_gradients.py [--rounds 21] [--threads 2]

The limit is ``torch.autograd.grad`` of the summed loss to the inputs, the parameters frozen beforehand: no exact gradient
is cheaper than the wrong one. Three norms are held against one read of the gradients (``sum``). All candidates are called
in turn, round after round; shown are medians with the 10th and 90th percentile and the ratio's median over rounds, which a
busy machine disturbs least. Answers are checked first, on the samples where the usual gradient has not vanished.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # flatcore's Python from this tree

import torch
from torch import Tensor, nn

import flatcore
from flatcore._bench.provenance import provenance, require_release_build

ORDS = (1, 2, float("inf"))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    ).eval()  # fmt: skip


def _usual(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    require_release_build()
    torch.set_num_threads(arguments.threads)
    model, free = _model(), _model()
    frozen = model.requires_grad_(False)  # for the limit; ``free`` keeps its flags, which input_gradients has to handle
    x, y = torch.randn(1000, 1, 28, 28), torch.randint(10, (1000,))
    gradients = _usual(frozen, x, y)
    found = flatcore.input_gradients(free, x, y)
    error = torch.linalg.vector_norm((found.gradient() - gradients).flatten(1), dim=1)
    assert (error <= 1e-3 * torch.linalg.vector_norm(gradients.flatten(1), dim=1)).all(), "the gradients differ"
    flat = gradients.flatten(1)
    runs = {
        "limit: autograd.grad, parameters frozen": lambda: _usual(frozen, x, y),
        "input_gradients": lambda: flatcore.input_gradients(free, x, y),
        "input_gradient_norms, three": lambda: flatcore.input_gradient_norms(free, x, y, ord=ORDS, log=True),
        "autograd.grad, parameters not frozen": lambda: _usual(free, x, y),
        "limit: one read of the gradients": flat.sum,
        "row_norms, three": lambda: flatcore.row_norms(flat),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for r in range(arguments.rounds):
        names = list(runs)
        for name in names[r % len(names) :] + names[: r % len(names)]:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    origin = provenance()
    print(", ".join(f"{k} {v}" for k, v in origin.items() if isinstance(v, (str, int, float))))
    limit = ""
    for name, seconds in times.items():
        limit = name if name.startswith("limit") else limit
        low, *_, high = statistics.quantiles(seconds, n=10, method="inclusive")
        ratio = statistics.median(a / b for a, b in zip(seconds, times[limit], strict=True))
        spread = f"({low * 1e3:.2f} - {high * 1e3:.2f})"
        print(f"{name:42s} {statistics.median(seconds) * 1e3:8.2f} ms {spread:20s} {ratio:5.2f} x limit")


if __name__ == "__main__":
    main()
