/* Worker ends that the engine cannot tell from real ones; see fake_workers.h. */
#include "tests/unit/engine/fake_workers.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/log.h"
#include "parallel/batch.h"
#include "tests/unit/engine/mix.h"

float fake_feature(int pixel, int32_t row)
{
    return (float)(pixel * 16 + row) / 4.0f;
}

uint64_t fake_entry(uint64_t before, int32_t id, float feature)
{
    return mix(before * 31 + (uint64_t)id * 7919 + (uint64_t)(feature * 4.0f) + 1);
}

int32_t fake_next_token(uint64_t entry, int32_t candidate, int32_t position)
{
    return (int32_t)(mix(entry ^ mix((uint64_t)candidate * 1000 + (uint64_t)position)) %
                     FAKE_N_IDS);
}

static void sleep_ms(int ms)
{
    const struct timespec t = {.tv_nsec = ms * 1000000L};
    nanosleep(&t, NULL);
}

/* ---- vision ---- */

static void answer_tiles(struct control *c, const struct message *m, const char *gate)
{
    struct tile_batch t;
    tile_batch_unpack(&t, m);
    size_t tile = (size_t)t.channels * (size_t)t.height * (size_t)t.width;
    size_t n_rows = (size_t)t.n_tiles * FAKE_FEATURES_PER_TILE;
    float *features = xcalloc(n_rows, FAKE_DIM * sizeof(float));
    float *hidden = xcalloc((size_t)t.n_tiles * 2, sizeof(float)); // [2, 1] a tile
    struct captured *captured = xcalloc((size_t)t.n_tiles, sizeof(*captured));
    uint8_t *not_finite = xcalloc((size_t)t.n_tiles, sizeof(*not_finite));
    struct feature_result r = {.job_id = t.job_id,
                               .n_tiles = t.n_tiles,
                               .n_tokens_per_tile = FAKE_FEATURES_PER_TILE,
                               .dim = FAKE_DIM,
                               .features = features,
                               .not_finite = not_finite,
                               .captured = captured};
    for (int32_t i = 0; i < t.n_tiles; i++) {
        int pixel = ((const uint8_t *)t.pixels)[(size_t)i * tile];
        if (pixel == PIXEL_SLOW)
            sleep_ms(30);
        while (pixel == PIXEL_HELD && access(gate, F_OK) != 0)
            sleep_ms(1);
        not_finite[i] = pixel == PIXEL_NOT_FINITE;
        for (int32_t k = 0; k < FAKE_FEATURES_PER_TILE; k++)
            for (int32_t d = 0; d < FAKE_DIM; d++)
                features[(i * FAKE_FEATURES_PER_TILE + k) * FAKE_DIM + d] = fake_feature(pixel, k);
        hidden[2 * i] = (float)pixel;
        hidden[2 * i + 1] = (float)-pixel;
        if (t.captures & VISION_CAPTURE_HIDDEN_STATES)
            captured[r.n_captured++] = (struct captured){.name = "vision.hidden_states.0",
                                                         .owner = i,
                                                         .n_rows = 2,
                                                         .n_cols = 1,
                                                         .data = hidden + 2 * i};
    }
    control_reply(c, feature_result_pack(&r));
    free(features);
    free(hidden);
    free(captured);
    free(not_finite);
}

void fake_vision_run(struct control *c, const char *gate)
{
    for (;;) {
        struct message *m = control_recv(c);
        enum control_type type = m->type;
        if (type == CONTROL_TILES)
            answer_tiles(c, m, gate);
        message_unref(m);
        if (type == CONTROL_STOP)
            return;
    }
}

/* ---- language ---- */

struct fake_language {
    const struct topology *topology;
    struct comm *pipe;
    int32_t page_size;
    uint64_t *cache; // [n_pages * page_size]
    /* of the step */
    struct captured captured[1024];
    int32_t n_captured;
    float *memory; // of captures
    size_t n_memory, memory_capacity;
};

