"""What the machine can do at best, and the limit of each work in seconds that follows from it.

A work's limit is made of probes, run in the same rounds as the candidates: reads of the work's own matrix, products of
a size at which the library is fastest, the work's own products, or an empty operator. Of several probes of one kind
the fastest counts. The limit knows nothing about how flatcore works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import flatcore

from . import training
from .inputs import Inputs
from .works import BYTES, Work

CLASSES_OF_A_TILE = 2048
PIECES = {"float16": 2, "bfloat16": 3}
"""Factors of a 16-bit type that a float32 probability takes: 22 and 24 bits, which the stated accuracy needs on a GPU."""


@dataclass(frozen=True)
class Probe:
    """Something the machine does at its best rate."""

    name: str
    kind: str  # read, product, own (of this work: its limit is the fastest of them)
    amount: float  # bytes, operations, or 0
    run: Callable[[], Any]
    unit: str = "GB/s"
    calls: int = 1

    def rate(self, seconds: float) -> float:
        """GB/s or GFLOP/s."""
        return self.amount / seconds / 1e9


@dataclass(frozen=True)
class Limit:
    """The limit of a work, and how it was put together."""

    seconds: float
    text: str


def read_probes(x: Tensor) -> list[Probe]:
    """Return reads of a whole matrix (N, K); a copy counts the bytes read and the bytes written."""
    flat, copy = x.view(-1), torch.empty_like(x)
    return [
        Probe("sum", "read", x.nbytes, lambda: x.sum()),
        Probe("row max", "read", x.nbytes, lambda: x.amax(1)),
        Probe("L2 norm of rows", "read", x.nbytes, lambda: torch.linalg.vector_norm(x, dim=1)),
        Probe("dot", "read", x.nbytes, lambda: torch.dot(flat, flat)),
        Probe("copy", "read", 2 * x.nbytes, lambda: copy.copy_(x)),
    ]


def product_probes(sizes: Sequence[int], device: str, dtype: str = "float32") -> list[Probe]:
    """Square products, large enough for the library's full rate."""
    found = []
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        name = f"mm {size}x{size}x{size}" + ("" if dtype == "float32" else f" {dtype}")
        found.append(Probe(name, "product", 2.0 * size**3, product, "GFLOP/s"))
    return found


@lru_cache(maxsize=1)
def _null_operator() -> Callable[..., Tensor]:
    library = torch.library.Library("flatcore_bench", "DEF")
    library.define("null(Tensor features, Tensor weight, Tensor bias) -> Tensor")
    library.impl("null", lambda features, weight, bias: features.new_empty(()), "CompositeExplicitAutograd")
    _LIBRARIES.append(library)
    found: Callable[..., Tensor] = torch.ops.flatcore_bench.null.default
    return found


_LIBRARIES: list[torch.library.Library] = []  # operators live as long as their library


