"""What people do to a model with torch itself while a probe listens, or before evaluate and the attacks see it.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import textbook
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

import flatcore

N, D, C = 24, 8, 4


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, D), nn.Tanh(), nn.Linear(D, C)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5).double(), torch.arange(N) % C


def of(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.detach()
    return textbook.mean("layerwise", features.detach(), weight.detach(), bias)


def right(model: nn.Sequential, x: Tensor) -> Tensor:
    """The measure of a network that nothing listens to: a copy's, with the weights as they are."""
    first, last = model[0], model[-1]
    with torch.no_grad():
        return of(functional.linear(x, first.weight, first.bias).tanh(), last.weight, last.bias)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.detach(), want.detach(), rtol=textbook.FLOAT64, atol=0.0)


# ------------------------------------------------------------------------------------ weights that are made as they are used
@pytest.mark.parametrize("reparametrised", ("pruned", "pruned for good", "weight_norm", "orthogonal"))
def test_a_reparametrised_head(reparametrised: str) -> None:
    model, (x, y) = network(), batch()
    if reparametrised == "weight_norm":
        parametrizations.weight_norm(model[2])
    elif reparametrised == "orthogonal":
        parametrizations.orthogonal(model[2])
    else:
        prune.l1_unstructured(model[2], "weight", amount=0.5)
        if reparametrised == "pruned for good":
            prune.remove(model[2], "weight")
    with torch.no_grad():
        weight = model[2].weight.clone()
    with flatcore.Probe(model) as probe:
        loss = functional.cross_entropy(model(x), y)
        value = probe.relative_flatness()
        close(value, of(model[:2](x), weight, model[2].bias))
        (loss + value).backward()
    source = {"pruned": "weight_orig", "pruned for good": "weight"}.get(reparametrised)
    parameters = [getattr(model[2], source)] if source else list(model[2].parametrizations.weight.parameters())
    assert all(p.grad is not None for p in parameters)
    report = flatcore.evaluate(model, [(x, y)])
    assert report["layerwise"].mean == pytest.approx(
        float(of(model[:2](x), weight, model[2].bias)), rel=textbook.FLOAT64
    )


# pytorch#57784: in training mode a look at the weight is a step of the power iteration
def test_spectral_norm_is_not_stepped_by_looking() -> None:
    losses = []
    for listening, asking in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        model, (x, y) = network(), batch()
        parametrizations.spectral_norm(model[2])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        probe = flatcore.Probe(model)
        if listening:
            probe.attach()
        for _ in range(4):
            loss = functional.cross_entropy(model(x), y)
            if asking:
                original, u, v = (
                    model[2].parametrizations.weight.original.detach(),
                    model[2].parametrizations.weight[0]._u,
                    model[2].parametrizations.weight[0]._v,
                )
                weight = original / (u @ original @ v)
                close(probe.relative_flatness(), of(probe.features, weight, model[2].bias))
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        probe.detach()
    assert losses[:4] == losses[4:8] == losses[8:]


def test_functional_call_with_other_weights() -> None:
    model, other, (x, _) = network(), network(), batch()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    want = right(other, x)
    with flatcore.Probe(model) as probe:
        torch.func.functional_call(model, parameters, (x,))
        got = probe.relative_flatness()
        close(got, want)
        gradients = torch.autograd.grad(got.log(), list(parameters.values()))
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        model(x)
        close(probe.relative_flatness(), right(model, x))


CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda model: model.half(),
    "double and back": lambda model: model.float().double(),
    "data": lambda model: setattr(model[2].weight, "data", model[2].weight.data * 2),
    "copy_": lambda model: model[2].weight.data.copy_(torch.ones(C, D)),
    "load_state_dict": lambda model: model.load_state_dict(network().state_dict()),
    "a new parameter": lambda model: setattr(model[2], "weight", nn.Parameter(torch.ones(C, D).double())),
    "bias": lambda model: model[2].bias.data.add_(torch.arange(C)),
}


@pytest.mark.parametrize("change", CASTS)
def test_weights_that_change_between_pass_and_measure(change: str) -> None:
    model, (x, _) = network(), batch()
    want = right(model, x)
    with flatcore.Probe(model) as probe:
        model(x)
        CASTS[change](model)
        try:
            got = probe.relative_flatness()
        except RuntimeError as error:
            assert re.search(r"changed (since the forward pass|through)", str(error)), error
        else:
            torch.testing.assert_close(got.detach(), want, rtol=textbook.FLOAT32, atol=0.0)


