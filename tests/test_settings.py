"""What tests/settings.py tells of a test that changes the process for those after it, and puts back."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import settings
import torch

import flatcore
from flatcore._engine import paths, proof

CHANGES: dict[str, Callable[[], object]] = {
    "flatcore.backend": lambda: flatcore.backend("reference"),
    "FLATCORE_CUDA_CHECK": lambda: setattr(proof, "choice", "0"),
    "the forced path": lambda: setattr(paths, "forced_path", "chunked"),
    "environment variables": lambda: os.environ.update(FLATCORE_CACHE="elsewhere"),
    "torch's threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's default device": lambda: torch.set_default_device("meta"),
    "torch's grad mode": lambda: torch.set_grad_enabled(False),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "float32 products": lambda: torch.set_float32_matmul_precision("medium"),
}
if hasattr(torch._C, "_set_fp32_precision_setter"):
    CHANGES["precision of mkldnn.conv"] = lambda: torch._C._set_fp32_precision_setter("mkldnn", "conv", "bf16")


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_left_changed_is_named_and_put_back(name: str) -> None:
    before = settings.read()
    CHANGES[name]()
    changed = settings.put_back(before)
    assert changed and all(line.startswith(name) for line in changed)
    assert settings.read() == before and settings.put_back(before) == []


def test_threads_that_force_a_setting_of_their_own_are_found() -> None:
    """What tests of precision did: each thread puts back what it found, and the last one had found another's."""
    first_is_in, second_is_in, first_is_out = Event(), Event(), Event()

    def first() -> None:
        with flatcore.backend("native"):
            first_is_in.set()
            second_is_in.wait(60)
        first_is_out.set()

    def second() -> None:
        first_is_in.wait(60)
        with flatcore.backend("native"):
            second_is_in.set()
            first_is_out.wait(60)

    before = settings.read()
    with ThreadPoolExecutor(2) as pool:
        for work in [pool.submit(first), pool.submit(second)]:
            work.result()
    assert settings.put_back(before) == ["flatcore.backend: 'auto' before, 'native' after"]
