/*
 * A chained hash table under one mutex, its entries also in the order of use. See media_store.h.
 *
 * Contents are hashed, copied and freed outside the mutex, which is held for pointers alone.
 */
#include "daemon/gateway/media_store.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/engine/digest.h"
#include "kernels/log.h"

#define N_BUCKETS 16384
#define MAX_ENTRIES 65536
#define FIRST_BYTES ((size_t)64 << 10) // room for an upload that has begun
#define PREFIX "sha256:"
#define DIGITS 64

struct media {
    struct digest key;
    uint8_t *bytes; // [n_bytes]
    size_t n_bytes;
    unsigned kinds; // a bit for each enum part_kind it was uploaded as
    int n_pins;
    uint64_t last_use_ns;
    struct media *next;          // in its bucket, or of those to be freed
    struct media *older, *newer; // by last use
};

struct media_upload {
    struct media_store *store;
    enum part_kind kind;
    uint8_t *bytes; // [capacity], of which n_bytes have come
    size_t n_bytes, capacity;
    int64_t n_told; // or -1
    struct digest told;
    int has_told_digest;
    struct hasher *hasher;
};

struct media_store {
    struct media_store_options options;
    pthread_mutex_t mutex; // guards what follows
    struct media *buckets[N_BUCKETS];
    struct media *oldest, *newest;
    struct media_store_stats stats;
};

struct media_store *media_store_open(const struct media_store_options *o)
{
    struct media_store *s = xcalloc(1, sizeof(*s));

    s->options = *o;
    pthread_mutex_init(&s->mutex, NULL);
    return s;
}

/* ---- names ---- */

