"""The formulas in plain PyTorch: what flatcore computes, written to be read, and what runs where nothing was compiled.

Imports torch and nothing else of flatcore.
"""

from .head_metrics import FIELDS, head_metrics
from .row_norms import row_norms
from .unmasked_cross_entropy import soft_cross_entropy_cotangent, unmasked_cross_entropy

__all__ = ["FIELDS", "head_metrics", "row_norms", "soft_cross_entropy_cotangent", "unmasked_cross_entropy"]
