"""Plant wrong kernels, one at a time, and see whether the suite notices.

    python tests/plant_wrong_kernels.py              # all of them: a build and a part of the suite each, about a minute
    python tests/plant_wrong_kernels.py log1p tail   # those whose name contains one of the words
    python tests/plant_wrong_kernels.py --check tail # does flatcore.check alone notice?

The checkout is copied to a temporary directory, one exact string is replaced in its sources, the package is built into a
directory beside it and the tests named here run against that build with ``-x -q``. Nothing in the checkout is touched.
Exit status 1 if a wrong kernel stayed green, if it did not build, if a string to replace is not there exactly once, or if
the copy without any change is not green.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_VALUES = ("tests/test_head_metrics.py",)
_BACKWARD = ("tests/test_head_metrics_backward.py", "-k", "gradcheck and fused and not cuda")
_FUSED = (*_VALUES, "-k", "fused and not cuda")
_CHUNKED = (*_VALUES, "-k", "chunked and not cuda")
_LANES = ("tests/test_head_lanes.py",)
_CUDA = (*_VALUES, "--emulate-all", "-k", "cuda")
_CUDA_SINCE_80 = ("tests/test_cuda_since_80.py",)
_CUDA_TILES = ("tests/test_cuda_tiles.py",)
_CUDA_BACKWARD = ("tests/test_head_metrics_backward.py", "--emulate-all", "-k", "cuda-fused")


@dataclass(frozen=True)
class Plant:
    """A mistake: ``old`` becomes ``new`` in ``file``; ``tests`` are the arguments of the run that must turn red."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = _VALUES


