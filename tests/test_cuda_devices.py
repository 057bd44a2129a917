"""The module of the CUDA kernels and the devices it finds: loaded when asked for, and why one cannot be used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulation
import pytest
import torch
from cards import plugged_in, rows

import flatcore
from flatcore._check import prove
from flatcore._check.record import Check
from flatcore._engine import cuda as native_cuda
from flatcore._engine import extensions

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------------------------ the module
@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Put a module of this text in the place of the installed one."""

    def forget() -> None:
        extensions.is_cuda_built.cache_clear()
        extensions.cuda_module.cache_clear()

    def install(text: str) -> None:
        (tmp_path / "_cuda.py").write_text(f"def connect(*tables): return False\n{text}")
        monkeypatch.setattr(flatcore, "__path__", [str(tmp_path)])
        monkeypatch.delitem(sys.modules, "flatcore._cuda", raising=False)
        monkeypatch.delattr(flatcore, "_cuda", raising=False)
        monkeypatch.setattr(extensions, "_usable", set())
        forget()

    yield install
    monkeypatch.undo()
    sys.modules.pop("flatcore._cuda", None)
    forget()


def test_a_module_that_cannot_be_loaded_is_a_reason(installed: Callable[[str], None]) -> None:
    installed("raise ImportError('libstdc++.so.6: version GLIBCXX_3.4.30 not found')")
    config = flatcore.cuda.show_config()
    assert flatcore.cuda.is_built() and not flatcore.cuda.is_available() and config["architectures"] is None
    assert config["reason"] == "flatcore._cuda could not be loaded: libstdc++.so.6: version GLIBCXX_3.4.30 not found"
    assert flatcore.show_config()["cuda_available"] is False


def test_a_module_of_other_sources_is_a_reason(installed: Callable[[str], None]) -> None:
    installed("ABI = 1")
    reason = flatcore.cuda.show_config()["reason"]
    assert "_cuda.py speaks ABI 1, these sources ABI" in reason and "install flatcore again (pip install .)" in reason


def test_work_on_the_cpu_does_not_load_it(tmp_path: Path) -> None:
    (tmp_path / "flatcore").mkdir()
    (tmp_path / "flatcore/_cuda.py").write_text("raise RuntimeError('it was loaded')")
    script = """
        import sys, torch, flatcore
        flatcore.relative_flatness(torch.randn(4, 3), torch.randn(2, 3, requires_grad=True)).backward()
        flatcore.row_norms(torch.randn(2, 5))
        assert flatcore.cuda.is_built() and "flatcore._cuda" not in sys.modules
        try:
            flatcore.cuda.is_available()
        except RuntimeError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in script.splitlines())],
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "it was loaded\n", done.stderr


@pytest.mark.parametrize(
    ("driver", "said", "wanted"),
    (
        (0, "CUDA driver version is insufficient for CUDA runtime version", "no NVIDIA driver found"),
        (12020, "CUDA driver version is insufficient for CUDA runtime version",
         "the NVIDIA driver is too old: it serves CUDA 12.2, flatcore was built with 13.0 (CUDA driver version is "
         "insufficient for CUDA runtime version); update it, or build with an older toolkit"),
        (13010, "no CUDA-capable device is detected", "no CUDA-capable device is detected"),
    ),
)  # fmt: skip
def test_why_no_device_can_be_used(driver: int, said: str, wanted: str, installed: Callable[[str], None]) -> None:
    installed(
        f"ABI = {extensions.ABI}\nCUDA_FUSED_CLASSES = 32\ndef connect(*arguments): ...\n"
        f"def cuda_runtime():\n    return 13000, {driver}, 0, {said!r}\n"
        "def cuda_architectures():\n    return '90-real'\n"
    )
    config = flatcore.cuda.show_config()
    assert config["reason"] == wanted and not config["available"]


# ----------------------------------------------------------------------------------------------------------- the devices
@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The emulated devices, of a module that was built for 8.0 and, as PTX, 9.0."""
    core = emulation.module()
    module = SimpleNamespace(
        cuda_runtime=core.cuda_runtime,
        cuda_device=core.cuda_device,
        cuda_architectures=lambda: "80-real 90-virtual",
        CUDA_FUSED_CLASSES=core.CUDA_FUSED_CLASSES,
    )
    monkeypatch.setattr(extensions, "cuda_module", lambda: module)
    monkeypatch.setattr(extensions, "_usable", set())
    yield core.devices
    core.devices.plant(0)
    core.devices.current = 0
    for index, active in enumerate((True, False)):
        core.devices.set(index, active, 80)


