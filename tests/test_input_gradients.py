"""Input gradients: exact per sample, at every confidence, in every norm, dtype and context.

Letters: N samples, C classes; logits z = model(x), target y, J the Jacobian of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mpmath
import numpy as np
import oracles
import pytest
import torch
from convolving import C, N, batch, close, cnn, one_at_a_time
from torch import Tensor, nn
from torch.nn import functional

import flatcore
from flatcore._check.tolerance import Bound, assert_same, assert_within, product_tolerance, tolerance

INF, NAN = math.inf, math.nan
ORDS = (1, 2, INF)
GAPS = (0.5, 6.0, 17.0, 40.0, 104.0, 1000.0, 10_000.0)


# -------------------------------------------------------------------------------------------- against autograd, float64
@pytest.mark.parametrize("chunk_size", (None, 1, 4, 9, 100))
def test_against_autograd_one_sample_at_a_time(chunk_size: int | None, target: str) -> None:
    model, (x, y) = cnn(), batch()
    found = flatcore.input_gradients(model, x, y, chunk_size=chunk_size)
    assert found.direction.shape == x.shape and found.direction.dtype == x.dtype
    assert found.log_scale.shape == (N,) and found.log_scale.dtype == torch.float64
    close("gradient", found.gradient(), one_at_a_time(model, x, y))
    p = model(x).detach().softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
    assert_within("log_scale", found.log_scale, (1 - p).log().numpy(), Bound(1e-13, 1e-13))
    assert not found.direction.requires_grad and not found.log_scale.requires_grad


def test_float32_where_nothing_has_vanished(target: str) -> None:
    model, (x, y) = cnn(), batch()
    want = one_at_a_time(model, x, y)
    close("gradient", flatcore.input_gradients(model.float(), x.float(), y).gradient(), want)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_soft_targets(smoothing: float, target: str) -> None:
    model, (x, _) = cnn(), batch()
    g = torch.Generator().manual_seed(3)
    soft = torch.rand(N, C, generator=g, dtype=torch.float64)  # sums other than 1: s p - t
    soft = soft * (1 - smoothing) + smoothing / C
    found = flatcore.input_gradients(model, x, soft, chunk_size=4)
    assert (found.log_scale == 0).all()
    close("gradient", found.gradient(), one_at_a_time(model, x, soft))
    assert_same("direction", found.gradient(), found.direction)


def test_ignored_rows(target: str) -> None:
    model, (x, y) = cnn(), batch()
    y[2] = y[5] = -100
    x[5] = NAN
    found = flatcore.input_gradients(model, x, y)
    norms = flatcore.input_gradient_norms(model, x, y, log=True)
    for n in (2, 5):
        assert (found.direction[n] == 0).all() and found.log_scale[n] == -INF and norms[n] == -INF
        assert (found.gradient()[n] == 0).all()
    keep = [0, 1, 3, 4, 6, 7, 8]
    close("gradient", found.gradient()[keep], one_at_a_time(model, x[keep], y[keep]))
    y[0] = 3
    other = flatcore.input_gradients(model, x, torch.where(y == -100, 3, y), ignore_index=3)
    assert (other.direction[0] == 0).all()


def test_bad_rows_stay_alone(target: str) -> None:
    model, (x, y) = cnn(), batch()
    want = flatcore.input_gradients(model, x, y)
    x[4, 0, 2, 2] = NAN
    got = flatcore.input_gradients(model, x, y)
    assert got.log_scale[4].isnan() and got.direction[4].isnan().any()
    others = torch.arange(N) != 4
    close("direction", got.direction[others], want.direction[others])


@pytest.mark.parametrize("shape", ((), (7,), (3, 4), (2, 3, 4, 1)))
def test_inputs_of_any_shape(shape: tuple[int, ...], target: str) -> None:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(N, *shape, generator=g, dtype=torch.float64)
    w = torch.randn(math.prod(shape), C, generator=g, dtype=torch.float64)
    y = torch.arange(N) % C
    found = flatcore.input_gradients(lambda x: x.reshape(x.shape[0], -1).tanh() @ w, x, y)
    assert found.direction.shape == x.shape and found.gradient().shape == x.shape
    assert flatcore.input_gradient_norms(lambda x: x.reshape(x.shape[0], -1).tanh() @ w, x, y).shape == (N,)


@pytest.mark.parametrize("chunk_size", (None, 3))
def test_no_samples(chunk_size: int | None, target: str) -> None:
    model = cnn()
    found = flatcore.input_gradients(
        model, torch.zeros(0, 2, 6, 6).double(), torch.zeros(0).long(), chunk_size=chunk_size
    )
    assert (
        found.direction.shape == (0, 2, 6, 6)
        and found.log_scale.shape == (0,)
        and found.gradient().shape == (0, 2, 6, 6)
    )
    norms = flatcore.input_gradient_norms(model, torch.zeros(0, 2, 6, 6).double(), torch.zeros(0).long(), ord=ORDS)
    assert norms.shape == (3, 0)


@pytest.mark.parametrize("form", ("attribute", "mapping", "both"))
def test_outputs_that_hold_logits(form: str, target: str) -> None:
    model, (x, y) = cnn(), batch()

    class Output(dict):
        logits = property(lambda self: self["logits"])

    wrap: dict[str, Callable[[Tensor], Any]] = {
        "attribute": lambda z: SimpleNamespace(logits=z), "mapping": lambda z: {"logits": z, "loss": None},
        "both": lambda z: Output(logits=z),
    }  # fmt: skip
    got = flatcore.input_gradients(lambda x: wrap[form](model(x)), x, y)
    assert_same("direction", got.direction, flatcore.input_gradients(model, x, y).direction)


def test_a_label_that_is_the_only_class(target: str) -> None:
    head = nn.Linear(3, 2)
    with torch.no_grad():
        head.bias[1:] = -INF
    found = flatcore.input_gradients(head, torch.ones(2, 3), torch.zeros(2).long())
    assert (found.direction == 0).all() and (found.log_scale == -INF).all() and (found.gradient() == 0).all()


# --------------------------------------------------------------------------------------------- against mpmath, any gap
def _exact_chain(x: Tensor, layers: list[Tensor], y: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Direction, its magnitude over absolute terms, its log norms (3, N) and log(1 - p_y) of linear layers with ReLU.

    Weights and inputs are read as the numbers they hold; every pre-activation is exact in float32 by construction.
    """
    directions, magnitudes, logs, scales = [], [], [], []
    with mpmath.workdps(80):
        for row, label in zip(x.double().numpy(), y.tolist(), strict=True):
            h, jacobian = row, np.eye(len(row))
            for i, layer in enumerate(layers):
                w = layer.double().numpy()
                h, jacobian = w @ h, w @ jacobian
                if i + 1 < len(layers):
                    jacobian, h = jacobian * (h > 0)[:, None], np.maximum(h, 0)
            z = [mpmath.mpf(v) for v in h.tolist()]
            top = max(v for j, v in enumerate(z) if j != label)
            u = [mpmath.mpf(0) if j == label else mpmath.exp(v - top) for j, v in enumerate(z)]
            total = mpmath.fsum(u)
            v = [-mpmath.mpf(1) if j == label else a / total for j, a in enumerate(u)]
            direction = [
                mpmath.fsum(a * mpmath.mpf(b) for a, b in zip(v, column, strict=True)) for column in jacobian.T.tolist()
            ]
            # log(1 - p_y) = log(total e^top / (total e^top + e^z_y))
            scale = -mpmath.log1p(mpmath.exp(z[label] - top) / total)
            norms = (mpmath.fsum(map(abs, direction)), mpmath.norm(direction, 2), max(map(abs, direction)))
            directions.append([float(d) for d in direction])
            magnitudes.append(np.abs([float(a) for a in v]) @ np.abs(jacobian))
            logs.append([float(mpmath.log(n) + scale) for n in norms])
            scales.append(float(scale))
    return np.array(directions), np.array(magnitudes), np.array(logs).T, np.array(scales)


