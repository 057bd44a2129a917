"""The arguments of a head, checked: what a public function was given becomes one record."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._engine import backend
from .._engine.direct import plain_head
from .._engine.head import Head, is_double
from .._engine.reduction import sample_weights
from .._engine.threads import alone_after_fork
from .arrays import as_tensor
from .checks import (
    INTEGERS,
    as_labels,
    check_device,
    check_flag,
    check_floating,
    check_integer,
    check_no_grad,
    check_option,
    check_temperature,
    check_tensor,
    is_exact,
    is_wrapped,
    one_output,
    warn,
)

_TWO_ROWS = (
    "linear_weight=torch.cat([torch.zeros_like(w), w]) for w of shape (1, D), the bias likewise, and logits z as "
    "torch.cat([torch.zeros_like(z), z], dim=-1)"
)


class Inputs(NamedTuple):
    """A checked head, and what is needed to weigh its rows and to give results back in the caller's form."""

    head: Head
    soft_target: Tensor | None  # (N, C); the head has no labels then
    leading: torch.Size | tuple[int]
    dtype: torch.dtype
    plain: bool  # all of the head is simply its memory

    def sample_weights(self, weight: Tensor | None) -> Tensor | None:
        """s_n of soft targets; of labels the reduction finds it."""
        if self.soft_target is None:
            return None
        return _sample_weights(self.soft_target, weight, self.head.ignore_index, self.head.C)


_sample_weights = alone_after_fork(sample_weights)


def _floating(value: Any, name: str) -> Tensor:
    tensor = as_tensor(value, name)
    check_tensor(tensor, name)
    check_floating(tensor, name)
    return tensor


def checked_inputs(
    features: Any,
    linear_weight: Any,
    target: Any,
    linear_bias: Any,
    logits: Any,
    temperature: Any,
    ignore_index: Any,
    *,
    soft: bool,
    include_bias: Any = False,
    norm_power: Any = 2,
) -> Inputs:
    temperature, ignore_index = check_temperature(temperature), check_integer(ignore_index, "ignore_index")
    counts, power = check_flag(include_bias, "include_bias"), int(norm_power)
    if isinstance(features, Tensor) and not counts:
        head = Head(features, linear_weight, linear_bias, logits, target, temperature, ignore_index, counts, power)
        found = plain_head(head)
        if found is not None and found[2] > 1:
            N, _, _, double = found
            return Inputs(head, None, (N,), torch.float64 if double else torch.float32, True)
    phi, w = _floating(features, "features"), _floating(linear_weight, "linear_weight")
    if w.dim() != 2:
        raise ValueError(f"linear_weight must be 2-dimensional (C, D), got shape {tuple(w.shape)}")
    classes, width = w.shape
    if classes == 0:
        raise ValueError("linear_weight must have at least one row (C >= 1), got C = 0")
    if phi.dim() == 0 or phi.shape[-1] != width:
        hint = ""
        if phi.dim() and phi.shape[-1] == classes:
            hint = f"; linear_weight (C, D) of shape {tuple(w.shape)} transposed? Then pass linear_weight.T"
        raise ValueError(
            f"features must have shape (..., D) with D = {width} as in linear_weight, got {tuple(phi.shape)}{hint}"
        )
    if classes == 1:
        warn(one_output("linear_weight", _TWO_ROWS))
    check_device(w, "linear_weight", phi, "features")
    leading = phi.shape[:-1]
    n = math.prod(leading)

    b = None
    if linear_bias is not None:
        b = _floating(linear_bias, "linear_bias")
        check_device(b, "linear_bias", phi, "features")
        if b.shape != (classes,):
            raise ValueError(f"linear_bias must have shape (C,) = ({classes},), got {tuple(b.shape)}")
    z = None
    if logits is not None:
        z = _floating(logits, "logits")
        check_device(z, "logits", phi, "features")
        if z.shape != (*leading, classes):
            raise ValueError(f"logits must have shape {(*leading, classes)} (features' leading dimensions and C), "
                             f"got {tuple(z.shape)}")  # fmt: skip
        z = _rows(z)
    y = None
    if target is not None:
        y = as_tensor(target, "target")
        check_tensor(y, "target")
        check_device(y, "target", phi, "features")
        y = _target(y, leading, n, classes, soft, ignore_index)

    hard = y is None or not y.is_floating_point()
    if counts:
        b = _checked_column(b)
    head = Head(_rows(phi), w, b, z, y if hard else None, temperature, ignore_index, counts, power)
    return Inputs(head, None if hard else y, leading, torch.float64 if is_double(head) else torch.float32, False)


