"""Projected gradient descent within a norm ball: the public function, and the steps that the other files take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._arguments.checks import (
    FLOATS,
    INTEGERS,
    as_labels,
    check_device,
    check_flag,
    check_integer,
    check_norm,
    check_number,
    check_option,
    check_tensor,
)
from .._head_metrics import HeadMetrics
from .._input_gradients import ALLOW, differentiable_logits_of, frozen, input_gradients, refuse_shared_statistics
from .._probe.probe import Probe
from .._row_norms import row_norms

GRADIENTS = ("exact", "usual")


class Attack(NamedTuple):
    """A checked attack: what it may change, and how it goes there."""

    norm: float
    eps: float
    step: float
    steps: int
    gradient: str
    random_start: bool
    clip: tuple[float, float] | None
    generator: torch.Generator | None

    def start(self, inputs: Tensor) -> Tensor:
        """Return the inputs, or points drawn uniformly from the ball around them and clipped."""
        if not self.random_start:
            return inputs
        # drawn in float32 and wider: half precision has 2^11 levels between 0 and 1
        wide = torch.promote_types(inputs.dtype, torch.float32)
        draw: dict[str, Any] = {"dtype": wide, "device": inputs.device, "generator": self.generator}
        if self.norm == math.inf:
            moved = (2 * torch.rand(inputs.shape, **draw) - 1) * self.eps
        else:
            moved = torch.randn(inputs.shape, **draw)
            size = moved[0].numel() if len(moved) else 1
            radius = self.eps * torch.rand(len(moved), **draw) ** (1 / max(size, 1))
            moved = moved * per_row(radius / row_norms(moved.flatten(1), ord=2).clamp_min(1e-30), moved)
        return self._within(inputs, moved)

    def advance(self, inputs: Tensor, here: Tensor, direction: Tensor) -> Tensor:
        """One step from ``here`` along a direction, then back into the ball around ``inputs`` and the clip range."""
        wide = torch.promote_types(inputs.dtype, torch.float32)
        direction = direction.to(wide)
        if self.norm == math.inf:
            ahead = direction.sign()
        else:
            # divided by the largest entry first: a usual gradient of 1e-42 has few digits left, but it has a direction
            largest = direction.flatten(1).abs().amax(dim=1) if direction[:1].numel() else direction.flatten(1).sum(1)
            ahead = direction / per_row(largest.clamp_min(torch.finfo(wide).tiny), direction)
            norms = row_norms(ahead.flatten(1), ord=2)
            ahead = ahead / per_row(torch.where(norms > 0, norms, 1), ahead)
        # a NaN gradient moves nothing; that row's metrics say NaN
        ahead = torch.where(ahead.isnan(), 0, ahead)
        return self._within(inputs, here.to(wide) - inputs.to(wide) + self.step * ahead)

    def _within(self, inputs: Tensor, moved: Tensor) -> Tensor:
        if self.norm == math.inf:
            moved = moved.clamp(-self.eps, self.eps)
        else:
            norms = row_norms(moved.flatten(1), ord=2)
            moved = moved * per_row(torch.where(norms > self.eps, self.eps / norms, 1), moved)
        there = inputs.to(moved.dtype) + moved
        return (there if self.clip is None else there.clamp(*self.clip)).to(inputs.dtype)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Shape (N,) as (N, 1, ...), to go with rows."""
    return values.reshape(-1, *(1,) * (like.dim() - 1)).to(like.dtype)


def checked_attack(
    norm: Any, eps: Any, step: Any, steps: Any, gradient: Any, random_start: Any, clip: Any, generator: Any
) -> Attack:
    """Check what does not depend on the inputs; errors as :func:`pgd` says."""
    norm = check_norm(norm, "norm", (2, math.inf))
    for value, name in ((eps, "eps"), (step, "step")):
        number = check_number(value, name)
        if not (0 < number < math.inf):
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    if check_integer(steps, "steps") < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    check_option(gradient, "gradient", GRADIENTS)
    if clip is not None:
        if not isinstance(clip, (tuple, list)) or len(clip) != 2:
            raise TypeError(f"clip must be None or a pair (low, high), got {clip!r}")
        clip = (check_number(clip[0], "clip[0]"), check_number(clip[1], "clip[1]"))
        if not clip[0] < clip[1]:
            raise ValueError(f"clip must be a pair (low, high) with low < high, got {clip}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be None or a torch.Generator, got {type(generator).__qualname__}")
    return Attack(
        norm, float(eps), float(step), int(steps), gradient, check_flag(random_start, "random_start"), clip, generator
    )  # fmt: skip


