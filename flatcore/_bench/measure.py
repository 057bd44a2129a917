"""One work: answers checked, everybody timed in turn, answers checked again; a row for each, and who is absent."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import flatcore

from . import answers, candidates, clock, limits, memory
from .candidate import Absent, Candidate
from .inputs import Inputs, inputs
from .works import Work

BUDGET, QUICK_BUDGET = 10.0, 0.8
"""Seconds that one candidate's timed calls of one work may take, beyond the fewest rounds."""


@dataclass
class Options:
    """How the works are measured."""

    device: str = "cpu"
    threads: int = 1
    quick: bool = False
    native: bool = True
    compile: bool = True
    why_not_compiled: str = "left out by --no-compile"
    memory: bool = True
    only: tuple[str, ...] = ()  # roles; all without one
    probes: list[dict[str, Any]] = field(default_factory=list)  # of the machine, as report.json has them

    @property
    def budget(self) -> float:
        """Seconds for one candidate of one work."""
        return QUICK_BUDGET if self.quick else BUDGET


Entry = dict[str, Any]
Everyone = Callable[[Work], tuple[list[Candidate], list[Absent]]]


class _Kept:
    """Runs a candidate and keeps its last answer for the check after timing; of a sampler all of them."""

    def __init__(self, candidate: Candidate, x: Inputs):
        self.candidate, self.run, self.answer = candidate, candidate.prepare(x), None
        self.estimates: list[float] = []

    def __call__(self) -> None:
        self.answer = None  # its memory is free for the next
        self.answer = answer = self.run()
        if self.candidate.role == "sampling":
            self.estimates.append(answer.item())


def _everyone(work: Work, options: Options) -> tuple[list[Candidate], list[Absent]]:
    found, absent = candidates.candidates(
        work, native=options.native, compile=options.compile, reference=not options.quick and options.device == "cpu"
    )
    if options.only:
        return [c for c in found if c.role in options.only], []
    if not options.compile:
        absent.append(Absent("torch.compile", options.why_not_compiled))
    if not options.quick:
        away = [Absent("reference", "left out on a GPU, where its float64 would take the works' time")]
        return found, absent + away * (options.device == "cuda" and not work.backward)
    slow = ["reference"] * (not work.backward and work.question != "training step")
    slow += [candidate.name for candidate in found if not candidate.is_quick]
    absent += [Absent(name, "left out by --quick") for name in slow]
    return [candidate for candidate in found if candidate.is_quick], absent


