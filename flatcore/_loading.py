"""The model and the batches of a user: checked and refused by name, the model's mode set and restored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._validate import check_tensor


def check_module(model: Any) -> nn.Module:
    """Require a module: the head is looked for in it, its mode is set and restored."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__module__}.{type(model).__qualname__}")
    return model


def device_of(model: nn.Module, wanted: Any = None) -> torch.device:
    """Device of the model, which the batches are moved to.

    Raises:
        ValueError: another device is wanted, or the model lies on several.
    """
    found = {tensor.device for tensor in model.parameters()}
    if len(found) > 1:
        raise ValueError(f"model must be on one device, got one on {', '.join(sorted(map(str, found)))}")
    here = found.pop() if found else torch.device("cpu")
    if wanted is None:
        return here
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must name a torch device, got {wanted!r}: {str(error).splitlines()[0]}") from None
    # "cuda" is whichever CUDA device the model is on
    if device.type != here.type or device.index not in (None, here.index):
        raise ValueError(f"model must be on device {device}, got one on {here}: move it with model.to({str(device)!r})")
    return here


def batches(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, target) where the loader left them.

    Raises:
        TypeError: the loader cannot be iterated; a batch is no pair of tensors.
        ValueError: a pair whose rows do not correspond; no batch at all.
    """
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"loader must yield pairs (inputs, target), got {type(loader).__qualname__}, which yields nothing"
        )
    number = -1
    for number, batch in enumerate(loader):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            held = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
            raise TypeError(
                f"loader must yield pairs (inputs, target), got a {type(batch).__qualname__}{held} as batch {number}"
            )
        for value, name in zip(batch, ("inputs", "target"), strict=True):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"loader must yield tensors, got {name} of type {type(value).__qualname__} in batch {number}"
                )
            check_tensor(value, name)
        inputs, target = batch
        if inputs.dim() == 0 or target.dim() == 0 or len(inputs) != len(target):
            raise ValueError(
                "loader must yield inputs and target with as many rows, got shapes "
                f"{tuple(inputs.shape)} and {tuple(target.shape)} in batch {number}"
            )
        yield inputs, target
    if number < 0:
        raise ValueError("loader must yield at least one batch, got an empty one (or one that was used up before)")


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode; afterwards each is as it was."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
