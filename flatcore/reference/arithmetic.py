"""In which dtype the formulas are computed on a device, and how much of a problem at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor

_FULL_RATE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities of the GPUs with float64 at half the rate of float32: P100, V100, A100, H100, B200. Others have
between 1/32 and 1/64 of it."""
_FULL_RATE_HIP = ("gfx908", "gfx90a", "gfx94", "gfx95")  # MI100 to MI355; others have between 1/16 and 1/32

_BLOCK = {"cpu": 1 << 21}
"""Bytes of a block's largest tensor: half as much takes 1.2 times as long in operations on 10 classes, twice as much in page
faults, where an allocator gives the memory of such tensors back to the system."""
_BLOCK_ELSEWHERE = 1 << 26  # a device is kept busy by 10^5 rows, and starts a kernel per operation and block
_ROWS = 128  # at least, as long as a block takes no more than a tile: a product of fewer reads W too often
_TILE = 1 << 22
"""Numbers of a tile of classes of W: 16 MiB of float32. A larger W is never widened or centred as a whole."""

_FEW = 4
"""Rows that are done again together, at least: each piece of W is widened once for them."""

_forced: tuple[torch.dtype | None, torch.dtype | None] = None, None


@contextmanager
def arithmetic_in(dtype: torch.dtype | None, widest: torch.dtype | None = None) -> Iterator[None]:
    """Compute in ``dtype`` where no input is wider, whatever the device; as if ``widest`` were the widest that it has."""
    global _forced
    previous, _forced = _forced, (dtype, widest)
    try:
        yield
    finally:
        _forced = previous


def widest(device: torch.device) -> torch.dtype:
    """The widest dtype that a device has: float64, but float32 on MPS and on an XPU that says so.

    Of it are the sums over rows and the results that are asked for in full, N numbers each.
    """
    if _forced[1] is not None:
        return _forced[1]
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64


def arithmetic(*inputs: Tensor | None, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype to compute in: ``dtype`` if given, float64 if any input is, otherwise what the device is fast in.

    float64 on a CPU (half the speed of float32) and on the GPUs that have it at half the rate of float32, by their
    compute capability (6.0, 7.0, 8.0, 9.0, 10.0) or architecture (gfx908, gfx90a, gfx94x, gfx95x); float32 on any other
    device.
    """
    given = [x for x in inputs if x is not None]
    if any(x.dtype == torch.float64 for x in given):
        return torch.float64
    if chosen := dtype or _forced[0]:
        return chosen
    device = given[0].device
    if device.type in ("cpu", "meta"):
        return torch.float64
    if device.type != "cuda":
        return torch.float32
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return torch.float64 if name.startswith(_FULL_RATE_HIP) else torch.float32
    return torch.float64 if torch.cuda.get_device_capability(device) in _FULL_RATE else torch.float32


def blocks(N: int, width: int, wide: torch.dtype, device: torch.device) -> list[slice]:
    """The rows 0 to N, one block if there are none, as many at once as a block may hold at ``width`` numbers a row."""
    width = max(width, 1)
    rows = _BLOCK.get(device.type, _BLOCK_ELSEWHERE) // (width * wide.itemsize)
    rows = max(rows, min(_ROWS, _TILE // width), 1)
    return [slice(start, min(start + rows, N)) for start in range(0, max(N, 1), rows)]


def tiles(C: int, D: int) -> list[slice]:
    """The classes 0 to C in tiles of W, (C, D)."""
    classes = max(_TILE // max(D, 1), 1)
    return [slice(start, min(start + classes, C)) for start in range(0, C, classes)]


def pieces(N: int, C: int, D: int, wide: torch.dtype, device: torch.device) -> Iterator[tuple[slice, list[slice]]]:
    """Rows, a few at a time, and tiles of the classes of which (rows, classes, D) numbers take a block or less."""
    most = _BLOCK.get(device.type, 1 << 24) // wide.itemsize
    rows = max(min(_FEW, most // max(D, 1)), most // max(C * D, 1), 1)
    classes = max(most // (rows * max(D, 1)), 1)
    tiled = [slice(start, min(start + classes, C)) for start in range(0, C, classes)]
    for start in range(0, N, rows):
        yield slice(start, min(start + rows, N)), tiled


def total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of the parts, at least one."""
    return reduce(torch.add, parts)


def lengths(x: Tensor) -> Tensor:
    """The L2 norm of each row. The library's norm makes no second (N, D) tensor, but adds up in 16 sums, or fewer."""
    return x.square().sum(dim=1).sqrt() if x.shape[1] > 1024 else torch.linalg.vector_norm(x, dim=1)


def norms(x: Tensor, ord: float) -> Tensor:
    """The norm of each row."""
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0])
    if ord == 2:
        return lengths(x)
    return x.abs().sum(dim=1) if ord == 1 else x.abs().amax(dim=1)


def within_range(largest: Tensor) -> Tensor:
    """A number to divide by, near the largest of some: normal and finite."""
    limits = torch.finfo(largest.dtype)
    return largest.clamp(limits.tiny, limits.max)


def joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """One tensor of the parts; the part itself where it is one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
