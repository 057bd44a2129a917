"""Are the answers right: on a subset of rows, against the reference formulas in float64.

flatcore (native, reference) is held to its contract by the tests' own function, ``flatcore/_check/tolerance.py``.
The rivals are held to what their formula can give in their dtype: the absolute rounding of 1 - sum p^2 and of the Gram
form, summed worst case over the lengths of their sums; samplers to six of their standard errors besides. A wrong formula
fails; a confident row that comes out 0 does not, it is counted in the column *rows right to 1 %*.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flatcore
from flatcore import HeadMetrics, reference
from flatcore._check.tolerance import cotangent_tolerance, tolerance
from flatcore._engine.head import Head

from . import training
from .candidate import Candidate
from .field import SAMPLES
from .inputs import Inputs
from .works import Work

_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
U = 2.0**-24  # unit roundoff of the results
HALF_ON_CUDA = 1e-3
"""Of a log or relative, what a 16-bit head may be off on a GPU besides: its tensor cores cut products off."""
GRADIENT = {"native": 1e-4, "eager": 1e-3, "compile": 1e-3}
"""What a gradient may be off, of its largest entry."""

_RIVAL_FIELDS = ("prediction", "confidence", "margin", "one_minus_confidence", "feature_norm", "hessian_trace",
                 "layerwise", "neuronwise", "loss", "feature_gradient_norm")  # fmt: skip
_MAIN = {"all fields": "hessian_trace", "trace": "hessian_trace", "neuronwise": "neuronwise"}
_TRACE = ("margin", "loss", "log_feature_norm", "log_hessian_trace")
_NEEDED = {"all fields": reference.FIELDS[:-2], "mean layerwise": (*_TRACE, "log_layerwise"),
           "trace": _TRACE, "data set trace": _TRACE, "neuronwise": (*_TRACE, "log_neuronwise")}  # fmt: skip
_SUBSET = {"W1": 512, "W2": 512, "W3": 256, "W4": 32, "W5": 64, "W8": 64}
_ROWS_OF_A_GRADIENT = 32


class WrongAnswerError(AssertionError):
    """An answer outside its bounds: who gave it is not timed."""


class Checked(NamedTuple):
    """What a right answer was found to be."""

    right: float | None = None  # share of rows right to 1 % in the main field
    error: float | None = None  # relative, of a single number
    tolerances: float | None = None  # the largest error in units of what flatcore's contract allows


class Truth:
    """The work's answers in float64 on evenly spaced rows, logs kept as logs, with the bounds that go with them."""

    def __init__(self, work: Work, x: Inputs):
        self.work = work
        self.spare = HALF_ON_CUDA if x.features.is_cuda and work.dtype in ("float16", "bfloat16") else 0.0
        count = min(_SUBSET.get(work.number, 1024 if work.number.startswith("W") else 4), work.N)
        if work.backward:
            count = min(count, _ROWS_OF_A_GRADIENT) if work.number != "W6" else work.N
        index = torch.linspace(0, work.N - 1, count).round().long()
        self.index = index.to(x.features.device)
        self.x, self.worst = x.rows(self.index), 0.0
        wide = self.x.double()
        if work.question == "training step":
            self.step = training.truth(x)
        elif work.backward:
            self.gradients = _gradients(work, wide)
        elif work.question == "row norms":
            self.norms = reference.row_norms(wide.features, (1.0, 2.0, math.inf)).cpu()
        elif work.question == "cotangent":
            self.parts = [part.cpu() for part in reference.unmasked_cross_entropy(wide.features, wide.labels, -100)]
        else:
            self._head(wide)

    def _head(self, wide: Inputs) -> None:
        work = self.work
        names = [name for name in reference.FIELDS if name in _NEEDED[work.measure]]
        bits = sum(1 << reference.FIELDS.index(name) for name in names)
        values, prediction = reference.head_metrics(Head(*wide.head, target=wide.target), bits, True)
        self.prediction = prediction.cpu()
        self.fields = dict(zip(names, values.cpu().unbind(0), strict=True))
        phi, w, b = wide.head
        terms = torch.addmm(b.abs(), phi.abs(), w.T.abs()).amax(1)  # max_j(sum_d |phi_d w_jd| + |b_j|)
        self.dot = (2 * (2 * math.sqrt(work.D) + 4) * (2.0**-53 if work.dtype == "float64" else U) * terms).cpu()
        self.naive_dot = 2 * (2 * math.sqrt(work.D) + 4) * _UNIT[work.dtype] * terms.cpu()
        z = torch.addmm(b, phi, w.T)
        self.square_of_rows = w.square().sum(1).cpu()
        self.largest_logit = z.abs().amax(1).cpu()
        self.condition = torch.ones_like(self.dot)
        if work.question == "all fields":
            # how much a relative error of the p_j is magnified in the gradient's norm; distances from differences, as a
            # rounded ||w_y - w_y|| would outweigh all others in a confident row
            distances = torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist")[wide.target]
            norm = self.fields["log_feature_gradient_norm"].exp()
            self.condition = (z.softmax(1) * distances).sum(1).cpu() / norm
        if work.question == "data set trace":
            self.deviation = _deviation(phi, z.softmax(1))

    def check(self, candidate: Candidate, answer: Any) -> Checked:
        """Raise if a candidate's answer is outside its bounds.

        Raises:
            WrongAnswerError: with the work, the candidate, the field and the worst row.
        """
        self.worst = 0.0
        right, error = self._checked(candidate, answer)
        return Checked(right, error, self.worst if candidate.is_exact else None)

    def _checked(self, candidate: Candidate, answer: Any) -> tuple[float | None, float | None]:
        question = self.work.question
        if question == "training step":
            self._near(candidate, "regulariser", answer[0], self.step.value)
            self._near(candidate, "gradient", answer[1], self.step.gradient)
            return None, None
        if self.work.backward:
            if not all(t.isfinite().all() for t in answer):
                raise WrongAnswerError(f"{self.work.key}, {candidate.name}, gradient: not finite")
            few = answer if self.work.number == "W6" else candidate.run(self.x)
            for name, got, want in zip(("features", "W", "bias"), few, self.gradients, strict=True):
                self._near(candidate, f"gradient by {name}", got, want)
            return None, None
        if question == "cotangent":
            return self._check_cotangent(candidate, [part[self.index].cpu() for part in answer]), None
        if candidate.role == "neighbour":
            self._within(candidate, "loss", answer[self.index].cpu(), self.fields["loss"], self._naive("loss"))
            return None, None
        if question == "row norms":
            got, k = answer[:, self.index].cpu(), self.work.D
            exact = tolerance("row_norm", None, None, torch.float32, terms=k).relative if candidate.is_exact else None
            # a rival sums K float32 terms: worst case
            relative = (k + 4) * U if exact is None else exact
            self._within(candidate, "norms", got, self.norms, relative * self.norms)
            return _share_right(got, self.norms), None
        if question in ("mean layerwise", "data set trace"):
            return None, self._check_mean(candidate, answer.reshape(1).cpu())
        fields = self._named(answer)
        for name, value in fields.items():
            self._check_field(candidate, name, value[self.index].cpu())
        main = _MAIN[self.work.measure]
        if f"log_{main}" in fields:
            got = fields[f"log_{main}"][self.index].cpu().double() - self.fields[f"log_{main}"]
            return ((got.abs() < 0.01).double().mean()).item(), None
        return _share_right(fields[main][self.index].cpu(), self.fields[f"log_{main}"].exp()), None

    def _check_mean(self, candidate: Candidate, got: Tensor) -> float:
        """The mean over all rows; returns its relative error."""
        name = "layerwise" if self.work.question == "mean layerwise" else "hessian_trace"
        truth = self.fields[f"log_{name}"].exp()
        slack = self._exact(name) if candidate.is_exact else self._naive(name)
        # the mean over N rows adds at most N roundings
        slack = (slack + truth * self.work.N * U).mean()
        if candidate.role == "sampling":
            samples = SAMPLES // 3 if "Hutch++" in candidate.name else SAMPLES
            slack = slack + 6 * self.deviation / math.sqrt(samples)
        self._within(candidate, self.work.question, got, truth.mean().reshape(1), slack.reshape(1))
        return abs(got.item() / truth.mean().item() - 1)

    def _near(self, candidate: Candidate, name: str, got: Tensor, want: Tensor) -> None:
        """Within a share of the largest entry."""
        allowed = GRADIENT[candidate.role] * want.abs().max() * (1 if self.work.dtype == "float32" else 100)
        self._within(candidate, name, got, want, allowed.expand_as(want))

    def _check_cotangent(self, candidate: Candidate, got: list[Tensor]) -> float:
        """Loss and cotangent, or for a rival the usual gradient (1 - p_y) times it; how many are right to 1 %."""
        loss, log_scale, cotangent = self.parts
        gradient = log_scale.exp().unsqueeze(1) * cotangent
        if candidate.is_exact:
            bound = tolerance("loss", loss.numpy(), loss.log().numpy(), torch.float32)
            slack = torch.as_tensor(bound.absolute + bound.relative * loss.numpy())
            self._within(candidate, "loss", got[0], loss, slack)
            bound = cotangent_tolerance(torch.float32)
            self._within(candidate, "cotangent", got[2], cotangent, bound.absolute + bound.relative * cotangent.abs())
            found = got[1].double().exp().unsqueeze(1) * got[2].double()
        else:
            # the rounding of a log-softmax near its largest logit, and of the difference p - 1
            slack = (self.x.features.double().abs().amax(1) + self.work.C + 8) * U
            self._within(candidate, "loss", got[0], loss, slack)
            self._within(candidate, "gradient", got[1], gradient, slack.unsqueeze(1).expand_as(gradient))
            found = got[1].double()
        error = torch.linalg.vector_norm(found - gradient, dim=1)
        return (error < 0.01 * torch.linalg.vector_norm(gradient, dim=1)).double().mean().item()

    def _named(self, answer: Any) -> dict[str, Tensor]:
        if isinstance(answer, HeadMetrics):
            return answer._asdict()
        if isinstance(answer, tuple):
            return dict(zip(_RIVAL_FIELDS, answer, strict=True))
        return {_MAIN[self.work.measure]: answer}

    def _check_field(self, candidate: Candidate, name: str, got: Tensor) -> None:
        if name == "prediction":
            # where the two best logits are nearer than their rounding, either may be named
            clear = self.fields["margin"] > self.dot
            wrong = (got != self.prediction) & (clear if candidate.is_exact else self.fields["margin"] > self.naive_dot)
            if wrong.any():
                raise WrongAnswerError(f"{self.work.key}, {candidate.name}: {int(wrong.sum())} predictions differ")
            return
        truth = self._truth(name)
        if candidate.is_exact:
            slack = self._exact(name)
        else:
            slack = self._naive(name)
            if name == "feature_gradient_norm":  # the Gram form gives its square
                got, truth = got.double() ** 2, truth**2
        self._within(candidate, name, got, truth, slack)

    def _truth(self, name: str) -> Tensor:
        return self.fields[name] if name in self.fields else self.fields[f"log_{name}"].exp()

    def _exact(self, name: str) -> Tensor:
        truth, plain = self._truth(name), name.removeprefix("log_")
        log = self.fields[f"log_{plain}"] if f"log_{plain}" in self.fields else truth.log()
        linear = self.fields[plain] if plain in self.fields else log.exp()
        dtype = torch.float64 if self.work.dtype == "float64" else torch.float32
        bound = tolerance(name, linear.numpy(), log.numpy(), dtype, logit_error=self.dot.numpy(),
                          condition=self.condition.numpy() if "gradient" in name else 1.0)  # fmt: skip
        spare = self.spare if name.startswith("log_") else self.spare * truth.abs().numpy()
        return torch.as_tensor(bound.absolute + bound.relative * truth.abs().numpy() + spare)

    def _naive(self, name: str) -> Tensor:
        c, d, u = self.work.C, self.work.D, _UNIT[self.work.dtype]
        n = (2 * self.fields["log_feature_norm"]).exp()
        p = self.naive_dot + (c + 8 + 2 * self.largest_logit) * u  # relative error of a probability
        if name in ("confidence", "one_minus_confidence", "loss", "margin"):
            truth = self.fields["loss" if name == "loss" else "margin"]
            return p + 4 * u * truth
        if name == "feature_norm":
            return n.sqrt() * (d + 4) * u
        one_minus = 2 * p + (c + 8) * u
        relative = (d + 8) * u  # of the squared feature norm
        if name == "hessian_trace":
            return n * one_minus + relative * self.fields["log_hessian_trace"].exp()
        if name == "layerwise":
            return (
                self.square_of_rows.sum() * n * one_minus
                + (relative + (c + d) * u) * self.fields["log_layerwise"].exp()
            )
        gram = self.square_of_rows.max() * (3 * p + (2 * c + d + 16) * u)
        if name == "neuronwise":
            return n * gram + relative * self.fields["log_neuronwise"].exp()
        return 4 * gram  # the squared gradient norm

    def _within(self, candidate: Candidate, name: str, got: Tensor, truth: Tensor, slack: Tensor) -> None:
        got = got.double()
        where = f"{self.work.key}, {candidate.name}, {name}"
        if not torch.isfinite(got).all():
            raise WrongAnswerError(f"{where}: not finite")
        error = (got - truth).abs()
        worst = (error - slack).argmax()
        if not (error <= slack).all():
            raise WrongAnswerError(
                f"{where}: {got.flatten()[worst].item():.9g} where {truth.flatten()[worst].item():.9g} "
                f"within {slack.flatten()[worst].item():.3g} was due"
            )
        self.worst = max(self.worst, (error / slack).nan_to_num(nan=0.0).max().item())


