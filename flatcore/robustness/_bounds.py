"""What a Lipschitz feature extractor and the head's curvature say about the loss around an input."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._arguments.arrays import on_the_arrays_stream, returner
from .._arguments.checks import check_integer, check_number, check_option
from .._arguments.head import checked_inputs
from .._head_metrics import head_metrics
from .._input_gradients import frozen
from .._probe.probe import Probe
from .._report.loading import check_module
from .._row_norms import row_norms
from ._attack import check_model_device, per_row

KINDS = ("certified", "paper")
_PAD = 1e-11  # relative: flatcore's float64 statistics are within 1e-12, and a dozen roundings follow
_CLASSES = 4096  # up to here the largest distance of two weight rows is searched, C^2 D operations; above, bounded
_ELEMENTS = 1 << 22  # of one (rows, C) block in float64: 32 MiB


class _Given(NamedTuple):
    """Validated arguments in float64, the weight and bias over the temperature."""

    features: Tensor  # (N, D)
    linear_weight: Tensor  # (C, D)
    target: Tensor  # (N,)
    logits: Tensor  # (N, C)
    error: Tensor  # (N,), at most so far is a logit from the real number
    give: Any  # (N,) float64 -> the caller's kind and leading shape


def _given(features: Any, linear_weight: Any, target: Any, linear_bias: Any, temperature: Any) -> _Given:
    if target is None:
        raise ValueError("target must hold integer class labels, got None")
    inputs = checked_inputs(features, linear_weight, target, linear_bias, None, temperature, -100, soft=False)
    head = inputs.head
    assert head.target is not None
    if bool((head.target == -100).any()):
        raise ValueError("target must give every row a class, got the ignored label -100")
    phi = head.features.detach().double()
    w = head.linear_weight.detach().double() / head.temperature
    bias = None if head.linear_bias is None else head.linear_bias.detach().double() / head.temperature
    logits = nn.functional.linear(phi, w, bias)
    size = phi.abs() @ w.abs().T
    if bias is not None:
        size = size + torch.where(bias == -math.inf, 0, bias).abs()
    error = (phi.shape[1] + 3) * 2.0**-53 * (size.amax(dim=1) if size.numel() else size.sum(dim=1))
    give = returner(features)
    return _Given(phi, w, head.target, logits, error, lambda values: give(values.reshape(inputs.leading)))


def _distances(weight: Tensor, rows: Tensor) -> Tensor:
    """Distances (len(rows), C) of some weight rows to all, from differences."""
    return torch.cdist(weight[rows], weight, compute_mode="donot_use_mm_for_euclid_dist")


def _reach(given: _Given) -> Tensor:
    """max_j ||w_j - w_y||, (N,)."""
    labels, place = given.target.unique(return_inverse=True)
    rows = max(_ELEMENTS // len(given.linear_weight), 1)
    return torch.cat([_distances(given.linear_weight, part).amax(dim=1) for part in labels.split(rows)])[place]


def _spread(weight: Tensor) -> Tensor:
    """max_ij ||w_i - w_j||, or twice the largest distance to the mean row, which is no less."""
    C = len(weight)
    if C <= _CLASSES:
        rows = torch.arange(C, device=weight.device)
        return torch.stack([_distances(weight, part).amax() for part in rows.split(max(_ELEMENTS // C, 1))]).amax()
    return 2 * (weight - weight.mean(dim=0)).norm(dim=1).amax()


def _exp_up(log: Tensor) -> Tensor:
    """Exponential rounded up: what underflows is the smallest number above 0, unless it is 0."""
    value = log.exp() * (1 + _PAD)
    return torch.where((value == 0) & (log > -math.inf), 5e-324, value)


def _coefficients(given: _Given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rounded up: g, lambda and R^3 / (36 sqrt 3) of the cubic, and the reach; (N,) each."""
    metrics = head_metrics(given.features, given.linear_weight, given.target, logits=given.logits)
    reach = _reach(given) * (1 + _PAD)
    # p moves by a factor of exp(2 error) at most, and with it a variance, which is the least mean square about any point
    moved = (2 * given.error).expm1()
    gradient = _exp_up(metrics.log_feature_gradient_norm) + moved * -(-metrics.loss).expm1() * reach
    if given.features.shape[1]:
        unit = torch.zeros_like(given.features)
        unit[:, 0] = 1  # ||phi||^2 Var_p(w) at ||phi|| = 1
        curvature = _exp_up(head_metrics(unit, given.linear_weight, logits=given.logits).log_neuronwise) * (1 + moved)
    else:
        curvature = torch.zeros_like(reach)
    cubic = (_spread(given.linear_weight) * (1 + _PAD)) ** 3 / (36 * math.sqrt(3))
    return gradient, curvature, cubic.expand_as(reach), reach


