#!/usr/bin/env bash
# Build, test and sanitize on a machine with a CUDA GPU; prints one table, leaves JSON in $OUT.
#
#   ci/gpu.sh                        with the python on PATH, which must have a CUDA torch,
#                                    transformers, peft, pytest and an nvcc on PATH
#   PYTHON=.venv/bin/python ci/gpu.sh
#
# Exit code 0 only if the build and every test passed. A sanitizer that the driver refuses is
# reported as such and does not fail the run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
results="$OUT/steps.tsv"
: >"$results"

# step NAME COMMAND...: runs it, logs it, and notes how it ended and how long it took.
step() {
    local name=$1 start=$SECONDS status
    shift
    "$@" >"$OUT/$name.log" 2>&1
    status=$?
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$results"
    [ "$status" -eq 0 ] || tail -n 25 "$OUT/$name.log"
    return "$status"
}

build() {
    UCAN_FAST_REQUIRE_EXTENSION=1 "$PYTHON" -m pip install --no-deps --no-build-isolation -e .
}
gpu_tests() { "$PYTHON" -m pytest -m gpu tests -p no:cacheprovider --junitxml="$OUT/gpu-tests.xml"; }
sanitize() {
    compute-sanitizer --tool "$1" --error-exitcode 9 \
        "$PYTHON" -m pytest -m gpu tests/test_gpu.py -k attenuate -p no:cacheprovider
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || {
    echo "ci/gpu.sh: no NVIDIA GPU here (nvidia-smi failed)."
    exit 1
}
step build build && step tests gpu_tests
for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
        step "$tool" sanitize "$tool"
    else
        printf '%s\tnot installed\t0\n' "$tool" >>"$results"
    fi
done

"$PYTHON" ci/gpu_summary.py "$OUT"
