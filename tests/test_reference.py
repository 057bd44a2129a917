"""The reference in the arithmetic of a device that is slow in float64, or has none: float32, at every confidence.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import fuzz
import numpy as np
import oracles
import pytest
import torch
from cases import CASES, Case
from checks import Problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tracing import Largest

import flatcore
from flatcore import reference
from flatcore._check.tolerance import assert_same, assert_within, tolerance
from flatcore._engine import direct
from flatcore._engine.head import Head
from flatcore.reference import DIFFERENTIABLE, FIELDS, arithmetic_in

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

WIDE = (torch.float32, torch.float64)
ALL = (1 << len(FIELDS)) - 1


@pytest.fixture
def float32(one_thread: None) -> Iterator[None]:
    """The reference, in float32 unless an input is float64."""
    with flatcore.backend("reference"), arithmetic_in(torch.float32):
        yield


def head(N: int, D: int, C: int, **changes: Any) -> Head:
    """A head with rows from doubtful to certain."""
    g = torch.Generator().manual_seed(N + D + C)
    x = torch.randn(N, D, generator=g) * torch.logspace(-1, 1.5, N).unsqueeze(1)
    weight, bias = torch.randn(C, D, generator=g), torch.randn(C, generator=g)
    return Head(x, weight, bias, None, torch.randint(C, (N,), generator=g))._replace(**changes)


# ------------------------------------------------------------------------------------------------- against 60 digits
# of the cases of many classes, for each of which the oracle takes up to seconds, three
KEPT = ("logits-142", "features-and-bias-142", "rows-repeated-142")
SHOWN = [
    pytest.param(case, marks=[pytest.mark.exhaustive] if case.weight.numel() > 1000 and case.name not in KEPT else [])
    for case in CASES
]


@pytest.mark.parametrize("case", SHOWN, ids=repr)
def test_every_value_is_exact_in_float32(float32: None, case: Case) -> None:
    problem = Problem(case.at(torch.float32))
    problem.add_logs_in_float32()
    problem.check_head_metrics()
    problem.check_views()


@pytest.mark.parametrize("N, D, C", ((6, 40, 400), (5, 3, 3000)))
def test_many_classes_in_float32(float32: None, N: int, D: int, C: int) -> None:
    """Gaps from 0 to 10,000, over more classes than all differences of W's rows are formed for; a third of them equal."""
    given = head(N, D, C)
    weight = torch.where(torch.arange(C).unsqueeze(1) % 3 == 0, given.linear_weight[0], given.linear_weight)
    logits = torch.randn(N, C, generator=torch.Generator().manual_seed(1))
    logits[torch.arange(N), torch.arange(N)] += torch.tensor([0, 5, 17, 90, 1000, 10000.0])[:N]
    targets = torch.stack([torch.arange(N), torch.arange(N) + 1], dim=1)
    problem = Problem(Case("many", given.features, weight, targets, logits=logits))
    problem.add_logs_in_float32()
    problem.check_head_metrics()
    problem.check_views()


@pytest.mark.parametrize("kind", ("dense", "near", "sparse", "repeated", "twins", "padded", "scaled"))
def test_drawn_gradients_in_float32(float32: None, kind: str) -> None:
    """The contract of the engine's gradients, against the second oracle's derivatives."""
    functions = ("hessian_trace", "layerwise", "neuronwise", *oracles.GRADIENTS.values())
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    drawn = ((f"{kind}/{i}", fuzz.case(11, i, functions, dtypes, (kind,))) for i in range(8))
    counts, shown = fuzz.Counts(), []
    fuzz.fuzz(drawn, ("reference",), counts, shown.append)
    assert not counts.wrong, "\n".join(shown)
    assert counts.compared > 10


@pytest.mark.parametrize("size", (1e-25, 1.0, 1e20))
@pytest.mark.parametrize("width", (1, 7, 1000, 50_000))
def test_row_norms_in_float32(float32: None, width: int, size: float) -> None:
    x = (torch.randn(4, width, generator=torch.Generator().manual_seed(width)) * size).float()
    for ord, got in zip((1, 2, math.inf), flatcore.row_norms(x), strict=True):
        truth = oracles.exact_row_norms(x, ord)
        bound = tolerance("row_norm", truth, np.log(truth), torch.float32)
        assert_within(f"L{ord}", got, truth, bound._replace(relative=8 * bound.relative), torch.float32)


