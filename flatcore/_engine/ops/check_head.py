"""Arguments that did not pass a public function, held to the same sizes and types: kernels get addresses."""

from __future__ import annotations

import torch

from ..._arguments.checks import check_device, check_matrix
from ..head import Head


def check_head(head: Head) -> None:
    """Refuse a head that the kernels could not read."""
    check_matrix(head.features, "features", (None, None))
    check_matrix(head.linear_weight, "linear_weight", (None, head.D))
    if head.C == 0:
        raise ValueError("linear_weight must have at least one row (C >= 1), got C = 0")
    if head.linear_bias is not None:
        check_matrix(head.linear_bias, "linear_bias", (head.C,))
    if head.logits is not None:
        check_matrix(head.logits, "logits", (head.N, head.C))
    if head.target is not None:
        check_matrix(head.target, "target", (head.N,), (torch.int64,))
    for name in ("linear_weight", "linear_bias", "logits", "target"):
        if (x := getattr(head, name)) is not None:
            check_device(x, name, head.features, "features")
    if head.include_bias and head.linear_bias is None:
        raise ValueError("include_bias=True needs linear_bias, got linear_bias=None")
    if head.norm_power not in (1, 2):
        raise ValueError(f"norm_power must be 1 or 2, got {head.norm_power}")
