"""A head as the CUDA kernels take it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._chunked import address
from ._native import as_dtype, is_double, matrix, readable

_SCRATCH_BYTES = 16 << 20  # at most, for rows done from explicit differences; a block at a time needs 16 bytes a class
_MOST_SLOTS = 1024  # such blocks


class Head:
    """A head as the kernels take it, with the tensors whose memory it names."""

    def __init__(
        self,
        core: Any,
        features: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        logits: Tensor | None,
        target: Tensor | None,
        temperature: float,
        ignore_index: int,
        include_bias: bool,
        norm_power: int,
        fields: int,
        values: Tensor | None = None,
        prediction: Tensor | None = None,
    ):
        self.features, self.weight = readable(features), readable(linear_weight)
        self.logits = None if logits is None else readable(logits)
        self.bias = None if linear_bias is None else as_dtype(readable(linear_bias), torch.float64).contiguous()
        self.target = None if target is None else readable(target).contiguous()
        (self.N, self.D), self.C = features.shape, linear_weight.shape[0]
        self.fields, self.include_bias = fields, include_bias
        self.dtype = torch.float64 if is_double(features, linear_weight, logits) else torch.float32
        self.problem = core.HeadProblem(
            matrix(self.features), matrix(self.weight), matrix(self.logits), address(self.bias), address(self.target),
            self.N, self.D, self.C, temperature, ignore_index, include_bias, norm_power, fields,
            self.dtype is torch.float64, 1, address(values), values is not None and values.dtype is torch.float64,
            address(prediction),
        )  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Uninitialised memory on the head's device, from its framework's allocator."""
        return self.features.new_empty(shape, dtype=dtype)

    def explicit_slots(self) -> int:
        """How many rows are done from explicit differences at a time."""
        return max(1, min(-(-self.N // 128), _MOST_SLOTS, _SCRATCH_BYTES // (16 * self.C)))
