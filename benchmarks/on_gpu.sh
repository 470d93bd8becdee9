#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, in one call: self-check, tests, sanitizers, timings.
#   benchmarks/on_gpu.sh [FOLDER]      results and logs go to FOLDER (default benchmarks/results)
# It goes on after a failure, so that one call on a borrowed machine shows all of them.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
status=0
step() {
    local name=$1
    shift
    if "$@" > "$out/$name.log" 2>&1; then
        echo "passed  $name"
    else
        echo "FAILED  $name: see $out/$name.log"
        status=1
    fi
}
export HIPART_KERNELS=cuda  # a build that fails must fail, not fall back
sanitize=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1
          compute-sanitizer --target-processes all --error-exitcode 1)
step self_check python -m kernels
step tests python -m pytest tests/test_kernels.py tests/test_cuda_source.py
step memcheck "${sanitize[@]}" --tool memcheck python -m kernels
step racecheck "${sanitize[@]}" --tool racecheck python -m kernels
step benchmark python benchmarks/kernels.py --device cuda --results "$out"
exit $status
