"""What the benchmark files share: every candidate and every probe of a work is one benchmark in the work's group."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import lru_cache

import answers
import limits
import pytest
import torch
import works
from provenance import require_release_build

NATIVE = os.environ.get("FLATCORE_BENCH_NO_NATIVE", "0") != "1"
"""FLATCORE_BENCH_NO_NATIVE=1 runs the rivals and the probes alone, while the extension is not built."""


def pytest_configure(config: pytest.Config) -> None:
    if NATIVE:
        try:
            require_release_build()
        except SystemExit as refusal:
            raise pytest.UsageError(str(refusal)) from refusal
    torch.set_grad_enabled(False)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case per probe and per candidate of the works that the benchmark file names in WORKS."""
    found = []
    for work in metafunc.module.WORKS:
        small = works.inputs(work.quick())  # names only: large inputs are made when their case runs
        names = [f"limit, {probe.name}" for probe in limits.work_probes(work.quick(), small)]
        names += [candidate.name for candidate in works.candidates(work, native=NATIVE)]
        found += [pytest.param(work, name, id=f"{work.key}-{name}") for name in names]
    metafunc.parametrize(("work", "name"), found)


@lru_cache(maxsize=1)  # inputs are large, and the cases come work by work
def _prepared(work: works.Work) -> tuple[answers.Truth, dict[str, limits.Probe], dict[str, works.Candidate]]:
    x = works.inputs(work)
    probes = {f"limit, {probe.name}": probe for probe in limits.work_probes(work, x)}
    candidates = {candidate.name: candidate for candidate in works.candidates(work, native=NATIVE)}
    return answers.Truth(work, x), probes, candidates


@pytest.fixture
def time_case(benchmark) -> Callable[[works.Work, str], None]:
    """Time a probe; or check a candidate's answers, time it, and check again."""

    def run(work: works.Work, name: str) -> None:
        truth, probes, candidates = _prepared(work)
        benchmark.group = str(work)
        if name in probes:
            benchmark.pedantic(probes[name].run, rounds=work.rounds, iterations=work.calls, warmup_rounds=1)
            return
        x, candidate = works.inputs(work), candidates[name]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")
            truth.check(candidate, candidate.run(x))
        slow = candidate.role == "reference"
        answer = benchmark.pedantic(
            candidate.run, (x,), rounds=2 if slow else work.rounds, iterations=1 if slow else work.calls,
            warmup_rounds=0 if slow else 1,
        )  # fmt: skip
        truth.check(candidate, answer)

    return run
