"""Cross-entropy whose backward gives every sample a unit-scale cotangent: the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._arguments.arrays import as_tensor, on_the_arrays_stream, returner
from ._arguments.checks import (
    INTEGERS,
    as_labels,
    check_device,
    check_floating,
    check_integer,
    check_option,
    check_tensor,
    one_output,
    warn,
)
from ._engine import ops

_REDUCTIONS = ("sum", "mean", "none")


@on_the_arrays_stream
def unmasked_cross_entropy(logits: Any, target: Any, *, reduction: str = "sum", ignore_index: int = -100) -> Any:
    r"""Cross-entropy for attacks and saliency: its backward follows the exact gradient's direction at every confidence.

    The value is the cross-entropy :math:`\ell_n = -\log p_{y_n}`, p the softmax of the logits. Its true gradient is
    :math:`\partial\ell_n/\partial z_n = (1 - p_{y_n})(q_n - e_{y_n})`, with q the softmax over the classes other than y;
    the factor (1 - p_y) is what vanishes with confidence. Backward leaves it out: it gives each sample the **unit-scale
    cotangent** :math:`q_n - e_{y_n}` (its L2 norm is in [1, sqrt 2]) times the upstream gradient, which under ``"mean"``
    is divided by the number of valid rows. Back-propagated to an input it is the exact direction of the unchanged loss,
    so sign and normalised steps (PGD, FGSM) are exact where the usual gradient is wrong (float32: from a logit gap of 17
    on) or 0 (from 104 on).

    What it is not: its gradient's *magnitude* is not the loss's (it is that of the log-odds log((1 - p_y)/p_y), a rising
    function of the loss). Confident and uncertain samples count alike, so it is no loss to train with, and a step that
    uses the size of the gradient needs :func:`flatcore.input_gradients`, which gives log(1 - p_y) beside the direction.

    Args:
        logits: (..., C), C >= 1; float16, bfloat16, float32 or float64. The classes are the **last** dimension: the same
            as ``torch.nn.functional.cross_entropy`` for (N, C) and (C,); move the classes of (N, C, H, W) to the end. A
            logit of -inf is an absent class.
        target: (...), integer labels 0..C-1 or ``ignore_index``, on the logits' device.
        reduction: ``"sum"`` (the default: each sample's gradient is then its own, whatever the batch), ``"mean"`` over
            the valid rows, or ``"none"``.
        ignore_index: the label of rows that count 0: loss 0, gradient exactly 0, also where the row holds NaN.

    Returns:
        A scalar for ``"sum"`` and ``"mean"``, shape (...) for ``"none"``: float32, float64 if the logits are. float16 and
        bfloat16 logits give a float32 value, as cross_entropy does under autocast; their gradient is in their own dtype,
        formed in float32 and rounded once. Nothing valid: ``"mean"`` is NaN, its gradient 0.

    Raises:
        TypeError: no array; a dtype other than those above; a floating ``target`` (soft targets do not vanish: take
            ``torch.nn.functional.cross_entropy``, or :func:`flatcore.input_gradients`); a quantized, nested or DTensor one.
        ValueError: shapes or devices that do not fit, C = 0, an unknown ``reduction``, a label that is no class (on a
            device other than the CPU: NaN in that row, an error with ``FLATCORE_VALIDATE=1``), a forward-mode tangent.
        RuntimeError: differentiating twice.

    Warns:
        UserWarning: one class (C = 1): loss and gradient are 0 whatever the logits, and it is nearly always a sigmoid's.

    Numerics: neither 1 - p nor exp of a large number is formed, so loss and cotangent are right to a few roundings at any
    gap. Rows with NaN, +inf, or without any class give NaN in that row only. A label on an absent class has loss +inf and
    the finite cotangent q - e_y; a label that is the only class there is has loss 0 and gradient 0. One read of the
    logits; (N, C) in memory besides, only where a gradient is needed.

    Source: docs/mathematics.md, "Input gradients". That underflow of the usual gradient overstates robustness is known: Lee
    et al. 2020; MIFPE; arXiv 2507.22428. This is an exact way around it and claims no more.

    Example:
        >>> import torch, flatcore
        >>> z = torch.tensor([[300.0, 0.0, -1.0]], requires_grad=True)
        >>> torch.nn.functional.cross_entropy(z, torch.tensor([0])).backward()
        >>> z.grad.tolist()
        [[0.0, 0.0, 0.0]]
        >>> z.grad = None
        >>> flatcore.unmasked_cross_entropy(z, torch.tensor([0])).backward()
        >>> [round(g, 4) for g in z.grad[0].tolist()]
        [-1.0, 0.7311, 0.2689]
    """
    check_option(reduction, "reduction", _REDUCTIONS)
    z = as_tensor(logits, "logits")
    check_tensor(z, "logits")
    check_floating(z, "logits")
    if z.dim() == 0 or z.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., C) with at least one class, got {tuple(z.shape)}")
    if z.shape[-1] == 1:
        warn(one_output("logits", "logits=torch.cat([torch.zeros_like(z), z], dim=-1)"))
    ignore_index = check_integer(ignore_index, "ignore_index")
    y = integer_labels(as_tensor(target, "target"), z, ignore_index)
    loss, _, _ = ops.unmasked_cross_entropy(
        z.reshape(-1, z.shape[-1]), y.reshape(-1), ignore_index, with_cotangent=False
    )
    # by selection in backward too: an upstream of NaN or inf stays out of ignored rows
    valid = y != ignore_index
    loss = torch.where(valid, loss.reshape(y.shape), 0)
    if reduction != "none":
        loss = loss.sum() if reduction == "sum" else loss.sum() / valid.sum()
    return returner(logits)(loss)


def integer_labels(target: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """Labels as int64, required to be integers of the logits' leading shape on their device.

    Whether each is a class is looked at where the classes are counted: ``kernels.refuse_bad_labels`` and the kernels.
    """
    check_tensor(target, "target")
    if target.dtype not in INTEGERS:
        raise TypeError(f"target must hold integer class labels, got {target.dtype}: soft targets do not vanish with "
                        "confidence; take torch.nn.functional.cross_entropy or flatcore.input_gradients")  # fmt: skip
    check_device(target, "target", logits, "logits")
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target must have the logits' leading shape {tuple(logits.shape[:-1])} (the classes are the last "
            f"dimension of logits {tuple(logits.shape)}), got {tuple(target.shape)}"
        )
    return as_labels(target, ignore_index)
