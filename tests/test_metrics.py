"""The torchmetrics: equal to the functions on all rows at once, in one process and in several.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metering import METRICS, C, D, N, batches, data, double

import flatcore
from flatcore.metrics import FeatureGradientNorm, HessianTrace, RelativeFlatness

INF, NAN = math.inf, math.nan
MEASURES = ("trace", "layerwise", "neuronwise")


# ------------------------------------------------------------------------------------------------------------ the mean
@pytest.mark.parametrize("log", (False, True), ids=("", "log"))
@pytest.mark.parametrize("name", METRICS)
def test_batches_give_the_mean_of_all_rows(name: str, log: bool) -> None:
    make, function = METRICS[name]
    x, w, b, y = data()
    metric = double(make(log=log, temperature=1.5))
    for rows in batches(x):
        metric.update(x[rows], w, y[rows], linear_bias=b)
    want = function(x, w, y, linear_bias=b, temperature=1.5, reduction="mean", log=log)
    torch.testing.assert_close(metric.compute(), want, rtol=1e-12, atol=1e-12)
    assert metric.compute().dtype == torch.float64


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("kind", ("none", "weighted", "soft", "soft-weighted", "bias", "logits"))
def test_every_kind_of_weighting(name: str, kind: str) -> None:
    make, function = METRICS[name]
    x, w, b, y = data()
    g = torch.Generator().manual_seed(9)
    soft, weight = torch.rand(N, C, generator=g).double(), torch.rand(C, generator=g).double()
    weight[0] = 0
    target = None if kind in ("none", "bias") else soft if "soft" in kind else y
    options: dict[str, Any] = {"weight": weight} if "weighted" in kind else {}
    made = {"include_bias": True} if kind == "bias" else {}
    metric = double(make(**made))
    logits = x @ w.T + b
    for rows in batches(x):
        part = None if target is None else target[rows]
        extra = {"logits": logits[rows]} if kind == "logits" else {}
        metric.update(x[rows], w, part, linear_bias=b, **options, **extra)
    extra = {"logits": logits} if kind == "logits" else {}
    want = function(x, w, target, linear_bias=b, reduction="mean", **options, **made, **extra)
    torch.testing.assert_close(metric.compute(), want, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", METRICS)
def test_the_log_is_right_where_every_value_underflows(name: str) -> None:
    make, function = METRICS[name]
    x = torch.tensor([[900.0, 1.0], [950.0, -3.0], [4000.0, 0.0], [15000.0, 0.0]])
    metric = double(make(log=True))
    for row in x:
        metric.update(row[None], torch.eye(2), torch.tensor([0]))
    want = function(x.double(), torch.eye(2), torch.zeros(4, dtype=torch.long), reduction="mean", log=True)
    assert want < -850
    torch.testing.assert_close(metric.compute(), want, rtol=1e-12, atol=0.0)
    assert make().update(x, torch.eye(2), torch.zeros(4, dtype=torch.long)) is None


def test_leading_dimensions_numpy_and_results_in_float32() -> None:
    x, w, _, y = data()
    metric = RelativeFlatness()
    metric.update(x.reshape(4, 50, D), w, y.reshape(4, 50))
    want = flatcore.relative_flatness(x, w, y)
    assert metric.compute().dtype == torch.float32
    torch.testing.assert_close(metric.compute().double(), want, rtol=1e-6, atol=0.0)
    arrays = RelativeFlatness()
    arrays.update(x.numpy(), w.numpy(), y.numpy())
    assert arrays.compute() == metric.compute()


# -------------------------------------------------------------------------------------------------------- distribution
@pytest.mark.parametrize("name", METRICS)
def test_median_and_heaviest_share(name: str) -> None:
    make, function = METRICS[name]
    x, w, b, y = data(scale=20.0)
    metric, logs = double(make()), double(make(log=True))
    for rows in batches(x):
        metric.update(x[rows], w, y[rows], linear_bias=b)
        logs.update(x[rows], w, y[rows], linear_bias=b)
    values = function(x, w, y, linear_bias=b, reduction="none", log=True)[y != -100].sort().values
    # a bin is 1/16 wide: its mean lies within it, and so does the middle row
    top = values[len(values) // 2]
    assert abs(logs.median() - top - np.log(np.median((values - top).exp()))) <= 1 / 16
    torch.testing.assert_close(metric.median(), logs.median().exp())
    weights = values.exp()
    for fraction in (0.0, 0.01, 0.1, 0.5, 1.0):
        count = fraction * len(values)
        whole = int(count)
        top = weights.flip(0)
        exact = top[:whole].sum() + (top[whole] * (count - whole) if whole < len(values) else 0)
        got = metric.heaviest_share(fraction)
        torch.testing.assert_close(got, exact / weights.sum(), rtol=1 / 16, atol=1e-12)
    assert metric.heaviest_share() == metric.heaviest_share(0.01) > 0.01


def test_median_of_wide_bins_zeros_and_weights() -> None:
    metric = double(HessianTrace(log=True))
    rows = torch.tensor([[0.0, 0.0], [2000.0, 0.0], [2000.0, 0.0]])
    metric.update(rows, torch.eye(2))
    want = flatcore.hessian_trace(rows[1:].double(), torch.eye(2), log=True)
    torch.testing.assert_close(metric.median(), want, rtol=1e-12, atol=0.0)
    zeros = double(HessianTrace(log=True))
    zeros.update(torch.zeros(3, 2), torch.eye(2))
    assert zeros.median() == -INF and zeros.compute() == -INF and zeros.heaviest_share().isnan()
    # weighted: one row of weight 5 outweighs two of weight 1
    weighted = double(HessianTrace(log=True))
    x = torch.tensor([[1.0, 0.0], [5.0, 0.0], [9.0, 0.0]])
    weighted.update(x, torch.eye(2), torch.tensor([0, 0, 1]), weight=torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(weighted.median(), flatcore.hessian_trace(x[2:].double(), torch.eye(2), log=True))


@pytest.mark.parametrize(
    "logs", ([-3.0, 5.0], [-40.0, 2.0], [-INF, 1.0], [-INF, -INF, 0.0, 3.0], [1.0, 2.0, 4.0], [0.0, 0.0])
)
def test_of_two_middle_values_the_median_is_the_mean(logs: list[float]) -> None:
    """The trace of (x, 0) under the identity with logits 0 is x^2 / 2: rows of any log."""
    x = torch.tensor(logs, dtype=torch.float64)
    rows = torch.stack([((x + math.log(2)) / 2).exp(), torch.zeros(len(x))], dim=1)
    metric = double(HessianTrace())
    for row in rows:
        metric.update(row[None], torch.eye(2), logits=torch.zeros(1, 2, dtype=torch.float64))
    torch.testing.assert_close(metric.median(), torch.tensor(np.median(x.exp())), rtol=1e-12, atol=0.0)


def test_of_a_weighted_median_half_of_the_weight_lies_on_each_side() -> None:
    metric = double(HessianTrace())
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    flat = torch.zeros(3, 2, dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)  # values 1, 2, 2 * 4.5: those of weight 1 make up half
    rows[2, 0] = 3.0
    metric.update(rows, torch.eye(2), torch.tensor([0, 0, 1]), weight=weight, logits=flat)
    torch.testing.assert_close(metric.median(), torch.tensor((2.0 + 4.5) / 2).double(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("fraction", (-0.1, 1.5, NAN))
def test_a_share_of_more_than_all(fraction: float) -> None:
    metric = HessianTrace()
    metric.update(torch.ones(1, 2), torch.eye(2))
    with pytest.raises(ValueError, match=r"fraction must be within 0\.\.1"):
        metric.heaviest_share(fraction)


# ---------------------------------------------------------------------------------------------------- NaN, errors, none
@pytest.mark.parametrize("name", METRICS)
def test_a_nan_row_says_so_and_spoils_nothing(name: str) -> None:
    make, function = METRICS[name]
    x, w, b, y = data()
    spoiled = x.clone()
    spoiled[3] = NAN
    spoiled[0] = NAN  # ignored: counts as nothing
    assert y[0] == -100 and y[3] != -100
    told, ignoring = double(make()), double(make(ignore_nan=True))
    for metric in (told, ignoring):
        metric.update(spoiled[:100], w, y[:100], linear_bias=b)
        metric.update(spoiled[100:], w, y[100:], linear_bias=b)
        assert metric.nan_rows == 1
    assert told.compute().isnan() and told.median().isnan() and told.heaviest_share().isnan()
    others = torch.arange(N) != 3
    want = function(x[others], w, y[others], linear_bias=b, reduction="mean")
    torch.testing.assert_close(ignoring.compute(), want, rtol=1e-12, atol=0.0)
    told.ignore_nan, told._computed = True, None  # the choice can be made afterwards
    assert told.compute() == ignoring.compute()
    told.reset()
    assert told.nan_rows == 0


WRONG = {
    "shapes": ((torch.ones(2, 3), torch.eye(2)), {}, ValueError, "features must have shape"),
    "labels": (
        (torch.ones(2, 2), torch.eye(2), torch.tensor([0, 7])),
        {},
        ValueError,
        "target must hold labels in 0..1",
    ),
    "length": ((torch.ones(2, 2), torch.eye(2), torch.tensor([0])), {}, ValueError, "target must have the features'"),
    "weight": ((torch.ones(2, 2), torch.eye(2)), {"weight": torch.ones(2)}, ValueError, "needs a target"),
    "dtype": ((torch.ones(2, 2).long(), torch.eye(2)), {}, TypeError, "features must have dtype"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_batch_leaves_the_state_as_it_was(case: str) -> None:
    arguments, options, error, words = WRONG[case]
    metric = HessianTrace()
    metric.update(torch.ones(3, 2), torch.eye(2))
    before = metric.compute()
    with pytest.raises(error, match=words):
        metric.update(*arguments, **options)
    metric._computed = None
    assert metric.compute() == before and metric.divisor == 3


@pytest.mark.parametrize(
    ("make", "error", "words"),
    (
        (lambda: HessianTrace(temperature=0), ValueError, "temperature must be finite"),
        (lambda: HessianTrace(log=1), TypeError, "log must be True or False"),
        (lambda: HessianTrace(ignore_nan="no"), TypeError, "ignore_nan must be True or False"),
        (lambda: HessianTrace(ignore_index=0.5), TypeError, "ignore_index must be an integer"),
        (lambda: HessianTrace(include_bias=0), TypeError, "include_bias must be True or False"),
        (lambda: RelativeFlatness(measure="both"), ValueError, "measure must be one of"),
        (lambda: RelativeFlatness(norm_power=3), ValueError, "norm_power must be one of"),
        (lambda: RelativeFlatness(measure="neuronwise", norm_power=1), ValueError, "norm_power must be 2"),
        (lambda: FeatureGradientNorm(ord=3), ValueError, "ord must be one of"),
    ),
)
def test_wrong_options(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_no_rows() -> None:
    metric = HessianTrace()
    metric.update(torch.ones(0, 2), torch.eye(2))
    metric.update(torch.ones(2, 2), torch.eye(2), torch.tensor([-100, -100]))
    assert metric.compute().isnan() and metric.median().isnan() and metric.heaviest_share().isnan()
    with pytest.warns(UserWarning, match="called before the ``update``"):
        assert HessianTrace().compute().isnan()


def test_importing_without_torchmetrics_names_the_extra() -> None:
    code = "import sys; sys.modules['torchmetrics'] = None; import flatcore; flatcore.head_metrics; flatcore.metrics"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "pip install 'flatcore[torchmetrics]'" in done.stderr


# ----------------------------------------------------------------------------------------------------- several processes
WORKER = """
    import os, sys, warnings, torch, torch.distributed as distributed
    import flatcore
    from flatcore.metrics import FeatureGradientNorm, HessianTrace, RelativeFlatness
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    warnings.filterwarnings("ignore", message=".*called before the ``update``.*")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
    x, w, y = torch.load(out + ".in")
    # uneven: rank 0 has most rows, the last one of three has none
    cuts = [0, 150, 200, 200][: world] + [200]
    mine = slice(cuts[rank], cuts[rank + 1])
    found = {}
    for name, metric in (("trace", HessianTrace(log=True)), ("flat", RelativeFlatness(measure="neuronwise")),
                         ("norm", FeatureGradientNorm())):
        metric.set_dtype(torch.float64)
        for start in range(mine.start, mine.stop, 32):
            rows = slice(start, min(start + 32, mine.stop))
            metric.update(x[rows], w, y[rows])
        local = metric.mass.clone()
        found[name] = (metric.compute(), metric.median(), metric.heaviest_share())
        assert torch.equal(metric.mass, local), "the process's own state was not given back"
    torch.save(found, f"{out}.{rank}")
    distributed.barrier()
    os._exit(0)  # as tests/processes.py says
"""


@pytest.mark.parametrize("world", (2, pytest.param(3, marks=pytest.mark.exhaustive)))
def test_several_processes_with_uneven_shards(world: int, tmp_path: Path) -> None:
    x, w, _, y = data(scale=10.0)
    out, store = str(tmp_path / "result"), str(tmp_path / "store")
    torch.save((x, w, y), out + ".in")
    script = textwrap.dedent(WORKER)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(world), store, out],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        said = [worker.communicate(timeout=600)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(said)
    alone = {}
    for name, metric in (
        ("trace", HessianTrace(log=True)), ("flat", RelativeFlatness(measure="neuronwise")), ("norm", FeatureGradientNorm()),
    ):  # fmt: skip
        double(metric).update(x, w, y)
        alone[name] = (metric.compute(), metric.median(), metric.heaviest_share())
    for rank in range(world):
        for name, values in torch.load(f"{out}.{rank}").items():
            np.testing.assert_allclose(values, alone[name], rtol=1e-12, atol=0)
