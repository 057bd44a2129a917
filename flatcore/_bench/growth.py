"""How the time of a head grows with N, D and C: flatcore beside the best plain PyTorch and the product of the logits.

    python bench/growth.py [--threads 2] [--quick] [--out bench/results/NAME.md]

One of N, D and C moves, the others stay. For the trace and for neuronwise: medians of flatcore, of the best eager form
in that place (whole, or in chunks of rows; through W W^T or p W) and of the one product phi W^T, all called in turn, round
after round; below two thousandths of a second several calls are one sample. The last column is flatcore's time over the
best eager form's: 1.2 or more is printed bold. Answers are checked on some rows against the float64 reference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # flatcore's Python from this tree

import rivals
import torch
import works
from provenance import provenance, require_release_build
from rich.progress import track

import flatcore

SHAPES: dict[str, list[tuple[int, int, int]]] = {
    "N": [(n, 512, 4_096) for n in (1, 16, 128, 1_024, 8_192)],
    "D": [(512, d, 4_096) for d in (8, 64, 512, 2_048, 4_096)],
    "C": [(128, 512, c) for c in (2, 10, 100, 300, 1_000, 4_096, 32_000, 200_000)],
    "N, small head": [(n, 512, 10) for n in (1, 16, 128, 1_024, 16_384, 262_144)],
}
SAMPLE_SECONDS = 2e-3
LONG = 0.2  # seconds of a call from which on three rounds have to do
MOST_LOGITS = 1 << 26  # of an eager form: 256 MB, and it needs a second such matrix


def eager_forms(measure: str, N: int, C: int) -> dict[str, rivals.Rival]:
    """The plain forms of a measure that a machine of a few GB can run."""
    whole: dict[str, Any] = {"": rivals.trace}
    if measure == "neuronwise":
        whole = {"p W": rivals.neuronwise_mean, "Gram": rivals.neuronwise_gram}
        if C > 10_000:  # W W^T takes 400 MB and more
            del whole["Gram"]
    chunked = {f"chunked {name}".strip(): rivals.chunked(form) for name, form in whole.items()}
    return {**({f"whole {name}".strip(): form for name, form in whole.items()} if N * C <= MOST_LOGITS else {}),
            **(chunked if N > rivals.ROWS_PER_CHUNK else {})}  # fmt: skip


def native(measure: str, x: works.Inputs) -> torch.Tensor:
    """The measure of each row, from flatcore."""
    if measure == "trace":
        return flatcore.hessian_trace(x.features, x.linear_weight, linear_bias=x.linear_bias, reduction="none")
    return flatcore.relative_flatness(
        x.features, x.linear_weight, linear_bias=x.linear_bias, reduction="none", measure=measure
    )


def check(measure: str, x: works.Inputs, value: torch.Tensor) -> None:
    """Some rows against the reference in float64: within 1e-5."""
    some = torch.linspace(0, len(value) - 1, min(4, len(value))).long()
    wide = x.rows(some)._replace(features=x.features[some].double())
    wide = wide._replace(linear_weight=x.linear_weight.double(), linear_bias=x.linear_bias.double())
    with flatcore.backend("reference"):
        torch.testing.assert_close(value[some].double(), native(measure, wide), rtol=1e-5, atol=0.0)


def seconds(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median of each, in turn."""
    calls = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, int(SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-9)))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(rounds):
        if done >= 3 and any(min(times) > LONG for times in taken.values()):
            break
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            taken[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(times) for name, times in taken.items()}


def measured(measure: str, N: int, D: int, C: int, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    x = works.inputs(works.Work("growth", measure, N, D, C, rounds))
    check(measure, x, native(measure, x))
    forms = eager_forms(measure, N, C)
    runs: dict[str, Callable[[], Any]] = {name: lambda form=form: form(*x[:3]) for name, form in forms.items()}
    chunk = min(N, max(1, MOST_LOGITS // C))
    out = torch.empty(chunk, C)

    def product() -> None:
        for rows in x.features.split(chunk):
            torch.mm(rows, x.linear_weight.T, out=out[: len(rows)])

    taken = seconds({"flatcore": lambda: native(measure, x), "product": product, **runs}, rounds)
    best = min(forms, key=lambda name: taken[name])
    return {"measure": measure, "N": N, "D": D, "C": C, "seconds": taken, "best": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="smoke test: the smallest shapes; never quote its figures")
    parser.add_argument("--out", type=Path, help="Markdown file to write; the numbers go beside it as JSON")
    arguments = parser.parse_args()
    require_release_build()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    rounds = 3 if arguments.quick else 7
    origin, found = provenance(), []
    shapes = [(key, *shape) for key, several in SHAPES.items() for shape in several[: 1 if arguments.quick else None]]
    for key, N, D, C in track(shapes, "growth"):
        found += [{"moves": key, **measured(measure, N, D, C, rounds)} for measure in ("trace", "neuronwise")]
    lines = ["# Growth", "", f"Provenance: `{origin}`", ""]
    for key in SHAPES:
        lines += [f"## {key}", "", "| measure | N | D | C | flatcore, ms | ps per NDC | over phi Wᵀ | best eager "
                  "| ms | flatcore / best eager |", "|---|---:|---:|---:|---:|---:|---:|---|---:|---:|"]  # fmt: skip
        for line in (line for line in found if line["moves"] == key):
            N, D, C, taken, best = line["N"], line["D"], line["C"], line["seconds"], line["best"]
            ours, ratio = taken["flatcore"], taken["flatcore"] / taken[best]
            bold = "**" if ratio >= 1.2 else ""
            lines.append(
                f"| {line['measure']} | {N:,} | {D:,} | {C:,} | {ours * 1e3:.3f} | {ours / (N * D * C) * 1e12:.2f} | "
                f"{ours / taken['product']:.2f} | {best} | {taken[best] * 1e3:.3f} | {bold}{ratio:.2f}{bold} |"
            )
        lines.append("")
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines))
        arguments.out.with_suffix(".json").write_text(
            json.dumps({"provenance": origin, "lines": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
