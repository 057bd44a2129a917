"""docs/refusals.md: every row of the page is refused, in the words it gives, and its way out works.

N = 4 samples, D = 3 features, C = 5 classes unless a row says otherwise.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from processes import leave_process_group
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import flatcore

PAGE = Path(__file__).parents[1] / "docs" / "refusals.md"
N, D, C = 4, 3, 5
g = torch.Generator().manual_seed(0)
x, W, b, y = (
    torch.randn(N, D, generator=g),
    torch.randn(C, D, generator=g),
    torch.randn(C, generator=g),
    torch.arange(N),
)
inputs = torch.rand(N, 6, generator=g)


class Refusal(NamedTuple):
    """What a row's example does, the exception it ends in, and what the way out runs."""

    error: type[BaseException]
    run: Callable[[], Any]
    instead: Callable[[], Any] | None = None


def network(*after: nn.Module, outputs: int = C) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, D), nn.Tanh(), nn.Linear(D, outputs), *after).eval()


class Called(nn.Module):
    """A head, and what is done with its output."""

    def __init__(self, change: Callable[[Tensor], Any], **options: Any):
        super().__init__()
        self.body, self.head, self.change = nn.Linear(6, D), nn.Linear(D, C, **options), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.head(self.body(x).tanh()))


def probed(model: nn.Module, *, between: Callable[[], Any] = lambda: None, measured: Any = {}, **options: Any) -> Any:  # noqa: B006
    """A pass, something, a measure with the options ``measured``."""
    with flatcore.Probe(model, **options) as probe:
        model(inputs)
        between()
        return probe.relative_flatness(**measured)


def quiet(make: Callable[[], Any]) -> Any:
    """What torch warns of when it makes something of a kind that is about to go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def trace(features: Any = x, head: Any = W, *arguments: Any, **options: Any) -> Any:
    return flatcore.hessian_trace(features, head, *arguments, **options)


def norms(target: Any, **options: Any) -> Any:
    return flatcore.feature_gradient_norms(x, W, target, **options)


def tangent() -> Any:
    with forward_ad.dual_level():
        return trace(forward_ad.make_dual(x, torch.ones_like(x)))


def freed() -> Tensor:
    tensor = W.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


@contextmanager
def one_process() -> Iterator[Any]:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        leave_process_group()


def sharded(whole: bool) -> Any:
    from torch.distributed.tensor import Shard, distribute_tensor

    with one_process() as mesh:
        weight = distribute_tensor(W, mesh, [Shard(0)])
        return trace(x, weight.full_tensor() if whole else weight)


def twice() -> Any:
    features = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(trace(features), features, create_graph=True)
    return torch.autograd.grad(first.sum(), features)


def pgd(**changes: Any) -> Tensor:
    options: dict[str, Any] = {
        "model": network(),
        "inputs": inputs,
        "target": y,
        "norm": 2,
        "eps": 0.1,
        "step": 0.1,
        "steps": 1,
    }
    options |= changes
    return flatcore.robustness.pgd(options.pop("model"), options.pop("inputs"), options.pop("target"), **options)


def evaluate(batch: Any = (inputs, y), model: nn.Module | None = None, **options: Any) -> Any:
    return flatcore.evaluate(model or network(), [batch], **options)


class Coded(Tensor):
    """A weight as quantising libraries make them: small integers and a scale behind the name of a float32 tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, codes: Tensor, scale: float) -> Coded:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor, scale: float):
        self.codes, self.scale = codes, scale

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if operator is torch.ops.aten.detach.default:
            return arguments[0]
        if operator in (torch.ops.aten.t.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return operator(*(a.dequantize() if isinstance(a, Coded) else a for a in arguments))
        raise NotImplementedError(operator)


coded = Coded((W * 20).round().to(torch.int8), 0.05)
Tracer = type(
    "Tracer", (), {"__module__": "jax.core", "__dlpack__": lambda self: None}
)  # the real one: tests/integrations


def with_coded_head() -> nn.Module:
    model = network()
    model[2].weight = nn.Parameter(coded, requires_grad=False)
    return model


class Adapted(nn.Module):
    """A LoRA layer as peft builds them."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(D, C)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(D, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, C, bias=False)})

    def merged(self) -> Tensor:
        return self.base_layer.weight + self.lora_B["default"].weight @ self.lora_A["default"].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapted(merge: bool) -> Any:
    model = nn.Sequential(nn.Linear(6, D), nn.Tanh(), Adapted())
    return probed(model, measured={"linear_weight": model[2].merged()} if merge else {})


class Offloaded(nn.Linear):
    """Its parameters are elsewhere, but for the time of a forward pass."""

    def __init__(self) -> None:
        super().__init__(D, C, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, W, b)


def offloaded(**measured: Any) -> Any:
    with torch.no_grad():
        return probed(nn.Sequential(nn.Linear(6, D), nn.Tanh(), Offloaded()), measured=measured)


class Two(nn.Module):
    """Fine and coarse classes from the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fine, self.coarse = nn.Linear(6, D), nn.Linear(D, C), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).tanh()
        return self.fine(h), self.coarse(h)