@pytest.mark.parametrize("classes", (2, 10, 300, pytest.param(3000, marks=pytest.mark.exhaustive)))
def test_unmasked_cross_entropy_in_float32(float32: None, classes: int) -> None:
    gaps = torch.tensor([0, 0.3, 5, 17, 40, 88, 105, 700, 10000.0])
    z = torch.randn(2 * len(gaps), classes, generator=torch.Generator().manual_seed(classes))
    z[:, 1] += gaps.repeat(2)
    y = torch.tensor([1, 0]).repeat_interleave(len(gaps))
    truth = oracles.exact_cross_entropy(z, y)
    loss, log_scale, cotangent = reference.unmasked_cross_entropy(z, y, -100)
    assert_within("loss", loss, truth["loss"], tolerance("loss", truth["loss"], truth["log_loss"], torch.float32))
    bound = tolerance("log_scale", None, truth["log_scale"], torch.float32)
    assert_within("log_scale", log_scale, truth["log_scale"], bound._replace(relative=0.0))
    # the exponential has the rounding of its argument, a difference of logits
    exact = np.abs(truth["cotangent"])
    units = 8 + np.abs(np.log(exact, where=exact > 1e-37, out=np.zeros_like(exact)))
    assert (np.abs(cotangent.double().numpy() - truth["cotangent"]) <= units * 2.0**-24 * exact + 1e-37).all()


# --------------------------------------------------------------------------------------------- which arithmetic, where
def on(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """What is looked at of a tensor on a device that is not here."""
    return SimpleNamespace(dtype=dtype, device=torch.device(kind, 0))


def test_the_arithmetic_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {(9, 0): torch.float64, (8, 0): torch.float64, (8, 9): torch.float32, (12, 0): torch.float32}
    for number, dtype in capability.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, number=number: number)
        assert reference.arithmetic(on("cuda")) is dtype
        assert reference.arithmetic(on("cuda"), on("cuda", torch.float64)) is torch.float64
    monkeypatch.setattr(torch.version, "hip", "6.3")
    for name, dtype in {"gfx90a:sramecc+": torch.float64, "gfx942": torch.float64, "gfx1100": torch.float32}.items():
        properties = SimpleNamespace(gcnArchName=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert reference.arithmetic(on("cuda")) is dtype
    assert reference.arithmetic(on("cpu", torch.bfloat16)) is torch.float64
    assert reference.arithmetic(on("mps")) is reference.arithmetic(on("xpu")) is torch.float32
    assert reference.arithmetic(on("cpu"), dtype=torch.float32) is torch.float32
    assert reference.arithmetic(on("cpu", torch.float64), dtype=torch.float32) is torch.float64


def test_the_widest_dtype_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reference.widest(torch.device("mps")) is torch.float32
    for has, dtype in ((False, torch.float32), (True, torch.float64)):
        properties = SimpleNamespace(has_fp64=has)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, found=properties: found)
        assert reference.widest(torch.device("xpu", 0)) is dtype
    assert reference.widest(torch.device("cpu")) is torch.float64


