"""One table per work: limit, native, best eager, its torch.compile, reference; time, spread, ratios, memory, truth.

    python bench/report.py [--works W1,W5] [--quick] [--out bench/results/NAME.json]

All candidates of a work and the probes of its limit are called in turn, round after round, each round beginning with
another one, so that noise and clock changes hit all alike. Shown are medians with the 10th and 90th percentile.
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

import answers
import limits
import memory
import torch
import works
from provenance import provenance, require_release_build
from rich.console import Console
from rich.table import Table

import flatcore

REFERENCE_ROUNDS = 2  # seconds per call, and no goal hangs on it


def main() -> None:
    arguments = _arguments()
    if arguments.native:
        require_release_build()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    console = Console(width=160)
    origin = provenance()
    _show_origin(console, origin)
    if origin["extension_stale"] and arguments.native:
        console.print("[bold red]The extension is older than its sources: install again before quoting these figures.")

    began = time.perf_counter()
    selected = works.select(arguments.works)
    report: dict[str, Any] = {"provenance": origin, "quick": arguments.quick, "probes": [], "works": []}
    report["probes"] = _probe_machine(arguments.quick)
    for probe in report["probes"]:
        console.print(f"{probe['name']:<28} {probe['median_s'] * 1e3:9.2f} ms {probe['rate']:8.1f} {probe['unit']}")
    for work in selected:
        machine = [(p["kind"], p["rate"], p["name"]) for p in report["probes"]]
        entry = _measure(work.quick() if arguments.quick else work, arguments, machine)
        report["works"].append(entry)
        console.print(_table(entry))
        console.print(f"limit: {entry['limit']['text']}\n")
    report["seconds"] = time.perf_counter() - began
    console.print(f"{report['seconds']:.0f} s; {CACHE_NOTE}")
    if arguments.out:
        out = Path(arguments.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
        out.with_suffix(".md").write_text(_markdown(report))
        console.print(f"written: {out} and {out.with_suffix('.md')}")


CACHE_NOTE = (
    "caches are as the candidate before left them: W1 to W5 are cold by nature (their inputs of 77 to 308 MB exceed "
    "the last-level cache), W6 is warm (its inputs of 0.3 MB stay in the second level)"
)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", help="comma-separated: W1, W3-trace, ... (default: all)")
    quick = "smoke test in seconds: few rows, 3 rounds, no compile, no memory; never quote its figures"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", help="JSON file to write; a Markdown table is written beside it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-native", dest="native", action="store_false", help="only the rivals and the limits")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the memory processes out")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.compile = arguments.memory = False
    return arguments


def _probe_machine(quick: bool) -> list[dict[str, Any]]:
    """Time the machine's own figures: reads and copies of a buffer beyond the caches, square products."""
    x = torch.randn(64 if quick else 512, 150_528, generator=torch.Generator().manual_seed(works.SEED))
    probes = limits.read_probes(x) + limits.product_probes((1024,) if quick else (1024, 2048, 3072))
    times = _rounds([probe.run for probe in probes], [1] * len(probes), [3 if quick else 9] * len(probes))
    return [
        {"name": p.name, "kind": p.kind, "median_s": statistics.median(t), "rate": p.rate(statistics.median(t)),
         "unit": "GB/s" if p.kind == "read" else "GFLOP/s"}
        for p, t in zip(probes, times, strict=True)
    ]  # fmt: skip


