"""Probe: heads that are not one plain linear layer with its weight at hand, and what is said about them.

Adapters, quantised, packed and offloaded weights (stand-ins of the libraries' structure), several heads, what a
model does with its head's output, heads of one output. Letters: N rows, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from probing import C, D, N, batch, refused, right, same
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

import flatcore


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Model(nn.Module):
    def __init__(self, head: nn.Module, change: Callable[[Tensor], Any] = lambda z: z):
        super().__init__()
        self.body, self.head, self.change = nn.Linear(5, D), head, change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.head(torch.tanh(self.body(x))))


# --------------------------------------------------------------------------------------------------------------- adapters
class Lora(nn.Module):
    """As peft.tuners.lora.layer.Linear is built (peft#1334)."""

    def __init__(self, base: nn.Linear, rank: int = 2, scaling: float = 0.5):
        super().__init__()
        self.base_layer, self.scaling = base, scaling
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.merged = self.disable_adapters = False
        self.active_adapters = ["default"]

    def delta(self) -> Tensor:
        return self.scaling * self.lora_B["default"].weight @ self.lora_A["default"].weight

    def forward(self, x: Tensor) -> Tensor:
        z = self.base_layer(x)
        if self.merged or self.disable_adapters:
            return z
        return z + self.scaling * self.lora_B["default"](self.lora_A["default"](x))


class Loralib(nn.Linear):
    """As loralib.Linear is built: a linear layer with two parameters more."""

    merged = False

    def __init__(self) -> None:
        super().__init__(D, C)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(C, 2))

    def delta(self) -> Tensor:
        return self.lora_B @ self.lora_A

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.delta().T


@pytest.mark.parametrize("verify", (True, False))
@pytest.mark.parametrize("named", (False, True))
@pytest.mark.parametrize("kind", ("peft", "loralib"))
def test_a_head_with_adapters(kind: str, named: bool, verify: bool) -> None:
    head: Any = Lora(nn.Linear(D, C)) if kind == "peft" else Loralib()
    model, (x, y) = Model(head), batch()
    base = head.base_layer if kind == "peft" else head
    for zero in (True, False):  # new adapters are 0: the output is the base layer's, the gradient is not
        with torch.no_grad():
            (head.lora_B["default"].weight if kind == "peft" else head.lora_B).mul_(0 if zero else 1).add_(
                0 if zero else 0.3
            )
        with flatcore.Probe(model, "head" if named else None, verify=verify) as probe:
            model(x)
            assert probe.head is base and probe.features.shape == (N, D)
            words = f"the head 'head' is a LoRA layer ({__name__}.{type(head).__name__})"
            refused(lambda: probe.relative_flatness(y), words, "W + scaling * B", "linear_weight=")
            merged = base.weight + head.delta()
            value = probe.relative_flatness(y, log=True, linear_weight=merged)
            same(value, right(probe.features, merged, base.bias, y))
            value.backward()
            assert all(p.grad is not None for p in head.parameters())
            for _ in range(2):  # later passes
                model(x)
                same(
                    probe.relative_flatness(y, log=True, linear_weight=merged),
                    right(probe.features, merged, base.bias, y),
                )


@pytest.mark.parametrize("how", ("merged", "disabled", "no adapter"))
def test_adapters_that_take_no_part(how: str) -> None:
    head = Lora(nn.Linear(D, C))
    model, (x, y) = Model(head), batch()
    with torch.no_grad():
        if how == "merged":
            head.base_layer.weight += head.delta()
            head.merged = True
        elif how == "disabled":
            head.disable_adapters = True
        else:
            head.active_adapters = []
            head.lora_B["default"].weight.zero_()
    with flatcore.Probe(model) as probe:
        model(x)
        same(
            probe.relative_flatness(y, log=True), right(probe.features, head.base_layer.weight, head.base_layer.bias, y)
        )


def test_an_adapter_of_another_kind_is_named() -> None:
    class Scaled(nn.Module):  # as peft's IA3
        def __init__(self) -> None:
            super().__init__()
            self.base_layer, self.factors = nn.Linear(D, C), nn.Parameter(torch.rand(C))

        def forward(self, x: Tensor) -> Tensor:
            return self.factors * self.base_layer(x)

    model, (x, y) = Model(Scaled()), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        refused(lambda: probe.relative_flatness(y), "base layer of 'head'", f"{__name__}.", "Scaled, which changes its")


def test_adapters_in_the_body_do_not_hide_the_head() -> None:
    model, (x, y) = Model(nn.Linear(D, C)), batch()
    model.body = Lora(model.body)
    with flatcore.Probe(model) as probe:
        model(x)
        assert probe.head_name == "head"
        probe.relative_flatness(y)


