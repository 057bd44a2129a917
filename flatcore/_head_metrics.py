"""Curvature and gradient statistics of a softmax head: the public functions."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ._arguments.arrays import as_tensor, on_the_arrays_stream, returner
from ._arguments.checks import check_flag, check_no_grad, check_norm, check_option
from ._arguments.head import Inputs, check_measure, checked_class_weight, checked_inputs
from ._engine import ops
from ._engine.head import INPUTS
from ._engine.reduction import Reduction
from .reference import FIELDS

_LABEL_FREE = ("confidence", "margin", "log_one_minus_confidence", "log_feature_norm", "log_hessian_trace",
               "log_layerwise", "log_neuronwise")  # fmt: skip
_LABELLED = ("loss", "log_feature_gradient_norm")
GRADIENT_NORMS = {
    1.0: "log_feature_gradient_norm_1",
    2.0: "log_feature_gradient_norm",
    math.inf: "log_feature_gradient_norm_inf",
}
_FIELD = {name: field for field, name in enumerate(FIELDS)}
_REDUCTIONS = ("mean", "sum", "none")


class HeadMetrics(NamedTuple):
    """Per-sample statistics of a softmax head, unweighted, each of the features' leading shape.

    ``prediction`` (int64, -1 where the row is NaN), ``confidence`` p_m, ``margin`` (top logit less the second, over the
    temperature), ``log_one_minus_confidence`` log(1 - p_m), ``log_feature_norm`` log ||phi||, ``log_hessian_trace``,
    ``log_layerwise`` and ``log_neuronwise`` (natural logs, computed for ignored rows too), ``loss`` (cross-entropy) and
    ``log_feature_gradient_norm`` (L2), both None without a target; 0 and -inf in ignored rows.

    Example:
        >>> import torch, flatcore
        >>> metrics = flatcore.head_metrics(torch.tensor([[2.0, 1.0]]), torch.tensor([[9.0, 9.0], [-9.0, -9.0]]))
        >>> f"{metrics.margin.item():.0f} {metrics.log_one_minus_confidence.item():.0f} {metrics.loss}"
        '54 -54 None'
    """

    prediction: Any
    confidence: Any
    margin: Any
    log_one_minus_confidence: Any
    log_feature_norm: Any
    log_hessian_trace: Any
    log_layerwise: Any
    log_neuronwise: Any
    loss: Any
    log_feature_gradient_norm: Any

    @property
    def feature_norm(self) -> Any:
        """||phi||, not squared."""
        return _exp(self.log_feature_norm)

    @property
    def hessian_trace(self) -> Any:
        """Tr H of each sample."""
        return _exp(self.log_hessian_trace)

    @property
    def layerwise(self) -> Any:
        """||W||_F^2 Tr H of each sample."""
        return _exp(self.log_layerwise)

    @property
    def neuronwise(self) -> Any:
        """||phi||^2 Var_p(w) of each sample."""
        return _exp(self.log_neuronwise)

    @property
    def feature_gradient_norm(self) -> Any:
        """L2 norm of the loss's gradient with respect to the features; None without a target."""
        return None if self.log_feature_gradient_norm is None else _exp(self.log_feature_gradient_norm)


@on_the_arrays_stream
def _exp(log: Any) -> Any:
    return returner(log)(as_tensor(log, "log").exp())


def measured(inputs: Inputs, name: str, like: Any, *, reduction: str, log: bool, weight: Tensor | None = None) -> Any:
    """Compute the named log of a head, reduce it, and give it back in the form of ``like``."""
    head, soft = inputs.head, inputs.soft_target is not None
    s = inputs.sample_weights(weight)
    labelled = None if soft else weight
    how = Reduction(reduction, log, inputs.dtype, head.target, head.ignore_index, head.C, s, soft, labelled)
    value = ops.head_measure(head, _FIELD[name], how, inputs.plain and s is None and labelled is None)
    if reduction == "none":
        value = value.reshape(inputs.leading)
    return returner(like)(value)


