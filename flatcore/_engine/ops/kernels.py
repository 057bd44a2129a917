"""What computes a stem for tensors on a device, and who looks at the labels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from ... import reference
from .. import backend, cpu, cuda, device, proof
from ..precision import full_precision

KERNELS: dict[str, Any] = {"cpu": cpu, "cuda": cuda}
"""The compiled kernels, by type of device."""


def kernels_of(x: Tensor, stem: str, C: int = 0) -> Any:
    """The compiled kernels that have this stem for this device, or the reference; C: classes of a head."""
    kind, index = device.place(x)
    if backend.uses_native(kind, stem, index):
        return KERNELS[kind] if kind != "cuda" or _is_proven(index, stem, C) else reference
    if kind == "cuda" and backend.selected == "auto":
        proof.explain_absence(index)
    return reference


def exact_products(kernels: Any, x: Tensor) -> AbstractContextManager[None]:
    """What surrounds a call: the reference's products, which may be in float32, in full; the kernels see to theirs."""
    return full_precision(x.device.type) if kernels is reference else nullcontext()


def _is_proven(index: int, stem: str, C: int) -> bool:
    """Whether a path of this stem that can take C classes may run on this CUDA device."""
    path = cuda.path_of(stem, C, proof.usable(index, stem))
    if path is None and backend.selected == "native":
        proof.refuse(index, stem, cuda.path_of(stem, C, proof.paths_of(stem)) or "-")
    if path is not None:
        cuda.load(index)
    return path is not None


def refuse_bad_labels(target: Tensor | None, C: int, ignore_index: int, kernels: Any) -> None:
    """Refuse a label that is no class.

    The CPU's kernels find one on their way; the reference and other devices' make its row NaN, and there a check waits for
    the device, so that it is made only where it was asked for.
    """
    if target is None:
        return
    if kernels is not cpu if target.device.type == "cpu" else backend.validate_on_device:
        bad = ((target < 0) | (target >= C)) & (target != ignore_index)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise cpu.bad_label(int(target[row]), row, C, ignore_index)
