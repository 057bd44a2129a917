"""Probe: the head it finds in models of many kinds, the tensors it captures, and the models it refuses.

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
from processes import leave_process_group
from torch import Tensor, nn
from torch.nn import functional

import flatcore

N, D, C = 6, 8, 4
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


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, D), nn.ReLU(), nn.Linear(D, C))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5), torch.arange(N) % C


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def wanted(features: Tensor, head: nn.Linear, target: Tensor | None = None, **options: Any) -> Tensor:
    return flatcore.relative_flatness(features, head.weight, target, linear_bias=head.bias, **options)


class Changed(nn.Module):
    """A body, a head, and what a model does with its output."""

    def __init__(self, change: Callable[[Tensor], Any], bias: bool = True):
        super().__init__()
        self.body, self.head = nn.Linear(5, D), nn.Linear(D, C, bias=bias)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.head(self.body(x).relu()))


@dataclasses.dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


@dataclasses.dataclass
class Unnamed:
    hidden: Tensor
    scores: Tensor


# ----------------------------------------------------------------------------------------------------- what it captures
def test_the_features_and_logits_are_the_models_own_tensors() -> None:
    model, (x, y) = small(), batch()
    with flatcore.Probe(model) as probe:
        output = model(x)
    assert probe.head is model[2] and probe.head_name == "2"
    assert probe.logits is output
    assert probe.features.grad_fn is not None and torch.equal(probe.features, model[1](model[0](x)))
    torch.testing.assert_close(probe.relative_flatness(y), wanted(probe.features, model[2], y))
    assert repr(probe) == "flatcore.Probe(Sequential: head '2', 8 -> 4, features (6, 8) torch.float32)"


@pytest.mark.parametrize("name", ("hessian_trace", "relative_flatness", "feature_gradient_norms"))
def test_every_measure_flows_into_the_whole_model(name: str) -> None:
    model, (x, y) = small(), batch()
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
    model, (x, y) = small(), batch()
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
    model, (x, y) = small().to(dtype), batch()
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
    model, (x, y) = small(), batch()
    with flatcore.Probe(model) as probe, torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        value = probe.relative_flatness(y)
    assert output.dtype == torch.bfloat16 and value.dtype == torch.float32
    torch.testing.assert_close(value, wanted(probe.features, model[2], y))
    value.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_reduced_matmul_precision_does_not_reach_the_measure() -> None:
    model, (x, y) = small(), batch()
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
    model, (x, y) = small(), batch()
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
    model, (x, y) = small(), batch()
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
    model, (x, y) = small(), batch()
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
        model, (x, y) = small(), batch()
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
    model, (x, y) = small(), batch()
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
    model, (x, y) = small(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        first = probe.relative_flatness(y)
        model(2 * x)
        assert probe.relative_flatness(y) != first
        torch.testing.assert_close(probe.relative_flatness(y), wanted(probe.features, model[2], y))


# -------------------------------------------------------------------------------------------------------- its hooks
def test_no_hook_is_left_behind() -> None:
    model, (x, _) = small(), batch()
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
    model = small()
    probe = flatcore.Probe(model).attach()
    model(batch()[0])
    gone = weakref.ref(probe)
    del probe
    gc.collect()
    assert gone() is None and hooks(model) == 0


def test_a_probe_keeps_nothing_of_earlier_passes() -> None:
    model, (x, _) = small(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        features = weakref.ref(probe.features)
        model(x)
    gc.collect()
    assert features() is None


def test_two_probes_at_once() -> None:
    model, (x, y) = small(), batch()
    with flatcore.Probe(model) as a, flatcore.Probe(model, "0", verify=False) as b:
        model(x)
    assert a.head_name == "2" and b.head_name == "0" and b.features is x
    torch.testing.assert_close(a.relative_flatness(y), wanted(a.features, model[2], y))


# ------------------------------------------------------------------------------------------------------ what is refused
def softcap(z: Tensor) -> Tensor:
    return 2 * (z / 2).tanh()


def masked(z: Tensor) -> Tensor:
    return z.masked_fill(torch.arange(C) == 1, -torch.inf)


WRONG_OUTPUTS = {
    "softcap": (softcap, ("not the output of 'head'", "softcap", "'body' (5 -> 8, ran)", "'head' (8 -> 4, ran)")),
    "temperature": (lambda z: z / 2, ("divided by 2:", "pass that as temperature")),
    "scale": (lambda z: 4 * z, ("divided by 0.25:", "pass that as temperature")),
    "in place": (lambda z: z.div_(2), ("changed in place", "temperature")),
    "mask": (masked, ("not the output of 'head'",)),
    "softmax": (lambda z: z.softmax(1), ("not the output of 'head'",)),
    "another layer": (lambda z: z @ torch.diag(torch.arange(1.0, C + 1)), ("not the output of 'head'",)),
    "a loss": (lambda z: z.sum(), ("no tensor of shape (..., C = 4)", "verify=False")),
    "nothing": (lambda z: None, ("returned a NoneType", "verify=False")),
    "some rows": (lambda z: z[:2], ("shape (2, 4)", "not the same samples")),
}


@pytest.mark.parametrize("case", WRONG_OUTPUTS)
def test_a_model_whose_output_is_not_the_heads(case: str) -> None:
    change, words = WRONG_OUTPUTS[case]
    model, (x, y) = Changed(change), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        with pytest.raises(RuntimeError) as caught:
            probe.relative_flatness(y)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_a_mode_is_verified_of_its_own() -> None:
    class Evaluated(Changed):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            return z if self.training else z.softmax(1)

    model, (x, y) = Evaluated(lambda z: z), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        probe.relative_flatness(y)
        model.eval()(x)
        with pytest.raises(RuntimeError, match="not the output of 'head'"):
            probe.relative_flatness(y)


def test_the_wrong_temperature_is_refused() -> None:
    model, (x, y) = Changed(lambda z: z / 2), batch()
    with flatcore.Probe(model, temperature=3.0) as probe:
        model(x)
        with pytest.raises(RuntimeError, match="divided by 2: pass that as temperature"):
            probe.relative_flatness(y)
    with flatcore.Probe(model, temperature=2.0) as probe:
        model(x)
        with pytest.raises(TypeError, match=r"Probe\(model, temperature"):
            probe.relative_flatness(y, temperature=2.0)


def test_two_linear_outputs_the_last_of_which_is_not_returned() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = nn.Linear(5, C), nn.Linear(5, C)

        def forward(self, x: Tensor) -> Tensor:
            z = self.main(x)
            self.side(x)
            return z

    model, (x, y) = Auxiliary(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        with pytest.raises(RuntimeError, match=r"'main' \(5 -> 4, ran\), 'side' \(5 -> 4, ran\)"):
            probe.relative_flatness(y)
    with flatcore.Probe(model, "main") as probe:
        model(x)
        probe.relative_flatness(y)


def test_no_pass_and_no_head() -> None:
    model, (x, _) = small(), batch()
    probe = flatcore.Probe(model)
    for ask in (lambda: probe.features, lambda: probe.logits, lambda: probe.head, probe.relative_flatness):
        with pytest.raises(RuntimeError, match="no forward pass was seen"):
            ask()
    model(x)  # not attached
    with pytest.raises(RuntimeError, match="no forward pass was seen"):
        probe.relative_flatness()
    assert "not attached" in repr(probe)

    class Unused(Changed):
        def forward(self, x: Tensor) -> Tensor:
            return x

    unused = Unused(lambda z: z)
    for head, words in ((None, "no linear layer ran"), ("head", "not the head 'head' ran")):
        with flatcore.Probe(unused, head) as probe:
            unused(x)
            with pytest.raises(RuntimeError, match=words):
                probe.relative_flatness()
    with flatcore.Probe(model) as probe:
        model[2](torch.randn(2, D))  # past the model
        with pytest.raises(RuntimeError, match="not through the model"):
            probe.relative_flatness()


def test_a_step_between_forward_and_measure() -> None:
    model, (x, y) = small(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with flatcore.Probe(model) as probe:
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"before optimizer\.step"):
            probe.relative_flatness(y)


def test_nan_rows_and_absent_classes_do_not_hide_the_head() -> None:
    model, (x, y) = small(), batch()
    with torch.no_grad():
        model[2].bias[3] = -torch.inf
    x[1] = torch.nan
    with flatcore.Probe(model) as probe:
        model(x)
        metrics = probe.head_metrics(y)
    assert metrics.log_layerwise.isnan().tolist() == [n == 1 for n in range(N)]
    scaled = Changed(lambda z: z * 2)
    with flatcore.Probe(scaled) as probe:
        scaled(x)
        with pytest.raises(RuntimeError, match=r"divided by 0\.5"):
            probe.hessian_trace()


WRONG_ARGUMENTS = {
    "no module": ((lambda x: x,), {}, TypeError, "model must be a torch.nn.Module, got builtins.function"),
    "no linear": ((nn.ReLU(),), {}, ValueError, "model must contain a torch.nn.Linear"),
    "unknown name": ((small(), "fc"), {}, ValueError, r"'fc'; its linear layers are: '0' \(5 -> 8\), '2' \(8 -> 4\)"),
    "not linear": (
        (small(), "1"),
        {},
        TypeError,
        "head must be a torch.nn.Linear, got torch.nn.modules.activation.ReLU",
    ),
    "a convolution": (
        (nn.Sequential(nn.Conv2d(1, 2, 1)), "0"),
        {},
        TypeError,
        "head must be a torch.nn.Linear, got torch.nn.modules.conv.Conv2d",
    ),
    "another module": ((small(), nn.Linear(2, 2)), {}, ValueError, "head must be a module of the model"),
    "a number": ((small(), 3), {}, TypeError, "head must be None, a name or"),
    "temperature": ((small(),), {"temperature": 0.0}, ValueError, "temperature must be finite and above 0"),
    "verify": ((small(),), {"verify": 1}, TypeError, "verify must be True or False"),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_arguments(case: str) -> None:
    arguments, options, error, words = WRONG_ARGUMENTS[case]
    with pytest.raises(error, match=words):
        flatcore.Probe(*arguments, **options)


def test_data_parallel_is_refused() -> None:
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        flatcore.Probe(nn.DataParallel(small()))


def test_a_sharded_or_freed_weight_is_refused_by_name() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    class Sharded(Changed):
        """The weight is whole while the head runs, and freed afterwards, by something else than fully_shard."""

        def forward(self, x: Tensor) -> Tensor:
            shard, whole = self.head.weight, nn.Parameter(self.head.weight.full_tensor().detach().clone())
            self.head.weight = whole
            z = super().forward(x).detach()
            self.head.weight = shard
            whole.untyped_storage().resize_(0)
            return z

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model, (x, y) = Sharded(lambda z: z), batch()
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [Replicate()]))
        with flatcore.Probe(model) as probe:
            model(x)
            with pytest.raises(TypeError, match=r"linear_weight.*full_tensor\(grad_placements.*Partial"):
                probe.relative_flatness(y)
            with pytest.raises(TypeError, match=r"linear_weight.*full_tensor\(grad_placements.*Partial"):
                probe.relative_flatness(y, linear_weight=model.head.weight)
            whole = model.head.weight.full_tensor().detach()
            value = probe.relative_flatness(y, linear_weight=whole)
        torch.testing.assert_close(
            value, flatcore.relative_flatness(probe.features, whole, y, linear_bias=model.head.bias)
        )
    finally:
        leave_process_group()

    model = Changed(lambda z: z)
    with flatcore.Probe(model) as probe:
        model(x)
        model.head.weight.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="must own its memory"):
            probe.relative_flatness(y)


def test_a_parametrised_head() -> None:
    model, (x, y) = small(), batch()
    nn.utils.parametrizations.weight_norm(model[2])
    with flatcore.Probe(model) as probe:
        model(x)
        probe.relative_flatness(y).backward()
    assert model[2].parametrizations.weight.original1.grad is not None


def test_no_rows() -> None:
    model = small()
    with flatcore.Probe(model) as probe:
        model(torch.empty(0, 5))
        assert probe.relative_flatness(reduction="none").shape == (0,)
