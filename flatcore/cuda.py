"""What this build can do on a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._engine import backend, extensions, proof
from ._engine.chunked_cuda import WORKSPACE_BYTES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ._check.record import Check


def is_built() -> bool:
    """Whether the CUDA kernels were compiled and installed; they are not loaded for the answer.

    Example:
        >>> import flatcore
        >>> isinstance(flatcore.cuda.is_built(), bool)
        True
    """
    return extensions.is_cuda_built()


def is_available() -> bool:
    """Whether CUDA kernels were compiled and a device can run them; :func:`show_config` says why not.

    Without them CUDA tensors run on the PyTorch reference, on their own device, with the same results.

    Example:
        >>> import flatcore
        >>> flatcore.cuda.is_available() <= flatcore.cuda.is_built()
        True
    """
    return not extensions.cuda_reason()


def agree(group: ProcessGroup | None = None) -> None:
    """Let all ranks of a process group take the same kernels on their current devices: those that passed on every one.

    A collective call: every rank of the group makes it, once, after ``torch.distributed.init_process_group`` and
    ``torch.cuda.set_device``. Each checks its device where that has not been done; then what has failed on one has failed
    on all, and what one has not checked none takes. Without it ranks on one machine share a check and agree as far as
    their devices are of one model; ranks on several machines may take different kernels, whose results differ within the
    accuracy that is promised.

    Args:
        group: the process group; by default all ranks.

    Raises:
        ValueError: no process group was made.
        RuntimeError: a rank has no CUDA device.

    Example:
        >>> import flatcore, torch
        >>> if torch.distributed.is_initialized():
        ...     flatcore.cuda.agree()
    """
    from ._check import prove

    prove.agree(group)


def _check(index: int, may_run: bool) -> tuple[Check, Path | None] | None:
    """What the engine asks for; loaded where there is a device."""
    from ._check import prove

    return prove.first_use(index, may_run)


proof.checker = _check


def show_config() -> dict[str, Any]:
    """What was built for CUDA and what the module's own runtime finds here, as a dictionary.

    Returns:
        ``built``; ``available``; ``reason``, why no device can be used, or None (no driver, one that is too old for this
        module's runtime, kernels for other GPUs, a module that cannot be loaded); ``runtime`` and ``driver``, versions
        such as "13.0" (the driver's is the newest runtime that it serves), or None; ``devices``, their number;
        ``architectures``, those that were compiled; ``kernels``, the computations that have one, which
        ``flatcore.backend("native")`` takes; ``checked``, what is known
        of them on each device, by its name such as "cuda:0": ``state`` ("unchecked", "passed", "failed" or "could not
        check"), ``reason`` (why it could not), ``stems`` (for each computation its paths, "-" where there is one:
        "passed", which ``"auto"`` takes, "unchecked" or "failed: " and how, which run on the reference) and ``file``,
        where the verdict is kept, or None; ``fused_classes`` (small heads, in one kernel) and ``workspace_bytes``, the
        bound of a larger head's buffers. Nothing is checked by asking, and a device that this process does not use yet
        is not woken: it is "unchecked" here.

    Example:
        >>> import flatcore
        >>> config = flatcore.cuda.show_config()
        >>> (config["reason"] is None) == config["available"]
        True
    """
    runtime, driver, devices, _ = extensions.cuda_runtime()
    reason, built = extensions.cuda_reason(), is_built()
    module = extensions.cuda_module() if runtime else None
    return {
        "built": built,
        "available": not reason,
        "reason": reason or None,
        "runtime": extensions.cuda_version(runtime),
        "driver": extensions.cuda_version(driver),
        "devices": devices,
        "architectures": extensions.cuda_architectures() or None,
        "kernels": backend.CUDA_STEMS if built else (),
        "checked": {f"cuda:{index}": proof.describe(index) for index in range(devices)},
        "fused_classes": None if module is None else module.CUDA_FUSED_CLASSES,
        "workspace_bytes": WORKSPACE_BYTES if built else None,
    }
