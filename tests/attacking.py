"""What the tests of attacks share: the attack, a small network with samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LINF = {"norm": math.inf, "eps": 0.2, "step": 0.05, "steps": 6}


def small(scale: float = 1.0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).double().requires_grad_(False)
    model[2].weight.mul_(scale)
    model[2].bias.mul_(scale)
    return model


def samples(N: int = 9) -> tuple[Tensor, Tensor]:
    return torch.rand(N, 12, dtype=torch.float64), torch.arange(N) % 5
