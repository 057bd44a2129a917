"""Averaged weights beside a probe: torch_ema's swaps, torch's AveragedModel, SWA's BatchNorm update.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
from types import ModuleType

import pytest
import textbook
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import flatcore

N, D, C = 16, 8, 4
CHANGED = r"changed (since the forward pass|through \.data after the pass)"


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, D), nn.Tanh(), nn.Linear(D, C)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5).double(), torch.arange(N) % C


def right(model: nn.Sequential, x: Tensor, measure: str = "layerwise") -> Tensor:
    """The measure of a network as it stands, from its own parameters."""
    with torch.no_grad():
        return textbook.mean(measure, model[:-1](x), model[-1].weight, model[-1].bias)


def averaged(torch_ema: ModuleType, model: nn.Module) -> object:
    """Averages that lie far from the weights: one step of 0.5 towards others."""
    ema = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5).add_(0.3)
    ema.update()
    return ema


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ------------------------------------------------------------------------------------------------------------ torch_ema
def test_a_pass_under_average_parameters_measured_inside(torch_ema: ModuleType) -> None:
    model, (x, _) = network(), batch()
    ema = averaged(torch_ema, model)
    with flatcore.Probe(model) as probe:
        model(x)
        with ema.average_parameters():
            model(x)
            want, got = right(model, x), probe.relative_flatness()
    torch.testing.assert_close(got, want, rtol=textbook.FLOAT64, atol=0.0, check_device=False)


# pytorch_ema#2: the weights come back through .data, which counts no version
@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
def test_a_pass_under_average_parameters_measured_after(torch_ema: ModuleType, grad: bool) -> None:
    model, (x, _) = network(), batch()
    ema = averaged(torch_ema, model)
    now = right(model, x)
    with flatcore.Probe(model) as probe:
        with ema.average_parameters(), torch.set_grad_enabled(grad):
            want = right(model, x)
            model(x)
        assert not torch.isclose(want, now)
        with pytest.raises(RuntimeError, match=CHANGED):
            probe.relative_flatness()
        model(x)
        torch.testing.assert_close(probe.relative_flatness(), now, rtol=textbook.FLOAT64, atol=0.0)


def test_a_pass_before_average_parameters_measured_inside(torch_ema: ModuleType) -> None:
    model, (x, _) = network(), batch()
    ema = averaged(torch_ema, model)
    with flatcore.Probe(model) as probe:
        model(x)
        with ema.average_parameters(), pytest.raises(RuntimeError, match=CHANGED):
            probe.relative_flatness()
        # the weights are what they were: the pass is the model's again
        try:
            got = probe.relative_flatness()
        except RuntimeError as error:
            assert re.search(CHANGED, str(error)), error
        else:
            torch.testing.assert_close(got, right(model, x), rtol=textbook.FLOAT64, atol=0.0)


def test_a_swap_of_equal_weights_is_no_change_of_value(torch_ema: ModuleType) -> None:
    """Averages that equal the weights: a measure after the block is right, whatever memory holds it."""
    model, (x, _) = network(), batch()
    ema = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.9)
    with flatcore.Probe(model) as probe:
        with ema.average_parameters():
            model(x)
        try:
            got = probe.relative_flatness()
        except RuntimeError as error:
            assert re.search(CHANGED, str(error)), error
        else:
            torch.testing.assert_close(got, right(model, x), rtol=textbook.FLOAT64, atol=0.0)


def test_training_with_averages_and_a_regulariser(torch_ema: ModuleType) -> None:
    model, (x, y) = network(), batch()
    ema = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with flatcore.Probe(model) as probe:
        for _ in range(3):
            loss = functional.cross_entropy(model(x), y)
            want = textbook.mean("layerwise", probe.features, model[-1].weight, model[-1].bias)
            gradients = torch.autograd.grad(want.log(), list(model.parameters()), retain_graph=True)
            optimizer.zero_grad()
            (0.0 * loss + probe.relative_flatness(log=True)).backward()
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                torch.testing.assert_close(p.grad, gradient, rtol=1e-8, atol=1e-10)
            optimizer.step()
            ema.update()
            with ema.average_parameters(), torch.no_grad():
                model(x)
                torch.testing.assert_close(probe.relative_flatness(), right(model, x), rtol=textbook.FLOAT64, atol=0.0)


def test_evaluate_under_average_parameters(torch_ema: ModuleType) -> None:
    model, (x, y) = network(), batch()
    ema = averaged(torch_ema, model)
    with ema.average_parameters():
        want = right(model, x)
        report = flatcore.evaluate(model, [(x, y)])
    assert report["layerwise"].mean == pytest.approx(float(want), rel=textbook.FLOAT64)


# -------------------------------------------------------------------------------------------------------- AveragedModel
# Lightning#17375: a model is copied while something listens to it
@pytest.mark.parametrize("asked", (False, True), ids=("", "asked"))
def test_an_averaged_model_of_a_probed_one(asked: bool) -> None:
    model, (x, _) = network(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        if asked:
            probe.relative_flatness()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        assert hooks(average) == 0
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2)
        average.update_parameters(model)
        model(x)
        average(x + 1)  # another model's pass
        torch.testing.assert_close(
            probe.relative_flatness(), right(model, x).requires_grad_(), rtol=textbook.FLOAT64, atol=0
        )
    with flatcore.Probe(average) as probe:
        average(x)
        assert probe.head_name == "module.2"
        got = probe.relative_flatness().detach()
        torch.testing.assert_close(got, right(average.module, x), rtol=textbook.FLOAT64, atol=0)
    assert hooks(model) == hooks(average) == 0


@pytest.mark.parametrize("how", ("deepcopy", "pickle", "torch.save", "state_dict"))
def test_copies_and_checkpoints_of_a_probed_model_are_clean(how: str) -> None:
    model, x = network(), torch.randn(4000, 5).double()

    def written(value: object) -> bytes:
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()

    plain = len(pickle.dumps(model)), len(written(model)), len(written(model.state_dict()))
    with flatcore.Probe(model) as probe:
        model(x)
        probe.relative_flatness()
        if how == "deepcopy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            text = pickle.dumps(model)
            assert len(text) < plain[0] + 4000
            other = pickle.loads(text)
        elif how == "torch.save":
            text = written(model)
            assert len(text) < plain[1] + 4000
            other = torch.load(io.BytesIO(text), weights_only=False)
        else:
            assert len(written(model.state_dict())) == plain[2]
            other = network()
            other.load_state_dict(model.state_dict())
        assert hooks(other) == 0 or how != "deepcopy"
        other(x[:3] + 7)
        want = right(model, x)
        torch.testing.assert_close(probe.relative_flatness().detach(), want, rtol=textbook.FLOAT64, atol=0)
        with flatcore.Probe(other) as another:
            other(x[:50])
            got = another.relative_flatness().detach()
            torch.testing.assert_close(got, right(other, x[:50]), rtol=textbook.FLOAT64, atol=0)
    assert hooks(model) == 0 and hooks(other) == 0


def test_batchnorm_update_while_a_probe_listens() -> None:
    model = nn.Sequential(nn.Linear(5, D), nn.BatchNorm1d(D), nn.Tanh(), nn.Linear(D, C)).double()
    x, y = batch()
    with flatcore.Probe(model) as probe:
        model(x)
        average = AveragedModel(model)
        average.update_parameters(model)
        update_bn([(x, y)], average)
        torch.testing.assert_close(
            probe.relative_flatness().detach(), right(copy.deepcopy(model), x), rtol=textbook.FLOAT64, atol=0
        )
    report = flatcore.evaluate(average, [(x, y)])
    want = right(average.module.eval(), x)
    assert report["layerwise"].mean == pytest.approx(float(want), rel=textbook.FLOAT64)
