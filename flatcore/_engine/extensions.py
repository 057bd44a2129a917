"""The compiled modules: the CPU's, loaded at import, and that of CUDA devices, loaded when one is first asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch  # before _core: one OpenMP runtime, torch's, serves both

try:
    from .. import _core
except ImportError as error:
    if "_core" not in str(error) or "undefined symbol" in str(error):
        raise
    _core = None  # type: ignore[assignment]

ABI = 10
"""Counts the changes of what Python hands the modules: call signatures, and the options that they read of a head by name.

The build reads it here, for the binaries must agree."""


def _checked(module: ModuleType) -> ModuleType:
    if module.ABI != ABI:
        raise ImportError(
            f"flatcore: the compiled extension {module.__file__} speaks ABI {module.ABI}, these sources ABI {ABI}: "
            "install flatcore again (pip install .)"
        )
    return module


def _connected(module: ModuleType) -> ModuleType:
    """Let a module read torch's tensors by itself, through DLPack's table of C functions, where this torch has one.

    A tensor's address, strides, dtype, device and storage, asked for one by one, take 3 us, from C 0.3.
    """
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if table is not None:
        module.connect(table, torch.Tensor, torch.nn.Parameter)
    return module


if _core is not None:
    _connected(_checked(_core))


@functools.cache
def is_cuda_built() -> bool:
    """Whether the module with CUDA kernels lies beside the CPU's; it is not loaded."""
    return importlib.util.find_spec("flatcore._cuda") is not None


@functools.cache  # a failure is not kept
def cuda_module() -> Any:
    """Load the module with CUDA kernels.

    Raises:
        ImportError: it was not built, speaks another ABI or cannot be loaded.
    """
    if not is_cuda_built():
        raise ImportError("flatcore was built without CUDA")
    return _connected(_checked(importlib.import_module("flatcore._cuda")))


def cuda_version(number: int) -> str | None:
    """CUDA's own form: 13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def cuda_architectures() -> str:
    """The architectures that were compiled, as CMake names them; "" for none."""
    return str(cuda_module().cuda_architectures()) if cuda_runtime()[0] else ""


def cuda_runtime() -> tuple[int, int, int, str]:
    """Runtime version, driver version, devices, and why none can be used (empty if one may be)."""
    try:
        found: tuple[int, int, int, str] = cuda_module().cuda_runtime()
    except ImportError as error:
        return 0, 0, 0, str(error) if not is_cuda_built() else f"flatcore._cuda could not be loaded: {error}"
    return found


_usable: set[int] = set()  # devices that were found to run the kernels; one that does not is asked again


def cuda_reason(index: int | None = None) -> str:
    """Why the kernels cannot run on this device, or on any; empty if they can.

    A device that the process works on is asked for a kernel. Of another one only its compute capability is compared: asking
    would take 500 MB of its memory.
    """
    if index in _usable:
        return ""
    runtime, driver, devices, reason = cuda_runtime()
    if reason and runtime and not driver:
        return "no NVIDIA driver found"
    if reason and driver < runtime // 1000 * 1000:  # a driver serves every runtime of its own major version
        return (
            f"the NVIDIA driver is too old: it serves CUDA {cuda_version(driver)}, flatcore was built with "
            f"{cuda_version(runtime)} ({reason}); update it, or build with an older toolkit"
        )
    if reason:
        return reason
    if index is None:
        reasons = [cuda_reason(each) for each in range(devices)]
        return "" if "" in reasons else reasons[0]
    capability, active, refused = cuda_module().cuda_device(index)
    built = cuda_architectures()
    if capability and not has_image(built, capability):
        return (
            f"its kernels were built for {built}, this GPU is sm_{capability}: install flatcore again on this machine, or "
            f"with CUDAARCHS={capability}"
        )
    if refused:
        return f"device {index} (sm_{capability}) runs no kernel of this build ({built}): {refused}"
    if active:
        _usable.add(index)
    return ""


_BUILD = "FLATCORE_CUDA=ON pip install . in its source folder (FLATCORE_NVCC=pypi before it brings nvcc)"


def cuda_remedy(reason: str) -> str:
    """The way out of what :func:`cuda_reason` says, a sentence without its full stop."""
    if not is_cuda_built():
        return f"To build its CUDA kernels: {_BUILD}"
    if "no NVIDIA driver" in reason:
        return "Install the NVIDIA driver of this GPU"
    if "driver is too old" in reason:
        build = "CUDACXX=<its bin folder>/nvcc FLATCORE_CUDA=ON pip install . in flatcore's source folder"
        return f"To build with that toolkit: {build}"
    if (
        "could not be loaded" in reason
        or "kernels were built for" in reason
        or "runs no kernel of this build" in reason
    ):
        return f"To build them for this device: {_BUILD}"
    return "To see what the driver finds: nvidia-smi (CUDA_VISIBLE_DEVICES may hide a device)"


def _architectures(built: str) -> Iterator[tuple[int, str, str] | None]:
    """Number, suffix and kind of each architecture, as CMake names them; None for "native" and the like.

    A plain number is machine code and PTX.
    """
    for name in built.replace(";", " ").split():
        found = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", name)
        yield None if found is None else (int(found[1]), found[2], found[3] or "")


def has_machine_code(built: str, capability: int) -> bool:
    """Whether architectures, as CMake names them, have code that a GPU runs as it is; False where that is not known.

    Code of 8.0 runs on 8.x, of 8.6 on those from 8.6 on, of 10.0f on 10.x, of 9.0a on 9.0 alone.
    """
    for known in _architectures(built):
        if known is None or known[2] == "-virtual":
            continue
        number, suffix, _ = known
        if number == capability or (suffix != "a" and number // 10 == capability // 10 and number < capability):
            return True
    return False


def has_image(built: str, capability: int) -> bool:
    """Whether they serve a GPU, as they are or by PTX, which the driver compiles for it; True where that is not known.

    PTX serves every later GPU, that of 10.0f 10.x, that of 9.0a 9.0 alone.
    """
    if has_machine_code(built, capability):
        return True
    for known in _architectures(built):
        if known is None:
            return True
        number, suffix, kind = known
        later = not suffix or (suffix == "f" and number // 10 == capability // 10)
        if kind != "-real" and (number == capability or (later and number < capability)):
            return True
    return False
