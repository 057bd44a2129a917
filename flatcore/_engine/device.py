"""What is asked of torch and the driver about CUDA devices: here alone, so that a test may put a device in its place."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def place(x: Tensor) -> tuple[str, int]:
    """Type of the tensor's device, and which one of it."""
    if x.is_cpu:
        return "cpu", -1
    device = x.device
    return device.type, device.index or 0


def count() -> int:
    """Number of devices that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def current() -> int:
    """The index of this thread's device."""
    return torch.cuda.current_device()


def is_awake() -> bool:
    """Whether this process works with CUDA already: a question to a device that sleeps would wake it, memory and all."""
    return bool(torch.cuda.is_initialized())


def name(index: int) -> str:
    """Its model."""
    return torch.cuda.get_device_name(index)


def capability(index: int) -> tuple[int, int]:
    """Compute capability."""
    major, minor = torch.cuda.get_device_capability(index)
    return int(major), int(minor)


def visible_name(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES calls this one device, whatever it calls it in this process.

    A name that is there already stays: a part of a device (MIG) has no other.
    """
    listed = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    mine = listed[index] if index < len(listed) else ""
    if mine.startswith(("GPU-", "MIG-")):
        return mine
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return f"GPU-{uuid}" if uuid else mine or str(index)


def driver() -> str:
    """Version of the driver, and of CUDA as far as it serves it."""
    serves = ""
    with contextlib.suppress(AttributeError, RuntimeError):
        serves = str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]
    try:
        said = re.search(r"\d+\.[\d.]+", Path("/proc/driver/nvidia/version").read_text())
    except OSError:  # not Linux, or its guest under Windows
        said = None
    return f"{said[0] if said else ''} {serves}".strip()


def cublas() -> str:
    """Version of the cuBLAS that torch has loaded, or "" where that cannot be told."""
    major = (torch.version.cuda or "").partition(".")[0]
    try:
        library: Any = ctypes.CDLL(f"libcublas.so.{major}", mode=getattr(os, "RTLD_NOLOAD", 0))
        parts = [ctypes.c_int(0) for _ in range(3)]
        for which, part in enumerate(parts):
            library.cublasGetProperty(which, ctypes.byref(part))
    except (OSError, AttributeError):
        return ""
    return ".".join(str(part.value) for part in parts)


def is_capturing(index: int) -> bool:
    """Whether the current stream is being captured into a graph, the device's or the current device's."""
    if torch.cuda.is_current_stream_capturing():
        return True
    with torch.cuda.device(index):
        return torch.cuda.is_current_stream_capturing()


def is_tracing() -> bool:
    """Whether this call is traced, not made."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_shared() -> bool:
    """Whether processes share their devices through MPS, where one's fault ends its neighbours."""
    return (Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps") / "control").exists()


def wait() -> None:
    """Wait for all work on the current device; not in a capture, where nothing may."""
    if not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()


def limit_memory(size: int) -> None:
    """Let this process's tensors take at most so many bytes of the first device."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), 0)
