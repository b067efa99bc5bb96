/*
 * Attention probabilities on the host (attention_probs.h).
 */
#include "daemon/model/attention_probs.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

/* The keys of one page [head_dim / 2, page_size, 2] to [head_dim, page_size]. */
static void part_pairs(float *keys, const float *pairs, const struct kv_pages *kv)
{
    for (int64_t d = 0; d < kv->head_dim; d++) {
        for (int64_t i = 0; i < kv->page_size; i++)
            keys[d * kv->page_size + i] = pairs[(d / 2 * kv->page_size + i) * 2 + d % 2];
    }
}

/* The same of codes [head_dim / 2, page_size / 16, 2, 16] or [head_dim, page_size], times their
 * scales. */
static void decode_keys(float *keys, const int8_t *codes, const struct kv_pages *kv, int in_pairs)
{
    const int64_t size = kv->page_size;
    for (int64_t d = 0; d < kv->head_dim; d++) {
        for (int64_t i = 0; i < size; i++) {
            int64_t at =
                in_pairs ? ((d / 2 * size / 16 + i / 16) * 2 + d % 2) * 16 + i % 16 : d * size + i;
            float scale;
            memcpy(&scale, codes + kv->head_dim * size + i * 4, sizeof(scale));
            keys[d * size + i] = (float)codes[at] * scale;
        }
    }
}

/* keys [n_pages, head_dim, page_size] <- one head of the pages, as float32. */
static void read_keys(float *keys, struct backend *b, const struct kv_pages *kv,
                      const int32_t *pages, int64_t n_pages, int32_t kv_head)
{
    const size_t n = (size_t)kv->head_dim * (size_t)kv->page_size;
    const size_t n_bytes = kv_head_bytes(kv->head_dim, kv->page_size, kv->dtype);
    const int in_pairs = kv->dtype != DTYPE_F32 && b->kv_in_pairs;
    void *page = xcalloc(1, n_bytes);
    float *widened = xcalloc(n, sizeof(float));
    for (int64_t p = 0; p < n_pages; p++) {
        size_t index = (size_t)pages[p] * (size_t)kv->n_kv_heads + (size_t)kv_head;
        op_download(b, page, (const char *)kv->k + index * n_bytes, n_bytes);
        if (kv->dtype == DTYPE_I8) {
            decode_keys(keys + (size_t)p * n, page, kv, in_pairs);
            continue;
        }
        tensor_widen(in_pairs ? widened : keys + (size_t)p * n, page, kv->dtype, (int64_t)n);
        if (in_pairs)
            part_pairs(keys + (size_t)p * n, widened, kv);
    }
    free(widened);
    free(page);
}

/* row[first, first + n) <- its softmax. */
static void softmax(float *row, int32_t n)
{
    float largest = row[0];
    double sum = 0;
    for (int32_t j = 1; j < n; j++)
        largest = fmaxf(largest, row[j]);
    for (int32_t j = 0; j < n; j++) {
        row[j] = expf(row[j] - largest);
        sum += row[j];
    }
    for (int32_t j = 0; j < n; j++)
        row[j] = (float)(row[j] / sum);
}

void attention_probs(float *probs, int32_t n_cols, struct backend *b, const struct tensor *q,
                     const struct kv_pages *kv, const int32_t *pages, int32_t kv_head,
                     int32_t context_len, int32_t window)
{
    int32_t n = (int32_t)q->shape[0], d = kv->head_dim, size = kv->page_size;
    int64_t n_pages = (context_len + size - 1) / size;
    float scale = (float)(1.0 / sqrt((double)d));
    const int is_rounded = kv->dtype == DTYPE_BF16 || (kv->dtype == DTYPE_I8 && b->kv_in_pairs);
    float *keys = xcalloc((size_t)(n_pages * size * d), sizeof(float));
    float *query = xcalloc((size_t)d, sizeof(float));
    size_t size_q = dtype_size(q->dtype);
    void *held = xcalloc((size_t)d, size_q);
    read_keys(keys, b, kv, pages, n_pages, kv_head);
    memset(probs, 0, (size_t)n * (size_t)n_cols * sizeof(float));
    for (int32_t i = 0; i < n; i++) {
        int32_t end = context_len - n + i + 1;
        int32_t start = window > 0 && end > window ? end - window : 0;
        float *row = probs + (int64_t)i * n_cols;
        op_download(b, held, (const char *)q->data + (size_t)(i * q->row_stride) * size_q,
                    (size_t)d * size_q);
        tensor_widen(query, held, q->dtype, d);
        for (int32_t k = 0; is_rounded && k < d; k++)
            query[k] = bf16_to_f32(f32_to_bf16(query[k]));
        for (int32_t j = start; j < end; j++) {
            const float *key = keys + (int64_t)(j / size) * size * d + j % size;
            float dot = 0;
            for (int32_t k = 0; k < d; k++)
                dot += query[k] * key[(int64_t)k * size];
            row[j] = dot * scale;
        }
        softmax(row + start, end - start);
    }
    free(held);
    free(query);
    free(keys);
}
