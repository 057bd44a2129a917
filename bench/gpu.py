"""The works on a CUDA device: limit, native, best eager, its torch.compile; time, spread, bandwidth, peak memory, truth.

    python bench/gpu.py [--works W1-float32,W4-trace] [--out NAME.json] [--quick] [--seconds 400] [--device cpu]

As report.py, with the device's own clock: candidates in turn, round after round. First native and eager of every work,
then torch.compile's rivals, each beside native: they compile for minutes, and a run that is cut short has the others. A
sleeping kernel goes ahead of each call, so that the gaps before its launches are not counted; works that are short of
launches are timed as 20 calls on end, with their gaps. ``--device cpu`` runs the same code without a GPU, to see that it
runs; its figures are report.py's business.
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
from flatcore._engine import chunked_cuda

SEED = works.SEED
SAMPLE = 64  # rows whose answers are checked against float64
CALLS = 20  # of a work that is bound by launches, to a sample
SLEEP_CYCLES = 4_000_000  # about 2 ms: longer than the host takes for a call's first launches
LARGEST_ERROR = 1e-3  # of a log, or relative: a bfloat16 head of 4096 features has logits to about 1e-4


class WrongAnswerError(Exception):
    """An answer that is off: its work is not timed, the others are."""


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
        if "neuronwise" in self.question or self.question == "all fields":
            found += [(self.N, self.C, min(self.C, self.D))] * chunked_cuda._PIECES.get(self.dtype, 1)
        return found

    def nbytes(self) -> int:
        """Bytes that have to be read and written: features, W, and ten numbers a row (three for row norms)."""
        read = (self.N * self.D + self.C * self.D) * self.dtype.itemsize
        return read + self.N * (3 * 4 if not self.C else 10 * 4 + 2 * 8)


WORKS = (
    Work("W1-float32", "all fields", 1_000_000, 512, 10, torch.float32, "copy"),
    Work("W1-bfloat16", "all fields", 1_000_000, 512, 10, torch.bfloat16, "copy"),
    Work("W2", "all fields", 50_000, 640, 100, torch.float32, "products"),
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
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no work when so many have passed")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    start = time.monotonic()
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
    works_ = [_quick(work) if arguments.quick else work for work in WORKS if work.key in wanted]
    for compile in (False,) if arguments.quick else (False, True):
        for work in works_:
            if time.monotonic() - start > arguments.seconds:
                entry = {"failed": f"not begun: {arguments.seconds:.0f} seconds had passed"}
            else:
                entry = _tried(work, device, report["copy_gb_s"], compile)
            entry = {"key": f"{work.key}, compiled" if compile else work.key} | entry
            report["works"].append(entry)
            print(_markdown(entry), flush=True)
            if arguments.out:  # after every work: a run that is cut short leaves what it has
                _write(report, Path(arguments.out))
    if any("wrong" in entry for entry in report["works"]):
        raise SystemExit(1)


def _quick(work: Work) -> Work:
    return work._replace(N=min(work.N, 128), C=min(work.C, 2_000), rounds=3)


def _tried(work: Work, device: torch.device, copy: float, compile: bool) -> dict[str, Any]:
    """The work's figures, or why there are none: what goes wrong with one says nothing of the others."""
    try:
        return _measure(work, device, copy, compile)
    except WrongAnswerError as error:
        return {"failed": str(error), "wrong": True}
    except torch.OutOfMemoryError as error:  # of the inputs
        return {"failed": str(error).splitlines()[0]}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _write(report: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    origin = "".join(f"- {name}: {value}\n" for name, value in report["provenance"].items())
    tables = "\n".join(_markdown(entry) for entry in report["works"])
    note = "**A smoke test (`--quick`): these times mean nothing.**\n\n" if report["quick"] else ""
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


def _seconds(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Seconds of a call: of one, behind a sleeping kernel, or the mean of several on end."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if calls == 1:
        torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / calls


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
    if not compile:
        for name, form in rivals.EAGER[question].items():
            found.append((f"eager, {name}", lambda x, form=form: works._rival(question, form, x)))
    else:
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
            except WrongAnswerError:
                raise
            except Exception as failure:  # a rival's compiler has errors of its own
                if name == "native" and not isinstance(failure, torch.OutOfMemoryError):
                    raise WrongAnswerError(f"{type(failure).__name__}: {failure}") from failure
                rows.append({"name": name, "failed": f"{type(failure).__name__}: {failure}".splitlines()[0][:200]})
        times: list[list[float]] = [[] for _ in ready]
        for r in range(work.rounds):
            for k in range(len(ready)):
                i = (k + r) % len(ready)
                calls = CALLS if work.bound == "launch" else 1
                times[i].append(_seconds(lambda run=ready[i][1]: run(x), device, calls))
    for (name, _, peak, error), seconds in zip(ready, times, strict=True):
        median = statistics.median(seconds)
        rows.append({
            "name": name, "median_s": median, "least_s": min(seconds), "most_s": max(seconds),
            "times_limit": None if limit is None else median / limit, "gb_s": work.nbytes() / median / 1e9,
            "share_of_copy": work.nbytes() / median / 1e9 / copy, "peak_mb": peak, "largest_error": error,
        })  # fmt: skip
    return {
        "question": work.question, "N": work.N, "D": work.D, "C": work.C,
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
    """Largest error of the first rows' answers: of logs the difference, of other values relative.

    The truth is the reference's, in float64 from the same inputs.

    Raises:
        WrongAnswerError: it is more than LARGEST_ERROR, or not finite where the truth is.
    """
    if work.bound == "launch":
        return None
    few = x._replace(features=x.features[:SAMPLE], target=None if x.target is None else x.target[:SAMPLE])
    wide = works.Inputs(*(t.double() if t is not None and t.is_floating_point() else t for t in few))
    return largest_error(run(few), works._flatcore(work.question, "reference", wide))


def largest_error(got: Any, truth: Any) -> float:
    """See :func:`_error`; of a tensor, or of the fields of two records."""
    fields = [("value", got, truth)] if isinstance(got, Tensor) else list(zip(got._fields, got, truth, strict=True))
    worst = 0.0
    for name, a, b in fields:
        if a is None or not a.is_floating_point():
            continue
        a, finite = a.double(), b.isfinite()
        # a value below float32's range is 0 there, and right
        error = (a - b).abs() if name.startswith("log_") else (a - b).abs() / b.abs().clamp_min(1e-37)
        largest = error[finite].nan_to_num(nan=math.inf, posinf=math.inf).max().item() if finite.any() else 0.0
        if largest > LARGEST_ERROR:
            raise WrongAnswerError(f"{name} is off by {largest:.1e}; not timed")
        worst = max(worst, largest)
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
        "| | median ms | least - most | times limit | GB/s | of copy | peak MB | largest error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in entry["rows"]:
        if "failed" in row:
            lines.append(f"| {row['name']} | {row['failed']} | | | | | | |")
            continue
        cells = [f"{row['median_s'] * 1e3:.3f}", f"{row['least_s'] * 1e3:.3f} - {row['most_s'] * 1e3:.3f}"]
        for key, form in (("times_limit", ".2f"), ("gb_s", ".0f"), ("share_of_copy", ".0%"), ("peak_mb", ".1f"),
                          ("largest_error", ".1e")):  # fmt: skip
            cells.append("" if row[key] is None else format(row[key], form))
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
