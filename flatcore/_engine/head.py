"""The record of a head: every argument of it, once, from the public function to the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor


class Head(NamedTuple):
    """A softmax head and the rows it is asked about, checked and 2-D; passed whole, flattened only by an operator.

    A new option of a head is one field here, behind the tensors; the operators' schema follows from the annotations.
    """

    features: Tensor  # (N, D)
    linear_weight: Tensor  # (C, D)
    linear_bias: Tensor | None = None  # (C,)
    logits: Tensor | None = None  # (N, C)
    target: Tensor | None = None  # (N,) int64 labels
    temperature: float = 1.0
    ignore_index: int = -100
    include_bias: bool = False
    norm_power: int = 2

    @property
    def N(self) -> int:  # noqa: N802
        """Rows."""
        return self.features.shape[0]

    @property
    def D(self) -> int:  # noqa: N802
        """Features."""
        return self.features.shape[1]

    @property
    def C(self) -> int:  # noqa: N802
        """Classes."""
        return self.linear_weight.shape[0]

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What a gradient may be wanted of, in the order of ``INPUTS``."""
        return self.features, self.linear_weight, self.linear_bias, self.logits

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All fields that hold tensors."""
        return self.features, self.linear_weight, self.linear_bias, self.logits, self.target

    @property
    def options(self) -> tuple[Any, ...]:
        """All other fields."""
        return self[len(_TENSORS) :]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> Head:
        """Put together what ``tensors`` and ``options`` took apart."""
        return cls._make((*tensors, *options))

    @classmethod
    def split(cls, arguments: Sequence[Any]) -> tuple[Head, Sequence[Any]]:
        """The head that an operator's flat arguments begin with, and those behind it."""
        width = len(cls._fields)
        return cls._make(arguments[:width]), arguments[width:]


INPUTS = ("features", "linear_weight", "linear_bias", "logits")
_SCHEMA_TYPES: dict[Any, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool"}
_SCHEMA_OF = {name: _SCHEMA_TYPES[kind] for name, kind in get_type_hints(Head).items()}
_TENSORS = tuple(name for name, kind in _SCHEMA_OF.items() if kind.startswith("Tensor"))
assert Head._fields[: len(_TENSORS)] == _TENSORS == (*INPUTS, "target"), "the tensors of a head come first"

SCHEMA = ", ".join(f"{kind} {name}" for name, kind in _SCHEMA_OF.items())
"""The part of an operator's schema that a head takes."""


def is_double(head: Head) -> bool:
    """Whether any input asks for float64 arithmetic and results; a float64 bias alone does not."""
    double = torch.float64
    if head.features.dtype is double or head.linear_weight.dtype is double:
        return True
    return head.logits is not None and head.logits.dtype is double
