"""The formulas of kernel_costs.py against every load and store that the kernels make over emulated threads.

The kernels' files are compiled once more so that each access calls tests/emulator/traffic.cpp (two minutes); counted are
the bytes that a launch reads and writes at least once, and how often the large inputs are asked for.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import counting
import emulation
import kernel_costs
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import flatcore
from flatcore._engine import cuda as native_cuda
from flatcore._engine import paths, tiles
from flatcore._engine.head import Head
from flatcore.reference import FIELDS

pytestmark = pytest.mark.exhaustive
READ, WRITTEN, ASKED = 0, 1, 2
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Watching(counting.Counter):
    """A counter that lays each kernel call's formula beside the bytes that it touched."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic: Any = ctypes.CDLL(emulation.module().__file__)
        self.traffic.traffic_bytes.restype = ctypes.c_int64
        self.traffic.traffic_forget()
        self.kept: list[Tensor] = []  # memory that is watched may not become another tensor's
        self.before, self.rows = 0, list[tuple[str, float, int]]()

    def watch(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        self.kept.append(x)
        self.traffic.traffic_watch(ctypes.c_size_t(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()))

    def bytes_of(self, x: Tensor | None, kind: int) -> int:
        at = 0 if x is None else x.untyped_storage().data_ptr()
        found: int = self.traffic.traffic_bytes(ctypes.c_size_t(at), kind)
        return found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(function, types, args, kwargs)
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, Tensor):
                self.watch(x)
        return result

    def kernel(self, name: str, cost: kernel_costs.Cost) -> None:
        super().kernel(name, cost)
        now = self.bytes_of(None, READ) + self.bytes_of(None, WRITTEN)
        self.rows.append((name, cost.bytes, now - self.before))
        self.before = now


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(emulation, "module", emulation.watched_module)
    with counting.on_the_kernels_path():
        yield


def inputs(N: int, D: int, C: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(C)
    x, w, b = torch.randn(N, D, generator=g), torch.randn(C, D, generator=g) / D**0.5, torch.randn(C, generator=g)
    return x.to(dtype), w.to(dtype), b.double(), torch.arange(N) % C


def held(call: Callable[[], Any], *given: Tensor, room: float = 0.02, few: int = 300) -> Watching:
    """Run it; every kernel call's bytes are its formula's, within ``room`` and a few numbers."""
    counter = Watching()
    for x in given:
        counter.watch(x.detach())
    counting.counted(call, counter=counter)
    assert counter.rows
    for name, formula, seen in counter.rows:
        assert abs(formula - seen) <= room * seen + few, (name, formula, seen)
    return counter


@pytest.mark.parametrize("fields", ("all", "products"))
@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64), ids=str)
@pytest.mark.parametrize(("N", "D", "C"), ((64, 256, 10), (96, 512, 32)))
def test_fields_of_a_small_head(N: int, D: int, C: int, dtype: torch.dtype, fields: str) -> None:
    """``products``: without the norms that keep W whole beside 16-bit features."""
    x, w, b, y = inputs(N, D, C, dtype)
    wanted = (1 << len(FIELDS)) - 1 - (kernel_costs.OTHER_NORMS if fields == "products" else 0)
    head = Head(x, w, linear_bias=b, target=y)
    counter = held(lambda: native_cuda.head_metrics(head, wanted, False), x, w, b, y)
    assert paths.last_path == "fused"
    on_tensor_cores = dtype in (F16, BF16) and fields == "products"
    block = C if on_tensor_cores else {F64: 4, F32: 10}.get(dtype, 8)
    passes = -(-C // block)  # blocks of classes; past the first the cache has the rows
    assert x.nbytes <= counter.bytes_of(x, ASKED) <= passes * x.nbytes


@pytest.mark.parametrize("dtype", (F32, BF16, F64), ids=str)
@pytest.mark.parametrize("field", ("log_hessian_trace", "log_neuronwise", "all"))
def test_a_large_head(field: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile, up to how many rows of W are some row's top; of several, whose sums move by chance, a tenth of all."""
    N, D = 40, 64
    wanted = (1 << FIELDS.index(field)) if field != "all" else sum(
        1 << FIELDS.index(name) for name in ("confidence", "log_hessian_trace", "log_neuronwise", "loss")
    )  # fmt: skip
    for C, width, room in ((48, 2048, 0.05), (160, 32, 0.2)):
        monkeypatch.setattr(tiles, "TILE_CLASSES", width)
        x, w, _, y = inputs(N, D, C, dtype)
        head = Head(x, w, target=y)
        with paths.forced("chunked"):
            counter = held(lambda head=head: native_cuda.head_metrics(head, wanted, False), x, w, y, room=room)
        formula, seen = (sum(row[i] for row in counter.rows) for i in (1, 2))
        assert abs(formula - seen) <= 0.1 * seen
        assert counter.calls["statistics"] == -(-C // width)


@pytest.mark.parametrize("include_bias", (False, True))
@pytest.mark.parametrize("field", ("log_neuronwise", "log_feature_gradient_norm", "both"))
def test_a_head_by_its_table_of_distances(field: str, include_bias: bool) -> None:
    x, w, b, y = inputs(40, 64, 48, F32)
    wanted = sum(1 << bit for bit, name in enumerate(FIELDS) if name == field or (
        field == "both" and name in ("log_neuronwise", "log_feature_gradient_norm")))  # fmt: skip
    head = Head(x, w, linear_bias=b, target=y, include_bias=include_bias)
    with paths.forced("chunked"):
        counter = held(lambda: native_cuda.head_metrics(head, wanted, False), x, w, b, y, room=0.05)
    assert counter.calls["table"] == 1


@pytest.mark.parametrize("dtype", (F32, torch.float16), ids=str)
@pytest.mark.parametrize(("N", "K"), ((9, 1000), (3, 40_000), (2, 16_384)))
def test_row_norms(N: int, K: int, dtype: torch.dtype) -> None:
    x = torch.randn(N, K).to(dtype)
    counter = held(lambda: flatcore.row_norms(x), x)
    assert counter.bytes_of(x, ASKED) == x.nbytes


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("measure", ("trace", "layerwise", "neuronwise", "gradient"))
def test_a_small_heads_measure_and_its_gradient(measure: str, dtype: torch.dtype) -> None:
    x, w, b, y = inputs(64, 128, 10, dtype)
    x.requires_grad_()
    w.requires_grad_()

    def call() -> Any:
        if measure == "trace":
            value = flatcore.hessian_trace(x, w, linear_bias=b)
        elif measure == "gradient":
            value = flatcore.feature_gradient_norms(x, w, y, linear_bias=b, reduction="mean")
        else:
            value = flatcore.relative_flatness(x, w, linear_bias=b, measure=measure)
        return torch.autograd.grad(value, (x, w))

    counter = held(call, x, w, b, y, room=0.05)
    assert counter.calls == {"head_measure": 1, "head_measure_backward": 1}
