"""Attacks, their paths, scaled heads, transfer and detection, against steps written out here.

Letters: N samples, K points of a path.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import flatcore
from flatcore import robustness
from flatcore._cli import demo
from flatcore._probe.probe import Probe

LINF = {"norm": math.inf, "eps": 0.2, "step": 0.05, "steps": 6}
L2 = {"norm": 2, "eps": 1.0, "step": 0.3, "steps": 6}


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A trained network and 120 of its test images."""
    trained = demo.train(3, 500)
    return trained.model.requires_grad_(False).eval(), trained.images[:120], trained.target[:120]


def small(scale: float = 1.0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).double().requires_grad_(False)
    model[2].weight.mul_(scale)
    model[2].bias.mul_(scale)
    return model


def samples(N: int = 9) -> tuple[Tensor, Tensor]:
    return torch.rand(N, 12, dtype=torch.float64), torch.arange(N) % 5


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


# -------------------------------------------------------------------------------------------------------- attack path
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


# ---------------------------------------------------------------------------------------------------------- bad input
def _call(function: str, **changes: Any) -> Any:
    model, (x, y) = small(), samples()
    arguments: dict[str, Any] = {"model": model, "inputs": x, "target": y} | LINF | changes
    if function in ("scaling_sweep", "transfer"):
        pair = arguments.pop("inputs"), arguments.pop("target")
        arguments.setdefault("loader", [pair])
        arguments.setdefault("scales", (1.0,))
    if function == "transfer":
        arguments["models"] = arguments.pop("model")
    return getattr(robustness, function)(**arguments)


def _generator() -> Iterator[Any]:
    yield from ()


BAD = {
    "another norm": ({"norm": 1}, ValueError, "norm must be one of 2, inf, got 1"),
    "eps of zero": ({"eps": 0}, ValueError, "eps must be a finite number above 0, got 0"),
    "eps infinite": ({"eps": math.inf}, ValueError, "eps must be a finite number above 0"),
    "a negative step": ({"step": -0.1}, ValueError, "step must be a finite number above 0, got -0.1"),
    "step no number": ({"step": "x"}, TypeError, "step must be a number"),
    "no steps": ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    "steps of 1.5": ({"steps": 1.5}, TypeError, "steps must be an integer"),
    "gradient": ({"gradient": "best"}, ValueError, "gradient must be one of 'exact', 'usual', got 'best'"),
    "clip": ({"clip": (1.0, 0.0)}, ValueError, "low < high"),
    "clip no pair": ({"clip": 1.0}, TypeError, "clip must be None or a pair"),
    "generator": ({"generator": 3}, TypeError, "generator must be None or a torch.Generator, got int"),
    "random_start": ({"random_start": 1}, TypeError, "random_start must be True or False"),
    "outside the range": ({"inputs": torch.full((9, 12), 255.0).double()}, ValueError, r"clip = \(0.0, 1.0\), got values"),
    "not finite": ({"inputs": torch.full((9, 12), math.nan).double()}, ValueError, "inputs must be finite"),
    "integers": ({"inputs": torch.zeros(9, 12, dtype=torch.long)}, TypeError, "got torch.int64"),
    "a negative label": ({"target": torch.full((9,), -100)}, ValueError, "target must give every row a class"),
    "a label too large": ({"target": torch.full((9,), 5)}, ValueError, "target"),
    "soft labels": ({"target": torch.zeros(9)}, TypeError, "target must hold integer class labels"),
}  # fmt: skip


@pytest.mark.parametrize("function", ("pgd", "attack_path", "scaling_sweep", "transfer"))
@pytest.mark.parametrize("case", BAD)
def test_bad_attacks(function: str, case: str) -> None:
    changes, error, words = BAD[case]
    with pytest.raises(error, match=words):
        _call(function, **changes)


