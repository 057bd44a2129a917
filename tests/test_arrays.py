"""Hostile arrays, as every argument: each gives the value of its plain copy, and none ends the process.

The arrays go through NumPy, or through an object that has DLPack alone and says nothing of its strides. All of them run in
one process of their own, so that an abort there is a failure here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flatcore
from flatcore._arguments.arrays import as_tensor


class Exchanged:
    """An array of a library that hides its strides: NumPy's memory through DLPack, in the older form or the newer."""

    def __init__(self, array: np.ndarray, versioned: bool = True):
        self.array, self.versioned = array, versioned

    def __dlpack__(self, **options: Any) -> Any:
        if not self.versioned:
            if options:
                raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
            return self.array.__dlpack__()
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __array_namespace__(self, **_: Any) -> Any:
        return np


def _misaligned(x: np.ndarray) -> np.ndarray:
    memory = np.empty(x.nbytes + 1, dtype=np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def _read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS = {
    "reversed": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "reversed in every dimension": lambda x: np.ascontiguousarray(np.flip(x))[(slice(None, None, -1),) * x.ndim],
    "columns reversed": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "every other": lambda x: np.repeat(x, 2, axis=0)[::2],
    "every other, from the end": lambda x: np.repeat(x[::-1], 2, axis=0)[::-2],
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "transposed": lambda x: np.asfortranarray(x),
    "misaligned": _misaligned,
    "misaligned and reversed": lambda x: _misaligned(x[::-1])[::-1],
    "read-only": _read_only,
    "read-only and reversed": lambda x: _read_only(x[::-1])[::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "big-endian and reversed": lambda x: x.astype(x.dtype.newbyteorder(">"))[::-1],
    "no rows": lambda x: x[:0],
    "no rows, reversed": lambda x: x[:0][::-1],
    "no rows, read-only": lambda x: _read_only(x[:0]),
}
ARGUMENTS = ("features", "linear_weight", "linear_bias", "logits", "weight", "target")
FORMS = ("numpy", "dlpack", "older dlpack")


def _given(dtype: str, labels: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    given: dict[str, np.ndarray] = {
        name: generator.normal(size=shape).astype(dtype)
        for name, shape in (("features", (7, 5)), ("linear_weight", (4, 5)), ("linear_bias", (4,)), ("logits", (7, 4)))
    }
    return given | {"weight": generator.random(4).astype(dtype), "target": generator.integers(0, 4, 7).astype(labels)}


def _check(layout: str, argument: str, form: str, dtype: str, labels: str) -> None:
    """The value with one hostile array is the value with its plain copy, or the same refusal by name."""
    given = _given(dtype, labels)
    hostile = LAYOUTS[layout](given[argument])
    plain = np.array(hostile.astype(hostile.dtype.newbyteorder("=")), order="C", copy=True)
    passed = hostile if form == "numpy" else Exchanged(hostile, form == "dlpack")
    alone = len(plain) == 0 and argument != "linear_weight"  # no rows of one argument: of the others none either
    if alone and argument in ("features", "target", "logits"):
        for name in ("features", "target", "logits"):
            given[name] = given[name][:0]
    for extra in ({}, {"reduction": "none"}):
        results = []
        for value in (plain, passed):
            try:
                results.append(np.asarray(flatcore.hessian_trace(**(given | {argument: value}), **extra)))
            except (TypeError, ValueError) as error:
                results.append((type(error), str(error)))
        if isinstance(results[1], tuple) and "DLPack" in results[1][1]:
            # what NumPy does not export is refused with NumPy's reason
            assert argument in results[1][1] and ("byte order" in results[1][1] or "readonly" in results[1][1])
            assert "big-endian" in layout or (form == "older dlpack" and ("read-only" in layout or "broad" in layout))
        elif isinstance(results[0], tuple):
            assert results[1] == results[0]
        else:
            np.testing.assert_array_equal(results[1], results[0])


def _check_all() -> int:
    count = 0
    for layout in LAYOUTS:
        for argument in ARGUMENTS:
            for form in FORMS:
                for dtype, labels in (("f4", "i8"), ("f8", "u1"), ("f2", "u4"), ("f4", "i2")):
                    try:
                        _check(layout, argument, form, dtype, labels)
                    except Exception as error:
                        raise AssertionError(f"{layout}, {argument}, {form}, {dtype}, {labels}") from error
                    count += 1
    return count


def test_hostile_arrays_in_a_process_of_their_own() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import test_arrays; print(test_arrays._check_all())"],
        env=_environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-3000:]}"
    assert int(done.stdout) == len(LAYOUTS) * len(ARGUMENTS) * len(FORMS) * 4


def _environment() -> dict[str, str]:
    here = Path(__file__).parent
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))}


