"""``flatcore bench``: the command, the check of everybody's answers, who is absent, two reports compared."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

import flatcore
from flatcore.__main__ import main
from flatcore._bench import (
    answers,
    candidates,
    clock,
    compare,
    field,
    growth,
    limits,
    measure,
    pictures,
    rivals,
    run,
    works,
)
from flatcore._bench.candidate import Candidate
from flatcore._bench.inputs import inputs, twins

ROOT = Path(__file__).parents[1]
PROBES = [
    {"name": "sum", "kind": "read", "median_s": 1e-3, "rate": 30.0, "unit": "GB/s"},
    {"name": "mm 64x64x64", "kind": "product", "median_s": 1e-3, "rate": 100.0, "unit": "GFLOP/s"},
]


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine's probes take seconds, large products too; and the files go into the folder that is left."""
    monkeypatch.setattr(run, "probe_machine", lambda device, quick: copy.deepcopy(PROBES))
    products = limits.product_probes
    monkeypatch.setattr(limits, "product_probes", lambda sizes, *where: products((64,), *where))
    monkeypatch.chdir(tmp_path)


def bench(*arguments: str) -> int:
    return main(["bench", "--quick", "--threads", "1", *arguments])


def work(key: str, **sizes: Any) -> works.Work:
    (found,) = [each for each in works.WORKS if each.key == key]
    return replace(found, **sizes)


SMALL = {"N": 64, "D": 16, "C": 4, "rounds": 3}
QUICK = measure.Options(quick=True, compile=False, memory=False)


# ------------------------------------------------------------------------------------------------------------ the command
def test_a_work_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--works", "W6-forward", "--out", "out") == 0
    report = json.loads((tmp_path / "out/bench.json").read_text())
    assert report["complete"] and report["quick"] and report["provenance"]["threads"] == 1
    (entry,) = report["works"]
    assert [(row["name"], row["role"]) for row in entry["rows"]] == [("native", "native"), ("eager, whole", "eager")]
    assert entry["absent"] == [
        {"name": "torch.compile", "reason": "left out by --quick"}, {"name": "reference", "reason": "left out by --quick"}
    ]  # fmt: skip
    native, eager = entry["rows"]
    assert native["path"] == f"{flatcore.show_config()['cpu_target']}, fused" and native["calls"] > 1
    assert native["p10_s"] <= native["median_s"] <= native["p90_s"]
    assert native["times_limit"] == pytest.approx(native["median_s"] / entry["limit"]["seconds"])
    assert eager["over_native"] == pytest.approx(eager["median_s"] / native["median_s"])
    assert 0 < native["largest_error_in_tolerances"] < 1
    printed, page = capsys.readouterr().out, (tmp_path / "out/bench.md").read_text()
    for text in (printed, page):
        assert entry["title"] in text and "an operator that does nothing" in text and "left out by --quick" in text
    assert printed.count("Written: ") == 3
    assert imread(tmp_path / "out/bench-ratios.png").shape[2] == 4


def test_a_json_file_may_be_named_and_pictures_left_out(tmp_path: Path) -> None:
    assert bench("--works", "W6-forward", "--no-pictures", "--no-native", "--out", "runs/mine.json") == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["mine.json", "mine.md"]
    (entry,) = json.loads((tmp_path / "runs/mine.json").read_text())["works"]
    assert {"name": "native", "reason": "left out by --no-native"} in entry["absent"]
    assert [row["name"] for row in entry["rows"]] == ["eager, whole"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--works", "W6,W77"], "there is no work W77; there are W1, W1-bfloat16,"),
        (["compare", "a.json", "b.json"], "cannot use a.json: No such file or directory."),
    ],
)  # fmt: skip
def test_what_stops_it_is_a_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*arguments) == 1
    error = capsys.readouterr().err
    assert words in error and error.startswith("flatcore: ") and error.count("\n") == 1


def test_a_device_that_cannot_be_used_is_told_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flatcore.cuda, "is_available", lambda: False)
    monkeypatch.setattr(flatcore.cuda, "show_config", lambda: {"reason": "the driver is too old"})
    assert bench("--device", "cuda") == 1
    told = "flatcore: no CUDA kernel can run here (the driver is too old); --device cpu measures the processor.\n"
    assert capsys.readouterr().err == told


def test_without_the_extension_the_way_out_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = flatcore.show_config() | {"extension": None}
    monkeypatch.setattr(flatcore, "show_config", lambda: found)
    assert bench("--works", "W6-forward") == 1
    assert "or measure the others alone with --no-native.\n" in capsys.readouterr().err


