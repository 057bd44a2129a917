"""Experiments on the robustness of a network: attacks and their paths, scaled heads, bounds, detection."""

from ._attack import pgd
from ._attack_path import Aligned, AttackPath, attack_path
from ._bounds import lipschitz_lower_estimate, loss_change_bound, loss_change_radius, margin_radius
from ._detector import Detection, perturbation_detector
from ._scaling import Quantiles, ScalingResult, TransferResult, plot_scaling, scaled_head, scaling_sweep, transfer

__all__ = [
    "Aligned",
    "AttackPath",
    "Detection",
    "Quantiles",
    "ScalingResult",
    "TransferResult",
    "attack_path",
    "lipschitz_lower_estimate",
    "loss_change_bound",
    "loss_change_radius",
    "margin_radius",
    "perturbation_detector",
    "pgd",
    "plot_scaling",
    "scaled_head",
    "scaling_sweep",
    "transfer",
]
