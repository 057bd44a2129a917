"""What no argument may be, by its type and its words: other kinds of tensor, shapes, devices.

N = 4, D = 3, C = 5 unless a test says otherwise.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from processes import leave_process_group
from refusing import CHECKED_FIRST, FORWARD_AD, C, N, arguments, refuses, trace_with
from torch import Tensor
from torch.autograd import forward_ad

import flatcore

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

FLOATS = "float16, bfloat16, float32 or float64"


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
