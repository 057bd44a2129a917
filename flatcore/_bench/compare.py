"""Two reports side by side: what changed beyond the spread."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from .report import interval, time

FORMAT = "flatcore bench 1"
MACHINE = ("device", "cpu", "cores", "threads", "instruction_set_torch", "instruction_set_flatcore")
"""What has to be the same for two times to be compared."""
PASSING = ("date", "clock_mhz", "load_average_1min")
"""What differs between any two runs and says nothing."""


class CompareError(ValueError):
    """Two reports that cannot be compared."""


class Change(NamedTuple):
    """One candidate of one work in both reports."""

    work: str
    name: str
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Median after over median before; below 1 is faster."""
        return float(self.after["median_s"] / self.before["median_s"])

    @property
    def verdict(self) -> str:
        """Faster or slower only where the ranges from the 10th to the 90th percentile do not meet."""
        if self.after["p90_s"] < self.before["p10_s"]:
            return "faster"
        if self.after["p10_s"] > self.before["p90_s"]:
            return "slower"
        return "same within the spread"


def read(path: Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        CompareError: it is none.
        OSError: it cannot be read.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompareError(f"{path} is no JSON file ({error}); a report is what flatcore bench --out writes") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise CompareError(f"{path} is no report of this version's flatcore bench; run it again with --out")
    return report


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What the two provenances say differently, time of day aside."""
    first, second = a["provenance"], b["provenance"]
    names = [*first, *(name for name in second if name not in first)]
    return [
        (name, first.get(name), second.get(name))
        for name in names
        if name not in PASSING and first.get(name) != second.get(name)
    ]


def require_same_machine(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Refuse times of two machines.

    Raises:
        CompareError: with what differs.
    """
    found = [(name, x, y) for name, x, y in differences(a, b) if name in MACHINE]
    if found:
        said = ", ".join(f"{name} {x} and {y}" for name, x, y in found)
        raise CompareError(
            f"the reports are of different machines or settings ({said}): their times say nothing of one another; "
            "--force compares them nevertheless"
        )


def _rows(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Every candidate of every work, the works by their titles, which have the sizes."""
    return {
        (entry["title"], row["name"]): row for entry in (*report["works"], *report["growth"]) for row in entry["rows"]
    }


def changes(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    """Everyone who is in both."""
    before, after = _rows(a), _rows(b)
    return [Change(*key, row, after[key]) for key, row in before.items() if key in after]


def machine_moved(a: dict[str, Any], b: dict[str, Any]) -> float | None:
    """How many times as long the works' limits took in the second: other than 1, the machine was not the same to both."""
    before = {entry["title"]: entry["limit"]["seconds"] for entry in a["works"] if entry["rows"]}
    ratios = [entry["limit"]["seconds"] / before[entry["title"]] for entry in b["works"]
              if entry["rows"] and entry["title"] in before]  # fmt: skip
    return statistics.median(ratios) if ratios else None


def unmatched(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Who is only in the first, and only in the second."""
    before, after = _rows(a), _rows(b)
    return [": ".join(key) for key in before if key not in after], [
        ": ".join(key) for key in after if key not in before
    ]


def tables(a: dict[str, Any], b: dict[str, Any]) -> list[Table]:
    """What the provenances say differently, and every candidate with its verdict."""
    style: dict[str, Any] = {"title_justify": "left", "box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    origin = Table("", "A", "B", title="What differs in provenance", **style)
    for name, x, y in differences(a, b):
        origin.add_row(name, str(x), str(y))
    found = [origin] if origin.row_count else []
    changed = Table(title="B over A, medians", **style)
    for heading in ("work", "", "A", "10 % - 90 %", "B", "10 % - 90 %", "B / A", ""):
        changed.add_column(heading, justify="left" if heading in ("work", "") else "right", no_wrap=heading != "work")
    last = ""
    for change in changes(a, b):
        title, name = change.work, "flatcore" if change.name == "native" else change.name
        title = title.partition(": ")[0] if title.startswith("growth") else title  # which has the sizes
        colour = {"faster": "green", "slower": "red"}.get(change.verdict)
        changed.add_row(
            title if title != last else "", name, time(change.before["median_s"]),
            interval(change.before["p10_s"], change.before["p90_s"]), time(change.after["median_s"]),
            interval(change.after["p10_s"], change.after["p90_s"]), f"{change.ratio:.2f}", change.verdict, style=colour,
        )  # fmt: skip
        last = title
    return [*found, changed]
