"""Exact flatness metrics of a network's last layer, right at every confidence."""

from pkgutil import extend_path

# In a source tree the compiled extension lies in the installed package: let both be one package.
__path__ = extend_path(__path__, __name__)

import importlib
from types import ModuleType

from . import cuda
from ._check.check import check
from ._config import __version__, show_config
from ._engine.backend import backend
from ._head_metrics import (
    HeadMetrics,
    feature_gradient_norms,
    head_metrics,
    hessian_trace,
    relative_flatness,
)
from ._input_gradients import InputGradients, input_gradient_norms, input_gradients
from ._probe.probe import Probe
from ._report.distribution import Statistics
from ._report.evaluate import evaluate
from ._report.report import Report
from ._report.tally import Group
from ._row_norms import row_norms
from ._unmasked_cross_entropy import unmasked_cross_entropy


def __getattr__(name: str) -> ModuleType:
    if name in ("metrics", "robustness"):  # loaded when asked for: metrics needs an extra
        return importlib.import_module(f"flatcore.{name}")
    raise AttributeError(f"module 'flatcore' has no attribute {name!r}")


__all__ = [
    "Group",
    "HeadMetrics",
    "InputGradients",
    "Probe",
    "Report",
    "Statistics",
    "__version__",
    "backend",
    "check",
    "cuda",
    "evaluate",
    "feature_gradient_norms",
    "head_metrics",
    "hessian_trace",
    "input_gradient_norms",
    "input_gradients",
    "relative_flatness",
    "row_norms",
    "show_config",
    "unmasked_cross_entropy",
]
