"""Large heads: chunks of rows around the library's matrix products, at bounded workspace.

For a chunk of rows the library forms Z = Phi W^T; a kernel turns Z, in place, into row statistics and q, the softmax over
the classes other than the top one; the library forms q (W - center), or q times the table of squared distances between
rows where that is cheaper; a kernel finishes. Never N x C numbers: the chunk is as long as WORKSPACE_BYTES allow.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ._backend import _core
from .reference import FIELDS

WORKSPACE_BYTES = 64 << 20
"""Bound of all buffers of one call, in bytes, unless a single row needs more."""
_LIBRARY_BYTES = (
    12 << 20
)  # of these for what the library packs for its products: 9 MB were seen at D = 2048, C = 32,000
_TILE_BYTES = 8 << 20  # rows of W converted or centred at a time: they stay in the last-level cache for the product
_TILE_CLASSES = 4096  # and of these at most so many: the length of the sums a product of float32 forms by itself
_DISTANCE_CLASSES = 2048  # up to here the (C, C) table fits a quarter of the workspace in float32

_NEURONWISE = 1 << FIELDS.index("log_neuronwise")
_LAYERWISE = 1 << FIELDS.index("log_layerwise")
_GRADIENT = sum(1 << bit for bit, name in enumerate(FIELDS) if name.startswith("log_feature_gradient_norm"))

_precision_lock = threading.Lock()
_precision_users = 0
_precision_before = ("highest", "none")


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in full float32: autocast off, and the process's matmul precision at its highest while any of them runs.

    The first of several threads raises it and the last one restores it.
    """
    global _precision_users, _precision_before
    with torch.autocast("cpu", enabled=False):
        with _precision_lock:
            if _precision_users == 0:
                _precision_before = torch.get_float32_matmul_precision(), _cpu_precision()
                if _precision_before[0] != "highest" or _precision_before[1] not in ("none", "ieee"):
                    torch.set_float32_matmul_precision("highest")
                    _set_cpu_precision("ieee")
            _precision_users += 1
        try:
            yield
        finally:
            with _precision_lock:
                _precision_users -= 1
                if _precision_users == 0 and _precision_before != (
                    torch.get_float32_matmul_precision(),
                    _cpu_precision(),
                ):
                    torch.set_float32_matmul_precision(_precision_before[0])
                    _set_cpu_precision(_precision_before[1])


def _cpu_precision() -> str:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return getattr(matmul, "fp32_precision", "none")


def _set_cpu_precision(value: str) -> None:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = value


