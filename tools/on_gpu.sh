#!/usr/bin/env bash
# What only a GPU can tell, one stage at a time: results and one archive of logs in a folder, a summary on stdout.
#
#   tools/on_gpu.sh STAGE OUT [SECONDS [ARGUMENT...]]
#
#   test       the kernels' tests, then every other one that needs a GPU, a process for each CPU; pytest's arguments
#   sanitize   the kernels' tests under compute-sanitizer: memcheck, racecheck, initcheck, synccheck; pytest's arguments
#   tune       the table of this GPU, in place and copied to OUT; arguments of `python -m resnet_fused tune`
#   bench      OUT/benchmark.json; pytest's arguments (default: benchmarks -m headline)
#   profile    a Bottleneck of ResNet-50, forward and backward, under ncu, then a training step under torch.profiler;
#              arguments of `python -m resnet_fused profile`
#   converge   OUT/convergence: does a fused network train as the eager one does; arguments of examples/convergence.py
#              (default: --size 32)
#
# A stage ends after SECONDS (default 500) and half a minute at most; what it has by then is kept. The exit code is that
# of its worst command. RESNET_FUSED_BACKEND=cuda,triton,aten has bench, profile and converge run kernels that are no default yet.
# Plans, no default yet either, are on; RESNET_FUSED_PLANS=0 turns them off.
# PYTHON names the interpreter (default: python3). Compiled kernels stay in build/triton for the stages that follow. Wheels in
# build/wheels are installed first: pytest-xdist, say, without which the tests take one process and many times as long.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

stage="${1-}" out="${2-}" limit="${3-500}"
if [[ ! "$stage" =~ ^(test|sanitize|tune|bench|profile|converge)$ || -z "$out" || ! "$limit" =~ ^[1-9][0-9]*$ ]]; then
    echo "on_gpu.sh: expected test, sanitize, tune, bench, profile or converge, a folder and seconds, got: $*" >&2
    exit 2
fi
arguments=("${@:4}")
end=$((SECONDS + limit))
python="${PYTHON:-python3}"
mkdir -p "$out" && out="$(realpath "$out")" || exit 2
logs="$(mktemp -d)"
trap 'tar -czf "$out/$stage.tar.gz" -C "$logs" . && rm -r "$logs"' EXIT
export RESNET_FUSED_PLANS="${RESNET_FUSED_PLANS:-1}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$PWD/build/triton}" COLUMNS=180

left() { # the share 1/$1 of the seconds that are left
    local seconds=$(((end - SECONDS) / ${1:-1}))
    echo $((seconds > 1 ? seconds : 1))
}

within() { # SECONDS COMMAND...: interrupted in time, so that it writes what it has
    timeout --signal=INT --kill-after=25 "$@"
}

worst=0
note() { # CODE WHAT: into the exit code, and a line if it is no success
    [[ $1 == 0 ]] && return
    [[ $1 == 124 || $1 == 137 ]] && echo "$2: out of time" || echo "$2: exit code $1"
    (($1 > worst)) && worst=$1
}

shopt -s nullglob
wheels=(build/wheels/*.whl)
((${#wheels[@]} == 0)) || "$python" -m pip install --quiet --no-index --no-deps "${wheels[@]}" > "$logs/wheels.log" 2>&1 || note $? wheels

parallel=()
"$python" -c "import xdist" 2> /dev/null && parallel=(-n "$(nproc)" --dist worksteal)

tests() { # NAME SECONDS [WRAPPER... --] ARGUMENT...: pytest, and a summary of what failed
    local name="$1" seconds="$2" log="$logs/$1.log" wrapper=()
    shift 2
    if [[ $1 == compute-sanitizer ]]; then
        while [[ $1 != -- ]]; do wrapper+=("$1") && shift; done
        shift
    fi
    OMP_NUM_THREADS=1 within "$seconds" "${wrapper[@]}" "$python" -m pytest -q -p no:cacheprovider -rfE --tb=short \
        --durations=15 "${parallel[@]}" "$@" "${arguments[@]}" > "$log" 2>&1
    local code=$?
    grep -E "^(FAILED|ERROR) " "$log" | sed -E "s/^[A-Z]+ ([^ []*).*/\1/" | sort | uniq -c | sort -rn | head -n 20
    grep -E "^(FAILED|ERROR) |^breaks the device: " "$log" | cut -c 1-240 | head -n 15
    echo "$name: $(tail -n 1 "$log")"
    [[ $code == 5 ]] || note $code "$name" # 5: ARGUMENT... left no test
}

extension() { # SECONDS: the CUDA extension for this GPU, which takes a minute the first time
    within "$1" "$python" -m pip install --no-build-isolation --no-deps -e . > "$logs/install.log" 2>&1
}

wrappers() { # SECONDS: what kernels use of PTX, by the tests that the emulator of it passes
    local folder=build/gpu options=(-DCMAKE_CUDA_ARCHITECTURES=native -DRESNET_FUSED_BUILD_TESTS=ON)
    options+=("-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" "-DPython_EXECUTABLE=$(command -v "$python")")
    {
        within "$1" cmake -S . -B "$folder" -G Ninja "${options[@]}" \
            && within "$1" cmake --build "$folder" --target test_gpu_mma test_gpu_sm90 \
            && within "$1" ctest --test-dir "$folder" -R gpu --output-on-failure
    } > "$logs/wrappers.log" 2>&1
}