def check_attacked(model: Any, inputs: Any, target: Any, clip: tuple[float, float] | None) -> Tensor:
    """Check the inputs and labels that an attack starts from, errors as :func:`pgd` says; the labels as int64."""
    for value, name in ((inputs, "inputs"), (target, "target")):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__module__}.{type(value).__qualname__}")
        check_tensor(value, name)
    if inputs.dtype not in FLOATS:
        raise TypeError(
            f"inputs must have dtype float16, bfloat16, float32 or float64, got {inputs.dtype}: an attack moves them "
            "along a gradient; pass embeddings, or a floating copy"
        )
    if target.dtype not in INTEGERS:
        raise TypeError(f"target must hold integer class labels, got {target.dtype}")
    if inputs.dim() < 2 or target.shape != inputs.shape[:1]:
        raise ValueError(
            f"inputs must have shape (N, ...) and target (N,), got {tuple(inputs.shape)} and {tuple(target.shape)}"
        )
    check_device(target, "target", inputs, "inputs")
    check_model_device(model, inputs.device)
    target = as_labels(target, -1)
    if inputs.numel() == 0:
        return target
    if bool((target < 0).any()):
        raise ValueError(f"target must give every row a class from 0 on, got {target.min().item()}")
    low, high = inputs.min().item(), inputs.max().item()
    if not math.isfinite(high - low):
        raise ValueError("inputs must be finite, got NaN or an infinity")
    if clip is not None and not (clip[0] <= low and high <= clip[1]):
        raise ValueError(
            f"inputs must lie within clip = {clip}, got values from {low:g} to {high:g}: scale them, or give the range "
            "that they have as clip (None: no range)"
        )
    return target


class _Called(nn.Module):
    """A function as the module that a probe looks into: it holds the head alone."""

    def __init__(self, function: Callable[[Tensor], Any], head: nn.Module):
        super().__init__()
        self.function, self.head = function, head

    def forward(self, inputs: Tensor) -> Any:
        """The function's output."""
        return self.function(inputs)


def probed_module(model: Any, head: Any) -> nn.Module:
    """The model as a module in which the head is found: itself, or a wrapper of a function that is given its head."""
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise TypeError(
            f"model must be callable (inputs to logits), got {type(model).__module__}.{type(model).__qualname__}"
        )
    if not isinstance(head, nn.Module):
        raise TypeError(
            "head must be the head itself, a torch.nn.Linear, where model is a function and no torch.nn.Module; "
            f"got {head!r}"
        )
    return _Called(model, head)


def check_model_device(model: Any, device: torch.device) -> None:
    """Refuse a model whose first parameter lies on another device than the data."""
    if isinstance(model, nn.Module):
        for tensor in model.parameters():
            if tensor.device != device:
                raise ValueError(f"model must be on the device of the inputs, {device}, got one on {tensor.device}")
            return


