"""The settings of the whole process that a test may change for its own length, and has to put back."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from flatcore._engine import backend, paths, proof


class Setting(NamedTuple):
    """How one is read and put back."""

    read: Callable[[], Any]
    write: Callable[[Any], None]


def _of(owner: Any, name: str) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("FLATCORE_")}


def _set_environment(wanted: dict[str, str]) -> None:
    for name in _environment().keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)


def _precision(*key: str) -> Setting:
    """A switch of the precision by its own name, which reads without torch's error on a mixture of names."""
    return Setting(
        lambda: torch._C._get_fp32_precision_getter(*key),
        lambda value: torch._C._set_fp32_precision_setter(*key, value),
    )


def _older() -> str | None:
    """What torch's older call says, which has a record of its own; None where the newer names contradict it."""
    try:
        return torch.get_float32_matmul_precision()
    except (RuntimeError, Warning):
        return None


SETTINGS: dict[str, Setting] = {
    "flatcore.backend": _of(backend, "selected"),
    "FLATCORE_CPU": _of(backend, "cpu_target"),
    "FLATCORE_VALIDATE": _of(backend, "validate_on_device"),
    "FLATCORE_CUDA_CHECK": _of(proof, "choice"),
    "the forced path": _of(paths, "forced_path"),
    "environment variables": Setting(_environment, _set_environment),
    "torch's threads": Setting(torch.get_num_threads, torch.set_num_threads),
    "torch's default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": Setting(
        torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)
    ),
    "torch's grad mode": Setting(torch.is_grad_enabled, torch._C._set_grad_enabled),
    "deterministic algorithms": Setting(
        torch.are_deterministic_algorithms_enabled, lambda value: torch.use_deterministic_algorithms(value)
    ),
    "float16 accumulation": Setting(
        lambda: getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", None),
        lambda value: setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", value),
    ),
    "float32 products": Setting(_older, lambda value: torch.set_float32_matmul_precision(value or "highest")),
}
if hasattr(torch._C, "_get_fp32_precision_getter"):  # behind the older call, which sets some of these too
    SETTINGS |= {
        f"precision of {'.'.join(key)}": _precision(*key)
        for key in (("generic", "all"), *itertools.product(("cuda", "mkldnn"), ("all", "conv", "rnn", "matmul")))
    }


def read() -> dict[str, Any]:
    """All of them as they stand."""
    return {name: setting.read() for name, setting in SETTINGS.items()}


def put_back(before: dict[str, Any]) -> list[str]:
    """Put back what has changed since; what that was, in words.

    Exact by its own setting or by one above it ("ieee", "none") is put back without a word: torch's older call, which most
    code restores a precision with, leaves the former for the latter.
    """
    changed = []
    for name, old in before.items():
        new = SETTINGS[name].read()
        if new != old:
            if not (name.startswith("precision") and {new, old} == {"ieee", "none"}):
                changed.append(f"{name}: {old!r} before, {new!r} after")
            SETTINGS[name].write(old)
    return changed
