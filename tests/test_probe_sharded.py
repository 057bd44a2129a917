"""Probe: a head under FSDP2 in two processes; gradients and values are those of one."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import flatcore


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


WORKER = """
    import os, sys, torch
    from torch import distributed, nn
    from torch.nn import functional
    from torch.distributed.fsdp import fully_shard
    import flatcore

    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    start, x, y = torch.load(out + ".in")
    mine, found = slice(6 * rank, 6 * rank + 6), {}

    def built(how):
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        model.load_state_dict(start)
        if how == "head":
            fully_shard(model[2])
        return fully_shard(model, reshard_after_forward=how == "resharded")

    for how in ("root", "head", "resharded"):
        model = built(how)
        with flatcore.Probe(model) as probe:
            for _ in range(2):
                model.zero_grad()
                loss = functional.cross_entropy(model(x[mine]), y[mine])
                value = probe.relative_flatness(y[mine])
                (loss + 0.3 * value).backward()
            with torch.no_grad():  # after the backward everything is freed
                after = probe.relative_flatness(y[mine])
        found[how] = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        found[how] |= {"value": value.detach(), "after": after}
    torch.save(found, f"{out}.{rank}")
    distributed.barrier()
    os._exit(0)  # as tests/processes.py says
"""


def test_two_processes_under_fully_shard(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, y = torch.randn(12, 5, dtype=torch.double), torch.arange(12) % 4
    out, store = str(tmp_path / "result"), str(tmp_path / "store")
    torch.save((model.state_dict(), x, y), out + ".in")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER), str(rank), store, out],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(said)
    with flatcore.Probe(model) as probe:
        loss = functional.cross_entropy(model(x), y)
        value = probe.relative_flatness(y)
        (loss + 0.3 * value).backward()
    ranks = [torch.load(f"{out}.{rank}") for rank in range(2)]
    for how in ("root", "head", "resharded"):
        for found in ranks:
            for name, p in model.named_parameters():
                torch.testing.assert_close(found[how][name], p.grad, rtol=1e-12, atol=1e-14)
        for key in ("value", "after"):
            torch.testing.assert_close(sum(found[how][key] for found in ranks) / 2, value.detach(), rtol=1e-12, atol=0)
