"""What can be said of the CUDA kernels without a GPU: they compile cleanly, spill nothing, and their blocks are right.

The blocks run on the host, lane after lane, with the merges in the device's order (csrc/cuda/lanes.h).
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from tolerance import assert_within, cotangent_tolerance, tolerance
from torch import Tensor

import flatcore
from flatcore import _backend

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.name for path in (ROOT / "csrc/cuda").glob("*.cu"))
CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
TILE = 16384  # kTile of row_norms.cu


@pytest.fixture(scope="module")
def nvcc(request: pytest.FixtureRequest) -> str:
    found = shutil.which("nvcc")
    if found is None:
        message = "nvcc is not installed: the CUDA sources were not compiled"
        (pytest.fail if request.config.getoption("--require-nvcc") else pytest.skip)(message)
    return found


@pytest.mark.parametrize("architecture", ("sm_80", "sm_90"))
@pytest.mark.parametrize("source", SOURCES)
def test_sources_compile_without_warnings_and_spill_nothing(
    source: str, architecture: str, nvcc: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror",
         "-Xptxas=-v", "-I", str(ROOT / "csrc"), '-DFLATCORE_CUDA_ARCHITECTURES="90"', "-c",
         str(ROOT / "csrc/cuda" / source), "-o", str(tmp_path / "object.o")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    kernels = re.findall(r"Function properties for (\S+)\n\s+(.*)", done.stderr)
    declared = re.search(r"__global__", (ROOT / "csrc/cuda" / source).read_text())
    assert bool(kernels) == bool(declared), "ptxas said nothing of the kernels"
    for kernel, properties in kernels:
        assert properties == "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", kernel


# --------------------------------------------------------------------------------------------------- blocks on the host
@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    shared = tmp_path_factory.mktemp("cuda") / "cuda_host.so"
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=gnu++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror",
         f"-I{ROOT / 'csrc'}", str(ROOT / "tests/cuda_host.cpp"), "-o", str(shared)],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(shared))


def norms(host: ctypes.CDLL, x: Tensor, tile: int) -> np.ndarray:
    """L1, L2, L-infinity (3, N) of (N, K), in tiles or (0) by one warp a row."""
    out = np.empty((x.shape[0], 3))
    i64 = ctypes.c_int64
    host.row_norms(
        ctypes.c_void_p(x.data_ptr()), CODES[x.dtype], i64(x.shape[0]), i64(x.stride(0)), i64(x.stride(1)),
        i64(x.shape[1]), i64(tile), ctypes.c_void_p(out.ctypes.data),
    )  # fmt: skip
    return out.T


def check(host: ctypes.CDLL, x: Tensor, tile: int) -> None:
    for ord, got in zip((1, 2, math.inf), torch.tensor(norms(host, x, tile)), strict=True):
        truth = oracles.exact_row_norms(x, ord)
        with np.errstate(divide="ignore"):
            bound = tolerance("row_norm", truth, np.log(truth), torch.float64, terms=x.shape[1])
        if ord == math.inf:
            bound = type(bound)(0.0, 0.0)
        assert_within(f"ord {ord} of {tuple(x.shape)} {x.dtype}", got, truth, bound, torch.float64)


@pytest.mark.parametrize("dtype", CODES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("width", (1, 2, 3, 7, 8, 9, 31, 32, 33, 127, 128, 129, 1023, 1024))
@pytest.mark.parametrize("offset", (0, 1, 3))
def test_short_rows_on_the_host(host: ctypes.CDLL, width: int, dtype: torch.dtype, offset: int) -> None:
    whole = torch.randn(3, width + offset, dtype=torch.float64).to(dtype)
    whole[0, -1] = 40  # a tail that is dropped shows in every norm
    check(host, whole[:, offset:], 0)
    check(host, whole.T.contiguous().T[:, offset:], 0)  # column stride 3


@pytest.mark.parametrize("dtype", CODES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("width", (1025, TILE - 1, TILE, TILE + 1, 3 * TILE + 5))
def test_long_rows_on_the_host(host: ctypes.CDLL, width: int, dtype: torch.dtype) -> None:
    whole = torch.randn(2, width + 1, dtype=torch.float64).to(dtype)
    whole[0, -1] = 40
    check(host, whole[:, 1:], TILE)


@pytest.mark.parametrize("tile", (0, TILE))
@pytest.mark.parametrize("size", (1e200, 1e300, 1e160, 1e-160, 1e-200, 1e-300, 1e-308, 1e-320))
def test_squares_beyond_the_range_on_the_host(host: ctypes.CDLL, size: float, tile: int) -> None:
    check(host, torch.rand(2, 65, dtype=torch.float64) * size, tile)


@pytest.mark.parametrize("tile", (0, TILE))
@pytest.mark.parametrize("dtype", CODES, ids=lambda d: str(d).removeprefix("torch."))
def test_nan_and_infinity_on_the_host(host: ctypes.CDLL, dtype: torch.dtype, tile: int) -> None:
    x = torch.ones(5, 300, dtype=dtype)
    x[1, 299], x[2, 0], x[4, 7] = math.nan, -math.inf, math.inf
    x[4, 8] = math.nan
    x[3] = 0
    got = norms(host, x, tile)
    assert np.isnan(got[:, [1, 4]]).all()
    assert (got[:, 2] == math.inf).all() and (got[:, 3] == 0).all()
    np.testing.assert_array_equal(got[:, 0], [300, math.sqrt(300), 1])
    assert (norms(host, x[:, :0], 0) == 0).all()


LANES = (32, 256)
FLOATS = pytest.mark.parametrize("dtype", CODES, ids=lambda d: str(d).removeprefix("torch."))


def unmasked(
    host: ctypes.CDLL, z: Tensor, y: Tensor, lanes: int, ignore_index: int = -100
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log(1 - p_y), in float64, and the cotangent."""
    loss, log_scale = torch.empty(2, len(z), dtype=torch.float64)
    cotangent = torch.full(z.shape, 7.0, dtype=z.dtype)  # an entry that is not written shows
    i64, address = ctypes.c_int64, lambda x: ctypes.c_void_p(x.data_ptr())
    host.unmasked_cross_entropy(
        address(z), CODES[z.dtype], address(y), i64(len(z)), i64(z.stride(0)), i64(z.shape[1]), i64(ignore_index), lanes,
        address(loss), address(log_scale), address(cotangent),
    )  # fmt: skip
    return loss, log_scale, cotangent


