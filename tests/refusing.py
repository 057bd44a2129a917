"""What the tests of refusals share: arguments that are right, a change to one, and the words that must come.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flatcore

N, D, C = 4, 3, 5
# make_dual loads torch's own scripted decompositions, which warn of torch.jit.script's end
FORWARD_AD = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

# what is refused before a path is chosen is the same on both
CHECKED_FIRST = pytest.mark.parametrize("engine", ("reference", "fused"), indirect=True)


def refuses(kind: type[Exception], words: tuple[str, ...], call: Callable[[], Any]) -> None:
    """Require the exception's exact type and every word in its message."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in the message: {caught.value}"


def arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of hessian_trace that are right, and the changes."""
    g = torch.Generator().manual_seed(11)
    features, weight, bias = (torch.randn(*s, generator=g) for s in ((N, D), (C, D), (C,)))
    right = {
        "features": features,
        "linear_weight": weight,
        "target": torch.tensor([0, 4, 2, 1]),
        "linear_bias": bias,
        "logits": features @ weight.T + bias,
        "weight": torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0]),
    }
    return right | changes


def trace_with(name: str, change: Callable[[Tensor], Any]) -> Callable[[], Any]:
    """Return a call of hessian_trace with one argument replaced by what ``change`` makes of it."""
    right = arguments()
    changed = right | {name: change(right[name])}
    return lambda: flatcore.hessian_trace(**changed)


def gradients_with(**changes: Any) -> Any:
    """Call feature_gradient_norms with some arguments changed."""
    right = arguments()
    del right["weight"]
    return flatcore.feature_gradient_norms(**(right | changes))
