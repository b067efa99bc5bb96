/*
 * Unit tests of the base: error, log, arena, tensor; and the doors of the back end: what they
 * refuse, what an unknown instruction set does, memory.
 */
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/arena.h"
#include "kernels/backend.h"
#include "kernels/error.h"
#include "kernels/log.h"

/* Runs fn(arg) in a child, its standard error in `text`; returns wait()'s status. */
static int in_child(void (*fn)(void *), void *arg, char *text, size_t size)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        close(ends[1]);
        signal(SIGABRT, SIG_DFL);
        fn(arg);
        _exit(0);
    }
    close(ends[1]);
    size_t n = 0;
    for (ssize_t got = 1; got > 0 && n + 1 < size; n += (size_t)got) {
        got = read(ends[0], text + n, size - 1 - n);
        if (got < 0)
            got = 0;
    }
    text[n] = '\0';
    close(ends[0]);
    int status = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return status;
}

static void test_error(void **state)
{
    (void)state;
    struct error e = {0};
    assert_int_equal(error_set(&e, ERROR_NOT_FOUND, "no page %d", 7), -1);
    assert_int_equal(e.code, ERROR_NOT_FOUND);
    assert_string_equal(e.msg, "no page 7");
    assert_int_equal(error_set(NULL, ERROR_INTERNAL, "nobody listens"), -1);
    assert_string_equal(error_code_name(ERROR_RESOURCE_EXHAUSTED), "RESOURCE_EXHAUSTED");
    assert_string_equal(error_code_name((enum error_code)99), "UNKNOWN");

    /* A cut message ends on a whole code point, whatever the width of the one that is cut. */
    static const char *const points[] = {"a", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80"};
    for (int shift = 0; shift < 4; shift++) {
        for (int p = 0; p < 4; p++) {
            char text[600] = "";
            memset(text, 'x', (size_t)shift);
            while (strlen(text) < 500)
                strcat(text, points[p]);
            error_set(&e, ERROR_INTERNAL, "%s", text);
            size_t n = strlen(e.msg), width = strlen(points[p]);
            assert_true(n > 250 && (n - (size_t)shift) % width == 0);
        }
    }
}

static void dies(void *arg)
{
    (void)arg;
    log_set_rank(3);
    die("rank %s", "gone");
}

static void has_bug(void *arg)
{
    (void)arg;
    BUG("%d is not %d", 1, 2);
}

static void logs(void *arg)
{
    setenv("INTERNVLD_LOG", arg, 1);
    log_init();
    log_debug("control", "one");
    log_debug("comm", "two");
    log_info("control", "three");
    log_warn("comm", "four");
}

static void test_log(void **state)
{
    (void)state;
    char text[4096];
    int status = in_child(dies, NULL, text, sizeof(text));
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    assert_non_null(strstr(text, " r3 "));
    assert_non_null(strstr(text, "rank gone\n"));
    assert_non_null(strstr(text, "kernels_test.c"));
    status = in_child(has_bug, NULL, text, sizeof(text));
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    assert_non_null(strstr(text, "1 is not 2"));

    in_child(logs, "debug,control", text, sizeof(text));
    assert_non_null(strstr(text, "control: one\n"));
    assert_null(strstr(text, "two"));
    assert_non_null(strstr(text, "four"));
    in_child(logs, "warn", text, sizeof(text));
    assert_null(strstr(text, "three"));
    assert_non_null(strstr(text, "warn comm: four\n"));
}

static void test_arena(void **state)
{
    (void)state;
    struct arena a;
    arena_init(&a, 1 << 20);
    char *all[200];
    for (int i = 0; i < 200; i++) {
        size_t n = (size_t)(1 + i * 37 % 4000);
        all[i] = arena_alloc(&a, n, 1);
        assert_non_null(all[i]);
        assert_int_equal((uintptr_t)all[i] % 64, 0);
        for (size_t j = 0; j < n; j++)
            assert_int_equal(all[i][j], 0);
        memset(all[i], i, n);
    }
    for (int i = 0; i < 200; i++)
        assert_int_equal((unsigned char)all[i][i * 37 % 4000], i);
    assert_string_equal(arena_strndup(&a, "picture", 3), "pic");
    assert_null(arena_alloc(&a, SIZE_MAX / 2, 4)); // n * size overflows
    assert_null(arena_alloc(&a, 1 << 20, 1));      // past the budget
    assert_non_null(arena_alloc(&a, 1, 1));        // which still holds room for a little
    arena_release(&a);
    assert_null(a.chunks);
    arena_release(&a);
}

static void test_tensor(void **state)
{
    (void)state;
    float data[4 * 6];
    struct tensor t = tensor_2d(data, DTYPE_F32, 4, 6), c = tensor_columns(&t, 2, 3);
    struct tensor r = tensor_rows(&c, 1, 2);
    assert_ptr_equal(c.data, data + 2);
    assert_int_equal(c.row_stride, 6);
    assert_ptr_equal(r.data, data + 6 + 2);
    assert_int_equal(tensor_n_rows(&r), 2);
    assert_int_equal(tensor_n_cols(&r), 3);
    struct tensor v = tensor_3d(data, DTYPE_F32, 2, 3, 4);
    assert_int_equal(tensor_n_rows(&v), 6);
    assert_int_equal(tensor_n_elements(&v), 24);
    assert_string_equal(dtype_name(DTYPE_BF16), "bfloat16");
    assert_int_equal(dtype_size(DTYPE_I64), 8);
}

static void test_half_floats(void **state)
{
    (void)state;
    assert_int_equal(f32_to_bf16(1.0f), 0x3f80);
    assert_int_equal(f32_to_bf16(1.00390625f), 0x3f80);  // half way: to even
    assert_int_equal(f32_to_bf16(1.01171875f), 0x3f82);  // half way: to even
    assert_int_equal(f32_to_bf16(1.003906369f), 0x3f81); // above half way
    assert_int_equal(f32_to_bf16(3.4e38f), 0x7f80);      // rounds to infinity
    assert_int_equal(f32_to_bf16(-INFINITY), 0xff80);
    assert_true(isnan(bf16_to_f32(f32_to_bf16(NAN))));
    /* Every float16, against the compiler's own type. */
    for (uint32_t h = 0; h < 65536; h++) {
        uint16_t bits = (uint16_t)h;
        _Float16 f;
        memcpy(&f, &bits, sizeof(f));
        float want = (float)f, got = f16_to_f32(bits);
        assert_true(isnan(want) ? isnan(got) : memcmp(&want, &got, sizeof(got)) == 0);
    }
    uint16_t in[2] = {0x3c00, 0x3f80};
    float out[2];
    tensor_widen(out, in, DTYPE_F16, 1);
    tensor_widen(out + 1, in + 1, DTYPE_BF16, 1);
    assert_true(out[0] == 1 && out[1] == 1);
}

static void open_unknown(void *arg)
{
    backend_cpu_open(1, arg);
}

static void mismatched_matmul(void *arg)
{
    struct backend *b = arg;
    float data[64] = {0};
    struct tensor w = tensor_2d(data, DTYPE_F32, 4, 4), x = tensor_2d(data, DTYPE_F32, 2, 5);
    struct tensor y = tensor_2d(data + 32, DTYPE_F32, 2, 4);
    struct linear l = {.out_dim = 4, .in_dim = 4, .n_lanes = 1, .lane_start = {0, 4}};
    op_linear_pack(b, &l, &w, NULL);
    op_matmul(b, &y, &x, &l, NULL);
}

static void three_lanes(void *arg)
{
    float data[64] = {0};
    struct tensor w = tensor_2d(data, DTYPE_F32, 4, 6);
    struct linear l = {.out_dim = 4, .in_dim = 6, .n_lanes = 3, .lane_start = {0, 2, 4, 6}};
    op_linear_pack(arg, &l, &w, NULL);
}

static void foreign_page(void *arg)
{
    float data[64] = {0};
    int32_t one[2] = {0, 1}, page = 5;
    struct tensor k = tensor_2d(data, DTYPE_F32, 1, 2);
    struct kv_pages kv = {.k = data, .v = data, .dtype = DTYPE_F32, .n_pages = 2};
    struct paged_layout layout = {.n_sequences = 1, .n_tokens = 1, .max_context_len = 1};
    kv.page_size = 16;
    kv.n_kv_heads = 1;
    kv.head_dim = 2;
    layout.query_start = layout.page_start = one;
    layout.context_len = one + 1;
    layout.pages = &page;
    op_kv_write(arg, &kv, &layout, &k, &k, NULL);
}

static void test_backend_doors(void **state)
{
    (void)state;
    char text[1024];
    int status = in_child(open_unknown, "sse9", text, sizeof(text));
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    assert_non_null(strstr(text, "sse9"));
    assert_true(backend_cpu_has("scalar"));
    assert_false(backend_cpu_has("sse9"));

    struct backend *b = backend_cpu_open(1, "scalar");
    assert_string_equal(b->ops->describe(b), "cpu portable C, 1 thread");
    void (*const wrong[])(void *) = {mismatched_matmul, three_lanes, foreign_page};
    for (int i = 0; i < 3; i++) {
        status = in_child(wrong[i], b, text, sizeof(text));
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
        assert_non_null(strstr(text, "BUG"));
    }
    backend_close(b);
    backend_close(NULL);
}

/* Blocks that lie together: more than a region of them, each holding its own bytes until it is
 * freed, in an order of no meaning, and new ones between. */
static void test_many_blocks(void **state)
{
    (void)state;
    enum { N = 300, ROUNDS = 3 };
    static unsigned char *blocks[N];
    static size_t sizes[N];
    struct backend *b = backend_cpu_open(1, "scalar");
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < N; i++) {
            if (blocks[i])
                continue;
            sizes[i] = (size_t)(i * 7919 % 1000 + 1) << 10; // 150 MB in all
            blocks[i] = op_alloc(b, sizes[i]);
            assert_int_equal((uintptr_t)blocks[i] % 64, 0);
            for (size_t j = 0; j < sizes[i]; j += 509)
                assert_int_equal(blocks[i][j], 0);
            memset(blocks[i], i % 251, sizes[i]);
        }
        for (int k = 0; k < N; k++) {
            int i = k * 101 % N;
            if (round < ROUNDS - 1 && k % 3 == 0) // some stay
                continue;
            for (size_t j = 0; j < sizes[i]; j += 509)
                assert_int_equal(blocks[i][j], i % 251);
            op_free(b, blocks[i]);
            blocks[i] = NULL;
        }
    }
    backend_close(b);
}

