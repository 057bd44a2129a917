"""A device's verdict: from the cache, or from a process that makes it; for the engine, and for the ranks of a group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import distributed

from .._engine import cuda, device, proof
from . import cache, process
from .record import Check


def first_use(index: int, may_run: bool) -> tuple[Check, Path | None] | None:
    """What is known of a device, found out where nothing is and it may be run; for :data:`proof.checker`."""
    force = proof.choice == "force"
    try:
        key = cache.key(index)
        if not may_run:
            known = None if force else cache.load(key)
            return None if known is None else (process.named(known, index), cache.file_of(key))
        return _made(index, key, full=False, fresh=force)
    except Exception as error:  # whatever it is, the user asked for a number, which the reference has
        return (Check((), f"{type(error).__name__}: {error}"), None) if may_run else None


def prove(index: int, *, full: bool = False) -> Check:
    """Check a device now, whatever is known of it, keep the result and let the engine go by it."""
    check, file = _made(index, cache.key(index), full, fresh=True)
    if any(proof.adopt(index, check, file).passed.values()):
        cuda.load(index)  # a graph's capture may be what comes next
    return check


def _made(index: int, key: dict[str, str], full: bool, fresh: bool) -> tuple[Check, Path | None]:
    patience = 2 * process.longest(index, full)
    check = cache.shared(key, lambda: process.run(index, full=full), patience, fresh)
    stored = cache.load(key)
    kept = stored is not None and stored.to_json() == check.to_json()
    return process.named(check, index), cache.file_of(key) if kept else None


def agree(group: Any = None) -> None:
    """Let every rank of a group take the worst verdict that one of them has; for :func:`flatcore.cuda.agree`."""
    index = device.current()
    known = proof.find(index)
    mine = Check(known.rows, known.reason if known.state != "unchecked" else "a rank has not checked its device")
    every: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(every, mine.to_json(), group)
    proof.adopt(index, process.named(worst([Check.from_json(text) for text in every]), index), known.file)


def worst(checks: Sequence[Check]) -> Check:
    """Of several devices' checks one that holds for all: what failed on one has failed, what one lacks is unchecked."""
    shared = set.intersection(*({(row.stem, row.path) for row in check.rows} for check in checks))
    rows = {
        (row.stem, row.path, row.failure): row
        for check in checks
        for row in check.rows
        if row.failure or (row.stem, row.path) in shared
    }
    return Check(tuple(rows.values()), next((check.reason for check in checks if check.reason is not None), None))
