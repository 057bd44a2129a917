"""How people run a model with torch: compiled, traced, in threads and processes, with loaders of many kinds.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import textbook
import torch
from listening import C, N, batch, close, network, of, right
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

import flatcore


# -------------------------------------------------------------------------------------------------------- wrapped models
@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # what the compiler says of itself
def test_a_compiled_model_everywhere(fresh_compiler: None) -> None:
    model, (x, y) = network().eval(), batch()
    compiled = torch.compile(model, backend="aot_eager")
    report = flatcore.evaluate(compiled, DataLoader(TensorDataset(x, y), batch_size=7))
    assert report["layerwise"].mean == pytest.approx(float(right(model, x)), rel=textbook.FLOAT64)
    inputs = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(functional.cross_entropy(model(inputs), y, reduction="sum"), inputs)
    torch.testing.assert_close(flatcore.input_gradients(compiled, x, y).gradient(), want, rtol=1e-9, atol=1e-12)
    options: dict[str, Any] = {"norm": 2, "eps": 0.5, "step": 0.2, "steps": 3, "clip": None}
    moved = flatcore.robustness.pgd(compiled, x, y, **options)
    torch.testing.assert_close(moved, flatcore.robustness.pgd(model, x, y, **options))
    with flatcore.Probe(compiled) as probe:
        for rows in (x, x[:5]):
            compiled(rows)
            close(probe.relative_flatness(), right(model, rows))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_models(fresh_compiler: None) -> None:
    model, (x, y) = network().eval(), batch()
    graph = torch.fx.symbolic_trace(model)
    with flatcore.Probe(graph) as probe:
        graph(x)
        close(probe.relative_flatness(), right(model, x))
    scripted = torch.jit.trace(model, x)
    inputs = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(functional.cross_entropy(model(inputs), y, reduction="sum"), inputs)
    torch.testing.assert_close(flatcore.input_gradients(scripted, x, y).gradient(), want, rtol=1e-9, atol=1e-12)
    with pytest.raises((TypeError, ValueError), match=r"(?s)linear|Linear"):
        flatcore.Probe(scripted)
    exported = torch.export.export(model, (x,)).module()
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"(?s)linear|Linear"):
        flatcore.Probe(exported)


@pytest.mark.parametrize("when", ("training", "evaluation"))
def test_autocast_and_a_gradient_scaler(when: str) -> None:
    model, (x, y) = network().float().train(when == "training"), batch()
    x = x.float()
    with flatcore.Probe(model) as probe, torch.autocast("cpu", torch.bfloat16):
        loss = functional.cross_entropy(model(x), y)
        value = probe.relative_flatness()
        want = of(probe.features, model[2].weight, model[2].bias)
        torch.testing.assert_close(value.detach().double(), want, rtol=textbook.FLOAT32, atol=0.0)
        assert value.dtype == torch.float32
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss + value).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_threads_each_with_a_model_and_a_probe() -> None:
    models = [network() for _ in range(4)]
    x, _ = batch()
    wants, found = [float(right(model, x)) for model in models], [[] for _ in models]

    def work(k: int) -> None:
        with flatcore.Probe(models[k]) as probe:
            for _ in range(20):
                models[k](x)
                found[k].append(float(probe.relative_flatness().detach()))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for values, want in zip(found, wants, strict=True):
        assert values == pytest.approx([want] * 20, rel=textbook.FLOAT64)


# --------------------------------------------------------------------------------------------------------------- loaders
class Stream(IterableDataset):
    """Rows that the workers of a loader share."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        first, every = (0, 1) if info is None else (info.id, info.num_workers)
        for k in range(first, len(self.x), every):
            yield self.x[k], self.y[k]


@pytest.mark.filterwarnings(
    "ignore:.*fork.*:RuntimeWarning"
)  # jax, where another test has imported it, warns of workers
@pytest.mark.parametrize("workers", (0, 2))
def test_a_stream_with_workers(workers: int) -> None:
    model, (x, y) = network(), batch()
    report = flatcore.evaluate(model, DataLoader(Stream(x, y), batch_size=5, num_workers=workers))
    assert report.groups["all"].rows == N
    assert report["layerwise"].mean == pytest.approx(float(right(model, x)), rel=textbook.FLOAT64)


