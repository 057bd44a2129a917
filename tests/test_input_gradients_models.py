"""Input gradients and the caller's model: nothing of it is changed, what it may hold, and what is refused.

Letters: N samples, C classes; logits z = model(x), target y, J the Jacobian of the logits.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convolving import batch, close, cnn, one_at_a_time
from torch import Tensor, nn
from torch.nn import functional

import flatcore
from flatcore._check.tolerance import assert_same


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
    model, (x, y) = cnn(), batch()
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
    model, (x, y) = cnn(), batch()
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
    close("gradient", flatcore.input_gradients(model, x, y).gradient(), one_at_a_time(model.double(), x, y))
    assert model.training


def test_allow_train_mode() -> None:
    model, (x, y) = cnn().train(), batch()
    model[3].p = 0.0
    leaf = x.clone().requires_grad_()
    functional.cross_entropy(model(leaf), y, reduction="sum").backward()
    model.zero_grad()
    found = flatcore.input_gradients(model, x, y, allow_train_mode=True)
    # one cotangent for all, but BatchNorm couples the rows: the directions are those of the unit-scale sum, not scaled rows
    unit = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(flatcore.unmasked_cross_entropy(model(unit), y), unit)
    close("direction", found.direction, want)
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


# ------------------------------------------------------------------------------------------------- layers that work in place
@pytest.mark.parametrize(
    "first", (nn.ReLU(inplace=True), nn.Hardswish(inplace=True), nn.Dropout(0.5, inplace=True)), ids=str
)
def test_a_first_layer_that_works_in_place(first: nn.Module) -> None:
    """Its gradient is that of the same layer out of place, and the inputs are left as they are."""
    torch.manual_seed(0)
    head, x, y = nn.Linear(6, 4), torch.randn(5, 6), torch.arange(5) % 4
    model = nn.Sequential(first, head).eval()
    outside = copy.deepcopy(model)
    outside[0].inplace = False
    kept = x.clone()
    got, want = flatcore.input_gradients(model, x, y), flatcore.input_gradients(outside, x, y)
    assert_same("direction", got.direction, want.direction)
    assert_same("log_scale", got.log_scale, want.log_scale)
    options = {"norm": "inf", "eps": 0.5, "step": 0.25, "steps": 3, "clip": None}
    for gradient in ("exact", "usual"):
        moved = [flatcore.robustness.pgd(m, x, y, gradient=gradient, **options) for m in (model, outside)]
        assert_same(gradient, *moved)
    stretch = [flatcore.robustness.lipschitz_lower_estimate(m, x, generator=torch.Generator().manual_seed(1), head="1")
               for m in (model, outside)]  # fmt: skip
    assert_same("stretch", *stretch)
    assert_same("inputs", x, kept)


def test_a_function_that_changes_its_argument() -> None:
    x = torch.tensor([[3.0, 1.0]])
    got = flatcore.input_gradients(lambda x: x.sub_(1).mul_(2), x, torch.tensor([0]))
    assert got.direction.tolist() == [[-2.0, 2.0]] and x.tolist() == [[3.0, 1.0]]


# -------------------------------------------------------------------------------------------------------- one output
def test_a_model_of_one_output_is_refused() -> None:
    """A sigmoid's head: its softmax gradient is 0, and an attack would not move."""
    model, x, y = nn.Linear(3, 1), torch.rand(4, 3), torch.zeros(4, dtype=torch.int64)
    options = {"norm": 2, "eps": 0.5, "step": 0.25, "steps": 2}
    for function in (
        lambda: flatcore.input_gradients(model, x, y),
        lambda: flatcore.input_gradients(lambda x: model(x), x, torch.ones(4, 1)),
        lambda: flatcore.input_gradient_norms(model, x, y),
        *(lambda k=k: flatcore.robustness.pgd(model, x, y, gradient=k, **options) for k in ("exact", "usual")),
    ):
        with pytest.raises(
            ValueError, match=r"has one output \(C = 1\).*torch\.cat\(\[torch\.zeros_like\(z\), z\], dim=-1\)"
        ):
            function()
    for function in (flatcore.robustness.attack_path,):
        with pytest.raises(ValueError, match="has one output"):
            function(model, x, y, **options)
    for function in (flatcore.robustness.scaling_sweep, flatcore.robustness.transfer):
        with pytest.raises(ValueError, match="has one output"):
            function(model, [(x, y)], (1.0,), **options)

    def remedy(x: Tensor) -> Tensor:
        z = model(x)
        return torch.cat([torch.zeros_like(z), z], dim=-1)

    # the loss of the remedy is the sigmoid's, and so is its gradient
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(nn.functional.softplus(model(leaf)).sum(), leaf)
    torch.testing.assert_close(flatcore.input_gradients(remedy, x, y).gradient(), want)
