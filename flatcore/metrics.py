r"""The measures as torchmetrics: means over a data set, batch by batch and over processes, with their distribution.

A few rows carry most of these means, so beside the mean a metric keeps a histogram of the rows' logs, of constant size,
from which :meth:`~_HeadMetric.median` and :meth:`~_HeadMetric.heaviest_share` are read. Each bin keeps its weight and the
sum of its values relative to its centre, so that the mean's log is right also where every value underflows.

Needs the extra ``flatcore[torchmetrics]``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._head_metrics import GRADIENT_NORMS, check_include_bias, check_measure, checked_class_weight, checked_inputs
from ._reduction import sample_weights
from ._validate import check_flag, check_integer, check_norm, check_number, check_temperature

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "flatcore.metrics needs torchmetrics: pip install 'flatcore[torchmetrics]'", name="torchmetrics"
    ) from error

__all__ = ["FeatureGradientNorm", "HessianTrace", "RelativeFlatness"]

# Bins of log v: 1/16 wide from -512 to 128, e^128 being beyond float32; 32 wide below, to e^-16384; one more for v = 0.
_LOWEST, _TURN, _HIGHEST = -16384.0, -512.0, 128.0
_COARSE, _FINE = 32.0, 1 / 16
_COARSE_BINS = round((_TURN - _LOWEST) / _COARSE)
_BINS = _COARSE_BINS + round((_HIGHEST - _TURN) / _FINE)


def _bin_of(log: Tensor) -> Tensor:
    """Index of each log's bin: what lies outside goes to the outermost ones."""
    coarse = (log.clamp(_LOWEST, _TURN) - _LOWEST) / _COARSE
    fine = (log.clamp(_TURN, _HIGHEST) - _TURN) / _FINE
    return torch.where(log < _TURN, coarse, _COARSE_BINS + fine).long().clamp(0, _BINS - 1)


def _centres(device: torch.device) -> Tensor:
    index = torch.arange(_BINS, dtype=torch.float64, device=device)
    coarse = _LOWEST + (index + 0.5) * _COARSE
    return torch.where(index < _COARSE_BINS, coarse, _TURN + (index - _COARSE_BINS + 0.5) * _FINE)


