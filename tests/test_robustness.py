"""Attacks and their paths, against steps written out here.

Letters: N samples, K points of a path.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from attacking import LINF, samples, small
from torch import Tensor, nn
from torch.nn import functional

import flatcore
from flatcore import robustness
from flatcore._cli import demo

L2 = {"norm": 2, "eps": 1.0, "step": 0.3, "steps": 6}


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A trained network and 120 of its test images."""
    trained = demo.train(3, 500)
    return trained.model.requires_grad_(False).eval(), trained.images[:120], trained.target[:120]


def uphill(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A positive multiple of the loss's gradient that does not vanish: that of log sum_{j != y} exp z_j - z_y."""
    x = x.clone().requires_grad_()
    z = model(x)
    own = y.unsqueeze(1)
    r = z.scatter(1, own, -torch.inf).logsumexp(1) - z.gather(1, own).squeeze(1)
    return torch.autograd.grad(r.sum(), x)[0]


def walked(model: nn.Module, x: Tensor, y: Tensor, *, norm: float, eps: float, step: float, steps: int) -> list[Tensor]:
    """Every point of the attack, one sample at a time, in float64."""
    rows = []
    for n in range(len(x)):
        start, points = x[n : n + 1], [x[n : n + 1]]
        for _ in range(steps):
            gradient = uphill(model, points[-1], y[n : n + 1])
            ahead = gradient.sign() if norm == math.inf else gradient / gradient.norm()
            moved = points[-1] + step * ahead - start
            moved = moved.clamp(-eps, eps) if norm == math.inf else moved * min(1.0, eps / float(moved.norm()))
            points.append((start + moved).clamp(0, 1))
        rows.append(torch.cat(points))
    return list(torch.stack(rows, dim=1))


@pytest.mark.parametrize("attack", (LINF, L2), ids=("linf", "l2"))
@pytest.mark.parametrize("scale", (1.0, 500.0))
def test_pgd_takes_the_steps_at_every_confidence(attack: dict[str, Any], scale: float) -> None:
    model, (x, y) = small(scale), samples()
    points = walked(model, x, y, **attack)
    for steps in (1, attack["steps"]):
        found = robustness.pgd(model, x, y, **attack | {"steps": steps})
        # roundings of the steps: some ten of values up to 1, in float64
        np.testing.assert_allclose(found, points[steps], rtol=0, atol=64 * torch.finfo(torch.float64).eps)
    assert not torch.equal(points[1], x)


def test_pgd_usual_follows_autograd_and_stands_still_where_that_is_zero() -> None:
    model, (x, y) = small(), samples()
    found = robustness.pgd(model, x, y, gradient="usual", **LINF)
    # float64 at gaps of a few: both gradients have the same signs
    np.testing.assert_array_equal(found, robustness.pgd(model, x, y, **LINF))
    confident = small(1e6)
    labels = confident(x).argmax(dim=1)
    assert torch.equal(robustness.pgd(confident, x, labels, gradient="usual", **LINF), x)
    assert (robustness.pgd(confident, x, labels, **LINF) != x).any(dim=1).all()


def test_usual_l2_steps_have_full_length_while_the_gradient_has_a_direction() -> None:
    """float32, a gap near 95: the gradient is 1e-41, whose square is 0."""
    head = nn.Linear(2, 2, bias=False)
    head.weight.data.copy_(190 * torch.eye(2))
    x = torch.tensor([[0.75, 0.25]])
    moved = robustness.pgd(head, x, torch.tensor([0]), norm=2, eps=0.2, step=0.1, steps=1, gradient="usual")
    assert (moved - x).norm().item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("attack", (LINF, L2), ids=("linf", "l2"))
def test_pgd_stays_in_the_ball_and_the_range(attack: dict[str, Any]) -> None:
    model, (x, y) = small(30), samples(50)
    for options in ({}, {"random_start": True, "generator": torch.Generator().manual_seed(1)}, {"clip": (-1.0, 1.5)}):
        found = robustness.pgd(model, x, y, **attack, **options)
        low, high = options.get("clip", (0.0, 1.0))
        assert (found >= low).all() and (found <= high).all()
        moved = found - x
        size = moved.abs().amax(1) if attack["norm"] == math.inf else moved.norm(dim=1)
        assert (size <= attack["eps"] * (1 + 1e-12)).all()
    free = robustness.pgd(model, x, y, clip=None, **attack | {"eps": 9.0, "step": 2.0})
    assert (free < 0).any() or (free > 1).any()


def test_random_start_is_uniform_in_the_ball_and_repeats_with_its_generator() -> None:
    model, x = small(1e6), samples(4000)[0]
    labels = model(x).argmax(1)
    x = x * 0 + 0.5

    def start(norm: float) -> Tensor:
        options = {"norm": norm, "eps": 0.25, "step": 1e-12, "steps": 1, "gradient": "usual", "random_start": True}
        return robustness.pgd(model, x, labels, **options, generator=torch.Generator().manual_seed(2)) - x

    cube, ball = start(math.inf), start(2)
    assert torch.equal(cube, start(math.inf))
    # the mean of |u| over (-a, a) is a/2; of (radius/a)^12 over the ball 1/2, each to five standard errors
    assert cube.abs().mean().item() == pytest.approx(0.125, abs=5 * 0.125 / math.sqrt(3 * cube.numel()))
    inside = (ball.norm(dim=1) / 0.25) ** 12
    assert inside.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / len(x)))


