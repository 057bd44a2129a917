"""Per-sample curvature and gradient statistics of a softmax head, in plain PyTorch.

Letters: N samples, D features, C classes; features phi (N, D), linear_weight W (C, D) with rows w_j, logits
z = (W phi + b)/T, p = softmax(z), target y. Everything is carried in float64 and in the log domain.

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

_GRADIENT_ORDS = {
    "log_feature_gradient_norm": 2,
    "log_feature_gradient_norm_1": 1,
    "log_feature_gradient_norm_inf": math.inf,
}
_PAIRWISE_CLASSES = 2048  # up to here the (C, C) table of squared distances is formed, from differences


def head_metrics(head: Any, fields: int, wide_result: bool) -> tuple[Tensor, Tensor]:
    """Return the chosen ``FIELDS`` as (K, N) and the prediction (N,), int64.

    ``head`` is a record with features (N, D), linear_weight (C, D), linear_bias (C,), logits (N, C), target (N,), the last
    three or None, temperature, ignore_index, include_bias and norm_power. The block is float64 if ``wide_result`` or any
    of features, weight and logits is, otherwise float32.
    """
    features, linear_weight, linear_bias, logits = head.features, head.linear_weight, head.linear_bias, head.logits
    target, temperature, include_bias = head.target, head.temperature, head.include_bias
    inputs = [x for x in (features, linear_weight, logits) if x is not None]
    result = torch.float64 if wide_result or any(x.dtype == torch.float64 for x in inputs) else torch.float32
    wide = torch.float32 if features.device.type == "mps" else torch.float64
    names = [name for bit, name in enumerate(FIELDS) if fields >> bit & 1]

    phi, w = features.detach().to(wide), linear_weight.detach().to(wide)
    b = None if linear_bias is None else linear_bias.detach().to(wide)
    bad = ~phi.isfinite().all(dim=1)
    if logits is None:
        with torch.autocast(phi.device.type, enabled=False):
            z = phi @ w.T
        bad |= ~z.isfinite().all(dim=1)  # an overflowed product is not a masked class
        z = z if b is None else z + b
    else:
        z = logits.detach().to(wide)
    bad |= (z.isnan() | (z == math.inf)).any(dim=1) | (z == -math.inf).all(dim=1)
    z = torch.where(bad.unsqueeze(1), 0, z)

    split = _Split(z, temperature)
    log_n = _log_sum_of_squares(torch.where(bad.unsqueeze(1), 0, phi))  # log ||phi||^2
    log_n_head = torch.logaddexp(log_n, torch.zeros_like(log_n)) if include_bias else log_n
    w_head = torch.cat([w, b.unsqueeze(1)], dim=1) if include_bias and b is not None else w
    log_trace = log_n_head + split.log_one_minus_sum_p2 - 2 * math.log(temperature)

    if target is None:
        valid, known, y = torch.ones_like(bad), torch.zeros_like(bad), torch.zeros_like(split.m)
    else:
        valid, known = target != head.ignore_index, (target >= 0) & (target < w.shape[0])
        y = torch.where(valid & known, target, 0)
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
            value = log_trace + 0.5 * head.norm_power * _log_sum_of_squares(w_head.reshape(1, -1))
        elif name == "log_neuronwise":
            value = log_n_head + _log_weight_variance(split, w_head) - 2 * math.log(temperature)
        elif name == "loss":
            # log-sum-exp minus the target's logit, as differences to the top one
            value = (split.t - z.gather(1, y.unsqueeze(1)).squeeze(1)) / temperature + split.tau.log1p()
        else:
            value = _log_gradient_norm(split, w, y, _GRADIENT_ORDS[name]) - math.log(temperature)
        value = torch.where(bad, math.nan, value)
        if name == "loss" or name in _GRADIENT_ORDS:
            value = torch.where(known, value, math.nan)  # a label that is no class, where it could not be refused
            value = torch.where(valid, value, 0.0 if name == "loss" else -math.inf)
        values.append(value)
    prediction = torch.where(bad, -1, split.m)
    block = torch.stack(values) if values else z.new_empty((0, z.shape[0]))
    return block.to(result), prediction


class _Split:
    """The top class against the rest, every difference formed before it is divided by the temperature."""

    def __init__(self, z: Tensor, temperature: float):
        self.z, self.temperature = z, temperature
        # argmax does not promise the lowest index on ties; the first True of an equality does
        self.t = z.amax(dim=1)
        self.m = (z == self.t.unsqueeze(1)).to(torch.uint8).argmax(dim=1)
        self.is_top = torch.zeros_like(z, dtype=torch.bool).scatter_(1, self.m.unsqueeze(1), True)
        rest = z.masked_fill(self.is_top, -math.inf)
        self.r = rest.amax(dim=1)
        u = _exp_difference(rest, self.r, temperature)
        u1 = u.sum(dim=1)
        self.q = u / torch.where(u1 > 0, u1, 1).unsqueeze(1)
        s2 = (self.q * self.q).sum(dim=1)
        self.g = (self.t - self.r) / temperature
        self.tau = (-self.g).exp() * u1
        self.p_m = 1 / (1 + self.tau)
        self.eps = self.tau / (1 + self.tau)
        self.log_eps = -self.g + u1.log() - self.tau.log1p()
        self.log_one_minus_sum_p2 = self.log_eps + (2 - self.eps * (1 + s2)).log()


def _exp_difference(z: Tensor, top: Tensor, temperature: float) -> Tensor:
    """exp((z_j - top)/T), and 0 for masked classes; (-inf) - (-inf) is never formed."""
    finite_top = torch.where(top == -math.inf, 0, top)
    return ((z - finite_top.unsqueeze(1)) / temperature).exp()


def _log_sum_of_squares(x: Tensor) -> Tensor:
    """Log of the sum of squares of each row, scaled by the largest entry so that no square leaves the range."""
    if x.shape[1] == 0:
        return x.new_full((x.shape[0],), -math.inf)
    largest = x.abs().amax(dim=1)
    scale = torch.where((largest > 0) & (largest < math.inf), largest, 1)
    return ((x / scale.unsqueeze(1)) ** 2).sum(dim=1).log() + 2 * scale.log()


def _power_of_two_scaled(w: Tensor) -> tuple[Tensor, Tensor]:
    """W over a power of two near its largest entry (exact, so that differences of rows stay exact), and its log."""
    largest = w.abs().amax() if w.numel() else w.new_ones(())
    largest = torch.where((largest > 0) & (largest < math.inf), largest, 1)
    scale = largest / largest.frexp().mantissa  # mantissa * 2^e over mantissa: 2^e, without rounding
    return w / scale, scale.log()


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """||a_j - b_k||^2 from differences."""
    if a.device.type == "mps":
        return ((a.unsqueeze(1) - b.unsqueeze(0)) ** 2).sum(dim=2)
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2


def _log_weight_variance(split: _Split, w: Tensor) -> Tensor:
    """log Var_p(w), Var_p(w) = sum_j p_j ||w_j - sum_k p_k w_k||^2.

    With the classes whose row equals w_m taken as one top group of probability P, J all others, p_j = exp(rho) u_j there:
    Var_p(w) = exp(rho) [ P sum_J u_j D_mj + exp(rho) 1/2 sum_JJ u_j u_k D_jk ]. Every term is >= 0: nothing cancels.
    Above 2048 classes the same about the mean of J (``_About``).
    """
    w, log_scale = _power_of_two_scaled(w)
    if w.shape[0] <= _PAIRWISE_CLASSES:
        distance = _squared_distances(w, w)
        from_top = distance[split.m]
        rho, u = _rest(split, from_top == 0)
        pairs = 0.5 * ((u @ distance) * u).sum(dim=1)
        top_group = 1 - rho.exp() * u.sum(dim=1)
        # 1 - (...) is at least 1/C: the top class is in the group
        inner = top_group * (u * from_top).sum(dim=1) + rho.exp() * pairs
        return rho + inner.log() + 2 * log_scale
    out = torch.full_like(split.t, -math.inf)
    for top in split.m.unique().tolist():
        rows = (split.m == top).nonzero().squeeze(1)
        about = _About(split, w, top, rows)
        out[rows] = about.rho + about.variance().log()
    return out + 2 * log_scale


class _About:
    """Some rows of a split with differences of W's rows to that of an anchor class, where none of them are rounded twice.

    ``d`` (C, D); ``equal`` (C,): where they vanish; of all other classes p_j = exp(rho) u_j with the largest u_j equal to 1;
    ``delta`` = sum_j u_j d_j, ``total`` = sum_j u_j.
    """

    def __init__(self, split: _Split, w: Tensor, anchor: int, rows: Tensor):
        self.d = w - w[anchor]
        self.equal = (self.d == 0).all(dim=1)
        self.part = _Rows(split, rows)
        self.rho, self.u = _rest(self.part, self.equal.expand(rows.shape[0], -1))
        self.delta, self.total = self.u @ self.d, self.u.sum(dim=1)

    def variance(self) -> Tensor:
        """Var_p(w)/exp(rho): spread + group ||delta||^2/total, the spread about the mean of the classes that differ.

        sum_j u_j ||d_j||^2 - exp(rho) ||delta||^2 would lose a factor of 1/group, which is C for a flat row: there the
        spread is taken from differences to the mean.
        """
        group = torch.where(self.equal, self.part.p(), 0).sum(dim=1)
        total = torch.where(self.total > 0, self.total, 1)
        mean = self.delta / total.unsqueeze(1)
        mean2 = (mean * mean).sum(dim=1)
        spread = (self.u @ (self.d * self.d).sum(dim=1) - total * mean2).clamp_min(0)
        flat = (group < 0.25).nonzero().squeeze(1)
        if flat.numel():
            spread[flat] = (self.u[flat] * _squared_distances(mean[flat], self.d)).sum(dim=1)
        return torch.where(self.total > 0, spread + group * total * mean2, 0)


def _rest(split: _Split | _Rows, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Classes that are not excluded: p_j = exp(rho) u_j with the largest u_j equal to 1; rho = -inf if there are none."""
    z = split.z.masked_fill(excluded, -math.inf)
    top = z.amax(dim=1)
    u = _exp_difference(z, top, split.temperature)
    rho = (top - split.t) / split.temperature - split.tau.log1p()
    return rho, u


def _log_gradient_norm(split: _Split, w: Tensor, y: Tensor, ord: float) -> Tensor:
    """log ||sum_j p_j (w_j - w_y)||, over the classes whose row differs from w_y."""
    w, log_scale = _power_of_two_scaled(w)
    out = torch.full_like(split.t, -math.inf)
    for label in y.unique().tolist():
        rows = (y == label).nonzero().squeeze(1)
        about = _About(split, w, label, rows)
        if w.shape[1] > 0:
            out[rows] = about.rho + torch.linalg.vector_norm(about.delta, ord=ord, dim=1).log()
    return out + log_scale


class _Rows:
    """Some rows of a split."""

    def __init__(self, split: _Split, rows: Tensor):
        self.z, self.t, self.tau = split.z[rows], split.t[rows], split.tau[rows]
        self.temperature = split.temperature

    def log_p(self) -> Tensor:
        """The logs of their probabilities."""
        return (self.z - self.t.unsqueeze(1)) / self.temperature - self.tau.log1p().unsqueeze(1)

    def p(self) -> Tensor:
        """Their probabilities."""
        return self.log_p().exp()
