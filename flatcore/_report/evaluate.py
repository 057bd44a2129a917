"""A loader in, a report out: the public function."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from .._arguments.checks import INTEGERS, check_flag, check_integer, check_temperature, one_output
from .._config import __version__
from .._head_metrics import head_metrics
from .._input_gradients import input_gradients
from .._probe.probe import Probe
from .._row_norms import row_norms
from .loading import check_module, device_of, evaluation_mode
from .report import Report, write_rows
from .shards import Shard
from .tally import Tally, joined, thinned

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
            with logits (N, L, C), as a language model has: then a row is a token. Tensors or NumPy arrays; a mapping of
            inputs is for ``model(**inputs)``. Or it yields such mappings alone (transformers' BatchEncoding), with the
            target under "labels", "label" or "target". Any iterable; read once. A ``torch.utils.data.Dataset`` of rows is
            read in batches of 256.
        head, temperature: as in :class:`flatcore.Probe`.
        device: None, the model's; or a device that the model must be on. Batches are moved to it.
        ignore_index: label of rows that are left out (padding).
        input_gradient_norms: measure ``log_input_gradient_norm`` too (L2, exact), by a backward pass per batch.
        rows: True keeps the per-sample table in memory (some 65 bytes a row); False keeps none, so that memory is constant;
            a path writes it there as CSV while the loader is read, at constant memory.
        progress: a bar on standard error; None: where that is a terminal. Needs tqdm; without it there is none.

    Returns:
        :class:`flatcore.Report`. After Ctrl-C it holds what was measured so far and its ``complete`` is False; so it is
        where rows of the data set are known to be missing, which ``info["missing_rows"]`` counts.

    Raises:
        TypeError: a model that is no module; a loader that yields something else; a target that is not integer; mappings
            with ``input_gradient_norms``, which needs one tensor of inputs.
        ValueError: an empty loader; no rows but ignored ones; a model on several devices or another one; a target whose
            shape is not the features' ((N, 1), one-hot); a label that is no class, on CUDA too, with its row; labels equal
            to "input_ids", which a causal language model would shift; a head with one output; as :class:`flatcore.Probe`;
            in a distributed run a loader that draws at random, loaders that do not fit together, or a path as ``rows``.
        RuntimeError: as :class:`flatcore.Probe`, where the model's output is not its head's, in any batch; in a distributed
            run, another process whose first batch failed.
        OSError: the file of ``rows`` cannot be written.
        KeyboardInterrupt: Ctrl-C in a distributed run, where the others would wait for this process.

    Distributed: with an initialised process group every process must call it; each measures its share, and all return the
    report on the whole. A ``DistributedSampler`` is taken as it is, less the rows it repeats to even the shards. Of any
    other loader the processes compare the first batch. If it is the same everywhere, each takes every world-size-th batch
    of what must be the same loader to its end. If it differs, each loader is its process's share (accelerate's ``prepare``,
    a sampler of one's own, an iterable data set), read to its end, however many batches that are; rows are numbered one
    share after another. What accelerate repeats to even the shares is left out; where one cannot know, rows that are equal
    to another one are counted in a warning and in ``info["repeated_rows"]``. Checksums take 8 bytes a row.

    Numerics: per-sample values as :func:`flatcore.head_metrics`. Means and standard errors in float64, relative to bins
        of their logs, so that nothing underflows; medians (of two middle values the mean) within 0.4 %.

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
    shard = Shard(loader)
    if shard.world > 1 and not isinstance(rows, bool):
        raise ValueError("rows must be True or False in a distributed run, got a path, which all would write")

    measures = (*_FIELDS, *(["log_input_gradient_norm"] if input_gradient_norms else []))
    start = time.perf_counter()
    complete, info = True, dict[str, Any]()
    with (
        evaluation_mode(model),
        Probe(model, head, temperature=temperature) as probe,
        shard.opened(),
        _Rows(rows, measures, ignore_index) as table,
    ):
        waiting = _Waiting(table)
        try:
            for inputs, target, numbers in _with_progress(shard, progress):
                if len(target) == 0:
                    continue
                target = _checked_target(target).to(place, non_blocking=True)
                inputs = _moved(inputs, place)
                arguments, norms = _passed(probe, inputs, target, numbers, ignore_index, input_gradient_norms)
                waiting.add(numbers, target, arguments, norms)
                info = info or _info(model, probe, place)
        except KeyboardInterrupt:
            if shard.world > 1:
                raise
            complete = False
        waiting.measure()
        table.flush()
    parts, before, said = shard.settled((table.tally, info, table.table(), table.sample), complete)
    tally = parts[0][0]
    for other, *_ in parts[1:]:
        tally.merge(other)
    if tally.rows == 0 and complete:
        raise ValueError("loader must yield at least one row that is not ignored, got none")
    for part, offset in zip(parts, before, strict=True):
        for columns in part[2:]:
            if columns:
                columns["row"] = columns["row"] + offset
    info = next((part[1] for part in parts if part[1]), {}) | {
        "temperature": temperature, "processes": shard.world, **said, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    kept = joined([part[2] for part in parts]) if rows is True else None
    complete = complete and not said.get("missing_rows")
    return Report(tally, info, kept, thinned([part[3] for part in parts]), complete)


def _checked_target(target: Tensor) -> Tensor:
    """Labels as int64, none of which becomes another."""
    if target.dtype not in INTEGERS:
        raise TypeError(f"loader must yield integer class labels as target, got {target.dtype}{_remedy(target)}")
    if target.dtype == torch.uint64:  # those beyond int64 are no classes, and would be negative in it
        target = target.to("cpu").view(torch.int64)
        return torch.where(target < 0, torch.iinfo(torch.int64).max, target)
    return target.to(torch.int64)


def _remedy(target: Tensor) -> str:
    """What to do with labels of another form, where one can see what they mean."""
    whole = target.dtype in INTEGERS
    dim = 1 if target.dim() == 2 else -1
    if target.dim() > 1 and target.shape[-1] == 1:
        return f": pass target.squeeze({dim})" + ("" if whole else ", and integers (.long()) if they are classes")
    if target.dim() > 1 and bool(((target == 0) | (target == 1)).all() and (target.sum(-1) == 1).all()):
        return f", as it seems one-hot: pass target.argmax({dim})"
    return "" if whole else ": pass target.long() if these are classes"


def _moved(inputs: Any, place: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(place, non_blocking=True)
    return {k: v.to(place, non_blocking=True) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _passed(
    probe: Probe,
    inputs: Any,
    target: Tensor,
    numbers: np.ndarray,
    ignore_index: int,
    input_gradient_norms: bool,
) -> tuple[dict[str, Any], Tensor | None]:
    """One forward pass: what the head's measures take, and log input gradient norms (N,) if they are asked for.

    The probe compares the model's output with the head's at the first measure of a pass: so there is one in every pass.
    """
    norms = None
    if input_gradient_norms:
        if isinstance(inputs, Mapping):
            raise TypeError("input_gradient_norms needs inputs as one tensor, got a mapping")
        try:
            found = input_gradients(probe.model, inputs, target, ignore_index=ignore_index)
        except ValueError:  # of a label, perhaps, by its row in this batch
            with suppress(RuntimeError):  # the model has not run
                _refuse_bad_labels(target, numbers, _classes(probe), ignore_index)
            raise
        norms = row_norms(found.direction.flatten(1), ord=2).double().log() + found.log_scale
    else:
        with torch.no_grad():
            probe.model(**inputs) if isinstance(inputs, Mapping) else probe.model(inputs)
    classes = _classes(probe)
    arguments = probe._arguments({})
    shape = tuple(arguments["features"].shape[:-1])
    if shape != target.shape:
        raise ValueError(
            f"loader must yield a target of the features' leading shape {shape}, got {tuple(target.shape)}{_remedy(target)}"
        )
    if target.device.type == "cpu":  # elsewhere it would have to be waited for: when the rows are counted
        _refuse_bad_labels(target, numbers, classes, ignore_index)
    return arguments, norms


def _classes(probe: Probe) -> int:
    """C of the head that ran."""
    classes = probe.head.out_features
    if classes == 1:
        raise ValueError(one_output(f"the head {probe.head_name!r}", "give the model such a head for the evaluation"))
    return classes


def _refuse_bad_labels(target: Tensor, numbers: np.ndarray, classes: int, ignore_index: int) -> None:
    """Refuse a label that is no class, by its row in the loader: target (N, ...) and the rows' numbers (N,)."""
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"loader must yield labels (target) in 0..{classes - 1} or ignore_index = {ignore_index}, got "
            f"{target[tuple(place)].item()} in row {numbers[place[0]]}"
            + (f", position {place[1]}" if len(place) > 1 else "")
        )


