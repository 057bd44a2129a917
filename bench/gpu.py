"""The works on a CUDA device: limit, native, best eager, its torch.compile; time, spread, bandwidth, peak memory, truth.

    python bench/gpu.py [--works W1-float32,W4-trace] [--out bench/results/NAME.json] [--quick] [--device cpu]

As report.py, with the device's own clock: candidates in turn, round after round. ``--device cpu`` runs the same code
without a GPU, to see that it runs; its figures are report.py's business.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # flatcore's Python from this tree

import rivals
import torch
import works
from provenance import provenance, require_release_build
from torch import Tensor

import flatcore

SEED = works.SEED
SAMPLE = 64  # rows whose answers are checked against float64


class Work(NamedTuple):
    """A question, its sizes and type."""

    key: str
    question: str  # a key of rivals.EAGER
    N: int
    D: int
    C: int
    dtype: torch.dtype
    bound: str  # what limits it: "copy" or "products"
    rounds: int = 11

    def products(self) -> list[tuple[int, int, int]]:
        """Sizes (rows, inner, columns) of the library products that the answer needs."""
        found = [(self.N, self.D, self.C)]
        if "neuronwise" in self.question:
            found += [(self.N, self.C, min(self.C, self.D))] * (2 if self.dtype == torch.bfloat16 else 1)
        return found

    def nbytes(self) -> int:
        """Bytes that have to be read and written: features, W, and ten numbers a row (three for row norms)."""
        read = (self.N * self.D + self.C * self.D) * self.dtype.itemsize
        return read + self.N * (3 * 4 if not self.C else 10 * 4 + 2 * 8)


WORKS = (
    Work("W1-float32", "all fields", 1_000_000, 512, 10, torch.float32, "copy"),
    Work("W1-bfloat16", "all fields", 1_000_000, 512, 10, torch.bfloat16, "copy"),
    Work("W2", "all fields", 50_000, 640, 100, torch.float32, "copy"),
    Work("W3-trace", "trace", 8_192, 2_048, 1_000, torch.float32, "products"),
    Work("W3-neuronwise", "neuronwise", 8_192, 2_048, 1_000, torch.float32, "products"),
    Work("W4-trace", "trace, chunked", 8_192, 4_096, 128_256, torch.bfloat16, "products", 5),
    Work("W4-neuronwise", "neuronwise, chunked", 8_192, 4_096, 128_256, torch.bfloat16, "products", 5),
    Work("W5", "row norms", 512, 150_528, 0, torch.float32, "copy"),
    Work("W6-forward", "mean layerwise", 128, 512, 10, torch.float32, "launch", 31),
    Work("W6-backward", "mean layerwise", 128, 512, 10, torch.float32, "launch", 31),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", help="comma-separated keys (default: all)")
    parser.add_argument("--out", help="JSON file to write; a Markdown table is written beside it")
    parser.add_argument("--quick", action="store_true", help="few rows, 3 rounds, no compile; never quote its figures")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    wanted = arguments.works.split(",") if arguments.works else [work.key for work in WORKS]
    unknown = [key for key in wanted if key not in {work.key for work in WORKS}]
    if unknown:
        raise SystemExit(f"unknown work {', '.join(unknown)}; known: {', '.join(work.key for work in WORKS)}")
    if arguments.device == "cuda" and not flatcore.cuda.is_available():
        raise SystemExit(f"no CUDA kernel can run: {flatcore.cuda.show_config()['reason']}")
    require_release_build()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")
    device = torch.device(arguments.device)
    report: dict[str, Any] = {"provenance": provenance() | _device(device), "quick": arguments.quick, "works": []}
    report["copy_gb_s"] = _copy_bandwidth(device, arguments.quick)
    print(json.dumps(report["provenance"]), f"\ndevice copy: {report['copy_gb_s']:.0f} GB/s", flush=True)
    for work in WORKS:
        if work.key not in wanted:
            continue
        if arguments.quick:
            work = work._replace(N=min(work.N, 128), C=min(work.C, 2_000), rounds=3)
        try:
            entry = _measure(work, device, report["copy_gb_s"], compile=not arguments.quick)
        except torch.OutOfMemoryError as error:  # of a rival: the others are still worth a row
            entry = {"key": work.key, "failed": str(error).splitlines()[0]}
        report["works"].append(entry)
        print(_markdown(entry), flush=True)
        if arguments.out:  # after every work: a run that is cut short leaves what it has
            out = Path(arguments.out)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
            origin = "".join(f"- {name}: {value}\n" for name, value in report["provenance"].items())
            tables = "\n".join(_markdown(entry) for entry in report["works"])
            note = "**A smoke test (`--quick`): these times mean nothing.**\n\n" if arguments.quick else ""
            out.with_suffix(".md").write_text(
                f"# Works on a CUDA device\n\n{note}{origin}- device copy: {report['copy_gb_s']:.0f} GB/s\n\n{tables}"
            )


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"device": "cpu"}
    config = flatcore.cuda.show_config()
    return {
        "device": torch.cuda.get_device_name(device), "driver_serves": config["driver"], "runtime": config["runtime"],
        "architectures": config["architectures"], "torch_cuda": torch.version.cuda,
    }  # fmt: skip


def _inputs(work: Work, device: torch.device) -> works.Inputs:
    """As works.inputs draws them, on the device: gaps of the logits log-uniform in 0.1 to 60, one label in ten wrong."""
    g = torch.Generator(device).manual_seed(SEED)
    features = torch.randn(work.N, work.D, generator=g, device=device)
    if not work.C:
        return works.Inputs(features.to(work.dtype))
    weight = torch.randn(work.C, work.D, generator=g, device=device) / math.sqrt(work.D)
    bias = 0.1 * torch.randn(work.C, generator=g, device=device)
    label = torch.randint(work.C, (work.N,), generator=g, device=device)
    gap = 0.1 * (works.HIGHEST_GAP / 0.1) ** torch.rand(work.N, 1, generator=g, device=device)
    for start in range(0, work.N, 65_536):
        stop = start + 65_536
        features[start:stop].addcmul_(gap[start:stop], weight[label[start:stop]])
    wrong = torch.rand(work.N, generator=g, device=device) < 0.1
    target = torch.where(wrong, (label + 1) % work.C, label)
    return works.Inputs(features.to(work.dtype), weight.to(work.dtype), bias.to(work.dtype), target)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def _copy_bandwidth(device: torch.device, quick: bool) -> float:
    x = torch.empty(1 << (22 if quick or device.type == "cpu" else 30), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    times = [_seconds(lambda: y.copy_(x), device) for _ in range(11)]
    return 2 * x.nbytes / statistics.median(times) / 1e9


def _product_seconds(work: Work, device: torch.device) -> float:
    """The work's products alone, in its own type, in chunks of rows that fit."""
    total = 0.0
    for rows, inner, columns in work.products():
        some = min(rows, 1024)
        a = torch.randn(some, inner, device=device).to(work.dtype)
        b = torch.randn(inner, columns, device=device).to(work.dtype)
        times = [_seconds(lambda a=a, b=b: a @ b, device) for _ in range(7)]
        total += statistics.median(times) * rows / some
    return total


