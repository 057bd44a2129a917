"""Peak memory of one call above its inputs and outputs: run as a fresh process per candidate.

Inputs are made, a call on a few rows warms the libraries up, freed memory goes back to the system, the kernel's
high-water mark of resident memory is reset; then: peak = VmHWM after the call - VmRSS before it - bytes of the outputs.
Whatever a library keeps from its first large call counts. A torch.compile candidate is warmed up on the full inputs
instead, else its compilation would be measured. Transient buffers smaller than a page run are seen to about 1 MB.

    python bench/memory.py W4-trace native
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# fixed, so that glibc returns every large buffer when it is freed instead of learning to keep it
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


def peak_megabytes(key: str, name: str, *, threads: int, quick: bool) -> float | None:
    """Measure in a fresh process; None where the system has no resettable high-water mark (other than Linux).

    Raises:
        RuntimeError: the process failed; its error output is the message.
    """
    return megabytes([__file__, key, name, str(threads), "quick" if quick else "full"], f"{name} in {key}")


def megabytes(script: list[str], what: str) -> float | None:
    """Run a script that prints its peak as JSON, in a fresh process; None and RuntimeError as :func:`peak_megabytes`."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, *script]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_ENVIRONMENT}, check=False)
    if done.returncode:
        raise RuntimeError(f"memory of {what}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])["megabytes"]


def _status(field: str) -> int:
    """Read a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _output_bytes(answer: Any) -> int:
    tensors = answer if isinstance(answer, tuple) else (answer,)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def _main(key: str, name: str, threads: str, size: str) -> None:
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
    import torch
    import works

    torch.set_num_threads(int(threads))
    (work,) = works.select(key)
    work = work.quick() if size == "quick" else work
    x = works.inputs(work)
    (candidate,) = [c for c in works.candidates(work) if c.name == name]
    few = x if candidate.role == "compile" else x.rows(torch.arange(min(16, work.N)))
    candidate.run(few)
    del few
    peak, answer = peak_of(lambda: candidate.run(x))
    print(json.dumps({"megabytes": max(peak - _output_bytes(answer), 0) / 1e6}))


def peak_of(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes of resident memory that a call adds at its peak, in a process that has warmed up; and what it returns."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = _status("VmRSS")
    answer = run()
    return _status("VmHWM") - before, answer


if __name__ == "__main__":
    _main(*sys.argv[1:])