def packed() -> nn.Module:
    from torch.ao import quantization

    return quiet(lambda: quantization.quantize_dynamic(network(), {nn.Linear}, dtype=torch.qint8))


def changed_features() -> Any:
    model = network()
    with torch.no_grad(), flatcore.Probe(model) as probe:
        model(inputs)
        probe.features.mul_(2)
        return probe.relative_flatness()


def checkpointed(use_reentrant: bool) -> Any:
    model, leaf = network(), inputs.clone().requires_grad_()
    with flatcore.Probe(model) as probe:
        checkpoint(model, leaf, use_reentrant=use_reentrant)
        return probe.relative_flatness()


def its_forward() -> Any:
    model = network()
    with flatcore.Probe(model) as probe:
        model.forward(inputs)
        return probe.relative_flatness()


def per_sample_in_a_transform() -> Any:
    model = network()
    with flatcore.Probe(model) as probe:
        torch.func.vmap(model)(inputs[:, None])
        return probe.relative_flatness()


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, D), nn.Linear(D, 9)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embedding(input_ids))


ids = torch.arange(8).reshape(2, 4)


def collection(**options: Any) -> Any:
    from torchmetrics import MetricCollection

    made = {"trace": flatcore.metrics.HessianTrace(), "flat": flatcore.metrics.RelativeFlatness()}
    metrics = MetricCollection(made, **options)
    for _ in range(2):
        metrics.update(x, W)
    return metrics.compute()


def wrapped(name: str) -> Any:
    from torchmetrics import wrappers

    metric = flatcore.metrics.HessianTrace()
    return wrappers.BootStrapper(metric) if name == "BootStrapper" else wrappers.MultioutputWrapper(metric, 2)


def bootstrapped_mean() -> Any:
    from torchmetrics import MeanMetric, wrappers

    metric = wrappers.BootStrapper(MeanMetric(), num_bootstraps=3)
    metric.update(trace(reduction="none"))
    return metric.compute()


def of_one_output(z: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(z), z], dim=-1)


def rowwise_temperature() -> Any:
    model, t = Called(lambda z: z / 2), torch.full((N,), 2.0)
    with flatcore.Probe(model, verify=False) as probe:
        model(inputs)
        return (
            flatcore.relative_flatness(
                probe.features,
                probe.head.weight,
                linear_bias=probe.head.bias,
                logits=probe.logits / t[:, None],
                reduction="none",
            )
            / t**2
        )


def stepped(model: nn.Module) -> Callable[[], None]:
    def change() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)

    return change


def positions(x: Tensor) -> Tensor:
    return torch.stack([x @ W.new_ones(6, C)] * 2, dim=1)


