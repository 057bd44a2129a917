"""What was measured, to be read: tables for a terminal (rich) and for a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table

Report = dict[str, Any]
Entry = dict[str, Any]

CACHE_NOTE = (
    "Caches are as the candidate before left them: the inputs of W1 to W5 exceed a CPU's last-level cache, those of W6 and "
    "W7 stay in it."
)
HEADINGS = ("", "median", "10 % - 90 %", "× limit", "× flatcore", "peak MB", "right to 1 %", "error", "rounds", "")
MEANINGS = {
    "× limit": "median time over the limit's; 1 is perfect",
    "× flatcore": "median time over flatcore's; above 1 is slower than flatcore",
    "peak MB": "memory beyond inputs and outputs in one call",
    "right to 1 %": "share of a fixed subset of rows that is within 1 % of the float64 truth",
    "error": "of a single number, relative; of flatcore's rows, the largest in units of what its contract allows (tol.)",
}


def time(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def interval(low: float, high: float) -> str:
    """Two times in the unit of the larger one."""
    scale, unit = (1e6, "µs") if high < 1e-3 else (1e3, "ms")
    digits = 1 if unit == "µs" else 2
    return f"{low * scale:.{digits}f} - {high * scale:.{digits}f} {unit}"


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _error(row: dict[str, Any]) -> str:
    if row["relative_error"] is not None:
        return f"{row['relative_error']:.1e}"
    tolerances = row["largest_error_in_tolerances"]
    return "" if not tolerances else f"{tolerances:.2f} tol."


def _lines(entry: Entry) -> list[tuple[str, ...]]:
    limit = entry["limit"]["seconds"]
    native = next((row["median_s"] for row in entry["rows"] if row["role"] == "native"), None)
    lines: list[tuple[str, ...]] = [
        ("limit", time(limit), "", "1.00", _ratio(native and limit / native), "", "", "", "", "")
    ]
    for row in entry["rows"]:
        share = row["share_right_1pct"]
        lines.append((
            "flatcore" if row["role"] == "native" else row["name"], time(row["median_s"]),
            interval(row["p10_s"], row["p90_s"]), _ratio(row["times_limit"]), _ratio(row["over_native"]),
            "" if row["peak_mb"] is None else f"{row['peak_mb']:.1f}", "" if share is None else f"{100 * share:.0f} %",
            _error(row), str(row["rounds"]), row["path"] or row["note"],
        ))  # fmt: skip
    return lines


def _notes(entry: Entry) -> list[str]:
    if "failed" in entry:
        return [entry["failed"]]
    absent = [f"Absent: {each['name']}: {each['reason']}" for each in entry["absent"]]
    return [f"Limit: {entry['limit']['text']}", *absent]


def _used(lines: list[tuple[str, ...]]) -> list[int]:
    """The columns that say something."""
    return [k for k in range(len(HEADINGS)) if any(line[k] for line in lines)]


def table(entry: Entry) -> Table:
    """One work's table; what is absent and what the limit is stand below it."""
    found = Table(title=entry["title"], title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
                  caption="\n".join(_notes(entry)), caption_justify="left")  # fmt: skip
    if "failed" in entry:
        return found
    lines = _lines(entry)
    columns = _used(lines)
    for k in columns:
        found.add_column(HEADINGS[k], justify="right" if HEADINGS[k] else "left", no_wrap=True)
    for line in lines:
        style = "bold" if line[0] == "flatcore" else "dim" if line[0] == "limit" else None
        found.add_row(*(line[k] for k in columns), style=style)
    return found


