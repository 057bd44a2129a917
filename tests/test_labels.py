"""Labels of every integer dtype mean their value, in every function and on every path, whatever ``ignore_index`` is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flatcore
from flatcore import robustness

DTYPES = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
C = 300  # more classes than 8 bits hold
IGNORED = (-100, -1, 0, 5, 100, 156, 255, 65_436, 2**40, -(2**63), 2**63 - 1)


def _head(dtype: torch.dtype, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, weight and labels that the dtype holds, among them those that ``ignore_index`` may be taken for."""
    generator = torch.Generator().manual_seed(3)
    bits = torch.iinfo(dtype)
    labels = [y for y in (0, 1, 5, 99, 100, 127, 156, 200, 255, 299) if y <= bits.max]
    if bits.min <= ignore_index <= bits.max:
        labels += [ignore_index]
    target = torch.tensor(labels, dtype=torch.int64)
    features, weight = (torch.randn(n, 6, generator=generator) for n in (len(labels), C))
    return features, weight, target


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "hessian_trace": lambda x, w, y, i: flatcore.hessian_trace(x, w, y, ignore_index=i),
    "hessian_trace, weighted": lambda x, w, y, i: flatcore.hessian_trace(
        x, w, y, ignore_index=i, weight=torch.arange(1.0, C + 1), reduction="none"
    ),
    "relative_flatness": lambda x, w, y, i: flatcore.relative_flatness(x, w, y, ignore_index=i, measure="neuronwise"),
    "feature_gradient_norms": lambda x, w, y, i: flatcore.feature_gradient_norms(x, w, y, ignore_index=i, log=True),
    "head_metrics": lambda x, w, y, i: flatcore.head_metrics(x, w, y, ignore_index=i).loss,
    "unmasked_cross_entropy": lambda x, w, y, i: flatcore.unmasked_cross_entropy(
        x @ w.T, y, ignore_index=i, reduction="none"
    ),
    "unmasked_cross_entropy, mean": lambda x, w, y, i: flatcore.unmasked_cross_entropy(
        x @ w.T, y, ignore_index=i, reduction="mean"
    ),
    "unmasked_cross_entropy, gradient": lambda x, w, y, i: _gradient(
        lambda z: flatcore.unmasked_cross_entropy(z, y, ignore_index=i), x @ w.T
    ),
    "gradient of the trace": lambda x, w, y, i: _gradient(lambda z: flatcore.hessian_trace(z, w, y, ignore_index=i), x),
    "gradient of a norm": lambda x, w, y, i: _gradient(
        lambda z: flatcore.feature_gradient_norms(z, w, y, ignore_index=i, reduction="mean"), x
    ),
    "input_gradients": lambda x, w, y, i: flatcore.input_gradients(lambda x: x @ w.T, x, y, ignore_index=i).direction,
    "input_gradient_norms": lambda x, w, y, i: flatcore.input_gradient_norms(
        lambda x: x @ w.T, x, y, ignore_index=i, chunk_size=3
    ),
}


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


@pytest.fixture(params=("reference", "native"))
def engine(request: pytest.FixtureRequest, one_thread: None) -> Any:
    with flatcore.backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_label_is_its_value(name: str, dtype: torch.dtype, engine: str) -> None:
    for ignore_index in IGNORED:
        features, weight, target = _head(dtype, ignore_index)
        want = FUNCTIONS[name](features, weight, target, ignore_index)
        got = FUNCTIONS[name](features, weight, target.to(dtype), ignore_index)
        assert torch.equal(got, want) or (got.isnan() & want.isnan()).all(), ignore_index


@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index"),
    (
        (torch.uint8, 156, -100), (torch.uint8, 255, -1), (torch.uint16, 65_436, -100), (torch.uint8, 0, 256),
        (torch.int8, -100, 156), (torch.uint32, 2**32 - 100, -100), (torch.uint64, 2**64 - 100, -100),
        (torch.uint64, 2**64 - 1, 2**63 - 1),
    ),
)  # fmt: skip
def test_what_a_dtype_does_not_hold_ignores_nothing(
    dtype: torch.dtype, label: int, ignore_index: int, engine: str
) -> None:
    """The label is a class, with its loss, or it is no class, and refused; never ignored."""
    y = torch.from_numpy(np.array([label, label], dtype=str(dtype).removeprefix("torch.")))
    for name, function in FUNCTIONS.items():
        features, weight = torch.randn(2, 6), torch.randn(C, 6)
        if 0 <= label < C:
            want = FUNCTIONS[name](features, weight, torch.full((2,), label), -100)
            assert torch.equal(function(features, weight, y, ignore_index), want), name
        else:
            with pytest.raises(ValueError, match="target must hold labels in 0"):
                function(features, weight, y, ignore_index)


