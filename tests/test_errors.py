"""Bad input: each refusal by its type and its words, and the edge rules, on every implementation.

Letters: N rows, D features, C classes. N = 4, D = 3, C = 5 unless a test says otherwise.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from processes import leave_process_group
from tolerance import assert_within, tolerance
from torch import Tensor
from torch.autograd import forward_ad

import flatcore
from flatcore._engine import paths

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

N, D, C = 4, 3, 5
INF, NAN = math.inf, math.nan
FLOATS = "float16, bfloat16, float32 or float64"
ENGINES = ("reference", "fused", "chunked")
# make_dual loads torch's own scripted decompositions, which warn of torch.jit.script's end
FORWARD_AD = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

# what is refused before a path is chosen is the same on both
CHECKED_FIRST = pytest.mark.parametrize("engine", ("reference", "fused"), indirect=True)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Implementation that is forced; a test may stop before it has run."""
    if request.param == "reference":
        with flatcore.backend("reference"):
            yield request.param
        return
    with flatcore.backend("native"), paths.forced(path=request.param):
        yield request.param


def refuses(kind: type[Exception], words: tuple[str, ...], call: Callable[[], Any]) -> None:
    """Require the exception's exact type and every word in its message."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in the message: {caught.value}"


def arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of hessian_trace that are right, and the changes."""
    g = torch.Generator().manual_seed(11)
    features, weight, bias = (torch.randn(*s, generator=g) for s in ((N, D), (C, D), (C,)))
    right = {
        "features": features,
        "linear_weight": weight,
        "target": torch.tensor([0, 4, 2, 1]),
        "linear_bias": bias,
        "logits": features @ weight.T + bias,
        "weight": torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0]),
    }
    return right | changes


def trace_with(name: str, change: Callable[[Tensor], Any]) -> Callable[[], Any]:
    """Return a call of hessian_trace with one argument replaced by what ``change`` makes of it."""
    right = arguments()
    changed = right | {name: change(right[name])}
    return lambda: flatcore.hessian_trace(**changed)


def gradients_with(**changes: Any) -> Any:
    """Call feature_gradient_norms with some arguments changed."""
    right = arguments()
    del right["weight"]
    return flatcore.feature_gradient_norms(**(right | changes))


