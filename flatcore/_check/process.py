"""A check of a CUDA device, in a process of its own: a kernel that faults ends that process and not the user's.

What cannot be told from here is said by the last words of the process: files in a folder that both know.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._engine import backend, device, extensions, proof
from . import cache
from .record import Check, Row

CHILD = "flatcore._check.child"
LOADING_SECONDS = 180.0
"""For the interpreter, torch and the device's context: seconds, or minutes from a busy network folder."""
CHECK_SECONDS = 60.0
PTX_SECONDS = 600.0
"""Where the module has no machine code for the device, which the driver then compiles at the first load; and in full."""
MOST_BYTES = 256 << 20
"""Of the device's memory, for the tensors of a check that is not a full one: others may be at work there."""

_POLL_SECONDS = 0.05
_RANKS = re.compile(r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_.*|TORCHELASTIC_.*)$")
_INTERPRETER = re.compile(r"(python|pypy)[\d.]*[a-z]?(\.exe)?$", re.IGNORECASE)
_FAULTS = {"SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL", "SIGTRAP"}
"""Signals that a fault sends; others (SIGKILL for want of memory, SIGTERM) come from outside and prove nothing."""


def run(device: int, *, full: bool = False) -> Check:
    """Check the kernels of a CUDA device; why it could not be done is the result's ``reason``.

    A stem whose kernel ends the process has failed, and the others are checked without it.
    """
    hindrance = _hindrance()
    if hindrance is not None:
        return Check((), hindrance)
    died: dict[str, Row] = {}
    while True:
        check, fault = _attempt(device, full, sorted(died))
        rows = [row for row in check.rows if row.stem not in died]
        if fault is not None:
            stem, what = fault
            for each in (stem,) if stem in backend.CUDA_STEMS else backend.CUDA_STEMS:
                died[each] = Row("", each, "-", 0, math.nan, what)
            if stem in backend.CUDA_STEMS and len(died) < len(backend.CUDA_STEMS):
                continue
        return named(Check((*rows, *died.values()), check.reason), device)


def named(check: Check, index: int) -> Check:
    """The same, of this device: in its own process every device is the first."""
    return Check(tuple(row._replace(backend=f"cuda:{index}") for row in check.rows), check.reason)


def longest(index: int, full: bool) -> float:
    """Seconds after which a check has ended, one way or another."""
    return LOADING_SECONDS + _limit(index, full)


def _hindrance() -> str | None:
    """Why no process can be started here."""
    if proof.GUARD in os.environ:
        return "this process is itself a check"
    executable = sys.executable or ""
    if getattr(sys, "frozen", False) or not _INTERPRETER.match(Path(executable).name):
        return f"this program is no plain Python interpreter ({executable or 'sys.executable is empty'})"
    if not Path(executable).is_file():
        return f"there is no interpreter at {executable}"
    if device.is_shared():
        return "the GPU is shared through MPS, where a fault in one process ends the others"
    return None


def _limit(index: int, full: bool) -> float:
    """Seconds for the check proper."""
    major, minor = device.capability(index)
    quick = not full and extensions.has_machine_code(extensions.cuda_architectures(), 10 * major + minor)
    return CHECK_SECONDS if quick else PTX_SECONDS


def _environment(index: int) -> dict[str, str]:
    """The environment of this process, without a rank in a group, with one device and its ``sys.path``."""
    kept = {name: value for name, value in os.environ.items() if not _RANKS.match(name)}
    for name in ("PYTHONWARNINGS", "PYTHONINSPECT", "FLATCORE_BACKEND"):
        kept.pop(name, None)
    return kept | {
        proof.GUARD: "1", "CUDA_VISIBLE_DEVICES": device.visible_name(index), "PYTHONPATH": os.pathsep.join(_path()),
    }  # fmt: skip


def _path() -> list[str]:
    """``sys.path``, whose relative entries mean this process's folder."""
    return [str(Path(entry).absolute()) for entry in sys.path]


def _attempt(index: int, full: bool, avoid: Sequence[str]) -> tuple[Check, tuple[str, str] | None]:
    """One process: its check, and if it died of a kernel, which stem and how."""
    limit = _limit(index, full)
    try:
        # an empty folder: -m puts the working folder before sys.path, and there a user may have a torch.py
        with tempfile.TemporaryDirectory(prefix="flatcore-check-", ignore_cleanup_errors=True) as name:
            here = Path(name)
            most = 0 if full else MOST_BYTES
            request = {"path": _path(), "full": full, "avoid": list(avoid), "bytes": most, "seconds": limit + 30}
            (here / "request.json").write_text(json.dumps(request))
            with (here / "output").open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", CHILD, name], cwd=name, env=_environment(index), stdin=subprocess.DEVNULL,
                    stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip
            try:
                in_time = _wait(process, here, limit)
            finally:
                _end(process)
            return _judge(index, process.returncode, here, in_time, limit)
    except (OSError, RuntimeError) as error:  # no memory or no right for a process, no folder, an interpreter that ends
        return Check((), f"no process could be started for it: {error}"), None


def _wait(process: subprocess.Popen[bytes], here: Path, limit: float) -> bool:
    """Whether it ended by itself; its time begins anew once all is loaded."""
    end, loaded = time.monotonic() + LOADING_SECONDS, False
    while process.poll() is None:
        if not loaded and (here / "progress").exists():
            end, loaded = time.monotonic() + limit, True
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it with all that it may have started; one that hangs in the driver is left behind."""
    if process.poll() is not None:
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait(10)


def _judge(
    index: int, status: int | None, here: Path, in_time: bool, limit: float
) -> tuple[Check, tuple[str, str] | None]:
    """What came of it, from how it ended and what it left."""
    progress = (here / "progress").read_text().split() if (here / "progress").exists() else None
    stem = progress[-1] if progress else ""
    within = f", in {stem}" if stem else ""
    if not in_time:
        loading = f"was not ready within {LOADING_SECONDS:.0f} s"
        done = f"gave no answer within {limit:.0f} s{within}"
        return Check((), f"its process {loading if progress is None else done}"), None
    answer = _answer(here)
    if answer is not None:
        return _believed(index, answer)
    ended = _ending(status)
    if progress is not None and ended in _FAULTS:
        return Check(()), (stem, f"its process ended with {ended}{within}: wanted a result, got none")
    return Check((), f"its process ended with {ended}{within}: {_last_line(here)}"), None


def _answer(here: Path) -> dict[str, Any] | None:
    """What the process wrote at its end; None if it is not whole."""
    try:
        found = json.loads((here / "answer.json").read_text())
        Check.from_json(json.dumps(found["check"]))
        return {name: found[name] for name in ("package", "file", "device", "check", "fault")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _believed(index: int, answer: dict[str, Any]) -> tuple[Check, tuple[str, str] | None]:
    """The check, if it was one of this package and of this device."""
    check = Check.from_json(json.dumps(answer["check"]))
    if answer["package"] != cache.package_hash():
        return Check((), f"its process found another flatcore than this one, {answer['file']}"), None
    if check.reason is None and answer["device"] != [device.name(index), *device.capability(index)]:
        return Check((), f"its process found another device than this one, {answer['device']}"), None
    fault = answer["fault"]
    return check, None if fault is None else (str(fault[0]), str(fault[1]))


def _ending(status: int | None) -> str:
    if status is None:
        return "no status"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"status {status}"


def _last_line(here: Path) -> str:
    lines = (here / "output").read_text(errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "it printed nothing"
