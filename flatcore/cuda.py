"""What this build can do on a CUDA device."""

from __future__ import annotations

from typing import Any

from ._engine import backend
from ._engine.chunked_cuda import WORKSPACE_BYTES
from ._engine.extensions import (
    cuda_architectures,
    cuda_module,
    cuda_reason,
    cuda_runtime,
    cuda_version,
    is_cuda_built,
)


def is_built() -> bool:
    """Whether the CUDA kernels were compiled and installed; they are not loaded for the answer.

    Example:
        >>> import flatcore
        >>> isinstance(flatcore.cuda.is_built(), bool)
        True
    """
    return is_cuda_built()


def is_available() -> bool:
    """Whether CUDA kernels were compiled and a device can run them; :func:`show_config` says why not.

    Without them CUDA tensors run on the PyTorch reference, on their own device, with the same results.

    Example:
        >>> import flatcore
        >>> flatcore.cuda.is_available() <= flatcore.cuda.is_built()
        True
    """
    return not cuda_reason()


def show_config() -> dict[str, Any]:
    """What was built for CUDA and what the module's own runtime finds here, as a dictionary.

    Returns:
        ``built``; ``available``; ``reason``, why no device can be used, or None (no driver, one that is too old for this
        module's runtime, kernels for other GPUs, a module that cannot be loaded); ``runtime`` and ``driver``, versions
        such as "13.0" (the driver's is the newest runtime that it serves), or None; ``devices``, their number;
        ``architectures``, those that were compiled; ``kernels``, the computations that have one, which
        ``flatcore.backend("native")`` takes; ``proven``, those of them whose tests have passed on a device, which
        ``"auto"`` takes; all others run on the reference; ``fused_classes`` (small heads, in one kernel) and
        ``workspace_bytes``, the bound of a larger head's buffers.

    Example:
        >>> import flatcore
        >>> config = flatcore.cuda.show_config()
        >>> (config["reason"] is None) == config["available"]
        True
    """
    runtime, driver, devices, _ = cuda_runtime()
    reason, built = cuda_reason(), is_built()
    module = cuda_module() if runtime else None
    return {
        "built": built,
        "available": not reason,
        "reason": reason or None,
        "runtime": cuda_version(runtime),
        "driver": cuda_version(driver),
        "devices": devices,
        "architectures": cuda_architectures() or None,
        "kernels": backend.CUDA_STEMS if built else (),
        "proven": backend.CUDA_PROVEN if built else (),
        "fused_classes": None if module is None else module.CUDA_FUSED_CLASSES,
        "workspace_bytes": WORKSPACE_BYTES if built else None,
    }
