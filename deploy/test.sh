#!/bin/sh
# Installs what the tests need, builds, and runs every test through ctest: release, then under address and
# undefined-behaviour sanitizers, then the engine and the gateway under the thread sanitizer.
#
#   sh deploy/test.sh [release] [asan] [tsan]      no argument: all three
#
# Safe to run twice. Leaves everything it makes in build/.
set -eu

cd "$(dirname "$0")/.."
started=$(date +%s)
step() { printf '\n== %s (after %d s)\n' "$*" "$(($(date +%s) - started))"; }

kinds=${*:-release asan tsan}
for kind in $kinds; do
    case "$kind" in
    release | asan | tsan) ;;
    *)
        echo "test: unknown kind $kind (release, asan, tsan)" >&2
        exit 2
        ;;
    esac
done

step "packages"
sh deploy/packages.sh test
if [ ! -x build/venv/bin/python ]; then
    python3 -m venv build/venv
fi
build/venv/bin/python -m pip install -q --disable-pip-version-check -r tests/requirements.txt

for kind in $kinds; do
    step "$kind: build"
    cmake --preset "$kind" -DINTERNVLD_TESTS=ON -DINTERNVLD_PYTHON="$PWD/build/venv/bin/python"
    cmake --build --preset "$kind"
    step "$kind: tests"
    case "$kind" in
    # Open MPI and libgrpc keep memory to the end of the process; leaks in our own code are still reported.
    asan) export ASAN_OPTIONS=detect_leaks=1 LSAN_OPTIONS="suppressions=$PWD/tests/lsan.supp:print_suppressions=0" UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 ;;
    tsan) export TSAN_OPTIONS="suppressions=$PWD/tests/tsan.supp:halt_on_error=1" ;;
    esac
    if [ "$kind" = tsan ]; then
        ctest --preset tsan -R 'engine|gateway'
    else
        ctest --preset "$kind"
    fi
done
step "all tests passed"
