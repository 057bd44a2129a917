"""Bytes and operations of each call of the CUDA kernels, by formula.

Bytes are what a launch reads and writes at least once, summed over the launches of the call: what comes from memory where
nothing of it is in a cache, as the framework's operators are counted. Operations are additions and multiplications, a fused
one counting as two. The formulas' bytes are held against every load and store of the kernels over emulated threads
(test_kernel_costs.py). A kernel that is called and is not here is an error.

Letters: N rows, D features, C classes; n rows of a block; itemsizes x, w of features and weight, z of the compute type, v of
values.
"""

from __future__ import annotations

import re
from collections import Counter as Sums
from collections.abc import Callable
from typing import Any, NamedTuple

from flatcore.reference import FIELDS

WEIGHT_FIELDS = sum(1 << bit for bit, name in enumerate(FIELDS) if "neuronwise" in name or "gradient_norm" in name)
OTHER_NORMS = sum(1 << bit for bit, name in enumerate(FIELDS) if "gradient_norm_" in name)
LAYERWISE = 1 << FIELDS.index("log_layerwise")
NEURONWISE = 1 << FIELDS.index("log_neuronwise")
TAIL, ROW = 80, 72  # bytes of HeadTail and HeadRow
SLICES, TILE, SHORT = 64, 16384, 1024  # head_weights.cu, row_norms.cu
EXP_SINGLE, EXP_DOUBLE = 16, 25  # operations of an exponential, its difference included
STATISTICS = 4  # float64 sums of a logit, and of its share
ROW_DOUBLE = 25  # a class of a small head's row in float64: its share of the logarithms too
ITEMSIZES = (2, 2, 4, 8)  # by dtype code
HALF, BHALF = 0, 1
BLOCK_CLASSES = 16  # head_pieces.h
QUESTIONS = {
    "cuda_architectures", "cuda_runtime", "cuda_device", "cuda_load", "cuda_row_norms_workspace",
    "cuda_head_weights_workspace", "cuda_head_packing", "cuda_head_explicit_slot", "cuda_head_explicit_row",
    "cuda_head_measure_backward_workspace",
}  # fmt: skip
"""Of the module's functions those that launch nothing."""


class Cost(NamedTuple):
    """Of one call."""

    bytes: float
    operations: Sums[str]


def cost(nbytes: float, **operations: float) -> Cost:
    """By kind: half, single, double."""
    return Cost(nbytes, Sums(operations))  # type: ignore[arg-type]