def check_unmasked(host: ctypes.CDLL, z: Tensor, y: Tensor, lanes: int) -> None:
    loss, log_scale, cotangent = unmasked(host, z, y, lanes)
    truth = oracles.exact_cross_entropy(z, y)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32  # what the kernel rounds these to
    assert_within("loss", loss, truth["loss"], tolerance("loss", truth["loss"], truth["log_loss"], dtype))
    assert_within("log_scale", log_scale, truth["log_scale"], tolerance("log_scale", None, truth["log_scale"], dtype))
    assert_within("cotangent", cotangent, truth["cotangent"], cotangent_tolerance(z.dtype))


@FLOATS
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("classes", (2, 3, 7, 8, 9, 31, 32, 33, 255, 257, 1024, 3001))
@pytest.mark.parametrize("offset", (0, 3))
def test_unmasked_rows_on_the_host(
    host: ctypes.CDLL, classes: int, lanes: int, dtype: torch.dtype, offset: int
) -> None:
    g = torch.Generator().manual_seed(classes)
    whole = (4 * torch.randn(3, classes + offset, generator=g, dtype=torch.float64)).to(dtype)
    whole[0, -1] = 15
    check_unmasked(host, whole[:, offset:], torch.tensor([0, classes // 2, classes - 1]), lanes)


@FLOATS
@pytest.mark.parametrize("lanes", LANES)
def test_unmasked_confident_rows_on_the_host(host: ctypes.CDLL, lanes: int, dtype: torch.dtype) -> None:
    rows = []
    for gap in (0.0, 1.0, 17.0, 40.0, 104.0, 800.0, 10_000.0):
        row = torch.linspace(-3, 0, 20, dtype=torch.float64)
        row[1] = gap
        rows.append(row)
    for label in (1, 19, 0):
        check_unmasked(host, torch.stack(rows).to(dtype), torch.full((len(rows),), label), lanes)
    top = torch.finfo(dtype).max / 4
    z = torch.tensor([[0.0] * 9, [5.0] * 4 + [1.0] * 5, [top] + [-top] * 8, [-top] * 8 + [top]], dtype=dtype)
    check_unmasked(host, z, torch.tensor([3, 2, 4, 8]), lanes)


@FLOATS
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("classes", (3, 40))
def test_unmasked_edges_on_the_host(host: ctypes.CDLL, lanes: int, dtype: torch.dtype, classes: int) -> None:
    inf, nan = math.inf, math.nan
    z = torch.zeros(10, classes, dtype=dtype)
    y = torch.zeros(10, dtype=torch.int64)
    z[0, 2], z[1, 0], z[2, 2] = nan, nan, inf  # NaN beside the label, on it; infinity
    z[3] = -inf
    y[4], y[5] = classes, -1  # no classes
    y[6], z[6, 1] = -100, nan  # ignored, whatever the row holds
    z[7, 1:] = -inf  # the label is the only class
    z[8, 0] = -inf  # a masked label
    z[9, 1] = -inf  # a masked class beside it
    loss, log_scale, cotangent = unmasked(host, z, y, lanes)
    assert loss[:6].isnan().all() and log_scale[:6].isnan().all() and cotangent[:6].isnan().all()
    for n in (6, 7):
        assert (loss[n], log_scale[n]) == (0, -inf) and (cotangent[n] == 0).all()
    others = classes - 1
    assert (loss[8], log_scale[8]) == (inf, 0)
    assert cotangent[8, 0] == -1 and torch.allclose(
        cotangent[8, 1:].double(), torch.tensor(1 / others).double(), rtol=4e-3
    )
    assert loss[9].item() == pytest.approx(math.log(others), rel=1e-12)
    assert cotangent[9, 0] == -1 and cotangent[9, 1] == 0
    assert not cotangent[6:].isnan().any()


def test_halves_are_narrowed_as_torch_does(host: ctypes.CDLL) -> None:
    x = torch.cat([torch.rand(100_000), 2.0 ** -(40 * torch.rand(100_000)), torch.tensor([0.0, 1.0, -1.0, math.nan])])
    x = torch.cat([x, torch.arange(0, 1 << 11) * 2.0**-25, (1 + torch.arange(0, 1 << 12) * 2.0**-12) / 2])  # ties too
    half, bhalf = np.empty(len(x), np.uint16), np.empty(len(x), np.uint16)
    host.narrow_halves(
        ctypes.c_void_p(x.data_ptr()), *(ctypes.c_void_p(a.ctypes.data) for a in (half, bhalf)), ctypes.c_int64(len(x))
    )
    for bits, dtype in ((half, torch.float16), (bhalf, torch.bfloat16)):
        got = torch.tensor(bits.view(np.int16)).view(dtype)
        torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_every_lane_is_merged_once_and_told(host: ctypes.CDLL) -> None:
    out = np.zeros(3 * 256, np.int32)
    host.trace(ctypes.c_void_p(out.ctypes.data))
    # 8 warps of 31 merges and one warp over them; lanes that hold no warp's result add empty values
    assert out.reshape(256, 3).tolist() == [[0, 255, 8 * 31 + 31]] * 256


def test_halves_are_widened_exactly(host: ctypes.CDLL) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    half, bhalf = np.empty(1 << 16), np.empty(1 << 16)
    host.widen_halves(*(ctypes.c_void_p(a.ctypes.data) for a in (bits, half, bhalf)), ctypes.c_int64(1 << 16))
    np.testing.assert_array_equal(half, bits.view(np.float16).astype(np.float64))
    np.testing.assert_array_equal(bhalf, torch.tensor(bits.view(np.int16)).view(torch.bfloat16).double().numpy())


# ----------------------------------------------------------------------------------------------------------- the build
def configure(tmp_path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run CMake on cuda.cmake alone, with a PATH of its own."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(alone LANGUAGES CXX)\n"
        f"set(CMAKE_CURRENT_SOURCE_DIR {ROOT})\ninclude({ROOT}/cmake/cuda.cmake)\n"
    )
    return subprocess.run(
        [shutil.which("cmake") or "cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build"), *options],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)} | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_on_without_nvcc_says_what_to_install(tmp_path: Path) -> None:
    if Path("/usr/bin/nvcc").exists():
        pytest.skip("nvcc lies beside the compiler and cannot be hidden")
    done = configure(tmp_path, "-DFLATCORE_CUDA=ON", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "FLATCORE_CUDA=ON needs nvcc, which was not found: install the CUDA toolkit" in said
    done = configure(tmp_path, "-DFLATCORE_CUDA=AUTO", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert done.returncode == 0 and "CUDA kernels: OFF" in done.stdout, done.stderr


def test_nvcc_from_pypi_where_it_is_not_installed(tmp_path: Path) -> None:
    options = "-DFLATCORE_CUDA=ON", "-DFLATCORE_NVCC=pypi", "-DPython_EXECUTABLE=/usr/bin/python3"
    done = configure(tmp_path, *options)
    assert done.returncode != 0
    assert "FLATCORE_NVCC=pypi needs the package nvidia-cuda-nvcc" in " ".join(done.stderr.split())


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DFLATCORE_CUDA=MAYBE")
    assert done.returncode != 0 and "must be AUTO, ON or OFF, not 'MAYBE'" in " ".join(done.stderr.split())


def test_what_the_module_says_of_itself(request: pytest.FixtureRequest) -> None:
    config = flatcore.cuda.show_config()
    if not flatcore.cuda.is_built():
        if request.config.getoption("--require-nvcc"):
            pytest.fail("the module was built without CUDA")
        assert config["reason"] == "flatcore was built without CUDA" and config["architectures"] is None
        return
    assert config["available"] == (config["devices"] > 0) == flatcore.cuda.is_available()
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
        assert not _backend.uses_native("cuda", "row_norms") or "row_norms" in config["proven"]


def test_the_module_does_not_ask_for_a_driver() -> None:
    """The runtime is linked statically: where no driver is, the import works."""
    assert _backend._core is not None
    listed = subprocess.run(["ldd", _backend._core.__file__], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in listed
    subprocess.run([sys.executable, "-c", "import flatcore; flatcore.cuda.show_config()"], check=True)
