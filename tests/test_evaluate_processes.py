"""evaluate in several processes: whose rows they are, each counted once, and what is refused.

Letters: N rows, D features, C classes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import C, data, loader, network
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import flatcore


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


WORKER = """
    import os, sys, torch, torch.distributed as distributed
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
    import flatcore
    out = sys.argv[1]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model, x, y = torch.load(out + "/in.pt", weights_only=False)
    dataset = TensorDataset(x, y)
    plain = DataLoader(dataset, batch_size=16)
    sampled = DataLoader(dataset, batch_size=16, sampler=DistributedSampler(dataset, shuffle=True))
    found = {}
    for name, loader, net in (
        ("plain", plain, model), ("sampled", sampled, model), ("few", [(x[:5], y[:5])], model),
        ("ddp", plain, torch.nn.parallel.DistributedDataParallel(model)),
    ):
        report = flatcore.evaluate(net, loader)
        found[name] = (report.to_dict(), report.rows, sorted(report.sample["row"]))
    for loader, options, words in (
        (DataLoader(dataset, shuffle=True), {}, "same batches in every process"),
        (plain, {"rows": out + "/rows.csv"}, "which all would write"),
    ):
        try:
            flatcore.evaluate(model, loader, **options)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError("not refused")
    torch.save(found, f"{out}/{rank}.pt")
    distributed.barrier()
    os._exit(0)  # as tests/processes.py says
