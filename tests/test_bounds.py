"""The bounds against what really happens to the loss within the ball.

Letters: N points, D features, C classes.
"""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flatcore.robustness import lipschitz_lower_estimate, loss_change_bound, loss_change_radius, margin_radius

UNIT = torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


def loss(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy that keeps its digits where it is small: log(1 + sum_{j != y} exp(z_j - z_y))."""
    z = features @ weight.T + bias
    own = target.unsqueeze(1)
    r = (z - z.gather(1, own)).scatter(1, own, -torch.inf).logsumexp(1)
    return torch.where(r < 0, r.exp().log1p(), r + (-r).exp().log1p())


def climbed(weight: Tensor, bias: Tensor, features: Tensor, target: Tensor, radius: Tensor) -> list[Tensor]:
    """Points at distance ``radius`` of features where the loss is high: along its gradient, and towards each class."""
    own = target.unsqueeze(1)
    points = []
    here = features
    for _ in range(3):  # gradient steps, each to the rim
        z = here @ weight.T + bias
        q = torch.softmax(z.scatter(1, own, -torch.inf), 1)
        ahead = q @ weight - weight[target]
        ahead = ahead / ahead.norm(dim=1, keepdim=True).clamp_min(1e-300)
        here = features + radius.unsqueeze(1) * ahead
        points.append(here)
    for j in range(len(weight)):
        ahead = weight[j] - weight[target]
        ahead = ahead / ahead.norm(dim=1, keepdim=True).clamp_min(1e-300)
        points.append(features + radius.unsqueeze(1) * ahead)
    return points


def heads(trials: int) -> Any:
    """Random heads and points from uniform to very confident: 40 points of each."""
    for trial in range(trials):
        random = torch.Generator().manual_seed(trial)
        C, D = 2 + trial % 7, 1 + trial % 11
        options = {"generator": random, "dtype": torch.float64}
        weight = torch.randn(C, D, **options) * 10 ** (2 * torch.rand((), **options) - 1)
        bias = torch.randn(C, **options)
        features = torch.randn(40, D, **options) * 10 ** (3 * torch.rand(40, 1, **options) - 2)
        target = torch.randint(0, C, (40,), generator=random)
        radius = 10 ** (5 * torch.rand((), **options) - 4).item()
        yield weight, bias, features, target, radius


def test_certified_bound_holds_in_12000_random_trials() -> None:
    """A feature extractor that is a rotation and a scale by L reaches every point of the ball of L delta."""
    trials, tightest = 0, math.inf
    for weight, bias, features, target, radius in heads(300):
        L = 3.0
        bound = loss_change_bound(features, weight, target, radius, lipschitz=L, linear_bias=bias)
        before = loss(features, weight, bias, target)
        for point in climbed(weight, bias, features, target, torch.full((40,), L * radius, dtype=torch.float64)):
            after = loss(point, weight, bias, target)
            rise = after - before
            # the test's own roundings: of the products behind two losses, whose slope in the logits is at most 1 each
            size = (features.abs() + point.abs()) @ weight.abs().T
            error = 4 * (features.shape[1] + 4) * UNIT * (size.amax(1) + bias.abs().amax() + after)
            assert (rise <= bound + error).all()
        well = rise > 1e-6
        if well.any():
            tightest = min(tightest, (bound / rise)[well].min().item())
        trials += len(features)
    assert trials >= 10_000
    assert tightest < 1.2, "the bound is met to a fifth somewhere"


def test_bound_is_the_formula_in_mpmath() -> None:
    """g h + Var_p(w) h^2 / 2 + R^3 h^3 / (36 sqrt 3), and its cap, with 60 digits; confident rows too."""
    mpmath.mp.dps = 60
    for scale in (1.0, 30.0, 300.0):
        weight, bias = torch.randn(4, 3, dtype=torch.float64) * scale, torch.randn(4, dtype=torch.float64)
        features, target = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
        w = [mpmath.matrix(row.tolist()) for row in weight]
        spread = max(mpmath.norm(a - b) for a in w for b in w)
        for T, radius in ((1.0, 0.01), (2.0, 1.0)):
            found = loss_change_bound(
                features, weight, target, radius, lipschitz=2.0, linear_bias=bias, temperature=T
            )  # fmt: skip
            for n in range(6):
                phi, y = mpmath.matrix(features[n].tolist()), int(target[n])
                z = [(mpmath.fdot(w[j], phi) + mpmath.mpf(bias[j].item())) / T for j in range(4)]
                top = max(z)
                e = [mpmath.exp(value - top) for value in z]
                p = [value / sum(e) for value in e]
                mean = p[0] * w[0] + p[1] * w[1] + p[2] * w[2] + p[3] * w[3]
                g = mpmath.norm(mean - w[y]) / T
                variance = sum(p[j] * mpmath.norm(w[j] - mean) ** 2 for j in range(4)) / T**2
                h = 2 * mpmath.mpf(radius)
                cubic = g * h + variance * h**2 / 2 + (spread / T) ** 3 * h**3 / (36 * mpmath.sqrt(3))
                want = min(cubic, h * max(mpmath.norm(w[j] - w[y]) for j in range(4)) / T)
                ratio = mpmath.mpf(found[n].item()) / want
                assert 1 <= ratio < 1 + 1e-9


def test_radius_is_the_inverse_rounded_down() -> None:
    for weight, bias, features, target, _ in heads(40):
        for e in (1e-8, 0.1, 20.0):
            options = {"lipschitz": 0.7, "linear_bias": bias}
            radius = loss_change_radius(features, weight, target, e, **options)
            assert (radius > 0).all() and radius.isfinite().all()
            for n in range(0, 40, 13):
                row = (features[n : n + 1], weight, target[n : n + 1])
                assert loss_change_bound(*row, radius[n].item(), **options).item() <= e
                # the bound is the lesser of two, so that the radius is the larger
                assert loss_change_bound(*row, radius[n].item() * (1 + 1e-6), **options).item() > e


def test_radius_edges() -> None:
    features, target = torch.randn(3, 2), torch.tensor([0, 1, 0])
    equal = torch.ones(2, 2)
    assert loss_change_radius(features, equal, target, 0.5, lipschitz=1.0).tolist() == [math.inf] * 3
    assert loss_change_bound(features, equal, target, 5.0, lipschitz=1.0).tolist() == [0.0] * 3
    assert margin_radius(features, equal, target, lipschitz=1.0).tolist() == [math.inf] * 3
    for e in (0.0, -1.0):
        assert loss_change_radius(features, torch.eye(2), target, e, lipschitz=1.0).tolist() == [0.0] * 3
    assert loss_change_radius(features, torch.eye(2), target, math.inf, lipschitz=1.0).tolist() == [math.inf] * 3
    assert loss_change_bound(features, torch.eye(2), target, 0, lipschitz=1.0).tolist() == [0.0] * 3
    one = torch.ones(1, 2)
    with pytest.warns(UserWarning, match="one output"):
        assert loss_change_radius(features, one, target * 0, 0.5, lipschitz=1.0).tolist() == [math.inf] * 3
    with pytest.warns(UserWarning, match="one output"):
        assert margin_radius(features, one, target * 0, lipschitz=1.0).tolist() == [math.inf] * 3
    bad = features.clone()
    bad[1] = math.nan
    for found in (
        loss_change_bound(bad, torch.eye(2), target, 1.0, lipschitz=1.0),
        loss_change_radius(bad, torch.eye(2), target, 1.0, lipschitz=1.0),
        loss_change_radius(bad, torch.eye(2), target, 0.0, lipschitz=1.0),
        margin_radius(bad, torch.eye(2), target, lipschitz=1.0),
    ):
        assert found.isnan().tolist() == [False, True, False]


def test_shapes_and_kinds() -> None:
    features, weight, target = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.long)
    for function, extra in ((loss_change_bound, (0.1,)), (loss_change_radius, (0.1,)), (margin_radius, ())):
        found = function(features, weight, target, *extra, lipschitz=1.0)
        assert found.shape == (2, 3) and found.dtype == torch.float64
        given = function(features.numpy(), weight.numpy(), target.numpy(), *extra, lipschitz=1.0)
        assert isinstance(given, np.ndarray)
        np.testing.assert_array_equal(given, found)
        empty = function(features[:0], weight, target[:0], *extra, lipschitz=1.0)
        assert empty.shape == (0, 3)


def test_many_classes_have_a_bound_that_is_no_less() -> None:
    """Above 4096 classes the largest distance is bounded; a head of 4,097 with one far row, where it counts double."""
    weight = torch.zeros(4097, 2, dtype=torch.float64)
    weight[0, 0] = 3.0
    features, target = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1])
    # g = 3/4097 and Var ~ 9/4097, R = 3: at h = 10 the cap, 30, is exceeded by the cubic term, 27000/62.4
    assert loss_change_bound(features, weight, target, 1e-3, lipschitz=1.0).item() == pytest.approx(
        3e-3 / 4097 + 9e-6 / 4097 / 2 + (2 * 3 * 4096 / 4097) ** 3 * 1e-9 / (36 * math.sqrt(3)), rel=1e-3
    )
    assert loss_change_bound(features, weight, target, 10.0, lipschitz=1.0).item() == pytest.approx(30.0)


def test_margin_radius_is_where_the_first_class_overtakes() -> None:
    for weight, bias, features, target, _ in heads(60):
        L = 1.7
        radius = margin_radius(features, weight, target, lipschitz=L, linear_bias=bias)
        z = features @ weight.T + bias
        right = z.argmax(1) == target
        assert torch.equal(radius > 0, right)
        far = torch.where(right, radius * L, 0)
        edge = torch.zeros(len(features), dtype=torch.bool)
        for j in range(len(weight)):
            ahead = weight[j] - weight[target]
            unit = ahead / ahead.norm(dim=1, keepdim=True).clamp_min(1e-300)
            inside, outside = (
                (features + f * far.unsqueeze(1) * unit) @ weight.T + bias for f in (1 - 1e-9, 1 + 1e-6)
            )  # fmt: skip
            own = target.unsqueeze(1)
            assert (inside.gather(1, own).squeeze(1) >= inside[:, j])[right].all()
            edge |= (outside.gather(1, own).squeeze(1) < outside[:, j]) & (j != target)
        assert edge[right].all(), "just beyond the radius some class overtakes"


def test_the_papers_form_is_its_formula() -> None:
    features, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    target = torch.arange(5) % 4
    p = torch.softmax(features @ weight.T, 1)
    norm = features.norm(dim=1)
    kappa = weight.square().sum() * norm**2 * (p * (1 - p)).sum(1)
    L, delta = 1.5, 0.2
    for given, r in ((None, norm), (2.0, torch.full((5,), 2.0, dtype=torch.float64))):
        want = delta**2 * L**2 * kappa / (2 * r**2) + delta**3 * 4 * 3 * L**6 / (24 * r**3)
        options = {"lipschitz": L, "kind": "paper", "feature_norm": given}
        np.testing.assert_allclose(loss_change_bound(features, weight, target, delta, **options), want, rtol=1e-10)
        for n in range(5):
            radius = loss_change_radius(features, weight, target, want[n].item(), **options)
            assert radius[n].item() == pytest.approx(delta, rel=1e-9)


def test_the_papers_form_is_no_certificate() -> None:
    """It leaves the gradient out: a point that is no minimum exceeds it in a small ball."""
    features, target = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    rise = math.log1p(math.exp(1 + 1e-3)) - math.log1p(math.exp(1))  # along w_0, by 1e-3
    assert rise > loss_change_bound(features, torch.eye(2), target, 1e-3, lipschitz=1.0, kind="paper").item()
    assert rise < loss_change_bound(features, torch.eye(2), target, 1e-3, lipschitz=1.0).item()


# ------------------------------------------------------------------------------------------------- the lower estimate
def test_lower_estimate_is_below_and_near_the_spectral_norm() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5).double(), nn.Linear(5, 3).double())
    true = torch.linalg.matrix_norm(model[1].weight.detach(), 2).item()
    found = lipschitz_lower_estimate(model, torch.randn(7, 2, 3, dtype=torch.float64), iterations=200)
    assert (found <= true * (1 + 1e-12)).all()
    np.testing.assert_allclose(found, true, rtol=1e-6)
    one = lipschitz_lower_estimate(model, torch.randn(7, 2, 3, dtype=torch.float64), iterations=1)
    assert (one < true).all()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_lower_estimate_is_the_jacobians_norm_where_it_bends() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    found = lipschitz_lower_estimate(model, x, iterations=500)
    for n in range(5):
        jacobian = torch.autograd.functional.jacobian(model[:4], x[n])
        assert found[n].item() == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("function", "changes", "error", "words"),
    [
        (loss_change_bound, {"radius": -1.0}, ValueError, "radius must be finite and at least 0, got -1.0"),
        (loss_change_bound, {"radius": math.inf}, ValueError, "radius must be finite"),
        (loss_change_bound, {"lipschitz": 0.0}, ValueError, "lipschitz must be finite and above 0, got 0.0"),
        (loss_change_bound, {"lipschitz": None}, TypeError, "lipschitz must be a number"),
        (loss_change_bound, {"kind": "best"}, ValueError, "kind must be one of 'certified', 'paper', got 'best'"),
        (loss_change_bound, {"feature_norm": 1.0}, ValueError, "feature_norm belongs to kind='paper'"),
        (loss_change_bound, {"feature_norm": 0.0, "kind": "paper"}, ValueError, "feature_norm must be finite and above 0"),
        (loss_change_bound, {"target": None}, ValueError, "target must hold integer class labels, got None"),
        (loss_change_bound, {"target": torch.tensor([-100, 0])}, ValueError, "got the ignored label -100"),
        (loss_change_bound, {"target": torch.tensor([2, 0])}, ValueError, "target"),
        (loss_change_bound, {"features": torch.zeros(2, 3)}, ValueError, "features must have shape"),
        (loss_change_radius, {"increase": math.nan}, ValueError, "increase must be a number, got NaN"),
        (loss_change_radius, {"increase": "e"}, TypeError, "increase must be a number"),
        (margin_radius, {"lipschitz": math.inf}, ValueError, "lipschitz must be finite"),
    ],
)  # fmt: skip
def test_bad_input(function: Any, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {
        "features": torch.zeros(2, 2), "linear_weight": torch.eye(2), "target": torch.tensor([0, 1]), "lipschitz": 1.0
    }  # fmt: skip
    arguments |= {loss_change_bound: {"radius": 0.1}, loss_change_radius: {"increase": 0.1}}.get(function, {})
    with pytest.raises(error, match=words):
        function(**arguments | changes)


def test_bad_input_of_the_lower_estimate() -> None:
    class Detached(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for network, inputs, options, error, words in (
        (model, torch.zeros(1, 2, dtype=torch.long), {}, TypeError, "inputs must be a floating-point"),
        (model, [1.0], {}, TypeError, "got list"),
        (model, torch.zeros(1, 2), {"iterations": 0}, ValueError, "iterations must be at least 1"),
        (Detached(*model), torch.zeros(1, 2), {}, ValueError, "the features do not depend on inputs"),
        (model.to, torch.zeros(1, 2), {}, TypeError, r"model must be a torch\.nn\.Module"),
    ):
        with pytest.raises(error, match=words):
            lipschitz_lower_estimate(network, inputs, **options)


def test_lower_estimate_of_features_that_are_the_inputs() -> None:
    assert lipschitz_lower_estimate(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)).item() == pytest.approx(1.0)
