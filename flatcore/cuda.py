"""What this build can do on a CUDA device."""

from __future__ import annotations

from typing import Any

from ._engine import backend
from ._engine.backend import _core
from ._engine.chunked_cuda import WORKSPACE_BYTES


def is_built() -> bool:
    """Whether the extension was compiled with CUDA kernels.

    Example:
        >>> import flatcore
        >>> isinstance(flatcore.cuda.is_built(), bool)
        True
    """
    return _core is not None and bool(_core.CUDA)


def is_available() -> bool:
    """Whether CUDA kernels were compiled and a device can run them; :func:`show_config` says why not.

    Without them CUDA tensors run on the PyTorch reference, on their own device, with the same results.

    Example:
        >>> import flatcore
        >>> flatcore.cuda.is_available() <= flatcore.cuda.is_built()
        True
    """
    return not backend.cuda_runtime()[3]


def show_config() -> dict[str, Any]:
    """What was built for CUDA and what the module's own runtime finds here, as a dictionary.

    Returns:
        ``built``; ``available``; ``reason``, why no device can be used, or None (torch's runtime may work with a driver
        that is too old for this one); ``runtime`` and ``driver``, versions such as "13.0" (the driver's is the newest
        runtime that it serves), or None; ``devices``, their number; ``architectures``, those that were compiled;
        ``kernels``, the computations that have one, which ``flatcore.backend("native")`` takes; ``proven``, those of them
        whose tests have passed on a device, which ``"auto"`` takes; all others run on the reference; ``fused_classes``
        (small heads, in one kernel) and ``workspace_bytes``, the bound of a larger head's buffers.

    Example:
        >>> import flatcore
        >>> config = flatcore.cuda.show_config()
        >>> (config["reason"] is None) == config["available"]
        True
    """
    runtime, driver, devices, reason = backend.cuda_runtime()
    built = is_built()
    return {
        "built": built,
        "available": not reason,
        "reason": reason or None,
        "runtime": _version(runtime),
        "driver": _version(driver),
        "devices": devices,
        "architectures": _core.cuda_architectures() if built else None,
        "kernels": backend.CUDA_STEMS if built else (),
        "proven": backend.CUDA_PROVEN if built else (),
        "fused_classes": _core.CUDA_FUSED_CLASSES if built else None,
        "workspace_bytes": WORKSPACE_BYTES if built else None,
    }


def _version(number: int) -> str | None:
    """CUDA's own form: 13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None
