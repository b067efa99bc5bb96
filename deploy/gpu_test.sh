#!/bin/sh
# On a machine with a GPU: builds with CUDA, runs on the device what tests/cuda_emulation runs without one, then the ops
# under compute-sanitizer, then how near the device comes to its own limits (tests/bench/gpu_bench). Uses no network.
#
#   sh deploy/gpu_test.sh [STEP]... [-- GPU_BENCH_OPTION...]
#
#   STEP           build, ops, models, nccl, daemon, sanitizer, bench; none: all of them, in this order
#   exit status    0 nothing failed (what was skipped is said), 1 something did, 77 no GPU, or all was skipped
#
# Wants what `deploy/packages.sh test` installs, a CUDA toolkit with cuBLASLt and NCCL, and, for the daemon's steps, a
# Python with the packages of tests/requirements.txt: $INTERNVLD_PYTHON, deploy/test.sh's in build/venv, or python3.
# Every step runs, whatever came of the others, once the build is there. Leaves all in build/gpu, with a log a step and
# gpu_bench.csv.
set -eu

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; }
steps='' here=$0
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    build | ops | models | nccl | daemon | sanitizer | bench) steps="$steps $1" ;;
    --)
        shift
        break
        ;;
    *)
        echo "gpu_test: unknown step $1 (--help)" >&2
        exit 2
        ;;
    esac
    shift
done
steps=${steps:-build ops models nccl daemon sanitizer bench}

no_gpu() {
    echo "gpu_test: skipped: $*"
    exit 77
}
count_gpus() { # sets n_gpus
    n_gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    [ "$n_gpus" -gt 0 ] && return
    for file in /dev/nvidia[0-9]*; do
        [ ! -e "$file" ] || n_gpus=$((n_gpus + 1))
    done
}
count_gpus
[ "$n_gpus" -gt 0 ] || no_gpu "no GPU here: nvidia-smi lists none and there is no /dev/nvidia0"

cd "$(dirname "$here")/.."
out=$PWD/build/gpu
mkdir -p "$out"
python=${INTERNVLD_PYTHON:-$PWD/build/venv/bin/python}
[ -x "$python" ] || python=python3
started=$(date +%s)
passed=0 failed='' skipped=''

# run NAME COMMAND...: on the terminal and in NAME.log; 77 is a skip, which says its reason. Sets `status`.
run() {
    name=$1
    shift
    printf '\n== %s (after %d s)\n' "$name" "$(($(date +%s) - started))"
    {
        status=0
        "$@" || status=$?
        echo "$status" >"$out/status"
    } 2>&1 | tee "$out/$name.log"
    status=$(cat "$out/status")
    case "$status" in
    0) passed=$((passed + 1)) ;;
    77) skipped="$skipped
    $name: $(sed -n 's/.*skipped: *//p' "$out/$name.log" | head -1)" ;;
    *) failed="$failed
    $name: status $status, $out/$name.log" ;;
    esac
}
skip() {
    echo "skipped: $*"
    return 77
}

build() {
    command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] || {
        echo "nvcc is not on PATH nor in /usr/local/cuda/bin: a CUDA toolkit is needed"
        return 1
    }
    cmake -S . -B "$out" -G Ninja -DCMAKE_BUILD_TYPE=Release -DINTERNVLD_CUDA=ON -DINTERNVLD_TESTS=ON \
        -DINTERNVLD_PYTHON="$python" &&
        cmake --build "$out" --target cuda_real internvld
}

