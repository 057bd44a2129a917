"""A loader in, a report out: the public function."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from ._config import __version__
from ._head_metrics import head_metrics
from ._input_gradients import input_gradients
from ._loading import batches, check_module, device_of, evaluation_mode
from ._probe import Probe
from ._report import Report, write_rows
from ._row_norms import row_norms
from ._tally import Tally, joined, thinned
from ._validate import INTEGERS, check_flag, check_integer, check_temperature

_HELD = 1 << 22  # bytes of features and logits that wait to be measured together
_FLUSH = 1 << 16  # rows that wait on the device before they are counted: 5 MB, and one transfer instead of 256
_FIELDS = (
    "confidence", "margin", "log_one_minus_confidence", "log_feature_norm", "log_hessian_trace", "log_layerwise",
    "log_neuronwise", "loss", "log_feature_gradient_norm",
)  # fmt: skip


def evaluate(
    model: nn.Module,
    loader: Any,
    *,
    head: str | nn.Module | None = None,
    device: Any = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    input_gradient_norms: bool = False,
    rows: bool | str | Path = True,
    progress: bool | None = None,
) -> Report:
    """Flatness of a model over a data set: per-sample table, means with standard errors, medians, splits, pictures.

    One forward pass over the loader, with :class:`flatcore.Probe` on the model. Data-set values are means of per-sample
    values; as few rows carry most of such a mean, the median and the share of the heaviest 1 % stand beside it.

    Args:
        model: a module whose logits are its head's output; put into evaluation mode for the call, then as it was.
        loader: yields (inputs, target): inputs (N, ...) for ``model(inputs)``, integer labels (N,), or (N, L) for a model
            with logits (N, L, C), as a language model has: then a row is a token. Any iterable; read once.
        head, temperature: as in :class:`flatcore.Probe`.
        device: None, the model's; or a device that the model must be on. Batches are moved to it.
        ignore_index: label of rows that are left out (padding).
        input_gradient_norms: measure ``log_input_gradient_norm`` too (L2, exact), by a backward pass per batch.
        rows: True keeps the per-sample table in memory (some 65 bytes a row); False keeps none, so that memory is constant;
            a path writes it there as CSV while the loader is read, at constant memory.
        progress: a bar on standard error; None: where that is a terminal. Needs tqdm; without it there is none.

    Returns:
        :class:`flatcore.Report`. After Ctrl-C it holds what was measured so far and its ``complete`` is False.

    Raises:
        TypeError: a model that is no module; a loader that yields something else; a target that is not integer.
        ValueError: an empty loader; no rows but ignored ones; a model on several devices or another one; a target whose
            shape is not the features'; as :class:`flatcore.Probe`; in a distributed run a loader that draws at random, or a
            path as ``rows``.
        RuntimeError: as :class:`flatcore.Probe`, where the model's output is not its head's.
        OSError: the file of ``rows`` cannot be written.
        KeyboardInterrupt: Ctrl-C in a distributed run, where the others would wait for this process.

    Distributed: with an initialised process group each process measures its share, and all return the report on the whole.
    A ``DistributedSampler`` is taken as it is, less the rows it repeats to even the shards; of any other loader, which must
    yield the same batches in every process, each takes every world-size-th batch.

    Numerics: per-sample values as :func:`flatcore.head_metrics`. Means and standard errors in float64, relative to bins
        of their logs, so that nothing underflows; medians within 0.4 %.

    Example:
        >>> import torch, flatcore
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = torch.utils.data.TensorDataset(torch.ones(5, 4), torch.zeros(5, dtype=torch.long))
        >>> report = flatcore.evaluate(model, torch.utils.data.DataLoader(data, batch_size=2))
        >>> report.groups["all"].rows, report.complete, report["hessian_trace"].mean == report["hessian_trace"].median
        (5, True, True)
    """
    check_module(model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # its forward synchronises buffers, for which uneven shards would wait for ever
    place = device_of(model, device)
    check_temperature(temperature)
    check_integer(ignore_index, "ignore_index")
    check_flag(input_gradient_norms, "input_gradient_norms")
    if progress is not None:
        check_flag(progress, "progress")
    if not isinstance(rows, (bool, str, Path)):
        raise TypeError(f"rows must be True, False or a path, got {type(rows).__qualname__}")
    shard = _Shard(loader)
    if shard.world > 1 and not isinstance(rows, bool):
        raise ValueError("rows must be True or False in a distributed run, got a path, which all would write")

    measures = (*_FIELDS, *(["log_input_gradient_norm"] if input_gradient_norms else []))
    start = time.perf_counter()
    complete, info = True, dict[str, Any]()
    with (
        evaluation_mode(model),
        Probe(model, head, temperature=temperature) as probe,
        _Rows(rows, measures, ignore_index) as table,
    ):
        waiting = _Waiting(table)
        try:
            for inputs, target, numbers in _with_progress(shard, progress):
                inputs, target = inputs.to(place, non_blocking=True), target.to(place, non_blocking=True)
                if target.dtype not in INTEGERS:
                    raise TypeError(f"loader must yield integer class labels as target, got {target.dtype}")
                if len(target) == 0:
                    continue
                waiting.add(numbers, target, *_passed(probe, inputs, target, ignore_index, input_gradient_norms))
                info = info or _info(model, probe, place)
        except KeyboardInterrupt:
            if shard.world > 1:
                raise
            complete = False
        waiting.measure()
        table.flush()
    parts = [(table.tally, info, table.table(), table.sample)]
    if shard.world > 1:
        parts = shard.gathered(parts[0])
    tally = parts[0][0]
    for other, *_ in parts[1:]:
        tally.merge(other)
    if tally.rows == 0 and complete:
        raise ValueError("loader must yield at least one row that is not ignored, got none")
    info = next((part[1] for part in parts if part[1]), {}) | {
        "temperature": temperature, "processes": shard.world, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    kept = joined([part[2] for part in parts]) if rows is True else None
    return Report(tally, info, kept, thinned([part[3] for part in parts]), complete)


def _passed(
    probe: Probe, inputs: Tensor, target: Tensor, ignore_index: int, input_gradient_norms: bool
) -> tuple[dict[str, Any], Tensor | None]:
    """One forward pass: what the head's measures take, and log input gradient norms (N,) if they are asked for."""
    norms = None
    if input_gradient_norms:
        found = input_gradients(probe.model, inputs, target, ignore_index=ignore_index)
        norms = row_norms(found.direction.flatten(1), ord=2).double().log() + found.log_scale
    else:
        with torch.no_grad():
            probe.model(inputs)
    arguments = probe._arguments({})
    shape = tuple(arguments["features"].shape[:-1])
    if shape != target.shape:
        raise ValueError(
            f"loader must yield a target of the features' leading shape {shape}, got {tuple(target.shape)}"
        )
    return arguments, norms