def _paper(
    features: Any, linear_weight: Any, target: Any, linear_bias: Any, temperature: Any, feature_norm: Any
) -> tuple[_Given, Tensor, Tensor, Tensor]:
    """0, kappa/r^2 and C D/(24 r^3): the paper's cubic in L delta, but for its L^3."""
    given = _given(features, linear_weight, target, linear_bias, temperature)
    metrics = head_metrics(given.features, given.linear_weight, given.target, logits=given.logits)
    C, D = given.linear_weight.shape
    if feature_norm is None:
        r = metrics.log_feature_norm.exp()
    else:
        r = torch.full_like(metrics.loss, check_number(feature_norm, "feature_norm"))
        if not 0 < r.new_tensor(feature_norm) < math.inf:
            raise ValueError(f"feature_norm must be finite and above 0, got {feature_norm!r}")
    return given, torch.zeros_like(r), metrics.log_layerwise.exp() / r**2, C * D / (24 * r**3)


def _lipschitz(value: Any) -> float:
    number = check_number(value, "lipschitz")
    if not 0 < number < math.inf:
        raise ValueError(f"lipschitz must be finite and above 0, got {value!r}")
    return number


def _check_feature_norm(kind: str, feature_norm: Any) -> None:
    if kind == "certified" and feature_norm is not None:
        raise ValueError(f"feature_norm belongs to kind='paper', got {feature_norm!r} with kind='certified'")


@on_the_arrays_stream
def loss_change_bound(
    features: Any,
    linear_weight: Any,
    target: Any,
    radius: float,
    *,
    lipschitz: float,
    linear_bias: Any = None,
    temperature: float = 1.0,
    kind: str = "certified",
    feature_norm: float | None = None,
) -> Any:
    r"""Upper bound of the loss's increase within an L2 ball around the input, for an L-Lipschitz feature extractor.

    ``"certified"``, with :math:`h = L\delta`:
    :math:`\ell(x + r) - \ell(x) \le \min(g h + \lambda h^2/2 + R^3 h^3/(36\sqrt3),\; h \max_j\|w_j - w_y\|)`
    for all :math:`\|r\|_2 \le \delta`, with g the feature gradient's norm, :math:`\lambda = \mathrm{Var}_p(w)`, no less than
    the largest eigenvalue of the loss's Hessian in the features, and :math:`R = \max_{ij}\|w_i - w_j\|`.

    ``"paper"``, as published: :math:`\delta^2L^2\kappa/(2r^2) + \delta^3 C D L^6/(24 r^3)`, for an input at a local minimum
    of the loss and a normalisation of weights and features that it does not state: for comparison. It is no certificate:
    it leaves the gradient out, and random networks exceed it.

    Args:
        features: (..., D), of the unperturbed inputs; linear_weight (C, D); target (...,) integer labels; linear_bias (C,)
            or None; temperature T: as in :func:`flatcore.head_metrics`.
        radius: :math:`\delta \ge 0`, in the inputs' units, L2. For an L-infinity attack on d numbers: sqrt(d) times eps.
        lipschitz: L, with :math:`\|\phi(x) - \phi(x')\|_2 \le L\|x - x'\|_2` on the ball. The head does not know it; an
            estimate from samples (:func:`flatcore.robustness.lipschitz_lower_estimate`) is too low and certifies nothing.
        kind: ``"certified"`` or ``"paper"``.
        feature_norm: r of the paper's form; None takes each row's own.

    Returns:
        (...,) float64, in nats, per sample; NaN in rows whose logits are not finite.

    Raises:
        TypeError, ValueError: as :func:`flatcore.head_metrics`; a target with ignored labels; a negative or infinite radius;
            an L that is not finite and above 0; an unknown kind; ``feature_norm`` with the certified form.

    Numerics: float64, rounded up: by 1e-11, and by what the rounding of the logits can do to gradient and variance. R is
        searched up to 4096 classes; above, it is twice the largest distance to the mean row, which is no less.

    Source: docs/robustness.md, "Bounds"; the paper's: arXiv 2510.14231.

    Example:
        >>> import torch, flatcore
        >>> from flatcore.robustness import loss_change_bound
        >>> phi, y = torch.tensor([[3.0, 1.0]]), torch.tensor([0])
        >>> f"{loss_change_bound(phi, torch.eye(2), y, 0.5, lipschitz=1.0).item():.4f}"
        '0.1162'
    """
    check_option(kind, "kind", KINDS)
    _check_feature_norm(kind, feature_norm)
    delta, L = check_number(radius, "radius"), _lipschitz(lipschitz)
    if not 0 <= delta < math.inf:
        raise ValueError(f"radius must be finite and at least 0, got {radius!r}")
    h = L * delta
    if kind == "paper":
        given, _, second, third = _paper(features, linear_weight, target, linear_bias, temperature, feature_norm)
        return given.give(second * h**2 / 2 + third * L**3 * h**3)
    given = _given(features, linear_weight, target, linear_bias, temperature)
    a, b, c, reach = _coefficients(given)
    return given.give(torch.minimum(a * h + b * h**2 / 2 + c * h**3, reach * h) * (1 + _PAD))


