/* The JSON writer: nesting, escapes, broken UTF-8, floats that read back as the same bits. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "client/json_out.h"

struct sheet {
    char *text;
    size_t n;
    struct json_out json;
};

static void sheet_open(struct sheet *s)
{
    memset(s, 0, sizeof(*s));
    s->json.file = open_memstream(&s->text, &s->n);
    assert_non_null(s->json.file);
}

static void sheet_expect(struct sheet *s, const char *expected)
{
    fclose(s->json.file);
    assert_string_equal(s->text, expected);
    free(s->text);
}

static void test_nesting(void **state)
{
    (void)state;
    struct sheet s;
    sheet_open(&s);
    json_object_begin(&s.json, NULL);
    json_array_begin(&s.json, "a");
    json_array_end(&s.json);
    json_array_begin(&s.json, "b");
    json_uint(&s.json, NULL, UINT64_MAX);
    json_int(&s.json, NULL, -1);
    json_object_begin(&s.json, NULL);
    json_bool(&s.json, "c", 1);
    json_null(&s.json, "d");
    json_object_end(&s.json);
    json_array_end(&s.json);
    json_double(&s.json, "e", 0.5);
    json_object_end(&s.json);
    json_end_line(&s.json);
    sheet_expect(&s, "{\"a\": [], \"b\": [18446744073709551615, -1, {\"c\": true, \"d\": null}], "
                     "\"e\": 0.5}\n");
}

static void test_strings(void **state)
{
    (void)state;
    static const struct {
        const char *bytes, *expected;
    } cases[] = {
        {"a\"b\\c\n\t\x01\x7f", "\"a\\\"b\\\\c\\n\\t\\u0001\\u007f\""},
        {"h\xc3\xa9 \xe4\xbd\xa0 \xf0\x9f\x98\x80", "\"h\xc3\xa9 \xe4\xbd\xa0 \xf0\x9f\x98\x80\""},
        {"\xff", "\"\xef\xbf\xbd\""},
        {"\xe4\xbd", "\"\xef\xbf\xbd\xef\xbf\xbd\""},                 // cut
        {"\xc0\xaf", "\"\xef\xbf\xbd\xef\xbf\xbd\""},                 // overlong
        {"\xed\xa0\x80", "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\""}, // surrogate
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct sheet s;
        sheet_open(&s);
        json_string(&s.json, NULL, cases[i].bytes);
        sheet_expect(&s, cases[i].expected);
    }
}

static void test_floats(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 100000; i++) {
        uint32_t bits = i * 2654435761u;
        float x;
        char text[64];
        memcpy(&x, &bits, sizeof(x));
        FILE *f = fmemopen(text, sizeof(text), "w");
        struct json_out j = {.file = f};
        json_float(&j, NULL, x);
        fclose(f);
        if (isfinite(x))
            assert_true(strtof(text, NULL) == x);
        else
            assert_string_equal(text, "null");
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nesting),
        cmocka_unit_test(test_strings),
        cmocka_unit_test(test_floats),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