class Shape(NamedTuple):
    """What a HeadProblem was made of."""

    N: int
    D: int
    C: int
    x: int
    w: int
    z: int
    pieces: int  # of W on tensor cores, for a small head; or 0
    piece: int  # itemsize of one
    fields: int
    as_they_stand: bool  # logits are used as the product left them
    given: int  # itemsize of given logits, or 0
    bias: bool
    include_bias: bool
    target: bool

    @property
    def weights(self) -> bool:
        return bool(self.fields & WEIGHT_FIELDS)

    @property
    def piece_rows(self) -> int:
        """Rows of W on tensor cores: whole groups of classes, in pieces."""
        return -(-self.C // BLOCK_CLASSES) * BLOCK_CLASSES * self.pieces

    @property
    def columns(self) -> int:
        """Fields that need rows of W."""
        return (self.fields & WEIGHT_FIELDS).bit_count()


def _pieces(features: int, weight: int, fields: int, double: bool) -> tuple[int, int]:
    """As csrc/cuda/head_pieces.h has them, by dtype codes."""
    if features not in (HALF, BHALF) or double or fields & OTHER_NORMS:
        return 0, 0
    whole = weight == BHALF or (weight == HALF and features == HALF)
    return 1 if whole else 3, 2 if features == BHALF else 4


def _shape(arguments: tuple[Any, ...]) -> Shape:
    head, features, weight, logits, bias, _, N, D, C, fields, double, _ = arguments
    as_they_stand = head.temperature == 1 and (bias is None or logits is not None) and not double
    return Shape(
        N, D, C, ITEMSIZES[features[3]], ITEMSIZES[weight[3]], 8 if double else 4,
        *_pieces(features[3], weight[3], fields, double), fields, as_they_stand,
        0 if logits is None else ITEMSIZES[logits[3]], bias is not None, head.include_bias, head.target is not None,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ all of W, once
def head_weights(s: Shape, center: int, packed: int, rows: int, stride: int, distances: int, biased: int) -> Cost:
    """W for its norms, packed on the way, twice in float64; for its center and the squares about it; for distances."""
    W = s.C * s.D * s.w
    passes = 2 if s.w == 8 else 1
    total = passes * (W + 2 * 16 * s.C + 16 + 8 * s.C * s.include_bias) + (16 if passes == 2 else 0)
    operations = 4 * s.C * s.D * passes
    if packed:
        of_pieces = s.piece_rows * stride * s.piece + 4 * s.piece_rows / s.pieces if s.pieces else 0
        total += passes * (of_pieces or rows * stride * s.z)
    if center:
        sums = 8 * SLICES * (s.D + 1)
        total += W + 8 + sums + sums + s.D * s.w + 8 + 8 * (s.D + 1) + W + 8 * s.D + 8 + 8 * s.C
        total += s.include_bias * (16 * s.C + 16)
        operations += 5 * s.C * s.D + SLICES * s.D
    if distances:
        total += W + 8 + 8 * s.C * s.C * (2 if biased else 1) + 8 * s.C * bool(biased)
        operations += 3 * s.C * s.C * s.D / 2
    return cost(total, double=operations)


def head_repeat_keys(s: Shape, positions: int) -> Cost:
    """W, for a projection of each row."""
    return cost(s.C * s.D * s.w + 8 * positions + 8 * s.C * s.include_bias, double=2 * s.C * s.D)


def head_repeat_runs(s: Shape, positions: int) -> Cost:
    """The keys in order; rows are read where keys are equal, the first row with itself in any case."""
    joins = 8 * positions + 8 * s.C + s.D * s.w + positions + 8 * s.C * s.include_bias
    return cost(joins + positions + 4 * positions + 8)


# -------------------------------------------------------------------------------------------------------- small heads
def head_metrics(s: Shape, values: int, packed_rows: int, packed: int, distances: int, biased: int) -> Cost:
    """The features once; W, packed or in pieces for tensor cores; what a row gets.

    Other norms take the differences of W's rows once more. A product in tf32 takes as long as two of 16 bits.
    """
    tables = 8 * s.C * s.C * (bool(distances) + bool(biased))
    others = bool(s.fields & OTHER_NORMS)
    rows = (0 if s.given else packed_rows) or s.C * others
    W = s.piece_rows * -(-s.D // 64) * 64 * s.piece + 4 * s.C if s.pieces else rows * packed * s.z
    read = s.N * s.D * s.x + (0 if s.given and s.pieces else W) + 16 + tables
    read += 8 * s.C * s.bias + 8 * s.N * s.target + s.N * s.C * s.given
    written = s.N * (values * s.fields.bit_count() + 8 + bool(distances))
    kind = "double" if s.z == 8 else "single"
    operations = Sums({kind: 2 * s.N * s.D + 5 * s.N * s.D * s.C * others})
    if not s.given and s.pieces:
        operations["half"] += 2 * s.N * s.D * s.piece_rows * (s.piece // 2)
    elif not s.given:
        operations[kind] += 2 * s.N * s.D * packed_rows
    operations["double"] += ROW_DOUBLE * s.C * s.N + 2 * s.C * s.C * s.N * bool(distances)
    return Cost(read + written, operations)


def head_explicit(s: Shape, n: int) -> Cost:
    """A mark a row, while no row is marked: none of the works' is done from explicit differences."""
    return cost(n)


def head_measure(s: Shape, values: int, reduced: bool, weighted: bool) -> Cost:
    """The rows' logs from features and W, then one block's sums over them; anchored rows have no norm of W."""
    layerwise = 8 * s.C * bool(s.fields & LAYERWISE)
    inputs = s.N * s.D * s.x + s.C * s.D * s.w + 8 * s.C * s.bias + s.N * s.C * s.given
    labels = 8 * s.N * s.target * bool(s.weights and not s.fields & NEURONWISE)
    rows = inputs + labels + 8 * s.N + layerwise
    total = 8 * s.N * (1 + weighted) + layerwise + 8 * s.N * s.target * (not weighted) + 8 * s.N
    total += values * (1 if reduced else s.N)
    kind = "double" if s.z == 8 or s.weights else "single"
    return Cost(
        rows + total,
        Sums({kind: 2 * s.N * s.D * (s.C + 1)}) + Sums({"double": (200 + 4 * s.D * s.weights) * s.N * s.C}),
    )


def head_measure_backward(
    s: Shape, upstream: int, coefficient: bool, features: int, weight: int, bias: int, logits: int
) -> Cost:
    """Features and W for a row's own gradients, then features and what the rows left for the sums over them.

    ``features`` to ``logits``: itemsizes of the gradients, 0 where not wanted.
    """
    layerwise, neuronwise = bool(s.fields & LAYERWISE), bool(s.fields & NEURONWISE)
    given = s.N * s.C * s.given
    inputs = s.N * s.D * s.x + s.C * s.D * s.w
    left = 8 * s.N + 8 * s.N * s.C + 8 * s.C * layerwise
    if s.weights:
        left += 8 * s.N * s.C + 8 * s.N * (s.D + 1) + 8 * s.N
    if neuronwise:
        left += 16 * s.N * s.C + 8
    rows = inputs + given + 8 * s.C * s.bias + upstream + 8 * s.N * coefficient + left
    rows += (8 * s.N * s.target if not neuronwise else 0) + 8 * s.N * s.D if s.weights else 0  # labels; the directions
    rows += s.N * (s.D * features + s.C * logits)
    sums = 0.0
    if weight or bias:
        sums = (inputs if weight else 0) + left + weight * s.C * s.D + bias * s.C
        sums -= s.C * s.D * s.w if weight and not (layerwise or s.weights) else 0
    kind = "double" if s.z == 8 else "single"
    products = 6 * s.N * s.D * s.C
    return Cost(rows + sums, Sums({kind: products}) + Sums({"double": (200 + 12 * s.D * s.weights) * s.N * s.C}))


# -------------------------------------------------------------------------------------------------------- large heads
def loop_start(s: Shape, n: int) -> Cost:
    """The features of a block, for their norms."""
    return cost(n * (s.D * s.x + TAIL), double=3 * n * s.D)


def loop_statistics(s: Shape, n: int, start: int, classes: int, z: int, shares: int, pieces: int, table: bool) -> Cost:
    """A tile's logits once, its shares once, the rows' state; and the sums of rows whose best logit but one rises.

    Of classes in any order one of the tile's is among the two best so far with a probability of 2/k in the k-th tile.
    """
    # the two best logits and their sums are read and written, the label's logit written; what counts the shares as well
    of_weight = s.weights and not table
    total = n * classes * (s.z if z else s.given) + n * (2 * 40 + 16 * s.target + 2 * 24 * of_weight)
    total += 8 * classes * (s.bias and not s.given)
    operations = Sums({"double": STATISTICS * n * classes})
    operations["single" if s.as_they_stand else "double"] += (
        (EXP_SINGLE if s.as_they_stand else EXP_DOUBLE) * n * classes
    )
    if table:
        total += n * _padded(classes) * s.z + 8 * n
        operations["double"] += n * classes
    elif s.weights:
        k = start // classes + 1
        total += n * _padded(classes) * (2 * pieces or s.z) + 8 * classes + 8 * classes * s.include_bias + 16 + 4
        moved = 0 if start == 0 else n * s.D * min(1, 2 / k)
        total += 2 * s.z * moved + (0 if pieces or start == 0 else 8 * s.D)
        operations["double"] += (STATISTICS + 3 * pieces) * n * classes
        operations["single"] += 2 * moved
    return Cost(total, operations)


def _padded(classes: int) -> int:
    return -(-classes // 8) * 8


def loop_values(s: Shape, n: int, values: int, table: bool) -> Cost:
    """A row's state, and where its rows of W count its sums, and as many rows of W as there are or are asked for."""
    softmax = s.fields.bit_count() - s.columns
    total = n * (48 + (8 if table else 24 * s.weights) + ROW + 8) + 16 * n * s.target + 16 + n * values * softmax
    operations = 100 * n
    if s.weights and values and not table:
        rows = min(n * (2 if s.target else 1), s.C) * s.D * s.w
        total += n * (ROW - 16 + s.D * s.z + 1 + values * s.columns) + 8 * (s.D + 1) + rows + 8 * n * s.target + 16 + 8
        operations += 20 * n * s.D
    return cost(total, double=operations)


def loop_table(s: Shape, n: int, values: int, biased: bool) -> Cost:
    """A row's shares and what the library made of them and the table, or both; of a gradient's table one number a row."""
    total = n * s.C * s.z * (3 if biased else 2) + n * (48 + 8 * s.target + 1 + values * s.columns) + 16
    total += 8 * n * bool(s.fields & WEIGHT_FIELDS & ~NEURONWISE)
    return cost(total, double=4 * n * s.C + 60 * n)


# ---------------------------------------------------------------------------------------------------------- row norms
def row_norms(itemsize: int, N: int, K: int, orders: int) -> Cost:
    """The matrix once; rows of several tiles leave three numbers a tile."""
    tiles = -(-K // TILE)
    partials = 2 * 24 * N * tiles if K > SHORT and tiles > 1 else 0
    return cost(N * K * itemsize + partials + orders * N * (8 if itemsize == 8 else 4), double=4 * N * K)


def priced(core: Any, note: Callable[[str, Cost], None]) -> dict[str, Any]:
    """The module's functions and classes that launch kernels, each telling ``note`` its name and what it costs."""

    class Problem(core.HeadProblem):  # type: ignore[misc]
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.shape, self.values = _shape(arguments), 0

        @staticmethod
        def of(*arguments: Any) -> None:
            """None is found in C: each is made here, of what its shape is read from."""

        def write_to(self, values: int, wide: bool, prediction: int) -> None:
            self.values = 8 if wide else 4
            super().write_to(values, wide, prediction)

    class Loop(core.HeadLoop):  # type: ignore[misc]
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.problem, self.pieces, self.has_table = arguments[2], arguments[9], bool(arguments[10])

        def start(self, first: int, rows: int) -> None:
            super().start(first, rows)
            note("start", loop_start(self.problem.shape, rows))

        def statistics(self, first: int, rows: int, start: int, classes: int, z: int, stride: int, shares: int) -> None:
            super().statistics(first, rows, start, classes, z, stride, shares)
            how = z, shares, self.pieces, self.has_table
            note("statistics", loop_statistics(self.problem.shape, rows, start, classes, *how))

        def values(self, first: int, rows: int) -> None:
            super().values(first, rows)
            note("values", loop_values(self.problem.shape, rows, self.problem.values, self.has_table))

        def table(self, first: int, rows: int, shares: int, sums: int, bias_sums: int) -> None:
            super().table(first, rows, shares, sums, bias_sums)
            note("table", loop_table(self.problem.shape, rows, self.problem.values, bool(bias_sums)))

    def weights(device: int, stream: int, problem: Any, *rest: Any) -> None:
        core.cuda_head_weights(device, stream, problem, *rest)
        _, _, center, _, packed, rows, stride, distances, biased = rest
        note("head_weights", head_weights(problem.shape, center, packed, rows, stride, distances, biased))

    def metrics(device: int, stream: int, problem: Any, *rest: Any) -> None:
        core.cuda_head_metrics(device, stream, problem, *rest)
        _, stride, _, distances, biased, _ = rest
        rows, _ = core.cuda_head_packing(problem)
        note("head_metrics", head_metrics(problem.shape, problem.values, rows, stride, distances, biased))

    def explicit(device: int, stream: int, problem: Any, first: int, rows: int, *rest: Any) -> None:
        core.cuda_head_explicit(device, stream, problem, first, rows, *rest)
        note("head_explicit", head_explicit(problem.shape, rows))

    def keys(device: int, stream: int, problem: Any, width: int, positions: int, keys: int) -> None:
        core.cuda_head_repeat_keys(device, stream, problem, width, positions, keys)
        note("head_repeat_keys", head_repeat_keys(problem.shape, positions))

    def runs(device: int, stream: int, problem: Any, width: int, positions: int, *rest: Any) -> None:
        core.cuda_head_repeat_runs(device, stream, problem, width, positions, *rest)
        note("head_repeat_runs", head_repeat_runs(problem.shape, positions))

    def measure(device: int, stream: int, problem: Any, *rest: Any) -> None:
        core.cuda_head_measure(device, stream, problem, *rest)
        weights, _, reduction, _, _, _, double, _, _ = rest
        note("head_measure", head_measure(problem.shape, 8 if double else 4, reduction != 0, bool(weights)))

    def backward(device: int, stream: int, problem: Any, upstream: Any, coefficient: int, at: int, *into: Any) -> None:
        core.cuda_head_measure_backward(device, stream, problem, upstream, coefficient, at, *into)
        size = ITEMSIZES[upstream[3]] * (problem.shape.N if upstream[2] else 1)
        sizes = [0 if x is None else ITEMSIZES[x[3]] for x in into]
        note("head_measure_backward", head_measure_backward(problem.shape, size, bool(coefficient), *sizes))

    def norms(device: int, stream: int, x: Any, N: int, K: int, *rest: Any) -> None:
        core.cuda_row_norms(device, stream, x, N, K, *rest)
        note("row_norms", row_norms(ITEMSIZES[x[3]], N, K, sum(map(bool, rest[:3]))))

    def unpriced(name: str) -> Callable[..., None]:
        def refuse(*arguments: Any) -> None:
            raise NotImplementedError(f"{name} has no cost in tests/kernel_costs.py")

        return refuse

    for name in dir(core.HeadLoop):
        if not name.startswith("_") and name not in vars(Loop):
            setattr(Loop, name, unpriced(f"HeadLoop.{name}"))
    launching = (name for name in dir(core) if re.match("cuda_|Head", name) and name not in QUESTIONS)
    return {name: unpriced(name) for name in launching} | {
        "HeadProblem": Problem, "HeadLoop": Loop, "cuda_head_weights": weights, "cuda_head_metrics": metrics,
        "cuda_head_explicit": explicit, "cuda_head_repeat_keys": keys, "cuda_head_repeat_runs": runs,
        "cuda_head_measure": measure, "cuda_head_measure_backward": backward, "cuda_row_norms": norms,
    }  # fmt: skip