# ------------------------------------------------------------------------------------- what no tensor argument may be
def _quiet(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Build a tensor of a kind whose constructor warns that it is a prototype or about to go."""

    def build(x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(x)

    return build


def _freed(nbytes: int) -> Callable[[Tensor], Tensor]:
    def build(x: Tensor) -> Tensor:
        x = x.clone()
        x.untyped_storage().resize_(nbytes)
        return x

    return build


def _numpy(dtype: Any) -> Callable[[Tensor], np.ndarray]:
    return lambda x: np.zeros(tuple(x.shape), dtype=dtype)


ARRAY = "a torch.Tensor, a numpy.ndarray or an array with __dlpack__"
KINDS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], tuple[str, ...]]] = {
    "list": (lambda x: x.tolist(), TypeError, (ARRAY, "builtins.list")),
    "number": (lambda x: 1.5, TypeError, (ARRAY, "builtins.float")),
    "string": (lambda x: "features", TypeError, (ARRAY, "builtins.str")),
    "numpy-scalar": (lambda x: np.float32(1), TypeError, (ARRAY, "numpy.float32")),
    "complex": (lambda x: x.to(torch.complex64), TypeError, ("got torch.complex64",)),
    "conjugate-view": (lambda x: x.to(torch.complex64).conj(), TypeError, ("got torch.complex64",)),
    "bool": (lambda x: x > 0, TypeError, ("got torch.bool",)),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), TypeError, ("got torch.float8_e4m3fn",)),
    "quantized": (
        _quiet(lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)),
        TypeError,
        ("must not be quantized", "qint8", ".dequantize()"),
    ),
    "nested": (_quiet(lambda x: torch.nested.nested_tensor([x, x])), TypeError, ("dense", "nested", ".values()")),
    "jagged": (
        _quiet(lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged)),
        TypeError,
        ("dense", "nested", ".values()"),
    ),
    "coo": (lambda x: x.to_sparse(), ValueError, ("strided", "got torch.sparse_coo", ".to_dense()")),
    "csr": (
        _quiet(lambda x: x.reshape(x.shape[0], -1).to_sparse_csr()),
        ValueError,
        ("strided", "got torch.sparse_csr", ".to_dense()"),
    ),
    "mkldnn": (lambda x: x.float().to_mkldnn(), ValueError, ("strided", "got torch._mkldnn", ".to_dense()")),
    "freed": (_freed(0), ValueError, ("must own its memory", "0 bytes", "FSDP")),
    "half-freed": (_freed(4), ValueError, ("must own its memory", "4 bytes", "FSDP")),
    "numpy-bool": (_numpy(bool), TypeError, ("float16, float32, float64", "got numpy dtype bool")),
    "numpy-complex": (_numpy(np.complex64), TypeError, ("float16, float32, float64", "got numpy dtype complex64")),
    "numpy-longdouble": (_numpy(np.longdouble), TypeError, ("float16, float32, float64", "got numpy dtype float128")),
    "numpy-object": (_numpy(object), TypeError, ("float16, float32, float64", "got numpy dtype object")),
    "numpy-string": (_numpy("U3"), TypeError, ("float16, float32, float64", "got numpy dtype <U3")),
    "numpy-struct": (_numpy([("a", "f4")]), TypeError, ("float16, float32, float64", "got numpy dtype [('a'")),
    "numpy-date": (_numpy("M8[s]"), TypeError, ("float16, float32, float64", "got numpy dtype datetime64[s]")),
    "masked": (lambda x: np.ma.masked_array(x.numpy()), TypeError, ("plain array", "masked", "mask")),
}
FLOATING_KINDS = {
    # labels may be of any integer type, as NumPy's are
    "uint16": (lambda x: x.abs().to(torch.uint16), TypeError, (FLOATS, "got torch.uint16")),
    "int64": (lambda x: x.long(), TypeError, (FLOATS, "got torch.int64")),
    "uint8": (lambda x: x.abs().to(torch.uint8), TypeError, (FLOATS, "got torch.uint8")),
    "numpy-int": (_numpy(np.int32), TypeError, (FLOATS, "got torch.int32")),
}
LEARNING_KINDS = {
    "requires-grad": (
        lambda x: x.clone().requires_grad_(),
        ValueError,
        ("requires gradient", ".detach()", "torch.no_grad()"),
    ),
    "parameter": (torch.nn.Parameter, ValueError, ("requires gradient", ".detach()", "torch.no_grad()")),
}
FLOATING = ("features", "linear_weight", "linear_bias", "logits", "weight")


@CHECKED_FIRST
@pytest.mark.parametrize("name", (*FLOATING, "target"))
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_another_kind(name: str, kind: str, engine: str) -> None:
    change, error, words = KINDS[kind]
    refuses(error, (name, *words), trace_with(name, change))


@CHECKED_FIRST
@pytest.mark.parametrize("name", FLOATING)
@pytest.mark.parametrize("kind", FLOATING_KINDS)
def test_floating_arguments_take_floats(name: str, kind: str, engine: str) -> None:
    change, error, words = FLOATING_KINDS[kind]
    refuses(error, (name, *words), trace_with(name, change))


@CHECKED_FIRST
@pytest.mark.parametrize("kind", LEARNING_KINDS)
def test_what_has_no_derivative_takes_no_tensor_that_requires_gradient(kind: str, engine: str) -> None:
    change, error, words = LEARNING_KINDS[kind]
    refuses(error, ("weight", *words), trace_with("weight", change))
    right = arguments()
    soft = change(torch.full((N, C), 1.0 / C))
    refuses(error, ("target", *words), lambda: flatcore.hessian_trace(**(right | {"target": soft})))
    given = {name: right[name] for name in ("features", "linear_weight", "target", "linear_bias", "logits")}
    for name in ("features", "linear_weight", "linear_bias", "logits"):
        learning = given | {name: change(given[name])}
        refuses(error, (name, *words), lambda learning=learning: flatcore.head_metrics(**learning))


@CHECKED_FIRST
@pytest.mark.parametrize("kind", (*KINDS, *FLOATING_KINDS, *LEARNING_KINDS))
def test_row_norms_refuses_the_same(kind: str, engine: str) -> None:
    change, error, words = (KINDS | FLOATING_KINDS | LEARNING_KINDS)[kind]
    x = change(arguments()["features"])
    refuses(error, ("x ", *words), lambda: flatcore.row_norms(x))


@pytest.mark.parametrize("name", ("features", "linear_weight"))
def test_features_and_head_are_needed(name: str, engine: str) -> None:
    refuses(TypeError, (name, ARRAY, "NoneType"), trace_with(name, lambda x: None))


def test_no_gradient_is_needed_under_no_grad(engine: str) -> None:
    right = arguments()
    expected = flatcore.hessian_trace(**right)
    learning = {name: right[name].clone().requires_grad_() for name in FLOATING}
    with torch.no_grad():
        assert torch.equal(flatcore.hessian_trace(**(right | learning)), expected)
    with torch.inference_mode():
        assert torch.equal(flatcore.hessian_trace(**(right | learning)), expected)
    detached = {name: value.detach() for name, value in learning.items()}
    got = flatcore.hessian_trace(**(right | detached))
    assert torch.equal(got, expected) and not got.requires_grad
    for name in ("features", "linear_weight", "linear_bias"):
        assert flatcore.hessian_trace(**(right | {"logits": None, name: learning[name]})).requires_grad


@FORWARD_AD
@pytest.mark.parametrize("name", (*FLOATING, "x"))
def test_no_forward_tangent_is_dropped(name: str, engine: str) -> None:
    right = arguments()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(right[name if name in right else "features"], torch.ones_like(right["features"])
                                    if name == "x" else torch.ones_like(right[name]))  # fmt: skip
        words = (name, "forward-mode tangent", "unpack_dual")
        if name == "x":
            refuses(ValueError, words, lambda: flatcore.row_norms(dual))
        else:
            refuses(ValueError, words, lambda: flatcore.hessian_trace(**(right | {name: dual})))
            primal = forward_ad.unpack_dual(dual).primal
            assert torch.equal(flatcore.hessian_trace(**(right | {name: primal})), flatcore.hessian_trace(**right))


@FORWARD_AD
def test_forward_mode_derivatives_are_refused() -> None:
    right = arguments()

    def trace(features: Tensor) -> Tensor:
        return flatcore.hessian_trace(**(right | {"features": features}))

    phi = right["features"]
    refuses(ValueError, ("features", "tangent"), lambda: torch.func.jvp(trace, (phi,), (phi,)))


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            yield init_device_mesh("cpu", (1,))
        finally:
            leave_process_group()


@CHECKED_FIRST
@pytest.mark.parametrize("name", (*FLOATING, "target", "x"))
def test_no_shard_of_a_distributed_tensor(name: str, mesh: Any, engine: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    right = arguments()
    words = (name, "plain tensor", "DTensor", f"{name}.full_tensor()")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shard = distribute_tensor(right.get(name, right["features"]), mesh, [Shard(0)])
    if name == "x":
        refuses(TypeError, words, lambda: flatcore.row_norms(shard))
    else:
        refuses(TypeError, words, lambda: flatcore.hessian_trace(**(right | {name: shard})))


# --------------------------------------------------------------------------------------------------- shapes and devices
SHAPES: dict[str, tuple[str, Callable[[Tensor], Any], tuple[str, ...]]] = {
    "features-scalar": ("features", lambda x: x[0, 0], ("(..., D)", "D = 3", "got ()")),
    "features-width": ("features", lambda x: x[:, :2], ("(..., D)", "D = 3", "got (4, 2)")),
    "features-no-width": ("features", lambda x: x[:, :0], ("(..., D)", "D = 3", "got (4, 0)")),
    "weight-vector": ("linear_weight", lambda x: x[0], ("2-dimensional (C, D)", "got shape (3,)")),
    "weight-batch": ("linear_weight", lambda x: x[None], ("2-dimensional (C, D)", "got shape (1, 5, 3)")),
    "no-class": ("linear_weight", lambda x: x[:0], ("at least one row", "C = 0")),
    "bias-length": ("linear_bias", lambda x: x[:4], ("(C,) = (5,)", "got (4,)")),
    "bias-column": ("linear_bias", lambda x: x[:, None], ("(C,) = (5,)", "got (5, 1)")),
    "logits-classes": ("logits", lambda x: x[:, :4], ("(4, 5)", "got (4, 4)")),
    "logits-rows": ("logits", lambda x: x[:3], ("(4, 5)", "got (3, 5)")),
    "logits-flat": ("logits", lambda x: x.flatten(), ("(4, 5)", "got (20,)")),
    "class-weight-length": ("weight", lambda x: x[:4], ("(C,) = (5,)", "got (4,)")),
    "target-rows": ("target", lambda x: x[:3], ("leading shape (4,)", "got (3,)")),
    "target-column": ("target", lambda x: x[:, None], ("leading shape (4,)", "got (4, 1)")),
    "target-scalar": ("target", lambda x: x[0], ("leading shape (4,)", "got ()")),
    "target-one-hot-of-integers": (
        "target", lambda x: torch.nn.functional.one_hot(x, C), ("leading shape (4,)", "got (4, 5)"),
    ),
    "soft-target-classes": ("target", lambda x: torch.full((N, 4), 0.25), ("soft target", "(4, 5)", "got (4, 4)")),
    "soft-target-of-labels": ("target", lambda x: x.float(), ("soft target", "(4, 5)", "got (4,)")),
}  # fmt: skip


@CHECKED_FIRST
@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case: str, engine: str) -> None:
    name, change, words = SHAPES[case]
    refuses(ValueError, (name, *words), trace_with(name, change))


@CHECKED_FIRST
@pytest.mark.parametrize("shape", ((), (3,), (2, 3, 4)))
def test_row_norms_takes_a_matrix(shape: tuple[int, ...], engine: str) -> None:
    refuses(ValueError, ("x must be 2-dimensional", str(shape)), lambda: flatcore.row_norms(torch.zeros(shape)))


@pytest.mark.parametrize("name", ("linear_weight", "linear_bias", "logits", "weight", "target"))
def test_devices_are_not_mixed(name: str, engine: str) -> None:
    words = (name, "device of features (cpu)", "got meta")
    refuses(ValueError, words, trace_with(name, lambda x: x.to("meta")))
    if name == "linear_weight":
        words = ("linear_weight", "device of features (meta)", "got cpu")
        refuses(ValueError, words, trace_with("features", lambda x: x.to("meta")))


def test_meta_tensors_give_meta_results(engine: str) -> None:
    right = arguments()
    meta = {name: value.to("meta") for name, value in right.items()}
    for reduction in ("mean", "sum", "none"):
        got = flatcore.hessian_trace(**meta, reduction=reduction)
        want = flatcore.hessian_trace(**right, reduction=reduction)
        assert (got.device.type, got.shape, got.dtype) == ("meta", want.shape, want.dtype)
    assert flatcore.row_norms(meta["features"]).device.type == "meta"


# --------------------------------------------------------------------------------------------------------------- labels
LABELS = {"minus-one": -1, "C": C, "minus-C": -C, "unsigned-wrap": 255, "huge": 2**62, "lowest": -(2**63)}
LABELLED: dict[str, Callable[[Tensor], Any]] = {
    "head_metrics": lambda y: flatcore.head_metrics(*_head(), y),
    "hessian_trace": lambda y: flatcore.hessian_trace(*_head(), y),
    "hessian_trace-weighted": lambda y: flatcore.hessian_trace(*_head(), y, weight=torch.ones(C)),
    "relative_flatness": lambda y: flatcore.relative_flatness(*_head(), y),
    "neuronwise": lambda y: flatcore.relative_flatness(*_head(), y, measure="neuronwise"),
    "feature_gradient_norms": lambda y: flatcore.feature_gradient_norms(*_head(), y),
}


def _head() -> tuple[Tensor, Tensor]:
    right = arguments()
    return right["features"], right["linear_weight"]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("function", LABELLED)
def test_a_label_that_is_no_class(function: str, label: str, engine: str) -> None:
    target = torch.tensor([0, 4, LABELS[label], 1])
    words = ("target", "0..4", "ignore_index (-100)", str(LABELS[label]))
    refuses(ValueError, words, lambda: LABELLED[function](target))


def test_the_default_ignored_label_is_bad_where_another_is_ignored(engine: str) -> None:
    target = torch.tensor([0, -100, 1, 2])
    refuses(
        ValueError,
        ("target", "0..4", "ignore_index (0)", "-100"),
        lambda: flatcore.feature_gradient_norms(*_head(), target, ignore_index=0),
    )


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
def test_integer_labels_of_any_width(dtype: torch.dtype, engine: str) -> None:
    right = arguments()
    del right["weight"]
    expected = flatcore.head_metrics(**right).loss
    assert torch.equal(flatcore.head_metrics(**(right | {"target": right["target"].to(dtype)})).loss, expected)
    spread = torch.stack([right["target"].to(dtype)] * 2, dim=1)[:, 0]
    assert not spread.is_contiguous()
    assert torch.equal(flatcore.head_metrics(**(right | {"target": spread})).loss, expected)
    for order in "<>":
        array = right["target"].to(dtype).numpy()
        array = array.astype(array.dtype.newbyteorder(order))
        assert torch.equal(flatcore.head_metrics(**(right | {"target": array})).loss, expected)


def test_an_unsigned_label_beyond_int64_does_not_wrap(engine: str) -> None:
    target = np.array([0, 2**64 - 100, 1, 2], dtype=np.uint64)  # as int64 it would read -100, the ignored label
    refuses(ValueError, ("target", "int64", str(2**64 - 100)), lambda: flatcore.hessian_trace(*_head(), target))


@pytest.mark.parametrize("ignore_index", (-100, 0, 3, 2**40))
def test_ignored_rows_count_nothing(ignore_index: int, engine: str) -> None:
    right = arguments(weight=None)
    features = right["features"].clone()
    features[1] = NAN  # a NaN in an ignored row stays out
    target = torch.tensor([1, ignore_index, 2, 4])
    kept = torch.tensor([0, 2, 3])
    common = {name: right[name] for name in ("linear_weight", "linear_bias")}
    all_rows = {"features": features, "target": target, "ignore_index": ignore_index} | common
    some = {"features": features[kept], "target": target[kept]} | common
    for function in (flatcore.hessian_trace, flatcore.relative_flatness, flatcore.feature_gradient_norms):
        for reduction in ("mean", "sum"):
            got, want = function(**all_rows, reduction=reduction), function(**some, reduction=reduction)
            assert_within(function.__name__, got, want.double().numpy(), tolerance("layerwise", 1.0, 0.0, want.dtype))
        assert function(**all_rows, reduction="none")[1] == 0
        assert function(**all_rows, reduction="none", log=True)[1] == -INF
    metrics = flatcore.head_metrics(**all_rows)
    assert (
        metrics.loss[1] == 0 and metrics.log_feature_gradient_norm[1] == -INF and metrics.feature_gradient_norm[1] == 0
    )
    assert metrics.prediction[1] == -1 and metrics.log_hessian_trace[1].isnan()


def test_nothing_valid_has_no_mean(engine: str) -> None:
    target = torch.full((N,), -100)
    for function in (flatcore.hessian_trace, flatcore.relative_flatness, flatcore.feature_gradient_norms):
        for log in (False, True):
            assert function(*_head(), target, reduction="mean", log=log).isnan()
        assert function(*_head(), target, reduction="sum") == 0
    for weight in (torch.zeros(C), torch.tensor([0.0, 1, 1, 1, 1])):
        got = flatcore.hessian_trace(*_head(), torch.zeros(N, dtype=torch.long), weight=weight)
        assert got.isnan()


# --------------------------------------------------------------------------------------------------------- soft targets
def test_soft_targets_weigh_the_samples(engine: str) -> None:
    right = arguments()
    soft = torch.rand(N, C, generator=torch.Generator().manual_seed(2))
    common = {name: right[name] for name in ("features", "linear_weight", "linear_bias")}
    each = flatcore.hessian_trace(**common, reduction="none").double()
    for weight in (None, right["weight"]):
        s = (soft.double() * (1 if weight is None else weight.double())).sum(dim=1)
        bound = tolerance("hessian_trace", 1.0, 0.0, torch.float32)
        for reduction, want in (("none", s * each), ("sum", (s * each).sum()), ("mean", (s * each).sum() / N)):
            got = flatcore.hessian_trace(**common, target=soft, weight=weight, reduction=reduction)
            assert_within(reduction, got, want.numpy(), bound, torch.float32)


@pytest.mark.parametrize("function", (flatcore.feature_gradient_norms, flatcore.head_metrics))
def test_soft_targets_are_refused_by_name_where_a_label_is_meant(function: Callable[..., Any], engine: str) -> None:
    words = ("target", "integer class labels", "torch.float32", "soft targets", "hessian_trace and relative_flatness")
    refuses(TypeError, words, lambda: function(*_head(), torch.full((N, C), 0.2)))


def test_negative_soft_targets(engine: str) -> None:
    soft = torch.full((N, C), 0.25)
    soft[2, 1] = -0.5
    refuses(ValueError, ("soft target", "negative", "-0.5"), lambda: flatcore.hessian_trace(*_head(), soft))
    soft.requires_grad_()
    refuses(ValueError, ("target", "target.detach()"), lambda: flatcore.hessian_trace(*_head(), soft))


def test_gradients_need_labels(engine: str) -> None:
    refuses(ValueError, ("target", "None"), lambda: flatcore.feature_gradient_norms(*_head(), None))


# ------------------------------------------------------------------------------------------------- weights and the bias
def test_negative_class_weights(engine: str) -> None:
    weight = torch.tensor([1.0, 1.0, -0.25, 1.0, 1.0])
    refuses(ValueError, ("weight", "negative", "-0.25"), lambda: flatcore.hessian_trace(**arguments(weight=weight)))


def test_class_weights_need_a_target(engine: str) -> None:
    words = ("weight", "needs a target", "target=None")
    refuses(ValueError, words, lambda: flatcore.hessian_trace(**arguments(target=None)))


def test_a_weight_of_zero_keeps_a_nan_out(engine: str) -> None:
    right = arguments(logits=None)
    right["features"][2] = NAN  # its label, 2, has weight 0
    assert flatcore.hessian_trace(**right).isfinite()
    assert flatcore.hessian_trace(**right, reduction="none")[2] == 0
    assert flatcore.hessian_trace(**right, reduction="none", log=True)[2] == -INF


def test_include_bias_needs_a_finite_bias(engine: str) -> None:
    right = arguments(include_bias=True)
    words = ("include_bias", "linear_bias", "None")
    refuses(ValueError, words, lambda: flatcore.hessian_trace(**(right | {"linear_bias": None})))
    refuses(ValueError, words, lambda: flatcore.relative_flatness(**(right | {"linear_bias": None})))
    masked = right["linear_bias"].clone()
    masked[3] = -INF
    for function in (flatcore.hessian_trace, flatcore.relative_flatness):
        refuses(
            ValueError, ("linear_bias", "finite", "-inf"), lambda f=function: f(**(right | {"linear_bias": masked}))
        )
    assert flatcore.hessian_trace(**(right | {"linear_bias": masked, "include_bias": False})).isfinite()


# -------------------------------------------------------------------------------------------------------------- options
TRACE, FLATNESS, GRADIENT = "hessian_trace", "relative_flatness", "feature_gradient_norms"
OPTIONS: dict[str, tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = {}
for _value in (3, 0, 1.5, "2", True, None, (2,)):
    OPTIONS[f"norm_power {_value!r}"] = FLATNESS, {"norm_power": _value}, ValueError, ("1, 2", repr(_value))
OPTIONS["norm_power with neuronwise"] = (
    FLATNESS, {"norm_power": 1, "measure": "neuronwise"}, ValueError, ("norm_power must be 2", "neuronwise", "got 1"),
)  # fmt: skip
for _value in ("Layerwise", "", None, 1, ["layerwise"]):
    OPTIONS[f"measure {_value!r}"] = (
        FLATNESS,
        {"measure": _value},
        ValueError,
        ("'layerwise', 'neuronwise'", repr(_value)),
    )
for _function in (TRACE, FLATNESS, GRADIENT):
    for _value in ("average", "Mean", None, True, 0, ("mean",)):
        OPTIONS[f"{_function} reduction {_value!r}"] = (
            _function, {"reduction": _value}, ValueError, ("reduction", "'mean', 'sum', 'none'", repr(_value)),
        )  # fmt: skip
    for _value in (1, 0, None, "yes", np.True_, torch.tensor(True)):
        OPTIONS[f"{_function} log {_value!r}"] = (
            _function, {"log": _value}, TypeError, ("log must be True or False", type(_value).__name__),
        )  # fmt: skip
    for _value in (0, 0.0, -1, -0.5, NAN, INF, -INF):
        OPTIONS[f"{_function} temperature {_value!r}"] = (
            _function, {"temperature": _value}, ValueError, ("temperature must be finite and above 0", repr(_value)),
        )  # fmt: skip
    for _value in (True, "1", None, 1j, [1.0], torch.tensor(1.0)):
        OPTIONS[f"{_function} temperature {_value!r}"] = (
            _function, {"temperature": _value}, TypeError, ("temperature must be a number", type(_value).__name__),
        )  # fmt: skip
    for _value in (1.0, "0", None, True, torch.tensor(0)):
        OPTIONS[f"{_function} ignore_index {_value!r}"] = (
            _function, {"ignore_index": _value}, TypeError, ("ignore_index must be an integer", type(_value).__name__),
        )  # fmt: skip
    OPTIONS[f"{_function} ignore_index 2**70"] = (
        _function,
        {"ignore_index": 2**70},
        ValueError,
        ("ignore_index", "int64"),
    )
    OPTIONS[f"{_function} temperature 10**400"] = (
        _function, {"temperature": 10**400}, ValueError, ("temperature must be finite",),
    )  # fmt: skip
for _value in (0, 3, -1, -INF, NAN, "fro", None, True, (1, 2), [2]):
    OPTIONS[f"ord {_value!r}"] = GRADIENT, {"ord": _value}, ValueError, ("ord", "1, 2, inf", repr(_value))
for _value in (1, None, "yes"):
    OPTIONS[f"include_bias {_value!r}"] = (
        TRACE, {"include_bias": _value}, TypeError, ("include_bias must be True or False", type(_value).__name__),
    )  # fmt: skip


@CHECKED_FIRST
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, engine: str) -> None:
    function, changes, error, words = OPTIONS[option]
    given = arguments()
    if function == GRADIENT:
        del given["weight"]
    refuses(error, words, lambda: getattr(flatcore, function)(**(given | changes)))


@CHECKED_FIRST
@pytest.mark.parametrize("ord", (0, 3, -INF, NAN, "2", "l3", "-inf", True, None, [1, 2], (), (1, 3), (2, "l")))
def test_row_norms_orders(ord: Any, engine: str) -> None:
    refuses(ValueError, ("ord", "1, 2, inf"), lambda: flatcore.row_norms(torch.ones(2, 2), ord))


def test_a_subnormal_temperature_is_refused_or_right() -> None:
    # 1/T leaves float64's range below 5.6e-309
    right = arguments(temperature=1e-310, reduction="none", log=True)
    answers = []
    for engine in ENGINES:
        path = None if engine == "reference" else engine
        with flatcore.backend("reference" if path is None else "native"), paths.forced(path=path):
            try:
                answers.append(flatcore.hessian_trace(**right))
            except ValueError as error:
                assert "temperature" in str(error)
                answers.append(torch.full((N,), -1.0))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert not answers[0].isnan().any()


def test_an_unknown_backend() -> None:
    before = flatcore.show_config()["backend"]
    for value in ("nonsense", "", None, 1, ["auto"]):
        words = ("backend", "'auto', 'native', 'reference'", repr(value))
        refuses(ValueError, words, lambda value=value: flatcore.backend(value))
    assert flatcore.show_config()["backend"] == before


def test_an_unknown_path_or_target() -> None:
    def enter(**given: str) -> None:
        with paths.forced(**given):
            pass

    refuses(ValueError, ("path", "'fused', 'chunked'", "'quick'"), lambda: enter(path="quick"))
    refuses(ValueError, ("baseline, avx2, avx512", "'neon'"), lambda: enter(cpu="neon"))


ENVIRONMENT = {
    "backend": ({"FLATCORE_BACKEND": "fast"}, ("ValueError", "backend", "'auto', 'native', 'reference'", "'fast'")),
    "target": ({"FLATCORE_CPU": "neon"}, ("ValueError", "FLATCORE_CPU", "baseline, avx2, avx512", "'neon'")),
}


@pytest.mark.parametrize("case", ENVIRONMENT)
def test_a_wrong_environment_stops_the_import(case: str) -> None:
    variables, words = ENVIRONMENT[case]
    run = subprocess.run(
        [sys.executable, "-c", "import flatcore"],
        env=os.environ | variables, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    last_line = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and all(word in last_line for word in words), run.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    (
        ({"FLATCORE_BACKEND": "reference"}, "reference reference"),
        ({"FLATCORE_BACKEND": ""}, "auto native"),
        ({"FLATCORE_CPU": "baseline", "FLATCORE_BACKEND": "native"}, "native native baseline"),
    ),
)
def test_the_environment_chooses(variables: dict[str, str], expected: str) -> None:
    script = "import flatcore; c = flatcore.show_config(); print(c['backend'], c['cpu_backend'], c['cpu_target'])"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | variables, capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert run.stdout.startswith(expected), run.stdout


# ---------------------------------------------------------------------------------------------- arrays of other libraries
class Exchanged:
    """An array of a library that only speaks DLPack."""

    def __init__(self, tensor: Tensor, strides: tuple[int, ...] | None = None, error: Exception | None = None):
        self.tensor, self.error = tensor, error
        if strides is not None:
            self.strides = strides

    def __dlpack__(self, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self.tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


def test_arrays_through_dlpack(engine: str) -> None:
    right = arguments()
    expected = flatcore.hessian_trace(**right)
    assert torch.equal(
        flatcore.hessian_trace(**(right | {"linear_weight": Exchanged(right["linear_weight"])})), expected
    )
    # what the array says of its strides does not count, only what its capsule says
    elsewhere = Exchanged(right["linear_weight"], strides=(-3, 1))
    assert torch.equal(flatcore.hessian_trace(**(right | {"linear_weight": elsewhere})), expected)
    for error in (BufferError("no export"), RuntimeError("no export"), TypeError("no export")):
        closed = Exchanged(right["linear_weight"], error=error)
        refuses(
            TypeError,
            ("linear_weight", "Exchanged", "DLPack", "no export"),
            lambda closed=closed: flatcore.hessian_trace(**(right | {"linear_weight": closed})),
        )
    words = ("features", "Exchanged", "from_dlpack", "NumPy")
    refuses(TypeError, words, lambda: flatcore.hessian_trace(**(right | {"features": Exchanged(right["features"])})))


def _misaligned(x: np.ndarray) -> np.ndarray:
    memory = np.empty(x.nbytes + 1, dtype=np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


def _odd_stride(x: np.ndarray) -> np.ndarray:
    """Fields of packed records: rows 1 byte longer than their elements."""
    view = np.zeros(len(x), dtype=[("row", x.dtype, x.shape[1:]), ("flag", "u1")])["row"]
    view[...] = x
    assert view.strides[0] % x.itemsize or x.ndim == 1
    return view


def _read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "fortran": np.asfortranarray,
    "reversed-rows": lambda x: x[::-1].copy()[::-1],
    "reversed-columns": lambda x: x[..., ::-1].copy()[..., ::-1],
    "read-only": _read_only,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "misaligned": _misaligned,
    "odd-stride": _odd_stride,
    "every-second": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "broadcast": lambda x: np.broadcast_to(x, (2, *x.shape))[1],
}


@pytest.mark.filterwarnings("error")  # torch warns on read-only memory
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64))
def test_numpy_layouts(layout: str, dtype: Any, engine: str) -> None:
    right = {name: value.numpy() for name, value in arguments().items()}
    right = {name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in right.items()}
    expected = flatcore.hessian_trace(**right, reduction="none")
    assert type(expected) is np.ndarray and expected.dtype == (np.float64 if dtype is np.float64 else np.float32)
    before = {name: x.copy() for name, x in right.items()}
    changed = {name: LAYOUTS[layout](x) for name, x in right.items()}
    got = flatcore.hessian_trace(**changed, reduction="none")
    assert type(got) is np.ndarray and (got == expected).all()
    assert all((changed[name] == x).all() for name, x in before.items()), "an input was written to"
    norms = flatcore.row_norms(changed["features"])
    assert type(norms) is np.ndarray and (norms == flatcore.row_norms(right["features"])).all()


def test_a_file_mapped_read_only(tmp_path: Any, engine: str) -> None:
    right = arguments()
    path = tmp_path / "features.f4"
    right["features"].numpy().tofile(path)
    mapped = np.memmap(path, dtype=np.float32, mode="r", shape=(N, D))
    got = flatcore.hessian_trace(**(right | {"features": mapped}), reduction="none")
    assert (got == flatcore.hessian_trace(**right, reduction="none").numpy()).all()


# ------------------------------------------------------------------------------------------------------ the edge rules
def _metrics(logits: list[list[float]], target: list[int] | None = None, **changes: Any) -> flatcore.HeadMetrics:
    """Metrics of given logits (N, C), with features of norm 2 and head rows of norm 1 apart."""
    z = torch.tensor(logits)
    n, classes = z.shape
    features = torch.zeros(n, classes)
    features[:, 0] = 2
    given = {"features": features, "linear_weight": torch.eye(classes), "logits": z}
    return flatcore.head_metrics(**(given | changes), target=None if target is None else torch.tensor(target))


@pytest.mark.parametrize("row", ([0.7], [-INF, 3.0, -INF], [-1e30, -INF]), ids=("one", "one-of-three", "one-of-two"))
def test_one_class_left(path: str, row: list[float]) -> None:
    top = row.index(max(row))
    metrics = _metrics([row], [top])
    assert metrics.prediction.item() == top and metrics.confidence.item() == 1 and metrics.margin.item() == INF
    for name in ("log_one_minus_confidence", "log_hessian_trace", "log_layerwise", "log_neuronwise"):
        assert getattr(metrics, name).item() == -INF, name
    for name in ("hessian_trace", "layerwise", "neuronwise", "loss", "feature_gradient_norm"):
        assert getattr(metrics, name).item() == 0, name
    if len(row) > 1:
        masked = (top + 1) % len(row)
        metrics = _metrics([row], [masked])
        assert metrics.loss.item() == INF
        # W^T (e_m - e_y) of unit rows
        assert_within(
            "gradient", metrics.feature_gradient_norm, np.array([math.sqrt(2)]),
            tolerance("feature_gradient_norm", 1.0, 0.0, torch.float32), torch.float32,
        )  # fmt: skip


def test_a_masked_target_has_an_infinite_loss_and_a_finite_gradient(path: str) -> None:
    metrics = _metrics([[1.0, -INF, 0.0]], [1])
    p = torch.tensor([1.0, 0.0]).double().softmax(0)
    gradient = math.sqrt(p[0] ** 2 + 1 + p[1] ** 2)
    assert metrics.loss.item() == INF
    assert_within(
        "gradient", metrics.feature_gradient_norm, np.array([gradient]),
        tolerance("feature_gradient_norm", 1.0, 0.0, torch.float32), torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize(
    "bad", ([-INF] * 3, [0.0, NAN, 1.0], [INF, 0.0, 1.0], [0.0, 1.0, INF], [NAN] * 3, [INF, -INF, NAN])
)
def test_a_bad_row_of_logits_is_nan_alone(path: str, bad: list[float]) -> None:
    good = [[3.0, 1.0, 0.0], [0.0, -1.0, 4.0]]
    metrics = _metrics([good[0], bad, good[1]], [0, 1, 2])
    alone = _metrics(good, [0, 2])
    assert metrics.prediction.tolist() == [0, -1, 2]
    for name in ("confidence", "margin", "log_hessian_trace", "log_layerwise", "log_neuronwise", "loss",
                 "log_one_minus_confidence", "log_feature_norm", "log_feature_gradient_norm"):  # fmt: skip
        values = getattr(metrics, name)
        assert values[1].isnan(), name
        assert torch.equal(values[[0, 2]], getattr(alone, name)), name


@pytest.mark.parametrize("value", (NAN, INF, -INF))
@pytest.mark.parametrize("given", (False, True), ids=("from-features", "given-logits"))
def test_a_bad_row_of_features_is_nan_alone(path: str, value: float, given: bool) -> None:
    right = arguments(weight=None, logits=arguments()["logits"] if given else None)
    del right["weight"]
    expected = flatcore.head_metrics(**right)
    features = right["features"].clone()
    features[1, 2] = value
    metrics = flatcore.head_metrics(**(right | {"features": features}))
    for name, values in metrics._asdict().items():
        bad = values[1].item() == -1 if name == "prediction" else values[1].isnan()
        assert bad, name
        others = [0, 2, 3]
        assert torch.equal(values[others], getattr(expected, name)[others]), name


def test_zero_features_zero_head_and_equal_rows_have_no_curvature(path: str) -> None:
    right = arguments(logits=None, weight=None)
    common = {name: right[name] for name in ("features", "linear_weight", "target")}
    zero_features = flatcore.head_metrics(**(common | {"features": torch.zeros(N, D)}))
    for name in ("log_feature_norm", "log_hessian_trace", "log_layerwise", "log_neuronwise"):
        assert (getattr(zero_features, name) == -INF).all(), name
    assert (zero_features.feature_gradient_norm > 0).all()
    zero_head = flatcore.head_metrics(**(common | {"linear_weight": torch.zeros(C, D)}))
    for name in ("log_layerwise", "log_neuronwise", "log_feature_gradient_norm"):
        assert (getattr(zero_head, name) == -INF).all(), name
    assert zero_head.log_hessian_trace.isfinite().all()
    equal = flatcore.head_metrics(**(common | {"linear_weight": right["linear_weight"][:1].expand(C, D)}))
    for name in ("log_neuronwise", "log_feature_gradient_norm"):
        assert (getattr(equal, name) == -INF).all(), name
    assert equal.log_layerwise.isfinite().all()


@pytest.mark.parametrize("size", (1e20, 1e-25, 1e38, 1e-40))
def test_feature_norms_leave_no_range(path: str, size: float) -> None:
    features = torch.tensor([[size, -size, 0.0], [0.0, 0.0, size]])
    metrics = flatcore.head_metrics(features, torch.eye(3), logits=torch.tensor([[1.0, 0.0, 0.0]]).expand(2, 3))
    rounded = torch.tensor(size).double().item()  # the float32 nearest to it
    truth = np.log(rounded) + np.array([0.5 * math.log(2), 0.0])
    bound = tolerance("log_feature_norm", np.exp(truth), truth, torch.float32)
    assert_within("log_feature_norm", metrics.log_feature_norm, truth, bound, torch.float32)
    assert metrics.log_hessian_trace.isfinite().all()


@pytest.mark.parametrize("exponent", (-1040, -600, -530, 60, 900))
@pytest.mark.parametrize("width", (3, 40))
def test_float64_heads_of_any_size(path: str, width: int, exponent: int) -> None:
    """W -> 2^k W at given logits is exact in floats: it adds 2 k log 2 to both measures, k log 2 to the gradient."""
    g = torch.Generator().manual_seed(5)
    features = torch.randn(30, width, generator=g, dtype=torch.float64)
    head = torch.randint(-64, 64, (6, width), generator=g).double()  # whole numbers: exact in subnormals too
    logits, target = torch.randn(30, 6, generator=g, dtype=torch.float64), torch.randint(6, (30,), generator=g)
    half = torch.tensor([exponent // 2, exponent - exponent // 2])
    small = torch.ldexp(torch.ldexp(head, half[0]), half[1])
    assert torch.equal(torch.ldexp(torch.ldexp(small, -half[1]), -half[0]), head)
    given = {"features": features, "logits": logits, "reduction": "none", "log": True}
    for field, function, changes, power in (
        ("layerwise", flatcore.relative_flatness, {"measure": "layerwise"}, 2),
        ("neuronwise", flatcore.relative_flatness, {"measure": "neuronwise"}, 2),
        ("feature_gradient_norm", flatcore.feature_gradient_norms, {"target": target}, 1),
    ):
        truth = function(linear_weight=head, **given, **changes).numpy() + power * exponent * math.log(2)
        bound = tolerance(f"log_{field}", np.ones_like(truth), truth, torch.float64)
        got = function(linear_weight=small, **given, **changes)
        assert_within(f"log_{field}", got, truth, bound + bound, torch.float64)


@pytest.mark.parametrize("rows", (2, 64), ids=("few-rows", "many-rows"))
@pytest.mark.parametrize("exponent", (-149, -140, -133))
def test_float32_heads_of_subnormals(path: str, exponent: int, rows: int) -> None:
    """As above, k log 2, for float32; 64 rows of 32 features take the table of distances where there is a choice."""
    g = torch.Generator().manual_seed(6)
    features, logits = torch.randn(rows, 32, generator=g), torch.randn(rows, 4, generator=g)
    head = torch.randint(-64, 64, (4, 32), generator=g).float()
    given = {"features": features, "logits": logits, "measure": "neuronwise", "reduction": "none", "log": True}
    truth = flatcore.relative_flatness(linear_weight=head, **given).double().numpy() + 2 * exponent * math.log(2)
    small = (head.double() * 2.0**exponent).float()
    assert torch.equal(small.double() * 2.0**-exponent, head.double())
    bound = tolerance("log_neuronwise", np.exp(truth), truth, torch.float32)
    got = flatcore.relative_flatness(linear_weight=small, **given)
    assert_within("log_neuronwise", got, truth, bound + bound, torch.float32)


@pytest.mark.parametrize("ord", (1, 2, INF))
@pytest.mark.parametrize("row", (0, 3))
def test_a_nan_in_the_head_is_not_dropped(path: str, ord: float, row: int) -> None:
    right = arguments(weight=None, linear_bias=None)
    head = right["linear_weight"].clone()
    head[row, 1] = NAN
    for function in (
        lambda: gradients_with(linear_weight=head, ord=ord, linear_bias=None),
        lambda: flatcore.relative_flatness(**(right | {"linear_weight": head}), reduction="none"),
        lambda: flatcore.relative_flatness(**(right | {"linear_weight": head}), measure="neuronwise", reduction="none"),
    ):
        assert function().isnan().all()


# ------------------------------------------------------------------------------------------------------------ no sizes
@pytest.mark.parametrize("classes", (1, 3, 300))
def test_no_features_at_all(path: str, classes: int) -> None:
    target = torch.zeros(2, dtype=torch.long)
    metrics = flatcore.head_metrics(torch.zeros(2, 0), torch.zeros(classes, 0), target)
    assert_within("loss", metrics.loss, np.full(2, math.log(classes)),
                  tolerance("loss", math.log(classes), 0.0, torch.float32), torch.float32)  # fmt: skip
    for name in (
        "log_feature_norm",
        "log_hessian_trace",
        "log_layerwise",
        "log_neuronwise",
        "log_feature_gradient_norm",
    ):
        assert (getattr(metrics, name) == -INF).all(), name
    for ord in (1, 2, INF):
        got = flatcore.feature_gradient_norms(torch.zeros(2, 0), torch.zeros(classes, 0), target, ord=ord)
        assert got.tolist() == [0.0, 0.0]


def test_no_features_at_all_without_force() -> None:
    metrics = flatcore.head_metrics(torch.zeros(2, 0), torch.zeros(300, 0), torch.tensor([0, 299]))
    assert metrics.prediction.tolist() == [0, 0] and (metrics.log_neuronwise == -INF).all()


@pytest.mark.parametrize("shape", ((0,), (3, 0), (0, 2)))
def test_no_rows(path: str, shape: tuple[int, ...]) -> None:
    features, target = torch.zeros(*shape, D), torch.zeros(shape, dtype=torch.long)
    head = arguments()["linear_weight"]
    for values in flatcore.head_metrics(features, head, target):
        assert values.shape == shape
    for function in (flatcore.hessian_trace, flatcore.relative_flatness, flatcore.feature_gradient_norms):
        assert function(features, head, target, reduction="none").shape == shape
        assert function(features, head, target, reduction="sum").item() == 0
        assert function(features, head, target, reduction="sum", log=True).item() == -INF
        for log in (False, True):
            assert math.isnan(function(features, head, target, reduction="mean", log=log).item())
    assert math.isnan(flatcore.hessian_trace(features, head).item())


def test_row_norms_of_nothing(target: str) -> None:
    assert flatcore.row_norms(torch.zeros(0, 3)).shape == (3, 0)
    assert flatcore.row_norms(torch.zeros(2, 0)).tolist() == [[0.0, 0.0]] * 3
    assert flatcore.row_norms(torch.zeros(0, 0), ord=2).shape == (0,)


@pytest.mark.parametrize("leading", ((), (1,), (2, 3), (2, 1, 3, 1, 2)))
def test_leading_dimensions(path: str, leading: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(3)
    right = arguments()
    features = torch.randn(*leading, D, generator=g)
    target = torch.randint(C, leading, generator=g)
    logits = torch.randn(*leading, C, generator=g)
    given = {"linear_weight": right["linear_weight"]}
    flat = {"features": features.reshape(-1, D), "target": target.reshape(-1), "logits": logits.reshape(-1, C)}
    shaped = flatcore.head_metrics(features, target=target, logits=logits, **given)
    for name, values in flatcore.head_metrics(**flat, **given)._asdict().items():
        assert torch.equal(getattr(shaped, name), values.reshape(leading)), name


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "padded-rows": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every-second": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].reshape(x.shape),
    "reversed-twice": lambda x: x.flip(0).contiguous().flip(0),
}


def _eighths(g: torch.Generator, *shape: int) -> Tensor:
    """Multiples of 1/8 up to 2: products and their sums are exact in every dtype and order."""
    return torch.randint(-16, 17, shape, generator=g) / 8


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_strided_tensors(path: str, layout: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    change = STRIDES[layout]
    features, head = _eighths(g, 19, 21).to(dtype), _eighths(g, 6, 21).to(dtype)
    logits, target = torch.randn(19, 6, generator=g).to(dtype), torch.randint(6, (19,), generator=g)
    for z in (None, logits):
        plain = flatcore.head_metrics(features, head, target, logits=z)
        strided = flatcore.head_metrics(change(features), change(head), target, logits=None if z is None else change(z))
        assert_same_metrics(strided, plain)


def assert_same_metrics(got: flatcore.HeadMetrics, want: flatcore.HeadMetrics) -> None:
    """Require equal metrics of exact logits: two computed values, each within its own bound."""
    assert torch.equal(got.prediction, want.prediction)
    for name, values in want._asdict().items():
        if name == "prediction":
            continue
        truth = values.double().numpy()
        bound = tolerance(name, truth, truth, values.dtype)
        assert_within(name, getattr(got, name), truth, bound + bound, values.dtype)


def test_expanded_tensors(path: str) -> None:
    g = torch.Generator().manual_seed(4)
    features, head = _eighths(g, 1, 21), _eighths(g, 6, 21)
    one = flatcore.head_metrics(features.repeat(50, 1), head, torch.full((50,), 2))
    many = flatcore.head_metrics(features.expand(50, 21), head, torch.tensor(2).expand(50))
    assert_same_metrics(many, one)
    # stride 0 along D and C, too
    one = flatcore.head_metrics(torch.full((9, 21), 0.5), torch.full((6, 21), 0.25), logits=torch.full((9, 6), -1.0))
    flat = (torch.tensor(v).expand(n, k) for v, n, k in ((0.5, 9, 21), (0.25, 6, 21), (-1.0, 9, 6)))
    features, head, logits = flat
    many = flatcore.head_metrics(features, head, logits=logits)
    for name, values in one._asdict().items():
        if values is not None:
            assert torch.equal(getattr(many, name), values), name


def test_row_norms_of_an_expanded_tensor(target: str) -> None:
    constant = torch.tensor(0.5).expand(7, 20)
    bound = tolerance("row_norm", 10.0, 0.0, torch.float32, terms=20)
    assert_within("row_norm", flatcore.row_norms(constant, ord=1), np.full(7, 10.0), bound, torch.float32)
