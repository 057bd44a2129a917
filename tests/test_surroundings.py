"""What surrounds a call: lazy views, process-wide switches, a second import, copies of its results.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from calling import FUNCTIONS, C, N, Recorder, assert_all_close, assert_all_same, assert_summed_alike, problem
from torch import Tensor

import flatcore
from flatcore._check.tolerance import assert_same

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")


# ------------------------------------------------------------------------------------------------------- lazy views
def _negated(x: Tensor) -> Tensor:
    return torch._neg_view(-x)


def _imaginary(x: Tensor) -> Tensor:
    return torch.complex(torch.ones_like(x), -x).conj().imag


@pytest.mark.parametrize("view", (_negated, _imaginary))
@pytest.mark.parametrize("which", range(5), ids=("features", "linear_weight", "linear_bias", "logits", "weight"))
def test_negated_views(view: Callable[[Tensor], Tensor], which: int, engine: str) -> None:
    x, w, y = problem()
    given = [x, w, w[:, 0].clone(), torch.randn(N, C, generator=torch.Generator().manual_seed(9)), w[:, 1].abs()]

    def call(features: Tensor, linear_weight: Tensor, linear_bias: Tensor, logits: Tensor, weight: Tensor) -> Any:
        rest = {"linear_bias": linear_bias, "include_bias": True, "weight": weight}
        return (
            flatcore.hessian_trace(features, linear_weight, y, **rest),
            flatcore.relative_flatness(features, linear_weight, y, measure="neuronwise", logits=logits, **rest),
            flatcore.row_norms(features),
        )

    want = call(*given)
    given[which] = view(given[which])
    assert given[which].is_neg()
    assert_all_close(call(*given), want)


# ------------------------------------------------------------------------------------------- process-wide switches
@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _flush_denormal() -> Iterator[None]:
    assert torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def _matmul_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


SWITCHES: dict[str, Callable[[], Any]] = {
    "default-float64": lambda: _default_dtype(torch.float64),
    "default-float16": lambda: _default_dtype(torch.float16),
    "default-device": _default_device,
    "device-context": lambda: torch.device("meta"),
    "deterministic": _deterministic,
    "inference": torch.inference_mode,
    "no-grad": torch.no_grad,
    "flush-denormal": _flush_denormal,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "matmul-precision": _matmul_precision,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.crossed
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize("switch", SWITCHES)
def test_process_wide_switches_change_nothing(switch: str, dtype: torch.dtype, engine: str) -> None:
    # a default device is a mode, under which the operator runs and the library sums over the rows: in another order
    alike = assert_summed_alike if "device" in switch else assert_all_same
    given = problem(33, dtype=dtype)
    arrays = [x.float().numpy() if x.is_floating_point() else x.numpy() for x in given]
    want = {name: function(*given) for name, function in FUNCTIONS.items()}
    want_array = flatcore.hessian_trace(*arrays)
    with SWITCHES[switch]():
        got = {name: function(*given) for name, function in FUNCTIONS.items()}
        got_array = flatcore.hessian_trace(*arrays)
    for name in FUNCTIONS:
        alike(got[name], want[name])
    assert type(got_array) is type(want_array) and got_array.dtype == want_array.dtype
    alike(torch.from_numpy(np.asarray(got_array)), torch.from_numpy(np.asarray(want_array)))


def test_results_of_inference_mode_are_inference_tensors_and_inputs_may_be(engine: str) -> None:
    x, w, y = problem()
    want = flatcore.head_metrics(x, w, y)
    with torch.inference_mode():
        given = x.clone(), w.clone()
    assert given[0].is_inference()
    assert_all_same(flatcore.head_metrics(*given, y), want)


# ---------------------------------------------------------------------------------------------- the package, its values
def test_a_second_import_finds_the_operators() -> None:
    x, w, y = problem()
    want = flatcore.head_metrics(x, w, y)
    names = [name for name in sys.modules if name == "flatcore" or name.startswith("flatcore.")]
    kept = {name: sys.modules.pop(name) for name in names}
    try:
        for _ in range(2):
            again = importlib.import_module("flatcore")
            assert again is not flatcore
            assert_all_same(tuple(again.head_metrics(x, w, y)), tuple(want))
            with Recorder() as seen:
                again.row_norms(x)
            assert "flatcore.row_norms.default" in seen.names
            for name in names:
                sys.modules.pop(name, None)
    finally:
        for name in [name for name in sys.modules if name == "flatcore" or name.startswith("flatcore.")]:
            del sys.modules[name]
        sys.modules.update(kept)
    assert_all_same(flatcore.head_metrics(x, w, y), want)


@pytest.mark.parametrize("target", (False, True))
def test_metrics_survive_copies_and_pickles(target: bool) -> None:
    x, w, y = problem()
    metrics = flatcore.head_metrics(x, w, y if target else None)
    for again in (copy.copy(metrics), copy.deepcopy(metrics), pickle.loads(pickle.dumps(metrics))):
        assert type(again) is flatcore.HeadMetrics
        assert_all_same(again, metrics)
        assert_same("trace", again.hessian_trace, metrics.hessian_trace)
        assert (again.feature_gradient_norm is None) is (not target)


def test_results_own_their_memory_apart_from_the_inputs(engine: str) -> None:
    x, w, y = problem()
    before = x.clone(), w.clone(), y.clone()
    metrics = flatcore.head_metrics(x, w, y)
    inputs = {t.untyped_storage().data_ptr() for t in (x, w, y)}
    assert all(value.untyped_storage().data_ptr() not in inputs for value in metrics)
    for value in metrics:
        value.zero_()
    assert_all_same((x, w, y), before)
