"""What a check has found, a row for each stem and path of a backend, and the same as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """One stem and path on one backend."""

    backend: str
    """``"cpu-avx512"``, ``"cuda:0"``."""
    stem: str
    path: str
    """``"fused"`` or ``"chunked"``; ``"-"`` where there is one path, or where it stands for all."""
    cases: int
    worst: float
    """Largest error in tolerances; NaN when no case ran."""
    failure: str | None
    """Which case, what was wanted and what came; None where every case passed."""


@dataclass(frozen=True)
class Check:
    """The rows, and why a device could not be checked (``reason``, None where it could)."""

    rows: tuple[Row, ...]
    reason: str | None = None

    @property
    def ok(self) -> bool:
        """Whether everything was checked and passed."""
        return self.reason is None and not any(row.failure for row in self.rows)

    def to_json(self) -> str:
        """As text that :meth:`from_json` reads."""
        return json.dumps({"reason": self.reason, "rows": [row._asdict() for row in self.rows]})

    @staticmethod
    def from_json(text: str) -> Check:
        """Read :meth:`to_json`'s text.

        Raises:
            ValueError: the text is anything else.
        """
        try:
            found = json.loads(text)
            rows = tuple(Row(**row) for row in found["rows"])
            check = Check(rows, found["reason"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not the record of a check: {text[:80]!r}") from error
        named = all(isinstance(x, str) for row in rows for x in (row.backend, row.stem, row.path))
        counted = all(isinstance(row.cases, int) and isinstance(row.worst, (int, float)) for row in rows)
        said = all(isinstance(x, (str, type(None))) for x in (check.reason, *(row.failure for row in rows)))
        if not (named and counted and said):
            raise ValueError(f"not the record of a check: {text[:80]!r}")
        return check
