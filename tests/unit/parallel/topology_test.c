/* Every small layout: roles, and the rank that each function names, are each other's inverse. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "parallel/topology.h"

static void check_rank(const struct layout *l, int rank)
{
    struct topology t;
    struct error err = {0};
    assert_int_equal(topology_init(&t, rank, layout_world(l), l, &err), 0);
    assert_int_equal(t.rank, rank);
    if (rank == 0) {
        assert_int_equal(t.role, ROLE_GATEWAY);
        assert_int_equal(t.vision_index, -1);
        assert_int_equal(t.stage, -1);
        assert_int_equal(t.shard, -1);
    } else if (rank <= l->n_vision) {
        assert_int_equal(t.role, ROLE_VISION);
        assert_int_equal(topology_vision_rank(&t, t.vision_index), rank);
        assert_int_equal(t.stage, -1);
    } else {
        assert_int_equal(t.role, ROLE_LANGUAGE);
        assert_int_equal(topology_language_rank(&t, t.stage, t.shard), rank);
        assert_int_equal(t.vision_index, -1);
        assert_true(t.stage < l->pipeline_parallel && t.shard < l->tensor_parallel);
    }
}

static void test_every_layout(void **state)
{
    (void)state;
    for (int V = 1; V <= 4; V++)
        for (int P = 1; P <= 4; P++)
            for (int T = 1; T <= 8; T *= 2) {
                const struct layout l = {V, T, P};
                assert_int_equal(layout_world(&l), 1 + V + P * T);
                for (int rank = 0; rank < layout_world(&l); rank++)
                    check_rank(&l, rank);
            }
}

static void test_picture_of_the_header(void **state)
{
    (void)state;
    static const char *const names[] = {"gateway",
                                        "vision 0",
                                        "language stage 0 shard 0",
                                        "language stage 0 shard 1",
                                        "language stage 1 shard 0",
                                        "language stage 1 shard 1"};
    const struct layout l = {1, 2, 2};
    struct topology t;
    char buf[64], small[5];
    assert_int_equal(topology_init(&t, 3, 6, &l, NULL), 0);
    for (int rank = 0; rank < 6; rank++)
        assert_string_equal(topology_describe(&t, rank, buf, sizeof(buf)), names[rank]);
    assert_string_equal(topology_describe(&t, 6, buf, sizeof(buf)), "no such rank");
    assert_string_equal(topology_describe(&t, 0, small, sizeof(small)), "gate");
    assert_string_equal(role_name(ROLE_VISION), "vision");
}

static void refuse(int rank, int world, struct layout l, const char *words)
{
    struct topology t;
    struct error err = {0};
    assert_int_equal(topology_init(&t, rank, world, &l, &err), -1);
    assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
    assert_non_null(strstr(err.msg, words));
}

static void test_refusals(void **state)
{
    (void)state;
    refuse(0, 5, (struct layout){1, 2, 2}, "1 gateway + 1 vision + 2 stages x 2 shards = 6 ranks");
    refuse(0, 5, (struct layout){1, 3, 1}, "tensor-parallel size 3");
    refuse(0, 5, (struct layout){1, 16, 1}, "tensor-parallel size 16");
    refuse(0, 5, (struct layout){0, 2, 2}, "0 vision ranks");
    refuse(0, 5, (struct layout){1, 2, 0}, "pipeline-parallel size 0");
    refuse(-1, 3, (struct layout){1, 1, 1}, "rank -1");
    refuse(3, 3, (struct layout){1, 1, 1}, "rank 3");
    refuse(0, 3, (struct layout){2147483647, 8, 2147483647}, "but the job has 3");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_layout),
        cmocka_unit_test(test_picture_of_the_header),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
