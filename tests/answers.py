"""Every number of a drawn call on one path, held against the exact one.

Truth and tolerances: ``oracles.py`` and ``flatcore/_check/tolerance.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mpmath
import numpy as np
import oracle_derivatives
import oracles
import torch
from strategies import GRADIENT_NORMS, MEASURES, Call
from torch import Tensor

import flatcore
from flatcore._check.tolerance import (
    Bound,
    cotangent_tolerance,
    derivative_error,
    logit_error,
    product_tolerance,
    rounded_gradient,
    tolerance,
    worst,
)

# from here on a magnified rounding is a large part of the value: what the formats hold is no longer a statement
CONDITION_AT_MOST = 1e3
OPEN = ": open"
"""Ends the name of a quantity that conditioning or the format's range leaves open: counted, not compared."""
ORDS = {name: ord for ord, name in oracles.GRADIENTS.items()}


class Found(NamedTuple):
    """One quantity of one run: its largest error in units of its tolerance, and what was off where that is above 1."""

    quantity: str
    ratio: float
    row: int | None
    text: str


class Answers:
    """The exact values of a call, and what each may be off; computed once, compared with every path."""

    def __init__(self, call: Call):
        self.call = call
        self.N, self.C = call.features.shape[0], call.weight.shape[0]
        tensors = [x for x in (call.features, call.weight, call.logits) if x is not None]
        self.dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
        hard = call.target is not None and not call.target.is_floating_point()
        ignored = [y == call.ignore_index for y in call.target.tolist()] if hard else [False] * self.N
        self.ignored = np.array(ignored)
        self.labels = (
            [0 if i else y for y, i in zip(call.target.tolist(), ignored, strict=True)] if hard else [0] * self.N
        )
        nothing = call.nothing.unsqueeze(1)
        self.features = torch.where(nothing & ~call.features.isfinite(), 0, call.features)
        self.logits = None
        if call.logits is not None:
            unknown = (
                call.logits.isnan() | (call.logits == math.inf) | (call.logits == -math.inf).all(dim=1, keepdim=True)
            )
            self.logits = torch.where(nothing & unknown, 0, call.logits)
        self.s, self.divisor = self._weights()
        self._truth: Any = None
        self._gradients: dict[bool, Any] = {}
        self._derivatives: Any = None

    def _weights(self) -> tuple[np.ndarray, float]:
        """Every row's weight, and the divisor of the mean."""
        target, weight = self.call.target, self.call.class_weight
        if target is None:
            return np.ones(self.N), float(self.N)
        if target.is_floating_point():
            w = torch.ones(self.C, dtype=torch.float64) if weight is None else weight.double()
            return (target.double() * w).sum(dim=1).numpy(), float(self.N)
        s = np.ones(self.N) if weight is None else weight.double().numpy()[self.labels]
        s = np.where(self.ignored, 0.0, s)
        return s, float(s.sum())

    @property
    def truth(self) -> oracles.Truth:
        if self._truth is None:
            c = self.call
            self._truth = oracles.exact(
                self.features, c.weight, c.bias, self.logits, torch.tensor(self.labels).unsqueeze(1), c.temperature,
                c.include_bias, c.norm_power,
            )  # fmt: skip
            self.logit_error = np.zeros(self.N)
            if self.logits is None:
                self.logit_error = logit_error(self.features, c.weight, c.bias, c.temperature, self.dtype)
        return self._truth

    def condition(self, name: str) -> np.ndarray:
        """Of a norm of the feature gradient, how much an error of the probabilities is magnified; else 1."""
        truth = self.truth
        return np.array(truth.condition[ORDS[name]]) if name in ORDS else np.ones(self.N)

    def decided(self, name: str) -> np.ndarray:
        """Rows whose value is more than the rest of terms that cancel, and whose logits are known well enough."""
        condition = self.condition(name)
        cancels = np.zeros(self.N, dtype=bool)
        if name in ORDS:  # a sum that cancels to 0, though its terms do not vanish
            zero = self.truth.log(name) == -math.inf
            cancels = zero & np.array([not self._label_is_alone(n) for n in range(self.N)])
        return (
            (condition < CONDITION_AT_MOST)
            & (condition * np.expm1(self.logit_error) < 0.5)
            & ~cancels
            & (self.logit_error < 0.2)
        )

    def _label_is_alone(self, n: int) -> bool:
        """Whether every class that is there has the row of the label."""
        c, y = self.call, self.labels[n]
        other = (c.weight != c.weight[y]).any(dim=1)
        there = torch.ones(self.C, dtype=torch.bool) if c.bias is None else c.bias > -math.inf
        if self.logits is not None:
            there = self.logits[n] > -math.inf
        return not bool((other & there).any())

    # ------------------------------------------------------------------------------------------------------- values
    def rows(self, field: str, s: np.ndarray | None = None) -> tuple[np.ndarray, Bound, np.ndarray]:
        """Values of all rows times their weight, the bound, and which of them are decided."""
        name = field.removeprefix("log_")
        truth, decided = self.truth, self.decided(name)
        linear, log = truth.linear(name), truth.log(name)
        if s is not None:
            with np.errstate(divide="ignore"):
                used = s != 0
                linear, log = np.where(used, linear * s, 0.0), np.where(used, log + np.log(s), -math.inf)
        condition = np.where(decided, self.condition(name), 1.0)
        bound = tolerance(
            field, linear, log, self.dtype, logit_error=np.where(decided, self.logit_error, 0.0), condition=condition
        )
        return (log if field.startswith("log_") else linear), bound, decided

    def reduced(self, name: str) -> tuple[np.ndarray, Bound] | None:
        """The reduced value of a measure and its bound; None where a row of it is not decided."""
        c, used = self.call, self.s != 0
        if not self.decided(name)[used].all():
            return None
        field = f"log_{name}" if c.log else name
        if c.reduction == "mean" and self.divisor == 0:
            return np.array(math.nan), Bound(0.0, 0.0)
        exact = self.truth.weighted_mean(name, self.s.tolist(), self.divisor if c.reduction == "mean" else 1.0)
        linear, log = np.array(float(exact)), np.array(oracles.log_of(exact))
        _, rows, _ = self.rows(f"log_{name}")
        relative = np.expm1(np.broadcast_to(rows.absolute, used.shape)[used].max(initial=0.0))
        total = tolerance(field, linear, log, self.dtype)
        total += Bound(relative, 0.0) if c.log else Bound(0.0, relative)
        return (log if c.log else linear), total

    # ---------------------------------------------------------------------------------------------------- gradients
    def gradients(self, by_row: bool) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
        """Exact gradients of the call's value times its upstream, and what each entry may be off; None if undecided.

        ``by_row``: an entry is held to the largest of the sizes in its row, as large heads are.
        """
        if by_row not in self._gradients:
            self._gradients[by_row] = self._exact_gradients(by_row)
        return self._gradients[by_row]

    def _exact_gradients(self, by_row: bool) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
        c, name = self.call, self.call.function
        truth = self.truth
        upstream = np.broadcast_to(c.upstream.double().numpy(), (self.N,))
        used = (self.s != 0) & (truth.log(name) > -math.inf) & (upstream != 0)
        if not self.decided(name)[used].all() or (c.reduction == "mean" and self.divisor == 0):
            return None
        _, rows, _ = self.rows(f"log_{name}")
        linear_error = np.where(used, np.expm1(np.broadcast_to(rows.absolute, (self.N,))), 0.0)
        # a linear value carries its row's log, the log of a sum the logs of all its rows
        measure_error = linear_error if not c.log else 2 * linear_error.max(initial=0.0) * (c.reduction != "none")
        error = derivative_error(self.dtype, self.C, self.N, np.where(used, self.logit_error, 0.0), measure_error)
        error = np.broadcast_to(error, (self.N,))
        if (error * self.condition(name) > 0.05)[used].any():  # else what is of second order counts too
            return None
        if self._derivatives is None:
            self._derivatives = oracle_derivatives.exact_derivatives(
                self.features, c.weight, c.bias, self.logits, self.labels, c.temperature, c.include_bias, c.norm_power,
                name, error.tolist(), float(torch.finfo(self.dtype).tiny),
            )  # fmt: skip
        coefficient = self._coefficients(upstream, used, name)
        found = {}
        for key, tensor in self._inputs().items():
            shape = tuple(tensor.shape)
            exact, allowed, small = (np.zeros(shape, dtype=np.longdouble) for _ in range(3))
            for n in np.flatnonzero(used):
                part = self._derivatives[n]
                if part is None or coefficient[n] == 0:
                    continue
                at = n if key in ("features", "logits") else slice(None)
                size, sizes = abs(coefficient[n]), part.size[key]
                sizes = np.full_like(sizes, sizes.max(initial=0)) if by_row else sizes
                exact[at] += coefficient[n] * part.exact[key]
                allowed[at] += size * (error[n] * sizes + part.open[key])
                if name in MEASURES:
                    # their derivatives shrink with the value: the coefficient is a float64, and within six digits of its
                    # smallest normal number products with it have none (a twin of the label keeps its p/2 at any gap)
                    near = np.finfo(np.float64).tiny * 2.0**20
                    allowed[at] += (size if size < near else near * 2.0**-20 * abs(upstream[n])) * sizes
                small[at] += (1 + size * part.largest) * self._through(key, int(n))
                if key != "features":
                    # a p_j below the arithmetic's smallest normal number beside its best rival's: nothing is left of it,
                    # whatever it stands beside (distances of scaled rows have any ratio)
                    gone = self._gone(int(n))
                    allowed[at] += size * sizes * (gone[:, None] if key == "linear_weight" else gone)
            found[key] = exact, rounded_gradient(exact, allowed, tensor.dtype, self.dtype, small)
        return found

    def _gone(self, n: int) -> Any:
        """Classes whose probability is below the smallest normal number, relative to the best but the top one."""
        z = (
            self.logits[n].double()
            if self.logits is not None
            else self.features[n].double() @ self.call.weight.double().T
        )
        if self.logits is None and self.call.bias is not None:
            z = z + self.call.bias.double()
        rest = z.topk(min(2, self.C)).values[-1]
        return ((rest - z) / self.call.temperature > -math.log(torch.finfo(torch.float64).tiny) - 1).numpy()

    def _through(self, key: str, n: int) -> Any:
        """What one unit of a derivative by a logit adds to an entry, at most."""
        if key == "features":
            return 0.0 if self.logits is not None else self.call.weight.double().abs().sum(dim=0).numpy()
        if key == "linear_weight":
            return 1.0 + self.features[n].double().abs().numpy()
        return 1.0

    def _coefficients(self, upstream: np.ndarray, used: np.ndarray, name: str) -> list[Any]:
        """d(upstream * value)/d log v_n, as long doubles."""
        c = self.call
        with mpmath.workdps(80):
            if c.log and c.reduction == "none":
                found = [mpmath.mpf(u) if k else mpmath.mpf(0) for u, k in zip(upstream.tolist(), used, strict=True)]
            else:
                share = [mpmath.mpf(s) * v for s, v in zip(self.s.tolist(), self.truth.exact[name], strict=True)]
                divisor = mpmath.mpf(1)
                if c.log:
                    divisor = mpmath.fsum(share)
                elif c.reduction == "mean":
                    divisor = mpmath.mpf(self.divisor)
                found = [
                    mpmath.mpf(u) * a / divisor if k else mpmath.mpf(0)
                    for u, a, k in zip(upstream.tolist(), share, used, strict=True)
                ]
            return [oracle_derivatives.as_long(v) for v in found]

    def _inputs(self) -> dict[str, Tensor]:
        c = self.call
        inputs = {"features": c.features, "linear_weight": c.weight}
        if c.bias is not None and (c.include_bias or c.logits is None):
            inputs["linear_bias"] = c.bias
        if c.logits is not None:
            inputs["logits"] = c.logits
        return inputs


