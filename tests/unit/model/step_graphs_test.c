/*
 * The sizes of recorded decode steps: which graph answers for which step.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "daemon/model/step_graphs.h"

/* Every slot a pointer of its own, so that find() says which it took. */
static void fill(struct step_graphs *g)
{
    for (int i = 0; i < g->n_row_sizes; i++)
        for (int j = 0; j < g->n_context_sizes; j++)
            g->graphs[i][j] = (struct graph *)(uintptr_t)(1 + i * STEP_GRAPHS_CONTEXT_SIZES + j);
}

static void test_every_step_has_the_next_size(void **state)
{
    struct step_graphs g;
    (void)state;
    for (int32_t max_rows = 1; max_rows <= 300; max_rows++) {
        int32_t held = max_rows < STEP_GRAPHS_MAX_ROWS ? max_rows : STEP_GRAPHS_MAX_ROWS, rows = 0;
        step_graphs_init(&g, max_rows, 32768);
        fill(&g);
        assert_int_equal(g.rows[g.n_row_sizes - 1], held);
        assert_int_equal(g.contexts[g.n_context_sizes - 1], 32768);
        for (int32_t n = 1; n <= held; n++) {
            assert_non_null(step_graphs_find(&g, n, 1, &rows));
            assert_in_range(rows, n, n < 8 ? 2 * n : n + 7);
            assert_true(rows <= held);
        }
        assert_null(step_graphs_find(&g, held + 1, 1, &rows));
    }
}

static void test_contexts(void **state)
{
    struct step_graphs g;
    int32_t rows = 0;
    (void)state;
    step_graphs_init(&g, 1, 5000);
    fill(&g);
    assert_int_equal(g.n_context_sizes, 3); // 1024, 4096, 5000
    assert_ptr_equal(step_graphs_find(&g, 1, 1024, &rows), g.graphs[0][0]);
    assert_ptr_equal(step_graphs_find(&g, 1, 1025, &rows), g.graphs[0][1]);
    assert_ptr_equal(step_graphs_find(&g, 1, 4097, &rows), g.graphs[0][2]);
    assert_null(step_graphs_find(&g, 1, 5001, &rows));
    step_graphs_init(&g, 1, INT32_MAX); // more than there are sizes: the last is the longest
    assert_int_equal(g.n_context_sizes, STEP_GRAPHS_CONTEXT_SIZES);
    assert_int_equal(g.contexts[STEP_GRAPHS_CONTEXT_SIZES - 1], INT32_MAX);
}

static void test_nothing_recorded(void **state)
{
    struct step_graphs g = {0};
    int32_t rows = 7;
    (void)state;
    assert_null(step_graphs_find(&g, 1, 1, &rows));
    assert_int_equal(rows, 7);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_step_has_the_next_size),
        cmocka_unit_test(test_contexts),
        cmocka_unit_test(test_nothing_recorded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
