/*
 * The C client against a real daemon: client_test ADDRESS PICTURE. test_client.py starts both.
 * The demo model is asked what deploy/demo/examples/examples.json lists for scene-two.png.
 */
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "client/internvl_client.h"

#define WHOLE "A purple square on the left and a yellow star at the bottom left."

static const char *address;
static uint8_t picture[1 << 20];
static size_t n_picture;
static struct internvl_client *client;

struct sheet {
    char text[16384];
    size_t n_text;
    int n_prompt, n_started, n_deltas, n_done, n_ids, n_positions;
    int stop_after; // deltas; 0: never
    struct internvl_cancel *cancel_at_first;
    enum internvl_finish_reason finish;
    struct internvl_usage usage;
    struct internvl_error status; // of a call on a queue
    int ended;
};

static int take(void *arg, const struct internvl_event *e)
{
    struct sheet *s = arg;
    switch (e->kind) {
    case INTERNVL_STARTED:
        s->n_started++;
        assert_true(e->started.request_id[0] != '\0');
        break;
    case INTERNVL_PROMPT:
        assert_int_equal(e->prompt.first_position, s->n_prompt + 1);
        s->n_prompt += (int)e->prompt.n_positions;
        break;
    case INTERNVL_DELTA:
        s->n_deltas++;
        s->n_ids += (int)e->delta.n_token_ids;
        s->n_positions += (int)e->delta.n_logprobs;
        s->n_text +=
            (size_t)snprintf(s->text + s->n_text, sizeof(s->text) - s->n_text, "%s", e->delta.text);
        assert_true(s->n_text < sizeof(s->text));
        s->finish = e->delta.finish_reason;
        if (s->cancel_at_first)
            internvl_cancel(s->cancel_at_first);
        break;
    case INTERNVL_DONE:
        s->n_done++;
        s->usage = e->done.usage;
        break;
    }
    return s->stop_after && s->n_deltas >= s->stop_after;
}

static void take_end(void *arg, const struct internvl_error *status)
{
    struct sheet *s = arg;
    s->status = *status;
    s->ended++;
}

/* "Describe the image.", or with `long_answer` thousands of tokens. */
struct question {
    struct internvl_part parts[2];
    struct internvl_message message;
    struct internvl_generate_request request;
};

static void ask(struct question *q, int long_answer)
{
    memset(q, 0, sizeof(*q));
    q->parts[0] =
        (struct internvl_part){.kind = INTERNVL_IMAGE, .data = picture, .n_bytes = n_picture};
    q->parts[1] = (struct internvl_part){.kind = INTERNVL_TEXT, .text = "Describe the image."};
    q->message = (struct internvl_message){"user", q->parts, 2};
    q->request.prompt.messages = &q->message;
    q->request.prompt.n_messages = 1;
    if (long_answer) {
        q->request.sampling.set = INTERNVL_MAX_TOKENS;
        q->request.sampling.max_tokens = 3000;
        q->request.sampling.ignore_eos = 1;
    }
}

static void wait_idle(void)
{
    struct internvl_model m;
    for (;;) {
        assert_int_equal(internvl_get_model(client, NULL, &m, NULL), 0);
        int idle = m.load.running == 0 && m.load.waiting == 0;
        internvl_model_release(&m);
        if (idle)
            return;
    }
}

static void test_generate(void **state)
{
    (void)state;
    struct question q;
    struct sheet s = {0};
    struct internvl_error err = {0};
    ask(&q, 0);
    q.request.sampling.set |= INTERNVL_LOGPROBS | INTERNVL_PROMPT_LOGPROBS;
    assert_int_equal(internvl_generate(client, &q.request, NULL, take, &s, &err), 0);
    assert_int_equal(err.code, INTERNVL_OK);
    assert_string_equal(s.text, WHOLE);
    assert_int_equal(s.n_started, 1);
    assert_int_equal(s.n_done, 1);
    assert_int_equal(s.finish, INTERNVL_FINISH_STOP);
    assert_int_equal(s.n_positions, s.n_ids);
    assert_int_equal(s.n_prompt, s.usage.prompt_tokens - 1);
    assert_int_equal(s.usage.completion_tokens, s.n_ids);
    assert_true(s.usage.image_tokens > 0);
}

