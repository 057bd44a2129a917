"""PyTorch Lightning: a regulariser and metrics in a module that is trained, cast, averaged, checkpointed.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import textbook
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import flatcore

N, D, C = 48, 8, 4
pytestmark = pytest.mark.filterwarnings("ignore")  # its advice: workers, loggers, names of hooks


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5), torch.arange(N) % C


def classifier(lightning: ModuleType, **options: Any) -> Any:
    """A module as its users write it; what was measured in each step stands in ``steps``, what is right beside it."""
    from flatcore.metrics import FeatureGradientNorm, HessianTrace, RelativeFlatness

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, D), nn.Tanh(), nn.Linear(D, C))
            self.flat, self.trace, self.norm = RelativeFlatness(), HessianTrace(log=True), FeatureGradientNorm()
            self.steps: list[tuple[Tensor, Tensor]] = []
            self.seen: list[tuple[Tensor, Tensor]] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def on_fit_start(self) -> None:
            self.probe = flatcore.Probe(self.net).attach()

        def on_fit_end(self) -> None:
            self.probe.detach()

        def training_step(self, batch: Any, number: int) -> Tensor:
            x, y = batch
            loss = functional.cross_entropy(self(x).float(), y)
            flatness = self.probe.relative_flatness(y)
            head = self.net[2]
            want = textbook.mean("layerwise", self.probe.features.detach(), head.weight.detach(), head.bias.detach())
            self.steps.append((flatness.detach(), want))
            return loss + 0.01 * flatness.log1p()

        def validation_step(self, batch: Any, number: int) -> None:
            x, y = batch
            head = self.net[2]
            features = self.net[:2](x)
            for metric in (self.flat, self.trace, self.norm):
                metric.update(features, head.weight, y, linear_bias=head.bias)
            self.log("flat", self.flat)
            self.log("trace", self.trace)
            self.log("norm", self.norm)
            self.seen.append((features.detach().double(), y))

        def on_validation_epoch_start(self) -> None:
            self.seen.clear()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Classifier(**options)


def fit(lightning: ModuleType, path: Path, *, epochs: int = 2, **options: Any) -> tuple[Any, Any]:
    module = classifier(lightning)
    loader = DataLoader(TensorDataset(*data()), batch_size=16)
    settings = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=path,
        num_sanity_val_steps=0,
        **(settings | options),
    )
    trainer.fit(module, loader, loader)
    return module, trainer


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("precision", ("32-true", "bf16-mixed", "bf16-true", "64-true"))
def test_training_with_a_regulariser_and_metrics(pytorch_lightning: ModuleType, tmp_path: Path, precision: str) -> None:
    module, trainer = fit(pytorch_lightning, tmp_path, precision=precision)
    assert len(module.steps) == 6
    for got, want in module.steps:
        torch.testing.assert_close(got.double(), want, rtol=textbook.FLOAT32, atol=0.0)
    assert hooks(module) == 0
    head = module.net[2]
    x, y = (torch.cat(part) for part in zip(*module.seen, strict=True))
    weight, bias = head.weight.detach(), head.bias.detach()
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for name, measure in (("flat", "layerwise"), ("trace", "hessian_trace"), ("norm", "feature_gradient_norm")):
        want = float(textbook.mean(measure, x, weight, bias, y))
        got = math.exp(logged[name]) if name == "trace" else logged[name]
        # Lightning may log a value in the module's dtype: then it has that dtype's digits
        digits = 2.0**-8 * max(1.0, abs(math.log(want))) if precision == "bf16-true" else textbook.FLOAT32
        assert got == pytest.approx(want, rel=digits)


def test_a_cast_module_keeps_float64_states(pytorch_lightning: ModuleType, tmp_path: Path) -> None:
    module, _ = fit(pytorch_lightning, tmp_path, precision="bf16-true", epochs=1)
    for metric in (module.flat, module.trace, module.norm):
        states = [getattr(metric, name) for name in metric._defaults]
        assert all(x.dtype == torch.float64 for x in states if x.is_floating_point())


# Lightning#17375
@pytest.mark.parametrize("callback", ("StochasticWeightAveraging", "EMAWeightAveraging"))
def test_weight_averaging_copies_no_hooks(pytorch_lightning: ModuleType, tmp_path: Path, callback: str) -> None:
    make = getattr(pytorch_lightning.callbacks, callback)
    options = {"swa_lrs": 0.05, "swa_epoch_start": 1} if callback.startswith("Stochastic") else {}
    module, trainer = fit(pytorch_lightning, tmp_path, epochs=4, callbacks=[make(**options)])
    for got, want in module.steps:
        torch.testing.assert_close(got.double(), want, rtol=textbook.FLOAT32, atol=0.0)
    averaged = getattr(trainer.callbacks[0], "_average_model", None)
    for model in (module, averaged):
        assert model is None or hooks(model) == 0


def test_a_checkpoint_written_while_a_probe_listens(pytorch_lightning: ModuleType, tmp_path: Path) -> None:
    written = pytorch_lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(pytorch_lightning, tmp_path, callbacks=[written], enable_checkpointing=True, epochs=1)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 3
    module = classifier(pytorch_lightning)
    content = torch.load(files[-1], weights_only=False)
    assert set(content["state_dict"]) == set(module.state_dict())
    module.load_state_dict(content["state_dict"])
    report = flatcore.evaluate(module, [data()])
    head = module.net[2]
    with torch.no_grad():
        want = textbook.mean("layerwise", module.net[:2](data()[0]), head.weight, head.bias)
    assert report.groups["all"].rows == N and want > 0


def test_evaluate_a_lightning_module(pytorch_lightning: ModuleType) -> None:
    module, (x, y) = classifier(pytorch_lightning), data()
    report = flatcore.evaluate(module, DataLoader(TensorDataset(x, y), batch_size=16))
    head = module.net[2]
    with torch.no_grad():
        want = textbook.mean("layerwise", module.net[:2](x), head.weight, head.bias)
    assert report.info["head"] == "net.2"
    assert report["layerwise"].mean == pytest.approx(float(want), rel=textbook.FLOAT32)
    found = flatcore.input_gradients(module.eval(), x, y)
    inputs = x.double().requires_grad_()
    loss = functional.cross_entropy(module.double()(inputs), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(
        found.gradient().double(), gradient, rtol=0.0, atol=1e-6 * float(gradient.abs().max()) * 16
    )
