/*
 * The step: packing, checking and printing struct batch and struct tile_batch.
 *
 * Owns the order of their arrays on the wire. Must not know models, pages' bytes or who runs when.
 * What workers send back is batch_results.c.
 */
#include "parallel/batch.h"

#include <math.h>
#include <string.h>

#include "kernels/log.h"
#include "parallel/batch_wire.h"

#define CAPTURE_ALL                                                                                \
    (CAPTURE_EMBEDS | CAPTURE_HIDDEN_STATES | CAPTURE_LOGITS | CAPTURE_CACHE |                     \
     CAPTURE_LAST_HIDDEN_STATE | CAPTURE_ATTENTIONS)
#define VISION_CAPTURE_ALL                                                                         \
    (VISION_CAPTURE_HIDDEN_STATES | VISION_CAPTURE_LAYER0 | VISION_CAPTURE_PROJECTOR |             \
     VISION_CAPTURE_ATTENTIONS | VISION_CAPTURE_LAST)

struct batch_head {
    uint64_t step_id;
    int32_t n_sequences, n_tokens, n_pages, n_features, n_samples, n_history, n_banned, n_bias,
        n_copies, feature_dim;
    int32_t has_features, reserved;
};

#define N_BATCH_SECTIONS 19
static int batch_sections(struct batch *b, int with_features, struct section *s)
{
    int64_t n = b->n_sequences, t = b->n_tokens;
    const struct section all[N_BATCH_SECTIONS] = {
        {&b->token_ids, t, sizeof(int32_t)},
        {&b->positions, t, sizeof(float)},
        {&b->feature_rows, t, sizeof(int32_t)},
        {&b->targets, t, sizeof(int32_t)},
        {&b->target_tops, t, sizeof(uint8_t)},
        {&b->want_logits, t, sizeof(uint8_t)},
        {&b->query_start, n + 1, sizeof(int32_t)},
        {&b->context_len, n, sizeof(int32_t)},
        {&b->rope_len, n, sizeof(int32_t)},
        {&b->captures, n, sizeof(uint32_t)},
        {&b->page_start, n + 1, sizeof(int32_t)},
        {&b->pages, b->n_pages, sizeof(int32_t)},
        {&b->copy_src, b->n_copies, sizeof(int32_t)},
        {&b->copy_dst, b->n_copies, sizeof(int32_t)},
        {&b->samples, b->n_samples, sizeof(struct sample_row)},
        {&b->history, b->n_history, sizeof(int32_t)},
        {&b->banned, b->n_banned, sizeof(int32_t)},
        {&b->bias_ids, b->n_bias, sizeof(int32_t)},
        {&b->bias_values, b->n_bias, sizeof(float)},
    };
    memcpy(s, all, sizeof(all));
    if (!with_features)
        return N_BATCH_SECTIONS;
    s[N_BATCH_SECTIONS] =
        (struct section){&b->features, (int64_t)b->n_features * b->feature_dim, sizeof(float)};
    return N_BATCH_SECTIONS + 1;
}

/* ---- checks: each returns what is wrong, or NULL ---- */

static int all_in(const int32_t *x, int32_t n, int32_t min, int32_t end)
{
    for (int32_t i = 0; i < n; i++)
        if (x[i] < min || x[i] >= end)
            return 0;
    return 1;
}

static int is_csr(const int32_t *start, int32_t n, int32_t end)
{
    if (start[0] != 0 || start[n] != end)
        return 0;
    for (int32_t i = 0; i < n; i++)
        if (start[i] > start[i + 1])
            return 0;
    return 1;
}

static int is_run(int32_t start, int64_t n, int32_t end)
{
    return start >= 0 && n >= 0 && start + n <= end;
}

static const char *wrong_counts(const struct batch *b)
{
    const int32_t counts[] = {b->n_sequences, b->n_tokens,   b->n_pages,  b->n_features,
                              b->n_samples,   b->n_history,  b->n_banned, b->n_bias,
                              b->n_copies,    b->feature_dim};
    for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++)
        if (counts[i] < 0)
            return "a negative count";
    return NULL;
}

static const char *wrong_tokens(const struct batch *b)
{
    if (!all_in(b->token_ids, b->n_tokens, 0, INT32_MAX))
        return "a negative token id";
    if (!all_in(b->feature_rows, b->n_tokens, -1, b->n_features))
        return "a feature row out of range";
    if (!all_in(b->targets, b->n_tokens, -1, INT32_MAX))
        return "a target below -1";
    for (int32_t i = 0; i < b->n_tokens; i++)
        if (b->want_logits[i] > 1 || !isfinite(b->positions[i]) ||
            b->target_tops[i] > TOP_LOGPROBS_MAX)
            return "a position that is no number, want_logits that is no flag, or too many tops";
    return NULL;
}

