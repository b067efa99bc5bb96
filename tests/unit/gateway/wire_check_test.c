/* wire_check: what protobuf-c would accept in silence, or die of, is refused; what it takes passes.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "daemon/gateway/wire_check.h"
#include "internvl/v1/internvl.pb-c.h"
#include "kernels/arena.h"

#define MAX_ELEMENTS 1000

static const ProtobufCMessageDescriptor *const generate =
    &internvl__v1__generate_request__descriptor;

static enum error_code check(const ProtobufCMessageDescriptor *type, const void *bytes, size_t n)
{
    struct error err = {0};

    if (wire_check(type, bytes, n, MAX_ELEMENTS, &err) == 0)
        return ERROR_OK;
    assert_true(err.msg[0] != '\0');
    return err.code;
}

#define CHECK(type, literal) check(type, literal, sizeof(literal) - 1)

static void test_valid(void **state)
{
    (void)state;
    Internvl__V1__GenerateRequest q = INTERNVL__V1__GENERATE_REQUEST__INIT;
    Internvl__V1__Prompt prompt = INTERNVL__V1__PROMPT__INIT;
    Internvl__V1__TokenPrompt tokens = INTERNVL__V1__TOKEN_PROMPT__INIT;
    uint32_t ids[3] = {1, 300, 70000};
    uint8_t bytes[256];
    size_t n;
    struct arena a;
    struct error err = {0};

    q.request_id = "caf\xc3\xa9";
    q.prompt = &prompt;
    q.priority = -1;
    prompt.input_case = INTERNVL__V1__PROMPT__INPUT_TOKENS;
    prompt.tokens = &tokens;
    tokens.n_token_ids = 3;
    tokens.token_ids = ids;
    n = internvl__v1__generate_request__pack(&q, bytes);
    arena_init(&a, wire_budget_bytes(n));
    Internvl__V1__GenerateRequest *back =
        (Internvl__V1__GenerateRequest *)wire_unpack(generate, bytes, n, MAX_ELEMENTS, &a, &err);
    assert_non_null(back);
    assert_string_equal(back->request_id, q.request_id);
    assert_int_equal(back->priority, -1);
    assert_int_equal(back->prompt->tokens->n_token_ids, 3);
    assert_int_equal(back->prompt->tokens->token_ids[2], 70000);
    arena_release(&a);
    assert_int_equal(check(generate, "", 0), ERROR_OK);
}

/* Every prefix of a valid message is either a message or refused; nothing reads past its end. */
static void test_truncated(void **state)
{
    (void)state;
    static const char whole[] = "\x0a\x02id\x12\x09\x0a\x07\x0a\x05\x0a\x03usr\x1a\x05\x0d\x00\x00"
                                "\x80\x3f\x20\x05";
    size_t n_whole = sizeof(whole) - 1;

    assert_int_equal(check(generate, whole, n_whole), ERROR_OK);
    for (size_t n = 0; n <= n_whole; n++) {
        char *copy = malloc(n + !n); // exactly n bytes, so that a sanitizer sees one too many
        struct arena a;
        struct error err = {0};

        memcpy(copy, whole, n);
        arena_init(&a, wire_budget_bytes(n));
        wire_unpack(generate, (const uint8_t *)copy, n, MAX_ELEMENTS, &a, &err);
        arena_release(&a);
        free(copy);
    }
}

static void test_text(void **state)
{
    (void)state;
    assert_int_equal(CHECK(generate, "\x0a\x02\xc3\xa9"), ERROR_OK);
    assert_int_equal(CHECK(generate, "\x0a\x04\xf0\x9f\x98\x80"), ERROR_OK);
    assert_int_equal(CHECK(generate, "\x0a\x03\x61\x00\x62"), ERROR_INVALID_ARGUMENT); // NUL
    assert_int_equal(CHECK(generate, "\x0a\x02\xc0\xaf"), ERROR_INVALID_ARGUMENT);     // overlong
    assert_int_equal(CHECK(generate, "\x0a\x03\xed\xa0\x80"), ERROR_INVALID_ARGUMENT); // surrogate
    assert_int_equal(CHECK(generate, "\x0a\x04\xf4\x90\x80\x80"), ERROR_INVALID_ARGUMENT);
    assert_int_equal(CHECK(generate, "\x0a\x01\xc3"), ERROR_INVALID_ARGUMENT); // cut off
    assert_int_equal(CHECK(generate, "\x0a\x01\xff"), ERROR_INVALID_ARGUMENT);
}

