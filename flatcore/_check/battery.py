"""The battery: every computation of one device's kernels, called in this process and compared with the golden answers."""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._engine import backend as _backend
from .._engine import paths
from .._head_metrics import HeadMetrics, feature_gradient_norms, head_metrics, hessian_trace, relative_flatness
from .._row_norms import row_norms
from .._unmasked_cross_entropy import unmasked_cross_entropy
from .cases import DTYPES, IGNORED, ORDS, WHOLE, Case, Inputs, battery_cases, inputs_of, summary, tensor
from .record import Row
from .tolerance import Bound, cotangent_tolerance, worst

STEMS = ("head_metrics", "head_metrics_backward", "row_norms", "unmasked_cross_entropy")
FIELDS = HeadMetrics._fields
_PATHLESS = ("row_norms", "unmasked_cross_entropy")
NORMS = {1.0: "L1", 2.0: "L2", math.inf: "Linf"}


class Golden(NamedTuple):
    """Exact numbers of one quantity, and what each may be off, on the fused path (or the only one) and on the chunked."""

    truth: np.ndarray  # (n,) float64; NaN where the result must be NaN
    allowed: np.ndarray  # (2, n)


# ------------------------------------------------------------------------------------------------------ golden answers
GOLDEN = "golden_answers.npz"
ROWS = " rows"
"""Behind a large gradient's name: what the entries of each of its rows may be off, at most."""


@functools.cache
def golden_answers() -> dict[str, dict[str, Golden]]:
    """The answers that ship in the package, by a case's name and a quantity's."""
    with np.load(io.BytesIO(resources.files(__package__).joinpath(GOLDEN).read_bytes())) as file:
        index = json.loads(file["index"].tobytes())
        values = np.ascontiguousarray(file["values"].T).view(np.float64).reshape(-1)
    found: dict[str, dict[str, Golden]] = {}
    at = 0
    for case, quantities in index.items():
        for quantity, n in quantities.items():
            block = values[at : at + 3 * n].reshape(3, n)
            found.setdefault(case, {})[quantity] = Golden(block[0], block[1:])
            at += 3 * n
    return found


def pack(answers: dict[str, dict[str, Golden]]) -> bytes:
    """The file that :func:`golden_answers` reads: bytes of equal rank side by side, which makes it a seventh smaller."""
    index = {case: {name: g.truth.size for name, g in of.items()} for case, of in answers.items()}
    blocks = [np.concatenate([g.truth[None], g.allowed]).reshape(-1) for of in answers.values() for g in of.values()]
    file = io.BytesIO()
    text = np.frombuffer(json.dumps(index).encode(), dtype=np.uint8)
    np.savez_compressed(file, index=text, values=np.concatenate(blocks).view(np.uint8).reshape(-1, 8).T)
    return file.getvalue()


# --------------------------------------------------------------------------------------------------------------- calls
Results = dict[str, Tensor]
Found = Iterator[tuple[str, Results]]
"""A stem, and what it has made; of one call after the other."""


class Given(NamedTuple):
    """The arguments of a call where its device's kernels read them."""

    arguments: dict[str, Any]
    upstream: Tensor | None


def given_of(case: Case, inputs: Inputs, home: torch.device) -> Given:
    """Put the inputs on a device, in the call's dtypes."""
    dtype = DTYPES[case.dtype]
    result = _result_dtype(case)
    target = None if inputs.target is None else torch.from_numpy(inputs.target).to(home)
    arguments: dict[str, Any] = {"features": tensor(inputs.features, dtype, home, case.aligned)}
    if case.stem in _PATHLESS:
        arguments = {"x" if case.stem == "row_norms" else "logits": arguments["features"]}
    else:
        weight_dtype = dtype if case.weight_dtype is None else DTYPES[case.weight_dtype]
        arguments["linear_weight"] = tensor(inputs.weight, weight_dtype, home, case.aligned)
        arguments["linear_bias"] = tensor(inputs.bias, dtype, home)
        arguments["logits"] = tensor(inputs.logits, dtype, home, case.aligned)
    if target is not None:
        arguments["target"] = target
    for name in _leaves(case, arguments):
        arguments[name].requires_grad_()
    return Given(arguments, tensor(inputs.upstream, result, home))


def _result_dtype(case: Case) -> torch.dtype:
    return torch.float64 if case.dtype == "float64" else torch.float32


