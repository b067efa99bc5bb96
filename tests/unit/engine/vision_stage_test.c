/*
 * The vision stage's dealing: tiles of one picture over all ranks, tiles of many requests in one
 * job, turns and priorities, cancelled requests, the bound on what is held, and each content
 * encoded once.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "daemon/engine/vision_stage.h"
#include "kernels/log.h"

#define N_FLOATS 2

/* Tiles with the contents first, first + 1, … */
static struct ticket *new_ticket(int32_t n_tiles, int32_t priority, uint32_t first)
{
    static uint64_t number;
    struct request *r = request_new(1 << 16);
    r->n_tiles = n_tiles;
    r->priority = priority;
    r->tile_digests = arena_alloc(&r->arena, (size_t)n_tiles + 1, sizeof(*r->tile_digests));
    for (int32_t i = 0; i < n_tiles; i++) {
        uint32_t content = first + (uint32_t)i;
        memcpy(r->tile_digests[i].bytes, &content, sizeof(content));
    }
    return ticket_new(r, ++number);
}

static void free_ticket(struct vision_stage *v, struct ticket *t)
{
    vision_stage_forget(v, t);
    request_free(t->request);
    ticket_free(t);
}

/* The next job goes to `rank` and has, in this order, `n` times (ticket, tile). */
static uint64_t expect_job(struct vision_stage *v, int32_t rank, int n, ...)
{
    const struct vision_job *job = vision_stage_next(v, 1);
    va_list args;
    assert_non_null(job);
    assert_int_equal(job->vision_index, rank);
    assert_int_equal(job->n_tiles, n);
    va_start(args, n);
    for (int i = 0; i < n; i++) {
        const struct ticket *t = va_arg(args, const struct ticket *);
        assert_ptr_equal(job->tiles[i].waiters[0].ticket, t);
        assert_int_equal(job->tiles[i].waiters[0].tile, va_arg(args, int));
    }
    va_end(args);
    return job->job_id;
}

static void expect_nothing(struct vision_stage *v)
{
    assert_null(vision_stage_next(v, 1));
}

/* A tile's features say its content. */
static void finish(struct vision_stage *v, uint64_t job_id)
{
    struct vision_job *job = vision_stage_find(v, job_id);
    assert_non_null(job);
    for (int32_t i = 0; i < job->n_tiles; i++) {
        uint32_t content;
        memcpy(&content, job->tiles[i].digest.bytes, sizeof(content));
        const float features[N_FLOATS] = {(float)content, (float)content + 0.5f};
        vision_stage_deliver(v, &job->tiles[i], features, 2);
    }
    vision_stage_end(v, job);
    assert_null(vision_stage_find(v, job_id));
}

static void expect_ready(const struct ticket *t, uint32_t first)
{
    assert_true(ticket_is_ready(t));
    for (int32_t i = 0; i < t->n_tiles; i++)
        assert_true(t->features[N_FLOATS * i] == (float)(first + (uint32_t)i) &&
                    t->features[N_FLOATS * i + 1] == (float)(first + (uint32_t)i) + 0.5f);
}

static void test_spread(void **state)
{
    (void)state;
    struct vision_stage v;
    vision_stage_init(&v, 2, 4, 1000, N_FLOATS, 0);
    struct ticket *album = new_ticket(13, 0, 100), *text = new_ticket(0, 0, 0);
    struct ticket *urgent = new_ticket(3, -1, 200), *small = new_ticket(3, 0, 300);
    vision_stage_add(&v, album, 1);
    vision_stage_add(&v, text, 1);
    uint64_t a = expect_job(&v, 0, 4, album, 0, album, 1, album, 2, album, 3);
    uint64_t b = expect_job(&v, 1, 4, album, 4, album, 5, album, 6, album, 7);
    expect_nothing(&v); // a rank has one job
    vision_stage_add(&v, urgent, 1);
    finish(&v, a);
    uint64_t c = expect_job(&v, 0, 4, urgent, 0, urgent, 1, urgent, 2, album, 8);
    finish(&v, b);
    finish(&v, c);
    assert_true(ticket_is_ready(urgent));
    uint64_t d = expect_job(&v, 1, 2, album, 9, album, 10); // an equal share for each idle rank
    uint64_t e = expect_job(&v, 0, 2, album, 11, album, 12);
    expect_nothing(&v);
    assert_int_equal(v.n_held, 16);
    assert_int_equal(v.n_queries, 0);
    free_ticket(&v, album); // cancelled: what comes back belongs to nobody
    finish(&v, d);
    finish(&v, e);
    vision_stage_add(&v, small, 1);
    uint64_t f = expect_job(&v, 1, 2, small, 0, small, 1); // it was sent fewer so far
    uint64_t g = expect_job(&v, 0, 1, small, 2);
    finish(&v, f);
    finish(&v, g);
    free_ticket(&v, small);
    free_ticket(&v, urgent);
    free_ticket(&v, text);
    assert_int_equal(v.n_held, 0);
    assert_int_equal(v.n_jobs, 0);
    vision_stage_release(&v);
}

