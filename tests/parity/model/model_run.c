/*
 * A checkpoint opened in one process, and batches for it (model_run.h).
 */
#include "tests/parity/model/model_run.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

struct language_limits model_run_limits(void)
{
    return (struct language_limits){.max_tokens = RUN_MAX_TOKENS,
                                    .max_sequences = RUN_MAX_SEQUENCES,
                                    .max_model_len = RUN_MAX_MODEL_LEN,
                                    .page_size = RUN_PAGE_SIZE,
                                    .n_pages = RUN_N_PAGES};
}

void model_run_open(struct model_run *r, const char *dir, enum dtype dtype, struct backend *b)
{
    struct error err;
    struct language_limits limits = model_run_limits();
    limits.kv_dtype = dtype;
    struct topology alone = {.role = ROLE_LANGUAGE, .layout = {1, 1, 1}};
    static const float mean[4] = {0, 0, 0, 0}, std[4] = {1, 1, 1, 1};
    const struct quantization quantization = r->config.quantization;
    if (model_config_load(&r->config, dir, &err) != 0)
        die("%s: %s", dir, err.msg);
    if (quantization.method != QUANTIZATION_NONE)
        r->config.quantization = quantization;
    if (weights_open(&r->weights, dir, &r->config, 0, &err) != 0)
        die("%s: %s", dir, err.msg);
    r->backend = b;
    vision_init(&r->vision, &r->config, &r->weights, r->backend, dtype, 2, mean, std);
    language_init(&r->language, &r->config, &r->weights, r->backend, dtype, &alone, NULL, &limits);
}

void model_run_close(struct model_run *r)
{
    language_release(&r->language);
    vision_release(&r->vision);
    weights_release(&r->weights);
}

void batch_begin(struct batch_builder *b, const float *features, int32_t n_features, int32_t dim)
{
    memset(b, 0, sizeof(*b));
    b->batch = (struct batch){.token_ids = b->token_ids,
                              .positions = b->positions,
                              .feature_rows = b->feature_rows,
                              .targets = b->targets,
                              .target_tops = b->target_tops,
                              .want_logits = b->want_logits,
                              .query_start = b->query_start,
                              .context_len = b->context_len,
                              .rope_len = b->rope_len,
                              .captures = b->captures,
                              .page_start = b->page_start,
                              .pages = b->pages,
                              .samples = b->samples,
                              .n_features = n_features,
                              .feature_dim = dim,
                              .features = features};
}

void batch_add(struct batch_builder *b, const struct sequence_part *p)
{
    struct batch *t = &b->batch;
    int32_t s = t->n_sequences++, feature = p->first_feature;
    for (int32_t i = 0; i < p->first + p->n; i++) {
        int is_image = p->image_token_id >= 0 && p->ids[i] == p->image_token_id;
        if (i >= p->first) {
            int32_t r = t->n_tokens++;
            b->token_ids[r] = p->ids[i];
            b->positions[r] = (float)i;
            b->feature_rows[r] = is_image ? feature : -1;
            b->targets[r] = -1;
            b->want_logits[r] = (p->captures & CAPTURE_LOGITS) != 0;
        }
        feature += is_image;
    }
    int32_t length = p->first + p->n;
    b->query_start[s + 1] = t->n_tokens;
    b->context_len[s] = length;
    b->rope_len[s] = p->rope_len;
    b->captures[s] = p->captures;
    for (int32_t i = 0; i < (length + RUN_PAGE_SIZE - 1) / RUN_PAGE_SIZE; i++)
        b->pages[t->n_pages++] = p->first_page + i;
    b->page_start[s + 1] = t->n_pages;
    if (p->sample)
        b->samples[t->n_samples++] =
            (struct sample_row){.row = t->n_tokens - 1,
                                .sequence = s,
                                .sampling = {.top_p = 1, .repetition_penalty = 1, .n_logprobs = 5}};
}

const struct captured *find_capture(const struct capture_list *l, const char *name, int32_t owner)
{
    for (int32_t i = 0; i < l->n; i++)
        if (l->items[i].owner == owner && strcmp(l->items[i].name, name) == 0)
            return &l->items[i];
    return NULL;
}

float *join_captures(const struct capture_list *l, const char *name, int32_t owner, int32_t *n_rows,
                     int32_t *n_cols)
{
    float *all = NULL;
    *n_rows = 0;
    for (int32_t i = 0; i < l->n; i++) {
        const struct captured *c = &l->items[i];
        if (c->owner != owner || strcmp(c->name, name) != 0)
            continue;
        if (c->first_row != *n_rows)
            die("%s: row %d follows row %d", name, c->first_row, *n_rows);
        size_t row = (size_t)c->n_cols;
        *n_cols = c->n_cols;
        all = xrealloc(all, (size_t)(*n_rows + c->n_rows) * row, sizeof(float));
        memcpy(all + (size_t)*n_rows * row, c->data, (size_t)c->n_rows * row * sizeof(float));
        *n_rows += c->n_rows;
    }
    return all;
}
