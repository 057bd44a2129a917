"""The gradient of a large head: tiles of classes outside, blocks of rows inside, as ``chunked_cpu``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import tiles
from .backend import _core
from .chunked_cpu import GRADIENT, LAYERWISE, NEURONWISE, Forward, Kept
from .memory import HeadCall, address
from .precision import full_precision
from .tiles import Order, padded

_EXPLICIT_BYTES = 4 << 20  # of dL/dz of rows done from explicit differences, at a time


def head_metrics_backward(
    cpu_target: str,
    call: HeadCall,
    upstream: Tensor,
    log_coefficient: Tensor | None,
    d_features: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    d_logits: Tensor | None,
) -> None:
    """Fill the wanted gradients.

    A row's derivative with respect to its log is c = ``upstream`` exp(``log_coefficient``), both (N,), float64.

    Three products for the trace and layerwise: z, and the gradients of features and weight. Five for neuronwise and the
    gradient norms, whose directions come in twice; two more (one for the trace) where nothing was kept of the values' loop.
    """
    for gradient in (d_weight, d_bias):
        if gradient is not None:
            gradient.zero_()
    backward = _Backward(cpu_target, call, upstream, log_coefficient, d_features, d_weight, d_bias, d_logits)
    with full_precision():
        for first, rows in backward.forward.blocks():
            backward.block(first, rows)
        backward.finish()


class _Backward:
    """The tiled loop of a gradient: buffers, and the products around head_backward_tile."""

    def __init__(
        self,
        cpu_target: str,
        call: HeadCall,
        upstream: Tensor,
        log_coefficient: Tensor | None,
        d_features: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        d_logits: Tensor | None,
    ):
        self.call, self.dtype, D, C = call, call.dtype, call.D, call.C
        self.head: Any = call.head
        self.d_features: Any = d_features
        self.d_weight: Any = d_weight
        self.d_bias: Any = d_bias
        self.d_logits: Any = d_logits
        self.neuronwise = bool(call.fields & NEURONWISE)
        self.weights = bool(call.fields & (NEURONWISE | GRADIENT))
        kept: Kept | None = call.prepared
        width = min(C, tiles.TILE_CLASSES)
        order = Order(C, width, None, None, None)  # the gradient's tiles have the classes in their own order
        itemsize = self.dtype.itemsize
        per_row = _core.HEAD_BACKWARD_ROW_BYTES + itemsize * (
            D * (4 if self.weights else 1) + (width if self.weights else 0)
        )
        self.forward = forward = Forward(cpu_target, call, also_per_row=per_row, kept=kept)
        known = forward.known
        self.known, self.order = known, order
        self.plain = forward.plain.in_classes_order()
        same = forward.centered is forward.plain
        self.centered = self.plain if same else forward.centered.in_classes_order()
        rows = padded(min(call.N, forward.block))
        self.numbers = torch.empty(rows * _core.HEAD_BACKWARD_ROW_BYTES, dtype=torch.uint8)
        # the values' tile of logits is free when a gradient's begins; it may be borrowed from the caller, or narrower
        free = forward.z is not None and len(forward.z) >= rows * width
        self.z = forward.z if free else torch.empty(rows * width, dtype=self.dtype)
        self.g: Any = torch.empty(rows * width, dtype=self.dtype) if self.weights else self.z
        self.direction: Any = torch.zeros(rows, D, dtype=self.dtype) if self.weights else None
        self.top_row: Any = torch.empty(rows, D, dtype=self.dtype) if self.neuronwise else None
        self.top_bias: Any = torch.empty(rows, dtype=torch.float64) if self.neuronwise else None
        self.top: Any = torch.empty(rows, dtype=torch.int64) if self.weights else None
        self.rows_of_weight: Any = torch.zeros(C, dtype=torch.float64) if self.neuronwise else None
        self.poisoned, self.share = False, torch.zeros((), dtype=torch.float64)  # share: sum of c
        self._upstream = upstream, log_coefficient  # their addresses are in the loop
        self.loop = _core.HeadBackwardLoop(
            cpu_target, call.problem, upstream.data_ptr(), address(log_coefficient), known.summary.data_ptr(),
            address(known.center), address(known.squares_by_class), forward.tails.data_ptr(), forward.all_tails,
            forward.state.data_ptr(), self.numbers.data_ptr(), address(forward.mean), address(self.direction),
            address(self.top_row), address(self.top_bias), address(self.top), address(d_features), address(d_weight),
            address(d_bias), forward.scratch.data_ptr(), known.equal_rows,
        )  # fmt: skip

    def block(self, first: int, rows: int) -> None:
        """Add a block of rows to all gradients."""
        call, forward, count = self.call, self.forward, padded(rows)
        if forward.is_known:
            forward.take_over(first, rows)
        else:
            forward.statistics(first, rows)
        forward.loop.values(first, rows)
        self.loop.rows(first, rows)
        numbers = self.numbers.view(torch.float64).view(-1, _core.HEAD_BACKWARD_ROW_BYTES // 8)[:rows]
        kinds = numbers[:, _core.HEAD_BACKWARD_ROW_KIND].view(torch.int64)
        self.poisoned |= bool((kinds == _core.POISONED_ROW).any())
        self.share += numbers[:, _core.HEAD_BACKWARD_ROW_C].sum()
        of_logits = self.head.logits is not None
        x = None if of_logits else forward.features(first, rows)
        kept: Any = None if of_logits or self.d_weight is None else _kept(x, numbers)
        here = slice(first, first + rows)
        mine: Any = None if of_logits or self.d_features is None else self.d_features[here]
        for start, stop in self.order.tiles():
            width = stop - start
            z = self.z[: count * width].view(count, width)
            g = self.g[: count * width].view(count, width)
            forward.logits_into(z, x, first, rows, start, stop, self.plain)
            if self.weights:
                self.centered.multiply(g, self.direction[:count], start, stop)
            self.loop.tile(first, rows, start, width, z.data_ptr(), g.data_ptr(), width)
            if self.d_logits is not None:
                self.d_logits[here, start:stop] = g[:rows]
            if mine is not None:
                self.plain.add(mine, g[:rows], start, stop)
            if kept is not None:
                self.d_weight[start:stop].addmm_(g[:rows].T, kept[:rows])
            if self.d_bias is not None and not of_logits:
                self.d_bias[start:stop] += g[:rows].sum(dim=0, dtype=torch.float64)
            if self.weights and self.d_weight is not None:
                self.d_weight[start:stop].addmm_(z[:rows].T, self.direction[:rows], alpha=-1 if self.neuronwise else 1)
            if self.neuronwise:
                self.rows_of_weight[start:stop] += z[:rows].sum(dim=0, dtype=torch.float64)
                if call.column is not None and self.d_bias is not None:
                    entry = numbers[:, _core.HEAD_BACKWARD_ROW_BIAS]
                    self.d_bias[start:stop] -= entry @ z[:rows].to(torch.float64)
        if self.neuronwise:
            if self.d_weight is not None:
                self.d_weight.index_add_(0, self.top[:rows], self.top_row[:rows])
            if call.column is not None and self.d_bias is not None:
                self.d_bias.index_add_(0, self.top[:rows], self.top_bias[:rows])
        elif self.weights:
            self._add_top(numbers, kinds, kept, mine, here)
        self._add_explicit((kinds == _core.EXPLICIT_ROW).nonzero().squeeze(1), first, kept, mine)

    def _add_top(self, numbers: Tensor, kinds: Tensor, kept: Any, mine: Any, here: slice) -> None:
        """The top class's part of a gradient norm with another label: what makes dL/dz sum to 0."""
        rows = len(numbers)
        top = self.top[:rows]
        labels = self.head.target[here]
        wanted = (kinds == _core.ORDINARY_ROW) & (top != labels)
        g = torch.where(wanted, -numbers[:, _core.HEAD_BACKWARD_ROW_OTHERS], 0)
        if self.d_logits is not None:
            at = self.d_logits[here].gather(1, top.unsqueeze(1)).squeeze(1)
            self.d_logits[here].scatter_(1, top.unsqueeze(1), torch.where(wanted, g.to(self.dtype), at).unsqueeze(1))
        factor = g.to(self.dtype).unsqueeze(1)
        if mine is not None:
            for start in range(0, rows, 256):
                part = slice(start, start + 256)
                mine[part] += factor[part] * self.head.linear_weight[top[part]].to(self.dtype)
        if kept is not None:
            self.d_weight.index_add_(0, top, factor * kept[:rows])
        if self.d_bias is not None and self.head.logits is None:
            self.d_bias.index_add_(0, top, g)

    def _add_explicit(self, index: Tensor, first: int, kept: Any, mine: Any) -> None:
        """Rows from explicit differences, as many at a time as a few MB of dL/dz hold."""
        if not len(index):  # split would give one part of no rows, and each tile of W for it
            return
        C = self.call.C
        for rows in index.split(max(1, _EXPLICIT_BYTES // (C * self.dtype.itemsize))):
            g = torch.empty(len(rows), C, dtype=self.dtype)
            self.loop.explicit_rows(first, rows.contiguous().data_ptr(), len(rows), g.data_ptr())
            if self.d_logits is not None:
                self.d_logits[first + rows] = g
            for start, stop in self.order.tiles():
                part = g[:, start:stop]
                if mine is not None:
                    for low, high, block in self.plain.pieces(start, stop):
                        mine[:, low:high].index_add_(0, rows, part @ block)
                if kept is not None:
                    self.d_weight[start:stop].addmm_(part.T, kept[rows])
            if self.d_bias is not None and self.head.logits is None:
                self.d_bias += g.sum(dim=0, dtype=torch.float64)

    def finish(self) -> None:
        """What comes once for all rows: W's own part, and the poison."""
        call, known, d_weight, d_bias = self.call, self.known, self.d_weight, self.d_bias
        scale, column = self.centered.scale, call.column
        if self.neuronwise and d_weight is not None:
            for start, stop in self.order.tiles():
                factor = self.rows_of_weight[start:stop].to(self.dtype).unsqueeze(1)
                for low, high, block in self.centered.pieces(start, stop):
                    d_weight[start:stop, low:high].addcmul_(factor, block)
        if self.neuronwise and column is not None and d_bias is not None:
            none = self.rows_of_weight == 0
            d_bias += torch.where(none, 0, self.rows_of_weight * (column * scale - known.center[call.D]))
        if call.fields & LAYERWISE and float(known.summary[0]) > -math.inf:
            half = (-0.5 * known.summary[0]).exp()  # in two steps: ||W||_F^-2 alone may leave the range
            factor = call.head.norm_power * self.share * half
            if d_weight is not None:
                for start, stop in self.order.tiles():
                    for low, high, block in self.plain.pieces(start, stop):
                        d_weight[start:stop, low:high] += block * float(half) * float(factor)
            if column is not None and d_bias is not None:
                d_bias += column * half * factor
        if self.poisoned:
            for gradient in (d_weight, d_bias):
                if gradient is not None:
                    gradient.fill_(math.nan)


def _kept(x: Any, numbers: Tensor) -> Tensor:
    """The features of a block, zero in the rows that add nothing: a NaN there must stay out."""
    none = numbers[:, _core.HEAD_BACKWARD_ROW_C] == 0
    if not none.any():
        return x
    return x[: len(numbers)].masked_fill(none.unsqueeze(1), 0)
