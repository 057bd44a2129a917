"""What ``full`` adds: large sizes against another implementation; on CUDA another stream, a graph, and times beside eager.

The judge of the large sizes is the reference in plain PyTorch, in float64 on the CPU: its sums are far from the kernels'
chunks, tiles and threads. Golden answers of such a size would not fit the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import reference
from .._engine import backend as _backend
from .._head_metrics import head_metrics, hessian_trace
from .._row_norms import row_norms
from .._unmasked_cross_entropy import unmasked_cross_entropy
from .battery import CALLS, FIELDS, NORMS, Tally, given_of, judge, raised
from .cases import battery_cases, inputs_of, integers, tensor
from .tolerance import Bound, cotangent_tolerance, derivative_error, rounded_gradient, tolerance, worst

HEADS = ((100_000, 64, 10), (1_000, 128, 1_000), (64, 64, 32_000))
"""N, D, C: more rows than a chunk of the CPU's takes; a large head; and a vocabulary."""
MATRICES = ((4_096, 1_000), (37, 20_001))
"""N, K: many rows; and rows that take more than one block of a device."""
LOGITS = ((20_000, 10), (64, 50_257))
_DTYPES = (torch.bfloat16, torch.float32)

Compare = Callable[[torch.dtype, torch.device], float]
"""Computes in a dtype on a device, and gives the largest error in tolerances."""


class Run(NamedTuple):
    """One backend and path: how to force it, how to name what ran, and where to note it."""

    force: Callable[[], AbstractContextManager[None]]
    path_of: Callable[[str], str]
    tally: Tally
    most_classes: float = math.inf


def large(home: torch.device, runs: Sequence[Run]) -> None:
    """Compare the large sizes on every backend and path, and note what was found."""
    works: list[tuple[str, Callable[..., Compare], tuple[int, ...]]] = []
    works += [("head_metrics", _head, shape) for shape in HEADS]
    works += [("head_metrics_backward", _gradient, shape) for shape in HEADS]
    works += [("row_norms", _norms, shape) for shape in MATRICES]
    works += [("unmasked_cross_entropy", _cotangent, shape) for shape in LOGITS]
    for stem, work, shape in works:
        compare = work(shape)
        seen: list[Tally] = []
        for force, path_of, tally, most in runs:
            if (stem.startswith("head") and shape[2] > most) or (path_of(stem) == "-" and tally in seen):
                continue
            seen.append(tally)
            for dtype in _DTYPES:
                name = f"{stem} of {' x '.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"
                try:
                    with force():
                        ratio = compare(dtype, home)
                        path = path_of(stem)
                    failure = None
                    if not ratio <= 1:
                        failure = f"{name}: wanted the reference's numbers, got {ratio:.3g} tolerances off"
                except Exception as error:
                    ratio, failure, path = math.inf, f"{name}: {raised(error)}", path_of(stem)
                tally.add(stem, path, 1, ratio, failure)


def _compare(got: Tensor, want: Tensor, bound: Bound) -> float:
    return worst("", got.detach().cpu().double().numpy(), want.numpy(), bound)[0]


def _at(x: np.ndarray, dtype: torch.dtype, home: torch.device) -> Tensor:
    made = tensor(x, dtype, home)
    assert made is not None
    return made