def _leaves(case: Case, arguments: dict[str, Any]) -> list[str]:
    """What a gradient is taken of: a bias only where it counts, with the logits or as a parameter."""
    if case.stem == "unmasked_cross_entropy":
        return ["logits"]
    if case.stem != "head_metrics_backward":
        return []
    counts = case.bias == "included" or not case.logits
    names = ("features", "linear_weight", *(("linear_bias",) if counts else ()), "logits")
    return [name for name in names if arguments[name] is not None]


def _gradients(case: Case, value: Tensor, given: Given) -> Results:
    names = _leaves(case, given.arguments)
    found = torch.autograd.grad(value, [given.arguments[name] for name in names], given.upstream)
    return {f"d {name}": gradient for name, gradient in zip(names, found, strict=True)}


def _head_metrics(case: Case, given: Given) -> Found:
    found = head_metrics(**given.arguments, temperature=case.temperature, ignore_index=IGNORED)
    yield "head_metrics", dict(zip(FIELDS, found, strict=True))


def _measure(case: Case, given: Given) -> Found:
    """The reduced value, which is the work of ``head_metrics``, and then its gradients."""
    options: dict[str, Any] = {"temperature": case.temperature, "reduction": case.reduction, "log": case.log}
    if case.function in ORDS:
        value = feature_gradient_norms(**given.arguments, **options, ord=ORDS[case.function])
    else:
        options["include_bias"] = case.bias == "included"
        if case.function == "hessian_trace":
            value = hessian_trace(**given.arguments, **options)
        else:
            name, _, power = case.function.partition("_")
            value = relative_flatness(**given.arguments, **options, measure=name, norm_power=1 if power else 2)
    yield "head_metrics", {"value": value.detach()}
    yield "head_metrics_backward", _gradients(case, value, given)


def _row_norms(case: Case, given: Given) -> Found:
    x = given.arguments["x"]
    yield "row_norms", dict(zip(NORMS.values(), row_norms(x, tuple(NORMS)), strict=True))
    # each by itself takes a kernel of its own
    yield "row_norms", {name: row_norms(x, ord) for ord, name in NORMS.items()}


def _cross_entropy(case: Case, given: Given) -> Found:
    value = unmasked_cross_entropy(**given.arguments, reduction=str(case.reduction), ignore_index=IGNORED)
    yield "unmasked_cross_entropy", {"value": value.detach(), **_gradients(case, value, given)}


