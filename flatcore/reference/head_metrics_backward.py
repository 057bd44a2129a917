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

from .head_metrics import _GRADIENT_ORDS, FIELDS, _About, _log_sum_of_squares, _power_of_two_scaled, _Split

DIFFERENTIABLE = ("log_hessian_trace", "log_layerwise", "log_neuronwise", *_GRADIENT_ORDS)
"""The fields that have a derivative."""


def head_metrics_backward(
    upstream: Tensor, log_coefficient: Tensor | None, head: Any, field: int, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of the head's features, linear_weight, linear_bias and logits, None where not wanted.

    ``head`` as in :func:`head_metrics`. ``upstream`` (N,) or one number, times exp(``log_coefficient``) (N,) (None: 0), is
    the derivative of the result with respect to each row's log. A row where either says 0, an ignored one and one whose
    value is 0 add nothing, whatever stands in them.
    """
    features, linear_weight, linear_bias, logits = head.features, head.linear_weight, head.linear_bias, head.logits
    target, temperature, include_bias, norm_power = head.target, head.temperature, head.include_bias, head.norm_power
    name = FIELDS[field]
    wide = torch.float32 if features.device.type == "mps" else torch.float64
    w = linear_weight.detach().to(wide)
    b = None if linear_bias is None else linear_bias.detach().to(wide)
    D, C = features.shape[1], w.shape[0]
    upstream = upstream.detach().to(wide).expand(features.shape[0])
    logs = torch.zeros_like(upstream) if log_coefficient is None else log_coefficient.detach().to(wide)
    keep = (upstream != 0) & (logs != -math.inf)
    # of value 0, 2^-150 or 2^-1075 of the result's format, its log masked by the caller: an inf or NaN that counts as 0
    double = any(x is not None and x.dtype == torch.float64 for x in (features, linear_weight, logits))
    keep &= upstream.isfinite() | ~(logs < (-745.133 if double else -103.972))
    half = (0.5 * logs).exp()  # in two steps: exp of -740 has few digits left
    c = upstream * half * half
    if target is not None and name in _GRADIENT_ORDS:
        keep &= target != head.ignore_index
    phi = torch.where(keep.unsqueeze(1), features.detach().to(wide), 0)
    bad = ~phi.isfinite().all(dim=1)
    if logits is None:
        with torch.autocast(phi.device.type, enabled=False):
            z = phi @ w.T
        bad |= keep & ~z.isfinite().all(dim=1)
        z = z if b is None else z + b
    else:
        z = torch.where(keep.unsqueeze(1), logits.detach().to(wide), 0)
    bad |= keep & ((z.isnan() | (z == math.inf)).any(dim=1) | (z == -math.inf).all(dim=1))
    z = torch.where(bad.unsqueeze(1), 0, z)
    split = _Split(z, temperature)
    y = None
    if name in _GRADIENT_ORDS:
        if target is None:
            raise ValueError("the gradient of a gradient norm needs a target")
        known = (target >= 0) & (target < C)
        bad |= keep & ~known
        y = torch.where(known & keep, target, 0)
    c = torch.where(keep & ~bad, c, 0)

    d_weight, d_bias = torch.zeros_like(w), w.new_zeros(C)
    d_features = torch.zeros_like(phi)
    augmented = torch.cat([w, b.unsqueeze(1)], dim=1) if include_bias and b is not None else w
    if y is not None:
        cotangent, explicit = _of_gradient_norm(split, w, y, c, keep & ~bad, upstream, logs, _GRADIENT_ORDS[name])
        d_weight += explicit
    else:
        log_n = _log_sum_of_squares(torch.where(bad.unsqueeze(1), 0, phi))
        log_n = torch.logaddexp(log_n, torch.zeros_like(log_n)) if include_bias else log_n
        c = torch.where((log_n == -math.inf) | (split.log_eps == -math.inf), 0, c)
        if name == "log_neuronwise":
            cotangent, explicit, c = _of_variance(split, augmented, c)
        else:
            cotangent = _of_trace(split, c)
            explicit = torch.zeros_like(augmented)
            if name == "log_layerwise":
                log_square = _log_sum_of_squares(augmented.reshape(1, -1))
                c = torch.where(log_square == -math.inf, 0, c)
                cotangent = torch.where(log_square == -math.inf, 0, cotangent)
                half = torch.where(log_square == -math.inf, 0, (-0.5 * log_square).exp())
                explicit = norm_power * c.sum() * (augmented * half) * half
        d_weight += explicit[:, :D]
        if include_bias:
            d_bias += explicit[:, D]
        # 2 phi/||phi||^2 in two steps: ||phi||^-2 alone may leave the range
        half = torch.where(c == 0, 0, (-0.5 * log_n).exp()).unsqueeze(1)
        d_features += torch.where(c.unsqueeze(1) == 0, 0, 2 * (phi * half) * half * c.unsqueeze(1))
    if logits is None:
        with torch.autocast(phi.device.type, enabled=False):
            d_features += cotangent @ w
            # a row left out, whatever its features, has cotangent 0 and features 0
            d_weight += cotangent.T @ torch.where(bad.unsqueeze(1), 0, phi)
        d_bias += cotangent.sum(dim=0)
    poisoned = bad & keep
    d_features = torch.where(poisoned.unsqueeze(1), math.nan, d_features)
    cotangent = torch.where(poisoned.unsqueeze(1), math.nan, cotangent)
    if linear_weight.device.type != "meta":
        poison = torch.where(poisoned.any(), math.nan, 0.0)
        d_weight, d_bias = d_weight + poison, d_bias + poison
    gradients = ((d_features, features), (d_weight, linear_weight), (d_bias, linear_bias), (cotangent, logits))
    of_features, of_weight, of_bias, of_logits = (
        gradient.to(x.dtype) if want and x is not None else None
        for (gradient, x), want in zip(gradients, wanted, strict=True)
    )
    return of_features, of_weight, of_bias, of_logits


def _of_trace(split: _Split, c: Tensor) -> Tensor:
    s2 = (split.q * split.q).sum(dim=1)
    bracket = 2 - split.eps * (1 + s2)
    sum_p2 = 1 - split.eps * bracket
    rest = 2 * split.q * (sum_p2.unsqueeze(1) - split.eps.unsqueeze(1) * split.q)
    top = (-2 * split.p_m * (split.p_m - split.eps * s2)).unsqueeze(1)
    scale = (c / (bracket * split.temperature)).unsqueeze(1)
    return torch.where(c.unsqueeze(1) == 0, 0, torch.where(split.is_top, top, rest) * scale)


def _of_variance(split: _Split, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangent of z, the gradient that does not pass through z, and c with the rows of value 0 taken out."""
    w, log_scale = _power_of_two_scaled(w)
    scale = log_scale.exp()
    cotangent, explicit, c = torch.zeros_like(split.z), torch.zeros_like(w), c.clone()
    for anchor in split.m[c != 0].unique().tolist():
        rows = ((split.m == anchor) & (c != 0)).nonzero().squeeze(1)
        about = _About(split, w, anchor, rows)
        d, equal, u, delta = about.d, about.equal, about.u, about.delta
        square, share = (d * d).sum(dim=1), about.rho.exp().unsqueeze(1)
        delta_square = (delta * delta).sum(dim=1, keepdim=True)
        inner = about.variance().unsqueeze(1)
        empty = inner <= 0
        c[rows] = torch.where(empty.squeeze(1), 0, c[rows])
        inner = torch.where(empty, 1, inner)
        cn = c[rows].unsqueeze(1)
        distance = square - 2 * share * (delta @ d.T) + share * share * delta_square
        of_rest = u * (distance - share * inner) / inner
        of_group = about.part.p() * (share * delta_square / inner - 1)
        cotangent[rows] = cn * torch.where(equal, of_group, of_rest) / split.temperature
        k = 2 * cn * u / inner
        group = torch.where(equal, 2 * cn * about.part.p() / inner, 0)
        explicit += k.sum(dim=0).unsqueeze(1) * d - k.T @ (share * delta) - group.T @ delta
    return cotangent, explicit / scale, c


def _of_gradient_norm(
    split: _Split, w: Tensor, y: Tensor, c: Tensor, live: Tensor, upstream: Tensor, logs: Tensor, ord: float
) -> tuple[Tensor, Tensor]:
    w, log_scale = _power_of_two_scaled(w)
    scale = log_scale.exp()
    cotangent, explicit = torch.zeros_like(split.z), torch.zeros_like(w)
    for label in y[live].unique().tolist():
        rows = ((y == label) & live).nonzero().squeeze(1)
        about = _About(split, w, label, rows)
        d, equal, rho, u, gradient = about.d, about.equal, about.rho, about.u, about.delta
        if gradient.shape[1] == 0:
            continue
        nu = torch.linalg.vector_norm(gradient, ord=ord, dim=1, keepdim=True)
        zero = nu == 0
        cn = torch.where(zero, 0, c[rows].unsqueeze(1))
        nu = torch.where(zero, 1, nu)
        dual = torch.where(zero, 0, _dual(gradient, nu, ord))
        share = rho.exp().unsqueeze(1)
        p = about.part.p()
        of_rest = u * (dual @ d.T - share * nu) / nu
        cotangent[rows] = torch.where(cn == 0, 0, cn * torch.where(equal, -p, of_rest) / split.temperature)
        # a wrong label: the top class's share is all but 1 and its own term a difference of equals; the sum is 0
        wrong = rows[~equal[split.m[rows]]]
        top = split.m[wrong].unsqueeze(1)
        others = cotangent[wrong].scatter(1, top, 0.0)
        cotangent[wrong] = others.scatter(1, top, -others.sum(dim=1, keepdim=True))
        own = torch.zeros_like(equal).index_fill_(0, torch.tensor([label], device=w.device), True)
        # c p_j/(T F) = c p_j exp(-rho)/nu of the classes whose row equals the label's: 0 for the label alone. In one
        # exponent, as p_j over F may leave the range where c is as small.
        log_ratio = about.part.log_p() + (logs[rows] - rho).unsqueeze(1)
        twins = torch.where(equal & ~own & ~zero, upstream[rows].unsqueeze(1) * log_ratio.exp() / nu, 0)
        k = torch.where(equal, twins, cn * u / nu)
        k = torch.where(own, -k.sum(dim=1, keepdim=True), k)
        largest = torch.finfo(k.dtype).max  # not inf: the product with a 0 of the direction is 0
        explicit += k.clamp(-largest, largest).T @ dual
    return cotangent, explicit / scale


def _dual(x: Tensor, norm: Tensor, ord: float) -> Tensor:
    """The norm's gradient at x: for infinity the mean of its directions over ties, as torch has it."""
    if ord == 2:
        return x / norm
    if ord == 1:
        return x.sign()
    largest = x.abs() == norm
    return x.sign() * largest / largest.sum(dim=1, keepdim=True)