def _eighths(*shape: int, seed: int) -> Tensor:
    """Multiples of 1/8 up to 2."""
    return torch.randint(-16, 17, shape, generator=torch.Generator().manual_seed(seed)).double() / 8


def _layers(kind: str) -> list[Tensor]:
    if kind == "linear":
        return [_eighths(4, 6, seed=1)]
    return [_eighths(7, 6, seed=2), _eighths(4, 7, seed=3)]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("kind", ("linear", "hidden"))
def test_gaps_to_10000_against_mpmath(kind: str, dtype: torch.dtype, target: str) -> None:
    """The label on top (the usual gradient vanishes), second and last, at every gap."""
    layers = _layers(kind)
    modules: list[nn.Module] = []
    for w in layers:
        linear = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=dtype)
        linear.weight.data.copy_(w)
        modules += [linear, nn.ReLU()]
    model = nn.Sequential(*modules[:-1]).eval()
    base = _eighths(12, 6, seed=4)
    rows, labels = [], []
    for row in base:
        z = model(row.to(dtype)).double()
        order = z.argsort(descending=True)
        gap = (z[order[0]] - z[order[1]]).item()
        if gap == 0:
            continue
        for wanted in GAPS:
            scale = 2.0 ** round(math.log2(wanted / gap))  # ReLU networks are homogeneous, powers of two exact
            rows += [row * scale] * 3
            labels += [order[0], order[1], order[-1]]
    x, y = torch.stack(rows).to(dtype), torch.tensor(labels)
    direction, magnitude, logs, scales = _exact_chain(x, layers, y)
    assert min(scales) < -7000, "no row reaches the gaps that this test is for"
    found = flatcore.input_gradients(model, x, y)
    terms = sum(w.shape[0] for w in layers)
    assert_within("direction", found.direction, direction, product_tolerance(magnitude, terms, dtype), dtype)
    assert_within("log_scale", found.log_scale, scales, tolerance("log_scale", None, scales, dtype), dtype)
    norms = flatcore.input_gradient_norms(model, x, y, ord=ORDS, log=True)
    for i, ord in enumerate(ORDS):
        # how far the direction's own rounding moves the log of its norm: by the norm of its bounds over its norm
        size = np.linalg.norm(direction, ord, axis=1)
        moved = np.linalg.norm(product_tolerance(magnitude, terms, dtype).absolute, ord, axis=1) / size
        assert (moved < 0.01).all(), "a direction that cancels would test nothing"
        bound = tolerance("log_norm", None, logs[i], dtype) + Bound(-np.log1p(-moved), 0.0)
        assert_within(f"log norm {ord}", norms[i], logs[i], bound, dtype)


