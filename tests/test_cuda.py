"""The CUDA kernels: numbers on a device or, without one, over emulated threads; streams, graphs and memory on a device.

Letters: N rows of K entries.
"""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator

import emulation
import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

import flatcore
from flatcore._check.tolerance import assert_same, assert_within, cotangent_tolerance, tolerance

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDTHS = (1, 2, 3, 7, 8, 9, 31, 33, 127, 129, 1023, 1024, 1025, 16383, 16384, 16385, 49157)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    """The kernels by force."""
    with flatcore.backend("native"), emulation.cuda_kernels():
        yield


def check(x: Tensor) -> None:
    """All three norms of a finite CUDA matrix."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    got = flatcore.row_norms(x)
    assert got.device == x.device
    for ord, norms in zip((1, 2, math.inf), got.cpu(), strict=True):
        truth = oracles.exact_row_norms(x.cpu(), ord)
        with np.errstate(divide="ignore"):
            bound = tolerance("row_norm", truth, np.log(truth), dtype, terms=x.shape[1])
        if ord == math.inf:
            bound = type(bound)(0.0, 0.0)
        assert_within(f"ord {ord} of {tuple(x.shape)} {x.dtype}", norms, truth, bound, dtype)


@pytest.mark.crossed
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("offset", (0, 1, 3))
def test_widths_and_misaligned_rows(width: int, dtype: torch.dtype, offset: int) -> None:
    whole = torch.randn(3, width + offset, dtype=torch.float64)
    whole[0, -1] = 40  # a tail that is dropped shows in every norm
    whole = whole.to(DEVICE, dtype)
    check(whole[:, offset:])
    check(whole.T.contiguous().T[:, offset:])


@pytest.mark.parametrize("size", (1e200, 1e300, 1e-160, 1e-300, 1e-320))
@pytest.mark.parametrize("width", (65, 2000, 20000))
def test_squares_beyond_the_range(size: float, width: int) -> None:
    check((torch.rand(2, width, dtype=torch.float64) * size).to(DEVICE))


@pytest.mark.needs("cuda")
def test_many_rows_and_nan_in_its_row_only() -> None:
    x = torch.randn(100_003, 37, device="cuda")
    x[5, 36], x[99_999, 0] = math.nan, math.inf
    got = flatcore.row_norms(x)
    assert got.isnan().nonzero()[:, 1].tolist() == [5, 5, 5]
    assert (got[:, 99_999] == math.inf).all()
    with flatcore.backend("reference"):
        want = flatcore.row_norms(x)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-6, atol=0)
    assert_same("two runs", flatcore.row_norms(x).cpu(), got.cpu())


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    "classes", (2, 3, 10, 33, 1000, 1024, 1025, pytest.param(20_000, marks=pytest.mark.exhaustive))
)
def test_unmasked_cross_entropy(classes: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(classes)
    z = (4 * torch.randn(5, classes, generator=g, dtype=torch.float64)).to(dtype)
    z[1, 1] = 120.0  # beyond what float32's usual gradient sees
    y = torch.tensor([0, 1, classes - 1, 1, 0])
    leaf = z.to(DEVICE, copy=True).requires_grad_()
    loss = flatcore.unmasked_cross_entropy(leaf, y.to(DEVICE), reduction="none")
    loss.sum().backward()
    truth, result = oracles.exact_cross_entropy(z, y), torch.float64 if dtype == torch.float64 else torch.float32
    bound = tolerance("loss", truth["loss"], truth["log_loss"], result)
    assert_within("loss", loss.detach().cpu(), truth["loss"], bound, result)
    assert_within("cotangent", leaf.grad.cpu(), truth["cotangent"], cotangent_tolerance(dtype))


@pytest.mark.needs("cuda")
def test_unmasked_bad_rows_are_nan_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatcore._engine import backend as _backend

    z = torch.randn(4, 10, device="cuda")
    z[1, 3] = math.nan
    y = torch.tensor([0, 1, 10, -100], device="cuda")
    loss = flatcore.unmasked_cross_entropy(z, y, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False] and loss[3] == 0
    monkeypatch.setattr(_backend, "validate_on_device", True)
    with pytest.raises(ValueError, match="got 10 in row 2"):
        flatcore.unmasked_cross_entropy(z, y)


@pytest.mark.needs("cuda")
def test_beyond_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("10 GiB of device memory are not free")
    x = torch.zeros(3, 1 << 30, dtype=torch.float16, device="cuda")
    x[2, -1] = 3
    assert flatcore.row_norms(x).tolist() == [[0, 0, 3]] * 3


@pytest.mark.needs("cuda")
def test_the_callers_stream() -> None:
    """The norms of a matrix that is still being filled on a side stream are those of the filled one."""
    stream = torch.cuda.Stream()
    x = torch.zeros(512, 20_000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.fill_(1)
        got = flatcore.row_norms(x, ord=1)
    stream.synchronize()
    assert (got == 20_000).all()


# what is called, after W (C, D) and x (8, D) were made; W's library products need their handles first
CALLS = {
    "short rows": (3, 100, "flatcore.row_norms(x, ord=1)"),
    "long rows": (3, 20_000, "flatcore.row_norms(x, ord=1)"),
    "small head": (10, 33, "flatcore.head_metrics(x, W, y).layerwise"),
    "small measure": (10, 33, "flatcore.relative_flatness(x, W, measure='neuronwise')"),
    "large head": (100, 33, "flatcore.head_metrics(x, W, y).neuronwise"),
    "half head": (100, 33, "flatcore.head_metrics(x.half(), W.half(), y).neuronwise"),
    "head by tiles": (5000, 33, "flatcore.head_metrics(x, W, y).neuronwise"),
    "half head by tiles": (5000, 33, "flatcore.head_metrics(x.half(), W.half(), y).neuronwise"),
    "gradient by tiles": (
        5000, 33, "torch.autograd.grad(flatcore.relative_flatness(x, W.requires_grad_(), measure='neuronwise'), W)[0]",
    ),
    "gradient": (10, 33, "torch.autograd.grad(flatcore.relative_flatness(x, W.requires_grad_()), W)[0]"),
    "gradient of a small norm": (
        10, 33, "torch.autograd.grad(flatcore.feature_gradient_norms(x, W.requires_grad_(), y, reduction='mean'), W)[0]",
    ),
    "gradient of a large head": (100, 33, "torch.autograd.grad(flatcore.relative_flatness(x, W.requires_grad_()), W)[0]"),
    "gradient of a norm": (
        100, 33, "torch.autograd.grad(flatcore.feature_gradient_norms(x, W.requires_grad_(), y, reduction='mean'), W)[0]",
    ),
    "cotangent": (1500, 33, "flatcore.unmasked_cross_entropy(x @ W.T, y)"),
}  # fmt: skip


@pytest.mark.needs("cuda")
@pytest.mark.parametrize("call", CALLS)
def test_graph_capture_as_the_first_call_of_a_process(call: str) -> None:
    classes, width, expression = CALLS[call]
    script = f"""
        import torch, flatcore
        g = torch.Generator("cuda").manual_seed(0)
        W = torch.randn({classes}, {width}, generator=g, device="cuda")
        x, y = torch.zeros(8, {width}, device="cuda"), torch.arange(8, device="cuda") % {classes}
        # the library's handles are per thread: this one's, and that of autograd's backward pass
        torch.mm(x, W.T), torch.mm(x.half(), W.half().T)
        leaf = W.clone().requires_grad_()
        (x @ leaf.T).sum().backward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with flatcore.backend("native"):
            with torch.cuda.graph(graph):
                got = {expression}
            x.normal_()
            graph.replay()
            torch.testing.assert_close(got, {expression}, rtol=0, atol=0)
        torch.cuda.synchronize()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.needs("cuda")
@pytest.mark.parametrize("call", CALLS)
def test_nothing_waits_for_the_device(call: str) -> None:
    classes, width, expression = CALLS[call]
    given = {
        "W": torch.randn(classes, width, device="cuda"), "x": torch.randn(8, width, device="cuda"),
        "y": torch.arange(8, device="cuda") % classes, "torch": torch, "flatcore": flatcore,
    }  # fmt: skip
    eval(expression, given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype, once in a process
        torch.cuda.set_sync_debug_mode("error")
    try:
        eval(expression, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.needs("cuda")
def test_another_device_is_left_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device only")
    x = torch.ones(4, 2000, device="cuda:1")
    assert flatcore.row_norms(x, ord=1).tolist() == [2000.0] * 4
    assert torch.cuda.current_device() == 0
