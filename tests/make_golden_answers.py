"""Make the golden answers that ``flatcore.check`` compares with: ``flatcore/_check/golden_answers.npz``.

    python tests/make_golden_answers.py     # five minutes on a core; writes the file where an answer has changed

Every number comes from the mpmath oracle (``oracles.py``, ``oracle_derivatives.py``), and what it may be off from the
one tolerance function (``flatcore/_check/tolerance.py``), for the dtype of its call. Nothing of flatcore is called but the
integer generator of the inputs (``flatcore/_check/cases.py``). Of a large gradient the file has weighted sums of groups of
rows and of columns, and single entries (``cases.summary``); a sum's tolerance is the weighted sum of its entries', so that

- an error that all entries share, of a tolerance or two of each, is seen;
- a single wrong entry is seen for certain among the samples.

Every entry is compared with the float64 reference besides, for which the file has the largest tolerance of each of a
gradient's rows (``"d features rows"``).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import oracles
import torch
from answers import Answers
from strategies import Call

from flatcore._check.battery import GOLDEN, NORMS, ROWS, Golden, pack
from flatcore._check.cases import (
    DTYPES,
    IGNORED,
    NAN_LOGIT_ROW,
    NAN_ROW,
    WHOLE,
    Case,
    Inputs,
    N,
    battery_cases,
    inputs_of,
    summary,
    tensor,
)
from flatcore._check.tolerance import Bound, cotangent_tolerance, logit_error, tolerance

CPU = torch.device("cpu")
_FIELDS = (
    "confidence", "margin", "log_one_minus_confidence", "log_feature_norm", "log_hessian_trace", "log_layerwise",
    "log_neuronwise", "loss", "log_feature_gradient_norm",
)  # fmt: skip


def answers_of(case: Case) -> dict[str, Golden]:
    """The golden answers of one case."""
    inputs = inputs_of(case)
    made = {
        "head_metrics": _head_metrics, "head_metrics_backward": _measure, "row_norms": _row_norms,
        "unmasked_cross_entropy": _cross_entropy,
    }[case.stem](case, inputs)  # fmt: skip
    return {name: _compact(golden, _dtype(case, name)) for name, golden in made.items()}


def _dtype(case: Case, quantity: str) -> torch.dtype:
    if quantity.startswith("d "):
        return DTYPES[case.dtype]
    return torch.float64 if case.dtype == "float64" else torch.float32


def _compact(golden: Golden, dtype: torch.dtype) -> Golden:
    """Fewer digits, for a smaller file: 30 bits of an answer where 24 are compared, 5 bits of a tolerance, upwards."""
    truth, allowed = np.array(golden.truth, dtype=np.float64), np.array(golden.allowed, dtype=np.float64)
    assert not np.isnan(allowed).any() and (allowed >= 0).all()
    finite = np.isfinite(truth)
    if dtype != torch.float64:
        mantissa, exponent = np.frexp(np.where(finite, truth, 0.0))
        short = np.ldexp(np.rint(np.ldexp(mantissa, 30)), exponent - 30)
        allowed = allowed + np.where(finite, np.abs(short - np.where(finite, truth, 0.0)), 0.0)
        truth = np.where(finite, short, truth)
    return Golden(truth, _upwards(allowed, 5))


def _upwards(x: np.ndarray, bits: int) -> np.ndarray:
    """Each number with so many bits, not below it."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.ceil(np.ldexp(mantissa, bits)), exponent - bits)


def _golden(truth: np.ndarray, bound: Bound, dtype: torch.dtype, absent: np.ndarray | None = None) -> Golden:
    """A quantity that is compared whole; beyond the dtype's largest number its answer is infinite."""
    truth = np.asarray(truth, dtype=np.float64).reshape(-1)
    allowed = np.broadcast_to(
        np.asarray(bound.absolute + bound.relative * np.abs(np.where(np.isfinite(truth), truth, 0.0))), truth.shape
    )
    over = np.isfinite(truth) & (np.abs(truth) > torch.finfo(dtype).max)
    truth = np.where(over, np.copysign(math.inf, truth), truth)
    if absent is not None:
        truth = np.where(absent, math.nan, truth)
    allowed = np.where(np.isfinite(truth), allowed, 0.0)
    return Golden(truth, np.stack([allowed, allowed]))


def _head_metrics(case: Case, inputs: Inputs) -> dict[str, Golden]:
    absent = np.arange(N) == NAN_ROW
    if inputs.logits is not None:
        absent |= np.arange(N) == NAN_LOGIT_ROW
    arrays = (inputs.features, inputs.weight, inputs.bias, inputs.logits)
    x, w, b, z = (tensor(None if v is None else np.where(np.isnan(v), 0.0, v), torch.float64, CPU) for v in arrays)
    labels = np.where(inputs.target == IGNORED, 0, inputs.target)
    ignored = inputs.target == IGNORED
    truth = oracles.exact(x, w, b, z, torch.from_numpy(labels)[:, None], case.temperature)
    dtype = _dtype(case, "")
    if z is None:
        assert not logit_error(x, w, b, case.temperature, torch.float32).any(), f"{case.name}: rounded logits"
    found = {"prediction": Golden(np.where(absent, -1, truth.prediction), np.zeros((2, N)))}
    for field in _FIELDS:
        name = field.removeprefix("log_")
        linear, log = truth.linear(name), truth.log(name)
        condition = np.array(truth.condition[2]) if name == "feature_gradient_norm" else 1.0
        assert np.max(condition) < 8, f"{case.name}: a label of which little is known"
        value = log if field.startswith("log_") else linear
        if name in ("loss", "feature_gradient_norm"):
            value = np.where(ignored, -math.inf if field.startswith("log_") else 0.0, value)
        found[field] = _golden(value, tolerance(field, linear, log, dtype, condition=condition), dtype, absent)
    return found


