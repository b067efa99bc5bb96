#!/bin/sh
# Throughput of the demo model at 1, 4, 16 and 64 requests in flight, then the gaps of 8 running text streams
# without and with pictures arriving beside them. Adds lines to OUT/throughput.csv and OUT/pictures.csv.
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
picture_load=
leave() {
    [ -z "$picture_load" ] || kill "$picture_load" 2>/dev/null || true
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

echo "== 8 text streams alone"
bench --concurrency 8 --num-requests 64 --warm-up 8 --output-len 64 --csv "$out/pictures.csv"
echo "== 8 text streams with 15 pictures a second"
bench --request-rate 15 --num-requests 100000 --max-tokens 1 --image "$root/deploy/demo/examples/scene-two.png" \
    >/dev/null 2>&1 &
picture_load=$!
sleep 2
bench --concurrency 8 --num-requests 64 --warm-up 8 --output-len 64 --csv "$out/pictures.csv"
