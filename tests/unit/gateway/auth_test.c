/* auth: the token file's rules, and who is let in. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "daemon/gateway/auth.h"

static int load(struct auth *a, const char *text)
{
    char path[] = "/tmp/internvld_token_XXXXXX";
    int fd = mkstemp(path);
    struct error err = {0};

    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
    int result = auth_load(a, path, &err);
    unlink(path);
    return result;
}

static void test_file(void **state)
{
    (void)state;
    struct auth a;
    struct error err = {0};
    char longest[AUTH_TOKEN_MAX + 1];

    assert_int_equal(load(&a, "0123456789abcdef\n"), 0);
    assert_int_equal(a.n_bytes, 16);
    assert_int_equal(load(&a, "0123456789abcdef"), 0);
    assert_int_equal(load(&a, "0123456789abcdef\nsecond line\n"), 0);
    assert_int_equal(load(&a, "0123456789abcde\n"), -1); // too short
    assert_int_equal(load(&a, "0123456789 abcdef\n"), -1);
    assert_int_equal(load(&a, ""), -1);
    memset(longest, 'x', sizeof(longest) - 1);
    longest[AUTH_TOKEN_MAX] = '\0';
    assert_int_equal(load(&a, longest), -1);
    assert_int_equal(load(&a, longest + 1), 0);
    assert_int_equal(auth_load(&a, "/nonexistent/token", &err), -1);
    assert_non_null(strstr(err.msg, "/nonexistent/token"));
}

static void test_accepts(void **state)
{
    (void)state;
    struct auth a;
    const char *good = "Bearer 0123456789abcdef";

    assert_int_equal(load(&a, "0123456789abcdef\n"), 0);
    assert_int_equal(auth_accepts(&a, good, strlen(good)), 1);
    assert_int_equal(auth_accepts(&a, good, strlen(good) - 1), 0);
    assert_int_equal(auth_accepts(&a, "Bearer 0123456789abcdeg", strlen(good)), 0);
    assert_int_equal(auth_accepts(&a, "Basic! 0123456789abcdef", strlen(good)), 0);
    assert_int_equal(auth_accepts(&a, "", 0), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_file),
        cmocka_unit_test(test_accepts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