static int is_last(const struct fake_language *f)
{
    return f->topology->stage == f->topology->layout.pipeline_parallel - 1;
}

static uint64_t *entry(struct fake_language *f, const struct batch *b, int32_t sequence,
                       int32_t position)
{
    int32_t page = b->pages[b->page_start[sequence] + position / f->page_size];
    return &f->cache[page * f->page_size + position % f->page_size];
}

/* The feature of each row [n_tokens], from the first stage to the last. */
static void pass_features(struct fake_language *f, const struct batch *b, float *x)
{
    if (f->topology->stage == 0) {
        for (int32_t i = 0; i < b->n_tokens; i++)
            x[i] = b->feature_rows[i] < 0 ? 0 : b->features[b->feature_rows[i] * FAKE_DIM];
        if (f->pipe)
            comm_send(f->pipe, x, (size_t)b->n_tokens * sizeof(float), 1);
    } else if (f->pipe) {
        comm_recv(f->pipe, x, (size_t)b->n_tokens * sizeof(float), 0);
    }
}

static void write_cache(struct fake_language *f, const struct batch *b, const float *x)
{
    for (int32_t i = 0; i < b->n_copies; i++)
        memcpy(f->cache + b->copy_dst[i] * f->page_size, f->cache + b->copy_src[i] * f->page_size,
               (size_t)f->page_size * sizeof(*f->cache));
    for (int32_t i = 0; i < b->n_sequences; i++) {
        int32_t start = b->context_len[i] - (b->query_start[i + 1] - b->query_start[i]);
        for (int32_t row = b->query_start[i]; row < b->query_start[i + 1]; row++) {
            int32_t position = start + row - b->query_start[i];
            uint64_t before = position > 0 ? *entry(f, b, i, position - 1) : 0;
            *entry(f, b, i, position) = fake_entry(before, b->token_ids[row], x[row]);
        }
    }
}

/* A tensor whose rows hold their position in the sequence. */
static void capture(struct fake_language *f, const struct batch *b, int32_t sequence,
                    const char *name, int32_t first_row, int32_t n_rows, int32_t n_cols)
{
    struct captured *c = &f->captured[f->n_captured++];
    *c = (struct captured){
        .owner = sequence, .first_row = first_row, .n_rows = n_rows, .n_cols = n_cols};
    strncpy(c->name, name, sizeof(c->name) - 1);
    float *data = f->memory + f->n_memory;
    f->n_memory += (size_t)n_rows * (size_t)n_cols;
    int32_t start = b->context_len[sequence] -
                    (b->query_start[sequence + 1] - b->query_start[sequence]) + first_row;
    for (int32_t i = 0; i < n_rows * n_cols; i++)
        data[i] = (float)(start + i / n_cols);
    c->data = data;
}

static void take_captures(struct fake_language *f, const struct batch *b)
{
    f->n_captured = 0;
    f->n_memory = 0;
    size_t n = (size_t)b->n_tokens * (FAKE_DIM + 2 + FAKE_LOGITS);
    if (n > f->memory_capacity) {
        f->memory_capacity = n;
        f->memory = xrealloc(f->memory, n, sizeof(*f->memory));
    }
    for (int32_t i = 0; i < b->n_sequences; i++) {
        int32_t n_rows = b->query_start[i + 1] - b->query_start[i];
        if (f->topology->stage == 0 && b->captures[i] & CAPTURE_EMBEDS)
            capture(f, b, i, "inputs_embeds", 0, n_rows, FAKE_DIM);
        if (f->topology->stage == 0 && b->captures[i] & CAPTURE_HIDDEN_STATES)
            capture(f, b, i, "hidden_states.0", 0, n_rows, 1);
        if (is_last(f) && b->captures[i] & CAPTURE_HIDDEN_STATES)
            capture(f, b, i, "hidden_states.1", 0, n_rows, 1);
        for (int32_t row = 0, end; is_last(f) && row < n_rows; row = end + 1) {
            for (end = row; end < n_rows && b->want_logits[b->query_start[i] + end];)
                end++; // a run of wanted rows
            if (end > row && b->captures[i] & CAPTURE_LOGITS)
                capture(f, b, i, "logits", row, end - row, FAKE_LOGITS);
        }
    }
}

