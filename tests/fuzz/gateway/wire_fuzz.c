/*
 * Any bytes through wire_check and protobuf-c: no crash, no leak, no memory past the budget; what
 * is accepted packs again into bytes that are accepted.
 */
#include <stdint.h>
#include <stdlib.h>

#include "daemon/gateway/wire_check.h"
#include "grpc/health/v1/health.pb-c.h"
#include "grpc/reflection/v1/reflection.pb-c.h"
#include "internvl/v1/internvl.pb-c.h"
#include "kernels/arena.h"

#define MAX_ELEMENTS 4096

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const ProtobufCMessageDescriptor *const types[] = {
        &internvl__v1__generate_request__descriptor,
        &internvl__v1__forward_request__descriptor,
        &internvl__v1__tokenize_request__descriptor,
        &internvl__v1__get_model_request__descriptor,
        &grpc__health__v1__health_check_request__descriptor,
        &grpc__reflection__v1__server_reflection_request__descriptor,
        &internvl__v1__upload_media_request__descriptor,
    };
    struct arena a, b;
    struct error err = {0};
    ProtobufCMessage *m;

    if (n == 0)
        return 0;
    const ProtobufCMessageDescriptor *type = types[data[0] % (sizeof(types) / sizeof(types[0]))];
    arena_init(&a, wire_budget_bytes(n - 1));
    m = wire_unpack(type, data + 1, n - 1, MAX_ELEMENTS, &a, &err);
    if (m) {
        size_t n_packed = protobuf_c_message_get_packed_size(m);
        uint8_t *packed = malloc(n_packed + 1);

        if (protobuf_c_message_pack(m, packed) != n_packed)
            abort();
        arena_init(&b, wire_budget_bytes(n_packed) * 4);
        if (!wire_unpack(type, packed, n_packed, 2 * MAX_ELEMENTS, &b, &err))
            abort();
        arena_release(&b);
        free(packed);
    } else if (err.code == ERROR_OK || err.msg[0] == '\0') {
        abort();
    }
    arena_release(&a);
    return 0;
}
