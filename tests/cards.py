"""A CUDA device where none is.

What flatcore asks of torch and the driver is answered here, and CPU tensors count as lying on it; its kernels are those of
tests/emulation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flatcore._check import cache, process
from flatcore._check.record import Check, Row
from flatcore._engine import backend, device, extensions, proof
from flatcore._engine import cuda as native_cuda

STEMS = backend.CUDA_STEMS
ALL = (
    *((stem, path) for stem in STEMS[:2] for path in ("fused", "chunked")), *((stem, "-") for stem in STEMS[2:]),
)  # fmt: skip
"""Every stem and path of the CUDA kernels."""
NAME, CAPABILITY = "Card 9000", (9, 0)
MODULE = SimpleNamespace(CUDA_FUSED_CLASSES=32, cuda_device=lambda index: (90, True, ""))
"""The compiled module, as far as it says what the device can run."""


def plug_in(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Put the device in torch's and the driver's place; ``put`` is a monkeypatch's, for as long as it lasts."""
    answers = {
        "place": lambda x: ("cuda", 0), "count": lambda: 1, "current": lambda: 0, "is_awake": lambda: True,
        "name": lambda index: NAME, "capability": lambda index: CAPABILITY, "driver": lambda: "570.1 13000",
        "visible_name": lambda index: f"GPU-{index}", "cublas": lambda: "13.0.1", "is_capturing": lambda index: False,
        "is_tracing": lambda: False, "is_shared": lambda: False, "wait": lambda: None, "limit_memory": lambda size: None,
    }  # fmt: skip
    for name, answer in answers.items():
        put(device, name, answer)
    put(extensions, "is_cuda_built", lambda: True)
    put(extensions, "cuda_runtime", lambda: (13000, 13000, 1, ""))
    put(extensions, "cuda_architectures", lambda: "90")
    put(extensions, "cuda_module", lambda: MODULE)
    put(extensions, "_usable", set())
    put(native_cuda, "_loaded", {0})


def rows(**failed: str) -> tuple[Row, ...]:
    """A check's rows, all passed but those named, as ``head_metrics_fused="case ..."`` or by a stem for its one path."""
    found = []
    for stem, path in ALL:
        failure = failed.get(f"{stem}_{path}", failed.get(stem))
        found.append(Row("cuda:0", stem, path, 20, 3.5 if failure else 0.25, failure))
    return tuple(found)


class Card:
    """The device of a test: what its check finds, and how often it was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.check, self.runs, self._put = Check(rows()), 0, monkeypatch.setattr
        plug_in(self._put)
        self._put(process, "run", self._run)
        self.forget()

    def _run(self, index: int, *, full: bool = False) -> Check:
        self.runs += 1
        return self.check

    def forget(self) -> None:
        """As in a new process."""
        state: dict[str, Any] = {
            "verdicts": {}, "epoch": "", "_not_stored": set(), "_said": set(), "_explained": set(),
        }  # fmt: skip
        for name, value in state.items():
            self._put(proof, name, value)
        self._put(proof, "choice", "1")
        self._put(cache, "_complained", False)

    def answers(self, **answers: Any) -> None:
        """Other answers to some of the questions, for the rest of the test."""
        for name, answer in answers.items():
            self._put(device, name, answer)


@contextmanager
def plugged_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Card]:
    """A device whose verdicts lie in a folder of the test's own."""
    monkeypatch.setenv("FLATCORE_CACHE", str(folder))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    yield Card(monkeypatch)
