"""docs/conventions.md: each of its lines is run and compared with derivatives that torch takes of the loss it names.

Letters as on the page; everything float64, where no row is confident.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot, softplus

import flatcore

PAGE = Path(__file__).parents[1] / "docs" / "conventions.md"
N, D, C, K, T = 9, 5, 4, 3, 2.5
_g = torch.Generator().manual_seed(0)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_g).double()


x, W, b, y = _draw(N, D), _draw(C, D), _draw(C), torch.arange(N) % C
c = torch.tensor([0.5, 1.0, 2.0, 0.0]).double()
w, a, V, d = _draw(1, D), _draw(1), _draw(K, D), _draw(K)
model = nn.Sequential(nn.Linear(6, D), nn.Tanh(), nn.Linear(D, C)).double().eval()
inputs = _draw(N, 6)
NAMES = {
    "flatcore": flatcore, "torch": torch, "math": math, "softplus": softplus, "model": model, "inputs": inputs,
    "x": x, "W": W, "b": b, "y": y, "c": c, "w": w, "a": a, "V": V, "d": d, "N": N, "D": D, "C": C, "K": K, "T": T,
}  # fmt: skip


def hessian(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(loss, at)


def trace(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return hessian(loss, at).reshape(at.numel(), at.numel()).trace()


def rows(t: float = 1.0) -> Tensor:
    """Each sample's trace, of the loss at temperature t, which torch differentiates."""
    return torch.stack(
        [trace(lambda v, n=n: cross_entropy((x[n : n + 1] @ v.T + b) / t, y[n : n + 1]), W) for n in range(N)]
    )


def kappas() -> Tensor:
    return W.square().sum() * rows()


def petzka() -> Tensor:
    blocks = torch.einsum("ikjk->ij", hessian(lambda v: cross_entropy(x @ v.T + b, y), W))
    return ((W @ W.T) * blocks).sum()


