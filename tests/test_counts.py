"""W1 to W6 by count, at their own sizes: launches, allocations, waits, bytes, operations, and the time these add up to.

docs/cuda.md has the table; ``python tests/count_works.py --write`` renews it after a change that is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import count_works
import kernel_costs
import numpy as np
import pytest
import torch
from counting import Counter, counted, counted_eagerly, on_the_kernels_path, size_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import flatcore
from flatcore._engine import paths

MOST = {"W6-forward": (4, 3), "W6-backward": (9, 9)}
"""Launches and allocations: the goals of a training step's regulariser, autograd's root among the backward's."""
TILE_LAUNCHES = {"W4-trace": 2, "W4-neuronwise": 10}
"""Of a tile of 2,048 classes and a block of rows: product and statistics; a copy of W and a product for each 512 classes."""


def small(key: str) -> Any:
    work = count_works.WORKS[key]
    return count_works.resized(work, N=min(work.N, 70), D=min(work.D, 48), C=min(work.C, 90))


# ------------------------------------------------------------------------------------------------------- the counter
def test_what_waits_for_the_device_is_seen() -> None:
    x = torch.arange(3.0)
    waiting: list[Callable[[], Any]] = [
        lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(), lambda: x[x > 1], lambda: torch.equal(x, x),
        lambda: x.tolist(), lambda: float(x[0]), lambda: x.unique(), lambda: x.masked_select(x > 1),
        lambda: x.numpy(), lambda: x.cpu(), lambda: np.asarray(x), lambda: torch.cuda.synchronize(),
    ]  # fmt: skip
    for i, call in enumerate(waiting):
        with Counter() as counter:
            call()
        assert counter.waits, i
    with Counter() as counter:
        x.clone().add_(1).sum(), x[torch.tensor([0, 2])], x[:2]
    assert not counter.waits
    with pytest.raises(RuntimeError, match="waits for the device"), Counter(dry=True):
        x.sum().item()


def test_bytes_are_those_that_an_operator_reads_and_writes() -> None:
    x, y, out = torch.ones(4, 6), torch.ones(6), torch.empty(4, 6)
    for call, count in (
        (lambda: x + y, 24 + 6 + 24),
        (lambda: x + y.expand(4, 6), 24 + 6 + 24),
        (lambda: out.copy_(x), 24 + 24),
        (lambda: out.zero_(), 24),
        (lambda: x.add_(1), 24 + 24),
        (lambda: torch.mul(x, x, out=out), 2 * 24 + 24),
        (lambda: torch.mm(x, x.T), 24 + 24 + 16),
        (lambda: x.T[1:].view(5, 4), 0),
        (lambda: x.new_empty(9), 0),
    ):
        with Counter() as counter:
            call()
        assert counter.bytes == 4 * count
    assert size_of(torch.empty(1, 1).expand(5, 7)) == 4 and size_of(torch.empty(0, 3)) == 0


@pytest.mark.parametrize("key", count_works.WORKS)
def test_operations_of_eager_products_are_torchs_count(key: str) -> None:
    work = small(key)
    counted_forms = count_works.counted_forms(work)
    for name, form in count_works.answers(work)[1].items():
        call = form(count_works.inputs(work, "meta"))
        with FlopCounterMode(display=False) as flops:
            call()
        assert sum(counted_forms[name].operations.values()) == flops.get_total_flops()


@pytest.mark.parametrize("key", count_works.WORKS)
def test_a_call_that_is_not_run_counts_as_one_that_is(key: str) -> None:
    work = small(key)
    run, not_run = count_works.counted_work(work, count_works.numbers(work)), count_works.counted_work(work)
    for name in ("launches", "allocations", "waits", "bytes", "operations", "names", "calls"):
        assert getattr(run, name) == getattr(not_run, name), name


def test_a_kernel_without_a_cost_is_refused() -> None:
    logits = torch.zeros(3, 4)
    with on_the_kernels_path(), pytest.raises(NotImplementedError, match="cuda_unmasked_cross_entropy has no cost"):
        counted(lambda: flatcore.unmasked_cross_entropy(logits, torch.arange(3)))

    class Core:
        class HeadLoop:
            def another(self) -> None: ...

        class HeadProblem: ...

    with pytest.raises(NotImplementedError, match=r"HeadLoop\.another has no cost"):
        kernel_costs.priced(Core, lambda name, cost: None)["HeadLoop"].another(None)


# --------------------------------------------------------------------------------------------------------- the works
@pytest.mark.parametrize("key", count_works.WORKS)
def test_nothing_waits_for_the_device(key: str) -> None:
    assert count_works.counts(key).ours.waits == 0


@pytest.mark.parametrize("key", MOST)
def test_launches_and_allocations_of_a_training_step(key: str) -> None:
    found = count_works.counts(key).ours
    assert (found.launches, found.allocations) <= MOST[key] and found.allocations <= MOST[key][1]


@pytest.mark.parametrize("key", TILE_LAUNCHES)
def test_launches_of_a_large_head_grow_with_its_tiles_and_blocks_alone(key: str) -> None:
    """At W4's widths: tiles of 2,048 classes, blocks of 2,048 rows, and nothing is allocated for any of them."""
    work, resized = count_works.WORKS[key], count_works.resized
    by_tiles = [count_works.counted_work(resized(work, N=2048, C=2048 * tiles)) for tiles in (3, 11)]
    assert by_tiles[1].launches - by_tiles[0].launches == 8 * TILE_LAUNCHES[key]
    by_blocks = [count_works.counted_work(resized(work, N=2048 * blocks, C=3 * 2048)) for blocks in (2, 5)]
    of_a_block = by_blocks[1].launches - by_blocks[0].launches
    assert 0 < of_a_block - 3 * 3 * TILE_LAUNCHES[key] <= 3 * 5  # start, values twice, explicit rows and their merge
    assert len({counter.allocations for counter in by_tiles + by_blocks}) == 1
    assert paths.last_path == "chunked"


@pytest.mark.parametrize("key", count_works.WORKS)
def test_no_work_takes_longer_by_count_than_eager_but_those_that_are_named(key: str) -> None:
    """Red where one is slower, and where one that is named is no longer: its line of ``count_works.OVER`` goes then."""
    found = count_works.counts(key)
    assert (found.ours.time > found.eager.time) == (key in count_works.OVER), (found.ours.parts, found.eager.parts)


def test_the_page_has_what_is_counted() -> None:
    assert set(count_works.OVER) | set(count_works.BEFORE) <= set(count_works.WORKS)
    assert count_works.written() == count_works.block(), "python tests/count_works.py --write"


def test_reading_the_features_twice_would_be_seen() -> None:
    """The count of W1 hangs on its one read: a second would be in the table."""
    work = count_works.WORKS["W1"]
    features = 4 * work.N * work.D
    assert features < count_works.counts("W1").ours.bytes < 1.1 * features
    x = torch.empty(work.N, work.D, device="meta")

    def twice() -> tuple[Tensor, Tensor]:
        return x.square().sum(1), x.sum(1)

    assert counted_eagerly(twice).bytes > 3 * features
