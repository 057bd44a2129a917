"""Tensors become addresses: what the kernels read and write, and the tensors whose memory it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arguments.arrays import aligned
from .._arguments.checks import is_exact
from .head import Head, is_double

_DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def address(x: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if x is None else x.data_ptr()


def matrix(x: Tensor) -> tuple[int, int, int, int]:
    """Address, strides in elements and dtype code of a 2-D tensor."""
    row, column = x.stride()
    return x.data_ptr(), row, column, _DTYPE_CODE[x.dtype]


def one_row(x: Tensor) -> tuple[int, int, int, int]:
    """The same of a vector, as a matrix of one row; the stride of a single element may be anything, contiguous or not."""
    return x.data_ptr(), 0, x.stride(0) if x.shape[0] != 1 else 1, _DTYPE_CODE[x.dtype]


def readable(x: Tensor) -> Tensor:
    """A tensor whose memory holds its values as they are, aligned, and that autograd does not follow.

    No lazy negation, no subclass's view of them. Detaching takes 2 us: not where nothing is recorded anyway.
    """
    if not (is_exact(x) and not x.is_neg() and not (x.requires_grad and torch.is_grad_enabled())):
        x = x.detach().resolve_neg()
    return aligned(x)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in another type; a conversion that has nothing to do takes 1 us nevertheless."""
    return x if x.dtype is dtype else x.to(dtype)


def in_dtypes_of(head: Head, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of ``Head.inputs`` in their dtypes; one is wanted only of an input that is there."""
    # a list first: a tuple made from a generator is resized, and the collector counts each as an object that stays
    found = [
        None if x is None or gradient is None else as_dtype(gradient, x.dtype)
        for x, gradient in zip(head.inputs, gradients, strict=True)
    ]
    return tuple(found)


class HeadCall:
    """A call for a head, as the kernels take it; holds the tensors whose addresses ``problem`` has.

    ``head`` has readable tensors, contiguous labels, and a bias that is contiguous float64 or, where it is taken, any
    float32. The module finds most heads so; the others are made so.
    """

    # in the host's memory, where a tensor's conversion takes 3.5 us, a sixth of what a small call takes beside its kernel
    takes_float32_bias = False
    prepared: Any = None  # what a chunked loop has found out that a gradient can take over
    keeps = False  # whether a gradient will

    def __init__(self, core: Any, head: Head, fields: int, threads: int):
        self.head, self.fields, self.threads = head, fields, threads
        # under grad mode autograd would follow what the loops do with a tensor that requires gradient
        self.problem = core.HeadProblem.of(head, fields, threads, torch.is_grad_enabled(), self.takes_float32_bias)
        if self.problem is None:
            self.head = head = self._readable(head)
            self.problem = core.HeadProblem(
                head, matrix(head.features), matrix(head.linear_weight),
                None if head.logits is None else matrix(head.logits),
                None if head.linear_bias is None else one_row(head.linear_bias), address(head.target),
                head.N, head.D, head.C, fields, is_double(head), threads,
            )  # fmt: skip
        self.N, self.D, self.C, self.double = self.problem.size

    def _readable(self, head: Head) -> Head:
        bias, logits, target = head.linear_bias, head.logits, head.target
        return Head.of(
            (
                readable(head.features),
                readable(head.linear_weight),
                None if bias is None else self._bias(readable(bias)),
                None if logits is None else readable(logits),
                None if target is None else readable(target).contiguous(),
            ),
            head.options,
        )

    def outputs(self, wide_result: bool) -> tuple[Tensor, Tensor]:
        """The memory that the kernels write: the chosen fields (K, N), and the prediction (N,)."""
        wide = wide_result or self.double
        values = self.empty(self.fields.bit_count(), self.N, dtype=torch.float64 if wide else torch.float32)
        prediction = self.empty(self.N, dtype=torch.int64)
        self.problem.write_to(values.data_ptr(), wide, prediction.data_ptr())
        return values, prediction

    @property
    def dtype(self) -> torch.dtype:
        """The compute type."""
        return torch.float64 if self.double else torch.float32

    def _bias(self, bias: Tensor) -> Tensor:
        if self.takes_float32_bias and bias.dtype is torch.float32:
            return bias
        return as_dtype(bias, torch.float64).contiguous()

    @property
    def bias(self) -> Tensor | None:
        """The bias in float64."""
        bias = self.head.linear_bias
        return None if bias is None else as_dtype(bias, torch.float64)

    @property
    def column(self) -> Tensor | None:
        """The bias where it counts as a column of W."""
        return self.bias if self.head.include_bias else None

    def empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Uninitialised memory on the head's device, from its framework's allocator."""
        return self.head.features.new_empty(shape, dtype=dtype)
