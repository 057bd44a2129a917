"""What the tests of evaluate share: a network, rows, and a loader of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

N, D, C = 700, 16, 5


def network(scale: float = 1.0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Dropout(0.5), nn.Linear(D, C))
    with torch.no_grad():
        model[-1].weight.mul_(scale)
        model[-1].bias.mul_(scale)
    return model


def data(rows: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 6), torch.randint(0, C, (rows,))


def loader(x: Tensor, y: Tensor, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))
