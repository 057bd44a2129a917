"""How the time of a head grows with N, D and C, and with the dtype: flatcore beside the best plain PyTorch and the product.

One of N, D and C moves, the others stay; for the trace and for neuronwise. The eager forms are those that fit the shape:
whole or in chunks of rows, through W W^T or p W. The limit is the product phi W^T (neuronwise: and the second one).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from . import candidates, rivals
from .candidate import Absent, Candidate
from .measure import Options
from .works import BYTES, Work

SHAPES: dict[str, list[tuple[int, int, int]]] = {
    "N": [(n, 512, 4_096) for n in (1, 16, 128, 1_024, 8_192)],
    "N, small head": [(n, 512, 10) for n in (1, 16, 128, 1_024, 16_384, 262_144, 1_000_000)],
    "D": [(512, d, 4_096) for d in (8, 64, 512, 2_048, 8_192)],
    "C": [(128, 512, c) for c in (2, 10, 100, 300, 1_000, 4_096, 32_000, 200_000)],
}
TYPED = {"small head": (8_192, 512, 10), "large head": (512, 1_024, 4_096)}
MEASURES = ("trace", "neuronwise")
LARGEST_QUICK = 1 << 30  # of N D C under --quick: a tenth of a second
MOST_LOGITS = 1 << 26  # of an eager form: 256 MB, and it needs a second such matrix
MOST_CLASSES = 10_000  # of W W^T: 400 MB


def works(*, quick: bool = False) -> list[tuple[str, Work]]:
    """What moves, and the work at each of its values."""
    found = []
    for moves, shapes in SHAPES.items():
        for N, D, C in shapes:
            for measure in MEASURES:
                found.append((moves, Work(f"growth-{measure}-{N}x{D}x{C}", measure, N, D, C, rounds=7)))
    for head, (N, D, C) in TYPED.items():
        for dtype in BYTES:
            for measure in MEASURES:
                key = f"growth-{measure}-{N}x{D}x{C}-{dtype}"
                found.append((f"dtype, {head}", Work(key, measure, N, D, C, rounds=7, dtype=dtype)))
    if quick:  # the shapes that take least, of each kind: every second
        found = [(moves, work.quick()) for moves, work in found if work.N * work.D * work.C <= LARGEST_QUICK]
        found = [(moves, work) for moves, work in found if work.measure == "trace"]
    return found


def everyone(options: Options, work: Work) -> tuple[list[Candidate], list[Absent]]:
    """flatcore and the eager forms that a machine of a few GB can run at this shape."""
    whole: dict[str, Any] = {"": rivals.trace}
    absent = []
    if work.measure == "neuronwise":
        whole = {"p W": rivals.neuronwise_mean, "Gram": rivals.neuronwise_gram}
        if work.C > MOST_CLASSES:
            del whole["Gram"]
            absent.append(Absent("eager, Gram", f"W Wᵀ would take {4e-6 * work.C**2:,.0f} MB"))
    forms: dict[str, rivals.Rival] = {}
    if work.N * work.C <= MOST_LOGITS:
        forms |= {f"whole {name}".strip(): form for name, form in whole.items()}
    else:
        absent.append(Absent("eager, whole", f"its logits would take {4e-6 * work.N * work.C:,.0f} MB, twice"))
    if work.N > rivals.ROWS_PER_CHUNK:
        forms |= {f"chunked {name}".strip(): rivals.chunked(form) for name, form in whole.items()}
    found = [candidates.eager(work, name, form) for name, form in forms.items()]
    return ([candidates.flatcore_candidate(work)] if options.native else []) + found, absent


def asked(options: Options) -> partial[tuple[list[Candidate], list[Absent]]]:
    """Who answers, as ``measure.measure`` takes it."""
    return partial(everyone, options)