PLANTS = (
    Plant(
        "1 - p in the reference's float32",
        "flatcore/reference/split.py",
        "self.log_eps = self.u1.log() - self.g - self.log1p_tau",
        "self.log_eps = (1 - self.p_m).log()",
        ("tests/test_reference.py", "-k", "exact"),
    ),
    Plant(
        "1 - sum p^2",
        "csrc/math/epsilon_split.h",
        "split.log_one_minus_sum_p2 = split.log_eps + log_nonnegative(2.0 - split.eps * (1.0 + s2));",
        "split.log_one_minus_sum_p2 =\n"
        "      log_nonnegative(1.0 - split.confidence * split.confidence - split.eps * split.eps * s2);",
    ),
    Plant(
        "1 - p",
        "csrc/math/epsilon_split.h",
        "split.log_eps = log_nonnegative(u1) - split.margin - split.log1p_tau;",
        "split.log_eps = log_nonnegative(1.0 - split.confidence);",
    ),
    Plant(
        "log1p of a small number as log(1 + x)",
        "csrc/math/exp_log.h",
        "return log_nonnegative(u) + (x - (u - 1.0)) / u;",
        "return log_nonnegative(u);",
    ),
    Plant(
        "dropped rescale where blocks of classes meet",
        "csrc/math/softmax_tail.h",
        "both.u1 = x.u1 * fx + y.u1 * fy + fl;",
        "both.u1 = x.u1 + y.u1 + fl;",
        ("tests/test_head_metrics.py", "-k", "wide-1500"),
    ),
    Plant(
        "top and runner-up swapped",
        "csrc/cpu/head_tile.h",
        "math::epsilon_split<DoubleV>(top, rest, sum, squares, inverse_temperature)",
        "math::epsilon_split<DoubleV>(rest, top, sum, squares, inverse_temperature)",
        _FUSED,
    ),
    Plant(
        "runner-up lost when a new top comes",
        "csrc/cpu/head_tile.h",
        "rest = higher ? top : second;",
        "rest = second;",
        _FUSED,
    ),
    Plant(
        "feature tail off by one",
        "csrc/cpu/head_tile.h",
        "const int64_t rest = call.D - whole * lanes;",
        "const int64_t rest = call.D - whole * lanes - 1;",
        ("tests/test_shapes.py", "-k", "ragged"),
    ),
    Plant(
        "class tail off by one, chunked",
        "csrc/cpu/head_logits.h",
        "if (k < row.count) {",
        "if (k + 1 < row.count) {",
        ("tests/test_shapes.py", "-k", "ragged"),
    ),
    Plant(
        "class tail off by one, products of a few rows",
        "csrc/cpu/head_own_products.cpp",
        "const int64_t here = last - k < K ? last - k : K;",
        "const int64_t here = last - k < K ? last - k - (last - k > 1 ? 1 : 0) : K;",
        ("tests/test_shapes.py", "-k", "few_rows"),
    ),
    Plant(
        "missing centring of the squares, chunked",
        "csrc/cpu/head_weights.cpp",
        "const double square = none ?",
        "const double square = none || scale > 0.0 ?",
        _CHUNKED,
    ),
    Plant(
        "top class left in q, chunked",
        "csrc/cpu/head_logits.h",
        "if (top >= k && top < k + lanes) u[top - k] = L{0};",
        "",
        _CHUNKED,
    ),
    Plant(
        "32-bit offset",
        "csrc/cpu/head_tile.h",
        "rows[i] = x + n * call.features.row_stride;",
        "rows[i] = x + static_cast<int32_t>(n * call.features.row_stride);",
        ("tests/test_shapes.py", "-k", "beyond_32_bits"),
    ),
    Plant(
        "pairs counted twice",
        "csrc/cpu/head_metrics.cpp",
        "store_unaligned(total + v, 0.5 * sum);",
        "store_unaligned(total + v, sum);",
        _FUSED,
    ),
    Plant(
        "temperature forgotten in the trace",
        "csrc/cpu/head_metrics.cpp",
        "out[i] = log_n_head[i] + log_one_minus_sum_p2[i] - two_log_t;",
        "out[i] = log_n_head[i] + log_one_minus_sum_p2[i];",
        _FUSED,
    ),
    Plant(
        "the difference's rounding dropped in float lanes",
        "csrc/math/exp_log.h",
        "- k * 0x1.7f7d1cp-20F) + lost;",
        "- k * 0x1.7f7d1cp-20F);",
        ("tests/test_math.py", "-k", "exp_of_a_difference"),
    ),
    Plant(
        "the same beside a temperature",
        "csrc/math/exp_log.h",
        "- k * temperature.low) + lost)",
        "- k * temperature.low))",
        ("tests/test_math.py", "-k", "exp_of_a_difference"),
    ),
    Plant(
        "every row ordinary by its distances",
        "csrc/cpu/head_lanes.h",
        "unordinary_unless(v, inner > kLeastOfDistances);",
        "",
        _LANES,
    ),
    Plant(
        "every row ordinary by its gradient",
        "csrc/cpu/head_lanes.h",
        "unordinary_unless(v, left | load_unaligned<Int32V>(unlabelled + v));",
        "",
        _LANES,
    ),
    Plant(
        "NaN logits not noticed",
        "csrc/cpu/head_tile.h",
        "poison = z < math::kInfinity ? poison : DoubleV{} + kNan;",
        "",
        ("tests/test_edges.py",),
    ),
    Plant(
        "class weight forgotten",
        "flatcore/_engine/reduction.py",
        "s = valid.to(wide) if weight is None else torch.where(valid, weight.to(wide)[label], 0.0)",
        "s = valid.to(wide)",
        (*_VALUES, "-k", "mean or weights"),
    ),
    Plant(
        "mean of logs for the log of the mean",
        "flatcore/_engine/reduction.py",
        "value = logs.logsumexp(dim=0) if logs.shape[0] else",
        "value = logs.mean() + math.log(logs.shape[0]) if logs.shape[0] else",
        (*_VALUES, "-k", "mean or weights"),
    ),
    Plant(
        "row tail off by one",
        "csrc/cpu/row_norms.cpp",
        "for (; k < count; ++k) {",
        "for (; k + 1 < count; ++k) {",
        ("tests/test_row_norms.py",),
    ),
    Plant(
        "label's class left among the rest",
        "csrc/cpu/unmasked_cross_entropy.cpp",
        "if (at < 0 || at >= kLanes) return v;",
        "return v;",
        ("tests/test_unmasked_cross_entropy.py",),
    ),
    Plant(
        "difference of logits rounded",
        "csrc/math/exp_log.h",
        "- k * 0x1.7f7d1cp-20F) + lost;",
        "- k * 0x1.7f7d1cp-20F) + 0.0F * lost;",
        ("tests/test_unmasked_cross_entropy.py", "-k", "differences"),
    ),
    Plant(
        "class tail of the cotangent off by one",
        "csrc/cpu/unmasked_cross_entropy.cpp",
        "return masked(load_end<C>(z_ + j, classes_ - j), j);",
        "return masked(load_end<C>(z_ + j, classes_ - j - 1), j);",
        ("tests/test_unmasked_cross_entropy.py", "-k", "ragged"),
    ),
    Plant(
        "row not scaled where squares leave the range",
        "csrc/cpu/row_norms.cpp",
        "} else if (!math::squares_in_range<double>(total.squares) && total.largest > 0.0) {",
        "} else if (total.squares < 0.0) {",
        ("tests/test_row_norms.py",),
    ),
    Plant(
        "gradient of the top logit without its cancelling part",
        "csrc/math/measure_cotangent.h",
        "-confidence * (confidence - eps * s2) * twice_inverse",
        "-confidence * confidence * twice_inverse",
        _BACKWARD,
    ),
    Plant(
        "weight's gradient of neuronwise on one side only",
        "csrc/cpu/head_metrics_backward.cpp",
        "(sum.pairs[j * layout.classes_stride + k] + sum.pairs[k * layout.classes_stride + j]) * scale;",
        "2.0 * sum.pairs[j * layout.classes_stride + k] * scale;",
        _BACKWARD,
    ),
    Plant(
        "CUDA: u of the rest not rescaled",
        "csrc/cuda/head_metrics_chunk.cu",
        "both.u1 = before.u1 * factor + joins",
        "both.u1 = before.u1 + joins",
        _CUDA_TILES,
    ),
    Plant(
        "CUDA: the product's sums not rescaled",
        "csrc/cuda/head_metrics_chunk.cu",
        "Z value = mean[d] * common;",
        "Z value = mean[d];",
        _CUDA_TILES,
    ),
    Plant(
        "CUDA: a top class that is overtaken left out of the sums",
        "csrc/cuda/head_metrics_chunk.cu",
        "        if (share != Z{}) {  // the top class",
        "        if (share > Z{1}) {  // the top class",
        _CUDA_TILES,
    ),
    Plant(
        "CUDA: shares of equal rows left apart",
        "csrc/cuda/head_repeats.cu",
        "call.found[kRepeated] = repeated != 0 ? 1 : 0;",
        "call.found[kRepeated] = 0;",
        _CUDA_TILES,
    ),
    Plant(
        "CUDA: of the rows with one top class the first alone adds to W's gradient",
        "csrc/cuda/head_metrics_backward.cu",
        "for (int64_t k = i; k < rows; ++k) {\n        if (!adds(k)) continue;",
        "for (int64_t k = i; k < i + 1; ++k) {\n        if (!adds(k)) continue;",
        ("tests/test_head_metrics_backward.py", "--emulate-all", "-k", "cuda"),
    ),
    Plant(
        "all columns in a tensor core's accumulator",
        "csrc/cuda/head_products_tensor.h",
        "const float before[4] = {sum[0], sum[1], sum[2], sum[3]};",
        "const bool old = piece == count - 1;\n"
        "const float before[4] = {old ? sums[i][group][0] : sum[0], old ? sums[i][group][1] : sum[1],\n"
        "old ? sums[i][group][2] : sum[2], old ? sums[i][group][3] : sum[3]};\n"
        "if (old) sums[i][group][0] = sums[i][group][1] = sums[i][group][2] = sums[i][group][3] = 0.0F;",
        _CUDA_SINCE_80,
    ),
    Plant(
        "last piece of W forgotten",
        "csrc/cuda/head_products_tensor.h",
        "for (int piece = count - 1; piece >= 0; --piece) {",
        "for (int piece = (count - 1) / 2; piece >= 0; --piece) {",
        _CUDA_SINCE_80,
    ),
    Plant(
        "a copy that is not waited for",
        "csrc/cuda/head_products.h",
        "wait_for_groups_but<1>();",
        "wait_for_groups_but<2>();",
        _CUDA_SINCE_80,
    ),
    Plant(
        "a stage overwritten before it is read",
        "csrc/cuda/head_products.h",
        "start(stage == 0 ? 2 : stage - 1);",
        "start(stage == 2 ? 0 : stage + 1);",
        _CUDA_SINCE_80,
    ),
    Plant(
        "CUDA: one lane's share dropped in the fold",
        "csrc/cuda/head_products.h",
        "const int index = at + ((threadIdx.x & offset) != 0 ? half : 0);",
        "const int index = at + ((threadIdx.x & offset) != 0 && offset != 4 ? half : 0);",
        _CUDA,
    ),
    Plant(
        "CUDA: no barrier behind the sums of equal rows",
        "csrc/cuda/head_metrics_chunk.cu",
        "        Group::sync();  // and their sums\n",
        "",
        ("tests/test_cuda_build.py", "-k", "order"),
    ),
    Plant(
        "CUDA: marked rows left undone",
        "csrc/cuda/head_explicit.cu",
        "if (count == 0) continue;",
        "if (count >= 0) continue;",
        _CUDA,
    ),
    Plant(
        "CUDA: a slice's sums not rescaled where a better class comes",
        "csrc/cuda/head_explicit.cu",
        "columns[e] = base != from && d + e < call.D ? slot[d + e] * moves : 0.0;",
        "columns[e] = base != from && d + e < call.D ? slot[d + e] : 0.0;",
        ("tests/test_cuda_explicit.py", "-k", "exact"),
    ),
    Plant(
        "CUDA: the mean of a slice left out of the spread of all",
        "csrc/cuda/head_explicit.cu",
        "      spread += weights[s] * moved * moved;\n",
        "",
        ("tests/test_cuda_explicit.py", "-k", "exact"),
    ),
    Plant(
        "CUDA: the label's own coefficient in a small head's other norms",
        "csrc/cuda/head_other_norms.h",
        "const V apart = weights.items[e] - anchors[r].items[e];",
        "const V apart = weights.items[e];",
        ("tests/test_cuda_explicit.py", "-k", "other_norms"),
    ),
    Plant(
        "CUDA: pairs of the table of distances counted twice",
        "csrc/cuda/head_metrics_values.cu",
        "half = 0.5 * inverse * inverse;",
        "half = inverse * inverse;",
        ("tests/test_cuda_explicit.py", "-k", "table"),
    ),
    Plant(
        "CUDA: centre left in q W",
        "csrc/cuda/head_metrics_values.cu",
        "* inverse - has_center * center;",
        "* inverse - 0.0 * has_center * center;",
        _CUDA,
    ),
    Plant(
        "CUDA: the top class's share of the variance's cotangent",
        "csrc/math/centered_rows.h",
        "(eps * top_mean2 * inverse - 1.0)",
        "(eps * top_mean2 * inverse + 1.0)",
        ("tests/test_head_metrics_backward.py", "--emulate-all", "-k", "cuda"),
    ),
    Plant(
        "CUDA: ignored rows counted in a small head's mean",
        "csrc/cuda/head_measure.cu",
        "return label == Label::kIgnored ? 0.0 : kNan;",
        "return label == Label::kIgnored ? 1.0 : kNan;",
        _CUDA_BACKWARD,
    ),
    Plant(
        "CUDA: last row lost in a small head's sums",
        "csrc/cuda/head_measure_backward.cu",
        "to = (warp + 1) * call.N / kSumWarps;",
        "to = (warp + 1) * (call.N - 1) / kSumWarps;",
        _CUDA_BACKWARD,
    ),
    Plant(
        "CUDA: the label's own row forgotten in a norm's gradient",
        "csrc/cuda/head_measure_backward.cu",
        "if (j == anchor) along = -totals.at[1];",
        "if (j == anchor) along = 0.0;",
        _CUDA_BACKWARD,
    ),
)
_CHECK = ("tests/test_check.py", "-k", "every_cpu_target or (emulated and 1500)")
"""The battery of flatcore.check, over every CPU target and over emulated threads."""
# what the copy without a change must pass before a red one means anything
_CONTROL = (*_VALUES, "tests/test_shapes.py", "tests/test_edges.py", "tests/test_row_norms.py",
            "tests/test_unmasked_cross_entropy.py")  # fmt: skip


