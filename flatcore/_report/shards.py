"""Whose rows a loader yields under several processes: all of them, or the share of its own process."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .loading import NOTHING, as_loader, checked

_VALUES = 4096  # of a row's tensors that its checksum reads: 16 us, and a photograph has 150,528
_READ_TWICE = 8  # rows of a data set: a transform that leaves one in two as it is passes for fixed once in 256 times
_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_SAME_BATCHES = (
    "loader must yield the same batches in every process, or in each process batches of its own share of the rows"
)
_WAY_OUT = "a torch.utils.data.DistributedSampler, or accelerate's prepare, makes shares"


class _First(NamedTuple):
    """What a process sees at first."""

    error: str | None
    share: tuple[Any, ...] | None  # of a DistributedSampler: replicas, rank, and what decides its order
    batch: bytes | None  # checksum; None without a batch
    target: bytes | None
    dataset: int | None  # rows, if they can be read by their number


class _All(NamedTuple):
    """What a process has read in the end."""

    rows: int
    batches: int
    dataset: int | None
    checksums: np.ndarray  # of its batches, where all yield the same; else of its rows
    targets: bytes


class Shard:
    """The batches of this process, with the number of their first row in the whole.

    Alone, or with a ``DistributedSampler``, whose order is known, what the loader yields. Otherwise the processes compare
    their first batches: if all are equal, every world-size-th batch; if not, all that the loader yields, as its process's
    own share, with rows numbered one share after another. What was presumed is verified by :meth:`settled`.
    """

    def __init__(self, loader: Any):
        self.loader = as_loader(loader)
        running = dist.is_available() and dist.is_initialized()
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if running else (1, 0)
        sampler = _sampler(self.loader)
        known = isinstance(sampler, DistributedSampler) and type(sampler).__iter__ is DistributedSampler.__iter__
        self.sampler: Any = sampler if known else None
        if self.world > 1 and isinstance(sampler, _RANDOM):
            raise ValueError(
                f"{_SAME_BATCHES}, got one that draws them at random (shuffle=True?): take shuffle=False or a "
                "DistributedSampler"
            )
        self.is_shared = False  # whether every process reads all batches
        self.batches: Iterator[Any] = iter(())
        self.rows = 0  # that this process measures
        self.count = 0  # of batches that it reads
        self.checksums = bytearray()
        self.targets = hashlib.blake2b(digest_size=8)

    # ---------------------------------------------------------------------------------------------------- at the start
    @contextmanager
    def opened(self) -> Iterator[None]:
        """Begin to read; within this block the batches can be iterated.

        Raises:
            ValueError: the processes' loaders do not fit together.
            RuntimeError: another process failed.
        """
        with _uneven(self.loader if self.world > 1 else None):
            self.batches = checked(self.loader, mappings=True)
            if self.world > 1:
                self._compare()
            yield

    def _compare(self) -> None:
        first, failure = None, None
        try:
            first = next(self.batches, None)
        except Exception as error:
            failure = error
        seen = self.gathered(self._first(first, failure))
        if failure is not None:
            raise failure
        if first is not None:
            self.batches = _chained(first, self.batches)
        failed = [f"process {rank}: {one.error}" for rank, one in enumerate(seen) if one.error]
        if failed:
            raise RuntimeError(f"another process could not read its loader, {'; '.join(failed)}")
        if any(one.share for one in seen):
            self._check_shares([one.share for one in seen])
            return
        if _is_sharded(self.loader):
            return
        self.is_shared = seen[0].batch is not None and all(one.batch == seen[0].batch for one in seen)
        if self.is_shared:
            return
        # Other inputs and equal labels: other rows of one class, or the same rows through a random transform
        alike = seen[0].target and all(one.target == seen[0].target and one.dataset is not None for one in seen)
        if alike and any(self.gathered(_is_random(self.loader.dataset))):
            raise ValueError(
                f"{_SAME_BATCHES}, got a data set that gives other inputs for the same row each time (a random transform?), "
                f"so that one cannot see which it is: {_WAY_OUT}"
            )

    def _first(self, batch: Any, failure: Exception | None) -> _First:
        error = None if failure is None else f"{type(failure).__name__}: {failure}"
        share = None
        if self.sampler is not None:
            order = {key: getattr(self.sampler, key, None) for key in ("shuffle", "seed", "epoch", "drop_last")}
            share = (self.sampler.num_replicas, self.sampler.rank, len(self.sampler.dataset), order)
        if batch is None:
            return _First(error, share, None, None, _rows_of(self.loader))
        inputs, target = batch
        return _First(error, share, _digest(checksums(inputs, target)), _bytes(target), _rows_of(self.loader))

    def _check_shares(self, shares: list[Any]) -> None:
        if not all(shares):
            raise ValueError(f"{_SAME_BATCHES}, got a DistributedSampler in some processes and none in others")
        ranks = [share[1] for share in shares]
        if sorted(ranks) != list(range(self.world)) or any(share[0] != self.world for share in shares):
            raise ValueError(
                f"{_SAME_BATCHES}, got DistributedSamplers with num_replicas = {', '.join(str(s[0]) for s in shares)} and "
                f"rank = {', '.join(map(str, ranks))} in {self.world} processes"
            )
        if any(share[2:] != shares[0][2:] for share in shares):
            raise ValueError(
                f"{_SAME_BATCHES}, got DistributedSamplers of another order or data set in each: (rows, order) = "
                f"{'; '.join(str(share[2:]) for share in shares)}"
            )

    # ------------------------------------------------------------------------------------------------------ the batches
    def __len__(self) -> int:
        total = len(self.loader)
        return -(-max(total - self.rank, 0) // self.world) if self.is_shared else total

    def __iter__(self) -> Iterator[tuple[Any, Tensor, np.ndarray]]:
        first = 0
        for number, (inputs, target) in enumerate(self.batches):
            self.count, count = number + 1, len(target)
            numbers = np.arange(first, first + count)
            first += count
            if self.world > 1 and self.sampler is None:
                found = checksums(inputs, target)
                self.checksums += _digest(found) if self.is_shared else b"".join(found)
                self.targets.update(_bytes(target))
            if self.sampler is not None:
                numbers = self.sampler.rank + self.sampler.num_replicas * numbers
                own = int((numbers < len(self.sampler.dataset)).sum())  # the rows that even the shards stand at the end
                inputs, target, numbers = _cut(inputs, count, own), target[:own], numbers[:own]
            elif self.is_shared and number % self.world != self.rank:
                continue
            self.rows += len(target)
            yield inputs, target, numbers

    # -------------------------------------------------------------------------------------------------------- at the end
    def gathered(self, part: Any) -> list[Any]:
        """What every process has to say, in the order of their ranks."""
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, part)
        return parts

    def settled(self, part: Any, complete: bool) -> tuple[list[Any], list[int], dict[str, Any]]:
        """Every process's part, the number of rows before each, and what is to be said of the rows.

        ``missing_rows``, ``repeated_rows`` (where there are any) and, of several processes, ``shares``.

        Raises:
            ValueError: no process had a batch; they presumed to read the same and did not.
        """
        mine = _All(
            self.rows,
            self.count,
            _rows_of(self.loader),
            np.frombuffer(self.checksums, np.uint64),
            self.targets.digest(),
        )
        parts, accounts = [part], [mine]
        if self.world > 1:
            pairs = self.gathered((part, mine))
            parts, accounts = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if not complete:
            return parts, [0] * len(parts), {}
        if not any(one.batches for one in accounts):
            raise ValueError(NOTHING)
        total = sum(one.rows for one in accounts)
        said: dict[str, Any] = {}
        before = [0] * len(parts)
        if self.sampler is not None:
            said = {"shares": "DistributedSampler", "missing_rows": len(self.sampler.dataset) - total}
        elif self.is_shared:
            self._check_same(accounts)
            said = {"shares": "one loader, its batches in turn"}
        elif self.world > 1:
            before = [int(n) for n in np.cumsum([0, *(one.rows for one in accounts[:-1])])]
            said = {"shares": "a loader for each process", **self._judged(accounts, total)}
        if said.get("missing_rows") and self.rank == 0:
            warnings.warn(
                f"{said['missing_rows']} rows of the data set were in no process's share (drop_last, or a sampler that "
                f"leaves rows out?): the report is about the other {total}, and not complete",
                stacklevel=3,
            )
        return (
            parts,
            before,
            {key: value for key, value in said.items() if value and (self.world > 1 or key != "shares")},
        )

    def _check_same(self, accounts: list[_All]) -> None:
        for rank, one in enumerate(accounts):
            here, there = accounts[0].checksums, one.checksums
            if np.array_equal(here, there):
                continue
            length = min(len(here), len(there))
            unlike = np.flatnonzero(here[:length] != there[:length])
            number = int(unlike[0]) if len(unlike) else length
            raise ValueError(
                f"{_SAME_BATCHES}, got loaders whose first batches are equal in all processes and whose batch {number} is "
                f"not, in processes 0 and {rank}: {_WAY_OUT}"
            )

    def _judged(self, accounts: list[_All], total: int) -> dict[str, Any]:
        """What the shares of one data set leave out or repeat, as far as one can see."""
        sizes = {one.dataset for one in accounts}
        whole = sizes.pop() if len(sizes) == 1 else None
        if whole is not None and any(one.rows >= whole for one in accounts):
            whole = None  # each process has a data set of its own
        all_rows = np.concatenate([one.checksums for one in accounts])
        repeated = total - len(np.unique(all_rows))
        missing = max(whole - total, 0) if whole is not None else 0
        # accelerate's shares of a fixed order are known to meet nowhere; of an order that each process draws they may, where
        # nobody seeded them alike, and then as many rows are in none
        known = _is_sharded(self.loader) and whole == total and not _is_shuffled(self.loader)
        if repeated and not known:
            of = "" if whole is None else f" The data set has {whole} rows."
            if self.rank == 0:
                warnings.warn(
                    f"{repeated} of the {total} rows that the processes read are equal to another one, inputs and label: "
                    "repeated to even the shares, it may be, or twice in the data, or the processes shuffled by seeds of "
                    f"their own (then as many rows are missing); they count as often as they came.{of}",
                    stacklevel=4,
                )
        else:
            repeated = 0
        alike = len({one.targets for one in accounts}) == 1 and total > 0
        if alike and not repeated and any(one.dataset is None for one in accounts) and self.rank == 0:
            warnings.warn(
                "the processes read other inputs and the same labels in the same order: if these are the same rows through "
                f"a random transform, each was counted {self.world} times; {_WAY_OUT}",
                stacklevel=4,
            )
        return {"missing_rows": missing, "repeated_rows": repeated}


def _sampler(loader: Any) -> Any:
    """The sampler whose order is the rows', if it is known."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_sampler is None:
        return getattr(loader, "sampler", None)
    return batch_sampler.sampler if type(batch_sampler) is BatchSampler else None