# -------------------------------------------------------------------------------------------------------- another weight
@pytest.mark.parametrize("verify", (True, False))
def test_with_another_weight_the_captured_logits_count_for_nothing(verify: bool) -> None:
    model, (x, y) = Model(nn.Linear(D, C)), batch()
    w, b = torch.randn(C, D), torch.randn(C)
    with flatcore.Probe(model, verify=verify) as probe:
        model(x)
        for given in (
            {"linear_weight": w},
            {"linear_bias": b},
            {"linear_weight": w, "linear_bias": b},
            {"linear_bias": None},
        ):
            used = {"linear_weight": model.head.weight, "linear_bias": model.head.bias} | given
            if verify:
                words = " and ".join(given)
                refused(lambda: probe.relative_flatness(y, **given), "not the output of 'head'", f"the {words} given")  # noqa: B023
            else:
                value = probe.relative_flatness(y, log=True, **given)
                same(value, right(probe.features, used["linear_weight"], used["linear_bias"], y))
        own = probe.relative_flatness(y, log=True, linear_weight=model.head.weight, linear_bias=model.head.bias)
        same(own, right(probe.features, model.head.weight, model.head.bias, y))
        f = torch.randn(3, D)
        same(probe.relative_flatness(log=True, features=f), right(f, model.head.weight, model.head.bias))


def test_two_heads_averaged() -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, C), nn.Linear(D, C)

        def forward(self, h: Tensor) -> Tensor:
            return (self.a(h) + self.b(h)) / 2

    model, (x, y) = Model(Averaged()), batch()
    a, b = model.head.a, model.head.b
    with flatcore.Probe(model) as probe:
        model(x)
        refused(
            lambda: probe.relative_flatness(y),
            "not the output of 'head.b' (torch.nn.modules.linear.Linear)", "'head.a' ran too", "averaged or added",
            "linear_weight=", "flatcore.relative_flatness(features, weight",
        )  # fmt: skip
        given = {"linear_weight": (a.weight + b.weight) / 2, "linear_bias": (a.bias + b.bias) / 2}
        value = probe.relative_flatness(y, log=True, **given)
        same(value, right(probe.features, *given.values(), y))
        value.backward()
    assert a.weight.grad is not None and torch.equal(a.weight.grad, b.weight.grad)


# ---------------------------------------------------------------------------------------------------- several outputs
class Two(nn.Module):
    def __init__(self, change: Callable[[Tensor, Tensor], Any], coarse: int = 3):
        super().__init__()
        self.body, self.fine, self.coarse = nn.Linear(5, D), nn.Linear(D, C), nn.Linear(D, coarse)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        return self.change(self.fine(h), self.coarse(h))


CHANGES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "mapping": lambda a, b: {"fine": a, "coarse": b},
    "upcast": lambda a, b: [a.double(), b.double()],
    "log-softmax": lambda a, b: (a.log_softmax(1), b.log_softmax(1)),
}


@pytest.mark.parametrize("coarse", (3, C, D))
@pytest.mark.parametrize("how", CHANGES)
def test_two_outputs_that_both_match_a_head(how: str, coarse: int) -> None:
    model, x = Two(CHANGES[how], coarse), batch()[0]
    with flatcore.Probe(model) as probe:
        for _ in range(2):
            model(x)
            refused(probe.relative_flatness, f"'fine' (8 -> {C})", f"'coarse' (8 -> {coarse})", "head=...")
    for name in ("fine", "coarse"):
        with flatcore.Probe(model, name) as probe:
            for _ in range(2):
                model(x)
                head = getattr(model, name)
                same(probe.relative_flatness(log=True), right(probe.features, head.weight, head.bias))


def test_a_second_output_that_is_no_head() -> None:
    class Embeds(Two):
        def forward(self, x: Tensor) -> Any:
            h = self.body(x)  # a linear layer's output, returned too
            return self.fine(h.relu()), h

    for change in (lambda a, b: (a, torch.zeros(N, 3)), lambda a, b: (a * 0 + b.sum(), b)):
        model, (x, _) = Two(change), batch()
        with flatcore.Probe(model, "fine" if change(torch.ones(1), torch.ones(1))[1].shape != (1,) else None) as probe:
            model(x)
            probe.relative_flatness()
    model = Embeds(lambda a, b: None)
    with flatcore.Probe(model) as probe:
        model(batch()[0])
        assert probe.head_name == "fine"
        probe.relative_flatness()


