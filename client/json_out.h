/*
 * JSON, written as it is made: commas and nesting are kept by the writer. Floats are written so
 * that they read back as the same bits; what JSON cannot say (NaN, infinity) becomes null.
 */
#ifndef INTERNVL_CLIENT_JSON_OUT_H
#define INTERNVL_CLIENT_JSON_OUT_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

struct json_out {
    FILE *file;
    int depth;
    uint64_t has_members; // one bit a level
};

/* `key` is NULL inside an array and at the top. */
void json_object_begin(struct json_out *j, const char *key);
void json_object_end(struct json_out *j);
void json_array_begin(struct json_out *j, const char *key);
void json_array_end(struct json_out *j);
void json_string(struct json_out *j, const char *key, const char *s);
/* Bytes that need not be UTF-8: broken parts become U+FFFD. */
void json_bytes(struct json_out *j, const char *key, const uint8_t *s, size_t n_bytes);
void json_uint(struct json_out *j, const char *key, uint64_t x);
void json_int(struct json_out *j, const char *key, int64_t x);
void json_float(struct json_out *j, const char *key, float x);
void json_double(struct json_out *j, const char *key, double x);
void json_bool(struct json_out *j, const char *key, int x);
void json_null(struct json_out *j, const char *key);
void json_end_line(struct json_out *j); // after the top value

#endif
