/*
 * Parity of the tokenizer and the chat template with Transformers: ids, texts, prefixes, rendered
 * conversations, of the small vocabulary and, where it is at hand, Qwen2's.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/processor/chat_template.h"
#include "daemon/processor/tokenizer.h"
#include "kernels/log.h"
#include "tests/parity/processor/reference.h"

#define BUDGET ((size_t)64 << 20)

static struct tokenizer *open_or_skip(const char *dir)
{
    char name[256];
    struct error err = {0};

    snprintf(name, sizeof(name), "%s/tokenizer.json", dir);
    if (!reference_has(name))
        return NULL;
    struct tokenizer *t = tokenizer_open(reference_path(dir), &err);

    if (!t)
        fail_msg("%s", err.msg);
    return t;
}

static void check_ids(const char *what, const cJSON *want, const int32_t *ids, int64_t n)
{
    const cJSON *item;
    int64_t i = 0;

    if (cJSON_GetArraySize(want) != n)
        fail_msg("%s: %ld ids, expected %d", what, (long)n, cJSON_GetArraySize(want));
    cJSON_ArrayForEach(item, want)
    {
        if (ids[i] != (int32_t)item->valuedouble)
            fail_msg("%s: id %ld is %d, expected %d", what, (long)i, ids[i],
                     (int)item->valuedouble);
        i++;
    }
}

static int from_hex(char c)
{
    return c <= '9' ? c - '0' : c - 'a' + 10;
}

static size_t unhex(const char *hex, char *out)
{
    size_t n = strlen(hex) / 2;

    for (size_t i = 0; i < n; i++)
        out[i] = (char)(from_hex(hex[2 * i]) << 4 | from_hex(hex[2 * i + 1]));
    return n;
}

/* JSON's text of what the ids decode to: cJSON ends a string at U+0000, so compare up to there. */
static void check_text(const char *what, const struct tokenizer *t, const int32_t *ids, int64_t n,
                       int skip_special, const char *want)
{
    struct arena a;
    struct detokenizer d;
    size_t n_bytes, n_pushed = 0;

    arena_init(&a, BUDGET);
    char *text = tokenizer_decode(t, ids, n, skip_special, &a, &n_bytes);
    char *pieces = arena_alloc(&a, n_bytes + 16384, 1);

    assert_non_null(text);
    if (strcmp(text, want))
        fail_msg("%s decodes to \"%s\", expected \"%s\"", what, text, want);
    detokenizer_init(&d, t, skip_special);
    for (int64_t i = 0; i < n; i++) {
        size_t k = detokenizer_push(&d, ids[i], pieces + n_pushed);

        assert_true(k <= detokenizer_max_bytes(&d, ids[i]));
        n_pushed += k;
    }
    n_pushed += detokenizer_flush(&d, pieces + n_pushed);
    assert_int_equal(n_pushed, n_bytes);
    assert_memory_equal(pieces, text, n_bytes);
    arena_release(&a);
}

static void check_strings(const struct tokenizer *t, const char *file)
{
    char *text = reference_read(file, NULL), *at = text;
    int n_checked = 0;
    cJSON *row;

    while ((row = reference_next_line(&at))) {
        const char *hex = json_string(row, "utf8_hex");
        char *bytes = xcalloc(strlen(hex) / 2 + 1, 1), what[320];
        size_t n_bytes = unhex(hex, bytes);
        struct arena a;
        struct error err = {0};
        int32_t *ids;
        int64_t n;

        snprintf(what, sizeof(what), "%s %d \"%.200s\"", file, (int)json_number(row, "i"), bytes);
        arena_init(&a, BUDGET);
        if (tokenizer_encode(t, bytes, n_bytes, 1 << 20, &a, &ids, &n, &err))
            fail_msg("%s: %s", what, err.msg);
        check_ids(what, json_item(row, "ids"), ids, n);
        check_text(what, t, ids, n, 0, json_string(row, "decoded"));
        check_text(what, t, ids, n, 1, json_string(row, "decoded_skip_special"));
        arena_release(&a);
        free(bytes);
        cJSON_Delete(row);
        n_checked++;
    }
    free(text);
    printf("%s: %d strings equal\n", file, n_checked);
}

static int32_t *read_ids(const cJSON *list, int64_t *n)
{
    int32_t *ids = xcalloc((size_t)cJSON_GetArraySize(list) + 1, sizeof(*ids));
    const cJSON *item;

    *n = 0;
    cJSON_ArrayForEach(item, list) ids[(*n)++] = (int32_t)item->valuedouble;
    return ids;
}

