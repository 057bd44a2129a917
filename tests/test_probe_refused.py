"""Probe: the models, outputs, weights and arguments that it refuses, and the words.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import pytest
import torch
from probing import C, Changed, D, N, batch, rectified
from processes import leave_process_group
from torch import Tensor, nn
from torch.nn import functional

import flatcore


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
    model, (x, _) = rectified(), batch()
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
    model, (x, y) = rectified(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with flatcore.Probe(model) as probe:
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"before optimizer\.step"):
            probe.relative_flatness(y)


def test_nan_rows_and_absent_classes_do_not_hide_the_head() -> None:
    model, (x, y) = rectified(), batch()
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
    "unknown name": (
        (rectified(), "fc"),
        {},
        ValueError,
        r"'fc'; its linear layers are: '0' \(5 -> 8\), '2' \(8 -> 4\)",
    ),
    "not linear": (
        (rectified(), "1"),
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
    "another module": ((rectified(), nn.Linear(2, 2)), {}, ValueError, "head must be a module of the model"),
    "a number": ((rectified(), 3), {}, TypeError, "head must be None, a name or"),
    "temperature": ((rectified(),), {"temperature": 0.0}, ValueError, "temperature must be finite and above 0"),
    "verify": ((rectified(),), {"verify": 1}, TypeError, "verify must be True or False"),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_arguments(case: str) -> None:
    arguments, options, error, words = WRONG_ARGUMENTS[case]
    with pytest.raises(error, match=words):
        flatcore.Probe(*arguments, **options)


def test_data_parallel_is_refused() -> None:
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        flatcore.Probe(nn.DataParallel(rectified()))


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
    model, (x, y) = rectified(), batch()
    nn.utils.parametrizations.weight_norm(model[2])
    with flatcore.Probe(model) as probe:
        model(x)
        probe.relative_flatness(y).backward()
    assert model[2].parametrizations.weight.original1.grad is not None


def test_no_rows() -> None:
    model = rectified()
    with flatcore.Probe(model) as probe:
        model(torch.empty(0, 5))
        assert probe.relative_flatness(reduction="none").shape == (0,)
