/* From the scheduler's decisions to flat arrays; see step.h and parallel/batch.h. */
#include "daemon/engine/step.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

void step_init(struct step *p, int32_t max_items)
{
    memset(p, 0, sizeof(*p));
    p->items = xcalloc((size_t)max_items, sizeof(*p->items));
    p->copy_src = xcalloc((size_t)max_items, sizeof(*p->copy_src));
    p->copy_dst = xcalloc((size_t)max_items, sizeof(*p->copy_dst));
}

void step_release(struct step *p)
{
    free(p->items);
    free(p->copy_src);
    free(p->copy_dst);
    memset(p, 0, sizeof(*p));
}

void batch_builder_init(struct batch_builder *b, int32_t max_tokens, int32_t max_sequences,
                        int32_t feature_dim, const int32_t *eos_ids, int32_t n_eos)
{
    size_t n_tokens = (size_t)max_tokens, n_sequences = (size_t)max_sequences;
    memset(b, 0, sizeof(*b));
    b->max_tokens = max_tokens;
    b->max_sequences = max_sequences;
    b->feature_dim = feature_dim;
    b->eos_ids = eos_ids;
    b->n_eos = n_eos;
    b->token_ids = xcalloc(n_tokens, sizeof(*b->token_ids));
    b->feature_rows = xcalloc(n_tokens, sizeof(*b->feature_rows));
    b->targets = xcalloc(n_tokens, sizeof(*b->targets));
    b->target_tops = xcalloc(n_tokens, sizeof(*b->target_tops));
    b->positions = xcalloc(n_tokens, sizeof(*b->positions));
    b->want_logits = xcalloc(n_tokens, sizeof(*b->want_logits));
    b->query_start = xcalloc(n_sequences + 1, sizeof(*b->query_start));
    b->context_len = xcalloc(n_sequences, sizeof(*b->context_len));
    b->rope_len = xcalloc(n_sequences, sizeof(*b->rope_len));
    b->page_start = xcalloc(n_sequences + 1, sizeof(*b->page_start));
    b->captures = xcalloc(n_sequences, sizeof(*b->captures));
    b->samples = xcalloc(n_sequences, sizeof(*b->samples));
}

void batch_builder_release(struct batch_builder *b)
{
    free(b->token_ids);
    free(b->feature_rows);
    free(b->targets);
    free(b->target_tops);
    free(b->positions);
    free(b->want_logits);
    free(b->query_start);
    free(b->context_len);
    free(b->rope_len);
    free(b->page_start);
    free(b->captures);
    free(b->samples);
    free(b->pages);
    free(b->history);
    free(b->banned);
    free(b->bias_ids);
    free(b->bias_values);
    free(b->features);
    memset(b, 0, sizeof(*b));
}

/* `list` with room for n elements; capacities only grow, so a running daemon stops allocating. */
static void *grow(void *list, size_t n, size_t size, size_t *capacity)
{
    if (n <= *capacity)
        return list;
    size_t larger = n + n / 2 + 64;
    list = xrealloc(list, larger, size);
    *capacity = larger;
    return list;
}

static int has_penalties(const struct sampling *s)
{
    return s->repetition_penalty != 1.0f || s->presence_penalty != 0.0f ||
           s->frequency_penalty != 0.0f;
}

static void add_history(struct batch_builder *b, struct sample_row *row, const struct sequence *q)
{
    const struct request *r = q->ticket->request;
    int32_t n_ids = r->inputs_embeds ? 0 : r->n_ids, n = n_ids + q->n_output;
    b->history = grow(b->history, (size_t)b->batch.n_history + (size_t)n, sizeof(*b->history),
                      &b->history_capacity);
    int32_t *history = b->history + b->batch.n_history;
    memcpy(history, r->ids, (size_t)n_ids * sizeof(*history));
    if (q->n_output > 0)
        memcpy(history + n_ids, q->output, (size_t)q->n_output * sizeof(*history));
    row->history_start = b->batch.n_history;
    row->n_prompt = n_ids;
    row->n_output = q->n_output;
    b->batch.n_history += n;
}

