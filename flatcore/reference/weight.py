"""W of a head, (C, D), as the formulas need it: over a power of two, about its centre, equal rows known.

Letters as in ``head_metrics``. Of a large W, sums over classes of differences to an anchor class a of each row are

    delta = sum_j u_j (w_j - w_a) = sum_heavy u_j (w_j - w_a) + sum_others u_j (v_j - v_a),   v_j = w_j - c

with c the mean row. The ``HEAVY`` groups of equal rows that weigh most enter by their differences to the anchor, formed
before anything is summed; a row equal to the anchor's enters nowhere. What is left is a library's product; it is rounded by
the size of the v_j. Where more groups than these nearly coincide with the anchor's row and with each other, and no other row
weighs as much, ``explicit`` does the row again from all differences. Of a small W (``is_small``) all are formed at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arithmetic import joined, norms, tiles, total, within_range

_EXPLICIT = {1 << 62: 1 << 11, 16: 1 << 15}
"""Of up to so many features, and numbers C D of W, all differences to the anchor are formed first."""
HEAVY = {torch.float32: 1, torch.float64: 2}
"""Groups of equal rows whose differences to the anchor are formed first."""


def is_small(C: int, D: int) -> bool:
    """Whether all differences to the anchor are formed, (C, N, D)."""
    return any(features >= D and numbers >= C * D for features, numbers in _EXPLICIT.items())


class Weight:
    """W and, as a further column, the bias where it counts as a parameter; ``scale`` is a power of two near the largest."""

    def __init__(self, w: Tensor, column: Tensor | None, wide: torch.dtype):
        self._w, self._column, self.wide = w.detach(), None if column is None else column.detach(), wide
        self.C, self.D = w.shape[0], w.shape[1] + (column is not None)
        self.tiles = tiles(self.C, self.D)
        entries = [x for x in (self._w, self._column) if x is not None and x.numel()]
        self.scale = w.new_ones((), dtype=wide)
        if entries:
            largest = within_range(
                joined([torch.maximum(x.amax(), -x.amin()).to(wide).view(1) for x in entries]).amax()
            )
            # m 2^e over 2 m, m in [1/2, 1): 2^(e - 1), without rounding, which the largest number has within its format
            self.scale = largest / (2 * largest.frexp().mantissa)
        self.log_scale = self.scale.log()
        self._is_prepared = False
        self._whole: Tensor | None = None
        self._pairs: Tensor | None = None
        self._squares: Tensor | None = None
        self._sizes: dict[tuple[float, ...], Tensor] = {}

    def rows(self, which: slice | Tensor) -> Tensor:
        """Some rows of W over ``scale``: exact, so that their differences are."""
        if self._whole is not None:
            return _taken(self._whole, which)
        rows = _taken(self._w, which).to(self.wide)
        if self._column is not None:
            rows = torch.cat([rows, _taken(self._column, which).to(self.wide).unsqueeze(1)], dim=1)
        return rows / self.scale

    def pairs(self, j: Tensor, k: Tensor) -> Tensor:
        """w_j - w_k of classes j and k (N,), as (N, D); from a table where that is small."""
        if self._pairs is not None:
            return self._pairs.index_select(0, j * self.C + k)
        return self.rows(j) - self.rows(k)

    def log_square(self) -> Tensor:
        """log ||W||_F^2."""
        return total(self.rows(tile).square().sum() for tile in self.tiles).log() + 2 * self.log_scale

    def prepare(self) -> Weight:
        """Find the centre and the equal rows: a pass over W each, made once."""
        if self._is_prepared:
            return self
        self._is_prepared = True
        if len(self.tiles) == 1:
            self._whole = self.rows(self.tiles[0])
        if self.C**2 * self.D <= 1 << 18:
            w = self.rows(slice(None))
            self._pairs = (w.unsqueeze(1) - w).flatten(0, 1)
        self.group, self.multiplicity = self._equal_rows()
        self.centre = total(self.rows(tile).sum(dim=0) for tile in self.tiles) / self.C
        self._centred = [self.rows(tile) - self.centre for tile in self.tiles] if len(self.tiles) == 1 else None
        return self

    def centred(self, i: int) -> Tensor:
        """v_j of the classes of a tile."""
        return self._centred[i] if self._centred else self.rows(self.tiles[i]) - self.centre

    def sum(self, coefficients: Tensor, absolute: bool = False) -> Tensor:
        """sum_j k_jn v_j of k (C, N), as (N, D); or of absolute values."""
        k = coefficients.abs() if absolute else coefficients
        centred = (self.centred(i) for i in range(len(self.tiles)))
        return total(k[tile].T @ (v.abs() if absolute else v) for tile, v in zip(self.tiles, centred, strict=True))

    def dots(self, x: Tensor) -> Tensor:
        """The products of each v_j with x (N, D), as (C, N)."""
        return joined([self.centred(i) @ x.T for i in range(len(self.tiles))])

    def differences(self, coefficients: Tensor, x: Tensor) -> Tensor:
        """sum_n k_jn (v_j - x_n) of k (C, N) and x (N, D), as (C, D)."""
        parts = [
            coefficients[tile].sum(dim=1, keepdim=True) * self.centred(i) - coefficients[tile] @ x
            for i, tile in enumerate(self.tiles)
        ]
        return joined(parts)

    def squares(self) -> Tensor:
        """||v_j||^2, (C,)."""
        if self._squares is None:
            self._squares = joined([self.centred(i).square().sum(dim=1) for i in range(len(self.tiles))])
        return self._squares

    def sizes(self, ords: Sequence[float]) -> Tensor:
        """||v_j|| in some norms, (K, C)."""
        key = tuple(ords)
        if key not in self._sizes:
            tiled = (self.centred(i) for i in range(len(self.tiles)))
            self._sizes[key] = joined([torch.stack([norms(v, ord) for ord in key]) for v in tiled], dim=1)
        return self._sizes[key]

    def distances(self) -> Tensor:
        """||w_j - w_k||^2, (C, C), from differences."""
        w = self.rows(slice(None))
        if w.device.type != "mps":
            return torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        return torch.cat([(w[tile].unsqueeze(1) - w).square().sum(dim=2) for tile in tiles(self.C, self.C * self.D)])

    def _equal_rows(self) -> tuple[Tensor, Tensor]:
        """For each class a number that its row shares with those equal to it and no others, and how many they are.

        Rows are sorted by a hash of their bits and compared with their neighbours; other rows that share a hash (one pair
        in 2^64) can hide that two are equal, not make two equal.
        """
        whole = torch.int64 if self.wide is torch.float64 else torch.int32
        factor = (torch.arange(self.D, device=self._w.device) + 1) * -0x61C8864680B583EB
        factor = (factor ^ (factor >> 29)) * -0x40A7B892E31B1A47
        factor = (factor ^ (factor >> 32)) | 1
        bits = ((self.rows(tile) + 0.0).view(whole) for tile in self.tiles)  # + 0: -0 has other bits
        order = torch.cat([(x * factor).sum(dim=1) for x in bits]).argsort(stable=True)
        last, new = self.rows(order[:1]), []
        for tile in self.tiles:
            rows = self.rows(order[tile])
            new.append((rows != torch.cat([last, rows[:-1]])).any(dim=1))
            last = rows[-1:]
        number = torch.cat(new).cumsum(dim=0)
        group = torch.zeros_like(number).scatter(0, order, number)
        count = torch.zeros(self.C + 1, dtype=torch.int64, device=group.device)
        count = count.scatter_add(0, group, torch.ones_like(group))
        return group, count[group].to(self.wide)


def _taken(x: Tensor, which: slice | Tensor) -> Tensor:
    return x[which] if isinstance(which, slice) else x.index_select(0, which)
