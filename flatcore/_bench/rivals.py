"""The best that a competent user writes today in plain PyTorch, and torch.compile of it.

Closed forms with ``vector_norm``, one ``log_softmax`` and the Gram matrix; no N x D temporaries. For each work several
plain forms were timed, and only the fastest are kept. The rule: whoever finds a faster plain form replaces ours.

What was tried, in milliseconds, on 2 cores of an AMD EPYC with AVX-512 (torch 2.13):

- all fields, N=100,000, D=512, C=10: row-major logits 42; class-major logits (W features^T) 56; row chunks of 1024 to
  8192 48-68; blocks of 1000 rows through one batched product, class-major within the block, 25-29 (the product alone
  takes 32 of the 42: the library splits one with ten columns badly). Compiled: row-major 33, class-major 51, blocks
  21-23. N=50,000, D=640, C=100: rows 88-105, blocks 77-93; compiled 88-94 and 67. ``topk(2)`` for the margin costs
  more than ``max``, ``scatter`` and ``amax``.
- squared norms: ``vector_norm`` 6, ``einsum`` 31, ``linalg.vecdot`` 62.
- trace, N=8192, D=2048, C=1000: softmax and ``vector_norm`` of p 170; ``log_softmax().exp()`` and sum of squares 185;
  row chunks 170. Neuronwise: Gram matrix 280; ``p @ W`` 368.
- row norms, 512 x 150,528: three ``vector_norm`` calls 141; ``abs``, ``sum``, ``vector_norm``, ``amax`` over the
  whole matrix 190-380; the same over a few rows at a time, which stay in the cache, 18-32, fastest with one buffer and
  16 rows. Compiled sums 9.5.

They lose every digit of a confident row (1 - sum p^2 is 0 or noise in float32 from a logit gap of 17 on): that is not
repaired here, a user's closed form has it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import linear

Rival = Callable[..., object]

ROWS_PER_BLOCK = 1000  # 250, 500 and 2500 are 3-15 % slower
ROWS_PER_CHUNK = 256  # of a vocabulary head's logits: 32 MB at C = 32,000
ROWS_IN_CACHE = 16  # of the row-norm matrix: 10 MB, a third of the machine's L3


def all_fields_rows(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Return ten values per row, from row-major logits.

    Prediction, confidence, margin, 1 - confidence, ||phi||, trace, layerwise, neuronwise, loss, gradient norm.
    """
    z = linear(features, weight, bias)  # (N, C)
    log_p = z.log_softmax(1)
    p = log_p.exp()
    top, prediction = z.max(1)
    margin = top - z.scatter(1, prediction.unsqueeze(1), -torch.inf).amax(1)
    confidence = p.amax(1)
    norm = vector_norm(features, dim=1)
    n = norm * norm
    gram = weight @ weight.T
    square = gram.diagonal()
    trace = n * (1 - (p * p).sum(1))
    p_gram = p @ gram
    quadratic = (p_gram * p).sum(1)
    y = target.unsqueeze(1)
    gradient = (quadratic - 2 * p_gram.gather(1, y).squeeze(1) + square[target]).clamp_min(0).sqrt()
    return (prediction, confidence, margin, 1 - confidence, norm, trace, trace * square.sum(),
            n * (p @ square - quadratic), -log_p.gather(1, y).squeeze(1), gradient)  # fmt: skip


