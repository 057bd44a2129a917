"""Which CUDA kernels "auto" takes, on a device that stands in for one and over emulated threads; made checks, true kernels.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from cards import ALL, STEMS, Card, plugged_in, rows
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import flatcore
from flatcore._check import cache, prove
from flatcore._check.record import Check, Row
from flatcore._check.tolerance import assert_same
from flatcore._engine import cuda as native_cuda
from flatcore._engine import extensions, paths, proof
from flatcore._engine.ops import kernels

C_FUSED, C_CHUNKED = 5, 40
FAILURE = "case duplicated rows, N=37 D=130 C=10 float32: wanted 0.25, got 0.5"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Card]:
    with emulation.emulated(), plugged_in(monkeypatch, tmp_path / "cache") as found:
        assert C_FUSED <= native_cuda.cuda_module().CUDA_FUSED_CLASSES < C_CHUNKED
        yield found


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def head(C: int = C_FUSED) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(C)
    return torch.randn(4, 9, generator=g), torch.randn(C, 9, generator=g), torch.randint(C, (4,), generator=g)


def path_of_a_call(C: int = C_FUSED) -> str:
    """The path that a call for a head takes, "reference" where none of the kernels ran."""
    paths.last_path = None
    flatcore.head_metrics(*head(C))
    return paths.last_path or "reference"


def taken(stem: str) -> bool:
    """Whether a call of this stem goes to the kernels."""
    return kernels.kernels_of(torch.ones(2, 2), stem, C_FUSED) is native_cuda


def said(call: Callable[[], Any]) -> list[str]:
    """The RuntimeWarnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(one.category is RuntimeWarning and one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


# ----------------------------------------------------------------------------------------------------------- verdicts
def test_what_passed_is_taken_and_a_line_in_the_log_says_so(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flatcore"):
        assert (path_of_a_call(), path_of_a_call(C_CHUNKED)) == ("fused", "chunked")
    assert card.runs == 1 and all(map(taken, STEMS))
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert "cuda:0" in line and "120 cases" in line and all(stem in line for stem in STEMS)


def test_the_numbers_are_those_of_the_kernels(card: Card) -> None:
    got = flatcore.head_metrics(*head()).layerwise
    card.forget()
    with flatcore.backend("native"):
        assert_same("native", flatcore.head_metrics(*head()).layerwise, got)
    assert card.runs == 1


def test_the_next_process_takes_the_verdict_from_the_file(card: Card) -> None:
    assert path_of_a_call() == "fused"
    file = flatcore.cuda.show_config()["checked"]["cuda:0"]["file"]
    card.forget()
    assert path_of_a_call() == "fused" and card.runs == 1
    assert flatcore.cuda.show_config()["checked"]["cuda:0"]["file"] == file
    assert [str(path) for path in cache.folder().glob("*.json")] == [file]


FAILED = {
    "head_metrics_fused": ("chunked", "chunked"),
    "head_metrics_chunked": ("fused", "reference"),
    "head_metrics": ("reference", "reference"),
    "head_metrics_backward": ("fused", "chunked"),
    "row_norms": ("fused", "chunked"),
    "unmasked_cross_entropy": ("fused", "chunked"),
}


@pytest.mark.parametrize("failed", FAILED)
def test_only_what_failed_is_not_taken_and_one_warning_says_what(card: Card, failed: str) -> None:
    card.check = Check(rows(**{failed: FAILURE}))

    def calls() -> None:
        for _ in range(3):
            assert (path_of_a_call(), path_of_a_call(C_CHUNKED)) == FAILED[failed]
            assert [stem for stem in STEMS if not taken(stem)] == ([failed] if failed in STEMS else [])

    (message,) = said(calls)
    stem = next(stem for stem in reversed(STEMS) if failed.startswith(stem) and (stem == failed or "head" in stem))
    assert all(word in message for word in ("cuda:0", stem, FAILURE, "reference", "python -m flatcore check"))
    card.forget()
    assert len(said(calls)) == 1 and card.runs == 1  # kept, and said once in each process


@pytest.mark.parametrize(("failed", "wanted"), (("fused", ("chunked", "chunked")), ("chunked", ("fused", "reference"))))
def test_a_gradient_takes_no_path_that_has_failed(card: Card, failed: str, wanted: tuple[str, str]) -> None:
    """The other path may have passed, and not take as many classes."""
    card.check = Check(rows(**{f"head_metrics_backward_{failed}": FAILURE}))

    def path_of_a_gradient(C: int) -> str:
        x, w, _ = head(C)
        value = flatcore.hessian_trace(x.requires_grad_(), w)
        paths.last_path = None
        value.backward()
        return paths.last_path or "reference"

    with pytest.warns(RuntimeWarning, match=rf"head_metrics_backward \({failed}\)"):
        assert (path_of_a_gradient(C_FUSED), path_of_a_gradient(C_CHUNKED)) == wanted
    if "reference" in wanted:
        with flatcore.backend("native"), pytest.raises(RuntimeError, match="head_metrics_backward failed"):
            path_of_a_gradient(C_CHUNKED)


@pytest.mark.parametrize("failed", FAILED)
def test_native_raises_where_the_kernels_have_failed(card: Card, failed: str) -> None:
    card.check = Check(rows(**{failed: FAILURE}))
    prove.prove(0)
    with flatcore.backend("native"):
        for C, path in zip((C_FUSED, C_CHUNKED), FAILED[failed], strict=True):
            if path == "reference":
                with pytest.raises(RuntimeError, match=r"head_metrics failed .* cuda:0: case duplicated .*'auto'"):
                    path_of_a_call(C)
            else:
                assert path_of_a_call(C) == path
        if failed == "row_norms":
            with pytest.raises(RuntimeError, match="row_norms failed"):
                flatcore.row_norms(torch.ones(2, 2))


def test_native_takes_unchecked_kernels_and_makes_no_check(card: Card) -> None:
    with flatcore.backend("native"):
        assert said(lambda: path_of_a_call() == "fused" or pytest.fail("not the kernels")) == []
    assert card.runs == 0
    card.check = Check(rows(head_metrics=FAILURE))
    prove.prove(0)
    card.forget()  # a new process, where the failure is known from the file
    with flatcore.backend("native"), pytest.raises(RuntimeError, match="failed"):
        path_of_a_call()
    assert card.runs == 1


def test_a_device_that_could_not_be_checked_is_tried_again_by_the_next_process(card: Card) -> None:
    card.check = Check((), "CUDA out of memory")
    (message,) = said(lambda: [path_of_a_call() for _ in range(3)] == ["reference"] * 3 or pytest.fail("the kernels"))
    assert "could not be checked on cuda:0: CUDA out of memory" in message and "python -m flatcore check" in message
    assert card.runs == 1 and not list(cache.folder().glob("*.json"))
    card.forget()
    card.check = Check(rows())
    assert path_of_a_call() == "fused" and card.runs == 2


def test_a_stem_without_a_case_has_not_passed(card: Card) -> None:
    card.check = Check(tuple(row for row in rows() if row.stem != "row_norms"))
    (message,) = said(lambda: [taken("row_norms"), taken("row_norms")])
    assert "no case of row_norms" in message and not taken("row_norms") and taken("unmasked_cross_entropy")
    card.check = Check(tuple(row._replace(cases=0) for row in rows()))
    prove.prove(0)
    assert len(said(lambda: taken("head_metrics"))) == 1 and not taken("head_metrics")


def test_an_error_of_the_check_itself_does_not_reach_the_call(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "shared", lambda *_: 1 / 0)
    (message,) = said(path_of_a_call)
    assert "ZeroDivisionError" in message


def test_an_interrupted_check_is_made_by_the_next_call(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "shared", interrupted)
        with pytest.raises(KeyboardInterrupt):
            path_of_a_call()
    assert path_of_a_call() == "fused"


# ------------------------------------------------------------------------------------------------------------- cache
@pytest.mark.parametrize("text", ("", "{", "[]", "null", '{"key": {}}', "passed", "\0\xff"))
def test_a_file_that_cannot_be_read_is_made_again(card: Card, text: str) -> None:
    path_of_a_call()
    (file,) = cache.folder().glob("*.json")
    whole = json.loads(file.read_text())
    for wrong in (
        text,
        json.dumps(whole | {"check": {"rows": [["x"]], "reason": None}}),
        json.dumps(whole | {"time": "x"}),
    ):
        file.write_text(wrong)
        card.forget()
        runs = card.runs
        assert path_of_a_call() == "fused" and card.runs == runs + 1
    assert json.loads(file.read_text())["check"] == whole["check"]


def test_a_cache_that_cannot_be_written_is_said_once_in_the_log(
    card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLATCORE_CACHE", str(tmp_path / "file" / "below"))
    assert said(lambda: path_of_a_call() == "fused" or pytest.fail("not the kernels")) == []
    prove.prove(0)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "this process only" in record.getMessage() and "FLATCORE_CACHE" in record.getMessage()
    assert flatcore.cuda.show_config()["checked"]["cuda:0"]["file"] is None


CHANGES = {
    "device": ("name", lambda index: "Card 9001"), "capability": ("capability", lambda index: (9, 1)),
    "driver": ("driver", lambda: "571"), "cublas": ("cublas", lambda: "13.1"),
}  # fmt: skip


@pytest.mark.parametrize("change", (*CHANGES, "torch", "tf32", "package"))
def test_a_verdict_holds_for_what_it_was_found_with(card: Card, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    path_of_a_call()
    card.forget()
    if change in CHANGES:
        name, answer = CHANGES[change]
        card.answers(**{name: answer})
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    elif change == "tf32":
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    else:
        monkeypatch.setattr(cache, "package_hash", lambda: "another")
    assert path_of_a_call() == "fused" and card.runs == 2


def test_the_package_is_known_by_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "flatcore"
    (package / "_check").mkdir(parents=True)
    for name in ("a.py", "_check/golden.json", "_check/cache.py"):
        (package / name).write_text("1")
    monkeypatch.setattr(cache, "__file__", str(package / "_check/cache.py"))
    seen = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("_check/golden.json", "2"), ("b.py", "")):
        (package / name).write_text(text)
        seen.add(cache.package_hash.__wrapped__())
    assert len(seen) == 4
    (package / "a.pyc").write_text("3")
    assert cache.package_hash.__wrapped__() in seen


def test_the_folder_of_the_verdicts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FLATCORE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.folder() == tmp_path / ".cache" / "flatcore"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "flatcore"
    monkeypatch.setenv("FLATCORE_CACHE", str(tmp_path / "own"))
    assert cache.folder() == tmp_path / "own"


# --------------------------------------------------------------------------------------------------- capture, tracing
@pytest.mark.parametrize("state", ("is_capturing", "is_tracing"))
def test_no_check_begins_in_a_capture_or_a_trace(card: Card, state: str) -> None:
    card.answers(**{state: lambda *_: True})
    (message,) = said(lambda: [path_of_a_call() for _ in range(3)] == ["reference"] * 3 or pytest.fail("the kernels"))
    assert "flatcore.check" in message and "cuda:0" in message and card.runs == 0
    card.answers(**{state: lambda *_: False})
    assert path_of_a_call() == "fused" and card.runs == 1
    card.answers(**{state: lambda *_: True})
    assert path_of_a_call() == "fused"
    card.forget()
    assert path_of_a_call() == "fused" and card.runs == 1  # a new process has it from the file


def test_a_graph_compiled_on_the_reference_is_compiled_again_once_a_check_has_passed(card: Card) -> None:
    counter = CompileCounter()
    compiled = torch.compile(lambda x, w, y: flatcore.head_metrics(x, w, y).loss, fullgraph=True, backend=counter)

    def path() -> str:
        paths.last_path = None
        compiled(*head())
        return paths.last_path or "reference"

    card.answers(is_capturing=lambda index: True)
    with pytest.warns(RuntimeWarning, match="flatcore.check"):
        assert path() == "reference"
    made = counter.frame_count
    path()
    assert counter.frame_count == made
    card.answers(is_capturing=lambda index: False)
    assert path_of_a_call() == "fused" and card.runs == 1
    assert path() == "fused" and counter.frame_count == made + 1
    assert path() == "fused" and counter.frame_count == made + 1


# ------------------------------------------------------------------------------------------------- settings, sentences
def test_the_variable_turns_the_check_off(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "choice", "0")
    (message,) = said(lambda: [path_of_a_call() for _ in range(3)] == ["reference"] * 3 or pytest.fail("the kernels"))
    assert "FLATCORE_CUDA_CHECK=0" in message and card.runs == 0
    with flatcore.backend("native"):
        assert path_of_a_call() == "fused"
    prove.prove(0)  # asked for
    assert path_of_a_call() == "fused"


def test_the_variable_makes_the_check_again(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    path_of_a_call()
    card.forget()
    monkeypatch.setattr(proof, "choice", "force")
    card.check = Check(rows(row_norms=FAILURE))
    assert len(said(lambda: [path_of_a_call(), path_of_a_call()])) == 0 and card.runs == 2
    assert len(said(lambda: taken("row_norms"))) == 1


def test_a_process_that_checks_asks_nobody(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(proof.GUARD, "1")
    with flatcore.backend("native"):
        assert path_of_a_call() == "fused"
    assert card.runs == 0


def test_the_reference_by_name_is_silent(card: Card) -> None:
    with flatcore.backend("reference"):
        assert said(lambda: path_of_a_call() == "reference" or pytest.fail("the kernels")) == []
    assert card.runs == 0 and flatcore.show_config()["backend"] == "auto"


ABSENCE: dict[str, tuple[bool, tuple[int, int, int, str], tuple[str, ...]]] = {
    "not built": (False, (0, 0, 0, "flatcore was built without CUDA"), ("without CUDA", "FLATCORE_CUDA=ON pip install .")),
    "no driver": (True, (13000, 0, 0, "CUDA driver version is insufficient"), ("no NVIDIA driver found", "driver")),
    "old driver": (
        True, (13000, 12040, 0, "CUDA driver version is insufficient for CUDA runtime version"),
        ("too old", "12.4", "13.0", "update"),
    ),
    "no device": (True, (13000, 13000, 0, "no CUDA device"), ("no CUDA device", "nvidia-smi", "CUDA_VISIBLE_DEVICES")),
    "not loaded": (
        True, (0, 0, 0, "flatcore._cuda could not be loaded: libc.so.6"), ("libc.so.6", "FLATCORE_CUDA=ON pip install ."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ABSENCE)
def test_why_the_reference_serves_is_one_sentence(card: Card, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    built, runtime, words = ABSENCE[case]
    monkeypatch.setattr(extensions, "is_cuda_built", lambda: built)
    monkeypatch.setattr(extensions, "cuda_runtime", lambda: runtime)
    (message,) = said(lambda: [path_of_a_call() for _ in range(3)] == ["reference"] * 3 or pytest.fail("the kernels"))
    assert all(word in message for word in (*words, "reference", "slower")) and card.runs == 0
    assert message.count("\n") == 0 and message.startswith("flatcore") and "flatcore: flatcore" not in message


def test_what_is_known_is_shown(card: Card) -> None:
    def shown() -> dict[str, Any]:
        return flatcore.cuda.show_config()["checked"]["cuda:0"]

    assert shown()["state"] == "unchecked" and card.runs == 0
    card.check = Check(rows(head_metrics_chunked=FAILURE))
    said(path_of_a_call), said(lambda: path_of_a_call(C_CHUNKED))
    stems = shown()["stems"]
    assert stems["head_metrics"] == {"fused": "passed", "chunked": f"failed: {FAILURE}"}
    assert stems["row_norms"] == {"-": "passed"} and shown()["state"] == "failed" and shown()["reason"] is None
    card.forget()
    assert shown()["stems"] == stems  # from the file
    card.forget()
    card.answers(is_awake=lambda: False)
    assert shown()["state"] == "unchecked"  # not worth waking a device
    card.answers(is_awake=lambda: True)
    card.check = Check((), "time")
    prove.prove(0)
    assert (shown()["state"], shown()["reason"], shown()["file"]) == ("could not check", "time", None)
    assert "proven" not in flatcore.cuda.show_config()


# ------------------------------------------------------------------------------------------------------------- ranks
def test_the_worst_of_several_verdicts() -> None:
    good = Check(rows())
    assert prove.worst([good, good]).ok
    failed = proof.verdict(prove.worst([good, Check(rows(row_norms=FAILURE)), good]))
    assert failed.failed["row_norms"] == {"-"} and failed.passed["head_metrics"] == {"fused", "chunked"}
    lacking = proof.verdict(prove.worst([good, Check(tuple(row for row in rows() if row.path != "fused"))]))
    assert lacking.passed["head_metrics"] == {"chunked"} and not lacking.failed["head_metrics"]
    none = prove.worst([good, Check((), "out of memory")])
    assert none.reason == "out of memory" and not any(proof.verdict(none).passed.values())
    died = Check((*(row for row in rows() if row.stem != "row_norms"), Row("", "row_norms", "-", 0, 0.0, "died")))
    assert proof.verdict(prove.worst([died, good])).failed["row_norms"] == {"-"}


def test_ranks_agree(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(into: list[Any], mine: str, group: Any) -> None:
        into[:] = [mine, Check(rows(head_metrics_fused=FAILURE)).to_json()]

    monkeypatch.setattr(prove.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(prove.distributed, "all_gather_object", gather)
    assert path_of_a_call() == "fused"
    flatcore.cuda.agree()
    assert len(said(lambda: path_of_a_call() == "chunked" or pytest.fail("not the other path"))) == 1
    card.forget()
    monkeypatch.setattr(proof, "choice", "0")  # one rank that checks nothing is enough for all
    flatcore.cuda.agree()
    said(lambda: path_of_a_call() == "reference" or pytest.fail("the kernels"))


def test_every_path_of_a_stem_is_asked_for() -> None:
    assert {(stem, path) for stem in STEMS for path in proof.paths_of(stem)} == set(ALL)