class NoFloat64(TorchDispatchMode):
    """A device without float64: whatever makes such a tensor is refused, as MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            # a number that enters an operation stays one where torch has no tensor of it on the device
            if isinstance(x, Tensor) and x.dtype == torch.float64 and func is not torch.ops.aten.scalar_tensor.default:
                raise TypeError(f"{func} made a float64 tensor of shape {tuple(x.shape)}")
        return found


def measured(function: Callable[..., Tensor], *arguments: Any, **options: Any) -> None:
    """Value and gradient."""
    leaves = [x.clone().requires_grad_() for x in arguments]
    function(*leaves, **options).sum().backward()


CALLS: dict[str, Callable[[Head], Any]] = {
    "head_metrics": lambda h: flatcore.head_metrics(*h[:2], h.target, linear_bias=h.linear_bias),
    "trace": lambda h: measured(flatcore.hessian_trace, *h[:2], target=h.target, weight=torch.ones(h.C)),
    "trace-soft": lambda h: measured(flatcore.hessian_trace, *h[:2], target=torch.rand(h.N, h.C), log=True),
    "layerwise": lambda h: measured(flatcore.relative_flatness, *h[:2], linear_bias=h.linear_bias, include_bias=True),
    "neuronwise": lambda h: measured(flatcore.relative_flatness, *h[:2], measure="neuronwise", reduction="none"),
    "gradient": lambda h: measured(flatcore.feature_gradient_norms, *h[:2], target=h.target, reduction="mean"),
    "gradient-1": lambda h: measured(flatcore.feature_gradient_norms, *h[:2], target=h.target, ord=1, log=True),
    "row_norms": lambda h: flatcore.row_norms(h.features),
    "unmasked": lambda h: flatcore.unmasked_cross_entropy(h.features, h.target % h.D),
    "input_gradients": lambda h: flatcore.input_gradient_norms(
        torch.nn.Linear(h.D, h.C), h.features, h.target, ord=(1, 2), log=True
    ),
    "input_gradients-soft": lambda h: flatcore.input_gradients(
        torch.nn.Linear(h.D, h.C), h.features, torch.rand(h.N, h.C)
    ),
}


@pytest.mark.parametrize("classes", (5, 300))
@pytest.mark.parametrize("name", CALLS)
def test_nothing_needs_float64(float32: None, name: str, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_dispatch_modes", lambda: 0)  # else the mode sees the operators alone
    given = head(7, 11, classes)
    with arithmetic_in(torch.float32, widest=torch.float32), NoFloat64():
        CALLS[name](given)
        with pytest.raises(TypeError, match="made a float64 tensor"), arithmetic_in(torch.float64):
            CALLS[name](given)


# ------------------------------------------------------------------------------------------------ graphs, memory, rows
@pytest.mark.parametrize(
    "C, D, dtype",
    (
        (300, 20, torch.float32),
        *(pytest.param(*given, marks=pytest.mark.exhaustive)
          for given in ((300, 20, torch.float64), (5, 4, torch.float32), (5, 4, torch.float64))),
    ),
)  # fmt: skip
def test_the_reference_is_one_graph(C: int, D: int, dtype: torch.dtype) -> None:
    """Traced without a break: there nothing in it depends on what a tensor holds."""
    given = head(9, D, C)
    torch.compiler.reset()

    def values(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return reference.head_metrics(given._replace(features=x, linear_weight=w), ALL, False, dtype=dtype)

    def gradients(x: Tensor, w: Tensor) -> list[tuple[Tensor | None, ...]]:
        h = given._replace(features=x, linear_weight=w)
        wanted, one = (True, True, True, False), torch.ones(9)
        fields = [FIELDS.index(name) for name in (*DIFFERENTIABLE[1:4], DIFFERENTIABLE[-1])]
        return [reference.head_metrics_backward(one, None, h, field, wanted, dtype=dtype) for field in fields]

    for function in (values, gradients):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        got, want = (f(given.features, given.linear_weight) for f in (compiled, function))
        for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_same("compiled", a, b)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("N, D, C", ((20_000, 8, 300), (3, 1, 50_000), (4, 200, 30_000)))
def test_memory_is_bounded(N: int, D: int, C: int, dtype: torch.dtype) -> None:
    """No tensor of N x C, and none of a large W's size but W's gradient: blocks of rows, tiles of classes."""
    given = head(N, D, C, target=None, linear_bias=None)
    with Largest() as most:
        for field in ("log_hessian_trace", "log_neuronwise"):
            bits = 1 << FIELDS.index(field)
            reference.head_metrics(given, bits, False, dtype=dtype)
    assert most.numbers <= max(1 << 22, 2 * N)


@pytest.mark.parametrize("dtype", WIDE)
def test_blocks_of_rows_and_tiles_of_classes_change_nothing(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    given = head(50, 40, 300)
    fields = [FIELDS.index(name) for name in DIFFERENTIABLE]

    def everything() -> list[Tensor]:
        found = [*reference.head_metrics(given, ALL, True, dtype=dtype)]
        for field in fields:
            found += reference.head_metrics_backward(torch.ones(50), None, given, field, (True,) * 3 + (False,), dtype)[
                :3
            ]
        return found

    whole = everything()
    sizes = importlib.import_module("flatcore.reference.arithmetic")
    monkeypatch.setattr(sizes, "_BLOCK", {"cpu": 16_000})
    monkeypatch.setattr(sizes, "_TILE", 1000)
    unit = torch.finfo(dtype).eps
    for a, b in zip(everything(), whole, strict=True):
        scale = b.double().abs().nan_to_num(posinf=0.0).max().item()
        torch.testing.assert_close(a, b, rtol=100 * unit, atol=100 * max(unit, 2**-24) * scale)


@pytest.mark.parametrize("classes", (3, 2100))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_the_largest_weights_of_a_format(dtype: torch.dtype, classes: int) -> None:
    """W with entries beyond half of the largest number, and the same times 2^-9: every log less by as many log 2."""
    g = torch.Generator().manual_seed(4)
    x, w = torch.randn(4, 5, generator=g).to(dtype), (2 * torch.rand(classes, 5, generator=g) - 1).to(dtype)
    w[0, 0] = 1
    z, y = torch.randn(4, classes, generator=g).to(dtype), torch.tensor([1, 0, 2, 1])
    names = ("log_layerwise", "log_neuronwise", "log_feature_gradient_norm", "log_feature_gradient_norm_1")
    found = []
    for scale in (torch.finfo(dtype).max, torch.finfo(dtype).max * 2.0**-9):
        given = Head(x, w * scale, None, z, y, norm_power=2)
        fields = sum(1 << FIELDS.index(name) for name in names)
        found.append(reference.head_metrics(given, fields, False, dtype=dtype)[0])
    powers = torch.tensor([2, 2, 1, 1], dtype=dtype).unsqueeze(1)
    unit = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found[0] - found[1], (9 * math.log(2) * powers).expand(4, 4), rtol=0, atol=1500 * unit)