a_net = network()
REFUSALS: dict[str, dict[str, Refusal]] = {
    "Kinds of tensor": {
        "a shard of a DTensor": Refusal(TypeError, lambda: sharded(False), lambda: sharded(True)),
        "a quantized tensor": Refusal(
            TypeError,
            lambda: trace(x, quiet(lambda: torch.quantize_per_tensor(W, 0.1, 0, torch.qint8))),
            lambda: trace(x, quiet(lambda: torch.quantize_per_tensor(W, 0.1, 0, torch.qint8)).dequantize()),
        ),
        "a quantised weight of a library's own class": Refusal(
            TypeError, lambda: trace(x, coded), lambda: trace(x, coded.dequantize())
        ),
        "a nested tensor": Refusal(
            TypeError,
            lambda: trace(quiet(lambda: torch.nested.nested_tensor([x, x]))),
            lambda: trace(quiet(lambda: torch.nested.nested_tensor([x, x])).values().reshape(-1, D)),
        ),
        "a sparse tensor": Refusal(ValueError, lambda: trace(x.to_sparse()), lambda: trace(x.to_sparse().to_dense())),
        "a tensor whose memory was freed": Refusal(ValueError, lambda: trace(x, freed())),
        "a tensor with a forward-mode tangent": Refusal(ValueError, tangent),
        "integer, bool or complex features": Refusal(TypeError, lambda: trace(x.int()), lambda: trace(x.int().float())),
        "tensors on different devices": Refusal(ValueError, lambda: trace(x, W.to("meta"))),
    },
    "Derivatives": {
        "an input that requires gradient, where there is no derivative": Refusal(
            ValueError,
            lambda: flatcore.head_metrics(x.clone().requires_grad_(), W),
            lambda: flatcore.head_metrics(x.clone().requires_grad_().detach(), W),
        ),
        "a second derivative": Refusal(RuntimeError, twice),
        "a target or class weights that require gradient": Refusal(
            ValueError,
            lambda: trace(x, W, y, weight=torch.ones(C, requires_grad=True)),
            lambda: trace(x, W, y, weight=torch.ones(C, requires_grad=True).detach()),
        ),
    },
    "Arrays": {
        "a list, a number, anything that is no array": Refusal(
            TypeError, lambda: trace(x.tolist()), lambda: trace(x.numpy(), W.numpy())
        ),
        "a JAX tracer": Refusal(TypeError, lambda: trace(Tracer())),
        "a masked array": Refusal(
            TypeError,
            lambda: trace(np.ma.masked_array(x.numpy())),
            lambda: trace(np.ma.masked_array(x.numpy()).filled(0), W.numpy()),
        ),
        "an array of objects, strings, booleans, dates": Refusal(TypeError, lambda: trace(x.numpy().astype(object))),
        "labels beyond int64": Refusal(ValueError, lambda: norms(np.full(N, 2**63, dtype=np.uint64))),
    },
    "Heads": {
        "features and weight of different widths": Refusal(ValueError, lambda: trace(x, W.T), lambda: trace(x, W)),
        "a weight without rows": Refusal(ValueError, lambda: trace(x, W[:0])),
        "a model without a linear layer": Refusal(ValueError, lambda: flatcore.Probe(nn.ReLU())),
        "a head of another name": Refusal(
            ValueError, lambda: flatcore.Probe(network(), "fc"), lambda: flatcore.Probe(network(), "2")
        ),
        "a head that is no linear layer": Refusal(
            TypeError, lambda: flatcore.Probe(network(), "1"), lambda: flatcore.Probe(network(), "2")
        ),
        "a quantised head": Refusal(
            TypeError,
            lambda: probed(with_coded_head()),
            lambda: probed(with_coded_head(), measured={"linear_weight": coded.dequantize()}),
        ),
        "a head whose weight is packed": Refusal(ValueError, lambda: flatcore.Probe(packed())),
        "an offloaded head": Refusal(TypeError, offloaded, lambda: offloaded(linear_weight=W, linear_bias=b)),
        "a LoRA layer": Refusal(RuntimeError, lambda: adapted(False), lambda: adapted(True)),
        "a head of one output": Refusal(
            ValueError,
            lambda: probed(network(outputs=1)),
            lambda: flatcore.input_gradients(
                lambda v: of_one_output(network(outputs=1)(v)), inputs, torch.zeros(N, dtype=torch.long)
            ),
        ),
        "two heads that a model returns": Refusal(
            RuntimeError, lambda: probed(Two()), lambda: probed(Two(), head="fine")
        ),
        "torch.nn.DataParallel": Refusal(
            TypeError,
            lambda: flatcore.Probe(nn.DataParallel(network())),
            lambda: flatcore.Probe(nn.DataParallel(network()).module),
        ),
    },
    "Passes": {
        "no pass": Refusal(RuntimeError, lambda: flatcore.Probe(network()).attach().relative_flatness()),
        "`model.forward(...)`": Refusal(RuntimeError, its_forward),
        "a pass inside vmap or grad, asked outside": Refusal(RuntimeError, per_sample_in_a_transform),
        "a head that ran under no_grad in a pass that trains": Refusal(
            RuntimeError, lambda: checkpointed(True), lambda: checkpointed(False)
        ),
        "the weight has changed since the pass": Refusal(RuntimeError, lambda: probed(a_net, between=stepped(a_net))),
        "weights that were swapped through `.data`": Refusal(
            RuntimeError, lambda: probed(a_net, between=lambda: a_net[2].bias.data.add_(torch.arange(C)))
        ),
        "features changed in place": Refusal(RuntimeError, changed_features),
        "the head's output changed in place": Refusal(
            RuntimeError,
            lambda: probed(Called(lambda z: z.div_(2))),
            lambda: probed(Called(lambda z: z / 2), temperature=2),
        ),
        "an output that is not the head's": Refusal(RuntimeError, lambda: probed(Called(lambda z: 2 * (z / 2).tanh()))),
        "probabilities": Refusal(RuntimeError, lambda: probed(Called(lambda z: z.softmax(1)))),
        "classes masked behind the head": Refusal(
            RuntimeError,
            lambda: probed(Called(lambda z: z.masked_fill(torch.arange(C) == 1, -torch.inf))),
            lambda: probed(
                Called(lambda z: z.masked_fill(torch.arange(C) == 1, -torch.inf), bias=False),
                measured={"linear_bias": torch.where(torch.arange(C) == 1, -torch.inf, 0.0)},
            ),
        ),
        "an output divided by a temperature": Refusal(
            RuntimeError,
            lambda: probed(Called(lambda z: z / 2)),
            lambda: probed(Called(lambda z: z / 2), temperature=2),
        ),
        "an output without logits": Refusal(
            RuntimeError,
            lambda: probed(Called(lambda z: z.sum())),
            lambda: probed(Called(lambda z: z.sum()), verify=False),
        ),
        "an output of other samples": Refusal(RuntimeError, lambda: probed(Called(lambda z: z[:2]))),
        "`temperature` given to a probe's measure": Refusal(
            TypeError,
            lambda: probed(Called(lambda z: z / 2), measured={"temperature": 2.0}),
            lambda: probed(Called(lambda z: z / 2), temperature=2.0),
        ),
    },
    "Loaders": {
        "no batch": Refusal(ValueError, lambda: flatcore.evaluate(network(), [])),
        "a batch that is no pair": Refusal(TypeError, lambda: evaluate((inputs, y, y)), lambda: evaluate((inputs, y))),
        "a mapping without a target": Refusal(
            TypeError, lambda: evaluate({"input": inputs}), lambda: evaluate({"input": inputs, "labels": y})
        ),
        "a mapping, where input gradients are wanted": Refusal(
            TypeError,
            lambda: evaluate({"input": inputs, "labels": y}, input_gradient_norms=True),
            lambda: evaluate((inputs, y), input_gradient_norms=True),
        ),
        "single rows": Refusal(ValueError, lambda: evaluate((inputs[0], y[0]))),
        "a causal model's own labels": Refusal(
            ValueError,
            lambda: evaluate({"input_ids": ids, "labels": ids}, Tokens()),
            lambda: evaluate(
                {"input_ids": ids, "labels": torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)}, Tokens()
            ),
        ),
        "labels (N, 1)": Refusal(
            ValueError, lambda: evaluate((inputs, y[:, None])), lambda: evaluate((inputs, y[:, None].squeeze(1)))
        ),
        "one-hot labels": Refusal(
            ValueError,
            lambda: evaluate((inputs, nn.functional.one_hot(y, C))),
            lambda: evaluate((inputs, nn.functional.one_hot(y, C).argmax(1))),
        ),
        "rows that do not correspond": Refusal(ValueError, lambda: evaluate((inputs, y[:2]))),
        "no row that counts": Refusal(ValueError, lambda: evaluate((inputs, torch.full_like(y, -100)))),
        "a model on several devices": Refusal(
            ValueError, lambda: evaluate(model=nn.Sequential(nn.Linear(6, D), nn.Linear(D, C, device="meta")))
        ),
    },
    "Metrics": {
        "BootStrapper around a metric": Refusal(TypeError, lambda: wrapped("BootStrapper"), bootstrapped_mean),
        "MultioutputWrapper around a metric": Refusal(TypeError, lambda: wrapped("MultioutputWrapper")),
        "different measures in one compute group": Refusal(
            ValueError, lambda: collection(compute_groups=[["trace", "flat"]]), collection
        ),
        "another option for a metric that is made": Refusal(
            AttributeError,
            lambda: setattr(flatcore.metrics.HessianTrace(), "temperature", 2.0),
            lambda: flatcore.metrics.HessianTrace(temperature=2.0),
        ),
    },
    "Labels": {
        "a label that is no class": Refusal(
            ValueError, lambda: norms(y + C), lambda: norms(torch.where(y == 2, -100, y))
        ),
        "floating-point labels": Refusal(TypeError, lambda: norms(y.float()), lambda: norms(y.float().long())),
        "a target of another shape": Refusal(
            ValueError, lambda: norms(y[:, None]), lambda: norms(y[:, None].squeeze(1))
        ),
        "a negative soft target": Refusal(ValueError, lambda: trace(x, W, -torch.ones(N, C))),
        "soft targets in unmasked_cross_entropy": Refusal(
            TypeError,
            lambda: flatcore.unmasked_cross_entropy(x @ W.T, torch.ones(N, C) / C),
            lambda: flatcore.input_gradients(network(), inputs, torch.ones(N, C) / C),
        ),
    },
    "Models of attacks and input gradients": {
        "BatchNorm in training mode": Refusal(
            ValueError,
            lambda: flatcore.input_gradients(network(nn.BatchNorm1d(C)).train(), inputs, y),
            lambda: flatcore.input_gradients(network(nn.BatchNorm1d(C)), inputs, y),
        ),
        "dropout in training mode": Refusal(
            ValueError,
            lambda: flatcore.input_gradients(network(nn.Dropout()).train(), inputs, y),
            lambda: flatcore.input_gradients(network(nn.Dropout()).train(), inputs, y, allow_train_mode=True),
        ),
        "several positions per sample": Refusal(
            ValueError,
            lambda: flatcore.input_gradients(positions, inputs, y),
            lambda: flatcore.input_gradients(lambda v: positions(v)[:, 0], inputs, y),
        ),
        "integer inputs": Refusal(
            TypeError,
            lambda: flatcore.input_gradients(network(), inputs.int(), y),
            lambda: flatcore.input_gradients(network(), inputs.int().float(), y),
        ),
        "logits without a gradient": Refusal(
            ValueError, lambda: flatcore.input_gradients(Called(Tensor.detach), inputs, y)
        ),
        "inputs outside `clip`": Refusal(
            ValueError, lambda: pgd(inputs=inputs + 1), lambda: pgd(inputs=inputs + 1, clip=None)
        ),
    },
    "Options": {
        "a temperature that is not above 0": Refusal(
            ValueError, lambda: trace(temperature=0.0), lambda: trace(temperature=1e-3)
        ),
        "a tensor as temperature": Refusal(
            TypeError, lambda: probed(Called(lambda z: z / 2), temperature=torch.tensor(2.0)), rowwise_temperature
        ),
        "`norm_power=1` with neuronwise": Refusal(
            ValueError,
            lambda: flatcore.relative_flatness(x, W, measure="neuronwise", norm_power=1),
            lambda: flatcore.relative_flatness(x, W, norm_power=1),
        ),
        "`include_bias=True` without a bias, or with -inf in it": Refusal(
            ValueError, lambda: trace(include_bias=True), lambda: trace(include_bias=True, linear_bias=b)
        ),
        "class weights without a target, or negative ones": Refusal(
            ValueError, lambda: trace(weight=torch.ones(C)), lambda: trace(x, W, y, weight=torch.ones(C))
        ),
    },
}