CALLS: dict[str, Callable[[Case, Given], Found]] = {
    "head_metrics": _head_metrics, "head_metrics_backward": _measure, "row_norms": _row_norms,
    "unmasked_cross_entropy": _cross_entropy,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- judgement
def judge(case: Case, results: Results, chunked: bool) -> tuple[float, str | None]:
    """The largest error in tolerances, and a sentence where one is above 1."""
    largest, sentence = 0.0, None
    answers = golden_answers()[case.name]
    for quantity, value in results.items():
        golden = answers[quantity]
        got = value.detach().cpu()
        want_dtype = torch.int64 if quantity == "prediction" else _result_dtype(case)
        if quantity.startswith("d "):
            want_dtype = DTYPES[case.dtype]
        if got.dtype != want_dtype:
            return math.inf, f"{quantity} of {case.name}: wanted {want_dtype}, got {got.dtype}"
        entries = got.to(torch.float64).numpy()
        numbers = summary(entries)
        if numbers.shape != golden.truth.shape:
            return math.inf, f"{quantity} of {case.name}: wanted {golden.truth.size} numbers, got {numbers.size}"
        # NaN is wanted where the answer is NaN, and only there
        absent = np.isnan(golden.truth)
        shown = np.where(absent & np.isnan(numbers), 0.0, np.where(absent, math.inf, numbers))
        truth = np.where(absent, 0.0, golden.truth)
        ratio, place = worst(quantity, shown, truth, Bound(golden.allowed[int(chunked)], 0.0))
        if ratio > largest:
            largest = ratio
            if not ratio <= 1:
                sentence = _sentence(f"{quantity} of {case.name}, number {place}", truth[place], numbers[place], ratio)
        if ratio <= 1 and quantity.startswith("d ") and got.numel() > WHOLE:
            want, bounds = _entries(case)[quantity]
            if not (np.abs(entries - want) <= bounds[int(chunked)]).all():  # NaN is not
                ratio, place = worst(quantity, entries, want, Bound(bounds[int(chunked)], 0.0))
                at = tuple(int(i) for i in np.unravel_index(place, want.shape))
                largest, sentence = (
                    ratio,
                    _sentence(f"{quantity} of {case.name}, entry {at}", want[at], entries[at], ratio),
                )
    return largest, sentence


def _sentence(what: str, wanted: float, got: float, ratio: float) -> str:
    return f"{what}: wanted {wanted:.17g}, got {got:.17g}, {ratio:.3g} tolerances off"


@functools.lru_cache(maxsize=1)
def _entries(case: Case) -> dict[str, tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """Large gradients of a call by the reference in float64 on the CPU, and what entries may be off, fused and chunked.

    The reference is another implementation of the formulas, not an answer that came with the package: it is asked beside
    the golden numbers, whose sums do not show a single entry that is small among many. Entries have twice what they may
    be off, once for the kernels and once for the reference.
    """
    wide = case._replace(dtype="float64", weight_dtype=None, aligned=True)
    inputs = inputs_of(case)
    with _forced(None, None):
        *_, (_, results) = CALLS[case.stem](wide, given_of(wide, inputs, torch.device("cpu")))
    answers, dtype = golden_answers()[case.name], DTYPES[case.dtype]
    found = {}
    for quantity, value in results.items():
        if not quantity.startswith("d ") or value.numel() <= WHOLE:
            continue
        want = value.numpy()
        if case.stem == "unmasked_cross_entropy":  # as in tests/make_golden_answers.py, at the largest upstream
            assert inputs.upstream is not None
            one, most = cotangent_tolerance(dtype), float(np.abs(inputs.upstream).max())
            relative = one.relative + 2 * torch.finfo(dtype).eps
            allowed = most * one.absolute + torch.finfo(dtype).tiny + relative * np.abs(want)
            found[quantity] = want, (2 * allowed, 2 * allowed)
        else:
            rows = 2 * answers[quantity + ROWS].allowed
            fused, chunked = rows[..., None] if want.ndim == 2 else rows
            found[quantity] = want, (fused, chunked)
    return found


class Tally:
    """The rows of one backend in the making."""

    def __init__(self, backend: str):
        self.backend = backend
        self._found: dict[tuple[str, str], list[Any]] = {}

    def add(self, stem: str, path: str, cases: int, ratio: float, failure: str | None) -> None:
        """Count calls, keep the largest error and the first failure."""
        entry = self._found.setdefault((stem, path), [0, math.nan, None])
        entry[0] += cases
        entry[1] = ratio if math.isnan(entry[1]) else max(entry[1], ratio)
        entry[2] = entry[2] or failure

    def rows(self) -> list[Row]:
        """The rows, stem by stem."""
        order = sorted(self._found, key=lambda key: (STEMS.index(key[0]), key[1] == "chunked"))
        return [Row(self.backend, *key, *self._found[key]) for key in order]


def raised(error: Exception) -> str:
    """What went wrong, in a line."""
    return f"raised {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _run(case: Case, given: Given, path_of: Callable[[str], str], tally: Tally) -> list[tuple[str, str, Results]]:
    """Call, compare, and note; what was computed: stem, path and results, in order."""
    computed: list[tuple[str, str, Results]] = []
    try:
        for stem, results in CALLS[case.stem](case, given):
            path = path_of(stem)
            first = (stem, path) not in [entry[:2] for entry in computed]
            computed.append((stem, path, results))
            ratio, failure = judge(case, results, path == "chunked")
            tally.add(stem, path, int(first), ratio, failure)
    except Exception as error:  # of whatever kind: the caller wants to know of which kernel, and of the others
        stem = "head_metrics" if case.stem == "head_metrics_backward" and not computed else case.stem
        tally.add(stem, path_of(stem), 1, math.inf, f"{case.name}: {raised(error)}")
    return computed


def _again(case: Case, given: Given, path_of: Callable[[str], str], tally: Tally) -> list[tuple[str, str, Results]]:
    """As :func:`_run`, and for one call of each stem once more: the same bits."""
    computed = _run(case, given, path_of, tally)
    if case not in _repeated():
        return computed
    for (stem, path, one), (_, _, other) in zip(computed, _run(case, given, path_of, Tally("")), strict=False):
        for name, a in one.items():
            try:
                b = other[name]
                same = torch.equal(a.isnan(), b.isnan()) and not bool(((a != b) & ~a.isnan()).any())
                failure = None if same else f"{name} of {case.name}: two runs differ in their bits"
            except Exception as error:  # a device that has died
                failure = f"{case.name}: {raised(error)}"
            if failure:
                tally.add(stem, path, 0, math.inf, failure)
    return computed


@functools.cache
def _repeated() -> frozenset[Case]:
    """One call of each stem that is made twice: a weight's gradient, and rows, are sums whose order must not change."""
    chosen: dict[str, Case] = {}
    for case in battery_cases():
        if case.dtype == "float32" and case.width > 37:
            chosen.setdefault(case.stem, case)
    return frozenset(chosen.values())


# ------------------------------------------------------------------------------------------------------------- devices
def _home(device: torch.device) -> torch.device:
    """Where the tensors live that this device's kernels are given; over emulated threads, on the CPU."""
    return device


@contextmanager
def _as_asked() -> Iterator[None]:
    """Gradients are recorded, whatever mode the caller is in; what was remembered of the last call stays."""
    last = paths.last_path
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        paths.last_path = last


def battery(device: torch.device, *, full: bool = False) -> list[Row]:
    """Run the battery on the compiled kernels of a device, in this process; a row for each target, stem and path.

    Args:
        device: the CPU: all its usable targets, fused and chunked (the reference, where nothing was compiled); or a CUDA
            device with its index: small heads fused and chunked, all others chunked.
        full: large sizes too; on CUDA also a stream beside the current one, and a graph capture.

    A wrong number, an exception or other bits in a second run make a failure of their row; nothing is raised. While it
    runs, the process's other threads take the kernels and paths under test.
    """
    home = _home(device)
    with _as_asked():
        return _on_cuda(device, home, full) if device.type == "cuda" else _on_cpu(home, full)


def cpu_backends() -> list[tuple[str, str | None]]:
    """The CPU's backends as a row names them, and their targets."""
    if _backend._core is None:
        return [("cpu-reference", None)]
    return [(f"cpu-{target}", target) for target in _backend._core.cpu_targets()]


@contextmanager
def _forced(target: str | None, path: str | None) -> Iterator[None]:
    """Force a target and a path of the CPU; the reference where there is none."""
    with _backend.backend("reference" if target is None else "native"), paths.forced(path, target):
        yield


def _on_cpu(home: torch.device, full: bool) -> list[Row]:
    backends = [(target, Tally(name)) for name, target in cpu_backends()]
    for case in battery_cases():
        given = given_of(case, inputs_of(case), home)
        for target, tally in backends:
            for path in (None,) if case.stem in _PATHLESS or target is None else ("fused", "chunked"):
                with _forced(target, path):
                    _again(case, given, functools.partial(_name, path or "-"), tally)
    if full:
        from .full import Run, large

        runs = []
        for target, tally in backends:
            for path in (None,) if target is None else ("fused", "chunked"):
                most = 4096 if path == "fused" else math.inf
                force = functools.partial(_forced, target, path)
                runs.append(Run(force, functools.partial(_name, path or "-"), tally, most))
        large(home, runs)
    return [row for _, tally in backends for row in tally.rows()]


def _name(path: str, stem: str) -> str:
    return "-" if stem in _PATHLESS else path


def _observed(stem: str) -> str:
    """The path that a CUDA device's kernels have taken."""
    return _name(paths.last_path or "fused", stem)


def _on_cuda(device: torch.device, home: torch.device, full: bool) -> list[Row]:
    """Each call as it comes; heads that took the fused kernel once more by tiles."""
    tally = Tally(f"cuda:{device.index or 0}")
    with _backend.backend("native"):
        for case in battery_cases():
            try:
                given = given_of(case, inputs_of(case), home)
            except Exception as error:  # no memory is left, or a kernel before has ended the device's context
                tally.add(case.stem, _observed(case.stem), 1, math.inf, f"{case.name}: {raised(error)}")
                continue
            for path in (None, "chunked"):
                paths.last_path = None
                with paths.forced(path):
                    computed = _again(case, given, _observed, tally)
                if all(taken != "fused" for _, taken, _ in computed):
                    break
        if full:
            from .full import Run, beside, large

            large(home, [Run(nullcontext, _observed, tally)])
            beside(device, home, tally)
    return tally.rows()
