"""The torch.library operators, and what surrounds a call in PyTorch: tracing, transforms, modes, views, defaults.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tolerance import assert_same, assert_within, tolerance
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flatcore
from flatcore._engine import direct, paths

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

N, D, C = 6, 7, 4
INF = math.inf
ENGINES = ("reference", "fused", "chunked")
# make_dual and inductor load parts of torch that are scripted, and warn of torch.jit.script's end
SCRIPTED = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def problem(rows: int = N, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D), head (C, D) and labels (N,), one of them ignored.

    Multiples of 1/8 up to 2: products and their sums are exact in every dtype and order, so logits are.
    """
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(C, (rows,), generator=g)
    target[0] = -100
    features, head = (torch.randint(-16, 17, (n, D), generator=g) / 8 for n in (rows, C))
    return features.to(dtype), head.to(dtype), target


def _flat(value: Any) -> list[Tensor]:
    return [v for v in (value if isinstance(value, tuple) else (value,)) if v is not None]


def assert_all_same(got: Any, want: Any) -> None:
    got, want = _flat(got), _flat(want)
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same(f"output {i}", a, b)


def assert_summed_alike(got: Any, want: Any) -> None:
    """Per-sample results bit for bit; one number, the sum of N terms of one sign in float64, to N roundings of it."""
    for a, b in zip(_flat(got), _flat(want), strict=True):
        if b.dim() > 0:
            assert_same("output", a, b)
        else:
            torch.testing.assert_close(a, b, rtol=2 * 33 * 2.0**-53 + torch.finfo(b.dtype).eps, atol=0.0)


def assert_all_close(got: Any, want: Any) -> None:
    """Two computations from exact logits, each within its own bound, as a log or as a linear value."""
    got, want = _flat(got), _flat(want)
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if not b.is_floating_point():
            assert_same(f"output {i}", a, b)
            continue
        truth = b.double().numpy()
        bound = tolerance("log_hessian_trace", truth, truth, b.dtype) + tolerance("margin", truth, truth, b.dtype)
        assert_within(f"output {i}", a, truth, bound + bound, b.dtype)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "hessian_trace": lambda x, w, y: flatcore.hessian_trace(x, w, y),
    "hessian_trace-weighted-log": lambda x, w, y: flatcore.hessian_trace(
        x, w, y, weight=w[:, 0].abs(), linear_bias=w[:, 1], include_bias=True, log=True, temperature=0.5
    ),
    "relative_flatness": lambda x, w, y: flatcore.relative_flatness(x, w, y, reduction="sum"),
    "neuronwise": lambda x, w, y: flatcore.relative_flatness(x, w, measure="neuronwise", reduction="none"),
    "feature_gradient_norms": lambda x, w, y: flatcore.feature_gradient_norms(x, w, y, ord=1, reduction="mean"),
    "head_metrics": lambda x, w, y: tuple(flatcore.head_metrics(x, w, y)),
    "head_metrics-without-target": lambda x, w, y: tuple(flatcore.head_metrics(x, w)),
    "row_norms": lambda x, w, y: flatcore.row_norms(x),
}


# ----------------------------------------------------------------------------------------------------- the operators
def op_arguments(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, ...]:
    """Arguments of the head_metrics operator: every field is asked for."""
    x, w, y = problem(dtype=dtype)
    given = {
        "features": x, "linear_weight": w, "linear_bias": None, "logits": None, "target": y, "temperature": 1.0,
        "ignore_index": -100, "include_bias": False, "norm_power": 2, "fields": (1 << 11) - 1, "wide_result": False,
    }  # fmt: skip
    return tuple((given | changes).values())


OP_CASES = {
    "plain": {},
    "bias": {"linear_bias": torch.ones(C), "include_bias": True},
    "no-target": {"target": None, "fields": 0b1111111},
    "logits": {"logits": torch.arange(float(N * C)).reshape(N, C)},
    "wide": {"wide_result": True, "fields": 0b10000},
    "double-logits": {"logits": torch.zeros(N, C, dtype=torch.float64)},
    "no-rows": {"features": torch.zeros(0, D), "target": torch.zeros(0, dtype=torch.long)},
}


@pytest.mark.parametrize("case", OP_CASES)
def test_opcheck_head_metrics(case: str, engine: str) -> None:
    torch.library.opcheck(torch.ops.flatcore.head_metrics.default, op_arguments(**OP_CASES[case]))


@pytest.mark.parametrize("ord", ([1.0], [2.0, INF], [INF, 1.0, 2.0, 1.0]))
def test_opcheck_row_norms(ord: list[float], engine: str) -> None:
    torch.library.opcheck(torch.ops.flatcore.row_norms.default, (problem()[0], ord))


