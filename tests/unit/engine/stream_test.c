/*
 * Streams: text that is split inside a code point, stop strings that are split over tokens, what is
 * held back, coalescing, notifications, the end of a request, tensors; and one writer with one
 * reader at the same time. With the demo model's tokenizer, whose vocabulary has every byte.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "daemon/engine/stream.h"
#include "kernels/log.h"

static struct tokenizer *tokenizer;

static int open_tokenizer(void **state)
{
    (void)state;
    struct error err;
    tokenizer = tokenizer_open(INTERNVLD_DEMO_MODEL, &err);
    if (!tokenizer)
        print_error("%s\n", err.msg);
    return tokenizer ? 0 : -1;
}

static int close_tokenizer(void **state)
{
    (void)state;
    tokenizer_close(tokenizer);
    return 0;
}

/* The id of one printable ASCII character, or of a byte's stand-in. */
static int32_t id_of(const char *content)
{
    int32_t id = tokenizer_token_id(tokenizer, content);
    assert_true(id >= 0);
    return id;
}

static void count(void *arg)
{
    ++*(int *)arg;
}

static struct request *new_request(const struct stop_string *stops, int32_t n_stops)
{
    struct request *r = request_new(1 << 16);
    r->stop_strings = stops;
    r->n_stop_strings = n_stops;
    return r;
}

static enum finish_reason push_id(struct stream *s, int32_t candidate, int32_t id, int is_end)
{
    struct sample_result sample = {.token.id = id, .token.logprob = -1.5f};
    return stream_push(s, candidate, &sample, is_end);
}

/* Pushes each character of `text` as a token of its own until a stop string is complete. */
static enum finish_reason push_text(struct stream *s, const char *text)
{
    enum finish_reason reason = FINISH_NONE;
    for (; *text && reason == FINISH_NONE; text++) {
        char one[2] = {*text, 0};
        reason = push_id(s, 0, id_of(one), 0);
    }
    return reason;
}

static void assert_drained(struct stream *s, const char *text, int32_t n_ids)
{
    struct stream_delta d;
    assert_true(stream_drain(s, &d));
    assert_int_equal(d.n_candidates, 1);
    assert_string_equal(d.candidates[0].text, text);
    assert_int_equal(d.candidates[0].n_text_bytes, strlen(text));
    assert_int_equal(d.candidates[0].n_ids, n_ids);
    stream_delta_release(&d);
}

static const struct usage no_usage;
static const struct timing no_timing;

static void test_code_point_over_tokens(void **state)
{
    (void)state;
    struct request *r = new_request(NULL, 0);
    struct stream *s = stream_new(r, tokenizer, NULL, NULL);
    push_id(s, 0, id_of("Ã"), 0); // the stand-in of byte c3
    assert_drained(s, "", 1);
    push_id(s, 0, id_of("©"), 0); // a9: together é
    assert_drained(s, "\xc3\xa9", 1);
    push_id(s, 0, id_of("Ã"), 0);
    stream_finish_candidate(s, 0, FINISH_LENGTH); // half a code point is the replacement character
    assert_drained(s, "\xef\xbf\xbd", 1);
    stream_unref(s);
    request_free(r);
}

static void test_stop_string(void **state)
{
    (void)state;
    static const struct stop_string stops[] = {{"cde", 3}, {"zz", 2}};
    for (int include = 0; include < 2; include++) {
        struct request *r = new_request(stops, 2);
        r->include_stop_str = include;
        struct stream *s = stream_new(r, tokenizer, NULL, NULL);
        assert_int_equal(push_text(s, "abc"), FINISH_NONE);
        assert_drained(s, "ab", 3); // c may begin cde
        assert_int_equal(push_text(s, "d"), FINISH_NONE);
        assert_drained(s, "", 1);
        assert_int_equal(push_text(s, "a"), FINISH_NONE); // it did not
        assert_drained(s, "cda", 1);
        assert_int_equal(push_text(s, "cdexy"), FINISH_STOP);
        stream_finish_candidate(s, 0, FINISH_STOP);
        struct stream_delta d;
        assert_true(stream_drain(s, &d));
        assert_string_equal(d.candidates[0].text, include ? "cde" : "");
        assert_int_equal(d.candidates[0].n_ids, 3);
        assert_int_equal(d.candidates[0].completion_tokens, 8);
        assert_int_equal(d.candidates[0].finish, FINISH_STOP);
        assert_int_equal(d.candidates[0].stop_string, 0);
        assert_int_equal(d.candidates[0].stop_token_id, -1);
        stream_delta_release(&d);
        assert_int_equal(push_text(s, "a"), FINISH_NONE); // over: ignored
        assert_false(stream_drain(s, &d));
        stream_unref(s);
        request_free(r);
    }
}

