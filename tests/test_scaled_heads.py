"""Scaled heads, transfer and the detector, against loops written out here.

Letters: N samples.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from attacking import LINF
from torch import Tensor, nn
from torch.nn import functional

from flatcore import robustness
from flatcore._cli import demo


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A trained network and 120 of its test images."""
    trained = demo.train(3, 500)
    return trained.model.requires_grad_(False).eval(), trained.images[:120], trained.target[:120]


# ----------------------------------------------------------------------------------------------------- scaled heads
def test_scaled_head_scales_and_restores_bit_for_bit() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    with robustness.scaled_head(model, 1 / 3, head="1") as head:
        assert head is model[1]
        assert torch.equal(head.weight, before["1.weight"] * (1 / 3))
        assert torch.equal(head.bias, before["1.bias"] * (1 / 3))
        assert torch.equal(model[0].weight, before["0.weight"])
    with pytest.raises(ZeroDivisionError), robustness.scaled_head(model, 1 / 3, head=model[1]):
        raise ZeroDivisionError
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name])


def test_scaled_head_refuses_a_weight_that_others_use() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4)})
    model["head"].weight = model["embedding"].weight
    with pytest.raises(ValueError, match="'embedding', 'head'"), robustness.scaled_head(model, 2, head="head"):
        pass
    parametrised = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="parametrised"), robustness.scaled_head(parametrised, 2, head="0"):
        pass


def test_sweep_is_flat_with_the_exact_gradient_alone(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits
    loader = list(zip(x.split(50), y.split(50), strict=True))
    found = robustness.scaling_sweep(model, iter(loader), (1, 10, 100), **LINF)  # an iterator: read once
    assert [(r.scale, r.gradient) for r in found] == [(s, g) for s in (1, 10, 100) for g in ("exact", "usual")]
    exact, usual = ([r for r in found if r.gradient == kind] for kind in ("exact", "usual"))
    right = (model(x).argmax(1) == y).double().mean().item()
    assert all(r.clean_accuracy == pytest.approx(right) and r.samples == 120 for r in found)
    error = max(0.01, 2 * max(r.standard_error for r in exact))
    assert max(r.robust_accuracy for r in exact) - min(r.robust_accuracy for r in exact) <= error
    assert usual[0].robust_accuracy - exact[0].robust_accuracy <= error
    assert usual[2].robust_accuracy > exact[2].robust_accuracy + 0.3
    last = usual[2]
    assert last.loss_increase.q50 == 0 < exact[2].loss_increase.q50


def test_sweep_quantiles_are_of_the_values(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits
    (found,) = robustness.scaling_sweep(model, [(x, y)], (3.0,), gradient="exact", **LINF)
    scaled = copy.deepcopy(model)
    scaled[1].weight.mul_(3)
    scaled[1].bias.mul_(3)
    moved = robustness.pgd(scaled, x, y, **LINF)
    losses = [functional.cross_entropy(scaled(p), y, reduction="none").double() for p in (x, moved)]
    assert found.robust_accuracy == pytest.approx(
        ((scaled(x).argmax(1) == y) & (scaled(moved).argmax(1) == y)).double().mean().item()
    )
    rise = np.sort((losses[1] - losses[0]).numpy())
    np.testing.assert_allclose(
        found.loss_increase, [rise[round(q * 119)] for q in (0.05, 0.25, 0.5, 0.75, 0.95)], rtol=1e-4, atol=1e-4
    )
    for name, point in (("log_layerwise", x), ("attacked_log_layerwise", moved)):
        p = torch.softmax(scaled(point).double(), 1)
        features = scaled[0](point).double()
        pairs = (p.unsqueeze(1) * p.unsqueeze(2) * (1 - torch.eye(10))).sum((1, 2))
        truth = (features.square().sum(1) * pairs * scaled[1].weight.double().square().sum()).log().sort().values
        np.testing.assert_allclose(getattr(found, name).q50, truth[round(0.5 * 119)], atol=1e-4)


def test_transfer_counts(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits
    other = demo.train(4, 30).model.requires_grad_(False)
    found = robustness.transfer({"a": model, "b": other}, [(x[:60], y[:60]), (x[60:], y[60:])], (1.0, 50.0), **LINF)
    assert len(found) == 16
    rows = {(r.source, r.source_scale, r.target, r.target_scale): r for r in found}
    own = robustness.pgd(model, x, y, **LINF)
    with torch.no_grad():
        right = {m: [(net(p).argmax(1) == y) for p in (x, own)] for m, net in (("a", model), ("b", other))}
    flipped = right["a"][0] & ~right["a"][1] & right["b"][0]
    row = rows["a", 1.0, "b", 1.0]
    assert (row.found, row.transferred) == (int(flipped.sum()), int((flipped & ~right["b"][1]).sum()))
    assert row.rate == row.transferred / row.found
    # scaling a head changes no prediction, so that what misleads a model misleads it at any scale
    assert rows["a", 1.0, "a", 50.0].rate == rows["a", 1.0, "a", 1.0].rate == 1
    assert math.isnan(robustness.TransferResult("a", 1, "b", 1, 0, 0).rate)


def test_sweep_picture(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits
    found = robustness.scaling_sweep(model, [(x, y)], (1, 100), **LINF)
    (axes,) = robustness.plot_scaling(found).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    for kind in ("exact", "usual"):
        assert drawn[f"attacked, {kind} gradient"] == [r.robust_accuracy for r in found if r.gradient == kind]


# ------------------------------------------------------------------------------------------------------------ detector
def test_detector_against_every_threshold() -> None:
    """One fold's stump by trying all thresholds on the others, and the accuracy from its own predictions."""
    random = np.random.default_rng(0)
    clean, moved = random.normal(0, 1, 60), random.normal(1, 1, 60)
    found = robustness.perturbation_detector({"x": clean}, {"x": moved}, features=("x",), folds=2, seed=1)

    def accuracy(t: float, above: bool, a: np.ndarray, b: np.ndarray) -> float:
        share = ((b > t).mean() + (a <= t).mean()) / 2
        return share if above else 1 - share

    values = np.sort(np.concatenate([clean, moved]))
    best = max(accuracy(t, True, clean, moved) for t in (values[1:] + values[:-1]) / 2)
    assert found.perturbed_above
    # the tree minimises the Gini index, not the errors: near the best threshold, not at it
    assert accuracy(found.threshold, True, clean, moved) > best - 0.05
    assert len(found.fold_accuracies) == 2
    assert found.accuracy == pytest.approx(np.mean(found.fold_accuracies))
    assert found.interval[0] < found.accuracy < found.interval[1]
    assert 0.6 < found.accuracy < 0.8  # the best of all stumps has Phi(1/2) = 0.69, 60 pairs a standard error of 0.04


def test_detector_keeps_twins_together_and_takes_infinite_logs() -> None:
    """Where a perturbed row equals its clean twin nothing can be told: not above chance."""
    values = torch.randn(40)
    found = robustness.perturbation_detector({"x": values}, {"x": values.clone()}, features=("x",))
    assert found.accuracy == 0.5
    low = torch.full((40,), -math.inf)
    found = robustness.perturbation_detector({"x": values}, {"x": low}, features=("x",))
    assert (found.accuracy, found.perturbed_above, found.feature) == (1.0, False, "x")
    assert found.interval == (1.0, 1.0)
