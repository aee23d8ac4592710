#!/usr/bin/env bash
# What only a GPU can tell, one stage at a time; logs and results go to a folder, a summary to stdout.
#
#   tools/on_gpu.sh STAGE OUT [SECONDS]
#
#   test       every test that runs on the GPU, several processes at once (kernels are compiled as they are met)
#   sanitize   the kernels' tests under compute-sanitizer: memcheck, racecheck, initcheck
#   tune       resnet_fused/tuning/tables for this GPU, of ResNet-50, 18 and 34
#   bench      benchmarks/, raw pytest-benchmark JSON
#   profile    one Bottleneck of a ResNet-50, forward and backward, under ncu; a whole training step under torch's profiler
#
# SECONDS ends a stage in time (default 540); what it has by then is kept. PYTHON names the interpreter (default python3);
# the package is installed into it, without its dependencies.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage="${1:?stage: test, sanitize, tune, bench or profile}"
out="${2:?folder for logs and results}"
limit="${3:-540}"
python="${PYTHON:-python3}"
mkdir -p "$out"
out="$(realpath "$out")"
export OMP_NUM_THREADS=2 PYTHONPATH="$PWD" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$PWD/build/triton}"

"$python" -m pip install --quiet --no-build-isolation --no-deps -e . > "$out/install.log" 2>&1 || { tail "$out/install.log"; exit 1; }
"$python" -m resnet_fused info > "$out/info.txt" 2>&1
nvidia-smi > "$out/nvidia-smi.txt" 2>&1

# Each line is one pytest process: a name and its arguments.
suites() {
    local file
    for file in tests/test_kernels_*.py; do
        case "$file" in
        *compiled.py) ;;
        *conv1x1.py)
            for op in fprop infer dgrad; do echo "conv1x1_$op $file -k conv1x1_$op"; done
            echo "conv1x1_rest $file -k 'not conv1x1_fprop and not conv1x1_infer and not conv1x1_dgrad'" ;;
        *) file="${file#tests/}"; echo "${file%.py} tests/$file" ;;
        esac
    done
    [[ "${1:-}" == kernels ]] && return
    for op in conv1x1 conv3x3 bn_ stem; do echo "ops_$op tests/test_ops.py -m gpu -k $op"; done
    for file in $(grep -lE "mark.gpu|DEVICES" tests/test_*.py | grep -v -e test_ops -e test_kernels); do
        echo "$(basename "$file" .py) $file -m gpu"
    done
}

run_suites() { # wrapper command..., suites on stdin
    local status=0
    xargs -d '\n' -P "$(nproc)" -I{} bash -c '
        name=$(cut -d" " -f1 <<< "{}"); arguments=$(cut -d" " -f2- <<< "{}")
        eval timeout '"$limit"' '"$*"' '"$python"' -m pytest -q -p no:cacheprovider $arguments > "'"$out"'/$name.log" 2>&1
        code=$?
        [[ $code == 0 || $code == 5 ]] && tail -n 1 "'"$out"'/$name.log" | sed "s/^/$name: /" \
            || { echo "FAILED ($code) $name:"; grep -E "^(FAILED|ERROR)|^E  |=====.*(ERROR|error)" "'"$out"'/$name.log" | sort | uniq -c | sort -rn | head -n 12; exit 1; }
    ' || status=1
    return $status
}

case "$stage" in
test) suites | run_suites ;;
sanitize)
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck initcheck; do
        echo "== $tool"
        suites kernels | sed "s/^/${tool}_/" | run_suites compute-sanitizer --tool "$tool" --error-exitcode 99 --target-processes all
    done ;;
tune)
    timeout "$((limit + 20))" "$python" -m resnet_fused tune --model resnet50 --model resnet18 --model resnet34 --jobs "$(nproc)" \
        --budget "$limit" --out "$out/table.json" 2>&1 | tee "$out/tune.log" | tail -n 60 ;;
bench)
    "$python" -m pytest --benchmark benchmarks --benchmark-budget "$limit" --benchmark-json "$out/benchmark.json" ${ARGS:-} 2>&1 \
        | tee "$out/bench.log" | tail -n 80 ;;
profile)
    timeout "$limit" "$python" -m resnet_fused profile resnet50 --block layer1.1 --mode train --tool ncu --batch 64 --dtype bf16 \
        --out "$out/ncu" 2>&1 | tee "$out/ncu.log" | tail -n 60
    timeout "$limit" "$python" -m resnet_fused profile resnet50 --mode train --tool torch --batch 256 --dtype bf16 \
        --out "$out/torch" 2>&1 | tee "$out/torch.log" | tail -n 60 ;;
*) echo "stage: expected test, sanitize, tune, bench or profile, got $stage" >&2; exit 2 ;;
esac