@on_the_arrays_stream
def hessian_trace(
    features: Any,
    linear_weight: Any,
    target: Any = None,
    *,
    linear_bias: Any = None,
    logits: Any = None,
    weight: Any = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    include_bias: bool = False,
    reduction: str = "mean",
    log: bool = False,
) -> Any:
    r"""Trace of the Hessian of softmax cross-entropy with respect to the last linear layer.

    :math:`\mathrm{Tr}\,H = \|\phi\|^2 \sum_j p_j (1 - p_j) / T^2`, p the softmax of
    :math:`z = (W\phi + b)/T`. It does not depend on the label.

    Args:
        features: :math:`\phi`, (..., D), float16, bfloat16, float32 or float64; a torch tensor, a NumPy array or an array
            with ``__dlpack__``. The leading dimensions are free: N is their product.
        linear_weight: W, (C, D), the head's weight, of any of these dtypes, on the features' device.
        target: None; integer labels (...,); or soft targets (..., C), not negative. Only weighs the samples: see Returns.
        linear_bias: b, (C,). An entry of -inf takes its class away.
        logits: (..., C), the logits W phi + b before the division by T, if they are known: used, not recomputed.
            An entry of -inf is an absent class.
        weight: class weights (C,), not negative; needs a target.
        temperature: T, finite and above 0.
        ignore_index: the label of rows that count as nothing.
        include_bias: take the bias as a parameter of the layer: :math:`\|\phi\|^2 + 1` instead of :math:`\|\phi\|^2`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        log: return the natural log of the reduced value (of each value under ``"none"``).

    Returns:
        With :math:`s_n = \sum_k \mathrm{weight}_k\,\mathrm{target}_{nk}` (hard label: weight_y; ignored: 0; no target: 1):
        ``"none"`` gives s_n t_n of shape (...,), ``"sum"`` their sum, ``"mean"`` the sum over torch's divisor (the sum of
        weight_y over valid rows for hard labels, N for soft targets or none; NaN if that is 0). float32, or float64 if
        features, weight or logits are; of the kind and on the device of ``features``.

    Raises:
        TypeError: an argument that is no array; a dtype that is not floating (features, weight, bias, logits) or neither
            integer nor floating (target); a quantized or nested tensor or a DTensor shard; a flag or number of another type.
        ValueError: shapes that do not fit; C = 0; tensors on different devices or not strided; a tensor that carries a
            forward-mode tangent; class weights or soft targets that require gradient while grad mode is on; a label
            outside 0..C-1 that is not ``ignore_index``; negative class weights or soft targets; ``weight`` without target;
            ``include_bias`` without bias; a temperature that is not finite and above 0; an unknown ``reduction``. On CUDA
            devices values are checked only with ``FLATCORE_VALIDATE=1``.
        RuntimeError: a second derivative, when backward reaches it.

    Warns:
        UserWarning: a ``linear_weight`` of one row (C = 1): every measure is 0, and it is nearly always a sigmoid's.

    Gradients: with respect to features, linear_weight, linear_bias and logits, in closed form, in their dtypes. Given
        logits are an input of their own: what they were computed from gets its share through them. The gradient of
        ``log=True`` does not shrink as confidence grows; a row whose value is 0 and an ignored row have gradient 0; a row
        with NaN has gradient NaN, and so has the weight. They cannot be differentiated a second time.

    Numerics: :math:`\log\mathrm{Tr}\,H = \log\|\phi\|^2 + \log\varepsilon + \log(2 - \varepsilon(1+\sum_j q_j^2)) - 2\log T`
    with :math:`\varepsilon = 1 - p_{max}` taken from the other classes' logits, never from 1 - p: right at every
    confidence, also where p is 1 to the last digit. Inputs of lower precision are read as they are; arithmetic is float32
    or better whatever autocast or the matmul precision switches say. A row with NaN, +inf logits or non-finite features
    is NaN, alone.

    Source: Walter et al., arXiv 2510.14231 (ICLR 2026), section 3; "TrH" of the top layer in arXiv 2211.12624.

    Example:
        >>> import torch, flatcore
        >>> features, head = torch.tensor([[30.0, 10.0]]), torch.eye(2)
        >>> f"{flatcore.hessian_trace(features, head).item():.6e}"
        '4.122307e-06'
        >>> f"{flatcore.hessian_trace(10 * features, head, log=True).item():.4f}"
        '-187.7939'
    """
    inputs = checked_inputs(
        features, linear_weight, target, linear_bias, logits, temperature, ignore_index, soft=True,
        include_bias=include_bias,
    )  # fmt: skip
    weight = checked_class_weight(weight, inputs.head, target)
    check_option(reduction, "reduction", _REDUCTIONS)
    check_flag(log, "log")
    return measured(inputs, "log_hessian_trace", features, reduction=reduction, log=log, weight=weight)


