"""How many threads a call may use: torch's number, and one of torch's own in a forked child."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])
_forked = False
_alone = threading.local()


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def alone_after_fork(function: _Function) -> _Function:
    """One thread for torch's own operators in a forked child: a second waits for ever for the parent's team.

    The kernels know by themselves; they keep the number of their shares, and with it every bit of their results.
    """

    @functools.wraps(function)
    def run(*arguments, **options):
        if not _forked or getattr(_alone, "threads", None) is not None:
            return function(*arguments, **options)
        _alone.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*arguments, **options)
        finally:
            torch.set_num_threads(_alone.threads)
            _alone.threads = None

    return run  # type: ignore[return-value]


def threads() -> int:
    """Number of shares that a kernel divides its rows into."""
    return getattr(_alone, "threads", None) or torch.get_num_threads() if _forked else torch.get_num_threads()