static void test_held_text_comes_at_the_end(void **state)
{
    (void)state;
    static const struct stop_string stops[] = {{"stop", 4}};
    struct request *r = new_request(stops, 1);
    struct stream *s = stream_new(r, tokenizer, NULL, NULL);
    push_text(s, "nonsto");
    assert_drained(s, "non", 6);
    stream_finish_candidate(s, 0, FINISH_LENGTH);
    assert_drained(s, "sto", 0);
    stream_unref(s);
    request_free(r);
}

static void test_end_token(void **state)
{
    (void)state;
    for (int include = 0; include < 2; include++) {
        struct request *r = new_request(NULL, 0);
        r->include_stop_str = include;
        struct stream *s = stream_new(r, tokenizer, NULL, NULL);
        push_text(s, "ab");
        push_id(s, 0, id_of("c"), 1);
        stream_finish_candidate(s, 0, FINISH_STOP);
        struct stream_delta d;
        assert_true(stream_drain(s, &d));
        assert_string_equal(d.candidates[0].text, include ? "abc" : "ab");
        assert_int_equal(d.candidates[0].n_ids, 3);
        assert_int_equal(d.candidates[0].stop_token_id, id_of("c"));
        assert_null(d.candidates[0].logprobs);
        stream_delta_release(&d);
        stream_unref(s);
        request_free(r);
    }
}

/* Any text, any stop strings: the same as looking at the whole text after each token. */
static void test_random_stops(void **state)
{
    (void)state;
    srand(7);
    for (int round = 0; round < 3000; round++) {
        char text[41], stops_text[3][6];
        struct stop_string stops[3];
        int n_stops = 1 + rand() % 3, include = rand() % 2, min_tokens = rand() % 2 * (rand() % 20);
        for (int i = 0; i < 40; i++)
            text[i] = (char)('a' + rand() % 3);
        text[40] = '\0';
        for (int i = 0; i < n_stops; i++) {
            stops[i] = (struct stop_string){stops_text[i], 1 + rand() % 5};
            for (int j = 0; j < stops[i].n_bytes; j++)
                stops_text[i][j] = (char)('a' + rand() % 3);
        }
        size_t expected = 40, n_tokens = 40;
        for (size_t k = (size_t)min_tokens + 1; k <= 40 && n_tokens == 40 && expected == 40; k++) {
            int best = -1;
            for (int i = 0; i < n_stops; i++)
                if ((size_t)stops[i].n_bytes <= k &&
                    memcmp(text + k - (size_t)stops[i].n_bytes, stops[i].bytes,
                           (size_t)stops[i].n_bytes) == 0 &&
                    (best < 0 || stops[i].n_bytes > stops[best].n_bytes))
                    best = i;
            if (best >= 0) {
                n_tokens = k;
                expected = include ? k : k - (size_t)stops[best].n_bytes;
                break;
            }
        }
        struct request *r = new_request(stops, n_stops);
        r->include_stop_str = include;
        r->min_tokens = min_tokens;
        struct stream *s = stream_new(r, tokenizer, NULL, NULL);
        char got[64];
        size_t n_got = 0, n_ids = 0;
        enum finish_reason reason = FINISH_NONE;
        for (size_t k = 0; k < 40 && reason == FINISH_NONE; k++) {
            char one[2] = {text[k], 0};
            reason = push_text(s, one);
            if (k == 39 || reason != FINISH_NONE)
                stream_finish_candidate(s, 0, reason == FINISH_STOP ? reason : FINISH_LENGTH);
            struct stream_delta d;
            if (rand() % 3 == 0 || k == 39 || reason != FINISH_NONE) {
                assert_true(stream_drain(s, &d));
                memcpy(got + n_got, d.candidates[0].text, d.candidates[0].n_text_bytes);
                n_got += d.candidates[0].n_text_bytes;
                n_ids += (size_t)d.candidates[0].n_ids;
                stream_delta_release(&d);
            }
        }
        assert_int_equal(n_ids, n_tokens);
        assert_int_equal(n_got, expected);
        assert_memory_equal(got, text, n_got);
        stream_unref(s);
        request_free(r);
    }
}

