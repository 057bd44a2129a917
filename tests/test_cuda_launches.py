"""What a small head's measure asks of a CUDA device, by count: launches, allocations, and what waits for it.

The Python path is the real one, over emulated threads (counting.py).

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import emulation
import pytest
import torch
from counting import Counter, on_the_kernels_path
from torch import Tensor

import flatcore
from flatcore._check.tolerance import assert_same
from flatcore._engine import paths, proof

W6 = 128, 512, 10


@pytest.fixture(autouse=True)
def counted_path() -> Iterator[None]:
    with on_the_kernels_path():
        yield


def w6(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, weight, bias and labels of one training step."""
    N, D, C = W6
    g = torch.Generator().manual_seed(6)
    x, w, b = torch.randn(N, D, generator=g), torch.randn(C, D, generator=g) / 16, torch.randn(C, generator=g)
    return *(t.to(dtype).requires_grad_() for t in (x, w, b)), torch.arange(N) % C


MEASURES: dict[str, Callable[..., Tensor]] = {
    "trace": lambda x, w, y, **options: flatcore.hessian_trace(x, w, y, **options),
    "layerwise": lambda x, w, y, **options: flatcore.relative_flatness(x, w, y, **options),
    "neuronwise": lambda x, w, y, **options: flatcore.relative_flatness(x, w, y, measure="neuronwise", **options),
} | {
    f"gradient-{ord}": lambda x, w, y, ord=ord, **options: flatcore.feature_gradient_norms(
        x, w, y, ord=ord, reduction="mean", **options
    )
    for ord in (1, 2, math.inf)
}  # fmt: skip


def counts(call: Callable[[], Any]) -> tuple[Any, tuple[int, int]]:
    with Counter() as counter:
        result = call()
    assert counter.waits == 0
    return result, (counter.launches, counter.allocations)


def test_the_counter_counts() -> None:
    x = torch.ones(3)
    with Counter() as counter:
        y = x.new_empty(3)  # an allocation
        y.copy_(x)  # a launch
        y[1:].view(2, 1).expand(2, 2)
        (x + y).sum()  # two of both
        flatcore.row_norms(x[None])  # norms and workspace; its kernel
    assert (counter.allocations, counter.launches) == (1 + 2 + 2, 1 + 2 + 1)
    with Counter() as counter:
        x.sum().item()
    assert counter.waits == 1


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", MEASURES)
def test_a_training_step_of_a_small_head(name: str, dtype: torch.dtype) -> None:
    """At most 4 launches and 3 allocations forward, 8 and 8 forward and backward: the goals of W6."""
    x, w, _, y = w6(dtype)
    labels = y if name.startswith("gradient") else None
    one = torch.ones(())  # autograd's own root
    value, forward = counts(lambda: MEASURES[name](x, w, labels))
    assert paths.last_path == "fused" and forward == (2, 2)  # rows, their total; value, logs
    gradients, backward = counts(lambda: torch.autograd.grad(value, (x, w), one))
    assert paths.last_path == "fused" and backward == (2, 3)  # rows, sums over them; two gradients, workspace
    assert [g.dtype for g in gradients] == [dtype] * 2
    _, alone = counts(lambda: MEASURES[name](x.detach(), w.detach(), labels))
    assert alone == (2, 2)


@pytest.mark.parametrize("include_bias", (False, True))
def test_a_training_step_with_bias_and_labels(include_bias: bool) -> None:
    (x, w, b, y), one = w6(), torch.ones(())
    value, forward = counts(
        lambda: flatcore.relative_flatness(x, w, y, linear_bias=b, include_bias=include_bias, log=True)
    )
    # the bias in float64, once each way; where it counts its -inf become NaN, by three operators of the framework
    checked = 3 if include_bias else 0
    assert forward == (3 + checked, 3 + checked)
    gradients, backward = counts(lambda: torch.autograd.grad(value, (x, w, b), one))
    # three gradients, workspace; where it counts, the gradient of those three operators
    assert backward[0] <= 3 + checked and backward[1] <= 5 + checked
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_class_weights_are_no_operators_of_their_own(reduction: str) -> None:
    x, w, _, y = w6()
    y[3] = -100
    weight = torch.rand(W6[2])
    call = functools.partial(flatcore.hessian_trace, x, w, y, weight=weight, reduction=reduction)
    value, forward = counts(call)
    assert forward == (2, 2)
    with flatcore.backend("reference"):
        torch.testing.assert_close(value, call(), rtol=1e-5, atol=0)


