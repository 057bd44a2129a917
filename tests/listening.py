"""What the situations with torch itself share: a network, a batch, the measure by the textbook."""

from __future__ import annotations

import textbook
import torch
from torch import Tensor, nn
from torch.nn import functional

N, D, C = 24, 8, 4


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, D), nn.Tanh(), nn.Linear(D, C)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5).double(), torch.arange(N) % C


def of(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.detach()
    return textbook.mean("layerwise", features.detach(), weight.detach(), bias)


def right(model: nn.Sequential, x: Tensor) -> Tensor:
    """The measure of a network that nothing listens to: a copy's, with the weights as they are."""
    first, last = model[0], model[-1]
    with torch.no_grad():
        return of(functional.linear(x, first.weight, first.bias).tanh(), last.weight, last.bias)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.detach(), want.detach(), rtol=textbook.FLOAT64, atol=0.0)
