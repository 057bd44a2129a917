"""Arrays of array-api-strict and jax: odd memory, odd dtypes, tracers; the same kind comes back.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import textbook
import torch

import flatcore

N, D, C = 12, 6, 4
ROOT = Path(__file__).parents[2]


def arrays() -> dict[str, np.ndarray]:
    r = np.random.default_rng(0)
    return {
        "features": r.normal(size=(N, D)).astype(np.float32),
        "linear_weight": r.normal(size=(C, D)).astype(np.float32),
        "target": r.integers(0, C, N),
    }


def right(given: dict[str, np.ndarray], name: str = "feature_gradient_norm") -> np.ndarray:
    x, w = (torch.from_numpy(np.array(given[k], dtype=np.float64)) for k in ("features", "linear_weight"))
    y = torch.from_numpy(np.array(given["target"], dtype=np.int64))
    return textbook.rows(name, x, w, None, y).numpy()


ODD: dict[str, Any] = {
    "reversed": lambda xp, a: xp.flip(xp.asarray(np.ascontiguousarray(a[::-1])), axis=0),
    "reversed view": lambda xp, a: xp.asarray(np.ascontiguousarray(a[::-1]))[::-1, ...],
    "every second": lambda xp, a: xp.asarray(np.repeat(a, 2, axis=0))[::2, ...],
    "every second from the end": lambda xp, a: xp.asarray(np.repeat(a[::-1], 2, axis=0))[::-2, ...],
    "transposed": lambda xp, a: xp.asarray(np.ascontiguousarray(a.T)).T if a.ndim == 2 else xp.asarray(a),
    "read-only": lambda xp, a: xp.asarray(_read_only(a)),
}


def _read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


# pytorch#188023: the strides are hidden from whoever does not ask the capsule, and torch ends the process on a negative one
WORKER = """
    import sys, warnings
    sys.path[:0] = {paths!r}
    warnings.simplefilter("ignore")
    import numpy as np, torch, flatcore
    import array_api_strict as xp
    import test_array_libraries as t
    given = t.arrays()
    for how, what in ((how, what) for how in t.ODD for what in given):
        print(how, what, flush=True)
        odd = {{k: xp.asarray(v) for k, v in given.items()}}
        odd[what] = t.ODD[how](xp, given[what])
        got = flatcore.feature_gradient_norms(**odd)
        assert type(got) is type(odd["features"]), type(got)
        np.testing.assert_allclose(np.asarray(got), t.right(given), rtol=2e-5)
        got = flatcore.relative_flatness(odd["features"], odd["linear_weight"], measure="neuronwise", reduction="none")
        np.testing.assert_allclose(np.asarray(got), t.right(given, "neuronwise"), rtol=2e-5)
        norms = flatcore.row_norms(odd["features"], ord=2)
        np.testing.assert_allclose(np.asarray(norms), np.linalg.norm(given["features"].astype(float), axis=1), rtol=1e-6)
        loss = flatcore.unmasked_cross_entropy(odd["features"], odd["target"], reduction="none")
        p = torch.from_numpy(given["features"]).double().log_softmax(1)
        want = -p[torch.arange(t.N), torch.from_numpy(given["target"])].numpy()
        np.testing.assert_allclose(np.asarray(loss), want, rtol=2e-5)
    print("all right")
