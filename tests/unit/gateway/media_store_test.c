/* media_store: what stays, what goes, what is counted, by a clock that the test turns. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <pthread.h>

#include "daemon/gateway/media_store.h"

#define TTL 100
#define MAX_BYTES 1000
#define MAX_MEDIA_BYTES 600
#define ID_OF_ABC                                                                                  \
    "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" // FIPS 180

static struct media_store *store(uint64_t max_bytes)
{
    struct media_store_options o = {.max_bytes = max_bytes,
                                    .max_media_bytes = MAX_MEDIA_BYTES,
                                    .ttl_ns = TTL,
                                    .max_uploads = 2};
    return media_store_open(&o);
}

static struct media_store_stats stats(struct media_store *s)
{
    struct media_store_stats x;

    media_store_stats(s, &x);
    return x;
}

/* Uploads n_bytes of `byte` in chunks of 7; the status. */
static enum error_code upload(struct media_store *s, int byte, size_t n_bytes, uint64_t now,
                              char id[MEDIA_ID_BYTES])
{
    struct error err = {0};
    struct media_upload *u = media_upload_begin(s, PART_IMAGE, -1, NULL, &err);
    uint8_t chunk[7];
    struct media_receipt r;

    memset(chunk, byte, sizeof(chunk));
    for (size_t i = 0; u && !err.code && i < n_bytes; i += sizeof(chunk))
        media_upload_add(u, chunk, n_bytes - i < sizeof(chunk) ? n_bytes - i : sizeof(chunk), &err);
    if (u && !err.code && media_upload_finish(u, now, &r, &err) == 0) {
        assert_int_equal(r.n_bytes, n_bytes);
        memcpy(id, r.id, MEDIA_ID_BYTES);
    }
    media_upload_free(u);
    return err.code;
}

static enum error_code use(struct media_store *s, const char *id, enum part_kind kind, uint64_t now)
{
    struct media_bytes bytes;
    struct error err = {0};
    struct media *m = media_store_pin(s, id, kind, now, &bytes, &err);

    assert_true((m == NULL) == (err.code != 0));
    if (m)
        media_store_unpin(s, m, now);
    return err.code;
}

static void test_content(void **state)
{
    (void)state;
    struct media_store *s = store(MAX_BYTES);
    struct error err = {0};
    struct media_upload *u = media_upload_begin(s, PART_VIDEO, 3, ID_OF_ABC + 7, &err);
    struct media_bytes bytes;
    struct media_receipt r, again;

    assert_int_equal(media_upload_add(u, "ab", 2, &err), 0);
    assert_int_equal(stats(s).n_bytes, 2); // while it arrives
    assert_int_equal(use(s, ID_OF_ABC, PART_VIDEO, 0), ERROR_NOT_FOUND);
    assert_int_equal(media_upload_add(u, "c", 1, &err), 0);
    assert_int_equal(media_upload_finish(u, 0, &r, &err), 0);
    media_upload_free(u);
    assert_string_equal(r.id, ID_OF_ABC);
    assert_true(r.is_new && r.n_bytes == 3);
    struct media *m = media_store_pin(s, r.id, PART_VIDEO, 0, &bytes, &err);
    assert_int_equal(bytes.n_bytes, 3);
    assert_memory_equal(bytes.bytes, "abc", 3);
    media_store_unpin(s, m, 0);
    assert_int_equal(use(s, r.id, PART_IMAGE, 0), ERROR_INVALID_ARGUMENT);

    u = media_upload_begin(s, PART_IMAGE, -1, NULL, &err); // again, as the other kind
    assert_int_equal(media_upload_add(u, "abc", 3, &err), 0);
    assert_int_equal(media_upload_finish(u, 0, &again, &err), 0);
    media_upload_free(u);
    assert_string_equal(again.id, r.id);
    assert_false(again.is_new);
    media_store_withdraw(s, &again); // it was there before
    assert_int_equal(stats(s).n_entries, 1);
    assert_int_equal(stats(s).n_bytes, 3);
    assert_int_equal(use(s, r.id, PART_IMAGE, 0), ERROR_OK);
    assert_int_equal(use(s, r.id, PART_VIDEO, 0), ERROR_OK);
    assert_int_equal(stats(s).n_queries, 5);
    assert_int_equal(stats(s).n_hits, 4);
    media_store_close(s);
}

static void test_unknown(void **state)
{
    (void)state;
    static const char *const wrong[] = {"",
                                        "sha256:",
                                        "abc",
                                        ID_OF_ABC,
                                        ID_OF_ABC "0",
                                        "sha256:zz7816bf8f01cfea414140de5dae2223"
                                        "b00361a396177a9cb410ff61f20015ad"};
    struct media_store *s = store(MAX_BYTES);

    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++)
        assert_int_equal(use(s, wrong[i], PART_IMAGE, 0), ERROR_NOT_FOUND);
    media_store_close(s);
}

