#!/usr/bin/env bash
# Build, compile, test, sanitize and measure on a machine with a CUDA GPU; prints the table of the
# steps and that of the targets.
#
#   ci/gpu.sh                        every step, with the python on PATH, which must have a CUDA
#                                    torch, triton, transformers, peft, pytest
#   ci/gpu.sh tests kernels          only these steps
#   PYTHON=.venv/bin/python OUT=build/gpu LOGS=build/gpu-logs ci/gpu.sh
#   LIMIT_TESTS=600 LIMIT_BENCH=900 ci/gpu.sh
#
# Where a command may not last long, four calls, each of which ends within nine minutes:
#
#   ci/gpu.sh build aot tests kernels quantised
#   ci/gpu.sh build memcheck racecheck
#   ci/gpu.sh build bench targets
#   ci/gpu.sh build bench_model
#
# (Later calls can leave build out where what the first one built is still there.) Each step has a
# time limit, LIMIT_<STEP> seconds, and what it does not use is added to the next one's. A step that
# runs over is stopped, noted as failed in the table, and the next one goes on; what it measured
# until then is kept.
#
# Steps: build (the extension), aot (every kernel for this GPU's architecture: no spills; for the
# others no GPU is needed), tests (pytest -m gpu), kernels (the kernels' own tests, compiled),
# quantised (bitsandbytes, where it is installed), memcheck, racecheck (compute-sanitizer over the
# Triton and CUDA kernels), bench (the cases that benchmarks/targets.toml asks for), targets (what
# bench left in $OUT against benchmarks/targets.toml, row by row), bench_model (whole passes). Only
# by name, since it takes an hour or so: bench_full (every operator, model, shape and rank).
#
# nvcc and compute-sanitizer are taken from $CUDA_HOME/bin, PATH or /usr/local/cuda/bin.
#
# $OUT gets few files: the results as JSON, summary.json with the tables in it, and logs.tar.gz with
# everything from $LOGS, renewed after every step.
#
# Exit code 0 only if the build and every test passed and every target holds. A sanitizer that is
# not installed or that the driver refuses is reported as such and does not fail the run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
LOGS=${LOGS:-build/gpu-logs}
# Most cores: compiling is what the tests wait for. One is left to the GPU's driver.
WORKERS=${WORKERS:-$(($(nproc) > 2 ? $(nproc) - 1 : 1))}
PATH="${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin"
mkdir -p "$OUT" "$LOGS"
results="$LOGS/steps.tsv"
: >"$results"
wanted=" ${*:-build aot tests kernels quantised memcheck racecheck bench targets bench_model} "

# Seconds, on an H100 with 16 cores: build 25, bench 140, bench_model 100; beside one another, on four
# or five workers each, tests 130 for two thirds and kernels 170 for nearly all of them, memcheck and
# racecheck 195 and 200 to their end. Chosen so that the steps of each call above sum up to less than
# 540, with room for one that has to be killed and for the summary. aot is 1,200 rows or so of 0.4 to
# 1.2 seconds of a core each.
declare -A limits=(
    [build]=120 [aot]=100 [tests]=120 [kernels]=160 [quantised]=20 [memcheck]=205 [racecheck]=205
    [bench]=380 [targets]=20 [bench_model]=400 [bench_full]=7200
)
for name in "${!limits[@]}"; do
    variable="LIMIT_${name^^}"
    limits[$name]=${!variable:-${limits[$name]}}
    [[ ${limits[$name]} =~ ^[1-9][0-9]*$ ]] || {
        echo "ci/gpu.sh: $variable must be a whole number of seconds, not '${limits[$name]}'."
        exit 1
    }
done
granted=0

# One file for all logs. Whole at any time: what collects them may come at any time.
archive() { tar -C "$LOGS" -czf "$LOGS.part" . && mv "$LOGS.part" "$OUT/logs.tar.gz"; }

# Started in the background, a shell and all that it starts ignore SIGINT, unless told otherwise.
hears_int=()
env --default-signal=INT true 2>/dev/null && hears_int=(env --default-signal=INT)

# step NAME COMMAND...: runs it if it is wanted, logs it, notes how it ended and how long it took.
step() {
    local name=$1 start=$SECONDS left status
    shift
    [[ $wanted == *" $name "* ]] || return 0
    # Of an earlier run: this one may be stopped before it writes its own.
    rm -f "$LOGS/$name.xml"
    granted=$((granted + limits[$name]))
    # Never 0, which is no limit to timeout.
    left=$((granted - SECONDS))
    [ "$left" -ge 5 ] || left=5
    # Interrupted as by Ctrl-C: pytest then still writes what it has.
    timeout --signal=INT --kill-after=20 "$left" "${hears_int[@]}" bash -c '"$@"' step "$@" \
        >"$LOGS/$name.log" 2>&1
    status=$?
    if [ "$status" -eq 124 ] || { [ "$status" -eq 137 ] && [ $((SECONDS - start)) -ge "$left" ]; }; then
        echo "ci/gpu.sh: stopped after $left s; LIMIT_${name^^} grants more" >>"$LOGS/$name.log"
        status="FAILED (stopped after $left s)"
    fi
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$results"
    # The table of the targets is printed at the end in any case.
    [ "$status" = 0 ] || [ "$name" = targets ] || tail -n 25 "$LOGS/$name.log"
    archive
}

