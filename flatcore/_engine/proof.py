"""Which CUDA kernels "auto" takes: those that have passed a check on the device at hand.

The check itself lies above the engine: ``checker`` is put here by ``flatcore.cuda``. Verdicts are module globals, those
of the process.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .._arguments.checks import warn_at_caller
from . import backend, device, extensions

CHOICES = ("0", "1", "force")
GUARD = "FLATCORE_CHECK_CHILD"
"""Set in the environment of a process that checks: there nothing is looked up and no further process is started."""
_BOTH = frozenset(("fused", "chunked"))
_ONE = frozenset("-")
_COMMAND = "python -m flatcore check --device cuda"
_SLOW = "Calls with CUDA tensors run on the PyTorch reference, with the same results but many times slower"
_log = logging.getLogger("flatcore")


def _check_choice(text: str) -> str:
    if text not in CHOICES:
        raise ValueError(f"FLATCORE_CUDA_CHECK must be one of {', '.join(CHOICES)}, got {text!r}")
    return text


choice: str = _check_choice(os.environ.get("FLATCORE_CUDA_CHECK", "") or "1")


def paths_of(stem: str) -> frozenset[str]:
    """The paths between which a stem chooses on a CUDA device; "-" where it has one."""
    return _BOTH if stem in ("head_metrics", "head_metrics_backward") else _ONE


class Verdict(NamedTuple):
    """What is known of a device's kernels: of each stem the paths that have passed and those that have failed."""

    state: str
    """"unchecked", "passed", "failed" or "could not check"."""
    reason: str | None
    rows: tuple[Any, ...]
    file: Path | None
    passed: dict[str, frozenset[str]]
    failed: dict[str, frozenset[str]]


_UNCHECKED = Verdict("unchecked", None, (), None, {}, {})

verdicts: dict[int, Verdict] = {}
"""By index of the device."""
epoch: str = ""
"""Changes with every verdict; a compiled graph is guarded by it, so that it is made again."""
checker: Callable[[int, bool], tuple[Any, Path | None] | None] | None = None
"""(device, may it be run) to a ``Check`` and the file that has it; None where none is known and it may not be run."""

_lock = threading.Lock()
_not_stored: set[int] = set()  # devices of which the cache has nothing
_said: set[tuple[int, str]] = set()
_explained: set[tuple[int, str]] = set()  # device and stem, of the verdict that is known


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # whoever held it is not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _of(rows: Iterable[Any], stem: str, path: str) -> list[Any]:
    """The rows that say something of a path: "-" stands for all."""
    return [row for row in rows if row.stem == stem and (row.path == path or "-" in (row.path, path))]


def verdict(check: Any, file: Path | None = None) -> Verdict:
    """What a check's rows mean, path by path: one failed row is enough, and a path without a row has not passed."""
    passed, failed = {}, {}
    for stem in backend.CUDA_STEMS:
        rows = {path: _of(check.rows, stem, path) for path in paths_of(stem)}
        failed[stem] = frozenset(path for path, found in rows.items() if any(row.failure for row in found))
        passed[stem] = frozenset(path for path, found in rows.items() if any(row.cases for row in found)) - failed[stem]
    state = "failed" if any(failed.values()) else "could not check" if check.reason is not None else "passed"
    return Verdict(state, check.reason, tuple(check.rows), file, passed, failed)


def adopt(index: int, check: Any, file: Path | None = None) -> Verdict:
    """Make a check the verdict on a device, from now on and in graphs that are compiled."""
    global epoch
    found = verdict(check, file)
    verdicts[index] = found
    _explained.difference_update([(index, stem) for stem in backend.CUDA_STEMS])
    epoch = ", ".join(f"cuda:{i} {known.state} {_listed(known.passed)}" for i, known in sorted(verdicts.items()))
    if any(found.passed.values()):
        cases = sum(row.cases for row in found.rows)
        _log.info(
            "cuda:%d: a check of %d cases%s lets its kernels be taken: %s", index, cases,
            f" ({file})" if file else "", _listed(found.passed),
        )  # fmt: skip
    return found


def _listed(paths: dict[str, frozenset[str]]) -> str:
    return ", ".join(f"{stem} {'/'.join(sorted(some))}" for stem, some in sorted(paths.items()) if some)


def usable(index: int, stem: str) -> frozenset[str]:
    """The paths of this stem that may run on this device now; the first call finds out.

    Raises:
        RuntimeError: under ``"native"``, where every path is known to have failed.
    """
    known = find(index)
    every = paths_of(stem)
    if backend.selected == "native":
        left = every - known.failed.get(stem, frozenset())
        return left if left else _raise(index, known, stem, every)
    passed = known.passed.get(stem, frozenset())
    if passed != every:
        _explain(index, known, stem)
    return passed


