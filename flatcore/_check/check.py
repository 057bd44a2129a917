"""Check the kernels of this machine: the public function."""

from __future__ import annotations

import math
from typing import Any

import torch

from .._arguments.checks import check_flag
from .._engine import extensions
from .._engine.backend import is_native_built
from ..cuda import is_built, show_config
from .record import Check, Row


def check(device: Any = None, *, full: bool = False) -> Check:
    """Compare the kernels of this machine, on its processor and its GPUs, with exact answers that came with the package.

    About 100 small calls for each CPU target, device and path: all measures and their gradients, row norms and the
    unmasked cross-entropy; 2 to 1,500 classes, four dtypes, logit gaps from 0 to 1,000, masked classes, NaN, ignored rows,
    features of norm 1e20, equal and nearly equal rows of W, tensors that start off a 16-byte boundary; one call of each
    twice, for the same bits. Two seconds on two idle cores, ten beside busy ones.

    Args:
        device: ``"cpu"``; ``"cuda"``, every CUDA device, or one of them (``"cuda:1"``); a ``torch.device``; None: the CPU
            and every CUDA device that can be used.
        full: large sizes too, against the reference in float64 on the CPU; on CUDA also a second stream, a graph capture
            and times beside eager PyTorch. About a minute on a CPU.

    Returns:
        A record: ``rows``, one for each backend, computation and path, with ``cases`` (calls), ``worst`` (the largest error
        in tolerances: 1 is the last that passes) and ``failure`` (None, or case, wanted and got in a sentence); ``ok``,
        whether everything that was asked for and is here was compared and nothing failed; ``reason``, why a device could
        not be checked, or None. Printed it is a table.

    Raises:
        TypeError: ``device`` is none of these; ``full`` is no bool.
        ValueError: a device of another type than CPU and CUDA.

    A wrong kernel raises nothing: it makes a failure of its row. CUDA devices are checked in a process of their own, for a
    kernel that reads where it must not would end this one's use of the device. The CPU is checked here: meanwhile other
    threads' calls take the path under test, which may change their results' last bits.

    Numerics: inputs are multiples of powers of two, from an integer generator, that all four dtypes hold and whose logits
    float32 forms exactly; the answers have 60 digits behind them (``tests/make_golden_answers.py``), and what each may be
    off is the test suite's one tolerance (``flatcore/_check/tolerance.py``). Of large gradients weighted sums and
    samples are compared, and every entry with the reference in float64.

    Source: docs/check.md.

    Example:
        >>> import flatcore
        >>> found = flatcore.check("cpu")
        >>> found.ok, found.reason
        (True, None)
    """
    check_flag(full, "full")
    chosen = _chosen(device)
    devices, reason = _cuda_devices()
    rows: list[Row] = []
    reasons: list[str] = []
    notes: list[str] = []
    if chosen is None or chosen.type == "cpu":
        from .battery import battery

        rows += battery(torch.device("cpu"), full=full)
        if not is_native_built():
            notes.append(
                "cpu: this install has no compiled kernels, so the PyTorch reference was checked: pip install . in "
                "flatcore's source folder, with a C++17 compiler, builds them"
            )
    if chosen is None or chosen.type == "cuda":
        wanted = devices if chosen is None or chosen.index is None else [d for d in devices if d == chosen]
        if not wanted:
            name = "cuda" if chosen is None else str(chosen)
            rows.append(Row(name, "-", "-", 0, math.nan, None))
            reasons.append(f"{name}: {reason or f'this machine has {len(devices)} CUDA devices'}")
        for one in wanted:
            found = _on_cuda(one, full)
            rows += found.rows or (Row(str(one), "-", "-", 0, math.nan, None),)
            notes += found.notes
            if found.reason:
                reasons.append(f"{one}: {found.reason}")
    return Check(tuple(rows), "; ".join(reasons) or None, tuple(notes))


def _chosen(device: Any) -> torch.device | None:
    if device is None:
        return None
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be 'cpu', 'cuda', a torch.device or None, got {type(device).__qualname__}")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device must be 'cpu', 'cuda', one CUDA device such as 'cuda:0', or None, got {str(device)!r}"
        )
    return chosen


def _cuda_devices() -> tuple[list[torch.device], str | None]:
    """The CUDA devices that can be used, or why there is none."""
    reason = show_config()["reason"]
    if reason is None and not torch.cuda.is_available():
        return [], "torch finds no CUDA device (torch.cuda.is_available() is False)"
    if reason is not None:
        if not is_built() and not torch.cuda.is_available():
            return [], f"{reason}, and torch finds no CUDA device"
        return [], f"{reason}. {extensions.cuda_remedy(reason)}"
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())], None


def _on_cuda(device: torch.device, full: bool) -> Check:
    """In a process of its own; what has passed there is timed here."""
    from . import prove

    found = prove.prove(device.index or 0, full=full)
    if full and found.ok:
        from .full import times

        found = found._replace(notes=(*found.notes, *times(device)))
    return found