static int hex_value(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* 64 hexadecimal digits and nothing else. */
static int digest_parse(const char *hex, struct digest *out)
{
    if (strlen(hex) != DIGITS)
        return -1;
    for (size_t i = 0; i < sizeof(out->bytes); i++) {
        int high = hex_value(hex[2 * i]), low = hex_value(hex[2 * i + 1]);

        if (high < 0 || low < 0)
            return -1;
        out->bytes[i] = (uint8_t)(high << 4 | low);
    }
    return 0;
}

static void id_of(const struct digest *d, char id[MEDIA_ID_BYTES])
{
    int n = snprintf(id, MEDIA_ID_BYTES, PREFIX);

    for (size_t i = 0; i < sizeof(d->bytes); i++)
        n += snprintf(id + n, MEDIA_ID_BYTES - (size_t)n, "%02x", d->bytes[i]);
}

/* ---- the table; the mutex is held ---- */

static struct media **bucket_of(struct media_store *s, const struct digest *key)
{
    return &s->buckets[digest_prefix(key) % N_BUCKETS];
}

static struct media *find(struct media_store *s, const struct digest *key)
{
    struct media *m = *bucket_of(s, key);

    while (m && !digest_equal(&m->key, key))
        m = m->next;
    return m;
}

static void unlink_use(struct media_store *s, struct media *m)
{
    *(m->older ? &m->older->newer : &s->oldest) = m->newer;
    *(m->newer ? &m->newer->older : &s->newest) = m->older;
}

static void link_newest(struct media_store *s, struct media *m, uint64_t now_ns)
{
    m->last_use_ns = now_ns;
    m->older = s->newest;
    m->newer = NULL;
    *(s->newest ? &s->newest->newer : &s->oldest) = m;
    s->newest = m;
}

static void touch(struct media_store *s, struct media *m, uint64_t now_ns)
{
    unlink_use(s, m);
    link_newest(s, m, now_ns);
}

/* Out of the table and onto the list of those to be freed. */
static void take_out(struct media_store *s, struct media *m, struct media **dropped)
{
    struct media **at = bucket_of(s, &m->key);

    while (*at != m)
        at = &(*at)->next;
    *at = m->next;
    unlink_use(s, m);
    s->stats.n_bytes -= m->n_bytes;
    s->stats.n_entries--;
    m->next = *dropped;
    *dropped = m;
}

/* The one that goes first; NULL: all are pinned. */
static struct media *least_used(const struct media_store *s)
{
    struct media *m = s->oldest;

    while (m && m->n_pins)
        m = m->newer;
    return m;
}

static int make_room(struct media_store *s, size_t n_bytes, struct media **dropped)
{
    while (n_bytes > s->options.max_bytes - s->stats.n_bytes) {
        struct media *m = least_used(s);

        if (!m)
            return -1;
        take_out(s, m, dropped);
    }
    return 0;
}

static int is_expired(const struct media_store *s, const struct media *m, uint64_t now_ns)
{
    return !m->n_pins && now_ns > m->last_use_ns && now_ns - m->last_use_ns >= s->options.ttl_ns;
}

/* ---- without the mutex ---- */

static void free_all(struct media *dropped)
{
    while (dropped) {
        struct media *next = dropped->next;

        free(dropped->bytes);
        free(dropped);
        dropped = next;
    }
}

void media_store_close(struct media_store *s)
{
    struct media *dropped = NULL;

    if (s->stats.n_uploads)
        BUG("the media store is closed with %d uploads", s->stats.n_uploads);
    while (s->oldest)
        take_out(s, s->oldest, &dropped);
    free_all(dropped);
    pthread_mutex_destroy(&s->mutex);
    free(s);
}

void media_store_stats(struct media_store *s, struct media_store_stats *out)
{
    pthread_mutex_lock(&s->mutex);
    *out = s->stats;
    pthread_mutex_unlock(&s->mutex);
}

void media_store_sweep(struct media_store *s, uint64_t now_ns)
{
    struct media *dropped = NULL;

    pthread_mutex_lock(&s->mutex);
    for (struct media *m = s->oldest, *newer; m; m = newer) {
        newer = m->newer;
        if (is_expired(s, m, now_ns))
            take_out(s, m, &dropped);
        else if (!m->n_pins)
            break; // those behind it were used later
    }
    pthread_mutex_unlock(&s->mutex);
    free_all(dropped);
}

static int is_off(const struct media_store *s, struct error *err)
{
    if (s->options.max_bytes)
        return 0;
    error_set(err, ERROR_FAILED_PRECONDITION,
              "this server keeps no media: it was started with --media-store-bytes 0");
    return 1;
}

/* ---- uploads ---- */

static int refuse_size(const struct media_store *s, struct error *err)
{
    return error_set(err, ERROR_RESOURCE_EXHAUSTED,
                     "the file is larger than %llu bytes, the limit (--max-media-bytes and "
                     "--media-store-bytes)",
                     (unsigned long long)s->options.max_media_bytes);
}

/* One more upload, if there may be. */
static int count_upload(struct media_store *s, struct error *err)
{
    int is_full;

    pthread_mutex_lock(&s->mutex);
    is_full = s->stats.n_uploads >= s->options.max_uploads;
    s->stats.n_uploads += !is_full;
    pthread_mutex_unlock(&s->mutex);
    if (!is_full)
        return 0;
    return error_set(err, ERROR_RESOURCE_EXHAUSTED, "%d uploads are under way, the limit",
                     s->options.max_uploads);
}

struct media_upload *media_upload_begin(struct media_store *s, enum part_kind kind, int64_t n_bytes,
                                        const char *sha256, struct error *err)
{
    struct digest told = {{0}};
    struct media_upload *u;

    if (is_off(s, err))
        return NULL;
    if (sha256 && digest_parse(sha256, &told)) {
        error_set(err, ERROR_INVALID_ARGUMENT, "sha256 is not 64 hexadecimal digits");
        return NULL;
    }
    if (n_bytes >= 0 && (uint64_t)n_bytes > s->options.max_media_bytes) {
        refuse_size(s, err);
        return NULL;
    }
    if (count_upload(s, err))
        return NULL;
    u = xcalloc(1, sizeof(*u));
    *u = (struct media_upload){.store = s,
                               .kind = kind,
                               .n_told = n_bytes,
                               .told = told,
                               .has_told_digest = sha256 != NULL,
                               .hasher = hasher_new()};
    hasher_begin(u->hasher);
    return u;
}

/* Bytes that will come are counted before there is memory for them. */
static int reserve(struct media_store *s, size_t n_bytes, struct error *err)
{
    struct media *dropped = NULL;
    int status;

    pthread_mutex_lock(&s->mutex);
    status = make_room(s, n_bytes, &dropped);
    if (!status)
        s->stats.n_bytes += n_bytes;
    pthread_mutex_unlock(&s->mutex);
    free_all(dropped);
    if (!status)
        return 0;
    return error_set(err, ERROR_RESOURCE_EXHAUSTED,
                     "the %llu bytes for media (--media-store-bytes) are all in use by uploads and "
                     "requests that are under way",
                     (unsigned long long)s->options.max_bytes);
}

/* Twice as much each time: what is not written yet takes no memory. */
static int grow(struct media_upload *u, size_t n_bytes, struct error *err)
{
    size_t capacity = u->capacity ? u->capacity : FIRST_BYTES;
    uint8_t *more;

    while (capacity < n_bytes)
        capacity *= 2;
    if (capacity > u->store->options.max_media_bytes) // which n_bytes is not
        capacity = (size_t)u->store->options.max_media_bytes;
    if (capacity == u->capacity)
        return 0;
    more = realloc(u->bytes, capacity);
    if (!more)
        return error_set(err, ERROR_RESOURCE_EXHAUSTED, "the server has no memory for the upload");
    u->bytes = more;
    u->capacity = capacity;
    return 0;
}

int media_upload_add(struct media_upload *u, const void *bytes, size_t n_bytes, struct error *err)
{
    if (n_bytes > u->store->options.max_media_bytes - u->n_bytes)
        return refuse_size(u->store, err);
    if (u->n_told >= 0 && n_bytes > (uint64_t)u->n_told - u->n_bytes)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "more bytes have come than the %lld of n_bytes", (long long)u->n_told);
    if (n_bytes == 0)
        return 0;
    if (grow(u, u->n_bytes + n_bytes, err) || reserve(u->store, n_bytes, err))
        return -1;
    memcpy(u->bytes + u->n_bytes, bytes, n_bytes);
    hasher_add(u->hasher, bytes, n_bytes);
    u->n_bytes += n_bytes;
    return 0;
}

