"""Write docs/exactness.md: flatcore beside the formulas everybody uses, over the top-two logit gap, in float32.

    python bench/exactness.py            # prints the page
    python bench/exactness.py --write    # writes docs/exactness.md
    python bench/exactness.py --draw     # draws docs/exactness.svg, which docs/zero.md shows; needs matplotlib

Truth is 60-digit arithmetic on the same float32 numbers. Logits are given, so that nothing but the formula is judged.
"""

from __future__ import annotations

import argparse
import math
import platform
from pathlib import Path

import mpmath
import torch

import flatcore
from flatcore._engine import paths

GAPS = (0, 0.3, 1, 5, 10, 15, 16.9, 17.3, 20, 40, 88, 103.9, 105, 250, 700, 1000, 10000)
D = 16


def problem(gap: float, C: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (1, D), head (C, D), logits (1, C): a top class, a second `gap` below, the rest 1 to 5 below that."""
    generator = torch.Generator().manual_seed(C)
    w = torch.randn(C, D, generator=generator)
    z = -gap - 1 - 4 * torch.rand(1, C, generator=generator)
    z[0, 0], z[0, 1] = 0.0, -gap
    return torch.randn(1, D, generator=generator), w, z


def truth(phi: torch.Tensor, w: torch.Tensor, z: torch.Tensor) -> dict[str, mpmath.mpf]:
    """Sums of one sign at 60 digits: Tr H, neuronwise, and the feature gradient's norm for the top class as label."""
    numbers = [mpmath.mpf(x) for x in z[0].tolist()]
    rows = [[mpmath.mpf(x) for x in row] for row in w.tolist()]
    total = mpmath.fsum(mpmath.exp(x) for x in numbers)
    p = [mpmath.exp(x) / total for x in numbers]
    rest = [total - mpmath.exp(x) if j else mpmath.fsum(map(mpmath.exp, numbers[1:])) for j, x in enumerate(numbers)]
    n = mpmath.fsum(mpmath.mpf(x) ** 2 for x in phi[0].tolist())
    trace = n * mpmath.fsum(a * b / total for a, b in zip(p, rest, strict=True))
    about_top = [[a - b for a, b in zip(row, rows[0], strict=True)] for row in rows]
    mean = [mpmath.fsum(p[j] * about_top[j][d] for j in range(1, len(p))) for d in range(D)]
    square = mpmath.fsum(p[j] * mpmath.fsum(x * x for x in about_top[j]) for j in range(1, len(p)))
    gradient = mpmath.fsum(x * x for x in mean)
    return {"trace": trace, "neuronwise": n * (square - gradient), "gradient": mpmath.sqrt(gradient)}


def naive(phi: torch.Tensor, w: torch.Tensor, z: torch.Tensor) -> dict[str, float]:
    """The usual float32 formulas."""
    p = z.softmax(dim=1)
    n = phi.square().sum(dim=1)
    gram = w @ w.T
    one_hot = torch.zeros_like(p).index_fill_(1, torch.tensor([0]), 1.0)
    return {
        "sum p(1-p)": (n * (p * (1 - p)).sum(dim=1)).item(),
        "1-sum p^2": (n * (1 - (p * p).sum(dim=1))).item(),
        "Gram": (n * ((p * gram.diagonal()).sum(dim=1) - ((p @ gram) * p).sum(dim=1))).item(),
        "W'(p-e)": ((p - one_hot) @ w).norm(dim=1).item(),
    }


def ours(phi: torch.Tensor, w: torch.Tensor, z: torch.Tensor) -> dict[str, float]:
    """Logs, in float32."""
    m = flatcore.head_metrics(phi, w, torch.tensor([0]), logits=z)
    return {
        "trace": m.log_hessian_trace.item(),
        "neuronwise": m.log_neuronwise.item(),
        "gradient": m.log_feature_gradient_norm.item(),
    }


def table(C: int) -> list[str]:
    """The rows of one table: ratios to the truth for the usual formulas, errors of the log for flatcore."""
    heads = [
        "gap",
        "Σp(1−p)",
        "1−Σp²",
        "Gram form",
        "‖Wᵀ(p−e)‖",
        "flatcore: log Tr H",
        "error",
        "log neuronwise",
        "error",
    ]
    heads += ["log gradient", "error"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for gap in GAPS:
        phi, w, z = problem(gap, C)
        exact = truth(phi, w, z)
        usual = naive(phi, w, z)
        kinds = {"sum p(1-p)": "trace", "1-sum p^2": "trace", "Gram": "neuronwise", "W'(p-e)": "gradient"}
        ratios = [f"{float(mpmath.mpf(value) / exact[kinds[name]]):.3g}" for name, value in usual.items()]
        cells = []
        for name, value in ours(phi, w, z).items():
            cells += [f"{value:.6g}", f"{abs(float(mpmath.mpf(value) - mpmath.log(exact[name]))):.1e}"]
        lines.append(f"| {gap:g} | " + " | ".join(ratios + cells) + " |")
    return lines


def draw(path: Path) -> None:
    """The table of 10 classes as a picture: what is left of the truth, and the log that goes on."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "flatcore"  # the same file from the same numbers
    gaps = [g / 2 for g in range(261)]
    left: dict[str, list[float]] = {}
    logs: dict[str, list[float]] = {"truth, 60 digits": [], "flatcore, float32": []}
    names = {
        "sum p(1-p)": "Σ p(1−p)", "1-sum p^2": "1 − Σ p²", "Gram": "Gram form", "W'(p-e)": "‖Wᵀ(p − e)‖",
    }  # fmt: skip
    kinds = {"sum p(1-p)": "trace", "1-sum p^2": "trace", "Gram": "neuronwise", "W'(p-e)": "gradient"}
    for gap in gaps:
        phi, w, z = problem(gap, 10)
        exact = truth(phi, w, z)
        for name, value in naive(phi, w, z).items():
            left.setdefault(names[name], []).append(float(mpmath.mpf(value) / exact[kinds[name]]))
        logs["truth, 60 digits"].append(float(mpmath.log(exact["trace"])))
        logs["flatcore, float32"].append(ours(phi, w, z)["trace"])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    shares, traces = figure.subplots(1, 2)
    for (name, values), style in zip(left.items(), ("-", "--", "-.", ":"), strict=True):
        shares.plot(gaps, values, style, label=name, linewidth=1.8)
    shares.set(
        ylim=(-0.08, 1.6), xlabel="gap of the top two logits", ylabel="share of the truth", title="usual formulas"
    )
    usual = [
        math.log(s) + t if s > 0 else math.nan for s, t in zip(left["Σ p(1−p)"], logs["truth, 60 digits"], strict=True)
    ]
    traces.plot(gaps, logs["truth, 60 digits"], color="0.75", linewidth=6, label="truth, 60 digits")
    traces.plot(gaps, logs["flatcore, float32"], color="C2", label="flatcore, float32")
    traces.plot(gaps, usual, "--", color="C0", label="log of Σ p(1−p)")
    traces.axvspan(104, gaps[-1], color="C3", alpha=0.12, linewidth=0)
    traces.annotate("0: no log", (117, -15), ha="center", color="C3")
    traces.set(xlabel="gap of the top two logits", ylabel="log Tr H", title="the log of the trace")
    for axes in (shares, traces):
        axes.legend(frameon=False, loc="upper right" if axes is shares else "lower left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def page() -> str:
    """The whole page."""
    mpmath.mp.dps = 60
    with paths.forced("fused" if flatcore.show_config()["cpu_targets"] else None):
        config = flatcore.show_config()
        parts = []
        for C in (2, 10, 1000):
            parts += [f"## {C} classes", "", *table(C), ""]
    target = config["cpu_target"] or "reference"
    return f"""# Exactness

What the usual float32 formulas return, as a **ratio to the truth** (1 is right, 0.5 is half, 0 is nothing), and
flatcore's float32 logs with their **absolute error** (the error of a log is the relative error of the value).
Truth is 60-digit arithmetic on the same float32 numbers; logits are given; the label is the top class.
A float32 log near 1000 is spaced 6e-5, near 10000 1e-3: that is the error seen there.

Made by `python bench/exactness.py --write` with flatcore {config["version"]} ({target}), torch {config["torch"]},
on {platform.machine()}. `tests/test_head_metrics.py` holds every path to these bounds.

""" + "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/exactness.md instead of printing")
    parser.add_argument("--draw", action="store_true", help="draw docs/exactness.svg instead")
    arguments = parser.parse_args()
    if arguments.draw:
        mpmath.mp.dps = 60
        draw(Path(__file__).parents[1] / "docs" / "exactness.svg")
    elif arguments.write:
        (Path(__file__).parents[1] / "docs" / "exactness.md").write_text(page())
    else:
        print(page())
