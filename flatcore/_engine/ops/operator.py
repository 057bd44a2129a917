"""One operator of torch.library: schema, run, fake, batching and derivative, declared together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import backend, proof


class Operator(NamedTuple):
    """A declaration. ``backward`` and ``setup`` are an autograd function's; ``vmap`` takes (info, in_dims, *arguments)."""

    schema: str
    run: Callable[..., Any]
    fake: Callable[..., Any]
    vmap: Callable[..., Any]
    backward: Callable[..., Any]
    setup: Callable[..., None] | None = None

    @property
    def name(self) -> str:
        """The name behind ``torch.ops.flatcore``."""
        return self.schema[: self.schema.index("(")]


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For an operator without a derivative."""


def _choice_of_kernels() -> str:
    """Read while a graph is traced, to have the graph guarded by it.

    An operator chooses when it runs. But a graph that is captured for replay (CUDA graphs) keeps the kernels of its time:
    once a check or the user has let in others it is made again.
    """
    return backend.selected + proof.epoch


def caller(operator: Operator) -> Callable[..., Any]:
    """The function that calls the operator, whatever transform is in the way.

    torch.func's transforms take no derivative from torch.library: for them the same declaration is an autograd function.
    """
    name = operator.name

    def run(*arguments: Any) -> Any:
        return getattr(torch.ops.flatcore, name)(*arguments)

    function = type(
        f"flatcore::{name}",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(run),
            "setup_context": staticmethod(operator.setup or _keep_nothing),
            "backward": staticmethod(operator.backward),
            "vmap": staticmethod(operator.vmap),
        },
    )

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            _choice_of_kernels()
            return run(*arguments)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return function.apply(*arguments)  # type: ignore[attr-defined]
        return run(*arguments)

    return call


def register(*operators: Operator) -> torch.library.Library | None:
    """Define the operators once per process: a second import of the package finds them and keeps them."""
    library = torch.library.Library("flatcore", "FRAGMENT")
    for operator in operators:
        try:
            library.define(operator.schema)
        except RuntimeError as error:
            if "same name" not in str(error) and "multiple times" not in str(error):
                raise
            return None
        name = f"flatcore::{operator.name}"
        library.impl(operator.name, operator.run, "CompositeExplicitAutograd")
        torch.library.register_fake(name, operator.fake, lib=library)
        torch.library.register_autograd(name, operator.backward, setup_context=operator.setup, lib=library)
        torch.library.register_vmap(name, operator.vmap, lib=library)
    return library