# ------------------------------------------------------------------------------------------- heads and passes that move
def test_a_head_that_is_replaced_while_a_probe_listens() -> None:
    """Transfer learning in a notebook: the probe is there first, then a new head."""
    model, (x, _) = network(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        close(probe.relative_flatness(), right(model, x))
        model[2] = nn.Linear(D, 7).double()
        model(x)
        try:
            got = probe.relative_flatness()
        except RuntimeError as error:
            assert "linear" in str(error), error
        else:
            close(got, right(model, x))
    with flatcore.Probe(model) as probe:
        model(x)
        close(probe.relative_flatness(), right(model, x))


def test_a_lazy_head() -> None:
    model, (x, _) = nn.Sequential(nn.LazyLinear(D), nn.Tanh(), nn.LazyLinear(C)).double(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        close(probe.relative_flatness(), right(model, x))
        assert probe.head_name == "2"


def test_a_pass_that_raises_leaves_nothing_behind() -> None:
    class Sometimes(nn.Sequential):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            if self.broken:
                raise ZeroDivisionError
            return z

    model, (x, _) = Sometimes(*network()), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        model.broken = True
        with pytest.raises(ZeroDivisionError):
            model(2 * x)
        with pytest.raises(RuntimeError):
            probe.relative_flatness()
        model.broken = False
        model(x)
        close(probe.relative_flatness(), right(model, x))


PASSES: dict[str, Callable[[nn.Sequential, Tensor], Tensor]] = {
    "sum of two": lambda net, x: net(x) + net(-x),
    "mean over views": lambda net, x: torch.stack([net(x), net(-x)]).mean(0),
    "both, stacked": lambda net, x: torch.cat([net(x), net(-x)]),
    "the first of two": lambda net, x: (net(x), net(-x))[0],
    "a residual": lambda net, x: net(x) + functional.pad(x, (0, C - 5)),
}


@pytest.mark.parametrize("way", PASSES)
def test_a_head_that_runs_twice_in_a_pass(way: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return PASSES[way](self.net, x)

    model, (x, _) = Twice(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        with pytest.raises(RuntimeError, match=r"not the output of|not the same samples|more than|twice|times"):
            probe.relative_flatness()


@pytest.mark.parametrize("last", ("a teacher", "an auxiliary head"))
def test_a_layer_that_runs_after_the_head(last: str) -> None:
    """What is returned is the first one's; named, it is measured, and the last one is never taken for it."""

    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.teacher, self.auxiliary = network(), network(), nn.Linear(D, C).double()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            if last == "a teacher":
                with torch.no_grad():
                    return {"logits": logits, "teacher": self.teacher(x)}
            return {"logits": logits, "auxiliary": self.auxiliary(self.net[:2](x))}

    model, (x, y) = Distilled(), batch()
    want = right(model.net, x)
    with flatcore.Probe(model) as probe:
        model(x)
        try:
            got = probe.relative_flatness()
        except RuntimeError as error:
            assert re.search(r"net\.2|no_grad", str(error)), error
        else:
            close(got, want)
    with flatcore.Probe(model, "net.2") as probe:
        model(x)
        close(probe.relative_flatness(), want)
    report = flatcore.evaluate(model, [(x, y)], head="net.2")
    assert report["layerwise"].mean == pytest.approx(float(want), rel=textbook.FLOAT64)


BESIDE: dict[str, Callable[[], Any]] = {
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
@pytest.mark.parametrize("way", (*BESIDE, "inside a checkpoint", "inside a reentrant checkpoint"))
def test_what_autograd_keeps_or_computes_again(way: str) -> None:
    model, (x, _) = network(), batch()
    parameters = list(model.parameters())
    value = textbook.mean("layerwise", model[:2](x), model[2].weight, model[2].bias)
    wants = torch.autograd.grad(value.log(), parameters)

    def measured(x: Tensor) -> Tensor:
        model(x)
        return probe.relative_flatness(log=True)

    with flatcore.Probe(model) as probe:
        if way in BESIDE:
            with BESIDE[way]():
                measured(x).backward()
        else:
            checkpoint(measured, x.clone().requires_grad_(), use_reentrant="reentrant" in way).backward()
    for p, want in zip(parameters, wants, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-9, atol=1e-12)


def test_submodules_that_are_called_alone_after_the_pass() -> None:
    model, (x, _) = network(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        want = right(model, x)
        model[2](torch.ones(3, D).double())
        model[0](x)
        close(probe.relative_flatness(), want)
        assert probe.head_name == "2" and probe.features.shape == (N, D)


def test_a_normalising_head_is_refused() -> None:
    class Cosine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(functional.normalize(x, dim=1), functional.normalize(self.weight, dim=1))

    model, (x, _) = nn.Sequential(nn.Linear(5, D), nn.Tanh(), Cosine(D, C)).double(), batch()
    with flatcore.Probe(model) as probe:
        model(x)
        with pytest.raises(RuntimeError, match=r"not features W"):
            probe.relative_flatness()


def test_a_hook_that_changes_what_the_head_gets_or_gives() -> None:
    model, (x, _) = network(), batch()
    handle = model[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with flatcore.Probe(model) as probe:
        model(x)
        with torch.no_grad():
            close(probe.relative_flatness(), of(2 * model[:2](x), model[2].weight, model[2].bias))
    handle.remove()
    model[2].register_forward_hook(lambda module, args, output: output * torch.arange(1, C + 1))
    with flatcore.Probe(model) as probe:
        model(x)
        with pytest.raises(RuntimeError, match=r"not features W|not the output of"):
            probe.relative_flatness()


# engine fault 7: a comparison once a mode does not see what comes later
def test_a_model_that_scales_its_logits_later() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.passes = network(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return self.net(x) * (1 if self.passes < 3 else 2)

    model, (x, y) = Later(), batch()
    with flatcore.Probe(model) as probe:
        for _ in range(2):
            model(x)
            probe.relative_flatness()
        model(x)
        with pytest.raises(RuntimeError, match=r"divided by 0\.5"):
            probe.relative_flatness()
    model.passes = 0
    with pytest.raises(RuntimeError, match=r"divided by 0\.5"):
        flatcore.evaluate(model, [(x, y)] * 4)


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
    import sys, torch, flatcore
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
    distributed.destroy_process_group()
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
