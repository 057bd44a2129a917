"""Rows from explicit differences on a CUDA device, small heads' other norms, and the table of distances.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import emulation
import fuzz
import oracles
import pytest
import torch
from answers import Answers
from strategies import Call
from test_cuda_tiles import counted
from torch import Tensor

import flatcore
from flatcore import reference
from flatcore._check.tolerance import assert_same
from flatcore._engine import chunked_cuda, paths
from flatcore._engine import cuda as native_cuda
from flatcore._engine.head import Head
from flatcore.reference import FIELDS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BITS = {name: 1 << bit for bit, name in enumerate(FIELDS)}
NEURONWISE, L2 = BITS["log_neuronwise"], BITS["log_feature_gradient_norm"]
L1, LINF = BITS["log_feature_gradient_norm_1"], BITS["log_feature_gradient_norm_inf"]
GRADIENT_MEASURES = tuple(oracles.GRADIENTS.values())


def near(C: int, dtype: torch.dtype, logits: bool, seed: int = 0, D: int = 12, rows: int = 5) -> dict[str, Any]:
    """A head whose rows have all but little of their probability on six classes that nearly coincide, the last row not.

    The other classes are of 20 rows of W: the oracle counts equal ones.
    """
    g = torch.Generator().manual_seed(seed)
    kind = torch.arange(C) % 20
    weight = torch.randn(20, D, generator=g, dtype=torch.float64)[kind]
    group = torch.randperm(C, generator=g)[:6]
    base = torch.randn(D, generator=g, dtype=torch.float64)
    apart = 2.0**-6 if dtype == torch.bfloat16 else 2.0**-8
    weight[group] = base + apart * torch.randn(6, D, generator=g, dtype=torch.float64)
    features = torch.randn(rows, D, generator=g, dtype=torch.float64)
    size = torch.linspace(20, 40, rows, dtype=torch.float64)
    features[:-1] = 0.1 * features[:-1] + (size.unsqueeze(1) * base / base.square().sum())[:-1]
    z = torch.randn(rows, 20, generator=g, dtype=torch.float64)[:, kind]
    z[:-1, group] = 30 + torch.rand(rows - 1, 6, generator=g, dtype=torch.float64)
    target = group[torch.arange(rows) % 6]
    return {"features": features.to(dtype), "weight": weight.to(dtype), "logits": z.to(dtype) if logits else None,
            "target": target}  # fmt: skip


def wrong(call: Call, path: str) -> list[str]:
    return [f"{call.function}: {f.quantity}: {f.text}" for f in fuzz.run(call, path, Answers(call)) if not f.ratio <= 1]


def call_of(function: str, given: dict[str, Any], **changes: Any) -> Call:
    rows = len(given["target"])
    options: dict[str, Any] = {
        "kind": "near", "bias": None, "class_weight": None, "temperature": 1.0, "ignore_index": -100,
        "include_bias": False, "norm_power": 2, "reduction": "none", "log": True,
        "upstream": torch.linspace(-1, 2, rows, dtype=given["features"].dtype),
        "nothing": torch.zeros(rows, dtype=torch.bool),
    }  # fmt: skip
    return Call(function=function, **given, **(options | changes))


@pytest.mark.crossed
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", (False, True))
@pytest.mark.parametrize("function", ("neuronwise", *GRADIENT_MEASURES))
@pytest.mark.parametrize(
    "C, slots",
    (
        pytest.param(300, 512, id="spread"),  # over blocks: more than 256 classes
        pytest.param(300, 2, id="few-slots"),  # fewer than marked rows, which a block does alone
        pytest.param(40, 512, id="alone"),
    ),
)
def test_nearly_equal_rows_are_exact(
    one_thread: None,
    C: int,
    slots: int,
    function: str,
    logits: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values and gradients against 60 digits."""
    monkeypatch.setattr(chunked_cuda, "_MOST_SLOTS", slots)
    assert not wrong(call_of(function, near(C, dtype, logits)), "cuda-chunked")


def test_the_bias_as_a_column(one_thread: None) -> None:
    for C in (300, 40):
        given = near(C, torch.float32, False)
        b = torch.linspace(-1, 1, C)
        b[given["target"]] = 0.25 + torch.arange(5) / 64
        assert not wrong(call_of("neuronwise", given, bias=b, include_bias=True), "cuda-chunked")


@pytest.fixture
def kernels() -> Iterator[Any]:
    """The CUDA kernels over emulated threads, by force."""
    with flatcore.backend("native"), emulation.emulated():
        yield emulation.module()


