/*
 * The timeline's file: what is in a line, threads and recorders, and what happens when it is full.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/trace.h"

#define N_BYTES 100000

static char path[] = "/tmp/internvld-trace-test-XXXXXX";
static char text[N_BYTES + 1];

static size_t read_file(void)
{
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    size_t n = fread(text, 1, N_BYTES, f);
    fclose(f);
    text[n] = '\0';
    return n;
}

static int count(const char *what)
{
    int n = 0;
    for (const char *at = text; (at = strstr(at, what)) != NULL; at++)
        n++;
    return n;
}

/* Lines are whole events with commas between. */
static void check_lines(int is_whole)
{
    assert_memory_equal(text, "[\n", 2);
    for (char *line = text + 2, *end; *line && *line != ']'; line = end + 1) {
        end = strchr(line, '\n');
        if (!end) {
            assert_false(is_whole);
            return;
        }
        assert_int_equal(*line, '{');
        assert_int_equal(*(end - (end[1] != ']' && end[1]) - 1), '}');
    }
    assert_int_equal(is_whole, strcmp(text + strlen(text) - 3, "\n]\n") == 0);
}

static void test_off(void **state)
{
    (void)state;
    const struct trace_span *spans;
    assert_int_equal(trace_begin(), 0);
    trace_end("step", 0, "", 0);
    trace_end("step", 5, "", 0);
    trace_name_rank(0, "x");
    trace_phase(1, "x", "x", 1, 2);
    assert_int_equal(trace_take(&spans), 0);
    trace_close();
}

static void *work(void *arg)
{
    trace_name_thread(arg);
    for (int i = 0; i < 100; i++)
        trace_end("work", trace_begin(), "i", i);
    return NULL;
}

static void test_owner(void **state)
{
    (void)state;
    struct error err;
    pthread_t threads[3];
    char *names[] = {"a", "b", "c"};
    assert_int_equal(trace_open("/not/there", 100, &err), -1);
    assert_string_equal(err.msg, "/not/there: No such file or directory");
    assert_int_equal(trace_open(path, N_BYTES, &err), 0);
    trace_name_rank(2, "language stage 0 shard 1");
    uint64_t now = trace_begin();
    const struct trace_span theirs[] = {
        {.begin_ns = now, .end_ns = now + 2500, .value = -7, .name = "step", .label = "id"},
        {.begin_ns = now, .end_ns = now, .name = "fifteen letters", .label = ""}};
    trace_rank(2, theirs, 2);
    trace_phase(9, "my.id", "queue", now, now + 1000);
    trace_phase(9, "my.id", "none", 0, now);
    for (int i = 0; i < 3; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, work, names[i]), 0);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    read_file();
    check_lines(0);
    trace_close();
    read_file();
    check_lines(1);
    assert_int_equal(count("\"name\":\"work\""), 300);
    assert_int_equal(count("\"args\":{\"i\":99}"), 3);
    assert_int_equal(count("\"thread_name\""), 3);
    assert_int_equal(count("\"dur\":2.500,\"pid\":2,\"tid\":0,\"args\":{\"id\":-7}}"), 1);
    assert_int_equal(count("\"fifteen letters\""), 1);
    assert_int_equal(count("\"name\":\"queue\",\"cat\":\"request\",\"ph\":\"b\",\"id\":\"9\""), 1);
    assert_int_equal(count("\"none\""), 0);
    assert_int_equal(trace_begin(), 0);
}

static void test_full(void **state)
{
    (void)state;
    struct error err;
    const size_t limits[] = {300, 1000, 5000, 5001, 5050};
    for (size_t k = 0; k < sizeof(limits) / sizeof(*limits); k++) {
        assert_int_equal(trace_open(path, limits[k], &err), 0);
        for (int i = 0; i < 500; i++)
            trace_end("work", trace_begin(), "i", i);
        trace_close();
        size_t n = read_file();
        assert_true(n <= limits[k] && n + 400 > limits[k]);
        assert_int_equal(count("the trace is full"), 1);
        check_lines(1);
    }
}

static void test_recorder(void **state)
{
    (void)state;
    const struct trace_span *spans;
    trace_record(1000000000000);
    uint64_t begin = trace_begin();
    for (int i = 0; i < 200; i++)
        trace_end("a very long name indeed", begin, "i", i);
    assert_int_equal(trace_take(&spans), 200);
    assert_int_equal(spans[199].value, 199);
    assert_true(spans[0].begin_ns == begin + 1000000000000 && spans[0].end_ns >= spans[0].begin_ns);
    assert_string_equal(spans[0].name, "a very long nam");
    assert_int_equal(trace_take(&spans), 0);
    trace_close();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_off),
        cmocka_unit_test(test_owner),
        cmocka_unit_test(test_full),
        cmocka_unit_test(test_recorder),
    };
    close(mkstemp(path));
    int status = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(path);
    return status;
}
