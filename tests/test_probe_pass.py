"""Probe: what a pass is. Frozen when the model returns, measured with the tensors that it used, and nothing besides.

Letters: N rows, D features, C classes. The right value is the functional form's in float64, on detached copies.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from probing import C, D, averaged, batch, right, same, small
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import flatcore


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    assert all(g is not None for g in found)
    return found  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------- frozen when it returns
class Blocks(nn.Module):
    """Linear layers in a checkpointed block, then the head (pytorch#81296)."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(5, D), nn.ReLU(), nn.Linear(D, D))
        self.head, self.reentrant = nn.Linear(D, C), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("asked", (True, False))
def test_recomputation_in_a_backward_changes_nothing(reentrant: bool, asked: bool) -> None:
    model, (x, y) = Blocks(reentrant), batch()
    x.requires_grad_()
    with flatcore.Probe(model) as probe:
        loss = functional.cross_entropy(model(x), y)
        wanted = right(model.block(x), model.head.weight, model.head.bias, y)
        if asked:
            same(probe.relative_flatness(y, log=True), wanted)
        loss.backward()
        same(probe.relative_flatness(y, log=True), wanted)
        assert probe.head_name == "head"


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_whole_model_that_is_computed_again_in_the_backward(reentrant: bool) -> None:
    model, (x, y) = small(), batch()
    x.requires_grad_()
    with flatcore.Probe(model) as probe:
        z = checkpoint(model, x, use_reentrant=reentrant)
        before = probe.head_metrics(y)
        features = probe.features
        functional.cross_entropy(z, y).backward()
        assert probe.features is features
        torch.testing.assert_close(probe.head_metrics(y), before)


@pytest.mark.parametrize("call", ("head", "other", "functional", "forward"))
def test_what_runs_outside_of_a_pass_changes_nothing(call: str) -> None:
    model, (x, y) = small(), batch()
    with flatcore.Probe(model) as probe:
        output = model(x)
        wanted = right(probe.features, model[2].weight, model[2].bias, y)
        if call == "head":
            model[2](torch.randn(3, D))
        elif call == "other":
            model[0](x)
        elif call == "functional":
            torch.func.functional_call(model[2], {"weight": torch.randn(C, D)}, (torch.randn(3, D),))
        else:
            model.forward(torch.randn(3, 5))
        assert probe.logits is output and probe.head_name == "2"
        same(probe.relative_flatness(y, log=True), wanted)


def test_functional_call_of_the_model_is_a_pass_with_the_given_parameters() -> None:
    model, (x, y) = small(), batch()
    given = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    with flatcore.Probe(model) as probe:
        torch.func.functional_call(model, given, (x,))
        value = probe.relative_flatness(y, log=True)
    features = torch.tanh(functional.linear(x, given["0.weight"], given["0.bias"]))
    wanted = flatcore.relative_flatness(features, given["2.weight"], y, linear_bias=given["2.bias"], log=True)
    same(value, wanted)
    tensors = list(given.values())
    for a, b in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(wanted, tensors), strict=True):
        same(a, b)


def test_a_pass_inside_a_transform_that_has_ended_is_refused() -> None:
    model, (x, y) = small(), batch()
    parameters = dict(model.named_parameters())
    with flatcore.Probe(model) as probe:
        torch.func.vmap(lambda row: torch.func.functional_call(model, parameters, (row[None],)))(x)
        with pytest.raises(RuntimeError, match=r"inside a transform of torch.func"):
            probe.relative_flatness(y)
        model(x)
        probe.relative_flatness(y)


def test_a_measure_inside_a_transform() -> None:
    model, (x, y) = small(), batch()
    parameters = dict(model.named_parameters())

    def loss(given: dict[str, Tensor]) -> Tensor:
        torch.func.functional_call(model, given, (x,))
        return probe.relative_flatness(y, log=True)

    with flatcore.Probe(model) as probe:
        for _ in range(2):
            found = torch.func.grad(loss)(parameters)
        model(x)
        wanted = torch.autograd.grad(probe.relative_flatness(y, log=True), list(parameters.values()))
    for a, b in zip(found.values(), wanted, strict=True):
        same(a, b)