static void test_told(void **state)
{
    (void)state;
    struct media_store *s = store(MAX_BYTES);
    struct error err = {0};
    struct media_upload *u;
    struct media_receipt r;

    assert_null(media_upload_begin(s, PART_IMAGE, MAX_MEDIA_BYTES + 1, NULL, &err));
    assert_int_equal(err.code, ERROR_RESOURCE_EXHAUSTED);
    assert_null(media_upload_begin(s, PART_IMAGE, INT64_MAX, NULL, &err));
    assert_null(media_upload_begin(s, PART_IMAGE, -1, "12", &err));
    assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
    assert_int_equal(stats(s).n_uploads, 0);

    for (int what = 0; what < 4; what++) { // empty, too few, too many, another content
        u = media_upload_begin(s, PART_IMAGE, what == 1 || what == 2 ? 3 : -1,
                               what == 3 ? ID_OF_ABC + 7 : NULL, &err);
        assert_non_null(u);
        err = (struct error){0};
        if (what == 0)
            assert_int_equal(media_upload_add(u, "", 0, &err), 0);
        else if (what == 2)
            assert_int_equal(media_upload_add(u, "abcd", 4, &err), -1);
        else
            assert_int_equal(media_upload_add(u, "ab", 2, &err), 0);
        if (what != 2)
            assert_int_equal(media_upload_finish(u, 0, &r, &err), -1);
        assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
        media_upload_free(u);
        assert_int_equal(stats(s).n_bytes, 0);
        assert_int_equal(stats(s).n_entries, 0);
    }
    media_store_close(s);
}

static void test_bounds(void **state)
{
    (void)state;
    struct media_store *s = store(MAX_BYTES);
    struct error err = {0};
    char id[MEDIA_ID_BYTES];
    static const uint8_t zeros[MAX_MEDIA_BYTES];

    assert_int_equal(upload(s, 1, MAX_MEDIA_BYTES, 0, id), ERROR_OK);
    assert_int_equal(upload(s, 2, MAX_MEDIA_BYTES + 1, 0, id), ERROR_RESOURCE_EXHAUSTED);
    struct media_upload *a = media_upload_begin(s, PART_IMAGE, -1, NULL, &err);
    struct media_upload *b = media_upload_begin(s, PART_IMAGE, -1, NULL, &err);
    assert_null(media_upload_begin(s, PART_IMAGE, -1, NULL, &err)); // the third at once
    assert_int_equal(err.code, ERROR_RESOURCE_EXHAUSTED);
    assert_int_equal(media_upload_add(a, zeros, 600, &err), 0); // what is there makes room
    assert_int_equal(stats(s).n_entries, 0);
    assert_int_equal(media_upload_add(b, zeros, 400, &err), 0);
    assert_int_equal(media_upload_add(b, zeros, 1, &err), -1); // what arrives does not
    assert_int_equal(err.code, ERROR_RESOURCE_EXHAUSTED);
    assert_int_equal(stats(s).n_bytes, MAX_BYTES);
    media_upload_free(a);
    assert_int_equal(media_upload_add(b, zeros, 1, &err), 0);
    media_upload_free(b);
    assert_int_equal(stats(s).n_bytes, 0);
    media_store_close(s);
}

static void test_eviction(void **state)
{
    (void)state;
    struct media_store *s = store(MAX_BYTES);
    struct media_bytes bytes;
    struct error err = {0};
    char a[MEDIA_ID_BYTES], b[MEDIA_ID_BYTES], c[MEDIA_ID_BYTES], d[MEDIA_ID_BYTES];

    assert_int_equal(upload(s, 'a', 400, 1, a), ERROR_OK);
    assert_int_equal(upload(s, 'b', 400, 2, b), ERROR_OK);
    assert_int_equal(use(s, a, PART_IMAGE, 3), ERROR_OK); // b is now the oldest
    assert_int_equal(upload(s, 'c', 400, 4, c), ERROR_OK);
    assert_int_equal(use(s, b, PART_IMAGE, 5), ERROR_NOT_FOUND);
    struct media *m = media_store_pin(s, a, PART_IMAGE, 6, &bytes, &err);
    assert_int_equal(upload(s, 'd', 600, 7, d), ERROR_OK); // c goes, a is held
    assert_int_equal(use(s, c, PART_IMAGE, 8), ERROR_NOT_FOUND);
    for (size_t i = 0; i < bytes.n_bytes; i++)
        assert_int_equal(bytes.bytes[i], 'a');
    struct media *n = media_store_pin(s, d, PART_IMAGE, 9, &bytes, &err);
    assert_int_equal(upload(s, 'e', 1, 10, c), ERROR_RESOURCE_EXHAUSTED); // both are held
    media_store_unpin(s, n, 11);
    media_store_unpin(s, m, 12);
    assert_int_equal(upload(s, 'e', 1, 13, c), ERROR_OK);
    assert_int_equal(use(s, d, PART_IMAGE, 14), ERROR_NOT_FOUND);
    assert_int_equal(use(s, a, PART_IMAGE, 14), ERROR_OK);
    media_store_close(s);
}