def measure(work: Work, options: Options, everyone: Everyone | None = None) -> Entry:
    """Measure one work; its entry in the report.

    Raises:
        WrongAnswerError: flatcore's own answer is wrong.
        torch.OutOfMemoryError: the inputs do not fit.
    """
    found, absent = everyone(work) if everyone else _everyone(work, options)
    x = inputs(work, options.device)
    truth = answers.Truth(work, x)
    ran, firsts, rows, wrong = [], [], [], []
    for candidate in found:
        try:
            kept = _Kept(candidate, x)
            first = clock.seconds(kept, options.device)
            truth.check(candidate, kept.answer)
        except answers.WrongAnswerError as error:
            if candidate.role == "native":
                raise
            wrong.append(Absent(candidate.name, f"wrong answer, not timed: {error}"))
        except Exception as error:  # a rival's compiler or package has errors of its own
            if candidate.role == "native" and not isinstance(error, torch.OutOfMemoryError):
                raise answers.WrongAnswerError(f"{work.key}, native: {type(error).__name__}: {error}") from error
            absent.append(Absent(candidate.name, f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]))
        else:
            path = _path(work, options.device) if candidate.role == "native" else None
            ran.append((candidate, kept, path))
            firsts.append(first)
    probes = limits.work_probes(work, x, native=options.native)
    timed = []
    for probe in probes:
        probe.run()
        timed.append(clock.planned(probe.run, options.device, work.rounds, probe.calls, options.budget))
    for (candidate, kept, _), first in zip(ran, firsts, strict=True):
        if first > options.budget and candidate.role not in ("native", "compile"):  # which may have compiled
            timed.append(clock.Timed(kept, min(3 if options.quick else 2, work.rounds)))
        else:
            timed.append(clock.planned(kept, options.device, work.rounds, work.calls, options.budget))
    times = clock.in_turn(timed, options.device)
    limit = limits.limit(
        work, probes, [statistics.median(t) for t in times[: len(probes)]],
        [(p["kind"], p["rate"], p["name"]) for p in options.probes],
    )  # fmt: skip
    for (candidate, kept, path), taken, plan in zip(ran, times[len(probes) :], timed[len(probes) :], strict=True):
        try:
            checked = truth.check(candidate, kept.answer)
        except answers.WrongAnswerError as error:
            if candidate.role == "native":
                raise
            wrong.append(Absent(candidate.name, f"wrong answer after timing: {error}"))
            continue
        median, low, high = clock.spread(taken)
        over = median / limit.seconds
        if work.question == "training step":  # a few hundredths of a step: each round's own ratio, not the medians'
            over = statistics.median(a / b for a, b in zip(taken, times[0], strict=False))
        try:
            peak = _peak(work, kept, options)
        except RuntimeError as error:  # of a process of its own, or no memory left: the times stand
            peak = None
            absent.append(Absent(f"{candidate.name}'s memory", f"not measured: {error}".splitlines()[0][:200]))
        rows.append({
            "name": candidate.name, "role": candidate.role, "path": path, "rounds": len(taken), "calls": plan.calls,
            "median_s": median, "p10_s": low, "p90_s": high, "times_limit": over, "peak_mb": peak,
            "share_right_1pct": checked.right, "relative_error": _error(checked.error, kept, truth),
            "largest_error_in_tolerances": checked.tolerances, "note": candidate.note,
        })  # fmt: skip
    _compare(rows)
    return {
        "key": work.key, "title": str(work), "N": work.N, "D": work.D, "C": work.C, "dtype": work.dtype,
        "rows_are": work.rows,
        "operations": work.operations, "bytes": work.nbytes, "limit": {"seconds": limit.seconds, "text": limit.text},
        "rows": rows, "absent": [absentee._asdict() for absentee in (*wrong, *absent)], "wrong": bool(wrong),
    }  # fmt: skip


def _compare(rows: list[dict[str, Any]]) -> None:
    """Add each row's time over flatcore's, and the best eager form's over it."""
    eager = min((row["median_s"] for row in rows if row["role"] == "eager"), default=None)
    native = next((row["median_s"] for row in rows if row["role"] == "native"), None)
    for row in rows:
        row["over_native"] = None if native is None else row["median_s"] / native
        row["best_eager_over_this"] = None if eager is None else eager / row["median_s"]


def _error(error: float | None, kept: _Kept, truth: answers.Truth) -> float | None:
    """A sampler's is the root mean square over all its calls: one call's would be a matter of luck."""
    if not kept.estimates:
        return error
    exact = truth.fields["log_hessian_trace"].exp().mean().item()
    return float(statistics.fmean((e / exact - 1) ** 2 for e in kept.estimates) ** 0.5)


def _peak(work: Work, kept: _Kept, options: Options) -> float | None:
    if not options.memory:
        return None
    if options.device == "cuda":
        kept.answer = None
        return memory.cuda_megabytes(kept.run)
    return memory.peak_megabytes(work.key, kept.candidate.name, threads=options.threads, quick=options.quick)


def _path(work: Work, device: str) -> str:
    """Prove which code ran: the CPU target or the device and, for the head, the path."""
    config = flatcore.show_config()
    path = "" if work.question in ("row norms", "cotangent") else f", {config['last_path']}"
    return f"{config['cpu_target'] if device == 'cpu' else device}{path}"


def attempt(work: Work, options: Options, everyone: Everyone | None = None) -> Entry:
    """The work's entry, or why there is none: what goes wrong with one says nothing of the others."""
    failed: Entry = {"key": work.key, "title": str(work), "rows": [], "absent": []}
    try:
        return measure(work, options, everyone)
    except answers.WrongAnswerError as error:
        return failed | {"failed": f"wrong answer, not timed: {error}", "wrong": True}
    except (torch.OutOfMemoryError, MemoryError) as error:
        return failed | {"failed": f"out of memory: {(str(error).splitlines() or ['the inputs'])[0]}", "wrong": False}
    finally:
        if options.device == "cuda":
            torch.cuda.empty_cache()
