/*
 * Wire validation. See wire_check.h; the wire format is
 * protobuf.dev/programming-guides/encoding.
 */
#include "daemon/gateway/wire_check.h"

struct cursor {
    const uint8_t *at, *end;
};

struct check {
    size_t n_elements, max_elements;
    struct error *err;
};

static int read_varint(struct cursor *c, uint64_t *value)
{
    uint64_t v = 0;

    for (unsigned shift = 0; shift < 70; shift += 7) {
        if (c->at >= c->end)
            return -1;
        uint8_t byte = *c->at++;
        if (shift == 63 && byte > 1)
            return -1;
        v |= (uint64_t)(byte & 127) << shift;
        if (!(byte & 128)) {
            *value = v;
            return 0;
        }
    }
    return -1;
}

static int skip_bytes(struct cursor *c, uint64_t n)
{
    if (n > (uint64_t)(c->end - c->at))
        return -1;
    c->at += n;
    return 0;
}

/* 1 when [s, s + n) is UTF-8 (RFC 3629: no overlong forms, no surrogates) without NUL. */
static int is_text(const uint8_t *s, size_t n)
{
    size_t i = 0;

    while (i < n) {
        uint8_t first = s[i];
        unsigned n_more;
        uint32_t code, smallest;

        if (first == 0)
            return 0;
        if (first < 0x80) {
            i++;
            continue;
        }
        if (first >= 0xc2 && first <= 0xdf) {
            n_more = 1, code = first & 31u, smallest = 0x80;
        } else if ((first & 0xf0) == 0xe0) {
            n_more = 2, code = first & 15u, smallest = 0x800;
        } else if (first >= 0xf0 && first <= 0xf4) {
            n_more = 3, code = first & 7u, smallest = 0x10000;
        } else {
            return 0;
        }
        if (n - i <= n_more)
            return 0;
        for (unsigned j = 1; j <= n_more; j++) {
            if ((s[i + j] & 0xc0) != 0x80)
                return 0;
            code = code << 6 | (s[i + j] & 63u);
        }
        if (code < smallest || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff))
            return 0;
        i += n_more + 1;
    }
    return 1;
}

static int count(struct check *k, uint64_t n)
{
    if (n > k->max_elements - k->n_elements)
        return error_set(k->err, ERROR_RESOURCE_EXHAUSTED,
                         "the message has more than %zu elements, the limit", k->max_elements);
    k->n_elements += (size_t)n;
    return 0;
}

static int is_fixed_width(ProtobufCType type, unsigned n_bytes)
{
    switch (type) {
    case PROTOBUF_C_TYPE_FIXED32:
    case PROTOBUF_C_TYPE_SFIXED32:
    case PROTOBUF_C_TYPE_FLOAT:
        return n_bytes == 4;
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_SFIXED64:
    case PROTOBUF_C_TYPE_DOUBLE:
        return n_bytes == 8;
    default:
        return 0;
    }
}

static int is_length_delimited(ProtobufCType type)
{
    return type == PROTOBUF_C_TYPE_STRING || type == PROTOBUF_C_TYPE_BYTES ||
           type == PROTOBUF_C_TYPE_MESSAGE;
}

/* A packed field: entries are counted by their bytes, an upper bound for varints. */
static int check_packed(struct check *k, const ProtobufCFieldDescriptor *f, const uint8_t *bytes,
                        size_t n)
{
    size_t width = is_fixed_width(f->type, 4) ? 4 : is_fixed_width(f->type, 8) ? 8 : 1;

    if (f->label != PROTOBUF_C_LABEL_REPEATED || n % width)
        return error_set(k->err, ERROR_INVALID_ARGUMENT, "field %s has a wrong wire type", f->name);
    if (width == 1 && n > 0 && (bytes[n - 1] & 128))
        return error_set(k->err, ERROR_INVALID_ARGUMENT, "field %s ends in the middle of a number",
                         f->name);
    return count(k, n / width);
}

static int check_message(struct check *k, const ProtobufCMessageDescriptor *type,
                         const uint8_t *bytes, size_t n, unsigned depth);

