"""Calls that are traced, compiled, exported, mapped over or made functional give equal numbers.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from calling import FUNCTIONS, C, D, N, assert_all_close, assert_all_same, flat, problem
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import flatcore
from flatcore._check.tolerance import assert_same
from flatcore._engine import paths

# some heads here have one class, and are meant to
pytestmark = pytest.mark.filterwarnings("ignore:.* has one output:UserWarning")
# make_dual and inductor load parts of torch that are scripted, and warn of torch.jit.script's end
SCRIPTED = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


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
    assert_all_close(got, tuple(torch.stack(values) for values in zip(*map(flat, rows), strict=True)))
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
