/* options: names, aliases, suffixes, ranges; the help names every option's default. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "daemon/options.h"

#define MAX_WORDS 8

/* The words, separated by blanks. */
static int parse(struct options *o, const char *line, struct error *err)
{
    static char text[256];
    char *words[MAX_WORDS + 1] = {"internvld"};
    int n = 1;

    snprintf(text, sizeof(text), "%s", line);
    for (char *w = strtok(text, " "); w && n < MAX_WORDS; w = strtok(NULL, " "))
        words[n++] = w;
    *err = (struct error){0};
    return options_parse(o, n, words, err);
}

static void test_values(void **state)
{
    (void)state;
    struct options o;
    struct error err;

    assert_int_equal(parse(&o, "--model m", &err), 0);
    assert_string_equal(o.listen, "127.0.0.1:50051");
    assert_int_equal(o.max_num_seqs, 64);
    assert_int_equal(parse(&o, "--model=m -tp 4 -pp=2 --kv-cache-memory-bytes 3G", &err), 0);
    assert_string_equal(o.model, "m");
    assert_int_equal(o.tensor_parallel_size, 4);
    assert_int_equal(o.pipeline_parallel_size, 2);
    assert_true(o.kv_cache_memory_bytes == (int64_t)3 << 30);
    assert_int_equal(parse(&o, "--model m --max-message-bytes 16M --plan", &err), 0);
    assert_int_equal(o.max_message_bytes, 16 << 20);
    assert_int_equal(o.plan, 1);
    assert_int_equal(o.max_num_batched_tokens, 128); // twice --max-num-seqs
    assert_int_equal(parse(&o, "--model m --max-num-seqs 3", &err), 0);
    assert_int_equal(o.max_num_batched_tokens, 128);
    assert_int_equal(parse(&o, "--model m --max-num-seqs 100", &err), 0);
    assert_int_equal(o.max_num_batched_tokens, 200);
    assert_int_equal(parse(&o, "--help", &err), 0);
    assert_int_equal(o.help, 1);
}

static void test_errors(void **state)
{
    (void)state;
    static const char *const wrong[] = {
        "",
        "--model",
        "--model=",
        "--model m --no-such-option 1",
        "--model m --max-num-seqs 0",
        "--model m --max-num-seqs 1x",
        "--model m --max-num-seqs 64 --max-num-batched-tokens 32",
        "--model m --max-num-seqs 99999999999999999999",
        "--model m --max-message-bytes 2G",
        "--model m --max-message-bytes 9000000000000000000G",
        "--model m --dtype float64",
        "--model m --dtype auto|float32",
        "--model m --kv-cache-dtype fp8",
        "--model m --plan=1",
        "--model m stray",
    };
    struct options o;
    struct error err;

    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        assert_int_equal(parse(&o, wrong[i], &err), -1);
        assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
    }
}

static void test_help(void **state)
{
    (void)state;
    char *text = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&text, &n);

    options_help(f);
    fclose(f);
    assert_non_null(strstr(text, "--tensor-parallel-size, -tp T  [1]"));
    assert_non_null(strstr(text, "--max-message-bytes BYTES  [64M]"));
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n"))
        assert_true(strlen(line) <= 100);
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_help),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
