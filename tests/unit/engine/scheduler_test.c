/*
 * The scheduler in single cases, each a few steps long; scheduler_property_test.c is the breadth.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "daemon/engine/scheduler.h"
#include "daemon/engine/stream.h"
#include "kernels/log.h"

#define EOS 3
#define IMAGE 7
#define FEATURE_DIM 2

static const int32_t eos_ids[] = {EOS};

static struct request *text_request(int32_t n_ids, int32_t max_tokens)
{
    struct request *r = request_new(1 << 20);
    r->ids = arena_alloc(&r->arena, (size_t)n_ids, sizeof(int32_t));
    r->n_ids = n_ids;
    r->max_tokens = max_tokens;
    r->sampling.temperature = 0.0f;
    for (int32_t i = 0; i < n_ids; i++)
        r->ids[i] = 10 + i;
    return r;
}

static struct scheduler_config small_config(void)
{
    return (struct scheduler_config){.page_size = 4,
                                     .n_pages = 16,
                                     .max_model_len = 64,
                                     .max_num_seqs = 4,
                                     .max_num_batched_tokens = 8,
                                     .n_batches_in_flight = 1,
                                     .feature_dim = FEATURE_DIM,
                                     .eos_ids = eos_ids,
                                     .n_eos = 1};
}

/* Ends the step with the same token for every sample. */
static void answer(struct scheduler *s, struct step *p, int32_t id)
{
    struct sample_result samples[16];
    memset(samples, 0, sizeof(samples));
    for (int32_t i = 0; i < p->n_samples; i++)
        samples[i].token.id = id;
    scheduler_update(s, p, samples, p->n_samples, 2);
}

static void test_check(void **state)
{
    (void)state;
    struct scheduler_config c = small_config();
    struct error err;
    struct request *r = text_request(63, 1);
    assert_int_equal(scheduler_check(&c, r, &err), 0);
    r->n = 5;
    assert_int_equal(scheduler_check(&c, r, &err), -1);
    assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
    request_free(r);
    r = text_request(64, 1);
    assert_int_equal(scheduler_check(&c, r, &err), -1);
    assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
    r->max_tokens = 0; // a pass over the prompt alone needs no room for an answer
    assert_int_equal(scheduler_check(&c, r, &err), 0);
    c.n_pages = 15;
    assert_int_equal(scheduler_check(&c, r, &err), -1);
    assert_int_equal(err.code, ERROR_RESOURCE_EXHAUSTED);
    request_free(r);
}

/* A long prompt in chunks does not keep a running answer waiting for a single step. */
static void test_decode_beside_prefill(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct ticket *a = scheduler_add(&s, text_request(3, 50));
    answer(&s, scheduler_step(&s, 1), 9);
    struct ticket *b = scheduler_add(&s, text_request(30, 5));
    for (int i = 0; b->prefill_end_ns == 0; i++) {
        struct step *p = scheduler_step(&s, 1);
        assert_int_equal(p->n_items, 2);
        assert_ptr_equal(p->items[0].sequence->ticket, a);
        assert_int_equal(p->items[0].n_new, 1);
        assert_ptr_equal(p->items[1].sequence->ticket, b);
        assert_int_equal(p->items[1].n_new, i < 4 ? 7 : 2);
        answer(&s, p, 9);
    }
    assert_int_equal(a->sequences[0].n_output, 6);
    assert_int_equal(b->sequences[0].n_output, 1);
    scheduler_release(&s);
}

static void test_end_rules(void **state)
{
    (void)state;
    static const int32_t stop_ids[] = {20, 21};
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct request *r = text_request(3, 10);
    r->stop_token_ids = stop_ids;
    r->n_stop_token_ids = 2;
    r->min_tokens = 1;
    struct ticket *t = scheduler_add(&s, r);
    struct step *p = scheduler_step(&s, 1);
    assert_int_equal(s.batch->samples[0].n_banned, 3); // end token and two stop ids
    assert_int_equal(s.batch->banned[s.batch->samples[0].banned_start], EOS);
    answer(&s, p, 21); // were it drawn, it would not end the answer
    assert_int_equal(s.events[0].finish, FINISH_NONE);
    p = scheduler_step(&s, 1);
    assert_int_equal(s.batch->samples[0].n_banned, 0);
    answer(&s, p, 21);
    assert_int_equal(s.events[0].finish, FINISH_STOP);
    assert_true(s.events[0].is_end);
    assert_int_equal(t->n_unfinished, 0);
    assert_int_equal(scheduler_n_pages_used(&s), 0);
    request_free(scheduler_remove(&s, t));

    r = text_request(3, 10);
    r->ignore_eos = 1;
    scheduler_add(&s, r);
    answer(&s, scheduler_step(&s, 1), EOS);
    assert_int_equal(s.events[0].finish, FINISH_NONE);
    scheduler_release(&s);
}

