r"""The measures as torchmetrics: means over a data set, batch by batch and over processes, with their distribution.

A few rows carry most of these means, so beside the mean a metric keeps a histogram of the rows' logs, of constant size,
from which :meth:`~_HeadMetric.median` and :meth:`~_HeadMetric.heaviest_share` are read. Each bin keeps its weight and the
sum of its values relative to its centre, so that the mean's log is right also where every value underflows.

Needs the extra ``flatcore[torchmetrics]``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ._arguments.arrays import on_the_arrays_stream
from ._arguments.checks import check_flag, check_integer, check_norm, check_number, check_temperature, one_output
from ._arguments.head import check_measure, checked_class_weight, checked_inputs
from ._engine.reduction import sample_weights
from ._head_metrics import GRADIENT_NORMS, measured

try:
    from torchmetrics import Metric
    from torchmetrics.wrappers import BootStrapper, MultioutputWrapper
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


_DISMEMBERING = {
    BootStrapper.__init__.__code__: "BootStrapper, which draws at random from the first dimension of every tensor it is "
    "given, from the classes in linear_weight too: wrap torchmetrics.MeanMetric() in it, and update that with the values "
    "of the rows that count, reduction='none'",
    MultioutputWrapper.__init__.__code__: "MultioutputWrapper, which takes one column at a time of every tensor it is "
    "given, one feature of features and linear_weight: update a metric for each output",
}  # fmt: skip
"""Wrappers that would pass on parts of a head: the code in which they copy their metric, and what to say."""


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
    temperature: float
    ignore_index: int
    _forward_cache: Any
    nan_rows: Tensor

    def __init__(
        self,
        options: dict[str, Any],
        *,
        temperature: float,
        ignore_index: int,
        log: bool,
        ignore_nan: bool,
        **measured: Any,
    ):
        """``options`` are torchmetrics'; ``measured`` are a metric's own, checked already."""
        super().__init__(**options)
        self._fixed: tuple[str, ...] = ()
        self.log = check_flag(log, "log")
        self.ignore_nan = check_flag(ignore_nan, "ignore_nan")
        measured["temperature"] = check_temperature(temperature)
        measured["ignore_index"] = check_integer(ignore_index, "ignore_index")
        for name, value in measured.items():
            setattr(self, name, value)
        said = ", ".join(
            f"{name}={value!r}" for name, value in (measured | {"log": log, "ignore_nan": ignore_nan}).items()
        )
        wide = torch.float64
        # A MetricCollection takes metrics for one whose states have the same names and, after the first batch, the same
        # values (0 after one of padding or dead features): so what is measured is the name of a state.
        self._identity = f"{type(self).__name__}({said})"
        self.add_state(self._identity, torch.zeros((), dtype=wide), dist_reduce_fx="sum")
        self.add_state("mass", torch.zeros(_BINS, dtype=wide), dist_reduce_fx="sum")
        self.add_state("scaled", torch.zeros(_BINS, dtype=wide), dist_reduce_fx="sum")
        self.add_state("zero_mass", torch.zeros((), dtype=wide), dist_reduce_fx="sum")
        self.add_state("divisor", torch.zeros((), dtype=wide), dist_reduce_fx="sum")
        self.add_state("nan_rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self._fixed = tuple(measured)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_fixed", ()):
            raise AttributeError(f"{name} is fixed, as the states are sums under {self._identity}: make another metric")
        if name.endswith(")") and name != self._identity:
            raise ValueError(
                f"{self._identity} cannot be in a compute group with {name}, whose states are others: leave compute_groups "
                "of the MetricCollection at True"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # copied, which is how the wrappers begin
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code in _DISMEMBERING:
                raise TypeError(f"{type(self).__name__} cannot be wrapped in {_DISMEMBERING[frame.f_code]}")
            frame = frame.f_back
        return super().__getstate__()

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> Any:
        """Move the states, but never cast them (``parent.to(torch.bfloat16)`` would): they are sums over many rows."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        last = self._forward_cache
        super()._apply(fn, exclude_state=tuple(self._defaults))
        for name in self._defaults:
            default: Any = self._defaults[name]
            self._defaults[name] = moved(default)
            setattr(self, name, moved(getattr(self, name)))
        self._forward_cache = None if last is None else moved(last)
        self._computed = None  # computed again, in the dtype that is wanted now
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        before = {name: getattr(self, name) for name in self._defaults}
        super()._load_from_state_dict(*arguments)
        for name, old in before.items():  # as a module's buffers: copied, into the dtype and the device that are here
            setattr(self, name, getattr(self, name).detach().to(device=old.device, dtype=old.dtype, copy=True))

    @on_the_arrays_stream
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
        **options: Any,
    ) -> None:
        """Take in the rows' logs of s_n v_n, of the named field, in float64; ``options`` of the head."""
        shape: Any = getattr(linear_weight, "shape", ())
        if len(shape) == 2 and shape[0] == 1:
            remedy = "linear_weight = torch.cat([torch.zeros_like(w), w]), and the same of linear_bias"
            raise ValueError(one_output(f"{type(self).__name__}: linear_weight", remedy))
        inputs = checked_inputs(
            features,
            linear_weight,
            target,
            linear_bias,
            logits,
            self.temperature,
            self.ignore_index,
            soft=soft,
            **options,
        )._replace(dtype=torch.float64)
        weight = checked_class_weight(weight, inputs.head, target)
        logs = measured(inputs, name, inputs.head.features, reduction="none", log=True, weight=weight)
        logs = logs.reshape(-1).to(self.mass.device)
        counted = torch.ones_like(logs)
        s = counted
        if inputs.soft_target is not None:
            s = sample_weights(inputs.soft_target, weight, self.ignore_index, inputs.head.C).to(logs.device)
        elif inputs.head.target is not None:
            s = counted = sample_weights(inputs.head.target, weight, self.ignore_index, inputs.head.C).to(logs.device)
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

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot a value, or several: ``torchmetrics.Metric.plot``'s figure and axes; without ``val``, of :meth:`compute`."""
        return self._plot(val, ax)

    def compute(self) -> Tensor:
        """Mean over all rows so far (its log with ``log=True``).

        NaN without rows; NaN once a row's value was NaN, unless ``ignore_nan``.
        """
        return self._result(self._log_total(self.scaled) - self.divisor.log())

    def median(self) -> Tensor:
        """The middle of the rows' values, by weight, to 1/16 in its log (below e^-512: to 32); or its log.

        Of two in the middle, each with half of the weight on its side, it is the mean, as ``numpy.median`` has it.
        In a distributed run every process must call it, as it gathers the states. NaN as :meth:`compute`.
        """
        with self._gathered():
            half = (self.mass.sum() + self.zero_mass) / 2
            below = self.zero_mass + self.mass.cumsum(0)
            logs = _centres(half.device) + (self.scaled / self.mass).log()
            two = []
            for strictly in (False, True):  # the values up to which at least, and more than, half of the weight lies
                index = torch.searchsorted(below, half, right=strictly).clamp(max=_BINS - 1)
                is_zero = self.zero_mass > half if strictly else self.zero_mass >= half
                two.append(torch.where(is_zero, -math.inf, logs[index]))
            return self._result(torch.logaddexp(*two) - math.log(2))

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
            return self._or_nan(share)

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
        return self._or_nan(log if self.log else log.exp())

    def _or_nan(self, value: Tensor) -> Tensor:
        value = torch.where(self._is_poisoned(), math.nan, value)
        return value if self.dtype == torch.float64 else value.float()