@pytest.mark.parametrize("package", ("rich", "matplotlib"))
def test_a_missing_package_is_told_with_its_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert bench("--works", "W6-forward") == 1
    assert (
        capsys.readouterr().err == f"flatcore: {package} is not installed; pip install 'flatcore[bench]' brings it.\n"
    )


def test_works_that_are_not_begun_say_so(tmp_path: Path) -> None:
    assert bench("--works", "W6", "--seconds", "1e-9", "--no-pictures") == 0
    entries = json.loads((tmp_path / "flatcore-bench/bench.json").read_text())["works"]
    assert [entry["failed"] for entry in entries] == ["not begun: the seconds of --seconds had passed"] * 2


def test_on_a_gpu_what_compiles_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, tuple[str, ...], bool]] = []

    def attempt(work: works.Work, options: measure.Options, everyone: Any = None) -> measure.Entry:
        made.append((work.key, options.only, options.compile))
        return {"title": str(work), "rows": [], "absent": [], "failed": "a stand-in", "wrong": work.key == "W5"}

    for name in ("require_device", "require_release_build"):
        monkeypatch.setattr(run, name, lambda *_: None)
    monkeypatch.setattr(run, "provenance", lambda device: {"extension_stale": False})
    monkeypatch.setattr(run, "attempt", attempt)
    out = tmp_path / "bench.json"
    # one wrong answer ends one work, and is the status
    assert run.bench(measure.Options(device="cuda"), "W5,W9", out, pictures=False) == 1
    both = ("native", "compile")
    assert made == [("W5", (), False), ("W9", (), False), ("W5", both, True), ("W9", both, True)]
    assert [entry["key"] for entry in json.loads(out.read_text())["works"]] == [
        "W5",
        "W9",
        "W5, compiled",
        "W9, compiled",
    ]


# ------------------------------------------------------------------------------------------------------------ the answers
def test_a_wrong_rival_is_refused_and_the_others_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = rivals.mean_layerwise
    forms: dict[str, rivals.Rival] = {"whole": right, "off": lambda *head: right(*head) * 1.05}
    monkeypatch.setitem(rivals.EAGER, "mean layerwise", forms)
    assert bench("--works", "W6-forward", "--no-pictures") == 1
    (entry,) = json.loads((tmp_path / "flatcore-bench/bench.json").read_text())["works"]
    assert [row["name"] for row in entry["rows"]] == ["native", "eager, whole"] and entry["wrong"]
    assert (
        entry["absent"][0]["name"] == "eager, off"
        and "W6-forward, eager, off, mean layerwise:" in entry["absent"][0]["reason"]
    )
    assert "wrong answer, not timed" in capsys.readouterr().out


def test_a_wrong_answer_of_ours_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = candidates._flatcore
    monkeypatch.setattr(candidates, "_flatcore", lambda *arguments: ours(*arguments) * (1 + 1e-4))
    entry = measure.attempt(work("W3-trace", N=40, D=16, C=40), QUICK)
    assert entry["wrong"] and "W3-trace, native, hessian_trace: " in entry["failed"] and not entry["rows"]


def test_a_gradient_that_is_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    small = work("W3-trace-backward", **SMALL)
    assert {row["role"] for row in measure.measure(small, QUICK)["rows"]} == {"native", "eager"}
    log_mean = candidates._log_mean
    monkeypatch.setattr(candidates, "_log_mean", lambda *arguments: log_mean(*arguments) * 1.01)
    entry = measure.measure(small, QUICK)
    assert [row["role"] for row in entry["rows"]] == ["native"] and "gradient by features" in entry["absent"][0][
        "reason"
    ]


@pytest.mark.parametrize(
    "each", [w for w in works.WORKS if w.number not in ("W6", "W9") and not w.backward], ids=lambda w: w.key
)
def test_everybody_answers_every_work_right(each: works.Work, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"N": 24, "D": 96, "C": 0} if each.question == "row norms" else SMALL
    small = replace(each, **{**sizes, **({"D": 0} if each.question == "cotangent" else {}), "rounds": 1})
    entry = measure.measure(small, measure.Options(compile=False, memory=False, probes=PROBES))
    expected, absent = candidates.candidates(small, compile=False)
    assert [row["name"] for row in entry["rows"]] == [candidate.name for candidate in expected]
    assert not entry["wrong"] and [each["name"] for each in entry["absent"][:-1]] == [each.name for each in absent]