def test_a_gpu_without_code_says_what_was_built(devices: Any) -> None:
    devices.set(0, True, 75)
    devices.set(1, False, 70)
    reason = flatcore.cuda.show_config()["reason"]
    assert reason.startswith("its kernels were built for 80-real 90-virtual, this GPU is sm_75: install flatcore again")
    assert "CUDAARCHS=75" in reason and not flatcore.cuda.is_available()
    assert "this GPU is sm_70" in extensions.cuda_reason(1)
    with flatcore.backend("native"), pytest.raises(ValueError, match="this GPU is sm_75"):
        flatcore._engine.backend.uses_native("cuda", "row_norms", 0)
    devices.set(1, False, 89)  # one that fits is enough to be available
    assert flatcore.cuda.is_available() and extensions.cuda_reason(0)


def test_a_failure_is_asked_again_and_a_success_kept(devices: Any) -> None:
    devices.set(1, True, 89)
    devices.plant(209)
    for _ in range(2):
        assert extensions.cuda_reason(1) == (
            "device 1 (sm_89) runs no kernel of this build (80-real 90-virtual): "
            "no kernel image is available for execution on the device"
        )
    devices.plant(0)
    assert extensions.cuda_reason(1) == ""
    devices.plant(209)
    asked = devices.queries
    assert extensions.cuda_reason(1) == "" and devices.queries == asked


def test_a_device_that_nobody_works_on_is_not_started(devices: Any) -> None:
    asked = devices.queries
    assert extensions.cuda_reason(1) == "" and flatcore.cuda.is_available()
    assert devices.active == (True, False) and devices.queries <= asked + 1  # of the first, which has tensors
    assert devices.current == 0


@pytest.mark.parametrize(
    ("built", "runs", "compiles", "not_"),
    (
        ("80-real", (80, 86, 89), (), (75, 90, 120)),
        ("86-real", (86, 89), (), (80, 90)),
        ("86", (86,), (90, 120), (80,)),
        ("80;90", (86, 90), (100, 120), (75,)),
        ("75-virtual", (), (75, 80, 120), (70,)),
        ("75-virtual;80-real;90-real;90-virtual", (80, 86, 89, 90), (75, 100, 120), (70, 61)),
        ("90", (90,), (100,), (89,)),
        ("90-real 90-virtual", (90,), (103,), (80,)),
        ("90a-real", (90,), (), (80, 100)),
        ("90a", (90,), (), (100,)),
        ("90a-virtual", (), (90,), (89, 100)),
        ("100a 120", (100, 120, 121), (), (103,)),
        ("100f-real", (100, 103), (), (90, 120)),
        ("100f-virtual", (), (100, 103), (120,)),
        ("native", (), (75, 90), ()),
        ("", (), (), (80,)),
    ),
)
def test_which_gpus_a_build_serves(
    built: str, runs: tuple[int, ...], compiles: tuple[int, ...], not_: tuple[int, ...]
) -> None:
    """As they are, or compiled by the driver first."""
    for capability in (*runs, *compiles, *not_):
        assert extensions.has_machine_code(built, capability) == (capability in runs), capability
        assert extensions.has_image(built, capability) == (capability not in not_), capability


def _norms(monkeypatch: pytest.MonkeyPatch, device: int) -> None:
    with emulation.emulated(), flatcore.backend("native"):
        monkeypatch.setattr(native_cuda, "stream", lambda x: (device, 0))
        assert flatcore.row_norms(torch.ones(3, 2000), ord=1).tolist() == [2000] * 3