@on_the_arrays_stream
def loss_change_radius(
    features: Any,
    linear_weight: Any,
    target: Any,
    increase: float,
    *,
    lipschitz: float,
    linear_bias: Any = None,
    temperature: float = 1.0,
    kind: str = "certified",
    feature_norm: float | None = None,
) -> Any:
    r"""Radius of an L2 ball around the input within which the loss does not rise by more than ``increase``.

    The inverse of :func:`flatcore.robustness.loss_change_bound`: the largest :math:`\delta` whose bound is no more than e.
    An increase above log C can only come with another prediction.

    Args:
        features, linear_weight, target, lipschitz, linear_bias, temperature, kind, feature_norm: as there.
        increase: e, in nats. At 0 or below the radius is 0.

    Returns:
        (...,) float64, in the inputs' units, L2, per sample; +inf where nothing can change (all weight rows equal).

    Raises:
        TypeError, ValueError: as there; an ``increase`` that is NaN.

    Numerics: float64, rounded down; the root of the cubic by 60 halvings.

    Source: as there.

    Example:
        >>> import torch, flatcore
        >>> from flatcore.robustness import loss_change_radius
        >>> phi, y = torch.tensor([[3.0, 1.0]]), torch.tensor([0])
        >>> f"{loss_change_radius(phi, torch.eye(2), y, 0.11625, lipschitz=1.0).item():.3f}"
        '0.500'
    """
    check_option(kind, "kind", KINDS)
    _check_feature_norm(kind, feature_norm)
    e, L = check_number(increase, "increase"), _lipschitz(lipschitz)
    if math.isnan(e):
        raise ValueError("increase must be a number, got NaN")
    if kind == "paper":
        given, a, b, c = _paper(features, linear_weight, target, linear_bias, temperature, feature_norm)
        linear, c = torch.zeros_like(a), c * L**3
    else:
        given = _given(features, linear_weight, target, linear_bias, temperature)
        a, b, c, reach = _coefficients(given)
        linear = e / reach
    if e <= 0:
        return given.give(torch.where(a.isnan() | b.isnan(), math.nan, torch.zeros_like(a)))
    # each term alone is e at `high` or later, and all three together are e at a third of it or later
    high = torch.minimum(torch.minimum(e / a, (2 * e / b).sqrt()), (e / c) ** (1 / 3))
    low = high / 3 * (1 - _PAD)
    high = torch.where(high == math.inf, low, high)
    for _ in range(60):
        middle = (low + high) / 2
        fits = a * middle + b * middle**2 / 2 + c * middle**3 <= e
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    radius = (
        torch.maximum(low, linear) / L * (1 - 2 * _PAD)
    )  # one for the pad of the bound, one for this line's rounding
    return given.give(torch.where(a.isnan() | b.isnan(), math.nan, radius))


