/*
 * Media that clients have uploaded, by the SHA-256 of their content, within a bound of bytes.
 *
 * Bytes count from the moment they arrive. What has not been used for a while expires; when room is
 * needed, what was used least recently goes first; what is pinned, or still arriving, stays. Any
 * thread; an upload is used by one thread at a time. Times are CLOCK_MONOTONIC and the caller's.
 * Knows no calls and no pictures.
 */
#ifndef INTERNVLD_GATEWAY_MEDIA_STORE_H
#define INTERNVLD_GATEWAY_MEDIA_STORE_H

#include <stdint.h>

#include "daemon/processor/processor.h"
#include "kernels/error.h"

#define MEDIA_ID_BYTES 72 // "sha256:", 64 hexadecimal digits, NUL

struct media_store;
struct media_upload;
struct media;

struct media_store_options {
    uint64_t max_bytes;       // of all contents; 0: the store is off
    uint64_t max_media_bytes; // of one content
    uint64_t ttl_ns;          // since its last use
    int max_uploads;          // at once
};

struct media_store_stats {
    uint64_t n_bytes; // uploads that are arriving included
    int n_entries, n_uploads;
    uint64_t n_queries, n_hits; // of media_store_pin()
};

struct media_store *media_store_open(const struct media_store_options *o);
void media_store_close(struct media_store *s); // no upload and no pin is left
void media_store_stats(struct media_store *s, struct media_store_stats *out);
/* Lets go of what has expired. Call it now and then. */
void media_store_sweep(struct media_store *s, uint64_t now_ns);

/* Begins an upload, which media_upload_free() ends. n_bytes (-1: not told) and sha256 (64 digits;
 * NULL: not told) are what the client says of the whole. FAILED_PRECONDITION when the store is off,
 * RESOURCE_EXHAUSTED for too many bytes or uploads, INVALID_ARGUMENT. */
struct media_upload *media_upload_begin(struct media_store *s, enum part_kind kind, int64_t n_bytes,
                                        const char *sha256, struct error *err);
/* Copies the next bytes. RESOURCE_EXHAUSTED past a bound, INVALID_ARGUMENT past what was told. */
int media_upload_add(struct media_upload *u, const void *bytes, size_t n_bytes, struct error *err);
struct media_receipt {
    char id[MEDIA_ID_BYTES];
    uint64_t n_bytes, made_ns;
    int is_new; // the content was not there before
};
/* All has arrived: from now on it can be pinned by its id. INVALID_ARGUMENT when it is empty or not
 * what was told. */
int media_upload_finish(struct media_upload *u, uint64_t now_ns, struct media_receipt *out,
                        struct error *err);
/* Nobody was told of the id after all: a content that was new, and was not used since, goes. */
void media_store_withdraw(struct media_store *s, const struct media_receipt *r);
void media_upload_free(struct media_upload *u); // NULL allowed; drops what was not finished

/* The content, which stays where it is until it is unpinned. NOT_FOUND for an id that is unknown,
 * or no more known; INVALID_ARGUMENT when it was uploaded as the other kind; FAILED_PRECONDITION
 * when the store is off. */
struct media *media_store_pin(struct media_store *s, const char *id, enum part_kind kind,
                              uint64_t now_ns, struct media_bytes *out, struct error *err);
void media_store_unpin(struct media_store *s, struct media *m, uint64_t now_ns); // that is a use

#endif
