/*
 * UTF-8, NFC, byte-pair merging, the tokenizer's refusals and limits, incremental decoding.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/bpe.h"
#include "daemon/processor/tokenizer.h"
#include "daemon/processor/unicode.h"
#include "kernels/log.h"
#include "tests/unit/processor/checkpoint.h"

#define BUDGET ((size_t)64 << 20)

static uint32_t random_state = 1;

static uint32_t next_random(uint32_t below)
{
    random_state = random_state * 1664525u + 1013904223u;
    return (random_state >> 8) % below;
}

static void test_utf8(void **state)
{
    char lossy[64], utf8[4];
    int32_t c;

    (void)state;
    for (int32_t want = 0; want <= 0x10ffff; want++) {
        if (want >= 0xd800 && want <= 0xdfff)
            continue;
        int n = utf8_put(want, utf8);

        assert_int_equal(utf8_next(utf8, (size_t)n, &c, NULL), n);
        assert_int_equal(c, want);
    }
    assert_int_equal(utf8_valid_prefix("abcdefghij\xff", 11), 10);
    assert_int_equal(utf8_valid_prefix("\xc3\xa9\xed\xa0\x80", 5), 2);
    assert_int_equal(utf8_lossy("a\xf0\x9f\x98z\x80", 6, lossy), 8);
    assert_memory_equal(lossy, "a\xef\xbf\xbdz\xef\xbf\xbd", 8);
}

static void check_nfc(const char *in, const char *want)
{
    struct byte_buffer out = {0};

    nfc_append(&out, in, strlen(in));
    byte_buffer_append(&out, "", 1);
    assert_string_equal(out.data, want);
    byte_buffer_release(&out);
}

static void test_nfc(void **state)
{
    (void)state;
    check_nfc("", "");
    check_nfc("plain", "plain");
    check_nfc("e\xcc\x81", "\xc3\xa9"); // e + acute
    check_nfc("xe\xcc\x81y", "x\xc3\xa9y");
    check_nfc("q\xcc\x87\xcc\xa3", "q\xcc\xa3\xcc\x87");               // ordered by class
    check_nfc("\xe1\x84\x92\xe1\x85\xa1\xe1\x86\xab", "\xed\x95\x9c"); // Hangul jamo
    check_nfc("\xed\x95\x98\xe1\x86\xab!", "\xed\x95\x9c!");           // LV + T
    check_nfc("\xe2\x84\xab", "\xc3\x85");                             // Angstrom sign
    check_nfc("\xe1\x84\x80\xe1\x84\x81", "\xe1\x84\x80\xe1\x84\x81");
}

/* Half a million marks in the worst order: a bubble sort would not come back. */
static void test_nfc_long_run(void **state)
{
    size_t n = 1 << 20;
    char *marks = xcalloc(n, 1);
    struct byte_buffer out = {0};

    (void)state;
    for (size_t i = 0; i < n; i += 4)
        memcpy(marks + i, "\xcc\x81\xcc\xa3", 4);
    nfc_append(&out, marks, n);
    assert_int_equal(out.n, n);
    assert_memory_equal(out.data, "\xcc\xa3\xcc\xa3", 4);
    assert_memory_equal(out.data + n - 4, "\xcc\x81\xcc\x81", 4);
    byte_buffer_release(&out);
    free(marks);
}

/* The definition: scan all pairs, merge the lowest rank, leftmost. */
static size_t merge_naively(const struct bpe *b, int32_t *ids, size_t n)
{
    for (;;) {
        size_t best = n;
        const struct bpe_merge *chosen = NULL;

        for (size_t i = 0; i + 1 < n; i++) {
            uint64_t key = (uint64_t)(uint32_t)ids[i] << 32 | (uint32_t)ids[i + 1];

            for (size_t k = 0; k < b->n_slots; k++)
                if (b->slots[k].key == key && (!chosen || b->slots[k].rank < chosen->rank)) {
                    chosen = &b->slots[k];
                    best = i;
                }
        }
        if (!chosen)
            return n;
        ids[best] = chosen->id;
        memmove(ids + best + 1, ids + best + 2, (n - best - 2) * sizeof(*ids));
        n--;
    }
}

