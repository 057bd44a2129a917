"""Large heads: tiles of classes outside, blocks of rows inside, around the library's matrix products, at bounded workspace.

For each tile of classes the library forms Z = Phi W_tile^T for a block of rows; a kernel merges it into the rows' running
statistics and turns it, in place, into shares u; the library adds u (W_tile - center) to the rows' sums. A kernel finishes.
Never N x C numbers, and W is read once for each product and block. Classes that share a row of W are brought together in one
of them before the second product (csrc/cpu/head_repeats.cpp); ``chunked_cpu_backward`` is the gradient's loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import FIELDS
from . import tiles
from .backend import _core
from .memory import HeadCall, address
from .precision import full_precision
from .tiles import Order, Rows, padded

NEURONWISE = 1 << FIELDS.index("log_neuronwise")
LAYERWISE = 1 << FIELDS.index("log_layerwise")
GRADIENT = sum(1 << bit for bit, name in enumerate(FIELDS) if name.startswith("log_feature_gradient_norm"))


def head_metrics(cpu_target: str, call: HeadCall) -> int:
    """Fill the problem's outputs; return the first row with a label that is no class, or -1."""
    known = Weights(cpu_target, call)
    is_plain = not call.keeps and call.head.logits is None and known.order.classes is None
    if is_plain and tiles.takes_own_products(call.N, call.head.linear_weight):
        return _few_rows(cpu_target, call, known)
    forward = Forward(cpu_target, call, known=known)
    first_bad = -1
    with full_precision():
        for first, rows in forward.blocks():
            bad = forward.statistics(first, rows)
            if bad >= 0 and first_bad < 0:
                first_bad = bad
            forward.loop.values(first, rows)
    call.prepared = Kept(forward.known, forward.tails if call.keeps else None, forward.mean, forward.block)
    return first_bad


