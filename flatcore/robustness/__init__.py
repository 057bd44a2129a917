"""Experiments on the robustness of a network: attacks and their paths, scaled heads, bounds, detection."""

from ._attack import pgd

__all__ = ["pgd"]
