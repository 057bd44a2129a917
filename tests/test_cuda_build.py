"""What can be said of the CUDA kernels without a GPU: they compile cleanly, spill nothing, and race nowhere.

Their results over emulated threads are tested with everything else: the path "cuda" of the other files.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import compiled
import emulation
import pytest
import torch
from torch import Tensor

import flatcore
from flatcore._check.tolerance import assert_same
from flatcore._engine import backend as _backend
from flatcore._engine.extensions import cuda_module

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.name for path in (ROOT / "csrc/cuda").glob("*.cu"))


@pytest.mark.needs("nvcc")
@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ("sm_80", "sm_90"))
@pytest.mark.parametrize("source", SOURCES)
def test_sources_compile_without_warnings_and_spill_nothing(source: str, architecture: str) -> None:
    built = compiled.build(source, architecture)
    assert built.returncode == 0, built.said
    assert "warning" not in built.said
    kernels = re.findall(r"Function properties for (\S+)\n\s+(.*)", built.said)
    text = (ROOT / "csrc/cuda" / source).read_text()
    headers = (ROOT / "csrc" / name for name in re.findall(r'#include "(.+)"', text))
    declared = any("__global__" in part for part in (text, *(header.read_text() for header in headers)))
    assert bool(kernels) == declared, "ptxas said nothing of the kernels"
    for kernel, properties in kernels:
        if "explicit_rows" in kernel:
            continue  # rare rows, one after the other: a handful of registers may go to memory
        assert properties == "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", kernel


# --------------------------------------------------------------------------------------------------- emulated threads
def test_halves_are_narrowed_as_torch_does() -> None:
    x = torch.cat([torch.rand(100_000), 2.0 ** -(40 * torch.rand(100_000)), torch.tensor([0.0, 1.0, -1.0, math.nan])])
    x = torch.cat([x, torch.arange(0, 1 << 11) * 2.0**-25, (1 + torch.arange(0, 1 << 12) * 2.0**-12) / 2])  # ties too
    x = torch.cat([x, x[: 1 << 12] * 2**15])  # pieces of q
    half, bhalf = torch.empty(2, len(x), dtype=torch.int16)
    emulation.module().narrow_halves(x.data_ptr(), half.data_ptr(), bhalf.data_ptr(), len(x))
    for bits, dtype in ((half, torch.float16), (bhalf, torch.bfloat16)):
        torch.testing.assert_close(bits.view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_halves_are_widened_exactly() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    half, bhalf = torch.empty(2, 1 << 16, dtype=torch.float64)
    emulation.module().widen_halves(bits.data_ptr(), half.data_ptr(), bhalf.data_ptr(), 1 << 16)
    for got, dtype in ((half, torch.float16), (bhalf, torch.bfloat16)):
        torch.testing.assert_close(got, bits.view(dtype).double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", ("barrier", "shuffle", "race", "none"))
def test_the_emulator_sees_what_is_wrong(case: str) -> None:
    """A barrier or a shuffle that some threads miss is an error; a race's result depends on the order of the threads."""
    core = emulation.module()
    found = []
    for order in emulation.ORDERS.values():
        core.set_order(order)
        if case in ("barrier", "shuffle"):
            with pytest.raises(RuntimeError, match="was not reached by all threads"):
                core.planted(case)
        else:
            found.append(core.planted(case))
    core.set_order(0)
    assert (len(set(found)) > 1) == (case == "race")