"""


@pytest.mark.exhaustive
def test_processes_under_torchrun_agree_with_one(tmp_path: Path) -> None:
    model, (x, y) = network(20.0).eval(), data(101)  # 101 rows on 3 processes: a sampler repeats one
    torch.save((model, x, y), tmp_path / "in.pt")
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(tmp_path / "worker.py"),
         str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    alone = flatcore.evaluate(model, loader(x, y, 16))
    few = flatcore.evaluate(model, [(x[:5], y[:5])])
    for rank in range(3):
        for name, (found, rows, sample) in torch.load(tmp_path / f"{rank}.pt", weights_only=False).items():
            want = few if name == "few" else alone
            assert found["info"]["processes"] == 3 and found["complete"]
            for group, part in want.to_dict()["groups"].items():
                assert (found["groups"][group]["rows"], found["groups"][group]["correct"]) == (
                    part["rows"],
                    part["correct"],
                )
                for measure, statistics in part["statistics"].items():
                    for key, value in statistics.items():
                        got = found["groups"][group]["statistics"][measure][key]
                        assert got == pytest.approx(value, rel=1e-5, abs=1e-5, nan_ok=True), (name, group, measure, key)
            if name == "sampled":
                assert sorted(rows["row"]) == list(range(101)), "a repeated row was counted"
                continue
            assert (rows["row"] == want.rows["row"]).all() and (rows["target"] == want.rows["target"]).all()
            assert sample == sorted(want.sample["row"])


SHARES = """
    import os, sys, warnings, torch, torch.distributed as distributed
    from torch.utils.data import (
        BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, SequentialSampler, Subset,
        SubsetRandomSampler, TensorDataset,
    )
    import flatcore
    out = sys.argv[1]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model, x, y, twins = torch.load(out + "/in.pt", weights_only=False)
    N = len(x)
    dataset = TensorDataset(x, y)
    mine = list(range(rank, N, world))

    class Rows(list):  # a sampler of one's own: any list of rows
        pass

    class Stream(IterableDataset):
        def __init__(self, rows, noise=0.0):
            self.rows, self.noise = rows, noise
        def __iter__(self):
            generator = torch.Generator().manual_seed(rank)
            for k in self.rows:
                yield x[k] + self.noise * torch.randn(6, generator=generator), y[k]

    class Noisy(Dataset):
        def __len__(self):
            return N
        def __getitem__(self, k):
            return x[k] + 1e-3 * torch.randn(6), y[k]

    class Even(BatchSampler):  # as accelerate's: batches in turn, and rows from the beginning where they end unevenly
        def __init__(self, batches):
            self.batch_sampler, self.even_batches, self.drop_last, self.batch_size = batches, True, False, 16
        def __len__(self):
            return -(-len(self.batch_sampler) // world)
        def __iter__(self):
            batches = list(self.batch_sampler)
            if self.even_batches:
                batches[-1] = (batches[-1] + batches[0])[:16]
                batches += batches[: -len(batches) % world]
            yield from batches[rank::world]

    def named():
        for k in mine:
            yield {"input": x[k : k + 1], "labels": y[k : k + 1]}

    def load(sampler):
        return DataLoader(dataset, batch_size=16, sampler=Rows(sampler))

    def failing():
        if rank == 1:
            raise OSError("the disk is gone")
        yield x[:4], y[:4]

    def share(**options):
        return DistributedSampler(dataset, **{"shuffle": False} | options)

    even = DataLoader(dataset, batch_sampler=Even(BatchSampler(SequentialSampler(dataset), 16, False)))
    last = slice(16, None) if rank == 0 else slice(20, None)
    loaders = {
        "strided": load(mine),
        "one has most": load(range(90) if rank == 0 else range(90, N)),
        "one has none": load(range(N) if rank == 1 else []),
        "no batches in one": [(x, y)] if rank == 0 else [],
        "stream": DataLoader(Stream(mine), batch_size=7),
        "a stream as it is": Stream(mine),
        "a data set for each": DataLoader(Subset(dataset, mine), batch_size=16),
        "the same data set": dataset,
        "the same generator": ((x[k : k + 16], y[k : k + 16]) for k in range(0, N, 16)),
        "accelerate": even,
        "accelerate, alike": DataLoader(
            TensorDataset(torch.ones(101, 6), y * 0),
            batch_sampler=Even(BatchSampler(SequentialSampler(dataset), 16, False)),
        ),
        "by name": named(),
        "equal labels": load(twins[rank::world]),
        "inner sampler": DataLoader(dataset, batch_sampler=BatchSampler(share(), 16, False)),
        "repeats": load((mine + [0])[:51]),
        "drop_last": DataLoader(dataset, batch_size=16, sampler=share(drop_last=True)),
        "leaves out": load(mine[:-2]),
        "noisy stream": DataLoader(Stream(range(N), 1e-3), batch_size=16),
        "noisy": DataLoader(Noisy(), batch_size=16),
        "first alike": [(x[:16], y[:16]), (x[last], y[last])],
        "fewer batches": [(x[:16], y[:16]), (x[16:], y[16:])][: 2 - rank],
        "at random": DataLoader(dataset, batch_size=16, sampler=SubsetRandomSampler(range(N))),
        "one rank twice": DataLoader(dataset, batch_size=16, sampler=share(rank=0)),
        "another seed": DataLoader(dataset, batch_size=16, sampler=share(shuffle=True, seed=rank)),
        "one without": DataLoader(dataset, batch_size=16, sampler=share() if rank else None),
        "failing": failing(),
        "empty": [],
    }
    found = {}
    for name, loader in loaders.items():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                report = flatcore.evaluate(model, loader)
                found[name] = (report.rows, report.complete, report.info, repr(report), [str(w.message) for w in told])
            except (TypeError, ValueError, RuntimeError, OSError) as error:
                found[name] = f"{type(error).__name__}: {error}"
    assert even.batch_sampler.even_batches is True
    torch.save(found, f"{out}/{rank}.pt")
    distributed.barrier()
    os._exit(0)  # as tests/processes.py says
"""


def test_two_processes_give_every_row_once(tmp_path: Path) -> None:
    model, (x, y) = network(20.0).eval(), data(101)
    by_class = y.sort(stable=True).indices
    # labels 0, 0, 1, 1, ...: the shares of every second row have the same labels
    twins = torch.cat([by_class[y[by_class] == k][: int((y == k).sum()) // 2 * 2] for k in range(C)])
    torch.save((model, x, y, twins), tmp_path / "in.pt")
    (tmp_path / "worker.py").write_text(textwrap.dedent(SHARES))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "worker.py"),
         str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    alone = flatcore.evaluate(model, [(x, y)])
    kept = {"equal labels": twins, "drop_last": torch.arange(100), "leaves out": torch.arange(97)}
    kept["repeats"] = torch.tensor([*range(101), 0])
    missing = "rows of the data set were in no process's share .* the report is about the other {}, and not complete"
    told = {
        "repeats": (
            True,
            "repeated_rows",
            1,
            r"^1 of the 102 rows .* equal to another one.* The data set has 101 rows\.$",
        ),
        "drop_last": (False, "missing_rows", 1, missing.format(100)),
        "leaves out": (False, "missing_rows", 4, missing.format(97)),
        "equal labels": (False, "missing_rows", 101 - len(twins), missing.format(len(twins))),
    }
    same = ("the same data set", "the same generator")
    names = [
        "strided", "one has most", "one has none", "no batches in one", "stream", "a stream as it is", "a data set for each",
        *same, "accelerate", "by name", "inner sampler", *told,
    ]  # fmt: skip
    for name in names:
        for rank, results in enumerate((one, two)):
            assert not isinstance(results[name], str), (name, results[name])
            rows, complete, info, text, warned = results[name]
            index = kept.get(name, torch.arange(101)).numpy()
            assert sorted(rows["row"].tolist()) == list(range(len(index))), name
            for column in ("target", "loss", "log_layerwise"):
                want = np.sort(alone.rows[column][index])
                np.testing.assert_allclose(
                    np.sort(rows[column]), want, rtol=1e-4, atol=1e-4, err_msg=f"{name}, {column}"
                )
            if name in same:
                assert (rows["target"] == alone.rows["target"]).all() and info["shares"].startswith("one loader"), name
            want_complete, key, count, words = told.get(name, (True, "", 0, ""))
            assert complete is want_complete, name
            assert {k: info[k] for k in ("missing_rows", "repeated_rows") if k in info} == (
                {key: count} if key else {}
            ), name
            assert ("ROWS MISSING" in text) is (not complete), name
            assert len(warned) == (rank == 0 and bool(key)), (name, warned)  # told once, by the first process
            assert all(re.search(words, message) for message in warned), (name, warned)
    refused = {
        "noisy": "other inputs for the same row each time",
        "first alike": "first batches are equal in all processes and whose batch 1 is not, in processes 0 and 1",
        "fewer batches": "first batches are equal in all processes and whose batch 1 is not, in processes 0 and 1",
        "at random": "draws them at random",
        "one rank twice": "got DistributedSamplers with num_replicas = 2, 2 and rank = 0, 0 in 2 processes",
        "another seed": "got DistributedSamplers of another order or data set",
        "one without": "got a DistributedSampler in some processes and none in others",
        "empty": "loader must yield at least one batch",
    }
    for name, words in refused.items():
        for results in (one, two):
            assert isinstance(results[name], str), (name, results[name])
            assert results[name].startswith("ValueError: loader must yield ") and words in results[name], results[name]
    assert two["failing"] == "OSError: the disk is gone"
    assert one["failing"].startswith(
        "RuntimeError: another process could not read its loader, process 1: OSError: the disk"
    )
    for results in (one, two):  # known shares, though their first batches are alike
        assert results["accelerate, alike"][1] and results["accelerate, alike"][0]["row"].tolist() == list(range(101))
    # rows that no one can see to be the same: counted twice, and said so
    assert len(one["noisy stream"][0]["row"]) == 202 and not two["noisy stream"][4]
    assert re.match("the processes read other inputs and the same labels in the same order", one["noisy stream"][4][0])


def test_a_share_without_its_processes_is_not_the_whole() -> None:
    model, (x, y) = network(), data(101)
    dataset = TensorDataset(x, y)
    sampler = DistributedSampler(dataset, num_replicas=4, rank=3, shuffle=False)
    with pytest.warns(UserWarning, match="76 rows of the data set were in no process's share"):
        report = flatcore.evaluate(model, DataLoader(dataset, batch_size=16, sampler=sampler))
    assert not report.complete and report.info["missing_rows"] == 76 and "76 ROWS MISSING" in repr(report)
    assert report.rows["row"].tolist() == list(range(3, 101, 4))
