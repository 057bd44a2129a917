"""Libraries of the extra ``integrations`` as fixtures: imported by the test that asks, skipped or failed where absent."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

import pytest
import torch

LIBRARIES = (
    "accelerate", "array_api_strict", "foolbox", "jax", "ml_dtypes", "peft", "pytorch_lightning", "sklearn", "torch_ema",
    "torchao", "torchmetrics", "transformers",
)  # fmt: skip


def _fixture(name: str) -> object:
    @pytest.fixture(scope="session", name=name)
    def library(request: pytest.FixtureRequest) -> ModuleType:
        if importlib.util.find_spec(name) is None:
            message = f"{name} is not installed: pip install -c constraints.txt '.[integrations]'"
            (pytest.fail if request.config.getoption("--require-integrations") else pytest.skip)(message)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a library says about itself while it is imported
            return importlib.import_module(name)

    return library


for _name in LIBRARIES:
    globals()[_name] = _fixture(_name)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