def _candidates(work: Work, compile: bool) -> list[tuple[str, Callable[[works.Inputs], Any]]]:
    question = work.question
    found = [("native", lambda x: works._flatcore(question, "native", x))]
    for name, form in rivals.EAGER[question].items():
        found.append((f"eager, {name}", lambda x, form=form: works._rival(question, form, x)))
    if compile:
        name, form = rivals.compiled(question)
        found.append((f"torch.compile, {name}", lambda x, form=form: works._rival(question, form, x)))
    if work.key != "W6-backward":
        return found

    def backward(run: Callable[[works.Inputs], Tensor], x: works.Inputs) -> Any:
        with torch.enable_grad():
            leaves = tuple(t.detach().requires_grad_() for t in x[:3])
            return torch.autograd.grad(run(works.Inputs(*leaves, x.target)), leaves)

    return [(name, lambda x, run=run: backward(run, x)) for name, run in found]


def _measure(work: Work, device: torch.device, copy: float, compile: bool) -> dict[str, Any]:
    x = _inputs(work, device)
    limit = {
        "copy": lambda: work.nbytes() / copy / 1e9,
        "products": lambda: _product_seconds(work, device),
        "launch": lambda: None,
    }[work.bound]()
    rows: list[dict[str, Any]] = []
    with torch.set_grad_enabled(False):
        ready = []
        for name, run in _candidates(work, compile):
            try:
                peak = _peak(run, x, device)
                error = _error(work, run, x) if name == "native" else None
                ready.append((name, run, peak, error))
            except torch.OutOfMemoryError as failure:
                rows.append({"name": name, "failed": str(failure).splitlines()[0]})
        times: list[list[float]] = [[] for _ in ready]
        for r in range(work.rounds):
            for k in range(len(ready)):
                i = (k + r) % len(ready)
                times[i].append(_seconds(lambda run=ready[i][1]: run(x), device))
    for (name, _, peak, error), seconds in zip(ready, times, strict=True):
        median = statistics.median(seconds)
        rows.append({
            "name": name, "median_s": median, "least_s": min(seconds), "most_s": max(seconds),
            "times_limit": None if limit is None else median / limit, "gb_s": work.nbytes() / median / 1e9,
            "share_of_copy": work.nbytes() / median / 1e9 / copy, "peak_mb": peak, "largest_relative_error": error,
        })  # fmt: skip
    return {
        "key": work.key, "question": work.question, "N": work.N, "D": work.D, "C": work.C,
        "dtype": str(work.dtype).removeprefix("torch."), "bound": work.bound, "limit_s": limit, "bytes": work.nbytes(),
        "path": flatcore.show_config()["last_path"], "rows": rows,
    }  # fmt: skip


