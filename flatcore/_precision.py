"""Full float32 products, whatever the process's precision switches say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_precision_lock = threading.Lock()
_precision_users = 0
_precision_before = ("highest", "none")


@contextmanager
def full_precision(device_type: str = "cpu") -> Iterator[None]:
    """Products in full float32: autocast off, and the process's matmul precision at its highest while any of them runs.

    The first of several threads raises it and the last one restores it.
    """
    global _precision_users, _precision_before
    with torch.autocast(device_type, enabled=False):
        with _precision_lock:
            if _precision_users == 0:
                _precision_before = torch.get_float32_matmul_precision(), _cpu_precision()
                if _precision_before[0] != "highest" or _precision_before[1] not in ("none", "ieee"):
                    torch.set_float32_matmul_precision("highest")
                    _set_cpu_precision("ieee")
            _precision_users += 1
        try:
            yield
        finally:
            with _precision_lock:
                _precision_users -= 1
                if _precision_users == 0 and _precision_before != (
                    torch.get_float32_matmul_precision(),
                    _cpu_precision(),
                ):
                    torch.set_float32_matmul_precision(_precision_before[0])
                    _set_cpu_precision(_precision_before[1])


def _cpu_precision() -> str:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return getattr(matmul, "fp32_precision", "none")


def _set_cpu_precision(value: str) -> None:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = value


def products_are_exact(device_type: str) -> bool:
    """Whether float32 products on this device keep full precision under the switches as they are now."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through the newer switches
        return False
