"""The CUDA kernels compiled for the host, where no GPU is: their own sources over emulated threads (tests/emulator)."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import pybind11
import torch
from torch import Tensor

from flatcore._engine import chunked_cuda, extensions
from flatcore._engine import cuda as _native_cuda
from flatcore._engine.head import Head
from flatcore._engine.ops import kernels
from flatcore._engine.reduction import Reduction

ROOT = Path(__file__).parents[1]
ORDERS = {"forwards": 0, "backwards": 1, "shuffled": 2}


@functools.cache
def module() -> ModuleType:
    """Compile once a session (10 s) and import."""
    return _compiled()


@functools.cache
def watched_module() -> ModuleType:
    """The same with every load and store of the kernels handed to tests/emulator/traffic.cpp."""
    # types of its own: both modules may be loaded
    return _compiled("-fsanitize=thread", '-DPYBIND11_COMPILER_TYPE="watched"')


def _compiled(*watching: str) -> ModuleType:
    folder = Path(tempfile.mkdtemp(prefix="flatcore_emulator_"))
    sources = [*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "tests/emulator/emulator.cpp"]
    sources += [
        ROOT / "csrc/bind" / f"{name}.cpp"
        for name in ("cuda", "cuda_head", "cuda_head_measure", "exchange", "head_problem")
    ]
    includes = [ROOT / "tests/emulator", ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    if watching:
        sources.append(ROOT / "tests/emulator/traffic.cpp")
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=gnu++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += ['-DFLATCORE_CUDA_ARCHITECTURES="host"', *(f"-I{path}" for path in includes)]

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.stem}_{source.suffix[1:]}.o")
        done = subprocess.run(
            [
                compiler,
                *flags,
                *(watching if source.suffix == ".cu" else watching[1:]),
                "-x",
                "c++",
                "-c",
                str(source),
                "-o",
                target,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    shared = folder / f"cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler, "-shared", *objects, "-o", str(shared)], check=True)
    name = (
        "watched.cuda_emulated" if watching else "cuda_emulated"
    )  # a module of the same name would be the first again
    specification = importlib.util.spec_from_file_location(name, shared)
    assert specification is not None and specification.loader is not None
    found = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(found)
    return extensions._connected(found)


def _half_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """What the library does on a device; on the CPU it has no such product."""
    torch.mm(a.float(), b.float(), out=out)


def _add_half_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    out.addmm_(a.float(), b.float())


@contextmanager
def emulated(order: str = "forwards") -> Iterator[None]:
    """Run the CUDA path, its Python and its kernels, on CPU tensors; ``order`` of the threads between barriers."""
    core = module()
    core.set_order(ORDERS[order])
    with ExitStack() as stack:
        for owner, name, value in (
            (_native_cuda, "cuda_module", lambda: core),
            (_native_cuda, "stream", lambda x: (0, 0)),
            (chunked_cuda, "half_product", _half_product),
            (chunked_cuda, "add_half_product", _add_half_product),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(kernels.KERNELS, cpu=_native_cuda))
        yield


def _moved(x: object) -> object:
    if isinstance(x, (Head, Reduction)):
        return x._make(map(_moved, x))
    return moved(x, torch.device("cuda")) if isinstance(x, Tensor) else x


def moved(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, with its strides, and the gap between the start of its memory and its first element."""
    base = torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage()).to(device, copy=True)
    return base.as_strided(x.shape, x.stride(), x.storage_offset())


class Moved:
    """The kernels of a CUDA device for CPU tensors: moved there, and the results back."""

    def __getattr__(self, name: str):
        function = getattr(_native_cuda, name)

        def call(*arguments):
            results = function(*map(_moved, arguments))
            if isinstance(results, Tensor):
                return results.cpu()
            return tuple(x.cpu() if isinstance(x, Tensor) else x for x in results)

        return call


@contextmanager
def on_device() -> Iterator[None]:
    """Run every call on the first CUDA device, whatever the tensors' device."""
    with mock.patch.dict(kernels.KERNELS, cpu=Moved()):
        yield


def cuda_kernels():
    """The CUDA path for CPU tensors: on a device if there is one, otherwise emulated."""
    return on_device() if torch.cuda.is_available() else emulated()
