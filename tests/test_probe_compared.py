"""Probe: every later pass is compared with what the model returned, on one row, and on a device without waiting.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import pytest
import torch
from probing import C, D, averaged, batch, right, same, small
from torch import Tensor, nn

import flatcore
from flatcore._probe.probe import verify


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------ every later pass
class Turns(nn.Module):
    """Scales its logits from the second pass on."""

    def __init__(self, bad: tuple[int, ...] = (2,), scale: float = 2.0):
        super().__init__()
        self.body, self.head, self.calls, self.bad, self.scale = nn.Linear(5, D), nn.Linear(D, C), 0, bad, scale

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        z = self.head(self.body(x))
        return self.scale * z if self.calls in self.bad else z.clone()


@pytest.mark.parametrize("mode", (True, False))
def test_a_model_that_scales_its_logits_later_is_refused(mode: bool) -> None:
    model, (x, y) = Turns().train(mode), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        probe.relative_flatness(y)
        model(x)
        with pytest.raises(RuntimeError, match=r"divided by 0\.5: pass that as temperature"):
            probe.relative_flatness(y)
        model(x)
        probe.relative_flatness(y)


@pytest.mark.parametrize(
    "kind", ("bfloat16", "many classes", "float64", "temperature", "leading", "no bias", "autocast")
)
def test_later_passes_of_many_kinds(kind: str) -> None:
    """Those that agree pass, those that do not are refused, on whichever way a row is compared."""
    x = torch.randn(2, 3, 5) if kind == "leading" else batch()[0]
    for scale in (1.0, 1.5):
        model = Turns(scale=scale)
        if kind in ("many classes", "no bias"):
            model.head = nn.Linear(D, 3000 if kind == "many classes" else C, bias=kind != "no bias")
        if kind in ("bfloat16", "float64"):
            model = model.to(getattr(torch, kind))
        inputs = x.to(next(model.parameters()).dtype)
        if kind == "temperature":
            model.register_forward_hook(lambda module, args, output: output / 2.5)
        half = torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast")
        with flatcore.Probe(model, temperature=2.5 if kind == "temperature" else 1) as probe, half:
            model(inputs)
            probe.relative_flatness()
            model(inputs)
            if scale == 1:
                probe.relative_flatness()
            else:
                with pytest.raises(RuntimeError, match="pass that as temperature"):
                    probe.relative_flatness()


def test_nothing_is_compared_without_verify() -> None:
    model, (x, y) = Turns((1, 2)), batch()
    with flatcore.Probe(model, verify=False) as probe:
        for _ in range(2):
            model(x)
            probe.relative_flatness(y)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device for which nobody waits."""
    monkeypatch.setattr(verify, "_LATER", {"cpu"})


def test_a_result_that_is_read_later_names_its_pass(later: None) -> None:
    model, (x, y) = Turns((3,)), batch()
    with flatcore.Probe(model) as probe:
        for _ in range(3):
            model(x)
            probe.relative_flatness(y)  # of the third it is not known yet
        model(x)
        with pytest.raises(RuntimeError, match=r"in forward pass 3 since attach.*earlier.*divided by 0\.5"):
            probe.relative_flatness(y)
        probe.relative_flatness(y)


def test_a_result_that_is_read_later_is_read_at_detach(later: None) -> None:
    model, (x, y) = Turns((2, 4)), batch()
    probe = flatcore.Probe(model).attach()
    for _ in range(2):
        model(x)
        probe.relative_flatness(y)
    with pytest.raises(RuntimeError, match="in forward pass 2 since attach"):
        probe.detach()
    assert not probe.is_attached
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ZeroDivisionError), flatcore.Probe(model) as probe:
        for _ in range(2):
            model(x)
            probe.relative_flatness(y)
        raise ZeroDivisionError  # the exception at hand comes first


def test_a_weight_that_was_swapped_is_seen_later(later: None) -> None:
    model, (x, y) = small().bfloat16(), batch()
    averages = {name: (p.data.float() * 1.01).bfloat16() for name, p in model.named_parameters()}
    with (
        pytest.raises(RuntimeError, match=r"in forward pass 2 .*not features W\^T \+ b"),
        flatcore.Probe(model) as probe,
    ):
        model(x.bfloat16())
        probe.relative_flatness(y)
        with averaged(model, averages, "copied"):
            model(x.bfloat16())
        probe.relative_flatness(y)


# ---------------------------------------------------------------------------------------------------- precision switches
def test_logits_of_a_pass_at_reduced_precision_are_not_used_afterwards() -> None:
    model, (x, y) = small(), batch()
    with flatcore.Probe(model) as probe:
        torch.set_float32_matmul_precision("medium")
        try:
            output = model(x)
        finally:
            torch.set_float32_matmul_precision("highest")
        assert probe.logits is not output
        same(probe.relative_flatness(y, log=True), right(probe.features, model[2].weight, model[2].bias, y))
        assert model(x) is probe.logits


SWITCHES = {
    "all": (torch.backends, "tf32"),
    "cuda": (torch.backends.cuda.matmul, "tf32"),
    "mkldnn": (torch.backends.mkldnn.matmul, "bf16"),
}


@pytest.mark.parametrize("which", SWITCHES)
def test_the_newer_switches_raise_nothing(which: str) -> None:
    """torch.get_float32_matmul_precision() does, after these."""
    where, value = SWITCHES[which]
    model, (x, y) = small(), batch()
    before = where.fp32_precision
    where.fp32_precision = value
    try:
        with flatcore.Probe(model) as probe:
            for _ in range(2):
                model(x)
                same(probe.relative_flatness(y, log=True), right(probe.features, model[2].weight, model[2].bias, y))
    finally:
        where.fp32_precision = before
