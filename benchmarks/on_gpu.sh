#!/usr/bin/env bash
# All that only a machine with a GPU can show, in one call: the kernels' self-check, tests,
# sanitizers and timings, training steps that wait for nobody, steps per second with torch.compile
# and CUDA graphs, poses per second, and a training with the preset `paper`.
#   benchmarks/on_gpu.sh [FOLDER]    results and logs go to FOLDER (default benchmarks/results)
#   LIMIT=1200                       seconds for the training; call again, and it goes on. It needs
#                                    data/demo, or the network for prepare_data.py to make it
# It goes on after a failure, so that one call on a borrowed machine shows all of them. Training in
# bfloat16 is not among them: steps.py times it, but that quality holds is not shown yet.
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
train_paper() {  # to its end, or for LIMIT seconds
    timeout -k 60 "${LIMIT:-1200}" \
        python train.py --preset paper --name on_gpu --device cuda --resume
    local ended=$?
    [ $ended -eq 0 ] || [ $ended -eq 124 ]
}
export HIPART_KERNELS=cuda  # a build that fails must fail, not fall back
sanitize=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1
          compute-sanitizer --target-processes all --error-exitcode 1)
step self_check python -m kernels
step tests python -m pytest tests/test_kernels.py tests/test_cuda_source.py
step tests_of_steps python -m pytest tests/test_hipart.py -k "waits_for_the_gpu"
step memcheck "${sanitize[@]}" --tool memcheck python -m kernels
step racecheck "${sanitize[@]}" --tool racecheck python -m kernels
step benchmark python benchmarks/kernels.py --device cuda --results "$out"
step steps python benchmarks/steps.py --device cuda --results "$out"
step generate python benchmarks/generate.py --device cuda --seconds 5 --results "$out"
step train_paper train_paper
exit $status