class HessianTrace(_HeadMetric):
    r"""Mean Hessian trace of the last linear layer over a data set: :func:`flatcore.hessian_trace`, batch by batch.

    Args:
        temperature, ignore_index, include_bias: as in :func:`flatcore.hessian_trace`.
        log: ``compute`` and ``median`` give natural logs: right also where the values underflow.
        ignore_nan: a row whose value is NaN is left out of the mean. Otherwise the mean is NaN once there was one; either
            way ``nan_rows`` counts them, and the rows beside it are kept, so that the choice can be made afterwards.
        options: those of ``torchmetrics.Metric``.

    States: ``mass`` and ``scaled`` (10,736,) float64, four numbers; all are summed over processes, and stay float64 where
    a module is cast (``module.to(torch.bfloat16)``, ``half()``, ``set_dtype``). One of them has the measure and all options
    in its name, so that a MetricCollection shares states between equal metrics alone. Updates are detached and do not wait
    for the device. Results are float32, or float64 after ``set_dtype(torch.float64)``.

    Raises:
        TypeError, ValueError: as :func:`flatcore.hessian_trace`, at ``update``, which then leaves the states as they were.
        TypeError: wrapped in torchmetrics' BootStrapper or MultioutputWrapper, which would pass on parts of the head.
        ValueError: a head of one output (C = 1), whose values are all 0.
        AttributeError: temperature, ignore_index or include_bias are set later.
        ImportError: at the module's import, without torchmetrics.

    Numerics: sums in float64, relative to their bin; the rows' logs too, so that the mean's log is within 1e-12 of
        that of all rows at once. Values below e^-16384 count as 0.

    Source: as :func:`flatcore.hessian_trace`.

    Example:
        >>> import torch
        >>> from flatcore.metrics import HessianTrace
        >>> metric = HessianTrace()
        >>> for rows in torch.tensor([[[30.0, 10.0]], [[3.0, 1.0]], [[20.0, 0.0]]]):
        ...     metric.update(rows, torch.eye(2))
        >>> f"{metric.compute().item():.4f} {metric.median().item():.1e} {metric.heaviest_share(0.4).item():.4f}"
        '0.7000 4.1e-06 1.0000'
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
        super().__init__(
            options, temperature=temperature, ignore_index=ignore_index, log=log, ignore_nan=ignore_nan,
            include_bias=check_flag(include_bias, "include_bias"),
        )  # fmt: skip

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
        TypeError, ValueError, AttributeError: as :class:`HessianTrace`.

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
        check_measure(measure, norm_power)
        super().__init__(
            options, temperature=temperature, ignore_index=ignore_index, log=log, ignore_nan=ignore_nan, measure=measure,
            norm_power=int(norm_power), include_bias=check_flag(include_bias, "include_bias"),
        )  # fmt: skip

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
        TypeError, ValueError, AttributeError: as :class:`HessianTrace`.

    States, numerics: as :class:`HessianTrace`. Source: as :func:`flatcore.feature_gradient_norms`.

    Example:
        >>> import torch
        >>> from flatcore.metrics import FeatureGradientNorm
        >>> metric = FeatureGradientNorm(log=True)
        >>> metric.update(torch.tensor([[200.0, 10.0]]), torch.eye(2), torch.tensor([0]))
        >>> f"{metric.compute().item():.4f}"
        '-189.6534'
    """

    ord: float

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
        super().__init__(
            options, temperature=temperature, ignore_index=ignore_index, log=log, ignore_nan=ignore_nan,
            ord=check_norm(ord, "ord"),
        )  # fmt: skip

    def update(
        self, features: Any, linear_weight: Any, target: Any, *, linear_bias: Any = None, logits: Any = None
    ) -> None:
        """Take in a batch; arguments as in :func:`flatcore.feature_gradient_norms`."""
        if target is None:
            raise ValueError("target must hold integer class labels, got None")
        self._add(
            GRADIENT_NORMS[self.ord], features, linear_weight, target, linear_bias, logits, soft=False
        )  # fmt: skip