def _rows(x: Tensor) -> Tensor:
    """The leading dimensions as one."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _target(y: Tensor, leading: torch.Size, n: int, classes: int, soft: bool, ignore_index: int) -> Tensor:
    if y.dtype in INTEGERS:
        if y.shape != leading:
            raise ValueError(f"target must have the features' leading shape {tuple(leading)}, got {tuple(y.shape)}")
        return as_labels(y if y.dim() == 1 else y.reshape(n), ignore_index)
    if not y.is_floating_point():
        raise TypeError(f"target must hold integer class labels, got {y.dtype}")
    if not soft:
        raise TypeError(f"target must hold integer class labels here, got {y.dtype}: soft targets (class probabilities) are "
                        "taken by hessian_trace and relative_flatness only")  # fmt: skip
    check_floating(y, "target")
    check_no_grad(y, "target")
    if y.shape != (*leading, classes):
        raise ValueError(f"a soft target must have shape {(*leading, classes)} (features' leading dimensions and C), "
                         f"got {tuple(y.shape)}")  # fmt: skip
    y = y.reshape(n, classes)
    if _may_read(y) and bool((y < 0).any()):
        raise ValueError(f"a soft target must not be negative, got {y.min().item()}")
    return y


def _may_read(tensor: Tensor) -> bool:
    """Whether a check may look at values: not while tracing, and on a device, where it synchronises, only when asked."""
    if torch.compiler.is_compiling() or not is_exact(tensor):
        return False
    if is_wrapped(tensor) or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return tensor.device.type == "cpu" or (tensor.device.type != "meta" and backend.validate_on_device)


def checked_class_weight(weight: Any, head: Head, target: Any) -> Tensor | None:
    if weight is None:
        return None
    if target is None:
        raise ValueError("weight (class weights) needs a target, got target=None")
    tensor = _floating(weight, "weight")
    check_no_grad(tensor, "weight")
    check_device(tensor, "weight", head.features, "features")
    classes = head.C
    if tensor.shape != (classes,):
        raise ValueError(f"weight must have shape (C,) = ({classes},), got {tuple(tensor.shape)}")
    if _may_read(tensor) and bool((tensor < 0).any()):
        raise ValueError(f"weight must not be negative, got {tensor.min().item()}")
    return tensor


def check_measure(measure: Any, norm_power: Any) -> None:
    """Require a measure of relative flatness, and a power of ||W||_F that it has."""
    check_option(measure, "measure", ("layerwise", "neuronwise"))
    check_option(norm_power, "norm_power", (1, 2))
    if measure == "neuronwise" and norm_power != 2:
        raise ValueError(f"norm_power must be 2 with measure='neuronwise', got {norm_power!r}")


def _checked_column(bias: Tensor | None) -> Tensor:
    """A bias that counts as a column of W."""
    if bias is None:
        raise ValueError("include_bias=True needs linear_bias, got linear_bias=None")
    if not _may_read(bias):
        # as a label that is no class: NaN on every path, where a look would wait for the device
        return torch.where(bias == -math.inf, math.nan, bias)
    if bool((bias == -math.inf).any()):
        raise ValueError(
            "include_bias=True needs a finite linear_bias, got an entry of -inf: the norms would be infinite"
        )
    return bias
