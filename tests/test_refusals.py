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
from torch import Tensor, nn
from torch.autograd import forward_ad

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
        distributed.destroy_process_group()


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
        "torch.nn.DataParallel": Refusal(
            TypeError,
            lambda: flatcore.Probe(nn.DataParallel(network())),
            lambda: flatcore.Probe(nn.DataParallel(network()).module),
        ),
    },
    "Passes": {
        "no pass": Refusal(RuntimeError, lambda: flatcore.Probe(network()).attach().relative_flatness()),
        "the weight has changed since the pass": Refusal(RuntimeError, lambda: probed(a_net, between=stepped(a_net))),
        "the head's output changed in place": Refusal(
            RuntimeError,
            lambda: probed(Called(lambda z: z.div_(2))),
            lambda: probed(Called(lambda z: z / 2), temperature=2),
        ),
        "an output that is not the head's": Refusal(RuntimeError, lambda: probed(Called(lambda z: 2 * (z / 2).tanh()))),
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
        "rows that do not correspond": Refusal(ValueError, lambda: evaluate((inputs, y[:2]))),
        "no row that counts": Refusal(ValueError, lambda: evaluate((inputs, torch.full_like(y, -100)))),
        "a model on several devices": Refusal(
            ValueError, lambda: evaluate(model=nn.Sequential(nn.Linear(6, D), nn.Linear(D, C, device="meta")))
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


if __name__ == "__main__":
    for name, refusal in ROWS.items():
        try:
            refusal.run()
        except Exception as error:
            print(f"{name}\n    {type(error).__name__}: {error}")
        else:
            print(f"{name}\n    NOT REFUSED")
