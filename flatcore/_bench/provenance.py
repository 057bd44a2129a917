"""Where figures come from: machine, versions, commit; and the refusal to time what must not be timed."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import flatcore

ROOT = Path(__file__).resolve().parents[2]


class UnfitBuildError(RuntimeError):
    """There is nothing here that should be timed."""


def require_release_build() -> None:
    """Refuse to time a build that users do not run.

    Raises:
        UnfitBuildError: no compiled extension; or one with debug information or a sanitizer in it.
    """
    extension = flatcore.show_config()["extension"]
    if extension is None:
        raise UnfitBuildError("flatcore was installed without its compiled extension, so there is nothing of it to time: "
                              "install it with a compiler, or measure the others alone with --no-native")  # fmt: skip
    binary = Path(extension).read_bytes()
    for mark, what in ((b".debug_info", "debug information"), (b"__debug_info", "debug information"),
                       (b"__asan_init", "a sanitizer"), (b"__tsan_init", "a sanitizer")):  # fmt: skip
        if mark in binary:
            raise UnfitBuildError(
                f"{extension} was built with {what}, and only a Release build is timed: install flatcore without it"
            )


def is_stale() -> bool:
    """Whether a C++ source of this checkout is younger than the extension that would be timed."""
    extension = flatcore.show_config()["extension"]
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu")]
    return extension is not None and any(p.stat().st_mtime > Path(extension).stat().st_mtime for p in sources)


def _git(*arguments: str) -> str | None:
    if not (ROOT / "csrc").is_dir():  # an installed package: a repository around it is another's
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpuinfo(field: str) -> str | None:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith(field):
            return line.partition(":")[2].strip()
    return None


def _cuda_device() -> dict[str, Any]:
    config = flatcore.cuda.show_config()
    return {
        "device": torch.cuda.get_device_name(), "driver_serves": config["driver"], "runtime": config["runtime"],
        "architectures": config["architectures"], "torch_cuda": torch.version.cuda,
    }  # fmt: skip


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Everything that a reader needs to judge the figures; None where the system does not say."""
    config = flatcore.show_config()
    changes = _git("status", "--porcelain", "--untracked-files=all", "--", ":/", ":!bench/results")
    return {
        **(_cuda_device() if device == "cuda" else {"device": device}),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cpu_family_model": f"{_cpuinfo('cpu family')}/{_cpuinfo('model')}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set_torch": torch.backends.cpu.get_cpu_capability(),
        "instruction_set_flatcore": config["cpu_target"],
        "clock_mhz": _cpuinfo("cpu MHz"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "last_level_cache": _read("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flatcore": config["version"],
        "compiler": config["compiler"],
        "extension_stale": is_stale(),
        "commit": _git("rev-parse", "HEAD"),
        "tree": None if changes is None else ("dirty" if changes else "clean"),
    }
