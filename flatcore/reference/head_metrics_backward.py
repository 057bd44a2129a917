"""Gradients of one measure of a softmax head, in plain PyTorch, in closed form.

Letters as in ``head_metrics``. With c_n = dL/d log v_n of sample n's value v_n, everything below is the derivative of
log v, so nothing in it shrinks as confidence grows. Shares are taken about an anchor class a (the top class; for
gradient norms the label): with d_j = w_j - w_a, J the classes with d_j != 0, p_j = exp(rho) u_j there, max u_j = 1,

    trace, layerwise   d log v/dz_m = -2 p_m (p_m - eps s2)/B,  d log v/dz_j = 2 q_j (sum p^2 - p_j)/B,  B = 2 - eps (1 + s2)
    neuronwise         V = Var_p(w) = exp(rho) V_g,  delta = sum_J u_j d_j,  V_g = sum_J u_j ||d_j||^2 - exp(rho) ||delta||^2
                       J: u_j (||d_j - exp(rho) delta||^2 - V)/V_g;   others: p_j (exp(rho) ||delta||^2/V_g - 1)
                       d log v/dw_j = 2 u_j (d_j - exp(rho) delta)/V_g;  others: -2 p_j delta/V_g
    gradient norm      F = exp(rho) nu/T,  nu = ||delta||,  e = its dual direction,  h_j = e d_j/T
                       J: u_j (h_j - F)/nu;   others: -p_j/T
                       d log v/dw_j = u_j e/nu;   others: (p_j - [j = y]) e/(T F)

and ||phi||^2 in the first three adds 2 phi/||phi||^2; ||W||_F^p adds p w_j/||W||_F^2. z is before the division by T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arithmetic import arithmetic, blocks, joined, norms, total
from .explicit import least_left, with_gradient_norm, with_variance
from .head_metrics import FIELDS, GRADIENT_ORDS, distances, labels, weights
from .split import About, Rows, Split, width

DIFFERENTIABLE = ("log_hessian_trace", "log_layerwise", "log_neuronwise", *GRADIENT_ORDS)
"""The fields that have a derivative."""


def head_metrics_backward(
    upstream: Tensor,
    log_coefficient: Tensor | None,
    head: Any,
    field: int,
    wanted: Sequence[bool],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the head's features, linear_weight, linear_bias and logits, None where not wanted.

    ``head`` and ``dtype`` as in :func:`head_metrics`. ``upstream`` (N,) or one number, times exp(``log_coefficient``) (N,)
    (None: 0), is the derivative of the result with respect to each row's log. A row where either says 0, an ignored one and
    one whose value is 0 add nothing, whatever stands in them.

    Numerics: each entry to 2e-12 (float64) or 8e-6 (float32) and a rounding for each term of its sums, of the terms' size.
    """
    name = FIELDS[field]
    if name in GRADIENT_ORDS and head.target is None:
        raise ValueError("the gradient of a gradient norm needs a target")
    features, linear_weight, linear_bias, logits = head.features, head.linear_weight, head.linear_bias, head.logits
    wide = arithmetic(features, linear_weight, logits, dtype=dtype)
    (N, D), C = features.shape, linear_weight.shape[0]
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        call = _Call(upstream, log_coefficient, head, name, wide)
        found = [call.rows(rows) for rows in blocks(N, width(C, D), wide, features.device)]
        d_features, d_logits = (joined(list(parts)) for parts in zip(*found, strict=True))
        d_weight, d_bias = call.of_weight()
    gradients = ((d_features, features), (d_weight, linear_weight), (d_bias, linear_bias), (d_logits, logits))
    of_features, of_weight, of_bias, of_logits = (
        gradient.to(x.dtype) if want and x is not None else None
        for (gradient, x), want in zip(gradients, wanted, strict=True)
    )
    return of_features, of_weight, of_bias, of_logits