static void test_context_is_full(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct ticket *t = scheduler_add(&s, text_request(60, 100));
    while (t->n_unfinished > 0)
        answer(&s, scheduler_step(&s, 1), 9);
    assert_int_equal(t->sequences[0].n_output, 4);
    assert_int_equal(s.events[0].finish, FINISH_LENGTH);
    scheduler_release(&s);
}

/* n = 4: one prompt pass, four samples of its last row, shared pages, one copy fewer than writers.
 */
static void test_fork(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct request *r = text_request(6, 10);
    r->n = 4;
    struct ticket *t = scheduler_add(&s, r);
    struct step *p = scheduler_step(&s, 1);
    assert_int_equal(p->n_samples, 4);
    for (int32_t i = 0; i < 4; i++) {
        assert_int_equal(s.batch->samples[i].candidate, i);
        assert_int_equal(s.batch->samples[i].row, 5);
    }
    assert_int_equal(scheduler_n_pages_used(&s), 2);
    answer(&s, p, 9);
    assert_int_equal(s.n_events, 4);
    assert_int_equal(scheduler_n_pages_used(&s), 2);
    p = scheduler_step(&s, 1);
    assert_int_equal(p->n_items, 4);
    assert_int_equal(s.batch->n_copies, 3); // the last writes in place
    assert_int_equal(scheduler_n_pages_used(&s), 5);
    for (int32_t i = 1; i < 4; i++) // the full page is still one
        assert_int_equal(t->sequences[i].pages[0], t->sequences[0].pages[0]);
    answer(&s, p, 9);
    scheduler_release(&s);
}

/* A request that is cancelled while a batch names its pages keeps them until that batch is back. */
static void test_cancel_in_flight(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct ticket *t = scheduler_add(&s, text_request(6, 10));
    struct step *p = scheduler_step(&s, 1);
    request_free(scheduler_remove(&s, t));
    assert_int_equal(scheduler_n_pages_used(&s), 2);
    assert_int_equal(s.n_running, 0);
    answer(&s, p, 9);
    assert_int_equal(s.n_events, 0);
    assert_int_equal(scheduler_n_pages_used(&s), 0);
    scheduler_release(&s);
}

static void test_not_finite(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct ticket *a = scheduler_add(&s, text_request(3, 10));
    struct ticket *b = scheduler_add(&s, text_request(3, 10));
    struct step *p = scheduler_step(&s, 1);
    struct sample_result samples[2] = {{.not_finite = 1}, {.token.id = 9}};
    scheduler_update(&s, p, samples, 2, 2);
    assert_int_equal(s.events[0].finish, FINISH_ERROR);
    assert_ptr_equal(s.events[0].ticket, a);
    assert_int_equal(s.events[1].finish, FINISH_NONE);
    assert_int_equal(b->sequences[0].n_output, 1);
    scheduler_release(&s);
}

/* A smaller priority number is served first; pictures that are not encoded hold nobody up. */
static void test_order_of_service(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    c.max_num_seqs = 1;
    scheduler_init(&s, &c);
    struct request *picture = text_request(4, 1);
    picture->n_tiles = 1;
    picture->priority = -1;
    struct ticket *a = scheduler_add(&s, picture);
    struct ticket *b = scheduler_add(&s, text_request(3, 1));
    struct request *urgent = text_request(3, 1);
    urgent->priority = -1;
    struct ticket *u = scheduler_add(&s, urgent);
    struct ticket *expected[] = {u, a, b};
    for (int i = 0; i < 3; i++) {
        struct step *p = scheduler_step(&s, 1);
        assert_ptr_equal(p->items[0].sequence->ticket, expected[i]);
        answer(&s, p, 9);
        request_free(scheduler_remove(&s, expected[i]));
        if (i == 0)
            a->n_tiles_done = 1;
    }
    assert_null(scheduler_step(&s, 1));
    scheduler_release(&s);
}