@pytest.mark.parametrize("order", emulation.ORDERS)
@pytest.mark.parametrize(
    ("N", "D", "C", "dtype"),
    (
        (37, 130, 10, torch.float32),
        (9, 33, 32, torch.bfloat16),
        (5, 40, 1100, torch.float32),
        (6, 20, 90, torch.float16),
    ),
)
def test_no_result_depends_on_the_order_of_the_threads(N: int, D: int, C: int, dtype: torch.dtype, order: str) -> None:
    g = torch.Generator().manual_seed(C)
    features, weight = torch.randn(N, D, generator=g).to(dtype), torch.randn(C, D, generator=g).to(dtype)
    weight[1] = weight[0]  # rows done from explicit differences
    weight[C // 2 :: 7] = weight[3]  # shares that come together from all warps
    target = torch.arange(N) % C

    def run() -> tuple[Tensor, ...]:
        x, w = features.clone().requires_grad_(), weight.clone().requires_grad_()
        value = flatcore.relative_flatness(x, w, measure="neuronwise", log=True)
        norm = flatcore.feature_gradient_norms(x, w, target, ord=1, reduction="mean")
        logits = (features.float() @ weight.float().T).to(dtype)
        return (
            value.detach(), *torch.autograd.grad(value + norm, (x, w)), flatcore.row_norms(logits),
            flatcore.unmasked_cross_entropy(logits, target, reduction="none"),
            *(y for y in flatcore.head_metrics(features, weight, target) if y is not None),
        )  # fmt: skip

    with flatcore.backend("native"):
        with emulation.emulated():
            want = run()
        with emulation.emulated(order):
            got = run()
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same(f"result {i}", a, b)


def test_what_is_moved_to_a_device_keeps_its_strides_and_its_gap() -> None:
    """A copy that is compacted on its way would not show the kernels what a user has."""
    whole = torch.arange(60.0).reshape(5, 12)
    for x in (whole, whole[1:, 3::2], whole.T[2:], whole[:1].expand(4, 12), whole[:0]):
        got = emulation.moved(x, torch.device("cpu"))
        assert (got.stride(), got.storage_offset(), got.shape) == (x.stride(), x.storage_offset(), x.shape)
        assert torch.equal(got, x) and got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


# ----------------------------------------------------------------------------------------------------------- the build
def configure(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run CMake on cuda.cmake alone, with a PATH of its own."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(alone LANGUAGES CXX)\n"
        f"set(CMAKE_CURRENT_SOURCE_DIR {ROOT})\ninclude({ROOT}/cmake/cuda.cmake)\n"
    )
    return subprocess.run(
        [str(shutil.which("cmake")), "-S", str(tmp_path), "-B", str(tmp_path / "build"), *options],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)} | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What CMake wrote, without the breaks of its lines."""
    return " ".join((done.stdout + done.stderr).split())


def program(path: Path, script: str) -> None:
    """Put a program in a folder of its own."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


WITHOUT_NVCC = "-DCMAKE_CUDA_COMPILER=NOTFOUND"


@pytest.mark.needs("cmake")
def test_on_without_nvcc_says_what_to_install(tmp_path: Path) -> None:
    if Path("/usr/bin/nvcc").exists():
        pytest.skip("nvcc lies beside the compiler and cannot be hidden")
    done = configure(tmp_path, "-DFLATCORE_CUDA=ON", WITHOUT_NVCC)
    assert done.returncode != 0
    assert "FLATCORE_CUDA=ON needs nvcc, which was not found: install the CUDA toolkit" in said(done)


