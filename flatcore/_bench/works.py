"""The works that are timed: sizes, inputs, the questions asked of them and who answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import rivals
import torch
from torch import Tensor

import flatcore
from flatcore._engine import ops

SEED = 20240607
HIGHEST_GAP = 60.0


class Inputs(NamedTuple):
    """What a work is computed from.

    The row-norm work has only ``features``, its matrix (N, K); the cotangent works have ``features`` and ``target``, their
    logits (N, C) and labels.
    """

    features: Tensor  # (N, D)
    linear_weight: Tensor | None = None  # (C, D)
    linear_bias: Tensor | None = None  # (C,)
    target: Tensor | None = None  # (N,)

    def rows(self, index: Tensor) -> Inputs:
        """Return the chosen rows."""
        target = None if self.target is None else self.target[index]
        return self._replace(features=self.features[index], target=target)


@dataclass(frozen=True)
class Work:
    """One line of the performance goals: a question and the sizes at which it is asked."""

    key: str
    question: str  # a key of rivals.EAGER
    N: int
    D: int  # K for row norms, 0 for works on logits
    C: int
    rounds: int
    calls: int = 1  # calls per timed sample: 1 unless a call is too short for the clock
    information: bool = False  # no goal hangs on it yet

    @property
    def number(self) -> str:
        return self.key.partition("-")[0]

    def __str__(self) -> str:
        sizes = f"N={self.N:,}" + "".join(
            f", {k}={n:,}" for k, n in (("D" if self.C else "K", self.D), ("C", self.C)) if n
        )
        return f"{self.key}: {self.question}, {sizes}, float32"

    def quick(self) -> Work:
        """Return a smoke test of the same code: a 16th of the rows, 3 rounds. Its times mean nothing."""
        rows = self.N if self.calls > 1 else max(self.N // 16, 32)
        return replace(self, N=rows, rounds=3, calls=min(self.calls, 20))


WORKS = (
    Work("W1", "all fields", 100_000, 512, 10, rounds=21),
    Work("W2", "all fields", 50_000, 640, 100, rounds=15),
    Work("W3-trace", "trace", 8_192, 2_048, 1_000, rounds=9),
    Work("W3-neuronwise", "neuronwise", 8_192, 2_048, 1_000, rounds=9),
    Work("W4-trace", "trace, chunked", 1_024, 2_048, 32_000, rounds=4),
    Work("W4-neuronwise", "neuronwise, chunked", 1_024, 2_048, 32_000, rounds=4),
    Work("W5", "row norms", 512, 150_528, 0, rounds=21),
    Work("W6-forward", "mean layerwise", 128, 512, 10, rounds=31, calls=200, information=True),
    Work("W8-10", "cotangent", 1_000_000, 0, 10, rounds=15),
    Work("W8-1000", "cotangent", 16_384, 0, 1_000, rounds=15),
    Work("W8-100000", "cotangent", 256, 0, 100_000, rounds=9),
)


def select(names: str | None) -> list[Work]:
    """Works by key ("W3-trace") or number ("W3"), separated by commas; all without a name.

    Raises:
        SystemExit: an unknown name.
    """
    if not names:
        return list(WORKS)
    wanted = [name.strip() for name in names.split(",")]
    known = {work.key for work in WORKS} | {work.number for work in WORKS}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"unknown work {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return [work for work in WORKS if work.key in wanted or work.number in wanted]


def inputs(work: Work) -> Inputs:
    """Seeded inputs, drawn once and shared by the works of equal sizes."""
    return _inputs(work.N, work.D, work.C)


@lru_cache(maxsize=1)  # a work's inputs take up to 308 MB
def _inputs(n: int, d: int, c: int) -> Inputs:
    """Features phi = noise + a w_y with ||w_y|| near 1, so that a is the gap of the logits, log-uniform in 0.1 to 60.

    A trained network's rows: uncertain to very confident; a fifth have a gap above 17, where float32 closed forms fail.
    One label in ten is wrong.
    """
    generator = torch.Generator().manual_seed(SEED)
    if d == 0:  # logits: noise, and the label's raised by the gap
        target = torch.randint(c, (n,), generator=generator)
        logits = torch.randn(n, c, generator=generator)
        gap = 0.1 * (HIGHEST_GAP / 0.1) ** torch.rand(n, generator=generator)
        logits[torch.arange(n), target] += gap
        return Inputs(logits, target=target)
    features = torch.randn(n, d, generator=generator)
    if c == 0:
        return Inputs(features)
    weight = torch.randn(c, d, generator=generator) / math.sqrt(d)
    bias = 0.1 * torch.randn(c, generator=generator)
    label = torch.randint(c, (n,), generator=generator)
    lowest = 0.1
    gap = lowest * (HIGHEST_GAP / lowest) ** torch.rand(n, 1, generator=generator)
    for start in range(0, n, 4096):
        stop = start + 4096
        features[start:stop].addcmul_(gap[start:stop], weight[label[start:stop]])
    wrong = torch.rand(n, generator=generator) < 0.1
    return Inputs(features, weight, bias, torch.where(wrong, (label + 1) % c, label))


@dataclass(frozen=True)
class Candidate:
    """Someone who answers a work's question."""

    name: str
    role: str  # native, eager, compile, neighbour or reference
    run: Callable[[Inputs], Any]

    @property
    def is_exact(self) -> bool:
        """Held to flatcore's contract; the others to what their formula can give in float32."""
        return self.role in ("native", "reference")