# -------------------------------------------------------------------------------------------------------- comparisons
def check(call: Call, answers: Answers | None = None) -> list[Found]:
    """Compute the call on the path in force, and compare all it gives with the exact values."""
    answers = answers or Answers(call)
    if call.function == "head_metrics":
        return list(_head_metrics(call, answers))
    if call.function == "unmasked_cross_entropy":
        return list(_cross_entropy(call, answers))
    if call.function == "input_gradients":
        return list(_input_gradients(call, answers))
    return list(_measure(call, answers))


def _found(
    quantity: str, got: Any, truth: Any, bound: Bound, dtype: torch.dtype | None = None, rows: Any = None
) -> Found:
    got = got.detach()
    if dtype is not None and got.dtype != dtype:
        return Found(quantity, math.inf, None, f"dtype {got.dtype}, not {dtype}")
    got = got.double().numpy()
    if got.shape != truth.shape:
        return Found(quantity, math.inf, None, f"shape {got.shape}, not {truth.shape}")
    bound = Bound(np.broadcast_to(bound.absolute, got.shape), np.broadcast_to(bound.relative, got.shape))
    if dtype is not None and dtype != torch.float64:
        # what the format cannot hold is infinite, or its largest number where the bound leaves that open
        largest = float(torch.finfo(dtype).max)
        allowed = bound.absolute + bound.relative * np.abs(np.where(np.isfinite(truth), truth, 0.0))
        over = np.isinf(got) & (np.sign(got) * truth + allowed > largest)
        truth = np.where(over, got, truth)
    ratio, place = worst(quantity, got, truth, bound)
    if not got.size:
        return Found(quantity, 0.0, None, "")
    row = int(np.unravel_index(place, got.shape)[0]) if got.ndim else None
    text = ""
    if not ratio <= 1:
        at = np.unravel_index(place, got.shape)
        text = (
            f"at {tuple(int(i) for i in at)} got {float(got[at])!r}, truth {float(truth[at])!r}, {ratio:.3g} tolerances"
        )
    return Found(quantity, ratio, row if rows is None or row is None else int(rows[row]), text)


