/*
 * The whole engine over real control connections: rank 0 runs it and submits, the others are the
 * fake workers of fake_workers.h. Every answer is compared with the one computed from the ids
 * alone, whatever was cancelled, late, preempted or in another batch beside it.
 *
 * usage: mpirun -n 3 | 4 | 7 engine_mpi_test mixed | forward | vision | limits | drain | lost
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "daemon/engine/engine.h"
#include "kernels/clock.h"
#include "kernels/log.h"
#include "parallel/comm.h"
#include "parallel/control.h"
#include "parallel/launch.h"
#include "tests/unit/engine/fake_workers.h"

#define check(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            die("check failed: %s", #condition);                                                   \
    } while (0)

#define PAGE_SIZE 4
#define N_PAGES 60
#define MAX_MODEL_LEN 200
#define MAX_N 4
#define MAX_TILES 5

static const int32_t eos_ids[] = {FAKE_EOS};
static struct engine *engine;
static char gate[] = "/tmp/internvld-engine-test-XXXXXX"; // a file that the vision ranks may await
static const struct tokenizer *tokenizer;

static void sleep_us(int us)
{
    const struct timespec t = {.tv_nsec = us * 1000L};
    nanosleep(&t, NULL);
}

/* ---- a call: what a client asked and what it got ---- */

struct bell { // rung by the engine, heard by one client
    pthread_mutex_t mutex;
    pthread_cond_t rung;
    int n;
};

struct answer {
    int32_t ids[MAX_MODEL_LEN];
    char text[8192];
    int32_t n_ids;
    size_t n_text;
    enum finish_reason finish;
};

struct call {
    struct stream *stream;
    int32_t ids[MAX_MODEL_LEN];
    int32_t n_ids, n, max_tokens, min_tokens, n_tiles;
    int ignore_eos;
    int pixels[MAX_TILES]; // a tile's four bytes, of which the features depend on the first
    char stop[8];          // "": none
    struct answer answers[MAX_N];
    int may_be_cancelled, may_be_late, started, done;
    struct token_logprob targets[3 * MAX_MODEL_LEN];
    int32_t n_targets;
    struct stream_delta last; // with the end
};

static void ring(void *arg)
{
    struct bell *b = arg;
    pthread_mutex_lock(&b->mutex);
    b->n++;
    pthread_cond_signal(&b->rung);
    pthread_mutex_unlock(&b->mutex);
}

/* A request like the call's description, ready to be submitted. */
static struct request *new_request(struct call *c, struct bell *b)
{
    static atomic_int number;
    struct request *r = request_new((size_t)1 << 20);
    snprintf(r->id, sizeof(r->id), "test-%d", atomic_fetch_add(&number, 1));
    r->n_ids = c->n_ids;
    r->ids = arena_alloc(&r->arena, (size_t)c->n_ids, sizeof(int32_t));
    memcpy(r->ids, c->ids, (size_t)c->n_ids * sizeof(int32_t));
    r->image_token_id = FAKE_IMAGE_TOKEN;
    r->n_image_tokens = c->n_tiles * FAKE_FEATURES_PER_TILE;
    r->n_tiles = c->n_tiles;
    r->channels = 1;
    r->height = r->width = 2;
    r->pixel_dtype = DTYPE_U8;
    if (c->n_tiles > 0) {
        uint8_t *pixels = arena_alloc(&r->arena, (size_t)c->n_tiles, 4);
        for (int32_t i = 0; i < c->n_tiles; i++)
            memcpy(pixels + 4 * i, &c->pixels[i], 4);
        r->pixels = pixels;
    }
    r->n = c->n;
    r->max_tokens = c->max_tokens;
    r->min_tokens = c->min_tokens;
    r->ignore_eos = c->ignore_eos;
    if (c->stop[0]) {
        struct stop_string *stop = arena_alloc(&r->arena, 1, sizeof(*stop));
        *stop = (struct stop_string){arena_strndup(&r->arena, c->stop, strlen(c->stop)),
                                     (int)strlen(c->stop)};
        r->stop_strings = stop;
        r->n_stop_strings = 1;
    }
    r->arrival_ns = clock_now_ns();
    r->stream = stream_new(r, tokenizer, ring, b);
    c->stream = stream_ref(r->stream);
    return r;
}

