/*
 * The vision stage's dealing: tiles of one picture over all ranks, least-loaded first, order of
 * service, no rank far ahead, cancelled requests, and the bound on what is held.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "daemon/engine/vision_stage.h"

static struct ticket *new_ticket(int32_t n_tiles, int32_t priority)
{
    static uint64_t number;
    struct request *r = request_new(1 << 16);
    r->n_tiles = n_tiles;
    r->priority = priority;
    return ticket_new(r, ++number);
}

static void free_ticket(struct vision_stage *v, struct ticket *t)
{
    vision_stage_forget(v, t);
    request_free(t->request);
    ticket_free(t);
}

static void assert_next(struct vision_stage *v, const struct ticket *t, int32_t rank,
                        int32_t first_tile, int32_t n_tiles)
{
    struct vision_job job;
    assert_true(vision_stage_next(v, &job));
    assert_ptr_equal(job.ticket, t);
    assert_int_equal(job.vision_index, rank);
    assert_int_equal(job.first_tile, first_tile);
    assert_int_equal(job.n_tiles, n_tiles);
}

static void test_spread(void **state)
{
    (void)state;
    struct vision_stage v;
    struct vision_job job;
    vision_stage_init(&v, 2, 4, 1000);
    struct ticket *album = new_ticket(13, 0), *text = new_ticket(0, 0), *urgent = new_ticket(3, -1);
    vision_stage_add(&v, album);
    vision_stage_add(&v, text);
    assert_next(&v, album, 0, 0, 4);
    assert_next(&v, album, 1, 4, 4);
    vision_stage_add(&v, urgent); // goes before what is left of the album
    assert_next(&v, urgent, 0, 0, 2);
    assert_next(&v, urgent, 1, 2, 1);
    assert_false(vision_stage_next(&v, &job)); // both have a job ahead
    assert_true(vision_stage_done(&v, 1, &job));
    assert_ptr_equal(job.ticket, album);
    assert_false(vision_stage_done(&v, 1, &job));
    assert_next(&v, album, 0, 8, 4);
    assert_true(vision_stage_done(&v, 2, &job));
    assert_next(&v, album, 1, 12, 1);
    assert_false(vision_stage_next(&v, &job));
    assert_int_equal(v.n_held, 16);
    free_ticket(&v, album); // cancelled: what comes back belongs to nobody
    assert_true(vision_stage_done(&v, 6, &job));
    assert_null(job.ticket);
    free_ticket(&v, urgent);
    free_ticket(&v, text);
    assert_int_equal(v.n_held, 0);
    vision_stage_release(&v);
}

static void test_held(void **state)
{
    (void)state;
    struct vision_stage v;
    struct vision_job job;
    vision_stage_init(&v, 1, 8, 4);
    struct ticket *a = new_ticket(6, 0), *b = new_ticket(1, 0);
    vision_stage_add(&v, a);
    vision_stage_add(&v, b);
    assert_next(&v, a, 0, 0, 6); // larger than the bound, but alone
    assert_true(vision_stage_done(&v, 1, &job));
    assert_false(vision_stage_next(&v, &job));
    free_ticket(&v, a);
    assert_next(&v, b, 0, 0, 1);
    free_ticket(&v, b);
    vision_stage_release(&v);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_spread),
        cmocka_unit_test(test_held),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
