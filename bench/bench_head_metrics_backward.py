"""Gradients of the measures: W6 forward and backward against plain PyTorch, W3 and W4 backward against their products.

    python bench/bench_head_metrics_backward.py [--rounds 31] [--threads 2] [--quick] [--out bench/results/NAME.md]

W6 (N = 128, D = 512, C = 10, mean layerwise): the forward call alone, and forward and backward less a null autograd
function's, which no custom derivative can undercut. W3 (8,192 x 2,048, 1,000 classes) and W4 (1,024 x 2,048, 32,000
classes): the backward pass against the library products that it cannot do without, timed alone, whole or in tiles of
2,048 classes, whichever is faster: three for the trace (logits again, features' and weight's gradient), for neuronwise
two more (the directions come in twice). All candidates are called in turn, round after round; shown are medians with
the 10th and 90th percentile, and the peak of a backward pass's memory above its inputs and gradients, in a fresh
process. Answers are checked against the float64 reference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # flatcore's Python from this tree

import memory
import rivals
import torch
from provenance import provenance, require_release_build
from rich.console import Console
from rich.table import Table
from torch import Tensor
from works import inputs, select

import flatcore

CLASSES_OF_A_TILE = 2048


class _Null(torch.autograd.Function):
    """What any custom derivative costs: two saved tensors, two gradients that nothing fills."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(w)


def _check(value: Callable[..., Tensor], x: Tensor, w: Tensor, rows: int) -> None:
    """The gradients of some rows against the reference in float64: within 1e-4 of the largest entry."""
    few = x.detach()[:rows].requires_grad_()
    got = torch.autograd.grad(value(few, w), (few, w))
    with flatcore.backend("reference"):
        wide = few.detach().double().requires_grad_(), w.detach().double().requires_grad_()
        want = torch.autograd.grad(value(*wide), wide)
    for a, b in zip(got, want, strict=True):
        assert ((a.double() - b).abs() <= 1e-4 * b.abs().max()).all(), "the gradients differ"


