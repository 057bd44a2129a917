"""The build's choices beside CUDA: no compiler, the reference alone, warnings as errors."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from importlib import metadata
from pathlib import Path

import pybind11
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def configure(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run CMake on the project, without building."""
    return subprocess.run(
        [str(shutil.which("cmake")), "-S", str(ROOT), "-B", str(folder), "-DFLATCORE_CUDA=OFF",
         f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.needs("cmake")
def test_without_a_compiler_the_way_out_is_named(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DCMAKE_CXX_COMPILER=NOTFOUND")
    said = " ".join(done.stderr.split())
    assert done.returncode != 0 and "need a C++17 compiler, and none was found: install one" in said
    assert "FLATCORE_NATIVE=OFF pip install . installs the PyTorch reference alone" in said


@pytest.mark.needs("cmake")
def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DFLATCORE_NATIVE=MAYBE")
    assert done.returncode != 0 and "FLATCORE_NATIVE must be ON or OFF, not 'MAYBE'" in " ".join(done.stderr.split())


@pytest.mark.needs("cmake")
@pytest.mark.parametrize("options", ((), ("-DFLATCORE_WERROR=ON",)), ids=("default", "werror"))
def test_warnings_are_errors_only_where_asked_for(options: tuple[str, ...], tmp_path: Path) -> None:
    """A compiler that is newer than ours may warn of anything; nobody's install should end there."""
    done = configure(tmp_path, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options)
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "compile_commands.json").read_text()
    assert commands.count("-Wall") >= 20 and commands.count("-Wconversion") >= 20
    assert ("-Werror" in commands) == bool(options)


@pytest.mark.needs("skbuild")
def test_the_reference_alone_is_installed_without_a_compiler(tmp_path: Path) -> None:
    """``FLATCORE_NATIVE=OFF pip install .``, where PATH has nothing at all."""
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "flatcore", source / "flatcore", ignore=ignored)
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    script = "import sys; from scikit_build_core.build import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(wheels)],
        cwd=source, env={"PATH": str(tmp_path), "FLATCORE_NATIVE": "OFF"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no kernels were built: everything runs on the PyTorch reference" in done.stdout + done.stderr
    (wheel,) = wheels.glob("*-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(site)
    script = f"""
        import pkgutil, sys
        sys.path.insert(0, {str(site)!r})
        pkgutil.extend_path = lambda path, name: path  # not with the extension that is installed here
        import torch, flatcore
        config = flatcore.show_config()
        assert (config["native_built"], config["cpu_backend"], config["extension"]) == (False, "reference", None)
        assert flatcore.hessian_trace(torch.ones(2, 3), torch.eye(3)) == 2
        assert not flatcore.cuda.is_built() and flatcore.cuda.show_config()["reason"] == "flatcore was built without CUDA"
        try:
            flatcore.backend("native")
        except RuntimeError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "FLATCORE_NATIVE=OFF" in done.stdout and "pip install . with a C++17 compiler builds it" in done.stdout


def test_the_constraints_fit_every_python_that_is_declared() -> None:
    """One pin of each package for each Python; that of an installed package is one that this Python may install."""
    declared = SpecifierSet(re.search(r'^requires-python = "(.+)"$', PYPROJECT, re.MULTILINE)[1])
    pythons = [version for version in (f"3.{minor}" for minor in range(8, 15)) if declared.contains(version)]
    assert "3.10" in pythons and "3.14" in pythons
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    for python in pythons:
        chosen = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
        assert sorted(pin.name for pin in chosen) == ["numpy", "torch"], python
        for pin in chosen:
            installed = metadata.metadata(pin.name)
            if pin.specifier.contains(installed["Version"]):
                assert SpecifierSet(installed["Requires-Python"]).contains(python), f"{pin} has no build for {python}"


def test_the_readmes_command_for_a_gpu_leaves_torch_alone() -> None:
    """The constraints ask for a CPU build of torch: they would take the user's away."""
    readme = (ROOT / "README.md").read_text()
    commands = [line for line in readme.splitlines() if "FLATCORE_CUDA=ON" in line and "pip install" in line]
    assert commands and not any("constraints" in line for line in commands)
