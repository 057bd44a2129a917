"""Arrays of NumPy and of other libraries in every layout that they have.

N = 4, D = 3, C = 5 unless a test says otherwise.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from refusing import D, N, arguments, refuses
from torch import Tensor

import flatcore
from flatcore._check.tolerance import assert_same
from flatcore._engine.memory import readable

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")


# ---------------------------------------------------------------------------------------------- arrays of other libraries
class Exchanged:
    """An array of a library that only speaks DLPack."""

    def __init__(self, tensor: Tensor, strides: tuple[int, ...] | None = None, error: Exception | None = None):
        self.tensor, self.error = tensor, error
        if strides is not None:
            self.strides = strides

    def __dlpack__(self, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self.tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


def test_arrays_through_dlpack(engine: str) -> None:
    right = arguments()
    expected = flatcore.hessian_trace(**right)
    assert torch.equal(
        flatcore.hessian_trace(**(right | {"linear_weight": Exchanged(right["linear_weight"])})), expected
    )
    # what the array says of its strides does not count, only what its capsule says
    elsewhere = Exchanged(right["linear_weight"], strides=(-3, 1))
    assert torch.equal(flatcore.hessian_trace(**(right | {"linear_weight": elsewhere})), expected)
    for error in (BufferError("no export"), RuntimeError("no export"), TypeError("no export")):
        closed = Exchanged(right["linear_weight"], error=error)
        refuses(
            TypeError,
            ("linear_weight", "Exchanged", "DLPack", "no export"),
            lambda closed=closed: flatcore.hessian_trace(**(right | {"linear_weight": closed})),
        )
    words = ("features", "Exchanged", "from_dlpack", "NumPy")
    refuses(TypeError, words, lambda: flatcore.hessian_trace(**(right | {"features": Exchanged(right["features"])})))


def _misaligned(x: np.ndarray) -> np.ndarray:
    memory = np.empty(x.nbytes + 1, dtype=np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


def _odd_stride(x: np.ndarray) -> np.ndarray:
    """Fields of packed records: rows 1 byte longer than their elements."""
    view = np.zeros(len(x), dtype=[("row", x.dtype, x.shape[1:]), ("flag", "u1")])["row"]
    view[...] = x
    assert view.strides[0] % x.itemsize or x.ndim == 1
    return view


def _read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "fortran": np.asfortranarray,
    "reversed-rows": lambda x: x[::-1].copy()[::-1],
    "reversed-columns": lambda x: x[..., ::-1].copy()[..., ::-1],
    "read-only": _read_only,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "misaligned": _misaligned,
    "odd-stride": _odd_stride,
    "every-second": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "broadcast": lambda x: np.broadcast_to(x, (2, *x.shape))[1],
}


@pytest.mark.filterwarnings("error")  # torch warns on read-only memory
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64))
def test_numpy_layouts(layout: str, dtype: Any, engine: str) -> None:
    right = {name: value.numpy() for name, value in arguments().items()}
    right = {name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in right.items()}
    expected = flatcore.hessian_trace(**right, reduction="none")
    assert type(expected) is np.ndarray and expected.dtype == (np.float64 if dtype is np.float64 else np.float32)
    before = {name: x.copy() for name, x in right.items()}
    changed = {name: LAYOUTS[layout](x) for name, x in right.items()}
    got = flatcore.hessian_trace(**changed, reduction="none")
    assert type(got) is np.ndarray and (got == expected).all()
    assert all((changed[name] == x).all() for name, x in before.items()), "an input was written to"
    norms = flatcore.row_norms(changed["features"])
    assert type(norms) is np.ndarray and (norms == flatcore.row_norms(right["features"])).all()


def test_a_file_mapped_read_only(tmp_path: Any, engine: str) -> None:
    right = arguments()
    path = tmp_path / "features.f4"
    right["features"].numpy().tofile(path)
    mapped = np.memmap(path, dtype=np.float32, mode="r", shape=(N, D))
    got = flatcore.hessian_trace(**(right | {"features": mapped}), reduction="none")
    assert (got == flatcore.hessian_trace(**right, reduction="none").numpy()).all()


# ---------------------------------------------------------------------------------------- memory that is not aligned
def _misaligned(x: Tensor) -> Tensor:
    """The same numbers, one byte beyond a boundary of their size, in the same strides."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.frombuffer(bytearray((last + 1) * x.itemsize + 1), dtype=x.dtype, offset=1, count=last + 1)
    return memory.as_strided(x.shape, x.stride()).copy_(x)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64), ids=str)
def test_memory_that_is_not_aligned_is_copied(path: str, dtype: torch.dtype) -> None:
    """A CUDA device faults on it; DLPack allows it."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(9, 33, generator=g).to(dtype)[:, ::2], torch.randn(33, 5, generator=g).to(dtype).T[:, ::2]
    b, y = torch.randn(5, generator=g).to(dtype), torch.arange(9) % 5
    crooked = [_misaligned(each) for each in (x, w, b, y)]
    assert all(each.data_ptr() % each.itemsize == 1 for each in crooked)
    for each, straight in zip(crooked, (x, w, b, y), strict=True):
        copied = readable(each)
        assert copied.data_ptr() % copied.itemsize == 0 and torch.equal(copied, straight)

    def answers(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor | None, ...]:
        leaves = x.requires_grad_(), w.requires_grad_()
        value = flatcore.relative_flatness(*leaves, y, linear_bias=b, measure="neuronwise", log=True)
        return *torch.autograd.grad(value, leaves), *flatcore.head_metrics(x.detach(), w.detach(), y, linear_bias=b)

    straight = [each.contiguous() for each in (x, w, b, y)]
    crooked = [_misaligned(each) for each in straight]
    for got, want in zip(answers(*crooked), answers(*straight), strict=True):
        if path == "reference":  # a library's product of float64 may take another way there
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)
        else:
            assert_same("the answer", got, want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_a_single_number_has_any_stride(path: str, dtype: torch.dtype) -> None:
    """A view of one class's bias has its parent's stride, and counts as contiguous."""
    x, w, b = torch.ones(2, 3, dtype=dtype), torch.ones(1, 3, dtype=dtype), torch.full((4, 3), 2, dtype=dtype)[:1, 0]
    assert b.stride() == (3,) and b.is_contiguous()
    assert_same("the trace", flatcore.hessian_trace(x, w, linear_bias=b), torch.zeros((), dtype=dtype))