@on_the_arrays_stream
def relative_flatness(
    features: Any,
    linear_weight: Any,
    target: Any = None,
    *,
    linear_bias: Any = None,
    logits: Any = None,
    weight: Any = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    include_bias: bool = False,
    reduction: str = "mean",
    log: bool = False,
    measure: str = "layerwise",
    norm_power: int = 2,
) -> Any:
    r"""Relative flatness of the last linear layer: the Hessian measured in units of the weights.

    ``"layerwise"``: :math:`\|W\|_F^2\,\mathrm{Tr}\,H` (the paper's relative sharpness :math:`\kappa_{Tr}`);
    ``"neuronwise"``: :math:`\sum_{s,s'} \langle w_s, w_{s'}\rangle\,\mathrm{Tr}\,H_{s,s'} =
    \|\phi\|^2\,\mathrm{Var}_p(w)/T^2`, with :math:`\mathrm{Var}_p(w) = \sum_j p_j\|w_j - \sum_k p_k w_k\|^2`.

    Args:
        features, linear_weight, target, linear_bias, logits, weight, temperature, ignore_index, reduction, log: as in
            :func:`flatcore.hessian_trace`.
        include_bias: augment features by 1 and each w_j by b_j, in norms and distances.
        measure: ``"layerwise"`` or ``"neuronwise"``. Neuronwise is at most layerwise, is :math:`\|\phi\|^2` times the
            trace of the loss's Hessian with respect to the features, and does not change under w_j -> w_j + c, as the
            softmax does not. Both are unchanged by W -> cW, phi -> phi/c (without ``include_bias``).
        norm_power: 2; or 1 for :math:`\|W\|_F\,\mathrm{Tr}\,H`, layerwise only, to reproduce older code: not invariant.

    Returns:
        As :func:`flatcore.hessian_trace`. Larger is sharper. The measures are linear in H: the value of a data set is the
        mean of its samples' values.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`flatcore.hessian_trace`; an unknown ``measure``; ``norm_power``
            other than 1 or 2, or other than 2 with neuronwise.

    Gradients: as :func:`flatcore.hessian_trace`; through the curvature and the weight's norm both.

    Numerics: as :func:`flatcore.hessian_trace`; Var_p(w) is a sum of terms of one sign over squared distances formed from
    differences of rows. For heads too large for a (C, C) table the mean row is taken out first, and rows where the rest
    would cancel are done again from differences.

    Source: layerwise, Walter et al., arXiv 2510.14231 (ICLR 2026); neuronwise, Petzka et al., "Relative Flatness and
    Generalization", NeurIPS 2021, Definition 3.

    Example:
        >>> import torch, flatcore
        >>> features, head = torch.tensor([[30.0, 10.0]]), torch.eye(2)
        >>> values = [flatcore.relative_flatness(features, head, measure=m).item() for m in ("layerwise", "neuronwise")]
        >>> " ".join(f"{v:.5e}" for v in values)
        '8.24461e-06 4.12231e-06'
    """
    check_measure(measure, norm_power)
    inputs = checked_inputs(
        features, linear_weight, target, linear_bias, logits, temperature, ignore_index, soft=True,
        include_bias=include_bias, norm_power=norm_power,
    )  # fmt: skip
    weight = checked_class_weight(weight, inputs.head, target)
    check_option(reduction, "reduction", _REDUCTIONS)
    check_flag(log, "log")
    return measured(inputs, f"log_{measure}", features, reduction=reduction, log=log, weight=weight)