def _rounds(runs: list[Callable[[], Any]], calls: list[int], rounds: list[int]) -> list[list[float]]:
    """Seconds per call of each, in turn; each has been called once more before (warm-up)."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for r in range(max(rounds)):
        for k in range(len(runs)):
            i = (k + r) % len(runs)
            if r >= rounds[i]:
                continue
            start = time.perf_counter()
            for _ in range(calls[i]):
                runs[i]()
            times[i].append((time.perf_counter() - start) / calls[i])
    return times


class _Kept:
    """Runs a candidate and keeps its last answer for the check after timing."""

    def __init__(self, candidate: works.Candidate, x: works.Inputs):
        self.run, self.x, self.answer = candidate.run, x, None

    def __call__(self) -> None:
        self.answer = None  # its memory is free for the next
        self.answer = self.run(self.x)


def _measure(work: works.Work, arguments: argparse.Namespace, machine: list[tuple[str, float, str]]) -> dict[str, Any]:

    x = works.inputs(work)
    truth = answers.Truth(work, x)
    candidates = works.candidates(work, native=arguments.native, compile=arguments.compile)
    ran = [_Kept(candidate, x) for candidate in candidates]
    paths = []
    for candidate, kept in zip(candidates, ran, strict=True):
        kept()
        truth.check(candidate, kept.answer)
        paths.append(_path(work) if candidate.role == "native" else None)
    probes = limits.work_probes(work, x)
    few = min(REFERENCE_ROUNDS, work.rounds)
    slow = [candidate.role == "reference" for candidate in candidates]
    times = _rounds(
        [probe.run for probe in probes] + ran,
        [work.calls if probe.kind == "null operator" else 1 for probe in probes]
        + [1 if s else work.calls for s in slow],
        [work.rounds] * len(probes) + [few if s else work.rounds for s in slow],
    )
    right = [truth.check(candidate, kept.answer) for candidate, kept in zip(candidates, ran, strict=True)]
    limit = limits.limit(work, probes, [statistics.median(t) for t in times[: len(probes)]], machine)
    times = times[len(probes) :]
    eager = min(statistics.median(t) for c, t in zip(candidates, times, strict=True) if c.role == "eager")
    rows = []
    for candidate, seconds, path, share in zip(candidates, times, paths, right, strict=True):
        median = statistics.median(seconds)
        low, high = _percentiles(seconds)
        peak = None
        if arguments.memory:
            peak = memory.peak_megabytes(work.key, candidate.name, threads=arguments.threads, quick=arguments.quick)
        rows.append({
            "name": candidate.name, "role": candidate.role, "path": path, "rounds": len(seconds),
            "median_s": median, "p10_s": low, "p90_s": high, "times_limit": median / limit.seconds,
            "best_eager_over_this": eager / median, "peak_mb": peak, "share_right_1pct": share,
        })  # fmt: skip
    return {
        "key": work.key, "title": str(work), "information": work.information, "N": work.N, "D": work.D, "C": work.C,
        "calls_per_sample": work.calls, "limit": {"seconds": limit.seconds, "text": limit.text},
        "probes": [p.name for p in probes], "rows": rows,
    }  # fmt: skip


def _path(work: works.Work) -> str:
    """Prove which code ran: the target and, for the head, the path."""
    config = flatcore.show_config()
    path = "" if work.question in ("row norms", "cotangent") else f", {config['last_path']}"
    return f"{config['cpu_target']}{path}"


def _percentiles(values: list[float]) -> tuple[float, float]:
    """10th and 90th percentile; the extremes where there are too few values."""
    if len(values) < 3:
        return min(values), max(values)
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _interval(low: float, high: float) -> str:
    if high < 1e-3:
        return f"{low * 1e6:.1f} - {high * 1e6:.1f} µs"
    return f"{low * 1e3:.2f} - {high * 1e3:.2f} ms"


HEADINGS = (
    "",
    "median",
    "10 % - 90 %",
    "times limit",
    "best eager / this",
    "peak MB",
    "rows right to 1 %",
    "rounds",
    "ran",
)


def _lines(entry: dict[str, Any]) -> list[tuple[str, ...]]:
    lines = [("limit", _time(entry["limit"]["seconds"]), "", "1.00", "", "", "", "", "")]
    for row in entry["rows"]:
        lines.append((
            row["name"], _time(row["median_s"]), _interval(row["p10_s"], row["p90_s"]),
            f"{row['times_limit']:.2f}", f"{row['best_eager_over_this']:.2f}",
            "" if row["peak_mb"] is None else f"{row['peak_mb']:.1f}",
            "" if row["share_right_1pct"] is None else f"{100 * row['share_right_1pct']:.0f} %",
            str(row["rounds"]), row["path"] or "",
        ))  # fmt: skip
    return lines


def _table(entry: dict[str, Any]) -> Table:
    table = Table(title=entry["title"] + (" (information, no goal yet)" if entry["information"] else ""))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("", "ran") else "right", no_wrap=True)
    for line in _lines(entry):
        table.add_row(*line)
    return table


def _show_origin(console: Console, origin: dict[str, Any]) -> None:
    console.print(", ".join(f"{name} {value}" for name, value in origin.items()))


def _markdown(report: dict[str, Any]) -> str:
    origin = report["provenance"]
    parts = ["# Benchmark report", ""]
    if report["quick"]:
        parts += ["**A smoke test (`--quick`): these times mean nothing.**", ""]
    parts += [f"- {name}: {value}" for name, value in origin.items()]
    parts += [f"- cache: {CACHE_NOTE}", "", "Probes of the machine (the fastest of each kind counts):", ""]
    parts += ["| probe | median | rate |", "|---|---:|---:|"]
    parts += [f"| {p['name']} | {_time(p['median_s'])} | {p['rate']:.1f} {p['unit']} |" for p in report["probes"]]
    for entry in report["works"]:
        parts += ["", f"## {entry['title']}" + (" (information, no goal yet)" if entry["information"] else ""), ""]
        parts += [f"Limit: {entry['limit']['text']}.", ""]
        parts += ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 2) + "---|"]
        parts += ["| " + " | ".join(line) + " |" for line in _lines(entry)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