def test_a_model_that_calls_itself() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(5, D), nn.Linear(D, C)

        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            if again:
                self(2 * x, again=False)
            return self.head(self.body(x))

    model, (x, y) = Twice(), batch()
    with flatcore.Probe(model) as probe:
        for _ in range(2):
            output = model(x)
            assert probe.logits is output
            same(probe.relative_flatness(y, log=True), right(model.body(x), model.head.weight, model.head.bias, y))


def test_every_thread_measures_its_own_pass() -> None:
    model, (x, y) = small(), batch()
    barrier, found, failed = threading.Barrier(3), {}, []

    def work(k: int) -> None:
        try:
            for step in range(10):
                scaled = (k + step + 1) * x
                barrier.wait(30)
                model(scaled)
                barrier.wait(30)
                found[k, step] = probe.relative_flatness(y, log=True), torch.tanh(model[0](scaled))
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    with flatcore.Probe(model) as probe:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed and len(found) == 30
        for value, features in found.values():
            same(value, right(features, model[2].weight, model[2].bias, y))
        assert probe.head_name == "2"  # this thread made none: the last of any


@pytest.mark.parametrize("error", (ValueError, KeyboardInterrupt))
def test_a_pass_that_an_exception_ended_is_not_measured(error: type[BaseException]) -> None:
    class Fails(nn.Module):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise error
            return x

    model, (x, y) = small(nn.Sequential(nn.Linear(D, C), Fails())), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        probe.relative_flatness(y)
        model[2][1].fails = True
        with pytest.raises(error):
            model(x)
        with pytest.raises(RuntimeError, match="has not come to its end"):
            probe.relative_flatness(y)
        model[2][1].fails = False
        model(2 * x)
        same(
            probe.relative_flatness(y, log=True),
            right(torch.tanh(model[0](2 * x)), model[2][0].weight, model[2][0].bias, y),
        )