def per_sample(at: Tensor, loss: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Norms of each sample's gradient."""
    return torch.stack([torch.autograd.functional.jacobian(lambda v, n=n: loss(v, n), at).norm() for n in range(N)])


def to_features(t: float = 1.0) -> Tensor:
    gradient = torch.autograd.functional.jacobian(lambda v: cross_entropy((v @ W.T + b) / t, y, reduction="sum"), x)
    return gradient.norm(dim=1)


def binary(reduction: str, v: Tensor, e: Tensor, at: Tensor) -> Tensor:
    labels = (torch.arange(N * v.shape[0]) % 2).reshape(N, -1).double()
    return trace(lambda u: binary_cross_entropy_with_logits(x @ u.T + e, labels, reduction=reduction), at)


def of_weight() -> Tensor:
    return per_sample(W, lambda v, n: cross_entropy(x[n : n + 1] @ v.T + b, y[n : n + 1]))


def both() -> Tensor:
    return trace(lambda v: cross_entropy(x @ v[:, :-1].T + v[:, -1], y), torch.cat([W, b[:, None]], dim=1))


def drawn_labels() -> Tensor:
    """Fisher: the squared gradient of each label, weighed by its probability."""
    p = (x @ W.T + b).softmax(1)
    total = 0.0
    for label in range(C):
        same = torch.full((N,), label)
        norms = per_sample(W, lambda v, n, same=same: cross_entropy(x[n : n + 1] @ v.T + b, same[n : n + 1]))
        total = total + (p[:, label] * norms.square()).mean()
    return total


def weighted() -> Tensor:
    return trace(lambda v: cross_entropy(x @ v.T + b, y, weight=c, reduction="sum"), W) / N


def standardised() -> Tensor:
    s = x.std(0)
    z, v, e = (x - x.mean(0)) / s, W * s, b + W @ x.mean(0)
    return v.square().sum() * trace(lambda u: cross_entropy(z @ u.T + e, y), v)


def product_of_sums() -> Tensor:
    p = (x @ W.T + b).softmax(1)
    return W.square().sum().sqrt() * x.square().sum() * (p * (1 - p)).sum()


def input_gradient() -> Tensor:
    return torch.autograd.functional.jacobian(lambda v: cross_entropy(model(v), y), inputs)


WANTED: dict[str, Callable[[], Tensor]] = {
    "trace of the mean loss's Hessian to the weight": lambda: trace(lambda v: cross_entropy(x @ v.T + b, y), W),
    "of the summed loss": lambda: trace(lambda v: cross_entropy(x @ v.T + b, y, reduction="sum"), W),
    "to weight **and** bias, as of every parameter of the layer": both,
    "÷ D: a mean over the features": lambda: rows().mean() / D,
    "mean eigenvalue: a mean over the layer's C·D parameters": lambda: torch.linalg.eigvalsh(
        hessian(lambda v: cross_entropy(x @ v.T + b, y), W).reshape(C * D, C * D)
    ).mean(),
    "H from the softmax at temperature T, without the 1/T²": lambda: T**2 * rows(T).mean(),
    "trace of the Fisher information (labels drawn from the model)": drawn_labels,
    "trace of the *empirical* Fisher (the data's labels)": lambda: of_weight().square().mean(),
    "class weights, divided by N": weighted,
    'κ = ‖W‖² Tr H (arXiv 2510.14231, "relative sharpness")': lambda: kappas().mean(),
    "κ = Σ ⟨w_s, w_s'⟩ Tr H_ss' (Petzka et al. 2021)": petzka,
    "‖W‖ Tr H: the first power": lambda: W.norm() * rows().mean(),
    "κ at temperature T, without the 1/T²": lambda: T**2 * W.square().sum() * rows(T).mean(),
    "two sums over the batch, multiplied: ‖W‖ Σ‖φ‖² Σ Σ p(1−p)": product_of_sums,
    "of standardised features, (φ − μ)/σ": standardised,
    "log κ of the data set": lambda: kappas().mean().log(),
    "the mean of log κ": lambda: kappas().log().mean(),
    "log(1 + κ), a regulariser that starts at 0": lambda: kappas().mean().log1p(),
    "log₁₀ κ": lambda: kappas().mean().log10(),
    "‖∇_φ ℓ‖²": lambda: to_features() ** 2,
    "the norm with the gradient of the mean loss, as `.grad` holds it": lambda: to_features() / N,
    "‖∇_φ ℓ‖ at temperature T, without the 1/T": lambda: T * to_features(T),
    "EL2N: ‖p − e_y‖": lambda: ((x @ W.T + b).softmax(1) - one_hot(y, C)).norm(dim=1),
    "GraNd of the last layer's weight: ‖∇_W ℓ‖": of_weight,
    "input gradient of the mean loss": input_gradient,
    "trace under binary cross-entropy": lambda: binary("mean", w, a, w),
    "κ under binary cross-entropy, layerwise": lambda: w.square().sum() * binary("mean", w, a, w),
    "κ under binary cross-entropy, neuronwise (for one output the same)": lambda: (
        w.square().sum() * binary("mean", w, a, w)
    ),
    "K outputs, the loss summed over them": lambda: binary("sum", V, d, V) / N,
    'K outputs, torch\'s `"mean"` over N·K': lambda: binary("mean", V, d, V),
}


def lines() -> dict[str, str]:
    """What each row of the page's tables names, and its line."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 3 and cells[0] != "elsewhere":
            code = re.fullmatch(r"`(.+)`", cells[2])
            assert code, f"no single line of code in: {line}"
            assert cells[0] not in found, f"two rows of one name: {cells[0]}"
            found[cells[0]] = code[1]
    return found


def test_every_row_of_the_page_has_its_truth() -> None:
    assert sorted(lines()) == sorted(WANTED)


@pytest.mark.parametrize("name", WANTED)
def test_the_line_gives_the_number(name: str) -> None:
    torch.set_default_dtype(torch.float64)  # torch.eye in a line is of the features' dtype
    try:
        with torch.no_grad():
            got = eval(lines()[name], dict(NAMES))
        want = WANTED[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    # torch's derivatives form 1 - p: with no p above 0.999 they err by 1e-13
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_no_row_is_confident() -> None:
    assert (x @ W.T + b).softmax(1).max() < 0.999
    assert (model(inputs)).softmax(1).max() < 0.999
