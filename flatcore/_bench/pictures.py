"""What was measured, to be looked at: ratios, roofline, growth. Made from a report alone, so another machine's will do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

Report = dict[str, Any]
Entry = dict[str, Any]

# Okabe and Ito's colours, told apart by all kinds of sight, and a marker each besides
STYLES: dict[str, tuple[str, str, str]] = {
    "native": ("#000000", "o", "flatcore"),
    "eager": ("#0072B2", "s", "best plain PyTorch"),
    "compile": ("#E69F00", "D", "torch.compile of it"),
    "neighbour": ("#009E73", "^", "F.linear_cross_entropy (the loss only)"),
    "tool": ("#CC79A7", "v", "other tools, without samples"),
    "sampling": ("#D55E00", "X", "other tools, from samples"),
}
LIMIT = "0.45"


def _merged(report: Report) -> list[Entry]:
    """The works that were measured; rows of a separate run beside torch.compile go with their work."""
    found: dict[str, Entry] = {}
    for entry in report["works"]:
        if not entry["rows"]:
            continue
        key = entry["key"].partition(", compiled")[0]
        if key in found:
            found[key]["rows"] += [row for row in entry["rows"] if row["role"] != "native"]
        else:
            found[key] = entry | {"key": key, "rows": list(entry["rows"])}
    return list(found.values())


def _shown(entry: Entry) -> list[dict[str, Any]]:
    """The rows of an entry by role; of the eager forms the fastest."""
    eager = min((row for row in entry["rows"] if row["role"] == "eager"), key=lambda row: row["median_s"], default=None)
    return [row for row in entry["rows"] if row is eager or (row["role"] in STYLES and row["role"] != "eager")]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _origin(report: Report) -> str:
    """One line on where the figures come from."""
    of = report["provenance"]
    where = of.get("device") if of.get("device") not in (None, "cpu") else f"{of['cpu']}, {of['threads']} threads"
    commit = f", commit {of['commit'][:9]}" if of.get("commit") else ""
    return f"{where}, torch {of['torch']}, flatcore {of['flatcore']}{commit}" + (", --quick" if report["quick"] else "")


def _point(axes: Axes, y: float, row: dict[str, Any], native: dict[str, Any]) -> None:
    colour, marker, label = STYLES[row["role"]]
    unit = native["median_s"]
    middle = row["median_s"] / unit
    around = [[middle - row["p10_s"] / unit], [row["p90_s"] / unit - middle]]
    axes.errorbar(middle, y, xerr=around, color=colour, marker=marker, ms=6, lw=1.2, capsize=2, label=label, ls="none")


def _legend(figure: Figure, panels: Iterable[Axes], columns: int) -> None:
    """One of all panels, each name once, below them."""
    named: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False)


def ratios(report: Report) -> Figure | None:
    """Time over flatcore's, for each work; and the tools of W7 by name. None without any of flatcore's times."""
    entries = [entry for entry in _merged(report) if any(row["role"] == "native" for row in entry["rows"])]
    if not entries:
        return None
    tools = [entry for entry in entries if any(row["role"] in ("tool", "sampling") for row in entry["rows"])]
    names = list(
        dict.fromkeys(row["name"] for entry in tools for row in entry["rows"] if row["role"] in ("tool", "sampling"))
    )
    height = max(3.5, 0.33 * max(len(entries), 1.25 * len(names)) + 1.8)
    figure = _figure(13 if names else 8.5, height)
    panels = figure.subplots(1, 2 if names else 1, squeeze=False)[0]
    left = panels[0]
    for y, entry in enumerate(reversed(entries)):
        native = next(row for row in entry["rows"] if row["role"] == "native")
        for row in _shown(entry):
            if row["role"] not in ("tool", "sampling"):
                _point(left, y, row, native)
        left.plot(entry["limit"]["seconds"] / native["median_s"], y, color=LIMIT, marker="|", ms=13, mew=2, ls="none",
                  label="limit")  # fmt: skip
    left.set_yticks(range(len(entries)), [entry["key"] for entry in reversed(entries)])
    left.set_ylim(-0.6, len(entries) - 0.4)
    left.set_title("time / flatcore's time", fontsize=11)
    if names:
        _tools(panels[1], tools, names)
    for axes in panels:
        axes.set_xscale("log")
        axes.axvline(1, color="black", lw=0.8, zorder=0)
        axes.grid(axis="x", which="major", alpha=0.35)
        axes.set_xlabel("flatcore = 1; right of it is slower than flatcore (10 % - 90 % as bars)")
    low, high = left.get_xlim()
    # as many marks as there is room for
    marks = (1, 1.5, 2, 3, 5, 7) if high / low < 30 else (1, 2, 5) if high / low < 1e3 else (1,)
    ticks = [t for power in range(-6, 7) for t in (mark * 10.0**power for mark in marks) if low <= t <= high]
    left.set_xticks(ticks, [f"{t:g}" for t in ticks])
    left.set_xticks([], minor=True)
    _legend(figure, panels, 4)
    figure.suptitle(_origin(report), fontsize=9, color="0.3")
    return figure


def _tools(axes: Axes, entries: list[Entry], names: list[str]) -> None:
    """The field's tools on W7: their times, and beside them what they are off."""
    for entry, shift in zip(entries, (0.17, -0.17), strict=False):
        native = next(row for row in entry["rows"] if row["role"] == "native")
        rows = {row["name"]: row for row in entry["rows"]}
        for y, name in enumerate(reversed(names)):
            if name not in rows:
                continue
            _point(axes, y + shift, rows[name], native)
            ratio, error = rows[name]["median_s"] / native["median_s"], rows[name]["relative_error"]
            said = (
                f"{ratio:,.0f} ×" + ("" if error is None else f", off by {error:.0e}") + f", {entry['rows_are']} rows"
            )
            axes.annotate(said, (rows[name]["p90_s"] / native["median_s"], y + shift), va="center",
                          xytext=(7, 0), textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_title("W7: the trace of a data set, by the field's tools", fontsize=11)
    largest = max(
        row["p90_s"] / native["median_s"] for entry in entries for row in entry["rows"] if row["name"] in names
    )
    axes.set_xlim(0.7, largest * (largest / 0.7) ** 0.85)  # room for what is written beside the points


def roofline(report: Report) -> Figure | None:
    """Operations per second over operations per byte, below what the machine can do; None without its probes."""
    fastest: dict[str, float] = {}
    for probe in report["probes"]:
        kind = "bfloat16" if "bfloat16" in probe["name"] else probe["kind"]
        fastest[kind] = max(fastest.get(kind, 0.0), probe["rate"])
    # below a tenth of a millisecond's work a call is bound by what is not in the picture
    entries = [entry for entry in _merged(report) if entry["operations"] > 1e8 and entry["N"] and entry["bytes"]]
    if not fastest or not entries:
        return None
    read = fastest["read"]
    figure = _figure(10, 6.2)
    axes = figure.subplots()
    points, named = [], []
    for entry in entries:
        x = entry["operations"] / entry["bytes"]
        for row in _shown(entry):
            if row["role"] in ("native", "eager", "compile"):
                colour, marker, label = STYLES[row["role"]]
                y = entry["operations"] / row["median_s"] / 1e9
                mine = row["role"] == "native"
                axes.plot(
                    x,
                    y,
                    marker,
                    color=colour,
                    ms=7,
                    mfc=colour if mine else "none",
                    label=label,
                    zorder=3 if mine else 2,
                )
                points.append((x, y))
                if mine or not any(other["role"] == "native" for other in entry["rows"]):
                    named.append((x, y, entry["key"]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    knees = [fastest[kind] / read for kind in ("product", "bfloat16") if kind in fastest]
    low, high = min(*(x for x, _ in points), *knees) / 2, max(*(x for x, _ in points), *knees) * 4  # room for names
    for kind, dashes, name in (("product", "-", "float32"), ("bfloat16", ":", "bfloat16")):
        if kind in fastest:
            label = f"this machine: {read:,.0f} GB/s, {fastest[kind]:,.0f} GFLOP/s in {name}"
            roof = [low * read, fastest[kind], fastest[kind]]
            axes.plot([low, fastest[kind] / read, high], roof, color=LIMIT, ls=dashes, lw=1.5, zorder=0, label=label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    axes.set_xlim(low, high)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom / 1.5, top * 1.5)
    axes.set_xlabel("operations per byte that has to be read")
    axes.set_ylabel("10⁹ operations per second")
    axes.grid(which="major", alpha=0.35)
    _legend(figure, (axes,), 2)
    figure.suptitle(_origin(report), fontsize=9, color="0.3")
    _name(figure, axes, named, points)
    return figure


def _name(figure: Figure, axes: Axes, named: list[tuple[float, float, str]], points: list[tuple[float, float]]) -> None:
    """Write each name beside its point, in the first place where it covers neither a point nor another name."""
    figure.draw_without_rendering()  # places are known once the layout is
    boxes: list[tuple[float, float, float, float]] = []
    for point in points:
        x, y = axes.transData.transform(point)
        boxes.append((x - 6, y - 6, x + 6, y + 6))
    for x, y, name in sorted(named, key=lambda each: -each[1]):
        at_x, at_y = axes.transData.transform((x, y))
        width, height = 6.6 * len(name), 13.0
        places = [(9, -height / 2), (-9 - width, -height / 2), (-width / 2, 10), (-width / 2, -10 - height)]
        places += [(dx, dy) for dy in (12, -24, 26, -38, 40, -52, 54, -66) for dx in (9, -9 - width)]
        for dx, dy in places:
            box = (at_x + dx, at_y + dy, at_x + dx + width, at_y + dy + height)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes):
                break
        boxes.append(box)
        far = abs(dy) > 11
        # in points, 72 to the inch
        scale = 72 / figure.dpi
        axes.annotate(
            name, (x, y), xytext=(dx * scale, dy * scale), textcoords="offset points", fontsize=9, va="bottom", ha="left",
            arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.6} if far else None,
        )  # fmt: skip


def growth(report: Report) -> Figure | None:
    """Time over N, D, C and over dtypes. None where growth was not measured."""
    moving = [
        (moves, [e for e in entries if e["rows"]]) for moves, entries in groupby(report["growth"], lambda e: e["moves"])
    ]
    moving = [(moves, entries) for moves, entries in moving if entries]
    if not moving:
        return None
    columns = min(3, len(moving))
    lines = -(-len(moving) // columns)
    figure = _figure(4.3 * columns, 3.4 * lines + 0.9)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (moves, entries) in zip(panels, moving, strict=False):
        _grown(axes, moves, entries)
    for axes in panels[len(moving) :]:
        axes.set_axis_off()
    _legend(figure, panels[: len(moving)], 3)
    figure.suptitle(_origin(report), fontsize=9, color="0.3")
    return figure


def _grown(axes: Axes, moves: str, entries: list[Entry]) -> None:
    typed = moves.startswith("dtype")
    letter = "dtype" if typed else moves[0]
    for measure, dashes in (("trace", "-"), ("neuronwise", "--")):
        of = [entry for entry in entries if f": {measure}" in entry["title"]]
        if not of:
            continue
        x = range(len(of)) if typed else [entry[letter] for entry in of]
        for role, name in (("native", "flatcore"), ("eager", "best plain PyTorch"), ("limit", "product alone")):
            y = [entry["limit"]["seconds"] if role == "limit" else _fastest(entry, role) for entry in of]
            colour, marker = (LIMIT, ".") if role == "limit" else STYLES[role][:2]
            axes.plot(x, [1e3 * value for value in y], color=colour, ls=dashes, marker=marker, ms=4, lw=1.3,
                      mfc=colour if dashes == "-" else "none", label=f"{name}, {measure}")  # fmt: skip
        if typed:
            axes.set_xticks(range(len(of)), [entry["dtype"] for entry in of])
    first = entries[0]
    still = ", ".join(f"{k} = {first[k]:,}" for k in "NDC" if k != letter)
    axes.set_title(f"{letter} ({still})" if not typed else f"dtype ({still})", fontsize=10)
    if not typed:
        axes.set_xscale("log")
        axes.set_xlabel(letter)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("ms")
    axes.grid(alpha=0.35)


def _fastest(entry: Entry, role: str) -> float:
    return float(min((row["median_s"] for row in entry["rows"] if row["role"] == role), default=float("nan")))


PICTURES: dict[str, Callable[[Report], Figure | None]] = {"ratios": ratios, "roofline": roofline, "growth": growth}


def draw(report: Report, out: Path) -> list[Path]:
    """Write NAME-ratios.png, NAME-roofline.png and NAME-growth.png beside NAME.json, as far as there is what they show."""
    written = []
    for name, made in PICTURES.items():
        figure = made(report)
        if figure is not None:
            path = out.with_name(f"{out.stem}-{name}.png")
            figure.savefig(path, dpi=130)
            written.append(path)
    return written