/* Takes what has come; the end of a stream ends the call. */
static void drain_call(struct call *c)
{
    struct stream_delta d;
    while (!c->done && stream_drain(c->stream, &d)) {
        c->started |= d.started;
        check(c->n_targets + d.n_targets <= 3 * MAX_MODEL_LEN);
        for (int32_t i = 0; i < d.n_targets; i++)
            c->targets[c->n_targets++] = d.targets[i];
        for (int i = 0; i < d.n_candidates; i++) {
            const struct candidate_delta *x = &d.candidates[i];
            struct answer *a = &c->answers[x->candidate];
            check(a->n_ids + x->n_ids <= MAX_MODEL_LEN);
            check(a->n_text + x->n_text_bytes < sizeof(a->text));
            if (x->n_ids > 0)
                memcpy(a->ids + a->n_ids, x->ids, (size_t)x->n_ids * sizeof(int32_t));
            memcpy(a->text + a->n_text, x->text, x->n_text_bytes);
            a->n_ids += x->n_ids;
            a->n_text += x->n_text_bytes;
            check(a->finish == FINISH_NONE);
            a->finish = x->finish;
            check(x->completion_tokens == a->n_ids);
        }
        if (d.done) {
            c->done = 1;
            c->last = d;
            stream_mute(c->stream);
            stream_unref(c->stream);
        } else {
            stream_delta_release(&d);
        }
    }
}

/* Until every call of the list has ended. */
static void wait_calls(struct call *calls, int n, struct bell *b)
{
    for (;;) {
        int n_done = 0;
        for (int i = 0; i < n; i++) {
            drain_call(&calls[i]);
            n_done += calls[i].done;
        }
        if (n_done == n)
            return;
        pthread_mutex_lock(&b->mutex);
        while (b->n == 0)
            pthread_cond_wait(&b->rung, &b->mutex);
        b->n = 0;
        pthread_mutex_unlock(&b->mutex);
    }
}

/* ---- what it should get ---- */

/* Candidate k's whole answer, from the ids alone. */
static void expect(const struct call *c, int32_t k, struct answer *a)
{
    struct detokenizer d;
    uint64_t last = 0;
    int32_t n_images = 0;
    for (int32_t i = 0; i < c->n_ids; i++) {
        float feature = 0;
        if (c->ids[i] == FAKE_IMAGE_TOKEN && c->n_tiles > 0) {
            feature = fake_feature(c->pixels[n_images / FAKE_FEATURES_PER_TILE] % 256,
                                   n_images % FAKE_FEATURES_PER_TILE);
            n_images++;
        }
        last = fake_entry(last, c->ids[i], feature);
    }
    detokenizer_init(&d, tokenizer, 1);
    memset(a, 0, sizeof(*a));
    size_t n_stop = strlen(c->stop);
    while (a->finish == FINISH_NONE) {
        int32_t id = fake_next_token(last, k, a->n_ids);
        if (a->n_ids < c->min_tokens && id == FAKE_EOS && !c->ignore_eos)
            id = FAKE_OTHER_TOKEN;
        a->ids[a->n_ids++] = id;
        last = fake_entry(last, id, 0);
        if (id == FAKE_EOS && !c->ignore_eos) {
            a->finish = FINISH_STOP;
            break;
        }
        size_t n_old = a->n_text;
        a->n_text += detokenizer_push(&d, id, a->text + a->n_text);
        for (size_t e = n_old + 1; n_stop > 0 && a->n_ids > c->min_tokens && e <= a->n_text; e++)
            if (e >= n_stop && memcmp(a->text + e - n_stop, c->stop, n_stop) == 0) {
                a->n_text = e - n_stop;
                a->finish = FINISH_STOP;
                return;
            }
        if (a->n_ids == c->max_tokens || c->n_ids + a->n_ids == MAX_MODEL_LEN)
            a->finish = FINISH_LENGTH;
    }
    a->n_text += detokenizer_flush(&d, a->text + a->n_text);
}