def _rows_of(loader: Any) -> int | None:
    """Rows of a loader's data set, if they can be read by their number."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return None
    try:
        if _is_sharded(loader) and not loader.batch_sampler.drop_last:  # the sampler below may choose some of the rows
            return len(loader.batch_sampler.batch_sampler.sampler)
        return len(dataset)
    except (AttributeError, TypeError):
        return None


def _is_sharded(loader: Any) -> bool:
    """Whether this is one of accelerate's, each process's share of one batch sampler."""
    return hasattr(getattr(loader, "batch_sampler", None), "even_batches")


def _is_shuffled(loader: Any) -> bool:
    """Whether the order that accelerate's shares are cut from is drawn at random."""
    inner = getattr(loader.batch_sampler, "batch_sampler", None)
    return isinstance(getattr(inner, "sampler", None), _RANDOM)


@contextmanager
def _uneven(loader: Any) -> Iterator[None]:
    """Let accelerate's shares end where the rows do, without those that are repeated to even them."""
    if not _is_sharded(loader):
        yield
        return
    batch_sampler = loader.batch_sampler
    before, batch_sampler.even_batches = batch_sampler.even_batches, False
    try:
        yield
    finally:
        batch_sampler.even_batches = before


def _is_random(dataset: Any) -> bool:
    def read() -> list[Any]:
        with torch.no_grad():
            return [_flat(dataset[k]) for k in range(min(_READ_TWICE, len(dataset)))]

    try:
        return read() != read()
    except Exception:  # rows by other keys than numbers: nothing can be said of them, and the others wait for an answer
        return False


