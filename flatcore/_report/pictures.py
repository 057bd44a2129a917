"""The pictures, as matplotlib figures that need no screen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .distribution import Distribution
from .tally import CLASSES, MEASURES

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install 'flatcore[lab]'", name="matplotlib") from error

CORRECT, WRONG = "#0072B2", "#D55E00"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "0.35")
_PER_E = 1 / math.log(10)  # logs are natural; axes show powers of ten


def _figure(width: float, height: float) -> Any:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def distributions(report: Any) -> Any:
    """Histograms of every measure, by correct and wrong."""
    names = list(report.distributions)
    figure = _figure(5.2, 1.75 * len(names) + 0.5)
    axes = np.atleast_1d(figure.subplots(len(names), 1))
    for k, (ax, name) in enumerate(zip(axes, names, strict=True)):
        found = report.distributions[name]
        logs, _ = found.histogram()
        if len(logs) == 0:
            ax.text(0.5, 0.5, "no finite value above 0", ha="center", va="center", transform=ax.transAxes)
            ax.set_yticks([])
            ax.set_xlabel(f"{MEASURES[name]} (power of ten)")
            continue
        edges = np.linspace(logs[0] * _PER_E - 0.05, logs[-1] * _PER_E + 0.05, 61)
        for label, colour, right in (("correct", CORRECT, 1), ("wrong", WRONG, 0)):
            centres, rows = found.histogram(range(right, 2 * CLASSES + 2, 2))
            density, _ = np.histogram(centres * _PER_E, edges, weights=rows)
            share = density / max(rows.sum(), 1)
            ax.stairs(100 * share, edges, fill=True, alpha=0.45, color=colour)
            ax.stairs(100 * share, edges, color=colour, lw=1.2, label=f"{label} ({report.groups[label].rows})")
        ax.set_xlabel(rf"$\log_{{10}}$ of {MEASURES[name]}")
        ax.set_ylabel("% of rows")
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        if k == 0:
            ax.legend(frameon=False, loc="best", handlelength=1)
    return figure


def confidence(report: Any) -> Any:
    """Flatness over 1 - confidence."""
    figure = _figure(5.2, 4.2)
    ax = figure.subplots()
    sample = report.sample
    x, y = (sample[name].astype(float) * _PER_E for name in ("log_one_minus_confidence", "log_layerwise"))
    finite = np.isfinite(x) & np.isfinite(y)
    for label, colour, marker, rows in (
        ("correct", CORRECT, "o", sample["correct"]),
        ("wrong", WRONG, "D", ~sample["correct"]),
    ):
        chosen = rows & finite
        size = 20 if len(x) < 1000 else 6
        ax.scatter(x[chosen], y[chosen], s=size, c=colour, marker=marker, alpha=0.5, linewidths=0, label=label)
    if finite.any():
        ax.legend(frameon=False, markerscale=1.5)
    hidden = int((~finite).sum())
    ax.invert_xaxis()
    ax.set_xlabel(r"$\log_{10}(1 -$ confidence$)$   (more confident $\rightarrow$)")
    ax.set_ylabel(r"$\log_{10}$ relative flatness" + "\n(larger is sharper)")
    shown = f"{finite.sum()} of {report.groups['all'].rows} rows"
    ax.set_title(shown + (f", {hidden} not finite" if hidden else ""), fontsize=11)
    ax.grid(alpha=0.3)
    return figure


def concentration(report: Any) -> Any:
    """Share of the sum over share of the rows, heaviest first."""
    figure = _figure(5.2, 4.2)
    ax = figure.subplots()
    found: dict[str, Distribution] = report.distributions
    for colour, (name, distribution) in zip(_COLOURS, found.items(), strict=False):
        share, rows = distribution.concentration()
        if len(rows):
            ax.plot(100 * rows, 100 * share, color=colour, lw=1.8, label=MEASURES[name])
    ax.axvline(1, color="0.5", lw=1, ls=":")
    ax.set_xscale("log")
    ax.set_xlim(100 / max(report.groups["all"].rows, 10), 100)
    ax.set_ylim(0, 102)
    ax.set_xlabel("heaviest rows (% of all)")
    ax.set_ylabel("share of the mean (%)")
    ax.grid(alpha=0.3)
    if ax.lines[1:]:
        ax.legend(frameon=False, fontsize=9)
    return figure


def classes(report: Any) -> Any:
    """Median and mean by class."""
    found = {
        label: group.statistics["layerwise"]
        for label, group in report.classes.items()
        if group.statistics and not math.isnan(group.statistics["layerwise"].log_mean)
    }
    shown = sorted(found, key=lambda label: found[label].log_median, reverse=True)[:30]
    figure = _figure(5.2, 1.4 + 0.23 * max(len(shown), 4))
    ax = figure.subplots()
    place = np.arange(len(shown))
    for name, marker, filled in (("log_median", "o", CORRECT), ("log_mean", "D", "white")):
        values = np.array([getattr(found[label], name) * _PER_E for label in shown], float)
        finite = np.isfinite(values)
        ax.scatter(
            values[finite], place[finite], marker=marker, facecolor=filled, edgecolor=CORRECT, s=34,
            label=name.removeprefix("log_"), zorder=3,
        )  # fmt: skip
    ax.set_yticks(place, [f"{label}  ({report.classes[label].accuracy:.0%})" for label in shown])
    ax.invert_yaxis()
    ax.set_ylabel("class (its accuracy)")
    ax.set_xlabel(r"$\log_{10}$ relative flatness, layerwise")
    if len(found) > len(shown):
        ax.set_title(f"the {len(shown)} sharpest of {len(found)} classes", fontsize=11)
    ax.grid(alpha=0.3)
    if shown:
        ax.legend(frameon=False)
    return figure


def attack_path(path: Any, measures: tuple[str, ...]) -> Any:
    """Median path with quartiles, aligned at the step of the flip."""
    figure = _figure(5.2, 2.6 * len(measures) + 0.6)
    axes = np.atleast_1d(figure.subplots(len(measures), 1, sharex=True))
    flipped, began = int((path.flip_step >= 0).sum()), int(path.correct[0].sum())
    axes[0].set_title(f"{flipped} of {began} correct samples flip", fontsize=11)
    for ax, name in zip(axes, measures, strict=True):
        offset, samples, (low, middle, high) = path.aligned(name)
        # a quantile of the few samples that have so many steps before or after the flip is another population's
        kept = samples >= max(0.1 * flipped, 1)
        at = offset[kept].numpy()
        low, middle, high = (line[kept].numpy() for line in (low, middle, high))
        ax.fill_between(at, low, high, color=CORRECT, alpha=0.25, lw=0, label="quartiles")
        ax.plot(at, middle, color=CORRECT, marker="o", ms=4, label="median")
        ax.axvline(0, color=WRONG, lw=1.2, ls="--", label="flip")
        ax.set_ylabel(name.replace("_", " "))
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=9)
    axes[-1].set_xlabel("steps since the flip")
    return figure


def scaling(results: Any) -> Any:
    """Clean and robust accuracy over the head's scale."""
    figure = _figure(5.2, 3.8)
    ax = figure.subplots()
    for kind, colour, marker in (("usual", WRONG, "o"), ("exact", CORRECT, "D")):
        rows = [r for r in results if r.gradient == kind]
        if rows:
            ax.plot(
                [r.scale for r in rows], [r.robust_accuracy for r in rows], color=colour, marker=marker,
                label=f"attacked, {kind} gradient",
            )  # fmt: skip
    clean = {r.scale: r.clean_accuracy for r in results}
    ax.plot(list(clean), list(clean.values()), color="0.4", ls=":", label="no attack")
    ax.set_xscale("log")
    ax.set_xticks(list(clean), [f"{s:g}" for s in clean])
    ax.minorticks_off()
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlabel(r"scale of the head (more confident $\rightarrow$)")
    ax.set_ylabel("accuracy")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return figure
