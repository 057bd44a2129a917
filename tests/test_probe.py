"""Probe: the head it finds in models of many kinds, the tensors it captures, and the hooks it takes away.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from probing import C, Changed, D, N, Output, batch, rectified, wanted
from processes import leave_process_group
from torch import Tensor, nn
from torch.nn import functional

import flatcore

# the compiler hides this warning of its own look at .grad, which a filter of "error" brings back
HIDDEN = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
SCRIPTED = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@dataclasses.dataclass
class Unnamed:
    hidden: Tensor
    scores: Tensor


# ----------------------------------------------------------------------------------------------------- what it captures
def test_the_features_and_logits_are_the_models_own_tensors() -> None:
    model, (x, y) = rectified(), batch()
    with flatcore.Probe(model) as probe:
        output = model(x)
    assert probe.head is model[2] and probe.head_name == "2"
    assert probe.logits is output
    assert probe.features.grad_fn is not None and torch.equal(probe.features, model[1](model[0](x)))
    torch.testing.assert_close(probe.relative_flatness(y), wanted(probe.features, model[2], y))
    assert repr(probe) == "flatcore.Probe(Sequential: head '2', 8 -> 4, features (6, 8) torch.float32)"


@pytest.mark.parametrize("name", ("hessian_trace", "relative_flatness", "feature_gradient_norms"))
def test_every_measure_flows_into_the_whole_model(name: str) -> None:
    model, (x, y) = rectified(), batch()
    other = copy.deepcopy(model)
    with flatcore.Probe(model) as probe:
        model(x)
        getattr(probe, name)(y, reduction="mean", log=True).backward()
    features = other[1](other[0](x))
    logits = other[2](features)
    function = getattr(flatcore, name)
    function(
        features, other[2].weight, y, linear_bias=other[2].bias, logits=logits, reduction="mean", log=True
    ).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.grad is not None and a.grad.abs().sum() > 0
        torch.testing.assert_close(a.grad, b.grad)


def test_head_metrics_detaches() -> None:
    model, (x, y) = rectified(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        metrics = probe.head_metrics(y)
    assert not metrics.loss.requires_grad
    torch.testing.assert_close(metrics.loss, functional.cross_entropy(model(x), y, reduction="none").detach())


@pytest.mark.parametrize(
    "change",
    (
        lambda z: z,
        lambda z: Output(None, z),
        lambda z: {"loss": z.sum(), "logits": z},
        lambda z: {"scores": z, "hidden": z.new_zeros(N, 9)},
        lambda z: (z.sum(), z),
        lambda z: [z, z.new_zeros(3)],
        lambda z: Unnamed(z.new_zeros(N, 9), z),
        lambda z: z.double(),
        lambda z: z.log_softmax(1),
        lambda z: z - z.amax(1, keepdim=True),
        lambda z: z.reshape(2, N // 2, C),
        lambda z: z.clone(),
    ),
    ids=("tensor", "output", "mapping", "unnamed mapping", "tuple", "list", "dataclass", "upcast", "log-softmax", "shift",
         "reshaped", "copy"),
)  # fmt: skip
def test_outputs_that_are_the_heads(change: Callable[[Tensor], Any]) -> None:
    model, (x, y) = Changed(change), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        torch.testing.assert_close(probe.relative_flatness(y), wanted(probe.features, model.head, y))


def test_leading_dimensions_and_a_head_without_bias() -> None:
    model = Changed(lambda z: Output(None, z), bias=False)
    x, y = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with flatcore.Probe(model) as probe:
        model(x)
        values = probe.feature_gradient_norms(y)
    assert values.shape == (2, 3) and probe.features.shape == (2, 3, D)


def test_the_head_by_name_and_by_module() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.auxiliary = nn.Linear(5, C), nn.Linear(5, 7)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.main(x), self.auxiliary(x)

    model, (x, y) = Two(), batch()
    for given, name in (("main", "main"), (model.main, "main"), ("auxiliary", "auxiliary")):
        with flatcore.Probe(model, given) as probe:
            model(x)
            assert probe.head_name == name
            torch.testing.assert_close(probe.relative_flatness(y), wanted(x, getattr(model, name), y))


def test_tied_embeddings() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.mix = nn.Embedding(11, D), nn.Linear(D, D)
            self.lm_head = nn.Linear(D, 11, bias=False)
            self.lm_head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Output:
            return Output(None, self.lm_head(self.mix(self.embedding(tokens)).tanh()))

    model, tokens = Language(), torch.randint(11, (2, 5))
    with flatcore.Probe(model) as probe:
        model(tokens)
        assert probe.head_name == "lm_head"
        value = probe.relative_flatness()
        (gradient,) = torch.autograd.grad(value, model.embedding.weight)
    # through the head and through the embedding both
    assert (gradient != 0).all(dim=1).sum() == 11


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_logits_are_computed_again(dtype: torch.dtype) -> None:
    model, (x, y) = rectified().to(dtype), batch()
    with flatcore.Probe(model) as probe:
        output = model(8 * x.to(dtype))
        head = model[2]
        exact = functional.linear(probe.features.float(), head.weight.float(), head.bias.float())
        assert output.dtype == dtype and probe.logits.dtype == torch.float32
        torch.testing.assert_close(probe.logits, exact)
        assert (probe.logits - output.float()).abs().max() > 1e-4
        torch.testing.assert_close(
            probe.hessian_trace(y), flatcore.hessian_trace(probe.features, head.weight, y, logits=exact)
        )


def test_autocast() -> None:
    model, (x, y) = rectified(), batch()
    with flatcore.Probe(model) as probe, torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        value = probe.relative_flatness(y)
    assert output.dtype == torch.bfloat16 and value.dtype == torch.float32
    torch.testing.assert_close(value, wanted(probe.features, model[2], y))
    value.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_reduced_matmul_precision_does_not_reach_the_measure() -> None:
    model, (x, y) = rectified(), batch()
    torch.set_float32_matmul_precision("medium")
    try:
        with flatcore.Probe(model) as probe:
            model(x)
            value = probe.relative_flatness(y)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(value, wanted(probe.features, model[2], y))


@SCRIPTED
@HIDDEN
@pytest.mark.parametrize("when", ("before", "after", "method", "part"))
def test_compiled_models(when: str, fresh_compiler: None) -> None:
    model, (x, y) = rectified(), batch()
    if when == "method":
        model.compile(backend="aot_eager")
        compiled = model
    elif when == "part":
        model[1] = torch.compile(model[1], backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager")
    if when == "after":
        compiled(x)  # compiled before there were hooks
    with flatcore.Probe(compiled) as probe:
        for _ in range(2):
            output = compiled(x)
            value = probe.relative_flatness(y)
    assert probe.head is model[2]
    torch.testing.assert_close(probe.logits, output)
    torch.testing.assert_close(value, wanted(model[1](model[0](x)), model[2], y))
    value.backward()
    assert model[0].weight.grad is not None
    before = probe.features
    compiled(x + 1)
    assert probe.features is before, "a hook was left in the compiled code"


@SCRIPTED
@HIDDEN
@pytest.mark.parametrize("what", ("features", "weight", "bias"))
def test_what_has_changed_since_a_compiled_pass(what: str, fresh_compiler: None) -> None:
    model, (x, y) = rectified(), batch()
    compiled = torch.compile(model, backend="aot_eager")
    with flatcore.Probe(compiled) as probe:
        for _ in range(2):
            compiled(x)
            probe.relative_flatness(y)
            with torch.no_grad():
                {"features": probe.features, "weight": model[2].weight, "bias": model[2].bias}[what].mul_(2)
            with pytest.raises(RuntimeError, match=f"head's {what} (has|were) changed"):
                probe.relative_flatness(y)


@SCRIPTED
@HIDDEN
def test_inside_a_compiled_step(fresh_compiler: None) -> None:
    model, (x, y) = rectified(), batch()
    probe = flatcore.Probe(model)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(model(x), y) + 0.1 * probe.relative_flatness(y, log=True)

    with probe:
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        value = compiled(x, y)
    other = functional.cross_entropy(model(x), y) + 0.1 * wanted(model[1](model[0](x)), model[2], y, log=True)
    torch.testing.assert_close(value, other)
    got, want = (torch.autograd.grad(v, list(model.parameters())) for v in (value, other))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_distributed_data_parallel() -> None:
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model, (x, y) = rectified(), batch()
        wrapped = nn.parallel.DistributedDataParallel(model)
        for head in (None, "2", "module.2"):
            with flatcore.Probe(wrapped, head) as probe:
                wrapped(x)
                assert probe.head_name == "module.2"
                probe.relative_flatness(y).backward()
        assert model[0].weight.grad is not None
    finally:
        leave_process_group()


def test_inference_mode_and_no_grad() -> None:
    model, (x, y) = rectified(), batch()
    for mode in (torch.inference_mode, torch.no_grad):
        with flatcore.Probe(model) as probe, mode():
            model(x)
            assert not probe.relative_flatness(y).requires_grad


def test_temperature_is_taken_where_the_model_divides() -> None:
    model, (x, y) = Changed(lambda z: z / 2.5), batch()
    with flatcore.Probe(model, temperature=2.5) as probe:
        model(x)
        torch.testing.assert_close(probe.relative_flatness(y), wanted(probe.features, model.head, y, temperature=2.5))


def test_the_last_forward_pass_counts() -> None:
    model, (x, y) = rectified(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        first = probe.relative_flatness(y)
        model(2 * x)
        assert probe.relative_flatness(y) != first
        torch.testing.assert_close(probe.relative_flatness(y), wanted(probe.features, model[2], y))


# -------------------------------------------------------------------------------------------------------- its hooks
def test_no_hook_is_left_behind() -> None:
    model, (x, _) = rectified(), batch()
    with flatcore.Probe(model):
        assert hooks(model) > 0
        model(x)
    assert hooks(model) == 0
    with pytest.raises(ZeroDivisionError), flatcore.Probe(model):
        raise ZeroDivisionError
    assert hooks(model) == 0
    probe = flatcore.Probe(model).attach()
    assert probe.is_attached and hooks(model) > 0
    with pytest.raises(RuntimeError, match="attached already"):
        probe.attach()
    probe.detach()
    probe.detach()
    assert not probe.is_attached and hooks(model) == 0


def test_a_lost_probe_takes_its_hooks_with_it() -> None:
    model = rectified()
    probe = flatcore.Probe(model).attach()
    model(batch()[0])
    gone = weakref.ref(probe)
    del probe
    gc.collect()
    assert gone() is None and hooks(model) == 0


def test_a_probe_keeps_nothing_of_earlier_passes() -> None:
    model, (x, _) = rectified(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        features = weakref.ref(probe.features)
        model(x)
    gc.collect()
    assert features() is None


def test_two_probes_at_once() -> None:
    model, (x, y) = rectified(), batch()
    with flatcore.Probe(model) as a, flatcore.Probe(model, "0", verify=False) as b:
        model(x)
    assert a.head_name == "2" and b.head_name == "0" and b.features is x
    torch.testing.assert_close(a.relative_flatness(y), wanted(a.features, model[2], y))