/* Until min_tokens are drawn no token may end the candidate. */
static void add_banned(struct batch_builder *b, struct sample_row *row, const struct request *r)
{
    int32_t n_eos = r->ignore_eos ? 0 : b->n_eos, n = n_eos + r->n_stop_token_ids;
    b->banned = grow(b->banned, (size_t)b->batch.n_banned + (size_t)n, sizeof(*b->banned),
                     &b->banned_capacity);
    int32_t *banned = b->banned + b->batch.n_banned;
    for (int32_t i = 0; i < n_eos; i++)
        banned[i] = b->eos_ids[i];
    for (int32_t i = 0; i < r->n_stop_token_ids; i++)
        banned[n_eos + i] = r->stop_token_ids[i];
    row->banned_start = b->batch.n_banned;
    row->n_banned = n;
    b->batch.n_banned += n;
}

static void add_bias(struct batch_builder *b, struct sample_row *row, const struct request *r)
{
    size_t n = (size_t)b->batch.n_bias + (size_t)r->n_bias, capacity = b->bias_capacity;
    b->bias_ids = grow(b->bias_ids, n, sizeof(*b->bias_ids), &capacity);
    b->bias_values = grow(b->bias_values, n, sizeof(*b->bias_values), &b->bias_capacity);
    for (int32_t i = 0; i < r->n_bias; i++) {
        b->bias_ids[b->batch.n_bias + i] = r->bias_ids[i];
        b->bias_values[b->batch.n_bias + i] = r->bias_values[i];
    }
    row->bias_start = b->batch.n_bias;
    row->n_bias = r->n_bias;
    b->batch.n_bias += r->n_bias;
}

/* The item's last row draws a token: one for its sequence, or one for each candidate when this is
 * the end of a prompt pass that they share. */
static void add_samples(struct batch_builder *b, struct step_item *item, int32_t index)
{
    struct sequence *q = item->sequence;
    const struct ticket *t = q->ticket;
    const struct request *r = t->request;
    item->first_sample = b->batch.n_samples;
    item->n_samples = 0;
    if (r->max_tokens == 0 || item->start + item->n_new < sequence_n_known(q))
        return;
    item->n_samples = t->forked || t->beams ? 1 : t->n_sequences;
    for (int32_t i = 0; i < item->n_samples; i++) {
        if (b->batch.n_samples == b->max_sequences)
            BUG("more than %d samples in one batch", b->max_sequences);
        struct sample_row *row = &b->samples[b->batch.n_samples++];
        *row = (struct sample_row){.row = b->batch.n_tokens - 1,
                                   .sequence = index,
                                   .sampling = r->sampling,
                                   .candidate = q->candidate + i,
                                   .position = q->n_output};
        if (t->beams)
            row->sampling.n_beam_best = t->beams->settings.n_best;
        if (has_penalties(&r->sampling))
            add_history(b, row, q);
        if (q->n_output < r->min_tokens)
            add_banned(b, row, r);
        if (r->n_bias > 0)
            add_bias(b, row, r);
    }
}

/* A row [feature_dim] that takes an embedding's place. */
static int32_t add_feature(struct batch_builder *b, const float *row)
{
    size_t dim = (size_t)b->feature_dim, n = (size_t)b->batch.n_features;
    b->features = grow(b->features, (n + 1) * dim, sizeof(*b->features), &b->features_capacity);
    memcpy(b->features + n * dim, row, dim * sizeof(*b->features));
    return b->batch.n_features++;
}