@pytest.mark.parametrize("case", OP_CASES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_fake_results_are_like_the_real_ones(case: str, dtype: torch.dtype, engine: str) -> None:
    given = op_arguments(dtype, **OP_CASES[case])
    real = torch.ops.flatcore.head_metrics(*given)
    with FakeTensorMode() as mode:
        fake = torch.ops.flatcore.head_metrics(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given))
    for a, b in zip(real, fake, strict=True):
        assert isinstance(b, FakeTensor)
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fake_mode(name: str, engine: str) -> None:
    given = problem()
    real = _flat(FUNCTIONS[name](*given))
    with FakeTensorMode() as mode:
        fake = _flat(FUNCTIONS[name](*(mode.from_tensor(a) for a in given)))
    assert [(a.shape, a.dtype) for a in real] == [(b.shape, b.dtype) for b in fake]
    assert all(isinstance(b, FakeTensor) for b in fake)


def test_fake_and_real_tensors_do_not_mix(engine: str) -> None:
    x, w, _ = problem()
    fake = FakeTensorMode().from_tensor(x)
    for given in ((fake, w), (FakeTensorMode().from_tensor(x), FakeTensorMode().from_tensor(w))):
        with pytest.raises((AssertionError, TypeError, ValueError), match=r"[Ff]ake"):
            flatcore.hessian_trace(*given)


@SCRIPTED
def test_the_operators_drop_no_derivative() -> None:
    """Called past the public functions: an error, never a result without its gradient or tangent."""
    x = problem()[0]
    for call in (
        lambda x: torch.ops.flatcore.row_norms(x, [2.0]),
        lambda x: torch.ops.flatcore.head_metrics(*op_arguments(features=x))[0],
    ):
        with pytest.raises(RuntimeError, match=r"has no derivative: .*\.detach\(\)"):
            call(x.clone().requires_grad_()).sum().backward()
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError, ValueError)):
            call(forward_ad.make_dual(x, torch.ones_like(x)))


WRONG_OPS = {
    "wider-features": {"features": torch.zeros(N, D + 1)},
    "wider-head": {"linear_weight": torch.zeros(C, 100 * D)},
    "short-target": {"target": torch.zeros(2, dtype=torch.long)},
    "narrow-target": {"target": torch.zeros(N, dtype=torch.int32)},
    "short-bias": {"linear_bias": torch.zeros(1)},
    "small-logits": {"logits": torch.zeros(1, 1)},
    "integer-features": {"features": torch.zeros(N, D, dtype=torch.long)},
    "vector": {"features": torch.zeros(D)},
}


@pytest.mark.parametrize("case", WRONG_OPS)
def test_the_operators_read_within_bounds(case: str, engine: str) -> None:
    """The kernels take addresses: arguments that do not fit each other must be refused, whoever calls."""
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)) as caught:
        torch.ops.flatcore.head_metrics(*op_arguments(**WRONG_OPS[case]))
    assert "target must hold labels" not in str(caught.value), "labels were read from memory that holds none"


def test_the_operators_know_their_orders(engine: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        torch.ops.flatcore.row_norms(problem()[0], [3.0])


FREED = """
import sys, torch, flatcore
x = torch.ones(4000, 1000)
if sys.argv[1] == "operator":
    call = lambda x: torch.ops.flatcore.row_norms(x, [1.0])
else:
    call = torch.compile(lambda x: flatcore.row_norms(x), backend="aot_eager")
if sys.argv[1] == "compiled-then-freed":
    call(x)
x.untyped_storage().resize_(0)
try:
    call(x)
except Exception as error:
    print("refused:", str(error)[:2000])
else:
    print("a number came out")
"""


@pytest.mark.parametrize(
    "how", ("operator", pytest.param("compiled", marks=pytest.mark.exhaustive), "compiled-then-freed")
)
def test_freed_storage_behind_the_checks_does_not_crash(how: str) -> None:
    run = subprocess.run([sys.executable, "-c", FREED, how], capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0 and run.stdout.startswith("refused:"), (run.returncode, run.stdout, run.stderr[-500:])


# ----------------------------------------------------------------------------------------------- tracing and compiling
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile_gives_equal_numbers_at_every_size(name: str, backend: str) -> None:
    function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for rows in (N, N + 5, 3):
        given = problem(rows, seed=rows)
        assert_all_same(compiled(*given), function(*given))


@pytest.mark.exhaustive
@SCRIPTED
def test_compile_with_inductor() -> None:
    def both(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return flatcore.relative_flatness(x, w, y, measure="neuronwise"), flatcore.row_norms(2 * x, ord=2)

    given = problem()
    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    assert_all_close(compiled(*given), both(*given))  # inductor has its own exp and order of sums


def test_a_compiled_call_follows_the_backend() -> None:
    x, w, y = problem()
    compiled = torch.compile(lambda x, w, y: flatcore.head_metrics(x, w, y).loss, fullgraph=True, backend="eager")
    for name in ("native", "reference", "native"):
        with flatcore.backend(name):
            paths.last_path = None
            assert_same(name, compiled(x, w, y), flatcore.head_metrics(x, w, y).loss)
            paths.last_path = None
            compiled(x, w, y)
            assert (paths.last_path is None) == (name == "reference")


def test_a_compiled_call_refuses_a_wrong_label_and_a_wrong_shape() -> None:
    x, w, y = problem()
    compiled = torch.compile(lambda x, w, y: flatcore.head_metrics(x, w, y).loss, backend="eager")
    with pytest.raises(ValueError, match=r"target must hold labels in 0\.\.3"):
        compiled(x, w, torch.full_like(y, C))
    with pytest.raises(ValueError, match="features must have shape"):
        compiled(x[:, 1:], w, y)


@pytest.mark.parametrize("mode", ("real", "fake", "symbolic"))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_make_fx(name: str, mode: str) -> None:
    function = FUNCTIONS[name]
    graph = make_fx(function, tracing_mode=mode)(*problem())
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert any(n.startswith("flatcore.") for n in names), "the operator is not in the graph"
    given = problem(seed=3)
    assert_all_same(graph(*given), function(*given))


def test_export() -> None:
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", problem()[1])

        def forward(self, x: Tensor) -> Tensor:
            return flatcore.hessian_trace(x, self.w, reduction="none")

    module = Head()
    x = problem()[0]
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=1000)},))
    for rows in (N, 11):
        x = problem(rows, seed=rows)[0]
        assert_same("export", program.module()(x), module(x))


