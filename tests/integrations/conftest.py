"""Libraries of the extra ``integrations`` as fixtures: imported by the test that asks, skipped or failed where absent."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

LIBRARIES = (
    "accelerate", "array_api_strict", "foolbox", "jax", "ml_dtypes", "peft", "pytorch_lightning", "sklearn", "torch_ema",
    "torchao", "torchmetrics", "transformers",
)  # fmt: skip
ABSENT = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with one reason for all tests, or fail, where a library is absent that the test asks for."""
    if set(ABSENT).intersection(getattr(item, "fixturenames", ())):
        message = f"{', '.join(ABSENT)} not installed: pip install -c constraints.txt '.[integrations]'"
        if item.config.getoption("--require-integrations"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)


def _fixture(name: str) -> object:
    @pytest.fixture(scope="session", name=name)
    def library() -> ModuleType:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a library says about itself while it is imported
            return importlib.import_module(name)

    return library


for _name in LIBRARIES:
    globals()[_name] = _fixture(_name)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_state_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What accelerate, and Trainer through it, keep for the whole process: singletons and variables."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