/* What was told of it, against what came. */
static int check_told(const struct media_upload *u, const struct digest *key, struct error *err)
{
    char id[MEDIA_ID_BYTES];

    if (u->n_bytes == 0)
        return error_set(err, ERROR_INVALID_ARGUMENT, "the upload has no bytes");
    if (u->n_told >= 0 && u->n_bytes != (uint64_t)u->n_told)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "%zu bytes have come, and n_bytes told of %lld", u->n_bytes,
                         (long long)u->n_told);
    if (!u->has_told_digest || digest_equal(&u->told, key))
        return 0;
    id_of(key, id);
    return error_set(err, ERROR_INVALID_ARGUMENT, "the content is not that of sha256: it is %s",
                     id);
}

/* The upload's bytes become an entry's, which takes over their count. */
static struct media *media_new(struct media_upload *u, const struct digest *key)
{
    struct media *m = xcalloc(1, sizeof(*m));
    uint8_t *exact = realloc(u->bytes, u->n_bytes);

    m->key = *key;
    m->bytes = exact ? exact : u->bytes;
    m->n_bytes = u->n_bytes;
    u->bytes = NULL;
    return m;
}

int media_upload_finish(struct media_upload *u, uint64_t now_ns, struct media_receipt *out,
                        struct error *err)
{
    struct media_store *s = u->store;
    struct media *dropped = NULL, *fresh, *m;
    struct digest key;

