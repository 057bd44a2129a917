"""Are the answers right: on a subset of rows, against the reference formulas in float64.

flatcore (native, reference) is held to its contract by the tests' own function, ``flatcore/_check/tolerance.py``.
The rivals are held to what their formula can give in float32: the absolute rounding of 1 - sum p^2 and of the Gram
form, summed worst case over the lengths of their sums. A wrong formula fails; a confident row that comes out 0 does
not, it is counted in the column *rows right to 1 %*.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from works import Candidate, Inputs, Work

from flatcore import HeadMetrics, reference
from flatcore._check.tolerance import cotangent_tolerance, tolerance
from flatcore._engine.head import Head

U = 2.0**-24  # unit roundoff of float32

_RIVAL_FIELDS = ("prediction", "confidence", "margin", "one_minus_confidence", "feature_norm", "hessian_trace",
                 "layerwise", "neuronwise", "loss", "feature_gradient_norm")  # fmt: skip
_MAIN = {"all fields": "hessian_trace", "trace": "hessian_trace", "trace, chunked": "hessian_trace",
         "neuronwise": "neuronwise", "neuronwise, chunked": "neuronwise"}  # fmt: skip
_TRACE = ("margin", "loss", "log_feature_norm", "log_hessian_trace")
_NEEDED = {"all fields": reference.FIELDS[:-2], "mean layerwise": (*_TRACE, "log_layerwise"),
           "trace": _TRACE, "trace, chunked": _TRACE,
           "neuronwise": (*_TRACE, "log_neuronwise"), "neuronwise, chunked": (*_TRACE, "log_neuronwise")}  # fmt: skip
_SUBSET = {"W1": 512, "W2": 512, "W3": 256, "W4": 32, "W5": 64, "W8": 64}


class Truth:
    """The work's answers in float64 on evenly spaced rows, logs kept as logs, with the bounds that go with them."""

    def __init__(self, work: Work, x: Inputs):
        self.work = work
        count = min(_SUBSET.get(work.number, work.N), work.N)
        self.index = torch.linspace(0, work.N - 1, count).round().long()
        self.x = x.rows(self.index)
        if work.question == "row norms":
            self.norms = reference.row_norms(self.x.features.double(), (1.0, 2.0, math.inf))
            return
        if work.question == "cotangent":
            self.parts = reference.unmasked_cross_entropy(self.x.features.double(), self.x.target, -100)
            return
        names = [name for name in reference.FIELDS if name in _NEEDED[work.question]]
        bits = sum(1 << reference.FIELDS.index(name) for name in names)
        head = Head(*(v.double() for v in self.x[:3]), target=self.x.target)
        values, self.prediction = reference.head_metrics(head, bits, True)
        self.fields = dict(zip(names, values.unbind(0), strict=True))
        phi, w, b = (v.double().abs() for v in self.x[:3])
        terms = (torch.addmm(b, phi, w.T)).amax(1)  # max_j(sum_d |phi_d w_jd| + |b_j|)
        self.dot = 2 * (2 * math.sqrt(work.D) + 4) * U * terms
        z = torch.addmm(*(v.double() for v in (self.x.linear_bias, self.x.features, self.x.linear_weight.T)))
        self.largest_logit = z.abs().amax(1)
        self.condition = torch.ones_like(self.dot)
        if work.question == "all fields":
            # how much a relative error of the p_j is magnified in the gradient's norm; distances from differences, as a
            # rounded ||w_y - w_y|| would outweigh all others in a confident row
            rows = self.x.linear_weight.double()
            terms = z.softmax(1) * torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")[self.x.target]
            self.condition = terms.sum(1) / self.fields["log_feature_gradient_norm"].exp()

    def check(self, candidate: Candidate, answer: Any) -> float | None:
        """Raise if a candidate's answer is outside its bounds; return the share of rows right to 1 % in the main field.

        Raises:
            AssertionError: with the work, the candidate, the field and the worst row.
        """
        question = self.work.question
        if candidate.role == "neighbour":
            self._within(candidate, "loss", answer[self.index], self.fields["loss"], self._naive("loss"))
            return None
        if question == "row norms":
            got, k = answer[:, self.index], self.work.D
            exact = tolerance("row_norm", None, None, torch.float32, terms=k).relative if candidate.is_exact else None
            # a rival sums K float32 terms: worst case
            relative = (k + 4) * U if exact is None else exact
            self._within(candidate, "norms", got, self.norms, relative * self.norms)
            return _share_right(got, self.norms)
        if question == "cotangent":
            return self._check_cotangent(candidate, [part[self.index] for part in answer])
        if question == "mean layerwise":
            truth = self.fields["log_layerwise"].exp()
            slack = self._exact("layerwise") if candidate.is_exact else self._naive("layerwise")
            # the float32 mean over N rows adds at most N roundings
            slack = (slack + truth * self.work.N * U).mean()
            self._within(candidate, question, answer.reshape(1), truth.mean().reshape(1), slack.reshape(1))
            return None
        fields = self._named(answer)
        for name, value in fields.items():
            self._check_field(candidate, name, value[self.index])
        main = _MAIN[question]
        if f"log_{main}" in fields:
            got = fields[f"log_{main}"][self.index].double() - self.fields[f"log_{main}"]
            return ((got.abs() < 0.01).double().mean()).item()
        return _share_right(fields[main][self.index], self.fields[f"log_{main}"].exp())

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
        return {_MAIN[self.work.question]: answer}

    def _check_field(self, candidate: Candidate, name: str, got: Tensor) -> None:
        if name == "prediction":
            # where the two best logits are nearer than their rounding, either may be named
            clear = self.fields["margin"] > self.dot
            wrong = (got != self.prediction) & clear
            assert not wrong.any(), f"{self.work.key}, {candidate.name}: {int(wrong.sum())} predictions differ"
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
        bound = tolerance(name, linear.numpy(), log.numpy(), torch.float32, logit_error=self.dot.numpy(),
                          condition=self.condition.numpy() if "gradient" in name else 1.0)  # fmt: skip
        return torch.as_tensor(bound.absolute + bound.relative * truth.abs().numpy())

    def _naive(self, name: str) -> Tensor:
        c, d, x = self.work.C, self.work.D, self.x
        n = (2 * self.fields["log_feature_norm"]).exp()
        largest_row = x.linear_weight.double().square().sum(1).amax()
        p = self.dot + (c + 8 + 2 * self.largest_logit) * U  # relative error of a probability
        if name in ("confidence", "one_minus_confidence", "loss", "margin"):
            truth = self.fields["loss" if name == "loss" else "margin"]
            return p + 4 * U * truth
        if name == "feature_norm":
            return n.sqrt() * (d + 4) * U
        one_minus = 2 * p + (c + 8) * U
        relative = (d + 8) * U  # of the squared feature norm
        if name == "hessian_trace":
            return n * one_minus + relative * self.fields["log_hessian_trace"].exp()
        if name == "layerwise":
            squared = x.linear_weight.double().square().sum()
            return squared * n * one_minus + (relative + (c + d) * U) * self.fields["log_layerwise"].exp()
        gram = largest_row * (3 * p + (2 * c + d + 16) * U)
        if name == "neuronwise":
            return n * gram + relative * self.fields["log_neuronwise"].exp()
        return 4 * gram  # the squared gradient norm

    def _within(self, candidate: Candidate, name: str, got: Tensor, truth: Tensor, slack: Tensor) -> None:
        got = got.double()
        where = f"{self.work.key}, {candidate.name}, {name}"
        assert torch.isfinite(got).all(), f"{where}: not finite"
        excess = (got - truth).abs() - slack
        worst = excess.argmax()
        assert (excess <= 0).all(), (
            f"{where}: {got.flatten()[worst].item():.9g} where {truth.flatten()[worst].item():.9g} "
            f"within {slack.flatten()[worst].item():.3g} was due"
        )


def _share_right(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).abs() < 0.01 * truth.abs()).double().mean().item()
