/*
 * Content as a name: SHA-256 (libcrypto) of whatever bytes are added.
 *
 * What the caches of the engine are keyed by. It knows nothing of what is hashed; whoever adds
 * lists of bytes makes sure that their lengths are told too. A hasher belongs to one thread.
 */
#ifndef INTERNVLD_ENGINE_DIGEST_H
#define INTERNVLD_ENGINE_DIGEST_H

#include <stddef.h>
#include <stdint.h>

struct digest {
    uint8_t bytes[32];
};

struct hasher;

struct hasher *hasher_new(void);
void hasher_free(struct hasher *h); // accepts NULL
void hasher_begin(struct hasher *h);
void hasher_add(struct hasher *h, const void *bytes, size_t n_bytes);
void hasher_end(struct hasher *h, struct digest *out);

int digest_equal(const struct digest *a, const struct digest *b);
uint64_t digest_prefix(const struct digest *d); // its first 8 bytes: evenly spread

#endif
