"""The head scaled without training again: what attacks then report, and what of them holds at another scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._arguments.checks import check_number, one_output
from .._input_gradients import TWO_OUTPUTS, logits_of, refuse_shared_statistics
from .._probe.probe import Probe
from .._report.loading import batches, check_module, device_of, evaluation_mode
from ._attack import GRADIENTS, Attack, check_attacked, checked_attack, climb, probed_module


class Quantiles(NamedTuple):
    """Quantiles over samples: 5 %, 25 %, 50 %, 75 % and 95 %."""

    q05: float
    q25: float
    q50: float
    q75: float
    q95: float


class ScalingResult(NamedTuple):
    """One scale and one kind of gradient of :func:`scaling_sweep`; accuracies are shares of ``samples``, in [0, 1].

    ``robust_accuracy`` counts samples that are right before and after the attack; ``loss_increase`` is the loss after it
    less the loss before, per sample; the log measures are of the clean inputs, ``attacked_`` ones of the attacked.
    """

    scale: float
    gradient: str
    samples: int
    clean_accuracy: float
    robust_accuracy: float
    loss_increase: Quantiles
    log_layerwise: Quantiles
    log_neuronwise: Quantiles
    attacked_log_layerwise: Quantiles
    attacked_log_neuronwise: Quantiles

    @property
    def standard_error(self) -> float:
        """Standard error of ``robust_accuracy``, sqrt(a (1 - a) / samples)."""
        return math.sqrt(self.robust_accuracy * (1 - self.robust_accuracy) / self.samples)


class TransferResult(NamedTuple):
    """How many adversarial inputs of one model and scale mislead another, or the same at another scale.

    ``found``: samples that source and target classify right, and that the attack on the source flips; ``transferred``: those
    of them that the target misclassifies too; ``rate``: their share, NaN where none was found.
    """

    source: str
    source_scale: float
    target: str
    target_scale: float
    found: int
    transferred: int

    @property
    def rate(self) -> float:
        """transferred / found, in [0, 1]."""
        return self.transferred / self.found if self.found else math.nan


@contextmanager
def scaled_head(model: nn.Module, scale: float, *, head: str | nn.Module) -> Iterator[nn.Linear]:
    """Multiply the weight and bias of a model's head by a scale within a block; afterwards they are bit for bit as before.

    No prediction changes (to rounding), only the confidence.

    Args:
        model: a ``torch.nn.Module``.
        scale: finite and above 0.
        head: the head's name, or itself, as in :class:`flatcore.Probe`.

    Raises:
        TypeError: ``model`` no module, ``head`` no linear layer.
        ValueError: a bad scale; a head that is not in the model; whose weight or bias another module has too (tied to an
            embedding, say), which would be scaled with it; or whose weight is computed from others (parametrised).

    Example:
        >>> import torch, flatcore
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> before = model[0].weight.clone()
        >>> with flatcore.robustness.scaled_head(model, 10, head="0") as head:
        ...     bool((head.weight == 10 * before).all())
        True
        >>> torch.equal(model[0].weight, before)
        True
    """
    scale = _check_scale(scale, "scale")
    module = Probe(check_module(model), head)._chosen
    if module is None:
        raise TypeError("head must be a name or a torch.nn.Linear, got None")
    if "weight" not in module._parameters:
        raise ValueError("head must hold its weight as a parameter, got one that is parametrised")
    held = [p for p in (module.weight, module.bias) if p is not None]
    for parameter in held:
        owners = [
            name for name, m in model.named_modules() if any(q is parameter for q in m._parameters.values())
        ]  # fmt: skip
        if len(owners) > 1:
            raise ValueError(f"head must have its weight for itself, got one shared by {', '.join(map(repr, owners))}")
    before = [parameter.detach().clone() for parameter in held]
    try:
        with torch.no_grad():
            for parameter in held:
                parameter.mul_(scale)
        yield module
    finally:
        with torch.no_grad():
            for parameter, values in zip(held, before, strict=True):
                parameter.copy_(values)


def _check_scale(value: Any, name: str) -> float:
    scale = check_number(value, name)
    if not 0 < scale < math.inf:
        raise ValueError(f"{name} must be finite and above 0, got {value!r}")
    return scale


def _check_scales(scales: Any) -> tuple[float, ...]:
    if isinstance(scales, (str, bytes)) or not isinstance(scales, (Sequence, Tensor)):
        raise TypeError(f"scales must be a sequence of numbers, got {type(scales).__qualname__}")
    found = tuple(_check_scale(s.item() if isinstance(s, Tensor) else s, "scales") for s in scales)
    if not found:
        raise ValueError("scales must hold at least one number, got none")
    return found


def _attacks(gradient: Any, **options: Any) -> tuple[Attack, ...]:
    kinds = (gradient,) if isinstance(gradient, str) else tuple(gradient)
    if not kinds:
        raise ValueError(f"gradient must name at least one of {', '.join(map(repr, GRADIENTS))}, got none")
    return tuple(checked_attack(gradient=kind, **options) for kind in kinds)


def _head_of(model: nn.Module, head: str | nn.Module | None, inputs: Tensor) -> nn.Linear:
    with torch.no_grad(), Probe(model, head) as probe:
        model(inputs[:1])
        found = probe.head
    if found.weight.shape[0] == 1:
        raise ValueError(one_output("the model", TWO_OUTPUTS))
    return found


def scaling_sweep(
    model: Callable[[Tensor], Any],
    loader: Any,
    scales: Sequence[float],
    *,
    norm: float | str,
    eps: float,
    step: float,
    steps: int,
    gradient: str | Sequence[str] = GRADIENTS,
    random_start: bool = False,
    clip: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
    head: str | nn.Module | None = None,
    device: Any = None,
) -> list[ScalingResult]:
    """Scale the head without training again, attack, and report what looks robust: with the usual and the exact gradient.

    Weight and bias of the head are multiplied by each scale and restored. No prediction on clean inputs changes, and with
    the exact gradient the robust accuracy hardly does; with the usual one it rises with the scale, as the gradient that the
    attack follows turns to noise and to zero.

    Args:
        model: a module whose logits are its head's output; put into evaluation mode for the call. Or any callable that ends
            in a head, with ``head`` the head itself; its other modules are taken as they are.
        loader: yields (inputs, target): floating inputs (N, ...) within ``clip``, integer labels (N,). Read once.
        scales: finite and above 0.
        norm, eps, step, steps, random_start, clip, generator: as in :func:`flatcore.robustness.pgd`.
        gradient: ``"exact"``, ``"usual"``, or both.
        head: as in :class:`flatcore.Probe`.
        device: None, the model's; or a device that the model must be on.

    Returns:
        A list of :class:`ScalingResult`, by scale, then by kind of gradient, in the order given.

    Raises:
        TypeError: as :func:`flatcore.robustness.pgd`; a function without its head; a loader that yields something else.
        ValueError: as there; an empty loader; a bad scale; a model on another device; a head whose weight is shared.
        RuntimeError: as :class:`flatcore.Probe`.

    Source: arXiv 2510.14231, which scales by 1 to 100; that underflow of the usual gradient overstates robustness: Lee et
        al. 2020; MIFPE; arXiv 2507.22428.

    Example:
        >>> import torch, flatcore
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(8 * torch.eye(2))
        >>> loader = [(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))]
        >>> options = {"norm": float("inf"), "eps": 0.5, "step": 0.25, "steps": 4}
        >>> for found in flatcore.robustness.scaling_sweep(model, loader, (1, 100), **options):
        ...     print(found.scale, found.gradient, found.clean_accuracy, found.robust_accuracy)
        1.0 exact 1.0 0.0
        1.0 usual 1.0 0.0
        100.0 exact 1.0 0.0
        100.0 usual 1.0 1.0
    """
    factors = _check_scales(scales)
    attacks = _attacks(
        gradient, norm=norm, eps=eps, step=step, steps=steps, random_start=random_start, clip=clip, generator=generator
    )
    model = probed_module(model, head)
    place = device_of(model, device)
    parts: dict[tuple[float, int], list[tuple[Tensor, ...]]] = {}
    with evaluation_mode(model):
        module = None
        refuse_shared_statistics(model)  # BatchNorm without running statistics mixes samples in evaluation mode too
        for batch in batches(loader):
            inputs, target = (tensor.to(place) for tensor in batch)
            target = check_attacked(model, inputs, target, attacks[0].clip)
            if len(inputs) == 0:
                continue
            module = module or _head_of(model, head, inputs)
            for scale in factors:
                with scaled_head(model, scale, head=module), Probe(model, module) as probe:
                    with torch.no_grad():
                        model(inputs)
                        clean = probe.head_metrics(target)
                    for k, attack in enumerate(attacks):
                        moved = climb(model, inputs, target, attack)
                        with torch.no_grad():
                            model(moved)
                            hit = probe.head_metrics(target)
                        right = clean.prediction == target
                        parts.setdefault((scale, k), []).append((
                            right, right & (hit.prediction == target), hit.loss.double() - clean.loss.double(),
                            clean.log_layerwise, clean.log_neuronwise, hit.log_layerwise, hit.log_neuronwise,
                        ))  # fmt: skip
    if not parts:
        raise ValueError("loader must yield at least one sample, got batches without rows")
    results = []
    for (scale, k), rows in parts.items():
        right, kept, *measured = (torch.cat(column).cpu() for column in zip(*rows, strict=True))
        results.append(
            ScalingResult(
                scale, attacks[k].gradient, len(right), right.double().mean().item(), kept.double().mean().item(),
                *map(_quantiles, measured),
            )
        )  # fmt: skip
    return results


def _quantiles(values: Tensor) -> Quantiles:
    """Nearest-rank quantiles of the rows that are numbers: they are values that occur, also where some are infinite."""
    values = values[~values.isnan()].double().sort().values
    if len(values) == 0:
        return Quantiles(*[math.nan] * 5)
    return Quantiles(*(values[round(q * (len(values) - 1))].item() for q in (0.05, 0.25, 0.5, 0.75, 0.95)))


def plot_scaling(results: list[ScalingResult]) -> Any:
    """Draw clean and robust accuracy over the scale, by kind of gradient: a matplotlib Figure.

    Args:
        results: of :func:`flatcore.robustness.scaling_sweep`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no results.

    Example:
        >>> from flatcore.robustness import Quantiles, ScalingResult, plot_scaling
        >>> row = ScalingResult(1.0, "exact", 10, 0.9, 0.1, *[Quantiles(0, 0, 0, 0, 0)] * 5)
        >>> plot_scaling([row]).axes[0].get_ylabel()
        'accuracy'
    """
    from .._report.pictures import scaling

    if not results:
        raise ValueError("results must hold at least one row, got none")
    return scaling(results)


def transfer(
    models: nn.Module | Mapping[str, nn.Module],
    loader: Any,
    scales: Sequence[float] = (1.0,),
    *,
    norm: float | str,
    eps: float,
    step: float,
    steps: int,
    gradient: str = "exact",
    random_start: bool = False,
    clip: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
    head: str | None = None,
    device: Any = None,
) -> list[TransferResult]:
    """Attack every model at every scale of its head, and try each adversarial input on all of them.

    Args:
        models: a module, or several by name.
        loader: as in :func:`flatcore.robustness.scaling_sweep`. Read once.
        scales: of the head, finite and above 0.
        norm, eps, step, steps, gradient, random_start, clip, generator: as in :func:`flatcore.robustness.pgd`.
        head: None, or the head's name in every model.
        device: None, the models'; or a device that they must be on.

    Returns:
        A list of :class:`TransferResult`, one for every ordered pair of (model, scale), a pair with itself included.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`flatcore.robustness.scaling_sweep`; no models; models on different
            devices.

    Source: arXiv 2510.14231: examples found at scale 1 transfer to the other scales.

    Example:
        >>> import torch, flatcore
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(8 * torch.eye(2))
        >>> loader = [(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))]
        >>> options = {"norm": float("inf"), "eps": 0.5, "step": 0.25, "steps": 4}
        >>> found = flatcore.robustness.transfer(model, loader, (1, 100), **options)
        >>> [(t.source_scale, t.target_scale, t.rate) for t in found]
        [(1.0, 1.0, 1.0), (1.0, 100.0, 1.0), (100.0, 1.0, 1.0), (100.0, 100.0, 1.0)]
    """
    named = dict(models) if isinstance(models, Mapping) else {"model": models}
    if not named:
        raise ValueError("models must hold at least one model, got none")
    factors = _check_scales(scales)
    (attack,) = _attacks(
        (gradient,),
        norm=norm,
        eps=eps,
        step=step,
        steps=steps,
        random_start=random_start,
        clip=clip,
        generator=generator,
    )
    places = {device_of(check_module(model), device) for model in named.values()}
    if len(places) > 1:
        raise ValueError(f"models must be on one device, got {', '.join(sorted(map(str, places)))}")
    place = places.pop()
    variants = [(name, scale) for name in named for scale in factors]
    counts = {(origin, to): [0, 0] for origin in variants for to in variants}
    heads: dict[str, nn.Linear] = {}
    with evaluation_mode(*named.values()):
        for batch in batches(loader):
            inputs, target = (tensor.to(place) for tensor in batch)
            labels = target
            for model in named.values():
                refuse_shared_statistics(model)
                target = check_attacked(model, inputs, labels, attack.clip)
            if len(inputs) == 0:
                continue
            heads = heads or {name: _head_of(model, head, inputs) for name, model in named.items()}
            moved, right, flipped = {}, {}, {}
            for name, scale in variants:
                with scaled_head(named[name], scale, head=heads[name]):
                    key, model = (name, scale), named[name]
                    moved[key], right[key] = climb(model, inputs, target, attack), _right(model, inputs, target)
                    flipped[key] = right[key] & ~_right(model, moved[key], target)
            for to in variants:
                with scaled_head(named[to[0]], to[1], head=heads[to[0]]):
                    for origin in variants:
                        found = flipped[origin] & right[to]
                        misled = found & ~_right(named[to[0]], moved[origin], target)
                        counts[origin, to][0] += int(found.sum())
                        counts[origin, to][1] += int(misled.sum())
    if not heads:
        raise ValueError("loader must yield at least one sample, got batches without rows")
    return [TransferResult(*origin, *to, *count) for (origin, to), count in counts.items()]


@torch.no_grad()
def _right(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
    return logits_of(model(inputs), inputs).argmax(dim=1) == target
