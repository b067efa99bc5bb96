#!/bin/sh
# Runs nvcc and keeps what it prints (ptxas -v) in a log; shows it only when it fails.
#   cuda_compile.sh LOG nvcc ARGUMENTS…
log=$1
shift
"$@" >"$log" 2>&1 && exit 0
cat "$log" >&2
rm -f "$log"
exit 1