def head_metrics(
    target_name: str,
    problem,
    features: Tensor,
    linear_weight: Tensor,
    logits: Tensor | None,
    fields: int,
    double: bool,
    threads: int,
) -> int:
    """Fill the problem's outputs; return the first row with a label that is no class, or -1."""
    dtype = torch.float64 if double else torch.float32
    itemsize = 8 if double else 4
    (N, D), C = features.shape, linear_weight.shape[0]
    weights = bool(fields & (_NEURONWISE | _GRADIENT))
    direct = linear_weight.dtype == dtype
    # The product with the (C, C) table replaces the one with W where forming the table, about C^2 D / 2, leaves a gain.
    by_distance = (
        weights and not fields & _GRADIENT and C <= _DISTANCE_CLASSES and 2 * N * C + C * D < 2 * N * D
        and (direct or C * D * itemsize <= _TILE_BYTES)
    )  # fmt: skip

    summary = torch.zeros(2, dtype=torch.float64)
    center = torch.empty(D + 1, dtype=torch.float64) if weights and not by_distance else None
    squares = torch.empty(C, dtype=torch.float64) if center is not None else None
    if weights or fields & _LAYERWISE:
        row_workspace = torch.empty(2 * C, dtype=torch.float64)
        _core.head_summary(
            target_name, problem, row_workspace.data_ptr(), summary.data_ptr(), _address(center), _address(squares)
        )
        del row_workspace
    exponent = int(summary[1])

    distances = None
    fixed = 8 * (3 * C + D)
    if by_distance:
        rows = linear_weight if direct and linear_weight.stride(1) == 1 else linear_weight.to(dtype).contiguous()
        distances = torch.empty(C, C, dtype=dtype)
        code = 3 if double else 2
        _core.head_distances(
            target_name, problem, (rows.data_ptr(), rows.stride(0), 1, code), exponent, distances.data_ptr()
        )
        fixed += C * C * itemsize
        del rows

    scratch = torch.empty(threads * _core.head_chunk_scratch(C, D), dtype=torch.float64) if weights else None
    fixed += 0 if scratch is None else 8 * scratch.numel()
    tile = None
    if (logits is None and not direct) or center is not None:
        tile_rows = max(1, min(C, _TILE_CLASSES, _TILE_BYTES // max(1, D * itemsize)))
        tile = torch.empty(tile_rows, D, dtype=dtype)
        fixed += tile.numel() * itemsize
    borrowed = logits is not None and logits.dtype == dtype and logits.stride(1) == 1
    convert = logits is None and features.dtype != dtype
    per_row = _core.HEAD_ROW_BYTES
    per_row += 0 if borrowed and not weights else C * itemsize
    per_row += D * (8 + itemsize) if center is not None else 0
    per_row += C * itemsize if distances is not None else 0
    per_row += D * itemsize if convert else 0
    length = max(1, min(N, (WORKSPACE_BYTES - _LIBRARY_BYTES - fixed) // per_row))
    length = -(-N // -(-N // length))  # equal chunks: no short last product

    state = torch.empty(length * _core.HEAD_ROW_BYTES, dtype=torch.uint8)
    z = None if borrowed and not weights else torch.empty(length, C, dtype=dtype)
    mean = torch.empty(length, D, dtype=torch.float64) if center is not None else None
    part = torch.empty(length, D, dtype=dtype) if center is not None else None
    spread = torch.empty(length, C, dtype=dtype) if distances is not None else None
    shift = None if center is None else center[:D].to(dtype)
    first_bad = -1
    with full_precision():
        for first in range(0, N, length):
            rows = min(length, N - first)
            if borrowed:
                source = logits[first : first + rows]  # type: ignore[index]
            elif logits is not None:
                source = z[:rows].copy_(logits[first : first + rows])
            else:
                source = z[:rows]
                _logits_into(source, features[first : first + rows], linear_weight, tile, dtype)
            q = z[:rows] if weights else None
            bad = _core.head_chunk_statistics(
                target_name, problem, first, rows, source.data_ptr(), source.stride(0), _address(q), C,
                summary.data_ptr(), _address(center), _address(squares), state.data_ptr(),
            )  # fmt: skip
            if bad >= 0 and first_bad < 0:
                first_bad = bad
            if not weights:
                continue
            if distances is not None:
                torch.mm(q, distances, out=spread[:rows])
            else:
                _mean_into(mean[:rows], part[:rows], q, linear_weight, shift, 2.0**exponent, tile)
            _core.head_chunk_weights(
                target_name, problem, first, rows, _address(q), C, summary.data_ptr(), _address(center), state.data_ptr(),
                _address(mean), D, _address(spread), C, scratch.data_ptr(),
            )  # fmt: skip
    return first_bad


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _logits_into(out: Tensor, features: Tensor, weight: Tensor, tile: Tensor | None, dtype: torch.dtype) -> None:
    """out = features W^T, both in the compute type."""
    features = features.to(dtype)
    if weight.dtype == dtype:
        torch.mm(features, weight.T, out=out)
        return
    for start in range(0, weight.shape[0], tile.shape[0]):
        part = weight[start : start + tile.shape[0]]
        converted = tile[: part.shape[0]].copy_(part)
        out[:, start : start + part.shape[0]] = features @ converted.T


def _mean_into(
    out: Tensor, part: Tensor, q: Tensor, weight: Tensor, center: Tensor, scale: float, tile: Tensor
) -> None:
    """out = q (scale W - center), a tile of W at a time, so that no second W exists and a large common row costs no digits.

    A tile's product is in the compute type, their sum in float64: over 200,000 classes float32 alone loses 1e-4.
    """
    out.zero_()
    for start in range(0, weight.shape[0], tile.shape[0]):
        rows = weight[start : start + tile.shape[0]]
        centered = tile[: rows.shape[0]]
        if scale == 1:
            torch.sub(rows, center, out=centered)
        else:
            torch.mul(rows, scale, out=centered)
            centered.sub_(center)
        out += torch.mm(q[:, start : start + rows.shape[0]], centered, out=part)
