/*
 * Reflection service. See reflection.h; the protocol is grpc/doc/server-reflection.md.
 */
#include "daemon/gateway/reflection.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "descriptor_set.h"
#include "google/protobuf/descriptor.pb-c.h"
#include "grpc/reflection/v1/reflection.pb-c.h"
#include "kernels/log.h"

#define MAX_ELEMENTS 64
#define MAX_SERVICES 16
#define NAME_MAX_BYTES 128

typedef Google__Protobuf__FileDescriptorProto file_descriptor;
typedef Google__Protobuf__DescriptorProto message_descriptor;
typedef Grpc__Reflection__V1__ServerReflectionRequest reflection_request;
typedef Grpc__Reflection__V1__ServerReflectionResponse reflection_response;

struct reflection {
    Google__Protobuf__FileDescriptorSet *set;
    ProtobufCBinaryData *bytes;       // [set->n_file] each file's own bytes, into descriptor_set
    char (*services)[NAME_MAX_BYTES]; // [n_services]
    size_t n_services;
};

/* Where each file's bytes lie: a FileDescriptorSet is a run of (tag 1, length, bytes). */
static void find_bytes(struct reflection *r)
{
    size_t at = 0;

    for (size_t i = 0; i < r->set->n_file; i++) {
        uint64_t n = 0;
        unsigned shift = 0;

        if (descriptor_set[at++] != 0x0a)
            BUG("the embedded descriptor set has an unknown field");
        do
            n |= (uint64_t)(descriptor_set[at] & 127) << shift, shift += 7;
        while (descriptor_set[at++] & 128);
        r->bytes[i] = (ProtobufCBinaryData){(size_t)n, (uint8_t *)(uintptr_t)descriptor_set + at};
        at += (size_t)n;
    }
}

struct reflection *reflection_new(void)
{
    struct reflection *r = xcalloc(1, sizeof(*r));

    r->set =
        google__protobuf__file_descriptor_set__unpack(NULL, descriptor_set_n_bytes, descriptor_set);
    if (!r->set)
        BUG("the embedded descriptor set cannot be read");
    r->bytes = xcalloc(r->set->n_file, sizeof(*r->bytes));
    find_bytes(r);
    r->services = xcalloc(MAX_SERVICES, sizeof(*r->services));
    for (size_t i = 0; i < r->set->n_file; i++) {
        const file_descriptor *f = r->set->file[i];

        for (size_t k = 0; k < f->n_service && r->n_services < MAX_SERVICES; k++)
            snprintf(r->services[r->n_services++], NAME_MAX_BYTES, "%s.%s", f->package,
                     f->service[k]->name);
    }
    return r;
}

void reflection_free(struct reflection *r)
{
    google__protobuf__file_descriptor_set__free_unpacked(r->set, NULL);
    free(r->bytes);
    free(r->services);
    free(r);
}

/* The rest of `symbol` behind "name" or "name.", or NULL. */
static const char *behind(const char *symbol, const char *name)
{
    size_t n = strlen(name);

    if (strncmp(symbol, name, n) != 0 || (symbol[n] && symbol[n] != '.'))
        return NULL;
    return symbol[n] ? symbol + n + 1 : symbol + n;
}

static int message_has(const message_descriptor *m, const char *symbol)
{
    const char *rest = behind(symbol, m->name);

    if (!rest)
        return 0;
    if (!*rest)
        return 1;
    for (size_t i = 0; i < m->n_field; i++)
        if (strcmp(rest, m->field[i]->name) == 0)
            return 1;
    for (size_t i = 0; i < m->n_oneof_decl; i++)
        if (strcmp(rest, m->oneof_decl[i]->name) == 0)
            return 1;
    for (size_t i = 0; i < m->n_enum_type; i++)
        if (behind(rest, m->enum_type[i]->name))
            return 1;
    for (size_t i = 0; i < m->n_nested_type; i++)
        if (message_has(m->nested_type[i], rest))
            return 1;
    return 0;
}

static int service_has(const Google__Protobuf__ServiceDescriptorProto *s, const char *symbol)
{
    const char *rest = behind(symbol, s->name);

    if (!rest || !*rest)
        return rest != NULL;
    for (size_t i = 0; i < s->n_method; i++)
        if (strcmp(rest, s->method[i]->name) == 0)
            return 1;
    return 0;
}