mapfile -t cuda < <(grep -l "cuda_kernels" tests/test_*.py)
mapfile -t kernels < <(grep -l "import.* DEVICE\|^from kernel_helpers" tests/test_*.py | grep -v compiled | grep -vxF "$(printf "%s\n" "${cuda[@]}")")
mapfile -t others < <(grep -lE "mark\.gpu|DEVICES" tests/test_*.py | grep -vxF "$(printf "%s\n" "${kernels[@]}" "${cuda[@]}")")

"$python" -m resnet_fused info > "$logs/info.txt" 2>&1 || { tail -n 3 "$logs/info.txt"; exit 1; }
nvidia-smi > "$logs/nvidia-smi.txt" 2>&1

case "$stage" in
test)
    (extension "$(left 2)" && wrappers "$(left 2)") &
    tests kernels "$(($(left) * 3 / 5))" "${kernels[@]}"
    wait $!
    note $? "the CUDA extension, or its wrappers' tests"
    tests cuda "$(($(left) * 3 / 5))" "${cuda[@]}"
    tests others "$(left)" -m gpu "${others[@]}"
    ;;
sanitize)
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else an access beyond a tensor ends in a neighbour's memory, unseen
    extension "$(left 4)"
    note $? "the CUDA extension"
    shares=4
    for tool in memcheck racecheck initcheck synccheck; do
        tests "$tool" "$(left $((shares--)))" compute-sanitizer --tool "$tool" --target-processes all \
            --error-exitcode 99 --log-file "$logs/$tool.%p.txt" -- -k "not graph" "${cuda[@]}" "${kernels[@]}"
        grep -hE "Invalid|Race reported|Uninitialized|Misaligned|Barrier error|Divergent|ERROR SUMMARY: [^0]" "$logs/$tool".*.txt 2> /dev/null \
            | cut -c 1-160 | sort | uniq -c | sort -rn | head -n 12
    done
    ;;
tune)
    extension "$(left 4)"
    note $? "the CUDA extension"
    budget=$(($(left) - 30))
    within "$(left)" "$python" -m resnet_fused tune --jobs "$(nproc)" --budget $((budget > 1 ? budget : 1)) "${arguments[@]}" \
        > "$logs/tune.log" 2>&1
    note $? tune
    cp resnet_fused/tuning/tables/*.json "$out" 2> /dev/null
    grep -E ": .*(is wrong|Error)" "$logs/tune.log" | cut -c 1-200 | head -n 25
    tail -n 30 "$logs/tune.log" | cut -c 1-200
    ;;
bench)
    ((${#arguments[@]})) || arguments=(benchmarks -m headline)
    sm="$("$python" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))')"
    within "$(left 3)" "$python" tools/compile_kernels.py --models resnet50 --targets "$sm" --jobs "$(nproc)" \
        > "$logs/compile.log" 2>&1
    echo "kernels compiled ahead: $(tail -n 1 "$logs/compile.log")"
    budget=$(($(left) - 60))
    within "$(left)" "$python" -m pytest --benchmark --benchmark-budget $((budget > 1 ? budget : 1)) \
        --benchmark-json "$out/benchmark.json" -p no:cacheprovider -rfE --tb=short "${arguments[@]}" > "$logs/bench.log" 2>&1
    note $? bench
    grep -E "^(FAILED|ERROR) " "$logs/bench.log" | cut -c 1-240 | head -n 15
    "$python" -m resnet_fused report --show "$out/benchmark.json" > "$logs/summary.txt" 2>&1
    head -c 9000 "$logs/summary.txt"
    tail -n 1 "$logs/bench.log"
    ;;
profile)
    step=(profile resnet50 --mode train --dtype bf16)
    within "$(left 2)" "$python" -m resnet_fused "${step[@]}" --block layer1.1 --tool ncu --batch 64 \
        --out "$logs/ncu" "${arguments[@]}" > "$logs/ncu.log" 2>&1
    note $? ncu
    tail -c 5500 "$logs/ncu.log"
    # Without the filter for the block it takes longer, and says more of what went wrong.
    [[ -s "$logs/ncu/kernels.csv" ]] || within "$(left 2)" "$python" -m resnet_fused "${step[@]}" --tool ncu --batch 32 \
        --out "$logs/ncu_step" "${arguments[@]}" > "$logs/ncu_step.log" 2>&1
    within "$(left)" "$python" -m resnet_fused "${step[@]}" --tool torch --batch 256 --out "$logs/torch" \
        "${arguments[@]}" > "$logs/torch.log" 2>&1
    note $? torch
    tail -c 5500 "$logs/torch.log"
    ;;
converge)
    ((${#arguments[@]})) || arguments=(--size 32)
    extension "$(left 4)"
    note $? "the CUDA extension"
    within "$(left)" "$python" examples/convergence.py --device cuda --out "$out/convergence" "${arguments[@]}" \
        > "$logs/converge.log" 2>&1
    note $? converge
    tail -n 40 "$logs/converge.log"
    ;;
esac
exit $worst