def test_the_usual_gradient_vanishes_where_ours_does_not(target: str) -> None:
    """What the function is for, so that the other tests are known to reach it."""
    head = nn.Linear(2, 2, bias=False)
    head.weight.data.copy_(torch.eye(2))
    x, y = torch.tensor([[200.0, 0.0]], requires_grad=True), torch.tensor([0])
    (usual,) = torch.autograd.grad(functional.cross_entropy(head(x), y), x)
    found = flatcore.input_gradients(head, x, y)
    assert (usual == 0).all() and found.direction.tolist() == [[-1, 1]] and found.log_scale.tolist() == [-200]


def test_gradient_in_the_linear_domain_at_the_edge_of_the_range() -> None:
    """A large direction times a scale below the smallest normal number keeps its digits."""
    found = flatcore.InputGradients(torch.tensor([[1e20], [-1e30]]), torch.tensor([-100.0, -130.0]))
    truth = np.array([[1e20 * math.exp(-100)], [-1e30 * math.exp(-130)]])
    # exp of -100 in float32 is off by 100 units at most, the product by two more
    assert_within("gradient", found.gradient(), truth, Bound(0.0, 140 * 2.0**-24), torch.float32)
    half = flatcore.InputGradients(torch.ones(1, 2).half(), torch.tensor([-3.0])).gradient()
    assert half.dtype == torch.float16 and half.shape == (1, 2)


