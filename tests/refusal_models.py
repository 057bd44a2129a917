"""What the rows of docs/refusals.md need: models, tensors and calls, of which each is refused.

N = 4 samples, D = 3 features, C = 5 classes unless a row says otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from processes import leave_process_group
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import flatcore

N, D, C = 4, 3, 5
g = torch.Generator().manual_seed(0)
x, W, b, y = (
    torch.randn(N, D, generator=g),
    torch.randn(C, D, generator=g),
    torch.randn(C, generator=g),
    torch.arange(N),
)
inputs = torch.rand(N, 6, generator=g)


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
