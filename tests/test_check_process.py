"""The process that checks a device: what it is given, how it may end, what is made of that; and who runs it.

Nearly all processes here are real ones that play its part: a script of some lines in place of ``flatcore._check.child``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cards
import pytest
import torch
from cards import ALL, Card, plugged_in, rows
from processes import forks

from flatcore._check import cache, child, process
from flatcore._check.record import Check
from flatcore._engine import device, proof

_run = process.run

PLAYED = """
    import json, os, pathlib, signal, sys, time
    here = pathlib.Path(sys.argv[1])
    request = json.loads((here / "request.json").read_text())
    def begin(*stems):
        with open(here / "progress", "a") as file:
            file.write("".join(f"{{stem}}\\n" for stem in stems or [""]))
    def answer(**changes):
        given = {{"package": {package!r}, "file": "/there/flatcore", "device": {device!r}}}
        given |= {{"check": {check!r}, "fault": None}}
        (here / "answer.json").write_text(json.dumps(given | changes))
"""


class Played:
    """The process's part: what the script after the definitions above does."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        self.check = Check(rows())
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setattr(process, "CHILD", "played_child")

    def __call__(self, script: str, **changes: Any) -> Check:
        self.write(script)
        return _run(0, **changes)

    def write(self, script: str) -> None:
        given = {"package": cache.package_hash(), "device": [cards.NAME, *cards.CAPABILITY]}
        definitions = textwrap.dedent(PLAYED).format(check=json.loads(self.check.to_json()), **given)
        (self.folder / "played_child.py").write_text(definitions + textwrap.dedent(script))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Card]:
    with plugged_in(monkeypatch, tmp_path / "cache") as found:
        yield found