def _info(model: nn.Module, probe: Probe, device: torch.device) -> dict[str, Any]:
    head = probe.head
    return {
        "model": type(model).__name__, "head": probe.head_name, "features": head.in_features, "classes": head.out_features,
        "weight_norm": float(head.weight.detach().double().norm()), "device": str(device), "flatcore": __version__,
    }  # fmt: skip


def _with_progress(shard: Shard, progress: bool | None) -> Any:
    """The shard, behind a bar where one is wanted and tqdm is there."""
    try:
        from tqdm import tqdm
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
        # row, position, target; features, logits and norms as far as there are any
        self.parts: list[tuple[np.ndarray, np.ndarray, Tensor, Tensor | None, Tensor | None, Tensor | None]] = []
        self.bytes = 0
        self.head: dict[str, Any] = {}  # its weight, bias and temperature

    def add(self, numbers: np.ndarray, target: Tensor, arguments: dict[str, Any], norms: Tensor | None) -> None:
        """Take in a batch: row numbers (N,), labels (N, ...), and what :func:`_passed` gives."""
        length = target[0].numel()
        self.table.classes = len(arguments["linear_weight"])
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
        self.parts.append((*places, target.reshape(-1), features, logits, norms))
        self.table.has_positions |= target.dim() > 1
        if self.bytes >= _HELD:
            self.measure()

    def measure(self) -> None:
        """Measure what waits, and pass it on."""
        if not self.parts:
            return
        numbers, positions, targets, *tensors = zip(*self.parts, strict=True)
        target = targets[0] if len(targets) == 1 else torch.cat(targets)
        features, logits, norms = (
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
        self.classes = 0

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
        table = {"row": np.concatenate(numbers)}
        _refuse_bad_labels(torch.from_numpy(target), table["row"], self.classes, self.ignore_index)
        kept = target != self.ignore_index
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
