"""Large heads on a CUDA device: tiles of classes outside, blocks of rows inside, as ``chunked_cpu``, at bounded workspace.

For each tile the library forms Z = Phi W_tile^T into a tile of logits that stays in the second-level cache; one kernel
merges it into the rows' running statistics and turns it into shares u; the library adds u (W_tile - center) to the rows'
sums. Nothing waits for the device: the power of two that scales W stays there, equal rows of W are found and brought
together there, and rows that need explicit differences are found by the kernels. ``chunked_cuda_backward`` is the
gradient's loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import FIELDS
from . import tiles
from .chunked_cpu import GRADIENT, LAYERWISE, NEURONWISE
from .memory import HeadCall, address
from .precision import full_precision
from .tiles import Order, Rows

WORKSPACE_BYTES = 256 << 20
"""Bound of all buffers of one call, in bytes, unless a few rows need more; what is kept of each row for a gradient, 80
bytes, comes on top."""
_TILE_BYTES = 16 << 20
"""Logits of a tile and a block of rows: 2,048 rows of 2,048 classes. They stay in the second-level cache (40 MB at compute
capability 8.0, 50 MB at 9.0) from the product to the statistics and, as shares, to the next product."""
_SCRATCH_BYTES = 16 << 20  # at most, for slices of rows done from explicit differences
_MOST_SLOTS = 512  # such slices, a block of threads each: two to each of an H100's processors, twice

TABLE = NEURONWISE | 1 << FIELDS.index("log_feature_gradient_norm")
"""Fields that the table of distances gives."""

_PIECES = {torch.float16: 2, torch.bfloat16: 3}  # of a share that keep 22 and 24 bits of it


def takes_half_products() -> bool:
    """Whether this torch multiplies 16-bit matrices into a float32 one."""
    return "dtype" in torch.ops.aten.mm.overloads()  # since 2.8


def half_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b of 16-bit matrices, summed and kept in float32."""
    torch.mm(a, b, out_dtype=torch.float32, out=out)


_adds_in_place = True


def add_half_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b of 16-bit matrices, summed and kept in float32."""
    global _adds_in_place
    if _adds_in_place:
        try:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
            _adds_in_place = False  # an older torch wants what is added to in 16 bits too, and says so before any work
        else:
            return
    product = torch.empty_like(out)
    half_product(product, a, b)
    out += product


def head_metrics(core: Any, where: tuple[int, int], call: HeadCall) -> None:
    """Fill the outputs of the head's problem."""
    forward = Forward(core, where, call)
    slots = forward.slots
    explicit = forward.special is not None
    scratch = call.empty(slots, core.cuda_head_explicit_slot(call.D)) if explicit else None
    with full_precision(call.head.features.device.type):
        for first, rows in forward.blocks():
            forward.statistics(first, rows)
            forward.loop.values(first, rows)
            forward.table_products(first, rows)
            if scratch is not None:
                core.cuda_head_explicit(
                    *where, call.problem, first, rows, address(forward.special), forward.known.summary.data_ptr(),
                    scratch.data_ptr(), slots,
                )  # fmt: skip
    mean = None if forward.pieces else forward.mean
    call.prepared = Kept(forward.known, forward.tails if call.keeps else None, mean, forward.block)