/* A higher priority takes a running one's place at once and gives it back; an equal one waits. */
static void test_priority(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    c.max_num_seqs = 2;
    scheduler_init(&s, &c);
    struct ticket *low[2];
    for (int i = 0; i < 2; i++) {
        struct request *r = text_request(3, 10);
        r->priority = 1;
        low[i] = scheduler_add(&s, r);
    }
    answer(&s, scheduler_step(&s, 1), 9);
    struct request *equal = text_request(3, 10), *high = text_request(3, 2);
    equal->priority = 1;
    struct ticket *e = scheduler_add(&s, equal);
    struct step *p = scheduler_step(&s, 1);
    assert_int_equal(p->n_items, 2);
    assert_ptr_equal(p->items[1].sequence->ticket, low[1]);
    struct ticket *h = scheduler_add(&s, high);
    assert_null(scheduler_step(&s, 1)); // both are in a batch
    answer(&s, p, 9);
    p = scheduler_step(&s, 1);
    assert_int_equal(p->n_items, 2);
    assert_ptr_equal(p->items[0].sequence->ticket, low[0]);
    assert_ptr_equal(p->items[1].sequence->ticket, h);
    assert_int_equal(low[1]->n_preempted, 1);
    assert_int_equal(low[0]->n_preempted, 0);
    answer(&s, p, 9);
    answer(&s, scheduler_step(&s, 1), 9); // the high one has its two tokens
    assert_int_equal(h->n_unfinished, 0);
    p = scheduler_step(&s, 1);
    assert_ptr_equal(p->items[1].sequence->ticket, low[1]);
    answer(&s, p, 9);
    assert_int_equal(low[1]->sequences[0].n_output, 3); // it went on where it was
    assert_int_equal(e->sequences[0].n_output, 0);
    scheduler_release(&s);
}

/* Nobody is preempted in vain: all that is below would not make enough room. */
static void test_priority_in_vain(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    scheduler_init(&s, &c);
    struct request *first = text_request(36, 10), *below = text_request(3, 10);
    struct request *large = text_request(40, 10);
    below->priority = 1;
    scheduler_add(&s, first);
    struct ticket *b = scheduler_add(&s, below);
    while (b->first_token_ns == 0)
        answer(&s, scheduler_step(&s, 1), 9);
    scheduler_add(&s, large);
    struct step *p = scheduler_step(&s, 1);
    assert_int_equal(p->n_items, 2);
    assert_int_equal(b->n_preempted, 0);
    answer(&s, p, 9);
    scheduler_release(&s);
}

/* Two batches in flight share the running sequences. */
static void test_share_of_pipeline(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = small_config();
    c.n_batches_in_flight = 2;
    scheduler_init(&s, &c);
    for (int i = 0; i < 4; i++)
        scheduler_add(&s, text_request(2, 10));
    answer(&s, scheduler_step(&s, 1), 9);
    struct step *first = scheduler_step(&s, 1), *second = scheduler_step(&s, 1);
    assert_int_equal(first->n_items, 2);
    assert_int_equal(second->n_items, 2);
    assert_null(scheduler_step(&s, 1));
    answer(&s, first, 9);
    answer(&s, second, 9);
    scheduler_release(&s);
}

/* ---- the prefix cache ---- */

/* Runs the request to its end and returns how much of its prompt was cached. */
static int32_t run_cached(struct scheduler *s, struct request *r)
{
    struct ticket *t = scheduler_add(s, r);
    while (t->n_unfinished > 0)
        answer(s, scheduler_step(s, 1), 9);
    int32_t n = t->n_cached_tokens;
    request_free(scheduler_remove(s, t));
    return n;
}

static struct scheduler_config cached_config(void)
{
    struct scheduler_config c = small_config();
    c.enable_prefix_caching = 1;
    c.n_features_per_tile = 4;
    return c;
}