/* Whole and right, or ended early as it was asked for and right so far. Returns 1 when whole. */
static int check_call(struct call *c)
{
    static _Thread_local struct answer expected;
    enum error_code code = c->last.error.code;
    int32_t n_tokens = 0;
    check(c->done && c->started);
    check(code == ERROR_OK || (code == ERROR_CANCELLED && c->may_be_cancelled) ||
          (code == ERROR_DEADLINE_EXCEEDED && c->may_be_late));
    for (int32_t k = 0; k < c->n; k++) {
        const struct answer *a = &c->answers[k];
        expect(c, k, &expected);
        n_tokens += a->n_ids;
        check(a->n_ids <= expected.n_ids && a->n_text <= expected.n_text);
        check(memcmp(a->ids, expected.ids, (size_t)a->n_ids * sizeof(int32_t)) == 0);
        check(memcmp(a->text, expected.text, a->n_text) == 0);
        if (code == ERROR_OK) {
            check(a->n_ids == expected.n_ids && a->n_text == expected.n_text);
            check(a->finish == expected.finish);
        }
    }
    check(c->last.usage.prompt_tokens == c->n_ids && c->last.usage.tiles == c->n_tiles);
    check(c->last.usage.completion_tokens == n_tokens);
    check(c->last.timing.total_us >= c->last.timing.first_token_us);
    stream_delta_release(&c->last);
    return code == ERROR_OK;
}

/* The engine is at rest: nothing runs, every page is free. */
static void check_idle(void)
{
    struct engine_stats s;
    for (int i = 0; i < 10000; i++) {
        engine_stats(engine, &s);
        if (s.n_running + s.n_waiting + s.n_pages_used == 0)
            return;
        sleep_us(1000);
    }
    die("%d running, %d waiting, %d pages used of %d", s.n_running, s.n_waiting, s.n_pages_used,
        s.n_pages);
}

/* ---- mixed: many clients, random requests, cancels, deadlines ---- */

#define N_CLIENTS 3
#define N_WAVES 12
#define N_CALLS 16

static void random_call(struct call *c, unsigned *seed)
{
    memset(c, 0, sizeof(*c));
    c->n_tiles = rand_r(seed) % 3 == 0 ? 1 + rand_r(seed) % MAX_TILES : 0;
    c->n = rand_r(seed) % 4 == 0 ? 1 + rand_r(seed) % MAX_N : 1;
    c->max_tokens = 1 + rand_r(seed) % 40;
    c->min_tokens = rand_r(seed) % 3 == 0 ? rand_r(seed) % 10 : 0;
    c->ignore_eos = rand_r(seed) % 3 == 0;
    for (int32_t i = 0; i < c->n_tiles; i++) {
        c->pixels[i] = rand_r(seed) % 20;
        for (int32_t k = 0; k < FAKE_FEATURES_PER_TILE; k++)
            c->ids[c->n_ids++] = FAKE_IMAGE_TOKEN;
    }
    int n_text = 1 + rand_r(seed) % 60;
    for (int i = 0; i < n_text; i++)
        c->ids[c->n_ids++] = 10 + rand_r(seed) % 40;
    if (rand_r(seed) % 4 == 0) { // a stop string that the first candidate's text has
        static _Thread_local struct answer a;
        expect(c, 0, &a);
        size_t at = a.n_text > 4 ? (size_t)rand_r(seed) % (a.n_text - 3) : 0;
        int is_ascii = a.n_text > 4;
        for (size_t i = at; is_ascii && i < at + 3; i++)
            is_ascii &= a.text[i] > 0;
        if (is_ascii)
            memcpy(c->stop, a.text + at, 3);
    }
}

static void *client(void *arg)
{
    unsigned seed = (unsigned)(uintptr_t)arg;
    struct bell bell = {.mutex = PTHREAD_MUTEX_INITIALIZER, .rung = PTHREAD_COND_INITIALIZER};
    struct call *calls = xcalloc(N_CALLS, sizeof(*calls));
    intptr_t n_whole = 0;
    for (int wave = 0; wave < N_WAVES; wave++) {
        for (int i = 0; i < N_CALLS; i++) {
            struct error err;
            struct call *c = &calls[i];
            random_call(c, &seed);
            struct request *r = new_request(c, &bell);
            int fate = rand_r(&seed) % 8;
            c->may_be_cancelled = fate == 0;
            c->may_be_late = fate == 1;
            if (c->may_be_late)
                r->deadline_ns = clock_now_ns() + (uint64_t)(rand_r(&seed) % 8000) * 1000u;
            r->priority = rand_r(&seed) % 2;
            if (engine_submit(engine, r, &err) < 0)
                die("refused: %s", err.msg);
            if (rand_r(&seed) % 4 == 0)
                sleep_us(rand_r(&seed) % 500);
        }
        for (int i = 0; i < N_CALLS; i++)
            if (calls[i].may_be_cancelled) {
                sleep_us(rand_r(&seed) % 300);
                engine_cancel(engine, calls[i].stream);
            }
        wait_calls(calls, N_CALLS, &bell);
        for (int i = 0; i < N_CALLS; i++)
            n_whole += check_call(&calls[i]);
    }
    free(calls);
    return (void *)n_whole;
}