def _head_metrics(call: Call, answers: Answers) -> Iterator[Found]:
    metrics = flatcore.head_metrics(
        call.features, call.weight, call.target, linear_bias=call.bias, logits=call.logits, temperature=call.temperature,
        ignore_index=call.ignore_index,
    )  # fmt: skip
    for field in (
        "confidence", "margin", "log_one_minus_confidence", "log_feature_norm", "log_hessian_trace", "log_layerwise",
        "log_neuronwise", "loss", "log_feature_gradient_norm",
    ):  # fmt: skip
        truth, bound, decided = answers.rows(field)
        if field in ("loss", "log_feature_gradient_norm"):
            truth = np.where(answers.ignored, 0.0 if field == "loss" else -math.inf, truth)
            decided = decided | answers.ignored
        keep = np.flatnonzero(decided)
        part = Bound(*(np.broadcast_to(v, (answers.N,))[keep] for v in bound))
        yield _found(field, getattr(metrics, field)[torch.from_numpy(keep)], truth[keep], part, answers.dtype, keep)
    margin = answers.truth.linear("margin")
    sure = (answers.logit_error == 0) | (margin > answers.logit_error)
    wrong = sure & (metrics.prediction.numpy() != np.array(answers.truth.prediction))
    row = int(wrong.argmax())
    yield Found(
        "prediction", math.inf if wrong.any() else 0.0, row,
        f"row {row}: {metrics.prediction[row]}, not {answers.truth.prediction[row]}" if wrong.any() else "",
    )  # fmt: skip


