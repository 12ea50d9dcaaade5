#!/usr/bin/env bash
# Build, compile, test, sanitize and measure on a machine with a CUDA GPU; prints the table of the
# steps and that of the targets, leaves JSON in $OUT.
#
#   ci/gpu.sh                        every step, with the python on PATH, which must have a CUDA
#                                    torch, triton, transformers, peft, pytest; nvcc on PATH
#   ci/gpu.sh build tests            only these steps
#   PYTHON=.venv/bin/python OUT=build/gpu ci/gpu.sh
#   LIMIT_TESTS=600 LIMIT_BENCH=900 ci/gpu.sh
#
# Each step has a time limit, LIMIT_<STEP> seconds, and what it does not use is added to the next
# one's: by default everything ends within ten minutes. A step that runs over is stopped, noted as
# failed in the table, and the next one goes on; what it measured until then is kept.
#
# Steps: build (the extension), aot (every kernel for sm_80, sm_90 and sm_100: no spills), tests
# (pytest -m gpu), kernels (the kernels' own tests, compiled), quantised (bitsandbytes, where it is
# installed), memcheck, racecheck (compute-sanitizer over the Triton and CUDA kernels), bench (the
# cases that benchmarks/targets.toml asks for), bench_model (whole passes), targets (what bench left
# in $OUT against benchmarks/targets.toml, row by row). Only by name, since it takes an hour or so:
# bench_full (every operator, model, shape and rank).
#
# Exit code 0 only if the build and every test passed and every target holds. A sanitizer that is
# not installed or that the driver refuses is reported as such and does not fail the run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
WORKERS=${WORKERS:-4}
mkdir -p "$OUT"
results="$OUT/steps.tsv"
: >"$results"
wanted=" ${*:-build aot tests kernels quantised memcheck racecheck bench bench_model targets} "

# Seconds. Not measured on a GPU yet: chosen so that the default steps sum up to less than 600, with
# room for one that has to be killed and for the summary. aot is 2,156 rows of 0.4 to 1.2 seconds of
# a core, for 16 cores; what it leaves goes to the steps after it.
declare -A limits=(
    [build]=70 [aot]=150 [tests]=40 [kernels]=50 [quantised]=15 [memcheck]=30 [racecheck]=30
    [bench]=105 [bench_model]=50 [bench_full]=7200 [targets]=10
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

# step NAME COMMAND...: runs it if it is wanted, logs it, notes how it ended and how long it took.
step() {
    local name=$1 start=$SECONDS left status
    shift
    [[ $wanted == *" $name "* ]] || return 0
    # Of an earlier run: this one may be stopped before it writes its own.
    rm -f "$OUT/$name.xml"
    granted=$((granted + limits[$name]))
    # Never 0, which is no limit to timeout.
    left=$((granted - SECONDS))
    [ "$left" -ge 5 ] || left=5
    # Interrupted as by Ctrl-C: pytest then still writes what it has.
    timeout --signal=INT --kill-after=20 "$left" bash -c '"$@"' step "$@" >"$OUT/$name.log" 2>&1
    status=$?
    if [ "$status" -eq 124 ] || { [ "$status" -eq 137 ] && [ $((SECONDS - start)) -ge "$left" ]; }; then
        echo "ci/gpu.sh: stopped after $left s; LIMIT_${name^^} grants more" >>"$OUT/$name.log"
        status="FAILED (stopped after $left s)"
    fi
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$results"
    # The table of the targets is printed at the end in any case.
    [ "$status" = 0 ] || [ "$name" = targets ] || tail -n 25 "$OUT/$name.log"
    [ "$status" = 0 ]
}

# pytest in several processes where pytest-xdist is there.
parallel() { "$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n $WORKERS"; }
run_pytest() { "$PYTHON" -m pytest -p no:cacheprovider "$@"; }

build() {
    UCAN_FAST_REQUIRE_EXTENSION=1 "$PYTHON" -m pip install --no-deps --no-build-isolation -e .
}
aot() { "$PYTHON" -m ucan_fast.kernels.aot --json "$OUT/aot.json"; }
gpu_tests() { run_pytest -m gpu tests --junitxml="$OUT/tests.xml"; }
# shellcheck disable=SC2046  # two words on purpose
kernel_tests() {
    run_pytest $(parallel) tests/kernels tests/test_triton_path.py --junitxml="$OUT/kernels.xml"
}
quantised() { run_pytest tests/test_quantised.py --junitxml="$OUT/quantised.xml"; }
bench() {
    run_pytest benchmarks/kernels --profile full --targets --json "$OUT/bench-kernels.json"
}
bench_model() { "$PYTHON" -m benchmarks.model --profile quick --json "$OUT/bench-model.json"; }
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
    # Small shapes of every kernel: the tool slows them a hundred times.
    local chosen="attenuate or (small and not 4096)"
    if [ "$1" = memcheck ]; then
        # torch's caching allocator cuts tensors out of blocks of megabytes, in which memcheck does
        # not see an overrun: here every tensor is an allocation of its own.
        export PYTORCH_NO_CUDA_MEMORY_CACHING=1
        chosen="not graph and ($chosen)"
    fi
    compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all \
        "$PYTHON" -m pytest -p no:cacheprovider -m gpu tests/test_gpu.py -k "$chosen"
}
# timeout starts them in a shell of their own.
export PYTHON OUT WORKERS
export -f build aot parallel run_pytest gpu_tests kernel_tests quantised sanitize
export -f bench bench_model bench_full targets

command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || {
    echo "ci/gpu.sh: no NVIDIA GPU here (nvidia-smi failed)."
    exit 1
}
step build build && step aot aot
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
    fi
done
step bench bench
step bench_model bench_model
step bench_full bench_full
step targets targets

"$PYTHON" ci/gpu_summary.py "$OUT"