def growth_lines(entries: Iterable[Entry]) -> list[tuple[str, ...]]:
    """A line for each shape: flatcore, the product alone, the best eager form."""
    lines = []
    for entry in entries:
        shape = (entry["title"].partition(": ")[2].partition(",")[0],
                 *(f"{entry.get(k, 0):,}" for k in "NDC"), entry.get("dtype", ""))  # fmt: skip
        native = next((row for row in entry["rows"] if row["role"] == "native"), None)
        eager = min(
            (row for row in entry["rows"] if row["role"] == "eager"), key=lambda row: row["median_s"], default=None
        )
        if eager is None:
            lines.append((*shape, "", "", "", entry.get("failed", "no eager form"), "", "", ""))
            continue
        best = eager["name"].partition(", ")[2]
        times = (time(eager["median_s"]), interval(eager["p10_s"], eager["p90_s"]))
        if native is None:
            lines.append((*shape, "", "", "", best, *times, ""))
            continue
        ratio = native["median_s"] / eager["median_s"]
        slower = native["p10_s"] > eager["p90_s"]
        ours = (time(native["median_s"]), interval(native["p10_s"], native["p90_s"]))
        lines.append((*shape, *ours, _ratio(native["times_limit"]), best, *times,
                      f"{ratio:.2f}" + (" slower" if slower else "")))  # fmt: skip
    return lines


GROWTH_HEADINGS = (
    "measure", "N", "D", "C", "dtype", "flatcore", "10 % - 90 %", "× limit", "best eager", "median", "10 % - 90 %",
    "flatcore / best eager",
)  # fmt: skip


def growth_table(moves: str, entries: Iterable[Entry]) -> Table:
    """How time grows with one of N, D, C."""
    found = Table(title=f"Growth: {moves}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in GROWTH_HEADINGS:
        found.add_column(
            heading, justify="left" if heading in ("measure", "dtype", "best eager") else "right", no_wrap=True
        )
    for line in growth_lines(entries):
        found.add_row(*line)
    return found


def _markdown_table(headings: Iterable[str], lines: Iterable[tuple[str, ...]], left: Iterable[int]) -> list[str]:
    heads = list(headings)
    aligned = ["---" if k in set(left) else "---:" for k in range(len(heads))]
    return ["| " + " | ".join(heads) + " |", "|" + "|".join(aligned) + "|",
            *("| " + " | ".join(line) + " |" for line in lines)]  # fmt: skip


def markdown(report: Report) -> str:
    """The whole report as a page."""
    parts = ["# flatcore bench", ""]
    if report["quick"]:
        parts += ["A `--quick` run: fewer rounds, fewer rows where the titles say so, no torch.compile, no memory. "
                  "Its figures are right for what they say, with wider spreads.", ""]  # fmt: skip
        if report["skipped"]:
            parts += [f"Left out: {', '.join(report['skipped'])}.", ""]
    if not report["complete"]:
        parts += ["**The run was not finished.**", ""]
    parts += [f"- {name}: {value}" for name, value in report["provenance"].items()]
    parts += [f"- {heading}: {meaning}" for heading, meaning in MEANINGS.items()] + [f"- {CACHE_NOTE}", ""]
    probes = [(p["name"], time(p["median_s"]), f"{p['rate']:,.1f} {p['unit']}") for p in report["probes"]]
    parts += ["Probes of the machine (the fastest of each kind counts):", ""]
    parts += _markdown_table(("probe", "median", "rate"), probes, (0,))
    for entry in report["works"]:
        parts += ["", f"## {entry['title']}", ""]
        if entry["rows"]:
            lines = _lines(entry)
            columns = _used(lines)
            parts += _markdown_table(
                [HEADINGS[k] for k in columns], [tuple(line[k] for k in columns) for line in lines],
                [i for i, k in enumerate(columns) if k in (0, len(HEADINGS) - 1)],
            )  # fmt: skip
            parts.append("")
        parts += [f"- {note}." for note in _notes(entry)]
    for moves, entries in groupby(report["growth"], key=lambda entry: entry["moves"]):
        several = list(entries)
        parts += ["", f"## Growth: {moves}", "", *_markdown_table(GROWTH_HEADINGS, growth_lines(several), (0, 4, 8))]
        notes = [f"- {entry['title']}: {note}." for entry in several for note in _notes(entry) if "Limit" not in note]
        parts += ["", *notes] if notes else []
    return "\n".join(parts).rstrip() + "\n"