def function_of(call: Call) -> Callable[..., Tensor]:
    given = {"temperature": call.temperature, "ignore_index": call.ignore_index, "reduction": call.reduction}
    given["log"] = call.log
    if call.function in GRADIENT_NORMS:
        return lambda x, w, **k: flatcore.feature_gradient_norms(
            x, w, call.target, ord=ORDS[call.function], **given, **k
        )
    given |= {"include_bias": call.include_bias, "weight": call.class_weight}
    if call.function == "hessian_trace":
        return lambda x, w, **k: flatcore.hessian_trace(x, w, call.target, **given, **k)
    given |= {"measure": call.function, "norm_power": call.norm_power}
    return lambda x, w, **k: flatcore.relative_flatness(x, w, call.target, **given, **k)


def _measure(call: Call, answers: Answers) -> Iterator[Found]:
    function, name = function_of(call), call.function
    field = f"log_{name}" if call.log else name
    inputs = answers._inputs()
    leaves = {key: x.clone().requires_grad_(call.upstream is not None) for key, x in inputs.items()}
    x, w = leaves["features"], leaves["linear_weight"]
    optional = {"linear_bias": leaves.get("linear_bias", call.bias), "logits": leaves.get("logits")}
    value = function(x, w, **optional)
    label = f"{field} ({call.reduction})"
    if call.reduction == "none":
        truth, bound, decided = answers.rows(field, answers.s)
        keep = np.flatnonzero(decided | (answers.s == 0))
        part = Bound(*(np.broadcast_to(v, (answers.N,))[keep] for v in bound))
        yield _found(label, value[torch.from_numpy(keep)], truth[keep], part, answers.dtype, keep)
    elif (reduced := answers.reduced(name)) is None:
        yield Found(label + OPEN, 0.0, None, "")
    else:
        truth, bound = reduced
        if np.isnan(truth):
            yield Found(label, 0.0 if value.isnan() else math.inf, None, f"got {value}, nothing counts: NaN")
        else:
            yield _found(label, value, truth, bound, answers.dtype)
    if call.upstream is None:
        return
    gradients = torch.autograd.grad(value, tuple(leaves.values()), call.upstream)
    want = answers.gradients(by_row=flatcore.show_config()["last_path"] == "chunked")
    if want is None:
        yield Found(f"d {field}" + OPEN, 0.0, None, "")
        return
    for (key, leaf), got in zip(leaves.items(), gradients, strict=True):
        exact, allowed = want[key]
        quantity = f"d {field} / d {key}"
        with np.errstate(over="ignore", invalid="ignore"):
            exact, allowed = exact.astype(np.float64), allowed.astype(np.float64)
        # terms that leave the range of the arithmetic leave nothing of the entries they meet in
        largest = float(torch.finfo(answers.dtype).max) / 1e3
        if not (np.isfinite(exact) & (np.abs(exact) < largest) & (allowed < largest)).all():
            yield Found(quantity + OPEN, 0.0, None, "")
            continue
        yield _found(quantity, got, exact, Bound(allowed, 0.0), leaf.dtype, None)


