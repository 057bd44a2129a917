"""Comparison of every public value of a problem with the exact one: what the test files share."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import oracles
import torch
from cases import BY_NAME, Case

import flatcore
from flatcore._check.tolerance import assert_within, logit_error, tolerance

LOGS = (
    "log_one_minus_confidence",
    "log_feature_norm",
    "log_hessian_trace",
    "log_layerwise",
    "log_neuronwise",
    "log_feature_gradient_norm",
)
LABELLED_LOGS = ("log_feature_gradient_norm",)
LINEAR = (
    "confidence",
    "margin",
    "feature_norm",
    "hessian_trace",
    "layerwise",
    "neuronwise",
    "loss",
    "feature_gradient_norm",
)


class Problem:
    """A case at its dtypes, with its exact values and the tolerance of each field."""

    def __init__(self, case: Case, *, include_bias: bool = False, norm_power: int = 2):
        tensors = [x for x in (case.features, case.weight, case.logits) if x is not None]
        self.case = case
        self.dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
        self.truth = oracles.exact(
            case.features, case.weight, case.bias, case.logits, case.targets, case.temperature, include_bias, norm_power
        )
        self.logit_error = np.zeros(case.features.shape[0])
        if case.logits is None:
            self.logit_error = logit_error(case.features, case.weight, case.bias, case.temperature, self.dtype)
        self.logit_error = self.logit_error.repeat(case.targets.shape[1])
        self.largest_log: Any = 0.0
        self._expected: dict[str, tuple[np.ndarray, Any]] = {}

    def expected(self, field: str) -> tuple[np.ndarray, Any]:
        """Return the exact values of a field and their tolerance."""
        if field not in self._expected:
            self._expected[field] = self._bounded(field)
        return self._expected[field]

    def _bounded(self, field: str) -> tuple[np.ndarray, Any]:
        name = field.removeprefix("log_")
        linear, log = self.truth.linear(name), self.truth.log(name)
        condition = 1.0
        for ord, gradient in oracles.GRADIENTS.items():
            if gradient == name:
                condition = np.array(self.truth.condition[ord])
        bound = tolerance(
            field, linear, log, self.dtype,
            logit_error=self.logit_error, condition=condition, largest_log=self.largest_log,
        )  # fmt: skip
        return (log if field.startswith("log_") else linear), bound

    def add_logs_in_float32(self) -> None:
        """Expect each log as a float32 sum of 2 log ||phi||, log eps, log ||W||^2 and what is smaller."""
        norm, trace = self.truth.log("feature_norm"), self.truth.log("hessian_trace")
        finite = np.isfinite(trace)
        head = np.where(finite, self.truth.log("layerwise"), 0) - np.where(finite, trace, 0)
        parts = np.abs([2 * norm, self.truth.log("one_minus_confidence"), head])
        self.largest_log = np.where(np.isfinite(parts), parts, 0.0).max(axis=0)
        self._expected.clear()

    def check(self, field: str, got: Any) -> None:
        """Require the values of a field, one per row and label."""
        truth, bound = self.expected(field)
        assert_within(f"{self.case.name}: {field}", got, truth, bound, self.dtype)

    def check_mean(self, field: str, got: Any, s: list[float], d: float) -> None:
        """Require sum_n s_n value_n / d. A sum of terms of one sign is as exact, relatively, as its worst term."""
        name = field.removeprefix("log_")
        _, bound = self.expected(f"log_{name}")
        used = np.array(s) != 0
        exact = self.truth.weighted_mean(name, s, d)
        linear, log = np.array(float(exact)), np.array(oracles.log_of(exact))
        # the rows' bound holds the rounding of their own logs; the result's log has another
        total = tolerance(field, linear, log, self.dtype)
        relative = np.expm1(np.broadcast_to(bound.absolute, used.shape)[used].max(initial=0.0))
        total += type(total)(relative, 0.0) if field.startswith("log_") else type(total)(0.0, relative)
        assert_within(
            f"{self.case.name}: mean {field}", got, log if field.startswith("log_") else linear, total, self.dtype
        )

    def check_head_metrics(self) -> flatcore.HeadMetrics:
        """Require every field of head_metrics and every linear-domain property."""
        metrics = flatcore.head_metrics(**self.case.arguments())
        for field in LOGS + LINEAR:
            self.check(field, getattr(metrics, field))
        self.check_prediction(metrics.prediction)
        return metrics

    def check_prediction(self, got: torch.Tensor) -> None:
        """Require the top class, the lowest on ties; where rounding can swap the top two, one within its reach."""
        assert got.dtype == torch.int64
        margin = self.truth.linear("margin")
        sure = (self.logit_error == 0) | (margin > self.logit_error)
        expected = np.array(self.truth.prediction)
        assert (got.numpy()[sure] == expected[sure]).all(), f"{self.case.name}: prediction"
        if not sure.all():
            k = self.case.targets.shape[1]
            z = self.case.features.double() @ self.case.weight.double().T
            z = z if self.case.bias is None else z + self.case.bias.double()
            z = z.repeat_interleave(k, dim=0) / self.case.temperature
            chosen = z.gather(1, got.unsqueeze(1)).squeeze(1)
            assert (z.amax(dim=1) - chosen).numpy()[~sure].max() <= self.logit_error[~sure].max()

    def check_views(self) -> None:
        """Require the per-sample values of the other functions, in both domains."""
        arguments = self.case.arguments() | {"reduction": "none"}
        for log in (False, True):
            prefix = "log_" if log else ""
            self.check(f"{prefix}hessian_trace", flatcore.hessian_trace(**arguments, log=log))
            for measure in ("layerwise", "neuronwise"):
                self.check(f"{prefix}{measure}", flatcore.relative_flatness(**arguments, measure=measure, log=log))
            for ord, name in oracles.GRADIENTS.items():
                self.check(f"{prefix}{name}", flatcore.feature_gradient_norms(**arguments, ord=ord, log=log))


@functools.cache
def problem(name: str, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Problem:
    """Return the named case at these dtypes: built once, compared with every path."""
    return Problem(BY_NAME[name].at(dtype, weight_dtype))


def bits(metrics: flatcore.HeadMetrics) -> dict[str, torch.Tensor]:
    """Return the fields that are there, by name."""
    return {name: value for name, value in metrics._asdict().items() if value is not None}