@pytest.fixture
def played(card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Played:
    return Played(tmp_path, monkeypatch)


# ------------------------------------------------------------------------------------------------- what it is given
def test_an_answer_is_believed_and_named_after_the_device(played: Played) -> None:
    assert _run.__module__ == process.__name__
    check = played("print('noise'); begin(); answer(); print('noise', file=sys.stderr)")
    assert check.ok and check.rows == rows()
    played.write("begin(); answer()")
    assert {row.backend for row in _run(3).rows} == {"cuda:3"}


def test_what_the_process_is_given(played: Played, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv("KEPT", "1")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "json.py").write_text("raise SystemExit('the working folder came first')")
    monkeypatch.chdir(tmp_path / "work")
    # by its path's entries, one of them relative
    monkeypatch.setattr(sys, "path", [*sys.path, "beside"])
    seen = tmp_path / "seen.json"
    check = played(f"""
        seen = dict(environment=dict(os.environ), path=sys.path, request=request, folder=os.getcwd())
        pathlib.Path({str(seen)!r}).write_text(json.dumps(seen))
        begin(); answer()
    """)
    assert check.ok, check.reason
    given = json.loads(seen.read_text())
    environment = given["environment"]
    assert not any(n.startswith(("RANK", "WORLD", "LOCAL", "MASTER", "TORCHELASTIC")) for n in environment)
    assert environment["KEPT"] == "1" and "PYTHONWARNINGS" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-0" and environment[proof.GUARD] == "1"
    wanted = [str(Path(entry).absolute()) for entry in sys.path]
    assert given["request"]["path"] == wanted and wanted[-1] == str(tmp_path / "work" / "beside")
    # PYTHONPATH drops what is there twice
    assert list(dict.fromkeys(entry for entry in given["path"] if entry in wanted)) == list(dict.fromkeys(wanted))
    assert given["request"]["bytes"] == 256 << 20 and not given["request"]["full"]
    assert not Path(given["folder"]).exists()  # its folder went with it


# ----------------------------------------------------------------------------------------------------- how it may end
NOT_CHECKED = {
    "another module": ("begin(); answer(package='another')", ("another flatcore", "/there/flatcore")),
    "another device": ("begin(); answer(device=['Card 1', 9, 0])", ("another device", "Card 1")),
    "garbage": ("begin(); (here / 'answer.json').write_text('passed'); sys.exit('cut')", ("status 1", "cut")),
    "no check": ("begin(); answer(check={'rows': 1})", ("status 0",)),
    "nothing": ("begin()", ("status 0", "printed nothing")),
    "an exception": ("begin('row_norms'); raise ValueError('odd')", ("status 1", "row_norms", "ValueError: odd")),
    "an import": ("import absent_module", ("status 1", "absent_module")),
    "a reason": (
        "answer(check={'rows': [], 'notes': [], 'reason': 'CUDA out of memory'}, device=None)",
        ("CUDA out of memory",),
    ),
    "a crash while loading": ("os.abort()", ("SIGABRT",)),
    "killed": ("begin('row_norms'); os.kill(os.getpid(), signal.SIGKILL)", ("SIGKILL", "row_norms")),
    "told to end": ("begin('row_norms'); os.kill(os.getpid(), signal.SIGTERM)", ("SIGTERM",)),
}


@pytest.mark.parametrize("case", NOT_CHECKED)
def test_what_proves_nothing_is_no_failure(played: Played, case: str) -> None:
    script, words = NOT_CHECKED[case]
    check = played(script)
    assert check.reason is not None and all(word in check.reason for word in words), check.reason
    assert not check.ok and not any(row.failure for row in check.rows)


@pytest.mark.parametrize("name", ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"))
def test_a_kernel_that_ends_the_process_has_failed_and_the_others_are_checked_without_it(
    played: Played, name: str
) -> None:
    check = played(f"""
        begin()
        if "row_norms" not in request["avoid"]:
            begin("head_metrics", "row_norms")
            os.kill(os.getpid(), signal.{name})
        answer()
    """)
    failed = {row.stem: row.failure for row in check.rows if row.failure}
    assert list(failed) == ["row_norms"] and name in failed["row_norms"] and check.reason is None
    found = proof.verdict(check)
    assert found.state == "failed" and found.passed["head_metrics"] == {"fused", "chunked"}
    assert found.failed["row_norms"] == {"-"} and not found.passed["row_norms"]


def test_every_stem_may_die(played: Played) -> None:
    check = played(f"begin([stem for stem in {cards.STEMS} if stem not in request['avoid']][0]); os.abort()")
    assert [row.stem for row in check.rows if row.failure] == list(cards.STEMS) and check.reason is None


def test_a_death_that_names_no_stem_is_everybodys(played: Played) -> None:
    check = played("begin(); os.abort()")
    assert {row.stem for row in check.rows if row.failure} == set(cards.STEMS)


def test_an_error_of_cuda_in_a_kernel_is_a_failure(played: Played) -> None:
    check = played("""
        begin("row_norms")
        if "row_norms" in request["avoid"]:
            answer()
        else:
            died = ["row_norms", "wanted a result, got an illegal memory access"]
            answer(fault=died, check=dict(rows=[], notes=[], reason=None))
    """)
    (row,) = [row for row in check.rows if row.failure]
    assert row.stem == "row_norms" and "illegal memory access" in row.failure
    assert {(row.stem, row.path) for row in check.rows} == set(ALL)


def test_wrong_numbers_are_handed_on(played: Played) -> None:
    played.check = Check(rows(row_norms="case 3: wanted 1, got 2"))
    assert [row.failure for row in played("begin(); answer()").rows if row.failure] == ["case 3: wanted 1, got 2"]


@pytest.mark.parametrize("begin", ("", "begin('row_norms');"))
def test_a_process_that_hangs_is_ended(
    played: Played, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begin: str
) -> None:
    monkeypatch.setattr(process, "LOADING_SECONDS", 20.0 if begin else 1.0)
    monkeypatch.setattr(process, "CHECK_SECONDS", 0.3)
    own = tmp_path / "pid"
    check = played(f"{begin} pathlib.Path({str(own)!r}).write_text(str(os.getpid())); time.sleep(600)")
    words = ("no answer within 0 s", "row_norms") if begin else ("not ready within 1 s",)
    assert check.reason is not None and all(word in check.reason for word in words), check.reason
    if own.exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(own.read_text()), 0)


def test_an_interrupt_ends_the_process_too(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(running: subprocess.Popen[bytes], *_: Any) -> bool:
        started.append(running)
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        played("time.sleep(600)")
    assert started[0].returncode == -signal.SIGKILL


def test_its_time_begins_when_all_is_loaded(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CHECK_SECONDS", 20.0)
    monkeypatch.setattr(process, "LOADING_SECONDS", 20.0)
    assert process.longest(0, False) == 40
    assert played("begin(); answer()").ok


@pytest.mark.parametrize(("architectures", "seconds"), (("80-real 90-real", 60), ("80-real 90-virtual", 600)))
def test_a_module_of_ptx_alone_has_ten_minutes(
    card: Card, monkeypatch: pytest.MonkeyPatch, architectures: str, seconds: int
) -> None:
    card.answers(capability=lambda index: (9, 0))
    monkeypatch.setattr(process.extensions, "cuda_architectures", lambda: architectures)
    assert process._limit(0, False) == seconds and process._limit(0, True) == 600


HINDRANCES: dict[str, tuple[Callable[[pytest.MonkeyPatch, Path], None], str]] = {
    "frozen": (lambda patch, _: patch.setattr(sys, "frozen", True, raising=False), "no plain Python interpreter"),
    "embedded": (lambda patch, _: patch.setattr(sys, "executable", "/usr/bin/uwsgi"), "/usr/bin/uwsgi"),
    "none": (lambda patch, _: patch.setattr(sys, "executable", ""), "sys.executable is empty"),
    "gone": (lambda patch, to: patch.setattr(sys, "executable", str(to / "python3.11")), "no interpreter at"),
    "MPS": (lambda patch, _: patch.setattr(device, "is_shared", lambda: True), "MPS"),
    "itself": (lambda patch, _: patch.setenv(proof.GUARD, "1"), "itself a check"),
    "no folder": (lambda patch, to: patch.setattr(process.tempfile, "tempdir", str(to / "absent")), "no process could"),
}


@pytest.mark.parametrize("case", HINDRANCES)
def test_where_no_process_can_be_started(
    played: Played, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    hinder, words = HINDRANCES[case]
    assert played("begin(); answer()").ok
    hinder(monkeypatch, tmp_path)
    check = _run(0)
    assert check.reason is not None and words in check.reason and not check.rows


@pytest.mark.parametrize("name", ("python", "python3", "python3.13t", "Python", "pypy3", "python.exe", "pythonw.exe"))
def test_an_interpreter_is_known_by_its_name(name: str) -> None:
    assert process._INTERPRETER.match(name) and not process._INTERPRETER.match(f"my{name}")


# --------------------------------------------------------------------------------------------------- the process itself
class Ended(BaseException):
    pass


@pytest.fixture
def request_in(card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the process's main here, on kernels and a battery of the test's own; returns the answer."""

    def ended(status: int) -> None:
        raise Ended

    def call(kernels: object, battery: Callable[..., Any], avoid: tuple[str, ...] = ()) -> dict[str, Any]:
        request = {"path": sys.path, "full": False, "avoid": avoid, "bytes": 1 << 28, "seconds": 600}
        (tmp_path / "request.json").write_text(json.dumps(request))
        monkeypatch.setitem(child.kernels.KERNELS, "cuda", kernels)
        monkeypatch.setitem(sys.modules, "flatcore._check.battery", type("battery", (), {"battery": battery}))
        monkeypatch.setattr(child.os, "_exit", ended)
        try:
            child.main(str(tmp_path))
        except Ended:
            pass
        finally:
            child.faulthandler.cancel_dump_traceback_later()
        return json.loads((tmp_path / "answer.json").read_text())

    return call


ERRORS = {
    "row_norms: an illegal memory access was encountered": True,
    "CUDA error: misaligned address": True,
    "CUDA out of memory. Tried to allocate 2 GiB": False,
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable": False,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED": False,
    "CUDA error: no kernel image is available for execution on the device": False,
}


@pytest.mark.parametrize("text", ERRORS)
def test_an_error_within_a_kernel(request_in: Callable[..., dict[str, Any]], text: str) -> None:
    class Kernels:
        def row_norms(self, x: int) -> int:
            raise RuntimeError(text)

    def battery(device: torch.device, *, full: bool) -> list[Any]:
        try:
            child.kernels.KERNELS["cuda"].row_norms(1)
        except Exception:
            pytest.fail("a device that has faulted was used further")
        return []

    answer = request_in(Kernels(), battery)
    if ERRORS[text]:
        assert answer["fault"][0] == "row_norms" and text in answer["fault"][1] and answer["check"]["reason"] is None
    else:
        assert answer["fault"] is None and text in answer["check"]["reason"]


def test_want_of_memory_between_the_calls_is_no_failure(request_in: Callable[..., dict[str, Any]]) -> None:
    found = rows(row_norms="wide rows: OutOfMemoryError: CUDA out of memory")
    check = request_in(None, lambda device, *, full: found)["check"]
    assert check["rows"] == [] and "out of memory" in check["reason"]


def test_calls_are_noted_and_those_to_avoid_go_to_the_reference(
    request_in: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    class Kernels:
        def row_norms(self, x: torch.Tensor, ord: tuple[float, ...]) -> torch.Tensor:
            pytest.fail("called")

        def head_measure(self, *arguments: Any) -> str:
            return "measured"

    def battery(device: torch.device, *, full: bool) -> tuple[Any, ...]:
        assert device == torch.device("cuda", 0) and full is False
        watched = child.kernels.KERNELS["cuda"]
        assert watched.row_norms(torch.ones(2, 4), (1,)).tolist() == [[4, 4]]
        assert watched.head_measure(1, 2, 3, 4) == "measured"
        return rows()

    answer = request_in(Kernels(), battery, ("row_norms",))
    assert (tmp_path / "progress").read_text().split() == ["head_metrics"]
    assert answer["package"] == cache.package_hash() and answer["device"] == [cards.NAME, *cards.CAPABILITY]
    assert Check.from_json(json.dumps(answer["check"])).rows == rows()


def test_no_device_is_a_reason(
    request_in: Callable[..., dict[str, Any]], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    card.answers(count=lambda: 0)
    assert "0 devices" in request_in(None, lambda *_: [])["check"]["reason"]
    card.answers(count=lambda: 1)
    monkeypatch.setattr(child.extensions, "cuda_reason", lambda index: "too old")
    assert request_in(None, lambda *_: [])["check"]["reason"] == "too old"


REAL = """
import sys, types
import cards
cards.plug_in()
def battery(device, *, full):
    print("noise")
    {act}
    return cards.rows()
sys.modules["flatcore._check.battery"] = types.SimpleNamespace(battery=battery)
"""


@pytest.mark.parametrize("act", ("pass", pytest.param("import os; os.abort()", marks=pytest.mark.exhaustive)))
def test_the_true_process(card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, act: str) -> None:
    """All of it but the device and the battery, which a site's own start-up file puts there."""
    (tmp_path / "sitecustomize.py").write_text(REAL.format(act=act))
    monkeypatch.syspath_prepend(tmp_path)
    check = _run(0)
    assert check.reason is None
    assert check.rows == rows() if act == "pass" else {r.stem for r in check.rows if r.failure} == set(cards.STEMS)


# ------------------------------------------------------------------------------------------------------------ who runs it
USER = """
import cards, json, sys, torch
from flatcore._check import cache, process
from flatcore._engine import backend, proof
from flatcore._engine.ops import kernels
cards.plug_in()
process.CHILD = "played_child"
kernels.cuda.path_of = lambda stem, C, usable: next(iter(usable), None)
print(kernels.kernels_of(torch.ones(1), "row_norms") is kernels.cuda, proof.verdicts[0].state)
"""


@pytest.mark.parametrize("how", ("notebook", pytest.param("script", marks=pytest.mark.exhaustive)))
def test_the_users_main_is_not_run_again(played: Played, tmp_path: Path, how: str) -> None:
    """Neither a ``__main__`` without a file nor a script without its guard comes into the process that checks."""
    played.write("begin(); answer()")
    (tmp_path / "script.py").write_text(USER)
    command = [sys.executable, "-"] if how == "notebook" else [sys.executable, str(tmp_path / "script.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run(
        command, input=USER if how == "notebook" else "", env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.split() == ["True", "passed"] and done.stderr == "", done.stderr


@forks
def test_a_loader_worker_checks_by_itself(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "run", _run)
    played.write("begin(); answer()")

    class States(torch.utils.data.Dataset[str]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> str:
            return proof.find(0).state

    loader = torch.utils.data.DataLoader(States(), batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert list(loader) == ["passed", "passed"]
    assert proof.verdicts == {}