def most_slots(core: Any, D: int) -> int:
    """How many slices of rows are done from explicit differences at a time, whatever N and C are."""
    return max(1, min(_MOST_SLOTS, _SCRATCH_BYTES // (8 * core.cuda_head_explicit_slot(D))))


def explicit_slots(core: Any, call: HeadCall) -> int:
    """The same of a call: a block has so many rows that it does alone, or two kinds of row a slice of each tile."""
    alone = call.C <= core.HEAD_EXPLICIT_ALONE
    return max(1, min(most_slots(core, call.D), -(-call.N // 256) if alone else 2 * call.N * -(-call.C // 32)))


class Kept(NamedTuple):
    """What the values' loop leaves for the gradient of its call."""

    known: Weights
    tails: Tensor | None  # the statistics of all rows, if a gradient is to follow
    mean: Tensor | None  # the last block's sums, which are all where there is one
    block: int


def padded(classes: int) -> int:
    """Classes of a tile as they lie in memory: rows begin at 16 bytes, and 16-bit products have whole groups of 8."""
    return -(-classes // 8) * 8


class Forward:
    """The tiled loop of a call: buffers, and the products around the statistics."""

    def __init__(
        self, core: Any, where: tuple[int, int], call: HeadCall, also_per_row: int = 0, kept: Kept | None = None,
        for_gradient: bool = False,
    ):  # fmt: skip
        """``also_per_row``: bytes of the caller's own buffers. ``kept``: the values' loop, for the gradient of its call.

        ``for_gradient``: not in pieces, whose sums would be about W's raw rows: the gradient takes the centered ones.
        """
        self.core, self.call, self.N, self.D = core, call, call.N, call.D
        has_table = not for_gradient and takes_table(core, call)
        self.known = known = kept.known if kept is not None else Weights(core, where, call, has_table)
        head: Any = call.head
        dtype, D, W = call.dtype, call.D, head.linear_weight
        itemsize, order = dtype.itemsize, known.order
        self.weights = known.center is not None
        self.tables: list[Tensor] = [x.to(dtype) for x in known.distances]
        self.given = head.logits is not None
        self.borrowed = self.given and head.logits.dtype == dtype and head.logits.stride(1) == 1
        halves = W.dtype in _PIECES and dtype == torch.float32 and takes_half_products()
        self.in_halves = halves and head.features.dtype == W.dtype and not self.given
        self.pieces = _PIECES[W.dtype] if halves and self.weights and not for_gradient else 0
        self.plain = Rows(W, dtype, order, 1.0, None)
        center = known.center[:D] if self.weights else None
        self.centered = Rows(W, dtype, order, known.scale, center) if self.weights else self.plain
        width = padded(order.width)
        self.ld = padded(D)
        copies = self.pieces * min(width, core.HEAD_PIECE_CLASSES) * self.ld if self.pieces else 0
        self.slots = explicit_slots(core, call)
        scratch = 8 * most_slots(core, D) * core.cuda_head_explicit_slot(D)
        shares = self.weights or bool(self.tables)
        fixed = known.nbytes + (scratch if shares else 0) + 2 * copies
        fixed += 0 if self.in_halves and not for_gradient else self.plain.nbytes
        fixed += self.centered.nbytes if self.weights and not self.pieces else 0
        per_row = core.HEAD_ROW_BYTES + core.HEAD_TAIL_BYTES + 1
        per_row += itemsize * (width if shares or not self.given else 0)
        per_row += itemsize * call.C * len(self.tables)
        per_row += 2 * self.pieces * width
        per_row += itemsize * D * (2 if self.pieces else 1) if self.weights else 0  # a sum of pieces, and a product
        per_row += 0 if self.given or self.in_halves or head.features.dtype == dtype else itemsize * D
        most = _TILE_BYTES // (itemsize * width)
        self.block = tiles.block_rows(per_row + also_per_row, fixed, WORKSPACE_BYTES, most)
        rows = min(self.N, self.block)
        self.z: Any = call.empty(rows * width, dtype=dtype) if shares or not self.given else None
        self.sums: list[Tensor] = [call.empty(rows, call.C, dtype=dtype) for _ in self.tables]
        self.parts: Any = call.empty(rows * self.pieces * width, dtype=W.dtype) if self.pieces else None
        self._copies: Any = call.empty(copies, dtype=W.dtype) if self.pieces else None
        # taken over: the statistics of all rows, and the sums, if the field needs any, where one block had them all
        of_values = kept is not None and (
            not self.weights or (kept.mean is not None and min(self.block, kept.block) >= self.N)
        )
        tails = kept.tails if kept is not None and of_values else None
        self.is_known, self.all_tails = tails is not None, tails is not None or call.keeps
        self.mean: Any = None
        if self.weights:
            self.mean = kept.mean if kept is not None and self.is_known else call.empty(rows, D, dtype=dtype)
        length = (self.N if self.all_tails else rows) * core.HEAD_TAIL_BYTES
        self.tails = tails if tails is not None else call.empty(length, dtype=torch.uint8)
        self.state = call.empty(rows * core.HEAD_ROW_BYTES, dtype=torch.uint8)
        self.special = call.empty(rows, dtype=torch.uint8) if shares else None
        self.loop = core.HeadLoop(
            *where, call.problem, known.summary.data_ptr(), address(known.center), address(known.squares),
            address(known.classes), address(known.runs), address(known.found), self.pieces,
            address(known.distances[0] if known.distances else None), self.tails.data_ptr(), self.all_tails,
            self.state.data_ptr(), address(self.mean), address(self.special),
        )  # fmt: skip

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First row and rows of each block."""
        return ((first, min(self.block, self.N - first)) for first in range(0, self.N, self.block))

    def features(self, first: int, rows: int) -> Tensor | None:
        """The block's features as the library multiplies them; None where logits were given."""
        if self.given:
            return None
        features = self.call.head.features[first : first + rows]
        return features if self.in_halves else features.to(self.call.dtype)

    def statistics(self, first: int, rows: int) -> None:
        """Run all tiles over a block."""
        x = self.features(first, rows)
        self.loop.start(first, rows)
        logits: Any = self.call.head.logits
        for start, stop in self.known.order.tiles():
            classes, width = stop - start, padded(stop - start)
            shares = None if self.z is None else self.z[: rows * width].view(rows, width)
            z: Any = None  # given in another type: the kernel reads them as they are
            if x is not None and shares is not None:
                z = shares[:, :classes]
                self.logits_into(z, x, start, stop)
            elif self.borrowed:
                z = logits[first : first + rows, start:stop]
            self.loop.statistics(
                first, rows, start, classes, address(z), 0 if z is None else z.stride(0),
                address(self.parts if self.pieces else shares),
            )  # fmt: skip
            if self.pieces:
                self._add_pieces(rows, start, stop)
            elif self.weights and shares is not None:
                self.centered.add(self.mean[:rows], shares[:, :classes], start, stop, is_first=start == 0)

    def table_products(self, first: int, rows: int) -> None:
        """Finish a block whose table of distances stands for W: the shares' products with it, and what they come to."""
        if not self.tables:
            return
        width = padded(self.call.C)
        shares = self.z[: rows * width].view(rows, width)
        for table, sums in zip(self.tables, self.sums, strict=True):
            torch.mm(shares[:, : self.call.C], table, out=sums[:rows])
        bias_sums = self.sums[1] if len(self.sums) > 1 else None
        self.loop.table(first, rows, shares.data_ptr(), self.sums[0].data_ptr(), address(bias_sums))

    def logits_into(self, z: Tensor, x: Tensor, start: int, stop: int) -> None:
        """z = features W_tile^T."""
        if self.in_halves:
            half_product(z, x, self.call.head.linear_weight[start:stop].T)
        else:
            self.plain.multiply(z, x, start, stop)

    def _add_pieces(self, rows: int, start: int, stop: int) -> None:
        """Mean += shares W_tile in slices of classes: all pieces of a slice in one product, the smallest first.

        What the tensor cores cut off is a part of the sum so far, and of the largest pieces alone it is of any size.
        """
        weight, D, ld, P = self.call.head.linear_weight, self.D, self.ld, self.pieces
        classes, width = stop - start, padded(stop - start)
        shares = self.parts[: rows * P * width].view(rows, P * width)
        for low in range(0, width, self.core.HEAD_PIECE_CLASSES):
            length = min(width - low, self.core.HEAD_PIECE_CLASSES)
            count = min(length, classes - low)
            copies = self._copies[: P * length * ld].view(P, length, ld)[:, :, :D]
            copies[:, :count].copy_(weight[start + low : start + low + count])
            if count < length:
                copies[:, count:].zero_()
            product = half_product if start == 0 and low == 0 else add_half_product
            product(self.mean[:rows], shares[:, P * low : P * (low + length)], copies.flatten(0, 1))


def takes_table(core: Any, call: HeadCall) -> bool:
    """Whether the table of distances between W's rows, (C, C), replaces W in the second product of the values.

    A row of it is C numbers to multiply and to write, not D. Not where a gradient takes the sums over: it would have to form
    them, in two products more.
    """
    most = min(tiles.TILE_CLASSES, core.HEAD_TILE_BYTES // call.dtype.itemsize, core.HEAD_TABLE_CLASSES, call.D)
    asked = bool(call.fields & TABLE) and not call.fields & GRADIENT & ~TABLE
    return asked and most >= call.C and not call.keeps


class Weights:
    """What the kernels need of W alone, found once; a gradient takes it over from its forward pass.

    ``summary``: log ||W||_F^2 and the power of two that brings W into range, ``scale`` in the compute type; ``center``
    (D + 1,) and ``squares`` (C,) of the rows about it, and which rows of a tile are equal (``classes``, ``runs``, ``found``:
    HeadRepeats of csrc/cuda/head_metrics.h), where the fields ask for more than norms. ``distances`` in place of these:
    the table, and behind it the one with the bias as a column, where one is asked for.
    """

    def __init__(self, core: Any, where: tuple[int, int], call: HeadCall, has_table: bool = False):
        C, D, problem = call.C, call.D, call.problem
        width = min(tiles.TILE_CLASSES, core.HEAD_TILE_BYTES // call.dtype.itemsize)
        self.order = Order(C, width, None, None, None)
        self.center: Any = None
        self.squares: Tensor | None = None
        self.classes: Tensor | None = None
        self.runs: Tensor | None = None
        self.found: Tensor | None = None
        self.distances: list[Tensor] = []
        self.nbytes = 0
        self.summary = call.empty(2).zero_()
        self.scale: Tensor = self.summary
        centered = bool(call.fields & (NEURONWISE | GRADIENT))
        if not centered and not call.fields & LAYERWISE:
            return
        if has_table:
            self.distances = [call.empty(C, C) for _ in range(2 if call.head.include_bias else 1)]
            self.nbytes += sum(12 * x.numel() for x in self.distances)
            centered = False
        if centered:
            self.center, self.squares = call.empty(D + 1), call.empty(C)
        workspace = call.empty(core.cuda_head_weights_workspace(D, C))
        core.cuda_head_weights(
            *where, problem, workspace.data_ptr(), self.summary.data_ptr(), address(self.center),
            address(self.squares), 0, 0, 0, address(self.distances[0] if has_table else None),
            address(self.distances[1] if len(self.distances) > 1 else None),
        )  # fmt: skip
        if not centered:
            return
        self.scale = torch.exp2(self.summary[1]).to(call.dtype)  # a whole power: exact
        positions = -(-C // width) * width
        keys, joins = call.empty(positions), call.empty(positions, dtype=torch.uint8)
        self.runs, self.found = call.empty(positions, dtype=torch.int32), call.empty(2, dtype=torch.int32)
        core.cuda_head_repeat_keys(*where, problem, width, positions, keys.data_ptr())
        self.classes = keys.view(-1, width).argsort(dim=1, stable=True).view(-1)
        core.cuda_head_repeat_runs(
            *where, problem, width, positions, keys.data_ptr(), self.classes.data_ptr(), joins.data_ptr(),
            self.runs.data_ptr(), self.found.data_ptr(),
        )  # fmt: skip
        self.nbytes = 8 * workspace.numel() + 40 * positions