static void test_mixed(void)
{
    pthread_t threads[N_CLIENTS];
    intptr_t n_whole = 0;
    for (uintptr_t i = 0; i < N_CLIENTS; i++)
        check(pthread_create(&threads[i], NULL, client, (void *)(i + 1)) == 0);
    for (int i = 0; i < N_CLIENTS; i++) {
        void *n;
        pthread_join(threads[i], &n);
        n_whole += (intptr_t)n;
    }
    check_idle();
    struct engine_stats s;
    engine_stats(engine, &s);
    check(s.n_finished == N_CLIENTS * N_WAVES * N_CALLS);
    printf("mixed: %d requests, %d answered whole, %llu steps, %llu tokens, %llu tiles, %llu "
           "preemptions\n",
           N_CLIENTS * N_WAVES * N_CALLS, (int)n_whole, (unsigned long long)s.n_steps,
           (unsigned long long)s.n_generated_tokens, (unsigned long long)s.n_tiles,
           (unsigned long long)s.n_preempted);
}

/* ---- forward: tensors from every stage, over several chunks ---- */

static const struct stream_tensor *find_tensor(const struct call *c, const char *name)
{
    for (int i = 0; i < c->last.n_tensors; i++)
        if (strcmp(c->last.tensors[i].name, name) == 0)
            return &c->last.tensors[i];
    die("there is no tensor %s", name);
}

static void check_positions(const struct call *c, const char *name, int32_t n_cols)
{
    const struct stream_tensor *t = find_tensor(c, name);
    check(t->n_rows == c->n_ids && t->n_cols == n_cols && t->n_tiles == 0);
    for (int32_t i = 0; i < t->n_rows * n_cols; i++)
        check(t->data[i] == (float)(i / n_cols));
}

static void test_forward(void)
{
    struct bell bell = {.mutex = PTHREAD_MUTEX_INITIALIZER, .rung = PTHREAD_COND_INITIALIZER};
    struct call c = {.n = 1, .n_tiles = MAX_TILES, .n_ids = 100};
    for (int32_t i = 0; i < c.n_ids; i++)
        c.ids[i] = i < MAX_TILES * FAKE_FEATURES_PER_TILE ? FAKE_IMAGE_TOKEN : 10 + i % 30;
    for (int32_t i = 0; i < MAX_TILES; i++)
        c.pixels[i] = i + 1;
    struct request *r = new_request(&c, &bell);
    int32_t *targets = arena_alloc(&r->arena, 100, sizeof(int32_t));
    uint8_t *want = arena_alloc(&r->arena, 100, 1);
    for (int32_t i = 0; i < 100; i++) {
        targets[i] = i % 5 == 0 ? -1 : i;
        want[i] = i % 7 == 0 || i > 90;
    }
    r->targets = targets;
    r->n_target_top = 2;
    r->want_logits = want;
    r->want_image_features = 1;
    r->captures = CAPTURE_EMBEDS | CAPTURE_HIDDEN_STATES | CAPTURE_LOGITS;
    r->vision_captures = VISION_CAPTURE_HIDDEN_STATES;
    struct error err;
    check(engine_submit(engine, r, &err) == 0);
    wait_calls(&c, 1, &bell);
    check(c.last.error.code == ERROR_OK && c.answers[0].n_ids == 0);
    check_positions(&c, "inputs_embeds", FAKE_DIM);
    check_positions(&c, "hidden_states.0", 1);
    check_positions(&c, "hidden_states.1", 1);
    const struct stream_tensor *t = find_tensor(&c, "logits");
    int32_t row = 0;
    for (int32_t i = 0; i < 100; i++)
        if (i % 7 == 0 || i > 90)
            check(t->data[row++ * FAKE_LOGITS] == (float)i);
    check(t->n_rows == row && t->n_cols == FAKE_LOGITS);
    t = find_tensor(&c, "image_features");
    check(t->n_rows == MAX_TILES * FAKE_FEATURES_PER_TILE && t->n_tiles == MAX_TILES);
    for (int32_t i = 0; i < t->n_rows; i++)
        check(t->data[i * FAKE_DIM] ==
              fake_feature(1 + i / FAKE_FEATURES_PER_TILE, i % FAKE_FEATURES_PER_TILE));
    t = find_tensor(&c, "vision.hidden_states.0");
    check(t->n_rows == 2 * MAX_TILES && t->n_cols == 1 && t->n_tiles == MAX_TILES);
    for (int32_t i = 0; i < MAX_TILES; i++)
        check(t->data[2 * i] == (float)(i + 1) && t->data[2 * i + 1] == (float)-(i + 1));
    check(c.n_targets == 3 * 80); // of four in five rows: the target and two more
    for (int32_t i = 0, k = 0; i < 100; i++)
        for (int32_t j = 0; i % 5 != 0 && j < 3; j++, k++)
            check(c.targets[k].id == i && c.targets[k].logprob == (float)-i &&
                  c.targets[k].rank == j);
    stream_delta_release(&c.last);
}