static int has_token(const struct batch *b, int32_t sequence, int32_t id)
{
    for (int32_t i = b->query_start[sequence]; i < b->query_start[sequence + 1]; i++)
        if (b->token_ids[i] == id)
            return 1;
    return 0;
}

static void draw(struct fake_language *f, const struct batch *b, struct sample_result *samples)
{
    for (int32_t i = 0; i < b->n_samples; i++) {
        const struct sample_row *row = &b->samples[i];
        uint64_t last = *entry(f, b, row->sequence, b->context_len[row->sequence] - 1);
        int32_t id = fake_next_token(last, row->candidate, row->position);
        for (int32_t k = 0; k < row->n_banned; k++)
            if (b->banned[row->banned_start + k] == id)
                id = FAKE_OTHER_TOKEN;
        samples[i] =
            (struct sample_result){.sequence = row->sequence,
                                   .token = {.id = id, .logprob = -(float)row->position, .rank = 1},
                                   .not_finite = has_token(b, row->sequence, TOKEN_NOT_FINITE)};
    }
}

/* 0: the worker leaves without a word. */
static int answer_batch(struct fake_language *f, struct control *c, const struct message *m)
{
    struct batch b;
    batch_unpack(&b, m);
    float *x = xcalloc((size_t)b.n_tokens, sizeof(*x));
    struct token_logprob *targets =
        xcalloc((size_t)b.n_tokens * (1 + TOP_LOGPROBS_MAX), sizeof(*targets));
    struct sample_result *samples = xcalloc((size_t)b.n_samples + 1, sizeof(*samples));
    struct step_result r = {.step_id = b.step_id, .stage = f->topology->stage};
    int alive = 1, n_targets = 0;
    if (f->topology->shard == 0) {
        pass_features(f, &b, x);
        write_cache(f, &b, x);
        take_captures(f, &b);
        r.n_captured = f->n_captured;
        r.captured = f->captured;
    }
    for (int32_t i = 0; i < b.n_sequences; i++) {
        if (is_last(f) && has_token(&b, i, TOKEN_SLOW))
            sleep_ms(20);
        alive &= !(is_last(f) && has_token(&b, i, TOKEN_DIE));
    }
    for (int32_t i = 0; i < b.n_tokens; i++) {
        for (int32_t k = 0; b.targets[i] >= 0 && k <= b.target_tops[i]; k++)
            targets[n_targets++] = (struct token_logprob){
                .id = b.targets[i], .logprob = -(float)b.targets[i], .rank = k};
    }
    if (is_last(f) && f->topology->shard == 0) {
        draw(f, &b, samples);
        r.n_samples = b.n_samples;
        r.samples = samples;
        r.n_targets = n_targets;
        r.targets = targets;
    }
    if (f->topology->shard == 0 && alive)
        control_reply(c, step_result_pack(&r));
    free(x);
    free(targets);
    free(samples);
    return alive;
}

void fake_language_run(struct control *c, const struct topology *t, struct comm *pipe,
                       int32_t page_size, int32_t n_pages)
{
    struct fake_language *f = xcalloc(1, sizeof(*f));
    f->topology = t;
    f->pipe = pipe;
    f->page_size = page_size;
    f->cache = xcalloc((size_t)n_pages * (size_t)page_size, sizeof(*f->cache));
    for (int go_on = 1; go_on;) {
        struct message *m = control_recv(c);
        if (m->type == CONTROL_BATCH)
            go_on = answer_batch(f, c, m);
        else if (m->type == CONTROL_STOP)
            go_on = 0;
        message_unref(m);
    }
    free(f->cache);
    free(f->memory);
    free(f);
}
