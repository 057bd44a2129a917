#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most ten minutes, without a network: build, tests, sanitizers, figures.
#
#   bash bench/gpu.sh [FOLDER]      (default: bench/results/gpu)
#
# FOLDER gets build.log, tests.log, sanitizer-*.log, gpu.json, gpu.md and summary.txt. Ends with 1 if a step failed; the
# steps after it run nevertheless. Needs torch with CUDA, nvcc, pybind11, scikit-build-core, cmake, ninja, pytest,
# hypothesis and mpmath in the environment. CUDAARCHS as usual; by default the architecture of the GPU in the machine.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-bench/results/gpu}" && cd "${1:-bench/results/gpu}" && pwd)
export FLATCORE_CUDA=ON PYTHONPATH=$PWD
failed=0
: > "$out/summary.txt"

step() { # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS rc=0
    shift 2
    timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1 || rc=$?
    [ $rc -eq 0 ] || failed=1
    printf '%-24s rc %3d  %4d s\n' "$name" $rc $((SECONDS - start)) | tee -a "$out/summary.txt"
    tail -n 3 "$out/$name.log"
}

step build 80 pip install --no-build-isolation --no-deps --target "$out/site" --upgrade .
cp "$out"/site/flatcore/_core*.so flatcore/ 2>> "$out/build.log" || failed=1 # this tree's Python, the built module
trap 'rm -rf flatcore/_core*.so "$out/site"' EXIT

step tests 180 python -m pytest -q -p no:cacheprovider --require-cuda --exhaustive -k cuda tests/test_cuda.py tests/test_row_norms.py \
    tests/test_unmasked_cross_entropy.py tests/test_edges.py tests/test_shapes.py tests/test_head_metrics_backward.py \
    tests/test_backward_operators.py tests/test_properties.py tests/test_head_metrics.py

if command -v compute-sanitizer > /dev/null; then
    # without torch's cache a byte beyond a buffer is beyond an allocation
    for tool in memcheck racecheck initcheck synccheck; do
        only=(--kernel-regex kns=flatcore)
        [ $tool != initcheck ] || only=() # it has to see what torch's kernels write
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer-$tool" 30 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "${only[@]}" python bench/gpu_selection.py
    done
else
    echo "compute-sanitizer: not found" | tee -a "$out/summary.txt"
    failed=1
fi

step gpu 190 python bench/gpu.py --out "$out/gpu.json"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv >> "$out/summary.txt" 2>&1
exit $failed
