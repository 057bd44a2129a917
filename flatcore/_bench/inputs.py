"""The works' inputs, drawn from a seed on the device: rows of every confidence, as a trained network's are."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .works import Work

SEED = 20240607
HIGHEST_GAP = 60.0
GAPS = {"mixed": (0.1, HIGHEST_GAP), "twins": (0.1, HIGHEST_GAP), "easy": (0.1, 5.0), "confident": (20.0, HIGHEST_GAP)}
"""The gap between a row's two best logits, log-uniform. From 17 on float32 closed forms fail: of "mixed" a fifth."""
TWIN_DISTANCE = 0.01
"""Between two nearly equal rows of W, over their length: their cosine is 0.99995."""
ROWS = 65_536  # of features that get their class's row added at once


class Inputs(NamedTuple):
    """What a work is computed from.

    The row-norm work has only ``features``, its matrix (N, K); the cotangent works have ``features`` and ``target``, their
    logits (N, C) and labels.
    """

    features: Tensor  # (N, D)
    linear_weight: Tensor | None = None  # (C, D)
    linear_bias: Tensor | None = None  # (C,)
    target: Tensor | None = None  # (N,)

    @property
    def labels(self) -> Tensor:
        """The target of a work that has one."""
        assert self.target is not None, "a work without labels"
        return self.target

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features, W and bias of a work that has them."""
        assert self.linear_weight is not None and self.linear_bias is not None, "a work without a head"
        return self.features, self.linear_weight, self.linear_bias

    def rows(self, index: Tensor) -> Inputs:
        """Return the chosen rows."""
        target = None if self.target is None else self.target[index]
        return self._replace(features=self.features[index], target=target)

    def double(self) -> Inputs:
        """Return the same numbers in float64."""
        weight, bias = (None if t is None else t.double() for t in (self.linear_weight, self.linear_bias))
        return Inputs(self.features.double(), weight, bias, self.target)


def inputs(work: Work, device: str = "cpu") -> Inputs:
    """Seeded inputs, drawn once and shared by the works of equal sizes."""
    return _inputs(work.N, work.D, work.C, work.dtype, work.rows, device)


@lru_cache(maxsize=1)  # a work's inputs take up to 2 GB
def _inputs(n: int, d: int, c: int, dtype: str, rows: str, device: str) -> Inputs:
    """Features phi = noise + a w_y with ||w_y|| near 1, so that a is the gap of the logits. One label in ten is wrong."""
    generator, wanted = torch.Generator(device).manual_seed(SEED), getattr(torch, dtype)
    lowest, highest = GAPS[rows]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=device)

    def labels() -> Tensor:
        return torch.randint(c, (n,), generator=generator, device=device)

    if d == 0:  # logits: noise, and the label's raised by the gap
        target = labels()
        logits = normal(n, c)
        logits[torch.arange(n, device=device), target] += lowest * (highest / lowest) ** uniform(n)
        return Inputs(logits.to(wanted), target=target)
    features = normal(n, d)
    if c == 0:
        return Inputs(features.to(wanted))
    weight = normal(c, d) / math.sqrt(d)
    bias = 0.1 * normal(c)
    label = labels()
    gap = lowest * (highest / lowest) ** uniform(n, 1)
    if rows == "twins":
        some = twins(c)
        weight[1:some:2] = weight[:some:2] + TWIN_DISTANCE / math.sqrt(d) * normal(some // 2, d)
        gap = torch.where(label.unsqueeze(1) < some, gap.clamp_min(10.0), gap)  # the two best are the pair
    for start in range(0, n, ROWS):
        stop = start + ROWS
        features[start:stop].addcmul_(gap[start:stop], weight[label[start:stop]])
    wrong = uniform(n) < 0.1
    target = torch.where(wrong, (label + 1) % c, label)
    return Inputs(features.to(wanted), weight.to(wanted), bias.to(wanted), target)


def forget() -> None:
    """Let the last work's inputs go."""
    _inputs.cache_clear()


def twins(classes: int) -> int:
    """How many classes, the first ones, have a nearly equal one: 1 %, and so 1 % of the rows."""
    return max(2, classes // 200 * 2)