# pytest in several processes where pytest-xdist is there.
parallel() { "$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n $WORKERS"; }
run_pytest() { "$PYTHON" -m pytest -p no:cacheprovider "$@"; }

build() {
    UCAN_FAST_REQUIRE_EXTENSION=1 "$PYTHON" -m pip install --no-deps --no-build-isolation -e .
}
# What the kernels ship for, of the GPU's capability; every one of them for another GPU.
architecture() {
    case $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1) in
    8.*) echo "--arch 80" ;;
    9.*) echo "--arch 90" ;;
    10.*) echo "--arch 100" ;;
    esac
}
# shellcheck disable=SC2046  # two words on purpose
aot() { "$PYTHON" -m ucan_fast.kernels.aot $(architecture) --json "$OUT/aot.json"; }
# shellcheck disable=SC2046
gpu_tests() { run_pytest $(parallel) -m gpu tests --junitxml="$LOGS/tests.xml"; }
# The gate's own tests need no GPU, and the step aot has asked what they ask.
# shellcheck disable=SC2046
kernel_tests() {
    run_pytest $(parallel) tests/kernels tests/test_triton_path.py \
        --ignore=tests/kernels/test_aot.py --junitxml="$LOGS/kernels.xml"
}
quantised() { run_pytest tests/test_quantised.py --junitxml="$LOGS/quantised.xml"; }
bench() {
    run_pytest benchmarks/kernels --profile full --targets --json "$OUT/bench-kernels.json"
}
# The rest of the suite is a CPU's: its targets are. Data that is not at hand is not waited for.
bench_model() {
    PIP_NO_INDEX=${PIP_NO_INDEX:-1} "$PYTHON" -m benchmarks.model --profile quick --only collect \
        --json "$OUT/bench-model.json"
}
bench_full() { run_pytest benchmarks/kernels --profile full --json "$OUT/bench-full.json"; }
targets() {
    local files
    files=$(find "$OUT" -maxdepth 1 -name 'bench-*.json')
    [ -n "$files" ] || {
        echo "no bench-*.json in $OUT: run the step bench first"
        return 1
    }
    # shellcheck disable=SC2086  # several words on purpose
    "$PYTHON" -m benchmarks.targets $files --device cuda
}
sanitize() {
    # Small shapes of every kernel: the tools slow them a hundred times, racecheck the most.
    local chosen="attenuate or (small and not 4096 and not 512)" part pids=() status=0
    # Not local: the trap outlives the function.
    parts=()
    if [ "$1" = memcheck ]; then
        chosen="attenuate or (small and not 4096)"
        # torch's caching allocator cuts tensors out of blocks of megabytes, in which memcheck does
        # not see an overrun: here every tensor is an allocation of its own.
        export PYTORCH_NO_CUDA_MEMORY_CACHING=1
        chosen="not graph and ($chosen)"
    fi
    # Three side by side: a core each is what they wait for. Their logs one after the other, also
    # where the time was up.
    for part in "kernels" "fused" "not kernels and not fused"; do
        parts+=("$LOGS/$1.part-${#parts[@]}")
    done
    trap 'cat "${parts[@]}" 2>/dev/null; rm -f "${parts[@]}"' EXIT
    for part in "kernels" "fused" "not kernels and not fused"; do
        env --default-signal=INT compute-sanitizer --tool "$1" --error-exitcode 9 \
            --target-processes application-only \
            "$PYTHON" -m pytest -p no:cacheprovider -m gpu tests/test_gpu.py \
            -k "($chosen) and ($part)" >"${parts[${#pids[@]}]}" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || status=$?
    done
    return "$status"
}
# timeout starts them in a shell of their own.
export PYTHON OUT LOGS WORKERS
export -f build aot architecture parallel run_pytest gpu_tests kernel_tests quantised sanitize
export -f bench bench_model bench_full targets

command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || {
    echo "ci/gpu.sh: no NVIDIA GPU here (nvidia-smi failed)."
    exit 1
}
[ -n "${BENCH_COMMIT:-}" ] || git rev-parse -q HEAD >/dev/null 2>&1 ||
    echo "ci/gpu.sh: warning: neither .git nor BENCH_COMMIT: the results will not name their commit"
step build build
step aot aot
step tests gpu_tests
step kernels kernel_tests
step quantised quantised
for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
        [[ $tool != memcheck || $wanted != *" memcheck "* ]] ||
            echo "memcheck leaves out the tests of CUDA graphs: it runs without torch's caching" \
                "allocator, which a capture needs"
        step "$tool" sanitize "$tool"
    elif [[ $wanted == *" $tool "* ]]; then
        printf '%s\tnot installed\t0\n' "$tool" >>"$results"
        archive
    fi
done
step bench bench
step bench_full bench_full
step targets targets
# Last: no target of a GPU waits for it.
step bench_model bench_model

"$PYTHON" ci/gpu_summary.py "$OUT" "$LOGS"
