"""The report on a model: what was counted, and its ways out to files and pictures."""

from __future__ import annotations

import base64
import csv
import functools
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .distribution import Statistics
from .tally import MEASURES, Group, Tally


def write_rows(file: TextIO, table: Mapping[str, np.ndarray], header: bool = True) -> None:
    """Write a table of rows as CSV; numbers with the fewest digits that read back the same, booleans as 0 and 1."""
    writer = csv.writer(file)
    if header:
        writer.writerow(table)
    columns = [(c.astype(np.int64) if c.dtype == bool else c).astype(str) for c in table.values()]
    writer.writerows(zip(*columns, strict=True))


class Report:
    """What :func:`flatcore.evaluate` found.

    ``groups``: ``"all"``, ``"correct"`` and ``"wrong"`` rows; ``classes``: each label's rows (statistics for labels below
    1000). Each is a :class:`Group`: ``rows``, ``correct``, ``accuracy``, ``accuracy_standard_error`` and, by measure, a
    :class:`Statistics` with ``mean``, ``standard_error``, ``median`` and ``heaviest_share`` (of the heaviest 1 %).
    ``report["layerwise"]`` is short for ``report.groups["all"].statistics["layerwise"]``. Measures are ``loss``,
    ``hessian_trace``, ``layerwise``, ``neuronwise``, ``feature_gradient_norm`` and, if asked for, ``input_gradient_norm``.

    ``rows`` is the per-sample table, a dictionary of NumPy columns, or None if it was not kept: ``row`` (the number in the
    loader's order; ``position`` too for sequences), ``target``, ``prediction``, ``correct`` and the fields of
    :class:`flatcore.HeadMetrics`. ``info`` says what was measured; ``complete`` is False after an interrupt, and where
    rows of the data set are known to be missing: ``info["missing_rows"]`` of them.

    Nothing is lost where a file cannot be written: the report stays, and files are replaced only when they are whole.

    Example:
        >>> import torch, flatcore
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> report = flatcore.evaluate(model, [(torch.tensor([[30.0, 10.0], [1.0, 3.0]]), torch.tensor([0, 0]))])
        >>> report.groups["correct"].rows, f"{report.groups['correct'].statistics['hessian_trace'].mean:.4e}"
        (1, '4.1223e-06')
        >>> report.rows["margin"].tolist()
        [20.0, 2.0]
    """

    def __init__(
        self,
        tally: Tally,
        info: dict[str, Any],
        rows: dict[str, np.ndarray] | None,
        sample: dict[str, np.ndarray],
        complete: bool,
    ):
        self.info, self.rows, self.complete = info, rows, complete
        self.distributions, self.sample = tally.distributions, sample
        self._tally = tally

    @functools.cached_property
    def groups(self) -> dict[str, Group]:
        """All rows, and those classified right and wrong."""
        return self._tally.groups()

    @functools.cached_property
    def classes(self) -> dict[int, Group]:
        """Rows by their label."""
        return self._tally.classes()

    def __getitem__(self, measure: str) -> Statistics:
        found = self.groups["all"].statistics
        if measure not in found:
            raise KeyError(f"the report has {', '.join(found)}, not {measure!r}")
        return found[measure]

    def __repr__(self) -> str:
        whole, missing = self.groups["all"], self.info.get("missing_rows")
        lines = [
            f"flatcore.Report({self.info.get('model')}, head {self.info.get('head')!r}: {whole.rows} rows, "
            f"accuracy {whole.accuracy:.4f} +- {whole.accuracy_standard_error:.4f}"
            + ("" if self.complete else f", {missing} ROWS MISSING" if missing else ", INTERRUPTED")
            + ")"
        ]
        for name, s in whole.statistics.items():
            spoilt = f", {s.nan_rows} rows NaN" if s.nan_rows else ""
            lines.append(
                f"  {MEASURES[name]:<29} mean {number(s.log_mean):>9} +- {percent(s.relative_standard_error)}, "
                f"median {number(s.log_median):>9}, heaviest 1 % hold {percent(s.heaviest_share)}{spoilt}"
            )
        return "\n".join(lines)

    # ------------------------------------------------------------------------------------------------------- to files
    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the per-sample table.

        Raises:
            ValueError: it was not kept (``evaluate(rows=False)``, or a path, where it is already).
            OSError: the file cannot be written.
        """
        if self.rows is None:
            raise ValueError("the per-sample table was not kept in memory: evaluate(..., rows=True) keeps it")
        text = io.StringIO(newline="")
        write_rows(text, self.rows)
        write(path, text.getvalue())

    def to_dict(self) -> dict[str, Any]:
        """Return all but the per-sample table, in plain Python types."""

        def plain(group: Group) -> dict[str, Any]:
            return {
                "rows": group.rows, "correct": group.correct, "accuracy": group.accuracy,
                "accuracy_standard_error": group.accuracy_standard_error,
                "statistics": {
                    name: {**s._asdict(), "mean": s.mean, "standard_error": s.standard_error, "median": s.median}
                    for name, s in group.statistics.items()
                },
            }  # fmt: skip

        return {
            "complete": self.complete,
            "info": self.info,
            "groups": {name: plain(group) for name, group in self.groups.items()},
            "classes": {str(label): plain(group) for label, group in self.classes.items()},
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` as standard JSON: NaN as null, infinities as the strings "inf" and "-inf".

        Raises:
            OSError: the file cannot be written.
        """
        write(path, dumps(self.to_dict()))

    def to_html(self, path: str | os.PathLike[str], *, title: str = "Flatness report") -> None:
        """Write one page with the tables and the pictures in it, readable without a network and on a phone.

        Raises:
            ImportError: matplotlib or Jinja2 is missing.
            OSError: the file cannot be written.
        """
        try:
            import jinja2
        except ImportError as error:
            raise ImportError("to_html needs Jinja2: pip install 'flatcore[lab]'") from error
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        environment.filters |= {"number": number, "percent": percent}
        template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
        pictures = [(caption, _png(figure)) for caption, figure in self._figures()]
        write(path, template.render(title=title, report=self, measures=MEASURES, pictures=pictures, nan=math.isnan))

    # ---------------------------------------------------------------------------------------------------- to pictures
    def plot_distributions(self) -> Any:
        """Histograms of the measures' logs, correct and wrong rows: a matplotlib Figure.

        Raises:
            ImportError: matplotlib is missing.
        """
        return _pictures().distributions(self)

    def plot_confidence(self) -> Any:
        """Layerwise flatness against 1 - confidence, a point a row (8,192 of them at most): a matplotlib Figure.

        Raises:
            ImportError: matplotlib is missing.
        """
        return _pictures().confidence(self)

    def plot_concentration(self) -> Any:
        """How much of each mean the heaviest rows carry: a matplotlib Figure.

        Raises:
            ImportError: matplotlib is missing.
        """
        return _pictures().concentration(self)

    def plot_classes(self) -> Any:
        """Median and mean layerwise flatness of each class, the 30 sharpest of more: a matplotlib Figure.

        Raises:
            ImportError: matplotlib is missing.
        """
        return _pictures().classes(self)

    def _figures(self) -> list[tuple[str, Any]]:
        if self.groups["all"].rows == 0:
            return []
        return [
            (
                "How the rows' values are distributed, in logs: correct and wrong predictions.",
                self.plot_distributions(),
            ),
            ("Layerwise relative flatness over 1 - confidence, a point a row.", self.plot_confidence()),
            ("The share of each mean that the heaviest rows carry.", self.plot_concentration()),
            ("Layerwise relative flatness by class: median and mean.", self.plot_classes()),
        ]