static void test_error(void **state)
{
    (void)state;
    struct question q;
    struct sheet s = {0};
    struct internvl_error err = {0};
    ask(&q, 0);
    q.parts[0].n_bytes = n_picture / 2;
    assert_int_equal(internvl_generate(client, &q.request, NULL, take, &s, &err), -1);
    assert_int_equal(err.code, INTERNVL_INVALID_ARGUMENT);
    assert_true(err.msg[0] != '\0');
    ask(&q, 0);
    q.message.role = "nobody";
    assert_int_equal(internvl_generate(client, &q.request, NULL, take, &s, &err), -1);
    assert_int_equal(err.code, INTERNVL_INVALID_ARGUMENT);
    assert_int_equal(s.n_started, 0);
}

static void test_cancel_from_the_callback(void **state)
{
    (void)state;
    struct question q;
    struct sheet s = {.stop_after = 3};
    struct internvl_error err = {0};
    ask(&q, 1);
    assert_int_equal(internvl_generate(client, &q.request, NULL, take, &s, &err), -1);
    assert_int_equal(err.code, INTERNVL_CANCELLED);
    assert_int_equal(s.n_deltas, 3);
    wait_idle();
}

static void test_cancel_handle(void **state)
{
    (void)state;
    struct question q;
    struct internvl_error err = {0};
    struct internvl_cancel *handle = internvl_cancel_new();
    struct sheet s = {.cancel_at_first = handle};
    struct internvl_call_options o = {.cancel = handle};
    ask(&q, 1);
    assert_int_equal(internvl_generate(client, &q.request, &o, take, &s, &err), -1);
    assert_int_equal(err.code, INTERNVL_CANCELLED);
    assert_true(s.n_ids < 3000);
    internvl_cancel_free(handle);
    wait_idle();
}

static void test_deadline(void **state)
{
    (void)state;
    struct question q;
    struct sheet s = {0};
    struct internvl_error err = {0};
    struct internvl_call_options o = {.timeout_ms = 50};
    ask(&q, 1);
    assert_int_equal(internvl_generate(client, &q.request, &o, take, &s, &err), -1);
    assert_int_equal(err.code, INTERNVL_DEADLINE_EXCEEDED);
    wait_idle();
}

static void test_many_from_one_thread(void **state)
{
    (void)state;
    enum { N = 32 };
    static struct sheet sheets[N];
    struct question q;
    struct internvl_queue *queue = internvl_queue_open(client);
    ask(&q, 0);
    memset(sheets, 0, sizeof(sheets));
    for (int i = 0; i < N; i++)
        assert_int_equal(
            internvl_generate_start(queue, &q.request, NULL, take, take_end, &sheets[i], NULL), 0);
    while (internvl_queue_poll(queue, -1) > 0)
        ;
    for (int i = 0; i < N; i++) {
        assert_int_equal(sheets[i].ended, 1);
        assert_int_equal(sheets[i].status.code, INTERNVL_OK);
        assert_string_equal(sheets[i].text, WHOLE);
    }
    internvl_queue_close(queue);
}

static void test_queue_closed_early(void **state)
{
    (void)state;
    struct sheet s = {0};
    struct question q;
    struct internvl_queue *queue = internvl_queue_open(client);
    ask(&q, 1);
    assert_int_equal(internvl_generate_start(queue, &q.request, NULL, take, take_end, &s, NULL), 0);
    while (s.n_deltas == 0)
        assert_int_equal(internvl_queue_poll(queue, -1), 1);
    internvl_queue_close(queue);
    assert_int_equal(s.ended, 1);
    assert_int_equal(s.status.code, INTERNVL_CANCELLED);
    wait_idle();
}

static void *generate_in_thread(void *arg)
{
    struct question q;
    ask(&q, 0);
    for (int i = 0; i < 4; i++) {
        memset(arg, 0, sizeof(struct sheet));
        if (internvl_generate(client, &q.request, NULL, take, arg, NULL))
            return arg;
    }
    return NULL;
}

static void test_many_threads_one_client(void **state)
{
    (void)state;
    enum { N = 8 };
    static struct sheet sheets[N];
    pthread_t threads[N];
    for (int i = 0; i < N; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, generate_in_thread, &sheets[i]), 0);
    for (int i = 0; i < N; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        assert_null(failed);
        assert_string_equal(sheets[i].text, WHOLE);
    }
}

