"""The measures' backward through all that surrounds a call: operators, transforms, the compiler, threads, memory.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
from typing import Any

import emulation
import pytest
import torch
from differentiated import problem
from torch import Tensor

import flatcore
from flatcore import reference
from flatcore._check.tolerance import assert_same
from flatcore._engine import paths

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")

INF = math.inf
# make_dual and inductor load parts of torch that are scripted, and warn of torch.jit.script's end
SCRIPTED = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

OPERATORS = {
    "trace": {"fields": 1 << reference.FIELDS.index("log_hessian_trace")},
    "neuronwise-bias": {"fields": 1 << reference.FIELDS.index("log_neuronwise"), "include_bias": True},
    "gradient": {
        "fields": 1 << reference.FIELDS.index("log_feature_gradient_norm"),
        "target": torch.tensor([0, 2, 1, 3]),
    },
}


def _operator_arguments(case: str, N: int = 4) -> tuple[Any, ...]:
    given = problem(N, dtype=torch.float32)
    arguments = {
        "features": given["features"], "linear_weight": given["linear_weight"], "linear_bias": given["linear_bias"],
        "logits": None, "target": None, "temperature": 1.0, "ignore_index": -100, "include_bias": False,
        "norm_power": 2, "fields": 0, "wide_result": True,
    }  # fmt: skip
    return tuple((arguments | OPERATORS[case]).values())


@SCRIPTED
@pytest.mark.parametrize("case", OPERATORS)
def test_opcheck_with_inputs_that_require_gradient(case: str, path: str) -> None:
    torch.library.opcheck(torch.ops.flatcore.head_metrics.default, _operator_arguments(case))


@pytest.mark.crossed
@SCRIPTED
@pytest.mark.parametrize("case", OPERATORS)
@pytest.mark.parametrize("wanted", ([True, True, True, False], [True, False, False, False], [False] * 4))
def test_opcheck_of_the_backward(case: str, wanted: list[bool], path: str) -> None:
    *arguments, fields, _ = (a.detach() if isinstance(a, Tensor) else a for a in _operator_arguments(case))
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    log_coefficient = torch.tensor([0.0, 1.0, -1.5, -INF], dtype=torch.float64)
    for logs in (None, log_coefficient):
        given = (upstream, logs, *arguments, fields.bit_length() - 1, wanted)
        torch.library.opcheck(torch.ops.flatcore.head_metrics_backward.default, given)


@pytest.mark.parametrize("kind", ("fused", "chunked", "cuda-chunked"))
def test_the_backward_operator_reads_any_layout(kind: str, one_thread: None) -> None:
    """Every second number, one number for all rows, the negative view of a conjugate: by their values."""
    given = problem(dtype=torch.float32)
    inputs = [given[name].detach() for name in ("features", "linear_weight")]
    logs = torch.tensor([0.0, -0.5, -3.0, 1.0], dtype=torch.float64)
    layouts = (
        torch.stack([logs, logs + 9], dim=1)[:, 0],
        torch.tensor([0.5], dtype=torch.float64).expand(4),
        torch._neg_view(-logs),
    )
    options = (
        None,
        None,
        None,
        1.0,
        -100,
        False,
        2,
        reference.FIELDS.index("log_neuronwise"),
        [True, True, False, False],
    )
    cuda = kind.startswith("cuda")
    kernels = emulation.cuda_kernels() if cuda else contextlib.nullcontext()
    with flatcore.backend("native"), paths.forced(path=kind.removeprefix("cuda-")), kernels:
        for layout in layouts:
            upstream = torch.ones(4, dtype=torch.float64)
            got, want = (
                torch.ops.flatcore.head_metrics_backward(upstream, x, *inputs, *options)
                for x in (layout, layout.resolve_neg().contiguous())
            )
            for a, b in zip(got[:2], want[:2], strict=True):
                assert_same(kind, a, b)


WRONG_BACKWARDS = {
    "wide-upstream": ({"upstream": torch.ones(5, dtype=torch.float64)}, ValueError, "upstream must have shape"),
    "wide-logs": (
        {"log_coefficient": torch.ones(5, dtype=torch.float64)},
        ValueError,
        "log_coefficient must have shape",
    ),
    "half-upstream": ({"upstream": torch.ones(4, dtype=torch.float16)}, TypeError, "upstream must have dtype"),
    "another-field": ({"field": reference.FIELDS.index("loss")}, ValueError, "field must be that of one of"),
    "no-field": ({"field": 99}, ValueError, "field must be that of one of"),
    "no-target": ({"field": reference.FIELDS.index("log_feature_gradient_norm")}, ValueError, "needs a target"),
    "wants-logits": ({"wanted": [True, False, False, True]}, ValueError, "wanted must hold four flags"),
    "three-flags": ({"wanted": [True] * 3}, ValueError, "wanted must hold four flags"),
    "bad-label": (
        {"field": reference.FIELDS.index("log_feature_gradient_norm"), "target": torch.tensor([0, 9, 1, 2])},
        ValueError,
        "target must hold labels in 0..3",
    ),
}


@pytest.mark.parametrize("case", WRONG_BACKWARDS)
def test_the_backward_operator_checks_its_arguments(case: str) -> None:
    change, error, words = WRONG_BACKWARDS[case]
    given = problem(dtype=torch.float32)
    arguments = {
        "upstream": torch.ones(4, dtype=torch.float64), "log_coefficient": None, "features": given["features"].detach(),
        "linear_weight": given["linear_weight"].detach(), "linear_bias": None, "logits": None, "target": None,
        "temperature": 1.0, "ignore_index": -100, "include_bias": False, "norm_power": 2,
        "field": reference.FIELDS.index("log_hessian_trace"), "wanted": [True, True, False, False],
    }  # fmt: skip
    with pytest.raises(error, match=words):
        torch.ops.flatcore.head_metrics_backward(*(arguments | change).values())


@SCRIPTED
@pytest.mark.parametrize("backend", ("aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)))
def test_a_compiled_training_step_gives_the_same_numbers(backend: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    body, head = torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        features = body(x).relu()
        logits = head(features)
        flatness = flatcore.relative_flatness(features, head.weight, linear_bias=head.bias, logits=logits, log=True)
        norms = flatcore.feature_gradient_norms(features, head.weight, y, linear_bias=head.bias, reduction="mean")
        return torch.nn.functional.cross_entropy(logits, y) + 0.1 * flatness + norms

    step = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    parameters = [*body.parameters(), *head.parameters()]
    for rows in (8, 5, 13):  # one graph serves all sizes
        x, y = torch.randn(rows, 6), torch.arange(rows) % 4
        with torch.compiler.set_stance("fail_on_recompile" if rows != 8 else "default"):
            value = step(x, y)
        want_value = loss(x, y)
        torch.testing.assert_close(value, want_value, rtol=2e-6, atol=1e-6)
        got, want = torch.autograd.grad(value, parameters), torch.autograd.grad(want_value, parameters)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


def test_functional_gradients_and_vmap_agree_with_backward(path: str) -> None:
    given = {name: value.detach() for name, value in problem(6, dtype=torch.float32).items()}
    x, w, b = given["features"], given["linear_weight"], given["linear_bias"]
    target = torch.tensor([0, 1, 2, 3, 0, 1])

    def one(row: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        trace = flatcore.relative_flatness(row, weight, linear_bias=b, measure="neuronwise", log=True)
        return trace + flatcore.feature_gradient_norms(row, weight, y, linear_bias=b)

    d_x, d_w = [], []
    for row, y in zip(x, target, strict=True):
        inputs = row.clone().requires_grad_(), w.clone().requires_grad_()
        for into, gradient in zip((d_x, d_w), torch.autograd.grad(one(*inputs, y), inputs), strict=True):
            into.append(gradient)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got_x, got_w = torch.vmap(torch.func.grad(one, argnums=(0, 1)), in_dims=(0, None, 0))(x, w, target)
        only_x = torch.vmap(torch.func.grad(one), in_dims=(0, None, 0))(x, w, target)
        heads = w + torch.arange(6.0)[:, None, None] / 8
        per_head = torch.vmap(torch.func.grad(one, argnums=1), in_dims=(None, 0, None))(x[0], heads, target[0])
    torch.testing.assert_close(got_x, torch.stack(d_x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(only_x, torch.stack(d_x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_w, torch.stack(d_w), rtol=1e-5, atol=1e-6)
    for head, gradient in zip(heads, per_head, strict=True):
        torch.testing.assert_close(
            gradient, torch.func.grad(one, argnums=1)(x[0], head, target[0]), rtol=1e-5, atol=1e-6
        )


def test_jacobian_by_vmap_over_upstreams(path: str) -> None:
    x = problem(3, dtype=torch.float32)["features"]
    w = problem(3, dtype=torch.float32)["linear_weight"].detach()
    value = flatcore.hessian_trace(x, w, reduction="none")
    (rows,) = torch.autograd.grad(value, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    for i in range(3):
        (want,) = torch.autograd.grad(value, x, torch.eye(3)[i], retain_graph=True)
        torch.testing.assert_close(rows[i], want, rtol=1e-6, atol=1e-7)
        assert (rows[i][[k for k in range(3) if k != i]] == 0).all()


def test_autocast_and_mixed_types(path: str) -> None:
    given = problem(16, 8, 5, dtype=torch.float32)
    w, b = given["linear_weight"], given["linear_bias"]
    x = given["features"].detach().bfloat16().requires_grad_()
    exact = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = flatcore.relative_flatness(x, w, linear_bias=b)
        got = torch.autograd.grad(value, (x, w, b))
    want = torch.autograd.grad(flatcore.relative_flatness(exact, w, linear_bias=b), (exact, w, b))
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.float32] and value.dtype == torch.float32
    assert_same("features", got[0], want[0].bfloat16())
    for a, c in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6 * c.abs().max().item())


def test_backward_in_another_thread_and_after_a_change_in_place() -> None:
    given = problem(8, dtype=torch.float32)
    x, w = given["features"], given["linear_weight"].detach()
    value = flatcore.hessian_trace(x, w)
    w += 1  # saved for backward: autograd must notice
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_freed_storage_between_forward_and_backward_does_not_crash() -> None:
    """FSDP frees a gathered parameter after the forward pass; saved, it has no memory to read."""
    x = problem(8, dtype=torch.float32)["features"]
    w = problem(8, dtype=torch.float32)["linear_weight"].detach().clone()
    value = flatcore.hessian_trace(x, w)
    w.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError), match="own its memory"):
        value.backward()


@pytest.mark.exhaustive
def test_memory_does_not_grow_over_200_steps() -> None:
    torch.manual_seed(0)
    body, head = torch.nn.Linear(16, 32), torch.nn.Linear(32, 10)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=1e-3)
    x = torch.randn(64, 16)

    def step() -> None:
        optimizer.zero_grad()
        features = body(x).relu()
        flatcore.relative_flatness(features, head.weight, linear_bias=head.bias, log=True).backward()
        optimizer.step()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    for _ in range(5):
        step()
    before = alive()
    gc.disable()
    try:
        for _ in range(200):
            step()
        without_collector = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    finally:
        gc.enable()
    assert without_collector <= before, "a reference cycle keeps tensors until the collector runs"
    assert alive() <= before