def _run(arguments: list[str], copy: Path, site: Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH=str(site), PYTHONDONTWRITEBYTECODE="1")
    return subprocess.run(arguments, cwd=copy, env=environment, capture_output=True, text=True, check=False)


def _build(copy: Path, site: Path, build: Path) -> str | None:
    """Build the copy into ``site``; return what went wrong."""
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    command += ["--disable-pip-version-check", f"--config-settings=build-dir={build}", "--target", str(site), "."]
    result = _run(command, copy, site)
    if result.returncode:
        return (result.stdout + result.stderr)[-2000:]
    # the tests must meet this build, not one installed elsewhere
    result = _run([sys.executable, "-c", "import flatcore; print(flatcore.show_config()['extension'])"], copy, site)
    where = result.stdout.strip()
    return None if where.startswith(str(site)) else f"the tests would load {where or result.stderr}"


def _test(copy: Path, site: Path, tests: tuple[str, ...]) -> tuple[str, str]:
    """Run a part of the suite: green, red or broken, and the line that says why."""
    result = _run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--exhaustive", *tests], copy, site
    )
    lines = result.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if result.returncode == 0:
        return "green", lines[-1]
    if result.returncode == 1 and failed:
        return "red", failed[0].split(" - ")[0].removeprefix("FAILED ")
    if result.returncode < 0:
        return "red", f"killed by signal {-result.returncode}"
    return "broken", "\n".join([*lines[-5:], result.stderr[-500:]])