static void test_bpe(void **state)
{
    struct bpe b;
    struct bpe_scratch s = {0};
    int n_ids = 4;

    (void)state;
    bpe_init(&b, 40);
    for (int i = 0; i < 256; i++)
        b.byte_ids[i] = i & 3;
    for (uint32_t rank = 0; rank < 40; rank++) {
        int32_t left = (int32_t)next_random((uint32_t)n_ids);
        int32_t right = (int32_t)next_random((uint32_t)n_ids);

        bpe_add(&b, left, right, rank, n_ids++);
    }
    for (int round = 0; round < 300; round++) {
        char bytes[120];
        int32_t want[120];
        size_t n = 1 + next_random(sizeof(bytes));

        for (size_t i = 0; i < n; i++) {
            bytes[i] = (char)next_random(4);
            want[i] = bytes[i];
        }
        size_t n_want = merge_naively(&b, want, n);

        assert_int_equal(bpe_encode(&b, &s, bytes, n), n_want);
        assert_memory_equal(s.ids, want, n_want * sizeof(*want));
    }
    bpe_scratch_release(&s);
    bpe_release(&b);
}

static void expect_ids(const struct tokenizer *t, const char *text, const int32_t *want, int n_want)
{
    struct arena a;
    struct error err = {0};
    int32_t *ids;
    int64_t n;

    arena_init(&a, BUDGET);
    if (tokenizer_encode(t, text, strlen(text), 1000, &a, &ids, &n, &err))
        fail_msg("%s: %s", text, err.msg);
    assert_int_equal(n, n_want);
    if (n_want)
        assert_memory_equal(ids, want, (size_t)n_want * sizeof(*want));
    arena_release(&a);
}

#define EXPECT_IDS(t, text, ...)                                                                   \
    do {                                                                                           \
        const int32_t want_[] = {__VA_ARGS__};                                                     \
        expect_ids(t, text, want_, sizeof(want_) / sizeof(*want_));                                \
    } while (0)

static void test_tokenizer(void **state)
{
    char dir[256];
    struct error err = {0};

    (void)state;
    checkpoint_make(dir);
    struct tokenizer *t = tokenizer_open(dir, &err);

    if (!t)
        fail_msg("%s", err.msg);
    expect_ids(t, "", NULL, 0);
    EXPECT_IDS(t, "abc", 257);
    EXPECT_IDS(t, "aaaaa", 259, 'a');
    EXPECT_IDS(t, "b ab ac", 'b', ' ', 256, 260, 'c');  // the lower rank first
    EXPECT_IDS(t, "<x>y<x>z<img>", 307, 306, 'z', 301); // the longest added token
    EXPECT_IDS(t, "<|im_start|", '<', '|', 'i', 'm', '_', 's', 't', 'a', 'r', 't', '|');
    EXPECT_IDS(t, "x'\xc5\xbf", 'x', '\'', 0xc5, 0xbf); // U+017F is a contraction's s
    assert_int_equal(tokenizer_n_ids(t), 308);
    assert_int_equal(tokenizer_token_id(t, "<img>"), 301);
    assert_int_equal(tokenizer_token_id(t, "\xc4\xa0"
                                           "a"),
                     260);
    assert_int_equal(tokenizer_token_id(t, "nothing"), -1);
    assert_true(tokenizer_is_special(t, 301));
    assert_false(tokenizer_is_special(t, 306));
    assert_false(tokenizer_is_special(t, -5));
    tokenizer_close(t);
    checkpoint_remove(dir);
}