    hasher_end(u->hasher, &key);
    if (check_told(u, &key, err))
        return -1;
    *out = (struct media_receipt){.n_bytes = u->n_bytes, .made_ns = now_ns};
    id_of(&key, out->id);
    fresh = media_new(u, &key);
    u->n_bytes = 0; // counted as the entry's from now on

    pthread_mutex_lock(&s->mutex);
    m = find(s, &key);
    out->is_new = !m;
    if (m) {
        touch(s, m, now_ns);
        s->stats.n_bytes -= fresh->n_bytes;
        fresh->next = dropped;
        dropped = fresh;
    } else {
        while (s->stats.n_entries >= MAX_ENTRIES && least_used(s))
            take_out(s, least_used(s), &dropped);
        m = fresh;
        m->next = *bucket_of(s, &key);
        *bucket_of(s, &key) = m;
        link_newest(s, m, now_ns);
        s->stats.n_entries++;
    }
    m->kinds |= 1u << u->kind;
    pthread_mutex_unlock(&s->mutex);
    free_all(dropped);
    return 0;
}

void media_store_withdraw(struct media_store *s, const struct media_receipt *r)
{
    struct media *m, *dropped = NULL;
    struct digest key;

    if (!r->is_new || digest_parse(r->id + strlen(PREFIX), &key))
        return;
    pthread_mutex_lock(&s->mutex);
    m = find(s, &key);
    if (m && !m->n_pins && m->last_use_ns == r->made_ns)
        take_out(s, m, &dropped);
    pthread_mutex_unlock(&s->mutex);
    free_all(dropped);
}

void media_upload_free(struct media_upload *u)
{
    struct media_store *s;

    if (!u)
        return;
    s = u->store;
    pthread_mutex_lock(&s->mutex);
    s->stats.n_bytes -= u->n_bytes;
    s->stats.n_uploads--;
    pthread_mutex_unlock(&s->mutex);
    hasher_free(u->hasher);
    free(u->bytes);
    free(u);
}

/* ---- use ---- */

struct media *media_store_pin(struct media_store *s, const char *id, enum part_kind kind,
                              uint64_t now_ns, struct media_bytes *out, struct error *err)
{
    size_t n_prefix = strlen(PREFIX);
    struct media *m = NULL, *dropped = NULL;
    struct digest key;
    int is_kind = 0;

    if (is_off(s, err))
        return NULL;
    pthread_mutex_lock(&s->mutex);
    s->stats.n_queries++;
    if (strncmp(id, PREFIX, n_prefix) == 0 && digest_parse(id + n_prefix, &key) == 0)
        m = find(s, &key);
    if (m && is_expired(s, m, now_ns)) {
        take_out(s, m, &dropped);
        m = NULL;
    }
    if (m) {
        s->stats.n_hits++;
        is_kind = m->kinds >> kind & 1;
        if (is_kind) {
            m->n_pins++;
            touch(s, m, now_ns);
            *out = (struct media_bytes){m->bytes, m->n_bytes};
        }
    }
    pthread_mutex_unlock(&s->mutex);
    free_all(dropped);
    if (!m)
        error_set(
            err, ERROR_NOT_FOUND,
            "media_id %.80s is not here: it was never uploaded, was not used for too long, or "
            "made room for newer media; upload it again",
            id);
    else if (!is_kind)
        error_set(err, ERROR_INVALID_ARGUMENT, "media_id %.80s was uploaded as a %s", id,
                  kind == PART_VIDEO ? "picture, not as a video" : "video, not as a picture");
    return is_kind ? m : NULL;
}

void media_store_unpin(struct media_store *s, struct media *m, uint64_t now_ns)
{
    pthread_mutex_lock(&s->mutex);
    m->n_pins--;
    touch(s, m, now_ns);
    pthread_mutex_unlock(&s->mutex);
}
