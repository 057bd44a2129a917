"""The kernels that the works' time goes to, as the compiler leaves them: the one place with their figures.

``test_cuda_compiled.py`` compares with the compiled code, 25 % either way; ``count_works.py`` puts them into docs/cuda.md.
After a change that is meant ``python tests/test_cuda_compiled.py`` prints what is seen.
"""

from __future__ import annotations

from typing import NamedTuple

ARCHITECTURES = "sm_80", "sm_90"
Both = tuple[float, float]


class Hot(NamedTuple):
    """A kernel at work; pairs are of sm_80 and sm_90."""

    work: str
    source: str
    name: str
    anchor: str  # opcode of the loop that the work is done in: the loop with most of these as its own
    elements: float  # of the work's unit to each of these instructions
    unit: str
    count: int  # units of the whole work
    registers: Both
    shared: int  # static bytes of a block
    blocks: Both  # of a multiprocessor
    instructions: Both  # of the loop, rare branches in it included, per unit
    why: str


PACK = r"LDG\.E\S*128"
_W4, _W1 = 8_192 * 128_256, 1_000_000 * 512
_STATISTICS = 4.0  # a lane's row is two packs of four logits, all in its registers
HOT = (
    Hot("W1", "head_metrics_float32.cu", "head_rows<LaneProducts<float, float, 10, 10>>", "FFMA", 1 / 11, "a feature", _W1,
        (168, 168), 17_920, (6, 6), (21.0, 21.4), "11 multiply-adds a feature; the rest loads, copies and addresses"),
    Hot("W1-bfloat16", "head_metrics_bfloat16.cu", "head_rows<TensorProducts<BHalf, 1, 1>>", "HMMA", 4, "a feature", _W1,
        (144, 143), 8_704, (6, 6), (4.5, 4.6), "a product of 16 x 8 x 16 for four features; widening, squares, sums"),
    Hot("W3", "head_metrics_chunk.cu", "loop_statistics<float, double, 0, 128>", PACK, _STATISTICS, "a logit",
        8_192 * 1_000, (64, 76), 160, (8, 6), (188, 213), "a float64 exponential, as there is a bias"),
    Hot("W4-trace", "head_metrics_chunk.cu", "loop_statistics<float, double, 0, 256>", PACK, _STATISTICS, "a logit",
        _W4, (76, 80), 320, (3, 3), (201, 227), "the same"),
    Hot("W4-trace, no bias", "head_metrics_chunk.cu", "loop_statistics<float, float, 0, 256>", PACK, _STATISTICS,
        "a logit", _W4, (72, 80), 256, (3, 3), (179, 184), "exponentials in float32; merges and sums in float64"),
    Hot("W4-neuronwise", "head_metrics_chunk.cu", "loop_statistics<float, double, 1, 256>", PACK, _STATISTICS,
        "a logit", _W4, (106, 104), 8_704, (2, 2), (326, 358), "and three pieces of a share; equal rows are merged"),
    Hot("W5", "row_norms.cu", "row_norms_tiles<float, float>", PACK, 4, "an element", 512 * 150_528,
        (56, 64), 192, (4, 4), (4.9, 4.9), "a square, a magnitude and a sum in float64, a comparison"),
    Hot("W6-forward", "head_measure.cu", "measure_rows<Elements<float>, Elements<float>, float>", "FFMA", 1,
        "a feature and class", 128 * 512 * 10, (64, 64), 1_152, (8, 8), (5.3, 5.3), "4 rows and 4 classes a step"),
    Hot("W6-backward", "head_measure_backward.cu", "backward_rows<Elements<float>, Elements<float>, float>", "FFMA", 1,
        "a feature and class", 128 * 512 * 10, (64, 64), 2_272, (8, 8), (5.3, 5.7), "the logits once more, as forward"),
    Hot("W6-backward", "head_measure_backward.cu", "backward_sums<16, Elements<float>, Elements<float>, float>", "FFMA",
        1, "a feature and class", 128 * 512 * 10, (111, 111), 18_560, (2, 2), (7.7, 7.2), "a row of 16 classes a step"),
)  # fmt: skip
"""Of W4 and W3 the loop goes over rows and has no other inside: its instructions are those of eight logits, and of a lane's
share of what is done once a row."""
