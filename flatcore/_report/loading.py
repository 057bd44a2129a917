"""The model and the batches of a user: checked and refused by name, the model's mode set and restored."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from .._arguments.arrays import as_tensor
from .._arguments.checks import check_tensor

BATCH = 256  # rows of a batch, where a data set comes in a loader's place
NOTHING = "loader must yield at least one batch, got an empty one (or one that was used up before)"
_TARGETS = ("labels", "label", "target")


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


def as_loader(loader: Any) -> Any:
    """The loader itself; of a data set, one that yields its rows in batches of 256.

    An iterable data set that yields batches already is read as it is.

    Raises:
        TypeError: it cannot be iterated.
    """
    if isinstance(loader, IterableDataset):
        return _grouped(loader)
    if isinstance(loader, Dataset):
        return DataLoader(loader, batch_size=BATCH)
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"loader must yield pairs (inputs, target), got {type(loader).__qualname__}, which yields nothing"
        )
    return loader


def _grouped(dataset: Iterable[Any]) -> Iterator[Any]:
    items = iter(dataset)
    for first in items:
        items = itertools.chain([first], items)
        target = None
        if isinstance(first, Mapping):
            target = next((first[key] for key in _TARGETS if key in first), None)
        elif isinstance(first, (tuple, list)) and first:
            target = first[-1]
        if np.ndim(target) > 0:  # type: ignore[arg-type]  # batches already; a tensor has its ndim
            yield from items
        while group := list(itertools.islice(items, BATCH)):
            yield default_collate(group)
        return


def checked(loader: Any, *, mappings: bool = False) -> Iterator[tuple[Any, Tensor]]:
    """Yield what :func:`batches` does, and nothing where there is no batch."""
    for number, batch in enumerate(as_loader(loader)):
        inputs: Any
        if mappings and isinstance(batch, Mapping):
            inputs, target = _split(batch, number)
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            inputs, target = batch
        else:
            held = f" of {len(batch)}" if isinstance(batch, (tuple, list, Mapping)) else ""
            remedy = ": leave out the rest, ((x, y) for x, y, *_ in loader)" if held and len(batch) > 2 else ""
            if isinstance(batch, Mapping):
                remedy = ": inputs by name are for flatcore.evaluate, this needs one tensor of them"
            if isinstance(batch, (Tensor, np.ndarray)):
                remedy = ": is the loader itself one pair? [(inputs, target)] is a loader of one batch"
            raise TypeError(
                f"loader must yield pairs (inputs, target), got a {type(batch).__qualname__}{held} as batch {number}{remedy}"
            )
        target = _tensor(target, "target", number)
        if mappings and isinstance(inputs, Mapping):
            inputs = {
                key: _tensor(value, f"inputs[{key!r}]", number) if isinstance(value, (Tensor, np.ndarray)) else value
                for key, value in inputs.items()
            }
            shapes = [tuple(value.shape) for value in inputs.values() if isinstance(value, Tensor)]
        else:
            inputs = _tensor(inputs, "inputs", number)
            shapes = [tuple(inputs.shape)]
        if target.dim() == 0:
            raise ValueError(
                f"loader must yield batches, got a single row (a target of shape ()) as batch {number}: is it a data set? "
                "torch.utils.data.DataLoader(data, batch_size=256) makes batches of it"
            )
        if all(shape[:1] != target.shape[:1] for shape in shapes):
            raise ValueError(
                "loader must yield inputs and target with as many rows, got shapes "
                f"{', '.join(map(str, shapes)) or 'none'} and {tuple(target.shape)} in batch {number}"
            )
        if number == 0 and isinstance(batch, Mapping):
            _check_shifted(inputs.get("input_ids"), target)
        yield inputs, target


def batches(loader: Any, *, mappings: bool = False) -> Iterator[tuple[Any, Tensor]]:
    """Yield (inputs, target) where the loader left them; NumPy arrays as tensors.

    With ``mappings`` a batch, or the inputs of a pair, may be a mapping: inputs are then a dictionary, and the target of a
    batch is taken out of it, from "labels", "label" or "target".

    Raises:
        TypeError: the loader cannot be iterated; a batch is no pair of tensors or arrays, and no mapping with one target.
        ValueError: a pair whose rows do not correspond; a single row; labels that are not shifted; no batch at all.
    """
    found = False
    for batch in checked(loader, mappings=mappings):
        found = True
        yield batch
    if not found:
        raise ValueError(NOTHING)


def _split(batch: Mapping[Any, Any], number: int) -> tuple[dict[Any, Any], Any]:
    """The inputs by name and the target of a mapping."""
    held = [key for key in _TARGETS if key in batch]
    if len(held) != 1:
        names = " or ".join(map(repr, _TARGETS))
        raise TypeError(
            f"loader must yield pairs (inputs, target), or mappings with the target under {names}, got a "
            f"{type(batch).__qualname__} of {len(batch)} as batch {number} with the keys "
            f"{', '.join(map(repr, batch)) or 'none'}: {'rename one' if not held else 'leave one of them'}, or yield a pair "
            "(inputs, target), where the inputs may be a mapping"
        )
    return {key: value for key, value in batch.items() if key != held[0]}, batch[held[0]]


def _check_shifted(ids: Any, target: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.shape != target.shape or target.dim() != 2 or target.shape[1] < 2:
        return
    kept = target >= 0
    if kept.any() and bool((target == ids)[kept].all()):
        raise ValueError(
            "loader must yield the label of each position's logits, got labels equal to input_ids in batch 0, as causal "
            "language models take them, which predict the next token and shift them on their own: shift them here, "
            "labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100). For a model that does predict its own "
            "input yield a pair (inputs, target), where the inputs may be a mapping"
        )


def _tensor(value: Any, name: str, number: int) -> Tensor:
    if not isinstance(value, (Tensor, np.ndarray)):
        row = ": is it a data set of single rows? torch.utils.data.DataLoader(data, batch_size=256) makes batches of it"
        raise TypeError(
            f"loader must yield tensors or NumPy arrays, got {name} of type {type(value).__qualname__} in batch {number}"
            + (row if isinstance(value, (int, np.generic)) else "")
        )
    tensor = as_tensor(value, f"loader's {name}")
    check_tensor(tensor, name)
    return tensor


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
