"""Input gradients: exact per sample, at every confidence, through any model; and nothing of the caller's changed.

Letters: N samples, C classes; logits z = model(x), target y, J the Jacobian of the logits.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mpmath
import numpy as np
import oracles
import pytest
import torch
from tolerance import Bound, assert_same, assert_within, product_tolerance, tolerance
from torch import Tensor, nn
from torch.nn import functional

import flatcore

INF, NAN = math.inf, math.nan
ORDS = (1, 2, INF)
GAPS = (0.5, 6.0, 17.0, 40.0, 104.0, 1000.0, 10_000.0)
N, C = 9, 5


def _cnn(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(6 * 16, C)
    )
    model(torch.randn(20, 2, 6, 6))  # running statistics
    return model.to(dtype).eval()


def _batch(dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, 2, 6, 6, generator=g, dtype=torch.float64).to(dtype), torch.randint(C, (N,), generator=g)


def _one_at_a_time(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """The cross-entropy's gradient by autograd, a sample at a time, float64."""
    rows = []
    for n in range(x.shape[0]):
        leaf = x[n : n + 1].double().detach().requires_grad_()
        loss = functional.cross_entropy(model(leaf), y[n : n + 1], reduction="sum", **options)
        rows.append(torch.autograd.grad(loss, leaf)[0])
    return torch.cat(rows)


def _close(name: str, got: Tensor, want: Tensor, terms: int = 1000) -> None:
    """Two computations of one gradient by differently ordered products: by the largest entry of each sample."""
    largest = want.double().abs().flatten(1).amax(1).reshape(-1, *(1,) * (want.dim() - 1)).expand_as(want)
    assert_within(name, got, want.double().numpy(), product_tolerance(largest.numpy(), terms, got.dtype))


# -------------------------------------------------------------------------------------------- against autograd, float64
@pytest.mark.parametrize("chunk_size", (None, 1, 4, 9, 100))
def test_against_autograd_one_sample_at_a_time(chunk_size: int | None, target: str) -> None:
    model, (x, y) = _cnn(), _batch()
    found = flatcore.input_gradients(model, x, y, chunk_size=chunk_size)
    assert found.direction.shape == x.shape and found.direction.dtype == x.dtype
    assert found.log_scale.shape == (N,) and found.log_scale.dtype == torch.float64
    _close("gradient", found.gradient(), _one_at_a_time(model, x, y))
    p = model(x).detach().softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
    assert_within("log_scale", found.log_scale, (1 - p).log().numpy(), Bound(1e-13, 1e-13))
    assert not found.direction.requires_grad and not found.log_scale.requires_grad


def test_float32_where_nothing_has_vanished(target: str) -> None:
    model, (x, y) = _cnn(), _batch()
    want = _one_at_a_time(model, x, y)
    _close("gradient", flatcore.input_gradients(model.float(), x.float(), y).gradient(), want)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_soft_targets(smoothing: float, target: str) -> None:
    model, (x, _) = _cnn(), _batch()
    g = torch.Generator().manual_seed(3)
    soft = torch.rand(N, C, generator=g, dtype=torch.float64)  # sums other than 1: s p - t
    soft = soft * (1 - smoothing) + smoothing / C
    found = flatcore.input_gradients(model, x, soft, chunk_size=4)
    assert (found.log_scale == 0).all()
    _close("gradient", found.gradient(), _one_at_a_time(model, x, soft))
    assert_same("direction", found.gradient(), found.direction)


def test_ignored_rows(target: str) -> None:
    model, (x, y) = _cnn(), _batch()
    y[2] = y[5] = -100
    x[5] = NAN
    found = flatcore.input_gradients(model, x, y)
    norms = flatcore.input_gradient_norms(model, x, y, log=True)
    for n in (2, 5):
        assert (found.direction[n] == 0).all() and found.log_scale[n] == -INF and norms[n] == -INF
        assert (found.gradient()[n] == 0).all()
    keep = [0, 1, 3, 4, 6, 7, 8]
    _close("gradient", found.gradient()[keep], _one_at_a_time(model, x[keep], y[keep]))
    y[0] = 3
    other = flatcore.input_gradients(model, x, torch.where(y == -100, 3, y), ignore_index=3)
    assert (other.direction[0] == 0).all()