@pytest.mark.parametrize("attack", (LINF, L2), ids=("linf", "l2"))
def test_path_is_what_is_measured_at_the_points_of_pgd(attack: dict[str, Any]) -> None:
    model, (x, y) = small(20), samples()
    path = robustness.attack_path(model, x, y, **attack)
    points = walked(model, x, y, **attack)
    assert torch.equal(path.adversarial, robustness.pgd(model, x, y, **attack))
    body, head = model[:2], model[2]
    for k, point in enumerate(points):
        features = body(point)
        want = flatcore.head_metrics(features, head.weight, y, linear_bias=head.bias)
        assert torch.equal(path.correct[k], want.prediction == y)
        for name, values in want._asdict().items():
            if name != "prediction":
                # the points agree to 1e-14, logs of differences of logits of some 20 to a thousand times that
                np.testing.assert_allclose(getattr(path, name)[k], values, rtol=1e-9, atol=1e-9, err_msg=name)
        truth = uphill(model, point, y).norm(dim=1).log()  # less log(1 - p_y), by its own formula
        z = head(features)
        rest = z.scatter(1, y.unsqueeze(1), -torch.inf).logsumexp(1)
        truth = truth + functional.logsigmoid(rest - z.gather(1, y.unsqueeze(1)).squeeze(1))
        np.testing.assert_allclose(path.log_input_gradient_norm[k], truth, rtol=1e-9, atol=1e-9)
        moved = point - x
        size = moved.abs().amax(1) if attack["norm"] == math.inf else moved.norm(dim=1)
        np.testing.assert_allclose(path.input_displacement[k], size, atol=1e-12)
        np.testing.assert_allclose(path.feature_displacement[k], (features - body(x)).norm(dim=1), atol=1e-12)


def test_path_in_chunks_with_random_start_and_usual_gradient() -> None:
    model, (x, y) = small(20), samples()
    whole, parts = (robustness.attack_path(model, x, y, chunk_size=size, **LINF) for size in (None, 4))
    for name, a, b in zip(whole._fields, whole, parts, strict=True):
        np.testing.assert_allclose(a.double(), b.double(), rtol=1e-10, atol=1e-12, err_msg=name)
    options = LINF | {"random_start": True}
    begun = robustness.attack_path(model, x, y, generator=torch.Generator().manual_seed(5), **options)
    assert torch.equal(
        begun.adversarial, robustness.pgd(model, x, y, generator=torch.Generator().manual_seed(5), **options)
    )
    assert (begun.input_displacement[0] > 0).all() and (begun.feature_displacement[0] > 0).all()
    confident = small(1e6)
    labels = confident(x).argmax(dim=1)
    usual = robustness.attack_path(confident, x, labels, gradient="usual", **LINF)
    assert (usual.input_displacement == 0).all()
    assert usual.log_input_gradient_norm.isfinite().all(), "the exact norm is measured, whichever gradient leads"


def test_path_of_no_samples() -> None:
    path = robustness.attack_path(
        small(), torch.zeros(0, 12, dtype=torch.float64), torch.zeros(0, dtype=torch.long), **LINF
    )
    assert path.correct.shape == path.log_layerwise.shape == (7, 0)
    assert path.flip_step.shape == (0,)
    assert path.aligned("loss").offset.tolist() == []


def test_flip_step_and_alignment_against_loops(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits
    path = robustness.attack_path(model, x, y, norm=math.inf, eps=0.3, step=0.03, steps=10)
    flips = []
    for n in range(len(x)):
        wrong = [k for k in range(11) if not path.correct[k, n]]
        flips.append(wrong[0] if path.correct[0, n] and wrong else -1)
    assert path.flip_step.tolist() == flips
    assert 5 < sum(f > 0 for f in flips) < len(x)
    found = path.aligned("log_layerwise", (0.0, 0.5, 1.0))
    by_offset: dict[int, list[float]] = {}
    for n, flip in enumerate(flips):
        for k in range(11):
            if flip >= 0:
                by_offset.setdefault(k - flip, []).append(path.log_layerwise[k, n].item())
    assert found.offset.tolist() == sorted(by_offset)
    for column, (offset, count) in enumerate(zip(found.offset.tolist(), found.samples.tolist(), strict=True)):
        values = by_offset[offset]
        assert count == len(values)
        want = [min(values), float(np.median(values)), max(values)]
        np.testing.assert_allclose(found.quantiles[:, column], want, rtol=1e-12)


def test_path_picture_shows_the_median(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits
    path = robustness.attack_path(model, x, y, norm=math.inf, eps=0.3, step=0.03, steps=10)
    figure = path.plot(("log_layerwise", "loss"))
    assert len(figure.axes) == 2
    for axes, name in zip(figure.axes, ("log_layerwise", "loss"), strict=True):
        found = path.aligned(name)
        kept = found.samples >= 0.1 * (path.flip_step >= 0).sum()
        line = next(line for line in axes.lines if line.get_label() == "median")
        np.testing.assert_array_equal(line.get_xdata(), found.offset[kept])
        np.testing.assert_array_equal(line.get_ydata(), found.quantiles[1, kept])
    with pytest.raises(ValueError, match="measures must be one of"):
        path.plot(("prediction",))


def test_nothing_of_the_model_is_changed(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits
    model = copy.deepcopy(model).requires_grad_(True).train()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        robustness.attack_path(model, x[:4], y[:4], **LINF)
        robustness.scaling_sweep(model, [(x[:4], y[:4])], (1, 7), **LINF)
        robustness.transfer(model, [(x[:4], y[:4])], (1, 7), **LINF)
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name]), name
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