static void test_backend_memory(void **state)
{
    (void)state;
    struct backend *b = backend_cpu_open(2, NULL);
    static const size_t sizes[] = {0,       1,        63,       64,      4096,
                                   65535,   65536,    2097151,  2097152, 5 << 20,
                                   5000011, 16777215, 16777216, 40 << 20};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        unsigned char *p = op_alloc(b, sizes[i]);
        assert_int_equal((uintptr_t)p % 64, 0);
        for (size_t j = 0; j < sizes[i]; j += 61)
            assert_int_equal(p[j], 0);
        memset(p, 1, sizes[i]);
        op_free(b, p);
    }
    char *p = op_alloc(b, 16), q[16] = "sixteen";
    op_upload(b, p, q, 16);
    memset(q, 0, 16);
    op_download(b, q, p, 16);
    op_sync(b);
    assert_string_equal(q, "sixteen");
    op_free(b, p);
    op_free(b, NULL);
    backend_close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_error),          cmocka_unit_test(test_log),
        cmocka_unit_test(test_arena),          cmocka_unit_test(test_tensor),
        cmocka_unit_test(test_half_floats),    cmocka_unit_test(test_backend_doors),
        cmocka_unit_test(test_backend_memory), cmocka_unit_test(test_many_blocks),
    };
    log_init();
    return cmocka_run_group_tests_name("kernels", tests, NULL, NULL);
}