static void check_decode(const struct tokenizer *t, const char *file)
{
    char *text = reference_read(file, NULL), *at = text;
    int n_checked = 0;
    cJSON *row;

    while ((row = reference_next_line(&at))) {
        const cJSON *prefixes = cJSON_GetObjectItemCaseSensitive(row, "prefixes"), *p;
        int64_t n;

        cJSON_ArrayForEach(p, prefixes)
        {
            int32_t *ids = read_ids(json_item(p, "ids"), &n);

            check_text(file, t, ids, n, 0, json_string(p, "text"));
            free(ids);
        }
        if (!prefixes) {
            int32_t *ids = read_ids(json_item(row, "ids"), &n);

            check_text(file, t, ids, n, 0, json_string(row, "text"));
            check_text(file, t, ids, n, 1, json_string(row, "skip_special"));
            free(ids);
        }
        cJSON_Delete(row);
        n_checked++;
    }
    free(text);
    printf("%s: %d records equal\n", file, n_checked);
}

/* A conversation of the reference; parts of unknown types are left out, as the template does. */
struct reference_chat {
    struct conversation c;
    struct chat_message *messages;
    int odd_role;
};

static void chat_init(struct reference_chat *r, const cJSON *messages)
{
    const cJSON *m, *p;
    int n = 0;

    *r = (struct reference_chat){0};
    r->messages = xcalloc((size_t)cJSON_GetArraySize(messages) + 1, sizeof(*r->messages));
    cJSON_ArrayForEach(m, messages)
    {
        const cJSON *content = json_item(m, "content");
        struct content_part *parts =
            xcalloc((size_t)cJSON_GetArraySize(content) + 1, sizeof(*parts));
        int n_parts = 0;

        if (cJSON_IsString(content))
            parts[n_parts++] = (struct content_part){.kind = PART_TEXT,
                                                     .text = content->valuestring,
                                                     .n_bytes = strlen(content->valuestring)};
        for (p = cJSON_IsArray(content) ? content->child : NULL; p; p = p->next) {
            const char *type = json_string(p, "type");

            if (strcmp(type, "text") == 0) {
                const char *text = json_string(p, "text");

                parts[n_parts++] =
                    (struct content_part){.kind = PART_TEXT, .text = text, .n_bytes = strlen(text)};
            } else if (strcmp(type, "image") == 0 || strcmp(type, "video") == 0) {
                parts[n_parts++].kind = *type == 'i' ? PART_IMAGE : PART_VIDEO;
            }
        }
        r->messages[n] = (struct chat_message){
            .role = json_string(m, "role"), .parts = parts, .n_parts = n_parts};
        r->odd_role |= strcmp(r->messages[n].role, "system") &&
                       strcmp(r->messages[n].role, "user") &&
                       strcmp(r->messages[n].role, "assistant");
        n++;
    }
    r->c = (struct conversation){.messages = r->messages, .n_messages = n};
}

static void chat_release(struct reference_chat *r)
{
    for (int i = 0; i < r->c.n_messages; i++)
        free((void *)r->messages[i].parts);
    free(r->messages);
}

/* One record of chat.*.jsonl: 1 when compared, 0 when our product refuses it by design. */
static int check_chat_record(const struct tokenizer *t, const struct chat_template *chat,
                             const cJSON *row)
{
    struct reference_chat r;
    struct byte_buffer out = {0};
    struct error err = {0};
    const char *name = json_string(row, "name");
    const cJSON *rendered = cJSON_GetObjectItemCaseSensitive(row, "rendered");
    int compared = 1;

    chat_init(&r, json_item(row, "messages"));
    int rc = chat_template_render(chat, &r.c, NULL, &out, &err);

    if (!rendered || r.odd_role || strcmp(name, "literal-image-token") == 0) {
        assert_int_equal(rc, -1); // we refuse: no messages, an unknown role, a mark in the text
        assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
        compared = 0;
    } else {
        size_t n = strlen(rendered->valuestring);
        size_t n_prompt = strlen("<|im_start|>assistant\n");
        struct arena a;
        int32_t *ids;
        int64_t n_ids;

        if (rc)
            fail_msg("%s: %s", name, err.msg);
        if (!cJSON_IsTrue(json_item(row, "add_generation_prompt")))
            out.n -= n_prompt; // ours always adds it
        assert_int_equal(out.n, n);
        assert_memory_equal(out.data, rendered->valuestring, n);
        arena_init(&a, BUDGET);
        assert_int_equal(tokenizer_encode(t, out.data, out.n, 1 << 20, &a, &ids, &n_ids, &err), 0);
        check_ids(name, json_item(row, "ids"), ids, n_ids);
        arena_release(&a);
    }
    byte_buffer_release(&out);
    chat_release(&r);
    return compared;
}

static void check_chat(const struct tokenizer *t, const char *dir, const char *file)
{
    char *text = reference_read(file, NULL), *at = text;
    struct chat_template chat;
    struct error err = {0};
    int n_checked = 0, n_refused = 0;
    cJSON *row;

    if (chat_template_load(&chat, reference_path(dir), &err))
        fail_msg("%s", err.msg);
    while ((row = reference_next_line(&at))) {
        if (check_chat_record(t, &chat, row))
            n_checked++;
        else
            n_refused++;
        cJSON_Delete(row);
    }
    free(text);
    printf("%s: %d conversations equal; %d refused by design (unknown role, no message, literal "
           "media mark)\n",
           file, n_checked, n_refused);
}