def test_the_current_device_comes_back_unless_that_would_start_it(
    devices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices.set(1, True, 80)
    _norms(monkeypatch, 1)
    assert devices.current == 0
    devices.set(0, False, 80)
    _norms(monkeypatch, 1)
    assert devices.active == (False, True)


def test_a_kernel_is_loaded_once_on_each_device(devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    devices.set(1, True, 80)
    _norms(monkeypatch, 0)
    _norms(monkeypatch, 1)
    asked = devices.queries
    _norms(monkeypatch, 0)
    _norms(monkeypatch, 1)
    assert devices.queries == asked > 0


def test_a_kernel_that_cannot_be_loaded_is_an_error_and_tried_again(
    devices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices.plant(209)
    x = torch.ones(2, 1030, dtype=torch.bfloat16)  # no other test here has this kernel loaded on the second device
    with emulation.emulated(), flatcore.backend("native"):
        monkeypatch.setattr(native_cuda, "stream", lambda x: (1, 0))
        with pytest.raises(RuntimeError, match="row_norms: tiles: no kernel image is available"):
            flatcore.row_norms(x, ord=1)
        devices.plant(0)
        assert flatcore.row_norms(x, ord=1).tolist() == [1030] * 2


# ------------------------------------------------------------------------------------------- loaded ahead of a capture
def _symbols() -> dict[int, str]:
    """Functions of the emulated module by their address in its file, without parts that the compiler has split off."""
    file = str(emulation.module().__file__)
    listed = subprocess.run(["nm", "-C", "--defined-only", file], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=2) for line in listed.splitlines()]
    return {int(at, 16): name for at, kind, name in lines if kind in "tTwW" and "[clone" not in name}


def _in_a_new_process(*steps: str) -> Any:
    """What the last step gives, of the module as ``core``: nothing has been loaded there."""
    script = f"""
        import importlib.util, json
        found = importlib.util.spec_from_file_location("cuda_emulated", {emulation.module().__file__!r})
        core = importlib.util.module_from_spec(found)
        found.loader.exec_module(core)
    """
    lines = [*textwrap.dedent(script).splitlines(), *steps[:-1], f"print(json.dumps([{steps[-1]}]))"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_is_loaded_ahead_of_its_first_launch() -> None:
    """They are found by calling every entry point with all that it chooses between; one that was forgotten is named."""
    kernels = {
        name
        for path in (ROOT / "csrc/cuda").iterdir()
        for name in re.findall(r"__global__ void\s(?:__launch_bounds__\(.*\)\s+)?(\w+)\(\w*", path.read_text())
    }
    assert len(kernels) > 15 and "present" in kernels
    kernels.remove("present")  # stands for all in the question whether a device can run them
    symbols = _symbols()
    every = {name for name in symbols.values() if re.search(rf"::({'|'.join(kernels)})(<.*>)?\(", name)}
    assert len(every) > 80
    worked, found, again = _in_a_new_process(
        "worked = core.cuda_load(0)", "found, asked = core.devices.loaded, core.devices.queries",
        "worked, found, [core.cuda_load(0), core.devices.queries - asked]",
    )  # fmt: skip
    assert worked and {symbols[address] for address in found} == every
    assert again == [True, 0]


def test_nothing_is_loaded_where_the_process_does_not_work() -> None:
    steps = "core.cuda_load(1), core.devices.queries, core.devices.active"
    assert _in_a_new_process(steps) == [False, 0, [True, False]]


def test_a_kernel_that_cannot_be_loaded_ahead_is_left_to_its_launch() -> None:
    tried = "core.devices.plant(209)", "refused = core.cuda_load(0), core.devices.loaded", "core.devices.plant(0)"
    refused, done, now = _in_a_new_process(*tried, "refused, core.cuda_load(0), core.devices.loaded")
    assert refused[0] and done and set(refused[1]) < set(now)


def test_a_call_that_takes_kernels_loads_all_of_a_device_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers, asked = [False, True], []
    with emulation.emulated(), plugged_in(monkeypatch, tmp_path):
        core = native_cuda.cuda_module()
        with monkeypatch.context() as patch:
            patch.setattr(native_cuda, "_loaded", set())
            patch.setattr(core, "cuda_load", lambda index: asked.append(index) or answers.pop(0))
            for _ in range(4):  # not worked on yet, so asked again; then never
                flatcore.row_norms(torch.ones(2, 2))
    assert asked == [0, 0]


def test_a_check_that_was_asked_for_loads_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A graph's capture may be the next that comes."""
    with emulation.emulated(), plugged_in(monkeypatch, tmp_path) as card:
        monkeypatch.setattr(native_cuda, "_loaded", set())
        card.check = Check((), "out of memory")
        prove.prove(0)
        assert native_cuda._loaded == set()
        card.check = Check(rows())
        prove.prove(0)
        assert native_cuda._loaded == {0}
