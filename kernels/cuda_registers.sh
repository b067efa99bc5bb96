#!/bin/sh
# The register table of the CUDA kernels, from the logs of nvcc -Xptxas -v: one line a kernel and architecture. Fails
# when a kernel spills more than SPILL_MAX bytes: spilling is a change to look at, not to let pass.
#   cuda_registers.sh LOG…
SPILL_MAX=${SPILL_MAX:-96}
filter=cat
command -v c++filt >/dev/null && filter=c++filt
printf '%-58s %-8s %9s %7s %7s\n' kernel arch registers stack spills
cat "$@" | $filter | awk -v max="$SPILL_MAX" '
    /Compiling entry function/ {
        kernel = $0
        sub(/.*entry function ./, "", kernel)
        architecture = kernel
        sub(/.* for ./, "", architecture)
        sub(/[^a-z_0-9].*/, "", architecture)
        sub(/. for .*/, "", kernel)
        gsub(/\([a-z_]+\)/, "", kernel) # of an enum argument
        sub(/\(.*/, "", kernel)
        sub(/^void /, "", kernel)
    }
    /bytes stack frame/ { stack = $1; spills = $5 + $9 }
    /Used [0-9]+ registers/ {
        registers = $0
        sub(/.*Used /, "", registers)
        sub(/ .*/, "", registers)
        printf "%-58s %-8s %9d %7d %7d\n", kernel, architecture, registers, stack, spills
        n++
        if (spills > max) { bad++; print "  ^ spills more than " max " bytes" }
    }
    END {
        printf "%d kernels\n", n
        exit bad || !n
    }'
