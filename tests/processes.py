"""Process groups in tests, and tests that fork.

A worker that is a process of its own ends with a barrier and ``os._exit(0)``, its results written: what torch does at the
end of a group that DistributedDataParallel has used hangs or aborts beside busy cores ("terminate called without an active
exception"), and is not what is tested.
"""

from __future__ import annotations

import os
from typing import TypeVar

import pytest
from torch import distributed

_Test = TypeVar("_Test")


def forks(test: _Test) -> _Test:
    """Mark a test that forks: there is a fork, and Python's warning of the threads beside it is no error."""
    ignored = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    return pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")(ignored(test))


def leave_process_group() -> None:
    """Destroy the process group, after its threads have let go of the last backward's work.

    For that they need the interpreter's lock, and who destroys a group that DistributedDataParallel has used waits for
    them with the lock in hand: a hang, seen once beside busy cores. The barrier waits without it.
    """
    distributed.barrier()
    distributed.destroy_process_group()
