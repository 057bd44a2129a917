"""Rows counted by class and by whether they are classified right, and the tables that they come in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .distribution import Distribution, Statistics

MEASURES = {
    "loss": "cross-entropy",
    "hessian_trace": "Hessian trace",
    "layerwise": "relative flatness, layerwise",
    "neuronwise": "relative flatness, neuronwise",
    "feature_gradient_norm": "feature gradient norm",
    "input_gradient_norm": "input gradient norm",
}
"""The measures that are summarised, and what pages call them; those that were not measured are absent."""
CLASSES = 1000  # up to so many classes the statistics are split by class: some 3 KB for each
_SAMPLE = 8192  # points of a scatter plot


class Group(NamedTuple):
    """Some of the rows: ``rows``, ``correct`` of them, and :class:`Statistics` of each measure by its name.

    Example:
        >>> import flatcore
        >>> flatcore.Group(rows=4, correct=3, statistics={}).accuracy
        0.75
    """

    rows: int
    correct: int
    statistics: dict[str, Statistics]

    @property
    def accuracy(self) -> float:
        """correct / rows; NaN without rows."""
        return self.correct / self.rows if self.rows else math.nan

    @property
    def accuracy_standard_error(self) -> float:
        """sqrt(a (1 - a) / rows)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.rows) if self.rows else math.nan


class Tally:
    """Counts and distributions of rows by class and by whether they are classified right."""

    def __init__(self, measures: tuple[str, ...]):
        names = [name.removeprefix("log_") for name in measures]
        self.distributions = {name: Distribution() for name in MEASURES if name in names}
        self.counts: dict[int, list[int]] = {}  # by class: rows, correct

    def add(self, table: Mapping[str, np.ndarray]) -> None:
        """Take in rows of the per-sample table."""
        target, correct = table["target"], table["correct"]
        for label, rows, right in zip(*_counts(target, correct), strict=True):
            count = self.counts.setdefault(int(label), [0, 0])
            count[0] += int(rows)
            count[1] += int(right)
        group = 2 * np.where(target < CLASSES, target, CLASSES) + correct
        for name, distribution in self.distributions.items():
            if name == "loss":
                with np.errstate(divide="ignore"):
                    logs = np.log(table["loss"].astype(np.float64))
            else:
                logs = table[f"log_{name}"].astype(np.float64)
            distribution.add(logs, group)

    def merge(self, other: Tally) -> None:
        """Take in the rows of another."""
        for label, (rows, right) in other.counts.items():
            count = self.counts.setdefault(label, [0, 0])
            count[0] += rows
            count[1] += right
        for name, distribution in other.distributions.items():
            self.distributions[name].merge(distribution)

    @property
    def rows(self) -> int:
        """All rows so far."""
        return sum(rows for rows, _ in self.counts.values())

    def groups(self) -> dict[str, Group]:
        """All rows, those classified right and wrong."""
        rows, right = self.rows, sum(right for _, right in self.counts.values())
        label = range(CLASSES + 1)
        return {
            "all": Group(rows, right, self._statistics(None)),
            "correct": Group(right, right, self._statistics([2 * k + 1 for k in label])),
            "wrong": Group(rows - right, 0, self._statistics([2 * k for k in label])),
        }

    def classes(self) -> dict[int, Group]:
        """Each class by its label; those from 1000 on have no statistics."""
        found = {}
        for label, (rows, right) in sorted(self.counts.items()):
            known = label < CLASSES
            found[label] = Group(rows, right, self._statistics([2 * label, 2 * label + 1]) if known else {})
        return found

    def _statistics(self, groups: list[int] | None) -> dict[str, Statistics]:
        return {name: distribution.statistics(groups) for name, distribution in self.distributions.items()}


def _counts(target: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels, place = np.unique(target, return_inverse=True)
    return labels, np.bincount(place, minlength=len(labels)), np.bincount(place, correct, len(labels))


def joined(parts: list[Any]) -> dict[str, np.ndarray]:
    """Tables of rows as one, in the order of their numbers."""
    parts = [part for part in parts if part]
    if not parts:
        return {}
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(table["row"], kind="stable")  # positions of a row are in order already
    return {name: column[order] for name, column in table.items()}


def thinned(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """A sample of at most 8,192 rows for pictures, the same whatever the order in which they come."""
    names = ("row", "correct", "log_one_minus_confidence", "log_layerwise")
    held = [part for part in parts if part]
    if not held:
        return {}
    table = {name: np.concatenate([part[name] for part in held]) for name in names}
    # those of the smallest hash of their number, so that data in order (of class, of length) are sampled evenly
    mixed = (table["row"].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    order = np.argsort(mixed, kind="stable")[:_SAMPLE]
    return {name: column[order] for name, column in table.items()}
