"""What people do to a model with torch itself while a probe listens, or before evaluate and the attacks see it.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import textbook
import torch
from listening import C, D, N, batch, close, network, of, right
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import flatcore


# ------------------------------------------------------------------------------------ weights that are made as they are used
@pytest.mark.parametrize("reparametrised", ("pruned", "pruned for good", "weight_norm", "orthogonal"))
def test_a_reparametrised_head(reparametrised: str) -> None:
    model, (x, y) = network(), batch()
    if reparametrised == "weight_norm":
        parametrizations.weight_norm(model[2])
    elif reparametrised == "orthogonal":
        parametrizations.orthogonal(model[2])
    else:
        prune.l1_unstructured(model[2], "weight", amount=0.5)
        if reparametrised == "pruned for good":
            prune.remove(model[2], "weight")
    with torch.no_grad():
        weight = model[2].weight.clone()
    with flatcore.Probe(model) as probe:
        loss = functional.cross_entropy(model(x), y)
        value = probe.relative_flatness()
        close(value, of(model[:2](x), weight, model[2].bias))
        (loss + value).backward()
    source = {"pruned": "weight_orig", "pruned for good": "weight"}.get(reparametrised)
    parameters = [getattr(model[2], source)] if source else list(model[2].parametrizations.weight.parameters())
    assert all(p.grad is not None for p in parameters)
    report = flatcore.evaluate(model, [(x, y)])
    assert report["layerwise"].mean == pytest.approx(
        float(of(model[:2](x), weight, model[2].bias)), rel=textbook.FLOAT64
    )


# pytorch#57784: in training mode a look at the weight is a step of the power iteration
def test_spectral_norm_is_not_stepped_by_looking() -> None:
    losses = []
    for listening, asking in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        model, (x, y) = network(), batch()
        parametrizations.spectral_norm(model[2])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = flatcore.Probe(model)
        if listening:
            probe.attach()
        for _ in range(4):
            loss = functional.cross_entropy(model(x), y)
            if asking:
                original, u, v = (
                    model[2].parametrizations.weight.original.detach(),
                    model[2].parametrizations.weight[0]._u,
                    model[2].parametrizations.weight[0]._v,
                )
                weight = original / (u @ original @ v)
                close(probe.relative_flatness(), of(probe.features, weight, model[2].bias))
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        probe.detach()
    assert losses[:4] == losses[4:8] == losses[8:]


def test_functional_call_with_other_weights() -> None:
    model, other, (x, _) = network(), network(), batch()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    want = right(other, x)
    with flatcore.Probe(model) as probe:
        torch.func.functional_call(model, parameters, (x,))
        got = probe.relative_flatness()
        close(got, want)
        gradients = torch.autograd.grad(got.log(), list(parameters.values()))
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        model(x)
        close(probe.relative_flatness(), right(model, x))


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda model: model.half(),
    "double and back": lambda model: model.float().double(),
    "data": lambda model: setattr(model[2].weight, "data", model[2].weight.data * 2),
    "copy_": lambda model: model[2].weight.data.copy_(torch.ones(C, D)),
    "load_state_dict": lambda model: model.load_state_dict(network().state_dict()),
    "a new parameter": lambda model: setattr(model[2], "weight", nn.Parameter(torch.ones(C, D).double())),
    "bias": lambda model: model[2].bias.data.add_(torch.arange(C)),
}


@pytest.mark.parametrize("change", CASTS)
def test_weights_that_change_between_pass_and_measure(change: str) -> None:
    model, (x, _) = network(), batch()
    want = right(model, x)
    with flatcore.Probe(model) as probe:
        model(x)
        CASTS[change](model)
        try:
            got = probe.relative_flatness()
        except RuntimeError as error:
            assert re.search(r"changed (since the forward pass|through)", str(error)), error
        else:
            torch.testing.assert_close(got.detach(), want, rtol=textbook.FLOAT32, atol=0.0)


# ------------------------------------------------------------------------------------------- heads and passes that move
def test_a_head_that_is_replaced_while_a_probe_listens() -> None:
    """Transfer learning in a notebook: the probe is there first, then a new head."""
    model, (x, _) = network(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        close(probe.relative_flatness(), right(model, x))
        model[2] = nn.Linear(D, 7).double()
        model(x)
        try:
            got = probe.relative_flatness()
        except RuntimeError as error:
            assert "linear" in str(error), error
        else:
            close(got, right(model, x))
    with flatcore.Probe(model) as probe:
        model(x)
        close(probe.relative_flatness(), right(model, x))


def test_a_lazy_head() -> None:
    model, (x, _) = nn.Sequential(nn.LazyLinear(D), nn.Tanh(), nn.LazyLinear(C)).double(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        close(probe.relative_flatness(), right(model, x))
        assert probe.head_name == "2"


def test_a_pass_that_raises_leaves_nothing_behind() -> None:
    class Sometimes(nn.Sequential):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            if self.broken:
                raise ZeroDivisionError
            return z

    model, (x, _) = Sometimes(*network()), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        model.broken = True
        with pytest.raises(ZeroDivisionError):
            model(2 * x)
        with pytest.raises(RuntimeError):
            probe.relative_flatness()
        model.broken = False
        model(x)
        close(probe.relative_flatness(), right(model, x))


PASSES: dict[str, Callable[[nn.Sequential, Tensor], Tensor]] = {
    "sum of two": lambda net, x: net(x) + net(-x),
    "mean over views": lambda net, x: torch.stack([net(x), net(-x)]).mean(0),
    "both, stacked": lambda net, x: torch.cat([net(x), net(-x)]),
    "the first of two": lambda net, x: (net(x), net(-x))[0],
    "a residual": lambda net, x: net(x) + functional.pad(x, (0, C - 5)),
}


@pytest.mark.parametrize("way", PASSES)
def test_a_head_that_runs_twice_in_a_pass(way: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return PASSES[way](self.net, x)

    model, (x, _) = Twice(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        with pytest.raises(RuntimeError, match=r"not the output of|not the same samples|more than|twice|times"):
            probe.relative_flatness()


@pytest.mark.parametrize("last", ("a teacher", "an auxiliary head"))
def test_a_layer_that_runs_after_the_head(last: str) -> None:
    """What is returned is the first one's; named, it is measured, and the last one is never taken for it."""

    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.teacher, self.auxiliary = network(), network(), nn.Linear(D, C).double()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            if last == "a teacher":
                with torch.no_grad():
                    return {"logits": logits, "teacher": self.teacher(x)}
            return {"logits": logits, "auxiliary": self.auxiliary(self.net[:2](x))}

    model, (x, y) = Distilled(), batch()
    want = right(model.net, x)
    with flatcore.Probe(model) as probe:
        model(x)
        try:
            got = probe.relative_flatness()
        except RuntimeError as error:
            assert re.search(r"net\.2|no_grad", str(error)), error
        else:
            close(got, want)
    with flatcore.Probe(model, "net.2") as probe:
        model(x)
        close(probe.relative_flatness(), want)
    report = flatcore.evaluate(model, [(x, y)], head="net.2")
    assert report["layerwise"].mean == pytest.approx(float(want), rel=textbook.FLOAT64)


