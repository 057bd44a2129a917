#!/usr/bin/env bash
# What needs a GPU, without a network, in two calls of at most ten minutes each:
#
#   bash bench/gpu.sh verify [FOLDER]     build, flatcore's own check, tests, compute-sanitizer's four tools
#   bash bench/gpu.sh bench [FOLDER]      build, and the figures of python -m flatcore bench
#
# FOLDER (default: bench/results/gpu) gets build.log, verify.txt, check.log, tests.log, sanitizers.log; bench.txt, bench.json
# and bench.md: eight files at most. verify.txt and bench.txt say what ran, with card, driver, versions and commit, and how
# each step ended. Ends with 1 if a step failed; those after it run nevertheless, unless nothing was built.
# Pictures of the figures, on any machine: python -m flatcore bench draw FOLDER/bench.json
#
# Needs torch with CUDA, nvcc, pybind11, scikit-build-core, cmake, ninja, pytest, hypothesis, mpmath and rich; takes
# pytest-xdist and CuPy where they are. CUDAARCHS as usual; by default the architectures of the GPUs in the machine.
# FLATCORE_DEVICE=cpu rehearses both on the CPU: a build without CUDA, few tests, no sanitizer; its figures mean nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,7s/^# \?//p' "$0" >&2; exit 2; }
what=${1:-}
case $what in verify | bench) ;; *) usage ;; esac
[ $# -le 2 ] || usage
out=$(mkdir -p "${2:-bench/results/gpu}" && cd "${2:-bench/results/gpu}" && pwd) || exit 2
device=${FLATCORE_DEVICE:-cuda}
case $device in cuda) export FLATCORE_CUDA=ON ;; cpu) export FLATCORE_CUDA=OFF ;; *) usage ;; esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
summary=$out/$what.txt
failed=0

step() { # name, seconds, log, command...
    local name=$1 limit=$2 log=$3 start=$SECONDS rc=0
    shift 3
    printf '\n== %s\n' "$*" >> "$log"
    timeout -k 5 "$limit" "$@" >> "$log" 2>&1 || rc=$?
    [ $rc -eq 0 ] || failed=1
    printf '%-22s rc %3d  %4d s%s\n' "$name" $rc $((SECONDS - start)) "$([ $rc -ne 124 ] || echo ", cut off")" | tee -a "$summary"
    [ $rc -eq 0 ] || tail -n 5 "$log"
    return $rc
}

{
    date -u '+%Y-%m-%d %H:%M UTC'
    printf 'commit %s%s\n' "$(git rev-parse HEAD 2>&1 | tail -n 1)" "$([ -z "$(git status --porcelain 2>/dev/null)" ] || echo ', changed')"
    nvidia-smi --query-gpu=name,driver_version,compute_cap,clocks.sm,clocks.mem --format=csv,noheader 2>&1 || true
    python3 -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)'
    nvcc --version 2>&1 | tail -n 2 | head -n 1
} | tee "$summary"

: > "$out/build.log"
# beside this tree's Python, which comes first: the package's path has both
if ! step build 150 "$out/build.log" python3 -m pip install --no-build-isolation --no-deps --no-index --upgrade \
    --target "$scratch/site" -v .; then
    exit 1
fi
export PYTHONPATH=$PWD:$scratch/site${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
python3 -c 'import flatcore; print(flatcore.cuda.show_config())' 2>&1 | tee -a "$summary"

if [ "$what" = bench ]; then
    options=(--device cuda --seconds 400 --no-pictures)
    [ "$device" = cuda ] || options=(--device cpu --quick --no-pictures --works W1-bfloat16,W6-backward)
    : > "$scratch/bench.log"
    step bench 430 "$scratch/bench.log" python3 -m flatcore bench "${options[@]}" --out "$out/bench.json"
    [ $failed -eq 0 ] || cat "$scratch/bench.log" >> "$summary"
    exit $failed
fi

: > "$out/check.log"
step check 60 "$out/check.log" python3 -m flatcore check --device "$device"

: > "$out/tests.log"
workers=()
python3 -c 'import xdist' 2> /dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))" --dist worksteal)
required=(--require-cuda --exhaustive)
files=(tests/test_cuda.py tests/test_cuda_devices.py tests/test_cupy.py tests/test_row_norms.py tests/test_array_layouts.py
    tests/test_unmasked_cross_entropy.py tests/test_edges.py tests/test_shapes.py tests/test_head_metrics_backward.py
    tests/test_backward_operators.py tests/test_properties.py tests/test_head_metrics.py)
[ "$device" = cuda ] || required=() files=(tests/test_cuda.py tests/test_cupy.py)
step tests 220 "$out/tests.log" python3 -m pytest -q -p no:cacheprovider "${workers[@]}" "${required[@]}" -k 'cuda or cupy' "${files[@]}"

: > "$out/sanitizers.log"
if [ "$device" = cpu ]; then
    step calls 60 "$out/sanitizers.log" python3 bench/gpu_selection.py --device cpu
elif command -v compute-sanitizer > /dev/null; then
    only=()
    compute-sanitizer --help 2>&1 | grep -q -- --kernel-regex && only=(--kernel-regex kns=flatcore)
    # without torch's cache a byte beyond a buffer is beyond an allocation
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    step memcheck 90 "$out/sanitizers.log" compute-sanitizer --tool memcheck --error-exitcode 9 "${only[@]}" \
        python3 bench/gpu_selection.py
    for tool in racecheck initcheck synccheck; do
        these=("${only[@]}")
        [ $tool != initcheck ] || these=() # it has to see what torch's kernels write
        step $tool 25 "$out/sanitizers.log" compute-sanitizer --tool $tool --error-exitcode 9 "${these[@]}" \
            python3 bench/gpu_selection.py --dtypes bfloat16,float32
    done
else
    echo "compute-sanitizer: not found" | tee -a "$summary"
    failed=1
fi
exit $failed