def test_a_measure_within_the_pass_is_refused() -> None:
    class Asks(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            with pytest.raises(RuntimeError, match="has not come to its end"):
                probe.relative_flatness(y)
            return z

    model, (x, y) = small(nn.Sequential(nn.Linear(D, C), Asks())), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        probe.relative_flatness(y)


# ----------------------------------------------------------------------------------------------- derivatives and grad mode
class Wrapped(nn.Module):
    """Body and head inside a checkpoint (pytorch#33962)."""

    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.body, self.head, self.reentrant = nn.Linear(5, D), nn.Linear(D, C), reentrant

    def run(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) if self.reentrant is None else checkpoint(self.run, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("outside", (False, True))
def test_a_head_inside_a_reentrant_checkpoint_is_refused(outside: bool) -> None:
    model, (x, y) = Wrapped(None if outside else True), batch()
    x.requires_grad_()
    with flatcore.Probe(model) as probe:
        z = checkpoint(model, x, use_reentrant=True) if outside else model(x)
        for measure in (probe.relative_flatness, probe.hessian_trace, probe.feature_gradient_norms):
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                measure(y)
        # values alone are right
        features = torch.tanh(model.body(x))
        with torch.no_grad():
            same(probe.relative_flatness(y, log=True), right(features, model.head.weight, model.head.bias, y))
        torch.testing.assert_close(
            probe.head_metrics(y).loss, functional.cross_entropy(z, y, reduction="none").detach()
        )


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("where", ("model", "step"))
def test_gradients_through_a_checkpoint(where: str, reentrant: bool) -> None:
    """As without one: where the head runs with grad mode on, or the measure is computed again with it."""
    if where == "model" and reentrant:
        return  # refused, as above
    plain = Wrapped(None)
    model, (x, y) = Wrapped(reentrant if where == "model" else None), batch()
    model.load_state_dict(plain.state_dict())
    for m in (plain, model):
        inputs = x.clone().requires_grad_()
        with flatcore.Probe(m) as probe:

            def step(inputs: Tensor, m: nn.Module = m, probe: flatcore.Probe = probe) -> Tensor:
                return functional.cross_entropy(m(inputs), y) + probe.relative_flatness(y, log=True)

            again = where == "step" and m is model
            loss = checkpoint(step, inputs, use_reentrant=reentrant) if again else step(inputs)
            loss.backward()
    for a, b in zip(gradients(model), gradients(plain), strict=True):
        same(a, b)


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_a_pass_without_grad_is_measured_without(mode: Any) -> None:
    model, (x, y) = small(), batch()
    with flatcore.Probe(model) as probe:
        with mode():
            model(x)
        value = probe.relative_flatness(y, log=True)
        assert not value.requires_grad  # the weight alone would get a part of its gradient
        same(value, right(probe.features, model[2].weight, model[2].bias, y))
        if mode is torch.no_grad:  # torch saves nothing of inference mode for a backward
            given = model[2].weight.detach().clone().requires_grad_()
            assert probe.relative_flatness(y, linear_weight=given).requires_grad


# ------------------------------------------------------------------------------------------------- what has changed since
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("how", ("copied", "replaced"))
@pytest.mark.parametrize("asked", (False, True))
def test_weights_that_were_swapped_through_data(how: str, dtype: torch.dtype, asked: bool) -> None:
    model, (x, y) = small().to(dtype), batch()
    x = x.to(dtype)
    averages = {name: (p.data.float() * 1.01).to(dtype) for name, p in model.named_parameters()}
    with flatcore.Probe(model) as probe:
        if asked:  # the later pass is compared on one row
            model(x)
            probe.relative_flatness(y)
        with averaged(model, averages, how):
            model(x)
            same(
                probe.relative_flatness(y, log=True),
                right(probe.features, averages["2.weight"], averages["2.bias"], y),
            )
            model(x)
        with pytest.raises(RuntimeError, match=r"\.data|inside the block that swaps weights"):
            probe.relative_flatness(y)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("what", ("features", "weight", "bias", "logits"))
def test_changes_in_place_are_refused(what: str, dtype: torch.dtype) -> None:
    model, (x, y) = small().to(dtype), batch()
    with flatcore.Probe(model) as probe:
        with torch.no_grad():
            output = model(x.to(dtype))
        changed = {"features": probe.features, "weight": model[2].weight, "bias": model[2].bias, "logits": output}[what]
        with torch.no_grad():
            changed.mul_(2)
        words = "output was changed in place" if what == "logits" else f"head's {what} (has|were) changed"
        for measure in (probe.relative_flatness, probe.hessian_trace, probe.head_metrics):
            with pytest.raises(RuntimeError, match=words):
                measure(y)
        if what in ("weight", "bias"):  # given what the pass used, it can be measured
            given = {f"linear_{what}": changed.detach() / 2}
            wanted = {"weight": model[2].weight, "bias": model[2].bias} | {what: changed / 2}
            same(
                probe.relative_flatness(y, log=True, **given),
                right(probe.features, wanted["weight"], wanted["bias"], y),
            )


def test_features_changed_through_data() -> None:
    model, (x, y) = small(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        probe.features.data.mul_(2)
        with pytest.raises(RuntimeError, match=r"not features W\^T \+ b"):
            probe.relative_flatness(y)


def test_a_new_parameter_leaves_the_pass_its_own() -> None:
    model, (x, y) = small(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        before = model[2].weight.detach().clone()
        model[2].weight = nn.Parameter(torch.randn(C, D))
        same(probe.relative_flatness(y, log=True), right(probe.features, before, model[2].bias, y))


def test_a_head_that_was_replaced_before_attach() -> None:
    model, x = small(), batch()[0]
    probe, named = flatcore.Probe(model), flatcore.Probe(model, "2")
    model[2] = nn.Linear(D, 3)
    with probe:
        model(x)
        same(probe.relative_flatness(log=True), right(probe.features, model[2].weight, model[2].bias, None))
    with pytest.raises(ValueError, match="not in the model any more"):
        named.attach()