class _HeadMetric(Metric):
    """What the metrics share: the states, the mean, and what is read from the histogram."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    mass: Tensor
    scaled: Tensor
    zero_mass: Tensor
    divisor: Tensor
    nan_rows: Tensor

    def __init__(self, *, temperature: float, ignore_index: int, log: bool, ignore_nan: bool, **options: Any):
        super().__init__(**options)
        self.temperature = check_temperature(temperature)
        self.ignore_index = check_integer(ignore_index, "ignore_index")
        self.log = check_flag(log, "log")
        self.ignore_nan = check_flag(ignore_nan, "ignore_nan")
        wide = torch.float64
        self.add_state("mass", torch.zeros(_BINS, dtype=wide), dist_reduce_fx="sum")
        self.add_state("scaled", torch.zeros(_BINS, dtype=wide), dist_reduce_fx="sum")
        self.add_state("zero_mass", torch.zeros((), dtype=wide), dist_reduce_fx="sum")
        self.add_state("divisor", torch.zeros((), dtype=wide), dist_reduce_fx="sum")
        self.add_state("nan_rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def _add(
        self,
        name: str,
        features: Any,
        linear_weight: Any,
        target: Any,
        linear_bias: Any,
        logits: Any,
        weight: Any = None,
        *,
        soft: bool = True,
        include_bias: bool = False,
        norm_power: int = 2,
    ) -> None:
        """Take in the rows' logs of s_n v_n, of the named field, in float64."""
        inputs = checked_inputs(
            features, linear_weight, target, linear_bias, logits, self.temperature, self.ignore_index, soft=soft
        )._replace(dtype=torch.float64)
        weight = checked_class_weight(weight, inputs, target)
        logs = inputs.measure(
            name, inputs.features, reduction="none", log=True, weight=weight,
            include_bias=check_include_bias(include_bias, inputs), norm_power=norm_power,
        ).reshape(-1).to(self.mass.device)  # fmt: skip
        counted = torch.ones_like(logs)
        s = counted
        if inputs.target is not None:
            s = sample_weights(inputs.target, weight, self.ignore_index).to(logs.device)
            counted = counted if inputs.target.is_floating_point() else s
        here = s != 0  # a row of weight 0 stays out, whatever it holds
        nan = here & logs.isnan()
        kept = here & ~nan
        self.nan_rows += nan.sum()
        self.divisor += torch.where(nan, 0, counted).sum()
        zero = kept & (logs == -math.inf)
        self.zero_mass += torch.where(zero, s, 0).sum()
        kept &= ~zero
        s, logs = torch.where(kept, s, 0), torch.where(kept, logs, 0)
        index = _bin_of(torch.where(kept, logs - s.log(), 0))
        self.mass.index_add_(0, index, s)
        relative = (logs - _centres(logs.device)[index]).exp()
        self.scaled.index_add_(0, index, torch.where(kept, relative, 0))

    def compute(self) -> Tensor:
        """Mean over all rows so far (its log with ``log=True``).

        NaN without rows; NaN once a row's value was NaN, unless ``ignore_nan``.
        """
        return self._result(self._log_total(self.scaled) - self.divisor.log())

    def median(self) -> Tensor:
        """The value that half of the rows' weight does not exceed, to 1/16 in its log (below e^-512: to 32); or its log.

        In a distributed run every process must call it, as it gathers the states. NaN as :meth:`compute`.
        """
        with self._gathered():
            half = (self.mass.sum() + self.zero_mass) / 2
            if half <= self.zero_mass:
                log = torch.full_like(half, -math.inf)
            else:
                index = int(torch.searchsorted(self.zero_mass + self.mass.cumsum(0), half))
                index = min(index, _BINS - 1)
                log = _centres(half.device)[index] + (self.scaled[index] / self.mass[index]).log()
            return self._result(log)

    def heaviest_share(self, fraction: float = 0.01) -> Tensor:
        """The share of the sum that the heaviest rows hold: 1 % of the rows' weight, or another fraction. In [0, 1].

        Rows of one bin (1/16 of a log) count as equals. In a distributed run every process must call it. NaN as
        :meth:`compute`, and where the sum is 0.

        Raises:
            ValueError: a fraction outside 0..1.
        """
        fraction = check_number(fraction, "fraction")
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be within 0..1, got {fraction}")
        with self._gathered():
            mass, scaled = self.mass.flip(0), self.scaled.flip(0)
            wanted = fraction * (mass.sum() + self.zero_mass)
            before = mass.cumsum(0) - mass
            taken = ((wanted - before) / torch.where(mass > 0, mass, 1)).clamp(0, 1)
            share = (self._log_total((taken * scaled).flip(0)) - self._log_total(self.scaled)).exp()
            return torch.where(self._is_poisoned(), math.nan, share).to(self.dtype)

    def _gathered(self) -> Any:
        return self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        )

    def _log_total(self, scaled: Tensor) -> Tensor:
        return (_centres(scaled.device) + scaled.log()).logsumexp(0)

    def _is_poisoned(self) -> Tensor:
        nothing = self.divisor == 0
        return nothing if self.ignore_nan else nothing | (self.nan_rows > 0)

    def _result(self, log: Tensor) -> Tensor:
        value = log if self.log else log.exp()
        return torch.where(self._is_poisoned(), math.nan, value).to(self.dtype)


