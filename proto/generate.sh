#!/bin/sh
# Makes the C side of the protos: generate.sh PROTO_DIR OUT_DIR PROTOC PROTOC_C FILE...
#
# protobuf-c's generator (1.4, 1.5) refuses proto3 `optional`, so a copy is rewritten first: an
# optional field becomes a one-field oneof, which is what `optional` is on the wire and in the
# descriptor. Reflection serves the protos as they are published: descriptor_set.c holds their
# FileDescriptorSet, made from the originals.
set -eu
proto_dir=$1
out_dir=$2
protoc=$3
protoc_c=$4
shift 4

rewritten=$out_dir/rewritten
mkdir -p "$rewritten"
for file in "$@"; do
    mkdir -p "$rewritten/$(dirname "$file")"
    sed -E 's/optional[ \t]+([A-Za-z0-9_.]+)[ \t]+([a-z0-9_]+)[ \t]*=[ \t]*([0-9]+)([^;]*);/oneof _\2 { \1 \2 = \3\4; }/g' \
        "$proto_dir/$file" >"$rewritten/$file"
done
"$protoc_c" -I"$rewritten" --c_out="$out_dir" "$@"
# The messages of descriptors themselves, for looking names up in the set.
"$protoc_c" -I"$(dirname "$(dirname "$protoc")")/include" --c_out="$out_dir" google/protobuf/descriptor.proto

"$protoc" -I"$proto_dir" --include_imports --descriptor_set_out="$out_dir/descriptor_set.bin" "$@"
{
    echo '#include "descriptor_set.h"'
    echo 'const unsigned char descriptor_set[] = {'
    od -An -v -tx1 "$out_dir/descriptor_set.bin" | sed -E 's/ ([0-9a-f]{2})/0x\1,/g'
    echo '};'
    echo 'const size_t descriptor_set_n_bytes = sizeof(descriptor_set);'
} >"$out_dir/descriptor_set.c"
cat >"$out_dir/descriptor_set.h" <<'HEADER'
/* Generated: the serialized FileDescriptorSet of the published protos. */
#ifndef DESCRIPTOR_SET_H
#define DESCRIPTOR_SET_H

#include <stddef.h>

extern const unsigned char descriptor_set[];
extern const size_t descriptor_set_n_bytes;

#endif
HEADER
