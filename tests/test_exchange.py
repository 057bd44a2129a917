"""Tensors that the compiled module reads by itself: which it takes, and that results are those of the long way."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

import flatcore
from flatcore._engine import direct, extensions
from flatcore._engine.head import Head

HAS_TABLE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture
def unconnected():
    """As on a torch without the table."""
    extensions._core.connect(None, torch.Tensor, Parameter)
    yield
    extensions._connected(extensions._core)


def parts(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return {
        "features": torch.randn(7, 12, generator=g).to(dtype),
        "linear_weight": torch.randn(5, 12, generator=g).to(dtype),
        "linear_bias": torch.randn(5, generator=g).to(dtype),
        "logits": torch.randn(7, 5, generator=g).to(dtype),
        "target": torch.arange(7) % 5,
    }


class Doubled(torch.Tensor):
    pass


def freed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    view = x[:]
    x.untyped_storage().resize_(0)
    return view


def short(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    view = x[:]
    x.untyped_storage().resize_(x.nbytes - 1)
    return view


def dead(x: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    torch.func.grad(lambda y: (kept.append(y), y.sum())[1])(x.float())
    return kept[0]


def misaligned(x: torch.Tensor) -> torch.Tensor:
    memory = torch.zeros(x.nbytes + 1, dtype=torch.uint8)
    memory[1:] = x.contiguous().view(torch.uint8).flatten()
    capsule = memory[1:].numpy().view(f"i{x.itemsize}").reshape(x.shape)
    return torch.from_numpy(capsule).view(x.dtype)


def nowhere(x: torch.Tensor) -> torch.Tensor:
    """Autograd's own zeros, of the right length in memory that is not there."""
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


NOT_PLAIN = {
    "zeros without memory": nowhere,
    "functionalised": torch._to_functional_tensor,
    "a subclass": lambda x: x.as_subclass(Doubled),
    "a lazy negation": torch._neg_view,
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "a freed storage": freed,
    "a storage that is too short": short,
    "of a transform that has ended": dead,
    "misaligned": misaligned,
    "integers": lambda x: x.int(),
    "complex": lambda x: x.to(torch.complex64),
    "one dimension more": lambda x: x[None],
    "one row more": lambda x: torch.cat([x, x[:1]]),
    "no tensor": lambda x: x.numpy(),
}


@pytest.mark.skipif(not HAS_TABLE, reason="this torch has no table of C functions")
@pytest.mark.parametrize("name", ["features", "linear_weight", "linear_bias", "logits"])
@pytest.mark.parametrize("kind", NOT_PLAIN)
@pytest.mark.filterwarnings("ignore:.*sparse.*")
def test_what_is_not_simply_its_memory_is_not_read(kind, name):
    given = parts()
    given[name] = NOT_PLAIN[kind](given[name])
    if (kind, name) == ("one row more", "linear_weight"):
        del given["linear_bias"], given["logits"], given["target"]
        assert direct.plain_head(Head(**given)) == (7, 12, 6, False)
        return
    assert direct.plain_head(Head(**given)) is None


@pytest.mark.parametrize("name", ["features", "linear_weight", "logits"])
def test_numbers_without_memory_are_computed_with(name):
    """These were an address of 0, read."""
    given = parts()
    zeros = {**given, name: torch.zeros_like(given[name])}
    value = flatcore.hessian_trace(**{**given, name: nowhere(given[name])})
    assert torch.equal(value, flatcore.hessian_trace(**zeros))
    functional = flatcore.hessian_trace(**{**given, name: torch._to_functional_tensor(given[name])})
    assert torch.equal(functional, flatcore.hessian_trace(**given))