def main(words: list[str]) -> int:
    """Plant, build, test, report."""
    judges = None
    if "--check" in words:
        words, judges = [word for word in words if word != "--check"], _CHECK
    plants = [plant for plant in PLANTS if not words or any(word in plant.name for word in words)]
    right = True
    with tempfile.TemporaryDirectory(prefix="flatcore-plant-") as temporary:
        copy, site, build = (Path(temporary) / name for name in ("checkout", "site", "build"))
        ignored = shutil.ignore_patterns(".git", "build", "__pycache__", ".*_cache", ".venv", "*.so")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for plant in [Plant("(nothing planted)", "", "", "", _CONTROL), *plants]:
            start, expected = time.monotonic(), "red" if plant.file else "green"
            source = copy / plant.file
            text = source.read_text() if plant.file else ""
            if plant.file and text.count(plant.old) != 1:
                outcome, detail = "no match", f"{text.count(plant.old)} places in {plant.file}, 1 wanted"
            else:
                if plant.file:
                    source.write_text(text.replace(plant.old, plant.new))
                problem = _build(copy, site, build)
                outcome, detail = ("not built", problem) if problem else _test(copy, site, judges or plant.tests)
                if plant.file:
                    source.write_text(text)
            right &= outcome == expected
            mark = "  " if outcome == expected else "!!"
            print(f"{mark} {plant.name:48s} {outcome:9s} {time.monotonic() - start:4.0f} s  {detail}", flush=True)
            if not plant.file and outcome != expected:
                print("The suite is not green without a change: nothing that follows would mean anything.")
                return 1
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