ROWS = {f"{door}: {what}": refusal for door, rows in REFUSALS.items() for what, refusal in rows.items()}


def page() -> dict[str, str]:
    """The page's rows, door and what is refused, with their way out."""
    found, door = {}, ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            door = line[3:]
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and cells[0] != "refused":
            assert len(cells) == 3 and all(cells), line
            assert f"{door}: {cells[0]}" not in found, f"two rows of one name: {cells[0]}"
            found[f"{door}: {cells[0]}"] = cells[2]
    return found


def test_the_page_and_the_examples_have_the_same_rows() -> None:
    assert list(page()) == list(ROWS)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # make_dual loads scripted decompositions
@pytest.mark.parametrize("name", ROWS)
def test_it_is_refused_in_these_words(name: str) -> None:
    refusal = ROWS[name]
    with pytest.raises(refusal.error) as caught:
        refusal.run()
    assert type(caught.value) is refusal.error
    # what stands as code in the way out stands in the error
    missing = [code for code in re.findall(r"`([^`]+)`", page()[name]) if code not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize("name", [name for name, refusal in ROWS.items() if refusal.instead])
def test_the_way_out_leads_out(name: str) -> None:
    assert quiet(ROWS[name].instead) is not None


def test_the_plain_functions_warn_of_one_output() -> None:
    for function in (flatcore.hessian_trace, flatcore.relative_flatness, flatcore.head_metrics):
        with pytest.warns(UserWarning, match=r"one output.*a row of zeros"):
            function(x, W[:1])


if __name__ == "__main__":
    for name, refusal in ROWS.items():
        try:
            refusal.run()
        except Exception as error:
            print(f"{name}\n    {type(error).__name__}: {error}")
        else:
            print(f"{name}\n    NOT REFUSED")
