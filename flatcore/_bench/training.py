"""W9: a step of ``examples/train_with_flatness.py``'s training, with the regulariser and without.

The network, batch, loss and optimiser of the example on images of 28 x 28, drawn from a seed; a learning rate of 0, so that
every step is the same work. The limit is the same step without the regulariser and without a probe.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import flatcore

from . import rivals
from .candidate import Absent, Candidate
from .inputs import SEED, Inputs
from .works import Work

WEIGHT = 0.03
SIZE = 28


class Step(NamedTuple):
    """What a step leaves: the regulariser's value, and the gradient of the whole loss by the head's weight."""

    value: Tensor
    gradient: Tensor


class Training:
    """A model and what its steps need."""

    def __init__(self, x: Inputs):
        device, count = x.features.device, len(x.features)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(32 * (SIZE // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, 10),
            )  # fmt: skip
            images, labels = torch.rand(count, 1, SIZE, SIZE), torch.randint(10, (count,))
        self.model, self.images, self.labels = model.to(device), images.to(device), labels.to(device)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=0.0)

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        layer = self.model[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def step(self, regularised: Callable[[], tuple[Tensor, Tensor]]) -> Step:
        """Forward, backward, optimiser: ``regularised`` returns the logits and the log of the flatness, or 0."""
        with torch.enable_grad():
            logits, log_flatness = regularised()
            loss = nn.functional.cross_entropy(logits, self.labels)
            value = nn.functional.softplus(log_flatness)
            loss = loss + WEIGHT * value
            self.optimiser.zero_grad()
            loss.backward()
        self.optimiser.step()
        gradient = self.head.weight.grad
        assert gradient is not None
        return Step(value.detach(), gradient)

    def plain(self) -> None:
        """A step without the regulariser."""
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(self.model(self.images), self.labels)
            self.optimiser.zero_grad()
            loss.backward()
        self.optimiser.step()


def _native(x: Inputs) -> Callable[[], Step]:
    training = Training(x)
    probe = flatcore.Probe(training.model).attach()

    def regularised() -> tuple[Tensor, Tensor]:
        logits = training.model(training.images)
        return logits, probe.relative_flatness(log=True)

    def run() -> Step:
        with flatcore.backend("native"):
            return training.step(regularised)

    return run


def _eager(form: rivals.Rival, x: Inputs) -> Callable[[], Step]:
    training = Training(x)

    def regularised() -> tuple[Tensor, Tensor]:
        features = training.model[:-1](training.images)
        flatness: Any = form(features, training.head.weight, training.head.bias)
        return training.head(features), flatness.log()

    return lambda: training.step(regularised)


def truth(x: Inputs) -> Step:
    """Value and gradient in float64, from the features that the model has in float32."""
    training = Training(x)
    with torch.no_grad():
        features = training.model[:-1](training.images).double()
    leaf = training.head.weight.detach().double().requires_grad_()
    bias = training.head.bias.detach().double()
    with torch.enable_grad(), flatcore.backend("reference"):
        value = nn.functional.softplus(flatcore.relative_flatness(features, leaf, linear_bias=bias, log=True))
        loss = nn.functional.cross_entropy(nn.functional.linear(features, leaf, bias), training.labels)
        (gradient,) = torch.autograd.grad(loss + WEIGHT * value, leaf)
    return Step(value.detach(), gradient)


def candidates(work: Work, *, native: bool, compile: bool) -> tuple[list[Candidate], list[Absent]]:
    """The regulariser through a probe, and written out in plain PyTorch."""
    found = [Candidate("native", "native", _native)] if native else []
    name, form = next(iter(rivals.EAGER["mean layerwise"].items()))
    found.append(Candidate(f"eager, {name}", "eager", partial(_eager, form)))
    if compile:
        compiled = torch.compile(form, dynamic=False)
        found.append(Candidate(f"torch.compile, {name}", "compile", partial(_eager, compiled)))
    return found, [] if native else [Absent("native", "left out by --no-native")]