def _pictures() -> Any:
    from . import pictures as module

    return module


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def number(log: float) -> str:
    """A value by its log, as a short text: also where it is beyond the range of floats."""
    if math.isnan(log):
        return "NaN"
    if math.isinf(log):
        return "0" if log < 0 else "inf"
    if -9 < log < 9:
        return f"{math.exp(log):.3g}"
    exponent = math.floor(log / math.log(10))
    digits = f"{math.exp(log - exponent * math.log(10)):.2f}"
    if digits == "10.00":
        exponent, digits = exponent + 1, "1.00"
    return f"{digits}e{exponent:+03d}"


def percent(share: float) -> str:
    """A share as a short text."""
    return "NaN" if math.isnan(share) else f"{100 * share:.1f} %"


def dumps(value: Any) -> str:
    """Standard JSON, numbers that it does not have replaced."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(part) for key, part in item.items()}
        if isinstance(item, (list, tuple)):
            return [plain(part) for part in item]
        if isinstance(item, float) and not math.isfinite(item):
            return None if math.isnan(item) else str(item)
        return item

    return json.dumps(plain(value), indent=1, allow_nan=False) + "\n"


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write a file in one piece: it is replaced when the new one is whole, and left alone if that fails."""
    goal = Path(path)
    if goal.is_dir() or (goal.exists() and not goal.is_file()):
        goal.write_text(text, encoding="utf-8")  # a folder raises what it should, a device takes it
        return
    handle, name = tempfile.mkstemp(dir=goal.absolute().parent, prefix=f".{goal.name}.")
    try:
        with os.fdopen(handle, "w", newline="", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(goal.stat().st_mode & 0o777 if goal.exists() else 0o666 & ~umask)
        Path(name).replace(goal)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
