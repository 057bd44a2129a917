"""The whole run: the machine's probes, the works, growth; printed as it goes, and written after every work."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import flatcore

from . import clock, field, growth, limits, report
from .compare import FORMAT
from .inputs import SEED, forget
from .measure import Entry, Options, attempt
from .provenance import provenance, require_release_build
from .works import QUICK_ROUNDS, Work, select

GROWTH = "growth"


class NoDeviceError(RuntimeError):
    """The device that was asked for cannot be used."""


def probe_machine(device: str, quick: bool) -> list[dict[str, Any]]:
    """Time the machine's own figures: reads and copies of a buffer beyond the caches, square products."""
    rows = 512 if device == "cpu" else 4096
    x = torch.randn(rows, 150_528, generator=torch.Generator(device).manual_seed(SEED), device=device)
    sizes = (1024, 2048) if quick else (1024, 2048, 3072)
    probes = limits.read_probes(x) + limits.product_probes(sizes if device == "cpu" else (4096, 8192), device)
    probes += limits.product_probes((2048,) if device == "cpu" else (8192,), device, "bfloat16")
    for probe in probes:
        probe.run()
    timed = [clock.Timed(probe.run, QUICK_ROUNDS if quick else 9) for probe in probes]
    medians = [statistics.median(t) for t in clock.in_turn(timed, device)]
    return [
        {"name": p.name, "kind": p.kind, "median_s": median, "rate": p.rate(median), "unit": p.unit}
        for p, median in zip(probes, medians, strict=True)
    ]


@contextmanager
def surroundings(threads: int) -> Iterator[None]:
    """Threads, no gradients but where asked for, and no warnings of the rivals'."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")
            # BackPACK's hooks on a layer whose inputs need no gradient; PyHessian's graph of its gradients
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
            yield
    finally:
        torch.set_num_threads(before)
        forget()


def require_device(device: str) -> None:
    """Refuse a CUDA device that cannot be used.

    Raises:
        NoDeviceError: with the reason.
    """
    if device == "cuda" and not flatcore.cuda.is_available():
        reason = flatcore.cuda.show_config()["reason"]
        raise NoDeviceError(f"no CUDA kernel can run here ({reason}); --device cpu measures the processor")


class Run:
    """A report in the making."""

    def __init__(self, options: Options, out: Path | None, console: Console, until: float):
        self.options, self.out, self.console, self.until = options, out, console, until
        self.report: report.Report = {
            "format": FORMAT, "provenance": provenance(options.device), "quick": options.quick, "complete": False,
            "skipped": [], "probes": [], "works": [], "growth": [],
        }  # fmt: skip

    def probe(self) -> None:
        """The machine's probes, first of all."""
        self.options.probes = self.report["probes"] = probe_machine(self.options.device, self.options.quick)
        origin = self.report["provenance"]
        self.console.print(", ".join(f"{name} {value}" for name, value in origin.items()), highlight=False)
        if origin["extension_stale"] and self.options.native:
            self.console.print("[bold red]The extension is older than its sources: install again before quoting this.")
        for probe in self.report["probes"]:
            self.console.print(
                f"{probe['name']:<28} {probe['median_s'] * 1e3:9.2f} ms {probe['rate']:9.1f} {probe['unit']}",
                highlight=False,
            )
        self.console.print()

    def one(self, work: Work, key: str, **how: Any) -> Entry:
        """Measure one work, if there is time left."""
        if time.monotonic() > self.until:
            failed = "not begun: the seconds of --seconds had passed"
            return {"key": key, "title": str(work), "rows": [], "absent": [], "failed": failed, "wrong": False}
        return attempt(work, self.options, **how) | {"key": key}

    def works(self, works: list[Work]) -> None:
        """Every work's table."""
        for work in works:
            entry = self.one(work, work.key)
            self.report["works"].append(entry)
            self.console.print(report.table(entry), highlight=False)
            self.write()

    def compiled(self, works: list[Work]) -> None:
        """torch.compile's rivals beside flatcore, after all others: they compile for minutes, and a run may be cut short."""
        self.options.only, self.options.compile = ("native", "compile"), True
        for work in works:
            entry = self.one(work, f"{work.key}, compiled")
            entry["title"] += ", beside torch.compile"
            self.report["works"].append(entry)
            self.console.print(report.table(entry), highlight=False)
            self.write()

    def growth(self) -> None:
        """How times grow."""
        options = self.options
        memory, options.memory, options.only = options.memory, False, ()
        for moves, several in groupby(growth.works(quick=options.quick), key=lambda pair: pair[0]):
            entries = []
            for _, work in several:
                entry = self.one(work, work.key, everyone=growth.asked(options)) | {"moves": moves}
                entries.append({"N": work.N, "D": work.D, "C": work.C, "dtype": work.dtype} | entry)
            self.report["growth"] += entries
            self.console.print(report.growth_table(moves, entries), highlight=False)
            for entry in entries:
                if "failed" in entry:
                    self.console.print(f"{entry['title']}: {entry['failed']}", highlight=False)
            self.write()
        options.memory = memory

    def write(self) -> None:
        """Write what there is so far: a run that is cut short leaves what it has."""
        if self.out is None:
            return
        unfinished = self.out.with_name(self.out.name + ".part")
        unfinished.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.out)
        self.out.with_suffix(".md").write_text(report.markdown(self.report), encoding="utf-8")