def test_bad_rows_stay_alone(target: str) -> None:
    model, (x, y) = _cnn(), _batch()
    want = flatcore.input_gradients(model, x, y)
    x[4, 0, 2, 2] = NAN
    got = flatcore.input_gradients(model, x, y)
    assert got.log_scale[4].isnan() and got.direction[4].isnan().any()
    others = torch.arange(N) != 4
    _close("direction", got.direction[others], want.direction[others])


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
    model = _cnn()
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
    model, (x, y) = _cnn(), _batch()

    class Output(dict):
        logits = property(lambda self: self["logits"])

    wrap: dict[str, Callable[[Tensor], Any]] = {
        "attribute": lambda z: SimpleNamespace(logits=z), "mapping": lambda z: {"logits": z, "loss": None},
        "both": lambda z: Output(logits=z),
    }  # fmt: skip
    got = flatcore.input_gradients(lambda x: wrap[form](model(x)), x, y)
    assert_same("direction", got.direction, flatcore.input_gradients(model, x, y).direction)


@pytest.mark.parametrize("classes", (1, 2))
def test_a_label_that_is_the_only_class(classes: int, target: str) -> None:
    head = nn.Linear(3, classes)
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
    model, (x, y) = _cnn(), _batch()
    gradients = flatcore.input_gradients(model, x, y).gradient().flatten(1)
    got = flatcore.input_gradient_norms(model, x, y, ord=ord, log=log, chunk_size=chunk_size)
    orders = ord if isinstance(ord, tuple) else (ord,)
    want = torch.stack([torch.linalg.vector_norm(gradients, p, dim=1) for p in orders])
    want = want if isinstance(ord, tuple) else want[0]
    assert_within("norms", got, (want.log() if log else want).numpy(), Bound(1e-13, 1e-13), torch.float64)


def test_norms_of_channels_last_images(target: str) -> None:
    model, (x, y) = _cnn(torch.float32), _batch(torch.float32)
    want = flatcore.input_gradient_norms(model, x, y, ord=ORDS)
    got = flatcore.input_gradient_norms(
        model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), y, ord=ORDS
    )
    assert_within("norms", got, want.double().numpy(), Bound(0.0, 1000 * 2.0**-24), torch.float32)


def test_batch_invariance(target: str) -> None:
    """A sample's result does not depend on its neighbours, to the library products' rounding."""
    model, (x, y) = _cnn(), _batch()
    whole = flatcore.input_gradients(model, x, y)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = flatcore.input_gradients(model, x[order], y[order])
    _close("shuffled", shuffled.direction, whole.direction[order])
    for n in (0, N - 1):
        alone = flatcore.input_gradients(model, x[n : n + 1], y[n : n + 1])
        _close("alone", alone.direction, whole.direction[n : n + 1])


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
    model, (x, y) = _cnn(torch.float32), _batch(torch.float32)
    want = flatcore.input_gradients(model, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = flatcore.input_gradients(model, x, y)
        assert torch.is_autocast_enabled("cpu")
    assert got.direction.dtype == torch.float32 and got.log_scale.dtype == torch.float32
    cosine = functional.cosine_similarity(got.direction.flatten(1), want.direction.flatten(1))
    assert (cosine > 1 - 16 * 2.0**-8).all()


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode, torch.enable_grad))
def test_grad_modes(context: Any, target: str) -> None:
    model, (x, y) = _cnn(), _batch()
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
    model, (x, y) = _cnn(), _batch()
    leaf = x.clone().requires_grad_()
    for inputs in (leaf, 2 * leaf / 2, leaf.expand_as(leaf), nn.Parameter(x.clone())):
        got = flatcore.input_gradients(model, inputs, y)
        assert_same("direction", got.direction, flatcore.input_gradients(model, x, y).direction)
        assert inputs.requires_grad
    assert leaf.grad is None


# -------------------------------------------------------------------------------------------------- nothing is changed
def _state(model: nn.Module) -> Any:
    return (
        [(p.requires_grad, p.grad, p._version) for p in model.parameters()],
        [b.clone() for b in model.buffers()],
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
    )  # fmt: skip