class HessianTrace(_HeadMetric):
    r"""Mean Hessian trace of the last linear layer over a data set: :func:`flatcore.hessian_trace`, batch by batch.

    Args:
        temperature, ignore_index, include_bias: as in :func:`flatcore.hessian_trace`.
        log: ``compute`` and ``median`` give natural logs: right also where the values underflow.
        ignore_nan: a row whose value is NaN is left out of the mean. Otherwise the mean is NaN once there was one; either
            way ``nan_rows`` counts them, and the rows beside it are kept, so that the choice can be made afterwards.
        options: those of ``torchmetrics.Metric``.

    States: ``mass`` and ``scaled`` (10,736,) float64, three numbers; all are summed over processes. Updates are detached
    and do not wait for the device.

    Raises:
        TypeError, ValueError: as :func:`flatcore.hessian_trace`, at ``update``, which then leaves the states as they were.
        ImportError: at the module's import, without torchmetrics.

    Numerics: sums in float64, relative to their bin; the rows' logs too, so that the mean's log is within 1e-12 of
        that of all rows at once. Values below e^-16384 count as 0.

    Source: as :func:`flatcore.hessian_trace`.

    Example:
        >>> import torch
        >>> from flatcore.metrics import HessianTrace
        >>> metric = HessianTrace()
        >>> for rows in torch.tensor([[[30.0, 10.0]], [[3.0, 1.0]]]):
        ...     metric.update(rows, torch.eye(2))
        >>> f"{metric.compute().item():.4f} {metric.median().item():.1e} {metric.heaviest_share(0.5).item():.4f}"
        '1.0499 4.1e-06 1.0000'
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        ignore_index: int = -100,
        include_bias: bool = False,
        log: bool = False,
        ignore_nan: bool = False,
        **options: Any,
    ):
        super().__init__(temperature=temperature, ignore_index=ignore_index, log=log, ignore_nan=ignore_nan, **options)
        self.include_bias = check_flag(include_bias, "include_bias")

    def update(
        self,
        features: Any,
        linear_weight: Any,
        target: Any = None,
        *,
        linear_bias: Any = None,
        logits: Any = None,
        weight: Any = None,
    ) -> None:
        """Take in a batch; arguments as in :func:`flatcore.hessian_trace`."""
        self._add(
            "log_hessian_trace", features, linear_weight, target, linear_bias, logits, weight,
            include_bias=self.include_bias,
        )  # fmt: skip


class RelativeFlatness(_HeadMetric):
    r"""Mean relative flatness over a data set: :func:`flatcore.relative_flatness`, batch by batch.

    Args:
        measure, norm_power: as in :func:`flatcore.relative_flatness`.
        temperature, ignore_index, include_bias, log, ignore_nan, options: as in :class:`HessianTrace`.

    The head should not change between updates: each batch is measured with the weight it is given.

    Raises:
        TypeError, ValueError: as :func:`flatcore.relative_flatness`; of tensors at ``update``.

    States, numerics: as :class:`HessianTrace`. Source: as :func:`flatcore.relative_flatness`.

    Example:
        >>> import torch
        >>> from flatcore.metrics import RelativeFlatness
        >>> metric = RelativeFlatness(measure="neuronwise", log=True)
        >>> metric.update(torch.tensor([[300.0, 10.0]]), torch.eye(2))
        >>> f"{metric.compute().item():.4f}"
        '-277.8982'
    """

    def __init__(
        self,
        *,
        measure: str = "layerwise",
        norm_power: int = 2,
        temperature: float = 1.0,
        ignore_index: int = -100,
        include_bias: bool = False,
        log: bool = False,
        ignore_nan: bool = False,
        **options: Any,
    ):
        super().__init__(temperature=temperature, ignore_index=ignore_index, log=log, ignore_nan=ignore_nan, **options)
        check_measure(measure, norm_power)
        self.measure, self.norm_power = measure, int(norm_power)
        self.include_bias = check_flag(include_bias, "include_bias")

    def update(
        self,
        features: Any,
        linear_weight: Any,
        target: Any = None,
        *,
        linear_bias: Any = None,
        logits: Any = None,
        weight: Any = None,
    ) -> None:
        """Take in a batch; arguments as in :func:`flatcore.relative_flatness`."""
        self._add(
            f"log_{self.measure}", features, linear_weight, target, linear_bias, logits, weight,
            include_bias=self.include_bias, norm_power=self.norm_power,
        )  # fmt: skip


class FeatureGradientNorm(_HeadMetric):
    r"""Mean norm of the loss's gradient with respect to the features: :func:`flatcore.feature_gradient_norms`.

    Args:
        ord: 1, 2 or inf, or a name as in :func:`flatcore.feature_gradient_norms`.
        temperature, ignore_index, log, ignore_nan, options: as in :class:`HessianTrace`.

    Raises:
        TypeError, ValueError: as :func:`flatcore.feature_gradient_norms`; of tensors at ``update``.

    States, numerics: as :class:`HessianTrace`. Source: as :func:`flatcore.feature_gradient_norms`.

    Example:
        >>> import torch
        >>> from flatcore.metrics import FeatureGradientNorm
        >>> metric = FeatureGradientNorm(log=True)
        >>> metric.update(torch.tensor([[200.0, 10.0]]), torch.eye(2), torch.tensor([0]))
        >>> f"{metric.compute().item():.4f}"
        '-189.6534'
    """

    def __init__(
        self,
        *,
        ord: float | str = 2,
        temperature: float = 1.0,
        ignore_index: int = -100,
        log: bool = False,
        ignore_nan: bool = False,
        **options: Any,
    ):
        super().__init__(temperature=temperature, ignore_index=ignore_index, log=log, ignore_nan=ignore_nan, **options)
        self.ord = check_norm(ord, "ord")

    def update(
        self, features: Any, linear_weight: Any, target: Any, *, linear_bias: Any = None, logits: Any = None
    ) -> None:
        """Take in a batch; arguments as in :func:`flatcore.feature_gradient_norms`."""
        if target is None:
            raise ValueError("target must hold integer class labels, got None")
        self._add(
            GRADIENT_NORMS[self.ord], features, linear_weight, target, linear_bias, logits, soft=False
        )  # fmt: skip
