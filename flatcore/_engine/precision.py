"""Full float32 products, whatever the process's precision switches say.

Every documented way to lower float32 products ends in one setting per backend, that of its matrix products: ``mkldnn``'s
on the CPU, ``cuda``'s on the GPU. It is "none" where it is inherited from the backend's, and that from the process's.
Only this setting is changed here and put back; torch before 2.9 has the older process-wide call alone. On the GPU
float16 products are kept from ``allow_fp16_accumulation`` as well; the ``reduced_precision_reduction`` switches let partial
sums be added in the type of the output, which is float32 in every product of flatcore.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_read: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
_write: Any = getattr(torch._C, "_set_fp32_precision_setter", None)

_SETTINGS = {"cpu": ("mkldnn", "matmul"), "cuda": ("cuda", "matmul")}
_EXACT = ("none", "ieee")

_lock = threading.Lock()
_users = 0
_before: dict[tuple[str, str], str] = {}  # settings that are raised now, as they were
_older: str | None = None  # the older call's value, where that has been raised as well
_accumulation = False  # whether float16 accumulation was on and is off now


def products_are_exact(device_type: str) -> bool:
    """Whether products of float32 matrices on this kind of device run in full float32 as the switches stand now."""
    if _read is None:
        return torch.get_float32_matmul_precision() == "highest"
    return device_type not in _SETTINGS or _read(*_SETTINGS[device_type]) in _EXACT


@contextmanager
def full_precision(device_type: str = "cpu") -> Iterator[None]:
    """Products in full float32: autocast off, and the device's matrix products exact while any of them runs.

    The first of several threads raises the setting and the last one restores it. A switch that another thread moves
    meanwhile keeps its new value.
    """
    global _users
    with torch.autocast(device_type, enabled=False):
        with _lock:
            _users += 1
            if not products_are_exact(device_type):
                _raise(device_type)
            if device_type == "cuda" and _accumulates():
                _set_accumulation(False)
        try:
            yield
        finally:
            with _lock:
                _users -= 1
                if _users == 0:
                    _restore_all()


def _raise(device_type: str) -> None:
    global _older
    if _read is None:
        _older = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return
    setting = _SETTINGS[device_type]
    _before[setting] = _own(*setting)
    if device_type == "cuda":
        # the older names keep a record that has to agree: another thread that reads them, as every compiled function
        # does, gets an error otherwise
        older = _older_call()
        if older != "highest" and not products_are_exact("cpu"):
            _raise("cpu")
            older = _older_call()
        if older == "high" or (older == "medium" and _SETTINGS["cpu"] in _before):
            _older = older
            torch.backends.cuda.matmul.allow_tf32 = False
            return
    _write(*setting, "ieee")


def _restore_all() -> None:
    if _before or _older is not None:
        _restore()
    if _accumulation:
        _set_accumulation(True)


def _after_fork() -> None:
    """The threads that were in the middle of a call are not in the child."""
    global _lock, _users
    _lock, _users = threading.Lock(), 0
    _restore_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _restore() -> None:
    global _older
    older, _older = _older, None
    if _read is None:
        if older is not None and torch.get_float32_matmul_precision() == "highest":
            torch.set_float32_matmul_precision(older)
        return
    raised = {setting: own for setting, own in _before.items() if _read(*setting) == "ieee"}
    _before.clear()
    if older is not None and _SETTINGS["cuda"] in raised:
        if older == "high":
            torch.backends.cuda.matmul.allow_tf32 = True
        else:  # this call alone can say "medium", and it sets the CPU too
            raised.setdefault(_SETTINGS["cpu"], _own(*_SETTINGS["cpu"]))
            torch.set_float32_matmul_precision(older)
    for setting, own in raised.items():
        _write(*setting, own)


def _accumulates() -> bool:
    return getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)  # since 2.7


def _set_accumulation(on: bool) -> None:
    global _accumulation
    _accumulation = not on
    torch.backends.cuda.matmul.allow_fp16_accumulation = on


def _older_call() -> str | None:
    """What ``torch.get_float32_matmul_precision`` says; None where it raises because newer names were used since."""
    try:
        return torch.get_float32_matmul_precision()
    except (RuntimeError, Warning):
        return None


def _own(backend: str, operation: str) -> str:
    """The setting itself, "none" where it is inherited.

    A reading equal to the setting above may be either: the one above is exact for a moment, and the reading follows it
    or not.
    """
    reading = _read(backend, operation)
    above = ("generic", "all") if operation == "all" else (backend, "all")
    if backend == "generic" or reading == "none" or reading != _read(*above):
        return reading
    kept = _own(*above)
    _write(*above, "ieee")
    try:
        return "none" if _read(backend, operation) == "ieee" else reading
    finally:
        _write(*above, kept)
