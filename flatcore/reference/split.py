"""Some rows of a head: their logits, the top class against the rest, and any class against those whose row differs.

Letters as in ``head_metrics``; tensors of classes and rows are (C, N).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arithmetic import joined, lengths, tiles, total, within_range
from .weight import HEAVY, Weight, is_small


class Rows:
    """Features (N, D) and logits (C, N) of some rows of a head, widened; ``bad`` where they are no numbers, z is 0 there.

    ``keep`` (N,): the rows that count; whatever stands in the others is read as 0.
    """

    def __init__(self, head: Any, rows: slice, wide: torch.dtype, keep: Tensor | None = None):
        w, b = head.linear_weight, head.linear_bias
        self.phi = head.features[rows].to(wide)
        if keep is not None:
            self.phi = self.phi.masked_fill(~keep.unsqueeze(1), 0)
        largest = self.phi.new_zeros(self.phi.shape[0])
        if self.phi.shape[1]:
            largest = torch.maximum(self.phi.amax(dim=1), -self.phi.amin(dim=1))
        self._largest, bad = largest, ~(largest < math.inf)
        if head.logits is None:
            z = joined([w[tile].to(wide) @ self.phi.T for tile in tiles(*w.shape)])
            bad |= ~((z.amax(dim=0) < math.inf) & (z.amin(dim=0) > -math.inf))  # overflowed, which is no masked class
            z = z if b is None else z + b.to(wide).unsqueeze(1)
        else:
            z = head.logits[rows].to(wide).T.contiguous()
        t = z.amax(dim=0)
        bad |= ~(t.abs() < math.inf)  # NaN, inf, or all -inf
        zero = bad
        if keep is not None:
            bad, zero = bad & keep, bad | ~keep
        self.bad, self.z, self.t = bad, z.masked_fill(zero, 0), t.masked_fill(zero, 0)

    def log_square(self) -> Tensor:
        """log ||phi||^2; divided by the largest entry, so that no square leaves the range."""
        scale = within_range(self._largest)
        return 2 * (lengths(self.phi / scale.unsqueeze(1)).log() + scale.log())


class Split:
    """The top class against the rest, every difference formed before it is divided by the temperature."""

    def __init__(self, rows: Rows, temperature: float, index: Tensor):
        self.z, self.t, self.temperature, self.index = rows.z, rows.t, temperature, index
        self.m = first(self.z == self.t, index)
        self.is_top = index == self.m
        rest = self.z.masked_fill(self.is_top, -math.inf)
        self.r = rest.amax(dim=0)
        self.u = _exp_difference(rest, self.r, temperature)
        self.u1 = self.u.sum(dim=0)
        self.g = (self.t - self.r) / temperature
        self.tau = (-self.g).exp() * self.u1
        self.log1p_tau = self.tau.log1p()
        self.p_m = 1 / (1 + self.tau)
        self.eps = self.tau * self.p_m
        self.log_eps = self.u1.log() - self.g - self.log1p_tau

    def q(self) -> Tensor:
        """u_j/U1, 0 where there is no rest."""
        return self.u / self.u1.clamp_min(1)  # the largest u_j is 1

    def bracket(self, q: Tensor) -> Tensor:
        """2 - eps (1 + sum q^2), in [1, 2]."""
        return 2 - self.eps * (1 + q.square().sum(dim=0))

    def log_one_minus_sum_p2(self) -> Tensor:
        """log(1 - sum p^2)."""
        return self.log_eps + self.bracket(self.q()).log()

    def log_p(self) -> Tensor:
        """log p_j, (C, N)."""
        return (self.z - self.t) / self.temperature - self.log1p_tau


class About:
    """The classes J whose row of W differs from that of an anchor class a (N,): p_j = exp(rho) u_j, the largest u_j is 1.

    ``equal`` (C, N): the others; rho = -inf where there are no more.
    """

    def __init__(self, split: Split, weight: Weight, anchor: Tensor):
        self.split, self.weight, self.anchor = split, weight, anchor
        self.equal = weight.group.unsqueeze(1) == weight.group[anchor]
        z = split.z.masked_fill(self.equal, -math.inf)
        top = z.amax(dim=0)
        self.u = _exp_difference(z, top, split.temperature)
        self.rho = (top - split.t) / split.temperature - split.log1p_tau

    def group(self) -> Tensor:
        """The probability of the classes outside J."""
        return torch.where(self.equal, self.split.log_p().exp(), 0).sum(dim=0)


def width(C: int, D: int) -> int:
    """The numbers that the largest tensor of a block of rows has for each of them."""
    return C * D if is_small(C, D) else max(C, D)


class Differences:
    """delta = sum_J u_j (w_j - w_a), (N, D), and sums like it, from all differences d_j = w_j - w_a, (C, N, D): exact."""

    def __init__(self, about: About):
        w = about.weight.rows(slice(None))
        self.d = w.unsqueeze(1) - w.index_select(0, about.anchor)
        self.delta = self.settled = (about.u.unsqueeze(2) * self.d).sum(dim=0)

    def along(self, x: Tensor) -> Tensor:
        """x d_j of x (N, D), as (C, N)."""
        return (self.d * x).sum(dim=2)

    def distances(self, x: Tensor) -> Tensor:
        """||d_j - x||^2 of x (N, D), as (C, N)."""
        return (self.d - x).square().sum(dim=2)

    def pulled(self, k: Tensor, x: Tensor) -> Tensor:
        """sum_n k_jn (d_jn - x_n) of k (C, N), 0 outside J, and x (N, D), as (C, D)."""
        return (k.unsqueeze(2) * (self.d - x)).sum(dim=1)


class Parts:
    """The same for a larger W, by parts of J.

    ``heavy``: groups of equal rows, whose difference to w_a is formed first, each as its classes (C, N), the sum of their
    u (N,) and the difference (N, D). The others: their u ``rest`` (C, N), its sum, and their part of delta. See ``weight``.
    """

    def __init__(self, about: About):
        self.about, weight = about, about.weight
        self.rest = about.u
        self.heavy: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(min(HEAVY[weight.wide], weight.C - 1)):
            weighed = self.rest * weight.multiplicity.unsqueeze(1)
            j = first(weighed == weighed.amax(dim=0), about.split.index)
            members = (weight.group.unsqueeze(1) == weight.group[j]) & (self.rest > 0)
            share = self.rest.masked_fill(~members, 0).sum(dim=0)
            self.rest = self.rest.masked_fill(members, 0)
            self.heavy.append((members, share, weight.pairs(j, about.anchor)))
        self.rest_share = self.rest.sum(dim=0)
        self._is_anchor = about.split.index == about.anchor
        self._coefficients = torch.where(self._is_anchor, -self.rest_share, self.rest)
        self.rest_delta = weight.sum(self._coefficients)
        self._delta: Tensor | None = None
        self._rest_squares: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """The sum."""
        if self._delta is None:
            self._delta = total([self.rest_delta, *(share.unsqueeze(1) * d for _, share, d in self.heavy)])
        return self._delta

    def use_up(self) -> Tensor:
        """The sum, in the memory of the differences: what is not asked of a system need not be given back to it."""
        delta = self.rest_delta
        for _, share, d in self.heavy:
            delta = d.mul_(share.unsqueeze(1)).add_(delta)
        return delta

    def along(self, x: Tensor) -> Tensor:
        """x d_j of x (N, D), as (C, N)."""
        dots = self.about.weight.dots(x)
        dots = dots - dots.gather(0, self.about.anchor.unsqueeze(0))
        for members, _, d in self.heavy:
            dots = torch.where(members, (x * d).sum(dim=1), dots)
        return dots

    def distances(self, x: Tensor) -> Tensor:
        """||d_j - x||^2 of x (N, D), as (C, N)."""
        weight, moved = self.about.weight, self._from_centre(x)
        distance = weight.squares().unsqueeze(1) - 2 * weight.dots(moved) + moved.square().sum(dim=1)
        for members, _, d in self.heavy:
            distance = torch.where(members, (d - x).square().sum(dim=1), distance)
        return distance

    def pulled(self, k: Tensor, x: Tensor) -> Tensor:
        """sum_n k_jn (d_jn - x_n) of k (C, N), 0 outside J, and x (N, D), as (C, D)."""
        total = self.about.weight.differences(torch.where(self.rest > 0, k, 0), self._from_centre(x))
        for members, _, d in self.heavy:
            total = total + torch.where(members, k, 0) @ (d - x)
        return total

    def _from_centre(self, x: Tensor) -> Tensor:
        """v_a + x: the point that d_j - x is the difference of v_j to."""
        return self.about.weight.sum(self._is_anchor.to(x.dtype)) + x

    @property
    def settled(self) -> Tensor:
        """delta with a 0 where it is no larger than what rounding may leave of terms that cancel: there it has no sign."""
        weight, delta = self.about.weight, self.delta
        most = 2 * weight.C**0.5 * torch.finfo(weight.wide).eps * weight.sum(self._coefficients, absolute=True)
        return torch.where(delta.abs() <= most, 0, delta)

    def sizes(self, ords: Sequence[float]) -> Tensor:
        """sum |k_j| ||v_j|| of the terms that the others' part of delta is summed from, in some norms, (K, N)."""
        return self.about.weight.sizes(ords) @ self._coefficients.abs()

    def variance(self) -> Tensor:
        """Var_p(w) exp(-rho), of the parts, each at its mean, and of what is in the others' about theirs."""
        weight, share = self.about.weight, self.rest_share
        one = torch.where(share > 0, share, 1).unsqueeze(1)
        points = [*((a, d) for _, a, d in self.heavy), (share, self.rest_delta / one)]
        about_centre = weight.sum(self.rest / one.T)
        inner = (self._squares() - share * about_centre.square().sum(dim=1)).clamp_min(0)  # the spread
        group, p_rest = self.about.group(), self.about.rho.exp()
        for i, (a, x) in enumerate(points):
            inner = inner + group * (a * x.square().sum(dim=1))
            for c, y in points[:i]:
                inner = inner + p_rest * (a * c * (x - y).square().sum(dim=1))
        return inner

    def square_size(self) -> Tensor:
        """What the variance is left of, (N,): sum u_j ||v_j||^2 of the others, and ||v_a||^2 as often as it meets them."""
        about = self.about
        met = about.group() + about.rho.exp() * total([share for _, share, _ in self.heavy])
        return self._squares() + met * self.rest_share * about.weight.squares()[about.anchor]

    def _squares(self) -> Tensor:
        if self._rest_squares is None:
            self._rest_squares = self.about.weight.squares() @ self.rest
        return self._rest_squares


def first(found: Tensor, index: Tensor) -> Tensor:
    """The lowest class where something was found; the last where nothing was. Neither max nor argmax promises it on ties."""
    C = found.shape[0]
    return index.masked_fill(~found, C - 1).amin(dim=0)


def _exp_difference(z: Tensor, top: Tensor, temperature: float) -> Tensor:
    """exp((z_j - top)/T), and 0 for masked classes; (-inf) - (-inf) is never formed."""
    return ((z - top.clamp_min(torch.finfo(top.dtype).min)) / temperature).exp()
