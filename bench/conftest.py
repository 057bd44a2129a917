"""What the benchmark files share: every candidate and every probe of a work is one benchmark in the work's group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import lru_cache

import pytest
import torch

from flatcore._bench import answers, limits
from flatcore._bench.candidate import Candidate
from flatcore._bench.candidates import candidates
from flatcore._bench.inputs import inputs
from flatcore._bench.provenance import UnfitBuildError, require_release_build
from flatcore._bench.run import surroundings
from flatcore._bench.works import Work

NATIVE = os.environ.get("FLATCORE_BENCH_NO_NATIVE", "0") != "1"
"""FLATCORE_BENCH_NO_NATIVE=1 runs the rivals and the probes alone, while the extension is not built."""


def pytest_configure(config: pytest.Config) -> None:
    if NATIVE:
        try:
            require_release_build()
        except UnfitBuildError as refusal:
            raise pytest.UsageError(str(refusal)) from refusal


@pytest.fixture(autouse=True)
def as_the_command_runs() -> Iterator[None]:
    with surroundings(torch.get_num_threads()):
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case per probe and per candidate of the works that the benchmark file names in WORKS."""
    found = []
    for work in metafunc.module.WORKS:
        few = work.quick()  # names only: large inputs are made when their case runs
        names = [f"limit, {probe.name}" for probe in limits.work_probes(few, inputs(few), native=NATIVE)]
        names += [candidate.name for candidate in candidates(work, native=NATIVE)[0]]
        found += [pytest.param(work, name, id=f"{work.key}-{name}") for name in names]
    metafunc.parametrize(("work", "name"), found)


@lru_cache(maxsize=1)  # inputs are large, and the cases come work by work
def _prepared(work: Work) -> tuple[answers.Truth, dict[str, limits.Probe], dict[str, Candidate]]:
    x = inputs(work)
    probes = {f"limit, {probe.name}": probe for probe in limits.work_probes(work, x, native=NATIVE)}
    return answers.Truth(work, x), probes, {each.name: each for each in candidates(work, native=NATIVE)[0]}


@pytest.fixture
def time_case(benchmark) -> Callable[[Work, str], None]:
    """Time a probe; or check a candidate's answers, time it, and check again."""

    def run(work: Work, name: str) -> None:
        truth, probes, everyone = _prepared(work)
        benchmark.group = str(work)
        if name in probes:
            benchmark.pedantic(probes[name].run, rounds=work.rounds, iterations=work.calls, warmup_rounds=1)
            return
        candidate = everyone[name]
        call = candidate.prepare(inputs(work))
        truth.check(candidate, call())
        slow = candidate.role in ("reference", "sampling", "tool")
        answer = benchmark.pedantic(
            call,
            rounds=2 if slow else work.rounds,
            iterations=1 if slow else work.calls,
            warmup_rounds=0 if slow else 1,
        )
        truth.check(candidate, answer)

    return run