def test_an_image_of_class_156_has_its_loss() -> None:
    """The case by hand: cross-entropy of 200 equal logits is log 200, ignored it would be 0."""
    z = torch.zeros(2, 200)
    y = torch.tensor([156, 199], dtype=torch.uint8)
    loss = flatcore.unmasked_cross_entropy(z, y, reduction="none")
    assert torch.allclose(loss, torch.full((2,), 200.0).log())
    direction = flatcore.input_gradients(lambda x: x, z, y).direction
    assert direction[0, 156] == -1 and direction[1, 199] == -1


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("gradient", ("exact", "usual"))
def test_attacks_move_every_image(dtype: torch.dtype, gradient: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 200)).eval()
    labels = torch.tensor([0, 3, 127] if dtype == torch.int8 else [0, 156, 199])
    inputs = torch.rand(3, 4)
    options = {"norm": "linf", "eps": 0.3, "step": 0.1, "steps": 3}
    want = robustness.pgd(model, inputs, labels, gradient=gradient, **options)
    got = robustness.pgd(model, inputs, labels.to(dtype), gradient=gradient, **options)
    assert torch.equal(got, want) and (got != inputs).flatten(1).any(dim=1).all()
    path = robustness.attack_path(model, inputs, labels.to(dtype), gradient=gradient, **options)
    assert torch.equal(path.adversarial, want)
    assert torch.equal(path.correct, path.prediction == labels)
    loaders = [[(inputs, y)] for y in (labels, labels.to(dtype))]
    swept = [robustness.scaling_sweep(model, loader, (1.0, 10.0), gradient=gradient, **options) for loader in loaders]
    assert swept[0] == swept[1]
    moved = [robustness.transfer(model, loader, (1.0,), gradient=gradient, **options) for loader in loaders]
    assert moved[0] == moved[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_evaluate_counts_every_row(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 200)
    labels = torch.tensor([0, 3, 127] if dtype == torch.int8 else [0, 156, 199])
    inputs = torch.rand(3, 4)
    reports = [flatcore.evaluate(model, [(inputs, y)], input_gradient_norms=True) for y in (labels, labels.to(dtype))]
    for name, column in reports[0].rows.items():
        np.testing.assert_array_equal(column, reports[1].rows[name], err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_under_compile_and_vmap(dtype: torch.dtype) -> None:
    if dtype == torch.int8:
        labels = torch.tensor([[0, 3], [127, 100]])
    else:
        labels = torch.tensor([[0, 156], [199, 100]])
    z = torch.randn(2, 2, 200)
    want = flatcore.unmasked_cross_entropy(z, labels, reduction="none")
    got = torch.vmap(lambda a, b: flatcore.unmasked_cross_entropy(a, b, reduction="none"))(z, labels.to(dtype))
    assert torch.equal(got, want)
    compiled = torch.compile(
        lambda a, b: flatcore.unmasked_cross_entropy(a, b, reduction="none"), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(z, labels.to(dtype)), want)
    w = torch.randn(200, 5)
    x = torch.randn(2, 2, 5)
    want = flatcore.head_metrics(x, w, labels).loss
    got = torch.vmap(lambda a, b: flatcore.head_metrics(a, w, b).loss)(x, labels.to(dtype))
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i2", ">u2", ">u4", ">i8"))
def test_numpy_labels(name: str) -> None:
    labels = np.array([0, 3, 127] if name == "i1" else [0, 156, 199])
    features, weight = np.random.default_rng(0).normal(size=(3, 4)), np.random.default_rng(1).normal(size=(200, 4))
    want = flatcore.feature_gradient_norms(features, weight, labels)
    assert (flatcore.feature_gradient_norms(features, weight, labels.astype(name)) == want).all() and (want > 0).all()


@pytest.mark.parametrize("bad", (-1, C, 2**40, -(2**63)))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("name", ("hessian_trace", "relative_flatness"))
def test_where_a_look_would_wait_a_row_of_no_class_is_nan(
    monkeypatch: pytest.MonkeyPatch, name: str, weighted: bool, bad: int
) -> None:
    """As on a device: nobody looks at the labels before, and these measures need none of their own."""
    head_measure = importlib.import_module(
        "flatcore._engine.ops.head_measure"
    )  # the package has the function by its name
    monkeypatch.setattr(head_measure, "refuse_bad_labels", lambda *arguments: None)
    features, weight, target = _head(torch.int64, -100)
    target[1], target[2] = bad, -100
    classes = torch.arange(1.0, C + 1) if weighted else None
    with flatcore.backend("reference"):
        rows = getattr(flatcore, name)(features, weight, target, weight=classes, reduction="none")
        mean = getattr(flatcore, name)(features, weight, target, weight=classes, log=True)
        alone = getattr(flatcore, name)(features[2:], weight, target[2:], weight=classes)
    assert rows.isnan().tolist() == [n == 1 for n in range(len(target))] and rows[2] == 0
    assert mean.isnan() and alone.isfinite()