@pytest.mark.needs("cmake")
@pytest.mark.parametrize("driver", (False, True))
def test_auto_without_nvcc_warns_where_there_is_a_driver(driver: bool, tmp_path: Path) -> None:
    if not driver and (Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi")):
        pytest.skip("this machine has a driver, which cannot be hidden")
    if driver:
        program(tmp_path / "driver/nvidia-smi", "echo 9.0")
    done = configure(tmp_path, "-DFLATCORE_CUDA=AUTO", WITHOUT_NVCC, PATH=f"{tmp_path}/driver:/usr/bin:/bin")
    assert done.returncode == 0 and "CUDA kernels: OFF" in done.stdout, done.stderr
    warned = "this machine has an NVIDIA driver but no nvcc, so the CUDA kernels are NOT built" in said(done)
    assert warned == driver and ("FLATCORE_CUDA=ON FLATCORE_NVCC=pypi pip install ." in said(done)) == driver
    # in one line, to be copied
    assert warned == ("\n    FLATCORE_CUDA=ON FLATCORE_NVCC=pypi pip install .\n" in done.stdout + done.stderr)
    quiet = configure(tmp_path, "-DFLATCORE_CUDA=OFF", PATH=f"{tmp_path}/driver:/usr/bin:/bin")
    assert quiet.returncode == 0 and "NVIDIA" not in said(quiet)


@pytest.mark.needs("cmake")
def test_nvcc_from_pypi_where_it_is_not_installed(tmp_path: Path) -> None:
    options = "-DFLATCORE_CUDA=ON", "-DFLATCORE_NVCC=pypi", "-DPython_EXECUTABLE=/usr/bin/python3"
    done = configure(tmp_path, *options)
    assert done.returncode != 0
    assert "FLATCORE_NVCC=pypi needs the package nvidia-cuda-nvcc" in said(done)


@pytest.mark.needs("cmake")
def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DFLATCORE_CUDA=MAYBE")
    assert done.returncode != 0 and "must be AUTO, ON or OFF, not 'MAYBE'" in said(done)


DEFAULT = "75-virtual;80-real;90-real;90-virtual"


@pytest.mark.needs("cmake")
@pytest.mark.parametrize(
    ("asked", "gpus", "built"),
    (
        ("", "", DEFAULT),
        ("", "9.0", "90-real;90-virtual"),
        ("", "8.6\n8.6\n9.0", "86-real;90-real;90-virtual"),
        ("", "8.0\n12.9", "80-real;80-virtual"),  # this nvcc knows no 12.9: PTX serves it
        ("", "6.1", DEFAULT),
        ("", "N/A\nNo devices were found", DEFAULT),
        ("80-real;90-real", "7.5", "80-real;90-real;90-virtual"),
        ("100-real;90-virtual", "", "100-real;90-virtual;100-virtual"),
        ("90", "", "90"),
        ("80-virtual", "", "80-virtual"),
        ("90a-real", "", "90a-real"),
        ("native", "", "native"),
    ),
)
def test_which_architectures_are_built(asked: str, gpus: str, built: str, tmp_path: Path) -> None:
    """The highest is there as PTX too; without a GPU in the machine a few serve all."""
    program(tmp_path / "bin/nvidia-smi", f"printf '{gpus}'")
    program(tmp_path / "bin/nvcc", "printf 'compute_75\ncompute_80\ncompute_86\ncompute_90\ncompute_100\n'")
    text = (ROOT / "cmake/cuda.cmake").read_text()
    (function,) = re.findall("^set.FLATCORE_DEFAULT.*$", text, re.MULTILINE)
    function += "\n" + text[text.index("function(flatcore_architectures") : text.index("if(FLATCORE_WITH_CUDA)")]
    (tmp_path / "script.cmake").write_text(
        f"cmake_minimum_required(VERSION 3.25)\nset(CMAKE_CUDA_COMPILER {tmp_path}/bin/nvcc)\n"
        f"set(FLATCORE_NVIDIA_SMI {tmp_path}/bin/nvidia-smi)\n{function}\n"
        'flatcore_architectures(found)\nmessage(STATUS "[${found}]")\n'
    )
    for options, environment in (([f"-DCMAKE_CUDA_ARCHITECTURES={asked}"], {}), ([], {"CUDAARCHS": asked})):
        done = subprocess.run(
            [str(shutil.which("cmake")), *options, "-P", str(tmp_path / "script.cmake")],
            env={"PATH": "/usr/bin:/bin"} | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert f"[{built}]" in said(done)


def test_what_the_module_says_of_itself() -> None:
    config = flatcore.cuda.show_config()
    if not flatcore.cuda.is_built():
        assert config["reason"] == "flatcore was built without CUDA" and config["architectures"] is None
        return
    assert config["available"] == flatcore.cuda.is_available() <= (config["devices"] > 0)
    assert re.fullmatch(r"\d+\.\d", config["runtime"])
    assert re.search(r"\d\d", config["architectures"])
    if not Path("/proc/driver/nvidia").exists():
        assert not config["available"] and config["reason"] and config["driver"] is None
    with flatcore.backend("native"):
        assert _backend.uses_native("cpu", "row_norms") is not None
        if not config["available"]:
            with pytest.raises(ValueError, match="no kernel of row_norms for device 'cuda'"):
                _backend.uses_native("cuda", "row_norms")
    with flatcore.backend("auto"):
        assert _backend.uses_native("cuda", "row_norms") == config["available"]


def test_the_module_does_not_ask_for_a_driver() -> None:
    """The runtime is linked statically: where no driver is, the import works."""
    for module in (_backend._core, cuda_module() if flatcore.cuda.is_built() else None):
        if module is not None:
            listed = subprocess.run(["ldd", module.__file__], capture_output=True, text=True, check=True).stdout
            assert "libcuda" not in listed
    subprocess.run([sys.executable, "-c", "import flatcore; flatcore.cuda.show_config()"], check=True)
