"""What waits for a GPU, without one: bench/gpu.sh over programs that only say what they were called with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PYTHON = """#!/bin/sh
echo "python3 $*" >> "$CALLS"
case "$*" in
    "-m pip install"*) exit ${FAIL_BUILD:-0} ;;
    "-m flatcore check"*) exit ${FAIL_CHECK:-0} ;;
    *"-m pytest"*) exit ${FAIL_TESTS:-0} ;;
    "-m flatcore bench"*) exit ${FAIL_BENCH:-0} ;;
esac
"""
SANITIZER = """#!/bin/sh
[ "$1" != --help ] || { echo "  --kernel-regex arg"; exit 0; }
echo "compute-sanitizer $*" >> "$CALLS"
case "$*" in *$FAIL_TOOL*) exit ${FAIL_SANITIZER:-0} ;; esac
"""


class Machine:
    """A machine whose programs are stand-ins."""

    def __init__(self, folder: Path):
        self.bin, self.out, self.calls = folder / "bin", folder / "out", folder / "calls"
        self.bin.mkdir()
        self.put("python3", PYTHON)
        self.put("compute-sanitizer", SANITIZER)
        self.put("nvidia-smi", "#!/bin/sh\necho NVIDIA H100, 580.1, 9.0, 1980 MHz, 2619 MHz\n")
        self.put("nvcc", "#!/bin/sh\necho 'release 13.0, V13.0.88'\necho 'Build cuda_13.0'\n")
        tools = "bash sh git mktemp dirname mkdir rm cat tee timeout tail head date sed grep nproc"
        for name in tools.split():
            (self.bin / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())

    def put(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        return subprocess.run(
            ["bash", str(ROOT / "bench/gpu.sh"), *arguments],
            env={"PATH": str(self.bin), "CALLS": str(self.calls), "HOME": str(self.bin)} | environment,
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    def steps(self, what: str) -> dict[str, int]:
        """How each step ended, as the summary has it."""
        lines = (self.out / f"{what}.txt").read_text().splitlines()
        return {line.split()[0]: int(line.split()[2]) for line in lines if " rc " in line}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


VERIFY = ("build", "check", "tests", "memcheck", "racecheck", "initcheck", "synccheck")


def test_both_calls_leave_at_most_eight_files_and_say_where_they_ran(machine: Machine) -> None:
    for what, steps in (("verify", VERIFY), ("bench", ("build", "bench"))):
        done = machine.run(what, str(machine.out))
        assert done.returncode == 0, done.stdout + done.stderr
        assert machine.steps(what) == dict.fromkeys(steps, 0)
        said = (machine.out / f"{what}.txt").read_text()
        assert "NVIDIA H100, 580.1" in said and "commit " in said and "release 13.0" in said
    names = {path.name for path in machine.out.iterdir()} | {"bench.json", "bench.md"}  # which the command writes
    assert names == {
        "build.log",
        "verify.txt",
        "check.log",
        "tests.log",
        "sanitizers.log",
        "bench.txt",
        "bench.json",
        "bench.md",
    }


def test_the_figures_are_the_commands_and_leave_time_for_the_build(machine: Machine) -> None:
    assert machine.run("bench", str(machine.out)).returncode == 0
    (call,) = [line for line in machine.calls.read_text().splitlines() if "flatcore bench" in line]
    assert call == f"python3 -m flatcore bench --device cuda --seconds 400 --no-pictures --out {machine.out}/bench.json"
    assert machine.run("bench", str(machine.out), FAIL_BENCH="1").returncode == 1


def test_nothing_is_asked_of_a_network_and_pip_is_this_pythons(machine: Machine) -> None:
    machine.run("verify", str(machine.out))
    (pip,) = [line for line in machine.calls.read_text().splitlines() if "pip" in line]
    assert pip.startswith("python3 -m pip install --no-build-isolation --no-deps --no-index")
    calls = machine.calls.read_text()
    assert "--require-cuda" in calls and "--dist worksteal" in calls  # the stand-in's xdist is there
    memcheck, *others = [line for line in calls.splitlines() if line.startswith("compute-sanitizer")]
    assert "--tool memcheck --error-exitcode 9 --kernel-regex kns=flatcore" in memcheck and "--dtypes" not in memcheck
    assert all("--dtypes bfloat16,float32" in line for line in others)
    assert [("kns" in line) for line in others] == [True, False, True]  # initcheck sees what torch writes


@pytest.mark.parametrize(
    ("failing", "step", "status"),
    (
        ({"FAIL_CHECK": "1"}, "check", 1),
        ({"FAIL_TESTS": "1"}, "tests", 1),
        ({"FAIL_TOOL": "racecheck", "FAIL_SANITIZER": "9"}, "racecheck", 9),
    ),
)
def test_a_step_that_fails_is_named_and_the_others_run(
    failing: dict[str, str], step: str, status: int, machine: Machine
) -> None:
    assert machine.run("verify", str(machine.out), **failing).returncode == 1
    assert machine.steps("verify") == dict.fromkeys(VERIFY, 0) | {step: status}


def test_without_a_build_nothing_is_tested(machine: Machine) -> None:
    for what in ("verify", "bench"):
        assert machine.run(what, str(machine.out), FAIL_BUILD="3").returncode == 1
        assert machine.steps(what) == {"build": 3}


def test_a_missing_sanitizer_is_a_failure(machine: Machine) -> None:
    (machine.bin / "compute-sanitizer").unlink()
    assert machine.run("verify", str(machine.out)).returncode == 1
    assert "compute-sanitizer: not found" in (machine.out / "verify.txt").read_text()


@pytest.mark.parametrize("arguments", ((), ("all",), ("verify", "a", "b"), ("--help",)))
def test_other_words_are_explained(arguments: tuple[str, ...], machine: Machine) -> None:
    done = machine.run(*arguments)
    assert done.returncode == 2 and "bash bench/gpu.sh verify [FOLDER]" in done.stderr and not machine.out.exists()


def test_each_call_fits_ten_minutes() -> None:
    lines = (ROOT / "bench/gpu.sh").read_text().splitlines()
    limits = [
        (line.split()[line.split().index("step") + 1], line.split())
        for line in lines
        if " step " in f" {line.strip()} "
    ]
    seconds = {
        name: int(words[words.index("step") + 2]) for name, words in limits if name.isidentifier() or name == "$tool"
    }
    assert seconds["build"] + seconds["bench"] <= 590
    verify = ("build", "check", "tests", "memcheck")
    assert sum(seconds[name] for name in verify) + 3 * seconds["$tool"] <= 600