/* An album delays a picture that comes behind it by the job under way and no more; albums share. */
static void test_turns(void **state)
{
    (void)state;
    struct vision_stage v;
    vision_stage_init(&v, 1, 4, 1000, N_FLOATS, 0);
    struct ticket *a = new_ticket(100, 0, 1000), *b = new_ticket(100, 0, 2000);
    struct ticket *one = new_ticket(1, 0, 1), *low = new_ticket(1, 1, 2), *late;
    vision_stage_add(&v, a, 1);
    uint64_t job = expect_job(&v, 0, 4, a, 0, a, 1, a, 2, a, 3);
    vision_stage_add(&v, b, 1);
    vision_stage_add(&v, low, 1);
    vision_stage_add(&v, one, 1);
    finish(&v, job);
    job = expect_job(&v, 0, 4, b, 0, a, 4, one, 0, a, 5);
    finish(&v, job);
    assert_true(ticket_is_ready(one));
    job = expect_job(&v, 0, 4, b, 1, a, 6, b, 2, a, 7);
    late = new_ticket(1, 0, 3);
    vision_stage_add(&v, late, 1);
    free_ticket(&v, a); // 92 tiles that are never sent
    finish(&v, job);
    job = expect_job(&v, 0, 4, late, 0, b, 3, b, 4, b, 5);
    finish(&v, job);
    free_ticket(&v, b);
    job = expect_job(&v, 0, 1, low, 0);
    finish(&v, job);
    expect_nothing(&v);
    free_ticket(&v, one);
    free_ticket(&v, low);
    free_ticket(&v, late);
    vision_stage_release(&v);
}

/* Pictures without end, as many as the rank can take, do not keep an album from its half. */
static void test_no_starvation(void **state)
{
    (void)state;
    for (int32_t max_tiles = 1; max_tiles <= 4; max_tiles++) {
        struct vision_stage v;
        vision_stage_init(&v, 1, max_tiles, 1000, N_FLOATS, 0);
        struct ticket *album = new_ticket(40, 0, 1000), *pictures[200];
        int n = 0, n_tiles = 0;
        vision_stage_add(&v, album, 1);
        while (!ticket_is_ready(album)) {
            for (int32_t i = 0; i < max_tiles; i++) {
                assert_true(n < 200);
                pictures[n] = new_ticket(1, 0, 1);
                vision_stage_add(&v, pictures[n++], 1);
            }
            const struct vision_job *job = vision_stage_next(&v, 1);
            assert_int_equal(job->n_tiles, max_tiles);
            n_tiles += max_tiles;
            finish(&v, job->job_id);
        }
        assert_true(n_tiles <= 2 * 40 + max_tiles);
        for (int i = 0; i < n; i++)
            free_ticket(&v, pictures[i]);
        free_ticket(&v, album);
        vision_stage_release(&v);
    }
}

/* Tiles of another shape, type or with captures never share a job, and none of them starves. */
static void test_unlike(void **state)
{
    (void)state;
    struct vision_stage v;
    vision_stage_init(&v, 1, 8, 1000, N_FLOATS, 1 << 20);
    struct ticket *a = new_ticket(2, 0, 1), *b = new_ticket(2, 0, 1), *c = new_ticket(1, 0, 9);
    b->request->vision_captures = VISION_CAPTURE_HIDDEN_STATES;
    c->request->height = 28;
    vision_stage_add(&v, a, 1);
    vision_stage_add(&v, b, 1);
    vision_stage_add(&v, c, 1);
    finish(&v, expect_job(&v, 0, 2, a, 0, a, 1));
    uint64_t job = expect_job(&v, 0, 2, b, 0, b, 1); // known, but captured: encoded again
    assert_false(vision_stage_find(&v, job)->tiles[0].is_shared);
    finish(&v, job);
    finish(&v, expect_job(&v, 0, 1, c, 0));
    expect_nothing(&v);
    assert_int_equal(v.n_queries, 3);
    assert_int_equal(v.n_hits, 0);
    free_ticket(&v, a);
    free_ticket(&v, b);
    free_ticket(&v, c);
    vision_stage_release(&v);
}

static void test_held(void **state)
{
    (void)state;
    struct vision_stage v;
    vision_stage_init(&v, 1, 8, 4, N_FLOATS, 0);
    struct ticket *a = new_ticket(6, 0, 0), *b = new_ticket(2, 0, 10), *c = new_ticket(1, 0, 20);
    vision_stage_add(&v, a, 1);
    vision_stage_add(&v, b, 1);
    vision_stage_add(&v, c, 1);
    /* larger than the bound, but alone */
    finish(&v, expect_job(&v, 0, 6, a, 0, a, 1, a, 2, a, 3, a, 4, a, 5));
    expect_nothing(&v);
    free_ticket(&v, a);
    finish(&v, expect_job(&v, 0, 3, b, 0, b, 1, c, 0));
    free_ticket(&v, b);
    free_ticket(&v, c);
    vision_stage_release(&v);
}

