/* Laying arrays into one message and finding them again. See batch_wire.h. */
#include "parallel/batch_wire.h"

#include <string.h>

#include "kernels/log.h"

#define ALIGNMENT 8

static uint64_t align_up(uint64_t n)
{
    return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* Where the section after `offset` bytes ends, or 0 when that is no sensible place. */
static uint64_t section_end(uint64_t offset, const struct section *s)
{
    uint64_t n_bytes, end;
    if (s->n < 0 || __builtin_mul_overflow((uint64_t)s->n, (uint64_t)s->size, &n_bytes) ||
        __builtin_add_overflow(align_up(offset), n_bytes, &end) || end > CONTROL_MAX_BYTES)
        return 0;
    return end;
}

struct message *sections_pack(enum control_type type, const void *head, size_t n_head,
                              const struct section *s, int n_sections)
{
    uint64_t end = n_head;
    for (int i = 0; i < n_sections; i++) {
        end = section_end(end, &s[i]);
        if (end == 0)
            BUG("section %d of a message of type %d: %lld elements of %zu bytes", i, (int)type,
                (long long)s[i].n, s[i].size);
    }
    struct message *m = message_new(type, end);
    memcpy(m->payload, head, n_head);
    end = n_head;
    for (int i = 0; i < n_sections; i++) {
        const void *array;
        memcpy(&array, s[i].array, sizeof(array));
        if (array && s[i].n > 0)
            memcpy(m->payload + align_up(end), array, (size_t)s[i].n * s[i].size);
        end = section_end(end, &s[i]);
    }
    return m;
}

void sections_unpack_head(const struct message *m, enum control_type type, void *head,
                          size_t n_head)
{
    if (m->type != type)
        BUG("message of type %d unpacked as %d", (int)m->type, (int)type);
    if (m->n_bytes < n_head)
        message_garbled(m, "shorter than its head");
    memcpy(head, m->payload, n_head);
}

/* Where the last section ends. */
static uint64_t point_into(const struct message *m, size_t n_head, const struct section *s,
                           int n_sections)
{
    uint64_t end = n_head;
    for (int i = 0; i < n_sections; i++) {
        uint64_t start = align_up(end);
        end = section_end(end, &s[i]);
        if (end == 0 || end > m->n_bytes)
            message_garbled(m, "its counts do not fit its size");
        const void *array = m->payload + start;
        memcpy(s[i].array, &array, sizeof(array));
    }
    return end;
}

void sections_unpack_front(const struct message *m, size_t n_head, const struct section *s,
                           int n_sections)
{
    point_into(m, n_head, s, n_sections);
}

void sections_unpack(const struct message *m, size_t n_head, const struct section *s,
                     int n_sections)
{
    if (point_into(m, n_head, s, n_sections) != m->n_bytes)
        message_garbled(m, "longer than its counts say");
}

void message_garbled(const struct message *m, const char *what)
{
    die("message of type %d and %llu bytes from rank %d: %s", (int)m->type,
        (unsigned long long)m->n_bytes, m->rank, what);
}
