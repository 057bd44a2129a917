"""foolbox: its models as callables, its names of norms, its steps as the oracle of ours."""

from __future__ import annotations

import warnings
from types import ModuleType

import pytest
import textbook
import torch
from torch import Tensor, nn
from torch.nn import functional

import flatcore

N, C = 8, 3
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def network(scale: float = 1.0) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, C)).eval()
    with torch.no_grad():
        model[-1].weight.mul_(scale)
        model[-1].bias.mul_(scale)
    return model


def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.rand(N, 1, 3, 4)
    return x, model(x).argmax(1)


def wrapped(foolbox: ModuleType, model: nn.Module) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return foolbox.PyTorchModel(model, bounds=(0, 1))


def test_a_foolbox_model_is_a_callable(foolbox: ModuleType) -> None:
    model = network()
    x, y = batch(model)
    around = wrapped(foolbox, model)
    want = flatcore.input_gradients(model, x, y)
    inputs = x.double().requires_grad_()
    loss = functional.cross_entropy(network_like(model).double()(inputs), y, reduction="sum")
    (true,) = torch.autograd.grad(loss, inputs)
    got = flatcore.input_gradients(around, x, y)
    torch.testing.assert_close(got.direction, want.direction)
    torch.testing.assert_close(got.gradient().double(), true, rtol=0.0, atol=2e-5 * float(true.abs().max()))
    assert all(p.grad is None for p in model.parameters())
    moved = flatcore.robustness.pgd(around, x, y, norm=float("inf"), eps=0.1, step=0.02, steps=3)
    same = flatcore.robustness.pgd(model, x, y, norm=float("inf"), eps=0.1, step=0.02, steps=3)
    torch.testing.assert_close(moved, same)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        flatcore.Probe(around)


def test_flatness_along_an_attack_on_a_foolbox_model(foolbox: ModuleType) -> None:
    """A callable ends in a head that has to be named."""
    model = network()
    x, y = batch(model)
    around = wrapped(foolbox, model)
    options = {"norm": "l2", "eps": 0.3, "step": 0.1, "steps": 3}
    with pytest.raises(TypeError, match=r"head"):
        flatcore.robustness.attack_path(around, x, y, **options)
    path = flatcore.robustness.attack_path(around, x, y, head=model[-1], **options)
    here = x
    for step in range(4):
        if step:
            here = flatcore.robustness.pgd(model, x, y, **(options | {"steps": step}))
        want = textbook.rows("layerwise", model[:-1](here).detach(), model[-1].weight.detach(), model[-1].bias.detach())
        torch.testing.assert_close(path.log_layerwise[step].exp().double(), want, rtol=textbook.FLOAT32, atol=0.0)


def network_like(model: nn.Module) -> nn.Sequential:
    other = network()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("name", ("linf", "Linf", "LInf", "inf", "l2", "L2"))
def test_norms_by_the_names_attack_libraries_give_them(foolbox: ModuleType, name: str) -> None:
    model = network()
    x, y = batch(model)
    number = 2 if name[-1] == "2" else float("inf")
    options = {"eps": 0.3, "step": 0.1, "steps": 3}
    got = flatcore.robustness.pgd(model, x, y, norm=name, **options)
    assert torch.equal(got, flatcore.robustness.pgd(model, x, y, norm=number, **options))
    # foolbox's own steps: the same gradient where nothing is confident
    kind = foolbox.attacks.L2ProjectedGradientDescentAttack if number == 2 else foolbox.attacks.LinfPGD
    attack = kind(abs_stepsize=0.1, steps=3, random_start=False)
    _, theirs, _ = attack(wrapped(foolbox, model), x, y, epsilons=0.3)
    torch.testing.assert_close(got, theirs, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("scale", (1.0, 400.0), ids=("plain", "confident"))
def test_the_unmasked_loss_in_a_foolbox_attack(foolbox: ModuleType, scale: float) -> None:
    """At scale 400 the gaps lie beyond 104: foolbox's loss has a gradient of exactly 0 there."""
    model = network(scale)
    x, y = batch(model)

    class Unmasked(foolbox.attacks.LinfPGD):
        def get_loss_fn(self, model: object, labels: object):
            return lambda inputs: foolbox_loss(model, inputs, labels)

    def foolbox_loss(model: object, inputs: object, labels: object) -> object:
        import eagerpy

        return eagerpy.astensor(flatcore.unmasked_cross_entropy(model(inputs).raw, labels.raw))

    attack = Unmasked(abs_stepsize=0.1, steps=3, random_start=False)
    _, theirs, _ = attack(wrapped(foolbox, model), x, y, epsilons=0.3)
    ours = flatcore.robustness.pgd(model, x, y, norm="linf", eps=0.3, step=0.1, steps=3)
    torch.testing.assert_close(theirs, ours, rtol=0.0, atol=2e-5)
    moved = (ours - x).abs().flatten(1).amax(1)
    assert (moved > 0.05).all(), "confidence hides nothing"


def test_labels_in_every_integer_dtype(foolbox: ModuleType) -> None:
    model = network()
    x, y = batch(model)
    want = flatcore.robustness.pgd(model, x, y, norm="linf", eps=0.3, step=0.1, steps=2)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64):
        assert torch.equal(
            flatcore.robustness.pgd(model, x, y.to(dtype), norm="linf", eps=0.3, step=0.1, steps=2), want
        )


def test_a_head_of_one_output_is_not_attacked_in_silence(foolbox: ModuleType) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).eval()
    x, y = torch.rand(N, 1, 3, 4), torch.zeros(N, dtype=torch.long)
    for call in (
        lambda: flatcore.robustness.pgd(model, x, y, norm=2, eps=0.3, step=0.1, steps=2),
        lambda: flatcore.input_gradients(model, x, y),
        lambda: flatcore.input_gradient_norms(model, x, y),
        lambda: flatcore.evaluate(model, [(x, y)]),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"one output"):
            call()
