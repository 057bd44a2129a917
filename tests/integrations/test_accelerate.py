"""Hugging Face accelerate: prepared models and loaders, mixed precision, offloaded weights, two processes.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
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

N, D, C = 101, 8, 4


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, D), nn.Tanh(), nn.Linear(D, C))


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5), torch.arange(N) % C


def right(model: nn.Sequential, x: Tensor) -> Tensor:
    with torch.no_grad():
        return textbook.mean("layerwise", model[:-1](x), model[-1].weight, model[-1].bias)


@pytest.fixture
def accelerator(accelerate: ModuleType) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        return accelerate.Accelerator(cpu=True, **options)

    return make


@pytest.mark.parametrize("precision", ("no", "bf16"))
def test_a_prepared_training_step(accelerator: Callable[..., Any], precision: str) -> None:
    model, (x, y) = network(), data()
    acc = accelerator(mixed_precision=precision)
    prepared, optimizer, loader = acc.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(TensorDataset(x, y), batch_size=25)
    )
    with flatcore.Probe(prepared) as probe:
        for inputs, target in loader:
            loss = functional.cross_entropy(prepared(inputs), target)
            got = probe.relative_flatness(target)
            assert probe.head is acc.unwrap_model(prepared)[2]
            want = textbook.mean("layerwise", probe.features, model[2].weight, model[2].bias)
            torch.testing.assert_close(got.double(), want, rtol=textbook.FLOAT32, atol=0.0)
            optimizer.zero_grad()
            acc.backward(loss + 0.01 * got)
            assert model[0].weight.grad.abs().sum() > 0
            optimizer.step()


def test_gradient_accumulation_takes_the_measure_of_each_pass(accelerator: Callable[..., Any]) -> None:
    model, (x, y) = network(), data()
    acc = accelerator(gradient_accumulation_steps=2)
    prepared, optimizer, loader = acc.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(TensorDataset(x, y), batch_size=25)
    )
    with flatcore.Probe(prepared) as probe:
        for inputs, _ in loader:
            with acc.accumulate(prepared):
                want = right(model, inputs)
                prepared(inputs)
                got = probe.relative_flatness()
                torch.testing.assert_close(got.detach().double(), want, rtol=textbook.FLOAT32, atol=0.0)
                acc.backward(got)
                optimizer.step()
                optimizer.zero_grad()


def test_evaluate_with_a_prepared_loader(accelerator: Callable[..., Any]) -> None:
    model, (x, y) = network(), data()
    prepared, loader = accelerator().prepare(model, DataLoader(TensorDataset(x, y), batch_size=25, shuffle=True))
    report = flatcore.evaluate(prepared, loader)
    assert report.groups["all"].rows == N and report.complete
    assert report["layerwise"].mean == pytest.approx(float(right(model, x)), rel=textbook.FLOAT32)


OFFLOADS = ("cpu_offload", "cpu_offload_with_hook", "disk_offload", "dispatch_model")


@pytest.mark.parametrize("how", OFFLOADS)
def test_offloaded_weights(accelerate: ModuleType, how: str, tmp_path: Path) -> None:
    """The weights are there during the pass only; cpu_offload_with_hook leaves them where they are used: here, the CPU."""
    model, (x, _) = network().eval(), data()
    weight, bias = model[2].weight.detach().clone(), model[2].bias.detach().clone()
    want = right(model, x)
    if how == "dispatch_model":
        model = accelerate.dispatch_model(model, {"0": "cpu", "1": "cpu", "2": "disk"}, offload_dir=str(tmp_path))
    elif how == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    elif how == "cpu_offload_with_hook":
        model, _ = accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, torch.device("cpu"))
    with torch.no_grad(), flatcore.Probe(model) as probe:
        model(x)
        if how == "cpu_offload_with_hook":
            torch.testing.assert_close(probe.relative_flatness().double(), want, rtol=textbook.FLOAT32, atol=0.0)
            return
        assert model[2].weight.is_meta
        with pytest.raises((RuntimeError, TypeError, ValueError), match=r"offloaded") as refused:
            probe.relative_flatness()
        assert "linear_weight" in str(refused.value), "no way out"
        got = probe.relative_flatness(linear_weight=weight, linear_bias=bias)
        torch.testing.assert_close(got.double(), want, rtol=textbook.FLOAT32, atol=0.0)


def test_a_model_without_weights(accelerate: ModuleType) -> None:
    with accelerate.init_empty_weights():
        model = network()
    x = torch.randn(3, 5)
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError), match=r"meta"):
        flatcore.evaluate(model, [(x, torch.zeros(3, dtype=torch.long))])


WORKER = """
    import sys, warnings, torch
    from torch.utils.data import DataLoader, TensorDataset
    from accelerate import Accelerator, DataLoaderConfiguration
    import flatcore
    out = sys.argv[1]
    torch.set_num_threads(1)
    found = {}
    model, x, y = torch.load(out + "/in.pt", weights_only=False)
    for name, options in (
        ("shards", {}), ("shuffled", {}), ("dispatched", {"dispatch_batches": True}), ("split", {"split_batches": True}),
        ("uneven", {"even_batches": False}), ("seedable", {"use_seedable_sampler": True}),
        ("seedable, and seeded by nobody", {"use_seedable_sampler": True}),
    ):
        acc = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
        torch.manual_seed(acc.process_index if "nobody" in name else 0)
        data = DataLoader(TensorDataset(x, y), batch_size=16, shuffle="seed" in name or name == "shuffled")
        net, loader = acc.prepare(model, data)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                report = flatcore.evaluate(net, loader).to_dict()
            except ValueError as error:
                report = str(error)
        found[name] = report, " ".join(str(w.message) for w in said)
    torch.save(found, f"{out}/{acc.process_index}.pt")
    acc.end_training()
