"""docs/refusals.md: every row of the page is refused, in the words it gives, and its way out works.

N = 4 samples, D = 3 features, C = 5 classes unless a row says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from refusal_models import (
    C,
    Called,
    D,
    N,
    Tokens,
    Tracer,
    Two,
    W,
    a_net,
    adapted,
    b,
    bootstrapped_mean,
    changed_features,
    checkpointed,
    coded,
    collection,
    evaluate,
    freed,
    ids,
    inputs,
    its_forward,
    network,
    norms,
    of_one_output,
    offloaded,
    packed,
    per_sample_in_a_transform,
    pgd,
    positions,
    probed,
    quiet,
    rowwise_temperature,
    sharded,
    stepped,
    tangent,
    trace,
    twice,
    with_coded_head,
    wrapped,
    x,
    y,
)
from torch import Tensor, nn

import flatcore

PAGE = Path(__file__).parents[1] / "docs" / "refusals.md"


class Refusal(NamedTuple):
    """What a row's example does, the exception it ends in, and what the way out runs."""

    error: type[BaseException]
    run: Callable[[], Any]
    instead: Callable[[], Any] | None = None


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