def bench(
    options: Options, names: str | None, out: Path | None, *, seconds: float = math.inf, pictures: bool = True,
    console: Console | None = None,
) -> int:  # fmt: skip
    """Measure, print and write; 0, or 1 where an answer was wrong.

    Raises:
        UnknownWorkError: a name of ``names`` that no work has.
        NoDeviceError: the device cannot be used.
        UnfitBuildError: there is no extension, or one that must not be timed.
        OSError: ``out`` cannot be written.
    """
    wanted = None if names is None else [name.strip() for name in names.split(",") if name.strip()]
    grows = wanted is None or GROWTH in wanted
    others = None if wanted is None else ",".join(name for name in wanted if name != GROWTH)
    works = [] if others == "" else select(others, options.device)
    require_device(options.device)
    if options.native:
        require_release_build()
    skipped = [work.key for work in works if options.quick and wanted is None and not work.is_quick]
    works = [work.quick() if options.quick else work for work in works if work.key not in skipped]
    console = console or Console(width=None if sys.stdout.isatty() else 150)
    start = time.monotonic()
    last = options.device == "cuda" and options.compile  # of the passes: what compiles for minutes
    with surroundings(options.threads):
        run = Run(options, out, console, start + seconds)
        run.probe()
        if skipped:
            console.print(f"Left out by --quick: {', '.join(skipped)}\n", highlight=False)
        run.report["skipped"] = skipped
        if last:
            options.compile, options.why_not_compiled = False, "measured last, in a table of its own"
        run.works(works)
        if grows:
            run.growth()
        if last:
            run.compiled([work for work in works if options.native])
    run.report["complete"], run.report["seconds"] = True, time.monotonic() - start
    run.write()
    _finish(run, out, pictures)
    return int(any(entry["wrong"] for entry in (*run.report["works"], *run.report["growth"])))


def _finish(run: Run, out: Path | None, pictures: bool) -> None:
    """What the columns mean, who was absent for want of a package, and what was written."""
    found, say = run.report, run.console.print
    for heading, meaning in report.MEANINGS.items():
        say(f"{heading}: {meaning}", highlight=False)
    say(report.CACHE_NOTE, highlight=False)
    reasons = [each["reason"] for entry in found["works"] for each in entry["absent"]]
    if any(reason.startswith("cannot be imported") for reason in reasons):
        say(f"The tools that cannot be imported: {field.INSTALL}", highlight=False, soft_wrap=True)
    say(f"{found['seconds']:.0f} s on {os.cpu_count()} cores, {run.options.threads} threads.", highlight=False)
    if out is None:
        return
    written = [out, out.with_suffix(".md")]
    if pictures:
        from .pictures import draw

        written += draw(found, out)
    for path in written:
        say(f"Written: {path}", highlight=False, soft_wrap=True)