@on_the_arrays_stream
def margin_radius(
    features: Any,
    linear_weight: Any,
    target: Any,
    *,
    lipschitz: float,
    linear_bias: Any = None,
    temperature: float = 1.0,
) -> Any:
    r"""Radius of an L2 ball around the input within which the prediction stays the label.

    :math:`\min_{j \ne y} (z_y - z_j) / (L \|w_y - w_j\|)`; 0 where the sample is misclassified; classes whose weight row
    equals the label's are skipped, as their logit difference cannot change.

    Args:
        features, linear_weight, target, lipschitz, linear_bias, temperature: as in
            :func:`flatcore.robustness.loss_change_bound`. The temperature changes nothing.

    Returns:
        (...,) float64, in the inputs' units, L2, per sample; +inf where no class can overtake.

    Raises:
        TypeError, ValueError: as there.

    Numerics: float64, rounded down, the rounding of the logits included.

    Source: the margin bound of Lipschitz networks (Tsuzuku et al., 2018), with each pair's own weight distance.

    Example:
        >>> import torch, flatcore
        >>> phi, y = torch.tensor([[3.0, 1.0], [1.0, 3.0]]), torch.tensor([0, 0])
        >>> [round(r, 4) for r in flatcore.robustness.margin_radius(phi, torch.eye(2), y, lipschitz=1.0).tolist()]
        [1.4142, 0.0]
    """
    L = _lipschitz(lipschitz)
    given = _given(features, linear_weight, target, linear_bias, temperature)
    parts = []
    for rows in torch.arange(len(given.target), device=given.target.device).split(
        max(_ELEMENTS // len(given.linear_weight), 1)
    ):
        z, y = given.logits[rows], given.target[rows]
        labels, place = y.unique(return_inverse=True)
        distance = _distances(given.linear_weight, labels)[place]
        margin = z.gather(1, y.unsqueeze(1)) - z
        wrong = (margin < 0).any(dim=1)
        ratio = (margin - 2 * given.error[rows].unsqueeze(1)).clamp_min(0) / (distance * L)
        ratio = torch.where(distance == 0, math.inf, ratio).amin(dim=1) * (1 - _PAD)
        bad = (z.isnan() | (z == math.inf)).any(dim=1)
        parts.append(torch.where(bad, math.nan, torch.where(wrong, 0, ratio)))
    return given.give(torch.cat(parts) if parts else given.error)


def lipschitz_lower_estimate(
    model: nn.Module,
    inputs: Tensor,
    *,
    iterations: int = 10,
    head: str | nn.Module | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Lower estimate of the feature extractor's Lipschitz constant: the largest stretch found at each input.

    :math:`\|J_n v\|_2` after a power iteration on :math:`J_n^T J_n`, J the Jacobian of the features at input n. It
    approaches the local spectral norm from below; the Lipschitz constant is the largest over *all* inputs, so the maximum
    of these is a lower estimate of it too, and a bound computed with it certifies nothing.

    Args:
        model: as in :class:`flatcore.Probe`, in evaluation mode.
        inputs: (N, ...), floating point.
        iterations: steps of the power iteration, at least 1.
        head: as in :class:`flatcore.Probe`.
        generator: of the first vectors; None for torch's own.

    Returns:
        (N,), per sample, plain norms, dtype of the features.

    Raises:
        TypeError: a model that is no module, inputs that are no floating tensor.
        ValueError: a model on another device; iterations below 1; features that do not depend on the inputs.
        RuntimeError: as :class:`flatcore.Probe`.

    Example:
        >>> import torch, flatcore
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 3))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> f"{flatcore.robustness.lipschitz_lower_estimate(model, torch.ones(1, 2), iterations=20).item():.4f}"
        '3.0000'
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__qualname__
        raise TypeError(f"inputs must be a floating-point torch.Tensor, got {kind}")
    check_model_device(check_module(model), inputs.device)
    if check_integer(iterations, "iterations") < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    with torch.inference_mode(False), torch.enable_grad(), frozen(model), Probe(model, head) as probe:
        x = inputs.clone().detach().requires_grad_()
        model(x.clone())  # a first layer that works in place needs a tensor of its own
        features = probe.features
        if not features.requires_grad:
            raise ValueError("the features do not depend on inputs: there is no Jacobian")
        # J^T c is linear in c: its derivative with respect to c, applied to v, is J v
        c = torch.zeros_like(features, requires_grad=True)
        (pulled,) = torch.autograd.grad(features, x, c, create_graph=True)
        v = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        stretch = torch.zeros(len(x), dtype=features.dtype, device=x.device)
        for k in range(iterations):
            v = v / per_row(row_norms(v.flatten(1), ord=2).clamp_min(1e-30), v)
            (u,) = torch.autograd.grad(pulled, c, v, retain_graph=True)
            stretch = torch.maximum(stretch, row_norms(u.detach().flatten(1), ord=2).to(stretch.dtype))
            if k + 1 < iterations:
                (v,) = torch.autograd.grad(features, x, u, retain_graph=True)
    return stretch
