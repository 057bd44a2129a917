"""Checks of the code base itself: layers, versions, examples, and what was compiled."""

from __future__ import annotations

import ast
import doctest
import graphlib
import importlib
import itertools
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import conftest
import plant_wrong_kernels
import pytest

import flatcore
from flatcore._engine import backend as _backend
from flatcore.reference import FIELDS

ROOT = Path(__file__).parents[1]
STEMS = ("head_metrics", "head_metrics_backward", "row_norms", "unmasked_cross_entropy")
LAYERS = (
    "flatcore/_{}.py",
    "csrc/cuda/{}.h",  # a gradient's struct stands in the header of what it is a gradient of
    "flatcore/reference/{}.py",
    "flatcore/_engine/ops/{}.py",
    "csrc/bind/{}.cpp",
    "csrc/cpu/{}.cpp",
    "csrc/cpu/{}.h",
    "csrc/cuda/{}.cu",
    "tests/test_{}.py",
    "bench/bench_{}.py",
)


@pytest.mark.parametrize("stem", STEMS)
def test_every_stem_stands_in_every_layer(stem):
    # a derivative has no public function of its own
    layers = LAYERS[2:] if stem.endswith("_backward") else LAYERS
    missing = [path for path in (layer.format(stem) for layer in layers) if not (ROOT / path).is_file()]
    assert not missing


def test_the_extension_was_built_from_this_version():
    assert _backend._core is not None, "flatcore is installed without its extension"
    assert _backend._core.VERSION == metadata.version("flatcore") == flatcore.__version__
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared and declared[1] == flatcore.__version__


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["_core"] + ["_cuda"] * flatcore.cuda.is_built())
def test_the_stub_describes_the_extension(name, tmp_path):
    # pybind11 classes have a metaclass of their own, which a stub cannot name
    classes = {
        "_core": ("HeadProblem", "HeadProblem.__pybind11_.*", "HeadLoop", "HeadBackwardLoop"),
        "_cuda": ("HeadLoop", "HeadBackwardLoop"),
    }[name]
    (tmp_path / "allowed").write_text("".join(f"flatcore.{name}.{each}\n" for each in classes))
    command = [sys.executable, "-m", "mypy.stubtest", f"flatcore.{name}", "--allowlist", "allowed"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_fields_stand_in_the_same_order_in_c_and_python():
    header = (ROOT / "csrc/head_problem.h").read_text()
    names = re.search(r"enum Field : int \{(.*?)kFieldCount", header, re.DOTALL)[1]
    spelled = [re.sub(r"(?<!^)(?=[A-Z])|(?<=Norm)(?=1)", "_", name[1:]).lower() for name in re.findall(r"k\w+", names)]
    assert [name.replace("gradient", "feature_gradient") for name in spelled] == list(FIELDS)


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "flatcore").rglob("*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_every_public_function_has_an_example():
    finder = doctest.DocTestFinder(recurse=False)
    functions = [getattr(flatcore, name) for name in flatcore.__all__ if callable(getattr(flatcore, name))]
    laboratory = [getattr(flatcore.robustness, name) for name in flatcore.robustness.__all__]
    functions += [f for f in laboratory if not isinstance(f, type)]  # its classes are what these return
    without = [f.__name__ for f in functions if not any(test.examples for test in finder.find(f, f.__name__))]
    assert not without


def test_the_reference_imports_nothing_else_of_flatcore():
    for path in (ROOT / "flatcore/reference").glob("*.py"):
        imported = re.findall(r"^\s*(?:from|import)\s+(\S+)", path.read_text(), re.MULTILINE)
        assert all(
            re.match(r"(__future__|collections.abc|contextlib|functools|math|torch|typing|\.\w)", name)
            for name in imported
        ), (
            path,
            imported,
        )


def imported_modules(name):
    """What a module takes of flatcore when it is imported itself, as far as those are modules."""
    path = ROOT / f"{name.replace('.', '/')}.py"
    package = name if not path.is_file() else name.rpartition(".")[0]
    path = path if path.is_file() else ROOT / name.replace(".", "/") / "__init__.py"
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parts, *(node.module or "").split(".")]).strip(".")
            found |= {f"{source}.{item.name}" for item in node.names} | {source}
        elif isinstance(node, ast.Import):
            found |= {item.name for item in node.names}
    return {module for module in found if module in MODULES and module not in (name, "flatcore")}


def test_no_module_is_imported_by_what_it_imports():
    graph = {name: imported_modules(name) for name in MODULES}
    assert "flatcore._engine.backend" in graph["flatcore.cuda"], "the pattern finds nothing"
    # a package's own page names its parts, which may name one another
    order = graphlib.TopologicalSorter({name: {n for n in of if n + "." not in name} for name, of in graph.items()})
    order.prepare()
    assert not graph["flatcore._arguments.checks"], "the checks of one argument lie below everything but torch"