static void test_interval(void **state)
{
    (void)state;
    int n_told = 0;
    struct request *r = new_request(NULL, 0);
    struct stream *s = stream_new(r, tokenizer, count, &n_told);
    struct stream_delta d;
    stream_set_interval(s, 3);
    push_id(s, 0, id_of("a"), 0); // the first one at once
    assert_int_equal(n_told, 1);
    assert_drained(s, "a", 1);
    push_id(s, 0, id_of("b"), 0);
    push_id(s, 0, id_of("c"), 0);
    assert_int_equal(n_told, 1);
    assert_false(stream_drain(s, &d));
    push_id(s, 0, id_of("d"), 0);
    assert_int_equal(n_told, 2);
    assert_drained(s, "bcd", 3);
    push_id(s, 0, id_of("e"), 0);
    stream_finish_candidate(s, 0, FINISH_LENGTH); // and the end
    assert_int_equal(n_told, 3);
    assert_drained(s, "e", 1);
    stream_unref(s);
    request_free(r);
}

static void test_coalescing_and_notify(void **state)
{
    (void)state;
    int n_told = 0;
    struct request *r = new_request(NULL, 0);
    r->n = 2;
    r->sampling.n_logprobs = 0;
    struct stream *s = stream_new(r, tokenizer, count, &n_told);
    struct stream_delta d;
    assert_false(stream_drain(s, &d));
    stream_push_started(s);
    for (int i = 0; i < 5; i++)
        push_id(s, i % 2, id_of("a"), 0);
    assert_int_equal(n_told, 1);
    assert_true(stream_drain(s, &d));
    assert_true(d.started);
    assert_false(d.done);
    assert_int_equal(d.n_candidates, 2);
    assert_int_equal(d.candidates[0].n_ids, 3);
    assert_int_equal(d.candidates[1].n_ids, 2);
    assert_string_equal(d.candidates[1].text, "aa");
    assert_true(d.candidates[0].logprobs[2].token.logprob == -1.5f);
    stream_delta_release(&d);
    push_id(s, 1, id_of("b"), 0);
    assert_int_equal(n_told, 2);
    assert_drained(s, "b", 1);
    stream_mute(s);
    struct error err;
    error_set(&err, ERROR_INTERNAL, "broken");
    stream_finish(s, &err, &no_usage, &no_timing);
    push_id(s, 0, id_of("c"), 0);
    assert_int_equal(n_told, 2);
    assert_true(stream_drain(s, &d));
    assert_true(d.done);
    assert_false(d.started);
    assert_int_equal(d.n_candidates, 0);
    assert_int_equal(d.error.code, ERROR_INTERNAL);
    stream_delta_release(&d);
    assert_false(stream_drain(s, &d));
    stream_unref(s);
    request_free(r);
}

/* The reader may cancel at any time, also when the request is gone. */
static void test_cancel(void **state)
{
    (void)state;
    struct request *r = new_request(NULL, 0);
    struct stream *s = stream_new(r, tokenizer, NULL, NULL);
    r->stream = stream_ref(s);
    assert_int_equal(atomic_load(&r->cancelled), 0);
    stream_cancel(s);
    assert_int_equal(atomic_load(&r->cancelled), 1);
    request_free(r);
    stream_cancel(s);
    stream_unref(s);
}

/* Rows computed again come once; what has gathered is handed over and not kept. */
static void test_targets(void **state)
{
    (void)state;
    struct request *r = new_request(NULL, 0);
    struct stream *s = stream_new(r, NULL, NULL, NULL);
    struct stream_delta d;
    struct token_logprob values[6];
    for (int32_t i = 0; i < 6; i++)
        values[i] = (struct token_logprob){.id = i, .logprob = (float)-i, .rank = 1};
    stream_push_targets(s, 0, 2, values);
    stream_push_targets(s, 2, 1, values + 2);
    assert_true(stream_drain(s, &d));
    assert_int_equal(d.n_targets, 3);
    assert_int_equal(d.targets[2].id, 2);
    stream_delta_release(&d);
    stream_push_targets(s, 0, 2, values);
    assert_false(stream_drain(s, &d));
    stream_push_targets(s, 1, 5, values + 1);
    stream_finish(s, NULL, &no_usage, &no_timing);
    stream_push_targets(s, 6, 1, values);
    assert_true(stream_drain(s, &d));
    assert_true(d.done);
    assert_int_equal(d.n_targets, 3);
    for (int32_t i = 0; i < 3; i++)
        assert_int_equal(d.targets[i].id, 3 + i);
    stream_delta_release(&d);
    stream_unref(s);
    request_free(r);
}

