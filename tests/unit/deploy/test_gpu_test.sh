#!/bin/sh
# deploy/gpu_test.sh where there is no GPU: status 77 and a sentence, and nothing is built. Unknown steps: status 2.
#   test_gpu_test.sh SOURCE
set -u
if nvidia-smi -L 2>/dev/null | grep -q '^GPU ' || [ -e /dev/nvidia0 ]; then
    echo "skipped: this machine has a GPU"
    exit 77
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/deploy"
cp "$1/deploy/gpu_test.sh" "$folder/deploy"
failures=0

# expect STATUS PATTERN ARGUMENT...
expect() {
    wanted=$1 pattern=$2
    shift 2
    said=$(sh "$folder/deploy/gpu_test.sh" "$@" 2>&1)
    got=$?
    if [ $got -ne "$wanted" ] || ! printf '%s\n' "$said" | grep -q -- "$pattern"; then
        printf 'gpu_test.sh %s: exit %s (expected %s), pattern "%s" in:\n%s\n' "$*" $got "$wanted" "$pattern" "$said"
        failures=$((failures + 1))
    fi
}

expect 77 '^gpu_test: skipped: no GPU here: nvidia-smi lists none and there is no /dev/nvidia0$'
expect 77 '^gpu_test: skipped: no GPU here' ops daemon
expect 2 'unknown step fly' fly
expect 0 '^  sh deploy/gpu_test.sh \[STEP\]' --help
if [ -e "$folder/build" ]; then
    echo "gpu_test.sh made a build folder without a GPU"
    failures=$((failures + 1))
fi
exit $failures
