"""Large heads: tiles of classes outside, blocks of rows inside, and the library's products between them.

What is here depends on C, D and the dtypes, never on N, so that a row's value does not depend on how many others came with
it: the order and the tiles of the classes, the length of a block, and the pieces in which W is converted or centered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

WORKSPACE_BYTES = 64 << 20
"""Bound of all buffers of one call, in bytes, unless a few rows need more."""
_LIBRARY_BYTES = 12 << 20
"""Of these for what the library packs for its products: 9 MB were seen at D = 2048, C = 32,000."""
_COPY_BYTES = 8 << 20
"""Of these for the part of W that is converted or centered at a time: it stays in the last-level cache for the product."""
TILE_CLASSES = 2048
"""Classes of a tile. The logits of a block of 1,024 rows are 8 MB then, which stay in the last-level cache."""
_MOST_CLASSES = 1 << 31
"""A million tiles; a view of one row as more of them would be walked through for hours."""
_BLOCK_ROWS = 2048
_ROWS_AT_ONCE = 16
"""Rows come to the library in multiples of this: fewer take another way through its product, with other last bits."""


_OWN_ROWS = 16
"""The library takes as long for one row as for so many."""


def takes_own_products(N: int, weight: Tensor) -> bool:
    """Whether the products of the values are the kernels' own."""
    return N <= _OWN_ROWS and (weight.stride(1) == 1 or weight.shape[1] <= 1)


