"""Time per call: of a CPU by the wall clock, of a CUDA device by its events; everybody in turn, round after round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

SAMPLE_SECONDS = 2e-3
"""Calls that are shorter are repeated until a sample takes so long: the clock and its own calls cost less than 1e-6."""
SLEEP_CYCLES = 4_000_000
"""About 2 ms on a GPU: longer than the host takes for a call's first launches."""


class Timed(NamedTuple):
    """A call, and how often it is made."""

    run: Callable[[], Any]
    rounds: int
    calls: int = 1


def seconds(run: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Seconds of a call: the mean of several on end.

    On a CUDA device a single call goes behind a sleeping kernel, so that the gaps before its launches are not counted;
    several on end have their gaps, which is what a work that is short of launches is about.
    """
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if calls == 1:
        torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def planned(run: Callable[[], Any], device: str, rounds: int, calls: int, budget: float, least: int = 3) -> Timed:
    """How often to make a call that has been made before: rounds as asked, but fewer, at least ``least``, beyond a budget.

    Args:
        run: the call; made once more here, which is its warm-up.
        device: "cpu" or "cuda".
        rounds: samples wanted.
        calls: calls to a sample; of a shorter sample on the CPU as many as take 2 ms.
        budget: seconds that all samples may take.
        least: samples that are taken however long they are.
    """
    once = max(seconds(run, device), 1e-9)
    if once < budget / 20:  # the first may have been anything
        once = max(min(once, *(seconds(run, device) for _ in range(3))), 1e-9)
    if device == "cpu" and once * calls < SAMPLE_SECONDS:
        calls = min(int(SAMPLE_SECONDS / once) + 1, 10_000)
    return Timed(run, max(min(rounds, int(budget / (once * calls))), min(least, rounds)), calls)


def in_turn(timed: Sequence[Timed], device: str) -> list[list[float]]:
    """Seconds per call of each: all in turn, each round beginning with another one, so that noise hits all alike."""
    times: list[list[float]] = [[] for _ in timed]
    for r in range(max((t.rounds for t in timed), default=0)):
        for k in range(len(timed)):
            i = (k + r) % len(timed)
            if r < timed[i].rounds:
                times[i].append(seconds(timed[i].run, device, timed[i].calls))
    return times


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile; the extremes where there are fewer than three values."""
    median = statistics.median(values)
    if len(values) < 3:
        return median, min(values), max(values)
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return median, cuts[0], cuts[-1]
