/*
 * A message as a fixed head and a list of arrays: the one way in which batch.c and
 * batch_results.c lay bytes out.
 *
 * Each section starts at a multiple of 8 bytes, in the order of the list, with nothing between but
 * zeros. The same list drives packing (arrays are copied in) and unpacking (arrays are pointed in),
 * so the two cannot drift apart. Knows no message in particular.
 */
#ifndef INTERNVLD_PARALLEL_BATCH_WIRE_H
#define INTERNVLD_PARALLEL_BATCH_WIRE_H

#include <stddef.h>
#include <stdint.h>

#include "parallel/control.h"

/* `array` is the address of the pointer to n elements of `size` bytes. */
struct section {
    void *array;
    int64_t n;
    size_t size;
};

/* The bytes of an array that is NULL are zero. BUG when a count is negative or the whole passes
 * CONTROL_MAX_BYTES. */
struct message *sections_pack(enum control_type type, const void *head, size_t n_head,
                              const struct section *s, int n_sections);
/* Copies the head out; dies unless the message has this type and at least n_head bytes. */
void sections_unpack_head(const struct message *m, enum control_type type, void *head,
                          size_t n_head);
/* Points every array into the message; dies unless it ends exactly where the last section does. */
void sections_unpack(const struct message *m, size_t n_head, const struct section *s,
                     int n_sections);
/* The same for the first sections of a message whose others are not known yet; the message may be
 * longer. */
void sections_unpack_front(const struct message *m, size_t n_head, const struct section *s,
                           int n_sections);

/* Ends the process: `m` contradicts itself. */
_Noreturn void message_garbled(const struct message *m, const char *what);

#endif