"""


@pytest.fixture(scope="module")
def two_processes(accelerate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Tensor]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("accelerate")
    model, (x, y) = network().eval(), data()
    torch.save((model, x, y), path / "in.pt")
    (path / "worker.py").write_text(textwrap.dedent(WORKER))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(path / "worker.py"), str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(2)], right(model, x)


# each process sees its own rows: prepare() has made the loader a shard, and taking every second batch of it halves it
@pytest.mark.parametrize("kind", ("shards", "shuffled", "split", "uneven", "seedable"))
def test_a_loader_that_is_already_a_shard(two_processes: tuple[list[dict], Tensor], kind: str) -> None:
    """101 rows over two processes: one is repeated to even the shares, and is not counted."""
    found, want = two_processes
    for one in found:
        report, _ = one[kind]
        assert not isinstance(report, str), report
        assert report["groups"]["all"]["rows"] == N and report["complete"]
        mean = report["groups"]["all"]["statistics"]["layerwise"]["mean"]
        assert mean == pytest.approx(float(want), rel=textbook.FLOAT32)


def test_rows_that_are_repeated_unseen_are_named(two_processes: tuple[list[dict], Tensor]) -> None:
    """A dispatcher's loader does not tell which row it repeats."""
    found = [one["dispatched"] for one in two_processes[0]]
    for report, _ in found:
        rows = report["groups"]["all"]["rows"]
        assert rows == N or report["info"]["repeated_rows"] == rows - N
    if rows != N:
        assert "rows" in found[0][1], "no warning in the first process"


def test_shares_that_overlap_are_named(two_processes: tuple[list[dict], Tensor]) -> None:
    """Each process shuffles by a seed of its own: rows are read twice, others never, and no count betrays it."""
    for one in two_processes[0]:
        report, said = one["seedable, and seeded by nobody"]
        if not isinstance(report, str):
            assert report["info"].get("repeated_rows", 0) > 0 or not report["complete"], (
                "20 rows twice, 20 never: not a word"
            )
            assert "rows" in said or one is not two_processes[0][0]
