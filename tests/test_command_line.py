"""The command line: exit statuses, and sentences instead of tracebacks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import flatcore
from flatcore import _demo
from flatcore.__main__ import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(seed: int, epochs_max: int) -> None:
        raise AssertionError("the training started")

    monkeypatch.setattr(_demo, "train", train)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flatcore {flatcore.__version__}\n"


def test_help_has_examples_that_parse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--help"]) == 0
    examples = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  python -m")]
    assert len(examples) == 3
    monkeypatch.setattr(_demo, "run", lambda out, seed, epochs_max: None)
    for example in examples:
        assert main(example.removeprefix("python -m flatcore ").split()) == 0, example


def test_config_prints_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    config = flatcore.show_config()
    assert list(printed) == list(config)
    assert printed["version"] == flatcore.__version__
    assert printed["workspace_bytes"] == str(config["workspace_bytes"])
    assert printed["cpu_targets"] == (", ".join(config["cpu_targets"]) or "none")
    assert printed["cuda_built"] == ("yes" if config["cuda_built"] else "no")
    assert printed["fused_limits"] == "classes {classes}, weight_bytes {weight_bytes}".format(**config["fused_limits"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: command"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["config", "--out", "x"], "unrecognized arguments: --out x"),
        (["demo", "--seed", "x"], "argument --seed: must be a whole number from 0 to 9223372036854775807, got 'x'"),
        (["demo", "--seed", "-1"], "argument --seed: must be a whole number from 0 to 9223372036854775807, got '-1'"),
        (["demo", "--epochs-max", "0"], "argument --epochs-max: must be a whole number from 1 to 100000, got '0'"),
    ],
)
def test_wrong_usage(argv: list[str], words: str, capsys: pytest.CaptureFixture[str], no_training: None) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("module", "package"),
    [("matplotlib", "matplotlib"), ("rich", "rich"), ("sklearn", "scikit-learn"), ("tqdm", "tqdm")],
)
def test_missing_extra(
    module: str, package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "flatcore._demo")
    assert main(["demo"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"flatcore: the demo needs {package}, which cannot be imported")
    assert error.endswith("pip install 'flatcore[demo]' brings it.\n")


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_is_a_file(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_training: None) -> None:
    (tmp_path / "file").write_text("kept")
    assert main(["demo", "--out", str(tmp_path / out)]) == 1
    assert capsys.readouterr().err == f"flatcore: cannot use {tmp_path / out}: Not a directory.\n"
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["digits.csv", "digits.png"])
def test_output_file_is_a_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_training: None
) -> None:
    (tmp_path / name).mkdir()
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"flatcore: cannot use {tmp_path / name}: Is a directory.\n"
    assert [path.name for path in tmp_path.iterdir()] == [name], "a failed check left a file"


@contextmanager
def _ordinary_user() -> Iterator[None]:
    """Root may write everywhere, so root steps down."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_read_only_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_training: None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o500)
    with _ordinary_user():
        status = main(["demo", "--out", str(out)])
    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith(f"flatcore: cannot use {out}")
    assert error.endswith(": Permission denied.\n")


def test_interrupt(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def train(seed: int, epochs_max: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
        raise AssertionError("the signal did not interrupt")

    monkeypatch.setattr(_demo, "train", train)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "flatcore: interrupted.\n"
    assert list(tmp_path.iterdir()) == []


def test_reader_has_gone() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "flatcore", "config"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=120
        )
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (1, b"")
