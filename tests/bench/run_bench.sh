#!/bin/sh
# Throughput of the demo model at 1, 4, 16 and 64 requests in flight. Adds lines to OUT/throughput.csv.
#
#   sh tests/bench/run_bench.sh BUILD OUT [daemon option...]
#
# BUILD holds daemon/internvld and client/internvl. Figures are worth something on a machine with nothing else to do.
set -eu
build=$1
out=$2
shift 2
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out"
folder=$(mktemp -d)
daemon=
leave() {
    [ -z "$daemon" ] || { kill "$daemon" 2>/dev/null && wait "$daemon"; } || true
    rm -rf "$folder"
}
trap leave EXIT
trap 'exit 130' INT TERM

"$build/daemon/internvld" --model "$root/deploy/demo/model" --listen 127.0.0.1:0 --port-file "$folder/address" \
    "$@" 2>"$folder/log" &
daemon=$!
while [ ! -s "$folder/address" ]; do
    kill -0 "$daemon" 2>/dev/null || { cat "$folder/log" >&2; exit 1; }
    sleep 0.1
done
INTERNVL_ADDRESS=$(cat "$folder/address")
export INTERNVL_ADDRESS
bench() { "$build/client/internvl" bench --input-len 12 "$@"; }

for n in 1 4 16 64; do
    echo "== $n in flight"
    bench --concurrency "$n" --num-requests $((16 + 4 * n)) --warm-up "$n" --output-len 64 --csv "$out/throughput.csv"
done
