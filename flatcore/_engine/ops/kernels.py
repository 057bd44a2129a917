"""What computes a stem for tensors on a device, and who looks at the labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import reference
from .. import backend, cpu, cuda

KERNELS: dict[str, Any] = {"cpu": cpu, "cuda": cuda}
"""The compiled kernels, by type of device."""


def kernels_of(x: Tensor, stem: str) -> Any:
    """The compiled kernels that have this stem for this device, or the reference."""
    if x.is_cpu:
        return KERNELS["cpu"] if backend.uses_native("cpu", stem) else reference
    device = x.device
    return KERNELS[device.type] if backend.uses_native(device.type, stem, device.index) else reference


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
