"""Fused or chunked: decided here, from shapes, for every device; forced here, and remembered."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..reference import FIELDS
from . import backend
from .memory import HeadCall

FUSED_CLASSES = 256
FUSED_WEIGHT_BYTES = 1 << 20
"""On the CPU a head of at most this many classes whose weight (in the compute type) fits this many bytes, one core's
second-level cache, takes the fused kernel; any other is chunked around the library's products."""
FUSED_CLASSES_OF_LOGITS = 512
"""The same of fields that need no rows of W, for which there is no table of distances: at C = 300 and 500 the fused trace
takes 0.78 to 0.90 of the tiled one's time, with its gradient 0.68 to 0.89 (D = 64 to 512, N = 128 and 1,024, one thread)."""
CUDA_FUSED_ROWS = 1 << 14
CUDA_FUSED_NUMBERS = 1 << 21
"""On a CUDA device a small head's measure, two launches each way, is for calls that are short of work: of at most this
many rows, for the sums over them go 32 columns a block. Neuronwise flatness and gradient norms keep (N, D) numbers of
8 bytes, at most so many. Beyond, the kernels that read the features as fast as memory gives them should be quicker."""
_OF_WEIGHT_ROWS = sum(1 << bit for bit, name in enumerate(FIELDS) if "neuronwise" in name or "gradient_norm" in name)
_FUSED_CLASSES_AT_MOST = 4096  # forced: the table of distances takes 8 C^2 bytes

forced_path: str | None = None
last_path: str | None = None
_log = logging.getLogger("flatcore")


@contextmanager
def forced(path: str | None = None, cpu: str | None = None) -> Iterator[None]:
    """Force the path ("fused" or "chunked") and the CPU target, for tests and measurements."""
    global forced_path
    if path not in (None, "fused", "chunked"):
        raise ValueError(f"path must be 'fused', 'chunked' or None, got {path!r}")
    previous = forced_path, backend.cpu_target
    forced_path, backend.cpu_target = path, backend._check_cpu(cpu) or backend.cpu_target
    try:
        yield
    finally:
        forced_path, backend.cpu_target = previous


def on_cpu(C: int, D: int, double: bool, fields: int) -> str:
    """Choose "fused" or "chunked" for the CPU's kernels and a call's fields."""
    if forced_path == "fused" and C > _FUSED_CLASSES_AT_MOST:
        raise ValueError(f"the fused path takes at most {_FUSED_CLASSES_AT_MOST} classes, got {C}")
    if forced_path is not None:
        return forced_path
    most = FUSED_CLASSES if fields & _OF_WEIGHT_ROWS else FUSED_CLASSES_OF_LOGITS
    fits = most >= C and C * D * (8 if double else 4) <= FUSED_WEIGHT_BYTES
    return "fused" if fits else "chunked"


def on_cuda(C: int, limit: int, usable: frozenset[str]) -> str | None:
    """Choose "fused" or "chunked" for a CUDA device's kernels, whose fused one takes ``limit`` classes.

    Of the ``usable`` ones, which are all unless a check has failed; None where none of these can take the head.
    """
    if forced_path == "fused" and limit < C:
        raise ValueError(f"the fused path takes at most {limit} classes on a CUDA device, got {C}")
    wanted = (forced_path,) if forced_path else ("fused", "chunked") if limit >= C else ("chunked",)
    return next((path for path in wanted if path in usable), None)


def of_measure_on_cuda(call: HeadCall, limit: int, usable: frozenset[str]) -> str:
    """Choose "fused" or "chunked" for one measure or its gradient: what is quick, of the ``usable`` ones."""
    if forced_path is not None or limit < call.C:
        return forced_path or "chunked"
    quick = call.N <= CUDA_FUSED_ROWS and (not call.fields & _OF_WEIGHT_ROWS or call.N * call.D <= CUDA_FUSED_NUMBERS)
    wanted = ("fused", "chunked") if quick else ("chunked", "fused")
    return next((path for path in wanted if path in usable), "chunked")


def took(path: str, call: HeadCall, where: object) -> None:
    """Remember the path of a call, and log it."""
    global last_path
    last_path = path
    if _log.isEnabledFor(logging.DEBUG):
        names = ", ".join(name for bit, name in enumerate(FIELDS) if call.fields >> bit & 1)
        _log.debug("head of N=%d D=%d C=%d (%s): %s, %s", call.N, call.D, call.C, names, path, where or "cpu")