/* Each content is encoded once: known at arrival, in a job under way, twice in one request. */
static void test_shared(void **state)
{
    (void)state;
    struct vision_stage v;
    vision_stage_init(&v, 2, 4, 1000, N_FLOATS, 1 << 20);
    struct ticket *a = new_ticket(2, 0, 1), *b = new_ticket(3, 0, 1), *c = new_ticket(2, 0, 2);
    struct ticket *twice = new_ticket(2, 0, 50);
    twice->request->tile_digests[1] = twice->request->tile_digests[0];
    vision_stage_add(&v, a, 1);
    uint64_t first = expect_job(&v, 0, 1, a, 0), second = expect_job(&v, 1, 1, a, 1);
    vision_stage_add(&v, b, 1); // waits for both, lacks the third tile
    vision_stage_add(&v, c, 1); // waits for one
    assert_int_equal(b->n_tiles_asked, 2);
    free_ticket(&v, a); // the one whose pixels were sent is cancelled: the others still get theirs
    finish(&v, first);
    uint64_t third = expect_job(&v, 0, 1, c, 1); // b finds it under way
    finish(&v, second);
    assert_false(ticket_is_ready(b));
    finish(&v, third);
    expect_ready(b, 1);
    expect_ready(c, 2);
    assert_int_equal(b->vision_end_ns, 2);
    assert_int_equal(b->n_cached_tiles, 3);
    assert_int_equal(c->n_cached_tiles, 1);
    struct ticket *warm = new_ticket(3, 0, 1);
    vision_stage_add(&v, warm, 7);
    expect_ready(warm, 1); // at once
    assert_int_equal(warm->vision_end_ns, 7);
    expect_nothing(&v);
    vision_stage_add(&v, twice, 1);
    uint64_t once = expect_job(&v, 1, 1, twice, 0);
    expect_nothing(&v); // the second one waits for the first
    finish(&v, once);
    assert_true(ticket_is_ready(twice) && twice->features[N_FLOATS] == 50.0f);
    assert_int_equal(v.n_queries, 2 + 3 + 2 + 3 + 2);
    assert_int_equal(v.n_hits, 3 + 1 + 3 + 1);
    free_ticket(&v, b);
    free_ticket(&v, c);
    free_ticket(&v, warm);
    free_ticket(&v, twice);
    assert_int_equal(v.n_held, 0);
    vision_stage_release(&v);
}

/* Random arrivals, cancels and results: every request that is not cancelled gets its own features,
 * each idle moment has no tile waiting, and with a cache fewer tiles are encoded. */
static int64_t play(uint64_t cache_bytes, unsigned seed)
{
    enum { N_LIVE = 12, N_CONTENTS = 60 };
    struct ticket *live[N_LIVE] = {0};
    uint32_t first[N_LIVE];
    struct vision_stage v;
    const struct vision_job *job;
    int64_t n_encoded = 0;
    vision_stage_init(&v, 3, 3, 40, N_FLOATS, cache_bytes);
    for (int round = 0; round < 20000; round++) {
        int i = rand_r(&seed) % N_LIVE, what = rand_r(&seed) % 3, is_cancel = rand_r(&seed) % 9 < 1;
        if (what == 0 && !live[i]) {
            first[i] = (uint32_t)(rand_r(&seed) % N_CONTENTS);
            live[i] = new_ticket(1 + rand_r(&seed) % 20, rand_r(&seed) % 2, first[i]);
            vision_stage_add(&v, live[i], 1);
        } else if (what == 1 && live[i] && (ticket_is_ready(live[i]) || is_cancel)) {
            if (ticket_is_ready(live[i]))
                expect_ready(live[i], first[i]);
            free_ticket(&v, live[i]);
            live[i] = NULL;
        } else if (what == 2) {
            struct vision_job *back = &v.jobs[rand_r(&seed) % 3];
            if (back->job_id != 0)
                finish(&v, back->job_id);
        }
        while ((job = vision_stage_next(&v, 1)) != NULL)
            n_encoded += job->n_tiles;
        assert_true(v.n_jobs > 0 || v.n_waiting == 0 || v.n_held > 20);
    }
    for (int i = 0; i < N_LIVE; i++)
        if (live[i])
            free_ticket(&v, live[i]);
    assert_int_equal(v.n_held, 0);
    assert_int_equal(v.n_waiting, 0);
    vision_stage_release(&v);
    return n_encoded;
}

static void test_random(void **state)
{
    (void)state;
    int64_t off = play(0, 3), small = play(1000, 3), large = play(1 << 20, 3);
    assert_true(off > 10000 && large < 2 * 80 && small < off);
    print_message("tiles encoded: %lld without a cache, %lld with a small one, %lld with all\n",
                  (long long)off, (long long)small, (long long)large);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_spread),        cmocka_unit_test(test_turns),
        cmocka_unit_test(test_no_starvation), cmocka_unit_test(test_unlike),
        cmocka_unit_test(test_held),          cmocka_unit_test(test_shared),
        cmocka_unit_test(test_random),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
