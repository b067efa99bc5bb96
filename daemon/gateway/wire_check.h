/*
 * What protobuf-c does not check, checked before it sees the bytes: UTF-8 and NUL in strings,
 * depth, number of elements, wire types. Driven by the message's descriptor. Pure.
 *
 * Why: protobuf-c has no recursion limit, cuts strings at NUL, accepts any bytes as a string, and a
 * message of empty submessages grows some fifty times when unpacked.
 */
#ifndef INTERNVLD_GATEWAY_WIRE_CHECK_H
#define INTERNVLD_GATEWAY_WIRE_CHECK_H

#include <protobuf-c/protobuf-c.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/arena.h"
#include "kernels/error.h"

#define WIRE_MAX_DEPTH 16

/* INVALID_ARGUMENT with the field's name where the bytes are not a message of `type`;
 * RESOURCE_EXHAUSTED past max_elements (fields, and entries of packed ones, of all levels). */
int wire_check(const ProtobufCMessageDescriptor *type, const uint8_t *bytes, size_t n_bytes,
               size_t max_elements, struct error *err);
/* wire_check(), then protobuf-c's unpack with the arena as its memory. The message lives in `a`. */
ProtobufCMessage *wire_unpack(const ProtobufCMessageDescriptor *type, const uint8_t *bytes,
                              size_t n_bytes, size_t max_elements, struct arena *a,
                              struct error *err);
/* What an arena for a message of n_bytes may use: its copy, the structs around it, some room. */
size_t wire_budget_bytes(size_t n_bytes);

#endif