def test_evaluate_takes_a_data_set_itself() -> None:
    model, (x, y) = network(), batch()
    report = flatcore.evaluate(model, TensorDataset(x, y))
    assert report.groups["all"].rows == N
    assert report["layerwise"].mean == pytest.approx(float(right(model, x)), rel=textbook.FLOAT64)


def test_evaluate_takes_numpy_batches() -> None:
    model, (x, y) = network(), batch()
    report = flatcore.evaluate(model, [(x.numpy(), y.numpy())])
    assert report["layerwise"].mean == pytest.approx(float(right(model, x)), rel=textbook.FLOAT64)


@pytest.mark.parametrize("kind", ("column", "one-hot", "one-hot integers", "float"))
def test_labels_that_need_a_word(kind: str) -> None:
    model, (x, y) = network(), batch()
    one_hot = functional.one_hot(y, C)
    labels = {"column": y[:, None], "one-hot": one_hot.double(), "one-hot integers": one_hot, "float": y.float()}[kind]
    words = {"column": r"squeeze\(1\)", "float": "integer"}.get(kind, r"argmax\(1\)")
    with pytest.raises((TypeError, ValueError), match=words):
        flatcore.evaluate(model, [(x, labels)])


# ---------------------------------------------------------------------------------------------------- several processes
WORKER = """
    import os, sys, torch, flatcore
    from torch import distributed, nn
    from torch.nn import functional
    out = sys.argv[1]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    found = {}

    def fresh():
        model, x, y = torch.load(out + "/in.pt", weights_only=False)
        return model, x[rank::2], y[rank::2]

    def trained(name, model, x, y, parameters):
        with flatcore.Probe(model) as probe:
            loss = functional.cross_entropy(model(x), y)
            value = probe.relative_flatness(y)
            (loss + value).backward()
            found[name] = (float(value.detach()), [full(p.grad) for p in parameters])

    def full(gradient):
        return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()

    model, x, y = fresh()
    trained("DDP", nn.parallel.DistributedDataParallel(model), x, y, list(model.parameters()))
    model, x, y = fresh()
    wrapped = nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model), static_graph=True)
    trained("static DDP", wrapped, x, y, list(model.parameters()))
    from torch.distributed.fsdp import fully_shard
    for name, layers in (("FSDP2", ()), ("FSDP2 by layers", (0, 2))):
        model, x, y = fresh()
        for k in layers:
            fully_shard(model[k])
        fully_shard(model)
        try:
            trained(name, model, x, y, list(model.parameters()))
        except (TypeError, RuntimeError, ValueError) as error:
            found[name] = str(error)
    torch.save(found, f"{out}/{rank}.pt")
    distributed.barrier()
    os._exit(0)  # as tests/processes.py says
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], float, list[Tensor]]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("processes")
    model, (x, y) = network(), batch()
    torch.save((model, x, y), path / "in.pt")
    (path / "worker.py").write_text(textwrap.dedent(WORKER))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(path / "worker.py"), str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    alone = copy.deepcopy(model)
    value = textbook.mean("layerwise", alone[:2](x), alone[2].weight, alone[2].bias)
    loss = functional.cross_entropy(alone(x), y) + value
    gradients = list(torch.autograd.grad(loss, list(alone.parameters())))
    found = [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return found, float(value.detach()), gradients


@pytest.mark.parametrize("kind", ("DDP", "static DDP", "FSDP2", "FSDP2 by layers"))
def test_a_regulariser_in_two_processes(two_processes: tuple[Any, float, list[Tensor]], kind: str) -> None:
    """Each process has half of the rows: values average to the whole batch's, and so do the gradients."""
    found, value, gradients = two_processes
    if isinstance(found[0][kind], str):
        assert "linear_weight" in found[0][kind], found[0][kind]
        assert 'grad_placements=[Partial("avg")]' in found[0][kind], found[0][kind]
        return
    assert sum(one[kind][0] for one in found) / 2 == pytest.approx(value, rel=textbook.FLOAT64)
    for one in found:
        for got, want in zip(one[kind][1], gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
