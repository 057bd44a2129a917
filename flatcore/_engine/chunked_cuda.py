"""Large heads on a CUDA device: chunks of rows around the library's matrix products, at bounded workspace.

As ``chunked_cpu``, but nothing waits for the device: the power of two that scales W and the poison of W's gradient stay
there, and rows that need explicit differences are found by the kernels. The gradient of any head goes this way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .chunked_cpu import GRADIENT, LAYERWISE, NEURONWISE
from .memory import HeadCall, address
from .precision import full_precision
from .reduction import derivative

WORKSPACE_BYTES = 256 << 20
"""Bound of all buffers of one call, in bytes, unless a single row needs more. At 128,256 classes and D = 4096 a chunk
has some 200 rows, so that its product takes longer than reading W for it."""
_TILE_BYTES = 16 << 20  # rows of W converted or centred at a time
TILE_CLASSES = 4096  # and of these at most so many: the length of the sums a product of float32 forms by itself
_SCRATCH_BYTES = 16 << 20  # at most, for rows done from explicit differences; a block at a time needs 16 bytes a class
_MOST_SLOTS = 1024  # such blocks

_PIECES = {torch.float16: 2, torch.bfloat16: 3}  # of q that keep 22 and 24 bits of it


def takes_half_products() -> bool:
    """Whether this torch multiplies 16-bit matrices into a float32 one."""
    return "dtype" in torch.ops.aten.mm.overloads()  # since 2.8


def half_product(a: Tensor, b: Tensor) -> Tensor:
    """a b of 16-bit matrices, summed and kept in float32."""
    return torch.mm(a, b, out_dtype=torch.float32)


def head_metrics(core: Any, where: tuple[int, int], call: HeadCall) -> None:
    """Fill the outputs of the head's problem."""
    N, D, C, dtype, problem, head = call.N, call.D, call.C, call.dtype, call.problem, call.head
    itemsize = dtype.itemsize
    weights = bool(call.fields & (NEURONWISE | GRADIENT))
    half = head.linear_weight.dtype in _PIECES and dtype == torch.float32 and takes_half_products()
    pieces = _PIECES[head.linear_weight.dtype] if half and weights else 0
    prepared = call.prepared = _prepared(core, where, call, weights)
    borrowed = head.logits is not None and head.logits.dtype == dtype and head.logits.stride(1) == 1
    per_row = core.HEAD_ROW_BYTES + C * (itemsize + 2 * pieces) + 2 * D * (8 + itemsize)
    length = _chunk_length(N, per_row, prepared.nbytes)
    state = call.empty(length * core.HEAD_ROW_BYTES, dtype=torch.uint8)
    z: Any = None if borrowed and not weights else call.empty(length, C, dtype=dtype)
    mean: Any = call.empty(length, D) if weights else None
    special: Any = call.empty(length, dtype=torch.uint8) if weights else None
    slots = explicit_slots(call)
    scratch: Any = call.empty(slots, 2 * C) if weights else None
    parts: Any = call.empty(pieces * length * C, dtype=head.linear_weight.dtype) if pieces else None
    with full_precision(head.features.device.type):
        for first in range(0, N, length):
            rows = min(length, N - first)
            here = slice(first, first + rows)
            if head.logits is not None and borrowed:
                source = head.logits[here]
            else:
                source = z[:rows]
                if head.logits is not None:
                    source.copy_(head.logits[here])
                else:
                    prepared.logits_into(source, head.features[here])
            q: Any = z[:rows] if weights and not pieces else None
            core.cuda_head_chunk_statistics(
                *where, problem, first, rows, source.data_ptr(), source.stride(0), address(q), address(parts), pieces,
                prepared.summary.data_ptr(), address(prepared.center), address(prepared.squares), state.data_ptr(),
            )  # fmt: skip
            if not weights:
                continue
            prepared.merge(first, rows, q, q, parts, pieces, state)
            if parts is not None:
                q_parts = parts[: pieces * rows * C].view(pieces, rows, C)
                mean[:rows].zero_()
                for start in range(0, C, TILE_CLASSES):
                    stop = min(C, start + TILE_CLASSES)
                    for part in q_parts:
                        mean[:rows] += half_product(part[:, start:stop], head.linear_weight[start:stop])
            else:
                prepared.centered_product_into(mean[:rows], q)
            core.cuda_head_chunk_weights(
                *where, problem, first, rows, address(parts), prepared.summary.data_ptr(), address(prepared.center),
                state.data_ptr(), mean.data_ptr(), special.data_ptr(), prepared.runs.data_ptr(),
            )  # fmt: skip
            core.cuda_head_explicit(
                *where, problem, first, rows, special.data_ptr(), prepared.summary.data_ptr(),
                scratch.data_ptr(), slots,
            )  # fmt: skip
    prepared.detach()