/* ---- vision: the cache, jobs of several requests, decode beside a picture ---- */

static struct call picture_call(int n_tiles, const int *pixels)
{
    struct call c = {.n = 1, .n_tiles = n_tiles, .max_tokens = 20, .ignore_eos = 1};
    for (int i = 0; i < n_tiles; i++) {
        c.pixels[i] = pixels[i];
        for (int32_t k = 0; k < FAKE_FEATURES_PER_TILE; k++)
            c.ids[c.n_ids++] = FAKE_IMAGE_TOKEN;
    }
    c.ids[c.n_ids++] = 10;
    return c;
}

static struct call one_tile(int pixel)
{
    return picture_call(1, &pixel);
}

static struct call simple_call(int32_t first_id, int32_t n_ids, int32_t max_tokens)
{
    struct call c = {.n = 1, .n_ids = n_ids, .max_tokens = max_tokens, .ignore_eos = 1};
    for (int32_t i = 0; i < n_ids; i++)
        c.ids[i] = i == 0 ? first_id : 10 + i % 30;
    return c;
}

static void submit(struct call *c, struct bell *b, int deadline_us)
{
    struct error err;
    struct request *r = new_request(c, b);
    if (deadline_us > 0)
        r->deadline_ns = clock_now_ns() + (uint64_t)deadline_us * 1000u;
    if (engine_submit(engine, r, &err) < 0)
        die("refused: %s", err.msg);
}

static uint64_t n_encoded(void)
{
    struct engine_stats s;
    check_idle();
    engine_stats(engine, &s);
    return s.n_tiles;
}

/* Cold, warm, half known: the answers are the expected ones, and only new contents are encoded. */
static void test_warm(struct bell *bell)
{
    struct call *c = xcalloc(3, sizeof(*c));
    c[0] = c[1] = picture_call(3, (const int[]){1, 2, 1});
    c[2] = picture_call(4, (const int[]){2, 3, 1, 4});
    const int n_cached[] = {1, 3, 2};
    for (int i = 0; i < 3; i++) {
        submit(&c[i], bell, 0);
        wait_calls(&c[i], 1, bell);
        check(c[i].last.usage.cached_tiles == n_cached[i]);
        check(check_call(&c[i]) == 1);
    }
    check(n_encoded() == 4);
    free(c);
}

/* Two requests wait for one encoding of the same tile; the first is cancelled. */
static void test_shared(struct bell *bell)
{
    struct call *c = xcalloc(2, sizeof(*c));
    uint64_t before = n_encoded();
    for (int i = 0; i < 2; i++) {
        c[i] = one_tile(PIXEL_HELD + 256 * 100);
        submit(&c[i], bell, 0);
    }
    c[0].may_be_cancelled = 1;
    engine_cancel(engine, c[0].stream);
    wait_calls(c, 1, bell);
    check(c[0].last.error.code == ERROR_CANCELLED && c[1].done == 0);
    fclose(fopen(gate, "w"));
    wait_calls(c, 2, bell);
    check_call(&c[0]);
    check(check_call(&c[1]) == 1);
    check(n_encoded() == before + 1);
    unlink(gate);
    free(c);
}

