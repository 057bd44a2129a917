"""The robustness lab's overheads, on a small CNN: the attack path over the attack alone, evaluate over the forward pass.

    python bench/robustness_lab.py [--rounds 11] [--threads 2] [--out FILE.json]

The limit of an attack path of 1,000 images and 11 points is the attack itself: 10 steps along autograd's gradient of the
summed cross-entropy, parameters frozen, and one forward pass to see who survived. Beside it: one image at a time, measured
on 50 images. The limit of evaluate is the bare forward pass over its loader, without gradients, once on ready batches and
once through a DataLoader. Candidates are called in turn; shown are medians and the median ratio over rounds. Answers first:
the path's last point is the attack's, and the report's mean is the table's. The last table has a model that is a head alone:
what evaluate takes there is all that it adds.

glibc gives memory back to the system when a batch's activations are freed, or does not, by what happens to lie above them:
the same forward pass takes 0.75 s or 1.5 s from run to run. The script starts itself again with both thresholds raised
(MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), for all candidates alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # flatcore's Python from this tree

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import flatcore
from flatcore import robustness
from flatcore._bench.provenance import provenance, require_release_build

_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
IMAGES, STEPS, EPS = 1000, 10, 0.1
EVALUATED, BATCH = 20_000, 250


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    ).eval().requires_grad_(False)  # fmt: skip


def _attacked(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The attack as one would write it, and nothing measured."""
    here = x
    for _ in range(STEPS):
        leaf = here.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        here = x + (here + EPS / 4 * gradient.sign() - x).clamp(-EPS, EPS)
        here = here.clamp(0, 1)
    with torch.no_grad():
        model(here).argmax(dim=1)
    return here


def _path(model: nn.Module, x: Tensor, y: Tensor) -> robustness.AttackPath:
    return robustness.attack_path(model, x, y, norm=math.inf, eps=EPS, step=EPS / 4, steps=STEPS, chunk_size=BATCH)


def _forward(model: nn.Module, loader: Any) -> None:
    with torch.no_grad():
        for x, _ in loader:
            model(x)


def measured(runs: dict[str, tuple[Callable[[], Any], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of every candidate, times its factor, and the ratio to the first, in turn over rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run, _ in runs.values():
        run()
    for r in range(rounds):
        names = list(runs)
        for name in names[r % len(names) :] + names[: r % len(names)]:
            run, factor = runs[name]
            start = time.perf_counter()
            run()
            times[name].append(factor * (time.perf_counter() - start))
    limit = next(iter(times.values()))
    rows = {}
    for name, seconds in times.items():
        low, *_, high = statistics.quantiles(seconds, n=10, method="inclusive")
        ratio = statistics.median(a / b for a, b in zip(seconds, limit, strict=True))
        rows[name] = {"seconds": statistics.median(seconds), "low": low, "high": high, "times_limit": ratio}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    require_release_build()
    torch.set_num_threads(arguments.threads)
    model = _model()
    x, y = torch.rand(IMAGES, 1, 28, 28), torch.randint(10, (IMAGES,))
    parts = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    alone = torch.cat([_attacked(model, *part) for part in parts])
    path = _path(model, x, y)
    same = (path.adversarial == alone).double().mean().item()
    assert same > 0.99, f"the attacks differ: {same}"  # signs of gradients near 0 are rounding
    few = 50
    one_by_one = lambda: [_path(model, x[n : n + 1], y[n : n + 1]) for n in range(few)]  # noqa: E731
    alone_model, features = nn.Sequential(nn.Linear(128, 10)), torch.rand(EVALUATED, 128)
    labels = torch.randint(10, (EVALUATED,))
    rows = list(zip(features.split(BATCH), labels.split(BATCH), strict=True))
    data = TensorDataset(torch.rand(EVALUATED, 1, 28, 28), torch.randint(10, (EVALUATED,)))
    loader = DataLoader(data, batch_size=BATCH)
    ready = list(loader)
    report = flatcore.evaluate(model, ready, progress=False)
    mean = torch.tensor(report.rows["log_layerwise"]).double().logsumexp(0).item() - math.log(EVALUATED)
    assert abs(report["layerwise"].log_mean - mean) < 1e-9, "the means differ"
    tables = {
        f"attack path, {IMAGES} images, {STEPS + 1} points": measured(
            {
                "limit: the attack alone": (lambda: [_attacked(model, *part) for part in parts], 1),
                "robustness.pgd": (lambda: [
                    robustness.pgd(model, *part, norm=math.inf, eps=EPS, step=EPS / 4, steps=STEPS) for part in parts
                ], 1),
                "robustness.attack_path": (lambda: _path(model, x, y), 1),
                "attack_path, one image at a time": (one_by_one, IMAGES / few),
            }, arguments.rounds,
        ),
        f"evaluate, {EVALUATED} images, ready batches": measured(
            {
                "limit: the forward pass": (lambda: _forward(model, ready), 1),
                "evaluate": (lambda: flatcore.evaluate(model, ready, progress=False), 1),
                "evaluate, no table kept": (lambda: flatcore.evaluate(model, ready, progress=False, rows=False), 1),
            }, arguments.rounds,
        ),
        f"evaluate, {EVALUATED} images, DataLoader": measured(
            {
                "limit: the forward pass": (lambda: _forward(model, loader), 1),
                "evaluate": (lambda: flatcore.evaluate(model, loader, progress=False), 1),
            }, arguments.rounds,
        ),
        f"evaluate, {EVALUATED} rows, a head alone": measured(
            {
                "limit: the forward pass": (lambda: _forward(alone_model, rows), 1),
                "evaluate": (lambda: flatcore.evaluate(alone_model, rows, progress=False), 1),
            }, arguments.rounds,
        ),
    }  # fmt: skip
    origin = provenance()
    print(", ".join(f"{k} {v}" for k, v in origin.items() if isinstance(v, (str, int, float))))
    for title, rows in tables.items():
        print(title)
        for name, row in rows.items():
            spread = f"({row['low'] * 1e3:.0f} - {row['high'] * 1e3:.0f})"
            print(f"  {name:36s} {row['seconds'] * 1e3:9.1f} ms {spread:18s} {row['times_limit']:6.2f} x limit")
    if arguments.out:
        arguments.out.write_text(json.dumps({"provenance": origin, "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in _ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | _ALLOCATOR)  # read at the start alone
    main()
