"""Rows of a head whose sums about W's mean row cancel, done again from differences w_j - w_a of rows of W.

Letters as in ``head_metrics``. ``Parts`` takes most classes through products of centred rows v_j: their rounding is that of
the v_j, however small what is left of them. A row is done again where what is left of a sum is too small a share of what
it was taken from: of the variance, sum u_j ||v_j||^2 and the anchor's ||v_a||^2; of delta, sum u_j ||v_j|| and ||v_a||.
Which rows these are, a device is asked once a block; not in a graph, traced or captured, which cannot depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .arithmetic import norms, pieces
from .split import About, Differences, Parts
from .weight import is_small


def least_left(wide: torch.dtype, result: torch.dtype, inputs: Sequence[Tensor | None]) -> float:
    """The share of what a sum is taken from that has to be left of it.

    A result as wide as the arithmetic loses 20 roundings of it, as in the kernels. Of float32 inputs in float64, one in
    float32 loses 2e-10, one in float64 2e-13: fewer rows that nearly coincide have to be done again.
    """
    if wide is torch.float32 or any(x is not None and x.dtype == torch.float64 for x in inputs):
        return 0.05
    return 1e-3 if result is torch.float64 else 1e-6


def unsure(left: Tensor, of: Tensor, least: float) -> Tensor | None:
    """The rows (F,) where less than the ``least`` share is left of one of K sums (K, N); None: nowhere, or in a graph."""
    if torch.compiler.is_compiling() or left.is_meta or _is_capturing(left.device):
        return None
    rows = (left < least * of).any(dim=0).nonzero().squeeze(1)  # not where either is NaN
    return rows if len(rows) else None


def _is_capturing(device: torch.device) -> bool:
    asked = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return bool(asked and asked())


class Explicit:
    """All differences d_j = w_j - w_a for some rows ``which`` (F,) of ``about``, formed anew for each sum, piece by piece.

    The names of ``Differences``, with N = F. Every d_j is exact; a sum is rounded by the size of its own terms.
    """

    def __init__(self, about: About, which: Tensor):
        self.weight, self.u = about.weight, about.u.index_select(1, which)
        self._anchor, self._group = about.anchor.index_select(0, which), about.group().index_select(0, which)
        self._delta: Tensor | None = None

    def _pieces(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows n, classes c and their differences (n, c, D), to be overwritten."""
        w = self.weight
        for rows, classes in pieces(self.u.shape[1], w.C, w.D, w.wide, self.u.device):
            anchors = w.rows(self._anchor[rows]).unsqueeze(1)
            for tile in classes:
                yield rows, tile, w.rows(tile) - anchors

    def _summed(self, absolute: bool) -> Tensor:
        found = self.u.new_zeros((self.u.shape[1], self.weight.D))
        for n, c, d in self._pieces():
            d = d.abs_() if absolute else d
            found[n] += d.mul_(self.u[c, n].T.unsqueeze(2)).sum(dim=1)
        return found

    @property
    def delta(self) -> Tensor:
        """sum_J u_j d_j, (F, D)."""
        if self._delta is None:
            self._delta = self._summed(absolute=False)
        return self._delta

    @property
    def settled(self) -> Tensor:
        """delta with a 0 where it is no larger than what rounding may leave of terms that cancel."""
        most = 2 * self.weight.C**0.5 * torch.finfo(self.weight.wide).eps * self._summed(absolute=True)
        return torch.where(self.delta.abs() <= most, 0, self.delta)

    def along(self, x: Tensor) -> Tensor:
        """x d_j of x (F, D), as (C, F)."""
        found = torch.empty_like(self.u)
        for n, c, d in self._pieces():
            found[c, n] = d.mul_(x[n].unsqueeze(1)).sum(dim=2).T
        return found

    def distances(self, x: Tensor) -> Tensor:
        """||d_j - x||^2 of x (F, D), as (C, F)."""
        found = torch.empty_like(self.u)
        for n, c, d in self._pieces():
            found[c, n] = d.sub_(x[n].unsqueeze(1)).square_().sum(dim=2).T
        return found

    def pulled(self, k: Tensor, x: Tensor) -> Tensor:
        """sum_n k_jn (d_jn - x_n) of k (C, F), 0 outside J, and x (F, D), as (C, D)."""
        found = self.u.new_zeros((self.weight.C, self.weight.D))
        for n, c, d in self._pieces():
            found[c] += d.sub_(x[n].unsqueeze(1)).mul_(k[c, n].T.unsqueeze(2)).sum(dim=0)
        return found

    def variance(self) -> Tensor:
        """Var_p(w) exp(-rho): the spread of J about its mean delta/U, U = sum_J u_j, and the anchor's P ||delta||^2/U.

        All terms are >= 0. sum u_j ||d_j||^2 - exp(rho) ||delta||^2 is the same, and loses a factor of 1/P.
        """
        total = self.u.sum(dim=0)
        mean = self.delta / torch.where(total > 0, total, 1).unsqueeze(1)
        spread = (self.u * self.distances(mean)).sum(dim=0)
        return spread + self._group * (total * mean.square().sum(dim=1))