@pytest.mark.parametrize("function", ("scaling_sweep", "transfer"))
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"loader": []}, ValueError, "loader must yield at least one batch, got an empty one"),
        ({"loader": _generator()}, ValueError, "loader must yield at least one batch"),
        ({"loader": 3}, TypeError, "loader must yield pairs"),
        ({"loader": [torch.zeros(3, 12)]}, TypeError, "got a Tensor as batch 0"),
        ({"loader": [(1, 2, 3)]}, TypeError, "got a tuple of 3 as batch 0"),
        ({"loader": [([1.0], torch.zeros(1))]}, TypeError, "got inputs of type list in batch 0"),
        ({"loader": [(torch.zeros(2, 12), torch.zeros(3).long())]}, ValueError, r"\(2, 12\) and \(3,\) in batch 0"),
        ({"loader": [(torch.zeros(0, 12).double(), torch.zeros(0).long())]}, ValueError, "at least one sample"),
        ({"scales": ()}, ValueError, "scales must hold at least one number"),
        ({"scales": (0.0,)}, ValueError, "scales must be finite and above 0, got 0.0"),
        ({"scales": "10"}, TypeError, "scales must be a sequence of numbers, got str"),
        ({"device": "meta"}, ValueError, "model must be on device meta, got one on cpu"),
        ({"device": "nowhere"}, ValueError, "device must name a torch device, got 'nowhere'"),
    ],
)  # fmt: skip
def test_bad_loaders_and_scales(function: str, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        _call(function, **changes)


def test_other_bad_arguments() -> None:
    x, y = samples()
    with pytest.raises(ValueError, match="model must be on the device of the inputs, cpu, got one on meta"):
        robustness.pgd(small().to("meta"), x, y, **LINF)
    with pytest.raises(TypeError, match=r"head must be the head itself, a torch\.nn\.Linear"):
        robustness.attack_path(lambda x: x, x, y, **LINF)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        robustness.attack_path(small(), x, y, chunk_size=0, **LINF)
    with pytest.raises(ValueError, match="models must hold at least one model"):
        robustness.transfer({}, [(x, y)], **LINF)
    with pytest.raises(ValueError, match="gradient must name at least one"):
        robustness.scaling_sweep(small(), [(x, y)], (1,), gradient=(), **LINF)
    path = robustness.attack_path(small(), x, y, **LINF)
    with pytest.raises(ValueError, match="measure must be one of"):
        path.aligned("adversarial")
    with pytest.raises(ValueError, match=r"quantiles must be within 0\.\.1, got 2"):
        path.aligned("loss", (2,))
    with pytest.raises(ValueError, match="results must hold at least one row"):
        robustness.plot_scaling([])
    row = {"x": np.zeros(4)}
    for changes, error, words in (
        ({"features": "x"}, TypeError, "features must be a tuple of names"),
        ({"features": ()}, ValueError, "features must name at least one"),
        ({"features": ("y",)}, TypeError, "clean must have 'y'"),
        ({"perturbed": {"x": np.zeros(3)}}, ValueError, "same rows, got 4 and 3"),
        ({"perturbed": {"x": np.full(4, np.nan)}}, ValueError, "perturbed.x must be free of NaN, got 4 rows"),
        ({"perturbed": {"x": np.zeros((4, 1))}}, ValueError, r"shape \(N,\)"),
        ({"folds": 5}, ValueError, "folds must be from 2 to the number of rows, 4, got 5"),
        ({"folds": 1}, ValueError, "folds must be from 2"),
    ):
        arguments = {"clean": row, "perturbed": row, "features": ("x",), "folds": 2} | changes
        with pytest.raises(error, match=words):
            robustness.perturbation_detector(**arguments)


def test_training_mode_is_refused_unless_allowed() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)).double(), samples()
    for kind in ("exact", "usual"):
        with pytest.raises(ValueError, match=r"BatchNorm1d in training mode.*or pass allow_train_mode=True"):
            robustness.pgd(model, x, y, gradient=kind, **LINF)
        assert model[1].num_batches_tracked == 0
        assert robustness.pgd(model, x, y, gradient=kind, allow_train_mode=True, **LINF | {"steps": 1}).shape == x.shape
        assert model[1].num_batches_tracked == 1
        model[1].reset_running_stats()
    with pytest.raises(ValueError, match=r"call model\.eval\(\)$"):
        robustness.attack_path(model, x, y, **LINF)
    robustness.scaling_sweep(model, [(x, y)], (1,), **LINF)  # in evaluation mode for the call
    assert model[1].num_batches_tracked == 0 and model.training
    stateless = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 5)).double()
    with pytest.raises(ValueError, match="without running statistics"):
        robustness.scaling_sweep(stateless, [(x, y)], (1,), **LINF)
    with pytest.raises(ValueError, match="without running statistics"):
        robustness.transfer(stateless, [(x, y)], **LINF)


def test_a_softcap_is_refused_and_the_hooks_are_gone() -> None:
    class Capped(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    model, (x, y) = Capped(*small()), samples()
    with pytest.raises(RuntimeError, match="is not the output of '2'"):
        robustness.attack_path(model, x, y, **LINF)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert isinstance(Probe(model), Probe)


# ---------------------------------------------------------------------------------------------------------- functions
def test_a_function_is_followed_as_its_module_is() -> None:
    """The model returns a pair; the message asks for a function that picks the logits, and the function is taken."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.body(x).relu()
            return self.head(hidden), hidden

    torch.manual_seed(0)
    pair = Pair().eval()
    x, y = torch.rand(5, 4), torch.arange(5) % 3
    options = {"norm": "inf", "eps": 0.5, "step": 0.25, "steps": 3}
    with pytest.raises(TypeError, match="wrap the model in a function that picks them"):
        robustness.pgd(pair, x, y, **options)

    def function(x: Tensor) -> Tensor:
        return pair(x)[0]

    plain = nn.Sequential(pair.body, nn.ReLU(), pair.head)
    got = robustness.attack_path(function, x, y, head=pair.head, **options)
    want = robustness.attack_path(plain, x, y, head="2", **options)
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(robustness.pgd(function, x, y, **options), want.adversarial)
    swept = [robustness.scaling_sweep(m, [(x, y)], (1, 10), head=pair.head, **options) for m in (function, plain)]
    assert swept[0] == swept[1]
    for attack in (
        lambda: robustness.attack_path(function, x, y, **options),
        lambda: robustness.scaling_sweep(function, [(x, y)], (1,), head="head", **options),
    ):
        with pytest.raises(
            TypeError, match=r"head must be the head itself, a torch\.nn\.Linear, where model is a function"
        ):
            attack()
    with pytest.raises(TypeError, match="model must be callable"):
        robustness.attack_path(3, x, y, head=pair.head, **options)
