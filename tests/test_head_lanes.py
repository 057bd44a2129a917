"""Small heads in float32: statistics in float lanes, and the rows that are left to float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from cases import Case
from checks import Problem, bits
from conftest import TARGETS
from torch import Tensor

import flatcore
from flatcore._check.tolerance import assert_same
from flatcore._engine import paths

GAPS = (0.0, 1e-3, 0.5, 3.0, 9.0, 17.0, 37.0, 44.0, 88.0, 104.0, 700.0, 745.0, 2000.0, 10000.0)
SHARES = ("equal", "random", "far")


@pytest.fixture(params=TARGETS, autouse=True)
def fused(request: pytest.FixtureRequest, one_thread: None) -> Iterator[None]:
    with flatcore.backend("native"), paths.forced(path="fused", cpu=request.param):
        yield


def _logits(g: torch.Generator, classes: int, gap: float, shares: str, temperature: float) -> Tensor:
    """Return a row: the top one ``gap`` above the next, times T, below that ``shares``; about 1/3, so that it rounds."""
    size = {"equal": 0.1, "random": 12.0, "far": 60.0}[shares]
    below = torch.full((classes,), size) if shares == "equal" else size * torch.rand(classes, generator=g)
    z = 1 / 3 - below * temperature
    places = torch.randperm(classes, generator=g)
    z[places[0]] = 1 / 3
    z[places[1]] = 1 / 3 + gap * temperature
    return z


@cache
def _at_every_gap(classes: int, temperature: float) -> Problem:
    g = torch.Generator().manual_seed(classes)
    rows = [_logits(g, classes, gap, shares, temperature) for gap in GAPS for shares in SHARES]
    weight = torch.randn(classes, 6, generator=g)
    logits = torch.stack(rows)
    top = logits.argmax(1)
    targets = torch.stack([top, torch.randint(classes, top.shape, generator=g)], 1)
    return Problem(Case("gaps", torch.randn(len(rows), 6, generator=g), weight, targets, None, logits, temperature))


@pytest.mark.parametrize("temperature", (1.0, 0.3, 7.0))
@pytest.mark.parametrize("classes", (2, 10, 17, 100))
def test_every_value_at_every_gap(classes: int, temperature: float) -> None:
    """Equal shares, whose roundings have one sign, as well; exact logits, so the bound is that of the arithmetic."""
    _at_every_gap(classes, temperature).check_head_metrics()


def _mixed() -> tuple[dict[str, Tensor], list[int]]:
    """Return a head of 10 classes, rows 3 and 4 equal and 5 nearly so, and which samples are beyond float lanes."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 40, generator=g)
    weight[4] = weight[3]
    weight[5] = weight[3] * (1 + 2e-7)
    logits = 3 * torch.randn(33, 10, generator=g)
    logits[2] = torch.tensor([0.0, 0, 0, 200, 190, 0, 0, 0, 0, 0])  # the two equal rows, and nothing near
    logits[5] = torch.tensor([0.0, 0, 0, 200, 0, 190, 0, 0, 0, 0])  # the nearly equal ones
    logits[9] = torch.tensor([0.0] + [-math.inf] * 9)  # one class left
    logits[11, 3] = math.nan
    logits[20, 7] = math.inf
    logits[21] = -math.inf
    logits[32] = logits[2]
    logits[4, 2:] = -math.inf  # two left: ordinary
    target = logits.nan_to_num(-1.0).argmax(1)
    target[12] = (target[12] + 1) % 10
    head = {"features": torch.randn(33, 40, generator=g), "linear_weight": weight, "target": target, "logits": logits}
    return head, [2, 5, 9, 11, 20, 21, 32]


@pytest.mark.parametrize("temperature", (1.0, 1.7))
def test_a_row_has_the_same_bits_beside_any_other(temperature: float) -> None:
    """Beside rows that float64 has to do, in other places of a tile, and alone."""
    head, _ = _mixed()
    weight = head.pop("linear_weight")

    def of(rows: Tensor) -> dict[str, Tensor]:
        return bits(
            flatcore.head_metrics(
                linear_weight=weight, temperature=temperature, **{k: v[rows] for k, v in head.items()}
            )
        )

    together = of(torch.arange(33))
    alone = [of(torch.tensor([n])) for n in range(33)]
    order = torch.randperm(33, generator=torch.Generator().manual_seed(1))
    moved = of(order)
    for field, values in together.items():
        assert_same(field, values, torch.cat([row[field] for row in alone]))
        assert_same(field, values[order], moved[field])


def test_rows_beyond_the_lanes_are_right() -> None:
    head, beyond = _mixed()
    finite = [n for n in range(33) if n not in (11, 20, 21)]
    case = Case("mixed", head["features"][finite], head["linear_weight"], head["target"][finite].unsqueeze(1),
                logits=head["logits"][finite])  # fmt: skip
    Problem(case).check_head_metrics()
    poisoned = flatcore.head_metrics(**head)
    assert poisoned.log_neuronwise[[11, 20, 21]].isnan().all()
    assert (poisoned.prediction[[11, 20, 21]] == -1).all()
    assert len(beyond) == 7


def test_logits_of_many_features_and_a_bias() -> None:
    """Sums that are carried in float64 between blocks of 64 vectors, and rows whose product or whose bias overflows."""
    g = torch.Generator().manual_seed(3)
    features, weight = torch.randn(20, 1100, generator=g), torch.randn(12, 1100, generator=g) / 16
    bias = torch.randn(12, generator=g)
    bias[7] = -math.inf
    targets = torch.randint(7, (20, 2), generator=g)
    Problem(Case("wide", features, weight, targets, bias)).check_head_metrics()
    features[3] = 3e37
    metrics = flatcore.head_metrics(features, weight.abs() * 1e2, targets[:, 0], linear_bias=bias)
    assert metrics.prediction[3] == -1
    assert metrics.log_hessian_trace.isnan().nonzero().flatten().tolist() == [3]