static int file_has(const file_descriptor *f, const char *symbol)
{
    const char *rest = behind(symbol, f->package);

    if (!rest)
        return 0;
    for (size_t i = 0; i < f->n_service; i++)
        if (service_has(f->service[i], rest))
            return 1;
    for (size_t i = 0; i < f->n_message_type; i++)
        if (message_has(f->message_type[i], rest))
            return 1;
    for (size_t i = 0; i < f->n_enum_type; i++)
        if (behind(rest, f->enum_type[i]->name))
            return 1;
    return 0;
}

/* Index of the file, or -1. */
static int find_file(const struct reflection *r, const char *name, const char *symbol)
{
    for (size_t i = 0; i < r->set->n_file; i++)
        if (name ? strcmp(r->set->file[i]->name, name) == 0 : file_has(r->set->file[i], symbol))
            return (int)i;
    return -1;
}

static void add_to_answer(const struct reflection *r, int file, ProtobufCBinaryData *files,
                          size_t *n, unsigned char *is_added)
{
    if (is_added[file])
        return;
    is_added[file] = 1;
    files[(*n)++] = r->bytes[file];
    for (size_t i = 0; i < r->set->file[file]->n_dependency; i++) {
        int dependency = find_file(r, r->set->file[file]->dependency[i], NULL);

        if (dependency >= 0)
            add_to_answer(r, dependency, files, n, is_added);
    }
}

static void answer_services(const struct reflection *r, struct rpc_call *c, reflection_response *a)
{
    Grpc__Reflection__V1__ListServiceResponse list =
        GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
    Grpc__Reflection__V1__ServiceResponse services[MAX_SERVICES];
    Grpc__Reflection__V1__ServiceResponse *pointers[MAX_SERVICES];

    for (size_t i = 0; i < r->n_services; i++) {
        grpc__reflection__v1__service_response__init(&services[i]);
        services[i].name = r->services[i];
        pointers[i] = &services[i];
    }
    list.n_service = r->n_services;
    list.service = pointers;
    a->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE;
    a->list_services_response = &list;
    rpc_write(c, &a->base);
}

static void answer_file(const struct reflection *r, struct rpc_call *c, reflection_response *a,
                        int file)
{
    Grpc__Reflection__V1__FileDescriptorResponse answer =
        GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    ProtobufCBinaryData *files = xcalloc(r->set->n_file, sizeof(*files));
    unsigned char *is_added = xcalloc(r->set->n_file, 1);

    add_to_answer(r, file, files, &answer.n_file_descriptor_proto, is_added);
    answer.file_descriptor_proto = files;
    a->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    a->file_descriptor_response = &answer;
    rpc_write(c, &a->base);
    free(is_added);
    free(files);
}

static void answer_error(struct rpc_call *c, reflection_response *a, enum error_code code,
                         const char *sentence)
{
    Grpc__Reflection__V1__ErrorResponse error = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;

    error.error_code = (int32_t)code;
    error.error_message = (char *)(uintptr_t)sentence;
    a->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
    a->error_response = &error;
    rpc_write(c, &a->base);
}

void reflection_answer(const struct reflection *r, struct rpc_call *c)
{
    reflection_response a = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    struct arena arena;
    struct error err = {0};
    int file = -1;
    reflection_request *q = (reflection_request *)rpc_take_message(
        c, &grpc__reflection__v1__server_reflection_request__descriptor, MAX_ELEMENTS, &arena,
        &err);

    if (!q) {
        rpc_finish(c, &err, NULL);
        arena_release(&arena);
        return;
    }
    a.valid_host = q->host;
    a.original_request = q;
    switch (q->message_request_case) {
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES:
        answer_services(r, c, &a);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME:
        file = find_file(r, q->file_by_filename, NULL);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL:
        file = find_file(r, NULL, q->file_containing_symbol);
        break;
    default: // extensions: proto3 has none
        break;
    }
    if (file >= 0)
        answer_file(r, c, &a, file);
    else if (q->message_request_case !=
             GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES)
        answer_error(c, &a, ERROR_NOT_FOUND, "no such file, symbol or extension");
    arena_release(&arena);
}
