"""The implementations under test: each by force, each proved to have run."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import emulation
import pytest
import torch

import flatcore
from flatcore import _backend, _native

TARGETS = ("baseline", "avx2", "avx512")
CUDA = ("cuda-fused", "cuda-chunked")
"""The CUDA path: on a GPU where there is one, otherwise its kernels over emulated threads."""
PATHS = ("reference", *(f"{kind}-{target}" for kind in ("fused", "chunked") for target in TARGETS), *CUDA)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that turn an absence into a failure."""
    group = parser.getgroup("flatcore")
    group.addoption("--require-browser", action="store_true", help="fail, instead of skip, without headless Chromium")
    group.addoption("--require-cuda", action="store_true", help="fail, instead of skip, where no CUDA kernel can run")
    group.addoption("--emulate-all", action="store_true", help="run every CUDA case over emulated threads, not 1 in 4")
    group.addoption("--require-nvcc", action="store_true", help="fail, instead of skip, where CUDA cannot be compiled")
    group.addoption(
        "--require-integrations", action="store_true", help="fail, instead of skip, without their libraries"
    )
    group.addoption("--require-native", action="store_true", help="refuse to start without the compiled extension")
    group.addoption(
        "--require-target",
        action="append",
        default=[],
        choices=TARGETS,
        metavar="NAME",
        help=f"fail, instead of skip, where this CPU target cannot run ({', '.join(TARGETS)}); may be repeated",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse at once, so that a run that expects the kernels never passes without them."""
    if config.getoption("--require-cuda") and not flatcore.cuda.is_available():
        raise pytest.UsageError(f"--require-cuda: no CUDA kernel can run: {flatcore.cuda.show_config()['reason']}")
    if config.getoption("--require-native") and not _backend.is_native_built():
        raise pytest.UsageError("--require-native: flatcore was installed without its compiled extension")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the cases on emulated threads keep one in four, chosen by name: all take about ten minutes."""
    if torch.cuda.is_available() or config.getoption("--emulate-all"):
        return
    kept, left = [], []
    for item in items:
        given = getattr(getattr(item, "callspec", None), "params", {})
        emulated = given.get("path") in CUDA or given.get("target") == "cuda"
        (left if emulated and zlib.crc32(item.nodeid.encode()) % 4 else kept).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def pytest_report_header() -> str:
    """Say which kernels this run can reach."""
    config = flatcore.show_config()
    return f"flatcore: extension {config['extension']}, CPU targets {', '.join(config['cpu_targets']) or 'none'}"


def _require(target: str, config: pytest.Config) -> None:
    """Skip where the processor lacks the target; fail where it was required, or where nothing was compiled."""
    if not _backend.is_native_built():
        pytest.fail("the compiled extension is absent, so this path could not be tested", pytrace=False)
    if target not in flatcore.show_config()["cpu_targets"]:
        message = f"CPU target {target} is not compiled or not supported by this processor"
        if target in config.getoption("--require-target"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: on problems this small a second one mostly spins (2x the time on a busy machine).

    Other numbers of threads have tests of their own, in test_properties.py.
    """
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, one_thread: None) -> Iterator[str]:
    """Name of the path that head_metrics is forced on; after the test the library must say that it ran."""
    name: str = request.param
    if name == "reference":
        with flatcore.backend("reference"):
            _native.last_path = None
            yield name
            assert flatcore.show_config()["last_path"] is None, "a native kernel ran under backend('reference')"
        return
    if name in CUDA:
        # small heads as they come; the others have no fused kernel
        forced = "chunked" if name == "cuda-chunked" else None
        with flatcore.backend("native"), _native.forced(path=forced), emulation.cuda_kernels():
            _native.last_path = None
            yield name
            assert flatcore.show_config()["last_path"] in (forced or "fused", "chunked"), "another path ran"
        return
    kind, target = name.split("-")
    _require(target, request.config)
    with flatcore.backend("native"), _native.forced(path=kind, cpu=target):
        _native.last_path = None
        yield name
        config = flatcore.show_config()
        assert (config["last_path"], config["cpu_target"]) == (kind, target), "another path ran than the forced one"


@pytest.fixture(params=("reference", *TARGETS, "cuda"))
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """CPU target, or CUDA, that row_norms, which has one path, is forced on."""
    name: str = request.param
    if name == "reference":
        with flatcore.backend("reference"):
            yield name
        return
    if name == "cuda":
        with flatcore.backend("native"), emulation.cuda_kernels():
            yield name
        return
    _require(name, request.config)
    with flatcore.backend("native"), _native.forced(cpu=name):
        yield name
        config = flatcore.show_config()
        assert (config["cpu_backend"], config["cpu_target"]) == ("native", name), (
            "another target ran than the forced one"
        )