class _Call:
    """A head, the field that is differentiated, what comes from upstream, and the sums over rows, which are W's gradient."""

    def __init__(self, upstream: Tensor, log_coefficient: Tensor | None, head: Any, name: str, wide: torch.dtype):
        self.head, self.name, self.wide = head, name, wide
        self.plain, self.counted = weights(head, wide)
        self.index = torch.arange(self.plain.C, device=head.features.device).unsqueeze(1)
        inputs = (head.features, head.linear_weight, head.logits)
        self.least = least_left(wide, head.features.dtype, inputs)
        upstream = upstream.expand(head.features.shape[0])
        logs = torch.zeros_like(upstream) if log_coefficient is None else log_coefficient
        self.keep = (upstream != 0) & (logs != -math.inf)
        # of value 0, 2^-150 or 2^-1075 of the result's format, its log masked by the caller: an inf or NaN that counts as 0
        double = any(x is not None and x.dtype == torch.float64 for x in inputs)
        self.keep &= upstream.isfinite() | ~(logs < (-745.133 if double else -103.972))
        self.upstream, self.logs = upstream, logs
        self.gradient_norm = name in GRADIENT_ORDS
        if self.gradient_norm:
            self.y, valid, self.known = labels(head)
            self.keep &= valid
            self.plain.prepare()
        elif name == "log_neuronwise":
            self.distances = distances(self.counted.prepare())
        elif name == "log_layerwise":
            self.log_square = self.counted.log_square()
        C, D = self.plain.C, self.plain.D
        zero = self.plain.scale.new_zeros
        self.through_logits = zero((C, D)), zero(C)
        # what does not pass through logits, (C, D) or, with the bias counted, (C, D + 1)
        self.beside: Tensor | float = 0.0
        self.total, self.poison = zero(()), zero(())

    def coefficient(self, rows: slice, live: Tensor, log: Tensor | float = 0.0) -> Tensor:
        """c_n exp(-log), 0 where a row adds nothing: in one exponent, for c alone may leave the range."""
        half = (0.5 * (self.logs[rows] - log)).exp()  # in two steps: exp of -740 has few digits left
        return torch.where(live, (self.upstream[rows] * half * half).to(self.wide), 0)

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Of some rows the gradients of the features (N, D) and logits (N, C); W's are added up."""
        head, name = self.head, self.name
        keep = self.keep[rows]
        given = Rows(head, rows, self.wide, keep)
        bad = given.bad
        if self.gradient_norm:
            bad = bad | (keep & ~self.known[rows])
        split = Split(given, head.temperature, self.index)
        live = keep & ~bad
        phi = torch.where(bad.unsqueeze(1), 0, given.phi)
        d_features: Tensor | float = 0.0
        if self.gradient_norm:
            cotangent, beside = self._of_gradient_norm(split, rows, live)
            self.beside = self.beside + beside
        else:
            log_n = given.log_square()
            log_n = torch.logaddexp(log_n, torch.zeros_like(log_n)) if head.include_bias else log_n
            none = (log_n == -math.inf) | (split.log_eps == -math.inf)
            if name == "log_layerwise":
                none |= self.log_square == -math.inf
            live = live & ~none
            if name == "log_neuronwise":
                cotangent, beside, live = self._of_variance(split, rows, live)
                self.beside = self.beside + beside
            else:
                cotangent = _of_trace(split, self.coefficient(rows, live))
            if name == "log_layerwise":
                self.total = self.total + self.coefficient(rows, live, 0.5 * self.log_square).sum()
            # 2 phi/||phi||^2 in two steps: ||phi||^-2 alone may leave the range
            half = torch.where(live, (-0.5 * log_n).exp(), 0)
            twice = 2 * self.coefficient(rows, live, 0.5 * torch.where(live, log_n, 0))
            d_features = (phi * half.unsqueeze(1)) * twice.unsqueeze(1)
        if head.logits is None:
            of_weight, of_bias = self.through_logits
            tiles = self.plain.tiles
            d_features = d_features + total(
                cotangent[tile].T @ head.linear_weight.detach()[tile].to(self.wide) for tile in tiles
            )
            # a row left out, whatever its features, has cotangent 0 and features 0
            self.through_logits = of_weight + cotangent @ phi, of_bias + cotangent.sum(dim=1)
        d_features = torch.where(bad.unsqueeze(1), math.nan, d_features + torch.zeros_like(phi))
        self.poison = self.poison + torch.where(bad, math.nan, 0).sum()
        return d_features, torch.where(bad, math.nan, cotangent).T

    def of_weight(self) -> tuple[Tensor, Tensor]:
        """The gradients of W and of the bias."""
        (of_weight, of_bias), D = self.through_logits, self.plain.D
        beside = self.beside
        if self.name == "log_layerwise":
            half = torch.where(self.log_square == -math.inf, 0, (-0.5 * self.log_square).exp())
            w = self.counted.rows(slice(None)) * self.counted.scale
            beside = self.head.norm_power * self.total * (w * half)
        if isinstance(beside, Tensor):
            of_weight = of_weight + beside[:, :D]
            if self.head.include_bias and beside.shape[1] > D:
                of_bias = of_bias + beside[:, D]
        return of_weight + self.poison, of_bias + self.poison

    def _of_gradient_norm(self, split: Split, rows: slice, live: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangent of z, and the gradient of W that does not pass through z."""
        ord, weight, T = GRADIENT_ORDS[self.name], self.plain, split.temperature
        about = About(split, weight, self.y[rows])
        parts = with_gradient_norm(about, ord, self.least)
        equal, u, log_p = about.equal, about.u, split.log_p()
        delta = parts.delta if ord == 2 else parts.settled
        nu = norms(delta, ord)
        live = live & (nu != 0)
        nu = torch.where(live, nu, 1)
        dual = torch.where(live.unsqueeze(1), _dual(delta, nu.unsqueeze(1), ord), 0)
        c, log_scale = self.coefficient(rows, live), weight.log_scale
        h = parts.along(dual)
        cotangent = c * torch.where(equal, -log_p.exp(), u * (h - about.rho.exp() * nu) / nu) / T
        cotangent = torch.where(live, cotangent, 0)
        # a wrong label: the top class's share is all but 1 and its own term a difference of equals; the sum is 0
        others = cotangent.masked_fill(split.is_top, 0)
        wrong = ~torch.where(split.is_top, equal, False).any(dim=0)
        cotangent = torch.where(split.is_top & wrong, -others.sum(dim=0), cotangent)
        # c p_j/(T F) = c p_j exp(-rho)/nu of the classes whose row equals the label's: 0 for the label alone. In one
        # exponent, as p_j over F may leave the range where c is as small.
        own = self.index == about.anchor
        twin = equal & ~own & live
        log_ratio = log_p + (self.logs[rows] - about.rho - log_scale)
        twins = torch.where(twin, self.upstream[rows] * log_ratio.exp() / nu, 0).to(self.wide)
        k = torch.where(equal, twins, self.coefficient(rows, live, log_scale) * u / nu)
        k = torch.where(own, -k.sum(dim=0), k)
        largest = torch.finfo(k.dtype).max  # not inf: the product with a 0 of the direction is 0
        return cotangent, k.clamp(-largest, largest) @ dual

    def _of_variance(self, split: Split, rows: slice, live: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangent of z, the gradient that does not pass through z, and the rows whose value is not 0."""
        weight = self.counted
        about = About(split, weight, split.m)
        parts, inner = with_variance(about, self.distances, self.least)
        equal, u, share, p = about.equal, about.u, about.rho.exp(), split.log_p().exp()
        delta = parts.delta
        moved = share.unsqueeze(1) * delta  # mean - w_m
        live = live & ~(inner <= 0)
        inner = torch.where(live, inner, 1)
        c = 2 * self.coefficient(rows, live, weight.log_scale) / inner
        beside = parts.pulled(c * u, moved) - torch.where(equal, c * p, 0) @ delta
        of_rest = u * (parts.distances(moved) - share * inner) / inner
        of_group = p * (share * delta.square().sum(dim=1) / inner - 1)
        cotangent = self.coefficient(rows, live) * torch.where(equal, of_group, of_rest) / split.temperature
        return torch.where(live, cotangent, 0), beside, live


def _of_trace(split: Split, c: Tensor) -> Tensor:
    q = split.q()
    s2, bracket = q.square().sum(dim=0), split.bracket(q)
    sum_p2 = 1 - split.eps * bracket
    rest = 2 * q * (sum_p2 - split.eps * q)
    top = -2 * split.p_m * (split.p_m - split.eps * s2)
    return torch.where(c == 0, 0, torch.where(split.is_top, top, rest) * (c / (bracket * split.temperature)))


def _dual(x: Tensor, norm: Tensor, ord: float) -> Tensor:
    """The norm's gradient at x: for infinity the mean of its directions over ties, as torch has it."""
    if ord == 2:
        return x / norm
    if ord == 1:
        return x.sign()
    largest = x.abs() == norm
    return x.sign() * largest / largest.sum(dim=1, keepdim=True)