static int check_delimited(struct check *k, const ProtobufCFieldDescriptor *f, const uint8_t *bytes,
                           size_t n, unsigned depth)
{
    switch (f->type) {
    case PROTOBUF_C_TYPE_STRING:
        if (!is_text(bytes, n))
            return error_set(k->err, ERROR_INVALID_ARGUMENT,
                             "field %s is not UTF-8 text without NUL", f->name);
        return 0;
    case PROTOBUF_C_TYPE_BYTES:
        return 0;
    case PROTOBUF_C_TYPE_MESSAGE:
        return check_message(k, f->descriptor, bytes, n, depth + 1);
    default:
        return check_packed(k, f, bytes, n);
    }
}

static int check_field(struct check *k, const ProtobufCMessageDescriptor *type, struct cursor *c,
                       unsigned depth)
{
    uint64_t key, value;

    if (read_varint(c, &key) || key >> 3 == 0 || key >> 3 > 536870911)
        goto malformed;
    const ProtobufCFieldDescriptor *f =
        protobuf_c_message_descriptor_get_field(type, (unsigned)(key >> 3));
    switch (key & 7) {
    case 0:
        if (read_varint(c, &value))
            goto malformed;
        if (f && (is_length_delimited(f->type) || is_fixed_width(f->type, 4) ||
                  is_fixed_width(f->type, 8)))
            goto wrong_type;
        return 0;
    case 1:
        if (skip_bytes(c, 8))
            goto malformed;
        if (f && !is_fixed_width(f->type, 8))
            goto wrong_type;
        return 0;
    case 5:
        if (skip_bytes(c, 4))
            goto malformed;
        if (f && !is_fixed_width(f->type, 4))
            goto wrong_type;
        return 0;
    case 2: {
        const uint8_t *start;

        if (read_varint(c, &value))
            goto malformed;
        start = c->at;
        if (skip_bytes(c, value))
            goto malformed;
        return f ? check_delimited(k, f, start, (size_t)value, depth) : 0;
    }
    default: // groups are not in proto3
        goto malformed;
    }
wrong_type:
    return error_set(k->err, ERROR_INVALID_ARGUMENT, "field %s has a wrong wire type", f->name);
malformed:
    return error_set(k->err, ERROR_INVALID_ARGUMENT, "the bytes are not a %s message", type->name);
}

static int check_message(struct check *k, const ProtobufCMessageDescriptor *type,
                         const uint8_t *bytes, size_t n, unsigned depth)
{
    struct cursor c = {bytes, bytes + n};

    if (depth > WIRE_MAX_DEPTH)
        return error_set(k->err, ERROR_INVALID_ARGUMENT,
                         "the message is nested deeper than %d levels", WIRE_MAX_DEPTH);
    while (c.at < c.end)
        if (count(k, 1) || check_field(k, type, &c, depth))
            return -1;
    return 0;
}

int wire_check(const ProtobufCMessageDescriptor *type, const uint8_t *bytes, size_t n_bytes,
               size_t max_elements, struct error *err)
{
    struct check k = {.max_elements = max_elements, .err = err};

    return check_message(&k, type, bytes, n_bytes, 0);
}

static void *allocate(void *arena, size_t n)
{
    return arena_alloc(arena, n, 1);
}

static void keep(void *arena, void *p) // the arena frees everything at once
{
    (void)arena;
    (void)p;
}

size_t wire_budget_bytes(size_t n_bytes)
{
    return 4 * n_bytes + ((size_t)4 << 20);
}

ProtobufCMessage *wire_unpack(const ProtobufCMessageDescriptor *type, const uint8_t *bytes,
                              size_t n_bytes, size_t max_elements, struct arena *a,
                              struct error *err)
{
    ProtobufCAllocator allocator = {allocate, keep, a};
    ProtobufCMessage *m;

    if (wire_check(type, bytes, n_bytes, max_elements, err))
        return NULL;
    m = protobuf_c_message_unpack(type, &allocator, n_bytes, bytes);
    if (!m)
        error_set(err, ERROR_RESOURCE_EXHAUSTED,
                  "the message needs more than %zu bytes of memory, the limit", a->budget_bytes);
    return m;
}