static const char *wrong_sequences(const struct batch *b)
{
    if (!is_csr(b->query_start, b->n_sequences, b->n_tokens))
        return "query_start does not partition the tokens";
    if (!is_csr(b->page_start, b->n_sequences, b->n_pages))
        return "page_start does not partition the pages";
    for (int32_t i = 0; i < b->n_sequences; i++) {
        if (b->context_len[i] < b->query_start[i + 1] - b->query_start[i])
            return "a context shorter than its new tokens";
        if (b->rope_len[i] < 0 || (b->captures[i] & ~(uint32_t)CAPTURE_ALL))
            return "a negative rope_len, or an unknown capture";
    }
    if (!all_in(b->pages, b->n_pages, 0, INT32_MAX) ||
        !all_in(b->copy_src, b->n_copies, 0, INT32_MAX) ||
        !all_in(b->copy_dst, b->n_copies, 0, INT32_MAX))
        return "a negative page";
    return NULL;
}

static const char *wrong_sample(const struct batch *b, const struct sample_row *s)
{
    int64_t n_known = (int64_t)s->n_prompt + s->n_output;
    if (s->sequence < 0 || s->sequence >= b->n_sequences)
        return "a sample of no sequence";
    if (s->row < b->query_start[s->sequence] || s->row >= b->query_start[s->sequence + 1])
        return "a sample's row outside its sequence";
    if (s->n_prompt < 0 || s->n_output < 0 || !is_run(s->history_start, n_known, b->n_history))
        return "a sample's history out of range";
    if (!is_run(s->banned_start, s->n_banned, b->n_banned) ||
        !is_run(s->bias_start, s->n_bias, b->n_bias))
        return "a sample's banned or biased ids out of range";
    if (s->candidate < 0 || s->position < 0 || s->sampling.n_logprobs < -1 ||
        s->sampling.n_logprobs > TOP_LOGPROBS_MAX)
        return "a sample's candidate, position or n_logprobs out of range";
    return NULL;
}

static const char *wrong_samples(const struct batch *b)
{
    for (int32_t i = 0; i < b->n_samples; i++) {
        const char *wrong = wrong_sample(b, &b->samples[i]);
        if (wrong)
            return wrong;
    }
    if (!all_in(b->history, b->n_history, 0, INT32_MAX) ||
        !all_in(b->banned, b->n_banned, 0, INT32_MAX) ||
        !all_in(b->bias_ids, b->n_bias, 0, INT32_MAX))
        return "a negative id in a sample's history, banned or biased ids";
    return NULL;
}

static const char *wrong_batch(const struct batch *b)
{
    const char *wrong = wrong_tokens(b);
    if (!wrong)
        wrong = wrong_sequences(b);
    return wrong ? wrong : wrong_samples(b);
}

/* ---- the batch ---- */

struct message *batch_pack(const struct batch *b, int with_features)
{
    struct batch view = *b;
    struct section s[N_BATCH_SECTIONS + 1];
    struct batch_head h = {
        .step_id = b->step_id,
        .n_sequences = b->n_sequences,
        .n_tokens = b->n_tokens,
        .n_pages = b->n_pages,
        .n_features = b->n_features,
        .n_samples = b->n_samples,
        .n_history = b->n_history,
        .n_banned = b->n_banned,
        .n_bias = b->n_bias,
        .n_copies = b->n_copies,
        .feature_dim = b->feature_dim,
        .has_features = with_features != 0,
    };
    const char *wrong = wrong_counts(b);
    if (!wrong)
        wrong = wrong_batch(b);
    if (wrong)
        BUG("batch of step %llu: %s", (unsigned long long)b->step_id, wrong);
    int n_sections = batch_sections(&view, with_features, s);
    return sections_pack(CONTROL_BATCH, &h, sizeof(h), s, n_sections);
}

void batch_unpack(struct batch *b, const struct message *m)
{
    struct batch_head h;
    struct section s[N_BATCH_SECTIONS + 1];
    sections_unpack_head(m, CONTROL_BATCH, &h, sizeof(h));
    *b = (struct batch){
        .step_id = h.step_id,
        .n_sequences = h.n_sequences,
        .n_tokens = h.n_tokens,
        .n_pages = h.n_pages,
        .n_features = h.n_features,
        .n_samples = h.n_samples,
        .n_history = h.n_history,
        .n_banned = h.n_banned,
        .n_bias = h.n_bias,
        .n_copies = h.n_copies,
        .feature_dim = h.feature_dim,
    };
    const char *wrong = wrong_counts(b);
    if (!wrong && h.has_features != 0 && h.has_features != 1)
        wrong = "has_features is no flag";
    if (wrong)
        message_garbled(m, wrong);
    sections_unpack(m, sizeof(h), s, batch_sections(b, h.has_features, s));
    wrong = wrong_batch(b);
    if (wrong)
        message_garbled(m, wrong);
}

static void print_sample(FILE *f, const struct sample_row *s)
{
    fprintf(f, ", samples row %d as candidate %d token %d (temperature %g", s->row, s->candidate,
            s->position, (double)s->sampling.temperature);
    if (s->n_prompt + s->n_output > 0)
        fprintf(f, ", history %d+%d", s->n_prompt, s->n_output);
    if (s->n_banned > 0)
        fprintf(f, ", banned %d", s->n_banned);
    if (s->n_bias > 0)
        fprintf(f, ", biased %d", s->n_bias);
    fprintf(f, ")");
}

