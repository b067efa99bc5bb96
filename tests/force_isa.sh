#!/bin/sh
# force_isa.sh ISA COMMAND...: the command, INTERNVLD_DAEMON's kernels being of one instruction set. Status 77 (skipped)
# where the processor lacks it.
set -eu

export INTERNVLD_ISA="$1"
shift
model=$(dirname "$0")/../deploy/demo/model
if ! said=$("$INTERNVLD_DAEMON" --model "$model" --plan 2>&1); then
    case "$said" in
    *"lacks the instruction set"*)
        echo "skipped: this processor lacks $INTERNVLD_ISA"
        exit 77
        ;;
    esac
    echo "$said" >&2
    exit 1
fi
exec "$@"
