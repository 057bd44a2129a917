"""Who answers a work's question: flatcore, plain PyTorch, torch.compile of it, neighbours, other tools, the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flatcore

from .._engine import ops
from . import field, rivals, training
from .candidate import Absent, Candidate
from .inputs import Inputs
from .works import Work

Value = Callable[[Inputs], Any]


def _flatcore(work: Work, backend: str, x: Inputs) -> Any:
    question = work.question
    with flatcore.backend(backend):
        if question == "row norms":
            return flatcore.row_norms(x.features)
        if question == "cotangent":  # what input_gradients calls: the public loss without autograd's own cost
            return ops.unmasked_cross_entropy(x.features, x.labels, -100, with_cotangent=True)
        features, weight, bias = x.head
        if question == "all fields":
            return flatcore.head_metrics(features, weight, x.target, linear_bias=bias)
        mean = work.backward or question in ("mean layerwise", "data set trace")
        reduction, log = "mean" if mean else "none", work.backward and work.number != "W6"
        if work.measure in ("trace", "data set trace"):
            return flatcore.hessian_trace(features, weight, linear_bias=bias, reduction=reduction, log=log)
        measure = "layerwise" if question == "mean layerwise" else "neuronwise"
        return flatcore.relative_flatness(
            features, weight, linear_bias=bias, measure=measure, reduction=reduction, log=log
        )


def _rival(work: Work, form: rivals.Rival, x: Inputs) -> Any:
    if work.question == "row norms":
        return form(x.features)
    if work.question == "cotangent":
        return form(x.features, x.target)
    if work.question == "all fields":
        return form(*x.head, x.target)
    return form(*x.head)


def _log_mean(work: Work, form: rivals.Rival, x: Inputs) -> Tensor:
    """What a large head's gradient is taken of: the log of the mean."""
    found: Any = form(*x.head)
    return found if work.number == "W6" else found.mean().log()


def _ready(value: Value, x: Inputs) -> Callable[[], Any]:
    return lambda: value(x)


def _gradient(work: Work, value: Value, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """The gradients by features, W and bias: for W6 of a forward pass each time, else of one that was made before."""
    features, weight, bias = leaves = tuple(t.detach().clone().requires_grad_() for t in x.head)
    made = Inputs(features, weight, bias, x.target)

    def both() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(value(made), leaves)

    if work.number == "W6":
        return both
    with torch.enable_grad():
        result = value(made)
    return lambda: torch.autograd.grad(result, leaves, retain_graph=True)


def _linear_cross_entropy(options: Any, x: Inputs) -> Tensor:
    features, weight, bias = x.head
    chunks = {} if options is None else {"options": options}
    return torch.nn.functional.linear_cross_entropy(
        features, weight, x.labels, linear_bias=bias, reduction="none", **chunks
    )


def _neighbours(work: Work) -> tuple[list[Candidate], list[Absent]]:
    """torch's own fused loss of a head, for scale: it computes the loss alone."""
    name = "F.linear_cross_entropy"
    if not work.key.startswith(("W3-trace", "W4-trace")) or work.backward:  # once for each head
        return [], []
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return [], [Absent(name, f"torch {torch.__version__} does not have it")]
    return [Candidate(name, "neighbour", partial(_ready, partial(_linear_cross_entropy, None)), "the loss only")], []


def _eager_forms(work: Work) -> dict[str, rivals.Rival]:
    """The plain forms of whom the work is asked."""
    if not work.backward or work.number == "W6":
        forms = rivals.EAGER[work.question]
        few = work.N <= rivals.ROWS_PER_CHUNK  # one chunk has them all
        return {name: form for name, form in forms.items() if not (few and name.startswith("chunked"))}
    forms = rivals.WHOLE[work.measure]
    return {name: form for name, form in forms.items() if work.C <= 10_000 or "Gram" not in name}


def _candidate(work: Work, name: str, role: str, value: Value) -> Candidate:
    return Candidate(name, role, partial(_gradient, work, value) if work.backward else partial(_ready, value))


def flatcore_candidate(work: Work, backend: str = "native") -> Candidate:
    """flatcore's public function on one of its backends."""
    return _candidate(work, backend, backend, partial(_flatcore, work, backend))


def eager(work: Work, name: str, form: rivals.Rival, role: str = "eager") -> Candidate:
    """A plain form, or one that torch.compile made."""
    answer = _log_mean if work.backward else _rival
    return _candidate(
        work, f"{'torch.compile' if role == 'compile' else role}, {name}", role, partial(answer, work, form)
    )


def candidates(
    work: Work, *, native: bool = True, compile: bool = True, reference: bool = True
) -> tuple[list[Candidate], list[Absent]]:
    """Everyone who answers, in the order of the table; and who does not, with the reason."""
    if work.question == "training step":
        return training.candidates(work, native=native, compile=compile)
    found: list[Candidate] = []
    absent: list[Absent] = []
    if native:
        found.append(flatcore_candidate(work))
    else:
        absent.append(Absent("native", "left out by --no-native"))
    forms = _eager_forms(work)
    found += [eager(work, name, form) for name, form in forms.items()]
    if not work.backward:
        missing = [f"eager, {name}" for name in rivals.EAGER[work.question] if name not in forms]
        absent += [Absent(name, f"{work.N} rows are too few for chunks") for name in missing]
    if compile:
        if work.number == "W6" or not work.backward:
            name, form = rivals.compiled(work.question)
        else:
            name, form = next(iter(forms.items()))
            form = torch.compile(form, dynamic=False)
        found.append(eager(work, name, form, "compile"))
    neighbours, without = _neighbours(work)
    found += neighbours
    absent += without
    if work.question == "data set trace":
        tools, without = field.tools()
        found += tools
        absent += without
    if reference and not work.backward:
        found.append(flatcore_candidate(work, "reference"))
    return found, absent