static void test_limits(void **state)
{
    char dir[256], *text = xcalloc(3 << 20, 1);
    struct error err = {0};
    struct arena a;
    int32_t *ids;
    int64_t n;

    (void)state;
    checkpoint_make(dir);
    struct tokenizer *t = tokenizer_open(dir, &err);

    arena_init(&a, BUDGET);
    memset(text, 'a', 3 << 20);
    assert_int_equal(tokenizer_encode(t, text, 40, 10, &a, &ids, &n, &err), 0);
    assert_int_equal(n, 10);
    assert_int_equal(tokenizer_encode(t, text, 41, 10, &a, &ids, &n, &err), -1);
    assert_int_equal(err.code, ERROR_OUT_OF_RANGE);
    assert_int_equal(tokenizer_encode(t, text, 1, 0, &a, &ids, &n, &err), -1);
    assert_int_equal(tokenizer_encode(t, text, 1 << 20, 1 << 20, &a, &ids, &n, &err), 0);
    assert_int_equal(n, 1 << 18);
    assert_int_equal(tokenizer_encode(t, text, 3 << 20, 1 << 30, &a, &ids, &n, &err), -1);
    assert_int_equal(err.code, ERROR_INVALID_ARGUMENT); // one word of 3 MiB
    arena_release(&a);
    arena_init(&a, 64);
    assert_int_equal(tokenizer_encode(t, text, 4096, 1 << 20, &a, &ids, &n, &err), -1);
    assert_int_equal(err.code, ERROR_RESOURCE_EXHAUSTED);
    arena_release(&a);
    tokenizer_close(t);
    checkpoint_remove(dir);
    free(text);
}

/* What the file asks for and we do not do is refused, naming it. */
static void test_refusals(void **state)
{
    static const struct {
        const char *from, *to, *word;
    } cases[] = {
        {"\"BPE\"", "\"Unigram\"", "Unigram"},
        {"\"NFC\"", "\"NFKC\"", "normalizer"},
        {"\"Isolated\"", "\"Removed\"", "Isolated"},
        {"\"use_regex\": false", "\"use_regex\": true", "use_regex"},
        {"\"lstrip\": false", "\"lstrip\": true", "lstrip"},
        {"\"normalized\": false", "\"normalized\": true", "normalized"},
        {"\"dropout\": null", "\"dropout\": 0.1", "dropout"},
        {"\"dropout\": null", "\"byte_fallback\": true", "byte_fallback"},
        {"\"post_processor\": null",
         "\"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": "
         "{\"id\": \"<s>\"}}]}",
         "post_processor"},
        {"\"decoder\": {\"type\": \"ByteLevel\"}", "\"decoder\": {\"type\": \"WordPiece\"}",
         "decoder"},
        {"\"a b\"", "\"a q\"", "merge 0"},
        {"\"\\u0061\": 97", "\"\\u0061\\u0061\\u0061\": 97", "byte 0x61"},
        {"\"id\": 300", "\"id\": 5", "300"},
        {"\"ab\": 256", "\"ab\": -1", "id"},
        {"\"ab\": 256", "\"ab\": 97", "two model.vocab entries"},
        {"\\\\s+\"}", "(\"}", "pattern"},
    };
    char dir[256];

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct error err = {0};

        checkpoint_make(dir);
        checkpoint_edit_tokenizer(dir, cases[i].from, cases[i].to);
        struct tokenizer *t = tokenizer_open(dir, &err);

        if (strcmp(cases[i].word, "300") == 0) { // an added token may not take another's id
            assert_null(t);
            assert_non_null(strstr(err.msg, "another"));
        } else if (t || !strstr(err.msg, cases[i].word)) {
            fail_msg("%s for %s: %s", cases[i].to, cases[i].from, t ? "accepted" : err.msg);
        }
        assert_int_equal(err.code, ERROR_FAILED_PRECONDITION);
        checkpoint_remove(dir);
    }
}