static void test_prefix(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = cached_config();
    scheduler_init(&s, &c);
    assert_int_equal(run_cached(&s, text_request(12, 3)), 0);
    assert_int_equal(scheduler_n_pages_used(&s), 0);
    assert_int_equal(run_cached(&s, text_request(12, 3)), 8); // one token is left to compute
    assert_int_equal(run_cached(&s, text_request(13, 3)), 12);
    struct request *r = text_request(13, 3);
    r->cache_salt = "mine";
    assert_int_equal(run_cached(&s, r), 0);
    r = text_request(13, 3);
    r->cache_salt = "mine";
    assert_int_equal(run_cached(&s, r), 12);
    r = text_request(13, 3);
    r->ids[5] = 49; // in the second page
    assert_int_equal(run_cached(&s, r), 4);
    r = text_request(13, 0);
    r->captures = CAPTURE_LOGITS;
    assert_int_equal(run_cached(&s, r), 0);
    /* The answer's tokens are cached as well: a conversation goes on. */
    r = text_request(20, 3);
    r->ids[12] = r->ids[13] = r->ids[14] = 9;
    assert_int_equal(run_cached(&s, r), 12);
    r = text_request(10, 7);
    run_cached(&s, r);
    r = text_request(17, 1);
    for (int32_t i = 10; i < 17; i++)
        r->ids[i] = 9;
    assert_int_equal(run_cached(&s, r), 16);
    /* All pages are needed for another prompt: nothing is left of the old ones. */
    r = text_request(60, 4);
    for (int32_t i = 0; i < 60; i++)
        r->ids[i] = 8;
    run_cached(&s, r);
    assert_int_equal(run_cached(&s, text_request(13, 3)), 0);
    scheduler_release(&s);
}

/* The same ids with other pictures are other prompts. */
static void test_prefix_pictures(void **state)
{
    (void)state;
    static const struct {
        uint64_t salts[2];
        int32_t n_cached;
    } cases[] = {{{1, 2}, 0}, {{1, 2}, 8}, {{1, 3}, 4}, {{2, 1}, 0}, {{2, 1}, 8}, {{3, 2}, 0}};
    struct scheduler s;
    struct scheduler_config c = cached_config();
    scheduler_init(&s, &c);
    for (size_t k = 0; k < sizeof(cases) / sizeof(cases[0]); k++) {
        struct request *r = text_request(10, 1);
        for (int32_t i = 0; i < 8; i++)
            r->ids[i] = IMAGE;
        r->image_token_id = IMAGE;
        r->n_tiles = 2;
        r->tile_digests = arena_alloc(&r->arena, 2, sizeof(struct digest));
        for (int i = 0; i < 2; i++)
            r->tile_digests[i].bytes[0] = (uint8_t)cases[k].salts[i];
        struct ticket *t = scheduler_add(&s, r);
        t->features = xcalloc(8, FEATURE_DIM * sizeof(float));
        t->n_tiles_done = 2;
        while (t->n_unfinished > 0)
            answer(&s, scheduler_step(&s, 1), 9);
        assert_int_equal(t->n_cached_tokens, cases[k].n_cached);
        request_free(scheduler_remove(&s, t));
    }
    scheduler_release(&s);
}

/* A key is not believed: what it stands for is compared. */
static void test_prefix_verified(void **state)
{
    (void)state;
    struct scheduler s;
    struct scheduler_config c = cached_config();
    scheduler_init(&s, &c);
    run_cached(&s, text_request(13, 1));
    for (int32_t i = 0; i < s.prefix.n_pages; i++)
        if (s.prefix.pages[i].serial == 2) // as if another prompt's second page had the same key
            s.prefix.pages[i].content[0] ^= 1;
    assert_int_equal(run_cached(&s, text_request(13, 1)), 4);
    assert_int_equal(run_cached(&s, text_request(13, 1)), 4); // and is not overwritten
    scheduler_release(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_check),
        cmocka_unit_test(test_decode_beside_prefill),
        cmocka_unit_test(test_end_rules),
        cmocka_unit_test(test_context_is_full),
        cmocka_unit_test(test_fork),
        cmocka_unit_test(test_cancel_in_flight),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_order_of_service),
        cmocka_unit_test(test_priority),
        cmocka_unit_test(test_priority_in_vain),
        cmocka_unit_test(test_share_of_pipeline),
        cmocka_unit_test(test_prefix),
        cmocka_unit_test(test_prefix_pictures),
        cmocka_unit_test(test_prefix_verified),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
