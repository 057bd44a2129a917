"""The torch.library operators: their checks, their fakes, and the direct path that passes them by.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from calling import FUNCTIONS, C, D, N, Recorder, assert_all_same, flat, problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import flatcore
from flatcore._check.tolerance import assert_same
from flatcore._engine import direct

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")
INF = math.inf
# make_dual and inductor load parts of torch that are scripted, and warn of torch.jit.script's end
SCRIPTED = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


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
    real = flat(FUNCTIONS[name](*given))
    with FakeTensorMode() as mode:
        fake = flat(FUNCTIONS[name](*(mode.from_tensor(a) for a in given)))
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


# ---------------------------------------------------------------------------------------------------- the direct path
class Plain(Tensor):
    """A subclass that changes nothing."""


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
