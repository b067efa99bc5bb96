/*
 * The bearer token: read once from a file, compared in constant time. Knows no RPC.
 */
#ifndef INTERNVLD_GATEWAY_AUTH_H
#define INTERNVLD_GATEWAY_AUTH_H

#include <stddef.h>

#include "kernels/error.h"

#define AUTH_TOKEN_MAX 512

struct auth {
    size_t n_bytes;
    char token[AUTH_TOKEN_MAX];
};

/* Reads the first line of `path`: 16 to 511 printable characters without blanks. A file that others
 * may read gets a warning line. */
int auth_load(struct auth *a, const char *path, struct error *err);
/* 1 when `header` [n_bytes], the value of "authorization", is "Bearer " and the token. The time
 * taken does not depend on where they differ. */
int auth_accepts(const struct auth *a, const char *header, size_t n_bytes);

#endif