def gradients(x: Tensor, w: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
    """Of neuronwise flatness, and of an L1 norm where there are labels."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    value = flatcore.relative_flatness(x, w, measure="neuronwise", log=True)
    if y is not None:
        value = value + flatcore.feature_gradient_norms(x, w, y, ord=1, reduction="mean")
    return value.detach(), *torch.autograd.grad(value, (x, w))


@pytest.mark.parametrize("backward", (False, True))
def test_a_row_is_spread_over_the_blocks_by_count(backward: bool, kernels: Any) -> None:
    """One marked row of 600 classes: no block of the busiest launches has more than an eighth of the work."""
    given = near(600, torch.float32, False, rows=2)
    x, w, y = given["features"][:1], given["weight"], given["target"][:1]
    kernels.work()
    if backward:
        gradients(x, w)
    else:
        flatcore.head_metrics(x, w, y)
    busiest = sorted(kernels.work(), reverse=True)[:3]
    assert all(all_blocks > 3e4 and most <= all_blocks / 8 for all_blocks, most in busiest), busiest


def test_where_no_row_is_marked_a_block_only_looks_by_count(kernels: Any) -> None:
    given = near(600, torch.float32, False, rows=2)
    x, w, y = given["features"][1:], given["weight"], given["target"][1:]  # an ordinary row
    devices = kernels.devices
    marked, ordinary = [], []
    for rows, found in ((given["features"][:1], marked), (x, ordinary)):
        kernels.work()
        before = devices.launches
        flatcore.head_metrics(rows, w, y)
        found += [devices.launches - before, kernels.work()[-2:]]
    assert marked[0] == ordinary[0]
    looked, merged = ordinary[1]
    assert looked[1] <= 256 * 16 and merged[1] <= 256 * 16, "a barrier or two of each thread"
    assert marked[1][0][0] > 20 * looked[0]


@pytest.mark.parametrize("order", ("backwards", "shuffled"))
def test_the_order_of_the_threads_does_not_count(order: str, kernels: Any) -> None:
    given = near(300, torch.float32, False, rows=3)
    found = gradients(given["features"], given["weight"], given["target"])
    with emulation.emulated(order):
        again = gradients(given["features"], given["weight"], given["target"])
    for i, (a, b) in enumerate(zip(again, found, strict=True)):
        assert_same(f"result {i}", a, b)


def test_more_marked_rows_than_w_takes_at_once(kernels: Any) -> None:
    """18 rows are added to W's gradient 16 at a time, with the sums of one row after the other."""
    given = near(300, torch.float64, False, rows=19)
    got = gradients(given["features"], given["weight"])
    with flatcore.backend("reference"):
        want = gradients(given["features"], given["weight"])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * b.abs().max().item())


# --------------------------------------------------------------------------------------------- small heads' other norms
def marks_of(head: Head, fields: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[int]]:
    """The fields of a small head from the rows' kernel, and which rows it marked."""
    core, marks = emulation.module(), []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

        def cuda_head_explicit(self, *given: Any) -> None:
            marks.extend(ctypes.string_at(given[5], given[4]))
            core.cuda_head_explicit(*given)

    monkeypatch.setattr(native_cuda, "cuda_module", Watched)
    with paths.forced(path="fused"):
        values, _ = native_cuda.head_metrics(head, fields, True)
    return values, marks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", (2, 10, 32))