/* One job with a tile that turns out not to be finite: only its own requests fail. */
static void test_bad_neighbour(struct bell *bell)
{
    struct call *c = xcalloc(8, sizeof(*c));
    for (int i = 0; i < 8; i++) { // the first tiles keep every rank busy while the others gather
        c[i] = one_tile(i < 2 ? PIXEL_HELD + 256 * (200 + i) : i % 2 ? 40 + i : PIXEL_NOT_FINITE);
        submit(&c[i], bell, 0);
        while (!c[i].started) { // in this order
            drain_call(&c[i]);
            sleep_us(100);
        }
    }
    fclose(fopen(gate, "w"));
    wait_calls(c, 8, bell);
    unlink(gate);
    for (int i = 0; i < 8; i++) {
        if (i < 2 || i % 2) {
            check(check_call(&c[i]) == 1);
        } else {
            check(c[i].last.error.code == ERROR_INTERNAL);
            stream_delta_release(&c[i].last);
        }
    }
    free(c);
    check_idle();
}

/* A stream that runs, and one that comes later, draw all their tokens while every vision rank is at
 * work on pictures: those are let go only afterwards. */
static void test_decode_goes_on(struct bell *bell)
{
    struct call *c = xcalloc(6, sizeof(*c));
    struct engine_stats before, after;
    engine_stats(engine, &before);
    for (int i = 0; i < 6; i++) {
        int pixels[] = {PIXEL_HELD + 256 * i, 60 + i};
        c[i] = picture_call(2, pixels);
        if (i == 0 || i == 5)
            c[i] = simple_call(20 + i, 5, 150);
    }
    submit(&c[0], bell, 0);
    while (!c[0].answers[0].n_ids) { // it runs
        drain_call(&c[0]);
        sleep_us(100);
    }
    for (int i = 1; i < 6; i++)
        submit(&c[i], bell, 0);
    wait_calls(&c[0], 1, bell);
    wait_calls(&c[5], 1, bell);
    for (int i = 1; i < 5; i++)
        drain_call(&c[i]);
    check(!c[1].done && !c[2].done && !c[3].done && !c[4].done);
    engine_stats(engine, &after);
    check(after.n_steps >= before.n_steps + 150 && after.n_generated_tokens >= 300);
    fclose(fopen(gate, "w"));
    wait_calls(c, 6, bell);
    for (int i = 0; i < 6; i++)
        check(check_call(&c[i]) == 1);
    unlink(gate);
    free(c);
}

static void test_vision(void)
{
    struct bell bell = {.mutex = PTHREAD_MUTEX_INITIALIZER, .rung = PTHREAD_COND_INITIALIZER};
    test_warm(&bell);
    test_bad_neighbour(&bell);
    test_decode_goes_on(&bell);
    test_shared(&bell);
    check_idle();
}

/* ---- limits: refusals, failures that concern one request, deadlines in each phase ---- */

static void refuse(struct call *c, enum error_code code)
{
    struct error err;
    struct request *r = new_request(c, NULL);
    check(engine_submit(engine, r, &err) == -1);
    check(err.code == code);
    request_free(r);
    stream_unref(c->stream);
}

static void test_refusals(void)
{
    struct call c = simple_call(10, MAX_MODEL_LEN, 1);
    refuse(&c, ERROR_INVALID_ARGUMENT); // no room for an answer
    c = simple_call(10, 10, 1);
    c.n_tiles = 1;
    refuse(&c, ERROR_INVALID_ARGUMENT); // a tile without its image tokens
    c = simple_call(10, 10, 1);
    c.n = 100;
    refuse(&c, ERROR_INVALID_ARGUMENT);
}

#define N_FLOOD 400

/* Pictures that take long come faster than they are encoded: the queue fills up, and not before
 * that many are queued is one refused. */
static void test_full_queue(int max_queued)
{
    struct bell bell = {.mutex = PTHREAD_MUTEX_INITIALIZER, .rung = PTHREAD_COND_INITIALIZER};
    struct call *calls = xcalloc(N_FLOOD, sizeof(*calls));
    struct error err;
    int n = 0;
    for (;; n++) {
        check(n < N_FLOOD);
        calls[n] = simple_call(FAKE_IMAGE_TOKEN, FAKE_FEATURES_PER_TILE, 1);
        for (int32_t k = 0; k < FAKE_FEATURES_PER_TILE; k++)
            calls[n].ids[k] = FAKE_IMAGE_TOKEN;
        calls[n].n_tiles = 1;
        calls[n].pixels[0] = PIXEL_SLOW;
        calls[n].may_be_cancelled = n > 0;
        struct request *r = new_request(&calls[n], &bell);
        if (engine_submit(engine, r, &err) < 0) {
            request_free(r);
            stream_unref(calls[n].stream);
            break;
        }
    }
    check(err.code == ERROR_RESOURCE_EXHAUSTED && n >= max_queued);
    for (int i = 1; i < n; i++)
        engine_cancel(engine, calls[i].stream); // all but the first, most in the queue
    wait_calls(calls, n, &bell);
    check(check_call(&calls[0]) == 1);
    for (int i = 1; i < n; i++)
        check_call(&calls[i]);
    free(calls);
    check_idle();
}