# --------------------------------------------------------------------------------------------------------------- norms
@pytest.mark.crossed
@pytest.mark.parametrize("log", (False, True))
@pytest.mark.parametrize("ord", (1, 2, INF, (2,), (INF, 1, 2)))
@pytest.mark.parametrize("chunk_size", (None, 4))
def test_norms_against_vector_norm(ord: Any, log: bool, chunk_size: int | None, target: str) -> None:
    model, (x, y) = cnn(), batch()
    gradients = flatcore.input_gradients(model, x, y).gradient().flatten(1)
    got = flatcore.input_gradient_norms(model, x, y, ord=ord, log=log, chunk_size=chunk_size)
    orders = ord if isinstance(ord, tuple) else (ord,)
    want = torch.stack([torch.linalg.vector_norm(gradients, p, dim=1) for p in orders])
    want = want if isinstance(ord, tuple) else want[0]
    assert_within("norms", got, (want.log() if log else want).numpy(), Bound(1e-13, 1e-13), torch.float64)


def test_norms_of_channels_last_images(target: str) -> None:
    model, (x, y) = cnn(torch.float32), batch(torch.float32)
    want = flatcore.input_gradient_norms(model, x, y, ord=ORDS)
    got = flatcore.input_gradient_norms(
        model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), y, ord=ORDS
    )
    assert_within("norms", got, want.double().numpy(), Bound(0.0, 1000 * 2.0**-24), torch.float32)


def test_batch_invariance(target: str) -> None:
    """A sample's result does not depend on its neighbours, to the library products' rounding."""
    model, (x, y) = cnn(), batch()
    whole = flatcore.input_gradients(model, x, y)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = flatcore.input_gradients(model, x[order], y[order])
    close("shuffled", shuffled.direction, whole.direction[order])
    for n in (0, N - 1):
        alone = flatcore.input_gradients(model, x[n : n + 1], y[n : n + 1])
        close("alone", alone.direction, whole.direction[n : n + 1])


# ------------------------------------------------------------------------------------------------- dtypes and contexts
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_models(dtype: torch.dtype, target: str) -> None:
    """The cotangent is formed in float32: a bfloat16 softmax would round 1 - p to 0 from a gap of 6 on."""
    head = nn.Linear(2, 3, bias=False, dtype=dtype)
    head.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    x, y = torch.tensor([[20.0, 0.25], [100.0, 1.0]], dtype=dtype), torch.zeros(2).long()
    found = flatcore.input_gradients(head, x, y)
    assert found.direction.dtype == dtype and found.log_scale.dtype == torch.float32
    truth = oracles.exact_cross_entropy(head(x).detach(), y)["log_scale"]
    assert_within(
        "log_scale", found.log_scale, truth, tolerance("log_scale", None, truth, torch.float32), torch.float32
    )
    second = torch.tensor([0.25, 1.0], dtype=torch.float64).tanh()
    unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    want = torch.stack([-torch.ones(2, dtype=torch.float64), second], dim=1).numpy()
    assert_within("direction", found.direction, want, Bound(4 * unit, 0.0))


def test_autocast(target: str) -> None:
    model, (x, y) = cnn(torch.float32), batch(torch.float32)
    want = flatcore.input_gradients(model, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = flatcore.input_gradients(model, x, y)
        assert torch.is_autocast_enabled("cpu")
    assert got.direction.dtype == torch.float32 and got.log_scale.dtype == torch.float32
    cosine = functional.cosine_similarity(got.direction.flatten(1), want.direction.flatten(1))
    assert (cosine > 1 - 16 * 2.0**-8).all()


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode, torch.enable_grad))
def test_grad_modes(context: Any, target: str) -> None:
    model, (x, y) = cnn(), batch()
    want = flatcore.input_gradients(model, x, y)
    with context():
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        made_here = x.clone()
        for inputs in (x, made_here):
            got = flatcore.input_gradients(model, inputs, y.clone())
            assert_same("direction", got.direction, want.direction)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == mode


def test_parameters_made_in_inference_mode_are_refused_by_torch() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors"):
        flatcore.input_gradients(model, torch.ones(2, 3), torch.zeros(2).long())


def test_inputs_that_require_gradient_and_belong_to_a_graph(target: str) -> None:
    model, (x, y) = cnn(), batch()
    leaf = x.clone().requires_grad_()
    for inputs in (leaf, 2 * leaf / 2, leaf.expand_as(leaf), nn.Parameter(x.clone())):
        got = flatcore.input_gradients(model, inputs, y)
        assert_same("direction", got.direction, flatcore.input_gradients(model, x, y).direction)
        assert inputs.requires_grad
    assert leaf.grad is None
