"""What the tests of input gradients share: a small network, a batch, autograd one sample at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flatcore._check.tolerance import assert_within, product_tolerance

N, C = 9, 5


def cnn(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(6 * 16, C)
    )
    model(torch.randn(20, 2, 6, 6))  # running statistics
    return model.to(dtype).eval()


def batch(dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, 2, 6, 6, generator=g, dtype=torch.float64).to(dtype), torch.randint(C, (N,), generator=g)


def one_at_a_time(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """The cross-entropy's gradient by autograd, a sample at a time, float64."""
    rows = []
    for n in range(x.shape[0]):
        leaf = x[n : n + 1].double().detach().requires_grad_()
        loss = functional.cross_entropy(model(leaf), y[n : n + 1], reduction="sum", **options)
        rows.append(torch.autograd.grad(loss, leaf)[0])
    return torch.cat(rows)


def close(name: str, got: Tensor, want: Tensor, terms: int = 1000) -> None:
    """Two computations of one gradient by differently ordered products: by the largest entry of each sample."""
    largest = want.double().abs().flatten(1).amax(1).reshape(-1, *(1,) * (want.dim() - 1)).expand_as(want)
    assert_within(name, got, want.double().numpy(), product_tolerance(largest.numpy(), terms, got.dtype))