def test_a_head_that_runs_twice() -> None:
    class Twice(Model):
        def forward(self, x: Tensor) -> Any:
            return self.change([super(Model, self).__getattr__("head")(self.body(k * x)) for k in (1, 2)])

    for change, words in (
        (lambda z: (z[0], z[1]), ("'head' (8 -> 4) and 'head' (8 -> 4)", "ran more than once", "functional form")),
        (lambda z: torch.cat(z), ("made (6, 4) in the last of 2 calls", "not the same samples")),
    ):
        model = Twice(nn.Linear(D, C), change)
        with flatcore.Probe(model) as probe:
            model(batch()[0])
            refused(probe.relative_flatness, *words)


# ------------------------------------------------------------------------------------------------ quantised and offloaded
class Packed(Tensor):
    """A weight whose numbers are elsewhere, as torchao's subclasses have them."""

    @staticmethod
    def __new__(cls, whole: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype)

    def __init__(self, whole: Tensor):
        self.scale = whole.abs().amax() / 127
        self.codes = (whole / self.scale).round().to(torch.int8)

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        args, kwargs = tree_map(lambda x: x.dequantize() if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **kwargs)


def test_a_quantised_weight() -> None:
    model, (x, y) = Model(nn.Linear(D, C)), batch()
    model.head.weight = nn.Parameter(Packed(model.head.weight.detach()), requires_grad=False)
    with flatcore.Probe(model) as probe:
        for _ in range(2):
            model(x)
            refused(lambda: probe.relative_flatness(y), "weight of the head 'head'", f"{__name__}.Packed", "quantised?",
                    "linear_weight=probe.head.weight.dequantize()", error=TypeError)  # fmt: skip
            whole = model.head.weight.dequantize()
            same(
                probe.relative_flatness(y, log=True, linear_weight=whole),
                right(probe.features, whole, model.head.bias, y),
            )