@pytest.mark.parametrize("classes", [5, 600])
def test_an_upstream_of_zeros_without_memory(classes):
    features = parts()["features"].requires_grad_()
    value = flatcore.hessian_trace(features, torch.eye(classes, 12), reduction="none")
    assert not torch.autograd.grad(value, features, nowhere(value))[0].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_sees_where_the_number_of_rows_came_from():
    given = parts()
    weight, more = given["linear_weight"], torch.cat([given["features"]] * 2)

    def rows(x: torch.Tensor) -> torch.Tensor:
        return flatcore.hessian_trace(x, weight, reduction="none") + flatcore.head_metrics(x, weight).margin

    traced = torch.jit.trace(rows, (given["features"],), check_trace=False)
    assert torch.equal(traced(more), rows(more))


@pytest.mark.skipif(not HAS_TABLE, reason="this torch has no table of C functions")
def test_labels_that_are_read():
    good = parts()["target"]
    for target, taken in ((good, True), (good.int(), False), (good[None], False), (good[:6], False), (good.bool(), False),
                          (torch.stack([good, good], 1)[:, 0], False), (good.float(), False)):  # fmt: skip
        found = direct.plain_head(Head(**{**parts(), "target": target}))
        assert (found is not None) == taken, target


@pytest.mark.skipif(not HAS_TABLE, reason="this torch has no table of C functions")
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_read(dtype):
    given = parts(dtype)
    double = dtype is torch.float64
    forms = {
        "as it is": lambda x: x,
        "a parameter": Parameter,
        "columns first": lambda x: x.t().contiguous().t(),
        "every second": lambda x: torch.stack([x, x], -1)[..., 0],
        "from the middle of a storage": lambda x: torch.cat([x, x])[len(x) :],
        "expanded": lambda x: x[:1].expand_as(x),
    }
    for form in forms.values():
        head = Head(**{name: form(x) if x.is_floating_point() else x for name, x in given.items()})
        assert direct.plain_head(head) == (7, 12, 5, double)
    assert direct.plain_head(Head(given["features"][:0], given["linear_weight"])) == (0, 12, 5, double)
    one = Head(given["features"][:, :0], given["linear_weight"][:, :0])
    assert direct.plain_head(one) == (7, 0, 5, double)


def outcome(given: dict[str, torch.Tensor], **options) -> list[torch.Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if x.is_floating_point()}
    value = flatcore.relative_flatness(**{**given, **leaves}, **options)
    found = [value, *torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)]
    metrics = flatcore.head_metrics(**given)
    return [x for x in (*found, *metrics) if x is not None]


@pytest.mark.parametrize("measure", ["layerwise", "neuronwise"])
@pytest.mark.parametrize("without", [(), ("logits",), ("logits", "linear_bias"), ("target",)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_long_way_gives_the_same_bits(measure, without, dtype, unconnected):
    given = {name: x for name, x in parts(dtype).items() if name not in without}
    for reduction in ("mean", "none"):
        slow = outcome(given, measure=measure, reduction=reduction)
        extensions._connected(extensions._core)
        fast = outcome(given, measure=measure, reduction=reduction)
        extensions._core.connect(None, torch.Tensor, Parameter)
        assert len(slow) == len(fast)
        for a, b in zip(slow, fast, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def test_a_table_of_another_version_is_left_alone(unconnected):
    import ctypes

    table = (ctypes.c_uint64 * 8)(2)  # major version 2, nothing older behind it
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    capsule = new(ctypes.addressof(table), b"dlpack_exchange_api", None)
    assert not extensions._core.connect(capsule, torch.Tensor, Parameter)
    assert direct.plain_head(Head(**parts())) is None


def test_a_weight_that_is_freed_between_forward_and_backward_is_refused_or_read_again():
    given = parts()
    features, weight = given["features"].requires_grad_(), given["linear_weight"].clone()
    value = flatcore.hessian_trace(features, weight)
    wanted = torch.autograd.grad(value, features, retain_graph=True)[0]
    held = weight.clone()
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(held.nbytes)
    weight.data.copy_(held)  # as FSDP gathers it again
    assert torch.equal(torch.autograd.grad(value, features)[0], wanted)