static void add_tokens(struct batch_builder *b, struct step_item *item)
{
    struct sequence *q = item->sequence;
    const struct ticket *t = q->ticket;
    const struct request *r = t->request;
    size_t dim = (size_t)b->feature_dim;
    item->n_images = item->n_targets = 0;
    for (int32_t i = item->start; i < item->start + item->n_new; i++) {
        int32_t row = b->batch.n_tokens++;
        int in_prompt = i < t->n_prompt;
        b->token_ids[row] = sequence_id(q, i);
        b->positions[row] = (float)i;
        b->feature_rows[row] = -1;
        if (in_prompt && r->inputs_embeds)
            b->feature_rows[row] = add_feature(b, r->inputs_embeds + (size_t)i * dim);
        else if (in_prompt && t->features && r->ids[i] == r->image_token_id) // the k-th takes row k
            b->feature_rows[row] = add_feature(
                b, t->features + (size_t)(q->n_image_computed + item->n_images++) * dim);
        b->targets[row] = in_prompt && r->targets ? r->targets[i] : -1;
        b->target_tops[row] = b->targets[row] >= 0 ? (uint8_t)r->n_target_top : 0;
        item->n_targets += b->targets[row] >= 0 ? 1 + r->n_target_top : 0;
        b->want_logits[row] = in_prompt && r->want_logits ? r->want_logits[i] : 0;
    }
}

static void add_item(struct batch_builder *b, struct step *p, int32_t index)
{
    struct step_item *item = &p->items[index];
    const struct sequence *q = item->sequence;
    const struct request *r = q->ticket->request;
    int32_t end = item->start + item->n_new, n_prompt = q->ticket->n_prompt;

    if (b->batch.n_tokens + item->n_new > b->max_tokens)
        BUG("more than %d tokens in one batch", b->max_tokens);
    add_tokens(b, item);
    p->n_targets += item->n_targets;
    b->query_start[index + 1] = b->batch.n_tokens;
    b->context_len[index] = end;
    b->rope_len[index] = end > n_prompt ? end : n_prompt;
    b->captures[index] = item->start < n_prompt ? r->captures : 0;
    p->has_captures |= b->captures[index] != 0;
    b->pages = grow(b->pages, (size_t)b->batch.n_pages + (size_t)q->n_pages, sizeof(*b->pages),
                    &b->pages_capacity);
    memcpy(b->pages + b->batch.n_pages, q->pages, (size_t)q->n_pages * sizeof(*b->pages));
    b->batch.n_pages += q->n_pages;
    b->page_start[index + 1] = b->batch.n_pages;
    add_samples(b, item, index);
}

const struct batch *step_batch(struct step *p, struct batch_builder *b)
{
    if (p->n_items > b->max_sequences)
        BUG("more than %d sequences in one batch", b->max_sequences);
    b->batch = (struct batch){.step_id = p->step_id,
                              .n_sequences = p->n_items,
                              .n_copies = p->n_copies,
                              .feature_dim = b->feature_dim};
    p->has_captures = p->n_targets = 0;
    for (int32_t i = 0; i < p->n_items; i++)
        add_item(b, p, i);
    p->n_tokens = b->batch.n_tokens;
    p->n_samples = b->batch.n_samples;

    b->batch.token_ids = b->token_ids;
    b->batch.positions = b->positions;
    b->batch.feature_rows = b->feature_rows;
    b->batch.targets = b->targets;
    b->batch.target_tops = b->target_tops;
    b->batch.want_logits = b->want_logits;
    b->batch.query_start = b->query_start;
    b->batch.context_len = b->context_len;
    b->batch.rope_len = b->rope_len;
    b->batch.captures = b->captures;
    b->batch.page_start = b->page_start;
    b->batch.pages = b->pages;
    b->batch.copy_src = p->copy_src;
    b->batch.copy_dst = p->copy_dst;
    b->batch.samples = b->samples;
    b->batch.history = b->history;
    b->batch.banned = b->banned;
    b->batch.bias_ids = b->bias_ids;
    b->batch.bias_values = b->bias_values;
    b->batch.features = b->features;
    return &b->batch;
}
