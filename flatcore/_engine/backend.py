"""Which implementation runs: one process-wide setting, and what was compiled."""

from __future__ import annotations

import functools
import os
from types import TracebackType

import torch  # noqa: F401  (before _core: one OpenMP runtime, torch's, serves both)

try:
    from .. import _core
except ImportError as error:
    if "_core" not in str(error) or "undefined symbol" in str(error):
        raise
    _core = None  # type: ignore[assignment]

ABI = 6
"""Counts the changes of the extension's call signatures; the build reads it here, for the binary must agree."""
if _core is not None and _core.ABI != ABI:
    raise ImportError(
        f"flatcore: the compiled extension {_core.__file__} speaks ABI {_core.ABI}, these sources ABI {ABI}: "
        "install flatcore again (pip install .)"
    )

_NAMES = ("auto", "native", "reference")
CPU_TARGETS: tuple[str, ...] = ("baseline", "avx2", "avx512")


def is_native_built() -> bool:
    """Whether the compiled extension was found."""
    return _core is not None


def _check(name: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _NAMES))}, got {name!r}")
    if name == "native" and _core is None:
        raise RuntimeError("backend 'native' was asked for, but flatcore was installed without its compiled extension")
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


@functools.cache
def cuda_runtime() -> tuple[int, int, int, str]:
    """Runtime version, driver version, devices, and why none can be used (empty if one can)."""
    if _core is None or not _core.CUDA:
        return 0, 0, 0, "flatcore was built without CUDA"
    found: tuple[int, int, int, str] = _core.cuda_runtime()
    return found


def is_cuda_built() -> bool:
    """Whether there are compiled CUDA kernels."""
    return _core is not None and bool(_core.CUDA)


def cuda_reason(index: int) -> str:
    """Why no kernel can run on this device, empty if one can."""
    runtime, driver, _, reason = cuda_runtime()
    if not reason or not is_cuda_built():
        return reason
    if not driver:
        return "no NVIDIA driver found"
    if driver < runtime:
        return (
            f"the NVIDIA driver is too old: it serves CUDA {cuda_version(driver)}, flatcore was built with "
            f"{cuda_version(runtime)} ({reason})"
        )
    return reason


def cuda_architectures() -> str:
    """The architectures that were compiled, as CMake names them; "" for none."""
    return str(_core.cuda_architectures()) if is_cuda_built() else ""


def cuda_version(number: int) -> str | None:
    """CUDA's own form: 13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def uses_native(device_type: str, stem: str, index: int = 0) -> bool:
    """Whether compiled kernels of this computation can run for tensors on this device; ``proof`` says whether they may."""
    if selected == "reference":
        return False
    if device_type == "cuda":
        compiled = stem in CUDA_STEMS and not cuda_reason(index)
    else:
        compiled = _core is not None and device_type == "cpu"
    if selected == "native" and not compiled:
        raise ValueError(
            f"backend 'native' has no kernel of {stem} for device {device_type!r} in this build; "
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