# On one GPU no two ranks can share tensors: NCCL wants a device for each.
layouts() {
    echo 1x1x1
    [ "$n_gpus" -lt 2 ] || echo 2x1x1
    [ "$n_gpus" -lt 4 ] || echo 2x2x1
}
daemon() { # SCRIPT ARGUMENT...
    script=tests/$1
    shift
    INTERNVLD_DAEMON=$out/daemon/internvld PYTHONDONTWRITEBYTECODE=1 \
        "$python" tests/gateway/run.py "$script" "$@" --vision-share-gpu
}
quantized() {
    [ "$n_gpus" -ge 2 ] || { skip "T=2 needs two GPUs, this machine has $n_gpus"; return; }
    daemon cuda_emulation/daemon_quantized.py int8 int4 fp8 bitsandbytes-fp4 bitsandbytes-nf4
}
sums() {
    [ "$n_gpus" -ge 2 ] || { skip "T=2 needs two GPUs, this machine has $n_gpus"; return; }
    daemon cuda_emulation/daemon_sums.py
}
nccl() {
    [ "$n_gpus" -ge 4 ] || { skip "four ranks need four GPUs, this machine has $n_gpus"; return; }
    mpirun --allow-run-as-root --oversubscribe --bind-to none -n 4 "$tests/comm_nccl_test_real"
}
ipc() {
    [ "$n_gpus" -ge 2 ] || { skip "ranks read each other's memory on two GPUs or more, this machine has $n_gpus"; return; }
    for n in 2 4 8; do
        [ "$n" -gt "$n_gpus" ] ||
            mpirun --allow-run-as-root --oversubscribe --bind-to none -n "$n" "$tests/comm_ipc_test_real" || return
    done
}
sanitize() { # TOOL
    sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    [ -x "$sanitizer" ] || { skip "compute-sanitizer is not installed (it comes with the CUDA toolkit)"; return; }
    "$sanitizer" --tool "$1" --error-exitcode 1 "$tests/cuda_op_test_real" --small
}

tests=$out/tests/cuda_emulation
nvidia-smi --query-gpu=index,name,driver_version,memory.total,compute_cap --format=csv 2>/dev/null || true
for step in $steps; do
    case "$step" in
    build)
        run build build
        [ "$status" = 0 ] || break
        ;;
    ops)
        run ops "$tests/cuda_op_test_real"
        [ "$status" != 77 ] || {
            echo "the CUDA run time finds no device, though the machine has one: is the driver as new as the toolkit," \
                "and does CUDA_VISIBLE_DEVICES name a device?"
            break
        }
        ;;
    models) run models "$tests/cuda_parity_test_real" --cuda ;;
    nccl)
        run nccl nccl
        run ipc ipc
        ;;
    daemon)
        for checkpoint in ln-1b-style rms-78b-style; do
            # shellcheck disable=SC2046 # a list of words
            run "daemon-$checkpoint" daemon cuda_emulation/daemon_parity.py $checkpoint $(layouts)
            # shellcheck disable=SC2046
            run "daemon-bfloat16-$checkpoint" daemon parity/daemon/bfloat16.py --cuda $checkpoint $(layouts)
            # shellcheck disable=SC2046
            run "daemon-int8-kv-$checkpoint" daemon parity/daemon/bfloat16.py --cuda $checkpoint $(layouts) \
                --kv-cache-dtype=int8
        done
        # shellcheck disable=SC2046
        run daemon-graphs daemon cuda_emulation/daemon_graphs.py $(layouts)
        # shellcheck disable=SC2046
        run daemon-int8-kv-graphs daemon cuda_emulation/daemon_graphs.py $(layouts) --kv-cache-dtype=int8
        # shellcheck disable=SC2046
        run daemon-draw daemon cuda_emulation/daemon_draw.py $(layouts)
        run daemon-quantized quantized
        # shellcheck disable=SC2046
        run daemon-fp8 daemon parity/daemon/activations.py fp8 $(layouts)
        run daemon-sums sums
        ;;
    sanitizer)
        for tool in memcheck racecheck initcheck synccheck; do
            run "sanitizer-$tool" sanitize $tool
        done
        ;;
    bench) run bench "$out/tests/bench/gpu_bench" --csv "$out/gpu_bench.csv" "$@" ;;
    esac
done

printf '\n== %d passed (after %d s)\n' $passed "$(($(date +%s) - started))"
[ -z "$skipped" ] || echo "skipped:$skipped"
if [ -n "$failed" ]; then
    echo "FAILED:$failed"
    exit 1
fi
[ $passed -gt 0 ] || exit 77
