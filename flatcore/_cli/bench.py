"""``bench``: measure this machine, compare two reports, draw one."""

from __future__ import annotations

import argparse
import math

import torch

from .commands import check_writable, require


def run(arguments: argparse.Namespace) -> int:
    """Measure; or what the word after ``bench`` says."""
    return {None: _measure, "compare": _compare, "draw": _draw}[arguments.what](arguments)


def _measure(arguments: argparse.Namespace) -> int:
    require("rich", *["matplotlib"] * arguments.pictures, extra="bench")
    from .._bench.measure import Options
    from .._bench.run import bench

    out = arguments.out.absolute()
    out = out if out.suffix == ".json" else out / "bench.json"
    for path in (out, out.with_suffix(".md")):
        check_writable(path)
    quick = arguments.quick
    options = Options(
        device=arguments.device, threads=arguments.threads or torch.get_num_threads(), quick=quick, native=arguments.native,
        compile=arguments.compile and not quick, memory=arguments.memory and not quick,
        why_not_compiled="left out by --quick" if quick else "left out by --no-compile",
    )  # fmt: skip
    seconds = arguments.seconds or math.inf
    return bench(options, arguments.works, out, seconds=seconds, pictures=arguments.pictures)


def _compare(arguments: argparse.Namespace) -> int:
    require("rich", extra="bench")
    from rich.console import Console

    from .._bench import compare

    before, after = compare.read(arguments.before), compare.read(arguments.after)
    if not arguments.force:
        compare.require_same_machine(before, after)
    console = Console(width=None if Console().is_terminal else 200, highlight=False)
    for table in compare.tables(before, after):
        console.print(table)
    found = compare.changes(before, after)
    counts = {verdict: 0 for verdict in ("faster", "slower", "same within the spread")}
    for change in found:
        counts[change.verdict] += 1
    print(f"{len(found)} compared: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + ".")
    moved = compare.machine_moved(before, after)
    if moved is not None and not 0.95 < moved < 1.05:
        print(
            f"The limits themselves took {moved:.2f} times as long in B: the machine was busier in one of the two runs."
        )
    for letter, names in zip("AB", compare.unmatched(before, after), strict=True):
        if names:
            print(f"Only in {letter}: " + "; ".join(names) + ".")
    return 0


def _draw(arguments: argparse.Namespace) -> int:
    require("rich", "matplotlib", extra="bench")
    from .._bench import compare, pictures

    for path in pictures.draw(compare.read(arguments.report), arguments.report.absolute()):
        print(f"Written: {path}")
    return 0