def test_a_memory_that_cannot_be_measured_costs_nobody_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(key: str, name: str, **how: object) -> float:
        if name == "native":
            return 1.0
        raise RuntimeError("the process that measures the memory failed: status -9")

    monkeypatch.setattr(measure.memory, "peak_megabytes", failing)
    entry = measure.attempt(work("W3-trace", **SMALL), replace(QUICK, memory=True))
    peaks = {row["name"]: row["peak_mb"] for row in entry["rows"]}
    assert len(peaks) > 1 and peaks.pop("native") == 1.0 and set(peaks.values()) == {None}
    reasons = {each["name"]: each["reason"] for each in entry["absent"]}
    assert all("status -9" in reasons[f"{name}'s memory"] for name in peaks)


def test_a_training_step_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    small = work("W9", N=8, rounds=1)
    entry = measure.measure(small, QUICK)
    assert [row["name"] for row in entry["rows"]] == ["native", "eager, whole"]
    monkeypatch.setitem(rivals.EAGER, "mean layerwise", {"off": lambda *head: 1.01 * rivals.mean_layerwise(*head)})
    entry = measure.measure(small, QUICK)
    assert "W9, eager, off, regulariser" in entry["absent"][0]["reason"]


# ---------------------------------------------------------------------------------------------------------- other tools
def test_a_tool_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(field.importlib, "import_module", importing)
    found, absent = field.tools()
    assert [tool.name for tool in found] == ["torch.func dense Hessian", "one image at a time"]
    assert [tool.name for tool in (*found, *absent)].count("PyHessian") == 1
    assert {tool.name.split()[0] for tool in absent} == {"BackPACK", "curvlinops", "PyHessian", "hessian-eigenthings"}
    assert all("cannot be imported (ImportError: No module named" in tool.reason for tool in absent)


def test_the_readme_installs_the_tools_as_the_command_says() -> None:
    assert field.INSTALL in (ROOT / "bench/README.md").read_text()


def test_a_samplers_standard_deviation_is_that_of_the_whole_hessian() -> None:
    small = work("W7-easy", N=6, D=3, C=4)
    x = inputs(small).double()
    features, weight, bias = x.head

    def loss(w: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(features, w, bias), x.labels)

    hessian = torch.func.jacrev(torch.func.grad(loss))(weight)
    p = torch.nn.functional.linear(features, weight, bias).softmax(1)
    assert answers._deviation(features, p) == pytest.approx(math.sqrt(2) * hessian.norm().item(), rel=1e-12)


def test_a_sampler_is_allowed_its_deviation_and_no_more() -> None:
    small = work("W7-easy", **SMALL)
    x = inputs(small)
    truth = answers.Truth(small, x)
    exact = truth.fields["log_hessian_trace"].exp().mean()
    sampler = Candidate("PyHessian", "sampling", lambda x: lambda: None)
    deviation = truth.deviation / math.sqrt(field.SAMPLES)
    assert truth.check(sampler, exact + 3 * deviation).error == pytest.approx(3 * deviation / exact.item(), rel=1e-6)
    with pytest.raises(answers.WrongAnswerError):
        truth.check(sampler, exact + 7 * deviation)
    with pytest.raises(answers.WrongAnswerError):
        truth.check(replace(sampler, role="tool"), exact + 3 * deviation)


# ------------------------------------------------------------------------------------------------------- works and limits
def test_one_row_in_a_hundred_lies_between_twins() -> None:
    x = inputs(work("W3-twins", N=4_000, D=64))
    features, weight, bias = x.head
    first, second = torch.nn.functional.linear(features, weight, bias).topk(2, dim=1).indices.unbind(1)
    centred = weight - weight.mean(0)
    cosine = torch.nn.functional.cosine_similarity(centred[first], centred[second])
    # 1 % of the labels, and of the uncertain rows, a third of all, 1 % besides
    assert 0.008 < (cosine > 0.95).double().mean().item() < 0.018 and twins(1_000) == 10


def test_every_confidence_has_its_gap() -> None:
    for key, low, high in (("W7-easy", 0.0, 12.0), ("W7-confident", 12.0, 80.0)):
        features, weight, bias = inputs(work(key)).head
        top = torch.nn.functional.linear(features, weight, bias).topk(2, dim=1).values
        gap = (top[:, 0] - top[:, 1]).median().item()
        assert low < gap < high