def all_fields_blocks(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Return the same ten values from blocks of 1000 rows in one batched product, class-major within the block."""
    count, classes = features.shape[0], weight.shape[0]
    blocks = count // ROWS_PER_BLOCK if count % ROWS_PER_BLOCK == 0 else 1
    phi = features.view(blocks, -1, features.shape[1])
    y = target.view(blocks, 1, -1)
    z = torch.baddbmm(bias.unsqueeze(1), weight.expand(blocks, -1, -1), phi.mT)  # (blocks, C, rows)
    log_p = z.log_softmax(1)
    p = log_p.exp()
    top, prediction = z.max(1)
    margin = top - z.scatter(1, prediction.unsqueeze(1), -torch.inf).amax(1)
    confidence = p.amax(1)
    norm = vector_norm(phi, dim=2)
    n = norm * norm
    gram = weight @ weight.T
    square = gram.diagonal()
    trace = n * (1 - (p * p).sum(1))
    p_gram = torch.bmm(gram.expand(blocks, classes, classes), p)
    quadratic = (p_gram * p).sum(1)
    spread = (square.unsqueeze(1) * p).sum(1) - quadratic
    at_target = square[target].view(blocks, -1) - 2 * p_gram.gather(1, y).squeeze(1)
    gradient = (quadratic + at_target).clamp_min(0).sqrt()
    values = (prediction, confidence, margin, 1 - confidence, norm, trace, trace * square.sum(), n * spread,
              -log_p.gather(1, y).squeeze(1), gradient)  # fmt: skip
    return tuple(value.reshape(-1) for value in values)


def trace(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Tr H of each row, (N,), from the whole (N, C) matrix of probabilities."""
    p = linear(features, weight, bias).softmax(1)
    norm, norm_p = vector_norm(features, dim=1), vector_norm(p, dim=1)
    return norm * norm * (1 - norm_p * norm_p)


def neuronwise_gram(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """||phi||^2 Var_p(w) of each row, (N,), through W W^T: fewer operations where C < D."""
    p = linear(features, weight, bias).softmax(1)
    norm = vector_norm(features, dim=1)
    gram = weight @ weight.T
    return norm * norm * (p @ gram.diagonal() - ((p @ gram) * p).sum(1))


def neuronwise_mean(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """||phi||^2 Var_p(w) of each row, (N,), through the mean row p W: fewer operations where C > D."""
    p = linear(features, weight, bias).softmax(1)
    norm, norm_mean, norm_rows = (
        vector_norm(features, dim=1),
        vector_norm(p @ weight, dim=1),
        vector_norm(weight, dim=1),
    )
    return norm * norm * (p @ (norm_rows * norm_rows) - norm_mean * norm_mean)


def chunked(form: Callable[..., Tensor], rows: int = ROWS_PER_CHUNK) -> Callable[..., Tensor]:
    """Run a form over chunks of rows, so that no (N, C) matrix exists."""

    def run(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat([form(some, weight, bias) for some in features.split(rows)])

    return run


def chunked_as_liger(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run a form over chunks of as many rows as Liger-Kernel's fused linear cross-entropy takes.

    The chunk's logits are then no larger than the features: N over ceil(C / D), rounded up to a power of two.
    """

    def run(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = -(-features.shape[0] // -(-weight.shape[0] // features.shape[1]))
        return chunked(form, 1 << (rows - 1).bit_length())(features, weight, bias)

    return run


def mean_trace(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean of Tr H over the data set: the trace of the Hessian of its mean loss by W."""
    p = linear(features, weight, bias).softmax(1)
    norm, norm_p = vector_norm(features, dim=1), vector_norm(p, dim=1)
    return torch.dot(norm * norm, 1 - norm_p * norm_p) / features.shape[0]


def mean_layerwise(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean of ||W||_F^2 Tr H over the batch."""
    p = linear(features, weight, bias).softmax(1)
    norm, norm_p, norm_w = vector_norm(features, dim=1), vector_norm(p, dim=1), vector_norm(weight)
    return torch.dot(norm * norm, 1 - norm_p * norm_p) * (norm_w * norm_w / features.shape[0])


def row_norms_three_calls(x: Tensor) -> Tensor:
    """L1, L2 and L-infinity, (3, N), from three library calls."""
    return torch.stack([vector_norm(x, ord=p, dim=1) for p in (1, 2, torch.inf)])


def row_norms_in_cache(x: Tensor) -> Tensor:
    """Return the same, a few rows at a time through one buffer: all passes but the first stay in the cache."""
    out, buffer = x.new_empty(3, x.shape[0]), torch.empty_like(x[:ROWS_IN_CACHE])
    for start in range(0, x.shape[0], ROWS_IN_CACHE):
        rows = x[start : start + ROWS_IN_CACHE]
        l1, l2, largest = out[:, start : start + ROWS_IN_CACHE].unbind(0)
        a = torch.abs(rows, out=buffer[: rows.shape[0]])
        torch.sum(a, 1, out=l1)
        vector_norm(a, dim=1, out=l2)
        torch.amax(a, 1, out=largest)
    return out


def row_norms_sums(x: Tensor) -> Tensor:
    """Return the three sums as torch.compile fuses them into one read."""
    a = x.abs()
    return torch.stack([a.sum(1), (x * x).sum(1).sqrt(), a.amax(1)])


def cross_entropy_autograd(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (N,) and the usual gradient p - e_y (N, C), as attacks take them."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def cross_entropy_in_place(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same from one (N, C) buffer."""
    gradient, y = logits.log_softmax(1), target.unsqueeze(1)
    loss = -gradient.gather(1, y).squeeze(1)
    gradient.exp_().scatter_add_(1, y, gradient.new_full(y.shape, -1.0))
    return loss, gradient


def cross_entropy_pure(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same without writing in place, for torch.compile."""
    log_p = logits.log_softmax(1)
    loss = -log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    label = torch.arange(logits.shape[1], device=logits.device) == target.unsqueeze(1)
    return loss, log_p.exp() - label.to(logits.dtype)


EAGER: dict[str, dict[str, Rival]] = {
    "all fields": {"blocks": all_fields_blocks, "rows": all_fields_rows},
    "trace": {"whole": trace},
    "neuronwise": {"whole, Gram": neuronwise_gram},
    "trace, chunked": {"whole": trace, "chunked": chunked(trace), "chunked as Liger": chunked_as_liger(trace)},
    "neuronwise, chunked": {
        "whole, p W": neuronwise_mean,
        "chunked, p W": chunked(neuronwise_mean),
        "chunked as Liger, p W": chunked_as_liger(neuronwise_mean),
    },
    "row norms": {"in cache": row_norms_in_cache, "three vector_norm": row_norms_three_calls},
    "mean layerwise": {"whole": mean_layerwise},
    "data set trace": {"whole": mean_trace},
    "cotangent": {"cross_entropy, autograd": cross_entropy_autograd, "in place": cross_entropy_in_place},
}
"""The plain forms shown for each question; the fastest in the run is *best eager*."""


WHOLE: dict[str, dict[str, Rival]] = {
    "trace": {"whole": trace},
    "neuronwise": {"whole, Gram": neuronwise_gram, "whole, p W": neuronwise_mean},
}
"""The forms of whom a gradient is taken: autograd keeps every chunk's logits too. Above 10,000 classes without W W^T."""


def compiled(question: str) -> tuple[str, Rival]:
    """Return the form that torch.compile makes fastest, compiled for fixed shapes, and its name."""
    if question == "all fields":
        return "blocks", torch.compile(all_fields_blocks, dynamic=False)
    if question == "row norms":
        return "three sums", torch.compile(row_norms_sums, dynamic=False)
    if question == "cotangent":
        return "pure", torch.compile(cross_entropy_pure, dynamic=False)
    if question == "trace, chunked":
        return "chunked", chunked(torch.compile(trace, dynamic=False))
    if question == "neuronwise, chunked":
        return "chunked, p W", chunked(torch.compile(neuronwise_mean, dynamic=False))
    name, form = next(iter(EAGER[question].items()))
    return name, torch.compile(form, dynamic=False)
