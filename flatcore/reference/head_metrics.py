"""Per-sample curvature and gradient statistics of a softmax head, in plain PyTorch.

Letters: N samples, D features, C classes; features phi (N, D), linear_weight W (C, D) with rows w_j, logits
z = (W phi + b)/T, p = softmax(z), target y. Everything is carried in the log domain, in float64 or float32 as
``arithmetic`` says, class by row: tensors are (C, N), for a few classes are summed fastest so.

The split that keeps every value exact at every confidence: with m the top class, r the best of the other logits and
u_j = exp(z_j - r) for j != m, U1 = sum u_j, U2 = sum u_j^2, q_j = u_j/U1,

    tau = exp(r - z_m) U1,   p_m = 1/(1 + tau),   eps = 1 - p_m = tau/(1 + tau),   log eps = (r - z_m) + log U1 - log1p(tau)
    1 - sum p^2 = eps (2 - eps (1 + sum q^2))
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .arithmetic import arithmetic, blocks, joined, widest
from .explicit import gradient_norms, least_left, variance
from .split import About, Rows, Split, width
from .weight import Weight

FIELDS = (
    "confidence",
    "margin",
    "log_one_minus_confidence",
    "log_feature_norm",
    "log_hessian_trace",
    "log_layerwise",
    "log_neuronwise",
    "loss",
    "log_feature_gradient_norm",
    "log_feature_gradient_norm_1",
    "log_feature_gradient_norm_inf",
)
"""The rows of the result, in the order of the bits of ``fields``."""

GRADIENT_ORDS = {
    "log_feature_gradient_norm": 2,
    "log_feature_gradient_norm_1": 1,
    "log_feature_gradient_norm_inf": math.inf,
}
_PAIRWISE = {256: 1 << 62, 2048: 1 << 26}
"""Up to so many classes, and numbers C^2 D, the (C, C) table of squared distances is formed, from differences, a call."""


def head_metrics(head: Any, fields: int, wide_result: bool, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return the chosen ``FIELDS`` as (K, N) and the prediction (N,), int64.

    ``head`` is a record with features (N, D), linear_weight (C, D), linear_bias (C,), logits (N, C), target (N,), the last
    three or None, temperature, ignore_index, include_bias and norm_power. The block is float64 if ``wide_result`` or any
    of features, weight and logits is, otherwise float32; float32 also where the device has nothing wider. ``dtype``: the
    arithmetic's, float32 or float64, instead of what ``arithmetic`` chooses; inputs of float64 are never narrowed.

    Numerics: from exact logits a log is right to 1e-12 of max(1, |log|) in float64; in float32 to 4e-6 and 4 units in the
    last place of the largest log that it is a sum of (2 log ||phi||, log eps, log ||W||^2), at every confidence.
    """
    features, weight = head.features, head.linear_weight
    inputs = (features, weight, head.logits)
    wide = arithmetic(*inputs, dtype=dtype)
    result = widest(features.device) if wide_result else torch.float32
    if any(x is not None and x.dtype == torch.float64 for x in inputs):
        result = torch.float64
    names = [name for bit, name in enumerate(FIELDS) if fields >> bit & 1]
    (N, D), C = features.shape, weight.shape[0]
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        call = _Call(head, wide, names, least_left(wide, result, inputs))
        found = [call.rows(rows) for rows in blocks(N, width(C, D), wide, features.device)]
        values, m, bad = (joined(list(parts), dim=-1) for parts in zip(*found, strict=True))
        values = values.masked_fill(bad, math.nan)
        if names and names[-1] in LABELLED:
            values = torch.stack([call.chosen(*field) for field in zip(names, values.unbind(0), strict=True)])
    return values.to(result), m.masked_fill(bad, -1)


