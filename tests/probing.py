"""What the tests of Probe share: the right value, comparisons, weights that are swapped."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatcore

N, D, C = 6, 8, 4


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5), torch.arange(N) % C


def small(head: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, D), nn.Tanh(), nn.Linear(D, C) if head is None else head)


def rectified() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, D), nn.ReLU(), nn.Linear(D, C))


def right(features: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None = None, **options: Any) -> Tensor:
    """The measure of these numbers, in float64."""
    f, w, b = (None if x is None else x.detach().double() for x in (features, weight, bias))
    return flatcore.relative_flatness(f, w, y, linear_bias=b, log=True, **options)


def wanted(features: Tensor, head: nn.Linear, target: Tensor | None = None, **options: Any) -> Tensor:
    return flatcore.relative_flatness(features, head.weight, target, linear_bias=head.bias, **options)


def same(value: Any, wanted: Any) -> None:
    torch.testing.assert_close(value.detach().double(), wanted.detach().double(), rtol=1e-5, atol=1e-5)


def refused(ask: Callable[[], Any], *words: str, error: type[Exception] = RuntimeError) -> None:
    with pytest.raises(error) as caught:
        ask()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@contextlib.contextmanager
def averaged(model: nn.Module, averages: dict[str, Tensor], how: str) -> Iterator[None]:
    """Weights exchanged for others, as torch_ema does: past autograd and past the version (pytorch_ema#2)."""
    before = {name: p.data.clone() for name, p in model.named_parameters()}

    def put(values: dict[str, Tensor]) -> None:
        for name, p in model.named_parameters():
            if how == "copied":
                p.data.copy_(values[name])
            else:
                p.data = values[name]

    put(averages)
    yield
    put(before)


class Changed(nn.Module):
    """A body, a head, and what a model does with its output."""

    def __init__(self, change: Callable[[Tensor], Any], bias: bool = True):
        super().__init__()
        self.body, self.head = nn.Linear(5, D), nn.Linear(D, C, bias=bias)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.head(self.body(x).relu()))


@dataclasses.dataclass
class Output:
    loss: Tensor | None
    logits: Tensor