static void test_small(void **state)
{
    struct tokenizer *t = open_or_skip("tokenizer/small");

    (void)state;
    if (!t)
        skip();
    check_strings(t, "tokenizer/strings.small.jsonl");
    check_decode(t, "tokenizer/decode.small.jsonl");
    check_chat(t, "tokenizer/small", "tokenizer/chat.small.jsonl");
    tokenizer_close(t);
}

static void test_qwen2(void **state)
{
    struct tokenizer *t = open_or_skip("tokenizer/qwen2");

    (void)state;
    if (!t)
        skip();
    check_strings(t, "tokenizer/strings.qwen2.jsonl");
    check_decode(t, "tokenizer/decode.qwen2.jsonl");
    check_chat(t, "tokenizer/qwen2", "tokenizer/chat.qwen2.jsonl");
    char *text = reference_read("tokenizer/qwen2/public_cases.jsonl", NULL), *at = text;
    cJSON *row;

    while ((row = reference_next_line(&at))) {
        const char *s = json_string(row, "text");
        struct arena a;
        struct error err = {0};
        int32_t *ids;
        int64_t n;

        arena_init(&a, BUDGET);
        assert_int_equal(tokenizer_encode(t, s, strlen(s), 1 << 20, &a, &ids, &n, &err), 0);
        check_ids(s, json_item(row, "ids"), ids, n);
        arena_release(&a);
        cJSON_Delete(row);
    }
    free(text);
    tokenizer_close(t);
}

/* Merges written as "a b" strings give the same ids as pairs. */
static void test_string_merges(void **state)
{
    struct tokenizer *t = open_or_skip("checkpoints/ln-1b-style");

    (void)state;
    if (!t)
        skip();
    check_strings(t, "tokenizer/strings.small.jsonl");
    tokenizer_close(t);
}

/* The older layout, without a tokenizer.json: vocab.json, merges.txt, added_tokens_decoder. */
static void test_parts(void **state)
{
    static const char *const parts[] = {"vocab.json", "merges.txt", "tokenizer_config.json"};
    char dir[] = "tokenizer-parts-XXXXXX", link[64];
    struct error err = {0};

    (void)state;
    if (!reference_has("tokenizer/small/vocab.json"))
        skip();
    assert_non_null(mkdtemp(dir));
    for (int i = 0; i < 3; i++) {
        char name[64];

        snprintf(name, sizeof(name), "tokenizer/small/%s", parts[i]);
        snprintf(link, sizeof(link), "%s/%s", dir, parts[i]);
        assert_int_equal(symlink(reference_path(name), link), 0);
    }
    struct tokenizer *t = tokenizer_open(dir, &err);

    for (int i = 0; i < 3; i++) {
        snprintf(link, sizeof(link), "%s/%s", dir, parts[i]);
        unlink(link);
    }
    rmdir(dir);
    if (!t)
        fail_msg("%s", err.msg);
    check_strings(t, "tokenizer/strings.small.jsonl");
    check_decode(t, "tokenizer/decode.small.jsonl");
    tokenizer_close(t);
}

static void test_invalid_utf8(void **state)
{
    struct tokenizer *t = open_or_skip("tokenizer/small");

    (void)state;
    if (!t || !reference_has("tokenizer/invalid_utf8.json"))
        skip();
    cJSON *rows = reference_json("tokenizer/invalid_utf8.json");
    const cJSON *row;

    cJSON_ArrayForEach(row, rows)
    {
        char bytes[256], want[32], lossy[800];
        size_t n = unhex(json_string(row, "hex"), bytes);
        struct error err = {0};
        struct arena a;
        int32_t *ids;
        int64_t n_ids;

        arena_init(&a, BUDGET);
        assert_int_equal(tokenizer_encode(t, bytes, n, 100, &a, &ids, &n_ids, &err), -1);
        assert_int_equal(err.code, ERROR_INVALID_ARGUMENT);
        snprintf(want, sizeof(want), "offset %d ", (int)json_number(row, "first_bad_offset"));
        assert_non_null(strstr(err.msg, want));
        lossy[utf8_lossy(bytes, n, lossy)] = '\0';
        assert_string_equal(lossy, json_string(row, "lossy_text"));
        arena_release(&a);
    }
    printf("tokenizer/invalid_utf8.json: %d byte strings refused\n", cJSON_GetArraySize(rows));
    cJSON_Delete(rows);
    tokenizer_close(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_small),         cmocka_unit_test(test_qwen2),
        cmocka_unit_test(test_string_merges), cmocka_unit_test(test_parts),
        cmocka_unit_test(test_invalid_utf8),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