def test_the_counts_do_not_grow_with_the_rows() -> None:
    (_, D, C), one = W6, torch.ones(())
    for N in (1, 3000):
        x = torch.randn(N, D // 8).requires_grad_()
        w = torch.randn(C, D // 8).requires_grad_()
        value, forward = counts(lambda x=x, w=w: flatcore.relative_flatness(x, w))
        _, backward = counts(lambda value=value, x=x, w=w: torch.autograd.grad(value, (x, w), one))
        assert forward == (2, 2) and backward == (2, 3)


@pytest.mark.parametrize("order", emulation.ORDERS)
def test_no_gradient_depends_on_the_order_of_the_threads(order: str) -> None:
    N, D, C = 21, 70, 10
    g = torch.Generator().manual_seed(0)
    x, w, y = torch.randn(N, D, generator=g), torch.randn(C, D, generator=g), torch.arange(N) % C

    def gradients() -> list[Tensor]:
        found = []
        for measure in MEASURES.values():
            inputs = x.clone().requires_grad_(), w.clone().requires_grad_()
            value = measure(*inputs, y)
            found += [value.detach(), *torch.autograd.grad(value, inputs)]
        return found

    want = gradients()
    with emulation.emulated(order):
        for a, b in zip(gradients(), want, strict=True):
            assert_same(order, a, b)


# ------------------------------------------------------------------------------------------- what the goal must not cost
KINDS = {
    "halves apart": (torch.float16, torch.bfloat16, None),
    "half and float": (torch.bfloat16, torch.float32, None),
    "float and double": (torch.float32, torch.float64, None),
    "logits": (torch.float32, torch.float32, torch.float32),
    "double logits": (torch.float32, torch.float32, torch.float64),
    "half logits": (torch.bfloat16, torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MEASURES)
def test_dtypes_apart_strides_and_given_logits_agree_with_the_reference(name: str, kind: str) -> None:
    N, D, C = 11, 37, 18
    g = torch.Generator().manual_seed(1)
    of_features, of_weight, of_logits = KINDS[kind]
    x = torch.randn(D, N, generator=g).to(of_features).T.requires_grad_()
    w = torch.randn(C, 2 * D, generator=g).to(of_weight)[:, ::2].requires_grad_()
    b = torch.randn(2 * C, generator=g)[::2].requires_grad_()
    z = None if of_logits is None else (4 * torch.randn(N, C, generator=g)).to(of_logits).requires_grad_()
    y = torch.arange(N) % C
    y[4] = -100
    inputs = [t for t in (x, w, b if z is None else None, z) if t is not None]

    def value_and_gradients() -> list[Tensor]:
        value = MEASURES[name](x, w, y, linear_bias=b, logits=z, temperature=1.5, log=True)
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    got = value_and_gradients()
    assert paths.last_path == "fused"
    with flatcore.backend("reference"):
        want = value_and_gradients()
    for a, exact in zip(got, want, strict=True):
        assert a.dtype == exact.dtype and a.shape == exact.shape
        # both round to the dtype; before that, in float32, sums of up to N + D + C terms that are 30 times an entry at most
        unit = torch.finfo(a.dtype).eps + 30 * 2.0**-24 * math.sqrt(N + D + C)
        torch.testing.assert_close(a.double(), exact.double(), rtol=0, atol=unit * exact.abs().max().item())


@pytest.mark.parametrize("power", (-900, -40, 40, 900))
def test_weights_far_from_one_have_gradients_as_much_smaller_or_larger(power: int) -> None:
    """W and the bias times 2^e: log Var_p(w) gains 2 e log 2, and its derivative by W is 2^-e times as large."""
    g = torch.Generator().manual_seed(3)
    x, w = (torch.randn(n, 9, generator=g, dtype=torch.float64) for n in (5, 4))
    b, z = torch.randn(4, generator=g, dtype=torch.float64), torch.randn(5, 4, generator=g, dtype=torch.float64)

    def value_and_gradients(scale: float) -> tuple[Tensor, ...]:
        inputs = [t.requires_grad_() for t in (x.clone(), w * scale, b * scale)]
        call = functools.partial(
            flatcore.relative_flatness, logits=z, include_bias=True, measure="neuronwise", log=True
        )
        value = call(inputs[0], inputs[1], linear_bias=inputs[2])
        return value.detach(), *torch.autograd.grad(value, inputs)

    got, want = value_and_gradients(2.0**power), value_and_gradients(1.0)
    assert paths.last_path == "fused"
    moved = got[0] - 2 * power * math.log(2), got[1], *(2.0**power * gradient for gradient in got[2:])
    for one, exact in zip(moved, want, strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-12, atol=1e-12 * exact.abs().max().item())


@pytest.mark.parametrize(
    ("name", "N"),
    (
        ("trace", 4200),
        ("neuronwise", 1100),
        pytest.param("layerwise", 4200, marks=pytest.mark.exhaustive),
        pytest.param("gradient-1", 1100, marks=pytest.mark.exhaustive),
    ),
)
def test_blocks_go_on_to_further_rows(name: str, N: int) -> None:
    """More rows than a grid of 1,024 blocks has at a time; every tenth is ignored, and holds NaN."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(N, 3, generator=g, dtype=torch.float64).requires_grad_()
    w = torch.randn(3, 3, generator=g, dtype=torch.float64).requires_grad_()
    y = torch.arange(N) % 3
    y[::10] = -100
    with torch.no_grad():
        x[::10] = math.nan

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(MEASURES[name](x, w, y), (x, w))

    got = gradients()
    assert paths.last_path == "fused"
    with flatcore.backend("reference"):
        want = gradients()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=N * 2.0**-53 * b.abs().max().item())


def test_a_gradient_beyond_its_dtype_is_infinite_as_the_frameworks_own() -> None:
    x = torch.randn(6, 5, dtype=torch.float64).half().requires_grad_()
    w = (100 * torch.randn(4, 5, dtype=torch.float64)).half()
    for scale in (1.0, 1e9):
        with flatcore.backend("reference"):
            (want,) = torch.autograd.grad(flatcore.relative_flatness(x, w, temperature=100.0) * scale, x)
        (got,) = torch.autograd.grad(flatcore.relative_flatness(x, w, temperature=100.0) * scale, x)
        assert got.isinf().any() == (scale > 1)
        torch.testing.assert_close(got, want, rtol=2**-9, atol=2**-20)


# ------------------------------------------------------------------------------------------------------- which path
def small(N: int, D: int, C: int = 10) -> Any:
    fields = {"layerwise": 1 << 5, "neuronwise": 1 << 6}
    return {name: type("Call", (), {"N": N, "D": D, "C": C, "fields": bit}) for name, bit in fields.items()}


def test_which_path_a_measure_takes() -> None:
    both, one = proof.paths_of("head_metrics_backward"), frozenset({"chunked"})

    def chosen(name: str, usable: frozenset[str] = both, **shape: int) -> str:
        return paths.of_measure_on_cuda(small(**shape)[name], 32, usable)

    assert chosen("layerwise", N=128, D=512) == "fused"
    assert chosen("layerwise", N=128, D=512, usable=one) == "chunked"
    assert chosen("layerwise", N=128, D=512, C=33) == "chunked"
    assert chosen("layerwise", N=1 << 20, D=512) == "chunked"
    assert chosen("layerwise", N=1 << 20, D=512, usable=frozenset({"fused"})) == "fused"
    assert chosen("layerwise", N=1 << 20, D=512, usable=frozenset()) == "chunked"
    assert chosen("layerwise", N=1 << 14, D=4096) == "fused"
    assert chosen("neuronwise", N=1 << 14, D=4096) == "chunked"
    with paths.forced("chunked"):
        assert chosen("layerwise", N=128, D=512) == "chunked"


@pytest.mark.parametrize("stem", ("head_metrics", "head_metrics_backward"))
def test_a_measure_needs_the_proof_of_its_values_and_its_gradients(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a check says of the fused kernels of either keeps the fused measure from being taken."""
    among = proof.among
    monkeypatch.setattr(proof, "among", lambda index, s: among(index, s) - ({"fused"} if s == stem else set()))
    x, w, _, _ = w6()
    value, forward = counts(lambda: flatcore.relative_flatness(x, w))
    assert forward[0] > 4
    torch.autograd.grad(value, (x, w))
    assert paths.last_path == ("fused" if stem == "head_metrics" else "chunked")