static void test_wire_types(void **state)
{
    (void)state;
    assert_int_equal(CHECK(generate, "\x08\x01"), ERROR_INVALID_ARGUMENT); // request_id as a number
    assert_int_equal(CHECK(generate, "\x0b\x0c"), ERROR_INVALID_ARGUMENT); // a group
    assert_int_equal(CHECK(generate, "\x00\x01"), ERROR_INVALID_ARGUMENT); // field 0
    assert_int_equal(CHECK(generate, "\x22\x01\x01"), ERROR_INVALID_ARGUMENT); // priority packed
    assert_int_equal(CHECK(generate, "\x1a\x02\x08\x01"), ERROR_INVALID_ARGUMENT); // temperature
    assert_int_equal(CHECK(generate, "\xf8\x07\x01"), ERROR_OK); // an unknown field is skipped
    assert_int_equal(CHECK(generate, "\x20\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02"),
                     ERROR_INVALID_ARGUMENT); // a number of more than 64 bits
    /* stop_token_ids, packed, whose last number is cut off */
    assert_int_equal(CHECK(generate, "\x1a\x03\x6a\x01\x80"), ERROR_INVALID_ARGUMENT);
}

static void test_elements(void **state)
{
    (void)state;
    uint8_t bytes[2 * (MAX_ELEMENTS + 1)];
    uint8_t packed[MAX_ELEMENTS + 8];
    Internvl__V1__TokenIds ids = INTERNVL__V1__TOKEN_IDS__INIT;

    for (size_t i = 0; i < sizeof(bytes); i += 2) { // empty parts of a message
        bytes[i] = 0x12;
        bytes[i + 1] = 0;
    }
    assert_int_equal(check(&internvl__v1__message__descriptor, bytes, sizeof(bytes) - 2), ERROR_OK);
    assert_int_equal(check(&internvl__v1__message__descriptor, bytes, sizeof(bytes)),
                     ERROR_RESOURCE_EXHAUSTED);
    ids.n_ids = MAX_ELEMENTS;
    ids.ids = calloc(MAX_ELEMENTS, sizeof(*ids.ids));
    size_t n = internvl__v1__token_ids__pack(&ids, packed);
    free(ids.ids);
    assert_int_equal(check(&internvl__v1__token_ids__descriptor, packed, n),
                     ERROR_RESOURCE_EXHAUSTED); // the field counts too
}

/* Two bytes that become a hundred: the arena's budget ends it, not the machine's memory. */
static void test_amplification(void **state)
{
    (void)state;
    size_t n = 200000;
    uint8_t *bytes = malloc(n);
    struct arena a;
    struct error err = {0};

    for (size_t i = 0; i < n; i += 2) {
        bytes[i] = 0x12;
        bytes[i + 1] = 0;
    }
    arena_init(&a, wire_budget_bytes(n));
    assert_null(wire_unpack(&internvl__v1__message__descriptor, bytes, n, n, &a, &err));
    assert_int_equal(err.code, ERROR_RESOURCE_EXHAUSTED);
    assert_true(a.used_bytes <= wire_budget_bytes(n));
    arena_release(&a);
    free(bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_valid),    cmocka_unit_test(test_truncated),
        cmocka_unit_test(test_text),     cmocka_unit_test(test_wire_types),
        cmocka_unit_test(test_elements), cmocka_unit_test(test_amplification),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
