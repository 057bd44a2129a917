"""Quantised heads: torchao's tensor subclasses and torch's packed linear layers.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import textbook
import torch
from torch import nn

import flatcore

N, D, C = 12, 32, 8
REFUSED = r"(?=.*weight)(?=.*quanti[sz]ed)(?=.*dequantize\(\))"
# what torch says of its own quantisation, which torchao replaces
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, D), nn.Tanh(), nn.Linear(D, C)).eval()


def quantised(kind: str) -> nn.Sequential:
    import torchao.quantization as q

    configs = {
        "int8 weight": lambda: q.Int8WeightOnlyConfig(),
        "int8 weight and activation": lambda: q.Int8DynamicActivationInt8WeightConfig(),
        "int4 weight": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32)),
    }
    model = network()
    q.quantize_(model[2:], configs[kind]())
    return model


KINDS = ("int8 weight", "int8 weight and activation", "int4 weight")


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_head_is_refused_with_the_way_out(torchao: ModuleType, kind: str) -> None:
    model, x = quantised(kind), torch.randn(N, 6)
    head = model[2]
    weight = head.weight.dequantize()
    with torch.no_grad(), flatcore.Probe(model) as probe:
        model(x)
        with pytest.raises(TypeError, match=REFUSED):
            probe.relative_flatness()
        if kind == "int8 weight and activation":  # the model's logits are those of rounded features
            with pytest.raises(RuntimeError, match=r"not features W|not the output of"):
                probe.relative_flatness(linear_weight=weight)
            return
        want = textbook.mean("layerwise", model[:2](x), weight, head.bias)
        got = probe.relative_flatness(linear_weight=weight)
        torch.testing.assert_close(got.double(), want, rtol=textbook.FLOAT32, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_functions_refuse_a_quantised_weight(torchao: ModuleType, kind: str) -> None:
    weight, features = quantised(kind)[2].weight, torch.randn(N, D)
    for function in (flatcore.hessian_trace, flatcore.relative_flatness, flatcore.head_metrics):
        with torch.no_grad(), pytest.raises(TypeError, match=REFUSED):
            function(features, weight)
    want = textbook.mean("neuronwise", features, weight.dequantize())
    got = flatcore.relative_flatness(features, weight.dequantize().detach(), measure="neuronwise")
    torch.testing.assert_close(got.double(), want, rtol=textbook.FLOAT32, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_refuses_a_quantised_head_by_name(torchao: ModuleType, kind: str) -> None:
    x, y = torch.randn(N, 6), torch.arange(N) % C
    with pytest.raises(TypeError, match=REFUSED):
        flatcore.evaluate(quantised(kind), [(x, y)])


def test_a_quantised_body_is_no_matter(torchao: ModuleType) -> None:
    import torchao.quantization as q

    model, x = network(), torch.randn(N, 6)
    q.quantize_(model[:2], q.Int8WeightOnlyConfig())
    with torch.no_grad(), flatcore.Probe(model) as probe:
        model(x)
        want = textbook.mean("layerwise", model[:2](x), model[2].weight, model[2].bias)
        torch.testing.assert_close(probe.relative_flatness().double(), want, rtol=textbook.FLOAT32, atol=0.0)


def test_input_gradients_of_a_quantised_model(torchao: ModuleType) -> None:
    """The weights are constants here: the gradient is that of the dequantised network."""
    model, x, y = quantised("int8 weight"), torch.randn(N, 6), torch.arange(N) % C
    same = network()
    same.load_state_dict({k: v.dequantize() if hasattr(v, "dequantize") else v for k, v in model.state_dict().items()})
    same.double()
    inputs = x.double().requires_grad_()
    loss = nn.functional.cross_entropy(same(inputs), y, reduction="sum")
    (want,) = torch.autograd.grad(loss, inputs)
    got = flatcore.input_gradients(model, x, y).gradient()
    torch.testing.assert_close(got.double(), want, rtol=0.0, atol=1e-5 * float(want.abs().max()))


def packed() -> nn.Module:
    import torch.ao.quantization as ao

    return ao.quantize_dynamic(network(), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.skipif("none" in torch.backends.quantized.engine, reason="this torch has no engine for packed layers")
def test_a_packed_linear_layer_is_named() -> None:
    model, x = packed(), torch.randn(N, 6)
    for head in (None, "2"):
        with pytest.raises((TypeError, ValueError), match=r"(?s)quanti[sz]ed.*(dequantize\(\)|head_metrics|functions)"):
            flatcore.Probe(model, head)
    body_only = nn.Sequential(*network()[:2], model[2])
    with (
        pytest.raises((TypeError, ValueError, RuntimeError), match=r"quanti[sz]ed"),
        flatcore.Probe(body_only) as probe,
    ):
        body_only(x)
        probe.relative_flatness()


def test_a_quantized_weight_of_torch_itself() -> None:
    weight = torch.quantize_per_tensor(torch.randn(C, D), 0.05, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"linear_weight must not be quantized.*linear_weight.dequantize\(\)"):
        flatcore.hessian_trace(torch.randn(N, D), weight)