def _peak(run: Callable[[works.Inputs], Any], x: works.Inputs, device: torch.device) -> float | None:
    """Megabytes above inputs and answer; the warm-up besides."""
    run(x)
    if device.type == "cpu":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    answer = run(x)
    torch.cuda.synchronize(device)
    kept = torch.cuda.memory_allocated(device) - before
    del answer
    return (torch.cuda.max_memory_allocated(device) - before - kept) / 2**20


def _error(work: Work, run: Callable[[works.Inputs], Any], x: works.Inputs) -> float | None:
    """Largest relative error of the first rows' answers, in the log domain where they are logs.

    The truth is the reference's, in float64 from the same inputs. More than 1e-3 stops the run: a bfloat16 head of 4096
    features has logits to about 1e-4.
    """
    if work.bound == "launch":
        return None
    few = x._replace(features=x.features[:SAMPLE], target=None if x.target is None else x.target[:SAMPLE])
    wide = works.Inputs(*(t.double() if t is not None and t.is_floating_point() else t for t in few))
    got = run(few)
    truth = works._flatcore(work.question, "reference", wide)
    pairs = [(got, truth)] if isinstance(got, Tensor) else list(zip(got, truth, strict=True))
    worst = 0.0
    for a, b in pairs:
        if a is None or not a.is_floating_point():
            continue
        error = ((a.double() - b) / b.abs().clamp_min(1e-30)).abs()
        worst = max(worst, error[b.isfinite()].max().item())
    if worst > 1e-3:
        raise SystemExit(f"{work.key}: an answer is off by {worst:.1e} of itself; nothing is timed")
    return worst


def _markdown(entry: dict[str, Any]) -> str:
    if "rows" not in entry:
        return f"## {entry['key']}\n\nfailed: {entry['failed']}\n"
    lines = [
        f"## {entry['key']}: {entry['question']}, N={entry['N']:,}, D={entry['D']:,}, C={entry['C']:,}, {entry['dtype']}",
        "",
        (f"Limit ({entry['bound']}): {entry['limit_s'] * 1e3:.3f} ms; " if entry["limit_s"] else "")
        + f"path {entry['path']}.",
        "",
        "| | median ms | least - most | times limit | GB/s | of copy | peak MB | largest relative error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in entry["rows"]:
        if "failed" in row:
            lines.append(f"| {row['name']} | {row['failed']} | | | | | | |")
            continue
        cells = [f"{row['median_s'] * 1e3:.3f}", f"{row['least_s'] * 1e3:.3f} - {row['most_s'] * 1e3:.3f}"]
        for key, form in (("times_limit", ".2f"), ("gb_s", ".0f"), ("share_of_copy", ".0%"), ("peak_mb", ".1f"),
                          ("largest_relative_error", ".1e")):  # fmt: skip
            cells.append("" if row[key] is None else format(row[key], form))
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
