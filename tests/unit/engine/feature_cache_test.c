/*
 * The feature cache against a list kept by hand: what is found, what makes room, how many bytes.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "daemon/engine/feature_cache.h"

#define N_FLOATS 3
#define N_KEYS 40

/* Keys whose first bytes are few values, so that buckets have several and bits at the end decide.
 */
static struct digest key_of(int i)
{
    struct digest d = {{0}};
    d.bytes[0] = (uint8_t)(i % 3);
    d.bytes[31] = (uint8_t)i;
    return d;
}

/* Of all slots and their bookkeeping. */
static uint64_t cache_bytes(const struct feature_cache *c)
{
    return (uint64_t)c->n_slots * ((uint64_t)c->n_floats * sizeof(float) + sizeof(*c->tiles)) +
           c->n_buckets * sizeof(*c->buckets);
}

static void check_features(const float *features, int i)
{
    for (int k = 0; k < N_FLOATS; k++)
        assert_true(features[k] == (float)(i * 10 + k));
}

/* Random finds and puts beside a list of keys, newest first. */
static void test_least_recently_used(void **state)
{
    (void)state;
    const size_t slot = N_FLOATS * sizeof(float) + sizeof(struct cached_tile) + 8;
    struct feature_cache c;
    int order[N_KEYS], n = 0, n_found = 0, n_evicted = 0;
    unsigned seed = 5;
    feature_cache_init(&c, 7 * slot + slot / 2, N_FLOATS);
    assert_int_equal(c.n_slots, 7);
    assert_true(cache_bytes(&c) <= 7 * slot + slot / 2);
    for (int round = 0; round < 20000; round++) {
        int i = rand_r(&seed) % (rand_r(&seed) % 2 ? 9 : N_KEYS), at = 0;
        struct digest key = key_of(i);
        while (at < n && order[at] != i)
            at++;
        if (rand_r(&seed) % 2) {
            const float *features = feature_cache_find(&c, &key);
            assert_int_equal(features != NULL, at < n);
            if (!features)
                continue;
            check_features(features, i);
            n_found++;
        } else {
            const float features[N_FLOATS] = {(float)(i * 10), (float)(i * 10 + 1),
                                              (float)(i * 10 + 2)};
            feature_cache_put(&c, &key, features);
            if (at == n && n < 7)
                n++;
            else if (at == n)
                n_evicted++, at--;
        }
        memmove(order + 1, order, (size_t)(at < n ? at : n - 1) * sizeof(*order));
        order[0] = i;
    }
    assert_true(n_found > 1000 && n_evicted > 1000);
    feature_cache_release(&c);
}

static void test_off(void **state)
{
    (void)state;
    struct feature_cache c;
    const float features[N_FLOATS] = {0};
    struct digest key = key_of(1);
    feature_cache_init(&c, 0, N_FLOATS);
    feature_cache_put(&c, &key, features);
    assert_null(feature_cache_find(&c, &key));
    assert_int_equal(cache_bytes(&c), 0);
    feature_cache_release(&c);
    feature_cache_init(&c, N_FLOATS * sizeof(float), N_FLOATS); // no room for the bookkeeping
    assert_int_equal(c.n_slots, 0);
    feature_cache_release(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_least_recently_used),
        cmocka_unit_test(test_off),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