CHECK_KNOWS = r"(_arguments\.checks|_engine|_head_metrics|_row_norms|_unmasked_cross_entropy|cuda|reference)\b"
KNOW_CHECK = {"__init__.py", "cuda.py", "_bench/answers.py"}
"""Who may import flatcore/_check."""


def test_the_check_stands_above_what_it_checks():
    for path in (ROOT / "flatcore/_check").glob("*.py"):
        text = re.sub(r"from \.\. import (\w+)", r"from ..\1 import", path.read_text())
        above = re.findall(r"^\s*from \.\.(\S+) import", text, re.MULTILINE)
        assert all(re.match(CHECK_KNOWS, name) for name in above), (path, above)
    others = [path for path in (ROOT / "flatcore").rglob("*.py") if path.parent.name != "_check"]
    knowing = {
        str(p.relative_to(ROOT / "flatcore")) for p in others if re.search(r"(import|\.) ?_check\b", p.read_text())
    }
    assert knowing == KNOW_CHECK


BENCH_KNOWS = r"(_engine import ops|_engine\.head import Head)$"
"""What flatcore/_bench takes of flatcore besides its public names and the tolerance."""


def test_the_bench_stands_above_everything_and_only_its_command_knows_it():
    for path in (ROOT / "flatcore/_bench").glob("*.py"):
        text = path.read_text()
        private = re.findall(r"^\s*from (?:flatcore|\.)\.(_\S+ import .+)$", text, re.MULTILINE)
        inside = [name for name in private if not name.startswith(("_bench", "_check.tolerance"))]
        assert all(re.match(BENCH_KNOWS, name) for name in inside), (path, inside)
    others = [path for path in (ROOT / "flatcore").rglob("*.py") if path.parent.name != "_bench"]
    importing = re.compile(
        r"^\s*(?:from \S*\b_bench\b|import \S*\b_bench\b|from \S+ import .*\b_bench\b)", re.MULTILINE
    )
    knowing = [str(p.relative_to(ROOT / "flatcore")) for p in others if importing.search(p.read_text())]
    assert knowing == ["_cli/bench.py"]


def test_an_import_does_not_load_the_battery():
    code = "import sys, flatcore; print([name for name in sys.modules if name.startswith('flatcore._check')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(done.stdout)) <= {
        "flatcore._check", "flatcore._check.check", "flatcore._check.record",
    }  # fmt: skip


SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
BELOW = {"csrc": ("", "math"), "math": ("math",), "cpu": ("", "math", "cpu"), "cuda": ("", "math", "cuda")}
"""Whose headers a folder of csrc may include, csrc/bind aside; "" has the plain ones that lie in csrc itself."""
ARITHMETIC = {"cfloat", "climits", "cmath", "cstddef", "cstdint", "cstring", "limits", "type_traits", "utility"}
"""The standard headers without threads, memory or devices."""


def included(path):
    """What a source includes, as it is written there: names and whether each is one of the project's own."""
    found = re.findall(r"^\s*#\s*include\s*([<\"])([^>\"]+)[>\"]", path.read_text(), re.MULTILINE)
    return [(name, mark == '"') for mark, name in found]


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name != "bind"], ids=lambda p: p.name)
def test_what_lies_below_the_binding_includes_only_what_it_may(path):
    foreign = re.compile(r"(Python\.h|pybind11|torch|ATen|c10|dlpack)", re.IGNORECASE)
    for name, own in included(path):
        assert not foreign.match(name), name
        if own:
            assert name.rpartition("/")[0] in BELOW[path.parent.name], name
            assert (ROOT / "csrc" / name).is_file(), name
        elif path.parent.name == "math":
            assert name in ARITHMETIC, name


def test_every_folder_of_csrc_is_checked():
    folders = {path.parent.name for path in SOURCES}
    assert folders == {*BELOW, "bind"}
    assert any(own for path in SOURCES for _, own in included(path)), "the pattern finds nothing"