static void test_forward(void **state)
{
    (void)state;
    struct question q;
    struct internvl_forward_result r;
    struct internvl_error err = {0};
    const char *outputs[] = {"logits", "image_features"};
    ask(&q, 0);
    struct internvl_forward_request f = {
        .prompt = q.request.prompt, .outputs = outputs, .n_outputs = 2, .logits_to_keep = 2};
    assert_int_equal(internvl_forward(client, &f, NULL, &r, &err), 0);
    assert_int_equal(r.n_tensors, 2);
    for (size_t i = 0; i < r.n_tensors; i++)
        for (size_t k = 0; k < r.tensors[i].n_elements; k++)
            assert_true(isfinite(r.tensors[i].data[k]));
    assert_false(r.has_loss);
    assert_int_equal(r.usage.prompt_tokens, r.n_token_ids);

    /* Labels are the prompt's own ids: a loss, and one log-probability a token. */
    int32_t *labels = calloc(r.n_token_ids, sizeof(*labels));
    size_t n_labels = r.n_token_ids;
    for (size_t i = 0; i < n_labels; i++)
        labels[i] = (int32_t)r.token_ids[i];
    internvl_forward_result_release(&r);
    f.n_outputs = 0;
    f.logits_to_keep = 0;
    f.labels = labels;
    f.n_labels = n_labels;
    assert_int_equal(internvl_forward(client, &f, NULL, &r, &err), 0);
    assert_true(r.has_loss && r.loss > 0);
    assert_int_equal(r.n_token_logprobs, n_labels);
    double sum = 0;
    for (size_t i = 0; i < n_labels; i++)
        sum -= (double)r.token_logprobs[i];
    assert_true(fabs(sum / (double)(n_labels - 1) - r.loss) < 1e-4);
    internvl_forward_result_release(&r);

    f.n_labels = 1; // too few
    assert_int_equal(internvl_forward(client, &f, NULL, &r, &err), -1);
    assert_int_equal(err.code, INTERNVL_INVALID_ARGUMENT);
    free(labels);
}

static void test_tokenize(void **state)
{
    (void)state;
    struct internvl_tokenize_request t = {.text = "Hello there, h\xc3\xa9!"};
    struct internvl_tokenize_result r, back;
    assert_int_equal(internvl_tokenize(client, &t, NULL, &r, NULL), 0);
    assert_int_equal(r.n_tokens, r.n_token_ids);
    struct internvl_tokenize_request ids = {.token_ids = r.token_ids, .n_token_ids = r.n_token_ids};
    assert_int_equal(internvl_tokenize(client, &ids, NULL, &back, NULL), 0);
    assert_string_equal(back.text, t.text);
    internvl_tokenize_result_release(&back);
    internvl_tokenize_result_release(&r);

    struct question q;
    ask(&q, 0);
    struct internvl_tokenize_request chat = {.prompt = &q.request.prompt};
    assert_int_equal(internvl_tokenize(client, &chat, NULL, &r, NULL), 0);
    assert_int_equal(r.n_media, 1);
    assert_true(r.media[0].tiles > 0 && r.media[0].tokens < r.n_token_ids);
    internvl_tokenize_result_release(&r);
}

static void test_model_and_health(void **state)
{
    (void)state;
    struct internvl_model m;
    enum internvl_health health;
    struct internvl_error err = {0};
    assert_int_equal(internvl_get_model(client, NULL, &m, &err), 0);
    assert_int_equal(m.vocab_size, 1024);
    assert_true(m.n_ranks >= 3);
    assert_string_equal(m.ranks[0].role, "gateway");
    assert_true(m.limits.max_model_len > 0);
    assert_true(m.limits.max_continuations > 0);
    assert_true(m.limits.max_forward_bytes > 0);
    assert_true(m.limits.max_text_bytes > 0);
    internvl_model_release(&m);
    assert_int_equal(internvl_check_health(client, "", NULL, &health, &err), 0);
    assert_int_equal(health, INTERNVL_HEALTH_SERVING);
    assert_int_equal(internvl_check_health(client, "nobody", NULL, &health, &err), -1);
    assert_int_equal(err.code, INTERNVL_NOT_FOUND);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_generate),
        cmocka_unit_test(test_error),
        cmocka_unit_test(test_cancel_from_the_callback),
        cmocka_unit_test(test_cancel_handle),
        cmocka_unit_test(test_deadline),
        cmocka_unit_test(test_many_from_one_thread),
        cmocka_unit_test(test_queue_closed_early),
        cmocka_unit_test(test_many_threads_one_client),
        cmocka_unit_test(test_forward),
        cmocka_unit_test(test_tokenize),
        cmocka_unit_test(test_model_and_health),
    };
    FILE *f = argc == 3 ? fopen(argv[2], "rb") : NULL;
    if (!f) {
        fprintf(stderr, "usage: client_test ADDRESS PICTURE\n");
        return 2;
    }
    n_picture = fread(picture, 1, sizeof(picture), f);
    fclose(f);
    address = argv[1];
    struct internvl_options options = {.address = address};
    client = internvl_connect(&options, NULL);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    internvl_close(client);
    return failed;
}
