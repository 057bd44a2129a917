"""What a check found: one row for each backend, computation and path."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

_TITLES = ("backend", "stem", "path", "cases", "worst", "")


class Row(NamedTuple):
    """One computation on one path of one backend.

    ``backend``: "cpu-avx512", "cpu-reference", "cuda:0". ``path``: "fused", "chunked", or "-" where there is only one.
    ``cases``: calls that were compared. ``worst``: the largest error, in tolerances: 1 is the last that passes; NaN where
    nothing was compared. ``failure``: None, or the first one in a sentence: case, wanted, got.
    """

    backend: str
    stem: str
    path: str
    cases: int
    worst: float
    failure: str | None


class Check(NamedTuple):
    """What :func:`flatcore.check` found.

    ``rows``; ``reason``, why a device could not be checked, or None; ``notes``, times of a full check on a CUDA device. A
    row of no cases is a device that was not checked: "cuda" is one that is not here, "cuda:0" one that is.

    Example:
        >>> from flatcore._check.record import Check, Row
        >>> check = Check((Row("cpu-avx2", "row_norms", "-", 20, 0.25, None),))
        >>> check.ok, Check.from_json(check.to_json()) == check
        (True, True)
        >>> print(check)
        backend   stem       path  cases  worst
        cpu-avx2  row_norms  -        20   0.25  passed
        All passed. "worst" is the largest error in tolerances: 1 is the last that passes.
    """

    rows: tuple[Row, ...]
    reason: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether something was compared, nothing failed, and no device that is here was left out."""
        left_out = any(not row.cases and row.backend != "cuda" for row in self.rows)
        return any(row.cases for row in self.rows) and not self.failures and not left_out

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.failure is not None)

    def to_json(self) -> str:
        """As JSON, with Python's own NaN and Infinity."""
        record = {"rows": [row._asdict() for row in self.rows], "reason": self.reason, "notes": self.notes}
        return json.dumps(record)

    @classmethod
    def from_json(cls, text: str) -> Check:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: it is no such text.
        """
        try:
            found = json.loads(text)
            return cls(tuple(Row(**row) for row in found["rows"]), found["reason"], tuple(found["notes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no record of a check: {text[:200]!r}") from error

    def __str__(self) -> str:
        """A table; below it the outcome, every failure, the notes, and why a device could not be checked."""
        cells = [_TITLES, *map(_cells, self.rows)]
        width = [max(len(line[i]) for line in cells) for i in range(len(_TITLES))]
        lines = []
        for line in cells:
            left = [f"{text:<{w}}" for text, w in zip(line[:3], width, strict=False)]
            right = [f"{text:>{w}}" for text, w in zip(line[3:5], width[3:], strict=False)]
            lines.append("  ".join([*left, *right, line[5]]).rstrip())
        if compared := [row for row in self.rows if row.cases]:
            count = f"{len(self.failures)} of {len(compared)} rows FAILED" if self.failures else "All passed"
            lines.append(f'{count}. "worst" is the largest error in tolerances: 1 is the last that passes.')
        lines += [f"{row.backend}, {row.stem}, path {row.path}: {row.failure}" for row in self.failures]
        lines += self.notes
        if self.reason:
            lines.append(f"Not checked: {self.reason}")
        return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    absent = "not here" if row.backend == "cuda" else "not checked"
    outcome = "FAILED" if row.failure is not None else "passed" if row.cases else absent
    worst = "-" if math.isnan(row.worst) else f"{row.worst:.2g}"
    return row.backend, row.stem, row.path, str(row.cases), worst, outcome
