"""The build's choices beside CUDA: no compiler, the reference alone, warnings as errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[1]


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
