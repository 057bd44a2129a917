"""Probe: weights that are computed in the pass, and copies of a probed model.

Letters: N rows, D features, C classes. The right value is the functional form's in float64, on detached copies.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from probing import C, D, batch, right, same, small
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

import flatcore

OLD_NORMS = pytest.mark.filterwarnings("ignore:.*is deprecated in favor of.*:FutureWarning")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------- weights that are computed
def normed(kind: str) -> nn.Linear:
    head = nn.Linear(D, C)
    if kind == "spectral":
        head = parametrizations.spectral_norm(head)
        norm = head.parametrizations.weight[0]
        norm._u.copy_(functional.normalize(torch.randn(C), dim=0))  # far from its end: every iteration is to be seen
        norm._v.copy_(functional.normalize(torch.randn(D), dim=0))
        return head
    if kind == "weight":
        return parametrizations.weight_norm(head)
    old = {"old spectral": nn.utils.spectral_norm, "old weight": nn.utils.weight_norm}[kind]
    return old(head)


KINDS = ("spectral", "weight", "old spectral", "old weight")


def trained(kind: str, probed: bool, asked: bool) -> list[Tensor]:
    torch.manual_seed(3)
    model = small(normed(kind))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    losses = []
    with flatcore.Probe(model) if probed else contextlib.nullcontext() as probe:
        for _ in range(4):
            loss = functional.cross_entropy(model(x), y)
            if asked:
                probe.relative_flatness(y)
                probe.head_metrics(y)
                repr(probe)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return [*losses, *model.state_dict().values()]


@OLD_NORMS
@pytest.mark.parametrize("asked", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_an_attached_probe_changes_nothing_in_training(kind: str, asked: bool) -> None:
    """pytorch#57784: to read a spectral norm's weight is a power iteration."""
    for a, b in zip(trained(kind, True, asked), trained(kind, False, False), strict=True):
        assert torch.equal(a, b)


@OLD_NORMS
@pytest.mark.parametrize("cached", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_that_the_pass_computed(kind: str, cached: bool) -> None:
    used: list[Tensor] = []

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        used.append(weight)
        return plain(x, weight, bias)

    model, (x, y) = small(normed(kind)), batch()
    plain = functional.linear
    with flatcore.Probe(model) as probe, pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", linear)
        with parametrize.cached() if cached else contextlib.nullcontext():
            for _ in range(2):
                model(x)
                value = probe.relative_flatness(y, log=True)
                same(value, right(probe.features, used[-1], model[2].bias, y))
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_parametrised_bias() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model, (x, y) = small(), batch()
    parametrize.register_parametrization(model[2], "bias", Doubled())
    with flatcore.Probe(model) as probe:
        model(x)
        same(probe.relative_flatness(y, log=True), right(probe.features, model[2].weight, model[2].bias, y))


def test_parametrised_while_attached_is_refused_by_name() -> None:
    model, (x, y) = small(), batch()
    with flatcore.Probe(model) as probe:
        parametrizations.spectral_norm(model[2])
        model(x)
        with pytest.raises(RuntimeError, match=r"weight of the head '2' .* is computed.*detach\(\) and attach\(\)"):
            probe.relative_flatness(y)


# ------------------------------------------------------------------------------------------------------- copies, and after
def state(model: nn.Module) -> dict[str, Any]:
    """Everything but tensors that a model's modules hold, hooks above all."""
    return {
        f"{name}.{key}": dict(value) if isinstance(value, dict) else value
        for name, module in model.named_modules()
        for key, value in module.__dict__.items()
        if key not in ("_parameters", "_buffers", "_modules")
    }


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": lambda m: torch.load(io.BytesIO(saved(m)), weights_only=False),
    "AveragedModel": lambda m: torch.optim.swa_utils.AveragedModel(m).module,
}


def saved(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_probed_model_are_clean(how: str) -> None:
    """Lightning#17375: what a hook saw went into the copies, or stopped them."""
    model, (x, y) = small(), batch()
    mine = model[2].register_forward_hook(_nothing)
    clean, size = state(model), len(saved(model))
    with flatcore.Probe(model) as probe, flatcore.Probe(model, "0", verify=False):
        model(torch.randn(3000, 5))
        value = probe.relative_flatness(log=True)
        other = COPIES[how](model)
        assert len(saved(model)) == size
        assert state(other).keys() == clean.keys()
        for module in other.modules():
            assert len(module._forward_pre_hooks) == len(module._forward_hooks_with_kwargs) == 0
            assert all(hook is _nothing for hook in module._forward_hooks.values())
        torch.testing.assert_close(other(x), functional.linear(torch.tanh(model[0](x)), *model[2].parameters()))
        same(probe.relative_flatness(log=True), value)  # the copy's pass is not the model's
        with flatcore.Probe(other) as another:
            other(x)
            same(another.relative_flatness(y, log=True), right(another.features, model[2].weight, model[2].bias, y))
    assert state(model) == clean
    mine.remove()
    assert state(model) == state(small())


def _nothing(*_: Any) -> None:
    pass


def test_a_copy_of_a_parametrised_model_runs() -> None:
    """Its class copies in its own way, past our state: the hooks that follow do nothing."""
    model, (x, y) = small(normed("spectral")), batch()
    clean = state(model)
    with flatcore.Probe(model) as probe:
        model(x)
        value = probe.relative_flatness(y, log=True)
        other = copy.deepcopy(model)
        other(2 * x)
        same(probe.relative_flatness(y, log=True), value)
        with flatcore.Probe(other) as another:
            other(x)
            another.relative_flatness(y)
    assert state(model) == clean


class Holds(nn.Module):
    """A module with a probe, as Lightning's have."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small()
        self.probe = flatcore.Probe(self.model, "2")


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_probe_is_not_attached(how: str) -> None:
    module, (x, y) = Holds(), batch()
    with module.probe:
        module.model(x)
        other: Any = COPIES[how](module)
        assert not other.probe.is_attached and other.probe.model is other.model
        with other.probe as probe:
            other.model(x)
            assert probe.head is other.model[2]
            probe.relative_flatness(y)
