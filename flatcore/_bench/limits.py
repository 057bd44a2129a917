"""What the machine can do at best, and the limit of each work in seconds that follows from it.

A work's limit is made of probes, run in the same rounds as the candidates: reads of the work's own matrix, products of
a size at which the library is fastest, the work's own products, or an empty operator. Of several probes of one kind
the fastest counts. The limit knows nothing about how flatcore works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from works import Inputs, Work


@dataclass(frozen=True)
class Probe:
    """Something the machine does at its best rate."""

    name: str
    kind: str  # read, own copy (amount in bytes), product (amount in operations), own product, null operator
    amount: float
    run: Callable[[], Any]

    def rate(self, seconds: float) -> float:
        """GB/s or GFLOP/s, by kind."""
        return self.amount / seconds / 1e9


@dataclass(frozen=True)
class Limit:
    """The limit of a work, and how it was put together."""

    seconds: float
    text: str


def read_probes(x: Tensor) -> list[Probe]:
    """Return reads of a whole matrix (N, K); a copy counts the bytes read and the bytes written."""
    nbytes = x.numel() * x.element_size()
    flat, copy = x.view(-1), torch.empty_like(x)
    return [
        Probe("sum", "read", nbytes, lambda: x.sum()),
        Probe("row max", "read", nbytes, lambda: x.amax(1)),
        Probe("L2 norm of rows", "read", nbytes, lambda: torch.linalg.vector_norm(x, dim=1)),
        Probe("dot", "read", nbytes, lambda: torch.dot(flat, flat)),
        Probe("copy", "read", 2 * nbytes, lambda: copy.copy_(x)),
    ]


def product_probes(sizes: tuple[int, ...] = (1024, 2048, 3072)) -> list[Probe]:
    """Square float32 products, large enough for the library's full rate."""
    return [_product(f"mm {s}x{s}x{s}", "product", torch.randn(s, s), torch.randn(s, s)) for s in sizes]


def _product(name: str, kind: str, a: Tensor, b: Tensor) -> Probe:
    out = torch.empty(a.shape[0], b.shape[1])
    operations = 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
    return Probe(name, kind, operations, lambda: torch.mm(a, b, out=out))


@lru_cache(maxsize=1)
def _null_operator() -> Callable[..., Tensor]:
    library = torch.library.Library("flatcore_bench", "DEF")
    library.define("null(Tensor features, Tensor weight, Tensor bias) -> Tensor")
    library.impl("null", lambda features, weight, bias: features.new_empty(()), "CompositeExplicitAutograd")
    _LIBRARIES.append(library)
    return torch.ops.flatcore_bench.null.default


_LIBRARIES: list[torch.library.Library] = []  # operators live as long as their library


def work_probes(work: Work, x: Inputs) -> list[Probe]:
    """Return the probes that this work's limit is made of."""
    if work.question == "row norms":
        return read_probes(x.features)
    if work.question == "cotangent":
        copy = torch.empty_like(x.features)
        return [Probe("copy", "own copy", 2 * copy.nbytes, lambda: copy.copy_(x.features))]
    if work.question == "all fields":
        return read_probes(x.features) + product_probes((1024, 2048))
    if work.question == "mean layerwise":
        null = _null_operator()
        return [Probe("empty operator", "null operator", 1, lambda: null(x.features, x.linear_weight, x.linear_bias))]
    probes = [_product("own product phi W^T", "own product", x.features, x.linear_weight.T)]
    if work.question.startswith("neuronwise"):
        # the cheaper of (N, C)(C, C) and (N, C)(C, D); any values do
        right = torch.randn(work.C, work.C) if work.C <= work.D else x.linear_weight
        name = "own product (N,C)(C,C)" if work.C <= work.D else "own product (N,C)(C,D)"
        probes.append(_product(name, "own product", torch.rand(work.N, work.C), right))
    return probes


def limit(work: Work, probes: list[Probe], seconds: list[float], machine: list[tuple[str, float, str]]) -> Limit:
    """Put a work's limit together from its probes and the median of each.

    Args:
        work: whose limit.
        probes: of :func:`work_probes`.
        seconds: the median of each.
        machine: kind, rate and name of the probes that were run before all works: the fastest counts, whenever it ran.
    """
    if work.question == "mean layerwise":
        return Limit(seconds[0], "an operator that does nothing, through torch.library")
    if work.question == "cotangent":
        rate = probes[0].rate(seconds[0])
        return Limit(
            seconds[0], f"one read and one write of the logits: a copy, {seconds[0] * 1e3:.2f} ms ({rate:.1f} GB/s)"
        )
    own = [(p, s) for p, s in zip(probes, seconds, strict=True) if p.kind == "own product"]
    if own:
        parts = [f"{p.name} {s * 1e3:.1f} ms ({p.rate(s):.0f} GFLOP/s)" for p, s in own]
        return Limit(sum(s for _, s in own), " + ".join(parts))
    best = {}
    for kind in ("read", "product"):
        rated = [(p.rate(s), p.name) for p, s in zip(probes, seconds, strict=True) if p.kind == kind]
        best[kind] = max(rated + [(rate, name) for k, rate, name in machine if k == kind])
    nbytes = 4.0 * work.N * work.D
    read = nbytes / best["read"][0] / 1e9
    text = f"read {nbytes / 1e6:.0f} MB at {best['read'][0]:.1f} GB/s ({best['read'][1]}): {read * 1e3:.2f} ms"
    if work.question == "row norms":
        return Limit(read, text)
    operations = 2.0 * work.N * (work.D * work.C + work.D + work.C * work.C)
    multiply = operations / best["product"][0] / 1e9
    text += (f"; {operations / 1e9:.2f} GFLOP at {best['product'][0]:.0f} GFLOP/s ({best['product'][1]}): "
             f"{multiply * 1e3:.2f} ms")  # fmt: skip
    return Limit(max(read, multiply), "the longer of " + text)