def _call(case: Case, inputs: Inputs) -> Call:
    dtype = DTYPES[case.dtype]
    function, power = (case.function, 2) if case.function != "layerwise_1" else ("layerwise", 1)
    target = torch.from_numpy(inputs.target)
    if case.stem == "unmasked_cross_entropy":
        features, w, b = torch.zeros(N, 1, dtype=dtype), torch.zeros(case.width, 1, dtype=dtype), None
        logits = tensor(inputs.features, dtype, CPU)
    else:
        features, w, b, logits = (
            tensor(v, dtype, CPU) for v in (inputs.features, inputs.weight, inputs.bias, inputs.logits)
        )
    upstream = tensor(inputs.upstream, _dtype(case, ""), CPU)
    return Call(
        function, "golden", features, w, b, logits, target, None, case.temperature, IGNORED, case.bias == "included",
        power, case.reduction, case.log, upstream, target == IGNORED,
    )  # fmt: skip


def _measure(case: Case, inputs: Inputs) -> dict[str, Golden]:
    answers = Answers(_call(case, inputs))
    name, dtype = answers.call.function, answers.dtype
    used = answers.s != 0
    assert answers.decided(name)[used].all() and not answers.logit_error.any(), f"{case.name}: not decided"
    if case.reduction == "none":
        truth, bound, _ = answers.rows(f"log_{name}" if case.log else name, answers.s)
    else:
        reduced = answers.reduced(name)
        assert reduced is not None
        truth, bound = reduced
    found = {"value": _golden(truth, bound, dtype)}
    by_element, by_row = answers.gradients(False), answers.gradients(True)
    assert by_element is not None and by_row is not None, f"{case.name}: the gradients are not decided"
    for key, (exact, allowed) in by_element.items():
        parts = [exact, allowed, by_row[key][1]]
        exact, allowed, wide = (np.asarray(v).astype(np.float64) for v in parts)
        most = min(torch.finfo(DTYPES[case.dtype]).max / 2, torch.finfo(dtype).max / 1e3)
        assert (np.abs(exact) < most).all() and (wide < most).all(), f"{case.name}: {key} overflows"
        found[f"d {key}"] = _summed(np.asarray(parts[0]), allowed, wide)
        if exact.size > WHOLE:
            rows = np.stack([np.atleast_2d(each).max(axis=1) for each in (allowed, wide)])
            found[f"d {key}{ROWS}"] = Golden(np.zeros(rows.shape[1]), _upwards(rows, 2))
    return found


def _summed(exact: np.ndarray, *allowed: np.ndarray) -> Golden:
    """A gradient's summary; its sums are formed in float64: a rounding for each term along each dimension."""
    size = summary(np.abs(exact).astype(np.float64), absolute=True)
    slack = 2.0**-53 * sum(exact.shape) * size if exact.size > WHOLE else 0.0
    bounds = [summary(a, absolute=True) + slack for a in (allowed if len(allowed) == 2 else allowed * 2)]
    return Golden(summary(exact).astype(np.float64), np.stack(bounds))


def _row_norms(case: Case, inputs: Inputs) -> dict[str, Golden]:
    absent = np.isnan(inputs.features).any(axis=1)
    x = torch.from_numpy(np.where(np.isnan(inputs.features), 0.0, inputs.features))
    dtype = _dtype(case, "")
    found = {}
    for ord, name in NORMS.items():
        truth = oracles.exact_row_norms(x, ord)
        found[name] = _golden(truth, tolerance("row_norm", truth, truth, dtype, terms=case.width), dtype, absent)
    return found


def _cross_entropy(case: Case, inputs: Inputs) -> dict[str, Golden]:
    answers = Answers(_call(case, inputs))
    call, dtype, own = answers.call, answers.dtype, DTYPES[case.dtype]
    exact = oracles.exact_cross_entropy(answers.logits, torch.tensor(answers.labels))
    loss = np.where(answers.ignored, 0.0, exact["loss"])
    log = np.where(answers.ignored, -math.inf, exact["log_loss"])
    count = int((~answers.ignored).sum())
    bound = tolerance("loss", loss, log, dtype)
    if call.reduction == "none":
        found = {"value": _golden(loss, bound, dtype)}
    else:
        divisor = count if call.reduction == "mean" else 1
        # torch's sum over the rows adds a rounding each
        relative = np.max(bound.relative) + 2 * N * torch.finfo(dtype).eps
        total = np.array(math.fsum(loss) / divisor)
        found = {"value": _golden(total, Bound(np.max(bound.absolute) * N, relative), dtype)}
    c = np.where(answers.ignored, 0.0, call.upstream.double().numpy()) / (count if call.reduction == "mean" else 1)
    want = np.where(answers.ignored[:, None], 0.0, c[:, None] * exact["cotangent"])
    one, eps = cotangent_tolerance(own), torch.finfo(own).eps
    # the upstream in the logits' dtype, and their product: a rounding each
    allowed = np.abs(c)[:, None] * (one.absolute + (one.relative + 2 * eps) * np.abs(exact["cotangent"]))
    allowed = np.where(answers.ignored[:, None], 0.0, allowed + torch.finfo(own).tiny)
    return found | {"d logits": _summed(want, allowed)}


def main() -> int:
    """Make all, and write the file."""
    answers = {}
    for case in battery_cases():
        print(case.name, flush=True)
        answers[case.name] = answers_of(case)
    path = Path(__file__).resolve().parents[1] / "flatcore/_check" / GOLDEN
    text = pack(answers)
    if not path.exists() or path.read_bytes() != text:
        path.write_bytes(text)
        print(f"written: {path}, {len(text)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
