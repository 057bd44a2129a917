"""Which implementation runs: one process-wide setting, and what was compiled."""

from __future__ import annotations

import os
from types import TracebackType

from . import extensions
from .extensions import _core

_NAMES = ("auto", "native", "reference")
CPU_TARGETS: tuple[str, ...] = ("baseline", "avx2", "avx512")


def is_native_built() -> bool:
    """Whether the compiled extension was found."""
    return _core is not None


def _check(name: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _NAMES))}, got {name!r}")
    if name == "native" and _core is None:
        raise RuntimeError(
            "backend 'native' was asked for, but flatcore was installed without its compiled extension "
            "(FLATCORE_NATIVE=OFF, or by another Python): pip install . with a C++17 compiler builds it"
        )
    return name


def _check_cpu(name: str | None) -> str | None:
    """Check a CPU target's name against what was compiled and what this processor has."""
    if name is None:
        return None
    if name not in CPU_TARGETS:
        raise ValueError(f"FLATCORE_CPU must be one of {', '.join(CPU_TARGETS)}, got {name!r}")
    usable = _core.cpu_targets() if _core is not None else ()
    if name not in usable:
        raise RuntimeError(
            f"FLATCORE_CPU={name} is not usable here; compiled and supported: {', '.join(usable) or 'none'}"
        )
    return name


selected: str = _check(os.environ.get("FLATCORE_BACKEND", "auto") or "auto")
cpu_target: str | None = _check_cpu(os.environ.get("FLATCORE_CPU") or None)
validate_on_device: bool = os.environ.get("FLATCORE_VALIDATE", "0") not in ("", "0")


def describe_cpu_target() -> str | None:
    """Name the CPU target that runs, or None without the extension."""
    return None if _core is None else _core.cpu_target(cpu_target or "")


CUDA_STEMS: tuple[str, ...] = ("head_metrics", "head_metrics_backward", "row_norms", "unmasked_cross_entropy")
"""What has a CUDA kernel; ``proof`` knows which of them "auto" takes."""


def uses_native(device_type: str, stem: str, index: int | None = None) -> bool:
    """Whether compiled kernels of this computation can run for tensors on this device; ``proof`` says whether they may."""
    if selected == "reference":
        return False
    if device_type == "cuda":
        compiled = stem in CUDA_STEMS and not extensions.cuda_reason(index)
    else:
        compiled = _core is not None and device_type == "cpu"
    if selected == "native" and not compiled:
        why = f": {extensions.cuda_reason(index)}" if device_type == "cuda" and stem in CUDA_STEMS else ""
        raise ValueError(
            f"backend 'native' has no kernel of {stem} for device {device_type!r} in this build{why}; "
            "use flatcore.backend('auto') or move the tensors to the CPU"
        )
    return compiled


class backend:  # noqa: N801  (a function to its users)
    """Choose the implementation for the whole process; as a context manager, until the block ends.

    Args:
        name: ``"auto"`` takes the compiled kernels where they exist for the tensors' device and the PyTorch reference
            elsewhere, on CUDA with one RuntimeWarning that says why; ``"native"`` and ``"reference"`` force one.

    Raises:
        ValueError: ``name`` is none of the three; later, at a call, if ``"native"`` has no kernel for a device.
        RuntimeError: ``"native"`` when the extension was not compiled; later, at a call, if the kernels that it needs are
            known to have failed their check on the device.

    On a CUDA device ``"auto"`` takes what has passed a check there. The first call makes it, in a process of its own and
    once for a machine (some seconds; ``FLATCORE_CUDA_CHECK=0`` makes none, ``force`` makes it again): docs/cuda.md.
    ``"native"`` takes kernels that have not been checked. :func:`flatcore.cuda.show_config` shows what is known.

    The setting is one for all threads. The environment variable ``FLATCORE_BACKEND`` sets it at import.

    Example:
        >>> import flatcore
        >>> with flatcore.backend("reference"):
        ...     flatcore.show_config()["backend"]
        'reference'
    """

    def __init__(self, name: str):
        global selected
        self._previous = selected
        selected = _check(name)

    def __enter__(self) -> backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global selected
        selected = self._previous

    def __repr__(self) -> str:
        return f"flatcore.backend({selected!r})"