@on_the_arrays_stream
def feature_gradient_norms(
    features: Any,
    linear_weight: Any,
    target: Any,
    *,
    linear_bias: Any = None,
    logits: Any = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    ord: float | str = 2,
    reduction: str = "none",
    log: bool = False,
) -> Any:
    r"""Norm of each sample's loss gradient with respect to its features.

    :math:`\nabla_\phi \ell = W^T(p - e_y)/T = \sum_{j \ne y} p_j (w_j - w_y)/T`.

    Args:
        features, linear_weight, linear_bias, logits, temperature, ignore_index, log: as in :func:`flatcore.hessian_trace`.
        target: integer labels of the features' leading shape.
        ord: 1, 2 or inf; or a name: ``"l1"``, ``"l2"``, ``"linf"``, ``"inf"``.
        reduction: ``"none"``, ``"mean"`` (over the rows that are not ignored) or ``"sum"``.

    Returns:
        Plain (not squared) norms, per sample, of shape (...,); ignored rows 0. dtype and kind as
        :func:`flatcore.hessian_trace`.

    Raises:
        TypeError: as :func:`flatcore.hessian_trace`; a soft target.
        ValueError: as :func:`flatcore.hessian_trace`; no target; an ``ord`` other than 1, 2, inf.
        RuntimeError: a second derivative, when backward reaches it.

    Gradients: as :func:`flatcore.hessian_trace`; for ``ord=inf`` the mean over entries that tie. Where a confident row's
        label has an exact duplicate among W's rows, or is wrong, terms below 1e-16 of the largest are lost: they are
        differences of numbers near 1. The duplicate's own part, its p_j whatever the norm is, is right at every gap; under
        torch.func and torch.compile only where the norm does not underflow in float64 (gaps to 708).

    Numerics: the usual p - e_y vanishes in float32 from a logit gap of 17 on; here the sum runs over differences of rows
    with the largest term's weight split off as a log, so that the norm is right at every confidence.

    Source: the identity above; its use for unmasked gradients, arXiv 2510.14231.

    Example:
        >>> import torch, flatcore
        >>> features, head = torch.tensor([[200.0, 10.0]]), torch.eye(2)
        >>> f"{flatcore.feature_gradient_norms(features, head, torch.tensor([0]), log=True).item():.4f}"
        '-189.6534'
    """
    if target is None:
        raise ValueError("target must hold integer class labels, got None")
    inputs = checked_inputs(features, linear_weight, target, linear_bias, logits, temperature, ignore_index, soft=False)
    name = GRADIENT_NORMS[check_norm(ord, "ord")]
    check_option(reduction, "reduction", _REDUCTIONS)
    check_flag(log, "log")
    return measured(inputs, name, features, reduction=reduction, log=log)


@on_the_arrays_stream
def head_metrics(
    features: Any,
    linear_weight: Any,
    target: Any = None,
    *,
    linear_bias: Any = None,
    logits: Any = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> HeadMetrics:
    r"""All per-sample statistics of a softmax head, from one read of the features.

    Args:
        features, linear_weight, linear_bias, logits, temperature, ignore_index: as in :func:`flatcore.hessian_trace`.
        target: None, or integer labels of the features' leading shape.

    Returns:
        :class:`flatcore.HeadMetrics`, every field of the features' leading shape; logs are natural logs, per sample;
        float32, or float64 if features, weight or logits are. ``loss`` and ``log_feature_gradient_norm`` are None without
        a target.

    Raises:
        TypeError, ValueError: as :func:`flatcore.feature_gradient_norms`, but a target is not needed; and any input that
            requires gradient while grad mode is on, for this function has no derivative.

    Numerics and sources: as :func:`flatcore.hessian_trace`, :func:`flatcore.relative_flatness` and
    :func:`flatcore.feature_gradient_norms`. Everything is in the log domain, so nothing underflows.

    Example:
        >>> import torch, flatcore
        >>> metrics = flatcore.head_metrics(torch.tensor([[200.0, 10.0]]), torch.eye(2), torch.tensor([1]))
        >>> f"{metrics.loss.item():.0f} {metrics.log_hessian_trace.item():.3f} {metrics.feature_gradient_norm.item():.4f}"
        '190 -178.708 1.4142'
    """
    inputs = checked_inputs(features, linear_weight, target, linear_bias, logits, temperature, ignore_index, soft=False)
    head = inputs.head
    names = _LABEL_FREE if head.target is None else _LABEL_FREE + _LABELLED
    for name, tensor in zip(INPUTS, head.inputs, strict=True):
        if tensor is not None:
            check_no_grad(tensor, name)
    values, prediction = ops.head_metrics(head, sum(1 << FIELDS.index(field) for field in names), False)
    give = returner(features)
    columns = dict(zip(names, (give(row.reshape(inputs.leading)) for row in values.unbind(0)), strict=True))
    return HeadMetrics(
        give(prediction.reshape(inputs.leading)), *(columns.get(name) for name in HeadMetrics._fields[1:])
    )
