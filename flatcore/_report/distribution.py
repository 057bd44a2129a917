"""Distributions of positive values kept by their logs, in groups, at a size that does not grow with the rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_WIDTH = 1 / 256  # of a bin, in logs: a bin's values differ by 0.4 %
_SPAN = 1 << 24  # bins of a group: logs within +-16384, and three more
_HALF = _SPAN // 2
_LIMIT = round(16384 / _WIDTH) - 1
_ZERO, _INFINITE, _NAN = -_HALF, _HALF - 2, _HALF - 1


class Statistics(NamedTuple):
    """Summary of one measure over rows, in logs, right also where the values underflow.

    ``rows``; ``nan_rows`` (of them, counted in ``rows``); ``log_mean``, the log of the mean; ``relative_standard_error``,
    the mean's standard error over the mean; ``log_median``; ``heaviest_share``, the share of the sum that the heaviest 1 %
    of the rows hold, in [0, 1] (of 150 rows: the heaviest and half of the next). The median of an even number of rows is
    the mean of the two middle values, as ``numpy.median`` has it. All are NaN but the counts where a row is NaN, and without
    rows.

    Example:
        >>> import flatcore
        >>> found = flatcore.Statistics(4, 0, log_mean=-800, relative_standard_error=0.25, log_median=0, heaviest_share=0.04)
        >>> found.mean, found.median, found.standard_error
        (0.0, 1.0, 0.0)
    """

    rows: int
    nan_rows: int
    log_mean: float
    relative_standard_error: float
    log_median: float
    heaviest_share: float

    @property
    def mean(self) -> float:
        """The mean; 0 where it underflows."""
        return _exp(self.log_mean)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean."""
        return self.mean * self.relative_standard_error

    @property
    def median(self) -> float:
        """The median; 0 where it underflows."""
        return _exp(self.log_median)


def _exp(log: float) -> float:
    try:
        return math.exp(log)
    except OverflowError:
        return math.inf


class Distribution:
    """A sparse histogram of logs by group: each bin with its rows, and the sums of its values and of their squares.

    The sums are relative to the bin's centre, so that means are exact to rounding and relative standard errors to 1e-8; a
    middle value is taken as its bin's mean, within 0.4 %. At most 2^23 bins per group, and no more than rows.
    """

    def __init__(self) -> None:
        self.key = np.zeros(0, np.int64)  # group * _SPAN + bin
        self.sums = np.zeros((3, 0))  # rows, values, squares

    def add(self, logs: np.ndarray, group: np.ndarray) -> None:
        """Take in logs (N,) float64 and their groups (N,), integers from 0 on."""
        finite = np.isfinite(logs)
        safe = np.clip(np.where(finite, logs, 0.0), -_LIMIT * _WIDTH, _LIMIT * _WIDTH)
        index = np.floor(safe / _WIDTH).astype(np.int64)
        relative = np.exp(safe - (index + 0.5) * _WIDTH)
        index = np.where(finite, index, np.where(np.isnan(logs), _NAN, np.where(logs > 0, _INFINITE, _ZERO)))
        self._merge(
            group.astype(np.int64) * _SPAN + index + _HALF, np.stack([np.ones_like(safe), relative, relative**2])
        )

    def merge(self, other: Distribution) -> None:
        """Take in the rows of another."""
        self._merge(other.key, other.sums)

    def _merge(self, key: np.ndarray, sums: np.ndarray) -> None:
        self.key, place = np.unique(np.concatenate([self.key, key]), return_inverse=True)
        both = np.concatenate([self.sums, sums], axis=1)
        self.sums = np.stack([np.bincount(place, row, len(self.key)) for row in both])

    def bins(self, groups: Iterable[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Bins (K,), ascending, and their sums (3, K), over some groups or all."""
        key, sums = self.key, self.sums
        if groups is not None:
            chosen = np.isin(key // _SPAN, np.fromiter(groups, np.int64))
            key, sums = key[chosen], sums[:, chosen]
        index, place = np.unique(key % _SPAN - _HALF, return_inverse=True)
        return index, np.stack([np.bincount(place, row, len(index)) for row in sums])

    def statistics(self, groups: Iterable[int] | None = None) -> Statistics:
        """Summary over some groups, or all."""
        index, (rows, values, squares) = self.bins(groups)
        N = float(rows.sum())
        nan_rows, infinite = (float(rows[index == place].sum()) for place in (_NAN, _INFINITE))
        if N == 0 or nan_rows:
            return Statistics(int(N), int(nan_rows), *[math.nan] * 4)
        order = np.cumsum(rows)
        # row k, from 0 on, is in the first bin up to which there are more than k rows
        two = [int(np.searchsorted(order, k, side="right")) for k in ((N - 1) // 2, N // 2)]
        logs = [self._log(index[k], values[k] / rows[k]) for k in two]
        log_median = float(np.logaddexp(logs[0], logs[1])) - math.log(2) if two[0] != two[1] else logs[0]
        if infinite:
            return Statistics(int(N), 0, math.inf, math.nan, log_median, math.nan)
        positive = index != _ZERO
        index, rows, values, squares = (x[positive] for x in (index, rows, values, squares))
        if len(index) == 0:
            return Statistics(int(N), 0, -math.inf, math.nan, -math.inf, math.nan)
        centre = (index + 0.5) * _WIDTH
        top = centre[-1]
        weights = np.exp(centre - top)
        total, second = float(weights @ values), float(weights**2 @ squares)
        log_mean = float(top) + math.log(total / N)
        spread = max(second * N / total**2 - 1, 0.0)  # variance over the mean's square
        error = math.sqrt(spread / (N - 1)) if N > 1 else math.nan
        before = np.cumsum(rows[::-1])[::-1] - rows  # rows that are heavier
        taken = np.clip((0.01 * N - before) / rows, 0, 1)
        return Statistics(int(N), 0, log_mean, error, log_median, float((taken * weights) @ values) / total)

    @staticmethod
    def _log(index: int, relative: float) -> float:
        if index in (_ZERO, _INFINITE):
            return -math.inf if index == _ZERO else math.inf
        return float((index + 0.5) * _WIDTH + math.log(relative))

    def histogram(self, groups: Iterable[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean logs (K,) and rows (K,) of the bins that hold finite logs."""
        index, sums = self.bins(groups)
        finite = np.abs(index) <= _LIMIT
        return (index[finite] + 0.5) * _WIDTH, sums[0][finite]

    def concentration(self) -> tuple[np.ndarray, np.ndarray]:
        """Share of the sum (K,) that the heaviest share of the rows (K,) holds, both ascending; finite logs alone."""
        index, (rows, values, _) = self.bins()
        finite = np.abs(index) <= _LIMIT
        if not finite.any():
            return np.zeros(0), np.zeros(0)
        centre = (index[finite] + 0.5) * _WIDTH
        mass = (np.exp(centre - centre[-1]) * values[finite])[::-1]
        return np.cumsum(mass) / mass.sum(), np.cumsum(rows[finite][::-1]) / rows.sum()