def _labels_of(call: Call, answers: Answers) -> Tensor:
    return torch.tensor(answers.labels)


def _cross_entropy(call: Call, answers: Answers) -> Iterator[Found]:
    assert answers.logits is not None
    z = call.logits.clone().requires_grad_(call.upstream is not None)
    value = flatcore.unmasked_cross_entropy(z, call.target, reduction=call.reduction, ignore_index=call.ignore_index)
    exact = oracles.exact_cross_entropy(answers.logits, _labels_of(call, answers))
    loss, log = (np.where(answers.ignored, v, exact[key]) for key, v in (("loss", 0.0), ("log_loss", -math.inf)))
    count = (~answers.ignored).sum()
    label = f"unmasked_cross_entropy ({call.reduction})"
    bound = tolerance("loss", loss, log, answers.dtype)
    if call.reduction == "none":
        yield _found(label, value, loss, bound, answers.dtype)
    elif call.reduction == "mean" and count == 0:
        yield Found(label, 0.0 if value.isnan() else math.inf, None, f"got {value}, nothing counts: NaN")
    else:
        total = np.array(loss.sum() / (count if call.reduction == "mean" else 1))
        # torch's sum over a few rows adds a rounding each
        relative = np.max(bound.relative) + 2 * len(loss) * torch.finfo(answers.dtype).eps
        yield _found(label, value, total, Bound(np.max(bound.absolute) * len(loss), relative), answers.dtype)
    if call.upstream is None:
        return
    (got,) = torch.autograd.grad(value, z, call.upstream)
    c = np.where(answers.ignored, 0.0, call.upstream.double().numpy())
    c = c / max(count, 1) if call.reduction == "mean" else c
    want = np.where(answers.ignored[:, None], 0.0, c[:, None] * exact["cotangent"])
    one = cotangent_tolerance(call.logits.dtype)
    # the upstream in the logits' dtype, and their product: a rounding each
    eps = torch.finfo(call.logits.dtype).eps
    allowed = np.abs(c)[:, None] * (one.absolute + (one.relative + 2 * eps) * np.abs(exact["cotangent"]))
    allowed = np.where(answers.ignored[:, None], 0.0, allowed) + torch.finfo(call.logits.dtype).tiny
    yield _found("d unmasked_cross_entropy", got, want, Bound(allowed, 0.0), call.logits.dtype)


def _input_gradients(call: Call, answers: Answers) -> Iterator[Found]:
    """Through a linear model whose logits are exact, being sums of small integers or little else."""
    w = call.weight
    z = call.features.double() @ w.double().T
    exact_logits = not logit_error(call.features, w, None, 1.0, call.features.dtype).any()
    if not exact_logits or w.shape[0] < 2:
        return
    found = flatcore.input_gradients(lambda x: x @ w.T, call.features, call.target, ignore_index=call.ignore_index)
    exact = oracles.exact_cross_entropy(z, _labels_of(call, answers))
    cotangent = np.where(answers.ignored[:, None], 0.0, exact["cotangent"])
    scale = np.where(answers.ignored, -math.inf, exact["log_scale"])
    bound = tolerance("log_scale", None, scale, answers.dtype)
    yield _found("input_gradients log_scale", found.log_scale, scale, bound, answers.dtype)
    wide = w.double().numpy()
    bound = product_tolerance(np.abs(cotangent) @ np.abs(wide), w.shape[0], answers.dtype)
    tiny = torch.finfo(answers.dtype).tiny * np.abs(wide).sum()
    yield _found(
        "input_gradients direction", found.direction, cotangent @ wide, Bound(bound.absolute + tiny, 0.0), answers.dtype
    )
