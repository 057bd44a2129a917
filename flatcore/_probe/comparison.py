"""Whether a model's output is its head's, and whether the head's is features W^T + b: on a few rows, in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from operator import sub
from typing import Any, NamedTuple

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_CLASSES = (
    1024  # of a later pass's row, so many outputs are computed again: reading all of a large W would double a pass
)
_TILE = 4096  # rows of W that are widened at a time


def tensors_in(output: Any) -> list[Tensor]:
    """Floating tensors in what a model returned, one level deep; those called logits alone, if there are any."""
    if isinstance(output, Tensor):
        return [output] if output.dim() > 0 and output.is_floating_point() else []
    if output is None:
        return []
    if isinstance(output, Mapping):
        named, parts = output.get("logits"), list(output.values())
    else:
        named = getattr(output, "logits", None)
        parts = list(output) if isinstance(output, (tuple, list)) else []
        if dataclasses.is_dataclass(output) and not isinstance(output, type):
            parts = [getattr(output, field.name) for field in dataclasses.fields(output)]
    if isinstance(named, Tensor):
        return tensors_in(named)
    return [x for part in parts if isinstance(part, Tensor) for x in tensors_in(part)]


class Compared(NamedTuple):
    """What a comparison saw, still on the device."""

    head: Tensor  # whether the head's output is features W^T + b
    output: Tensor  # whether a tensor of the model's output is the head's, up to a constant in each row
    made: Tensor  # (R, C) float64: the head's output
    given: list[Tensor]  # (R, C) float64 each: the model's, times the temperature
    unit: float  # rounding unit of the narrower of both


def compared(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    outputs: list[Tensor],
    temperature: float,
    rows: Tensor | slice,
    *,
    exact: bool,
    few: bool,
    same: bool,
) -> Compared:
    """Compare ``rows`` of features (N, D), the head's logits (N, C) and a model's outputs (N, C).

    Without ``logits`` the outputs are compared with features W^T + b itself. ``few``: on a part of the classes.
    ``same``: one of the outputs is ``logits`` itself.
    """
    C = weight.shape[0]
    phi = features[rows]
    kind = outputs[0].dtype if logits is None else logits.dtype
    made = None if logits is None else logits[rows].double()
    if few and made is not None and C > _CLASSES:  # evenly spread
        part = torch.linspace(0, C - 1, _CLASSES, device=weight.device).long()
        again, bound = _products(phi, weight[part], None if bias is None else bias[part], kind, exact)
        head = _equal(made[:, part], again, bound)
    else:
        again, bound = _products(phi, weight, bias, kind, exact)
        head = _equal(again if made is None else made, again, bound)
    narrow = max(torch.finfo(x.dtype).eps for x in (*outputs, *(() if logits is None else (logits,))))
    truth = again if made is None else made
    if same:
        return Compared(head, torch.ones_like(head), truth, [], narrow)
    allowed = 4 * narrow * (_largest(truth) + 1) + (bound if made is None else 0)
    given = [output[rows].double() * temperature for output in outputs]
    alike = [_alike(x, truth, allowed) for x in given]
    return Compared(head, torch.stack(alike).any(), truth, given, narrow)


def _products(
    phi: Tensor, weight: Tensor, bias: Tensor | None, kind: torch.dtype, exact: bool
) -> tuple[Tensor, Tensor]:
    """Features W^T + b in float64, and how far a layer's own result of that dtype may be from it, (R, 1)."""
    half = kind in _HALF
    again, size = [], []
    left = (phi.to(kind) if half else phi).double()  # autocast rounds what goes in, a half-precision layer has it so
    for tile in (weight,) if len(weight) <= _TILE else weight.split(_TILE):
        right = (tile.to(kind) if half else tile).double().T
        again.append(left @ right)
        size.append(left.abs() @ right.abs())
    z, s = (again[0], size[0]) if len(again) == 1 else (torch.cat(again, 1), torch.cat(size, 1))
    if bias is not None:
        z, s = z + bias.double(), s + bias.double().abs()
    # a product's own rounding grows like sqrt(D); rounded inputs and partial sums at worst like their absolute terms
    unit = (2 * math.sqrt(phi.shape[-1]) + 4) * torch.finfo(
        torch.float64 if kind is torch.float64 else torch.float32
    ).eps
    if half:
        unit += 2 * torch.finfo(kind).eps
    elif not exact and kind is not torch.float64:
        unit += 2.0**-7  # TF32 keeps 10 bits of what goes in, "medium" 7
    return z, unit * (_largest(s) + 1)