class Mended:
    """``Parts`` with the sums of the rows ``which`` (F,) from all their differences."""

    def __init__(self, parts: Parts, which: Tensor, again: Explicit):
        self.parts, self.which, self.again = parts, which, again

    @property
    def delta(self) -> Tensor:
        """The sum."""
        return self.parts.delta.index_copy(0, self.which, self.again.delta)

    @property
    def settled(self) -> Tensor:
        """delta with a 0 where it has no sign."""
        return self.parts.settled.index_copy(0, self.which, self.again.settled)

    def along(self, x: Tensor) -> Tensor:
        """x d_j of x (N, D), as (C, N)."""
        return self.parts.along(x).index_copy(1, self.which, self.again.along(x.index_select(0, self.which)))

    def distances(self, x: Tensor) -> Tensor:
        """||d_j - x||^2 of x (N, D), as (C, N)."""
        return self.parts.distances(x).index_copy(1, self.which, self.again.distances(x.index_select(0, self.which)))

    def pulled(self, k: Tensor, x: Tensor) -> Tensor:
        """sum_n k_jn (d_jn - x_n) of k (C, N), 0 outside J, and x (N, D), as (C, D)."""
        those = self.again.pulled(k.index_select(1, self.which), x.index_select(0, self.which))
        return self.parts.pulled(k.index_fill(1, self.which, 0), x) + those


def gradient_norms(about: About, ords: Sequence[float], least: float) -> dict[float, Tensor]:
    """||delta|| of each row in some norms."""
    if is_small(about.weight.C, about.weight.D):
        delta = Differences(about).delta
        return {ord: norms(delta, ord) for ord in ords}
    parts = Parts(about)
    delta = parts.use_up()
    found = torch.stack([norms(delta, ord) for ord in ords])
    which = unsure(found, parts.sizes(ords), least)
    if which is not None:
        again = Explicit(about, which).delta
        found = found.index_copy(1, which, torch.stack([norms(again, ord) for ord in ords]))
    return dict(zip(ords, found.unbind(0), strict=True))


def with_gradient_norm(about: About, ord: float, least: float) -> Differences | Parts | Mended:
    """Sums that are right where ||delta|| is differentiated."""
    if is_small(about.weight.C, about.weight.D):
        return Differences(about)
    parts = Parts(about)
    which = unsure(norms(parts.delta, ord).unsqueeze(0), parts.sizes([ord]), least)
    return parts if which is None else Mended(parts, which, Explicit(about, which))


def variance(about: About, distances: Tensor | None, least: float) -> Tensor:
    """Var_p(w) exp(-rho) = sum_j p_j ||w_j - sum_k p_k w_k||^2 exp(-rho), about the top class.

    With the classes whose row equals w_m taken as one top group of probability P, J all others, p_j = exp(rho) u_j there:
    Var_p(w) = exp(rho) [ P sum_J u_j D_mj + exp(rho) 1/2 sum_JJ u_j u_k D_jk ]. Every term is >= 0: nothing cancels.
    Without the table of distances D the same over the parts of J, each at its mean, and the spread within.
    """
    return _of_parts(about, None, least)[1] if distances is None else _of_table(about, distances)


def with_variance(about: About, distances: Tensor | None, least: float) -> tuple[Differences | Parts | Mended, Tensor]:
    """Sums that are right where the variance is differentiated, and the variance."""
    if is_small(about.weight.C, about.weight.D):
        return Differences(about), variance(about, distances, least)
    return _of_parts(about, distances, least)


def _of_table(about: About, distances: Tensor) -> Tensor:
    to_rest = distances @ about.u  # (C, N): sum_J u_k D_jk
    from_top = to_rest.gather(0, about.anchor.unsqueeze(0)).squeeze(0)
    return about.group() * from_top + about.rho.exp() * (0.5 * (about.u * to_rest).sum(dim=0))


def _of_parts(about: About, distances: Tensor | None, least: float) -> tuple[Parts | Mended, Tensor]:
    parts = Parts(about)
    inner = parts.variance() if distances is None else _of_table(about, distances)
    which = unsure(inner.unsqueeze(0), parts.square_size().unsqueeze(0), least)
    if which is None:
        return parts, inner
    again = Explicit(about, which)
    if distances is None:
        inner = inner.index_copy(0, which, again.variance())
    return Mended(parts, which, again), inner