def test_a_gpu_has_the_same_works_at_its_own_sizes() -> None:
    cpu, cuda = works.select(None), works.select(None, "cuda")
    assert [w.key for w in cpu] == [w.key for w in cuda]
    (vocabulary,) = works.select("W4-trace", "cuda")
    assert (vocabulary.N, vocabulary.D, vocabulary.C, vocabulary.dtype) == (8_192, 4_096, 128_256, "bfloat16")
    assert {w.number for w in cpu} == {f"W{n}" for n in range(1, 10)}
    # three products are counted where three are made
    (neuronwise,) = works.select("W4-neuronwise", "cuda")
    assert [
        limits.second_products(replace(neuronwise, dtype=d), "cuda") for d in ("bfloat16", "float16", "float32")
    ] == [3, 2, 1]
    assert limits.second_products(neuronwise, "cpu") == 1 and limits.second_products(vocabulary, "cuda") == 0


def test_chunks_as_liger_takes_them() -> None:
    taken: list[int] = []

    def form(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        taken.append(len(features))
        return rivals.trace(features, weight, bias)

    x = inputs(work("W4-trace", N=100, D=8, C=61))  # 100 rows over ceil(61/8) = 8: 13, and the power of two above
    found: Any = rivals.chunked_as_liger(form)(*x.head)
    assert taken == [16] * 6 + [4]
    torch.testing.assert_close(found, rivals.trace(*x.head), rtol=1e-4, atol=1e-4)


def test_an_eager_form_that_does_not_fit_a_shape_is_named() -> None:
    everyone = growth.asked(QUICK)
    (large,) = {w.key: w for _, w in growth.works() if (w.N, w.C, w.measure) == (128, 200_000, "neuronwise")}.values()
    found, absent = everyone(large)
    assert [candidate.name for candidate in found] == ["native", "eager, whole p W"]
    assert [each.name for each in absent] == ["eager, Gram"] and "160,000 MB" in absent[0].reason
    moved = dict.fromkeys(moves for moves, _ in growth.works())
    assert list(moved) == ["N", "N, small head", "D", "C", "dtype, small head", "dtype, large head"]
    entry = measure.measure(replace(large, N=20, D=8, C=30, rounds=1), QUICK, everyone)
    assert [row["role"] for row in entry["rows"]] == ["native", "eager", "eager"]


def test_rounds_are_in_turn_and_end_with_the_budget() -> None:
    made: list[str] = []

    def saying(name: str) -> Callable[[], None]:
        return lambda: made.append(name)

    timed = [clock.Timed(saying("a"), 3), clock.Timed(saying("b"), 2, calls=2), clock.Timed(saying("c"), 1)]
    times = clock.in_turn(timed, "cpu")
    assert [len(t) for t in times] == [3, 2, 1]
    assert made == ["a", "b", "b", "c", "b", "b", "a", "a"]
    plan = clock.planned(lambda: torch.randn(100_000), "cpu", 1_000, 1, budget=0.02)
    assert 3 <= plan.rounds < 100
    assert clock.planned(lambda: None, "cpu", 5, 1, budget=10.0).calls > 1_000


def test_a_gpus_events_stand_around_a_call_behind_a_sleeping_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            made.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 6.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: made.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: made.append("sleep"))
    assert clock.seconds(lambda: made.append("call"), "cuda") == pytest.approx(6e-3)
    assert made == ["wait", "sleep", "event", "call", "event", "wait"]
    made.clear()
    assert clock.seconds(lambda: made.append("call"), "cuda", 3) == pytest.approx(2e-3)
    assert made == ["wait", "event", "call", "call", "call", "event", "wait"]


# ------------------------------------------------------------------------------------------------------- reports compared
def row(name: str, role: str, median: float, spread: float = 0.05) -> dict[str, Any]:
    return {
        "name": name, "role": role, "median_s": median, "p10_s": median * (1 - spread), "p90_s": median * (1 + spread),
        "relative_error": None, "note": "", "path": None, "times_limit": 1.0, "over_native": 1.0, "peak_mb": None,
        "share_right_1pct": None, "largest_error_in_tolerances": None, "rounds": 3,
    }  # fmt: skip


