"""The textbook's formulas in float64, which autograd can differentiate: an oracle for situations, not for confidence.

They form 1 - p. With no 1 - p_max below 1e-4 that costs 1e-12 of the value, so there they are the truth, and elsewhere
they refuse to be one.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A float32 result from float32 features: 4e-6 of its own (flatcore/_check/tolerance.py), and twice the rounding of a logit,
# which is 2 (2 sqrt(D) + 4) 2^-24 of its absolute terms: 5e-6 at D = 32 and terms that add up to 2.6. Doubled for
# larger sums.
FLOAT32 = 2e-5
FLOAT64 = 1e-10
MEASURES = ("hessian_trace", "layerwise", "neuronwise")


def rows(
    name: str,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Each row's value (N,): of a measure, or ``feature_gradient_norm`` (L2), which needs labels."""
    x, w = features.double().reshape(-1, features.shape[-1]), weight.double()
    z = x @ w.T / temperature
    if bias is not None:
        z = z + bias.double() / temperature
    p = z.softmax(1)
    assert (1 - p.detach().amax(1)).min() > 1e-4, "a row is too confident for the textbook"
    if name == "feature_gradient_norm":
        assert target is not None
        return ((p - torch.nn.functional.one_hot(target.reshape(-1), w.shape[0])) @ w / temperature).norm(dim=1)
    norms = x.square().sum(1) / temperature**2
    if name == "neuronwise":
        return norms * (p * (w[None] - (p @ w)[:, None]).square().sum(2)).sum(1)
    trace = norms * (p * (1 - p)).sum(1)
    return trace if name == "hessian_trace" else trace * w.square().sum()


def mean(name: str, *arguments: Tensor | None, ignore_index: int = -100, temperature: float = 1.0) -> Tensor:
    """Mean over the rows whose label is not ``ignore_index``; arguments as :func:`rows`."""
    values = list(arguments)
    if len(values) == 4 and values[3] is not None:
        kept = values[3].reshape(-1) != ignore_index
        values[0] = values[0].reshape(-1, values[0].shape[-1])[kept]
        values[3] = values[3].reshape(-1)[kept]
    return rows(name, *values, temperature=temperature).mean()
