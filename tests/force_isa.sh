#!/bin/sh
# force_isa.sh ISA COMMAND...: the command, INTERNVLD_DAEMON's kernels being of one instruction set. Status 77 (skipped)
# where the processor lacks it, and where it has nothing better: there the same test without a forced set is this one.
set -eu

isa=$1
shift
model=$(dirname "$0")/../deploy/demo/model

has() {
    said=$(INTERNVLD_ISA=$1 "$INTERNVLD_DAEMON" --model "$model" --plan 2>&1) && return 0
    case "$said" in
    *"lacks the instruction set"*) return 1 ;;
    esac
    echo "$said" >&2
    exit 1
}

if ! has "$isa"; then
    echo "skipped: this processor lacks $isa"
    exit 77
fi
case "$isa" in
scalar) better=avx2 ;;
avx2) better=avx512 ;;
avx512) better=avx512vnni ;;
avx512vnni) better=avx512bf16 ;;
*) better= ;; # of these two each process tries which is the faster
esac
if [ -n "$better" ] && ! has "$better"; then
    echo "skipped: $isa is what this processor takes unforced"
    exit 77
fi
INTERNVLD_ISA=$isa exec "$@"
