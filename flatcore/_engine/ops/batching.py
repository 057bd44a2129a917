"""The batch of a torch.vmap: folded into N where rows are independent, else taken one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..head import Head


def batch_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The batch as the first dimension, expanded where there is none."""
    return x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def folded(info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments of a batched call with the batch folded into N."""
    return [
        batch_first(x, dim, info.batch_size).flatten(0, 1) if isinstance(x, Tensor) else x
        for x, dim in zip(arguments, in_dims, strict=True)
    ]


def folded_head(head: Head, dims: Any, size: int) -> Head:
    """A batch of rows for one head, folded into N; ``dims``, a Head, has the batch's dimension of each tensor, or None."""

    def rows(name: str) -> Any:
        x = getattr(head, name)
        return None if x is None else batch_first(x, getattr(dims, name), size).flatten(0, 1)

    return head._replace(features=rows("features"), logits=rows("logits"), target=rows("target"))


def heads(head: Head, dims: Any, size: int) -> Iterator[Head]:
    """The heads of a batch, one by one."""
    several = [
        None if x is None else batch_first(x, dim, size) for x, dim in zip(head.tensors, dims.tensors, strict=True)
    ]
    for i in range(size):
        yield Head.of([None if x is None else x[i] for x in several], head.options)
