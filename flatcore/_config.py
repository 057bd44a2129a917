"""What was built, what is usable and what would run."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from . import cuda
from ._engine import backend, paths, tiles

__version__ = metadata.version("flatcore")


def show_config() -> dict[str, Any]:
    """Build and run-time configuration, as a dictionary.

    Returns:
        ``version``; ``backend`` (the setting) and ``cpu_backend`` (what it means for CPU tensors: ``"native"`` or
        ``"reference"``); ``native_built`` (False after ``FLATCORE_NATIVE=OFF``: everything runs on the reference);
        ``cpu_targets`` (compiled and supported here), ``cpu_target`` (the one that runs);
        ``cuda_built``, ``cuda_available``; ``path`` (``"auto"``, or the forced one) and ``last_path`` (how the last native
        call ran: ``"fused"``, ``"chunked"`` or None); ``fused_limits`` and ``workspace_bytes`` (what decides between
        them, and the bound of a chunk's buffers); ``threads``, ``torch``, ``compiler`` and ``extension`` (its file).

    Example:
        >>> import flatcore
        >>> flatcore.show_config()["workspace_bytes"]
        67108864
    """
    core = backend._core
    return {
        "version": __version__,
        "backend": backend.selected,
        "cpu_backend": "native" if core is not None and backend.selected != "reference" else "reference",
        "native_built": core is not None,
        "cpu_targets": tuple(core.cpu_targets()) if core is not None else (),
        "cpu_target": backend.describe_cpu_target(),
        "cuda_built": cuda.is_built(),
        "cuda_available": cuda.is_available(),
        "path": paths.forced_path or "auto",
        "last_path": paths.last_path,
        "fused_limits": {
            "classes": paths.FUSED_CLASSES,
            "classes_of_logits": paths.FUSED_CLASSES_OF_LOGITS,
            "weight_bytes": paths.FUSED_WEIGHT_BYTES,
        },
        "workspace_bytes": tiles.WORKSPACE_BYTES,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compiler": None if core is None else core.COMPILER,
        "extension": None if core is None else core.__file__,
    }
