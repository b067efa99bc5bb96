#!/bin/sh
# Installs what the tests need, builds, and runs the tests through ctest: release, then under address and
# undefined-behaviour sanitizers, then the engine and the gateway under the thread sanitizer. The long ones (hosts that
# are lost, a real Slurm, many drains, races in emulated CUDA, fresh goldens) only when named.
#
#   sh deploy/test.sh [release] [asan] [tsan] [long]      no argument: the first three
#
# Safe to run twice. Leaves everything it makes in build/.
set -eu

cd "$(dirname "$0")/.."
started=$(date +%s)
step() { printf '\n== %s (after %d s)\n' "$*" "$(($(date +%s) - started))"; }

kinds=${*:-release asan tsan}
for kind in $kinds; do
    case "$kind" in
    release | asan | tsan | long) ;;
    *)
        echo "test: unknown kind $kind (release, asan, tsan, long)" >&2
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
    preset=$kind
    [ "$kind" != long ] || preset=release
    cmake --preset "$preset" -DINTERNVLD_TESTS=ON -DINTERNVLD_PYTHON="$PWD/build/venv/bin/python"
    targets=all # but for the thread sanitizer, whose tests are few
    [ "$kind" != tsan ] || targets="internvld internvl tests/unit/engine/all tests/unit/gateway/all tests/gateway/all"
    # shellcheck disable=SC2086 # several words
    cmake --build --preset "$preset" --target $targets
    step "$kind: tests"
    case "$kind" in
    # Open MPI and libgrpc keep memory to the end of the process; leaks in our own code are still reported.
    asan) export ASAN_OPTIONS=detect_leaks=1 LSAN_OPTIONS="suppressions=$PWD/tests/lsan.supp:print_suppressions=0" UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 ;;
    tsan) export TSAN_OPTIONS="suppressions=$PWD/tests/tsan.supp:halt_on_error=1" ;;
    esac
    # Daemons with up to ten ranks on two shared cores: a test that fails is run once more, and the log shows both.
    # Two tests at a time, but for those that say they need both (PROCESSORS 2).
    ctest="ctest --preset $preset --parallel 2 --repeat until-pass:2"
    # shellcheck disable=SC2086 # several words
    case "$kind" in
    release) $ctest -LE long ;;
    # Emulated CUDA threads are stacks of their own, which the address sanitizer does not follow.
    asan) $ctest -LE 'long|cuda-emulated' ;;
    # Threads are looked at, not numbers: what compares answers with answers runs in the two above.
    tsan) $ctest -R 'engine|gateway' -E 'gateway_(equality|memory|score|client)' -LE long ;;
    long) $ctest -L long ;;
    esac
    log=build/$preset/Testing/Temporary/LastTest.log
    grep -hE "skipped[: ]" "$log" | sort | uniq -c
    # A test may be run twice; a sanitizer's report is one too many.
    case "$kind" in
    asan | tsan)
        if grep -nE 'ERROR: (Address|Leak)Sanitizer|WARNING: ThreadSanitizer|runtime error:' "$log"; then
            echo "test: $kind: the sanitizer has reported something; see $log" >&2
            exit 1
        fi
        ;;
    esac
done
step "all tests passed"