void batch_print(FILE *f, const struct batch *b)
{
    fprintf(f, "step %llu: %d sequences, %d tokens, %d pages, %d features of %d, %d page copies\n",
            (unsigned long long)b->step_id, b->n_sequences, b->n_tokens, b->n_pages, b->n_features,
            b->feature_dim, b->n_copies);
    for (int32_t i = 0; i < b->n_sequences; i++) {
        int32_t first = b->query_start[i], end = b->query_start[i + 1], n_features = 0;
        for (int32_t t = first; t < end; t++)
            n_features += b->feature_rows[t] >= 0;
        fprintf(f, "  sequence %d: rows %d-%d, context %d", i, first, end - 1, b->context_len[i]);
        if (end > first)
            fprintf(f, ", positions %g-%g", (double)b->positions[first],
                    (double)b->positions[end - 1]);
        if (n_features > 0)
            fprintf(f, ", features %d", n_features);
        fprintf(f, ", pages");
        for (int32_t p = b->page_start[i]; p < b->page_start[i + 1]; p++)
            fprintf(f, " %d", b->pages[p]);
        if (b->captures[i])
            fprintf(f, ", captures %#x", b->captures[i]);
        for (int32_t k = 0; k < b->n_samples; k++)
            if (b->samples[k].sequence == i)
                print_sample(f, &b->samples[k]);
        fprintf(f, "\n");
    }
}

/* ---- tiles ---- */

struct tile_batch_head {
    uint64_t job_id;
    int32_t n_tiles, channels, height, width, dtype;
    uint32_t captures;
    int32_t n_mask, unused; // to a multiple of 8
};

/* -1: the product of counts passes an int64, or a count is negative. */
static int64_t n_pixels(const struct tile_batch *t)
{
    int64_t n = 1;
    const int32_t counts[] = {t->n_tiles, t->channels, t->height, t->width};
    for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++)
        if (counts[i] < 0 || __builtin_mul_overflow(n, (int64_t)counts[i], &n))
            return -1;
    return n;
}

static const char *wrong_tiles(const struct tile_batch *t)
{
    if (t->dtype != DTYPE_U8 && t->dtype != DTYPE_F32)
        return "pixels of a type that is neither uint8 nor float32";
    if (n_pixels(t) < 0)
        return "a negative or absurd number of pixels";
    if (t->captures & ~(uint32_t)VISION_CAPTURE_ALL)
        return "an unknown capture";
    if (t->n_mask < 0)
        return "a negative number of patches";
    return NULL;
}

static void tile_sections(struct tile_batch *t, struct section s[2])
{
    s[0] = (struct section){&t->pixels, n_pixels(t), dtype_size(t->dtype)};
    s[1] = (struct section){&t->mask, (int64_t)t->n_tiles * t->n_mask, 1};
}

struct message *tile_batch_pack(const struct tile_batch *t, const void *const *pixels,
                                const uint8_t *const *masks)
{
    struct tile_batch packed = *t;
    const char *wrong = wrong_tiles(t);
    if (wrong)
        BUG("tiles of job %llu: %s", (unsigned long long)t->job_id, wrong);
    const struct tile_batch_head h = {
        .job_id = t->job_id,
        .n_tiles = t->n_tiles,
        .channels = t->channels,
        .height = t->height,
        .width = t->width,
        .dtype = (int32_t)t->dtype,
        .captures = t->captures,
        .n_mask = t->n_mask,
    };
    struct section s[2];
    packed.pixels = NULL; // room for them, filled tile by tile
    packed.mask = NULL;
    tile_sections(&packed, s);
    struct message *m = sections_pack(CONTROL_TILES, &h, sizeof(h), s, 2);
    tile_batch_unpack(&packed, m);
    uint8_t *to = m->payload + ((const uint8_t *)packed.pixels - m->payload);
    uint8_t *mask = t->n_mask > 0 ? m->payload + (packed.mask - m->payload) : NULL;
    size_t n_bytes =
        (size_t)t->channels * (size_t)t->height * (size_t)t->width * dtype_size(t->dtype);
    for (int32_t i = 0; i < t->n_tiles; i++) {
        memcpy(to + (size_t)i * n_bytes, pixels[i], n_bytes);
        if (mask)
            memcpy(mask + (size_t)i * (size_t)t->n_mask, masks[i], (size_t)t->n_mask);
    }
    return m;
}

void tile_batch_unpack(struct tile_batch *t, const struct message *m)
{
    struct tile_batch_head h;
    sections_unpack_head(m, CONTROL_TILES, &h, sizeof(h));
    *t = (struct tile_batch){
        .job_id = h.job_id,
        .n_tiles = h.n_tiles,
        .channels = h.channels,
        .height = h.height,
        .width = h.width,
        .dtype = (enum dtype)h.dtype,
        .captures = h.captures,
        .n_mask = h.n_mask,
    };
    const char *wrong = wrong_tiles(t);
    if (wrong)
        message_garbled(m, wrong);
    struct section s[2];
    tile_sections(t, s);
    sections_unpack(m, sizeof(h), s, 2);
}