def test_the_driver_of_the_thread_sanitizer_compiles():
    # CI does not run it: the structs that it fills may change under it
    flags = ["-std=gnu++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", f"-I{ROOT / 'csrc'}"]
    command = [os.environ.get("CXX", "c++"), *flags, str(ROOT / "tests/sanitize/threads.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("plant", plant_wrong_kernels.PLANTS, ids=lambda plant: plant.name)
def test_every_mistake_that_may_be_planted_still_finds_its_place(plant):
    assert (ROOT / plant.file).read_text().count(plant.old) == 1


LINES = 520
MODULES_IN_FLATCORE = 14


@pytest.mark.parametrize("folder", ("flatcore", "csrc", "tests", "bench", "examples"))
def test_no_file_is_too_long_to_be_read_at_once(folder):
    kinds = (".py", ".pyi", ".h", ".cpp", ".cu")
    lines = {path: path.read_text().count("\n") for path in (ROOT / folder).rglob("*") if path.suffix in kinds}
    assert lines, "the folder is empty"
    assert not {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > LINES}


def test_few_modules_lie_flat_in_the_package():
    assert len(list((ROOT / "flatcore").glob("*.py"))) <= MODULES_IN_FLATCORE


def thresholds(source):
    """The literals of C++ that are 0.01, 0.05 or a power of two below rounding, by line; comments are left out."""
    number = re.compile(r"(?<![\w.])(?:0x1p-(?:15|40|140)|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")
    code = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), source, flags=re.DOTALL)
    found = []
    for line, text in enumerate(code.splitlines(), 1):
        found += [(line, n) for n in number.findall(text.partition("//")[0]) if "p" in n or float(n) in (0.01, 0.05)]
    return found


def test_a_threshold_of_the_mathematics_is_named_in_csrc_math():
    written = (
        "a < 1e-2 || b > .05 * c // 0.05\n/* 0.01\n */ if (d < 0.010F) x = 0.051 + 1.05 + v0.01 + 0x1p-10 + 10.01;\n"
        "y > 0x1p-140"
    )
    assert thresholds(written) == [(1, "1e-2"), (1, ".05"), (3, "0.010"), (4, "0x1p-140")]
    bare = {str(path.relative_to(ROOT)): thresholds(path.read_text()) for path in SOURCES if path.parent.name != "math"}
    assert not {path: found for path, found in bare.items() if found}


def disassembly():
    """Instructions of the installed extension by the function they stand in."""
    text = subprocess.run(
        ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", _backend._core.__file__],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    functions: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if start := re.match(r"^[0-9a-f]+ <(.+)>:$", line):
            current = functions.setdefault(start[1], [])
        elif line.startswith(" "):
            current.append(line)
    return functions


@pytest.mark.skipif("avx2" not in _backend._core.cpu_targets(), reason="no x86 processor with AVX2: one target only")
def test_wide_instructions_stand_in_their_own_targets_only():
    wide = re.compile(r"%[yz]mm|\sv[a-z]+[a-z0-9]*\s+.*%xmm|\{%k[0-7]\}")
    zmm = re.compile(r"%zmm|\{%k[0-7]\}|%[xy]mm(1[6-9]|2\d|3[01])")
    functions = disassembly()
    of = {target: [n for n in functions if f"cpu::{target}::" in n] for target in ("baseline", "avx2", "avx512")}
    assert all(of.values()), "the installed module was stripped"
    # the pattern finds what it looks for
    assert any(wide.search(line) for name in of["avx2"] for line in functions[name])
    assert any(zmm.search(line) for name in of["avx512"] for line in functions[name])
    for name, lines in functions.items():
        if name in of["avx512"]:
            continue
        pattern = zmm if name in of["avx2"] else wide
        found = [line for line in lines if pattern.search(line)]
        assert not found, f"{name}: {found[:3]}"


def test_the_tour_names_what_is_on_the_disk():
    tour = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"^\| `([\w./{}-]+)`", tour, re.MULTILINE)
    assert named, "the tour's table was not found"
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing
    folders = {
        path.parts[0] for path in (p.relative_to(ROOT) for p in ROOT.glob("*/")) if not path.name.startswith(".")
    }
    ignored = {"build", "dist", "venv", "flatcore-bench", "flatcore-demo", "__pycache__"}
    assert folders - ignored <= {Path(path).parts[0] for path in named}


class Collected:
    """What the choice of a plain run looks at in a collected test."""

    def __init__(self, **params):
        self.nodeid = f"tests/test_x.py::test_y[{'-'.join(params.values())}]"
        self.callspec = SimpleNamespace(params=params)


def test_a_plain_run_shows_every_value_and_every_pair_of_short_parameters():
    paths, dtypes, cases = ([f"{name}{i}" for i in range(n)] for name, n in (("path", 9), ("dtype", 4), ("case", 50)))
    crossing = [Collected(path=p, case=c, dtype=d) for p, c, d in itertools.product(paths, cases, dtypes)]
    kept = [item.callspec.params for item in conftest._covering(crossing)]
    assert {k["case"] for k in kept} == set(cases)
    assert {(k["path"], k["dtype"]) for k in kept} == set(itertools.product(paths, dtypes))
    assert len(kept) < len(cases) + len(paths) * len(dtypes) < len(crossing) / 20
