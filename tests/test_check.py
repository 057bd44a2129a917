"""``flatcore.check``: what it passes, what it catches, and what it leaves as it was.

Wrong kernels are planted in Python, in what a stem's function returns; ``plant_wrong_kernels.py --check`` plants real ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import emulation
import make_golden_answers
import numpy as np
import pytest
import torch
from test_surroundings import SWITCHES
from torch import Tensor

import flatcore
from flatcore import __main__
from flatcore._check import battery as batteries
from flatcore._check import cases, full
from flatcore._check import check as checks
from flatcore._check import prove as proving
from flatcore._check.battery import CALLS, ROWS, STEMS, Golden, battery, given_of, golden_answers, judge
from flatcore._check.cases import inputs_of
from flatcore._check.record import Check, Row
from flatcore._engine import backend as _backend
from flatcore._engine import cpu, extensions, paths

CPU = torch.device("cpu")
NAN = math.nan
SMALL = {
    "head_metrics": "head_metrics N=37 D=128 C=10 float32 misaligned logits given bias plain",
    "head_metrics_backward": "layerwise_1 N=37 D=128 C=10 float32 misaligned bias included log none",
    "row_norms": "row_norms N=37 K=130 float32",
    "unmasked_cross_entropy": "unmasked_cross_entropy N=37 C=32 float32 logits given sum",
}
"""One call of each stem."""


@pytest.fixture
def one_target(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """The best CPU target alone, and the smaller calls: what is asked about does not depend on them."""
    best = batteries.cpu_backends()[-1:]
    monkeypatch.setattr(batteries, "cpu_backends", lambda: best)
    only(monkeypatch, lambda case: (case.classes or case.width) <= 130)


def only(monkeypatch: pytest.MonkeyPatch, choose: Callable[[cases.Case], bool]) -> None:
    chosen = tuple(case for case in cases.battery_cases() if choose(case))
    assert chosen
    monkeypatch.setattr(batteries, "battery_cases", lambda: chosen)


def failed(rows: list[Row]) -> set[str]:
    return {row.stem for row in rows if row.failure is not None}


# ------------------------------------------------------------------------------------------------------------- passes
def test_every_cpu_target_and_path_passes() -> None:
    found = flatcore.check("cpu")
    targets = flatcore.show_config()["cpu_targets"]
    wanted = [("head_metrics", "fused"), ("head_metrics", "chunked"), ("head_metrics_backward", "fused"),
              ("head_metrics_backward", "chunked"), ("row_norms", "-"), ("unmasked_cross_entropy", "-")]  # fmt: skip
    assert [row[:3] for row in found.rows] == [(f"cpu-{target}", *row) for target in targets for row in wanted]
    assert found.ok and found.reason is None and not found.failures, str(found)
    assert all(0 < row.worst <= 1 and 20 <= row.cases <= 120 for row in found.rows)


@pytest.mark.parametrize("classes", (32, pytest.param(1500, marks=pytest.mark.exhaustive)))
def test_the_cuda_kernels_pass_over_emulated_threads(
    classes: int, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    if classes < 1500:
        only(monkeypatch, lambda case: (case.classes or 0) <= classes and case.width < 1500)
    with emulation.emulated(), mock.patch.object(batteries, "_home", lambda device: CPU):
        rows = battery(torch.device("cuda", 1))
    assert not failed(rows), str(Check(tuple(rows)))
    assert [row[:3] for row in rows] == [
        ("cuda:1", "head_metrics", "fused"), ("cuda:1", "head_metrics", "chunked"),
        ("cuda:1", "head_metrics_backward", "fused"), ("cuda:1", "head_metrics_backward", "chunked"),
        ("cuda:1", "row_norms", "-"), ("cuda:1", "unmasked_cross_entropy", "-"),
    ]  # fmt: skip
    assert all(0 < row.worst <= 1 and 10 <= row.cases <= 120 for row in rows)


@pytest.mark.needs("cuda")
def test_the_cuda_kernels_pass_on_a_device(one_thread: None) -> None:
    rows = battery(torch.device("cuda", 0), full=True)
    assert not failed(rows), str(Check(tuple(rows)))


def test_the_reference_passes_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    assert flatcore.check("cpu").notes == ()
    monkeypatch.setattr(_backend, "_core", None)
    found = flatcore.check("cpu")
    assert [row[:3] for row in found.rows] == [("cpu-reference", stem, "-") for stem in STEMS]
    assert found.ok, str(found)
    (note,) = found.notes
    assert "no compiled kernels" in note and "pip install ." in note and note in str(found)


@pytest.mark.exhaustive
def test_the_large_sizes_pass() -> None:
    rows = battery(CPU, full=True)
    assert not failed(rows), str(Check(tuple(rows)))


def test_full_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, one_target: None) -> None:
    only(monkeypatch, lambda case: case.name in SMALL.values())
    for name, value in (("HEADS", ((300, 16, 10),)), ("MATRICES", ((20, 30),)), ("LOGITS", ((20, 10),))):
        monkeypatch.setattr(full, name, value)
    assert not failed(battery(CPU, full=True))
    monkeypatch.setattr(batteries, "judge", lambda *arguments: (0.0, None))  # of the battery itself
    for stem in STEMS:
        with planted(stem):
            assert stem in failed(battery(CPU, full=True)), stem


# ------------------------------------------------------------------------------------------------------ golden answers
def test_the_answers_are_small_and_belong_to_the_cases() -> None:
    path = make_golden_answers.Path(batteries.__file__).with_name(batteries.GOLDEN)
    assert path.stat().st_size <= 200_000
    assert list(golden_answers()) == [case.name for case in cases.battery_cases()]
    assert len(cases.battery_cases()) <= 120


@pytest.mark.parametrize(
    "name",
    [
        *SMALL.values(),
        pytest.param("neuronwise N=37 D=130 C=100 bfloat16 log none", marks=pytest.mark.exhaustive),
        pytest.param("head_metrics N=37 D=37 C=1500 float16", marks=pytest.mark.exhaustive),
    ],
)
def test_the_answers_are_what_the_oracle_says(name: str) -> None:
    (case,) = (case for case in cases.battery_cases() if case.name == name)
    made = make_golden_answers.answers_of(case)
    shipped = golden_answers()[name]
    assert list(made) == list(shipped)
    for quantity, golden in made.items():
        # the last digits of a tolerance are the library's logarithms
        np.testing.assert_allclose(golden.allowed, shipped[quantity].allowed, rtol=0.1)
        np.testing.assert_allclose(golden.truth, shipped[quantity].truth, rtol=1e-15 if "64" in case.dtype else 1e-8)


def test_every_pair_of_choices_meets() -> None:
    factors: dict[str, Any] = {"a": (1, 2, 3, 4, 5), "b": "wxyz", "c": (True, False), "d": (0.5, 1.0, 2.0)}
    rows = cases.covering(factors)
    for a in factors:
        for b in set(factors) - {a}:
            assert {(row[a], row[b]) for row in rows} == {(i, j) for i in factors[a] for j in factors[b]}
    assert len(rows) <= 22
    heads = [case for case in cases.battery_cases() if case.stem == "head_metrics"]
    assert {(c.classes, c.dtype) for c in heads} == {(c, d) for c in cases.CLASSES for d in cases.DTYPES}
    gradients = {(c.function, c.classes) for c in cases.battery_cases() if c.stem == "head_metrics_backward"}
    assert gradients == {(m, c) for m in cases.MEASURES for c in cases.CLASSES}


def test_inputs_are_the_same_numbers_everywhere() -> None:
    """The generator, by its first numbers; every input held exactly in its dtype."""
    assert cases.integers("flatcore", 6, -127, 127).tolist() == FIRST
    for case in cases.battery_cases():
        inputs = cases.inputs_of(case)
        for x in (inputs.features, inputs.weight, inputs.logits):
            if x is not None:
                values = torch.from_numpy(x).nan_to_num(neginf=0.0)
                assert torch.equal(values.to(cases.DTYPES[case.dtype]).double(), values), case.name


FIRST = [-44, 109, 30, -78, -31, -86]  # by SplitMix64 in Python's integers


@pytest.mark.parametrize("stem", STEMS)
def test_a_tampered_answer_is_seen(stem: str, monkeypatch: pytest.MonkeyPatch, one_target: None) -> None:
    only(monkeypatch, lambda case: case.name == SMALL[stem])
    assert not failed(battery(CPU))
    answers = golden_answers()[SMALL[stem]]
    for quantity, golden in answers.items():
        if quantity.endswith(ROWS):  # no answers, but what the entries of a row may be off
            continue
        finite = np.isfinite(golden.truth)
        for place in (np.flatnonzero(finite)[0], np.flatnonzero(finite)[-1], *np.flatnonzero(~finite)[:1]):
            truth = golden.truth.copy()
            truth[place] = truth[place] + (3 * golden.allowed.max(axis=0)[place] or 1.0) if finite[place] else 1.0
            tampered = {SMALL[stem]: answers | {quantity: Golden(truth, golden.allowed)}}
            monkeypatch.setattr(batteries, "golden_answers", lambda tampered=tampered: tampered)
            (sentence, *_) = [row.failure for row in battery(CPU) if row.failure is not None]
            assert quantity in sentence and SMALL[stem] in sentence and "wanted" in sentence and "got" in sentence


# ------------------------------------------------------------------------------------------------------- wrong kernels
def off(x: Tensor, place: int = -1, by: float = 1.0 + 1e-3) -> Tensor:
    """One number off by a thousandth, or, where that says nothing, by 1."""
    x = x.clone()
    flat = x.view(-1)
    flat[place] = flat[place] * by + (1e-3 if flat[place] == 0 or not flat[place].isfinite() else 0)
    return x


@contextmanager
def planted(stem: str, change: Callable[[Any], Any] = off) -> Iterator[None]:
    """The stem's kernels give one number wrong; those of head_metrics by both of their doors."""
    doors = ("head_metrics", "head_measure") if stem == "head_metrics" else (stem,)

    def wrong(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found = function(*arguments)
            if isinstance(found, Tensor):
                return change(found)
            first = next(i for i, x in enumerate(found) if isinstance(x, Tensor))
            return (*found[:first], change(found[first]), *found[first + 1 :])

        return call

    with mock.patch.multiple(cpu, **{door: wrong(getattr(cpu, door)) for door in doors}):
        yield


@pytest.mark.parametrize("stem", STEMS)
def test_a_wrong_number_is_a_failure_of_its_stem_and_of_no_other(stem: str, one_target: None) -> None:
    with planted(stem):
        found = Check(tuple(battery(CPU)))
    assert {row.stem for row in found.failures} == {stem} and not found.ok
    assert {row.path for row in found.failures} == ({"-"} if stem in batteries._PATHLESS else {"fused", "chunked"})
    for row in found.failures:
        assert row.worst > 1 and "wanted" in str(row.failure) and "N=37" in str(row.failure)


@pytest.mark.parametrize("field", range(9), ids=flatcore.HeadMetrics._fields[1:])
def test_one_wrong_row_of_any_field_is_seen(field: int, monkeypatch: pytest.MonkeyPatch, one_target: None) -> None:
    only(monkeypatch, lambda case: case.name == SMALL["head_metrics"])

    def change(values: Tensor) -> Tensor:
        values = values.clone()
        values[field, 8] += 4e-5 + 4e-5 * values[field, 8].abs()
        return values

    with planted("head_metrics", change):
        assert failed(battery(CPU)) == {"head_metrics"}


@pytest.mark.parametrize("which", range(4), ids=("features", "linear_weight", "linear_bias", "logits"))
def test_a_gradient_without_its_last_entries_is_seen(which: int, one_target: None) -> None:
    """What a tail left out looks like: the last entry of each row 0."""
    before = cpu.head_metrics_backward

    def wrong(*arguments: Any) -> Any:
        gradients = list(before(*arguments))
        if gradients[which] is not None:
            gradients[which] = gradients[which].clone()
            gradients[which][..., -1] = 0
        return tuple(gradients)

    with mock.patch.object(cpu, "head_metrics_backward", wrong):
        assert failed(battery(CPU)) == {"head_metrics_backward"}


LOSES = {
    "fused": {"float32": 0.75, "float64": 0.75, "float16": 0.75, "bfloat16": 0.33},
    "chunked": {"float32": 0.2, "float64": 0.5, "float16": 0.05, "bfloat16": 0.25},
}
"""The share of single entries whose loss docs/check.md says is seen, or more."""


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("path", ("fused", "chunked"))
def test_a_single_entry_that_is_lost_is_seen(path: str, dtype: str, one_thread: None) -> None:
    """Every one of a large gradient that is above what it may be off, wherever it is; most are small beside their sums."""
    seen = every = 0
    g = np.random.default_rng(0)
    for case in cases.battery_cases():
        if case.stem != "head_metrics_backward" or case.dtype != dtype:
            continue
        with flatcore.backend("native"), paths.forced(path):
            *_, (_, gradients) = CALLS[case.stem](case, given_of(case, inputs_of(case), CPU))
            assert judge(case, gradients, path == "chunked")[0] <= 1
            for quantity, gradient in gradients.items():
                if gradient.numel() <= cases.WHOLE:
                    continue
                want, bounds = batteries._entries(case)[quantity]
                bound = np.broadcast_to(bounds[path == "chunked"], want.shape)
                lost = np.flatnonzero(want)
                certain = np.abs(want.flat[lost]) > 1.01 * bound.flat[lost] + np.finfo(np.float32).tiny
                seen, every = seen + int(certain.sum()), every + len(lost)
                for place in g.permutation(lost[certain])[:3]:
                    wrong = gradient.clone()
                    wrong.view(-1)[place] = 0
                    ratio, sentence = judge(case, gradients | {quantity: wrong}, path == "chunked")
                    assert ratio > 1 and sentence is not None and f"{quantity} of {case.name}" in sentence
    assert seen >= LOSES[path][dtype] * every


def test_products_of_fewer_digits_are_seen(monkeypatch: pytest.MonkeyPatch, one_target: None) -> None:
    """A library that rounds to bfloat16 or TF32 on its way, as a switch of torch's or a driver's variable makes it."""
    real = torch.mm

    def rounded(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        def short(x: Tensor) -> Tensor:
            return x if x.dtype != torch.float32 else (x.view(torch.int32) & -0x2000).view(torch.float32)  # 10 bits

        return real(short(a), short(b), **options)

    monkeypatch.setattr(torch, "mm", rounded)
    rows = battery(CPU)
    assert {(row.stem, row.path) for row in rows if row.failure} >= {("head_metrics", "chunked")}


@pytest.mark.parametrize("stem", STEMS)
def test_a_kernel_that_raises_is_a_failure(stem: str, one_target: None) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA")

    doors = ("head_metrics", "head_measure") if stem == "head_metrics" else (stem,)
    with mock.patch.multiple(cpu, **dict.fromkeys(doors, broken)):
        rows = battery(CPU)
    assert failed(rows) == {stem}
    sentences = [row.failure for row in rows if row.failure]
    assert all(s.endswith("raised RuntimeError: CUDA error: an illegal memory access") for s in sentences)


def test_results_of_another_dtype_or_size_are_failures(monkeypatch: pytest.MonkeyPatch, one_target: None) -> None:
    only(monkeypatch, lambda case: case.name == SMALL["row_norms"])
    for change, word in ((Tensor.double, "float64"), (lambda x: x[:, 1:], "numbers"), (lambda x: x * NAN, "nan")):
        with planted("row_norms", change):
            (row,) = (row for row in battery(CPU) if row.failure)
        assert row.worst == math.inf and word in str(row.failure)


def test_other_bits_in_a_second_run_are_a_failure(one_target: None) -> None:
    calls = {stem: 0 for stem in STEMS}

    def drifting(stem: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[stem] += 1
            found = function(*arguments)
            first, *rest = found
            if calls[stem] % 2:
                first = first.clone()
                first.view(-1)[8] = torch.nextafter(first.view(-1)[8], torch.tensor(math.inf, dtype=first.dtype))
            return (first, *rest)

        return call

    doors = ("head_metrics", "unmasked_cross_entropy")
    with mock.patch.multiple(cpu, **{door: drifting(door, getattr(cpu, door)) for door in doors}):
        rows = battery(CPU)
    assert {stem for stem in failed(rows)} == set(doors)
    assert all("two runs differ in their bits" in str(row.failure) for row in rows if row.failure)


# ---------------------------------------------------------------------------------------------- arguments and surroundings
@pytest.mark.parametrize("device", ("mps", "meta", "", "cpux", "all"))
def test_a_device_of_another_kind_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r"^device must be 'cpu', 'cuda'"):
        flatcore.check(device)


def test_arguments_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^device must be .*got int"):
        flatcore.check(0)
    with pytest.raises(TypeError, match=r"^full must be"):
        flatcore.check("cpu", full=1)


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Two CUDA devices, the second of which cannot be checked, and a process that says so."""
    asked: list[tuple[int, bool]] = []
    found = {
        0: Check((Row("cuda:0", "row_norms", "-", 20, 0.5, None),)), 1: Check((), "the process timed out after 60 s"),
    }  # fmt: skip

    def prove(index: int, *, full: bool) -> Check:
        asked.append((index, full))
        return found[index]

    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setattr(checks, "_cuda_devices", lambda: (devices, None))
    monkeypatch.setattr(proving, "prove", prove)
    monkeypatch.setattr(full, "times", lambda device: [f"times of {device}"])
    return asked


def test_cuda_devices_are_checked_in_a_process(two_devices: list[tuple[int, bool]]) -> None:
    found = flatcore.check("cuda:0")
    assert found.ok and found.reason is None and [row.backend for row in found.rows] == ["cuda:0"]
    both = flatcore.check("cuda", full=True)
    assert two_devices == [(0, False), (0, True), (1, True)]
    assert not both.ok and both.reason == "cuda:1: the process timed out after 60 s"
    assert both.notes == ("times of cuda:0",) and "not checked" in str(both)
    absent = flatcore.check("cuda:5")
    assert not absent.ok and absent.reason == "cuda:5: this machine has 2 CUDA devices"


def test_without_a_cuda_device_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_cuda_devices", lambda: ([], "no NVIDIA driver found"))
    monkeypatch.setattr(batteries, "battery", lambda device, full: [Row("cpu-avx2", "row_norms", "-", 20, 0.5, None)])
    found = flatcore.check("cuda")
    assert not found.ok and found.reason == "cuda: no NVIDIA driver found"
    everything = flatcore.check()
    assert everything.ok and everything.reason == "cuda: no NVIDIA driver found"
    assert "not here" in str(everything) and "Not checked: cuda: no NVIDIA driver found" in str(everything)


@pytest.mark.parametrize(("reason", "words"), (
    ("flatcore was built without CUDA", ("source folder", "FLATCORE_CUDA=ON pip install .", "FLATCORE_NVCC=pypi")),
    ("no NVIDIA driver found", ("Install the NVIDIA driver",)),
    ("the NVIDIA driver is too old: it serves CUDA 12.4, flatcore was built with 13.0", ("CUDACXX=",)),
    ("its kernels were built for 80-real, this GPU is sm_75", ("To build them for this device",)),
    ("flatcore._cuda could not be loaded: libstdc++.so.6", ("To build them for this device",)),
    ("system has unsupported display driver / cuda driver combination", ("nvidia-smi",)),
))  # fmt: skip
def test_a_device_that_cannot_be_used_names_the_way_out(
    reason: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "show_config", lambda: {"reason": reason})
    monkeypatch.setattr(extensions, "is_cuda_built", lambda: "without" not in reason)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = flatcore.check("cuda").reason
    assert found is not None and found.startswith(f"cuda: {reason}. ") and all(word in found for word in words)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "without" in reason:  # nothing to mend
        assert flatcore.check("cuda").reason == f"cuda: {reason}, and torch finds no CUDA device"


def test_it_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, lambda case: case.name in SMALL.values())
    with flatcore.backend("reference"), paths.forced("chunked", "baseline"), torch.no_grad():
        paths.last_path = "fused"
        state = torch.get_rng_state(), np.random.get_state()[1].copy()
        before = flatcore.show_config()
        assert flatcore.check("cpu").ok
        assert flatcore.show_config() == before and not torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("switch", SWITCHES)
def test_it_passes_whatever_the_processes_switches_say(switch: str, one_target: None) -> None:
    place: AbstractContextManager[Any] = SWITCHES[switch]()
    with place:
        found = Check(tuple(battery(CPU)))
    assert found.ok, str(found)


# ------------------------------------------------------------------------------------------------ records and the command
def test_a_record_survives_json() -> None:
    rows = (
        Row("cuda:0", "row_norms", "-", 20, math.inf, 'a "case": wanted 1, got nan'),
        Row("cuda", "-", "-", 0, 0.5, None),
    )
    found = Check(rows, "why", ("a note",))
    again = Check.from_json(found.to_json())
    assert again == found and type(again.rows[0]) is Row
    absent = Check.from_json(Check((Row("cuda", "-", "-", 0, NAN, None),)).to_json())
    assert math.isnan(absent.rows[0].worst) and absent.reason is None and not absent.ok
    for text in ("", "[]", '{"rows": [{"a": 1}]}', json.dumps({"rows": []})):
        with pytest.raises(ValueError):
            Check.from_json(text)


@pytest.mark.parametrize("device", (None, "cpu", "cuda", "all"))
def test_the_command(device: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = []
    found = Check(
        (Row("cpu-avx2", "row_norms", "-", 20, 0.43, None), Row("cuda", "-", "-", 0, NAN, None)), "cuda: none"
    )
    monkeypatch.setattr(__main__, "check", lambda device, full: given.append((device, full)) or found)
    assert __main__.main(["check", *(["--device", device, "--full"] if device else [])]) == 0
    assert given == [(None if device in (None, "all") else device, device is not None)]
    assert capsys.readouterr().out.splitlines() == [
        "backend   stem       path  cases  worst", "cpu-avx2  row_norms  -        20   0.43  passed",
        "cuda      -          -         0      -  not here",
        'All passed. "worst" is the largest error in tolerances: 1 is the last that passes.', "Not checked: cuda: none",
    ]  # fmt: skip


def test_the_command_fails_with_the_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_target: None
) -> None:
    only(monkeypatch, lambda case: case.stem == "row_norms" and case.width == 37)
    with planted("row_norms"):
        assert __main__.main(["check", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "row_norms, path -: " in out and "wanted" in out and "got" in out
    assert '1 of 1 rows FAILED. "worst" is the largest error' in out
    assert __main__.main(["check", "--device", "cpu"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    if not flatcore.cuda.is_available():
        assert __main__.main(["check", "--device", "cuda"]) == 1
        assert f"Not checked: cuda: {flatcore.cuda.show_config()['reason']}" in capsys.readouterr().out
    assert __main__.main(["check", "--device", "mps"]) == 2