class _Call:
    """A head and the fields that are asked of it, in one arithmetic; what belongs to W alone is found once."""

    def __init__(self, head: Any, wide: torch.dtype, names: list[str], least: float):
        self.head, self.wide, self.names, self.least = head, wide, names, least
        self.weight, self.counted = weights(head, wide)
        self.index = torch.arange(self.weight.C, device=head.features.device).unsqueeze(1)
        if any(name in LABELLED for name in names):
            self.y, self.valid, self.known = labels(head)
        if "log_layerwise" in names:
            self.log_norm = 0.5 * head.norm_power * self.counted.log_square()
        self.ords = [GRADIENT_ORDS[name] for name in names if name in GRADIENT_ORDS]
        if self.ords:
            self.weight.prepare()
            self.log_scale = self.weight.log_scale - math.log(head.temperature)
        self.distances = None
        if "log_neuronwise" in names:
            self.distances = distances(self.counted.prepare())
            self.log_scale_square = 2 * (self.counted.log_scale - math.log(head.temperature))

    def rows(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of some rows the fields (K, N), the top class, and which are no numbers, (N,)."""
        head, names, temperature = self.head, self.names, self.head.temperature
        given = Rows(head, rows, self.wide)
        split = Split(given, temperature, self.index)
        if any(name in _OF_FEATURES for name in names):
            log_n = given.log_square()
            log_n_head = torch.logaddexp(log_n, torch.zeros_like(log_n)) if head.include_bias else log_n
        if any(name in _OF_TRACE for name in names):
            log_trace = log_n_head + split.log_one_minus_sum_p2() - 2 * math.log(temperature)
        if self.ords:
            about_label = About(split, self.weight, self.y[rows])
            norms = gradient_norms(about_label, self.ords, self.least)
        values = []
        for name in names:
            if name == "confidence":
                value = split.p_m
            elif name == "margin":
                value = split.g
            elif name == "log_one_minus_confidence":
                value = split.log_eps
            elif name == "log_feature_norm":
                value = 0.5 * log_n
            elif name == "log_hessian_trace":
                value = log_trace
            elif name == "log_layerwise":
                value = log_trace + self.log_norm
            elif name == "log_neuronwise":
                about = About(split, self.counted, split.m)
                value = (
                    log_n_head + (about.rho + variance(about, self.distances, self.least).log()) + self.log_scale_square
                )
            elif name == "loss":
                # log-sum-exp minus the target's logit, as differences to the top one
                z_y = split.z.gather(0, self.y[rows].unsqueeze(0)).squeeze(0)
                value = (split.t - z_y) / temperature + split.log1p_tau
            else:
                value = about_label.rho + norms[GRADIENT_ORDS[name]].log() + self.log_scale
            values.append(value)
        block = torch.stack(values) if values else given.t.new_empty((0, given.t.shape[0]))
        return block, split.m, given.bad

    def chosen(self, name: str, value: Tensor) -> Tensor:
        """A field where labels decide: NaN for one that is no class and could not be refused, 0 or -inf for ignored rows."""
        if name not in LABELLED:
            return value
        value = torch.where(self.known, value, math.nan)
        return torch.where(self.valid, value, 0.0 if name == "loss" else -math.inf)


_OF_TRACE = ("log_hessian_trace", "log_layerwise")
_OF_FEATURES = ("log_feature_norm", *_OF_TRACE, "log_neuronwise")
LABELLED = ("loss", *GRADIENT_ORDS)


def weights(head: Any, wide: torch.dtype) -> tuple[Weight, Weight]:
    """W, and W with the bias as a further column where that counts as a parameter."""
    plain = Weight(head.linear_weight, None, wide)
    if head.linear_bias is None or not head.include_bias:
        return plain, plain
    return plain, Weight(head.linear_weight, head.linear_bias, wide)


def labels(head: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The rows' labels, 0 where there is none; which of them count, and which are classes."""
    if head.target is None:
        none = torch.zeros(head.features.shape[0], dtype=torch.int64, device=head.features.device)
        return none, none == 0, none != 0
    valid = head.target != head.ignore_index
    known = (head.target >= 0) & (head.target < head.linear_weight.shape[0])
    return torch.where(valid & known, head.target, 0), valid, known


def distances(weight: Weight) -> Tensor | None:
    """||w_j - w_k||^2, (C, C), where the table is small enough: rows are close to many others where D is small."""
    C, numbers = weight.C, weight.C**2 * weight.D
    small = any(classes >= C and numbers <= most for classes, most in _PAIRWISE.items())
    return weight.distances() if small else None