def _flat(value: Any) -> Any:
    """A row as something that can be compared; what cannot be, an image object say, as None."""
    if isinstance(value, Tensor):
        return _bytes(value)
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, (tuple, list)):
        return [_flat(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _flat(part) for key, part in value.items()}
    return value if isinstance(value, (int, float, str, bytes, np.generic)) else None


def _chained(first: Any, rest: Iterable[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _cut(inputs: Any, rows: int, own: int) -> Any:
    """The first rows of inputs."""
    if isinstance(inputs, Tensor):
        return inputs[:own]
    return {
        key: value[:own] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
        for key, value in inputs.items()
    }


def checksums(inputs: Any, target: Tensor) -> list[bytes]:
    """Eight bytes for each row, of its label and of up to 4,096 of its values, evenly spaced."""
    named = {"": inputs} if isinstance(inputs, Tensor) else inputs
    parts = [named[key] for key in sorted(named, key=str) if isinstance(named[key], Tensor)]
    rows = len(target)
    columns = []
    for part in (*parts, target):
        if part.shape[:1] != (rows,) or part.numel() == 0:
            continue
        flat = part.detach().reshape(rows, -1)
        if flat.shape[1] > _VALUES:
            flat = flat[:, torch.arange(_VALUES, device=flat.device) * (flat.shape[1] - 1) // (_VALUES - 1)]
        columns.append(flat.contiguous().view(torch.uint8).cpu().numpy())
    if not columns:
        return [b"\0" * 8] * rows
    table = np.ascontiguousarray(np.concatenate(columns, axis=1))
    return [hashlib.blake2b(row, digest_size=8).digest() for row in table]


def _digest(rows: list[bytes]) -> bytes:
    return hashlib.blake2b(b"".join(rows), digest_size=8).digest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes()