def among(index: int, stem: str) -> frozenset[str]:
    """The same of what is known already, all if nothing is: nothing is looked up, said or raised."""
    known, every = verdicts.get(index), paths_of(stem)
    if known is None:
        return every
    if backend.selected == "native":
        return every - known.failed.get(stem, frozenset())
    return known.passed.get(stem, frozenset())


def refuse(index: int, stem: str, path: str) -> None:
    """Refuse the one path that could take a head under ``"native"``.

    Raises:
        RuntimeError: always.
    """
    _raise(index, verdicts[index], stem, {path})


def _raise(index: int, known: Verdict, stem: str, paths: Iterable[str]) -> Any:
    failures = [row.failure for path in paths for row in _of(known.rows, stem, path) if row.failure]
    raise RuntimeError(
        f"backend 'native': the kernels of {stem} failed their check on cuda:{index}: {failures[0]}; use "
        "flatcore.backend('auto'), which does without them"
    )


def find(index: int, make: bool = True) -> Verdict:
    """The verdict: known, or in the cache, or made now unless ``make`` is False or this is no time for it."""
    if index in verdicts:
        return verdicts[index]
    if choice == "0" or checker is None or GUARD in os.environ:
        return _UNCHECKED
    # a graph's kernels are recorded, not run: no time to wait for a process; "native" does not ask for a proof
    may_run = make and backend.selected == "auto" and not device.is_tracing() and not device.is_capturing(index)
    if not may_run and index in _not_stored:
        return _UNCHECKED
    if not _lock.acquire(blocking=may_run):
        return _UNCHECKED
    try:
        if index in verdicts:  # by a thread that was first
            return verdicts[index]
        found = checker(index, may_run)
        if found is None:
            _not_stored.add(index)
            return _UNCHECKED
        return adopt(index, *found)
    finally:
        _lock.release()


def say(index: int, why: str, remedy: str) -> None:
    """Warn that a device's tensors go to the reference: once for a device and reason."""
    if (index, why) not in _said:
        _said.add((index, why))
        named = why if why.startswith("flatcore ") else f"flatcore: {why}"
        warn_at_caller(f"{named}. {_SLOW}. {remedy}", RuntimeWarning)


def explain_absence(index: int) -> None:
    """Say why this build has no kernels for the device."""
    if (index, "") in _explained:
        return
    _explained.add((index, ""))
    reason = extensions.cuda_reason(index)
    # these two say enough by themselves; the others are of this device
    alone = not extensions.is_cuda_built() or "NVIDIA driver" in reason
    say(index, reason if alone else f"no kernel can run on cuda:{index}: {reason}", extensions.cuda_remedy(reason))


def _explain(index: int, known: Verdict, stem: str) -> None:
    """Say why "auto" takes not all of a stem's kernels."""
    if (index, stem) in _explained:
        return
    if known.state != "unchecked":  # why it is unchecked may change
        _explained.add((index, stem))
    here = f"cuda:{index}"
    if known.state == "failed":
        failures = "; ".join(f"{row.stem} ({row.path}): {row.failure}" for row in known.rows if row.failure)
        say(index, f"kernels failed their check on {here}, and only these are not taken: {failures}",
            f"Please report it, with what {_COMMAND} prints")  # fmt: skip
        if known.failed.get(stem) or known.passed.get(stem) == paths_of(stem):
            return
    if known.reason is not None:
        say(index, f"the kernels could not be checked on {here}: {known.reason}",
            f"To try again, and see: {_COMMAND}")  # fmt: skip
    elif known.state == "unchecked" and choice == "0":
        say(index, f"the kernels are unchecked on {here}, and FLATCORE_CUDA_CHECK=0 keeps them so",
            f"To check them: unset it, or {_COMMAND}; flatcore.backend('native') takes them unchecked")  # fmt: skip
    elif known.state == "unchecked" and (device.is_tracing() or device.is_capturing(index)):
        say(index, f"the kernels are unchecked on {here}, and a check cannot begin while a graph is captured or traced",
            f"Before that call flatcore.check('{here}') or any function of flatcore, or once: {_COMMAND}")  # fmt: skip
    elif known.state != "unchecked":
        say(index, f"the check has no case of {stem} on {here}", f"To see what it has: {_COMMAND}")


def describe(index: int) -> dict[str, Any]:
    """What is known of a device's kernels: state, reason, file, and each stem's paths with what came of them."""
    # to ask a device that sleeps for its model would wake it, and take 0.3 s and some 500 MB of its memory
    known = find(index, make=False) if device.is_awake() else verdicts.get(index, _UNCHECKED)
    stems: dict[str, dict[str, str]] = {}
    for stem in backend.CUDA_STEMS:
        stems[stem] = {}
        for path in sorted(paths_of(stem)):
            failures = [row.failure for row in _of(known.rows, stem, path) if row.failure]
            said = "passed" if path in known.passed.get(stem, ()) else "unchecked"
            stems[stem][path] = f"failed: {failures[0]}" if failures else said
    return {"state": known.state, "reason": known.reason, "stems": stems, "file": known.file and str(known.file)}