/* A value that is not finite, in either stage, fails its own request; a deadline ends a request in
 * the vision stage, in a long answer, and in the queue. */
static void test_failures(void)
{
    struct bell bell = {.mutex = PTHREAD_MUTEX_INITIALIZER, .rung = PTHREAD_COND_INITIALIZER};
    struct call *calls = xcalloc(8, sizeof(*calls));
    for (int i = 0; i < 8; i++)
        calls[i] = simple_call(10 + i, 20, 30);
    for (int i = 4; i < 6; i++) {
        calls[i] = simple_call(FAKE_IMAGE_TOKEN, FAKE_FEATURES_PER_TILE, 30);
        for (int32_t k = 0; k < FAKE_FEATURES_PER_TILE; k++)
            calls[i].ids[k] = FAKE_IMAGE_TOKEN;
        calls[i].n_tiles = 1;
        calls[i].pixels[0] = i == 4 ? PIXEL_NOT_FINITE : PIXEL_SLOW;
    }
    calls[1].ids[19] = TOKEN_NOT_FINITE;
    calls[2].ids[19] = TOKEN_NOT_FINITE;
    calls[2].n = 3;
    calls[6].ids[5] = TOKEN_SLOW;
    for (int i = 0; i < 8; i++) {
        calls[i].may_be_late = i == 5 || i == 6;
        submit(&calls[i], &bell, calls[i].may_be_late ? 3000 : 0);
    }
    wait_calls(calls, 8, &bell);
    for (int i = 0; i < 8; i++) {
        enum error_code code = calls[i].last.error.code;
        if (i == 1 || i == 2 || i == 4) {
            check(code == ERROR_INTERNAL && strstr(calls[i].last.error.msg, "not finite"));
            stream_delta_release(&calls[i].last);
        } else if (i == 5 || i == 6) {
            check(code == ERROR_DEADLINE_EXCEEDED);
            check_call(&calls[i]);
        } else {
            check(check_call(&calls[i]) == 1);
        }
    }
    free(calls);
    check_idle();
}

/* ---- the end ---- */

static void test_drain(void)
{
    struct bell bell = {.mutex = PTHREAD_MUTEX_INITIALIZER, .rung = PTHREAD_COND_INITIALIZER};
    struct call c[2] = {simple_call(10, 20, 30), simple_call(11, 20, 100)};
    struct call late = simple_call(12, 10, 10);
    submit(&c[0], &bell, 0);
    check(engine_drain(engine, 60000) == 1);
    refuse(&late, ERROR_UNAVAILABLE);
    wait_calls(c, 1, &bell);
    check(check_call(&c[0]) == 1);
}

/* What does not finish in time is ended. */
static void test_drain_runs_out(void)
{
    struct bell bell = {.mutex = PTHREAD_MUTEX_INITIALIZER, .rung = PTHREAD_COND_INITIALIZER};
    struct call *c = xcalloc(1, sizeof(*c));
    *c = simple_call(TOKEN_SLOW, 100, 90);
    for (int32_t i = 0; i < c->n_ids; i++)
        c->ids[i] = TOKEN_SLOW; // each chunk of the prompt is slow
    submit(c, &bell, 0);
    check(engine_drain(engine, 1) == 0);
    wait_calls(c, 1, &bell);
    check(c->last.error.code == ERROR_UNAVAILABLE);
    stream_delta_release(&c->last);
    free(c);
}

static atomic_int lost_rank;

static void on_lost(void *arg, int rank)
{
    (void)arg;
    atomic_store(&lost_rank, rank);
}