def test_a_reversed_array_that_hides_its_strides_by_hand() -> None:
    """pytorch#188023: torch.from_dlpack ends the process there."""
    script = (
        "import numpy as np, flatcore, test_arrays as t\n"
        "x, w, y = np.array([[0., 9.], [3., 1.]])[::-1], np.eye(2)[::-1], np.array([0, 1])[::-1]\n"
        "want = flatcore.head_metrics(x.copy(), w.copy(), y.copy())\n"
        "got = flatcore.head_metrics(t.Exchanged(x), t.Exchanged(w), t.Exchanged(y))\n"
        "for a, b in zip(got, want):\n"
        "    assert type(a) is np.ndarray and (a == b).all(), (a, b)\n"
        "assert got.prediction.tolist() == [1, 0] and got.loss[0] < 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("versioned", (True, False))
def test_memory_is_shared_and_kept(versioned: bool) -> None:
    """No copy where torch can take the strides, and the array lives as long as the tensor."""
    array = np.arange(12.0).reshape(3, 4)[:, ::2]
    tensor = as_tensor(Exchanged(array, versioned), "features")
    assert tensor.data_ptr() == array.__array_interface__["data"][0] and tensor.stride() == (4, 2)
    count = sys.getrefcount(array)
    for _ in range(1000):
        as_tensor(Exchanged(array, versioned), "features")
    assert sys.getrefcount(array) == count
    want = torch.from_numpy(array.copy())
    del array
    np.zeros((3, 4))
    assert torch.equal(tensor, want)


@pytest.mark.parametrize("dtype", (np.bool_, np.complex64))
def test_other_dtypes_are_refused_by_name(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"features must have a floating dtype .* got DLPack type code"):
        flatcore.hessian_trace(Exchanged(np.zeros((2, 2), dtype)), np.eye(2))


def test_bfloat16_and_unsigned_words() -> None:
    class Tensors(Exchanged):
        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__()

    for dtype in (torch.bfloat16, torch.float16, torch.uint16, torch.uint32, torch.uint64, torch.int8):
        x = torch.arange(6).reshape(2, 3).to(dtype)
        got = as_tensor(Tensors(x), "features")
        assert got.dtype == dtype and torch.equal(got.to(torch.float64), x.to(torch.float64))


def test_a_tracer_is_refused_by_jit() -> None:
    class Tracer:
        def __dlpack__(self) -> Any:
            raise AssertionError("a tracer holds no numbers")

    Tracer.__module__ = "jax._src.core"
    kind = type("DynamicJaxprTracer", (Tracer,), {})
    with pytest.raises(TypeError, match=r"features is a JAX tracer .*jax\.jit"):
        flatcore.hessian_trace(kind(), np.eye(2))


def test_a_transposed_head_is_named() -> None:
    """scikit-learn's ``coefs_[-1]`` is (D, C)."""
    features, coefficients = np.zeros((7, 5)), np.zeros((5, 3))
    with pytest.raises(ValueError, match=r"linear_weight \(C, D\) of shape \(5, 3\) transposed\? .*linear_weight\.T"):
        flatcore.hessian_trace(features, coefficients)
    with pytest.raises(ValueError, match=r"got \(7, 4\)$"):
        flatcore.hessian_trace(features[:, :4], coefficients)


def test_a_method_instead_of_a_weight() -> None:
    with pytest.raises(TypeError, match=r"pass linear_weight\(\)\.dequantize\(\)"):
        flatcore.hessian_trace(np.zeros((7, 5)), torch.zeros(3).tolist)


class _Codes(torch.Tensor):
    """As quantising libraries make them: the type and shape of the weight, other numbers inside."""

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor) * 2


@pytest.mark.parametrize("argument", ("features", "linear_weight", "linear_bias", "logits", "weight"))
def test_a_quantized_subclass_is_named(argument: str) -> None:
    given = {name: torch.from_numpy(x) for name, x in _given("f4", "i8").items()}
    given[argument] = given[argument].as_subclass(_Codes)
    with pytest.raises(TypeError, match=rf"{argument} must be a plain tensor.*_Codes; pass {argument}\.dequantize\(\)"):
        flatcore.hessian_trace(**given)


def test_weights_without_values_are_named() -> None:
    features, weight = torch.zeros(2, 5), torch.zeros(3, 5)
    with pytest.raises(ValueError, match="linear_weight holds no values"):
        flatcore.hessian_trace(features, weight.to("meta"))
    with pytest.raises(ValueError, match="linear_bias holds no values"):
        flatcore.hessian_trace(features, weight, linear_bias=torch.zeros(3, device="meta"))
    with pytest.raises(ValueError, match="linear_weight must have values, got an UninitializedParameter of a lazy"):
        flatcore.hessian_trace(features, torch.nn.LazyLinear(3).weight)
    with pytest.raises(TypeError, match=r"float8_e4m3fn; its scale is not in it.*dequantize\(\)"):
        flatcore.hessian_trace(features, weight.to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"got torch\.int8: the codes of a quantized layer"):
        flatcore.hessian_trace(features, weight.to(torch.int8))