"""


def test_array_api_arrays_with_odd_memory(array_api_strict: ModuleType) -> None:
    paths = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    script = textwrap.dedent(WORKER).format(paths=paths)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout.splitlines() or ["nothing"]
    assert done.returncode == 0 and said[-1] == "all right", (
        f"exit {done.returncode} at {said[-1]}: {done.stderr[:300]} ... {done.stderr[-1000:]}"
    )


def test_array_api_arrays_without_rows(array_api_strict: ModuleType) -> None:
    xp = array_api_strict
    got = flatcore.relative_flatness(xp.zeros((0, D)), xp.ones((C, D)), reduction="none")
    assert got.shape == (0,) and type(got) is type(xp.zeros(1))
    assert np.isnan(np.asarray(flatcore.relative_flatness(xp.zeros((0, D)), xp.ones((C, D)))))
    assert flatcore.row_norms(xp.zeros((0, D)), ord=2).shape == (0,)


@pytest.mark.parametrize("dtype", ("float32", "float64"))
@pytest.mark.parametrize("label", ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"))
def test_array_api_dtypes(array_api_strict: ModuleType, dtype: str, label: str) -> None:
    xp, given = array_api_strict, arrays()
    odd = {k: xp.asarray(given[k].astype(dtype)) for k in ("features", "linear_weight")}
    odd["target"] = xp.asarray(given["target"].astype(label))
    got = flatcore.feature_gradient_norms(**odd)
    assert got.dtype == getattr(xp, dtype)
    np.testing.assert_allclose(np.asarray(got), right(given), rtol=2e-5)


@pytest.mark.parametrize("kind", ("bool", "complex64"))
def test_array_api_dtypes_that_have_no_meaning(array_api_strict: ModuleType, kind: str) -> None:
    xp, given = array_api_strict, arrays()
    with pytest.raises(TypeError, match=r"features must have.*dtype"):
        flatcore.hessian_trace(
            xp.asarray(given["features"] > 0 if kind == "bool" else given["features"] * 1j), xp.ones((C, D))
        )


# ------------------------------------------------------------------------------------------------------------------ jax
@pytest.fixture
def jnp(jax: ModuleType) -> ModuleType:
    import jax.numpy

    return jax.numpy


@pytest.mark.parametrize("how", ("plain", "reversed", "every second", "transposed"))
@pytest.mark.parametrize("what", ("features", "linear_weight", "target"))
def test_jax_arrays(jnp: ModuleType, what: str, how: str) -> None:
    given = arrays()
    odd = {k: jnp.asarray(v) for k, v in given.items()}
    odd[what] = odd[what] if how == "plain" else ODD[how](jnp, given[what])
    got = flatcore.feature_gradient_norms(**odd)
    assert type(got) is type(odd["features"])
    np.testing.assert_allclose(np.asarray(got), right(given), rtol=textbook.FLOAT32)
    metrics = flatcore.head_metrics(**odd)
    np.testing.assert_allclose(np.asarray(metrics.neuronwise), right(given, "neuronwise"), rtol=textbook.FLOAT32)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float32", "float64"))
def test_jax_dtypes(jax: ModuleType, jnp: ModuleType, dtype: str) -> None:
    given = arrays()
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        odd = {k: jnp.asarray(given[k], dtype=dtype) for k in ("features", "linear_weight")}
        rounded = {k: np.asarray(v.astype("float64")) for k, v in odd.items()} | {"target": given["target"]}
        got = flatcore.feature_gradient_norms(**odd, target=jnp.asarray(given["target"]))
        assert got.dtype == ("float64" if dtype == "float64" else "float32")
        np.testing.assert_allclose(np.asarray(got), right(rounded), rtol=textbook.FLOAT32)


def test_an_empty_jax_array(jnp: ModuleType) -> None:
    assert flatcore.hessian_trace(jnp.zeros((0, D)), jnp.ones((C, D)), reduction="none").shape == (0,)


@pytest.mark.parametrize("transform", ("jit", "grad", "vmap"))
def test_a_jax_tracer_is_refused_by_its_name(jax: ModuleType, jnp: ModuleType, transform: str) -> None:
    features, weight = jnp.ones((N, D)), jnp.ones((C, D))

    def measure(x: Any) -> Any:
        return flatcore.hessian_trace(x, weight)

    with pytest.raises(TypeError, match=r"(?s)features.*(jit|grad|vmap|trac)"):
        getattr(jax, transform)(measure)(features)
    with pytest.raises(TypeError, match=r"(?s)linear_weight.*(jit|grad|vmap|trac)"):
        jax.jit(lambda w: flatcore.hessian_trace(features, w))(weight)


def test_kinds_mixed_in_one_call(jnp: ModuleType, array_api_strict: ModuleType) -> None:
    given, xp = arrays(), array_api_strict
    got = flatcore.feature_gradient_norms(
        jnp.asarray(given["features"]), torch.from_numpy(given["linear_weight"]), xp.asarray(given["target"])
    )
    assert type(got) is type(jnp.ones(1))
    np.testing.assert_allclose(np.asarray(got), right(given), rtol=textbook.FLOAT32)


def test_bfloat16_arrays_of_numpy(ml_dtypes: ModuleType) -> None:
    """Numbers that NumPy itself cannot name: right, or a refusal that says what to do."""
    given = arrays()
    odd = {k: given[k].astype(ml_dtypes.bfloat16) for k in ("features", "linear_weight")}
    rounded = {k: v.astype(np.float64) for k, v in odd.items()} | {"target": given["target"]}
    try:
        got = flatcore.feature_gradient_norms(**odd, target=given["target"])
    except TypeError as error:
        assert "got numpy dtype bfloat16" in str(error) and "float32" in str(error), error
    else:
        np.testing.assert_allclose(got, right(rounded), rtol=textbook.FLOAT32)