static void test_lost(const struct topology *t)
{
    struct bell bell = {.mutex = PTHREAD_MUTEX_INITIALIZER, .rung = PTHREAD_COND_INITIALIZER};
    struct call *c = xcalloc(4, sizeof(*c));
    int rank = topology_language_rank(t, t->layout.pipeline_parallel - 1, 0);
    char sentence[64];
    for (int i = 0; i < 4; i++) {
        c[i] = simple_call(10 + i, 20, 150);
        if (i == 3)
            c[i].ids[19] = TOKEN_DIE;
        submit(&c[i], &bell, 0);
    }
    wait_calls(c, 4, &bell);
    snprintf(sentence, sizeof(sentence), "rank %d (language", rank);
    for (int i = 0; i < 4; i++) { // a slow submission may let the first ones finish
        check(c[i].last.error.code == ERROR_UNAVAILABLE ||
              (i < 3 && c[i].last.error.code == ERROR_OK));
        if (c[i].last.error.code == ERROR_UNAVAILABLE)
            check(strncmp(c[i].last.error.msg, sentence, strlen(sentence)) == 0);
        stream_delta_release(&c[i].last);
    }
    while (atomic_load(&lost_rank) == 0) // every stream ends first
        sleep_us(1000);
    check(atomic_load(&lost_rank) == rank);
    struct call late = simple_call(12, 10, 10);
    refuse(&late, ERROR_UNAVAILABLE);
    free(c);
}

/* "mixed" has room for some tiles, so that they come and go; what needs slow tiles has none. */
static uint64_t cache_bytes(const char *test)
{
    return strcmp(test, "mixed") == 0 ? 1000 : strcmp(test, "vision") == 0 ? 100000 : 0;
}

static void run_gateway(const struct topology *t, struct control *control, const char *test)
{
    const struct engine_config config = {.page_size = PAGE_SIZE,
                                         .n_pages = N_PAGES,
                                         .max_model_len = MAX_MODEL_LEN,
                                         .max_num_seqs = 8,
                                         .max_num_batched_tokens = 24,
                                         .max_queued_requests = N_CLIENTS * N_CALLS,
                                         .n_batches_in_flight = t->layout.pipeline_parallel,
                                         .max_vision_tiles = 2,
                                         .vision_cache_bytes = cache_bytes(test),
                                         .feature_dim = FAKE_DIM,
                                         .n_features_per_tile = FAKE_FEATURES_PER_TILE,
                                         .eos_ids = eos_ids,
                                         .n_eos = 1,
                                         .enable_prefix_caching = 1};
    struct error err;
    struct tokenizer *demo = tokenizer_open(INTERNVLD_DEMO_MODEL, &err);
    if (!demo)
        die("%s", err.msg);
    tokenizer = demo;
    engine = engine_open(&config, t, control, on_lost, NULL);
    if (strcmp(test, "mixed") == 0) {
        test_mixed();
    } else if (strcmp(test, "forward") == 0) {
        test_forward();
    } else if (strcmp(test, "vision") == 0) {
        test_vision();
    } else if (strcmp(test, "limits") == 0) {
        test_refusals();
        test_full_queue(config.max_queued_requests);
        test_failures();
    } else if (strcmp(test, "drain") == 0) {
        test_drain();
    } else if (strcmp(test, "drain_runs_out") == 0) {
        test_drain_runs_out();
    } else if (strcmp(test, "lost") == 0) {
        test_lost(t);
    } else {
        die("there is no test %s", test);
    }
    engine_close(engine);
    tokenizer_close(demo);
}

int main(int argc, char **argv)
{
    int rank, world;
    log_init();
    launch_init(&rank, &world);
    struct layout layout = {.n_vision = world == 7 ? 2 : 1,
                            .tensor_parallel = world == 7 ? 2 : 1,
                            .pipeline_parallel = world > 3 ? 2 : 1};
    struct topology t;
    struct error err;
    if (argc != 2 || topology_init(&t, rank, world, &layout, &err) < 0)
        die("usage: mpirun -n 3|4|7 engine_mpi_test TEST");
    if (rank == 0) { // a name that nobody has
        close(mkstemp(gate));
        unlink(gate);
    }
    launch_broadcast(gate, sizeof(gate));
    struct control *control = control_open(&t, NULL);
    int in_pipe = t.role == ROLE_LANGUAGE && t.shard == 0 && layout.pipeline_parallel > 1;
    struct comm *pipe = comm_mpi_open(in_pipe ? 0 : -1, rank, 4096);
    if (t.role == ROLE_GATEWAY)
        run_gateway(&t, control, argv[1]);
    else if (t.role == ROLE_VISION)
        fake_vision_run(control, gate);
    else
        fake_language_run(control, &t, pipe, PAGE_SIZE, N_PAGES);
    control_close(control);
    comm_close(pipe);
    launch_finalize();
    return 0;
}
