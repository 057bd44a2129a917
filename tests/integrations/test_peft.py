"""LoRA: on the head, beside it, merged, switched off; heads that peft keeps a trained copy of.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import textbook
import torch
from torch import Tensor, nn
from torch.nn import functional

import flatcore

N, D, C = 16, 8, 5
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::DeprecationWarning")


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 6).double(), torch.arange(N) % C


def adapted(peft: ModuleType, *targets: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A peft model whose adapters are not 0, and a plain network with the weights W + scaling B A, both float64."""
    model = Classifier().double()
    plain = copy.deepcopy(model)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=list(targets), init_lora_weights=False, **options)
    wrapped = peft.get_peft_model(model, config).double()
    named = dict(wrapped.named_modules())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.mul_(4)
        for target in targets:
            layer = named[f"base_model.model.{target}"]
            delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            getattr(plain, target).weight.add_(delta)
    return wrapped, plain


def right(plain: Classifier, x: Tensor, measure: str = "layerwise") -> Tensor:
    with torch.no_grad():
        return textbook.mean(measure, plain.body(x).tanh(), plain.head.weight, plain.head.bias)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.detach(), want, rtol=textbook.FLOAT64, atol=0.0)


def test_lora_beside_a_plain_head(peft: ModuleType) -> None:
    model, plain = adapted(peft, "body")
    x, y = batch()
    with flatcore.Probe(model) as probe:
        logits = model(x)
        torch.testing.assert_close(logits, plain(x))
        close(probe.relative_flatness(), right(plain, x))
        assert probe.head_name == "base_model.model.head"
        (functional.cross_entropy(logits, y) + probe.relative_flatness(log=True)).backward()
    layer = model.base_model.model.body
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0
    assert layer.base_layer.weight.grad is None


# peft#1334: the weight is W + scaling B A; the last linear layer that runs is B
@pytest.mark.parametrize("head", (None, "base_model.model.head", "base_model.model.head.base_layer"))
@pytest.mark.parametrize("targets", (("head",), ("body", "head")), ids=("head", "both"))
def test_lora_on_the_head(peft: ModuleType, targets: tuple[str, ...], head: str | None) -> None:
    model, plain = adapted(peft, *targets)
    x, _ = batch()
    layer = model.base_model.model.head
    with flatcore.Probe(model, head) as probe:
        model(x)
        with pytest.raises(RuntimeError, match=r"is a LoRA layer.*linear_weight=.*get_delta_weight"):
            probe.relative_flatness()
        # in the error's words; the model's output is compared with this weight's
        got = probe.relative_flatness(linear_weight=layer.base_layer.weight + layer.get_delta_weight("default"))
        close(got, right(plain, x))
        got.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_" in name)


def test_the_merged_weight_beside_the_base_layer(peft: ModuleType) -> None:
    """Another weight than the layer's is given: its logits are then those of that weight, not the captured ones."""
    model, plain = adapted(peft, "head")
    x, _ = batch()
    with torch.no_grad(), flatcore.Probe(model, "base_model.model.head.base_layer", verify=False) as probe:
        model(x)
        merged = plain.head.weight.detach()
        for measure in ("layerwise", "neuronwise"):
            got = probe.relative_flatness(linear_weight=merged, measure=measure)
            close(got, right(plain, x, measure))
        close(probe.hessian_trace(linear_weight=merged), right(plain, x, "hessian_trace"))
        metrics = probe.head_metrics(linear_weight=merged)
        close(metrics.layerwise.mean(), right(plain, x))
        assert torch.equal(metrics.prediction, plain(x).argmax(1))


@pytest.mark.parametrize("how", ("merge_and_unload", "merge_adapter", "disable_adapter", "set_adapter"))
def test_adapters_that_do_not_run(peft: ModuleType, how: str) -> None:
    model, plain = adapted(peft, "head")
    x, _ = batch()
    layer = model.base_model.model.head
    if how == "merge_and_unload":
        model = model.merge_and_unload()
    elif how == "merge_adapter":
        model.merge_adapter()
    elif how == "disable_adapter":
        plain.head.load_state_dict(layer.base_layer.state_dict())
        model.base_model.disable_adapter_layers()
    else:
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
        model.set_adapter("second")
        model.double()
        with torch.no_grad():
            delta = layer.scaling["second"] * layer.lora_B["second"].weight @ layer.lora_A["second"].weight
            plain.head.weight.copy_(layer.base_layer.weight + delta)
    with torch.no_grad(), flatcore.Probe(model) as probe:
        torch.testing.assert_close(model(x), plain(x))
        try:
            got = probe.relative_flatness()
        except (RuntimeError, TypeError) as error:
            assert how == "set_adapter" and "LoRA" in str(error), error
        else:
            close(got, right(plain, x))


def test_a_head_in_modules_to_save(peft: ModuleType) -> None:
    model, plain = adapted(peft, "body", modules_to_save=["head"])
    x, y = batch()
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.mul_(2)
        plain.head.weight.mul_(2)
    with flatcore.Probe(model) as probe:
        model(x)
        got = probe.relative_flatness()
        close(got, right(plain, x))
        got.backward()
    assert model.base_model.model.head.modules_to_save["default"].weight.grad.abs().sum() > 0
    report = flatcore.evaluate(model, [(x, y)])
    assert report["layerwise"].mean == pytest.approx(float(right(plain, x)), rel=textbook.FLOAT64)


@pytest.mark.parametrize("option", ("dropout", "rslora", "dora"))
def test_variants_on_the_head(peft: ModuleType, option: str) -> None:
    """Dropout before A: two kinds of features go in. DoRA: rows are normalised. No W + scaling B A gives their logits."""
    options = {"dropout": {"lora_dropout": 0.5}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}[option]
    model, plain = adapted(peft, "head", **options)
    x, _ = batch()
    layer = model.base_model.model.head
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    model.train(option == "dropout")
    with torch.no_grad(), flatcore.Probe(model) as probe:
        model(x)
        with pytest.raises(RuntimeError, match=r"LoRA"):
            probe.relative_flatness()
        if option == "rslora":
            close(probe.relative_flatness(linear_weight=merged), right(plain, x))
        else:
            with pytest.raises(RuntimeError, match=r"not the output of"):
                probe.relative_flatness(linear_weight=merged)


def test_evaluate_and_input_gradients_with_lora_everywhere(peft: ModuleType) -> None:
    model, plain = adapted(peft, "body", "head")
    x, y = batch()
    model.eval()
    inputs = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(functional.cross_entropy(plain(inputs), y, reduction="sum"), inputs)
    torch.testing.assert_close(flatcore.input_gradients(model, x, y).gradient(), want, rtol=1e-9, atol=1e-12)
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters()), "flags were not restored"
    try:
        report = flatcore.evaluate(model, [(x, y)])
    except (RuntimeError, TypeError, ValueError) as error:
        assert "LoRA" in str(error), error
    else:
        assert report["layerwise"].mean == pytest.approx(float(right(plain, x)), rel=textbook.FLOAT64)
