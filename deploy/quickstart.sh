#!/bin/sh
# From a fresh Debian 12 to an answer: installs packages, builds, starts four ranks on the demo model (gateway,
# vision, language T=2), asks about a picture, streams the answer, stops cleanly.
#
#   sh deploy/quickstart.sh [--keep]      --keep leaves the daemon running and says how to stop it
#
# Safe to run twice. Leaves everything it makes in build/.
set -eu

keep=0
for arg in "$@"; do
    case "$arg" in
    --keep) keep=1 ;;
    -h | --help)
        sed -n '2,8s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *)
        echo "quickstart: unknown option $arg (--keep, --help)" >&2
        exit 2
        ;;
    esac
done

cd "$(dirname "$0")/.."
step() { printf '\n== %s\n' "$*"; }

step "packages"
sh deploy/packages.sh build

step "build (build/release)"
cmake --preset release -DINTERNVLD_TESTS=OFF >build-quickstart.log 2>&1 && cmake --build --preset release >>build-quickstart.log 2>&1 || {
    cat build-quickstart.log
    exit 1
}
mkdir -p build
mv build-quickstart.log build/quickstart-build.log
echo "internvld and internvl are in build/release/daemon and build/release/client"

step "start: 1 gateway + 1 vision + 2 language ranks (T=2) on the demo model"
run=$(mktemp -d)
build/release/daemon/internvld --model deploy/demo/model --tensor-parallel-size 2 \
    --listen 127.0.0.1:0 --port-file "$run/address" 2>"$run/log" &
daemon=$!
stop() {
    kill -TERM "$daemon" 2>/dev/null || return 0
    wait "$daemon"
}
trap 'stop || true; rm -rf "$run"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
while [ ! -s "$run/address" ]; do
    if ! kill -0 "$daemon" 2>/dev/null; then
        cat "$run/log"
        echo "quickstart: the daemon did not start" >&2
        exit 1
    fi
    sleep 0.05
done
grep 'ready' "$run/log" || true
address=$(cat "$run/address")

picture=deploy/demo/examples/scene-two.png
question="Describe the image."
step "ask: internvl ask --image $picture \"$question\""
build/release/client/internvl --address "$address" ask --image "$picture" "$question"

if [ $keep = 1 ]; then
    trap - EXIT
    mv "$run/log" build/quickstart-daemon.log
    rm -rf "$run"
    step "left running on $address (process $daemon)"
    echo "ask:  build/release/client/internvl --address $address ask \"Write stop in capital letters.\""
    echo "stop: kill $daemon"
    exit 0
fi

step "stop (SIGTERM drains)"
status=0
stop || status=$?
trap - EXIT
rm -rf "$run"
if [ $status != 0 ]; then
    echo "quickstart: the daemon exited with status $status" >&2
    exit 1
fi
echo "the daemon drained and exited 0"