static void test_tensors(void **state)
{
    (void)state;
    struct request *r = new_request(NULL, 0);
    r->n_ids = 4;
    struct stream *s = stream_new(r, NULL, NULL, NULL); // without a tokenizer there is no text
    const float rows[] = {1, 2, 3, 4};
    stream_push_rows(s, "logits", 0, 1, 3, 2, 2, rows);
    stream_push_rows(s, "logits", 0, 0, 3, 1, 2, rows);
    stream_push_rows(s, "logits", 0, 0, 3, 1, 2, rows);
    stream_push_rows(s, "features", 2, 0, 1, 1, 1, rows);
    push_id(s, 0, 5, 0);
    assert_drained(s, "", 1); // tensors come with the end
    stream_finish(s, NULL, &no_usage, &no_timing);
    struct stream_delta d;
    assert_true(stream_drain(s, &d));
    assert_int_equal(d.error.code, ERROR_OK);
    assert_int_equal(d.n_tensors, 2);
    assert_string_equal(d.tensors[0].name, "logits");
    const float expected[] = {1, 2, 1, 2, 3, 4};
    assert_memory_equal(d.tensors[0].data, expected, sizeof(expected));
    assert_int_equal(d.tensors[1].n_tiles, 2);
    stream_delta_release(&d);
    stream_unref(s);

    s = stream_new(r, NULL, NULL, NULL);
    stream_push_rows(s, "logits", 0, 0, 1 << 20, 0, 1 << 20, rows);
    stream_finish(s, NULL, &no_usage, &no_timing);
    assert_true(stream_drain(s, &d));
    assert_int_equal(d.error.code, ERROR_RESOURCE_EXHAUSTED);
    stream_delta_release(&d);
    stream_unref(s);
    request_free(r);
}

/* ---- a writer and a reader ---- */

struct reader {
    struct stream *stream;
    pthread_mutex_t mutex;
    pthread_cond_t told;
    int n_told, n_ids, done;
    size_t n_text_bytes;
};

static void tell(void *arg)
{
    struct reader *r = arg;
    pthread_mutex_lock(&r->mutex);
    r->n_told++;
    pthread_cond_signal(&r->told);
    pthread_mutex_unlock(&r->mutex);
}

static void *read_all(void *arg)
{
    struct reader *r = arg;
    while (!r->done) {
        pthread_mutex_lock(&r->mutex);
        while (r->n_told == 0)
            pthread_cond_wait(&r->told, &r->mutex);
        r->n_told = 0;
        pthread_mutex_unlock(&r->mutex);
        struct stream_delta d;
        while (stream_drain(r->stream, &d)) {
            for (int i = 0; i < d.n_candidates; i++) {
                r->n_ids += d.candidates[i].n_ids;
                r->n_text_bytes += d.candidates[i].n_text_bytes;
            }
            r->done = d.done;
            stream_delta_release(&d);
        }
    }
    stream_mute(r->stream);
    stream_unref(r->stream);
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    static const struct stop_string stops[] = {{"abd", 3}};
    for (int round = 0; round < 50; round++) {
        struct request *r = new_request(stops, 1);
        struct reader reader = {.mutex = PTHREAD_MUTEX_INITIALIZER,
                                .told = PTHREAD_COND_INITIALIZER};
        struct stream *s = stream_new(r, tokenizer, tell, &reader);
        r->stream = s;
        reader.stream = stream_ref(s);
        pthread_t thread;
        assert_int_equal(pthread_create(&thread, NULL, read_all, &reader), 0);
        for (int i = 0; i < 100; i++)
            push_text(s, "abc");
        stream_finish_candidate(s, 0, FINISH_LENGTH);
        stream_finish(s, NULL, &no_usage, &no_timing);
        request_free(r);
        pthread_join(thread, NULL);
        assert_int_equal(reader.n_ids, 300);
        assert_int_equal(reader.n_text_bytes, 300);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_code_point_over_tokens),
        cmocka_unit_test(test_stop_string),
        cmocka_unit_test(test_held_text_comes_at_the_end),
        cmocka_unit_test(test_end_token),
        cmocka_unit_test(test_random_stops),
        cmocka_unit_test(test_interval),
        cmocka_unit_test(test_coalescing_and_notify),
        cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_targets),
        cmocka_unit_test(test_tensors),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, open_tokenizer, close_tokenizer);
}