def _same_state(before: Any, after: Any) -> None:
    assert [(a, c) for a, _, c in before[0]] == [(a, c) for a, _, c in after[0]]
    assert all(a[1] is b[1] for a, b in zip(before[0], after[0], strict=True)), ".grad was touched"
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True)), "buffers moved"
    assert before[2:] == after[2:]


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("when", ("never", "forward", "backward", "second chunk"))
def test_everything_is_as_before(when: str, target: str) -> None:
    model, (x, y) = _cnn(), _batch()
    next(iter(model.parameters())).requires_grad_(False)
    for p in list(model.parameters())[1:3]:
        p.grad = torch.full_like(p, 7)
    x.grad = torch.ones_like(x)
    calls: list[int] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append(1)
        assert not any(p.requires_grad for p in model.parameters()), "parameters are not frozen"
        if when == "forward" or (when == "second chunk" and len(calls) == 2):
            raise BrokenError
        if when == "backward":
            output.register_hook(_raise)

    model[-1].register_forward_hook(hook)
    x_before, grad_before, before = x.clone(), x.grad, _state(model)
    for function in (flatcore.input_gradients, flatcore.input_gradient_norms):
        calls.clear()
        if when == "never":
            function(model, x, y, chunk_size=4)
        else:
            with pytest.raises(BrokenError):
                function(model, x, y, chunk_size=4)
        assert calls, "the hook did not run"
        _same_state(before, _state(model))
        assert x.grad is grad_before and not x.requires_grad and torch.equal(x, x_before)


def _raise(gradient: Tensor) -> None:
    raise BrokenError


def test_two_threads_on_one_model_restore_its_flags_once() -> None:
    model, (x, y) = _cnn(), _batch()
    barrier, inside = threading.Barrier(2, timeout=600), []

    def wait(module: nn.Module, args: Any, output: Tensor) -> None:
        barrier.wait()  # both calls hold the parameters
        inside.append([p.requires_grad for p in model.parameters()])

    handle = model[-1].register_forward_hook(wait)
    threads = [threading.Thread(target=flatcore.input_gradients, args=(model, x, y)) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    handle.remove()
    assert inside == [[False] * len(list(model.parameters()))] * 2
    assert all(p.requires_grad for p in model.parameters())


def test_shared_and_frozen_parameters_keep_their_flags() -> None:
    head = nn.Linear(3, 3)
    model = nn.Sequential(head, nn.Tanh(), head)
    head.bias.requires_grad_(False)
    flatcore.input_gradients(model, torch.ones(2, 3), torch.zeros(2).long())
    assert head.weight.requires_grad and not head.bias.requires_grad


# -------------------------------------------------------------------------------------------------------------- refused
class StochasticDepth(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x


SHARED = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(6),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(6),
    "Dropout": lambda: nn.Dropout(0.1),
    "AlphaDropout": lambda: nn.AlphaDropout(0.1),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.1),
    "RReLU": lambda: nn.RReLU(),
    "StochasticDepth": lambda: StochasticDepth(0.2),
    "MultiheadAttention": lambda: nn.MultiheadAttention(6, 2, dropout=0.1),
    "GRU": lambda: nn.GRU(6, 6, num_layers=2, dropout=0.1),
}


@pytest.mark.parametrize("name", SHARED)
def test_training_mode_is_refused_by_name(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    model.eval()
    model.add_module("inner", nn.Sequential(SHARED[name]()))
    x, y = torch.ones(4, 6), torch.zeros(4).long()
    for function in (flatcore.input_gradients, flatcore.input_gradient_norms):
        with pytest.raises(ValueError, match=f"model holds a {name} in training mode.*allow_train_mode=True"):
            function(model, x, y)
    with pytest.raises(ValueError, match=name):
        flatcore.input_gradients(model.forward, x, y)
    assert model.inner.training and not model.training
    model.inner.eval()
    flatcore.input_gradients(model[:1], x, y)


def test_batch_norm_without_running_statistics_is_refused_in_either_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="BatchNorm1d without running statistics"):
        flatcore.input_gradients(model, torch.ones(4, 6), torch.zeros(4).long())


@pytest.mark.parametrize(
    "layer",
    (nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.Dropout(0.0), StochasticDepth(0.0)),
    ids=lambda m: type(m).__name__,
)
def test_layers_that_keep_samples_apart_are_taken_in_training_mode(layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.Linear(6, 3)).train()
    x, y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(4).long()
    _close("gradient", flatcore.input_gradients(model, x, y).gradient(), _one_at_a_time(model.double(), x, y))
    assert model.training


def test_allow_train_mode() -> None:
    model, (x, y) = _cnn().train(), _batch()
    model[3].p = 0.0
    leaf = x.clone().requires_grad_()
    functional.cross_entropy(model(leaf), y, reduction="sum").backward()
    model.zero_grad()
    found = flatcore.input_gradients(model, x, y, allow_train_mode=True)
    # one cotangent for all, but BatchNorm couples the rows: the directions are those of the unit-scale sum, not scaled rows
    unit = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(flatcore.unmasked_cross_entropy(model(unit), y), unit)
    _close("direction", found.direction, want)
    assert model.training