def report(scale: float = 1.0, **provenance: Any) -> dict[str, Any]:
    """A report with a work that takes ``scale`` times as long."""
    entries = []
    for each in (work("W1"), work("W3-trace"), work("W7-easy"), work("W7-confident")):
        rows = [row("native", "native", 1e-2 * scale), row("eager, whole", "eager", 2e-2, 0.2)]
        if each.number == "W7":
            rows += [
                row("BackPACK DiagHessian", "tool", 3e-2),
                row("PyHessian", "sampling", 3.0) | {"relative_error": 0.04},
            ]
        entries.append(grown(each, rows))
    moved = [("N", w) for _, w in growth.works()[:4]]
    grows = [
        grown(w, [row("native", "native", 1e-3), row("eager, whole", "eager", 2e-3)]) | {"moves": m} for m, w in moved
    ]
    origin = {
        "device": "cpu",
        "cpu": "one",
        "threads": 2,
        "torch": "2.13",
        "flatcore": "0.1",
        "date": "now",
        **provenance,
    }
    return {"format": compare.FORMAT, "quick": False, "complete": True, "skipped": [], "provenance": origin,
            "probes": PROBES, "works": entries, "growth": grows}  # fmt: skip


def grown(each: works.Work, rows: list[dict[str, Any]]) -> dict[str, Any]:
    entry = {name: getattr(each, name) for name in ("key", "N", "D", "C", "dtype", "operations")}
    limit = {"seconds": 5e-3, "text": "a limit"}
    return entry | {"title": str(each), "rows_are": each.rows, "bytes": each.nbytes, "limit": limit, "rows": rows,
                    "absent": [], "wrong": False}  # fmt: skip


def written(path: str, content: dict[str, Any]) -> str:
    Path(path).write_text(json.dumps(content))
    return path


def test_two_reports_are_compared_beyond_the_spread(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = report(), report(0.8, torch="2.14", date="later")
    after["works"].pop(0)
    changed = {(c.work.split(":")[0], c.name): c for c in compare.changes(before, after)}
    assert changed["W3-trace", "native"].verdict == "faster"
    assert changed["W3-trace", "native"].ratio == pytest.approx(0.8)
    assert changed["W3-trace", "eager, whole"].verdict == "same within the spread"
    assert compare.Change("", "", row("", "", 1.0), row("", "", 1.2)).verdict == "slower"
    # medians apart, ranges not
    assert compare.Change("", "", row("", "", 1.0, 0.2), row("", "", 1.2, 0.2)).verdict == "same within the spread"
    assert main(["bench", "compare", written("a.json", before), written("b.json", after)]) == 0
    printed = capsys.readouterr().out
    assert "18 compared: 3 faster, 0 slower, 15 same within the spread." in printed
    assert f"Only in A: {work('W1')}: native; {work('W1')}: eager, whole." in printed
    assert "The limits themselves" not in printed
    for entry in after["works"]:
        entry["limit"] = {"seconds": 1e-2, "text": ""}
    assert main(["bench", "compare", "a.json", written("b.json", after)]) == 0
    assert "The limits themselves took 2.00 times as long in B" in capsys.readouterr().out
    assert compare.differences(before, after) == [("torch", "2.13", "2.14")] and "2.14" in printed


def test_times_of_two_machines_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    names = written("a.json", report()), written("b.json", report(threads=1))
    assert main(["bench", "compare", *names]) == 1
    assert "different machines or settings (threads 2 and 1)" in capsys.readouterr().err
    assert main(["bench", "compare", *names, "--force"]) == 0
    assert "threads" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "words"), (("{}", "a.json is no report of this"), ("x", "a.json is no JSON file (")))
def test_another_file_is_no_report(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.json").write_text(text)
    assert main(["bench", "compare", "a.json", "a.json"]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_reports_pictures_can_be_drawn_again(tmp_path: Path) -> None:
    content = report()
    content["works"].append(grown(work("W1"), [row("torch.compile, rows", "compile", 1e-2)]) | {"key": "W1, compiled"})
    assert main(["bench", "draw", written("a.json", content)]) == 0
    names = [path.name for path in sorted(tmp_path.glob("*.png"))]
    assert names == ["a-growth.png", "a-ratios.png", "a-roofline.png"]
    figure = pictures.ratios(content)
    assert figure is not None
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["W7-confident", "W7-easy", "W3-trace", "W1"]
    written_there = [text.get_text() for text in right.texts]
    assert "300 ×, off by 4e-02, easy rows" in written_there and "3 ×, confident rows" in written_there
    assert pictures.growth(content | {"growth": []}) is None and pictures.ratios(content | {"works": []}) is None


def test_help_names_every_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(each.number in printed for each in works.WORKS) and "growth" in printed
