#!/bin/sh
# Installs what is missing of internvld's Debian 12 packages: `sh deploy/packages.sh build`, `… package` (for cpack) or `… test`.
# As root, or as a user with sudo. Installs nothing when everything is there; safe to run again.
set -eu

build="gcc g++ make cmake ninja-build pkg-config openmpi-bin libopenmpi-dev libhwloc-dev libgrpc-dev libssl-dev libprotobuf-c-dev
 protobuf-c-compiler protobuf-compiler libprotobuf-dev libcjson-dev libjpeg62-turbo-dev libpng-dev libwebp-dev
 libpcre2-dev libmicrohttpd-dev libutf8proc-dev libavcodec-dev libavformat-dev libavutil-dev libswscale-dev"
package="$build file dpkg-dev"
test="$build libcmocka-dev python3 python3-venv clang libclang-rt-14-dev procps groff-base iproute2 slurmctld slurmd slurm-client munge"

case "${1:-}" in
build) wanted=$build ;;
package) wanted=$package ;;
test) wanted=$test ;;
*)
    echo "usage: sh deploy/packages.sh build|package|test" >&2
    exit 2
    ;;
esac

missing=
for p in $wanted; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing="$missing $p"
done
if [ -z "$missing" ]; then
    echo "packages: all installed"
    exit 0
fi

echo "packages: installing$missing"
if [ "$(id -u)" = 0 ]; then
    sudo=
elif command -v sudo >/dev/null; then
    sudo=sudo
else
    echo "packages: not root and no sudo; as root run: apt-get install$missing" >&2
    exit 1
fi
$sudo apt-get update -q
# shellcheck disable=SC2086 # a list of words
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