def test_other_norms_of_a_small_head_are_no_rows_of_their_own(
    C: int, dtype: torch.dtype, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows' kernel has them: wrong labels, confident rows, ignored ones; as right as the others."""
    N, D = 70, 150
    g = torch.Generator().manual_seed(C)
    w = (torch.randn(C, D, generator=g) + 0.5).to(dtype)
    y = torch.arange(N) * 7 % C
    x = torch.randn(N, D, generator=g) + w[y].float() * torch.linspace(-0.2, 3, N).unsqueeze(1)
    y[::9] = -100
    head = Head(x.to(dtype), w, None, None, y, temperature=1.5)
    fields = L1 | L2 | LINF
    got, marks = marks_of(head, fields, monkeypatch)
    want = reference.head_metrics(
        head._replace(features=head.features.double(), linear_weight=w.double()), fields, True
    )[0]
    assert sum(map(bool, marks)) <= 0.05 * N
    logits = 4 * (2 * math.sqrt(D) + 4) * 2.0**-24 * (head.features.double() @ w.double().T).abs().max().item()
    bound = 1e-12 + 1e-13 * logits if dtype == torch.float64 else 4e-6 + 2 * logits
    torch.testing.assert_close(got.double(), want.double(), rtol=4 * 2.0**-24, atol=bound)
    given = head._replace(logits=head.features.double() @ w.double().T)
    got, _ = marks_of(given, fields, monkeypatch)
    torch.testing.assert_close(
        got, reference.head_metrics(given, fields, True)[0], rtol=1e-12, atol=1e-12
    )  # logits in float64 ask for float64


def test_other_norms_that_cancel_are_marked(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes with the label's row, classes about it, and one class alone."""
    g = torch.Generator().manual_seed(1)
    w = torch.randn(6, 40, generator=g)
    w[1] = w[0]
    w[2], w[3] = w[0] + 2.0**-12 * w[4], w[0] - 2.0**-12 * w[4]
    z = torch.tensor(
        [[9.0, 9, -200, -200, -200, -200], [0, 0, 50, 50, 0, 0], [0, -99, -99, -99, -99, -99], [0, 1, 2, 3, 4, 5]]
    )
    z[2, 1:] = -math.inf
    head = Head(torch.randn(4, 40, generator=g), w, None, z, torch.zeros(4, dtype=torch.int64))
    got, marks = marks_of(head, L1 | LINF, monkeypatch)
    assert [bool(mark) for mark in marks] == [True, True, False, False]
    want = reference.head_metrics(Head(*(None if t is None else t.double() if t.is_floating_point() else t
                                         for t in head.tensors)), L1 | LINF, True)[0]  # fmt: skip
    torch.testing.assert_close(got, want, rtol=4 * 2.0**-24, atol=4e-6)
    assert (got[:, 2] == -math.inf).all()


# ------------------------------------------------------------------------------------------------ the table of distances
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ("features", "logits", "bias"))
def test_the_table_of_distances_is_exact(case: str, dtype: torch.dtype, one_thread: None) -> None:
    """C <= D: values of wrong labels, confident rows, nearly equal rows and equal ones, without a gradient to follow."""
    C, D = 40, 48
    given = near(C, dtype, case == "logits", D=D, seed=3)
    given["target"][2] = 1
    bias = torch.linspace(-1, 1, C, dtype=torch.float32) if case == "bias" else None
    options = {"bias": bias, "upstream": None, "temperature": 1.5}
    for function in ("neuronwise", "feature_gradient_norms_2", "head_metrics"):
        if function not in (*oracles.GRADIENTS.values(), "neuronwise", "head_metrics"):
            continue
        include = case == "bias" and function == "neuronwise"
        assert not wrong(call_of(function, given, **options, include_bias=include), "cuda-chunked"), function


def test_the_table_takes_no_mean_by_count(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No (N, D) buffer, half the launches; neither depends on N."""
    D, C = 96, 50
    g = torch.Generator().manual_seed(0)
    w, found = torch.randn(C, D, generator=g), []
    for N in (3, 400):
        head = Head(torch.randn(N, D, generator=g), w, None, None, torch.arange(N) % C)
        with pytest.MonkeyPatch.context() as patch:
            found.append(counted(lambda head=head: native_cuda.head_metrics(head, NEURONWISE | L2, False), patch))
    assert found[0].launches == found[1].launches <= 12
    assert found[1].largest < 400 * D * 4
    call = [native_cuda.HeadCall(kernels, Head(torch.zeros(1, d), torch.zeros(c, d)), fields, 1)
            for d, c, fields in ((128, 128, NEURONWISE), (256, 129, NEURONWISE), (100, 101, L2), (128, 64, L1),
                                 (128, 64, BITS["log_hessian_trace"]))]  # fmt: skip
    assert [chunked_cuda.takes_table(kernels, c) for c in call] == [True, False, False, False, False]
    call[0].keeps = True
    assert not chunked_cuda.takes_table(kernels, call[0])


def test_a_head_of_zeros(kernels: Any) -> None:
    for C, D in ((2, 8), (40, 48)):
        w = torch.zeros(C, D)
        got = flatcore.head_metrics(torch.ones(3, D), w, torch.zeros(3, dtype=torch.int64))
        with flatcore.backend("reference"):
            want = flatcore.head_metrics(torch.ones(3, D), w, torch.zeros(3, dtype=torch.int64))
        for name in ("log_neuronwise", "log_feature_gradient_norm"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