def _turns(runs: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds per call of each, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            taken[name].append(1e6 * (time.perf_counter() - start) / calls)
    return taken


def _step(value: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> Callable[[], None]:
    def run() -> None:
        x.grad = w.grad = None
        value(x, w).backward()

    return run


def training_call(rounds: int, calls: int) -> dict[str, list[float]]:
    """W6."""
    features, weight, _, _ = inputs(select("W6")[0])
    x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
    bias = torch.zeros(w.shape[0])

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return rivals.mean_layerwise(x, w, bias)

    compiled = torch.compile(eager, dynamic=False)
    _check(flatcore.relative_flatness, x, w, len(x))
    found: dict[str, Callable[[], Any]] = {}
    for name, value in (("eager", eager), ("torch.compile", compiled), ("flatcore", flatcore.relative_flatness)):
        found[f"{name}, forward"] = lambda value=value: value(features, weight)
        found[f"{name}, forward and backward"] = _step(value, x, w)
    found["null function, forward and backward"] = _step(_Null.apply, x, w)
    return _turns(found, rounds, calls)


def _large(key: str, measure: str, quick: bool) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    """The measure's log, averaged, and its arguments."""
    (work,) = select(f"{key}-{measure}")
    features, weight, _, _ = inputs(work.quick() if quick else work)

    def value(x: Tensor, w: Tensor) -> Tensor:
        if measure == "trace":
            return flatcore.hessian_trace(x, w, log=True)
        return flatcore.relative_flatness(x, w, measure="neuronwise", log=True)

    return value, features.clone().requires_grad_(), weight.clone().requires_grad_()


def large_head(key: str, measure: str, rounds: int, quick: bool) -> dict[str, list[float]]:
    """W3 or W4: the backward pass, and the products that it needs."""
    value, x, w = _large(key, measure, quick)
    _check(value, x, w, 32)
    result = value(x, w)
    features, weight = x.detach(), w.detach()
    N, C = len(x), len(w)
    again = range(1 if measure == "trace" else 2)
    g = torch.randn(N, C)
    to_features, to_weight = torch.empty_like(features), torch.empty_like(weight)

    def whole() -> None:
        for _ in again:  # logits, and directions
            torch.mm(features, weight.T, out=g)
        torch.mm(g, weight, out=to_features)
        for _ in again:
            torch.mm(g.T, features, out=to_weight)

    def tiled() -> None:
        for tile, of_tile in zip(weight.split(CLASSES_OF_A_TILE), to_weight.split(CLASSES_OF_A_TILE), strict=True):
            part = g.view(-1)[: N * len(tile)].view(N, len(tile))
            for _ in again:
                torch.mm(features, tile.T, out=part)
            to_features.addmm_(part, tile)
            for _ in again:
                torch.mm(part.T, features, out=of_tile)

    return _turns(
        {
            f"{measure}: products, whole": whole,
            f"{measure}: products, tiled": tiled,
            f"{measure}: backward": lambda: torch.autograd.grad(result, (x, w), retain_graph=True),
        },
        rounds,
        1,
    )


def peak(key: str, measure: str, quick: bool) -> float:
    """Megabytes that the backward pass takes above its inputs and gradients."""
    value, x, w = _large(key, measure, quick)
    torch.autograd.grad(value(x[:16], w), (x, w))
    result = value(x, w)
    most, gradients = memory.peak_of(lambda: torch.autograd.grad(result, (x, w)))
    return max(most - sum(g.nbytes for g in gradients), 0) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="smoke test; never quote its figures")
    parser.add_argument("--out", type=Path, help="Markdown file to write; the numbers go beside it as JSON")
    parser.add_argument("--peak", nargs=2, metavar=("WORK", "MEASURE"), help="print this backward pass's megabytes")
    arguments = parser.parse_args()
    require_release_build()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(json.dumps({"megabytes": peak(*arguments.peak, arguments.quick)}))
        return
    rounds, calls = (3, 10) if arguments.quick else (arguments.rounds, 200)
    found = {"W6": training_call(rounds, calls)}
    for key in ("W3", "W4"):
        for measure in ("trace", "neuronwise"):
            found[f"{key} {measure}"] = large_head(key, measure, 2 if arguments.quick else 5, arguments.quick)
    lines = [
        "| work | what | median, µs | 10 % - 90 % |",
        "|---|---|---|---|",
    ]
    table = Table("work", "what", "median, µs", "10 % - 90 %")
    for work, runs in found.items():
        for name, taken in runs.items():
            low, high = statistics.quantiles(taken, n=10)[0], statistics.quantiles(taken, n=10)[-1]
            cells = (work, name, f"{statistics.median(taken):,.1f}", f"{low:,.1f} - {high:,.1f}")
            table.add_row(*cells)
            lines.append(f"| {' | '.join(cells)} |")
    w6 = {name: statistics.median(taken) for name, taken in found["W6"].items()}
    null = w6["null function, forward and backward"]
    both = "forward and backward"
    above = (w6[f"flatcore, {both}"] - null) / (w6[f"eager, {both}"] - null)
    said = [
        f"W6 forward: flatcore takes {w6['flatcore, forward'] / w6['eager, forward']:.2f} of eager's time (goal 0.33).",
        f"W6 forward and backward, above the null function: {above:.2f} of eager's (goal 0.33).",
    ]
    for work, runs in list(found.items())[1:]:
        whole, tiled, backward = (statistics.median(taken) for taken in runs.values())
        script = [__file__, "--peak", *work.split(), "--threads", str(arguments.threads)]
        most = memory.megabytes(script + ["--quick"] * arguments.quick, work)
        said.append(
            f"{work} backward: {backward / min(whole, tiled):.2f} times its products (goal 1.1)"
            + ("." if most is None else f", {most:.0f} MB above inputs and gradients (goal 67: 64 MiB).")
        )
    console = Console(width=120)
    console.print(table)
    console.print("\n".join(said))
    if arguments.out:
        origin = provenance()
        arguments.out.write_text("\n".join(["# Gradients of the measures", "", *lines, "", *(f"- {s}" for s in said), "",
                                            f"Provenance: `{origin}`", ""]))  # fmt: skip
        arguments.out.with_suffix(".json").write_text(
            json.dumps({"provenance": origin, "microseconds": found}, indent=1) + "\n"
        )
        console.print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
