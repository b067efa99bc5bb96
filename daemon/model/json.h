/*
 * JSON files of a checkpoint, with limits.
 *
 * cJSON does the parsing; this adds what a daemon needs before trusting it: a size limit, a depth
 * limit checked before recursion starts, no rubbish behind the value, and text that is safe to
 * print. Knows nothing of what the files mean.
 */
#ifndef INTERNVLD_MODEL_JSON_H
#define INTERNVLD_MODEL_JSON_H

#include <cjson/cJSON.h>
#include <stddef.h>

#include "kernels/error.h"

/* Parses `text` [n_bytes] (need not be terminated) whose objects and arrays nest at most max_depth
 * deep. Returns a tree that the caller frees with cJSON_Delete(), or NULL and an error that starts
 * with `what` (a file name). */
cJSON *json_parse(const char *text, size_t n_bytes, int max_depth, const char *what,
                  struct error *err);

/* The bytes of a regular file of at most max_bytes; caller frees. NULL and an error (NOT_FOUND when
 * there is no such file). */
char *json_read_file(const char *path, size_t max_bytes, size_t *n_bytes, struct error *err);

/* `s` with every byte outside printable ASCII as '?', cut to the buffer; returned. For messages. */
const char *json_printable(const char *s, char *buf, size_t n_bytes);
/* The value as JSON text, printable, cut to the buffer; returned. For messages. */
const char *json_shown(const cJSON *v, char *buf, size_t n_bytes);

/* 1 for a whole number from min to max; NULL is none. */
int json_is_integer(const cJSON *v, int min, int max);

#endif