def _info(model: nn.Module, probe: Probe, device: torch.device) -> dict[str, Any]:
    head = probe.head
    return {
        "model": type(model).__name__, "head": probe.head_name, "features": head.in_features, "classes": head.out_features,
        "weight_norm": float(head.weight.detach().double().norm()), "device": str(device), "flatcore": __version__,
    }  # fmt: skip


class _Shard:
    """The batches of this process, with the number of their first row in the whole."""

    def __init__(self, loader: Any):
        self.loader = loader
        running = dist.is_available() and dist.is_initialized()
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if running else (1, 0)
        sampler = getattr(loader, "sampler", None)
        self.sampler = sampler if isinstance(sampler, torch.utils.data.DistributedSampler) else None
        if self.world > 1 and isinstance(sampler, torch.utils.data.RandomSampler):
            raise ValueError(
                "loader must yield the same batches in every process, got one with shuffle=True: take shuffle=False or a "
                "DistributedSampler"
            )

    def gathered(self, part: Any) -> list[Any]:
        """What every process has to say, in the order of their ranks."""
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, part)
        return parts

    def __len__(self) -> int:
        total = len(self.loader)
        return total if self.sampler is not None else -(-max(total - self.rank, 0) // self.world)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
        if self.sampler is None:
            first = 0
            for number, (inputs, target) in enumerate(batches(self.loader)):
                if number % self.world == self.rank:
                    yield inputs, target, np.arange(first, first + len(target))
                first += len(target)
            return
        replicas, rank = self.sampler.num_replicas, self.sampler.rank
        total, seen = len(self.sampler.dataset), 0  # type: ignore[arg-type]
        for inputs, target in batches(self.loader):
            numbers = rank + replicas * np.arange(seen, seen + len(target))
            seen += len(target)
            own = int((numbers < total).sum())  # the rows that even the shards stand at the end
            yield inputs[:own], target[:own], numbers[:own]


def _with_progress(shard: _Shard, progress: bool | None) -> Any:
    """The shard, behind a bar where one is wanted and tqdm is there."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return shard
    try:
        total = len(shard)
    except TypeError:  # an iterable without a length
        total = None
    hidden = None if progress is None else not progress  # None: hidden where standard error is no terminal
    return tqdm(shard, total=total, desc="evaluating", unit="batch", disable=hidden)


class _Waiting:
    """Features that wait for one call of head_metrics, which of 250 rows is mostly Python."""

    def __init__(self, table: _Rows):
        self.table = table
        self.parts: list[tuple[np.ndarray, np.ndarray, Tensor, Tensor, Tensor | None, Tensor | None]] = []
        self.bytes = 0
        self.head: dict[str, Any] = {}  # its weight, bias and temperature

    def add(self, numbers: np.ndarray, target: Tensor, arguments: dict[str, Any], norms: Tensor | None) -> None:
        """Take in a batch: row numbers (N,), labels (N, ...), and what :func:`_passed` gives."""
        length = target[0].numel()
        self.head = {name: arguments[name] for name in ("linear_weight", "linear_bias", "temperature")}
        features, logits = (
            None if x is None else x.detach().reshape(-1, x.shape[-1])
            for x in (arguments["features"], arguments["logits"])
        )
        held = [x for x in (features, logits) if x is not None]
        self.bytes += sum(x.nbytes for x in held)
        if self.bytes < _HELD:  # copied: a compiled model may write its next output where this one is
            features, logits = (None if x is None else x.clone() for x in (features, logits))
        places = np.repeat(numbers, length), np.tile(np.arange(length), len(numbers))
        self.parts.append((*places, target.reshape(-1), features, logits, norms))  # type: ignore[arg-type]
        self.table.has_positions |= target.dim() > 1
        if self.bytes >= _HELD:
            self.measure()

    def measure(self) -> None:
        """Measure what waits, and pass it on."""
        if not self.parts:
            return
        numbers, positions, *tensors = zip(*self.parts, strict=True)
        target, features, logits, norms = (
            None if part[0] is None else part[0] if len(part) == 1 else torch.cat(part) for part in tensors
        )
        with torch.no_grad():
            metrics = head_metrics(
                features, target=target, logits=logits, ignore_index=self.table.ignore_index, **self.head
            )  # fmt: skip
        values = [getattr(metrics, name) for name in _FIELDS] + ([] if norms is None else [norms])
        self.parts, self.bytes = [], 0
        self.table.add(np.concatenate(numbers), np.concatenate(positions), target, metrics.prediction, values)


class _Rows:
    """What comes in on its way out: to the tally, to a sample for pictures, and to the per-sample table if one is kept."""

    def __init__(self, rows: bool | str | Path, measures: tuple[str, ...], ignore_index: int):
        self.tally = Tally(measures)
        self.ignore_index = ignore_index
        self.sample: dict[str, np.ndarray] = {}
        self.measures = measures
        self.kept: list[dict[str, np.ndarray]] | None = [] if rows is True else None
        self.path = None if isinstance(rows, bool) else Path(rows)
        self.file: TextIO | None = None
        self.header = True
        self.waiting: list[tuple[np.ndarray, np.ndarray, Tensor, Tensor, Tensor]] = []
        self.count = 0
        self.has_positions = False

    def __enter__(self) -> _Rows:
        if self.path is not None:
            self.file = self.path.open("w", newline="", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()

    def add(
        self, numbers: np.ndarray, positions: np.ndarray, target: Tensor, prediction: Tensor, values: list[Tensor]
    ) -> None:
        """Take in rows: their numbers and positions, labels and predictions, and each measure, all (N,)."""
        columns = torch.stack([value.to(values[0].dtype) for value in values])
        self.waiting.append((numbers, positions, target, prediction, columns))
        self.count += len(numbers)
        if self.count >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Pass on what waits, without the rows that are ignored."""
        if not self.waiting:
            return
        numbers, positions, *tensors = zip(*self.waiting, strict=True)
        target, prediction, values = (torch.cat(part, dim=-1).cpu().numpy() for part in tensors)
        kept = target != self.ignore_index
        table = {"row": np.concatenate(numbers)}
        if self.has_positions:
            table["position"] = np.concatenate(positions)
        table |= {"target": target.astype(np.int64), "prediction": prediction, "correct": target == prediction}
        table |= dict(zip(self.measures, values, strict=True))
        part = {name: column[kept] for name, column in table.items()}
        self.tally.add(part)
        if self.kept is not None:
            self.kept.append(part)
        if self.file is not None:
            write_rows(self.file, part, header=self.header)
            self.file.flush()
            self.header = False
        self.sample = thinned([self.sample, part])
        self.waiting, self.count = [], 0

    def table(self) -> dict[str, np.ndarray] | None:
        """The per-sample table, if it is kept in memory."""
        return None if self.kept is None else joined(self.kept)
