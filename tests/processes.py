"""Process groups in tests.

A worker that is a process of its own ends with a barrier and ``os._exit(0)``, its results written: what torch does at the
end of a group that DistributedDataParallel has used hangs or aborts beside busy cores ("terminate called without an active
exception"), and is not what is tested.
"""

from __future__ import annotations

from torch import distributed


def leave_process_group() -> None:
    """Destroy the process group, after its threads have let go of the last backward's work.

    For that they need the interpreter's lock, and who destroys a group that DistributedDataParallel has used waits for
    them with the lock in hand: a hang, seen once beside busy cores. The barrier waits without it.
    """
    distributed.barrier()
    distributed.destroy_process_group()
