/*
 * The one-shot all-reduce with all ranks of a group in this process, one kernel after the other:
 * each but the last waits in vain for those behind it, and the last has the sum. Ranks in processes
 * of their own: comm_nccl_test.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "cuda_op_case.h"
#include "kernels/cuda_all_reduce.h"

#define SHORT_NS 1000000

static struct cuda_all_reduce group[ALL_REDUCE_RANKS_MAX];

static void open_group(struct backend *b, int size)
{
    for (int r = 0; r < size; r++)
        cuda_all_reduce_open(&group[r], b, r, size);
    for (int r = 0; r < size; r++) {
        for (int other = 0; other < size; other++)
            group[r].mailboxes[other] = group[other].mailboxes[other];
    }
}

static void close_group(struct backend *b, int size)
{
    for (int r = 0; r < size; r++)
        cuda_all_reduce_close(&group[r], b);
}

static float tree(const float *p, size_t stride, int n)
{
    size_t half = (size_t)(n / 2);

    return n == 1 ? p[0] : tree(p, stride, n / 2) + tree(p + half * stride, stride, n / 2);
}

/* One call of all ranks, `last` being the last; x begins `shift` elements behind an aligned place.
 */
static void check_call(struct backend *b, int size, int last, size_t n, size_t shift, int captured)
{
    float *parts = case_floats((int64_t)n * size, 1.0f, DTYPE_F32);
    float *x = (float *)op_alloc(b, (n + shift + 1) * sizeof(float)) + shift;
    float *got = calloc(n + 1, sizeof(*got));
    struct graph *g = NULL;

    for (int i = 0; i < size; i++) {
        int r = (last + 1 + i) % size;
        const struct cuda_all_reduce *one = &group[r];
        op_upload(b, x, parts + (size_t)r * n, n * sizeof(float));
        op_upload(b, x + n, &(float){7.0f}, sizeof(float));
        if (captured) {
            op_graph_begin(b);
            backend_cuda_all_reduce(b, one, x, n, SHORT_NS, 0);
            g = op_graph_end(b);
            op_graph_launch(b, g);
        } else {
            backend_cuda_all_reduce(b, one, x, n, SHORT_NS, 0);
        }
        op_download(b, got, x, (n + 1) * sizeof(float));
        op_graph_free(b, g);
        assert_true(got[n] == 7.0f);
        if (r == last) {
            assert_int_equal(*one->overdue, 0);
        } else {
            assert_in_range(*one->overdue, 1, size);
            assert_int_not_equal(*one->overdue, r + 1);
        }
        *one->overdue = 0;
    }
    for (size_t i = 0; i < n; i++) {
        if (got[i] != tree(parts + i, n, size))
            fail_msg("%zu elements among %d: element %zu is %.9g, not %.9g", n, size, i, got[i],
                     tree(parts + i, n, size));
    }
    free(got);
    op_free(b, x - shift);
    case_clear(b);
}

/* The host ends a wait that would last an hour. */
static void test_abort(void **state)
{
    (void)state;
    struct backend *b = case_open(DTYPE_F32, 1);
    float *x = op_alloc(b, sizeof(*x));

    open_group(b, 2);
    *group[0].overdue = 1;
    backend_cuda_all_reduce(b, &group[0], x, 1, (uint64_t)3600 * 1000000000, 0);
    op_sync(b);
    assert_int_equal(*group[0].overdue, 1);
    close_group(b, 2);
    op_free(b, x);
    backend_close(b);
}

static void test_all_reduce(void **state)
{
    (void)state;
    static const size_t lengths[] = {1, 5, 256, 2047, 2048, 2049, 7000};
    struct backend *b = case_open(DTYPE_F32, 1);
    unsigned char ones[4096]; // the flags of both kinds

    memset(ones, 0xff, sizeof(ones));
    case_seed(50);
    for (int size = 2; size <= ALL_REDUCE_RANKS_MAX; size *= 2) {
        open_group(b, size);
        if (size == 4) // generations overflow at the first call
            for (int r = 0; r < size; r++)
                op_upload(b, group[r].mailboxes[r], ones, sizeof(ones));
        for (int i = 0; i < 7; i += 1 + case_small) {
            check_call(b, size, i % size, lengths[i], i % 2 ? 1 : 0, 0);
            check_call(b, size, (i + 1) % size, lengths[6 - i], 0, 1);
        }
        if (!case_small && size == 2)
            check_call(b, size, 0, cuda_all_reduce_max(size), 0, 0);
        close_group(b, size);
    }
    backend_close(b);
}

int cuda_all_reduce_tests(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_all_reduce),
                                       cmocka_unit_test(test_abort)};

    return cmocka_run_group_tests_name("cuda all-reduce", tests, NULL, NULL);
}