def _flatcore(question: str, backend: str, x: Inputs) -> Any:
    with flatcore.backend(backend):
        if question == "row norms":
            return flatcore.row_norms(x.features)
        if question == "cotangent":  # what input_gradients calls: the public loss without autograd's own cost
            return ops.unmasked_cross_entropy(x.features, x.target, -100, with_cotangent=True)
        if question == "all fields":
            return flatcore.head_metrics(x.features, x.linear_weight, x.target, linear_bias=x.linear_bias)
        if question.startswith("trace"):
            return flatcore.hessian_trace(x.features, x.linear_weight, linear_bias=x.linear_bias, reduction="none")
        reduction, measure = ("mean", "layerwise") if question == "mean layerwise" else ("none", "neuronwise")
        return flatcore.relative_flatness(
            x.features, x.linear_weight, linear_bias=x.linear_bias, measure=measure, reduction=reduction
        )


def _rival(question: str, form: rivals.Rival, x: Inputs) -> Any:
    if question == "row norms":
        return form(x.features)
    if question == "cotangent":
        return form(x.features, x.target)
    if question == "all fields":
        return form(x.features, x.linear_weight, x.linear_bias, x.target)
    return form(x.features, x.linear_weight, x.linear_bias)


def _linear_cross_entropy(x: Inputs) -> Tensor:
    return torch.nn.functional.linear_cross_entropy(
        x.features, x.linear_weight, x.target, linear_bias=x.linear_bias, reduction="none"
    )


def candidates(work: Work, *, native: bool = True, compile: bool = True) -> list[Candidate]:
    """Everyone who answers, in the order of the table."""
    question = work.question
    found = [Candidate("native", "native", partial(_flatcore, question, "native"))] if native else []
    found += [
        Candidate(f"eager, {name}", "eager", partial(_rival, question, form))
        for name, form in rivals.EAGER[question].items()
    ]
    if compile:
        name, form = rivals.compiled(question)
        found.append(Candidate(f"torch.compile, {name}", "compile", partial(_rival, question, form)))
    if work.number == "W3" and hasattr(torch.nn.functional, "linear_cross_entropy"):
        found.append(Candidate("F.linear_cross_entropy", "neighbour", _linear_cross_entropy))
    found.append(Candidate("reference", "reference", partial(_flatcore, question, "reference")))
    return found
