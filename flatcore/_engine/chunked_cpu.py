"""Large heads: chunks of rows around the library's matrix products, at bounded workspace.

For a chunk of rows the library forms Z = Phi W^T; a kernel turns Z, in place, into row statistics and q, the softmax over
the classes other than the top one; the library forms q (W - center), or q times the table of squared distances between
rows where that is cheaper; a kernel finishes. Never N x C numbers: the chunk is as long as WORKSPACE_BYTES allow.
Classes that share a row of W are brought together in one of them before the second product (csrc/cpu/head_repeats.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..reference import FIELDS
from .backend import _core
from .memory import HeadCall, address
from .precision import full_precision
from .reduction import derivative

WORKSPACE_BYTES = 64 << 20
"""Bound of all buffers of one call, in bytes, unless a single row needs more."""
_LIBRARY_BYTES = (
    12 << 20
)  # of these for what the library packs for its products: 9 MB were seen at D = 2048, C = 32,000
_TILE_BYTES = 8 << 20  # rows of W converted or centred at a time: they stay in the last-level cache for the product
TILE_CLASSES = 4096  # and of these at most so many: the length of the sums a product of float32 forms by itself
_DISTANCE_CLASSES = 2048  # up to here the (C, C) table fits a quarter of the workspace in float32

NEURONWISE = 1 << FIELDS.index("log_neuronwise")
LAYERWISE = 1 << FIELDS.index("log_layerwise")
GRADIENT = sum(1 << bit for bit, name in enumerate(FIELDS) if name.startswith("log_feature_gradient_norm"))


def head_metrics(cpu_target: str, call: HeadCall) -> int:
    """Fill the problem's outputs; return the first row with a label that is no class, or -1."""
    N, D, C, dtype, problem, fields = call.N, call.D, call.C, call.dtype, call.problem, call.fields
    features, linear_weight, logits, double = call.head.features, call.head.linear_weight, call.head.logits, call.double
    itemsize = dtype.itemsize
    weights = bool(fields & (NEURONWISE | GRADIENT))
    direct = linear_weight.dtype == dtype
    known = call.prepared = call.prepared or _Weights(cpu_target, call)
    summary, center, squares, repeats = known.summary, known.center, known.squares, known.repeats
    exponent = int(summary[1])
    # The product with the (C, C) table replaces the one with W where forming the table, about C^2 D / 2, leaves a gain.
    # Nearly equal rows are told apart by the differences of the product with W alone.
    by_distance = (
        weights and not fields & GRADIENT and C <= _DISTANCE_CLASSES and 2 * N * C + C * D < 2 * N * D
        and (direct or C * D * itemsize <= _TILE_BYTES) and not repeats.near_count
    )  # fmt: skip

    distances = None
    fixed = 8 * (3 * C + D) + repeats.nbytes
    if by_distance:
        center = None
        packed = linear_weight if direct and linear_weight.stride(1) == 1 else linear_weight.to(dtype).contiguous()
        distances = torch.empty(C, C, dtype=dtype)
        code = 3 if double else 2
        _core.head_distances(
            cpu_target, problem, (packed.data_ptr(), packed.stride(0), 1, code), exponent, distances.data_ptr()
        )
        fixed += C * C * itemsize
        del packed

    scratch: Any = torch.empty(call.threads * _core.head_chunk_scratch(C, D), dtype=torch.float64) if weights else None
    fixed += 0 if scratch is None else 8 * scratch.numel()
    tile = None
    if (logits is None and not direct) or center is not None:
        tile_rows = max(1, min(C, TILE_CLASSES, _TILE_BYTES // max(1, D * itemsize)))
        tile = torch.empty(tile_rows, D, dtype=dtype)
        fixed += tile.numel() * itemsize
    borrowed = logits is not None and logits.dtype == dtype and logits.stride(1) == 1
    convert = logits is None and features.dtype != dtype
    per_row = _core.HEAD_ROW_BYTES
    per_row += 0 if borrowed and not weights else C * itemsize
    per_row += D * (8 + itemsize) if center is not None else 0
    per_row += C * itemsize if distances is not None else 0
    per_row += D * itemsize if convert else 0
    per_row += repeats.near_count * itemsize
    length = max(1, min(N, (WORKSPACE_BYTES - _LIBRARY_BYTES - fixed) // per_row))
    length = -(-N // -(-N // length))  # equal chunks: no short last product

    state = torch.empty(length * _core.HEAD_ROW_BYTES, dtype=torch.uint8)
    z: Any = None if borrowed and not weights else torch.empty(length, C, dtype=dtype)
    mean: Any = torch.empty(length, D, dtype=torch.float64) if center is not None else None
    part: Any = torch.empty(length, D, dtype=dtype) if center is not None else None
    spread: Any = torch.empty(length, C, dtype=dtype) if distances is not None else None
    near_q: Any = torch.empty(length, repeats.near_count, dtype=dtype) if repeats.near_count else None
    shift = None if center is None else center[:D].to(dtype)
    first_bad = -1
    with full_precision():
        for first in range(0, N, length):
            rows = min(length, N - first)
            if logits is not None and borrowed:
                source = logits[first : first + rows]
            elif logits is not None:
                source = z[:rows].copy_(logits[first : first + rows])
            else:
                source = z[:rows]
                _logits_into(source, features[first : first + rows], linear_weight, tile, dtype)
            q: Any = z[:rows] if weights else None
            bad = _core.head_chunk_statistics(
                cpu_target, problem, first, rows, source.data_ptr(), source.stride(0), address(q), C,
                summary.data_ptr(), address(center), address(squares), state.data_ptr(), *repeats.arguments(q, near_q),
            )  # fmt: skip
            if bad >= 0 and first_bad < 0:
                first_bad = bad
            if not weights:
                continue
            if distances is not None:
                torch.mm(q, distances, out=spread[:rows])
            else:
                _product_into(mean[:rows], part[:rows], q, linear_weight, shift, 2.0**exponent, tile)
                repeats.add_near(mean[:rows], near_q, linear_weight, 2.0**exponent, tile)
            _core.head_chunk_weights(
                cpu_target, problem, first, rows, address(q), C, summary.data_ptr(), address(center), state.data_ptr(),
                address(mean), D, address(spread), C, scratch.data_ptr(), repeats.equal_rows,
            )  # fmt: skip
    return first_bad


def head_metrics_backward(
    cpu_target: str,
    call: HeadCall,
    upstream: Tensor,
    log_coefficient: Tensor | None,
    d_features: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    d_logits: Tensor | None,
) -> None:
    """Fill the wanted gradients.

    A row's derivative with respect to its log is c = ``upstream`` exp(``log_coefficient``), both (N,), float64.

    Three products for the trace and layerwise, six for neuronwise and the gradient norms: z, q (W - center), directions
    (W - center)^T, and the gradients of features and weight, the latter in two parts.
    """
    N, D, C, dtype, problem, bit = call.N, call.D, call.C, call.dtype, call.problem, call.fields
    features, linear_weight, logits, column = call.head.features, call.head.linear_weight, call.head.logits, call.column
    itemsize = dtype.itemsize
    c = derivative(upstream, log_coefficient, call.double)
    weights, neuronwise = bool(bit & (NEURONWISE | GRADIENT)), bool(bit & NEURONWISE)
    layerwise = bool(bit & LAYERWISE)
    known = call.prepared or _Weights(cpu_target, call)
    summary, center, squares, repeats = known.summary, known.center, known.squares, known.repeats
    scale = 2.0 ** int(summary[1])
    shift = None if center is None else center[:D].to(dtype)

    scratch = torch.empty(_core.head_chunk_scratch(C, D), dtype=torch.float64)
    fixed = 8 * (3 * C + D) + 8 * scratch.numel() + repeats.nbytes
    tile_rows = max(1, min(C, TILE_CLASSES, _TILE_BYTES // max(1, D * itemsize)))
    tile = torch.empty(tile_rows, D, dtype=dtype)
    fixed += tile.numel() * itemsize
    per_row = _core.HEAD_ROW_BYTES + _core.HEAD_BACKWARD_ROW_BYTES + (2 if weights else 1) * C * itemsize
    per_row += 2 * D * itemsize + 8 * D + (2 * D * itemsize if weights else 0)
    per_row += ((C if repeats else 0) + repeats.near_count) * itemsize
    length = max(1, min(N, (WORKSPACE_BYTES - _LIBRARY_BYTES - fixed) // per_row))
    length = -(-N // -(-N // length)) if N else 1

    state = torch.empty(length * _core.HEAD_ROW_BYTES, dtype=torch.uint8)
    numbers = torch.empty(length * _core.HEAD_BACKWARD_ROW_BYTES, dtype=torch.uint8)
    q = torch.empty(length, C, dtype=dtype)
    cotangent: Any = torch.empty(length, C, dtype=dtype) if weights else None
    merged = torch.empty(length, C, dtype=dtype) if repeats else None
    near_q: Any = torch.empty(length, repeats.near_count, dtype=dtype) if repeats.near_count else None
    sums, part = torch.empty(length, D, dtype=torch.float64), torch.empty(length, D, dtype=dtype)
    direction: Any = torch.empty(length, D, dtype=dtype) if weights else None
    top_row: Any = torch.empty(length, D, dtype=dtype) if neuronwise else None
    top_bias: Any = torch.empty(length, dtype=torch.float64) if neuronwise else None
    top: Any = torch.empty(length, dtype=torch.int64) if neuronwise else None
    rows_of_weight: Any = torch.zeros(C, dtype=torch.float64) if neuronwise else None
    for gradient in (d_weight, d_bias):
        if gradient is not None:
            gradient.zero_()
    poisoned, share = False, torch.zeros((), dtype=torch.float64)  # share: sum of c
    with full_precision():
        for first in range(0, N, length):
            rows = min(length, N - first)
            here = slice(first, first + rows)
            z = q[:rows]
            if logits is not None:
                z.copy_(logits[here])
            else:
                _logits_into(z, features[here], linear_weight, tile, dtype)
            _core.head_chunk_statistics(
                cpu_target, problem, first, rows, z.data_ptr(), C, z.data_ptr(), C, summary.data_ptr(), address(center),
                address(squares), state.data_ptr(), *repeats.arguments(merged, near_q),
            )  # fmt: skip
            g = z
            if weights:
                g = cotangent[:rows]
                shares = z if merged is None else merged[:rows]
                _product_into(sums[:rows], part[:rows], shares, linear_weight, shift, scale, tile)
                repeats.add_near(sums[:rows], near_q, linear_weight, scale, tile)
                _core.head_chunk_directions(
                    cpu_target, problem, first, rows, upstream.data_ptr(), address(log_coefficient), summary.data_ptr(),
                    address(center), state.data_ptr(), numbers.data_ptr(), sums.data_ptr(), direction.data_ptr(),
                    z.data_ptr(), address(top_row), address(top_bias), address(top), repeats.equal_rows,
                )  # fmt: skip
                for start, centered in _tiles(linear_weight, shift, scale, tile, dtype):
                    g[:, start : start + centered.shape[0]] = direction[:rows] @ centered.T
            mine = None if d_features is None else d_features[here]
            _core.head_chunk_cotangent(
                cpu_target, problem, first, rows, upstream.data_ptr(), address(log_coefficient), z.data_ptr(),
                g.data_ptr(), C, summary.data_ptr(), address(center), address(squares), state.data_ptr(),
                numbers.data_ptr(), address(mine), address(d_weight), address(d_bias), scratch.data_ptr(),
            )  # fmt: skip
            numbers_here = numbers.view(torch.float64).view(-1, _core.HEAD_BACKWARD_ROW_BYTES // 8)[:rows]
            kinds = numbers_here[:, _core.HEAD_BACKWARD_ROW_KIND].view(torch.int64)
            poisoned |= bool((kinds == _core.POISONED_ROW).any())
            share += numbers_here[:, _core.HEAD_BACKWARD_ROW_C].sum()
            if logits is None:
                if mine is not None:
                    _product_into(sums[:rows], part[:rows], g, linear_weight, None, 1.0, tile)
                    mine += sums[:rows]
                if d_weight is not None:
                    d_weight.addmm_(g.T, _kept(features[here], c[here], part[:rows]))
                if d_bias is not None:
                    d_bias += g.sum(dim=0, dtype=torch.float64)
            elif d_logits is not None:
                d_logits[here] = g
            if d_weight is not None and weights:
                d_weight.addmm_(z.T, direction[:rows], alpha=-1 if neuronwise else 1)
            if neuronwise:
                rows_of_weight += z.sum(dim=0, dtype=torch.float64)
                if d_weight is not None:
                    d_weight.index_add_(0, top[:rows], top_row[:rows])
                if column is not None and d_bias is not None:
                    d_bias.index_add_(0, top[:rows], top_bias[:rows])
                    d_bias -= numbers_here[:, _core.HEAD_BACKWARD_ROW_BIAS] @ z.to(torch.float64)
    if neuronwise and d_weight is not None:
        for start, centered in _tiles(linear_weight, shift, scale, tile, dtype):
            factor = rows_of_weight[start : start + centered.shape[0]].to(dtype).unsqueeze(1)
            d_weight[start : start + centered.shape[0]].addcmul_(factor, centered)
    if neuronwise and column is not None and d_bias is not None:
        d_bias += torch.where(rows_of_weight == 0, 0, rows_of_weight * (column * scale - center[D]))
    if layerwise and float(summary[0]) > -math.inf:
        half = (-0.5 * summary[0]).exp()  # in two steps: ||W||_F^-2 alone may leave the range
        factor = call.head.norm_power * share * half
        if d_weight is not None:
            for start, block in _tiles(linear_weight, None, 1.0, tile, dtype):
                d_weight[start : start + block.shape[0]] += block * float(half) * float(factor)
        if column is not None and d_bias is not None:
            d_bias += column * half * factor
    if poisoned:
        for gradient in (d_weight, d_bias):
            if gradient is not None:
                gradient.fill_(math.nan)


class _Weights:
    """What the kernels need of W alone, found once; a gradient takes it over from its forward pass.

    ``summary``: log ||W||_F^2 and the power of two that brings W into range; ``center`` (D + 1,) and ``squares`` (C,) of the
    rows about it, and ``repeats``, where the fields ask for more than norms.
    """

    def __init__(self, cpu_target: str, call: HeadCall):
        D, C, fields = call.D, call.C, call.fields
        weights = bool(fields & (NEURONWISE | GRADIENT))
        self.center: Any = torch.empty(D + 1, dtype=torch.float64) if weights else None
        self.squares = torch.empty(C, dtype=torch.float64) if weights else None
        self.summary = torch.zeros(2, dtype=torch.float64)
        if weights or fields & LAYERWISE:
            row_workspace = torch.empty(2 * C, dtype=torch.float64)
            _core.head_summary(
                cpu_target, call.problem, row_workspace.data_ptr(), self.summary.data_ptr(), address(self.center),
                address(self.squares),
            )  # fmt: skip
        self.repeats = _Repeats(cpu_target, call.problem, C, D, int(self.summary[1]), self.squares)


class _Repeats:
    """Classes whose rows of W are equal or nearly so: found once a call, taken together by the products."""

    def __init__(self, cpu_target: str, problem, C: int, D: int, exponent: int, squares: Tensor | None):
        self.groups = self.near_count = self.nbytes = 0
        self.equal_rows = C == 1
        if squares is None or C < 2:
            return
        keys = torch.empty(C + D + 1, dtype=torch.float64)
        self.members, self.near, self.near_of = (torch.empty(C, dtype=torch.int64) for _ in range(3))
        self.starts = torch.empty(C + 1, dtype=torch.int64)
        self.groups, self.near_count = _core.head_repeats(
            cpu_target, problem, exponent, squares.data_ptr(), keys.data_ptr(), self.members.data_ptr(),
            self.starts.data_ptr(), self.near.data_ptr(), self.near_of.data_ptr(),
        )  # fmt: skip
        if self.groups:
            self.nbytes = 8 * (4 * C + 1) + (2 * _TILE_BYTES if self.near_count else 0)
            self.equal_rows = self.near_count == 0 and int(self.starts[1]) == C
        else:
            del self.members, self.near, self.near_of, self.starts

    def __bool__(self) -> bool:
        return self.groups > 0

    def arguments(self, merged: Tensor | None, near_q: Tensor | None) -> tuple[int, ...]:
        """What head_chunk_statistics takes to write the shares of groups and of nearly equal rows."""
        if not self.groups:
            return (0,) * 8
        return (
            self.members.data_ptr(), self.starts.data_ptr(), self.groups, self.near.data_ptr(),
            self.near_of.data_ptr(), self.near_count, address(merged), address(near_q),
        )  # fmt: skip

    def add_near(self, mean: Tensor, near_q: Tensor | None, weight: Tensor, scale: float, tile: Tensor | None) -> None:
        """Add to the mean rows what their groups' first rows leave out, from differences of rows."""
        if near_q is None:
            return
        # an eighth of a tile's rows: what is taken out of W twice, in float64, once more and in the compute type fits a tile
        length = max(1, (TILE_CLASSES if tile is None else tile.shape[0]) // 8)
        for start in range(0, self.near_count, length):
            here = slice(start, min(start + length, self.near_count))
            difference = weight[self.near[here]].to(torch.float64)
            difference -= weight[self.near_of[here]]
            difference *= scale
            mean += near_q[: mean.shape[0], here] @ difference.to(near_q.dtype)


def _logits_into(out: Tensor, features: Tensor, weight: Tensor, tile: Tensor | None, dtype: torch.dtype) -> None:
    """out = features W^T, both in the compute type."""
    features = features.to(dtype)
    if weight.dtype == dtype:
        torch.mm(features, weight.T, out=out)
        return
    for start, rows in _tiles(weight, None, 1.0, tile, dtype):
        out[:, start : start + rows.shape[0]] = features @ rows.T


def _kept(features: Tensor, c: Tensor, buffer: Tensor) -> Tensor:
    """The features of a chunk in the compute type, zero in the rows that add nothing: a NaN there must stay out."""
    none = c == 0
    if features.dtype == buffer.dtype and not none.any():
        return features
    return buffer.copy_(features).masked_fill_(none.unsqueeze(1), 0)


def _product_into(
    out: Tensor, part: Tensor, q: Tensor, weight: Tensor, center: Tensor | None, scale: float, tile: Tensor | None
) -> None:
    """out = q (scale W - center), a tile of W at a time, so that no second W exists and a large common row costs no digits.

    A tile's product is in the compute type, their sum in float64: over 200,000 classes float32 alone loses 1e-4.
    """
    out.zero_()
    for start, rows in _tiles(weight, center, scale, tile, part.dtype):
        out += torch.mm(q[:, start : start + rows.shape[0]], rows, out=part)


def _tiles(
    weight: Tensor, center: Tensor | None, scale: float, tile: Any, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows of scale W - center (center None: of W) in the compute type, each with its first row's index."""
    length = TILE_CLASSES if tile is None else tile.shape[0]
    for start in range(0, weight.shape[0], length):
        rows = weight[start : start + length]
        if center is None and weight.dtype == dtype:
            yield start, rows
            continue
        block = tile[: rows.shape[0]]
        if center is None:
            block.copy_(rows)
        elif scale == 1:
            torch.sub(rows, center, out=block)
        else:
            torch.mul(rows, scale, out=block)
            block.sub_(center)
        yield start, block