def test_codes_of_four_bits() -> None:
    """As bitsandbytes' Params4bit: a parameter of bytes, of another shape."""

    class Bytes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x[..., :C] + self.bias

    model, (x, y) = Model(Bytes(D, C)), batch()
    model.head.weight = nn.Parameter(torch.zeros(C * D // 2, 1, dtype=torch.uint8), requires_grad=False)
    with flatcore.Probe(model) as probe:
        model(x)
        refused(lambda: probe.relative_flatness(y), "torch.uint8", "quantised?", "linear_weight", error=TypeError)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_layer_that_is_no_linear_layer() -> None:
    model, (x, y) = Model(nn.Linear(D, C)), batch()
    model = torch.ao.quantization.quantize_dynamic(model, {"head": torch.ao.quantization.default_dynamic_qconfig})
    head, kind = model.head, "torch.ao.nn.quantized.dynamic.modules.linear.Linear"
    with flatcore.Probe(model) as probe:
        model(x)
        refused(lambda: probe.relative_flatness(y), kind, "quantised: its weight is packed", "weight().dequantize()")
    refused(lambda: flatcore.Probe(model, "head"), kind, "weight().dequantize()", error=TypeError)
    refused(lambda: flatcore.Probe(nn.Sequential(head)), kind, "weight().dequantize()", error=ValueError)
    value = flatcore.relative_flatness(
        torch.tanh(model.body(x)), head.weight().dequantize(), y, linear_bias=head.bias(), log=True
    )
    assert value.isfinite()


def test_an_offloaded_head() -> None:
    """As accelerate does it: the weight is loaded for the layer's forward, and on the meta device outside of it."""
    model, (x, y) = Model(nn.Linear(D, C)), batch()
    head = model.head
    held = {name: p.detach() for name, p in head.named_parameters()}
    plain = head.forward

    def put(values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            head._parameters[name] = nn.Parameter(value)

    def forward(x: Tensor) -> Tensor:
        put(held)
        try:
            return plain(x)
        finally:
            put({name: value.to("meta") for name, value in held.items()})

    head.forward, head._hf_hook = forward, object()
    put({name: value.to("meta") for name, value in held.items()})
    with flatcore.Probe(model) as probe:
        for _ in range(2):
            model(x)
            refused(lambda: probe.relative_flatness(y), "weight of the head", "offloaded by an accelerate hook", "meta",
                    "linear_weight and linear_bias", error=TypeError)  # fmt: skip
            given = {"linear_weight": held["weight"]}
            refused(lambda: probe.relative_flatness(y, **given), "bias of the head", "offloaded", error=TypeError)  # noqa: B023
            given = {"linear_weight": held["weight"], "linear_bias": held["bias"]}
            same(probe.relative_flatness(y, log=True, **given), right(probe.features, *given.values(), y))


# ------------------------------------------------------------------------------------------- what a model does afterwards
class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


WORDS: dict[str, tuple[nn.Module, Callable[[Tensor], Any], tuple[str, ...]]] = {
    "softcap": (nn.Linear(D, C), lambda z: 0.5 * torch.tanh(2 * z), ("increasing function of each logit", "softcap?")),
    "mask": (nn.Linear(D, C), lambda z: z.masked_fill(torch.arange(C) > 1, -torch.inf), ("2 classes are masked", "-inf")),
    "large mask": (nn.Linear(D, C), lambda z: z.masked_fill(torch.arange(C) > 2, -1e9), ("1 classes are masked", "-inf")),
    "softmax": (nn.Linear(D, C), lambda z: z.softmax(1), ("probabilities (a softmax)", "return its logits")),
    "layer": (nn.Linear(D, C), lambda z: z @ torch.diag(torch.arange(1.0, C + 1)), ("something else follows",)),
    "own forward": (Standardised(D, C), lambda z: z, ("not features W^T + b", f"{__name__}.Standardised", "its forward")),
    "tokens": (nn.Linear(D, C), lambda z: z[-2:], ("selected after the head", "probe.features[:, -1]")),
    "other rows": (nn.Linear(D, C), lambda z: z[-2:] + torch.arange(C), ("not the same samples",)),
}  # fmt: skip


@pytest.mark.parametrize("case", WORDS)
def test_what_was_seen_is_said(case: str) -> None:
    head, change, words = WORDS[case]
    model, (x, y) = Model(head, change), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        refused(lambda: probe.relative_flatness(y), "'head'", *words)
        if case not in ("softcap",):
            with pytest.raises(RuntimeError) as caught:
                probe.relative_flatness(y)
            assert "softcap" not in str(caught.value)


def test_the_last_token_in_the_functional_form() -> None:
    model, y = Model(nn.Linear(D, C), lambda z: z[:, -1]), batch()[1]
    with flatcore.Probe(model) as probe:
        model(torch.randn(N, 3, 5))
        refused(probe.relative_flatness, "selected after the head")
        value = flatcore.relative_flatness(
            probe.features[:, -1], probe.head.weight, y, linear_bias=probe.head.bias, log=True
        )
        same(value, right(probe.features[:, -1], model.head.weight, model.head.bias, y))


@pytest.mark.parametrize("rows", (1, N))
def test_a_temperature_that_is_a_tensor(rows: int) -> None:
    T = (1 + torch.rand(rows)).requires_grad_()
    model, (x, y) = Model(nn.Linear(D, C), lambda z: z / T[:, None]), batch()
    refused(
        lambda: flatcore.Probe(model, temperature=T),
        "temperature must be a number, got a tensor", "verify=False",
        "logits=probe.logits / T, reduction='none') / T**2", "feature_gradient_norms: / T", error=TypeError,
    )  # fmt: skip
    with flatcore.Probe(model, verify=False) as probe:  # the way out
        model(x)
        head, functions = (
            probe.head,
            (flatcore.relative_flatness, flatcore.hessian_trace, flatcore.feature_gradient_norms),
        )
        for function, power in zip(functions, (2, 2, 1), strict=True):
            value = function(
                probe.features, head.weight, y, linear_bias=head.bias, logits=probe.logits / T[:, None], reduction="none"
            ) / T**power  # fmt: skip
            f, w, b = (t.detach().double() for t in (probe.features, head.weight, head.bias))
            for n, t in enumerate(T.detach().expand(N).tolist()):
                same(value[n], function(f[n], w, y[n], linear_bias=b, temperature=t, reduction="none"))
            (gradient,) = torch.autograd.grad(value.sum(), T, retain_graph=True)
            assert (gradient != 0).all()


@pytest.mark.parametrize("measure", ("relative_flatness", "hessian_trace", "feature_gradient_norms", "head_metrics"))
def test_a_head_of_one_output_is_refused(measure: str) -> None:
    model, (x, _) = Model(nn.Linear(D, 1)), batch()
    y = torch.zeros(N, dtype=torch.long)
    with flatcore.Probe(model) as probe:
        model(x)
        refused(
            lambda: getattr(probe, measure)(y), "the head 'head' has one output (C = 1)", "torch.cat", error=ValueError
        )
        w, b, z = probe.head.weight, probe.head.bias, torch.zeros_like
        p = model(x).detach().double().sigmoid().flatten()
        trace = flatcore.hessian_trace(
            probe.features, torch.cat([z(w), w]), linear_bias=torch.cat([z(b), b]), reduction="none"
        )
        same(trace, 2 * p * (1 - p) * probe.features.detach().double().square().sum(1))