static void test_ttl(void **state)
{
    (void)state;
    struct media_store *s = store(MAX_BYTES);
    struct media_bytes bytes;
    struct error err = {0};
    char a[MEDIA_ID_BYTES], b[MEDIA_ID_BYTES];

    assert_int_equal(upload(s, 'a', 10, 0, a), ERROR_OK);
    assert_int_equal(use(s, a, PART_IMAGE, TTL - 1), ERROR_OK);
    assert_int_equal(use(s, a, PART_IMAGE, 2 * TTL - 2), ERROR_OK); // since the last use
    assert_int_equal(use(s, a, PART_IMAGE, 3 * TTL - 2), ERROR_NOT_FOUND);
    assert_int_equal(stats(s).n_bytes, 0);

    assert_int_equal(upload(s, 'a', 10, 1000, a), ERROR_OK);
    assert_int_equal(upload(s, 'b', 10, 1050, b), ERROR_OK);
    struct media *m = media_store_pin(s, a, PART_IMAGE, 1060, &bytes, &err);
    media_store_sweep(s, 1150);
    assert_int_equal(stats(s).n_entries, 1); // b is gone, a is held
    media_store_sweep(s, 5000);
    assert_int_equal(stats(s).n_entries, 1);
    media_store_unpin(s, m, 5000);
    media_store_sweep(s, 5000 + TTL - 1);
    assert_int_equal(stats(s).n_entries, 1);
    media_store_sweep(s, 5000 + TTL);
    assert_int_equal(stats(s).n_entries, 0);
    media_store_close(s);
}

/* A content that nobody was told of goes, unless somebody else has used it. */
static void test_withdrawn(void **state)
{
    (void)state;
    struct media_store *s = store(MAX_BYTES);
    struct error err = {0};
    struct media_bytes bytes;

    for (int is_used = 0; is_used < 3; is_used++) { // not, before, meanwhile
        struct media_upload *u = media_upload_begin(s, PART_IMAGE, -1, NULL, &err);
        struct media_receipt r;
        struct media *m = NULL;

        assert_int_equal(media_upload_add(u, "abc", 3, &err), 0);
        assert_int_equal(media_upload_finish(u, 5, &r, &err), 0);
        media_upload_free(u);
        if (is_used == 1)
            assert_int_equal(use(s, r.id, PART_IMAGE, 6), ERROR_OK);
        if (is_used == 2)
            m = media_store_pin(s, r.id, PART_IMAGE, 5, &bytes, &err);
        media_store_withdraw(s, &r);
        assert_int_equal(stats(s).n_entries, is_used > 0);
        if (m)
            media_store_unpin(s, m, 5);
        media_store_sweep(s, 1000);
    }
    media_store_close(s);
}

static void test_off(void **state)
{
    (void)state;
    struct media_store *s = store(0);
    struct error err = {0};

    assert_null(media_upload_begin(s, PART_IMAGE, -1, NULL, &err));
    assert_int_equal(err.code, ERROR_FAILED_PRECONDITION);
    assert_int_equal(use(s, ID_OF_ABC, PART_IMAGE, 0), ERROR_FAILED_PRECONDITION);
    media_store_close(s);
}

/* Several threads upload, use and let go of the same few contents in a store that holds half. */
static void *worker(void *arg)
{
    struct media_store *s = arg;
    char id[MEDIA_ID_BYTES];

    for (int i = 0; i < 400; i++) {
        struct media_bytes bytes;
        struct error err = {0};

        if (upload(s, i % 5, 300, (uint64_t)i, id))
            continue;
        struct media *m = media_store_pin(s, id, PART_IMAGE, (uint64_t)i, &bytes, &err);
        if (!m)
            continue;
        for (size_t k = 0; k < bytes.n_bytes; k++)
            if (bytes.bytes[k] != i % 5)
                abort();
        media_store_unpin(s, m, (uint64_t)i);
    }
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    struct media_store *s = store(MAX_BYTES);
    pthread_t threads[3];

    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, worker, s), 0);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    assert_int_equal(stats(s).n_uploads, 0);
    assert_int_equal(stats(s).n_bytes, 300 * stats(s).n_entries);
    media_store_close(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_content),   cmocka_unit_test(test_unknown),
        cmocka_unit_test(test_told),      cmocka_unit_test(test_bounds),
        cmocka_unit_test(test_eviction),  cmocka_unit_test(test_ttl),
        cmocka_unit_test(test_withdrawn), cmocka_unit_test(test_off),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