# -------------------------------------------------------------------------------------------------------- transforms
VMAPPED: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "head_metrics": lambda x, w, y: tuple(flatcore.head_metrics(x, w, y)),
    "hessian_trace": lambda x, w, y: flatcore.hessian_trace(x, w, reduction="none"),
    "neuronwise": lambda x, w, y: flatcore.relative_flatness(x, w, measure="neuronwise", reduction="none"),
    "feature_gradient_norms": lambda x, w, y: flatcore.feature_gradient_norms(x, w, y),
    "row_norms": lambda x, w, y: flatcore.row_norms(x.reshape(-1, D)),
}


VMAP_CASES = [
    (name, dims)
    for name in VMAPPED
    for dims in ((0, None, 0), (0, 0, 0), (None, 0, None), (-1, None, -1))
    if dims[0] is not None or name != "row_norms"
]


@pytest.mark.parametrize(("name", "dims"), VMAP_CASES)
def test_vmap(name: str, dims: tuple[int | None, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """Equal to a loop, and without torch's warning that it runs one: there is a rule."""
    function = VMAPPED[name]
    given = []
    for i, dim in enumerate(dims):
        several = [problem(seed=s)[i] for s in range(3)]
        given.append(several[0] if dim is None else torch.stack(several, dim=dim))
    got = torch.vmap(function, in_dims=dims)(*given)
    rows = [
        function(*(x if dim is None else x.select(dim, i) for x, dim in zip(given, dims, strict=True)))
        for i in range(3)
    ]
    assert_all_close(got, tuple(torch.stack(values) for values in zip(*map(_flat, rows), strict=True)))
    output = capfd.readouterr()
    assert "performance drop" not in output.out + output.err


def test_functional_call() -> None:
    class Head(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return flatcore.hessian_trace(x, self.weight, linear_bias=self.bias)

    x, w, _ = problem()
    parameters = {"weight": w, "bias": w[:, 0].clone()}
    got = torch.func.functional_call(Head(D, C), parameters, (x,))
    assert_same("functional_call", got, flatcore.hessian_trace(x, w, linear_bias=w[:, 0]))


# ---------------------------------------------------------------------------------------------------- the direct path
class Plain(Tensor):
    """A subclass that changes nothing."""


class Recorder(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Watcher(TorchFunctionMode):
    """Notes nothing and changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _inside_vmap(x: Tensor) -> bool:
    seen = []
    torch.vmap(lambda row: (seen.append(direct.is_direct(row, x)), row)[1])(x)
    return seen[0]


def _functorch_level_but_plain(x: Tensor) -> bool:
    seen = []
    torch.vmap(lambda row: (seen.append(direct.is_direct(x)), row)[1])(x)
    return seen[0]


def _freed(x: Tensor) -> bool:
    y = x.clone()
    y.untyped_storage().resize_(0)
    return direct.is_direct(y)


def _inside_older_vmap(x: Tensor) -> bool:
    seen: list[bool] = []
    y = x.clone().requires_grad_()
    y.register_hook(lambda upstream: seen.append(direct.is_direct(upstream)))
    torch.autograd.grad(y * 1, y, torch.ones(2, *y.shape), is_grads_batched=True)
    return seen[0]


def _within(mode: Callable[[], Any]) -> Callable[[Tensor], bool]:
    def ask(x: Tensor) -> bool:
        with mode():
            return direct.is_direct(x)

    return ask


def _traced(x: Tensor) -> bool:
    seen = []
    make_fx(lambda x: (seen.append(direct.is_direct(x)), x + 1)[1])(x)
    return seen[0]


def _jit_traced(x: Tensor) -> bool:
    seen = []
    torch.jit.trace(lambda x: (seen.append(direct.is_direct(x)), x + 1)[1], (x,), check_trace=False)
    return seen[0]


def _compiled(x: Tensor) -> bool:
    return torch.compile(lambda x: (x + 1, direct.is_direct(x)), backend="eager", fullgraph=True)(x)[1]


def _dual(x: Tensor) -> bool:
    with forward_ad.dual_level():
        return direct.is_direct(forward_ad.make_dual(x, torch.ones_like(x)))


def _learning_without_grad(x: Tensor) -> bool:
    with torch.no_grad():
        return direct.is_direct(x.clone().requires_grad_())


DIRECT: dict[str, tuple[bool, Callable[[Tensor], bool]]] = {
    "a tensor": (True, direct.is_direct),
    "several, and none": (True, lambda x: direct.is_direct(x, None, x.double(), x.long())),
    "a strided view": (True, lambda x: direct.is_direct(x.T[::2])),
    "an expanded view": (True, lambda x: direct.is_direct(x[:1].expand(5, -1))),
    "a frozen parameter": (True, lambda x: direct.is_direct(torch.nn.Parameter(x, requires_grad=False))),
    "gradient while grad mode is off": (True, _learning_without_grad),
    "inference mode": (True, _within(torch.inference_mode)),
    "autocast": (True, _within(lambda: torch.autocast("cpu", torch.bfloat16))),
    "a parameter": (False, lambda x: direct.is_direct(torch.nn.Parameter(x))),
    "requires gradient": (False, lambda x: direct.is_direct(x, x.clone().requires_grad_())),
    "a subclass": (False, lambda x: direct.is_direct(x.as_subclass(Plain))),
    "a fake tensor": (False, lambda x: direct.is_direct(FakeTensorMode().from_tensor(x))),
    "sparse": (False, lambda x: direct.is_direct(x.to_sparse())),
    "mkldnn": (False, lambda x: direct.is_direct(x.to_mkldnn())),
    "meta": (False, lambda x: direct.is_direct(x.to("meta"))),
    "freed storage": (False, _freed),
    "negative bit": (False, lambda x: direct.is_direct(torch._neg_view(x))),
    "negative bit of a conjugate's imaginary part": (
        False,
        lambda x: direct.is_direct(torch.complex(x, x).conj().imag),
    ),
    "conjugate bit": (False, lambda x: direct.is_direct(torch.complex(x, x).conj())),
    "forward-AD dual": (False, _dual),
    "forward-AD level": (False, _within(forward_ad.dual_level)),
    "vmap": (False, _inside_vmap),
    "a batch of upstreams": (False, _inside_older_vmap),
    "vmap around a plain tensor": (False, _functorch_level_but_plain),
    "dispatch mode": (False, _within(Recorder)),
    "function mode": (False, _within(Watcher)),
    "a default device": (False, _within(lambda: torch.device("meta"))),
    "make_fx": (False, _traced),
    "torch.compile": (False, _compiled),
    "torch.jit.trace": (False, _jit_traced),
}


@SCRIPTED
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("clause", DIRECT)
def test_the_direct_path(clause: str) -> None:
    expected, ask = DIRECT[clause]
    assert ask(problem()[0]) is expected
    assert direct.is_direct(problem()[0]), "a mode was left on"


def test_the_direct_path_is_not_taken_on_hip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not direct.is_direct(problem()[0])


def test_modes_see_the_operator() -> None:
    x, w, y = problem()
    with Recorder() as seen:
        inside = flatcore.head_metrics(x, w, y)
        norms = flatcore.row_norms(x)
    assert "flatcore.head_metrics.default" in seen.names and "flatcore.row_norms.default" in seen.names
    assert_all_same(inside, flatcore.head_metrics(x, w, y))
    assert_all_same(norms, flatcore.row_norms(x))
    with Watcher():
        assert_all_same(flatcore.head_metrics(x, w, y), inside)


def test_a_subclass_keeps_its_kind(engine: str) -> None:
    x, w, y = problem()
    got = flatcore.hessian_trace(x.as_subclass(Plain), w, y)
    assert type(got) is Plain
    assert_same("subclass", got.as_subclass(Tensor), flatcore.hessian_trace(x, w, y))


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
