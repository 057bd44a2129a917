"""Where a verdict lies from one process to the next: a file for each build, device model and library that it depends on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from .._engine import device
from .record import Check

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_POLL_SECONDS = 0.1
_log = logging.getLogger("flatcore")
_complained = False


def folder() -> Path:
    """``FLATCORE_CACHE``, or ``flatcore`` in the user's cache folder."""
    if named := os.environ.get("FLATCORE_CACHE"):
        return Path(named).absolute()
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "flatcore" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "flatcore"


@functools.cache
def package_hash() -> str:
    """Hash of all that decides a result: the package's Python files, its golden answers and its compiled modules."""
    package = Path(__file__).parents[1]
    files = {
        str(path.relative_to(package)): path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so", ".pyd")
    }
    for name in ("flatcore._core", "flatcore._cuda"):  # they may lie elsewhere than the sources
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            files[name] = Path(found.origin)
    total = hashlib.blake2b()
    for name, path in sorted(files.items()):
        total.update(f"{name}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def key(index: int) -> dict[str, str]:
    """What a verdict on a device depends on."""
    major, minor = device.capability(index)
    return {
        "package": package_hash(),
        "device": device.name(index),
        "capability": f"{major}.{minor}",
        "driver": device.driver(),
        "torch": torch.__version__,
        "cublas": device.cublas(),
        "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE", ""),
    }


def file_of(key: dict[str, str]) -> Path:
    """The file that has, or would have, the verdict."""
    return folder() / f"check-{hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()}.json"


def _read(text: str, key: dict[str, str]) -> tuple[Check, float] | None:
    """A stored check and when it was made; None for any other text."""
    try:
        found = json.loads(text)
        if found["key"] != key:
            return None
        return Check.from_json(json.dumps(found["check"])), float(found["time"])
    except (ValueError, KeyError, TypeError):
        return None


def _text(key: dict[str, str], check: Check) -> str:
    return json.dumps({"key": key, "time": time.time(), "check": json.loads(check.to_json())}, indent=1)


def load(key: dict[str, str], since: float = 0.0) -> Check | None:
    """The check that is stored, if it was made after ``since``."""
    try:
        found = _read(file_of(key).read_text(), key)
    except (OSError, ValueError, RuntimeError):
        return None
    return found[0] if found is not None and found[1] >= since else None


def store(key: dict[str, str], check: Check) -> Path | None:
    """Write it whole or not at all; None, and one line in the log, where that cannot be."""
    global _complained
    try:
        target = file_of(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.stem}-", delete=False) as part:
            part.write(_text(key, check))
        try:
            Path(part.name).replace(target)
        except OSError:
            Path(part.name).unlink()
            raise
        return target
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        if not _complained:
            _complained = True
            _log.warning(
                "the verdict on this GPU is kept for this process only, so that the next one checks again: %s "
                "(FLATCORE_CACHE names another folder)", error,
            )  # fmt: skip
        return None


@contextlib.contextmanager
def _locked(key: dict[str, str], patience: float) -> Iterator[IO[str] | None]:
    """Hold the key's lock; None where there can be none. A holder that dies lets go of it.

    It belongs to the process, so that a child that is forked meanwhile does not keep it.

    Raises:
        TimeoutError: another process has held it for ``patience`` seconds.
    """
    with contextlib.ExitStack() as stack:
        held: IO[str] | None = None
        try:
            target = file_of(key).with_suffix(".lock")
            target.parent.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(target.open("a+"))
            _wait_for(held, target, patience)
            if fcntl is not None:
                stack.callback(fcntl.lockf, held, fcntl.LOCK_UN)
        except TimeoutError:
            raise
        except (OSError, RuntimeError):
            held = None
        yield held


def _wait_for(held: IO[str], name: Path, patience: float) -> None:
    end = time.monotonic() + patience
    while fcntl is not None:
        try:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError) as error:  # how systems say that another one has it
            if time.monotonic() > end:
                raise TimeoutError(f"another process has held {name} for {patience:.0f} s") from error
        time.sleep(_POLL_SECONDS)


def shared(key: dict[str, str], run: Callable[[], Check], patience: float, fresh: bool = False) -> Check:
    """The stored check, or what ``run`` gives: one process of a machine runs it, the others wait and take its result.

    ``fresh``: only a check that was made after this call began. One that could not be made is not kept, but those who
    waited for it take it too: as many waits as processes would be the other way.
    """
    began = time.time()
    if not fresh and (found := load(key)) is not None:
        return found
    try:
        with _locked(key, patience) as held:
            found = load(key, began if fresh else 0.0) or _left_behind(held, key, began)
            if found is not None:
                return found
            check = run()
            if check.reason is None:
                store(key, check)
            elif held is not None:
                held.truncate(0)
                held.write(_text(key, check))
                held.flush()
            return check
    except TimeoutError as error:
        return Check((), str(error))


def _left_behind(held: IO[str] | None, key: dict[str, str], since: float) -> Check | None:
    """Why the process that held the lock could not check, if it tried while this one waited."""
    if held is None:
        return None
    held.seek(0)
    found: Any = _read(held.read(), key)
    return found[0] if found is not None and found[1] >= since else None
