"""The formulas in plain PyTorch: what flatcore computes, written to be read, and what runs where nothing was compiled.

Imports torch and nothing else of flatcore.
"""

from .arithmetic import arithmetic, arithmetic_in, widest
from .head_metrics import FIELDS, head_metrics
from .head_metrics_backward import DIFFERENTIABLE, head_metrics_backward
from .row_norms import row_norms
from .unmasked_cross_entropy import soft_cross_entropy_cotangent, unmasked_cross_entropy

__all__ = [
    "DIFFERENTIABLE",
    "FIELDS",
    "arithmetic",
    "arithmetic_in",
    "head_metrics",
    "head_metrics_backward",
    "row_norms",
    "soft_cross_entropy_cotangent",
    "unmasked_cross_entropy",
    "widest",
]