class _Null(torch.autograd.Function):
    """What any custom derivative costs: three saved tensors, three gradients that nothing fills."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, b)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def _null_function(x: Inputs) -> Callable[[], Any]:
    leaves = tuple(t.detach().clone().requires_grad_() for t in x.head)

    def run() -> Any:
        with torch.enable_grad():
            return torch.autograd.grad(_Null.apply(*leaves), leaves)  # type: ignore[no-untyped-call]

    return run


def second_products(work: Work, device: str) -> int:
    """How many products with probabilities the answer needs: on a GPU one for each of their pieces."""
    if work.measure == "trace":
        return 0
    return PIECES.get(work.dtype, 1) if device == "cuda" else 1


def _value_products(work: Work, x: Inputs) -> list[Probe]:
    """phi W^T, and for neuronwise the cheaper of (N, C)(C, C) and (N, C)(C, D); whole, and in tiles of classes."""
    features, weight, _ = x.head
    N, D, C = work.N, work.D, work.C
    count = second_products(work, features.device.type)
    right = features.new_empty(C, C).normal_() if C <= D else weight
    shares, logits = (features.new_empty(N, C).uniform_() for _ in range(2))
    second = features.new_empty(N, right.shape[1])

    def whole() -> None:
        torch.mm(features, weight.T, out=logits)
        for _ in range(count):
            torch.mm(shares, right, out=second)

    def tiled() -> None:
        part = logits.view(-1)[: N * CLASSES_OF_A_TILE].view(N, CLASSES_OF_A_TILE)
        for start in range(0, C, CLASSES_OF_A_TILE):
            tile = weight[start : start + CLASSES_OF_A_TILE]
            torch.mm(features, tile.T, out=part[:, : len(tile)])
            for _ in range(count):
                second.addmm_(part[:, : len(tile)], right[start : start + CLASSES_OF_A_TILE])

    width = {0: "", 1: f" and (N,C)(C,{'C' if C <= D else 'D'})"}.get(count, f" and {count} of (N,C)(C,D), its pieces'")
    operations = 2.0 * N * C * (D + count * right.shape[1])
    found = [Probe(f"own product phi W^T{width}", "own", operations, whole, "GFLOP/s")]
    if C > CLASSES_OF_A_TILE:
        found.append(Probe(f"the same, in tiles of {CLASSES_OF_A_TILE:,} classes", "own", operations, tiled, "GFLOP/s"))
    return found


def _gradient_products(work: Work, x: Inputs) -> list[Probe]:
    """What a gradient cannot do without: logits again, to the features, to W; for neuronwise two more, as directions."""
    features, weight, _ = x.head
    again = 1 if work.measure == "trace" else 2
    g = features.new_empty(work.N, work.C).normal_()
    to_features, to_weight = torch.empty_like(features), torch.empty_like(weight)

    def whole() -> None:
        for _ in range(again):
            torch.mm(features, weight.T, out=g)
        torch.mm(g, weight, out=to_features)
        for _ in range(again):
            torch.mm(g.T, features, out=to_weight)

    def tiled() -> None:
        for tile, of_tile in zip(weight.split(CLASSES_OF_A_TILE), to_weight.split(CLASSES_OF_A_TILE), strict=True):
            part = g.view(-1)[: work.N * len(tile)].view(work.N, len(tile))
            for _ in range(again):
                torch.mm(features, tile.T, out=part)
            to_features.addmm_(part, tile)
            for _ in range(again):
                torch.mm(part.T, features, out=of_tile)

    name = f"its {1 + 2 * again} products"
    found = [Probe(name, "own", work.operations, whole, "GFLOP/s")]
    if work.C > CLASSES_OF_A_TILE:
        found.append(
            Probe(f"{name}, in tiles of {CLASSES_OF_A_TILE:,} classes", "own", work.operations, tiled, "GFLOP/s")
        )
    return found


def work_probes(work: Work, x: Inputs, *, native: bool = True) -> list[Probe]:
    """Return the probes that this work's limit is made of."""
    device = x.features.device.type
    if work.question == "row norms":
        return read_probes(x.features)
    if work.question == "training step":
        return [Probe("the same step without the regulariser", "own", 0, training.Training(x).plain)]
    if work.question == "cotangent":
        copy = torch.empty_like(x.features)
        return [Probe("a copy of the logits", "own", 2 * copy.nbytes, lambda: copy.copy_(x.features))]
    if work.question == "all fields":
        sizes = (4096, 8192) if device == "cuda" else (1024, 2048)
        wide = product_probes(sizes, device)
        return (
            read_probes(x.features) + wide + (product_probes(sizes, device, work.dtype) if work.dtype in PIECES else [])
        )
    if work.question == "mean layerwise":
        if work.backward:
            name = "an autograd function that does nothing, forward and backward"
            return [Probe(name, "own", 0, _null_function(x), calls=work.calls)]
        null = _null_operator()
        name = "an operator that does nothing, through torch.library"
        return [Probe(name, "own", 0, lambda: null(*x.head), calls=work.calls)]
    if work.question == "data set trace":
        if not native:
            return _value_products(work, x)
        features, weight, bias = x.head

        def kernel() -> Any:
            with flatcore.backend("native"):
                return flatcore.head_metrics(features, weight, x.target, linear_bias=bias)

        return [Probe("W1's kernel on these rows, all fields", "own", 0, kernel)]
    return _gradient_products(work, x) if work.backward else _value_products(work, x)


def limit(work: Work, probes: list[Probe], seconds: list[float], machine: list[tuple[str, float, str]]) -> Limit:
    """Put a work's limit together from its probes and the median of each.

    Args:
        work: whose limit.
        probes: of :func:`work_probes`.
        seconds: the median of each.
        machine: kind, rate and name of the probes that were run before all works: the fastest counts, whenever it ran.
    """
    own = [(s, p) for p, s in zip(probes, seconds, strict=True) if p.kind == "own"]
    if own:
        fastest, probe = min(own, key=lambda pair: pair[0])
        rate = f" ({probe.rate(fastest):,.1f} {probe.unit})" if probe.amount else ""
        time = f"{fastest * 1e6:.1f} µs" if fastest < 1e-3 else f"{fastest * 1e3:.2f} ms"
        return Limit(fastest, f"{probe.name}: {time}{rate}")
    best = {}
    for kind in ("read", "product"):
        rated = [(p.rate(s), p.name) for p, s in zip(probes, seconds, strict=True) if p.kind == kind]
        of_dtype = [
            (rate, name) for k, rate, name in machine if k == kind and ("float16" not in name or work.dtype in name)
        ]
        best[kind] = max(rated + of_dtype, default=(0.0, ""))
    nbytes = float(BYTES[work.dtype]) * work.N * work.D
    read = nbytes / best["read"][0] / 1e9
    text = f"read {nbytes / 1e6:,.0f} MB at {best['read'][0]:,.1f} GB/s ({best['read'][1]}): {read * 1e3:.2f} ms"
    if work.question == "row norms":
        return Limit(read, text)
    multiply = work.operations / best["product"][0] / 1e9
    text += (f"; {work.operations / 1e9:.2f} GFLOP at {best['product'][0]:,.0f} GFLOP/s ({best['product'][1]}): "
             f"{multiply * 1e3:.2f} ms")  # fmt: skip
    return Limit(max(read, multiply), "the longer of " + text)
