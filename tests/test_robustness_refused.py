"""Attacks, paths and sweeps that are refused: arguments, loaders, models; a function is followed as its module is.

Letters: N samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from attacking import LINF, samples, small
from torch import Tensor, nn

from flatcore import robustness
from flatcore._probe.probe import Probe


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------- bad input
def _call(function: str, **changes: Any) -> Any:
    model, (x, y) = small(), samples()
    arguments: dict[str, Any] = {"model": model, "inputs": x, "target": y} | LINF | changes
    if function in ("scaling_sweep", "transfer"):
        pair = arguments.pop("inputs"), arguments.pop("target")
        arguments.setdefault("loader", [pair])
        arguments.setdefault("scales", (1.0,))
    if function == "transfer":
        arguments["models"] = arguments.pop("model")
    return getattr(robustness, function)(**arguments)


def _generator() -> Iterator[Any]:
    yield from ()


BAD = {
    "another norm": ({"norm": 1}, ValueError, "norm must be one of 2, inf, got 1"),
    "eps of zero": ({"eps": 0}, ValueError, "eps must be a finite number above 0, got 0"),
    "eps infinite": ({"eps": math.inf}, ValueError, "eps must be a finite number above 0"),
    "a negative step": ({"step": -0.1}, ValueError, "step must be a finite number above 0, got -0.1"),
    "step no number": ({"step": "x"}, TypeError, "step must be a number"),
    "no steps": ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    "steps of 1.5": ({"steps": 1.5}, TypeError, "steps must be an integer"),
    "gradient": ({"gradient": "best"}, ValueError, "gradient must be one of 'exact', 'usual', got 'best'"),
    "clip": ({"clip": (1.0, 0.0)}, ValueError, "low < high"),
    "clip no pair": ({"clip": 1.0}, TypeError, "clip must be None or a pair"),
    "generator": ({"generator": 3}, TypeError, "generator must be None or a torch.Generator, got int"),
    "random_start": ({"random_start": 1}, TypeError, "random_start must be True or False"),
    "outside the range": ({"inputs": torch.full((9, 12), 255.0).double()}, ValueError, r"clip = \(0.0, 1.0\), got values"),
    "not finite": ({"inputs": torch.full((9, 12), math.nan).double()}, ValueError, "inputs must be finite"),
    "integers": ({"inputs": torch.zeros(9, 12, dtype=torch.long)}, TypeError, "got torch.int64"),
    "a negative label": ({"target": torch.full((9,), -100)}, ValueError, "target must give every row a class"),
    "a label too large": ({"target": torch.full((9,), 5)}, ValueError, "target"),
    "soft labels": ({"target": torch.zeros(9)}, TypeError, "target must hold integer class labels"),
}  # fmt: skip


@pytest.mark.parametrize("function", ("pgd", "attack_path", "scaling_sweep", "transfer"))
@pytest.mark.parametrize("case", BAD)
def test_bad_attacks(function: str, case: str) -> None:
    changes, error, words = BAD[case]
    with pytest.raises(error, match=words):
        _call(function, **changes)


@pytest.mark.parametrize("function", ("scaling_sweep", "transfer"))
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"loader": []}, ValueError, "loader must yield at least one batch, got an empty one"),
        ({"loader": _generator()}, ValueError, "loader must yield at least one batch"),
        ({"loader": 3}, TypeError, "loader must yield pairs"),
        ({"loader": [torch.zeros(3, 12)]}, TypeError, "got a Tensor as batch 0"),
        ({"loader": [(1, 2, 3)]}, TypeError, "got a tuple of 3 as batch 0"),
        ({"loader": [([1.0], torch.zeros(1))]}, TypeError, "got inputs of type list in batch 0"),
        ({"loader": [(torch.zeros(2, 12), torch.zeros(3).long())]}, ValueError, r"\(2, 12\) and \(3,\) in batch 0"),
        ({"loader": [(torch.zeros(0, 12).double(), torch.zeros(0).long())]}, ValueError, "at least one sample"),
        ({"scales": ()}, ValueError, "scales must hold at least one number"),
        ({"scales": (0.0,)}, ValueError, "scales must be finite and above 0, got 0.0"),
        ({"scales": "10"}, TypeError, "scales must be a sequence of numbers, got str"),
        ({"device": "meta"}, ValueError, "model must be on device meta, got one on cpu"),
        ({"device": "nowhere"}, ValueError, "device must name a torch device, got 'nowhere'"),
    ],
)  # fmt: skip
def test_bad_loaders_and_scales(function: str, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        _call(function, **changes)


def test_other_bad_arguments() -> None:
    x, y = samples()
    with pytest.raises(ValueError, match="model must be on the device of the inputs, cpu, got one on meta"):
        robustness.pgd(small().to("meta"), x, y, **LINF)
    with pytest.raises(TypeError, match=r"head must be the head itself, a torch\.nn\.Linear"):
        robustness.attack_path(lambda x: x, x, y, **LINF)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        robustness.attack_path(small(), x, y, chunk_size=0, **LINF)
    with pytest.raises(ValueError, match="models must hold at least one model"):
        robustness.transfer({}, [(x, y)], **LINF)
    with pytest.raises(ValueError, match="gradient must name at least one"):
        robustness.scaling_sweep(small(), [(x, y)], (1,), gradient=(), **LINF)
    path = robustness.attack_path(small(), x, y, **LINF)
    with pytest.raises(ValueError, match="measure must be one of"):
        path.aligned("adversarial")
    with pytest.raises(ValueError, match=r"quantiles must be within 0\.\.1, got 2"):
        path.aligned("loss", (2,))
    with pytest.raises(ValueError, match="results must hold at least one row"):
        robustness.plot_scaling([])
    row = {"x": np.zeros(4)}
    for changes, error, words in (
        ({"features": "x"}, TypeError, "features must be a tuple of names"),
        ({"features": ()}, ValueError, "features must name at least one"),
        ({"features": ("y",)}, TypeError, "clean must have 'y'"),
        ({"perturbed": {"x": np.zeros(3)}}, ValueError, "same rows, got 4 and 3"),
        ({"perturbed": {"x": np.full(4, np.nan)}}, ValueError, "perturbed.x must be free of NaN, got 4 rows"),
        ({"perturbed": {"x": np.zeros((4, 1))}}, ValueError, r"shape \(N,\)"),
        ({"folds": 5}, ValueError, "folds must be from 2 to the number of rows, 4, got 5"),
        ({"folds": 1}, ValueError, "folds must be from 2"),
    ):
        arguments = {"clean": row, "perturbed": row, "features": ("x",), "folds": 2} | changes
        with pytest.raises(error, match=words):
            robustness.perturbation_detector(**arguments)


def test_training_mode_is_refused_unless_allowed() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)).double(), samples()
    for kind in ("exact", "usual"):
        with pytest.raises(ValueError, match=r"BatchNorm1d in training mode.*or pass allow_train_mode=True"):
            robustness.pgd(model, x, y, gradient=kind, **LINF)
        assert model[1].num_batches_tracked == 0
        assert robustness.pgd(model, x, y, gradient=kind, allow_train_mode=True, **LINF | {"steps": 1}).shape == x.shape
        assert model[1].num_batches_tracked == 1
        model[1].reset_running_stats()
    with pytest.raises(ValueError, match=r"call model\.eval\(\)$"):
        robustness.attack_path(model, x, y, **LINF)
    robustness.scaling_sweep(model, [(x, y)], (1,), **LINF)  # in evaluation mode for the call
    assert model[1].num_batches_tracked == 0 and model.training
    stateless = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 5)).double()
    with pytest.raises(ValueError, match="without running statistics"):
        robustness.scaling_sweep(stateless, [(x, y)], (1,), **LINF)
    with pytest.raises(ValueError, match="without running statistics"):
        robustness.transfer(stateless, [(x, y)], **LINF)


def test_a_softcap_is_refused_and_the_hooks_are_gone() -> None:
    class Capped(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    model, (x, y) = Capped(*small()), samples()
    with pytest.raises(RuntimeError, match="is not the output of '2'"):
        robustness.attack_path(model, x, y, **LINF)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert isinstance(Probe(model), Probe)


# ---------------------------------------------------------------------------------------------------------- functions
def test_a_function_is_followed_as_its_module_is() -> None:
    """The model returns a pair; the message asks for a function that picks the logits, and the function is taken."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.body(x).relu()
            return self.head(hidden), hidden

    torch.manual_seed(0)
    pair = Pair().eval()
    x, y = torch.rand(5, 4), torch.arange(5) % 3
    options = {"norm": "inf", "eps": 0.5, "step": 0.25, "steps": 3}
    with pytest.raises(TypeError, match="wrap the model in a function that picks them"):
        robustness.pgd(pair, x, y, **options)

    def function(x: Tensor) -> Tensor:
        return pair(x)[0]

    plain = nn.Sequential(pair.body, nn.ReLU(), pair.head)
    got = robustness.attack_path(function, x, y, head=pair.head, **options)
    want = robustness.attack_path(plain, x, y, head="2", **options)
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(robustness.pgd(function, x, y, **options), want.adversarial)
    swept = [robustness.scaling_sweep(m, [(x, y)], (1, 10), head=pair.head, **options) for m in (function, plain)]
    assert swept[0] == swept[1]
    for attack in (
        lambda: robustness.attack_path(function, x, y, **options),
        lambda: robustness.scaling_sweep(function, [(x, y)], (1,), head="head", **options),
    ):
        with pytest.raises(
            TypeError, match=r"head must be the head itself, a torch\.nn\.Linear, where model is a function"
        ):
            attack()
    with pytest.raises(TypeError, match="model must be callable"):
        robustness.attack_path(3, x, y, head=pair.head, **options)