def _gradients(work: Work, wide: Inputs) -> tuple[Tensor, ...]:
    """What is differentiated in candidates.py, in float64 on the reference."""
    leaves = tuple(t.requires_grad_() for t in wide.head)
    features, weight, bias = leaves
    with torch.enable_grad(), flatcore.backend("reference"):
        if work.number == "W6":
            value = flatcore.relative_flatness(features, weight, linear_bias=bias)
        elif work.measure == "trace":
            value = flatcore.hessian_trace(features, weight, linear_bias=bias, log=True)
        else:
            value = flatcore.relative_flatness(features, weight, linear_bias=bias, measure="neuronwise", log=True)
        return torch.autograd.grad(value, leaves)


def _deviation(phi: Tensor, p: Tensor) -> float:
    """Standard deviation of v^T H v over random signs v, at most: sqrt(2) ||H||_F of the mean loss's Hessian.

    H = 1/N sum_n A_n x phi_n phi_n^T with A = diag(p) - p p^T, so ||H||_F^2 = 1/N^2 sum_nm <A_n, A_m> (phi_n . phi_m)^2.
    """
    a = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).flatten(1)
    return math.sqrt(2 * ((a @ a.T) * (phi @ phi.T).square()).sum().item()) / len(p)


def _share_right(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).abs() < 0.01 * truth.abs()).double().mean().item()