X, Y = torch.ones(4, 6), torch.zeros(4, dtype=torch.long)
HEAD = nn.Linear(6, 3)
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "no model": (TypeError, "model must be callable", lambda: (None, X, Y)),
    "integer inputs": (TypeError, "inputs must have dtype.*token ids.*pass embeddings", lambda: (HEAD, X.long(), Y)),
    "complex inputs": (TypeError, "inputs must have dtype", lambda: (HEAD, X.cfloat(), Y)),
    "numpy inputs": (TypeError, "inputs must be a torch.Tensor, got numpy", lambda: (HEAD, X.numpy(), Y)),
    "list of labels": (TypeError, "target must be a torch.Tensor, got builtins.list", lambda: (HEAD, X, [0] * 4)),
    "a scalar": (ValueError, r"inputs must have shape \(N, \.\.\.\)", lambda: (HEAD, torch.tensor(1.0), Y)),
    "short target": (ValueError, "target must have one row per sample, N = 4", lambda: (HEAD, X, Y[:3])),
    "wide labels": (ValueError, "target must have the logits' leading shape", lambda: (HEAD, X, torch.zeros(4, 3).long())),
    "narrow soft target": (ValueError, r"soft target must have the logits' shape \(4, 3\)",
                           lambda: (HEAD, X, torch.ones(4, 2))),
    "negative soft target": (ValueError, "must not be negative, got -1", lambda: (HEAD, X, -torch.ones(4, 3))),
    "boolean target": (TypeError, "target must hold integer class labels", lambda: (HEAD, X, Y.bool())),
    "label above": (ValueError, r"target must hold labels in 0\.\.2.* got 3", lambda: (HEAD, X, Y + 3)),
    "tuple output": (TypeError, "model must return its logits.*got builtins.tuple", lambda: (lambda x: (HEAD(x),), X, Y)),
    "mapping without logits": (TypeError, "the key 'logits'", lambda: (lambda x: {"out": HEAD(x)}, X, Y)),
    "integer logits": (TypeError, "the model's logits must have dtype", lambda: (lambda x: HEAD(x).long(), X, Y)),
    "logits per position": (ValueError, r"logits must have shape \(N, C\).*\(4, 6, 3\).*flatten them into N",
                            lambda: (lambda x: HEAD(x).unsqueeze(1).expand(4, 6, 3), X, Y)),
    "logits per position, labels too": (ValueError, "several positions per sample",
                                        lambda: (lambda x: HEAD(x).unsqueeze(1).expand(4, 6, 3), X, Y.expand(6, 4).T)),
    "a vector of logits": (ValueError, r"logits must have shape \(N, C\)", lambda: (lambda x: HEAD(x)[:, 0], X, Y)),
    "other rows": (ValueError, "with N = 4", lambda: (lambda x: HEAD(x).repeat(2, 1), X, Y)),
    "detached": (ValueError, "carry no gradient to inputs", lambda: (lambda x: HEAD(x).detach(), X, Y)),
    "no_grad inside": (ValueError, "carry no gradient", lambda: (torch.no_grad()(lambda x: HEAD(x)), X, Y)),
    "inference inside": (ValueError, "carry no gradient", lambda: (torch.inference_mode()(lambda x: HEAD(x)), X, Y)),
    "constant": (ValueError, "do not depend on inputs", lambda: (lambda x: HEAD(torch.ones(4, 6)), X, Y)),
    "device": (ValueError, "target must be on the device of inputs", lambda: (HEAD, X, Y.to("meta"))),
    "sparse": (ValueError, "inputs must have a strided layout", lambda: (HEAD, X.to_sparse(), Y)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, target: str) -> None:
    error, message, arguments = REFUSED[case]
    for function in (flatcore.input_gradients, flatcore.input_gradient_norms):
        with pytest.raises(error, match=message):
            function(*arguments())
    assert HEAD.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be an integer"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer"),
        ({"allow_train_mode": 1}, TypeError, "allow_train_mode must be True or False"),
        ({"ord": 3}, ValueError, "ord must be one of 1, 2, inf"),
        ({"ord": ()}, ValueError, "non-empty tuple"),
        ({"log": "yes"}, TypeError, "log must be True or False"),
    ),
)
def test_options_are_refused_by_name(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flatcore.input_gradient_norms(HEAD, X, Y, **options)