def _large_head(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Features and weight of few bits: logits are exact, and rows from unsure to a gap of some hundred."""
    n, d, c = shape
    x = integers(f"large x {shape}", (n, d), -7, 7) * np.resize([0.0078125, 0.0625, 0.25], n)[:, None]
    return x, integers(f"large w {shape}", (c, d), -31, 31) / 64


def _head(shape: tuple[int, ...]) -> Compare:
    """Every field, each row's label its top class."""
    x, w = _large_head(shape)
    wide = torch.from_numpy(x), torch.from_numpy(w)
    with _backend.backend("reference"):
        target = (wide[0] @ wide[1].T).argmax(dim=1)
        want = head_metrics(*wide, target)
    condition = 2 * np.linalg.norm(w, axis=1).max()  # no two rows of W are further apart
    condition = condition * np.exp((want.log_one_minus_confidence - want.log_feature_gradient_norm).numpy())
    bounds = {}
    for field in FIELDS[1:]:
        value = getattr(want, field).numpy()
        with np.errstate(divide="ignore", over="ignore"):
            linear, log = (np.exp(value), value) if field.startswith("log_") else (value, np.log(value))
        one = condition if field == "log_feature_gradient_norm" else 1.0
        bounds[field] = tolerance(field, linear, log, torch.float32, condition=one)
        bounds[field] += tolerance(field, linear, log, torch.float64, condition=one)

    def compare(dtype: torch.dtype, home: torch.device) -> float:
        got = head_metrics(_at(x, dtype, home), _at(w, dtype, home), target.to(home))
        right = torch.equal(got.prediction.cpu(), want.prediction)
        ratios = [_compare(getattr(got, field), getattr(want, field), bound) for field, bound in bounds.items()]
        return max(ratios) if right else math.inf

    return compare


def _gradient(shape: tuple[int, ...]) -> Compare:
    """The gradients of the sum of each row's log trace.

    d log t/dz_j = -2 p_j (p_j - sum p^2)/t, t = sum p (1 - p); an entry is held to the largest size of a sum of its terms'
    absolute values, in its row or in W, as ``tolerance.derivative_error`` has it for large heads.
    """
    n, _, c = shape
    arrays = _large_head(shape)

    def gradients(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        value = hessian_trace(x.requires_grad_(), w.requires_grad_(), reduction="none", log=True)
        return torch.autograd.grad(value, (x, w), torch.ones_like(value))

    phi, head = (torch.from_numpy(v) for v in arrays)
    with _backend.backend("reference"):
        want = gradients(phi.clone(), head.clone())
    z = phi @ head.T
    top = z.argmax(dim=1, keepdim=True)
    rest = (z - z.gather(1, top)).exp().scatter(1, top, 0.0)
    tau = rest.sum(dim=1, keepdim=True)
    others, epsilon, p_top = rest / (1 + tau), tau / (1 + tau), 1 / (1 + tau)
    of_others = others.square().sum(dim=1, keepdim=True)
    trace = p_top * epsilon + (others * (1 - others)).sum(dim=1, keepdim=True)
    sizes = 2 * others * (others + of_others + p_top.square()) / trace
    sizes = sizes.scatter(1, top, 2 * p_top * (p_top * epsilon + of_others) / trace)
    of_x = (sizes @ head.abs() + 2 * phi.abs() / phi.square().sum(dim=1, keepdim=True)).amax(dim=1, keepdim=True)
    of_w = (sizes.amax(dim=1) * phi.abs().amax(dim=1)).sum()
    error = derivative_error(torch.float32, c, n, 0.0, 0.0) + derivative_error(torch.float64, c, n, 0.0, 0.0)

    def compare(dtype: torch.dtype, home: torch.device) -> float:
        largest = 0.0
        got = gradients(*(_at(v, dtype, home) for v in arrays))
        for a, b, size in zip(got, want, (of_x, of_w), strict=True):
            allowed = rounded_gradient(b.numpy(), error * size.numpy(), dtype, torch.float32, 0.0)
            largest = max(largest, _compare(a, b, Bound(allowed, 0.0)))
        return largest

    return compare


def _norms(shape: tuple[int, ...]) -> Compare:
    x = integers(f"large {shape}", shape, -127, 127) / 16
    want = reference.row_norms(torch.from_numpy(x), tuple(NORMS))
    bound = tolerance("row_norm", None, None, torch.float32, terms=shape[1])
    bound += tolerance("row_norm", None, None, torch.float64, terms=shape[1])
    return lambda dtype, home: _compare(row_norms(_at(x, dtype, home), tuple(NORMS)), want, bound)


def _cotangent(shape: tuple[int, ...]) -> Compare:
    z = -integers(f"large {shape}", shape, 0, 127) / 4
    target = torch.from_numpy(integers(f"large y {shape}", shape[0], 0, shape[1] - 1))
    loss, _, cotangent = reference.unmasked_cross_entropy(torch.from_numpy(z), target, -100)
    with np.errstate(divide="ignore"):
        log = np.log(loss.numpy())
    bound = tolerance("loss", loss.numpy(), log, torch.float32) + tolerance("loss", loss.numpy(), log, torch.float64)

    def compare(dtype: torch.dtype, home: torch.device) -> float:
        logits = _at(z, dtype, home).requires_grad_()
        got = unmasked_cross_entropy(logits, target.to(home), reduction="none")
        (gradient,) = torch.autograd.grad(got, (logits,), torch.ones_like(got))
        own = cotangent_tolerance(dtype) + cotangent_tolerance(torch.float64)
        return max(_compare(got, loss, bound), _compare(gradient, cotangent, own))

    return compare


# ---------------------------------------------------------------------------------------------------------- CUDA alone
def beside(device: torch.device, home: torch.device, tally: Tally) -> None:
    """One call of each stem, and of each size of head, on a stream beside the current one, and replayed from a graph."""
    for case in battery_cases():
        if case.dtype != "float32" or case.classes not in (None, 10, 1500):
            continue
        for how in (_on_a_stream, _from_a_graph):
            try:
                given = given_of(case, inputs_of(case), home)
                found = how(device, lambda case=case, given=given: list(CALLS[case.stem](case, given)))  # type: ignore[misc]
                for stem, results in found:
                    ratio, failure = judge(case, results, True)
                    path = "-" if case.classes is None else "chunked"
                    if stem == "head_metrics" and case.classes == 10:
                        path = "fused"
                    where = "on another stream" if how is _on_a_stream else "from a graph"
                    tally.add(stem, path, 1, ratio, failure and f"{where}: {failure}")
            except Exception as error:
                path = "-" if case.classes is None else "chunked"
                tally.add(case.stem, path, 1, math.inf, f"{how.__name__.strip('_')} of {case.name}: {raised(error)}")


def _on_a_stream(device: torch.device, call: Callable[[], Any]) -> Any:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        found = call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    return found


def _from_a_graph(device: torch.device, call: Callable[[], Any]) -> Any:
    _on_a_stream(device, call)  # what a first call loads and allocates, in autograd's thread too, is not for a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        found = call()
    graph.replay()
    torch.cuda.synchronize(device)
    return found


def times(device: torch.device) -> list[str]:
    """Times of one call beside those of the usual formulas in eager PyTorch, on a CUDA device; a line each."""
    lines = []
    for n, d, c in HEADS:
        x, w = (_at(v, torch.float32, device) for v in _large_head((n, d, c)))

        def eager(x: Tensor = x, w: Tensor = w) -> Tensor:
            p = torch.softmax(x @ w.T, dim=1)
            return (x.square().sum(dim=1) * (p * (1 - p)).sum(dim=1)).mean()

        def own(x: Tensor = x, w: Tensor = w) -> Tensor:
            return hessian_trace(x, w)

        with torch.no_grad(), _backend.backend("native"):
            first, second = _milliseconds(own, device), _milliseconds(eager, device)
        lines.append(
            f"cuda:{device.index or 0}: hessian_trace of N={n} D={d} C={c}, float32: {first:.3f} ms, the usual formula "
            f"(inexact where confident) {second:.3f} ms, ratio {first / second:.2f}"
        )
    return lines


def _milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 20, rounds: int = 5) -> float:
    """The median of rounds of ``repeats`` calls in a row, a call."""
    found = []
    with torch.cuda.device(device):
        for _ in range(rounds + 1):  # the first is thrown away
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / repeats)
    return float(np.median(found[1:]))
