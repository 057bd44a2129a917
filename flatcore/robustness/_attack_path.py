"""What the head sees along an attack: the public function and its result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._arguments.checks import check_integer, check_option
from .._input_gradients import refuse_shared_statistics
from .._probe.probe import Probe
from .._row_norms import row_norms
from ._attack import check_attacked, checked_attack, points, probed_module

MEASURES = (
    "confidence", "margin", "log_one_minus_confidence", "log_feature_norm", "log_hessian_trace", "log_layerwise",
    "log_neuronwise", "loss", "log_feature_gradient_norm", "log_input_gradient_norm", "input_displacement",
    "feature_displacement",
)  # fmt: skip
"""The fields of a path that can be aligned and drawn."""


class Aligned(NamedTuple):
    """Quantiles of a measure over the samples that flip, by the steps since the flip."""

    offset: Tensor  # (K,) int64, 0 at the first point that is misclassified
    samples: Tensor  # (K,) int64, how many have a point there
    quantiles: Tensor  # (len(quantiles), K) float64


class AttackPath(NamedTuple):
    """A measure of the head at every point of an attack: tensors (steps + 1, N), in row 0 where it starts.

    ``prediction``, ``confidence``, ``margin``, ``log_one_minus_confidence``, ``log_feature_norm``, ``log_hessian_trace``,
    ``log_layerwise``, ``log_neuronwise``, ``loss`` and ``log_feature_gradient_norm`` are :class:`flatcore.HeadMetrics`'s;
    ``log_input_gradient_norm`` is the exact one (L2), whichever gradient the attack follows; ``input_displacement`` is
    the distance from the unperturbed inputs in the attack's norm, ``feature_displacement`` the L2 distance of the features
    from theirs; ``correct`` is bool; ``adversarial`` (N, ...) are the inputs at the last point.
    """

    prediction: Tensor
    confidence: Tensor
    margin: Tensor
    log_one_minus_confidence: Tensor
    log_feature_norm: Tensor
    log_hessian_trace: Tensor
    log_layerwise: Tensor
    log_neuronwise: Tensor
    loss: Tensor
    log_feature_gradient_norm: Tensor
    log_input_gradient_norm: Tensor
    input_displacement: Tensor
    feature_displacement: Tensor
    correct: Tensor
    adversarial: Tensor

    @property
    def flip_step(self) -> Tensor:
        """The first step at which a sample that began correct is misclassified, (N,) int64; -1 where there is none."""
        flipped = (~self.correct) & self.correct[0]
        first = flipped.to(torch.int8).argmax(dim=0)
        return torch.where(flipped.any(dim=0), first, -1)

    def aligned(self, measure: str, quantiles: tuple[float, ...] = (0.25, 0.5, 0.75)) -> Aligned:
        """Quantiles of a measure by the steps since the flip, over the samples that flip.

        Raises:
            ValueError: a measure that the path does not have; a quantile outside 0..1.
        """
        check_option(measure, "measure", MEASURES)
        for q in quantiles:
            if not 0 <= q <= 1:
                raise ValueError(f"quantiles must be within 0..1, got {q}")
        values, flip = getattr(self, measure).cpu().double(), self.flip_step.cpu()
        steps = len(values) - 1
        rows = flip >= 0
        offset = torch.arange(-steps, steps + 1)
        found, counts, kept = [], [], []
        for o in offset.tolist():
            at = flip + o
            here = rows & (at >= 0) & (at <= steps)
            if bool(here.any()):
                column = values.gather(0, at.clamp(0, steps).unsqueeze(0))[0][here]
                found.append(torch.stack([_quantile(column, q) for q in quantiles]))
                counts.append(int(here.sum()))
                kept.append(o)
        table = torch.stack(found, dim=1) if found else torch.zeros(len(quantiles), 0, dtype=torch.float64)
        return Aligned(torch.tensor(kept, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64), table)

    def plot(self, measures: tuple[str, ...] = ("log_layerwise", "log_input_gradient_norm")) -> Any:
        """Draw the median path with its quartiles, aligned at the flip: a matplotlib Figure.

        Raises:
            ValueError: a measure that the path does not have.
            ImportError: matplotlib is missing.
        """
        from .._report.pictures import attack_path

        for measure in measures:
            check_option(measure, "measures", MEASURES)
        return attack_path(self, tuple(measures))


def _quantile(values: Tensor, q: float) -> Tensor:
    """Quantile by linear interpolation; infinities are ordered, and not interpolated with."""
    ordered = values.sort().values
    place = q * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low if low == high else low + (place - math.floor(place)) * (high - low)


def attack_path(
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
    head: str | nn.Module | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> AttackPath:
    """Follow flatness, loss and confidence along :func:`flatcore.robustness.pgd`, for all samples at once.

    The points are those of ``pgd`` with the same arguments; what is measured at a point comes out of the forward and
    backward pass that the attack makes there anyway.

    Args:
        model: a module whose logits are the output of its head (see :class:`flatcore.Probe`), on the inputs' device; or any
            callable that ends in one, with ``head`` the head itself (its other modules are taken as they are).
        inputs, target, norm, eps, step, steps, gradient, random_start, clip, generator: as in
            :func:`flatcore.robustness.pgd`.
        head, temperature: as in :class:`flatcore.Probe`.
        chunk_size: samples that go through the model at a time; None takes all.

    Returns:
        :class:`AttackPath`.

    Raises:
        TypeError, ValueError: as :func:`flatcore.robustness.pgd`, in training mode too; a ``chunk_size`` below 1; a function
            without its head.
        RuntimeError: as :class:`flatcore.Probe`, where the model's output is not its head's.

    Cost: steps + 1 forward and backward passes where the attack makes steps; twice that with the usual gradient, as the
        exact one is measured beside it.

    Source: the sharpness along an attack, arXiv 2510.14231 ("uncanny valley"): it rises until the label flips, then falls.

    Example:
        >>> import torch, flatcore
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(8 * torch.eye(2))
        >>> x, y = torch.tensor([[0.75, 0.25]]), torch.tensor([0])
        >>> path = flatcore.robustness.attack_path(model, x, y, norm=float("inf"), eps=0.5, step=0.125, steps=4)
        >>> path.correct[:, 0].tolist(), path.flip_step.tolist(), path.log_hessian_trace[:, 0].argmax().item()
        ([True, True, True, False, False], [3], 2)
    """
    attack = checked_attack(norm, eps, step, steps, gradient, random_start, clip, generator)
    model = probed_module(model, head)
    target = check_attacked(model, inputs, target, attack.clip)
    refuse_shared_statistics(model)
    if chunk_size is not None and check_integer(chunk_size, "chunk_size") < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    inputs = inputs.detach()
    rows = max(chunk_size or len(inputs), 1)
    parts = []
    with Probe(model, head, temperature=temperature) as probe:
        for start in range(0, max(len(inputs), 1), rows):
            parts.append(_part(probe, inputs[start : start + rows], target[start : start + rows], attack))
    if len(parts) == 1:
        return parts[0]
    columns = [torch.cat(column, dim=1) for column in zip(*(part[:-1] for part in parts), strict=True)]
    return AttackPath._make([*columns, torch.cat([part.adversarial for part in parts])])


def _part(probe: Probe, inputs: Tensor, target: Tensor, attack: Any) -> AttackPath:
    rows = []
    origin = None
    if attack.random_start:
        with torch.no_grad():
            probe.model(inputs)
            origin = probe.features.detach()
    for here, metrics, log_norm, features in points(probe, inputs, target, attack):
        origin = features if origin is None else origin
        wide = torch.promote_types(inputs.dtype, torch.float32)
        moved = row_norms((here.to(wide) - inputs.to(wide)).flatten(1), ord=attack.norm)
        shifted = row_norms((features.to(wide) - origin.to(wide)).flatten(1), ord=2)
        rows.append([*metrics, log_norm, moved, shifted, metrics.prediction == target])
    # what was measured on the last point belongs to the last point: pgd's with the same arguments
    return AttackPath._make([*(torch.stack(column) for column in zip(*rows, strict=True)), here.clone()])