def padded(rows: int) -> int:
    """The rows that the library is given for so many."""
    return -(-rows // _ROWS_AT_ONCE) * _ROWS_AT_ONCE


def block_rows(
    bytes_per_row: int, fixed: int, workspace: int = WORKSPACE_BYTES - _LIBRARY_BYTES, most: int = _BLOCK_ROWS
) -> int:
    """The rows of a block, a multiple of what the library is given at once."""
    fit = (workspace - fixed) // bytes_per_row
    return max(_ROWS_AT_ONCE, min(most, fit) // _ROWS_AT_ONCE * _ROWS_AT_ONCE)


class Order:
    """The order in which a head's classes come, and the tiles that it is cut into.

    ``groups`` of equal or nearly equal rows (members, starts, near: classes, as the kernel found them) stand together, so
    that within a tile their shares can be taken together; a group longer than a tile is cut, each piece for itself. Without
    groups it is the classes' own order, and the tensors are None.
    """

    def __init__(self, C: int, width: int, members: Tensor | None, starts: Tensor | None, near: Tensor | None):
        if C > _MOST_CLASSES:
            raise MemoryError(f"out of memory: a head of C = {C} classes, at most {_MOST_CLASSES} are taken")
        self.classes = self.positions = None
        self.near_count = 0
        bounds = [0]
        if members is not None and starts is not None and near is not None:
            M = len(members)
            single = torch.ones(C, dtype=torch.bool)
            single[members] = False
            self.classes = torch.cat([members, single.nonzero().squeeze(1)])
            self.positions = torch.empty_like(self.classes)
            self.positions[self.classes] = torch.arange(C)
            while bounds[-1] + width < M:  # at the last start of a group that still fits
                end = bounds[-1] + width
                start = int(starts[int(torch.searchsorted(starts, end, right=True)) - 1])
                bounds.append(start if start > bounds[-1] else end)
            self._cut(M, starts, near, torch.tensor(bounds))
        while bounds[-1] + width < C:
            bounds.append(bounds[-1] + width)
        self.bounds = [*bounds, C]

    def _cut(self, M: int, starts: Tensor, near: Tensor, tiles: Tensor) -> None:
        """The pieces of groups: ``starts``, and what differs from a piece's first row, ``near`` and ``near_of``."""
        assert self.positions is not None
        place = torch.arange(M)
        group = torch.searchsorted(starts, place, right=True) - 1
        tile = tiles[torch.searchsorted(tiles, place, right=True) - 1]
        head = torch.maximum(starts[group], tile)
        differs = torch.zeros(M, dtype=torch.bool)
        differs[self.positions[near]] = True
        in_group = torch.zeros(len(starts), dtype=torch.bool)
        in_group[group[differs]] = True
        differs |= in_group[group] & (head != starts[group])  # of a piece whose first row is not the group's
        differs &= place != head
        self.starts, self.end = place[place == head].contiguous(), M
        self.near = differs.nonzero().squeeze(1)
        self.near_of = head[self.near].contiguous()
        self.near_count = len(self.near)

    @property
    def nbytes(self) -> int:
        """What it keeps."""
        return 0 if self.classes is None else 8 * (5 * len(self.classes))

    def tiles(self) -> Iterator[tuple[int, int]]:
        """First position of each tile and the one behind its last."""
        return zip(self.bounds[:-1], self.bounds[1:], strict=True)

    @property
    def width(self) -> int:
        """Classes of the longest tile."""
        return max(stop - start for start, stop in self.tiles())

    def repeats(self, start: int, stop: int) -> tuple[tuple[int, int, int, int, int, int], int, int]:
        """What the kernel takes of a tile's groups, and the range of ``near`` that lies in it."""
        if self.classes is None or start >= self.end:
            return (0, 0, 0, 0, 0, 0), 0, 0
        low, high = torch.searchsorted(self.starts, torch.tensor([start, stop])).tolist()
        first, last = torch.searchsorted(self.near, torch.tensor([start, stop])).tolist() if self.near_count else (0, 0)
        at = (
            self.starts[low:].data_ptr(), high - low, min(stop, self.end),
            self.near[first:].data_ptr() if last > first else 0, self.near_of[first:].data_ptr() if last > first else 0,
            last - first,
        )  # fmt: skip
        return at, first, last


class Rows:
    """The rows of W in an order, as the library multiplies them: as they stand, or converted, scaled and centered.

    A tile comes in one piece, or in pieces over D where a copy of it would not stay in the cache. ``scale`` is a number, or
    one that only the device knows, with a center then.
    """

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, order: Order | None, scale: float | Tensor, center: Tensor | None
    ):
        self.weight, self.dtype, self.scale = weight, dtype, scale
        self.classes = None if order is None else order.classes
        self.center = None if center is None else center.to(dtype)
        self._minus_center: Any = -self.center if self.center is not None and isinstance(scale, Tensor) else None
        self.copies = self.classes is not None or weight.dtype != dtype or center is not None
        self.copies |= not isinstance(scale, Tensor) and scale != 1
        D, width = weight.shape[1], TILE_CLASSES if order is None else order.width
        self.columns = max(1, min(D, max(64, _COPY_BYTES // (width * dtype.itemsize)))) if self.copies else max(1, D)
        self.nbytes = width * self.columns * dtype.itemsize if self.copies else 0
        self._buffer: Tensor | None = None  # made when it is first needed

    def in_classes_order(self) -> Rows:
        """The same with the classes in their own order."""
        return self if self.classes is None else Rows(self.weight, self.dtype, None, self.scale, self.center)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """First column, the one behind the last, and (stop - start, columns) of scale W - center."""
        D = self.weight.shape[1]
        if not self.copies:
            yield 0, D, self.weight[start:stop]
            return
        if self._buffer is None:
            self._buffer = self.weight.new_empty(self.nbytes // self.dtype.itemsize, dtype=self.dtype)
        index = None if self.classes is None else self.classes[start:stop]
        for first in range(0, max(D, 1), self.columns):
            last = min(D, first + self.columns)
            rows = self.weight[start:stop, first:last] if index is None else self.weight[:, first:last][index]
            block = self._buffer[: (stop - start) * (last - first)].view(stop - start, last - first)
            if self.center is None:
                block.copy_(rows) if self.scale == 1 else torch.mul(rows, self.scale, out=block)
            elif isinstance(self.scale, Tensor):
                source = rows if rows.dtype == self.dtype else block.copy_(rows)
                torch.addcmul(self._minus_center[first:last], source, self.scale, out=block)
            elif self.scale == 1:
                torch.sub(rows, self.center[first:last], out=block)
            else:
                torch.mul(rows, self.scale, out=block)
                block.sub_(self.center[first:last])
            yield first, last, block

    def multiply(self, out: Tensor, x: Tensor, start: int, stop: int) -> None:
        """out = x (scale W_tile - center)^T."""
        for low, high, block in self.pieces(start, stop):
            if low == 0:
                torch.mm(x[:, low:high], block.T, out=out)
            else:
                out.addmm_(x[:, low:high], block.T)

    def add(self, total: Tensor, shares: Tensor, start: int, stop: int, is_first: bool = False) -> None:
        """Total += shares (scale W_tile - center), (rows, D); written where it ``is_first``."""
        for low, high, block in self.pieces(start, stop):
            if is_first:
                torch.mm(shares, block, out=total[:, low:high])
            else:
                total[:, low:high].addmm_(shares, block)
