"""Peak memory of one call above its inputs and outputs: run as a fresh process per candidate.

Inputs are made, a call on a few rows warms the libraries up, freed memory goes back to the system, the kernel's
high-water mark of resident memory is reset; then: peak = VmHWM after the call - VmRSS before it - bytes of the outputs.
Whatever a library keeps from its first large call counts. A torch.compile candidate is warmed up on the full inputs
instead, else its compilation would be measured. Transient buffers smaller than a page run are seen to about 1 MB.

    python -m flatcore._bench.memory W4-trace native
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
    """Measure on the CPU in a fresh process; None where the system has no resettable high-water mark (other than Linux).

    Raises:
        RuntimeError: the process failed; its error output is the message.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", __name__, key, name, str(threads), "quick" if quick else "full"]
    package = str(Path(__file__).resolve().parents[2])  # whatever this process was started from
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"the process that measures the memory of {name} in {key} failed: {last}")
    return float(json.loads(done.stdout.splitlines()[-1])["megabytes"])


def cuda_megabytes(run: Callable[[], Any]) -> float:
    """Measure a call on the current CUDA device, in this process: what the caching allocator hands out at most."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    answer = run()
    torch.cuda.synchronize()
    return float(max(torch.cuda.max_memory_allocated() - before - output_bytes(answer), 0)) / 1e6


def _status(field: str) -> int:
    """Read a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def output_bytes(answer: Any) -> int:
    """Bytes of what a call returns."""
    tensors = answer if isinstance(answer, tuple) else (answer,)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def _main(key: str, name: str, threads: str, size: str) -> None:
    import torch

    from . import candidates, works
    from .inputs import inputs

    torch.set_num_threads(int(threads))
    torch.set_grad_enabled(False)
    (work,) = [work for work in works.WORKS if work.key == key]
    work = work.quick() if size == "quick" else work
    x = inputs(work)
    (candidate,) = [c for c in candidates.candidates(work)[0] if c.name == name]
    run = candidate.prepare(x)
    if candidate.role == "compile" or candidate.note:  # shapes are compiled for; the tools are warm after one call
        run()
    else:
        candidate.run(x.rows(torch.arange(min(16, work.N))))
    peak, answer = peak_of(run)
    print(json.dumps({"megabytes": max(peak - output_bytes(answer), 0) / 1e6}))


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