BESIDE: dict[str, Callable[[], Any]] = {
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("way", (*BESIDE, "inside a checkpoint", "inside a reentrant checkpoint"))
def test_what_autograd_keeps_or_computes_again(way: str) -> None:
    model, (x, _) = network(), batch()
    parameters = list(model.parameters())
    value = textbook.mean("layerwise", model[:2](x), model[2].weight, model[2].bias)
    wants = torch.autograd.grad(value.log(), parameters)

    def measured(x: Tensor) -> Tensor:
        model(x)
        return probe.relative_flatness(log=True)

    with flatcore.Probe(model) as probe:
        if way in BESIDE:
            with BESIDE[way]():
                measured(x).backward()
        else:
            checkpoint(measured, x.clone().requires_grad_(), use_reentrant="reentrant" in way).backward()
    for p, want in zip(parameters, wants, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-12)


def test_submodules_that_are_called_alone_after_the_pass() -> None:
    model, (x, _) = network(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        want = right(model, x)
        model[2](torch.ones(3, D).double())
        model[0](x)
        close(probe.relative_flatness(), want)
        assert probe.head_name == "2" and probe.features.shape == (N, D)


def test_a_normalising_head_is_refused() -> None:
    class Cosine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(functional.normalize(x, dim=1), functional.normalize(self.weight, dim=1))

    model, (x, _) = nn.Sequential(nn.Linear(5, D), nn.Tanh(), Cosine(D, C)).double(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        with pytest.raises(RuntimeError, match=r"not features W"):
            probe.relative_flatness()


def test_a_hook_that_changes_what_the_head_gets_or_gives() -> None:
    model, (x, _) = network(), batch()
    handle = model[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with flatcore.Probe(model) as probe:
        model(x)
        with torch.no_grad():
            close(probe.relative_flatness(), of(2 * model[:2](x), model[2].weight, model[2].bias))
    handle.remove()
    model[2].register_forward_hook(lambda module, args, output: output * torch.arange(1, C + 1))
    with flatcore.Probe(model) as probe:
        model(x)
        with pytest.raises(RuntimeError, match=r"not features W|not the output of"):
            probe.relative_flatness()


# engine fault 7: a comparison once a mode does not see what comes later
def test_a_model_that_scales_its_logits_later() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.passes = network(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return self.net(x) * (1 if self.passes < 3 else 2)

    model, (x, y) = Later(), batch()
    with flatcore.Probe(model) as probe:
        for _ in range(2):
            model(x)
            probe.relative_flatness()
        model(x)
        with pytest.raises(RuntimeError, match=r"divided by 0\.5"):
            probe.relative_flatness()
    model.passes = 0
    with pytest.raises(RuntimeError, match=r"divided by 0\.5"):
        flatcore.evaluate(model, [(x, y)] * 4)
