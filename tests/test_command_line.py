"""The command line: exit statuses, and sentences instead of tracebacks."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

import flatcore
from flatcore import __main__, robustness
from flatcore.__main__ import main
from flatcore._check.record import Check, Row
from flatcore._cli import bench, commands, demo

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(seed: int, epochs_max: int) -> None:
        raise AssertionError("the training started")

    monkeypatch.setattr(demo, "train", train)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flatcore {flatcore.__version__}\n"


def test_help_has_examples_that_parse(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--help"]) == 0
    examples = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  python -m")]
    assert len(examples) == 8
    monkeypatch.setattr(demo, "run", lambda out, seed, epochs_max: None)
    monkeypatch.setattr(bench, "run", lambda arguments: 0)
    monkeypatch.setattr(__main__, "check", lambda device, full: Check((Row("cpu", "row_norms", "-", 1, 0.0, None),)))
    for command in ("evaluate", "attack_path", "sweep"):
        monkeypatch.setattr(commands, f"run_{command}", lambda arguments: 0)
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
    assert printed["fused_limits"] == ", ".join(f"{k} {v}" for k, v in config["fused_limits"].items())


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
    monkeypatch.delitem(sys.modules, "flatcore._cli.demo")
    monkeypatch.delattr(flatcore._cli, "demo")
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


@pytest.mark.parametrize("name", ["digits.csv", "digits.png", "digits.html"])
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

    monkeypatch.setattr(demo, "train", train)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a script started us with &
    try:
        assert main(["demo", "--out", str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == "flatcore: interrupted.\n"
    assert list(tmp_path.iterdir()) == []


def test_reader_has_gone() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "flatcore", "config"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=600
        )
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (1, b"")


# ------------------------------------------------------------------------------------------------- a model of the user's
FACTORIES = """
    import torch
    from torch import nn

    def trained():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        data = torch.utils.data.TensorDataset(torch.rand(40, 4, 4), torch.arange(40) % 3)
        return model, torch.utils.data.DataLoader(data, batch_size=16)

    def interrupted():
        model, loader = trained()
        def batches():
            yield next(iter(loader))
            raise KeyboardInterrupt
        return model, batches()

    def capped():
        model, loader = trained()
        return nn.Sequential(model, nn.Tanh()), loader

    def empty():
        return trained()[0], []

    def broken():
        return 1 / 0

    def leaving():
        raise SystemExit(0)

    def leaving_later():
        model, loader = trained()
        def batches():
            yield next(iter(loader))
            raise SystemExit
        return model, batches()

    class Modèle(nn.Sequential):
        pass

    def named():
        model, loader = trained()
        return Modèle(*model), loader

    def rows():
        model, loader = trained()
        return model, loader.dataset

    def by_name():
        model, loader = trained()
        return model, [{"input": x, "labels": y} for x, y in loader]

    def shared():
        model, loader = trained()
        sampler = torch.utils.data.DistributedSampler(loader.dataset, num_replicas=4, rank=0, shuffle=False)
        return model, torch.utils.data.DataLoader(loader.dataset, batch_size=4, sampler=sampler)

    def single():
        return trained()[0]

    number = 3
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the module ``factories``, the working folder of the command."""
    (tmp_path / "factories.py").write_text(textwrap.dedent(FACTORIES), encoding="utf-8")
    (tmp_path / "script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--help'])")
    (tmp_path / "unfinished.py").write_text("import nothing_of_this_name")
    (tmp_path / "misspelt.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in ("factories", "unfinished", "misspelt", "script"):
        sys.modules.pop(name, None)


def test_evaluate_command(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "factories:trained", "--input-gradients", "--out", "new/folder"]) == 0
    text = capsys.readouterr().out
    assert "40 rows" in text and "input gradient norm" in text
    out = factory / "new" / "folder"
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "rows.csv"]
    for path in out.iterdir():
        assert f"Written: {path}\n" in text
    assert len((out / "rows.csv").read_text().splitlines()) == 41
    assert json.loads((out / "report.json").read_text())["groups"]["all"]["rows"] == 40
    model, loader = sys.modules["factories"].trained()
    want = flatcore.evaluate(model, loader, input_gradient_norms=True)
    assert repr(want) in text


@pytest.mark.parametrize("command", ["evaluate", "attack-path", "sweep"])
def test_a_factory_may_return_a_data_set(command: str, factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [] if command == "evaluate" else [*ATTACK[:-2], "--samples", "40"]
    said = {}
    for place in ("factories:trained", "factories:rows"):
        assert main([command, place, *options, "--out", "out"]) == 0
        said[place] = capsys.readouterr().out
    assert re.sub(r"\d\.\d+\S*", "", said["factories:rows"]) == re.sub(r"\d\.\d+\S*", "", said["factories:trained"])


def test_interrupted_evaluate_writes_what_it_has(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "factories:interrupted", "--out", "out"]) == 130
    assert len((factory / "out/rows.csv").read_text().splitlines()) == 17
    assert json.loads((factory / "out/report.json").read_text())["complete"] is False
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "attack-path", "sweep"])
def test_help_of_a_command_has_an_example_that_runs(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([command, "--help"]) == 0
    _, example = capsys.readouterr().out.split("with mine.py in this folder:\n")
    source, line = example.split("\n\n")
    (tmp_path / "mine.py").write_text(textwrap.dedent(source))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        assert main(line.strip().removeprefix("python -m flatcore ").split()) == 0
    finally:
        sys.modules.pop("mine", None)
    assert capsys.readouterr().out.count("Written: ") >= 2


ATTACK = ["--norm", "inf", "--eps", "0.2", "--steps", "4", "--samples", "20"]


def test_attack_path_command(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack-path", "factories:trained", *ATTACK, "--out", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    with (factory / "out/attack_path.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 20
    model, loader = sys.modules["factories"].trained()
    inputs, target = (torch.cat(part)[:20] for part in zip(*loader, strict=True))
    path = robustness.attack_path(model.eval(), inputs, target, norm=math.inf, eps=0.2, step=0.125, steps=4)
    for name in ("log_layerwise", "correct", "input_displacement"):
        found = torch.tensor([float(row[name]) for row in rows]).reshape(5, 20)
        torch.testing.assert_close(found, getattr(path, name).float())
    assert [row["target"] for row in rows[:20]] == [str(int(y)) for y in target]
    for k in range(5):
        assert float(lines[1 + k].split()[1]) == pytest.approx(path.correct[k].double().mean().item(), abs=5e-4)
    assert imread(factory / "out/attack_path.png").shape[2] == 4


def test_sweep_command(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["sweep", "factories:trained", *ATTACK, "--out", "out", "--scales", "1", "50", "--gradients", "exact"])
        == 0
    )
    text = capsys.readouterr().out
    found = json.loads((factory / "out/scaling_sweep.json").read_text())
    model, loader = sys.modules["factories"].trained()
    first = [tuple(part[:16] for part in next(iter(loader)))]
    second = [tuple(part[:4] for part in list(loader)[1])]
    want = robustness.scaling_sweep(
        model, first + second, (1, 50), norm=math.inf, eps=0.2, step=0.125, steps=4, gradient="exact"
    )
    assert [row["robust_accuracy"] for row in found] == [row.robust_accuracy for row in want]
    assert [row["loss_increase"]["q50"] for row in found] == [row.loss_increase.q50 for row in want]
    assert len(text.splitlines()) == 1 + 2 + 2
    assert (factory / "out/scaling_sweep.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["evaluate", "factories"], "a factory is named package.module:function, got 'factories'"),
        (["evaluate", "nowhere.at.all:f"], "there is no module 'nowhere' (looked for from"),
        (["evaluate", "factories:nothing"], "module factories has no 'nothing'"),
        (["evaluate", "factories:number"], "factories:number is no function, but a int"),
        (["evaluate", "factories:single"], "must return (model, loader), a torch.nn.Module first, got a Sequential"),
        (["evaluate", "factories:broken"], "factories:broken raised ZeroDivisionError: division by zero (to see where"),
        (["evaluate", "factories:leaving"], "factories:leaving called sys.exit(0) instead of returning (model, loader)"),
        (["sweep", "factories:leaving", *ATTACK], "factories:leaving called sys.exit(0) instead of returning"),
        (["evaluate", "factories:leaving_later"], "the command was ended by sys.exit()"),
        (["evaluate", "script:f"], "importing script called sys.exit(0): what it does as a script belongs under if"),
        (["evaluate", "unfinished:f"], "importing unfinished failed: ModuleNotFoundError: No module named 'nothing_of_this"),
        (["evaluate", "misspelt:f"], "importing misspelt failed: SyntaxError"),
        (["evaluate", "factories:empty"], "loader must yield at least one batch, got an empty one"),
        (["evaluate", "factories:capped"], "the model's output is not the output of"),
        (["evaluate", "factories:trained", "--head", "x"], "head must name a module of the model, got 'x'"),
        (["evaluate", "factories:trained", "--device", "meta"], "model must be on device meta, got one on cpu"),
        (["attack-path", "factories:trained", *ATTACK, "--clip", "0", "0.5"], "inputs must lie within clip = (0.0, 0.5)"),
        (["sweep", "factories:empty", *ATTACK], "loader must yield at least one batch"),
        (["sweep", "factories:by_name", *ATTACK], "got a dict of 2 as batch 0: inputs by name are for flatcore.evaluate"),
    ],
)  # fmt: skip
def test_failures_are_sentences(argv: list[str], words: str, factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("flatcore: ") and words in error and error.endswith(".\n") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "files"),
    [
        (["evaluate", "factories:named", "--out", "sortie-é"], ("report.html", "report.json", "rows.csv")),
        pytest.param(
            ["attack-path", "factories:named", *ATTACK, "--out", "sortie-é"],
            ("attack_path.csv", "attack_path.png"),
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            ["sweep", "factories:named", *ATTACK, "--scales", "1", "--out", "sortie-é"],
            ("scaling_sweep.json", "scaling_sweep.png"),
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            ["demo", "--epochs-max", "1", "--out", "sortie-é"],
            ("digits.csv", "digits.html", "digits.png"),
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=lambda value: value[0],
)  # fmt: skip
def test_an_output_without_accents(command: list[str], files: tuple[str, ...], factory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flatcore", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True, timeout=240, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr[-2000:]) == (0, b"")
    text = done.stdout.decode("ascii")
    assert sorted(path.name for path in (factory / "sortie-é").iterdir()) == sorted(files)
    assert text.count(r"sortie-\xe9") == len(files)
    if command[0] == "evaluate":
        assert r"flatcore.Report(Mod\xe8le, head " in text
        assert json.loads((factory / "sortie-é/report.json").read_text(encoding="utf-8"))["info"]["model"] == "Modèle"


def test_files_are_there_before_anything_is_printed(factory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.TextIOWrapper):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Gone(io.BytesIO(), encoding="utf-8"))
    assert main(["evaluate", "factories:trained", "--out", "out"]) == 1
    assert sorted(path.name for path in (factory / "out").iterdir()) == ["report.html", "report.json", "rows.csv"]


def test_missing_rows_are_a_failure_that_says_so(factory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="30 rows of the data set were in no process's share"):
        assert main(["evaluate", "factories:shared", "--out", "out"]) == 1
    captured = capsys.readouterr()
    assert "30 ROWS MISSING" in captured.out and "30 rows of the data set are missing" in captured.err
    assert json.loads((factory / "out/report.json").read_text())["complete"] is False
    assert (
        "30 rows of the data set are missing: this page is about the other 10"
        in (factory / "out/report.html").read_text()
    )


@pytest.mark.parametrize("command", ["evaluate", "attack-path", "sweep"])
def test_missing_pictures_are_told_before_the_work(
    command: str, factory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert main([command, "factories:trained", *(ATTACK if command != "evaluate" else [])]) == 1
    assert capsys.readouterr().err == (
        "flatcore: matplotlib is not installed; pip install 'flatcore[lab]' brings it.\n"
    )
    assert "factories" not in sys.modules


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--norm", "1"], "argument --norm: must be 2 or inf, got '1'"),
        (["--eps", "0"], "argument --eps: must be a finite number above 0, got '0'"),
        (["--eps", "x"], "argument --eps: must be a finite number above 0, got 'x'"),
        (["--steps", "0"], "argument --steps: must be a whole number from 1 to 100000, got '0'"),
        (["--gradient", "best"], "argument --gradient: invalid choice: 'best'"),
    ],
)  # fmt: skip
def test_wrong_attacks(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack-path", "factories:trained", *ATTACK, *options]) == 2
    assert words in capsys.readouterr().err


def test_a_file_that_cannot_be_written_goes_elsewhere(
    factory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is taken away while the model is measured."""
    measured = flatcore.evaluate

    def slow(*arguments: Any, **options: Any) -> flatcore.Report:
        report = measured(*arguments, **options)
        (factory / "out").rmdir()
        return report

    monkeypatch.setattr(commands, "evaluate", slow)
    monkeypatch.setattr(tempfile, "tempdir", str(factory))
    assert main(["evaluate", "factories:trained", "--out", "out"]) == 1
    captured = capsys.readouterr()
    assert f"cannot write {factory / 'out' / 'rows.csv'} (No such file or directory): writing it to" in captured.err
    (spare,) = factory.glob("flatcore-*")
    assert sorted(path.name for path in spare.iterdir()) == ["report.html", "report.json", "rows.csv"]
    assert f"Written: {spare / 'rows.csv'}\n" in captured.out


@pytest.mark.exhaustive
def test_evaluate_under_torchrun(factory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flatcore",
         "evaluate", "factories:trained", "--out", "out"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("flatcore.Report(") == 1
    found = json.loads((factory / "out/report.json").read_text())
    assert (found["groups"]["all"]["rows"], found["info"]["processes"]) == (40, 2)
    assert len((factory / "out/rows.csv").read_text().splitlines()) == 41