def pgd(
    model: Callable[[Tensor], Any],
    inputs: Tensor,
    target: Tensor,
    *,
    norm: float | str,
    eps: float,
    step: float,
    steps: int,
    gradient: str = "exact",
    random_start: bool = False,
    clip: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
    allow_train_mode: bool = False,
) -> Tensor:
    r"""Projected gradient descent: inputs moved uphill on the loss, within a norm ball and the range of the data.

    :math:`x_{k+1} = \Pi(x_k + s\,a_k)`, with :math:`a_k` the sign of the loss's gradient (norm inf) or the gradient divided
    by its L2 norm (norm 2), s the step, and :math:`\Pi` the projection into the ball of radius eps around the inputs, then
    the clip range. All ``steps`` are taken: nothing stops at the first flip.

    Args:
        model: as in :func:`flatcore.input_gradients`.
        inputs: (N, ...), floating point, within ``clip``.
        target: (N,) integer labels.
        norm: ``2`` or ``inf``; or a name: ``"l2"``, ``"linf"``, ``"inf"``.
        eps, step: radius of the ball and length of a step, in that norm and the inputs' units.
        steps: their number.
        gradient: ``"exact"``, :func:`flatcore.input_gradients`; or ``"usual"``, autograd's through ``cross_entropy``,
            which points elsewhere from a logit gap of 17 on (float32) and is 0 from 104 on, so that nothing moves.
        random_start: begin at a point drawn uniformly from the ball.
        clip: (low, high), the range of the data; None for no range.
        generator: of the random start; None for torch's own.
        allow_train_mode: take a model in training mode as it is, with what its BatchNorm and Dropout then do.

    Returns:
        (N, ...), a new tensor, the last point; dtype and device of the inputs.

    Raises:
        TypeError: inputs or target no tensor, or of a wrong dtype; a ``clip`` that is no pair; an argument of a wrong kind.
        ValueError: another norm or gradient; eps or step not above 0; steps below 1; inputs outside ``clip`` or not
            finite; shapes that do not fit; a model on another device; a model of one output, nearly always a sigmoid's; a
            label that is no class; a model in training mode whose samples share statistics or chance, unless
            ``allow_train_mode=True``.

    Numerics: steps and projections in float32 or wider. A zero or NaN gradient moves nothing.

    Source: Madry et al., 2018.

    Example:
        >>> import torch, flatcore
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(300 * torch.eye(2))
        >>> x, y = torch.tensor([[0.75, 0.25]]), torch.tensor([0])
        >>> options = {"norm": float("inf"), "eps": 0.5, "step": 0.25, "steps": 3}
        >>> [flatcore.robustness.pgd(model, x, y, gradient=kind, **options).tolist() for kind in ("exact", "usual")]
        [[[0.25, 0.75]], [[0.75, 0.25]]]
    """
    attack = checked_attack(norm, eps, step, steps, gradient, random_start, clip, generator)
    target = check_attacked(model, inputs, target, attack.clip)
    if not check_flag(allow_train_mode, "allow_train_mode"):
        refuse_shared_statistics(model, ALLOW)
    return climb(model, inputs.detach(), target, attack)


def climb(model: Any, inputs: Tensor, target: Tensor, attack: Attack) -> Tensor:
    """The last point of a checked attack on a checked model and inputs."""
    here = attack.start(inputs)
    for _ in range(attack.steps):
        if attack.gradient == "usual":
            direction = usual_gradient(model, here, target)
        else:
            direction = input_gradients(model, here, target, allow_train_mode=True).direction
        here = attack.advance(inputs, here, direction)
    return here.clone() if here is inputs else here


def points(
    probe: Probe, inputs: Tensor, target: Tensor, attack: Attack
) -> Iterator[tuple[Tensor, HeadMetrics, Tensor, Tensor]]:
    """Each point of the attack: where it is, the head's metrics there, the exact log input gradient norm, the features."""
    here = attack.start(inputs)
    for k in range(attack.steps + 1):
        found = input_gradients(
            probe.model, here, target, allow_train_mode=True
        )  # its one forward pass is what the probe sees
        norms = row_norms(found.direction.flatten(1), ord=2).double().log() + found.log_scale
        yield here, probe.head_metrics(target), norms.to(found.log_scale.dtype), probe.features.detach()
        if k < attack.steps:
            usual = attack.gradient == "usual"
            direction = usual_gradient(probe.model, here, target) if usual else found.direction
            here = attack.advance(inputs, here, direction)


def usual_gradient(model: Any, inputs: Tensor, target: Tensor) -> Tensor:
    """Gradient of torch's cross-entropy to the inputs, as everyone takes it: (N, ...)."""
    with torch.inference_mode(False), torch.enable_grad(), frozen(model):
        x = (inputs.clone() if inputs.is_inference() else inputs).detach().requires_grad_()
        loss = nn.functional.cross_entropy(differentiable_logits_of(model(x.clone()), inputs), target, reduction="sum")
        return torch.autograd.grad(loss, x)[0]
