"""The process that checks: ``python -m flatcore._check.child FOLDER``, started by ``process`` alone.

The folder has ``request.json``. Into it go ``progress``, the stem of each call before it is made, and at the end
``answer.json``; nothing is said on the standard streams, which any library may use.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import reference
from .._engine import device, extensions, reduction
from .._engine.ops import kernels
from . import cache
from .record import Check

_NOT_A_FAULT = (
    "out of memory", "busy or unavailable", "no cuda-capable device", "no cuda gpus are available",
    "invalid device ordinal", "invalid device function", "initialization error", "found no nvidia driver",
    "driver version is insufficient", "not yet initialized", "unsupported display driver", "uncorrectable ecc", " mps ",
    "alloc_failed", "cublas_status_not_initialized", "no kernel image", "unsupported toolchain", "ptx jit compil",
)  # fmt: skip
"""Errors of CUDA that say nothing of a kernel: want of memory, exclusive mode, no device, a driver that is too old."""


def _is_no_fault(text: str) -> bool:
    return any(words in text.lower() for words in _NOT_A_FAULT)


class Child:
    """One check and the folder it answers in."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.request = json.loads((folder / "request.json").read_text())
        self._progress: int | None = None
        self._stem = ""

    def note(self, stem: str) -> None:
        """Leave a word, which stays whatever comes next."""
        if self._progress is None:
            self._progress = os.open(self._folder / "progress", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._stem = stem
        os.write(self._progress, f"{stem}\n".encode())

    def answer(self, check: Check, fault: str | None = None) -> None:
        """Write the result, whole or not at all."""
        known = [device.name(0), *device.capability(0)] if check.reason is None else None
        text = json.dumps({
            "package": cache.package_hash(), "file": str(Path(__file__).parents[1]), "device": known,
            "check": json.loads(check.to_json()), "fault": None if fault is None else [self._stem, fault],
        })  # fmt: skip
        part = self._folder / "answer.part"
        part.write_text(text)
        part.replace(self._folder / "answer.json")

    def end(self, error: BaseException) -> NoReturn:
        """Answer with an error of CUDA and end at once: after one, nothing on the device can be believed."""
        text = (str(error).splitlines() or [""])[0][:300]
        said = f"{type(error).__name__}: {text}"
        if isinstance(error, MemoryError) or _is_no_fault(text):
            self.answer(Check((), said))
        else:
            self.answer(Check(()), f"wanted a result, got {said}")
        os._exit(0)


class Watched:
    """The kernels of a device, each call noted before it is made and waited for; stems to avoid go to the reference."""

    def __init__(self, module: Any, child: Child):
        self._module, self._child = module, child

    def __getattr__(self, name: str) -> Callable[..., Any]:
        stem = "head_metrics" if name == "head_measure" else name
        if stem in self._child.request["avoid"]:
            return _measured if name == "head_measure" else getattr(reference, name)  # type: ignore[no-any-return]
        return functools.partial(self._watch, stem, getattr(self._module, name))

    def _watch(self, stem: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self._child.note(stem)
        try:
            result = function(*arguments, **options)
            device.wait()
            return result
        except (RuntimeError, MemoryError) as error:  # what a kernel, torch or CUDA throws; never a refused argument
            self._child.end(error)


def _measured(head: Any, field: int, how: Any, with_coefficient: bool) -> tuple[Any, Any, None]:
    """The reference's head_measure."""
    values, _ = reference.head_metrics(head, 1 << field, True)
    if with_coefficient:
        return *reduction.reduce_with_log_coefficient(values[0], how), None
    return reduction.reduce(values[0], how), None, None


def main(folder: str) -> None:
    """Check the one device that is visible."""
    child = Child(Path(folder))
    sys.path[:] = child.request["path"]
    # should the parent be gone, nobody else ends a kernel that hangs
    faulthandler.dump_traceback_later(child.request["seconds"], exit=True)
    try:
        if device.count() != 1:
            child.answer(Check((), f"its process found {device.count()} devices, not one"))
            return
        if extensions.cuda_reason(0):
            child.answer(Check((), extensions.cuda_reason(0)))
            return
        if child.request["bytes"]:
            device.limit_memory(child.request["bytes"])
        device.wait()  # the context is there: what fails here fails before any kernel
    except (RuntimeError, AssertionError) as error:
        child.answer(Check((), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"))
        return
    child.note("")
    kernels.KERNELS["cuda"] = Watched(kernels.KERNELS["cuda"], child)
    battery = importlib.import_module("flatcore._check.battery")
    rows = tuple(battery.battery(torch.device("cuda", 0), full=child.request["full"]))
    # the battery makes a failure of whatever is raised between its calls too
    outside = next((row.failure for row in rows if row.failure and _is_no_fault(row.failure)), None)
    child.answer(Check(rows) if outside is None else Check((), outside))


if __name__ == "__main__":
    main(sys.argv[1])