def _few_rows(cpu_target: str, call: HeadCall, known: Weights) -> int:
    """The same for a few rows of a head without repeats: one buffer, and one call of the kernels for a tile.

    Of C = 300, D = 512 on one thread a row takes 90 us so, 130 on the way of any other (trace).
    """
    N, D, order, head, dtype = call.N, call.D, known.order, call.head, call.dtype
    weights = known.center is not None
    scratch = call.threads * _core.head_chunk_scratch(call.C, D) if weights else 0
    mean = N * D if weights else 0
    x = head.features
    if x.dtype != dtype or (x.stride(1) != 1 and D > 1):
        x = x.to(dtype).contiguous()
    sizes = (
        8 * scratch, N * _core.HEAD_TAIL_BYTES, N * _core.HEAD_ROW_BYTES, dtype.itemsize * mean,
        dtype.itemsize * N * order.width,
    )  # fmt: skip
    ends = list(accumulate(-(-size // 64) * 64 for size in sizes))
    buffer = torch.empty(ends[-1], dtype=torch.uint8)
    of_scratch, tails, state, sums, z = (buffer.data_ptr() + begin for begin in (0, *ends[:-1]))
    loop = _core.HeadLoop(
        cpu_target, call.problem, known.summary.data_ptr(), address(known.center), address(known.squares), 0, 0, 0, tails,
        False, state, sums if weights else 0, of_scratch, known.equal_rows,
    )  # fmt: skip
    first_bad, row = -1, x.stride(0)
    for start, stop in order.tiles():
        bad = loop.own_tile(0, N, start, stop - start, x.data_ptr(), row, z)
        first_bad = bad if first_bad < 0 else first_bad
    loop.values(0, N)
    return first_bad


class Kept(NamedTuple):
    """What the values' loop leaves for the gradient of its call."""

    known: Weights
    tails: Tensor | None  # the statistics of all rows, 72 bytes each, if a gradient is to follow
    mean: Tensor | None  # the last block's sums, which are all where there is one
    block: int


class Forward:
    """The tiled loop of a call: buffers, and the products around head_loop_statistics."""

    def __init__(
        self,
        cpu_target: str,
        call: HeadCall,
        also_per_row: int = 0,
        kept: Kept | None = None,
        known: Weights | None = None,
    ):
        """``also_per_row``: bytes of the caller's own buffers. ``kept``: the values' loop, for the gradient of its call."""
        self.call, self.N, self.D = call, call.N, call.D
        self.known = kept.known if kept is not None else known or Weights(cpu_target, call)
        dtype, known = call.dtype, self.known
        head: Any = call.head
        itemsize, order = dtype.itemsize, known.order
        scale = 2.0**known.exponent
        self.weights = known.center is not None
        shift = known.center[: self.D] if known.is_centered else None
        self.own = tiles.takes_own_products(self.N, head.linear_weight)
        self.plain = Rows(head.linear_weight, dtype, order, 1.0, None)
        self.centered = (
            Rows(head.linear_weight, dtype, order, scale, shift) if scale != 1 or shift is not None else self.plain
        )
        self.borrowed = head.logits is not None and head.logits.dtype == dtype and head.logits.stride(1) == 1
        self.borrowed &= not self.weights and order.classes is None
        scratch = call.threads * _core.head_chunk_scratch(call.C, self.D) if self.weights else 0
        fixed = known.nbytes + 8 * scratch + self.centered.nbytes
        fixed += self.plain.nbytes if self.plain is not self.centered else 0
        per_row = _core.HEAD_ROW_BYTES + _core.HEAD_TAIL_BYTES + itemsize * (order.near_count + self.D)
        per_row += 0 if self.borrowed else itemsize * order.width
        per_row += itemsize * self.D if self.weights else 0
        self.block = tiles.block_rows(per_row + also_per_row, fixed)
        rows = padded(min(self.N, self.block))
        self.z: Any = None if self.borrowed else torch.empty(rows * order.width, dtype=dtype)
        # taken over: the statistics of all rows, and the sums, if the field needs any, where one block had them all
        of_values = kept is not None and (not self.weights or kept.block >= self.N)
        tails = kept.tails if kept is not None and of_values else None
        self.is_known, self.all_tails = tails is not None, tails is not None or call.keeps
        self.mean: Any = None
        self.all_means: Any = None  # of all rows, where a gradient's own blocks are shorter
        if self.weights:
            known_mean = kept.mean if kept is not None and self.is_known else None
            if known_mean is not None and self.block < self.N:
                self.all_means, known_mean = known_mean, None
            self.mean = torch.empty(rows, self.D, dtype=dtype) if known_mean is None else known_mean
        self.near: Any = torch.empty(rows * order.near_count, dtype=dtype) if order.near_count else None
        self._features: Tensor | None = None
        self.scratch = torch.empty(scratch, dtype=torch.float64)
        length = (self.N if self.all_tails else rows) * _core.HEAD_TAIL_BYTES
        self.tails = tails if tails is not None else torch.empty(length, dtype=torch.uint8)
        self.state = torch.empty(rows * _core.HEAD_ROW_BYTES, dtype=torch.uint8)
        self.loop = _core.HeadLoop(
            cpu_target, call.problem, known.summary.data_ptr(), address(known.center), address(known.squares),
            address(order.classes), address(order.positions), address(known.bias), self.tails.data_ptr(), self.all_tails,
            self.state.data_ptr(), address(self.mean), self.scratch.data_ptr(), known.equal_rows,
        )  # fmt: skip

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First row and rows of each block."""
        return ((first, min(self.block, self.N - first)) for first in range(0, self.N, self.block))

    def features(self, first: int, rows: int) -> Tensor:
        """The block's features in the compute type, rows of zeros behind them up to what the library is given."""
        features, dtype, count = self.call.head.features, self.call.dtype, padded(rows)
        as_it_stands = (features.stride(1) == 1 or self.D <= 1) if self.own else count == rows
        if features.dtype == dtype and as_it_stands:
            return features[first : first + rows]
        if self._features is None or len(self._features) < count:
            self._features = torch.empty(count, self.D, dtype=dtype)
        block = self._features[:count]
        block[:rows].copy_(features[first : first + rows])
        block[rows:].zero_()
        return block

    def statistics(self, first: int, rows: int) -> int:
        """Run all tiles over a block; returns a row whose label is no class, or -1."""
        order: Any = self.known.order
        bad = -1
        x = self.features(first, rows) if self.call.head.logits is None else None
        for start, stop in order.tiles():
            at: tuple[int, int, int, int, int, int]
            at, near_first, near_last = order.repeats(start, stop)
            z = self.logits(x, first, rows, start, stop)
            near: Any = None
            if near_last > near_first:
                near = self.near[: padded(rows) * (near_last - near_first)].view(padded(rows), near_last - near_first)
            found = self.loop.statistics(
                first, rows, start, stop - start, z.data_ptr(), z.stride(0), *at, address(near)
            )
            bad = found if bad < 0 else bad
            if self.weights:
                if self.own:
                    self.loop.own_sums(rows, start, stop - start, z.data_ptr(), z.stride(0))
                else:
                    self.centered.add(self.mean[: padded(rows)], z, start, stop, is_first=start == 0)
                if near is not None:
                    self._add_near(self.mean[:rows], near[:rows], near_first, near_last)
        return bad

    def take_over(self, first: int, rows: int) -> None:
        """The sums of a block from the values' loop."""
        if self.all_means is not None:
            self.mean[:rows].copy_(self.all_means[first : first + rows])

    def logits(self, x: Any, first: int, rows: int, start: int, stop: int) -> Tensor:
        """A tile of logits: borrowed from the caller, copied from there, or multiplied."""
        if self.borrowed:
            given: Any = self.call.head.logits
            return given[first : first + rows, start:stop]
        count = padded(rows)
        z = self.z[: count * (stop - start)].view(count, stop - start)
        self.logits_into(z, x, first, rows, start, stop, self.plain)
        return z

    def logits_into(self, z: Tensor, x: Any, first: int, rows: int, start: int, stop: int, weight: Rows) -> None:
        """z = features W_tile^T, or what was given of it."""
        if x is None:
            logits: Any = self.call.head.logits
            given = logits[first : first + rows]
            z[:rows].copy_(given[:, start:stop] if weight.classes is None else given[:, weight.classes[start:stop]])
            z[rows:].zero_()
        elif self.own:
            in_order = weight.classes is not None
            self.loop.own_logits(
                rows, start, stop - start, in_order, x.data_ptr(), x.stride(0), z.data_ptr(), z.stride(0)
            )
        else:
            weight.multiply(z, x, start, stop)

    def _add_near(self, mean: Tensor, near: Tensor, first: int, last: int) -> None:
        """Add what the first rows of groups leave out, from differences of rows."""
        order: Any = self.known.order
        weight, scale = self.call.head.linear_weight, self.centered.scale
        # an eighth of a tile: what is taken out of W twice, in float64, once more and in the compute type
        for low in range(first, last, tiles.TILE_CLASSES // 8):
            high = min(low + tiles.TILE_CLASSES // 8, last)
            difference = weight[order.classes[order.near[low:high]]].to(torch.float64)
            difference -= weight[order.classes[order.near_of[low:high]]]
            difference *= scale
            mean.addmm_(near[:, low - first : high - first], difference.to(near.dtype))


class Weights:
    """What the kernels need of W alone, found once; a gradient takes it over from its forward pass.

    ``summary``: log ||W||_F^2, the power of two that brings W into range and whether the center is not 0; ``center``
    (D + 1,) and ``squares`` (C,) of the rows about it, by position in ``order`` and by class, where the fields ask for more
    than norms.
    """

    def __init__(self, cpu_target: str, call: HeadCall):
        D, C, fields = call.D, call.C, call.fields
        weights = bool(fields & (NEURONWISE | GRADIENT))
        self.center: Any = torch.empty(D + 1, dtype=torch.float64) if weights else None
        self.squares: Any = torch.empty(C, dtype=torch.float64) if weights else None
        self.summary = torch.zeros(3, dtype=torch.float64)
        keys = torch.empty(C + D + 1, dtype=torch.float64) if weights else None
        if weights or fields & LAYERWISE:
            row_workspace = torch.empty(2 * C, dtype=torch.float64)
            _core.head_summary(
                cpu_target, call.problem, row_workspace.data_ptr(), self.summary.data_ptr(), address(self.center),
                address(self.squares), address(keys),
            )  # fmt: skip
        _, exponent, is_centered = self.summary.tolist()
        self.exponent, self.is_centered = int(exponent), is_centered != 0
        self.order, self.equal_rows = _order(cpu_target, call, self.exponent, self.squares, keys)
        self.bias: Tensor | None = None
        self.squares_by_class = self.squares
        if self.squares_by_class is not None and self.order.classes is not None:
            self.squares = self.squares_by_class[self.order.classes]
            bias = call.bias
            self.bias = None if bias is None else bias[self.order.classes]
        self.nbytes = self.order.nbytes + 8 * (3 * C + D)


def _order(
    cpu_target: str, call: HeadCall, exponent: int, squares: Tensor | None, keys: Tensor | None
) -> tuple[tiles.Order, bool]:
    """The order of the classes, those together whose rows of W are equal or nearly so, and whether all rows are one."""
    C = call.C
    if squares is None or C < 2:
        return Order(C, tiles.TILE_CLASSES, None, None, None), C == 1
    members, near, near_of = (torch.empty(C, dtype=torch.int64) for _ in range(3))
    starts = torch.empty(C + 1, dtype=torch.int64)
    groups, near_count = _core.head_repeats(
        cpu_target, call.problem, exponent, squares.data_ptr(), address(keys), members.data_ptr(), starts.data_ptr(),
        near.data_ptr(), near_of.data_ptr(),
    )  # fmt: skip
    if not groups:
        return Order(C, tiles.TILE_CLASSES, None, None, None), False
    equal = near_count == 0 and int(starts[1]) == C
    return Order(C, tiles.TILE_CLASSES, members[: int(starts[groups])], starts[:groups], near[:near_count]), equal
