/*
 * One JSON object read field by field, each with its fallback and bounds.
 *
 * The first failure is kept and stops the rest: getters then return their fallback, so that a
 * reader of many fields asks once, at its end. null counts as absent. Knows no field by name.
 */
#ifndef INTERNVLD_MODEL_CONFIG_READER_H
#define INTERNVLD_MODEL_CONFIG_READER_H

#include <limits.h>

#include "daemon/model/json.h"
#include "kernels/error.h"

#define READER_REQUIRED INT_MIN // as a fallback of reader_int(): the key must be there

struct reader {
    const cJSON *object; // borrowed; NULL: every getter gives its fallback
    const char *where;   // the file and dotted path printed before a key
    struct error *err;
    int *failed;
};

/* Keeps the failure, if it is the first: `where`, then the sentence. */
void reader_refuse(const struct reader *r, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
const cJSON *reader_get(const struct reader *r, const char *key); // NULL: absent. Borrowed
int reader_int(const struct reader *r, const char *key, int fallback, int min, int max);
float reader_float(const struct reader *r, const char *key, double fallback, double min,
                   double max);
int reader_bool(const struct reader *r, const char *key, int fallback);
/* Borrowed from the tree; the fallback when absent or not a string. */
const char *reader_string(const struct reader *r, const char *key, const char *fallback);
/* The index of the key's string among `names` (NULL-terminated); `fallback` names the default. */
int reader_word(const struct reader *r, const char *key, const char *const *names,
                const char *fallback);
/* The object under `key`; its `object` is NULL when there is none. */
struct reader reader_sub(const struct reader *r, const char *key, const char *where);

#endif
