"""What the field's tools need for W7, the exact trace of a head's Hessian over a data set.

Each is used as its documentation says, on a plain ``torch.nn.Linear`` and ``CrossEntropyLoss``, the bias held fixed, so that
all are after the Hessian by W alone. The samplers take 100 products with random vectors, as many as PyHessian's default.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .candidate import Absent, Candidate
from .inputs import Inputs

SAMPLES = 100
INSTALL = (
    "pip install --no-deps backpack-for-pytorch==1.7.1 curvlinops-for-pytorch==3.0.1 pyhessian==0.1 "
    "hessian-eigenthings==1.0.0a5 einops einconv unfoldNd linear_operator opt-einsum jaxtyping wadler-lindig mpmath scipy "
    "tqdm"
)
"""Without what they ask for besides: BackPACK wants torchvision, which it does not import, and with it another torch."""


def _linear(x: Inputs) -> nn.Linear:
    _, weight, bias = x.head
    model = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        model.weight.copy_(weight)
        model.bias.copy_(bias)
    model.bias.requires_grad_(False)
    return model


def _backpack(name: str, x: Inputs) -> Callable[[], Tensor]:
    """One backward pass that carries the Hessian's diagonal, of the mean loss or of each sample's."""
    import backpack
    from backpack import extensions

    model, loss = backpack.extend(_linear(x)), backpack.extend(nn.CrossEntropyLoss())
    extension, saved = {
        "DiagHessian": (extensions.DiagHessian, "diag_h"),
        "BatchDiagHessian": (extensions.BatchDiagHessian, "diag_h_batch"),
    }[name]

    def run() -> Tensor:
        model.weight.grad = None
        with torch.enable_grad(), backpack.backpack(extension()):
            loss(model(x.features), x.labels).backward()
        found: Tensor = getattr(model.weight, saved)
        return found.sum()

    return run


def _curvlinops(x: Inputs) -> Callable[[], Tensor]:
    from curvlinops import HessianLinearOperator, hutchinson_trace

    model, loss, data = _linear(x), nn.CrossEntropyLoss(), [(x.features, x.labels)]

    def run() -> Tensor:
        operator = HessianLinearOperator(model, loss, [model.weight], data, check_deterministic=False)
        found: Tensor = hutchinson_trace(operator, num_matvecs=SAMPLES)
        return found.detach()

    return run


def _pyhessian(x: Inputs) -> Callable[[], Tensor]:
    from pyhessian import hessian

    model, loss, data = _linear(x), nn.CrossEntropyLoss(), (x.features, x.labels)

    def run() -> Tensor:
        model.weight.grad = None
        with torch.enable_grad():
            found = hessian(model, loss, data=data, cuda=x.features.is_cuda).trace(maxIter=SAMPLES, tol=0.0)
        return torch.tensor(sum(found) / len(found))

    return run


def _eigenthings(method: str, x: Inputs) -> Callable[[], Tensor]:
    import hessian_eigenthings

    model, data = _linear(x), [(x.features, x.labels)]

    def run() -> Tensor:
        with torch.enable_grad():
            operator = hessian_eigenthings.HessianOperator(
                model, data, hessian_eigenthings.supervised_loss(nn.functional.cross_entropy)
            )
            found = hessian_eigenthings.trace(operator, num_matvecs=SAMPLES, method=method)
        return torch.tensor(found.estimate)

    return run


def _dense(x: Inputs) -> Callable[[], Tensor]:
    """The whole (CD, CD) Hessian of the mean loss, and the sum of its diagonal."""
    features, weight, bias = x.head

    def loss(w: Tensor) -> Tensor:
        return nn.functional.cross_entropy(nn.functional.linear(features, w, bias), x.labels)

    # 256 rows at a time: with all 5,120 each of its (rows, N, C) products takes 210 MB
    second = torch.func.jacrev(torch.func.grad(loss), chunk_size=256)

    def run() -> Tensor:
        found: Tensor = second(weight)
        return found.reshape(weight.numel(), weight.numel()).trace()

    return run


def _one_image(x: Inputs) -> Callable[[], Tensor]:
    """The closed form in a loop over the samples, as published code has it."""
    features, weight, bias = x.head

    def run() -> Tensor:
        total = features.new_zeros(())
        for row in features:
            p = torch.softmax(weight @ row + bias, 0)
            total += row.dot(row) * (p * (1 - p)).sum()
        return total / len(features)

    return run


_TOOLS: tuple[tuple[str, str, str | None, Callable[[Inputs], Callable[[], Any]], str], ...] = (
    ("BackPACK DiagHessian", "tool", "backpack", partial(_backpack, "DiagHessian"), "the diagonal"),
    ("BackPACK BatchDiagHessian", "tool", "backpack", partial(_backpack, "BatchDiagHessian"), "the diagonal, per sample"),
    ("curvlinops Hutchinson", "sampling", "curvlinops", _curvlinops, f"{SAMPLES} samples"),
    ("PyHessian", "sampling", "pyhessian", _pyhessian, f"{SAMPLES} samples"),
    ("hessian-eigenthings Hutchinson", "sampling", "hessian_eigenthings", partial(_eigenthings, "hutchinson"),
     f"{SAMPLES} samples"),
    ("hessian-eigenthings Hutch++", "sampling", "hessian_eigenthings", partial(_eigenthings, "hutch++"),
     f"{SAMPLES // 3 * 3} products"),
    ("torch.func dense Hessian", "tool", None, _dense, "all of it"),
    ("one image at a time", "tool", None, _one_image, "per sample"),
)  # fmt: skip


def tools() -> tuple[list[Candidate], list[Absent]]:
    """Those that can be imported; and the others, with what was missing."""
    found, absent = [], []
    for name, role, package, prepare, note in _TOOLS:
        try:
            if package is not None:
                importlib.import_module(package)
        except Exception as error:  # a package that is there may fail on a newer torch in any way
            absent.append(Absent(name, f"cannot be imported ({type(error).__name__}: {error})"))
        else:
            found.append(Candidate(name, role, prepare, note, is_quick=prepare is not _dense))
    return found, absent
