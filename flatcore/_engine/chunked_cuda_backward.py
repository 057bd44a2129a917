"""The gradient of a head on a CUDA device: tiles of classes outside, blocks of rows inside, as ``chunked_cuda``.

As ``chunked_cpu_backward``, but nothing waits for the device: W's poison stays there, and what the top classes and the rows
from explicit differences add is added by kernels. A small head of few rows has kernels of its own (``cuda.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..reference import FIELDS
from .chunked_cpu import GRADIENT, LAYERWISE, NEURONWISE
from .chunked_cuda import Forward, Kept, padded
from .memory import HeadCall, address
from .precision import full_precision

SIGNS = sum(1 << FIELDS.index(name) for name in ("log_feature_gradient_norm_1", "log_feature_gradient_norm_inf"))
"""Measures whose gradient is made of signs: another sweep over the tiles makes sure of those."""


def head_metrics_backward(
    core: Any,
    where: tuple[int, int],
    call: HeadCall,
    upstream: Tensor,
    log_coefficient: Tensor | None,
    d_features: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    d_logits: Tensor | None,
) -> None:
    """Fill the wanted gradients, d_weight and d_bias from zeros; upstream exp(log_coefficient) is dL/dlog v_n."""
    backward = _Backward(core, where, call, upstream, log_coefficient, d_features, d_weight, d_bias, d_logits)
    with full_precision(call.head.features.device.type):
        for first, rows in backward.forward.blocks():
            backward.block(first, rows)
        backward.finish()


class _Backward:
    """The tiled loop of a gradient: buffers, and the products around head_backward_tile."""

    def __init__(
        self,
        core: Any,
        where: tuple[int, int],
        call: HeadCall,
        upstream: Tensor,
        log_coefficient: Tensor | None,
        d_features: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        d_logits: Tensor | None,
    ):
        self.core, self.call, self.dtype = core, call, call.dtype
        self.head: Any = call.head
        self.d_features: Any = d_features
        self.d_weight: Any = d_weight
        self.d_bias: Any = d_bias
        self.d_logits: Any = d_logits
        self.neuronwise = bool(call.fields & NEURONWISE)
        self.weights = bool(call.fields & (NEURONWISE | GRADIENT))
        kept: Kept | None = call.prepared
        D, C, itemsize = call.D, call.C, call.dtype.itemsize
        width = padded(min(C, core.HEAD_TILE_BYTES // itemsize))
        # z where the values' loop needs none, g, direction, top_row, and the features in the compute type
        per_row = (
            core.HEAD_BACKWARD_ROW_BYTES + 16 + itemsize * (width * (1 + self.weights) + D * (2 + 2 * self.weights))
        )
        self.signs = bool(call.fields & SIGNS)
        per_row += 8 * D if self.signs else 0
        per_row += 8 * core.cuda_head_explicit_row(D) if self.weights else 0
        self.forward = forward = Forward(core, where, call, per_row, kept, for_gradient=True)
        self.known = known = forward.known
        rows = min(call.N, forward.block)
        width = padded(known.order.width)
        self.z = forward.z if forward.z is not None else call.empty(rows * width, dtype=self.dtype)
        self.g: Any = call.empty(rows * width, dtype=self.dtype) if self.weights else self.z
        self.numbers = call.empty(rows, core.HEAD_BACKWARD_ROW_BYTES // 8)
        self.direction: Any = call.empty(rows, D, dtype=self.dtype) if self.weights else None
        self.top_row: Any = call.empty(rows, D, dtype=self.dtype) if self.neuronwise else None
        self.top_bias: Any = call.empty(rows) if self.neuronwise else None
        self.top: Any = call.empty(rows, dtype=torch.int64) if self.weights else None
        self.rows_of_weight: Any = call.empty(C).zero_() if self.neuronwise else None
        self.poison, self.share = call.empty(1).zero_(), call.empty(1).zero_()  # NaN if a row is poisoned; sum of c
        exact = call.empty(rows, D).zero_() if self.signs else None  # a component left out is read as 0
        scratch: Any = None  # of the rows that are done from explicit differences
        if self.weights:
            slices = forward.slots * core.cuda_head_explicit_slot(D)
            scratch = call.empty(rows * core.cuda_head_explicit_row(D) + slices)
        self._addresses = upstream, log_coefficient, exact, scratch  # what the loop has the addresses of
        self.loop = core.HeadBackwardLoop(
            *where, call.problem, upstream.data_ptr(), address(log_coefficient), known.summary.data_ptr(),
            address(known.center), address(known.squares), address(known.found), forward.tails.data_ptr(),
            forward.all_tails, forward.state.data_ptr(), self.numbers.data_ptr(), address(forward.mean),
            address(self.direction), address(self.top_row), address(self.top_bias), address(self.top),
            address(d_features), address(d_weight), address(d_bias), address(d_logits), address(exact),
            address(forward.special), address(scratch), forward.slots,
        )  # fmt: skip

    def block(self, first: int, rows: int) -> None:
        """Add a block of rows to all gradients."""
        call, forward, core = self.call, self.forward, self.core
        if not forward.is_known:
            forward.statistics(first, rows)
        forward.loop.values(first, rows)
        self.loop.rows(first, rows)
        numbers = self.numbers[:rows]
        poisoned = (numbers[:, core.HEAD_BACKWARD_ROW_KIND].view(torch.int64) == core.POISONED_ROW).any()
        self.poison += torch.where(poisoned, math.nan, 0.0)
        self.share += numbers[:, core.HEAD_BACKWARD_ROW_C].sum()
        here = slice(first, first + rows)
        given = self.head.logits is not None
        x = forward.features(first, rows)
        mine: Any = None if given or self.d_features is None else self.d_features[here]
        kept: Any = None
        if not given and self.d_weight is not None:
            # a row that adds nothing stays out, whatever stands in it
            none = numbers[:, core.HEAD_BACKWARD_ROW_C] == 0
            kept = self.head.features[here].to(self.dtype).masked_fill(none.unsqueeze(1), 0)
        if self.signs:
            for start, stop in self.known.order.tiles():
                z = self.logits(x, here, start, stop)
                self.loop.unsure_tile(first, rows, start, stop - start, z.data_ptr(), 0)
            self.loop.unsure(first, rows)
        for start, stop in self.known.order.tiles():
            classes, width = stop - start, padded(stop - start)
            z = self.logits(x, here, start, stop)
            g = self.g[: rows * width].view(rows, width)[:, :classes]
            if self.weights:
                forward.centered.multiply(g, self.direction[:rows], start, stop)
            self.loop.tile(first, rows, start, classes, z.data_ptr(), g.data_ptr())
            if self.d_logits is not None:
                self.d_logits[here, start:stop] = g
            if mine is not None:
                forward.plain.add(mine, g, start, stop)
            if kept is not None:
                self.d_weight[start:stop].addmm_(g.T, kept)
            if self.d_bias is not None and not given:
                self.d_bias[start:stop] += g.sum(dim=0, dtype=torch.float64)
            if self.weights and self.d_weight is not None:
                self.d_weight[start:stop].addmm_(z.T, self.direction[:rows], alpha=-1 if self.neuronwise else 1)
            if self.neuronwise:
                self.rows_of_weight[start:stop] += z.sum(dim=0, dtype=torch.float64)
                if call.column is not None and self.d_bias is not None:
                    self.d_bias[start:stop] -= numbers[:, core.HEAD_BACKWARD_ROW_BIAS] @ z.to(torch.float64)
        if self.weights:
            self.loop.tops(first, rows)
            self.loop.explicit_rows(first, rows)

    def logits(self, x: Tensor | None, here: slice, start: int, stop: int) -> Tensor:
        """A tile of logits: multiplied, or copied from where they were given."""
        rows, width = here.stop - here.start, padded(stop - start)
        z: Tensor = self.z[: rows * width].view(rows, width)[:, : stop - start]
        if x is None:
            z.copy_(self.head.logits[here, start:stop])
        else:
            self.forward.logits_into(z, x, start, stop)
        return z

    def finish(self) -> None:
        """What comes once for all rows: W's own part, and the poison."""
        call, known, d_weight, d_bias = self.call, self.known, self.d_weight, self.d_bias
        column = call.column
        if self.neuronwise and d_weight is not None:
            for start, stop in known.order.tiles():
                factor = self.rows_of_weight[start:stop].to(self.dtype).unsqueeze(1)
                for low, high, block in self.forward.centered.pieces(start, stop):
                    d_weight[start:stop, low:high].addcmul_(factor, block)
        if self.neuronwise and column is not None and d_bias is not None:
            centered = column * torch.exp2(known.summary[1]) - known.center[call.D]
            d_bias += torch.where(self.rows_of_weight == 0, 0, self.rows_of_weight * centered)
        if call.fields & LAYERWISE:
            # in two steps: ||W||_F^-2 alone may leave the range; W = 0 has no gradient
            half = torch.where(known.summary[0] == -math.inf, 0, (-0.5 * known.summary[0]).exp())
            factor = self.head.norm_power * self.share * half
            if d_weight is not None:
                for start, stop in known.order.tiles():
                    for low, high, block in self.forward.plain.pieces(start, stop):
                        d_weight[start:stop, low:high] += block * half.to(self.dtype) * factor.to(self.dtype)
            if column is not None and d_bias is not None:
                d_bias += column * half * factor
        if d_weight is not None:
            d_weight += self.poison.to(self.dtype)
        if d_bias is not None:
            d_bias += self.poison