def head_metrics_backward(
    core: Any,
    where: tuple[int, int],
    call: HeadCall,
    upstream: Tensor,
    log_coefficient: Tensor | None,
    d_features: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    d_logits: Tensor | None,
) -> None:
    """Fill the wanted gradients, d_weight and d_bias from zeros; upstream exp(log_coefficient) is dL/dlog v_n."""
    c = derivative(upstream, log_coefficient, call.double)
    N, D, C, dtype, problem, head = call.N, call.D, call.C, call.dtype, call.problem, call.head
    itemsize = dtype.itemsize
    bit = call.fields
    weights, neuronwise = bool(bit & (NEURONWISE | GRADIENT)), bool(bit & NEURONWISE)
    prepared = _prepared(core, where, call, weights)
    column = call.column
    per_row = core.HEAD_ROW_BYTES + core.HEAD_BACKWARD_ROW_BYTES + 2 * C * itemsize + D * (16 + 5 * itemsize)
    length = _chunk_length(N, per_row, prepared.nbytes)
    state = call.empty(length * core.HEAD_ROW_BYTES, dtype=torch.uint8)
    numbers = call.empty(length, core.HEAD_BACKWARD_ROW_BYTES // 8)
    q = call.empty(length, C, dtype=dtype)
    cotangent: Any = call.empty(length, C, dtype=dtype) if weights else None
    sums = call.empty(length, D)
    direction: Any = call.empty(length, D, dtype=dtype) if weights else None
    top_row: Any = call.empty(length, D, dtype=dtype) if neuronwise else None
    top_bias: Any = call.empty(length) if neuronwise else None
    top: Any = call.empty(length, dtype=torch.int64) if neuronwise else None
    scratch = call.empty(2 * C + D + 1)
    rows_of_weight: Any = call.empty(C).zero_() if neuronwise else None
    poison, share = call.empty(1).zero_(), call.empty(1).zero_()  # NaN if a row is poisoned; sum of c
    with full_precision(head.features.device.type):
        for first in range(0, N, length):
            rows = min(length, N - first)
            here = slice(first, first + rows)
            z = q[:rows]
            if head.logits is not None:
                z.copy_(head.logits[here])
            else:
                prepared.logits_into(z, head.features[here])
            core.cuda_head_chunk_statistics(
                *where, problem, first, rows, z.data_ptr(), C, z.data_ptr(), 0, 0, prepared.summary.data_ptr(),
                address(prepared.center), address(prepared.squares), state.data_ptr(),
            )  # fmt: skip
            g = z
            if cotangent is not None and direction is not None:
                g = cotangent[:rows]  # until the directions are there, q with equal rows of W taken together
                prepared.merge(first, rows, z, g, None, 0, state)
                prepared.centered_product_into(sums[:rows], g)
                core.cuda_head_chunk_directions(
                    *where, problem, first, rows, upstream.data_ptr(), address(log_coefficient),
                    prepared.summary.data_ptr(), address(prepared.center), state.data_ptr(), numbers.data_ptr(),
                    sums.data_ptr(), direction.data_ptr(), z.data_ptr(), address(top_row), address(top_bias),
                    address(top), prepared.runs.data_ptr(),
                )  # fmt: skip
                for start, tile in prepared.centered_tiles():
                    torch.mm(direction[:rows], tile.T, out=g[:, start : start + tile.shape[0]])
            mine = None if d_features is None else d_features[here]
            core.cuda_head_chunk_cotangent(
                *where, problem, first, rows, upstream.data_ptr(), address(log_coefficient), z.data_ptr(), g.data_ptr(),
                prepared.summary.data_ptr(), address(prepared.center), address(prepared.squares), state.data_ptr(),
                numbers.data_ptr(), address(mine), address(d_weight), address(d_bias), scratch.data_ptr(),
            )  # fmt: skip
            poisoned = (numbers[:rows, core.HEAD_BACKWARD_ROW_KIND].view(torch.int64) == core.POISONED_ROW).any()
            poison += torch.where(poisoned, math.nan, 0.0)
            share += numbers[:rows, core.HEAD_BACKWARD_ROW_C].sum()
            if head.logits is None:
                if mine is not None:
                    prepared.product_into(sums[:rows], g)
                    mine += sums[:rows]
                if d_weight is not None:
                    # a row that adds nothing stays out, whatever stands in it
                    none = (c[here] == 0).unsqueeze(1)
                    d_weight.addmm_(g.T, head.features[here].to(dtype).masked_fill(none, 0))
                if d_bias is not None:
                    d_bias += g.sum(dim=0, dtype=torch.float64)
            elif d_logits is not None:
                d_logits[here] = g
            if direction is not None and d_weight is not None:
                d_weight.addmm_(z.T, direction[:rows], alpha=-1 if neuronwise else 1)
            if top is not None:
                rows_of_weight += z.sum(dim=0, dtype=torch.float64)
                if column is not None and d_bias is not None:
                    d_bias -= numbers[:rows, core.HEAD_BACKWARD_ROW_BIAS] @ z.to(torch.float64)
                # by products with the one-hot matrix, for sums that come in a fixed order
                one_hot = z.zero_().scatter_(1, top[:rows].unsqueeze(1), 1)
                if d_weight is not None:
                    d_weight.addmm_(one_hot.T, top_row[:rows])
                if column is not None and d_bias is not None:
                    d_bias += top_bias[:rows] @ one_hot.to(torch.float64)
    if rows_of_weight is not None:
        if d_weight is not None:
            for start, tile in prepared.centered_tiles():
                stop = start + tile.shape[0]
                d_weight[start:stop].addcmul_(rows_of_weight[start:stop].to(dtype).unsqueeze(1), tile)
        if column is not None and d_bias is not None:
            centered = column * prepared.scale - prepared.center[D]
            d_bias += torch.where(rows_of_weight == 0, 0, rows_of_weight * centered)
    if bit & LAYERWISE:
        # in two steps: ||W||_F^-2 alone may leave the range; W = 0 has no gradient
        half = torch.where(prepared.summary[0] == -math.inf, 0, (-0.5 * prepared.summary[0]).exp())
        factor = head.norm_power * share * half
        if d_weight is not None:
            for start, block in prepared.tiles():
                d_weight[start : start + block.shape[0]] += block * half.to(dtype) * factor.to(dtype)
        if column is not None and d_bias is not None:
            d_bias += column * half * factor
    if d_weight is not None:
        d_weight += poison.to(dtype)
    if d_bias is not None:
        d_bias += poison
    prepared.detach()


def explicit_slots(call: HeadCall) -> int:
    """How many rows are done from explicit differences at a time."""
    return max(1, min(-(-call.N // 128), _MOST_SLOTS, _SCRATCH_BYTES // (16 * call.C)))


def _prepared(core: Any, where: tuple[int, int], call: HeadCall, centered: bool) -> _Weights:
    """What is known of W: found now, or taken over from the forward pass."""
    if call.prepared is None:
        return _Weights(core, where, call, centered)
    known: _Weights = call.prepared
    known.attach(where, call)
    return known


class _Weights:
    """What the kernels need of W alone, and W by tiles of rows in the compute type."""

    def __init__(self, core: Any, where: tuple[int, int], call: HeadCall, centered: bool):
        C, D = call.C, call.D
        self._core, self.dtype = core, call.dtype
        self.attach(where, call)
        self.summary = call.empty(2)
        self.center: Any = call.empty(D + 1) if centered else None
        self.squares = call.empty(C) if centered else None
        workspace = call.empty(core.cuda_head_weights_workspace(D, C))
        core.cuda_head_weights(
            *where, call.problem, workspace.data_ptr(), self.summary.data_ptr(), address(self.center),
            address(self.squares), 0, 0, 0, 0, 0,
        )  # fmt: skip
        self.scale = torch.exp2(self.summary[1])  # a whole power: exact
        self._scale = self.scale.to(call.dtype)
        self._minus_center: Any = None if self.center is None else -self.center[:D].to(call.dtype)
        self.length = max(1, min(C, TILE_CLASSES, _TILE_BYTES // max(1, D * call.dtype.itemsize)))
        self.nbytes = 8 * (workspace.numel() + 4 * C + D) + self.length * D * call.dtype.itemsize
        if centered:
            self._find_repeats(call)

    def _find_repeats(self, call: HeadCall) -> None:
        """Groups of classes with one row of W, in the order of their keys: all on the device, whatever it finds."""
        C = self.weight.shape[0]
        keys, joins = call.empty(C), call.empty(C, dtype=torch.uint8)
        self._core.cuda_head_repeat_keys(*self._where, call.problem, self.summary.data_ptr(), keys.data_ptr())
        self._order = keys.argsort(stable=True)
        self._core.cuda_head_repeat_joins(
            *self._where, call.problem, keys.data_ptr(), self._order.data_ptr(), joins.data_ptr()
        )
        place = torch.arange(C, device=keys.device)
        begins = torch.where(joins == 0, place, C)
        # where the next group begins: the least beginning behind each place
        following = begins.flip(0).cummin(0).values.flip(0).roll(-1)
        following[-1:].fill_(C)
        self.runs = torch.where(joins == 0, following - place, 0).to(torch.int32)
        self._repeated = joins.amax(dim=0, keepdim=True)

    def merge(
        self, first: int, rows: int, q: Tensor | None, merged: Tensor | None, parts: Tensor | None, pieces: int,
        state: Tensor,
    ) -> None:  # fmt: skip
        """Bring the shares of equal rows together: of q in ``merged``, which may be q; of pieces in place."""
        self._core.cuda_head_chunk_merge(
            *self._where, self._problem, first, rows, address(q), address(merged), address(parts), pieces,
            self._order.data_ptr(), self.runs.data_ptr(), self._repeated.data_ptr(), self.summary.data_ptr(),
            address(self.center), address(self.squares), state.data_ptr(),
        )  # fmt: skip

    def attach(self, where: tuple[int, int], call: HeadCall) -> None:
        """Work for this call, in its stream."""
        self.weight: Any = call.head.linear_weight
        self._where, self._problem = where, call.problem
        self._tile: Any = None  # made when it is needed

    def detach(self) -> None:
        """Hold no tensor of the call, and no tile, until the gradient asks."""
        self.weight = self._problem = self._tile = None

    def _block(self, rows: Tensor) -> Tensor:
        if self._tile is None:
            self._tile = rows.new_empty((self.length, rows.shape[1]), dtype=self.dtype)
        return self._tile[: rows.shape[0]]

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks of rows of W, each with its first row's index."""
        for start in range(0, self.weight.shape[0], self.length):
            rows = self.weight[start : start + self.length]
            yield start, rows if rows.dtype == self.dtype else self._block(rows).copy_(rows)

    def centered_tiles(self) -> Iterator[tuple[int, Tensor]]:
        """The same of 2^e W - center."""
        for start, rows in self.tiles():
            yield start, torch.addcmul(self._minus_center, rows, self._scale, out=self._block(rows))

    def logits_into(self, out: Tensor, features: Tensor) -> None:
        """out = features W^T, in the compute type."""
        half = self.dtype == torch.float32 and features.dtype == self.weight.dtype and features.dtype in _PIECES
        if half and takes_half_products():
            for start in range(0, self.weight.shape[0], self.length):
                rows = self.weight[start : start + self.length]
                out[:, start : start + rows.shape[0]] = half_product(features, rows.T)
            return
        features = features.to(self.dtype)
        if self.weight.dtype == self.dtype:
            torch.mm(features, self.weight.T, out=out)
            return
        for start, rows in self.tiles():
            torch.mm(features, rows.T, out=out[:, start : start + rows.shape[0]])

    def product_into(self, out: Tensor, q: Tensor) -> None:
        """out = q W in float64, from products of tiles: over 200,000 classes float32 alone loses 1e-4."""
        self._sum_into(out, q, self.tiles())

    def centered_product_into(self, out: Tensor, q: Tensor) -> None:
        """out = q (2^e W - center), so that a large common row costs no digits."""
        self._sum_into(out, q, self.centered_tiles())

    @staticmethod
    def _sum_into(out: Tensor, q: Tensor, tiles: Iterator[tuple[int, Tensor]]) -> None:
        out.zero_()
        for start, rows in tiles:
            out += q[:, start : start + rows.shape[0]] @ rows


def _chunk_length(N: int, per_row: int, fixed: int) -> int:
    length = max(1, min(N, (WORKSPACE_BYTES - fixed) // per_row))
    return -(-N // -(-N // length)) if N else 1  # equal chunks: no short last product