/* Without a tokenizer.json: vocab.json, merges.txt and one of two lists of added tokens. */
static void test_parts(void **state)
{
    static const char config[] = "{\"tokenizer_class\": \"Qwen2Tokenizer\"}";
    static const char merges[] = "#version: 0.2\nt h\r\nth e\n";
    static const struct {
        const char *config, *merges, *added, *word; // NULL: no such file; word NULL: works
    } cases[] = {
        {config, merges, "{\"<img>\": 300}", NULL},
        {"{\"tokenizer_class\": \"Qwen2TokenizerFast\", \"added_tokens_decoder\": {\"300\": "
         "{\"content\": \"<img>\", \"special\": true}}}",
         merges, NULL, NULL},
        {NULL, merges, NULL, "tokenizer_class"},
        {"{\"tokenizer_class\": \"LlamaTokenizer\"}", merges, NULL, "LlamaTokenizer"},
        {config, NULL, NULL, "merges.txt"},
        {config, "t\n", NULL, "merge 0"},
        {config, "t h\nq x\n", NULL, "merge 1"},
        {config, merges, "[]", "added_tokens.json"},
        {config, merges, "{\"<img>\": \"x\"}", "no id"},
        {config, merges, "{\"<img>\": 5}", "another"},
        {"{\"tokenizer_class\": \"Qwen2Tokenizer\", \"added_tokens_decoder\": {\"x\": {}}}", merges,
         NULL, "added_tokens_decoder"},
        {"{\"tokenizer_class\": \"Qwen2Tokenizer\", \"added_tokens_decoder\": {\"300\": "
         "{\"content\": \"<img>\", \"rstrip\": true}}}",
         merges, NULL, "rstrip"},
    };

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct error err = {0};
        char dir[256];

        checkpoint_make(dir);
        checkpoint_delete(dir, "tokenizer.json");
        checkpoint_write_vocab(dir, ", \"th\": 256, \"the\": 257");
        if (cases[i].config)
            checkpoint_write(dir, "tokenizer_config.json", cases[i].config);
        if (cases[i].merges)
            checkpoint_write(dir, "merges.txt", cases[i].merges);
        if (cases[i].added)
            checkpoint_write(dir, "added_tokens.json", cases[i].added);
        struct tokenizer *t = tokenizer_open(dir, &err);

        if (!cases[i].word) {
            if (!t)
                fail_msg("case %zu: %s", i, err.msg);
            EXPECT_IDS(t, "the<img>th", 257, 300, 256);
            assert_true(tokenizer_is_special(t, 300));
        } else if (t || !strstr(err.msg, cases[i].word)) {
            fail_msg("case %zu (%s): %s", i, cases[i].word, t ? "accepted" : err.msg);
        } else {
            assert_int_equal(err.code, ERROR_FAILED_PRECONDITION);
        }
        tokenizer_close(t);
        checkpoint_remove(dir);
    }
}

/* Any sequence of ids: pushes and flush together are the whole decoding. */
static void test_incremental(void **state)
{
    char dir[256];
    struct error err = {0};

    (void)state;
    checkpoint_make(dir);
    struct tokenizer *t = tokenizer_open(dir, &err);

    for (int round = 0; round < 3000; round++) {
        static const int32_t pool[] = {0xe4, 0xb8, 0xad, 0xf0, 0x9f, 0x98, 0x80, 0xc3, 0xa9,
                                       'a',  0xed, 0xa0, 301,  307,  9999, -1,   0xff, 0x80};
        int32_t ids[12];
        int n = 1 + (int)next_random(12), skip_special = (int)next_random(2);
        char pieces[512], raw[64], want[200];
        size_t n_pieces = 0, n_bytes, n_raw = 0;
        struct detokenizer d;
        struct arena a;

        detokenizer_init(&d, t, skip_special);
        for (int i = 0; i < n; i++) {
            size_t k;

            ids[i] = pool[next_random(sizeof(pool) / sizeof(pool[0]))];
            const char *bytes = tokenizer_token_bytes(t, ids[i], &k);

            if (!skip_special || !tokenizer_is_special(t, ids[i])) {
                memcpy(raw + n_raw, bytes, k);
                n_raw += k;
            }
            n_pieces += detokenizer_push(&d, ids[i], pieces + n_pieces);
            assert_int_equal(utf8_valid_prefix(pieces, n_pieces), n_pieces);
        }
        n_pieces += detokenizer_flush(&d, pieces + n_pieces);
        arena_init(&a, BUDGET);
        char *text = tokenizer_decode(t, ids, n, skip_special, &a, &n_bytes);

        assert_int_equal(n_bytes, n_pieces);
        assert_memory_equal(text, pieces, n_bytes);
        assert_int_equal(utf8_lossy(raw, n_raw, want), n_bytes);
        assert_memory_equal(text, want, n_bytes);
        arena_release(&a);
    }
    tokenizer_close(t);
    checkpoint_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_utf8),         cmocka_unit_test(test_nfc),
        cmocka_unit_test(test_nfc_long_run), cmocka_unit_test(test_bpe),
        cmocka_unit_test(test_tokenizer),    cmocka_unit_test(test_limits),
        cmocka_unit_test(test_refusals),     cmocka_unit_test(test_parts),
        cmocka_unit_test(test_incremental),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