def row_agrees(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor,
    output: Tensor | None,
    temperature: float,
    row: int,
) -> bool:
    """Whether one row agrees to a few roundings, asked as cheaply as possible; False says nothing.

    Of a small head in full precision on the CPU: 9 us at D = 512, C = 10, where :func:`compared` takes 100.
    """
    if features.dim() != 2:
        features, logits = features.reshape(-1, features.shape[-1]), logits.reshape(-1, logits.shape[-1])
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # the context manager takes 1 us
    try:
        phi = features[row]
        again = (torch.mv(weight, phi) if bias is None else torch.addmv(bias, weight, phi)).tolist()
        made = logits[row].tolist()
        given = None if output is None else output.reshape(logits.shape)[row].tolist()
    finally:
        torch._C._set_grad_enabled(before)
    unit = torch.finfo(logits.dtype).eps * (1 + max(map(abs, made)))
    # sums, which are NaN where anything is: a maximum may pass over it
    if not sum(map(abs, map(sub, again, made))) <= (2 * math.sqrt(features.shape[1]) + 4) * unit:
        return False
    return given is None or sum(abs(g * temperature - m) for g, m in zip(given, made, strict=True)) <= 4 * unit


# ------------------------------------------------------------------------------------------------------- what it may be
def seen(given: list[Tensor], made: Tensor, unit: float, temperature: float) -> str:
    """What the model does with its head's output, as far as the numbers tell; empty where they do not."""
    for output in given:
        finite = made.isfinite() & output.isfinite()
        a, b = _centered(made, finite), _centered(output, finite)
        factor = ((a * b).sum() / (b * b).sum()).item()
        if factor > 0 and _alike(factor * output, made, 8 * unit * (_largest(made) + 1)):
            return f"it is the head's output divided by {factor * temperature:.6g}: pass that as temperature"
    for output in given:
        masked = made.isfinite() & (output < made - 1e3)
        if masked.any() and _alike(made.masked_fill(masked, -torch.inf), output.masked_fill(masked, -torch.inf),
                                   8 * unit * (_largest(made) + 1)):  # fmt: skip
            return (
                f"{int(masked.any(dim=0).sum())} classes are masked after the head (a mask): with a mask that is the same "
                "in every row, give linear_bias with -inf there"
            )
        raw = output / temperature
        if ((raw >= 0) & (raw <= 1)).all():
            one = (raw.sum(1) - 1).abs().amax() <= 1e-2
            return f"these are probabilities ({'a softmax' if one else 'a sigmoid'}): let the model return its logits"
        order = made.flatten().argsort()
        steps, slack = output.flatten()[order].diff(), 8 * unit * (output.abs().amax() + 1)
        if made.numel() >= 8 and output.isfinite().all() and (steps >= -slack).all():
            return "it is an increasing function of each logit (a softcap?), and no multiple of it"
    return ""


def rows_of(output: Tensor, logits: Tensor) -> bool:
    """Whether the rows of a model's output are some of its head's (tokens that are selected after it)."""
    C = logits.shape[-1]
    if output.shape[-1] != C or not 0 < output.numel() < logits.numel():
        return False
    first = output.detach().reshape(-1, C)[:1].double()
    all_rows = logits.detach().reshape(-1, C).double()
    return bool(((all_rows - first).abs().amax(1) <= 4 * torch.finfo(output.dtype).eps * (_largest(first) + 1)).any())


def is_row(output: Tensor, row: Tensor) -> bool:
    """Whether an output's first row is one that a layer made, up to a constant and the dtypes' rounding."""
    if output.dim() == 0 or output.shape[-1] != row.shape[-1] or output.numel() == 0:
        return False
    a, b = output.detach().reshape(-1, row.shape[-1])[:1].double(), row[None].double()
    unit = max(torch.finfo(output.dtype).eps, torch.finfo(row.dtype).eps)
    return bool(_alike(a, b, 4 * unit * (_largest(b) + 1)))


def _centered(x: Tensor, finite: Tensor) -> Tensor:
    """Rows less the mean of their finite entries; 0 at the others."""
    x = torch.where(finite, x, 0)
    mean = x.sum(dim=1, keepdim=True) / finite.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(finite, x - mean, 0)


def _largest(x: Tensor) -> Tensor:
    """The largest finite magnitude of each row, (R, 1): an absent class (-inf) says nothing about the others."""
    return torch.where(x.isfinite(), x, 0).abs().amax(dim=1, keepdim=True)


def _equal(a: Tensor, b: Tensor, bound: Tensor) -> Tensor:
    """Whether entries are equal to a bound; infinities and NaN in the same places."""
    return (((a - b).abs() <= bound) | (a == b) | (a.isnan() & b.isnan())).all()


def _alike(a: Tensor, b: Tensor, bound: Any) -> Tensor:
    """Whether rows are equal to a bound, up to a constant in each; infinities and NaN in the same places."""
    finite = a.isfinite() & b.isfinite()
    close = (_centered(a, finite) - _centered(b, finite)).abs() <= bound
    return torch.where(finite, close, (a == b) | (a.isnan() & b.isnan())).all()
